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
from scipy import stats
from test_experiments import RECIPE, write_recipes

import experiments as ex
import result_tables
from result_tables import (
    COLUMNS,
    CURVE_COLUMNS,
    CURVES,
    FIGURE,
    MAIN_SCORES,
    RESULTS,
    filled_in,
    format_spread,
)

START, END = "# A\n\n  text \n<!-- experiments:{} -->\n", "<!-- /experiments -->"
PAGE = Path("docs/page.md")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The working folder, empty but for a recipe and a folder for pages."""
    result_tables.read_predictions.cache_clear()
    monkeypatch.chdir(tmp_path)
    write_recipes(baseline=RECIPE)
    PAGE.parent.mkdir()


def result(recipe, seed, scores, flags=RECIPE, **more):
    """A row of results.csv."""
    names = "sst_accuracy", "para_accuracy", "sts_pearson"
    row = {name: f"{score:.6f}" for name, score in zip(names, scores, strict=True)}
    row |= {"recipe": recipe, "seed": str(seed), "budget": "4x10000", "precision": "float32"}
    row |= {"encoder": "minilm", "seconds_per_epoch": "100.0", "threads": "2", "data": "d"}
    row |= {"device": "CPU"}
    return row | {"flags": json.dumps(flags), "run": f"{recipe}{seed}{flags}{more}"} | more


def write_results(*rows):
    ex.add_rows(RESULTS, list(rows), COLUMNS, ["run"])


def tables(block):
    """Return {setting: {first cell of a row: its cells in all tables of the setting}} of a block,
    as `table --write` writes it into a page."""
    PAGE.write_text(START.format(block) + END)
    assert ex.main(["table", "--write"]) == 0
    found = {}
    for part in PAGE.read_text().split("\n### ")[1:]:
        rows = found[part.splitlines()[0]] = {}
        for table in re.findall(r"(?:^\|.*\n)+", part, re.MULTILINE):
            head, _, *lines = [line[2:-2].split(" | ") for line in table.splitlines()]
            for cells in lines:
                rows.setdefault(cells[0], {}).update(zip(head, cells, strict=True))
    return found


def test_tables_are_between_their_markers():
    hard = RECIPE | {"moe": "hard"}
    write_recipes(**{"moe-hard": hard})
    scores = [(0.41, 0.80, 0.87), (0.44, 0.81, 0.86), (0.46, 0.85, 0.85)]
    rows = [result("baseline", *seed_and_scores) for seed_and_scores in enumerate(scores)]
    rows += [result("moe-hard", 1, scores[0], hard, seconds_per_epoch="250.0")]
    rows += [result("moe-hard", 1, scores[0], hard, precision="bfloat16")]
    write_results(*rows)
    shown = tables("main")
    assert list(shown) == ["minilm, bfloat16, CPU, 4 × 10,000", "minilm, float32, CPU, 4 × 10,000"]
    assert list(shown["minilm, bfloat16, CPU, 4 × 10,000"]) == ["[moe-hard]"]
    shown = shown["minilm, float32, CPU, 4 × 10,000"]
    assert list(shown) == ["[baseline]", "[moe-hard]"]
    spreads = {
        name: f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"
        for name, values in zip(MAIN_SCORES.values(), zip(*scores, strict=True), strict=True)
    }
    means = [statistics.mean(of_seed) for of_seed in scores]
    spreads["mean"] = f"{statistics.mean(means):.3f} ± {statistics.stdev(means):.3f}"
    assert spreads.items() <= shown["[baseline]"].items()
    assert shown["[baseline]"]["seeds"] == "3"
    assert shown["[moe-hard]"]["seconds, relative"] == "2.50"
    assert "\n[moe-hard]: ../recipes/moe-hard.json\n" in PAGE.read_text()

    around = START.format("main"), END + START.format("original"), END + "\n| 1 | typed |\n<tail"
    PAGE.write_text("old\n".join(around))
    Path("README.md").write_text(START.format("original") + END)
    assert ex.main(["table", "--write"]) == 0
    text = PAGE.read_text()
    main, original = re.fullmatch("(.*)".join(map(re.escape, around)), text, re.DOTALL).groups()
    assert "### minilm" in main and f"| {spreads['sentiment']} |" in original
    assert "[baseline]: ../recipes/baseline.json" in original
    assert "[baseline]: recipes/baseline.json" in Path("README.md").read_text()
    ex.main(["table", "--write"])
    assert PAGE.read_text() == text


def test_tables_alone_are_printed_and_change_nothing(capsys):
    write_results(result("baseline", 1, (0.1, 0.2, 0.3)))
    text = START.format("main") + "old\n" + END
    for page in (PAGE, Path("README.md")):
        page.write_text(text)
    assert ex.main(["table"]) == 0
    assert PAGE.read_text() == Path("README.md").read_text() == text
    assert "| [baseline] | 1 | 0.100 | 0.200 | 0.300 | 0.200 |\n" in capsys.readouterr().out


def test_rows_compare_on_one_device_and_on_the_seeds_that_both_have():
    best = RECIPE | {"both_orders": True, "para_encoding": "both"}
    write_recipes(**{"best": best, "best/tried": RECIPE})
    shared, lone = (0.1, 0.2, 0.3), (0.7, 0.8, 0.9)
    gpu = dict(device="GPU", jobs="16")
    rows = [result("best", 1, shared, best, **gpu), result("best", 2, lone, best, **gpu)]
    rows += [result("best/tried", 1, (0.2, 0.2, 0.5), **gpu)]
    rows += [result("best/tried", 3, lone), result("best", 3, shared, best)]
    rows += [result("best", 1, shared, best, precision="bfloat16")]
    write_results(*rows)
    shown = tables("best")
    assert list(shown) == ["minilm, float32, CPU, 4 × 10,000", "minilm, float32, GPU, 4 × 10,000"]
    differences = {
        setting.split(", ")[2]: [(row["seeds"], row["mean, difference"]) for row in rows.values()]
        for setting, rows in shown.items()
    }
    assert differences == {"GPU": [("2", ""), ("1", "+0.100")], "CPU": [("1", ""), ("1", "+0.600")]}
    assert "CPU threads × runs at once: 2 × 16." in PAGE.read_text()


def test_a_clear_difference_has_an_interval_without_zero():
    write_recipes(near=RECIPE | {"clip": 1.0}, far=RECIPE | {"clip": 2.0}, single=RECIPE)
    gains = {"near": [0.01, -0.01, 0.02], "far": [0.10, 0.12, 0.11], "single": [0.3]}
    rows = [result("baseline", seed, (0.4 + seed / 10,) * 3) for seed in range(3)]
    for recipe, of_seeds in gains.items():
        flags = json.loads(Path(f"recipes/{recipe}.json").read_text())
        rows += [
            result(recipe, seed, (0.4 + seed / 10 + gain,) * 3, flags)
            for seed, gain in enumerate(of_seeds)
        ]
    write_results(*rows)
    tables("main")
    far = gains["far"]
    low, high = stats.t.interval(0.95, 2, statistics.mean(far), stats.sem(far))
    text = " ".join(PAGE.read_text().split())
    found = re.search(
        r"Clearly different from \[baseline\]: (.*?) \(of 2 with several seeds\)", text
    )
    name, mean, ends = re.fullmatch(r"(\S+) (\S+) \((.*)\)", found[1]).groups()
    assert (name, float(mean)) == ("[far]", pytest.approx(0.11))
    assert [float(end) for end in ends.split(" to ")] == pytest.approx([low, high], abs=2e-4)


def test_every_recipe_with_rows_is_shown():
    """Also one of a user's own, one whose file is gone or has changed, and one with more flags."""
    long = "a-folder-of-mine/with-quite-a-long-name-for-a-recipe"
    Path("recipes/a-folder-of-mine").mkdir()
    write_recipes(**{"mine": RECIPE, "changed": RECIPE | {"clip": 1.0}, long: RECIPE})
    scores = 0.1, 0.2, 0.3
    rows = [result(recipe, 1, scores) for recipe in ("mine", "changed", "gone", "baseline")]
    wide = {"clipped": "0.7 0.8 0.9", "peak_memory_mb": "12345", "seconds_per_epoch": "12345"}
    rows += [result(long, seed, scores, **wide) for seed in (1, 2)]
    rdrop = {"lr": 2e-3, "rdrop": {"sst": 1.0, "para": 0.5, "sts": 0.0}}
    rows += [result("baseline", 1, scores, RECIPE | rdrop)]
    rows += [result("mine", 1, scores, data="other")]
    write_results(*rows)
    (shown,) = tables("main").values()
    short = "[a-folder-of-…for-a-recipe]"
    names = ["[baseline]", short, "[baseline]¹", "[changed]²", "gone³"]
    assert list(shown) == [*names, "[mine]", "[mine]⁴"]
    text = PAGE.read_text()
    remarks = " ".join(text.split())
    assert f"\n{short}: ../recipes/{long}.json\n" in text
    flags = "with `--lr 0.002 --rdrop sst=1,para=0.5,sts=0`"
    assert f"[baseline]¹: {flags}." in remarks
    assert "[changed]²: its file has changed; run without `--clip`." in remarks
    assert "gone³: its file is gone; run with `--optimizer adamw" in remarks
    assert "[mine]⁴: data other." in remarks
    assert shown[short]["clipped"] == "0.70, 0.90"
    assert max(len(line) for line in text.splitlines() if line[0:1] == "|") <= 100


