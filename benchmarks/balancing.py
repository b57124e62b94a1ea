"""Measure the cost of a training step with learned weights of losses and with PCGrad.

    python benchmarks/balancing.py --data_dir data

Steps of all kinds take turns on the same rows in one run. The rate is 0, so the models stay equal.
"""

import contextlib
import io

import torch
from measuring import in_turns, medians, new_parser, print_table, seconds
from throughput import Inputs, mc

from optimizer import build_optimizer
from options import parse_options
from tasks import TASKS
from utils import flush_denormals

KINDS = {
    "plain sum": [],
    "learned": ["--loss_weights", "learned"],
    "pcgrad": ["--gradient_surgery", "pcgrad"],
}


def main() -> None:
    parser = new_parser(__doc__, steps=10)
    parser.add_argument("--bert_model", default="minilm", help="default: minilm")
    parser.add_argument("--precision", default="auto", help="default: auto")
    args = parser.parse_args()
    flush_denormals()  # as all programs do
    torch.set_num_threads(1)
    inputs = Inputs(args.data_dir, args.bert_model, args.steps)
    runs = {}
    for kind, flags in KINDS.items():
        options = parse_options([*flags, "--lr", "0", "--precision", args.precision])
        model = mc.MultitaskBERT(inputs.bert, TASKS, kind == "learned").train()
        with contextlib.redirect_stdout(io.StringIO()):
            runs[kind] = model, build_optimizer(model, options), options
    times: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for number, window in enumerate(inputs.windows):
        for kind in in_turns(KINDS, number):
            model, optimizer, options = runs[kind]
            step = lambda: mc.training_step(model, window, optimizer, options)  # noqa: B023, E731
            times[kind].append(seconds(step))
    median = medians(times)
    rows = [[k, f"{t:.3f}", f"{t / median['plain sum']:.2f}"] for k, t in median.items()]
    print_table(["step", "median, s", "/ plain sum"], rows)


if __name__ == "__main__":
    main()
