"""The space of a search: what Optuna proposes from a file, and files that cannot be used."""

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution

from search_space import Space, search_options


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
