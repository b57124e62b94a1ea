"""Steps that are replayed. Without a GPU, a capture is one in its effects only: it changes nothing, and
each replay does the work again and writes its results where the capture's are. Like PyTorch's, a pool
cannot be used again when all its graphs are gone."""

import copy
import dataclasses
import gc
import weakref

import pytest
import torch
from test_resume import OFTEN, PLACES, Killed, assert_same, nth_call, outcome
from torch.utils._pytree import tree_leaves

import attention
import graphs
import multitask_classifier as mc
import training
from attention import Sequences, plain_attention
from batches import EpochSampler, training_windows
from bert import BertModel
from graphs import CudaCapture, StepGraphs, padded_size
from optimizer import build_optimizer
from options import parse_options

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="captures need a GPU")


class Replays:
    """Acts as a `CudaCapture` of a model, on a CPU."""

    def __init__(self, model):
        self.model, self.captured, self.replayed = model, 0, 0
        self.pool = []  # of weak references to what replays

    def forget(self):
        self.pool = []

    def warm_up(self, work):
        return work()

    def __call__(self, work):
        gc.collect()
        if self.pool and not any(replay() for replay in self.pool):
            raise RuntimeError("a pool without graphs")
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        before, random = [g.clone() for g in gradients], torch.get_rng_state()
        result = work()
        torch.set_rng_state(random)
        for gradient, old in zip(gradients, before, strict=True):
            gradient.copy_(old)
        self.captured += 1

        def replay():
            self.replayed += 1
            for target, value in zip(tree_leaves(result), tree_leaves(work()), strict=True):
                target.copy_(value)

        self.pool.append(weakref.ref(replay))
        return replay, result


def attention_by_offsets(qkv, sequences, dropout):
    """Attention that reads the lengths where CUDA's does."""
    lengths = sequences.offsets.diff().tolist()
    assert min(lengths) > 0 and sum(lengths) == len(qkv)
    return plain_attention(qkv, Sequences.of(lengths, qkv.device), dropout)


@pytest.fixture
def by_offsets(monkeypatch):
    monkeypatch.setitem(attention.ATTENTION, "cpu", attention_by_offsets)


def graphs_of(model):
    return StepGraphs(model, CudaCapture() if torch.cuda.is_available() else Replays(model))


@pytest.fixture
def trainee(flags, by_offsets, pipeline_directory):
    """Make (model, its twin, options, windows of two batches, the last of one) with some flags."""

    def make(*more, rows=33, dropout=False):
        tags = ["--spacy_model", str(pipeline_directory)] if "--additional_input" in more else []
        # In bfloat16, one rounding that differs is more than what is compared here.
        precision = [] if "--precision" in more else ["--precision", "float32"]
        options = parse_options([*flags, *tags, *precision, *more])
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        data = mc.load_all(options).data["train"]
        model = mc.load_all(options).model
        if device.type == "cuda":  # our kernels take heads of 32 and 64
            sizes = {"hidden_size": 64, "num_attention_heads": 2}
            bert = BertModel(dataclasses.replace(model.bert.config, **sizes))
            model = mc.MultitaskBERT(bert, options.tasks, options.loss_weights == "learned")
        samplers = {name: EpochSampler(len(rows), 1) for name, rows in data.items()}
        twice = [name for name, weight in options.rdrop.items() if weight]
        windows = list(training_windows(data, samplers, rows, 3, 2, twice=twice))
        model = model.to(device).train(dropout)
        return model, copy.deepcopy(model), options, windows

    return make


def steps(model, windows, options, own_graphs):
    """Take steps. Return their losses, the rows' predictions and the gradients."""
    seen = []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)

    def note(*_):
        gradients = [parameter.grad for parameter in model.parameters()]
        seen.append([None if gradient is None else gradient.clone() for gradient in gradients])

    optimizer.register_step_pre_hook(note)
    taken = [mc.training_step(model, w, optimizer, options, None, own_graphs) for w in windows]
    assert all(step.problem is None for step in taken)
    losses = [step.losses for step in taken]
    answers = [(a.task, a.labels, a.predictions) for step in taken for a in step.answers]
    return losses, answers, seen


