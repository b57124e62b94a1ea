"""CSV rows to examples, examples to word-piece ids; and the download of the real CSVs.

python datasets.py download            fetch the nine real CSVs into data/
"""

import argparse
import csv
import hashlib
import http.client
import math
import string
import sys
import time
import urllib.error
import urllib.request
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from base_bert import BertConfig
from tagging import Tagger
from tasks import TASKS, Task
from tokenizer import BertTokenizer
from utils import UserError, atomic_write, one_line

SMOKETEST_ROWS = 32  # read of each file with --smoketest
NAMED_ROWS = 20  # a warning names this many unusable rows and counts the others


class Example(NamedTuple):
    sentences: tuple[str, ...]
    label: float  # nan where there is none
    id: str


# ---------------------------------------------------------------------------------------- reading


def read_examples(path: str | Path, task: Task, split: str) -> list[Example]:
    """Read a tab-separated CSV, quoted like pandas quotes it; columns are found by name.

    Training rows need a label and sentences with text. Every dev and test row that has all its cells
    is predicted: dev rows without a label get the label nan, and empty sentences are kept. One
    warning names and counts the rows that cannot be used, and the dev rows that cannot be scored.

    Raises:
        UserError: there is no such file, it is not tab-separated, a column is missing, or no row is
            usable.
    """
    examples, unusable, unscored, repeated = [], [], [], []
    ids = set()
    needed = ["id", *task.sentence_columns]
    if split != "test":
        needed.append(task.label_column)
    rows = csv_rows(Path(path))
    header = next(rows, ("line 1", []))[1]
    columns = find_columns(path, header, needed)
    for place, cells in rows:
        try:
            check_quotes(cells)
            if len(cells) != len(header):
                raise ValueError(f"{len(cells)} cells instead of {len(header)}")
            examples.append(_to_example(cells, columns, task, split))
        except _Unscored as problem:
            examples.append(problem.example)
            unscored.append((place, str(problem)))
        except ValueError as problem:
            unusable.append((place, str(problem)))
            continue
        if (id := examples[-1].id) in ids:
            repeated.append((place, f"id {id[:20]!r}"))
        ids.add(id)
    if not any(split == "test" or not math.isnan(example.label) for example in examples):
        what = "row to predict" if split == "test" else "row with a label"
        reasons = "; ".join(f"{place}: {reason}" for place, reason in (unusable + unscored)[:3])
        raise UserError(
            f"{path}: not one usable {what}{' (' + reasons + ')' if reasons else ''}; "
            f"expected tab-separated columns {', '.join(needed)}"
        )
    kinds = {"unusable": unusable, "predicted but not scored": unscored}
    kinds["used although an earlier row has the same id"] = repeated
    if found := [_describe(kind, problems) for kind, problems in kinds.items() if problems]:
        warnings.warn(f"{path}: {'; '.join(found)}", stacklevel=2)
    return examples


class _Unscored(ValueError):
    """A dev row whose label cannot be used."""

    def __init__(self, example: Example, reason: str):
        super().__init__(reason)
        self.example = example


