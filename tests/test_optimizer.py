import copy
import functools
import gc
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import optimizer as optimizer_module
from optimizer import CPU_BLOCK, AdamW, SophiaG, SophiaH
from tasks import TASKS

pytestmark = pytest.mark.filterwarnings("ignore:Using backward.. with create_graph")

NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="the GPU is CUDA's")
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


@pytest.mark.parametrize("eps", [1e-8, 1e-16])
def test_rows_that_never_had_a_gradient_stay_and_the_others_equal_torch(eps):
    torch.manual_seed(0)
    start, seen = torch.randn(500, 8), torch.rand(500, 1) < 0.5
    gradients = [torch.randn(500, 8) * scale * seen for scale in (1e-9, 1e-3, 1)]
    results = []
    for optimizer_class in (AdamW, torch.optim.AdamW):
        param = start.clone().requires_grad_()
        optimizer = optimizer_class([param], lr=1e-2, eps=eps, weight_decay=0)
        for gradient in gradients:
            param.grad = gradient.clone()
            optimizer.step()
        assert torch.equal(param[~seen[:, 0]], start[~seen[:, 0]])
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


# ------------------------------------------------------------------------------------------ Sophia


def relative_l2(estimate, truth):
    return float((estimate - truth).norm() / truth.norm())


class Network(torch.nn.Module):
    """4 -> 5 -> (3 classes, 1 value), smooth, in float64: small enough for an exact Hessian."""

    def __init__(self):
        super().__init__()
        self.hidden = torch.nn.Linear(4, 5)
        self.classes = torch.nn.Linear(5, 3)
        self.value = torch.nn.Linear(5, 1)
        self.double()

    def forward(self, x):
        states = torch.tanh(self.hidden(x))
        return self.classes(states), self.value(states).squeeze(1)


@pytest.fixture
def network():
    return Network()


ROWS = 7, 3  # of the classification and of the regression: not the same, so a mix-up shows
GENERATOR = torch.Generator().manual_seed(5)
X1, X2 = (torch.randn(n, 4, generator=GENERATOR, dtype=torch.float64) for n in ROWS)
CLASSES = torch.randint(3, (ROWS[0],), generator=GENERATOR)
VALUES = torch.randn(ROWS[1], generator=GENERATOR, dtype=torch.float64)


def total_loss(network):
    return F.cross_entropy(network(X1)[0], CLASSES) + F.mse_loss(network(X2)[1], VALUES)


def exact_diagonals(network):
    """Of the Hessian and of the Gauss-Newton matrix of `total_loss`, from whole matrices."""
    names, start = zip(*network.named_parameters())
    flat = torch.cat([p.detach().flatten() for p in start])

    def outputs(flat):
        pieces = flat.split([p.numel() for p in start])
        parameters = {n: f.view_as(p) for n, f, p in zip(names, pieces, start)}
        call = torch.func.functional_call
        return call(network, parameters, X1)[0], call(network, parameters, X2)[1]

    def loss(flat):
        logits, values = outputs(flat)
        return F.cross_entropy(logits, CLASSES) + F.mse_loss(values, VALUES)

    hessian = torch.func.hessian(loss)(flat).diagonal()
    logits_by_weight, values_by_weight = torch.func.jacrev(outputs)(flat)
    probabilities = outputs(flat)[0].softmax(-1)
    curvature = torch.diag_embed(probabilities) - probabilities[:, :, None] * probabilities[:, None]
    of_classes = torch.einsum("bcp,bcd,bdp->p", logits_by_weight, curvature, logits_by_weight)
    of_values = 2 * values_by_weight.square().sum(0)
    return hessian, of_classes / ROWS[0] + of_values / ROWS[1]


def mean_estimate(optimizer, params, draw, n_draws):
    """`draw` refreshes; with betas[1] = 0 the moving average is the last estimate alone."""
    total = 0.0
    for _ in range(n_draws):
        optimizer.zero_grad()
        draw()
        total = total + torch.cat([optimizer.state[p]["hessian"].flatten() for p in params])
    return total / n_draws


def test_hutchinson_estimate_of_a_quadratic_is_unbiased():
    a = torch.randn(9, 9, dtype=torch.float64)
    matrix = a @ a.T + torch.diag(torch.arange(9.0))
    x = torch.randn(9, dtype=torch.float64, requires_grad=True)
    optimizer = SophiaH([x], lr=0.0, betas=(0.9, 0.0), hess_interval=1)

    def draw():
        (x @ matrix @ x / 2).backward(create_graph=True)
        optimizer.step()

    assert relative_l2(mean_estimate(optimizer, [x], draw, 8000), matrix.diagonal()) < 0.05