KINDS = {
    "plain": [],
    "tags": ["--additional_input"],
    "pairs in one sequence": ["--para_encoding", "cross", "--sts_encoding", "both"],
    "two passes": ["--rdrop", "1,1,1"],
    "learned weights": ["--loss_weights", "learned"],
    "two tasks": ["--sst", "--sts"],
    "a loss for each border": ["--sst_loss", "ordinal", "--label_smoothing", "0.1"],
    "a loss for each class": ["--sst_loss", "one_vs_all"],
}


@pytest.mark.parametrize("kind", KINDS)
def test_replayed_steps_have_the_numbers_of_the_plain_way(trainee, kind):
    model, twin, options, windows = trainee(*KINDS[kind])
    own_graphs = graphs_of(model)
    ours, theirs = steps(model, windows, options, own_graphs), steps(twin, windows, options, None)
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-4, atol=1e-5)
    for (task, labels, values), (their_task, their_labels, their_values) in zip(
        ours[1], theirs[1], strict=True
    ):
        assert task == their_task and torch.equal(labels, their_labels)
        torch.testing.assert_close(values, their_values, rtol=1e-3, atol=1e-3)
    for one, other in zip(ours[2], theirs[2], strict=True):
        assert [g is None for g in one] == [g is None for g in other]
        present = [[g for g in gradients if g is not None] for gradients in (one, other)]
        torch.testing.assert_close(*present, rtol=1e-3, atol=1e-5)
    shapes = own_graphs.graphs.values()
    assert sum(graph.replay is not None for graph in shapes) >= 1
    if isinstance(own_graphs.capture, Replays):
        assert own_graphs.capture.replayed >= 4 >= own_graphs.capture.captured


def test_a_weight_without_a_row_in_the_step_keeps_no_gradient(trainee):
    """Neither from the plain pass of a new shape nor from a replay, after steps that had all tasks."""
    model, _, options, windows = trainee()
    _, _, _, narrow = trainee("--sst")
    own_graphs = graphs_of(model)
    mixed = [*windows[:3], [windows[3][0], narrow[0][0]], narrow[0][:1], *narrow[:4]]
    for batch in (batch for window in narrow for batch in window):
        batch.step_rows.update(para=0, sts=0)
    _, _, gradients = steps(model, mixed, options, own_graphs)
    names = [name for name, _ in model.named_parameters()]
    for step, of_step in enumerate(gradients):
        present = {n for n, g in zip(names, of_step, strict=True) if g is not None}
        assert any(name.startswith("heads.sst") for name in present)
        assert any(name.startswith("heads.para") for name in present) == (step < 4)


def test_what_is_in_the_padding_does_not_count(trainee, monkeypatch):
    read, results = graphs.StepGraph.read, []

    def and_spoil(graph, batch):
        read(graph, batch)
        n_tokens = len(batch.input_ids)
        graph.batch.input_ids[n_tokens:] = 7
        graph.batch.position_ids[n_tokens:] = 11

    for how in (read, and_spoil):
        monkeypatch.setattr(graphs.StepGraph, "read", how)
        model, _, options, windows = trainee()
        results.append(steps(model, windows, options, graphs_of(model)))
    assert len(results[0][2]) == len(windows)
    # On a GPU, sums of index_add have no fixed order.
    bounds = dict(rtol=1e-4, atol=1e-5) if torch.cuda.is_available() else dict(rtol=0, atol=0)
    for one, other in zip(*map(tree_leaves, results), strict=True):
        if isinstance(one, torch.Tensor):
            torch.testing.assert_close(one, other, **bounds)
        else:
            assert one == other


def test_replayed_steps_in_bfloat16_are_near_the_plain_way(trainee):
    model, twin, options, windows = trainee("--precision", "bfloat16")
    ours = steps(model, windows, options, graphs_of(model))
    theirs = steps(twin, windows, options, None)
    torch.testing.assert_close(ours[0], theirs[0], rtol=2e-2, atol=1e-3)


