"""Time training steps and evaluation: this project compared with a plain `transformers` loop.

    python benchmarks/throughput.py --data_dir data

The peer is `transformers.BertModel` with SDPA attention, the same heads, each sentence column
padded to its longest sentence, and `torch.optim.AdamW(fused=True)`. A second peer does what more
care would do: all columns of a step are one padded batch, which is on the device before the clock
starts, and with `--compile` the encoder is compiled. Each contender is a process of its own, as
its users would run it. They take turns on the same rows, and one works while the others wait, so
that the machine's noise affects all alike and no one's memory disturbs the others.

The limit is the arithmetic of the real tokens, forward and backward, attention included, divided by
the rate at which this machine multiplies matrices, measured between the steps: of this encoder's
shapes, and large square ones. On a GPU, a step's time without the sum of its kernels is what is lost
between them.
"""

import argparse
import contextlib
import copy
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import transformers  # before our root is on the path: it looks for a package named datasets
from measuring import (
    ROOT,
    WARM_UP,
    in_turns,
    medians,
    new_parser,
    print_table,
    resident_peak,
    seconds,
)
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

sys.path.insert(0, str(ROOT))

import multitask_classifier as mc
from base_bert import BertConfig
from batches import EpochSampler, ahead, evaluation_batches, training_windows
from bert import BertModel
from datasets import TaskDataset, load_data
from evaluation import outputs
from flags import PRECISIONS
from graphs import StepGraphs
from optimizer import build_optimizer
from options import parse_options
from tasks import TASKS
from tokenizer import BertTokenizer
from utils import autocast, flush_denormals, half_dtype, pick_device, seed_everything

OURS, PEER, FAIRER = "this project", "transformers", "transformers, one batch"
BATCH_SIZE = 64
# Kinds of kernels, by their names.
KERNELS = {
    "attention": "flash|fmha|attention|^(forward|backward)_kernel",
    "matrices": "gemm|nvjet|cutlass|cublas|splitk",
    "optimizer": "adam|multi_tensor",
}
BASE = BertConfig()  # BERT-base, which gets random weights


class Inputs:
    """What both contenders work on: the data, and the weights of a BERT."""

    def __init__(
        self,
        data_dir: str,
        bert_model: str,
        steps: int,
        *,
        base: bool = False,
        use_gpu: bool = False,
        precision: str = "auto",
        compile: bool = False,
    ):
        self.compile = compile
        seed_everything(0)
        self.device = pick_device(use_gpu)
        flags = ["--data_dir", data_dir, "--bert_model", bert_model, "--precision", precision]
        self.options = parse_options(flags)
        tokenizer = BertTokenizer.from_pretrained(bert_model)
        self.bert = BertModel(BASE) if base else BertModel.from_pretrained(bert_model)
        max_length = self.bert.config.max_position_embeddings
        splits = load_data(self.options, tokenizer, max_length, ("train", "dev"))
        self.train, self.dev = splits["train"], splits["dev"]
        samplers = {name: EpochSampler(len(dataset), 0) for name, dataset in self.train.items()}
        n_rows = BATCH_SIZE * (steps + WARM_UP)
        self.windows = list(training_windows(self.train, samplers, n_rows, BATCH_SIZE, 1))


# ------------------------------------------------------------------------------------ contenders


