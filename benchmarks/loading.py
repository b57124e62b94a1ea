"""Time and memory of loading and tokenizing a Quora file of its full size, 283,000 pairs.

    python benchmarks/loading.py --data_dir data

The file is made from the training pairs that are there, repeated, each sentence with another number
at its end, so that no two are the same. It is loaded twice, the second time with the first one's
cache. Beside it a tokenizer of `transformers`, which makes lists, and the `tokenizers` library
called once with all sentences. Each runs in a process of its own, imports included.
"""

import argparse
import csv
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def make_csv(source: Path, target: Path, pairs: int) -> None:
    with open(source, newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file, delimiter="\t")
    first, second = header.index("sentence1"), header.index("sentence2")
    with open(target, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow(header)
        for number in range(pairs):
            row = list(rows[number % len(rows)])
            row[first] += f" {2 * number}"
            row[second] += f" {2 * number + 1}"
            writer.writerow(row)


def load_ours(args) -> None:
    sys.path.insert(0, str(ROOT))
    from datasets import TASKS, TaskDataset
    from tokenizer import BertTokenizer

    tokenizer = BertTokenizer.from_pretrained(args.bert_model)
    TaskDataset(args.csv, TASKS["para"], "train", tokenizer, 512, args.cache_dir)


def load_peer(args) -> None:
    import transformers  # before our root is on the path: it looks for a package named datasets

    sys.path.insert(0, str(ROOT))
    from utils import minilm_directory

    is_minilm = args.bert_model == "minilm"
    name = minilm_directory() if is_minilm else args.bert_model
    tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    tokenizer(sentences(args.csv), truncation=True, max_length=512)


def tokenize_in_one_call(args) -> None:
    sys.path.insert(0, str(ROOT))
    from tokenizer import BertTokenizer

    BertTokenizer.from_pretrained(args.bert_model).backend.encode_batch_fast(sentences(args.csv))


def sentences(path: str) -> list[str]:
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    return [row[column] for column in ("sentence1", "sentence2") for row in rows]


CONTENDERS = {
    "this project, first run": load_ours,
    "this project, next run": load_ours,  # with the first one's cache
    "transformers' tokenizer": load_peer,
    "tokenizers, in one call": tokenize_in_one_call,
}


def run_alone(name: str, args) -> tuple[float, float]:
    """Seconds and peak memory in MB, imports included, of a process of its own."""
    command = [sys.executable, __file__, "--contender", name, "--csv", args.csv]
    command += ["--cache_dir", args.cache_dir, "--bert_model", args.bert_model]
    start = time.perf_counter()
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{name}: failed, see above")
    unit = 1e6 if sys.platform == "darwin" else 1e3
    return time.perf_counter() - start, usage.ru_maxrss / unit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flag = parser.add_argument
    flag("--data_dir", default=str(ROOT / "data" / "sample"), help="default: the sample data")
    flag("--bert_model", default="minilm", help="default: minilm")
    flag("--pairs", type=int, default=283_000, help="default: 283000")
    for hidden in ("--contender", "--csv", "--cache_dir"):
        flag(hidden, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.contender:
        return CONTENDERS[args.contender](args)
    with tempfile.TemporaryDirectory() as folder:
        args.csv, args.cache_dir = os.path.join(folder, "quora.csv"), os.path.join(folder, "cache")
        make_csv(Path(args.data_dir) / "quora-train.csv", Path(args.csv), args.pairs)
        results = {name: run_alone(name, args) for name in CONTENDERS}
    print(f"{args.pairs} pairs, {os.cpu_count()} cores")
    print("| | seconds | peak memory, MB |")
    print("| --- | --- | --- |")
    for name, (seconds, memory) in results.items():
        print(f"| {name} | {seconds:.1f} | {memory:.0f} |")


if __name__ == "__main__":
    main()
