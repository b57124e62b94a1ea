"""Answer new sentences with a trained model, or export the model for other libraries.

    python predict.py --checkpoint models/RUN.pt                   ask at a prompt
    python predict.py --checkpoint models/RUN.pt FILE              a file's lines, or a table's rows
    python predict.py --checkpoint models/RUN.pt --export DIR      for transformers

A line holds one sentence, or two separated by a tab; the tasks for as many sentences answer it.
"""

import os
import signal

if __name__ == "__main__":  # before PyTorch is imported; multitask_classifier.py says why
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import argparse
import codecs
import contextlib
import functools
import itertools
import json
import select
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple, TextIO

from tqdm import tqdm

from checkpoint import find_files
from export import FORMATS, export
from flags import PRECISIONS
from predictor import LONGEST, Entries, Predictor, Progress, text_problem
from streams import Parser, write_required
from tables import check_cells, find_columns, open_table
from tasks import Task
from utils import (
    ROOT,
    UserError,
    atomic_write,
    check_writable,
    exit_status,
    positive_int,
    terminate,
)

# Lines that are sorted by length and answered together: few at first, so that answers show soon.
CHUNKS = *(2**power for power in range(6, 12)), 4096
CHUNK_BYTES = 2**22
BLOCK = 2**16  # bytes read at a time
WAIT = 0.1  # seconds that a line waits for others
ANSWER_WIDTH = 56
SHOWN_CLASSES = 10  # for people; JSON has all probabilities


# ---------------------------------------------------------------------------------------- reading


class Query(NamedTuple):
    """A line or row of the input."""

    place: str  # for people, "line 7"
    key: dict[str, Any]  # for programs, {"line": 7} or {"id": "..."}
    sentences: tuple[str, ...]
    problem: str | None = None  # why there can be no answer


def parse_line(number: int, line: bytes) -> Query:
    """Read a line of the input; the first one has number 1."""
    place, key = f"line {number}", {"line": number}
    if number == 1:
        line = line.removeprefix(codecs.BOM_UTF8)
    if len(line) > LONGEST:
        return Query(place, key, (), f"longer than {LONGEST} bytes")
    try:
        sentences = tuple(line.decode().removesuffix("\r").split("\t"))
    except UnicodeDecodeError:
        return Query(place, key, (), "not UTF-8 text")
    too_many = "more than one tab" if len(sentences) > 2 else None
    return Query(place, key, sentences, text_problem(sentences) or too_many)


def parse_row(
    place: str, cells: list[str] | str, header: list[str], columns: dict[str, int], id: str
) -> Query:
    """Read a row of a table. `columns` gives the numbers of the sentences' columns; `id` names the column
    of ids, or is empty."""
    kind, number, *_ = place.split()
    key: dict[str, Any] = {kind.removesuffix("s"): int(number)}
    try:
        row = check_cells(cells, header)
    except ValueError as problem:
        return Query(place, key, (), str(problem))
    if id:
        key = {"id": row[header.index(id)].strip()}
    return Query(place, key, tuple(row[column] for column in columns.values()))


def chunk_sizes() -> Iterator[int]:
    return itertools.chain(CHUNKS, itertools.repeat(CHUNKS[-1]))


def read_lines(descriptor: int) -> Iterator[list[bytes]]:
    """Yield the lines of an open file or pipe in chunks, without their ends.

    A chunk has as many lines as fill it, or as have come WAIT seconds after its first one. A line is
    cut after LONGEST + 1 bytes.
    """
    sizes = chunk_sizes()
    size, n_bytes, due = next(sizes), 0, 0.0
    lines: list[bytes] = []
    rest, ended = b"", False
    while not ended:
        timeout = max(0.0, due - time.monotonic()) if lines else None
        ready, _, _ = select.select([descriptor], [], [], timeout)
        if ready:
            block = os.read(descriptor, BLOCK)
            ended, n_bytes = not block, n_bytes + len(block)
            *whole, rest = (rest + block).split(b"\n")
            if ended and rest:
                whole.append(rest)
            if not lines:
                due = time.monotonic() + WAIT
            lines += [line[: LONGEST + 1] for line in whole]
            rest = rest[: LONGEST + 1]
        all_of_them = ended or not ready or n_bytes >= CHUNK_BYTES
        while len(lines) >= size or (lines and all_of_them):
            yield lines[:size]
            lines, n_bytes, size = lines[size:], 0, next(sizes)


def read_queries(descriptor: int, name: str) -> Iterator[list[Query]]:
    """Yield the lines of an open file or pipe in chunks. `name` is for errors."""
    numbers = itertools.count(1)
    try:
        for lines in read_lines(descriptor):
            yield [parse_line(next(numbers), line) for line in lines]
    except OSError as error:
        raise UserError(f"{name}: cannot be read: {error.strerror}") from error


def holds_objects(path: str, header: list[str]) -> bool:
    """Return whether a file with this header is Parquet or JSON lines: no lines of text."""
    with open(path, "rb") as file:
        start = file.read(4096).removeprefix(codecs.BOM_UTF8)
    return bool(header) and start.lstrip().startswith((b"PAR1", b"{"))


