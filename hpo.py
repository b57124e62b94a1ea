"""Search for good hyper-parameters over whole training runs, with Ray Tune and Optuna.

    python hpo.py --hpo_trials 20                              or, which starts the same,
    python multitask_classifier.py --hpo --hpo_trials 20

What is searched stands in SEARCH_SPACE in options.py. Ray Tune runs the trials where there is room,
Optuna proposes their settings, asynchronous successive halving (Li et al. 2020, arXiv 1810.05934)
ends those early that are behind the others after as many epochs.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import signal
import socket
import sys
from pathlib import Path

# Before Ray is imported: it sends nothing about its use, and its loggers are not needed.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # `run` has its own
os.environ.setdefault("RAY_worker_niceness", "0")  # else all other programs come first
if {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & set(os.environ) or (
    Path.home() / ".ray" / "auth_token"
).exists():  # then `ray start` has asked for it, but to join Ray does not think of it by itself
    os.environ.setdefault("RAY_AUTH_MODE", "token")

import numpy as np
import optuna
import ray
import torch
from ray import tune
from ray.tune.schedulers import AsyncHyperBandScheduler
from ray.tune.search.optuna import OptunaSearch

import evaluation
from base_bert import BertConfig
from checkpoint import new_run, read_state
from datasets import TaskDataset
from moe import new_encoder
from multitask_classifier import MultitaskBERT, fit, load_all, model_from_checkpoint
from options import (
    SEARCH_SPACE,
    build_parser,
    changed_options,
    deciding,
    encodings_of,
    parse_options,
)
from run_log import RunLog
from tagging import Pipeline, Tagger
from tokenizer import BertTokenizer
from training import Parts, Training, restored_training
from utils import (
    Terminated,
    UserError,
    atomic_write,
    exit_status,
    is_out_of_memory,
    lock_files,
    one_line,
    pick_device,
    random_states,
    restore_random_states,
    seed_everything,
    terminate,
)

WORST = -1.0  # the objective of a trial that has failed: below all others
RETRIES = 3  # of a trial whose process or node has died
CONNECT_SECONDS = 10
MOST_CORES = 4  # for a trial on CPUs: more gain little with one small model
STILL_RUNNING = "is of a search that is still running"


def search(options: argparse.Namespace) -> Path:
    """Run the trials, or with `--hpo_resume` those that are left; show them in a table.

    Returns:
        where the best trial's flags are, for `--config`.

    Raises:
        UserError: Ray cannot be reached, no node has the cores or GPUs, every trial failed.
        KeyboardInterrupt: the search was interrupted, and says how to go on.
    """
    directory = find_search(options)
    resumed = directory is not None
    if not resumed:
        path, logs = new_run(options, "hpo")
        directory = path.with_suffix("").absolute()
        write_json(directory / "search.json", {"options": vars(options), "logs": str(logs)})
    with lock_files([directory / "search.json"], STILL_RUNNING):
        logs = Path(json.loads((directory / "search.json").read_text())["logs"]).absolute()
        shared = Shared.load(options, directory, logs)
        try:
            trainable = placed(options, shared)
            tuner = (
                restored(directory, trainable) if resumed else new(options, directory, trainable)
            )
            results = run(tuner, directory)
        finally:
            ray.shutdown()
        return finish(options, directory, logs, results)


# -------------------------------------------------------------------------------------- one trial


@dataclasses.dataclass
class Shared:
    """What all trials of a node have in common: loaded once, and kept in Ray's object store, where
    a node's trials read the arrays without a copy."""

    options: argparse.Namespace
    directory: Path  # of the search
    logs: Path  # its TensorBoard folder
    threads: int  # of one trial
    bert_config: BertConfig
    weights: dict[str, np.ndarray]  # of the model before training
    tokenizer: str
    pipeline: Pipeline | None  # of the tags
    data: dict[str, dict[str, TaskDataset]]
    random: dict  # the states of all generators before the first step

    @classmethod
    def load(cls, options: argparse.Namespace, directory: Path, logs: Path) -> "Shared":
        model, tokenizer, tagger, data, _ = load_all(options)
        weights = {name: each.numpy() for name, each in model.state_dict().items()}
        pipeline = tagger and tagger.pipeline
        common = options, directory, logs, 1, model.bert.config, weights
        return cls(*common, tokenizer.to_json(), pipeline, data, random_states())

    def model(self, options: argparse.Namespace) -> MultitaskBERT:
        config = self.bert_config
        if options.hidden_dropout_prob is not None:
            changes = {"hidden_dropout_prob": options.hidden_dropout_prob}
            config = dataclasses.replace(config, **changes)
        with torch.device("meta"):
            model = MultitaskBERT(new_encoder(config, options.moe), encodings_of(vars(options)))
        weights = {name: torch.tensor(each) for name, each in self.weights.items()}
        model.load_state_dict(weights, assign=True)
        return model


