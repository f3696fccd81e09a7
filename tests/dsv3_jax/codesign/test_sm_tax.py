"""Multiprocessors that communicate, by hand and by trying all."""

from __future__ import annotations

import numpy as np
import pytest

from dsv3_jax.codesign.sm_tax import (
    TABLE_4,
    Multiprocessors,
    gain,
    overlapped,
    overlapped_tuned,
    ratio_of_equal_times,
    step_without_tax,
    tuned,
    without_forwarding,
)
from dsv3_jax.config import ConfigError

H800, NONE = Multiprocessors(), Multiprocessors(communicating=0)


@pytest.mark.parametrize("ratio", [0.0, 0.3, 1.0, 132 / 112, 4.0])
def test_without_tax_nothing_is_bought(ratio):
    assert overlapped(ratio, NONE) == max(1, ratio)
    assert gain(ratio, NONE) == (1, 1)
    assert step_without_tax(TABLE_4, NONE) == pytest.approx(sum(TABLE_4))


@pytest.mark.parametrize(("ratio", "fixed", "best"), [
    (0.0, 132 / 112, 1.0), (0.5, 132 / 112, 1 + 10 / 132), (1.0, 132 / 112, 1 + 20 / 132), (132 / 112, 1.0, 1.0),
    (1.1, 132 / 112 / 1.1, (1 + 22 / 132) / 1.1), (2.0, 1.0, 1.0)])
def test_gain_by_hand(ratio, fixed, best):
    assert gain(ratio, H800) == pytest.approx((fixed, best))


@pytest.mark.parametrize("ratio", [0.05, 0.5, 1.0, 1.15, 1.3, 2.0])
def test_tuned_is_the_best_of_all_divisions(ratio):
    """Every 1/1000 SM up to 20: computing takes 132/(132 - s), an exchange 20/s of the time that 20 need."""
    s = np.arange(1, 20_001) / 1000
    times = np.maximum(132 / (132 - s), ratio * 20 / s)
    assert overlapped_tuned(ratio, H800) == pytest.approx(times.min(), rel=1e-4)
    assert tuned(ratio, H800).communicating == pytest.approx(s[times.argmin()], abs=2e-3)


def test_step_of_table_4():
    """Parts add up to the printed step within what six roundings leave; a third of the taxed work, a third of the gain.
    """
    assert sum(TABLE_4) == pytest.approx(19.926, abs=0.03)
    saved = sum(TABLE_4) - step_without_tax(TABLE_4, H800)
    assert saved == pytest.approx((1.13 + 2.06 + 1.99 + 13.95) * 20 / 132)
    assert sum(TABLE_4) - step_without_tax(TABLE_4, H800, 1 / 3) == pytest.approx(saved / 3)
    assert step_without_tax(TABLE_4, H800, 0.0) == pytest.approx(sum(TABLE_4))


def test_rdma_alone_ties_with_forwarding_where_it_says():
    ratio = ratio_of_equal_times(2.0, H800)
    assert without_forwarding(ratio, 2.0) == pytest.approx(overlapped(ratio, H800))
    assert without_forwarding(ratio * 0.9, 2.0) < overlapped(ratio * 0.9, H800)
    assert without_forwarding(ratio * 1.1, 2.0) > overlapped(ratio * 1.1, H800)


@pytest.mark.parametrize(("make", "words"), [
    (lambda: Multiprocessors(132, 132), r"communicating \(132\) must leave some of total \(132\)"),
    (lambda: Multiprocessors(communicating=-1), r"communicating \(-1\)"),
    (lambda: Multiprocessors(total=0, communicating=0), r"total \(0\)"),
    (lambda: overlapped(-0.1, H800), r"ratio \(-0.1\)"),
    (lambda: tuned(float("nan"), H800), r"ratio \(nan\)"),
    (lambda: step_without_tax(TABLE_4, H800, 1.1), r"compute_bound \(1.1\)"),
    (lambda: without_forwarding(1, 0.5), r"copies \(0.5\)"),
    (lambda: ratio_of_equal_times(0.5, H800), r"copies \(0.5\)"),
])
def test_nonsense_is_refused(make, words):
    with pytest.raises(ConfigError, match=words):
        make()
