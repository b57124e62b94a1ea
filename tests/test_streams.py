"""Standard streams that are not UTF-8, full, closed by their reader, or not there at all."""

import contextlib
import io
import os
import re
import runpy
import subprocess
import sys
import textwrap
import warnings

import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

import datasets
import experiments
import hpo
import multitask_classifier
import predict
import report
import synthetic
from streams import LONGEST_MESSAGE, complain
from utils import UserError, exit_status

# ---------------------------------------------------------------- a process, and all its streams

# It does what a training run does with its streams. It imports no PyTorch, so it starts at once.
CHILD = """
    import os, sys
    sys.path.insert(0, {root!r})
    from tqdm import tqdm
    from streams import LostOutput, complain, guard_streams, write_required
    guard_streams()
    complain("warning: a film: \\U0001F3AC")
    for number in tqdm(range({n_lines})):
        print("\\u201cséance\\u201d \\U0001F3AC", number)
        print(end="", flush=number == 5)
    try:
        write_required("an answer\\n" * {n_answers})
    except LostOutput as lost:
        complain(f"error: {{lost}}")
    with open({done!r}, "w") as file:
        file.write(f"{{file.fileno() > 2}}")
"""

STREAMS = {  # as in a shell, for stdout and stderr
    "file": ">{file}",
    "pipe": "> >(cat >{file})",
    "null": ">/dev/null",
    "full": ">/dev/full",
    "reader gone": "> >(exec sleep 0)",
    "reader of one line": "> >(head -1 >{file})",
    "closed": ">&-",
    "for reading": "</dev/null",
}
N_LINES = 20_000  # more than a pipe holds
LOST = {"full", "reader gone", "reader of one line", "closed", "for reading"}
ENCODINGS = ["utf-8", "ascii", "latin-1", "ascii:strict", "cp1252", "utf-16-le"]


def run_child(folder, output, errors, n_answers=0, flags=(), encoding="utf-8", stdin=""):
    """Run the child with these streams; return its exit status, whether it came to its end, and what
    came on stdout and stderr."""
    done, texts = folder / "done", {"1": folder / "out", "2": folder / "err"}
    numbers = dict(n_lines=0 if n_answers else N_LINES, n_answers=n_answers)
    program = textwrap.dedent(CHILD).format(root=str(ROOT), done=str(done), **numbers)
    places = {"1": STREAMS[output], "2": STREAMS[errors]}
    redirections = " ".join(
        f"{number}{place.format(file=texts[number])}" for number, place in places.items()
    )
    # Waits for the readers, too.
    script = f'"$@" {redirections} {stdin}; status=$?; wait; exit $status'
    command = ["bash", "-c", script, "bash", sys.executable, *flags, "-c", program]
    environment = os.environ | {"PYTHONIOENCODING": encoding, "PYTHONUNBUFFERED": ""}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert ended.stdout == "" and ended.stderr == ""
    shown = [path.read_bytes() if path.exists() else b"" for path in texts.values()]
    own_number = done.exists() and done.read_text() == "True"
    return ended.returncode, own_number, *shown


@pytest.mark.parametrize("errors", ["file", "full", "reader gone", "closed"])
@pytest.mark.parametrize("output", STREAMS)
def test_a_run_goes_on_without_its_streams(tmp_path, output, errors):
    status, done, out, err = run_child(tmp_path, output, errors)
    assert status == 0 and done
    assert b"Traceback" not in out + err and b"Exception ignored" not in err
    if output in ("file", "pipe"):
        assert out.count(b"\n") == N_LINES
    if errors in ("file", "pipe"):
        warned = re.findall(rb"warning: cannot write stdout: .*; the program continues", err)
        assert len(warned) == (output in LOST)


@pytest.mark.parametrize(
    "flags, stdin", [((), ""), (("-u",), ""), (("-X", "utf8=0"), ""), ((), "<&-")]
)
@pytest.mark.parametrize("output", sorted(LOST))
def test_a_lost_output_that_is_required_is_an_error(tmp_path, output, flags, stdin):
    status, done, _, err = run_child(tmp_path, output, "file", N_LINES, flags, stdin=stdin)
    assert status == 0 and done
    *_, line = err.decode().splitlines()
    assert line.startswith("error: cannot write stdout: ") and "Traceback" not in err.decode()


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("output", ["file", "pipe"])
def test_what_a_stream_cannot_encode_is_escaped(tmp_path, output, encoding):
    status, done, out, err = run_child(tmp_path, output, output, encoding=encoding)
    assert status == 0 and done
    codec = encoding.split(":")[0]
    for text, shown in ((f"“séance” 🎬 {N_LINES - 1}", out), ("warning: a film: 🎬", err)):
        assert text.encode(codec, "backslashreplace") in shown


# ------------------------------------------------------------------------- the status of a program


