"""Cost of a mixture of experts beside one encoder: evaluation and training step.

    python benchmarks/experts.py --data_dir data

All take turns on the same rows in one run. The gate is as a run begins with it, but its bias is set
so that each expert has about a third of the sentences. Peak memory is that of training in a process of
its own.
"""

import argparse
import contextlib
import copy
import io
import statistics
import subprocess
import sys

import torch
from throughput import ROOT, WARM_UP, Inputs, mc, resident_peak, seconds

from moe import N_EXPERTS, MixtureOfExperts
from optimizer import build_optimizer
from options import parse_options

KINDS = {"one encoder": None, "soft": "soft", "hard": "hard"}


class Contender:
    def __init__(self, kind: str, inputs: Inputs, args):
        flags = ["--data_dir", args.data_dir, "--bert_model", args.bert_model]
        gating, bert = KINDS[kind], copy.deepcopy(inputs.bert)
        self.options = parse_options(flags + (["--moe", gating] if gating else []))
        torch.manual_seed(1)  # the same gate in all
        self.model = mc.MultitaskBERT(MixtureOfExperts.of(bert, gating) if gating else bert)
        with contextlib.redirect_stdout(io.StringIO()):
            self.optimizer = build_optimizer(self.model, self.options)

    def evaluate(self, batch) -> float:
        self.model.eval()
        with torch.no_grad():
            return seconds(lambda: self.model(batch), torch.device("cpu"))

    def train(self, window) -> float:
        self.model.train()
        step = mc.training_step
        return seconds(
            lambda: step(self.model, window, self.optimizer, self.options), torch.device("cpu")
        )


def even_out(mixture: MixtureOfExperts, model, batch) -> list[float]:
    """Give the gate a bias with which each expert has about as many of the batch's sentences; the
    shares."""
    with torch.no_grad():
        model.eval()(batch)
        logits = mixture.weights.log()  # but for a constant of each row
        bias = torch.zeros(N_EXPERTS)
        for number in range(1000):
            shares = torch.bincount((logits + bias).argmax(-1), minlength=N_EXPERTS) / len(logits)
            bias += (1 / N_EXPERTS - shares) * logits.std() / (1 + number) ** 0.5
        mixture.route.bias += bias
    return shares.tolist()


def memory_of(kind: str, args) -> float:
    command = [sys.executable, __file__, "--memory_of", kind, "--steps", str(min(args.steps, 3))]
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
    inputs = Inputs(args)
    kinds = [args.memory_of] if args.memory_of else list(KINDS)
    contenders = {kind: Contender(kind, inputs, args) for kind in kinds}
    for each in contenders.values():
        if each.options.moe:
            shares = even_out(each.model.bert, each.model, inputs.windows[0][0])
    if args.memory_of:
        for window in inputs.windows:
            contenders[args.memory_of].train(window)
        return print(resident_peak())

    evaluation, training = ({kind: [] for kind in kinds} for _ in range(2))
    for number, window in enumerate(inputs.windows):
        for kind in kinds[:: 1 if number % 2 else -1]:
            evaluation[kind].append(contenders[kind].evaluate(window[0]))
    for number, window in enumerate(inputs.windows):
        for kind in kinds[:: 1 if number % 2 else -1]:
            training[kind].append(contenders[kind].train(window))
    print(
        f"{args.steps} batches, {torch.get_num_threads()} threads; the gate's shares at first:",
        end=" ",
    )
    print(", ".join(f"{share:.2f}" for share in shares))
    print("| encoder | evaluation, s | / soft | training step, s | / soft | peak memory, MB |")
    print("| --- " * 6 + "|")
    medians = [
        {kind: statistics.median(each[WARM_UP:]) for kind, each in times.items()}
        for times in (evaluation, training)
    ]
    for kind in kinds:
        cells = [f"{each[kind]:.3f} | {each[kind] / each['soft']:.2f}" for each in medians]
        print(f"| {kind} | {' | '.join(cells)} | {memory_of(kind, args):.0f} |")


if __name__ == "__main__":
    main()
