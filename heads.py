"""Attention pooling and the heads: from hidden states to the answers of a task. `predict.py --export`
copies this file into the folder of an exported model. It imports nothing else of this project."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Task = Any  # a tasks.Task, or what config.json of an exported model says of it
Sequences = Any  # an attention.Sequences


def linear_before_relu(input_size: int, output_size: int) -> nn.Linear:
    """Make a linear layer that keeps the size of its signal through the ReLU after it (He et al. 2015,
    arXiv 1502.01852). With PyTorch's own initial weights, three such layers shrink the signal so much
    that sentiment hardly learns in the first epoch."""
    linear = nn.Linear(input_size, output_size)
    nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")
    nn.init.zeros_(linear.bias)
    return linear


class SequenceHead(nn.Module):
    """Logits of classes, or a number, for one sequence: a sentence, or both sentences of a pair. A number
    starts in the middle of its range."""

    def __init__(self, hidden_size: int, task: Task, n_hidden: int):
        super().__init__()
        sizes = [hidden_size] * n_hidden
        self.hidden = nn.ModuleList(linear_before_relu(hidden_size, size) for size in sizes)
        self.out = nn.Linear(hidden_size, task.num_classes or 1)
        if not task.classes:
            nn.init.constant_(self.out.bias, sum(task.range) / 2)

    def forward(self, vector: Tensor) -> Tensor:
        for linear in self.hidden:
            vector = F.relu(linear(vector))
        output = self.out(vector)
        return output if output.shape[1] > 1 else output.squeeze(1)  # [B, num_classes] or [B]


class PairHead(nn.Module):
    """Logits of the classes of a pair, from its projected sentences u and v.

    If their order does not count, it reads |u - v| and |u + v|, and swapping them changes nothing;
    else u, v, |u - v| and u * v (Reimers and Gurevych 2019, arXiv 1908.10084, with the product of
    Conneau et al. 2017, arXiv 1705.02364).
    """

    def __init__(self, hidden_size: int, task: Task):
        super().__init__()
        self.symmetric = task.symmetric
        self.project = nn.Linear(hidden_size, hidden_size)
        n_features = 2 if task.symmetric else 4
        self.hidden = nn.ModuleList(
            linear_before_relu(size, hidden_size)
            for size in (n_features * hidden_size, hidden_size)
        )
        self.out = nn.Linear(hidden_size, len(task.classes))

    def forward(self, vector_1: Tensor, vector_2: Tensor) -> Tensor:
        u, v = self.project(vector_1), self.project(vector_2)  # [B, D]
        parts = [(u - v).abs(), (u + v).abs()] if self.symmetric else [u, v, (u - v).abs(), u * v]
        features = torch.cat(parts, dim=-1)  # [B, 2 D] or [B, 4 D]
        for linear in self.hidden:
            features = F.relu(linear(features))
        return self.out(features)  # [B, num_classes]


class SimilarityHead(nn.Module):
    """A number for a pair: the cosine, on the scale of the labels (1 is the highest, 0 the lowest). It
    has no weights. Its output is not clamped: a clamp would stop the gradient."""

    def __init__(self, task: Task):
        super().__init__()
        self.low, self.high = task.range

    def forward(self, vector_1: Tensor, vector_2: Tensor) -> Tensor:
        cosine = F.cosine_similarity(vector_1.float(), vector_2.float())
        return self.low + (self.high - self.low) * cosine  # [B]


def new_head(task: Task, hidden_size: int) -> nn.Module:
    """Make the head of a task for sentences that the encoder reads one by one."""
    if not task.is_pair:
        return SequenceHead(hidden_size, task, n_hidden=3)
    return PairHead(hidden_size, task) if task.classes else SimilarityHead(task)


class AttentionLayer(nn.Module):
    """Attention pooling: a learned weighted sum of the hidden states of each sequence, with weights
    softmax(v tanh(W h)) over its tokens."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.W = nn.Linear(hidden_size, hidden_size)
        self.v = nn.Linear(hidden_size, 1, bias=False)

    def forward(self, hidden_states: Tensor, sequences: Sequences) -> Tensor:
        """Pool packed hidden states: [N, D] to [B, D]."""
        rows, weights = self.weigh(hidden_states, sequences)
        weighted = weights[:, None] * hidden_states  # [N, D]
        n_sequences = len(sequences.lengths)
        return weighted.new_zeros(n_sequences, weighted.shape[1]).index_add(0, rows, weighted)

    def weigh(self, hidden_states: Tensor, sequences: Sequences) -> tuple[Tensor, Tensor]:
        """Return for each token the number of its sequence [N] and its weight there [N]. The weights of
        a sequence sum to 1."""
        scores = self.v(torch.tanh(self.W(hidden_states))).float().squeeze(1)  # [N]
        n_sequences, longest = len(sequences.lengths), max(sequences.lengths)
        rows = torch.repeat_interleave(sequences.offsets.diff(), output_size=len(scores))  # [N]
        columns = torch.arange(len(scores), device=scores.device) - sequences.offsets[rows]
        padded = scores.new_full((n_sequences, longest), -torch.inf)
        padded = padded.index_put((rows, columns), scores)
        return rows, padded.softmax(dim=1)[rows, columns]
