"""Time attention alone, forward and backward, on the sequences of one training batch.

    python benchmarks/attention.py --data_dir data [--use_gpu]

The peer is PyTorch's `scaled_dot_product_attention` with a mask, as `transformers` calls it: once
for each sentence column of each task, padded to its longest sentence. All take turns, with dropout.
"""

import functools
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from measuring import ROOT, WARM_UP, medians, new_parser, print_table, seconds
from torch import Tensor

sys.path.insert(0, str(ROOT))

from attention import (
    FusedAttention,
    Sequences,
    cuda_attention,
    flash_attention,
    jagged_attention,
    plain_attention,
)
from datasets import TaskDataset
from options import parse_options
from tasks import TASKS
from tokenizer import BertTokenizer
from utils import flush_denormals

DROPOUT = 0.1
OURS: dict[str, dict[str, Callable]] = {
    "cpu": {"fused (ours, CPU)": FusedAttention.apply, "plain (ours)": plain_attention},
    "cuda": {
        "short sequences (ours, CUDA)": cuda_attention,
        "flash (ours, for long ones)": flash_attention,
        "jagged (ours, where flash is not possible)": jagged_attention,
        "plain (ours)": plain_attention,
    },
}
PEER = "padded SDPA"


def batch_lengths(data_dir: str, batch_size: int) -> list[list[int]]:
    """Return the lengths in each sentence column of each task, for the first rows of training."""
    options = parse_options(["--data_dir", data_dir, "--bert_model", "minilm"])
    tokenizer = BertTokenizer.from_pretrained("minilm")
    columns: list[list[int]] = []
    for name, task in TASKS.items():
        path = getattr(options, f"{name}_train")
        dataset = TaskDataset(path, task, "train", tokenizer, 512, limit=batch_size)
        columns += [column.lengths.tolist() for column in dataset.columns]
    return columns


class PaddedColumn:
    """The peer's attention for one sentence column."""

    def __init__(
        self, lengths: list[int], heads: tuple[int, int], device: torch.device, dtype: torch.dtype
    ):
        n_heads, width = heads
        size = 3, len(lengths), n_heads, max(lengths), width
        self.qkv = torch.randn(size, device=device, dtype=dtype, requires_grad=True)
        positions = torch.arange(max(lengths), device=device)
        mask = positions < torch.tensor(lengths, device=device)[:, None]
        self.mask = mask[:, None, None]  # [B, 1, 1, S]

    def __call__(self) -> Tensor:
        query, key, value = self.qkv
        return F.scaled_dot_product_attention(query, key, value, self.mask, DROPOUT)


Call = tuple[Callable[[], Tensor], Tensor]  # an attention, and the leaf that it reads


def forward_and_backward(calls: list[Call]) -> None:
    for attention, leaf in calls:
        context = attention()
        torch.autograd.grad(context, leaf, torch.ones_like(context))


def main() -> None:
    parser = new_parser(__doc__, steps=30)
    flag = parser.add_argument
    flag("--batch_size", type=int, default=64, help="rows of each task; default: 64")
    flag("--precision", choices=["float32", "bfloat16"], default="bfloat16")
    flag("--heads", type=int, default=12, help="default: 12, as in MiniLM and BERT-base")
    flag(
        "--width", type=int, default=32, help="of a head; default: 32, as in MiniLM; BERT-base: 64"
    )
    flag("--use_gpu", action="store_true")
    args = parser.parse_args()
    flush_denormals()  # as all programs do
    torch.manual_seed(0)
    device = torch.device("cuda" if args.use_gpu else "cpu")
    columns, dtype = batch_lengths(args.data_dir, args.batch_size), getattr(torch, args.precision)
    lengths = sorted(sum(columns, []))
    sequences = Sequences.of(lengths, device)
    size = sum(lengths), 3, args.heads, args.width
    qkv = torch.randn(size, device=device, dtype=dtype, requires_grad=True)
    contenders: dict[str, list[Call]] = {
        name: [(functools.partial(attention, qkv, sequences, DROPOUT), qkv)]
        for name, attention in OURS[device.type].items()
    }
    padded = [PaddedColumn(column, (args.heads, args.width), device, dtype) for column in columns]
    contenders[PEER] = [(column, column.qkv) for column in padded]
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(WARM_UP + args.steps):
        for name, calls in contenders.items():
            times[name].append(seconds(functools.partial(forward_and_backward, calls), device))
    print(
        f"{args.heads} heads of {args.width}, {len(lengths)} sequences of {min(lengths)} to {max(lengths)}, {sum(lengths)} tokens, "
        f"{args.precision}, {device}, {torch.get_num_threads()} threads"
    )
    median = medians(times)
    rows = [[name, f"{1e3 * t:.2f}", f"{median[PEER] / t:.2f}"] for name, t in median.items()]
    print_table(["attention", "median, ms", f"{PEER} / this"], rows)


if __name__ == "__main__":
    main()
