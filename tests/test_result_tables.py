"""Tables and curves, from invented results."""

import contextlib
import json
import re
import statistics
from pathlib import Path

import matplotlib.figure
import numpy as np
import pandas as pd
import pytest
from scipy import stats
from test_experiments import RECIPE, write_recipes

import experiments as ex
import result_tables
from result_tables import (
    COLUMNS,
    CURVE_COLUMNS,
    CURVES,
    DEV_ROWS,
    FIGURE,
    MAIN_SCORES,
    RESULTS,
    format_spread,
    read_predictions,
    read_table,
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
    row |= {"device": "CPU", "commit": "0"}
    return row | {"flags": json.dumps(flags), "run": f"{recipe}{seed}{flags}{more}"} | more


def write_results(*rows):
    ex.add_rows(RESULTS, list(rows), COLUMNS, ["run"])


def write_family(**parents):
    """Recipes with the flags of the baseline, name -> parent; `__` is a folder."""
    flags = {name.replace("__", "/"): parent for name, parent in parents.items()}
    write_recipes(**{name: RECIPE | {"parent": parent} for name, parent in flags.items()})


def write_curves(runs, means):
    """Dev means of each epoch, a list for each run; the best epoch need not be the last one."""
    points = [
        {"run": run["run"], "epoch": str(epoch), "split": split, "metric": metric}
        | {"value": str(value + 0.1 * (split == "train") + 0.2 * (metric != "mean"))}
        for run, of_run in zip(runs, means, strict=True)
        for epoch, value in enumerate(of_run, start=1)
        for split in ("dev", "train")
        for metric in ("mean", *MAIN_SCORES)
    ]
    ex.add_rows(CURVES, points, CURVE_COLUMNS, CURVE_COLUMNS[:-1])


def intervals():
    """Return the differences above the tables of PAGE: (compared with, recipe) -> text."""
    text = " ".join(PAGE.read_text().split())
    found = {}
    for name, texts in re.findall(r"Compared with (\S+): (.*?\))(?:\*\*)?\.", text):
        for item in re.split(r"(?<=\)), |(?<=\)\*\*), ", texts):
            recipe, difference = item.split(" ", 1)
            found[name, recipe] = difference
    return found


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
    write_recipes(**{"moe-hard": hard | {"parent": "baseline"}})
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
    assert shown["[moe-hard]"]["seconds (relative)"] == "250 (2.50)"
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
    write_recipes(**{"best": best, "best/tried": RECIPE | {"parent": "best"}})
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


def test_a_recipe_is_compared_with_its_nearest_ancestor_that_has_a_row():
    Path("recipes/best").mkdir(parents=True)
    parents = {"best": "baseline", "best__a": "best", "best__b": "best__a", "best__c": "best__b"}
    write_family(**{name: parent.replace("__", "/") for name, parent in parents.items()})
    write_recipes(orphan=RECIPE)
    values = {"baseline": 0.40, "best/a": 0.47, "best/c": 0.44, "orphan": 0.9}
    rows = [result(recipe, 1, (value,) * 3) for recipe, value in values.items()]
    other = RECIPE | {"lr": 0.5}
    rows += [result("best/a", 1, (0.5,) * 3, other), result("gone", 1, (0.1,) * 3)]
    rows += [result("best/c", 1, (0.2,) * 3, budget="2x4000")]
    write_results(*rows)
    long, short = tables("best").values()
    found = {recipe: row["mean, difference"] for recipe, row in long.items()}
    assert found == {
        "[baseline]": "",
        "[best/a]": "+0.070",
        "[best/a]¹": "+0.030",
        "[best/c]": "-0.030",
    }
    assert list(intervals()) == [
        ("[baseline]", "[best/a]"),
        ("[best/a]", "[best/a]¹"),
        ("[best/a]", "[best/c]"),
    ]
    assert list(short) == ["[best/c]"] and "mean, difference" not in short["[best/c]"]
    (main,) = tables("main").values()
    assert {row.get("mean, difference", "") for row in main.values()} == {""}


@pytest.mark.parametrize(
    "parents, message", [({"a": "b", "b": "a"}, "own parents"), ({"a": "x"}, "'x'")]
)
def test_parents_in_a_circle_or_without_a_file_are_one_clear_line(parents, message, capsys):
    write_family(**parents)
    write_results(result("a", 1, (0.1, 0.2, 0.3)))
    assert ex.main(["table"]) == 1
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1


GAINS = {"near": [0.01, -0.01, 0.02], "far": [0.10, 0.12, 0.11], "single": [0.3]}
GAINS |= {"two": [0.02, 0.03], "lower": [-0.2, -0.21, -0.2, -0.19]}


def write_gains():
    write_family(**dict.fromkeys(GAINS, "baseline"))
    scores = {"baseline": [0.0] * 5} | GAINS
    rows = [
        result(recipe, seed, (0.4 + seed / 100 + gain,) * 3)
        for recipe, gains in scores.items()
        for seed, gain in enumerate(gains)
    ]
    write_results(*rows)


def test_without_predictions_an_interval_is_students_about_seeds_and_nothing_is_clear():
    """SciPy's interval. Two of them are without 0, but too narrow."""
    write_gains()
    (rows,) = tables("main").values()
    found = intervals()
    assert found.keys() == {("[baseline]", f"[{recipe}]") for recipe in GAINS}
    for recipe, gains in GAINS.items():
        text, cell = found["[baseline]", f"[{recipe}]"], rows[f"[{recipe}]"]["mean, difference"]
        if len(gains) == 1:
            assert (text, cell) == ("+0.3000 (no interval)", "+0.300")
            continue
        ends = stats.t.interval(0.95, len(gains) - 1, statistics.mean(gains), stats.sem(gains))
        assert (ends[0] > 0 or ends[1] < 0) == (recipe in ("far", "lower"))
        values = [float(number) for number in re.findall(r"[+-][\d.]+", text)]
        assert values == pytest.approx([statistics.mean(gains), *ends], abs=6e-5)
        assert text.endswith(", seeds)") and "**" not in text + cell


def test_a_block_begins_with_the_differences_that_are_clear():
    write_children()
    assert len(tables("main")) == 1
    answer = " ".join(PAGE.read_text().partition("-->")[2].partition("###")[0].split())
    head, *clear = re.split(r"Clear ones: |; ", answer.removesuffix("."))
    assert head.strip() == "Differences with an interval: 3."
    assert {text.split()[0] for text in clear} == {"[far]", "[low]"}
    assert all(text.endswith("compared with [baseline], 4 × 10,000") for text in clear)


def test_a_setting_begins_with_its_answer():
    write_children()
    tables("main")
    text = " ".join(PAGE.read_text().partition("\n### ")[2].split())
    answer = text.partition("Compared with")[0]
    assert answer.endswith(" Clearly better: [far]. Clearly worse: [low]. ")


def test_a_setting_ends_with_what_it_cannot_tell():
    write_gains()
    tables("main")
    text = " ".join(PAGE.read_text().partition("\n### ")[2].split())
    below = text[text.rindex("|") :]
    assert "(no interval)" in text and "chance can explain the difference" in below


def test_a_setting_without_a_clear_difference_says_so():
    write_family(tried="baseline")
    write_results(*(result(name, 1, (0.5,) * 3) for name in ("baseline", "tried")))
    tables("main")
    assert "\n\nNo difference is clear. Compared with [baseline]:" in PAGE.read_text()
    write_results(result("tried", 2, (0.6,) * 3), result("baseline", 2, (0.4,) * 3))
    tables("main")
    assert "(no interval)" not in PAGE.read_text() and "chance" not in PAGE.read_text()


def test_kept_predictions_give_the_interval_of_compare(capsys):
    """Scores in the table alone say that the recipes are equal: other rows decide."""
    write_children()
    (rows,) = tables("main").values()
    found = intervals()
    assert ex.main(["compare", "baseline", "far", "low", "near"]) == 0
    lines = [line[2:-2].split(" | ") for line in capsys.readouterr().out.splitlines()]
    compared = {line[0]: line[3] for line in lines if line[2:3] == ["mean"]}
    assert {name: text.strip("*") for (_, name), text in found.items()} == {
        f"[{name}]": text for name, text in compared.items()
    }
    bold = {name for (_, name), text in found.items() if text.startswith("**")}
    assert bold == {"[far]", "[low]"}
    assert rows["[far]"]["mean, difference"].startswith("**")


def test_a_mean_of_models_is_compared_with_each_of_them(capsys):
    write_compared(2)
    table = read_table(RESULTS, COLUMNS)
    generator, names = np.random.default_rng(1), ("sst_accuracy", "task2_matthews")
    scores = {n: made_up(generator, read_predictions("far1")[n][0], 0.99) for n in names}
    keep("far-averaged", "mean", "averaged", scores)
    row = table[table["run"] == "far1"].iloc[0].to_dict()
    row |= {"recipe": "far-averaged", "seed": "1+2+3+4+5", "run": "averaged"}
    accuracies = {n: np.mean(labels == predictions) for n, (labels, predictions) in scores.items()}
    write_results(row | {name: f"{value:.6f}" for name, value in accuracies.items()})
    singles = table[table["recipe"] == "far"]["sst_accuracy"].astype(float)
    gain = accuracies["sst_accuracy"] - singles.mean()
    assert ex.main(["compare", "far", "far-averaged"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if "| sentiment |" in line)
    assert f"| 5 | sentiment | {gain:+.4f} (" in line
    (rows,) = tables("main").values()
    assert rows["far-averaged"]["seeds"] == "1" and rows["far-averaged"]["mean, difference"]
    assert ("[far]", "far-averaged") in intervals()


def test_figures_of_the_report_are_next_to_ours_in_one_setting():
    write_recipes(tagging=RECIPE)
    short = [result(name, 1, (0.4, 0.5, 0.6), budget="2x4000") for name in ("baseline", "tagging")]
    write_results(result("baseline", 1, (0.7, 0.8, 0.9)), *short)
    PAGE.write_text(START.format("original") + END)
    assert ex.main(["table", "--write"]) == 0
    ours = [line for line in PAGE.read_text().splitlines() if "| minilm" in line]
    assert ours == [
        f"| [{name}] | minilm, 2 × 4,000 | 1 | 0.400 | 0.500 | 0.600 |"
        for name in ("baseline", "tagging")
    ]


def test_recipes_without_a_seed_in_common_are_not_compared():
    write_family(tried="baseline")
    write_results(result("baseline", 1, (0.5,) * 3), result("tried", 2, (0.5,) * 3))
    (rows,) = tables("main").values()
    assert "mean, difference" not in rows["[tried]"] and "Compared" not in PAGE.read_text()


def test_a_row_is_compared_with_one_of_the_same_data():
    """With several, the one with the same files; with none, one whose dev rows are not known to be
    others."""
    write_family(tried="baseline", more="baseline", other="baseline")
    labels = {"A": np.zeros(9), "B": np.ones(9)}
    rows = []
    for data, score in {"A": 0.5, "B": 0.4}.items():
        for seed in (1, 2):
            run = f"baseline{seed}{data}"
            rows.append(result("baseline", seed, (score,) * 3, data=data, run=run))
            scores = {name: np.stack([labels[data]] * 2) for name in MAIN_SCORES}
            keep("baseline", seed, run, scores)
    for recipe, data, of in (("tried", "B", "B"), ("more", "B+", "B"), ("other", "C", "C")):
        rows.append(result(recipe, 1, (0.41,) * 3, data=data, run=recipe))
        scores = {name: np.stack([labels.get(of, np.zeros(7))] * 2) for name in MAIN_SCORES}
        keep(recipe, 1, recipe, scores)
    write_results(*rows)
    (shown,) = tables("main").values()
    found = {name: row["mean, difference"] for name, row in shown.items() if "base" not in name}
    assert found == {"[tried]": "+0.010", "[more]": "+0.010", "[other]": ""}


def test_the_last_epoch_is_beside_the_best_and_doubtful_runs_are_marked():
    write_family(curves="baseline", half="baseline")
    runs = {
        recipe: [result(recipe, seed, (0.5, 0.6, 0.7)) for seed in range(2)]
        for recipe in ("baseline", "curves", "half")
    }
    runs["baseline"][1]["commit"] += "+"
    write_results(*(run for of_recipe in runs.values() for run in of_recipe))
    means = [[0.1 * epoch for epoch in range(1, 11)], [0.6, 0.5, 0.4]]  # 10 epochs: not as text
    write_curves(runs["curves"] + runs["half"][:1], [*means, means[0]])
    (rows,) = tables("main").values()
    last = pd.Series([1.0, 0.4])
    assert rows["[curves]"]["mean, last epoch"] == f"{last.mean():.3f} ± {last.std():.3f}"
    assert rows["[curves]"]["mean"] == "0.600 ± 0.000"
    assert {rows[f"[{name}]"]["mean, last epoch"] for name in ("baseline", "half")} == {"†"}
    assert {name: row["seeds"] for name, row in rows.items()} == {
        "[baseline]": "2‡",
        "[curves]": "2",
        "[half]": "2",
    }
    text = PAGE.read_text()
    assert "†: a run has no curve. ‡: a run had uncommitted changes." in " ".join(text.split())
    Path("README.md").write_text(START.format("original") + END)
    ex.main(["table", "--write"])
    assert "‡" not in Path("README.md").read_text()


def test_tables_without_marks_do_not_explain_them():
    runs = [result("baseline", seed, (0.5, 0.6, 0.7)) for seed in range(2)]
    write_results(*runs)
    write_curves(runs, [[0.5], [0.5]])
    tables("main")
    assert not re.search("[†‡]", PAGE.read_text())


def test_standard_errors_are_those_of_samples():
    """Draw dev files from made-up laws with the baseline's scores."""
    scores = [0.5, 0.8, 0.9]
    write_results(result("baseline", 1, scores), result("baseline", 1, [0.1] * 3, budget="2x4000"))
    PAGE.write_text(START.format("errors") + END)
    assert ex.main(["table", "--write"]) == 0
    found = re.findall(r"(\w+) (0\.\d{4}) \(([\d,]+)\s+rows\)", PAGE.read_text())
    assert [title for title, *_ in found] == [*MAIN_SCORES.values()]
    assert [int(n.replace(",", "")) for *_, n in found] == [*DEV_ROWS.values()]
    generator, drawn = np.random.default_rng(0), []
    for score, n in zip(scores[:2], list(DEV_ROWS.values())[:2], strict=True):
        drawn.append(generator.binomial(n, score, size=4000).std() / n)
    law = stats.multivariate_normal([0, 0], [[1, scores[2]], [scores[2], 1]], seed=generator)
    pairs = law.rvs((1000, DEV_ROWS["sts_pearson"]))
    drawn.append(stats.pearsonr(pairs[..., 0], pairs[..., 1], axis=1).statistic.std())
    assert [float(error) for _, error, _ in found] == pytest.approx(drawn, rel=0.08)


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
    names = [short, "[baseline]", "[baseline]¹", "[changed]²", "gone³"]
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
    """Five seeds of recipes with so many tasks. `far` is better by `gain`, `low` worse by 0.2."""
    names = [*MAIN_SCORES][:1] + [f"task{n}_matthews" for n in range(2, n_tasks + 1)]
    generator = np.random.default_rng(0)
    labels = {name: generator.integers(2, size=300) for name in names}
    shares = {"baseline": 0.6, "near": 0.6, "far": 0.6 + gain, "low": 0.4}
    write_recipes(near=RECIPE, far=RECIPE, low=RECIPE)
    rows = []
    for recipe, share in shares.items():
        for seed in range(1, 6):
            run = f"{recipe}{seed}"
            scores = {name: made_up(generator, labels[name], share) for name in names}
            keep(recipe, seed, run, scores)
            row = result(recipe, seed, (0.5, 0.5, 0.5)) | {"run": run}
            row |= dict.fromkeys(MAIN_SCORES, "")
            rows.append(row | {n: f"{np.mean(a[0] == a[1]):.6f}" for n, a in scores.items()})
    write_results(*rows)


def write_children():
    """As write_compared, for tables: the recipes are compared with the baseline."""
    write_compared(2)
    write_family(near="baseline", far="baseline", low="baseline")


@pytest.mark.parametrize("n_tasks", [1, 2, 5])
def test_recipes_are_compared_for_each_task_and_the_mean(n_tasks, capsys):
    write_compared(n_tasks)
    assert ex.main(["compare", "baseline", "far", "near"]) == 0
    first = capsys.readouterr().out
    lines = [line[2:-2].split(" | ") for line in first.splitlines() if line.startswith("| ")]
    rows = [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]
    tasks = ["sentiment", *(f"task{n}_matthews" for n in range(2, n_tasks + 1))]
    tasks += ["mean"] if n_tasks > 1 else []
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
    problem = "far: cannot be compared with baseline; results/predictions has no dev predictions"
    assert problem in capsys.readouterr().err
    assert ex.main(["compare", "baseline", "far", "near"]) == 0
    out, err = capsys.readouterr()
    assert problem in err and "| near |" in out and "| far |" not in out


@pytest.mark.parametrize(
    "names, more, message",
    [
        (["baseline"], [], "compare: give two recipes or more"),
        (["baseline", "for"], [], "for has no rows with --budget 4x10000; `run` makes them"),
        (
            ["near", "far"],
            ["--budget", "1x64"],
            "near has no rows with --budget 1x64; it has 4 × 10,000",
        ),
        (["near", "far"], ["--budget", "tiny"], "must be short, full, gpu or like 1x64"),
    ],
)
def test_a_comparison_that_cannot_be_says_why(names, more, message, capsys):
    write_compared()
    with contextlib.suppress(SystemExit):
        assert ex.main(["compare", *names, *more]) == 1
    assert message in capsys.readouterr().err


def test_rows_with_the_same_other_flags_are_compared(capsys):
    """Of rows with other flags than their files, and with a budget that has no name."""
    write_compared()
    write_recipes(near=RECIPE | {"parent": "baseline"}, far=RECIPE | {"parent": "baseline"})
    more = {"budget": "1x64", "flags": json.dumps(RECIPE | {"ema": 0.5})}
    write_results(*[row | more for row in read_table(RESULTS, COLUMNS).to_dict("records")])
    assert ex.main(["compare", "baseline", "far", "--budget", "1x64"]) == 0
    out = capsys.readouterr().out
    assert "1 × 64, with `--ema 0.5`:" in out
    assert len(tables("main")) == 1
    assert intervals().keys() == {("[baseline]", "[far]²"), ("[baseline]", "[near]⁴")}


@pytest.mark.parametrize("name, end", [("main", ""), ("other", END)])
def test_wrong_markers_are_an_error(name, end, capsys):
    text = START.format(name) + "mine\n" + end + START.format("best") + END
    Path("README.md").write_text(START.format("main") + "old\n" + END)
    PAGE.write_text(text)
    assert ex.main(["table", "--write"]) == 1
    assert f"experiments:{name} -->" in capsys.readouterr().err
    assert PAGE.read_text() == text
    assert "old" in Path("README.md").read_text()


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
