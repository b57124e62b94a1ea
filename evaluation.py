"""Metrics, the evaluation pass and prediction files. The model and the datasets are made elsewhere."""

import argparse
import csv
import dataclasses
import itertools
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from batches import evaluation_batches
from datasets import TaskDataset, rows_in_train
from processes import gather, n_processes, rank
from tasks import Task, combine, mean
from utils import atomic_write, autocast, progress_bar

Scores = dict[str, dict[str, float]]  # task -> metric -> value
NAMED_CLASSES = 20  # a confusion matrix of more classes has no names and numbers


# Metrics of labels and predictions [..., n_rows]: a value for all leading axes, such as resamples.


def accuracy(labels: np.ndarray, predictions: np.ndarray) -> np.ndarray:
    return (labels == predictions).mean(axis=-1)


def counts_of(labels: np.ndarray, predictions: np.ndarray) -> tuple[np.ndarray, ...]:
    """Count for each class the rows that are both, that have the label, and that are predicted so:
    three arrays [..., classes]."""
    classes = np.arange(max(labels.max(), predictions.max()) + 1)
    true, predicted = ([array == k for k in classes] for array in (labels, predictions))
    both = [one & other for one, other in zip(true, predicted, strict=True)]
    return tuple(
        np.stack([np.count_nonzero(rows, axis=-1) for rows in kind], axis=-1)
        for kind in (both, true, predicted)
    )


