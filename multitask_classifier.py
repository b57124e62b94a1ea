"""Fine-tune one BERT on sentiment (SST), paraphrase (Quora) and similarity (STS) at once.

python -u multitask_classifier.py --use_gpu

`MultitaskBERT` is the model, `training_step` one optimizer step, `fit` the loop.
"""

import os
import signal

if __name__ == "__main__":  # before PyTorch is imported
    # Ctrl-C during the seconds that the import takes ends the program.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    # OpenMP threads wait actively. GNU's wait so long that two runs on the same cores nearly stop each
    # other. A shorter wait costs a single run a few per cent.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import argparse
import contextlib
import functools
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import checkpoint
import evaluation
from balancing import GradientSurgery, learned_weights, weighted_loss
from base_bert import BertConfig
from batches import Batch, Padded, join
from bert import BertModel, EncoderWithHeads, Tokens, pack, set_dropout
from curvature import LossScale, add_gradients, prepare_estimate
from datasets import TaskDataset, checked_max_length, load_data
from graphs import Pass, StepGraphs
from heads import AttentionLayer, SequenceHead, new_head
from moe import MixtureOfExperts, add_routing, expert_tags, with_experts
from optimizer import freeze_and_unfreeze
from options import changed_options
from processes import (
    agree,
    by_first,
    join_processes,
    leave_processes,
    n_processes,
    one_first_on_each_node,
    rank,
    sum_gradients,
)
from run_log import RunLog, describe_run
from tagging import Pipeline, Tagger
from tasks import SPLITS, TASKS, Task, combine, task_loss
from tokenizer import BertTokenizer
from training import (
    Answers,
    Parts,
    Step,
    Training,
    clip_and_step,
    prepare_device,
    restored_training,
)
from utils import (
    ROOT,
    UserError,
    autocast,
    exit_status,
    lock_files,
    one_line,
    pick_device,
    seed_everything,
    terminate,
    uninterrupted,
    without_weights,
)

# ------------------------------------------------------------------------------------------ model


