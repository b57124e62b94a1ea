"""Searches for hyper-parameters, on real Ray clusters of this machine."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, SAMPLE
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import multitask_classifier as mc
from options import SEARCH_SPACE, parse_options

MAIN = [sys.executable, "-u", ROOT / "multitask_classifier.py"]
PIPES = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture
def search_flags(flags):
    """Of a search of four short trials."""
    flags = flags[: flags.index("--batch_size")]
    return flags + ["--hpo", "--hpo_trials", "4", "--hpo_cpus", "1", "--batch_size", "16"]


def free_port():
    with socket.socket() as it:
        it.bind(("127.0.0.1", 0))
        return it.getsockname()[1]


@pytest.fixture(autouse=True)
def ray_environment(tmp_path, monkeypatch):
    """Clusters of these tests are closed to others, and have the priority of the tests."""
    (tmp_path / "token").write_text("0123456789abcdef" * 4)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setenv("RAY_worker_niceness", "0")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")


@contextlib.contextmanager
def ray_nodes(n):
    """The address of a cluster of nodes with one core, and the processes that keep them."""
    address, nodes = f"127.0.0.1:{free_port()}", []
    places = [["--head", "--port", address.split(":")[1]], *[["--address", address]] * (n - 1)]
    try:
        for place in places:
            command = [Path(sys.executable).with_name("ray"), "start", "--block", "--num-cpus", "1"]
            pipe = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            pipe["env"] = os.environ | {"RAY_AUTH_MODE": "token"}
            nodes.append(subprocess.Popen(command + place, **pipe, start_new_session=True))
            shown = ""
            while "Ray runtime started" not in shown:
                assert (line := nodes[-1].stdout.readline()), shown
                shown += line
        yield address, nodes
    finally:
        for node in nodes:
            kill_node(node)


def descendants(pid):
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True).stdout
    for child in map(int, found.split()):
        yield child
        yield from descendants(child)


def kill_node(node):
    for pid in [node.pid, *descendants(node.pid)]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    node.wait()


def rows_of(shown):
    lines = [line for line in shown.splitlines() if line.startswith("| ")]
    heads, _, *rows = [[cell.strip() for cell in line[1:-1].split("|")] for line in lines]
    return [dict(zip(heads, row, strict=True)) for row in rows]


def test_a_search_on_two_nodes_survives_the_loss_of_one(search_flags, tmp_path, capsys):
    with ray_nodes(2) as (address, nodes):
        run = subprocess.Popen(MAIN + search_flags + ["--ray_address", address], **PIPES)
        shown = ""
        while "epoch" not in (line := run.stdout.readline()):
            shown += line
            assert line, run.stderr.read()
        kill_node(nodes[1])
        rest, errors = run.communicate(timeout=240)
    shown += line + rest
    assert run.returncode == 0, errors
    assert "2 nodes; 1 cores and 0 GPUs for each trial" in shown
    assert "its process or node has died; it goes on" in shown
    rows = rows_of(shown)
    assert len(rows) == 4 and all(row[""] in ("", "the best") for row in rows)
    (best,) = [row for row in rows if row[""] == "the best"]
    assert float(best["objective"]) == max(float(row["objective"]) for row in rows)
    config = re.search(r"--config (\S+)", shown)[1]
    (logs,) = (tmp_path / "logdir").iterdir()
    assert len(list(logs.iterdir())) == 4
    for directory in logs.iterdir():
        events = EventAccumulator(str(directory)).Reload()
        assert any("hparams" in name for name in events.summary_metadata)
    # The best trial's flags give its numbers again.
    plain = search_flags[: search_flags.index("--hpo")]
    given = ("--epochs", "--samples_per_epoch", "--data_dir", "--bert_model")
    plain = [e for pair in zip(plain[::2], plain[1::2]) if pair[0] not in given for e in pair]
    capsys.readouterr()
    assert mc.main(plain + ["--config", config]) == 0
    again = re.search(r"^mean +(\S+)", capsys.readouterr().out, re.M)[1]
    assert float(again) == pytest.approx(float(best["dev"]), abs=2e-3)


def test_an_interrupted_search_goes_on(search_flags, tmp_path):
    """It has the trials that an uninterrupted one has, and no epoch twice."""
    search_flags += ["--hpo_resume", "auto", "--hpo_trials", "3"]
    run = subprocess.Popen(MAIN + search_flags, **PIPES)
    assert "has no such search; this is a new one" in run.stdout.readline()
    while "epoch 1" not in (line := run.stdout.readline()):
        assert line, run.stderr.read()
    run.send_signal(signal.SIGTERM)
    rest, errors = run.communicate(timeout=60)
    assert run.returncode == 128 + signal.SIGTERM and "Traceback" not in errors
    directory = Path(re.search(r"go on with --hpo_resume (\S+)", errors)[1])
    done = subprocess.run(MAIN + search_flags, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    epochs = re.findall(r"^trial (\w+), epoch (\d)", line + rest + done.stdout, re.M)
    rows = rows_of(done.stdout)
    assert len(rows) == 3 and {row["trial"] for row in rows} == {trial for trial, _ in epochs}
    for row in rows:
        history = json.loads((directory / "trials" / f"{row['trial']}.json").read_text())
        assert [each["epoch"] for each in history] == list(range(1, int(row["epochs"]) + 1))
    assert not list((directory / "trials").glob("*.resume"))
    again = mc.main([*search_flags[:-4], "--hpo_resume", str(directory), "--lr", "0.1"])
    assert again == 1  # another search


BAD_RATES = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import options, multitask_classifier
options.SEARCH_SPACE["lr"] = options.Search("choice", (1e-3, 1e30))
sys.exit(multitask_classifier.main(sys.argv[1:]))
"""


