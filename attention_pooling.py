"""Attention pooling for sentence-transformers. `predict.py --export` copies this file into the folder of
an exported model. It imports nothing else of this project."""

from typing import Any

import torch
from sentence_transformers.base.modules import Module
from torch import nn


class AttentionPooling(Module):
    """A learned weighted sum of each sentence's token vectors: softmax(v tanh(W h)) over tokens."""

    config_keys = ["hidden_size"]

    def __init__(self, hidden_size: int):
        super().__init__()
        self.hidden_size = hidden_size
        self.W = nn.Linear(hidden_size, hidden_size)
        self.v = nn.Linear(hidden_size, 1, bias=False)

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Add `sentence_embedding` [B, D], from `token_embeddings` [B, S, D] and `attention_mask`
        [B, S]."""
        hidden_states, mask = features["token_embeddings"], features["attention_mask"]
        scores = self.v(torch.tanh(self.W(hidden_states))).float().squeeze(-1)  # [B, S]
        weights = scores.masked_fill(mask == 0, -torch.inf).softmax(dim=1)
        pooled = (weights[..., None] * hidden_states).sum(dim=1)  # [B, D]
        return features | {"sentence_embedding": pooled}

    def get_embedding_dimension(self) -> int:
        return self.hidden_size

    def save(
        self, output_path: str, *args: Any, safe_serialization: bool = True, **kwargs: Any
    ) -> None:
        self.save_config(output_path)
        self.save_torch_weights(output_path, safe_serialization=safe_serialization)

    @classmethod
    def load(
        cls,
        model_name_or_path: str,
        subfolder: str = "",
        token: bool | str | None = None,
        cache_folder: str | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        *args: Any,
        **kwargs: Any,
    ) -> "AttentionPooling":
        source = model_name_or_path, subfolder, token, cache_folder, revision, local_files_only
        return cls.load_torch_weights(*source, model=super().load(*source))