def csv_rows(path: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield the rows of a tab-separated file: (its line or lines, cells). Blank lines are skipped."""
    csv.field_size_limit(2**31 - 1)  # the largest that every platform takes
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, delimiter="\t", strict=True)
            start = 1
            for cells in reader:
                end = reader.line_num
                if cells:
                    yield f"line {start}" if start == end else f"lines {start} to {end}", cells
                start = end + 1
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such file; 'python datasets.py download' fetches the real data, --data_dir "
            "data/sample is a sample, and --sst_train and the like name files of your own"
        ) from None
    except UnicodeDecodeError as error:
        line = _first_line_not_utf8(path)
        raise UserError(
            f"{path}: line {line} is not UTF-8 text ({error.reason}); save the file as UTF-8"
        ) from error
    except csv.Error as error:
        raise UserError(
            f"{path}: the row that starts in line {start}: {error}; is a quote missing?"
        ) from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error


def _first_line_not_utf8(path: Path) -> int:
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                return number
    raise AssertionError("the file has changed since")


def find_columns(path: str | Path, header: list[str], needed: list[str]) -> dict[str, int]:
    """Find the numbers of these columns. Raises UserError if one is missing or there twice."""
    try:
        check_quotes(header)
    except ValueError as problem:
        raise UserError(f"{path}: in the header, line 1: {problem}") from None
    missing = [name for name in needed if name not in header]
    if missing and len(header) < 2:
        raise UserError(
            f"{path}: line 1 has no tab in it, so this is no tab-separated file; "
            f"expected columns {', '.join(needed)}"
        )
    if missing:
        raise UserError(
            f"{path}: line 1 has no column named {', '.join(missing)}; "
            f"its columns are {' '.join(', '.join(header).split())[:200]}"
        )
    if repeated := [name for name in needed if header.count(name) > 1]:
        raise UserError(f"{path}: line 1 has more than one column named {', '.join(repeated)}")
    return {name: header.index(name) for name in needed}


def check_quotes(cells: list[str]) -> None:
    """Raise ValueError for a cell that has swallowed whole rows, because a quote is missing."""
    if any("\t" in cell and ("\n" in cell or "\r" in cell) for cell in cells):
        raise ValueError("one cell over several lines, with tabs in it; is a quote missing?")


def _to_example(cells: list[str], columns: dict[str, int], task: Task, split: str) -> Example:
    id = cells[columns["id"]].strip()
    sentences = tuple(cells[columns[name]] for name in task.sentence_columns)
    if not id:
        raise ValueError("no id")
    if split == "test":
        return Example(sentences, math.nan, id)
    try:
        label = task.parse_label(cells[columns[task.label_column]])
    except ValueError as problem:
        if split == "train":
            raise
        raise _Unscored(Example(sentences, math.nan, id), str(problem)) from None
    if split == "train" and not all(sentence.strip() for sentence in sentences):
        raise ValueError("empty sentence")
    return Example(sentences, label, id)


def _describe(kind: str, problems: list[tuple[str, str]]) -> str:
    named = ", ".join(f"{place} ({reason})" for place, reason in problems[:NAMED_ROWS])
    rest = Counter(reason for _, reason in problems[NAMED_ROWS:])
    others = "".join(f", and {count} more ({reason})" for reason, count in rest.items())
    rows = "row" if len(problems) == 1 else "rows"
    return f"{len(problems)} {rows} {kind}: {named}{others}"


_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised(sentences: tuple[str, ...]) -> tuple[str, ...]:
    """Remove case, ASCII punctuation and differences in white space, and sort the sentences of a pair:
    their order does not count."""
    words = (text.casefold().translate(_PUNCTUATION).split() for text in sentences)
    return tuple(sorted(map(" ".join, words)))


def overlap(train: list[Example], *others: list[Example]) -> list[int]:
    """Count, in each of the others, the rows whose sentences are also those of a training row."""
    known = {normalised(example.sentences) for example in train}
    return [sum(normalised(example.sentences) in known for example in other) for other in others]


# ------------------------------------------------------------------------------------- tokenizing


class TokenColumn(NamedTuple):
    """The word pieces of one sentence column, one sentence after the other; or of a pair's two columns,
    with both sentences of a row in one sequence."""

    pieces: np.ndarray  # [1 or 3, n_tokens]: ids; with tags also part-of-speech and entity ids
    offsets: np.ndarray  # [n_rows + 1] int64: row i is pieces[:, offsets[i]:offsets[i + 1]]
    first_lengths: np.ndarray | None = None  # [n_rows] tokens before the second sentence

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    def row(self, index: int) -> np.ndarray:
        """[1 or 3, n_tokens of the row]"""
        return self.pieces[:, self.offsets[index] : self.offsets[index + 1]]

    def followed_by(self, other: "TokenColumn") -> "TokenColumn":
        """Return the rows of this column, then those of another."""
        parts = [part.pieces[:, part.offsets[0] : part.offsets[-1]] for part in (self, other)]
        lengths = np.concatenate([self.lengths, other.lengths])
        return TokenColumn(np.concatenate(parts, axis=1), np.concatenate([[0], np.cumsum(lengths)]))

    @classmethod
    def joint(cls, first: "TokenColumn", second: "TokenColumn", max_length: int) -> "TokenColumn":
        """Join two columns: [CLS] first [SEP] second [SEP] for each row. If a row is too long, its longer
        sentence is cut first."""
        rows, first_lengths = [], []
        for index in range(len(first.offsets) - 1):
            one, two = first.row(index), second.row(index)[:, 1:]
            n_one, n_two = joint_lengths(one.shape[1], two.shape[1], max_length)
            rows += [cut(one, n_one), cut(two, n_two)]
            first_lengths.append(n_one)
        lengths = np.array([part.shape[1] for part in rows]).reshape(-1, 2).sum(axis=1)
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        return cls(np.concatenate(rows, axis=1), offsets, np.array(first_lengths))


def joint_lengths(first: int, second: int, most: int) -> tuple[int, int]:
    """Return the lengths to which [CLS] first [SEP] and second [SEP] are cut so that both together have
    at most `most` tokens: the longer sentence is cut, and once both are equal, each in turn."""
    sentences, room = (first - 2, second - 1), most - 3
    short = min(*sentences, room // 2)
    long = min(max(sentences), room - short)
    return (short + 2, long + 1) if sentences[0] <= sentences[1] else (long + 2, short + 1)


def cut(pieces: np.ndarray, length: int) -> np.ndarray:
    """Cut [1 or 3, n] to [1 or 3, length]; the last piece, [SEP], stays."""
    return np.concatenate([pieces[:, : length - 1], pieces[:, -1:]], axis=1)


class TaskDataset:
    """One file of one task: its examples and their word-piece ids, which are made once and cached.

    Args:
        path: the CSV.
        split: "train", "dev" or "test".
        max_length: sequences are cut after this many tokens, special tokens included.
        cache_dir: folder that keeps the ids for the next run; None: they are not kept.
        limit: keep at most this many examples.
        tagger: gives the word pieces their tags; None: they have none.
        encoding: of a pair. "bi": each sentence is a sequence; "cross": both are one; "both".
        both_orders: have each pair twice, the second time (after all others) with its sentences
            exchanged.
    """

    def __init__(
        self,
        path: str | Path,
        task: Task,
        split: str,
        tokenizer: BertTokenizer,
        max_length: int,
        *,
        cache_dir: str | Path | None = None,
        limit: int | None = None,
        tagger: Tagger | None = None,
        encoding: str = "bi",
        both_orders: bool = False,
    ):
        self.path, self.task, self.split = Path(path), task, split
        self.examples = read_examples(path, task, split)
        with open(path, "rb") as file:
            self.digest = hashlib.file_digest(file, "sha256").hexdigest()
        if limit is not None:
            usable = [e for e in self.examples if split == "test" or not math.isnan(e.label)]
            self.examples = usable[:limit]
        sentences = [text for column in zip(*self._sentences(), strict=True) for text in column]
        name = f"{task.name}-{split}"
        pieces, lengths = tokenize_cached(sentences, tokenizer, max_length, cache_dir, name, tagger)
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        rows = len(self.examples)
        self.columns = [
            TokenColumn(pieces, offsets[start : start + rows + 1])
            for start in range(0, len(sentences), rows)
        ]
        self.both_orders = both_orders
        if both_orders:
            first, second = self.columns
            self.columns = [first.followed_by(second), second.followed_by(first)]
            self.examples = self.examples + [
                example._replace(sentences=example.sentences[::-1]) for example in self.examples
            ]
        self.labels = np.array([example.label for example in self.examples])  # [n_rows], nan: none
        if encoding != "bi":
            joint = TokenColumn.joint(self.columns[0], self.columns[1], max_length)
            self.columns = [*self.columns, joint] if encoding == "both" else [joint]
        self.n_tokens = np.sum([column.lengths for column in self.columns], axis=0)  # [n_rows]

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def ids(self) -> list[str]:
        return [example.id for example in self.examples]

    def _sentences(self) -> list[tuple[str, ...]]:
        return [example.sentences for example in self.examples]


def tokenize_cached(
    sentences: list[str],
    tokenizer: BertTokenizer,
    max_length: int,
    cache_dir: str | Path | None,
    name: str,
    tagger: Tagger | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Return word-piece ids [1, n_tokens], with a tagger ids and tags [3, n_tokens], and the lengths of
    the sentences. `cache_dir` keeps them, under a digest of everything that decides the result.

    A damaged cache file is made again: its content has another digest than the file says. If the
    cache cannot be written, this is a warning.
    """

    def tokenize():
        chunks = dict(desc=f"tokenizing {name}", unit="chunk", leave=False, delay=1)
        ids, lengths = tokenizer.packed_ids(sentences, max_length, lambda it: tqdm(it, **chunks))
        if tagger is None:
            return ids[None], lengths
        starts = tokenizer.packed_starts(sentences, max_length)
        tags = tagger.tags_of_pieces(sentences, lengths, starts, name)
        return np.concatenate([ids[None], tags]), lengths

    if cache_dir is None:
        return tokenize()
    identity = tagger.pipeline.to_dict() if tagger else None
    key = hashlib.sha256(f"{max_length}\n{tokenizer.to_json()}\n{identity}\n".encode())
    for sentence in sentences:
        text = sentence.encode("utf-8", "surrogatepass")
        key.update(b"%d:" % len(text) + text)
    path = Path(cache_dir) / f"tokens-{key.hexdigest()[:32]}.safetensors"
    try:
        return _read_token_cache(path, len(sentences))
    except Exception:  # absent, truncated, garbled, ...: whatever is wrong, it is made again
        pieces, lengths = tokenize()
    try:
        _write_token_cache(path, pieces, lengths)
    except UserError:
        warnings.warn(f"{cache_dir}: cannot be written, so word-piece ids are not cached")
    return pieces, lengths


def _digest(*arrays: np.ndarray) -> str:
    return hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()


def _read_token_cache(path: Path, n_sentences: int) -> tuple[np.ndarray, np.ndarray]:
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        pieces, lengths = file.get_tensor("pieces"), file.get_tensor("lengths")
        digest = file.metadata()["digest"]
    if digest != _digest(pieces, lengths) or len(lengths) != n_sentences:
        raise ValueError("damaged")
    return pieces, lengths


def _write_token_cache(path: Path, pieces: np.ndarray, lengths: np.ndarray) -> None:
    from safetensors.numpy import save

    arrays = {"pieces": pieces, "lengths": lengths}
    content = save(arrays, metadata={"digest": _digest(pieces, lengths)})
    # Not save_file, which has its own error for a full disk.
    with atomic_write(path) as temporary:
        temporary.write_bytes(content)


def checked_max_length(
    options: argparse.Namespace, source: str, config: BertConfig, tokenizer: BertTokenizer
) -> int:
    """Return the length at which sequences are cut for the encoder from `source`. Raises UserError if
    encoder, tokenizer and --max_length do not fit together."""
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"{source}: the tokenizer has {tokenizer.vocab_size} word pieces, "
            f"the encoder only {config.vocab_size}; they do not belong together"
        )
    if options.max_length and options.max_length > config.max_position_embeddings:
        raise UserError(
            f"--max_length {options.max_length} is more than this encoder's "
            f"{config.max_position_embeddings} positions"
        )
    return options.max_length or config.max_position_embeddings


