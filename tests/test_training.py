"""What a step changes and what follows it in a run: curvature, averages, learning rate, kept model."""

import copy
import csv
import os
import re
import signal
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr, spearmanr
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    LinearLR,
    ReduceLROnPlateau,
    SequentialLR,
)
from torch.utils._pytree import tree_leaves

import evaluation
import multitask_classifier as mc
import optimizer
import training
import utils
from batches import EpochSampler, training_windows
from curvature import LossScale, gauss_newton_gradients
from datasets import Example, rows_in_train
from flags import flags_page
from optimizer import build_optimizer
from options import parse_options
from run_log import RunLog
from tasks import TASKS
from training import Step, Training, clip_and_step, prepare_device

# Each spoils a loss so that its step cannot be taken.
SPOILERS = {
    "infinite loss": lambda loss: loss * torch.inf,
    "loss that is no number": lambda loss: loss * torch.nan,
    # The root of 0 is 0, and its gradient infinite.
    "gradient that is no number": lambda loss: loss + (loss * 0).sqrt(),
}
WITH_OPTIMIZER = {
    name: ["--optimizer", name, *(["--hess_interval", "2"] if row.flags else [])]
    for name, row in optimizer.OPTIMIZERS.items()
}


def content(*parts):
    """Return a copy of all that models and optimizers hold."""
    return copy.deepcopy([part.state_dict() for part in parts])


def same(one, other):
    pairs = zip(tree_leaves(one), tree_leaves(other), strict=True)
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


# ------------------------------------------------------------------- steps that are not taken


@pytest.fixture
def trainee(flags):
    """Make (model, optimizer, options, the windows of eight steps), each time the same."""

    def make(*more):
        options = parse_options(flags + [*more])
        parts = mc.load_all(options)
        samplers = {name: EpochSampler(len(rows), 1) for name, rows in parts.data["train"].items()}
        steps = training_windows(parts.data["train"], samplers, 48, 3, 2)
        return parts.model, build_optimizer(parts.model, options), options, list(steps)

    return make


@pytest.mark.parametrize("spoil", SPOILERS)
@pytest.mark.parametrize("name", WITH_OPTIMIZER)
def test_steps_that_are_not_taken_change_nothing(trainee, monkeypatch, name, spoil):
    """Nor do they change what later steps do: a twin that never saw their rows comes to the same
    weights, averages and estimates of the curvature. Of both kinds, with an estimate and without.
    """
    model, steps_of, options, windows = trainee(*WITH_OPTIMIZER[name])
    twin, steps_of_twin, _, _ = trainee(*WITH_OPTIMIZER[name])
    model.eval(), twin.eval()  # dropout would go on
    task_loss, taken = mc.task_loss, 0
    for number, window in enumerate(windows):
        if bad := number in (0, 2, 3, 6):
            monkeypatch.setattr(mc, "task_loss", lambda *rest: SPOILERS[spoil](task_loss(*rest)))
        before = content(model, steps_of)
        step = mc.training_step(model, window, steps_of, options)
        monkeypatch.setattr(mc, "task_loss", task_loss)
        assert same(content(model, steps_of), before) == bad == (step.problem is not None)
        assert all(parameter.grad is None for parameter in model.parameters())
        if not bad:
            taken += 1
            assert mc.training_step(twin, window, steps_of_twin, options).problem is None
        assert same(content(model, steps_of), content(twin, steps_of_twin))
    assert taken == 4
    if name != "adamw":
        assert steps_of.n_steps == 4 and steps_of.skipped_refreshes == 0
        assert any(state["hessian"].any() for state in steps_of.state.values())


@pytest.mark.parametrize("name", WITH_OPTIMIZER)
def test_after_a_step_that_is_not_taken_dropout_is_as_after_one_that_is(trainee, monkeypatch, name):
    states, task_loss = [], mc.task_loss
    for factor in (1, torch.inf):
        model, steps_of, options, windows = trainee(*WITH_OPTIMIZER[name])
        monkeypatch.setattr(mc, "task_loss", lambda *rest: task_loss(*rest) * factor)
        start = torch.get_rng_state()
        step = mc.training_step(model.train(), windows[0], steps_of, options)
        assert (step.problem is None) == (factor == 1)
        states.append(torch.get_rng_state())
    assert torch.equal(*states) and not torch.equal(states[0], start)


