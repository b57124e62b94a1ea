"""Measure evaluation and training steps of a mixture of experts, compared with one encoder.

    python benchmarks/experts.py --data_dir data

All take turns on the same rows in one run. The gate is new, as at the start of a run, but its bias
is set so that each expert has about a third of the sentences. Peak memory is that of training in a
process of its own.
"""

import argparse
import contextlib
import copy
import io

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
from moe import N_EXPERTS, with_experts
from optimizer import build_optimizer
from options import parse_options
from utils import flush_denormals

KINDS = {"one encoder": None, "soft": "soft", "hard": "hard"}


class Contender:
    """A model of one kind with its optimizer."""

    def __init__(self, kind: str, inputs: Inputs, flags: list[str]):
        gating, bert = KINDS[kind], copy.deepcopy(inputs.bert)
        self.options = parse_options(flags + (["--moe", gating] if gating else []))
        torch.manual_seed(1)  # the same gate in all
        self.model = mc.MultitaskBERT(with_experts(bert, gating))
        if gating:
            self.shares = even_out(self.model, inputs.windows[0][0])
        with contextlib.redirect_stdout(io.StringIO()):
            self.optimizer = build_optimizer(self.model, self.options)

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> float:
        self.model.eval()
        return seconds(lambda: self.model(batch))

    def train(self, window: list[Batch]) -> float:
        self.model.train()
        step = mc.training_step
        return seconds(lambda: step(self.model, window, self.optimizer, self.options))


@torch.no_grad()
def even_out(model: mc.MultitaskBERT, batch: Batch) -> list[float]:
    """Give the gate a bias with which each expert has about a third of the sentences. Return the
    shares."""
    mixture = model.bert
    model.eval()(batch)
    logits = mixture.weights.log()  # up to a constant in each row
    bias = torch.zeros(N_EXPERTS)
    for number in range(1000):
        shares = torch.bincount((logits + bias).argmax(-1), minlength=N_EXPERTS) / len(logits)
        bias += (1 / N_EXPERTS - shares) * logits.std() / (1 + number) ** 0.5
    mixture.route.bias += bias
    return shares.tolist()


def main() -> None:
    parser = new_parser(__doc__, steps=10)
    parser.add_argument("--bert_model", default="minilm", help="default: minilm")
    parser.add_argument("--memory_of", choices=KINDS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    flush_denormals()  # as all programs do
    flags = ["--data_dir", args.data_dir, "--bert_model", args.bert_model]
    inputs = Inputs(args.data_dir, args.bert_model, args.steps)
    if args.memory_of:
        contender = Contender(args.memory_of, inputs, flags)
        for window in inputs.windows:
            contender.train(window)
        return print(resident_peak())

    contenders = {kind: Contender(kind, inputs, flags) for kind in KINDS}
    evaluations: dict[str, list[float]] = {kind: [] for kind in KINDS}
    steps: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for number, window in enumerate(inputs.windows):
        for kind in in_turns(KINDS, number):
            evaluations[kind].append(contenders[kind].evaluate(window[0]))
    for number, window in enumerate(inputs.windows):
        for kind in in_turns(KINDS, number):
            steps[kind].append(contenders[kind].train(window))
    shares = ", ".join(f"{share:.2f}" for share in contenders["soft"].shares)
    print(f"{args.steps} batches, {torch.get_num_threads()} threads; the gate's shares: {shares}")
    columns = medians(evaluations), medians(steps)
    rows = []
    for kind in KINDS:
        ask = ["--memory_of", kind, "--steps", min(args.steps, 3), *flags]
        cells = [
            (f"{column[kind]:.3f}", f"{column[kind] / column['soft']:.2f}") for column in columns
        ]
        rows.append([kind, *cells[0], *cells[1], f"{ask_process(__file__, ask):.0f}"])
    header = ["encoder", "evaluation, s", "/ soft", "training step, s", "/ soft", "peak memory, MB"]
    print_table(header, rows)


if __name__ == "__main__":
    main()
