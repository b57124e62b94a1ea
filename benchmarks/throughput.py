"""Time training steps and evaluation: this project beside a plain `transformers` loop.

    python benchmarks/throughput.py --data_dir data

The peer is `transformers.BertModel` with SDPA attention, the same heads, each sentence column padded
to its longest sentence, and `torch.optim.AdamW(fused=True)`. Both train on the same rows and take
turns in one run, so that the machine's noise hits both alike. The limit is the arithmetic of the
real tokens, forward and backward, attention included, over the rate at which this machine multiplies
matrices of this encoder's shapes, measured between the steps. Peak memory is that of a process of
its own for each.
"""

import argparse
import copy
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as multitask_classifier.py does for its runs

import torch
import transformers  # before our root is on the path: it looks for a package named datasets
from torch import nn
from torch.nn.utils.rnn import pad_sequence

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import multitask_classifier as mc  # noqa: E402
from base_bert import BertConfig  # noqa: E402
from bert import BertModel  # noqa: E402
from datasets import TASKS, EpochSampler, evaluation_batches, training_windows  # noqa: E402
from evaluation import predict  # noqa: E402
from tokenizer import BertTokenizer  # noqa: E402
from utils import autocast, pick_device, seed_everything  # noqa: E402

OURS, PEER = "this project", "transformers"
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
        ids = [torch.from_numpy(column.row(row)).long() for row in rows]
        padded = pad_sequence(ids, batch_first=True)
        mask = pad_sequence([torch.ones_like(each) for each in ids], batch_first=True)
        columns.append((padded.to(device), mask.to(device)))
    return columns


