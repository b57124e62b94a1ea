"""Optimizers from scratch. Only torch is needed."""

import argparse
import math
from collections import defaultdict
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from utils import sum_over_processes

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
        loss = loss_of(closure)
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


class Sophia(torch.optim.Optimizer):
    """What SophiaH and SophiaG share: the update of Liu et al. 2023, arXiv 2305.14342,

        update = clip(exp_avg / max(hessian, eps), -rho, rho)
        p = p - lr * weight_decay * p - lr * update

    where `exp_avg` is the moving average of the gradient and `hessian` that of an estimate of the
    Hessian's diagonal. Neither has Adam's bias correction: while `hessian` is still small, nearly
    every coordinate is clipped and moves by `lr * rho`.

    The paper's algorithm 3, `p - lr_3 * clip(exp_avg / max(gamma * hessian, eps_3), -1, 1)` after
    `p - lr_3 * decay_3 * p`, is the same with gamma = rho, lr_3 = lr * rho, eps_3 = rho * eps and
    decay_3 = weight_decay / rho. The authors' code adds eps to the denominator instead of taking
    the maximum.
    """

    def __init__(self, params, lr, betas, rho, weight_decay, eps):
        check_settings(lr=lr, betas=betas, rho=rho, weight_decay=weight_decay, eps=eps)
        for name, value in {"rho": rho, "eps": eps}.items():
            if not value > 0:
                raise ValueError(f"{name} must be above 0, not {value}")
        defaults = dict(lr=lr, betas=betas, rho=rho, weight_decay=weight_decay, eps=eps)
        super().__init__(params, defaults | dict(step=0, skipped_refreshes=0))

    @property
    def n_steps(self) -> int:
        """Steps taken so far."""
        return self.param_groups[0]["step"]

    @property
    def skipped_refreshes(self) -> int:
        """Estimates of the Hessian that were not finite and so not used."""
        return self.param_groups[0]["skipped_refreshes"]

    @torch.no_grad()
    def step(self, closure=None):
        """Take one step; `closure` re-evaluates the model and returns the loss."""
        loss = loss_of(closure)
        self._before_update()
        for group in self.param_groups:
            names = ("lr", "betas", "rho", "weight_decay", "eps")
            settings = {name: group[name] for name in names}
            tensors = [
                (param, param.grad, *self._averages(param))
                for param in group["params"]
                if param.grad is not None
            ]
            for blocks in cache_sized_blocks(tensors):
                sophia_update(*blocks, **settings)
            group["step"] += 1
        return loss

    def _before_update(self) -> None:
        """For what `step` has to do first."""

    def _averages(self, param: Tensor) -> tuple[Tensor, Tensor]:
        if param.grad.is_sparse:
            raise RuntimeError(f"{type(self).__name__} does not support sparse gradients")
        state = self.state[param]
        if not state:
            state["exp_avg"] = torch.zeros_like(param)
            state["hessian"] = torch.zeros_like(param)
        return state["exp_avg"], state["hessian"]

    def _average_in(self, estimates: dict[Tensor, Tensor]) -> None:
        """Update the moving averages with an estimate for each parameter; all or, if one value is
        not finite, none."""
        finite = [estimate.isfinite().all() for estimate in estimates.values()]
        if finite and not torch.stack(finite).all():
            for group in self.param_groups:
                group["skipped_refreshes"] += 1
            return
        for group in self.param_groups:
            for param in group["params"]:
                if param in estimates:
                    _, hessian = self._averages(param)
                    hessian.lerp_(estimates[param], 1 - group["betas"][1])

    @torch.no_grad()
    def statistics(self) -> dict[str, Tensor | float]:
        """For tuning `rho`: `clipped`, the share of coordinates that the last step clipped, among
        those that moved at all, and `hessian_norm`, the norm of all averages together."""
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
        rho: what the update is clipped to.
        weight_decay: a step shrinks a parameter by `lr * weight_decay` of itself.
        eps: least value that the gradient's average is divided by.
        update_period: steps from one estimate to the next; the first step makes one.
        all_reduce: for data-parallel training, where `.grad` has the values of the whole batch's
            gradient and the graph of this process's share: sums a list of tensors over all
            processes, in place.

    `generator`, None for PyTorch's own, draws the noise u; give those of all processes the same
    state.

    A step that makes an estimate needs gradients with a graph, `loss.backward(create_graph=True)`,
    else it raises RuntimeError. It takes the graph out of `.grad`, which would otherwise keep it
    alive in a reference cycle. What is done to the gradients' values on the way (clipping) does not
    change the estimate, which follows the graph. A parameter without a gradient is not touched.
    """

    def __init__(
        self,
        params,
        lr=1e-4,
        betas=(0.96, 0.99),
        rho=1e-2,
        weight_decay=0.0,
        eps=1e-12,
        update_period=10,
        all_reduce: Callable[[list[Tensor]], None] | None = None,
    ):
        if update_period < 1:
            raise ValueError(f"update_period must be at least 1, not {update_period}")
        super().__init__(params, lr, betas, rho, weight_decay, eps)
        self.update_period, self.all_reduce, self.generator = update_period, all_reduce, None

    @property
    def refreshes(self) -> bool:
        """Whether the coming step makes an estimate."""
        return self.n_steps % self.update_period == 0

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
        pairs = [(p.grad, u) for p, u in zip(params, noise) if p.grad.requires_grad]
        if not pairs and not self.all_reduce:  # a process may have no rows in a step
            raise RuntimeError(
                f"step {self.n_steps + 1} estimates the Hessian, which needs gradients with a "
                "graph: call loss.backward(create_graph=True) before it"
            )
        gradients, vectors = zip(*pairs) if pairs else ((), ())
        products = torch.autograd.grad(  # zeros for parameters that no gradient depends on
            gradients, params, vectors, allow_unused=True, materialize_grads=True
        )
        if self.all_reduce:
            self.all_reduce(products)
        return {param: u * product for param, u, product in zip(params, noise, products)}


class SophiaG(Sophia):
    """Sophia with the Gauss-Newton-Bartlett estimator (algorithm 2 of Liu et al. 2023, arXiv
    2305.14342): draw labels from the model's own output, and square the gradient of their loss.

    Every few steps, before `step`:

        loss with drawn labels, meaned over bs rows -> backward -> update_hessian(bs) -> zero_grad

    For classes, a label is drawn from the softmax. For a regression with the squared error
    `(s - y)^2`, which the paper does not treat, the same argument needs the distribution whose
    negative log-likelihood that loss is: `-log N(y; s, v) = (s - y)^2 / (2 v) + const`, so v = 1/2.
    Then with J = ds/dp one row's gradient is `2 (s - y) J`, its expected square
    `4 v J^2 = 2 J^2`, and that is the diagonal of the loss's Gauss-Newton matrix `J (d2L/ds2) J`,
    since d2L/ds2 = 2. Gradients of different rows are independent with mean zero (Bartlett's first
    identity), so in the square of the mean over bs rows the cross terms vanish, and bs times it has
    the mean of the rows' diagonals as its expectation.

    Several tasks at once: sum each task's mean loss times the square root of its number of rows
    (and of its weight); cross terms between tasks vanish likewise; then `update_hessian(1)`.

    Args: as for SophiaH, without `update_period`.
    """

    def __init__(self, params, lr=1e-4, betas=(0.965, 0.99), rho=0.04, weight_decay=0.1, eps=1e-12):
        super().__init__(params, lr, betas, rho, weight_decay, eps)

    @torch.no_grad()
    def update_hessian(self, bs: int = 1) -> None:
        """Average in `bs` times the square of the gradients that stand in `.grad`, which are to be
        those of a loss with drawn labels, not clipped, meaned over `bs` rows."""
        self._average_in(
            {
                param: bs * param.grad.square()
                for group in self.param_groups
                for param in group["params"]
                if param.grad is not None
            }
        )


def sophia_update(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    hessians: list[Tensor],
    *,
    lr: float,
    betas: tuple[float, float],
    rho: float,
    weight_decay: float,
    eps: float,
) -> None:
    """One Sophia step on lists of tensors, in place."""
    torch._foreach_mul_(params, 1 - lr * weight_decay)
    torch._foreach_lerp_(exp_avgs, grads, 1 - betas[0])
    updates = torch._foreach_div(exp_avgs, torch._foreach_clamp_min(hessians, eps))
    torch._foreach_clamp_min_(updates, -rho)
    torch._foreach_clamp_max_(updates, rho)
    torch._foreach_add_(params, updates, alpha=-lr)


def loss_of(closure) -> Tensor | None:
    """What a step's closure returns; None where there is no closure."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def cache_sized_blocks(tensors: list[tuple[Tensor, ...]]) -> Iterator[list[list[Tensor]]]:
    """Regroup (parameter, gradient, ...) tuples into lists of parameters, of gradients, ...

    On a CPU one block of one parameter at a time, small enough for the cache; elsewhere all at
    once, for the fewest kernel launches.
    """
    if not tensors:
        return
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


