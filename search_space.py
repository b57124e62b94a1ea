"""The space of a search: the flags that it tries and their values, from a TOML file."""

import argparse
import math
import tomllib
import warnings
from collections.abc import Mapping
from pathlib import Path
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
from tasks import TASKS
from utils import ROOT, UserError, did_you_mean, one_line

optuna.logging.set_verbosity(optuna.logging.WARNING)
warnings.filterwarnings("ignore", category=ExperimentalWarning)  # all of its pictures are
DEFAULT_SPACE = ROOT / "recipes" / "spaces" / "default.toml"
KINDS = ("log", "uniform", "int", "choice")
# Trials share data and encoder, and are compared: these flags are the same for all.
SHARED = {"seed", "epochs", "select", "smoketest", "use_gpu", "tasks", *TASKS, "data_dir"}
SHARED |= {"dev_rows", "max_length", "bert_model", "init_from", "moe", "additional_input"}
CHECKED_DRAWS = 100  # random trials whose flags are checked before a search


class Space:
    """The flags that a search tries. Those of a trial are drawn one after the other, in the order of
    the file, so that a flag can depend on earlier ones."""

    def __init__(self, options: argparse.Namespace, source: str = "--hpo_space"):
        self.options, self.rows, self.source = options, options.hpo_space, source
        self.parser = build_parser(options.tasks, exit_on_error=False)

    def draw(self, trial: optuna.Trial) -> dict[str, Any]:
        """Let Optuna propose the flags of a trial, without those that are not in force."""
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
        values = vars(self.parser.parse_args(flag_arguments(table, self.parser, self.source)))
        options = refilled(self.options, **{flag: values[flag] for flag in table})
        if found := problems(options, list(options.tasks.values())):
            raise UserError(f"{self.source}: {found[0]}; say `when`, or leave a flag out")
        return options

    def _table(self, flags: Mapping[str, Any]) -> dict[str, Any]:
        """Return the flags with one table for all values by task of a flag."""
        table: dict[str, Any] = {}
        for name, value in flags.items():
            flag, _, task = name.partition(".")
            by_task = table.get(flag, getattr(self.options, flag))
            table[flag] = {**by_task, task: value} if task else value
        return table


def propose(trial: optuna.Trial, name: str, row: Mapping[str, Any], default: Any) -> Any:
    if "choice" in row:
        return trial.suggest_categorical(name, row["choice"])
    (kind,) = set(row) & set(KINDS)
    low, high = (default * value if row.get("of_default") else value for value in row[kind])
    if kind == "int":
        return trial.suggest_int(name, low, high)
    return trial.suggest_float(name, low, high, log=kind == "log")


def value_of(options: argparse.Namespace, name: str) -> Any:
    """Return the value of `flag` or `flag.task`."""
    flag, _, task = name.partition(".")
    return getattr(options, flag)[task] if task else getattr(options, flag)


def search_options(argv: list[str]) -> argparse.Namespace:
    """Parse the flags of a search. `hpo_space` is then what the file has of each flag; flags that are
    given are not searched. Raises UserError for a file that cannot be used."""
    argv = ["--hpo", *argv]
    options = parse_options(argv)
    if config := named_files(argv).config:
        argv = config_arguments(config) + argv
    path, given = Path(options.hpo_space or DEFAULT_SPACE), given_flags(argv)
    rows = {
        name: row
        for name, row in read_space(path, options).items()
        if name.partition(".")[0] not in given
    }
    for name, row in list(rows.items()):
        conditions = row.get("when", {}).items()
        if not all(f in rows or value_of(options, f) in values for f, values in conditions):
            del rows[name]
    if not rows:
        raise UserError("--hpo: every flag that could be searched is given")
    space = Space(changed_options(options, hpo_space=rows), str(path))
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(CHECKED_DRAWS):
        space.options_of(space.draw(study.ask()))
    return space.options


