"""Tables as people have them: text with a separator, JSON lines or Parquet, to rows of texts."""

import codecs
import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tasks import TASKS, Task
from utils import UserError, did_you_mean, one_line

# Place for people, cells; no cell where a line is not JSON.
TableRows = Iterator[tuple[str, list[str]]]


def open_table(
    path: str | Path, layouts: Sequence[Sequence[str]], task: Task | None = None
) -> tuple[list[str], TableRows]:
    """Open a table: Parquet, JSON lines, or text with a separator; return its header and its rows.

    The content decides, not the name. Of text, the first separator counts with which the header names
    all columns of one of the layouts. `task` says what is special about its files.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            first = next((line for line in file if line.strip()), b"")
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such file; 'python datasets.py download' fetches the real data, --data_dir "
            "data/sample is a sample, and --sst_train and the like name files of your own"
        ) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    first = first.removeprefix(codecs.BOM_UTF8).lstrip(b" ")
    if first.startswith(b"PAR1"):
        return parquet_table(path)
    if first.startswith(b"{"):
        return json_table(path)
    if first.startswith(b"[") and path.suffix.lower() == ".json":
        raise UserError(f"{path}: is one JSON list; write an object a line instead (JSON lines)")
    quoting, fixed = (task.quoting, list(task.columns)) if task else (True, [])
    headers = {
        separator: split_line(first.decode(errors="replace"), separator, quoting)
        for separator in (task.separator if task and task.separator else "\t,;")
    }

    def fits(header: list[str]) -> bool:
        named = any(set(names) <= set(header) for names in layouts)
        return len(header) >= len(fixed) if fixed else named

    widest = max(headers, key=lambda separator: len(headers[separator]))
    separator = next((name for name, header in headers.items() if fits(header)), widest)
    rows = text_rows(path, separator, quoting)
    if not fixed:
        next(rows, None)
    return fixed or headers[separator], rows


def split_line(line: str, separator: str, quoting: bool) -> list[str]:
    """Return the cells of a header."""
    style: Any = csv.QUOTE_MINIMAL if quoting else csv.QUOTE_NONE
    cells = next(csv.reader([line], delimiter=separator, quoting=style), [])
    return [cell.strip() for cell in cells]


def text_rows(path: Path, separator: str, quoting: bool) -> TableRows:
    """Yield the rows of a text file, the header as well. Blank lines are skipped."""
    csv.field_size_limit(2**31 - 1)  # the largest that every platform takes
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            style: Any = csv.QUOTE_MINIMAL if quoting else csv.QUOTE_NONE
            reader = csv.reader(file, delimiter=separator, quoting=style, strict=True)
            start = 1
            for cells in reader:
                end = reader.line_num
                if cells:
                    yield f"line {start}" if start == end else f"lines {start} to {end}", cells
                start = end + 1
    except UnicodeDecodeError as error:
        line = _first_line_not_utf8(path)
        raise UserError(
            f"{path}: line {line} is not UTF-8 text ({error.reason}); save the file as UTF-8"
        ) from error
    except csv.Error as error:
        raise UserError(
            f"{path}: the row that starts in line {start}: {error}; is a quote missing? If the file "
            "quotes no cells, write quoting = false into a --task_file"
        ) from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error


def json_table(path: Path) -> tuple[list[str], TableRows]:
    """Open JSON lines. The keys of the first object are the header."""
    header = next((list(row) for _, row in json_rows(path) if isinstance(row, dict)), [])

    def rows() -> TableRows:
        for place, row in json_rows(path):
            known = isinstance(row, dict)
            yield place, [as_text(row.get(name)) for name in header] if known else []

    return header, rows()


def json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield the place and the content of each line; None where it is not JSON."""
    with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    line.encode()
                    content = json.loads(line)
                except (ValueError, RecursionError):
                    content = None
                yield f"line {number}", content


def as_text(value: Any) -> str:
    """Write a cell of JSON or Parquet like one of a text file."""
    if value is None or value != value:  # nan
        return ""
    return value if isinstance(value, str) else json.dumps(value, default=str)


def parquet_table(path: Path) -> tuple[list[str], TableRows]:
    import pandas as pd

    try:
        frame = pd.read_parquet(path)
    except (OSError, ValueError, ImportError) as error:  # those of pyarrow are such
        raise UserError(f"{path}: cannot be read as Parquet: {one_line(error)[:150]}") from error
    columns = [map(as_text, frame[name].tolist()) for name in frame.columns]
    rows = enumerate(zip(*columns, strict=True), start=1)
    return list(map(str, frame.columns)), ((f"row {number}", list(row)) for number, row in rows)


def _first_line_not_utf8(path: Path) -> int:
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                return number
    raise AssertionError("the file has changed since")


def find_columns(
    path: str | Path, header: list[str], needed: list[str], task: Task | None = None
) -> dict[str, int]:
    """Find the numbers of these columns. Raises UserError if one is missing or there twice."""
    try:
        check_cells(header, header)
    except ValueError as problem:
        raise UserError(f"{path}: in the header, line 1: {problem}") from None
    where = f"[{task.name}]: " if task and task.name not in TASKS else ""
    if missing := [name for name in needed if name not in header]:
        what = f"line 1 has no column {missing[0][:60]!r}{did_you_mean(missing[0], header)}"
        if len(header) < 2:
            what = f"no columns are found in line 1; expected {', '.join(needed)[:100]}"
        raise UserError(f"{path}: {where}{what}")
    if repeated := [name for name in needed if header.count(name) > 1]:
        raise UserError(f"{path}: {where}more than one column is named {repeated[0][:60]!r}")
    return {name: header.index(name) for name in needed}


def check_cells(cells: list[str], header: list[str], fixed: Sequence[str] = ()) -> None:
    """Raise ValueError for a row that is not like the header, or one that has swallowed others because a
    quote is missing. Files without a header (`fixed`) may have more columns than are named."""
    if not cells:
        raise ValueError("no JSON object")
    if any("\t" in cell and ("\n" in cell or "\r" in cell) for cell in cells):
        raise ValueError("one cell over several lines, with tabs in it; is a quote missing?")
    if len(cells) < len(header) or (len(cells) > len(header) and not fixed):
        raise ValueError(f"{len(cells)} cells instead of {len(header)}")
