"""Train recipes with several seeds, and make the README's tables and curves from what they gave.

    python experiments.py run NAME... --data_dir data --bert_model minilm
    python experiments.py table
    python experiments.py plot

To be started in the folder of the repository. A recipe is `recipes/NAME.json`, a table of flags of
multitask_classifier.py. Each run is a process of its own, which writes into a folder of its own in
`models/experiments`. When it ends, it gets a row in `results/results.csv`; one that has its row is not
made again, so the command can be interrupted, and goes on where it stopped.
"""

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor, as_completed
from fnmatch import fnmatch
from pathlib import Path

import torch
from filelock import FileLock

from datasets import TASKS
from multitask_classifier import decisive
from options import (
    DEFAULT_SPACY_MODEL,
    ROOT,
    build_parser,
    config_arguments,
    parse_options,
    positive_int,
)
from tagging import Pipeline
from utils import UserError, atomic_write, check_writable, exit_status, pick_device, terminate

RECIPES, RUNS = Path("recipes"), Path("models/experiments")
RESULTS, CURVES = Path("results/results.csv"), Path("results/curves.csv")
PREDICTIONS, FIGURE, README = (
    Path("results/predictions"),
    Path("results/curves.png"),
    Path("README.md"),
)

SEEDS = 11711, 1, 2, 3, 4
# Epochs, and rows of each task in one.
BUDGETS = {"short": (2, 4000), "full": (4, 10000), "gpu": (10, 10000)}
OF_A_RUN = set("config seed resume evaluate hpo models_dir logdir predictions_dir".split())
WITH_COLUMNS = set("seed epochs samples_per_epoch bert_model precision data_dir use_gpu".split())
KEEPS_PREDICTIONS = "baseline", "best"

SCORES = {f"{name}_{metric}": task for name, task in TASKS.items() for metric in task.metrics}
MAIN_SCORES = {f"{name}_{task.metrics[0]}": task.title for name, task in TASKS.items()}
IDENTITY = "recipe budget seed encoder precision flags data pipeline device".split()
COLUMNS = ["run", *IDENTITY, "rows", *SCORES, "best_epoch", "seconds_per_epoch", "seconds"]
COLUMNS += ["peak_memory_mb", "clipped", "threads", "jobs", "commit"]
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


# --------------------------------------------------------------------------------------------- runs


@dataclasses.dataclass(frozen=True)
class Run:
    """One training run that is wanted: what it is, and how it is started."""

    identity: dict[str, str]  # the columns that decide its scores
    arguments: tuple[str, ...]

    @functools.cached_property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()[:8]

    @property
    def name(self) -> str:
        recipe, budget, seed = (self.identity[key] for key in ("recipe", "budget", "seed"))
        return f"{recipe}-{budget}-seed{seed}-{self.digest}"

    @property
    def folder(self) -> Path:
        return RUNS / self.name

    @property
    def log(self) -> Path:
        return self.folder / "log.txt"


def recipe_path(name: str) -> Path:
    path = RECIPES / f"{name}.json"
    if not path.is_file():
        known = sorted(str(each.relative_to(RECIPES))[:-5] for each in RECIPES.rglob("*.json"))
        raise UserError(f"there is no recipe {name!r}, only {', '.join(known)}")
    return path


def given_flags(arguments: list[str]) -> dict:
    """The values of the flags that stand in `arguments`."""
    parser = build_parser()
    parser.set_defaults(**dict.fromkeys(vars(parser.parse_args([]))))
    given = vars(parser.parse_args(arguments))
    return {name: value for name, value in given.items() if value is not None}


def deciding_flags(arguments: list[str]) -> dict:
    """Of the flags in `arguments`, those that scores depend on and that have no column of their
    own; of files their names, since folders differ from machine to machine."""
    return {
        name: Path(value).name if isinstance(value, str) else value
        for name, value in decisive(given_flags(arguments)).items()
        if name not in WITH_COLUMNS
    }


def file_digest(path: str) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error


