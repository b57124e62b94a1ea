"""Files as users, editors and failing disks make them: bytes with a few changes."""

from hypothesis import strategies as st

SNIPPETS = [
    b'"',
    b"\t",
    b"\n",
    b"\r\n",
    b"\r",
    b"\0",
    b"\xff",
    b"\xef\xbb\xbf",
    b"\xe9",
    b",",
    b" ",
]
SNIPPETS += [b"nan", b"-1", b"9" * 30, b"\xe2\x80\xa8", b"{", b"]", b"a" * 1_000_000]


def cut(draw, content):
    start = draw(st.integers(0, len(content)))
    return content[:start] + content[start + draw(st.integers(0, 300)) :]


def truncate(draw, content):
    return content[: draw(st.integers(0, len(content)))]


def flip(draw, content):
    content = bytearray(content or b"x")
    content[draw(st.integers(0, len(content) - 1))] ^= 1 << draw(st.integers(0, 7))
    return bytes(content)


def insert(draw, content):
    place = draw(st.integers(0, len(content)))
    return content[:place] + draw(st.sampled_from(SNIPPETS)) + content[place:]


def repeat_a_line(draw, content):
    lines = content.splitlines(keepends=True) or [b""]
    return content + draw(st.sampled_from(lines))


def empty_a_cell(draw, content):
    lines = content.split(b"\n")
    row = draw(st.integers(0, len(lines) - 1))
    cells = lines[row].split(b"\t")
    cells[draw(st.integers(0, len(cells) - 1))] = draw(st.sampled_from([b"", b"x", b"7", b"-0.5"]))
    lines[row] = b"\t".join(cells)
    return b"\n".join(lines)


def quote_over_lines(draw, content):
    """One cell opens a quote, a later one closes it: a reader takes all between for one cell."""
    places = [place for place, byte in enumerate(content) if byte in b"\t\n"] or [0]
    start, end = sorted(draw(st.lists(st.sampled_from(places), min_size=2, max_size=2)))
    return content[: start + 1] + b'"' + content[start + 1 : end] + b'"' + content[end:]


def drop_a_column(draw, content):
    column = draw(st.integers(0, 4))
    rows = [line.split(b"\t") for line in content.split(b"\n")]
    return b"\n".join(b"\t".join(row[:column] + row[column + 1 :]) for row in rows)


def other_delimiter(draw, content):
    return content.replace(b"\t", draw(st.sampled_from([b",", b";", b"    ", b" "])))


def other_line_ends(draw, content):
    return content.replace(b"\n", draw(st.sampled_from([b"\r\n", b"\r", b"\n\n"])))


def byte_order_mark(draw, content):
    return b"\xef\xbb\xbf" + content


def other_encoding(draw, content):
    text = content.decode("utf-8", "replace") + "caf\u00e9\n"
    return text.encode(draw(st.sampled_from(["utf-16", "latin-1", "cp1252"])), "replace")


MUTATIONS = [cut, truncate, flip, insert, repeat_a_line, empty_a_cell, drop_a_column]
MUTATIONS += [quote_over_lines]
MUTATIONS += [other_delimiter, other_line_ends, byte_order_mark, other_encoding]


@st.composite
def mutated(draw, content: bytes) -> bytes:
    for mutate in draw(st.lists(st.sampled_from(MUTATIONS), min_size=1, max_size=3)):
        content = mutate(draw, content)
    return content
