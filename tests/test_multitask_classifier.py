import csv
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import ROOT, SAMPLE
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.metadata import parse_session_start_info_plugin_data
from torch.utils._python_dispatch import TorchDispatchMode

import attention
import datasets
import multitask_classifier as mc
import optimizer as optimizer_module
import run_log
from attention import ATTENTION, FusedAttention, jagged_attention, plain_attention
from batches import EpochSampler, Padded, collate, join, step_noise, training_windows
from bert import BertModel, Dropout
from checkpoint import checkpoint_content, new_name, new_run, options_to_evaluate, write_checkpoint
from curvature import gauss_newton_gradients
from datasets import SMOKETEST_ROWS, TaskDataset, load_data
from evaluation import mean_score
from flags import SMOKETEST
from heads import PairHead, SequenceHead
from multitask_classifier import MultitaskBERT
from optimizer import build_optimizer, build_scheduler, freeze_and_unfreeze
from options import parse_options
from run_log import RunLog
from tasks import SPLITS, TASKS, Task, read_task_file, task_loss
from tokenizer import BertTokenizer
from training import Training
from utils import UserError, seeded_generator

MAPS = Path("/proc/self/maps")
LIBRARIES = MAPS.read_text() if MAPS.exists() else ""  # that this process has loaded


@pytest.fixture
def model(tiny_directory):
    return MultitaskBERT(BertModel.from_pretrained(tiny_directory))


@pytest.fixture
def data(tiny_directory):
    """task -> the sample's training rows"""
    tokenizer = BertTokenizer.from_pretrained(tiny_directory)
    return {
        name: TaskDataset([SAMPLE / file for file in task.train], task, "train", tokenizer, 128)
        for name, task in TASKS.items()
    }


def options(*flags):
    return parse_options(list(flags))


# ------------------------------------------------------------------------------------------ model


def padded(tokenizer, data, rows, name, column):
    texts = [data[name].examples[row].sentences[column] for row in rows]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    return batch["input_ids"], batch["attention_mask"]


def test_heads_and_pooling_equal_their_formulas(model, data, tiny_directory):
    """The padded methods against the formulas, on vectors from the padded encoder."""
    tokenizer = BertTokenizer.from_pretrained(tiny_directory)
    model.double().eval()
    rows = [0, 5, 9, 2]
    one = padded(tokenizer, data, rows, "para", 0)
    two = padded(tokenizer, data, rows, "para", 1)

    def vector(input_ids, mask):
        hidden = model.bert(input_ids, mask)["last_hidden_state"]
        scores = torch.tanh(
            hidden @ model.attention_layer.W.weight.T + model.attention_layer.W.bias
        )
        scores = (scores @ model.attention_layer.v.weight[0]).masked_fill(mask == 0, -torch.inf)
        weights = scores.exp() / scores.exp().sum(1, keepdim=True)
        return torch.einsum("bs,bsd->bd", weights, hidden)

    def layers(x, linears):
        for linear in linears[:-1]:
            x = torch.clamp(x @ linear.weight.T + linear.bias, min=0)
        return x @ linears[-1].weight.T + linears[-1].bias

    u, v = vector(*one), vector(*two)
    close = dict(rtol=1e-5, atol=1e-6)  # the pooling weights are float32
    sentiment = model.heads["sst"]
    expected = layers(u, [*sentiment.hidden, sentiment.out])
    torch.testing.assert_close(model.predict_sentiment(*one), expected, **close)
    paraphrase = model.heads["para"]
    p, q = (layers(x, [paraphrase.project]) for x in (u, v))
    features = torch.cat([(p - q).abs(), (p + q).abs()], dim=1)
    expected = layers(features, [*paraphrase.hidden, paraphrase.out])
    torch.testing.assert_close(model.predict_paraphrase(*one, *two), expected, **close)
    assert expected.shape == (4, 2) and model.predict_sentiment(*one).shape == (4, 5)
    cosine = (u * v).sum(1) / (u.norm(dim=1) * v.norm(dim=1))
    similarity = model.predict_similarity(*one, *two)
    torch.testing.assert_close(similarity, 5 * cosine, check_dtype=False, **close)


def test_the_heads_keep_the_size_of_their_signal():
    """Through three ReLU layers the mean square stays within a factor of 2."""
    vectors = torch.randn(500, 384)
    hidden = vectors
    for linear in SequenceHead(384, TASKS["sst"], n_hidden=3).hidden:
        hidden = F.relu(linear(hidden))
    assert 0.5 < hidden.square().mean().item() / vectors.square().mean().item() < 2


def test_one_packed_pass_equals_the_three_padded_methods(model, data, tiny_directory):
    tokenizer = BertTokenizer.from_pretrained(tiny_directory)
    model.eval()
    rows = np.array([3, 800, 21, 0, 77])
    calls = []
    model.bert.encoder.register_forward_hook(lambda *_: calls.append(1))
    outputs = model(collate({name: (data[name], rows) for name in TASKS}))
    assert len(calls) == 1
    methods = (model.predict_sentiment, model.predict_paraphrase, model.predict_similarity)
    for (name, task), method in zip(TASKS.items(), methods):
        columns = range(len(task.sentences))
        inputs = [x for c in columns for x in padded(tokenizer, data, rows, name, c)]
        torch.testing.assert_close(outputs[name], method(*inputs), rtol=1e-4, atol=1e-5)


def test_similarity_trains_unclamped(model, data):
    """Gradient flows where the cosine is negative, and the loss is on the unclamped value."""
    u = torch.tensor([[1.0, 0.0]], requires_grad=True)
    similarity = model.heads["sts"](u, torch.tensor([[-1.0, 0.5]]))
    assert similarity.item() < 0
    TASKS["sts"].loss(similarity, torch.tensor([3.0])).backward()
    assert u.grad.abs().sum() > 0
    assert TASKS["sts"].decode(similarity).item() == 0


def test_swapping_the_sentences_changes_nothing(model, data, tiny_directory):
    tokenizer = BertTokenizer.from_pretrained(tiny_directory)
    model.eval()
    one = padded(tokenizer, data, [1, 2], "para", 0)
    two = padded(tokenizer, data, [1, 2], "para", 1)
    for method in (model.predict_paraphrase, model.predict_similarity):
        torch.testing.assert_close(method(*one, *two), method(*two, *one))


@pytest.mark.parametrize("encoding", ["cross", "both"])
@pytest.mark.parametrize("name", ["para", "sts"])
def test_pairs_in_one_sequence_equal_their_formula(tiny_directory, encoding, name):
    """Packed and padded, against the heads on vectors of transformers' pairs."""
    tokenizer = BertTokenizer.from_pretrained(tiny_directory)
    task, rows = dataclasses.replace(TASKS[name], encoding=encoding), [1, 2, 5]
    model = MultitaskBERT(BertModel.from_pretrained(tiny_directory), {name: task}).eval()
    dataset = TaskDataset([SAMPLE / task.train[0]], task, "train", tokenizer, 128)
    peer = transformers.AutoTokenizer.from_pretrained(tiny_directory)
    pairs = list(zip(*(dataset.examples[row].sentences for row in rows)))
    joint = peer(*map(list, pairs), padding=True, return_tensors="pt")
    vectors = model.embed(
        joint["input_ids"], joint["attention_mask"], token_type_ids=joint["token_type_ids"]
    )
    expected = model.joint_heads[name](vectors)
    bi = [peer(list(each), padding=True, return_tensors="pt") for each in pairs]
    bi = [(each["input_ids"], each["attention_mask"]) for each in bi]
    if encoding == "both":
        other = model.heads[name](*(model.embed(*each) for each in bi))
        if name == "sts":
            expected = (other + expected) / 2
        else:  # the geometric mean of both distributions
            expected = (other.softmax(dim=1) * expected.softmax(dim=1)).sqrt().log()
    else:
        assert name not in model.heads
    packed = model(collate({name: (dataset, np.array(rows))}))[name]
    torch.testing.assert_close(packed, expected)
    method = model.predict_paraphrase if name == "para" else model.predict_similarity
    torch.testing.assert_close(method(*bi[0], *bi[1]), expected)