@pytest.fixture
def watched(flags, monkeypatch):
    """Run with flags, and with losses that are not finite in the steps with these numbers, from 0.
    Return for each step its learning rate, rows by task, and what was there before and after it."""

    def run(*more, bad=()):
        steps, task_loss, training_step, record = (
            [],
            mc.task_loss,
            mc.training_step,
            Training.record,
        )

        def spoiled(*arguments):
            return task_loss(*arguments) * (torch.inf if len(steps) - 1 in bad else 1)

        def noted_step(model, window, steps_of, options, *aids):
            rate = max(group["lr"] for group in steps_of.param_groups)
            rows = {
                name: [row for batch in window for row in batch.rows[name]]
                for name in options.tasks
            }
            before = content(model, steps_of)
            steps.append({"lr": rate, "rows": rows, "before": before})
            step = training_step(model, window, steps_of, options, *aids)
            steps[-1] |= {"after": content(model, steps_of), "taken": step.problem is None}
            return step

        def noted_record(run, *arguments):
            parts = [run.average] if run.average else []
            steps[-1]["average before"] = content(*parts)
            record(run, *arguments)
            steps[-1]["average after"] = content(*parts)

        with monkeypatch.context() as patch:
            patch.setattr(mc, "task_loss", spoiled)
            patch.setattr(mc, "training_step", noted_step)
            patch.setattr(Training, "record", noted_record)
            assert mc.main(flags + [*more]) == 0
        return steps

    return run


@pytest.mark.parametrize("name", WITH_OPTIMIZER)
def test_steps_of_a_run_that_are_not_taken_change_nothing(watched, capsys, name):
    """Neither weights, averages and curvature, nor the moving average of the weights."""
    more = ["--ema", "0.9", "--scheduler", "linear"]
    steps = watched(*WITH_OPTIMIZER[name], *more, bad=(0, 3, 4))
    assert len(steps) == 8
    for number, step in enumerate(steps):
        bad = number in (0, 3, 4)
        assert step["taken"] != bad
        assert same(step["before"], step["after"]) == bad
        assert same(step["average before"], step["average after"]) == bad
    printed = capsys.readouterr().out
    assert "steps skipped so far, because they were not finite: 3" in printed
    assert name == "adamw" or "0 estimates skipped so far" in printed


@pytest.fixture
def late_run(flags, monkeypatch, tmp_path):
    """Train as on a GPU, with the fused kernel, and infinite losses in the steps with these numbers, from
    0. Return the run, the windows of its steps, and its UserError if there was one."""

    def train(late, bad, *more):
        clip_and_step, training_step, windows = mc.clip_and_step, mc.training_step, []
        arrival = SimpleNamespace(synchronize=lambda: None) if late else None

        def step(model, window, *rest):
            windows.append(window)
            return training_step(model, window, *rest)

        def spoiled(model, steps_of, losses, *rest):
            factor = torch.inf if len(windows) - 1 in bad else 1
            losses = losses | {"sum": losses["sum"] * factor}
            check, _ = clip_and_step(model, steps_of, losses, *rest)
            return check, arrival

        more = ["--ema", "0.9", "--scheduler", "linear", "--clip", "0.1", *more]
        parts = mc.load_all(parse_options([*flags, *more]))
        run = Training(parts, tmp_path / "run.resume", RunLog(tmp_path / f"log{late}"))
        with monkeypatch.context() as patch:
            patch.setattr(optimizer, "FUSED_DEVICES", {"cpu"})
            patch.setattr(mc, "training_step", step)
            patch.setattr(mc, "clip_and_step", spoiled)
            try:
                mc.fit(run)
            except utils.UserError as error:
                return run, windows, error
        return run, windows, None

    return train


def test_a_signal_while_a_save_waits_for_a_gpu_loses_no_step(late_run):
    run, (window, *_), _ = late_run(True, ())
    arrival = SimpleNamespace(synchronize=lambda: signal.raise_signal(signal.SIGINT))
    run.record(Step(["sum"], [], torch.zeros(4), arrival), window)
    assert run.n_windows == 0
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # pytest-xdist ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            run.save()
    finally:
        signal.signal(signal.SIGINT, before)
    assert run.n_windows == 1 and run.unsettled is None


