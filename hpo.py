"""Search for good hyper-parameters over whole training runs, with Ray Tune and Optuna.

    python hpo.py --hpo_trials 20
    python hpo.py list models/SEARCH     the trials of a search, at any time
    python hpo.py plot models/SEARCH     its pictures

`multitask_classifier.py --hpo` starts this program with the same flags. Optuna proposes the flags of a
trial from a space (search_space.py), Ray Tune runs several trials at a time if there is room, and
asynchronous successive halving (Li et al. 2020, arXiv 1810.05934) ends those early that are behind the
others after as many epochs. The best trials are then trained again with other seeds.

Each trial has a JSON file with its flags and epochs. A search that was killed is built again from them.
"""

import argparse
import contextlib
import functools
import itertools
import json
import logging
import math
import os
import signal
import socket
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

if __name__ == "__main__":
    # Ctrl-C during the seconds of the imports ends the program.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
# Before Ray is imported: it sends nothing about its use, and its loggers are not needed.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # has a banner even with verbose=0
os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # `run_trials` has its own
# Ray would kill trials for the memory of other programs too, and Tune ends at that. Without its guard,
# a trial that the system kills continues.
os.environ.setdefault("RAY_memory_monitor_refresh_ms", "0")
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
from ray.tune.schedulers import AsyncHyperBandScheduler, TrialScheduler
from ray.tune.search import Searcher

import evaluation
from bert import BertModel
from checkpoint import check_pairs, new_name, new_run, plain, read_state
from datasets import TaskDataset, checked_max_length, load_data
from multitask_classifier import (
    MultitaskBERT,
    fit,
    load_start,
    model_from_checkpoint,
    new_model,
)
from options import changed_options, deciding
from run_log import RunLog
from search_results import (
    WORST,
    Trial,
    figures,
    flags_for_config,
    ranked,
    read_search,
    read_trials,
    show,
    write_json,
)
from search_space import Space, search_options
from tagging import Pipeline, Tagger
from tokenizer import BertTokenizer
from training import Parts, Training, prepare_device, restored_training
from utils import (
    Terminated,
    UserError,
    exit_status,
    flush_denormals,
    is_out_of_memory,
    lock_files,
    one_line,
    pick_device,
    seed_everything,
    terminate,
)

RETRIES = 3  # of a trial whose process or node has died
CONNECT_SECONDS = 10
MOST_CORES = 4  # of a trial on CPUs, since a small model gains little from more
GIVEN_UP = "given up; error.txt in its folder of ray/ says why"
STILL_RUNNING = "is of a search that is still running"


def search(options: argparse.Namespace) -> Path:
    """Run the trials, or with `--hpo_resume` those that are left, train the best ones with other seeds,
    and show all in tables.

    Returns:
        the file with the winner's flags, for `--config`.

    Raises:
        UserError: Ray cannot be reached, no node has the cores or GPUs, or every trial failed.
        KeyboardInterrupt: the search was interrupted; the text says how to continue.
    """
    directory = find_search(options) or new_search(options)
    with lock_files([directory / "search.json"], STILL_RUNNING):
        shared = load_shared(options, directory)
        try:
            resources = choose_resources(options, connect_to_ray(options.ray_address))
            trainable = tune.with_parameters(run_trial, shared=shared, n_threads=resources["cpu"])
            trainable = tune.with_resources(trainable, resources)
            proposals = Proposals(options, directory)
            run_trials(trainable, proposals, directory, halving(options, directory))
            run_trials(trainable, Jobs(runs_to_confirm(options, directory)), directory)
        finally:
            ray.shutdown()
        return finish(options, directory, shared.logs)


# -------------------------------------------------------------------------------------- one trial


class Shared(NamedTuple):
    """Everything that the trials have in common. It is loaded once and kept in Ray's object store,
    where the trials of a node read the arrays without a copy."""

    options: argparse.Namespace
    directory: Path  # of the search
    logs: Path  # the search's TensorBoard folder
    start: BertModel | MultitaskBERT  # see `load_start`
    tokenizer: str  # as JSON
    pipeline: Pipeline | None  # of the tags
    data: dict[str, dict[str, TaskDataset]]  # split -> task -> word pieces and labels


def load_shared(options: argparse.Namespace, directory: Path) -> Shared:
    start, tokenizer, tagger = load_start(options)
    encoder = start.bert if isinstance(start, MultitaskBERT) else start
    max_length = checked_max_length(
        options.max_length, options.bert_model, encoder.config, tokenizer
    )
    data = load_data(options, tokenizer, max_length, ("train", "dev"), tagger)
    for rows in (rows for of_split in data.values() for rows in of_split.values()):
        rows.forget_texts()
    pipeline, logs = tagger.pipeline if tagger else None, read_search(directory).logs
    return Shared(options, directory, logs, start, tokenizer.to_json(), pipeline, data)