def test_pairs_that_are_too_long_are_cut_alike_packed_and_padded():
    ids = [torch.randint(5, 90, (2, length)) for length in (50, 30)]
    first, second = (
        Padded(rows, torch.ones_like(rows), tags=rows[None].repeat(2, 1, 1)) for rows in ids
    )
    joint, mask, types, tags = join(first, second, 40)
    assert joint.shape == mask.shape == types.shape == (2, 40) and mask.all()
    assert tags.shape == (2, 2, 40) and tags.equal(joint[None].expand(2, 2, 40))
    columns = [
        datasets.TokenColumn(each[:1].numpy(), np.array([0]), np.array([each.shape[1]]))
        for each in ids
    ]
    column = datasets.JointColumn.of(*columns, 40)
    assert column.row(0)[0].tolist() == joint[0].tolist()
    assert types[0].tolist() == [0] * column.first_lengths[0] + [1] * (40 - column.first_lengths[0])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("attention", [FusedAttention.apply, jagged_attention])
def test_bfloat16_autocast_gives_finite_gradients_to_float32_weights(
    model, data, attention, monkeypatch
):
    monkeypatch.setitem(ATTENTION, "cpu", attention)
    batch = collate({name: (data[name], np.arange(6)) for name in TASKS})
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(batch)
    exact = model.eval()(batch)
    for name, output in outputs.items():
        TASKS[name].loss(output.float(), batch.labels[name]).backward(retain_graph=True)
        assert (output.float() - exact[name]).abs().max() < 0.3
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.dtype == torch.float32 and p.grad.isfinite().all() for p in trained)


class Waits(TorchDispatchMode):
    """Notes what reads a tensor's value on the host, for which a GPU would be waited for."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique", "is_nonzero")

    def __enter__(self):
        self.seen = []
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if (name := func.overloadpacket.__name__) in self.WAITS:
            self.seen.append(name)
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("name", ["adamw", "sophiah", "sophiag"])
def test_a_training_step_waits_for_the_device_once_at_most(model, data, name, monkeypatch):
    """Sophia does, for whether it is finite; a step between two estimates, which are looked at too.
    AdamW as on a GPU does not wait: the step is looked at one step later. (The fused kernel for CPUs
    itself reads once for each group whether the step is taken; that for CUDA does not.)"""
    monkeypatch.setattr(optimizer_module, "FUSED_DEVICES", {"cpu"})
    chosen = options("--optimizer", name)
    optimizer = build_optimizer(model.train(), chosen)
    mc.training_step(model, windows(data, 5, 2), optimizer, chosen)
    with Waits() as waits:
        mc.training_step(model, windows(data, 5, 2), optimizer, chosen)
    n_waits = len(optimizer.param_groups) if name == "adamw" else 1
    assert waits.seen == ["_local_scalar_dense"] * n_waits


# --------------------------------------------------------------------------- what trains, and how


def parts_that_train(model):
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    layers = {
        int(each[1]) for name in names if (each := re.match(r"bert\.encoder\.layer\.(\d+)", name))
    }
    embeddings = any(name.startswith("bert.embeddings") for name in names)
    assert any(name.startswith("heads") for name in names)
    assert not any(name.startswith("bert.pooler") for name in names)
    return layers, embeddings


def test_option_and_unfreezing_decide_what_trains(model):
    freeze_and_unfreeze(model, options("--option", "pretrain"), epoch=5)
    assert parts_that_train(model) == (set(), False)
    freeze_and_unfreeze(model, options(), epoch=0)
    assert parts_that_train(model) == ({0, 1}, True)
    seen = []
    for epoch in range(8):
        freeze_and_unfreeze(model, options("--unfreeze_interval", "2"), epoch)
        seen.append(parts_that_train(model))
    top, both = ({1}, False), ({0, 1}, False)
    assert seen == 2 * [(set(), False)] + 2 * [top] + 2 * [both] + 2 * [({0, 1}, True)]


@pytest.mark.parametrize("epoch, moved", [(0, set()), (1, {1}), (2, {0, 1})])
def test_the_optimizer_never_touches_a_frozen_parameter(model, data, epoch, moved):
    chosen = options("--unfreeze_interval", "1", "--lr", "0.01", "--weight_decay", "0.5")
    optimizer = build_optimizer(model, chosen)
    freeze_and_unfreeze(model, options("--unfreeze_interval", "1"), epoch)
    before = {name: p.clone() for name, p in model.named_parameters()}
    batch = collate({name: (data[name], np.arange(4)) for name in TASKS})
    mc.training_step(model, [batch], optimizer, chosen)
    for name, parameter in model.named_parameters():
        layer = re.match(r"bert\.encoder\.layer\.(\d+)", name)
        trains = int(layer[1]) in moved if layer else not name.startswith("bert.")
        assert torch.equal(parameter, before[name]) != trains, name


@pytest.mark.parametrize("option", ["finetune", "pretrain"])
def test_optimizer_groups_hold_each_trained_weight_once(model, option):
    freeze_and_unfreeze(model, options("--option", option), epoch=0)
    optimizer = build_optimizer(model, options("--option", option, "--weight_decay", "0.3"))
    grouped = [p for group in optimizer.param_groups for p in group["params"]]
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(grouped) == len(set(grouped)) and set(grouped) == set(trained)
    for group in optimizer.param_groups:
        decays = {0.3: lambda p: p.ndim > 1, 0.0: lambda p: p.ndim == 1}[group["weight_decay"]]
        assert all(map(decays, group["params"]))


class Recorder(torch.optim.SGD):
    """Takes no step, but keeps the gradients that it was to take it with."""

    def step(self):
        params = [p for group in self.param_groups for p in group["params"]]
        self.seen = [p.grad.clone() for p in params if p.grad is not None]


def gradients(model, window, chosen):
    optimizer = Recorder(model.parameters(), lr=0.0)
    step = mc.training_step(model, window, optimizer, chosen)
    return step.losses, optimizer.seen


def windows(data, batch_size, grad_accumulation, **share):
    samplers = {name: EpochSampler(len(rows), 1) for name, rows in data.items()}
    return next(training_windows(data, samplers, 10, batch_size, grad_accumulation, **share))


def test_accumulated_batches_equal_one_large_batch(model, data):
    """Also where the last batch is smaller: 4 + 4 + 2 rows against 10."""
    model.double().eval()
    chosen = options("--clip", "0")
    large_losses, large = gradients(model, windows(data, 10, 1), chosen)
    small_losses, small = gradients(model, windows(data, 4, 3), chosen)
    for name in TASKS:
        assert float(large_losses[name]) == pytest.approx(float(small_losses[name]), rel=1e-5)
    for mine, expected in zip(small, large, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-6)


def test_loss_is_the_weighted_sum_of_the_three(model, data):
    model.eval()
    window = windows(data, 10, 1)
    outputs, labels = model(window[0]), window[0].labels
    losses, seen = gradients(model, window, options("--loss_weights", "2,0.5,3", "--clip", "0"))
    expected = {
        "sst": F.cross_entropy(outputs["sst"], labels["sst"]),
        "para": F.cross_entropy(outputs["para"], labels["para"]),
        "sts": ((outputs["sts"] - labels["sts"]) ** 2).mean(),
    }
    for name, loss in expected.items():
        assert float(losses[name]) == pytest.approx(loss.item(), rel=1e-5)
    total = 2 * expected["sst"] + 0.5 * expected["para"] + 3 * expected["sts"]
    assert float(losses["sum"]) == pytest.approx(total.item(), rel=1e-5)
    model.zero_grad()
    total.backward()
    mine = [p.grad for p in model.parameters() if p.grad is not None]
    for gradient, other in zip(seen, mine, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-6)


def test_gradients_are_clipped(model, data):
    _, free = gradients(model, windows(data, 10, 1), options("--clip", "0"))
    _, clipped = gradients(model, windows(data, 10, 1), options("--clip", "0.01"))

    def norm(tensors):
        return torch.stack([tensor.norm() for tensor in tensors]).norm().item()

    assert norm(free) > 0.1
    assert norm(clipped) == pytest.approx(0.01, rel=1e-3)


def test_only_steps_that_refresh_take_the_plain_attention(model, data, monkeypatch):
    taken = []

    def note(name, attention):
        return lambda *arguments: taken.append(name) or attention(*arguments)

    monkeypatch.setitem(ATTENTION, "cpu", note("fused", FusedAttention.apply))
    monkeypatch.setattr(attention, "plain_attention", note("plain", plain_attention))
    chosen = options("--optimizer", "sophiah", "--hess_interval", "3")
    optimizer = build_optimizer(model.train(), chosen)
    for _ in range(5):
        mc.training_step(model, windows(data, 10, 1), optimizer, chosen)
    layers = model.bert.config.num_hidden_layers
    expected = ["plain", "fused", "fused", "plain", "fused"]
    assert taken == [name for name in expected for _ in range(layers)]


def test_sophiah_sees_the_curvature_of_the_whole_model(model, data, monkeypatch):
    """u * (H u) against central differences of the gradient, in float64, with gradients clipped
    and accumulated. Without paraphrase, whose |u - v| has no derivative for equal sentences."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    model.double().eval()
    window = windows({name: data[name] for name in ("sst", "sts")}, 4, 3)
    tasks = ["--tasks", "sst,sts"]
    chosen = options("--optimizer", "sophiah", "--clip", "1e-4", "--lr", "0", *tasks)
    optimizer = build_optimizer(model, chosen)
    for group in optimizer.param_groups:
        group["betas"] = (0.9, 0.0)  # the average is the estimate
    mc.training_step(model, window, optimizer, chosen)
    params = [p for g in optimizer.param_groups for p in g["params"] if p in optimizer.state]
    generator = seeded_generator(torch.device("cpu"), chosen.seed, 0)  # of step 0
    noise = [torch.randn_like(p, generator=generator) for p in params]

    def gradients_at(distance):
        with torch.no_grad():
            for param, u in zip(params, noise):
                param += distance * u
        mc.training_step(
            model, window, recorder := Recorder(params), options("--clip", "0", *tasks)
        )
        with torch.no_grad():
            for param, u in zip(params, noise):
                param -= distance * u
        return recorder.seen

    pairs = zip(gradients_at(1e-7), gradients_at(-1e-7), strict=True)
    expected = [u * (high - low) / 2e-7 for u, (high, low) in zip(noise, pairs, strict=True)]
    estimates = [optimizer.state[param]["hessian"] for param in params]
    together = torch.cat([each.flatten() for each in expected])
    error = torch.cat([each.flatten() for each in estimates]) - together
    assert error.norm() < 1e-4 * together.norm()


