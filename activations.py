"""Activation functions of the feed-forward layers, by their names in a config.json.

GELU is written out, with its second derivative: SophiaH needs it.
"""

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

# Elements of one pass of `gelu_curvature`: a few tensors of this size stay in the cache.
GELU_BLOCK = 1 << 16


class Gelu(torch.autograd.Function):
    """x Phi(x) (Hendrycks & Gimpel 2016, arXiv 1606.08415). Value and gradient are those of `F.gelu`.
    The second derivative, for SophiaH, is written out: PyTorch's own makes so many passes over whole
    tensors that it takes a fifth of the time of an estimate."""

    @staticmethod
    def forward(ctx, states: Tensor) -> Tensor:
        ctx.save_for_backward(states)
        return F.gelu(states)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return GeluGradient.apply(grad, *ctx.saved_tensors)


class GeluGradient(torch.autograd.Function):
    """The gradient of `Gelu`: grad * gelu'(states)."""

    @staticmethod
    def forward(ctx, grad: Tensor, states: Tensor) -> Tensor:
        ctx.save_for_backward(grad, states)
        return torch.ops.aten.gelu_backward(grad, states)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, vector: Tensor) -> tuple[Tensor, Tensor]:
        grad, states = ctx.saved_tensors
        by_grad = torch.ops.aten.gelu_backward(vector, states)
        return by_grad, gelu_curvature(vector * grad, states)


def gelu_curvature(factor: Tensor, states: Tensor) -> Tensor:
    """Return factor * gelu''(states), where gelu''(x) = (2 - x^2) exp(-x^2 / 2) / sqrt(2 pi)."""
    result = factor.flatten()
    blocks = result.split(GELU_BLOCK), states.flatten().split(GELU_BLOCK)
    for product, x in zip(*blocks, strict=True):
        square = x * x
        product *= torch.exp(square * -0.5).mul_(square.sub_(2).mul_(-1 / math.sqrt(2 * math.pi)))
    return result.view(factor.shape)


# By the names that `hidden_act` has in a config.json. Some differ only in their rounding.
TANH = "gelu_new gelu_fast gelu_accurate gelu_pytorch_tanh gelu_python_tanh".split()
PLAIN = ("silu", "hardswish", "mish", "relu", "relu6", "leaky_relu", "sigmoid", "tanh")
ACTIVATION_FUNCTIONS = {name: getattr(F, name) for name in PLAIN} | {
    **dict.fromkeys(["gelu", "gelu_python"], Gelu.apply),
    **dict.fromkeys(TANH, functools.partial(F.gelu, approximate="tanh")),
    "gelu_10": lambda x: Gelu.apply(x).clamp(-10, 10),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "swish": F.silu,
    "relu2": lambda x: F.relu(x).square(),
    "laplace": lambda x: 0.5 + 0.5 * torch.erf((x - 0.707107) / (0.282095 * math.sqrt(2))),
    "sqrtsoftplus": lambda x: F.softplus(x).sqrt(),
    "linear": lambda x: x,
}
