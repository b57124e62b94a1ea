"""What a trained model says about new sentences; and the model in a form that other programs open.

    python predict.py --checkpoint models/RUN.pt                   ask at a prompt
    python predict.py --checkpoint models/RUN.pt FILE              a file's lines, or a CSV's rows
    python predict.py --checkpoint models/RUN.pt --export DIR      for transformers

A line is one sentence, which gets its sentiment, or two with a tab between them, of which it is said
whether they mean the same and how similar they are.
"""

import os
import signal

if __name__ == "__main__":  # before PyTorch is imported; why, multitask_classifier.py says
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import argparse
import codecs
import contextlib
import dataclasses
import itertools
import json
import select
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from batches import Batch, evaluation_batches
from checkpoint import find_tagger
from datasets import (
    TokenColumn,
    check_quotes,
    checked_max_length,
    csv_rows,
    find_columns,
    tokenize_cached,
)
from export import export
from multitask_classifier import load_checkpoint
from options import PRECISIONS
from tasks import TASKS, Task
from utils import (
    ROOT,
    UserError,
    atomic_write,
    autocast,
    check_writable,
    exit_status,
    pick_device,
    positive_int,
    terminate,
)

# Lines that are sorted by length and answered together: few at first, so that one sees answers soon.
CHUNKS = *(2**power for power in range(6, 12)), 4096
CHUNK_BYTES = 2**22
BLOCK = 2**16  # bytes read at a time
WAIT = 0.1  # seconds that a line which has come waits for others
LONGEST = 100_000  # bytes of a line: more than any encoder has positions for
DIGITS = 6
ANSWER_WIDTH = 56

# ---------------------------------------------------------------------------------------- reading


class Query(NamedTuple):
    """A line or row of the input."""

    place: str  # for people, "line 7"
    key: dict  # for programs, {"line": 7} or {"id": "..."}
    sentences: tuple[str, ...]
    problem: str | None = None  # why there can be no answer


def query_of_line(number: int, line: bytes) -> Query:
    place, key = f"line {number}", {"line": number}
    if number == 1:
        line = line.removeprefix(codecs.BOM_UTF8)
    if len(line) > LONGEST:
        return Query(place, key, (), f"longer than {LONGEST} bytes")
    try:
        sentences = tuple(line.decode().removesuffix("\r").split("\t"))
    except UnicodeDecodeError:
        return Query(place, key, (), "not UTF-8 text")
    problem = None
    if not any(sentence.strip() for sentence in sentences):
        problem = "empty"
    elif len(sentences) > 2:
        problem = "more than one tab"
    return Query(place, key, sentences, problem)


def chunk_sizes() -> Iterator[int]:
    return itertools.chain(CHUNKS, itertools.repeat(CHUNKS[-1]))


def read_lines(descriptor: int) -> Iterator[list[bytes]]:
    """The lines of an open file or pipe, without their ends: as many as make a chunk, or as have
    come WAIT seconds after the first of them. Of a line no more than LONGEST + 1 bytes are kept."""
    sizes = chunk_sizes()
    lines, n_bytes, rest, ended, due, size = [], 0, b"", False, 0.0, next(sizes)
    while not ended:
        patience = max(0.0, due - time.monotonic()) if lines else None
        ready, _, _ = select.select([descriptor], [], [], patience)
        if ready:
            block = os.read(descriptor, BLOCK)
            ended, n_bytes = not block, n_bytes + len(block)
            *whole, rest = (rest + block).split(b"\n")
            whole += [rest] if ended and rest else []
            due = due if lines else time.monotonic() + WAIT
            lines += [line[: LONGEST + 1] for line in whole]
            rest = rest[: LONGEST + 1]
        all_of_them = ended or not ready or n_bytes >= CHUNK_BYTES
        while len(lines) >= size or lines and all_of_them:
            yield lines[:size]
            lines, n_bytes, size = lines[size:], 0, next(sizes)