def plan_run(recipe: str, seed: int, budget: str, flags: list[str]) -> Run:
    """UserError, or argparse's exit, if the flags cannot work."""
    if taken := [each for each in given_flags(flags) if each in OF_A_RUN or each[-4:] == "_out"]:
        raise UserError(f"--{', --'.join(taken)}: experiments.py sets this itself for each run")
    path, (epochs, samples) = recipe_path(recipe), BUDGETS[budget]
    arguments = f"--epochs {epochs} --samples_per_epoch {samples} --seed {seed}".split()
    arguments += ["--config", str(path), *flags]
    options = parse_options(arguments)
    device = pick_device(options.use_gpu)
    precision = options.precision
    if precision == "auto":
        precision = "bfloat16" if device.type == "cuda" else "float32"
    pipeline = ""
    if options.additional_input:
        pipeline = str(Pipeline.find(options.spacy_model or DEFAULT_SPACY_MODEL))
    files = [
        getattr(options, f"{name}_{split}") for name in options.tasks for split in ("train", "dev")
    ]
    identity = {
        "recipe": recipe,
        "budget": f"{options.epochs}x{options.samples_per_epoch}",
        "seed": str(seed),
        "encoder": Path(options.bert_model).name,
        "precision": precision,
        "flags": canonical(deciding_flags(config_arguments(str(path)) + flags)),
        "data": hashlib.sha256(" ".join(map(file_digest, files)).encode()).hexdigest()[:8],
        "pipeline": pipeline,
        "device": describe_device(device),
    }
    return Run(identity, tuple(arguments))


def canonical(flags: dict) -> str:
    return json.dumps(flags, sort_keys=True)


def describe_device(device: torch.device) -> str:
    """`2 cores of AMD EPYC`, or the GPU's name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "mps":
        return "Apple GPU"
    model = None
    with contextlib.suppress(OSError):
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        model = re.search(r"^model name\s*: (.*)$", text, re.M)
    return f"{os.cpu_count()} cores of {model[1] if model else platform.machine()}"


class Children:
    """The processes of the runs in progress, so that they can be stopped from another thread."""

    def __init__(self):
        self.pids, self.stopped, self.lock = set(), False, threading.Lock()

    @contextlib.contextmanager
    def start(self, command: list[str], threads: int | None):
        """A process with its output in one pipe; in a session of its own, so that a terminal's
        Ctrl-C does not reach it beside our signal, of which it needs only one."""
        environment = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        with self.lock:
            if self.stopped:
                raise InterruptedError
            child = subprocess.Popen(command, env=environment, start_new_session=True, **pipes)
            self.pids.add(child.pid)
        with child:
            yield child

    def wait(self, child: subprocess.Popen) -> int:
        """When its output is over: its peak memory in MB; its exit status is in `returncode`."""
        with self.lock:
            self.pids.remove(child.pid)
        _, status, used = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        return round(used.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10))

    def stop(self) -> None:
        """Let each save its state and end."""
        with self.lock:
            self.stopped = True
            for pid in self.pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGTERM)


def train(run: Run, jobs: int, children: Children) -> int:
    """Start the run or go on with it, to its end. Returns its exit status; all that it says is
    added to its log."""
    command = [sys.executable, "-u", str(ROOT / "multitask_classifier.py"), *run.arguments]
    command += ["--resume", "auto", "--models_dir", str(run.folder)]
    command += ["--logdir", str(run.folder / "logdir")]
    command += ["--predictions_dir", str(run.folder / "predictions")]
    check_writable(run.log)
    threads = max(os.cpu_count() // jobs, 1) if jobs > 1 else None
    start = time.perf_counter()
    with open(run.log, "a", encoding="utf-8") as log, children.start(command, threads) as child:
        for line in io.TextIOWrapper(child.stdout, "utf-8", "replace", newline=""):
            if not line.endswith("\r"):  # as a progress bar does
                log.write(line)
                log.flush()
            if jobs == 1:
                print(line, end="", flush=True)
            elif re.match(r"epoch \d+: \d+ s", line):
                print(f"{run.name}: {line}", end="", flush=True)
        peak = children.wait(child)
        seconds = time.perf_counter() - start
        how = f"{seconds:.0f} s, {peak} MB, {jobs} at once"
        log.write(f"\nprocess: status {child.returncode}, {how}\n")
    return child.returncode


def outcome(run: Run) -> tuple[dict, list[dict]]:
    """A finished run's row of results.csv, and its rows of curves.csv, from its log and from
    TensorBoard's."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    text = run.log.read_text(encoding="utf-8")
    checkpoint, epoch = re.findall(r"^checkpoint: (.*) \(epoch (\d+)\)$", text, re.M)[-1]
    directory = run.folder / "logdir" / Path(checkpoint).stem
    events = EventAccumulator(str(directory), size_guidance={"scalars": 0}).Reload()
    epochs = {n: int(s) for n, s in re.findall(r"^epoch (\d+): (\d+) s,", text, re.M)}
    processes = re.findall(r"^process: .*, (\d+) s, (\d+) MB(?:, (\d+) at once)?$", text, re.M)
    of_gpu = re.findall(r"^memory of .*: ([\d,]+) MB at most$", text, re.M)
    peaks = of_gpu or [megabytes for _, megabytes, _ in processes]
    tags = events.Tags()["scalars"]
    row = {
        "run": run.digest,
        **run.identity,
        "rows": "/".join(dict(re.findall(r"^(\w+): (\d+) training rows", text, re.M)).values()),
        **{
            score: f"{events.Scalars(f'best/{score}')[-1].value:.6f}"
            for score in SCORES
            if f"best/{score}" in tags
        },
        "best_epoch": epoch,
        "seconds_per_epoch": f"{sum(epochs.values()) / len(epochs):.1f}",
        "seconds": str(sum(int(seconds) for seconds, *_ in processes)),
        "peak_memory_mb": str(max(int(peak.replace(",", "")) for peak in peaks)),
        "clipped": " ".join(re.findall(r"clipped share of coordinates (\d\S*),", text)),
        "threads": re.findall(r", (\d+) CPU threads", text)[-1],
        "jobs": processes[-1][-1],
        "commit": re.findall(r"'commit': '(.*?)'", text)[-1],
    }
    curves = [
        {key: row[key] for key in CURVE_COLUMNS[:4]}
        | {"epoch": str(epoch), "split": split, "metric": metric, "value": f"{value:.6f}"}
        for split, metric in (tag.split("/") for tag in tags if tag.startswith(("dev/", "train/")))
        for epoch, value in {e.step: e.value for e in events.Scalars(f"{split}/{metric}")}.items()
    ]
    return row, curves