@pytest.mark.parametrize("name", ["sophiah", "sophiag"])
def test_estimates_in_bfloat16_are_finite_and_close(model, data, name):
    """As on a GPU: the passes in bfloat16, weights and estimates in float32."""
    estimates = []
    for precision in ("float32", "bfloat16"):
        chosen = options("--optimizer", name, "--lr", "0", "--precision", precision)
        optimizer = build_optimizer(model.eval(), chosen)
        torch.manual_seed(4)
        mc.training_step(model, windows(data, 10, 1), optimizer, chosen)
        assert optimizer.skipped_refreshes == 0
        averages = [state["hessian"] for state in optimizer.state.values()]
        assert {each.dtype for each in averages} == {torch.float32}
        estimates.append(torch.cat([each.flatten() for each in averages]))
    exact, rounded = estimates
    assert rounded.isfinite().all() and rounded.any()
    assert torch.corrcoef(torch.stack([exact, rounded]))[0, 1] > 0.9


def test_labels_drawn_from_outputs_that_are_not_finite_give_a_skipped_estimate(model, data):
    chosen = options("--optimizer", "sophiag")
    optimizer = build_optimizer(model.train(), chosen)
    with torch.no_grad():
        model.heads["sst"].out.bias.fill_(torch.nan)
    gauss_newton_gradients(model, windows(data, 10, 1), chosen, step=0)
    optimizer.update_hessian()
    optimizer.step()
    assert optimizer.skipped_refreshes == 1


def test_gauss_newton_gradients_over_a_window(model, data, monkeypatch):
    """The root of rows and of weight times the gradient of the mean loss over all 10 rows; the
    labels are "drawn" in a way that repeats itself."""
    model.double().eval()

    def draw(task, outputs, noise):
        return outputs.argmin(-1) if task.classes else outputs + 1

    monkeypatch.setattr(Task, "draw", draw)
    chosen = options("--loss_weights", "0.5,2,1.5")
    weights = chosen.loss_weights
    outputs = model(windows(data, 10, 1)[0])
    total = sum(
        (10 * weights[name]) ** 0.5
        * task.loss(outputs[name], task.draw(outputs[name].detach(), None), 0.0)
        for name, task in TASKS.items()
    )
    trained = [p for p in model.parameters() if p.requires_grad]
    expected = torch.autograd.grad(total, trained)
    gauss_newton_gradients(model, windows(data, 4, 3), chosen, step=0)
    for param, gradient in zip(trained, expected, strict=True):
        scale = max(float(gradient.abs().max()), 1e-6)
        assert float((param.grad - gradient).abs().max()) < 1e-5 * scale


def test_drawn_labels_do_not_depend_on_how_rows_are_divided(data):
    """Among processes and batches; and are others in the next step."""

    def drawn(n_processes, batch_size, step):
        noise = torch.empty(10, TASKS["sst"].num_classes)
        for rank in range(n_processes):
            share = dict(rank=rank, n_processes=n_processes)
            for batch in windows(data, batch_size, 10 // batch_size, **share):
                noise[batch.picks["sst"]] = step_noise(batch, TASKS["sst"], (7, step), head=0)
        return noise

    alone = drawn(1, 10, 0)
    assert torch.equal(alone, drawn(3, 10, 0)) and torch.equal(alone, drawn(2, 5, 0))
    assert alone.unique().numel() == alone.numel() and not torch.equal(alone, drawn(1, 10, 1))


def test_drawn_labels_have_the_distribution_that_the_loss_assumes():
    logits = torch.tensor([2.0, 0.0, -1.0]).expand(40_000, 3)
    drawn = TASKS["sst"].draw(logits, torch.randn(40_000, 3))
    shares = torch.bincount(drawn, minlength=3) / 40_000
    torch.testing.assert_close(shares, logits[0].softmax(-1), rtol=0, atol=0.0125)  # 5 errors
    values = TASKS["sts"].draw(torch.full((40_000,), 3.0), torch.randn(40_000, 1))
    assert abs(float(values.mean()) - 3) < 5 * (0.5 / 40_000) ** 0.5
    assert abs(float(values.var()) - 0.5) < 5 * 0.5 * (2 / 40_000) ** 0.5


def test_schedulers(model):
    optimizer = build_optimizer(model, options("--lr", "0.5"))
    rates = []
    plateau = build_scheduler(optimizer, options("--scheduler", "plateau"))
    for mean in (0.5, 0.6, 0.6, 0.6, 0.7, 0.7):
        plateau.step(mean)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == [0.5, 0.5, 0.5, 0.25, 0.25, 0.25]
    chosen = options("--scheduler", "cosine", "--epochs", "2", "--samples_per_epoch", "130")
    cosine = build_scheduler(optimizer, chosen)  # 3 steps an epoch
    for _ in range(6):
        optimizer.step()
        cosine.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0)
    assert build_scheduler(optimizer, options("--scheduler", "none")) is None


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_warm_up_and_fall_are_those_of_transformers(model, name):
    """With one step more at each end, where its rate is 0 and nothing would be learned."""
    flags = ["--epochs", "3", "--samples_per_epoch", "640", "--warmup", "0.2", "--lr", "0.5"]
    chosen = options("--scheduler", name, *flags)
    optimizer = build_optimizer(model, chosen)
    scheduler = build_scheduler(optimizer, chosen)
    peer_optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
    peer = transformers.get_scheduler(name, peer_optimizer, 7, 31)
    for step in range(30):
        if step < 7:
            peer_optimizer.step(), peer.step()
        assert optimizer.param_groups[0]["lr"] == pytest.approx(peer.get_last_lr()[0])
        optimizer.step(), scheduler.step()
        if step >= 6:
            peer_optimizer.step(), peer.step()


def test_lower_layers_have_lower_rates(model):
    optimizer = build_optimizer(model, options("--lr", "0.1", "--layer_lr_decay", "0.5"))
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    n_layers = model.bert.config.num_hidden_layers
    for name, parameter in model.named_parameters():
        if layer := re.match(r"bert\.encoder\.layer\.(\d+)\.", name):
            expected = 0.1 * 0.5 ** (n_layers - int(layer[1]))
        elif name.startswith("bert.embeddings."):
            expected = 0.1 * 0.5 ** (n_layers + 1)
        elif name.startswith("bert.pooler."):
            continue
        else:
            expected = 0.1
        assert rates[id(parameter)] == pytest.approx(expected), name


# ----------------------------------------------------------------------------------------- losses


LOGITS = np.array([[2.0, -1.0, 0.5, 0.0, 1.0], [-3.0, 0.2, 1.0, 4.0, -2.0], [0.0] * 5])
LABELS = np.array([0, 4, 2])


def softmax(logits):
    return np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)


