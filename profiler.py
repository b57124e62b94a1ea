"""Where the time of a training step goes: some steps recorded with torch.profiler."""

import json
from pathlib import Path

import numpy as np
import torch

from utils import one_line

SKIPPED, WARM_UP, RECORDED = 2, 1, 5  # steps; the first ones are slower than all others
TOP_OPERATORS = 15
# What a trace's events are, by its categories. Where several go on at once, the first one counts.
KINDS = {
    "kernel": {"kernel"},
    "memory copy": {"gpu_memcpy"},
    "memory set": {"gpu_memset"},
    "CPU execution": {"cpu_op", "cuda_runtime", "cuda_driver"},
}


class StepProfiler:
    """Records a few steps, once. `step` is to be called after each one.

    Args:
        directory: gets the trace, RUN.pt.trace.json, for Perfetto and TensorBoard.
        device: of the model.
        show: is given the breakdown, a Markdown text.
    """

    def __init__(self, directory: Path, device: torch.device, show):
        self.directory, self.device, self.show = directory, device, show
        activities = [torch.profiler.ProfilerActivity.CPU]
        if device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self.profile = torch.profiler.profile(
            activities=activities,
            schedule=torch.profiler.schedule(
                wait=SKIPPED, warmup=WARM_UP, active=RECORDED, repeat=1
            ),
            on_trace_ready=self._report,
            acc_events=True,
        )
        self.steps_left = SKIPPED + WARM_UP + RECORDED
        self.profile.start()

    def step(self) -> None:
        if self.steps_left:
            self.steps_left -= 1
            self.profile.step()
            if not self.steps_left:
                self.profile.stop()

    def close(self) -> None:
        """At the end of an epoch, which may have had fewer steps: what there is is shown."""
        if self.steps_left:
            self.profile.stop()
            if self.steps_left >= RECORDED:
                self.show(
                    f"--profiler: an epoch of {SKIPPED + WARM_UP} steps or fewer is too short"
                )
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
        steps = steps_of(events)[: RECORDED - self.steps_left]  # one more may have begun
        times = breakdown(events, steps)
        table = breakdown_table(times)
        if self.device.type != "cuda":
            table = operator_table(profile.key_averages(), steps)
        average = f"{len(steps)} steps recorded, {times['step']:,.0f} microseconds each"
        self.show(f"{average}\n\n{table}\n\nTrace: {path}")


def breakdown(events: list[dict], steps: list[tuple[float, float]]) -> dict[str, float]:
    """Microseconds of an average one of the steps by kind, from the events of a trace
    (`traceEvents`): "step" is all of it, "other" what no kind covers."""
    start, end = min(a for a, _ in steps), max(b for _, b in steps)
    covered, before, times = [], 0.0, {"step": (end - start) / len(steps)}
    for kind, categories in KINDS.items():
        covered += [
            (max(event["ts"], start), min(event["ts"] + event["dur"], end))
            for event in events
            if event.get("cat") in categories and "dur" in event
        ]
        together = length_of_union(covered)
        times[kind] = (together - before) / len(steps)
        before = together
    return times | {"other": times["step"] - before / len(steps)}


def steps_of(events: list[dict]) -> list[tuple[float, float]]:
    """(start, end) of the recorded steps in order, in microseconds."""
    return sorted(
        (event["ts"], event["ts"] + event["dur"])
        for event in events
        if event.get("cat") == "user_annotation" and event["name"].startswith("ProfilerStep#")
    )


def length_of_union(intervals: list[tuple[float, float]]) -> float:
    """How much of the axis is in at least one interval; those that end before they start are none."""
    intervals = np.array([each for each in sorted(intervals) if each[0] < each[1]]).reshape(-1, 2)
    if not len(intervals):
        return 0.0
    starts, ends = intervals.T
    reached = np.maximum.accumulate(ends)  # by this interval and all that start before it
    since = np.maximum(starts[1:], reached[:-1])
    return float(ends[0] - starts[0] + np.maximum(ends[1:] - since, 0).sum())


def breakdown_table(times: dict[str, float]) -> str:
    rows = [
        f"| {kind} | {time:,.0f} | {100 * time / times['step']:.1f} |"
        for kind, time in times.items()
    ]
    return "\n".join(["| average step | microseconds | per cent |", "| --- | --- | --- |", *rows])


def operator_table(averages, steps: list[tuple[float, float]]) -> str:
    """The operators that take most of the time of the CPU, without what they call."""
    averages = [each for each in averages if not each.key.startswith("ProfilerStep")]
    averages.sort(key=lambda each: -each.self_cpu_time_total)
    whole = sum(b - a for a, b in steps)
    rows = [
        f"| {each.key} | {each.count / len(steps):.0f} | "
        f"{each.self_cpu_time_total / len(steps):,.0f} | "
        f"{100 * each.self_cpu_time_total / whole:.1f} |"
        for each in averages[:TOP_OPERATORS]
    ]
    heads = ["| operator | calls a step | microseconds a step | per cent |", "| --- " * 4 + "|"]
    return "\n".join(heads + rows)
