"""Tables and curves from the rows of results, which `experiments.py` writes."""

import json
import re
from collections import defaultdict
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from options import config_arguments, deciding, given_flags
from tasks import TASKS
from utils import UserError, atomic_write

if TYPE_CHECKING:
    import pandas as pd

RECIPES, README = Path("recipes"), Path("README.md")
RESULTS, CURVES = Path("results/results.csv"), Path("results/curves.csv")
FIGURE = Path("results/curves.png")


class Budget(NamedTuple):
    epochs: int
    samples: int  # rows of each task in an epoch

    def __str__(self) -> str:
        return f"{self.epochs}x{self.samples}"  # in results.csv

    @property
    def title(self) -> str:
        return f"{self.epochs} × {self.samples:,}"  # in tables


BUDGETS = {"short": Budget(2, 4000), "full": Budget(4, 10000), "gpu": Budget(10, 10000)}
SCORES = {f"{name}_{metric}": task for name, task in TASKS.items() for metric in task.metrics}
MAIN_SCORES = {f"{name}_{task.metrics[0]}": task.title for name, task in TASKS.items()}
IDENTITY = "recipe budget seed encoder precision flags data pipeline device".split()
COLUMNS = ["run", *IDENTITY, "rows", *SCORES, "best_epoch", "seconds_per_epoch", "seconds"]
COLUMNS += ["peak_memory_mb", "clipped", "threads", "jobs", "commit"]
CURVE_COLUMNS = ["run", "recipe", "budget", "seed", "epoch", "split", "metric", "value"]
# Flags that are not in the column "flags", since other columns say what they choose.
WITH_COLUMNS = set("seed epochs samples_per_epoch bert_model precision data_dir use_gpu".split())
# Dev scores that the report of the original project gives (its public repository,
# token-tricksters/deep-learning-nlp, as a compilation of such reports quotes it). A recipe without
# one has a row in that report, or is ours, and we know no figure.
PUBLISHED = {
    "baseline": {"sst": "0.494", "para": "0.870", "sts": "0.866"},
    "tagging": {"sst": "0.504"},
    "synthetic": {"sst": "0.018 below its baseline", "sts": "0.875"},
    "synthetic-filtered": {},
    "sophiah": {},
    "sophiag": {},
    "unfreeze": {},
    "moe-soft": {},
    "moe-hard": {},
    "best": {},
}
# Block of the README -> patterns of its recipes, and its columns besides those of all blocks.
COMPARISONS = {
    "best": (["best", "best/*"], ["changed"]),
    "ablations": (["baseline", "best", "ablations/*"], ["changed", "cost"]),
    "sophia": (["baseline", "sophiah", "sophiag", "sophia/*"], ["changed", "clipped"]),
    "tags": (["baseline", "tagging"], ["pipeline"]),
    "moe": (["baseline", "moe-*"], ["cost", "memory"]),
    "synthetic": (["baseline", "synthetic*"], ["rows"]),
}
SHOWN_UNCHANGED = ["recipe", "encoder", "precision", "rows", "pipeline", "device"]
SETTING = ["encoder", "budget", "precision", "device"]  # rows that differ in these do not compare
HEADINGS = MAIN_SCORES | {
    "macro_f1": "macro-F1",
    "pearson": "Pearson",
    "changed": "flags compared with the first row",
    "better": "mean compared with the first row, same seeds",
    "threads": "CPU threads × runs at once",
    "cost": "seconds / baseline's",
    "memory": "peak memory, MB",
    "clipped": "clipped, by epoch",
    "rows": "training rows",
    "seconds": "seconds an epoch",
    "published": "original report (BERT-base, its own data, A100)",
}
NOTE = """\
Dev scores of the best epoch, mean ± standard deviation over seeds; budget: epochs × rows of each
task in one. Not comparable: """
TASK_NOTE = f"""{NOTE}the last column with the others (another encoder, other data, one number
without spread), and rows of different encoder, training rows, budget, precision or device with each
other; minilm-float16 is minilm with its weights rounded to float16."""
COMPARISON_NOTE = f"""{NOTE}rows of different encoder, budget, precision or device with each other,
and seconds where threads or runs at once differ."""


