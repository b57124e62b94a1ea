import csv
import json
import os
import pty
import re
import select
import shlex
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, SAMPLE
from huggingface_hub import ModelCard
from safetensors.torch import load_file

import export
import multitask_classifier as mc
import predict
from batches import collate
from bert import BertModel
from checkpoint import checkpoint_content, write_checkpoint
from datasets import load_data
from export import hub_id
from options import parse_options
from tasks import TASKS

KINDS = {
    "plain": [],
    "cut": ["--max_length", "9"],
    "cross": ["--para_encoding", "cross", "--sts_encoding", "cross", "--max_length", "40"],
    "both": ["--para_encoding", "cross", "--sts_encoding", "both"],
    "soft": ["--moe", "soft"],
    "hard": ["--moe", "hard"],
    "only sts": ["--sts"],
    "tags": ["--additional_input"],
}


@torch.no_grad()
def scatter(model, data):
    """Change the weights so that the answers differ much from row to row."""
    for name, parameter in model.named_parameters():
        if name.startswith("bert.") and parameter.dim() > 1:
            parameter.add_(0.6 * torch.randn_like(parameter))
    model.attention_layer.v.weight.mul_(5)
    outputs = model.eval()(collate({name: (each, np.arange(64)) for name, each in data.items()}))
    for name, output in outputs.items():
        if TASKS[name].num_classes:
            head = (model.joint_heads if name in model.joint_heads else model.heads)[name]
            head.out.bias.sub_(output.mean(dim=0))


@pytest.fixture(scope="module")
def make_checkpoint(tmp_path_factory, tiny_directory, request):
    """name of KINDS -> the path of a checkpoint"""
    folder, made = tmp_path_factory.mktemp("checkpoints"), {}

    def make(kind: str):
        if kind not in made:
            flags = ["--bert_model", str(tiny_directory), *KINDS[kind]]
            flags += ["--cache_dir", str(folder / "cache"), "--data_dir", str(SAMPLE)]
            if kind == "tags":
                flags += ["--spacy_model", str(request.getfixturevalue("pipeline_directory"))]
            options = parse_options(flags)
            torch.manual_seed(4)
            model, tokenizer, tagger = mc.load_pretrained(options)
            length = options.max_length or model.bert.config.max_position_embeddings
            parts = options, tokenizer, length, ("dev",), tagger, model.encodings
            scatter(model, load_data(*parts)["dev"])
            scores = {"sst": {"accuracy": 0.4321}, "sts": {"pearson": 0.8765}}
            content = checkpoint_content(model, tokenizer, options, 3, scores, tagger)
            made[kind] = folder / f"{kind.replace(' ', '-')}.pt"
            write_checkpoint(made[kind], content)
        return made[kind]

    return make


@pytest.fixture
def ask(make_checkpoint, tmp_path, capsys):
    """(kind, input, flags) -> the answers, and the lines of warning."""

    def ask(kind, content, *flags):
        path = tmp_path / "input.txt"
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path = content
        output = tmp_path / "answers.jsonl"
        chosen = ["--json", "--output", str(output), "--cache_dir", str(tmp_path / "cache")]
        command = [str(path), "--checkpoint", str(make_checkpoint(kind)), *chosen, *flags]
        assert predict.main(command) == 0
        errors = capsys.readouterr().err.splitlines()
        warnings = [line for line in errors if line.startswith("warning: ")]
        return [json.loads(line) for line in output.read_text().splitlines()], warnings

    return ask


# ----------------------------------------------------------------------------- the answers are right


