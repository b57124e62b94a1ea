"""Helpers that all files share: errors, numbers in flags, seeds, devices, whole files."""

import argparse
import contextlib
import ctypes
import difflib
import errno
import functools
import glob
import math
import os
import pickle
import platform
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import warnings
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import torch
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

from processes import is_lost_connection, n_processes, rank, wait_for_first_process
from streams import (
    LostOutput,
    complain,
    file_to_replace,
    guard_streams,
    temporary_file,
    write_in_place,
)

ROOT = Path(__file__).resolve().parent

# Numbers of these settings in glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


class UserError(Exception):
    """An error in what the user gave. Its text is the one line that the user reads."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, which batch systems send before they kill a job. It ends a run like Ctrl-C."""


def terminate(*_) -> None:
    """Handle SIGTERM."""
    raise Terminated


def one_line(error: BaseException) -> str:
    """Return the first line of an error's text, or the name of its type if it has no text."""
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return the end of an error about an unknown name: the nearest right one, or the first few."""
    names = list(known)
    by_small = {other.casefold(): other for other in names}
    if near := difflib.get_close_matches(name.casefold(), by_small, n=1):
        return f"; did you mean {by_small[near[0]][:60]!r}?"
    known = textwrap.shorten(", ".join(names), 120, placeholder=" ...")
    return f"; known: {known}" if names else ""


@functools.cache
def current_versions() -> dict[str, str]:
    """Return the versions of Python, PyTorch and this project (its commit, `+` for uncommitted
    changes)."""

    def git(*arguments):
        command = ("git", "-C", str(ROOT), *arguments)
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        # Runs write into results/, so changes there do not count.
        changed = git("status", "--porcelain", "--untracked-files=no", ".", ":!results")
        commit = git("rev-parse", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        commit = "not in a git checkout"
    return {"python": platform.python_version(), "torch": str(torch.__version__), "commit": commit}


def number(kind: type, accepts: Callable[[Any], bool], what: str) -> Callable[[str], Any]:
    """Make a type for argparse: a number of this kind for which `accepts` is true."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not accepts(value):
            raise argparse.ArgumentTypeError(f"must be {what}, not {text!r}")
        return value

    return parse


seed = number(int, lambda value: 0 <= value < 2**32, "a whole number from 0 to 2**32 - 1")
positive_int = number(int, lambda value: value > 0, "a whole number above 0")
non_negative_int = number(int, lambda value: value >= 0, "a whole number of at least 0")
max_length = number(int, lambda value: value > 2, "a whole number above 2")
non_negative_float = number(float, lambda value: 0 <= value < math.inf, "a number of at least 0")
positive_float = number(float, lambda value: 0 < value < math.inf, "a number above 0")
share = number(float, lambda value: 0 < value <= 1, "a number above 0, up to 1")
probability = number(float, lambda value: 0 <= value < 1, "a number from 0 to below 1")


def decay_rates(text: str) -> tuple[float, ...]:
    """A type for argparse: two numbers from 0 to below 1, as in `0.9,0.99`."""
    rates = tuple(map(probability, text.split(",")))
    if len(rates) != 2:
        raise argparse.ArgumentTypeError(f"must be two numbers such as 0.9,0.99, not {text!r}")
    return rates


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and PyTorch (all devices)."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def seeded_generator(device: torch.device, *key: int) -> torch.Generator:
    """Return a generator whose numbers follow from `key` alone, the same in each process."""
    seed = np.random.SeedSequence(key).generate_state(1, np.uint64)
    return torch.Generator(device).manual_seed(int(seed[0]))


def random_states() -> dict:
    """Return the random states of Python, NumPy, PyTorch and the GPU in use, for `torch.save`."""
    # NumPy's array would not load under weights_only, so it becomes a list.
    kind, keys, *rest = np.random.get_state(legacy=True)
    states: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (kind, np.asarray(keys).tolist(), *rest),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    if torch.backends.mps.is_available():
        states["mps"] = torch.mps.get_rng_state()
    return states


