"""Where the time of a training step goes: a few steps, recorded with torch.profiler."""

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch.autograd.profiler_util import FunctionEventAvg

from utils import one_line

# Numbers of steps. The first ones are slower than all others, on a GPU also those that are captured.
SKIPPED, SKIPPED_ON_GPU, WARM_UP, RECORDED = 2, 30, 1, 5
TOP_OPERATORS = 15
# Kinds of work, and the categories of a trace's events that belong to them. Where several run at the
# same time, the first one counts.
KINDS = {
    "kernel": {"kernel"},
    "memory copy": {"gpu_memcpy"},
    "memory set": {"gpu_memset"},
    "CPU execution": {"cpu_op", "cuda_runtime", "cuda_driver"},
}
Span = tuple[float, float]  # start and end, in microseconds


class StepProfiler:
    """Records a few steps, once. Call `step` after each step, and `close` at the end of an epoch.

    Args:
        directory: folder for the trace, RUN.pt.trace.json, which Perfetto and TensorBoard can show.
        device: device of the model.
        show: function that shows the breakdown, a Markdown text.
    """

    def __init__(self, directory: Path, device: torch.device, show: Callable[[str], None]):
        self.directory, self.device, self.show = directory, device, show
        activities = [torch.profiler.ProfilerActivity.CPU]
        if device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self.skipped = WARM_UP + (SKIPPED_ON_GPU if device.type == "cuda" else SKIPPED)
        waits = dict(wait=self.skipped - WARM_UP, warmup=WARM_UP)
        schedule = torch.profiler.schedule(**waits, active=RECORDED, repeat=1)
        self.profile = torch.profiler.profile(
            activities=activities, schedule=schedule, on_trace_ready=self._report, acc_events=True
        )
        self.steps_left = self.skipped + RECORDED
        self.profile.start()

    def step(self) -> None:
        """Count a step. After the last one that is recorded, show the breakdown."""
        if self.steps_left:
            self.steps_left -= 1
            self.profile.step()
            if not self.steps_left:
                self.profile.stop()

    def close(self) -> None:
        """Show the breakdown of the steps so far, if the epoch had fewer than are recorded."""
        if self.steps_left:
            self.profile.stop()
            if self.steps_left >= RECORDED:
                self.show(f"--profiler: an epoch of {self.skipped} steps or fewer is too short")
            self.steps_left = 0

    def _report(self, profile: torch.profiler.profile) -> None:
        if self.steps_left >= RECORDED:
            return
        path = self.directory / f"{self.directory.name}.pt.trace.json"
        try:
            profile.export_chrome_trace(str(path))
            events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
        except (OSError, ValueError, RuntimeError) as error:  # a full disk
            self.show(f"--profiler: {path} cannot be written ({one_line(error)})")
            return
        # One more step may have begun.
        steps = recorded_steps(events)[: RECORDED - self.steps_left]
        times = breakdown(events, steps)
        if self.device.type == "cuda":
            table = breakdown_table(times)
        else:
            table = operator_table(profile.key_averages(), steps)
        average = f"{len(steps)} steps recorded, {times['step']:,.0f} microseconds each"
        self.show(f"{average}\n\n{table}\n\nTrace: {path}")


def recorded_steps(events: list[dict[str, Any]]) -> list[Span]:
    """Return the spans of the recorded steps, in order."""
    return sorted(
        (event["ts"], event["ts"] + event["dur"])
        for event in events
        if event.get("cat") == "user_annotation" and event["name"].startswith("ProfilerStep#")
    )


def breakdown(events: list[dict[str, Any]], steps: list[Span]) -> dict[str, float]:
    """Return the microseconds of an average step by kind of work: "step" is the whole step, "other" the
    time that no kind covers. `events` are the `traceEvents` of a trace."""
    first, last = min(start for start, _ in steps), max(end for _, end in steps)
    covered: list[Span] = []
    before, times = 0.0, {"step": (last - first) / len(steps)}
    for kind, categories in KINDS.items():
        covered += [
            (max(event["ts"], first), min(event["ts"] + event["dur"], last))
            for event in events
            if event.get("cat") in categories and "dur" in event
        ]
        together = length_of_union(covered)
        times[kind] = (together - before) / len(steps)
        before = together
    return times | {"other": times["step"] - before / len(steps)}


def length_of_union(spans: Iterable[Span]) -> float:
    """Return how long at least one of the spans lasts. A span that ends before it starts is empty."""
    length, reached = 0.0, -math.inf
    for start, end in sorted(spans):
        length += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return length


def breakdown_table(times: dict[str, float]) -> str:
    """Return the breakdown as a Markdown table."""
    rows = [
        f"| {kind} | {time:,.0f} | {100 * time / times['step']:.1f} |"
        for kind, time in times.items()
    ]
    return "\n".join(["| average step | microseconds | per cent |", "| --- | --- | --- |", *rows])


def operator_table(averages: Iterable[FunctionEventAvg], steps: list[Span]) -> str:
    """Return a Markdown table of the operators that take most of the CPU's time, without the time of
    the operators that they call."""
    operators = [one for one in averages if not str(one.key).startswith("ProfilerStep")]
    operators.sort(key=lambda operator: -operator.self_cpu_time_total)
    whole = sum(end - start for start, end in steps)
    rows = [
        f"| {operator.key} | {operator.count / len(steps):.0f} | "
        f"{operator.self_cpu_time_total / len(steps):,.0f} | "
        f"{100 * operator.self_cpu_time_total / whole:.1f} |"
        for operator in operators[:TOP_OPERATORS]
    ]
    heads = ["| operator | calls a step | microseconds a step | per cent |", "| --- " * 4 + "|"]
    return "\n".join(heads + rows)