class MultitaskBERT(EncoderWithHeads):
    """One BERT, attention pooling, and the heads of all tasks. A task with the encoding "both" has two
    heads, whose answers are averaged."""

    def __init__(
        self,
        bert: BertModel | MixtureOfExperts,
        tasks: Mapping[str, Task] = TASKS,
        learned_weights: bool = False,
    ):
        super().__init__()
        size = bert.config.hidden_size
        self.bert = bert
        # No head reads the poolers. They are kept so that each BERT is complete.
        for stack in bert.stacks:
            stack.pooler.requires_grad_(False)
        self.attention_layer = AttentionLayer(size)
        self.tasks = dict(tasks)
        # All heads are made, so that the random weights of one do not depend on the others' encoding.
        heads = {name: new_head(task, size) for name, task in tasks.items()}
        joint = [name for name, task in tasks.items() if task.encoding != "bi"]
        separate = [name for name, task in tasks.items() if task.encoding != "cross"]
        self.heads = nn.ModuleDict({name: heads[name] for name in separate})
        self.joint_heads = nn.ModuleDict(
            {name: SequenceHead(size, tasks[name], n_hidden=1) for name in joint}
        )
        learned = tasks if learned_weights else ()
        self.log_variances = nn.ParameterDict({name: torch.zeros(()) for name in learned})

    def forward(self, batch: Batch, second_derivative: bool = False) -> dict[str, Tensor]:
        """Return the outputs of each task for its rows: logits [B, classes] or numbers [B]."""
        answers = self.head_outputs(batch, second_derivative)
        return {name: combine(self.tasks[name], outputs) for name, outputs in answers.items()}

    def head_outputs(
        self, batch: Batch, second_derivative: bool = False
    ) -> dict[str, list[Tensor]]:
        """Return the outputs of each head of each task, after one pass through the encoder for all
        sequences. A task that the batch has twice has all outputs twice. With `second_derivative`
        the pass is slower, and the outputs can be differentiated twice."""
        vectors = self.vectors(batch, second_derivative)
        return {
            name: self._outputs(name, [vectors[column] for column in columns])
            for name, columns in batch.columns.items()
        }

    def vectors(self, batch: Batch, second_derivative: bool = False) -> Tensor:
        """Return one vector per sequence [B, D], in the order of the batch's columns."""
        return self._pooled(batch.tokens(second_derivative))[batch.places]

    def _pooled(self, tokens: Tokens) -> Tensor:
        return self.attention_layer(self.bert.encode(tokens), tokens.sequences)  # [B, D]

    def _outputs(self, name: str, vectors: Sequence[Tensor]) -> list[Tensor]:
        """Return the outputs of a task's heads. `vectors` has one [B, D] for each column that they read;
        for encoding "both" and two passes: first, second, both, first, second, both."""
        n_separate = len(self.tasks[name].sentences) if name in self.heads else 0
        n_joint = 1 if name in self.joint_heads else 0
        outputs = []
        for start in range(0, len(vectors), n_separate + n_joint):
            joint = start + n_separate
            if n_separate:
                outputs.append(self.heads[name](*vectors[start:joint]))
            if n_joint:
                outputs.append(self.joint_heads[name](vectors[joint]))
        return outputs

    def embed(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        token_type_ids: Tensor | None = None,
        tags: Tensor | None = None,
    ) -> Tensor:
        """Return one vector per sequence of a padded batch: [B, S] (and `tags` [2, B, S] where the
        encoder has embeddings of them) to [B, D]."""
        packed = pack(input_ids, attention_mask, token_type_ids, tags)
        return self._pooled(packed.tokens)[packed.places]

    def predict_sentiment(
        self, input_ids: Tensor, attention_mask: Tensor, tags: Tensor | None = None
    ) -> Tensor:
        """Return logits [B, 5] of the classes 0 (negative) to 4 (positive)."""
        return self.heads["sst"](self.embed(input_ids, attention_mask, tags=tags))

    def _predict_pair(
        self,
        name: str,
        input_ids_1: Tensor,
        mask_1: Tensor,
        input_ids_2: Tensor,
        mask_2: Tensor,
        tags_1: Tensor | None = None,
        tags_2: Tensor | None = None,
    ) -> Tensor:
        first = Padded(input_ids_1, mask_1, tags=tags_1)
        second = Padded(input_ids_2, mask_2, tags=tags_2)
        vectors = []
        if name in self.heads:
            vectors += [self.embed(*first), self.embed(*second)]
        if name in self.joint_heads:
            longest = self.bert.config.max_position_embeddings
            vectors.append(self.embed(*join(first, second, longest)))
        return combine(self.tasks[name], self._outputs(name, vectors))

    # Logits [B, 2]: no paraphrase, paraphrase.
    predict_paraphrase = functools.partialmethod(_predict_pair, "para")
    # Similarities [B]. Clamp them to 0..5 to show or score them; a cosine alone gives -5 to 5.
    predict_similarity = functools.partialmethod(_predict_pair, "sts")


# --------------------------------------------------------------------------------------- training


def training_step(
    model: EncoderWithHeads,
    window: list[Batch],
    optimizer: torch.optim.Optimizer,
    options: argparse.Namespace,
    scale: LossScale | None = None,
    graphs: StepGraphs | None = None,
) -> Step:
    """Take one optimizer step on the weighted sum of the losses of all tasks.

    `window` lists the batches whose gradients are accumulated; each process gets its share of their
    rows. The losses that it returns are means over all rows of the step. If the loss or a gradient is
    not finite, the step is not taken and the weights stay as they were. Only Sophia waits for a GPU.
    `scale` is for float16; SophiaH's estimates, in float32, do without it, and without `graphs`.
    """
    device = next(model.parameters()).device
    window = [batch.to(device) for batch in window]
    with_graph = prepare_estimate(model, window, optimizer, options)
    scale = None if with_graph else scale
    names = [*options.tasks, "sum", *(expert_tags(options) if options.moe else [])]
    losses = {name: torch.zeros((), device=device) for name in names}
    surgery = GradientSurgery(model, optimizer, options) if options.gradient_surgery else None
    answers = []

    def captured(batch: Batch) -> Pass:
        own = {name: torch.zeros((), device=device) for name in names}
        return Pass(own, add_batch(own, model, batch, options, scale=scale))

    for batch in window:
        if graphs and not with_graph:
            shares, predictions = graphs.run(batch, captured)
            losses = {name: total + shares[name] for name, total in losses.items()}
        else:
            predictions = add_batch(losses, model, batch, options, surgery, with_graph, scale)
        answers += [Answers(name, batch.labels[name], predictions[name]) for name in predictions]
    sum_gradients(model, list(losses.values()))
    if surgery:
        surgery.project()
    for name in options.tasks:
        if window and not window[0].step_rows[name]:  # a task can have no row in a step
            del losses[name]
    losses |= learned_weights(model, options)
    return Step([*losses], answers, *clip_and_step(model, optimizer, losses, options, scale))