# ------------------------------------------------------------------------------- recipes and rows


def recipe_path(name: str) -> Path:
    path = RECIPES / f"{name}.json"
    if not path.is_file():
        known = sorted(str(file.relative_to(RECIPES))[:-5] for file in RECIPES.rglob("*.json"))
        raise UserError(f"there is no recipe {name!r}, only {', '.join(known)}")
    return path


def recipe_flags(name: str) -> dict[str, Any]:
    """Return the flags of a recipe as the column "flags" has them."""
    return recorded_flags(config_arguments(str(recipe_path(name))))


def recorded_flags(arguments: list[str]) -> dict[str, Any]:
    """Return the flags in `arguments` that scores depend on and that no other column has. A file is
    given by its name only, since folders differ from machine to machine."""
    return {
        name: Path(value).name if isinstance(value, str) else value
        for name, value in deciding(given_flags(arguments)).items()
        if name not in WITH_COLUMNS
    }


def read_table(path: Path, columns: list[str]) -> "pd.DataFrame":
    """Read a table that `experiments.py` wrote, all of it as text; an empty one without a file."""
    import pandas as pd  # takes half a second

    if not path.exists():
        return pd.DataFrame(columns=columns, dtype=str)
    try:
        return pd.read_csv(path, dtype=str, keep_default_na=False)[columns]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path}: not a table that experiments.py wrote ({error})") from error


class Summary(NamedTuple):
    """A recipe in one setting, over its seeds."""

    recipe: str
    name: str  # the recipe, and the flags whose values in it have changed since
    flags: dict[str, Any]
    runs: set[str]
    means: "pd.Series"  # seed -> mean score
    n_rows: int  # of each task in all epochs
    seconds: float  # of an epoch
    cells: dict[str, str]  # column of a table -> its text


def summarize(results: "pd.DataFrame") -> list[Summary]:
    """Summarize each recipe in each setting. Runs of a recipe that is gone, or has another flag
    now, are left out. If only a value has changed, the summary's name gives the old one."""
    import pandas as pd

    recipes = [name for name in set(results["recipe"]) if (RECIPES / f"{name}.json").is_file()]
    known = {name: recipe_flags(name) for name in recipes}
    results = results.copy()
    for column in (*SCORES, "seconds_per_epoch", "peak_memory_mb"):
        results[column] = pd.to_numeric(results[column])  # nan where it is empty
    results["mean"] = results[list(MAIN_SCORES)].mean(axis=1, skipna=False)
    groups = results.groupby([column for column in IDENTITY if column != "seed"])
    summaries = [summarize_group(group, known) for _, group in groups]
    return [summary for summary in summaries if summary]


def summarize_group(group: "pd.DataFrame", known: dict[str, dict[str, Any]]) -> Summary | None:
    """Summarize runs that differ in their seeds only; None if their recipe is not the known one."""
    shared, n_seeds = group.iloc[0], len(group)
    recipe, flags = shared["recipe"], json.loads(shared["flags"])
    if recipe not in known or not known[recipe].keys() <= flags.keys():
        return None
    budget = Budget(*map(int, shared["budget"].split("x")))
    seconds = group["seconds_per_epoch"].mean()
    at_once = group["jobs"].map(lambda jobs: f" × {jobs}" if jobs else "")
    clipped = group["clipped"].str.split(expand=True).astype(float).mean().dropna()
    cells = {column: shared[column] for column in SHOWN_UNCHANGED} | {
        "budget": budget.title,
        "seeds": str(n_seeds),
        "threads": ", ".join(sorted(set(group["threads"] + at_once))),
        "seconds": f"{seconds:.0f}",
        "memory": format_spread(group["peak_memory_mb"], 0),
        "clipped": ", ".join(f"{share:.2f}" for share in clipped),
    }
    cells |= {column: format_spread(group[column]) for column in (*SCORES, "mean")}
    name = f"{recipe} {format_flags(flags, known[recipe])}".strip()
    runs, means = set(group["run"]), group.set_index("seed")["mean"]
    return Summary(recipe, name, flags, runs, means, budget.epochs * budget.samples, seconds, cells)


