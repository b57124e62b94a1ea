"""Answers of trained models from Python: `Predictor`, which predict.py uses too."""

import dataclasses
import reprlib
import types
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from batches import Batch, evaluation_batches
from checkpoint import options_to_evaluate
from datasets import JointColumn, TokenColumn, columns_of, tokenize_cached
from evaluation import average
from flags import PRECISIONS
from multitask_classifier import Trained, load_trained
from options import changed_options
from tasks import Task, combine
from utils import UserError, autocast, did_you_mean, pick_device

DIGITS = 6
LONGEST = 100_000  # bytes of a text: more than any encoder has positions for

Texts = list[tuple[str, ...]]  # sentences and pairs
Entries = dict[str, Any]  # name -> value; {"error": reason} where there is no answer
Progress = Callable[[int], object]  # is told how many more texts have been answered
# What a tokenizer and a tagger made of texts: word pieces and lengths.
Pieces = dict[tuple[Any, ...], tuple[np.ndarray, np.ndarray]]


@dataclasses.dataclass
class TextRows:
    """Sentences or pairs in memory, as rows for `collate`."""

    task: Task
    columns: list[TokenColumn | JointColumn]
    cut: np.ndarray  # [n_rows] bool: whether a sentence was too long

    def __post_init__(self) -> None:
        self.n_tokens = np.sum([column.lengths for column in self.columns], axis=0)  # [n_rows]
        self.labels = np.full(len(self.cut), np.nan)


class Answer(types.SimpleNamespace):
    """The answers to a text by the titles of the tasks: the name of a class (of two classes the
    probability of the second one) or a number; and in `probabilities` title -> class -> probability.
    Only `error`, the reason, for a text that is empty or too long."""


class Predictor:
    """A checkpoint's model, or several as one, which answer like they did in training.

        model = Predictor("models/RUN.pt")
        model.predict(["A clever film.", ("How old are you?", "What is your age?")])

    Args:
        checkpoints: a path, a pattern such as "models/*.pt", or several of them. Their probabilities and
            numbers are averaged; a task is answered by those that know it.
        tasks: name of the one that answers, or names; default: all.
        precision: "float32", "bfloat16", "float16" or "auto", that of training.
        both_orders: read each pair in both orders also where training did not.
        spacy_model: the pipeline of models with tags, if it has moved since.
        cache_dir: where tags are kept for the next time; None: they are not kept.

    Raises:
        UserError: a checkpoint cannot be used, or none was trained on one of the tasks.
    """

    def __init__(
        self,
        checkpoints: str | Path | Sequence[str | Path],
        *,
        tasks: str | Sequence[str] | None = None,
        use_gpu: bool = False,
        precision: str = "auto",
        batch_size: int = 64,
        both_orders: bool = False,
        spacy_model: str | None = None,
        cache_dir: str | None = None,
    ):
        self.device = pick_device(use_gpu)
        paths = [checkpoints] if isinstance(checkpoints, str | Path) else checkpoints
        if not paths:
            raise UserError("no checkpoint is given")
        if precision not in PRECISIONS:
            raise UserError(f"precision {precision!r}: must be one of {', '.join(PRECISIONS)}")
        tasks = [tasks] if isinstance(tasks, str) else tasks
        options = options_to_evaluate([], list(map(str, paths)))
        if untrained := [name for name in tasks or [] if name not in options.tasks]:
            hint = did_you_mean(untrained[0], options.tasks)
            raise UserError(f"the models were not trained on {untrained[0][:40]!r}{hint}")
        asked = changed_options(
            options,
            tasks={n: task for n, task in options.tasks.items() if n in (tasks or options.tasks)},
            precision=precision,
            batch_size=batch_size,
            both_orders=both_orders,
            spacy_model=spacy_model,
            cache_dir=cache_dir,
        )
        self.tasks = asked.tasks
        members = [Member(load_trained(path, asked), self.device) for path in asked.evaluate]
        self.members = [member for member in members if member.tasks]
        if both_orders and not any(task.takes_both_orders for task in self.tasks.values()):
            raise UserError("both_orders: no task reads a pair as one sequence without an order")
        self.max_length = min(member.max_length for member in self.members)

    def tasks_for(self, n_sentences: int) -> list[str]:
        """Return the tasks that take one sentence, or two."""
        return [name for name, task in self.tasks.items() if len(task.sentences) == n_sentences]

    @property
    def titles(self) -> str:
        return " and ".join(task.title for task in self.tasks.values())

    def refusal(self, sentences: tuple[str, ...]) -> str | None:
        """Return why no task takes so many sentences; None if one does."""
        if self.tasks_for(len(sentences)):
            return None
        what = "one sentence" if len(sentences) == 1 else "two sentences"
        return f"{what}, where only {self.titles} can be answered"

    def predict(self, texts: Sequence[str | tuple[str, str]]) -> list[Answer]:
        """Answer sentences and pairs, in the same order. Raises UserError for a text that no task takes."""
        tuples = read_texts(texts)
        for number, sentences in enumerate(tuples):
            if problem := self.refusal(sentences):
                raise UserError(f"texts[{number}] has {problem}")
        problems = [text_problem(sentences) for sentences in tuples]
        good = [text for text, problem in zip(tuples, problems, strict=True) if not problem]
        found = iter(self.answers(good))
        answers = [{"error": problem} if problem else next(found) for problem in problems]
        return [name_classes(answer, self.tasks.values()) for answer in answers]

    @torch.no_grad()
    def embed(self, sentences: Sequence[str]) -> np.ndarray:
        """Return the vectors of sentences [n_sentences, hidden]. Raises UserError with several models,
        whose vectors have nothing to do with each other."""
        texts = read_texts(sentences)
        if any(len(text) > 1 for text in texts):
            raise UserError("only sentences have vectors, not pairs")
        if len(self.members) > 1:
            raise UserError("several models have no common vectors; take one of them")
        (member,) = self.members
        rows = member.rows([], texts, {})
        vectors = np.empty((len(texts), member.model.bert.config.hidden_size), np.float32)
        with autocast(self.device, member.precision):
            for batch in evaluation_batches(rows, member.batch_size):
                found = member.model.vectors(batch.to(self.device))
                vectors[batch.rows[rows.task.name]] = found.float().cpu().numpy()
        return vectors

    def answers(self, texts: Texts, progress: Progress = lambda n: None) -> list[Entries]:
        """Answer sentences and pairs with all tasks for them, in the same order.

        Returns:
            by the titles of the tasks: the probability of the second class of two; of more classes the
            label, and in TITLE_probabilities all probabilities; or the number. `cut` is true where a
            sentence was too long.
        """
        answers: list[Entries] = [{} for _ in texts]
        for n_sentences in (1, 2):
            if rows := [row for row, text in enumerate(texts) if len(text) == n_sentences]:
                names = self.tasks_for(n_sentences)
                found = self._answer(names, [texts[row] for row in rows], progress)
                for row, answer in zip(rows, found, strict=True):
                    answers[row] = answer
        return answers

    def _answer(self, names: list[str], texts: Texts, progress: Progress) -> list[Entries]:
        """Answer texts that all have as many sentences as these tasks take."""
        outputs, cut = defaultdict(list), np.zeros(len(texts), bool)
        pieces: Pieces = {}
        asked = [(m, [n for n in names if n in m.tasks]) for m in self.members]
        asked = [(member, own) for member, own in asked if own]
        for member, own in asked:
            rows = member.rows(own, texts, pieces)
            last = member is asked[-1][0]
            for name, output in member.outputs(own, rows, progress if last else None).items():
                outputs[name].append(output)
            cut |= rows.cut
        answers: list[Entries] = [{} for _ in texts]
        for name, of_members in outputs.items():
            entries = read_outputs(self.tasks[name], average(self.tasks[name], of_members))
            answers = [answer | entry for answer, entry in zip(answers, entries, strict=True)]
        for row in np.flatnonzero(cut):
            answers[row]["cut"] = True
        return answers


