"""Time training steps and evaluation: this project beside a plain `transformers` loop.

    python benchmarks/throughput.py --data_dir data

The peer is `transformers.BertModel` with SDPA attention, the same heads, each sentence column padded
to its longest sentence, and `torch.optim.AdamW(fused=True)`. Each of the two is a process of its
own, as its users would run it, and they take turns on the same rows, one working while the other
waits, so that the machine's noise hits both alike and neither's memory disturbs the other's. The
limit is the arithmetic of the real tokens, forward and backward, attention included, over the rate
at which this machine multiplies matrices of this encoder's shapes, measured between the steps.
"""

import argparse
import contextlib
import copy
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import transformers  # before our root is on the path: it looks for a package named datasets
from torch import nn
from torch.nn.utils.rnn import pad_sequence

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import multitask_classifier as mc  # noqa: E402
from base_bert import BertConfig  # noqa: E402
from batches import EpochSampler  # noqa: E402
from batches import evaluation_batches  # noqa: E402
from batches import training_windows  # noqa: E402
from bert import BertModel  # noqa: E402
from datasets import load_data  # noqa: E402
from evaluation import predict  # noqa: E402
from optimizer import build_optimizer  # noqa: E402
from options import PRECISIONS  # noqa: E402
from options import parse_options  # noqa: E402
from tasks import TASKS  # noqa: E402
from tokenizer import BertTokenizer  # noqa: E402
from utils import autocast  # noqa: E402
from utils import pick_device  # noqa: E402
from utils import seed_everything  # noqa: E402

OURS, PEER = "this project", "transformers"
BATCH_SIZE = 64
WARM_UP = 3  # steps before those that count
BASE = BertConfig()  # BERT-base with random weights, where its own cannot be had


class PeerModel(nn.Module):
    """What many would write: pad each column, one encoder pass a column, masked pooling."""

    def __init__(self, ours: mc.MultitaskBERT):
        super().__init__()
        config = transformers.BertConfig(**vars(ours.bert.config), attn_implementation="sdpa")
        self.bert = transformers.BertModel(config)
        self.bert.load_state_dict(ours.bert.state_dict())
        self.attention_layer = copy.deepcopy(ours.attention_layer)
        self.heads = copy.deepcopy(ours.heads)

    def embed(self, input_ids, mask):
        hidden_states = self.bert(input_ids, mask).last_hidden_state
        layer = self.attention_layer
        scores = layer.v(torch.tanh(layer.W(hidden_states))).masked_fill(mask[..., None] == 0, -1e9)
        return (scores.softmax(dim=1) * hidden_states).sum(dim=1)

    def forward(self, name, columns):
        return self.heads[name](*(self.embed(*column) for column in columns))


def pad_columns(dataset, rows, device):
    columns = []
    for column in dataset.columns:
        ids = [torch.from_numpy(column.row(row)[0]).long() for row in rows]
        padded = pad_sequence(ids, batch_first=True)
        mask = pad_sequence([torch.ones_like(each) for each in ids], batch_first=True)
        columns.append((padded.to(device), mask.to(device)))
    return columns


