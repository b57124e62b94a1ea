"""BERT from scratch (Devlin et al. 2018, arXiv 1810.04805): post-layer-norm encoder and pooler.

Sequences run packed: the tokens of all sentences of a batch stand one after the other in one list
without padding, so that linear layers multiply real tokens only, and attention takes neighbouring
sequences of equal length together (CPU) or sequences of any lengths in one kernel (CUDA).

Axes:  N tokens of all sequences    B sequences    S tokens of one sequence
       D hidden size    H heads    K = D / H width of a head    I intermediate size
"""

import itertools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from activations import ACTIVATION_FUNCTIONS
from base_bert import TAG_TABLES, BertConfig, BertPreTrainedModel


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


class PackedBatch(NamedTuple):
    """A padded batch without its padding, shortest sequences first."""

    input_ids: Tensor  # [N]
    position_ids: Tensor  # [N] the token's column in the padded batch
    token_type_ids: Tensor  # [N]
    tags: Tensor | None  # [2, N]
    rows: Tensor  # [N] the token's row in the padded batch
    sequences: Sequences
    places: Tensor  # [B] where each row of the padded batch stands in packed order


def pack(
    input_ids: Tensor,
    attention_mask: Tensor,
    token_type_ids: Tensor | None = None,
    tags: Tensor | None = None,
) -> PackedBatch:
    """Take the padding out of a batch; all arguments are [B, S], but `tags` [2, B, S]; 1 in the
    mask is a real token. A row without a single real token is a ValueError."""
    mask = attention_mask.bool()
    lengths = mask.sum(dim=1)
    if not lengths.all():
        raise ValueError(f"attention_mask has no real token in row {int(lengths.argmin())}")
    order = torch.argsort(lengths, stable=True)  # [B]
    packed_rows, columns = mask[order].nonzero(as_tuple=True)  # [N], [N]
    rows = order[packed_rows]
    if token_type_ids is None:
        token_type_ids = torch.zeros_like(input_ids)
    return PackedBatch(
        input_ids=input_ids[rows, columns],
        position_ids=columns,
        token_type_ids=token_type_ids[rows, columns],
        tags=None if tags is None else tags[:, rows, columns],
        rows=rows,
        sequences=Sequences.of(lengths[order].tolist(), input_ids.device),
        places=torch.argsort(order),
    )


def draw_kept(n: int, p: float, dtype: torch.dtype) -> tuple[Tensor, float]:
    """On the CPU: [n] ones, zeros with probability `p` (to the nearest 2^-16); one over the share
    of ones. `bernoulli_` draws a number an element, here one 64-bit number serves four."""
    dropped = min(round(p * 2**16), 2**16 - 1)
    bits = torch.empty(-(-n // 4), dtype=torch.int64).random_(-(2**63), None)
    kept = torch.empty(n, dtype=dtype)
    torch.ge(bits.view(torch.int16)[:n], dropped - 2**15, out=kept)
    return kept, 2**16 / (2**16 - dropped)


class Dropout(nn.Module):
    """Dropout (Srivastava et al. 2014), and the residual added where there is one."""

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, states: Tensor, residual: Tensor | float = 0.0) -> Tensor:
        if not (self.training and self.p and states.device.type == "cpu"):
            return residual + F.dropout(states, self.p, self.training)
        kept, scale = draw_kept(states.numel(), self.p, states.dtype)
        residual = torch.as_tensor(residual, dtype=states.dtype)
        return torch.addcmul(residual, states, kept.view_as(states), value=scale)


# Attention, four ways: qkv [N, 3, H, K] is queries, keys and values as one linear layer gives
# them, the result is the context [N, H, K].


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


class BertEmbeddings(nn.Module):
    """Sum of word, position, token type and tag embeddings, normalised."""

    def __init__(self, config: BertConfig):
        super().__init__()
        size = config.hidden_size
        self.word_embeddings = nn.Embedding(config.vocab_size, size, config.pad_token_id)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, size)
        self.tagged = config.num_pos_tags > 0
        if self.tagged:  # id 0, no tag, adds nothing
            self.pos_tag_embeddings = nn.Embedding(config.num_pos_tags, size, padding_idx=0)
            self.ner_tag_embeddings = nn.Embedding(config.num_ner_tags, size, padding_idx=0)
        self.LayerNorm = nn.LayerNorm(size, eps=config.layer_norm_eps)
        self.dropout = Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        token_type_ids: Tensor,
        tags: Tensor | None = None,
    ) -> Tensor:
        """[N, D]; `tags` [2, N] are part-of-speech and named-entity ids, all else [N]."""
        if self.tagged != (tags is not None):
            raise ValueError(f"this BERT {'needs' if self.tagged else 'has no embeddings of'} tags")
        embeddings = self.word_embeddings(input_ids) + self.position_embeddings(position_ids)
        embeddings = embeddings + self.token_type_embeddings(token_type_ids)
        if self.tagged:
            pos_ids, ner_ids = tags
            embeddings = embeddings + self.pos_tag_embeddings(pos_ids)
            embeddings = embeddings + self.ner_tag_embeddings(ner_ids)
        return self.dropout(self.LayerNorm(embeddings))


