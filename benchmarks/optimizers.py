"""Measure the cost of a training step with SophiaH and SophiaG, compared with AdamW.

    python benchmarks/optimizers.py --data_dir data

Steps of all kinds take turns on the same rows in one run, so that the machine's noise affects them
alike. The average step at an interval of k is computed from the medians,
`((k - 1) * step between estimates + step with an estimate) / k`. "Graph in every step" is a naive
SophiaH that builds the graph for second derivatives each time, whether it is needed or not. Peak
memory is that of a process of its own that takes steps of one kind only.
"""

import argparse
import contextlib
import io
from collections.abc import Iterable
from typing import NamedTuple

import torch
from measuring import (
    ask_process,
    in_turns,
    medians,
    new_parser,
    print_table,
    resident_peak,
    seconds,
)
from throughput import Inputs, mc

from batches import Batch
from optimizer import build_optimizer
from options import parse_options
from tasks import TASKS
from utils import flush_denormals, keep_freed_memory

INTERVALS = 10, 50


class Kind(NamedTuple):
    """A kind of step."""

    optimizer: str
    refreshes: bool = False  # whether it estimates the Hessian
    needless_graph: bool = False


KINDS = {
    "AdamW": Kind("adamw"),
    "SophiaH, between estimates": Kind("sophiah"),
    "SophiaH, with an estimate": Kind("sophiah", refreshes=True),
    "SophiaH, graph in every step": Kind("sophiah", needless_graph=True),
    "SophiaG, between estimates": Kind("sophiag"),
    "SophiaG, with an estimate": Kind("sophiag", refreshes=True),
}


class Steps:
    """Takes steps of any kind with one model. Each optimizer keeps its state."""

    def __init__(self, inputs: Inputs, kinds: Iterable[str], flags: list[str]):
        self.model = mc.MultitaskBERT(inputs.bert).train()
        names = dict.fromkeys(KINDS[kind].optimizer for kind in kinds)
        flags = [*flags, "--lr", "0", "--optimizer"]
        self.options = {name: parse_options([*flags, name]) for name in names}
        with contextlib.redirect_stdout(io.StringIO()):
            self.optimizers = {
                name: build_optimizer(self.model, options) for name, options in self.options.items()
            }

    def __call__(self, kind: str, window: list[Batch]) -> float:
        name, refreshes, needless_graph = KINDS[kind]
        optimizer, options = self.optimizers[name], self.options[name]
        # At a multiple of the interval, Sophia estimates the Hessian.
        for group in optimizer.param_groups:
            group["step"] = 0 if refreshes else 1
        step = naive_step if needless_graph else mc.training_step
        return seconds(lambda: step(self.model, window, optimizer, options))


def naive_step(
    model: mc.MultitaskBERT,
    window: list[Batch],
    optimizer: torch.optim.Optimizer,
    options: argparse.Namespace,
) -> None:
    """Take a step with the graph for second derivatives."""
    (batch,) = window
    total = torch.zeros(())
    for name, output in model(batch, second_derivative=True).items():
        total = total + TASKS[name].loss(output, batch.labels[name], 0.0)
    total.backward(create_graph=True)
    parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
    torch.nn.utils.clip_grad_norm_(parameters, options.clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def print_averages(median: dict[str, float]) -> None:
    """Print the average step at each interval, compared with AdamW."""
    rows = []
    for name in ("SophiaH", "SophiaG"):
        between, refresh = (
            median[f"{name}, {kind}"] for kind in ("between estimates", "with an estimate")
        )
        averages = [((k - 1) * between + refresh) / k / median["AdamW"] for k in INTERVALS]
        rows.append([name, *(f"{average:.2f}" for average in averages)])
    print()
    print_table(["average step / AdamW", *(f"every {k} steps" for k in INTERVALS)], rows)


def main() -> None:
    parser = new_parser(__doc__, steps=10)
    parser.add_argument("--bert_model", default="minilm", help="default: minilm")
    parser.add_argument("--memory_of", choices=KINDS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    flush_denormals()  # as all programs do
    kinds = [args.memory_of] if args.memory_of else list(KINDS)
    if any("SophiaH" in kind for kind in kinds):
        keep_freed_memory()  # like a run with SophiaH; other steps do not notice
    flags = ["--data_dir", args.data_dir, "--bert_model", args.bert_model]
    inputs = Inputs(args.data_dir, args.bert_model, args.steps)
    steps = Steps(inputs, kinds, flags)
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    for number, window in enumerate(inputs.windows):
        for kind in in_turns(kinds, number):
            times[kind].append(steps(kind, window))
    if args.memory_of:
        return print(resident_peak())

    median = medians(times)
    print(f"{args.steps} steps of each kind, {torch.get_num_threads()} threads")
    rows = []
    for kind, mine in median.items():
        ask = ["--memory_of", kind, "--steps", min(args.steps, 4), *flags]
        memory = ask_process(__file__, ask)
        rows.append([kind, f"{mine:.3f}", f"{mine / median['AdamW']:.2f}", f"{memory:.0f}"])
    print_table(["step", "median, s", "/ AdamW", "peak memory, MB"], rows)
    print_averages(median)


if __name__ == "__main__":
    main()
