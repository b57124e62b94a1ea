"""Runs in several processes, which torchrun starts, against the same run in one."""

import dataclasses
import json
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
from tasks import TASKS
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
    "learned weights": ["--loss_weights", "learned", "--rdrop", "sst=1"],
    "pcgrad, batches accumulated": [
        *("--gradient_surgery", "pcgrad", "--batch_size", "5", "--grad_accumulation", "3"),
        *("--samples_per_epoch", "300"),
    ],
    # the last step of an epoch has one row of each task, so that a process may have none of some
    "adamw, steps of one row": ["--batch_size", "1", "--samples_per_epoch", "20"],
    "sophiah, steps that lack tasks": [
        *("--optimizer", "sophiah", "--hess_interval", "3", "--batch_size", "2"),
        *("--samples_per_epoch", "40", "--batch_shares", "para=0.1,sts=0.3"),
    ],
    "sophiah, fewer rows than processes": [
        *("--optimizer", "sophiah", "--hess_interval", "2", "--lr", "1e-3", "--sst"),
        *("--batch_size", "1", "--samples_per_epoch", "20"),
    ],
}


def torchrun(flags, n_processes=2, script=ROOT / "multitask_classifier.py"):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", str(n_processes), script, *flags]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command, **pipes)


# Several runs, one after the other, in processes that are started once.
RUN_ALL = f"""
import json, sys
sys.path.insert(0, {str(ROOT)!r})
import multitask_classifier as mc
from options import parse_options

mc.join_processes()
for flags in json.loads(sys.argv[1]):
    mc.train_multitask(parse_options(flags))
mc.leave_processes()
"""


@pytest.fixture(scope="module")
def flags_in(tiny_directory, small_data, tmp_path_factory):
    """Flags of a run of 20 steps that writes into a folder, without dropout by default."""
    exact = tmp_path_factory.mktemp("exact") / "no-dropout"
    model = BertModel.from_pretrained(str(tiny_directory))
    rates = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model.config = dataclasses.replace(model.config, **rates)
    model.save_pretrained(exact)
    BertTokenizer.from_pretrained(str(tiny_directory)).save_pretrained(exact)

    def flags(folder, encoder=exact):
        places = [f"--{name}={folder / name}" for name in ("models_dir", "logdir", "cache_dir")]
        places += [
            f"--{name}_{split}_out={folder / f'{name}-{split}.csv'}"
            for name in TASKS
            for split in ("dev", "test")
        ]
        sizes = ["--epochs=1", f"--samples_per_epoch={16 * STEPS}", "--batch_size=16"]
        return [f"--bert_model={encoder}", f"--data_dir={small_data}", *places, *sizes]

    return flags


WITH_DROPOUT = ["--epochs=2", "--samples_per_epoch=640"]


@pytest.fixture(scope="module")
def two_processes(flags_in, tiny_directory, tmp_path_factory):
    """Folder with the runs of all settings in two processes, and one with dropout, `whole`."""
    folder = tmp_path_factory.mktemp("two")
    runs = [flags_in(folder / name) + more for name, more in SETTINGS.items()]
    runs.append(flags_in(folder / "whole", tiny_directory) + WITH_DROPOUT)
    script = folder / "run_all.py"
    script.write_text(RUN_ALL)
    run = torchrun([json.dumps(runs)], script=script)
    shown, errors = run.communicate(timeout=500)
    assert run.returncode == 0, errors
    assert len(re.findall(r"epoch 1: \d+ s", shown)) == len(runs)  # one process prints
    return folder


@pytest.mark.parametrize("name", SETTINGS)
def test_two_processes_give_what_one_gives(flags_in, two_processes, tmp_path, name):
    assert mc.main(flags_in(tmp_path) + SETTINGS[name]) == 0
    logs = []
    for folder in (tmp_path, two_processes / name):
        (directory,) = (folder / "logdir").iterdir()
        log = EventAccumulator(str(directory)).Reload()
        logs.append({t: [e.value for e in log.Scalars(t)] for t in log.Tags()["scalars"]})
    one, two = logs
    assert len(one["loss/sum"]) == STEPS and one.keys() == two.keys()
    for tag in one:
        if tag.startswith("loss/") and tag != "loss/balance":  # of each process's own sentences
            assert two[tag] == pytest.approx(one[tag], abs=1e-4), tag
        elif not tag.startswith(("sophia/", "tokens_per_second")):
            assert two[tag] == pytest.approx(one[tag], abs=2e-2), tag
    assert len(set(one["loss/sst"])) == STEPS


def wait_for(path):
    deadline = time.monotonic() + 60
    while not list(path.parent.glob(path.name)):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def processes_of(run):
    """Return the processes that torchrun has started."""
    found = subprocess.run(["pgrep", "-P", str(run.pid)], capture_output=True, text=True)
    return [int(pid) for pid in found.stdout.split()]


def test_a_stopped_run_continues_to_the_same_numbers(
    flags_in, two_processes, tiny_directory, tmp_path
):
    flags = flags_in(tmp_path, tiny_directory) + WITH_DROPOUT
    assert_continues_after(signal.SIGTERM, flags, tmp_path)
    assert_same(outcome(tmp_path), outcome(two_processes / "whole"))


def assert_continues_after(number, flags, folder):
    """With dropout, another one in each process."""
    run = torchrun(flags + OFTEN)
    wait_for(folder / "models_dir" / "*.resume")
    run.send_signal(number)
    _, errors = run.communicate(timeout=60)
    assert run.returncode != 0 and "continue with --resume" in errors
    done = torchrun(flags + ["--resume", "auto"])
    shown, errors = done.communicate(timeout=120)
    assert done.returncode == 0 and "resumed after" in shown, errors


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
        f"error: {tmp_path / 'none.csv'}: no such file; 'python datasets.py download' fetches the real "
        "data, --data_dir data/sample is a sample, and --sst_train and the like name files of your own"
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
