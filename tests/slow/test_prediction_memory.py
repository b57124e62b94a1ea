"""Measure the memory of predict.py on a long input; `./run_tests.sh --slow` runs this."""

import itertools
import subprocess
import sys

import numpy as np
from checkpoints import make_checkpoint_fixture  # noqa: F401
from conftest import ROOT

MEMORY = f"""
import ctypes, gc, os, sys
sys.path.insert(0, {str(ROOT)!r})
import predict

def resident():
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

seen, answer_queries = [], predict.answer_queries
def watched(*arguments):
    seen.append(resident())
    return answer_queries(*arguments)

predict.answer_queries, predict.CHUNKS = watched, (500,)
code = predict.main(sys.argv[1:])
print(*seen, file=sys.stderr)
sys.exit(code)
"""


def test_memory_does_not_grow_with_the_input(make_checkpoint, tmp_path):
    """To keep the queries or the answers of the second half of 20,000 lines would take 4 to 6 MB."""
    rng = np.random.default_rng(0)
    words = [" ".join(rng.choice(list("abcdefgh"), n)) for n in rng.integers(1, 6, 20_001)]
    pairs = enumerate(itertools.pairwise(words))
    lines = [f"{one}\t{two}" if n % 2 else one for n, (one, two) in pairs]
    (tmp_path / "lines").write_text("\n".join(lines))
    flags = [tmp_path / "lines", "--checkpoint", make_checkpoint("plain"), "--json"]
    command = [sys.executable, "-c", MEMORY, *flags]
    done = subprocess.run(command, capture_output=True, timeout=300)
    assert done.returncode == 0 and done.stdout.count(b"\n") == len(lines) == 20_000
    resident = [int(size) / 2**20 for size in done.stderr.splitlines()[-1].split()]
    assert len(resident) == 40 and resident[-1] - resident[20] < 3
