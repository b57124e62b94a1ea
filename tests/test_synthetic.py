import csv
import json
import re
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from conftest import ROOT, SAMPLE
from hypothesis import given
from hypothesis import strategies as st
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression

import generators
import multitask_classifier as mc
import synthetic
from base_bert import BertConfig
from datasets import read_examples
from generators import CausalLM, Gpt2Generator, SmallGenerator, nucleus
from synthetic import NearDuplicates, words_of
from tasks import TASKS

SST_TRAIN = str(SAMPLE / "ids-sst-train.csv")

# ------------------------------------------------------------------------------- near-duplicates

WORDS = st.lists(st.sampled_from("a b c d e f g h".split()), max_size=9).map(" ".join)


def similar(one, other):
    """The definition, as the README gives it."""
    first, second = words_of(one), words_of(other)
    return len(first & second) >= 0.8 * len(first | second)


@given(st.lists(WORDS, max_size=12), st.lists(WORDS, max_size=3), WORDS)
def test_near_duplicates_are_those_of_the_definition(added, corpus, sentence):
    near = NearDuplicates(corpus)
    for each in added:
        near.add(each)
    assert (sentence in near) == any(similar(sentence, each) for each in added)


def test_case_and_punctuation_make_no_difference():
    near = NearDuplicates([])
    near.add("The film , alas , is a mess .")
    assert "the film, alas, is a MESS!" in near and "The film is a triumph." not in near


# ------------------------------------------------------------------------------ the small model

SIZE = dict(vocab_size=50, hidden_size=24, num_hidden_layers=3, num_attention_heads=4)
SIZE |= dict(intermediate_size=37, max_position_embeddings=20)


@pytest.fixture
def model():
    torch.manual_seed(3)
    model = CausalLM(BertConfig(**SIZE)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def test_the_small_model_equals_a_decoder_of_transformers(model):
    config = transformers.BertConfig(**SIZE, is_decoder=True, layer_norm_eps=1e-12)
    theirs = transformers.BertModel(config, add_pooling_layer=False).eval()
    weights = {
        f"encoder.layer.{k[7:]}": v for k, v in model.state_dict().items() if k[:7] == "layers."
    }
    weights |= {
        "embeddings.word_embeddings.weight": model.words.weight,
        "embeddings.position_embeddings.weight": model.positions.weight,
        "embeddings.token_type_embeddings.weight": torch.zeros(2, SIZE["hidden_size"]),
        "embeddings.LayerNorm.weight": model.norm.weight,
        "embeddings.LayerNorm.bias": model.norm.bias,
    }
    # their LayerNorm comes after the sum too, with their eps
    model.norm.eps = config.layer_norm_eps
    theirs.load_state_dict(weights)
    ids = torch.randint(0, 50, (4, 11))
    expected = theirs(input_ids=ids).last_hidden_state @ model.words.weight.T
    torch.testing.assert_close(model(ids), expected, rtol=1e-4, atol=1e-4)


def test_kept_states_give_the_same(model):
    ids = torch.randint(0, 50, (4, 11))
    expected = model(ids)
    model.keep_past(4)
    found = [model(ids[:, place : place + 1], place) for place in range(11)]
    model.keep_past(None)
    torch.testing.assert_close(torch.cat(found, dim=1), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model(ids), expected)


@pytest.mark.parametrize("looked_at_first", [1, 2, 3, 1000])
def test_nucleus_sampling_has_the_published_distribution(looked_at_first, monkeypatch):
    """Of 0.4, 0.3, 0.2, 0.1 the first three reach 0.8; what is left is drawn in proportion."""
    monkeypatch.setattr(generators, "LIKELY", looked_at_first)
    logits = torch.tensor([0.1, 0.4, 0.2, 0.3]).log().expand(60_000, 4)
    shares = torch.bincount(nucleus(logits, 0.8, 1.0), minlength=4) / 60_000
    expected = torch.tensor([0.0, 0.4, 0.2, 0.3]) / 0.9
    torch.testing.assert_close(shares, expected, rtol=0, atol=0.01)
    hot = torch.bincount(nucleus(logits, 1.0, 2.0), minlength=4) / 60_000
    expected = torch.tensor([0.1, 0.4, 0.2, 0.3]).sqrt()
    torch.testing.assert_close(hot, expected / expected.sum(), rtol=0, atol=0.01)


@pytest.fixture
def small(tmp_path, tiny_directory, monkeypatch):
    """Flags for a small model that is smaller still."""
    size = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128)
    monkeypatch.setattr(SmallGenerator, "SIZE", size)
    flags = [
        "--generator",
        "small",
        "--sst_train",
        SST_TRAIN,
        "--epochs",
        "2",
        "--num_samples",
        "63",
    ]
    return flags + ["--batch_size", "32", "--output", str(tmp_path / "new.csv")]


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def test_small_keeps_its_best_epoch_and_stops_when_it_overfits(small, tmp_path, monkeypatch):
    """Dev perplexities as if: worse by less than a tenth, the best, worse by more."""
    left, seen = iter([50.0, 54.0, 40.0, 43.0, 45.0, 1.0]), []

    def perplexity(self, examples):
        seen.append(self.model.words.weight.detach().clone())
        return next(left)

    monkeypatch.setattr(SmallGenerator, "perplexity", perplexity)
    args = synthetic.parse([*small, "--epochs", "9"])
    generator = SmallGenerator(args, torch.device("cpu"))
    train = read_examples(SST_TRAIN, TASKS["sst"], "train")[:100]
    generator.fit(train, train[:10], tmp_path)
    assert len(seen) == 5
    assert torch.equal(generator.model.words.weight, seen[2])