def test_dropout_differs_from_replay_to_replay(trainee):
    model, _, options, windows = trainee(dropout=True)
    own_graphs = graphs_of(model)
    for parameter in model.parameters():
        parameter.requires_grad_(parameter is model.heads["sst"].out.bias)
    same_rows = [windows[0][:1]] * 6
    losses, _, _ = steps(model, same_rows, options, own_graphs)
    assert len({float(of_step["para"]) for of_step in losses}) == 6


def test_dropout_has_the_right_effect_on_average(trainee):
    model, twin, options, windows = trainee(dropout=True)
    same_rows = [windows[0][:1]] * 100
    samples = []
    for each, own_graphs in ((model, graphs_of(model)), (twin, None)):
        for parameter in each.parameters():
            parameter.requires_grad_(parameter is each.heads["sst"].out.bias)
        losses, _, _ = steps(each, same_rows, options, own_graphs)
        samples.append(torch.stack([of_step["para"] for of_step in losses]))
    (mean, other), (spread, other_spread) = (
        [f(s) for s in samples] for f in (torch.mean, torch.std)
    )
    assert abs(mean - other) < 4 * (2 / len(same_rows)) ** 0.5 * spread
    assert 0.7 < spread / other_spread < 1.4


def test_layers_that_are_unfrozen_are_captured_anew(trainee):
    model, twin, options, windows = trainee()
    own_graphs = graphs_of(model)
    table = [p is model.bert.embeddings.word_embeddings.weight for p in model.parameters()].index(
        True
    )
    for start, is_frozen in ((0, True), (3, False)):
        for each in (model, twin):
            each.bert.embeddings.requires_grad_(not is_frozen)
        part = windows[start : start + 3]
        ours, theirs = steps(model, part, options, own_graphs), steps(twin, part, options, None)
        for one, other in zip(ours[2], theirs[2], strict=True):
            assert [g is None for g in one] == [g is None for g in other]
            assert is_frozen == (one[table] is None)
        weight = list(model.parameters())[table]
        trained = [{*graph.trained} for graph in own_graphs.graphs.values()]
        tables = [weight in parameters for parameters in trained]
        assert tables == [not is_frozen] * len(tables) != []


def test_where_a_capture_fails_all_steps_go_the_plain_way_after_one_warning(trainee, capsys):
    model, twin, options, windows = trainee()
    own_graphs = graphs_of(model)

    class Fails(Replays):
        def __call__(self, work):
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nhow")

    own_graphs.capture = Fails(model)
    ours, theirs = steps(model, windows, options, own_graphs), steps(twin, windows, options, None)
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-4, atol=1e-5)
    warning = "warning: steps are launched, not replayed: CUDA error: operation not permitted"
    assert capsys.readouterr().err.count(warning) == 1


@CUDA
def test_after_a_failed_capture_the_gpu_goes_on(trainee, monkeypatch, capsys):
    """With dropout, whose random numbers a failed capture of PyTorch's leaves unusable."""
    model, _, options, windows = trainee(dropout=True)
    add_batch = mc.add_batch

    def and_wait(losses, *arguments, **settings):
        losses["sum"].item()  # not permitted in a capture
        return add_batch(losses, *arguments, **settings)

    monkeypatch.setattr(mc, "add_batch", and_wait)
    stream = torch.cuda.current_stream()
    losses, _, _ = steps(model, windows, options, graphs_of(model))
    assert torch.cuda.current_stream() == stream
    assert all(torch.isfinite(of_step["sum"]) for of_step in losses)
    assert capsys.readouterr().err.count("warning: steps are launched, not replayed") == 1


def test_a_run_keeps_a_dozen_graphs(trainee, monkeypatch):
    monkeypatch.setattr(graphs, "MOST_GRAPHS", 1)
    model, twin, options, windows = trainee(rows=60)
    windows[1::2] = [window[:1] for window in windows[1::2]]
    own_graphs = graphs_of(model)
    ours, theirs = steps(model, windows, options, own_graphs), steps(twin, windows, options, None)
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-4, atol=1e-5)
    assert len(own_graphs.graphs) == 1