def queries_of_lines(descriptor: int, name: str) -> Iterator[list[Query]]:
    numbers = itertools.count(1)
    try:
        for lines in read_lines(descriptor):
            yield [query_of_line(number, line) for line, number in zip(lines, numbers)]
    except OSError as error:
        raise UserError(f"{name}: cannot be read: {error.strerror}") from error


def queries_of_csv(path: str) -> Iterator[list[Query]]:
    """UserError: it is not tab-separated, has no sentences, or is not UTF-8."""
    rows = csv_rows(Path(path))
    header = next(rows, ("line 1", []))[1]
    known = dict.fromkeys(task.sentence_columns for task in TASKS.values())
    names = next((each for each in known if set(each) <= set(header)), None)
    if names is None:
        wanted = " or ".join(", ".join(["id", *each]) for each in known)
        raise UserError(f"{path}: line 1 does not name tab-separated columns {wanted}")
    id, *columns = find_columns(path, header, ["id", *names]).values()

    def query(place: str, cells: list[str]) -> Query:
        if len(cells) != len(header):
            problem = f"{len(cells)} cells instead of {len(header)}"
            return Query(place, {"id": None}, (), problem)
        key = {"id": cells[id].strip()}
        try:
            check_quotes(cells)
        except ValueError as problem:
            return Query(place, key, (), str(problem))
        return Query(place, key, tuple(cells[column] for column in columns))

    for size in chunk_sizes():
        if not (chunk := [query(*row) for row in itertools.islice(rows, size)]):
            break
        yield chunk


# -------------------------------------------------------------------------------------- answering


@dataclasses.dataclass
class Rows:
    """Sentences or pairs in memory, as `collate` takes a dataset."""

    task: Task
    columns: list[TokenColumn]
    cut: np.ndarray  # [n_rows] bool: whether a sentence was too long

    def __post_init__(self):
        self.n_tokens = sum(column.lengths for column in self.columns)  # [n_rows]
        self.labels = np.full(len(self.cut), np.nan)