class PeerModel(nn.Module):
    """The usual way to do it: pad each column, one encoder pass per column, masked pooling."""

    def __init__(self, ours: mc.MultitaskBERT):
        super().__init__()
        settings: dict[str, Any] = vars(ours.bert.config) | {"attn_implementation": "sdpa"}
        self.bert = transformers.BertModel(transformers.BertConfig(**settings))
        self.bert.load_state_dict(ours.bert.state_dict())
        self.attention_layer = copy.deepcopy(ours.attention_layer)
        self.heads = copy.deepcopy(ours.heads)

    def embed(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        hidden_states = self.bert(input_ids, mask).last_hidden_state
        layer = self.attention_layer
        scores = layer.v(torch.tanh(layer.W(hidden_states))).masked_fill(mask[..., None] == 0, -1e9)
        return (scores.softmax(dim=1) * hidden_states).sum(dim=1)

    def forward(self, name: str, columns: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        return self.heads[name](*(self.embed(*column) for column in columns))


def pad_columns(
    dataset: TaskDataset, rows: Iterable[int], device: torch.device
) -> list[tuple[Tensor, Tensor]]:
    """Return the ids and the mask of each sentence column, padded."""
    columns = []
    for column in dataset.columns:
        ids = [torch.from_numpy(column.row(row)[0]).long() for row in rows]
        mask = pad_sequence([torch.ones_like(sentence) for sentence in ids], batch_first=True)
        columns.append((pad_sequence(ids, batch_first=True).to(device), mask.to(device)))
    return columns


class Ours:
    """This project's model and steps."""

    def __init__(self, inputs: Inputs):
        self.inputs = inputs
        self.model = mc.MultitaskBERT(inputs.bert).to(inputs.device).train()
        self.optimizer = build_optimizer(self.model, inputs.options)

        self.graphs = StepGraphs.of(self.model, inputs.options)
        batches = ahead(iter(inputs.windows), inputs.device)
        self.windows = list(batches)  # in a run, a thread makes them during the step before

    def step(self, number: int) -> None:
        aids = None, self.graphs
        mc.training_step(
            self.model, self.windows[number], self.optimizer, self.inputs.options, *aids
        )

    def evaluate(self, dataset: TaskDataset) -> None:
        outputs(self.model, dataset, BATCH_SIZE, self.inputs.options.precision)


class Peer:
    """The peer's model and steps."""

    def __init__(self, inputs: Inputs):
        self.inputs = inputs
        self.model = PeerModel(mc.MultitaskBERT(inputs.bert)).to(inputs.device).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=8e-5, fused=True)

    def step(self, number: int) -> None:
        (batch,) = self.inputs.windows[number]
        device, options = self.inputs.device, self.inputs.options
        total = torch.zeros((), device=device)
        with autocast(device, options.precision):
            for name, output in self.outputs(number).items():
                loss = TASKS[name].loss(output.float(), batch.labels[name].to(device), 0.0)
                total = total + loss
        total.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), options.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def outputs(self, number: int) -> dict[str, Tensor]:
        """Return the outputs of each task for the rows of a step."""
        (batch,) = self.inputs.windows[number]
        train, device = self.inputs.train, self.inputs.device
        return {
            name: self.model(name, pad_columns(train[name], rows, device))
            for name, rows in batch.rows.items()
        }

    @torch.no_grad()
    def evaluate(self, dataset: TaskDataset) -> None:
        device = self.inputs.device
        self.model.eval()
        for start in range(0, len(dataset), BATCH_SIZE):
            rows = range(start, min(start + BATCH_SIZE, len(dataset)))
            with autocast(device, self.inputs.options.precision):
                output = self.model(dataset.task.name, pad_columns(dataset, rows, device))
            dataset.task.decode(output.float()).cpu()
        self.model.train()


