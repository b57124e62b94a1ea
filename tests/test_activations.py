import pytest
import torch
import torch.nn.functional as F

from activations import ACTIVATION_FUNCTIONS, BLOCK


def random(*shape, **kwargs):
    return (3 * torch.randn(*shape, **kwargs)).requires_grad_()


@pytest.mark.parametrize("name", ACTIVATION_FUNCTIONS)
def test_both_derivatives_are_right(name):
    torch.manual_seed(1)
    states = random(5, 7, dtype=torch.float64)
    assert torch.autograd.gradcheck(ACTIVATION_FUNCTIONS[name], (states,))
    assert torch.autograd.gradgradcheck(ACTIVATION_FUNCTIONS[name], (states,))


@pytest.mark.parametrize("shape", [(BLOCK // 8 + 3, 17), (3, 1), (0, 4)])
@pytest.mark.parametrize("transposed", [False, True])
def test_gelu_and_its_derivatives_are_pytorchs(shape, transposed):
    torch.manual_seed(2)
    states, vector = random(*shape), torch.randn(*shape)
    results = []
    for function in (ACTIVATION_FUNCTIONS["gelu"], F.gelu):
        inputs = states.mT if transposed else states
        outputs = function(inputs)
        gradients = torch.autograd.grad(outputs.square().sum(), states, create_graph=True)
        results.append([outputs, *gradients, *torch.autograd.grad(gradients, states, vector)])
    for ours, pytorchs in zip(*results):
        torch.testing.assert_close(ours, pytorchs)
