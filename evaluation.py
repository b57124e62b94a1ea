"""Metrics, the evaluation pass and prediction files. The model and the datasets are made elsewhere."""

import argparse
import csv
import dataclasses
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from batches import evaluation_batches
from datasets import TaskDataset
from tasks import TASKS, Task
from utils import atomic_write, autocast, gather, n_processes, rank

Scores = dict[str, dict[str, float]]  # task -> metric -> value


def accuracy(labels: np.ndarray, predictions: np.ndarray) -> float:
    from sklearn.metrics import accuracy_score

    return float(accuracy_score(labels, predictions))


def macro_f1(labels: np.ndarray, predictions: np.ndarray) -> float:
    """Average the F1 of the classes that occur in labels or predictions."""
    from sklearn.metrics import f1_score

    return float(f1_score(labels, predictions, average="macro", zero_division=0))


def pearson(labels: np.ndarray, predictions: np.ndarray) -> float:
    """Return Pearson's correlation; 0 if one side is constant, where it is undefined."""
    if np.ptp(labels) == 0 or np.ptp(predictions) == 0:
        return 0.0
    return float(np.corrcoef(labels, predictions)[0, 1])


METRICS = {"accuracy": accuracy, "macro_f1": macro_f1, "pearson": pearson}


def score(task: Task, labels: np.ndarray, predictions: np.ndarray) -> dict[str, float]:
    """Return the metrics of a task by name. Rows without a label (nan) do not count."""
    labelled = ~np.isnan(labels)
    return {
        name: METRICS[name](labels[labelled], predictions[labelled].astype(labels.dtype))
        for name in task.metrics
    }


def mean_score(scores: dict[str, dict[str, float]]) -> float:
    """Return the score that selects the model: the mean over tasks of their first metrics."""
    return sum(next(iter(metrics.values())) for metrics in scores.values()) / len(scores)


@dataclasses.dataclass
class Evaluation:
    """The predictions of a model for one dataset, in the dataset's order, and their scores."""

    dataset: TaskDataset
    predictions: np.ndarray  # [n_rows], on the label's scale
    scores: dict[str, float]  # empty for a dataset without labels


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
    progress: dict[str, Any] = dict(
        total=len(dataset), desc=f"{task.name}-{dataset.split}", unit="row"
    )
    with tqdm(**progress, leave=False) as bar, autocast(device, precision):
        for batch in evaluation_batches(dataset, batch_size, rank(), n_processes()):
            rows = batch.rows[task.name]
            parts.append((rows, model(batch.to(device))[task.name].float()))
            bar.update(len(rows) * n_processes())
    model.train(was_training)
    in_order = torch.empty(len(dataset), *([len(task.classes)] if task.classes else []))
    mine = [(rows, output.cpu()) for rows, output in parts]
    for rows, output in itertools.chain(*gather(mine)):
        in_order[rows] = output
    return in_order


def predict(
    model: torch.nn.Module, dataset: TaskDataset, batch_size: int, precision: str = "auto"
) -> np.ndarray:
    """Return predictions [n_rows] on the label's scale; see `outputs`."""
    in_order = outputs(model, dataset, batch_size, precision)
    return dataset.task.decode(in_order).double().numpy()


def evaluate(
    model: torch.nn.Module,
    datasets: Mapping[str, TaskDataset],
    batch_size: int,
    precision: str = "auto",
) -> dict[str, Evaluation]:
    """Predict every dataset (task -> dataset) and score those with labels."""
    evaluations = {}
    for name, dataset in datasets.items():
        predictions = predict(model, dataset, batch_size, precision)
        labelled = not np.isnan(dataset.labels).all()
        scores = score(dataset.task, dataset.labels, predictions) if labelled else {}
        evaluations[name] = Evaluation(dataset, predictions, scores)
    return evaluations


def write_predictions(path: str | Path, evaluation: Evaluation) -> None:
    """Write one tab-separated row for each example, in the dataset's order: id and predicted value."""
    task = evaluation.dataset.task
    values = evaluation.predictions
    with atomic_write(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as out:
        writer = csv.writer(out, delimiter="\t", lineterminator="\n")
        writer.writerow(("id", task.prediction_column))
        for id, value in zip(evaluation.dataset.ids, values.tolist(), strict=True):
            writer.writerow((id, int(value) if task.classes else f"{value:.6f}"))


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
    display = ConfusionMatrixDisplay(confusion_counts(evaluation))
    display.plot(ax=figure.subplots(), cmap="Blues", colorbar=False)
    figure.suptitle(f"{evaluation.dataset.task.title}, {evaluation.dataset.split}")
    return figure


def format_scores(scores: dict[str, float]) -> str:
    """Return a text like `accuracy 0.463, macro_f1 0.441`."""
    return ", ".join(f"{name} {value:.3f}" for name, value in scores.items())


def evaluate_checkpoint(
    path: str | Path,
    model: torch.nn.Module,
    epoch: int,
    data: Mapping[str, Mapping[str, TaskDataset]],
    options: argparse.Namespace,
) -> Scores:
    """Write the dev and test predictions of a checkpoint's model, print its dev scores and return them."""
    written, scores = [], {}
    for split in ("dev", "test"):
        results = evaluate(model, data[split], options.batch_size, options.precision)
        for name, result in results.items():
            target = getattr(options, f"{name}_{split}_out")
            if rank() == 0:
                write_predictions(target, result)
            written.append(target)
            if split == "dev":
                scores[name] = result.scores
    print(f"\n{'task':<12}{'dev metric':<12}value")
    for name, metrics in scores.items():
        for metric, value in metrics.items():
            print(f"{TASKS[name].title:<12}{metric:<12}{value:.4f}")
    print(f"{'mean':<24}{mean_score(scores):.4f}\n")
    print(f"checkpoint: {path} (epoch {epoch})")
    print(f"predictions: {', '.join(written)}")
    return scores
