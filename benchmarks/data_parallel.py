"""Measure how evenly the tokens of a step are shared among the processes of a data-parallel run.

    python benchmarks/data_parallel.py --data_dir data

Each step waits for the process with the most tokens; "busiest / mean" is how much longer this takes
than with a perfect division. It is compared with rows that are cut into equal parts in their order.
"""

import sys
from pathlib import Path

import numpy as np
from measuring import ROOT, new_parser, print_table

sys.path.insert(0, str(ROOT))

from batches import EpochSampler, deal_out
from datasets import TaskDataset
from tasks import TASKS
from tokenizer import BertTokenizer


def busiest(n_tokens: dict[str, np.ndarray], shares: list[dict[str, np.ndarray]]) -> float:
    """Return the tokens of the busiest process, divided by the mean."""
    loads = [sum(n_tokens[name][rows].sum() for name, rows in share.items()) for share in shares]
    return max(loads) / np.mean(loads)


def equal_parts(n_tokens: dict[str, np.ndarray], n: int) -> list[dict[str, np.ndarray]]:
    """Cut the rows of each task into n parts."""
    parts = {name: np.array_split(np.arange(len(tokens)), n) for name, tokens in n_tokens.items()}
    return [{name: part[share] for name, part in parts.items()} for share in range(n)]


def main() -> None:
    parser = new_parser(__doc__, steps=200)
    parser.add_argument("--batch_size", type=int, default=64, help="rows of each task; default: 64")
    args = parser.parse_args()
    tokenizer = BertTokenizer.from_pretrained("minilm")
    data, samplers = {}, {}
    for name, task in TASKS.items():
        paths = [Path(args.data_dir, file) for file in task.train]
        data[name] = TaskDataset(paths, task, "train", tokenizer, 512)
        samplers[name] = EpochSampler(len(data[name]), 11711)
    steps = [
        {name: data[name].n_tokens[samplers[name].draw(args.batch_size)] for name in data}
        for _ in range(args.steps)
    ]
    print(f"{args.steps} steps of {args.batch_size} rows a task; busiest / mean: mean, worst step")
    rows = []
    for n in (2, 4, 8, 16):
        ratios = [
            [busiest(step, cut(step, n)) for step in steps] for cut in (deal_out, equal_parts)
        ]
        rows.append([str(n), *(f"{np.mean(ratio):.4f}, {max(ratio):.4f}" for ratio in ratios)])
    print_table(["processes", "dealt out", "equal parts"], rows)


if __name__ == "__main__":
    main()
