"""Tests of reliability that take many minutes; `./run_tests.sh --endurance` runs them."""

import json
import signal
import subprocess
import sys

import pytest
from conftest import ROOT
from test_data_parallel import (  # noqa: F401
    WITH_DROPOUT,
    assert_continues_after,
    flags_in,
    two_processes,
)
from test_resume import (  # noqa: F401
    OPTIMIZERS,
    assert_same,
    kill_often,
    outcome,
    outcomes,
    uninterrupted,
)

STEPS_PER_EPOCH = 200
WARM_UP = 4
SOAK = f"""
import ctypes, gc, json, os, sys, time
sys.path.insert(0, {str(ROOT)!r})
import multitask_classifier as mc

def resident():
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what is kept free, here more, there less, is in no use
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

seen, step = [], mc.training_step
def training_step(*arguments):
    if not seen or len(seen[-1]["times"]) == {STEPS_PER_EPOCH}:
        seen.append(dict(memory=resident(), files=len(os.listdir("/proc/self/fd")), times=[]))
    start = time.perf_counter()
    result = step(*arguments)
    seen[-1]["times"].append(time.perf_counter() - start)
    return result

mc.training_step = training_step
code = mc.main(sys.argv[1:])
print(json.dumps(seen))
sys.exit(code)
"""


@pytest.mark.parametrize("optimizer", ["adamw", "sophiah"])
def test_kill_9_at_20_random_moments(flags, tmp_path, uninterrupted, optimizer):  # noqa: F811
    chosen = ["--epochs", "60", *OPTIMIZERS[optimizer]]
    killed = kill_often(flags + chosen, 20, 5.0)
    assert len(killed) == 20 and len(set(killed)) >= 8  # all over the run
    assert_same(outcome(tmp_path), uninterrupted(*chosen))
    assert not list((tmp_path / "models_dir").glob(".*.tmp"))


@pytest.mark.parametrize("optimizer", ["adamw", "sophiah", "sophiag"])
def test_soak(flags, optimizer, capsys):
    """2,000 steps in 10 epochs, with all that an epoch does. The first 800 steps are for warming up:
    the allocator's free lists fill."""
    chosen = ["--epochs", "10", "--batch_size", "8", "--save_interval", "0.01"]
    chosen += ["--samples_per_epoch", str(8 * STEPS_PER_EPOCH), *OPTIMIZERS[optimizer]]
    done = subprocess.run(
        [sys.executable, "-c", SOAK, *flags, *chosen], stdout=subprocess.PIPE, text=True
    )
    assert done.returncode == 0
    epochs = json.loads(done.stdout.splitlines()[-1])
    assert len(epochs) == 10
    rates = [STEPS_PER_EPOCH / sum(epoch["times"]) for epoch in epochs]
    memory = [epoch["memory"] / 2**20 for epoch in epochs]
    with capsys.disabled():
        print(
            f"\n{optimizer}: {rates[0]:.1f} steps/s in the first epoch, {rates[-1]:.1f} in the last;",
            end=" ",
        )
        print(f"{memory[WARM_UP]:.1f} MB after 800 steps, {memory[-1]:.1f} MB after 1,800")
    assert memory[-1] < 1.02 * memory[WARM_UP]
    assert epochs[-1]["files"] == epochs[WARM_UP]["files"]


def test_ctrl_c_stops_several_processes(
    flags_in, two_processes, tiny_directory, tmp_path  # noqa: F811
):
    flags = flags_in(tmp_path, tiny_directory) + WITH_DROPOUT
    assert_continues_after(signal.SIGINT, flags, tmp_path)
    assert_same(outcome(tmp_path), outcome(two_processes / "whole"))
