"""Synthetic sentiment data: sentences for each label, checked against the real ones and each other.

python synthetic.py --generator small --num_samples 5000 --output data/ids-sst-train-syn1.csv
python synthetic.py --generator gpt2 --model gpt2-medium --num_samples 100000 --output OUT.csv
python synthetic.py --generator openai --model gpt-4 --num_samples 500 --output OUT.csv

The CSV is one for `multitask_classifier.py --sst_train`.
"""

import argparse
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from datasets import Example, digest_files, read_examples
from flags import PRECISIONS
from generators import GENERATORS, LABELS, SST, Generator, LimitReached, Sentence
from predictor import Predictor
from streams import Parser
from tasks import SPLITS
from utils import (
    UserError,
    atomic_write,
    check_writable,
    exit_status,
    keep_freed_memory,
    lock_files,
    non_negative_float,
    pick_device,
    positive_float,
    positive_int,
    probability,
    progress_bar,
    seed,
    seed_everything,
    share,
    terminate,
)

NEAR = 0.8  # Jaccard similarity of the words of two near-duplicates, at least
FRUITLESS_ROUNDS = 20  # rounds in a row without a new sentence, after which drawing ends
STILL_RUNNING = "a run that is still running will write it; give this one another --output"

# The real sentences of each split; a split without a file is empty.
RealData = dict[str, list[Example]]
# Tells for each sentence whether a trained model agrees with its label.
Classifier = Callable[[list[Sentence]], list[bool]]

# ------------------------------------------------------------------------------- near-duplicates


def different_words(sentence: str) -> frozenset[str]:
    """Return the words of a sentence without repetitions, case and punctuation."""
    return frozenset(re.findall(r"\w+", sentence.lower()))


class NearDuplicates:
    """A collection of sentences; `in` tells whether a sentence nearly repeats one of them. Then at least
    `NEAR` of all words of the two are in both (Jaccard similarity), or neither has a word.

    Exact, by prefix filtering (Chaudhuri et al. 2006, "A primitive operator for similarity joins"): with
    words in one fixed order, the rarest first, two such sentences share one of the first
    `n - ceil(NEAR n) + 1` of their n words.

    Args:
        corpus: sentences that tell which words are rare.
    """

    def __init__(self, corpus: list[str]):
        self.frequency = Counter(word for sentence in corpus for word in different_words(sentence))
        self.by_word: dict[str, list[frozenset[str]]] = defaultdict(list)

    def __contains__(self, sentence: str) -> bool:
        words = different_words(sentence)
        candidates = {other for word in self._prefix(words) for other in self.by_word[word]}
        return any(len(words & other) >= NEAR * len(words | other) for other in candidates)

    def add(self, sentence: str) -> None:
        words = different_words(sentence)
        for word in self._prefix(words):
            self.by_word[word].append(words)

    def _prefix(self, words: frozenset[str]) -> list[str]:
        in_order = sorted(words, key=lambda word: (self.frequency[word], word)) or [""]
        return in_order[: len(in_order) - math.ceil(NEAR * len(in_order)) + 1]


# ------------------------------------------------------------------------------- rounds of drawing


