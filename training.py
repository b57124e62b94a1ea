"""`Training`: everything that a run changes while it trains, how it is saved, and what it records."""

import argparse
import itertools
import math
import os
import signal
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

import batches
import evaluation
from batches import Batch, EpochSampler, row_multiples, training_windows
from bert import EncoderWithHeads
from checkpoint import (
    CHECKPOINT_FORMAT,
    Writer,
    checkpoint_content,
    data_digests,
    plain,
)
from curvature import LossScale
from datasets import TaskDataset
from graphs import StepGraphs
from optimizer import (
    STEP_SCHEDULES,
    AdamW,
    Sophia,
    build_optimizer,
    build_scheduler,
    freeze_and_unfreeze,
)
from processes import agree, copy_from_first, gather, n_processes, rank
from profiler import StepProfiler
from run_log import Progress, RunLog
from streams import complain
from tagging import Tagger
from tokenizer import BertTokenizer
from utils import (
    Terminated,
    UserError,
    cpu_features,
    half_dtype,
    keep_freed_memory,
    one_line,
    random_states,
    restore_random_states,
    seeded_generator,
    uninterrupted,
)


class Parts(NamedTuple):
    """The parts of a run before its first step."""

    model: EncoderWithHeads
    tokenizer: BertTokenizer
    tagger: Tagger | None
    data: dict[str, dict[str, TaskDataset]]  # split -> task -> dataset
    options: argparse.Namespace


class Answers(NamedTuple):
    """The answers to some rows of a task."""

    task: str
    labels: Tensor  # [n_rows]
    predictions: Tensor  # [n_rows], on the label's scale


class Step(NamedTuple):
    """The result of an optimizer step."""

    names: list[str]  # of the losses
    answers: list[Answers]  # of each batch and task
    # Loss, norm of the gradients, and their sum; then all losses. They are on their way to the host.
    check: Tensor
    arrival: torch.cuda.Event | None  # of `check`; None without a GPU

    @property
    def losses(self) -> dict[str, Tensor]:
        """name -> scalar, on the host. Read `problem` before."""
        return dict(zip(self.names, self.check[3:], strict=True))

    @property
    def problem(self) -> str | None:
        """Why the step was not taken; None if it was. Waits for the step, not for what follows it."""
        if self.arrival:
            self.arrival.synchronize()
        loss, norm, total = self.check[:3].tolist()
        finite = math.isfinite(total)
        return None if finite else f"loss {loss:g}, norm of the gradients {norm:g}"


def clip_and_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    losses: Mapping[str, Tensor],
    options: argparse.Namespace,
    scale: LossScale | None = None,
) -> tuple[Tensor, torch.cuda.Event | None]:
    """Clip the gradients and take the optimizer's step, if it is finite. Return its check and arrival.
    `losses` has their "sum". `scale` is that of the gradients, not of the losses."""
    loss = losses["sum"]
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    if scale:
        torch._foreach_div_(gradients, scale.factor)
    clip, norm = options.clip, nn.utils.get_total_norm(gradients).to(loss.device)
    total = norm + loss
    check = torch.stack([loss, norm, total, *losses.values()]).to("cpu", non_blocking=True)
    arrival = torch.cuda.current_stream().record_event() if loss.is_cuda else None
    # A GPU itself decides whether AdamW takes the step, and the host asks it one step later. On this
    # depends whether Sophia's next step makes an estimate, so Sophia has to wait here.
    if isinstance(optimizer, AdamW):
        grad_scale = ((norm + 1e-6) / clip).clamp_min(1) if clip else None
        optimizer.step(grad_scale=grad_scale, found_inf=1 - total.isfinite().float())
    elif total.isfinite():
        if clip:
            nn.utils.clip_grads_with_norm_(model.parameters(), clip, norm)
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if scale:
        scale.update(total.isfinite())
    return check, arrival


def update_average(average: AveragedModel, model: nn.Module) -> None:
    """Do what `average.update_parameters(model)` does, without its copy of a number to the GPU, for
    which the host would wait. The model has no buffers."""
    if average.n_averaged == 0:
        average.update_parameters(model)
        return
    averaged, own = ([p.detach() for p in m.parameters()] for m in (average.module, model))
    cast(Any, average.multi_avg_fn)(averaged, own, None)  # which does not use the number
    average.n_averaged += 1