def test_hutchinson_estimate_of_a_network_is_unbiased(network):
    params = list(network.parameters())
    optimizer = SophiaH(params, lr=0.0, betas=(0.9, 0.0), hess_interval=1)

    def draw():
        total_loss(network).backward(create_graph=True)
        torch.nn.utils.clip_grad_norm_(params, 1e-3)  # the curvature is that before clipping
        optimizer.step()

    estimate = mean_estimate(optimizer, params, draw, 12_000)
    assert relative_l2(estimate, exact_diagonals(network)[0]) < 0.05


def drawn_from(task, outputs):
    """Draw labels from the outputs of a task."""
    noise = torch.randn_like(outputs if task.classes else outputs[:, None])
    return task.draw(outputs.detach(), noise)


def test_gauss_newton_bartlett_estimate_of_two_tasks_is_unbiased(network):
    params = list(network.parameters())
    optimizer = SophiaG(params, lr=0.0, betas=(0.9, 0.0))

    def draw():
        logits, values = network(X1)[0], network(X2)[1]
        first = F.cross_entropy(logits, drawn_from(TASKS["sst"], logits))
        second = F.mse_loss(values, drawn_from(TASKS["sts"], values))
        (ROWS[0] ** 0.5 * first + ROWS[1] ** 0.5 * second).backward()
        optimizer.update_hessian()
        optimizer.step()

    estimate = mean_estimate(optimizer, params, draw, 8000)
    assert relative_l2(estimate, exact_diagonals(network)[1]) < 0.05


def test_gauss_newton_bartlett_estimate_of_a_quadratic_is_unbiased():
    """mean (x_i w - y_i)^2: its Gauss-Newton matrix is its Hessian, 2 X^T X / bs."""
    inputs = torch.randn(6, 5, dtype=torch.float64)
    w = torch.randn(5, dtype=torch.float64, requires_grad=True)
    optimizer = SophiaG([w], lr=0.0, betas=(0.9, 0.0))

    def draw():
        outputs = inputs @ w
        F.mse_loss(outputs, drawn_from(TASKS["sts"], outputs)).backward()
        optimizer.update_hessian(bs=6)
        optimizer.step()

    truth = 2 * inputs.square().sum(0) / 6
    assert relative_l2(mean_estimate(optimizer, [w], draw, 8000), truth) < 0.05


def test_sophiah_equals_pytorch_optimizer_step_for_step(network):
    """Given the same noise, which both draw with randn_like for each parameter in order."""
    from pytorch_optimizer import SophiaH as TheirSophiaH

    twin = copy.deepcopy(network)
    settings = dict(lr=0.05, betas=(0.9, 0.95), weight_decay=0.1, eps=1e-9)
    ours = SophiaH(network.parameters(), rho=0.3, hess_interval=3, **settings)
    theirs = TheirSophiaH(twin.parameters(), p=0.3, update_period=3, **settings)
    for step in range(20):
        for model, optimizer in ((network, ours), (twin, theirs)):
            torch.manual_seed(step)
            optimizer.zero_grad()
            total_loss(model).backward(create_graph=True)
            optimizer.step()
        for mine, expected in zip(network.parameters(), twin.parameters()):
            torch.testing.assert_close(mine, expected, rtol=1e-9, atol=1e-12)
            averages = ours.state[mine]["hessian"], theirs.state[expected]["hessian_moment"]
            torch.testing.assert_close(*averages, rtol=1e-9, atol=1e-12)


