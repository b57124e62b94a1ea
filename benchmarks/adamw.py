"""Time one optimizer step on MiniLM's parameters: ours, torch's foreach and torch's fused AdamW.

    python benchmarks/adamw.py

The three take turns in one run, so that the machine's noise affects all of them alike. As in training,
most rows of the word embeddings have no gradient, and many had none in any step. The limit is
the time to read parameters, gradients and moments once, and to write all of them but the gradients,
at the copy rate measured between the steps.
"""

import sys
from typing import Any

import torch
from measuring import ROOT, medians, new_parser, print_table, seconds

sys.path.insert(0, str(ROOT))

from base_bert import BertConfig
from bert import BertModel
from optimizer import AdamW
from utils import flush_denormals

MINILM = BertConfig(
    hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
)
SETTINGS: dict[str, Any] = dict(lr=1e-6, weight_decay=0.05)
CONTENDERS = {
    "this project": lambda params: AdamW(params, **SETTINGS),
    "torch, foreach": lambda params: torch.optim.AdamW(params, foreach=True, **SETTINGS),
    "torch, fused": lambda params: torch.optim.AdamW(params, fused=True, **SETTINGS),
}
TENSORS_MOVED = 7  # 4 are read, 3 written
# Shares of the word pieces: in 2,000 rows of each task of the real data, and in a step of 64.
SEEN, IN_STEP = 0.42, 0.05


def give_gradients(model: BertModel, share: float) -> None:
    """Set random gradients, for this share of the word pieces."""
    for param in model.parameters():
        param.grad = torch.randn_like(param) * 1e-3
    embeddings = model.embeddings.word_embeddings.weight
    embeddings.grad[round(share * len(embeddings)) :] = 0


def main() -> None:
    steps = new_parser(__doc__, steps=60).parse_args().steps
    flush_denormals()
    optimizers = {}
    for name, build in CONTENDERS.items():
        model = BertModel(MINILM)
        params = list(model.parameters())
        optimizers[name] = build(params)
        give_gradients(model, SEEN)
        optimizers[name].step()
        give_gradients(model, IN_STEP)
    n_bytes = sum(param.numel() * param.element_size() for param in params)
    source = torch.ones(n_bytes // 4)
    target = torch.empty_like(source)

    times: dict[str, list[float]] = {name: [] for name in (*optimizers, "copy")}
    for _ in range(steps):
        for name, optimizer in optimizers.items():
            times[name].append(seconds(optimizer.step))
        times["copy"].append(seconds(lambda: target.copy_(source)))
    median = medians(times, skipped=0)
    limit = median.pop("copy") / 2 * TENSORS_MOVED  # a copy moves two tensors

    print(f"{n_bytes / 4e6:.1f} million weights, {torch.get_num_threads()} threads, {steps} steps")
    others = [median["torch, foreach"], median["torch, fused"], limit]
    rows = [
        [name, f"{1e3 * mine:.1f}", *(f"{other / mine:.2f}" for other in others)]
        for name, mine in median.items()
    ]
    print_table(["AdamW", "median, ms", "foreach / this", "fused / this", "limit / this"], rows)


if __name__ == "__main__":
    main()
