"""Cost of a training step with SophiaH and SophiaG, beside AdamW.

    python benchmarks/optimizers.py --data_dir data

Steps of all kinds take turns on the same rows in one run, so that the machine's noise hits all
alike. The average step at an interval of k is put together from the medians, `((k - 1) * step
between + refresh) / k`. "Graph in every step" is what a naive SophiaH does that builds the graph for
second derivatives each time, whether it is needed or not. Peak memory is that of a process of its
own that takes steps of one kind only.
"""

import argparse
import contextlib
import io
import statistics
import subprocess
import sys

import torch
from throughput import ROOT, WARM_UP, Inputs, mc, resident_peak, seconds

from optimizer import build_optimizer
from options import parse_options
from tasks import TASKS
from utils import keep_freed_memory

INTERVALS = 10, 50
# kind of step -> (optimizer, does it refresh the estimate, is the graph built needlessly)
KINDS = {
    "AdamW": ("adamw", False, False),
    "SophiaH, between": ("sophiah", False, False),
    "SophiaH, refresh": ("sophiah", True, False),
    "SophiaH, graph in every step": ("sophiah", False, True),
    "SophiaG, between": ("sophiag", False, False),
    "SophiaG, refresh": ("sophiag", True, False),
}


def parse(args, optimizer: str):
    flags = ["--data_dir", args.data_dir, "--bert_model", args.bert_model, "--lr", "0"]
    return parse_options(flags + ["--optimizer", optimizer])


class Steps:
    """Takes steps of any kind with one model; each optimizer keeps its state."""

    def __init__(self, args, kinds):
        self.inputs = Inputs(args)
        self.model = mc.MultitaskBERT(self.inputs.bert).to(self.inputs.device).train()
        self.options = {KINDS[kind][0]: parse(args, KINDS[kind][0]) for kind in kinds}
        with contextlib.redirect_stdout(io.StringIO()):
            self.optimizers = {
                name: build_optimizer(self.model, each) for name, each in self.options.items()
            }

    def __call__(self, kind: str, window) -> float:
        name, refresh, graph = KINDS[kind]
        optimizer, options = self.optimizers[name], self.options[name]
        for group in optimizer.param_groups:  # a multiple of the interval makes it refresh
            group["step"] = 0 if refresh else 1
        step = naive_step if graph else mc.training_step
        return seconds(lambda: step(self.model, window, optimizer, options), self.inputs.device)


def naive_step(model, window, optimizer, options) -> None:
    (batch,) = window
    outputs = model(batch, second_derivative=True)
    total = sum(TASKS[name].loss(each, batch.labels[name]) for name, each in outputs.items())
    total.backward(create_graph=True)
    parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
    torch.nn.utils.clip_grad_norm_(parameters, options.clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def memory_of(kind: str, args) -> float:
    command = [sys.executable, __file__, "--memory_of", kind, "--steps", str(min(args.steps, 4))]
    command += ["--data_dir", args.data_dir, "--bert_model", args.bert_model]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flag = parser.add_argument
    flag("--data_dir", default=str(ROOT / "data" / "sample"), help="default: the sample data")
    flag("--bert_model", default="minilm", help="default: minilm")
    flag("--steps", type=int, default=10, help="measured steps of each kind; default: 10")
    flag("--memory_of", choices=KINDS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.use_gpu = args.base = False
    if "SophiaH" in (args.memory_of or "SophiaH"):
        keep_freed_memory()  # as a run with SophiaH does; other steps do not notice
    kinds = [args.memory_of] if args.memory_of else list(KINDS)
    steps = Steps(args, kinds)
    times = {kind: [] for kind in kinds}
    for number, window in enumerate(steps.inputs.windows):
        for kind in kinds[:: 1 if number % 2 else -1]:
            times[kind].append(steps(kind, window))
    if args.memory_of:
        return print(resident_peak())

    medians = {kind: statistics.median(each[WARM_UP:]) for kind, each in times.items()}
    print(f"{args.steps} steps of each kind, {torch.get_num_threads()} threads")
    print("| step | median, s | / AdamW | peak memory, MB |")
    print("| --- | --- | --- | --- |")
    for kind, median in medians.items():
        ratio = median / medians["AdamW"]
        print(f"| {kind} | {median:.3f} | {ratio:.2f} | {memory_of(kind, args):.0f} |")
    print("\n| average step / AdamW | " + " | ".join(f"every {k} steps" for k in INTERVALS) + " |")
    print("| --- |" + " --- |" * len(INTERVALS))
    for name in ("SophiaH", "SophiaG"):
        between, refresh = medians[f"{name}, between"], medians[f"{name}, refresh"]
        averages = [((k - 1) * between + refresh) / k / medians["AdamW"] for k in INTERVALS]
        print(f"| {name} | " + " | ".join(f"{average:.2f}" for average in averages) + " |")


if __name__ == "__main__":
    main()
