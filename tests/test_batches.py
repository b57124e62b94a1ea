"""How many rows of each task an epoch draws, and which: the sampler's state and --sampling."""

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from batches import EpochSampler, row_multiples
from options import changed_options, parse_options
from tasks import read_task_file

DRAWS = st.lists(st.integers(0, 9), max_size=8)


@given(st.integers(1, 12), st.booleans(), DRAWS, DRAWS, DRAWS)
def test_a_sampler_continues_exactly_in_the_middle_of_a_pass(n_rows, both, before, lost, after):
    """Also after draws that a killed process has made since its state was saved."""
    sampler = EpochSampler(n_rows, seed=5, both_orders=both)
    for samples in before:
        sampler.draw(samples)
    state = pickle.loads(pickle.dumps(sampler.state_dict()))
    expected = [sampler.draw(samples).tolist() for samples in after]
    later = EpochSampler(n_rows, seed=6, both_orders=both)
    for samples in lost:
        later.draw(samples)
    for _ in range(2):
        later.load_state_dict(state)
        assert [later.draw(samples).tolist() for samples in after] == expected


@given(st.integers(1, 40), st.booleans(), st.lists(st.integers(1, 50), min_size=1, max_size=8))
def test_each_row_comes_once_before_any_comes_again(n_rows, both, draws):
    """Whatever the sizes of the draws; with both orders also: no pair comes in one order and soon after
    in the other."""
    sampler = EpochSampler(n_rows, seed=5, both_orders=both)
    drawn = np.concatenate([sampler.draw(samples) for samples in draws])
    assert len(drawn) == sum(draws) and drawn.min() >= 0
    assert drawn.max() < (2 * n_rows if both else n_rows)
    for start in range(0, len(drawn), n_rows):
        pairs = drawn[start : start + n_rows] % n_rows
        assert len(set(pairs)) == len(pairs)


def test_the_order_of_a_pair_is_drawn_anew_for_each_pass():
    """Five standard deviations around a half: which pairs are swapped, and which of them again."""
    sampler = EpochSampler(10_000, seed=5, both_orders=True)
    swapped = []
    for _ in range(2):
        drawn = sampler.draw(10_000)
        swapped.append(np.isin(np.arange(10_000), drawn[drawn >= 10_000] - 10_000))
    for share in (swapped[0].mean(), swapped[1].mean(), (swapped[0] == swapped[1]).mean()):
        assert abs(share - 0.5) < 5 * 0.5 / 100


def test_the_state_of_a_sampler_is_small_whatever_the_number_of_rows(tmp_path):
    sizes = []
    for n_rows in (3, 1_000_000):
        sampler = EpochSampler(n_rows, seed=5)
        sampler.draw(2)
        torch.save(sampler.state_dict(), tmp_path / "state")
        sizes.append((tmp_path / "state").stat().st_size)
        state = torch.load(tmp_path / "state", weights_only=True)
        again = EpochSampler(n_rows, seed=0)
        again.load_state_dict(state)
        assert np.array_equal(again.draw(n_rows), sampler.draw(n_rows))
    assert max(sizes) < 3000 and abs(sizes[0] - sizes[1]) < 100


@pytest.mark.parametrize(
    "n_rows, flags, epoch, expected",
    [
        ((400, 10000, 100), "", 0, (1, 1, 1)),
        ((400, 10000, 100), "--sampling equal", 3, (1, 1, 1)),
        ((400, 10000, 100), "--sampling proportional", 0, (4 / 35, 20 / 7, 1 / 35)),
        ((400, 10000, 100), "--sampling proportional", 9, (4 / 35, 20 / 7, 1 / 35)),
        ((400, 10000, 100), "--sampling sqrt", 0, (6 / 13, 30 / 13, 3 / 13)),
        # Stickland and Murray 2019: the power is 1, 0.6, 0.2 in three epochs.
        ((32, 1024, 1), "--sampling annealed --epochs 3", 0, (96 / 1057, 3072 / 1057, 3 / 1057)),
        ((32, 1024, 1), "--sampling annealed --epochs 3", 1, (24 / 73, 192 / 73, 3 / 73)),
        ((32, 1024, 1), "--sampling annealed --epochs 3", 2, (6 / 7, 12 / 7, 3 / 7)),
        ((32, 1024, 1), "--sampling annealed --epochs 1", 0, (96 / 1057, 3072 / 1057, 3 / 1057)),
        (
            (400, 10000, 100),
            "--sampling sqrt --batch_shares 2,1,0.5",
            0,
            (12 / 13, 30 / 13, 3 / 26),
        ),
    ],
)
def test_rows_of_each_task_follow_from_sampling(n_rows, flags, epoch, expected):
    options = parse_options(flags.split())
    found = row_multiples(dict(zip(options.tasks, n_rows, strict=True)), options, epoch)
    assert found == pytest.approx(dict(zip(options.tasks, expected, strict=True)))


@pytest.mark.parametrize("sampling", ["equal", "proportional", "sqrt", "annealed"])
def test_tasks_with_samples_of_their_own_leave_the_others_as_they_are(tmp_path, sampling):
    """`samples` in the file of tasks: rows in an epoch; the other two share theirs."""
    rows = 'train = "t"\ndev = "t"\nsentences = "s"\nlabel = "l"\nrange = [0, 1]\n'
    path = tmp_path / "tasks.toml"
    path.write_text(f"[one]\n{rows}[two]\n{rows}[fixed]\n{rows}samples = 30\n")
    flags = ["--task_file", str(path), "--sampling", sampling, "--samples_per_epoch", "120"]
    options = parse_options(flags)
    assert options.tasks == read_task_file(str(path))
    n_rows = {"one": 100, "two": 900, "fixed": 7}
    found = row_multiples(n_rows, options, 0)
    expected = {"equal": (1, 1), "sqrt": (0.5, 1.5)}.get(sampling, (0.2, 1.8))
    assert found == pytest.approx(dict(zip(n_rows, (*expected, 0.25), strict=True)))
    halved = changed_options(options, batch_shares={"one": 1, "two": 1, "fixed": 0.5})
    assert row_multiples(n_rows, halved, 0) == pytest.approx(found | {"fixed": 0.125})
