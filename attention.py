"""The ways to compute attention, per device."""

import itertools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Sequences(NamedTuple):
    """How packed tokens divide into sequences. Sorted lengths give the fewest runs, and attention
    on a CPU the least work; any order is right."""

    lengths: list[int]  # [B]; on the host, so that reading them never waits for a GPU
    offsets: Tensor  # [B + 1] where each sequence starts, and N at the end; on the device
    runs: list[tuple[int, int]]  # (count, length) of neighbours of equal length
    sizes: list[int]  # the runs' numbers of tokens
    plain: bool  # whether attention has to have a second derivative

    @classmethod
    def of(cls, lengths: list[int], device: torch.device, plain: bool = False) -> "Sequences":
        pinned = device.type == "cuda"  # which makes the copy asynchronous
        offsets = torch.tensor([0, *itertools.accumulate(lengths)], pin_memory=pinned)
        runs = [(len(list(run)), length) for length, run in itertools.groupby(lengths)]
        sizes = [count * length for count, length in runs]
        return cls(lengths, offsets.to(device, non_blocking=True), runs, sizes, plain)


def draw_kept(n: int, p: float, dtype: torch.dtype) -> tuple[Tensor, float]:
    """On the CPU: [n] ones, zeros with probability `p` (to the nearest 2^-16); one over the share
    of ones. `bernoulli_` draws a number an element, here one 64-bit number serves four."""
    dropped = min(round(p * 2**16), 2**16 - 1)
    bits = torch.empty(-(-n // 4), dtype=torch.int64).random_(-(2**63), None)
    kept = torch.empty(n, dtype=dtype)
    torch.ge(bits.view(torch.int16)[:n], dropped - 2**15, out=kept)
    return kept, 2**16 / (2**16 - dropped)


def by_head(tokens: Tensor, run: tuple[int, int]) -> Tensor:
    """A view of one run's tokens, [B S, C, H, K] to [C, B, H, S, K]."""
    return tokens.unflatten(0, run).permute(2, 0, 3, 1, 4)


def plain_attention(qkv: Tensor, sequences: Sequences, dropout: float) -> Tensor:
    """On any device, and the one with a second derivative: sequences of equal length together."""
    contexts = []
    for part, run in zip(qkv.split(sequences.sizes), sequences.runs):
        query, key, value = by_head(part, run)  # 3 x [B, H, S, K]
        scores = query @ key.mT / query.shape[-1] ** 0.5  # [B, H, S, S]
        context = F.dropout(scores.softmax(dim=-1), dropout) @ value  # [B, H, S, K]
        contexts.append(context.transpose(1, 2).flatten(0, 1))  # [B S, H, K]
    return torch.cat(contexts)


def jagged_attention(qkv: Tensor, sequences: Sequences, dropout: float) -> Tensor:
    """On CUDA: one kernel for sequences of all lengths, of the kernels that PyTorch has for the dtype,
    the width of a head and the GPU."""
    limits = dict(min_seqlen=min(sequences.lengths), max_seqlen=max(sequences.lengths))
    jagged = [
        torch.nested.nested_tensor_from_jagged(each.contiguous(), sequences.offsets, **limits)
        for each in qkv.unbind(1)
    ]
    query, key, value = (each.transpose(1, 2) for each in jagged)  # [B, H, S, K], S differs
    context = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)
    return context.transpose(1, 2).values()


def flash_takes(dtype: torch.dtype, width: int, capability: tuple[int, int]) -> bool:
    """Whether PyTorch's kernel is for heads of this width on a GPU of this CUDA capability."""
    half = dtype in (torch.bfloat16, torch.float16)
    return half and width % 8 == 0 and width <= 256 and capability >= (8, 0)


def flash_attention(qkv: Tensor, sequences: Sequences, dropout: float) -> Tensor:
    """On CUDA: flash attention (Dao 2023, arXiv 2307.08691) where it can be. `jagged_attention` comes
    to the same kernel, by nested tensors, which take the host longer than the kernel takes the GPU.
    PyTorch's public `varlen_attn` is the same but for the dropout that it lacks."""
    if not flash_takes(qkv.dtype, qkv.shape[-1], torch.cuda.get_device_capability(qkv.device)):
        return jagged_attention(qkv, sequences, dropout)
    offsets, longest = sequences.offsets.int(), max(sequences.lengths)
    limits = offsets, offsets, longest, longest
    causal = with_debug_mask = False
    context, *_ = torch.ops.aten._flash_attention_forward(
        *qkv.unbind(1), *limits, dropout, causal, with_debug_mask
    )
    return context


def scaled_bmm(left: Tensor, right: Tensor, scale: float, out: Tensor | None = None) -> Tensor:
    """`scale * left @ right`, without a pass of its own for the factor."""
    return torch.baddbmm(left.new_empty(()), left, right, beta=0, alpha=scale, out=out)


class FusedAttention(torch.autograd.Function):
    """On a CPU: what `plain_attention` does, in half the time. All dropout comes from one draw,
    results are written where they belong, and the graph has one node. No second derivative."""

    @staticmethod
    @torch.autocast("cpu", enabled=False)  # all in the dtype of qkv
    def forward(ctx, qkv: Tensor, sequences: Sequences, dropout: float) -> Tensor:
        _, _, n_heads, width = qkv.shape
        ctx.sequences, ctx.scale = sequences, width**-0.5
        squares = [count * n_heads * length**2 for count, length in sequences.runs]
        kept, ctx.kept_scale = draw_kept(sum(squares) if dropout else 0, dropout, qkv.dtype)
        masks = kept.split(squares) if dropout else [None] * len(squares)
        context = torch.empty_like(qkv[:, :1])  # [N, 1, H, K]
        parts = zip(qkv.split(sequences.sizes), context.split(sequences.sizes), sequences.runs)
        saved = []
        for (part, target, run), mask in zip(parts, masks):
            heads = by_head(part, run).flatten(1, 2)  # [3, B H, S, K], a copy
            query, key, value = heads
            weights = scaled_bmm(query, key.mT, ctx.scale).softmax(dim=-1)  # [B H, S, S]
            mask = mask.view_as(weights) if dropout else None
            dropped = weights * mask if dropout else weights
            output = scaled_bmm(dropped, value, ctx.kept_scale)  # [B H, S, K]
            by_head(target, run).copy_(output.view(1, run[0], n_heads, run[1], width))
            saved += [heads, weights, dropped, mask]
        ctx.save_for_backward(*saved)
        return context.squeeze(1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_context: Tensor) -> tuple[Tensor | None, ...]:
        n_tokens, n_heads, width = grad_context.shape
        sizes, runs = ctx.sequences.sizes, ctx.sequences.runs
        grad_qkv = grad_context.new_empty(n_tokens, 3, n_heads, width)
        parts = zip(grad_context.unsqueeze(1).split(sizes), grad_qkv.split(sizes), runs)
        saved = zip(*[iter(ctx.saved_tensors)] * 4)
        for (part, target, run), (heads, weights, dropped, mask) in zip(parts, saved):
            query, key, value = heads
            (grad,) = by_head(part, run).flatten(1, 2)  # [B H, S, K]
            grad_weights = scaled_bmm(grad, value.mT, ctx.kept_scale)  # [B H, S, S]
            if mask is not None:
                grad_weights *= mask
            grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
            grads = torch.empty_like(heads)  # [3, B H, S, K]
            scaled_bmm(grad_scores, key, ctx.scale, out=grads[0])
            scaled_bmm(grad_scores.mT, query, ctx.scale, out=grads[1])
            scaled_bmm(dropped.mT, grad, ctx.kept_scale, out=grads[2])
            by_head(target, run).copy_(grads.view(3, run[0], n_heads, run[1], width))
        return grad_qkv, None, None


ATTENTION = {"cpu": FusedAttention.apply, "cuda": flash_attention}  # elsewhere plain_attention
