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
# Components by the name of their factory. Those that change neither tag are left out to save time.
TAGGERS = {"tagger"}
RECOGNISERS = {"ner", "beam_ner", "entity_ruler", "future_entity_ruler", "span_ruler"}
NOT_NEEDED = {"lemmatizer", "trainable_lemmatizer", "entity_linker", "textcat", "spancat"}
NOT_NEEDED |= {"textcat_multilabel", "span_finder", "experimental_coref"}
# SQLite's errors that say nothing of the file's content.
CIRCUMSTANCES = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_FULL}
CIRCUMSTANCES |= {sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM}
CIRCUMSTANCES |= {sqlite3.SQLITE_IOERR, sqlite3.SQLITE_NOMEM, sqlite3.SQLITE_PROTOCOL}


# ---------------------------------------------------------------------------------------- pipeline


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """What decides a spaCy pipeline's tags, read from its files without spaCy."""

    directory: Path = dataclasses.field(compare=False)
    package: str | None = dataclasses.field(compare=False)  # which may bring code of its own
    name: str
    version: str
    digest: str  # SHA-256 of its files
    pos_labels: tuple[str, ...]  # label i is the i-th id
    ner_labels: tuple[str, ...]

    @classmethod
    def find(cls, name_or_path: str) -> "Pipeline":
        """An installed pipeline's name, or a directory. UserError: there is none, or it has no
        tagger or no entity recogniser."""
        directory, package = _find_directory(name_or_path)
        meta, factories = _read_meta(directory), _read_factories(directory)
        try:
            name, version = f"{meta['lang']}_{meta['name']}", str(meta["version"])
            pos, ner = (_labels(meta, factories, kinds) for kinds in (TAGGERS, RECOGNISERS))
        except (KeyError, TypeError) as error:
            raise UserError(f"{directory / 'meta.json'}: damaged ({one_line(error)})") from error
        found = {"tagger": pos, "entity recogniser": ner}
        if lacking := [kind for kind, labels in found.items() if not labels]:
            raise UserError(
                f"{name_or_path}: this spaCy pipeline has no {' and no '.join(lacking)}"
            )
        digest = _digest_files(directory)
        return cls(directory, package, name, version, digest, (NONE, *pos), (NONE, *ner))

    def to_dict(self) -> dict:
        """For a checkpoint; equal for pipelines that give the same tags."""
        values = dataclasses.asdict(self)
        del values["directory"], values["package"]
        return {
            key: list(each) if isinstance(each, tuple) else each for key, each in values.items()
        }

    def __str__(self) -> str:
        return f"{self.name} {self.version} ({self.digest[:8]})"


def _find_directory(name_or_path: str) -> tuple[Path, str | None]:
    """Where config.cfg and meta.json are, and the package's name if they are in one."""
    path, package = Path(name_or_path), None
    if not path.is_dir():
        if not name_or_path.isidentifier():
            raise UserError(f"{name_or_path}: no such directory")
        package, path = name_or_path, _find_package(name_or_path)
    if not (path / "config.cfg").is_file() and (path / "meta.json").is_file():
        meta = _read_meta(path)  # a package: the pipeline is in a folder of its own
        with contextlib.suppress(KeyError, TypeError):
            inner = path / f"{meta['lang']}_{meta['name']}-{meta['version']}"
            path = inner if inner.is_dir() else path
    return path, package


def _find_package(name: str) -> Path:
    try:
        spec = importlib.util.find_spec(name)
    except ValueError:  # of __main__ and the like
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"{name}: no such directory, and no spaCy pipeline of this name is installed; "
            f"run: python -m spacy download {name}"
        )
    return Path(spec.submodule_search_locations[0])