def test_sophiag_equals_the_published_rule():
    """Algorithms 2 and 3 of Liu et al. 2023 in NumPy, with lr and rho as our docstring maps them."""
    rng = np.random.default_rng(0)
    theta = rng.standard_normal(11)
    param = torch.tensor(theta, requires_grad=True)
    lr, (beta1, beta2), rho, decay, eps, bs = 0.02, (0.9, 0.95), 0.3, 0.1, 1e-9, 5
    optimizer = SophiaG([param], lr, (beta1, beta2), rho, decay, eps)
    m = h = np.zeros(11)
    clipped = 0
    for t in range(1, 40):
        if t % 4 == 1:
            drawn = rng.standard_normal(11)
            param.grad = torch.tensor(drawn)
            optimizer.update_hessian(bs)
            h = beta2 * h + (1 - beta2) * bs * drawn * drawn
        g = rng.standard_normal(11)
        param.grad = torch.tensor(g)
        optimizer.step()
        m = beta1 * m + (1 - beta1) * g
        theta = theta - lr * decay * theta
        ratio = m / np.maximum(rho * h, rho * eps)
        theta = theta - lr * rho * np.clip(ratio, -1, 1)
        clipped += (np.abs(ratio) > 1).sum()
        np.testing.assert_allclose(param.detach().numpy(), theta, rtol=1e-10)
    assert 0 < clipped < 39 * 11
    share = (np.abs(m / np.maximum(h, eps)) > rho).mean()
    assert float(optimizer.statistics()["clipped"]) == pytest.approx(share)
    assert float(optimizer.statistics()["hessian_norm"]) == pytest.approx(np.linalg.norm(h))


def test_estimates_are_made_at_steps_1_4_7():
    param = torch.ones(3, requires_grad=True)
    optimizer = SophiaH([param], hess_interval=3)
    refreshed = []
    for step in range(1, 9):
        before = optimizer.state[param].get("hessian", torch.zeros(3)).clone()
        optimizer.zero_grad()
        (param**4).sum().backward(create_graph=optimizer.refreshes)
        optimizer.step()
        if not torch.equal(before, optimizer.state[param]["hessian"]):
            refreshed.append(step)
    assert refreshed == [1, 4, 7]


def test_a_refresh_without_a_graph_is_a_clear_error():
    param = torch.ones(3, requires_grad=True)
    (param**2).sum().backward()
    with pytest.raises(RuntimeError, match=r"step 1 .* loss.backward\(create_graph=True\)"):
        SophiaH([param]).step()


def test_gradients_from_autograd_grad_serve_too(network):
    params = list(network.parameters())
    gradients = torch.autograd.grad(total_loss(network), params, create_graph=True)
    for param, gradient in zip(params, gradients):
        param.grad = gradient
    optimizer = SophiaH(params, lr=0.0)
    optimizer.step()
    assert all(optimizer.state[param]["hessian"].any() for param in params)
    assert not any(param.grad.requires_grad for param in params)


def test_sophiah_does_not_touch_a_parameter_without_gradient():
    still, moving, linear = (torch.ones(2, requires_grad=True) for _ in range(3))
    optimizer = SophiaH([still, moving, linear], weight_decay=0.5)
    ((moving**4).sum() + linear.sum()).backward(create_graph=True)
    optimizer.step()
    assert torch.equal(still, torch.ones(2)) and still not in optimizer.state
    assert (moving < 1).all() and (linear < 1).all()
    assert not optimizer.state[linear]["hessian"].any()  # no curvature there


@pytest.mark.parametrize("optimizer_class", [SophiaH, SophiaG])
def test_sophia_state_dict_round_trip(network, optimizer_class):
    """Resumed in the middle between two estimates."""

    def steps(model, optimizer, numbers):
        for number in numbers:
            torch.manual_seed(number)
            optimizer.zero_grad()
            if optimizer_class is SophiaG and number % 4 == 0:
                total_loss(model).backward()
                optimizer.update_hessian()
                optimizer.zero_grad()
            total_loss(model).backward(create_graph=True)
            optimizer.step()

    extra = dict(hess_interval=4) if optimizer_class is SophiaH else {}
    first = optimizer_class(network.parameters(), lr=0.1, **extra)
    steps(network, first, range(6))
    twin = copy.deepcopy(network)
    second = optimizer_class(twin.parameters(), lr=9.0, **extra)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    steps(network, first, range(6, 12))
    steps(twin, second, range(6, 12))
    assert second.n_steps == 12
    for mine, expected in zip(network.parameters(), twin.parameters()):
        assert torch.equal(mine, expected)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_estimate_that_is_not_finite_is_skipped_and_counted(bad):
    param = torch.ones(3, requires_grad=True)
    optimizer = SophiaG([param])

    def step(gradient):
        param.grad = torch.tensor(gradient)
        optimizer.update_hessian()
        param.grad = torch.ones(3)
        optimizer.step()

    step([1.0, 2.0, 3.0])
    good = optimizer.state[param]["hessian"].clone()
    assert good.all() and optimizer.skipped_refreshes == 0
    step([1.0, bad, 3.0])
    assert optimizer.skipped_refreshes == 1
    assert torch.equal(optimizer.state[param]["hessian"], good)

    other = torch.zeros(2, requires_grad=True)
    optimizer = SophiaH([other])
    (other**1.5).sum().backward(create_graph=True)  # its second derivative at 0 is infinite
    optimizer.step()
    assert optimizer.skipped_refreshes == 1
    assert not optimizer.state[other]["hessian"].any() and other.isfinite().all()


