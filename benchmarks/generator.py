"""Train the small generator of synthetic.py, compared with padding and the whole vocabulary.

    python benchmarks/generator.py --data_dir data

The peer is the same model on random rows, padded to the longest one, with all word pieces of the
tokenizer in its output. The two take turns, step by step. With `--whole`, both are then trained to
the end. The held-out loss is in nats for a word piece of dev that also occurs in the training set:
both leave out the others, and the peer's softmax is over all word pieces.
"""

import argparse
import math
import tempfile
from pathlib import Path

import torch
from measuring import WARM_UP, in_turns, new_parser, print_table, seconds
from throughput import MatrixRate

import synthetic
from base_bert import BertConfig
from datasets import Example
from generators import CausalLM, Row, SmallGenerator
from optimizer import AdamW
from utils import flush_denormals, keep_freed_memory, seed_everything

ROWS = 32  # of a batch of the peer


class Padded(SmallGenerator):
    """The peer."""

    def _make_model(self, train: list[Example]) -> None:
        super()._make_model(train)
        first = self.END + 1
        self.ids = {piece: first + piece for piece in self.ids}
        sizes = vars(self.model.config) | {"vocab_size": first + self.tokenizer.vocab_size}
        self.model = CausalLM(BertConfig(**sizes))

    def _batches(self, rows: list[Row]) -> list[list[Row]]:
        return [rows[start : start + ROWS] for start in range(0, len(rows), ROWS)]

    def _losses(self, rows: list[Row]) -> torch.Tensor:
        longest = max(len(row.ids) for row in rows)
        padded = [Row(row.ids + [self.END] * (longest - len(row.ids)), 1) for row in rows]
        is_real = [[column < len(row.ids) for column in range(1, longest)] for row in rows]
        return super()._losses(padded)[torch.tensor(is_real).flatten()]


class Contender:
    """A generator with its optimizer, the batches of an epoch, and what has been measured."""

    def __init__(self, kind: type[SmallGenerator], args: argparse.Namespace, train: list[Example]):
        seed_everything(0)
        self.generator = kind(args, torch.device("cpu"))
        self.generator._make_model(train)
        rows = self.generator._encode(train)
        shuffled = [rows[number] for number in torch.randperm(len(rows)).tolist()]
        batches = self.generator._batches(shuffled)
        self.n_batches, self.n_tokens = len(batches), sum(len(row.ids) - 1 for row in rows)
        # Batches of all lengths: the steps that are measured are like an epoch.
        self.batches = [batches[number] for number in torch.randperm(len(batches)).tolist()]
        self.optimizer = AdamW(self.generator.model.parameters())
        self.seconds, self.tokens = 0.0, 0

    def step(self, number: int) -> None:
        batch = self.batches[number % len(self.batches)]
        self.generator.model.train()
        taken = seconds(lambda: self.generator._train_step(batch, self.optimizer))
        if number >= WARM_UP:
            self.seconds += taken
            self.tokens += sum(len(row.ids) - 1 for row in batch)


def main() -> None:
    parser = new_parser(__doc__, steps=40)
    parser.add_argument("--precision", default="float32", choices=synthetic.PRECISIONS)
    parser.add_argument("--whole", action="store_true", help="also train both to the end: minutes")
    args = parser.parse_args()
    flush_denormals()  # as all programs do
    keep_freed_memory()
    flags = ["--generator", "small", "--output", "-", "--data_dir", args.data_dir]
    chosen = synthetic.parse([*flags, "--precision", args.precision])
    real = synthetic.read_real(chosen)
    dev = [example for example in real["dev"] if not math.isnan(example.label)]
    kinds = {"this project": SmallGenerator, "padded, all word pieces": Padded}
    contenders = {name: Contender(kind, chosen, real["train"]) for name, kind in kinds.items()}
    ours = contenders["this project"].generator
    rate = MatrixRate(ours.model.config, ours.TOKENS, ours.device, args.precision)
    rates = []
    for number in range(WARM_UP + args.steps):
        for name in in_turns(contenders, number):
            contenders[name].step(number)
        rates.append(rate.flops / seconds(rate))
    flop = sorted(rates)[len(rates) // 2] / 1e9
    print(f"{torch.get_num_threads()} threads; matrices at {flop:.0f} GFLOP/s")
    pieces = [piece for row in ours._word_pieces(dev) for piece in row]
    unknown = sum(piece not in ours.ids for piece in pieces)
    print(f"{unknown} of {len(pieces)} word pieces of dev do not occur in training")
    rows = []
    for name, contender in contenders.items():
        epoch = contender.n_tokens * contender.seconds / contender.tokens
        cells = [name, f"{contender.n_batches / epoch:.2f}", f"{epoch:.0f}", "", ""]
        if args.whole:
            with tempfile.TemporaryDirectory() as folder:
                seed_everything(0)
                generator = kinds[name](chosen, ours.device)
                taken = seconds(lambda: generator.fit(real["train"], dev, Path(folder)))
            cells[3:] = [f"{taken:.0f}", f"{math.log(generator.perplexity(dev)):.3f}"]
        rows.append(cells)
    print_table(["", "batches/s", "an epoch, s", "whole training, s", "held-out loss"], rows)


if __name__ == "__main__":
    main()
