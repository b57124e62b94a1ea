"""Ways to compute attention on packed sequences: one for CPUs, some for CUDA, one for everything else.

Each takes qkv [N, 3, H, K], the queries, keys and values as one linear layer gives them, and
returns the context [N, H, K]. Axes as in bert.py: N tokens of all sequences, B sequences, S tokens
of one sequence, H heads, K width of a head.
"""

import functools
import itertools
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from streams import complain


class Sequences(NamedTuple):
    """How packed tokens divide into sequences. Any order of lengths is right; sorted lengths give the
    fewest runs, and so the least work on a CPU."""

    lengths: list[int]  # [B]; on the host, so that reading them never waits for a GPU
    offsets: Tensor  # [B + 1] where each sequence starts, and N at the end; on the device
    runs: list[tuple[int, int]]  # (count, length) of neighbouring sequences of equal length
    sizes: list[int]  # tokens in each run
    second_derivative: bool  # whether attention must have one

    @classmethod
    def of(
        cls, lengths: list[int], device: torch.device, second_derivative: bool = False
    ) -> "Sequences":
        # From pinned memory the copy is asynchronous.
        pinned = device.type == "cuda"
        offsets = torch.tensor([0, *itertools.accumulate(lengths)], pin_memory=pinned)
        runs = [(len(list(run)), length) for length, run in itertools.groupby(lengths)]
        sizes = [count * length for count, length in runs]
        return cls(lengths, offsets.to(device, non_blocking=True), runs, sizes, second_derivative)


