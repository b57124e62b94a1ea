"""What the processes of a data-parallel run have to do: how evenly the tokens of a step are dealt out.

    python benchmarks/data_parallel.py --data_dir data

Each step waits for the process with the most tokens; "busiest / mean" is how much longer than with a
perfect division that one takes. Beside it, the same for rows cut into equal parts as they come.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from batches import EpochSampler  # noqa: E402
from batches import deal_out  # noqa: E402
from datasets import TaskDataset  # noqa: E402
from tasks import TASKS  # noqa: E402
from tokenizer import BertTokenizer  # noqa: E402


def busiest(n_tokens: dict[str, np.ndarray], shares: list[dict[str, np.ndarray]]) -> float:
    loads = [sum(n_tokens[name][rows].sum() for name, rows in share.items()) for share in shares]
    return max(loads) / np.mean(loads)


def equal_parts(n_tokens: dict[str, np.ndarray], n: int) -> list[dict[str, np.ndarray]]:
    parts = {name: np.array_split(np.arange(len(each)), n) for name, each in n_tokens.items()}
    return [{name: part[share] for name, part in parts.items()} for share in range(n)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", required=True, help="folder of the real CSVs")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=200)
    args = parser.parse_args()
    tokenizer = BertTokenizer.from_pretrained("minilm")
    data = {
        name: TaskDataset(
            Path(args.data_dir, task.filename("train")), task, "train", tokenizer, 512
        )
        for name, task in TASKS.items()
    }
    samplers = {name: EpochSampler(len(each), 11711) for name, each in data.items()}
    steps = [
        {name: data[name].n_tokens[samplers[name].draw(args.batch_size)] for name in data}
        for _ in range(args.steps)
    ]
    print(f"{args.steps} steps of {args.batch_size} rows a task; busiest / mean: mean, worst step")
    print("| processes | dealt out | equal parts |\n| --- | --- | --- |")
    for n in (2, 4, 8, 16):
        cells = [
            [busiest(step, divide(step, n)) for step in steps] for divide in (deal_out, equal_parts)
        ]
        print(f"| {n} | {' | '.join(f'{np.mean(c):.4f}, {max(c):.4f}' for c in cells)} |")


if __name__ == "__main__":
    main()
