"""BERT from scratch (Devlin et al. 2018, arXiv 1810.04805): post-layer-norm encoder and pooler.

Sequences run packed: the tokens of all sentences of a batch stand one after the other in one list
without padding, so that linear layers multiply real tokens only, and attention takes neighbouring
sequences of equal length together (CPU) or sequences of any lengths in one kernel (CUDA).

Axes:  N tokens of all sequences    B sequences    S tokens of one sequence
       D hidden size    H heads    K = D / H width of a head    I intermediate size
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention import ATTENTION, Sequences, draw_kept, plain_attention
from base_bert import TAG_TABLES, BertConfig, BertPreTrainedModel


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


GELU_BLOCK = (
    1 << 16
)  # elements of one pass of `gelu_curvature`: a few tensors of that stay in the cache


class Gelu(torch.autograd.Function):
    """x Phi(x) (Hendrycks & Gimpel 2016, arXiv 1606.08415). Value and gradient are `F.gelu`'s. The
    second derivative, for SophiaH, is written out: PyTorch's own makes so many passes over whole
    tensors that it takes a fifth of an estimate's time."""

    @staticmethod
    def forward(ctx, states: Tensor) -> Tensor:
        ctx.save_for_backward(states)
        return F.gelu(states)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return GeluGradient.apply(grad, *ctx.saved_tensors)


class GeluGradient(torch.autograd.Function):
    """grad * gelu'(states)"""

    @staticmethod
    def forward(ctx, grad: Tensor, states: Tensor) -> Tensor:
        ctx.save_for_backward(grad, states)
        return torch.ops.aten.gelu_backward(grad, states)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, vector: Tensor) -> tuple[Tensor, Tensor]:
        grad, states = ctx.saved_tensors
        by_grad = torch.ops.aten.gelu_backward(vector, states)
        return by_grad, gelu_curvature(vector * grad, states)


def gelu_curvature(factor: Tensor, states: Tensor) -> Tensor:
    """factor * gelu''(states), where gelu''(x) = (2 - x^2) exp(-x^2 / 2) / sqrt(2 pi)"""
    result = factor.flatten()
    for product, x in zip(result.split(GELU_BLOCK), states.flatten().split(GELU_BLOCK)):
        square = x * x
        product *= torch.exp(square * -0.5).mul_(square.sub_(2).mul_(-1 / math.sqrt(2 * math.pi)))
    return result.view(factor.shape)


ACTIVATION_FUNCTIONS = {
    "gelu": Gelu.apply,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}
