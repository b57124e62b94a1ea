"""TensorBoard."""

import argparse
import contextlib
import gc
import sys
import textwrap
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from batches import collate
from datasets import TaskDataset, overlap
from evaluation import Evaluation, confusion_figure
from optimizer import Sophia
from options import decisive
from tagging import Tagger
from tasks import SPLITS
from utils import autocast, current_versions, rank

# Optimizer steps between two writes to TensorBoard: each one waits for the GPU. A prime, so that
# what is looked at is now sooner, now later after an estimate of the Hessian.
LOG_EVERY = 7
PROJECTED_ROWS = (
    256  # sentences in TensorBoard's projector; each one's vector is some kilobytes of text
)


class NoWriter:
    """A SummaryWriter that writes nothing."""

    def __getattr__(self, name: str):
        return self

    def __call__(self, *_, **__):
        return self


class RunLog:
    """TensorBoard's side of a run. Losses stay on the device until `flush`. Of the processes of a
    data-parallel run, only the first one writes."""

    def __init__(self, directory: Path, state: dict | None = None):
        from torch.utils.tensorboard import SummaryWriter  # a second to import

        self.directory, self.broken = directory, False
        # What a killed run wrote after its last saved state is hidden.
        purge = state and min([step for step, _ in state["waiting"]] + [state["n_steps"] + 1])
        self.writer = NoWriter() if rank() else SummaryWriter(str(directory), purge_step=purge)
        state = state or dict(n_steps=0, waiting=[], clipped=[])
        self.n_steps = state["n_steps"]
        self.waiting = list(state["waiting"])  # (step, tag -> value), not written yet
        self.clipped = list(state["clipped"])  # Sophia's shares of clipped coordinates, this epoch

    def state(self) -> dict:
        with self._going_on():
            self.writer.flush()
        directory = str(self.directory)
        return dict(
            directory=directory, n_steps=self.n_steps, waiting=self.waiting, clipped=self.clipped
        )

    def step(self, losses: dict[str, Tensor], optimizer: torch.optim.Optimizer, bar: tqdm) -> None:
        self.n_steps += 1
        values = {n if "/" in n else f"loss/{n}": loss for n, loss in losses.items()}
        values["lr"] = max(group["lr"] for group in optimizer.param_groups)  # the heads'
        self.waiting.append((self.n_steps, values))
        if len(self.waiting) == LOG_EVERY:
            self.flush(optimizer, bar)

    def flush(self, optimizer: torch.optim.Optimizer, bar: tqdm) -> None:
        if self.waiting and isinstance(optimizer, Sophia):
            statistics = {f"sophia/{key}": each for key, each in optimizer.statistics().items()}
            self.waiting[-1][1].update(statistics)
        for step, values in self.waiting:
            values = {tag: float(value) for tag, value in values.items()}
            with self._going_on():
                for tag, value in values.items():
                    self.writer.add_scalar(tag, value, step)
            losses = {t.removeprefix("loss/"): v for t, v in values.items() if t.startswith("loss")}
            bar.set_postfix({name: f"{loss:.3f}" for name, loss in losses.items()}, refresh=False)
            self.clipped += [v for tag, v in values.items() if tag == "sophia/clipped"]
        self.waiting.clear()

    def curvature(self, optimizer: Sophia) -> str:
        """What to know of an epoch with Sophia, in one line; starts the next epoch's account."""
        share = f"{sum(self.clipped) / len(self.clipped):.3f}" if self.clipped else "not looked at"
        self.clipped.clear()
        return (
            f"clipped share of coordinates {share}, "
            f"{optimizer.skipped_refreshes} estimates skipped so far"
        )

    def epoch(
        self,
        epoch: int,
        train: dict[str, dict[str, float]],
        dev: dict[str, Evaluation],
        mean: float,
    ) -> None:
        with self._going_on():
            dev_scores = {name: each.scores for name, each in dev.items()}
            for split, scores in {"train": train, "dev": dev_scores}.items():
                for name, metrics in scores.items():
                    for metric, value in metrics.items():
                        self.writer.add_scalar(f"{split}/{name}_{metric}", value, epoch)
            self.writer.add_scalar("dev/mean", mean, epoch)
            if "sst" in dev:
                figure = confusion_figure(dev["sst"])
                self.writer.add_figure("dev/sst_confusion", figure, epoch)
                del figure
                gc.collect()  # a figure is full of reference cycles, which would lie about for epochs

    def hyper_parameters(self, options: argparse.Namespace, scores: dict[str, dict]) -> None:
        from torch.utils.tensorboard.summary import hparams

        simple = (bool, int, float, str)
        values = {
            key: value if isinstance(value, simple) else str(value)
            for key, value in decisive(vars(options)).items()
        }
        # Not by add_hparams: it would write what columns there are too, and with these from just one
        # run TensorBoard could not put the flags in which runs differ first.
        _, *session = hparams(values, {})
        with self._going_on():
            for summary in session:
                self.writer.file_writer.add_summary(summary)
            for name, metrics in scores.items():
                for metric, value in metrics.items():
                    self.writer.add_scalar(f"best/{name}_{metric}", value)

    @torch.no_grad()
    def sentences(
        self, model: torch.nn.Module, dataset: TaskDataset, batch_size: int, precision: str
    ) -> None:
        """The vectors of a dataset's first sentences, with labels, for TensorBoard's projector."""
        rows = np.arange(min(len(dataset), PROJECTED_ROWS))
        device, vectors = next(model.parameters()).device, []
        with autocast(device, precision):
            for start in range(0, len(rows), batch_size):
                part = {dataset.task.name: (dataset, rows[start : start + batch_size])}
                vectors.append(model.eval().vectors(collate(part).to(device)))
        vectors = torch.cat(vectors).double().cpu().numpy().round(3)  # all digits are written
        examples = [dataset.examples[row] for row in rows]
        shown = [(" ".join(each.sentences[0].split()), f"{each.label:g}") for each in examples]
        tag = f"{dataset.split}/{dataset.task.name}"
        with self._going_on():
            heads = ["sentence", "label"]
            self.writer.add_embedding(vectors, shown, metadata_header=heads, tag=tag)

    def show_profile(self, text: str) -> None:
        print(f"\n{text}\n")
        with self._going_on():
            self.writer.add_text("profile", text, self.n_steps)

    def close(self) -> None:
        with self._going_on():
            self.writer.close()

    @contextlib.contextmanager
    def _going_on(self):
        """A log that cannot be written (a full disk) is a warning, once; the run goes on."""
        try:
            yield
        except OSError as error:
            if not self.broken:
                text = f"{self.directory}: TensorBoard's log ends here ({error}); the run goes on"
                tqdm.write(f"warning: {text}", file=sys.stderr)
            self.broken = True


