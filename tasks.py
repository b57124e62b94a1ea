"""The tasks: what a row of a file means, how an output is read, and its loss.

A task is a row of TASKS, or a table of a `--task_file`. Its head and all else follow from it.
"""

import argparse
import dataclasses
import functools
import math
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils import UserError, did_you_mean, one_line

SPLITS = ("train", "dev", "test")
PAIR_ENCODINGS = ("bi", "cross", "both")
# The metrics of tasks with classes, and of tasks whose label is a number; see evaluation.METRICS.
CLASS_METRICS = ("accuracy", "macro_f1", "f1", "matthews")
NUMBER_METRICS = ("pearson", "spearman")
MOST_CLASSES = 10_000
# Of other losses and scores, and of other entries of an answer.
RESERVED_NAMES = "sum mean balance error cut probabilities line row id".split()


def one_vs_all(logits: Tensor, labels: Tensor) -> Tensor:
    """Binary cross-entropy of "is it this class?", summed over the classes, averaged over the rows."""
    truth = F.one_hot(labels, logits.shape[1]).to(logits.dtype)
    by_class = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")  # [B, C]
    return by_class.sum(dim=1).mean()


def ordinal(logits: Tensor, labels: Tensor) -> Tensor:
    """Binary cross-entropy of "is the class above this border?" with the softmax's probabilities,
    summed over the borders between neighbouring classes, averaged over the rows."""
    log_probs, borders = logits.log_softmax(dim=1), range(1, logits.shape[1])
    below = torch.stack([log_probs[:, :k].logsumexp(dim=1) for k in borders], dim=1)  # [B, C - 1]
    above = torch.stack([log_probs[:, k:].logsumexp(dim=1) for k in borders], dim=1)
    # Made on the device, so that a CUDA graph has no copy from the host.
    is_above = labels[:, None] >= torch.arange(1, logits.shape[1], device=labels.device)
    return -torch.where(is_above, above, below).sum(dim=1).mean()