def keep(run: Run) -> dict:
    """Write what a finished run gave into `results`, its row last: with it, the run is done."""
    row, curves = outcome(run)
    record(CURVES, curves, CURVE_COLUMNS, CURVE_COLUMNS[:-1])
    if row["recipe"] in KEEPS_PREDICTIONS and row["budget"] == "{}x{}".format(*BUDGETS["full"]):
        for path in (run.folder / "predictions").glob("*-test-output.csv"):
            target = PREDICTIONS / f"{row['recipe']}-seed{row['seed']}" / path.name
            with atomic_write(target) as temporary:
                shutil.copyfile(path, temporary)
    record(RESULTS, [row], COLUMNS, ["run"])
    return row


def read(path: Path, columns: list[str]):
    """A table of ours, all of it text."""
    import pandas as pd  # half a second

    if not path.exists():
        return pd.DataFrame(columns=columns, dtype=str)
    try:
        return pd.read_csv(path, dtype=str, keep_default_na=False)[columns]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path}: not a table that experiments.py wrote ({error})") from error


def record(path: Path, rows: list[dict], columns: list[str], key: list[str]) -> None:
    """Add rows, in place of those of the same key; other processes may do so at the same time."""
    import pandas as pd

    RUNS.mkdir(parents=True, exist_ok=True)
    with FileLock(RUNS / f".{path.name}.lock"):
        new = pd.DataFrame([{name: row.get(name, "") for name in columns} for row in rows])
        table = pd.concat([read(path, columns), new]).drop_duplicates(key, keep="last")
        in_order = [name for name in (*IDENTITY, *CURVE_COLUMNS) if name in columns]
        with atomic_write(path) as temporary:
            table.sort_values(in_order).to_csv(temporary, index=False, lineterminator="\n")


