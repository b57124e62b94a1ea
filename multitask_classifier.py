"""Fine-tune one BERT on sentiment (SST), paraphrase (Quora) and similarity (STS) at once.

python -u multitask_classifier.py --use_gpu
"""

import os
import signal

if __name__ == "__main__":  # before PyTorch is imported
    # Ctrl-C during the seconds that the import takes: just end.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    # OpenMP's threads wait for each other in a loop; GNU's would loop so long that two runs on the
    # same cores stop each other almost wholly. This costs one run alone a few per cent.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    if os.environ.get("RANK", "0") != "0":  # the first process of a data-parallel run has the bars
        os.environ["TQDM_DISABLE"] = "1"

import argparse
import contextlib
import dataclasses
import functools
import gc
import itertools
import math
import platform
import secrets
import subprocess
import sys
import textwrap
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import evaluation
from base_bert import BertConfig
from bert import BertModel, Sequences, pack
from datasets import (
    MAX_SIMILARITY,
    PAIR_TASKS,
    SPLITS,
    TASKS,
    Batch,
    EpochSampler,
    Task,
    TaskDataset,
    collate,
    joint_lengths,
    overlap,
    training_windows,
)
from moe import N_EXPERTS, MixtureOfExperts
from optimizer import AdamW, Sophia, SophiaG, SophiaH
from options import (
    DEFAULT_SPACY_MODEL,
    PLATEAU_FACTOR,
    PLATEAU_PATIENCE,
    ROOT,
    SMOKETEST_ROWS,
    build_parser,
    parse_options,
)
from profiler import StepProfiler
from tagging import Pipeline, Tagger
from tokenizer import BertTokenizer
from utils import (
    Terminated,
    UserError,
    agree,
    atomic_write,
    autocast,
    by_first,
    check_writable,
    copy_from_first,
    exit_status,
    gather,
    hold,
    join_processes,
    keep_freed_memory,
    leave_processes,
    load_torch_file,
    n_processes,
    one_first_on_each_node,
    one_line,
    pick_device,
    random_states,
    rank,
    restore_random_states,
    seed_everything,
    seeded_generator,
    sum_over_processes,
    terminate,
    uninterrupted,
)

CHECKPOINT_FORMAT = 2
SOPHIA_BETAS = {"sophiah": (0.985, 0.99), "sophiag": (0.965, 0.99)}
# Optimizer steps between two writes to TensorBoard: each one waits for the GPU. A prime, so that
# what is looked at is now sooner, now later after an estimate of the Hessian.
LOG_EVERY = 7
PROJECTED_ROWS = (
    256  # sentences in TensorBoard's projector; each one's vector is some kilobytes of text
)
STILL_GOING = "is the state of a run that is still going"

# ------------------------------------------------------------------------------------------ model


class AttentionLayer(nn.Module):
    """A learned weighted sum of each sequence's hidden states: softmax(v tanh(W h)) over tokens."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.W = nn.Linear(hidden_size, hidden_size)
        self.v = nn.Linear(hidden_size, 1, bias=False)

    def forward(self, hidden_states: Tensor, sequences: Sequences) -> Tensor:
        """[N, D] packed hidden states to [B, D]."""
        rows, weights = self.weigh(hidden_states, sequences)
        weighted = weights[:, None] * hidden_states  # [N, D]
        n_sequences = len(sequences.lengths)
        return weighted.new_zeros(n_sequences, weighted.shape[1]).index_add(0, rows, weighted)

    def weigh(self, hidden_states: Tensor, sequences: Sequences) -> tuple[Tensor, Tensor]:
        """For each token the number of its sequence [N] and its weight there [N]; a sequence's weights
        sum to 1."""
        scores = self.v(torch.tanh(self.W(hidden_states))).float().squeeze(1)  # [N]
        n_sequences, longest = len(sequences.lengths), max(sequences.lengths)
        rows = torch.repeat_interleave(sequences.offsets.diff(), output_size=len(scores))  # [N]
        columns = torch.arange(len(scores), device=scores.device) - sequences.offsets[rows]
        padded = scores.new_full((n_sequences, longest), -torch.inf)
        padded = padded.index_put((rows, columns), scores)
        return rows, padded.softmax(dim=1)[rows, columns]


def linear_before_relu(input_size: int, output_size: int) -> nn.Linear:
    """A linear layer that keeps the size of its signal through the ReLU behind it (He et al. 2015,
    arXiv 1502.01852). With PyTorch's own initial weights, three such layers shrink it so much that
    sentiment hardly learns in the first epoch."""
    linear = nn.Linear(input_size, output_size)
    nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")
    nn.init.zeros_(linear.bias)
    return linear


class SentimentHead(nn.Module):
    def __init__(self, hidden_size: int, num_classes: int):
        super().__init__()
        self.hidden = nn.ModuleList(linear_before_relu(hidden_size, hidden_size) for _ in range(3))
        self.out = nn.Linear(hidden_size, num_classes)

    def forward(self, vector: Tensor) -> Tensor:
        for linear in self.hidden:
            vector = F.relu(linear(vector))
        return self.out(vector)  # [B, num_classes]


class ParaphraseHead(nn.Module):
    """The same projection of both sentences, then |u - v| and |u + v|: swapping them changes
    nothing."""

    def __init__(self, hidden_size: int, num_classes: int):
        super().__init__()
        self.project = nn.Linear(hidden_size, hidden_size)
        self.hidden = nn.ModuleList(
            linear_before_relu(size, hidden_size) for size in (2 * hidden_size, hidden_size)
        )
        self.out = nn.Linear(hidden_size, num_classes)

    def forward(self, vector_1: Tensor, vector_2: Tensor) -> Tensor:
        u, v = self.project(vector_1), self.project(vector_2)  # [B, D]
        features = torch.cat([(u - v).abs(), (u + v).abs()], dim=-1)  # [B, 2 D]
        for linear in self.hidden:
            features = F.relu(linear(features))
        return self.out(features)  # [B, num_classes]


class SimilarityHead(nn.Module):
    """Five times the cosine: no weights, and no clamp either, which would stop the gradient."""

    def forward(self, vector_1: Tensor, vector_2: Tensor) -> Tensor:
        return MAX_SIMILARITY * F.cosine_similarity(vector_1.float(), vector_2.float())  # [B]


class JointHead(nn.Module):
    """For two sentences that the encoder has read as one sequence: logits, or without classes a
    similarity, which begins in the middle of its scale."""

    def __init__(self, hidden_size: int, num_classes: int | None):
        super().__init__()
        self.hidden = linear_before_relu(hidden_size, hidden_size)
        self.out = nn.Linear(hidden_size, num_classes or 1)
        if num_classes is None:
            nn.init.constant_(self.out.bias, MAX_SIMILARITY / 2)

    def forward(self, vector: Tensor) -> Tensor:
        output = self.out(F.relu(self.hidden(vector)))
        return output if output.shape[1] > 1 else output.squeeze(1)  # [B, num_classes] or [B]


class MultitaskBERT(nn.Module):
    """One BERT, attention pooling, three heads. Heads are named like the rows of TASKS.

    Args:
        encodings: pair task -> one of PAIR_ENCODINGS; "bi" where nothing is said. "both" answers
            with both, one head each.
    """

    def __init__(self, bert: BertModel | MixtureOfExperts, encodings: dict[str, str] | None = None):
        super().__init__()
        size = bert.config.hidden_size
        self.bert = bert
        for stack in bert.stacks:  # no head reads them; kept so that each BERT is whole
            stack.pooler.requires_grad_(False)
        self.attention_layer = AttentionLayer(size)
        self.encodings = {name: "bi" for name in TASKS} | (encodings or {})
        heads = {
            "sst": SentimentHead(size, TASKS["sst"].num_classes),
            "para": ParaphraseHead(size, TASKS["para"].num_classes),
            "sts": SimilarityHead(),
        }
        heads = {name: head for name, head in heads.items() if self.encodings[name] != "cross"}
        joint = [name for name, encoding in self.encodings.items() if encoding != "bi"]
        self.heads = nn.ModuleDict(heads)
        self.joint_heads = nn.ModuleDict(
            {name: JointHead(size, TASKS[name].num_classes) for name in joint}
        )

    def forward(self, batch: Batch, second_derivative: bool = False) -> dict[str, Tensor]:
        """Each task's outputs (logits [B, classes] or similarities [B]) for its rows; see
        `answers`."""
        answers = self.answers(batch, second_derivative)
        return {name: combine(TASKS[name], outputs) for name, outputs in answers.items()}

    def answers(self, batch: Batch, second_derivative: bool = False) -> dict[str, list[Tensor]]:
        """The outputs of each task's heads, one after the other, and all again if its columns stand
        twice in the batch: one pass through the encoder for all sequences of all tasks. With
        `second_derivative` it is slower, and the outputs can be differentiated twice."""
        vectors = self.vectors(batch, second_derivative)
        return {
            name: self._answers(name, [vectors[column] for column in columns])
            for name, columns in batch.columns.items()
        }

    def vectors(self, batch: Batch, second_derivative: bool = False) -> Tensor:
        """One vector per sequence [B, D], in the order of the batch's columns."""
        sequences = Sequences.of(batch.lengths, batch.input_ids.device, second_derivative)
        tokens = batch.input_ids, batch.position_ids, sequences, batch.token_type_ids, batch.tags
        return self._embed(*tokens)[batch.places]

    def token_weights(self, batch: Batch) -> list[Tensor]:
        """How much each token counts in its sequence's vector: [n_tokens] for each sequence, in the
        order of the batch's columns."""
        sequences = Sequences.of(batch.lengths, batch.input_ids.device)
        tokens = batch.input_ids, batch.position_ids, sequences, batch.token_type_ids, batch.tags
        _, weights = self.attention_layer.weigh(self.bert.encode(*tokens), sequences)
        by_length = weights.split(batch.lengths)
        return [by_length[place] for place in batch.places.tolist()]

    def _answers(self, name: str, vectors: list[Tensor]) -> list[Tensor]:
        outputs, vectors = [], iter(vectors)
        for vector in vectors:
            if name in self.heads:
                pair = len(TASKS[name].sentence_columns) == 2
                outputs.append(self.heads[name](*([vector, next(vectors)] if pair else [vector])))
                if name not in self.joint_heads:
                    continue
                vector = next(vectors)
            outputs.append(self.joint_heads[name](vector))
        return outputs

    def embed(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        tags: Tensor | None = None,
        token_type_ids: Tensor | None = None,
    ) -> Tensor:
        """One vector per sequence: padded [B, S] (and `tags` [2, B, S] where the encoder has
        embeddings of them) to [B, D]."""
        packed = pack(input_ids, attention_mask, token_type_ids, tags)
        tokens = packed.input_ids, packed.position_ids, packed.sequences
        return self._embed(*tokens, packed.token_type_ids, packed.tags)[packed.places]

    def _embed(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        sequences: Sequences,
        token_type_ids: Tensor | None,
        tags: Tensor | None,
    ) -> Tensor:
        hidden_states = self.bert.encode(input_ids, position_ids, sequences, token_type_ids, tags)
        return self.attention_layer(hidden_states, sequences)  # [B, D]

    def predict_sentiment(
        self, input_ids: Tensor, attention_mask: Tensor, tags: Tensor | None = None
    ) -> Tensor:
        """Logits [B, 5] of the classes 0 (negative) to 4 (positive)."""
        return self.heads["sst"](self.embed(input_ids, attention_mask, tags))

    def predict_paraphrase(
        self,
        input_ids_1: Tensor,
        mask_1: Tensor,
        input_ids_2: Tensor,
        mask_2: Tensor,
        tags_1: Tensor | None = None,
        tags_2: Tensor | None = None,
    ) -> Tensor:
        """Logits [B, 2]: no paraphrase, paraphrase."""
        pair = (input_ids_1, mask_1, tags_1), (input_ids_2, mask_2, tags_2)
        return self._predict_pair("para", *pair)

    def predict_similarity(
        self,
        input_ids_1: Tensor,
        mask_1: Tensor,
        input_ids_2: Tensor,
        mask_2: Tensor,
        tags_1: Tensor | None = None,
        tags_2: Tensor | None = None,
    ) -> Tensor:
        """Similarities [B]; clamp to 0..5 to show or score them (a cosine alone gives -5 to 5)."""
        pair = (input_ids_1, mask_1, tags_1), (input_ids_2, mask_2, tags_2)
        return self._predict_pair("sts", *pair)

    def _predict_pair(self, name: str, first: tuple, second: tuple) -> Tensor:
        vectors = []
        if name in self.heads:
            vectors += [self.embed(*first), self.embed(*second)]
        if name in self.joint_heads:
            longest = self.bert.config.max_position_embeddings
            vectors.append(self.embed(*join(first, second, longest)))
        return combine(TASKS[name], self._answers(name, vectors))


