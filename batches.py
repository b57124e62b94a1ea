"""Rows to packed batches: which rows an epoch draws, which batches a step sees, and `collate`."""

import argparse
import dataclasses
import zlib
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from attention import Sequences
from bert import Tokens
from datasets import JointColumn, TaskDataset, TokenColumn, joint_lengths
from tasks import Task
from utils import seeded_generator

# Devices whose host has time, while they compute, to prepare batches and to write checkpoints.
WORK_IN_THREADS = {"cuda"}
# Larger than any position: the sequence has no second sentence.
NO_SECOND = 2**31


class Rows(Protocol):
    """The part of a dataset that a batch needs."""

    task: Task
    columns: list[TokenColumn | JointColumn]
    labels: np.ndarray  # [n_rows]
    n_tokens: np.ndarray  # [n_rows]; of the columns, which may have each row twice


@dataclasses.dataclass
class Batch:
    """Rows of one or more tasks, packed for one pass through the encoder.

    The shortest sequences come first, so that sequences of equal length are neighbours. Indexing
    with `places` restores the order of `columns`: task by task, sentence column by sentence column,
    row by row.
    """

    input_ids: Tensor  # [N]
    tags: Tensor | None  # [2, N] part-of-speech and named-entity ids
    position_ids: Tensor  # [N]
    token_type_ids: Tensor | None  # [N] 1 in the second sentence of a sequence, else 0
    lengths: list[int]  # [B]; on the host, so that reading them never waits for a GPU
    places: Tensor  # [B]
    # task -> its sentence columns, in the order that `places` gives
    columns: dict[str, list[slice]]
    labels: dict[str, Tensor]  # task -> [n_rows]
    rows: dict[str, np.ndarray]  # task -> [n_rows] row numbers in the task's dataset
    step_rows: dict[str, int]  # task -> rows of the optimizer step, in all batches and processes
    picks: dict[str, np.ndarray]  # task -> [n_rows] which rows of the step are in this batch
    sequences: Sequences | None = None  # for a CUDA graph, which reads the lengths on the device

    def to(self, device: torch.device) -> "Batch":
        """Copy the tensors to the device."""

        def move(tensor: Tensor) -> Tensor:
            # From pinned memory the copy is asynchronous.
            if device.type == "cuda" and not tensor.is_cuda:
                tensor = tensor.pin_memory()
            return tensor.to(device, non_blocking=True)

        moved: dict[str, Any] = {n: move(v) for n, v in vars(self).items() if isinstance(v, Tensor)}
        moved["labels"] = {name: move(labels) for name, labels in self.labels.items()}
        return dataclasses.replace(self, **moved)

    def tokens(self, second_derivative: bool = False) -> Tokens:
        """Return what the encoder reads. With `second_derivative` the pass is slower, and its result
        can be differentiated twice."""
        sequences = self.sequences or Sequences.of(
            self.lengths, self.input_ids.device, second_derivative
        )
        return Tokens(self.input_ids, self.position_ids, sequences, self.token_type_ids, self.tags)


def collate(
    parts: Mapping[str, tuple[Rows, np.ndarray]],
    step_rows: dict[str, int] | None = None,
    picks: dict[str, np.ndarray] | None = None,
    twice: Collection[str] = (),
) -> Batch:
    """Pack rows of each task's dataset into one batch.

    Args:
        parts: task -> its dataset and row numbers [n_rows].
        step_rows: task -> rows of the whole optimizer step; by default this batch is the step.
        picks: task -> [n_rows] which rows of the step these are.
        twice: tasks that go through the model twice; the batch has their columns twice.
    """
    n_rows = {name: len(rows) for name, (_, rows) in parts.items()}
    sequences: list[np.ndarray] = []
    second_starts: list[int] = []  # where the second sentence of each sequence starts
    columns: dict[str, list[slice]] = {name: [] for name in parts}
    labels = {}
    for name, (dataset, rows) in parts.items():
        for column in dataset.columns * (2 if name in twice else 1):
            columns[name].append(slice(len(sequences), len(sequences) + len(rows)))
            sequences.extend(column.row(row) for row in rows)
            firsts = column.first_lengths
            second_starts.extend([NO_SECOND] * len(rows) if firsts is None else firsts[rows])
        dtype = torch.long if dataset.task.classes else torch.float32
        # Rows without a label, which training never has, get -1.
        values = np.nan_to_num(dataset.labels[rows % len(dataset.labels)], nan=-1)
        labels[name] = torch.from_numpy(values).to(dtype)
    lengths = np.array([sequence.shape[1] for sequence in sequences])
    order = np.argsort(lengths, kind="stable")
    positions = np.concatenate([np.arange(lengths[index]) for index in order])
    types = positions >= np.repeat(np.array(second_starts)[order], lengths[order])
    pieces = np.concatenate([sequences[index] for index in order], axis=1)  # [1 or 3, N]
    input_ids, *tags = torch.from_numpy(pieces.astype(np.int64))
    return Batch(
        input_ids=input_ids,
        tags=torch.stack(tags) if tags else None,
        position_ids=torch.from_numpy(positions),
        token_type_ids=torch.from_numpy(types.astype(np.int64)) if types.any() else None,
        lengths=lengths[order].tolist(),
        places=torch.from_numpy(np.argsort(order)),
        columns=columns,
        labels=labels,
        rows={name: rows for name, (_, rows) in parts.items()},
        step_rows=step_rows or n_rows,
        picks=picks or {name: np.arange(n) for name, n in n_rows.items()},
    )


