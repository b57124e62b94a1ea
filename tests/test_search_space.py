"""The space of a search: what Optuna proposes from a file, and files that cannot be used."""

import json

import optuna
import pytest
from conftest import ROOT
from optuna.distributions import CategoricalDistribution, FloatDistribution

from options import deciding, parse_options
from search_results import flags_for_config
from search_space import Space, search_options
from utils import UserError


@pytest.fixture
def space_file(tmp_path):
    """A function that writes a space and returns the flags that search it."""

    def write(text):
        (tmp_path / "space.toml").write_text(text)
        return ["--hpo_space", str(tmp_path / "space.toml")]

    return write


def sampler():
    return optuna.samplers.TPESampler(seed=11711)


@pytest.mark.parametrize(
    "flags, lr, weight_decay",
    [([], 8e-5, 0.05), (["--optimizer", "sophiag"], 1.2e-3, 0.001)],
)
def test_the_default_space_gives_the_trials_of_these_distributions(flags, lr, weight_decay):
    """Optuna's sampler is called with the distributions; nothing of ours is used there."""
    options = search_options(flags)
    distributions = {
        "lr": FloatDistribution(lr * 1 / 8, lr * 4, log=True),
        "weight_decay": FloatDistribution(weight_decay / 50, weight_decay * 4, log=True),
        "clip": FloatDistribution(0.05, 5, log=True),
        "hidden_dropout_prob": FloatDistribution(0, 0.3),
        "batch_size": CategoricalDistribution((16, 32, 64, 128)),
        "scheduler": CategoricalDistribution(("plateau", "cosine", "none")),
    }
    if flags:
        distributions["rho"] = FloatDistribution(0.02 / 4, 0.02 * 4, log=True)
        distributions["hess_interval"] = CategoricalDistribution((5, 10, 20, 50))
    ours, peers = [optuna.create_study(direction="maximize", sampler=sampler()) for _ in range(2)]
    space = Space(options)
    for number in range(25):  # the first 10 are random, then Optuna learns
        trial, peer = ours.ask(), peers.ask(fixed_distributions=distributions)
        assert space.draw(trial) == peer.params
        value = -abs(peer.params["lr"] - 1e-4) - peer.params["hidden_dropout_prob"] / 7
        ours.tell(trial, value), peers.tell(peer, value)


def test_flags_that_depend_on_others_follow_them(space_file):
    """Rates are multiples of the default of the trial's optimizer; values by task keep the others."""
    options = search_options(
        space_file(
            'optimizer = { choice = ["adamw", "sophiah"] }\n'
            "lr = { log = [0.5, 2], of_default = true }\n"
            'rho = { uniform = [0.01, 0.1], when = { optimizer = ["sophiah"] } }\n'
            '"rdrop.sst" = { int = [1, 4] }\n'
            'sts_encoding = { choice = ["bi", "both"] }\n'
            'both_orders = { choice = [false, true], when = { sts_encoding = ["both"] } }\n'
        )
    )
    space, study, seen = Space(options), optuna.create_study(), set()
    for _ in range(60):
        flags = space.draw(study.ask())
        trial = space.options_of(flags)
        default = parse_options(["--optimizer", trial.optimizer])
        assert default.lr / 2 <= trial.lr <= default.lr * 2 and trial.betas == default.betas
        assert ("rho" in flags) == (trial.optimizer == "sophiah") == (trial.rho is not None)
        assert trial.rdrop == {"sst": flags["rdrop.sst"], "para": 0, "sts": 0}
        assert ("both_orders" in flags) == (trial.tasks["sts"].encoding == "both")
        seen.add((trial.optimizer, trial.sts_encoding, trial.both_orders))
    assert len(seen) == 6


