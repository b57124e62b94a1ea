"""Searches for hyper-parameters, with Ray on this machine."""

import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import multitask_classifier as mc
from options import changed_options
from search_space import search_options
from utils import lock_files

PIPES = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def hpo():
    """The module. It imports Ray, for which the other tests need not wait."""
    import hpo

    return hpo


@pytest.fixture
def search_flags(flags):
    """Flags of a search of short trials."""
    return [*flags, "--hpo_trials", "2", "--hpo_confirm", "0"]


@pytest.fixture(autouse=True)
def ray_environment(tmp_path, monkeypatch):
    """Close the clusters of these tests to others, and give them the priority of the tests."""
    (tmp_path / "token").write_text("0123456789abcdef" * 4)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setenv("RAY_worker_niceness", "0")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")


def start(program, flags):
    command = [sys.executable, "-u", str(ROOT / program), *flags]
    return subprocess.Popen(command, **PIPES)


def read_until(pattern, process):
    """Return the output up to the first line in which the pattern is found."""
    output = ""
    while not re.search(pattern, line := process.stdout.readline()):
        assert line, process.stderr.read()
        output += line
    return output + line


def table_rows(output):
    """Return the rows of the table of all trials."""
    lines = [line for line in output.splitlines() if line.startswith("| ")]
    ends = [number for number, line in enumerate(lines) if line.startswith("| trial")][1:]
    lines = lines[: ends[0] if ends else None]
    heads, _, *rows = [[cell.strip() for cell in line[1:-1].split("|")] for line in lines]
    return [dict(zip(heads, row, strict=True)) for row in rows]


def check_result(output, n_trials, flags, folder, capsys):
    """Check the table, TensorBoard's page of hyper-parameters, and that the best trial's flags give
    its numbers again."""
    rows = table_rows(output)
    assert len(rows) == n_trials and all(row[""] in ("", "the best") for row in rows)
    (best,) = [row for row in rows if row[""] == "the best"]
    assert float(best["objective"]) == max(float(row["objective"]) for row in rows)
    config = re.search(r"--config (\S+)", output)[1]
    (logs,) = (folder / "logdir").iterdir()
    trials = [directory for directory in logs.iterdir() if directory.name != "pictures"]
    assert len(trials) == n_trials
    for directory in trials:
        events = EventAccumulator(str(directory)).Reload()
        assert any("hparams" in name for name in events.summary_metadata)
    in_config = ("--epochs", "--samples_per_epoch", "--batch_size", "--data_dir", "--bert_model")
    pairs = zip(flags[::2], flags[1::2], strict=True)
    plain = [text for pair in pairs if pair[0] not in in_config for text in pair]
    capsys.readouterr()
    assert mc.main([*plain, "--config", config]) == 0
    mean = re.search(r"^mean +(\S+)", capsys.readouterr().out, re.M)[1]
    assert float(mean) == pytest.approx(float(best["dev"]), abs=2e-3)


def test_an_interrupted_search_continues(flags, search_flags, hpo, tmp_path, capsys):
    """It has the trials that an uninterrupted one has, and no epoch twice."""
    search_flags += ["--hpo_resume", "auto"]
    process = start("multitask_classifier.py", ["--hpo", *search_flags])
    output = read_until("epoch 1", process)
    assert "has no such search; this is a new one" in output.splitlines()[0]
    process.send_signal(signal.SIGTERM)
    rest, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM and "Traceback" not in errors
    directory = Path(re.search(r"continue with --hpo_resume (\S+)", errors)[1])
    continued = start("hpo.py", search_flags)
    last_part, errors = continued.communicate(timeout=240)
    assert continued.returncode == 0, errors
    epochs = re.findall(r"^trial (\w+), epoch (\d)", output + rest + last_part, re.M)
    rows = table_rows(last_part)
    assert len(rows) == 2 and {row["trial"] for row in rows} == {trial for trial, _ in epochs}
    for row in rows:
        history = json.loads((directory / "trials" / f"{row['trial']}.json").read_text())
        assert [epoch["epoch"] for epoch in history["epochs"]] == list(
            range(1, int(row["epochs"]) + 1)
        )
    assert not list((directory / "trials").glob("*.resume"))
    check_result(last_part, 2, flags, tmp_path, capsys)
    assert hpo.main([*search_flags[:-1], str(directory), "--lr", "0.1"]) == 1
    assert "this search has other values of --lr" in capsys.readouterr().err


