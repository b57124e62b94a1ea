"""A mixture of experts (Jacobs et al. 1991, "Adaptive mixtures of local experts"): several BERTs, and
one more, the gate, that weighs them for each sentence.

Soft gating: the hidden states of a sentence are those of all experts, weighted. Hard gating: they are
those of the expert with the largest weight, and only this expert reads the sentence. (In Fedus et al.
2021, arXiv 2101.03961, experts are feed-forward layers and read single tokens.)
"""

import argparse
import copy
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention import Sequences
from base_bert import BertConfig
from batches import Batch
from bert import BertModel, EncoderWithHeads, Tokens

N_EXPERTS = 3
GATINGS = ("soft", "hard")


class MixtureOfExperts(nn.Module):
    """Several BERTs with the interface of one `BertModel`.

    The pooled output of the gate goes through a linear layer and a softmax over the experts.
    """

    experts: Any  # an nn.ModuleList of BertModels
    weights: Tensor  # [B, E] of the experts, for the sequences of the last pass
    choice: Tensor  # [B] the expert with the largest weight

    def __init__(self, bert: BertModel, gating: str):
        """Start all experts and the gate as `bert`; only the layer that weighs them is new."""
        super().__init__()
        self.gating = gating
        self.experts = nn.ModuleList(copy.deepcopy(bert) for _ in range(N_EXPERTS))
        self.gate = bert
        self.route = nn.Linear(bert.config.hidden_size, N_EXPERTS)

    @property
    def config(self) -> BertConfig:
        return self.gate.config

    @property
    def stacks(self) -> list[BertModel]:
        """The BERTs in this encoder."""
        return [*self.experts, self.gate]

    @property
    def new_parameters(self) -> list[nn.Parameter]:
        """The weights that a pretrained BERT does not bring, or brings for another purpose."""
        tables = [table for stack in self.stacks for table in stack.new_parameters]
        return [*tables, *self.gate.pooler.parameters(), *self.route.parameters()]

    def encode(self, tokens: Tokens) -> Tensor:
        """Return hidden states [N, D], like `BertModel.encode`."""
        gate_states = self.gate.encode(tokens)
        pooled = self.gate.pooler(gate_states[tokens.sequences.offsets[:-1]])  # [B, D]
        # In bfloat16 many weights would be equal.
        with torch.autocast(pooled.device.type, enabled=False):
            self.weights = self.route(pooled.to(self.route.weight.dtype)).softmax(dim=-1)  # [B, E]
        self.choice = self.weights.argmax(dim=-1)  # [B]
        return self._mix(tokens) if self.gating == "soft" else self._choose(tokens)

    def _mix(self, tokens: Tokens) -> Tensor:
        weights = per_token(self.weights, tokens.sequences)  # [N, E]
        outputs = (expert.encode(tokens) for expert in self.experts)  # [N, D] each
        pairs = zip(weights.split(1, dim=1), outputs, strict=True)
        return sum((weight.to(output.dtype) * output for weight, output in pairs), torch.zeros(()))

    def _choose(self, tokens: Tokens) -> Tensor:
        sequences = tokens.sequences
        weight = self.weights.gather(1, self.choice[:, None]).squeeze(1)  # [B]
        # The host needs the lengths of the sequences that each expert reads.
        choice = self.choice.cpu().numpy()
        token_choice = np.repeat(choice, sequences.lengths)  # [N]
        outputs, places = [], []
        for number in np.unique(choice):
            place = torch.from_numpy(np.flatnonzero(token_choice == number)).to(weight.device)
            lengths = np.array(sequences.lengths)[choice == number].tolist()
            outputs.append(self.experts[number].encode(take(tokens, place, lengths)))
            places.append(place)
        order = torch.cat(places).argsort()
        states = torch.cat(outputs)[order]  # [N, D]
        # The factor is 1, but it has a gradient: without it the gate would not learn, since the
        # other experts have computed nothing.
        scale = per_token(weight / weight.detach(), sequences)
        return states * scale[:, None].to(states.dtype)

    def pooler(self, first_tokens: Tensor) -> Tensor:
        """Pool the first tokens [B, D] of the sequences of the last pass with all experts, weighted; with
        hard gating, with the chosen one."""
        is_hard = self.gating == "hard"
        weights = F.one_hot(self.choice, N_EXPERTS) if is_hard else self.weights  # [B, E]
        outputs = torch.stack([expert.pooler(first_tokens) for expert in self.experts], dim=1)
        return (weights[:, :, None].to(outputs.dtype) * outputs).sum(dim=1)  # [B, D]

    forward = BertModel.forward

    def balance_loss(self) -> Tensor:
        """Return E sum_e f_e P_e, where f_e is the share of the last pass's sequences that give expert e
        the largest weight, and P_e is its mean weight (Fedus et al. 2021, equation 4). It is 1 if both
        are even, and at most E."""
        shares = F.one_hot(self.choice, N_EXPERTS).float().mean(0)
        return N_EXPERTS * (shares * self.weights.mean(0)).sum()


def with_experts(bert: BertModel, gating: str | None) -> BertModel | MixtureOfExperts:
    """Return the encoder of `--moe`: a mixture of experts that start as `bert`, or `bert` itself."""
    return MixtureOfExperts(bert, gating) if gating else bert


def take(tokens: Tokens, place: Tensor, lengths: list[int]) -> Tokens:
    """Take the tokens at `place` [n], which form sequences of these lengths."""
    sequences = Sequences.of(lengths, place.device, tokens.sequences.second_derivative)
    rest = (t if t is None else t[..., place] for t in (tokens.token_type_ids, tokens.tags))
    return Tokens(tokens.input_ids[place], tokens.position_ids[place], sequences, *rest)


def per_token(values: Tensor, sequences: Sequences) -> Tensor:
    """Repeat the value of each sequence [B, ...] for its tokens [N, ...]."""
    n_tokens = sum(sequences.lengths)
    return values.repeat_interleave(sequences.offsets.diff(), dim=0, output_size=n_tokens)


def expert_tags(options: argparse.Namespace) -> list[str]:
    """Return the names under which a mixture of experts is logged: its balance, and for each task and
    expert the share of the task's sentences that give this expert the largest weight."""
    experts = range(1, N_EXPERTS + 1)
    return ["balance", *(f"moe/{name}_expert_{e}" for name in options.tasks for e in experts)]


def add_routing(
    losses: dict[str, Tensor], model: EncoderWithHeads, batch: Batch, options: argparse.Namespace
) -> Tensor:
    """Add to `losses` how the gate spread the sentences of the batch. Return the weighted loss for an
    uneven spread."""
    n_sequences = {
        name: rows * model.tasks[name].sequences_per_row(twice=options.rdrop[name] > 0)
        for name, rows in batch.step_rows.items()
    }
    choice = F.one_hot(model.bert.choice, N_EXPERTS).float()[batch.places]
    for name, columns in batch.columns.items():
        shares = torch.cat([choice[column] for column in columns]).sum(0) / n_sequences[name]
        for number, share in enumerate(shares, start=1):
            losses[f"moe/{name}_expert_{number}"] += share
    balance = model.bert.balance_loss() * (len(batch.lengths) / sum(n_sequences.values()))
    losses["balance"] += balance.detach()
    losses["sum"] += options.moe_balance * balance.detach()
    return options.moe_balance * balance