def test_small_learns_more_than_how_frequent_words_are(small, tmp_path):
    train, dev = (
        read_examples(SAMPLE / TASKS["sst"].filename(split), TASKS["sst"], split)
        for split in ("train", "dev")
    )
    generator = SmallGenerator(synthetic.parse([*small, "--epochs", "4"]), torch.device("cpu"))
    generator.fit(train, dev, tmp_path)
    counts = Counter(piece for row in generator._rows(train) for piece in row[1:])
    pieces = [piece for row in generator._rows(dev) for piece in row[1:]]
    by_frequency = np.exp(-np.mean([np.log(counts[p] / counts.total()) for p in pieces]))
    assert generator.perplexity(dev) < by_frequency / 3


def test_small_for_real(small, tmp_path, capsys):
    assert synthetic.main(small) == 0
    rows = rows_of(tmp_path / "new.csv")
    assert Counter(row["sentiment"] for row in rows) == dict(zip("01234", [13, 13, 13, 12, 12]))
    assert len({row["id"] for row in rows}) == 63
    assert all(re.fullmatch(r"synthetic-small-\d{6}", row["id"]) for row in rows)
    texts = [row["sentence"] for row in rows]
    for split in ("train", "dev", "test"):
        for real in read_examples(SAMPLE / TASKS["sst"].filename(split), TASKS["sst"], split):
            assert not any(similar(text, real.sentences[0]) for text in texts)
    for number, text in enumerate(texts):
        assert not any(similar(text, other) for other in texts[:number])
    report = json.loads((tmp_path / "new.report.json").read_text())
    assert report["of each label"] == [13, 13, 13, 12, 12]
    assert report["checked against"] == ["dev", "test"]
    dropped = sum(value for key, value in report.items() if key.startswith("dropped"))
    assert report["drawn"] >= 63 + dropped > 63
    assert "| perplexity on dev | " in capsys.readouterr().out
    assert not (tmp_path / "new.csv.part").exists()


def test_the_small_model_learns_what_labels_mean(small, tmp_path):
    """A classifier of another kind, which has seen the real sentences only, finds most labels again;
    by chance it would find a fifth."""
    assert synthetic.main(small + ["--epochs", "8", "--lr", "5e-3", "--num_samples", "200"]) == 0
    real = read_examples(SST_TRAIN, TASKS["sst"], "train")
    words = CountVectorizer(ngram_range=(1, 2))
    known = words.fit_transform([each.sentences[0] for each in real])
    classifier = LogisticRegression(max_iter=300).fit(known, [int(each.label) for each in real])
    rows = rows_of(tmp_path / "new.csv")
    found = classifier.predict(words.transform([row["sentence"] for row in rows]))
    assert sum(found == [int(row["sentiment"]) for row in rows]) > 0.6 * len(rows)