@pytest.mark.parametrize("bad", [(0, 3, 4), (2, 3, 7)], ids=str)
def test_a_run_that_learns_late_of_bad_steps_equals_one_that_learns_at_once(late_run, bad):
    """Weights, averages, rates, scores and counts are the same, bit for bit."""
    results = []
    for late in (False, True):
        run, windows, _ = late_run(late, bad)
        assert run.unsettled is None and run.skipped_steps == 3 and len(windows) == 8
        parts = content(run.model, run.optimizer, run.average, run.scheduler)
        results.append([parts, run.scores, run.train_scores, run.log.state()["n_steps"]])
    assert same(*results)
    assert results[0][-1] == 5


@pytest.mark.parametrize("late", [False, True])
def test_a_run_that_gives_up_names_the_rows_of_the_last_bad_step(late_run, capsys, late):
    """And takes no step after it. One step later it has the next batch, but not its update."""
    run, windows, error = late_run(late, (1, 2), "--max_bad_steps", "2")
    assert len(windows) == 3 + late
    assert "2 steps in a row were not finite (loss inf" in str(error)
    named = re.search("rows of the last step, by id: (.*)", capsys.readouterr().err)[1]
    rows = run.data["train"]["sst"].examples
    ids = ", ".join(rows[row].id for batch in windows[2] for row in batch.rows["sst"])
    assert f"sst {ids}" in named
    steps = {float(state["step"]) for state in run.optimizer.state.values()}
    assert steps == {1} and run.n_windows == 3


@pytest.mark.parametrize("bad", [(), (0, 2)])
def test_the_average_of_the_weights_is_evaluated_and_kept(watched, flags, tmp_path, bad):
    """Against the formula: 0.9 of the average and 0.1 of the weights after each step that was taken.
    The scores that are kept with it are those of its predictions."""
    steps = watched("--ema", "0.9", "--epochs", "1", "--lr", "1e-2", bad=bad)
    average = {}
    for step in (step for step in steps if step["taken"]):
        for name, value in step["after"][0].items():
            value = value.double()
            average[name] = 0.9 * average[name] + 0.1 * value if name in average else value
    (checkpoint,) = (tmp_path / "models_dir").glob("*.pt")
    model, _, kept = mc.load_checkpoint(checkpoint)
    assert model.state_dict().keys() == average.keys()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value.double(), average[name], rtol=1e-5, atol=1e-6)
    data = flags[flags.index("--data_dir") + 1]
    columns = (f"{data}/sts-dev.csv", "similarity"), (
        tmp_path / "sts-dev.csv",
        "predicted_similarity",
    )
    expected = pearsonr(*(column_of(*column) for column in columns)).statistic
    assert kept["dev_scores"]["sts"]["pearson"] == pytest.approx(expected, abs=1e-6)


def column_of(path, name, kind=float):
    with open(path, newline="") as file:
        return [kind(row[name]) for row in csv.DictReader(file, delimiter="\t")]


# --------------------------------------------------------------------------- what follows a step


def peer_rates(name, n_steps, warm_up, lr):
    """Return the rate of each step by PyTorch's own schedulers."""
    peer = torch.optim.SGD([torch.zeros(1)], lr=lr)
    rest = n_steps - warm_up
    tail = {
        "linear": lambda: LinearLR(peer, 1, 0, total_iters=rest),
        "cosine": lambda: CosineAnnealingLR(peer, rest),
    }[name]()
    schedule = tail
    if warm_up:
        first = LinearLR(peer, 1 / (warm_up + 1), 1, total_iters=warm_up)
        schedule = SequentialLR(peer, [first, tail], [warm_up])
    rates = []
    for _ in range(n_steps):
        rates.append(peer.param_groups[0]["lr"])
        peer.step(), schedule.step()
    return rates


@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step")
@pytest.mark.parametrize("bad", [(), (0, 3, 4)])
@pytest.mark.parametrize("warm_up", [0, 2])
@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_the_rate_of_each_step_of_a_run_is_that_of_pytorchs_schedulers(watched, name, warm_up, bad):
    """60 rows in batches of 8, two for a step, are 4 steps in each of 2 epochs. Steps that are not
    taken count."""
    more = ["--batch_size", "8", "--grad_accumulation", "2", "--samples_per_epoch", "60", "--sst"]
    if warm_up:
        more += ["--warmup", str(warm_up / 8)]
    steps = watched(*more, "--scheduler", name, "--lr", "1e-3", bad=bad)
    assert [step["lr"] for step in steps] == pytest.approx(peer_rates(name, 8, warm_up, 1e-3))