def test_the_estimate_of_a_step_that_is_not_taken_is_replaced():
    """Against the formula: only the estimate before the step counts, and only for one step."""
    param = torch.ones(3, dtype=torch.double, requires_grad=True)
    optimizer = SophiaG([param], betas=(0.9, 0.75))
    expected = torch.zeros(3, dtype=torch.double)
    for drawn, taken in [(3.0, False), (5.0, True), (7.0, False), (11.0, False), (2.0, True)]:
        param.grad = drawn * torch.arange(3, dtype=torch.double)
        optimizer.update_hessian(bs=4)
        if taken:
            expected = 0.75 * expected + 0.25 * 4 * param.grad**2
            optimizer.step()
            torch.testing.assert_close(optimizer.state[param]["hessian"], expected)
            optimizer.step()  # between two estimates
        found = optimizer.state.get(param, {}).get("hessian", torch.zeros_like(param))
        torch.testing.assert_close(found, expected)


class Something:
    pass


def test_memory_is_flat_over_200_refreshes():
    """What only a graph holds is gone after the step, whether it used the graph or not, and before
    `.grad` is cleared. The collector of reference cycles is off: none may be left for it."""
    layer = torch.nn.Linear(100, 100)
    optimizer = SophiaH(layer.parameters(), hess_interval=2)
    held = weakref.WeakSet()

    class Node(torch.autograd.Function):
        """The identity, with something of which only the graph knows."""

        @staticmethod
        def forward(ctx, states):
            ctx.something = Something()
            held.add(ctx.something)
            return states.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient

    gc.disable()
    try:
        for _ in range(400):
            optimizer.zero_grad()
            loss = Node.apply(layer(torch.randn(50, 100)).tanh()).square().mean()
            loss.backward(create_graph=True)
            assert held
            del loss
            optimizer.step()
            assert not held
    finally:
        gc.enable()


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(rho=0.0), "rho must be above 0"),
        (dict(rho=-1.0), "rho must be at least 0"),
        (dict(eps=0.0), "eps must be above 0"),
        (dict(betas=(0.9, 1.0)), r"betas\[1\]"),
    ],
)
@pytest.mark.parametrize("optimizer_class", [SophiaH, SophiaG])
def test_sophia_refuses_settings_out_of_range(optimizer_class, settings, message):
    with pytest.raises(ValueError, match=message):
        optimizer_class([torch.ones(1)], **settings)


def test_a_hess_interval_of_zero_is_refused():
    with pytest.raises(ValueError, match="hess_interval must be at least 1"):
        SophiaH([torch.ones(1)], hess_interval=0)


# --------------------------------------------------------- the fused form, steps that are left out


@pytest.fixture
def fused_on(monkeypatch):
    """Choose on which devices AdamW's step is the fused kernel."""
    return lambda *devices: monkeypatch.setattr(optimizer_module, "FUSED_DEVICES", set(devices))


def scalars(device, scale, bad):
    return dict(
        grad_scale=torch.tensor(scale, device=device),
        found_inf=torch.tensor(float(bad), device=device),
    )


def trained_by(optimizer_class, steps, device="cpu", unfrozen_at=3, switch=lambda number: None):
    """Train two tensors, one of which gets its first gradient in step `unfrozen_at`. `steps` has (scale,
    whether it is bad) of each; an optimizer that takes neither sees what it should come to. Return
    parameters and states."""
    generator = torch.Generator().manual_seed(1)
    shapes = (700,), (31, 17)
    params = [torch.randn(s, generator=generator).to(device).requires_grad_() for s in shapes]
    groups = [{"params": params[:1], "weight_decay": 0.0}, {"params": params[1:]}]
    optimizer = optimizer_class(groups, **SETTINGS)
    for number, (scale, bad) in enumerate(steps):
        switch(number)
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator).to(device)
        if number < unfrozen_at:
            params[1].grad = None
        if isinstance(optimizer, AdamW):
            if bad:
                params[0].grad[5] = torch.nan
            optimizer.step(**scalars(device, scale, bad))
        elif not bad:
            for param in params:
                if param.grad is not None:
                    param.grad /= scale
            optimizer.step()
    return [param.detach() for param in params], [optimizer.state[param] for param in params]


