import json
import random
import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch_tb_profiler.profiler.data import RunProfileData
from torch_tb_profiler.profiler.event_parser import ProfileRole

import multitask_classifier as mc
import training
from profiler import KINDS, breakdown, length_of_union, steps_of

spans = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), max_size=12)


@given(spans)
def test_length_of_a_union_is_the_number_of_covered_microseconds(intervals):
    covered = {point for start, end in intervals for point in range(start, end)}
    assert length_of_union(intervals) == len(covered)


def event(category, start, duration, name="x", thread=1):
    return dict(ph="X", cat=category, name=name, ts=start, dur=duration, pid=1, tid=thread, args={})


def trace_of_a_gpu():
    """Two steps in which all kinds of events overlap at random."""
    chance = random.Random(3)
    steps = [(0, 1000), (1000, 900)]
    events = [
        event("user_annotation", start, duration, f"ProfilerStep#{number}")
        for number, (start, duration) in enumerate(steps)
    ]
    for start, duration in steps:
        # on each track one after the other; between them there are gaps
        for thread, category in enumerate(("kernel", "gpu_memcpy", "gpu_memset", "cpu_op"), 2):
            time = start + 5
            while (time := time + chance.randint(1, 60)) < start + duration - 70:
                length = chance.randint(1, 60)
                events.append(event(category, time, length, f"{category}{time}", thread))
                time += length
    for each in events:
        if each["cat"] != "user_annotation" and each["cat"] != "cpu_op":
            each["args"] = {"stream": 7, "device": 0, "correlation": each["ts"]}
    return events


def test_breakdown_agrees_with_a_count_of_microseconds():
    events = trace_of_a_gpu()
    kinds = dict.fromkeys(range(1900), "other")
    for kind in reversed(KINDS):
        for each in events:
            if each["cat"] in KINDS[kind]:
                kinds |= dict.fromkeys(range(each["ts"], each["ts"] + each["dur"]), kind)
    counts = {kind: list(kinds.values()).count(kind) / 2 for kind in (*KINDS, "other")}
    assert breakdown(events, steps_of(events)) == pytest.approx(counts | {"step": 950})
    assert all(counts.values())


def test_breakdown_agrees_with_tensorboards_profiler():
    events = trace_of_a_gpu()
    trace = {"schemaVersion": 1, "traceEvents": events, "distributedInfo": None}
    costs = RunProfileData.from_json("worker", "1", trace).avg_costs.costs
    found = breakdown(events, steps_of(events))
    names = dict(Kernel="kernel", Memcpy="memory copy", Memset="memory set", Total="step")
    names |= dict(CpuOp="CPU execution", Other="other")
    for theirs, ours in names.items():
        assert costs[ProfileRole[theirs]] == pytest.approx(found[ours]), ours


@pytest.fixture
def profiled(flags, tmp_path, capsys):
    flags = flags + ["--epochs", "1", "--samples_per_epoch", "160"]
    assert mc.main(flags + ["--profiler"]) == 0
    (directory,) = (tmp_path / "logdir").iterdir()
    return directory, capsys.readouterr().out


def test_a_profiled_run_shows_where_the_time_goes(profiled):
    directory, shown = profiled
    (path,) = directory.glob("*.pt.trace.json")
    events = json.loads(path.read_text())["traceEvents"]
    times = breakdown(events, steps_of(events))
    assert f"5 steps recorded, {times['step']:,.0f} microseconds each" in shown
    rows = re.findall(r"^\| ([^|]+) \| (\d+) \| ([\d,]+) \| ([\d.]+) \|$", shown, re.M)
    assert len(rows) == 15 and "aten::baddbmm" in [row[0] for row in rows]  # attention's
    shares = [float(row[3]) for row in rows]
    assert shares == sorted(shares, reverse=True) and sum(shares) <= 100.5
    # What TensorBoard's plug-in reads from the same file:
    theirs = RunProfileData.parse("worker", "1", str(path), None).avg_costs.costs
    steps = steps_of(events)
    without_gaps = sum(end - start for start, end in steps) / len(steps)
    assert theirs[ProfileRole.Total] == pytest.approx(without_gaps, rel=1e-3)
    assert (
        without_gaps <= times["step"] < 1.5 * without_gaps
    )  # the profiler's own time between them
    ours = times["CPU execution"]
    assert theirs[ProfileRole.CpuOp] == pytest.approx(ours, rel=0.05)
    log = EventAccumulator(str(directory)).Reload()
    (text,) = log.Tensors("profile/text_summary")
    assert "| operator | calls a step" in text.tensor_proto.string_val[0].decode()


def test_a_run_of_few_steps_shows_what_there_was(flags, monkeypatch, capsys):
    """The evaluation after the last one is none of them."""
    predict = mc.evaluation.predict

    def slow(*arguments):
        time.sleep(2)
        return predict(*arguments)

    monkeypatch.setattr(mc.evaluation, "predict", slow)
    chosen = flags + ["--profiler", "--samples_per_epoch"]
    assert mc.main(chosen + [str(16 * 5), "--epochs", "1"]) == 0
    found = re.search(r"(\d) steps recorded, ([\d,]+) microseconds", capsys.readouterr().out)
    assert found[1] == "2" and int(found[2].replace(",", "")) < 1_000_000
    assert mc.main(chosen + [str(16 * 3), "--epochs", "1"]) == 0
    assert "an epoch of 3 steps or fewer is too short" in capsys.readouterr().out


def test_profiling_changes_no_numbers(profiled, flags, tmp_path):
    expected = {path.name: path.read_bytes() for path in tmp_path.glob("*-*.csv")}
    assert mc.main(flags + ["--epochs", "1", "--samples_per_epoch", "160"]) == 0
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*-*.csv")} == expected


def test_without_the_flag_nothing_is_recorded(flags, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "StepProfiler", None)
    assert mc.main(flags + ["--epochs", "1"]) == 0
    assert not list((tmp_path / "logdir").glob("*/*.json"))
