"""Pages as integers: in runs, shared, and given up in the order of their last use."""

import pytest

from astrai_serve.engine.page_pool import PagePool


@pytest.fixture
def evicted():
    return []


@pytest.fixture
def pool(evicted):
    return PagePool(8, on_evict=evicted.append)


def release(pool, *pages, cached=False):
    for page in pages:
        pool.release(page, cached)
    pool.check_invariants()


def test_pages_come_in_a_run(pool):
    assert pool.allocate(3) == [0, 1, 2]
    assert pool.num_free == pool.num_empty == 5


def test_the_neighbour_of_the_last_page_comes_first(pool):
    first = pool.allocate(2)
    release(pool, *pool.allocate(1))
    assert pool.allocate(2, after=first[-1]) == [2, 3]


def test_a_new_task_leaves_the_one_before_it_room_to_grow(pool):
    assert pool.allocate(2) == [0, 1]
    assert pool.allocate(2) == [4, 5]
    assert pool.allocate(1, after=1) == [2]


def test_the_longest_run_is_broken_only_if_it_must_be(pool):
    pages = pool.allocate(8)
    release(pool, pages[1], pages[4], pages[5])
    assert pool.allocate(2) == [4, 5]
    release(pool, 4, 5)
    assert sorted(pool.allocate(3)) == [1, 4, 5]
    assert pool.num_free == 0


def test_the_least_recently_used_page_is_given_up_first(pool, evicted):
    pool.allocate(8)
    release(pool, 5, 2, 7, cached=True)
    assert pool.cached_pages() == [5, 2, 7]
    pool.share(5)  # used again,
    release(pool, 5, cached=True)  # and so the newest
    pool.allocate(1)
    assert evicted == [2]
    pool.allocate(2)
    assert evicted == [2, 7, 5]


def test_empty_pages_are_taken_before_cached_ones(pool, evicted):
    pool.allocate(8)
    release(pool, 3, cached=True)
    release(pool, 6)
    assert pool.allocate(1) == [6]
    assert evicted == []


def test_older_pages_go_if_that_joins_a_run(pool, evicted):
    pool.allocate(8)
    release(pool, 2, cached=True)  # the oldest
    release(pool, 5, cached=True)
    release(pool, 1, 7)
    assert pool.allocate(2) == [1, 2]
    assert evicted == [2]


def test_a_shared_page_is_free_when_its_last_holder_leaves(pool):
    (page,) = pool.allocate(1)
    pool.share(page)
    release(pool, page, cached=True)
    assert (pool.ref_count(page), pool.num_cached) == (1, 0)
    release(pool, page, cached=True)
    assert (pool.ref_count(page), pool.num_cached, pool.num_free) == (0, 1, 8)


def test_dropping_tells_of_every_cached_page(pool, evicted):
    pool.allocate(3)
    release(pool, 1, 0, cached=True)
    pool.drop_cached()
    assert evicted == [1, 0]
    assert pool.num_empty == 7


def test_what_only_we_can_break_is_noticed(pool):
    with pytest.raises(AssertionError, match="9 pages wanted of 8"):
        pool.allocate(9)
    with pytest.raises(AssertionError, match="nobody holds it"):
        pool.release(3, cached=False)
    with pytest.raises(AssertionError, match="no content"):
        pool.share(3)
