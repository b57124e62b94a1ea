"""The results of a search: the files of its trials, and the tables and pictures made from them."""

import argparse
import dataclasses
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from flags import build_parser
from options import deciding, parse_options
from run_log import RunLog
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
    trials = [Trial.read(path) for path in (directory / kind).glob("*.json")]
    return sorted(trials, key=lambda trial: (trial.asked, trial.name))


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
        values["tasks"] = tasks_of_rows(values["tasks"])
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


# ----------------------------------------------------------------------------------------- tables


def show(directory: Path) -> Trial | None:
    """Print the tables of a search. Return the winner so far: the best mean of the confirmation, or the
    best trial if there is none."""
    trials, runs = read_trials(directory), read_trials(directory, "confirmation")
    best = {trial.name: trial for trial in ranked(trials)}
    winner = next(iter(best.values()), None)
    print_trials(list(read_search(directory).options.hpo_space), trials, winner)
    by_trial: dict[str, list[Trial]] = defaultdict(list)
    for run in runs:
        by_trial[run.name.partition("-")[0]].append(run)
    means = {
        name: statistics.mean(run.objective for run in group)
        for name, group in by_trial.items()
        if all(run.told is not None and not run.error for run in group)
    }
    if winner and runs:
        picked, winner = winner, best[max(means, key=means.__getitem__)] if means else None
        print_confirmation(by_trial, best, picked, winner)
    return winner


def print_trials(searched: list[str], trials: list[Trial], best: Trial | None) -> None:
    """Print a row for each trial."""
    columns = ["trial", *searched, "epochs", "seconds", "best epoch", "objective", "dev", "gap", ""]
    rows = []
    for trial in trials:
        cells = [short(trial.flags.get(flag, "")) for flag in searched]
        cells += [str(len(trial.epochs)), f"{trial.seconds:.0f}"]
        scores = [""] * 4
        if trial.epochs:
            scores = [f"{trial.best[name]:.4f}" for name in ("objective", "dev", "gap")]
            scores.insert(0, str(trial.best["epoch"]))
        rows.append([trial.name, *cells, *scores, "the best" if trial is best else trial.state])
    print_table(columns, rows)


def print_confirmation(
    by_trial: Mapping[str, list[Trial]],
    best: Mapping[str, Trial],
    picked: Trial,
    winner: Trial | None,
) -> None:
    """Print a row for each trial that was trained with other seeds."""
    rows = []
    for name, runs in by_trial.items():
        over = [run.objective for run in runs if run.told is not None and not run.error]
        mean = f"{statistics.mean(over):.4f}" if over else ""
        spread = f"{statistics.stdev(over):.4f}" if len(over) > 1 else ""
        remarks = ["the best mean"] * (winner is best[name])
        remarks += ["the best single trial"] * (picked is best[name])
        remarks += [f"seed {run.seed}: {run.state}" for run in runs if run.state]
        values = ", ".join(f"{value:.4f}" for value in over)
        rows.append([name, f"{best[name].objective:.4f}", values, mean, spread, "; ".join(remarks)])
    print_table(["trial", "in the search", "with other seeds", "mean", "std", ""], rows)


def print_table(columns: list[str], rows: list[list[str]]) -> None:
    print()
    for row in [columns, ["---"] * len(columns), *rows]:
        print("| " + " | ".join(row) + " |")
    print()


def short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


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
    return {name: value for name, value in wanted.items() if value != defaults[name]}


# --------------------------------------------------------------------------------------- pictures


def plot(directory: Path) -> list[Path]:
    """Draw the trials of a search, into its folder and its TensorBoard log. Return the files. Raises
    UserError if fewer than two trials have a score."""
    saved, trials = read_search(directory), ranked(read_trials(directory))
    if len(trials) < 2:
        raise UserError(f"{directory}: pictures need two trials with a score, it has {len(trials)}")
    log, paths = RunLog(saved.logs / "pictures"), []
    for name, figure in figures(trials, saved.options.hpo_space).items():
        paths.append(directory / f"{name}.png")
        figure.savefig(paths[-1], dpi=120, bbox_inches="tight")
        log.writer.add_figure(f"search/{name}", figure)
    log.close()
    print(f"pictures: {', '.join(map(str, paths))}")
    return paths


def figures(trials: list[Trial], space: Mapping[str, Any]) -> dict[str, Any]:
    """Return matplotlib figures: name -> figure."""
    import matplotlib

    matplotlib.use("agg")
    import optuna.visualization.matplotlib as drawn
    from matplotlib import pyplot

    study = as_study(trials, space)
    axes = {
        "parallel": drawn.plot_parallel_coordinate(study),
        "importance": drawn.plot_param_importances(study),
        "history": drawn.plot_optimization_history(study),
        "seconds": pyplot.subplots()[1],
    }
    axes["seconds"].scatter(
        [trial.seconds for trial in trials], [trial.objective for trial in trials]
    )
    axes["seconds"].set(xlabel="seconds of training", ylabel="objective", title="Score and cost")
    pyplot.close("all")
    return {name: axis.figure for name, axis in axes.items()}


def as_study(trials: list[Trial], space: Mapping[str, Any]) -> Any:
    """Return trials as an Optuna study."""
    import optuna
    from optuna.distributions import (
        BaseDistribution,
        CategoricalDistribution,
        FloatDistribution,
        IntDistribution,
    )

    # Bounds that are multiples of a default can differ between trials; a study has one distribution
    # for a flag.
    distributions: dict[str, BaseDistribution] = {}
    for name, row in space.items():
        values = [trial.flags[name] for trial in trials if name in trial.flags]
        if "choice" in row:
            distributions[name] = CategoricalDistribution(row["choice"])
        elif values:
            kind = IntDistribution if "int" in row else FloatDistribution
            distributions[name] = kind(min(values), max(values), log="log" in row)
    study = optuna.create_study(direction="maximize")
    for trial in sorted(trials, key=lambda trial: trial.asked):
        own = {name: distributions[name] for name in trial.flags}
        value = trial.objective
        frozen = optuna.trial.create_trial(params=trial.flags, distributions=own, value=value)
        study.add_trial(frozen)
    return study