@pytest.mark.parametrize(
    "means",
    [
        [0.5, 0.5, 0.4, 0.6, 0.3, 0.3, 0.3],
        [0.1, 0.2, 0.3, 0.3, 0.3, 0.4, 0.4],
        [0.5, 0.4, 0.3, 0.2, 0.1, 0.1, 0.1],
    ],
)
def test_a_plateau_lowers_the_rate_of_a_run_as_pytorchs_scheduler_does(watched, monkeypatch, means):
    """More than one epoch in a row without a better mean halves it."""
    peer = torch.optim.SGD([torch.zeros(1)], lr=1e-3)
    schedule = ReduceLROnPlateau(peer, mode="max", factor=0.5, patience=1)
    expected = []
    for mean in means:
        expected.append(peer.param_groups[0]["lr"])
        schedule.step(mean)
    assert len(set(expected)) > 1
    rest = iter(means)
    monkeypatch.setattr(mc.evaluation, "mean_score", lambda *_: next(rest, 0.0))
    more = ["--epochs", str(len(means)), "--samples_per_epoch", "8", "--batch_size", "8", "--sst"]
    steps = watched(*more, "--scheduler", "plateau", "--lr", "1e-3")
    assert [step["lr"] for step in steps] == pytest.approx(expected)


@pytest.mark.parametrize(
    "means, kept",
    [
        ([0.3, 0.9, 0.5, 0.1], 2),
        ([0.5, 0.5, 0.5], 1),  # of equal ones the first
        ([0.2, 0.6, 0.6], 2),
        ([float("nan"), 0.2, 0.1, float("nan")], 2),
        ([float("nan")] * 2, 1),
        ([-0.5, -0.1, -0.1], 2),
    ],
)
def test_the_first_of_the_best_epochs_is_kept(flags, tmp_path, monkeypatch, means, kept):
    """Also if its score is no number, so that a run ends with a model."""
    rest = iter(means)
    monkeypatch.setattr(mc.evaluation, "mean_score", lambda *_: next(rest, 0.0))
    more = ["--epochs", str(len(means)), "--samples_per_epoch", "8", "--batch_size", "8", "--sst"]
    assert mc.main(flags + more + ["--scheduler", "none"]) == 0
    (checkpoint,) = (tmp_path / "models_dir").glob("*.pt")
    assert mc.load_checkpoint(checkpoint).content["epoch"] == kept


# ------------------------------------------------------------------------------ which rows it sees


def test_steps_of_a_run_have_the_shares_of_rows_that_flags_ask_for(watched):
    """12 rows a step, 40 an epoch: the last step is smaller."""
    more = ["--batch_size", "12", "--samples_per_epoch", "40", "--epochs", "1"]
    steps = watched(*more, "--batch_shares", "sst=0.5,para=1.25,sts=0.75")
    counts = {name: [len(step["rows"][name]) for step in steps] for name in TASKS}
    assert counts == {"sst": [6, 6, 6, 2], "para": [15, 15, 15, 5], "sts": [9, 9, 9, 3]}


def test_the_seed_of_a_run_decides_in_which_order_it_sees_rows(watched):
    orders = [watched("--epochs", "1", "--seed", seed)[0]["rows"] for seed in ("3", "3", "4")]
    assert orders[0] == orders[1]
    assert all(orders[0][name] != orders[2][name] for name in TASKS)


# -------------------------------------------------------------------------- estimates by SophiaG


class TwoHeads(nn.Module):
    """Two heads on one vector of weights: w x and 3 w x, for numbers x."""

    def __init__(self, task, inputs):
        super().__init__()
        self.tasks, self.inputs = {task.name: task}, inputs
        self.w = nn.Parameter(torch.linspace(-0.5, 1, task.num_classes or 1, dtype=torch.double))

    def head_outputs(self, batch):
        (task,) = self.tasks.values()
        outputs = self.inputs[batch.rows[task.name], None] * self.w
        outputs = outputs if task.classes else outputs.squeeze(1)
        return {task.name: [outputs, 3 * outputs]}