def combine(task: Task, outputs: list[Tensor]) -> Tensor:
    """One answer from those of several heads: the mean of log-probabilities, or of similarities."""
    if len(outputs) == 1:
        return outputs[0]
    if task.num_classes:
        outputs = [output.float().log_softmax(dim=-1) for output in outputs]
    return sum(outputs) / len(outputs)


def join(first: tuple, second: tuple, longest: int) -> tuple:
    """Padded sentences (input_ids [B, S], attention_mask [B, S], tags [2, B, S] or None) and others to
    the same with both in one sequence, and token_type_ids [B, S]."""
    rows = []
    for row in range(len(first[0])):
        parts = []
        for ids, mask, tags in (first, second):
            pieces = ids[None] if tags is None else torch.cat([ids[None], tags])
            parts.append(pieces[:, row, mask[row].bool()])  # [1 or 3, n]
        one, two = parts[0], parts[1][:, 1:]
        n_one, n_two = joint_lengths(one.shape[1], two.shape[1], longest)
        cut = [one[:, : n_one - 1], one[:, -1:], two[:, : n_two - 1], two[:, -1:]]
        types = (torch.arange(n_one + n_two, device=one.device) >= n_one).long()
        rows.append(torch.cat([torch.cat(cut, dim=1), types[None], torch.ones_like(types)[None]]).T)
    ids, *tags, types, mask = nn.utils.rnn.pad_sequence(rows, batch_first=True).movedim(-1, 0)
    return ids, mask, torch.stack(tags) if tags else None, types


def freeze_and_unfreeze(model: MultitaskBERT, option: str, interval: int, epoch: int) -> None:
    """Set which weights train in this epoch (counted from 0); the heads always do.

    `pretrain`: nothing of the encoder. `finetune`: all of it, or with an unfreezing interval one
    more layer every `interval` epochs from the top, and the embeddings after the last layer; but what
    is new in it like the heads (embeddings of tags, what weighs experts), always.
    """
    n_layers = model.bert.config.num_hidden_layers
    if option == "pretrain":
        trained = 0
    elif interval:
        trained = epoch // interval
    else:
        trained = n_layers + 1
    for stack in model.bert.stacks:
        for depth, layer in enumerate(reversed(stack.encoder.layer)):
            layer.requires_grad_(depth < trained)
        stack.embeddings.requires_grad_(trained > n_layers)
    for parameter in model.bert.new_parameters:
        parameter.requires_grad_(option == "finetune")


# --------------------------------------------------------------------------------------- optimizer


def build_optimizer(model: MultitaskBERT, options: argparse.Namespace) -> torch.optim.Optimizer:
    """The optimizer over all weights that may ever train: encoder with and without weight decay
    (biases and LayerNorm go without), and heads, likewise; with `--layer_lr_decay`, each layer of the
    encoder by itself."""
    groups = defaultdict(list)
    poolers = {each for stack in model.bert.stacks for each in stack.pooler.parameters()}
    unused = poolers - set(model.bert.new_parameters)
    depths = layers_below_heads(model)
    for name, parameter in model.named_parameters():
        encoder = name.startswith("bert.")
        if parameter in unused or (encoder and options.option == "pretrain"):
            continue
        lr = options.lr * options.layer_lr_decay ** depths.get(parameter, 0)
        groups["encoder" if encoder else "heads", lr, parameter.ndim > 1].append(parameter)

    grouped = [parameter for parameters in groups.values() for parameter in parameters]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(set(grouped)) == len(grouped) and set(trained) <= set(grouped)
    settings = []
    for (part, lr, decays), parameters in groups.items():
        count = sum(parameter.numel() for parameter in parameters)
        decay = options.weight_decay if decays else 0.0
        rate = f", rate {lr:.3g}" * (options.layer_lr_decay != 1)
        print(f"{part}: {len(parameters)} tensors, {count:,} weights, weight decay {decay:g}{rate}")
        settings.append({"params": parameters, "weight_decay": decay, "lr": lr})
    if options.optimizer == "adamw":
        return AdamW(settings, lr=options.lr)
    sophia = dict(lr=options.lr, rho=options.rho, betas=SOPHIA_BETAS[options.optimizer])
    if options.optimizer == "sophiah":
        sophia["update_period"] = options.hess_interval
        return SophiaH(settings, **sophia, all_reduce=sum_over_processes)
    return SophiaG(settings, **sophia)


def layers_below_heads(model: MultitaskBERT) -> dict[nn.Parameter, int]:
    """How many layers lie between a pretrained weight of the encoder and the heads, its own counted."""
    depths = {}
    for stack in model.bert.stacks:
        parts = [*reversed(stack.encoder.layer), stack.embeddings]
        for depth, part in enumerate(parts, start=1):
            depths |= dict.fromkeys(part.parameters(), depth)
    return {
        each: depth for each, depth in depths.items() if each not in set(model.bert.new_parameters)
    }


