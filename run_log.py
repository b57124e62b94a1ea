"""TensorBoard, and the lines that a run prints at its start."""

import argparse
import contextlib
import datetime
import gc
import math
import textwrap
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from batches import collate
from bert import EncoderWithHeads
from datasets import TaskDataset
from evaluation import Evaluation, confusion_figure, mean_score
from optimizer import Sophia
from options import deciding, default_options
from processes import rank
from streams import complain
from tagging import Tagger
from tasks import SPLITS, TASKS
from tokenizer import BertTokenizer
from utils import autocast, current_versions, progress_bar

# Optimizer steps between two writes to TensorBoard, since each write waits for the GPU. A prime, so
# that the steps that are looked at have changing distances from an estimate of the Hessian.
LOG_EVERY = 7
# Sentences in TensorBoard's projector; the vector of each takes some kilobytes of text.
PROJECTED_ROWS = 256

# Seconds between two lines about the progress of an epoch, at least; the first one comes at once.
PROGRESS_SECONDS = 5.0


class NoWriter:
    """A SummaryWriter that writes nothing."""

    def __getattr__(self, name: str):
        return self

    def __call__(self, *_, **__):
        return self


class RunLog:
    """The TensorBoard log of a run. Losses stay on the device until `flush`. With several processes,
    only the first one writes."""

    def __init__(self, directory: Path, state: dict[str, Any] | None = None):
        from torch.utils.tensorboard import SummaryWriter  # takes a second to import

        self.directory, self.broken = directory, False
        # Hides what a killed run wrote after its last saved state.
        purge = state and min([step for step, _ in state["waiting"]] + [state["n_steps"] + 1])
        self.writer: Any = NoWriter()
        if rank() == 0:
            self.writer = SummaryWriter(str(directory), purge_step=purge)
        state = state or dict(n_steps=0, waiting=[], clipped=[])
        self.n_steps = state["n_steps"]
        # (step, tag -> value) that are not written yet.
        self.waiting: list[tuple[int, dict[str, Any]]] = list(state["waiting"])
        # Tokens of this process since the first step that is not written yet.
        self.n_tokens, self.since = 0, time.perf_counter()
        # Sophia's shares of clipped coordinates in this epoch.
        self.clipped: list[float] = list(state["clipped"])

    def state(self) -> dict[str, Any]:
        """Return the state for `torch.save`."""
        with self._uncritical():
            self.writer.flush()
        directory = str(self.directory)
        return dict(
            directory=directory, n_steps=self.n_steps, waiting=self.waiting, clipped=self.clipped
        )

    def start(
        self,
        options: argparse.Namespace,
        train: Mapping[str, TaskDataset],
        tokenizer: BertTokenizer,
        tagger: Tagger | None,
    ) -> None:
        """Log all options and versions, and the first row of each task as the model reads it."""
        values = shown(vars(options)) | current_versions()
        texts = {
            "options": "\n".join(f"{name}: {value}" for name, value in sorted(values.items())),
            "first rows": describe_examples(train, tokenizer, tagger),
        }
        with self._uncritical():
            for tag, text in texts.items():
                self.writer.add_text(tag, textwrap.indent(text, "    "))  # as code in Markdown

    def step(
        self,
        losses: Mapping[str, Tensor],
        optimizer: torch.optim.Optimizer,
        bar: tqdm,
        n_tokens: int,
    ) -> None:
        """Log a step of `n_tokens` tokens in this process."""
        if self.waiting:
            self.n_tokens += n_tokens
        else:  # the time of the step before the first one has other things in it
            self.n_tokens, self.since = 0, time.perf_counter()
        self.n_steps += 1
        values: dict[str, Any] = {
            name if "/" in name else f"loss/{name}": loss for name, loss in losses.items()
        }
        # Besides the weights of losses, the largest rate is that of the heads.
        groups = [g for g in optimizer.param_groups if g.get("part") != "loss weights"]
        values["lr"] = max(group["lr"] for group in groups)
        self.waiting.append((self.n_steps, values))
        if len(self.waiting) == LOG_EVERY:
            self.flush(optimizer, bar)

    def flush(self, optimizer: torch.optim.Optimizer, bar: tqdm) -> None:
        """Write the steps that are waiting, and show the last losses in the progress bar."""
        if self.waiting and isinstance(optimizer, Sophia):
            statistics = {f"sophia/{key}": value for key, value in optimizer.statistics().items()}
            self.waiting[-1][1].update(statistics)
        if self.waiting and self.n_tokens:
            speed = self.n_tokens / (time.perf_counter() - self.since)
            self.waiting[-1][1]["tokens_per_second"] = speed
        for step, values in self.waiting:
            values = {tag: float(value) for tag, value in values.items()}
            with self._uncritical():
                for tag, value in values.items():
                    self.writer.add_scalar(tag, value, step)
            losses = {
                t.removeprefix("loss/"): v for t, v in values.items() if t.startswith("loss/")
            }
            bar.set_postfix({name: f"{loss:.3f}" for name, loss in losses.items()}, refresh=False)
            self.clipped += [v for tag, v in values.items() if tag == "sophia/clipped"]
        self.waiting.clear()

    def curvature(self, optimizer: Sophia) -> str:
        """Describe an epoch with Sophia in one line, and start the account of the next epoch."""
        share = f"{sum(self.clipped) / len(self.clipped):.3f}" if self.clipped else "not looked at"
        self.clipped.clear()
        return (
            f"clipped share of coordinates {share}, "
            f"{optimizer.skipped_refreshes} estimates skipped so far"
        )

    def epoch(
        self,
        epoch: int,
        train: Mapping[str, Mapping[str, float]],
        dev: Mapping[str, Evaluation],
        mean: float,
        n_rows: Mapping[str, int],
    ) -> None:
        """Log the scores of an epoch, a confusion matrix for each task with classes, and how many rows
        of each task were drawn."""
        dev_scores = {name: evaluation.scores for name, evaluation in dev.items()}
        with self._uncritical():
            for split, scores in {"train": train, "dev": dev_scores}.items():
                for name, metrics in scores.items():
                    for metric, value in metrics.items():
                        self.writer.add_scalar(f"{split}/{name}_{metric}", value, epoch)
            self.writer.add_scalar("dev/mean", mean, epoch)
            for name, n in n_rows.items():
                self.writer.add_scalar(f"rows/{name}", n, epoch)
            for name, evaluation in dev.items():
                self.writer.add_scalar(f"dev_loss/{name}", evaluation.loss, epoch)
                if evaluation.dataset.task.classes:
                    figure = confusion_figure(evaluation)
                    self.writer.add_figure(f"dev/{name}_confusion", figure, epoch)
        # Figures are full of reference cycles, which would stay in memory for epochs.
        gc.collect()

    def best(
        self,
        model: EncoderWithHeads,
        dev: Mapping[str, TaskDataset],
        options: argparse.Namespace,
        scores: Mapping[str, Mapping[str, float]],
        unseen: Mapping[str, Mapping[str, float]],
    ) -> None:
        """Log the best model: the vectors of sentences, the options and the scores, also those without
        the dev rows that are in the training file."""
        for dataset in dev.values():
            if not dataset.task.is_pair:
                self.sentences(model, dataset, options.batch_size, options.precision)
        self.hyper_parameters(options, scores)
        with self._uncritical():
            for name, metrics in unseen.items():
                for metric, value in metrics.items():
                    self.writer.add_scalar(f"unseen/{name}_{metric}", value)

    def hyper_parameters(
        self, options: argparse.Namespace, scores: Mapping[str, Mapping[str, float]]
    ) -> None:
        """Log the options and the best scores for TensorBoard's page of hyper-parameters."""
        from torch.utils.tensorboard.summary import hparams

        simple = (bool, int, float, str)
        values = {
            key: value if isinstance(value, simple) else str(value)
            for key, value in shown(deciding(vars(options))).items()
        }
        # Not add_hparams: it also writes which columns there are. With the columns of a single run,
        # TensorBoard could not put the flags first in which runs differ.
        _, *session = hparams(values, {})
        with self._uncritical():
            for summary in session:
                self.writer.file_writer.add_summary(summary)
            for name, metrics in scores.items():
                for metric, value in metrics.items():
                    self.writer.add_scalar(f"best/{name}_{metric}", value)
            self.writer.add_scalar("best/mean", mean_score(scores))

    @torch.no_grad()
    def sentences(
        self, model: EncoderWithHeads, dataset: TaskDataset, batch_size: int, precision: str
    ) -> None:
        """Log the vectors of a dataset's first sentences, with labels, for TensorBoard's projector."""
        rows = np.arange(min(len(dataset), PROJECTED_ROWS))
        device, parts = next(model.parameters()).device, []
        with autocast(device, precision):
            for start in range(0, len(rows), batch_size):
                part = {dataset.task.name: (dataset, rows[start : start + batch_size])}
                parts.append(model.eval().vectors(collate(part).to(device)))
        # Rounded, since all digits are written.
        vectors = torch.cat(parts).double().cpu().numpy().round(3)
        examples = [dataset.examples[row] for row in rows]
        shown = [
            (" ".join(example.sentences[0].split()), dataset.task.name_of(example.label))
            for example in examples
        ]
        tag = f"{dataset.split}/{dataset.task.name}"
        with self._uncritical():
            heads = ["sentence", "label"]
            self.writer.add_embedding(vectors, shown, metadata_header=heads, tag=tag)

    def show_profile(self, text: str) -> None:
        """Print the table of the profiler and log it."""
        print(f"\n{text}\n")
        with self._uncritical():
            self.writer.add_text("profile", text, self.n_steps)

    def close(self) -> None:
        with self._uncritical():
            self.writer.close()

    @contextlib.contextmanager
    def _uncritical(self) -> Iterator[None]:
        """Turn the first error of a log that cannot be written (a full disk) into a warning."""
        try:
            yield
        except OSError as error:
            if not self.broken:
                text = f"{self.directory}: TensorBoard's log ends here ({error}); the run continues"
                complain(f"warning: {text}")
            self.broken = True


