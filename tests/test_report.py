import base64
import csv
import dataclasses
import re
import xml.etree.ElementTree as ElementTree
import zlib
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from checkpoints import load_pretrained
from conftest import SAMPLE
from sklearn.metrics import accuracy_score, f1_score

import multitask_classifier as mc
import report
from batches import collate
from bert import BertModel
from checkpoint import checkpoint_content, options_of, write_checkpoint
from datasets import TaskDataset
from evaluation import METRICS, confusion_counts
from multitask_classifier import MultitaskBERT
from options import parse_options
from report import Calibration, Result, Score
from tasks import TASKS
from tokenizer import BertTokenizer
from utils import UserError

# ---------------------------------------------------------------------------------------- numbers

BY_OTHERS = {
    "accuracy": accuracy_score,
    "macro_f1": lambda *pair: f1_score(*pair, average="macro", zero_division=0),
    "f1": lambda *pair: f1_score(*pair, zero_division=0),
    "pearson": lambda x, y: scipy.stats.pearsonr(x, y).statistic,
    "spearman": lambda x, y: scipy.stats.spearmanr(x, y).statistic,
}


def answers(name, n_rows=40):
    """Labels and predictions that agree more often than not; some resamples lack the last class."""
    rng = np.random.default_rng(7)
    if TASKS[name].num_classes is None:
        labels = rng.uniform(0, 5, n_rows)
        return labels, np.clip(labels + rng.normal(0, 1, n_rows), 0, 5)
    n_classes = TASKS[name].num_classes
    rarer = np.arange(n_classes, 0, -1) ** 2
    labels = rng.choice(n_classes, n_rows, p=rarer / rarer.sum()).astype(float)
    return labels, np.where(rng.random(n_rows) < 0.6, labels, rng.integers(0, n_classes, n_rows))


@pytest.mark.parametrize("name", TASKS)
def test_resamples_score_as_in_a_loop(name, monkeypatch):
    monkeypatch.setattr(report, "RESAMPLED_ROWS", 3 * 40 + 1)  # three resamples at a time
    labels, predictions = answers(name)
    found = report.resample(TASKS[name], labels, predictions, 50, seed=3)
    rows = np.random.default_rng([3, zlib.crc32(name.encode())]).integers(40, size=(50, 40))
    assert list(found) == list(TASKS[name].metrics)
    for metric, values in found.items():
        expected = [BY_OTHERS[metric](labels[drawn], predictions[drawn]) for drawn in rows]
        assert values == pytest.approx(expected)
        assert len(set(values)) > 5


@pytest.mark.parametrize("name", TASKS)
def test_intervals_are_scipys(name):
    labels, predictions = answers(name)
    for metric, values in report.resample(TASKS[name], labels, predictions, 100, seed=5).items():
        theirs = scipy.stats.bootstrap(
            (labels, predictions),
            BY_OTHERS[metric],
            n_resamples=100,
            vectorized=False,
            paired=True,
            method="percentile",
            rng=np.random.default_rng([5, zlib.crc32(name.encode())]),
        ).confidence_interval
        found = Score.of(0.5, values)
        assert found == pytest.approx((0.5, theirs.low, theirs.high))
        assert found.low < found.high


def test_a_correlation_without_spread_is_0():
    labels, predictions = np.array([[1.0, 1, 1], [0, 1, 2]]), np.array([[0.0, 1, 2], [0.1] * 3])
    for name in ("pearson", "spearman"):
        assert METRICS[name](labels, predictions).tolist() == [0, 0]


@pytest.fixture
def result(tiny_directory):
    """Make a result of the first rows of a dev set from made-up outputs: random logits, or the
    similarities with noise."""
    tokenizer = BertTokenizer.from_pretrained(tiny_directory)

    def make(name, encoding="bi", n_rows=120):
        task = dataclasses.replace(TASKS[name], encoding=encoding)
        paths = [SAMPLE / file for file in task.dev]
        data = TaskDataset(paths, task, "dev", tokenizer, 512, limit=n_rows)
        data.labels[[0, 7]] = np.nan
        outputs = torch.randn(n_rows, task.num_classes or 1) * 2
        if task.num_classes is None:
            outputs = torch.from_numpy(np.nan_to_num(data.labels)).float() + outputs[:, 0]
        return Result.of(data, outputs), outputs.double().numpy()

    return make


