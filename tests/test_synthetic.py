import contextlib
import functools
import io
import json
import re
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import ROOT, SAMPLE
from hypothesis import given
from hypothesis import strategies as st
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression

import multitask_classifier as mc
import synthetic
from datasets import read_examples
from generators import SmallGenerator
from synthetic import NearDuplicates
from tasks import SPLITS, TASKS

SST = TASKS["sst"]
SST_TRAIN = str(SAMPLE / SST.train[0])

# ------------------------------------------------------------------------------- near-duplicates

WORDS = st.lists(st.sampled_from("a b c d e f g h".split()), max_size=9).map(" ".join)
different_words = functools.cache(synthetic.different_words)


def similar(one, other):
    """The definition, as the README gives it."""
    first, second = different_words(one), different_words(other)
    return len(first & second) >= 0.8 * len(first | second)


@given(st.lists(WORDS, max_size=12), st.lists(WORDS, max_size=3), WORDS)
def test_near_duplicates_are_those_of_the_definition(added, corpus, sentence):
    near = NearDuplicates(corpus)
    for other in added:
        near.add(other)
    assert (sentence in near) == any(similar(sentence, other) for other in added)


def test_case_and_punctuation_make_no_difference():
    near = NearDuplicates([])
    near.add("The film , alas , is a mess .")
    assert "the film, alas, is a MESS!" in near and "The film is a triumph." not in near


# ----------------------------------------------------------------- a model that learns the sample


def make_small(monkeypatch, **constants):
    """Make the small model smaller."""
    size = dict(num_hidden_layers=1, num_attention_heads=2) | constants.pop("SIZE")
    for name, value in dict(SIZE=size, **constants).items():
        monkeypatch.setattr(SmallGenerator, name, value)


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """The folder of a run that has learned the sample: its CSV, its report, what it has printed."""
    folder, printed = tmp_path_factory.mktemp("learned"), io.StringIO()
    flags = ["--generator", "small", "--sst_train", SST_TRAIN, "--output", str(folder / "new.csv")]
    flags += ["--epochs", "5", "--lr", "1.5e-2", "--num_samples", "203", "--batch_size", "32"]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        make_small(patch, SIZE=dict(hidden_size=64, intermediate_size=128))
        assert synthetic.main(flags) == 0
    (folder / "printed").write_text(printed.getvalue())
    return folder


def read(path, split="train"):
    """Read a CSV like a training run does."""
    return read_examples(path, SST, split)


def read_report(folder):
    return json.loads((folder / "new.report.json").read_text())


def test_small_for_real(learned):
    rows = read(learned / "new.csv")
    of_each_label = [41, 41, 41, 40, 40]
    assert Counter(row.label for row in rows) == dict(enumerate(of_each_label))
    assert len({row.id for row in rows}) == 203
    assert all(re.fullmatch(r"synthetic-small-\d{6}", row.id) for row in rows)
    texts = [row.sentences[0] for row in rows]
    for split in SPLITS:
        for real in read(SAMPLE / getattr(SST, split)[0], split):
            assert not any(similar(text, real.sentences[0]) for text in texts)
    for number, text in enumerate(texts):
        assert not any(similar(text, other) for other in texts[:number])
    report = read_report(learned)
    assert report["of each label"] == of_each_label
    assert report["checked against"] == ["dev", "test"]
    dropped = sum(value for name, value in report.items() if name.startswith("dropped"))
    assert report["drawn"] >= 203 + dropped > 203
    assert "| perplexity on dev | " in (learned / "printed").read_text()
    assert not (learned / "new.csv.part").exists()


def test_the_small_model_learns_what_labels_mean(learned):
    """A classifier of another kind, which has seen the real sentences only, finds most labels again;
    by chance it would find a fifth."""
    real = read(SST_TRAIN)
    words = CountVectorizer(ngram_range=(1, 2))
    known = words.fit_transform([row.sentences[0] for row in real])
    classifier = LogisticRegression(max_iter=300).fit(known, [int(row.label) for row in real])
    rows = read(learned / "new.csv")
    found = classifier.predict(words.transform([row.sentences[0] for row in rows]))
    assert sum(found == [int(row.label) for row in rows]) > 0.6 * len(rows)


def test_small_learns_more_than_how_frequent_words_are(learned, tmp_path, monkeypatch):
    make_small(monkeypatch, SIZE=dict(hidden_size=64), _train=lambda *_: None)
    args = synthetic.parse(["--generator", "small", "--sst_train", SST_TRAIN, "--output", "x"])
    generator = SmallGenerator(args, torch.device("cpu"))
    train, dev = (read(SAMPLE / getattr(SST, split)[0], split) for split in ("train", "dev"))
    generator.fit(train, dev, tmp_path)
    counts = Counter(piece for row in generator._encode(train) for piece in row.ids[1:])
    pieces = [piece for row in generator._encode(dev) for piece in row.ids[1:]]
    by_frequency = np.exp(-np.mean([np.log(counts[piece] / counts.total()) for piece in pieces]))
    assert read_report(learned)["perplexity on dev"] < by_frequency / 3


