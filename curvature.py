"""Gradients for Sophia's estimates of the Hessian, for all tasks at once. The estimators themselves are
in optimizer.py."""

import argparse
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from balancing import GradientSurgery
from batches import Batch, step_noise
from bert import EncoderWithHeads
from optimizer import SophiaG, SophiaH
from processes import sum_gradients
from utils import autocast, seeded_generator


def prepare_estimate(
    model: EncoderWithHeads,
    window: list[Batch],
    optimizer: torch.optim.Optimizer,
    options: argparse.Namespace,
) -> bool:
    """Prepare Sophia's estimate of the Hessian if the coming step uses a new one. Return whether the
    gradients of the step need a graph."""
    # SophiaH makes its estimate in `step`, from the graph of the gradients.
    if isinstance(optimizer, SophiaH) and optimizer.refreshes:
        device = next(model.parameters()).device
        optimizer.generator = seeded_generator(device, options.seed, optimizer.n_steps)
        return True
    # SophiaG needs a backward pass of its own.
    if isinstance(optimizer, SophiaG) and optimizer.refreshes:
        gauss_newton_gradients(model, window, options, optimizer.n_steps)
        optimizer.update_hessian()
        optimizer.zero_grad(set_to_none=True)
    return False


def gauss_newton_gradients(
    model: EncoderWithHeads, window: list[Batch], options: argparse.Namespace, step: int
) -> None:
    """Put into `.grad` the gradient whose square `SophiaG.update_hessian` averages.

    It is the gradient of a sum over the tasks: each task's mean loss, for labels drawn from the
    model's own outputs, times the root of its number of rows and of its weight. The labels follow
    from the seed and `step`, however the rows are divided among processes. The curvature is that of
    the plain losses: the terms that `--sst_loss`, `--label_smoothing`, `--rdrop` and `--moe_balance`
    add are left out, since no labels can be drawn from them.
    """
    device = next(model.parameters()).device
    for batch in window:
        with autocast(device, options.precision, small_gradients=True):
            answers = model.head_outputs(batch)
        total = torch.zeros((), device=device)
        for name, outputs in answers.items():
            task, n_rows = model.tasks[name], batch.step_rows[name]
            scale = (options.loss_weights[name] * n_rows / len(outputs)) ** 0.5
            for head, output in enumerate(map(Tensor.float, outputs)):
                noise = step_noise(batch, task, (options.seed, step), head).to(device)
                labels = task.draw(output.detach(), noise)
                loss = task.loss(output, labels, 0.0) * (len(labels) / n_rows)
                total = total + scale * loss
        total.backward()
    sum_gradients(model, [])


class LossScale:
    """A factor of the loss for float16, in which small gradients would become 0 (Micikevicius et al.
    2017, arXiv 1710.03740): half after a step that is not finite, twice after 2,000 that are. It stays
    on the device, so that nothing waits."""

    def __init__(self, device: torch.device):
        self.factor = torch.tensor(2.0**16, device=device)
        self.finite_steps = torch.zeros((), dtype=torch.int32, device=device)

    def update(self, is_finite: Tensor) -> None:
        found_inf = 1 - is_finite.float()
        torch._amp_update_scale_(self.factor, self.finite_steps, found_inf, 2.0, 0.5, 2000)


def add_gradients(
    terms: Mapping[str, Tensor],
    model: nn.Module,
    surgery: GradientSurgery | None,
    with_graph: bool,
    scale: LossScale | None = None,
) -> None:
    """Add the gradients of a batch's losses, times the scale, with their graph if asked for."""
    if scale:
        terms = {name: term * scale.factor for name, term in terms.items()}
    if surgery:
        return surgery.backward(terms)
    total = torch.stack([*terms.values()]).sum()
    if with_graph:
        backward_with_graph(total, model)
    else:
        total.backward()


def backward_with_graph(loss: Tensor, model: nn.Module) -> None:
    """Add the gradients of `loss`, with their graph, to `.grad`."""
    # `loss.backward(create_graph=True)` does the same, and warns of the reference cycle that SophiaH
    # breaks.
    params = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(loss, params, create_graph=True, allow_unused=True)
    for param, gradient in zip(params, gradients, strict=True):
        if gradient is not None:
            param.grad = gradient if param.grad is None else param.grad + gradient
