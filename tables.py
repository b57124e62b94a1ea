"""Tables as people have them: text with a separator, JSON lines or Parquet, to rows of texts."""

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tasks import TASKS, Task
from utils import UserError, did_you_mean, one_line

# Place for people, and cells, or the reason why there are none.
TableRows = Iterator[tuple[str, list[str] | str]]


def open_table(
    path: str | Path, layouts: Sequence[Sequence[str]], task: Task | None = None
) -> tuple[list[str], TableRows]:
    """Open a table: Parquet, JSON lines, or text with a separator; return its header and its rows.

    The content decides, not the name. Of text, the first separator counts with which the header names
    all columns of one of the layouts. `task` says what is special about its files. Its `columns` are
    for those whose first line does not name the columns; these may have more columns than are named.
    """
    path = Path(path)
    try:
        if path.is_fifo():  # it is read more than once
            raise UserError(f"{path}: is a pipe, not a file; write it to a file first")
        with open(path, encoding="utf-8-sig", errors="replace") as file:
            first = next((line for line in file if line.strip("\n")), "").lstrip(" ")
    except FileNotFoundError:
        if table := of_table(task):
            hint = did_you_mean(path.name, [other.name for other in path.parent.glob("*")])
            raise UserError(f"{path}: {table}no such file{hint}") from None
        raise UserError(
            f"{path}: no such file; 'python datasets.py download' fetches the real data, --data_dir "
            "data/sample is a sample, and --sst_train and the like name files of your own"
        ) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    if not first:
        return [], iter(())
    if first.startswith("PAR1"):
        return parquet_table(path)
    if first.startswith("{"):
        return json_table(path)
    if first.strip() == "[" or first.replace(" ", "").startswith("[{"):
        raise UserError(f"{path}: is one JSON list; write an object a line instead (JSON lines)")
    quoting, fixed = (task.quoting, list(task.columns)) if task else (True, [])
    headers = {
        separator: split_line(first, separator, quoting)
        for separator in (task.separator if task and task.separator else "\t;,")
    }
    named = [s for s in headers if any(set(names) <= set(headers[s]) for names in layouts)]
    wide = [s for s in headers if len(headers[s]) >= len(fixed) > 0]
    separator = (named + wide or [max(headers, key=lambda separator: len(headers[separator]))])[0]
    rows = text_rows(path, separator, quoting, None if named or not fixed else len(fixed))
    if not named:
        return fixed or headers[separator], rows
    _, header = next(rows)
    if isinstance(header, str):
        raise UserError(f"{path}: in the header, line 1: {header}")
    return [cell.strip() for cell in header], rows


def of_table(task: Task | None) -> str:
    """Return which table of a --task_file a message is about; nothing for a built-in task."""
    return f"[{task.name}]: " if task and task.name not in TASKS else ""


def split_line(line: str, separator: str, quoting: bool) -> list[str]:
    """Return the cells of a header."""
    csv.field_size_limit(2**31 - 1)  # the largest that every platform takes
    style: Any = csv.QUOTE_MINIMAL if quoting else csv.QUOTE_NONE
    cells = next(csv.reader([line], delimiter=separator, quoting=style), [])
    return [cell.strip() for cell in cells]


def text_rows(path: Path, separator: str, quoting: bool, n_columns: int | None) -> TableRows:
    """Yield the rows of a text file, the header as well, cut to `n_columns`. Blank lines are skipped. A
    cell over several lines with tabs in it, in a file that has tabs between the cells, has swallowed
    other rows."""
    swallowed = "one cell over several lines, with tabs in it; is a quote missing?"
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            style: Any = csv.QUOTE_MINIMAL if quoting else csv.QUOTE_NONE
            reader = csv.reader(file, delimiter=separator, quoting=style, strict=True)
            start = 1
            for cells in reader:
                end = reader.line_num
                place = f"line {start}" if start == end else f"lines {start} to {end}"
                if start < end and any("\t" in c and ("\n" in c or "\r" in c) for c in cells):
                    yield place, swallowed if separator == "\t" else cells[:n_columns]
                elif cells:
                    yield place, cells[:n_columns]
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
    """Open JSON lines. The keys of all objects are the header."""
    objects = (row for _, row in json_rows(path) if isinstance(row, dict))
    header = list(dict.fromkeys(key for row in objects for key in row))

    def rows() -> TableRows:
        for place, row in json_rows(path):
            known = isinstance(row, dict)
            yield place, [as_text(row.get(name)) for name in header] if known else "no JSON object"

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
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    # A date or a decimal number has no form in JSON.
    in_json = isinstance(value, bool | int | float | list | dict)
    text = json.dumps(value, default=str) if in_json else str(value)
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # half characters


def parquet_table(path: Path) -> tuple[list[str], TableRows]:
    try:
        # Not pandas, which makes 1.0 of the whole number 1 in a column with gaps.
        from pyarrow import parquet

        table = parquet.read_table(path)
    except (OSError, ValueError, ImportError) as error:  # those of pyarrow are such
        raise UserError(f"{path}: cannot be read as Parquet: {one_line(error)[:150]}") from error
    columns = [map(as_text, column.to_pylist()) for column in table.columns]
    rows = enumerate(zip(*columns, strict=True), start=1)
    return table.column_names, ((f"row {number}", list(row)) for number, row in rows)


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
    if not header:
        raise UserError(f"{path}: has no header and no JSON object; is it empty?")
    where = of_table(task)
    if missing := [name for name in needed if name not in header]:
        what = f"line 1 has no column {missing[0][:60]!r}{did_you_mean(missing[0], header)}"
        if len(header) < 2:
            what = f"line 1 has one column only, {' '.join(header)[:40]!r}; expected "
            what += f"{', '.join(needed)[:100]}; is its separator not a tab, comma or semicolon?"
        if "\ufffd" in "".join(header):
            what = "line 1 is not UTF-8 text; save the file as UTF-8"
        raise UserError(f"{path}: {where}{what}")
    if repeated := [name for name in needed if header.count(name) > 1]:
        raise UserError(f"{path}: {where}more than one column is named {repeated[0][:60]!r}")
    return {name: header.index(name) for name in needed}


def check_cells(cells: list[str] | str, header: list[str]) -> list[str]:
    """Return the cells. Raises ValueError with the reason for a row that is not like the header."""
    if isinstance(cells, str):
        raise ValueError(cells)
    if len(cells) != len(header):
        raise ValueError(f"{len(cells)} cells instead of {len(header)}")
    return cells