# ------------------------------------------------------------------------- runs of a smaller sample


SMALLEST = dict(SIZE=dict(hidden_size=32, intermediate_size=64), TOKENS=64)


def small_flags(data, folder):
    flags = ["--generator", "small", "--data_dir", str(data), "--output", str(folder / "new.csv")]
    flags += ["--epochs", "4", "--lr", "1e-2", "--max_length", "32", "--batch_size", "32"]
    return flags + ["--num_samples", "63"]


@pytest.fixture
def small(small_data, tmp_path, monkeypatch):
    """The flags of a small model that is smaller still."""
    make_small(monkeypatch, **SMALLEST)
    return small_flags(small_data, tmp_path)


def test_an_interrupted_run_goes_on(small, tmp_path, monkeypatch, capsys):
    """It writes the same file as a run without an interrupt, and draws nothing again."""
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
    assert "run the same command again to continue" in capsys.readouterr().err
    rounds = tmp_path / "new.csv.part" / "rounds.jsonl"
    with open(rounds, "a") as file:
        file.write('{"rows": [[0, "cut sho')  # as a kill would leave it
    assert synthetic.main(small + ["--seed", "5"]) == 1
    assert "an interrupted run with other flags or files" in capsys.readouterr().err
    monkeypatch.setattr(SmallGenerator, "_train", None)  # nor is it trained again
    assert synthetic.main(small) == 0
    assert (tmp_path / "new.csv").read_bytes() == expected


@pytest.fixture(scope="module")
def mixed(small_data, tiny_directory, tmp_path_factory):
    """The folder of a run with --mix, and a model that is trained on its CSV."""
    folder = tmp_path_factory.mktemp("mixed")
    with pytest.MonkeyPatch.context() as patch:
        make_small(patch, **SMALLEST)
        assert synthetic.main([*small_flags(small_data, folder), "--mix"]) == 0
    flags = ["--sst", "--sst_train", str(folder / "new.csv"), "--data_dir", str(small_data)]
    flags += ["--bert_model", str(tiny_directory), "--epochs", "1", "--samples_per_epoch", "64"]
    for name in ("models_dir", "logdir", "cache_dir", "sst_dev_out", "sst_test_out"):
        flags += [f"--{name}", str(folder / name)]
    assert mc.main(flags) == 0
    return folder


def test_what_it_writes_is_trained_on(mixed):
    rows = read(mixed / "new.csv")
    assert len(rows) == 64 + 63 and not rows[0].id.startswith("synthetic")
    assert len(list((mixed / "models_dir").glob("*.pt"))) == 1


def test_a_classifier_filters(small, mixed, tmp_path, capsys, monkeypatch):
    (checkpoint,) = (mixed / "models_dir").glob("*.pt")
    chosen = small + ["--filter_with", str(checkpoint), "--min_confidence", "0.2"]
    with monkeypatch.context() as patch:
        # Fewer rounds for labels to which this model never gives 0.2.
        patch.setattr(synthetic, "FRUITLESS_ROUNDS", 2)
        assert synthetic.main(chosen) == 0
    model, tokenizer, _ = mc.load_checkpoint(checkpoint)
    rows = read(tmp_path / "new.csv")
    assert rows
    for row in rows:
        limit = dict(truncation=True, max_length=128)
        batch = tokenizer([row.sentences[0]], return_tensors="pt", **limit)
        logits = model.eval().predict_sentiment(batch["input_ids"], batch["attention_mask"])
        assert logits.softmax(-1)[0, int(row.label)] >= 0.2 - 1e-5
    assert read_report(tmp_path)["dropped: the classifier is less sure"] > 0
    capsys.readouterr()
    other = ["--num_samples", "5", "--output", str(tmp_path / "other.csv")]
    assert synthetic.main(chosen[:-1] + ["0.999"] + other) == 0
    assert "20 rounds have brought nothing new" in capsys.readouterr().err


def test_without_dev_and_test_the_report_says_so(small, small_data, tmp_path):
    alone = tmp_path / "alone.csv"
    alone.write_bytes((small_data / SST.train[0]).read_bytes())
    assert synthetic.main(small + ["--sst_train", str(alone)]) == 0
    assert read_report(tmp_path)["dropped: near-duplicates of dev or test"] == "not checked"


@pytest.mark.parametrize(
    "more, message",
    [
        (["--sst_train", "none.csv"], "none.csv: no such file"),
        (
            ["--model", "no/such/model", "--local_files_only"],
            "no/such/model: no such directory, and not a hub id",
        ),
        (["--filter_with", SST_TRAIN], "not a file of tensors"),
        (["--output", str(SAMPLE)], "Is a directory"),
        (["--sst_train", SST_TRAIN, "--output", SST_TRAIN], "is read too; give it another name"),
        (["--filter_with", "none.pt"], "none.pt: no such file"),
    ],
)
def test_bad_input_is_one_clear_line(small, more, message, capsys):
    assert synthetic.main(small + more) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and message in error


def test_help_is_quick():
    """It loads no library of a generator."""
    code = "import sys, synthetic; assert not {'transformers', 'openai'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
