"""Files in every shape that people have: read like Python's csv and json modules and pandas read them."""

import csv
import dataclasses
import decimal
import io
import json
import math
import os
import re
import warnings

import pandas as pd
import pytest
from conftest import SAMPLE
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mutations import mutated

from datasets import read_examples
from tables import open_table
from tasks import TASKS, Task
from utils import UserError

SST, PARA = TASKS["sst"], TASKS["para"]
NAMES = ["id", "sentence", "sentiment"]
STYLES = {True: csv.QUOTE_MINIMAL, False: csv.QUOTE_NONE}
ROWS = [
    ["1", "good", "4"],
    ["two", "it, is; bad", "0"],
    ["3", 'He said "no" twice', "1"],
    ["4", " 'single' and spaces ", "2"],
    ["5", "Grüße, 你好 🙂", "3"],
]


@pytest.fixture
def write(tmp_path):
    def write(content, name="file.csv"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def written(rows, **style):
    """Write rows like Python's csv module."""
    file = io.StringIO(newline="")
    csv.writer(file, **style).writerows(rows)
    return file.getvalue()


def expected(rows):
    return [((sentence,), float(label), id) for id, sentence, label in rows]


def parsed(content, **style):
    """Read rows with Python's csv module."""
    rows = csv.reader(io.StringIO(content.removeprefix("\ufeff"), newline=""), **style)
    return [row for row in rows if row]


# ----------------------------------------------------------------------------- text with a separator


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("bom", ["", "\ufeff"])
@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC])
@pytest.mark.parametrize("separator", ["\t", ",", ";"])
def test_text_is_read_like_the_csv_module_reads_it(write, separator, quoting, bom, end):
    style = dict(delimiter=separator, quoting=quoting)
    content = bom + written([NAMES, *ROWS], lineterminator=end, **style)
    assert parsed(content, delimiter=separator) == [NAMES, *ROWS]
    assert read_examples(write(content), SST, "train") == expected(ROWS)


ENDINGS = ["f.csv", "f.TSV", "f.txt", "f.json", "f.JSONL", "f.parquet", "f.PQ", "f", "f.csv.gz"]


@pytest.mark.parametrize("name", ENDINGS)
def test_the_ending_of_the_name_does_not_matter(write, name):
    frame = pd.DataFrame(ROWS, columns=NAMES)
    contents = [written([NAMES, *ROWS], delimiter=separator) for separator in "\t,;"]
    contents += [frame.to_json(orient="records", lines=True), frame.to_parquet()]
    for content in contents:
        assert read_examples(write(content, name), SST, "train") == expected(ROWS)


@pytest.mark.parametrize("separator", ["\t", ",", ";"])
@pytest.mark.parametrize("index", [True, False])
def test_text_is_read_as_pandas_has_written_it(write, separator, index):
    rows = [*ROWS, ["6", "two\nlines", "1"], ["7", '"', "1"], ["8", 'a "b"\nc', "0"]]
    frame = pd.DataFrame(rows, columns=NAMES)
    path = write(frame.to_csv(sep=separator, index=index))
    assert read_examples(path, SST, "train") == expected(rows)


CELLS = st.text(st.sampled_from("ab ,;\"'\n\r|{[é"), max_size=6)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(CELLS, min_size=1, max_size=5),
    st.sampled_from("\t,;"),
    st.sampled_from(["\n", "\r\n"]),
    st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
)
def test_every_cell_that_the_csv_module_writes_comes_back(write, cells, separator, end, quoting):
    rows = [NAMES, *([str(number), cell, "3"] for number, cell in enumerate(cells))]
    content = written(rows, delimiter=separator, lineterminator=end, quoting=quoting)
    header, found = open_table(write(content), [NAMES])
    # Not `rows`: the csv module writes a lone \r without quotes, and reads it as a line end.
    assert [header, *(cells for _, cells in found)] == parsed(content, delimiter=separator)


