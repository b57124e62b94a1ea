"""Attention for short sequences on a GPU, in Triton: one program for one sequence and head.

Flash attention works on blocks of 128 tokens, and a sentence has 17. These kernels work on blocks of
16 by 16 scores, so they multiply no padding beyond the next multiple of 16. One launch serves all
lengths. The backward pass computes the scores again (Dao 2023, arXiv 2307.08691).

Axes as in attention.py: N tokens of all sequences, B sequences, S tokens of one sequence, H heads,
K width of a head. A head of a sequence is a matrix [S, K], whose rows are `stride` elements apart.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language import constexpr

LONGEST = 128  # tokens; for longer sequences the blocks of flash attention fit
KEYS = constexpr(LONGEST)
BLOCK = constexpr(16)  # the smallest matrices that tensor cores multiply
LAUNCH = {"num_warps": 1, "num_stages": 2}


@triton.jit
def load_rows(matrix, first, length, stride, WIDTH: constexpr):
    """Load rows `first` to `first + 16`: [16, K]. Rows from `length` on are zero."""
    rows = first + tl.arange(0, BLOCK)[:, None]
    return tl.load(matrix + rows * stride + tl.arange(0, WIDTH), mask=rows < length, other=0.0)


@triton.jit
def store_rows(matrix, values, first, length, stride, WIDTH: constexpr):
    """Store values [16, K] as rows `first` to `first + 16`, except rows from `length` on."""
    rows = first + tl.arange(0, BLOCK)[:, None]
    values = values.to(matrix.dtype.element_ty)
    tl.store(matrix + rows * stride + tl.arange(0, WIDTH), values, mask=rows < length)


@triton.jit
def product(left, right):
    """Return left @ right in float32. `left` is rounded to the type of `right`; float32 stays exact."""
    return tl.dot(left.to(right.dtype), right, input_precision="ieee")


@triton.jit
def masked_scores(query, key, column, length, scale):
    """Return scores [16, 16], minus infinity for keys from `length` on."""
    scores = product(query, tl.trans(key)) * scale
    return tl.where(column + tl.arange(0, BLOCK) < length, scores, float("-inf"))


@triton.jit
def dropout_factors(seed, first_query, column, stride, P: constexpr):
    """Return numbers [16, 16] that are 0 or 1 / (1 - p). `first_query` counts the queries of all
    sequences and heads. Philox (Salmon et al. 2011) makes each number from its place and the seed, so
    that both passes get the same."""
    factors = tl.full([BLOCK, BLOCK], 1.0, tl.float32)
    if P > 0:
        queries = (first_query + tl.arange(0, BLOCK) * stride).to(tl.int32)
        drawn = tl.rand(tl.load(seed), queries[:, None] * KEYS + column + tl.arange(0, BLOCK))
        factors = tl.where(drawn < P, 0.0, 1 / (1 - P))
    return factors


@triton.jit
def place(offsets):
    """Return the first token and the length of this program's sequence, and its head. Batches have the
    longest sequences last; they start first, so that no long one runs alone at the end."""
    sequence = tl.num_programs(0) - 1 - tl.program_id(0)
    start = tl.load(offsets + sequence)
    return start, (tl.load(offsets + sequence + 1) - start).to(tl.int32), tl.program_id(1)


@triton.jit
def forward_kernel(qkv, offsets, seed, context, log_sums, scale, P: constexpr, WIDTH: constexpr):
    """Write the context [N, H, K] and the log of the sum of each query's exponential scores [N, H]."""
    n_heads = tl.num_programs(1)
    size = n_heads * WIDTH
    start, length, head = place(offsets)
    first_query = start * n_heads + head
    queries = qkv + (start * 3 * n_heads + head) * WIDTH
    for row in range(0, length, BLOCK):
        query = load_rows(queries, row, length, 3 * size, WIDTH)
        highest = tl.full([BLOCK], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK], tl.float32)
        output = tl.zeros([BLOCK, WIDTH], tl.float32)
        for column in range(0, length, BLOCK):
            key = load_rows(queries + size, column, length, 3 * size, WIDTH)
            value = load_rows(queries + 2 * size, column, length, 3 * size, WIDTH)
            scores = masked_scores(query, key, column, length, scale)
            higher = tl.maximum(highest, tl.max(scores, 1))
            weights = tl.exp(scores - higher[:, None])
            shrunk = tl.exp(highest - higher)
            total = total * shrunk + tl.sum(weights, 1)
            weights *= dropout_factors(seed, first_query + row * n_heads, column, n_heads, P)
            output = output * shrunk[:, None] + product(weights, value)
            highest = higher
        output /= total[:, None]
        store_rows(context + first_query * WIDTH, output, row, length, size, WIDTH)
        rows = row + tl.arange(0, BLOCK)
        log_sum = highest + tl.log(total)
        tl.store(log_sums + first_query + rows * n_heads, log_sum, mask=rows < length)