class EpochSampler:
    """Draws the rows of a task without replacement until they are used up, then reshuffles them.

    The rows that an epoch leaves over come first in the next one. With `both_orders`, each pair comes
    once, in an order of its sentences that is drawn: as its row, or `n_rows` later.
    """

    def __init__(self, n_rows: int, seed: int | list[int], both_orders: bool = False):
        self.n_rows, self.both_orders = n_rows, both_orders
        self.generator = np.random.default_rng(seed)
        self._shuffle()

    def _shuffle(self) -> None:
        self.before_shuffle = self.generator.bit_generator.state
        self.rows = self.generator.permutation(self.n_rows)
        if self.both_orders:
            self.rows += self.n_rows * self.generator.integers(2, size=self.n_rows)
        self.n_drawn = 0

    def draw(self, samples: int) -> np.ndarray:
        """Return row numbers [samples]."""
        drawn = [self.rows[:0]]
        while samples > 0:
            if self.n_drawn == len(self.rows):
                self._shuffle()
            drawn.append(self.rows[self.n_drawn : self.n_drawn + samples])
            self.n_drawn += len(drawn[-1])
            samples -= len(drawn[-1])
        return np.concatenate(drawn)

    def state_dict(self) -> dict:
        """Return the state for `torch.save`, from which the shuffled rows follow."""
        return {"before_shuffle": self.before_shuffle, "n_drawn": self.n_drawn}

    def load_state_dict(self, state: dict) -> None:
        """Continue from a saved state."""
        self.generator.bit_generator.state = state["before_shuffle"]
        self._shuffle()
        self.n_drawn = state["n_drawn"]


def row_multiples(
    n_rows: Mapping[str, int], options: argparse.Namespace, epoch: int
) -> dict[str, float]:
    """Return how many rows of each task an epoch (and a batch) has, as multiples of
    `--samples_per_epoch` (and `--batch_size`).

    Args:
        n_rows: task -> rows of its training file.
        epoch: from 0. With `--sampling annealed`, the power of `n_rows` falls from 1 to 0.2 over the
            epochs (Stickland and Murray 2019, arXiv 1902.02671, section 3.1).
    """
    annealed = 1 - 0.8 * epoch / max(options.epochs - 1, 1)
    power = {"equal": 0.0, "sqrt": 0.5, "proportional": 1.0, "annealed": annealed}[options.sampling]
    fixed = {name: task.samples for name, task in options.tasks.items() if task.samples}
    sizes = {name: n**power for name, n in n_rows.items() if name not in fixed}
    multiples = {name: size * len(sizes) / sum(sizes.values()) for name, size in sizes.items()}
    multiples |= {name: n / options.samples_per_epoch for name, n in fixed.items()}
    return {name: multiples[name] * options.batch_shares[name] for name in n_rows}


def ahead(windows: Iterator[list[Batch]], device: torch.device) -> Iterator[list[Batch]]:
    """Yield windows on the device. For a GPU, a thread makes the next one and copies it meanwhile."""

    def take() -> list[Batch] | None:
        window = next(windows, None)
        return window and [batch.to(device) for batch in window]

    if device.type not in WORK_IN_THREADS:
        yield from iter(take, None)
        return
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(take)
        while (window := coming.result()) is not None:
            coming = pool.submit(take)
            yield window


def training_windows(
    datasets: Mapping[str, TaskDataset],
    samplers: Mapping[str, EpochSampler],
    samples_per_epoch: int,
    batch_size: int,
    grad_accumulation: int,
    *,
    rank: int = 0,
    n_processes: int = 1,
    row_multiples: Mapping[str, float] | None = None,
    twice: Collection[str] = (),
) -> Iterator[list[Batch]]:
    """Yield the batches of one epoch, one list for each optimizer step.

    Args:
        rank: number of this process. The processes share the rows of each batch; a process may get
            none of them, and then the list lacks the batch.
        row_multiples: task -> factor on `samples_per_epoch` and `batch_size`; 1 by default.
        twice: tasks that go through the model twice.
    """

    def scaled(name: str, row: int) -> int:
        return round(row_multiples[name] * row) if row_multiples else row

    drawn = {name: samplers[name].draw(scaled(name, samples_per_epoch)) for name in datasets}
    window_size = batch_size * grad_accumulation
    for window in range(0, samples_per_epoch, window_size):
        window_end = min(window + window_size, samples_per_epoch)
        step_rows = {name: scaled(name, window_end) - scaled(name, window) for name in datasets}
        batches = []
        for start in range(window, window_end, batch_size):
            end = min(start + batch_size, window_end)
            chosen = {
                name: rows[scaled(name, start) : scaled(name, end)] for name, rows in drawn.items()
            }
            n_tokens = {name: dataset.n_tokens[chosen[name]] for name, dataset in datasets.items()}
            share = deal_out(n_tokens, n_processes)[rank]
            mine = {name: rows for name, rows in share.items() if len(rows)}
            if not mine:
                continue
            parts = {name: (datasets[name], chosen[name][rows]) for name, rows in mine.items()}
            offsets = {name: scaled(name, start) - scaled(name, window) for name in mine}
            # The place of each row within the step, for `step_noise`.
            picks = {name: offsets[name] + rows for name, rows in mine.items()}
            batches.append(collate(parts, step_rows, picks, twice))
        yield batches