class Draft:
    """All rounds so far, in a folder next to the output: a line for each, written when it ends. It has
    the new rows, and counts: how many were drawn, how many dropped for which reason, what was used.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]):
        self.path, self.settings_path = folder / "rounds.jsonl", folder / "settings.json"
        self.settings = json.dumps(settings, indent=1, sort_keys=True) + "\n"
        if self.settings_path.exists():
            if self.settings_path.read_text() != self.settings:
                raise UserError(
                    f"{folder}: an interrupted run with other flags or files; continue with the same "
                    "ones, give another --output, or remove this folder"
                )
        elif folder.exists():
            # Nobody knows which flags made what it holds.
            shutil.rmtree(folder)
        self.rounds: list[dict[str, Any]] = []
        if self.path.exists():
            # A kill may have cut the last line short.
            content = self.path.read_bytes()
            os.truncate(self.path, content.rfind(b"\n") + 1)
            self.rounds = [json.loads(line) for line in self.path.read_text().splitlines()]

    def write_settings(self) -> None:
        """Write the flags and digests of this run. The next run removes a folder without them."""
        with atomic_write(self.settings_path) as temporary:
            temporary.write_text(self.settings)

    def add(self, rows: list[Sentence], counts: Mapping[str, float]) -> None:
        self.rounds.append({"rows": rows, **counts})
        with open(self.path, "a") as file:
            file.write(json.dumps(self.rounds[-1]) + "\n")
            file.flush()
            os.fsync(file.fileno())

    @property
    def rows(self) -> list[Sentence]:
        return [Sentence(*row) for result in self.rounds for row in result["rows"]]

    def total(self, name: str) -> float:
        return sum(result.get(name, 0) for result in self.rounds)


class Screen:
    """The check of drawn sentences: which are new, and why the others are dropped."""

    def __init__(self, real: RealData, drafted: list[Sentence], classifier: Classifier | None):
        train = [example.sentences[0] for example in real["train"]]
        held_out = [example.sentences[0] for example in real["dev"] + real["test"]]
        self.known, self.held_out = (NearDuplicates(train + held_out) for _ in range(2))
        for text in held_out:
            self.held_out.add(text)
        for text in train + [sentence.text for sentence in drafted]:
            self.known.add(text)
        self.classifier = classifier

    def sort(
        self, drawn: list[Sentence], missing: Counter[int]
    ) -> tuple[list[Sentence], Counter[str]]:
        """Return the new sentences, at most as many of a label as are missing. Count the others by the
        reason why they are dropped."""
        drawn = [Sentence(label, to_one_line(text)) for label, text in drawn]
        confident = self.classifier(drawn) if self.classifier and drawn else [True] * len(drawn)
        missing, rows, counts = missing.copy(), [], Counter(drawn=len(drawn))
        for (label, text), is_sure in zip(drawn, confident, strict=True):
            if not different_words(text):
                counts["empty"] += 1
            elif text in self.held_out:
                counts["contaminated"] += 1
            elif text in self.known:
                counts["duplicates"] += 1
            elif not is_sure:
                counts["unsure"] += 1
            elif missing[label] <= 0:
                counts["surplus"] += 1
            else:
                missing[label] -= 1
                self.known.add(text)
                rows.append(Sentence(label, text))
        return rows, counts


def to_one_line(text: str) -> str:
    """Remove line breaks, control characters and repeated spaces."""
    return " ".join("".join(char if char.isprintable() else " " for char in text).split())


def load_classifier(args: argparse.Namespace) -> Classifier | None:
    """Load the model of `--filter_with`. Return a function that tells, for each sentence, whether it
    gives the label a probability of at least `--min_confidence`; None without this flag."""
    if not args.filter_with:
        return None
    predictor = Predictor(args.filter_with, tasks="sst", use_gpu=args.use_gpu, precision="float32")

    def agrees(sentences: list[Sentence]) -> list[bool]:
        answers = predictor.answers([(sentence.text,) for sentence in sentences])
        shares = [answer[f"{SST.title}_probabilities"] for answer in answers]
        pairs = zip(shares, sentences, strict=True)
        return [share[sentence.label] >= args.min_confidence for share, sentence in pairs]

    return agrees


def fill(draft: Draft, generator: Generator, screen: Screen, args: argparse.Namespace) -> None:
    """Draw until all labels have the same number of sentences, or until nothing new comes."""
    quota, rest = divmod(args.num_samples, len(LABELS))
    wanted = Counter({label: quota + 1 if label < rest else quota for label in LABELS})
    fruitless = 0
    with progress_bar(total=args.num_samples, initial=len(draft.rows), unit="sentence") as bar:
        while fruitless < FRUITLESS_ROUNDS:
            missing = wanted - Counter(sentence.label for sentence in draft.rows)
            if not missing:
                return
            rng = random.Random(f"{args.seed} {len(draft.rounds)}")
            labels = generator.choose(list(missing.elements()), args.batch_size, rng)
            before = dict(generator.usage)
            try:
                drawn = generator.sample(sorted(labels), rng.getrandbits(62))
            except LimitReached:
                warnings.warn("the limit of requests or cost is reached; writing what there is")
                return
            rows, counts = screen.sort(drawn, missing)
            used = {name: value - before[name] for name, value in generator.usage.items()}
            draft.add(rows, {**counts, **used})
            fruitless = 0 if rows else fruitless + 1
            bar.update(len(rows))
    warnings.warn(f"{FRUITLESS_ROUNDS} rounds have brought nothing new; writing what there is")


# ---------------------------------------------------------------------------------- files and report


def generate(args: argparse.Namespace) -> None:
    """Write the CSV and its report."""
    output = Path(args.output)
    check_writable(output)
    for path in (args.sst_train, args.sst_dev, args.sst_test, args.filter_with):
        if path and not Path(path).is_file():
            raise UserError(f"{path}: no such file")
        if path and Path(path).resolve() == output.resolve():
            raise UserError(f"--output {output}: is read too; give it another name")
    device = pick_device(args.use_gpu)
    keep_freed_memory()
    seed_everything(args.seed)
    with lock_files([output], STILL_RUNNING):
        real = read_real(args)
        folder = output.with_name(f"{output.name}.part")
        draft = Draft(folder, draft_settings(args))
        generator = GENERATORS[args.generator](args, device)
        classifier = load_classifier(args)
        dev = [example for example in real["dev"] if not math.isnan(example.label)]
        generator.fit(real["train"], dev, folder)
        draft.write_settings()
        generator.usage = {name: draft.total(name) for name in generator.usage}
        fill(draft, generator, Screen(real, draft.rows, classifier), args)
        rows = draft.rows
        write_csv(output, rows, real["train"] if args.mix else [], args.generator)
        report = make_report(draft, real, args)
        if dev and (perplexity := generator.perplexity(dev)):
            report["perplexity on dev"] = round(perplexity, 2)
        with atomic_write(output.with_suffix(".report.json")) as temporary:
            temporary.write_text(json.dumps(report, indent=1) + "\n")
        print_report(report)
        print(f"{len(rows)} sentences: {output}")
        if len(rows) == args.num_samples:
            shutil.rmtree(folder)
        else:
            print(f"fewer than asked for; they also stay in {folder}, so that you can continue")


def read_real(args: argparse.Namespace) -> RealData:
    """Read the real sentences of all splits."""
    paths = {split: getattr(args, f"sst_{split}") for split in SPLITS}
    return {split: read_examples(path, SST, split) if path else [] for split, path in paths.items()}


def draft_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Return what a draft depends on: flags, and the digests of the files that they name."""
    others = {"output", "use_gpu", "local_files_only", "mix", "timeout", "max_requests", "max_cost"}
    settings = {name: value for name, value in vars(args).items() if name not in others}
    for name in ("sst_train", "sst_dev", "sst_test", "filter_with"):
        if settings[name]:
            settings[name] = digest_files([settings[name]])
    return settings


