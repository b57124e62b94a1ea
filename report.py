"""A page about a trained model: how well it does on the dev sets, where it errs, what it looks at.

    python report.py --checkpoint models/RUN.pt --data_dir data --output DIR

writes DIR/report.html, which needs nothing else, neither other files nor a network.
"""

import argparse
import base64
import dataclasses
import io
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from torch import Tensor

import evaluation
from batches import Batch, collate
from datasets import TaskDataset, load_data
from evaluation import Evaluation, confusion_counts, confusion_figure, mean_score
from multitask_classifier import MultitaskBERT, load_trained
from options import parse_options
from tasks import TASKS, Task
from tokenizer import BertTokenizer
from utils import (
    ROOT,
    UserError,
    atomic_write,
    autocast,
    check_writable,
    exit_status,
    pick_device,
    positive_int,
    terminate,
)

TEMPLATE = "report.html.j2"
SETTINGS = ("bert_model", "option", "optimizer", "epochs", "para_encoding", "sts_encoding", "moe")
CALIBRATION_BINS = 15  # as in Guo et al. 2017, arXiv 1706.04599
LENGTH_BINS = 5
N_MISTAKES, N_EXAMPLES = 15, 5  # that are shown of each task
RESAMPLED_ROWS = 2**20  # drawn at a time

# ------------------------------------------------------------------------------------------ scores


@dataclasses.dataclass
class Result:
    """A model's answers on the labelled rows of one dataset."""

    evaluation: Evaluation  # on all rows
    rows: np.ndarray  # [n] the labelled rows' numbers in the dataset
    labels: np.ndarray  # [n]
    predictions: np.ndarray  # [n], on the label's scale
    probabilities: np.ndarray | None  # [n, classes]; None for similarities

    @classmethod
    def of(cls, dataset: TaskDataset, outputs: torch.Tensor) -> "Result":
        """From what `evaluation.outputs` returns; UserError if a value is infinite or undefined."""
        if not outputs.isfinite().all():
            raise UserError(f"{dataset.path}: the model's answers are not finite numbers")
        task, rows = dataset.task, np.flatnonzero(~np.isnan(dataset.labels))
        predictions = task.decode(outputs).double().numpy()
        scores = evaluation.score(task, dataset.labels, predictions)
        probabilities = outputs[rows].double().softmax(dim=-1).numpy() if task.classes else None
        whole = Evaluation(dataset, predictions, scores)
        return cls(whole, rows, dataset.labels[rows], predictions[rows], probabilities)

    @property
    def dataset(self) -> TaskDataset:
        return self.evaluation.dataset

    @property
    def task(self) -> Task:
        return self.dataset.task

    @property
    def certainty(self) -> np.ndarray:
        """[n] The probability of the predicted class; the distance of a similarity from its label."""
        if self.probabilities is None:
            return np.abs(self.predictions - self.labels)
        return self.probabilities.max(axis=1)


# A metric of many resamples at once: labels and predictions [..., n_rows] to [...].


def accuracies(labels: np.ndarray, predictions: np.ndarray) -> np.ndarray:
    return (labels == predictions).mean(axis=-1)


def macro_f1s(labels: np.ndarray, predictions: np.ndarray) -> np.ndarray:
    f1 = n_classes = 0.0
    for each in range(int(max(labels.max(), predictions.max())) + 1):
        true, predicted = labels == each, predictions == each
        size = true.sum(axis=-1) + predicted.sum(axis=-1)
        f1 = f1 + 2 * (true & predicted).sum(axis=-1) / np.maximum(size, 1)
        n_classes = n_classes + (size > 0)  # a resample may lack a class
    return f1 / n_classes


def pearsons(labels: np.ndarray, predictions: np.ndarray) -> np.ndarray:
    constant = (np.ptp(labels, axis=-1) == 0) | (np.ptp(predictions, axis=-1) == 0)
    x = labels - labels.mean(axis=-1, keepdims=True)
    y = predictions - predictions.mean(axis=-1, keepdims=True)
    spread = np.sqrt((x**2).sum(axis=-1) * (y**2).sum(axis=-1))
    return np.where(constant, 0.0, (x * y).sum(axis=-1) / np.where(constant, 1.0, spread))


