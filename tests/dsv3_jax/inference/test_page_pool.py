"""Pages: never given twice, found by exactly what was read, the longest unused lost first."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from dsv3_jax.inference.page_pool import PagePool, page_names


def test_names_tell_all_tokens_before_the_end_and_those_that_follow():
    tokens = list(range(10))
    whole = list(page_names(tokens, 4, 1, most=9))
    assert len(whole) == 2  # the third page is not full
    assert len(list(page_names(tokens[:8], 4, 1, most=9))) == 1  # nothing follows the second
    assert len(list(page_names(tokens, 4, 1, most=1))) == 1
    for place in range(9):
        other = list(page_names([*tokens[:place], 99, *tokens[place + 1:]], 4, 1, most=9))
        assert [a == b for a, b in zip(whole, other, strict=True)] == [place > 4, False], place


def test_pages_are_found_held_kept_and_lost_in_order():
    pool, names = PagePool(3), [b"a", b"b", b"c"]
    pages = pool.take(2)
    assert pool.take(2) is None
    assert pool.available == 1
    for page, name in zip(pages, names, strict=False):
        pool.give_name(page, name)
    assert pool.find(names) == pages, "while somebody holds them"
    assert pool.find(names[1:2]) == pages[1:]
    pool.release(pages)
    pool.release(pages[1:])
    assert pool.available == 1, "both are held once yet"
    pool.release(pages)
    assert (pool.available, pool.kept) == (3, 2)
    assert pool.take(2)[1] == pages[1], "of kept pages the last of a row goes first"
    assert pool.find(names) == pages[:1]
    assert pool.count_found(names[1:]) == 0


def test_a_page_is_not_released_twice():
    pool = PagePool(2)
    pages = pool.take(1)
    pool.release(pages)
    with pytest.raises(AssertionError, match="more often"):
        pool.release(pages)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 12), st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5)), max_size=60))
def test_nothing_is_lost_or_held_by_two_who_did_not_share_it(size, actions):
    """Against a model that knows who holds what."""
    pool, held, contents, fresh = PagePool(size), [], {}, iter(range(10 ** 6))
    for action, number in actions:
        if action == 0:
            taken = pool.take(number)
            in_use = {page for pages in held for page in pages}
            assert (taken is None) == (number > size - len(in_use))
            if taken:
                assert in_use.isdisjoint(taken)
                assert len(set(taken)) == len(taken)
                held.append(taken)
                contents.update((page, next(fresh)) for page in taken)
        elif action == 1 and held:
            pages = held[number % len(held)]
            for page in pages:
                pool.give_name(page, b"%d" % contents[page])
        elif action == 2 and contents:
            page = sorted(contents)[number % len(contents)]
            found = pool.find([b"%d" % contents[page]])
            assert found in ([], [page]), "what it holds is what was asked for"
            if found:
                held.append(found)
        elif action == 3 and held:
            pool.release(held.pop(number % len(held)))
        assert pool.available == size - len({page for pages in held for page in pages})
