"""Metrics, the evaluation pass and prediction files. Takes a model and datasets, made elsewhere."""

import argparse
import csv
import dataclasses
import itertools
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from batches import evaluation_batches
from datasets import TaskDataset
from tasks import TASKS, Task
from utils import atomic_write, autocast, gather, n_processes, rank


def accuracy(labels: np.ndarray, predictions: np.ndarray) -> float:
    from sklearn.metrics import accuracy_score

    return float(accuracy_score(labels, predictions))


def macro_f1(labels: np.ndarray, predictions: np.ndarray) -> float:
    """F1 of each class that occurs in labels or predictions, averaged."""
    from sklearn.metrics import f1_score

    return float(f1_score(labels, predictions, average="macro", zero_division=0))


def pearson(labels: np.ndarray, predictions: np.ndarray) -> float:
    """Pearson's correlation; 0 where one side is constant and it is undefined."""
    if np.ptp(labels) == 0 or np.ptp(predictions) == 0:
        return 0.0
    return float(np.corrcoef(labels, predictions)[0, 1])


METRICS = {"accuracy": accuracy, "macro_f1": macro_f1, "pearson": pearson}


def score(task: Task, labels: np.ndarray, predictions: np.ndarray) -> dict[str, float]:
    """The task's metrics by name; rows without a label (nan) do not count."""
    labelled = ~np.isnan(labels)
    return {
        name: METRICS[name](labels[labelled], predictions[labelled].astype(labels.dtype))
        for name in task.metrics
    }


def mean_score(scores: dict[str, dict[str, float]]) -> float:
    """What selects the model: the mean over tasks of each task's first metric."""
    return sum(next(iter(metrics.values())) for metrics in scores.values()) / len(scores)


@dataclasses.dataclass
class Evaluation:
    """A model's predictions for one dataset, in the dataset's order, and what they score."""

    dataset: TaskDataset
    predictions: np.ndarray  # [n_rows], on the label's scale
    scores: dict[str, float]  # empty for a dataset without labels


@torch.no_grad()
def outputs(
    model: torch.nn.Module, dataset: TaskDataset, batch_size: int, precision: str = "auto"
) -> torch.Tensor:
    """The model's answers, logits [n_rows, classes] or similarities [n_rows], float32, on the CPU, in
    the dataset's order; the processes of a data-parallel run share the work, and all get all. The
    model's training mode is left as found."""
    task = dataset.task
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    rows, answers = [], []
    progress = dict(total=len(dataset), desc=f"{task.name}-{dataset.split}", unit="row")
    with tqdm(**progress, leave=False) as bar, autocast(device, precision):
        for batch in evaluation_batches(dataset, batch_size, rank(), n_processes()):
            answers.append(model(batch.to(device))[task.name].float())
            rows.append(batch.rows[task.name])
            bar.update(len(rows[-1]) * n_processes())
    model.train(was_training)
    width = [task.num_classes] if task.num_classes else []
    in_order = torch.empty(len(dataset), *width)
    mine = [(each, answer.cpu()) for each, answer in zip(rows, answers)]
    for some, values in itertools.chain(*gather(mine)):
        in_order[some] = values
    return in_order


def predict(
    model: torch.nn.Module, dataset: TaskDataset, batch_size: int, precision: str = "auto"
) -> np.ndarray:
    """Predictions [n_rows] on the label's scale; see `outputs`."""
    answers = outputs(model, dataset, batch_size, precision)
    return dataset.task.decode(answers).double().numpy()


def evaluate(
    model: torch.nn.Module,
    datasets: dict[str, TaskDataset],
    batch_size: int,
    precision: str = "auto",
) -> dict[str, Evaluation]:
    """Predict every dataset (task name -> dataset) and score those with labels."""
    evaluations = {}
    for name, dataset in datasets.items():
        predictions = predict(model, dataset, batch_size, precision)
        labelled = not np.isnan(dataset.labels).all()
        scores = score(dataset.task, dataset.labels, predictions) if labelled else {}
        evaluations[name] = Evaluation(dataset, predictions, scores)
    return evaluations


def write_predictions(path: str | Path, evaluation: Evaluation) -> None:
    """Tab-separated `id` and predicted value, one row per example, in input order."""
    task = evaluation.dataset.task
    values = evaluation.predictions
    with atomic_write(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as out:
        writer = csv.writer(out, delimiter="\t", lineterminator="\n")
        writer.writerow(("id", task.prediction_column))
        for id, value in zip(evaluation.dataset.ids, values.tolist(), strict=True):
            writer.writerow((id, int(value) if task.num_classes else f"{value:.6f}"))


def confusion_counts(evaluation: Evaluation) -> np.ndarray:
    """[classes, classes] numbers of labelled rows: true classes by predicted ones."""
    from sklearn.metrics import confusion_matrix

    labels = evaluation.dataset.labels
    labelled = ~np.isnan(labels)
    classes = list(range(evaluation.dataset.task.num_classes))
    return confusion_matrix(labels[labelled], evaluation.predictions[labelled], labels=classes)


def confusion_figure(evaluation: Evaluation):
    """A matplotlib figure: rows are true classes, columns predicted ones, cells counts."""
    from matplotlib.figure import Figure
    from sklearn.metrics import ConfusionMatrixDisplay

    figure = Figure(figsize=(5, 4.5), layout="constrained")
    display = ConfusionMatrixDisplay(confusion_counts(evaluation))
    display.plot(ax=figure.subplots(), cmap="Blues", colorbar=False)
    figure.suptitle(f"{evaluation.dataset.task.title}, {evaluation.dataset.split}")
    return figure


def format_scores(scores: dict[str, float]) -> str:
    """`accuracy 0.463, macro_f1 0.441`"""
    return ", ".join(f"{name} {value:.3f}" for name, value in scores.items())


def evaluate_checkpoint(
    path: str | Path,
    model: torch.nn.Module,
    epoch: int,
    data: dict[str, dict[str, TaskDataset]],
    options: argparse.Namespace,
) -> dict[str, dict[str, float]]:
    """Write dev and test predictions of a checkpoint's model, print the table, return dev scores."""
    written, scores = [], {}
    for split in ("dev", "test"):
        batches = data[split], options.batch_size, options.precision
        for name, result in evaluate(model, *batches).items():
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