def test_a_failing_trial_is_recorded_and_the_search_goes_on(search_flags):
    """At a rate of 1e30 nothing stays finite."""
    command = [sys.executable, "-c", BAD_RATES, *search_flags, "--max_bad_steps", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    rows = rows_of(done.stdout)
    assert {row["lr"] for row in rows} == {"0.001", "1e+30"}
    for row in rows:
        failed = "2 steps in a row were not finite" in row[""]
        assert failed == (row["lr"] == "1e+30")


GONE = f"""
import shutil, sys
sys.path.insert(0, {str(ROOT)!r})
import hpo, multitask_classifier

load = hpo.Shared.load

def load_and_remove(options, *places):
    shared = load(options, *places)
    for folder in (options.data_dir, options.bert_model, options.cache_dir):
        shutil.rmtree(folder)
    return shared

hpo.Shared.load = load_and_remove
sys.exit(multitask_classifier.main(sys.argv[1:]))
"""


def test_trials_load_nothing(search_flags, tmp_path, tiny_directory):
    """What the search has loaded is gone when they begin."""
    shutil.copytree(tiny_directory, tmp_path / "bert")
    shutil.copytree(SAMPLE, tmp_path / "data")
    more = ["--bert_model", str(tmp_path / "bert"), "--data_dir", str(tmp_path / "data")]
    command = [sys.executable, "-c", GONE, *search_flags, *more, "--hpo_trials", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    rows = rows_of(done.stdout)
    assert len(rows) == 2 and all(row["objective"] for row in rows)
    assert not (tmp_path / "data").exists() and not (tmp_path / "bert").exists()


@pytest.mark.parametrize(
    "more, message",
    [
        (
            ["--ray_address", "127.0.0.1:1"],
            "--ray_address 127.0.0.1:1: [Errno 111] Connection refused",
        ),
        (["--hpo_cpus", "1000"], "--hpo: no node has 1000 cores and 0 GPUs for a trial"),
        (["--hpo_resume", "nowhere"], "nowhere: not the folder of a search"),
    ],
)
def test_a_search_that_cannot_be_is_one_clear_line(search_flags, more, message):
    done = subprocess.run(MAIN + search_flags + more, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and message in last and "Traceback" not in done.stderr


# The space is Optuna's where --help says it is.


@pytest.mark.parametrize("optimizer", ["adamw", "sophiag"])
def test_optuna_draws_from_the_space_of_the_help(optimizer):
    import hpo

    options = parse_options(["--hpo", "--optimizer", optimizer, "--clip", "1"])
    sophia = {name for name, search in SEARCH_SPACE.items() if search.only_sophia}
    wanted = set(SEARCH_SPACE) - {"clip"} - (sophia if optimizer == "adamw" else set())
    assert set(options.searched) == wanted
    study = hpo.optuna.create_study()
    space = {name: hpo.distribution(name, options) for name in options.searched}
    for _ in range(50):
        for name, value in study.ask(fixed_distributions=space).params.items():
            search = SEARCH_SPACE[name]
            if search.kind == "choice":
                assert value in search.values
            else:
                scale = getattr(options, name) if search.of_default else 1
                assert search.values[0] * scale <= value <= search.values[1] * scale