def test_the_folder_of_a_search_has_its_flags(hpo, own_tasks, tmp_path, capsys):
    """Tasks of a file, their values, the space and a flag that follows from others."""
    flags = [*own_tasks, "--optimizer", "sophiah", "--rdrop", "nli=2", "--betas", "0.8,0.9"]
    flags += ["--epochs", "3", "--hpo_trials", "7", "--models_dir", str(tmp_path / "models")]
    options = search_options([*flags, "--logdir", str(tmp_path / "logdir")])
    directory = hpo.new_search(options)
    again = search_options(["--hpo_resume", str(directory), "--hpo_cpus", "1"])
    assert hpo.find_search(again) == directory
    changed = {"hpo_resume": str(directory), "hpo_cpus": 1, "betas": [0.8, 0.9]}
    assert vars(again) == vars(options) | changed
    other = ["--hpo_resume", str(directory), "--rdrop", "nli=1"]
    assert hpo.main(other) == 1
    assert "has other values of --rdrop; leave them out" in capsys.readouterr().err
    for argv in (["list"], ["plot", "--help"]):
        assert hpo.main(argv) == 1
        assert f"give one folder: python hpo.py {argv[0]} models/SEARCH" in capsys.readouterr().err


@pytest.fixture
def searched(hpo, flags, tmp_path):
    """(options, folder) of a search that has run nothing yet."""
    options = search_options([*flags, "--epochs", "4"])
    directory = hpo.new_search(options)
    (directory / "trials").mkdir()
    return options, directory


def write_trial(hpo, directory, number, objectives):
    """A trial that is over, with an objective for each epoch."""
    epochs = [
        {"epoch": epoch, "dev": value, "train": value, "gap": 0.0, "objective": value}
        | {"seconds": 1.0, "scores": {"dev": {"sst": {"accuracy": value}}}}
        for epoch, value in enumerate(objectives, 1)
    ]
    path = directory / "trials" / f"{number}.json"
    flags = {"lr": 1e-4 * (number + 1)}
    hpo.Trial(path, flags, 1, 2 * number, 2 * number + 1, epochs=epochs).save()


@pytest.mark.parametrize(
    "select, train, expected",
    [
        (None, {"sst": 0.9, "no_dev": 1.0}, 0.4 - 0.5),  # a task without dev counts on neither side
        ("sst", {"sst": 0.7}, 0.4 - 0.3),
        (None, {"sst": 0.2}, 0.4),  # to underfit gains nothing
        ("sst", {}, -1.0),  # no row of it was drawn in this epoch
        (None, {}, -1.0),
    ],
)
def test_the_gap_is_of_tasks_with_dev(
    hpo, searched, select, train, expected, monkeypatch, tmp_path
):
    told = []
    monkeypatch.setattr(hpo.tune, "report", told.append)
    options = changed_options(searched[0], hpo_objective="dev_minus_gap", select=select)
    training = SimpleNamespace(options=options, epoch=1, scores={"sst": {"accuracy": 0.4}})
    training.train_scores = {name: {"accuracy": value} for name, value in train.items()}
    trial = hpo.Trial(tmp_path / "0.json", {}, 1)
    hpo.report(trial, training)
    assert told[0]["objective"] == pytest.approx(expected)
    assert hpo.Trial.read(trial.path).epochs[0]["objective"] == pytest.approx(expected)