def build_scheduler(optimizer: torch.optim.Optimizer, options: argparse.Namespace):
    """`plateau` steps on the mean dev score, `linear` and `cosine` on each optimizer step; None for
    `none`."""
    if options.scheduler == "plateau":
        return torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizer, mode="max", factor=PLATEAU_FACTOR, patience=PLATEAU_PATIENCE
        )
    if options.scheduler not in EACH_STEP:
        return None
    window = options.batch_size * options.grad_accumulation
    steps = options.epochs * math.ceil(options.samples_per_epoch / window)
    warm_up = round(options.warmup * steps)
    fall = EACH_STEP[options.scheduler]

    def factor(step: int) -> float:
        """Of the rate, for the step of this number, from 0; it rises from the first one on."""
        if step < warm_up:
            return (step + 1) / (warm_up + 1)
        return fall((step - warm_up) / max(steps - warm_up, 1))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


# How the rate falls, from 1 to 0, over the share of the steps after the warm-up that are over.
EACH_STEP = {
    "linear": lambda over: 1 - over,
    "cosine": lambda over: (1 + math.cos(math.pi * over)) / 2,
}


# -------------------------------------------------------------------------------------- checkpoint


def checkpoint_content(
    model: MultitaskBERT,
    tokenizer: BertTokenizer,
    options: argparse.Namespace,
    epoch: int,
    scores: dict[str, dict[str, float]],
    tagger: Tagger | None = None,
) -> dict:
    """All that a later load needs. `epoch` counts those that are over, `scores` are on dev."""
    return {
        "format": CHECKPOINT_FORMAT,
        "model": model.state_dict(),
        "bert_config": dataclasses.asdict(model.bert.config),
        "tokenizer": tokenizer.to_json(),
        "tags": tagger.pipeline.to_dict() if tagger else None,
        "options": vars(options),
        "epoch": epoch,
        "dev_scores": scores,
        "versions": current_versions(),
    }


def write_checkpoint(path: Path, content: dict) -> None:
    """Atomically, by the first process. UserError: it cannot be written, and what was there is
    still there."""
    if rank():
        return
    try:
        with atomic_write(path) as temporary:
            torch.save(content, temporary)
    except RuntimeError as error:  # what PyTorch's writer makes of a full disk
        raise UserError(f"cannot write {path}: {one_line(error)}") from error


def read_checkpoint(path: str | Path) -> dict:
    """What `write_checkpoint` wrote, of a format that this version reads; else UserError."""
    checkpoint = load_torch_file(path)
    if not isinstance(checkpoint, dict) or "format" not in checkpoint:
        raise UserError(
            f"{path}: not a checkpoint of multitask_classifier.py; "
            "give a models/RUN.pt that a run has written"
        )
    if checkpoint["format"] != CHECKPOINT_FORMAT:
        raise UserError(
            f"{path}: has checkpoint format {checkpoint['format']!r}, this version reads format "
            f"{CHECKPOINT_FORMAT}; use the version of this project that wrote it"
        )
    return checkpoint


def encodings_of(options: dict) -> dict[str, str]:
    """Pair task -> encoding, of a run's options; those of older runs say nothing."""
    return {name: options.get(f"{name}_encoding", "bi") for name in PAIR_TASKS}


def encoder_like(config: BertConfig, gating: str | None) -> BertModel | MixtureOfExperts:
    """An encoder without trained weights; with a gating, a mixture of experts."""
    return MixtureOfExperts(config, gating) if gating else BertModel(config)


def model_of(checkpoint: dict, path: str | Path) -> tuple[MultitaskBERT, BertTokenizer]:
    """The model (on the CPU) and its tokenizer; UserError if `path` held no whole one."""
    try:
        config = BertConfig(**checkpoint["bert_config"])
        with torch.device("meta"):  # no time for weights to be replaced
            encoder = encoder_like(config, checkpoint["options"].get("moe"))
            model = MultitaskBERT(encoder, encodings_of(checkpoint["options"]))
        model.load_state_dict(checkpoint["model"], assign=True)
        tokenizer = BertTokenizer.from_json(checkpoint["tokenizer"])
        check_tags(checkpoint, config)
        checkpoint["epoch"], checkpoint["options"]["tasks"], checkpoint["options"]["max_length"]
    except Exception as error:  # whatever a missing or damaged entry makes of these lines
        raise UserError(f"{path}: a damaged checkpoint ({one_line(error)})") from error
    return model, tokenizer


def check_tags(checkpoint: dict, config: BertConfig) -> None:
    """ValueError unless a checkpoint's pipeline has as many labels as its model has embeddings."""
    tags, sizes = checkpoint.get("tags"), (config.num_pos_tags, config.num_ner_tags)
    if tags is None and sizes == (0, 0):
        return
    strings = [tags["name"], tags["version"], tags["digest"], *tags["pos_labels"]]
    strings += tags["ner_labels"]
    fits = (len(tags["pos_labels"]), len(tags["ner_labels"])) == sizes
    spacy_model = checkpoint["options"]["spacy_model"]
    if not fits or not all(isinstance(each, str) for each in (*strings, spacy_model)):
        raise ValueError("its tags are not those of its model")


def tagger_like(tags: dict | None, path: str | Path, options) -> Tagger | None:
    """What tags sentences for a model that was trained with these tags; UserError if the pipeline
    that `--spacy_model` names is another one."""
    if tags is None:
        if options.additional_input or options.spacy_model:
            flags = "--additional_input and --spacy_model"
            raise UserError(f"{path}: was trained without tags; leave {flags} out")
        return None
    wanted = f"{tags['name']} {tags['version']} ({tags['digest'][:8]})"
    try:
        pipeline = Pipeline.find(options.spacy_model or DEFAULT_SPACY_MODEL)
    except UserError as error:
        raise UserError(
            f"{path}: was trained with tags of {wanted}; name it with --spacy_model ({error})"
        ) from error
    if pipeline.to_dict() != tags:
        raise UserError(
            f"{path}: was trained with tags of {wanted}, not of {pipeline}; "
            "name that one with --spacy_model"
        )
    return Tagger(pipeline, options.cache_dir)


def load_checkpoint(path: str | Path) -> tuple[MultitaskBERT, BertTokenizer, dict]:
    """The model (on the CPU), its tokenizer, and all else that a checkpoint holds.

    UserError says why a file is of no use.
    """
    checkpoint = read_checkpoint(path)
    if checkpoint.get("training") == "finished":
        model = Path(path).with_suffix(".pt")
        raise UserError(f"{path}: only says that this run is finished; its model is {model}")
    return *model_of(checkpoint, path), checkpoint