def deal_out(n_tokens: Mapping[str, np.ndarray], n_shares: int) -> list[dict[str, np.ndarray]]:
    """Divide the rows of each task into equal shares, with about equal numbers of tokens.

    The numbers of rows only depend on how many there are, so that a CUDA graph can be replayed. The
    longest rows come first; each goes to the share with the fewest tokens so far (Graham 1969, "Bounds
    on multiprocessing timing anomalies") among those that still lack rows of its task.

    Args:
        n_tokens: task -> [n_rows] numbers of tokens.

    Returns:
        for each share, task -> the numbers of its rows, in order.
    """
    lacking, first = {}, 0  # `first` gets the next row that is left over
    for name, tokens in n_tokens.items():
        each, left_over = divmod(len(tokens), n_shares)
        lacking[name] = [each + ((s - first) % n_shares < left_over) for s in range(n_shares)]
        first += left_over
    rows = [(n, name, row) for name, tokens in n_tokens.items() for row, n in enumerate(tokens)]
    shares: list[dict[str, list[int]]] = [{name: [] for name in n_tokens} for _ in range(n_shares)]
    loads = [0] * n_shares
    for n, name, row in sorted(rows, key=lambda row: -row[0]):
        share = min((s for s in range(n_shares) if lacking[name][s]), key=loads.__getitem__)
        lacking[name][share] -= 1
        loads[share] += n
        shares[share][name].append(row)
    return [
        {name: np.array(sorted(numbers), np.int64) for name, numbers in share.items()}
        for share in shares
    ]


def evaluation_batches(
    dataset: Rows, batch_size: int, rank: int = 0, n_processes: int = 1
) -> Iterator[Batch]:
    """Yield every row once, the longest first: what does not fit into memory fails at the start.

    The first batch has `batch_size` rows; each later one has as many as have no more tokens in all.
    With several processes, each gets every n-th batch.
    """
    order = np.argsort(-dataset.n_tokens, kind="stable")
    ends = np.cumsum(dataset.n_tokens[order])  # tokens up to and including each row
    budget = ends[:batch_size].max(initial=0)
    start, chunks = 0, []
    while start < len(order):
        tokens_before = ends[start - 1] if start else 0
        end = np.searchsorted(ends, tokens_before + budget, side="right")
        chunks.append(order[start:end])
        start = end
    for chunk in chunks[rank::n_processes]:
        yield collate({dataset.task.name: (dataset, chunk)})


def step_noise(batch: Batch, task: Task, seed: tuple[int, int], head: int) -> Tensor:
    """Draw N(0, 1) noise for the batch's rows of a task and for one of its heads: [n_rows, width of the
    outputs]. It is cut from the noise for all rows of the step, and so does not depend on how the rows
    are divided, nor on the other tasks."""
    key = zlib.crc32(task.name.encode())
    generator = seeded_generator(torch.device("cpu"), *seed, key, head)
    noise = torch.randn(batch.step_rows[task.name], task.num_classes or 1, generator=generator)
    return noise[batch.picks[task.name]]


class Padded(NamedTuple):
    """A padded batch of sequences, as `BertModel.forward` takes it."""

    input_ids: Tensor  # [B, S]
    attention_mask: Tensor  # [B, S]
    token_type_ids: Tensor | None = None  # [B, S]
    tags: Tensor | None = None  # [2, B, S]


def join(first: Padded, second: Padded, longest: int) -> Padded:
    """Put the two sentences of each row into one sequence, which is cut after `longest` tokens."""
    rows = []
    for row in range(len(first.input_ids)):
        sentences = []
        for padded in (first, second):
            ids = padded.input_ids[None]
            pieces = ids if padded.tags is None else torch.cat([ids, padded.tags])
            sentences.append(pieces[:, row, padded.attention_mask[row].bool()])  # [1 or 3, n]
        one, two = sentences[0], sentences[1][:, 1:]
        n_tokens = [np.array(sentence.shape[1]) for sentence in (one, two)]
        n_one, n_two = map(int, joint_lengths(n_tokens[0], n_tokens[1], longest))
        cut = [one[:, : n_one - 1], one[:, -1:], two[:, : n_two - 1], two[:, -1:]]
        types = (torch.arange(n_one + n_two, device=one.device) >= n_one).long()
        rows.append(torch.cat([torch.cat(cut, dim=1), types[None], torch.ones_like(types)[None]]).T)
    ids, *tags, types, mask = nn.utils.rnn.pad_sequence(rows, batch_first=True).movedim(-1, 0)
    return Padded(ids, mask, types, torch.stack(tags) if tags else None)