def _labels(meta: dict, factories: dict[str, str], kinds: set[str]) -> list[str]:
    """Of all components of these kinds, each once."""
    names = [name for name, factory in factories.items() if factory in kinds]
    return list(dict.fromkeys(str(label) for name in names for label in meta["labels"][name]))


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
    parser.optionxform = str  # as spaCy reads it: upper and lower case differ
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
    try:
        for folder, folders, names in os.walk(directory, followlinks=True):
            folders.sort()
            for path in (Path(folder, name) for name in sorted(names)):
                place = path.relative_to(directory).as_posix().encode()
                with open(path, "rb") as file:
                    digest.update(place + b"\0" + hashlib.file_digest(file, "sha256").digest())
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read: {error.strerror}") from error
    return digest.hexdigest()


# -------------------------------------------------------------------------------------- the cache


class TagStore:
    """Sentence -> what spaCy found in it, as bytes (see `_tokens_of`); a SQLite file that runs
    share. With each value stands a checksum; one that does not fit is as good as none.

    Raises:
        sqlite3.Error, OSError: from all methods, where the file cannot be used.
    """

    TABLE = b"CREATE TABLE tags (sentence BLOB PRIMARY KEY, tokens BLOB) WITHOUT ROWID"

    def __init__(self, path: Path):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = filelock.FileLock(path.with_name(f".{path.name}.lock"))
        if not self._open():
            with self.alone():
                if not self._open():  # nobody else has mended it meanwhile
                    warnings.warn(f"{path}: damaged; its sentences are tagged anew")
                    path.unlink()
                    path.with_name(f"{path.name}-journal").unlink(missing_ok=True)
                    self._open()

    @contextlib.contextmanager
    def alone(self):
        """Keep other runs from writing meanwhile. The lock is flock's, so a killed run holds
        none."""
        try:
            self._lock.acquire(timeout=1)
        except filelock.Timeout:
            print(f"another run is tagging sentences into {self.path}; waiting for it")
            self._lock.acquire()
        try:
            yield
        finally:
            self._lock.release()

    def read(self, sentences: list[str]) -> dict[str, bytes]:
        """Those of the sentences that are there."""
        by_key = {_key(sentence): sentence for sentence in sentences}
        keys, found = list(by_key), {}
        for start in range(0, len(keys), CHUNK):
            some = keys[start : start + CHUNK]
            places = ",".join("?" * len(some))
            query = f"SELECT sentence, tokens FROM tags WHERE sentence IN ({places})"
            for key, value in self.connection.execute(query, some):
                if isinstance(value, bytes) and value[:4] == _checksum(key, value[4:]):
                    found[by_key[key]] = value[4:]
        return found

    def write(self, found: dict[str, bytes]) -> None:
        keys = {_key(sentence): value for sentence, value in found.items()}
        rows = [(key, _checksum(key, value) + value) for key, value in keys.items()]
        with self.connection:  # one transaction
            self.connection.executemany("INSERT OR REPLACE INTO tags VALUES (?, ?)", rows)

    def close(self) -> None:
        self.connection.close()

    def _open(self) -> bool:
        """Connect; False if the file is damaged."""
        self.connection = sqlite3.connect(self.path, timeout=60)
        self.connection.text_factory = bytes  # a damaged file's text may be anything
        try:
            tables = self.connection.execute("SELECT sql FROM sqlite_master").fetchall()
            if not tables:
                self.connection.execute(self.TABLE.decode().replace("TABLE", "TABLE IF NOT EXISTS"))
                return True
            check = self.connection.execute("PRAGMA integrity_check").fetchall()
            if tables == [(self.TABLE,)] and check == [(b"ok",)]:
                return True
        except sqlite3.Error as error:
            cut_short = error.sqlite_errorcode == sqlite3.SQLITE_IOERR_SHORT_READ
            if error.sqlite_errorcode & 0xFF in CIRCUMSTANCES and not cut_short:
                raise
        except UnicodeDecodeError:  # an error's text that quotes what is damaged
            pass
        self.connection.close()
        return False


def _key(sentence: str) -> bytes:
    return hashlib.sha256(sentence.encode()).digest()[:16]


def _checksum(key: bytes, value: bytes) -> bytes:
    return zlib.crc32(value, zlib.crc32(key)).to_bytes(4, "little")


# ---------------------------------------------------------------------------------------- tagging


