import math

import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import TINY, TRANSFORMERS_SEES_DATASETS

from activations import ACTIVATION_FUNCTIONS, GELU_BLOCK
from attention import (
    ATTENTION,
    FusedAttention,
    Sequences,
    cpu_attention,
    draw_kept,
    flash_attention,
    flash_takes,
    jagged_attention,
    plain_attention,
)
from base_bert import BertConfig
from bert import BertModel, Dropout, Tokens, pack

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


def test_sequences():
    sequences = Sequences.of([3, 3, 5, 3], torch.device("cpu"))
    assert sequences.runs == [(2, 3), (1, 5), (1, 3)]
    assert sequences.sizes == [6, 5, 3]
    assert sequences.offsets.tolist() == [0, 3, 6, 11, 14]


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
    sequences = Sequences.of(lengths, torch.device("cpu"))
    packed = model.encode(Tokens(torch.cat(rows), positions, sequences))
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


ATTENTIONS = {"fused": FusedAttention.apply, "plain": plain_attention, "jagged": jagged_attention}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("attention", ATTENTIONS.values(), ids=ATTENTIONS)
@pytest.mark.parametrize("lengths", [[2, 512, 2, 17, 17], [512], [2], [9] * 6], ids=str)
def test_every_attention_equals_padded_transformers_in_float32(
    twins, monkeypatch, attention, lengths
):
    """The one for CUDA too: on a CPU only the kernel within it is another."""
    monkeypatch.setitem(ATTENTION, "cpu", attention)
    ours, theirs = twins(BertConfig(**TINY | dict(max_position_embeddings=512)))
    rows = [torch.randint(1, TINY["vocab_size"], (length,)) for length in lengths]
    input_ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([row * 0 + 1 for row in rows], batch_first=True)
    weight = torch.randn(*input_ids.shape, TINY["hidden_size"])[mask.bool()]
    outputs = []
    for model in (ours, theirs):
        output = model(input_ids, mask)
        output = output["last_hidden_state"][mask.bool()]
        (output * weight).sum().backward()
        outputs.append(output)
    assert relative_error(*outputs) < 1e-5
    for name, parameter in theirs.named_parameters():
        if parameter.grad is not None and "key.bias" not in name:
            assert relative_error(ours.get_parameter(name).grad, parameter.grad) < 1e-4, name


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-6), (torch.bfloat16, 5e-3)], ids=str)
@pytest.mark.parametrize("width", [6, 26, 32, 64])
def test_attention_without_a_gradient_equals_plain_attention_in_float64(width, dtype, bound):
    sequences = Sequences.of([1, 2, 2, 17, 130, 3], torch.device("cpu"))
    qkv = torch.randn(155, 3, 4, width).to(dtype)
    expected = plain_attention(qkv.double(), sequences, 0.0)
    for wanted in (False, True):  # in `no_grad`, a weight still asks for its gradient
        with torch.no_grad():
            context = cpu_attention(qkv.requires_grad_(wanted), sequences, 0.0)
        assert context.dtype == dtype and not context.requires_grad
        assert relative_error(context.double(), expected) < bound


def test_attention_without_a_gradient_drops_too(monkeypatch):
    """As in `model.train()` with `torch.no_grad()`, for samples of a model's uncertainty."""
    qkv, sequences = torch.randn(5, 3, 1, 4), Sequences.of([2, 3], torch.device("cpu"))
    with torch.no_grad():
        assert not torch.equal(*(cpu_attention(qkv, sequences, 0.5) for _ in range(2)))


@pytest.mark.parametrize(
    "dtype, width, capability, takes",
    [
        (torch.bfloat16, 32, (9, 0), True),
        (torch.float16, 64, (8, 0), True),
        (torch.float32, 64, (8, 0), False),
        (torch.bfloat16, 64, (7, 5), False),  # Turing
        (torch.bfloat16, 26, (8, 0), False),  # TinyBERT: 312 / 12
        (torch.bfloat16, 264, (9, 0), False),
    ],
)
def test_flash_attention_is_for_some_heads_and_gpus(dtype, width, capability, takes):
    """As PyTorch says in pytorch/aten/src/ATen/native/transformers/cuda/sdp_utils.cpp, where it
    pads narrower heads, which the kernel itself does not."""
    assert flash_takes(dtype, width, capability) == takes


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernel is CUDA's")
@pytest.mark.parametrize("lengths", [[2, 2, 17, 60, 512], [512], [2], [9] * 6], ids=str)
def test_flash_attention_equals_plain_attention_in_float64(lengths):
    """And with dropout it does on average."""
    sequences = Sequences.of(lengths, torch.device("cuda"))
    qkv = torch.randn(sum(lengths), 3, 12, 32, device="cuda", dtype=torch.bfloat16)
    gradient = torch.randn_like(qkv[:, 0])
    results = []
    for attention, dtype in ((flash_attention, qkv.dtype), (plain_attention, torch.float64)):
        leaf = qkv.to(dtype).requires_grad_()
        context = attention(leaf, sequences, 0.0)
        results.append((context, *torch.autograd.grad(context, leaf, gradient.to(dtype))))

    def error(ours, expected):
        return float((ours.double() - expected).norm() / expected.norm())

    assert max(error(*pair) for pair in zip(*results)) < 1e-2
    draws = [flash_attention(qkv, sequences, 0.1).double() for _ in range(400)]
    exact = results[1][0].detach()
    assert error(draws[0], exact) > 0.05 > error(sum(draws) / len(draws), exact)