def describe_run(
    options,
    run: str,
    device,
    data: dict[str, dict[str, TaskDataset]],
    tokenizer,
    tagger: Tagger | None,
) -> None:
    """Show all options, one example per task as the model will see it, and how many rows of dev and
    test the training set gives away."""
    threads = torch.get_num_threads()
    print(f"run {run} on {device}, {threads} CPU threads, {current_versions()}")
    values = ", ".join(f"{key}={value}" for key, value in sorted(vars(options).items()))
    whole = dict(break_on_hyphens=False, break_long_words=False)
    print(textwrap.fill(f"options: {values}", 100, subsequent_indent="    ", **whole))
    for name, dataset in data["train"].items():
        rows, order = f"{len(dataset)} training rows", ""
        if dataset.both_orders:
            rows, order = f"{len(dataset) // 2} training rows", " in both orders"
        print(f"{name}: {rows}{order}; the first: label {dataset.labels[0]:g}")
        for column in dataset.columns:
            ids, *tags = column.row(0)
            pieces = tokenizer.pieces_of(ids)
            if tagger:
                pieces = [f"{piece}{tagger.describe(*each)}" for piece, *each in zip(pieces, *tags)]
            print(f"    {' '.join(pieces)}")
        others = [data[split][name].examples for split in SPLITS[1:]]
        known = dict(zip(SPLITS[1:], overlap(dataset.examples, *others)))
        rows = ", ".join(
            f"{n} of {len(data[split][name])} {split} rows" for split, n in known.items()
        )
        print(f"    known from training: {rows}")