def test_a_trial_is_deterministic_if_that_is_asked_for(hpo, searched):
    options, directory = searched
    options = changed_options(options, deterministic=True)
    shared = hpo.load_shared(options, directory)
    try:
        training = hpo.start_training(options, shared, directory / "trials" / "0.resume")
        training.log.close()
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("score, decision", [(0.45, "STOP"), (0.55, "CONTINUE")])
def test_a_continued_search_halves_by_the_best_so_far(hpo, searched, score, decision):
    """What a trial reported after four epochs was its best epoch's objective, not that of the last."""
    options, directory = searched
    options = changed_options(options, epochs=5)
    write_trial(hpo, directory, 0, [0.5, 0.4, 0.4, 0.3])
    scheduler, new = hpo.halving(options, directory), SimpleNamespace(trial_id="new")
    scheduler.on_trial_add(None, new)
    result = {"epoch": 4, "objective": score, "training_iteration": 4}
    assert scheduler.on_trial_result(None, new, result) == decision


def test_flags_of_the_winner_are_kept_when_its_pictures_fail(hpo, searched, monkeypatch):
    options, directory = searched
    for number, objective in enumerate((0.3, 0.5)):
        write_trial(hpo, directory, number, [objective])

    def fail(_):
        raise OSError("no space left")

    monkeypatch.setattr(hpo, "plot", fail)
    with pytest.raises(OSError):
        hpo.finish(options, directory, directory / "logs")
    assert json.loads((directory / "best_config.json").read_text())["lr"] == 2e-4


def test_a_search_that_is_still_running_is_not_continued(hpo, searched, capsys):
    options = changed_options(searched[0], hpo_resume="auto")
    assert hpo.find_search(options) == searched[1]
    with lock_files([searched[1] / "search.json"], hpo.STILL_RUNNING):
        assert hpo.find_search(options) is None
    assert "has no such search; this is a new one" in capsys.readouterr().out


SEARCH_WITHOUT_FILES = f"""
import shutil, sys
sys.path.insert(0, {str(ROOT)!r})
import hpo

load_shared = hpo.load_shared

def load_and_remove(options, directory):
    shared = load_shared(options, directory)
    for folder in (options.data_dir, options.bert_model, options.cache_dir):
        shutil.rmtree(folder)
    return shared

hpo.load_shared = load_and_remove
sys.exit(hpo.main())
"""


def test_trials_load_nothing_and_a_failing_one_is_recorded(
    search_flags, tmp_path, tiny_directory, small_data
):
    """Data, encoder and cache are gone when the trials begin. With a rate of 1e30 nothing stays
    finite; the search continues."""
    shutil.copytree(tiny_directory, tmp_path / "bert")
    shutil.copytree(small_data, tmp_path / "data")
    more = ["--bert_model", str(tmp_path / "bert"), "--data_dir", str(tmp_path / "data")]
    # With this seed, the first trial has the bad rate and the second one the good rate.
    (tmp_path / "space.toml").write_text("lr = { choice = [1e-3, 1e30] }")
    more += ["--max_bad_steps", "2", "--hpo_cpus", "1", "--seed", "8"]
    more += ["--hpo_space", str(tmp_path / "space.toml"), "--hpo_confirm", "0"]
    command = [sys.executable, "-c", SEARCH_WITHOUT_FILES, *search_flags, *more]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "nodes: 1; for each trial 1 cores and 0 GPUs" in done.stdout
    assert not (tmp_path / "data").exists() and not (tmp_path / "bert").exists()
    rows = table_rows(done.stdout)
    assert len(rows) == 2 and {row["lr"] for row in rows} == {"0.001", "1e+30"}
    for row in rows:
        failed = "2 steps in a row were not finite" in row[""]
        assert failed == (row["lr"] == "1e+30")
        assert failed or row["objective"]


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
def test_a_search_that_cannot_be_is_one_clear_line(
    search_flags, more, message, hpo, monkeypatch, capsys
):
    if "--hpo_cpus" in more:
        monkeypatch.setattr(hpo, "connect_to_ray", lambda address: [{"CPU": 2.0}])
    assert hpo.main(search_flags + more) == 1
    errors = capsys.readouterr().err
    last = errors.strip().splitlines()[-1]
    assert last.startswith("error: ") and message in last and "Traceback" not in errors
