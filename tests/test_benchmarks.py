import re
import subprocess
import sys

import pytest
from conftest import ROOT


@pytest.mark.parametrize(
    "script",
    [
        "throughput.py --quick --bert_model {bert}",
        "adamw.py --steps 1",
        "optimizers.py --steps 1 --bert_model {bert}",
        "loading.py --pairs 500 --bert_model {bert}",
    ],
)
def test_benchmarks_run(script, tiny_directory):
    """That they run and print their tables; of time nothing is asserted."""
    name, *flags = script.format(bert=tiny_directory).split()
    command = [sys.executable, ROOT / "benchmarks" / name, *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^\|.*(this project|AdamW)", done.stdout, re.MULTILINE)
