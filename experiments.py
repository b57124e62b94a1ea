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
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import torch
from filelock import FileLock

from options import DEFAULT_SPACY_MODEL, config_arguments, given_flags, parse_options
from result_tables import (
    BUDGETS,
    COLUMNS,
    CURVE_COLUMNS,
    CURVES,
    IDENTITY,
    PREDICTIONS,
    RECIPES,
    RESULTS,
    RUNS,
    SCORES,
    canonical,
    deciding_flags,
    plot,
    read,
    recipe_path,
    write_tables,
)
from tagging import Pipeline
from utils import (
    ROOT,
    UserError,
    atomic_write,
    check_writable,
    exit_status,
    pick_device,
    positive_int,
    terminate,
)

SEEDS = 11711, 1, 2, 3, 4
OF_A_RUN = set("config seed resume evaluate hpo models_dir logdir predictions_dir".split())
KEEPS_PREDICTIONS = "baseline", "best"

COLUMNS += ["peak_memory_mb", "clipped", "threads", "jobs", "commit"]


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