def read_table_queries(path: str, tasks: list[Task]) -> Iterator[list[Query]] | None:
    """Return the rows of a table in chunks; None for a file whose first line does not name the columns
    of a task. Raises UserError if the file cannot be read."""
    layouts = list(dict.fromkeys(task.sentences for task in tasks))
    # Several tasks can differ in how their files are read.
    agree = len({(task.columns, task.separator, task.quoting) for task in tasks}) == 1
    header, rows = open_table(path, layouts, tasks[0] if agree else None)
    layout = next((names for names in layouts if set(names) <= set(header)), None)
    if layout is None:
        unnamed = f"line 1 does not name the columns {' or '.join(map(', '.join, layouts))}"
        if path.lower().endswith(".csv") or holds_objects(path, header):
            raise UserError(f"{path}: {unnamed}")
        if path.lower().endswith(".tsv"):
            warnings.warn(f"{path}: {unnamed}; it is answered like the other lines")
        return None
    columns = find_columns(path, header, list(layout))
    ids = [task.id for task in tasks if task.sentences == layout and task.id in header]
    id = ids[0] if ids else ""
    queries = (parse_row(*row, header, columns, id) for row in rows)
    chunks = (list(itertools.islice(queries, size)) for size in chunk_sizes())
    return itertools.takewhile(bool, chunks)


# -------------------------------------------------------------------------------------- answering


