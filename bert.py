"""BERT from scratch (Devlin et al. 2018, arXiv 1810.04805): post-layer-norm encoder and pooler.

Sequences run packed: the tokens of all sentences of a batch stand one after the other in one list
without padding, so that linear layers multiply real tokens only, and attention takes neighbouring
sequences of equal length together.

Axes:  N tokens of all sequences    B sequences    S tokens of one sequence
       D hidden size    H heads    K = D / H width of a head    I intermediate size
"""

import itertools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from base_bert import BertConfig, BertPreTrainedModel

ACTIVATION_FUNCTIONS = {
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


def equal_length_runs(lengths: list[int]) -> list[tuple[int, int]]:
    """`(count, length)` for each run of neighbours of equal length: [3, 3, 5] -> [(2, 3), (1, 5)].

    Sorted lengths give the fewest runs; any order is right.
    """
    return [(len(list(run)), length) for length, run in itertools.groupby(lengths)]


class PackedSequences(NamedTuple):
    """A padded batch without its padding, shortest sequences first."""

    input_ids: Tensor  # [N]
    position_ids: Tensor  # [N] the token's column in the padded batch
    token_type_ids: Tensor  # [N]
    rows: Tensor  # [N] the token's row in the padded batch
    lengths: list[int]  # of the B sequences, in packed order
    places: Tensor  # [B] where each row of the padded batch stands in packed order


def pack(
    input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
) -> PackedSequences:
    """Take the padding out of a batch; all arguments are [B, S], 1 in the mask is a real token.

    Raises:
        ValueError: a row without a single real token.
    """
    mask = attention_mask.bool()
    lengths = mask.sum(dim=1)
    if not lengths.all():
        row = int(lengths.argmin())
        raise ValueError(f"attention_mask has no real token in row {row}")
    order = torch.argsort(lengths, stable=True)  # [B]
    packed_rows, columns = mask[order].nonzero(as_tuple=True)  # [N], [N]
    rows = order[packed_rows]
    if token_type_ids is None:
        token_type_ids = torch.zeros_like(input_ids)
    return PackedSequences(
        input_ids=input_ids[rows, columns],
        position_ids=columns,
        token_type_ids=token_type_ids[rows, columns],
        rows=rows,
        lengths=lengths[order].tolist(),
        places=torch.argsort(order),
    )


class BertEmbeddings(nn.Module):
    """Sum of word, position and token type embeddings, normalised."""

    def __init__(self, config: BertConfig):
        super().__init__()
        size = config.hidden_size
        padding = config.pad_token_id
        self.word_embeddings = nn.Embedding(config.vocab_size, size, padding_idx=padding)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, size)
        self.LayerNorm = nn.LayerNorm(size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, input_ids: Tensor, position_ids: Tensor, token_type_ids: Tensor) -> Tensor:
        embeddings = self.word_embeddings(input_ids)  # [N, D]
        embeddings = embeddings + self.position_embeddings(position_ids)
        embeddings = embeddings + self.token_type_embeddings(token_type_ids)
        return self.dropout(self.LayerNorm(embeddings))


class BertSelfAttention(nn.Module):
    """Multi-head scaled dot-product attention of each sequence to itself."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.config = config
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states: Tensor, lengths: list[int]) -> Tensor:
        # One multiplication for the three: its input is read once.
        projections = (self.query, self.key, self.value)
        weight = torch.cat([linear.weight for linear in projections])  # [3 D, D]
        bias = torch.cat([linear.bias for linear in projections])
        qkv = F.linear(hidden_states, weight, bias)  # [N, 3 D]

        runs = equal_length_runs(lengths)
        run_sizes = [count * length for count, length in runs]
        contexts = [self.attend(*run) for run in zip(qkv.split(run_sizes), runs)]
        return torch.cat(contexts)  # [N, D]

    def attend(self, qkv: Tensor, run: tuple[int, int]) -> Tensor:
        count, length = run
        heads = (3, self.config.num_attention_heads, self.config.head_size)
        qkv = qkv.view(count, length, *heads)  # [B, S, 3, H, K]
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # 3 x [B, H, S, K]
        dropout = self.config.attention_probs_dropout_prob if self.training else 0.0
        context = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)
        return context.transpose(1, 2).reshape(count * length, -1)  # [B, H, S, K] -> [B S, D]


class BertOutput(nn.Module):
    """Linear layer, dropout, residual connection, layer norm."""

    def __init__(self, config: BertConfig, input_size: int):
        super().__init__()
        self.dense = nn.Linear(input_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(self.dropout(self.dense(hidden_states)) + residual)  # [N, D]


class BertAttention(nn.Module):
    def __init__(self, config: BertConfig):
        super().__init__()
        self.self = BertSelfAttention(config)
        self.output = BertOutput(config, config.hidden_size)

    def forward(self, hidden_states: Tensor, lengths: list[int]) -> Tensor:
        return self.output(self.self(hidden_states, lengths), hidden_states)


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

    def forward(self, hidden_states: Tensor, lengths: list[int]) -> Tensor:
        attended = self.attention(hidden_states, lengths)  # [N, D]
        return self.output(self.intermediate(attended), attended)


class BertEncoder(nn.Module):
    def __init__(self, config: BertConfig):
        super().__init__()
        self.layer = nn.ModuleList(BertLayer(config) for _ in range(config.num_hidden_layers))

    def forward(self, hidden_states: Tensor, lengths: list[int]) -> Tensor:
        for layer in self.layer:
            hidden_states = layer(hidden_states, lengths)
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

    def encode(
        self,
        input_ids: Tensor,
        lengths: list[int],
        position_ids: Tensor,
        token_type_ids: Tensor | None = None,
    ) -> Tensor:
        """Hidden states [N, D] of the last layer for packed sequences.

        Args:
            input_ids, position_ids, token_type_ids: [N], sequence after sequence.
            lengths: number of tokens of each sequence, N in all; best sorted.
        """
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(input_ids)
        embeddings = self.embeddings(input_ids, position_ids, token_type_ids)
        return self.encoder(embeddings, lengths)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Encode a padded batch; all arguments are [B, S].

        Returns:
            last_hidden_state: [B, S, D], zero at padded positions.
            pooler_output: [B, D], from each sequence's first real token.
        """
        packed = pack(input_ids, attention_mask, token_type_ids)
        hidden_states = self.encode(
            packed.input_ids, packed.lengths, packed.position_ids, packed.token_type_ids
        )
        padded = hidden_states.new_zeros(*input_ids.shape, hidden_states.shape[-1])  # [B, S, D]
        padded = padded.index_put((packed.rows, packed.position_ids), hidden_states)
        ends = torch.tensor(packed.lengths, device=input_ids.device).cumsum(0)
        starts = torch.cat([ends.new_zeros(1), ends[:-1]])[packed.places]  # [B]
        pooled = self.pooler(hidden_states[starts])
        return {"last_hidden_state": padded, "pooler_output": pooled}
