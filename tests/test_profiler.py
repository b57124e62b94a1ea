import contextlib
import io
import json
import random
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from conftest import SAMPLE
from hypothesis import given
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch_tb_profiler.profiler.data import RunProfileData
from torch_tb_profiler.profiler.event_parser import ProfileRole

import multitask_classifier as mc
import training
from profiler import KINDS, breakdown, length_of_union, recorded_steps

spans = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), max_size=12)


@given(spans)
def test_length_of_a_union_is_the_number_of_covered_microseconds(intervals):
    covered = {point for start, end in intervals for point in range(start, end)}
    assert length_of_union(intervals) == len(covered)


def trace_event(category, start, duration, name="x", thread=1):
    return dict(ph="X", cat=category, name=name, ts=start, dur=duration, pid=1, tid=thread, args={})


def trace_of_a_gpu():
    """Two steps in which all kinds of events overlap at random."""
    chance = random.Random(3)
    steps = [(0, 1000), (1000, 900)]
    events = [
        trace_event("user_annotation", start, duration, f"ProfilerStep#{number}")
        for number, (start, duration) in enumerate(steps)
    ]
    for start, duration in steps:
        # The events of a track follow one another, with gaps between them.
        for thread, category in enumerate(("kernel", "gpu_memcpy", "gpu_memset", "cpu_op"), 2):
            time = start + 5
            while (time := time + chance.randint(1, 60)) < start + duration - 70:
                length = chance.randint(1, 60)
                events.append(trace_event(category, time, length, f"{category}{time}", thread))
                time += length
    for event in events:
        if event["cat"] not in ("user_annotation", "cpu_op"):
            event["args"] = {"stream": 7, "device": 0, "correlation": event["ts"]}
    return events


def test_breakdown_agrees_with_a_count_of_microseconds():
    events = trace_of_a_gpu()
    kinds = dict.fromkeys(range(1900), "other")
    for kind in reversed(KINDS):
        for event in events:
            if event["cat"] in KINDS[kind]:
                kinds |= dict.fromkeys(range(event["ts"], event["ts"] + event["dur"]), kind)
    counts = {kind: list(kinds.values()).count(kind) / 2 for kind in (*KINDS, "other")}
    assert breakdown(events, recorded_steps(events)) == pytest.approx(counts | {"step": 950})
    assert all(counts.values())


def test_breakdown_agrees_with_tensorboards_profiler():
    events = trace_of_a_gpu()
    trace = {"schemaVersion": 1, "traceEvents": events, "distributedInfo": None}
    costs = RunProfileData.from_json("worker", "1", trace).avg_costs.costs
    found = breakdown(events, recorded_steps(events))
    names = dict(Kernel="kernel", Memcpy="memory copy", Memset="memory set", Total="step")
    names |= dict(CpuOp="CPU execution", Other="other")
    for theirs, ours in names.items():
        assert costs[ProfileRole[theirs]] == pytest.approx(found[ours]), ours


class Run(NamedTuple):
    directory: Path  # TensorBoard's
    shown: str  # on the screen
    predictions: dict[str, bytes]  # file name -> content


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_directory):
    """Train for some steps of 64 sentences. Nearly all have the same length, so that attention is a
    large part of a step."""
    cache = tmp_path_factory.mktemp("cache")

    def run(n_steps, *flags):
        folder = tmp_path_factory.mktemp("run")
        flags = [*flags, "--bert_model", str(tiny_directory), "--data_dir", str(SAMPLE)]
        flags += ["--cache_dir", str(cache), "--smoketest", "--sst", "--max_length", "32"]
        flags += ["--epochs", "1", "--batch_size", "64", "--samples_per_epoch", str(64 * n_steps)]
        for name in ("models_dir", "logdir", "predictions_dir"):
            flags += [f"--{name}", str(folder / name)]
        with contextlib.redirect_stdout(io.StringIO()) as shown:
            assert mc.main(flags) == 0
        (directory,) = (folder / "logdir").iterdir()
        predictions = (folder / "predictions_dir").glob("*.csv")
        predictions = {path.name: path.read_bytes() for path in predictions}
        return Run(directory, shown.getvalue(), predictions)

    return run