def draw_kept(n: int, p: float, dtype: torch.dtype) -> tuple[Tensor, float]:
    """Draw a dropout mask on the CPU: [n] ones, and zeros with probability `p` (to the nearest 2^-16).
    Also return one over the share of ones, by which the kept elements are scaled."""
    # One 64-bit number serves four elements; `bernoulli_` draws one number for each.
    dropped = min(round(p * 2**16), 2**16 - 1)
    bits = torch.empty(-(-n // 4), dtype=torch.int64).random_(-(2**63), None)
    kept = torch.empty(n, dtype=dtype)
    torch.ge(bits.view(torch.int16)[:n], dropped - 2**15, out=kept)
    return kept, 2**16 / (2**16 - dropped)


def by_head(tokens: Tensor, run: tuple[int, int]) -> Tensor:
    """View the tokens of one run by head: [B S, C, H, K] to [C, B, H, S, K]."""
    return tokens.unflatten(0, run).permute(2, 0, 3, 1, 4)


def plain_attention(qkv: Tensor, sequences: Sequences, dropout: float) -> Tensor:
    """Compute attention for one run after the other, with plain operations. Works on any device, and
    is the only one here that has a second derivative."""
    contexts = []
    for part, run in zip(qkv.split(sequences.sizes), sequences.runs, strict=True):
        query, key, value = by_head(part, run)  # 3 x [B, H, S, K]
        scores = query @ key.mT / query.shape[-1] ** 0.5  # [B, H, S, S]
        context = F.dropout(scores.softmax(dim=-1), dropout) @ value  # [B, H, S, K]
        contexts.append(context.transpose(1, 2).flatten(0, 1))  # [B S, H, K]
    return torch.cat(contexts)


def jagged_attention(qkv: Tensor, sequences: Sequences, dropout: float) -> Tensor:
    """Compute attention on CUDA for sequences of all lengths in one kernel, which PyTorch chooses by
    dtype, width of a head and GPU."""
    shortest, longest = min(sequences.lengths), max(sequences.lengths)
    jagged = [
        torch.nested.nested_tensor_from_jagged(
            part.contiguous(), sequences.offsets, min_seqlen=shortest, max_seqlen=longest
        )
        for part in qkv.unbind(1)
    ]
    query, key, value = (part.transpose(1, 2) for part in jagged)  # [B, H, S, K], S differs
    context = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)
    return context.transpose(1, 2).values()


def flash_takes(dtype: torch.dtype, width: int, capability: tuple[int, int]) -> bool:
    """Return whether PyTorch's flash kernel takes heads of this width on a GPU of this CUDA
    capability."""
    half = dtype in (torch.bfloat16, torch.float16)
    return half and width % 8 == 0 and width <= 256 and capability >= (8, 0)


def flash_attention(qkv: Tensor, sequences: Sequences, dropout: float) -> Tensor:
    """Compute flash attention (Dao 2023, arXiv 2307.08691) on CUDA where the kernel takes the input,
    and `jagged_attention` elsewhere."""
    # The operator is called directly: nested tensors reach the same kernel, but they take the host
    # longer than the kernel takes the GPU. PyTorch's public `varlen_attn` has no dropout.
    if not flash_takes(qkv.dtype, qkv.shape[-1], torch.cuda.get_device_capability(qkv.device)):
        return jagged_attention(qkv, sequences, dropout)
    offsets, longest = sequences.offsets.int(), max(sequences.lengths)
    limits = offsets, offsets, longest, longest
    context, *_ = torch.ops.aten._flash_attention_forward(
        *qkv.unbind(1), *limits, dropout_p=dropout, is_causal=False, return_debug_mask=False
    )
    return context


@functools.cache
def load_kernels(device: torch.device) -> ModuleType | None:
    """Return kernels.py, or None if it cannot run: without Triton, on a GPU without bfloat16, or, after a
    warning, where Triton cannot compile."""
    if torch.cuda.get_device_capability(device) < (8, 0):
        return None
    try:
        import kernels
    except ImportError:
        return None
    qkv, offsets = torch.zeros(1, 3, 1, 32, device=device), torch.arange(2, device=device)
    try:
        kernels.ShortAttention.apply(qkv, offsets, 0.0)
    # Triton has no common class for a missing C compiler, a missing Python.h or an old driver.
    except Exception as failure:
        complain(f"warning: attention is slower, because Triton cannot compile: {failure}")
        return None
    return kernels


def cuda_attention(qkv: Tensor, sequences: Sequences, dropout: float) -> Tensor:
    """Compute attention on CUDA: with kernels.py for short sequences, with flash attention for long ones
    and where kernels.py cannot run. Like `flash_attention`, it does not wait for the GPU."""
    kernels, lengths = load_kernels(qkv.device), sequences.lengths
    if not kernels or not kernels.takes(qkv) or min(lengths, default=0) > kernels.LONGEST:
        return flash_attention(qkv, sequences, dropout)
    if max(lengths, default=0) <= kernels.LONGEST:
        return kernels.ShortAttention.apply(qkv, sequences.offsets, dropout)
    # Batches are sorted by length, so this makes two groups.
    by_kind = itertools.groupby(lengths, key=lambda length: length <= kernels.LONGEST)
    groups = [Sequences.of(list(group), qkv.device) for _, group in by_kind]
    parts = qkv.split([sum(group.lengths) for group in groups])
    pairs = zip(parts, groups, strict=True)
    return torch.cat([cuda_attention(part, group, dropout) for part, group in pairs])


def copied_by_head(tokens: Tensor, run: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Copy the tokens of one run by head: [B S, C, H, K] to [C, B H, S, K]."""
    return by_head(tokens, run).to(dtype, memory_format=torch.contiguous_format).flatten(1, 2)


def scaled_bmm(left: Tensor, right: Tensor, scale: float, out: Tensor | None = None) -> Tensor:
    """Return `scale * left @ right` without a separate pass for the factor."""
    return torch.baddbmm(left.new_empty(()), left, right, beta=0, alpha=scale, out=out)


class FusedAttention(torch.autograd.Function):
    """Attention on a CPU, faster than `plain_attention`: all dropout comes from one draw, results are
    written where they belong, and the graph has one node. No second derivative.

    Inputs in bfloat16 become float32 when they are copied by head: products of matrices as small as
    these take longer in bfloat16."""

    @staticmethod
    @torch.autocast("cpu", enabled=False)
    def forward(ctx, qkv: Tensor, sequences: Sequences, dropout: float) -> Tensor:
        _, _, n_heads, width = qkv.shape
        ctx.sequences, ctx.scale = sequences, width**-0.5
        squares = [count * n_heads * length**2 for count, length in sequences.runs]
        dtype = torch.promote_types(qkv.dtype, torch.float32)
        kept, ctx.kept_scale = draw_kept(sum(squares) if dropout else 0, dropout, dtype)
        masks = kept.split(squares) if dropout else [None] * len(squares)
        context = torch.empty_like(qkv[:, :1])  # [N, 1, H, K]
        parts = qkv.split(sequences.sizes), context.split(sequences.sizes), sequences.runs
        saved = []
        for part, target, run, mask in zip(*parts, masks, strict=True):
            heads = copied_by_head(part, run, dtype)  # [3, B H, S, K]
            query, key, value = heads
            weights = scaled_bmm(query, key.mT, ctx.scale).softmax(dim=-1)  # [B H, S, S]
            mask = None if mask is None else mask.view_as(weights)
            dropped = weights if mask is None else weights * mask
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
        parts = grad_context.unsqueeze(1).split(sizes), grad_qkv.split(sizes), runs
        saved = zip(*[iter(ctx.saved_tensors)] * 4, strict=True)
        for part, target, run, (heads, weights, dropped, mask) in zip(*parts, saved, strict=True):
            query, key, value = heads
            (grad,) = copied_by_head(part, run, heads.dtype)  # [B H, S, K]
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


def cpu_attention(qkv: Tensor, sequences: Sequences, dropout: float) -> Tensor:
    """Compute attention on a CPU: `FusedAttention`, or PyTorch's flash kernel, which has no dropout,
    where no gradient is wanted."""
    if dropout or (qkv.requires_grad and torch.is_grad_enabled()):
        return FusedAttention.apply(qkv, sequences, dropout)
    context = torch.empty_like(qkv[:, :1])  # [N, 1, H, K]
    parts = qkv.split(sequences.sizes), context.split(sequences.sizes), sequences.runs
    for part, target, run in zip(*parts, strict=True):
        query, key, value = by_head(part, run)  # 3 x [B, H, S, K]
        by_head(target, run)[0].copy_(F.scaled_dot_product_attention(query, key, value))
    return context.squeeze(1)


ATTENTION = {"cpu": cpu_attention, "cuda": cuda_attention}


def attend(qkv: Tensor, sequences: Sequences, dropout: float) -> Tensor:
    """Compute attention in the way that suits the device: qkv [N, 3, H, K] to the context [N, H, K]."""
    kind = "" if sequences.second_derivative else qkv.device.type
    return ATTENTION.get(kind, plain_attention)(qkv, sequences, dropout)