class Predictor:
    """A checkpoint's model, which answers as it did in training.

    Args:
        path: the checkpoint.
        options: `task` (names, or None for all that it was trained on), `use_gpu`, `precision`,
            `batch_size`, `spacy_model`, `cache_dir`.

    Raises:
        UserError: the checkpoint is of no use, or was not trained on one of the tasks.
    """

    def __init__(self, path: str, options: argparse.Namespace):
        self.device = pick_device(options.use_gpu)
        self.model, self.tokenizer, checkpoint = load_checkpoint(path)
        trained = checkpoint["options"]
        self.tasks = [name for name in trained["tasks"] if name in (options.task or TASKS)]
        if unknown := [name for name in options.task or [] if name not in trained["tasks"]]:
            known = ", ".join(trained["tasks"])
            raise UserError(f"{path}: was not trained on {', '.join(unknown)}, only on {known}")
        tags = checkpoint.get("tags")
        asked = argparse.Namespace(
            additional_input=False,  # asks for tags of a model that has none
            spacy_model=options.spacy_model or (trained["spacy_model"] if tags else None),
            cache_dir=options.cache_dir,
            max_length=trained["max_length"],
        )
        self.tagger = find_tagger(tags, path, asked)
        config = self.model.bert.config
        self.max_length = checked_max_length(asked, path, config, self.tokenizer)
        self.precision, self.batch_size = options.precision, options.batch_size
        if self.precision == "auto":
            self.precision = trained.get("precision", "auto")
        self.model.to(self.device).eval()

    def tasks_for(self, n_sentences: int) -> list[str]:
        """The tasks that take one sentence, or two."""
        return [name for name in self.tasks if len(TASKS[name].sentence_columns) == n_sentences]

    @property
    def titles(self) -> str:
        return " and ".join(TASKS[name].title for name in self.tasks)

    def refusal(self, sentences: tuple[str, ...]) -> str | None:
        """Why no task takes so many sentences, if so."""
        if self.tasks_for(len(sentences)):
            return None
        what = "one sentence" if len(sentences) == 1 else "two sentences"
        return f"{what}, where only {self.titles} can be answered"

    def answers(
        self, texts: list[tuple[str, ...]], progress: Callable = lambda n: None
    ) -> list[dict]:
        """What all tasks for them say of sentences and pairs, in the same order. `progress` is told
        how many have been answered after each batch.

        Returns:
            of each, `sentiment` (0 to 4) and `sentiment_probabilities` (five); or `paraphrase` (a
            probability) and `similarity` (0 to 5). `cut` is true where a sentence was too long.
        """
        answers = [{} for _ in texts]
        for n_sentences in (1, 2):
            places = [place for place, each in enumerate(texts) if len(each) == n_sentences]
            names = self.tasks_for(n_sentences)
            if places and names:
                found = self._answers(names, [texts[place] for place in places], progress)
                for place, answer in zip(places, found, strict=True):
                    answers[place] = answer
        return answers

    @torch.no_grad()
    def _answers(
        self, names: list[str], texts: list[tuple[str, ...]], progress: Callable
    ) -> list[dict]:
        rows, answers = self._rows(names, texts), [{} for _ in texts]
        with autocast(self.device, self.precision):
            for batch in evaluation_batches(rows, self.batch_size):
                places = batch.rows[rows.task.name]
                outputs = self.model(self._with_columns(batch, names).to(self.device))
                for name, output in outputs.items():
                    found = as_answers(TASKS[name], output.float().cpu())
                    for place, answer in zip(places, found, strict=True):
                        answers[place] |= answer
                progress(len(places))
        for place in np.flatnonzero(rows.cut):
            answers[place]["cut"] = True
        return answers

    def _rows(self, names: list[str], texts: list[tuple[str, ...]]) -> Rows:
        """Each column once that one of the tasks needs: sentences alone, both as one sequence."""
        sentences = [text for column in zip(*texts) for text in column]
        pieces, lengths = tokenize_cached(
            sentences, self.tokenizer, self.max_length, None, "", self.tagger
        )
        offsets, n_rows = np.concatenate([[0], np.cumsum(lengths)]), len(texts)
        starts = range(0, len(sentences), n_rows)
        columns = [TokenColumn(pieces, offsets[start : start + n_rows + 1]) for start in starts]
        cut = self._too_long(sentences, lengths).reshape(-1, n_rows).any(axis=0)
        encodings = {self.model.encodings[name] for name in names}
        if encodings != {"bi"}:
            joint = TokenColumn.joint(*columns, self.max_length)
            cut |= joint.lengths < sum(column.lengths for column in columns) - 1
            columns = [joint] if encodings == {"cross"} else [*columns, joint]
        return Rows(TASKS[names[0]], columns, cut)

    def _too_long(self, sentences: list[str], lengths: np.ndarray) -> np.ndarray:
        """[n_sentences] bool: whether more word pieces would be there without the limit."""
        full = np.flatnonzero(lengths == self.max_length)
        some = [sentences[place] for place in full]
        _, longer = self.tokenizer.packed_ids(some, self.max_length + 1)
        too_long = np.zeros(len(sentences), bool)
        too_long[full] = longer > self.max_length
        return too_long

    def _with_columns(self, batch: Batch, names: list[str]) -> Batch:
        """Give all tasks their columns of those that the encoder reads for the first one."""
        (slices,) = batch.columns.values()
        of_encoding = {"bi": slices[:2], "cross": slices[-1:], "both": slices}
        columns = {name: of_encoding[self.model.encodings[name]] for name in names}
        return dataclasses.replace(batch, columns=columns)


