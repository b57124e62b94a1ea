"""Rows of files to examples, examples to word-piece ids; and the download of the real CSVs.

python datasets.py download            fetch the nine real CSVs into data/
"""

import argparse
import copy
import hashlib
import http.client
import itertools
import math
import os
import string
import sys
import time
import urllib.error
import urllib.request
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from base_bert import BertConfig
from streams import Parser, complain
from tables import check_cells, find_columns, of_table, open_table
from tagging import Tagger
from tasks import Task
from tokenizer import BertTokenizer
from utils import UserError, atomic_write, exit_status, one_line, progress_bar

SMOKETEST_ROWS = 32  # read of each file with --smoketest
NAMED_REASONS, NAMED_ROWS = 3, 4  # a warning about rows names so many, and counts the others


class Example(NamedTuple):
    sentences: tuple[str, ...]
    label: float  # nan where there is none
    id: str


# ---------------------------------------------------------------------------------------- reading


def read_examples(
    path: str | Path, task: Task, split: str, numbers: Iterator[int] | None = None
) -> list[Example]:
    """Read a file of a task; columns are found by name. `numbers` are those of its rows, the ids of a
    task that has no column of ids; by default from 1.

    Training rows need a label and sentences with text. Every dev and test row that has all its cells
    is predicted: dev rows without a label get the label nan, and empty sentences are kept. One
    warning names and counts the rows that cannot be used, and the dev rows that cannot be scored.

    Raises:
        UserError: there is no such file, it cannot be read, a column is missing, or no row is usable.
    """
    examples, unusable, unscored, repeated = [], [], [], []
    ids = set()
    needed = [task.id] if task.id else []
    needed += [*task.sentences] if split == "test" else [*task.sentences, task.label]
    header, rows = open_table(path, [needed], task)
    columns = find_columns(path, header, needed, task)
    for (place, cells), number in zip(rows, numbers or itertools.count(1), strict=False):
        try:
            row = check_cells(cells, header)
            example, problem = _to_example(row, columns, task, split, number)
        except ValueError as error:
            unusable.append((place, str(error)))
            continue
        examples.append(example)
        if problem:
            unscored.append((place, problem))
        if example.id in ids:
            repeated.append((place, "an earlier row has the same id"))
        ids.add(example.id)
    if not any(split == "test" or not math.isnan(example.label) for example in examples):
        what = "row to predict" if split == "test" else "row with a label"
        reasons = "; ".join(f"{place}: {reason}" for place, reason in (unusable + unscored)[:2])
        reasons = f" ({reasons})" if reasons else ""
        raise UserError(f"{path}: {of_table(task)}not one usable {what}{reasons}")
    kinds = {"unusable": unusable, "predicted but not scored": unscored}
    kinds["used nevertheless"] = repeated
    if found := [_describe(kind, problems) for kind, problems in kinds.items() if problems]:
        warnings.warn(f"{path}: {of_table(task)}{'; '.join(found)}", stacklevel=2)
    return examples


def _to_example(
    cells: list[str], columns: dict[str, int], task: Task, split: str, number: int
) -> tuple[Example, str]:
    """Read a row. Return also why it cannot be scored, or "". Raises ValueError if it is unusable."""
    id = cells[columns[task.id]].strip() if task.id else str(number)
    sentences = tuple(cells[columns[name]] for name in task.sentences)
    if not id:
        raise ValueError("no id")
    if split == "test":
        return Example(sentences, math.nan, id), ""
    try:
        label = task.parse_label(cells[columns[task.label]])
    except ValueError as problem:
        if split == "train":
            raise
        return Example(sentences, math.nan, id), str(problem)
    if split == "train" and not all(sentence.strip() for sentence in sentences):
        raise ValueError("empty sentence")
    return Example(sentences, label, id), ""


def _describe(kind: str, problems: list[tuple[str, str]]) -> str:
    """Return how many rows have a problem; of the most frequent reasons the first places."""
    places = defaultdict(list)
    for place, reason in problems:
        places[reason].append(place)
    texts = []
    for reason in sorted(places, key=lambda reason: -len(places[reason]))[:NAMED_REASONS]:
        first = ", ".join(places[reason][:NAMED_ROWS])
        more = len(places[reason]) - NAMED_ROWS
        texts.append(f"{reason} ({first}{f' and {more} more' if more > 0 else ''})")
    if others := len(places) - len(texts):
        texts.append(f"other reasons: {others}")
    rows = "row" if len(problems) == 1 else "rows"
    return f"{len(problems)} {rows} {kind}: {', '.join(texts)}"


