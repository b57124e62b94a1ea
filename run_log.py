"""TensorBoard, and the lines that a run prints at its start."""

import argparse
import contextlib
import gc
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from batches import collate
from bert import EncoderWithHeads
from datasets import TaskDataset, rows_in_train
from evaluation import Evaluation, confusion_figure
from optimizer import Sophia
from options import deciding
from streams import complain
from tagging import Tagger
from tasks import SPLITS
from tokenizer import BertTokenizer
from utils import autocast, current_versions, rank

# Optimizer steps between two writes to TensorBoard, since each write waits for the GPU. A prime, so
# that the steps that are looked at have changing distances from an estimate of the Hessian.
LOG_EVERY = 7
# Sentences in TensorBoard's projector; the vector of each takes some kilobytes of text.
PROJECTED_ROWS = 256


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

    def step(
        self, losses: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, bar: tqdm
    ) -> None:
        """Log a step."""
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


def shown(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options for people: of the tasks their names."""
    return dict(options) | {"tasks": ",".join(options["tasks"])}


def describe_run(
    options: argparse.Namespace,
    run: str,
    device: torch.device,
    data: Mapping[str, Mapping[str, TaskDataset]],
    tokenizer: BertTokenizer,
    tagger: Tagger | None,
) -> None:
    """Print the options, one example of each task as the model sees it, and how many dev and test
    rows are also in the training set."""
    threads = torch.get_num_threads()
    print(f"run {run} on {device}, {threads} CPU threads, {current_versions()}")
    values = ", ".join(f"{key}={value}" for key, value in sorted(shown(vars(options)).items()))
    wrapper = textwrap.TextWrapper(
        100, subsequent_indent="    ", break_on_hyphens=False, break_long_words=False
    )
    print(wrapper.fill(f"options: {values}"))
    for name, train in data["train"].items():
        orders = " in both orders" if train.both_orders else ""
        label = train.task.name_of(train.labels[0])
        print(f"{name}: {len(train)} training rows{orders}; the first: label {label}")
        for column in train.columns:
            ids, *tags = column.row(0)
            pieces = tokenizer.pieces_of(ids)
            if tagger:
                rows = zip(pieces, *tags, strict=True)
                pieces = [f"{piece}{tagger.describe(*ids)}" for piece, *ids in rows]
            print(f"    {' '.join(pieces)}")
        others = {s: data[s][name].examples for s in SPLITS[1:] if name in data[s]}
        known = {split: rows_in_train(rows, train.examples) for split, rows in others.items()}
        counts = [f"{rows.sum()} of {len(rows)} {split} rows" for split, rows in known.items()]
        print(f"    known from training: {', '.join(counts) or 'no other files'}")