@pytest.mark.parametrize("name", ["sst", "sts"])
def test_the_estimate_for_two_heads_is_that_of_the_mean_of_their_losses(flags, monkeypatch, name):
    """Against the exact diagonal of the Gauss-Newton matrix, over accumulated batches. With the same
    draw for both heads it would have cross terms."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    options = parse_options([*flags, f"--{name}", "--loss_weights", f"{name}=0.5"])
    data, n_rows = mc.load_all(options).data["train"], 5
    sampler = {name: EpochSampler(n_rows, 1)}
    (window,) = training_windows(data, sampler, n_rows, 2, 3)
    inputs = torch.tensor([0.5, -1.0, 2.0, 1.5, -0.3], dtype=torch.double)
    model = TwoHeads(TASKS[name], inputs)
    total, n_draws = 0.0, 4000
    for step in range(n_draws):
        gauss_newton_gradients(model, window, options, step)
        total = total + model.w.grad.square() / n_draws
        model.zero_grad()
    exact = np.zeros(len(model.w))
    for x in inputs.numpy():
        for factor in (1, 3):
            logits = factor * x * model.w.detach().numpy()
            p = np.exp(logits) / np.exp(logits).sum()
            second = p * (1 - p) if TASKS[name].classes else 2.0
            exact += 0.5 * second * (factor * x) ** 2 / (2 * n_rows)
    np.testing.assert_allclose(total.numpy(), exact, rtol=0.1)


# ------------------------------------------------------------------------------------------ betas

BETAS = {
    "adamw": (0.9, 0.999),  # Kingma and Ba 2015
    "sophiah": (0.985, 0.99),  # the code of the original project
    "sophiag": (0.965, 0.99),  # Liu et al. 2023
}


@pytest.mark.parametrize("name", WITH_OPTIMIZER)
def test_betas_are_the_published_ones_or_those_of_the_flag(flags, capsys, name):
    flags = [*flags, *WITH_OPTIMIZER[name]]
    for more, expected in (([], BETAS[name]), (["--betas", "0.6,0.7"], (0.6, 0.7))):
        options = parse_options(flags + more)
        steps_of = build_optimizer(mc.load_all(options).model, options)
        assert {group["betas"] for group in steps_of.param_groups} == {expected}
    help_text = " ".join(flags_page().split())
    beta1, beta2 = BETAS[name]
    assert f"{beta1:g},{beta2:g} for {name} ({optimizer.OPTIMIZERS[name].why_betas})" in help_text
    assert mc.main([*flags, "--betas", "0.6,0.7", "--epochs", "1", "--sst"]) == 0
    assert "--betas 0.6 0.7" in " ".join(capsys.readouterr().out.split())


# ------------------------------------------------------------------------------- float16 on old GPUs


@pytest.mark.parametrize("kind", [optimizer.AdamW, optimizer.SophiaG])
@pytest.mark.parametrize("clip", [0.0, 0.1])
def test_a_scaled_loss_gives_the_same_step(kind, clip):
    """Powers of two do not even round. After an infinite gradient the step is not taken, and the scale
    is half; after 2,000 finite ones it is twice."""
    options, weights = SimpleNamespace(clip=clip), []
    for scale in (None, LossScale(torch.device("cpu"))):
        torch.manual_seed(1)
        model = torch.nn.Linear(5, 3)
        steps_of = kind(model.parameters(), lr=0.1)
        for x in torch.randn(2, 8, 5):
            loss = model(x).square().mean()
            (loss * (scale.factor if scale else 1)).backward()
            clip_and_step(model, steps_of, {"sum": loss.detach()}, options, scale)
        weights.append([p.detach().clone() for p in model.parameters()])
    assert all(map(torch.equal, *weights)) and scale.factor == 2**16 and scale.finite_steps == 2
    model.weight.grad = torch.full_like(model.weight, torch.inf)
    problem, _ = clip_and_step(model, steps_of, {"sum": loss.detach()}, options, scale)
    assert scale.factor == 2**15 and not problem.isfinite().all() and scale.finite_steps == 0
    assert all(map(torch.equal, weights[1], model.parameters()))
    scale.finite_steps.fill_(1999)
    model.weight.grad = torch.zeros_like(model.weight)
    clip_and_step(model, steps_of, {"sum": loss.detach()}, options, scale)
    assert scale.factor == 2**16


def test_small_gradients_survive_float16(trainee):
    """Losses of 1e-7 or so. Without the scale, most of their gradients would be 0."""
    norms = {}
    for precision, scale in [("float32", False), ("float16", True), ("float16", False)]:
        tiny = "--loss_weights=1e-7,1e-7,1e-7", "--hidden_dropout_prob=0", "--precision", precision
        model, steps_of, options, (window, *_) = trainee(*tiny)
        factor = LossScale(torch.device("cpu")) if scale else None
        step = mc.training_step(model.eval(), window, steps_of, options, factor)
        norms[precision, scale] = step.check[1].item()
    exact = norms["float32", False]
    assert norms["float16", True] == pytest.approx(exact, rel=0.02)
    assert norms["float16", False] != pytest.approx(exact, rel=0.2)


@pytest.mark.parametrize("name", ["sophiah", "sophiag"])
def test_estimates_are_made_in_float32_where_steps_are_in_float16(trainee, name):
    model, steps_of, options, steps = trainee(*WITH_OPTIMIZER[name], "--precision", "float16")
    passes, scale = [], LossScale(torch.device("cpu"))
    model.attention_layer.register_forward_hook(
        lambda *_: passes.append(torch.is_autocast_enabled("cpu"))
    )
    for window in steps[:4]:
        step = mc.training_step(model, window, steps_of, options, scale)
        assert step.problem is None
    n = len(steps[0])
    per_pair = {"sophiah": n * [False] + n * [True], "sophiag": n * [False] + 2 * n * [True]}
    assert passes == 2 * per_pair[name]
    assert scale.finite_steps == (2 if name == "sophiah" else 4)
    assert steps_of.skipped_refreshes == 0


def test_a_resumed_run_has_the_scale_of_the_loss(flags, tmp_path):
    options = parse_options([*flags, "--precision", "float16"])
    runs = [Training(mc.load_all(options), tmp_path / "x", RunLog(tmp_path)) for _ in range(2)]
    runs[0].scale.factor.fill_(2.0**10)
    runs[0].scale.finite_steps.fill_(7)
    runs[1].restore(runs[0].state())
    assert runs[1].scale.factor == 2**10 and runs[1].scale.finite_steps == 7


@pytest.mark.parametrize("supported, expected", [(True, torch.bfloat16), (False, torch.float16)])
def test_auto_asks_the_gpu(monkeypatch, supported, expected):
    """GPUs before Ampere emulate bfloat16 slowly, and PyTorch calls that supported too."""

    def is_supported(including_emulation=True):
        return supported or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_supported)
    assert utils.half_dtype(torch.device("cuda"), "auto") == expected
    assert utils.half_dtype(torch.device("cuda"), "float32") is None
    assert utils.half_dtype(torch.device("cpu"), "auto") is None


# --------------------------------------------------------------------- bfloat16 without instructions


@pytest.mark.parametrize(
    "precision, features, slow",
    [
        ("bfloat16", [], True),
        ("bfloat16", ["amx"], False),
        ("bfloat16", ["avx512_bf16"], False),
        ("float32", [], False),
        ("auto", [], False),
    ],
)
def test_a_cpu_without_bfloat16_instructions_gets_a_warning(
    flags, monkeypatch, precision, features, slow
):
    monkeypatch.setattr(training, "cpu_features", lambda: features)
    options = parse_options([*flags, "--sst", "--precision", precision])
    with warnings.catch_warnings(record=True) as caught:
        prepare_device(mc.load_all(options).model, torch.device("cpu"), options)
    shown = [str(warning.message) for warning in caught]
    text = "this CPU has no bfloat16 instructions; --precision float32 is faster here"
    assert shown == [text] * slow


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="Linux lists a CPU's instructions")
def test_the_instructions_of_a_cpu_are_those_that_linux_lists():
    listed = set(re.search(r"^flags\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.M)[1].split())
    expected = {"avx512_bf16": "avx512_bf16" in listed, "amx": "amx_tile" in listed}
    assert utils.cpu_features() == [name for name, is_there in expected.items() if is_there]


# -------------------------------------------------------------------- dev rows that are in train


def test_dev_rows_that_are_in_train_are_left_out_of_a_second_score(
    flags, small_data, tmp_path, capsys
):
    """Five rows of similarity are in train, with other case and in the other order. The second score
    is that of the predictions for all other rows."""
    train = (small_data / "sts-train.csv").read_text().splitlines(keepends=True)
    dev = (small_data / "sts-dev.csv").read_text().splitlines(keepends=True)
    columns = train[0].rstrip("\n").split("\t")
    first, second, id = (columns.index(name) for name in ("sentence1", "sentence2", "id"))
    for number, line in enumerate(train[3:8]):
        cells = line.split("\t")
        cells[first], cells[second] = cells[second].upper(), cells[first]
        cells[id] = f"known-{number}"
        dev.insert(4 * number + 2, "\t".join(cells))
    path = tmp_path / "with-known.csv"
    path.write_text("".join(dev))
    assert mc.main([*flags, "--sts_dev", str(path)]) == 0
    unseen = np.array([not id.startswith("known-") for id in column_of(path, "id", str)])
    assert sum(~unseen) == 5
    truth = np.array(column_of(path, "similarity"))
    predicted = np.array(column_of(tmp_path / "sts-dev.csv", "predicted_similarity"))
    expected = {
        "pearson": pearsonr(truth[unseen], predicted[unseen]).statistic,
        "spearman": spearmanr(truth[unseen], predicted[unseen]).statistic,
    }
    shown = capsys.readouterr().out
    texts = re.findall(r"^(\w+) without the (.*) that are in train: (.*)$", shown, re.M)
    scores = ", ".join(f"{name} {value:.3f}" for name, value in expected.items())
    assert texts == [("sts", f"5 of {len(truth)} dev rows", scores)]
    (directory,) = (tmp_path / "logdir").iterdir()
    log = EventAccumulator(str(directory)).Reload()
    logged = {tag for tag in log.Tags()["scalars"] if tag.startswith("unseen/")}
    assert logged == {"unseen/sts_pearson", "unseen/sts_spearman"}
    for name, value in expected.items():
        assert log.Scalars(f"unseen/sts_{name}")[0].value == pytest.approx(value, abs=1e-5)


@pytest.mark.parametrize(
    "known, expected", [([], {}), ([0, 1, 2, 3], {}), ([0, 1, 2], {}), ([1, 3], 1), ([0], 0.5)]
)
def test_rows_that_are_in_train_do_not_count_in_the_second_score(known, expected):
    """Nothing is scored a second time if no row is in train, or no labelled row is left."""
    dev = [
        Example((f"Film {row}!",), label, str(row)) for row, label in enumerate([1, 2, 0, np.nan])
    ]
    train = [Example((f"film {row}",), 0.0, "x") for row in known] + [Example(("other",), 0.0, "y")]
    labels = np.array([example.label for example in dev])
    of_dev = SimpleNamespace(examples=dev, labels=labels, task=TASKS["sst"])
    result = evaluation.Evaluation(of_dev, np.array([1.0, 4.0, 0.0, 0.0]), {})
    found = evaluation.unseen_scores(result, rows_in_train(dev, train))
    assert (found["accuracy"] if found else {}) == expected


def test_deterministic_algorithms_are_asked_for(flags, monkeypatch, tmp_path):
    """On a CPU that changes no number."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    results, fit = [], mc.fit
    monkeypatch.setattr(
        mc,
        "fit",
        lambda run: results.append(torch.are_deterministic_algorithms_enabled()) or fit(run),
    )
    scores = []
    try:
        for more in ([], ["--deterministic"]):
            scores.append(mc.train_multitask(parse_options([*flags, *more])))
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)
    assert results == [False, True] and scores[0] == scores[1]


def test_the_average_of_the_weights_is_pytorchs():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))
    averages = [
        torch.optim.swa_utils.AveragedModel(
            model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
        )
        for _ in range(2)
    ]
    for _ in range(4):
        for parameter in model.parameters():
            nn.init.normal_(parameter)
        training.update_average(averages[0], model)
        averages[1].update_parameters(model)
    ours, theirs = (average.state_dict() for average in averages)
    assert ours.keys() == theirs.keys() and int(ours["n_averaged"]) == 4
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