def numpy_cross_entropy(smoothing=0.0):
    truth = (1 - smoothing) * np.eye(5)[LABELS] + smoothing / 5
    return -(truth * np.log(softmax(LOGITS))).sum(axis=1).mean()


def numpy_one_vs_all():
    sigmoid = 1 / (1 + np.exp(-LOGITS))
    answers = np.where(np.eye(5)[LABELS] == 1, sigmoid, 1 - sigmoid)
    return -np.log(answers).sum(axis=1).mean()


def numpy_ordinal():
    total = 0
    for row, label in zip(softmax(LOGITS), LABELS):
        for border in range(1, 5):
            total -= np.log(row[border:].sum() if label >= border else row[:border].sum())
    return total / len(LABELS)


@pytest.mark.parametrize(
    "flags, expected",
    [
        ([], numpy_cross_entropy()),
        (["--label_smoothing", "0.2"], numpy_cross_entropy(0.2)),
        (["--sst_loss", "one_vs_all"], numpy_cross_entropy() + numpy_one_vs_all()),
        (["--sst_loss", "ordinal"], numpy_cross_entropy() + numpy_ordinal()),
    ],
)
def test_losses_of_classes_equal_their_formulas(flags, expected):
    outputs, chosen = [torch.tensor(LOGITS)], options(*flags)
    loss = task_loss(chosen.tasks["sst"], outputs, torch.tensor(LABELS), chosen)
    assert loss.item() == pytest.approx(expected)


def test_rdrop_equals_its_formula():
    """Equation 4 of the paper, halved: of each head, -log P1 - log P2 + alpha (KL12 + KL21) / 2."""
    passes = [LOGITS, LOGITS[::-1], LOGITS * 0.5, LOGITS + np.arange(5)]  # 2 heads, then again
    total = 0
    for one, two in zip(map(softmax, passes[:2]), map(softmax, passes[2:])):
        likelihood = -np.log(one[range(3), LABELS]) - np.log(two[range(3), LABELS])
        divergence = (one * np.log(one / two)).sum(axis=1) + (two * np.log(two / one)).sum(axis=1)
        total += (likelihood + 0.7 * divergence / 2).mean() / 2
    outputs, labels = [torch.tensor(each.copy()) for each in passes], torch.tensor(LABELS)
    loss = task_loss(TASKS["para"], outputs, labels, options("--rdrop", "0,0.7,2"))
    assert loss.item() == pytest.approx(total / 2)
    values = [torch.tensor([1.0, 2.0, 4.5]), torch.tensor([1.5, 2.0, 4.0])]
    truth = torch.tensor([0.0, 3.0, 5.0])
    expected = np.mean([[1, 1, 0.25], [2.25, 1, 1]]) + 2 / 2 * np.mean([0.25, 0, 0.25])
    loss = task_loss(TASKS["sts"], values, truth, options("--rdrop", "0,0.7,2"))
    assert loss.item() == pytest.approx(expected)


# -------------------------------------------------------------------------------------- whole runs


def read_predictions(directory):
    return {path.name: path.read_text() for path in Path(directory).glob("*-*.csv")}


def test_a_run_end_to_end(flags, small_data, tmp_path, capsys):
    assert mc.main(flags) == 0
    text = capsys.readouterr().out
    (checkpoint,) = (tmp_path / "models_dir").glob("*.pt")
    for shown in (str(checkpoint), "mean dev score", "TensorBoard log", "train/dev scores"):
        assert shown in text

    # every prediction file has the input's ids in the input's order, and values of the right kind
    for name, task in TASKS.items():
        for split in ("dev", "test"):
            rows = list(csv.reader(open(tmp_path / f"{name}-{split}.csv"), delimiter="\t"))
            given = list(csv.reader(open(small_data / getattr(task, split)[0]), delimiter="\t"))
            assert rows[0] == ["id", task.prediction_column]
            assert [row[0] for row in rows[1:]] == [row[1] for row in given[1:]]
            limit = task.num_classes - 1 if task.num_classes else 5
            assert all(0 <= float(row[1]) <= limit for row in rows[1:])

    # the checkpoint's own scores are what was shown and what its predictions score
    _, _, saved = mc.load_checkpoint(checkpoint)
    labels = [
        float(row[3])
        for row in csv.reader(open(small_data / "ids-sst-dev.csv"), delimiter="\t")
        if row[0]
    ]
    predicted = [
        float(row[1])
        for row in list(csv.reader(open(tmp_path / "sst-dev.csv"), delimiter="\t"))[1:]
    ]
    assert saved["dev_scores"]["sst"]["accuracy"] == pytest.approx(
        np.mean(np.equal(labels, predicted))
    )
    assert f"{mean_score(saved['dev_scores']):.4f}" in text

    # --evaluate gives the same files again, and the same table
    before = read_predictions(tmp_path)
    assert len(before) == 6
    for path in tmp_path.glob("*-*.csv"):
        path.unlink()
    again = flags + ["--evaluate", str(checkpoint), "--bert_model", "not/needed"]
    assert mc.main(again) == 0
    table = capsys.readouterr().out
    assert read_predictions(tmp_path) == before
    assert table.strip().split("predictions in")[0] in text


def test_tensorboard_holds_losses_metrics_rate_picture_and_hyper_parameters(flags, tmp_path):
    assert mc.main(flags + ["--tensorboard_subfolder", "sub"]) == 0
    (run,) = (tmp_path / "logdir" / "sub").iterdir()
    events = EventAccumulator(str(run))
    events.Reload()
    scalars = set(events.Tags()["scalars"])
    metrics = {f"{name}_{metric}" for name, task in TASKS.items() for metric in task.metrics}
    assert metrics == {
        *("sst_accuracy", "sst_macro_f1", "para_accuracy", "para_macro_f1", "para_f1"),
        *("sts_pearson", "sts_spearman"),
    }
    assert scalars == (
        {f"loss/{name}" for name in (*TASKS, "sum")}
        | {f"{split}/{metric}" for split in ("train", "dev") for metric in metrics}
        | {f"best/{metric}" for metric in metrics}
        | {f"rows/{name}" for name in TASKS}
        | {f"dev_loss/{name}" for name in TASKS}
        | {"lr", "dev/mean", "best/mean", "gradients/norm", "tokens_per_second"}
    )
    assert [event.value for event in events.Scalars("rows/para")] == [64, 64]
    assert [event.step for event in events.Scalars("loss/sts")] == list(range(1, 9))  # 2 x 64 / 16
    assert [event.step for event in events.Scalars("dev/mean")] == [1, 2]
    total = sum(events.Scalars(f"loss/{name}")[3].value for name in TASKS)
    assert events.Scalars("loss/sum")[3].value == pytest.approx(total)
    assert set(events.Tags()["images"]) == {"dev/sst_confusion", "dev/para_confusion"}
    content = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    hyper_parameters = parse_session_start_info_plugin_data(content).hparams
    assert hyper_parameters["lr"].number_value == 8e-5
    assert hyper_parameters["rho"].string_value == "None"
    assert hyper_parameters["tasks"].string_value == "sst,para,sts"
    # what is elsewhere in each run would crowd out what differs, and so would a list of columns
    assert not {"models_dir", "cache_dir", "sst_dev_out"} & set(hyper_parameters)
    assert "_hparams_/experiment" not in events.summary_metadata
    assert list(run.glob("*/*/tensors.tsv"))


def test_tensorboards_projector_has_dev_sentences(model, tiny_directory, tmp_path, monkeypatch):
    monkeypatch.setattr(run_log, "PROJECTED_ROWS", 4)
    texts = ["a longer film", "a\ttab", "two\nlines", "good .", "not shown"]
    with open(tmp_path / "dev.csv", "w", newline="") as file:
        rows = [[f"i{n}", text, n % 5] for n, text in enumerate(texts)]
        csv.writer(file, delimiter="\t").writerows([["id", "sentence", "sentiment"], *rows])
    tokenizer = BertTokenizer.from_pretrained(tiny_directory)
    dataset = TaskDataset([tmp_path / "dev.csv"], TASKS["sst"], "dev", tokenizer, 128)
    log = RunLog(tmp_path / "log")
    log.sentences(model, dataset, batch_size=3, precision="float32")
    log.close()

    config = (tmp_path / "log" / "projector_config.pbtxt").read_text()
    assert 'tensor_name: "dev/sst:' in config
    metadata, tensors = (
        [line.split("\t") for line in (tmp_path / "log" / path).read_text().splitlines()]
        for path in re.findall(r'_path: "(.*)"', config)
    )
    shown = ["a longer film", "a tab", "two lines", "good ."]
    names = TASKS["sst"].classes
    assert metadata == [["sentence", "label"], *(list(pair) for pair in zip(shown, names))]
    batch = tokenizer(texts[:4], padding=True, return_tensors="pt")
    expected = model.eval().embed(batch["input_ids"], batch["attention_mask"])
    found = torch.tensor([[float(value) for value in line] for line in tensors])
    torch.testing.assert_close(found, expected.detach(), rtol=0, atol=6e-4)  # three decimals


