"""The tasks and their losses."""

import argparse
import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

SPLITS = ("train", "dev", "test")
PAIR_ENCODINGS = ("bi", "cross", "both")
MAX_SIMILARITY = 5.0


@dataclasses.dataclass(frozen=True)
class Task:
    """All that tells one task from another. A fourth task is one more row in TASKS, and a head."""

    name: str
    title: str
    file_prefix: str
    sentence_columns: tuple[str, ...]
    label_column: str
    num_classes: int | None  # None: the label is a number from 0 to MAX_SIMILARITY
    loss: Callable[[Tensor, Tensor], Tensor]
    # Labels from the distribution that the loss takes the outputs for, by normal random numbers.
    draw: Callable[[Tensor, Tensor], Tensor]
    metrics: tuple[str, ...]  # the first one selects the model; the names are evaluation.py's
    prediction_column: str

    def filename(self, split: str) -> str:
        return f"{self.file_prefix}-{'test-student' if split == 'test' else split}.csv"

    def decode(self, outputs: Tensor) -> Tensor:
        """The head's outputs as values on the label's scale."""
        if self.num_classes:
            return outputs.argmax(dim=-1)
        return outputs.clamp(0, MAX_SIMILARITY)

    def parse_label(self, text: str) -> float:
        """A label's value. ValueError says why there is none."""
        if not text.strip():
            raise ValueError("no label")
        try:
            value = float(text)
        except ValueError:
            raise ValueError(f"label {text.strip()[:20]!r} is not a number") from None
        if self.num_classes and not (value.is_integer() and 0 <= value < self.num_classes):
            raise ValueError(f"label {text.strip()} is not one of 0 to {self.num_classes - 1}")
        if not 0 <= value <= MAX_SIMILARITY:
            raise ValueError(f"label {text.strip()} is not between 0 and {MAX_SIMILARITY:g}")
        return value


def draw_class(logits: Tensor, noise: Tensor) -> Tensor:
    """From the softmax: cross-entropy is its negative log-likelihood. `noise` N(0, 1) of the same
    shape. [B, classes] to [B]."""
    # The Gumbel-max trick: -log(-log(u)) of a uniform u, here of the normal's distribution function.
    # torch.multinomial would wait for the GPU, and refuse what is not finite.
    return (logits - torch.log(-torch.special.log_ndtr(noise))).argmax(dim=-1)


def draw_value(outputs: Tensor, noise: Tensor) -> Tensor:
    """From the normal distribution with variance 1/2: the squared error is its negative
    log-likelihood, but for a constant. `noise` N(0, 1) [B, 1]. [B] to [B]."""
    return outputs + 0.5**0.5 * noise.squeeze(1)


def one_vs_all(logits: Tensor, labels: Tensor) -> Tensor:
    """For each class, the binary cross entropy of the answer whether it is this one; summed over the
    classes [B, C], averaged over rows."""
    truth = F.one_hot(labels, logits.shape[1]).to(logits.dtype)
    each = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    return each.sum(dim=1).mean()


def ordinal(logits: Tensor, labels: Tensor) -> Tensor:
    """For each border between neighbouring classes, the binary cross entropy of the answer whether
    the class lies above it, by the softmax; summed over the borders, averaged over rows."""
    log_probs, borders = logits.log_softmax(dim=1), range(1, logits.shape[1])
    below = torch.stack([log_probs[:, :k].logsumexp(dim=1) for k in borders], dim=1)  # [B, C - 1]
    above = torch.stack([log_probs[:, k:].logsumexp(dim=1) for k in borders], dim=1)
    is_above = labels[:, None] >= torch.tensor(borders, device=labels.device)
    return -torch.where(is_above, above, below).sum(dim=1).mean()


SST_TERMS = {"one_vs_all": one_vs_all, "ordinal": ordinal}


def label_loss(task: Task, output: Tensor, labels: Tensor, options: argparse.Namespace) -> Tensor:
    """The mean loss of one head's output [B, ...] with `--label_smoothing` and `--sst_loss`."""
    if not task.num_classes:
        return task.loss(output, labels)
    loss = F.cross_entropy(output, labels, label_smoothing=options.label_smoothing)
    if task.name == "sst" and options.sst_loss in SST_TERMS:
        loss = loss + SST_TERMS[options.sst_loss](output, labels)
    return loss


def disagreement(task: Task, one: Tensor, two: Tensor) -> Tensor:
    """The mean of both Kullback-Leibler divergences of two passes' logits [B, C]; of similarities [B]
    the squared difference."""
    if not task.num_classes:
        return F.mse_loss(one, two)
    logs = one.log_softmax(dim=1), two.log_softmax(dim=1)
    both = [F.kl_div(*pair, reduction="batchmean", log_target=True) for pair in (logs, logs[::-1])]
    return sum(both) / 2


def task_loss(
    task: Task, outputs: list[Tensor], labels: Tensor, options: argparse.Namespace
) -> Tensor:
    """The mean loss of all heads and passes; with `--rdrop` plus half of its weight times the passes'
    disagreement (Liang et al. 2021, "R-Drop", arXiv 2106.14448, equation 4 divided by 2)."""
    loss = sum(label_loss(task, output, labels, options) for output in outputs) / len(outputs)
    weight = dict(zip(TASKS, options.rdrop))[task.name]
    if weight:
        n_heads = len(outputs) // 2
        pairs = zip(outputs[:n_heads], outputs[n_heads:])
        loss = loss + weight / 2 * sum(disagreement(task, *pair) for pair in pairs) / n_heads
    return loss


def combine(task: Task, outputs: list[Tensor]) -> Tensor:
    """One answer from those of several heads: the mean of log-probabilities, or of similarities."""
    if len(outputs) == 1:
        return outputs[0]
    if task.num_classes:
        outputs = [output.float().log_softmax(dim=-1) for output in outputs]
    return sum(outputs) / len(outputs)


TASKS = {
    task.name: task
    for task in (
        Task(
            name="sst",
            title="sentiment",
            file_prefix="ids-sst",
            sentence_columns=("sentence",),
            label_column="sentiment",
            num_classes=5,
            loss=F.cross_entropy,
            draw=draw_class,
            metrics=("accuracy", "macro_f1"),
            prediction_column="predicted_sentiment",
        ),
        Task(
            name="para",
            title="paraphrase",
            file_prefix="quora",
            sentence_columns=("sentence1", "sentence2"),
            label_column="is_duplicate",
            num_classes=2,
            loss=F.cross_entropy,
            draw=draw_class,
            metrics=("accuracy", "macro_f1"),
            prediction_column="predicted_is_duplicate",
        ),
        Task(
            name="sts",
            title="similarity",
            file_prefix="sts",
            sentence_columns=("sentence1", "sentence2"),
            label_column="similarity",
            num_classes=None,
            loss=F.mse_loss,
            draw=draw_value,
            metrics=("pearson",),
            prediction_column="predicted_similarity",
        ),
    )
}
PAIR_TASKS = [name for name, task in TASKS.items() if len(task.sentence_columns) == 2]


def sequences_per_row(name: str, encodings: dict[str, str], rdrop: tuple[float, ...]) -> int:
    """What one row of a task gives the encoder to read."""
    n_columns = len(TASKS[name].sentence_columns)
    joint = {"bi": n_columns, "cross": 1, "both": n_columns + 1}[encodings[name]]
    return joint * (2 if dict(zip(TASKS, rdrop))[name] else 1)
