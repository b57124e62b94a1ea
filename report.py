"""A page about a trained model: how well it does on the dev sets, where it errs, what it looks at.

    python report.py --checkpoint models/RUN.pt --data_dir data --output DIR

The page is DIR/report.html. It needs no other files and no network.
"""

import argparse
import base64
import dataclasses
import io
import signal
import sys
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from torch import Tensor

import evaluation
from batches import Batch, collate
from checkpoint import find_files, options_of
from datasets import TaskDataset
from evaluation import Evaluation, confusion_counts, confusion_figure
from multitask_classifier import MultitaskBERT, Trained, load_trained, outputs_of_models
from streams import Parser
from tasks import Task
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
SETTINGS = (
    "config bert_model option optimizer lr batch_size epochs samples_per_epoch seed moe".split()
)
CALIBRATION_BINS = 15  # as in Guo et al. 2017, arXiv 1706.04599
LENGTH_BINS = 5
# Rows that are shown for each task.
N_MISTAKES, N_EXAMPLES = 15, 5
RESAMPLED_ROWS = 2**20  # drawn at a time

# ------------------------------------------------------------------------------------------ scores


@dataclasses.dataclass
class Result:
    """A model's answers on the labelled rows of one dataset."""

    evaluation: Evaluation  # on all rows
    rows: np.ndarray  # [n] numbers of the labelled rows in the dataset
    labels: np.ndarray  # [n]
    predictions: np.ndarray  # [n], on the label's scale
    probabilities: np.ndarray | None  # [n, classes]; None for numbers

    @classmethod
    def of(cls, dataset: TaskDataset, outputs: Tensor) -> "Result":
        """Read the model's outputs [n_rows, ...]. Raises UserError if one is not a finite number."""
        if not outputs.isfinite().all():
            raise UserError(f"{dataset.paths[0]}: the model's answers are not finite numbers")
        task, rows = dataset.task, np.flatnonzero(~np.isnan(dataset.labels))
        whole = Evaluation.of(dataset, outputs)
        probabilities = outputs[rows].double().softmax(dim=-1).numpy() if task.classes else None
        return cls(whole, rows, dataset.labels[rows], whole.predictions[rows], probabilities)

    @property
    def dataset(self) -> TaskDataset:
        return self.evaluation.dataset

    @property
    def task(self) -> Task:
        return self.dataset.task

    @property
    def certainty(self) -> np.ndarray:
        """[n] The probability of the predicted class, or the distance of a number from its label."""
        if self.probabilities is None:
            return np.abs(self.predictions - self.labels)
        return self.probabilities.max(axis=1)


