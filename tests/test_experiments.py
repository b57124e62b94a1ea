"""Recipes, on a tiny model and the sample; tables and curves, on made-up results."""

import contextlib
import csv
import io
import json
import multiprocessing
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
from pathlib import Path

import matplotlib.figure
import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, SAMPLE
from sklearn.metrics import accuracy_score, f1_score

import experiments as ex
from options import parse_options
from result_tables import (
    BUDGETS,
    COLUMNS,
    CURVE_COLUMNS,
    CURVES,
    FIGURE,
    MAIN_SCORES,
    RESULTS,
    spread,
)
from utils import check_writable

BUDGET = 3, 256  # in the place of the full one
RECIPE = {"optimizer": "adamw", "lr": 1e-3, "batch_size": 16}
TOO_LONG = {"max_length": 4000}  # more than the tiny model's positions, which only the run finds


def write_recipes(**recipes):
    for name, flags in recipes.items():
        path = Path("recipes", f"{name}.json")
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(flags))


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def flags(tiny_directory, tmp_path_factory):
    cache = str(tmp_path_factory.mktemp("cache"))
    return ["--bert_model", str(tiny_directory), "--data_dir", str(SAMPLE), "--cache_dir", cache]


@pytest.fixture(scope="module")
def trained(flags, tmp_path_factory):
    """(folder where a good and a bad recipe were run at once, exit status, what was printed)"""
    folder, shown = tmp_path_factory.mktemp("trained"), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setitem(BUDGETS, "full", BUDGET)
        write_recipes(baseline=RECIPE, bad=TOO_LONG)
        with contextlib.redirect_stdout(shown):
            status = ex.main(["run", "bad", "baseline", "--jobs", "2", "--seeds", "1", *flags])
    return folder, status, shown.getvalue()


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty folder with a recipe."""
    monkeypatch.chdir(tmp_path)
    write_recipes(baseline=RECIPE)
    return tmp_path


def dev_labels(filename, column):
    with open(SAMPLE / filename, newline="") as file:
        return [float(row[column]) for row in csv.DictReader(file, delimiter="\t")]


def test_a_row_is_what_the_run_gave(trained):
    """By its prediction files, scored again."""
    folder, _, shown = trained
    (row,) = rows_of(folder / "results/results.csv")
    run = folder / "models/experiments" / f"baseline-3x256-seed11711-{row['run']}"
    labels, predictions = {}, {}
    files = {
        "sst": ("ids-sst-dev.csv", "sentiment"),
        "para": ("quora-dev.csv", "is_duplicate"),
        "sts": ("sts-dev.csv", "similarity"),
    }
    for task, place in files.items():
        labels[task] = dev_labels(*place)
        lines = (run / f"predictions/{task}-dev-output.csv").read_text().splitlines()[1:]
        predictions[task] = [float(line.split("\t")[1]) for line in lines]
    for task in ("sst", "para"):
        both = labels[task], predictions[task]
        assert float(row[f"{task}_accuracy"]) == pytest.approx(accuracy_score(*both), abs=1e-6)
        macro = f1_score(*both, average="macro", zero_division=0)
        assert float(row[f"{task}_macro_f1"]) == pytest.approx(macro, abs=1e-6)
    correlation = np.corrcoef(labels["sts"], predictions["sts"])[0, 1]
    assert float(row["sts_pearson"]) == pytest.approx(correlation, abs=1e-5)
    assert (row["budget"], row["rows"]) == ("3x256", "1500/1500/1500")
    assert (row["threads"], row["jobs"]) == ("1", "2")
    assert json.loads(row["flags"]) == RECIPE and not re.search("/", row["encoder"])
    assert float(row["peak_memory_mb"]) > 100 and float(row["seconds"]) > 0

    log = (run / "log.txt").read_text()
    means = {int(n): float(m) for n, m in re.findall(r"^epoch (\d): .* score (\d\.\d+)", log, re.M)}
    curve = [each for each in rows_of(folder / "results/curves.csv") if each["metric"] == "mean"]
    assert {int(each["epoch"]): float(each["value"]) for each in curve} == pytest.approx(
        means, abs=1e-4
    )
    assert len(means) == 3 and means[int(row["best_epoch"])] == max(means.values())
    assert all(line in shown for line in re.findall(r"^epoch \d: \d+ s,.*", log, re.M))


def test_test_predictions_are_kept(trained):
    folder, _, _ = trained
    kept = {path.name: path.read_bytes() for path in folder.glob("results/predictions/*/*")}
    (run,) = folder.glob("models/experiments/baseline-*")
    assert kept == {p.name: p.read_bytes() for p in run.glob("predictions/*-test-output.csv")}
    assert len(kept) == 3


def test_a_failed_run_stops_no_other(trained):
    folder, status, shown = trained
    assert status == 1
    assert re.search(r"^bad-3x256-\S+: failed, exit status 1 .*ends with:$", shown, re.M)
    assert re.search(r"^error: --max_length 4000 is more", shown, re.M)
    assert [row["recipe"] for row in rows_of(folder / "results/results.csv")] == ["baseline"]


def test_only_what_is_not_done_is_run(trained, flags, tmp_path, monkeypatch):
    shutil.copytree(trained[0] / "results", tmp_path / "results")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(BUDGETS, "full", BUDGET)
    write_recipes(baseline=RECIPE)
    started = []

    def train(run, *_):
        check_writable(run.log)
        run.log.write_text("")
        started.append(int(run.identity["seed"]))
        return 1

    monkeypatch.setattr(ex, "train", train)

    def started_by(*more):
        started.clear()
        assert ex.main(["run", "baseline", "--seeds", "1", *flags, *more]) == bool(started)
        return started

    data = tmp_path / "data"
    shutil.copytree(SAMPLE, data)
    assert started_by() == started_by("--data_dir", str(data)) == started_by("--jobs", "2") == []
    assert started_by("--seeds", "3") == [1, 2]
    assert started_by("--lr", "0.001", "--precision", "float32", "--local_files_only") == []
    assert started_by("--lr", "0.002") == started_by("--precision", "bfloat16") == [11711]
    assert started_by("--epochs", "4") == started_by("--max_length", "99") == [11711]
    with open(data / "sts-dev.csv", "a") as file:
        file.write("9\tnew\tA dog.\tA cat.\t1.0\n")
    assert started_by("--data_dir", str(data)) == [11711]
    write_recipes(baseline=RECIPE | {"clip": 1.0})
    assert started_by() == [11711]


def test_an_interrupted_run_comes_to_the_same_numbers(trained, flags, place, capsys):
    command = [
        "run",
        "baseline",
        "--seeds",
        "1",
        *flags,
        "--epochs",
        "3",
        "--samples_per_epoch",
        "256",
    ]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    script = [sys.executable, "-u", ROOT / "experiments.py"]
    with subprocess.Popen(script + command, **pipes) as program:
        while not re.match(r"epoch 1: \d+ s", line := program.stdout.readline()):
            assert line
        program.send_signal(signal.SIGINT)
        _, errors = program.communicate(timeout=60)
    assert program.returncode == 130 and "interrupted" in errors
    assert not Path("results/results.csv").exists()
    assert ex.main(command) == 0
    assert "resumed after" in capsys.readouterr().out
    (row,), (expected,) = (rows_of(at / "results/results.csv") for at in (place, trained[0]))
    same = [name for name in row if not re.search("seconds|memory|jobs", name)]
    assert {name: row[name] for name in same} == {name: expected[name] for name in same}
    curves = Path("results/curves.csv").read_bytes()
    assert curves == (trained[0] / "results/curves.csv").read_bytes()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("run nothing", "there is no recipe 'nothing', only baseline, broken"),
        ("run broken", "--config recipes/broken.json: not JSON"),
        ("run baseline --seed 3", "--seed: experiments.py sets this itself"),
        ("run baseline --sst_dev_out x.csv", "--sst_dev_out: experiments.py sets this itself"),
        ("run baseline --data_dir nowhere", "nowhere/ids-sst-train.csv: cannot be read"),
        ("plot", "results/curves.csv: no run of these recipes with --budget full"),
        ("table", "README.md: cannot be read"),
    ],
)
def test_what_cannot_work_is_an_error_in_one_line(place, arguments, message, capsys):
    Path("recipes/broken.json").write_text("{")
    assert ex.main(arguments.split()) == 1
    errors = capsys.readouterr().err
    assert errors.startswith(f"error: {message}") and errors.count("\n") == 1
    assert not Path("results").exists()


def result(recipe, seed, scores, **more):
    """A row of results.csv."""
    names = "sst_accuracy", "para_accuracy", "sts_pearson"
    row = {name: f"{score:.6f}" for name, score in zip(names, scores)}
    row |= {"recipe": recipe, "seed": str(seed), "budget": "4x10000", "precision": "float32"}
    row |= {"encoder": "minilm", "seconds_per_epoch": "100.0", "threads": "2", "data": "d"}
    row |= {"flags": json.dumps(RECIPE), "run": f"{recipe}{seed}{more}"} | more
    return row


def write_results(*rows):
    ex.record(RESULTS, list(rows), COLUMNS, ["run"])


START, END = "# A\n\n  text \n<!-- experiments:{} -->\n", "<!-- /experiments -->"


def cells(table):
    lines = [line.strip("| ").split(" | ") for line in table.splitlines() if line[:1] == "|"]
    return [dict(zip(lines[0], line)) for line in lines[2:]]


def test_tables_stand_between_their_markers(place):
    write_recipes(**{"moe-hard": RECIPE | {"moe": "hard"}})
    scores = [(0.41, 0.80, 0.87), (0.44, 0.81, 0.86), (0.46, 0.85, 0.85)]
    rows = [result("baseline", seed, each) for seed, each in enumerate(scores)]
    flags = json.dumps(RECIPE | {"moe": "hard"})
    rows += [result("moe-hard", 1, scores[0], flags=flags, seconds_per_epoch="250.0")]
    rows += [result("moe-hard", 1, scores[0], flags=flags, precision="bfloat16")]
    rows += [result("baseline", 1, scores[0], flags=json.dumps(RECIPE | {"lr": 2e-3}))]
    rows += [result("baseline", 1, scores[0], flags="{}"), result("gone", 1, scores[0])]
    write_results(*rows)
    around = START.format("sst"), END + START.format("moe"), END + "\n| 1 | typed |\n<tail"
    Path("README.md").write_text("old\n".join(around))
    assert ex.main(["table"]) == 0
    text = Path("README.md").read_text()
    sst, moe = re.fullmatch("(.*)".join(map(re.escape, around)), text, re.DOTALL).groups()

    accuracies = [each[0] for each in scores]
    spread = f"{statistics.mean(accuracies):.3f} ± {statistics.stdev(accuracies):.3f}"
    shown = {(row["command"], row["precision"]): row for row in cells(sst)}
    command = "python experiments.py run"
    assert set(shown) == {
        (f"`{command} baseline`", "float32"),
        (f"`{command} baseline --lr 0.002`", "float32"),
        (f"`{command} moe-hard`", "float32"),
        (f"`{command} moe-hard`", "bfloat16"),
    }
    baseline = shown[f"`{command} baseline`", "float32"]
    assert (baseline["seeds"], baseline["accuracy"]) == ("3", spread)
    assert baseline["original report (BERT-base, its own data, A100)"] == "0.494"
    assert "Not comparable" in sst

    means = [statistics.mean(each) for each in scores]
    shown = {row["recipe"]: row for row in cells(moe)}
    assert set(shown) == {"`baseline`", "`baseline --lr 0.002`", "`moe-hard`"}  # float32 alone
    spread = f"{statistics.mean(means):.3f} ± {statistics.stdev(means):.3f}"
    assert shown["`baseline`"]["mean"] == spread
    assert shown["`moe-hard`"]["seconds / baseline's"] == "2.50"
    ex.main(["table"])
    assert Path("README.md").read_text() == text


def test_rows_compare_on_one_device_and_on_the_seeds_that_both_have(place):
    best = RECIPE | {"both_orders": True, "para_encoding": "both"}
    tried = RECIPE | {"para_encoding": "both", "lr": 2e-3}
    write_recipes(**{"best": best, "best/tried": tried})
    shared, lone = (0.1, 0.2, 0.3), (0.7, 0.8, 0.9)
    gpu = dict(device="GPU", jobs="16")
    rows = [result("best", 1, shared, flags=json.dumps(best), **gpu)]
    rows += [result("best", 2, lone, flags=json.dumps(best), **gpu)]
    rows += [result("best/tried", 1, (0.2, 0.2, 0.5), flags=json.dumps(tried), **gpu)]
    rows += [result("best/tried", 3, lone, flags=json.dumps(tried), device="CPU")]
    rows += [result("best", 3, shared, flags=json.dumps(best), device="CPU")]
    write_results(*rows)
    Path("README.md").write_text(START.format("best") + END)
    assert ex.main(["table"]) == 0
    shown = {(row["recipe"], row["device"]): row for row in cells(Path("README.md").read_text())}
    names = ("`best`", "GPU"), ("`best/tried`", "GPU"), ("`best`", "CPU"), ("`best/tried`", "CPU")
    columns = "seeds", "beside the first row's, same seeds", "beside the first row's flags"
    flags = "`--lr 0.002`, without `--both_orders`"
    assert [tuple(shown[name][column] for column in columns) for name in names] == [
        ("2", "", ""),
        ("1", "+0.100", flags),
        ("1", "", ""),
        ("1", "+0.600", flags),
    ]
    assert [shown[name]["CPU threads × runs at once"] for name in names[1:3]] == ["2 × 16", "2"]


def test_the_memory_of_a_gpu_is_its_own(trained, flags, monkeypatch):
    """What CUDA's allocator had at most, not what the process took of the host's."""
    monkeypatch.chdir(trained[0])
    monkeypatch.setitem(BUDGETS, "full", BUDGET)
    run = ex.plan_run("baseline", 11711, "full", flags)
    before, text = ex.outcome(run)[0], run.log.read_text()
    with monkeypatch.context() as patch:
        more = "memory of NVIDIA H100 80GB HBM3: 1,234 MB at most\n\nprocess: "
        patch.setattr(Path, "read_text", lambda *_, **__: text.replace("process: ", more))
        assert ex.outcome(run)[0] == before | {"peak_memory_mb": "1234"}


@pytest.mark.parametrize("name, end", [("sst", ""), ("other", END)])
def test_wrong_markers_are_an_error(place, name, end, capsys):
    text = START.format(name) + "mine\n" + end + START.format("moe") + END
    Path("README.md").write_text(text)
    assert ex.main(["table"]) == 1
    assert f"experiments:{name} -->" in capsys.readouterr().err
    assert Path("README.md").read_text() == text


def test_the_readme_shows_the_committed_results(tmp_path, monkeypatch, capsys):
    """If this fails: python experiments.py table"""
    monkeypatch.chdir(tmp_path)
    for folder in ("recipes", "results"):
        shutil.copytree(ROOT / folder, folder)
    shutil.copy(ROOT / "README.md", "README.md")
    assert ex.main(["table"]) == 0
    assert Path("README.md").read_text() == (ROOT / "README.md").read_text()


def test_the_recipes_are_flags():
    paths = list((ROOT / "recipes").rglob("*.json"))
    assert {"baseline.json", "sophiah.json", "moe-hard.json"} <= {path.name for path in paths}
    for path in paths:
        parse_options(["--config", str(path)])


def test_curves_are_the_mean_over_seeds_within_its_range(place, monkeypatch):
    values = {1: [0.5, 0.6, 0.7], 2: [0.3, 0.8, 0.4], 3: [0.1, 0.2, 0.3]}  # of three seeds
    runs = [result("baseline", seed, (1, 1, 1)) for seed in range(3)]
    write_results(*runs, result("baseline", 1, (1, 1, 1), budget="2x4000"))
    ex.record(
        CURVES,
        [
            {"run": run["run"], "epoch": str(epoch), "split": "dev", "metric": metric}
            | {"value": str(values[epoch][seed] / (1 + place))}
            for place, metric in enumerate(MAIN_SCORES)
            for seed, run in enumerate(runs)
            for epoch in values
        ],
        CURVE_COLUMNS,
        CURVE_COLUMNS[:-1],
    )
    figures, save = [], matplotlib.figure.Figure.savefig

    def note(figure, *args, **kwargs):
        figures.append(figure)
        return save(figure, *args, **kwargs)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", note)
    pictures = []
    for _ in range(2):
        assert ex.main(["plot"]) == 0
        pictures.append(FIGURE.read_bytes())
    assert pictures[0] == pictures[1]
    assert pictures[0].startswith(b"\x89PNG") and len(pictures[0]) < 150_000
    for place, panel in enumerate(figures[0].axes):
        (line,) = panel.lines
        means = [statistics.mean(each) / (1 + place) for each in values.values()]
        assert line.get_xdata() == pytest.approx([1, 2, 3])
        assert line.get_ydata() == pytest.approx(means)
        band = panel.collections[0].get_paths()[0].vertices
        ends = {float(y) for x, y in band if x == 2}
        assert sorted(ends)[0] == pytest.approx(0.3 / (1 + place))
        assert sorted(ends)[-1] == pytest.approx(0.8 / (1 + place))


def test_two_writers_lose_nothing(place):
    def write(recipe):
        for seed in range(12):
            write_results(result(recipe, seed, (0, 0, 0)))
        os._exit(0)

    fork = multiprocessing.get_context("fork")
    writers = [fork.Process(target=write, args=(recipe,)) for recipe in ("one", "other")]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    written = [(row["recipe"], row["seed"]) for row in rows_of("results/results.csv")]
    assert written == [(r, str(s)) for r in ("one", "other") for s in sorted(range(12), key=str)]


def test_a_score_that_a_seed_lacks_has_no_mean():
    """Which would be that of other seeds than the scores beside it."""
    assert spread(pd.Series([0.25, 0.5, 0.75])) == "0.500 ± 0.250"
    assert spread(pd.Series([0.25])) == "0.250"
    assert spread(pd.Series([0.25, np.nan])) == ""