def test_an_interrupted_run_goes_on(small, tmp_path, monkeypatch, capsys):
    """To the file of one that nothing interrupts; what it has is not drawn again."""
    assert synthetic.main(small) == 0
    expected = (tmp_path / "new.csv").read_bytes()
    (tmp_path / "new.csv").unlink()
    sample, calls = SmallGenerator.sample, []

    def interrupted(self, *arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return sample(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(SmallGenerator, "sample", interrupted)
        assert synthetic.main(small) == 130
    assert "run the same command again to go on" in capsys.readouterr().err
    rounds = tmp_path / "new.csv.part" / "rounds.jsonl"
    with open(rounds, "a") as file:
        file.write('{"rows": [[0, "cut sho')  # as a kill would leave it
    assert synthetic.main(small + ["--seed", "5"]) == 1
    assert "an interrupted run with other flags or files" in capsys.readouterr().err
    monkeypatch.setattr(SmallGenerator, "_train", None)  # nor is it trained again
    assert synthetic.main(small) == 0
    assert (tmp_path / "new.csv").read_bytes() == expected


def test_what_it_writes_is_trained_on(small, tmp_path, flags):
    assert synthetic.main(small + ["--mix"]) == 0
    rows = rows_of(tmp_path / "new.csv")
    assert len(rows) == 1500 + 63 and not rows[0]["id"].startswith("synthetic")
    assert (
        mc.main(flags + ["--sst", "--epochs", "1", "--sst_train", str(tmp_path / "new.csv")]) == 0
    )


def test_a_classifier_filters(small, tmp_path, flags, capsys):
    assert mc.main(flags + ["--sst", "--epochs", "1"]) == 0
    (checkpoint,) = (tmp_path / "models_dir").glob("*.pt")
    chosen = small + ["--filter_with", str(checkpoint), "--min_confidence", "0.2"]
    assert synthetic.main(chosen) == 0
    model, tokenizer, _ = mc.load_checkpoint(checkpoint)
    for row in rows_of(tmp_path / "new.csv"):
        limit = dict(truncation=True, max_length=128)
        batch = tokenizer([row["sentence"]], return_tensors="pt", **limit)
        logits = model.eval().predict_sentiment(batch["input_ids"], batch["attention_mask"])
        assert logits.softmax(-1)[0, int(row["sentiment"])] >= 0.2 - 1e-5
    report = json.loads((tmp_path / "new.report.json").read_text())
    assert report["dropped: the classifier is less sure"] > 0
    capsys.readouterr()
    other = ["--num_samples", "5", "--output", str(tmp_path / "other.csv")]
    assert synthetic.main(chosen[:-1] + ["0.999"] + other) == 0
    assert "20 rounds have brought nothing new" in capsys.readouterr().err


def test_without_dev_and_test_the_report_says_so(small, tmp_path):
    alone = tmp_path / "alone.csv"
    alone.write_bytes((SAMPLE / "ids-sst-train.csv").read_bytes())
    assert synthetic.main(small + ["--sst_train", str(alone)]) == 0
    report = json.loads((tmp_path / "new.report.json").read_text())
    assert report["dropped: near-duplicates of dev or test"] == "not checked"


@pytest.mark.parametrize(
    "more, message",
    [
        (["--sst_train", "none.csv"], "none.csv: no such file"),
        (
            ["--model", "no/such/model", "--local_files_only"],
            "no/such/model: no such directory, and not a hub id",
        ),
        (["--filter_with", SST_TRAIN], "not a file of tensors"),
        (["--output", str(SAMPLE)], "it is a folder"),
        (["--output", SST_TRAIN], "is read too; give it another name"),
        (["--filter_with", "none.pt"], "none.pt: no such file"),
    ],
)
def test_bad_input_is_one_clear_line(small, more, message, capsys):
    assert synthetic.main(small + more) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and message in error


# ------------------------------------------------------------------------------------------ GPT-2


@pytest.fixture(scope="session")
def tiny_gpt2(tmp_path_factory):
    """Randomly initialised, with a vocabulary of bytes."""
    directory = tmp_path_factory.mktemp("gpt2")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: number for number, piece in enumerate([*alphabet, "<|endoftext|>"])}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    end = dict(eos_token="<|endoftext|>", bos_token="<|endoftext|>", unk_token="<|endoftext|>")
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **end).save_pretrained(directory)
    torch.manual_seed(0)
    size = dict(vocab_size=len(vocabulary), n_positions=256, n_embd=32, n_layer=2, n_head=2)
    ids = dict(eos_token_id=len(alphabet), bos_token_id=len(alphabet))
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**size, **ids)).save_pretrained(directory)
    return directory


