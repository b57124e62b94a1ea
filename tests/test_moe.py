import numpy as np
import pytest
import torch
from checkpoints import load_pretrained
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_resume import OFTEN, Killed, assert_same, nth_call, outcome

import multitask_classifier as mc
from batches import EpochSampler, training_windows
from bert import BertModel, set_dropout
from moe import GATINGS, N_EXPERTS, MixtureOfExperts
from optimizer import build_optimizer, freeze_and_unfreeze
from options import changed_options, parse_options
from tasks import TASKS


@pytest.fixture
def bert(tiny_config):
    return BertModel(tiny_config).eval()


@pytest.fixture
def mixture(tiny_config):
    """Of experts that differ."""

    def make(gating):
        torch.manual_seed(7)
        mixture = MixtureOfExperts(BertModel(tiny_config), gating).eval()
        for expert in mixture.experts:
            expert.init_weights()
        return mixture

    return make


def force(mixture, number):
    """Make the gate give one expert all the weight."""
    with torch.no_grad():
        mixture.route.weight.zero_()
        mixture.route.bias.fill_(-1e4)
        mixture.route.bias[number] = 1e4


def spread(mixture, batch):
    """Make the gate choose different experts for the rows of this batch."""
    with torch.no_grad():
        pooled = mixture.gate(*batch)["pooler_output"]
        mixture.route.weight.normal_(std=1000)
        mixture.route.bias.copy_(-mixture.route.weight @ pooled.mean(0))
    mixture(*batch)
    assert len(mixture.weights.argmax(-1).unique()) > 1


@pytest.mark.parametrize("gating", GATINGS)
def test_identical_experts_are_one_encoder(bert, gating, padded_batch):
    mixture = MixtureOfExperts(bert, gating).eval()
    expected, found = bert(*padded_batch), mixture(*padded_batch)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-5)
    assert mixture.weights.max() < 0.999  # it is not one expert that has all the weight


@pytest.mark.parametrize("gating", GATINGS)
@pytest.mark.parametrize("number", range(N_EXPERTS))
def test_a_gate_forced_to_one_expert_is_that_expert(mixture, gating, number, padded_batch):
    mixture = mixture(gating)
    force(mixture, number)
    expected, found = mixture.experts[number](*padded_batch), mixture(*padded_batch)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-5)
    other = mixture.experts[number - 1](*padded_batch)
    assert not torch.allclose(found["pooler_output"], other["pooler_output"], atol=1e-2)


def test_the_dropout_of_a_mixture_is_that_of_its_parts(mixture):
    """A checkpoint stores the mixture's config."""
    mixture = mixture("soft")
    set_dropout(mixture, 0.45)
    assert mixture.config.hidden_dropout_prob == 0.45


def test_soft_gating_is_the_weighted_sum(mixture, padded_batch):
    mixture = mixture("soft")
    found = mixture(*padded_batch)["last_hidden_state"]
    pooled = mixture.gate(*padded_batch)["pooler_output"]
    weights = torch.softmax(mixture.route(pooled), dim=-1)
    states = [expert(*padded_batch)["last_hidden_state"] for expert in mixture.experts]
    expected = sum(weights[:, n, None, None] * states[n] for n in range(N_EXPERTS))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_hard_gating_is_the_expert_with_the_largest_weight(mixture, padded_batch):
    """Each sentence that of its own."""
    mixture = mixture("hard")
    spread(mixture, padded_batch)
    found = mixture(*padded_batch)["last_hidden_state"]
    choice = mixture.route(mixture.gate(*padded_batch)["pooler_output"]).argmax(-1)
    states = [expert(*padded_batch)["last_hidden_state"] for expert in mixture.experts]
    for row, number in enumerate(choice):
        torch.testing.assert_close(found[row], states[number][row], rtol=1e-5, atol=1e-5)


def test_hard_gating_computes_the_chosen_expert_only(mixture, padded_batch):
    mixture = mixture("hard")
    spread(mixture, padded_batch)
    seen = [0] * N_EXPERTS

    def note(number):
        def hook(_, inputs):
            seen[number] += len(inputs[0].input_ids)

        return hook

    for number, expert in enumerate(mixture.experts):
        expert.embeddings.register_forward_pre_hook(note(number))
    mixture(*padded_batch)
    assert sum(seen) == int(padded_batch[1].sum())


