"""Run the benchmarks as from the shell, with the processes that they start."""

import re
import subprocess
import sys

import pytest
from conftest import ROOT

FLAGS = {
    "throughput.py": "--quick --bert_model {bert}",
    "adamw.py": "--steps 1",
    "attention.py": "--steps 1 --batch_size 4",
    "optimizers.py": "--steps 1 --bert_model {bert}",
    "experts.py": "--steps 1 --bert_model {bert}",
    "generator.py": "--steps 1",
    "data_parallel.py": "--steps 1 --data_dir {sample}",
    "loading.py": "--pairs 500 --bert_model {bert}",
    "prediction.py": "--lines 300 --rounds 1 --bert_model {bert}",
    "tagging.py": "--steps 1 --max_length 99 --bert_model {bert} --spacy_model {spacy}",
}


@pytest.mark.parametrize("name", FLAGS)
def test_benchmarks_run(name, tiny_directory, pipeline_directory):
    """They run and print their tables. Nothing is asserted about times."""
    places = dict(bert=tiny_directory, spacy=pipeline_directory, sample=ROOT / "data" / "sample")
    command = [sys.executable, ROOT / "benchmarks" / name, *FLAGS[name].format(**places).split()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    table = r"^\|.*(this project|AdamW|one encoder|processes|ours)"
    assert re.search(table, done.stdout, re.MULTILINE)