@functools.cache
def current_versions() -> dict[str, str]:
    """Of Python, PyTorch and this project (its commit, `+` for uncommitted changes)."""

    def git(*arguments):
        command = ("git", "-C", str(ROOT), *arguments)
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git(
            "status", "--porcelain", "--untracked-files=no", ".", ":!results"
        )  # made by runs
        commit = git("rev-parse", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        commit = "not in a git checkout"
    return {"python": platform.python_version(), "torch": str(torch.__version__), "commit": commit}


# ---------------------------------------------------------------------------------------- training


def one_vs_all(logits: Tensor, labels: Tensor) -> Tensor:
    """For each class, the binary cross entropy of the answer whether it is this one; summed over the
    classes [B, C], averaged over rows."""
    truth = F.one_hot(labels, logits.shape[1]).to(logits.dtype)
    each = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    return each.sum(dim=1).mean()


def ordinal(logits: Tensor, labels: Tensor) -> Tensor:
    """For each border between neighbouring classes, the binary cross entropy of the answer whether
    the class lies above it, by the softmax; summed over the borders, averaged over rows."""
    log_probs, borders = logits.log_softmax(dim=1), range(1, logits.shape[1])
    below = torch.stack([log_probs[:, :k].logsumexp(dim=1) for k in borders], dim=1)  # [B, C - 1]
    above = torch.stack([log_probs[:, k:].logsumexp(dim=1) for k in borders], dim=1)
    is_above = labels[:, None] >= torch.tensor(borders, device=labels.device)
    return -torch.where(is_above, above, below).sum(dim=1).mean()


SST_TERMS = {"one_vs_all": one_vs_all, "ordinal": ordinal}


def label_loss(task: Task, output: Tensor, labels: Tensor, options: argparse.Namespace) -> Tensor:
    """The mean loss of one head's output [B, ...] with `--label_smoothing` and `--sst_loss`."""
    if not task.num_classes:
        return task.loss(output, labels)
    loss = F.cross_entropy(output, labels, label_smoothing=options.label_smoothing)
    if task.name == "sst" and options.sst_loss in SST_TERMS:
        loss = loss + SST_TERMS[options.sst_loss](output, labels)
    return loss


def disagreement(task: Task, one: Tensor, two: Tensor) -> Tensor:
    """The mean of both Kullback-Leibler divergences of two passes' logits [B, C]; of similarities [B]
    the squared difference."""
    if not task.num_classes:
        return F.mse_loss(one, two)
    logs = one.log_softmax(dim=1), two.log_softmax(dim=1)
    both = [F.kl_div(*pair, reduction="batchmean", log_target=True) for pair in (logs, logs[::-1])]
    return sum(both) / 2


def task_loss(
    task: Task, outputs: list[Tensor], labels: Tensor, options: argparse.Namespace
) -> Tensor:
    """The mean loss of all heads and passes; with `--rdrop` plus half of its weight times the passes'
    disagreement (Liang et al. 2021, "R-Drop", arXiv 2106.14448, equation 4 divided by 2)."""
    loss = sum(label_loss(task, output, labels, options) for output in outputs) / len(outputs)
    weight = dict(zip(TASKS, options.rdrop))[task.name]
    if weight:
        n_heads = len(outputs) // 2
        pairs = zip(outputs[:n_heads], outputs[n_heads:])
        loss = loss + weight / 2 * sum(disagreement(task, *pair) for pair in pairs) / n_heads
    return loss


class NotFinite(ArithmeticError):
    """A step's loss or gradient is infinite or not a number."""


def training_step(
    model: MultitaskBERT,
    window: list[Batch],
    optimizer: torch.optim.Optimizer,
    options: argparse.Namespace,
) -> tuple[dict[str, Tensor], list[tuple[str, Tensor, Tensor]]]:
    """One optimizer step on the summed losses of all tasks, over the batches of one window, of
    which each process of a data-parallel run has its share.

    Returns:
        each task's mean loss over all rows of the step and their weighted sum (scalar tensors, on
        the device), and (task, labels, decoded outputs) of each batch of this process.

    Raises:
        NotFinite: the step was not taken, and the weights are as they were.
    """
    device = next(model.parameters()).device
    weights = dict(zip(TASKS, options.loss_weights, strict=True))
    window = [batch.to(device) for batch in window]
    with_graph = isinstance(optimizer, SophiaH) and optimizer.refreshes
    if with_graph:
        optimizer.generator = seeded_generator(device, options.seed, optimizer.n_steps)
    if isinstance(optimizer, SophiaG) and optimizer.n_steps % options.hess_interval == 0:
        seed = options.seed, optimizer.n_steps
        gauss_newton_gradients(model, window, weights, seed, options.precision)
        optimizer.update_hessian()
        optimizer.zero_grad(set_to_none=True)
    losses = {name: torch.zeros((), device=device) for name in (*options.tasks, "sum")}
    if options.moe:
        losses |= {name: torch.zeros((), device=device) for name in expert_tags(options)}
    answers = []
    for batch in window:
        with autocast(device, options.precision):
            outputs = model.answers(batch, second_derivative=with_graph)
        total = 0.0
        for name, task_outputs in outputs.items():
            task, labels = TASKS[name], batch.labels[name]
            task_outputs = [output.float() for output in task_outputs]
            # The share of all rows of the step, so that the batches of all processes make one.
            share = len(labels) / batch.step_rows[name]
            loss = task_loss(task, task_outputs, labels, options) * share
            total = total + weights[name] * loss
            losses[name] += loss.detach()
            losses["sum"] += weights[name] * loss.detach()
            combined = combine(task, [output.detach() for output in task_outputs])
            answers.append((name, labels, task.decode(combined)))
        if options.moe:
            total = total + add_routing(losses, model, batch, options)
        if with_graph:
            backward_with_graph(total, model)
        else:
            total.backward()
    sum_gradients(model, list(losses.values()))
    trained = [parameter for parameter in model.parameters() if parameter.grad is not None]
    norm = nn.utils.get_total_norm([parameter.grad for parameter in trained])
    finite = bool((norm + losses["sum"]).isfinite())  # on a GPU: waits for the step
    if finite:
        if options.clip:
            nn.utils.clip_grads_with_norm_(trained, options.clip, norm)
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if not finite:
        raise NotFinite(f"loss {float(losses['sum']):g}, norm of the gradients {float(norm):g}")
    return losses, answers


def expert_tags(options: argparse.Namespace) -> list[str]:
    """What is logged of a mixture of experts: its balance, and for each task and expert, to how many
    of the task's sentences the gate gives that expert the largest weight."""
    experts = range(1, N_EXPERTS + 1)
    return ["balance", *(f"moe/{name}_expert_{e}" for name in options.tasks for e in experts)]


def add_routing(
    losses: dict[str, Tensor], model: MultitaskBERT, batch: Batch, options: argparse.Namespace
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


def sequences_per_row(name: str, encodings: dict[str, str], rdrop: tuple[float, ...]) -> int:
    """What one row of a task gives the encoder to read."""
    n_columns = len(TASKS[name].sentence_columns)
    joint = {"bi": n_columns, "cross": 1, "both": n_columns + 1}[encodings[name]]
    return joint * (2 if dict(zip(TASKS, rdrop))[name] else 1)


def sum_gradients(model: nn.Module, values: list[Tensor]) -> None:
    """Sum `.grad` and `values` over all processes. Where `.grad` has a graph (which makes the hooks
    of PyTorch's DistributedDataParallel useless), the graph stays this process's own."""
    if n_processes() == 1:
        return
    params = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # A process may have no row of a task, and no process may have one of a task that is left out.
    used = torch.tensor([param.grad is not None for param in params], dtype=torch.float32)
    used = used.to(params[0].device)
    for param in params:
        param.grad = torch.zeros_like(param) if param.grad is None else param.grad
    sum_over_processes([param.grad for param in params] + values + [used])
    for param, by_any in zip(params, used.tolist()):
        param.grad = param.grad if by_any else None


def backward_with_graph(loss: Tensor, model: nn.Module) -> None:
    """Add the gradients of `loss`, with their graph, to `.grad`. `loss.backward` would do the same
    and warn of the reference cycle, which SophiaH breaks."""
    params = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(loss, params, create_graph=True, allow_unused=True)
    for param, gradient in zip(params, gradients):
        if gradient is not None:
            param.grad = gradient if param.grad is None else param.grad + gradient


def gauss_newton_gradients(
    model: MultitaskBERT,
    window: list[Batch],
    weights: dict[str, float],
    seed: tuple[int, ...],
    precision: str = "auto",
) -> None:
    """Put into `.grad` the gradient whose square `SophiaG.update_hessian` wants for all tasks at
    once: of each task's mean loss over the step's rows, for labels drawn from the model's own
    outputs, times the root of its rows and of its weight. The same `seed` draws the same labels,
    however the rows are divided among processes. It is the curvature of the plain losses: terms that
    `--sst_loss`, `--label_smoothing` and `--rdrop` add are no likelihoods to draw labels from."""
    device = next(model.parameters()).device
    for batch in window:
        with autocast(device, precision):
            answers = model.answers(batch)
        total = 0.0
        for name, outputs in answers.items():
            task, n_rows = TASKS[name], batch.step_rows[name]
            for number, output in enumerate(map(Tensor.float, outputs)):  # each for itself
                noise = step_noise(batch, name, (*seed, number) if number else seed)
                labels = task.draw(output.detach(), noise.to(device))
                loss = task.loss(output, labels) * (len(labels) / n_rows)
                total = total + (weights[name] * n_rows / len(outputs)) ** 0.5 * loss
        total.backward()
    sum_gradients(model, [])


def step_noise(batch: Batch, name: str, seed: tuple[int, ...]) -> Tensor:
    """N(0, 1) for this batch's rows of a task, [n_rows, width of the outputs], of what is drawn for
    all rows of the step."""
    generator = seeded_generator(torch.device("cpu"), *seed, list(TASKS).index(name))
    noise = torch.randn(batch.step_rows[name], TASKS[name].num_classes or 1, generator=generator)
    return noise[batch.picks[name]]


def train_scores(answers: list[tuple[str, Tensor, Tensor]]) -> dict[str, dict[str, float]]:
    """Of the answers of all processes."""
    answers = [each for some in gather(answers_by_task(answers)) for each in answers_from(some)]
    by_task = defaultdict(list)
    for name, labels, predictions in answers:
        by_task[name].append(torch.stack([labels.float(), predictions.float()]).cpu())
    scores = {}
    for name, pairs in by_task.items():
        labels, predictions = torch.cat(pairs, dim=1).double().numpy()
        scores[name] = evaluation.score(TASKS[name], labels, predictions)
    return scores


class NoWriter:
    """A SummaryWriter that writes nothing."""

    def __getattr__(self, name: str):
        return self

    def __call__(self, *_, **__):
        return self


class RunLog:
    """TensorBoard's side of a run. Losses stay on the device until `flush`. Of the processes of a
    data-parallel run, only the first one writes."""

    def __init__(self, directory: Path, state: dict | None = None):
        from torch.utils.tensorboard import SummaryWriter  # a second to import

        self.directory, self.broken = directory, False
        # What a killed run wrote after its last saved state is hidden.
        purge = state and min([step for step, _ in state["waiting"]] + [state["n_steps"] + 1])
        self.writer = NoWriter() if rank() else SummaryWriter(str(directory), purge_step=purge)
        state = state or dict(n_steps=0, waiting=[], clipped=[])
        self.n_steps = state["n_steps"]
        self.waiting = list(state["waiting"])  # (step, tag -> value), not written yet
        self.clipped = list(state["clipped"])  # Sophia's shares of clipped coordinates, this epoch

    def state(self) -> dict:
        with self._going_on():
            self.writer.flush()
        directory = str(self.directory)
        return dict(
            directory=directory, n_steps=self.n_steps, waiting=self.waiting, clipped=self.clipped
        )

    def step(self, losses: dict[str, Tensor], optimizer: torch.optim.Optimizer, bar: tqdm) -> None:
        self.n_steps += 1
        values = {n if "/" in n else f"loss/{n}": loss for n, loss in losses.items()}
        values["lr"] = max(group["lr"] for group in optimizer.param_groups)  # the heads'
        self.waiting.append((self.n_steps, values))
        if len(self.waiting) == LOG_EVERY:
            self.flush(optimizer, bar)

    def flush(self, optimizer: torch.optim.Optimizer, bar: tqdm) -> None:
        if self.waiting and isinstance(optimizer, Sophia):
            statistics = {f"sophia/{key}": each for key, each in optimizer.statistics().items()}
            self.waiting[-1][1].update(statistics)
        for step, values in self.waiting:
            values = {tag: float(value) for tag, value in values.items()}
            with self._going_on():
                for tag, value in values.items():
                    self.writer.add_scalar(tag, value, step)
            losses = {t.removeprefix("loss/"): v for t, v in values.items() if t.startswith("loss")}
            bar.set_postfix({name: f"{loss:.3f}" for name, loss in losses.items()}, refresh=False)
            self.clipped += [v for tag, v in values.items() if tag == "sophia/clipped"]
        self.waiting.clear()

    def curvature(self, optimizer: Sophia) -> str:
        """What to know of an epoch with Sophia, in one line; starts the next epoch's account."""
        share = f"{sum(self.clipped) / len(self.clipped):.3f}" if self.clipped else "not looked at"
        self.clipped.clear()
        return (
            f"clipped share of coordinates {share}, "
            f"{optimizer.skipped_refreshes} estimates skipped so far"
        )

    def epoch(
        self,
        epoch: int,
        train: dict[str, dict[str, float]],
        dev: dict[str, evaluation.Evaluation],
        mean: float,
    ) -> None:
        with self._going_on():
            dev_scores = {name: each.scores for name, each in dev.items()}
            for split, scores in {"train": train, "dev": dev_scores}.items():
                for name, metrics in scores.items():
                    for metric, value in metrics.items():
                        self.writer.add_scalar(f"{split}/{name}_{metric}", value, epoch)
            self.writer.add_scalar("dev/mean", mean, epoch)
            if "sst" in dev:
                figure = evaluation.confusion_figure(dev["sst"])
                self.writer.add_figure("dev/sst_confusion", figure, epoch)
                del figure
                gc.collect()  # a figure is full of reference cycles, which would lie about for epochs

    def hyper_parameters(self, options: argparse.Namespace, scores: dict[str, dict]) -> None:
        from torch.utils.tensorboard.summary import hparams

        simple = (bool, int, float, str)
        values = {
            key: value if isinstance(value, simple) else str(value)
            for key, value in decisive(vars(options)).items()
        }
        # Not by add_hparams: it would write what columns there are too, and with these from just one
        # run TensorBoard could not put the flags in which runs differ first.
        _, *session = hparams(values, {})
        with self._going_on():
            for summary in session:
                self.writer.file_writer.add_summary(summary)
            for name, metrics in scores.items():
                for metric, value in metrics.items():
                    self.writer.add_scalar(f"best/{name}_{metric}", value)

    @torch.no_grad()
    def sentences(
        self, model: MultitaskBERT, dataset: TaskDataset, batch_size: int, precision: str
    ) -> None:
        """The vectors of a dataset's first sentences, with labels, for TensorBoard's projector."""
        rows = np.arange(min(len(dataset), PROJECTED_ROWS))
        device, vectors = next(model.parameters()).device, []
        with autocast(device, precision):
            for start in range(0, len(rows), batch_size):
                part = {dataset.task.name: (dataset, rows[start : start + batch_size])}
                vectors.append(model.eval().vectors(collate(part).to(device)))
        vectors = torch.cat(vectors).double().cpu().numpy().round(3)  # all digits are written
        examples = [dataset.examples[row] for row in rows]
        shown = [(" ".join(each.sentences[0].split()), f"{each.label:g}") for each in examples]
        tag = f"{dataset.split}/{dataset.task.name}"
        with self._going_on():
            heads = ["sentence", "label"]
            self.writer.add_embedding(vectors, shown, metadata_header=heads, tag=tag)

    def show_profile(self, text: str) -> None:
        print(f"\n{text}\n")
        with self._going_on():
            self.writer.add_text("profile", text, self.n_steps)

    def close(self) -> None:
        with self._going_on():
            self.writer.close()

    @contextlib.contextmanager
    def _going_on(self):
        """A log that cannot be written (a full disk) is a warning, once; the run goes on."""
        try:
            yield
        except OSError as error:
            if not self.broken:
                text = f"{self.directory}: TensorBoard's log ends here ({error}); the run goes on"
                tqdm.write(f"warning: {text}", file=sys.stderr)
            self.broken = True


class Training:
    """A run as it goes on: all that its steps change.

    Outside of `uninterrupted` blocks it stands between two steps, and `state` is all that a later
    process needs to `restore` it there and to come to the same numbers.
    """

    def __init__(self, model, tokenizer, tagger, data, options, path: Path, log: "RunLog"):
        self.model, self.tokenizer, self.tagger = model, tokenizer, tagger
        self.data, self.options, self.path, self.log = data, options, path, log
        freeze_and_unfreeze(model, options.option, options.unfreeze_interval, epoch=0)
        self.average = (
            None  # of the weights over the steps, which is then what is evaluated and kept
        )
        if options.ema:
            average = torch.optim.swa_utils.get_ema_multi_avg_fn(options.ema)
            self.average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=average)
        self.optimizer = build_optimizer(model, options)
        self.scheduler = build_scheduler(self.optimizer, options)
        self.samplers = {
            name: EpochSampler(len(each), options.seed) for name, each in data["train"].items()
        }
        self.best = None  # mean dev score of the saved model
        self.scores, self.train_scores = {}, {}  # on dev and train, after the last epoch
        self.epoch = 0  # those that are over
        self.n_skipped = self.bad_steps = 0  # steps not taken, and of these the last ones in a row
        self.saving_seconds, self.saved_at = 0.0, time.monotonic()
        self.signals = []  # that have come and wait for an answer
        self.profiler = None
        if options.profiler and rank() == 0:
            device = next(model.parameters()).device
            self.profiler = StepProfiler(log.directory, device, log.show_profile)
        self._start_epoch()

    def _start_epoch(self) -> None:
        self.n_windows = 0  # of this epoch that are over
        self.answers = []
        self.drawn_from = {name: each.state_dict() for name, each in self.samplers.items()}
        self.began = time.perf_counter()

    def state(self) -> dict:
        """All processes must call it."""
        content = checkpoint_content(
            self.model, self.tokenizer, self.options, self.epoch, self.scores, self.tagger
        )
        return content | {
            "training": {
                "optimizer": self.optimizer.state_dict(),
                "average": self.average.state_dict() if self.average else None,
                "scheduler": self.scheduler.state_dict() if self.scheduler else None,
                "samplers": self.drawn_from,
                "of_processes": gather(
                    {"random": random_states(), "answers": answers_by_task(self.answers)}
                ),
                "best": self.best,
                "n_windows": self.n_windows,
                "train_scores": self.train_scores,
                "n_skipped": self.n_skipped,
                "bad_steps": self.bad_steps,
                "seconds": time.perf_counter() - self.began,
                "log": self.log.state(),
                "data": digests(self.data),
                "threads": torch.get_num_threads(),
                "processes": n_processes(),
            }
        }

    def restore(self, state: dict) -> None:
        """Go on from what `state` returned; the model has its weights already."""
        saved = state["training"]
        self.optimizer.load_state_dict(saved["optimizer"])
        if self.average:
            self.average.load_state_dict(saved["average"])
        if self.scheduler:
            self.scheduler.load_state_dict(saved["scheduler"])
        for name, sampler in self.samplers.items():
            sampler.load_state_dict(saved["samplers"][name])
        self.epoch, self.scores = state["epoch"], state["dev_scores"]
        self.train_scores = saved["train_scores"]
        self._start_epoch()
        self.n_windows, self.best = saved["n_windows"], saved["best"]
        parts = saved["of_processes"]
        if len(parts) == n_processes():
            self.answers = answers_from(parts[rank()]["answers"])
            restore_random_states(parts[rank()]["random"])
        elif rank() == 0:
            self.answers = [each for part in parts for each in answers_from(part["answers"])]
        self.n_skipped, self.bad_steps = saved["n_skipped"], saved["bad_steps"]
        self.began -= saved["seconds"]

    def save(self) -> None:
        """Write the state, which all processes must do together; a full disk costs no more than
        this."""
        start = time.perf_counter()
        self._write(self.state())
        self.saved_at = time.monotonic()
        self.saving_seconds += time.perf_counter() - start

    def save_finished(self) -> None:
        """All that is left of the state of a run that needs none any more."""
        content = {"format": CHECKPOINT_FORMAT, "options": vars(self.options)}
        tags = self.tagger.pipeline.to_dict() if self.tagger else None
        self._write(content | {"tags": tags, "training": "finished"})

    def _write(self, content: dict) -> None:
        try:
            write_checkpoint(self.path, content)
        except UserError as error:
            tqdm.write(f"warning: {error}; the run goes on", file=sys.stderr)

    def fit(self, after_epoch: Callable[["Training"], None] = lambda _: None) -> None:
        """The epochs that are left: train, evaluate on dev, save the model if it is the best."""
        while self.epoch < self.options.epochs:
            interval = self.options.unfreeze_interval
            freeze_and_unfreeze(self.model, self.options.option, interval, self.epoch)
            self._train_epoch()
            seconds = time.perf_counter() - self.began
            dev = evaluation.evaluate(
                self._final_model(),
                self.data["dev"],
                self.options.batch_size,
                self.options.precision,
            )
            with uninterrupted():
                self._end_epoch(dev, seconds)
            self._save_or_stop(due=True)
            after_epoch(self)

    def _final_model(self) -> MultitaskBERT:
        """What the run would end with here."""
        return self.average.module if self.average else self.model

    def _save_or_stop(self, due: bool) -> None:
        """Between two steps, all processes together: what one of them wishes."""
        came = [number in self.signals for number in (signal.SIGINT, signal.SIGTERM)]
        due, interrupted, terminated = agree(due, *came)
        if interrupted or terminated:
            self.signals.clear()
            raise Terminated if terminated else KeyboardInterrupt
        if due:
            self.save()

    def _train_epoch(self) -> None:
        options, model = self.options, self.model.train()
        windows = training_windows(
            self.data["train"],
            self.samplers,
            options.samples_per_epoch,
            options.batch_size,
            options.grad_accumulation,
            rank(),
            n_processes(),
            dict(zip(TASKS, options.batch_shares)),
            [name for name, weight in zip(TASKS, options.rdrop) if weight],
        )
        per_row = sum(
            share * sequences_per_row(name, model.encodings, options.rdrop)
            for name, share in zip(TASKS, options.batch_shares)
            if name in self.data["train"]
        )
        with tqdm(
            desc=f"epoch {self.epoch + 1}",
            unit=" sentences",
            initial=round(self._rows_seen() * per_row),
            total=round(options.samples_per_epoch * per_row),
        ) as bar:
            for window in itertools.islice(windows, self.n_windows, None):
                with uninterrupted():
                    self._take_step(model, window, bar)
                if self.profiler:
                    self.profiler.step()
                waited = time.monotonic() - self.saved_at
                self._save_or_stop(due=waited > 60 * options.save_interval)
            if self.profiler:
                self.profiler.close()
            with uninterrupted():
                self.log.flush(self.optimizer, bar)

    def _rows_seen(self) -> int:
        """Of each task, in this epoch."""
        rows = self.n_windows * self.options.batch_size * self.options.grad_accumulation
        return min(rows, self.options.samples_per_epoch)

    def _take_step(self, model: MultitaskBERT, window: list[Batch], bar: tqdm) -> None:
        problem = None
        try:
            losses, answers = training_step(model, window, self.optimizer, self.options)
            self.bad_steps = 0
            if self.average:
                self.average.update_parameters(model)
            self.answers.extend(answers)
            self.log.step(losses, self.optimizer, bar)
        except NotFinite as error:
            problem = error
            self.n_skipped += 1
            self.bad_steps += 1
        if self.options.scheduler in EACH_STEP:
            self.scheduler.step()
        self.n_windows += 1
        bar.update(bar.total * self._rows_seen() // self.options.samples_per_epoch - bar.n)
        if self.bad_steps >= self.options.max_bad_steps:
            self._give_up(window, problem)

    def _give_up(self, window: list[Batch], problem: NotFinite) -> None:
        """Save, and name the rows of the last step in a UserError."""
        self.save()
        ids = defaultdict(list)
        for name, row in itertools.chain(
            *gather([(n, r) for batch in window for n, rows in batch.rows.items() for r in rows])
        ):
            ids[name].append(self.data["train"][name].examples[row].id)
        rows = "; ".join(f"{name} {', '.join(each)}" for name, each in ids.items())
        raise UserError(
            f"{self.bad_steps} steps in a row were not finite ({problem}); saved: "
            f"{self.describe_saved()}; lower --lr or look at the rows of the last step, by id: {rows}"
        )

    def _end_epoch(self, dev: dict[str, evaluation.Evaluation], seconds: float) -> None:
        train = self.train_scores = train_scores(self.answers)
        self.scores = {name: each.scores for name, each in dev.items()}
        mean = evaluation.mean_score(self.scores)
        self.epoch += 1
        self.log.epoch(self.epoch, train, dev, mean)
        if self.options.scheduler == "plateau":
            self.scheduler.step(mean)
        kept = self._keep_if_best(mean)
        print(f"epoch {self.epoch}: {seconds:.0f} s, mean dev score {mean:.4f}{kept}")
        if self.n_skipped:
            print(f"  steps skipped so far, since not finite: {self.n_skipped}")
        if isinstance(self.optimizer, Sophia):
            print(f"  {self.log.curvature(self.optimizer)}")
        for name, scores in self.scores.items():
            train_text = evaluation.format_scores(train.get(name, {}))
            print(f"  {name}: train {train_text}; dev {evaluation.format_scores(scores)}")
        self._start_epoch()

    def _keep_if_best(self, mean: float) -> str:
        """Save the model if it is the best so far; what came of it, for people to read."""
        comparable = -math.inf if math.isnan(mean) else mean
        if self.best is not None and comparable <= self.best:  # the first always: a run ends with
            return ""  # a model
        checkpoint = self.path.with_suffix(".pt")
        content = checkpoint_content(
            self._final_model(), self.tokenizer, self.options, self.epoch, self.scores, self.tagger
        )
        start = time.perf_counter()
        try:
            write_checkpoint(checkpoint, content)
        except UserError as error:
            return f", not saved: {error}"
        self.saving_seconds += time.perf_counter() - start
        self.best = comparable
        return f", saved to {checkpoint}"

    def describe_saved(self) -> str:
        """What there is on the disk, for people to read."""
        checkpoint = self.path.with_suffix(".pt")
        model = f"the best model so far is {checkpoint}" if checkpoint.exists() else "no model yet"
        return f"{model}; go on with --resume {self.path}" if self.path.exists() else model


def answers_by_task(answers: list[tuple[str, Tensor, Tensor]]) -> dict[str, tuple[Tensor, Tensor]]:
    """task -> labels and decoded outputs, of all steps together, on the CPU."""
    by_task = defaultdict(list)
    for name, labels, decoded in answers:
        by_task[name].append((labels.cpu(), decoded.cpu()))
    return {name: tuple(map(torch.cat, zip(*pairs))) for name, pairs in by_task.items()}


def answers_from(by_task: dict[str, tuple[Tensor, Tensor]]) -> list[tuple[str, Tensor, Tensor]]:
    return [(name, *pair) for name, pair in by_task.items()]


def digests(data: dict[str, dict[str, TaskDataset]]) -> dict[str, str]:
    """Of the files that decide what training does."""
    return {
        f"{name}_{split}": dataset.digest
        for split in ("train", "dev")
        for name, dataset in data[split].items()
    }


def train_multitask(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Train, keep the best model, write predictions; or with `--resume` go on with that.

    Args:
        options: what `parse_options` returns.

    Returns:
        the best model's dev scores, task -> metric -> value.
    """
    device = pick_device(options.use_gpu)
    check_outputs(options)
    with contextlib.ExitStack() as held:
        remove_leftovers(Path(options.models_dir))
        path, state = by_first(lambda: find_state(options)), None
        if path:
            held.enter_context(hold([path], STILL_GOING))
            state = read_state(path)
            if state["training"] == "finished":
                print(f"{path.stem} is finished; its predictions are written again")
                options.evaluate = str(path.with_suffix(".pt"))
                return evaluate_only(options)
        held.enter_context(hold_predictions(options))
        with one_first_on_each_node():
            model, tokenizer, tagger, data = load_all(options, path, state)
        if state:
            check_unchanged(data, state, path)
        else:
            path, log_directory = by_first(lambda: claim_run(options, options.option))
            held.enter_context(hold([path], STILL_GOING))
        if rank() == 0:
            describe_run(options, path.stem, device, data, tokenizer, tagger)
        if options.optimizer == "sophiah":
            keep_freed_memory()
        copy_from_first([*model.to(device).state_dict().values()])
        if rank():  # else all would drop the same
            torch.manual_seed(seeded_generator(device, options.seed, rank()).initial_seed())
        parts = model, tokenizer, tagger, data, options
        if state:
            training = restored_training(*parts, path=path, state=state)
            state = None  # on a GPU, it would hold a second copy of all on the host
        else:
            training = Training(*parts, path, RunLog(log_directory))
        return complete(training, device)


def complete(training: Training, device: torch.device) -> dict[str, dict[str, float]]:
    """All epochs that are left, then the best model's predictions and scores."""
    options, log, checkpoint = training.options, training.log, training.path.with_suffix(".pt")
    start = time.perf_counter()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    # A process alone answers a signal at once, several have to agree on it between two steps.
    answering = uninterrupted() if n_processes() > 1 else contextlib.nullcontext([])
    try:
        with answering as training.signals:
            training.fit()
            seconds = time.perf_counter() - start
            print(f"saving took {training.saving_seconds:.1f} s of {seconds:.0f} s")
            if device.type == "cuda":
                peak = torch.cuda.max_memory_allocated(device) / 2**20
                print(f"memory of {torch.cuda.get_device_name(device)}: {peak:,.0f} MB at most")
            if training.best is None:
                raise UserError(
                    f"{checkpoint} could not be written; saved: {training.describe_saved()}"
                )
            model, _, content = load_checkpoint(checkpoint)
            model.to(device)
            scores = evaluate_checkpoint(
                checkpoint, model, content["epoch"], training.data, options
            )
            if "sst" in scores:
                log.sentences(
                    model, training.data["dev"]["sst"], options.batch_size, options.precision
                )
            log.hyper_parameters(options, scores)
            training.save_finished()
            training.signals.clear()  # too late to stop
    except KeyboardInterrupt as interrupt:
        with uninterrupted():
            training.save()
        message = f"saved: {training.describe_saved()}; TensorBoard log: {log.directory}"
        raise type(interrupt)(message) from None
    finally:
        log.close()
    print(f"TensorBoard log: {log.directory}")
    return scores


# ------------------------------------------------------------------------------------------ resume


def remove_leftovers(models_dir: Path) -> None:
    """What runs had half written when they were killed, and nobody will go on with."""
    for leftover in models_dir.glob(".*.tmp"):
        run = leftover.name[1:].rsplit(".", 3)[0]
        with contextlib.suppress(UserError), hold([models_dir / f"{run}.resume"], STILL_GOING):
            pass  # to hold it is to remove them


def find_state(options: argparse.Namespace) -> Path | None:
    """The state file that `--resume` means; None for a new run.

    `auto` is the newest good one in `--models_dir` of a run with the same options that is not going
    on meanwhile.
    """
    if options.resume != "auto":
        return Path(options.resume) if options.resume else None
    wanted, tags = decisive(vars(options)), None
    if options.additional_input:
        tags = Pipeline.find(options.spacy_model or DEFAULT_SPACY_MODEL).to_dict()
    paths = [path for path in Path(options.models_dir).glob("*.resume") if path.exists()]
    for path in sorted(paths, key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            state = read_state(path)
        except UserError as error:
            warnings.warn(f"--resume auto passes over {error}", stacklevel=2)
            continue
        if decisive(state["options"]) == wanted and state.get("tags") == tags:
            with contextlib.suppress(UserError), hold([path], STILL_GOING):
                return path
    print(f"--resume auto: {options.models_dir} has no run with these options; this is a new one")
    return None


def read_state(path: str | Path) -> dict:
    """The state of a run; UserError says why a file holds none."""
    state = read_checkpoint(path)
    training = state.get("training")
    if not training or not isinstance(state.get("options"), dict):
        raise UserError(f"{path}: holds no state of a run to go on with; give a models/RUN.resume")
    if training != "finished" and not {"data", "threads", "processes", "log"} <= set(training):
        raise UserError(f"{path}: a damaged state of a run")
    state["options"] = vars(build_parser().parse_args([])) | state["options"]  # older: fewer flags
    return state


def decisive(options: dict) -> dict:
    """The options that a run's numbers depend on."""
    free = {"resume", "save_interval", "max_bad_steps", "models_dir", "logdir", "cache_dir"}
    free |= {"tensorboard_subfolder", "local_files_only", "evaluate", "predictions_dir"}
    free |= {"spacy_model"}  # the state knows the pipeline by its content
    free |= {"config", "ray_address", "hpo", "searched", "profiler"}
    return {
        key: each
        for key, each in options.items()
        if key not in free and key[-4:] != "_out" and not key.startswith("hpo_")
    }


def options_to_resume(argv: list[str] | None, path: str) -> argparse.Namespace:
    """The options of the saved run; what `argv` gives besides must not change its numbers."""
    saved = read_state(path)["options"]
    named = {  # the other predictions follow --predictions_dir, which may be another one now
        key: value
        for key, value in saved.items()
        if key[-4:] != "_out" or os.path.dirname(value) != saved["predictions_dir"]
    }
    options = parse_options(argv, named)
    options.models_dir = str(Path(path).parent)
    given, wanted = decisive(vars(options)), decisive(saved)
    wanted.pop("tasks")  # follow from the flags of the tasks
    if differing := [key for key in wanted if given.get(key) != wanted[key]]:
        raise UserError(
            f"{path}: this run has other values of --{', --'.join(differing)}; "
            "leave them out to go on with it, or start a new run"
        )
    return options


def check_unchanged(data: dict[str, dict[str, TaskDataset]], state: dict, path: Path) -> None:
    """UserError unless the data are those of the saved run; a warning where numbers may differ."""
    saved, here = state["training"]["data"], digests(data)
    if changed := [name for name, digest in here.items() if saved.get(name) != digest]:
        raise UserError(
            f"{path}: the files of --{', --'.join(changed)} have changed since this run began; "
            "put them back, or start a new run"
        )
    now = {"threads": torch.get_num_threads(), "processes": n_processes()} | current_versions()
    then = {key: state["training"][key] for key in ("threads", "processes")} | state["versions"]
    if other := [f"{key} {then[key]}, now {now[key]}" for key in now if now[key] != then[key]]:
        warnings.warn(f"{path} was saved with {'; '.join(other)}: the numbers may differ a little")


def restored_training(*parts, path: Path, state: dict) -> Training:
    """Where the saved run stood; UserError if the state is not whole."""
    try:
        log = RunLog(Path(state["training"]["log"]["directory"]), state["training"]["log"])
        training = Training(*parts, path, log)
        training.restore(state)
    except (KeyError, TypeError, ValueError, AttributeError) as error:  # entries missing, or others
        raise UserError(f"{path}: a damaged state of a run ({one_line(error)})") from error
    print(f"resumed after {training.epoch} epochs and {training.n_windows} steps")
    print(f"TensorBoard log goes on in {log.directory}")
    return training


def evaluate_checkpoint(
    path: str | Path,
    model: MultitaskBERT,
    epoch: int,
    data: dict[str, dict[str, TaskDataset]],
    options: argparse.Namespace,
) -> dict[str, dict[str, float]]:
    """Write dev and test predictions of a checkpoint's model, print the table, return dev scores."""
    written, scores = [], {}
    for split in ("dev", "test"):
        batches = data[split], options.batch_size, options.precision
        for name, result in evaluation.evaluate(model, *batches).items():
            target = getattr(options, f"{name}_{split}_out")
            if rank() == 0:
                evaluation.write_predictions(target, result)
            written.append(target)
            if split == "dev":
                scores[name] = result.scores
    print(f"\n{'task':<12}{'dev metric':<12}value")
    for name, metrics in scores.items():
        for metric, value in metrics.items():
            print(f"{TASKS[name].title:<12}{metric:<12}{value:.4f}")
    print(f"{'mean':<24}{evaluation.mean_score(scores):.4f}\n")
    print(f"checkpoint: {path} (epoch {epoch})")
    print(f"predictions: {', '.join(written)}")
    return scores


def load_data(
    options,
    tokenizer,
    max_length,
    splits,
    tagger: Tagger | None = None,
    encodings: dict[str, str] | None = None,
) -> dict[str, dict[str, TaskDataset]]:
    """split -> task -> dataset, for the chosen tasks."""
    encodings = encodings or {}
    data = {
        split: {
            name: TaskDataset(
                getattr(options, f"{name}_{split}"),
                TASKS[name],
                split,
                tokenizer,
                max_length,
                options.cache_dir,
                SMOKETEST_ROWS if options.smoketest else None,
                tagger,
                encodings.get(name, "bi"),
                split == "train" and options.both_orders and encodings.get(name, "bi") != "bi",
            )
            for name in options.tasks
        }
        for split in splits
    }
    if tagger:
        tagger.rest()
    return data


def checked_max_length(options, source: str, config: BertConfig, tokenizer: BertTokenizer) -> int:
    """Where sequences are cut, for the encoder from `source`; UserError if it cannot be."""
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"{source}: the tokenizer has {tokenizer.vocab_size} word pieces, "
            f"the encoder only {config.vocab_size}; they do not belong together"
        )
    if options.max_length and options.max_length > config.max_position_embeddings:
        raise UserError(
            f"--max_length {options.max_length} is more than this encoder's "
            f"{config.max_position_embeddings} positions"
        )
    return options.max_length or config.max_position_embeddings


def load_model(options, path: Path | None, state: dict | None) -> tuple:
    """The model, its tokenizer, its tagger or None, and where they are from: the saved state, or
    `--bert_model`."""
    if state:
        return *model_of(state, path), tagger_like(state.get("tags"), path, options), str(path)
    source, local = options.bert_model, options.local_files_only
    overrides, tagger = {}, None
    if options.hidden_dropout_prob is not None:
        overrides["hidden_dropout_prob"] = options.hidden_dropout_prob
    if options.additional_input:
        options.spacy_model = options.spacy_model or DEFAULT_SPACY_MODEL
        tagger = Tagger(Pipeline.find(options.spacy_model), options.cache_dir)
        overrides["num_pos_tags"] = len(tagger.pipeline.pos_labels)
        overrides["num_ner_tags"] = len(tagger.pipeline.ner_labels)
    bert = BertModel.from_pretrained(source, local, **overrides)
    check_new_tables(bert, source, tagger)
    encodings = encodings_of(vars(options))
    if set(encodings.values()) != {"bi"} and bert.config.type_vocab_size < 2:
        raise UserError(
            f"{source}: this encoder does not tell two sentences of a sequence apart "
            "(type_vocab_size 1); leave --para_encoding and --sts_encoding at bi"
        )
    if options.moe:
        bert = MixtureOfExperts.of(bert, options.moe)
    model = MultitaskBERT(bert, encodings)
    return model, BertTokenizer.from_pretrained(source, local), tagger, source


def load_all(options, path: Path | None = None, state: dict | None = None) -> tuple:
    """Model, tokenizer, tagger or None, data; from here on random numbers follow from the seed."""
    seed_everything(options.seed)
    model, tokenizer, tagger, source = load_model(options, path, state)
    max_length = checked_max_length(options, source, model.bert.config, tokenizer)
    data = load_data(options, tokenizer, max_length, SPLITS, tagger, model.encodings)
    return model, tokenizer, tagger, data


def check_new_tables(bert: BertModel, source: str, tagger: Tagger | None) -> None:
    """UserError for an encoder that brings embeddings of tags, but does not say of which."""
    tables = bert.new_parameters
    if tables and (tagger is None or any(table.any() for table in tables)):
        raise UserError(
            f"{source}: this encoder has embeddings of tags already, of an unknown spaCy pipeline; "
            "start from one that has none, or go on from a checkpoint (--resume, --evaluate)"
        )


def claim_run(options: argparse.Namespace, kind: str) -> tuple[Path, Path]:
    """For a name that no other run has: the path of its state, and its TensorBoard folder, made
    here."""
    start = f"{datetime.now():%Y%m%d-%H%M%S}"
    run = f"{start}-{kind}-{options.optimizer}-{secrets.token_hex(2)}"
    directory = Path(options.logdir) / (options.tensorboard_subfolder or "") / run
    try:
        directory.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"cannot write {directory}: {error.strerror}") from error
    return Path(options.models_dir) / f"{run}.resume", directory


def hold_predictions(options: argparse.Namespace):
    """Keep other runs from writing the files that this one will write."""
    paths = [
        Path(getattr(options, f"{name}_{split}_out"))
        for name in options.tasks
        for split in ("dev", "test")
    ]
    what = "a run that is still going will write it; give this one another --predictions_dir"
    return hold(paths, what)


def check_outputs(options: argparse.Namespace) -> None:
    """Refuse paths that cannot be written before hours of training, not after."""
    check_writable(Path(options.models_dir) / "run.pt")
    taken = {
        Path(getattr(options, f"{name}_{split}")).resolve(): f"--{name}_{split}"
        for name in options.tasks
        for split in SPLITS
    }
    for name in options.tasks:
        for split in ("dev", "test"):
            flag, path = f"--{name}_{split}_out", getattr(options, f"{name}_{split}_out")
            check_writable(path)
            other = taken.setdefault(Path(path).resolve(), flag)
            if other != flag:
                raise UserError(f"{path}: is given for {flag} and for {other}")


def describe_run(
    options,
    run: str,
    device,
    data: dict[str, dict[str, TaskDataset]],
    tokenizer,
    tagger: Tagger | None,
) -> None:
    """Show all options, one example per task as the model will see it, and how many rows of dev and
    test the training set gives away."""
    threads = torch.get_num_threads()
    print(f"run {run} on {device}, {threads} CPU threads, {current_versions()}")
    values = ", ".join(f"{key}={value}" for key, value in sorted(vars(options).items()))
    whole = dict(break_on_hyphens=False, break_long_words=False)
    print(textwrap.fill(f"options: {values}", 100, subsequent_indent="    ", **whole))
    for name, dataset in data["train"].items():
        rows, order = f"{len(dataset)} training rows", ""
        if dataset.both_orders:
            rows, order = f"{len(dataset) // 2} training rows", " in both orders"
        print(f"{name}: {rows}{order}; the first: label {dataset.labels[0]:g}")
        for column in dataset.columns:
            ids, *tags = column.row(0)
            pieces = tokenizer.pieces_of(ids)
            if tagger:
                pieces = [f"{piece}{tagger.describe(*each)}" for piece, *each in zip(pieces, *tags)]
            print(f"    {' '.join(pieces)}")
        others = [data[split][name].examples for split in SPLITS[1:]]
        known = dict(zip(SPLITS[1:], overlap(dataset.examples, *others)))
        rows = ", ".join(
            f"{n} of {len(data[split][name])} {split} rows" for split, n in known.items()
        )
        print(f"    known from training: {rows}")


# ------------------------------------------------------------------------------------------- main


def load_trained(options: argparse.Namespace) -> tuple:
    """The model of the checkpoint that `--evaluate` names, its tokenizer, its tagger or None, and all
    else it holds. What `options` leave open is set as it was in training."""
    model, tokenizer, checkpoint = load_checkpoint(options.evaluate)
    if checkpoint.get("tags") is not None:
        options.spacy_model = options.spacy_model or checkpoint["options"]["spacy_model"]
    tagger = tagger_like(checkpoint.get("tags"), options.evaluate, options)
    trained = checkpoint["options"]["tasks"]
    options.tasks = [name for name in options.tasks if name in trained]
    if untrained := [name for name in TASKS if getattr(options, name) and name not in trained]:
        raise UserError(
            f"{options.evaluate}: was not trained on {', '.join(untrained)}, "
            f"only on {', '.join(trained)}"
        )
    if options.max_length is None:
        options.max_length = checkpoint["options"]["max_length"]
    if options.precision == "auto":
        options.precision = checkpoint["options"].get("precision", "auto")
    options.max_length = checked_max_length(options, options.evaluate, model.bert.config, tokenizer)
    return model, tokenizer, tagger, checkpoint


def evaluate_only(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """`--evaluate`: the checkpoint's dev scores and predictions."""
    device = pick_device(options.use_gpu)
    model, tokenizer, tagger, checkpoint = load_trained(options)
    check_outputs(options)
    splits, length = ("dev", "test"), options.max_length
    data = load_data(options, tokenizer, length, splits, tagger, model.encodings)
    with hold_predictions(options):
        model.to(device)
        return evaluate_checkpoint(options.evaluate, model, checkpoint["epoch"], data, options)


def run(argv: list[str] | None) -> None:
    """What the flags ask for."""
    join_processes()
    with one_first_on_each_node():
        options = parse_options(argv)
        if options.resume not in (None, "auto"):
            options = options_to_resume(argv, options.resume)
    if options.evaluate:
        evaluate_only(options)
    elif options.hpo:
        if n_processes() > 1:
            raise UserError("--hpo: start it without torchrun; Ray runs the trials")
        import hpo  # Ray, which takes seconds to import

        hpo.search(options)
    else:
        train_multitask(options)
    leave_processes()


def main(argv: list[str] | None = None) -> int:
    advice = "lower --batch_size (with --grad_accumulation, for the same steps) or --max_length"
    return exit_status(lambda: run(argv), advice, "nothing new was saved")


if __name__ == "__main__":
    sys.modules["multitask_classifier"] = sys.modules["__main__"]  # what hpo.py imports is this
    signal.signal(signal.SIGINT, signal.default_int_handler)  # from here on main() answers it
    signal.signal(signal.SIGTERM, terminate)
    sys.exit(main())