def test_hard_gating_trains_gate_and_chosen_experts(mixture, padded_batch):
    """The gate's gradient is that of p(chosen) / p(chosen, held fixed) times the chosen output."""
    mixture = mixture("hard").double()
    force(mixture, 1)
    with torch.no_grad():
        mixture.route.bias.copy_(torch.tensor([0.0, 1.0, -0.5]))
        mixture.route.weight.normal_(std=0.01)
    probe = torch.randn(mixture.config.hidden_size, dtype=torch.double)
    (mixture(*padded_batch)["last_hidden_state"] @ probe).sum().backward()
    assert mixture.weights.argmax(-1).unique().tolist() == [1]
    trained = [any(p.grad is not None for p in expert.parameters()) for expert in mixture.experts]
    assert trained == [False, True, False]  # an expert without a row is left as it is

    pooled = mixture.gate(*padded_batch)["pooler_output"].detach()
    outputs = (
        (mixture.experts[1](*padded_batch)["last_hidden_state"] @ probe).sum(1).detach()
    )  # [B]
    p = torch.softmax(mixture.route(pooled), dim=-1)[:, 1].detach()
    logits_gradient = -torch.softmax(mixture.route(pooled), dim=-1).detach()
    logits_gradient[:, 1] += 1  # d log p(1) / d logits
    expected = (outputs[:, None] * logits_gradient).sum(0)
    assert ((0 < p) & (p < 1)).all()
    torch.testing.assert_close(mixture.route.bias.grad, expected, rtol=1e-6, atol=1e-9)
    assert any(p.grad.any() for p in mixture.gate.encoder.parameters())


def test_the_balance_is_the_published_formula(mixture, padded_batch):
    mixture = mixture("soft")
    spread(mixture, padded_batch)
    weights = mixture.weights.detach().double().numpy()
    shares = np.bincount(weights.argmax(1), minlength=N_EXPERTS) / len(weights)
    assert mixture.balance_loss().item() == pytest.approx(
        N_EXPERTS * (shares * weights.mean(0)).sum(), rel=1e-5
    )
    force(mixture, 2)
    mixture(*padded_batch)
    assert mixture.balance_loss().item() == pytest.approx(N_EXPERTS)


