"""Optimizers from scratch. Only torch is needed."""

from collections import defaultdict
from collections.abc import Iterator

import torch
from torch import Tensor

# Elements of one block on a CPU. Seven passes go over a block's four tensors (parameter, gradient,
# two moments) and one scratch tensor; 5 x 256 Ki floats are 5 MB, which the last-level cache keeps
# meanwhile. Smaller blocks would fit a nearer cache, but then starting the passes costs more.
CPU_BLOCK = 1 << 18


class AdamW(torch.optim.Optimizer):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019, arXiv 1711.05101, algorithm 2)
    and bias correction (Kingma & Ba 2015, arXiv 1412.6980), with the schedule multiplier folded
    into `lr` as in `torch.optim.AdamW`, whose arguments and state names these are.

    Args:
        params: parameters, or groups of them.
        lr: learning rate, at least 0.
        betas: decay rates of the first and second moment, in [0, 1).
        eps: added to the root of the second moment.
        weight_decay: a step shrinks a parameter by `lr * weight_decay` of itself.

    A parameter without a gradient is not touched at all, by weight decay neither.
    """

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01):
        check_settings(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure=None):
        """Take one step; `closure` re-evaluates the model and returns the loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            settings = {name: group[name] for name in ("lr", "betas", "eps", "weight_decay")}
            for step, tensors in self._by_step(group["params"]).items():
                for blocks in cache_sized_blocks(tensors):
                    adamw_update(*blocks, step, **settings)
        return loss

    def _by_step(self, params) -> dict[int, list[tuple[Tensor, ...]]]:
        """(parameter, gradient, moments) of the parameters that have a gradient, by step number:
        a layer unfrozen late has taken fewer steps and needs its own bias correction."""
        tensors = defaultdict(list)
        for param in params:
            if param.grad is None:
                continue
            if param.grad.is_sparse:
                raise RuntimeError("AdamW does not support sparse gradients")
            state = self.state[param]
            if not state:
                state["step"] = 0
                state["exp_avg"] = torch.zeros_like(param)
                state["exp_avg_sq"] = torch.zeros_like(param)
            state["step"] += 1
            moments = (state["exp_avg"], state["exp_avg_sq"])
            tensors[state["step"]].append((param, param.grad, *moments))
        return tensors


def adamw_update(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    step: int,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """One AdamW step on lists of tensors, in place."""
    beta1, beta2 = betas
    correction1 = 1 - beta1**step
    correction2 = (1 - beta2**step) ** 0.5
    torch._foreach_mul_(params, 1 - lr * weight_decay)
    torch._foreach_lerp_(exp_avgs, grads, 1 - beta1)
    torch._foreach_mul_(exp_avg_sqs, beta2)
    torch._foreach_addcmul_(exp_avg_sqs, grads, grads, 1 - beta2)
    # m / c1 / (sqrt(v) / c2 + eps) = c2 / c1 * m / (sqrt(v) + eps * c2): one pass less
    denominators = torch._foreach_sqrt(exp_avg_sqs)
    torch._foreach_add_(denominators, eps * correction2)
    torch._foreach_addcdiv_(params, exp_avgs, denominators, -lr * correction2 / correction1)


def cache_sized_blocks(tensors: list[tuple[Tensor, ...]]) -> Iterator[list[list[Tensor]]]:
    """Regroup (parameter, gradient, ...) tuples into lists of parameters, of gradients, ...

    On a CPU one block of one parameter at a time, small enough for the cache; elsewhere all at
    once, for the fewest kernel launches.
    """
    if tensors[0][0].device.type != "cpu":
        yield [list(column) for column in zip(*tensors)]
        return
    for columns in tensors:
        if all(tensor.is_contiguous() for tensor in columns):
            columns = [tensor.view(-1).split(CPU_BLOCK) for tensor in columns]
        else:  # no flat view; rare enough to go in one piece
            columns = [[tensor] for tensor in columns]
        for block in zip(*columns):
            yield [[tensor] for tensor in block]


def check_settings(lr: float, betas: tuple[float, float], **at_least_zero: float) -> None:
    """Raise ValueError for a setting out of its range."""
    for name, value in {"lr": lr, **at_least_zero}.items():
        if not value >= 0:
            raise ValueError(f"{name} must be at least 0, not {value}")
    for index, beta in enumerate(betas):
        if not 0 <= beta < 1:
            raise ValueError(f"betas[{index}] must be in [0, 1), not {beta}")