class BertSelfAttention(nn.Module):
    """Multi-head scaled dot-product attention of each sequence to itself."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.config = config
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states: Tensor, sequences: Sequences) -> Tensor:
        # One multiplication for the three: its input is read once.
        projections = (self.query, self.key, self.value)
        weight = torch.cat([linear.weight for linear in projections])  # [3 D, D]
        bias = torch.cat([linear.bias for linear in projections])
        qkv = F.linear(hidden_states, weight, bias)  # [N, 3 D]
        qkv = qkv.unflatten(1, (3, self.config.num_attention_heads, self.config.head_size))
        device = "any" if sequences.plain else qkv.device.type
        attention = ATTENTION.get(device, plain_attention)
        dropout = self.config.attention_probs_dropout_prob if self.training else 0.0
        return attention(qkv, sequences, dropout).flatten(1)  # [N, H, K] -> [N, D]


class BertOutput(nn.Module):
    """Linear layer, dropout, residual connection, layer norm."""

    def __init__(self, config: BertConfig, input_size: int):
        super().__init__()
        self.dense = nn.Linear(input_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(self.dropout(self.dense(hidden_states), residual))  # [N, D]


class BertAttention(nn.Module):
    def __init__(self, config: BertConfig):
        super().__init__()
        self.self = BertSelfAttention(config)
        self.output = BertOutput(config, config.hidden_size)

    def forward(self, hidden_states: Tensor, sequences: Sequences) -> Tensor:
        return self.output(self.self(hidden_states, sequences), hidden_states)  # [N, D]


class BertIntermediate(nn.Module):
    def __init__(self, config: BertConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = ACTIVATION_FUNCTIONS[config.hidden_act]

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.activation(self.dense(hidden_states))  # [N, D] -> [N, I]


class BertLayer(nn.Module):
    def __init__(self, config: BertConfig):
        super().__init__()
        self.attention = BertAttention(config)
        self.intermediate = BertIntermediate(config)
        self.output = BertOutput(config, config.intermediate_size)

    def forward(self, hidden_states: Tensor, sequences: Sequences) -> Tensor:
        attended = self.attention(hidden_states, sequences)  # [N, D]
        return self.output(self.intermediate(attended), attended)


class BertEncoder(nn.Module):
    def __init__(self, config: BertConfig):
        super().__init__()
        self.layer = nn.ModuleList(BertLayer(config) for _ in range(config.num_hidden_layers))

    def forward(self, hidden_states: Tensor, sequences: Sequences) -> Tensor:
        for layer in self.layer:
            hidden_states = layer(hidden_states, sequences)
        return hidden_states


class BertPooler(nn.Module):
    """Linear layer and tanh on each sequence's first token, [CLS]."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, first_tokens: Tensor) -> Tensor:
        return torch.tanh(self.dense(first_tokens))  # [B, D]


class BertModel(BertPreTrainedModel):
    """The encoder. Module names are Hugging Face's, so its weights load as they are.

    `encode` is the core, on packed tokens; calling the model is the padded form of the same.
    """

    def __init__(self, config: BertConfig):
        super().__init__(config)
        self.embeddings = BertEmbeddings(config)
        self.encoder = BertEncoder(config)
        self.pooler = BertPooler(config)
        self.init_weights()

    @property
    def stacks(self) -> list["BertModel"]:
        """The BERTs that this one consists of: itself. A mixture of experts has several."""
        return [self]

    @property
    def new_parameters(self) -> list[nn.Parameter]:
        """What no pretrained BERT brings: embeddings of tags."""
        tables = self.embeddings.named_parameters()
        return [parameter for name, parameter in tables if name in TAG_TABLES]

    def encode(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        sequences: Sequences,
        token_type_ids: Tensor | None = None,
        tags: Tensor | None = None,
    ) -> Tensor:
        """Hidden states [N, D] of the last layer; `tags` [2, N] (part-of-speech and named-entity
        ids) for a BERT with embeddings of them, the other arguments [N], packed."""
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(input_ids)
        embeddings = self.embeddings(input_ids, position_ids, token_type_ids, tags)
        return self.encoder(embeddings, sequences)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        token_type_ids: Tensor | None = None,
        tags: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Encode a padded batch; `tags` are [2, B, S], all other arguments [B, S].

        Returns:
            last_hidden_state: [B, S, D], zero at padded positions.
            pooler_output: [B, D], from each sequence's first real token.
        """
        packed = pack(input_ids, attention_mask, token_type_ids, tags)
        hidden_states = self.encode(
            packed.input_ids,
            packed.position_ids,
            packed.sequences,
            packed.token_type_ids,
            packed.tags,
        )
        padded = hidden_states.new_zeros(*input_ids.shape, hidden_states.shape[-1])  # [B, S, D]
        padded = padded.index_put((packed.rows, packed.position_ids), hidden_states)
        pooled = self.pooler(hidden_states[packed.sequences.offsets[:-1]])  # [B, D], packed order
        return {"last_hidden_state": padded, "pooler_output": pooled[packed.places]}