@pytest.mark.parametrize("separator", ["\t", ",", ";", "|"])
def test_without_quoting_a_quote_is_a_character(write, separator):
    rows = [["1", '"good', "4"], ["2", 'say "no"', "0"], ["3", '"both"', "1"], ["4", '"', "2"]]
    content = "".join(separator.join(row) + "\n" for row in [NAMES, *rows])
    assert parsed(content, delimiter=separator, quoting=csv.QUOTE_NONE) == [NAMES, *rows]
    task = dataclasses.replace(SST, quoting=False, separator=separator)
    assert read_examples(write(content), task, "train") == expected(rows)
    with pytest.raises(UserError, match="is a quote missing.*write quoting = false"):
        read_examples(write(content), dataclasses.replace(task, quoting=True), "train")


@pytest.mark.parametrize("quoting", [True, False])
@pytest.mark.parametrize("extra", [[], ["more"], ["a", "b, c", ""]])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("bom", ["", "\ufeff"])
@pytest.mark.parametrize("separator", ["\t", ",", ";"])
def test_without_a_header_the_task_names_the_columns(write, separator, bom, end, extra, quoting):
    """Cells after those that are named do not count. The first row decides which separator it is."""
    rows = [[id, text.replace('"', ""), label] for id, text, label in ROWS]
    if not quoting:
        rows = [[cell.replace(separator, " ") for cell in row] for row in rows]
        extra = [cell.replace(separator, " ") for cell in extra]
    style = dict(delimiter=separator, lineterminator=end, quoting=STYLES[quoting])
    content = bom + written([row + extra for row in rows], escapechar="\\", **style)
    content = content.replace("\\", "")
    task = dataclasses.replace(SST, columns=("id", "sentence", "sentiment"), quoting=quoting)
    assert read_examples(write(content), task, "train") == expected(rows)


def test_without_a_header_commas_in_a_sentence_are_no_separator(write):
    rows = [["1", "one, two, three, four", "4"], ["2", "five", "0"]]
    task = dataclasses.replace(SST, columns=tuple(NAMES))
    for separator in "\t;":
        path = write(written(rows, delimiter=separator))
        assert read_examples(path, task, "train") == expected(rows)


def test_a_header_wins_over_the_columns_of_the_task(write):
    """Such as in dev, where train has no header."""
    task = dataclasses.replace(SST, columns=("sentiment", "id", "sentence"))
    assert read_examples(write(written([NAMES, *ROWS])), task, "dev") == expected(ROWS)


def test_a_row_that_is_too_short_is_named_where_the_task_names_the_columns(write):
    task = dataclasses.replace(SST, columns=tuple(NAMES))
    with pytest.warns(UserWarning, match=r"1 row unusable: 2 cells instead of 3 \(line 2\)"):
        found = read_examples(write("1\tgood\t4\tx\n2\tbad\n3\tfine\t3\n"), task, "train")
    assert found == expected([["1", "good", "4"], ["3", "fine", "3"]])


def test_columns_are_found_by_name(write):
    path = write("is_duplicate\tsentence2\textra\tid\tsentence1\n1.0\tb\tx\ti\ta\n")
    assert read_examples(path, PARA, "train") == [(("a", "b"), 1.0, "i")]


def test_a_header_can_have_spaces_line_ends_and_blank_lines_before_it(write):
    rows = [[" id ", "sentence", "sentiment ", "a\nnote"], ["1", "good", "4", "x"]]
    path = write("\n\r\n" + written(rows))
    assert read_examples(path, SST, "train") == expected([["1", "good", "4"]])
    header, found = open_table(path, [NAMES])
    assert header == [*NAMES, "a\nnote"]
    assert list(found) == [("line 5", rows[1])]


@pytest.mark.parametrize("first", ["   \n", "\t\t\n", ",,\n"])
def test_a_first_line_without_names_is_no_header(write, first):
    """The header is not taken for a row."""
    for split in ("train", "test"):
        with pytest.raises(
            UserError, match="no header|line 1 has one column only|line 1 has no column"
        ):
            read_examples(write(first + written([NAMES, *ROWS], delimiter="\t")), SST, split)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_rows_over_several_lines_have_true_numbers(write, end):
    """Those that an editor shows."""
    rows = [NAMES, ["1", f"a{end}b", "4"], [], ["2", f"a{end}{end}b", "x"], ["3", "c", "y"]]
    content = written(rows, lineterminator=end)
    lines = content.split(end)
    with pytest.warns(UserWarning) as caught:
        assert [row.id for row in read_examples(write(content), SST, "train")] == ["1"]
    assert lines[4].startswith("2") and lines[7].startswith("3")
    message = str(caught[0].message)
    assert "(lines 5 to 7)" in message and "(line 8)" in message


