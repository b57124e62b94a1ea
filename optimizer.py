"""Optimizers from scratch, and what they train: which weights, at which rate, on which schedule."""

import argparse
import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bert import EncoderWithHeads
from processes import n_processes, sum_over_processes
from utils import positive_float, positive_int

# Elements of one block on a CPU. Eight passes read the four tensors of a block (parameter, gradient,
# two moments) and one scratch tensor; 5 x 256 Ki floats are 5 MB, which stay in the last-level cache.
# Smaller blocks would fit into a nearer cache, but then starting the passes costs more.
CPU_BLOCK = 1 << 18
# Devices on which PyTorch's fused kernel takes AdamW's step, in one pass instead of eight.
FUSED_DEVICES = {"cuda"}


class AdamW(torch.optim.Optimizer):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019, arXiv 1711.05101, algorithm 2)
    and bias correction (Kingma & Ba 2015, arXiv 1412.6980). Arguments and state have the names of
    `torch.optim.AdamW`. `lr` already contains the factor of the schedule.

    Args:
        params: parameters, or groups of them.
        lr: learning rate, at least 0.
        betas: decay rates of the first and second moment, in [0, 1).
        eps: added to the root of the second moment.
        weight_decay: a step shrinks a parameter by `lr * weight_decay` of itself.

    A parameter without a gradient is not changed, not even by weight decay.

    `step` takes what PyTorch's fused kernel takes, as scalars in float32 on the parameters' device: it
    divides the gradients by `grad_scale`, and changes nothing if `found_inf` is 1.
    """

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01):
        check_settings(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))

    def __setstate__(self, state):
        super().__setstate__(state)
        for param, own in self.state.items():
            # Older checkpoints have plain numbers, and others tensors that may be on another device.
            own["step"] = torch.tensor(float(own["step"]), device=param.device)

    @torch.no_grad()
    def step(self, closure=None, grad_scale: Tensor | None = None, found_inf: Tensor | None = None):
        """Take one step; `closure` re-evaluates the model and returns the loss."""
        loss = loss_of(closure)
        for group in self.param_groups:
            params = [param for param in group["params"] if param.grad is not None]
            if params and params[0].device.type in FUSED_DEVICES:
                columns = map(list, zip(*map(self._tensors, params), strict=True))
                params, grads, averages, squares, steps = columns
                torch._foreach_add_(steps, 1 if found_inf is None else 1 - found_inf)
                settings = {name: group[name] for name in ("lr", "eps", "weight_decay")}
                settings |= dict(zip(("beta1", "beta2"), group["betas"], strict=True))
                settings |= dict(amsgrad=False, maximize=False)
                settings |= dict(grad_scale=grad_scale, found_inf=found_inf)
                torch._fused_adamw_(params, grads, averages, squares, [], steps, **settings)
            elif not found_inf:
                for param, grad, *moments, step in map(self._tensors, params):
                    step += 1
                    if grad_scale is not None and grad_scale != 1:
                        grad.div_(grad_scale)
                    for blocks in cache_sized_blocks([(param, grad, *moments)]):
                        adamw_update(blocks, int(step), group)
        return loss

    def _tensors(self, param) -> tuple[Tensor, ...]:
        """Return parameter, gradient, both moments and the number of steps, each parameter's own: a layer
        that was unfrozen late has taken fewer steps and needs its own bias correction."""
        if param.grad.is_sparse:
            raise RuntimeError("AdamW does not support sparse gradients")
        state = self.state[param]
        if not state:
            state["step"] = torch.zeros((), device=param.device)
            state["exp_avg"] = torch.zeros_like(param)
            state["exp_avg_sq"] = torch.zeros_like(param)
        return param, param.grad, state["exp_avg"], state["exp_avg_sq"], state["step"]


def adamw_update(blocks: list[list[Tensor]], step: int, group: dict[str, Any]) -> None:
    """Take one AdamW step on lists of parameters, gradients and both moments, in place."""
    params, grads, exp_avgs, exp_avg_sqs = blocks
    lr, (beta1, beta2) = group["lr"], group["betas"]
    correction1 = 1 - beta1**step
    correction2 = (1 - beta2**step) ** 0.5
    torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
    torch._foreach_lerp_(exp_avgs, grads, 1 - beta1)
    torch._foreach_mul_(exp_avg_sqs, beta2)
    torch._foreach_addcmul_(exp_avg_sqs, grads, grads, 1 - beta2)
    # m / c1 / (sqrt(v) / c2 + eps) = c2 / c1 * m / (sqrt(v) + eps * c2) saves one pass.
    # MKL takes 20 times as long for the root of 0, which is the moment of every word piece not seen yet.
    # Next to eps, the root of the smallest normal number is nothing.
    denominators = torch._foreach_clamp_min(exp_avg_sqs, torch.finfo(torch.float32).tiny)
    torch._foreach_sqrt_(denominators)
    torch._foreach_add_(denominators, group["eps"] * correction2)
    torch._foreach_addcdiv_(params, exp_avgs, denominators, -lr * correction2 / correction1)


class Sophia(torch.optim.Optimizer):
    """The update that SophiaH and SophiaG share (Liu et al. 2023, arXiv 2305.14342):

        update = clip(exp_avg / max(hessian, eps), -rho, rho)
        p = p - lr * weight_decay * p - lr * update

    `exp_avg` is the moving average of the gradient, `hessian` that of an estimate of the Hessian's
    diagonal. Neither has Adam's bias correction: while `hessian` is still small, nearly every
    coordinate is clipped and moves by `lr * rho`.

    The paper's algorithm 3, `p - lr_3 * clip(exp_avg / max(gamma * hessian, eps_3), -1, 1)` after
    `p - lr_3 * decay_3 * p`, is the same with gamma = rho, lr_3 = lr * rho, eps_3 = rho * eps and
    decay_3 = weight_decay / rho. The authors' code adds eps to the denominator instead of taking
    the maximum.
    """

    def __init__(self, params, lr, betas, rho, weight_decay, eps, hess_interval):
        if hess_interval < 1:
            raise ValueError(f"hess_interval must be at least 1, not {hess_interval}")
        check_settings(lr=lr, betas=betas, rho=rho, weight_decay=weight_decay, eps=eps)
        for name, value in {"rho": rho, "eps": eps}.items():
            if not value > 0:
                raise ValueError(f"{name} must be above 0, not {value}")
        defaults = dict(lr=lr, betas=betas, rho=rho, weight_decay=weight_decay, eps=eps)
        # In the groups, so that `state_dict` saves them.
        super().__init__(params, defaults | dict(step=0, skipped_refreshes=0))
        self.hess_interval = hess_interval

    @property
    def n_steps(self) -> int:
        """Steps taken so far."""
        return self.param_groups[0]["step"]

    @property
    def refreshes(self) -> bool:
        """Whether the coming step uses a new estimate of the Hessian."""
        return self.n_steps % self.hess_interval == 0

    @property
    def skipped_refreshes(self) -> int:
        """Estimates of the Hessian that were not used because they were not finite."""
        return self.param_groups[0]["skipped_refreshes"]

    @torch.no_grad()
    def step(self, closure=None):
        """Take one step; `closure` re-evaluates the model and returns the loss."""
        loss = loss_of(closure)
        self._before_update()
        for group in self.param_groups:
            lr, rho = group["lr"], group["rho"]
            tensors: list[tuple[Tensor, ...]] = [
                (param, param.grad, *self._averages(param, param.grad))
                for param in group["params"]
                if param.grad is not None
            ]
            for params, grads, exp_avgs, hessians in cache_sized_blocks(tensors):
                torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
                torch._foreach_lerp_(exp_avgs, grads, 1 - group["betas"][0])
                limited = torch._foreach_clamp_min(hessians, group["eps"])
                updates = torch._foreach_div(exp_avgs, limited)
                torch._foreach_clamp_min_(updates, -rho)
                torch._foreach_clamp_max_(updates, rho)
                torch._foreach_add_(params, updates, alpha=-lr)
            group["step"] += 1
        return loss

    def _before_update(self) -> None:
        """Do what must come before the update of a step."""

    def _averages(self, param: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        if grad.is_sparse:
            raise RuntimeError(f"{type(self).__name__} does not support sparse gradients")
        state = self.state[param]
        if not state:
            state["exp_avg"] = torch.zeros_like(param)
            state["hessian"] = torch.zeros_like(param)
        return state["exp_avg"], state["hessian"]

    def _average_in(self, estimates: dict[Tensor, Tensor]) -> None:
        """Update the moving averages with an estimate for each parameter: all of them, or none if a
        value is not finite."""
        finite = [estimate.isfinite().all() for estimate in estimates.values()]
        if finite and not torch.stack(finite).all():
            for group in self.param_groups:
                group["skipped_refreshes"] += 1
            return
        for group in self.param_groups:
            for param in group["params"]:
                if param in estimates:
                    _, hessian = self._averages(param, estimates[param])
                    hessian.lerp_(estimates[param], 1 - group["betas"][1])

    @torch.no_grad()
    def statistics(self) -> dict[str, Tensor | float]:
        """Return what helps to tune `rho`: `clipped`, the share of coordinates that the last step clipped
        among those that moved at all, and `hessian_norm`, the norm of all averages together."""
        clipped, moved, squares = 0, 0, 0
        for group in self.param_groups:
            for state in (self.state[param] for param in group["params"] if param in self.state):
                limit = state["hessian"].clamp_min(group["eps"]) * group["rho"]
                clipped = clipped + (state["exp_avg"].abs() > limit).sum()
                moved = moved + state["exp_avg"].count_nonzero()
                squares = squares + state["hessian"].square().sum()
        return {"clipped": clipped / max(moved, 1), "hessian_norm": squares**0.5}


class SophiaH(Sophia):
    """Sophia with Hutchinson's estimator (algorithm 1 of Liu et al. 2023, arXiv 2305.14342): the
    mean of `u * (H u)` over `u ~ N(0, I)` is the Hessian's diagonal.

    Args:
        params: parameters, or groups of them.
        lr: learning rate, at least 0. A coordinate moves by at most `lr * rho` in a step.
        betas: decay rates of the averages of gradient and Hessian, in [0, 1).
        rho: bound of the update before it is multiplied by `lr`.
        weight_decay: a step shrinks a parameter by `lr * weight_decay` of itself.
        eps: smallest value that the average of the gradient is divided by.
        hess_interval: steps from one estimate to the next; the first step makes one.

    `generator` draws the noise u (None: PyTorch's own). It must have the same state in all processes.

    A step that makes an estimate needs gradients with a graph, from
    `loss.backward(create_graph=True)`; without one it raises RuntimeError. The step takes the graph
    out of `.grad`, where a reference cycle would keep it alive. Clipping the gradients before the
    step does not change the estimate, which follows the graph. A parameter without a gradient is not
    changed.
    """

    def __init__(
        self,
        params,
        lr=1e-4,
        betas=(0.96, 0.99),
        rho=1e-2,
        weight_decay=0.0,
        eps=1e-12,
        hess_interval=10,
    ):
        super().__init__(params, lr, betas, rho, weight_decay, eps, hess_interval)
        self.generator: torch.Generator | None = None

    def _before_update(self) -> None:
        params = [
            param
            for group in self.param_groups
            for param in group["params"]
            if param.grad is not None
        ]
        try:
            if self.refreshes and params:
                self._average_in(self._hutchinson(params))
        finally:
            for param in params:
                param.grad = param.grad.detach()

    def _hutchinson(self, params: list[Tensor]) -> dict[Tensor, Tensor]:
        noise = [torch.randn_like(param, generator=self.generator) for param in params]
        pairs = [
            (param.grad, u)
            for param, u in zip(params, noise, strict=True)
            if param.grad is not None and param.grad.requires_grad
        ]
        # One of several processes may have no row in a step; then it has no graph.
        if not pairs and n_processes() == 1:
            raise RuntimeError(
                f"step {self.n_steps + 1} estimates the Hessian, which needs gradients with a "
                "graph: call loss.backward(create_graph=True) before it"
            )
        gradients, vectors = zip(*pairs, strict=True) if pairs else ((), ())
        # The products are zero for parameters that no gradient depends on.
        products = torch.autograd.grad(
            gradients, params, vectors, allow_unused=True, materialize_grads=True
        )
        # `.grad` has the values of the whole batch, but the graph of this process's share.
        sum_over_processes(list(products))
        rows = zip(params, noise, products, strict=True)
        return {param: u * product for param, u, product in rows}


class SophiaG(Sophia):
    """Sophia with the Gauss-Newton-Bartlett estimator (algorithm 2 of Liu et al. 2023, arXiv
    2305.14342): draw labels from the model's own output, and square the gradient of their loss.

    Before each step for which `refreshes` is true:

        loss with drawn labels, averaged over bs rows -> backward -> update_hessian(bs) -> zero_grad

    For classes, a label is drawn from the softmax. The paper does not treat regression with the
    squared error `(s - y)^2`. There the same argument needs the distribution whose negative
    log-likelihood this loss is: `-log N(y; s, v) = (s - y)^2 / (2 v) + const`, so v = 1/2. With
    J = ds/dp, the gradient of one row is `2 (s - y) J`, and its expected square is `4 v J^2 = 2 J^2`.
    That is the diagonal of the Gauss-Newton matrix `J (d2L/ds2) J` of the loss, since d2L/ds2 = 2.
    Gradients of different rows are independent with mean zero (Bartlett's first identity), so the
    cross terms vanish in the square of the mean over bs rows, and bs times this square has the mean
    of the rows' diagonals as its expectation.

    Several tasks at once: sum each task's mean loss times the square root of its number of rows
    (and of its weight); the cross terms between tasks vanish too; then call `update_hessian(1)`.

    Args: like SophiaH.
    """

    def __init__(
        self,
        params,
        lr=1e-4,
        betas=(0.965, 0.99),
        rho=0.04,
        weight_decay=0.1,
        eps=1e-12,
        hess_interval=10,
    ):
        super().__init__(params, lr, betas, rho, weight_decay, eps, hess_interval)
        self.estimates: dict[Tensor, Tensor] = {}

    @torch.no_grad()
    def update_hessian(self, bs: int = 1) -> None:
        """Let the coming step average in `bs` times the square of `.grad`, which must hold the gradients
        of a loss with drawn labels, averaged over `bs` rows and not clipped. If that step is not taken,
        the next call replaces the estimate."""
        self.estimates = {
            param: bs * param.grad.square()
            for group in self.param_groups
            for param in group["params"]
            if param.grad is not None
        }

    def _before_update(self) -> None:
        self._average_in(self.estimates)
        self.estimates = {}


def loss_of(closure) -> Tensor | None:
    """Call the closure of a step, if there is one, and return its loss."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def cache_sized_blocks(tensors: list[tuple[Tensor, ...]]) -> Iterator[list[list[Tensor]]]:
    """Regroup (parameter, gradient, ...) tuples into lists of parameters, of gradients, ...

    On a CPU, yield one block of one parameter at a time, small enough for the cache; elsewhere
    everything at once, for the fewest kernel launches.
    """
    if not tensors:
        return
    if tensors[0][0].device.type != "cpu":
        yield [list(column) for column in zip(*tensors, strict=True)]
        return
    for columns in tensors:
        # Without a flat view, which is rare, the whole tensor is one block.
        flat = all(tensor.is_contiguous() for tensor in columns)
        blocks = [tensor.view(-1).split(CPU_BLOCK) if flat else (tensor,) for tensor in columns]
        for block in zip(*blocks, strict=True):
            yield [[tensor] for tensor in block]


def check_settings(lr: float, betas: tuple[float, float], **at_least_zero: float) -> None:
    """Raise ValueError for a setting out of its range."""
    for name, value in {"lr": lr, **at_least_zero}.items():
        if not value >= 0:
            raise ValueError(f"{name} must be at least 0, not {value}")
    for index, beta in enumerate(betas):
        if not 0 <= beta < 1:
            raise ValueError(f"betas[{index}] must be in [0, 1), not {beta}")


# ------------------------------------------------------------------------ what --optimizer chooses


class OwnFlag(NamedTuple):
    """A flag of an optimizer, which is also the name of its constructor's argument."""

    type: Callable[[str], Any]
    default: float
    help: str
    metavar: str | None = None


WEIGHT_DECAY = 0.05  # default of --weight_decay; Sophia multiplies it by rho


class OptimizerRow(NamedTuple):
    """A value of `--optimizer`."""

    new: Callable[..., torch.optim.Optimizer]
    lr: float  # default of --lr
    pretrain_lr: float  # default of --lr with --option pretrain
    betas: tuple[float, float]  # default of --betas
    why_betas: str
    help: str
    flags: dict[str, OwnFlag] = {}


SOPHIA_FLAGS = {
    "rho": OwnFlag(positive_float, 0.02, "bound of a coordinate's step, as a multiple of the rate"),
    "hess_interval": OwnFlag(
        positive_int, 50, "optimizer steps from one estimate of the Hessian to the next", "STEPS"
    ),
}
# Another optimizer is a class above and a row here; its flags follow from the row. Its constructor
# takes groups of parameters, `lr`, `betas` and its own flags by name.
OPTIMIZERS = {
    "adamw": OptimizerRow(
        AdamW,
        lr=8e-5,
        pretrain_lr=1e-3,
        betas=(0.9, 0.999),
        why_betas="of Adam's paper",
        help="Adam with decoupled weight decay",
    ),
    "sophiah": OptimizerRow(
        SophiaH,
        lr=4e-4,
        pretrain_lr=4e-4,
        betas=(0.985, 0.99),
        why_betas="of the original project",
        help="steps scaled by Hutchinson's estimate of the curvature",
        flags=SOPHIA_FLAGS,
    ),
    "sophiag": OptimizerRow(
        SophiaG,
        lr=1.2e-3,
        pretrain_lr=1.2e-3,
        betas=(0.965, 0.99),
        why_betas="of Sophia's paper",
        help="steps scaled by the Gauss-Newton-Bartlett estimate of the curvature",
        flags=SOPHIA_FLAGS,
    ),
}


# --------------------------------------------------------------- which weights train, at which rate


PARTS = {"bert": "encoder", "log_variances": "loss weights"}
# An Adam step moves a weight by about its rate. With the rate of the heads, log-variances would move by
# less than 0.1 in a run.
LOSS_WEIGHTS_RATE = 100


def freeze_and_unfreeze(model: EncoderWithHeads, options: argparse.Namespace, epoch: int) -> None:
    """Choose the weights that train in this epoch (counted from 0).

    The heads always train. `--option pretrain` trains nothing of the encoder, `finetune` all of it.
    With `--unfreeze_interval`, one more layer trains every so many epochs, from the top, and the
    embeddings after the last layer. New weights of the encoder (embeddings of tags; of a mixture of
    experts, the gate's pooler and the layer that weighs the experts) always train with `finetune`.
    """
    n_layers = model.bert.config.num_hidden_layers
    if options.option == "pretrain":
        n_trained = 0
    elif options.unfreeze_interval:
        n_trained = epoch // options.unfreeze_interval
    else:
        n_trained = n_layers + 1
    for stack in model.bert.stacks:
        for depth, layer in enumerate(reversed(stack.encoder.layer)):
            layer.requires_grad_(depth < n_trained)
        stack.embeddings.requires_grad_(n_trained > n_layers)
    for parameter in model.bert.new_parameters:
        parameter.requires_grad_(options.option == "finetune")


def build_optimizer(model: EncoderWithHeads, options: argparse.Namespace) -> torch.optim.Optimizer:
    """Make the optimizer for all weights that may ever train.

    Encoder and heads have separate groups, each with weight decay and without (biases and LayerNorm).
    With `--layer_lr_decay`, each layer of the encoder has groups of its own.
    """
    groups = parameter_groups(model, options)
    row = OPTIMIZERS[options.optimizer]
    own = {name: getattr(options, name) for name in row.flags}
    return row.new(groups, lr=options.lr, betas=options.betas, **own)


def parameter_groups(model: EncoderWithHeads, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Group the weights that may ever train by part (encoder, heads), rate and weight decay."""
    groups = defaultdict(list)
    new = set(model.bert.new_parameters)
    unused = {p for stack in model.bert.stacks for p in stack.pooler.parameters()} - new
    depths = layers_below_heads(model)
    for name, parameter in model.named_parameters():
        part = PARTS.get(name.split(".")[0], "heads")
        if parameter in unused or (part == "encoder" and options.option == "pretrain"):
            continue
        lr = options.lr * options.layer_lr_decay ** depths.get(parameter, 0)
        lr *= LOSS_WEIGHTS_RATE if part == "loss weights" else 1
        weight_decay = options.weight_decay if parameter.ndim > 1 else 0.0
        groups[part, lr, weight_decay].append(parameter)
    # Each weight is in one group, and none that trains is left out.
    grouped = [parameter for parameters in groups.values() for parameter in parameters]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(set(grouped)) == len(grouped) and set(trained) <= set(grouped)
    return [
        {"params": parameters, "part": part, "lr": lr, "weight_decay": weight_decay}
        for (part, lr, weight_decay), parameters in groups.items()
    ]


def layers_below_heads(model: EncoderWithHeads) -> dict[nn.Parameter, int]:
    """Count, for each pretrained weight of the encoder, the layers from the heads down to its own."""
    depths: dict[nn.Parameter, int] = {}
    for stack in model.bert.stacks:
        parts = [*reversed(stack.encoder.layer), stack.embeddings]
        for depth, part in enumerate(parts, start=1):
            depths |= dict.fromkeys(part.parameters(), depth)
    new = set(model.bert.new_parameters)
    return {parameter: depth for parameter, depth in depths.items() if parameter not in new}


# --------------------------------------------------------------------------------------- schedules

# The rate is lowered when more than so many epochs in a row bring no better mean dev score.
PLATEAU_PATIENCE = 1
PLATEAU_FACTOR = 0.5
# Learning-rate factor by the fraction of the steps after the warm-up that have been taken.
STEP_SCHEDULES = {
    "linear": lambda fraction: 1 - fraction,
    "cosine": lambda fraction: (1 + math.cos(math.pi * fraction)) / 2,
}
SCHEDULES = ("plateau", *STEP_SCHEDULES, "none")


def build_scheduler(optimizer: torch.optim.Optimizer, options: argparse.Namespace):
    """Make the scheduler. `plateau` is stepped with the mean dev score of an epoch, those of
    STEP_SCHEDULES after each step, also after one that was skipped. Return None for `none`."""
    if options.scheduler == "plateau":
        return torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizer, mode="max", factor=PLATEAU_FACTOR, patience=PLATEAU_PATIENCE
        )
    if options.scheduler not in STEP_SCHEDULES:
        return None
    window = options.batch_size * options.grad_accumulation
    steps = options.epochs * math.ceil(options.samples_per_epoch / window)
    warm_up = round(options.warmup * steps)
    schedule = STEP_SCHEDULES[options.scheduler]

    def factor(step: int) -> float:
        """Return the learning-rate factor at `step`, counted from 0."""
        if step < warm_up:
            return (step + 1) / (warm_up + 1)
        return schedule((step - warm_up) / max(steps - warm_up, 1))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
