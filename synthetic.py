"""Synthetic sentiment data: sentences for each label, checked against the real ones and each other.

python synthetic.py --generator small --num_samples 5000 --output data/ids-sst-train-syn1.csv
python synthetic.py --generator gpt2 --model gpt2-medium --num_samples 100000 --output OUT.csv
python synthetic.py --generator openai --model gpt-4 --num_samples 500 --output OUT.csv

The CSV is one for `multitask_classifier.py --sst_train`.
"""

import argparse
import csv
import hashlib
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
from pathlib import Path

import torch
from tqdm import tqdm

from datasets import Example, read_examples
from generators import GENERATORS, LABELS, SST, LimitReached
from multitask_classifier import load_checkpoint
from options import PRECISIONS
from utils import (
    UserError,
    atomic_write,
    check_writable,
    exit_status,
    lock_files,
    non_negative_float,
    pick_device,
    positive_float,
    positive_int,
    probability,
    seed,
    seed_everything,
    terminate,
)

NEAR = 0.8  # of all different words of two sentences, the share that both have in a near-duplicate
FRUITLESS_ROUNDS = 20  # without a single new sentence, after which no more come
STILL_RUNNING = "a run that is still running will write it; give this one another --output"

# ------------------------------------------------------------------------------- near-duplicates


def words_of(sentence: str) -> frozenset[str]:
    """What is compared: the different words, without case and punctuation."""
    return frozenset(re.findall(r"\w+", sentence.lower()))


def one_line_of(text: str) -> str:
    """Without line breaks, control characters and spaces that are too many."""
    return " ".join("".join(each if each.isprintable() else " " for each in text).split())


class NearDuplicates:
    """Finds whether a sentence nearly repeats one that was added: the words that both have are at
    least `NEAR` of all that one of them has (Jaccard similarity), or both have no words at all.

    Exact, by prefix filtering (Chaudhuri et al. 2006, "A primitive operator for similarity joins"): with
    words in one fixed order, the rarest first, two such sentences share one of the first
    `n - ceil(NEAR n) + 1` of their n words.

    Args:
        corpus: sentences that tell which words are rare.
    """

    def __init__(self, corpus: list[str]):
        self.frequency = Counter(word for sentence in corpus for word in words_of(sentence))
        self.by_word = defaultdict(list)

    def __contains__(self, sentence: str) -> bool:
        words = words_of(sentence)
        candidates = {other for word in self._prefix(words) for other in self.by_word[word]}
        return any(len(words & other) >= NEAR * len(words | other) for other in candidates)

    def add(self, sentence: str) -> None:
        words = words_of(sentence)
        for word in self._prefix(words):
            self.by_word[word].append(words)

    def _prefix(self, words: frozenset[str]) -> list[str]:
        in_order = sorted(words, key=lambda word: (self.frequency[word], word)) or [""]
        return in_order[: len(in_order) - math.ceil(NEAR * len(in_order)) + 1]


# ------------------------------------------------------------------------------------ generators


# ---------------------------------------------------------------------------------------- the work


