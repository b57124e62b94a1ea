"""Learned weights and projected gradients, against the papers' formulas in NumPy."""

import numpy as np
import pytest
import torch
from test_multitask_classifier import data, gradients, model, options, windows  # noqa: F401

import multitask_classifier as mc
from balancing import projected_sum, weighted_loss
from optimizer import build_optimizer
from tasks import TASKS
from utils import UserError, seeded_generator


def pcgrad(gradients, orders):
    """Algorithm 1 of Yu et al. 2020, line by line."""
    projected = []
    for i, order in enumerate(orders):
        g = gradients[i].copy()
        for j in order:
            if j != i and g @ gradients[j] < 0:
                g = g - g @ gradients[j] / (gradients[j] @ gradients[j]) * gradients[j]
        projected.append(g)
    return sum(projected)


@pytest.mark.parametrize("seed", range(10))
def test_projected_gradients_are_those_of_the_paper(seed):
    random = np.random.default_rng(seed)
    vectors = random.normal(size=(5, 7))
    orders = [random.permutation(5).tolist() for _ in vectors]
    mine = projected_sum(vectors @ vectors.T, orders) @ vectors
    np.testing.assert_allclose(mine, pcgrad(vectors, orders), rtol=1e-9, atol=1e-12)
    assert not np.allclose(mine, vectors.sum(0))
    free = np.abs(vectors)  # no two of them conflict
    np.testing.assert_allclose(projected_sum(free @ free.T, orders) @ free, free.sum(0))


@pytest.mark.parametrize("name", TASKS)
def test_learned_weights_and_their_gradient(model, name):  # noqa: F811
    task, s, value, share = TASKS[name], 0.7, 1.3, 0.25
    model = mc.MultitaskBERT(model.bert, TASKS, learned_weights=True)
    model.log_variances[name].data.fill_(s)
    loss = weighted_loss(
        model, task, torch.tensor(value), share, options("--loss_weights", "learned")
    )
    variance = np.exp(s)
    c = 0.5 if name == "sts" else 1
    assert loss.item() == pytest.approx(c * value / variance + share * np.log(variance**0.5))
    loss.backward()
    slope = -c * value / variance + share / 2
    assert model.log_variances[name].grad.item() == pytest.approx(slope)
    assert all(model.log_variances[other].grad is None for other in TASKS if other != name)


@pytest.mark.parametrize("n_batches", [1, 2])
def test_a_step_projects_the_gradients_of_the_tasks(model, data, n_batches):  # noqa: F811
    model.double().eval()
    window = windows(data, 10 // n_batches, n_batches)
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    weights = dict.fromkeys(TASKS, 0.0)

    def of(**chosen):
        text = ",".join(f"{name}={value}" for name, value in (weights | chosen).items())
        seen = gradients(model, window, options("--loss_weights", text, "--clip", "0"))[1]
        return dict(zip(names, seen, strict=True))

    # A negative weight is no flag's value; it makes the tasks conflict.
    plain = [of(**{name: 1}) for name in TASKS]
    shared = [name for name in names if name.startswith(("bert.", "attention_layer."))]
    vectors = np.array([torch.cat([g[n].flatten() for n in shared]).numpy() for g in plain])
    chosen = options("--gradient_surgery", "pcgrad", "--clip", "0")
    chosen.loss_weights = {"sst": 1, "para": -1, "sts": 1}
    vectors[1] *= -1
    generator = seeded_generator(torch.device("cpu"), chosen.seed, 0)
    orders = [torch.randperm(3, generator=generator).tolist() for _ in TASKS]
    mine = dict(zip(names, gradients(model, window, chosen)[1], strict=True))
    found = torch.cat([mine[name].flatten() for name in shared]).numpy()
    expected = pcgrad(vectors, orders)
    assert not np.allclose(expected, vectors.sum(0), rtol=1e-3)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)
    for name in set(names) - set(shared):
        total = plain[0][name] - plain[1][name] + plain[2][name]
        torch.testing.assert_close(mine[name], total, rtol=1e-5, atol=1e-8)


def test_learned_weights_have_a_rate_of_their_own(model):  # noqa: F811
    chosen = options("--loss_weights", "learned")
    model = mc.MultitaskBERT(model.bert, TASKS, learned_weights=True)
    (group,) = (
        g for g in build_optimizer(model, chosen).param_groups if g["part"] == "loss weights"
    )
    assert len(group["params"]) == 3 and group["weight_decay"] == 0
    assert group["lr"] == pytest.approx(100 * chosen.lr)


@pytest.mark.parametrize(
    "flags",
    [
        ["--gradient_surgery", "pcgrad", "--optimizer", "sophiah"],
        ["--gradient_surgery", "pcgrad", "--moe", "soft"],
        ["--gradient_surgery", "pcgrad", "--sst"],
        ["--loss_weights", "learned", "--optimizer", "sophiag"],
    ],
)
def test_what_cannot_work_is_refused(flags, capsys):
    with pytest.raises((SystemExit, UserError)):
        options(*flags)
    assert f"{flags[0]}" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("more", [[], ["--moe", "hard"], ["--optimizer", "sophiah"]])
def test_a_checkpoint_with_learned_weights_is_used_like_others(flags, tmp_path, more):
    assert mc.main([*flags, "--loss_weights", "learned", *more]) == 0
    (path,) = (tmp_path / "models_dir").glob("*.pt")
    content = mc.load_checkpoint(path).content
    values = [v for k, v in content["model"].items() if k.startswith("log_variances.")]
    assert len(values) == 3 and all(values)
    written = {file.name: file.read_bytes() for file in tmp_path.glob("*-*.csv")}
    assert mc.main([*flags, "--evaluate", str(path)]) == 0
    assert written == {file.name: file.read_bytes() for file in tmp_path.glob("*-*.csv")}
    trained = mc.load_trained(str(path), options())
    assert not any("log_variances" in name for name in trained.model.state_dict())
