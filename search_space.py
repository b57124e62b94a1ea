"""The space of a search: the flags that it tries and their values, from a TOML file."""

import argparse
import tomllib
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
from optuna.exceptions import ExperimentalWarning

from flags import build_parser
from options import (
    changed_options,
    config_arguments,
    flag_arguments,
    given_flags,
    named_files,
    parse_options,
    problems,
    refilled,
)
from search_results import read_search
from tasks import TASKS
from utils import ROOT, UserError, did_you_mean, one_line

optuna.logging.set_verbosity(optuna.logging.WARNING)
warnings.filterwarnings("ignore", category=ExperimentalWarning)  # all of its pictures are
DEFAULT_SPACE = ROOT / "recipes" / "spaces" / "default.toml"
KINDS = ("log", "uniform", "int", "choice")
# Trials share data and encoder, and are compared: these flags are the same for all.
SHARED = {"seed", "epochs", "select", "smoketest", "use_gpu", "tasks", *TASKS, "data_dir"}
SHARED |= {
    "samples_per_epoch",
    "dev_rows",
    "max_length",
    "bert_model",
    "init_from",
    "moe",
    "additional_input",
}
CHECKED_DRAWS = 100  # random trials whose flags are checked before a search


class Space:
    """The flags that a search tries. Those of a trial are drawn one after the other, in the order of
    the file, so that a flag can depend on earlier ones."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.rows = options, options.hpo_space
        self.parser = build_parser(options.tasks, exit_on_error=False)

    def draw(self, trial: Any) -> dict[str, Any]:
        """Let an Optuna trial propose flags, without those that are not in force."""
        flags: dict[str, Any] = {}
        for name, row in self.rows.items():
            options = refilled(self.options, **self._table(flags))
            conditions = row.get("when", {}).items()
            if all(value_of(options, flag) in values for flag, values in conditions):
                flags[name] = propose(trial, name, row, value_of(options, name))
        return flags

    def options_of(self, flags: Mapping[str, Any]) -> argparse.Namespace:
        """Return the options of a trial. Raises UserError for flags that do not fit together."""
        table = self._table(flags)
        values = vars(self.parser.parse_args(flag_arguments(table, self.parser, "refused")))
        options = refilled(self.options, **{flag: values[flag] for flag in table})
        if found := problems(options, list(options.tasks.values())):
            raise UserError(f"{found[0]}; say `when`, or leave a flag out")
        return options

    def _table(self, flags: Mapping[str, Any]) -> dict[str, Any]:
        """Return the flags with one table for all values by task of a flag."""
        table: dict[str, Any] = {}
        for name, value in flags.items():
            flag, _, task = name.partition(".")
            known = table.get(flag, getattr(self.options, flag))
            table[flag] = {**known, task: value} if task else value
        return table


def propose(trial: Any, name: str, row: Mapping[str, Any], default: Any) -> Any:
    """Let an Optuna trial propose a value. Raises UserError for a row that cannot be."""
    (kind,) = set(row) & set(KINDS)
    try:
        values = row[kind]
        if row.get("of_default"):
            values = [default * value for value in values]
            values = [*map(round, values)] if kind == "int" else values
        if kind == "choice":
            return trial.suggest_categorical(name, values)
        low, high = values
        if kind == "int":
            return trial.suggest_int(name, low, high)
        return trial.suggest_float(name, low, high, log=kind == "log")
    except (ValueError, TypeError, IndexError, OverflowError) as error:
        raise UserError(f"{name}: {kind} = {row[kind]} cannot be: {one_line(error)}") from error


def value_of(options: argparse.Namespace, name: str) -> Any:
    """Return the value of `flag` or `flag.task`."""
    flag, _, task = name.partition(".")
    return getattr(options, flag)[task] if task else getattr(options, flag)


# Trials that propose the lower ends of all intervals, and the upper ends.
LOWEST, HIGHEST = (
    SimpleNamespace(
        suggest_categorical=lambda name, values, end=end: values[end],
        suggest_int=lambda name, *bounds, end=end: bounds[end],
        suggest_float=lambda name, *bounds, log, end=end: bounds[end],
    )
    for end in (0, -1)
)


def search_options(argv: list[str]) -> argparse.Namespace:
    """Parse the flags of a search. `hpo_space` is then what the file has of each flag. Those that are
    left open are as in the search whose folder `--hpo_resume` names. Raises UserError for a file that
    cannot be used."""
    argv = ["--hpo", *argv]
    files = named_files(argv)
    continued = files.hpo_resume not in (None, "auto")
    saved = read_search(Path(files.hpo_resume)).options if continued else None
    options = parse_options(argv, tasks=saved.tasks if saved else None)
    if files.config:
        argv = config_arguments(files.config, options.tasks) + argv
    given = given_flags(argv, TASKS | options.tasks)
    if saved is None or "hpo_space" in given:
        options = with_space(options, given)
    if saved is None:
        return options
    return changed_options(saved, **{name: getattr(options, name) for name in given})


def with_space(options: argparse.Namespace, given: Collection[str]) -> argparse.Namespace:
    """Return the options with the content of the file `hpo_space` in its place. A flag that is given is
    not searched."""
    path, rows = Path(options.hpo_space or DEFAULT_SPACE), {}
    for name, row in read_space(path, options, given).items():
        conditions = row.get("when", {}).items()
        if all(f in rows or value_of(options, f) in values for f, values in conditions):
            rows[name] = row
    if not rows:
        raise UserError("--hpo: every flag that could be searched is given")
    space = Space(changed_options(options, hpo_space=rows))
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    drawn: set[str] = set()
    try:
        for trial in [LOWEST, HIGHEST] + [study.ask() for _ in range(CHECKED_DRAWS)]:
            flags = space.draw(trial)
            drawn.update(flags)
            space.options_of(flags)
        if never := [name for name in rows if name not in drawn]:
            raise UserError(f"{never[0]}: {CHECKED_DRAWS} random trials never met its `when`")
    except UserError as error:
        raise UserError(f"--hpo_space {path}: {error}") from error
    return space.options


def read_space(path: Path, options: argparse.Namespace, given: Collection[str]) -> dict[str, Any]:
    """Read a file: flag -> its row, without the flags that are given. Raises UserError for flags and
    keys that cannot be."""
    try:
        rows = tomllib.loads(path.read_text(encoding="utf-8"))
        searched = [name for name in rows if name.partition(".")[0] not in given]
        for place, name in enumerate(searched):
            check_row(name, rows[name], options, searched[place:])
    except OSError as error:
        raise UserError(f"--hpo_space {path}: cannot be read: {error.strerror}") from error
    except (ValueError, TypeError, UserError) as error:
        raise UserError(f"--hpo_space {path}: {one_line(error)}") from error
    return {name: rows[name] for name in searched}


def check_row(name: str, row: Any, options: argparse.Namespace, later: list[str]) -> None:
    """Raise ValueError or UserError for a name or a key that cannot be."""
    parser = build_parser(options.tasks, exit_on_error=False)
    flag, _, task = name.partition(".")
    shared = {flag for flag in parser.deciding if isinstance(getattr(options, flag), list)} | SHARED
    if flag in parser.deciding & shared:
        raise ValueError(f"{name}: all trials must have the same value")
    if flag not in parser.deciding:
        hint = did_you_mean(flag, sorted(parser.deciding - shared))
        raise ValueError(f"{name}: no flag that can be searched{hint}")
    value = getattr(options, flag)
    if not isinstance(value, dict) and task:
        raise ValueError(f"{name}: this flag has one value for all tasks; write {flag}")
    if isinstance(value, dict) and task not in value:
        form = f'"{flag}.{next(iter(value))}" = {{ ... }}, with the quotes'
        hint = f"there is no task {task!r}" if task else "this flag has a value for each task"
        raise ValueError(f"{name}: {hint}; write {form}")
    known = [*KINDS, "of_default", "when"]
    if not isinstance(row, dict) or len(set(row) & set(KINDS)) != 1:
        raise ValueError(f"{name}: needs one of {', '.join(KINDS)}, as in {{ log = [0.1, 10] }}")
    if unknown := [key for key in row if key not in known]:
        raise ValueError(f"{name}: no key {unknown[0]!r}{did_you_mean(unknown[0], known)}")
    if any(isinstance(value, list | dict) for value in row.get("choice", [])):
        raise ValueError(f'{name}: a choice is a number, true, false or a text such as "0.9,0.99"')
    for other, values in dict(row.get("when", {})).items():
        if other in later:
            raise ValueError(f"{name}: {other} must be above it in the file")
        if not isinstance(values, list):
            raise ValueError(f"{name}: when {other} is in a list, as in [{values!r}]")
        flag, _, task = other.partition(".")
        for one in values:
            flag_arguments({flag: {task: one} if task else one}, parser, f"{name}: when")