def test_the_summary_has_one_setting_and_the_figures_of_others():
    write_recipes(best=RECIPE)
    rows = [result("baseline", 1, (0.1, 0.2, 0.3), budget="9x10000")]
    rows += [result("baseline", 1, (0.1, 0.2, 0.3)), result("best", 1, (0.4, 0.5, 0.6))]
    write_results(*rows, result("best", 1, (0.4, 0.5, 0.6), RECIPE | {"lr": 2e-3}))
    Path("README.md").write_text(START.format("summary") + END)
    assert ex.main(["table", "--write"]) == 0
    text = Path("README.md").read_text()
    assert [line for line in text.splitlines() if line.startswith("|")][2:] == [
        "| [baseline] | MiniLM, 22 M | 0.100 | 0.200 | 0.300 |",
        "| [best] | MiniLM, 22 M | 0.400 | 0.500 | 0.600 |",
        "| three best models averaged | MiniLM, 22 M"
        " | not measured yet | not measured yet | not measured yet |",
        "| original report, baseline | BERT-base, 110 M | 0.494 | 0.870 | 0.866 |",
        "| best published single-task models | one each | 0.598 | 0.924 (doubtful) | 0.929 |",
    ]
    assert "4 epochs of 10,000 rows" in " ".join(text.split()) and "](docs/results.md)" in text


