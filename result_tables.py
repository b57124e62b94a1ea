"""Tables, tests and curves from the rows of results."""

import json
import re
from collections import defaultdict
from fnmatch import fnmatch
from pathlib import Path

from options import config_arguments, deciding, given_flags
from tasks import TASKS
from utils import UserError, atomic_write

PREDICTIONS, FIGURE, README = (
    Path("results/predictions"),
    Path("results/curves.png"),
    Path("README.md"),
)
RECIPES, RUNS = Path("recipes"), Path("models/experiments")
RESULTS, CURVES = Path("results/results.csv"), Path("results/curves.csv")
# Epochs, and rows of each task in one.
BUDGETS = {"short": (2, 4000), "full": (4, 10000), "gpu": (10, 10000)}
WITH_COLUMNS = set("seed epochs samples_per_epoch bert_model precision data_dir use_gpu".split())
SCORES = {f"{name}_{metric}": task for name, task in TASKS.items() for metric in task.metrics}
MAIN_SCORES = {f"{name}_{task.metrics[0]}": task.title for name, task in TASKS.items()}
IDENTITY = "recipe budget seed encoder precision flags data pipeline device".split()
COLUMNS = ["run", *IDENTITY, "rows", *SCORES, "best_epoch", "seconds_per_epoch", "seconds"]
CURVE_COLUMNS = ["run", "recipe", "budget", "seed", "epoch", "split", "metric", "value"]
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
# block of the README -> its recipes, and what it shows of them besides
COMPARISONS = {
    "best": (["best", "best/*"], ["changed"]),
    "ablations": (["baseline", "best", "ablations/*"], ["changed", "cost"]),
    "sophia": (["baseline", "sophiah", "sophiag", "sophia/*"], ["changed", "clipped"]),
    "tags": (["baseline", "tagging"], ["pipeline"]),
    "moe": (["baseline", "moe-*"], ["cost", "memory"]),
    "synthetic": (["baseline", "synthetic*"], ["rows"]),
}
SHOWN_AS_IT_IS = ["recipe", "encoder", "precision", "rows", "pipeline", "device"]
SETTING = ["encoder", "budget", "precision", "device"]  # rows that differ in these do not compare
HEADINGS = MAIN_SCORES | {
    "macro_f1": "macro-F1",
    "pearson": "Pearson",
    "changed": "beside the first row's flags",
    "better": "beside the first row's, same seeds",
    "threads": "CPU threads × runs at once",
    "cost": "seconds / baseline's",
    "memory": "peak memory, MB",
    "clipped": "clipped, by epoch",
    "rows": "training rows",
    "seconds": "seconds an epoch",
    "published": "original report (BERT-base, its own data, A100)",
}
NOTE = """\
Dev scores of the best epoch, mean ± standard deviation over seeds; budget: epochs × rows of each task
in one. Not comparable: """
TASK_NOTE = f"""{NOTE}the last column with what stands beside it (another encoder, other data,
one number without spread), and rows of different encoder, training rows, budget, precision or device
with each other; minilm-float16 is minilm with its weights rounded to float16."""
COMPARISON_NOTE = f"""{NOTE}rows of different encoder, budget, precision or device with each other,
and seconds where threads or runs at once differ."""


def recipe_path(name: str) -> Path:
    path = RECIPES / f"{name}.json"
    if not path.is_file():
        known = sorted(str(each.relative_to(RECIPES))[:-5] for each in RECIPES.rglob("*.json"))
        raise UserError(f"there is no recipe {name!r}, only {', '.join(known)}")
    return path


def deciding_flags(arguments: list[str]) -> dict:
    """Of the flags in `arguments`, those that scores depend on and that have no column of their
    own; of files their names, since folders differ from machine to machine."""
    return {
        name: Path(value).name if isinstance(value, str) else value
        for name, value in deciding(given_flags(arguments)).items()
        if name not in WITH_COLUMNS
    }


def canonical(flags: dict) -> str:
    return json.dumps(flags, sort_keys=True)


def flags_of(recipe: str) -> dict:
    """As the column "flags" has them."""
    return json.loads(canonical(deciding_flags(config_arguments(str(recipe_path(recipe))))))


def read(path: Path, columns: list[str]):
    """A table of ours, all of it text."""
    import pandas as pd  # half a second

    if not path.exists():
        return pd.DataFrame(columns=columns, dtype=str)
    try:
        return pd.read_csv(path, dtype=str, keep_default_na=False)[columns]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path}: not a table that experiments.py wrote ({error})") from error