class FairerPeer(Peer):
    """All columns of a step in one padded batch, prepared ahead; evaluation in order of length."""

    def __init__(self, inputs: Inputs):
        super().__init__(inputs)
        if inputs.compile:
            self.model.bert.compile(dynamic=True)
        train = inputs.train
        self.prepared = [
            self.one_batch({name: (train[name], rows) for name, rows in window[0].rows.items()})
            for window in inputs.windows
        ]

    def one_batch(
        self, parts: Mapping[str, tuple[TaskDataset, Iterable[int]]]
    ) -> tuple[list[tuple[str, int, int]], Tensor, Tensor]:
        """Return (task, columns, rows) of each part, and the padded ids and mask of all."""
        blocks, ids = [], []
        for name, (dataset, rows) in parts.items():
            rows = list(rows)
            blocks.append((name, len(dataset.columns), len(rows)))
            ids += [
                torch.from_numpy(column.row(row)[0]).long()
                for column in dataset.columns
                for row in rows
            ]
        mask = pad_sequence([torch.ones_like(sentence) for sentence in ids], batch_first=True)
        device = self.inputs.device
        return blocks, pad_sequence(ids, batch_first=True).to(device), mask.to(device)

    def answer(
        self, blocks: list[tuple[str, int, int]], ids: Tensor, mask: Tensor
    ) -> dict[str, Tensor]:
        vectors = self.model.embed(ids, mask).split([n * rows for _, n, rows in blocks])
        return {
            name: self.model.heads[name](*of_task.split(rows))
            for (name, _, rows), of_task in zip(blocks, vectors, strict=True)
        }

    def outputs(self, number: int) -> dict[str, Tensor]:
        return self.answer(*self.prepared[number])

    @torch.no_grad()
    def evaluate(self, dataset: TaskDataset) -> None:
        task, device = dataset.task, self.inputs.device
        self.model.eval()
        order = dataset.n_tokens.argsort()[::-1]
        for start in range(0, len(order), BATCH_SIZE):
            rows = order[start : start + BATCH_SIZE]
            with autocast(device, self.inputs.options.precision):
                output = self.answer(*self.one_batch({task.name: (dataset, rows)}))[task.name]
            task.decode(output.float()).cpu()
        self.model.train()


CONTENDERS: dict[str, type[Ours] | type[Peer]] = {OURS: Ours, PEER: Peer, FAIRER: FairerPeer}


# --------------------------------------------------------------------------------------- the limit


def encoder_flops(config: BertConfig, lengths: list[int], training: bool) -> float:
    """Return the arithmetic of the real tokens: linear layers, attention and pooling. The backward
    pass costs twice the forward pass."""
    size, tokens = config.hidden_size, sum(lengths)
    linear = 2 * tokens * (4 * size**2 + 2 * size * config.intermediate_size)
    attention = 4 * size * sum(length**2 for length in lengths)
    pooling = 2 * tokens * size**2
    return (config.num_hidden_layers * (linear + attention) + pooling) * (3 if training else 1)


class MatrixRate:
    """Multiplies matrices with the shapes of one encoder layer, forward and backward."""

    def __init__(self, config: BertConfig, tokens: int, device: torch.device, precision: str):
        dtype = half_dtype(device, precision) or torch.float32
        size, inner = config.hidden_size, config.intermediate_size
        shapes = (size, 3 * size), (size, size), (size, inner), (inner, size)
        self.pairs = [
            (
                torch.randn(tokens, n_in, device=device, dtype=dtype),
                torch.randn(n_out, n_in, device=device, dtype=dtype),
            )
            for n_in, n_out in shapes
        ]
        # Results are allocated once: the limit is the arithmetic, not the kernel's page faults.
        self.outputs = [torch.mm(x, w.t()) for x, w in self.pairs]
        self.gradients = [(torch.empty_like(x), torch.empty_like(w)) for x, w in self.pairs]
        self.flops = sum(3 * 2 * x.shape[0] * w.numel() for x, w in self.pairs)

    def __call__(self) -> None:
        products = zip(self.pairs, self.outputs, self.gradients, strict=True)
        for (x, w), y, (grad_x, grad_w) in products:
            torch.mm(x, w.t(), out=y)
            torch.mm(y, w, out=grad_x)
            torch.mm(y.t(), x, out=grad_w)


# ------------------------------------------------------------------------------------- processes


def read_inputs(args: argparse.Namespace) -> Inputs:
    choices = dict(base=args.base, use_gpu=args.use_gpu, precision=args.precision)
    choices["compile"] = args.compile
    return Inputs(args.data_dir, args.bert_model, args.steps, **choices)