@pytest.fixture(scope="module")
def profiled(run):
    return run(10, "--profiler")


def trace_of(run):
    (path,) = run.directory.glob("*.pt.trace.json")
    return path, json.loads(path.read_text())["traceEvents"]


def test_a_profiled_run_shows_where_the_time_goes(profiled):
    """What it prints is in the trace. How long anything takes is not asserted."""
    _, events = trace_of(profiled)
    steps = recorded_steps(events)
    assert len(steps) == 5
    average = (steps[-1][1] - steps[0][0]) / 5
    assert f"5 steps recorded, {average:,.0f} microseconds each" in profiled.shown
    row = r"^\| ([^|]+) \| (\d+) \| ([\d,]+) \| ([\d.]+) \|$"
    rows = re.findall(row, profiled.shown, re.M)
    kinds = "cpu_op", "user_annotation"
    operators = [event for event in events if event.get("cat") in kinds]
    lasted, calls, outermost, reached = Counter(), Counter(), Counter(), Counter()
    for event in sorted(operators, key=lambda event: (event["ts"], -event["dur"])):
        name, end = event["name"], event["ts"] + event["dur"]
        calls[name] += 1
        lasted[name] += event["dur"]
        # A call that only passes on to another one of the same name counts once or twice.
        outermost[name] += end > reached[name, event["tid"]]
        reached[name, event["tid"]] = max(end, reached[name, event["tid"]])
    assert len(rows) == 15 < len(calls)
    for name, n_calls, microseconds, _ in rows:
        assert round(outermost[name] / 5) <= int(n_calls) <= round(calls[name] / 5), name
        # Without the time of the operators that it calls.
        assert 0 < int(microseconds.replace(",", "")) <= lasted[name] / 5 + 1
    # Attention's product of matrices, in two layers.
    assert calls["aten::baddbmm"] >= 10
    shares = [float(row[3]) for row in rows]
    assert shares == sorted(shares, reverse=True) and sum(shares) <= 100.5
    log = EventAccumulator(str(profiled.directory)).Reload()
    (text,) = log.Tensors("profile/text_summary")
    assert "| operator | calls a step" in text.tensor_proto.string_val[0].decode()


def test_tensorboards_profiler_reads_the_same_from_the_trace(profiled):
    """Step by step: it does not count the time between the steps, which is the profiler's own."""
    path, events = trace_of(profiled)
    theirs = RunProfileData.parse("worker", "1", str(path), None).avg_costs.costs
    steps = recorded_steps(events)
    each = [breakdown(events, [step]) for step in steps]
    mean = {kind: sum(times[kind] for times in each) / len(each) for kind in each[0]}
    assert theirs[ProfileRole.Total] == pytest.approx(mean["step"], rel=1e-3)
    assert theirs[ProfileRole.CpuOp] == pytest.approx(mean["CPU execution"], rel=1e-3)
    together = breakdown(events, steps)
    assert together["step"] >= mean["step"]
    assert together["CPU execution"] >= mean["CPU execution"] * (1 - 1e-6)


def test_profiling_changes_no_numbers(profiled, run, monkeypatch):
    """Without the flag, nothing is recorded."""
    monkeypatch.setattr(training, "StepProfiler", None)
    plain = run(10)
    assert plain.predictions == profiled.predictions
    assert not list(plain.directory.glob("*.json"))


def test_a_run_of_few_steps_shows_what_there_was(run, monkeypatch):
    """The evaluation after the last step is not recorded."""
    outputs = mc.evaluation.outputs

    def marked(*arguments):
        with torch.profiler.record_function("evaluation"):
            return outputs(*arguments)

    monkeypatch.setattr(mc.evaluation, "outputs", marked)
    profiled = run(5, "--profiler")
    _, events = trace_of(profiled)
    assert "evaluation" not in {event["name"] for event in events}
    first, second = recorded_steps(events)[:2]
    average = (second[1] - first[0]) / 2
    assert f"2 steps recorded, {average:,.0f} microseconds each" in profiled.shown
    assert "an epoch of 3 steps or fewer is too short" in run(3, "--profiler").shown
