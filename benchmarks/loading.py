"""Measure time and memory of loading and tokenizing a Quora file of its full size, 404,000 pairs.

    python benchmarks/loading.py --data_dir data
    python benchmarks/loading.py --data_dir data --pairs 5000000 --ours

The file repeats the training pairs that are there, each sentence with another number at its end, so
that no two are the same. It is loaded twice, the second time with the cache of the first; and once
more in the form of the original Quora file, which is quoted and has other columns. The peers are a
tokenizer of `transformers`, which makes lists, and one call of the `tokenizers` library with all
sentences. Each contender runs in a process of its own, imports included.
"""

import argparse
import csv
import dataclasses
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from measuring import ROOT, print_table


def make_csv(source: Path, target: Path, n_pairs: int) -> None:
    """Write a file of this many different pairs."""
    with open(source, newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file, delimiter="\t")
    first, second, id = (header.index(name) for name in ("sentence1", "sentence2", "id"))
    with open(target, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow(header)
        for number in range(n_pairs):
            row = list(rows[number % len(rows)])
            row[first] += f" {2 * number}"
            row[second] += f" {2 * number + 1}"
            row[id] = str(number)
            writer.writerow(row)


def make_original(source: Path, target: Path) -> None:
    """Write the pairs of a CSV in the form of the original Quora file."""
    with (
        open(source, newline="", encoding="utf-8") as file,
        open(target, "w", newline="", encoding="utf-8") as out,
    ):
        writer = csv.writer(out, delimiter="\t", lineterminator="\n", quoting=csv.QUOTE_ALL)
        writer.writerow("id qid1 qid2 question1 question2 is_duplicate".split())
        for number, row in enumerate(csv.DictReader(file, delimiter="\t")):
            # Every hundredth has a line end in it, as some of the original have.
            first = row["sentence1"] + ("\nWhy?" if number % 100 == 0 else "")
            ids = number, 2 * number, 2 * number + 1
            writer.writerow([*ids, first, row["sentence2"], row["is_duplicate"]])


def load_ours(args: argparse.Namespace) -> None:
    sys.path.insert(0, str(ROOT))
    from datasets import TaskDataset
    from tasks import TASKS
    from tokenizer import BertTokenizer

    tokenizer, task = BertTokenizer.from_pretrained(args.bert_model), TASKS["para"]
    if args.csv.endswith(".tsv"):
        task = dataclasses.replace(task, sentences=("question1", "question2"))
    TaskDataset([args.csv], task, "train", tokenizer, 512, cache_dir=args.cache_dir)


def load_peer(args: argparse.Namespace) -> None:
    # Imported before our root is on the path, since it looks for a package named datasets.
    import transformers

    sys.path.insert(0, str(ROOT))
    from pretrained import minilm_directory

    name = minilm_directory() if args.bert_model == "minilm" else args.bert_model
    tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    tokenizer(read_sentences(args.csv), truncation=True, max_length=512)


def tokenize_in_one_call(args: argparse.Namespace) -> None:
    sys.path.insert(0, str(ROOT))
    from tokenizer import BertTokenizer

    tokenizer = BertTokenizer.from_pretrained(args.bert_model)
    tokenizer.backend.encode_batch_fast(read_sentences(args.csv))


def read_sentences(path: str) -> list[str]:
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    return [row[column] for column in ("sentence1", "sentence2") for row in rows]


OURS = {
    "this project, first run": load_ours,
    "this project, next run": load_ours,  # with the cache of the first run
    "this project, original file": load_ours,
}
CONTENDERS = OURS | {
    "transformers' tokenizer": load_peer,
    "tokenizers, in one call": tokenize_in_one_call,
}


class Cost(NamedTuple):
    seconds: float
    cpu_seconds: float  # of all its threads
    peak: float  # MB


def run_alone(name: str, csv_path: str, cache_dir: str, bert_model: str) -> Cost:
    """Return what a contender costs in a process of its own."""
    command = [sys.executable, __file__, "--contender", name, "--csv", csv_path]
    command += ["--cache_dir", cache_dir, "--bert_model", bert_model]
    start = time.perf_counter()
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{name}: failed, see above")
    unit = 1e6 if sys.platform == "darwin" else 1e3
    took = time.perf_counter() - start
    return Cost(took, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / unit)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flag = parser.add_argument
    flag("--data_dir", default=str(ROOT / "data" / "sample"), help="default: the sample data")
    flag("--bert_model", default="minilm", help="default: minilm")
    flag("--pairs", type=int, default=404_000, help="default: 404000")
    flag("--ours", action="store_true", help="without the peers")
    for hidden in ("--contender", "--csv", "--cache_dir"):
        flag(hidden, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.contender:
        return CONTENDERS[args.contender](args)
    with tempfile.TemporaryDirectory() as folder:
        path, cache_dir = Path(folder, "quora.csv"), str(Path(folder, "cache"))
        make_csv(Path(args.data_dir) / "quora-train.csv", path, args.pairs)
        original = Path(folder, "quora.tsv")
        make_original(path, original)
        results = {}
        for name in OURS if args.ours else CONTENDERS:
            file = str(original if "original" in name else path)
            results[name] = run_alone(name, file, cache_dir, args.bert_model)
    print(f"{args.pairs} pairs, {os.cpu_count()} cores")
    rows = [
        [name, *(f"{n:.1f}" for n in (took, cpu, 1e6 * cpu / args.pairs)), f"{peak:.0f}"]
        for name, (took, cpu, peak) in results.items()
    ]
    print_table(["", "seconds", "CPU seconds", "CPU µs a pair", "peak memory, MB"], rows)


if __name__ == "__main__":
    main()