def softmax(row):
    powers = np.exp(row - max(row))
    return powers / sum(powers)


@pytest.mark.parametrize("name", ["sst", "para"])
def test_calibration_equals_a_loop(result, name):
    found, outputs = result(name)
    bins = [[] for _ in range(15)]
    for row, label in enumerate(found.dataset.labels):
        if label == label:
            probabilities = softmax(outputs[row])
            number = next(k for k in range(15) if probabilities.max() <= (k + 1) / 15)
            bins[number].append((probabilities.max(), probabilities.argmax() == label))
    bins = [rows for rows in bins if rows]
    means = [np.mean(rows, axis=0) for rows in bins]
    calibration = Calibration.of(found)
    assert calibration.n_rows.tolist() == [len(rows) for rows in bins]
    assert calibration.confidence == pytest.approx([confidence for confidence, _ in means])
    assert calibration.accuracy == pytest.approx([accuracy for _, accuracy in means])
    expected = sum(
        len(rows) * abs(np.subtract(*mean)) for rows, mean in zip(bins, means, strict=True)
    )
    assert calibration.error == pytest.approx(expected / 118)
    assert calibration.error > 0.1  # random answers are nowhere near calibrated


@pytest.mark.parametrize("name", TASKS)
def test_worst_mistakes_equal_a_search(result, name, monkeypatch):
    monkeypatch.setattr(report, "N_MISTAKES", 4)
    found, outputs = result(name)
    mistakes = []
    for row, label in enumerate(found.dataset.labels):
        if label != label:
            continue
        if TASKS[name].num_classes:
            probabilities = softmax(outputs[row])
            predicted, certainty = probabilities.argmax(), probabilities.max()
        else:
            predicted = min(max(outputs[row], 0), 5)
            certainty = abs(predicted - label)
        if predicted != label:
            example = found.dataset.examples[row]
            mistakes.append((example.id, example.sentences, label, predicted, certainty))
    mistakes.sort(key=lambda mistake: -mistake[-1])
    shown = report.worst_mistakes(found)
    assert len(shown) == 4
    for row, expected in zip(shown, mistakes[:4], strict=True):
        assert row[:2] == expected[:2]
        assert row[2:] == pytest.approx(expected[2:])


@pytest.mark.parametrize(
    "name, encoding", [("sst", "bi"), ("para", "bi"), ("sts", "cross"), ("sts", "both")]
)
def test_scores_by_length_equal_a_search(result, tiny_directory, name, encoding):
    found, _ = result(name, encoding)
    tokenizer = BertTokenizer.from_pretrained(tiny_directory)
    lengths = [
        sum(len(tokenizer([text])["input_ids"][0]) - 2 for text in example.sentences)
        for example in found.dataset.examples
    ]
    lengths = np.array(lengths)[found.rows]
    table = report.scores_by_length(found, 20, seed=1)
    assert sum(line.n_rows for line in table) == len(found.rows) and 3 <= len(table) <= 5
    for line in table:
        low, _, high = line.title.partition(" to ")
        inside = (int(low) <= lengths) & (lengths <= int(high or low))
        assert inside.sum() == line.n_rows
        for metric, score in line.scores.items():
            expected = BY_OTHERS[metric](found.labels[inside], found.predictions[inside])
            assert score.value == pytest.approx(expected)
            assert score.low <= score.value + 0.1 and score.value - 0.1 <= score.high
    sizes = [line.n_rows for line in table]
    assert max(sizes) < len(found.rows) / 2


def test_many_rows_of_one_length_are_one_line(result):
    found, _ = result("sst")
    found.dataset.columns[0] = found.dataset.columns[0]._replace(lengths=np.full(120, 5))
    assert [line.title for line in report.scores_by_length(found, 5, seed=1)] == ["3"]


# -------------------------------------------------------------------------------------- attention