def run_trial(config: dict, shared: Shared) -> None:
    """One training run with the flags of `config`, in a process of Ray's. One whose process has
    died goes on from its last epoch."""
    torch.set_num_threads(shared.threads)
    options = changed_options(shared.options, **config)
    history = History(shared.directory / "trials" / tune.get_context().get_trial_id(), options)
    try:
        training = start(options, shared, history.path.with_suffix(".resume"))
        if training.epoch:  # what had been reported may have been lost
            history.report(training)
        fit(training, history.report)
    except (UserError, RuntimeError, MemoryError) as error:
        if not isinstance(error, UserError) and not is_out_of_memory(error):
            raise
        tune.report({"objective": WORST, "epoch": options.epochs, "error": one_line(error)})


def start(options: argparse.Namespace, shared: Shared, path: Path) -> Training:
    """A trial's training, new or where it was interrupted."""
    device = pick_device(options.use_gpu)
    tokenizer = BertTokenizer.from_json(shared.tokenizer)
    tagger = shared.pipeline and Tagger(shared.pipeline)
    if path.exists():
        state = read_state(path)
        model = model_from_checkpoint(state, path).model.to(device)
        parts = Parts(model, tokenizer, tagger, shared.data, options)
        return restored_training(parts, path, state)
    seed_everything(options.seed)  # a GPU, which the search itself has not used
    restore_random_states(shared.random)
    parts = Parts(shared.model(options).to(device), tokenizer, tagger, shared.data, options)
    return Training(parts, path, RunLog(shared.logs / path.stem))


class History:
    """A trial's epochs, on the disk."""

    def __init__(self, path: Path, options: argparse.Namespace):
        self.path, self.options = path.with_suffix(".json"), options
        self.epochs = json.loads(self.path.read_text()) if self.path.exists() else []

    @property
    def best(self) -> dict:
        return max(self.epochs, key=lambda each: each["objective"])

    def report(self, training: Training) -> None:
        """An epoch's metrics; the objective is the best so far, as a run keeps its best model."""
        scores = {"dev": training.scores, "train": training.train_scores}
        epoch = {split: evaluation.mean_score(each) for split, each in scores.items()}
        epoch["gap"] = epoch["train"] - epoch["dev"]
        epoch["objective"] = epoch["dev"]
        if self.options.hpo_objective == "dev_minus_gap":  # to underfit is no merit
            epoch["objective"] -= max(epoch["gap"], 0)
        epoch |= {"epoch": training.epoch, "scores": scores}
        self.epochs = [each for each in self.epochs if each["epoch"] < training.epoch] + [epoch]
        write_json(self.path, self.epochs)
        tune.report(epoch | {"objective": self.best["objective"], "error": ""})


# ------------------------------------------------------------------------------------- the search


def find_search(options: argparse.Namespace) -> Path | None:
    """The folder of the search that `--hpo_resume` means; None for a new search. UserError: there
    is none, or it is one with other options."""
    if options.hpo_resume is None:
        return None
    wanted = comparable(options)
    if options.hpo_resume != "auto":
        directory = Path(options.hpo_resume).absolute()
        other = comparable(read_search(directory))
        if differing := [key for key in wanted if other.get(key) != wanted[key]]:
            raise UserError(
                f"{directory}: this search has other values of --{', --'.join(differing)}"
            )
        return directory
    for file in sorted(Path(options.models_dir).glob("*-hpo-*/search.json"), reverse=True):
        with contextlib.suppress(UserError):
            directory = file.parent.absolute()
            finished = (directory / "best_config.json").exists()
            begun = tune.Tuner.can_restore(str(directory))
            if begun and not finished and comparable(read_search(directory)) == wanted:
                return directory
    print(f"--hpo_resume auto: {options.models_dir} has no such search; this is a new one")
    return None