def restore_random_states(states: dict) -> None:
    """Continue drawing where `random_states` was called."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if torch.cuda.is_available() and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])
    if torch.backends.mps.is_available() and "mps" in states:
        torch.mps.set_rng_state(states["mps"])


@contextlib.contextmanager
def uninterrupted():
    """Hold Ctrl-C and SIGTERM back until the block is done; a second Ctrl-C ends the process at once.

    For what must not be left half done, such as an optimizer step. Yields the list of the signals
    that have come; what the block takes from it does not end the process.
    """
    waiting: list[int] = []

    def note(number, _):
        if waiting and number == signal.SIGINT:  # batch systems send SIGTERM more than once
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        waiting.append(number)

    if threading.current_thread() is not threading.main_thread():  # gets no signals
        yield waiting
        return
    handlers = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield waiting
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if waiting:
            signal.raise_signal(waiting[0])


def pick_device(use_gpu: bool) -> torch.device:
    """Return the CPU, or with `use_gpu` the CUDA GPU or Apple's MPS. Raises UserError without a GPU."""
    if not use_gpu:
        return torch.device("cpu")
    if torch.cuda.is_available():
        number = int(os.environ["LOCAL_RANK"]) if n_processes() > 1 else torch.cuda.current_device()
        if number >= torch.cuda.device_count():
            raise UserError(
                f"--use_gpu: more processes than this node's {torch.cuda.device_count()} GPUs; "
                "start torchrun with --nproc_per_node=gpu"
            )
        torch.cuda.set_device(number)
        return torch.device("cuda", number)
    if torch.backends.mps.is_available():
        return torch.device("mps")
    raise UserError(
        "--use_gpu: PyTorch sees no GPU here; go where there is one, install a PyTorch build for "
        f"yours (this one is {torch.__version__}), or start a run without the flag, on the CPU"
    )


class _SkipNormal(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__name__", "") == "normal_":
            return args[0] if args else (kwargs or {})["tensor"]
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def without_weights():
    """Build modules whose weights are replaced afterwards: their tensors have shapes only."""
    # PyTorch imports its compiler, which takes a second, to fill such tensors with random numbers.
    with torch.device("meta"), _SkipNormal():
        yield


def is_out_of_memory(error: Exception) -> bool:
    """Return whether the error means that memory is full."""
    # A GPU's allocator has an error type of its own; the CPU's and Apple's only have a text.
    known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    signs = ("allocate memory", "out of memory", "ALLOC_FAILED")
    return known or any(sign in str(error) for sign in signs)


def exit_status(work: Callable[[], None], when_memory_is_full: str, when_interrupted: str) -> int:
    """Do the work of a program. Warnings, and errors that the user can mend, are one line each on stderr.

    Args:
        work: raises UserError for an error in what the user gave.
        when_memory_is_full: advice for that case.
        when_interrupted: what became of the work, or ""; an interrupt that has a text of its own wins.

    Returns:
        0; 1 after an error; 128 plus the number of the signal after an interrupt, and after the reader
        of required output has gone (SIGPIPE).
    """
    guard_streams()
    flush_denormals()
    with warnings.catch_warnings():
        # We use the jagged layout, the part of nested tensors that PyTorch recommends.
        warnings.filterwarnings("ignore", "The PyTorch API of nested tensors is in prototype")
        warnings.showwarning = lambda message, *_: complain(f"warning: {message}")
        try:
            work()
            return 0
        except UserError as error:
            cause = str(error)
        except LostOutput as lost:
            if isinstance(lost.__cause__, BrokenPipeError):
                return 128 + signal.SIGPIPE
            cause = str(lost)
        except (RuntimeError, MemoryError) as error:
            if is_lost_connection(error):
                cause = f"another process of this run has ended ({one_line(error)})"
            elif is_out_of_memory(error):
                cause = f"out of memory; {when_memory_is_full} ({one_line(error)})"
            else:
                raise
        except KeyboardInterrupt as interrupt:
            if rank() == 0:
                known = filter(None, ("interrupted", str(interrupt) or when_interrupted))
                print(file=sys.stderr)
                complain("; ".join(known), longest=4096)  # it says how to continue
            return 128 + (signal.SIGTERM if isinstance(interrupt, Terminated) else signal.SIGINT)
        wait_for_first_process()
        complain(f"error: {cause}")
        return 1


def flush_denormals() -> None:
    """Let the CPU take denormal numbers as 0. Call it before the first tensor is made.

    The moments of rare word pieces decay to denormal numbers (below 1e-38), with which a CPU calculates
    ten times as slowly.
    """
    torch.set_flush_denormal(True)  # for this thread, and for those that it starts later


def keep_freed_memory() -> None:
    """Tell glibc not to return freed memory to the kernel. Other C libraries are left as they are.

    SophiaH needs twice the memory in some steps only. Getting it back from the kernel, which clears
    every page again, would take a tenth to a fifth of such a step.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt and mallopt(M_MMAP_THRESHOLD, 2**30):  # an older glibc may refuse so much
        mallopt(M_TRIM_THRESHOLD, -1)


def cpu_features() -> list[str]:
    """Return the instructions for bfloat16 that this CPU has."""
    supported = {
        "avx512_bf16": torch.cpu._is_avx512_bf16_supported(),
        "amx": torch.cpu._is_amx_tile_supported(),
    }
    return [name for name, is_there in supported.items() if is_there]


def progress_bar(*args: Any, **settings: Any) -> tqdm:
    """Make a progress bar, which the first process shows on a terminal: a log file would be full of it."""
    return tqdm(*args, disable=True if rank() else None, **settings)


def half_dtype(device: torch.device, precision: str) -> torch.dtype | None:
    """Return the type of matrix products, None for float32. `auto` asks a GPU whether it has bfloat16."""
    if precision == "auto" and device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float16
    return {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(precision)


def autocast(device: torch.device, precision: str = "auto", small_gradients: bool = False):
    """Return autocast's context. `small_gradients`: float32, not float16, since no loss is scaled."""
    half = half_dtype(device, precision)
    enabled = half is not None and not (small_gradients and half == torch.float16)
    return torch.autocast(device.type, half or torch.bfloat16, enabled=enabled)


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike):
    """Yield a temporary path; at the end, sync it and rename it to the file to which `path` leads. A
    device, a pipe or a standard stream (/dev/stdout) is not replaced; it gets the content at the end.

    If anything fails before that, an interrupt included, the file stays as it was and the temporary
    one is removed. Raises UserError for what cannot be written and for a full disk.
    """
    with errors_of_writing(path), temporary_file(Path(path)) as (temporary, target):
        yield temporary
        if target is None:
            write_in_place(Path(path), temporary)
            return
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        if target.exists():
            shutil.copymode(target, temporary)
        try:
            os.replace(temporary, target)
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            # The file is a mount of its own, as in containers, so no other can take its name.
            shutil.copyfile(temporary, target)
        _sync_folder(target.parent)