def serve(args: argparse.Namespace) -> None:
    """Be the process of a contender: do what each line of standard input says, and answer with one
    number."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # other prints must not look like answers
    if args.worker == OURS:
        flush_denormals()  # as multitask_classifier.py does
    inputs = read_inputs(args)
    contender = CONTENDERS[args.worker](inputs)
    kernels: dict[str, float] = {}
    for line in sys.stdin:
        work, _, what = line.strip().partition(" ")
        if work == "step":
            number = int(what)
            answer = seconds(lambda: contender.step(number), inputs.device)
        elif work == "evaluate":
            answer = seconds(lambda: contender.evaluate(inputs.dev[what]), inputs.device)
        elif work == "kernels":
            kernels = kernels or kernel_seconds(contender)
            answer = kernels[what]
        elif inputs.device.type == "cuda":
            answer = torch.cuda.max_memory_reserved() / 1e6
        else:
            answer = resident_peak()
        print(answer, file=answers, flush=True)


def kernel_seconds(contender: Ours | Peer) -> dict[str, float]:
    """Return the seconds of a step's kernels on the GPU, by kind; the mean of five steps."""
    n_steps = min(5, len(contender.inputs.windows))
    cuda = torch.profiler.ProfilerActivity.CUDA
    with torch.profiler.profile(activities=[cuda]) as profiler:
        for number in range(n_steps):
            contender.step(number)
        torch.cuda.synchronize()
    times = dict.fromkeys((*KERNELS, "other"), 0.0)
    for event in profiler.key_averages():
        kinds = (kind for kind, names in KERNELS.items() if re.search(names, event.key, re.I))
        times[next(kinds, "other")] += event.self_device_time_total / 1e6 / n_steps
    return times


class Worker:
    """The process of a contender, seen from its parent."""

    def __init__(self, name: str, args: argparse.Namespace):
        command = [sys.executable, __file__, "--worker", name, "--steps", str(args.steps)]
        command += ["--data_dir", args.data_dir, "--bert_model", args.bert_model]
        command += ["--precision", args.precision]
        command += [f"--{flag}" for flag in ("use_gpu", "base", "compile") if getattr(args, flag)]
        # As multitask_classifier.py sets it.
        own = {"GOMP_SPINCOUNT": "1000"} if name == OURS else {}
        pipe = subprocess.PIPE
        self.name = name
        self.process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, text=True, env=own | os.environ
        )

    def __call__(self, *request: object) -> float:
        assert self.process.stdin and self.process.stdout
        print(*request, file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"{self.name}: failed, see above")
        return float(answer)

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


# ---------------------------------------------------------------------------------------- results


class Results(NamedTuple):
    """Measurements: contender -> seconds or MB; and rates of matrix products in FLOP/s."""

    steps: dict[str, list[float]]
    evaluations: dict[str, list[float]]
    memory: dict[str, float]
    rate: float  # of the encoder's shapes
    large: float  # of large square matrices
    kernels: dict[str, dict[str, float]]  # kind -> seconds of a step; empty without a GPU


def measure(
    inputs: Inputs, workers: dict[str, Worker], precision: str, n_evaluations: int
) -> Results:
    """Take steps of all and multiply matrices in turns; then evaluate in turns."""
    mean_tokens = int(statistics.mean(sum(window[0].lengths) for window in inputs.windows))
    matrices = MatrixRate(inputs.bert.config, mean_tokens, inputs.device, precision)
    size = 8192 if inputs.device.type == "cuda" else 2048
    square = torch.randn(size, size, device=inputs.device, dtype=matrices.outputs[0].dtype)
    product = torch.mm(square, square)
    matrices()
    steps: dict[str, list[float]] = {name: [] for name in workers}
    evaluations: dict[str, list[float]] = {name: [] for name in workers}
    rates, large = [], []
    for number in range(len(inputs.windows)):
        for name in in_turns(workers, number):
            steps[name].append(workers[name]("step", number))
        rates.append(matrices.flops / seconds(matrices, inputs.device))
        one = seconds(lambda: torch.mm(square, square, out=product), inputs.device)
        large.append(2 * size**3 / one)
    memory = {name: worker("peak") for name, worker in workers.items()}
    for number in range(n_evaluations):
        times = dict.fromkeys(workers, 0.0)
        for task in inputs.dev:
            for name in in_turns(workers, number):
                times[name] += workers[name]("evaluate", task)
            rates.append(matrices.flops / seconds(matrices, inputs.device))
        for name, total in times.items():
            evaluations[name].append(total)
    kinds = [*KERNELS, "other"] if inputs.device.type == "cuda" else []
    kernels = {
        name: {kind: worker("kernels", kind) for kind in kinds} for name, worker in workers.items()
    }
    middle = statistics.median(rates[WARM_UP:]), statistics.median(large[WARM_UP:])
    return Results(steps, evaluations, memory, *middle, kernels)