class Member:
    """One of the models of a `Predictor`."""

    def __init__(self, trained: Trained, device: torch.device):
        self.model, self.tokenizer, self.tagger, _, options = trained
        self.model.to(device).eval()
        self.device, self.tasks = device, options.tasks
        self.max_length, self.batch_size = options.max_length, options.batch_size
        self.precision, self.both_orders = options.precision, options.both_orders
        pipeline = self.tagger.pipeline if self.tagger else None
        self.tokenizes_like = self.tokenizer.to_json(), self.max_length, pipeline

    def rows(self, names: list[str], texts: Texts, pieces: Pieces) -> TextRows:
        """Make each column that one of the tasks needs once: sentences one by one, then both as one
        sequence. `pieces` keeps what members with equal tokenizers share."""
        sentences = [text for column in zip(*texts, strict=True) for text in column]
        if self.tokenizes_like not in pieces:
            pieces[self.tokenizes_like] = tokenize_cached(
                sentences, self.tokenizer, self.max_length, None, "", self.tagger
            )
        found, lengths = pieces[self.tokenizes_like]
        separate = columns_of(found, lengths, len(texts[0]) if texts else 1)
        cut = np.any(self._too_long(sentences, lengths).reshape(len(separate), -1), axis=0)
        both_orders = self.both_orders and any(self.tasks[name].takes_both_orders for name in names)
        if both_orders:
            first, second = separate
            separate = [first.followed_by(second), second.followed_by(first)]
        columns: list[TokenColumn | JointColumn] = [*separate]
        encodings = {self.tasks[name].encoding for name in names}
        if encodings - {"bi"}:
            first, second = separate
            joint = JointColumn.of(first, second, self.max_length)
            was_cut = joint.lengths < first.lengths + second.lengths - 1
            cut |= was_cut[: len(texts)]
            columns = [joint] if encodings == {"cross"} else [first, second, joint]
        # Whose rows they are does not matter: each task takes its columns of a batch.
        return TextRows(next(iter(self.tasks.values())), columns, cut)

    @torch.no_grad()
    def outputs(
        self, names: list[str], rows: TextRows, progress: Progress | None
    ) -> dict[str, Tensor]:
        """Return the outputs of each task [n_texts, ...]; where the rows have both orders of a pair,
        averaged over them if the task's order does not count."""
        found: dict[str, list[Tensor]] = defaultdict(list)
        order = []
        with autocast(self.device, self.precision):
            for batch in evaluation_batches(rows, self.batch_size):
                order.append(batch.rows[rows.task.name])
                outputs = self.model(self._with_columns(batch, names).to(self.device))
                for name, output in outputs.items():
                    found[name].append(output.float().cpu())
                if progress:
                    progress(int(np.count_nonzero(order[-1] < len(rows.cut))))
        places = torch.from_numpy(np.argsort(np.concatenate(order)))
        in_order = {name: torch.cat(parts)[places] for name, parts in found.items()}
        halves = {name: [*output.split(len(rows.cut))] for name, output in in_order.items()}
        return {
            name: combine(task, halves[name] if task.takes_both_orders else halves[name][:1])
            for name, task in self.tasks.items()
            if name in names
        }

    def _too_long(self, sentences: list[str], lengths: np.ndarray) -> np.ndarray:
        """Return which sentences would have more word pieces without the limit, [n_sentences] bool."""
        too_long = np.zeros(len(sentences), bool)
        full = np.flatnonzero(lengths == self.max_length)
        _, longer = self.tokenizer.packed_ids([sentences[i] for i in full], self.max_length + 1)
        too_long[full] = longer > self.max_length
        return too_long

    def _with_columns(self, batch: Batch, names: list[str]) -> Batch:
        """Give each task its columns among those of the batch, which has them for one task only."""
        (slices,) = batch.columns.values()
        by_encoding = {"bi": slices[:2], "cross": slices[-1:], "both": slices}
        columns = {name: by_encoding[self.tasks[name].encoding] for name in names}
        return dataclasses.replace(batch, columns=columns)


