"""The results of a search: the files of its trials, and the tables and pictures made from them."""

import argparse
import dataclasses
import json
import statistics
import time
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from flags import build_parser
from options import DEPENDENT, deciding, parse_options
from tasks import TASKS, tasks_of_rows
from utils import UserError, atomic_write, one_line

WORST = -1.0  # the objective of a trial that has failed, lower than all others


@dataclasses.dataclass
class Trial:
    """A trial, or a run of the confirmation: the content of its JSON file."""

    path: Path
    flags: dict[str, Any]  # those that are searched and in force
    seed: int
    # Numbers of its two events, the proposal and the result, in the order of all of them. A search that
    # continues repeats them to bring Optuna to the same state.
    asked: int = 0
    told: int | None = None
    error: str = ""
    epochs: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        self.since = time.monotonic()  # the last epoch, or the start of this process's part

    @classmethod
    def read(cls, path: Path) -> "Trial":
        return cls(path, **json.loads(path.read_text(encoding="utf-8")))

    def save(self) -> None:
        write_json(self.path, {k: v for k, v in dataclasses.asdict(self).items() if k != "path"})

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def best(self) -> dict[str, Any]:
        return max(self.epochs, key=lambda epoch: epoch["objective"])

    @property
    def objective(self) -> float:
        """The best so far, since a run keeps its best model."""
        return self.best["objective"] if self.epochs and not self.error else WORST

    @property
    def seconds(self) -> float:
        return sum(epoch["seconds"] for epoch in self.epochs)

    @property
    def state(self) -> str:
        return self.error or ("unfinished" if self.told is None else "")

    def add_epoch(self, metrics: dict[str, Any]) -> None:
        seconds, self.since = time.monotonic() - self.since, time.monotonic()
        self.epochs.append(metrics | {"seconds": seconds})
        self.save()


def read_trials(directory: Path, kind: str = "trials") -> list[Trial]:
    """Return the trials of a search, or with `confirmation` the runs with other seeds."""
    paths = sorted((directory / kind).glob("*.json"))
    try:
        return sorted(map(Trial.read, paths), key=lambda trial: trial.asked)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{directory / kind}: damaged ({one_line(error)})") from error


def ranked(trials: list[Trial]) -> list[Trial]:
    """Return the trials that have not failed, from the best one on."""
    good = [trial for trial in trials if trial.epochs and not trial.error]
    return sorted(good, key=lambda trial: -trial.objective)


class SavedSearch(NamedTuple):
    """The content of search.json."""

    options: argparse.Namespace
    logs: Path


def read_search(directory: Path) -> SavedSearch:
    path = directory / "search.json"
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        # A search of an older version lacks the flags that are new since then.
        values = vars(build_parser().parse_args([])) | saved["options"]
        values |= {"tasks": tasks_of_rows(values["tasks"]), "hpo_space": dict(values["hpo_space"])}
        return SavedSearch(argparse.Namespace(**values), Path(saved["logs"]).absolute())
    except OSError as error:
        raise UserError(
            f"{directory}: not the folder of a search ({error.strerror}); give a models/SEARCH"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged ({one_line(error)}); start a new search") from error


def write_json(path: Path, content: dict[str, Any] | list[dict[str, Any]]) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def show(directory: Path) -> Trial | None:
    """Print the tables of a search. Return the winner so far: the best mean of the confirmation, or the
    best trial if there is none."""
    trials, runs = read_trials(directory), read_trials(directory, "confirmation")
    best = {trial.name: trial for trial in ranked(trials)}
    picked = winner = next(iter(best.values()), None)
    searched = read_search(directory).options.hpo_space
    by_trial: dict[str, list[Trial]] = {run.name.partition("-")[0]: [] for run in runs}
    for run in runs:
        by_trial[run.name.partition("-")[0]].append(run)
    means = {
        name: statistics.mean(run.objective for run in group)
        for name, group in by_trial.items()
        if not any(run.state for run in group)
    }
    if runs:
        winner = best[max(means, key=means.__getitem__)] if means else None
    print_table([trial_row(trial, searched, trial is picked) for trial in trials])
    rows = [confirmed_row(best[name], own, best[name] is winner) for name, own in by_trial.items()]
    print_table(rows)
    return winner


def trial_row(trial: Trial, searched: Iterable[str], is_best: bool) -> dict[str, Any]:
    row = {"trial": trial.name} | {flag: trial.flags.get(flag, "") for flag in searched}
    row |= {"epochs": len(trial.epochs), "seconds": round(trial.seconds)}
    best = trial.best if trial.epochs else {}
    row |= {"best epoch": best.get("epoch", "")}
    row |= {name: f"{best[name]:.4f}" if best else "" for name in ("objective", "dev", "gap")}
    return row | {"": "the best" if is_best else trial.state}


def confirmed_row(trial: Trial, runs: list[Trial], is_best: bool) -> dict[str, Any]:
    """Return the row of a trial that was trained with other seeds."""
    scores = [run.objective for run in runs if not run.state]
    states = [f"seed {run.seed}: {run.state}" for run in runs if run.state]
    return {
        "trial": trial.name,
        "in the search": f"{trial.objective:.4f}",
        "with other seeds": ", ".join(f"{score:.4f}" for score in scores),
        "mean": f"{statistics.mean(scores):.4f}" if scores else "",
        "std": f"{statistics.stdev(scores):.4f}" if len(scores) > 1 else "",
        "": "; ".join(["the best mean"] * is_best + states),
    }


def print_table(rows: list[dict[str, Any]]) -> None:
    for cells in (
        [list(rows[0]), ["---"] * len(rows[0]), *(row.values() for row in rows)] if rows else []
    ):
        texts = [f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in cells]
        print("| " + " | ".join(texts) + " |")
    print()


def flags_for_config(options: argparse.Namespace) -> dict[str, Any]:
    """Return the flags that give these options, but none of outputs and of the search itself."""
    free = {"spacy_model": options.spacy_model, "task_file": options.task_file}
    wanted = deciding(vars(options)) | free
    own = ["--task_file", options.task_file] if options.task_file else []
    defaults = vars(parse_options(["--data_dir", options.data_dir, *own])) | {"data_dir": "data"}
    defaults |= {"task_file": None, "tasks": list(defaults["tasks"])}
    wanted["tasks"] = list(options.tasks)
    if any(getattr(options, name) for name in TASKS):
        del wanted["tasks"]  # the flags of single tasks say it
    return {
        name: value
        for name, value in wanted.items()
        # Files of tasks that are left out are None.
        if value is not None and (name in DEPENDENT or value != defaults[name])
    }


def figures(study: Any, trials: list[Trial]) -> dict[str, Any]:
    """Draw a search with matplotlib: name -> figure."""
    import matplotlib

    matplotlib.use("agg")
    import optuna.visualization.matplotlib as drawn
    from matplotlib import pyplot

    with warnings.catch_warnings(action="ignore"):  # axes of a flag that has one value only
        axes: dict[str, Any] = {
            "parallel": drawn.plot_parallel_coordinate(study),
            "importance": drawn.plot_param_importances(study),
            "history": drawn.plot_optimization_history(study),
            "seconds": pyplot.subplots()[1],
        }
    parallel = axes["parallel"].figure
    parallel.set_size_inches(max(7, len(parallel.axes)), 5)  # an inch for the labels of each flag
    axes["seconds"].scatter([t.seconds for t in trials], [t.objective for t in trials])
    axes["seconds"].set(xlabel="seconds of the trial", ylabel="Objective Value")
    pyplot.close("all")
    return {name: axis.figure for name, axis in axes.items()}