def run_trial(config: dict[str, Any], shared: Shared, n_threads: int) -> None:
    """Train with the flags of a trial, in a process of Ray's. If such a process has died, the next one
    continues from the trial's last epoch."""
    flush_denormals()
    torch.set_num_threads(n_threads)
    trial = Trial.read(shared.directory / config["trial"])
    try:
        options = changed_options(Space(shared.options).options_of(trial.flags), seed=trial.seed)
        training = start_training(options, shared, trial.path.with_suffix(".resume"))
        if training.epoch:  # its report may have been lost
            report(trial, training)
        fit(training, functools.partial(report, trial))
    except (UserError, RuntimeError, MemoryError) as error:
        if not isinstance(error, UserError) and not is_out_of_memory(error):
            raise
        epochs = shared.options.epochs
        tune.report({"objective": WORST, "epoch": epochs, "error": one_line(error)})


def start_training(options: argparse.Namespace, shared: Shared, path: Path) -> Training:
    """Return a trial's training: a new one, or an interrupted one from its state in `path`."""
    device, state = pick_device(options.use_gpu), read_state(path) if path.exists() else None
    if state:
        model, tokenizer, _ = model_from_checkpoint(state, path)
    else:
        seed_everything(options.seed)
        model = new_model(shared.start, options)
        tokenizer = BertTokenizer.from_json(shared.tokenizer)
        check_pairs(model.bert.config, options.bert_model, options.tasks)
    tagger = Tagger(shared.pipeline) if shared.pipeline else None
    tasks, data = options.tasks, {}
    for split, known in shared.data.items():
        data[split] = {n: rows.arranged(tasks[n], options.both_orders) for n, rows in known.items()}
    prepare_device(model, device, options)
    parts = Parts(model, tokenizer, tagger, data, options)
    if state:
        return restored_training(parts, path, state)
    return Training(parts, path, RunLog(shared.logs / path.stem))


def report(trial: Trial, training: Training) -> None:
    """Note the metrics of an epoch and report them to Ray. The objective is the best so far, since a
    run keeps its best model."""
    select = training.options.select
    dev = evaluation.mean_score(training.scores, select)
    # A task can have no dev file.
    known = training.scores
    measured = {name: own for name, own in training.train_scores.items() if name in known}
    train = evaluation.mean_score(measured, select)
    objective = dev
    if training.options.hpo_objective == "dev_minus_gap":
        objective -= max(train - dev, 0)  # a model gains nothing by underfitting
    epoch = {"epoch": training.epoch, "dev": dev, "train": train, "gap": train - dev}
    epoch["objective"] = WORST if math.isnan(objective) else objective
    if training.epoch not in [done["epoch"] for done in trial.epochs]:
        scores = {"dev": training.scores, "train": training.train_scores}
        trial.add_epoch(epoch | {"scores": scores})
    tune.report(epoch | {"objective": trial.objective, "error": ""})


# ------------------------------------------------------------------------------------- the search


def new_search(options: argparse.Namespace) -> Path:
    """Make the folder of a new search and return it."""
    path, logs = new_run(options, new_name(options, "hpo"))
    directory = path.with_suffix("").absolute()
    write_json(directory / "search.json", {"options": plain(options), "logs": str(logs.absolute())})
    return directory


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
            if not finished and comparable(read_search(directory).options) == wanted:
                with lock_files([directory / "search.json"], STILL_RUNNING):
                    return directory
    print(f"--hpo_resume auto: {options.models_dir} has no such search; this is a new one")
    return None


def comparable(options: argparse.Namespace) -> dict[str, Any]:
    """Return the options that decide the course of a search, as JSON gives them back."""
    values = vars(options)
    names = "hpo_trials", "hpo_objective", "hpo_confirm", "hpo_seeds", "hpo_space"
    return json.loads(json.dumps(deciding(plain(options)) | {name: values[name] for name in names}))


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
    print(f"nodes: {len(nodes)}; for each trial {cpus} cores and {gpus:g} GPUs")
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