RESAMPLED = {"accuracy": accuracies, "macro_f1": macro_f1s, "pearson": pearsons}


def resample(
    task: Task, labels: np.ndarray, predictions: np.ndarray, n_resamples: int, seed: int
) -> dict[str, np.ndarray]:
    """Each metric of the task [n_resamples] on as many resamples of the rows (labels and predictions
    [n_rows]), drawn with replacement."""
    generator = np.random.default_rng([seed, list(TASKS).index(task.name)])
    at_a_time = max(1, RESAMPLED_ROWS // len(labels))
    parts = []
    for start in range(0, n_resamples, at_a_time):
        size = min(at_a_time, n_resamples - start), len(labels)
        rows = generator.integers(len(labels), size=size)
        drawn = labels[rows], predictions[rows]
        parts.append([RESAMPLED[metric](*drawn) for metric in task.metrics])
    return dict(zip(task.metrics, np.concatenate(parts, axis=1)))


class Score(NamedTuple):
    """A metric, and the ends of its 95% interval."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, value: float, resampled: np.ndarray) -> "Score":
        """With the bootstrap's percentile interval (Efron 1979)."""
        return cls(value, *np.quantile(resampled, (0.025, 0.975)).tolist())


class ScoreRow(NamedTuple):
    """A line of a table of metrics."""

    what: str
    n_rows: int
    scores: dict[str, Score]


def score_table(results: dict[str, Result], n_resamples: int, seed: int) -> list[ScoreRow]:
    """A line for each task, and one for the mean over tasks, which selects the model."""
    table, main = [], []
    for result in results.values():
        resampled = resample(result.task, result.labels, result.predictions, n_resamples, seed)
        scores = {
            name: Score.of(value, resampled[name])
            for name, value in result.evaluation.scores.items()
        }
        table.append(ScoreRow(result.task.title, len(result.rows), scores))
        main.append(resampled[result.task.metrics[0]])
    if len(table) > 1:
        value = mean_score({name: each.evaluation.scores for name, each in results.items()})
        mean = {"first metrics": Score.of(value, np.mean(main, axis=0))}
        table.append(ScoreRow("mean", sum(row.n_rows for row in table), mean))
    return table


# -------------------------------------------------------------------------------- where it errs


class Calibration(NamedTuple):
    """Rows in bins of equal width by confidence, the probability of the predicted class; empty bins
    are left out."""

    n_rows: np.ndarray  # [bins]
    confidence: np.ndarray  # [bins] mean
    accuracy: np.ndarray  # [bins]

    @classmethod
    def of(cls, result: Result) -> "Calibration":
        right = result.labels == result.predictions
        bins = np.ceil(result.certainty * CALIBRATION_BINS).astype(int)
        n_rows = np.bincount(bins)
        filled = n_rows > 0
        sums = [np.bincount(bins, weights)[filled] for weights in (result.certainty, right)]
        return cls(n_rows[filled], *(each / n_rows[filled] for each in sums))

    @property
    def error(self) -> float:
        """The expected calibration error (Guo et al. 2017, equation 3)."""
        gaps = np.abs(self.accuracy - self.confidence)
        return float((self.n_rows * gaps).sum() / self.n_rows.sum())


def lengths(dataset: TaskDataset) -> np.ndarray:
    """[n_rows] word pieces of all sentences of a row, without special tokens."""
    apart = [each.lengths - 2 for each in dataset.columns if each.first_lengths is None]
    return sum(apart) if apart else dataset.columns[0].lengths - 3


def scores_by_length(result: Result, n_resamples: int, seed: int) -> list[ScoreRow]:
    """A line for each of `LENGTH_BINS` ranges of about as many rows; fewer if many rows have the
    same length."""
    length = lengths(result.dataset)[result.rows]
    shares = np.arange(1, LENGTH_BINS + 1) / LENGTH_BINS
    ends = np.unique(np.quantile(length, shares, method="inverted_cdf"))
    bins, table = np.searchsorted(ends, length), []
    for number in range(len(ends)):
        mine = bins == number
        pair = result.labels[mine], result.predictions[mine]
        resampled = resample(result.task, *pair, n_resamples, seed)
        values = evaluation.score(result.task, *pair)
        scores = {name: Score.of(value, resampled[name]) for name, value in values.items()}
        low, high = length[mine].min(), length[mine].max()
        what = f"{low}" if low == high else f"{low} to {high}"
        table.append(ScoreRow(what, int(mine.sum()), scores))
    return table


class ShownRow(NamedTuple):
    """A row of a dataset, for people to read."""

    id: str
    sentences: tuple[str, ...]
    label: float
    prediction: float
    certainty: float


def show(result: Result, place: int) -> ShownRow:
    example = result.dataset.examples[result.rows[place]]
    values = result.predictions[place], result.certainty[place]
    return ShownRow(example.id, example.sentences, example.label, *map(float, values))


def worst_mistakes(result: Result) -> list[ShownRow]:
    """Wrong classes, those of which the model is surest first; of similarities those farthest off."""
    wrong = np.flatnonzero(result.predictions != result.labels)
    order = np.argsort(-result.certainty[wrong], kind="stable")[:N_MISTAKES]
    return [show(result, place) for place in wrong[order]]


# ------------------------------------------------------------------------------ what it looks at


class Piece(NamedTuple):
    text: str
    weight: float  # in its sequence's vector
    shade: float  # the weight as a share of the sequence's largest


def token_weights(model: MultitaskBERT, batch: Batch) -> list[Tensor]:
    """Return the weights of the tokens in the vector of each sequence: [n_tokens] for each, in the order
    of the batch's columns."""
    tokens = batch.tokens()
    _, weights = model.attention_layer.weigh(model.bert.encode(tokens), tokens.sequences)
    by_length = weights.split(batch.lengths)
    return [by_length[place] for place in batch.places.tolist()]


@torch.no_grad()
def attention(
    model: MultitaskBERT, tokenizer: BertTokenizer, result: Result, precision: str
) -> list[tuple[ShownRow, list[list[Piece]]]]:
    """The first rows, each with the word pieces of its sequences and how much they count."""
    rows, columns = result.rows[:N_EXAMPLES], result.dataset.columns
    device = next(model.parameters()).device
    batch = collate({result.task.name: (result.dataset, rows)}).to(device)
    with autocast(device, precision):
        weights = iter(token_weights(model.eval(), batch))
    examples = [(show(result, place), []) for place in range(len(rows))]
    for column in columns:
        for row, (_, sequences) in zip(rows, examples):
            pieces = tokenizer.pieces_of(column.row(row)[0])
            shares = next(weights).float().cpu().numpy()
            sequences.append(list(map(Piece, pieces, shares, shares / shares.max())))
    return examples


# ---------------------------------------------------------------------------------------- pictures

INK = "#010203"  # where the SVG has it, the reader's own colour of text is meant
INKED = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
OWN_COLOURS = (
    "<style>:root{color:#1c1c1c}@media(prefers-color-scheme:dark){:root{color:#e4e4e4}}</style>"
)
DOTS = "tab:blue"


def picture(draw: Callable, *arguments) -> str:
    """The figure that `draw` returns, as the data URI of an SVG that suits light and dark pages."""
    import matplotlib

    style = dict.fromkeys(INKED, INK) | {"svg.fonttype": "none", "svg.hashsalt": TEMPLATE}
    buffer = io.StringIO()
    with matplotlib.rc_context(style):
        draw(*arguments).savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = (
        buffer.getvalue().replace(INK, "currentColor").replace("<defs>", f"{OWN_COLOURS}<defs>", 1)
    )
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()


def reliability_figure(calibration: Calibration):
    """Accuracy against confidence, and below it how many rows have that confidence."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 4.5), layout="constrained")
    above, below = figure.subplots(2, sharex=True, height_ratios=(3, 1))
    above.plot((0, 1), (0, 1), "--", color=INK, linewidth=1, label="as sure as right")
    above.plot(calibration.confidence, calibration.accuracy, "o-", color=DOTS, label="this model")
    above.set(ylabel="accuracy", ylim=(-0.03, 1.03))
    above.legend(frameon=False)
    below.bar(calibration.confidence, calibration.n_rows, 0.6 / CALIBRATION_BINS, color=DOTS)
    below.set(xlabel="probability of the predicted class", ylabel="rows", xlim=(0, 1.03))
    return figure


def similarity_figure(result: Result):
    """Predicted against true similarities."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 4.5), layout="constrained", dpi=150)
    axes = figure.subplots()
    ends = result.task.range
    axes.plot(ends, ends, "--", color=INK, linewidth=1)
    axes.scatter(
        result.labels, result.predictions, 12, color=DOTS, alpha=0.5, linewidths=0, rasterized=True
    )
    axes.set(xlabel="true similarity", ylabel="predicted similarity", aspect="equal")
    return figure


# -------------------------------------------------------------------------------------------- page


def section(result: Result, attended: list, n_resamples: int, seed: int) -> dict:
    """What the template shows of one task."""
    task = result.task
    content = dict(
        task=task,
        scale=task.scale,
        by_length=scores_by_length(result, n_resamples, seed),
        n_wrong=int((result.labels != result.predictions).sum()),
        mistakes=worst_mistakes(result),
        attended=attended,
    )
    if task.classes:
        calibration = Calibration.of(result)
        return content | dict(
            counts=confusion_counts(result.evaluation).tolist(),
            confusion=picture(confusion_figure, result.evaluation),
            calibration=calibration,
            bins=list(zip(*calibration)),
            reliability=picture(reliability_figure, calibration),
        )
    return content | dict(scatter=picture(similarity_figure, result))


def facts(options: argparse.Namespace, checkpoint: dict, results: dict[str, Result]) -> dict:
    """What the report is about: name -> value."""
    tags, versions = checkpoint.get("tags"), checkpoint.get("versions", {})
    known = {"checkpoint": options.evaluate, "epoch": checkpoint["epoch"]}
    known |= {key: checkpoint["options"].get(key) for key in SETTINGS}
    known |= {"tags": tags and f"{tags['name']} {tags['version']}"}
    known |= {f"{each.task.title}, dev": each.dataset.path for each in results.values()}
    known |= {"commit": versions.get("commit")}
    return {key: value for key, value in known.items() if value is not None}


def write_report(path: Path, n_resamples: int, options: argparse.Namespace) -> None:
    """The page about the checkpoint `options.evaluate`, with intervals from `n_resamples` resamples."""
    device = pick_device(options.use_gpu)
    check_writable(path)
    model, tokenizer, tagger, checkpoint, options = load_trained(options)
    model.to(device)
    length = options.max_length
    data = load_data(options, tokenizer, length, ("dev",), tagger, model.encodings)["dev"]
    results, sections = {}, []
    for name, dataset in data.items():
        outputs = evaluation.outputs(model, dataset, options.batch_size, options.precision)
        results[name] = Result.of(dataset, outputs)
    for result in results.values():
        attended = attention(model, tokenizer, result, options.precision)
        sections.append(section(result, attended, n_resamples, options.seed))
    environment = Environment(
        loader=FileSystemLoader(ROOT),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    text = environment.get_template(TEMPLATE).render(
        title=Path(options.evaluate).stem,
        facts=facts(options, checkpoint, results),
        scores=score_table(results, n_resamples, options.seed),
        sections=sections,
        n_resamples=n_resamples,
        seed=options.seed,
    )
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(f"report: {path}")


# -------------------------------------------------------------------------------------------- main


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, argparse.Namespace]:
    """The options of the report, and those of an evaluation."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        allow_abbrev=False,
        epilog="All other flags are those of multitask_classifier.py --evaluate, such as --data_dir, "
        "--sst_dev, --sst, --batch_size, --precision, --use_gpu, --spacy_model, --seed.",
    )
    flag = parser.add_argument
    flag("--checkpoint", required=True, metavar="CHECKPOINT", help="a models/RUN.pt")
    flag("--output", required=True, metavar="DIR", help="folder for report.html")
    flag(
        "--resamples",
        type=positive_int,
        default=1000,
        metavar="N",
        help="of the rows, from which the intervals come; default: 1000",
    )
    own, others = parser.parse_known_args(argv)
    return own, parse_options([*others, "--evaluate", own.checkpoint])


def main(argv: list[str] | None = None) -> int:
    own, options = parse(argv)
    path = Path(own.output) / "report.html"
    return exit_status(
        lambda: write_report(path, own.resamples, options),
        "lower --batch_size",
        "nothing was written",
    )


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, terminate)
    sys.exit(main())
