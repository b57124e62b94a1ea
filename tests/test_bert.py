import pytest
import torch
import transformers
from conftest import TINY, TRANSFORMERS_SEES_DATASETS

from base_bert import BertConfig
from bert import BertModel, equal_length_runs, pack

SENTENCES = [
    "A deep, moving and often funny film.",
    "No.",
    "Which is the best way to learn rock climbing, and how much does it cost?",
    "",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich 🎈",
]


def relative_error(ours, theirs):
    return float((ours - theirs).detach().abs().max() / theirs.detach().abs().max())


def assert_same_gradients(ours, theirs):
    """A key's bias moves all of a query's scores alike, so softmax gives it gradient 0: there the
    error is relative to the query's bias."""
    for name, parameter in theirs.named_parameters():
        if parameter.grad is None:
            continue
        scale = theirs.get_parameter(name.replace("key.bias", "query.bias")).grad.abs().max()
        error = (ours.get_parameter(name).grad - parameter.grad).abs().max()
        assert error < 1e-9 * scale, name


def test_transformers_did_not_take_our_datasets_for_the_package():
    assert TRANSFORMERS_SEES_DATASETS is False


def test_equal_length_runs():
    assert equal_length_runs([3, 3, 5, 3]) == [(2, 3), (1, 5), (1, 3)]
    assert equal_length_runs([]) == []


def test_minilm_outputs_equal_transformers(minilm_path, minilm_tokenizer):
    batch = minilm_tokenizer(SENTENCES, padding=True, truncation=True, return_tensors="pt")
    ours = BertModel.from_pretrained("minilm").eval()(**batch)
    theirs = transformers.BertModel.from_pretrained(minilm_path).eval()(**batch)
    mask = batch["attention_mask"].bool()
    hidden, expected = ours["last_hidden_state"], theirs.last_hidden_state
    torch.testing.assert_close(hidden[mask], expected[mask], rtol=0, atol=1e-5)
    torch.testing.assert_close(ours["pooler_output"], theirs.pooler_output, rtol=0, atol=1e-5)
    assert not hidden[~mask].any()


CONFIGS = [
    TINY,
    TINY | dict(num_hidden_layers=1, num_attention_heads=1, hidden_act="relu"),
    TINY | dict(hidden_size=60, num_attention_heads=5, intermediate_size=16, type_vocab_size=3),
    TINY | dict(num_hidden_layers=5, hidden_act="gelu_new", layer_norm_eps=1e-5),
]


@pytest.mark.parametrize("sizes", CONFIGS)
def test_outputs_and_gradients_equal_transformers_in_float64(twins, padded_batch, sizes):
    input_ids, mask = padded_batch
    token_types = torch.randint(0, sizes["type_vocab_size"], input_ids.shape)
    ours, theirs = twins(BertConfig(**sizes), torch.float64)
    weight = torch.randn(*input_ids.shape, sizes["hidden_size"], dtype=torch.float64)
    weight *= mask[:, :, None]
    outputs = []
    for model in (ours, theirs):
        output = model(input_ids, mask, token_types)
        hidden, pooled = output["last_hidden_state"], output["pooler_output"]
        outputs.append((hidden[mask.bool()], pooled))
        ((hidden * weight).sum() + pooled.square().sum()).backward()
    for mine, expected in zip(*outputs):
        assert relative_error(mine, expected) < 1e-9
    assert all(parameter.grad is not None for parameter in theirs.parameters())
    assert_same_gradients(ours, theirs)


def test_minilm_gradients_equal_transformers_in_float64(minilm_path, minilm_tokenizer):
    batch = minilm_tokenizer(SENTENCES, padding=True, return_tensors="pt")
    mask = batch["attention_mask"][:, :, None]
    ours = BertModel.from_pretrained("minilm").double().eval()
    theirs = transformers.BertModel.from_pretrained(minilm_path).double().eval()
    for model in (ours, theirs):
        (model(**batch)["last_hidden_state"] * mask).pow(3).sum().backward()
    assert_same_gradients(ours, theirs)


def test_other_masks_equal_transformers(twins, tiny_config, padded_batch):
    """Left padding and a hole in the middle: positions are columns, as transformers counts."""
    input_ids, mask = padded_batch
    mask = mask.flip(1)
    mask[0, 4] = 0
    ours, theirs = twins(tiny_config, torch.float64)
    output = ours(input_ids, mask)["last_hidden_state"][mask.bool()]
    expected = theirs(input_ids, mask).last_hidden_state[mask.bool()]
    assert relative_error(output, expected) < 1e-9


def test_a_sentence_does_not_depend_on_its_batch(tiny_config, padded_batch):
    input_ids, mask = padded_batch
    model = BertModel(tiny_config).double().eval()
    together = model(input_ids, mask)
    for row, length in enumerate(mask.sum(1)):
        alone = model(input_ids[row : row + 1, :length], mask[row : row + 1, :length])
        hidden = together["last_hidden_state"][row, :length]
        torch.testing.assert_close(hidden, alone["last_hidden_state"][0], rtol=0, atol=1e-12)
        torch.testing.assert_close(together["pooler_output"][row], alone["pooler_output"][0])


@pytest.mark.parametrize("lengths", [[2, 2, 2], [41], [2, 41, 2, 17], [1]])
def test_packed_core_equals_padded_form_in_any_order(tiny_config, lengths):
    model = BertModel(tiny_config).double().eval()
    rows = [torch.randint(1, TINY["vocab_size"], (length,)) for length in lengths]
    positions = torch.cat([torch.arange(length) for length in lengths])
    packed = model.encode(torch.cat(rows), lengths, positions)
    input_ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([row * 0 + 1 for row in rows], batch_first=True)
    padded = model(input_ids, mask)["last_hidden_state"]
    torch.testing.assert_close(packed, padded[mask.bool()], rtol=0, atol=1e-12)


def test_pack_refuses_a_row_of_padding_only(padded_batch):
    input_ids, mask = padded_batch
    mask[3] = 0
    with pytest.raises(ValueError, match="row 3"):
        pack(input_ids, mask)


@pytest.mark.parametrize(
    "where", ["hidden_dropout_prob", "attention_probs_dropout_prob"], ids=["hidden", "attention"]
)
def test_both_dropouts_act_in_training_only(padded_batch, where):
    rates = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model = BertModel(BertConfig(**TINY | rates | {where: 0.5}))

    def twice():
        return [model(*padded_batch)["last_hidden_state"] for _ in range(2)]

    assert not torch.equal(*twice())
    model.eval()
    assert torch.equal(*twice())
