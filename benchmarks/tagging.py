"""Measure the cost of `--additional_input`: tagging once, starts from the cache, training steps.

    python benchmarks/tagging.py --data_dir data --spacy_model en_core_web_sm

The whole tagging (loading spaCy, its processes, the cache, the alignment with word pieces) and bare
`nlp.pipe` in one process take turns on parts of the distinct sentences. A start is everything from
the CSVs to packed word pieces with tags, in a process of its own. Steps with and without tags take
turns on the same rows.
"""

import argparse
import contextlib
import dataclasses
import functools
import io
import sys
import tempfile
import time
from pathlib import Path

import torch
from measuring import WARM_UP, ask_process, in_turns, medians, new_parser, print_table, seconds
from throughput import BATCH_SIZE, mc

from batches import EpochSampler, training_windows
from bert import BertModel
from datasets import TaskDataset, load_data
from optimizer import build_optimizer
from options import parse_options
from tagging import Pipeline, Tagger, load_spacy
from tasks import SPLITS
from tokenizer import BertTokenizer
from utils import flush_denormals, seed_everything

PARTS = 4
Data = dict[str, dict[str, TaskDataset]]  # split -> task -> dataset


def load(args: argparse.Namespace, tagger: Tagger | None, cache_dir: str | Path) -> Data:
    options = parse_options(["--data_dir", args.data_dir, "--cache_dir", str(cache_dir)])
    tokenizer = BertTokenizer.from_pretrained(args.bert_model)
    return load_data(options, tokenizer, args.max_length, SPLITS, tagger)


def start(args: argparse.Namespace) -> None:
    """Print the seconds of a start. This runs in a process of its own."""
    begin = time.perf_counter()
    tagger = Tagger(Pipeline.find(args.spacy_model), args.start_from) if args.tags else None
    load(args, tagger, args.start_from)
    print(time.perf_counter() - begin)
    assert "spacy" not in sys.modules


def start_seconds(args: argparse.Namespace, cache_dir: str | Path, tags: bool) -> float:
    flags = ["--start_from", cache_dir, *(["--tags"] if tags else [])]
    for name in ("data_dir", "bert_model", "spacy_model", "max_length"):
        flags += [f"--{name}", getattr(args, name)]
    return ask_process(__file__, flags)


def compare_tagging(args: argparse.Namespace, sentences: list[str], cache_dir: Path) -> None:
    pipeline = Pipeline.find(args.spacy_model)
    tokenizer = BertTokenizer.from_pretrained(args.bert_model)
    tagger, nlp = Tagger(pipeline, cache_dir), load_spacy(pipeline)

    def ours(part: list[str]) -> None:
        _, lengths = tokenizer.packed_ids(part, args.max_length)
        tagger.tags_of_pieces(part, lengths, tokenizer.packed_starts(part, args.max_length))

    def bare(part: list[str]) -> None:
        for _ in nlp.pipe(part):
            pass

    works = {"bare `nlp.pipe`": bare, "this project": ours}
    times = dict.fromkeys(works, 0.0)
    for number in range(PARTS):
        for name in in_turns(works, number):
            times[name] += seconds(functools.partial(works[name], sentences[number::PARTS]))
    print(f"\n{len(sentences):,} distinct sentences, {pipeline}")
    slowest = times["bare `nlp.pipe`"]
    rows = [
        [name, f"{len(sentences) / taken:.0f}", f"{slowest / taken:.2f}"]
        for name, taken in times.items()
    ]
    print_table(["tagging", "sentences/s", "/ bare"], rows)


def compare_starts(args: argparse.Namespace, cache_dir: Path) -> None:
    with tempfile.TemporaryDirectory() as empty:
        plain = [start_seconds(args, empty, tags=False) for _ in range(2)]
    tagged = [start_seconds(args, cache_dir, tags=True) for _ in range(2)]
    times = {
        "without tags, first run": plain[0],
        "without tags, next run": plain[1],
        "with tags known, but other files or another `--max_length`": tagged[0],
        "with tags, next run": tagged[1],
    }
    print()
    print_table(["start", "seconds"], [[name, f"{taken:.2f}"] for name, taken in times.items()])


def compare_steps(args: argparse.Namespace, data: Data) -> None:
    seed_everything(0)
    pipeline = Pipeline.find(args.spacy_model)
    sizes = len(pipeline.pos_labels), len(pipeline.ner_labels)
    samplers = {name: EpochSampler(len(dataset), 0) for name, dataset in data["train"].items()}
    n_rows = BATCH_SIZE * (args.steps + WARM_UP)
    windows = training_windows(data["train"], samplers, n_rows, BATCH_SIZE, 1)
    options = parse_options([])
    models = {}
    for name, (n_pos, n_ner) in {"without tags": (0, 0), "with tags": sizes}.items():
        bert = BertModel.from_pretrained(args.bert_model, num_pos_tags=n_pos, num_ner_tags=n_ner)
        model = mc.MultitaskBERT(bert).train()
        with contextlib.redirect_stdout(io.StringIO()):
            models[name] = model, build_optimizer(model, options)
    times: dict[str, list[float]] = {name: [] for name in models}
    for number, window in enumerate(windows):
        plain = [dataclasses.replace(batch, tags=None) for batch in window]
        for name in in_turns(models, number):
            model, optimizer = models[name]
            batches = window if name == "with tags" else plain
            step = functools.partial(mc.training_step, model, batches, optimizer, options)
            times[name].append(seconds(step))
    print(f"\n{args.steps} steps of each kind, {torch.get_num_threads()} threads")
    median = medians(times)
    rows = [
        [name, f"{mine:.3f}", f"{mine / median['without tags']:.3f}"]
        for name, mine in median.items()
    ]
    print_table(["training step", "median, s", "/ without"], rows)


def main() -> None:
    parser = new_parser(__doc__, steps=14)
    flag = parser.add_argument
    flag("--bert_model", default="minilm", help="default: minilm")
    flag("--spacy_model", default="en_core_web_sm", help="default: en_core_web_sm")
    flag("--max_length", type=int, default=512, help="default: 512")
    flag("--start_from", help=argparse.SUPPRESS)
    flag("--tags", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    flush_denormals()  # as all programs do
    if args.start_from:
        return start(args)
    with tempfile.TemporaryDirectory() as cache_dir:
        data = load(args, None, cache_dir)
        sentences = [
            sentence
            for datasets in data.values()
            for dataset in datasets.values()
            for example in dataset.examples
            for sentence in example.sentences
        ]
        print(f"{len(sentences):,} sentences")
        tagged = Path(cache_dir) / "tagged"
        compare_tagging(args, list(dict.fromkeys(sentences)), tagged)
        compare_starts(args, tagged)
        compare_steps(args, load(args, Tagger(Pipeline.find(args.spacy_model), tagged), tagged))


if __name__ == "__main__":
    main()