def test_a_graph_that_is_not_used_any_more_makes_room(trainee, monkeypatch):
    """As with `--sampling annealed`, where each epoch has other numbers of rows."""
    monkeypatch.setattr(graphs, "MOST_GRAPHS", 1)
    monkeypatch.setattr(graphs, "UNUSED", 3)
    model, twin, options, windows = trainee(rows=32)
    own_graphs, kept = graphs_of(model), []
    for batch in (windows[0][0], windows[-1][-1]):  # of three rows and of two
        same_shape = [[batch]] * 6
        ours = steps(model, same_shape, options, own_graphs)
        theirs = steps(twin, same_shape, options, None)
        torch.testing.assert_close(ours[0], theirs[0], rtol=1e-4, atol=1e-5)
        ((shape, graph),) = own_graphs.graphs.items()
        assert graph.replay
        kept.append(shape)
        del graph  # nothing else may hold the pool
    assert kept[0] != kept[1]


def test_sizes_with_padding():
    """Few sizes, each with room for its sequences of padding, none empty or long."""
    sizes = {}
    for n_tokens in range(1, 40_000):
        size, n_sequences = padded_size(n_tokens)
        shortest, longest = (size - n_tokens) // n_sequences, -(-(size - n_tokens) // n_sequences)
        assert 1 <= shortest <= longest <= 65
        assert size < 1.15 * n_tokens + 33
        sizes.setdefault(size, n_sequences)
        assert sizes[size] == n_sequences  # a size means a shape
    assert sum(8192 < size <= 16384 for size in sizes) == 9


@pytest.mark.parametrize(
    "flags_",
    [["--moe", "soft"], ["--gradient_surgery", "pcgrad"], ["--cuda_graphs", "off"], []],
    ids=" ".join,
)
def test_which_runs_have_graphs(flags, flags_):
    """None on a CPU; none where the host takes part in the passes."""
    options = parse_options([*flags, *flags_])
    model = mc.load_all(options).model
    assert StepGraphs.of(model, options) is None
    if torch.cuda.is_available():
        assert (StepGraphs.of(model.cuda(), options) is None) == bool(flags_)


def test_a_killed_run_with_graphs_resumes_to_the_same_numbers(
    flags, tmp_path, by_offsets, monkeypatch, capsys
):
    """With dropout. A resumed process launches what the first one had already captured."""
    made = []

    def of(model, options):
        made.append(StepGraphs(model, Replays(model)))
        return made[-1]

    monkeypatch.setattr(training.StepGraphs, "of", of)
    flags = [*flags, "--hidden_dropout_prob", "0.1", "--ema", "0.9"]
    folder = tmp_path / "uninterrupted"
    assert mc.main([flag.replace(str(tmp_path), str(folder)) for flag in flags]) == 0
    expected = outcome(folder)
    for module, name, call, before in PLACES.values():
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(module, name, nth_call(call, getattr(module, name), before))
            mc.main([*flags, *OFTEN, "--resume", "auto"])
    assert mc.main([*flags, "--resume", "auto"]) == 0
    assert_same(outcome(tmp_path), expected)
    assert capsys.readouterr().out.count("resumed after") == len(PLACES)
    assert made[0].capture.replayed > 0 and made[0].capture.captured > 0


def test_sophiah_launches_the_steps_that_estimate(trainee, monkeypatch):
    model, twin, options, windows = trainee("--optimizer", "sophiah", "--hess_interval", "2")
    own_graphs, ways = graphs_of(model), []
    run, backward = StepGraphs.run, mc.add_gradients
    monkeypatch.setattr(StepGraphs, "run", lambda *a: ways.append("graph") or run(*a))
    monkeypatch.setattr(
        mc, "add_gradients", lambda *a: (a[3] and ways.append("estimate")) or backward(*a)
    )
    optimizers = [build_optimizer(each, options) for each in (model, twin)]
    for window in windows[:4]:
        ours = mc.training_step(model, window, optimizers[0], options, None, own_graphs)
        theirs = mc.training_step(twin, window, optimizers[1], options)
        torch.testing.assert_close(ours.losses, theirs.losses, rtol=1e-3, atol=1e-4)
    assert ways == [*["estimate"] * 4, *["graph"] * 2] * 2
