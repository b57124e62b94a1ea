"""Part-of-speech and named-entity ids of word pieces, from a spaCy pipeline.

spaCy reads each distinct sentence once, as it is written. The tags are kept on disk, so that later
runs need no spaCy. A word piece has the tags of the spaCy token that covers its first character.
Id 0 means "no tag".
"""

import concurrent.futures
import configparser
import contextlib
import ctypes
import dataclasses
import functools
import hashlib
import importlib.util
import json
import multiprocessing
import os
import signal
import sqlite3
import sys
import textwrap
import warnings
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import filelock
import numpy as np

from utils import UserError, one_line, progress_bar

NONE = "none"  # the label of id 0
# Characters of a sentence that spaCy reads: more than any encoder has positions for.
MAX_CHARACTERS = 100_000
CHUNK = 500  # sentences that are tagged, and then kept, at a time
# Components by the name of their factory. Components that change neither tag are left out.
TAGGERS = {"tagger"}
RECOGNISERS = {"ner", "beam_ner", "entity_ruler", "future_entity_ruler", "span_ruler"}
NOT_NEEDED = {"lemmatizer", "trainable_lemmatizer", "entity_linker", "textcat", "spancat"}
NOT_NEEDED |= {"textcat_multilabel", "span_finder", "experimental_coref"}
# Causes of SQLite's OperationalError.
DAMAGE = {sqlite3.SQLITE_ERROR, sqlite3.SQLITE_IOERR_SHORT_READ}
PR_SET_PDEATHSIG = 1  # from Linux's prctl.h
# spaCy's Language. spaCy itself is only imported to tag.
Language = Any


# ---------------------------------------------------------------------------------------- pipeline


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """Everything that decides the tags of a spaCy pipeline, read from its files without spaCy."""

    directory: Path = dataclasses.field(compare=False)
    package: str | None = dataclasses.field(compare=False)  # it may have code of its own
    name: str
    version: str
    digest: str  # SHA-256 of its files
    pos_labels: tuple[str, ...]  # by id
    ner_labels: tuple[str, ...]

    @classmethod
    def find(cls, name_or_path: str) -> "Pipeline":
        """Read the pipeline that is installed under this name, or that is in this directory.

        Raises UserError if there is none, or if it has no tagger or no entity recogniser.
        """
        directory, package = _find_directory(name_or_path)
        factories = _read_factories(directory)
        with _reading(directory / "meta.json") as text:
            meta = json.loads(text)
            name, version = f"{meta['lang']}_{meta['name']}", str(meta["version"])
            pos, ner = (_list_labels(meta, factories, kinds) for kinds in (TAGGERS, RECOGNISERS))
        found = {"tagger": pos, "entity recogniser": ner}
        if lacking := [kind for kind, labels in found.items() if not labels]:
            problem = f"this spaCy pipeline has no {' and no '.join(lacking)}"
            raise UserError(f"{name_or_path}: {problem}; choose another one")
        digest = _digest_files(directory)
        return cls(directory, package, name, version, digest, (NONE, *pos), (NONE, *ner))

    def to_dict(self) -> dict[str, Any]:
        """Return the entry of a checkpoint, equal for pipelines that give the same tags."""
        return {
            "name": self.name,
            "version": self.version,
            "digest": self.digest,
            "pos_labels": list(self.pos_labels),
            "ner_labels": list(self.ner_labels),
        }

    def __str__(self) -> str:
        return f"{self.name} {self.version} ({self.digest[:8]})"


def _find_directory(name_or_path: str) -> tuple[Path, str | None]:
    """Return the folder of config.cfg and meta.json, and the name of their package if it is one."""
    path, package = Path(name_or_path), None
    if not path.is_dir():
        if not name_or_path.isidentifier():
            raise UserError(f"{name_or_path}: no such directory")
        package, path = name_or_path, _find_package(name_or_path)
    # In a package, the pipeline is in a folder of its own.
    if not (path / "config.cfg").is_file() and (path / "meta.json").is_file():
        path = next((config.parent for config in path.glob("*-*/config.cfg")), path)
    return path, package


