"""All that a run changes as it goes on."""

import itertools
import math
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

import evaluation
from batches import Batch, EpochSampler, training_windows
from checkpoint import CHECKPOINT_FORMAT, checkpoint_content, digests, write_checkpoint
from optimizer import EACH_STEP, Sophia, build_optimizer, build_scheduler, freeze_and_unfreeze
from profiler import StepProfiler
from run_log import RunLog
from tasks import TASKS, sequences_per_row
from utils import (
    Terminated,
    UserError,
    agree,
    gather,
    n_processes,
    one_line,
    random_states,
    rank,
    restore_random_states,
    uninterrupted,
)


class Step(NamedTuple):
    """What an optimizer step gave."""

    losses: dict[str, Tensor]  # name -> scalar, on the device
    answers: list[tuple[str, Tensor, Tensor]]  # (task, labels, decoded outputs) of each batch
    problem: str | None = None  # why the step was not taken


class Training:
    """A run as it goes on: all that its steps change.

    Outside of `uninterrupted` blocks it stands between two steps, and `state` is all that a later
    process needs to `restore` it there and to come to the same numbers.
    """

    def __init__(self, model, tokenizer, tagger, data, options, path: Path, log: RunLog):
        self.model, self.tokenizer, self.tagger = model, tokenizer, tagger
        self.data, self.options, self.path, self.log = data, options, path, log
        freeze_and_unfreeze(model, options, epoch=0)
        self.average = (
            None  # of the weights over the steps, which is then what is evaluated and kept
        )
        if options.ema:
            average = torch.optim.swa_utils.get_ema_multi_avg_fn(options.ema)
            self.average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=average)
        self.optimizer = build_optimizer(model, options)
        self.scheduler = build_scheduler(self.optimizer, options)
        self.samplers = {
            name: EpochSampler(len(each), options.seed) for name, each in data["train"].items()
        }
        self.best = None  # mean dev score of the saved model
        self.scores, self.train_scores = {}, {}  # on dev and train, after the last epoch
        self.epoch = 0  # those that are over
        self.n_skipped = self.bad_steps = 0  # steps not taken, and of these the last ones in a row
        self.saving_seconds, self.saved_at = 0.0, time.monotonic()
        self.signals = []  # that have come and wait for an answer
        self.profiler = None
        if options.profiler and rank() == 0:
            device = next(model.parameters()).device
            self.profiler = StepProfiler(log.directory, device, log.show_profile)
        self._start_epoch()

    def _start_epoch(self) -> None:
        self.n_windows = 0  # of this epoch that are over
        self.answers = []
        self.drawn_from = {name: each.state_dict() for name, each in self.samplers.items()}
        self.began = time.perf_counter()

    def state(self) -> dict:
        """All processes must call it."""
        content = checkpoint_content(
            self.model, self.tokenizer, self.options, self.epoch, self.scores, self.tagger
        )
        return content | {
            "training": {
                "optimizer": self.optimizer.state_dict(),
                "average": self.average.state_dict() if self.average else None,
                "scheduler": self.scheduler.state_dict() if self.scheduler else None,
                "samplers": self.drawn_from,
                "of_processes": gather(
                    {"random": random_states(), "answers": answers_by_task(self.answers)}
                ),
                "best": self.best,
                "n_windows": self.n_windows,
                "train_scores": self.train_scores,
                "n_skipped": self.n_skipped,
                "bad_steps": self.bad_steps,
                "seconds": time.perf_counter() - self.began,
                "log": self.log.state(),
                "data": digests(self.data),
                "threads": torch.get_num_threads(),
                "processes": n_processes(),
            }
        }

    def restore(self, state: dict) -> None:
        """Go on from what `state` returned; the model has its weights already."""
        saved = state["training"]
        self.optimizer.load_state_dict(saved["optimizer"])
        if self.average:
            self.average.load_state_dict(saved["average"])
        if self.scheduler:
            self.scheduler.load_state_dict(saved["scheduler"])
        for name, sampler in self.samplers.items():
            sampler.load_state_dict(saved["samplers"][name])
        self.epoch, self.scores = state["epoch"], state["dev_scores"]
        self.train_scores = saved["train_scores"]
        self._start_epoch()
        self.n_windows, self.best = saved["n_windows"], saved["best"]
        parts = saved["of_processes"]
        if len(parts) == n_processes():
            self.answers = answers_from(parts[rank()]["answers"])
            restore_random_states(parts[rank()]["random"])
        elif rank() == 0:
            self.answers = [each for part in parts for each in answers_from(part["answers"])]
        self.n_skipped, self.bad_steps = saved["n_skipped"], saved["bad_steps"]
        self.began -= saved["seconds"]

    def save(self) -> None:
        """Write the state, which all processes must do together; a full disk costs no more than
        this."""
        start = time.perf_counter()
        self._write(self.state())
        self.saved_at = time.monotonic()
        self.saving_seconds += time.perf_counter() - start

    def save_finished(self) -> None:
        """All that is left of the state of a run that needs none any more."""
        content = {"format": CHECKPOINT_FORMAT, "options": vars(self.options)}
        tags = self.tagger.pipeline.to_dict() if self.tagger else None
        self._write(content | {"tags": tags, "training": "finished"})

    def _write(self, content: dict) -> None:
        try:
            write_checkpoint(self.path, content)
        except UserError as error:
            tqdm.write(f"warning: {error}; the run goes on", file=sys.stderr)

    @property
    def evaluated_model(self) -> nn.Module:
        """The model that is evaluated and kept: the moving average of the weights, if there is one."""
        return self.average.module if self.average else self.model

    def save_or_stop(self, due: bool = False) -> None:
        """Between two steps: save if it is time, end if a signal has come. All processes call it, and
        do what one of them wishes."""
        due = due or time.monotonic() - self.saved_at > 60 * self.options.save_interval
        came = [number in self.signals for number in (signal.SIGINT, signal.SIGTERM)]
        due, interrupted, terminated = agree(due, *came)
        if interrupted or terminated:
            self.signals.clear()
            raise Terminated if terminated else KeyboardInterrupt
        if due:
            self.save()

    def windows(self) -> Iterator[list[Batch]]:
        """What is left of this epoch: the batches of each optimizer step, with a progress bar."""
        options, model = self.options, self.model.train()
        windows = training_windows(
            self.data["train"],
            self.samplers,
            options.samples_per_epoch,
            options.batch_size,
            options.grad_accumulation,
            rank(),
            n_processes(),
            dict(zip(TASKS, options.batch_shares)),
            [name for name, weight in zip(TASKS, options.rdrop) if weight],
        )
        per_row = sum(
            share * sequences_per_row(name, model.encodings, options.rdrop)
            for name, share in zip(TASKS, options.batch_shares)
            if name in self.data["train"]
        )
        with tqdm(
            desc=f"epoch {self.epoch + 1}",
            unit=" sentences",
            initial=round(self._rows_seen() * per_row),
            total=round(options.samples_per_epoch * per_row),
        ) as self.bar:
            yield from itertools.islice(windows, self.n_windows, None)
            if self.profiler:
                self.profiler.close()
            with uninterrupted():
                self.log.flush(self.optimizer, self.bar)
        self.seconds = time.perf_counter() - self.began

    def _rows_seen(self) -> int:
        """Of each task, in this epoch."""
        rows = self.n_windows * self.options.batch_size * self.options.grad_accumulation
        return min(rows, self.options.samples_per_epoch)

    def record(self, step: Step, window: list[Batch]) -> None:
        """Take note of a step; average the weights, and change the learning rate."""
        if step.problem is None:
            self.bad_steps = 0
            if self.average:
                self.average.update_parameters(self.model)
            self.answers.extend(step.answers)
            self.log.step(step.losses, self.optimizer, self.bar)
        else:
            self.n_skipped += 1
            self.bad_steps += 1
        if self.options.scheduler in EACH_STEP:
            self.scheduler.step()
        self.n_windows += 1
        rows = self.bar.total * self._rows_seen() // self.options.samples_per_epoch
        self.bar.update(rows - self.bar.n)
        if self.profiler:
            self.profiler.step()
        if self.bad_steps >= self.options.max_bad_steps:
            self._give_up(window, step.problem)

    def _give_up(self, window: list[Batch], problem: str) -> None:
        """Save, and name the rows of the last step in a UserError."""
        self.save()
        ids = defaultdict(list)
        for name, row in itertools.chain(
            *gather([(n, r) for batch in window for n, rows in batch.rows.items() for r in rows])
        ):
            ids[name].append(self.data["train"][name].examples[row].id)
        rows = "; ".join(f"{name} {', '.join(each)}" for name, each in ids.items())
        raise UserError(
            f"{self.bad_steps} steps in a row were not finite ({problem}); saved: "
            f"{self.describe_saved()}; lower --lr or look at the rows of the last step, by id: {rows}"
        )

    def end_epoch(self, dev: dict[str, evaluation.Evaluation]) -> None:
        train = self.train_scores = train_scores(self.answers)
        self.scores = {name: each.scores for name, each in dev.items()}
        mean = evaluation.mean_score(self.scores)
        self.epoch += 1
        self.log.epoch(self.epoch, train, dev, mean)
        if self.options.scheduler == "plateau":
            self.scheduler.step(mean)
        kept = self._keep_if_best(mean)
        print(f"epoch {self.epoch}: {self.seconds:.0f} s, mean dev score {mean:.4f}{kept}")
        if self.n_skipped:
            print(f"  steps skipped so far, since not finite: {self.n_skipped}")
        if isinstance(self.optimizer, Sophia):
            print(f"  {self.log.curvature(self.optimizer)}")
        for name, scores in self.scores.items():
            train_text = evaluation.format_scores(train.get(name, {}))
            print(f"  {name}: train {train_text}; dev {evaluation.format_scores(scores)}")
        self._start_epoch()

    def _keep_if_best(self, mean: float) -> str:
        """Save the model if it is the best so far; what came of it, for people to read."""
        comparable = -math.inf if math.isnan(mean) else mean
        if self.best is not None and comparable <= self.best:  # the first always: a run ends with
            return ""  # a model
        checkpoint = self.path.with_suffix(".pt")
        content = checkpoint_content(
            self.evaluated_model, self.tokenizer, self.options, self.epoch, self.scores, self.tagger
        )
        start = time.perf_counter()
        try:
            write_checkpoint(checkpoint, content)
        except UserError as error:
            return f", not saved: {error}"
        self.saving_seconds += time.perf_counter() - start
        self.best = comparable
        return f", saved to {checkpoint}"

    def describe_saved(self) -> str:
        """What there is on the disk, for people to read."""
        checkpoint = self.path.with_suffix(".pt")
        model = f"the best model so far is {checkpoint}" if checkpoint.exists() else "no model yet"
        return f"{model}; go on with --resume {self.path}" if self.path.exists() else model


