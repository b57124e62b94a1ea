"""Helpers of the benchmarks: flags, times, memory and tables."""

import argparse
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
WARM_UP = 3  # steps before those that count


def new_parser(description: str, steps: int) -> argparse.ArgumentParser:
    """Make a parser with the flags of most benchmarks. `description` is a docstring."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    sample = str(ROOT / "data" / "sample")
    parser.add_argument("--data_dir", default=sample, help="default: the sample data")
    what = f"measured steps of each kind; default: {steps}"
    parser.add_argument("--steps", type=int, default=steps, help=what)
    return parser


def seconds(work: Callable[[], object], device: Any = None) -> float:
    """Do the work and return how long it took. On a CUDA device, this includes the GPU's work."""
    # Not at the top: loading.py measures memory, and its parent process must be small.
    import torch

    synchronize = torch.cuda.synchronize if device and device.type == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - start


def in_turns(contenders: Iterable[str], number: int) -> list[str]:
    """Return the order in which the contenders take turn `number`: forwards, then backwards."""
    return list(contenders)[:: 1 if number % 2 else -1]


def medians(times: Mapping[str, Sequence[float]], skipped: int = WARM_UP) -> dict[str, float]:
    """Return the median of the times of each contender, without the first ones."""
    return {name: statistics.median(values[skipped:]) for name, values in times.items()}


def ask_process(program: str, flags: Iterable[object]) -> float:
    """Run a benchmark in a process of its own, and return the number that it prints last."""
    command = [sys.executable, program, *map(str, flags)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


def resident_peak() -> float:
    """Return the peak memory of this process in MB."""
    # Linux starts a child's ru_maxrss at its parent's, so there VmHWM is read.
    status = Path("/proc/self/status")
    if status.exists():
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1e3
    unit = 1e6 if sys.platform == "darwin" else 1e3
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def print_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a Markdown table."""
    for cells in (header, ["---"] * len(header), *rows):
        print(f"| {' | '.join(cells)} |")