@pytest.mark.parametrize("kind", ["plain", "cut", "cross", "both", "soft", "hard", "tags"])
def test_answers_are_those_of_an_evaluation(ask, make_checkpoint, tmp_path, kind):
    flags = ["--evaluate", str(make_checkpoint(kind)), "--data_dir", str(SAMPLE)]
    flags += ["--predictions_dir", str(tmp_path), "--cache_dir", str(tmp_path / "cache")]
    assert mc.main(flags) == 0
    for name, task in TASKS.items():
        for split in ("dev", "test"):
            with open(tmp_path / f"{name}-{split}-output.csv", newline="") as file:
                _, *expected = csv.reader(file, delimiter="\t")
            answers, _ = ask(kind, SAMPLE / task.filename(split))
            assert [answer["id"] for answer in answers] == [id for id, _ in expected]
            values = np.array([answer[task.title] for answer in answers])
            wanted = np.array([float(value) for _, value in expected])
            assert wanted.std() > 0.1  # else equal answers would mean nothing
            if name == "para":
                values = values > 0.5
            np.testing.assert_allclose(values, wanted, atol=0 if task.num_classes else 1e-5)


@pytest.mark.parametrize("kind", ["plain", "cross", "both", "hard"])
def test_answers_are_those_of_each_sentence_alone(ask, make_checkpoint, kind):
    """Padded, one at a time, without the packed batches."""
    model, tokenizer, _ = mc.load_checkpoint(make_checkpoint(kind))
    model.eval()
    lines = ["good", "one two three", "a, b.", "good\tbad", "one two\tthree four five six", "c\tc"]
    answers, warnings = ask(kind, "\n".join(lines).encode())
    assert warnings == []
    for line, answer in zip(lines, answers, strict=True):
        inputs = []
        for sentence in line.split("\t"):
            batch = tokenizer([sentence], return_tensors="pt")
            inputs += [batch["input_ids"], batch["attention_mask"]]
        with torch.no_grad():
            if len(inputs) == 2:
                shares = model.predict_sentiment(*inputs)[0].exp()
                shares = (shares / shares.sum()).numpy()
                np.testing.assert_allclose(answer["sentiment_probabilities"], shares, atol=2e-5)
                assert answer["sentiment"] == shares.argmax() and len(answer) == 3
            else:
                no, yes = model.predict_paraphrase(*inputs)[0].exp().tolist()
                similarity = min(max(model.predict_similarity(*inputs).item(), 0), 5)
                assert answer["paraphrase"] == pytest.approx(yes / (no + yes), abs=2e-5)
                assert answer["similarity"] == pytest.approx(similarity, abs=2e-5)
                assert len(answer) == 3


def test_many_chunks_are_answered_in_the_order_of_the_lines(ask):
    known = ["a", "b b", "c c c c c", "a\tb b", "c c c c c\ta", "d d d d d d d d\tb b b b"]
    alone, _ = ask("plain", "\n".join(known).encode())
    values = {line: list(answer.values())[1:] for line, answer in zip(known, alone)}
    assert len({str(each) for each in values.values()}) == len(known)
    lines = np.random.default_rng(0).choice(known, 3 * predict.CHUNKS[-1] + 7).tolist()
    answers, _ = ask("plain", "\n".join(lines).encode())
    assert [answer["line"] for answer in answers] == list(range(1, len(lines) + 1))
    for line, answer in zip(lines, answers, strict=True):
        np.testing.assert_allclose(
            np.hstack(list(answer.values())[1:]), np.hstack(values[line]), atol=2e-5
        )


def test_the_precision_is_that_of_training(ask, make_checkpoint, tmp_path):
    lines = b"a b c\nd e f g"
    exact, _ = ask("plain", lines)
    assert ask("plain", lines, "--precision", "bfloat16")[0] != exact
    content = torch.load(make_checkpoint("plain"), weights_only=True)
    content["options"]["precision"] = "bfloat16"
    torch.save(content, tmp_path / "half.pt")
    (tmp_path / "lines").write_bytes(lines)
    output = tmp_path / "half.jsonl"
    command = ["--checkpoint", str(tmp_path / "half.pt"), "--json", "--output", str(output)]
    assert predict.main([str(tmp_path / "lines"), *command]) == 0
    half = [json.loads(line) for line in output.read_text().splitlines()]
    assert half == ask("plain", lines, "--precision", "bfloat16")[0]


