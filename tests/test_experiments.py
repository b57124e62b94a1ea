"""Recipes, trained with a tiny model on a few rows."""

import contextlib
import csv
import io
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from sklearn.metrics import accuracy_score, f1_score

import experiments as ex
import result_tables
from options import parse_options
from result_tables import BUDGETS, COLUMNS, RESULTS, Budget
from utils import check_writable

BUDGET = Budget(3, 640)  # in place of the full one
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
def flags(tiny_directory, small_data, tmp_path_factory):
    cache = str(tmp_path_factory.mktemp("cache"))
    return [
        "--bert_model",
        str(tiny_directory),
        "--data_dir",
        str(small_data),
        "--cache_dir",
        cache,
    ]


@pytest.fixture(scope="module")
def trained(flags, tmp_path_factory):
    """(folder where a good and a bad recipe were run at once, exit status, what was printed)"""
    folder, output = tmp_path_factory.mktemp("trained"), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setitem(BUDGETS, "full", BUDGET)
        write_recipes(baseline=RECIPE, bad=TOO_LONG)
        with contextlib.redirect_stdout(output):
            status = ex.main(["run", "bad", "baseline", "--jobs", "2", "--seeds", "1", *flags])
    return folder, status, output.getvalue()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working folder, empty but for a recipe."""
    monkeypatch.chdir(tmp_path)
    write_recipes(baseline=RECIPE)
    return tmp_path


def test_a_row_is_what_the_run_gave(trained, small_data):
    """Its prediction files are scored again."""
    folder, _, output = trained
    (row,) = rows_of(folder / "results/results.csv")
    run = folder / "models/experiments" / f"baseline-3x640-seed11711-{row['run']}"
    labels, predictions = {}, {}
    files = {
        "sst": ("ids-sst-dev.csv", "sentiment"),
        "para": ("quora-dev.csv", "is_duplicate"),
        "sts": ("sts-dev.csv", "similarity"),
    }
    for task, (filename, column) in files.items():
        with open(small_data / filename, newline="") as file:
            labels[task] = [float(line[column]) for line in csv.DictReader(file, delimiter="\t")]
        lines = (run / f"predictions/{task}-dev-output.csv").read_text().splitlines()[1:]
        predictions[task] = [float(line.split("\t")[1]) for line in lines]
    for task in ("sst", "para"):
        both = labels[task], predictions[task]
        assert float(row[f"{task}_accuracy"]) == pytest.approx(accuracy_score(*both), abs=1e-6)
        macro = f1_score(*both, average="macro", zero_division=0)
        assert float(row[f"{task}_macro_f1"]) == pytest.approx(macro, abs=1e-6)
    correlation = np.corrcoef(labels["sts"], predictions["sts"])[0, 1]
    assert float(row["sts_pearson"]) == pytest.approx(correlation, abs=1e-5)
    assert (row["budget"], row["rows"]) == ("3x640", "64/64/64")
    assert (row["threads"], row["jobs"]) == ("1", "2")
    assert json.loads(row["flags"]) == RECIPE and not re.search("/", row["encoder"])
    assert float(row["peak_memory_mb"]) > 100 and float(row["seconds"]) > 0

    log = (run / "log.txt").read_text()
    means = {int(n): float(m) for n, m in re.findall(r"^epoch (\d): .* score (\d\.\d+)", log, re.M)}
    curve = [point for point in rows_of(folder / "results/curves.csv") if point["metric"] == "mean"]
    assert {int(point["epoch"]): float(point["value"]) for point in curve} == pytest.approx(
        means, abs=1e-4
    )
    assert len(means) == 3 and means[int(row["best_epoch"])] == max(means.values())
    assert all(line in output for line in re.findall(r"^epoch \d: \d+ s,.*", log, re.M))


def test_predictions_are_kept(trained, small_data):
    """Those of dev give the scores again; those of test have the name of the run, so that a run on
    another device does not replace them."""
    folder, _, _ = trained
    (row,), (run,) = rows_of(folder / RESULTS), folder.glob("models/experiments/baseline-*")
    kept = folder / "results/predictions" / f"{run.name}.npz"
    with np.load(kept) as arrays:
        assert set(arrays) == {"sst_accuracy", "para_accuracy", "sts_pearson"}
        for name in ("sst_accuracy", "para_accuracy"):
            assert float(row[name]) == pytest.approx(accuracy_score(*arrays[name]), abs=1e-6)
            assert arrays[name].dtype == np.uint8
        expected = pytest.approx(np.corrcoef(*arrays["sts_pearson"])[0, 1], abs=1e-5)
        assert float(row["sts_pearson"]) == expected
    copies = {path.name: path.read_bytes() for path in kept.with_suffix("").iterdir()}
    tests = {path.name: path.read_bytes() for path in run.glob("predictions/*-test-output.csv")}
    assert copies == tests and len(tests) == 3
    assert row["torch"] == torch.__version__


def test_the_models_of_two_seeds_are_averaged(folder, flags, small_data, monkeypatch, capsys):
    """The numbers of the mean are the means of both runs' numbers, and its scores are those of these."""
    monkeypatch.setitem(BUDGETS, "full", Budget(1, 32))
    own = ["baseline", *flags, "--sts"]
    assert ex.main(["average", *own]) == 1
    assert "fewer than two models of its runs are in models/experiments" in capsys.readouterr().err
    assert ex.main(["run", *own, "--seeds", "2"]) == 0
    assert ex.main(["average", *own]) == 0
    *_, row = rows_of(RESULTS)
    assert (row["recipe"], row["seed"], row["best_epoch"]) == ("baseline-averaged", "11711+1", "")
    with open(small_data / "sts-dev.csv", newline="") as file:
        labels = [float(line["similarity"]) for line in csv.DictReader(file, delimiter="\t")]
    single = [
        np.loadtxt(path, delimiter="\t", skiprows=1, usecols=1)
        for path in folder.glob("models/experiments/baseline-1x32-*/predictions/sts-dev-output.csv")
    ]
    assert len(single) == 2
    expected = np.corrcoef(labels, np.mean(single, axis=0))[0, 1]
    assert float(row["sts_pearson"]) == pytest.approx(expected, abs=1e-4)
    # The mean of more models takes its place.
    assert ex.main(["run", *own, "--seeds", "3"]) == ex.main(["average", *own]) == 0
    means = [row["seed"] for row in rows_of(RESULTS) if row["recipe"] == "baseline-averaged"]
    assert means == ["11711+1+2"]
    assert ex.main(["table"]) == 0
    # The other flag, --sts, is explained below the table.
    assert re.search(r"\| baseline-averaged² \| 1‡? \|", capsys.readouterr().out)


