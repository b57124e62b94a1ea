import importlib.util
import json
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
        "experts.py --steps 1 --bert_model {bert}",
        "data_parallel.py --steps 1 --data_dir {sample}",
        "loading.py --pairs 500 --bert_model {bert}",
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
    assert re.search(r"^\|.*(this project|AdamW|one encoder|processes)", done.stdout, re.MULTILINE)


def test_the_training_benchmark_trains_what_is_missing(
    tiny_directory, pipeline_directory, tmp_path, monkeypatch, capsys
):
    spec = importlib.util.spec_from_file_location("training", ROOT / "benchmarks" / "training.py")
    training = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(training)
    settings = ["--additional_input", "--optimizer sophiah --hess_interval 2"]
    monkeypatch.setattr(training, "EXPERIMENTS", {"tags": dict.fromkeys(settings, (1,))})
    monkeypatch.setattr(training, "BUDGET", f"--smoketest --bert_model {tiny_directory}")
    monkeypatch.setattr(training, "RESULTS", tmp_path / "results.json")
    command = ["training.py", "tags", "--jobs", "2", "--data_dir", str(ROOT / "data" / "sample")]
    command += ["--spacy_model", str(pipeline_directory)]
    monkeypatch.setattr(sys, "argv", command)
    training.main()
    first = capsys.readouterr().out
    assert len(re.findall(r"^\| `--\w+", first, re.MULTILINE)) == 2

    results = json.loads(training.RESULTS.read_text())
    name = training.run_name(settings[1], 1)
    results[name]["sst_accuracy"] = 9.0  # would not last if this run were made again
    del results[training.run_name(settings[0], 1)]
    training.RESULTS.write_text(json.dumps(results))
    training.main()
    again = json.loads(training.RESULTS.read_text())
    assert again[name] == results[name] and len(again) == 2
    assert "9.000" in capsys.readouterr().out