STEPS = [(1.0, True), (1.0, False), (3.0, False), (1.0, True)] + [
    (2.5, n % 7 == 0) for n in range(60)
]
ON = ["cpu", pytest.param("cuda", marks=NEEDS_GPU)]


@pytest.mark.parametrize("device", ON)
@pytest.mark.parametrize("devices", [(), ("cpu", "cuda")], ids=["own form", "fused"])
@pytest.mark.parametrize("peer", ["foreach", "fused"])
def test_scaled_and_bad_steps_equal_torch_adamw_without_the_bad_steps(
    fused_on, devices, device, peer
):
    fused_on(*devices)
    theirs = functools.partial(torch.optim.AdamW, **{peer: True})
    (ours, states), (expected, peers) = (
        trained_by(kind, STEPS, device) for kind in (AdamW, theirs)
    )
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    for state, of_peer in zip(states, peers, strict=True):
        assert set(state) == set(of_peer) and float(state["step"]) == float(of_peer["step"])
        for name in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(state[name], of_peer[name], rtol=1e-4, atol=1e-6)
    assert float(states[0]["step"]) > float(states[1]["step"]) > 0


@pytest.mark.parametrize("device", ON)
@given(bad=st.lists(st.booleans(), min_size=1, max_size=12), fused=st.booleans())
@settings(max_examples=20, deadline=None)
def test_a_masked_step_equals_no_step_bit_for_bit(device, bad, fused):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optimizer_module, "FUSED_DEVICES", {device} if fused else set())
        params = [torch.linspace(-1, 1, n, device=device).requires_grad_() for n in (40, 7)]
        twins = [param.detach().clone().requires_grad_() for param in params]
        masked, other = AdamW(params, **SETTINGS), AdamW(twins, **SETTINGS)
        for number, is_bad in enumerate(bad):
            for param, twin in zip(params, twins, strict=True):
                param.grad = torch.full_like(param, torch.inf) if is_bad else (param * number).cos()
                twin.grad = param.grad.detach().clone()
            masked.step(**scalars(device, 1.5, is_bad))
            if not is_bad:
                other.step(**scalars(device, 1.5, False))
            for param, twin in zip(params, twins, strict=True):
                assert torch.equal(param, twin)
                for name, value in other.state[twin].items():
                    assert torch.equal(masked.state[param][name], value)


@pytest.mark.parametrize("device", ON)
def test_own_and_fused_form_continue_each_other(fused_on, device):
    """One optimizer that changes its form every other step comes to the same as PyTorch's."""
    ours, states = trained_by(
        AdamW, STEPS, device, switch=lambda number: fused_on(*[device] * (number // 2 % 2))
    )
    expected, _ = trained_by(torch.optim.AdamW, STEPS, device)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [int, torch.Tensor.detach], ids=["plain", "shared"])
@pytest.mark.parametrize("fused", [True, False])
def test_a_state_with_plain_or_shared_step_numbers_is_read(fused_on, kind, fused):
    """Loading copies the numbers: the optimizer that was saved does not count the other's steps."""
    fused_on(*["cpu"] * fused)
    pairs = []
    for _ in range(2):
        param = torch.linspace(-1, 1, 9).requires_grad_()
        pairs.append((param, AdamW([param], **SETTINGS)))
    (param, first), (twin, second) = pairs
    for _ in range(5):
        param.grad = param.detach().cos()
        first.step()
    saved = first.state_dict()
    saved["state"] = {0: saved["state"][0] | {"step": kind(first.state[param]["step"])}}
    second.load_state_dict(saved)
    assert type(second.state[twin]["step"]) is torch.Tensor
    second.state[twin] |= {
        name: second.state[twin][name].clone() for name in ("exp_avg", "exp_avg_sq")
    }
    with torch.no_grad():
        twin.copy_(param)
    for mine, optimizer in pairs:
        mine.grad = torch.ones(9)
        optimizer.step()
    assert torch.equal(param, twin)
    assert first.state[param]["step"] == second.state[twin]["step"] == 6