class Tagger:
    """Gives word pieces their tags; what spaCy has found once it looks up.

    Args:
        pipeline: whose tags.
        cache_dir: where they are kept; None keeps them in memory. One that cannot be used is a
            warning.
    """

    def __init__(self, pipeline: Pipeline, cache_dir: str | Path | None = None):
        self.pipeline = pipeline
        self._memory = {}  # in place of a store
        self._store = self._nlp = None
        if cache_dir is not None:
            identity = json.dumps(pipeline.to_dict(), sort_keys=True).encode()
            name = f"tags-{hashlib.sha256(identity).hexdigest()[:32]}.sqlite"
            with self._warning(cache_dir):
                self._store = TagStore(Path(cache_dir) / name)

    def tags_of_pieces(
        self, sentences: list[str], lengths: np.ndarray, starts: np.ndarray, title: str = ""
    ) -> np.ndarray:
        """The tags of all word pieces of some sentences.

        Args:
            sentences: [n_sentences].
            lengths: [n_sentences] their numbers of word pieces.
            starts: [n_pieces] the first character of each piece in its sentence; -1 for a special
                token, which has no tags.
            title: what the progress bar calls the sentences.

        Returns:
            [2, n_pieces] int16: part-of-speech ids and named-entity ids.

        Raises:
            UserError: spaCy cannot tag them.
        """
        found = self._look_up_or_tag(list(dict.fromkeys(sentences)), title)
        tags, ends = [np.empty((2, 0), np.int16)], np.cumsum(lengths)
        for first in range(0, len(sentences), CHUNK):
            some = slice(first, first + CHUNK)
            tokens = [_tokens_of(found[sentence]) for sentence in sentences[some]]
            pieces = starts[ends[first] - lengths[first] : ends[some][-1]]
            tags.append(_align(tokens, lengths[some], pieces))
        return np.concatenate(tags, axis=1)

    def describe(self, pos_id: int, ner_id: int) -> str:
        """For people to read: "/NNP/PERSON", "/NN" for what is no entity, "" for no tags."""
        labels = self.pipeline.pos_labels[pos_id], self.pipeline.ner_labels[ner_id]
        return "".join(f"/{label}" for label in labels if label != NONE)

    def rest(self) -> None:
        """Give back spaCy's memory, until there is something to tag again."""
        self._nlp = None

    def _look_up_or_tag(self, sentences: list[str], title: str) -> dict[str, bytes]:
        found = self._read(sentences)
        if len(found) < len(sentences):
            with self._store.alone() if self._store else contextlib.nullcontext():
                found |= self._read([each for each in sentences if each not in found])
                missing = [each for each in sentences if each not in found]
                if missing:
                    found |= self._tag(missing, title)
        return found

    def _tag(self, sentences: list[str], title: str) -> dict[str, bytes]:
        self._nlp = self._nlp or load_spacy(self.pipeline)
        found, unknown = {}, Counter()
        progress = dict(total=len(sentences), desc=f"tagging {title}", unit="sentence", delay=1)
        with tqdm(**progress) as bar:
            for some, strangers in run_spacy(self._nlp, self.pipeline, sentences):
                self._write(some)
                found |= some
                unknown += strangers
                bar.update(len(some))
        if unknown:
            labels = ", ".join(f"{label} ({count} times)" for label, count in unknown.items())
            warnings.warn(f"{self.pipeline}: its meta.json does not list {labels}: taken as none")
        return found

    def _read(self, sentences: list[str]) -> dict[str, bytes]:
        found = {each: self._memory[each] for each in sentences if each in self._memory}
        if self._store:
            with self._warning(self._store.path):
                found |= self._store.read(sentences)
        return found

    def _write(self, found: dict[str, bytes]) -> None:
        if self._store:
            with self._warning(self._store.path):
                self._store.write(found)
        if not self._store:
            self._memory |= found

    @contextlib.contextmanager
    def _warning(self, path):
        """A store that cannot be used is a warning; from then on there is none."""
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            warnings.warn(f"{path}: {one_line(error)}, so tags are not kept there")
            self._store = None


