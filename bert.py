"""BERT from scratch (Devlin et al. 2018, arXiv 1810.04805): post-layer-norm encoder and pooler.

Sequences are packed: the tokens of all sentences of a batch form one list without padding. So linear
layers multiply real tokens only. How attention keeps the sentences apart is in attention.py.

Axes:  N tokens of all sequences    B sequences    S tokens of one sequence
       D hidden size    H heads    K = D / H width of a head    I intermediate size
"""

import dataclasses
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from activations import ACTIVATION_FUNCTIONS
from attention import Sequences, attend, draw_kept
from base_bert import TAG_TABLES, BertConfig, BertPreTrainedModel
from tasks import Task


class Tokens(NamedTuple):
    """The input of the encoder: the tokens of all sequences, one sequence after the other."""

    input_ids: Tensor  # [N]
    position_ids: Tensor  # [N]
    sequences: Sequences
    token_type_ids: Tensor | None = None  # [N]; None: all 0
    tags: Tensor | None = None  # [2, N] part-of-speech and named-entity ids


class PackedBatch(NamedTuple):
    """A padded batch without its padding, shortest sequences first."""

    tokens: Tokens
    rows: Tensor  # [N] row of each token in the padded batch; its column is the position id
    places: Tensor  # [B] packed position of each row of the padded batch


def pack(
    input_ids: Tensor,
    attention_mask: Tensor,
    token_type_ids: Tensor | None = None,
    tags: Tensor | None = None,
) -> PackedBatch:
    """Take the padding out of a batch. `tags` are [2, B, S], all other arguments [B, S]; the mask is 1
    for real tokens. Raises ValueError for a row without a real token."""
    mask = attention_mask.bool()
    lengths = mask.sum(dim=1)
    if not lengths.all():
        raise ValueError(f"attention_mask has no real token in row {int(lengths.argmin())}")
    order = torch.argsort(lengths, stable=True)  # [B]
    packed_rows, columns = mask[order].nonzero(as_tuple=True)  # [N], [N]
    rows = order[packed_rows]
    tokens = Tokens(
        input_ids=input_ids[rows, columns],
        position_ids=columns,
        sequences=Sequences.of(lengths[order].tolist(), input_ids.device),
        token_type_ids=None if token_type_ids is None else token_type_ids[rows, columns],
        tags=None if tags is None else tags[:, rows, columns],
    )
    return PackedBatch(tokens, rows, places=torch.argsort(order))


class Dropout(nn.Module):
    """Dropout (Srivastava et al. 2014); adds the residual where one is given."""

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, states: Tensor, residual: Tensor | float = 0.0) -> Tensor:
        if states.device.type != "cpu":
            return residual + F.dropout(states, self.p, self.training)
        # With autocast, all stays in bfloat16, as a CPU's LayerNorm takes it.
        residual = torch.as_tensor(residual, dtype=states.dtype)
        if not (self.training and self.p):
            return states + residual
        kept, scale = draw_kept(states.numel(), self.p, states.dtype)
        return torch.addcmul(residual, states, kept.view_as(states), value=scale)


def set_dropout(model: nn.Module, p: float) -> None:
    """Set `hidden_dropout_prob` in all encoders of a model."""
    for module in model.modules():
        if isinstance(module, Dropout):
            module.p = p
        elif isinstance(module, BertPreTrainedModel):
            module.config = dataclasses.replace(module.config, hidden_dropout_prob=p)