@contextlib.contextmanager
def errors_of_writing(path: str | os.PathLike):
    """Turn errors of the operating system into UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def check_writable(path: str | os.PathLike) -> None:
    """Make the folder of a file that will be written later. Raises UserError if it cannot be written."""
    with errors_of_writing(path), temporary_file(Path(path)) as (empty, target):
        # A pipe's reader would take this for the end.
        if target is None and not Path(path).is_fifo():
            write_in_place(Path(path), empty)


def _sync_folder(folder: Path) -> None:
    """Sync a folder, so that a new name in it outlives a power cut."""
    if hasattr(os, "O_DIRECTORY"):  # not on Windows
        descriptor = os.open(folder, os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def lock_files(paths: list[Path], what: str):
    """Lock these paths against other runs that lock theirs, until the block or the process ends.

    Raises UserError for a path that another process has locked; the error says `what` that process
    does. Of several processes of one run, the first one locks. The locks are those of flock, on
    hidden files beside the paths: a killed process leaves no lock, and its half-written files are
    removed. Links are followed; devices, pipes and standard streams have no lock.
    """
    with contextlib.ExitStack() as stack:
        for path in [] if rank() else paths:
            with errors_of_writing(path):
                target = file_to_replace(path)
            if target is None:
                continue
            lock = target.with_name(f".{target.name}.lock")
            with errors_of_writing(lock):
                try:
                    stack.enter_context(filelock.FileLock(lock).acquire(timeout=0))
                except filelock.Timeout:
                    raise UserError(f"{path}: {what}") from None
            for leftover in target.parent.glob(f".{glob.escape(target.stem)}.*.tmp"):
                leftover.unlink(missing_ok=True)
        yield


def load_torch_file(path: str | os.PathLike):
    """Load a file of `torch.save` on the CPU. Runs no code from the file (`weights_only=True`).

    Raises UserError with the reason if it cannot. The words are ours, since PyTorch's message
    advises to switch this protection off.
    """
    try:
        # PyTorch itself would not notice a changed bit.
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if archive.testzip() is not None:
                    raise zipfile.BadZipFile
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except MemoryError:
        raise
    except (PermissionError, IsADirectoryError) as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path}: not a file of tensors and plain values, so it was not loaded"
        ) from error
    except Exception as error:  # zipfile, torch and the operating system have many of them
        raise UserError(f"{path}: damaged, or not a file that torch.save wrote") from error
