"""Tags of word pieces: a part-of-speech id and a named-entity id each, from a spaCy pipeline.

spaCy reads each distinct sentence once, as it is written. What it finds is kept on disk, so that a
later run needs no spaCy. A word piece has the tags of the spaCy token that covers its first
character; id 0 is "none".
"""

import concurrent.futures
import configparser
import contextlib
import ctypes
import dataclasses
import hashlib
import importlib.util
import json
import multiprocessing
import os
import signal
import sqlite3
import sys
import warnings
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import filelock
import numpy as np
from tqdm import tqdm

from utils import UserError, one_line

NONE = "none"  # the label of id 0
MAX_CHARACTERS = 100_000  # that spaCy reads of a sentence: more than any encoder has positions for
CHUNK = 500  # sentences tagged, and then kept, at a time
# Components by the name of their factory. Those that change neither tag is left out to save time.
TAGGERS, RECOGNISERS = {"tagger"}, {"ner", "beam_ner", "entity_ruler", "span_ruler"}
NOT_NEEDED = {"lemmatizer", "trainable_lemmatizer", "entity_linker", "textcat", "spancat"}
NOT_NEEDED |= {"textcat_multilabel", "span_finder", "experimental_coref"}
DAMAGED = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_IOERR}
TRANSFORMERS = {"transformer", "curated_transformer"}  # use all cores, or the GPU, by themselves


# ---------------------------------------------------------------------------------------- pipeline


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """What decides a spaCy pipeline's tags, read from its files without spaCy."""

    directory: Path = dataclasses.field(compare=False)
    name: str
    version: str
    digest: str  # SHA-256 of its files
    pos_labels: tuple[str, ...]  # label i is the i-th id
    ner_labels: tuple[str, ...]

    @classmethod
    def find(cls, name_or_path: str) -> "Pipeline":
        """An installed pipeline's name, or a directory. UserError: there is none, or it has no
        tagger or no entity recogniser."""
        directory = _find_directory(name_or_path)
        meta, factories = _read_meta(directory), _read_factories(directory)
        try:
            name, version = f"{meta['lang']}_{meta['name']}", str(meta["version"])
            labels = {
                kind: [
                    x
                    for part in factories
                    if factories[part] in kinds
                    for x in meta["labels"][part]
                ]
                for kind, kinds in {"tagger": TAGGERS, "entity recogniser": RECOGNISERS}.items()
            }
            inventories = [(NONE, *dict.fromkeys(map(str, each))) for each in labels.values()]
        except (KeyError, TypeError) as error:
            raise UserError(f"{directory / 'meta.json'}: damaged ({one_line(error)})") from error
        if lacking := [kind for kind, each in labels.items() if not each]:
            raise UserError(
                f"{name_or_path}: this spaCy pipeline has no {' and no '.join(lacking)}"
            )
        return cls(directory, name, version, _digest_files(directory), *inventories)

    def to_dict(self) -> dict:
        """For a checkpoint; equal for pipelines that give the same tags."""
        values = dataclasses.asdict(self)
        del values["directory"]
        return {
            key: list(each) if isinstance(each, tuple) else each for key, each in values.items()
        }

    def __str__(self) -> str:
        return f"{self.name} {self.version} ({self.digest[:8]})"


def _find_directory(name_or_path: str) -> Path:
    """Where config.cfg and meta.json are."""
    path = Path(name_or_path)
    if not path.is_dir():
        spec = importlib.util.find_spec(name_or_path) if name_or_path.isidentifier() else None
        if spec is None or not spec.submodule_search_locations:
            raise UserError(
                f"{name_or_path}: no such directory, and no spaCy pipeline of this name is "
                f"installed; run: python -m spacy download {path.name}"
            )
        path = Path(spec.submodule_search_locations[0])
    if not (path / "config.cfg").is_file():  # a package has the pipeline in a folder of its own
        path = next((each.parent for each in sorted(path.glob("*/config.cfg"))), path)
    return path