# ------------------------------------------------------------------------------- all kinds of input


def test_lines_that_cannot_be_answered_keep_their_place(ask):
    lines = [b"\xef\xbb\xbfa b\r", b"", b"a\tb\tc", b"\xff", b"   ", b"a b", b"x" * 100_001, b"a\t"]
    answers, warnings = ask("plain", b"\n".join(lines))
    assert [answer.get("error") for answer in answers] == [
        None,
        "empty",
        "more than one tab",
        "not UTF-8 text",
        "empty",
        None,
        "longer than 100000 bytes",
        None,
    ]
    assert answers[0] | {"line": 6} == answers[5]  # neither the mark at the start nor \r counts
    assert warnings == [
        "warning: 2 lines not answered: empty (first: line 2)",
        "warning: 1 line not answered: more than one tab (first: line 3)",
        "warning: 1 line not answered: not UTF-8 text (first: line 4)",
        "warning: 1 line not answered: longer than 100000 bytes (first: line 7)",
        "warning: 1 line answered although a sentence is empty (first: line 8)",
    ]


@pytest.mark.parametrize(
    "kind, longest", [("cut", 9), ("plain", 128), ("cross", 40), ("only sts", 128)]
)
def test_a_sentence_that_is_too_long_is_cut_and_counted(ask, kind, longest):
    """[CLS] and [SEP] count too, and in one sequence a second [SEP]."""
    room = longest - (3 if kind == "cross" else 2)
    pair = kind in ("cross", "only sts")
    first, second = (room // 2, room - room // 2) if kind == "cross" else (room, 1)
    fits = "a " * first + ("\t" + "b " * second) * pair
    lines = [fits, "a " + fits] + [fits + "b"] * (kind == "cross")
    answers, warnings = ask(kind, "\n".join(lines).encode())
    assert ["cut" in answer for answer in answers] == [False] + [True] * (len(lines) - 1)
    (warning,) = warnings
    count = "2 lines" if kind == "cross" else "1 line"
    assert warning == f"warning: {count} cut after {longest} word pieces (first: line 2)"


def test_tasks_are_chosen(ask, make_checkpoint, tmp_path, capsys):
    lines = b"a b\na b\tc"
    (one, two), warnings = ask("plain", lines, "--task", "sts")
    assert set(two) == {"line", "similarity"}
    assert one["error"] == "one sentence, where only similarity can be answered"
    assert len(warnings) == 1
    both, _ = ask("plain", lines, "--task", "sst", "--task", "para")
    assert set(both[0]) == {"line", "sentiment", "sentiment_probabilities"}
    assert set(both[1]) == {"line", "paraphrase"}
    assert ask("only sts", lines)[0][1].keys() == {"line", "similarity"}
    path = make_checkpoint("only sts")
    assert predict.main(["--checkpoint", str(path), "--task", "para", os.devnull]) == 1
    message = f"error: {path}: was not trained on para, only on sts\n"
    assert capsys.readouterr().err == message


def test_text_is_for_people(make_checkpoint, tmp_path, capsys):
    (tmp_path / "in").write_text("a b c\n\nä b\tc d")
    assert predict.main([str(tmp_path / "in"), "--checkpoint", str(make_checkpoint("plain"))]) == 0
    one, two, three = capsys.readouterr().out.splitlines()
    names = "|".join(TASKS["sst"].classes)
    shares = r"(?:\d\.\d\d ){4}\d\.\d\d"
    assert re.fullmatch(rf"sentiment \d (?:{names}) +{shares}  a b c", one)
    assert two == "(empty)"
    assert re.fullmatch(r"paraphrase \d\.\d\d  similarity \d\.\d\d +ä b \| c d", three)
    assert one.index("a b c") == three.index("ä b")
    rows = tmp_path / "rows.csv"
    rows.write_text('id\tsentence\n1\t"a\nb"\n2\tc\n')
    assert predict.main([str(rows), "--checkpoint", str(make_checkpoint("plain"))]) == 0
    assert [line.split("  ")[-1] for line in capsys.readouterr().out.splitlines()] == ["a b", "c"]


def test_csv_rows_that_cannot_be_answered_keep_their_place(ask, tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("sentence2\tid\tx\tsentence1\nb\t7\t\ta\nb\t8\n\t9\t\t\nb\t10\t\ta\n")
    answers, warnings = ask("plain", path)
    assert [answer["id"] for answer in answers] == ["7", None, "9", "10"]
    assert answers[1]["error"] == "2 cells instead of 4"
    assert answers[0] | {"id": "10"} == answers[3] and "similarity" in answers[2]
    assert warnings == [
        "warning: 1 line not answered: 2 cells instead of 4 (first: line 3)",
        "warning: 1 line answered although a sentence is empty (first: line 4)",
    ]


@pytest.mark.parametrize(
    "content, message",
    [
        (
            b"id\ttext\n1\ta\n",
            "line 1 does not name tab-separated columns id, sentence or id, sent",
        ),
        (b"sentence\nabc\n", "line 1 has no tab in it"),
        (b"id\tsentence\n1\t\xff\n", "line 2 is not UTF-8 text"),
        (b'id\tsentence\n1\t"a\n', "is a quote missing?"),
        (b"", "line 1 does not name"),
    ],
)
def test_a_csv_of_no_use_is_one_line(make_checkpoint, tmp_path, capsys, content, message):
    path, output = tmp_path / "rows.csv", tmp_path / "out"
    path.write_bytes(content)
    output.write_text("what was there")
    flags = ["--checkpoint", str(make_checkpoint("plain")), "--output", str(output)]
    assert predict.main([str(path), *flags]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {path}: ") and message in error and error.count("\n") == 1
    assert output.read_text() == "what was there" and len(list(tmp_path.iterdir())) == 2


def test_what_cannot_be_used_is_one_line(make_checkpoint, tmp_path, capsys):
    checkpoint = str(make_checkpoint("plain"))
    cases = {
        f"{tmp_path}/absent: cannot be read: No such file": [f"{tmp_path}/absent"],
        f"{tmp_path}: cannot be read: Is a directory": [str(tmp_path)],
        "cannot write /dev/null/x": [os.devnull, "--output", "/dev/null/x"],
        f"{checkpoint}: was trained without tags": [os.devnull, "--spacy_model", "en_core_web_sm"],
    }
    for message, flags in cases.items():
        assert predict.main(["--checkpoint", checkpoint, *flags]) == 1
        error = capsys.readouterr().err
        assert error.startswith(f"error: {message}") and error.count("\n") == 1, error
    assert predict.main(["--checkpoint", os.devnull, os.devnull]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(SystemExit):
        predict.main(["--checkpoint", checkpoint, "--export", "x", "--json"])


# -------------------------------------------------------------------------------- as a program runs


def start(checkpoint, *flags, **streams):
    command = [sys.executable, ROOT / "predict.py", "--checkpoint", checkpoint, *flags]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    return subprocess.Popen(command, **pipes | streams)


def read_within(seconds, descriptor, wanted):
    """What comes until `wanted` has come; it has to come in time."""
    found, end = b"", time.monotonic() + seconds
    while wanted not in found:
        assert select.select([descriptor], [], [], max(0, end - time.monotonic()))[0], found
        block = os.read(descriptor, 4096)
        assert block, found
        found += block
    return found.decode()


def test_a_slow_pipe_is_answered_line_by_line(make_checkpoint):
    run = start(make_checkpoint("plain"), "--json")
    for number, line in enumerate((b"a b\n", b"c\td\ne\n", b"f g"), start=1):
        run.stdin.write(line)
        run.stdin.flush()
        if number < 3:  # the last one has no end yet
            last = b'"line": %d,' % (1, 3)[number - 1]
            assert read_within(180, run.stdout.fileno(), last)
    output, errors = run.communicate(timeout=180)
    assert json.loads(output)["line"] == 4 and run.returncode == 0 and errors == b""


@pytest.mark.parametrize("closed", [True, False])
def test_a_reader_that_goes_ends_it_quietly(make_checkpoint, closed):
    """The answers are more than a pipe holds."""
    run = start(make_checkpoint("plain"))
    run.stdin.write(b"a b c\n" * 5000)
    run.stdin.flush()
    assert run.stdout.readline().startswith(b"sentiment")
    run.stdout.close()
    if closed:
        run.stdin.close()
    assert run.wait(timeout=180) == 0
    assert b"Error" not in run.stderr.read()


def test_a_full_disk_is_one_line(make_checkpoint):
    with open("/dev/full", "w") as full:
        run = start(make_checkpoint("plain"), stdout=full)
        _, errors = run.communicate(b"a b\n", timeout=180)
    assert run.returncode == 1
    assert errors == b"error: cannot write the answers: No space left on device\n"


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_it_can_be_interrupted(make_checkpoint, tmp_path, number, code):
    output = tmp_path / "out"
    output.write_text("what was there")
    run = start(make_checkpoint("plain"), "--output", output)
    run.stdin.write(b"a b\n")
    run.stdin.flush()
    deadline = time.monotonic() + 180
    while not list(tmp_path.glob(".out.*")) and time.monotonic() < deadline:
        time.sleep(0.05)  # until it has opened its file
    run.send_signal(number)
    _, errors = run.communicate(timeout=180)
    assert run.returncode == code and errors.decode().splitlines()[-1] == "interrupted"
    assert b"Traceback" not in errors
    assert output.read_text() == "what was there" and len(list(tmp_path.iterdir())) == 1


def test_at_a_terminal_it_asks(make_checkpoint):
    ours, theirs = pty.openpty()
    streams = dict(stdin=theirs, stdout=theirs, env=os.environ | {"TERM": "dumb"})
    run = start(make_checkpoint("plain"), **streams)
    os.close(theirs)
    banner = read_within(180, ours, b"> ")
    assert banner.count("\n") == 2 and "Ctrl-D ends" in banner
    os.write(ours, b"a b c\n")
    assert re.search(r"sentiment \d ", read_within(180, ours, b"\n> "))
    os.write(ours, b"\n")
    read_within(180, ours, b"\n> ")
    os.write(ours, b"a b\tc d\n")
    assert re.search(r"paraphrase \d\.\d\d  similarity \d", read_within(180, ours, b"\n> "))
    os.write(ours, b"\x04")
    assert run.wait(timeout=180) == 0 and run.stderr.read() == b""
    os.close(ours)


MEMORY = f"""
import ctypes, gc, os, sys
sys.path.insert(0, {str(ROOT)!r})
import predict

def resident():
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

seen, answer = [], predict.answer
def watched(*arguments):
    seen.append(resident())
    return answer(*arguments)

predict.answer, predict.CHUNKS = watched, (500,)
code = predict.main(sys.argv[1:])
print(*seen, file=sys.stderr)
sys.exit(code)
"""


def test_memory_does_not_grow_with_the_input(make_checkpoint, tmp_path):
    """20,000 lines: to keep the queries or the answers of the second half would take 4 to 6 MB."""
    rng = np.random.default_rng(0)
    words = [" ".join(rng.choice(list("abcdefgh"), n)) for n in rng.integers(1, 6, 20_001)]
    pairs = enumerate(zip(words, words[1:]))
    lines = [f"{one}\t{two}" if n % 2 else one for n, (one, two) in pairs]
    (tmp_path / "lines").write_text("\n".join(lines))
    flags = [tmp_path / "lines", "--checkpoint", make_checkpoint("plain"), "--json"]
    command = [sys.executable, "-c", MEMORY, *flags]
    done = subprocess.run(command, capture_output=True, timeout=300)
    assert done.returncode == 0 and done.stdout.count(b"\n") == len(lines) == 20_000
    resident = [int(each) / 2**20 for each in done.stderr.splitlines()[-1].split()]
    assert len(resident) == 40 and resident[-1] - resident[20] < 3


def test_importing_does_nothing_heavy():
    heavy = ["sklearn", "transformers", "sentence_transformers", "huggingface_hub", "spacy"]
    code = f"import sys, predict; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\n"


# ------------------------------------------------------------------------------------------ export

SENTENCES = ["Is it good?", "a", "It is rather good, isn't it?", "", "Why not; no idea. " * 20]
OPEN = """
import json, sys
import torch
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoTokenizer

assert "datasets" not in sys.modules
folder, *sentences = sys.argv[1:]
model = SentenceTransformer(folder, trust_remote_code=True, device="cpu")
vectors = model.encode(sentences, convert_to_tensor=True)
tokenizer, encoder = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)
batch = tokenizer(sentences, padding=True, truncation=True, return_tensors="pt")
with torch.no_grad():
    states = encoder.eval()(**batch).last_hidden_state
found = {"vectors": vectors, "similarities": model.similarity(vectors, vectors), "states": states}
found["ids"] = batch["input_ids"]
print(json.dumps({name: each.tolist() for name, each in found.items()}))
"""


@pytest.fixture(scope="module")
def exported(make_checkpoint, tmp_path_factory):
    """kind -> the folder"""
    folder, made = tmp_path_factory.mktemp("exported"), {}

    def export(kind: str):
        if kind not in made:
            target = folder / kind
            command = ["--checkpoint", str(make_checkpoint(kind)), "--export", str(target)]
            assert predict.main(command) == 0
            made[kind] = target
        return made[kind]

    return export


@pytest.mark.parametrize("kind", ["plain", "cut", "both"])
def test_other_libraries_compute_the_same(exported, make_checkpoint, tmp_path, kind):
    """In a new process, in another folder, with our root nowhere on its path."""
    environment = {name: each for name, each in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", OPEN, exported(kind), *SENTENCES]
    run = dict(capture_output=True, text=True, cwd=tmp_path, env=environment)
    done = subprocess.run(command, **run)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    model, tokenizer, checkpoint = mc.load_checkpoint(make_checkpoint(kind))
    limit = checkpoint["options"]["max_length"] or 128
    batch = tokenizer(SENTENCES, True, truncation=True, max_length=limit, return_tensors="pt")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    assert found["ids"] == ids.tolist() and ids.shape[1] == limit  # the last one is cut
    with torch.no_grad():
        vectors = model.eval().embed(ids, mask)
        states = model.bert(ids, mask)["last_hidden_state"]
    real = mask.bool()
    theirs = torch.tensor(found["states"])[real]
    torch.testing.assert_close(theirs, states[real], rtol=1e-5, atol=3e-5)
    torch.testing.assert_close(torch.tensor(found["vectors"]), vectors, rtol=0, atol=1e-5)
    assert torch.pdist(vectors).min() > 0.1
    if kind == "both":
        return
    lines = "\n".join(f"{one}\t{two}" for one in SENTENCES for two in SENTENCES if one or two)
    (tmp_path / "pairs").write_text(lines)
    command = [str(tmp_path / "pairs"), "--checkpoint", str(make_checkpoint(kind)), "--json"]
    assert predict.main([*command, "--output", str(tmp_path / "answers")]) == 0
    answers = map(json.loads, (tmp_path / "answers").read_text().splitlines())
    ours = np.array([answer["similarity"] / 5 for answer in answers])
    theirs = np.array(found["similarities"]).flatten()
    empty = SENTENCES.index("") * (len(SENTENCES) + 1)
    np.testing.assert_allclose(ours, np.delete(theirs, empty).clip(0, 1), atol=1e-5)
    assert ours.std() > 0.1


@pytest.mark.parametrize("kind", ["plain", "cross", "both"])
def test_an_export_is_the_whole_model(exported, make_checkpoint, kind):
    """Put together again from its two weights files."""
    folder = exported(kind)
    model, *_ = mc.load_checkpoint(make_checkpoint(kind))
    again = mc.MultitaskBERT(BertModel.from_pretrained(str(folder)), model.encodings)
    weights = load_file(folder / "heads.safetensors")
    missing, unexpected = again.load_state_dict(weights, strict=False)
    assert not unexpected and all(name.startswith("bert.") for name in missing)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])
    assert any(name.startswith("joint_heads.sts.") for name in weights) == (kind != "plain")


@pytest.mark.parametrize("kind", ["plain", "cross", "both", "only sts"])
def test_the_card_says_what_it_is(exported, make_checkpoint, kind):
    card = ModelCard.load(exported(kind) / "README.md")
    assert card.data.license == "apache-2.0" and card.data.library_name == "sentence-transformers"
    assert "| accuracy | 0.4321 |" in card.content and "| pearson | 0.8765 |" in card.content
    assert ("is not the similarity for which" in card.content) == (kind in ("cross", "both"))
    assert ("`joint_heads.*`" in card.content) == (kind in ("cross", "both"))
    (command,) = re.findall(r"^python multitask_classifier.py .*", card.content, re.MULTILINE)
    options = parse_options(shlex.split(command)[2:])
    assert options.evaluate == f"models/{kind}.pt".replace(" ", "-")
    for path in exported(kind).glob("**/*"):
        if path.suffix in (".md", ".json", ".py"):
            text = path.read_text(encoding="utf-8")
            assert "{" not in text or path.suffix != ".md"
            assert str(ROOT) not in text and str(exported(kind).parent) not in text


def test_the_card_names_the_model_it_began_with():
    assert hub_id("minilm") == "sentence-transformers/all-MiniLM-L6-v2"
    assert hub_id("bert-base-uncased") == "bert-base-uncased"
    assert hub_id("google/bert_uncased_L-2_H-128_A-2").startswith("google/")
    assert hub_id(str(ROOT)) is None and hub_id("tests") is None


@pytest.mark.parametrize("kind, flag", [("tags", "--additional_input"), ("hard", "--moe")])
def test_what_others_cannot_compute_is_not_exported(make_checkpoint, tmp_path, capsys, kind, flag):
    path = make_checkpoint(kind)
    capsys.readouterr()
    assert predict.main(["--checkpoint", str(path), "--export", str(tmp_path / "new")]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {path}: was trained with {flag}") and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_an_export_is_all_or_nothing(make_checkpoint, tmp_path, capsys, monkeypatch):
    command = ["--checkpoint", str(make_checkpoint("plain")), "--export"]
    full, empty = tmp_path / "full", tmp_path / "empty"
    for folder in (full, empty):
        folder.mkdir()
    (full / "mine").write_text("")
    for taken in (full, full / "mine"):
        assert predict.main([*command, str(taken)]) == 1
        assert capsys.readouterr().err.startswith(f"error: {taken}: is there already")
    assert predict.main([*command, "/dev/null/x"]) == 1
    assert capsys.readouterr().err.startswith("error: cannot write /dev/null/x: ")

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(export, "model_card", interrupt)  # the last part of it
        assert predict.main([*command, str(tmp_path / "new")]) == 130
        assert predict.main([*command, str(empty)]) == 130
    assert sorted(path.name for path in tmp_path.glob("**/*")) == ["empty", "full", "mine"]
    assert predict.main([*command, str(empty)]) == 0
    assert (empty / "README.md").exists()
    assert empty.stat().st_mode & 0o777 == full.stat().st_mode & 0o777