# They add a term to the cross-entropy.
ADDED_LOSSES = {"one_vs_all": one_vs_all, "ordinal": ordinal}
CLASS_LOSSES = ("cross_entropy", *ADDED_LOSSES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """All that distinguishes one task from another. Its label is one of `classes`, or a number in
    `range`. Raises ValueError for a row that contradicts itself."""

    name: str  # in flags, checkpoints and TensorBoard
    title: str = ""  # what people call the answer; default: the name
    # Names of files in --data_dir, which are joined; or paths.
    train: tuple[str, ...] = ()
    dev: tuple[str, ...] = ()
    test: tuple[str, ...] = ()
    id: str = ""  # column; "": an id is the number of its row, from 1
    sentences: tuple[str, ...]  # columns: one, or two for a pair
    label: str  # column
    classes: tuple[str, ...] = ()  # names of the classes 0, 1, ...
    texts: tuple[str, ...] = ()  # what files have for the classes; default: their names
    range: tuple[float, float] = (0.0, 0.0)  # lowest and highest label
    range_names: tuple[str, str] = ("", "")  # what these two labels mean
    symmetric: bool | None = None  # pairs: their order does not count; default: with a range only
    encoding: str = "bi"  # how the encoder reads pairs, one of PAIR_ENCODINGS
    loss_name: str = "cross_entropy"  # of classes, one of CLASS_LOSSES
    metrics: tuple[str, ...] = ()  # the first one selects the model
    weight: float = 1.0  # of the loss in the sum of all tasks
    samples: int = 0  # rows in an epoch; 0: as --samples_per_epoch and --sampling say
    # How text files are read.
    columns: tuple[str, ...] = ()  # names of the columns, for files without a header
    separator: str = ""  # default: found from the header
    quoting: bool = True  # whether cells can be in quotes

    def __post_init__(self):
        low, high = self.range
        if bool(self.classes) == (low < high):
            raise ValueError("give either classes (two or more) or range = [lowest, highest]")
        if len(self.classes) == 1 or len(set(self.classes)) < len(self.classes):
            raise ValueError("classes: at least two, all different")
        if len(self.sentences) not in (1, 2):
            raise ValueError("sentences: name one column, or two for a pair")
        if not self.is_pair and (self.encoding != "bi" or self.symmetric):
            raise ValueError("encoding and symmetric: only for pairs")
        defaults: dict[str, Any] = {
            "title": self.title or self.name,
            "texts": self.texts or self.classes,
            "metrics": self.metrics or self._default_metrics(),
            "symmetric": (
                self.is_pair and not self.classes if self.symmetric is None else self.symmetric
            ),
        }
        for field, value in defaults.items():
            object.__setattr__(self, field, value)
        if unknown := [name for name in self.metrics if name not in self._possible_metrics()]:
            known = ", ".join(self._possible_metrics())
            raise ValueError(f"metrics: {unknown[0]!r} is not for this task; possible: {known}")

    def _possible_metrics(self) -> tuple[str, ...]:
        if not self.classes:
            return NUMBER_METRICS
        return tuple(name for name in CLASS_METRICS if name != "f1" or len(self.classes) == 2)

    def _default_metrics(self) -> tuple[str, ...]:
        return tuple(name for name in self._possible_metrics() if name != "matthews")

    @property
    def num_classes(self) -> int | None:
        """The number of classes; None for a task whose label is a number."""
        return len(self.classes) or None

    @property
    def is_pair(self) -> bool:
        return len(self.sentences) == 2

    @property
    def takes_both_orders(self) -> bool:
        """Whether `--both_orders` concerns this task: pairs in one sequence whose order does not count."""
        return self.encoding != "bi" and bool(self.symmetric)

    @property
    def prediction_column(self) -> str:
        return f"predicted_{self.label}"

    @property
    def scale(self) -> str:
        """The meaning of the labels, in words."""
        if self.classes:
            pairs = zip(self.texts, self.classes, strict=True)
            return ", ".join(name if text == name else f"{text}: {name}" for text, name in pairs)
        (low, high), (lowest, highest) = self.range, self.range_names
        names = [f"{low:g}", lowest, f"to {high:g}", highest]
        return f"from {', '.join(filter(None, names))}"

    def sequences_per_row(self, twice: bool) -> int:
        """Return how many sequences the encoder reads for one row."""
        n_columns = len(self.sentences)
        once = {"bi": n_columns, "cross": 1, "both": n_columns + 1}[self.encoding]
        return 2 * once if twice else once

    # ------------------------------------------------------------------------------- labels

    @functools.cached_property
    def _class_of_text(self) -> dict[str, int]:
        return {text: number for number, text in enumerate(self.texts)}

    def parse_label(self, text: str) -> float:
        """Read a label: the number of a class, or a number in the range. Raises ValueError with the
        reason if the text is not a valid label."""
        text = text.strip()
        if not text:
            raise ValueError("no label")
        if text in self._class_of_text:
            return float(self._class_of_text[text])
        try:
            value = float(text)
        except ValueError:
            if self.classes:
                hint = did_you_mean(text, self.texts)
                raise ValueError(f"label {text[:20]!r} is not a class{hint}") from None
            raise ValueError(f"label {text[:20]!r} is not a number") from None
        low, high = self.range
        if self.classes:
            if (number := self._class_of_text.get(f"{value:g}")) is not None:
                return float(number)
            known = f"{self.texts[0]} to {self.texts[-1]}"
            raise ValueError(f"label {text[:20]} is not one of the classes, {known}")
        if not low <= value <= high:
            raise ValueError(f"label {text[:20]} is not between {low:g} and {high:g}")
        return value

    def name_of(self, label: float) -> str:
        """Write a label or a prediction for people."""
        if math.isnan(label):
            return "none"
        return self.classes[int(label)] if self.classes else f"{label:g}"

    def show(self, value: float) -> str:
        """Write a label or a prediction as files have it."""
        return self.texts[int(value)] if self.classes else f"{value:.6f}"

    def decode(self, outputs: Tensor) -> Tensor:
        """Read a head's outputs as labels: [B, classes] or [B] to [B]."""
        return outputs.argmax(dim=-1) if self.classes else outputs.clamp(*self.range)

    # --------------------------------------------------------------------------------- loss

    def loss(self, output: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """Return the negative log-likelihood of the labels, averaged over the rows: cross-entropy of
        logits [B, classes], or squared error of numbers [B], which have nothing to smooth."""
        if not self.classes:
            return F.mse_loss(output, labels)
        return F.cross_entropy(output, labels, label_smoothing=label_smoothing)

    def draw(self, outputs: Tensor, noise: Tensor) -> Tensor:
        """Draw labels [B] from the distribution whose negative log-likelihood is the loss (of the
        squared error: normal, with variance 1/2), for SophiaG. `noise` is N(0, 1), [B, classes or 1].
        """
        if not self.classes:
            return outputs + 0.5**0.5 * noise.squeeze(1)
        # Gumbel-max trick: add -log(-log(u)) with u uniform. Here u is the normal distribution function
        # of the noise. torch.multinomial would wait for the GPU, and it refuses infinite logits.
        return (outputs - torch.log(-torch.special.log_ndtr(noise))).argmax(dim=-1)


def numbered(n_classes: int) -> tuple[str, ...]:
    """Return what files have for classes that are numbers: 0, 1, ..."""
    return tuple(map(str, range(n_classes)))


TASKS = {
    task.name: task
    for task in (
        Task(
            name="sst",
            title="sentiment",
            train=("ids-sst-train.csv",),
            dev=("ids-sst-dev.csv",),
            test=("ids-sst-test-student.csv",),
            id="id",
            sentences=("sentence",),
            label="sentiment",
            classes=(
                "negative",
                "somewhat negative",
                "neutral",
                "somewhat positive",
                "positive",
            ),
            texts=numbered(5),
        ),
        Task(
            name="para",
            title="paraphrase",
            train=("quora-train.csv",),
            dev=("quora-dev.csv",),
            test=("quora-test-student.csv",),
            id="id",
            sentences=("sentence1", "sentence2"),
            label="is_duplicate",
            classes=("no paraphrase", "paraphrase"),
            texts=numbered(2),
            symmetric=True,
        ),
        Task(
            name="sts",
            title="similarity",
            train=("sts-train.csv",),
            dev=("sts-dev.csv",),
            test=("sts-test-student.csv",),
            id="id",
            sentences=("sentence1", "sentence2"),
            label="similarity",
            range=(0.0, 5.0),
            range_names=("unrelated", "the same meaning"),
        ),
    )
}


# -------------------------------------------------------------------------------- tasks from a file


def checked(what: str, accepts: Callable[[Any], Any], convert: Callable = lambda value: value):
    """Make the reader of a key: it returns the converted value, or raises ValueError."""

    def read(value: Any) -> Any:
        if not accepts(value):
            raise ValueError(f"must be {what}")
        return convert(value)

    return read


def is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e9


def as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def read_classes(value: Any) -> dict[str, tuple[str, ...]]:
    """Read the names of classes, what files have for them and their names, or their number."""
    if isinstance(value, int):
        if value not in range(2, MOST_CLASSES) or value is True:
            raise ValueError(f"must be a number from 2 to {MOST_CLASSES - 1}, or names")
        value = list(numbered(value))
    pairs = value if isinstance(value, dict) else {str(text): str(text) for text in as_list(value)}
    if not all(map(is_text, (*pairs, *pairs.values()))) or len(pairs) < len(value):
        raise ValueError('must be different names, a number, or a table {0 = "no", 1 = "yes"}')
    return {"texts": tuple(pairs), "classes": tuple(pairs.values())}


FIELDS = {"loss": "loss_name"}  # where the field of `Task` has another name than the key
read_text = checked("a text", is_text)
read_texts = checked(
    "a text or a list of texts",
    lambda v: v and all(map(is_text, as_list(v))),
    lambda v: (*as_list(v),),
)
read_switch = checked("true or false", lambda value: isinstance(value, bool))
READERS: dict[str, Callable[[Any], Any]] = {
    **dict.fromkeys(("title", "id", "label", "primary"), read_text),
    **dict.fromkeys((*SPLITS, "sentences", "metrics", "columns"), read_texts),
    **dict.fromkeys(("symmetric", "quoting"), read_switch),
    "classes": checked(
        "names or a number", lambda v: v and isinstance(v, list | dict | int), read_classes
    ),
    "range": checked(
        "[lowest, highest]",
        lambda v: isinstance(v, list) and len(v) == 2 and all(map(is_number, v)) and v[0] < v[1],
        lambda v: (float(v[0]), float(v[1])),
    ),
    "encoding": checked(" or ".join(PAIR_ENCODINGS), lambda v: v in PAIR_ENCODINGS),
    "loss": checked(" or ".join(CLASS_LOSSES), lambda v: v in CLASS_LOSSES),
    "weight": checked("a number above 0", lambda v: is_number(v) and v > 0, float),
    "samples": checked(
        "a whole number above 0", lambda v: is_number(v) and v > 0 and v == int(v), int
    ),
    "separator": checked(r'"\t", ",", ";" or "|"', lambda v: v in ("\t", ",", ";", "|")),
}


def read_task_file(path: str) -> dict[str, Task]:
    """Read the tasks of a TOML file, a table for each. Raises UserError with the table and the key."""
    try:
        tables = tomllib.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"--task_file {path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"--task_file {path}: not TOML ({one_line(error)})") from error
    if not tables:
        raise UserError(f"--task_file {path}: has no table such as [mytask]")
    tasks: dict[str, Task] = {}
    for name, table in tables.items():
        try:
            tasks[name] = _task_of_table(name, table)
        except (ValueError, TypeError) as error:
            raise UserError(f"--task_file {path}: [{repr(name[:40])[1:-1]}]: {error}") from error
    titles = [task.title for task in (TASKS | tasks).values()]
    if repeated := [title for title in titles if titles.count(title) > 1]:
        what = f"more than one task has the title {repeated[0][:40]!r} (sst, para and sts have one too)"
        raise UserError(f"--task_file {path}: {what}; write another title = ...")
    return tasks


def _task_of_table(name: str, table: Any) -> Task:
    """Make the task of a table. Raises ValueError with the key and the reason."""
    if not isinstance(table, dict):
        raise ValueError("is no table; write a line such as [my_task] above the keys of a task")
    if not re.fullmatch(r"[a-z][a-z0-9_]{0,30}", name):
        raise ValueError("a task's name has small letters, digits and _ only, as in [my_task]")
    if name in TASKS or name in RESERVED_NAMES or hasattr(nn.ModuleDict(), name):
        raise ValueError("this name is taken; choose another one")
    values: dict[Any, Any] = {}
    for key, value in table.items():
        if key not in READERS:
            raise ValueError(f"there is no key {key[:40]!r}{did_you_mean(key, READERS)}")
        try:
            read = READERS[key](value)
        except ValueError as error:
            raise ValueError(f"{key} {error}") from None
        values |= read if key == "classes" else {FIELDS.get(key, key): read}
    if "loss" in table and len(values.get("classes", ())) < 3:
        raise ValueError("loss: only for three classes or more")
    if missing := [key for key in ("train", "sentences", "label") if key not in values]:
        raise ValueError(f"{missing[0]} is missing")
    primary = values.pop("primary", None)
    task = Task(name=name, **values)
    if task.title in RESERVED_NAMES:
        raise ValueError(f"title {task.title!r} is taken; choose another one")
    if primary is None:
        return task
    others = [metric for metric in task.metrics if metric != primary]
    return dataclasses.replace(task, metrics=(primary, *others))


def plain_rows(tasks: Mapping[str, Task]) -> dict[str, dict[str, Any]]:
    """Return tasks as tables of texts and numbers, for a checkpoint."""
    return {name: dataclasses.asdict(task) for name, task in tasks.items()}


def tasks_of_rows(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, Task]:
    """Return the tasks that `plain_rows` has written."""

    def restored(value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value  # JSON knows no tuples

    return {
        name: Task(**{field: restored(value) for field, value in row.items()})
        for name, row in rows.items()
    }


# ---------------------------------------------------------------------------------- loss of a step


def head_loss(task: Task, output: Tensor, labels: Tensor, label_smoothing: float) -> Tensor:
    """Return the mean loss of one head's output [B, ...]: the task's loss, plus the term that
    `--NAME_loss` adds."""
    loss = task.loss(output, labels, label_smoothing)
    added = ADDED_LOSSES.get(task.loss_name)
    return loss + added(output, labels) if added else loss


def disagreement(task: Task, one: Tensor, other: Tensor) -> Tensor:
    """Compare the outputs of two passes: for logits [B, C] the mean of the two Kullback-Leibler
    divergences, for numbers [B] the squared difference."""
    if not task.classes:
        return F.mse_loss(one, other)
    logs = one.log_softmax(dim=1), other.log_softmax(dim=1)
    both = [F.kl_div(*pair, reduction="batchmean", log_target=True) for pair in (logs, logs[::-1])]
    return mean(both)


def task_loss(
    task: Task, outputs: list[Tensor], labels: Tensor, options: argparse.Namespace
) -> Tensor:
    """Return the mean loss of all heads and passes. With `--rdrop` (weight a), a/2 times the
    disagreement of two passes is added (Liang et al. 2021, "R-Drop", arXiv 2106.14448, equation 4
    divided by 2); then `outputs` has all heads of the first pass, followed by all of the second."""
    smoothing = options.label_smoothing
    loss = mean([head_loss(task, output, labels, smoothing) for output in outputs])
    if weight := options.rdrop[task.name]:
        n_heads = len(outputs) // 2
        passes = zip(outputs[:n_heads], outputs[n_heads:], strict=True)
        loss = loss + weight / 2 * mean([disagreement(task, *pair) for pair in passes])
    return loss


def combine(task: Task, outputs: list[Tensor]) -> Tensor:
    """Average the outputs of several heads: the log-probabilities of classes, or the numbers."""
    if len(outputs) == 1:
        return outputs[0]
    if task.classes:
        outputs = [output.float().log_softmax(dim=-1) for output in outputs]
    return mean(outputs)


def mean(tensors: Sequence[Tensor]) -> Tensor:
    """Average tensors of the same shape."""
    return functools.reduce(torch.add, tensors) / len(tensors)