@pytest.mark.parametrize("encoding", ["bi", "cross", "both"])
def test_token_weights_are_the_published_formula(tiny_directory, encoding):
    """They are softmax(v tanh(W h)) of the encoder's states, for one sequence at a time."""
    tokenizer = BertTokenizer.from_pretrained(tiny_directory)
    task = dataclasses.replace(TASKS["sts"], encoding=encoding)
    model = MultitaskBERT(BertModel.from_pretrained(tiny_directory), {"sts": task}).eval()
    paths = [SAMPLE / file for file in task.dev]
    data = TaskDataset(paths, task, "dev", tokenizer, 128, limit=9)
    rows = np.array([5, 0, 8])
    with torch.no_grad():
        model.attention_layer.v.weight.mul_(20)
        found = report.token_weights(model, collate({"sts": (data, rows)}))
    assert len(found) == len(rows) * len(data.columns)
    sequences = [
        (torch.from_numpy(column.row(row)[0]), column.first_lengths[row] if joint else 10**6)
        for column in data.columns
        for joint in [column.first_lengths is not None]
        for row in rows
    ]
    layer = model.attention_layer
    for weights, (ids, n_first) in zip(found, sequences, strict=True):
        types = (torch.arange(len(ids)) >= n_first).long()[None]
        hidden = model.bert(ids[None].long(), torch.ones_like(types), types)["last_hidden_state"][0]
        scores = torch.tanh(hidden @ layer.W.weight.T + layer.W.bias) @ layer.v.weight[0]
        expected = scores.exp() / scores.exp().sum()
        torch.testing.assert_close(weights, expected.detach(), rtol=1e-4, atol=1e-6)
        assert weights.sum().item() == pytest.approx(1)
        assert weights.max() > 2 * weights.min()


# ------------------------------------------------------------------------------------------- page

VOID = {"meta", "img", "br", "link", "input", "hr", "base", "source"}


class Page(HTMLParser):
    """Fails for tags that do not match; collects attributes and the cells of tables."""

    def __init__(self, path):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.rows, self.text = [], [], [], []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data.strip()

    def values(self, attribute):
        return [attributes[attribute] for _, attributes in self.tags if attribute in attributes]


@pytest.fixture
def trained(tiny_directory, tmp_path):
    """Write a checkpoint of an untrained model, which is as good as any here."""

    def make(*flags):
        cache = ["--cache_dir", str(tmp_path / "cache")]
        options = parse_options(["--bert_model", str(tiny_directory), *cache, *flags])
        model, tokenizer, tagger = load_pretrained(options)
        with torch.no_grad():
            for head in (*model.heads.values(), *model.joint_heads.values()):
                for parameter in head.parameters():
                    # Without this, all rows would get the same class.
                    parameter.mul_(3)
        content = checkpoint_content(model, tokenizer, options, 1, {}, tagger)
        write_checkpoint(tmp_path / "model.pt", content)
        return str(tmp_path / "model.pt")

    return make


@pytest.fixture
def page(trained, tmp_path):
    """Write the report about a checkpoint, on 32 rows of each task, and read it."""

    def make(checkpoint, *flags, data_dir=SAMPLE):
        flags = ["--data_dir", str(data_dir), "--cache_dir", str(tmp_path / "cache"), *flags]
        flags += ["--output", str(tmp_path / "out"), "--smoketest", "--resamples", "20"]
        assert report.main(["--checkpoint", checkpoint, *flags]) == 0
        return Page(tmp_path / "out" / "report.html")

    return make


@pytest.fixture
def no_pictures(monkeypatch):
    """Leave the pictures out, since they take most of the time."""
    monkeypatch.setattr(report, "embed_figure", lambda *_: "")