def spread(values, digits: int = 3) -> str:
    """`0.441 ± 0.005` for a series of numbers; for one number, that; nothing if one is missing."""
    if values.isna().any():
        return ""
    if len(values) == 1:
        return f"{values.iloc[0]:.{digits}f}"
    return f"{values.mean():.{digits}f} ± {values.std():.{digits}f}"


def flags_text(flags: dict, known: dict) -> str:
    """Of the flags, those that are not known, as they would stand on a command line."""
    parts = []
    for name, value in flags.items():
        if known.get(name) != value:
            text = (
                ",".join(f"{task}={number:g}" for task, number in value.items())
                if isinstance(value, dict)
                else f"{value}"
            )
            parts.append(f"--{name}" if value is True else f"--{name} {text}")
    return " ".join(parts)


def changed(flags: dict, known: dict) -> str:
    """What is set otherwise, and what is not set."""
    missing = " ".join(f"--{name}" for name in sorted(known.keys() - flags.keys()))
    texts = {"": flags_text(flags, known), "without ": missing}
    return ", ".join(f"{word}`{text}`" for word, text in texts.items() if text)


def difference(means, reference) -> str:
    """Of two series of scores by seed, how much higher the first one is on seeds that both have."""
    both = (means - reference).dropna()
    return f"{both.mean():+.3f}" if len(both) else ""


def at_once(jobs: str) -> str:
    return f" × {jobs}" if jobs else ""


def shown_budget(epochs: int, samples: int) -> str:
    return f"{epochs} × {samples:,}"


def summaries(results) -> list[dict]:
    """What the tables show of each recipe in each setting, over its seeds. Runs of a recipe that is
    gone, or has got another flag since, are left out; if only a value has changed, the row's command
    names the old one."""
    import pandas as pd

    known = {n: flags_of(n) for n in set(results["recipe"]) if (RECIPES / f"{n}.json").is_file()}
    rows = []
    results = results.copy()
    for name in (*SCORES, "seconds_per_epoch", "peak_memory_mb"):
        results[name] = pd.to_numeric(results[name])  # empty: nan
    results["mean"] = results[list(MAIN_SCORES)].mean(axis=1, skipna=False)
    for _, group in results.groupby([name for name in IDENTITY if name != "seed"]):
        shared = group.iloc[0]
        recipe, flags = shared["recipe"], json.loads(shared["flags"])
        if recipe not in known or not known[recipe].keys() <= flags.keys():
            continue
        epochs, samples = map(int, shared["budget"].split("x"))
        clipped = group["clipped"].str.split(expand=True).astype(float).mean().dropna()
        rows.append(
            {name: shared[name] for name in SHOWN_AS_IT_IS}
            | {name: spread(group[name]) for name in (*SCORES, "mean")}
            | {
                "runs": set(group["run"]),
                "flags": flags,
                "means": group.set_index("seed")["mean"],
                "name": f"{recipe} {flags_text(flags, known[recipe])}".strip(),
                "seeds": str(len(group)),
                "budget": shown_budget(epochs, samples),
                "size": epochs * samples,
                "threads": ", ".join(sorted(set(group["threads"] + group["jobs"].map(at_once)))),
                "seconds_per_epoch": group["seconds_per_epoch"].mean(),
                "seconds": f"{group['seconds_per_epoch'].mean():.0f}",
                "memory": spread(group["peak_memory_mb"], 0),
                "clipped": ", ".join(f"{share:.2f}" for share in clipped),
            }
        )
    return rows


def select(rows: list[dict], patterns: list[str]) -> list[dict]:
    """Those of these recipes, in the order of the patterns, larger budgets first."""

    def place(row):
        return [fnmatch(row["recipe"], pattern) for pattern in patterns].index(True)

    chosen = [row for row in rows if any(fnmatch(row["recipe"], each) for each in patterns)]
    return sorted(
        chosen,
        key=lambda row: (-row["size"], row["encoder"], row["precision"], place(row), row["name"]),
    )


def markdown(rows: list[dict], columns: list[str], note: str) -> str:
    if not rows:
        return "No runs yet.\n"
    lines = [
        [HEADINGS.get(name, name) for name in columns],
        ["---"] * len(columns),
    ]
    lines += [[row[name] for name in columns] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines) + f"\n{note}\n"