class BertEmbeddings(nn.Module):
    """The normalised sum of word, position, token type and tag embeddings."""

    def __init__(self, config: BertConfig):
        super().__init__()
        size = config.hidden_size
        self.word_embeddings = nn.Embedding(config.vocab_size, size, config.pad_token_id)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, size)
        self.tagged = config.num_pos_tags > 0
        if self.tagged:  # id 0 is "no tag" and adds nothing
            self.pos_tag_embeddings = nn.Embedding(config.num_pos_tags, size, padding_idx=0)
            self.ner_tag_embeddings = nn.Embedding(config.num_ner_tags, size, padding_idx=0)
        self.LayerNorm = nn.LayerNorm(size, eps=config.layer_norm_eps)
        self.dropout = Dropout(config.hidden_dropout_prob)

    def forward(self, tokens: Tokens) -> Tensor:
        """Return [N, D]. Raises ValueError if tags are missing, or given without tables for them."""
        if self.tagged != (tokens.tags is not None):
            raise ValueError(f"this BERT {'needs' if self.tagged else 'has no embeddings of'} tags")
        token_type_ids = tokens.token_type_ids
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(tokens.input_ids)
        embeddings = self.word_embeddings(tokens.input_ids)
        embeddings = embeddings + self.position_embeddings(tokens.position_ids)
        embeddings = embeddings + self.token_type_embeddings(token_type_ids)
        if tokens.tags is not None:
            pos_ids, ner_ids = tokens.tags
            embeddings = embeddings + self.pos_tag_embeddings(pos_ids)
            embeddings = embeddings + self.ner_tag_embeddings(ner_ids)
        return self.dropout(self.LayerNorm(embeddings))


class BertSelfAttention(nn.Module):
    """Multi-head scaled dot-product self-attention within each sequence."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.config = config
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states: Tensor, sequences: Sequences) -> Tensor:
        # One matrix product for the three projections reads its input once.
        projections = (self.query, self.key, self.value)
        weight = torch.cat([linear.weight for linear in projections])  # [3 D, D]
        bias = torch.cat([linear.bias for linear in projections])
        qkv = F.linear(hidden_states, weight, bias)  # [N, 3 D]
        qkv = qkv.unflatten(1, (3, self.config.num_attention_heads, self.config.head_size))
        dropout = self.config.attention_probs_dropout_prob if self.training else 0.0
        return attend(qkv, sequences, dropout).flatten(1)  # [N, H, K] -> [N, D]


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
    """Linear layer and tanh on the first token of each sequence, [CLS]."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, first_tokens: Tensor) -> Tensor:
        return torch.tanh(self.dense(first_tokens))  # [B, D]


class EncoderWithHeads(nn.Module):
    """The type of the model, for files that multitask_classifier.py imports and that cannot import it."""

    bert: Any  # a BertModel, or a MixtureOfExperts, which has the same interface
    tasks: dict[str, Task]
    log_variances: nn.ParameterDict  # by task; empty without --loss_weights learned

    def head_outputs(self, batch: Any, second_derivative: bool = False) -> dict[str, list[Tensor]]:
        raise NotImplementedError

    def vectors(self, batch: Any, second_derivative: bool = False) -> Tensor:
        raise NotImplementedError


class BertModel(BertPreTrainedModel):
    """The encoder. Modules have the names of Hugging Face's BERT, so that its weights load unchanged.

    `encode` is the core and takes packed tokens; calling the model takes a padded batch.
    """

    def __init__(self, config: BertConfig):
        super().__init__(config)
        self.embeddings = BertEmbeddings(config)
        self.encoder = BertEncoder(config)
        self.pooler = BertPooler(config)
        self.init_weights()

    @property
    def stacks(self) -> list["BertModel"]:
        """The BERTs in this encoder: itself. A mixture of experts has several."""
        return [self]

    @property
    def new_parameters(self) -> list[nn.Parameter]:
        """The weights that a pretrained BERT does not bring: embeddings of tags."""
        tables = self.embeddings.named_parameters()
        return [parameter for name, parameter in tables if name in TAG_TABLES]

    def encode(self, tokens: Tokens) -> Tensor:
        """Return the hidden states [N, D] of the last layer for packed tokens."""
        return self.encoder(self.embeddings(tokens), tokens.sequences)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        token_type_ids: Tensor | None = None,
        tags: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Encode a padded batch. `tags` are [2, B, S], all other arguments [B, S].

        Returns:
            last_hidden_state: [B, S, D], zero at padded positions.
            pooler_output: [B, D], from the first real token of each sequence.
        """
        tokens, rows, places = pack(input_ids, attention_mask, token_type_ids, tags)
        hidden_states = self.encode(tokens)  # [N, D]
        padded = hidden_states.new_zeros(*input_ids.shape, hidden_states.shape[-1])  # [B, S, D]
        padded = padded.index_put((rows, tokens.position_ids), hidden_states)
        pooled = self.pooler(hidden_states[tokens.sequences.offsets[:-1]])  # [B, D], packed order
        return {"last_hidden_state": padded, "pooler_output": pooled[places]}
