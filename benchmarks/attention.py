"""Milliseconds of attention alone, forward and backward, on the sequences of one training batch.

    python benchmarks/attention.py --data_dir data [--use_gpu]

Ours beside PyTorch's `scaled_dot_product_attention` on the same sequences padded to the longest, with a
mask, as `transformers` calls it. All take turns, with MiniLM's 12 heads of 32 and dropout.
"""

import argparse
import functools
import statistics

import numpy as np
import torch
import torch.nn.functional as F
from throughput import ROOT, WARM_UP, mc, seconds

from bert import FusedAttention, Sequences, flash_attention, jagged_attention, plain_attention
from datasets import TASKS, TaskDataset, collate
from tokenizer import BertTokenizer

N_HEADS, WIDTH, DROPOUT = 12, 32, 0.1
OURS = {
    "cpu": {"fused (ours, CPU)": FusedAttention.apply, "plain (ours)": plain_attention},
    "cuda": {
        "flash (ours, CUDA)": flash_attention,
        "jagged (ours, CUDA in float32)": jagged_attention,
        "plain (ours)": plain_attention,
    },
}


def batch_lengths(data_dir: str, batch_size: int) -> list[int]:
    """Of a batch with the first rows of each task's training file."""
    options = mc.parse_options(["--data_dir", data_dir, "--bert_model", "minilm"])
    tokenizer, rows = BertTokenizer.from_pretrained("minilm"), np.arange(batch_size)
    parts = {}
    for name, task in TASKS.items():
        path = getattr(options, f"{name}_train")
        parts[name] = TaskDataset(path, task, "train", tokenizer, 512, limit=batch_size), rows
    return collate(parts).lengths


def padded(qkv: torch.Tensor, lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """[3, B, H, S, K], and which of the positions are real, [B, 1, 1, S]."""
    sequences = torch.nn.utils.rnn.pad_sequence(qkv.detach().split(lengths), batch_first=True)
    ends = torch.tensor(lengths, device=qkv.device)[:, None]
    mask = torch.arange(sequences.shape[1], device=qkv.device) < ends
    return sequences.permute(2, 0, 3, 1, 4).contiguous(), mask[:, None, None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flag = parser.add_argument
    flag("--data_dir", default=str(ROOT / "data" / "sample"), help="default: the sample data")
    flag("--batch_size", type=int, default=64, help="rows of each task; default: 64")
    flag("--steps", type=int, default=30, help="default: 30")
    flag("--precision", choices=["float32", "bfloat16"], default="bfloat16")
    flag("--use_gpu", action="store_true")
    args = parser.parse_args()
    torch.manual_seed(0)
    device = torch.device("cuda" if args.use_gpu else "cpu")
    lengths = batch_lengths(args.data_dir, args.batch_size)
    sequences, dtype = Sequences.of(lengths, device), getattr(torch, args.precision)
    qkv = torch.randn(sum(lengths), 3, N_HEADS, WIDTH, device=device, dtype=dtype)
    heads, mask = padded(qkv, lengths)
    qkv.requires_grad_(), heads.requires_grad_()

    def sdpa():
        return F.scaled_dot_product_attention(*heads, attn_mask=mask, dropout_p=DROPOUT)

    contenders = {
        name: (functools.partial(attention, qkv, sequences, DROPOUT), qkv)
        for name, attention in OURS[device.type].items()
    }
    contenders["padded SDPA"] = sdpa, heads
    times = {name: [] for name in contenders}
    for step in range(WARM_UP + args.steps):
        for name, (attention, leaf) in contenders.items():
            gradient = torch.ones_like(attention())

            def both():
                torch.autograd.grad(attention(), leaf, gradient)

            taken = seconds(both, device)
            if step >= WARM_UP:
                times[name].append(taken)
    print(
        f"{len(lengths)} sequences of {min(lengths)} to {max(lengths)}, {sum(lengths)} tokens, "
        f"{args.precision}, {device}, {torch.get_num_threads()} threads"
    )
    print("| attention | median, ms | padded SDPA / this |")
    print("| --- | --- | --- |")
    medians = {name: statistics.median(each) for name, each in times.items()}
    for name, median in medians.items():
        print(f"| {name} | {1000 * median:.2f} | {medians['padded SDPA'] / median:.2f} |")


if __name__ == "__main__":
    main()