def test_padding_and_order_do_not_matter(mixture, padded_batch):
    mixture = mixture("hard")
    spread(mixture, padded_batch)
    ids, mask = padded_batch
    whole = mixture(ids, mask)["pooler_output"]
    for row in range(len(ids)):
        alone = mixture(
            ids[row : row + 1, : int(mask[row].sum())], mask[row : row + 1, mask[row] > 0]
        )
        torch.testing.assert_close(alone["pooler_output"][0], whole[row], rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------------- whole runs with it

SETTINGS = {
    "soft": ["--moe", "soft"],
    "hard, unfreezing, sophiag": [
        *("--moe", "hard", "--unfreeze_interval", "1"),
        *("--optimizer", "sophiag", "--hess_interval", "2"),
    ],
    "hard, sophiah": ["--moe", "hard", "--optimizer", "sophiah", "--hess_interval", "3"],
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_run_with_experts_trains_resumes_and_predicts(flags, tmp_path, name, monkeypatch):
    flags += SETTINGS[name]
    elsewhere = [flag.replace(str(tmp_path), str(tmp_path / "whole")) for flag in flags]
    assert mc.main(elsewhere) == 0
    expected = outcome(tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(mc, "training_step", nth_call(6, mc.training_step, True))
        mc.main(flags + OFTEN)
    assert mc.main(flags + ["--resume", "auto"]) == 0
    assert_same(outcome(tmp_path), expected)
    (checkpoint,) = (tmp_path / "models_dir").glob("*.pt")
    assert mc.main(flags[: -len(SETTINGS[name])] + ["--evaluate", str(checkpoint)]) == 0
    assert outcome(tmp_path)[1] == expected[1]


def spread_softly(mixture, batch):
    """Make the gate choose different experts for the sentences of this batch, none with certainty."""
    tokens = batch.tokens()
    with torch.no_grad():
        states = mixture.gate.encode(tokens)
        pooled = mixture.gate.pooler(states[tokens.sequences.offsets[:-1]])
        mixture.route.weight.normal_(generator=torch.Generator().manual_seed(3)).div_(pooled.std(0))
        mixture.route.bias.copy_(-mixture.route.weight @ pooled.mean(0))


class Recorder(torch.optim.SGD):
    """Takes no step, but keeps the gradients that it was to take it with."""

    def step(self):
        params = [p for group in self.param_groups for p in group["params"]]
        self.seen = {p: p.grad.clone() for p in params if p.grad is not None}


@pytest.mark.parametrize("gating", GATINGS)
@pytest.mark.parametrize("batch_size, n_batches", [(10, 1), (4, 3)])
def test_the_balance_of_a_step_is_in_its_loss_and_its_gradients(
    flags, gating, batch_size, n_batches
):
    """Against the formula: what --moe_balance adds to the gradients is that of each batch, by its share
    of the sentences (of 10 rows: 4, 4, 2)."""
    by_balance = {}
    for weight in (0.0, 0.7):
        options = parse_options(
            [*flags, "--moe", gating, "--moe_balance", str(weight), "--clip", "0"]
        )
        parts = mc.load_all(options)
        model = parts.model.double().eval()
        samplers = {name: EpochSampler(64, 1) for name in TASKS}
        steps = training_windows(parts.data["train"], samplers, 10, batch_size, n_batches)
        (window,) = steps
        assert len(window) == n_batches
        spread_softly(model.bert, window[0])
        optimizer = Recorder(model.parameters(), lr=0.0)
        losses = mc.training_step(model, window, optimizer, options).losses
        by_balance[weight] = [
            optimizer.seen.get(p, torch.zeros_like(p)) for p in model.parameters()
        ]
        by_task = sum(float(losses[name]) for name in TASKS)
    expected = 0.0
    for batch in window:
        model.bert.encode(batch.tokens())
        chosen = model.bert.weights.detach().numpy().argmax(1)
        shares = torch.from_numpy(np.bincount(chosen, minlength=N_EXPERTS) / len(chosen))
        assert len(np.unique(chosen)) > 1
        share_of_step = len(batch.lengths) / sum(len(batch.lengths) for batch in window)
        mean_weights = model.bert.weights.mean(0)
        expected = expected + share_of_step * N_EXPERTS * (shares * mean_weights).sum()
    balance = expected.item()
    assert float(losses["balance"]) == pytest.approx(balance, rel=1e-5)
    assert float(losses["sum"]) == pytest.approx(by_task + 0.7 * balance, rel=1e-5)
    model.zero_grad()
    (0.7 * expected).backward()
    assert model.bert.route.weight.grad.abs().max() > 1e-3
    for p, without, with_balance in zip(model.parameters(), *by_balance.values(), strict=True):
        added = torch.zeros_like(p) if p.grad is None else p.grad
        torch.testing.assert_close(with_balance - without, added, rtol=1e-4, atol=1e-6)


def test_tensorboard_shows_how_sentences_spread(flags, tmp_path):
    assert mc.main(flags + ["--moe", "hard", "--moe_balance", "0.5"]) == 0
    (directory,) = (tmp_path / "logdir").iterdir()
    log = EventAccumulator(str(directory)).Reload()
    for task in TASKS:
        shares = [
            [event.value for event in log.Scalars(f"moe/{task}_expert_{number}")]
            for number in range(1, N_EXPERTS + 1)
        ]
        assert np.sum(shares, axis=0) == pytest.approx(np.ones(8))  # of eight steps
    parts = [log.Scalars(f"loss/{name}") for name in (*TASKS, "balance", "sum")]
    for *losses, balance, whole in zip(*parts):
        assert whole.value == pytest.approx(sum(x.value for x in losses) + 0.5 * balance.value)
        assert 1 <= balance.value <= N_EXPERTS + 1e-5


def test_the_experts_begin_as_the_pretrained_encoder(tiny_directory):
    options = parse_options(["--bert_model", str(tiny_directory), "--moe", "soft"])
    model = load_pretrained(options)[0]
    expected = BertModel.from_pretrained(str(tiny_directory)).state_dict()
    assert len(model.bert.stacks) == N_EXPERTS + 1
    for stack in model.bert.stacks:
        found = stack.state_dict()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    pointers = {id(p) for p in model.parameters()}
    assert len(pointers) == len(list(model.parameters()))


def test_what_trains_of_a_mixture(tiny_directory):
    options = parse_options(["--bert_model", str(tiny_directory), "--moe", "hard"])
    model = load_pretrained(options)[0]
    freeze_and_unfreeze(model, changed_options(options, unfreeze_interval=1), epoch=0)
    names = {name.split(".")[1] for name, p in model.named_parameters() if p.requires_grad}
    bert = {n for n, p in model.named_parameters() if p.requires_grad and n.startswith("bert.")}
    assert (
        bert
        == {
            f"bert.{name}"
            for name in (
                "route.weight",
                "route.bias",
                "gate.pooler.dense.weight",
                "gate.pooler.dense.bias",
            )
        }
        and "route" in names
    )
    freeze_and_unfreeze(model, options, epoch=0)
    build_optimizer(model, options)  # checks that its groups hold all that trains
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {
        f"bert.experts.{number}.pooler.dense.{kind}"
        for number in range(N_EXPERTS)
        for kind in ("weight", "bias")
    }


def test_experts_with_tags(flags, pipeline_directory, tmp_path):
    """Each has tables of its own, which learn; the checkpoint gives the same predictions again."""
    tags = ["--spacy_model", str(pipeline_directory)]
    assert mc.main(flags + ["--moe", "soft", "--additional_input", *tags]) == 0
    expected = outcome(tmp_path)
    (checkpoint,) = (tmp_path / "models_dir").glob("*.pt")
    model = mc.load_checkpoint(checkpoint)[0]
    tables = [table for stack in model.bert.stacks for table in stack.new_parameters]
    assert len(tables) == 2 * (N_EXPERTS + 1) and all(table.any() for table in tables)
    assert mc.main(flags + ["--evaluate", str(checkpoint), *tags]) == 0
    assert outcome(tmp_path)[1] == expected[1]
