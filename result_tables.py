"""Tables of the results that `experiments.py` writes, and the pages that show them."""

import functools
import json
import re
import textwrap
from collections import Counter
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from evaluation import METRICS
from options import config_arguments, deciding, given_flags, read_config
from significance import Difference, Pair, difference, student
from streams import write_required
from tasks import CLASS_METRICS, NUMBER_METRICS, TASKS
from utils import UserError, atomic_write

if TYPE_CHECKING:
    import pandas as pd

RECIPES, README, DOCS = Path("recipes"), Path("README.md"), Path("docs")
RESULTS, CURVES = Path("results/results.csv"), Path("results/curves.csv")
FIGURE, PREDICTIONS = Path("results/curves.png"), Path("results/predictions")


class Budget(NamedTuple):
    epochs: int
    samples: int  # rows of each task in an epoch

    def __str__(self) -> str:
        return f"{self.epochs}x{self.samples}"  # in results.csv

    @property
    def title(self) -> str:
        return f"{self.epochs} × {self.samples:,}"  # in tables


AVERAGED = "-averaged"  # behind a recipe's name: the mean of the models of its seeds
BUDGETS = {"short": Budget(2, 4000), "full": Budget(4, 10000), "gpu": Budget(10, 10000)}
SCORES = {f"{name}_{metric}": task for name, task in TASKS.items() for metric in task.metrics}
MAIN_SCORES = {f"{name}_{task.metrics[0]}": task.title for name, task in TASKS.items()}
METRIC_OF_SCORE = re.compile(rf"(\w+?)_({'|'.join((*CLASS_METRICS, *NUMBER_METRICS))})")
IDENTITY = "recipe budget seed encoder precision flags data pipeline device".split()
COLUMNS = ["run", *IDENTITY, "rows", *SCORES, "best_epoch", "seconds_per_epoch", "seconds"]
COLUMNS += ["peak_memory_mb", "clipped", "threads", "jobs", "commit", "torch"]
CURVE_COLUMNS = ["run", "recipe", "budget", "seed", "epoch", "split", "metric", "value"]
# Flags that are not in the column "flags", since other columns say what they choose.
WITH_COLUMNS = set("seed epochs samples_per_epoch bert_model precision data_dir use_gpu".split())
# Dev scores in the original report: README.md of github.com/token-tricksters/deep-learning-nlp.
ORIGINAL = {
    "baseline": {"sst_accuracy": "0.494", "para_accuracy": "0.870", "sts_pearson": "0.866"},
    "tagging": {"sst_accuracy": "0.504", "para_accuracy": "0.866", "sts_pearson": "0.872"},
    "synthetic-chat": {"sst_accuracy": "0.476", "para_accuracy": "0.865", "sts_pearson": "0.875"},
    "sophia/h-every10-lr4e-4": {
        "sst_accuracy": "0.494",
        "para_accuracy": "0.853",
        "sts_pearson": "0.870",
    },
}
# The best single-task models that it lists; docs/results.md has their papers.
PUBLISHED = {"sst_accuracy": "0.598", "para_accuracy": "0.924 (doubtful)", "sts_pearson": "0.929"}
# The README's rows: recipe -> name of the row, if it is not the recipe's own.
SUMMARIZED = {
    "baseline": "",
    "best": "",
    f"best{AVERAGED}": "answers of the models of `best`, averaged",
}
ENCODERS = {"minilm": "MiniLM, 22 M", "bert-base-uncased": "BERT-base, 110 M"}
# Folders of recipes with tables of their own. All other recipes are in those of "main".
VARIANTS = ["best", "ablations", "sophia"]
# Rows that differ in these do not compare.
SETTING = "encoder precision device budget tasks".split()
HEADINGS = MAIN_SCORES | {
    "sst_macro_f1": "sentiment, macro-F1",
    "para_macro_f1": "paraphrase, macro-F1",
    "para_f1": "paraphrase, F1",
    "sts_spearman": "similarity, Spearman",
    "difference": "mean, difference",
    "last": "mean, last epoch",
    "seconds": "seconds (relative)",
    "memory": "peak memory, MB",
}
# Columns that are a line below the tables, since most rows have the same in them.
CAPTIONS = {
    "rows": "Training rows of the tasks",
    "pipeline": "spaCy pipeline",
    "threads": "CPU threads × runs at once",
    "torch": "PyTorch",
}
MARKS = {"†": "a run has no curve", "‡": "a run had uncommitted changes"}  # in tables
DEV_ROWS = {"sst_accuracy": 1101, "para_accuracy": 2500, "sts_pearson": 863}  # docs/data.md