def test_gpt2_for_real(tiny_gpt2, tmp_path):
    """In a process of its own, in which our datasets.py is on the path before transformers is."""
    train = tmp_path / "train.csv"
    train.write_text("".join(open(SST_TRAIN).readlines()[:120]))
    command = [sys.executable, ROOT / "synthetic.py", "--generator", "gpt2", "--model", tiny_gpt2]
    command += ["--sst_train", train, "--num_samples", "10", "--batch_size", "16", "--epochs", "1"]
    command += ["--max_length", "150", "--output", tmp_path / "new.csv", "--local_files_only"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    rows = rows_of(tmp_path / "new.csv")
    assert len(rows) == 10 and Counter(row["sentiment"] for row in rows) == dict.fromkeys(
        "01234", 2
    )
    assert all(row["id"].startswith("synthetic-gpt2-") for row in rows)


def test_gpt2_fine_tuning_lowers_the_loss_of_sentences(tiny_gpt2, tmp_path):
    args = synthetic.parse(
        ["--generator", "gpt2", "--model", str(tiny_gpt2), "--output", "x", "--lr", "1e-2"]
        + ["--sst_train", SST_TRAIN, "--epochs", "1", "--max_length", "100"]
    )
    generator = Gpt2Generator(args, torch.device("cpu"))
    generator._load(str(tiny_gpt2))
    train = read_examples(SST_TRAIN, TASKS["sst"], "train")[:160]
    before = generator.perplexity(train)
    batch = train[:3]  # against transformers' own loss, one sentence at a time
    for example in batch:
        prompt = generator.tokenizer(generator._prompt(int(example.label)))["input_ids"]
        text = generator.tokenizer(" " + example.sentences[0].strip())["input_ids"][:100]
        ids = torch.tensor([prompt + text + [generator.tokenizer.eos_token_id]])
        labels = ids.clone()
        labels[:, : len(prompt)] = -100
        with torch.no_grad():
            expected = generator.model(ids, labels=labels).loss
            found = generator._losses([example]).mean()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    generator.fit(train, None, tmp_path)
    assert generator.perplexity(train) < 0.5 * before
    again = Gpt2Generator(args, torch.device("cpu"))
    again.fit(train, None, tmp_path)  # from what the first one has left
    assert again.perplexity(train) == pytest.approx(generator.perplexity(train))


def test_a_missing_gpt2_is_one_clear_line(tmp_path, capsys):
    flags = ["--generator", "gpt2", "--model", str(tmp_path), "--output", str(tmp_path / "o.csv")]
    assert synthetic.main(flags + ["--sst_train", SST_TRAIN]) == 1
    assert f"error: --model {tmp_path}: " in capsys.readouterr().err


# ----------------------------------------------------------------------------------------- OpenAI

KEY = "sk-secret-of-the-test"


class Endpoint(ThreadingHTTPServer):
    """Speaks the chat protocol; `behave` says how the n-th request is answered."""

    def __init__(self, behave):
        self.behave, self.bodies, self.keys = behave, [], []
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.bodies.append(body)
        self.server.keys.append(self.headers["Authorization"])
        kind = self.server.behave(len(self.server.bodies))
        if kind == "slow":
            time.sleep(1.5)
        if kind in (401, 429, 500):
            text = json.dumps({"error": {"message": f"no, {KEY}", "type": "x"}})
            return self.answer(kind, text)
        wanted = int(re.search(r"Write (\d+) new ones", body["messages"][0]["content"])[1])
        number = len(self.server.bodies)
        words = "alpha beta gamma delta epsilon zeta eta theta iota kappa".split()
        sentences = [f"{w} film{number}x{n} {w}{number}" for n, w in enumerate(words)][:wanted]
        bad = {"malformed": "Sure! Here:", "wrong": '{"sentences": "abc"}'}
        call = dict(name="write", arguments=bad.get(kind, json.dumps({"sentences": sentences})))
        message = dict(role="assistant", content=None)
        if kind != "empty":
            message["tool_calls"] = [dict(id="1", type="function", function=call)]
        choice = dict(index=0, finish_reason="stop", message=message)
        usage = dict(prompt_tokens=1000, completion_tokens=500, total_tokens=1500)
        whole = dict(id="1", object="chat.completion", created=1, model="m", choices=[choice])
        text = "<html>" if kind == "html" else json.dumps(whole | {"usage": usage})
        self.answer(200, text)

    def answer(self, status, text):
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.send_header("Retry-After-Ms", "10")
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def ask(tmp_path, monkeypatch, capfd):
    """Run against an endpoint of this behaviour: exit status, what was printed, the endpoint."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)

    def ask(behave, *more):
        endpoint = Endpoint(behave)
        thread = threading.Thread(target=endpoint.serve_forever, daemon=True)
        thread.start()
        flags = ["--generator", "openai", "--model", "gpt-4", "--sst_train", SST_TRAIN]
        flags += [
            "--output",
            str(tmp_path / "new.csv"),
            "--num_samples",
            "20",
            "--batch_size",
            "20",
        ]
        try:
            code = synthetic.main([*flags, "--base_url", endpoint.url, *more])
        finally:
            endpoint.shutdown()
            endpoint.server_close()
        shown = capfd.readouterr()
        return code, shown.out + shown.err, endpoint

    return ask


def test_good_answers(ask, tmp_path):
    code, shown, endpoint = ask(lambda n: "good")
    assert code == 0, shown
    rows = rows_of(tmp_path / "new.csv")
    assert Counter(row["sentiment"] for row in rows) == dict.fromkeys("01234", 4)
    assert set(endpoint.keys) == {f"Bearer {KEY}"}
    body = endpoint.bodies[0]
    assert body["model"] == "gpt-4" and body["tool_choice"]["function"]["name"] == "write"
    real = {e.sentences[0].strip() for e in read_examples(SST_TRAIN, TASKS["sst"], "train")}
    examples = re.findall(r"^- (.*)$", body["messages"][0]["content"], re.M)
    assert len(examples) == 8 and set(examples) <= real
    report = json.loads((tmp_path / "new.report.json").read_text())
    assert report["requests"] == len(endpoint.bodies)
    cost = len(endpoint.bodies) * (30 * 1000 + 60 * 500) / 1e6
    assert report["spent, dollars"] == pytest.approx(cost, abs=1e-4)


@pytest.mark.parametrize("kind", ["malformed", "empty", "wrong", "html", "slow", 429, 500])
def test_every_second_answer_is_bad(ask, tmp_path, kind):
    code, shown, _ = ask(lambda n: kind if n % 2 else "good", "--timeout", "1")
    assert code == 0, shown
    assert len(rows_of(tmp_path / "new.csv")) == 20


def test_a_refused_key_ends_it_at_once_and_is_not_shown(ask, tmp_path):
    code, shown, endpoint = ask(lambda n: 401)
    assert code == 1 and len(endpoint.bodies) == 1
    assert "AuthenticationError, status 401" in shown and KEY not in shown
    for path in (tmp_path / "new.csv.part").rglob("*"):
        assert KEY not in path.read_text()


def test_failures_without_end_give_up_and_keep_what_is_paid_for(ask, tmp_path):
    code, shown, endpoint = ask(lambda n: "good" if n <= 5 else 500, "--num_samples", "100")
    assert code == 1 and "InternalServerError, status 500" in shown
    assert len(endpoint.bodies) == 5 + 7  # a request and six more tries
    kept = (tmp_path / "new.csv.part" / "rounds.jsonl").read_text().splitlines()
    assert len(kept) == 5 and sum(len(json.loads(line)["rows"]) for line in kept) == 50


def test_limits_of_requests_and_cost(ask, tmp_path):
    """What there is is written, and kept to go on from there."""
    code, shown, endpoint = ask(lambda n: "good", "--max_requests", "3")
    assert code == 0 and len(endpoint.bodies) == 3 and "limit of requests or cost" in shown
    assert len(rows_of(tmp_path / "new.csv")) == 12
    part = tmp_path / "new.csv.part"
    assert len((part / "rounds.jsonl").read_text().splitlines()) == 3
    shutil.rmtree(part)
    code, shown, endpoint = ask(lambda n: "good", "--max_cost", "0.1")
    assert code == 0 and len(endpoint.bodies) == 2  # of 6 cents each


def test_no_key_is_one_clear_line(monkeypatch, tmp_path, capsys):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    flags = ["--generator", "openai", "--output", str(tmp_path / "o.csv"), "--sst_train", SST_TRAIN]
    assert synthetic.main(flags) == 1
    assert "put your key into the variable OPENAI_API_KEY" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["transformers", "openai"])
def test_a_missing_library_names_the_command_that_installs_it(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, name, None)
    generator = {"transformers": "gpt2"}.get(name, name)
    flags = [
        "--generator",
        generator,
        "--output",
        str(tmp_path / "o.csv"),
        "--sst_train",
        SST_TRAIN,
    ]
    assert synthetic.main(flags) == 1
    assert f"needs: pip install {name}==" in capsys.readouterr().err


def test_help_is_quick():
    """No library of a generator is loaded for it."""
    code = "import sys, synthetic; assert not {'transformers', 'openai'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
