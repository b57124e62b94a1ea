"""Checkpoints of a tiny model whose answers differ from row to row."""

import numpy as np
import pytest
import torch

import multitask_classifier as mc
from batches import collate
from checkpoint import checkpoint_content, write_checkpoint
from datasets import load_data
from options import parse_options

KINDS = {
    "plain": [],
    "cut": ["--max_length", "9"],
    "cross": ["--para_encoding", "cross", "--sts_encoding", "cross", "--max_length", "40"],
    "both": ["--para_encoding", "cross", "--sts_encoding", "both"],
    "soft": ["--moe", "soft"],
    "hard": ["--moe", "hard"],
    "only sts": ["--sts"],
    "only para cross": ["--para", "--para_encoding", "cross", "--both_orders"],
    "orders": ["--para_encoding", "cross", "--sts_encoding", "both", "--both_orders"],
    "tags": ["--additional_input"],
}


@torch.no_grad()
def scatter(model, data):
    """Change the weights so that the answers differ much from row to row."""
    for name, parameter in model.named_parameters():
        if name.startswith("bert.") and parameter.dim() > 1:
            parameter.add_(0.6 * torch.randn_like(parameter))
    model.attention_layer.v.weight.mul_(5)
    rows = {name: (dataset, np.arange(len(dataset))) for name, dataset in data.items()}
    outputs = model.eval()(collate(rows))
    for name, output in outputs.items():
        if model.tasks[name].classes:
            head = (model.joint_heads if name in model.joint_heads else model.heads)[name]
            head.out.bias.sub_(output.mean(dim=0))


@pytest.fixture(name="make_checkpoint", scope="module")
def make_checkpoint_fixture(tmp_path_factory, tiny_directory, small_data, request):
    """(name of KINDS, another encoder than the tiny BERT) -> the path of a checkpoint"""
    folder, made = tmp_path_factory.mktemp("checkpoints"), {}

    def make(kind: str, encoder=tiny_directory):
        if (kind, encoder) not in made:
            flags = ["--bert_model", str(encoder), *KINDS[kind]]
            flags += ["--cache_dir", str(folder / "cache"), "--data_dir", str(small_data)]
            if kind == "tags":
                flags += ["--spacy_model", str(request.getfixturevalue("pipeline_directory"))]
            options = parse_options(flags)
            torch.manual_seed(4)
            model, tokenizer, tagger = load_pretrained(options)
            length = options.max_length or model.bert.config.max_position_embeddings
            data = load_data(options, tokenizer, length, ("dev",), tagger)
            scatter(model, data["dev"])
            scores = {"sst": {"accuracy": 0.4321}, "sts": {"pearson": 0.8765}}
            scores = {name: scores[name] for name in options.tasks if name in scores}
            content = checkpoint_content(model, tokenizer, options, 3, scores, tagger)
            path = folder / f"{encoder.name}-{kind.replace(' ', '-')}.pt"
            write_checkpoint(path, content)
            made[kind, encoder] = path
        return made[kind, encoder]

    return make


def load_pretrained(options):
    """Load the start of a new run: its model, tokenizer and tagger."""
    start, tokenizer, tagger = mc.load_start(options)
    return mc.new_model(start, options), tokenizer, tagger
