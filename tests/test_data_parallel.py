"""Runs in several processes, which torchrun starts, against the same run in one."""

import dataclasses
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_resume import OFTEN, assert_same, outcome

import multitask_classifier as mc
from bert import BertModel
from tokenizer import BertTokenizer

STEPS = 20
SETTINGS = {
    "adamw, layers frozen, batches accumulated": [
        *("--batch_size", "5", "--grad_accumulation", "3", "--samples_per_epoch", "150"),
        *("--epochs", "2", "--unfreeze_interval", "1"),
    ],
    "sophiah, a task left out": [
        *("--optimizer", "sophiah", "--hess_interval", "3", "--sst", "--sts", "--clip", "0.1"),
    ],
    "sophiag, hard mixture of experts": [
        *("--moe", "hard", "--moe_balance", "0", "--optimizer", "sophiag", "--hess_interval", "3"),
    ],
    "sophiag": ["--optimizer", "sophiag", "--hess_interval", "3", "--loss_weights", "1,2,0.5"],
    "adamw, pairs both ways, R-Drop, average, other shares": [
        *(
            "--para_encoding",
            "both",
            "--sts_encoding",
            "cross",
            "--rdrop",
            "1,0.5,0",
            "--ema",
            "0.8",
        ),
        *("--batch_shares", "1,1.5,0.5", "--scheduler", "linear", "--layer_lr_decay", "0.9"),
        *("--sst_loss", "ordinal", "--label_smoothing", "0.1"),
    ],
    # the last step of an epoch has one row of each task, so that a process may have none of some
    "adamw, steps of one row": ["--batch_size", "1", "--samples_per_epoch", "20"],
    "sophiah, fewer rows than processes": [
        *("--optimizer", "sophiah", "--hess_interval", "2", "--lr", "1e-3", "--sst"),
        *("--batch_size", "1", "--samples_per_epoch", "20"),
    ],
}


def torchrun(flags, n_processes=2, **more):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", str(n_processes), ROOT / "multitask_classifier.py"]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command + flags, **pipes, **more)


@pytest.fixture
def exact_flags(flags, tmp_path, tiny_directory):
    """Of a run of 20 steps without dropout."""
    directory = tmp_path / "no-dropout"
    model = BertModel.from_pretrained(str(tiny_directory))
    rates = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model.config = dataclasses.replace(model.config, **rates)
    model.save_pretrained(directory)
    BertTokenizer.from_pretrained(str(tiny_directory)).save_pretrained(directory)
    flags = [str(directory) if each == str(tiny_directory) else each for each in flags]
    return flags + ["--epochs", "1", "--samples_per_epoch", str(16 * STEPS)]


@pytest.mark.parametrize("name", SETTINGS)
def test_two_processes_give_what_one_gives(exact_flags, tmp_path, name):
    flags = exact_flags + SETTINGS[name]
    places = str(tmp_path), str(tmp_path / "two")
    run = torchrun([each if "no-dropout" in each else each.replace(*places) for each in flags])
    assert mc.main(flags) == 0
    shown, errors = run.communicate(timeout=120)
    assert run.returncode == 0, errors
    assert shown.count("epoch 1: ") == 1  # one process speaks
    logs = []
    for folder in (tmp_path, tmp_path / "two"):
        (directory,) = (folder / "logdir").iterdir()
        log = EventAccumulator(str(directory)).Reload()
        logs.append({t: [e.value for e in log.Scalars(t)] for t in log.Tags()["scalars"]})
    one, two = logs
    assert len(one["loss/sum"]) == STEPS and one.keys() == two.keys()
    for tag in one:
        if tag.startswith("loss/") and tag != "loss/balance":  # of each process's own sentences
            assert two[tag] == pytest.approx(one[tag], abs=1e-4), tag
        elif not tag.startswith("sophia/"):
            assert two[tag] == pytest.approx(one[tag], abs=2e-2), tag
    assert len(set(one["loss/sst"])) == STEPS


def wait_for(path):
    deadline = time.monotonic() + 60
    while not list(path.parent.glob(path.name)):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def processes_of(run):
    """Those that torchrun has started."""
    found = subprocess.run(["pgrep", "-P", str(run.pid)], capture_output=True, text=True)
    return [int(each) for each in found.stdout.split()]


def test_a_stopped_run_goes_on_to_the_same_numbers(flags, tmp_path):
    assert_goes_on_after(signal.SIGTERM, flags, tmp_path)


def assert_goes_on_after(number, flags, tmp_path):
    """With dropout, another one in each process."""
    flags += ["--samples_per_epoch", "640"]
    whole = torchrun([flag.replace(str(tmp_path), str(tmp_path / "whole")) for flag in flags])
    _, errors = whole.communicate(timeout=120)
    assert whole.returncode == 0, errors
    run = torchrun(flags + OFTEN)
    wait_for(tmp_path / "models_dir" / "*.resume")
    run.send_signal(number)
    _, errors = run.communicate(timeout=60)
    assert run.returncode != 0 and "go on with --resume" in errors
    done = torchrun(flags + ["--resume", "auto"])
    shown, errors = done.communicate(timeout=120)
    assert done.returncode == 0 and "resumed after" in shown, errors
    assert_same(outcome(tmp_path), outcome(tmp_path / "whole"))


def test_a_process_that_dies_ends_the_run(flags, tmp_path):
    run = torchrun(flags + OFTEN + ["--epochs", "1000"])
    wait_for(tmp_path / "models_dir" / "*.resume")
    _, second = processes_of(run)
    os.kill(second, signal.SIGKILL)
    _, errors = run.communicate(timeout=60)
    assert run.returncode != 0
    assert "another process of this run has ended" in errors


def test_bad_input_is_said_once(flags, tmp_path):
    run = torchrun(flags + ["--sst_dev", str(tmp_path / "none.csv")])
    _, errors = run.communicate(timeout=60)
    assert run.returncode != 0
    assert re.findall(r"^error: .*", errors, re.M) == [
        f"error: {tmp_path / 'none.csv'}: no such file; run 'python datasets.py download' for the "
        "real data, or give --data_dir data/sample for the sample"
    ]


def test_a_checkpoint_is_evaluated_by_all(flags, tmp_path):
    assert mc.main(flags) == 0
    expected = outcome(tmp_path)[1]
    (checkpoint,) = (tmp_path / "models_dir").glob("*.pt")
    for path in tmp_path.glob("*-*.csv"):
        path.unlink()
    run = torchrun(flags + ["--evaluate", str(checkpoint)], 3)
    _, errors = run.communicate(timeout=60)
    assert run.returncode == 0, errors
    found = {path.name: path.read_text() for path in tmp_path.glob("*-*.csv")}
    assert found.keys() == expected.keys()
    for name in found:
        rows = [line.split("\t") for line in found[name].splitlines()]
        wanted = [line.split("\t") for line in expected[name].decode().splitlines()]
        assert [row[0] for row in rows] == [row[0] for row in wanted]
        values, others = ([float(row[1]) for row in each[1:]] for each in (rows, wanted))
        torch.testing.assert_close(torch.tensor(values), torch.tensor(others), rtol=0, atol=1e-4)