def add_batch(
    losses: dict[str, Tensor],
    model: EncoderWithHeads,
    batch: Batch,
    options: argparse.Namespace,
    surgery: GradientSurgery | None = None,
    with_graph: bool = False,
    scale: LossScale | None = None,
) -> dict[str, Tensor]:
    """Add a batch's share of a step to `losses` and to `.grad`. Return its predictions [n_rows] by task."""
    with autocast(batch.input_ids.device, options.precision, small_gradients=with_graph):
        outputs = model.head_outputs(batch, second_derivative=with_graph)
    terms: dict[str, Tensor] = {}
    predictions = {}
    for name, task_outputs in outputs.items():
        task, labels = model.tasks[name], batch.labels[name]
        task_outputs = [output.float() for output in task_outputs]
        # The batch's share of the rows of the step: all batches and processes add up to the mean.
        share = len(labels) / batch.step_rows[name]
        loss = task_loss(task, task_outputs, labels, options) * share
        terms[name] = weighted_loss(model, task, loss, share, options)
        losses[name] += loss.detach()
        losses["sum"] += terms[name].detach()
        combined = combine(task, [output.detach() for output in task_outputs])
        predictions[name] = task.decode(combined)
    if options.moe:
        terms["balance"] = add_routing(losses, model, batch, options)
    add_gradients(terms, model, surgery, with_graph, scale)
    return predictions


def fit(training: Training, after_epoch: Callable[[Training], None] = lambda _: None) -> None:
    """Train the epochs that are left. After each epoch, evaluate on dev and keep the best model."""
    model, options = training.model, training.options
    aids = training.scale, training.graphs
    for epoch in range(training.epoch, options.epochs):
        # Only the first process knows whether the best model could be written.
        if any(agree(training.is_over)):
            break
        freeze_and_unfreeze(model, options, epoch)
        for window in training.windows():  # the batches of one optimizer step
            with uninterrupted():  # a signal waits until the step is done
                step = training_step(model, window, training.optimizer, options, *aids)
                training.record(step, window)  # moving average, learning rate, log
            training.save_or_stop()
        dev = evaluation.evaluate(
            training.evaluated_model, training.dev, options.batch_size, options.precision
        )
        with uninterrupted():
            training.end_epoch(dev)  # log, learning rate, keep the best
        training.save_or_stop(due=True)
        after_epoch(training)
    training.wait_for_writer()


def train_multitask(options: argparse.Namespace) -> evaluation.Scores:
    """Train, keep the best model and write its predictions; with `--resume`, continue a saved run.
    Return the best model's dev scores."""
    device = pick_device(options.use_gpu)
    with contextlib.ExitStack() as locks:
        path, state = checkpoint.lock_state(options, locks)
        run = path.stem if path and state else by_first(lambda: checkpoint.new_name(options))
        options = checkpoint.name_predictions(options, run)
        checkpoint.check_outputs(options)
        if path and state and state["training"] == "finished":
            print(f"{path.stem} is finished; its predictions are written again")
            return evaluate_only(changed_options(options, evaluate=[str(path.with_suffix(".pt"))]))
        locks.enter_context(checkpoint.lock_predictions(options))
        with one_first_on_each_node():
            parts = load_all(options, path, state)
        if path and state:
            checkpoint.check_unchanged(parts.data, state, path)
        else:
            path, log_directory = by_first(lambda: checkpoint.new_run(options, run))
            locks.enter_context(lock_files([path], checkpoint.STILL_RUNNING))
        if rank() == 0:
            print(describe_run(options, run, device, parts.model, parts.data))
        prepare_device(parts.model, device, options)
        if state:
            training = restored_training(parts, path, state)
            state = None  # on a GPU, it would keep a second copy of everything on the host
        else:
            training = Training(parts, path, RunLog(log_directory))
            training.log.start(options, parts.data["train"], parts.tokenizer, parts.tagger)
        return train_and_evaluate(training)


