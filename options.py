"""The options that flags become: parsed, checked, filled with the defaults that depend on each other."""

import argparse
import dataclasses
import functools
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flags import (
    DEFAULT_BERT_MODEL,
    DEFAULT_MOE_BALANCE,
    DEFAULT_SPACY_MODEL,
    OPTIMIZER_FLAGS,
    OWNERS,
    SMOKETEST,
    OptionParser,
    build_parser,
)
from optimizer import OPTIMIZERS, STEP_SCHEDULES, WEIGHT_DECAY
from tasks import SPLITS, TASKS, Task, read_task_file
from utils import UserError, one_line

# Flags whose defaults follow from other flags.
DEPENDENT = ("lr", "betas", "weight_decay", "moe_balance", *OPTIMIZER_FLAGS)


def parse_options(
    argv: list[str],
    defaults: Mapping[str, Any] | None = None,
    tasks: Mapping[str, Task] | None = None,
) -> argparse.Namespace:
    """Parse the flags, refuse what cannot work, and fill in the defaults that depend on other flags.

    `defaults` replace those of the flags, `tasks` (of a checkpoint) those of `--task_file`. The options
    are not changed after this.
    """
    if config := named_files(argv).config:
        argv = config_arguments(config, tasks) + argv
    if file := named_files(argv).task_file:
        tasks = dict(tasks or {}) | read_task_file(file)
    known = TASKS | dict(tasks or {})
    parser = build_parser(known)
    options = parser.parse_args(argv)
    parser.set_defaults(**(SMOKETEST if options.smoketest else {}) | dict(defaults or {}))
    options = parser.parse_args(argv)
    single = [name for name in TASKS if getattr(options, name)]
    chosen = [known[name] for name in single or options.tasks or tasks or TASKS]
    if found := problems(options, chosen):
        parser.error("; ".join(found))
    return fill_defaults(options, chosen)


def default_options(data_dir: str, tasks: Mapping[str, Task]) -> argparse.Namespace:
    """Return the options of these tasks without any other flag."""
    options = build_parser(TASKS | dict(tasks)).parse_args(["--data_dir", data_dir])
    return fill_defaults(options, list(tasks.values()))