def resample(
    task: Task, labels: np.ndarray, predictions: np.ndarray, n_resamples: int, seed: int
) -> dict[str, np.ndarray]:
    """Draw resamples of the rows with replacement. Return the metrics of the task on each of them:
    labels and predictions [n_rows] to name -> [n_resamples]."""
    generator = np.random.default_rng([seed, zlib.crc32(task.name.encode())])
    at_a_time = max(1, RESAMPLED_ROWS // len(labels))
    metrics = []
    for start in range(0, n_resamples, at_a_time):
        size = min(at_a_time, n_resamples - start), len(labels)
        rows = generator.integers(len(labels), size=size)
        resamples = labels[rows], predictions[rows]
        metrics.append([evaluation.METRICS[name](*resamples) for name in task.metrics])
    return dict(zip(task.metrics, np.concatenate(metrics, axis=1), strict=True))


class Score(NamedTuple):
    """The value of a metric, and the ends of its 95% interval."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, value: float, resampled: np.ndarray) -> "Score":
        """Take the percentile interval of the bootstrap (Efron 1979)."""
        return cls(value, *np.quantile(resampled, (0.025, 0.975)).tolist())


class Measured(NamedTuple):
    """Metrics on all rows and on resamples of them."""

    values: dict[str, float]
    resampled: dict[str, np.ndarray]  # metric -> [n_resamples]

    @classmethod
    def of(cls, result: Result, n_resamples: int, seed: int) -> "Measured":
        """Measure a model on a task. The rows of the resamples depend on the seed and the task alone."""
        pair = result.labels, result.predictions
        return cls(result.evaluation.scores, resample(result.task, *pair, n_resamples, seed))

    @classmethod
    def mean(cls, parts: Sequence["Measured"]) -> "Measured":
        """Average the first metrics of the tasks."""
        value = np.mean([next(iter(part.values.values())) for part in parts])
        resampled = np.mean([next(iter(part.resampled.values())) for part in parts], axis=0)
        return cls({"first metrics": float(value)}, {"first metrics": resampled})

    def minus(self, other: "Measured") -> "Measured":
        """Subtract the metrics of another model, resample by resample."""
        return Measured(
            {name: value - other.values[name] for name, value in self.values.items()},
            {name: values - other.resampled[name] for name, values in self.resampled.items()},
        )

    def scores(self) -> dict[str, Score]:
        return {name: Score.of(value, self.resampled[name]) for name, value in self.values.items()}


class ScoreRow(NamedTuple):
    """A line of a table of metrics."""

    title: str
    n_rows: int
    scores: dict[str, Score]  # metric -> score
    constant: dict[str, float] = {}  # of the best answer that is the same for all rows
    others: dict[str, Score] = {}  # of the model that this one is compared with
    differences: dict[str, Score] = {}


def constant_scores(result: Result) -> dict[str, float]:
    """Score the answer that is always the most frequent class, or always the mean of the labels."""
    values, counts = np.unique(result.labels, return_counts=True)
    answer = values[counts.argmax()] if result.task.classes else result.labels.mean()
    return evaluation.score(result.task, result.labels, np.full_like(result.labels, answer))


def score_table(
    results: dict[str, Result], others: dict[str, Result], n_resamples: int, seed: int
) -> list[ScoreRow]:
    """Return a line for each task, and a line for the mean over tasks, which selects the model."""
    own = {name: Measured.of(result, n_resamples, seed) for name, result in results.items()}
    theirs = {name: Measured.of(result, n_resamples, seed) for name, result in others.items()}
    table = []
    for name, result in results.items():
        row = ScoreRow(
            result.task.title, len(result.rows), own[name].scores(), constant_scores(result)
        )
        table.append(compared(row, own[name], theirs.get(name)))
    if len(table) > 1:
        mean = Measured.mean([*own.values()])
        row = ScoreRow("mean", sum(row.n_rows for row in table), mean.scores())
        all_known = own.keys() == theirs.keys()
        table.append(compared(row, mean, Measured.mean([*theirs.values()]) if all_known else None))
    return table


def compared(row: ScoreRow, own: Measured, other: Measured | None) -> ScoreRow:
    """Add the scores of the other model, and the difference, to a line."""
    if other is None:
        return row
    return row._replace(others=other.scores(), differences=own.minus(other).scores())


# -------------------------------------------------------------------------------- where it errs


class Calibration(NamedTuple):
    """Rows in bins of equal width by confidence, the probability of the predicted class. Empty bins are
    left out."""

    n_rows: np.ndarray  # [bins]
    confidence: np.ndarray  # [bins] mean
    accuracy: np.ndarray  # [bins]

    @classmethod
    def of(cls, result: Result) -> "Calibration":
        bins = np.ceil(result.certainty * CALIBRATION_BINS).astype(int)
        n_rows = np.bincount(bins)
        filled = n_rows > 0
        confidence, accuracy = (
            np.bincount(bins, values)[filled] / n_rows[filled]
            for values in (result.certainty, result.labels == result.predictions)
        )
        return cls(n_rows[filled], confidence, accuracy)

    @property
    def error(self) -> float:
        """The expected calibration error (Guo et al. 2017, equation 3)."""
        gaps = np.abs(self.accuracy - self.confidence)
        return float((self.n_rows * gaps).sum() / self.n_rows.sum())


def count_word_pieces(dataset: TaskDataset) -> np.ndarray:
    """Return the number of word pieces of each row [n_rows], special tokens not counted."""
    separate = [column.lengths - 2 for column in dataset.columns if column.first_lengths is None]
    return np.sum(separate, axis=0) if separate else dataset.columns[0].lengths - 3


def scores_by_length(result: Result, n_resamples: int, seed: int) -> list[ScoreRow]:
    """Return a line for each of `LENGTH_BINS` ranges of about as many rows. There are fewer if many rows
    have the same length."""
    lengths = count_word_pieces(result.dataset)[result.rows]
    shares = np.arange(1, LENGTH_BINS + 1) / LENGTH_BINS
    ends = np.unique(np.quantile(lengths, shares, method="inverted_cdf"))
    bins, table = np.searchsorted(ends, lengths), []
    for number in range(len(ends)):
        inside = bins == number
        pair = result.labels[inside], result.predictions[inside]
        values = evaluation.score(result.task, *pair)
        scores = Measured(values, resample(result.task, *pair, n_resamples, seed)).scores()
        low, high = lengths[inside].min(), lengths[inside].max()
        title = f"{low}" if low == high else f"{low} to {high}"
        table.append(ScoreRow(title, int(inside.sum()), scores))
    return table


class ShownRow(NamedTuple):
    """A row of a dataset, for people to read."""

    id: str
    sentences: tuple[str, ...]
    label: float
    prediction: float
    certainty: float

    @classmethod
    def of(cls, result: Result, index: int) -> "ShownRow":
        """Read the labelled row with this number."""
        example = result.dataset.examples[result.rows[index]]
        prediction, certainty = float(result.predictions[index]), float(result.certainty[index])
        return cls(example.id, example.sentences, example.label, prediction, certainty)


def worst_mistakes(result: Result) -> list[ShownRow]:
    """Return rows with a wrong answer: the most certain wrong classes, or the numbers that are
    farthest from their labels."""
    wrong = np.flatnonzero(result.predictions != result.labels)
    order = np.argsort(-result.certainty[wrong], kind="stable")[:N_MISTAKES]
    return [ShownRow.of(result, index) for index in wrong[order].tolist()]


# ------------------------------------------------------------------------------ what it looks at


class Piece(NamedTuple):
    """A word piece, and how much it counts."""

    text: str
    weight: float  # in its sequence's vector


class WeighedRow(NamedTuple):
    """A row with the word pieces of its sequences."""

    row: ShownRow
    sequences: list[list[Piece]]


def token_weights(model: MultitaskBERT, batch: Batch) -> list[Tensor]:
    """Return the weights of the tokens in the vector of each sequence: [n_tokens] for each, in the order
    of the batch's columns."""
    tokens = batch.tokens()
    _, weights = model.attention_layer.weigh(model.bert.encode(tokens), tokens.sequences)
    by_length = weights.split(batch.lengths)
    return [by_length[place] for place in batch.places.tolist()]


@torch.no_grad()
def weigh_examples(
    model: MultitaskBERT, tokenizer: BertTokenizer, result: Result, precision: str
) -> list[WeighedRow]:
    """Return the first rows with the weights of their word pieces."""
    name, dataset, rows = result.task.name, result.dataset, result.rows[:N_EXAMPLES]
    device = next(model.parameters()).device
    batch = collate({name: (dataset, rows)}).to(device)
    with autocast(device, precision):
        weights = token_weights(model.eval(), batch)
    examples = [WeighedRow(ShownRow.of(result, index), []) for index in range(len(rows))]
    for column, places in zip(dataset.columns, batch.columns[name], strict=True):
        for example, row, tensor in zip(examples, rows, weights[places], strict=True):
            pieces = tokenizer.pieces_of(column.row(row)[0])
            pairs = zip(pieces, tensor.float().tolist(), strict=True)
            example.sequences.append([Piece(*pair) for pair in pairs])
    return examples


# ---------------------------------------------------------------------------------------- pictures

INK = "#010203"  # in the SVG, it stands for the reader's own colour of text
INKED = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
OWN_COLOURS = (
    "<style>:root{color:#1c1c1c}@media(prefers-color-scheme:dark){:root{color:#e4e4e4}}</style>"
)
DOTS = "tab:blue"


def embed_figure(draw: Callable[..., Any], *arguments) -> str:
    """Return the figure that `draw` makes as the data URI of an SVG that suits light and dark pages."""
    import matplotlib

    style: dict[Any, Any] = dict.fromkeys(INKED, INK)
    style |= {"svg.fonttype": "none", "svg.hashsalt": TEMPLATE}
    buffer = io.StringIO()
    with matplotlib.rc_context(style):
        draw(*arguments).savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue().replace(INK, "currentColor")
    svg = svg.replace("<defs>", f"{OWN_COLOURS}<defs>", 1)
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()


def reliability_figure(calibration: Calibration):
    """Draw accuracy against confidence, and below it how many rows have that confidence."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 4.5), layout="constrained")
    above, below = figure.subplots(2, sharex=True, height_ratios=(3, 1))
    above.plot((0, 1), (0, 1), "--", color=INK, linewidth=1, label="perfect calibration")
    above.plot(calibration.confidence, calibration.accuracy, "o-", color=DOTS, label="this model")
    above.set(ylabel="accuracy", ylim=(-0.03, 1.03))
    above.legend(frameon=False)
    below.bar(calibration.confidence, calibration.n_rows, 0.6 / CALIBRATION_BINS, color=DOTS)
    below.set(xlabel="probability of the predicted class", ylabel="rows", xlim=(0, 1.03))
    return figure


def number_figure(result: Result):
    """Draw predicted against true numbers."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 4.5), layout="constrained", dpi=150)
    axes = figure.subplots()
    ends = result.task.range
    axes.plot(ends, ends, "--", color=INK, linewidth=1)
    axes.scatter(
        result.labels, result.predictions, 12, color=DOTS, alpha=0.5, linewidths=0, rasterized=True
    )
    axes.set(xlabel="true label", ylabel="predicted label", aspect="equal")
    return figure


# -------------------------------------------------------------------------------------------- page


def describe_task(
    result: Result, examples: list[WeighedRow], n_resamples: int, seed: int
) -> dict[str, Any]:
    """Return what the template shows about a task."""
    content = dict(
        task=result.task,
        by_length=scores_by_length(result, n_resamples, seed),
        n_wrong=int((result.labels != result.predictions).sum()),
        mistakes=worst_mistakes(result),
        examples=examples,
    )
    if not result.task.classes:
        return content | dict(scatter=embed_figure(number_figure, result))
    calibration = Calibration.of(result)
    return content | dict(
        counts=confusion_counts(result.evaluation).tolist(),
        confusion=embed_figure(confusion_figure, result.evaluation),
        calibration=calibration,
        bins=list(zip(*calibration, strict=True)),
        reliability=embed_figure(reliability_figure, calibration),
    )


def describe_model(members: Sequence[Trained], results: dict[str, Result]) -> dict[str, Any]:
    """Return what the top of the page says about the model, of several about the first: name -> value."""
    trained = members[0]
    content, tags = trained.content, trained.content.get("tags")
    known = {
        "checkpoint": ", ".join(trained.options.evaluate),
        "epoch": content["epoch"],
        **{name: content["options"].get(name) for name in SETTINGS},
        "tags": f"{tags['name']} {tags['version']}" if tags else None,
        **{
            f"{name}_encoding": result.task.encoding
            for name, result in results.items()
            if result.task.is_pair
        },
        **{
            f"{result.task.title}, dev": ", ".join(map(str, result.dataset.paths))
            for result in results.values()
        },
        "commit": content.get("versions", {}).get("commit"),
    }
    return {name: value for name, value in known.items() if value is not None}


def render(**values: Any) -> str:
    """Fill in the template."""
    environment = Environment(
        loader=FileSystemLoader(ROOT),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(TEMPLATE).render(values)


def compared_results(
    paths: list[str], results: dict[str, Result], options: argparse.Namespace
) -> dict[str, Result]:
    """Return the results of the model that is compared, on the same rows. Raises UserError if it answers
    none of the tasks, or others of their rows."""
    members = [load_trained(path, options) for path in paths]
    answers = outputs_of_models(members, "dev", pick_device(options.use_gpu))
    others = {name: Result.of(*answers[name]) for name in results if name in answers}
    if not others:
        raise UserError(f"{paths[0]}: was trained on none of the tasks {', '.join(results)}")
    for name, other in others.items():
        same_classes = other.task.classes == results[name].task.classes
        if not (same_classes and np.array_equal(other.labels, results[name].labels)):
            raise UserError(f"{paths[0]}: has other classes or rows of {name}; no comparison")
    return others


def write_report(
    path: Path, compare: list[str], n_resamples: int, options: argparse.Namespace
) -> None:
    """Write the page about the checkpoint `options.evaluate`, compared with another one if given."""
    device = pick_device(options.use_gpu)
    check_writable(path)
    members = [load_trained(path, options) for path in options.evaluate]
    results, sections = {}, []
    for name, (dataset, outputs) in outputs_of_models(members, "dev", device).items():
        trained = next(member for member in members if name in member.options.tasks)
        model, tokenizer, _, _, own = trained
        results[name] = result = Result.of(dataset, outputs)
        examples = weigh_examples(model, tokenizer, result, own.precision)
        sections.append(describe_task(result, examples, n_resamples, options.seed))
    others = compared_results(compare, results, options) if compare else {}
    text = render(
        title=", ".join(Path(path).stem for path in options.evaluate),
        other=", ".join(Path(path).stem for path in compare),
        facts=describe_model(members, results),
        scores=score_table(results, others, n_resamples, options.seed),
        sections=sections,
        n_resamples=n_resamples,
        seed=options.seed,
    )
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(f"report: {path}")


# -------------------------------------------------------------------------------------------- main


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, argparse.Namespace]:
    """Return the options of the report and those of the evaluation."""
    parser = Parser(
        description=__doc__.splitlines()[0],
        allow_abbrev=False,
        epilog="All other flags are those of multitask_classifier.py --evaluate, such as --data_dir, "
        "--sst_dev, --sst, --batch_size, --precision, --use_gpu, --spacy_model, --seed.",
    )
    flag = parser.add_argument
    what = "a models/RUN.pt; several, or a pattern, are one model, the mean of them"
    flag("--checkpoint", required=True, metavar="CHECKPOINT", nargs="+", help=what)
    flag("--output", required=True, metavar="DIR", help="folder for report.html")
    what = "put the scores of this model next to them, and the difference with its interval"
    flag("--compare", metavar="CHECKPOINT", nargs="+", default=[], help=what)
    resamples = "resamples of the rows for the intervals; default: 1000"
    flag("--resamples", type=positive_int, default=1000, metavar="N", help=resamples)
    own, others = parser.parse_known_args(argv)
    own.compare = [path for pattern in own.compare for path in find_files(pattern)]
    return own, options_of([*others, "--evaluate", *own.checkpoint])


def run(argv: list[str] | None) -> None:
    own, options = parse(argv)
    write_report(Path(own.output) / "report.html", own.compare, own.resamples, options)


def main(argv: list[str] | None = None) -> int:
    return exit_status(lambda: run(argv), "lower --batch_size", "nothing was written")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, terminate)
    sys.exit(main())
