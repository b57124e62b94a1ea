"""Search for good hyper-parameters over whole training runs, with Ray Tune and Optuna.

    python hpo.py --hpo_trials 20

`multitask_classifier.py --hpo` starts this program with the same flags. SEARCH_SPACE in options.py
says what is searched. Ray Tune runs several trials at a time if there is room, Optuna proposes
their settings, and asynchronous successive halving (Li et al. 2020, arXiv 1810.05934) ends those
early that are behind the others after as many epochs.
"""

import argparse
import contextlib
import json
import logging
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":
    # Ctrl-C during the seconds of the imports ends the program.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
# Before Ray is imported: it sends nothing about its use, and its loggers are not needed.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # `run_trials` has its own
# By default, all other programs would come before the trials.
os.environ.setdefault("RAY_worker_niceness", "0")
# As in multitask_classifier.py, which says why.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
if {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & set(os.environ) or (
    Path.home() / ".ray" / "auth_token"
).exists():
    # `ray start` asks for such a token, but Ray does not pick it up when it joins a cluster.
    os.environ.setdefault("RAY_AUTH_MODE", "token")

import optuna
import ray
import torch
from ray import tune
from ray.tune.schedulers import AsyncHyperBandScheduler
from ray.tune.search.optuna import OptunaSearch

import evaluation
from checkpoint import checkpoint_content, new_name, new_run, plain, read_state
from datasets import TaskDataset
from flags import SEARCH_SPACE, build_parser
from multitask_classifier import fit, load_all, model_from_checkpoint
from options import changed_options, deciding, parse_options
from run_log import RunLog
from tagging import Pipeline, Tagger
from tasks import TASKS, tasks_of_rows
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

WORST = -1.0  # the objective of a trial that has failed, lower than all others
RETRIES = 3  # of a trial whose process or node has died
CONNECT_SECONDS = 10
MOST_CORES = 4  # of a trial on CPUs, since a small model gains little from more
STILL_RUNNING = "is of a search that is still running"


def search(options: argparse.Namespace) -> Path:
    """Run the trials, or with `--hpo_resume` those that are left, and show them in a table.

    Returns:
        the file with the best trial's flags, for `--config`.

    Raises:
        UserError: Ray cannot be reached, no node has the cores or GPUs, or every trial failed.
        KeyboardInterrupt: the search was interrupted; the text says how to continue.
    """
    interrupted = find_search(options)
    directory = interrupted or new_search(options)
    with lock_files([directory / "search.json"], STILL_RUNNING):
        shared = load_shared(options, directory)
        try:
            resources = choose_resources(options, connect_to_ray(options.ray_address))
            trainable = tune.with_parameters(run_trial, shared=shared, n_threads=resources["cpu"])
            trainable = tune.with_resources(trainable, resources)
            if interrupted:
                tuner = restore_tuner(directory, trainable)
            else:
                tuner = new_tuner(options, directory, trainable)
            results = run_trials(tuner, directory)
        finally:
            ray.shutdown()
        return finish(options, directory, shared.logs, results)


# -------------------------------------------------------------------------------------- one trial


class Shared(NamedTuple):
    """Everything that the trials have in common. It is loaded once and kept in Ray's object store,
    where the trials of a node read the arrays without a copy."""

    options: argparse.Namespace
    directory: Path  # of the search
    logs: Path  # the search's TensorBoard folder
    checkpoint: dict[str, Any]  # before the first step, its weights as arrays
    pipeline: Pipeline | None  # of the tags
    data: dict[str, dict[str, TaskDataset]]  # split -> task -> dataset
    random: dict[str, Any]  # the states of all generators before the first step


def load_shared(options: argparse.Namespace, directory: Path) -> Shared:
    logs = read_search(directory).logs
    model, tokenizer, tagger, data, _ = load_all(options)
    checkpoint = checkpoint_content(model, tokenizer, options, 0, {}, tagger)
    checkpoint["model"] = {name: weight.numpy() for name, weight in checkpoint["model"].items()}
    pipeline = tagger.pipeline if tagger else None
    return Shared(options, directory, logs, checkpoint, pipeline, data, random_states())


def run_trial(config: dict[str, Any], shared: Shared, n_threads: int) -> None:
    """Train with the flags of `config`, in a process of Ray's. If such a process has died, the next
    one continues from the trial's last epoch."""
    torch.set_num_threads(n_threads)
    options = changed_options(shared.options, **config)
    trial = Trial(shared.directory / "trials" / tune.get_context().get_trial_id(), options)
    try:
        training = start_training(options, shared, trial.path.with_suffix(".resume"))
        if training.epoch:  # its report may have been lost
            trial.report(training)
        fit(training, trial.report)
    except (UserError, RuntimeError, MemoryError) as error:
        if not isinstance(error, UserError) and not is_out_of_memory(error):
            raise
        tune.report({"objective": WORST, "epoch": options.epochs, "error": one_line(error)})


def start_training(options: argparse.Namespace, shared: Shared, path: Path) -> Training:
    """Return a trial's training: a new one, or an interrupted one from its state in `path`."""
    device = pick_device(options.use_gpu)
    state = read_state(path) if path.exists() else None
    if not state:
        seed_everything(options.seed)  # for a GPU, which the search itself has not used
        restore_random_states(shared.random)
    model, tokenizer, _ = model_from_checkpoint(state or first_checkpoint(options, shared), path)
    tagger = Tagger(shared.pipeline) if shared.pipeline else None
    parts = Parts(model.to(device), tokenizer, tagger, shared.data, options)
    if state:
        return restored_training(parts, path, state)
    return Training(parts, path, RunLog(shared.logs / path.stem))


def first_checkpoint(options: argparse.Namespace, shared: Shared) -> dict[str, Any]:
    """Return the checkpoint before the first step, with the options of a trial."""
    config, dropout = shared.checkpoint["bert_config"], options.hidden_dropout_prob
    return shared.checkpoint | {
        "options": vars(options),
        "bert_config": config if dropout is None else config | {"hidden_dropout_prob": dropout},
        # Copies, since Ray's arrays cannot be written to.
        "model": {name: torch.tensor(array) for name, array in shared.checkpoint["model"].items()},
    }


class Trial:
    """A trial: its options, its epochs so far, which are in a JSON file, and its error, if any."""

    def __init__(self, path: Path, options: argparse.Namespace, error: str = ""):
        self.path, self.options, self.error = path.with_suffix(".json"), options, error
        self.epochs = json.loads(self.path.read_text()) if self.path.exists() else []

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def best(self) -> dict[str, Any]:
        return max(self.epochs, key=lambda epoch: epoch["objective"])

    def report(self, training: Training) -> None:
        """Report the metrics of an epoch. The objective is the best so far, since a run keeps its
        best model."""
        dev = evaluation.mean_score(training.scores, self.options.select)
        train = evaluation.mean_score(training.train_scores, self.options.select)
        epoch: dict[str, Any] = {"dev": dev, "train": train, "gap": train - dev, "objective": dev}
        if self.options.hpo_objective == "dev_minus_gap":
            epoch["objective"] -= max(epoch["gap"], 0)  # a model gains nothing by underfitting
        scores = {"dev": training.scores, "train": training.train_scores}
        epoch |= {"epoch": training.epoch, "scores": scores}
        self.epochs = [done for done in self.epochs if done["epoch"] < training.epoch] + [epoch]
        write_json(self.path, self.epochs)
        tune.report(epoch | {"objective": self.best["objective"], "error": ""})


# ------------------------------------------------------------------------------------- the search


class SavedSearch(NamedTuple):
    """The content of search.json."""

    options: argparse.Namespace
    logs: Path


def new_search(options: argparse.Namespace) -> Path:
    """Make the folder of a new search and return it."""
    path, logs = new_run(options, new_name(options, "hpo"))
    directory = path.with_suffix("").absolute()
    write_json(directory / "search.json", {"options": plain(options), "logs": str(logs.absolute())})
    return directory


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


def find_search(options: argparse.Namespace) -> Path | None:
    """Return the folder of the search that `--hpo_resume` means; None for a new search. Raises
    UserError if the folder holds no search, or one with other options."""
    if options.hpo_resume is None:
        return None
    wanted = comparable(options)
    if options.hpo_resume != "auto":
        directory = Path(options.hpo_resume).absolute()
        saved = comparable(read_search(directory).options)
        if differing := [name for name in wanted if saved.get(name) != wanted[name]]:
            raise UserError(
                f"{directory}: this search has other values of --{', --'.join(differing)}; "
                "leave them out to continue it, or start a new search"
            )
        return directory
    for file in sorted(Path(options.models_dir).glob("*-hpo-*/search.json"), reverse=True):
        with contextlib.suppress(UserError):
            directory = file.parent.absolute()
            finished = (directory / "best_config.json").exists()
            begun = tune.Tuner.can_restore(str(directory))
            if begun and not finished and comparable(read_search(directory).options) == wanted:
                return directory
    print(f"--hpo_resume auto: {options.models_dir} has no such search; this is a new one")
    return None


def comparable(options: argparse.Namespace) -> dict[str, Any]:
    """Return the options that decide the course of a search, as JSON gives them back."""
    values = vars(options)
    own = {name: values[name] for name in ("hpo_trials", "hpo_objective", "searched")}
    return json.loads(json.dumps(deciding(plain(options)) | own))


def connect_to_ray(address: str | None) -> list[dict[str, float]]:
    """Join the cluster at `--ray_address`, or start Ray on this machine. Return the resources of
    each node."""
    host, _, port = (address or "").rpartition(":")
    try:
        if port.isdigit():  # Ray itself would try for minutes
            socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
        ray.init(
            address=address or "local",
            include_dashboard=None if address else False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"--ray_address {address}: {one_line(error)}") from error
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def choose_resources(options: argparse.Namespace, nodes: list[dict[str, float]]) -> dict[str, Any]:
    """Return the cores and GPUs of one trial. Raises UserError if no node has them."""
    gpus = (options.hpo_gpus or 1) if options.use_gpu else 0
    cpus = options.hpo_cpus or default_cores(nodes, gpus)
    if not any(node.get("CPU", 0) >= cpus and node.get("GPU", 0) >= gpus for node in nodes):
        raise UserError(
            f"--hpo: no node has {cpus} cores and {gpus:g} GPUs for a trial; "
            "lower --hpo_cpus or --hpo_gpus"
        )
    print(f"{len(nodes)} nodes; {cpus} cores and {gpus:g} GPUs for each trial")
    return {"cpu": cpus, "gpu": gpus}


def default_cores(nodes: list[dict[str, float]], gpus: float) -> int:
    """Return the cores of one trial: with GPUs their share of a node's cores, else up to 4, on the
    smallest of the nodes that can run a trial."""
    shares = [
        node["CPU"] * gpus / node["GPU"] if gpus else min(node["CPU"], MOST_CORES)
        for node in nodes
        if node.get("CPU") and (node.get("GPU") or not gpus)
    ]
    return max(int(min(shares, default=1)), 1)


def new_tuner(options: argparse.Namespace, directory: Path, trainable: Any) -> tune.Tuner:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    space = {name: distribution(name, options) for name in options.searched}
    proposals = OptunaSearch(space, metric="objective", mode="max", seed=options.seed)
    return tune.Tuner(
        trainable,
        tune_config=tune.TuneConfig(
            metric="objective",
            mode="max",
            num_samples=options.hpo_trials,
            search_alg=proposals,
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


def restore_tuner(directory: Path, trainable: Any) -> tune.Tuner:
    try:
        return tune.Tuner.restore(str(directory), trainable)
    except Exception as error:  # pickles, JSON, and whatever else Ray keeps there
        raise UserError(
            f"{directory}: Ray cannot continue it ({one_line(error)}); start a new search"
        ) from error


def distribution(name: str, options: argparse.Namespace):
    """Return the row of SEARCH_SPACE in Optuna's form."""
    row = SEARCH_SPACE[name]
    if row.kind == "choice":
        return optuna.distributions.CategoricalDistribution(row.values)
    scale = getattr(options, name) if row.of_default else 1
    low, high = (scale * value for value in row.values)
    return optuna.distributions.FloatDistribution(low, high, log=row.kind == "log")


class Progress(tune.Callback):
    """Print a line for each epoch of each trial. Of a trial that is over, keep only the history."""

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
        over = sum(other is trial or other.is_finished() for other in trials)
        print(f"trial {trial.trial_id} is over, {over} of {self.n_trials}", flush=True)

    def on_trial_recover(self, iteration, trials, trial, **_):
        print(f"trial {trial.trial_id}: its process or node has died; it continues", flush=True)

    def on_trial_error(self, iteration, trials, trial, **_):
        print(f"trial {trial.trial_id}: given up", flush=True)


def run_trials(tuner: tune.Tuner, directory: Path) -> tune.ResultGrid:
    """Run the trials to their end. On Ctrl-C or SIGTERM, let Ray save its state, then raise
    KeyboardInterrupt; a second Ctrl-C ends the process at once."""
    arrived: list[int] = []

    def stop(number, _):
        if number in arrived and number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        arrived.append(number)
        if len(arrived) == 1:
            signal.raise_signal(signal.SIGUSR1)  # on which Ray stops and saves

    handlers = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    handlers[signal.SIGUSR1] = signal.signal(signal.SIGUSR1, signal.default_int_handler)
    try:
        results = tuner.fit()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if arrived:
        kind = Terminated if signal.SIGTERM in arrived else KeyboardInterrupt
        raise kind(f"saved: continue with --hpo_resume {directory}")
    return results


# ------------------------------------------------------------------------------------- its result


def finish(
    options: argparse.Namespace, directory: Path, logs: Path, results: tune.ResultGrid
) -> Path:
    """Print the table of all trials, write TensorBoard's page of hyper-parameters and the best
    trial's flags. Return the file of these flags."""
    trials = []
    for number in range(len(results)):
        result = results[number]
        metrics, flags = result.metrics or {}, changed_options(options, **(result.config or {}))
        error = metrics.get("error") or (one_line(result.error) if result.error else "")
        trials.append(Trial(directory / "trials" / metrics.get("trial_id", "?"), flags, error))
    for trial in trials:
        if trial.epochs:
            log = RunLog(logs / trial.name)
            log.hyper_parameters(trial.options, trial.best["scores"]["dev"])
            log.close()
    good = [trial for trial in trials if trial.epochs and not trial.error]
    best = max(good, key=lambda trial: trial.best["objective"], default=None)
    print_table(options.searched, trials, best)
    if best is None:
        raise UserError(f"every trial has failed; the table says why, the rest is in {directory}")
    path = directory / "best_config.json"
    write_json(path, flags_for_config(best.options))
    for leftover in (directory / "trials").glob("*.[pr]*"):  # .pt and .resume
        leftover.unlink()
    print(f"best: trial {best.name}; train with its flags: --config {path}")
    print(f"TensorBoard log: {logs}")
    return path


def print_table(searched: list[str], trials: list[Trial], best: Trial | None) -> None:
    columns = ["trial", *searched, "epochs", "best epoch", "objective", "dev", "gap", ""]
    print("\n| " + " | ".join(columns) + " |\n" + "| --- " * len(columns) + "|")
    for trial in trials:
        values = [getattr(trial.options, flag) for flag in searched]
        cells = [f"{value:.3g}" if isinstance(value, float) else str(value) for value in values]
        scores = [""] * 4
        if trial.epochs:
            scores = [f"{trial.best[name]:.4f}" for name in ("objective", "dev", "gap")]
            scores.insert(0, str(trial.best["epoch"]))
        remark = "the best" if trial is best else trial.error
        row = [trial.name, *cells, str(len(trial.epochs)), *scores, remark]
        print("| " + " | ".join(row) + " |")
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
    return {name: value for name, value in wanted.items() if value != defaults[name]}


def write_json(path: Path, content: dict[str, Any] | list[dict[str, Any]]) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    """Search. The flags are those of multitask_classifier.py; `--hpo` need not be given."""

    def work():
        search(parse_options(["--hpo", *(sys.argv[1:] if argv is None else argv)]))

    return exit_status(work, "lower --batch_size or --max_length", "nothing new was saved")


if __name__ == "__main__":
    # Ray pickles classes of `__main__` with their code, so a search that is continued would run the
    # code of its first day. Those of the module `hpo` are pickled by name.
    import hpo

    signal.signal(signal.SIGINT, signal.default_int_handler)  # from here on main() handles it
    signal.signal(signal.SIGTERM, terminate)
    sys.exit(hpo.main())
