"""Run the benchmarks for a step or two; see tests/slow for those that need processes of their own."""

import contextlib
import io
import re
import runpy
import subprocess
import sys

import pytest
from conftest import ROOT

import utils

FLAGS = {
    "adamw.py": "--steps 1",
    "attention.py": "--steps 1 --batch_size 4",
    "optimizers.py": "--steps 1 --bert_model {bert} --data_dir {data}",
    "experts.py": "--steps 1 --bert_model {bert} --data_dir {data}",
    "generator.py": "--steps 1 --data_dir {data}",
    "data_parallel.py": "--steps 1 --data_dir {data}",
    "prediction.py": "--lines 300 --rounds 1 --bert_model {bert} --data_dir {data}",
}


@pytest.fixture
def run_here(monkeypatch):
    """Run a Python program in this process, with the programs that it starts; returns its output."""

    def run(command, **_):
        _, program, *flags = map(str, command)
        with monkeypatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as output:
            patch.setattr(sys, "argv", [program, *flags])
            runpy.run_path(program, run_name="__main__")
        return subprocess.CompletedProcess(command, 0, output.getvalue())

    monkeypatch.setattr(subprocess, "run", run)
    # Its effect would outlast the test.
    monkeypatch.setattr(utils, "keep_freed_memory", lambda: None)
    monkeypatch.setenv("GOMP_SPINCOUNT", "1000")
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.setattr("throughput.BATCH_SIZE", 4)
    return run


@pytest.mark.filterwarnings("ignore:Using backward")
@pytest.mark.parametrize("name", FLAGS)
def test_benchmarks_run(name, run_here, tiny_directory, small_data):
    """They run and print their tables. Nothing is asserted about times."""
    flags = FLAGS[name].format(bert=tiny_directory, data=small_data).split()
    shown = run_here([sys.executable, ROOT / "benchmarks" / name, *flags]).stdout
    assert re.search(r"^\|.*(this project|AdamW|one encoder|processes|ours)", shown, re.MULTILINE)