def read_texts(texts: Iterable[Any]) -> Texts:
    """Return sentences and pairs as tuples. Raises UserError if this is no list of them."""
    if isinstance(texts, str | tuple) or not isinstance(texts, Iterable):
        raise UserError("give a list of texts, such as [sentence] or [(sentence, sentence)]")
    tuples = []
    for number, text in enumerate(texts):
        sentences = text if isinstance(text, tuple | list) and len(text) == 2 else [text]
        if not all(isinstance(sentence, str) for sentence in sentences):
            what = "give one sentence (a str) or a pair (two str)"
            raise UserError(f"texts[{number}] is {reprlib.repr(text)}; {what}")
        tuples.append(tuple(sentences))
    return tuples


def text_problem(sentences: tuple[str, ...]) -> str | None:
    """Return why there is no answer to a text, whatever the tasks; None if there is one."""
    if not any(sentence.strip() for sentence in sentences):
        return "empty"
    try:
        length = len("\t".join(sentences).encode())
    except UnicodeEncodeError:
        return "not UTF-8 text"
    return f"longer than {LONGEST} bytes" if length > LONGEST else None


def name_classes(answer: Entries, tasks: Collection[Task]) -> Answer:
    """Replace labels by the names of their classes."""
    named, probabilities = {}, {}
    for task in tasks:
        if (value := answer.get(task.title)) is None:
            continue
        if shares := answer.get(f"{task.title}_probabilities"):
            probabilities[task.title] = dict(zip(task.classes, shares, strict=True))
            value = task.classes[task.texts.index(str(value))]
        named[task.title] = value
    others = {key: answer[key] for key in ("cut", "error") if key in answer}
    return Answer(**named, **({"probabilities": probabilities} if probabilities else {}), **others)


def read_outputs(task: Task, outputs: Tensor) -> list[Entries]:
    """Read a head's outputs [B, classes] or [B] as entries of B answers."""
    if not task.classes:
        values = task.decode(outputs).tolist()
        return [{task.title: round(value, DIGITS)} for value in values]
    probabilities = outputs.softmax(dim=-1).tolist()
    rounded = [[round(share, DIGITS) for share in row] for row in probabilities]
    if len(task.classes) == 2:
        return [{task.title: yes} for _, yes in rounded]
    key, texts = f"{task.title}_probabilities", map(task.show, task.decode(outputs).tolist())
    # "01" stays a text.
    labels = [int(text) if text.isdecimal() and str(int(text)) == text else text for text in texts]
    return [{task.title: label, key: row} for label, row in zip(labels, rounded, strict=True)]
