"""The tasks: what a row of a file means, how an output is read, and its loss.

Another task is one more row of TASKS; its head follows from the row.
"""

import argparse
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

SPLITS = ("train", "dev", "test")
PAIR_ENCODINGS = ("bi", "cross", "both")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """All that distinguishes one task from another. Its label is one of `classes`, or a number in
    `range`."""

    name: str  # in flags, checkpoints and TensorBoard
    title: str  # what people call the answer
    file_prefix: str
    sentence_columns: tuple[str, ...]  # one, or two for a pair
    label_column: str
    prediction_column: str
    classes: tuple[str, ...] = ()  # the class names, in the order of the labels 0, 1, ...
    range: tuple[float, float] = (0.0, 0.0)  # lowest and highest label
    range_names: tuple[str, str] = ("", "")  # what these two labels mean
    # (output [B, classes] or [B], labels [B], label smoothing) -> mean over the rows. Training and
    # SophiaG use this loss; flags may add terms to it (`head_loss`, `task_loss`).
    loss: Callable[[Tensor, Tensor, float], Tensor]
    # (output, standard normal noise) -> labels [B] drawn from the distribution whose negative
    # log-likelihood is the loss; for SophiaG.
    draw: Callable[[Tensor, Tensor], Tensor]
    metrics: tuple[str, ...]  # names in evaluation.METRICS; the first one selects the model

    def __post_init__(self):
        low, high = self.range
        if bool(self.classes) == (low < high):
            raise ValueError(f"task {self.name}: give either its classes or the range of its label")
        if not self.classes and not self.is_pair:
            raise ValueError(f"task {self.name}: there is no head for a number about one sentence")

    @property
    def num_classes(self) -> int | None:
        """The number of classes; None for a task whose label is a number."""
        return len(self.classes) or None

    @property
    def is_pair(self) -> bool:
        return len(self.sentence_columns) == 2

    @property
    def scale(self) -> str:
        """The meaning of the labels, in words."""
        if self.classes:
            return ", ".join(f"{label}: {name}" for label, name in enumerate(self.classes))
        (low, high), (lowest, highest) = self.range, self.range_names
        return f"from {low:g}, {lowest}, to {high:g}, {highest}"

    def filename(self, split: str) -> str:
        return f"{self.file_prefix}-{'test-student' if split == 'test' else split}.csv"

    def decode(self, outputs: Tensor) -> Tensor:
        """Read a head's outputs as labels: [B, classes] or [B] to [B]."""
        return outputs.argmax(dim=-1) if self.classes else outputs.clamp(*self.range)

    def parse_label(self, text: str) -> float:
        """Read a label. Raises ValueError with the reason if the text is not a valid label."""
        text = text.strip()
        if not text:
            raise ValueError("no label")
        try:
            value = float(text)
        except ValueError:
            raise ValueError(f"label {text[:20]!r} is not a number") from None
        if self.classes and value not in range(len(self.classes)):
            raise ValueError(f"label {text} is not one of 0 to {len(self.classes) - 1}")
        low, high = self.range
        if not self.classes and not low <= value <= high:
            raise ValueError(f"label {text} is not between {low:g} and {high:g}")
        return value


# ------------------------------------------------------------------------- losses and draws of a row


def cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """The loss of a task with classes."""
    return F.cross_entropy(logits, labels, label_smoothing=label_smoothing)


def squared_error(values: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """The loss of a task whose label is a number, which has nothing to smooth."""
    return F.mse_loss(values, labels)


def draw_class(logits: Tensor, noise: Tensor) -> Tensor:
    """Draw from the softmax, whose negative log-likelihood is the cross-entropy. `noise` is N(0, 1)
    of the same shape. [B, classes] to [B]."""
    # Gumbel-max trick: add -log(-log(u)) with u uniform. Here u is the normal distribution function
    # of the noise. torch.multinomial would wait for the GPU, and it refuses infinite logits.
    return (logits - torch.log(-torch.special.log_ndtr(noise))).argmax(dim=-1)


def draw_value(outputs: Tensor, noise: Tensor) -> Tensor:
    """Draw from the normal distribution with variance 1/2, whose negative log-likelihood is the
    squared error plus a constant. `noise` is N(0, 1) [B, 1]. [B] to [B]."""
    return outputs + 0.5**0.5 * noise.squeeze(1)


# ------------------------------------------------------------------------------------------ tasks

TASKS = {
    task.name: task
    for task in (
        Task(
            name="sst",
            title="sentiment",
            file_prefix="ids-sst",
            sentence_columns=("sentence",),
            label_column="sentiment",
            prediction_column="predicted_sentiment",
            classes=(
                "negative",
                "somewhat negative",
                "neutral",
                "somewhat positive",
                "positive",
            ),
            loss=cross_entropy,
            draw=draw_class,
            metrics=("accuracy", "macro_f1"),
        ),
        Task(
            name="para",
            title="paraphrase",
            file_prefix="quora",
            sentence_columns=("sentence1", "sentence2"),
            label_column="is_duplicate",
            prediction_column="predicted_is_duplicate",
            classes=("no paraphrase", "paraphrase"),
            loss=cross_entropy,
            draw=draw_class,
            metrics=("accuracy", "macro_f1"),
        ),
        Task(
            name="sts",
            title="similarity",
            file_prefix="sts",
            sentence_columns=("sentence1", "sentence2"),
            label_column="similarity",
            prediction_column="predicted_similarity",
            range=(0.0, 5.0),
            range_names=("unrelated", "the same meaning"),
            loss=squared_error,
            draw=draw_value,
            metrics=("pearson",),
        ),
    )
}
PAIR_TASKS = [name for name, task in TASKS.items() if task.is_pair]


def sequences_per_row(name: str, encodings: Mapping[str, str], rdrop: Mapping[str, float]) -> int:
    """Return how many sequences the encoder reads for one row of a task."""
    n_columns = len(TASKS[name].sentence_columns)
    once = {"bi": n_columns, "cross": 1, "both": n_columns + 1}[encodings[name]]
    return 2 * once if rdrop[name] else once


# ---------------------------------------------------------------------------------- loss of a step


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
    is_above = labels[:, None] >= torch.tensor(borders, device=labels.device)
    return -torch.where(is_above, above, below).sum(dim=1).mean()


# Values of --sst_loss that add a term to the task's own loss.
ADDED_LOSSES = {"one_vs_all": one_vs_all, "ordinal": ordinal}


def head_loss(task: Task, output: Tensor, labels: Tensor, options: argparse.Namespace) -> Tensor:
    """Return the mean loss of one head's output [B, ...]: the task's loss with `--label_smoothing`,
    plus the term that `--NAME_loss` adds. Only sentiment has such a flag, `--sst_loss`."""
    loss = task.loss(output, labels, options.label_smoothing)
    added = ADDED_LOSSES.get(getattr(options, f"{task.name}_loss", ""))
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
    loss = mean([head_loss(task, output, labels, options) for output in outputs])
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
