"""Rows to packed batches."""

import dataclasses
import heapq
from collections.abc import Collection, Iterator

import numpy as np
import torch
from torch import Tensor, nn

from datasets import TaskDataset, joint_lengths
from tasks import TASKS
from utils import seeded_generator

NO_SECOND = 2**31  # where the second sentence of a sequence begins that has none


@dataclasses.dataclass
class Batch:
    """Rows of one or more tasks, packed for one pass through the encoder.

    The sequences stand shortest first, so that those of equal length are neighbours. `places`
    brings their vectors back into the order in which `columns` names them: task by task, sentence
    column by sentence column, row by row.
    """

    input_ids: Tensor  # [n_tokens]
    tags: Tensor | None  # [2, n_tokens] part-of-speech and named-entity ids, where there are any
    position_ids: Tensor  # [n_tokens]
    token_type_ids: Tensor | None  # [n_tokens] 1 in the second sentence of a sequence, else 0
    lengths: list[int]  # [n_sequences]; stays on the host, so reading it never waits for a GPU
    places: Tensor  # [n_sequences]
    columns: dict[str, list[slice]]  # task -> where its sentence columns stand after `places`
    labels: dict[str, Tensor]  # task -> [n_rows]
    rows: dict[str, np.ndarray]  # task -> [n_rows] row numbers in the task's dataset
    step_rows: dict[
        str, int
    ]  # task -> rows of the optimizer step, in all its batches and processes
    picks: dict[str, np.ndarray]  # task -> [n_rows] which of them these are

    def to(self, device: torch.device) -> "Batch":
        def move(tensor):
            if device.type == "cuda":  # pinned memory makes the copy asynchronous
                tensor = tensor.pin_memory()
            return tensor.to(device, non_blocking=True)

        return dataclasses.replace(
            self,
            input_ids=move(self.input_ids),
            tags=None if self.tags is None else move(self.tags),
            position_ids=move(self.position_ids),
            token_type_ids=None if self.token_type_ids is None else move(self.token_type_ids),
            places=move(self.places),
            labels={name: move(labels) for name, labels in self.labels.items()},
        )


def collate(
    parts: dict[str, tuple[TaskDataset, np.ndarray]],
    step_rows: dict[str, int] | None = None,
    picks: dict[str, np.ndarray] | None = None,
    twice: Collection[str] = (),
) -> Batch:
    """Pack the given rows of each task's dataset into one batch, which by default is all that one
    optimizer step sees. Tasks that are to go through the model `twice` have their columns twice."""
    n_rows = {name: len(rows) for name, (_, rows) in parts.items()}
    sequences, firsts, columns, labels = [], [], {}, {}
    for name, (dataset, rows) in parts.items():
        columns[name] = []
        for column in dataset.columns * (2 if name in twice else 1):
            columns[name].append(slice(len(sequences), len(sequences) + len(rows)))
            sequences.extend(column.row(row) for row in rows)
            joint = column.first_lengths is not None
            firsts.extend(column.first_lengths[rows] if joint else [NO_SECOND] * len(rows))
        dtype = torch.long if dataset.task.num_classes else torch.float32
        values = np.nan_to_num(dataset.labels[rows], nan=-1)  # -1: no label, never in training
        labels[name] = torch.from_numpy(values).to(dtype)
    lengths = np.array([sequence.shape[1] for sequence in sequences])
    order = np.argsort(lengths, kind="stable")
    places = np.argsort(order)
    positions = np.concatenate([np.arange(lengths[index]) for index in order])
    types = positions >= np.repeat(np.array(firsts)[order], lengths[order])
    pieces = np.concatenate([sequences[index] for index in order], axis=1)  # [1 or 3, n_tokens]
    input_ids, *tags = torch.from_numpy(pieces.astype(np.int64))
    return Batch(
        input_ids=input_ids,
        tags=torch.stack(tags) if tags else None,
        position_ids=torch.from_numpy(positions),
        token_type_ids=torch.from_numpy(types.astype(np.int64)) if types.any() else None,
        lengths=lengths[order].tolist(),
        places=torch.from_numpy(places),
        columns=columns,
        labels=labels,
        rows={name: rows for name, (_, rows) in parts.items()},
        step_rows=step_rows or n_rows,
        picks=picks or {name: np.arange(n) for name, n in n_rows.items()},
    )


