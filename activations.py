"""Activation functions, under the names that Hugging Face's `hidden_act` gives them."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 1 << 16  # elements of one pass of `gelu_curvature`: a few tensors of that stay in the cache


class Gelu(torch.autograd.Function):
    """x Phi(x) (Hendrycks & Gimpel 2016, arXiv 1606.08415). Value and gradient are `F.gelu`'s. The
    second derivative, for SophiaH, is written out: PyTorch's own makes so many passes over whole
    tensors that it takes a fifth of an estimate's time."""

    @staticmethod
    def forward(ctx, states: Tensor) -> Tensor:
        ctx.save_for_backward(states)
        return F.gelu(states)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return GeluGradient.apply(grad, *ctx.saved_tensors)


class GeluGradient(torch.autograd.Function):
    """grad * gelu'(states)"""

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
    """factor * gelu''(states), where gelu''(x) = (2 - x^2) exp(-x^2 / 2) / sqrt(2 pi)"""
    result = factor.flatten()
    for product, x in zip(result.split(BLOCK), states.flatten().split(BLOCK)):
        square = x * x
        product *= torch.exp(square * -0.5).mul_(square.sub_(2).mul_(-1 / math.sqrt(2 * math.pi)))
    return result.view(factor.shape)


ACTIVATION_FUNCTIONS = {
    "gelu": Gelu.apply,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}