def train_and_evaluate(training: Training) -> evaluation.Scores:
    """Train the epochs that are left, then write the best model's predictions and return its scores.
    An interrupt saves the state."""
    # A single process answers a signal at once; several agree on it between two steps.
    waiting: Any = uninterrupted() if n_processes() > 1 else contextlib.nullcontext([])
    try:
        with waiting as training.signals:
            start = time.perf_counter()
            fit(training)
            training.print_epochs()
            training.print_costs(time.perf_counter() - start)
            scores = evaluate_best(training)
            training.save_finished()
            training.signals.clear()  # too late to stop
    except KeyboardInterrupt as interrupt:
        with uninterrupted() as again:
            training.save(last=True)
            again.clear()  # it ends anyway
        saved = f"saved: {training.describe_saved()}"
        raise type(interrupt)(f"{saved}; TensorBoard log: {training.log.directory}") from None
    finally:
        training.log.close()
    print(f"TensorBoard log: {training.log.directory}")
    return scores


def evaluate_best(training: Training) -> evaluation.Scores:
    """Write the predictions of the best model, log it, and return its dev scores."""
    options, log, path = training.options, training.log, training.path.with_suffix(".pt")
    if training.best is None:
        raise UserError(f"{path} could not be written; saved: {training.describe_saved()}")
    model, _, content = load_checkpoint(path)
    model, cost = model.to(training.device), (options.batch_size, options.precision)
    results = {
        split: evaluation.evaluate(model, training.data[split], *cost) for split in ("dev", "test")
    }
    source, train = f"{path} (epoch {content['epoch']})", training.data["train"]
    scores, unseen = evaluation.show_results(results, source, options, train)
    checkpoint.link_latest(options)
    log.best(model, training.data["dev"], options, scores, unseen)
    return scores


# ---------------------------------------------------------------------------------------- loading


class LoadedCheckpoint(NamedTuple):
    model: MultitaskBERT  # on the CPU
    tokenizer: BertTokenizer
    content: dict[str, Any]  # all of the checkpoint


def load_checkpoint(path: str | Path) -> LoadedCheckpoint:
    """Load a checkpoint. Raises UserError with the reason if it cannot be used."""
    loaded = model_from_checkpoint(checkpoint.read_checkpoint(path), path)
    loaded.model.log_variances = nn.ParameterDict()  # only training needs them
    return loaded


def model_from_checkpoint(content: dict[str, Any], path: str | Path) -> LoadedCheckpoint:
    """Build the model that a checkpoint holds. Raises UserError if it is not complete."""
    if content.get("training") == "finished":
        finished = Path(path).with_suffix(".pt")
        raise UserError(f"{path}: only says that this run is finished; its model is {finished}")
    try:
        config = BertConfig(**content["bert_config"])
        with without_weights():
            encoder = with_experts(BertModel(config), content["options"].get("moe"))
            learned = content["options"].get("loss_weights") == "learned"
            model = MultitaskBERT(encoder, content["options"]["tasks"], learned)
        model.load_state_dict(content["model"], assign=True)
        tokenizer = BertTokenizer.from_json(content["tokenizer"])
        checkpoint.check_entries(content, config)
    except Exception as error:  # whatever a missing or damaged entry makes of these lines
        raise UserError(f"{path}: a damaged checkpoint ({one_line(error)})") from error
    return LoadedCheckpoint(model, tokenizer, content)