def _read_meta(directory: Path) -> dict:
    path = directory / "meta.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{directory}: not a spaCy pipeline, it has no meta.json") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged ({one_line(error)})") from error


def _read_factories(directory: Path) -> dict[str, str]:
    """Name -> factory of each component in use, in order."""
    path = directory / "config.cfg"
    parser = configparser.ConfigParser(delimiters="=", interpolation=None)
    try:
        parser.read_string(path.read_text(encoding="utf-8"))
        names, disabled = (json.loads(parser["nlp"][key]) for key in ("pipeline", "disabled"))
        factories = {x: json.loads(parser[f"components.{x}"]["factory"]) for x in names}
    except FileNotFoundError:
        raise UserError(f"{directory}: not a spaCy pipeline, it has no config.cfg") from None
    except (OSError, ValueError, KeyError, TypeError, configparser.Error) as error:
        raise UserError(f"{path}: damaged ({one_line(error)})") from error
    return {name: factory for name, factory in factories.items() if name not in disabled}


def _digest_files(directory: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        name = path.relative_to(directory).as_posix().encode()
        with open(path, "rb") as file:
            digest.update(name + b"\0" + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


# -------------------------------------------------------------------------------------- the cache


class TagStore:
    """Sentence -> what spaCy found in it; a SQLite file that runs share, or in memory.

    A value is [3, n + 2] int32: where each of n tokens starts (characters), its part-of-speech id
    and its named-entity id; before and behind them a column without tags. A checksum in front of it tells a damaged
    value, which counts as absent.

    Raises:
        sqlite3.Error, OSError: from all methods, where the file cannot be used.
    """

    def __init__(self, path: Path | None):
        self.path = path
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = filelock.FileLock(path.with_name(f".{path.name}.lock"))
        with self.alone():
            self.connection = self._connect()
            if not self._is_sound():
                self.connection.close()
                path.unlink()
                path.with_name(f"{path.name}-journal").unlink(missing_ok=True)
                self.connection = self._connect()
            self.connection.execute(
                "CREATE TABLE IF NOT EXISTS tags (sentence BLOB PRIMARY KEY, tokens BLOB)"
            )

    @contextlib.contextmanager
    def alone(self):
        """Keep other runs from tagging meanwhile; the lock is flock's, so a killed run holds none."""
        if self.path is None:
            yield
            return
        try:
            self._lock.acquire(timeout=1)
        except filelock.Timeout:
            print(f"another run is tagging sentences into {self.path}; waiting for it")
            self._lock.acquire()
        try:
            yield
        finally:
            self._lock.release()

    def read(self, sentences: list[str]) -> dict[str, np.ndarray]:
        """Those of the sentences that are there."""
        by_key = {_key(sentence): sentence for sentence in sentences}
        keys, found = list(by_key), {}
        for start in range(0, len(keys), CHUNK):
            some = keys[start : start + CHUNK]
            query = f"SELECT * FROM tags WHERE sentence IN ({','.join('?' * len(some))})"
            for key, value in self.connection.execute(query, some):
                if value[:4] == _checksum(key, value[4:]):
                    found[by_key[key]] = np.frombuffer(value[4:], np.int32).reshape(3, -1)
        return found

    def write(self, sentences: list[str], tokens: list[np.ndarray]) -> None:
        rows = []
        for sentence, each in zip(sentences, tokens, strict=True):
            key, value = _key(sentence), each.tobytes()
            rows.append((key, _checksum(key, value) + value))
        with self.connection:  # one transaction
            self.connection.executemany("INSERT OR REPLACE INTO tags VALUES (?, ?)", rows)

    def _connect(self) -> sqlite3.Connection:
        return sqlite3.connect(self.path or ":memory:", timeout=60)

    def _is_sound(self) -> bool:
        try:
            return self.connection.execute("PRAGMA quick_check").fetchall() == [("ok",)]
        except sqlite3.DatabaseError as error:
            if error.sqlite_errorcode & 0xFF in DAMAGED:
                return False
            raise


def _key(sentence: str) -> bytes:
    return hashlib.sha256(sentence.encode()).digest()[:16]


def _checksum(key: bytes, value: bytes) -> bytes:
    return zlib.crc32(value, zlib.crc32(key)).to_bytes(4, "little")


# ---------------------------------------------------------------------------------------- tagging


class Tagger:
    """Gives word pieces their tags; what spaCy has found once it looks up in `cache_dir`.

    Args:
        pipeline: whose tags.
        cache_dir: where they are kept; None keeps them in memory.
    """

    def __init__(self, pipeline: Pipeline, cache_dir: str | Path | None = None):
        self.pipeline = pipeline
        self._cache_dir = cache_dir
        self._store = None
        self._nlp = None

    def tag(self, sentences: list[str], title: str = "sentences") -> None:
        """Have spaCy read those of the sentences that it has not read yet. UserError: it cannot."""
        try:
            self._store = self._store or TagStore(self._path())
            self._fill(sentences, title)
        except (sqlite3.Error, OSError) as error:
            if self._cache_dir is None:
                raise
            warnings.warn(f"{self._cache_dir}: {one_line(error)}, so tags are not kept there")
            self._store = self._cache_dir = None
            self.tag(sentences, title)

    def tags_of_pieces(
        self, sentences: list[str], lengths: np.ndarray, starts: np.ndarray
    ) -> np.ndarray:
        """The tags of all pieces of sentences that `tag` was given.

        Args:
            sentences: [n_sentences].
            lengths: [n_sentences] their numbers of word pieces.
            starts: [n_pieces] the first character of each piece in its sentence; -1 for a special
                token, which has no tags.

        Returns:
            [2, n_pieces] int16: part-of-speech ids and named-entity ids.
        """
        tags = [np.empty((2, 0), np.int16)]
        ends = np.cumsum(lengths)
        for first in range(0, len(sentences), CHUNK):
            some = sentences[first : first + CHUNK]
            sizes = lengths[first : first + CHUNK]
            pieces = starts[ends[first] - lengths[first] : ends[first + len(some) - 1]]
            found = self._store.read(some)
            tokens = [found[sentence] for sentence in some]
            tags.append(_align(tokens, sizes, pieces))
        return np.concatenate(tags, axis=1)

    def describe(self, pos_id: int, ner_id: int) -> str:
        """For people to read: "/NNP/PERSON", "/NN" for what is no entity, "" for no tags."""
        labels = self.pipeline.pos_labels[pos_id], self.pipeline.ner_labels[ner_id]
        return "".join(f"/{label}" for label in labels if label != NONE)

    def _path(self) -> Path | None:
        if self._cache_dir is None:
            return None
        identity = json.dumps(self.pipeline.to_dict(), sort_keys=True).encode()
        name = f"tags-{hashlib.sha256(identity).hexdigest()[:32]}.sqlite"
        return Path(self._cache_dir) / name

    def _fill(self, sentences: list[str], title: str) -> None:
        distinct = list(dict.fromkeys(sentences))
        with self._store.alone():
            found = self._store.read(distinct)
            missing = [sentence for sentence in distinct if sentence not in found]
            if not missing:
                return
            self._nlp = self._nlp or load_spacy(self.pipeline)
            unknown = Counter()
            with tqdm(total=len(missing), desc=f"tagging {title}", unit="sentence") as bar:
                for chunk, tokens, strangers in run_spacy(self._nlp, self.pipeline, missing):
                    self._store.write(chunk, tokens)
                    unknown += strangers
                    bar.update(len(chunk))
        if unknown:
            labels = ", ".join(f"{label} ({count} times)" for label, count in unknown.items())
            warnings.warn(f"{self.pipeline}: its meta.json does not list {labels}: taken as none")


def _align(tokens: list[np.ndarray], lengths: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """[2, n_pieces] the tags of the last token that starts no later than the piece. spaCy's tokens
    leave out single spaces only, with which no piece starts."""
    stride = np.int64(2**32)  # puts each sentence's characters behind those of the one before
    n_tokens = [each.shape[1] for each in tokens]
    characters, *tags = np.concatenate(tokens, axis=1)
    characters = characters + stride * np.repeat(np.arange(len(tokens)), n_tokens)
    pieces = starts + stride * np.repeat(np.arange(len(tokens)), lengths)
    places = np.searchsorted(characters, pieces, side="right") - 1
    return (np.stack(tags)[:, places] * (starts >= 0)).astype(np.int16)


def load_spacy(pipeline: Pipeline):
    """The pipeline as a spaCy `Language`. UserError: spaCy cannot load it."""
    import spacy

    unneeded = [
        name
        for name, factory in _read_factories(pipeline.directory).items()
        if factory in NOT_NEEDED
    ]
    try:
        return spacy.load(pipeline.directory, exclude=unneeded)
    except Exception as error:  # whatever its many components make of a damaged file
        raise UserError(
            f"{pipeline.directory}: spaCy cannot load it ({one_line(error)})"
        ) from error


def run_spacy(
    nlp, pipeline: Pipeline, sentences: list[str]
) -> Iterator[tuple[list[str], list[np.ndarray], Counter]]:
    """(some sentences, what `TagStore` keeps of each, labels that the pipeline does not list)."""
    ids = [
        {nlp.vocab.strings.add(label): number for number, label in enumerate(labels)} | {0: 0}
        for labels in (pipeline.pos_labels, pipeline.ner_labels)
    ]
    chunks = [sentences[i : i + CHUNK] for i in range(0, len(sentences), CHUNK)]
    processes = min(len(chunks), _cores())
    own_threads = TRANSFORMERS & set(_read_factories(pipeline.directory).values())
    if processes == 1 or own_threads or sys.platform != "linux":  # elsewhere, to fork is not safe
        yield from ((chunk, *_tag_chunk(nlp, ids, chunk)) for chunk in chunks)
        return
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # or each fork is told of in a warning
    pool = concurrent.futures.ProcessPoolExecutor(
        processes, multiprocessing.get_context("fork"), _start_worker, (nlp, ids)
    )
    try:
        yield from ((chunk, *done) for chunk, done in zip(chunks, pool.map(_work, chunks)))
    except concurrent.futures.process.BrokenProcessPool as error:
        raise UserError(
            "a process that was tagging has been killed, perhaps for want of memory; what was tagged "
            "is kept, run this again to go on"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1


def _start_worker(nlp, ids) -> None:
    """Ctrl-C is for the parent to answer; and a killed parent's workers must end, who have its lock
    (PR_SET_PDEATHSIG, from prctl.h)."""
    global _worker
    _worker = nlp, ids
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def _work(sentences: list[str]):
    return _tag_chunk(*_worker, sentences)


def _tag_chunk(nlp, ids: list[dict], sentences: list[str]) -> tuple[list[np.ndarray], Counter]:
    from spacy.attrs import ENT_TYPE, IDX, TAG

    found, unknown = [], Counter()
    for doc in nlp.pipe(sentence[:MAX_CHARACTERS] for sentence in sentences):
        starts, *labels = doc.to_array([IDX, TAG, ENT_TYPE]).T
        tokens = np.zeros((3, len(doc) + 2), np.int32)  # a last column ends what was read
        tokens[0, 1:-1], tokens[0, -1] = starts, len(doc.text)
        for row, known, hashes in zip(tokens[1:], ids, labels):
            numbers = [known.get(label, -1) for label in hashes.tolist()]
            unknown.update(nlp.vocab.strings[h] for h, n in zip(hashes.tolist(), numbers) if n < 0)
            row[1:-1] = np.maximum(numbers, 0)
        found.append(tokens)
    return found, unknown