@pytest.mark.parametrize(
    "text, message",
    [
        ("lr = [", "Invalid value"),
        ("lr = 3", "lr: needs one of log, uniform, int, choice"),
        ("lrr = { log = [1e-5, 1e-3] }", "did you mean 'lr'?"),
        (
            'models_dir = { choice = ["a"] }',
            "models_dir: no flag that can be searched; known: batch_shares",
        ),
        ("seed = { choice = [1, 2] }", "seed: all trials must have the same value"),
        ("lr = { log = [1e-3, 1e-5] }", "low=0.001, high=1e-05"),
        ("lr = { log = [0, 1] }", "`low > 0` must hold"),
        ("lr = { log = [1, 2, 3] }", "lr: log = [1, 2, 3] cannot be"),
        ("lr = { log = [1e-5, 1e-3], whn = {} }", "no key 'whn'; did you mean 'when'?"),
        ("lr = { log = [1e-5, 1e-3], uniform = [0, 1] }", "lr: needs one of"),
        ("hidden_dropout_prob = { uniform = [0, 1.5] }", "--hidden_dropout_prob: must be"),
        ("batch_size = { uniform = [8, 64] }", "--batch_size: must be a whole number above 0"),
        ("batch_size = { choice = [] }", "batch_size: choice = [] cannot be"),
        ('optimizer = { choice = ["adamw", "sofia"] }', "invalid choice: 'sofia'"),
        ('lr = { log = [1, 2], when = { optimizer = ["sofia"] } }', "invalid choice: 'sofia'"),
        ("rdrop = { choice = [1, 2] }", 'each task; write "rdrop.sst" = { ... }, with the quotes'),
        ("rdrop.sst = { choice = [1, 2] }", 'write "rdrop.sst" = { ... }, with the quotes'),
        ('"lr.sst" = { choice = [1, 2] }', "this flag has one value for all tasks; write lr"),
        ('"rdrop.nli" = { choice = [1, 2] }', "rdrop.nli: there is no task 'nli'"),
        ("warmup = { uniform = [0, 0.2] }", "--warmup: only with --scheduler"),
        (
            'lr = { log = [1, 2], when = { scheduler = ["none"] } }\n'
            'scheduler = { choice = ["none", "cosine"] }',
            "lr: scheduler must be above it in the file",
        ),
        (
            "betas = { choice = [[0.9, 0.99], [0.9, 0.999]] }",
            'betas: a choice is a number, true, false or a text such as "0.9,0.99"',
        ),
        (
            'lr = { log = [1, 2], when = { optimizer = "sophiah" } }',
            "lr: when optimizer is in a list, as in ['sophiah']",
        ),
        (
            'scheduler = { choice = ["none", "cosine"] }\n'
            'warmup = { uniform = [0, 0.2], when = { scheduler = ["linear"] } }',
            "warmup: 100 random trials never met its `when`",
        ),
        (
            "batch_size = { choice = [16, 32] }\n"
            'lr = { log = [1e-5, 1e-4], when = { batch_size = ["16"] } }',
            "lr: 100 random trials never met its `when`",
        ),
    ],
)
def test_a_space_that_cannot_be_is_one_line(text, message, space_file):
    with pytest.raises(UserError) as error:
        search_options(space_file(text))
    text = str(error.value)
    assert message in text and text.startswith("--hpo_space ")
    assert len(text) <= 300 + len(space_file(text)[1]) and "\n" not in text


def test_multiples_of_a_default_and_conditions_by_task(space_file):
    options = search_options(
        space_file(
            "lr = { choice = [0.5, 2], of_default = true }\n"
            "batch_size = { int = [0.5, 2], of_default = true }\n"
            '"rdrop.sst" = { choice = [0, 3] }\n'
            '"loss_weights.sst" = { choice = [0.25, 0.5], when = { "rdrop.sst" = [3] } }\n'
        )
    )
    space, study, seen, default = Space(options), optuna.create_study(), set(), parse_options([])
    for _ in range(60):
        flags = space.draw(study.ask())
        trial = space.options_of(flags)
        assert default.batch_size / 2 <= trial.batch_size <= default.batch_size * 2
        assert ("loss_weights.sst" in flags) == (trial.rdrop["sst"] == 3)
        seen.add((trial.lr / default.lr, trial.rdrop["sst"], trial.loss_weights["sst"]))
    assert seen == {(lr, *rest) for lr in (0.5, 2) for rest in ((0, 1), (3, 0.25), (3, 0.5))}


def test_given_flags_are_not_searched(capsys):
    options = search_options(["--clip", "1", "--lr", "1e-4"])
    assert set(options.hpo_space) == {
        "weight_decay",
        "hidden_dropout_prob",
        "batch_size",
        "scheduler",
    }
    levers = ["--hpo_space", str(ROOT / "recipes/spaces/levers.toml")]
    options = search_options([*levers, "--loss_weights", "learned"])
    assert "rdrop.sst" in options.hpo_space and "loss_weights.sst" not in options.hpo_space
    given = ["--lr=1", "--weight_decay=0", "--clip=1", "--hidden_dropout_prob=0"]
    with pytest.raises(UserError, match="every flag that could be searched is given"):
        search_options([*given, "--batch_size=8", "--scheduler=none"])


@pytest.mark.parametrize(
    "flags",
    [
        "--sst",
        "--tasks sst,para",
        "--moe soft",
        "--optimizer sophiah --lr 8e-5",  # AdamW's default
        "--optimizer sophiag --betas 0.9,0.999 --weight_decay 0.05",
        "--optimizer sophiag --rho 0.1 --weight_decay 0.001",
        "--option pretrain --lr 8e-5",
    ],
)
def test_the_flags_of_a_winner_give_its_options(flags, tmp_path):
    options = parse_options(flags.split())
    path = tmp_path / "best_config.json"
    path.write_text(json.dumps(flags_for_config(options)))
    again = parse_options(["--config", str(path)])
    assert deciding(vars(again)) == deciding(vars(options))
