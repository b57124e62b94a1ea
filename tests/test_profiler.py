import contextlib
import io
import json
import random
import re
import time
from pathlib import Path
from typing import NamedTuple

import pytest
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


def test_a_profiled_run_shows_where_the_time_goes(profiled):
    (path,) = profiled.directory.glob("*.pt.trace.json")
    events = json.loads(path.read_text())["traceEvents"]
    steps = recorded_steps(events)
    times = breakdown(events, steps)
    assert f"5 steps recorded, {times['step']:,.0f} microseconds each" in profiled.shown
    row = r"^\| ([^|]+) \| (\d+) \| ([\d,]+) \| ([\d.]+) \|$"
    rows = re.findall(row, profiled.shown, re.M)
    assert len(rows) == 15 and "aten::baddbmm" in [row[0] for row in rows]  # attention's
    shares = [float(row[3]) for row in rows]
    assert shares == sorted(shares, reverse=True) and sum(shares) <= 100.5
    # What TensorBoard's plug-in reads from the same file:
    theirs = RunProfileData.parse("worker", "1", str(path), None).avg_costs.costs
    without_gaps = sum(end - start for start, end in steps) / len(steps)
    assert theirs[ProfileRole.Total] == pytest.approx(without_gaps, rel=1e-3)
    # Between the steps is the profiler's own time.
    assert without_gaps <= times["step"] < 1.5 * without_gaps
    ours = times["CPU execution"]
    assert theirs[ProfileRole.CpuOp] == pytest.approx(ours, rel=0.05)
    log = EventAccumulator(str(profiled.directory)).Reload()
    (text,) = log.Tensors("profile/text_summary")
    assert "| operator | calls a step" in text.tensor_proto.string_val[0].decode()


def test_profiling_changes_no_numbers(profiled, run, monkeypatch):
    """Without the flag, nothing is recorded."""
    monkeypatch.setattr(training, "StepProfiler", None)
    plain = run(10)
    assert plain.predictions == profiled.predictions
    assert not list(plain.directory.glob("*.json"))


def test_a_run_of_few_steps_shows_what_there_was(run, monkeypatch):
    """The evaluation after the last step is none of them."""
    predict = mc.evaluation.predict

    def slow_at_first(*arguments):
        monkeypatch.setattr(mc.evaluation, "predict", predict)
        time.sleep(2)
        return predict(*arguments)

    monkeypatch.setattr(mc.evaluation, "predict", slow_at_first)
    shown = run(5, "--profiler").shown
    assert mc.evaluation.predict is predict
    found = re.search(r"(\d) steps recorded, ([\d,]+) microseconds", shown)
    assert found[1] == "2" and int(found[2].replace(",", "")) < 1_000_000
    assert "an epoch of 3 steps or fewer is too short" in run(3, "--profiler").shown