def peer_step(model, optimizer, data, batch, options, device):
    total = 0.0
    with autocast(device, options.precision):
        for name, rows in batch.rows.items():
            output = model(name, pad_columns(data[name], rows, device))
            total = total + TASKS[name].loss(output.float(), batch.labels[name].to(device))
    total.backward()
    nn.utils.clip_grad_norm_(model.parameters(), options.clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


@torch.no_grad()
def peer_predict(model, dataset, batch_size, device, precision):
    model.eval()
    for start in range(0, len(dataset), batch_size):
        rows = range(start, min(start + batch_size, len(dataset)))
        with autocast(device, precision):
            output = model(dataset.task.name, pad_columns(dataset, rows, device))
        dataset.task.decode(output.float()).cpu()
    model.train()


def encoder_flops(config: BertConfig, lengths: list[int], training: bool) -> float:
    """Of the real tokens: linear layers, attention and pooling; backward costs twice forward."""
    size, tokens = config.hidden_size, sum(lengths)
    linear = 2 * tokens * (4 * size**2 + 2 * size * config.intermediate_size)
    attention = 4 * size * sum(length**2 for length in lengths)
    pooling = 2 * tokens * size**2
    return (config.num_hidden_layers * (linear + attention) + pooling) * (3 if training else 1)


class MatrixRate:
    """Multiplies matrices of one encoder layer's shapes, forward and backward, timed."""

    def __init__(self, config: BertConfig, tokens: int, device: torch.device, precision: str):
        with autocast(device, precision):
            half = torch.is_autocast_enabled(device.type)
        dtype = torch.bfloat16 if half else torch.float32
        size, inner = config.hidden_size, config.intermediate_size
        self.pairs = [
            (
                torch.randn(tokens, i, device=device, dtype=dtype),
                torch.randn(o, i, device=device, dtype=dtype),
            )
            for i, o in ((size, 3 * size), (size, size), (size, inner), (inner, size))
        ]
        # Results are allocated once: the limit is the arithmetic, not the kernel's page faults.
        self.outputs = [torch.mm(x, w.t()) for x, w in self.pairs]
        self.gradients = [(torch.empty_like(x), torch.empty_like(w)) for x, w in self.pairs]
        self.flops = sum(3 * 2 * x.shape[0] * w.numel() for x, w in self.pairs)

    def __call__(self):
        for (x, w), y, (grad_x, grad_w) in zip(self.pairs, self.outputs, self.gradients):
            torch.mm(x, w.t(), out=y)
            torch.mm(y, w, out=grad_x)
            torch.mm(y.t(), x, out=grad_w)


def seconds(work, device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


class Inputs:
    """What both contenders work on: the data, and a BERT's weights."""

    def __init__(self, args, precision: str = "auto"):
        seed_everything(0)
        self.device = pick_device(args.use_gpu)
        flags = ["--data_dir", args.data_dir, "--bert_model", args.bert_model]
        flags += ["--precision", precision]
        self.options = parse_options(flags)
        tokenizer = BertTokenizer.from_pretrained(args.bert_model)
        self.bert = BertModel(BASE) if args.base else BertModel.from_pretrained(args.bert_model)
        max_length = self.bert.config.max_position_embeddings
        splits = load_data(self.options, tokenizer, max_length, ("train", "dev"))
        self.train, self.dev = splits["train"], splits["dev"]
        samplers = {name: EpochSampler(len(each), 0) for name, each in self.train.items()}
        n_rows = BATCH_SIZE * (args.steps + WARM_UP)
        self.windows = list(training_windows(self.train, samplers, n_rows, BATCH_SIZE, 1))


class Ours:
    def __init__(self, inputs: Inputs):
        self.inputs = inputs
        self.model = mc.MultitaskBERT(inputs.bert).to(inputs.device).train()
        self.optimizer = build_optimizer(self.model, inputs.options)

    def step(self, window):
        mc.training_step(self.model, window, self.optimizer, self.inputs.options)

    def evaluate(self, dataset):
        predict(self.model, dataset, BATCH_SIZE, self.inputs.options.precision)


class Peer:
    def __init__(self, inputs: Inputs):
        self.inputs = inputs
        self.model = PeerModel(mc.MultitaskBERT(inputs.bert)).to(inputs.device).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=8e-5, fused=True)

    def step(self, window):
        inputs = self.inputs
        peer_step(
            self.model, self.optimizer, inputs.train, window[0], inputs.options, inputs.device
        )

    def evaluate(self, dataset):
        precision = self.inputs.options.precision
        peer_predict(self.model, dataset, BATCH_SIZE, self.inputs.device, precision)


CONTENDERS = {OURS: Ours, PEER: Peer}


def serve(args) -> None:
    """The worker's side: do what each line of standard input says, answer with one number."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else prints must not look like an answer
    inputs = Inputs(args, args.precision)
    contender = CONTENDERS[args.worker](inputs)
    for line in sys.stdin:
        work, _, what = line.strip().partition(" ")
        if work == "step":
            window = inputs.windows[int(what)]
            answer = seconds(lambda: contender.step(window), inputs.device)
        elif work == "evaluate":
            answer = seconds(lambda: contender.evaluate(inputs.dev[what]), inputs.device)
        elif inputs.device.type == "cuda":
            answer = torch.cuda.max_memory_allocated() / 1e6
        else:
            answer = resident_peak()
        print(answer, file=answers, flush=True)


class Worker:
    """The parent's side of one contender."""

    def __init__(self, name: str, args):
        command = [sys.executable, __file__, "--worker", name, "--steps", str(args.steps)]
        command += ["--data_dir", args.data_dir, "--bert_model", args.bert_model]
        command += ["--precision", args.precision]
        command += ["--use_gpu"] * args.use_gpu + ["--base"] * args.base
        own = {"GOMP_SPINCOUNT": "1000"} if name == OURS else {}  # as multitask_classifier.py sets
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=own | os.environ,
        )

    def __call__(self, *request) -> float:
        print(*request, file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"{self.process.args[3]}: failed, see above")
        return float(answer)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def resident_peak() -> float:
    """In MB. Linux starts a child's ru_maxrss at its parent's, so there VmHWM is read instead."""
    status = Path("/proc/self/status")
    if status.exists():
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1e3
    unit = 1e6 if sys.platform == "darwin" else 1e3
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def measure(inputs: Inputs, workers: dict[str, Worker], args) -> dict[str, dict]:
    """Steps of both and of the matrix multiplication in turns; then evaluations in turns."""
    mean_tokens = int(statistics.mean(sum(window[0].lengths) for window in inputs.windows))
    matrices = MatrixRate(inputs.bert.config, mean_tokens, inputs.device, args.precision)
    matrices()
    steps, evaluations = ({name: [] for name in workers} for _ in range(2))
    rates = []
    for number in range(len(inputs.windows)):
        for name in list(workers)[:: 1 if number % 2 else -1]:
            steps[name].append(workers[name]("step", number))
        rates.append(matrices.flops / seconds(matrices, inputs.device))
    memory = {name: worker("peak") for name, worker in workers.items()}
    for number in range(args.evaluations):
        times = {name: 0.0 for name in workers}
        for task in inputs.dev:
            for name in list(workers)[:: 1 if number % 2 else -1]:
                times[name] += workers[name]("evaluate", task)
            rates.append(matrices.flops / seconds(matrices, inputs.device))
        for name, total in times.items():
            evaluations[name].append(total)
    return {
        "steps": {name: each[WARM_UP:] for name, each in steps.items()},
        "evaluations": evaluations,
        "memory": memory,
        "rate": statistics.median(rates[WARM_UP:]),
    }


