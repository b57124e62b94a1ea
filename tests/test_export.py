import json
import os
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest
import torch
from checkpoints import make_checkpoint_fixture  # noqa: F401
from conftest import ROOT
from huggingface_hub import ModelCard
from safetensors.torch import load_file

import export
import multitask_classifier as mc
import predict
from bert import BertModel
from options import parse_options

SENTENCES = ["Is it good?", "a", "It is rather good, isn't it?", "", "Why not; no idea. " * 20]
OPEN = """
import json, sys
import torch
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoTokenizer

assert "datasets" not in sys.modules
folders, sentences = map(json.loads, sys.argv[1:])
opened = []
for folder in folders:
    model = SentenceTransformer(folder, trust_remote_code=True, device="cpu")
    vectors = model.encode(sentences, convert_to_tensor=True)
    tokenizer, encoder = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)
    batch = tokenizer(sentences, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        states = encoder.eval()(**batch).last_hidden_state
    found = {"vectors": vectors, "similarities": model.similarity(vectors, vectors)}
    found |= {"states": states, "ids": batch["input_ids"]}
    opened.append({name: tensor.tolist() for name, tensor in found.items()})
print(json.dumps(opened))
"""


@pytest.fixture(scope="module")
def exported(make_checkpoint, tmp_path_factory):
    """kind -> the folder"""
    folder, made = tmp_path_factory.mktemp("exported"), {}

    def export(kind: str):
        if kind not in made:
            target = folder / kind
            command = ["--checkpoint", str(make_checkpoint(kind)), "--export", str(target)]
            assert predict.main(command) == 0
            made[kind] = target
        return made[kind]

    return export


def test_other_libraries_compute_the_same(exported, make_checkpoint, tmp_path):
    """In a new process, in another folder, with our root nowhere on its path."""
    kinds = ["plain", "cut", "both"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    folders = json.dumps([str(exported(kind)) for kind in kinds])
    command = [sys.executable, "-c", OPEN, folders, json.dumps(SENTENCES)]
    run = dict(capture_output=True, text=True, cwd=tmp_path, env=environment)
    done = subprocess.run(command, **run)
    assert done.returncode == 0, done.stderr
    opened = dict(zip(kinds, json.loads(done.stdout.splitlines()[-1]), strict=True))
    for kind, found in opened.items():
        assert_same_vectors(found, make_checkpoint(kind))
    for kind in ("plain", "cut"):
        assert_same_similarities(opened[kind], make_checkpoint(kind), tmp_path)


def assert_same_vectors(found, checkpoint):
    model, tokenizer, content = mc.load_checkpoint(checkpoint)
    limit = content["options"]["max_length"] or 128
    batch = tokenizer(SENTENCES, True, truncation=True, max_length=limit, return_tensors="pt")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    assert found["ids"] == ids.tolist() and ids.shape[1] == limit  # the last one is cut
    with torch.no_grad():
        vectors = model.eval().embed(ids, mask)
        states = model.bert(ids, mask)["last_hidden_state"]
    real = mask.bool()
    theirs = torch.tensor(found["states"])[real]
    torch.testing.assert_close(theirs, states[real], rtol=1e-5, atol=3e-5)
    torch.testing.assert_close(torch.tensor(found["vectors"]), vectors, rtol=0, atol=1e-5)
    assert torch.pdist(vectors).min() > 0.1


def assert_same_similarities(found, checkpoint, tmp_path):
    lines = "\n".join(f"{one}\t{two}" for one in SENTENCES for two in SENTENCES if one or two)
    (tmp_path / "pairs").write_text(lines)
    command = [str(tmp_path / "pairs"), "--checkpoint", str(checkpoint), "--json"]
    assert predict.main([*command, "--output", str(tmp_path / "answers")]) == 0
    answers = map(json.loads, (tmp_path / "answers").read_text().splitlines())
    ours = np.array([answer["similarity"] / 5 for answer in answers])
    theirs = np.array(found["similarities"]).flatten()
    empty = SENTENCES.index("") * (len(SENTENCES) + 1)
    np.testing.assert_allclose(ours, np.delete(theirs, empty).clip(0, 1), atol=1e-5)
    assert ours.std() > 0.1


@pytest.mark.parametrize("kind", ["plain", "cross", "both"])
def test_an_export_is_the_whole_model(exported, make_checkpoint, kind):
    """Its two weights files give the model again."""
    folder = exported(kind)
    model, *_ = mc.load_checkpoint(make_checkpoint(kind))
    again = mc.MultitaskBERT(BertModel.from_pretrained(str(folder)), model.tasks)
    weights = load_file(folder / "heads.safetensors")
    missing, unexpected = again.load_state_dict(weights, strict=False)
    assert not unexpected and all(name.startswith("bert.") for name in missing)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])
    assert any(name.startswith("joint_heads.sts.") for name in weights) == (kind != "plain")


