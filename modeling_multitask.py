"""The whole model for `transformers`. `predict.py --export` copies this file and heads.py, which import
nothing else of this project, into the folder of an exported model."""

from collections.abc import Mapping
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, BertPreTrainedModel

from heads import AttentionLayer, SequenceHead, new_head


class PaddedPooling(AttentionLayer):
    """Attention pooling of padded hidden states."""

    def forward(self, hidden_states: Tensor, mask: Tensor) -> Tensor:
        """Pool padded hidden states: [B, S, D] and a mask [B, S] to [B, D]."""
        scores = self.v(torch.tanh(self.W(hidden_states))).float().squeeze(-1)  # [B, S]
        weights = scores.masked_fill(mask == 0, -torch.inf).softmax(dim=1)
        return (weights[..., None] * hidden_states).sum(dim=1)


class MultitaskBERT(BertPreTrainedModel):
    """One BERT, attention pooling, and the heads of all tasks in config.json."""

    def __init__(self, config: BertConfig):
        super().__init__(config)
        size, rows = config.hidden_size, config.multitask["tasks"]
        self.tasks = {name: SimpleNamespace(**row) for name, row in rows.items()}
        self.bert = BertModel(config)
        self.attention_layer = PaddedPooling(size)
        self.heads, self.joint_heads = nn.ModuleDict(), nn.ModuleDict()
        for name, task in self.tasks.items():
            if task.encoding != "cross":
                self.heads[name] = new_head(task, size)
            if task.encoding != "bi":
                self.joint_heads[name] = SequenceHead(size, task, n_hidden=1)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        token_type_ids: Tensor | None = None,
        second: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Return `sentence_embedding` [B, D] and the outputs of tasks by name: logits [B, classes] or
        numbers [B].

        Args:
            input_ids, attention_mask, token_type_ids: a tokenizer's output [B, S] for sentences, or for
                pairs in one sequence, which only tasks with the encoding "cross" answer.
            second: a tokenizer's output for the second sentences of pairs. All tasks answer: those for
                one sentence answer the first.
        """
        vectors = self.embed(input_ids, attention_mask, token_type_ids)
        if second is not None:
            first = {"input_ids": input_ids, "attention_mask": attention_mask}
            others = self.embed(second["input_ids"], second["attention_mask"])
            joined = join(first, second, self.config.multitask["max_length"])
            joint = self.embed(*joined) if self.joint_heads else None
            answers = self.answers(vectors, others, joint)
        elif token_type_ids is not None and bool(token_type_ids.any()):
            answers = self.answers(None, None, vectors)
        else:
            answers = self.answers(vectors, None, None)
        return {"sentence_embedding": vectors, **answers}

    def embed(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """Return one vector per sequence: [B, S] to [B, D]."""
        states = self.bert(input_ids, attention_mask, token_type_ids, position_ids)[0]
        return self.attention_layer(states, attention_mask)

    def answers(
        self, first: Tensor | None, second: Tensor | None, joint: Tensor | None
    ) -> dict[str, Tensor]:
        """Return the outputs of all tasks whose vectors [B, D] are there: of the first or only sentences,
        of the second ones, and of both in one sequence."""
        found = {}
        for name, task in self.tasks.items():
            separate = [first, second][: 1 + task.is_pair] if name in self.heads else []
            together = [joint] if name in self.joint_heads else []
            if any(vectors is None for vectors in separate + together):
                continue
            outputs = [self.heads[name](*separate)] if separate else []
            outputs += [self.joint_heads[name](*together)] if together else []
            if task.classes and len(outputs) == 2:
                outputs = [output.log_softmax(dim=-1) for output in outputs]
            found[name] = torch.stack(outputs).mean(dim=0)
        return found


def join(first: Mapping[str, Tensor], second: Mapping[str, Tensor], longest: int) -> list[Tensor]:
    """Put the two sentences of each row into one sequence of at most `longest` tokens: the longer
    sentence is cut, and its [SEP] kept.

    Returns:
        input_ids, attention_mask, token_type_ids and position_ids [B, S1 + S2].
    """
    ids = torch.cat([first["input_ids"], second["input_ids"]], dim=1)
    one, two = (batch["attention_mask"].sum(dim=1, keepdim=True) for batch in (first, second))
    room, n_one, n_two = longest - 3, one - 2, two - 2  # [B, 1], without [CLS] and [SEP]
    half = torch.where(n_one <= n_two, room // 2, room - room // 2)
    kept_one = torch.minimum(n_one, torch.maximum(half, room - n_two))
    kept_two = torch.minimum(n_two, room - kept_one)
    start, end = kept_one + 2, kept_one + kept_two + 3  # of the second sentence
    places = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    # The second sentence comes without its [CLS].
    source = torch.where(places < start, places, places - start + 1 + first["input_ids"].shape[1])
    source = torch.where(places == start - 1, one - 1, source)
    source = torch.where(places == end - 1, two - 1 + first["input_ids"].shape[1], source)
    mask = places < end
    ids = ids.gather(1, source * mask)
    return [ids, mask.long(), (mask & (places >= start)).long(), places.clamp(max=longest - 1)]
