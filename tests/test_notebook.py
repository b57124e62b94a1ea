"""The notebook and the Python examples of docs/using-a-model.md run."""

import json
import re
import shutil
import subprocess
import sys

import numpy as np
from checkpoints import make_checkpoint_fixture  # noqa: F401
from conftest import ROOT

from export import export

NOTEBOOK = json.loads((ROOT / "docs/notebook.ipynb").read_text(encoding="utf-8"))
PAGE = (ROOT / "docs/using-a-model.md").read_text(encoding="utf-8")


def test_the_notebook_has_the_format_of_jupyter_and_no_outputs():
    assert NOTEBOOK["nbformat"] == 4 and NOTEBOOK["nbformat_minor"] >= 5
    assert NOTEBOOK["metadata"]["kernelspec"]["name"] == "python3"
    assert len({cell["id"] for cell in NOTEBOOK["cells"]}) == len(NOTEBOOK["cells"])
    for cell in NOTEBOOK["cells"]:
        more = {"outputs", "execution_count"} if cell["cell_type"] == "code" else set()
        assert set(cell) == {"cell_type", "id", "metadata", "source"} | more
        assert (
            cell["metadata"] == {} and not cell.get("outputs") and not cell.get("execution_count")
        )
        assert all(line.endswith("\n") for line in cell["source"][:-1])


def test_the_cells_of_the_notebook_run(tiny_directory, tmp_path, monkeypatch, capsys):
    """In docs/, where Jupyter starts, with the tiny BERT, and with all files under tmp_path."""
    monkeypatch.chdir(ROOT / "docs")
    monkeypatch.setattr(sys, "path", list(sys.path))
    folders = "".join(
        f', "--{flag}", {str(tmp_path / flag)!r}' for flag in ("logdir", "predictions_dir")
    )
    changes = {
        '"minilm"': repr(str(tiny_directory)) + folders,
        '"models/notebook"': repr(str(tmp_path / "models")),
    }
    code = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
    for old, new in changes.items():
        assert sum(text.count(old) for text in code) in (1, 2)
        code = [text.replace(old, new) for text in code]
    names = {"__name__": "__main__"}
    for number, text in enumerate(code):
        exec(compile(text, f"cell {number}", "exec"), names)
    assert len(list((tmp_path / "models").glob("*.pt"))) == 1
    shown = capsys.readouterr().out
    assert "sentiment='" in shown and "paraphrase=" in shown and "similarity=" in shown
    # The mistakes are the least probable truths, and the nearest sentences the highest cosines.
    truths = sorted(map(names["of_the_truth"], names["pairs"]))
    assert [names["of_the_truth"](pair) for pair in names["mistakes"]] == truths[:5]
    found = names["cosines"][names["nearest"]]
    assert found.tolist() == sorted(names["cosines"].tolist(), reverse=True)[:5]
    assert np.abs(names["cosines"]).max() <= 1 + 1e-5


# In a process of its own, since transformers keeps the code of models that other tests have opened.
EXAMPLES = """
import json, sys
import sentence_transformers, transformers
sys.path.insert(0, sys.argv[1])
found = [{}]
for number, text in enumerate(json.loads(sys.argv[2])):
    names = {"__name__": "__main__"}
    if "onnxruntime" in text:  # goes on with the variables of the example before it
        names = found[-1] | names
    exec(compile(text, f"example {number}", "exec"), names)
    found.append(names)
(ours,) = [names for names in found if "Predictor" in names]
assert [type(answer).__name__ for answer in ours["answers"]] == ["Answer"] * 2
assert ours["vectors"].shape == (2, 24)
shapes = [names["output"]["last_hidden_state"].shape for names in found if "output" in names]
assert (2, 6, 384) in map(tuple, shapes)  # as the page says
"""


def test_the_python_examples_of_the_page_run(make_checkpoint, tmp_path):
    """Beside the checkpoint and the exported model that the page's commands write."""
    (tmp_path / "models").mkdir()
    shutil.copy(make_checkpoint("plain"), tmp_path / "models/RUN.pt")
    export(str(tmp_path / "models/RUN.pt"), str(tmp_path / "my_model"), "onnx")
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    command = [sys.executable, "-c", EXAMPLES, str(ROOT), json.dumps(blocks)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