def test_predictions_of_an_earlier_run_are_kept_too(trained, flags, monkeypatch):
    monkeypatch.chdir(trained[0])
    monkeypatch.setitem(BUDGETS, "full", BUDGET)
    (kept,) = Path("results/predictions").glob("*.npz")
    before = kept.read_bytes()
    kept.unlink()
    monkeypatch.setattr(ex, "train", None)
    assert ex.main(["run", "baseline", "--seeds", "1", *flags]) == 0
    assert kept.read_bytes() == before


def test_a_failed_run_stops_no_other(trained):
    folder, status, output = trained
    assert status == 1
    assert re.search(r"^bad-3x640-\S+: failed, exit status 1 .*ends with:$", output, re.M)
    assert re.search(r"^error: --max_length 4000 is more", output, re.M)
    assert [row["recipe"] for row in rows_of(folder / "results/results.csv")] == ["baseline"]


def test_only_what_is_not_done_is_run(trained, flags, small_data, tmp_path, monkeypatch):
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
    shutil.copytree(small_data, data)
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


class CtrlC(io.StringIO):
    """An output that interrupts the program when the first epoch is over."""

    def write(self, text):
        if re.match(r"epoch 1: \d+ s", text):
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        return super().write(text)


def test_an_interrupted_run_comes_to_the_same_numbers(trained, flags, folder, monkeypatch, capsys):
    command = ["run", "baseline", "--seeds", "1", *flags]
    command += ["--epochs", "3", "--samples_per_epoch", "640"]
    # A job in the background of a shell ignores SIGINT, and so would the tests in it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", output := CtrlC())
        assert ex.main(command) == 130
    signal.signal(signal.SIGINT, before)
    assert "epoch 1: " in output.getvalue() and "epoch 3: " not in output.getvalue()
    assert "interrupted" in capsys.readouterr().err
    assert not Path("results/results.csv").exists()
    assert ex.main(command) == 0
    assert "resumed after" in capsys.readouterr().out
    (row,), (expected,) = (rows_of(at / "results/results.csv") for at in (folder, trained[0]))
    same = [name for name in row if not re.search("seconds|memory|jobs", name)]
    assert {name: row[name] for name in same} == {name: expected[name] for name in same}
    curves = Path("results/curves.csv").read_bytes()
    assert curves == (trained[0] / "results/curves.csv").read_bytes()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("run nothing", "there is no recipe 'nothing', only baseline, broken, chain, long, then"),
        ("run broken", "--config recipes/broken.json: not JSON"),
        ("run baseline --seed 3", "--seed: experiments.py sets this itself"),
        ("run baseline --sst_dev_out x.csv", "--sst_dev_out: experiments.py sets this itself"),
        ("run baseline --tensorboard_subfolder x", "--tensorboard_subfolder: experiments.py sets"),
        ("run long", "recipes/long.json: --epochs: experiments.py sets this itself"),
        ("run chain", "recipes/chain.json: 'then', after which it comes, goes on from another run"),
        ("plot typo", "results/curves.csv: no run of typo with --budget 4x10000"),
        ("run baseline --data_dir nowhere", "nowhere/ids-sst-train.csv: cannot be read"),
        ("plot", "results/curves.csv: no run of these recipes with --budget 4x10000"),
        ("table --write", "README.md and docs: no page has a line <!-- experiments:NAME -->"),
    ],
)
def test_what_cannot_work_is_an_error_in_one_line(folder, arguments, message, capsys):
    Path("recipes/broken.json").write_text("{")
    write_recipes(long={"epochs": 7}, then={"after": "baseline"}, chain={"after": "then"})
    assert ex.main(arguments.split()) == 1
    errors = capsys.readouterr().err
    assert errors.startswith(f"error: {message}") and errors.count("\n") == 1
    assert not Path("results").exists()


