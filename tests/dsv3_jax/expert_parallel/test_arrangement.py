"""Any arrangement does everything once, after what it needs; and where all exchanges can be covered, they are."""

from __future__ import annotations

import hypothesis
import pytest
from hypothesis import strategies

from dsv3_jax.expert_parallel.arrangement import Work, arrange


@strategies.composite
def programs(draw):
    works = []
    for number in range(draw(strategies.integers(0, 25))):
        kind = draw(strategies.sampled_from(["product", "exchange", "talk"]))
        cost = draw(strategies.floats(1.0, 1e12))
        needs = draw(strategies.sets(strategies.integers(0, number - 1), max_size=4)) if number else set()
        works.append(Work(cost * (kind == "product"), cost * (kind == "exchange"), tuple(sorted(needs))))
    return tuple(works)


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(programs())
def test_all_is_done_once_and_in_order(works):
    done: list[int] = []
    for part in arrange(works):
        if part.exchange is not None:
            assert set(works[part.exchange].needs) <= set(done)
            assert all(works[other].computing for other in part.others), "two collectives at a time"
        for other in part.others:
            assert set(works[other].needs) <= set(done), "it needs the exchange beside it, or what is later"
            done.append(other)
        if part.exchange is not None:
            done.append(part.exchange)
    assert sorted(done) == list(range(len(works)))


def layers(count, first):
    """Products and exchanges that each need the one before, like a model's layers."""
    works: list[Work] = []
    for _ in range(count):
        for computing, sent in ((3.0, 0.0), (2.0, 0.0), (0.0, 1.0), (0.0, 2.0), (4.0, 0.0), (4.0, 0.0), (0.0, 2.0),
                                (0.0, 1.0)):
            needs = (first + len(works) - 1,) if works else ()
            works.append(Work(computing, sent, needs))
    return works


def uncovered(works):
    return sum(works[part.exchange].sent for part in arrange(tuple(works))
               if part.exchange is not None and not part.others) / sum(work.sent for work in works)


@pytest.mark.parametrize("count", [1, 3, 6])
def test_two_chains_cover_each_other(count):
    """But for the last exchanges of one of them."""
    one = layers(count, 0)
    assert uncovered(one) == 1.0
    assert uncovered([*one, *layers(count, len(one))]) <= 3 / (12 * count) + 1e-9


def test_more_is_computed_beside_what_sends_more():
    works = (Work(0.0, 10.0, ()), Work(0.0, 1.0, (0,)), *(Work(1.0, 0.0, ()) for _ in range(12)))
    beside = {part.exchange: len(part.others) for part in arrange(works)}
    assert beside[0] > beside[1] > 0