def read_search(directory: Path) -> argparse.Namespace:
    path = directory / "search.json"
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))["options"]
        return argparse.Namespace(
            **vars(build_parser().parse_args([])) | saved
        )  # older: fewer flags
    except OSError as error:
        raise UserError(f"{directory}: not the folder of a search ({error.strerror})") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged ({one_line(error)})") from error


def comparable(options: argparse.Namespace) -> dict:
    """The options that a search's course depends on, as they come back from JSON."""
    values = vars(options)
    own = {key: values[key] for key in ("hpo_trials", "hpo_objective", "searched")}
    return json.loads(json.dumps(deciding(values) | own))


def placed(options: argparse.Namespace, shared: Shared):
    """Connect to Ray; the trainable with what it needs of a node."""
    host, _, port = (options.ray_address or "").rpartition(":")
    try:
        if port.isdigit():  # Ray itself would ask there for minutes
            socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
        ray.init(
            address=options.ray_address or "local",
            include_dashboard=None if options.ray_address else False,
            log_to_driver=False,
            logging_level="ERROR",
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"--ray_address {options.ray_address}: {one_line(error)}") from error
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = (options.hpo_gpus or 1) if options.use_gpu else 0
    cpus = options.hpo_cpus or default_cores(nodes, gpus)
    if not any(node.get("CPU", 0) >= cpus and node.get("GPU", 0) >= gpus for node in nodes):
        raise UserError(f"--hpo: no node has {cpus} cores and {gpus:g} GPUs for a trial")
    print(f"{len(nodes)} nodes; {cpus} cores and {gpus:g} GPUs for each trial")
    shared.threads = cpus
    trainable = tune.with_parameters(run_trial, shared=shared)
    return tune.with_resources(trainable, {"cpu": cpus, "gpu": gpus})


def default_cores(nodes: list[dict], gpus: float) -> int:
    """Of one trial: with GPUs their share of a node's cores, else up to 4, on the smallest of the
    nodes that can have a trial."""
    shares = [
        node["CPU"] * gpus / node["GPU"] if gpus else min(node["CPU"], MOST_CORES)
        for node in nodes
        if node.get("CPU") and (node.get("GPU") or not gpus)
    ]
    return max(int(min(shares, default=1)), 1)


def new(options: argparse.Namespace, directory: Path, trainable) -> tune.Tuner:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    goal = {"metric": "objective", "mode": "max"}
    space = {name: distribution(name, options) for name in options.searched}
    return tune.Tuner(
        trainable,
        tune_config=tune.TuneConfig(
            **goal,
            num_samples=options.hpo_trials,
            search_alg=OptunaSearch(space, seed=options.seed, **goal),
            scheduler=AsyncHyperBandScheduler(time_attr="epoch", max_t=options.epochs),
        ),
        run_config=tune.RunConfig(
            name=directory.name,
            storage_path=str(directory.parent),
            failure_config=tune.FailureConfig(max_failures=RETRIES),
            callbacks=[Progress(options.hpo_trials, directory)],
            verbose=0,
        ),
    )


def restored(directory: Path, trainable) -> tune.Tuner:
    try:
        return tune.Tuner.restore(str(directory), trainable)
    except Exception as error:  # pickles, JSON, and whatever else Ray keeps there
        raise UserError(f"{directory}: Ray cannot go on with it ({one_line(error)})") from error


def distribution(name: str, options: argparse.Namespace):
    """The row of SEARCH_SPACE as Optuna has it."""
    row = SEARCH_SPACE[name]
    if row.kind == "choice":
        return optuna.distributions.CategoricalDistribution(row.values)
    scale = getattr(options, name) if row.of_default else 1
    low, high = (scale * value for value in row.values)
    return optuna.distributions.FloatDistribution(low, high, log=row.kind == "log")


