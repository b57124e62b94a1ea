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
        "attention.py --steps 1 --batch_size 4",
        "optimizers.py --steps 1 --bert_model {bert}",
        "experts.py --steps 1 --bert_model {bert}",
        "data_parallel.py --steps 1 --data_dir {sample}",
        "loading.py --pairs 500 --bert_model {bert}",
        "prediction.py --lines 300 --rounds 1 --bert_model {bert}",
        "tagging.py --steps 1 --max_length 99 --bert_model {bert} --spacy_model {spacy}",
    ],
)
def test_benchmarks_run(script, tiny_directory, pipeline_directory):
    """That they run and print their tables; of time nothing is asserted."""
    places = dict(bert=tiny_directory, spacy=pipeline_directory, sample=ROOT / "data" / "sample")
    name, *flags = script.format(**places).split()
    command = [sys.executable, ROOT / "benchmarks" / name, *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert re.search(
        r"^\|.*(this project|AdamW|one encoder|processes|ours)", done.stdout, re.MULTILINE
    )
