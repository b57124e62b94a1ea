"""Measure whether a step takes longer when its rows belong to more tasks.

    python benchmarks/many_tasks.py --data_dir data

A step has the same 96 sentences of the SST training file, as one task, three tasks or twelve tasks of
20,000 rows, which are read from a `--task_file`. The steps of the contenders alternate. What counts
is the whole step: rows drawn and packed, forward and backward pass, optimizer.
"""

import csv
import statistics
import sys
import tempfile
import time
from pathlib import Path

from measuring import ROOT, WARM_UP, new_parser, print_table

sys.path.insert(0, str(ROOT))

import multitask_classifier as mc  # noqa: E402
from batches import EpochSampler, training_windows  # noqa: E402
from bert import BertModel  # noqa: E402
from datasets import load_data  # noqa: E402
from optimizer import build_optimizer  # noqa: E402
from options import parse_options  # noqa: E402
from tokenizer import BertTokenizer  # noqa: E402
from utils import flush_denormals, seed_everything  # noqa: E402

N_TASKS, N_ROWS, ROWS_OF_A_STEP = (1, 3, 12), 20_000, 96
TABLE = """\
[task{number}]
train = "rows.csv"
dev = "dev.csv"
sentences = "sentence"
label = "sentiment"
classes = 5
"""


class Contender:
    """Training with so many tasks."""

    def __init__(self, n_tasks: int, folder: Path, bert_model: str, steps: int):
        names = [f"task{number}" for number in range(n_tasks)]
        flags = ["--task_file", str(folder / "tasks.toml"), "--tasks", ",".join(names)]
        flags += ["--data_dir", str(folder), "--cache_dir", str(folder / "cache")]
        self.options = parse_options(flags)
        seed_everything(0)
        tokenizer, bert = BertTokenizer.from_pretrained(bert_model), BertModel.from_pretrained(
            bert_model
        )
        train = load_data(self.options, tokenizer, 128, ("train",))["train"]
        self.model = mc.MultitaskBERT(bert, self.options.tasks).train()
        self.optimizer = build_optimizer(self.model, self.options)
        samplers = {name: EpochSampler(len(rows), 0) for name, rows in train.items()}
        batch = ROWS_OF_A_STEP // n_tasks
        self.windows = training_windows(train, samplers, batch * (steps + WARM_UP), batch, 1)
        self.rates: list[float] = []  # tokens a second

    def step(self) -> None:
        start = time.perf_counter()
        window = next(self.windows)
        mc.training_step(self.model, window, self.optimizer, self.options)
        n_tokens = sum(len(batch.input_ids) for batch in window)
        self.rates.append(n_tokens / (time.perf_counter() - start))


def write_data(data_dir: Path, folder: Path) -> None:
    with open(data_dir / "ids-sst-train.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    for name, n_rows in (("rows.csv", N_ROWS), ("dev.csv", 10)):
        with open(folder / name, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(("sentence", "sentiment"))
            for number in range(n_rows):
                row = rows[number % len(rows)]
                writer.writerow((row["sentence"], row["sentiment"]))
    tables = [TABLE.format(number=number) for number in range(max(N_TASKS))]
    (folder / "tasks.toml").write_text("\n".join(tables))


def main() -> None:
    parser = new_parser(__doc__, steps=20)
    parser.add_argument("--bert_model", default="minilm", help="default: minilm")
    args = parser.parse_args()
    flush_denormals()  # as all programs do
    with tempfile.TemporaryDirectory() as folder:
        write_data(Path(args.data_dir), Path(folder))
        contenders = [Contender(n, Path(folder), args.bert_model, args.steps) for n in N_TASKS]
        for _ in range(WARM_UP + args.steps):
            for contender in contenders:
                contender.step()
    rates = [statistics.median(contender.rates[WARM_UP:]) for contender in contenders]
    rows = [
        [str(n), f"{rate:,.0f}", f"{rate / rates[0]:.2f}"]
        for n, rate in zip(N_TASKS, rates, strict=True)
    ]
    print_table(["tasks", "tokens a second", "relative"], rows)


if __name__ == "__main__":
    main()