def report(inputs: Inputs, results: dict[str, dict], args) -> None:
    rate, config = results["rate"], inputs.bert.config
    lengths = [window[0].lengths for window in inputs.windows[WARM_UP:]]
    dev = [b.lengths for d in inputs.dev.values() for b in evaluation_batches(d, BATCH_SIZE)]
    n_flops = {
        "training step": statistics.median(encoder_flops(config, each, True) for each in lengths),
        "evaluation": sum(encoder_flops(config, each, False) for each in dev),
    }
    n_sentences = {"training step": len(lengths[0]), "evaluation": sum(map(len, dev))}
    tokens = statistics.mean(map(sum, lengths))
    print(f"{inputs.device}, {torch.get_num_threads()} threads, {tokens:.0f} real tokens a step, ")
    print(f"{args.steps} steps, {args.evaluations} evaluations, matrices {rate / 1e9:.0f} GFLOP/s")
    print("| | | median, s | sentences/s | peer / this | share of limit | peak memory, MB |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for work, times in zip(n_flops, (results["steps"], results["evaluations"])):
        medians = {name: statistics.median(each) for name, each in times.items()}
        for name, median in medians.items():
            cells = [
                f"{median:.4g}",
                f"{n_sentences[work] / median:.0f}",
                f"{medians[PEER] / median:.2f}",
                f"{n_flops[work] / rate / median:.0%}",
                f"{results['memory'][name]:.0f}" if work == "training step" else "",
            ]
            print(f"| {work} | {name} | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flag = parser.add_argument
    flag("--data_dir", default=str(ROOT / "data" / "sample"), help="default: the sample data")
    flag("--bert_model", default="minilm", help="default: minilm")
    flag("--base", action="store_true", help="BERT-base's sizes with random weights")
    flag("--steps", type=int, default=30, help="measured steps; default: 30")
    flag("--evaluations", type=int, default=3, help="measured evaluations; default: 3")
    flag("--quick", action="store_true", help="one step, one evaluation: does it run?")
    flag("--use_gpu", action="store_true")
    flag("--precision", choices=PRECISIONS, default="auto", help="as in training; default: auto")
    flag("--worker", choices=tuple(CONTENDERS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.quick:
        args.steps = args.evaluations = 1
    if args.worker:
        return serve(args)
    with contextlib.ExitStack() as stack:
        workers = {}
        for name in CONTENDERS:
            workers[name] = Worker(name, args)
            stack.callback(workers[name].close)
        inputs = Inputs(args, args.precision)
        report(inputs, measure(inputs, workers, args), args)


if __name__ == "__main__":
    main()