SOPHIA_BETAS = {"sophiah": (0.985, 0.99), "sophiag": (0.965, 0.99)}


def freeze_and_unfreeze(model: nn.Module, options: argparse.Namespace, epoch: int) -> None:
    """Set which weights train in this epoch (counted from 0); the heads always do.

    `pretrain`: nothing of the encoder. `finetune`: all of it, or with an unfreezing interval one
    more layer every `interval` epochs from the top, and the embeddings after the last layer; but what
    is new in it like the heads (embeddings of tags, what weighs experts), always.
    """
    n_layers = model.bert.config.num_hidden_layers
    if options.option == "pretrain":
        trained = 0
    elif options.unfreeze_interval:
        trained = epoch // options.unfreeze_interval
    else:
        trained = n_layers + 1
    for stack in model.bert.stacks:
        for depth, layer in enumerate(reversed(stack.encoder.layer)):
            layer.requires_grad_(depth < trained)
        stack.embeddings.requires_grad_(trained > n_layers)
    for parameter in model.bert.new_parameters:
        parameter.requires_grad_(options.option == "finetune")


def build_optimizer(model: nn.Module, options: argparse.Namespace) -> torch.optim.Optimizer:
    """The optimizer over all weights that may ever train: encoder with and without weight decay
    (biases and LayerNorm go without), and heads, likewise; with `--layer_lr_decay`, each layer of the
    encoder by itself."""
    groups = defaultdict(list)
    poolers = {each for stack in model.bert.stacks for each in stack.pooler.parameters()}
    unused = poolers - set(model.bert.new_parameters)
    depths = layers_below_heads(model)
    for name, parameter in model.named_parameters():
        encoder = name.startswith("bert.")
        if parameter in unused or (encoder and options.option == "pretrain"):
            continue
        lr = options.lr * options.layer_lr_decay ** depths.get(parameter, 0)
        groups["encoder" if encoder else "heads", lr, parameter.ndim > 1].append(parameter)

    grouped = [parameter for parameters in groups.values() for parameter in parameters]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(set(grouped)) == len(grouped) and set(trained) <= set(grouped)
    settings = []
    for (part, lr, decays), parameters in groups.items():
        count = sum(parameter.numel() for parameter in parameters)
        decay = options.weight_decay if decays else 0.0
        rate = f", rate {lr:.3g}" * (options.layer_lr_decay != 1)
        print(f"{part}: {len(parameters)} tensors, {count:,} weights, weight decay {decay:g}{rate}")
        settings.append({"params": parameters, "weight_decay": decay, "lr": lr})
    if options.optimizer == "adamw":
        return AdamW(settings, lr=options.lr)
    sophia = dict(lr=options.lr, rho=options.rho, betas=SOPHIA_BETAS[options.optimizer])
    if options.optimizer == "sophiah":
        sophia["update_period"] = options.hess_interval
        return SophiaH(settings, **sophia, all_reduce=sum_over_processes)
    return SophiaG(settings, **sophia)


