import dataclasses
import math
import re
import subprocess
import sys
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
import transformers
from conftest import ROOT, SAMPLE
from hypothesis import given
from hypothesis import strategies as st

import datasets
from batches import EpochSampler, collate, deal_out, evaluation_batches, training_windows
from datasets import NAMED_REASONS, NAMED_ROWS, TaskDataset, download, git_blob_id, read_examples
from tasks import SPLITS, TASKS
from utils import UserError

SST, PARA, STS = (TASKS[name] for name in ("sst", "para", "sts"))
PARA_HEADER = "\tid\tsentence1\tsentence2\tis_duplicate\n"


def sample_file(task, split):
    (name,) = getattr(task, split)
    return SAMPLE / name


@pytest.fixture
def write(tmp_path):
    def write(text, name="file.csv"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


# ---------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("task", TASKS.values(), ids=list(TASKS))
@pytest.mark.parametrize("split", ["train", "dev", "test"])
def test_sample_files_are_whole(task, split, recwarn):
    examples = read_examples(sample_file(task, split), task, split)
    assert len(examples) == (1500 if split == "train" else 300)
    assert len({example.id for example in examples}) == len(examples)
    assert all(math.isnan(example.label) == (split == "test") for example in examples)
    assert not recwarn


def test_sample_is_what_its_generator_writes(tmp_path):
    before = {path.name: path.read_bytes() for path in SAMPLE.glob("*.csv")}
    assert len(before) == 9
    script = (SAMPLE / "generate.py").read_text()
    (tmp_path / "generate.py").write_text(script)
    subprocess.run([sys.executable, tmp_path / "generate.py"], check=True)
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.csv")} == before


@pytest.mark.parametrize("task", TASKS.values(), ids=list(TASKS))
def test_sample_dev_and_test_share_no_row_with_train(task):
    seen = {}
    for split in ("train", "dev", "test"):
        for example in read_examples(sample_file(task, split), task, split):
            assert seen.setdefault(example.sentences, split) == split


BAD_ROWS = (
    PARA_HEADER
    + "0\ta\tone\ttwo\t1.0\n"
    + "1\tb\tone\ttwo\t\n"  # line 3
    + "2\tc\t \ttwo\t0.0\n"  # line 4
    + '3\td\t"o\nne"\ttwo\t0\n'  # lines 5 and 6
    + "4\te\tone\t0.0\n"  # line 7
    + "5\tf\tone\ttwo\t2\n"  # line 8
    + "6\tg\tone\ttwo\tyes\n"
    + "7\t\tone\ttwo\t1\n"
    + "8\tj\tone\ttwo\tnan\n"
)


def test_unusable_training_rows_are_named_in_one_warning(write):
    path = write(BAD_ROWS)
    with pytest.warns(UserWarning) as caught:
        examples = read_examples(path, PARA, "train")
    assert [example.id for example in examples] == ["a", "d"]
    assert len(caught) == 1
    assert str(caught[0].message) == (
        f"{path}: 7 rows unusable: no label (line 3), empty sentence (line 4), "
        "4 cells instead of 5 (line 7), other reasons: 4"
    )


def test_dev_rows_without_label_are_predicted_but_not_scored(write):
    path = write(BAD_ROWS)
    with pytest.warns(UserWarning) as caught:
        examples = read_examples(path, PARA, "dev")
    assert len(caught) == 1
    assert str(caught[0].message) == (
        f"{path}: 2 rows unusable: 4 cells instead of 5 (line 7), no id (line 10); "
        "4 rows predicted but not scored: no label (line 3), "
        "label 2 is not one of the classes, 0 to 1 (line 8), "
        "label 'yes' is not a class; known: 0, 1 (line 9), other reasons: 1"
    )
    assert [example.id for example in examples] == ["a", "b", "c", "d", "f", "g", "j"]
    assert [math.isnan(example.label) for example in examples] == [0, 1, 0, 0, 1, 1, 1]
    assert examples[2] == ((" ", "two"), 0.0, "c")


def test_test_rows_need_no_label_and_no_text(write):
    path = write("\tid\tsentence\n0\ta\t\n1\tb\ttext\n")
    assert [example.sentences for example in read_examples(path, SST, "test")] == [("",), ("text",)]


def test_many_unusable_rows_are_counted_by_reason(write):
    path = write(PARA_HEADER + "0\ta\tb\tc\t1\n" + "1\tb\tx\ty\t\n" * 50 + "1\tb\t\ty\t1\n")
    with pytest.warns(UserWarning) as caught:
        read_examples(path, PARA, "train")
    message = str(caught[0].message)
    assert message.count("line ") == NAMED_ROWS + 1
    named = ", ".join(f"line {number}" for number in range(3, 3 + NAMED_ROWS))
    assert message == (
        f"{path}: 51 rows unusable: no label ({named} and {50 - NAMED_ROWS} more), "
        "empty sentence (line 53)"
    )


def test_reasons_of_a_warning_are_counted(write):
    """The most frequent ones are named, so that the line stays short."""
    labels = ["2", "yes", "yes", "", "", "", "1", "nan", "-1", "-1"]
    rows = [f"{number}\ti{number}\tb\tc\t{label}\n" for number, label in enumerate(labels)]
    with pytest.warns(UserWarning) as caught:
        assert len(read_examples(write(PARA_HEADER + "".join(rows)), PARA, "train")) == 1
    message = str(caught[0].message)
    assert message.count("(line ") == NAMED_REASONS
    assert re.search(
        r": 9 rows unusable: no label \(line 5, line 6, line 7\), "
        r"label 'yes' is not a class; known: 0, 1 \(line 3, line 4\), "
        r"label -1 is not one of the classes, 0 to 1 \(line 10, line 11\), other reasons: 2$",
        message,
    )


@pytest.mark.parametrize("label", ["-0.1", "5.1", "nan", "inf", "x"])
def test_similarities_out_of_range_are_refused(label):
    with pytest.raises(ValueError, match="label"):
        STS.parse_label(label)
    assert STS.parse_label("4.75") == 4.75


def test_a_repeated_id_is_named(write):
    path = write("id\tsentence\tsentiment\n1\tgood\t3\n2\tbad\t0\n1\tfine\t2\n")
    reason = r"1 row used nevertheless: an earlier row has the same id \(line 4\)$"
    with pytest.warns(UserWarning, match=reason):
        assert len(read_examples(path, SST, "train")) == 3


def test_without_a_column_of_ids_the_number_of_the_row_is_its_id(write, minilm_tokenizer):
    """Over all files of a split; rows that cannot be used are counted, too."""
    task = dataclasses.replace(SST, id="")
    one = write("sentence\tsentiment\na\t1\nb\t\nc\t2\n", "one.csv")
    two = write('{"sentence": "d", "sentiment": 3}\n\n{"sentence": "e", "sentiment": 4}', "two.csv")
    with pytest.warns(UserWarning, match=r"one.csv: 1 row unusable: no label \(line 3\)$"):
        data = TaskDataset([one, two], task, "train", minilm_tokenizer, 9)
    assert data.ids == ["1", "3", "4", "5"] and data.labels.tolist() == [1, 2, 3, 4]


def test_rows_that_training_gives_away_are_found():
    def rows(*sentences):
        return [datasets.Example(each, 0.0, "id") for each in sentences]

    train = rows(("It's  good.", "Fine"), ("A b", "c"), ("A b", "d"))
    other = rows(("fine!", "its good"), ("a B", "C"), ("a B", "C"), ("ab", "c"), ("a b", "a b"))
    assert datasets.rows_in_train(other, train).tolist() == [True, True, True, False, False]
    assert datasets.rows_in_train(train[:2], train).tolist() == [True, True]
    assert datasets.rows_in_train(rows(("X",), ("y",)), rows(("x",))).tolist() == [True, False]


# ------------------------------------------------------------------------------------- tokenizing


@pytest.fixture
def dataset(minilm_tokenizer):
    def dataset(name, split="train", encoding="bi", **arguments):
        task = dataclasses.replace(TASKS[name], encoding=encoding)
        arguments = dict(tokenizer=minilm_tokenizer, max_length=512) | arguments
        return TaskDataset([sample_file(task, split)], task, split, **arguments)

    return dataset


@pytest.mark.parametrize("name", TASKS)
def test_rows_are_tokenized_column_by_column(dataset, minilm_tokenizer, name):
    data = dataset(name, max_length=9)
    for number, column in enumerate(data.columns):
        texts = [example.sentences[number] for example in data.examples]
        expected = minilm_tokenizer(texts, truncation=True, max_length=9)["input_ids"]
        assert [column.row(row).tolist() for row in range(len(data))] == [[ids] for ids in expected]
        assert column.lengths.tolist() == [len(row) for row in expected]


class CountingTokenizer:
    def __init__(self, tokenizer):
        self.tokenizer, self.calls = tokenizer, 0

    def to_json(self):
        return self.tokenizer.to_json()

    def packed_ids(self, *arguments):
        self.calls += 1
        return self.tokenizer.packed_ids(*arguments)


def test_the_next_run_reads_the_cache(dataset, minilm_tokenizer, tmp_path):
    tokenizer = CountingTokenizer(minilm_tokenizer)
    first = dataset("para", tokenizer=tokenizer, cache_dir=tmp_path)
    again = dataset("para", tokenizer=tokenizer, cache_dir=tmp_path)
    assert tokenizer.calls == 1
    for mine, other in zip(first.columns, again.columns):
        for one, another in zip(mine, other, strict=True):
            assert np.array_equal(one, another)
    dataset("para", tokenizer=tokenizer, cache_dir=tmp_path, max_length=7)
    dataset("para", tokenizer=tokenizer, cache_dir=tmp_path, limit=7)
    assert tokenizer.calls == 3


def flip_last_byte(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [flip_last_byte, lambda path: path.write_bytes(b""), lambda path: path.write_bytes(b"x" * 99)],
    ids=["flipped", "empty", "garbage"],
)
def test_a_damaged_cache_is_made_anew(dataset, minilm_tokenizer, tmp_path, damage):
    tokenizer = CountingTokenizer(minilm_tokenizer)
    first = dataset("sst", tokenizer=tokenizer, cache_dir=tmp_path)
    expected = first.columns[0].pieces.copy()
    del first  # whose pieces are those of the file
    (path,) = tmp_path.iterdir()
    damage(path)
    for _ in range(2):
        again = dataset("sst", tokenizer=tokenizer, cache_dir=tmp_path)
        assert np.array_equal(expected, again.columns[0].pieces)
    assert tokenizer.calls == 2


def test_a_cache_that_cannot_be_written_is_a_warning(dataset, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="so word-piece ids are not cached"):
        assert len(dataset("sst", cache_dir=tmp_path / "file")) == 1500


# ------------------------------------------------------------------------------------- batches


def test_a_batch_holds_each_sentence_once_and_knows_its_place(dataset, minilm_tokenizer):
    data = {name: dataset(name) for name in TASKS}
    rows = {name: np.array([5, 900, 17, 5]) for name in TASKS}
    batch = collate({name: (data[name], rows[name]) for name in TASKS})
    assert batch.lengths == sorted(batch.lengths)
    assert batch.input_ids.shape == batch.position_ids.shape == (sum(batch.lengths),)
    sequences = batch.input_ids.split(batch.lengths)
    positions = batch.position_ids.split(batch.lengths)
    assert len(sequences) == 5 * 4
    for name, columns in batch.columns.items():
        for number, column in enumerate(columns):
            for row, place in zip(rows[name], batch.places[column], strict=True):
                text = data[name].examples[row].sentences[number]
                assert sequences[place].tolist() == minilm_tokenizer([text])["input_ids"][0]
                assert positions[place].tolist() == list(range(len(sequences[place])))
        assert batch.labels[name].tolist() == pytest.approx(data[name].labels[rows[name]].tolist())
    assert batch.labels["sst"].dtype == torch.long and batch.labels["sts"].dtype == torch.float32


@pytest.mark.parametrize("max_length", [512, 21, 12, 5])
def test_a_joint_column_is_a_pair_of_transformers(dataset, minilm_path, max_length):
    """Also cut as there. The sentences themselves are not, so that only the pair is too long."""
    data = dataset("para", "dev", limit=200)
    peer = transformers.AutoTokenizer.from_pretrained(minilm_path)
    column = datasets.JointColumn.of(*data.columns, max_length)
    batch = collate({"para": (dataset("para", "dev", limit=200, encoding="cross"), np.arange(200))})
    types = batch.token_type_ids.split(batch.lengths)
    for row, example in enumerate(data.examples):
        pair = peer(*example.sentences, truncation="longest_first", max_length=max_length)
        assert column.row(row).tolist() == [pair["input_ids"]]
        assert column.first_lengths[row] == pair["token_type_ids"].count(0)
        if max_length == 512:
            assert types[batch.places[row]].tolist() == pair["token_type_ids"]


def test_a_pair_is_read_both_ways(dataset):
    both = dataset("sts", encoding="both")
    bi, cross = dataset("sts"), dataset("sts", encoding="cross")
    assert len(both.columns) == 3 and len(cross.columns) == 1
    assert np.array_equal(both.n_tokens, bi.n_tokens + cross.n_tokens)
    rows = np.array([3, 1])
    batch = collate({"sts": (both, rows), "sst": (dataset("sst"), rows)}, twice=["sst"])
    assert len(batch.columns["sts"]) == 3 and len(batch.columns["sst"]) == 2
    sequences = batch.input_ids.split(batch.lengths)
    for copies in zip(*(batch.places[column] for column in batch.columns["sst"])):
        assert sequences[copies[0]].equal(sequences[copies[1]]) and copies[0] != copies[1]
    assert collate({"sts": (bi, rows)}).token_type_ids is None


def test_a_pair_in_both_orders_is_two_pairs_of_transformers(dataset, minilm_path):
    data = dataset("para", "dev", limit=50, encoding="both", both_orders=True)
    peer = transformers.AutoTokenizer.from_pretrained(minilm_path)
    assert len(data) == len(data.ids) == len(data.labels) == 50 and len(data.n_tokens) == 100
    rows = np.arange(50)
    halves = [collate({"para": (data, half)}).labels["para"] for half in (rows, rows + 50)]
    assert halves[0].tolist() == halves[1].tolist() == data.labels.tolist()
    sentences = [example.sentences for example in data.examples[:50]]
    for row, (first, second) in enumerate([*sentences, *(pair[::-1] for pair in sentences)]):
        columns = peer(first), peer(second), peer(first, second)
        for column, expected in zip(data.columns, columns, strict=True):
            assert column.row(row).tolist() == [expected["input_ids"]]


def test_sampler_uses_up_all_rows_before_it_repeats_one():
    sampler = EpochSampler(n_rows=7, seed=0)
    draws = [sampler.draw(5) for _ in range(7)]
    assert all(len(draw) == 5 for draw in draws)
    stream = np.concatenate(draws)
    rounds = stream.reshape(5, 7)
    assert all(sorted(each) == list(range(7)) for each in rounds)
    assert len({tuple(each) for each in rounds}) > 1
    again = EpochSampler(n_rows=7, seed=0)
    assert np.array_equal(stream, np.concatenate([again.draw(5) for _ in range(7)]))
    other = EpochSampler(n_rows=7, seed=1)
    assert not np.array_equal(stream, np.concatenate([other.draw(5) for _ in range(7)]))


def test_sampler_draws_more_than_there_are():
    counts = Counter(EpochSampler(n_rows=3, seed=0).draw(7).tolist())
    assert sorted(counts.values()) == [2, 2, 3]


def test_windows_cut_an_epoch_into_steps_and_batches(dataset):
    data = {name: dataset(name) for name in TASKS}
    samplers = {name: EpochSampler(len(data[name]), seed=4) for name in TASKS}
    windows = list(training_windows(data, samplers, 23, batch_size=5, grad_accumulation=2))
    sizes = [[len(batch.rows["sst"]) for batch in window] for window in windows]
    assert sizes == [[5, 5], [5, 5], [3]]
    for name in TASKS:
        drawn = np.concatenate([batch.rows[name] for window in windows for batch in window])
        assert np.array_equal(drawn, EpochSampler(len(data[name]), seed=4).draw(23))


def test_tasks_have_other_shares_of_a_batch(dataset):
    data = {name: dataset(name) for name in TASKS}
    samplers = {name: EpochSampler(len(data[name]), seed=4) for name in TASKS}
    multiples = {"sst": 1, "para": 2.5, "sts": 0.4}
    windows = list(training_windows(data, samplers, 23, 5, 2, row_multiples=multiples))
    sizes = {n: [[len(b.rows.get(n, [])) for b in window] for window in windows] for n in TASKS}
    assert sizes["sst"] == [[5, 5], [5, 5], [3]]
    assert sizes["para"] == [[12, 13], [13, 12], [8]]  # up to the rows 12, 25, 38, 50, 58
    assert sizes["sts"] == [[2, 2], [2, 2], [1]]  # 2, 4, 6, 8, 9
    for name in TASKS:
        drawn = np.concatenate([batch.rows[name] for window in windows for batch in window])
        assert np.array_equal(drawn, EpochSampler(len(data[name]), seed=4).draw(len(drawn)))
        for window in windows:
            rows = sum(len(batch.rows[name]) for batch in window)
            assert {batch.step_rows[name] for batch in window} == {rows}
            picks = np.concatenate([batch.picks[name] for batch in window])
            assert picks.tolist() == list(range(rows))


@pytest.mark.parametrize("n_processes", [2, 3, 40])
def test_processes_share_the_rows_of_each_batch(dataset, n_processes):
    data = {name: dataset(name) for name in TASKS}

    def windows(**share):
        samplers = {name: EpochSampler(len(data[name]), seed=4) for name in TASKS}
        return list(training_windows(data, samplers, 23, 8, 2, **share))

    shares = [windows(rank=rank, n_processes=n_processes) for rank in range(n_processes)]
    for number, whole in enumerate(windows()):
        batches = [batch for share in shares for batch in share[number]]
        for name in TASKS:
            wanted = np.concatenate([batch.rows[name] for batch in whole])
            found = np.full(len(wanted), -1)
            for batch in batches:
                if name in batch.rows:
                    assert (found[batch.picks[name]] == -1).all()
                    found[batch.picks[name]] = batch.rows[name]
                    assert batch.step_rows[name] == len(wanted)
            assert np.array_equal(found, wanted)


@given(st.lists(st.integers(1, 60)), st.lists(st.integers(1, 60)), st.integers(1, 5))
def test_rows_are_dealt_out_in_equal_numbers(sst, sts, n_shares):
    n_tokens = {"sst": np.array(sst, int), "sts": np.array(sts, int)}
    shares = deal_out(n_tokens, n_shares)
    for name, tokens in n_tokens.items():
        assert sorted(np.concatenate([share[name] for share in shares])) == [*range(len(tokens))]
    counts = [[len(share["sst"]), len(share["sts"])] for share in shares]
    counts = np.array([[*count, sum(count)] for count in counts])
    assert (counts.max(0) - counts.min(0) <= 1).all()
    # With other lengths, each process has the same numbers of rows.
    others = deal_out({name: 61 - tokens for name, tokens in n_tokens.items()}, n_shares)
    assert [[len(share["sst"]), len(share["sts"])] for share in others] == counts[:, :2].tolist()


@pytest.mark.parametrize("n_shares, most", [(2, 1.02), (4, 1.03), (8, 1.06)])
def test_tokens_are_dealt_out_evenly(n_shares, most):
    """Rows in their order would give the busiest process 1.1 times the mean and more."""
    generator = np.random.default_rng(0)
    for _ in range(50):
        n_tokens = {name: generator.gamma(3, 6, 64).astype(int) + 3 for name in TASKS}
        shares = deal_out(n_tokens, n_shares)
        loads = [sum(n_tokens[n][rows].sum() for n, rows in share.items()) for share in shares]
        assert max(loads) <= most * np.mean(loads)


def test_processes_share_an_evaluation(dataset):
    data = dataset("para", "dev")
    shares = [list(evaluation_batches(data, 16, rank, 3)) for rank in range(3)]
    rows = np.concatenate([batch.rows["para"] for share in shares for batch in share])
    assert sorted(rows) == list(range(300))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_evaluation_batches_hold_every_row_once_longest_first(dataset):
    data = dataset("para", "dev")
    batches = list(evaluation_batches(data, 64))
    rows = np.concatenate([batch.rows["para"] for batch in batches])
    assert sorted(rows) == list(range(300))
    tokens = [len(batch.input_ids) / len(batch.rows["para"]) for batch in batches]
    assert tokens == sorted(tokens, reverse=True)
    assert len(batches[0].rows["para"]) == 64
    assert max(len(batch.input_ids) for batch in batches) == len(batches[0].input_ids)
    assert len(batches) < 300 / 64  # later ones hold more rows


# ------------------------------------------------------------------------------------- download

CONTENT = {"one.csv": b"first\tfile\n" * 30000, "two.csv": b"second\n" * 9}


def blob(content):
    git = ["git", "hash-object", "--stdin"]
    return subprocess.run(git, input=content, capture_output=True).stdout.decode().strip()


class Handler(BaseHTTPRequestHandler):
    """Serves CONTENT; `server.faults` says what to do wrong, once per entry of a list."""

    def log_message(self, *arguments):
        pass

    def do_GET(self):
        name = self.path.rpartition("/")[2]
        fault = (self.server.faults.get(name) or [None]).pop(0)
        range_header = self.headers.get("Range")
        self.server.requests.append((name, range_header))
        content = CONTENT[name]
        if fault == "missing":
            return self.send_error(404)
        if fault == "corrupt":
            content = content[:-2] + b"X\n"
        start = 0
        if range_header and fault != "no ranges":
            start = int(range_header.removeprefix("bytes=").removesuffix("-"))
            if start >= len(content):
                return self.send_error(416)
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        end = len(content) // 2 if fault == "truncated" else len(content)
        self.wfile.write(content[start:end])


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(datasets.time, "sleep", lambda seconds: None)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.faults, server.requests = {}, []
    server.url = f"http://127.0.0.1:{server.server_port}/data"
    server.blobs = {name: blob(content) for name, content in CONTENT.items()}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def files_in(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_git_blob_id_is_gits(tmp_path):
    (tmp_path / "f").write_bytes(CONTENT["one.csv"])
    assert git_blob_id(tmp_path / "f") == blob(CONTENT["one.csv"])


def test_download_fetches_and_the_second_time_asks_for_nothing(server, tmp_path):
    download(tmp_path / "data", server.url, server.blobs)
    assert files_in(tmp_path / "data") == CONTENT
    asked = len(server.requests)
    download(tmp_path / "data", server.url, server.blobs)
    assert len(server.requests) == asked == 2


def test_download_goes_on_after_a_broken_connection(server, tmp_path):
    server.faults["one.csv"] = ["truncated"]
    download(tmp_path, server.url, server.blobs)
    assert files_in(tmp_path) == CONTENT
    half = len(CONTENT["one.csv"]) // 2
    assert server.requests[:2] == [("one.csv", None), ("one.csv", f"bytes={half}-")]


@pytest.mark.parametrize("fault", [None, "no ranges"])
def test_download_goes_on_where_an_interrupted_one_stopped(server, tmp_path, fault):
    (tmp_path / "one.csv.part").write_bytes(CONTENT["one.csv"][:1000])
    server.faults["one.csv"] = [fault]
    download(tmp_path, server.url, server.blobs)
    assert files_in(tmp_path) == CONTENT
    assert server.requests[0] == ("one.csv", "bytes=1000-")


def test_download_takes_a_part_that_is_already_whole(server, tmp_path):
    (tmp_path / "one.csv.part").write_bytes(CONTENT["one.csv"])
    download(tmp_path, server.url, server.blobs)
    assert files_in(tmp_path) == CONTENT


@pytest.mark.parametrize(
    "faults, message, left",
    [
        (["corrupt"], "git blob id .*, not .*; it was deleted", {}),
        (["missing"], "cannot download .*one.csv: HTTP Error 404: Not Found", {}),
        (["truncated"] * 3, "closed after .* bytes are kept", {"one.csv.part"}),
    ],
)
def test_what_cannot_be_had_is_named_and_the_others_arrive(server, tmp_path, faults, message, left):
    server.faults["one.csv"] = list(faults)
    with pytest.raises(UserError, match=message):
        download(tmp_path, server.url, server.blobs)
    assert set(files_in(tmp_path)) == {"two.csv", *left}
    if faults != ["missing"]:
        assert len(server.requests) == len(faults) + 1


def test_a_file_of_the_users_own_is_left_alone(server, tmp_path):
    (tmp_path / "two.csv").write_text("mine")
    with pytest.raises(UserError, match="two.csv is there with other content; move it away"):
        download(tmp_path, server.url, server.blobs)
    assert files_in(tmp_path)["two.csv"] == b"mine"


def test_the_command_line(server, tmp_path):
    """All nine names are asked for; what this server has under them is not the published data."""
    CONTENT.update({name: b"x\ty\n" for name in datasets.GIT_BLOBS})
    command = [sys.executable, ROOT / "datasets.py", "download", "--url", server.url]
    done = subprocess.run([*command, "--data_dir", tmp_path], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("git blob id") == 9
    assert "Traceback" not in done.stderr
    assert {name for name, _ in server.requests} == {
        name for task in TASKS.values() for split in SPLITS for name in getattr(task, split)
    }