def as_answers(task: Task, outputs: Tensor) -> list[dict]:
    """The head's outputs [B, classes] or [B] as what stands in an answer, [B]."""
    if not task.classes:
        values = task.decode(outputs).tolist()
        return [{task.title: round(value, DIGITS)} for value in values]
    probabilities = outputs.softmax(dim=-1)
    rounded = [[round(p, DIGITS) for p in row] for row in probabilities.tolist()]
    if len(task.classes) == 2:
        return [{task.title: row[1]} for row in rounded]
    key = f"{task.title}_probabilities"
    labels = task.decode(outputs).tolist()
    return [{task.title: label, key: row} for label, row in zip(labels, rounded)]


class Remarks:
    """What there is to say about the input: one line for each kind, when all is read."""

    def __init__(self):
        self.places = {}  # kind -> [the first place, how many]

    def add(self, kind: str, place: str) -> None:
        self.places.setdefault(kind, [place, 0])[1] += 1

    def tell(self) -> None:
        for kind, (place, count) in self.places.items():
            warnings.warn(f"{count} {'line' if count == 1 else 'lines'} {kind} (first: {place})")


def answer(
    predictor: Predictor,
    queries: list[Query],
    remarks: Remarks,
    progress: Callable = lambda n: None,
) -> list[dict]:
    """An answer to each query, {"error": reason} where there is none."""
    problems = [query.problem or predictor.refusal(query.sentences) for query in queries]
    good = [query.sentences for query, problem in zip(queries, problems) if not problem]
    progress(len(queries) - len(good))
    found = iter(predictor.answers(good, progress))
    answers = [{"error": problem} if problem else next(found) for problem in problems]
    for query, each in zip(queries, answers):
        if "error" in each:
            remarks.add(f"not answered: {each['error']}", query.place)
        elif not all(sentence.strip() for sentence in query.sentences):
            remarks.add("answered although a sentence is empty", query.place)
        if "cut" in each:
            remarks.add(f"cut after {predictor.max_length} word pieces", query.place)
    return answers


# ---------------------------------------------------------------------------------------- writing


def as_text(answer: dict) -> str:
    """For people: `sentiment 3 somewhat positive  0.01 ...`, `paraphrase 0.97  similarity 4.42`."""
    if "error" in answer:
        return f"({answer['error']})"
    parts = []
    for task in TASKS.values():
        value = answer.get(task.title)
        if isinstance(value, int):
            name = task.classes[value]
            shares = " ".join(f"{p:.2f}" for p in answer[f"{task.title}_probabilities"])
            parts.append(f"{task.title} {value} {name:<17}  {shares}")
        elif value is not None:
            parts.append(f"{task.title} {value:.2f}")
    return "  ".join(parts + ["(cut)"] * ("cut" in answer))


def text_line(query: Query, answer: dict) -> str:
    sentences = [" ".join(sentence.split()) for sentence in query.sentences]  # a cell has line ends
    return f"{as_text(answer):<{ANSWER_WIDTH}} {' | '.join(sentences)}".rstrip()


def json_line(query: Query, answer: dict) -> str:
    return json.dumps(query.key | answer)


@contextlib.contextmanager
def standard_output():
    """A reader that has gone, as `head` does, ends the block quietly; a full disk is a UserError."""
    sys.stdout.reconfigure(errors="backslashreplace")
    try:
        yield sys.stdout
        sys.stdout.flush()
    except OSError as error:
        # Python would try to write the rest once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            raise UserError(f"cannot write the answers: {error.strerror}") from error


