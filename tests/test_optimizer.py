import copy

import numpy as np
import pytest
import torch

from optimizer import CPU_BLOCK, AdamW

SETTINGS = dict(lr=3e-3, betas=(0.8, 0.97), eps=1e-6, weight_decay=0.1)


def run(optimizer_class, steps=1000):
    """A small regression with tensors of many shapes, trained in float64."""
    generator = torch.Generator().manual_seed(3)
    shapes = [(), (7,), (5, 3), (2, 3, 4)]
    params = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    params.append(torch.randn(6, 5, generator=generator, dtype=torch.float64).t())  # not contiguous
    params = [param.requires_grad_() for param in params]
    groups = [{"params": params[:2], "weight_decay": 0.0, "lr": 1e-2}, {"params": params[2:]}]
    optimizer = optimizer_class(groups, **SETTINGS)
    targets = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in params]
    for step in range(steps):
        optimizer.zero_grad(set_to_none=True)
        loss = sum(((p - t) ** 4).sum() for p, t in zip(params, targets))
        loss = loss + torch.randn((), generator=generator, dtype=torch.float64) * params[1].sum()
        loss.backward()
        if step % 3 == 0:
            params[2].grad = None  # steps without this one: its bias correction lags behind
        optimizer.step()
    return [param.detach() for param in params]


def test_equals_torch_adamw_over_1000_steps():
    for ours, theirs in zip(run(AdamW), run(torch.optim.AdamW), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_float32_tensor_of_several_blocks_equals_torch():
    start = torch.randn(3 * CPU_BLOCK + 5)
    results = []
    for optimizer_class in (AdamW, torch.optim.AdamW):
        torch.manual_seed(0)
        param = start.clone().requires_grad_()
        optimizer = optimizer_class([param], **SETTINGS)
        for _ in range(50):
            param.grad = torch.randn(start.shape)
            optimizer.step()
        results.append(param.detach())
    torch.testing.assert_close(*results, rtol=0, atol=1e-6)


def test_equals_the_published_algorithm():
    """Algorithm 2 of Loshchilov & Hutter 2019, written out in NumPy."""
    rng = np.random.default_rng(0)
    theta = rng.standard_normal(11)
    param = torch.tensor(theta, requires_grad=True)
    optimizer = AdamW([param], **SETTINGS)
    (beta1, beta2), m, v = SETTINGS["betas"], 0.0, 0.0
    for t in range(1, 30):
        g = rng.standard_normal(11)
        param.grad = torch.tensor(g)
        optimizer.step()
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g**2
        m_hat, v_hat = m / (1 - beta1**t), v / (1 - beta2**t)
        update = m_hat / (np.sqrt(v_hat) + SETTINGS["eps"])
        theta = theta - SETTINGS["lr"] * (update + SETTINGS["weight_decay"] * theta)
    np.testing.assert_allclose(param.detach().numpy(), theta, rtol=1e-10)


def test_a_parameter_without_gradient_is_not_touched():
    still, moving = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    optimizer = AdamW([still, moving], weight_decay=0.5)
    moving.grad = torch.ones(3)
    optimizer.step()
    assert torch.equal(still, torch.ones(3)) and still not in optimizer.state
    assert (moving < 1).all()


def test_state_dict_round_trip():
    def steps(optimizer, param, count):
        for _ in range(count):
            param.grad = param.detach() ** 2 + 1
            optimizer.step()

    first = torch.linspace(-1, 1, 9).requires_grad_()
    optimizer = AdamW([first], **SETTINGS)
    steps(optimizer, first, 5)
    second = first.detach().clone().requires_grad_()
    resumed = AdamW([second], lr=123.0)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    steps(optimizer, first, 5)
    steps(resumed, second, 5)
    assert torch.equal(first, second)


def test_closure_and_schedulers_work():
    param = torch.ones(2, requires_grad=True)
    optimizer = AdamW([param], lr=0.1, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)

    def closure():
        optimizer.zero_grad()
        loss = (param**2).sum()
        loss.backward()
        return loss

    losses = []
    for _ in range(10):
        losses.append(optimizer.step(closure).item())
        scheduler.step()
    assert losses[0] == 2 and losses == sorted(losses, reverse=True)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0)


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(lr=-1.0), "lr must be at least 0"),
        (dict(lr=float("nan")), "lr must be at least 0"),
        (dict(eps=-1e-8), "eps must"),
        (dict(weight_decay=-0.1), "weight_decay must"),
        (dict(betas=(1.0, 0.9)), r"betas\[0\]"),
        (dict(betas=(0.9, -0.1)), r"betas\[1\]"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        AdamW([torch.ones(1)], **settings)


def test_learning_rate_zero_changes_nothing():
    param = torch.ones(2, requires_grad=True)
    param.grad = torch.ones(2)
    AdamW([param], lr=0.0).step()
    assert torch.equal(param, torch.ones(2))


def test_sparse_gradients_are_refused():
    embedding = torch.nn.Embedding(5, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse"):
        AdamW(embedding.parameters()).step()