_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised(sentences: tuple[str, ...]) -> tuple[str, ...]:
    """Remove case, ASCII punctuation and differences in white space, and sort the sentences of a pair:
    their order does not count."""
    words = (text.casefold().translate(_PUNCTUATION).split() for text in sentences)
    return tuple(sorted(map(" ".join, words)))


def rows_in_train(rows: list[Example], train: list[Example]) -> np.ndarray:
    """Return which rows have the sentences of a training row: [n_rows] bool."""
    # The training rows, which can be millions, are not held a second time.
    keys = [normalised(example.sentences) for example in rows]
    looked_for = set(keys)
    known = {key for example in train if (key := normalised(example.sentences)) in looked_for}
    return np.array([key in known for key in keys], bool)


# ------------------------------------------------------------------------------------- tokenizing


class TokenColumn(NamedTuple):
    """The word pieces of one sentence column. Columns of a file share the array of pieces."""

    pieces: np.ndarray  # [1 or 3, n_tokens]: ids; with tags also part-of-speech and entity ids
    starts: np.ndarray  # [n_rows] where each row starts in `pieces`
    lengths: np.ndarray  # [n_rows]

    @property
    def first_lengths(self) -> None:
        """A row has no second sentence."""

    def row(self, index: int) -> np.ndarray:
        """Return the pieces of a row: [1 or 3, length]."""
        start = self.starts[index]
        return self.pieces[:, start : start + self.lengths[index]]

    def take(self, rows: np.ndarray) -> "TokenColumn":
        return TokenColumn(self.pieces, self.starts[rows], self.lengths[rows])

    def followed_by(self, other: "TokenColumn") -> "TokenColumn":
        """Return the rows of both, which share their pieces."""
        both = [np.concatenate(arrays) for arrays in zip(self[1:], other[1:], strict=True)]
        return TokenColumn(self.pieces, *both)


class JointColumn(NamedTuple):
    """Two columns, whose sentences are read as one sequence: [CLS] first [SEP] second [SEP]."""

    first: TokenColumn
    second: TokenColumn
    first_lengths: np.ndarray  # [n_rows] tokens before the second sentence
    second_lengths: np.ndarray  # [n_rows]

    @classmethod
    def of(cls, first: TokenColumn, second: TokenColumn, max_length: int) -> "JointColumn":
        """Join two columns. If a row is too long, its longer sentence is cut first."""
        return cls(first, second, *joint_lengths(first.lengths, second.lengths - 1, max_length))

    @property
    def lengths(self) -> np.ndarray:
        return self.first_lengths + self.second_lengths

    def row(self, index: int) -> np.ndarray:
        """Return the pieces of a row: [1 or 3, length]."""
        first = cut(self.first.row(index), self.first_lengths[index])
        second = cut(self.second.row(index)[:, 1:], self.second_lengths[index])
        return np.concatenate([first, second], axis=1)

    def take(self, rows: np.ndarray) -> "JointColumn":
        columns = self.first.take(rows), self.second.take(rows)
        return JointColumn(*columns, self.first_lengths[rows], self.second_lengths[rows])


def columns_of(pieces: np.ndarray, lengths: np.ndarray, n_columns: int) -> list[TokenColumn]:
    """Divide the sentences of a file, column after column, into its columns."""
    starts = np.cumsum(lengths) - lengths
    halves = [np.split(array, n_columns) for array in (starts, lengths)]
    return [TokenColumn(pieces, *column) for column in zip(*halves, strict=True)]


