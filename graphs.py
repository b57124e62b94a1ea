"""The forward and backward pass of a batch as a CUDA graph, replayed in one call.

Launched one by one, the 1,300 kernels of a BERT-base step take the host longer than they take the GPU.
A graph fixes the shapes, so a batch is padded to one of a few numbers of tokens. The padding is in
sequences of its own, whose vectors nobody reads: their gradients are 0. Which sequence a token belongs
to is read on the device, so one graph serves all lengths.
"""

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from attention import Sequences
from batches import Batch
from streams import complain
from utils import one_line

BY_TOKEN = ("input_ids", "tags", "position_ids", "token_type_ids")  # of a Batch
MOST_GRAPHS = 12
UNUSED = 100  # passes after which a graph makes room for another
SHORT = 128  # tokens; below this, which kernels run does not depend on the lengths


class Pass(NamedTuple):
    """The result of a forward and backward pass, apart from the gradients in `.grad`."""

    losses: dict[str, Tensor]  # name -> scalar
    predictions: dict[str, Tensor]  # task -> [n_rows]


Work = Callable[[Batch], Pass]


def padded_size(n_tokens: int) -> tuple[int, int]:
    """Return the number of tokens with padding, and of the sequences that hold the padding.

    There are nine sizes between a number and its double. A sequence of padding has 1 to 65 tokens.
    """
    step = 2 ** max(n_tokens.bit_length() - 4, 5)
    n_sequences = max(step // 64, 1)
    return -(-(n_tokens + n_sequences) // step) * step, n_sequences


class CudaCapture:
    """Captures what is launched meanwhile, on a stream and in memory of its own."""

    def __init__(self):
        self.stream, self.pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()

    def forget(self) -> None:
        """Give later captures a new pool: that of graphs which are gone may not be used again."""
        self.pool = torch.cuda.graph_pool_handle()

    def warm_up(self, work: Callable[[], Pass]) -> Pass:
        """Do the work on the stream of later captures, as PyTorch asks."""
        current = torch.cuda.current_stream()
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            result = work()
        current.wait_stream(self.stream)
        return result

    def __call__(self, work: Callable[[], Pass]) -> tuple[Callable[[], Any], Pass]:
        """Return what replays the work, and the tensors that its results are in after each replay. Raises
        RuntimeError if the work cannot be captured."""
        graph = torch.cuda.CUDAGraph()
        generator = torch.cuda.default_generators[torch.cuda.current_device()]
        before = generator.clone_state()
        settings = graph, self.pool, self.stream
        try:
            # After a failure, PyTorch's context leaves this stream current, and the generator's state
            # in use by the capture. "thread_local": other threads copy the next batches to the GPU.
            with torch.cuda.stream(self.stream):
                with torch.cuda.graph(*settings, capture_error_mode="thread_local"):
                    result = work()
        except RuntimeError:
            generator.graphsafe_set_state(before)
            raise
        return graph.replay, result


class StepGraph:
    """The tensors that a captured pass reads, and later the graph."""

    def __init__(self, like: Batch, longest: int):
        n_tokens, self.n_padding = padded_size(len(like.input_ids))
        n_sequences = len(like.lengths) + self.n_padding
        offsets = torch.zeros(n_sequences + 1, dtype=torch.long, device=like.input_ids.device)
        # Not the true lengths, but all that choose a kernel or the size of a table.
        lengths = [longest] * n_sequences

        def empty(ids: Tensor | None) -> Tensor | None:
            return None if ids is None else ids.new_zeros(*ids.shape[:-1], n_tokens)

        self.batch = dataclasses.replace(
            like,
            **{name: empty(getattr(like, name)) for name in BY_TOKEN},  # type: ignore[arg-type]
            places=torch.empty_like(like.places),
            labels=tree_map(torch.empty_like, like.labels),
            sequences=Sequences(lengths, offsets, [], [], second_derivative=False),
        )
        self.offsets = offsets
        self.trained: list[nn.Parameter] = []  # the weights that get gradients
        self.replay: Callable[[], Any] | None = None
        self.result: Pass
        self.last_pass = 0  # number of the last pass with it
        self.read(like)

    def read(self, batch: Batch) -> None:
        """Copy a batch. Its padding keeps what was there: ids of some tokens."""
        for name in BY_TOKEN:
            if (ids := getattr(batch, name)) is not None:
                getattr(self.batch, name)[..., : ids.shape[-1]].copy_(ids)
        self.batch.places.copy_(batch.places)
        for name, labels in batch.labels.items():
            self.batch.labels[name].copy_(labels)
        n_left = len(self.batch.input_ids) - len(batch.input_ids)
        shares = [(n_left + place) // self.n_padding for place in range(self.n_padding)]
        lengths = [*batch.lengths, *shares]
        self.offsets.copy_(Sequences.of(lengths, batch.input_ids.device).offsets)


class StepGraphs:
    """The graphs of a run. A shape's first batch takes the plain way, its second is captured."""

    def __init__(self, model: nn.Module, capture: Any):
        self.model, self.capture = model, capture
        self.graphs: dict[tuple, StepGraph] = {}
        # All graphs add to the same gradients.
        self.gradients: dict[nn.Parameter, Tensor] = {}
        self.frozen: list[bool] = []
        self.works = True
        self.n_passes = 0

    @classmethod
    def of(cls, model: nn.Module, options: argparse.Namespace) -> "StepGraphs | None":
        """Return the graphs of a run, or None where `--cuda_graphs` or other flags rule them out."""
        device = next(model.parameters()).device
        # The host takes part in the choice of experts and in the projection of gradients.
        by_host = options.moe or options.gradient_surgery
        if device.type != "cuda" or options.cuda_graphs == "off" or by_host:
            return None
        return cls(model, CudaCapture())

    def run(self, batch: Batch, work: Work) -> Pass:
        """Do the work for a batch on the device: replay it where its shape is known. `work` must only
        depend on the batch, and launch the same each time."""
        if not self.works:
            return work(batch)
        self._forget_if_refrozen()
        self.n_passes += 1
        longest = max(SHORT, 2 ** (max(batch.lengths) - 1).bit_length())
        key = self._key(batch, longest)
        is_first = key not in self.graphs
        if is_first:
            self._forget_unused()
            if len(self.graphs) == MOST_GRAPHS:
                return work(batch)
            self.graphs[key] = StepGraph(batch, longest)
        graph = self.graphs[key]
        graph.last_pass = self.n_passes
        if is_first:
            return self._first_pass(graph, work)
        graph.read(batch)
        self._set_gradients(graph)
        if graph.replay is None and (problem := self._capture(graph, work)):
            self.works = False
            self.graphs.clear()
            complain(f"warning: steps are launched, not replayed: {problem}")
            return work(batch)
        assert graph.replay
        graph.replay()
        return tree_map(torch.clone, graph.result)  # the next replay writes there again

    def _capture(self, graph: StepGraph, work: Work) -> str | None:
        """Capture a pass. Return why it cannot be, as a text: the error itself holds all of the pass."""
        try:
            graph.replay, graph.result = self.capture(lambda: work(graph.batch))
        except RuntimeError as error:
            return one_line(error)
        return None

    def _key(self, batch: Batch, longest: int) -> tuple:
        rows = ((name, len(labels), batch.step_rows[name]) for name, labels in batch.labels.items())
        kinds = batch.token_type_ids is None, batch.tags is None, self.model.training
        size, _ = padded_size(len(batch.input_ids))
        return size, len(batch.lengths), longest, kinds, tuple(rows)

    def _forget_unused(self) -> None:
        """Make room for shapes of later epochs: the numbers of rows can change from epoch to epoch."""
        since = self.n_passes - UNUSED
        self.graphs = {key: g for key, g in self.graphs.items() if g.last_pass >= since}
        if not any(graph.replay for graph in self.graphs.values()):
            self.capture.forget()

    def _forget_if_refrozen(self) -> None:
        frozen = [not parameter.requires_grad for parameter in self.model.parameters()]
        if frozen != self.frozen:
            self.frozen = frozen
            self.graphs.clear()
            self.capture.forget()
            self.gradients.clear()

    def _first_pass(self, graph: StepGraph, work: Work) -> Pass:
        """Launch a pass, and note which weights get gradients from it."""
        parameters = list(self.model.parameters())
        before = [parameter.grad for parameter in parameters]
        for parameter in parameters:
            parameter.grad = None
        result = self.capture.warm_up(lambda: work(graph.batch))
        graph.trained = [parameter for parameter in parameters if parameter.grad is not None]
        for parameter, gradient in zip(parameters, before, strict=True):
            if gradient is not None:
                own = parameter.grad
                parameter.grad = gradient if own is None else gradient + own
        return result

    def _set_gradients(self, graph: StepGraph) -> None:
        """Make `.grad` of the graph's weights the tensors to which it adds."""
        for parameter in graph.trained:
            if parameter not in self.gradients:
                self.gradients[parameter] = torch.empty_like(parameter)
        fresh = [self.gradients[p] for p in graph.trained if p.grad is None]
        if fresh:
            torch._foreach_zero_(fresh)
        for parameter in graph.trained:
            own = self.gradients[parameter]
            if parameter.grad is not None and parameter.grad is not own:
                own.copy_(parameter.grad)
            parameter.grad = own