@pytest.mark.parametrize("size", [200_000, 3_000_000])
def test_no_cell_is_too_long(write, size, monkeypatch):
    """csv's own limit is 131072."""
    csv.field_size_limit(131_072)
    assert read_examples(write(f"id\tsentence\tsentiment\n1\t{'x' * size}\t4\n"), SST, "train") == [
        (("x" * size,), 4.0, "1")
    ]
    csv.field_size_limit(131_072)
    with pytest.raises(UserError, match="line 1 has one column only"):
        read_examples(write("x" * size), SST, "train")


# -------------------------------------------------------------------------------------- JSON lines

OBJECTS = [
    {"id": 1, "sentence": "good", "sentiment": 4, "more": None},
    {"id": "two", "sentence": 'it\t"is"\nbad', "sentiment": "0", "more": [1, {"a": "b"}]},
    {"id": 2**63 + 1, "sentence": "Grüße 🙂 \u2028", "sentiment": 1.0, "more": "x"},
    {"sentence": 17, "sentiment": 2, "id": True},
    {"id": 4.5, "sentence": True, "sentiment": 3},
]
FOUND = [
    (("good",), 4.0, "1"),
    (('it\t"is"\nbad',), 0.0, "two"),
    (("Grüße 🙂 \u2028",), 1.0, "9223372036854775809"),
    (("17",), 2.0, "true"),
    (("true",), 3.0, "4.5"),
]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\n\n"])
@pytest.mark.parametrize("bom", ["", "\ufeff"])
@pytest.mark.parametrize("ascii", [True, False])
def test_json_lines_are_read_like_the_json_module_reads_them(write, ascii, bom, end):
    content = bom + "".join(json.dumps(row, ensure_ascii=ascii) + end for row in OBJECTS)
    assert read_examples(write(content), SST, "train") == FOUND


def test_json_lines_are_read_as_pandas_has_written_them(write):
    frame = pd.DataFrame(ROWS, columns=NAMES).astype({"sentiment": int})
    path = write(frame.to_json(orient="records", lines=True))
    assert read_examples(path, SST, "train") == expected(ROWS)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=2), inner),
    max_leaves=3,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(VALUES, min_size=1, max_size=4))
def test_every_value_of_json_becomes_its_text(write, values):
    path = write("".join(json.dumps({"value": value}) + "\n" for value in values))
    header, rows = open_table(path, [["value"]])
    assert header == ["value"]
    for value, (_, (cell,)) in zip(values, rows, strict=True):
        if value is None:
            assert cell == ""
        else:
            assert cell == value if isinstance(value, str) else json.loads(cell) == value


NO_OBJECTS = ["no JSON", '{"id": 2', "[1, 2]", "7", "null", '"text"', "{'id': 2}", "{" * 9_000]
NO_OBJECTS += ["[" * 90_000, '{"id": ' + "9" * 5_000 + "}"]  # beyond what Python's parser takes


@pytest.mark.parametrize("line", NO_OBJECTS, ids=range(len(NO_OBJECTS)))
def test_a_line_that_is_no_json_object_is_named(write, line):
    rows = [json.dumps(row) for row in OBJECTS]
    path = write("\n".join([*rows[:2], line, *rows[2:]]))
    with pytest.warns(UserWarning, match=r"1 row unusable: no JSON object \(line 3\)$"):
        assert read_examples(path, SST, "train") == FOUND


def test_a_key_may_be_missing_in_the_first_object(write):
    lines = [{"id": "1", "sentence": "a"}, {"id": "2", "sentence": "b", "sentiment": 3}]
    with pytest.warns(UserWarning, match=r"1 row unusable: no label \(line 1\)$"):
        found = read_examples(write("\n".join(map(json.dumps, lines))), SST, "train")
    assert found == expected([["2", "b", "3"]])


def test_a_line_of_json_that_is_not_utf8_is_named(write):
    rows = [json.dumps(row).encode() for row in OBJECTS]
    path = write(b"\n".join([rows[0], '{"id": "é"}'.encode("latin-1"), *rows[1:]]))
    with pytest.warns(UserWarning, match=r"1 row unusable: no JSON object \(line 2\)$"):
        assert read_examples(path, SST, "train") == FOUND