def _find_package(name: str) -> Path:
    # Not by importing it, and for __main__ and similar names there is a ValueError.
    with contextlib.suppress(ValueError):
        spec = importlib.util.find_spec(name)
        if spec and spec.submodule_search_locations:
            return Path(spec.submodule_search_locations[0])
    problem = "no such directory, and no spaCy pipeline of this name is installed"
    raise UserError(f"{name}: {problem}; run: python -m spacy download {name}")


def _list_labels(meta: dict, factories: dict[str, str], kinds: set[str]) -> list[str]:
    """Return the labels of all components of these kinds, without repetitions."""
    names = [name for name, factory in factories.items() if factory in kinds]
    return list(dict.fromkeys(str(label) for name in names for label in meta["labels"][name]))


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[str]:
    """Yield the text of a pipeline's file. Raises UserError if it cannot be read, or if the block
    cannot parse it."""
    try:
        yield path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path.parent}: not a spaCy pipeline, it has no {path.name}") from None
    # A damaged file leads to errors of many kinds.
    except Exception as error:
        raise UserError(f"{path}: damaged ({one_line(error)})") from error


def _read_factories(directory: Path) -> dict[str, str]:
    """Return the components in use, in order: name -> factory."""
    # Not strict: spaCy's keys may differ in upper and lower case only.
    parser = configparser.ConfigParser(delimiters="=", interpolation=None, strict=False)
    with _reading(directory / "config.cfg") as text:
        parser.read_string(text)
        names, disabled = (json.loads(parser["nlp"][key]) for key in ("pipeline", "disabled"))
        factories = {name: json.loads(parser[f"components.{name}"]["factory"]) for name in names}
    return {name: factory for name, factory in factories.items() if name not in disabled}


def _digest_files(directory: Path) -> str:
    digest = hashlib.sha256()
    try:
        for folder, folders, names in os.walk(directory, followlinks=True):
            folders.sort()
            for path in (Path(folder, name) for name in sorted(names)):
                inner = path.relative_to(directory).as_posix().encode()
                with open(path, "rb") as file:
                    digest.update(inner + b"\0" + hashlib.file_digest(file, "sha256").digest())
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read: {error.strerror}") from error
    return digest.hexdigest()


# -------------------------------------------------------------------------------------- the cache


class TagStore:
    """Keeps sentence -> tags as bytes (see `_decode`) in a SQLite file that runs share. Each value
    has a checksum; a value that does not fit it counts as missing.

    Raises:
        sqlite3.Error, OSError: from all methods, if the file cannot be used.
    """

    TABLE = "tags (sentence BLOB PRIMARY KEY, tokens BLOB) WITHOUT ROWID"

    def __init__(self, path: Path):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = filelock.FileLock(path.with_name(f".{path.name}.lock"))
        if not self._open():
            with self.lock():
                if not self._open():  # no other run has replaced it meanwhile
                    warnings.warn(f"{path}: damaged; its sentences are tagged again")
                    path.unlink()
                    path.with_name(f"{path.name}-journal").unlink(missing_ok=True)
                    self._open()

    def lock(self) -> contextlib.AbstractContextManager:
        """Keep other runs from tagging meanwhile. A killed run leaves no lock (it is flock's)."""
        try:
            return self._lock.acquire(timeout=1)
        except filelock.Timeout:
            print(f"another run is tagging sentences into {self.path}; waiting for it")
            return self._lock.acquire()

    def read(self, sentences: list[str]) -> dict[str, bytes]:
        """Return the values of those sentences that are in the store."""
        found, query = {}, "SELECT tokens FROM tags WHERE sentence = ?"
        for sentence in sentences:
            key = _key(sentence)
            (value,) = self.connection.execute(query, (key,)).fetchone() or (None,)
            if isinstance(value, bytes) and value[:4] == _checksum(key, value[4:]):
                found[sentence] = value[4:]
        return found

    def write(self, found: dict[str, bytes]) -> None:
        """Store the values in one transaction."""
        pairs = ((_key(sentence), value) for sentence, value in found.items())
        rows = [(key, _checksum(key, value) + value) for key, value in pairs]
        with self.connection:
            self.connection.executemany("INSERT OR REPLACE INTO tags VALUES (?, ?)", rows)

    def _open(self) -> bool:
        """Connect. Return False if the file is damaged."""
        self.connection = sqlite3.connect(self.path, timeout=60)
        self.connection.text_factory = bytes  # the text of a damaged file may be anything
        try:
            tables = self.connection.execute("SELECT sql FROM sqlite_master").fetchall()
            if not tables:
                self.connection.execute(f"CREATE TABLE IF NOT EXISTS {self.TABLE}")
                return True
            check = self.connection.execute("PRAGMA integrity_check").fetchall()
            if tables == [(f"CREATE TABLE {self.TABLE}".encode(),)] and check == [(b"ok",)]:
                return True
        except sqlite3.OperationalError as error:
            # Its other causes, such as a full disk, say nothing about the content of the file.
            if error.sqlite_errorcode not in DAMAGE:
                raise
        # The second one is from an error's text that quotes damaged bytes.
        except (sqlite3.DatabaseError, UnicodeDecodeError):
            pass
        self.connection.close()
        return False