class Jobs(Searcher):
    """Gives Ray those of the trials that are not over, and notes which end."""

    def __init__(self, trials: list[Trial]):
        super().__init__(metric="objective", mode="max")
        self.waiting, self.n_events = [trial for trial in trials if trial.told is None], 0
        self.n_trials = len(trials)
        self.n_over = self.n_trials - len(self.waiting)  # when this program started
        self.running: dict[str, Path] = {}  # by Ray's names

    def suggest(self, trial_id: str) -> Any:
        path = self.waiting.pop(0).path
        self.running[trial_id] = path
        return {"trial": f"{path.parent.name}/{path.name}"}

    def on_trial_complete(self, trial_id, result=None, error=False):
        trial = Trial.read(self.running.pop(trial_id))
        trial.error = result["error"] if result else GIVEN_UP
        trial.told, self.n_events = self.n_events, self.n_events + 1
        trial.save()
        for suffix in (".pt", ".resume"):
            trial.path.with_suffix(suffix).unlink(missing_ok=True)

    def save(self, checkpoint_path: str) -> None:
        """Write nothing: the files of the trials have it."""


class Proposals(Jobs):
    """Gives Ray trials whose flags Optuna proposes, after those that a killed search has left."""

    def __init__(self, options: argparse.Namespace, directory: Path):
        self.space, self.directory, self.seed = Space(options), directory / "trials", options.seed
        sampler = optuna.samplers.TPESampler(seed=options.seed)
        self.study = optuna.create_study(direction="maximize", sampler=sampler)
        trials = read_trials(directory)
        super().__init__(trials)
        self.n_trials = options.hpo_trials
        events = [(trial.asked, trial) for trial in trials]
        events += [(trial.told, trial) for trial in trials if trial.told is not None]
        for number, trial in sorted(events, key=lambda event: event[0]):
            if number == trial.told:
                self.study.tell(int(trial.name), trial.objective)
            elif self.space.draw(self.study.ask()) != trial.flags:
                raise UserError(
                    f"{trial.path}: Optuna now proposes other flags; start a new search"
                )
        self.n_events = len(events)

    def suggest(self, trial_id: str) -> Any:
        if not self.waiting:
            proposed = self.study.ask()
            path = self.directory / f"{proposed.number}.json"
            trial = Trial(path, self.space.draw(proposed), self.seed, self.n_events)
            self.n_events += 1
            trial.save()
            self.waiting.append(trial)
        return super().suggest(trial_id)

    def on_trial_complete(self, trial_id, result=None, error=False):
        path = self.running[trial_id]
        super().on_trial_complete(trial_id, result, error)
        self.study.tell(int(path.stem), Trial.read(path).objective)


def halving(options: argparse.Namespace, directory: Path) -> AsyncHyperBandScheduler:
    """Return the scheduler that ends weak trials, with what it has seen of those that are over."""
    scheduler = AsyncHyperBandScheduler(
        time_attr="epoch", max_t=options.epochs, metric="objective", mode="max"
    )
    for trial in read_trials(directory):
        if trial.told is not None:
            controller, known = cast(Any, (None, SimpleNamespace(trial_id=trial.name)))
            scheduler.on_trial_add(controller, known)
            best = itertools.accumulate((epoch["objective"] for epoch in trial.epochs), max)
            for epoch, objective in zip(trial.epochs, best, strict=True):
                scheduler.on_trial_result(controller, known, epoch | {"objective": objective})
    return scheduler


def runs_to_confirm(options: argparse.Namespace, directory: Path) -> list[Trial]:
    """Return the runs of the best trials with other seeds."""
    for trial in ranked(read_trials(directory))[: options.hpo_confirm]:
        for seed in range(options.seed + 1, options.seed + 1 + options.hpo_seeds):
            path = directory / "confirmation" / f"{trial.name}-{seed}.json"
            if not path.exists():
                Trial(path, trial.flags, seed, asked=trial.asked).save()
    return read_trials(directory, "confirmation")


class Progress(tune.Callback):
    """Print a line for each epoch of each trial."""

    def __init__(self, n_trials: int, n_over: int):
        self.n_trials, self.n_over = n_trials, n_over

    def on_trial_result(self, iteration, trials, trial, result, **_):
        if result.get("error"):
            print(f"{name_of(trial)}: failed: {result['error']}", flush=True)
        else:
            text = ", ".join(f"{name} {result[name]:.4f}" for name in ("dev", "train", "gap"))
            print(f"{name_of(trial)}, epoch {result['epoch']}: {text}", flush=True)

    def on_trial_complete(self, iteration, trials, trial, **_):
        over = self.n_over + sum(other is trial or other.is_finished() for other in trials)
        print(f"{name_of(trial)} is over, {over} of {self.n_trials}", flush=True)

    def on_trial_recover(self, iteration, trials, trial, **_):
        print(f"{name_of(trial)}: its process or node has died; it continues", flush=True)

    def on_trial_error(self, iteration, trials, trial, **_):
        print(f"{name_of(trial)}: given up", flush=True)