def named_files(argv: list[str]) -> argparse.Namespace:
    """Return the files in the flags that decide which other flags there are, and the data folder."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("--config", "--task_file", "--resume", "--hpo_resume", "--data_dir"):
        parser.add_argument(name, nargs="?")
    parser.add_argument("--evaluate", nargs="*")
    return parser.parse_known_args(argv)[0]


def problems(options: argparse.Namespace, tasks: Sequence[Task]) -> list[str]:
    """Return why these options cannot work together; nothing if they can."""
    empty = [f"--{name}" for name, value in vars(options).items() if value == ""]
    pretrain = options.option == "pretrain"
    checks = {
        f"{', '.join(empty)} must not be empty": empty,
        "--resume continues training, --evaluate does not train": (
            options.resume and options.evaluate
        ),
        "--task_file: a checkpoint has its own tasks, leave it out with --evaluate": (
            options.task_file and options.evaluate
        ),
        "--init_from brings its encoder, leave --bert_model out": (
            options.init_from and options.bert_model not in (None, options.init_from)
        ),
        "--hpo_resume: only with --hpo": options.hpo_resume and not options.hpo,
        "--hpo is neither --resume (but --hpo_resume) nor --evaluate": (
            options.hpo and (options.resume or options.evaluate)
        ),
        "--hpo_gpus: only with --use_gpu": options.hpo_gpus and not options.use_gpu,
        "--unfreeze_interval trains the encoder, --option pretrain does not": (
            options.unfreeze_interval and pretrain
        ),
        "--additional_input adds to the encoder, which --option pretrain does not train": (
            options.additional_input and pretrain
        ),
        "--moe has a gate to train, --option pretrain trains the heads only": (
            options.moe and pretrain
        ),
        "--gradient_surgery: only with --optimizer adamw and without --moe": (
            options.gradient_surgery and (options.optimizer != "adamw" or options.moe)
        ),
        "--loss_weights learned: SophiaG draws labels, which say nothing of the weights' curvature; "
        "take adamw or sophiah": options.loss_weights == "learned"
        and options.optimizer == "sophiag",
        "--moe_balance: only with --moe": options.moe_balance is not None and not options.moe,
        f"--warmup: only with --scheduler {' or '.join(STEP_SCHEDULES)}": (
            options.warmup and options.scheduler not in STEP_SCHEDULES
        ),
        "--spacy_model: only for --additional_input": (
            options.spacy_model and not (options.additional_input or options.evaluate)
        ),
    }
    for flag, owners in OWNERS.items():
        given = getattr(options, flag) is not None
        only = f"--{flag}: only for --optimizer {' and '.join(owners)}"
        checks[only] = given and options.optimizer not in owners
    checks |= task_problems(options, tasks)
    return [problem for problem, is_there in checks.items() if is_there]


def task_problems(options: argparse.Namespace, tasks: Sequence[Task]) -> dict[str, Any]:
    """Return what can be wrong with the tasks, and whether it is."""
    ordered = [task.name for task in tasks if task.is_pair and task.symmetric]
    encodings = {getattr(options, f"{name}_encoding") for name in ordered}
    flags = " or ".join(f"--{name}_encoding" for name in ordered) or "--NAME_encoding"
    with_dev = [task for task in tasks if task.dev or getattr(options, f"{task.name}_dev")]
    twice = isinstance(options.tasks, list) and any(getattr(options, name) for name in TASKS)
    return {
        f"--both_orders: only with {flags} cross or both": options.both_orders
        and encodings <= {"bi"},
        "give --tasks or the flags of single tasks, not both": twice,
        "--gradient_surgery: needs two tasks or more": options.gradient_surgery and len(tasks) < 2,
        "no task has a dev file, so no epoch can be chosen": not with_dev,
        f"--select {options.select}: this task is not trained, or has no dev file": (
            options.select and options.select not in [task.name for task in with_dev]
        ),
    }


def fill_defaults(options: argparse.Namespace, tasks: Sequence[Task]) -> argparse.Namespace:
    """Return the options with the defaults that depend on other flags, and with `tasks` a mapping from
    names to tasks."""
    filled = argparse.Namespace(**vars(options))
    filled.left_open = [name for name in DEPENDENT if getattr(options, name) is None]
    if filled.bert_model is None:
        filled.bert_model = filled.init_from or DEFAULT_BERT_MODEL
    row = OPTIMIZERS[options.optimizer]
    if filled.lr is None:
        filled.lr = row.pretrain_lr if options.option == "pretrain" else row.lr
    for name, own in row.flags.items():
        if getattr(filled, name) is None:
            setattr(filled, name, own.default)
    filled.betas = tuple(filled.betas or row.betas)
    if filled.weight_decay is None:
        filled.weight_decay = WEIGHT_DECAY * (filled.rho or 1)
    if filled.moe and filled.moe_balance is None:
        filled.moe_balance = DEFAULT_MOE_BALANCE
    # A checkpoint knows its own pipeline.
    if filled.additional_input and not filled.evaluate and filled.spacy_model is None:
        filled.spacy_model = DEFAULT_SPACY_MODEL
    filled.tasks = {}
    for task in tasks:
        name = task.name
        for split in SPLITS:
            key = f"{name}_{split}"
            if getattr(filled, key) is None:
                files = [find_data(filled.data_dir, file) for file in getattr(task, split)]
                setattr(filled, key, files)
        filled.tasks[name] = dataclasses.replace(
            task,
            encoding=getattr(filled, f"{name}_encoding", "bi"),
            loss_name=getattr(filled, f"{name}_loss", "cross_entropy"),
        )
    for by_task in ("loss_weights", "rdrop", "batch_shares"):
        if (values := getattr(filled, by_task)) != "learned":
            setattr(filled, by_task, {name: values[name] for name in filled.tasks})
    return filled


def find_data(data_dir: str, file: str) -> str:
    """Return the path of a file that a task names: in `data_dir`, or as it is if only that is there."""
    path = os.path.join(data_dir, file)
    return file if os.path.exists(file) and not os.path.exists(path) else path


def changed_options(options: argparse.Namespace, **changes: Any) -> argparse.Namespace:
    """Return a copy of the options with some values changed."""
    return argparse.Namespace(**vars(options) | changes)


def refilled(options: argparse.Namespace, **changes: Any) -> argparse.Namespace:
    """Return filled options with some values changed, and with the defaults that follow from them."""
    changed = changed_options(options, **dict.fromkeys(options.left_open) | changes)
    return fill_defaults(changed, list(options.tasks.values()))


def given_flags(argv: list[str], tasks: Mapping[str, Task] | None = None) -> dict[str, Any]:
    """Return the values of the flags that are given in `argv`, by default with those tasks that it
    names a file of."""
    file = named_files(argv).task_file
    parser = build_parser(tasks or TASKS | (read_task_file(file) if file else {}))
    parser.set_defaults(**dict.fromkeys(vars(parser.parse_args([]))))
    given = vars(parser.parse_args(argv))
    return {name: value for name, value in given.items() if value is not None}


@functools.cache
def names_of_free_options() -> frozenset[str]:
    parser = build_parser()
    names = {action.dest for action in parser._actions} | {"left_open"}
    return frozenset(names - parser.deciding)


def deciding(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that decide the numbers of a run."""
    return {
        name: value
        for name, value in options.items()
        # Flags of tasks from a file are in no parser made without it.
        if name not in names_of_free_options() and not name.endswith("_out")
    }