def load_all(
    options: argparse.Namespace, path: Path | None = None, state: dict[str, Any] | None = None
) -> Parts:
    """Load what a run needs: from its saved state, or from `--bert_model` for a new run. From here on,
    random numbers follow from the seed."""
    seed_everything(options.seed)
    if path and state:
        model, tokenizer, _ = model_from_checkpoint(state, path)
        tagger, source = checkpoint.find_tagger(state.get("tags"), path, options), str(path)
    else:
        start, tokenizer, tagger = load_start(options)
        seed_everything(options.seed)  # an encoder without a pooler has drawn one
        model, source = new_model(start, options), options.bert_model
    max_length = checked_max_length(options.max_length, source, model.bert.config, tokenizer)
    data = load_data(options, tokenizer, max_length, SPLITS, tagger)
    return Parts(model, tokenizer, tagger, data, options)


def new_model(start: BertModel | MultitaskBERT, options: argparse.Namespace) -> MultitaskBERT:
    """Make the model of a new run, with random heads, from what `load_start` has loaded."""
    if options.hidden_dropout_prob is not None:
        set_dropout(start, options.hidden_dropout_prob)
    if isinstance(start, MultitaskBERT):
        return with_heads_of(start, options)
    learned = options.loss_weights == "learned"
    return MultitaskBERT(with_experts(start, options.moe), options.tasks, learned)


def load_start(
    options: argparse.Namespace,
) -> tuple[BertModel | MultitaskBERT, BertTokenizer, Tagger | None]:
    """Load the encoder that `--bert_model` names, or the model that `--init_from` names."""
    if options.init_from:
        return load_from_run(options)
    source, local = options.bert_model, options.local_files_only
    overrides: dict[str, Any] = {}
    tagger = None
    if options.additional_input:
        tagger = Tagger(Pipeline.find(options.spacy_model), options.cache_dir)
        overrides["num_pos_tags"] = len(tagger.pipeline.pos_labels)
        overrides["num_ner_tags"] = len(tagger.pipeline.ner_labels)
    bert = BertModel.from_pretrained(source, local, **overrides)
    checkpoint.check_encoder(bert, source, tagger, options.tasks, options.moe)
    return bert, BertTokenizer.from_pretrained(source, local), tagger


def load_from_run(
    options: argparse.Namespace,
) -> tuple[MultitaskBERT, BertTokenizer, Tagger | None]:
    """Load the model that `--init_from` names."""
    path = options.init_from
    content = checkpoint.read_checkpoint(path)
    for flag in ("moe", "additional_input"):
        if (own := content["options"].get(flag)) != getattr(options, flag):
            value = "" if own is True else f" {own}"
            how = (
                f"with --{flag}{value}; give the same" if own else f"without --{flag}; leave it out"
            )
            raise UserError(f"{path}: was trained {how}")
    trained, tokenizer, _ = model_from_checkpoint(content, path)
    checkpoint.check_pairs(trained.bert.config, path, options.tasks)
    return trained, tokenizer, checkpoint.find_tagger(content["tags"], path, options)


def with_heads_of(trained: MultitaskBERT, options: argparse.Namespace) -> MultitaskBERT:
    """Return a model with this encoder, and new heads where its own do not fit the tasks."""
    model = MultitaskBERT(trained.bert, options.tasks, options.loss_weights == "learned")
    model.attention_layer.load_state_dict(trained.attention_layer.state_dict())
    names: dict[bool, list[str]] = {True: [], False: []}  # of heads: are they kept?
    joint = model.joint_heads, trained.joint_heads, " in one sequence"
    for heads, others, what in ((model.heads, trained.heads, ""), joint):
        for name, head in heads.items():
            fits = name in others and checkpoint.same_shapes(head, others[name])
            hint = "" if fits else checkpoint.other_encoding(name, trained.tasks, model.tasks)
            names[fits].append(name + what + hint)
            if fits:
                head.load_state_dict(others[name].state_dict())
    kept, new = (", ".join(names[are_kept]) or "none" for are_kept in (True, False))
    print(f"{options.init_from}: encoder, pooling and heads kept: {kept}; new heads: {new}")
    return model