def test_the_memory_of_a_gpu_is_its_own(trained, flags, monkeypatch):
    """It is what CUDA's allocator had at most, not what the process took of the host's."""
    monkeypatch.chdir(trained[0])
    monkeypatch.setitem(BUDGETS, "full", BUDGET)
    run = ex.plan_run("baseline", 11711, ex.BUDGETS["full"], flags)
    before, text = ex.read_outcome(run)[0], run.log.read_text()
    with monkeypatch.context() as patch:
        more = "memory of NVIDIA H100 80GB HBM3: 1,234 MB at most\n\nprocess: "
        patch.setattr(Path, "read_text", lambda *_, **__: text.replace("process: ", more))
        assert ex.read_outcome(run)[0] == before | {"peak_memory_mb": "1234"}


def test_the_epochs_of_a_killed_process_count(trained, flags, monkeypatch):
    """A process that was killed wrote no line of its own."""
    monkeypatch.chdir(trained[0])
    monkeypatch.setitem(BUDGETS, "full", BUDGET)
    run = ex.plan_run("baseline", 11711, ex.BUDGETS["full"], flags)
    text = run.log.read_text()
    killed = re.sub(r"^epoch (\d+): \d+ s,", r"epoch \1: 5000 s,", text, flags=re.MULTILINE)
    assert killed != text
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", lambda *_, **__: killed)
        row, _ = ex.read_outcome(run)
    assert int(row["seconds"]) == 5000 * int(row["budget"].split("x")[0])


def test_a_cpu_is_described_with_its_instructions(monkeypatch):
    """So that times with and without them are not pooled."""
    cpu, texts = torch.device("cpu"), []
    for features in ([], ["avx512_bf16"], ["avx512_bf16", "amx"]):
        monkeypatch.setattr(ex, "cpu_features", lambda: features)
        texts.append(ex.describe_device(cpu))
    plain = texts[0]
    assert plain.startswith(f"{os.cpu_count()} cores of ")
    assert texts == [plain, f"{plain}, avx512_bf16", f"{plain}, avx512_bf16, amx"]


def test_the_recipes_are_flags():
    paths = list((ROOT / "recipes").rglob("*.json"))
    assert {"baseline.json", "sophiah.json", "moe-hard.json"} <= {path.name for path in paths}
    for path in paths:
        options = vars(parse_options(["--config", str(path)]))
        flags = json.loads(path.read_text())
        parent, after = flags.pop("parent", None), flags.pop("after", None)
        assert after is None or (ROOT / "recipes" / f"{after}.json").is_file()
        assert flags.keys() <= options.keys() and "parent" not in options
        assert (parent is None) == (path == ROOT / "recipes/baseline.json")
        assert parent is None or (ROOT / "recipes" / f"{parent}.json").is_file()