def task_table(rows: list[dict], task: str) -> str:
    metrics = {metric: f"{task}_{metric}" for metric in TASKS[task].metrics}
    rows = [
        row
        | {metric: row[score] for metric, score in metrics.items()}
        | {"command": f"`python experiments.py run {row['name']}`"}
        | {"published": PUBLISHED[row["recipe"]].get(task, "–")}
        for row in select(rows, list(PUBLISHED))
    ]
    setting = ["rows", *SETTING, "threads", "seconds", "published"]
    return markdown(rows, ["command", "seeds", *metrics, *setting], TASK_NOTE)


def comparison_table(rows: list[dict], block: str) -> str:
    """Of each setting that has more than one of the recipes, all of them."""
    patterns, more = COMPARISONS[block]
    by_setting, compared = defaultdict(list), []
    for row in select(rows, patterns):
        by_setting[tuple(row[name] for name in SETTING)].append(row)
    for group in by_setting.values():
        baseline = [row["seconds_per_epoch"] for row in group if row["name"] == "baseline"]
        if len({row["recipe"] for row in group}) > 1:
            compared += [
                row
                | {
                    "recipe": f"`{row['name']}`",
                    "changed": changed(row["flags"], group[0]["flags"]),
                }
                | {"better": "" if row is group[0] else difference(row["means"], group[0]["means"])}
                | {"cost": f"{row['seconds_per_epoch'] / baseline[0]:.2f}" if baseline else ""}
                for row in group
            ]
    columns = [
        "recipe",
        "seeds",
        *MAIN_SCORES,
        "mean",
        "better",
        *more,
        "seconds",
        "threads",
        *SETTING,
    ]
    return markdown(compared, columns, COMPARISON_NOTE)


def fill_in(text: str, blocks: dict[str, str]) -> str:
    """The README's text with other content between its markers. UserError: a marker that has no
    partner, or names no block."""

    def fill(match):
        start, name, content, end = match.groups()
        if "<!-- experiments:" in content or name not in blocks:
            raise UserError(
                f"{README}: {start.strip()} has no end, or is none of {', '.join(blocks)}"
            )
        return start + blocks[name] + end

    pattern = r"(<!-- experiments:([\w-]+) -->\n)(.*?)(<!-- /experiments -->|\Z)"
    return re.sub(pattern, fill, text, flags=re.DOTALL)


def write_tables() -> None:
    """`table`: print all tables, and put them into the README."""
    rows = summaries(read(RESULTS, COLUMNS))
    blocks = {task: task_table(rows, task) for task in TASKS}
    blocks |= {name: comparison_table(rows, name) for name in COMPARISONS}
    for name, table in blocks.items():
        print(f"{name}\n\n{table}")
    figure = f"![Dev scores after each epoch]({FIGURE})\n" if FIGURE.exists() else "No runs yet.\n"
    try:
        text = README.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{README}: cannot be read: {error.strerror}") from error
    with atomic_write(README) as temporary:
        temporary.write_text(fill_in(text, blocks | {"curves": figure}), encoding="utf-8")


def plot(names: list[str], budget: str) -> None:
    """Dev scores after each epoch: a panel for each task, a line for each recipe, mean over seeds and
    the range from the worst to the best."""
    from matplotlib.figure import Figure

    curves = read(CURVES, CURVE_COLUMNS).astype({"epoch": int, "value": float})
    figure = Figure(figsize=(11, 3.6), layout="constrained", dpi=100)
    panels = figure.subplots(1, len(MAIN_SCORES))
    for row in select(summaries(read(RESULTS, COLUMNS)), names or list(PUBLISHED)):
        mine = curves[curves["run"].isin(row["runs"]) & (curves["split"] == "dev")]
        if row["budget"] != shown_budget(*BUDGETS[budget]) or mine.empty:
            continue
        for panel, score in zip(panels, MAIN_SCORES):
            values = mine[mine["metric"] == score].groupby("epoch")["value"]
            setting = (
                f"{row['encoder']}, {row['precision']}, {row['device']}, seeds: {row['seeds']}"
            )
            label = f"{row['name']} ({setting})"
            (line,) = panel.plot(values.mean(), label=label, marker=".")
            low, high = values.min(), values.max()
            panel.fill_between(low.index, low, high, alpha=0.15, color=line.get_color())
    for panel, (score, title) in zip(panels, MAIN_SCORES.items()):
        panel.set(title=title, xlabel="epoch", ylabel=f"dev {SCORES[score].metrics[0]}")
        panel.xaxis.get_major_locator().set_params(integer=True)
    handles, labels = panels[0].get_legend_handles_labels()
    if not labels:
        raise UserError(f"{CURVES}: no run of these recipes with --budget {budget}")
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize="small")
    with atomic_write(FIGURE) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": None})
