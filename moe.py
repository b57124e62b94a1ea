"""A mixture of experts (Jacobs et al. 1991, "Adaptive mixtures of local experts"): several BERTs, and
one more, the gate, that weighs them for each sentence.

Soft: a sentence's hidden states are those of all experts, weighted. Hard: they are those of the expert
with the largest weight, and only that one reads the sentence (as in Fedus et al. 2021, arXiv
2101.03961, where experts are feed-forward layers and read single tokens).
"""

import argparse
import copy

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention import Sequences
from base_bert import BertConfig
from batches import Batch
from bert import BertModel
from tasks import sequences_per_row

N_EXPERTS = 3
GATINGS = ("soft", "hard")


class MixtureOfExperts(nn.Module):
    """From outside a `BertModel`.

    The gate's pooled output goes through a linear layer and a softmax over the experts.
    """

    def __init__(self, config: BertConfig, gating: str):
        super().__init__()
        self.config, self.gating = config, gating
        self.experts = nn.ModuleList(BertModel(config) for _ in range(N_EXPERTS))
        self.gate = BertModel(config)
        self.route = nn.Linear(config.hidden_size, N_EXPERTS)
        # For the sequences of the last pass: the experts' weights [B, E], and the largest one [B].
        self.weights = self.choice = None

    @classmethod
    def of(cls, bert: BertModel, gating: str) -> "MixtureOfExperts":
        """All experts and the gate begin as `bert`; the layer that weighs them is new."""
        with torch.device("meta"):  # no time for weights to be replaced
            mixture = cls(bert.config, gating)
        mixture.experts = nn.ModuleList(copy.deepcopy(bert) for _ in range(N_EXPERTS))
        mixture.gate = bert
        mixture.route = nn.Linear(bert.config.hidden_size, N_EXPERTS)
        return mixture

    @property
    def stacks(self) -> list[BertModel]:
        return [*self.experts, self.gate]

    @property
    def new_parameters(self) -> list[nn.Parameter]:
        tables = [table for stack in self.stacks for table in stack.new_parameters]
        return [*tables, *self.gate.pooler.parameters(), *self.route.parameters()]

    def encode(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        sequences: Sequences,
        token_type_ids: Tensor | None = None,
        tags: Tensor | None = None,
    ) -> Tensor:
        """Hidden states [N, D], as `BertModel.encode`."""
        tokens = input_ids, position_ids, token_type_ids, tags
        gate_states = encode_with(self.gate, sequences, tokens)
        pooled = self.gate.pooler(gate_states[sequences.offsets[:-1]])  # [B, D]
        with torch.autocast(pooled.device.type, enabled=False):  # in bfloat16 many would be equal
            self.weights = self.route(pooled.to(self.route.weight.dtype)).softmax(dim=-1)  # [B, E]
        self.choice = self.weights.argmax(dim=-1)  # [B]
        mix = self._mix_softly if self.gating == "soft" else self._choose
        return mix(sequences, tokens)

    def _mix_softly(self, sequences: Sequences, tokens: tuple) -> Tensor:
        weights = per_token(self.weights, sequences)  # [N, E]
        states = 0.0
        for number, expert in enumerate(self.experts):
            output = encode_with(expert, sequences, tokens)  # [N, D]
            states = states + weights[:, number, None].to(output.dtype) * output
        return states

    def _choose(self, sequences: Sequences, tokens: tuple) -> Tensor:
        weight = self.weights.gather(1, self.choice[:, None]).squeeze(1)  # [B]
        choice = (
            self.choice.cpu().numpy()
        )  # lengths of what each expert reads are needed on the host
        of_tokens = np.repeat(choice, sequences.lengths)  # [N]
        device, outputs, places = weight.device, [], []
        for number in np.unique(choice):
            place = torch.from_numpy(np.flatnonzero(of_tokens == number)).to(device)
            lengths = np.array(sequences.lengths)[choice == number].tolist()
            part = Sequences.of(lengths, device, sequences.plain)
            mine = tuple(each if each is None else each[..., place] for each in tokens)
            outputs.append(encode_with(self.experts[number], part, mine))
            places.append(place)
        order = torch.cat(places).argsort()
        states = torch.cat(outputs)[order]  # [N, D]
        # 1, but with a gradient for the gate, though the other experts have computed nothing.
        scale = per_token(weight / weight.detach(), sequences)
        return states * scale[:, None].to(states.dtype)

    def pooler(self, first_tokens: Tensor) -> Tensor:
        """The experts' poolers on the first tokens [B, D] of the sequences of the last pass, weighted;
        with hard gating, the chosen one's."""
        weights = self.weights
        if self.gating == "hard":
            weights = nn.functional.one_hot(self.choice, N_EXPERTS)
        outputs = torch.stack([expert.pooler(first_tokens) for expert in self.experts], dim=1)
        return (weights[:, :, None].to(outputs.dtype) * outputs).sum(dim=1)  # [B, D]

    forward = BertModel.forward

    def balance_loss(self) -> Tensor:
        """E sum_e f_e P_e, where f_e is the share of the last pass's sequences for which expert e has
        the largest weight and P_e its mean weight: 1 if both are even, up to E (Fedus et al. 2021,
        equation 4)."""
        shares = nn.functional.one_hot(self.choice, N_EXPERTS).float().mean(0)
        return N_EXPERTS * (shares * self.weights.mean(0)).sum()


def encode_with(bert: BertModel, sequences: Sequences, tokens: tuple) -> Tensor:
    input_ids, position_ids, token_type_ids, tags = tokens
    return bert.encode(input_ids, position_ids, sequences, token_type_ids, tags)


def per_token(values: Tensor, sequences: Sequences) -> Tensor:
    """Each sequence's values [B, ...] for each of its tokens [N, ...]."""
    n_tokens = sum(sequences.lengths)
    return values.repeat_interleave(sequences.offsets.diff(), dim=0, output_size=n_tokens)


def expert_tags(options: argparse.Namespace) -> list[str]:
    """What is logged of a mixture of experts: its balance, and for each task and expert, to how many
    of the task's sentences the gate gives that expert the largest weight."""
    experts = range(1, N_EXPERTS + 1)
    return ["balance", *(f"moe/{name}_expert_{e}" for name in options.tasks for e in experts)]


def add_routing(
    losses: dict[str, Tensor], model: nn.Module, batch: Batch, options: argparse.Namespace
) -> Tensor:
    """Note how the gate has spread the batch's sentences; the loss for an uneven spread."""
    n_sequences = {
        name: rows * sequences_per_row(name, model.encodings, options.rdrop)
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