@pytest.fixture
def stream(monkeypatch, capsys):
    """Make a standard stream one of these; returns it."""
    opened = []

    def replace(name, kind):
        if kind == "closed":
            monkeypatch.setattr(sys, name, None)
            return
        if kind == "full":
            file = open("/dev/full", "w")
        else:
            reader, writer = os.pipe()
            os.close(reader)
            file = open(writer, "w")
        opened.append(file)
        monkeypatch.setattr(sys, name, file)

    yield replace
    monkeypatch.undo()
    for file in opened:
        file.close()  # as Python does at its end; must not fail either


REQUIRED = {
    "reader gone": (141, ""),
    "full": (1, "error: cannot write stdout: No space left on device\n"),
    "closed": (1, "error: cannot write stdout: Bad file descriptor\n"),
}
PROGRAMS = [multitask_classifier, predict, report, synthetic, experiments, hpo, datasets]


@pytest.mark.parametrize("kind", REQUIRED)
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_help_that_cannot_be_written(program, kind, stream, capsys):
    stream("stdout", kind)
    status, shown = REQUIRED[kind]
    assert program.main(["--help"]) == status
    assert capsys.readouterr().err == shown


@pytest.mark.parametrize("kind", REQUIRED)
def test_tables_that_cannot_be_written(kind, stream, capsys):
    stream("stdout", kind)
    status, shown = REQUIRED[kind]
    assert experiments.main(["table"]) == status
    assert capsys.readouterr().err == shown


@pytest.mark.parametrize("kind", REQUIRED)
def test_the_page_of_flags_that_cannot_be_written(kind, stream, capsys):
    stream("stdout", kind)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "flags.py"), run_name="__main__")
    assert (ended.value.code, capsys.readouterr().err) == REQUIRED[kind]


@pytest.mark.parametrize("errors", [None, *REQUIRED])
@pytest.mark.parametrize("output", REQUIRED)
@pytest.mark.parametrize("raised, status", [(None, 0), (UserError("wrong"), 1)], ids=repr)
def test_work_ends_with_its_own_status(stream, capsys, output, errors, raised, status):
    def work():
        for number in range(3000):
            print("a line", number)
        warnings.warn("soon")
        print("the last", flush=True)
        if raised:
            raise raised

    stream("stdout", output)
    if errors:
        stream("stderr", errors)
    assert exit_status(work, "", "") == status
    sys.stderr.flush()  # as Python does at its end
    shown = capsys.readouterr().err
    if errors is None:
        assert shown.count("warning: cannot write stdout") == 1 and "warning: soon\n" in shown
        assert shown.endswith("error: wrong\n") == bool(raised)


# report.py reads the checkpoint first, which decides which flags there are.
@pytest.mark.parametrize(
    "program", [p for p in PROGRAMS if p is not report], ids=lambda program: program.__name__
)
def test_an_error_about_a_flag_is_one_short_line(program, capsys):
    commands = {experiments: ["table"], datasets: ["download"], predict: ["--checkpoint", "x"]}
    command = commands.get(program, [])
    with pytest.raises(SystemExit) as ended:
        program.main([*command, "--no_such\x1b[31m\nflag", "x" * 5000])
    *_, line = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and "error: " in line
    assert len(line) <= LONGEST_MESSAGE and line.isprintable()


# ---------------------------------------------------------------------------------------- one line


def message_line(text):
    with contextlib.redirect_stderr(io.StringIO()) as shown:
        complain(text)
    assert shown.getvalue().endswith("\n")
    return shown.getvalue()[:-1]


@given(st.text(st.characters(), max_size=700) | st.text(st.characters(codec="ascii"), min_size=290))
def test_any_message_is_one_printable_line(text):
    line = message_line(text)
    assert len(line) <= LONGEST_MESSAGE and line.isprintable()
    if text.isprintable() and text == text.strip():
        kept, _, end = line.partition(" ... ") if len(text) > LONGEST_MESSAGE else (text, "", "")
        assert text.startswith(kept) and text.endswith(end) and line.startswith(kept)
        assert len(line) == (len(text) if len(text) <= LONGEST_MESSAGE else LONGEST_MESSAGE - 1)


@pytest.mark.parametrize(
    "name", ["a\nb", "a\rb", "a\tb", "\x1b[31mred", "\x7f", "\u2028", "\udcff"]
)
@pytest.mark.parametrize("kind", ["error", "warning"])
def test_names_of_files_do_not_break_the_line(kind, name, capsys):
    complain(f"{kind}: {name}: no such file")
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1 and shown[:-1].isprintable()
    written = shown.removeprefix(f"{kind}: ").removesuffix(": no such file\n")
    assert eval(f"'{written}'") == name


def test_a_message_keeps_its_end():
    line = message_line(f"error: {'/folder' * 100}: no such file; give another one")
    assert line.startswith("error: /folder/") and line.endswith("no such file; give another one")


def test_a_progress_bar_does_not_share_its_line_with_a_warning(monkeypatch):
    from tqdm import tqdm

    monkeypatch.setattr(sys, "stderr", shown := io.StringIO())
    with tqdm(total=3):
        complain("warning: soon")
    assert re.search(r"(^|[\r\n])warning: soon\n", shown.getvalue())
