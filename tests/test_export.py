import json
import os
import re
import shlex
import subprocess
import sys

import numpy as np
import onnxruntime
import pytest
import torch
import transformers
from checkpoints import make_checkpoint_fixture  # noqa: F401
from conftest import ROOT
from huggingface_hub import ModelCard
from safetensors.torch import load_file

import export
import multitask_classifier as mc
import predict
from batches import Padded, join
from bert import BertModel
from options import parse_options
from tasks import Task, combine
from tokenizer import BertTokenizer

LONGEST = 20
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


@pytest.fixture(scope="module", autouse=True)
def code_cache(tmp_path_factory):
    """Keep the folder into which transformers copies code out of the home directory."""
    with pytest.MonkeyPatch.context() as patch:
        folder = str(tmp_path_factory.mktemp("code"))
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", folder)
        yield


@pytest.fixture(scope="module")
def exported(make_checkpoint, tmp_path_factory):
    """kind -> the folder"""
    folder, made = tmp_path_factory.mktemp("exported"), {}

    def export(kind: str, format: str = "pytorch"):
        if (kind, format) not in made:
            target = folder / format / kind
            command = ["--checkpoint", str(make_checkpoint(kind)), "--export", str(target)]
            assert predict.main([*command, "--format", format]) == 0
            made[kind, format] = target
        return made[kind, format]

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


def own_tasks(joint: bool) -> dict[str, Task]:
    """All kinds of task: classes or a number, of a sentence, or of a pair with any encoding whose order
    counts or not. Without `joint`, only those that the encoder reads one by one."""
    labels = {"yesno": dict(classes=("no", "yes")), "three": dict(classes=("a", "b", "c"))}
    labels["number"] = dict(range=(-2.0, 7.5))
    tasks = [
        Task(name=f"one_{kind}", sentences=("s",), label="l", **given)
        for kind, given in labels.items()
    ]
    for encoding in ("bi", "cross", "both") if joint else ("bi",):
        for kind, symmetric in (("yesno", True), ("three", False), ("number", True)):
            name = f"{encoding}_{kind}"
            given = labels[kind] | dict(encoding=encoding, symmetric=symmetric)
            tasks.append(Task(name=name, sentences=("s", "t"), label="l", **given))
    return {task.name: task for task in tasks}


@pytest.fixture(params=[True, False], ids=["joint heads", "no joint heads"])
def own_export(request, tiny_directory, tmp_path):
    """A model with all kinds of task, cut after 20 word pieces, and the folder of its export."""
    model = mc.MultitaskBERT(
        BertModel.from_pretrained(tiny_directory), own_tasks(request.param)
    ).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    tokenizer = BertTokenizer.from_pretrained(tiny_directory)
    tokenizer.max_length = LONGEST
    tokenizer.save_pretrained(tmp_path)
    export.write_model(model, tmp_path, LONGEST)
    return model, tmp_path


PAIRS = [
    ("a dog", "a red dog"),
    ("", "why not"),
    ("it is so", ""),
    ("abcdefgh " * 3, "no"),  # cut alone
    ("no idea", "one two three four five"),
    ("abcdefghijkl", "mnopqrstuvw"),  # cut together
    ("mnopqrstuvw", "abcdefghijkl"),
    ("abcdefghijklmnop", "abcd"),
]


@torch.no_grad()
def our_outputs(model, first, second):
    """name -> outputs of our model for padded batches of first and second sentences"""
    one, two = (Padded(batch["input_ids"], batch["attention_mask"]) for batch in (first, second))
    vectors = [model.embed(*one), model.embed(*two), model.embed(*join(one, two, LONGEST))]
    columns = {"bi": slice(0, 2), "cross": slice(2, 3), "both": slice(0, 3)}
    outputs = {}
    for name, task in model.tasks.items():
        read = vectors[columns[task.encoding]] if task.is_pair else vectors[:1]
        outputs[name] = combine(task, model._outputs(name, read))
    return outputs


def tokenized(folder, *texts):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return tokenizer(*texts, padding=True, truncation=True, return_tensors="pt")


