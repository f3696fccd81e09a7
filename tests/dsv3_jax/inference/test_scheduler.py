"""Who gets a row and pages, who gives way, and that all get their turn."""

from __future__ import annotations

import numpy as np
import pytest

from dsv3_jax.config import ConfigError
from dsv3_jax.inference.pace import LONGEST_PAUSE, Pace, Targets
from dsv3_jax.inference.request import Request, Ticket
from dsv3_jax.inference.scheduler import Busy, Scheduler, Sizes

SIZES = Sizes(rows=2, pages=6, page_size=4, context=24)


def ticket(prompt=5, new=4, user="", first=0):
    return Ticket(Request(np.arange(first, first + prompt, dtype=np.int32), new, user=user))


def read_all(scheduler):
    for row in scheduler.rows:
        if row.reading:
            scheduler.did_read(row, row.to_read - row.read)
            row.tokens.append(1000 + row.arrival)


def decode(scheduler):
    rows = scheduler.decodes()
    for row in rows:
        scheduler.did_decode(row, 1)
        row.tokens.append(row.tokens[-1] + 1)
        row.ticket.tokens.append(row.tokens[-1])
    return rows


def test_users_have_turns():
    scheduler = Scheduler(SIZES)
    order = [("a", 1), ("a", 2), ("a", 3), ("b", 1), ("c", 1), ("b", 2)]
    tickets = {key: ticket(user=key[0]) for key in order}
    for key in order:
        scheduler.submit(tickets[key])
    came = []
    while scheduler.waiting:
        came += [next(key for key, t in tickets.items() if t is row.ticket) for row in scheduler.admit()]
        for row in scheduler.rows:
            scheduler.leave(row)
    assert came == [("a", 1), ("b", 1), ("c", 1), ("a", 2), ("b", 2), ("a", 3)]


def test_the_last_that_came_gives_way_and_returns_with_what_it_wrote():
    """Two rows of 2 pages each and 2 free: at 8 tokens both need a third, at 12 a fourth, which only one can have."""
    scheduler = Scheduler(SIZES)
    one, other = ticket(7, 17), ticket(7, 17, first=50)
    for each in (one, other):
        scheduler.submit(each)
    assert len(scheduler.admit()) == 2
    read_all(scheduler)
    while scheduler.preemptions == 0:
        assert scheduler.rows
        decode(scheduler)
    assert [row.ticket for row in scheduler.rows] == [one]
    assert scheduler.waiting == 1
    written = len(other.tokens)
    assert written == 5
    assert not scheduler.admit(), "its pages are gone"
    while scheduler.rows[0].read < 23:
        decode(scheduler)
    scheduler.leave(scheduler.rows[0])
    (row,) = scheduler.admit()
    assert row.tokens == [*range(50, 57), *other.tokens]
    assert row.read == row.first == 0, "its pages were taken by the other"


def test_a_common_beginning_is_read_once():
    """But for its last token, from which the next is drawn; for a module one more each."""
    for ahead, reused in ((0, (8, 8)), (1, (8, 8)), (3, (4, 8))):
        scheduler = Scheduler(Sizes(rows=4, pages=40, page_size=4, context=40), ahead=ahead)
        for prompt, found in zip((20, 11, 12), (0, *reused), strict=True):
            scheduler.submit(ticket(prompt))
            (row,) = scheduler.admit()
            assert row.first == found, (ahead, prompt)
            read_all(scheduler)
            assert len(row.pages) == -(-(prompt + 1 + ahead) // 4)
        held = [set(row.pages) for row in scheduler.rows]
        assert held[1] & held[2] == held[1] & held[0]
        for row in scheduler.rows:
            scheduler.leave(row)
        assert scheduler.pools[0].available == 40
    off = Scheduler(Sizes(rows=4, pages=40, page_size=4, context=40, reuse=False))
    for _ in range(2):
        off.submit(ticket(20))
        (row,) = off.admit()
        assert row.first == 0
        read_all(off)


def test_a_request_goes_where_its_beginning_lies():
    """And else where most is free."""
    scheduler = Scheduler(Sizes(rows=4, pages=40, page_size=4, context=40), devices=3)
    devices = []
    for first in (0, 100, 200, 100, 0):
        scheduler.submit(ticket(13, first=first))
        (row,) = scheduler.admit()
        devices.append(row.device)
        read_all(scheduler)
    assert devices[3:] == [devices[1], devices[0]]
    assert len(set(devices[:3])) == 3
    assert not any(scheduler.reads())


def test_what_is_too_much_is_refused_with_the_remedy():
    scheduler = Scheduler(Sizes(rows=1, pages=6, page_size=4, context=24, waiting=1), ahead=1)
    with pytest.raises(ConfigError, match=r"max_new_tokens \(20\) are more than the 23 .*ask for 18 at most"):
        scheduler.submit(ticket(5, 20))
    scheduler.submit(ticket(5, 18))
    with pytest.raises(Busy, match="1 requests are waiting"):
        scheduler.submit(ticket())
    with pytest.raises(ConfigError, match=r"engine.pages\*engine.page_size \(5\*4=20 tokens\).*engine.context \(24\)"):
        Sizes(rows=1, pages=5, page_size=4, context=24)
    with pytest.raises(ConfigError, match=r"engine.rows \(0\)"):
        Sizes(rows=0, pages=5)


def test_prompts_are_read_in_the_time_that_steps_leave():
    """Steps of 10 ms, a target of 15 and chunks of just under 20: one in four steps. Without rows nothing waits."""
    pace = Pace(Targets(seconds_per_token=0.015))
    pace.did_read(0.0199, 100)
    read = []
    for _ in range(40):
        read.append(pace.may_read(decoding=3))
        if read[-1]:
            pace.did_read(0.0199, 100)
        pace.did_step(0.01)
    assert sum(read[-20:]) == 5
    assert pace.may_read(decoding=0)
    assert Pace().may_read(decoding=3)


def test_no_prompt_starves_where_steps_alone_take_too_long():
    pace = Pace(Targets(seconds_per_token=0.005))
    pace.did_read(0.02, 100)
    read = 0
    for _ in range(10 * LONGEST_PAUSE):
        if pace.may_read(decoding=3):
            pace.did_read(0.02, 100)
            read += 1
        pace.did_step(0.01)
    assert read == 9


def test_a_request_that_would_wait_too_long_is_known_at_once():
    """0.2 ms a token; if steps of 10 ms have to come every 15 ms, a third of the time is left for it."""
    for target, wait_s in ((None, 0.18), (0.015, 0.54)):
        pace = Pace(Targets(seconds_per_token=target, seconds_to_first_token=1.1 * wait_s))
        assert not pace.is_late(10 ** 9), "nothing is measured"
        for _ in range(4):
            pace.did_read(0.02, 100)
            pace.did_step(0.01)
        assert pace.wait_s(900) == pytest.approx(wait_s)
        assert not pace.is_late(900)
        assert pace.is_late(1000)
