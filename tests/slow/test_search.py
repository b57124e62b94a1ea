"""Whole searches in which a made-up function takes the place of training."""

import json
import re
import signal
import statistics
import subprocess
import sys

from conftest import ROOT
from test_hpo import ray_environment, read_until  # noqa: F401

SPACE = """
lr = { log = [1e-5, 1e-1] }
scheduler = { choice = ["plateau", "cosine"] }
warmup = { uniform = [0, 0.5], when = { scheduler = ["cosine"] } }
"""
# The best flags: cosine, warmup 0.3, learning rate 1e-3; their score is 0. Trial 5 is lucky with the
# seed of the search, and only with this one.
MADE_UP = f"""
import functools, math, sys, time
sys.path.insert(0, {str(ROOT)!r})
import hpo
from search_results import Trial

def made_up_trial(config, shared, n_threads):
    trial = Trial.read(shared.directory / config["trial"])
    flags = trial.flags
    score = -math.log10(flags["lr"] / 1e-3) ** 2 - 10 * (flags.get("warmup", 0.5) - 0.3) ** 2
    score -= 0.5 * (flags["scheduler"] == "plateau")
    score += 2 * (trial.name == "5") + 0.001 * (trial.seed % 7)
    for epoch in range(len(trial.epochs) + 1, 5):
        time.sleep(PAUSE)
        metrics = dict(epoch=epoch, dev=score, train=score, gap=0.0, objective=score - 1 / epoch)
        trial.add_epoch(metrics | dict(scores=dict(dev=dict(sst=dict(accuracy=score)))))
        hpo.tune.report(metrics | dict(error=""))

hpo.run_trial = made_up_trial
# To start a process takes longer than such a trial.
hpo.tune.TuneConfig = functools.partial(hpo.tune.TuneConfig, reuse_actors=True)
sys.exit(hpo.main())
"""


def start_made_up(flags, tmp_path, pause="0"):
    (tmp_path / "space.toml").write_text(SPACE)
    more = ["--hpo_space", str(tmp_path / "space.toml"), "--epochs", "4", "--hpo_cpus", "1"]
    command = [sys.executable, "-c", MADE_UP.replace("PAUSE", pause), *flags, *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_the_optimum_is_found_and_luck_is_not(flags, tmp_path):
    process = start_made_up([*flags, "--hpo_trials", "40"], tmp_path)
    output, errors = process.communicate(timeout=900)
    assert process.returncode == 0, errors
    (directory,) = (tmp_path / "models_dir").iterdir()
    trials = {path.stem: json.loads(path.read_text()) for path in directory.glob("trials/*.json")}
    assert len(trials) == 40
    assert all(
        ("warmup" in t["flags"]) == (t["flags"]["scheduler"] == "cosine") for t in trials.values()
    )
    best = {name: max(e["objective"] for e in t["epochs"]) for name, t in trials.items()}
    assert max(best, key=best.get) == "5"
    means = {}
    for path in directory.glob("confirmation/*.json"):
        run = json.loads(path.read_text())
        assert len(run["epochs"]) == 4
        means.setdefault(path.stem.split("-")[0], []).append(run["epochs"][-1]["dev"])
    assert len(means) == 3 and all(len(scores) == 3 for scores in means.values())
    winner = max(means, key=lambda name: statistics.mean(means[name]))
    assert re.search(r"^best: trial (\w+);", output, re.M)[1] == winner != "5"
    found = json.loads((directory / "best_config.json").read_text())
    assert 0.5e-3 < found["lr"] < 2e-3 and abs(found["warmup"] - 0.3) < 0.15
    assert found["scheduler"] == "cosine"
    assert len(list(directory.glob("*.png"))) == 4


def test_a_search_that_is_killed_loses_no_trial_and_repeats_none(flags, tmp_path):
    """It is killed in a trial, and again in the confirmation; it has the trials of a search without
    a stop."""
    flags = [*flags, "--hpo_trials", "6", "--hpo_resume", "auto"]
    output = ""
    for pattern in (r"trial 3, epoch 1", r"trial \d-\d+, epoch 2"):
        process = start_made_up(flags, tmp_path, "0.3")
        output += read_until(pattern, process)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    process = start_made_up(flags, tmp_path)
    rest, errors = process.communicate(timeout=900)
    assert process.returncode == 0, errors
    (directory,) = (tmp_path / "models_dir").iterdir()
    for path in [*directory.glob("trials/*.json"), *directory.glob("confirmation/*.json")]:
        epochs = [epoch["epoch"] for epoch in json.loads(path.read_text())["epochs"]]
        assert epochs == list(range(1, len(epochs) + 1))
    counts = re.findall(r"^trial \S+ is over, (.*)", output + rest, re.M)
    assert len(counts) == len(set(counts)) and {"6 of 6", "9 of 9"} <= set(counts)
    over = re.findall(r"^trial (\S+) is over", output + rest, re.M)
    assert len(over) == len(set(over)) and len(list(directory.glob("trials/*.json"))) == 6
    assert len(list(directory.glob("confirmation/*.json"))) == 9
    assert {path.stem for path in directory.glob("*/*.json")} >= set(over)