def joint_lengths(
    first: np.ndarray, second: np.ndarray, most: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the lengths to which [CLS] first [SEP] and second [SEP] are cut so that both together have
    at most `most` tokens: the longer sentence is cut, and once both are equal, each in turn."""
    one, two, room = first - 2, second - 1, most - 3
    short = np.minimum(np.minimum(one, two), room // 2)
    long = np.minimum(np.maximum(one, two), room - short)
    in_order = one <= two
    return np.where(in_order, short, long) + 2, np.where(in_order, long, short) + 1


def cut(pieces: np.ndarray, length: int) -> np.ndarray:
    """Cut [1 or 3, n] to [1 or 3, length]; the last piece, [SEP], stays."""
    if pieces.shape[1] == length:
        return pieces
    return np.concatenate([pieces[:, : length - 1], pieces[:, -1:]], axis=1)


class TaskDataset:
    """The files of one split of one task: its examples and their word-piece ids, which are made once and
    cached.

    Args:
        paths: the files, which are joined.
        split: "train", "dev" or "test".
        max_length: sequences are cut after this many tokens, special tokens included.
        cache_dir: folder that keeps the ids for the next run; None: they are not kept.
        limit: keep at most this many examples, in train and dev only labelled ones.
        tagger: gives the word pieces their tags; None: they have none.
        both_orders: the columns have each pair twice, the second time (after all others) with its
            sentences exchanged.
    """

    def __init__(
        self,
        paths: Sequence[str | Path],
        task: Task,
        split: str,
        tokenizer: BertTokenizer,
        max_length: int,
        *,
        cache_dir: str | Path | None = None,
        limit: int | None = None,
        tagger: Tagger | None = None,
        both_orders: bool = False,
    ):
        self.paths, self.split = [Path(path) for path in paths], split
        numbers = itertools.count(1)
        files = [read_examples(path, task, split, numbers) for path in self.paths]
        self.examples = list(itertools.chain(*files))
        self.digest = digest_files(self.paths)
        if limit is not None:
            usable = [e for e in self.examples if split == "test" or not math.isnan(e.label)]
            self.examples = usable[:limit]
        sentences = [e.sentences[i] for i in range(len(task.sentences)) for e in self.examples]
        name = f"{task.name}-{split}"
        pieces, lengths = tokenize_cached(sentences, tokenizer, max_length, cache_dir, name, tagger)
        self.sentence_columns = columns_of(pieces, lengths, len(task.sentences))
        self.labels = np.array([example.label for example in self.examples])  # [n_rows], nan: none
        self.max_length = max_length
        self._arrange(task, both_orders)

    def _arrange(self, task: Task, both_orders: bool) -> None:
        """Make the columns that the encoder reads."""
        self.task, self.both_orders, columns = task, both_orders, self.sentence_columns
        if both_orders:
            first, second = columns
            columns = [first.followed_by(second), second.followed_by(first)]
        self.columns: list[TokenColumn | JointColumn] = [*columns]
        if task.encoding != "bi":
            joint = JointColumn.of(columns[0], columns[1], self.max_length)
            self.columns = [*columns, joint] if task.encoding == "both" else [joint]
        self.n_tokens = np.sum([column.lengths for column in self.columns], axis=0)  # [n_rows]

    def arranged(self, task: Task, both_orders: bool) -> "TaskDataset":
        """Return all rows for another encoding of the task, or other orders. Word pieces are shared."""
        other = copy.copy(self)
        other._arrange(task, both_orders and task.takes_both_orders)
        return other

    def forget_texts(self) -> None:
        """Keep labels and ids of the examples only, in arrays that processes can share."""
        from_arrays: Any = np.rec.fromarrays  # its types know no names alone
        self.examples = from_arrays([self.labels, np.array(self.ids)], names="label,id")

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def ids(self) -> list[str]:
        return [example.id for example in self.examples]

    def sample(self, n_rows: int) -> "TaskDataset":
        """Return at most so many of the rows with a label: the first ones by a hash of the id."""
        digests = {
            row: hashlib.sha256(example.id.encode("utf-8", "surrogatepass")).digest()
            for row, example in enumerate(self.examples)
            if not math.isnan(example.label)
        }
        rows = np.array(sorted(sorted(digests, key=digests.__getitem__)[:n_rows]), np.int64)
        chosen = copy.copy(self)
        chosen.examples = [self.examples[row] for row in rows]
        chosen.labels = self.labels[rows]
        in_columns = np.concatenate([rows, rows + len(self)]) if self.both_orders else rows
        chosen.columns = [column.take(in_columns) for column in self.columns]
        chosen.n_tokens = self.n_tokens[in_columns]
        return chosen


def digest_files(paths: Sequence[str | Path]) -> str:
    """Return the SHA-256 of the contents, one after the other. Raises UserError."""
    digest = hashlib.sha256()
    for path in paths:
        try:
            with open(path, "rb") as file:
                hashlib.file_digest(file, lambda: digest)
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    return digest.hexdigest()


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
        ids, lengths = tokenizer.packed_ids(
            sentences, max_length, lambda it: progress_bar(it, **chunks)
        )
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
        return _read_token_cache(path, len(sentences))
    except UserError:
        warnings.warn(f"{cache_dir}: cannot be written, so word-piece ids are not cached")
    return pieces, lengths


def _digest(*arrays: np.ndarray) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _read_token_cache(path: Path, n_sentences: int) -> tuple[np.ndarray, np.ndarray]:
    from safetensors import safe_open

    # For PyTorch, the arrays are mapped into memory, not read.
    with safe_open(path, framework="pt") as file:
        pieces, lengths = (file.get_tensor(name).numpy() for name in ("pieces", "lengths"))
        digest = file.metadata()["digest"]
    if digest != _digest(pieces, lengths) or len(lengths) != n_sentences:
        raise ValueError("damaged")
    return pieces, lengths


def _write_token_cache(path: Path, pieces: np.ndarray, lengths: np.ndarray) -> None:
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    arrays = {"pieces": np.ascontiguousarray(pieces), "lengths": lengths}
    with atomic_write(path) as temporary:
        try:
            save_file(arrays, temporary, metadata={"digest": _digest(pieces, lengths)})
        except SafetensorError as error:  # a full disk
            raise UserError(f"cannot write {path}: {one_line(error)}") from error


def checked_max_length(
    max_length: int | None, source: str, config: BertConfig, tokenizer: BertTokenizer
) -> int:
    """Return the length at which sequences are cut for the encoder from `source`. Raises UserError if
    encoder, tokenizer and `max_length`, that of the flag, do not fit together."""
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"{source}: the tokenizer has {tokenizer.vocab_size} word pieces, "
            f"the encoder only {config.vocab_size}; they do not belong together"
        )
    if max_length and max_length > config.max_position_embeddings:
        raise UserError(
            f"--max_length {max_length} is more than this encoder's "
            f"{config.max_position_embeddings} positions"
        )
    return max_length or config.max_position_embeddings


def load_data(
    options: argparse.Namespace,
    tokenizer: BertTokenizer,
    max_length: int,
    splits: Sequence[str],
    tagger: Tagger | None = None,
) -> dict[str, dict[str, TaskDataset]]:
    """Read the files of the chosen tasks: split -> task -> dataset. A task that has no file for a split
    is left out there."""
    data: dict[str, dict[str, TaskDataset]] = {split: {} for split in splits}
    for split in splits:
        for name, task in options.tasks.items():
            if paths := getattr(options, f"{name}_{split}"):
                data[split][name] = TaskDataset(
                    paths,
                    task,
                    split,
                    tokenizer,
                    max_length,
                    cache_dir=options.cache_dir,
                    limit=SMOKETEST_ROWS if options.smoketest else None,
                    tagger=tagger,
                    both_orders=options.both_orders and task.takes_both_orders,
                )
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
        return hashlib.file_digest(file, lambda: digest).hexdigest()


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
            complain(f"error: {failure}")
        raise UserError(last)


def _download_file(url: str, path: Path, blob: str) -> None:
    if path.exists():
        if path.is_file() and git_blob_id(path) == blob:
            print(f"{path}: already there")
            return
        raise UserError(f"{path} is there with other content; move it away and run this again")
    path = Path(os.path.realpath(path))
    part = path.with_name(path.name + ".part")
    if part.is_symlink() or part.exists() and not part.is_file():
        raise UserError(f"{part}: is no plain file; move it away and run this again")
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
        with progress_bar(
            total=total, initial=start, desc=part.stem, unit="B", unit_scale=True
        ) as bar:
            while block := response.read(1 << 16):
                file.write(block)
                bar.update(len(block))
    if total is not None and part.stat().st_size < total:
        raise EOFError(f"the connection closed after {part.stat().st_size} of {total} bytes")


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("download", help="fetch the nine real CSVs, each verified")
    command.add_argument("--data_dir", default="data", help="folder for the CSVs (default: data)")
    command.add_argument("--url", default=DATA_URL, help="folder to fetch from, such as a mirror")

    def work() -> None:
        args = parser.parse_args(argv)
        download(args.data_dir, args.url.rstrip("/"))

    return exit_status(work, "", "run the same command again to continue")


if __name__ == "__main__":
    sys.exit(main())
