"""Encoders that other people share: other heads, names, files and settings than ours."""

import json
import shutil
import warnings

import pytest
import torch
import transformers
from checkpoints import make_checkpoint_fixture  # noqa: F401
from checkpoints import load_pretrained
from conftest import TINY
from safetensors.torch import load_file, save_file
from transformers.activations import ACT2CLS

from activations import ACTIVATION_FUNCTIONS
from base_bert import ACTIVATIONS, BertConfig
from bert import BertModel
from options import parse_options
from tokenizer import BertTokenizer
from utils import UserError

POINTER = (
    b"version https://git-lfs.github.com/spec/v1\n"
    b"oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n"
)


def theirs_made(name, **changes):
    torch.manual_seed(3)
    return getattr(transformers, name)(transformers.BertConfig(**TINY | changes)).eval()


def assert_same_states(ours, theirs, batch):
    mask = batch[1].bool()
    states = ours.eval()(*batch)["last_hidden_state"]
    expected = theirs(*batch).last_hidden_state
    torch.testing.assert_close(states[mask], expected[mask], rtol=0, atol=1e-5)


def loaded(directory):
    """Return the encoder, and the warnings of its loading."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = BertModel.from_pretrained(directory)
    return model, [str(warning.message) for warning in caught if warning.category is UserWarning]


@pytest.fixture
def bert_directory(tmp_path):
    theirs = theirs_made("BertModel")
    theirs.save_pretrained(tmp_path / "bert")
    return theirs, tmp_path / "bert"


# Class of transformers -> whether it has a pooler, and the tensors of its head.
HEADS = {
    "BertModel": (True, 0),
    "BertForPreTraining": (True, 7),
    "BertForMaskedLM": (False, 5),
    "BertLMHeadModel": (False, 5),
    "BertForNextSentencePrediction": (True, 2),
    "BertForSequenceClassification": (True, 2),
    "BertForMultipleChoice": (True, 2),
    "BertForTokenClassification": (False, 2),
    "BertForQuestionAnswering": (False, 2),
}


@pytest.mark.parametrize("name", HEADS)
def test_encoders_with_other_heads_load(tmp_path, padded_batch, name):
    theirs = theirs_made(name)
    theirs.save_pretrained(tmp_path)
    model, said = loaded(tmp_path)
    assert_same_states(model, theirs.base_model, padded_batch)
    has_pooler, n_others = HEADS[name]
    assert model.has_new_pooler is not has_pooler
    assert sum("has no pooler" in line for line in said) == (not has_pooler)
    others = [line for line in said if "weights of other heads" in line]
    assert len(said) == len(others) + (not has_pooler)
    if n_others:
        (line,) = others
        first = min(n for n in load_file(tmp_path / "model.safetensors") if n[:5] != "bert.")
        assert (
            f": {n_others} weights of other heads are not used: {first}" in line
            and len(line) <= 300
        )
    else:
        assert not others
    again = BertModel.from_pretrained(tmp_path)
    shape = again.pooler.dense.weight.shape
    assert shape == (24, 24) and again.pooler.dense.weight.any()


def test_a_new_pooler_is_drawn_as_bert_draws_it(tmp_path):
    theirs_made("BertForMaskedLM", hidden_size=120, initializer_range=0.05).save_pretrained(
        tmp_path
    )
    dense = BertModel.from_pretrained(tmp_path).pooler.dense
    assert abs(float(dense.weight.std()) / 0.05 - 1) < 0.1
    assert not dense.bias.any() and dense.weight.requires_grad


@pytest.mark.parametrize("moe", ["soft", "hard"])
def test_experts_need_a_pooler(tmp_path, tiny_directory, moe):
    shutil.copytree(tiny_directory, tmp_path / "bert")
    path = tmp_path / "bert" / "model.safetensors"
    weights = {n: w for n, w in load_file(path).items() if not n.startswith("pooler.")}
    save_file(weights, path)
    load_pretrained(parse_options(["--bert_model", str(tmp_path / "bert")]))
    with pytest.raises(UserError, match="no pooler, which the gate of --moe reads"):
        load_pretrained(parse_options(["--bert_model", str(tmp_path / "bert"), "--moe", moe]))


PREFIXES = ["bert.", "module.", "model.", "module.bert.", "module.model.bert.", "model.model."]
PREFIXES += ["_orig_mod.", "0.auto_model.", "encoder.", "module.module._orig_mod.encoder.bert."]


@pytest.mark.parametrize("old_names", [False, True])
@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_common_prefix_is_taken_off(bert_directory, padded_batch, prefix, old_names):
    theirs, directory = bert_directory
    weights = {}
    for name, tensor in load_file(directory / "model.safetensors").items():
        if old_names:
            name = name.replace("LayerNorm.weight", "LayerNorm.gamma")
            name = name.replace("LayerNorm.bias", "LayerNorm.beta")
        weights[prefix + name] = tensor
    weights[f"{prefix}embeddings.position_ids"] = torch.arange(64)[None]
    weights[f"{prefix}embeddings.token_type_ids"] = torch.zeros(1, 64, dtype=torch.long)
    save_file(weights | {"classifier.weight": torch.ones(2)}, directory / "model.safetensors")
    model, said = loaded(directory)
    assert_same_states(model, theirs, padded_batch)
    assert (
        len(said) == 1 and ": 1 weights of other heads are not used: classifier.weight" in said[0]
    )


def write_shards(directory, suffix):
    """Split the weights in three files, the way that transformers does."""
    weights = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    stem = {".safetensors": "model", ".bin": "pytorch_model"}[suffix]
    shards, places = {}, {}
    for number, (name, tensor) in enumerate(weights.items()):
        places[name] = f"{stem}-{number % 3 + 1:05}-of-00003{suffix}"
        shards.setdefault(places[name], {})[name] = tensor
    for filename, shard in shards.items():
        (save_file if suffix == ".safetensors" else torch.save)(shard, directory / filename)
    index = directory / f"{stem}{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    return index


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_sharded_weights_load(bert_directory, padded_batch, suffix):
    theirs, directory = bert_directory
    index = write_shards(directory, suffix)
    for name in (directory, index):
        assert_same_states(BertModel.from_pretrained(name), theirs, padded_batch)
    again = transformers.BertModel.from_pretrained(directory)  # they are what transformers reads
    assert_same_states(BertModel.from_pretrained(directory), again.eval(), padded_batch)


def test_shards_that_transformers_writes(tmp_path, padded_batch):
    theirs = theirs_made("BertForMaskedLM")
    theirs.save_pretrained(tmp_path, max_shard_size="5KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    assert_same_states(BertModel.from_pretrained(tmp_path), theirs.bert, padded_batch)


def map_to(value):
    def change(index):
        table = json.loads(index.read_text())
        first = next(iter(table["weight_map"]))
        table["weight_map"][first] = value
        index.write_text(json.dumps(table))

    return change


INDEXES = {
    r": 1 files are not in its folder: \.\./model\.bin": map_to("../model.bin"),
    ": 1 files are not in its folder: /etc/passwd": map_to("/etc/passwd"),
    ": 1 files are not in its folder: a/../../b": map_to("a/../../b"),
    ": 1 files are not in its folder: other.bin": map_to("other.bin"),
    r": 3 files are not in its folder: \S+-00001-of": lambda index: [
        path.unlink() for path in index.parent.glob("*-of-*")
    ],
    "not readable JSON": lambda index: index.write_text("{"),
    "not an index of weights": lambda index: index.write_text('{"weight_map": [1]}'),
    "not an index of weight": lambda index: index.write_text("{}"),
    "index of weights": map_to(3),
    "missing: ": lambda index: next(index.parent.glob("*-00001-*")).write_bytes(
        next(index.parent.glob("*-00002-*")).read_bytes()
    ),
    "Git LFS pointer": lambda index: next(index.parent.glob("*-00001-*")).write_bytes(POINTER),
}


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize("message", INDEXES)
def test_a_damaged_index_is_one_clear_line(bert_directory, suffix, message):
    _, directory = bert_directory
    INDEXES[message](write_shards(directory, suffix))
    with pytest.raises(UserError, match=message) as caught:
        BertModel.from_pretrained(directory)
    text = str(caught.value)
    assert "\n" not in text and str(directory) in text and len(text) <= 300


@pytest.mark.parametrize("filename", ["config.json", "model.safetensors", "pytorch_model.bin"])
def test_a_pointer_of_git_lfs_is_named(bert_directory, filename):
    _, directory = bert_directory
    if filename == "pytorch_model.bin":
        (directory / "model.safetensors").unlink()
    (directory / filename).write_bytes(POINTER)
    names = [directory] if filename == "config.json" else [directory, directory / filename]
    for name in names:
        with pytest.raises(UserError, match=f"{filename}: is a Git LFS pointer, .* git lfs pull"):
            BertModel.from_pretrained(name)


@pytest.mark.parametrize("filename", ["tokenizer.json", "vocab.txt", "tokenizer_config.json"])
def test_a_pointer_of_git_lfs_is_no_tokenizer(tmp_path, tiny_directory, filename):
    for name in {"tokenizer_config.json", "tokenizer.json"} - {filename}:
        if filename != "vocab.txt":
            shutil.copy(tiny_directory / name, tmp_path)
    (tmp_path / filename).write_bytes(POINTER)
    with pytest.raises(UserError, match=f"{filename}: is a Git LFS pointer, .* git lfs pull"):
        BertTokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ACT2CLS)
def test_activations_equal_those_of_transformers(tmp_path, padded_batch, name):
    config = transformers.BertConfig(**TINY | {"hidden_act": name})
    if name in ("prelu", "xielu"):  # with weights of their own
        with pytest.raises(UserError, match=f"weights of its own, like gelu, not '{name}'"):
            BertConfig(**TINY | {"hidden_act": name})
        return
    torch.manual_seed(3)
    theirs = transformers.BertModel(config).eval()
    with torch.no_grad():
        for layer in theirs.encoder.layer:  # reach where activations differ: GELUs at 1, relu6 at 6
            layer.intermediate.dense.weight.mul_(60)
    theirs.save_pretrained(tmp_path)
    ours = BertModel.from_pretrained(tmp_path).double().eval()
    theirs.double()
    mask = padded_batch[1].bool()
    states, expected = (
        ours(*padded_batch)["last_hidden_state"][mask],
        theirs(*padded_batch).last_hidden_state[mask],
    )
    torch.testing.assert_close(states, expected, rtol=0, atol=1e-7)
    states.pow(3).sum().backward()
    expected.pow(3).sum().backward()
    got = ours.encoder.layer[0].intermediate.dense.weight.grad
    wanted = theirs.encoder.layer[0].intermediate.dense.weight.grad
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


def test_a_config_knows_the_activations_of_the_encoder():
    assert set(ACTIVATIONS) == set(ACTIVATION_FUNCTIONS) == ACT2CLS.keys() - {"prelu", "xielu"}


@pytest.mark.parametrize("number", [None, 0, 5, -1, -99])
def test_pad_token_id(tmp_path, padded_batch, number):
    theirs = theirs_made("BertModel", pad_token_id=number)
    theirs.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["pad_token_id"] == number
    ours = BertModel.from_pretrained(tmp_path)
    assert_same_states(ours, theirs, padded_batch)
    assert ours.embeddings.word_embeddings.padding_idx == (number and number % 99)
    ours.save_pretrained(tmp_path / "again")
    assert_same_states(BertModel.from_pretrained(tmp_path / "again"), theirs, padded_batch)


@pytest.mark.parametrize("suffix", [".pt", ".resume"])
@pytest.mark.parametrize("has_config", [False, True])
def test_a_checkpoint_of_ours_is_named_as_one(make_checkpoint, tmp_path, suffix, has_config):
    path = shutil.copy(make_checkpoint("plain"), tmp_path / f"run{suffix}")
    if has_config:
        (tmp_path / "config.json").write_text(BertConfig(**TINY).to_json())
    with pytest.raises(UserError, match="a checkpoint of this project, .*--init_from") as caught:
        BertModel.from_pretrained(path)
    assert str(path) in str(caught.value) and len(str(caught.value)) <= 300