def run_missing(args: argparse.Namespace, flags: list[str]) -> None:
    """`run`; UserError, when all are done, if some have failed."""
    wanted = [
        plan_run(name, s, args.budget, flags) for s in SEEDS[: args.seeds] for name in args.names
    ]
    done = set(read(RESULTS, COLUMNS)["run"])
    missing = [
        run for run in {each.digest: each for each in wanted}.values() if run.digest not in done
    ]
    print(f"{len(wanted)} runs, {len(wanted) - len(missing)} of them done already")
    children, failed = Children(), []
    with ThreadPoolExecutor(args.jobs) as pool:
        try:
            runs = {pool.submit(train, run, args.jobs, children): run for run in missing}
            for n, future in enumerate(as_completed(runs), 1):
                run, place = runs[future], f"{n} of {len(missing)}"
                if status := future.result():
                    failed.append(run.name)
                    print(
                        f"{run.name}: failed, exit status {status} ({place}); {run.log} ends with:"
                    )
                    lines = run.log.read_text(encoding="utf-8").splitlines()
                    print(*[line for line in lines if line][-6:-1], sep="\n", flush=True)
                    continue
                row = keep(run)
                scores = ", ".join(f"{row[name]} {name}" for name in SCORES if name in row)
                print(f"{run.name}: {scores} ({place})", flush=True)
        except BaseException:  # an interrupt, most of all
            pool.shutdown(wait=False, cancel_futures=True)
            children.stop()
            raise
    if failed:
        raise UserError(f"failed: {', '.join(failed)}")


# ------------------------------------------------------------------------------------------- tables


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
            text = ",".join(map(str, value)) if isinstance(value, list) else f"{value}"
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


def flags_of(recipe: str) -> dict:
    """As the column "flags" has them."""
    return json.loads(canonical(deciding_flags(config_arguments(str(recipe_path(recipe))))))


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


# --------------------------------------------------------------------------------------------- main


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """The options of a command, and flags that are not its own."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser(
        "run",
        allow_abbrev=False,
        help="train what has no row in results/results.csv yet",
        epilog="All other flags are given to multitask_classifier.py; they stand after the names.",
    )
    budgets = ", ".join(f"{name}: {n} epochs of {rows:,}" for name, (n, rows) in BUDGETS.items())
    flag = run.add_argument
    flag("names", nargs="+", metavar="NAME", help="recipes/NAME.json")
    flag(
        "--seeds",
        type=int,
        choices=range(1, len(SEEDS) + 1),
        default=3,
        help="how many; default: 3",
    )
    flag(
        "--budget",
        choices=BUDGETS,
        default="full",
        help=f"{budgets} rows of each task; --epochs and --samples_per_epoch change it; default: full",
    )
    flag(
        "--jobs",
        type=positive_int,
        default=1,
        help="runs at a time, on equal shares of the cores; default: 1",
    )
    commands.add_parser("table", help="print the tables, and put them into README.md")
    curves = commands.add_parser("plot", help="draw the learning curves, results/curves.png")
    curves.add_argument(
        "names", nargs="*", metavar="NAME", help="default: those of the tasks' tables"
    )
    curves.add_argument("--budget", choices=BUDGETS, default="full", help="default: full")
    args, flags = parser.parse_known_args(argv)
    if flags and args.command != "run":
        parser.error(f"unrecognized arguments: {' '.join(flags)}")
    return args, flags


def main(argv: list[str] | None = None) -> int:
    args, flags = parse(argv)

    def work():
        if not RECIPES.is_dir():
            raise UserError(f"{RECIPES} is not here; start this in the folder of the repository")
        if args.command == "run":
            run_missing(args, flags)
        elif args.command == "table":
            write_tables()
        else:
            plot(args.names, args.budget)

    advice = "close other programs, or start fewer --jobs"
    return exit_status(work, advice, "the same command goes on from here")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, terminate)
    sys.exit(main())