@triton.jit
def query_side(queries, contexts, log_sums, grads, row, length, n_heads, WIDTH: constexpr):
    """Load 16 queries, the gradients of their contexts, their log-sums, and for each query the mean
    gradient of its weights. What is loaded from `length` on adds nothing to any gradient."""
    query = load_rows(queries, row, length, 3 * n_heads * WIDTH, WIDTH)
    grad = load_rows(grads, row, length, n_heads * WIDTH, WIDTH)
    context = load_rows(contexts, row, length, n_heads * WIDTH, WIDTH)
    mean = tl.sum(grad.to(tl.float32) * context.to(tl.float32), 1)
    rows = row + tl.arange(0, BLOCK)
    return query, grad, tl.load(log_sums + rows * n_heads, mask=rows < length, other=0.0), mean


@triton.jit
def score_gradients(query, grad, log_sum, mean, key, value, factors, column, length, scale):
    """Return the weights after dropout and the gradients of the scores, both [16, 16]."""
    weights = tl.exp(masked_scores(query, key, column, length, scale) - log_sum[:, None])
    grad_weights = product(grad, tl.trans(value)) * factors
    return weights * factors, weights * (grad_weights - mean[:, None]) * scale


@triton.jit
def backward_kernel(
    qkv, offsets, seed, context, log_sums, grads, grad_qkv, scale, P: constexpr, WIDTH: constexpr
):
    """Write the gradient of qkv [N, 3, H, K]: first each query's, then each key's and value's."""
    n_heads = tl.num_programs(1)
    size = n_heads * WIDTH
    start, length, head = place(offsets)
    first_query = start * n_heads + head
    queries = qkv + (start * 3 * n_heads + head) * WIDTH
    grad_queries = grad_qkv + (start * 3 * n_heads + head) * WIDTH
    context += first_query * WIDTH
    grads += first_query * WIDTH
    log_sums += first_query
    for row in range(0, length, BLOCK):
        side = query_side(queries, context, log_sums, grads, row, length, n_heads, WIDTH)
        grad_query = tl.zeros([BLOCK, WIDTH], tl.float32)
        for column in range(0, length, BLOCK):
            key = load_rows(queries + size, column, length, 3 * size, WIDTH)
            value = load_rows(queries + 2 * size, column, length, 3 * size, WIDTH)
            factors = dropout_factors(seed, first_query + row * n_heads, column, n_heads, P)
            _, grad = score_gradients(*side, key, value, factors, column, length, scale)
            grad_query += product(grad, key)
        store_rows(grad_queries, grad_query, row, length, 3 * size, WIDTH)
    for column in range(0, length, BLOCK):
        key = load_rows(queries + size, column, length, 3 * size, WIDTH)
        value = load_rows(queries + 2 * size, column, length, 3 * size, WIDTH)
        grad_key = tl.zeros([BLOCK, WIDTH], tl.float32)
        grad_value = tl.zeros([BLOCK, WIDTH], tl.float32)
        for row in range(0, length, BLOCK):
            side = query_side(queries, context, log_sums, grads, row, length, n_heads, WIDTH)
            factors = dropout_factors(seed, first_query + row * n_heads, column, n_heads, P)
            weights, grad = score_gradients(*side, key, value, factors, column, length, scale)
            grad_key += product(tl.trans(grad), side[0])
            grad_value += product(tl.trans(weights), side[1])
        store_rows(grad_queries + size, grad_key, column, length, 3 * size, WIDTH)
        store_rows(grad_queries + 2 * size, grad_value, column, length, 3 * size, WIDTH)


def takes(qkv: Tensor) -> bool:
    """Return whether the kernels take this type and this width of a head."""
    return qkv.dtype in (torch.bfloat16, torch.float16, torch.float32) and qkv.shape[-1] in (32, 64)


class ShortAttention(torch.autograd.Function):
    """Attention within sequences of at most `LONGEST` tokens, which may be empty: qkv [N, 3, H, K] and
    offsets [B + 1] to the context [N, H, K]. Nothing waits for the GPU, and the launch depends on B
    and H alone, so a CUDA graph can replay it with other lengths. No second derivative."""

    @staticmethod
    def forward(ctx, qkv: Tensor, offsets: Tensor, dropout: float) -> Tensor:
        qkv = qkv.contiguous()
        n_heads, width = qkv.shape[2:]
        # From the device's generator, so that each replay of a CUDA graph draws another one.
        seed = torch.randint(2**63 - 1, (1,), device=qkv.device) if dropout else None
        context = torch.empty_like(qkv[:, 0])
        log_sums = qkv.new_empty(context.shape[:2], dtype=torch.float32)
        ctx.grid, ctx.settings = (len(offsets) - 1, n_heads), (width**-0.5, dropout, width)
        forward_kernel[ctx.grid](qkv, offsets, seed, context, log_sums, *ctx.settings, **LAUNCH)
        ctx.save_for_backward(qkv, offsets, seed, context, log_sums)
        return context

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_context: Tensor) -> tuple[Tensor | None, ...]:
        grads = grad_context.contiguous(), torch.empty_like(ctx.saved_tensors[0])
        backward_kernel[ctx.grid](*ctx.saved_tensors, *grads, *ctx.settings, **LAUNCH)
        return grads[1], None, None