# ------------------------------------------------------------------------------------- evaluation


class Trained(NamedTuple):
    """A trained model with what its evaluation needs."""

    model: MultitaskBERT
    tokenizer: BertTokenizer
    tagger: Tagger | None
    content: dict[str, Any]  # of the checkpoint
    options: argparse.Namespace  # those left open are as in training


def load_trained(path: str, options: argparse.Namespace) -> Trained:
    """Load a checkpoint for those of the options' tasks that it knows."""
    model, tokenizer, content = load_checkpoint(path)
    trained = content["options"]
    if content.get("tags") is not None and options.spacy_model is None:
        options = changed_options(options, spacy_model=trained["spacy_model"])
    tagger = checkpoint.find_tagger(content.get("tags"), path, options)
    asked = options.max_length or trained["max_length"]
    options = changed_options(
        options,
        tasks={name: task for name, task in trained["tasks"].items() if name in options.tasks},
        max_length=checked_max_length(asked, path, model.bert.config, tokenizer),
        both_orders=options.both_orders or trained["both_orders"],
        precision=(
            trained.get("precision", "auto") if options.precision == "auto" else options.precision
        ),
    )
    return Trained(model, tokenizer, tagger, content, options)


def outputs_of_models(
    members: Sequence[Trained], split: str, device: torch.device
) -> dict[str, evaluation.Outputs]:
    """Return the mean outputs of the models that know a task: task -> outputs."""
    datasets: dict[str, TaskDataset] = {}
    outputs: dict[str, list[Tensor]] = defaultdict(list)
    for model, tokenizer, tagger, _, options in members:
        data = load_data(options, tokenizer, options.max_length, (split,), tagger)[split]
        model.to(device)
        for name, dataset in data.items():
            datasets.setdefault(name, dataset)
            cost = options.batch_size, options.precision
            outputs[name].append(evaluation.outputs(model, dataset, *cost))
    return {
        name: evaluation.Outputs(dataset, evaluation.average(dataset.task, outputs[name]))
        for name, dataset in datasets.items()
    }


def evaluate_only(options: argparse.Namespace) -> evaluation.Scores:
    """Do `--evaluate`: print the dev scores of a checkpoint or of the mean of several, write the
    predictions, return the scores."""
    device = pick_device(options.use_gpu)
    members = [load_trained(path, options) for path in options.evaluate]
    first, *others = (Path(path).stem for path in options.evaluate)
    run = f"{first}+{len(others)}" if others else first
    options = checkpoint.name_predictions(options, run)
    checkpoint.check_outputs(options)
    with checkpoint.lock_predictions(options):
        results = {
            split: {
                name: evaluation.Evaluation.of(*of_task)
                for name, of_task in outputs_of_models(members, split, device).items()
            }
            for split in ("dev", "test")
        }
        pairs = zip(options.evaluate, members, strict=True)
        epochs = [f"{path} (epoch {member.content['epoch']})" for path, member in pairs]
        scores, _ = evaluation.show_results(results, ", ".join(epochs), options, {})
        checkpoint.link_latest(options)
        return scores


# ------------------------------------------------------------------------------------------- main


def run(argv: list[str]) -> None:
    """Do what the flags ask for."""
    join_processes()
    with one_first_on_each_node():
        options = checkpoint.options_of(argv)
    if options.evaluate:
        evaluate_only(options)
    elif options.hpo:
        start_search(argv)
    else:
        train_multitask(options)
    leave_processes()


def start_search(argv: list[str]) -> None:
    """Replace this process by hpo.py, which imports Ray and calls this file's functions."""
    if n_processes() > 1:
        raise UserError("--hpo: start it without torchrun; Ray runs the trials")
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-u", str(ROOT / "hpo.py"), *argv])


def main(argv: list[str] | None = None) -> int:
    flags = sys.argv[1:] if argv is None else argv
    advice = "lower --batch_size (with --grad_accumulation, for the same steps) or --max_length"
    return exit_status(lambda: run(flags), advice, "nothing new was saved")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # from here on main() handles it
    signal.signal(signal.SIGTERM, terminate)
    sys.exit(main())
