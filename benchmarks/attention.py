"""Milliseconds of attention alone, forward and backward, on the sequences of one training batch.

    python benchmarks/attention.py --data_dir data [--use_gpu]

Ours beside PyTorch's `scaled_dot_product_attention` with a mask, as `transformers` calls it: for each
sentence column of each task, padded to its longest. All take turns, with MiniLM's 12 heads of 32 and
dropout.
"""

import argparse
import functools
import statistics

import torch
import torch.nn.functional as F
from throughput import ROOT, WARM_UP, seconds

from attention import FusedAttention, Sequences, flash_attention, jagged_attention, plain_attention
from datasets import TaskDataset
from options import parse_options
from tasks import TASKS
from tokenizer import BertTokenizer

N_HEADS, WIDTH, DROPOUT = 12, 32, 0.1
OURS = {
    "cpu": {"fused (ours, CPU)": FusedAttention.apply, "plain (ours)": plain_attention},
    "cuda": {
        "flash (ours, CUDA)": flash_attention,
        "jagged (ours, where flash cannot be)": jagged_attention,
        "plain (ours)": plain_attention,
    },
}


def batch_lengths(data_dir: str, batch_size: int) -> list[list[int]]:
    """Of each sentence column of each task, in a batch with the first rows of the training files."""
    options = parse_options(["--data_dir", data_dir, "--bert_model", "minilm"])
    tokenizer, columns = BertTokenizer.from_pretrained("minilm"), []
    for name, task in TASKS.items():
        path = getattr(options, f"{name}_train")
        dataset = TaskDataset(path, task, "train", tokenizer, 512, limit=batch_size)
        columns += [column.lengths.tolist() for column in dataset.columns]
    return columns


class PaddedColumn:
    def __init__(self, lengths: list[int], device: torch.device, dtype: torch.dtype):
        size = 3, len(lengths), N_HEADS, max(lengths), WIDTH
        self.qkv = torch.randn(size, device=device, dtype=dtype, requires_grad=True)
        mask = (
            torch.arange(max(lengths), device=device)
            < torch.tensor(lengths, device=device)[:, None]
        )
        self.mask = mask[:, None, None]  # [B, 1, 1, S]

    def __call__(self) -> torch.Tensor:
        return F.scaled_dot_product_attention(*self.qkv, attn_mask=self.mask, dropout_p=DROPOUT)


def there_and_back(attention, leaf: torch.Tensor) -> None:
    context = attention()
    torch.autograd.grad(context, leaf, torch.ones_like(context))


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
    columns, dtype = batch_lengths(args.data_dir, args.batch_size), getattr(torch, args.precision)
    lengths = sorted(sum(columns, []))
    sequences = Sequences.of(lengths, device)
    qkv = torch.randn(
        sum(lengths), 3, N_HEADS, WIDTH, device=device, dtype=dtype, requires_grad=True
    )
    contenders = {
        name: [(functools.partial(attention, qkv, sequences, DROPOUT), qkv)]
        for name, attention in OURS[device.type].items()
    }
    padded = [PaddedColumn(each, device, dtype) for each in columns]
    contenders["padded SDPA"] = [(each, each.qkv) for each in padded]
    times = {name: [] for name in contenders}
    for step in range(WARM_UP + args.steps):
        for name, calls in contenders.items():
            taken = seconds(lambda: [there_and_back(*call) for call in calls], device)
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
