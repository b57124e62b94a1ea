"""Tables and curves, from invented results."""

import json
import re
import shutil
import statistics
from pathlib import Path

import matplotlib.figure
import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from test_experiments import RECIPE, write_recipes

import experiments as ex
from result_tables import (
    COLUMNS,
    CURVE_COLUMNS,
    CURVES,
    FIGURE,
    MAIN_SCORES,
    RESULTS,
    format_spread,
)

START, END = "# A\n\n  text \n<!-- experiments:{} -->\n", "<!-- /experiments -->"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The working folder, empty but for a recipe."""
    monkeypatch.chdir(tmp_path)
    write_recipes(baseline=RECIPE)


def result(recipe, seed, scores, flags=RECIPE, **more):
    """A row of results.csv."""
    names = "sst_accuracy", "para_accuracy", "sts_pearson"
    row = {name: f"{score:.6f}" for name, score in zip(names, scores, strict=True)}
    row |= {"recipe": recipe, "seed": str(seed), "budget": "4x10000", "precision": "float32"}
    row |= {"encoder": "minilm", "seconds_per_epoch": "100.0", "threads": "2", "data": "d"}
    return row | {"flags": json.dumps(flags), "run": f"{recipe}{seed}{flags}{more}"} | more


def write_results(*rows):
    ex.add_rows(RESULTS, list(rows), COLUMNS, ["run"])


def cells(table):
    lines = [line.strip("| ").split(" | ") for line in table.splitlines() if line[:1] == "|"]
    return [dict(zip(lines[0], line)) for line in lines[2:]]


def test_tables_are_between_their_markers():
    hard = RECIPE | {"moe": "hard"}
    write_recipes(**{"moe-hard": hard})
    scores = [(0.41, 0.80, 0.87), (0.44, 0.81, 0.86), (0.46, 0.85, 0.85)]
    rows = [result("baseline", *seed_and_scores) for seed_and_scores in enumerate(scores)]
    rows += [result("moe-hard", 1, scores[0], hard, seconds_per_epoch="250.0")]
    rows += [result("moe-hard", 1, scores[0], hard, precision="bfloat16")]
    rows += [result("baseline", 1, scores[0], RECIPE | {"lr": 2e-3})]
    rows += [result("baseline", 1, scores[0], {}), result("gone", 1, scores[0])]
    write_results(*rows)
    around = START.format("sst"), END + START.format("moe"), END + "\n| 1 | typed |\n<tail"
    Path("README.md").write_text("old\n".join(around))
    assert ex.main(["table"]) == 0
    text = Path("README.md").read_text()
    sst, moe = re.fullmatch("(.*)".join(map(re.escape, around)), text, re.DOTALL).groups()

    accuracies = [accuracy for accuracy, _, _ in scores]
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

    means = [statistics.mean(of_seed) for of_seed in scores]
    shown = {row["recipe"]: row for row in cells(moe)}
    assert set(shown) == {"`baseline`", "`baseline --lr 0.002`", "`moe-hard`"}  # float32 alone
    spread = f"{statistics.mean(means):.3f} ± {statistics.stdev(means):.3f}"
    assert shown["`baseline`"]["mean"] == spread
    assert shown["`moe-hard`"]["seconds / baseline's"] == "2.50"
    ex.main(["table"])
    assert Path("README.md").read_text() == text


def test_rows_compare_on_one_device_and_on_the_seeds_that_both_have():
    best = RECIPE | {"both_orders": True, "para_encoding": "both"}
    tried = RECIPE | {
        "para_encoding": "both",
        "lr": 2e-3,
        "rdrop": {"sst": 1.0, "para": 0.5, "sts": 0.0},
    }
    write_recipes(**{"best": best, "best/tried": tried})
    shared, lone = (0.1, 0.2, 0.3), (0.7, 0.8, 0.9)
    gpu = dict(device="GPU", jobs="16")
    rows = [result("best", 1, shared, best, **gpu), result("best", 2, lone, best, **gpu)]
    rows += [result("best/tried", 1, (0.2, 0.2, 0.5), tried, **gpu)]
    rows += [result("best/tried", 3, lone, tried, device="CPU")]
    rows += [result("best", 3, shared, best, device="CPU")]
    write_results(*rows)
    Path("README.md").write_text(START.format("best") + END)
    assert ex.main(["table"]) == 0
    shown = {(row["recipe"], row["device"]): row for row in cells(Path("README.md").read_text())}
    names = ("`best`", "GPU"), ("`best/tried`", "GPU"), ("`best`", "CPU"), ("`best/tried`", "CPU")
    columns = (
        "seeds",
        "mean compared with the first row, same seeds",
        "flags compared with the first row",
    )
    flags = "`--lr 0.002 --rdrop sst=1,para=0.5,sts=0`, without `--both_orders`"
    assert [tuple(shown[name][column] for column in columns) for name in names] == [
        ("2", "", ""),
        ("1", "+0.100", flags),
        ("1", "", ""),
        ("1", "+0.600", flags),
    ]
    assert [shown[name]["CPU threads × runs at once"] for name in names[1:3]] == ["2 × 16", "2"]


@pytest.mark.parametrize("name, end", [("sst", ""), ("other", END)])
def test_wrong_markers_are_an_error(name, end, capsys):
    text = START.format(name) + "mine\n" + end + START.format("moe") + END
    Path("README.md").write_text(text)
    assert ex.main(["table"]) == 1
    assert f"experiments:{name} -->" in capsys.readouterr().err
    assert Path("README.md").read_text() == text


def test_the_readme_shows_the_committed_results():
    """If this fails: python experiments.py table"""
    for folder in ("recipes", "results"):
        shutil.copytree(ROOT / folder, folder, dirs_exist_ok=True)
    shutil.copy(ROOT / "README.md", "README.md")
    assert ex.main(["table"]) == 0
    assert Path("README.md").read_text() == (ROOT / "README.md").read_text()


def test_curves_are_the_mean_over_seeds_within_its_range(monkeypatch):
    values = {1: [0.5, 0.6, 0.7], 2: [0.3, 0.8, 0.4], 3: [0.1, 0.2, 0.3]}  # epoch -> of three seeds
    runs = [result("baseline", seed, (1, 1, 1)) for seed in range(3)]
    write_results(*runs, result("baseline", 1, (1, 1, 1), budget="2x4000"))
    points = [
        {"run": run["run"], "epoch": str(epoch), "split": "dev", "metric": metric}
        | {"value": str(values[epoch][seed] / (1 + number))}
        for number, metric in enumerate(MAIN_SCORES)
        for seed, run in enumerate(runs)
        for epoch in values
    ]
    ex.add_rows(CURVES, points, CURVE_COLUMNS, CURVE_COLUMNS[:-1])
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
    for number, panel in enumerate(figures[0].axes):
        (line,) = panel.lines
        means = [statistics.mean(of_epoch) / (1 + number) for of_epoch in values.values()]
        assert line.get_xdata() == pytest.approx([1, 2, 3])
        assert line.get_ydata() == pytest.approx(means)
        band = panel.collections[0].get_paths()[0].vertices
        ends = {float(y) for x, y in band if x == 2}
        assert sorted(ends)[0] == pytest.approx(0.3 / (1 + number))
        assert sorted(ends)[-1] == pytest.approx(0.8 / (1 + number))


def test_a_score_that_a_seed_lacks_has_no_mean():
    """It would be the mean of other seeds than in the columns next to it."""
    assert format_spread(pd.Series([0.25, 0.5, 0.75])) == "0.500 ± 0.250"
    assert format_spread(pd.Series([0.25])) == "0.250"
    assert format_spread(pd.Series([0.25, np.nan])) == ""
