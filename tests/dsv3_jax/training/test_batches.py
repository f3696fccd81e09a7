import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.config import ConfigError
from dsv3_jax.training.batches import Batches, permute, validation_windows


def keys(seed: int) -> list[np.uint64]:
    return list(np.random.SeedSequence(seed).generate_state(8, np.uint64))


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 5000), st.integers(0, 2**64))
def test_permute_is_a_bijection(size: int, seed: int) -> None:
    values = np.arange(size, dtype=np.uint64)
    visited = permute(values, size, keys(seed))
    np.testing.assert_array_equal(np.sort(visited), values)
    # Each value stands alone: a part of the range gives the same as the whole.
    np.testing.assert_array_equal(permute(values[size // 3:], size, keys(seed)), visited[size // 3:])


@pytest.mark.parametrize("size", [2**32, 3_613_281_250, 2**40 + 1])
def test_permute_of_a_range_too_large_to_store(size: int) -> None:
    values = np.arange(size - 20_000, size, dtype=np.uint64)
    visited = permute(values, size, keys(1))
    assert visited.max() < size
    assert len(np.unique(visited)) == len(values)
    # Neighbours land anywhere: the mean of 20,000 uniform values has a standard deviation of 0.2% of the range.
    assert abs(visited.mean() / size - 0.5) < 0.01


def test_permute_shuffles() -> None:
    """Every place is as likely for every value: chi-squared over 400 seeds of 8 values."""
    counts = np.zeros((8, 8))
    for seed in range(400):
        counts[np.arange(8), permute(np.arange(8, dtype=np.uint64), 8, keys(seed)).astype(int)] += 1
    # 49 degrees of freedom: mean 49, standard deviation 9.9.
    assert ((counts - 50) ** 2 / 50).sum() < 49 + 4 * 9.9


@settings(max_examples=100, deadline=None)
@given(total=st.integers(2, 400), length=st.integers(1, 50), lookahead=st.integers(1, 4), seed=st.integers(0, 2**32),
       epoch=st.integers(0, 2**40))
def test_an_epoch_visits_each_window_once(total: int, length: int, lookahead: int, seed: int, epoch: int) -> None:
    if total < length + lookahead:
        with pytest.raises(ConfigError, match=rf"batch\.sequence_length \({length}\) .* {total} training tokens"):
            Batches(np.arange(total), length, lookahead, seed)
        return
    batches = Batches(np.arange(total, dtype=np.uint16), length, lookahead, seed)
    rows = batches.rows(epoch * batches.windows, (epoch + 1) * batches.windows)
    assert rows.dtype == np.int32
    assert rows.shape == (batches.windows, length + lookahead)
    np.testing.assert_array_equal(rows, rows[:, :1] + np.arange(length + lookahead))
    begins = np.sort(rows[:, 0])
    np.testing.assert_array_equal(np.diff(begins), length)
    assert 0 <= begins[0] < length
    assert begins[-1] + length + lookahead <= total
    # Less than two windows of text stay unread in an epoch.
    assert begins[0] + total - (begins[-1] + length + lookahead) < 2 * length


def test_rows_are_samples_whatever_the_cut() -> None:
    batches = Batches(np.arange(1000), 16, 2, seed=5)
    start = 2**40 + 11
    whole = batches.rows(start, start + 200)  # crosses epochs
    np.testing.assert_array_equal(whole, np.stack([batches.sample(start + row) for row in range(200)]))
    np.testing.assert_array_equal(whole[37:120], batches.rows(start + 37, start + 120))
    assert batches.rows(3, 3).shape == (0, 18)
    np.testing.assert_array_equal(whole, Batches(np.arange(1000), 16, 2, seed=5).rows(start, start + 200))


def test_epochs_and_seeds_differ() -> None:
    batches = Batches(np.arange(100_000), 64, 2, seed=5)
    first, second = (batches.rows(epoch * batches.windows, (epoch + 1) * batches.windows) for epoch in range(2))
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, Batches(np.arange(100_000), 64, 2, seed=6).rows(0, batches.windows))
    offsets = {int(batches.sample(epoch * batches.windows)[0]) % 64 for epoch in range(400)}
    assert len(offsets) > 55  # 63.9 of 64 expected


@pytest.mark.parametrize(("start", "stop"), [(-1, 3), (5, 4)])
def test_rows_out_of_order(start: int, stop: int) -> None:
    with pytest.raises(ValueError, match="counted from 0"):
        Batches(np.arange(100), 4, 1, 0).rows(start, stop)


def test_negative_seed() -> None:
    with pytest.raises(ConfigError, match=r"seed \(-1\)"):
        Batches(np.arange(100), 4, 1, -1)


@settings(max_examples=200, deadline=None)
@given(total=st.integers(2, 300), length=st.integers(1, 40), lookahead=st.integers(1, 4))
def test_validation_predicts_each_token_once(total: int, length: int, lookahead: int) -> None:
    tokens = np.arange(1, total + 1, dtype=np.uint32)
    windows, weights = validation_windows(tokens, length, lookahead)
    count = -(-(total - 1) // length)
    assert windows.shape == (count, length + lookahead)
    assert windows.dtype == np.int32
    assert weights.shape == (count, length)
    assert weights.dtype == np.float32
    targets = windows[:, 1:length + 1]
    assert targets[weights == 1].tolist() == list(range(2, total + 1))
    assert set(np.unique(weights)) <= {0.0, 1.0}
    assert not targets[weights == 0].any()
    # The deeper targets follow on, and are padding past the end.
    for row, window in enumerate(windows):
        expected = np.arange(row * length, row * length + length + lookahead) + 1
        np.testing.assert_array_equal(window, np.where(expected <= total, expected, 0))


@pytest.mark.parametrize("total", [0, 1])
def test_nothing_to_validate(total: int) -> None:
    with pytest.raises(ConfigError, match=rf"the held-out text has {total} tokens"):
        validation_windows(np.zeros(total, np.uint16), 8, 2)