@pytest.mark.parametrize(
    "missing", [{}, {"sentiment": None}, {"sentiment": ""}, {"sentiment": math.nan}]
)
def test_a_missing_value_of_json_is_no_label(write, missing):
    rows = [OBJECTS[0], {"id": "x", "sentence": "y", **missing}, *OBJECTS[1:]]
    path = write("\n".join(map(json.dumps, rows)))
    with pytest.warns(UserWarning, match=r"1 row unusable: no label \(line 2\)$"):
        assert read_examples(path, SST, "train") == FOUND


def test_half_a_character_of_json_is_tokenized(write, minilm_tokenizer):
    """As cut by a program that counts in UTF-16. No UTF-8 file can have it, and no tokenizer takes it."""
    path = write('{"id": "1\\udc80", "sentence": "so good \\ud83d", "sentiment": 4}')
    (found,) = read_examples(path, SST, "train")
    assert found == (("so good \ufffd",), 4.0, "1\ufffd")
    ids, _ = minilm_tokenizer.packed_ids(list(found.sentences), 9)
    assert ids.tolist() == minilm_tokenizer(["so good"])["input_ids"][0]


# ----------------------------------------------------------------------------------------- Parquet


@pytest.fixture
def parquet(tmp_path):
    def parquet(frame):
        frame.to_parquet(tmp_path / "file.parquet")
        return tmp_path / "file.parquet"

    return parquet


@pytest.mark.parametrize("kind", [int, float, "Int8", "string", object, "category"])
def test_parquet_is_read_as_pandas_has_written_it(parquet, kind):
    frame = pd.DataFrame(ROWS, columns=NAMES).astype({"sentiment": int}).astype({"sentiment": kind})
    assert read_examples(parquet(frame), SST, "train") == expected(ROWS)


@pytest.mark.parametrize("kind", ["Int64", "int64[pyarrow]", "float64", "object", "string"])
def test_whole_numbers_in_a_parquet_column_with_gaps_stay_whole(parquet, kind):
    """An id above 2**53 as well, where the type of the column holds one."""
    big = 2**53 if kind == "float64" else 2**60 + 1
    ids = [1, None, big] if kind != "string" else ["1", None, str(big)]
    frame = pd.DataFrame({"id": pd.array(ids, kind), "sentence": ["a", "b", "c"]})
    frame["sentiment"] = pd.array([1, 2, 3], "Int64")
    with pytest.warns(UserWarning, match=r"1 row unusable: no id \(row 2\)$"):
        first, third = read_examples(parquet(frame), SST, "train")
    assert (first.label, third.label) == (1.0, 3.0)
    if kind != "float64":
        assert (first.id, third.id) == ("1", str(big))


@pytest.mark.parametrize("nothing", [None, math.nan, pd.NA])
def test_nothing_in_a_cell_of_parquet_is_no_label(parquet, nothing):
    labels = ["4", nothing, "0"] if nothing is not math.nan else [4.0, nothing, 0.0]
    frame = pd.DataFrame({"id": ["a", "b", "c"], "sentence": ["x", "y", "z"], "sentiment": labels})
    with pytest.warns(UserWarning, match=r"1 row unusable: no label \(row 2\)$"):
        found = read_examples(parquet(frame), SST, "train")
    assert found == expected([["a", "x", "4"], ["c", "z", "0"]])


def test_bytes_and_decimals_of_parquet_are_texts(parquet):
    frame = pd.DataFrame(ROWS, columns=NAMES)
    frame["sentence"] = [text.encode() for text in frame["sentence"]]
    frame["sentiment"] = [decimal.Decimal(label) for label in frame["sentiment"]]
    assert read_examples(parquet(frame), SST, "train") == expected(ROWS)


def test_other_columns_of_parquet_do_not_matter(parquet):
    frame = pd.DataFrame(ROWS, columns=NAMES)
    frame["vector"] = [[1.0, 2.0]] * 5
    frame["nested"] = [{"a": None, "b": [1]}] * 5
    frame["date"] = pd.to_datetime(["2026-01-01", None] * 2 + ["2026-01-02"])
    frame["bytes"] = [b"\xff\x00"] * 5
    frame["kind"] = pd.Categorical(["a", "b", None, "a", "b"])
    assert read_examples(parquet(frame), SST, "train") == expected(ROWS)