@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-12), (torch.bfloat16, 3e-4)], ids=str)
def test_fused_attention_with_dropout_equals_its_formula(dtype, bound):
    """softmax(Q K^T / sqrt(K)) * mask / (1 - p) times V, one sequence and head after the other. For
    bfloat16, only the results are rounded."""
    lengths, n_heads, width, p = [2, 2, 2, 5, 7, 7], 3, 4, 0.3
    sequences = Sequences.of(lengths, torch.device("cpu"))
    qkv = torch.randn(sum(lengths), 3, n_heads, width).to(dtype).requires_grad_()
    exact = qkv.detach().double().requires_grad_()
    torch.manual_seed(7)
    ours = FusedAttention.apply(qkv, sequences, p)
    torch.manual_seed(7)
    kept, scale = draw_kept(sum(n_heads * length**2 for length in lengths), p, torch.float64)
    contexts, masks = [], iter(kept.split([n**2 for n in lengths for _ in range(n_heads)]))
    for tokens in exact.split(lengths):
        for head in range(n_heads):
            query, key, value = tokens[:, :, head].unbind(1)
            weights = (query @ key.T / math.sqrt(width)).softmax(-1)
            contexts.append(weights * next(masks).view_as(weights) * scale @ value)
    heads = [torch.stack(contexts[i : i + n_heads], 1) for i in range(0, len(contexts), n_heads)]
    expected = torch.cat(heads)
    gradient = torch.randn_like(ours)
    (own,) = torch.autograd.grad(ours, qkv, gradient)
    (theirs,) = torch.autograd.grad(expected, exact, gradient.double())
    for result, formula in ((ours, expected), (own, theirs)):
        rounded = formula.to(dtype)
        assert result.dtype == dtype and relative_error(result.double(), rounded.double()) < bound


def test_fused_attention_refuses_a_second_derivative():
    qkv = torch.randn(5, 3, 2, 4, requires_grad=True)
    context = FusedAttention.apply(qkv, Sequences.of([2, 3], qkv.device), 0.1)
    (gradient,) = torch.autograd.grad(context.square().sum(), qkv, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.999, 0.9999999])
def test_dropout_has_the_distribution_of_bernoulli_draws(p):
    """Share of zeros, and no correlation between neighbours: five standard errors."""
    n = 400_003
    kept, scale = draw_kept(n, p, torch.float32)
    assert set(kept.unique().tolist()) <= {0.0, 1.0}
    exact = min(round(p * 2**16), 2**16 - 1) / 2**16
    assert abs(exact - p) <= 2**-16 and math.isclose(scale, 1 / (1 - exact))
    variance = exact * (1 - exact)
    assert abs(float(kept.mean()) - (1 - exact)) <= 5 * math.sqrt(variance / n)
    for lane in range(4):  # the four numbers in one draw
        share = float(kept[lane::4].mean())
        assert abs(share - (1 - exact)) <= 5 * math.sqrt(4 * variance / n)
    centred = kept.double() - (1 - exact)
    for lag in (1, 2, 3, 4, 8):
        covariance = float((centred[lag:] * centred[:-lag]).mean())
        assert abs(covariance) <= 5 * variance / math.sqrt(n - lag) + 1e-9


def test_dropout_adds_the_residual_keeps_the_mean_and_rests_in_evaluation():
    states = torch.ones(200, 500, dtype=torch.float64, requires_grad=True)
    residual = torch.randn(200, 500, dtype=torch.float64)
    dropout = Dropout(0.25)
    dropped = dropout(states, residual) - residual
    zeros = dropped.abs() < 1e-12
    assert torch.allclose(dropped[~zeros], torch.tensor(4 / 3, dtype=torch.float64))
    assert abs(float(dropped.detach().mean()) - 1) < 5 * math.sqrt(1 / 3 / states.numel())
    (gradient,) = torch.autograd.grad(dropped.sum(), states)
    torch.testing.assert_close(gradient, dropped.detach())
    assert not torch.equal(dropout(states), dropout(states))
    assert torch.equal(dropout.eval()(states, residual), states + residual)


def random_states(*shape, **kwargs):
    return (3 * torch.randn(*shape, **kwargs)).requires_grad_()


@pytest.mark.parametrize("name", ACTIVATION_FUNCTIONS)
def test_both_derivatives_are_right(name):
    torch.manual_seed(1)
    states = random_states(5, 7, dtype=torch.float64)
    assert torch.autograd.gradcheck(ACTIVATION_FUNCTIONS[name], (states,))
    assert torch.autograd.gradgradcheck(ACTIVATION_FUNCTIONS[name], (states,))


@pytest.mark.parametrize("shape", [(GELU_BLOCK // 8 + 3, 17), (3, 1), (0, 4)])
@pytest.mark.parametrize("transposed", [False, True])
def test_gelu_and_its_derivatives_are_pytorchs(shape, transposed):
    torch.manual_seed(2)
    states, vector = random_states(*shape), torch.randn(*shape)
    results = []
    for function in (ACTIVATION_FUNCTIONS["gelu"], F.gelu):
        inputs = states.mT if transposed else states
        outputs = function(inputs)
        gradients = torch.autograd.grad(outputs.square().sum(), states, create_graph=True)
        results.append([outputs, *gradients, *torch.autograd.grad(gradients, states, vector)])
    for ours, pytorchs in zip(*results):
        torch.testing.assert_close(ours, pytorchs)