class EpochSampler:
    """Draws a task's rows without replacement until they are used up, then reshuffles.

    What one epoch leaves over, the next one starts with.
    """

    def __init__(self, n_rows: int, seed: int | list[int]):
        self.n_rows = n_rows
        self.generator = np.random.default_rng(seed)
        self.remaining = np.empty(0, np.int64)

    def draw(self, samples: int) -> np.ndarray:
        """Row numbers [samples]."""
        drawn = []
        while samples > 0:
            if not len(self.remaining):
                self.remaining = self.generator.permutation(self.n_rows)
            drawn.append(self.remaining[:samples])
            self.remaining = self.remaining[samples:]
            samples -= len(drawn[-1])
        return np.concatenate(drawn)

    def state_dict(self) -> dict:
        """For `torch.save`; `load_state_dict` goes on from there."""
        state = self.generator.bit_generator.state
        return {"generator": state, "remaining": self.remaining.tolist()}

    def load_state_dict(self, state: dict) -> None:
        self.generator.bit_generator.state = state["generator"]
        self.remaining = np.array(state["remaining"], np.int64)


def training_windows(
    datasets: dict[str, TaskDataset],
    samplers: dict[str, EpochSampler],
    samples_per_epoch: int,
    batch_size: int,
    grad_accumulation: int,
    rank: int = 0,
    n_processes: int = 1,
    shares: dict[str, float] | None = None,
    twice: Collection[str] = (),
) -> Iterator[list[Batch]]:
    """One epoch: for each optimizer step, the batches whose gradients it adds up. Of `n_processes`
    that share the rows of each batch, the one of this `rank` gets its own; it may get none. With
    `shares`, a task has so many times the rows that the other arguments say."""

    def place(name: str, row: int) -> int:
        return round(shares[name] * row) if shares else row

    drawn = {name: samplers[name].draw(place(name, samples_per_epoch)) for name in datasets}
    window_size = batch_size * grad_accumulation
    for window in range(0, samples_per_epoch, window_size):
        end = min(window + window_size, samples_per_epoch)
        step_rows = {name: place(name, end) - place(name, window) for name in datasets}
        batches = []
        for start in range(window, end, batch_size):
            stop = min(start + batch_size, end)
            chosen = {name: drawn[name][place(name, start) : place(name, stop)] for name in drawn}
            n_tokens = {name: dataset.n_tokens[chosen[name]] for name, dataset in datasets.items()}
            mine = {
                n: each for n, each in deal_out(n_tokens, n_processes)[rank].items() if len(each)
            }
            parts = {name: (datasets[name], chosen[name][mine[name]]) for name in mine}
            picks = {n: place(n, start) - place(n, window) + each for n, each in mine.items()}
            batches += [collate(parts, step_rows, picks, twice)] if parts else []
        yield batches


def deal_out(n_tokens: dict[str, np.ndarray], n_shares: int) -> list[dict[str, np.ndarray]]:
    """Deal each task's rows out into shares of about as many tokens: the longest rows first, each
    to the share that has the fewest tokens so far (Graham 1969, "Bounds on multiprocessing timing
    anomalies").

    Args:
        n_tokens: task -> [n_rows] numbers of tokens.

    Returns:
        of each share, task -> which of the rows it has, in order.
    """
    if n_shares == 1:
        return [{name: np.arange(len(each)) for name, each in n_tokens.items()}]
    rows = [(n, name, row) for name, each in n_tokens.items() for row, n in enumerate(each)]
    shares = [{name: [] for name in n_tokens} for _ in range(n_shares)]
    loads = [(0, share) for share in range(n_shares)]
    for n, name, row in sorted(rows, key=lambda each: -each[0]):
        load, share = loads[0]
        heapq.heapreplace(loads, (load + n, share))
        shares[share][name].append(row)
    return [
        {name: np.array(sorted(each), np.int64) for name, each in share.items()} for share in shares
    ]


def evaluation_batches(
    dataset: TaskDataset, batch_size: int, rank: int = 0, n_processes: int = 1
) -> Iterator[Batch]:
    """Every row once, longest first: what would not fit into memory fails at the start. Of
    `n_processes`, each gets every n-th batch.

    The first batch has `batch_size` rows, each later one as many as have no more tokens in all.
    """
    order = np.argsort(-dataset.n_tokens, kind="stable")
    ends = np.cumsum(dataset.n_tokens[order])  # tokens up to and with each row
    start, budget, chunks = 0, ends[:batch_size][-1], []
    while start < len(order):
        tokens_before = ends[start - 1] if start else 0
        end = np.searchsorted(ends, tokens_before + budget, side="right")
        chunks.append(order[start:end])
        start = end
    for chunk in chunks[rank::n_processes]:
        yield collate({dataset.task.name: (dataset, chunk)})


def step_noise(batch: Batch, name: str, seed: tuple[int, ...]) -> Tensor:
    """N(0, 1) for this batch's rows of a task, [n_rows, width of the outputs], of what is drawn for
    all rows of the step."""
    generator = seeded_generator(torch.device("cpu"), *seed, list(TASKS).index(name))
    noise = torch.randn(batch.step_rows[name], TASKS[name].num_classes or 1, generator=generator)
    return noise[batch.picks[name]]


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