def load_data(
    options: argparse.Namespace,
    tokenizer: BertTokenizer,
    max_length: int,
    splits: Sequence[str],
    tagger: Tagger | None = None,
    encodings: Mapping[str, str] | None = None,
) -> dict[str, dict[str, TaskDataset]]:
    """Read the files of the chosen tasks: split -> task -> dataset.

    `encodings` says of pair tasks how the encoder reads them; "bi" where it says nothing.
    """
    encodings = {name: "bi" for name in options.tasks} | dict(encodings or {})
    data = {
        split: {
            name: TaskDataset(
                getattr(options, f"{name}_{split}"),
                TASKS[name],
                split,
                tokenizer,
                max_length,
                cache_dir=options.cache_dir,
                limit=SMOKETEST_ROWS if options.smoketest else None,
                tagger=tagger,
                encoding=encodings[name],
                both_orders=split == "train" and options.both_orders and encodings[name] != "bi",
            )
            for name in options.tasks
        }
        for split in splits
    }
    if tagger:
        tagger.rest()
    return data


# ------------------------------------------------------------------------------------- download

DATA_URL = (
    "https://raw.githubusercontent.com/gpoesia/minbert-default-final-project/"
    "7ac8260577fc12a86c7aaf38918056c30054ef39/data"
)
GIT_BLOBS = {
    "ids-sst-train.csv": "9cb7333cb1dae49c2bd2a4b56a24882a6e8704b5",
    "ids-sst-dev.csv": "3171aa629a340809d2db4a50df8f6e5ec9420ab0",
    "ids-sst-test-student.csv": "bbd2313758825f86e24416d6aad64cd93370cf7a",
    "quora-train.csv": "a3b5546f6a0e65b60a328a5d294d1038f5bed1da",
    "quora-dev.csv": "de7cfa32428fd470b93f778fccc45a619e01336f",
    "quora-test-student.csv": "f257ef00558555afb50819578a58205732b16354",
    "sts-train.csv": "12b17760e7795fee35aeeabc290d5651de02622a",
    "sts-dev.csv": "9392860e584717976b8d817cc40c9e6ceeec27e0",
    "sts-test-student.csv": "25f0cf8fafdd1f82b9e2bb460c708af34341ce60",
}
ATTEMPTS = 3
TIMEOUT_SECONDS = 30


