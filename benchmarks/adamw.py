"""Time one optimizer step on MiniLM's parameters: ours, torch's foreach and torch's fused AdamW.

    python benchmarks/adamw.py

The three take turns in one run, so that the machine's noise hits all alike. The limit is the time
to read parameters, gradients and moments and to write all but the gradients back once, at the copy
rate measured between the steps.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from base_bert import BertConfig  # noqa: E402
from bert import BertModel  # noqa: E402
from optimizer import AdamW  # noqa: E402

MINILM = BertConfig(
    hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
)
SETTINGS = dict(lr=1e-6, weight_decay=0.05)
CONTENDERS = {
    "this project": lambda params: AdamW(params, **SETTINGS),
    "torch, foreach": lambda params: torch.optim.AdamW(params, foreach=True, **SETTINGS),
    "torch, fused": lambda params: torch.optim.AdamW(params, fused=True, **SETTINGS),
}
TENSORS_MOVED = 7  # 4 read, 3 written


def seconds(work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60, help="of each contender; default: 60")
    steps = parser.parse_args().steps

    optimizers = {}
    for name, build in CONTENDERS.items():
        params = list(BertModel(MINILM).parameters())
        for param in params:
            param.grad = torch.randn_like(param) * 1e-3
        optimizers[name] = build(params)
        optimizers[name].step()
    n_bytes = sum(param.numel() * param.element_size() for param in params)
    source = torch.ones(n_bytes // 4)
    target = torch.empty_like(source)

    times = {name: [] for name in (*optimizers, "copy")}
    for _ in range(steps):
        for name, optimizer in optimizers.items():
            times[name].append(seconds(optimizer.step))
        times["copy"].append(seconds(lambda: target.copy_(source)))
    medians = {name: statistics.median(each) for name, each in times.items()}
    limit = medians.pop("copy") / 2 * TENSORS_MOVED  # a copy moves two tensors

    print(f"{n_bytes / 4e6:.1f} million weights, {torch.get_num_threads()} threads, {steps} steps")
    print("| AdamW | median step, ms | foreach / this | fused / this | limit / this |")
    print("| --- | --- | --- | --- | --- |")
    for name, median in medians.items():
        ratios = [medians["torch, foreach"], medians["torch, fused"], limit]
        cells = " | ".join(f"{other / median:.2f}" for other in ratios)
        print(f"| {name} | {median * 1e3:.1f} | {cells} |")


if __name__ == "__main__":
    main()
