import csv
import math

import numpy as np
import pytest
import torch

import evaluation
from datasets import TaskDataset
from evaluation import Evaluation, evaluate, mean_score, predict, score, write_predictions
from tasks import TASKS


@pytest.fixture
def tiny_csv(tmp_path, minilm_tokenizer):
    """Make a dataset of five rows: one empty, one without a label, not in order of length."""

    def make(name):
        task = TASKS[name]
        sentences = ["three little words", "", "one", "a rather long sentence here", "two words"]
        labels = ["0", "1", "1", "", "0"]
        lines = ["\t".join(["id", *task.sentence_columns, task.label_column])]
        for index, (sentence, label) in enumerate(zip(sentences, labels, strict=True)):
            lines.append("\t".join([f"i{index}", *[sentence] * len(task.sentence_columns), label]))
        path = tmp_path / f"{name}.csv"
        path.write_text("\n".join(lines) + "\n")
        with pytest.warns(UserWarning, match="not scored"):
            return TaskDataset(path, task, "dev", minilm_tokenizer, 512)

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


def test_metrics_equal_their_formulas():
    rng = np.random.default_rng(0)
    labels, predictions = rng.integers(0, 4, 200), rng.integers(0, 4, 200)
    f1 = []
    for c in range(4):
        hits = np.sum((labels == c) & (predictions == c))
        f1.append(2 * hits / (np.sum(labels == c) + np.sum(predictions == c)))
    assert evaluation.macro_f1(labels, predictions) == pytest.approx(np.mean(f1))
    assert evaluation.accuracy(labels, predictions) == pytest.approx(np.mean(labels == predictions))
    x, y = rng.standard_normal(50), rng.standard_normal(50)
    covariance = np.mean((x - x.mean()) * (y - y.mean()))
    assert evaluation.pearson(x, y) == pytest.approx(covariance / (x.std() * y.std()))
    assert evaluation.pearson(x, np.ones(50)) == 0


def test_rows_without_label_do_not_count():
    labels = np.array([1, math.nan, 0, 1.0])
    assert score(TASKS["para"], labels, np.array([1, 1, 1, 1]))["accuracy"] == pytest.approx(2 / 3)


def test_the_mean_takes_each_tasks_first_metric():
    scores = {"a": {"accuracy": 0.5, "macro_f1": 0.1}, "b": {"pearson": 0.9}}
    assert mean_score(scores) == pytest.approx(0.7)


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_predictions_come_back_in_input_order(tiny_csv, batch_size):
    model = LengthModel()
    model.train()
    assert predict(model, tiny_csv("sts"), batch_size).tolist() == [3, 0, 1, 5, 2]
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


def test_confusion_figure_shows_the_counts(tiny_csv):
    data = tiny_csv("sst")
    result = Evaluation(data, np.array([0, 0, 1, 3, 4.0]), {})
    axes = evaluation.confusion_figure(result).axes[0]
    shown = [int(text.get_text()) for text in axes.texts]
    expected = np.zeros((5, 5), int)
    expected[0, 0], expected[1, 0], expected[1, 1], expected[0, 4] = 1, 1, 1, 1
    assert shown == expected.ravel().tolist()