KINDS = {
    "all tasks": [],
    "one task": ["--sst"],
    "two tasks": ["--para", "--sts"],
    "encodings": ["--para_encoding", "both", "--sts_encoding", "cross"],
    "soft experts": ["--moe", "soft", "--sts"],
    "hard experts": ["--moe", "hard", "--para", "--para_encoding", "cross"],
    "tags": ["--additional_input", "--sst", "--sts", "--sts_encoding", "both"],
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_report_of_each_kind_of_model(kind, trained, page, tmp_path, request):
    """Its scores are those of --evaluate. It is well-formed and needs no other file."""
    flags = KINDS[kind]
    if kind == "tags":
        flags = [*flags, "--spacy_model", str(request.getfixturevalue("pipeline_directory"))]
    checkpoint = trained(*flags)
    found = page(checkpoint)

    again = ["--evaluate", checkpoint, "--data_dir", str(SAMPLE), "--smoketest"]
    again += ["--predictions_dir", str(tmp_path / "predictions")]
    again += ["--cache_dir", str(tmp_path / "cache")]
    expected = mc.evaluate_only(options_of(again))
    titles = {task.title: name for name, task in TASKS.items()}
    scores = {
        (titles[row[0]], row[1].replace(" ", "_")): row[2]
        for row in found.rows
        if row[0] in titles and len(row) == 6 and " to " in row[3]
    }
    assert scores == {
        (name, metric): f"{value:.4f}"
        for name, metrics in expected.items()
        for metric, value in metrics.items()
    }

    assert not {"script", "link", "iframe", "object", "embed"} & {tag for tag, _ in found.tags}
    assert all(src.startswith("data:image/svg+xml;base64,") for src in found.values("src"))
    assert not re.search(r"url\(|@import", "".join(found.text))
    ids = found.values("id")
    assert len(ids) == len(set(ids))
    assert {link.removeprefix("#") for link in found.values("href")} <= set(ids)
    assert len(found.values("src")) == len(found.values("alt")) > 0
    for picture in found.values("src"):
        svg = base64.b64decode(picture.partition(",")[2]).decode()
        ElementTree.fromstring(svg)
        assert "currentColor" in svg and report.INK not in svg
        assert not re.search(r'(?:href|src)="(?!#|data:)', svg)


def test_the_mean_has_an_interval_of_its_own(trained, page, no_pictures):
    rows = [row for row in page(trained()).rows if len(row) == 6 and " to " in row[3]]
    (mean,) = [row for row in rows if row[0] == "mean"]
    main = [float(row[2]) for row in rows if row[1] in ("accuracy", "pearson")]
    assert float(mean[2]) == pytest.approx(np.mean(main), abs=1e-4)
    low, high = map(float, mean[3].split(" to "))
    widths = [np.diff([float(x) for x in row[3].split(" to ")])[0] for row in rows]
    # The accidents of three tasks partly cancel.
    assert 0 < high - low < max(widths)


def test_constant_answers_are_scikit_learns(result):
    from sklearn.dummy import DummyClassifier, DummyRegressor

    for name in TASKS:
        found = result(name)[0]
        dummy = DummyClassifier() if found.task.classes else DummyRegressor()
        answers = dummy.fit(found.labels, found.labels).predict(found.labels)
        for metric, value in report.constant_scores(found).items():
            undefined = metric in ("pearson", "spearman")
            assert value == (
                0 if undefined else pytest.approx(BY_OTHERS[metric](found.labels, answers))
            )


def test_differences_are_scipys_paired_bootstrap(result):
    """The difference of two models, and the interval of a paired bootstrap over rows."""
    seed, n_resamples = 9, 100
    for name in TASKS:
        one, other = result(name)[0], result(name)[0]
        (row,) = report.score_table({name: one}, {name: other}, n_resamples, seed)
        for metric, difference in row.differences.items():

            def minus(labels, ours, theirs, metric=metric):
                return BY_OTHERS[metric](labels, ours) - BY_OTHERS[metric](labels, theirs)

            arrays = one.labels, one.predictions, other.predictions
            theirs = scipy.stats.bootstrap(
                arrays,
                minus,
                n_resamples=n_resamples,
                vectorized=False,
                paired=True,
                method="percentile",
                rng=np.random.default_rng([seed, zlib.crc32(name.encode())]),
            ).confidence_interval
            assert difference == pytest.approx((minus(*arrays), theirs.low, theirs.high))


def test_two_checkpoints_next_to_each_other(trained, page, no_pictures, tmp_path):
    """The same model has no difference to itself; another has its own scores, for the tasks it knows."""
    first = trained("--sts", "--sst", "--lr", "3e-4", "--seed", "8", "--batch_size", "24")
    other = str(Path(first).rename(tmp_path / "other.pt"))
    second = trained("--sst", "--seed", "5")
    same = page(second, "--compare", second)
    facts = {row[0]: row[1] for row in page(other).rows if len(row) == 2}
    assert (facts["lr"], facts["seed"], facts["batch size"]) == ("0.0003", "8", "24")
    rows = [row for row in same.rows if len(row) == 10 and row[0] == "sentiment"]
    assert rows and all(row[2] == row[6] and row[8] == "+0.0000" for row in rows)
    rows = [row for row in page(other, "--compare", second).rows if len(row) == 10]
    by_task = {row[0]: row for row in rows}
    assert by_task["sentiment"][6] and not by_task["similarity"][6] and not by_task["mean"][6]
    own, their, difference = (float(by_task["sentiment"][column]) for column in (2, 6, 8))
    assert difference == pytest.approx(own - their, abs=2e-4) and difference != 0


def test_the_same_command_writes_the_same_page(trained, page, tmp_path):
    checkpoint = trained("--sts")
    page(checkpoint)
    first = (tmp_path / "out" / "report.html").read_bytes()
    page(checkpoint)
    assert (tmp_path / "out" / "report.html").read_bytes() == first
    page(checkpoint, "--seed", "4")
    assert (tmp_path / "out" / "report.html").read_bytes() != first


def test_what_sentences_hold_is_shown_and_not_run(trained, page, no_pictures, tmp_path):
    evil = ["<script>alert(1)</script>", "\"'><img src=//x onerror=y>", "{{ 7 * 7 }} &amp;", "b"]
    with open(tmp_path / "ids-sst-dev.csv", "w", newline="") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerow(["id", "sentence", "sentiment"])
        writer.writerows([f"<b>{number}", text, number] for number, text in enumerate(evil))
    found = page(trained("--sst"), data_dir=tmp_path)
    assert not {"script", "b>0"} & {tag for tag, _ in found.tags}
    assert not any("onerror" in attributes for _, attributes in found.tags)
    shown = "".join(found.text)
    mistakes = [text for text in evil if text in shown]
    wrong = int(re.search(r"The first (\d+) of", shown)[1])
    # At most one of the four classes is right.
    assert len(mistakes) >= wrong >= 3


def test_attention_shows_each_piece_and_its_weight(trained, page, no_pictures, tiny_directory):
    found = page(trained("--sst"))
    pieces = [attributes for _, attributes in found.tags if attributes.get("class") == "piece"]
    examples = list(csv.DictReader(open(SAMPLE / "ids-sst-dev.csv"), delimiter="\t"))
    texts = [example["sentence"] for example in examples[: report.N_EXAMPLES]]
    tokenizer = BertTokenizer.from_pretrained(tiny_directory)
    assert len(pieces) == sum(len(ids) for ids in tokenizer(texts)["input_ids"])
    assert [piece["style"] for piece in pieces].count("--shade: 1.00") >= report.N_EXAMPLES


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--checkpoint", "no/such.pt"], "no/such.pt: no such file"),
        (["--sts"], "was not trained on sts"),
        (["--output", "{file}/below"], "cannot write"),
        (["--data_dir", "nowhere"], "no such file"),
        (["--config", "no.json"], "--config no.json: cannot be read"),
        (["--compare", "no*.pt"], "no*.pt: no file has such a name"),
        (["--compare", "{pairs}"], "pairs.pt: was trained on none of the tasks sst"),
    ],
)
def test_bad_input_ends_in_one_line(flags, message, trained, tmp_path, capsys):
    pairs = Path(trained("--sts")).rename(tmp_path / "pairs.pt")
    (tmp_path / "file").touch()
    (tmp_path / "report.html").write_text("the last one")
    given = ["--checkpoint", trained("--sst"), "--output", str(tmp_path), "--smoketest"]
    given += [
        "--data_dir",
        str(SAMPLE),
        *(f.format(file=tmp_path / "file", pairs=pairs) for f in flags),
    ]
    assert report.main(given) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and message in error
    assert (tmp_path / "report.html").read_text() == "the last one"


def test_answers_that_are_no_numbers_are_an_error(result):
    data = result("sst")[0].dataset
    with pytest.raises(UserError, match="not finite"):
        Result.of(data, torch.full((120, 5), torch.nan))


def test_the_confusion_matrix_counts_labelled_rows(result):
    found, outputs = result("para")
    counts = confusion_counts(found.evaluation)
    for true in range(2):
        for predicted in range(2):
            rows = (found.dataset.labels == true) & (outputs.argmax(axis=1) == predicted)
            assert counts[true, predicted] == rows.sum()