def layers_below_heads(model: nn.Module) -> dict[nn.Parameter, int]:
    """How many layers lie between a pretrained weight of the encoder and the heads, its own counted."""
    depths = {}
    for stack in model.bert.stacks:
        parts = [*reversed(stack.encoder.layer), stack.embeddings]
        for depth, part in enumerate(parts, start=1):
            depths |= dict.fromkeys(part.parameters(), depth)
    return {
        each: depth for each, depth in depths.items() if each not in set(model.bert.new_parameters)
    }


PLATEAU_PATIENCE = 1  # epochs without a better mean dev score that `plateau` lets pass
PLATEAU_FACTOR = 0.5
# How the rate falls, from 1 to 0, over the share of the steps after the warm-up that are over.
EACH_STEP = {
    "linear": lambda over: 1 - over,
    "cosine": lambda over: (1 + math.cos(math.pi * over)) / 2,
}


def build_scheduler(optimizer: torch.optim.Optimizer, options: argparse.Namespace):
    """`plateau` steps on the mean dev score, `linear` and `cosine` on each optimizer step; None for
    `none`."""
    if options.scheduler == "plateau":
        return torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizer, mode="max", factor=PLATEAU_FACTOR, patience=PLATEAU_PATIENCE
        )
    if options.scheduler not in EACH_STEP:
        return None
    window = options.batch_size * options.grad_accumulation
    steps = options.epochs * math.ceil(options.samples_per_epoch / window)
    warm_up = round(options.warmup * steps)
    fall = EACH_STEP[options.scheduler]

    def factor(step: int) -> float:
        """Of the rate, for the step of this number, from 0; it rises from the first one on."""
        if step < warm_up:
            return (step + 1) / (warm_up + 1)
        return fall((step - warm_up) / max(steps - warm_up, 1))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def backward_with_graph(loss: Tensor, model: nn.Module) -> None:
    """Add the gradients of `loss`, with their graph, to `.grad`. `loss.backward` would do the same
    and warn of the reference cycle, which SophiaH breaks."""
    params = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(loss, params, create_graph=True, allow_unused=True)
    for param, gradient in zip(params, gradients):
        if gradient is not None:
            param.grad = gradient if param.grad is None else param.grad + gradient
