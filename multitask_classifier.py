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
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import evaluation
from attention import Sequences
from base_bert import BertConfig
from batches import Batch, join, step_noise
from bert import BertModel, pack
from checkpoint import (
    STILL_GOING,
    check_outputs,
    check_tags,
    check_unchanged,
    claim_run,
    find_state,
    hold_predictions,
    options_to_resume,
    read_checkpoint,
    read_state,
    remove_leftovers,
    tagger_like,
)
from datasets import load_data
from evaluation import evaluate_checkpoint
from moe import MixtureOfExperts, add_routing, expert_tags
from optimizer import SophiaG, SophiaH, backward_with_graph, freeze_and_unfreeze
from options import DEFAULT_SPACY_MODEL, encodings_of, parse_options
from run_log import RunLog, describe_run
from tagging import Pipeline, Tagger
from tasks import MAX_SIMILARITY, SPLITS, TASKS, combine, task_loss
from tokenizer import BertTokenizer
from training import Step, Training, restored_training
from utils import (
    UserError,
    autocast,
    by_first,
    copy_from_first,
    exit_status,
    hold,
    join_processes,
    keep_freed_memory,
    leave_processes,
    n_processes,
    one_first_on_each_node,
    one_line,
    pick_device,
    rank,
    seed_everything,
    seeded_generator,
    sum_gradients,
    terminate,
    uninterrupted,
)

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


def load_checkpoint(path: str | Path) -> tuple[MultitaskBERT, BertTokenizer, dict]:
    """The model (on the CPU), its tokenizer, and all else that a checkpoint holds.

    UserError says why a file is of no use.
    """
    checkpoint = read_checkpoint(path)
    if checkpoint.get("training") == "finished":
        model = Path(path).with_suffix(".pt")
        raise UserError(f"{path}: only says that this run is finished; its model is {model}")
    return *model_of(checkpoint, path), checkpoint


# ---------------------------------------------------------------------------------------- training


def training_step(
    model: MultitaskBERT,
    window: list[Batch],
    optimizer: torch.optim.Optimizer,
    options: argparse.Namespace,
) -> Step:
    """One optimizer step on the summed losses of all tasks, over the batches of one window, of
    which each process of a data-parallel run has its share.

    Returns:
        each task's mean loss over all rows of the step and their weighted sum (scalar tensors, on
        the device), and (task, labels, decoded outputs) of each batch of this process.

    A step whose loss or gradient is not finite is not taken: the weights stay as they were.
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
    problem = f"loss {float(losses['sum']):g}, norm of the gradients {float(norm):g}"
    return Step(losses, answers, None if finite else problem)


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


def fit(training: Training, after_epoch: Callable[[Training], None] = lambda _: None) -> None:
    """Train the epochs that are left; after each one evaluate on dev, and keep the best model."""
    model, options = training.model, training.options
    for epoch in range(training.epoch, options.epochs):
        freeze_and_unfreeze(model, options, epoch)
        for window in training.windows():  # the batches of one optimizer step
            with uninterrupted():  # a signal waits until the step is done
                step = training_step(model, window, training.optimizer, options)
                training.record(step, window)
            training.save_or_stop()
        dev = evaluation.evaluate(
            training.evaluated_model, training.data["dev"], options.batch_size, options.precision
        )
        with uninterrupted():
            training.end_epoch(dev)
        training.save_or_stop(due=True)
        after_epoch(training)


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
            fit(training)
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