@pytest.mark.parametrize("name", ["sophiah", "sophiag"])
def test_a_run_with_sophia(flags, tmp_path, capsys, name):
    assert mc.main(flags + ["--optimizer", name, "--hess_interval", "3"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"clipped share of coordinates [01]\.\d+, 0 estimates skipped", printed)
    (run,) = (tmp_path / "logdir").iterdir()
    log = EventAccumulator(str(run)).Reload()
    shares = [event.value for event in log.Scalars("sophia/clipped")]
    assert shares and all(0 <= share <= 1 for share in shares)
    assert all(event.value > 0 for event in log.Scalars("sophia/hessian_norm"))


def test_same_seed_same_numbers_other_seed_other_numbers(flags, tmp_path):
    weights = []
    for seed in ("1", "1", "2"):
        models = tmp_path / f"models-{len(weights)}"
        assert mc.main(flags + ["--seed", seed, "--models_dir", str(models)]) == 0
        (checkpoint,) = models.glob("*.pt")
        weights.append(torch.load(checkpoint, weights_only=True)["model"])
    first, again, other = weights
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("chosen", [["sst"], ["para", "sts"]])
def test_only_the_named_tasks_are_read_trained_and_written(flags, tmp_path, chosen):
    others = [name for name in TASKS if name not in chosen]
    for name in others:
        for split in ("train", "dev", "test"):
            flags = flags + [f"--{name}_{split}", "/does/not/exist"]
    assert mc.main(flags + [f"--{name}" for name in chosen]) == 0
    written = {name.split("-")[0] for name in read_predictions(tmp_path)}
    assert written == set(chosen)
    (checkpoint,) = (tmp_path / "models_dir").glob("*.pt")
    assert set(mc.load_checkpoint(checkpoint)[2]["dev_scores"]) == set(chosen)


def test_smoketest_is_short(flags, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    keep = [part for part in flags if not part.endswith(".csv") and not part.endswith("_out")]
    assert mc.main(keep + ["--smoketest"]) == 0
    (run,) = (path.stem for path in (tmp_path / "models_dir").glob("*.pt"))
    latest = tmp_path / "predictions" / "latest"
    assert latest.is_symlink() and latest.readlink() == Path(run)
    files = list(latest.glob("*.csv"))
    assert len(files) == 6
    assert {len(path.read_text().splitlines()) for path in files} == {SMOKETEST_ROWS + 1}
    assert options("--smoketest").epochs == SMOKETEST["epochs"]
    assert options("--smoketest", "--epochs", "3").epochs == 3


def test_pretrain_leaves_the_encoder_as_it_was(flags, tmp_path, tiny_directory):
    assert mc.main(flags + ["--option", "pretrain"]) == 0
    (checkpoint,) = (tmp_path / "models_dir").glob("*.pt")
    trained = mc.load_checkpoint(checkpoint)[0]
    start = BertModel.from_pretrained(tiny_directory).state_dict()
    for name, tensor in trained.bert.state_dict().items():
        assert torch.equal(tensor, start[name]), name


def test_max_length_of_training_is_kept_for_evaluation(flags, tmp_path, capsys):
    assert mc.main(flags + ["--max_length", "12"]) == 0
    before = read_predictions(tmp_path)
    (checkpoint,) = (tmp_path / "models_dir").glob("*.pt")
    assert mc.main(flags + ["--evaluate", str(checkpoint)]) == 0
    assert read_predictions(tmp_path) == before
    assert mc.main(flags + ["--evaluate", str(checkpoint), "--max_length", "40"]) == 0
    assert read_predictions(tmp_path) != before


def test_both_orders_are_for_pairs_that_are_read_in_one_sequence(minilm_tokenizer):
    chosen = options("--data_dir", str(SAMPLE), "--both_orders", "--sts_encoding", "cross")
    data = load_data(chosen, minilm_tokenizer, 64, SPLITS)
    rows = {split: [len(dataset.n_tokens) for dataset in data[split].values()] for split in SPLITS}
    assert rows == {"train": [1500, 1500, 3000]} | dict.fromkeys(("dev", "test"), [300, 300, 600])
    for split, n_rows in {"train": 1500, "dev": 300, "test": 300}.items():
        assert [len(dataset) for dataset in data[split].values()] == [n_rows] * 3


LEVERS = {
    "para_encoding": ["--para_encoding", "both"],
    "sts_encoding": ["--sts_encoding", "cross"],
    "rdrop": ["--rdrop", "1,1,1"],
    "scheduler": ["--scheduler", "linear", "--warmup", "0.1"],
    "layer_lr_decay": ["--layer_lr_decay", "0.9"],
    "ema": ["--ema", "0.9"],
    "sst_loss": ["--sst_loss", "one_vs_all"],
    "batch_shares": ["--batch_shares", "1,1.5,0.5"],
    "both_orders": ["--both_orders"],
}


class Peer:
    """A BERT of transformers with the weights of a model, and pooling and heads in NumPy."""

    def __init__(self, model, directory):
        self.bert = transformers.AutoModel.from_pretrained(directory).eval()
        self.bert.load_state_dict(model.bert.state_dict())
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
        self.weights = {key: value.double().numpy() for key, value in model.state_dict().items()}

    def linear(self, key, x):
        return x @ self.weights[f"{key}.weight"].T + self.weights.get(f"{key}.bias", 0)

    def vector(self, *texts):
        with torch.no_grad():
            hidden = self.bert(**self.tokenizer(*texts, return_tensors="pt")).last_hidden_state
        hidden = hidden[0].double().numpy()
        tanh = np.tanh(self.linear("attention_layer.W", hidden))
        scores = np.exp(self.linear("attention_layer.v", tanh))
        return (scores * hidden).sum(0) / scores.sum()

    def head(self, key, x, n_hidden):
        for number in range(n_hidden):
            x = np.maximum(self.linear(f"{key}.hidden.{number}", x), 0)
        return self.linear(f"{key}.out", x)

    def outputs(self, name, sentences):
        """Return the outputs of a task's heads for one row."""
        if name == "sst":
            return [self.head("heads.sst", self.vector(*sentences), 3)]
        joint = self.head(f"joint_heads.{name}", self.vector(*sentences), 1)
        if name == "sts":
            return [joint]
        u, v = (self.linear("heads.para.project", self.vector(text)) for text in sentences)
        return [self.head("heads.para", np.concatenate([abs(u - v), abs(u + v)]), 2), joint]


def test_predictions_of_a_run_with_all_levers_are_those_of_transformers(
    flags, tiny_directory, tmp_path
):
    """For the weights that it kept: the answers in its files, and the probabilities behind them."""
    flags += [flag for lever in LEVERS.values() for flag in lever]
    assert mc.main(flags) == 0
    (checkpoint,) = (tmp_path / "models_dir").glob("*.pt")
    model = mc.load_checkpoint(checkpoint).model
    peer, data = Peer(model, tiny_directory), mc.load_all(options(*flags)).data["dev"]
    for name, task in model.tasks.items():
        outputs = mc.evaluation.outputs(model, data[name], 16).double().numpy()
        answers = list(csv.DictReader(open(tmp_path / f"{name}-dev.csv"), delimiter="\t"))
        dev = csv.DictReader(open(Path(flags[3]) / task.dev[0], newline=""), delimiter="\t")
        for row, answer, output in zip(dev, answers, outputs, strict=True):
            assert row["id"] == answer["id"]
            found = float(answer[task.prediction_column])
            sentences = [row[column] for column in task.sentences]
            expected = peer.outputs(name, sentences)
            if task.is_pair:  # --both_orders asks both
                expected = [*expected, *peer.outputs(name, sentences[::-1])]
            if name == "sts":
                mean = np.mean([value.item() for value in expected])
                assert output == pytest.approx(mean, abs=1e-4)
                assert found == pytest.approx(np.clip(output, 0, 5), abs=1e-4)
                continue
            # Of two heads in two orders: the geometric mean of their probabilities, made to sum to 1.
            logs = np.mean([x - np.log(np.exp(x).sum()) for x in expected], axis=0)
            probabilities = np.exp(logs) / np.exp(logs).sum()
            shown = np.exp(output) / np.exp(output).sum()
            np.testing.assert_allclose(shown, probabilities, atol=1e-5)
            assert found == output.argmax()


@pytest.fixture
def learned(flags, tmp_path):
    """Train an epoch. Return the weights that would be evaluated."""

    def learn(*more):
        parts = mc.load_all(options(*flags, *more))
        log = RunLog(tmp_path / "log")
        run = Training(parts, tmp_path / "run.resume", log)
        for window in run.windows():
            run.record(mc.training_step(run.model, window, run.optimizer, parts.options), window)
        log.close()
        return run.evaluated_model.state_dict()

    return learn


def test_each_lever_changes_what_is_learned(learned):
    """What it changes is tested where it is made."""

    def attention_of(names):
        weights = learned(*(flag for name in names for flag in LEVERS[name]))
        return weights["attention_layer.W.weight"]

    everything = attention_of(LEVERS)
    assert torch.equal(attention_of(LEVERS), everything)
    for lever in LEVERS:
        others = attention_of(name for name in LEVERS if name != lever)
        assert not torch.equal(others, everything), lever


def test_few_dev_rows_are_scored_after_an_epoch_and_all_at_the_end(
    flags, tmp_path, monkeypatch, capsys
):
    seen, outputs = [], mc.evaluation.outputs

    def note(model, dataset, *arguments):
        seen.append((dataset.task.name, dataset.split, set(dataset.ids)))
        return outputs(model, dataset, *arguments)

    monkeypatch.setattr(mc.evaluation, "outputs", note)
    assert mc.main(flags + ["--dev_rows", "10"]) == 0
    sizes = [(name, split, len(ids)) for name, split, ids in seen]
    few = [(name, "dev", 10) for name in TASKS]
    assert sizes == 2 * few + [(name, split, 40) for split in ("dev", "test") for name in TASKS]
    assert seen[:3] == seen[3:6]  # the same rows after each epoch
    (checkpoint,) = (tmp_path / "models_dir").glob("*.pt")
    shown = capsys.readouterr().out
    scores = mc.load_checkpoint(checkpoint).content["dev_scores"]
    dev = csv.DictReader(open(Path(flags[3]) / "ids-sst-dev.csv"), delimiter="\t")
    labels = {row["id"]: float(row["sentiment"]) for row in dev}
    answers = csv.DictReader(open(tmp_path / "sst-dev.csv"), delimiter="\t")
    right = {row["id"]: float(row["predicted_sentiment"]) == labels[row["id"]] for row in answers}
    assert scores["sst"]["accuracy"] == pytest.approx(np.mean([right[id] for id in seen[0][2]]))
    assert f"accuracy    {np.mean(list(right.values())):.4f}" in shown


def test_precision_of_training_is_kept_for_evaluation(flags, tmp_path):
    assert mc.main(flags + ["--precision", "bfloat16"]) == 0
    before = read_predictions(tmp_path)
    (checkpoint,) = (tmp_path / "models_dir").glob("*.pt")
    assert mc.main(flags + ["--evaluate", str(checkpoint)]) == 0
    assert read_predictions(tmp_path) == before
    assert mc.main(flags + ["--evaluate", str(checkpoint), "--precision", "float32"]) == 0
    assert read_predictions(tmp_path) != before


def test_dropout_flag_reaches_the_encoder(flags, tmp_path):
    assert mc.main(flags + ["--hidden_dropout_prob", "0.45"]) == 0
    (checkpoint,) = (tmp_path / "models_dir").glob("*.pt")
    model = mc.load_checkpoint(checkpoint)[0]
    assert model.bert.config.hidden_dropout_prob == 0.45
    assert {m.p for m in model.bert.modules() if isinstance(m, Dropout)} == {0.45}


def test_ctrl_c_ends_cleanly_and_says_what_was_saved(flags, tmp_path):
    """After the first epoch, in the middle of the second."""
    # A message with the long paths of tests would be cut.
    short = [flag.replace(f"{tmp_path}/", "") for flag in flags]
    command = [sys.executable, ROOT / "multitask_classifier.py", *short, "--epochs", "100"]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    run = subprocess.Popen(command, cwd=tmp_path, **pipes)
    models = tmp_path / "models_dir"
    deadline = time.monotonic() + 120
    while not (models.exists() and list(models.glob("*.pt"))) and time.monotonic() < deadline:
        time.sleep(0.05)
    run.send_signal(signal.SIGINT)
    _, errors = run.communicate(timeout=60)
    (checkpoint,) = models.glob("*.pt")  # and no temporary file beside it
    assert run.returncode == 130
    state, shown = checkpoint.with_suffix(".resume"), checkpoint.relative_to(tmp_path)
    assert f"interrupted; saved: the best model so far is {shown}; continue with" in errors
    assert f"--resume {state.relative_to(tmp_path)};" in errors and state.exists()
    assert not list(models.glob(".*.tmp"))
    assert "Traceback" not in errors
    mc.load_checkpoint(checkpoint)
    assert not read_predictions(tmp_path)


# -------------------------------------------------------------------------------------- checkpoint


@pytest.fixture
def checkpoint(model, tiny_directory, tmp_path):
    path = tmp_path / "model.pt"
    tokenizer = BertTokenizer.from_pretrained(tiny_directory)
    scores = {"sst": {"accuracy": 0.5}}
    write_checkpoint(path, checkpoint_content(model, tokenizer, options(), 3, scores))
    return path


def test_checkpoint_holds_what_a_later_load_needs(checkpoint, model, tiny_directory):
    loaded, tokenizer, saved = mc.load_checkpoint(checkpoint)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    assert loaded.bert.config == model.bert.config
    assert tokenizer(["a b"]) == BertTokenizer.from_pretrained(tiny_directory)(["a b"])
    assert saved["options"]["lr"] == 8e-5 and saved["epoch"] == 3
    assert set(saved["versions"]) == {"python", "torch", "commit"}


@pytest.mark.parametrize(
    "flags, tasks, sts_dev, para_dev",
    [
        ("", "sts para", "a/sts-dev.csv", "x y"),
        ("--data_dir b", "sts para", "b/sts-dev.csv", "x y"),
        ("--para_dev z", "sts para", "a/sts-dev.csv", "z"),
        ("--data_dir b --sts_dev c/d", "sts para", "c/d", "x y"),
        ("--tasks para", "para", None, "x y"),
        ("--sts --data_dir b", "sts", "b/sts-dev.csv", "x y"),
    ],
)
def test_an_evaluation_takes_tasks_and_data_from_the_checkpoint(
    model, tiny_directory, tmp_path, flags, tasks, sts_dev, para_dev
):
    """--data_dir moves the files that the task names, not those that were given by hand."""
    trained = options(
        *("--tasks", "sts,para", "--data_dir", "a", "--para_dev", "x", "y"),
        *("--sts_encoding", "cross", "--batch_size", "7"),
    )
    tokenizer, path = BertTokenizer.from_pretrained(tiny_directory), tmp_path / "model.pt"
    write_checkpoint(path, checkpoint_content(model, tokenizer, trained, 3, {}))
    found = options_to_evaluate(["--evaluate", str(path), *flags.split()], [str(path)])
    assert found.evaluate == [str(path)] and found.batch_size == 64
    assert found.tasks == {name: trained.tasks[name] for name in tasks.split()}
    assert found.sts_dev == (sts_dev and sts_dev.split())
    assert found.para_dev == (para_dev and para_dev.split())


@pytest.mark.parametrize("flags, sst, para", [("", "a", "b"), ("--data_dir c", "c", "c")])
def test_each_task_of_several_models_has_the_data_of_its_own(
    model, tiny_directory, tmp_path, flags, sst, para
):
    tokenizer, paths = BertTokenizer.from_pretrained(tiny_directory), []
    for folder, tasks in {"a": "sst", "b": "sst,para"}.items():
        trained = options("--tasks", tasks, "--data_dir", folder)
        paths.append(str(tmp_path / f"{folder}.pt"))
        write_checkpoint(Path(paths[-1]), checkpoint_content(model, tokenizer, trained, 3, {}))
    found = options_to_evaluate(["--evaluate", *paths, *flags.split()], paths)
    assert found.sst_dev == [f"{sst}/ids-sst-dev.csv"]
    assert found.para_dev == [f"{para}/quora-dev.csv"]


@pytest.mark.parametrize(
    "flags, problem",
    [
        ("--sts_encoding bi", "with --sts_encoding cross; leave --sts_encoding out"),
        ("--sst_loss ordinal", "with --sst_loss cross_entropy; leave --sst_loss out"),
        ("--moe hard", "without --moe; leave --moe out"),
        ("--sts_encoding cross --sst_loss cross_entropy --lr 1", None),
    ],
)
def test_an_evaluation_refuses_flags_of_another_model(
    model, tiny_directory, tmp_path, flags, problem
):
    trained, path = options("--sts_encoding", "cross"), tmp_path / "model.pt"
    tokenizer = BertTokenizer.from_pretrained(tiny_directory)
    write_checkpoint(path, checkpoint_content(model, tokenizer, trained, 3, {}))
    argv = ["--evaluate", str(path), *flags.split()]
    if problem is None:
        assert options_to_evaluate(argv, [str(path)]).evaluate == [str(path)]
        return
    with pytest.raises(UserError) as caught:
        options_to_evaluate(argv, [str(path)])
    assert str(caught.value) == f"{path}: was trained {problem}"


def test_checkpoint_of_no_use_is_one_clear_line(checkpoint, tmp_path, capsys):
    content = torch.load(checkpoint, weights_only=True)
    whole = checkpoint.read_bytes()
    weights = dict(content["model"])
    weights.popitem()
    cases = {
        "no such file": lambda: checkpoint.unlink(),
        "damaged, or not a file": lambda: checkpoint.write_bytes(whole[: len(whole) // 2]),
        "not a checkpoint of": lambda: torch.save({"model": {}}, checkpoint),
        "has checkpoint format 99": lambda: torch.save(content | {"format": 99}, checkpoint),
        "a damaged checkpoint": lambda: torch.save(content | {"model": weights}, checkpoint),
    }
    for message, damage in cases.items():
        damage()
        with pytest.raises(UserError, match=message) as caught:
            mc.load_checkpoint(checkpoint)
        assert "\n" not in str(caught.value)
    assert mc.main(["--evaluate", str(tmp_path / "absent.pt")]) == 1
    assert capsys.readouterr().err == f"error: {tmp_path}/absent.pt: no such file\n"


def test_checkpoint_cannot_run_code(checkpoint, tmp_path):
    class Malicious:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "hacked"),))

    torch.save({"format": 1, "model": Malicious()}, checkpoint)
    with pytest.raises(UserError, match="not a file of tensors and plain values"):
        mc.load_checkpoint(checkpoint)
    assert not (tmp_path / "hacked").exists()


# -------------------------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--max_length", "513"], "--max_length 513 is more than this encoder's 128 positions"),
        (["--sst_train", "/absent.csv"], "/absent.csv: no such file"),
        (["--bert_model", "/absent/bert"], "/absent/bert: "),
    ],
)
def test_what_cannot_be_used_ends_in_one_line(flags, message, tiny_directory, capsys, tmp_path):
    base = ["--bert_model", str(tiny_directory), "--data_dir", str(SAMPLE)]
    base += ["--models_dir", str(tmp_path), "--logdir", str(tmp_path), "--local_files_only"]
    assert mc.main(base + flags) == 1
    errors = capsys.readouterr().err
    assert message in errors and errors.startswith("error: ") and errors.count("\n") == 1


