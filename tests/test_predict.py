import csv
import dataclasses
import gc
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import pytest
import torch
from checkpoints import make_checkpoint_fixture  # noqa: F401
from conftest import ROOT

import multitask_classifier as mc
import predict
from tasks import TASKS
from utils import UserError


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
def test_answers_are_those_of_an_evaluation(ask, make_checkpoint, small_data, tmp_path, kind):
    flags = ["--evaluate", str(make_checkpoint(kind)), "--data_dir", str(small_data)]
    flags += ["--predictions_dir", str(tmp_path), "--cache_dir", str(tmp_path / "cache")]
    assert mc.main(flags) == 0
    for name, task in TASKS.items():
        for split in ("dev", "test"):
            with open(tmp_path / f"{name}-{split}-output.csv", newline="") as file:
                _, *expected = csv.reader(file, delimiter="\t")
            answers, _ = ask(kind, small_data / getattr(task, split)[0])
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


def test_many_chunks_are_answered_in_the_order_of_the_lines(ask, monkeypatch):
    monkeypatch.setattr(predict, "CHUNKS", predict.CHUNKS[:3])
    monkeypatch.setattr(predict, "BLOCK", 100)
    known = ["a", "b b", "c c c c c", "a\tb b", "c c c c c\ta", "d d d d d d d d\tb b b b"]
    alone, _ = ask("plain", "\n".join(known).encode())
    values = {line: list(answer.values())[1:] for line, answer in zip(known, alone, strict=True)}
    assert len({str(answer) for answer in values.values()}) == len(known)
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
    fits = "a " * first + ("\t" + "b " * second if pair else "")
    lines = [fits, "a " + fits, *([fits + "b"] if kind == "cross" else [])]
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
    message = "error: the models were not trained on 'para'; known: sts\n"
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
    assert [answer.get("id") for answer in answers] == ["7", None, "9", "10"]
    assert answers[1] == {"line": 3, "error": "2 cells instead of 4"}
    assert answers[0] | {"id": "10"} == answers[3] and "similarity" in answers[2]
    assert warnings == [
        "warning: 1 line not answered: 2 cells instead of 4 (first: line 3)",
        "warning: 1 line answered although a sentence is empty (first: line 4)",
    ]