def keep(recipe, seed, run, scores):
    """Keep predictions: score -> labels and predictions."""
    path = Path("results/predictions", f"{recipe}-4x10000-seed{seed}-{run}.npz")
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, **scores)


def made_up(generator, labels, share):
    """Return labels, and predictions of which this share is right."""
    return np.stack([labels, np.where(generator.random(len(labels)) < share, labels, 1 - labels)])


def write_compared(n_tasks=3, gain=0.35):
    """Five seeds of recipes with so many tasks. `far` is better by `gain`."""
    names = [*MAIN_SCORES][:1] + [f"task{n}_matthews" for n in range(2, n_tasks + 1)]
    generator = np.random.default_rng(0)
    labels = {name: generator.integers(2, size=300) for name in names}
    write_recipes(near=RECIPE, far=RECIPE)
    rows = []
    for recipe, share in {"baseline": 0.6, "near": 0.6, "far": 0.6 + gain}.items():
        for seed in range(1, 6):
            run = f"{recipe}{seed}"
            scores = {name: made_up(generator, labels[name], share) for name in names}
            keep(recipe, seed, run, scores)
            row = result(recipe, seed, (0.5, 0.5, 0.5)) | {"run": run}
            row |= dict.fromkeys(MAIN_SCORES, "")
            rows.append(row | {n: f"{np.mean(a[0] == a[1]):.6f}" for n, a in scores.items()})
    write_results(*rows)


@pytest.mark.parametrize("n_tasks", [1, 2, 5])
def test_recipes_are_compared_for_each_task_and_the_mean(n_tasks, capsys):
    write_compared(n_tasks)
    assert ex.main(["compare", "baseline", "far", "near"]) == 0
    first = capsys.readouterr().out
    lines = [line[2:-2].split(" | ") for line in first.splitlines() if line.startswith("| ")]
    rows = [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]
    tasks = ["sentiment", *(f"task{n}_matthews" for n in range(2, n_tasks + 1)), "mean"]
    assert [(row["recipe"], row["score"]) for row in rows] == [
        (recipe, task) for recipe in ("far", "near") for task in tasks
    ]
    for row in rows:
        text = re.fullmatch(r"(\S+) \((\S+) to (\S+)\)", row["difference (95% interval)"])
        value, low, high = map(float, text.groups())
        assert low < value < high and row["seeds"] == "5"
        assert (low > 0) == (row["recipe"] == "far")
        assert float(row["p"]) <= float(row["p, Holm"]) <= 1
        assert (float(row["p, Holm"]) < 0.05) == (row["recipe"] == "far")
    assert ex.main(["compare", "baseline", "far", "near"]) == 0
    assert capsys.readouterr().out == first


def test_recipes_with_other_rows_or_seeds_are_not_compared(capsys):
    write_compared()
    scores = {name: np.zeros((2, 9)) for name in MAIN_SCORES}
    keep("far", 2, "far2", scores)
    result_tables.read_predictions.cache_clear()
    assert ex.main(["compare", "baseline", "far"]) == 1
    assert "no dev predictions of two of these recipes" in capsys.readouterr().err
    assert ex.main(["compare", "baseline", "near", "--budget", "gpu"]) == 1


@pytest.mark.parametrize("name, end", [("main", ""), ("other", END)])
def test_wrong_markers_are_an_error(name, end, capsys):
    text = START.format(name) + "mine\n" + end + START.format("best") + END
    Path("README.md").write_text(START.format("main") + "old\n" + END)
    PAGE.write_text(text)
    assert ex.main(["table", "--write"]) == 1
    assert f"experiments:{name} -->" in capsys.readouterr().err
    assert PAGE.read_text() == text
    assert "old" in Path("README.md").read_text()


@pytest.mark.parametrize("page", ["docs/results.md", "docs/results-variants.md"])
def test_the_pages_show_the_committed_results(page):
    """If this fails: python experiments.py table --write"""
    for folder in ("recipes", "results"):
        shutil.copytree(ROOT / folder, folder, dirs_exist_ok=True)
    text = filled_in(ROOT / page)
    assert text == (ROOT / page).read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert rows and max(map(len, rows)) <= 100
    assert max(row.count(" | ") for row in rows) < 6


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