def assert_same_outputs(found, expected, tolerance=1e-5):
    assert set(found) == set(expected)
    for name, output in expected.items():
        torch.testing.assert_close(
            torch.as_tensor(found[name]), output, rtol=tolerance, atol=tolerance
        )
        assert output.std(dim=0).min() > 100 * tolerance  # they differ from row to row


@torch.no_grad()
def test_transformers_opens_the_whole_model(own_export):
    model, folder = own_export
    firsts, seconds = map(list, zip(*PAIRS, strict=True))
    first, second = tokenized(folder, firsts), tokenized(folder, seconds)
    expected = our_outputs(model, first, second)
    opened = transformers.AutoModel.from_pretrained(folder, trust_remote_code=True)
    assert type(opened) is not mc.MultitaskBERT and not opened.training

    alone = opened(**first)
    torch.testing.assert_close(
        alone.pop("sentence_embedding"),
        model.embed(first["input_ids"], first["attention_mask"]),
        rtol=1e-5,
        atol=1e-5,
    )
    assert_same_outputs(alone, {n: expected[n] for n in expected if n.startswith("one_")})

    both = opened(**first, second=second)
    del both["sentence_embedding"]
    assert_same_outputs(both, expected)

    joint = opened(**tokenized(folder, firsts, seconds))
    del joint["sentence_embedding"]
    assert_same_outputs(joint, {n: expected[n] for n in expected if n.startswith("cross_")})


def test_without_code_it_is_the_encoder(own_export):
    model, folder = own_export
    opened = transformers.AutoModel.from_pretrained(folder)
    assert type(opened) is transformers.BertModel
    for name, tensor in opened.state_dict().items():
        assert torch.equal(tensor, model.bert.state_dict()[name])