def select(summaries: list[Summary], patterns: list[str]) -> list[Summary]:
    """Return the summaries of these recipes, the largest budget first."""

    def matches(summary: Summary) -> list[bool]:
        return [fnmatch(summary.recipe, pattern) for pattern in patterns]

    def place(summary: Summary) -> tuple:
        encoder, precision = summary.cells["encoder"], summary.cells["precision"]
        return -summary.n_rows, encoder, precision, matches(summary).index(True), summary.name

    return sorted((summary for summary in summaries if any(matches(summary))), key=place)


# ------------------------------------------------------------------------------------ text of cells


def format_spread(values: "pd.Series", digits: int = 3) -> str:
    """Return `0.441 ± 0.005`; a single number alone; nothing if a number is missing."""
    if values.isna().any():
        return ""
    if len(values) == 1:
        return f"{values.iloc[0]:.{digits}f}"
    return f"{values.mean():.{digits}f} ± {values.std():.{digits}f}"


def format_flags(flags: dict[str, Any], known: dict[str, Any]) -> str:
    """Return the flags whose values are not the known ones, as they would be on a command line."""
    parts = []
    for name, value in flags.items():
        if known.get(name) == value:
            continue
        if isinstance(value, dict):
            value = ",".join(f"{task}={number:g}" for task, number in value.items())
        parts.append(f"--{name}" if value is True else f"--{name} {value}")
    return " ".join(parts)


def format_changes(flags: dict[str, Any], known: dict[str, Any]) -> str:
    """Return the flags with other values than the known ones, and those that are missing."""
    missing = " ".join(f"--{name}" for name in sorted(known.keys() - flags.keys()))
    texts = {"": format_flags(flags, known), "without ": missing}
    return ", ".join(f"{word}`{text}`" for word, text in texts.items() if text)


def format_difference(means: "pd.Series", reference: "pd.Series") -> str:
    """Return how much higher the means are than the reference, on the seeds that both have."""
    differences = (means - reference).dropna()
    return f"{differences.mean():+.3f}" if len(differences) else ""


# ------------------------------------------------------------------------------ tables and curves


def format_table(rows: list[dict[str, str]], columns: list[str], note: str) -> str:
    """Return a Markdown table with a note below it."""
    if not rows:
        return "No runs yet.\n"
    lines = [[HEADINGS.get(column, column) for column in columns], ["---"] * len(columns)]
    lines += [[row[column] for column in columns] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines) + f"\n{note}\n"


def task_table(summaries: list[Summary], task: str) -> str:
    """Return the table of a task: its metrics in the runs of all recipes of the report."""
    metrics = TASKS[task].metrics
    rows = [
        summary.cells
        | {metric: summary.cells[f"{task}_{metric}"] for metric in metrics}
        | {"command": f"`python experiments.py run {summary.name}`"}
        | {"published": PUBLISHED[summary.recipe].get(task, "–")}
        for summary in select(summaries, list(PUBLISHED))
    ]
    setting = ["rows", *SETTING, "threads", "seconds", "published"]
    return format_table(rows, ["command", "seeds", *metrics, *setting], TASK_NOTE)