@contextlib.contextmanager
def output_file(path: str):
    with atomic_write(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        yield file


def answer_all(
    predictor: Predictor, chunks: Iterator[list[Query]], render: Callable, output: str | None
) -> None:
    """Write a line for each query, chunk by chunk."""
    remarks = Remarks()
    hidden = output is None and sys.stdout.isatty()  # answers show how far it is
    bar = tqdm(desc="answering", unit=" lines", delay=1, disable=hidden)
    try:
        with bar, output_file(output) if output else standard_output() as file:
            for queries in chunks:
                answers = answer(predictor, queries, remarks, bar.update)
                file.writelines(f"{render(*each)}\n" for each in zip(queries, answers))
                file.flush()
    finally:
        remarks.tell()


def converse(predictor: Predictor, render: Callable) -> None:
    """Answer what is typed, until Ctrl-D."""
    with contextlib.suppress(ImportError):
        import readline

        libedit = "libedit" in (readline.__doc__ or "")
        readline.parse_and_bind("bind '^I' ed-insert" if libedit else "tab: tab-insert")
    print(f"Type a sentence, or two with a tab between them, for: {predictor.titles}.")
    print("Ctrl-D ends.")
    with contextlib.suppress(EOFError):
        for number in itertools.count(1):
            line = input("> ").encode(errors="surrogateescape")
            if line.strip():
                query = query_of_line(number, line)
                (each,) = answer(predictor, [query], Remarks())
                print(render(query, each))
    print()


def predict(args: argparse.Namespace) -> None:
    from_stdin = args.input in (None, "-")
    try:
        file = sys.stdin.buffer if from_stdin else open(args.input, "rb", buffering=0)
    except OSError as error:
        raise UserError(f"{args.input}: cannot be read: {error.strerror}") from error
    if args.output:
        check_writable(args.output)
    predictor = Predictor(args.checkpoint, args)
    if from_stdin and not args.output and sys.stdin.isatty() and sys.stdout.isatty():
        return converse(predictor, json_line if args.json else lambda _, each: as_text(each))
    with contextlib.nullcontext() if from_stdin else file:
        is_csv = not from_stdin and args.input.endswith(".csv")
        name = "standard input" if from_stdin else args.input
        chunks = queries_of_csv(name) if is_csv else queries_of_lines(file.fileno(), name)
        answer_all(predictor, chunks, json_line if args.json else text_line, args.output)


# ----------------------------------------------------------------------------------------- export


# ------------------------------------------------------------------------------------------- main


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="What a trained model says of new sentences: of one on a line, its sentiment; of "
        "two with a tab between them, whether they mean the same and how similar they are (0 to 5)."
    )
    flag = parser.add_argument
    flag(
        "input",
        nargs="?",
        metavar="INPUT",
        help="a file of lines; or a tab-separated NAME.csv with columns id and sentence, or id, "
        "sentence1 and sentence2; default, and -: standard input, at a terminal a prompt",
    )
    flag("--checkpoint", required=True, metavar="PT", help="models/RUN.pt of a training run")
    flag(
        "--task",
        action="append",
        choices=TASKS,
        help="answer only this (more may be given); default: all that the model was trained on",
    )
    flag("--json", action="store_true", help="one JSON object a line, for programs")
    flag("--output", metavar="FILE", help="default: standard output")
    flag("--batch_size", type=positive_int, default=64, help="as in an evaluation; default: 64")
    flag("--use_gpu", action="store_true")
    flag("--precision", choices=PRECISIONS, default="auto", help="default: that of training")
    flag(
        "--spacy_model",
        metavar="NAME_OR_PATH",
        help="the spaCy pipeline of a model that was trained with one, if it has moved since",
    )
    flag(
        "--cache_dir",
        default=str(ROOT / ".cache"),
        help="where tags are kept for the next time; default: .cache of the checkout",
    )
    flag(
        "--export",
        metavar="DIR",
        help="no answers: write the model as a new folder for transformers and sentence-transformers",
    )
    args = parser.parse_args(argv)
    if args.export and (args.input or args.output or args.task or args.json):
        parser.error("--export writes the whole model and answers nothing")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)

    def work():
        if args.export:
            export(args.checkpoint, args.export)
        else:
            predict(args)

    return exit_status(work, when_memory_is_full="lower --batch_size", when_interrupted="")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # from here on main() answers it
    signal.signal(signal.SIGTERM, terminate)
    sys.exit(main())