def report(inputs: Inputs, results: Results, n_steps: int, n_evaluations: int) -> None:
    """Print the medians, compared with the peers and with the limit."""
    rate, config = results.rate, inputs.bert.config
    batches = [window[0].lengths for window in inputs.windows[WARM_UP:]]
    dev = [
        batch.lengths
        for dataset in inputs.dev.values()
        for batch in evaluation_batches(dataset, BATCH_SIZE)
    ]
    flops = [
        statistics.median(encoder_flops(config, lengths, True) for lengths in batches),
        sum(encoder_flops(config, lengths, False) for lengths in dev),
    ]
    tokens = [statistics.median(map(sum, batches)), sum(map(sum, dev))]
    print(
        f"{inputs.device}, {torch.get_num_threads()} threads, {tokens[0]:.0f} real tokens a step,"
    )
    print(f"{n_steps} steps, {n_evaluations} evaluations, matrices of these shapes")
    print(f"{rate / 1e9:.0f} GFLOP/s, large ones {results.large / 1e9:.0f} GFLOP/s")
    rows = []
    works = {"training step": medians(results.steps), "evaluation": medians(results.evaluations, 0)}
    for (work, median), n_flops, n in zip(works.items(), flops, tokens, strict=True):
        for name, mine in median.items():
            memory = f"{results.memory[name]:.0f}" if work == "training step" else ""
            peers = [f"{median[peer] / mine:.2f}" for peer in (PEER, FAIRER)]
            shares = [f"{n_flops / each / mine:.0%}" for each in (rate, results.large)]
            cells = f"{mine:.4g}", f"{n / mine:.0f}", *peers, *shares
            rows.append([f"{work}, {name}", *cells, memory])
    header = ["median, s", "tokens/s", "peer / this", "second peer / this"]
    print_table(["", *header, "limit", "of large", "peak MB"], rows)
    for name, kernels in results.kernels.items():
        if kernels:
            wall, total = works["training step"][name], sum(kernels.values())
            kinds = ", ".join(f"{kind} {each * 1e3:.1f}" for kind, each in kernels.items())
            lost = f"{(wall - total) * 1e3:.1f} ms lost between them ({1 - total / wall:.0%})"
            print(f"{name}: a step's kernels take {total * 1e3:.1f} ms ({kinds}); {lost}")


def main() -> None:
    parser = new_parser(__doc__, steps=30)
    flag = parser.add_argument
    flag("--bert_model", default="minilm", help="default: minilm")
    flag("--base", action="store_true", help="BERT-base's sizes with random weights")
    flag("--evaluations", type=int, default=3, help="measured evaluations; default: 3")
    flag("--quick", action="store_true", help="one step, one evaluation: does it run?")
    flag("--use_gpu", action="store_true")
    flag("--compile", action="store_true", help="compile the second peer's encoder")
    flag("--precision", choices=PRECISIONS, default="auto", help="as in training; default: auto")
    flag("--worker", choices=tuple(CONTENDERS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.quick:
        args = argparse.Namespace(**vars(args) | dict(steps=1, evaluations=1))
    if args.worker:
        return serve(args)
    with contextlib.ExitStack() as stack:
        workers = {}
        for name in CONTENDERS:
            workers[name] = Worker(name, args)
            stack.callback(workers[name].close)
        inputs = read_inputs(args)
        results = measure(inputs, workers, args.precision, args.evaluations)
        report(inputs, results, args.steps, args.evaluations)


if __name__ == "__main__":
    main()
