"""Measure what a search costs besides training: seconds a trial, and the memory of its process.

python benchmarks/search.py                        seconds of a trial, with its process
python benchmarks/search.py --trials 1000 --reuse  memory; trials share processes, which saves an hour

A made-up function takes the place of training; everything else is hpo.py: Ray, Optuna, files of trials.
"""

import argparse
import functools
import math
import os
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import hpo
from search_results import Trial


def made_up_trial(config, shared, n_threads):
    """Report one epoch with a score that has its maximum at a learning rate of 1e-4."""
    trial = Trial.read(shared.directory / config["trial"])
    score = -abs(math.log(trial.flags["lr"] / 1e-4))
    metrics = {"epoch": 1, "dev": score, "train": score, "gap": 0.0, "objective": score}
    trial.add_epoch(metrics | {"scores": {"dev": {"sst": {"accuracy": score}}}})
    hpo.tune.report(metrics | {"error": ""})


def memory() -> float:
    """Return the memory that this process has in use, in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def watch(directory: Path, n_trials: int) -> None:
    """Print a line each time that another tenth of the trials is over."""
    start, step = time.perf_counter(), max(n_trials // 10, 1)
    for number in range(step, n_trials + 1, step):
        while not list(directory.glob(f"*/trials/{number - 1}.json")):
            time.sleep(0.5)
        seconds = time.perf_counter() - start
        print(f"{number} trials, {seconds:.0f} s, {memory():.0f} MB", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--reuse", action="store_true")
    args = parser.parse_args()
    n_trials = args.trials
    hpo.run_trial = made_up_trial
    if args.reuse:
        hpo.tune.TuneConfig = functools.partial(hpo.tune.TuneConfig, reuse_actors=True)
    with tempfile.TemporaryDirectory() as folder:
        threading.Thread(target=watch, args=(Path(folder), n_trials), daemon=True).start()
        flags = ["--bert_model", "minilm", "--data_dir", "data/sample", "--hpo_confirm", "0"]
        flags += ["--hpo_cpus", "1", "--hpo_trials", str(n_trials), "--models_dir", folder]
        sys.exit(hpo.main([*flags, "--logdir", f"{folder}/logdir", "--cache_dir", f"{folder}/c"]))


if __name__ == "__main__":
    main()