def test_an_index_of_pandas_is_a_column(parquet):
    frame = pd.DataFrame(ROWS, columns=NAMES).set_index("id")
    assert read_examples(parquet(frame), SST, "train") == expected(ROWS)


def test_a_sentence_of_parquet_may_have_tabs_and_line_ends(parquet):
    rows = [["1", "a\tb\nc", "4"]]
    assert read_examples(parquet(pd.DataFrame(rows, columns=NAMES)), SST, "train") == expected(rows)


@pytest.mark.parametrize("keep", [4, 100, -1])
def test_half_a_parquet_file_is_one_clear_line(parquet, keep):
    path = parquet(pd.DataFrame(ROWS, columns=NAMES))
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match="cannot be read as Parquet") as caught:
        read_examples(path, SST, "train")
    assert "\n" not in str(caught.value) and len(str(caught.value)) <= 300


# ------------------------------------------------------------------------------------ files of no use

HEADER = b"id\tsentence\tsentiment\n"
ONE_LIST = json.dumps(OBJECTS).encode()
ERRORS = [
    ("no such file; 'python datasets.py download' fetches", None),
    (
        "line 1 has no column 'sentence'; did you mean 'sentences'",
        b"id,sentences,sentiment\n1,a,3\n",
    ),
    ("line 1 has no column 'sentence'; did you mean 'sentences'", b'{"id": 1, "sentences": "a"}'),
    (
        r"line 1 has one column only, .id.sentence.sentiment.; expected id, sentence, sentiment; is",
        b"id|sentence|sentiment\n",
    ),
    (r"not one usable row with a label \(line 2: no label\)", HEADER + b"1\tgood\t\n"),
    ("not one usable row with a label$", HEADER),
    ("no header and no JSON object; is it empty", b""),
    ("no header .*; is it empty", b"\n\n"),
    ("no header .*; is it empty", b"\xef\xbb\xbf\r\n"),
    ("more than one column is named 'id'", b"id\tsentence\tsentiment\tid\n1\tgood\t3\t1\n"),
    ("line 3 is not UTF-8 text", HEADER + b"1\tgood\t3\n1\tg\xe9\t3\n"),
    ("line 1 is not UTF-8 text", "id\tsentence\tsentiment\n1\tgood\t3\n".encode("utf-16")),
    ("line 1 is not UTF-8 text", "id\tsentence\tsentiment\n1\tgood\t3\n".encode("utf-32")),
    (
        "the row that starts in line 2: .*; is a quote missing",
        HEADER + b'1\t"good\t3\n2\tbad\t1\n',
    ),
    (
        "the row that starts in line 1: .*; is a quote missing",
        b'id\tsentence\tsentiment\t"note\n1\tgood\t3\tx\n',
    ),
    (
        "in the header, line 1: one cell over several lines, with tabs in it; is a quote missing?",
        b'id\tsentence\tsentiment\t"note\n1\tgood\t3\tx"\n2\tbad\t3\tx\n',
    ),
    ("is one JSON list; write an object a line", ONE_LIST),
    ("is one JSON list; write an object a line", b"\xef\xbb\xbf  " + ONE_LIST),
    ("is one JSON list; write an object a line", json.dumps(OBJECTS, indent=2).encode()),
    ("is one JSON list; write an object a line", ONE_LIST.replace(b"}, {", b"},\n{")),
    ("has no header and no JSON object", b'{\n  "id": 1\n}\n'),
    ("cannot be read as Parquet", b"PAR1" + bytes(50)),
]


@pytest.mark.parametrize("message, content", ERRORS, ids=range(len(ERRORS)))
@pytest.mark.parametrize("split, name", [("train", "file.csv"), ("dev", "file.json")])
def test_a_file_of_no_use_is_one_clear_line(write, tmp_path, message, content, split, name):
    path = tmp_path / "absent.csv" if content is None else write(content, name)
    with pytest.raises(UserError, match=message) as caught:
        read_examples(path, SST, split)
    text = str(caught.value).removeprefix(str(path))
    assert text.startswith(": ") and "\n" not in text and len(text) <= 300


def test_a_folder_is_one_clear_line(tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path}: cannot be read: Is a directory"):
        read_examples(tmp_path, SST, "train")