# ------------------------------------------------------------------------------- recipes and rows


def recipe_path(name: str) -> Path:
    path = RECIPES / f"{name}.json"
    if not path.is_file():
        known = sorted(str(file.relative_to(RECIPES))[:-5] for file in RECIPES.rglob("*.json"))
        raise UserError(f"there is no recipe {name!r}, only {', '.join(known)}")
    return path


def lineage(name: str) -> list[str]:
    """Return a recipe, its parent, the parent's parent and so on, as their files name them."""
    line = [name]
    while parent := read_config(str(recipe_path(line[-1]))).get("parent"):
        if parent in line:
            raise UserError(f"{recipe_path(name)}: {parent!r} is among its own parents")
        line.append(parent)
    return line


def recorded_flags(path: str, more: list[str]) -> dict[str, Any]:
    """Return the flags of a recipe's file and of `more` that scores depend on and that no other column
    has. A file is given by its name only, since folders differ from machine to machine."""
    flags = deciding(given_flags(config_arguments(path) + more))
    if after := read_config(path).get("after"):
        flags["after"] = after
    texts = {name: [value] if isinstance(value, str) else value for name, value in flags.items()}
    return {
        name: " ".join(Path(v).name for v in value) if isinstance(value, list) else value
        for name, value in texts.items()
        if name not in WITH_COLUMNS
    }


def main_scores(columns: Iterable[str]) -> dict[str, str]:
    """Return the scores among the columns that select models, with their headings: those of TASKS, and
    the first one of each other task."""
    found: dict[str, str] = {}
    for column in columns:
        if match := METRIC_OF_SCORE.fullmatch(column):
            found.setdefault(match[1], column)
    own = {score: name for name, score in found.items() if name not in TASKS}
    return {score: title for score, title in MAIN_SCORES.items() if score in columns} | own


def read_table(path: Path, columns: list[str]) -> "pd.DataFrame":
    """Read a table that `experiments.py` wrote, all of it as text; an empty one without a file."""
    import pandas as pd  # takes half a second

    if not path.exists():
        return pd.DataFrame(columns=columns, dtype=str)
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
        # Rows from before a task or a column was added lack it.
        later = *SCORES, "torch"
        table[[name for name in columns if name in later and name not in table]] = ""
        own = [c for c in table if c not in columns and METRIC_OF_SCORE.fullmatch(c)]
        return table[[*columns, *own]]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path}: not a table that experiments.py wrote ({error})") from error


class Summary(NamedTuple):
    """A recipe in one setting, over its seeds."""

    recipe: str
    remark: str  # how its flags differ from those in its file
    ancestors: list[str]  # recipes to compare it with, the best choice first
    runs: dict[str, str]  # seed -> run
    means: "pd.Series"  # seed -> mean score
    n_rows: int  # of each task in all epochs
    seconds: float  # of an epoch
    setting: tuple[str, ...]
    cells: dict[str, str]  # column of a table -> its text


def summarize() -> list[Summary]:
    """Summarize each recipe of results.csv in each setting, the largest budget first."""
    import pandas as pd

    results = read_table(RESULTS, COLUMNS)
    recipes = [name for name in set(results["recipe"]) if (RECIPES / f"{name}.json").is_file()]
    known = {name: recorded_flags(str(recipe_path(name)), []) for name in recipes}
    scores = filter(METRIC_OF_SCORE.fullmatch, results.columns)
    for column in (*scores, "seconds_per_epoch", "peak_memory_mb"):
        results[column] = pd.to_numeric(results[column])  # nan where it is empty
    results["last"] = results["run"].map(last_means())
    groups = results.groupby([column for column in IDENTITY if column != "seed"])
    summaries = [summarize_group(group, known) for _, group in groups]
    return sorted(summaries, key=lambda s: (-s.n_rows, s.setting, s.recipe, s.remark))