def _tokens_of(value: bytes) -> np.ndarray:
    """[3, n + 2] int32: where each of n tokens starts (characters), its part-of-speech id and its
    named-entity id; before and behind them a column without tags."""
    return np.frombuffer(value, np.int32).reshape(3, -1)


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

    factories = _read_factories(pipeline.directory)
    unneeded = [name for name, factory in factories.items() if factory in NOT_NEEDED]
    try:
        if pipeline.package:
            importlib.import_module(pipeline.package)
        return spacy.load(pipeline.directory, exclude=unneeded)
    except Exception as error:  # whatever its many components make of a damaged file
        raise UserError(
            f"{pipeline.directory}: spaCy cannot load it ({one_line(error)})"
        ) from error


def run_spacy(
    nlp, pipeline: Pipeline, sentences: list[str]
) -> Iterator[tuple[dict[str, bytes], Counter]]:
    """Part by part: what is found in each sentence, labels that the pipeline does not list.
    UserError: spaCy fails; what came before that is good."""
    ids = [
        {nlp.vocab.strings.add(label): number for number, label in enumerate(labels)} | {0: 0}
        for labels in (pipeline.pos_labels, pipeline.ner_labels)
    ]
    chunks = [sentences[i : i + CHUNK] for i in range(0, len(sentences), CHUNK)]
    # To fork is safe on Linux only, and not with PyTorch's threads.
    can_fork = sys.platform == "linux" and not _runs_pytorch(nlp)
    processes = min(len(chunks), len(os.sched_getaffinity(0))) if can_fork else 1
    try:
        if processes == 1:
            yield from (_tag_chunk(nlp, ids, chunk) for chunk in chunks)
        else:
            yield from _tag_in_processes(processes, nlp, ids, chunks)
    except UserError:
        raise
    except Exception as error:  # of any component, or of a process that was killed
        raise UserError(f"{pipeline.directory}: spaCy cannot tag ({one_line(error)})") from error


def _runs_pytorch(nlp) -> bool:
    models = [getattr(component, "model", None) for _, component in nlp.pipeline]
    walks = [model.walk() for model in models if hasattr(model, "walk")]
    return any(node.shims for walk in walks for node in walk)


def _tag_in_processes(processes: int, nlp, ids: list[dict], chunks: list[list[str]]):
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # or each fork is told of in a warning
    context, parent = multiprocessing.get_context("fork"), os.getpid()
    pool = concurrent.futures.ProcessPoolExecutor(
        processes, context, _start_worker, (nlp, ids, parent)
    )
    try:
        yield from pool.map(_work, chunks)
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker(nlp, ids: list[dict], parent: int) -> None:
    """Ctrl-C is for the parent to answer, and a killed parent's workers must not outlive it
    (PR_SET_PDEATHSIG, from prctl.h)."""
    global _worker
    _worker = nlp, ids
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if os.getppid() != parent:  # killed before that
        os._exit(1)


def _work(sentences: list[str]):
    return _tag_chunk(*_worker, sentences)


def _tag_chunk(nlp, ids: list[dict], sentences: list[str]) -> tuple[dict[str, bytes], Counter]:
    from spacy.attrs import ENT_TYPE, IDX, TAG

    found, unknown = {}, Counter()
    docs = nlp.pipe(sentence[:MAX_CHARACTERS] for sentence in sentences)
    for sentence, doc in zip(sentences, docs, strict=True):
        starts, *labels = doc.to_array([IDX, TAG, ENT_TYPE]).T
        tokens = np.zeros((3, len(doc) + 2), np.int32)
        tokens[0, 1:-1], tokens[0, -1] = starts, len(doc.text)
        for row, known, hashes in zip(tokens[1:], ids, labels):
            numbers = [known.get(label, -1) for label in hashes.tolist()]
            unknown.update(nlp.vocab.strings[h] for h, n in zip(hashes.tolist(), numbers) if n < 0)
            row[1:-1] = np.maximum(numbers, 0)
        found[sentence] = tokens.tobytes()
    return found, unknown