def read_config(path: str) -> dict[str, Any]:
    """Read a JSON file with a table of flags. Raises UserError for another file."""
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--config {path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"--config {path}: not JSON ({one_line(error)})") from error
    if not isinstance(values, dict):
        raise UserError(f"--config {path}: holds no table of flags")
    return values


def config_arguments(path: str, tasks: Mapping[str, Task] | None = None) -> list[str]:
    """Return the flags of a JSON file, a table of flags, as they would be on a command line.

    The keys "parent" and "after", with which a recipe names the recipe that it changes and the one
    from whose model it goes on, are no flags. Raises UserError if the file is no such table, or if a
    value does not fit its flag.
    """
    config = read_config(path)
    values = {name: value for name, value in config.items() if name not in ("parent", "after")}
    own = read_task_file(values["task_file"]) if isinstance(values.get("task_file"), str) else {}
    parser = build_parser(TASKS | dict(tasks or {}) | own, exit_on_error=False)
    return flag_arguments(values, parser, f"--config {path}")


def flag_arguments(values: Mapping[str, Any], parser: OptionParser, source: str) -> list[str]:
    """Return a table of flags as they would be on a command line. `parser` raises errors; here they are
    UserErrors that name the source of the table."""
    arguments: list[str] = []
    defaults = vars(parser.parse_args([]))
    files = {action.dest for action in parser._actions if action.nargs == "+"}
    for name, value in values.items():
        if name not in defaults or name == "config":
            raise UserError(f"{source}: there is no flag {name!r}")
        if name in files and isinstance(value, list) and all(isinstance(v, str) for v in value):
            arguments += [f"--{name}", *value]
            continue
        if isinstance(value, list):
            value = ",".join(map(str, value))
        if isinstance(value, dict):
            value = ",".join(f"{task}={number}" for task, number in value.items())
        if isinstance(value, bool) != isinstance(defaults[name], bool) or value is None:
            raise UserError(f"{source}: {name} cannot be {json.dumps(value)}")
        if value is not False:
            arguments.append(f"--{name}" if value is True else f"--{name}={value}")
    try:
        parser.parse_args(arguments)
    except argparse.ArgumentError as error:
        raise UserError(f"{source}: {one_line(error)}") from error
    return arguments