def _key(sentence: str) -> bytes:
    return hashlib.sha256(sentence.encode()).digest()[:16]


def _checksum(key: bytes, value: bytes) -> bytes:
    return zlib.crc32(value, zlib.crc32(key)).to_bytes(4, "little")


# ---------------------------------------------------------------------------------------- tagging


class Tagger:
    """Gives word pieces their tags. It looks up what spaCy has found before.

    Args:
        pipeline: the spaCy pipeline.
        cache_dir: folder that keeps the tags; None keeps them in memory. If the folder cannot be
            used, this is a warning.
    """

    def __init__(self, pipeline: Pipeline, cache_dir: str | Path | None = None):
        self.pipeline = pipeline
        self._memory: dict[str, bytes] = {}  # used where there is no store
        self._store: TagStore | None = None
        self._nlp: Language = None
        if cache_dir is not None:
            identity = json.dumps(pipeline.to_dict(), sort_keys=True).encode()
            name = f"tags-{hashlib.sha256(identity).hexdigest()[:32]}.sqlite"
            with self._errors_as_warnings(cache_dir):
                self._store = TagStore(Path(cache_dir) / name)

    def tags_of_pieces(
        self, sentences: list[str], lengths: np.ndarray, starts: np.ndarray, title: str = ""
    ) -> np.ndarray:
        """Return the tags of all word pieces of these sentences.

        Args:
            sentences: [n_sentences].
            lengths: [n_sentences] their numbers of word pieces.
            starts: [n_pieces] where the first character of each piece is in its sentence; -1 for a
                special token, which has no tags.
            title: name of the sentences in the progress bar.

        Returns:
            [2, n_pieces] int16: part-of-speech ids and named-entity ids.

        Raises:
            UserError: spaCy cannot tag them.
        """
        found = self._look_up_or_tag(list(dict.fromkeys(sentences)), title)
        tags, ends = [np.empty((2, 0), np.int16)], np.cumsum(lengths)
        for first in range(0, len(sentences), CHUNK):
            chunk = slice(first, first + CHUNK)
            tokens = [_decode(found[sentence]) for sentence in sentences[chunk]]
            pieces = starts[ends[first] - lengths[first] : ends[chunk][-1]]
            tags.append(_align(tokens, lengths[chunk], pieces))
        return np.concatenate(tags, axis=1)

    def describe(self, pos_id: int, ner_id: int) -> str:
        """Return a text like "/NNP/PERSON"; "/NN" without an entity, "" without tags."""
        labels = self.pipeline.pos_labels[pos_id], self.pipeline.ner_labels[ner_id]
        return "".join(f"/{label}" for label in labels if label != NONE)

    def rest(self) -> None:
        """Free spaCy's memory until there is something to tag again."""
        self._nlp = None

    def _look_up_or_tag(self, sentences: list[str], title: str) -> dict[str, bytes]:
        found = self._read(sentences)
        if len(found) < len(sentences):
            with contextlib.ExitStack() as stack:
                if self._store:
                    with self._errors_as_warnings(self._store.path):
                        stack.enter_context(self._store.lock())
                # Another run may have tagged them while this one waited.
                found |= self._read([sentence for sentence in sentences if sentence not in found])
                if missing := [sentence for sentence in sentences if sentence not in found]:
                    found |= self._tag(missing, title)
        return found

    def _tag(self, sentences: list[str], title: str) -> dict[str, bytes]:
        self._nlp = self._nlp or load_spacy(self.pipeline)
        found: dict[str, bytes] = {}
        unlisted: Counter[str] = Counter()
        description = f"tagging {title}"
        with progress_bar(total=len(sentences), desc=description, unit="sentence", delay=1) as bar:
            for part in run_spacy(self._nlp, self.pipeline, sentences):
                self._write(part.tokens)
                found |= part.tokens
                unlisted += part.unlisted
                bar.update(len(part.tokens))
        if unlisted:
            labels = ", ".join(f"{label} ({count} times)" for label, count in unlisted.items())
            labels = textwrap.shorten(labels, 150, placeholder=" ...")
            warnings.warn(f"{self.pipeline}: its meta.json does not list {labels}: taken as none")
        return found

    def _read(self, sentences: list[str]) -> dict[str, bytes]:
        memory = self._memory
        found = {sentence: memory[sentence] for sentence in sentences if sentence in memory}
        if self._store:
            with self._errors_as_warnings(self._store.path):
                found |= self._store.read(sentences)
        return found

    def _write(self, found: dict[str, bytes]) -> None:
        if self._store:
            with self._errors_as_warnings(self._store.path):
                self._store.write(found)
        if not self._store:
            self._memory |= found

    @contextlib.contextmanager
    def _errors_as_warnings(self, path: str | Path) -> Iterator[None]:
        """Turn an error of the store into a warning, and use the memory from then on."""
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            warnings.warn(f"{path}: {one_line(error)}, so tags are not kept there")
            self._store = None


