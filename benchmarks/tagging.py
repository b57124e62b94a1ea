"""Cost of `--additional_input`: tagging once, starting from the cache, and each training step.

    python benchmarks/tagging.py --data_dir data --spacy_model en_core_web_sm

The whole tagging step (loading spaCy, its processes, the cache, the alignment with word pieces) and
bare `nlp.pipe` in one process take turns on parts of the distinct sentences. A start is everything
from the CSVs to packed word pieces with tags, in a process of its own. Steps with and without tags
take turns on the same rows.
"""

import argparse
import contextlib
import dataclasses
import functools
import io
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from throughput import BATCH_SIZE, ROOT, WARM_UP, mc, seconds

from batches import EpochSampler, training_windows
from bert import BertModel
from datasets import load_data
from optimizer import build_optimizer
from options import parse_options
from tagging import Pipeline, Tagger, load_spacy
from tasks import SPLITS
from tokenizer import BertTokenizer
from utils import seed_everything

PARTS = 4
CPU = torch.device("cpu")


def load(args, tagger: Tagger | None, cache_dir) -> dict:
    options = parse_options(["--data_dir", args.data_dir, "--cache_dir", str(cache_dir)])
    tokenizer = BertTokenizer.from_pretrained(args.bert_model)
    return load_data(options, tokenizer, args.max_length, SPLITS, tagger)


def start(args) -> None:
    """The side of the process of its own."""
    begin = time.perf_counter()
    tagger = Tagger(Pipeline.find(args.spacy_model), args.start_from) if args.tags else None
    load(args, tagger, args.start_from)
    print(time.perf_counter() - begin)
    assert "spacy" not in sys.modules


def start_seconds(args, cache_dir, tags: bool) -> float:
    command = [sys.executable, __file__, "--start_from", str(cache_dir)] + ["--tags"] * tags
    for name in ("data_dir", "bert_model", "spacy_model", "max_length"):
        command += [f"--{name}", str(getattr(args, name))]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


def compare_tagging(args, sentences: list[str], cache_dir) -> None:
    pipeline = Pipeline.find(args.spacy_model)
    tokenizer = BertTokenizer.from_pretrained(args.bert_model)
    tagger, nlp = Tagger(pipeline, cache_dir), load_spacy(pipeline)

    def ours(part):
        _, lengths = tokenizer.packed_ids(part, args.max_length)
        tagger.tags_of_pieces(part, lengths, tokenizer.packed_starts(part, args.max_length))

    def bare(part):
        for _ in nlp.pipe(part):
            pass

    times = {ours: 0.0, bare: 0.0}
    for number in range(PARTS):
        for work in (ours, bare)[:: 1 if number % 2 else -1]:
            times[work] += seconds(lambda: work(sentences[number::PARTS]), CPU)
    print(f"\n{len(sentences):,} distinct sentences, {pipeline}")
    print("| tagging | sentences/s | / bare |")
    print("| --- | --- | --- |")
    for work, name in {bare: "bare `nlp.pipe`", ours: "this project"}.items():
        print(f"| {name} | {len(sentences) / times[work]:.0f} | {times[bare] / times[work]:.2f} |")


def compare_starts(args, cache_dir) -> None:
    rows = {}
    with tempfile.TemporaryDirectory() as empty:
        rows["without tags, first run"] = start_seconds(args, empty, tags=False)
        rows["without tags, next run"] = start_seconds(args, empty, tags=False)
    rows["with tags, sentences tagged before, other files or lengths"] = start_seconds(
        args, cache_dir, tags=True
    )
    rows["with tags, next run"] = start_seconds(args, cache_dir, tags=True)
    print("\n| start | seconds |")
    print("| --- | --- |")
    for name, value in rows.items():
        print(f"| {name} | {value:.2f} |")


def compare_steps(args, data: dict) -> None:
    seed_everything(0)
    pipeline = Pipeline.find(args.spacy_model)
    sizes = len(pipeline.pos_labels), len(pipeline.ner_labels)
    samplers = {name: EpochSampler(len(each), 0) for name, each in data["train"].items()}
    n_rows = BATCH_SIZE * (args.steps + WARM_UP)
    windows = training_windows(data["train"], samplers, n_rows, BATCH_SIZE, 1)
    options = parse_options([])
    models = {}
    for name, tables in {"without tags": (0, 0), "with tags": sizes}.items():
        overrides = dict(num_pos_tags=tables[0], num_ner_tags=tables[1])
        bert = BertModel.from_pretrained(args.bert_model, **overrides)
        model = mc.MultitaskBERT(bert).train()
        with contextlib.redirect_stdout(io.StringIO()):
            models[name] = model, build_optimizer(model, options)
    times = {name: [] for name in models}
    for number, window in enumerate(windows):
        plain = [dataclasses.replace(batch, tags=None) for batch in window]
        for name in list(models)[:: 1 if number % 2 else -1]:
            given = window if name == "with tags" else plain
            step = functools.partial(mc.training_step, models[name][0], given, models[name][1])
            times[name].append(seconds(lambda: step(options), CPU))
    print(f"\n{args.steps} steps of each kind, {torch.get_num_threads()} threads")
    print("| training step | median, s | / without |")
    print("| --- | --- | --- |")
    medians = {name: statistics.median(each[WARM_UP:]) for name, each in times.items()}
    for name, median in medians.items():
        print(f"| {name} | {median:.3f} | {median / medians['without tags']:.3f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flag = parser.add_argument
    flag("--data_dir", default=str(ROOT / "data" / "sample"), help="default: the sample data")
    flag("--bert_model", default="minilm", help="default: minilm")
    flag("--spacy_model", default="en_core_web_sm", help="default: en_core_web_sm")
    flag("--max_length", type=int, default=512, help="default: 512")
    flag("--steps", type=int, default=14, help="measured steps of each kind; default: 14")
    flag("--start_from", help=argparse.SUPPRESS)
    flag("--tags", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
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