def git_blob_id(path: Path) -> str:
    """Return the id that git gives the content of a file: SHA-1 of "blob <size>\\0" and the content."""
    digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def download(data_dir: str | Path, url: str = DATA_URL, blobs: dict[str, str] = GIT_BLOBS) -> None:
    """Fetch the files of `blobs` (name -> git blob id) into `data_dir`.

    A file arrives as NAME.part, which a later call continues. It takes its name only when its blob id
    is right. Files that are already there and right are left alone.

    Raises:
        UserError: a file could not be fetched. If several could not, the others are printed.
    """
    failures = []
    for name, blob in blobs.items():
        try:
            _download_file(f"{url}/{name}", Path(data_dir) / name, blob)
        except UserError as error:
            failures.append(str(error))
    if failures:
        *others, last = failures
        for failure in others:
            print(f"error: {failure}", file=sys.stderr)
        raise UserError(last)


def _download_file(url: str, path: Path, blob: str) -> None:
    if path.exists():
        if path.is_file() and git_blob_id(path) == blob:
            print(f"{path}: already there")
            return
        raise UserError(f"{path} is there with other content; move it away and run this again")
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for attempt in range(1, ATTEMPTS + 1):
            try:
                _fetch(url, part)
                break
            except (OSError, http.client.HTTPException, EOFError) as error:
                final = isinstance(error, urllib.error.HTTPError) and error.code < 500
                if final or attempt == ATTEMPTS:
                    raise
                time.sleep(attempt)
    except Exception as error:
        kept = f"; {part.stat().st_size} bytes are kept for the next try" if part.exists() else ""
        raise UserError(f"cannot download {url}: {one_line(error)}{kept}") from error
    if (found := git_blob_id(part)) != blob:
        part.unlink()
        raise UserError(f"{url}: the file has git blob id {found}, not {blob}; it was deleted")
    part.replace(path)


def _fetch(url: str, part: Path) -> None:
    """Append the missing bytes of `url` to `part`. Raises EOFError if the connection closes too early."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # no byte is missing; the blob id tells whether they are right
            return
        raise
    with response, open(part, "ab" if response.status == 206 else "wb") as file:
        start = have if response.status == 206 else 0
        length = response.headers.get("Content-Length")
        total = start + int(length) if length is not None else None
        with tqdm(total=total, initial=start, desc=part.stem, unit="B", unit_scale=True) as bar:
            while block := response.read(1 << 16):
                file.write(block)
                bar.update(len(block))
    if total is not None and part.stat().st_size < total:
        raise EOFError(f"the connection closed after {part.stat().st_size} of {total} bytes")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("download", help="fetch the nine real CSVs, each verified")
    command.add_argument("--data_dir", default="data", help="folder for the CSVs (default: data)")
    command.add_argument("--url", default=DATA_URL, help="folder to fetch from, such as a mirror")
    args = parser.parse_args(argv)
    try:
        download(args.data_dir, args.url.rstrip("/"))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; run the same command again to continue", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
