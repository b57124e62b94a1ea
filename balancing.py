"""Balance the tasks of a step: learned weights of their losses, and projected gradients."""

import argparse
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from bert import EncoderWithHeads
from processes import sum_over_processes
from tasks import Task
from utils import seeded_generator


def loss_weight(model: EncoderWithHeads, task: Task, options: argparse.Namespace) -> Tensor | float:
    """Return the weight of a task's loss: of `--loss_weights`, or c exp(-s) of the learned log-variance s.
    c is 1 for classes and 1/2 for the squared error (Kendall et al. 2018, arXiv 1705.07115)."""
    if options.loss_weights != "learned":
        return options.loss_weights[task.name]
    return (1 if task.classes else 0.5) * (-model.log_variances[task.name]).exp()


def learned_weights(model: EncoderWithHeads, options: argparse.Namespace) -> dict[str, Tensor]:
    """Return the weights that are learned, under their names in TensorBoard."""
    return {
        f"loss_weight/{name}": torch.as_tensor(loss_weight(model, task, options)).detach()
        for name, task in model.tasks.items()
        if name in model.log_variances
    }


def weighted_loss(
    model: EncoderWithHeads, task: Task, loss: Tensor, share: float, options: argparse.Namespace
) -> Tensor:
    """Weigh the loss of a batch, which has this share of the task's rows in the step.

    Learned weights add the batch's share of s / 2 = log sigma (Kendall et al. 2018, equation 7 for the
    squared error, equation 10 for classes). So a task without a row in the step adds nothing.
    """
    weighted = loss_weight(model, task, options) * loss
    if options.loss_weights != "learned":
        return weighted
    return weighted + share / 2 * model.log_variances[task.name]


class GradientSurgery:
    """The gradients of each task in one step, and PCGrad (Yu et al. 2020, arXiv 2001.06782, algorithm 1)
    on those of the encoder and the pooling. Heads get the plain sum."""

    def __init__(
        self,
        model: EncoderWithHeads,
        optimizer: torch.optim.Optimizer,
        options: argparse.Namespace,
    ):
        trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        shared = "bert.", "attention_layer."
        self.shared = [parameter for name, parameter in trained if name.startswith(shared)]
        self.own = [parameter for name, parameter in trained if not name.startswith(shared)]
        self.sizes = [parameter.numel() for parameter in self.shared]
        self.places = {name: place for place, name in enumerate(options.tasks)}
        self.gradients = self.shared[0].new_zeros(len(self.places), sum(self.sizes))  # [T, P]
        # Steps taken: the same in all processes, and after --resume.
        n_steps = int(optimizer.state.get(self.own[0], {}).get("step", 0))
        self.generator = seeded_generator(torch.device("cpu"), options.seed, n_steps)

    def backward(self, terms: Mapping[str, Tensor]) -> None:
        """Add the gradients of each task's weighted loss, with one backward pass for each."""
        for name, term in terms.items():
            both = torch.autograd.grad(
                term, self.shared + self.own, retain_graph=True, allow_unused=True
            )
            parts = self.gradients[self.places[name]].split(self.sizes)
            for part, gradient in zip(parts, both, strict=False):
                if gradient is not None:
                    part += gradient.flatten()
            for parameter, gradient in zip(self.own, both[len(self.shared) :], strict=True):
                if gradient is not None:
                    old = parameter.grad
                    parameter.grad = gradient if old is None else old + gradient

    def project(self) -> None:
        """Put the sum of the projected gradients of all processes into `.grad`."""
        sum_over_processes([self.gradients])
        products = (self.gradients @ self.gradients.T).double().cpu().numpy()
        orders = [torch.randperm(len(self.places), generator=self.generator) for _ in self.places]
        factors = projected_sum(products, [order.tolist() for order in orders])
        total = torch.from_numpy(factors).to(self.gradients) @ self.gradients  # [P]
        parts = total.split(self.sizes)
        for parameter, part in zip(self.shared, parts, strict=True):
            parameter.grad = part.view_as(parameter)


def projected_sum(products: np.ndarray, orders: list[list[int]]) -> np.ndarray:
    """Return the sum of the projected gradients as factors [T] of the tasks' gradients.

    A projected gradient is a linear combination of the gradients g, so their inner products [T, T]
    suffice. `orders` has for each task the order in which g_j of the others are taken away from it.
    """
    factors = np.eye(len(products))
    for task, order in enumerate(orders):
        for other in order:
            conflict = factors[task] @ products[:, other]
            if other != task and conflict < 0:
                factors[task, other] -= conflict / products[other, other]
    return factors.sum(axis=0)