@pytest.mark.parametrize(
    "content, message",
    [
        (b"id\ttext\n1\ta\n", "does not name the columns sentence or sentence1, sentence2"),
        (b'{"id": 1, "text": "a"}\n', "does not name the columns sentence or sentence1, sentence2"),
        (b"PAR1 and no more", "cannot be read as Parquet"),
        (b'[{"sentence": "a"}]', "is one JSON list"),
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


def test_two_tasks_without_quotes_read_a_table_together(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('sentence1\tsentence2\n"a\tb\nc\td\n')
    tasks = [dataclasses.replace(TASKS[name], quoting=False) for name in ("para", "sts")]
    rows = [query.sentences for chunk in predict.read_table_queries(path, tasks) for query in chunk]
    assert rows == [('"a', "b"), ("c", "d")]
    with pytest.raises(UserError, match="is a quote missing"):  # which one is right for both?
        list(predict.read_table_queries(path, [tasks[0], TASKS["sts"]]))


@pytest.mark.parametrize("name", ["rows.csv", "rows.tsv", "rows.jsonl", "rows"])
def test_a_table_is_known_by_its_content(ask, tmp_path, name):
    """Without a column of ids, an answer has the line or the row."""
    path, sentences = tmp_path / name, ["a b", "c, d", 'e "f"']
    frame = pd.DataFrame({"sentence": sentences})
    alone, _ = ask("plain", "\n".join(sentences).encode())
    expected = [{key: value for key, value in answer.items() if key != "line"} for answer in alone]
    assert len({str(answer) for answer in expected}) == 3
    json_lines = frame.to_json(orient="records", lines=True).encode()
    for separator in ("\t", ",", ";"):
        path.write_bytes(frame.to_csv(sep=separator, index=False).encode())
        assert_near(ask("plain", path)[0], expected, line=2)
    for content, place in {json_lines: dict(line=1), frame.to_parquet(): dict(row=1)}.items():
        path.write_bytes(content)
        assert_near(ask("plain", path)[0], expected, **place)
    frame["id"] = [7, None, 9]
    path.write_bytes(frame.astype({"id": "Int64"}).to_parquet())
    assert [answer["id"] for answer in ask("plain", path)[0]] == ["7", "", "9"]


def assert_near(answers, expected, **first):
    """Compare answers whose places are numbered from `first`."""
    ((kind, start),) = first.items()
    assert [answer.pop(kind) for answer in answers] == list(range(start, start + len(expected)))
    for answer, wanted in zip(answers, expected, strict=True):
        assert answer.keys() == wanted.keys()
        for key, value in wanted.items():
            np.testing.assert_allclose(answer[key], value, atol=2e-5)


def test_a_pipe_is_read_once(make_checkpoint, tmp_path, capsys):
    """As lines, like standard input: a table is read more than once."""
    pipe, output = tmp_path / "pipe", tmp_path / "answers.jsonl"
    os.mkfifo(pipe)
    lines = [f"one two {number}" for number in range(600)]
    with ThreadPoolExecutor(1) as pool:
        pool.submit(pipe.write_text, "\n".join(lines))
        flags = ["--json", "--output", str(output), "--checkpoint", str(make_checkpoint("plain"))]
        assert predict.main([str(pipe), *flags]) == 0
    answers = map(json.loads, output.read_text().splitlines())
    assert [answer["line"] for answer in answers] == list(range(1, 601))


def test_what_is_read_is_not_replaced(make_checkpoint, tmp_path, capsys):
    path, link = tmp_path / "lines.txt", tmp_path / "link.txt"
    path.write_text("good\n")
    link.symlink_to(path)
    checkpoint = make_checkpoint("plain")
    before = checkpoint.read_bytes()
    for output in (path, link, checkpoint):
        flags = ["--checkpoint", str(checkpoint), "--output", str(output)]
        assert predict.main([str(path), *flags]) == 1
        error = f"error: --output {output}: is read too; name another file\n"
        assert capsys.readouterr().err == error
    assert path.read_text() == "good\n" and checkpoint.read_bytes() == before


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_objects_without_the_columns_are_no_lines(make_checkpoint, tmp_path, capsys, kind):
    path, frame = tmp_path / f"rows.{kind}", pd.DataFrame({"text": ["a", "b"]})
    if kind == "parquet":
        frame.to_parquet(path)
    else:
        frame.to_json(path, orient="records", lines=True)
    assert predict.main([str(path), "--checkpoint", str(make_checkpoint("plain"))]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {path}: line 1 does not name the columns sentence or ")


@pytest.mark.parametrize("first", ['"I said', "a,b;c", "[laughs] a", "{ a", "\ufeffa", "PAR", ""])
def test_a_file_of_lines_is_no_table(ask, first):
    """Whatever its first line looks like."""
    answers, _ = ask("plain", f"{first}\nb c".encode())
    assert [answer["line"] for answer in answers] == [1, 2]
    assert [answer.get("error") for answer in answers] == [None if first else "empty", None]
    assert ask("plain", b"") == ([], ["warning: the input has no lines to answer"])


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
    """Read until `wanted` has come, which has to be in time."""
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
def test_a_reader_that_goes_ends_it_quietly(make_checkpoint, tmp_path, monkeypatch, capsys, closed):
    """The answers are more than a pipe holds. The input has ended, or is a pipe that stays open."""
    path, (reader, writer) = tmp_path / "in", os.pipe()
    if not closed:
        os.mkfifo(path)

    def read_a_line():
        with open(reader, "rb") as answers:
            return answers.readline()

    with open(path, "w+b", buffering=0) as source, ThreadPoolExecutor(1) as pool:
        source.write(b"a b c\n" * 5000)
        line = pool.submit(read_a_line)
        # To close standard output at the end, as Python does, must not fail either.
        with open(writer, "w") as stdout:
            monkeypatch.setattr(sys, "stdout", stdout)
            assert predict.main([str(path), "--checkpoint", str(make_checkpoint("plain"))]) == 141
    assert line.result().startswith(b"sentiment")
    # On a slow machine there is a progress bar.
    assert "rror" not in capsys.readouterr().err


def test_a_full_disk_is_one_line(make_checkpoint, tmp_path, monkeypatch, capsys):
    (tmp_path / "in").write_text("a b\n")
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        command = [str(tmp_path / "in"), "--checkpoint", str(make_checkpoint("plain"))]
        assert predict.main(command) == 1
    message = "error: cannot write stdout: No space left on device\n"
    assert capsys.readouterr().err == message


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


def test_answered_lines_are_not_kept(make_checkpoint, tmp_path, monkeypatch):
    """To keep the query and the answer of a line would take at least two objects. tests/slow measures
    the memory."""
    counts, answer_queries = [], predict.answer_queries

    def watched(*arguments):
        gc.collect()
        counts.append(len(gc.get_objects()))
        return answer_queries(*arguments)

    monkeypatch.setattr(predict, "answer_queries", watched)
    monkeypatch.setattr(predict, "CHUNKS", (50,))
    (tmp_path / "in").write_text("a b c\n" * 500)
    command = [str(tmp_path / "in"), "--checkpoint", str(make_checkpoint("plain")), "--json"]
    # Neither collected nor counted: the objects of all libraries.
    gc.freeze()
    assert predict.main(command) == 0
    gc.unfreeze()
    assert len(counts) == 10 and counts[-1] - counts[4] < 50


def test_importing_does_nothing_heavy():
    heavy = ["sklearn", "transformers", "sentence_transformers", "huggingface_hub", "spacy"]
    code = f"import sys, predict; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\n"
