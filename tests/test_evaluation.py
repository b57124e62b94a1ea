import csv
import math
import random
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import SAMPLE
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics

import evaluation
from datasets import TaskDataset
from evaluation import Evaluation, evaluate, mean_score, score, write_predictions
from tasks import CLASS_METRICS, NUMBER_METRICS, TASKS


@pytest.fixture
def tiny_csv(tmp_path, minilm_tokenizer):
    """Make a dataset of five rows: one empty, one without a label, not in order of length."""

    def make(name):
        task = TASKS[name]
        sentences = ["three little words", "", "one", "a rather long sentence here", "two words"]
        labels = ["0", "1", "1", "", "0"]
        lines = ["\t".join(["id", *task.sentences, task.label])]
        for index, (sentence, label) in enumerate(zip(sentences, labels, strict=True)):
            lines.append("\t".join([f"i{index}", *[sentence] * len(task.sentences), label]))
        path = tmp_path / f"{name}.csv"
        path.write_text("\n".join(lines) + "\n")
        with pytest.warns(UserWarning, match="not scored"):
            return TaskDataset([path], task, "dev", minilm_tokenizer, 512)

    return make


class LengthModel(torch.nn.Module):
    """A model whose answer is the number of tokens of a row's first sentence, as similarity or class."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.modes = []

    def forward(self, batch):
        self.modes.append(self.training)
        ((name, columns),) = batch.columns.items()
        lengths = torch.tensor(batch.lengths)[batch.places][columns[0]]
        if TASKS[name].num_classes is None:
            return {name: lengths / 1.0 - 2}
        classes = (lengths - 2).clamp(max=TASKS[name].num_classes - 1)
        return {name: torch.eye(TASKS[name].num_classes)[classes]}


def zero_if_undefined(value):
    return 0.0 if math.isnan(value) else value


# Each metric by another library.
PEERS = {
    "accuracy": metrics.accuracy_score,
    "macro_f1": partial(metrics.f1_score, average="macro", zero_division=0),
    "f1": partial(metrics.f1_score, zero_division=0),
    "matthews": metrics.matthews_corrcoef,
    "pearson": lambda x, y: zero_if_undefined(stats.pearsonr(x, y).statistic),
    "spearman": lambda x, y: zero_if_undefined(stats.spearmanr(x, y).statistic),
}


def rows_for(metric, n_rows, rng):
    """Draw labels and predictions [2, n_rows] that are alike in half of the rows."""
    n_classes = {"f1": 2}.get(metric, rng.integers(1, 6))
    labels, others = rng.integers(0, n_classes, (2, n_rows)).astype(float)
    if metric in NUMBER_METRICS:  # with ties
        labels, others = labels + 1, others / 4
    return np.stack([labels, np.where(rng.random(n_rows) < 0.5, labels, others)])


@pytest.mark.filterwarnings("ignore:An input array is constant", "ignore:.*single label")
@pytest.mark.parametrize("metric", evaluation.METRICS)
@given(st.integers(2, 40), st.integers(0, 2**32 - 1))
def test_metrics_are_those_of_scikit_learn_and_scipy(metric, n_rows, seed):
    """Also of classes that do not occur, and of constant sides."""
    labels, predictions = rows_for(metric, n_rows, np.random.default_rng(seed))
    expected = PEERS[metric](labels, predictions)
    assert evaluation.METRICS[metric](labels, predictions) == pytest.approx(expected, abs=1e-9)


@pytest.mark.filterwarnings("ignore:An input array is constant", "ignore:.*single label")
@pytest.mark.parametrize("metric", evaluation.METRICS)
def test_metrics_of_resamples_are_those_of_each(metric):
    """Of few rows, so that some resamples lack a class or are constant."""
    rng = np.random.default_rng(5)
    rows = rows_for(metric, 6, rng)[:, rng.integers(0, 6, (3, 60, 6))]  # [2, 3, 60, 6]
    found = evaluation.METRICS[metric](*rows)
    assert found.shape == (3, 60) and len(np.unique(found)) > 3
    expected = [[PEERS[metric](*rows[:, i, j]) for j in range(60)] for i in range(3)]
    np.testing.assert_allclose(found, expected, atol=1e-9)


def test_every_metric_is_that_of_classes_or_of_numbers():
    assert set(evaluation.METRICS) == {*CLASS_METRICS, *NUMBER_METRICS} == set(PEERS)


def test_rows_without_label_do_not_count():
    labels = np.array([1, math.nan, 0, 1.0])
    scores = score(TASKS["para"], labels, np.array([1, 1, 1, 1]))
    # Of class 0 the F1 is 0, of class 1 it is 2 * 2 / (2 + 3).
    assert scores == pytest.approx({"accuracy": 2 / 3, "macro_f1": 0.4, "f1": 0.8})


def test_the_mean_takes_each_tasks_first_metric():
    scores = {"a": {"accuracy": 0.5, "macro_f1": 0.1}, "b": {"pearson": 0.9}}
    assert mean_score(scores) == pytest.approx(0.7)


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_predictions_come_back_in_input_order(tiny_csv, batch_size):
    model = LengthModel()
    model.train()
    result = evaluate(model, {"sts": tiny_csv("sts")}, batch_size)["sts"]
    assert result.predictions.tolist() == [3, 0, 1, 5, 2]
    assert model.training and not any(model.modes)


def test_similarities_are_clamped_and_classes_are_whole():
    assert TASKS["sts"].decode(torch.tensor([-0.2, 2.5, 5.1])).tolist() == [0, 2.5, 5]
    assert TASKS["sst"].decode(torch.tensor([[0.1, 0.2, 0, 0, 0]])).tolist() == [1]


def test_prediction_files(tiny_csv, tmp_path):
    datasets = {name: tiny_csv(name) for name in TASKS}
    for name, result in evaluate(LengthModel(), datasets, 2).items():
        write_predictions(tmp_path / "out" / name, result)
    rows = list(csv.reader(open(tmp_path / "out" / "sst"), delimiter="\t"))
    assert rows[0] == ["id", "predicted_sentiment"]
    assert rows[1:] == [["i0", "3"], ["i1", "0"], ["i2", "1"], ["i3", "4"], ["i4", "2"]]
    rows = list(csv.reader(open(tmp_path / "out" / "sts"), delimiter="\t"))
    assert [float(value) for _, value in rows[1:]] == [3, 0, 1, 5, 2]


def test_two_predictions_into_one_stream_both_come(tiny_csv, tmp_path, capfd):
    datasets = {name: tiny_csv(name) for name in TASKS}
    results = evaluate(LengthModel(), datasets, 2)
    places = {f"{name}_dev_out": f"{tmp_path}/{name}" for name in TASKS}
    places |= {"sst_dev_out": "/dev/stdout", "para_dev_out": "/dev/stdout"}
    options = SimpleNamespace(tasks=TASKS, **places)
    evaluation.show_results({"dev": results}, "model", options, {})
    lines = capfd.readouterr().out.splitlines()
    assert "id\tpredicted_sentiment" in lines and "id\tpredicted_is_duplicate" in lines


def test_confusion_figure_shows_the_counts(tiny_csv):
    data = tiny_csv("sst")
    result = Evaluation(data, np.array([0, 0, 1, 3, 4.0]), {})
    axes = evaluation.confusion_figure(result).axes[0]
    shown = [int(text.get_text()) for text in axes.texts]
    expected = np.zeros((5, 5), int)
    expected[0, 0], expected[1, 0], expected[1, 1], expected[0, 4] = 1, 1, 1, 1
    assert shown == expected.ravel().tolist()


def test_chosen_dev_rows_are_the_same_in_whatever_order_the_file_has(tmp_path, minilm_tokenizer):
    """Rows without a label are not among them."""
    header, *lines = (SAMPLE / "sts-dev.csv").read_text().splitlines()[:101]
    lines[7] = "\t".join([*lines[7].split("\t")[:-1], ""])
    found = []
    for seed in range(3):
        random.Random(seed).shuffle(lines)
        path = tmp_path / f"{seed}.csv"
        path.write_text("\n".join([header, *lines]) + "\n")
        with pytest.warns(UserWarning, match="1 row predicted but not scored"):
            dataset = TaskDataset([path], TASKS["sts"], "dev", minilm_tokenizer, 64)
        few = dataset.sample(20)
        assert len(few) == len(few.labels) == len(few.n_tokens) == 20 and len(dataset) == 100
        assert few.ids == [id for id in dataset.ids if id in set(few.ids)]
        by_id = {id: row for row, id in enumerate(dataset.ids)}
        for number, id in enumerate(few.ids):
            row = by_id[id]
            assert few.examples[number] == dataset.examples[row]
            assert few.labels[number] == dataset.labels[row]
            assert few.n_tokens[number] == dataset.n_tokens[row]
            for mine, whole in zip(few.columns, dataset.columns, strict=True):
                assert np.array_equal(mine.row(number), whole.row(row))
        assert set(dataset.sample(10).ids) < set(few.ids)
        assert len(dataset.sample(1000)) == 99
        found.append(set(few.ids))
    assert found[0] == found[1] == found[2]
    assert found[0] != {line.split("\t")[1] for line in lines[:20]}