def last_means() -> "pd.Series":
    """Return the mean dev score after the last epoch: run -> score, for the runs with a curve."""
    curves = read_table(CURVES, CURVE_COLUMNS).astype({"epoch": int, "value": float})
    means = curves[(curves["split"] == "dev") & (curves["metric"] == "mean")]
    return means.sort_values("epoch").groupby("run")["value"].last()


def summarize_group(group: "pd.DataFrame", known: dict[str, dict[str, Any]]) -> Summary:
    """Summarize runs that differ in their seeds only."""
    shared = group.iloc[0]
    recipe, flags = shared["recipe"], json.loads(shared["flags"])
    single = recipe.removesuffix(AVERAGED)
    own = known.get(single)
    budget = Budget(*map(int, shared["budget"].split("x")))
    seconds = group["seconds_per_epoch"].mean()
    at_once = group["jobs"].map(lambda jobs: f" × {jobs}" if jobs else "")
    clipped = group["clipped"].str.split(expand=True).astype(float).mean().dropna().tolist()
    columns = "encoder precision device rows pipeline data".split()
    cells = {column: shared[column] for column in columns} | {
        "recipe": format_name(recipe).strip("" if recipe in known else "[]"),
        "budget": budget.title,
        "seeds": str(len(group)),
        "mark": "‡" if group["commit"].str.endswith("+").any() else "",
        "last": format_spread(group["last"]) or "†",
        "threads": ", ".join(sorted(set(group["threads"] + at_once))),
        "torch": ", ".join(sorted(set(group["torch"]) - {""})) or "not recorded",
        "seconds": f"{seconds:.0f}" if seconds > 0 else "",  # a mean of models takes none
        "memory": format_spread(group["peak_memory_mb"], ".0f"),
        "clipped": f"{clipped[0]:.2f}, {clipped[-1]:.2f}" if clipped else "",
    }
    scores = [c for c in group if METRIC_OF_SCORE.fullmatch(c) and group[c].notna().any()]
    main, names = list(main_scores(scores)), {METRIC_OF_SCORE.sub(r"\1", c) for c in scores}
    mean = format_spread(group[main].mean(axis=1, skipna=False))
    cells |= {c: format_spread(group[c]) for c in scores} | {"mean": mean}
    cells["tasks"] = "" if names == set(TASKS) else ", ".join(sorted(names))
    remark = describe_flags(flags, own)
    ancestors = lineage(single)[0 if remark or recipe != single else 1 :] if own else []
    # A mean of models has the seeds of all of them, and is compared with each.
    of_seed = group.assign(seed=group["seed"].str.split("+")).explode("seed").set_index("seed")
    runs, means = of_seed["run"].to_dict(), of_seed[main].mean(axis=1, skipna=False)
    n_rows, setting = budget.epochs * budget.samples, tuple(cells[name] for name in SETTING)
    return Summary(recipe, remark, ancestors, runs, means, n_rows, seconds, setting, cells)


def pairs_of(first: Summary, second: Summary) -> dict[str, Pair]:
    """Return the dev predictions of two recipes for the tasks and the seeds that both have: score ->
    pair. Empty if a run has none, or other rows."""
    seeds = [seed for seed in second.runs if seed in first.runs]
    runs = [read_predictions(recipe.runs[seed]) for recipe in (first, second) for seed in seeds]
    shared = [score for score in runs[0] if all(score in run for run in runs)] if runs else []
    pairs = {}
    for score in shared:
        labels = runs[0][score][0]
        if not all(np.array_equal(run[score][0], labels) for run in runs):
            return {}
        predictions = np.stack([run[score][1] for run in runs])
        metric = METRICS[METRIC_OF_SCORE.sub(r"\2", score)]
        pairs[score] = Pair(metric, labels, *np.split(predictions, 2))
    return pairs


@functools.cache
def read_predictions(run: str) -> dict[str, np.ndarray]:
    """Read the labels and predictions of dev that a run left, score -> [2, rows]; {} if it left none."""
    for path in PREDICTIONS.glob(f"*-{run}.npz"):
        with np.load(path) as arrays:
            return {name: arrays[name].astype(float) for name in arrays}
    return {}