def read_space(path: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Read a file and check each flag by itself: flag -> table. Raises UserError."""
    try:
        rows = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--hpo_space {path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"--hpo_space {path}: not TOML ({one_line(error)})") from error
    for place, (name, row) in enumerate(rows.items()):
        try:
            check_row(name, row, options)
            if later := set(row.get("when", {})) & set(list(rows)[place:]):
                raise ValueError(f"when: {min(later)} must be above it in the file")
        except (ValueError, UserError) as error:
            raise UserError(f"--hpo_space {path}: {name}: {one_line(error)}") from error
    return rows


def check_row(name: str, row: Any, options: argparse.Namespace) -> None:
    """Raise ValueError or UserError for what a flag cannot have in a space."""
    if not isinstance(row, dict) or not isinstance(row.get("when", {}), dict):
        raise ValueError("must be a table, such as { uniform = [0, 0.3] }")
    known = [*KINDS, "of_default", "when"]
    if unknown := [key for key in row if key not in known]:
        raise ValueError(f"there is no key {unknown[0]!r}{did_you_mean(unknown[0], known)}")
    kinds = [key for key in row if key in KINDS]
    if len(kinds) != 1:
        raise ValueError(f"needs one of {', '.join(KINDS)}")
    check_flag(name, options)
    if (flag := name.partition(".")[0]) in SHARED or isinstance(getattr(options, flag), list):
        raise ValueError("all trials have the same value")
    for other, values in row.get("when", {}).items():
        check_values(other, values, options)
        options = refilled(options, **{other: values[0]})
    values, default = row[kinds[0]], value_of(options, name) if row.get("of_default") else 1
    if kinds[0] != "choice":
        values = checked_bounds(kinds[0], values, default)
    elif row.get("of_default"):
        raise ValueError("of_default is for log, uniform and int")
    check_values(name, values, options)


def checked_bounds(kind: str, values: Any, default: Any) -> list[float]:
    """Return the bounds and, for a flag that takes whole numbers only, a value between them."""
    numbers = isinstance(values, list) and [v for v in values if type(v) in (int, float)] == values
    if not numbers or len(values) != 2 or not values[0] < values[1] < math.inf:
        raise ValueError(f"{kind}: needs two numbers, [low, high], low below high")
    if kind == "int" and not all(isinstance(value, int) for value in [*values, default]):
        raise ValueError("int: needs whole numbers")
    if kind == "log" and values[0] <= 0:
        raise ValueError("log: low must be above 0")
    if not isinstance(default, int | float) or not default:
        raise ValueError("of_default: its default is no number above 0")
    low, high = (default * value for value in values)
    return [low, high] + [low + (high - low) / 7] * (kind != "int")


def check_flag(name: str, options: argparse.Namespace) -> None:
    """Raise ValueError if no flag that decides the numbers of a run has this name."""
    flag, _, task = name.partition(".")
    known = build_parser(options.tasks).deciding
    if flag not in known:
        raise ValueError(f"no flag that decides the numbers of a run{did_you_mean(flag, known)}")
    by_task = isinstance(getattr(options, flag), dict) and flag != "tasks"
    if by_task and task not in options.tasks:
        raise ValueError(f"needs a task that is trained, as in {flag}.{next(iter(options.tasks))}")
    if task and not by_task:
        raise ValueError(f"--{flag} has no values by task")


def check_values(name: str, values: Any, options: argparse.Namespace) -> None:
    """Raise ValueError or UserError for a value that a flag refuses."""
    check_flag(name, options)
    flag, _, task = name.partition(".")
    if not isinstance(values, list) or not values:
        raise ValueError(f"the values of {name} must be a list")
    parser = build_parser(options.tasks, exit_on_error=False)
    for value in values:
        if not isinstance(value, bool | int | float | str):
            raise ValueError(f"{value!r:.40}: must be a text, a number, true or false")
        flag_arguments({flag: {task: value} if task else value}, parser, "refused")
