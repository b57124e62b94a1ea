"""Attention for short sequences. Without a GPU, Triton's interpreter runs the kernels (see conftest.py)."""

import math

import pytest
import torch

import attention
from attention import Sequences, cuda_attention, plain_attention

pytest.importorskip("triton")
import kernels  # noqa: E402
from kernels import LONGEST, ShortAttention  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = pytest.mark.skipif(DEVICE.type == "cpu", reason="CUDA graphs, and no bfloat16 in tl.dot")
BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def random_qkv(n_tokens, n_heads, width, dtype=torch.float32):
    qkv = torch.randn(n_tokens, 3, n_heads, width, device=DEVICE, dtype=dtype)
    return qkv.requires_grad_()


def of(lengths):
    return Sequences.of(lengths, DEVICE)


def relative_error(ours, expected):
    return float((ours.double() - expected).detach().norm() / expected.detach().norm())


def assert_equal(ours, expected, qkv, exact_qkv):
    """Compare the contexts, and the gradients of one random sum of them."""
    gradient = torch.randn_like(ours)
    (ours_grad,) = torch.autograd.grad(ours, qkv, gradient)
    (expected_grad,) = torch.autograd.grad(expected, exact_qkv, gradient.double())
    bound = BOUNDS[qkv.dtype]
    assert ours.dtype == ours_grad.dtype == qkv.dtype
    assert relative_error(ours, expected) < bound
    for part in range(3):
        grads = ours_grad[:, part], expected_grad[:, part]
        # The softmax of one score is constant, so query and key have no gradient.
        assert grads[1].norm() < 1e-9 or relative_error(*grads) < bound


@pytest.mark.parametrize(
    "lengths, n_heads, width, dtype",
    [
        ([2, 7, 15, 16], 3, 32, torch.float32),
        ([17, 5], 2, 64, torch.float32),
        ([33, 31, 2], 1, 32, torch.float32),
        ([48], 2, 64, torch.float32),
        ([81], 1, 32, torch.float32),
        ([LONGEST], 1, 64, torch.float32),
        pytest.param([17, 3], 2, 64, torch.bfloat16, marks=ON_GPU),
        ([3, 18], 2, 32, torch.float16),
    ],
    ids=str,
)
def test_it_equals_plain_attention_in_float64(lengths, n_heads, width, dtype):
    qkv = random_qkv(sum(lengths), n_heads, width, dtype)
    exact = qkv.detach().double().requires_grad_()
    ours = ShortAttention.apply(qkv, of(lengths).offsets, 0.0)
    assert_equal(ours, plain_attention(exact, of(lengths), 0.0), qkv, exact)


def test_every_length_is_right():
    """All lengths at once; in the interpreter, above 36, those next to a block's end only."""
    lengths = list(range(1, LONGEST + 1))
    if DEVICE.type == "cpu":
        lengths = [n for n in lengths if n <= 36 or n % 16 in (0, 1, 15)]
    qkv = random_qkv(sum(lengths), 1, 32)
    ours = ShortAttention.apply(qkv, of(lengths).offsets, 0.0)
    assert relative_error(ours, plain_attention(qkv.double(), of(lengths), 0.0)) < 2e-6


def dropout_mask(lengths, n_heads, p, seed):
    """Show the dropout factors [S, S] of each sequence and head. Equal keys give equal weights, and the
    values of one call pass 32 columns of the mask."""
    masks = [torch.zeros(n_heads, n, n, device=DEVICE) for n in lengths]
    for first in range(0, max(lengths), 32):
        qkv = torch.zeros(sum(lengths), 3, n_heads, 32, device=DEVICE)
        for value, mask in zip(qkv[:, 2].split(lengths), masks):
            n = min(32, len(value) - first)
            if n > 0:
                value[first : first + n, :, :n] = torch.eye(n, device=DEVICE)[:, None]
        torch.manual_seed(seed)
        contexts = ShortAttention.apply(qkv, of(lengths).offsets, p)
        for context, mask in zip(contexts.split(lengths), masks):
            n = min(32, mask.shape[-1] - first)
            if n > 0:
                mask[:, :, first : first + n] = (context * len(context)).transpose(0, 1)[..., :n]
    return masks