@pytest.mark.parametrize(
    "own_export", [True], indirect=True
)  # the cut model below has no joint head
@pytest.mark.filterwarnings("error")
def test_onnx_runtime_answers_the_same(own_export, capfd):
    model, folder = own_export
    capfd.readouterr()
    export.write_onnx(model, folder)
    assert capfd.readouterr() == ("", "")  # nothing about its insides
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    names = [output.name for output in session.get_outputs()]
    for pairs in (PAIRS, PAIRS[:3] * 5, PAIRS[-1:]):
        first, second = (tokenized(folder, list(texts)) for texts in zip(*pairs, strict=True))
        inputs = {name: first[name].numpy() for name in ("input_ids", "attention_mask")}
        inputs |= {f"second_{name}": second[name].numpy() for name in inputs}
        found = dict(zip(names, session.run(None, inputs), strict=True))
        embedded = model.embed(first["input_ids"], first["attention_mask"]).detach()
        expected = our_outputs(model, first, second) | {"sentence_embedding": embedded}
        assert set(found) == set(expected)
        for name, output in expected.items():
            np.testing.assert_allclose(found[name], output, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind, format", [("cut", "onnx"), ("both", "pytorch")])
def test_the_export_answers_as_predict_does(exported, make_checkpoint, kind, format):
    """With the examples of its README."""
    folder = exported(kind, format)
    assert (folder / "model.onnx").exists() == (format == "onnx")
    card = (folder / "README.md").read_text(encoding="utf-8").replace("FOLDER", str(folder))
    found = {}
    for example in re.findall(r"```python\n(.*?)```", card, re.DOTALL):
        exec(example, found)
    pair = ("How old are you?", "What is your age?")
    ours = predict.Predictor(make_checkpoint(kind))
    *alone, paired = ours.predict(["A clever film.", "A bore.", pair])
    model = transformers.AutoModel.from_pretrained(folder, trust_remote_code=True)
    with torch.no_grad():
        shares = model(**found["read"](["A clever film.", "A bore."]))["sst"].softmax(dim=-1)
        answers = model(**found["first"], second=found["second"])
    for answer, row in zip(alone, shares.tolist(), strict=True):
        assert [*answer.probabilities["sentiment"].values()] == pytest.approx(row, abs=1e-5)
    probability = answers["para"].softmax(dim=-1)[0, 1].item()
    assert paired.paraphrase == pytest.approx(probability, abs=1e-5)
    assert paired.similarity == pytest.approx(answers["sts"].clamp(0, 5).item(), abs=1e-5)
    np.testing.assert_allclose(found["vectors"], ours.embed(list(pair)), atol=1e-5)
    if format == "onnx":
        session = onnxruntime.InferenceSession(folder / "model.onnx")
        inputs = {name: found["first"][name].numpy() for name in ("input_ids", "attention_mask")}
        inputs |= {f"second_{name}": found["second"][name].numpy() for name in inputs}
        for name, output in answers.items():
            (by_onnx,) = session.run([name], inputs)
            np.testing.assert_allclose(by_onnx, output, rtol=1e-4, atol=1e-4)


def test_a_missing_library_is_one_line(make_checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    target = tmp_path / "new"
    command = ["--checkpoint", str(make_checkpoint("plain")), "--export", str(target)]
    assert predict.main([*command, "--format", "onnx"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: --format onnx: onnxscript is not installed; pip install ")
    assert error.count("\n") == 1 and list(tmp_path.iterdir()) == []


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
    weights = load_file(folder / "model.safetensors")
    again.load_state_dict(weights)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])
    assert any(name.startswith("joint_heads.sts.") for name in weights) == (kind != "plain")


@pytest.mark.parametrize("kind", ["plain", "cross", "both", "only sts"])
def test_the_card_says_what_it_is(exported, make_checkpoint, kind):
    card = ModelCard.load(exported(kind) / "README.md")
    assert card.data.library_name == "sentence-transformers"
    assert ("| accuracy | 0.4321 |" in card.content) == (kind != "only sts")
    assert "| pearson | 0.8765 |" in card.content
    assert ("is not the similarity for which" in card.content) == (kind in ("cross", "both"))
    assert ("`joint_heads.*`" in card.content) == (kind in ("cross", "both"))
    (command,) = re.findall(r"^python multitask_classifier.py .*", card.content, re.MULTILINE)
    options = parse_options(shlex.split(command)[2:])
    assert options.evaluate == [f"models/tiny0-{kind}.pt".replace(" ", "-")]
    for path in exported(kind).glob("**/*"):
        if path.suffix in (".md", ".json", ".py"):
            text = path.read_text(encoding="utf-8")
            assert "{" not in text or path.suffix != ".md"
            assert str(ROOT) not in text and str(exported(kind).parent) not in text


@pytest.mark.parametrize("encoder, licence", [("minilm", "apache-2.0"), ("some/other", None)])
def test_the_card_claims_no_licence_that_it_does_not_know(make_checkpoint, encoder, licence):
    model, _, content = mc.load_checkpoint(make_checkpoint("plain"))
    content["options"]["bert_model"] = encoder
    card = ModelCard(export.model_card(model, content, "m.pt", 128))
    assert card.data.license == licence and card.data.language == "en"
    assert ("for weights and code" in card.content) == bool(licence)


def test_the_card_of_own_tasks_claims_no_language(make_checkpoint):
    model, _, content = mc.load_checkpoint(make_checkpoint("plain"))
    model.tasks["nli"] = model.tasks.pop("sst")
    card = ModelCard(export.model_card(model, content, "m.pt", 128))
    assert card.data.language is None and "English" not in card.content


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

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(export, "model_card", interrupt)  # its last step
        assert predict.main([*command, str(tmp_path / "new")]) == 130
        assert predict.main([*command, str(empty)]) == 130
    with monkeypatch.context() as patch:
        patch.setattr("torch.onnx.export", interrupt)
        assert predict.main([*command, str(tmp_path / "new"), "--format", "onnx"]) == 130
    assert sorted(path.name for path in tmp_path.glob("**/*")) == ["empty", "full", "mine"]
    assert predict.main([*command, str(empty)]) == 0
    assert (empty / "README.md").exists()
    assert empty.stat().st_mode & 0o777 == full.stat().st_mode & 0o777
