"""Train the same short budget with different settings and seeds, and print the table.

    python benchmarks/training.py sophia --data_dir data
    python benchmarks/training.py tags --data_dir data --spacy_model en_core_web_sm
    python benchmarks/training.py moe --data_dir data

Each run is `multitask_classifier.py` in a process of its own. What it gave is kept in
`results/runs.json`, under its flags; a run that is there is not made again, so the command can be
interrupted, and goes on where it stopped.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tagging import Pipeline  # noqa: E402

RESULTS = ROOT / "results" / "runs.json"
SEEDS = 11711, 1, 2
METRICS = "sst_accuracy", "para_accuracy", "sts_pearson"
BUDGET = "--epochs 2 --samples_per_epoch 4000"
ADAMW = "--optimizer adamw --lr 8e-5"
# experiment -> settings -> seeds. Rates are written out, so that a changed default makes no old row
# look new. For Sophia one seed is for the search of the rate, the best one gets three.
EXPERIMENTS = {
    "sophia": {
        ADAMW: SEEDS,
        **{
            f"--optimizer {name} --hess_interval {interval} --rho 0.02 --lr {lr}": seeds
            for name, interval, lr, seeds in (
                ("sophiah", 10, "4e-4", SEEDS[:1]),
                ("sophiah", 10, "1.2e-3", SEEDS),
                ("sophiah", 10, "4e-3", SEEDS[:1]),
                ("sophiah", 50, "4e-4", SEEDS[:1]),
                ("sophiah", 50, "1.2e-3", SEEDS),
                ("sophiag", 10, "4e-4", SEEDS[:1]),
                ("sophiag", 10, "1.2e-3", SEEDS),
                ("sophiag", 10, "4e-3", SEEDS[:1]),
                ("sophiag", 50, "1.2e-3", SEEDS),
            )
        },
    },
    "tags": {ADAMW: SEEDS, f"{ADAMW} --additional_input": SEEDS},
    "moe": {
        f"{ADAMW} --precision bfloat16": SEEDS,
        f"{ADAMW} --precision bfloat16 --moe hard": SEEDS,
        f"{ADAMW} --precision bfloat16 --moe soft": SEEDS,
    },
}


def train(setting: str, seed: int, args) -> dict:
    """One run: its final dev metrics, seconds of its epochs, clipped shares of each epoch."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-u", str(ROOT / "multitask_classifier.py")]
        command += f"--bert_model minilm {BUDGET} {setting} --seed {seed}".split()
        command += ["--data_dir", str(Path(args.data_dir).resolve()), "--models_dir", "."]
        if "--additional_input" in setting:
            command += ["--spacy_model", args.spacy_model]
        environment = os.environ | {"OMP_NUM_THREADS": str(max(os.cpu_count() // args.jobs, 1))}
        with subprocess.Popen(
            command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True
        ) as run:
            shown = run.stdout.read()
            _, status, used = os.wait4(run.pid, 0)
            run.returncode = os.waitstatus_to_exitcode(status)
        if run.returncode:
            raise SystemExit(f"{' '.join(command)}: failed, see above")
        (run,) = Path(folder, "logdir").iterdir()
        log = EventAccumulator(str(run)).Reload()
        result = {name: log.Scalars(f"final/{name}")[-1].value for name in METRICS}
    result["epoch_seconds"] = [
        int(each) for each in re.findall(r"^epoch \d+: (\d+) s", shown, re.M)
    ]
    result["peak_memory_mb"] = round(used.ru_maxrss / 1024)
    result["threads"] = int(re.search(r"(\d+) CPU threads", shown)[1])
    if "--additional_input" in setting:
        result["pipeline"] = str(Pipeline.find(args.spacy_model))
    result["commit"] = re.search(r"'commit': '(.*?)'", shown)[1]
    result["clipped"] = [float(each) for each in re.findall(r"coordinates (\d\S*),", shown)]
    return result


def run_name(setting: str, seed: int) -> str:
    return f"{BUDGET} {setting} --seed {seed}"


def spread(values: list[float], digits: int) -> str:
    if len(values) < 2:
        return f"{values[0]:.{digits}f}"
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def table(settings: dict[str, tuple], results: dict[str, dict]) -> None:
    heads = ["settings", "seeds", "sentiment", "paraphrase", "similarity", "mean"]
    heads += ["seconds an epoch", "peak memory, MB", "clipped, epoch 1, 2"]
    print(f"| {' | '.join(heads)} |\n" + "| --- " * len(heads) + "|")
    for setting in settings:
        runs = [results[key] for seed in SEEDS if (key := run_name(setting, seed)) in results]
        if not runs:
            continue
        cells = [f"`{setting}`", str(len(runs))]
        cells += [spread([run[name] for run in runs], 3) for name in METRICS]
        cells += [spread([statistics.mean(run[name] for name in METRICS) for run in runs], 3)]
        cells += [f"{statistics.mean(s for run in runs for s in run['epoch_seconds']):.0f}"]
        cells += [", ".join(str(run["peak_memory_mb"]) for run in runs if "peak_memory_mb" in run)]
        shares = [statistics.mean(epoch) for epoch in zip(*(run["clipped"] for run in runs))]
        cells += [", ".join(f"{share:.2f}" for share in shares)]
        print(f"| {' | '.join(cells)} |")


def train_missing(settings: dict[str, tuple], results: dict[str, dict], args) -> None:
    wanted = [(each, s) for s in SEEDS for each, seeds in settings.items() if s in seeds]
    pool = ThreadPoolExecutor(args.jobs)
    try:
        runs = {
            pool.submit(train, *each, args): run_name(*each)
            for each in wanted
            if run_name(*each) not in results
        }
        for done in as_completed(runs):
            results[runs[done]] = done.result()
            RESULTS.parent.mkdir(exist_ok=True)
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")
            print(f"{runs[done]}: {done.result()}", file=sys.stderr)
    finally:
        pool.shutdown(cancel_futures=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flag = parser.add_argument
    flag("experiment", choices=EXPERIMENTS)
    flag("--data_dir", required=True, help="folder of the real CSVs")
    flag("--spacy_model", default="en_core_web_sm", help="of runs with --additional_input")
    flag("--jobs", type=int, default=1, help="runs at a time, on equal shares of the cores")
    flag("--only_table", action="store_true", help="print what there is, train not")
    args = parser.parse_args()
    settings = EXPERIMENTS[args.experiment]
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if not args.only_table:
        train_missing(settings, results, args)
    table(settings, results)


if __name__ == "__main__":
    main()