def write_csv(path: Path, rows: list[Sentence], real: list[Example], generator: str) -> None:
    """Write the real rows, then the new ones. The real files are pandas' too."""
    import pandas as pd

    cells = [(example.id, example.sentences[0], int(example.label)) for example in real]
    cells += [
        (f"synthetic-{generator}-{number:06d}", sentence.text, sentence.label)
        for number, sentence in enumerate(rows)
    ]
    table = pd.DataFrame(cells, columns=["id", "sentence", "sentiment"])
    with atomic_write(path) as temporary:
        table.to_csv(temporary, sep="\t", lineterminator="\n")


def make_report(draft: Draft, real: RealData, args: argparse.Namespace) -> dict[str, Any]:
    """Count what was drawn, dropped and used."""
    rows, total = draft.rows, draft.total
    n_words = sum(len(sentence.text.split()) for sentence in rows)
    by_label = Counter(sentence.label for sentence in rows)
    checked = [split for split in ("dev", "test") if real[split]]
    report = {
        "generator": args.generator,
        "sentences": len(rows),
        "of each label": [by_label[label] for label in LABELS],
        "mean length in words": round(n_words / max(len(rows), 1), 2),
        "drawn": total("drawn"),
        "dropped: without a word": total("empty"),
        "dropped: near-duplicates of training or of each other": total("duplicates"),
        "dropped: near-duplicates of dev or test": (
            total("contaminated") if checked else "not checked"
        ),
        "checked against": checked or "neither dev nor test: no files",
    }
    if args.filter_with:
        agreed = total("surplus") + len(rows)
        report["dropped: the classifier is less sure"] = total("unsure")
        report["the classifier agrees with"] = round(agreed / max(total("unsure") + agreed, 1), 3)
    if args.generator == "openai":
        report["requests"] = total("requests")
        report["spent, dollars"] = round(total("spent"), 4)
    return report