class Progress(tune.Callback):
    """A line for each epoch of each trial; of those that are over, only the history is kept."""

    def __init__(self, n_trials: int, directory: Path):
        self.n_trials, self.directory = n_trials, directory

    def on_trial_result(self, iteration, trials, trial, result, **_):
        if result.get("error"):
            print(f"trial {trial.trial_id}: failed: {result['error']}", flush=True)
        else:
            text = ", ".join(f"{name} {result[name]:.4f}" for name in ("dev", "train", "gap"))
            print(f"trial {trial.trial_id}, epoch {result['epoch']}: {text}", flush=True)

    def on_trial_complete(self, iteration, trials, trial, **_):
        for suffix in (".pt", ".resume"):
            path = self.directory / "trials" / f"{trial.trial_id}{suffix}"
            path.unlink(missing_ok=True)
        over = sum(each is trial or each.is_finished() for each in trials)
        print(f"trial {trial.trial_id} is over, {over} of {self.n_trials}", flush=True)

    def on_trial_recover(self, iteration, trials, trial, **_):
        print(f"trial {trial.trial_id}: its process or node has died; it goes on", flush=True)

    def on_trial_error(self, iteration, trials, trial, **_):
        print(f"trial {trial.trial_id}: given up", flush=True)


def run(tuner: tune.Tuner, directory: Path) -> tune.ResultGrid:
    """KeyboardInterrupt: Ctrl-C or SIGTERM has come, and Ray has saved how far it is."""
    came = []

    def stop(number, _):
        if number in came and number == signal.SIGINT:  # once more: at once
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        came.append(number)
        if len(came) == 1:
            signal.raise_signal(signal.SIGUSR1)  # on which Ray stops and saves

    handlers = {each: signal.signal(each, stop) for each in (signal.SIGINT, signal.SIGTERM)}
    handlers[signal.SIGUSR1] = signal.signal(signal.SIGUSR1, signal.default_int_handler)
    try:
        results = tuner.fit()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if came:
        kind = Terminated if signal.SIGTERM in came else KeyboardInterrupt
        raise kind(f"saved: go on with --hpo_resume {directory}")
    return results


def finish(options, directory: Path, logs: Path, results: tune.ResultGrid) -> Path:
    """The table of all trials, TensorBoard's page of hyper-parameters, and the best one's flags."""
    trials = {}
    for result in results:
        name = result.metrics.get("trial_id", "?")
        history = History(directory / "trials" / name, options)
        error = result.metrics.get("error") or (result.error and one_line(result.error))
        trials[name] = result.config, history, error
        if history.epochs:
            log = RunLog(logs / name)
            flags = changed_options(options, **result.config)
            log.hyper_parameters(flags, history.best["scores"]["dev"])
            log.close()
    good = {name: each for name, each in trials.items() if each[1].epochs and not each[2]}
    best = max(good, key=lambda name: good[name][1].best["objective"], default=None)
    print_table(options, trials, best)
    if best is None:
        raise UserError(f"every trial has failed; what came of them is in {directory}")
    path = directory / "best_config.json"
    write_json(path, flags_of(changed_options(options, **good[best][0])))
    for leftover in (directory / "trials").glob("*.[pr]*"):  # .pt and .resume
        leftover.unlink()
    print(f"best: trial {best}; train with its flags: --config {path}")
    print(f"TensorBoard log: {logs}")
    return path


def print_table(options, trials: dict[str, tuple], best: str | None) -> None:
    columns = ["trial", *options.searched, "epochs", "best epoch", "objective", "dev", "gap", ""]
    print("\n| " + " | ".join(columns) + " |\n" + "| --- " * len(columns) + "|")
    for name, (config, history, error) in trials.items():
        cells = [name]
        for flag in options.searched:
            value = config[flag]
            cells.append(f"{value:.3g}" if isinstance(value, float) else str(value))
        cells.append(str(len(history.epochs)))
        if history.epochs:
            cells.append(str(history.best["epoch"]))
            cells += [f"{history.best[key]:.4f}" for key in ("objective", "dev", "gap")]
        else:
            cells += [""] * 4
        cells.append(error or ("the best" if name == best else ""))
        print("| " + " | ".join(cells) + " |")
    print()


def flags_of(options: argparse.Namespace) -> dict:
    """The flags that give these options, without those for outputs and for the search itself."""
    wanted = deciding(vars(options)) | {"spacy_model": options.spacy_model}
    defaults = vars(parse_options(["--data_dir", options.data_dir])) | {"data_dir": "data"}
    del wanted["tasks"]
    return {name: value for name, value in wanted.items() if value != defaults[name]}


def write_json(path: Path, content: dict) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    """Search; the flags are those of multitask_classifier.py, and `--hpo` need not be given."""

    def work():
        options = parse_options(["--hpo", *(sys.argv[1:] if argv is None else argv)])
        search(options)

    return exit_status(work, "lower --batch_size or --max_length", "nothing new was saved")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, terminate)
    sys.exit(main())
