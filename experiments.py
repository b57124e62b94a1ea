"""Train recipes with several seeds, and make tables and curves from their results.

    python experiments.py run NAME... --data_dir data --bert_model minilm
    python experiments.py table --write
    python experiments.py compare baseline best
    python experiments.py plot

Start it in the folder of the repository. A recipe is `recipes/NAME.json`, a table of flags of
multitask_classifier.py. Each run is a process of its own, which writes into a folder of its own in
`models/experiments`. When it ends, it gets a row in `results/results.csv`. A run that has its row
is not made again, so a command that was interrupted continues when it is started again.
"""

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import io
import itertools
import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import IO, Any, TextIO, cast

import numpy as np
import torch
from filelock import FileLock

import evaluation
from checkpoint import read_checkpoint
from comparison import compare_recipes, plot_curves
from datasets import SMOKETEST_ROWS, digest_files, read_examples
from flags import DEFAULT_SPACY_MODEL
from options import config_arguments, given_flags, parse_options, read_config
from result_tables import (
    AVERAGED,
    BUDGETS,
    COLUMNS,
    CURVE_COLUMNS,
    CURVES,
    IDENTITY,
    PREDICTIONS,
    RECIPES,
    RESULTS,
    Budget,
    main_scores,
    read_table,
    recipe_path,
    recorded_flags,
    write_tables,
)
from streams import Parser
from tagging import Pipeline
from tasks import TASKS, Task, plain_rows
from utils import (
    ROOT,
    UserError,
    atomic_write,
    check_writable,
    cpu_features,
    current_versions,
    exit_status,
    half_dtype,
    pick_device,
    positive_int,
    terminate,
)

SEEDS = (11711, 1, 2, 3, 4)
RUNS = Path("models/experiments")
# Flags that this program sets itself.
OWN_FLAGS = set("config seed resume evaluate hpo models_dir logdir predictions_dir".split())
OWN_FLAGS |= {"tensorboard_subfolder"}
LENGTH = {"epochs", "samples_per_epoch"}  # a recipe has none: --budget says it
WITH_PREDICTIONS = ("baseline", "best")  # recipes whose test predictions are kept


# --------------------------------------------------------------------------------------------- runs


@dataclasses.dataclass(frozen=True)
class Run:
    """A training run that is wanted."""

    identity: dict[str, str]  # the columns that decide its scores
    arguments: tuple[str, ...]  # for multitask_classifier.py
    after: "Run | None" = None  # the run from whose model it goes on

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

    @property
    def models(self) -> list[str]:
        """The best epoch's checkpoint; empty as long as there is none."""
        return [str(path) for path in self.folder.glob("*.pt")]

    @property
    def kept(self) -> Path:
        return PREDICTIONS / f"{self.name.replace('/', '-')}.npz"