def reference(summary: Summary, group: list[Summary]) -> Summary | None:
    """Return the row of a setting that a recipe is compared with: that of its nearest ancestor, if
    there is one with the same other flags."""
    # The last row of a name counts: one with the same data, if there is one.
    others = sorted(group, key=lambda other: other.cells["data"] == summary.cells["data"])
    rows = {
        (s.recipe, s.remark): s
        for s in others
        if not have_other_labels(s, summary) and (summary.means - s.means).notna().any()
    }
    rows.pop((summary.recipe, summary.remark), None)
    keys = [(name, remark) for name in summary.ancestors for remark in (summary.remark, "")]
    return next((rows[key] for key in keys if key in rows), None)


def have_other_labels(first: Summary, second: Summary) -> bool:
    """Return whether the kept dev predictions of two recipes are for other rows."""
    known, own = (read_predictions(next(iter(recipe.runs.values()))) for recipe in (first, second))
    shared = known.keys() & own.keys()
    return not all(np.array_equal(known[score][0], own[score][0]) for score in shared)


def mean_difference(first: Summary, second: Summary) -> tuple[Difference, str]:
    """Compare the means of two recipes on the seeds that both have. Return also a text. The interval is
    about other dev rows and seeds if the dev predictions are there, else about other seeds. One seed has
    none."""
    gains = (second.means - first.means).dropna()
    if len(gains) > 1 and (pairs := pairs_of(first, second)):
        found = difference([*pairs.values()])
        return found, format_difference(found)
    found = student(gains.mean(), gains.var() / len(gains), len(gains) - 1)
    return found._replace(about_rows=False), format_difference(found, ", seeds")


class Comparison(NamedTuple):
    """How a row of a table differs from the row that it is compared with."""

    row: str
    reference: str
    difference: Difference
    text: str


def by_setting(summaries: list[Summary]) -> list[list[Summary]]:
    return [list(group) for _, group in groupby(summaries, key=lambda s: s.setting)]


def block_of(recipe: str) -> str:
    """Return the name of the block that has a recipe's rows."""
    if recipe.startswith(("single-", "then-")):
        return "together"
    folder, slash, _ = recipe.partition("/")
    return folder if slash and folder in VARIANTS else "main"


# ------------------------------------------------------------------------------------------- texts


def format_name(recipe: str) -> str:
    """Return a recipe's name, without its middle if that makes a table too wide, in brackets."""
    return f"[{recipe if len(recipe) <= 25 else f'{recipe[:12]}…{recipe[-12:]}'}]"


def format_spread(values: "pd.Series", form: str = ".3f") -> str:
    """Return `0.441 ± 0.005`; a single number alone; nothing if a number is missing."""
    if values.empty or values.isna().any():
        return ""
    mean = f"{values.mean():{form}}"
    return mean if len(values) == 1 else f"{mean} ± {values.std():{form.removeprefix('+')}}"


def format_difference(found: Difference, about: str = "") -> str:
    interval = f"{found.low:+.4f} to {found.high:+.4f}{about}"
    return f"{found.value:+.4f} ({interval if found.has_interval else 'no interval'})"


def describe_flags(flags: dict[str, Any], known: dict[str, Any] | None) -> str:
    """Say how flags differ from the known ones, those in the recipe's file if it is there."""
    parts = []
    for name, value in flags.items():
        if known and known.get(name) == value:
            continue
        if isinstance(value, dict):
            value = ",".join(f"{task}={number:g}" for task, number in value.items())
        parts.append(f"--{name}" if value is True else f"--{name} {value}")
    missing = [f"--{name}" for name in sorted((known or {}).keys() - flags.keys())]
    texts = {"with": " ".join(parts), "without": " ".join(missing)}
    changes = ", ".join(f"{word} `{text}`" for word, text in texts.items() if text)
    if known is None:
        return f"its file is gone; run {changes or 'without flags'}"
    return f"its file has changed; run {changes}" if missing else changes