def test_a_pipe_is_one_clear_line(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="pipe: is a pipe, not a file; write it to a file first"):
        read_examples(tmp_path / "pipe", SST, "train")


def test_an_error_names_the_task_of_a_file(write):
    task = Task(name="mine", sentences=("text",), label="y", classes=("a", "b"))
    with pytest.raises(UserError, match=r": \[mine\]: line 1 has no column 'text'"):
        read_examples(write("texts,y\nx,a\n"), task, "train")


def test_a_missing_quote_that_swallows_rows_is_named(write):
    """The quote of line 3 ends before that of line 5, and what is between is one cell."""
    rows = ["1\tgood\t3\n", '2\t"bad\t1\n', "3\tfine\t2\n", '4\t"bad"\t0\n']
    header = HEADER.decode()
    with pytest.raises(UserError, match="line 3"):
        read_examples(write(header + "".join(rows)), SST, "train")
    reason = r"one cell over several lines, with tabs in it; is a quote missing\? \(lines 3 to 5\)"
    for ending in ('4"\tx\t0\n', '4"\t0\n'):
        path = write(header + rows[0] + rows[1] + rows[2] + ending)
        with pytest.warns(UserWarning, match=f"1 row unusable: {reason}$"):
            assert [row.id for row in read_examples(path, SST, "train")] == ["1"]


@pytest.mark.parametrize("separator", [",", ";"])
def test_a_cell_with_tabs_and_line_ends_is_fine_where_commas_separate(write, separator):
    rows = [["1", "a\tb\nc", "4"], ["2", "d", "0"]]
    path = write(written([NAMES, *rows], delimiter=separator))
    assert read_examples(path, SST, "train") == expected(rows)


# ----------------------------------------------------------------------------------- damaged files


def sample_head(task, split, as_json):
    """The header and the first 15 rows. As JSON lines, which have no header, the first 15 rows."""
    (name,) = getattr(task, split)
    lines = (SAMPLE / name).read_bytes().splitlines(keepends=True)[:16]
    if not as_json:
        return b"".join(lines)
    header, *rows = csv.reader(b"".join(lines).decode().splitlines(), delimiter="\t")
    return b"".join(json.dumps(dict(zip(header, row))).encode() + b"\n" for row in rows)


def id_of(line, as_json, header):
    cells = json.loads(line) if as_json else dict(zip(header, line.decode().split("\t")))
    return cells["id"]


@pytest.mark.parametrize("as_json", [False, True], ids=["text", "JSON"])
@pytest.mark.parametrize("split", ["train", "dev", "test"])
@pytest.mark.parametrize("task", TASKS.values(), ids=list(TASKS))
@settings(deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_mutated_file_is_read_with_its_bad_rows_named_or_refused(
    tmp_path, monkeypatch, task, split, as_json, data
):
    """Each row that is in the file as it was is among the examples or in a named line."""
    monkeypatch.setattr("datasets.NAMED_REASONS", 99)
    monkeypatch.setattr("datasets.NAMED_ROWS", 99)
    original = sample_head(task, split, as_json)
    header = original.decode().splitlines()[0]
    names = header.split("\t")
    rows = {line: id_of(line, as_json, names) for line in original.splitlines()[not as_json :]}
    content = data.draw(mutated(original))
    path = tmp_path / "file.csv"
    path.write_bytes(content)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            examples = read_examples(path, task, split)
        except UserError as error:
            text = str(error).removeprefix(str(path))
            assert text.startswith(": ") and "\n" not in text and len(text) <= 300
            assert re.search(r"line|row|column|empty", text)
            return
    named = set()
    for warning in caught:
        assert str(warning.message).startswith(f"{path}: ") and "\n" not in str(warning.message)
        for start, end in re.findall(r"lines? (\d+)(?: to (\d+))?", str(warning.message)):
            named |= set(range(int(start), int(end or start) + 1))
    ids = {example.id for example in examples}
    # With another header, the cells of a row can have other meanings.
    rows = rows if as_json or content.startswith(original.splitlines()[0]) else {}
    for number, line in enumerate(re.split(rb"\r\n|\n|\r", content), start=1):
        assert line not in rows or rows[line] in ids or number in named
    for example in examples:
        assert example.id and math.isnan(example.label) or task.parse_label(str(example.label)) >= 0