def print_report(report: dict[str, Any]) -> None:
    print("\n| | |\n| --- | --- |")
    for name, value in report.items():
        print(f"| {name} | {', '.join(map(str, value)) if isinstance(value, list) else value} |")


# ------------------------------------------------------------------------------------------- main


def build_parser() -> Parser:
    parser = Parser(description=__doc__.splitlines()[0])
    flag = parser.add_argument
    flag("--generator", choices=GENERATORS, required=True)
    source = "small: where its word pieces come from, default minilm; "
    source += "gpt2: hub id or directory, default gpt2; openai: default gpt-4"
    flag("--model", help=source)
    flag("--num_samples", type=positive_int, default=5000, help="new sentences; default: 5000")
    flag("--output", required=True, metavar="CSV")
    flag("--mix", action="store_true", help="write the real training rows too, before the new ones")
    flag("--data_dir", default="data", help="folder of the real CSVs; default: data")
    flag("--sst_train", metavar="CSV", help="default: the one in DATA_DIR")
    for split in ("dev", "test"):
        flag(f"--sst_{split}", metavar="CSV", help="default: next to --sst_train, if it is there")
    flag("--filter_with", metavar="CHECKPOINT", help="keep what this trained model agrees with")
    lowest = "lowest probability that it may give the label; default: 0.5"
    flag("--min_confidence", type=probability, default=0.5, help=lowest)
    flag("--seed", type=seed, default=11711, help="default: 11711")
    flag("--use_gpu", action="store_true")
    flag("--precision", choices=PRECISIONS, default="auto", help="of training, like BERT's")
    flag("--local_files_only", action="store_true", help="download no model")
    flag("--epochs", type=positive_int, help="default: 4 for small, 2 for gpt2")
    flag("--lr", type=positive_float, help="the highest; default: 1e-3 for small, 3e-5 for gpt2")
    flag("--batch_size", type=positive_int, default=128, help="drawn at a time; default: 128")
    flag("--max_length", type=positive_int, default=64, help="word pieces; default: 64")
    flag("--top_p", type=share, default=0.9, help="nucleus sampling; default: 0.9")
    flag("--temperature", type=positive_float, default=1.0, help="default: 1")
    flag("--base_url", help="openai: another endpoint with its protocol")
    flag("--timeout", type=positive_float, default=60.0, help="openai: seconds; default: 60")
    flag("--max_requests", type=positive_int, default=500, help="openai; default: 500")
    flag("--max_cost", type=positive_float, default=10.0, help="openai: dollars; default: 10")
    price = "openai: dollars for a million tokens"
    flag("--price_input", type=non_negative_float, default=30.0, help=f"{price}; default: 30")
    flag("--price_output", type=non_negative_float, default=60.0, help=f"{price}; default: 60")
    return parser


def parse(argv: list[str] | None) -> argparse.Namespace:
    args = build_parser().parse_args(argv)
    if args.sst_train is None:
        args.sst_train = os.path.join(args.data_dir, SST.train[0])
    for split in ("dev", "test"):
        if getattr(args, f"sst_{split}") is None:
            beside = Path(args.sst_train).with_name(getattr(SST, split)[0])
            setattr(args, f"sst_{split}", str(beside) if beside.exists() else None)
    del args.data_dir
    return args


def main(argv: list[str] | None = None) -> int:
    advice = "lower --batch_size or --max_length"
    return exit_status(
        lambda: generate(parse(argv)), advice, "run the same command again to continue"
    )


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, terminate)
    sys.exit(main())