class Training:
    """Everything that a run changes while it trains.

    Outside of `uninterrupted` blocks, it is between two steps. Then `state` returns all that a later
    process needs to `restore` it and to get the same numbers.
    """

    progress: Progress  # of this epoch

    def __init__(self, parts: Parts, path: Path, log: RunLog):
        self.model, self.tokenizer, self.tagger, self.data, self.options = parts
        self.path, self.log = path, log
        options, train = self.options, self.data["train"]
        freeze_and_unfreeze(self.model, options, epoch=0)
        # The moving average of the weights. If there is one, it is evaluated and kept.
        self.average: AveragedModel | None = None
        if options.ema:
            average = get_ema_multi_avg_fn(options.ema)
            self.average = AveragedModel(self.model, multi_avg_fn=average)
        self.optimizer = build_optimizer(self.model, options)
        self.device = next(self.model.parameters()).device
        is_float16 = half_dtype(self.device, options.precision) == torch.float16
        self.scale = LossScale(self.device) if is_float16 else None
        self.graphs = StepGraphs.of(self.model, options)
        self.writer = Writer(in_thread=self.device.type in batches.WORK_IN_THREADS)
        # The last step and its batches, while `settle` is to come.
        self.unsettled: tuple[Step, list[Batch]] | None = None
        self.optimizer.register_step_pre_hook(lambda *_: self.settle())
        self.scheduler = build_scheduler(self.optimizer, options)
        self.samplers = {
            name: EpochSampler(len(rows), options.seed, rows.both_orders)
            for name, rows in train.items()
        }
        self.dev = self.data["dev"]  # what is scored after each epoch
        if options.dev_rows:
            self.dev = {name: rows.sample(options.dev_rows) for name, rows in self.dev.items()}
        self.best: float | None = None  # dev score that selected the saved model
        # For each epoch: seconds, scores on train and on dev, mean score.
        self.history: list[tuple[float, evaluation.Scores, evaluation.Scores, float]] = []
        self.best_epoch = 0
        # Scores on dev after the last epoch, and on train during it (with dropout).
        self.scores: evaluation.Scores = {}
        self.train_scores: evaluation.Scores = {}
        self.epoch = 0  # finished epochs
        self.skipped_steps = 0
        self.consecutive_skips = 0
        self.saving_seconds, self.saved_at = 0.0, time.monotonic()
        self.signals: list[int] = []  # that arrived and wait for an answer
        self.profiler: StepProfiler | None = None
        if options.profiler and rank() == 0:
            self.profiler = StepProfiler(log.directory, self.device, log.show_profile)
        self._start_epoch()

    def _start_epoch(self) -> None:
        # A resumed run draws the rows of the epoch again, and skips the first `n_windows` steps.
        self.n_windows = 0  # steps of this epoch that are done
        self.answers: list[Answers] = []
        samplers = self.samplers.items()
        self.samplers_at_start = {name: sampler.state_dict() for name, sampler in samplers}
        self.began = time.perf_counter()
        n_rows = {name: len(dataset) for name, dataset in self.data["train"].items()}
        self.row_multiples = row_multiples(n_rows, self.options, self.epoch)

    # ------------------------------------------------------------------------ one epoch, step by step

    @property
    def evaluated_model(self) -> EncoderWithHeads:
        """The model that is evaluated and kept: the moving average of the weights, if there is one."""
        return cast(EncoderWithHeads, self.average.module) if self.average else self.model

    @property
    def is_over(self) -> bool:
        """Whether `--patience` is over: too many epochs without a better model."""
        patience = self.options.patience
        return patience is not None and self.epoch - self.best_epoch >= patience

    def windows(self) -> Iterator[list[Batch]]:
        """Yield the batches of each optimizer step that this epoch has left. Shows a progress bar, and
        at the end writes what the log and the profiler still hold."""
        options, train = self.options, self.data["train"]
        windows = training_windows(
            train,
            self.samplers,
            options.samples_per_epoch,
            options.batch_size,
            options.grad_accumulation,
            rank=rank(),
            n_processes=n_processes(),
            row_multiples=self.row_multiples,
            twice=[name for name, weight in options.rdrop.items() if weight],
        )
        self.model.train()
        total = round(options.samples_per_epoch * sum(self.row_multiples.values()))
        if not total:
            raise UserError("an epoch has no row; raise --samples_per_epoch or --batch_shares")
        self.progress = Progress(self.epoch + 1, self._rows_seen(), total)
        with self.progress.bar:
            yield from batches.ahead(itertools.islice(windows, self.n_windows, None), self.device)
            with uninterrupted():
                self.settle()
                self.log.flush(self.optimizer, self.progress.bar)
            if self.profiler:
                self.profiler.close()
        self.seconds = time.perf_counter() - self.began

    def _rows_seen(self) -> int:
        """Return the rows of all tasks that this epoch has seen."""
        rows = self.n_windows * self.options.batch_size * self.options.grad_accumulation
        multiples = sum(self.row_multiples.values())
        return round(min(rows, self.options.samples_per_epoch) * multiples)

    def record(self, step: Step, window: list[Batch]) -> None:
        """Settle a step: at once, or on a GPU just before the optimizer's next step, while the GPU is
        busy with gradients."""
        self.settle()
        self.unsettled = step, window
        if not step.arrival:
            self.settle()

    def settle(self) -> None:
        """Update everything that follows the last step: moving average, log, learning rate, progress bar.
        Raises UserError after too many steps in a row that were not taken."""
        if self.unsettled is None:
            return
        (step, window), self.unsettled = self.unsettled, None
        if (problem := step.problem) is None:
            self.consecutive_skips = 0
            if self.average:
                update_average(self.average, self.model)
            self.answers.extend(step.answers)
            values = step.losses | {"gradients/norm": step.check[1]}
            n_tokens = sum(len(batch.input_ids) for batch in window)
            self.log.step(values, self.optimizer, self.progress.bar, n_tokens)
        else:
            self.skipped_steps += 1
            self.consecutive_skips += 1
        if self.options.scheduler in STEP_SCHEDULES:
            self.scheduler.step()
        self.n_windows += 1
        self.progress.update(self._rows_seen())
        if self.profiler:
            self.profiler.step()
        if self.consecutive_skips >= self.options.max_bad_steps:
            self._give_up(window, problem)

    def _give_up(self, window: list[Batch], problem: str | None) -> None:
        """Save, print the rows of the last step, and raise UserError."""
        self.save()
        self.wait_for_writer()
        rows = [(name, row) for batch in window for name in batch.rows for row in batch.rows[name]]
        ids = defaultdict(list)
        for name, row in itertools.chain(*gather(rows)):
            examples = self.data["train"][name].examples
            ids[name].append(examples[row % len(examples)].id)
        named = "; ".join(f"{name} {', '.join(of_task)}" for name, of_task in ids.items())
        tqdm.write(f"rows of the last step, by id: {named}", file=sys.stderr)
        raise UserError(
            f"{self.consecutive_skips} steps in a row were not finite ({problem}); lower --lr, or look "
            f"at the rows named above; continue with --resume {self.path}"
        )

    def end_epoch(self, dev: Mapping[str, evaluation.Evaluation]) -> None:
        """Log and print the scores of an epoch, step the plateau schedule, and keep the model if it is
        the best so far."""
        answers = merged(itertools.chain(*gather(merged(self.answers))))
        self.train_scores = {
            name: evaluation.score(self.options.tasks[name], *(t.double().numpy() for t in pair))
            for name, *pair in answers
        }
        self.scores = {name: result.scores for name, result in dev.items()}
        mean = evaluation.mean_score(self.scores, self.options.select)
        self.epoch += 1
        samples = self.options.samples_per_epoch
        n_rows = {name: round(by * samples) for name, by in self.row_multiples.items()}
        self.log.epoch(self.epoch, self.train_scores, dev, mean, n_rows)
        if self.options.scheduler == "plateau":
            self.scheduler.step(mean)
        kept = self._keep_if_best(mean)
        which = self.options.select or "mean"
        print(f"epoch {self.epoch}: {self.seconds:.0f} s, {which} dev score {mean:.4f}{kept}")
        if self.is_over:
            print(f"  no better model for {self.options.patience} epochs; the run ends here")
        if self.skipped_steps:
            print(f"  steps skipped so far, because they were not finite: {self.skipped_steps}")
        if isinstance(self.optimizer, Sophia):
            print(f"  {self.log.curvature(self.optimizer)}")
        for name, n in n_rows.items():
            train_text = evaluation.format_scores(self.train_scores.get(name, {}))
            dev_text = evaluation.format_scores(self.scores.get(name, {})) or "none"
            print(f"  {name}: {n} rows, train {train_text}; dev {dev_text}")
        self.history.append((self.seconds, self.train_scores, self.scores, mean))
        self._start_epoch()

    def _keep_if_best(self, mean: float) -> str:
        """Save the model if it is the best so far. Return what to print about it."""
        self.wait_for_writer()  # whether the last best one is on the disk
        comparable = -math.inf if math.isnan(mean) else mean
        # The first model is always kept, so that a run ends with one.
        if self.best is not None and comparable <= self.best:
            return ""
        checkpoint = self.path.with_suffix(".pt")
        content = self._content(self.evaluated_model)
        before, self.best, self.best_epoch = (self.best, self.best_epoch), comparable, self.epoch
        start = time.perf_counter()

        def failed(error: UserError) -> None:  # in the first process only
            self.best, self.best_epoch = before
            complain(f"warning: the model of epoch {content['epoch']} is not saved: {error}")

        self.writer.write(checkpoint, content, failed)
        self.saving_seconds += time.perf_counter() - start
        return f", saved to {checkpoint}" if self.best_epoch == self.epoch else ", not saved"

    # --------------------------------------------------------------------------- saving and resuming

    def save_or_stop(self, due: bool = False) -> None:
        """Save if `due` or if the last save is older than --save_interval; end the run if a signal has
        arrived. All processes call this between two steps, and all of them do what one of them needs.
        """
        due = due or time.monotonic() - self.saved_at > 60 * self.options.save_interval
        arrived = [number in self.signals for number in (signal.SIGINT, signal.SIGTERM)]
        due, interrupted, terminated = agree(due, *arrived)
        if interrupted or terminated:
            self.signals.clear()
            raise Terminated if terminated else KeyboardInterrupt
        if due:
            self.save()

    def save(self, last: bool = False) -> None:
        """Write the state. All processes must call it together. A full disk is only a warning."""
        with uninterrupted():
            self.settle()
        if last:
            self.wait_for_writer()  # the state has to know what could not be written
        start = time.perf_counter()
        self._write(self.state())
        self.saved_at = time.monotonic()
        self.saving_seconds += time.perf_counter() - start

    def wait_for_writer(self) -> None:
        """Wait until everything is written. This time counts as saving."""
        start = time.perf_counter()
        self.writer.wait()
        self.saving_seconds += time.perf_counter() - start

    def save_finished(self) -> None:
        """Replace the state by a note that the run is finished and needs none."""
        content = {"format": CHECKPOINT_FORMAT, "options": plain(self.options)}
        tags = self.tagger.pipeline.to_dict() if self.tagger else None
        self._write(content | {"tags": tags, "training": "finished"})
        self.writer.wait()

    def _write(self, content: dict[str, Any]) -> None:
        def failed(error: UserError) -> None:
            complain(f"warning: {error}; the run continues")

        self.writer.write(self.path, content, failed)

    def _content(self, model: EncoderWithHeads) -> dict[str, Any]:
        """Return a checkpoint of the last epoch with the weights of `model`."""
        rest = self.tokenizer, self.options, self.epoch, self.scores, self.tagger
        return checkpoint_content(model, *rest)

    def state(self) -> dict[str, Any]:
        """Return the whole state. All processes must call it together."""
        content = self._content(self.model)
        own = {"random": random_states(), "answers": [tuple(a) for a in merged(self.answers)]}
        return content | {
            "training": {
                "optimizer": self.optimizer.state_dict(),
                "average": self.average.state_dict() if self.average else None,
                "scheduler": self.scheduler.state_dict() if self.scheduler else None,
                "loss_scale": vars(self.scale) if self.scale else None,
                "samplers": self.samplers_at_start,
                "of_processes": gather(own),
                "best": self.best,
                "best_epoch": self.best_epoch,
                "n_windows": self.n_windows,
                "train_scores": self.train_scores,
                "history": self.history,
                "skipped_steps": self.skipped_steps,
                "consecutive_skips": self.consecutive_skips,
                "seconds": time.perf_counter() - self.began,
                "log": self.log.state(),
                "data": data_digests(self.data),
                "threads": torch.get_num_threads(),
                "processes": n_processes(),
            }
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from a state. The model already has its weights."""
        saved = state["training"]
        self.optimizer.load_state_dict(saved["optimizer"])
        if self.average:
            self.average.load_state_dict(saved["average"])
        if self.scheduler:
            self.scheduler.load_state_dict(saved["scheduler"])
        if self.scale and saved["loss_scale"]:
            for name, value in saved["loss_scale"].items():
                getattr(self.scale, name).copy_(value)
        for name, sampler in self.samplers.items():
            sampler.load_state_dict(saved["samplers"][name])
        self.epoch, self.scores = state["epoch"], state["dev_scores"]
        self.train_scores, self.history = saved["train_scores"], list(saved["history"])
        self._start_epoch()
        self.n_windows = saved["n_windows"]
        self.best, self.best_epoch = saved["best"], saved["best_epoch"]
        processes = saved["of_processes"]
        if len(processes) == n_processes():
            mine = processes[rank()]
            self.answers = [Answers(*answers) for answers in mine["answers"]]
            restore_random_states(mine["random"])
        elif rank() == 0:
            self.answers = [Answers(*a) for process in processes for a in process["answers"]]
        self.skipped_steps = saved["skipped_steps"]
        self.consecutive_skips = saved["consecutive_skips"]
        self.began -= saved["seconds"]

    def print_epochs(self) -> None:
        """Print a table of the epochs, with the first score of each task on train and dev."""
        names = list(self.options.tasks)
        table = [["epoch", "seconds", *names, self.options.select or "mean", ""]]
        for epoch, (seconds, *scores, mean) in enumerate(self.history, 1):
            cells = []
            for name in names:
                firsts = [next(iter(split.get(name, {}).values()), math.nan) for split in scores]
                cells.append("/".join(f"{value:.3f}" for value in firsts))
            best = "best" if epoch == self.best_epoch else ""
            table.append([f"{epoch}", f"{seconds:.0f}", *cells, f"{mean:.4f}", best])
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        print("\ntrain/dev scores after each epoch")
        for row in table:
            print("  ".join(map(str.ljust, row, widths)).rstrip())

    def print_costs(self, seconds: float) -> None:
        """Print how much of the training time was spent on saving, and the peak memory of a GPU."""
        print(f"saving took {self.saving_seconds:.1f} s of {seconds:.0f} s")
        if self.device.type == "cuda":
            # Reserved: a CUDA graph keeps memory that is not allocated between its replays.
            peak = torch.cuda.max_memory_reserved(self.device) / 2**20
            print(f"memory of {torch.cuda.get_device_name(self.device)}: {peak:,.0f} MB at most")

    def describe_saved(self) -> str:
        """Return what is on the disk, when all is written, for people to read."""
        self.writer.wait()
        checkpoint = self.path.with_suffix(".pt")
        none = "no epoch is done yet, so there is no model"
        model = f"the best model so far is {checkpoint}" if checkpoint.exists() else none
        return f"{model}; continue with --resume {self.path}" if self.path.exists() else model


def merged(answers: Iterable[Answers]) -> list[Answers]:
    """Merge the answers to each task, on the CPU."""
    by_task = defaultdict(list)
    for name, labels, predictions in answers:
        by_task[name].append((labels.cpu(), predictions.cpu()))
    return [
        Answers(name, *map(torch.cat, zip(*pairs, strict=True))) for name, pairs in by_task.items()
    ]


def restored_training(parts: Parts, path: Path, state: Mapping[str, Any]) -> Training:
    """Return a saved run as it was. Raises UserError if its state is not complete."""
    try:
        saved = state["training"]["log"]
        training = Training(parts, path, RunLog(Path(saved["directory"]), saved))
        training.restore(state)
    # A damaged state lacks entries, or has others in their place.
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: a damaged state of a run ({one_line(error)})") from error
    print(f"resumed after {training.epoch} epochs and {training.n_windows} steps")
    print(f"TensorBoard log continues in {training.log.directory}")
    return training


def prepare_device(
    model: EncoderWithHeads, device: torch.device, options: argparse.Namespace
) -> None:
    """Move the model to the device, with the same weights and another dropout in each process."""
    if options.deterministic:
        # cuBLAS reads it when it starts.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    if options.optimizer == "sophiah":
        keep_freed_memory()
    if device.type == "cpu" and options.precision == "bfloat16" and not cpu_features():
        warnings.warn("this CPU has no bfloat16 instructions; --precision float32 is faster here")
    copy_from_first([*model.to(device).state_dict().values()])
    if rank():  # a seed of its own for each process
        torch.manual_seed(seeded_generator(device, options.seed, rank()).initial_seed())
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