def format_table(rows: list[dict[str, str]], columns: list[str]) -> str:
    """Return a Markdown table, without the columns that are empty."""
    columns = [column for column in columns if any(row.get(column) for row in rows)]
    lines = [[HEADINGS.get(column, column) for column in columns], ["---"] * len(columns)]
    lines += [[row.get(column, "") for column in columns] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def format_paragraph(*sentences: str) -> str:
    text = " ".join(sentence for sentence in sentences if sentence)
    return textwrap.fill(text, 100, break_on_hyphens=False, break_long_words=False)


def format_comparisons(compared: list[Comparison]) -> str:
    """Return the answer of a setting, what is clearly better or worse, and then all differences."""
    if not compared:
        return "There is nothing to compare."
    clear = [(row, found.value) for row, _, found, _ in compared if found.is_clear]
    rows = {
        "Clearly better": [row for row, value in clear if value > 0],
        "Clearly worse": [row for row, value in clear if value < 0],
    }
    answers = [f"{answer}: {', '.join(of)}." for answer, of in rows.items() if of]
    above: dict[str, list[str]] = {}
    for row, name, found, text in compared:
        bold = "**" if found.is_clear else ""
        above.setdefault(name, []).append(f"{row} {bold}{text}{bold}")
    sentences = [f"Compared with {name}: {', '.join(texts)}." for name, texts in above.items()]
    return format_paragraph(*(answers or ["No difference is clear."]), *sentences)


def format_caption(summaries: dict[str, Summary], column: str) -> str:
    """Return what most rows have in a column, then the rows that have something else."""
    texts = {label: summary.cells[column] or "none" for label, summary in summaries.items()}
    (common, _), *others = Counter(texts.values()).most_common()
    if common == "none" and not others:
        return ""
    exceptions = [f"{label} {text}" for label, text in texts.items() if text != common]
    return f"{CAPTIONS[column]}: {'; '.join([common, *exceptions])}."


# --------------------------------------------------------------------------------- tables and pages


def setting_tables(group: list[Summary], columns: list[str]) -> tuple[str, list[Comparison]]:
    """Return the tables of recipes in one setting, and how these differ. `columns` is for a table of
    its own."""
    rows: list[dict[str, str]] = []
    remarks: list[str] = []
    summaries: dict[str, Summary] = {}
    compared: list[Comparison] = []
    for summary in group:
        label = summary.cells["recipe"]
        if summary.remark or label in summaries:
            label += str(len(remarks) + 1).translate(str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹"))
            remarks.append(f"{label}: {summary.remark or 'data ' + summary.cells['data']}.")
        summaries[label] = summary
        own = {"recipe": label, "seeds": summary.cells["seeds"] + summary.cells["mark"]}
        if first := reference(summary, group):
            found, text = mean_difference(first, summary)
            bold = "**" if found.is_clear else ""
            compared.append(Comparison(label, first.cells["recipe"], found, text))
            spread = format_spread((summary.means - first.means).dropna(), "+.3f")
            own["difference"] = f"{bold}{spread}{bold}"
            if summary.seconds > 0 and first.seconds > 0:  # nan for a mean of models
                own["seconds"] = f"{summary.seconds:.0f} ({summary.seconds / first.seconds:.2f})"
        rows.append(summary.cells | own)
    tables = [
        ["recipe", "seeds", *main_scores(group[0].cells), "mean"],
        ["recipe", "difference", "last", "clipped", "seconds", "memory"],
    ]
    if any(row.get(column) for row in rows for column in columns):
        tables.append(["recipe", *columns])
    formatted = [format_table(rows, table) for table in tables]
    below = [*remarks, *(format_caption(summaries, column) for column in CAPTIONS)]
    below += [f"{mark}: {text}." for mark, text in MARKS.items() if mark in "".join(formatted)]
    if not all(found.has_interval for _, _, found, _ in compared):
        below.append("No interval: only one seed in common, so chance can explain the difference.")
    parts = [f"### {', '.join(filter(None, group[0].setting))}", format_comparisons(compared)]
    text = "\n\n".join(filter(None, [*parts, *formatted, format_paragraph(*below)]))
    return text, compared


def recipe_tables(summaries: list[Summary], block: str) -> str:
    """Return the tables of "main", or of the variants in a folder of recipes, below the answer: which
    differences are clear."""
    more = [score for score in SCORES if score not in MAIN_SCORES] if block == "main" else []
    parts: list[str] = []
    clear: list[str] = []
    n_intervals = 0
    for group in by_setting(summaries):
        own = [summary for summary in group if block_of(summary.recipe) == block]
        names = {n for summary in own for n in summary.ancestors if block_of(n) != block}
        if own:
            remarks = {"", *(s.remark for s in own)}
            others = [s for s in group if s.recipe in names and s.remark in remarks]
            tables, compared = setting_tables(others + own, more)
            parts.append(tables)
            n_intervals += sum(comparison.difference.has_interval for comparison in compared)
            clear += [
                f"{row} {text} compared with {name}, {group[0].cells['budget']}"
                for row, name, found, text in compared
                if found.is_clear
            ]
    if not parts:
        return "No runs yet."
    answer = f"Differences with an interval: {n_intervals}. Clear ones: "
    answer += f"{'; '.join(clear) or 'none'}."
    return "\n\n".join([format_paragraph(answer), *parts])


def together_table(summaries: list[Summary]) -> str:
    """Return what training the tasks together brings to each: trained alone, with the others, and with
    the others for half of the epochs, then alone; the same number of the task's rows each time."""
    rows = []
    for _, group in groupby(summaries, key=lambda summary: summary.setting[:-1]):
        of_recipe = {s.recipe: s for s in group if not s.remark}
        for name, task in TASKS.items():
            score = f"{name}_{task.metrics[0]}"
            alone = of_recipe.get(f"single-{name}")
            others = {"together": of_recipe.get("baseline"), "after": of_recipe.get(f"then-{name}")}
            if not alone or not any(others.values()):
                continue
            row = {"task": task.title, "alone": alone.cells[score]}
            for column, other in others.items():
                if other and (pair := pairs_of(alone, other).get(score)):
                    found = difference([pair])
                    bold = "**" if found.is_clear else ""
                    row[column] = other.cells[score]
                    row[f"{column} - alone"] = f"{bold}{format_difference(found)}{bold}"
            row |= {"setting": ", ".join(alone.setting[:-1]), "seeds": alone.cells["seeds"]}
            rows.append(row)
    parts = []
    for setting, of_setting in groupby(rows, key=lambda row: row["setting"]):
        own = [*of_setting]
        parts += [f"### {setting}", format_table(own, "task seeds alone together after".split())]
        parts.append(format_table(own, ["task", "together - alone", "after - alone"]))
    return "\n\n".join(parts) or "No runs yet."


def dev_errors(summaries: list[Summary]) -> str:
    """Return standard errors of the baseline over dev rows: of a share, or by Fisher's z."""
    rows = [s for s in summaries if s.recipe == "baseline" and all(map(s.cells.get, DEV_ROWS))]
    texts = []
    for score, n in DEV_ROWS.items() if rows else ():
        value, is_share = float(rows[0].cells[score].split()[0]), score.endswith("accuracy")
        error = (value * (1 - value) / n if is_share else (1 - value**2) ** 2 / (n - 3)) ** 0.5
        texts.append(f"{MAIN_SCORES[score]} {error:.4f} ({n:,} rows)")
    return format_paragraph(f"Of `baseline`: {', '.join(texts) or 'no runs yet'}.")


def original_table(summaries: list[Summary]) -> str:
    """Return the figures of the original report, and below each ours, all in one setting: the one with
    most of these recipes."""
    known = [s for s in summaries if s.recipe in ORIGINAL and not s.remark]
    ours = {s.recipe: s for s in max(by_setting(known), key=len, default=[])}
    rows = []
    for recipe, scores in ORIGINAL.items():
        theirs = {"recipe": format_name(recipe), "setting": "original report", "seeds": "1"}
        rows.append(theirs | scores)
        if own := ours.get(recipe):
            setting = f"{own.cells['encoder']}, {own.cells['budget']}"
            rows.append(own.cells | {"setting": setting})
    return format_table(rows, ["recipe", "setting", "seeds", *MAIN_SCORES])


def summary_table(summaries: list[Summary], to_root: str) -> str:
    """Return the README's table: ours in the setting with most of its recipes, and what others reached."""
    shown = [s for s in summaries if s.recipe in SUMMARIZED and not s.remark]
    ours = max(by_setting(shown), key=len, default=[])
    rows = []
    for s in ours:
        model = {"model": SUMMARIZED[s.recipe] or s.cells["recipe"]}
        rows.append(s.cells | model | {"encoder": ENCODERS.get(s.setting[0], s.setting[0])})
    original = {"model": "original report, baseline", "encoder": ENCODERS["bert-base-uncased"]}
    published = {"model": "best published single-task models", "encoder": "one each"}
    rows += [original | ORIGINAL["baseline"], published | PUBLISHED]
    seeds = " or ".join(sorted({s.cells["seeds"] for s in ours if not SUMMARIZED[s.recipe]}))
    precision, device, budget = ours[0].setting[1:4] if ours else ("", "", "")
    budget = f"{budget.replace(' × ', ' epochs of ')} rows of each task"
    setting = f" over {seeds} seeds ({precision}, {device}, {budget})" if ours else ""
    pairs = [(s, first) for s in ours if (first := reference(s, ours))]
    differences = ", ".join(
        f"{s.cells['recipe']} - {first.cells['recipe']} {mean_difference(first, s)[1]}"
        for s, first in pairs
    )
    page = f"{to_root}{DOCS}/results"
    caption = format_paragraph(
        f"Dev scores, mean ± standard deviation{setting}.",
        f"Differences of the mean over the tasks: {differences}." if differences else "",
        f"The last row: [papers]({page}.md#the-best-published-models). [All tables]({page}.md),",
        f"[variants]({page}-variants.md).",
    )
    return f"{format_table(rows, ['model', 'encoder', *MAIN_SCORES])}\n\n{caption}"


def make_blocks(to_root: str) -> dict[str, str]:
    """Return the generated parts of a page, from whose folder `to_root` leads to the root."""
    summaries = summarize()
    image = f"![Dev scores after each epoch, a line for each recipe]({to_root}{FIGURE})"
    blocks = {
        "summary": summary_table(summaries, to_root),
        "original": original_table(summaries),
        "together": together_table(summaries),
        "errors": dev_errors(summaries),
        "curves": image if FIGURE.exists() else "No runs yet.",
    }
    blocks |= {name: recipe_tables(summaries, name) for name in ("main", *VARIANTS)}
    names = {format_name(r): r for r in sorted({*ORIGINAL, *(s.recipe for s in summaries)})}
    for block, text in blocks.items():
        links = [f"{n}: {to_root}{RECIPES}/{r}.json\n" for n, r in names.items() if n in text]
        blocks[block] = "".join([text, "\n\n", *links])
    return blocks


def filled_in(page: Path) -> str:
    """Return a page's text with its generated parts as the results are now. Raises UserError for a
    marker that has no partner or names no block."""
    blocks = make_blocks("" if page.name == README.name else "../")

    def fill(match: re.Match) -> str:
        start, name, content, end = match.groups()
        if "<!-- experiments:" in content or not end or name not in blocks:
            known = ", ".join(blocks)
            raise UserError(f"{page}: {start.strip()} has no end, or is none of {known}")
        return start + blocks[name] + end

    pattern = r"(<!-- experiments:([\w-]+) -->\n)(.*?)(<!-- /experiments -->|\Z)"
    return re.sub(pattern, fill, page.read_text(encoding="utf-8"), flags=re.DOTALL)


def write_tables(write: bool) -> None:
    """Do `table`: print all tables, or write them into the pages that have their markers."""
    if not write:
        for name, text in make_blocks("../").items():
            write_required(f"{name}\n\n{text}\n")
        return
    pages = [page for page in (README, *sorted(DOCS.glob("*.md"))) if page.is_file()]
    texts = {page: page.read_text(encoding="utf-8") for page in pages}
    marked = [page for page in pages if "<!-- experiments:" in texts[page]]
    if not marked:
        raise UserError(f"{README} and {DOCS}: no page has a line <!-- experiments:NAME -->")
    changed = {page: new for page in marked if (new := filled_in(page)) != texts[page]}
    for page, text in changed.items():
        with atomic_write(page) as temporary:
            temporary.write_text(text, encoding="utf-8")
        print(f"written: {page}")