class Remarks:
    """Warnings about the input: one line for each kind, when everything has been read."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.first_places: dict[str, str] = {}

    def add(self, kind: str, place: str) -> None:
        self.counts[kind] += 1
        self.first_places.setdefault(kind, place)

    def show(self) -> None:
        for kind, count in self.counts.items():
            lines = "line" if count == 1 else "lines"
            warnings.warn(f"{count} {lines} {kind} (first: {self.first_places[kind]})")


def answer_queries(
    predictor: Predictor,
    queries: list[Query],
    remarks: Remarks,
    progress: Progress = lambda n: None,
) -> list[Entries]:
    """Answer each query, with {"error": reason} where that is not possible."""
    problems = [query.problem or predictor.refusal(query.sentences) for query in queries]
    good = [query for query, problem in zip(queries, problems, strict=True) if not problem]
    progress(len(queries) - len(good))
    found = iter(predictor.answers([query.sentences for query in good], progress))
    answers = [{"error": problem} if problem else next(found) for problem in problems]
    for query, answer in zip(queries, answers, strict=True):
        if "error" in answer:
            remarks.add(f"not answered: {answer['error']}", query.place)
        elif not all(sentence.strip() for sentence in query.sentences):
            remarks.add("answered although a sentence is empty", query.place)
        if "cut" in answer:
            remarks.add(f"cut after {predictor.max_length} word pieces", query.place)
    return answers


# ---------------------------------------------------------------------------------------- writing

Render = Callable[[Query, Entries], str]  # a line of the output


def to_text(tasks: Collection[Task], answer: Entries) -> str:
    """Write an answer for people: `sentiment 3 somewhat positive  0.01 ...`, or
    `paraphrase 0.97  similarity 4.42`."""
    if "error" in answer:
        return f"({answer['error']})"
    entries = []
    for task in tasks:
        value = answer.get(task.title)
        if value is None:
            continue
        entry = [task.title]
        if shares := answer.get(f"{task.title}_probabilities"):
            # Names of one width, so that the numbers are below each other.
            width = max(map(len, task.classes))
            name = task.classes[task.texts.index(str(value))]
            entry += [name.ljust(width) if name == value else f"{value} {name:<{width}}", ""]
            entry += [f"{share:.2f}" for share in shares[:SHOWN_CLASSES]]
            entry += ["..."] if len(shares) > SHOWN_CLASSES else []
        else:
            if task.classes and task.title != task.classes[1]:  # the more probable class
                entry.append(task.classes[value >= 0.5])
                value = max(value, 1 - value)
            entry.append(f"{value:.2f}")
        entries.append(" ".join(entry))
    if "cut" in answer:
        entries.append("(cut)")
    return "  ".join(entries)


def to_text_line(tasks: Collection[Task], query: Query, answer: Entries) -> str:
    # A cell of a CSV may have line ends.
    sentences = [" ".join(sentence.split()) for sentence in query.sentences]
    return f"{to_text(tasks, answer):<{ANSWER_WIDTH}} {' | '.join(sentences)}".rstrip()


def to_json_line(query: Query, answer: Entries) -> str:
    return json.dumps(query.key | answer)


@contextlib.contextmanager
def output_file(path: str) -> Iterator[TextIO]:
    """Yield a file that takes its name when all of it has been written."""
    with atomic_write(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        yield file


def write_answers(
    predictor: Predictor, chunks: Iterator[list[Query]], render: Render, output: str | None
) -> None:
    """Write a line for each query, chunk by chunk."""
    remarks = Remarks()
    # At a terminal, the answers themselves show the progress.
    hidden = output is None and sys.stdout.isatty()
    bar = tqdm(desc="answering", unit=" lines", delay=1, disable=hidden)
    try:
        with bar, output_file(output) if output else contextlib.nullcontext() as file:
            n_queries = 0
            for queries in chunks:
                n_queries += len(queries)
                answers = answer_queries(predictor, queries, remarks, bar.update)
                rows = zip(queries, answers, strict=True)
                write_required("".join(f"{render(*row)}\n" for row in rows), file)
        if not n_queries:
            warnings.warn("the input has no lines to answer")
    finally:
        remarks.show()


def converse(predictor: Predictor, render: Render) -> None:
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
                query = parse_line(number, line)
                (answer,) = answer_queries(predictor, [query], Remarks())
                print(render(query, answer))
    print()


def check_output(args: argparse.Namespace) -> None:
    """Raise UserError for an output that cannot be written, or that is what is read."""
    checkpoints = [path for pattern in args.checkpoint for path in find_files(pattern)]
    for path in filter(os.path.isfile, filter(None, [args.input, *checkpoints])):
        if os.path.exists(args.output) and os.path.samefile(path, args.output):
            raise UserError(f"--output {args.output}: is read too; name another file")
    check_writable(args.output)


def predict(args: argparse.Namespace) -> None:
    """Answer the input that the flags name."""
    from_stdin = args.input in (None, "-")
    name = "standard input" if from_stdin else args.input
    try:
        file = open(0 if from_stdin else name, "rb", buffering=0, closefd=not from_stdin)
    except OSError as error:
        raise UserError(f"{name}: cannot be read: {error.strerror}") from error
    with file:
        if args.output:
            check_output(args)
        predictor = Predictor(
            args.checkpoint,
            tasks=args.task,
            use_gpu=args.use_gpu,
            precision=args.precision,
            batch_size=args.batch_size,
            both_orders=args.both_orders,
            spacy_model=args.spacy_model,
            cache_dir=args.cache_dir,
        )
        tasks = list(predictor.tasks.values())
        if from_stdin and not args.output and file.isatty() and sys.stdout.isatty():
            converse(predictor, to_json_line if args.json else lambda _, a: to_text(tasks, a))
            return
        is_file = not from_stdin and os.path.isfile(name)
        table = read_table_queries(name, tasks) if is_file else None
        chunks = table or read_queries(file.fileno(), name)
        to_line = to_json_line if args.json else functools.partial(to_text_line, tasks)
        write_answers(predictor, chunks, to_line, args.output)


# ------------------------------------------------------------------------------------------- main


def build_parser() -> Parser:
    parser = Parser(
        description="Answer new sentences with a trained model. A line holds one sentence, or two "
        "separated by a tab; all tasks of the model answer that take as many sentences."
    )
    flag = parser.add_argument
    flag(
        "input",
        nargs="?",
        metavar="INPUT",
        help="a file of lines; or a table (text, JSON lines, Parquet) with the columns of a task, such as "
        "sentence, or sentence1 and sentence2; default, and -: standard input, at a terminal a prompt",
    )
    what = "models/RUN.pt of a training run; several, or a pattern, answer as one model"
    flag("--checkpoint", required=True, metavar="PT", nargs="+", help=what)
    flag(
        "--task",
        action="append",
        metavar="NAME",
        help="answer only this (more may be given); default: all that the model was trained on",
    )
    flag("--json", action="store_true", help="one JSON object a line, for programs")
    flag("--output", metavar="FILE", help="default: standard output")
    flag("--batch_size", type=positive_int, default=64, help="as in an evaluation; default: 64")
    what = "average both orders of a pair also for models that were trained without this flag"
    flag("--both_orders", action="store_true", help=what)
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
    what = "of --export: onnx adds a graph for ONNX Runtime; default: pytorch"
    flag("--format", choices=FORMATS, default="pytorch", help=what)
    return parser


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = build_parser()
    args = parser.parse_args(argv)
    # The file of sentences may come after the checkpoints.
    if args.input is None and len(args.checkpoint) > 1 and not args.checkpoint[-1].endswith(".pt"):
        args.input = args.checkpoint.pop()
    if args.export and (args.input or args.output or args.task or args.json):
        parser.error("--export writes the whole model and answers nothing")
    if args.format != "pytorch" and not args.export:
        parser.error("--format is for --export")
    return args


def main(argv: list[str] | None = None) -> int:
    def work() -> None:
        args = parse(argv)
        if args.export:
            paths = [path for pattern in args.checkpoint for path in find_files(pattern)]
            if len(paths) > 1:
                raise UserError(f"--export writes one model, not {len(paths)}")
            export(paths[0], args.export, args.format)
        else:
            predict(args)

    return exit_status(work, when_memory_is_full="lower --batch_size", when_interrupted="")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # from here on main() handles it
    signal.signal(signal.SIGTERM, terminate)
    sys.exit(main())