def f1_by_class(labels: np.ndarray, predictions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the F1 of each class, and whether it occurs in labels or predictions: [..., classes]."""
    both, true, predicted = counts_of(labels, predictions)
    size = true + predicted
    return 2 * both / np.maximum(size, 1), size > 0


def macro_f1(labels: np.ndarray, predictions: np.ndarray) -> np.ndarray:
    """Average the F1 of the classes that occur in labels or predictions."""
    by_class, occurs = f1_by_class(labels, predictions)
    return by_class.sum(axis=-1) / occurs.sum(axis=-1)


def f1(labels: np.ndarray, predictions: np.ndarray) -> np.ndarray:
    """Return the F1 of the second class of two."""
    by_class, _ = f1_by_class(labels, predictions)
    return by_class[..., 1] if by_class.shape[-1] > 1 else np.zeros(by_class.shape[:-1])


def matthews(labels: np.ndarray, predictions: np.ndarray) -> np.ndarray:
    """Return the Matthews correlation for several classes (Gorodkin 2004); 0 if one side is constant."""
    both, true, predicted = (kind.astype(float) for kind in counts_of(labels, predictions))
    n_rows = labels.shape[-1]
    covariance = n_rows * both.sum(axis=-1) - (true * predicted).sum(axis=-1)
    spread = [n_rows**2 - (kind**2).sum(axis=-1) for kind in (true, predicted)]
    return correlation(covariance, *spread)


def correlation(covariance: np.ndarray, spread: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Divide a covariance by the roots of both variances; 0 where one is 0, and it is undefined."""
    product = np.sqrt(spread * other)
    return np.where(product > 0, covariance / np.where(product > 0, product, 1), 0.0)


def pearson(labels: np.ndarray, predictions: np.ndarray) -> np.ndarray:
    """Return Pearson's correlation; 0 if one side is constant, where it is undefined."""
    constant = (np.ptp(labels, axis=-1) == 0) | (np.ptp(predictions, axis=-1) == 0)
    x = labels - labels.mean(axis=-1, keepdims=True)
    y = predictions - predictions.mean(axis=-1, keepdims=True)
    spreads = (x**2).sum(axis=-1), (y**2).sum(axis=-1)
    return np.where(constant, 0.0, correlation((x * y).sum(axis=-1), *spreads))


def spearman(labels: np.ndarray, predictions: np.ndarray) -> np.ndarray:
    """Return Pearson's correlation of the ranks; equal values share the mean of their ranks."""
    from scipy.stats import rankdata

    return pearson(rankdata(labels, axis=-1), rankdata(predictions, axis=-1))


# By the names in tasks.CLASS_METRICS and NUMBER_METRICS.
METRICS = {
    metric.__name__: metric for metric in (accuracy, macro_f1, f1, matthews, pearson, spearman)
}


def score(task: Task, labels: np.ndarray, predictions: np.ndarray) -> dict[str, float]:
    """Return the metrics of a task by name. Rows without a label (nan) do not count."""
    labelled = ~np.isnan(labels)
    return {
        name: float(METRICS[name](labels[labelled], predictions[labelled].astype(labels.dtype)))
        for name in task.metrics
    }


def mean_score(scores: Mapping[str, Mapping[str, float]], select: str | None = None) -> float:
    """Return the score that selects the model: the mean over tasks of their first metrics; with `select`
    (a task), that of this task. nan if there is none."""
    first = {name: next(iter(metrics.values())) for name, metrics in scores.items()}
    if select:
        return first.get(select, math.nan)
    return sum(first.values()) / len(first) if first else math.nan


@dataclasses.dataclass
class Evaluation:
    """The predictions of a model for one dataset, in the dataset's order, and their scores."""

    dataset: TaskDataset
    predictions: np.ndarray  # [n_rows], on the label's scale
    scores: dict[str, float]  # empty for a dataset without labels
    loss: float = math.nan  # of the labelled rows, as in `Task.loss`

    @classmethod
    def of(cls, dataset: TaskDataset, outputs: torch.Tensor) -> "Evaluation":
        """Read and score the outputs of a model [n_rows, ...]."""
        predictions = dataset.task.decode(outputs).double().numpy()
        rows = np.flatnonzero(~np.isnan(dataset.labels))
        if not len(rows):
            return cls(dataset, predictions, {})
        labels = torch.from_numpy(dataset.labels[rows]).to(
            torch.long if dataset.task.classes else outputs.dtype
        )
        loss = float(dataset.task.loss(outputs[rows], labels))
        return cls(dataset, predictions, score(dataset.task, dataset.labels, predictions), loss)


class Outputs(NamedTuple):
    """The outputs of one model, or the mean of several, for a dataset."""

    dataset: TaskDataset
    outputs: torch.Tensor  # [n_rows, ...]


@torch.no_grad()
def outputs(
    model: torch.nn.Module, dataset: TaskDataset, batch_size: int, precision: str = "auto"
) -> torch.Tensor:
    """Compute the outputs of a model: logits [n_rows, classes] or numbers [n_rows], float32, on the
    CPU, in the dataset's order. Several processes share the work, and all get all outputs. The model
    stays in its mode (training or evaluation)."""
    task = dataset.task
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    parts: list[tuple[np.ndarray, torch.Tensor]] = []
    n_rows = len(dataset.n_tokens)
    bar = progress_bar(total=n_rows, desc=f"{task.name}-{dataset.split}", unit="row", leave=False)
    with bar, autocast(device, precision):
        for batch in evaluation_batches(dataset, batch_size, rank(), n_processes()):
            rows = batch.rows[task.name]
            parts.append((rows, model(batch.to(device))[task.name].float()))
            bar.update(len(rows) * n_processes())
    model.train(was_training)
    in_order = torch.empty(n_rows, *([len(task.classes)] if task.classes else []))
    mine = [(rows, output.cpu()) for rows, output in parts]
    for rows, output in itertools.chain(*gather(mine)):
        in_order[rows] = output
    # With both orders of a pair, the second half has the exchanged ones.
    return combine(task, [*in_order.split(len(dataset))])


def evaluate(
    model: torch.nn.Module,
    datasets: Mapping[str, TaskDataset],
    batch_size: int,
    precision: str = "auto",
) -> dict[str, Evaluation]:
    """Predict every dataset (task -> dataset) and score those with labels."""
    return {
        name: Evaluation.of(dataset, outputs(model, dataset, batch_size, precision))
        for name, dataset in datasets.items()
    }


def average(task: Task, outputs: list[torch.Tensor]) -> torch.Tensor:
    """Average the outputs of several models for the same rows: probabilities of classes, whose logarithms
    are returned [n_rows, classes], or numbers on the label's scale [n_rows]."""
    if len(outputs) == 1:
        return outputs[0]
    if task.classes:
        return mean([output.softmax(dim=-1) for output in outputs]).log()
    return mean([task.decode(output) for output in outputs])


def write_predictions(path: str | Path, evaluation: Evaluation) -> None:
    """Write one tab-separated row for each example, in the dataset's order: id and predicted value."""
    task = evaluation.dataset.task
    values = evaluation.predictions
    with atomic_write(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as out:
        writer = csv.writer(out, delimiter="\t", lineterminator="\n")
        writer.writerow(("id", task.prediction_column))
        for id, value in zip(evaluation.dataset.ids, values.tolist(), strict=True):
            writer.writerow((id, task.show(value)))


def confusion_counts(evaluation: Evaluation) -> np.ndarray:
    """Count the labelled rows by true class and predicted class, [classes, classes]."""
    from sklearn.metrics import confusion_matrix

    labels = evaluation.dataset.labels
    labelled = ~np.isnan(labels)
    classes = list(range(len(evaluation.dataset.task.classes)))
    return confusion_matrix(labels[labelled], evaluation.predictions[labelled], labels=classes)


def confusion_figure(evaluation: Evaluation):
    """Draw the confusion matrix with matplotlib: rows are true classes, columns predicted ones."""
    from matplotlib.figure import Figure
    from sklearn.metrics import ConfusionMatrixDisplay

    figure = Figure(figsize=(5, 4.5), layout="constrained")
    classes = evaluation.dataset.task.classes
    shown = [name[:20] for name in classes] if len(classes) <= NAMED_CLASSES else None
    display = ConfusionMatrixDisplay(confusion_counts(evaluation), display_labels=shown)
    display.plot(
        ax=figure.subplots(),
        cmap="Blues",
        colorbar=False,
        include_values=len(classes) <= NAMED_CLASSES,
        xticks_rotation=30,
    )
    figure.suptitle(f"{evaluation.dataset.task.title}, {evaluation.dataset.split}")
    return figure


def format_scores(scores: dict[str, float]) -> str:
    """Return a text like `accuracy 0.463, macro_f1 0.441`."""
    return ", ".join(f"{name} {value:.3f}" for name, value in scores.items())


def show_results(
    results: Mapping[str, Mapping[str, Evaluation]],
    source: str,
    options: argparse.Namespace,
    train: Mapping[str, TaskDataset],
) -> tuple[Scores, Scores]:
    """Write predictions (split -> task -> evaluation) and print the dev scores. Return them, and for tasks
    with dev rows that are in the training file too the scores without these rows."""
    targets = [
        (getattr(options, f"{name}_{split}_out"), result)
        for split, of_split in results.items()
        for name, result in of_split.items()
    ]
    for path, result in targets if rank() == 0 else ():
        write_predictions(path, result)
    scores = {name: result.scores for name, result in results["dev"].items()}
    print(f"\n{'task':<12} {'dev metric':<11} value")
    for name, metrics in scores.items():
        for metric, value in metrics.items():
            print(f"{options.tasks[name].title:<12} {metric:<11} {value:.4f}")
    print(f"{'mean':<24} {mean_score(scores):.4f}\n")
    unseen: Scores = {}
    for name, dataset in train.items():
        if name in scores:
            known = rows_in_train(results["dev"][name].dataset.examples, dataset.examples)
            if metrics := unseen_scores(results["dev"][name], known):
                unseen[name] = metrics
                which = f"the {known.sum()} of {len(known)} dev rows that are in train"
                print(f"{name} without {which}: {format_scores(metrics)}")
    print(f"checkpoint: {source}")
    names = sorted({path for path, _ in targets})
    for folder, paths in itertools.groupby(names, os.path.dirname):
        print(f"predictions in {folder or '.'}: {', '.join(map(os.path.basename, paths))}")
    return scores, unseen


def unseen_scores(dev: Evaluation, known: np.ndarray) -> dict[str, float]:
    """Return the scores of a task without the rows that are in its training file [n_rows]; empty if there
    are no such rows, or no others."""
    labels = dev.dataset.labels[~known]
    if not known.any() or np.isnan(labels).all():
        return {}
    return score(dev.dataset.task, labels, dev.predictions[~known])