def answers_by_task(answers: list[tuple[str, Tensor, Tensor]]) -> dict[str, tuple[Tensor, Tensor]]:
    """task -> labels and decoded outputs, of all steps together, on the CPU."""
    by_task = defaultdict(list)
    for name, labels, decoded in answers:
        by_task[name].append((labels.cpu(), decoded.cpu()))
    return {name: tuple(map(torch.cat, zip(*pairs))) for name, pairs in by_task.items()}


def answers_from(by_task: dict[str, tuple[Tensor, Tensor]]) -> list[tuple[str, Tensor, Tensor]]:
    return [(name, *pair) for name, pair in by_task.items()]


def train_scores(answers: list[tuple[str, Tensor, Tensor]]) -> dict[str, dict[str, float]]:
    """Of the answers of all processes."""
    answers = [each for some in gather(answers_by_task(answers)) for each in answers_from(some)]
    by_task = defaultdict(list)
    for name, labels, predictions in answers:
        by_task[name].append(torch.stack([labels.float(), predictions.float()]).cpu())
    scores = {}
    for name, pairs in by_task.items():
        labels, predictions = torch.cat(pairs, dim=1).double().numpy()
        scores[name] = evaluation.score(TASKS[name], labels, predictions)
    return scores


def restored_training(*parts, path: Path, state: dict) -> Training:
    """Where the saved run stood; UserError if the state is not whole."""
    try:
        log = RunLog(Path(state["training"]["log"]["directory"]), state["training"]["log"])
        training = Training(*parts, path, log)
        training.restore(state)
    except (KeyError, TypeError, ValueError, AttributeError) as error:  # entries missing, or others
        raise UserError(f"{path}: a damaged state of a run ({one_line(error)})") from error
    print(f"resumed after {training.epoch} epochs and {training.n_windows} steps")
    print(f"TensorBoard log goes on in {log.directory}")
    return training
