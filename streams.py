"""Output to what others own: standard streams that may be closed, full or not UTF-8, and paths that may
be links, devices or pipes."""

import argparse
import contextlib
import os
import secrets
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

LONGEST_MESSAGE = 300  # characters


class LostOutput(Exception):
    """Standard output that a program cannot do without. The cause is an OSError."""


class Guarded:
    """A standard stream that ends no program, except in `write_required`: after an error, which is a
    warning, its text goes nowhere. Characters that it cannot encode are escaped."""

    def __init__(self, name: str):
        self.stream: Any = getattr(sys, name)
        if self.stream is None:  # then one that refuses to be written
            self.stream = open(os.open(os.devnull, os.O_RDONLY), "w", buffering=1)
        self.name, self.required = name, False
        if hasattr(self.stream, "reconfigure"):
            self.stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> None:
        self._attempt(self.stream.write, text)

    def flush(self) -> None:
        self._attempt(self.stream.flush)

    def _attempt(self, action, *arguments) -> None:
        try:
            action(*arguments)
        except OSError as error:
            # Otherwise Python writes the rest when it ends, and fails once more.
            with open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), self.stream.fileno())
            problem = f"cannot write {self.name}: {error.strerror}"
            if self.required:
                raise LostOutput(problem) from error
            complain(f"warning: {problem}; the program continues without it")


def guard_streams() -> None:
    """Let no error of the standard streams end the program, except in `write_required`."""
    # A file must not get the number of a closed stream. The modes are the wrong ones, so that the use of
    # a closed stream remains an error.
    for number, mode in enumerate((os.O_WRONLY, os.O_RDONLY, os.O_RDONLY)):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, mode), True)
    for name in ("stdout", "stderr"):
        if not isinstance(getattr(sys, name), Guarded):
            setattr(sys, name, Guarded(name))


def write_required(text: str, file: TextIO | None = None) -> None:
    """Write the output that a program is for: to a file, or to standard output. Raises LostOutput if
    standard output cannot be written."""
    output: Any = file or sys.stdout
    output.required = True
    # Line by line: python -u may drop the rest of what only fits in part.
    for line in text.splitlines(keepends=True):
        output.write(line)
    output.flush()
    output.required = False


def complain(message: str, longest: int = LONGEST_MESSAGE) -> None:
    """Print a message as one line, above a progress bar if there is one: with line ends and other
    control characters escaped (names of files can have them), and without the middle of a long text.
    """
    line = "".join(char if char.isprintable() else repr(char)[1:-1] for char in message.strip())
    if len(line) > longest:
        half = longest // 2 - 3
        line = f"{line[:half]} ... {line[-half:]}"
    tqdm.write(line, file=sys.stderr)


class Parser(argparse.ArgumentParser):
    """A parser whose help has to reach its reader, and whose errors are short."""

    def print_help(self, file=None) -> None:
        write_required(self.format_help(), file)

    def error(self, message: str):
        complain(f"{self.prog}: error: {message}")
        self.exit(2)


def file_to_replace(path: Path) -> Path | None:
    """Return the file, there or not, to which the links of an output's path lead. None for a device, a
    pipe or a standard stream (/dev/stdout): `write_in_place` is for these."""
    with contextlib.suppress(FileNotFoundError):
        status = path.stat()
        if not stat.S_ISREG(status.st_mode) or _streams_into(status):
            return None
    return Path(os.path.realpath(path))


@contextlib.contextmanager
def temporary_file(path: Path) -> Iterator[tuple[Path, Path | None]]:
    """Yield an empty file and the file that it will replace, which is in the same folder, if any."""
    target = file_to_replace(path)
    folder = target.parent if target else Path(tempfile.gettempdir())
    folder.mkdir(parents=True, exist_ok=True)
    # A name has at most 255 bytes, a character up to 4.
    name = (target or path).name[:60]
    temporary = folder / f".{name}.{secrets.token_hex(4)}.tmp"
    temporary.touch(0o666 if target else 0o600, exist_ok=False)
    try:
        yield temporary, target
    finally:
        temporary.unlink(missing_ok=True)


def write_in_place(path: Path, source: Path) -> None:
    """Copy a file into a device or a pipe, or to the end of a standard stream."""
    streams = _streams_into(path.stat()) if path.is_file() else []
    sys.stdout.flush()
    target = os.dup(streams[0]) if streams else os.open(path, os.O_WRONLY)
    with open(target, "wb") as file, open(source, "rb") as content:
        shutil.copyfileobj(content, file)


def _streams_into(status: os.stat_result) -> list[int]:
    """Return the numbers of the standard streams that go into a file."""
    return [number for number in (1, 2) if os.path.samestat(os.fstat(number), status)]