def name_of(trial: Any) -> str:
    return f"trial {Path(trial.config['trial']).stem}"


def run_trials(
    trainable: Any,
    jobs: Jobs,
    directory: Path,
    scheduler: TrialScheduler | None = None,
) -> None:
    """Run those of the trials that are not over. On Ctrl-C or SIGTERM, let Ray stop them, then
    raise KeyboardInterrupt; a second Ctrl-C ends the process at once."""
    n_left = jobs.n_trials - jobs.n_over
    if not n_left:
        return
    tuner = tune.Tuner(
        trainable,
        tune_config=tune.TuneConfig(num_samples=n_left, search_alg=jobs, scheduler=scheduler),
        run_config=tune.RunConfig(
            name="ray",
            storage_path=str(directory),
            failure_config=tune.FailureConfig(max_failures=RETRIES),
            callbacks=[Progress(jobs.n_trials, jobs.n_over)],
            verbose=0,
        ),
    )
    arrived: list[int] = []

    def stop(number, _):
        if number in arrived and number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        arrived.append(number)
        if len(arrived) == 1:
            signal.raise_signal(signal.SIGUSR1)  # on which Ray stops

    handlers = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    handlers[signal.SIGUSR1] = signal.signal(signal.SIGUSR1, signal.default_int_handler)
    try:
        tuner.fit()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if arrived:
        kind = Terminated if signal.SIGTERM in arrived else KeyboardInterrupt
        raise kind(f"saved: continue with --hpo_resume {directory}")


# ------------------------------------------------------------------------------------- its result


def finish(options: argparse.Namespace, directory: Path, logs: Path) -> Path:
    """Print the tables, write TensorBoard's page of hyper-parameters, the pictures and the winner's
    flags. Return the file of these flags."""
    space, best, good = Space(options), show(directory), ranked(read_trials(directory))
    if best is None:
        failed = "every run with another seed" if good else "every trial"
        raise UserError(f"{failed} has failed; the table says why, the rest is in {directory}")
    for trial in good:
        log = RunLog(logs / trial.name)
        log.hyper_parameters(space.options_of(trial.flags), trial.best["scores"]["dev"])
        log.close()
    path = directory / "best_config.json"
    write_json(path, flags_for_config(space.options_of(best.flags)))
    if len(good) > 1:
        plot(directory)
    print(f"best: trial {best.name}; train with its flags: --config {path}")
    print(f"TensorBoard log: {logs}")
    return path


def plot(directory: Path) -> None:
    """Draw a search, into its folder and its TensorBoard log."""
    saved, trials = read_search(directory), ranked(read_trials(directory))
    if len(trials) < 2:
        raise UserError(f"{directory}: pictures need two trials that are over and have not failed")
    study = optuna.create_study(direction="maximize")
    proposed = Proposals(saved.options, directory).study.trials
    study.add_trials([trial for trial in proposed if trial.value not in (None, WORST)])
    log = RunLog(saved.logs / "pictures")
    for name, figure in figures(study, trials).items():
        figure.savefig(directory / f"{name}.png", dpi=120, bbox_inches="tight")
        log.writer.add_figure(f"search/{name}", figure)
        print(f"picture: {directory / name}.png")
    log.close()


def main(argv: list[str] | None = None) -> int:
    """Search. The flags are those of multitask_classifier.py; `--hpo` need not be given."""
    argv = sys.argv[1:] if argv is None else argv
    of_a_search = {"list": show, "plot": plot}

    def work():
        if argv[:1] and argv[0] in of_a_search:
            if len(argv) != 2 or argv[1].startswith("-"):
                raise UserError(f"give one folder: python hpo.py {argv[0]} models/SEARCH")
            of_a_search[argv[0]](Path(argv[1]))
        else:
            search(search_options(argv))

    return exit_status(work, "lower --batch_size or --max_length", "nothing new was saved")


if __name__ == "__main__":
    # Ray pickles classes of `__main__` with their code, so a search that is continued would run the
    # code of its first day. Those of the module `hpo` are pickled by name.
    import hpo

    signal.signal(signal.SIGINT, signal.default_int_handler)  # from here on main() handles it
    signal.signal(signal.SIGTERM, terminate)
    sys.exit(hpo.main())