@pytest.mark.parametrize("lengths, width", [([17, 3], 32), ([18], 64)], ids=str)
def test_both_passes_have_the_dropout_mask_of_the_seed(lengths, width):
    """The masks that `dropout_mask` shows, put into the formula, give context and gradients."""
    n_heads, p = 2, 0.1
    masks = dropout_mask(lengths, n_heads, p, seed=7)
    qkv = random_qkv(sum(lengths), n_heads, width)
    exact = qkv.detach().double().requires_grad_()
    torch.manual_seed(7)
    ours = ShortAttention.apply(qkv, of(lengths).offsets, p)
    expected = []
    for tokens, mask in zip(exact.split(lengths), masks):
        query, key, value = tokens.permute(1, 2, 0, 3)  # 3 x [H, S, K]
        weights = (query @ key.mT / math.sqrt(width)).softmax(-1)
        expected.append((weights * (mask > 0.5) / (1 - p) @ value).transpose(0, 1))
    torch.manual_seed(8)  # the backward pass must not draw again
    assert_equal(ours, torch.cat(expected), qkv, exact)


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("width", [32, 64])
def test_gradients_are_those_of_finite_differences(width, p):
    """Along random directions, in float32, for queries, keys and values apart."""
    lengths, h = [17, 3], 1e-2
    qkv = random_qkv(sum(lengths), 2, width)
    weights = torch.randn(sum(lengths), 2, width, device=DEVICE, dtype=torch.float64)

    def loss(values):
        torch.manual_seed(5)  # the same mask
        context = ShortAttention.apply(values, of(lengths).offsets, p)
        return (context.double() * weights).sum()

    (gradient,) = torch.autograd.grad(loss(qkv), qkv)
    for part in range(3):
        direction = torch.zeros_like(qkv)
        own = gradient[:, part]
        direction[:, part] = own + own.std() * torch.randn_like(own)
        direction *= len(qkv) ** 0.5 / direction.norm()
        difference = loss(qkv + h * direction) - loss(qkv - h * direction)
        expected = (gradient.double() * direction).sum()
        torch.testing.assert_close(difference / (2 * h), expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("p", [0.1, 0.4])
def test_dropout_drops_the_right_share_and_keeps_the_mean(p):
    lengths, n_heads = [16, 16, 29], 2
    masks = dropout_mask(lengths, n_heads, p, seed=1)
    factors = torch.cat([mask.flatten() for mask in masks])
    kept = factors > 0.5
    torch.testing.assert_close(factors, kept / (1 - p), rtol=1e-5, atol=1e-5)
    assert abs(float(kept.float().mean()) - (1 - p)) < 5 * math.sqrt(p * (1 - p) / len(kept))
    # No two of the same size are alike: sequences, heads, blocks and seeds.
    blocks = [block for mask in masks[:2] for block in mask]
    blocks += [masks[2][0][:13, :13], masks[2][0][16:, :13], masks[2][0][:13, 16:]]
    blocks += [dropout_mask([16], 1, p, seed=2)[0][0]]
    corners = {tuple((block[:13, :13] > 0.5).flatten().tolist()) for block in blocks}
    assert len(corners) == len(blocks)


@pytest.mark.parametrize("lengths", [[0, 3, 0, 17, 0], [], [0]], ids=str)
def test_sequences_may_be_empty(lengths):
    full = [length for length in lengths if length]
    qkv = random_qkv(sum(lengths), 2, 32)
    ours = ShortAttention.apply(qkv, of(lengths).offsets, 0.0)
    if full:
        exact = qkv.detach().double().requires_grad_()
        assert_equal(ours, plain_attention(exact, of(full), 0.0), qkv, exact)
    assert ours.shape == (sum(lengths), 2, 32)


@pytest.mark.parametrize(
    "lengths, calls",
    [
        ([3, LONGEST], [("short", [3, LONGEST])]),
        ([LONGEST + 1, 150], [("flash", [LONGEST + 1, 150])]),
        ([2, 5, 150], [("short", [2, 5]), ("flash", [150])]),
        ([150, 2, 129], [("flash", [150]), ("short", [2]), ("flash", [129])]),
    ],
    ids=str,
)
def test_short_and_long_sequences_in_one_batch(monkeypatch, lengths, calls):
    seen = []

    def flash(qkv, sequences, dropout):
        seen.append(("flash", sequences.lengths))
        return plain_attention(qkv, sequences, dropout)

    def short(qkv, offsets, dropout):
        seen.append(("short", offsets.diff().tolist()))
        return plain_attention(qkv, of(seen[-1][1]), dropout)

    monkeypatch.setattr(attention, "load_kernels", lambda device: kernels)
    monkeypatch.setattr(attention, "flash_attention", flash)
    monkeypatch.setattr(ShortAttention, "apply", short)
    qkv = random_qkv(sum(lengths), 2, 32)
    context = cuda_attention(qkv, of(lengths), 0.0)
    assert torch.equal(context, plain_attention(qkv, of(lengths), 0.0))
    assert seen == calls


@pytest.mark.parametrize(
    "width, dtype, takes",
    [
        (32, torch.float32, True),
        (64, torch.bfloat16, True),
        (48, torch.bfloat16, False),
        (64, torch.float64, False),
    ],
)
def test_other_heads_go_to_flash_attention(monkeypatch, width, dtype, takes):
    monkeypatch.setattr(attention, "load_kernels", lambda device: kernels)
    monkeypatch.setattr(attention, "flash_attention", lambda *_: "flash")
    monkeypatch.setattr(ShortAttention, "apply", lambda *_: "short")
    context = cuda_attention(random_qkv(5, 1, width, dtype), of([2, 3]), 0.0)
    assert context == ("short" if takes else "flash")


def test_a_second_derivative_is_refused():
    qkv = random_qkv(3, 1, 32)
    context = ShortAttention.apply(qkv, of([3]).offsets, 0.0)
    (gradient,) = torch.autograd.grad(context.square().sum(), qkv, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("capability, failure", [((7, 5), None), ((9, 0), RuntimeError("no gcc"))])
def test_flash_attention_where_the_kernels_cannot_run(monkeypatch, capsys, capability, failure):
    def fail(*_):
        raise failure

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(ShortAttention, "apply", fail)
    attention.load_kernels.cache_clear()
    assert attention.load_kernels(DEVICE) is None
    attention.load_kernels.cache_clear()
    assert ("no gcc" in capsys.readouterr().err) == bool(failure)


@ON_GPU
def test_a_cuda_graph_replays_other_lengths_with_other_masks():
    """No sequence of its own at the end is needed: empty ones fill the offsets."""
    qkv, offsets = random_qkv(64, 2, 32).detach(), of([5, 20, 39]).offsets
    for dropout in (0.0, 0.1):  # kernels are compiled before a capture
        ShortAttention.apply(qkv, offsets, dropout)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        exact = ShortAttention.apply(qkv, offsets, 0.0)
        dropped = ShortAttention.apply(qkv, offsets, 0.1)
    offsets.copy_(of([64, 0, 0]).offsets)
    draws = []
    for _ in range(2):
        graph.replay()
        draws.append(dropped.clone())
    assert relative_error(exact, plain_attention(qkv.double(), of([64]), 0.0)) < 2e-6
    assert not torch.equal(*draws)