class Draft:
    """What there is so far, in a folder beside the output: a line for each round, written as it ends."""

    def __init__(self, folder: Path, identity: dict):
        self.folder, self.path = folder, folder / "rounds.jsonl"
        settings = folder / "settings.json"
        text = json.dumps(identity, indent=1, sort_keys=True) + "\n"
        if settings.exists() and settings.read_text() != text:
            raise UserError(
                f"{folder}: an interrupted run with other flags or files; go on with the same ones, "
                "give another --output, or remove this folder"
            )
        self._settings = settings, text  # written when there is something to keep
        if not settings.exists() and folder.exists():  # of nobody knows which flags
            shutil.rmtree(folder)
        whole = self.path.read_text().rpartition("\n")[0] if self.path.exists() else ""
        self.rounds = [json.loads(line) for line in whole.splitlines()]
        if self.path.exists():
            with atomic_write(self.path) as temporary:  # without a line that a kill has cut short
                temporary.write_text("".join(json.dumps(each) + "\n" for each in self.rounds))

    def begin(self) -> None:
        """From now on there is something to keep."""
        settings, text = self._settings
        with atomic_write(settings) as temporary:
            temporary.write_text(text)

    def add(self, round: dict) -> None:
        with open(self.path, "a") as file:
            file.write(json.dumps(round) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.rounds.append(round)

    @property
    def rows(self) -> list[tuple[int, str]]:
        return [tuple(row) for each in self.rounds for row in each["rows"]]

    def total(self, key: str) -> float:
        return sum(each[key] for each in self.rounds)


class Screen:
    """Sorts drawn sentences: new, or why not."""

    def __init__(self, train: list[Example], held_out: list[Example], classifier, draft: Draft):
        texts = [[each.sentences[0] for each in part] for part in (train, held_out)]
        self.known, self.held_out = (NearDuplicates(sum(texts, [])) for _ in range(2))
        for near, part in zip((self.known, self.held_out), texts):
            for text in part:
                near.add(text)
        for _, text in draft.rows:
            self.known.add(text)
        self.classifier = classifier

    def sort(self, drawn: list[tuple[int, str]], left: dict[int, int]) -> dict:
        """A round: the rows that are new, of each label no more than are `left` to find, and how many
        others there are, by reason."""
        drawn = [(label, one_line_of(text)) for label, text in drawn]
        reasons = ("empty", "contaminated", "duplicates", "unsure", "surplus")
        round = {"rows": [], "drawn": len(drawn)} | dict.fromkeys(reasons, 0)
        agrees = self.classifier(drawn) if self.classifier and drawn else [True] * len(drawn)
        for (label, text), sure in zip(drawn, agrees, strict=True):
            if not words_of(text):
                round["empty"] += 1
            elif text in self.held_out:
                round["contaminated"] += 1
            elif text in self.known:
                round["duplicates"] += 1
            elif not sure:
                round["unsure"] += 1
            elif left[label] > 0:
                left[label] -= 1
                self.known.add(text)
                round["rows"].append((label, text))
            else:
                round["surplus"] += 1
        return round


def classifier_of(path: str, min_confidence: float, device: torch.device):
    """What tells for (label, sentence) pairs whether a trained model gives the label at least this
    probability."""
    model, tokenizer, checkpoint = load_checkpoint(path)
    if checkpoint["tags"] is not None:
        raise UserError(f"{path}: was trained with tags; filter with a model without")
    if "sst" not in checkpoint["options"]["tasks"]:
        raise UserError(f"{path}: was not trained on sentiment")
    limit = checkpoint["options"]["max_length"] or model.bert.config.max_position_embeddings
    model.to(device).eval()

    @torch.no_grad()
    def agrees(pairs: list[tuple[int, str]]) -> list[bool]:
        texts = [text for _, text in pairs]
        batch = tokenizer(texts, True, truncation=True, max_length=limit, return_tensors="pt")
        ids, mask = (batch[key].to(device) for key in ("input_ids", "attention_mask"))
        probabilities = model.predict_sentiment(ids, mask).float().softmax(-1).cpu()
        return [bool(p[label] >= min_confidence) for p, (label, _) in zip(probabilities, pairs)]

    return agrees


def generate(args: argparse.Namespace) -> None:
    """Write the CSV and its report."""
    output = Path(args.output)
    check_writable(output)
    for given in (args.sst_train, args.sst_dev, args.sst_test, args.filter_with):
        if given and not Path(given).is_file():
            raise UserError(f"{given}: no such file")
        if given and Path(given).resolve() == output.resolve():
            raise UserError(f"--output {output}: is read too; give it another name")
    device = pick_device(args.use_gpu)
    seed_everything(args.seed)
    with lock_files([output], STILL_RUNNING):
        train, dev, test = read_real(args)
        folder = output.with_name(f"{output.name}.part")
        draft = Draft(folder, identity_of(args))
        generator = GENERATORS[args.generator](args, device)
        classifier = None
        if args.filter_with:
            classifier = classifier_of(args.filter_with, args.min_confidence, device)
        generator.fit(train, labelled(dev), folder)
        draft.begin()
        if args.generator == "openai":
            generator.requests, generator.spent = draft.total("requests"), draft.total("spent")
        screen = Screen(train, (dev or []) + (test or []), classifier, draft)
        fill(draft, generator, screen, args)
        rows = draft.rows
        write_rows(output, rows, train if args.mix else [], args.generator)
        report = report_of(draft, args, dev, test, generator)
        with atomic_write(output.with_suffix(".report.json")) as temporary:
            temporary.write_text(json.dumps(report, indent=1) + "\n")
        show(report)
        print(f"{len(rows)} sentences: {output}")
        if len(rows) == args.num_samples:
            shutil.rmtree(folder)
        else:
            print(f"fewer than asked for; what there is stays in {folder}, to go on with")


def fill(draft: Draft, generator, screen: Screen, args) -> None:
    """Draw until each label has its share, or nothing new comes any more."""
    shares = {
        label: args.num_samples // len(LABELS) + (label < args.num_samples % len(LABELS))
        for label in LABELS
    }
    fruitless = 0
    with tqdm(total=args.num_samples, initial=len(draft.rows), unit="sentence") as bar:
        while fruitless < FRUITLESS_ROUNDS:
            have = Counter(label for label, _ in draft.rows)
            missing = [x for x in LABELS for _ in range(shares[x] - have[x])]
            if not missing:
                return
            chance = random.Random(f"{args.seed} {len(draft.rounds)}")
            chosen = generator.choose(missing, args.batch_size, chance)
            before = generator.account()
            try:
                drawn = generator.sample(sorted(chosen), chance.getrandbits(62))
            except LimitReached:
                warnings.warn("the limit of requests or cost is reached; writing what there is")
                return
            round = screen.sort(drawn, {label: shares[label] - have[label] for label in LABELS})
            used = {key: value - before[key] for key, value in generator.account().items()}
            draft.add(round | used)
            fruitless = 0 if round["rows"] else fruitless + 1
            bar.update(len(round["rows"]))
    warnings.warn(f"{FRUITLESS_ROUNDS} rounds have brought nothing new; writing what there is")


def read_real(args) -> tuple[list[Example], list[Example] | None, list[Example] | None]:
    """Training, dev and test sentences; None where there is no such file."""
    parts = [read_examples(args.sst_train, SST, "train")]
    for split in ("dev", "test"):
        path = getattr(args, f"sst_{split}")
        parts.append(read_examples(path, SST, split) if path else None)
    return tuple(parts)


def labelled(examples: list[Example] | None) -> list[Example]:
    return [each for each in examples or [] if not math.isnan(each.label)]


def identity_of(args) -> dict:
    """What a draft depends on."""
    own = {"output", "use_gpu", "local_files_only", "mix", "timeout", "max_requests", "max_cost"}
    values = {key: value for key, value in vars(args).items() if key not in own}
    for key in ("sst_train", "sst_dev", "sst_test", "filter_with"):
        if values[key]:
            with open(values[key], "rb") as file:
                values[key] = hashlib.file_digest(file, "sha256").hexdigest()
    return values


def write_rows(
    path: Path, rows: list[tuple[int, str]], real: list[Example], generator: str
) -> None:
    """As pandas writes a CSV, which is how the real ones are."""
    cells = [(each.id, each.sentences[0], int(each.label)) for each in real]
    cells += [
        (f"synthetic-{generator}-{number:06d}", text, label)
        for number, (label, text) in enumerate(rows)
    ]
    with atomic_write(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as out:
        writer = csv.writer(out, delimiter="\t", lineterminator="\n")
        writer.writerow(("", "id", "sentence", "sentiment"))
        writer.writerows((number, *row) for number, row in enumerate(cells))


def report_of(draft: Draft, args, dev, test, generator) -> dict:
    rows = draft.rows
    report = {
        "generator": args.generator,
        "sentences": len(rows),
        "of each label": [sum(each == label for each, _ in rows) for label in LABELS],
        "mean length in words": round(sum(len(t.split()) for _, t in rows) / max(len(rows), 1), 2),
        "drawn": draft.total("drawn"),
        "dropped: without a word": draft.total("empty"),
        "dropped: near-duplicates of training or of each other": draft.total("duplicates"),
    }
    contaminated = "dropped: near-duplicates of dev or test"
    checked = [name for name, part in (("dev", dev), ("test", test)) if part]
    report[contaminated] = draft.total("contaminated") if checked else "not checked"
    report["checked against"] = checked or "neither dev nor test: no files"
    if args.filter_with:
        report["dropped: the classifier is less sure"] = draft.total("unsure")
        agreed = draft.total("surplus") + len(rows)
        asked = draft.total("unsure") + agreed
        report["the classifier agrees with"] = round(agreed / max(asked, 1), 3)
    if labelled(dev) and (perplexity := generator.perplexity(labelled(dev))):
        report["perplexity on dev"] = round(perplexity, 2)
    if args.generator == "openai":
        report["requests"] = draft.total("requests")
        report["spent, dollars"] = round(draft.total("spent"), 4)
    return report


def show(report: dict) -> None:
    print("\n| | |\n| --- | --- |")
    for name, value in report.items():
        print(f"| {name} | {', '.join(map(str, value)) if isinstance(value, list) else value} |")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flag = parser.add_argument
    flag("--generator", choices=GENERATORS, required=True)
    flag(
        "--model",
        help="minilm's word pieces for small; gpt2: hub id or directory, default gpt2; "
        "openai: default gpt-4",
    )
    flag("--num_samples", type=positive_int, default=5000, help="new sentences; default: 5000")
    flag("--output", required=True, metavar="CSV")
    flag("--mix", action="store_true", help="write the real training rows too, before the new ones")
    flag("--data_dir", default="data", help="folder of the real CSVs; default: data")
    for split in ("train", "dev", "test"):
        where = "DATA_DIR" if split == "train" else "beside --sst_train, if there is one"
        flag(f"--sst_{split}", metavar="CSV", help=f"default: {where}")
    flag("--filter_with", metavar="CHECKPOINT", help="keep what this trained model agrees with")
    flag(
        "--min_confidence",
        type=probability,
        default=0.5,
        help="probability that it gives the label, at least; default: 0.5",
    )
    flag("--seed", type=seed, default=11711, help="default: 11711")
    flag("--use_gpu", action="store_true")
    flag(
        "--precision", choices=PRECISIONS, default="auto", help="of training, as for training BERT"
    )
    flag("--local_files_only", action="store_true", help="download no model")
    flag("--epochs", type=positive_int, help="default: 12 for small, 2 for gpt2")
    flag("--lr", type=positive_float, help="default: 5e-4 for small, 3e-5 for gpt2")
    flag("--batch_size", type=positive_int, default=128, help="drawn at a time; default: 128")
    flag("--max_length", type=positive_int, default=64, help="word pieces; default: 64")
    flag("--top_p", type=positive_float, default=0.9, help="nucleus sampling; default: 0.9")
    flag("--temperature", type=positive_float, default=1.0, help="default: 1")
    flag("--base_url", help="openai: another endpoint with its protocol")
    flag("--timeout", type=positive_float, default=60.0, help="openai: seconds; default: 60")
    flag("--max_requests", type=positive_int, default=500, help="openai; default: 500")
    flag("--max_cost", type=positive_float, default=10.0, help="openai: dollars; default: 10")
    flag(
        "--price_input",
        type=non_negative_float,
        default=30.0,
        help="openai: dollars for a million tokens; default: 30",
    )
    flag("--price_output", type=non_negative_float, default=60.0, help="likewise; default: 60")
    args = parser.parse_args(argv)
    if args.top_p > 1:
        parser.error("--top_p must be at most 1")
    if args.sst_train is None:
        args.sst_train = os.path.join(args.data_dir, SST.filename("train"))
    for split in ("dev", "test"):
        if getattr(args, f"sst_{split}") is None:
            beside = Path(args.sst_train).with_name(SST.filename(split))
            setattr(args, f"sst_{split}", str(beside) if beside.exists() else None)
    del args.data_dir
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    advice = "lower --batch_size or --max_length"
    return exit_status(lambda: generate(args), advice, "run the same command again to go on")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, terminate)
    sys.exit(main())