def _decode(value: bytes) -> np.ndarray:
    """Return [3, n + 2] int32: where each of n tokens starts (in characters), its part-of-speech id
    and its named-entity id. The first and the last column have no tags."""
    return np.frombuffer(value, np.int32).reshape(3, -1)


def _align(tokens: list[np.ndarray], lengths: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Return the tags [2, n_pieces] of the last token that starts no later than the piece."""
    # This token covers the piece: spaCy's tokens leave out single spaces only, and no piece starts
    # with a space. The stride puts the characters of a sentence behind those of the one before.
    stride = np.int64(2**32)
    n_tokens = [of_sentence.shape[1] for of_sentence in tokens]
    characters, *tags = np.concatenate(tokens, axis=1)
    characters = characters + stride * np.repeat(np.arange(len(tokens)), n_tokens)
    pieces = starts + stride * np.repeat(np.arange(len(tokens)), lengths)
    places = np.searchsorted(characters, pieces, side="right") - 1
    return (np.stack(tags)[:, places] * (starts >= 0)).astype(np.int16)


# ------------------------------------------------------------------------------------------ spaCy


class TaggedPart(NamedTuple):
    """The tags of one chunk of sentences."""

    tokens: dict[str, bytes]  # sentence -> its tokens with their tags, see `_decode`
    unlisted: Counter[str]  # labels that the pipeline does not list, and how often they came


def load_spacy(pipeline: Pipeline) -> Language:
    """Load a pipeline with spaCy. Raises UserError if spaCy cannot load it."""
    import spacy

    factories = _read_factories(pipeline.directory)
    unneeded = [name for name, factory in factories.items() if factory in NOT_NEEDED]
    try:
        if pipeline.package:
            importlib.import_module(pipeline.package)
        return spacy.load(pipeline.directory, exclude=unneeded)
    except Exception as error:  # whatever its many components make of a damaged file
        problem = f"spaCy cannot load it ({one_line(error)})"
        raise UserError(f"{pipeline.directory}: {problem}") from error


def run_spacy(nlp: Language, pipeline: Pipeline, sentences: list[str]) -> Iterator[TaggedPart]:
    """Tag the sentences part by part. Raises UserError if spaCy fails; earlier parts stay valid."""
    ids = [
        {nlp.vocab.strings.add(label): number for number, label in enumerate(labels)} | {0: 0}
        for labels in (pipeline.pos_labels, pipeline.ner_labels)
    ]
    chunks = [sentences[i : i + CHUNK] for i in range(0, len(sentences), CHUNK)]
    # Forking is safe on Linux only, and not with PyTorch's threads.
    can_fork = sys.platform == "linux" and not _runs_pytorch(nlp)
    n_processes = min(len(chunks), len(os.sched_getaffinity(0))) if can_fork else 1
    tag = functools.partial(_tag_chunk, nlp, ids)
    try:
        yield from map(tag, chunks) if n_processes == 1 else _fork(n_processes, tag, chunks)
    except Exception as error:  # from any component, or from a process that was killed
        raise UserError(f"{pipeline.directory}: spaCy cannot tag ({one_line(error)})") from error


def _runs_pytorch(nlp: Language) -> bool:
    models = [getattr(component, "model", None) for _, component in nlp.pipeline]
    walks = [model.walk() for model in models if model is not None and hasattr(model, "walk")]
    return any(node.shims for walk in walks for node in walk)


def _fork(
    n_processes: int, tag: functools.partial[TaggedPart], chunks: list[list[str]]
) -> Iterator[TaggedPart]:
    """Yield `tag(chunk)` for all chunks, in order, from forked processes."""
    # Without this, the tokenizers library warns in each fork.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    context, initial = multiprocessing.get_context("fork"), (tag, os.getpid())
    settings = n_processes, context, _start_worker, initial
    with concurrent.futures.ProcessPoolExecutor(*settings) as pool:
        yield from pool.map(_tag_in_worker, chunks)


# What a fork has from its start, since it could not be sent.
_inherited: list[functools.partial[TaggedPart]] = []


def _start_worker(tag: functools.partial[TaggedPart], parent: int) -> None:
    _inherited.append(tag)
    # The parent handles Ctrl-C. If it is killed, its workers are too.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it was killed before that
        os._exit(1)


def _tag_in_worker(sentences: list[str]) -> TaggedPart:
    return _inherited[-1](sentences)


def _tag_chunk(nlp: Language, ids: list[dict[int, int]], sentences: list[str]) -> TaggedPart:
    from spacy.attrs import ENT_TYPE, IDX, TAG

    part = TaggedPart({}, Counter())
    docs = nlp.pipe(sentence[:MAX_CHARACTERS] for sentence in sentences)
    for sentence, doc in zip(sentences, docs, strict=True):
        starts, *labels = doc.to_array([IDX, TAG, ENT_TYPE]).T
        tokens = np.zeros((3, len(doc) + 2), np.int32)
        tokens[0, 1:-1], tokens[0, -1] = starts, len(doc.text)
        for row, known, hashes in zip(tokens[1:], ids, labels, strict=True):
            labels_of_tokens = hashes.tolist()
            row[1:-1] = [known.get(label, 0) for label in labels_of_tokens]
            unlisted = (label for label in labels_of_tokens if label not in known)
            part.unlisted.update(nlp.vocab.strings[label] for label in unlisted)
        part.tokens[sentence] = tokens.tobytes()
    return part