def comparison_table(summaries: list[Summary], block: str) -> str:
    """Return the table of a block of COMPARISONS: its recipes in all settings that have several."""
    patterns, more = COMPARISONS[block]
    by_setting, rows = defaultdict(list), []
    for summary in select(summaries, patterns):
        by_setting[tuple(summary.cells[column] for column in SETTING)].append(summary)
    for group in by_setting.values():
        if len({summary.recipe for summary in group}) < 2:
            continue
        first, baseline = group[0], [s.seconds for s in group if s.name == "baseline"]
        for summary in group:
            better = format_difference(summary.means, first.means)
            own = {
                "recipe": f"`{summary.name}`",
                "changed": format_changes(summary.flags, first.flags),
                "better": "" if summary is first else better,
                "cost": f"{summary.seconds / baseline[0]:.2f}" if baseline else "",
            }
            rows.append(summary.cells | own)
    columns = ["recipe", "seeds", *MAIN_SCORES, "mean", "better", *more, "seconds", "threads"]
    return format_table(rows, [*columns, *SETTING], COMPARISON_NOTE)


def fill_in(text: str, blocks: dict[str, str]) -> str:
    """Return the README's text with the blocks between its markers. Raises UserError for a marker
    that has no partner or names no block."""

    def fill(match: re.Match) -> str:
        start, name, content, end = match.groups()
        if "<!-- experiments:" in content or name not in blocks:
            known = ", ".join(blocks)
            raise UserError(f"{README}: {start.strip()} has no end, or is none of {known}")
        return start + blocks[name] + end

    pattern = r"(<!-- experiments:([\w-]+) -->\n)(.*?)(<!-- /experiments -->|\Z)"
    return re.sub(pattern, fill, text, flags=re.DOTALL)


def write_tables() -> None:
    """Do `table`: print all tables, and put them into the README."""
    summaries = summarize(read_table(RESULTS, COLUMNS))
    blocks = {task: task_table(summaries, task) for task in TASKS}
    blocks |= {block: comparison_table(summaries, block) for block in COMPARISONS}
    for name, table in blocks.items():
        print(f"{name}\n\n{table}")
    figure = f"![Dev scores after each epoch]({FIGURE})\n" if FIGURE.exists() else "No runs yet.\n"
    try:
        text = README.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{README}: cannot be read: {error.strerror}") from error
    with atomic_write(README) as temporary:
        temporary.write_text(fill_in(text, blocks | {"curves": figure}), encoding="utf-8")


def plot_curves(names: list[str], budget: str) -> None:
    """Do `plot`: draw the dev scores after each epoch. A task has a panel, a recipe a line: the
    mean over seeds, in a band from the worst to the best."""
    from matplotlib.figure import Figure

    curves = read_table(CURVES, CURVE_COLUMNS).astype({"epoch": int, "value": float})
    figure = Figure(figsize=(11, 3.6), layout="constrained", dpi=100)
    panels = figure.subplots(1, len(MAIN_SCORES))
    summaries = select(summarize(read_table(RESULTS, COLUMNS)), names or list(PUBLISHED))
    for summary in summaries:
        own = curves[curves["run"].isin(summary.runs) & (curves["split"] == "dev")]
        if summary.cells["budget"] != BUDGETS[budget].title or own.empty:
            continue
        encoder, precision, device, seeds = (
            summary.cells[column] for column in ("encoder", "precision", "device", "seeds")
        )
        label = f"{summary.name} ({encoder}, {precision}, {device}, seeds: {seeds})"
        for panel, score in zip(panels, MAIN_SCORES, strict=True):
            values = own[own["metric"] == score].groupby("epoch")["value"]
            (line,) = panel.plot(values.mean(), label=label, marker=".")
            low, high = values.min(), values.max()
            panel.fill_between(low.index, low, high, alpha=0.15, color=line.get_color())
    for panel, (score, title) in zip(panels, MAIN_SCORES.items(), strict=True):
        panel.set(title=title, xlabel="epoch", ylabel=f"dev {SCORES[score].metrics[0]}")
        panel.xaxis.get_major_locator().set_params(integer=True)
    handles, labels = panels[0].get_legend_handles_labels()
    if not labels:
        raise UserError(f"{CURVES}: no run of these recipes with --budget {budget}")
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize="small")
    with atomic_write(FIGURE) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": None})