def plan_run(recipe: str, seed: int, budget: Budget, flags: list[str]) -> Run:
    """Plan a run. A recipe that names another one as "after" has half of the epochs, and the other one
    has the first half. Raises UserError, or argparse's exit, if the flags cannot work."""
    path = str(recipe_path(recipe))
    in_file = given_flags(config_arguments(path))
    given = [("", given_flags(flags), OWN_FLAGS), (f"{path}: ", in_file, OWN_FLAGS | LENGTH)]
    for where, names, own in given:
        if wrong := [name for name in names if name in own or name.endswith("_out")]:
            problem = f"--{', --'.join(wrong)}: experiments.py sets this itself; leave it out"
            raise UserError(where + problem)
    lengths = f"--epochs {budget.epochs} --samples_per_epoch {budget.samples}"
    arguments = [*lengths.split(), "--seed", str(seed), "--config", path, *flags]
    options = parse_options(arguments)
    budget = Budget(options.epochs, options.samples_per_epoch)
    after = None
    if earlier := read_config(path).get("after"):
        if budget.epochs % 2:
            problem = f"half of {budget.epochs} epochs go to {earlier!r}; give --epochs 2"
            raise UserError(f"{path}: {problem}")
        if read_config(str(recipe_path(earlier))).get("after"):
            raise UserError(f"{path}: {earlier!r}, after which it comes, goes on from another run")
        half = ["--epochs", str(budget.epochs // 2)]
        after = plan_run(earlier, seed, budget, [*flags, *half])
        # The model brings its encoder.
        encoder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        encoder.add_argument("--bert_model")
        arguments = encoder.parse_known_args([*arguments, *half])[1]
    identity = {"recipe": recipe, "budget": str(budget), "seed": str(seed)} | setting_of(options)
    identity["flags"] = json.dumps(recorded_flags(path, flags), sort_keys=True)
    return Run(identity, tuple(arguments), after)


def setting_of(options: argparse.Namespace) -> dict[str, str]:
    """Return the columns for encoder, precision, data, spaCy pipeline and device."""
    device = pick_device(options.use_gpu)
    dtype = half_dtype(device, options.precision) or torch.float32
    pipeline = ""
    if options.additional_input:
        pipeline = str(Pipeline.find(options.spacy_model or DEFAULT_SPACY_MODEL))
    files = [
        path
        for name in options.tasks
        for split in ("train", "dev")
        for path in getattr(options, f"{name}_{split}")
    ]
    data = " ".join(digest_files([path]) for path in files)
    if tasks := {name: task for name, task in options.tasks.items() if name not in TASKS}:
        data += json.dumps(plain_rows(tasks))
    return {
        "encoder": Path(options.bert_model).name,
        "precision": str(dtype).removeprefix("torch."),
        "data": hashlib.sha256(data.encode()).hexdigest()[:8],
        "pipeline": pipeline,
        "device": describe_device(device),
    }


def describe_device(device: torch.device) -> str:
    """Return the name of a GPU, or for the CPU a text like `2 cores of AMD EPYC, avx512_bf16`."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "mps":
        return "Apple GPU"
    model = None
    with contextlib.suppress(OSError):
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        model = re.search(r"^model name\s*: (.*)$", text, re.M)
    name = f"{os.cpu_count()} cores of {model[1] if model else platform.machine()}"
    return ", ".join([name, *cpu_features()])


class Children:
    """The processes of the runs in progress, which another thread can stop."""

    def __init__(self) -> None:
        self.pids: set[int] = set()
        self.stopped, self.lock = False, threading.Lock()

    @contextlib.contextmanager
    def start(
        self, command: list[str], threads: int | None
    ) -> Iterator[tuple[subprocess.Popen, TextIO]]:
        """Start a process. Yield it and its output."""
        with self.lock:
            if self.stopped:
                raise InterruptedError
            child = subprocess.Popen(
                command,
                env=os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {}),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                # A terminal's Ctrl-C does not reach it. It needs one signal only, that of `stop`.
                start_new_session=True,
            )
            self.pids.add(child.pid)
        pipe = cast(IO[bytes], child.stdout)
        with child, io.TextIOWrapper(pipe, "utf-8", "replace", newline="") as output:
            yield child, output

    def wait(self, child: subprocess.Popen) -> int:
        """Wait for a process whose output is over. Return its peak memory in MB, and set its
        `returncode`."""
        with self.lock:
            self.pids.remove(child.pid)
        _, status, used = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        return round(used.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10))

    def stop(self) -> None:
        """Let all of them save their state and end."""
        with self.lock:
            self.stopped = True
            for pid in self.pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGTERM)


def train(run: Run, jobs: int, children: Children) -> int:
    """Start or continue a run, to its end. Add its output to its log and return its exit status."""
    command = [sys.executable, "-u", str(ROOT / "multitask_classifier.py"), *run.arguments]
    if run.after:
        command += ["--init_from", *run.after.models]
    command += ["--resume", "auto", "--models_dir", str(run.folder)]
    command += ["--logdir", str(run.folder / "logdir")]
    command += ["--predictions_dir", str(run.folder / "predictions")]
    check_writable(run.log)
    threads = max((os.cpu_count() or 1) // jobs, 1) if jobs > 1 else None
    start = time.perf_counter()
    with (
        open(run.log, "a", encoding="utf-8") as log,
        children.start(command, threads) as (child, output),
    ):
        for line in output:
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


def read_outcome(run: Run) -> tuple[dict[str, str], list[dict[str, str]]]:
    """Return a finished run's row of results.csv and its rows of curves.csv, from its log and from
    TensorBoard's."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    text = run.log.read_text(encoding="utf-8")
    checkpoint, epoch = re.findall(r"^checkpoint: (.*) \(epoch (\d+)\)$", text, re.M)[-1]
    directory = run.folder / "logdir" / Path(checkpoint).stem
    events = EventAccumulator(str(directory), size_guidance={"scalars": 0}).Reload()
    versions = read_checkpoint(checkpoint)["versions"]
    epochs = {n: int(s) for n, s in re.findall(r"^epoch (\d+): (\d+) s,", text, re.M)}
    processes = re.findall(r"^process: .*, (\d+) s, (\d+) MB(?:, (\d+) at once)?$", text, re.M)
    gpu_peaks = re.findall(r"^memory of .*: ([\d,]+) MB at most$", text, re.M)
    peaks = gpu_peaks or [megabytes for _, megabytes, _ in processes]
    tags = events.Tags()["scalars"]
    row = {
        "run": run.digest,
        **run.identity,
        "rows": "/".join(dict(re.findall(r"(\w+)\s+(\d+)\s+training\s+rows", text)).values()),
        **{
            tag.removeprefix("best/"): f"{events.Scalars(tag)[-1].value:.6f}"
            for tag in tags
            if tag.startswith("best/") and tag != "best/mean"
        },
        "best_epoch": epoch,
        "seconds_per_epoch": f"{sum(epochs.values()) / len(epochs):.1f}",
        # A process that was killed left no line.
        "seconds": str(max(sum(int(s) for s, *_ in processes), sum(epochs.values()))),
        "peak_memory_mb": str(max(int(peak.replace(",", "")) for peak in peaks)),
        "clipped": " ".join(re.findall(r"clipped share of coordinates (\d\S*),", text)),
        "threads": re.findall(r", (\d+) CPU threads", text)[-1],
        "jobs": processes[-1][-1],
        "commit": versions["commit"],
        "torch": versions["torch"],
    }
    curves = [
        {key: row[key] for key in CURVE_COLUMNS[:4]}
        | {"epoch": str(epoch), "split": split, "metric": metric, "value": f"{value:.6f}"}
        for split, metric in (tag.split("/") for tag in tags if tag.startswith(("dev/", "train/")))
        for epoch, value in {
            event.step: event.value for event in events.Scalars(f"{split}/{metric}")
        }.items()
    ]
    return row, curves


def record(run: Run) -> dict[str, str]:
    """Write the results of a finished run. Its row comes last: with it, the run is done."""
    row, curves = read_outcome(run)
    add_rows(CURVES, curves, CURVE_COLUMNS, CURVE_COLUMNS[:-1])
    keep_predictions(run)
    add_rows(RESULTS, [row], COLUMNS, ["run"])
    return row


def keep_predictions(run: Run) -> None:
    """Keep a finished run's labels and predictions of dev, score -> [2, labelled rows], and of some
    recipes its prediction files of test."""
    arrays: dict[str, Any] = {}
    for task, both in dev_predictions(run).items():
        kind = np.min_scalar_type(len(task.classes)) if task.classes else np.float32
        arrays[f"{task.name}_{task.metrics[0]}"] = both.astype(kind)
    is_kept = run.identity["recipe"] in WITH_PREDICTIONS
    if is_kept and run.identity["budget"] == str(BUDGETS["full"]):
        for path in (run.folder / "predictions").glob("*-test-output.csv"):
            with atomic_write(run.kept.with_suffix("") / path.name) as temporary:
                shutil.copyfile(path, temporary)
    with atomic_write(run.kept) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, **arrays)


def dev_predictions(run: Run) -> dict[Task, np.ndarray]:
    """Read the labels and predictions of each task, [2, labelled dev rows]."""
    import pandas as pd

    options, found = parse_options(list(run.arguments)), {}
    for name, task in options.tasks.items():
        if files := getattr(options, f"{name}_dev"):
            numbers = itertools.count(1)
            rows = [row for file in files for row in read_examples(file, task, "dev", numbers)]
            path = run.folder / "predictions" / f"{name}-dev-output.csv"
            table = pd.read_csv(path, sep="\t", dtype=str, keep_default_na=False)
            predicted = table[task.prediction_column].map(task.parse_label)
            if options.smoketest:
                rows = [row for row in rows if not math.isnan(row.label)][:SMOKETEST_ROWS]
            both = np.array([[row.label for row in rows], predicted])
            found[task] = both[:, ~np.isnan(both[0])]
    return found


def add_rows(path: Path, rows: list[dict[str, str]], columns: list[str], key: list[str]) -> None:
    """Add rows to a table, in place of those with the same key. Other processes may do so at the
    same time."""
    import pandas as pd

    RUNS.mkdir(parents=True, exist_ok=True)
    with FileLock(RUNS / f".{path.name}.lock"):
        # Scores of tasks from a file have no column yet.
        added = pd.DataFrame([dict.fromkeys(columns, "") | row for row in rows])
        table = pd.concat([read_table(path, columns), added]).fillna("")
        table = table.drop_duplicates(key, keep="last")
        in_order = [name for name in (*IDENTITY, *CURVE_COLUMNS) if name in columns]
        with atomic_write(path) as temporary:
            table.sort_values(in_order).to_csv(temporary, index=False, lineterminator="\n")


def run_missing(args: argparse.Namespace, flags: list[str]) -> None:
    """Do `run`: those that others go on from, then the others."""
    seeds = SEEDS[: args.seeds]
    wanted = [plan_run(name, seed, args.budget, flags) for seed in seeds for name in args.names]
    done = set(read_table(RESULTS, COLUMNS)["run"])
    missing = {run.digest: run for run in wanted if run.digest not in done}
    earlier = {run.after.digest: run.after for run in missing.values() if run.after}
    earlier = {
        digest: run for digest, run in earlier.items() if not (digest in done and run.models)
    }
    for run in wanted:
        if run.digest in done and not run.kept.exists() and (run.folder / "predictions").is_dir():
            keep_predictions(run)
    print(f"{len(wanted)} runs, {len(wanted) - len(missing)} of them done already")
    if earlier:
        print(f"first {len(earlier)} runs that others go on from")
    failed = train_all([*earlier.values()], args.jobs)
    later = [run for digest, run in missing.items() if digest not in earlier]
    failed += [run.name for run in later if run.after and not run.after.models]
    failed += train_all([run for run in later if run.name not in failed], args.jobs)
    if failed:
        raise UserError(f"failed: {', '.join(failed)}; the log.txt of each in {RUNS} says why")


def train_all(missing: list[Run], jobs: int) -> list[str]:
    """Train and record runs. One that fails stops no other. Return the names of those."""
    children, failed = Children(), []
    with ThreadPoolExecutor(jobs) as pool:
        try:
            runs = {pool.submit(train, run, jobs, children): run for run in missing}
            for number, future in enumerate(as_completed(runs), 1):
                run, place = runs[future], f"{number} of {len(missing)}"
                if status := future.result():
                    failed.append(run.name)
                    problem = f"failed, exit status {status} ({place})"
                    print(f"{run.name}: {problem}; {run.log} ends with:")
                    lines = run.log.read_text(encoding="utf-8").splitlines()
                    print(*[line for line in lines if line][-6:-1], sep="\n", flush=True)
                    continue
                row = record(run)
                scores = ", ".join(f"{row[name]} {name}" for name in main_scores(row))
                print(f"{run.name}: {scores} ({place})", flush=True)
        except BaseException:  # most often an interrupt
            pool.shutdown(wait=False, cancel_futures=True)
            children.stop()
            raise
    return failed


def average(name: str, budget: Budget, flags: list[str]) -> None:
    """Do `average`: add the row of the mean of a recipe's models, one for each seed that is done."""
    done = set(read_table(RESULTS, COLUMNS)["run"])
    runs = [plan_run(name, seed, budget, flags) for seed in SEEDS]
    runs = [run for run in runs if run.digest in done and run.models]
    if len(runs) < 2:
        raise UserError(f"{name}: fewer than two models of its runs are in {RUNS}")
    seeds = "+".join(run.identity["seed"] for run in runs)
    identity = runs[0].identity | {"recipe": f"{name}{AVERAGED}", "seed": seeds}
    # Without the seeds, so that a mean of more of them takes its place.
    mean = Run(identity | {"seed": "mean"}, runs[0].arguments)
    models = [path for run in runs for path in run.models]
    options = parse_options(list(mean.arguments))
    command = [sys.executable, str(ROOT / "multitask_classifier.py"), "--evaluate", *models]
    command += ["--data_dir", options.data_dir]
    command += [f"--{name}" for name in ("use_gpu", "smoketest") if getattr(options, name)]
    command += ["--predictions_dir", str(mean.folder / "predictions")]
    if subprocess.run(command).returncode:
        raise UserError(f"{name}: the mean of its models could not be evaluated; see above")
    row = {"run": mean.digest, **identity} | current_versions()
    del row["python"]  # has no column
    for task, (labels, predictions) in dev_predictions(mean).items():
        scores = evaluation.score(task, labels, predictions)
        row |= {f"{task.name}_{metric}": f"{value:.6f}" for metric, value in scores.items()}
    keep_predictions(mean)
    add_rows(RESULTS, [row], COLUMNS, ["run"])


# --------------------------------------------------------------------------------------------- main


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Return the options of a command, and the flags that are not its own."""
    parser = Parser(description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser(
        "run",
        allow_abbrev=False,
        help="train what has no row in results/results.csv yet",
        epilog="Write all other flags after the names; multitask_classifier.py gets them.",
    )
    budgets = ", ".join(f"{name}: {n} epochs of {rows:,}" for name, (n, rows) in BUDGETS.items())
    flag = run.add_argument
    flag("names", nargs="+", metavar="NAME", help="recipes/NAME.json")
    seeds = range(1, len(SEEDS) + 1)
    flag("--seeds", type=int, choices=seeds, default=3, help="how many; default: 3")
    text = f"{budgets} rows of each task; others like 1x64; default: full"
    of_rows: dict[str, Any] = dict(type=budget_of, default="full", help=text)
    flag("--budget", **of_rows)
    flag(
        "--jobs",
        type=positive_int,
        default=1,
        help="runs at a time, on equal shares of the cores; default: 1",
    )
    mean = commands.add_parser("average", help="add the mean of the models of a recipe's seeds")
    mean.add_argument("name", metavar="NAME", help="a recipe that `run` has trained, same flags")
    mean.add_argument("--budget", **of_rows)
    table = commands.add_parser("table", help="print the tables of results")
    pages = "write them into README.md and docs/, between their markers"
    table.add_argument("--write", action="store_true", help=pages)
    compare = commands.add_parser("compare", help="say how recipes differ from the first one")
    compare.add_argument("names", nargs="+", metavar="NAME", help="recipes, two or more")
    compare.add_argument("--budget", **of_rows)
    curves = commands.add_parser("plot", help="draw the learning curves, results/curves.png")
    default = "default: those of docs/results.md"
    curves.add_argument("names", nargs="*", metavar="NAME", help=default)
    curves.add_argument("--budget", **of_rows)
    args, flags = parser.parse_known_args(argv)
    if flags and args.command not in ("run", "average"):
        parser.error(f"unrecognized arguments: {' '.join(flags)}")
    if args.command == "compare" and len(args.names) < 2:
        parser.error("compare: give two recipes or more")
    return args, flags


def budget_of(text: str) -> Budget:
    """A type for argparse: `full`, or epochs and rows of each task, `1x64`."""
    if text in BUDGETS:
        return BUDGETS[text]
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"must be {', '.join(BUDGETS)} or like 1x64")
    return Budget(*map(int, text.split("x")))


def main(argv: list[str] | None = None) -> int:
    def work():
        args, flags = parse(argv)
        if not RECIPES.is_dir():
            raise UserError(f"{RECIPES} is not here; start this in the folder of the repository")
        if args.command == "run":
            run_missing(args, flags)
        elif args.command == "average":
            average(args.name, args.budget, flags)
        elif args.command == "table":
            write_tables(args.write)
        elif args.command == "compare":
            compare_recipes(args.names, args.budget)
        else:
            plot_curves(args.names, args.budget)

    advice = "close other programs, or start fewer --jobs"
    return exit_status(work, advice, "start the same command again to continue")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, terminate)
    sys.exit(main())