class Progress:
    """The rows of an epoch that are done, of all tasks: a bar on a terminal, elsewhere a line for every
    tenth of the epoch. Only the first process shows it."""

    def __init__(self, epoch: int, done: int, total: int):
        self.epoch, self.first, self.total = epoch, done, total
        self.bar = progress_bar(desc=f"epoch {epoch}", unit=" rows", initial=done, total=total)
        self.tenth, self.start = 10 * done // total, time.perf_counter()
        self.shown = -math.inf

    def update(self, done: int) -> None:
        """Show that this many rows are done."""
        self.bar.update(done - self.bar.n)
        tenth, now = 10 * done // self.total, time.perf_counter()
        due = self.tenth < tenth < 10 and now - self.shown >= PROGRESS_SECONDS
        if not self.bar.disable or rank() or not due:
            return
        self.tenth, self.shown = tenth, now
        speed = (done - self.first) / (now - self.start)
        left = datetime.timedelta(seconds=round((self.total - done) / speed))
        print(f"epoch {self.epoch}: {10 * tenth}%, {speed:,.0f} rows/s, {left} left", flush=True)


def shown(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options for people: of the tasks their names."""
    return dict(options) | {"tasks": ",".join(options["tasks"])}


def describe_run(
    options: argparse.Namespace,
    run: str,
    device: torch.device,
    model: EncoderWithHeads,
    data: Mapping[str, Mapping[str, TaskDataset]],
) -> str:
    """Return the heading of a run: where and with what it trains, how its flags differ from the defaults,
    and where it writes."""
    rows = []
    for name, train in data["train"].items():
        orders = " in both orders" if train.both_orders else ""
        others = [f"{len(data[s][name])} {s}" for s in SPLITS[1:] if name in data[s]]
        rows.append(", ".join([f"{name} {len(train)} training rows{orders}", *others]))
    config, n_weights = model.bert.config, sum(weight.numel() for weight in model.parameters())
    sizes = f"{config.num_hidden_layers} layers of {config.hidden_size}"
    heading = {
        "run": run,
        "device": f"{device}, {torch.get_num_threads()} CPU threads, precision {options.precision}",
        "data": "; ".join(rows),
        "model": f"{options.bert_model}, {sizes}, {n_weights / 1e6:.1f} million weights with the heads",
        "flags": " ".join(changed_flags(options)) or "all as by default",
        "writes": f"{options.models_dir}/{run}.pt, {options.predictions_dir}, {options.logdir}",
    }
    return "\n".join(
        textwrap.fill(
            f"{name:<8}{text}",
            100,
            subsequent_indent=" " * 8,
            break_on_hyphens=False,
            break_long_words=False,
        )
        for name, text in heading.items()
    )


def changed_flags(options: argparse.Namespace) -> list[str]:
    """Return the flags that decide a run's numbers and differ from their defaults, as they are typed."""
    tasks = {name: TASKS.get(name, task) for name, task in options.tasks.items()}
    defaults = shown(vars(default_options(options.data_dir, tasks)))
    flags = [f"--config {options.config}"] if options.config else []
    for name, value in shown(deciding(vars(options))).items():
        if value == defaults.get(name, value) or name in ("bert_model", "precision"):
            continue
        if isinstance(value, dict):
            value = ",".join(f"{task}={number:g}" for task, number in value.items())
        elif isinstance(value, list | tuple):
            value = " ".join(map(str, value))
        flags.append(f"--{name}" if value is True else f"--{name} {value}")
    return flags


def describe_examples(
    train: Mapping[str, TaskDataset], tokenizer: BertTokenizer, tagger: Tagger | None
) -> str:
    """Return the first row of each task as the model reads it, a sequence on each line."""
    lines = []
    for name, dataset in train.items():
        lines.append(f"{name}: label {dataset.task.name_of(dataset.labels[0])}")
        for column in dataset.columns:
            ids, *tags = column.row(0)
            pieces = tokenizer.pieces_of(ids)
            if tagger:
                rows = zip(pieces, *tags, strict=True)
                pieces = [f"{piece}{tagger.describe(*ids)}" for piece, *ids in rows]
            lines.append(f"    {' '.join(pieces)}")
    return "\n".join(lines)