def peer_step(model, optimizer, data, batch, options, device):
    total = 0.0
    with autocast(device):
        for name, rows in batch.rows.items():
            output = model(name, pad_columns(data[name], rows, device))
            total = total + TASKS[name].loss(output.float(), batch.labels[name].to(device))
    total.backward()
    nn.utils.clip_grad_norm_(model.parameters(), options.clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


@torch.no_grad()
def peer_predict(model, dataset, batch_size, device):
    model.eval()
    for start in range(0, len(dataset), batch_size):
        rows = range(start, min(start + batch_size, len(dataset)))
        with autocast(device):
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

    def __init__(self, config: BertConfig, tokens: int, device: torch.device):
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
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


class Bench:
    """Both contenders, on the same data, with the same start."""

    def __init__(self, args, contenders=(OURS, PEER)):
        seed_everything(0)
        self.device = device = pick_device(args.use_gpu)
        self.options = mc.parse_options(
            ["--data_dir", args.data_dir, "--bert_model", args.bert_model]
        )
        tokenizer = BertTokenizer.from_pretrained(args.bert_model)
        bert = BertModel(BASE) if args.base else BertModel.from_pretrained(args.bert_model)
        self.config = bert.config
        max_length = self.config.max_position_embeddings
        self.splits = mc.load_data(self.options, tokenizer, max_length, ("train", "dev"))
        data = self.splits["train"]
        samplers = {name: EpochSampler(len(each), 0) for name, each in data.items()}
        self.windows = list(training_windows(data, samplers, 64 * (args.steps + 2), 64, 1))
        ours = mc.MultitaskBERT(bert)
        self.works = {}
        if PEER in contenders:
            model = PeerModel(ours).to(device).train()
            optimizer = torch.optim.AdamW(model.parameters(), lr=8e-5, fused=True)
            self.peer = model
            self.works[PEER] = lambda window: peer_step(
                model, optimizer, data, window[0], self.options, device
            )
        if OURS in contenders:
            self.ours = ours.to(device).train()
            own = mc.build_optimizer(self.ours, self.options)
            self.works[OURS] = lambda window: mc.training_step(self.ours, window, own, self.options)

    def train(self):
        for window in self.windows[2:]:
            yield window

    def warm_up(self):
        for window in self.windows[:2]:
            for work in self.works.values():
                work(window)

    def predict(self, name):
        for dataset in self.splits["dev"].values():
            if name == OURS:
                predict(self.ours, dataset, 64)
            else:
                peer_predict(self.peer, dataset, 64, self.device)


def resident_peak() -> float:
    """In MB. Linux starts a child's ru_maxrss at its parent's, so there VmHWM is read instead."""
    status = Path("/proc/self/status")
    if status.exists():
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1e3
    unit = 1e6 if sys.platform == "darwin" else 1e3
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def peak_memory(args) -> None:
    """In a process of its own: a few steps of one contender, then the peak in MB."""
    bench = Bench(args, (args.memory_of,))
    bench.warm_up()
    for window in bench.train():
        bench.works[args.memory_of](window)
    if bench.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated() / 1e6
    else:
        peak = resident_peak()
    print(json.dumps(peak))


def memory_of(name: str, args) -> float:
    flags = ["--memory_of", name, "--steps", str(min(args.steps, 8))]
    command = [sys.executable, __file__, *flags, *passed_on(args)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def passed_on(args) -> list[str]:
    flags = ["--data_dir", args.data_dir, "--bert_model", args.bert_model]
    return flags + ["--use_gpu"] * args.use_gpu + ["--base"] * args.base


def measure(bench: Bench, args) -> dict[str, list[float]]:
    """Steps of both and of the matrix multiplication in turns; then evaluations in turns."""
    mean_tokens = int(statistics.mean(sum(window[0].lengths) for window in bench.windows))
    matrices = MatrixRate(bench.config, mean_tokens, bench.device)
    bench.warm_up()
    matrices()
    times = {key: [] for key in (*bench.works, "matrices", f"eval {OURS}", f"eval {PEER}")}
    for number, window in enumerate(bench.train()):
        for name in list(bench.works)[:: 1 if number % 2 else -1]:
            times[name].append(seconds(lambda: bench.works[name](window), bench.device))
        times["matrices"].append(seconds(matrices, bench.device))
    for _ in range(args.evaluations):
        for name in (OURS, PEER):
            times[f"eval {name}"].append(seconds(lambda: bench.predict(name), bench.device))
    times["rate"] = [matrices.flops / statistics.median(times["matrices"])]
    return times


def report(bench: Bench, times: dict[str, list[float]], args) -> None:
    rate = times["rate"][0]
    medians = {name: statistics.median(each) for name, each in times.items()}
    lengths = [window[0].lengths for window in bench.windows[2:]]
    train_limit = (
        statistics.median(encoder_flops(bench.config, each, True) for each in lengths) / rate
    )
    dev = [b.lengths for d in bench.splits["dev"].values() for b in evaluation_batches(d, 64)]
    eval_limit = sum(encoder_flops(bench.config, each, False) for each in dev) / rate
    sentences = {"training step": len(lengths[0]), "evaluation": sum(map(len, dev))}
    memory = {name: memory_of(name, args) for name in (OURS, PEER)}
    print(f"{bench.device}, {torch.get_num_threads()} threads, matrices {rate / 1e9:.0f} GFLOP/s, ")
    print(f"{statistics.mean(map(sum, lengths)):.0f} real tokens a step, {args.steps} steps")
    print("| | | median, s | sentences/s | peer / this | share of limit | peak memory, MB |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for work, prefix, limit in (
        ("training step", "", train_limit),
        ("evaluation", "eval ", eval_limit),
    ):
        for name in (OURS, PEER):
            median = medians[prefix + name]
            cells = [
                f"{median:.3f}",
                f"{sentences[work] / median:.0f}",
                f"{medians[prefix + PEER] / median:.2f}",
                f"{limit / median:.0%}",
                f"{memory[name]:.0f}" if not prefix else "",
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
    flag("--use_gpu", action="store_true", help="bfloat16 on the GPU")
    flag("--memory_of", choices=(OURS, PEER), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.quick:
        args.steps = args.evaluations = 1
    if args.memory_of:
        return peak_memory(args)
    bench = Bench(args)
    report(bench, measure(bench, args), args)


if __name__ == "__main__":
    main()