@pytest.mark.parametrize("kind", ["plain", "cross", "both", "only sts"])
def test_the_card_says_what_it_is(exported, make_checkpoint, kind):
    card = ModelCard.load(exported(kind) / "README.md")
    assert card.data.license == "apache-2.0" and card.data.library_name == "sentence-transformers"
    assert ("| accuracy | 0.4321 |" in card.content) == (kind != "only sts")
    assert "| pearson | 0.8765 |" in card.content
    assert ("is not the similarity for which" in card.content) == (kind in ("cross", "both"))
    assert ("`joint_heads.*`" in card.content) == (kind in ("cross", "both"))
    (command,) = re.findall(r"^python multitask_classifier.py .*", card.content, re.MULTILINE)
    options = parse_options(shlex.split(command)[2:])
    assert options.evaluate == f"models/{kind}.pt".replace(" ", "-")
    for path in exported(kind).glob("**/*"):
        if path.suffix in (".md", ".json", ".py"):
            text = path.read_text(encoding="utf-8")
            assert "{" not in text or path.suffix != ".md"
            assert str(ROOT) not in text and str(exported(kind).parent) not in text


def test_the_card_names_the_model_that_training_started_from():
    assert export.hub_id("minilm") == "sentence-transformers/all-MiniLM-L6-v2"
    assert export.hub_id("bert-base-uncased") == "bert-base-uncased"
    assert export.hub_id("google/bert_uncased_L-2_H-128_A-2").startswith("google/")
    assert export.hub_id(str(ROOT)) is None and export.hub_id("tests") is None


@pytest.mark.parametrize("kind, flag", [("tags", "--additional_input"), ("hard", "--moe")])
def test_what_others_cannot_compute_is_not_exported(make_checkpoint, tmp_path, capsys, kind, flag):
    path = make_checkpoint(kind)
    capsys.readouterr()
    assert predict.main(["--checkpoint", str(path), "--export", str(tmp_path / "new")]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {path}: was trained with {flag}") and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_an_export_is_all_or_nothing(make_checkpoint, tmp_path, capsys, monkeypatch):
    command = ["--checkpoint", str(make_checkpoint("plain")), "--export"]
    full, empty = tmp_path / "full", tmp_path / "empty"
    for folder in (full, empty):
        folder.mkdir()
    (full / "mine").write_text("")
    for taken in (full, full / "mine"):
        assert predict.main([*command, str(taken)]) == 1
        assert capsys.readouterr().err.startswith(f"error: {taken}: is there already")
    assert predict.main([*command, "/dev/null/x"]) == 1
    assert capsys.readouterr().err.startswith("error: cannot write /dev/null/x: ")

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(export, "model_card", interrupt)  # its last step
        assert predict.main([*command, str(tmp_path / "new")]) == 130
        assert predict.main([*command, str(empty)]) == 130
    assert sorted(path.name for path in tmp_path.glob("**/*")) == ["empty", "full", "mine"]
    assert predict.main([*command, str(empty)]) == 0
    assert (empty / "README.md").exists()
    assert empty.stat().st_mode & 0o777 == full.stat().st_mode & 0o777