def test_a_recipe_goes_on_from_the_model_of_another(folder, flags, monkeypatch, capsys):
    """At the same number of rows: the other one has the first half of the epochs."""
    monkeypatch.setitem(BUDGETS, "full", Budget(2, 64))
    alone = RECIPE | {"tasks": "sts"}
    write_recipes(**{"single-sts": alone, "then-sts": alone | {"after": "baseline"}})
    run = ["run", "then-sts", "single-sts", "baseline", "--seeds", "1", "--jobs", "2", *flags]
    assert ex.main(run) == 0
    assert "first 1 runs that others go on from" in capsys.readouterr().out
    rows = {(row["recipe"], row["budget"]): row for row in rows_of(RESULTS)}
    expected = {("then-sts", "2x64"), ("single-sts", "2x64"), ("baseline", "2x64")}
    expected |= {("baseline", "1x64")}
    assert rows.keys() == expected
    after = rows["then-sts", "2x64"]
    assert json.loads(after["flags"]) == alone | {"after": "baseline"}
    assert after["encoder"] == rows["baseline", "1x64"]["encoder"]
    (first,) = Path("models/experiments").glob("baseline-1x64-seed11711-*/*.pt")
    (second,) = Path("models/experiments").glob("then-sts-2x64-seed11711-*/*.pt")
    began, went_on = (torch.load(path, weights_only=True) for path in (first, second))
    assert went_on["epoch"] == 1 and went_on["options"]["init_from"] == str(first)
    steps = [*second.parent.glob("log.txt")][0].read_text()
    assert "encoder, pooling and heads kept: sts" in " ".join(steps.split()), steps
    assert not torch.equal(
        *(c["model"]["bert.embeddings.word_embeddings.weight"] for c in (began, went_on))
    )
    # What is done needs the other's model no more.
    shutil.rmtree(first.parent)
    assert ex.main(run) == 0
    shown = capsys.readouterr().out
    assert "3 runs, 3 of them done already" in shown and "first" not in shown
    # A table of its own.
    table = result_tables.together_table(result_tables.summarize())
    names = ("single-sts", "baseline", "then-sts")
    lines = [row.strip("| ").split(" | ") for row in table.splitlines() if "similarity" in row]
    line = lines[0] + lines[1][1:]
    scores = [float(rows[name, "2x64"]["sts_pearson"]) for name in names]
    assert line[:2] == ["similarity", "1"]
    assert [float(cell) for cell in line[2:5]] == pytest.approx(scores, abs=6e-4)
    found = [float(cell.strip("*").split()[0]) for cell in line[5:]]
    assert found == pytest.approx([score - scores[0] for score in scores[1:]], abs=6e-5)
    assert ex.main(["run", "then-sts", *flags, "--epochs", "3"]) == 1
    assert "half of 3 epochs go to 'baseline'" in capsys.readouterr().err


def test_a_first_stage_that_fails_stops_its_second_only(folder, flags, monkeypatch, capsys):
    monkeypatch.setitem(BUDGETS, "full", Budget(2, 64))
    write_recipes(bad=TOO_LONG, **{"then-bad": RECIPE | {"after": "bad"}})
    started = []

    def train_all(runs, _):
        names = [run.identity["recipe"] for run in runs]
        started.append(names)
        return [run.name for run, name in zip(runs, names, strict=True) if name == "bad"]

    monkeypatch.setattr(ex, "train_all", train_all)
    assert ex.main(["run", "then-bad", "baseline", "--seeds", "1", *flags]) == 1
    assert started == [["bad"], ["baseline"]]
    error = capsys.readouterr().err
    assert "failed: bad-1x64-seed11711-" in error and ", then-bad-2x64-seed11711-" in error


def test_a_smoketest_is_averaged_too(folder, flags):
    """Its dev scores are of 32 rows."""
    own = ["baseline", *flags, "--sts", "--smoketest", "--epochs", "1"]
    assert ex.main(["run", *own, "--seeds", "2"]) == ex.main(["average", *own]) == 0
    *_, row = rows_of(RESULTS)
    (kept,) = Path("results/predictions").glob("baseline-averaged-*.npz")
    with np.load(kept) as arrays:
        labels, predictions = arrays["sts_pearson"]
    assert row["recipe"] == "baseline-averaged" and len(labels) == 32
    expected = np.corrcoef(labels, predictions)[0, 1]
    assert float(row["sts_pearson"]) == pytest.approx(expected, abs=1e-5)


def test_two_writers_lose_nothing(folder):
    def write(recipe):
        for seed in range(12):
            row = {"run": f"{recipe}{seed}", "recipe": recipe, "seed": str(seed)}
            ex.add_rows(RESULTS, [row], COLUMNS, ["run"])
        os._exit(0)

    fork = multiprocessing.get_context("fork")
    writers = [fork.Process(target=write, args=(recipe,)) for recipe in ("one", "other")]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    written = [(row["recipe"], row["seed"]) for row in rows_of("results/results.csv")]
    assert written == [(r, str(s)) for r in ("one", "other") for s in sorted(range(12), key=str)]