def test_outputs_that_cannot_be_written_are_refused_before_training(flags, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for flag in ("--models_dir", "--logdir", "--sst_dev_out"):
        target = tmp_path / "file" if flag != "--sst_dev_out" else tmp_path / "file" / "out.csv"
        assert mc.main(flags + [flag, str(target)]) == 1
        output = capsys.readouterr()
        assert str(target) in output.err and output.err.count("\n") == 1
        assert "epoch 1" not in output.out


def test_a_file_is_not_given_twice(flags, tmp_path, capsys):
    target = str(tmp_path / "x.csv")
    assert mc.main(flags + ["--sst_dev_out", target, "--sts_test_out", target]) == 1
    assert f"{target}: is given for --sts_test_out and for --sst_dev_out" in capsys.readouterr().err
    assert mc.main(flags + ["--sst_train", target, "--sts_test_out", target]) == 1
    assert f"{target}: is given for --sts_test_out and for --sst_train" in capsys.readouterr().err


def test_a_full_disk_is_one_clear_line_and_keeps_the_old_file(checkpoint, tmp_path):
    code = f"""
import resource, sys, multitask_classifier as mc
from pathlib import Path
from checkpoint import checkpoint_content, write_checkpoint
from options import parse_options
from utils import UserError
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
model, tokenizer, saved = mc.load_checkpoint({str(checkpoint)!r})
try:
    content = checkpoint_content(model, tokenizer, parse_options([]), 4, {{}})
    write_checkpoint(Path({str(checkpoint)!r}), content)
except UserError as error:
    print(error)
"""
    before = checkpoint.read_bytes()
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.startswith(f"cannot write {checkpoint}: "), done.stderr
    assert done.stdout.count("\n") == 1 and checkpoint.read_bytes() == before
    assert list(tmp_path.glob(".*")) == []


def test_heads_and_losses_of_tasks_from_a_file_follow_from_their_rows(own_tasks, tiny_directory):
    chosen = options(*own_tasks, "--clip", "0", "--nli_loss", "ordinal")
    assert list(chosen.tasks) == ["emotion", "nli", "rating"]
    assert chosen.loss_weights == {"emotion": 2, "nli": 1, "rating": 1}
    tokenizer = BertTokenizer.from_pretrained(tiny_directory)
    model = MultitaskBERT(BertModel.from_pretrained(tiny_directory), chosen.tasks).eval()
    assert {name: type(head) for name, head in model.heads.items()} == {
        "emotion": SequenceHead,
        "nli": PairHead,
        "rating": SequenceHead,
    }
    (batch,) = windows(load_data(chosen, tokenizer, 128, ["train"])["train"], 10, 1)
    outputs, labels = model(batch), batch.labels
    assert {name: tuple(output.shape) for name, output in outputs.items()} == {
        "emotion": (10, 4),
        "nli": (10, 3),
        "rating": (10,),
    }
    losses, _ = gradients(model, [batch], chosen)
    logs, border = outputs["nli"].log_softmax(1).detach().numpy(), 0
    for row, label in zip(np.exp(logs), labels["nli"].tolist()):
        for k in (1, 2):
            border -= np.log(row[k:].sum() if label >= k else row[:k].sum()) / 10
    expected = {
        "emotion": F.cross_entropy(outputs["emotion"], labels["emotion"]).item(),
        "nli": F.cross_entropy(outputs["nli"], labels["nli"]).item() + border,
        "rating": ((outputs["rating"] - labels["rating"]) ** 2).mean().item(),
    }
    assert {name: float(loss) for name, loss in losses.items()} == pytest.approx(
        expected | {"sum": 2 * expected["emotion"] + expected["nli"] + expected["rating"]}, rel=1e-5
    )


def test_a_run_with_tasks_from_a_file(flags, own_tasks, tmp_path, capsys):
    """Its checkpoint knows tasks and data: --evaluate needs nothing else."""
    run = ["--predictions_dir", str(tmp_path / "first")]
    assert mc.main(flags + own_tasks + run) == 0
    shown = capsys.readouterr().out
    assert re.search(r"  emotion: 64 rows, train accuracy 0\.\d+, macro_f1 0\.\d+; dev none", shown)
    assert re.search(r"  nli: 64 rows, train matthews .*; dev matthews -?\d\.\d+, accuracy", shown)
    assert re.search(r"  rating: 24 rows, train pearson .*; dev pearson .*, spearman", shown)
    (checkpoint,) = (tmp_path / "models_dir").glob("*.pt")
    content = mc.load_checkpoint(checkpoint).content
    assert set(content["dev_scores"]) == {"nli", "rating"}
    assert content["options"]["tasks"]["nli"] == read_task_file(own_tasks[1])["nli"]
    first = read_predictions(tmp_path / "first")
    assert set(first) == {f"{t}-{s}-output.csv" for t in ("nli", "rating") for s in ("dev", "test")}
    header, *rows = csv.reader(first["nli-dev-output.csv"].splitlines(), delimiter="\t")
    assert header == ["id", "predicted_relation"]
    assert [id for id, _ in rows] == [str(n) for n in range(1, 25)]
    assert {name for _, name in rows} <= {"entailment", "neutral", "contradiction"}
    again = ["--predictions_dir", str(tmp_path / "again"), "--cache_dir", str(tmp_path / "cache")]
    Path(own_tasks[1]).unlink()
    assert mc.main(["--evaluate", str(checkpoint), *again]) == 0
    assert read_predictions(tmp_path / "again") == first
    assert capsys.readouterr().out.strip().split("predictions in")[0] in shown


@pytest.mark.parametrize("symmetric", [True, False])
def test_swapping_a_pair_counts_only_where_its_order_does(symmetric):
    """The formula of the head, and that the swapped pair has another answer, or the same."""
    changes = dict(classes=("a", "b", "c"), texts=(), metrics=(), symmetric=symmetric)
    task = dataclasses.replace(TASKS["para"], **changes)
    head = PairHead(24, task).double()
    one, two = torch.randn(2, 7, 24, dtype=torch.double)
    u, v = head.project(one), head.project(two)
    kept = [(u - v).abs(), (u + v).abs()] if symmetric else [u, v, (u - v).abs(), u * v]
    hidden = torch.cat(kept, dim=1)
    for linear in head.hidden:
        hidden = (hidden @ linear.weight.T + linear.bias).clamp(min=0)
    expected = hidden @ head.out.weight.T + head.out.bias
    torch.testing.assert_close(head(one, two), expected)
    assert expected.shape == (7, 3)
    assert torch.allclose(head(two, one), head(one, two)) == symmetric


@pytest.mark.parametrize("n_hidden", [1, 3])
def test_the_head_of_a_number_starts_in_the_middle_of_its_range(n_hidden):
    task = dataclasses.replace(
        TASKS["sst"], classes=(), texts=(), range=(1.0, 5.0), metrics=(), symmetric=None
    )
    head = SequenceHead(24, task, n_hidden=n_hidden)
    vectors = torch.randn(500, 24)
    numbers = head(vectors)
    assert numbers.shape == (500,) and len(head.hidden) == n_hidden
    assert head(torch.zeros(3, 24)).tolist() == [3, 3, 3]
    hidden = vectors
    for linear in head.hidden:
        hidden = (hidden @ linear.weight.T + linear.bias).clamp(min=0)
    torch.testing.assert_close(numbers, hidden @ head.out.weight[0] + 3)


# --------------------------------------------------------- tasks that have no row in a step


@pytest.mark.parametrize("missing", TASKS)
def test_a_step_without_rows_of_a_task_is_a_step_on_the_others(model, data, missing):
    """Its loss is not there, and the weights of its head have no gradient."""
    model.double().eval()
    multiples = {name: 0.1 if name == missing else 1.0 for name in TASKS}
    (batch,) = windows(data, 5, 1, row_multiples=multiples)  # round(0.5) is 0
    assert batch.step_rows == {name: 0 if name == missing else 5 for name in TASKS}
    chosen = options("--clip", "0", "--loss_weights", "2,0.5,3")
    optimizer = Recorder(model.parameters(), lr=0.0)
    step = mc.training_step(model, [batch], optimizer, chosen)
    others = [name for name in TASKS if name != missing]
    assert set(step.losses) == {*others, "sum"}
    outputs = model(batch)
    total = sum(
        chosen.loss_weights[name] * TASKS[name].loss(outputs[name], batch.labels[name])
        for name in others
    )
    assert float(step.losses["sum"]) == pytest.approx(total.item(), rel=1e-5)
    total.backward()
    expected = [p.grad for p in model.parameters() if p.grad is not None]
    for mine, other in zip(optimizer.seen, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)
    assert {answers.task for answers in step.answers} == set(others)
    assert all(p.grad is None for p in model.heads[missing].parameters())


@pytest.mark.parametrize("name", ["adamw", "sophiah", "sophiag"])
def test_a_run_with_steps_that_lack_a_task(flags, tmp_path, name):
    """8 steps, of 2 rows of sst and a quarter of that of the others."""
    more = ["--optimizer", name, "--batch_size", "2", "--samples_per_epoch", "16", "--epochs", "1"]
    assert mc.main([*flags, *more, "--batch_shares", "para=0.25,sts=0.25"]) == 0
    (run,) = (tmp_path / "logdir").iterdir()
    log = EventAccumulator(str(run)).Reload()
    steps = {tag: [e.step for e in log.Scalars(tag)] for tag in log.Tags()["scalars"]}
    assert steps["loss/sum"] == steps["loss/sst"] == list(range(1, 9))
    # round(n / 4) for n = 0, 2, 4, ...: 0, 0, 1, 2, 2, 2, 3, 4, 4
    assert steps["loss/para"] == steps["loss/sts"] == [2, 3, 6, 7]
    assert log.Scalars("rows/sts")[0].value == 4


@pytest.mark.parametrize("name", ["adamw", "sophiah", "sophiag"])
def test_a_step_without_any_row_changes_nothing(model, name):
    chosen = options("--optimizer", name)
    optimizer = build_optimizer(model.train(), chosen)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    assert mc.training_step(model, [], optimizer, chosen).problem is None
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_both_orders_of_each_pair_are_trained_on(flags, monkeypatch, capsys):
    """Each of 64 pairs once an epoch, in an order that is drawn. A run that gives up names their ids."""
    seen, training_step = [], mc.training_step

    def note(model, window, *arguments):
        seen.extend(row for batch in window for row in batch.rows["sts"])
        step = training_step(model, window, *arguments)
        return step._replace(check=step.check * (torch.nan if len(seen) == 128 else 1))

    monkeypatch.setattr(mc, "training_step", note)
    more = ["--sts", "--sts_encoding", "cross", "--both_orders", "--max_bad_steps", "1"]
    assert mc.main([*flags, *more]) == 1
    for epoch in (seen[:64], seen[64:]):
        assert sorted(row % 64 for row in epoch) == list(range(64))
        assert 16 < sum(row >= 64 for row in epoch) < 48
    assert {row for row in seen[:64] if row >= 64} != {row for row in seen[64:] if row >= 64}
    shown = capsys.readouterr()
    assert "64 training rows in both orders" in shown.out
    named = re.search("rows of the last step, by id: sts (.*)", shown.err)[1].split(", ")
    path = Path(flags[flags.index("--data_dir") + 1]) / TASKS["sts"].train[0]
    ids = [row["id"] for row in csv.DictReader(open(path), delimiter="\t")]
    assert named == [ids[row % 64] for row in seen[-16:]]


def test_two_runs_that_start_together_have_two_names(tmp_path):
    chosen = options("--logdir", str(tmp_path))
    claimed = [new_run(chosen, new_name(chosen, "finetune")) for _ in range(5)]
    assert len({run for run, _ in claimed}) == len({folder for _, folder in claimed}) == 5


def test_a_task_that_was_not_trained_is_not_evaluated(flags, tmp_path, capsys):
    assert mc.main(flags + ["--sts"]) == 0
    (checkpoint,) = (tmp_path / "models_dir").glob("*.pt")
    assert mc.main(flags + ["--evaluate", str(checkpoint)]) == 0
    assert {name.split("-")[0] for name in read_predictions(tmp_path)} == {"sts"}
    assert mc.main(flags + ["--evaluate", str(checkpoint), "--para"]) == 1
    assert f"{checkpoint}: was not trained on para" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_gpu_asked_for_without_one(capsys):
    assert mc.main(["--use_gpu"]) == 1
    assert "--use_gpu: PyTorch sees no GPU here" in capsys.readouterr().err


def test_a_run_talks_to_nobody(flags):
    """With a model on this disk, no address is looked up and no connection made."""
    code = """
import os, sys
def refuse(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto"):
        os._exit(99)  # which nothing catches
sys.addaudithook(refuse)
import multitask_classifier as mc
sys.exit(mc.main(sys.argv[1:]))
"""
    command = [sys.executable, "-c", code, *flags, "--smoketest"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_importing_does_nothing_heavy():
    heavy = ["sklearn", "matplotlib", "tensorboard", "huggingface_hub", "transformers", "pandas"]
    code = f"import json, sys, multitask_classifier; print(json.dumps([m for m in {heavy} if m in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert json.loads(done.stdout) == []


@pytest.mark.skipif("libgomp" not in LIBRARIES, reason="PyTorch uses another OpenMP than GNU's")
@pytest.mark.parametrize("given, expected", [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7")])
def test_threads_of_two_runs_on_the_same_cores_wait_shortly_for_each_other(given, expected):
    """GNU's OpenMP says itself what it has read when PyTorch was imported."""
    command = [sys.executable, "multitask_classifier.py", "--help"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GOMP_")} | given
    environment["OMP_DISPLAY_ENV"] = "VERBOSE"
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert re.findall(r"GOMP_SPINCOUNT = '(.*)'", done.stderr) == [expected]
