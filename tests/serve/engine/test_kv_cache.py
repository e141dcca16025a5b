"""Page tables: what a task finds, what it leaves behind, and in which order that goes."""

import pytest

from astrai_core.generation import SamplingParams
from astrai_serve.engine.kv_cache import Admission, KVCache
from astrai_serve.engine.task import Task

PAGE = 4


def task(task_id, token_ids, salt=""):
    return Task(
        task_id=task_id,
        prompt_ids=tuple(token_ids),
        params=SamplingParams(),
        max_tokens=9,
        seed=0,
        cache_salt=salt,
    )


def admit(kv, one):
    assert kv.task_alloc(one) is Admission.ADMITTED
    kv.check_invariants()
    return kv.page_table(one)


def compute(kv, one):
    """As a forward pass over the whole task would."""
    one.num_computed_tokens = one.num_tokens
    kv.task_record(one)


def run(kv, task_id, token_ids, salt=""):
    """Admit, compute and end a task; return its pages."""
    one = task(task_id, token_ids, salt)
    pages = list(admit(kv, one))
    compute(kv, one)
    kv.task_forget(one)
    kv.check_invariants()
    return pages


def test_a_prefix_is_found_by_full_pages():
    kv = KVCache(8, PAGE)
    pages = run(kv, 0, range(10))
    later = task(1, [*range(8), 99, 98])
    assert admit(kv, later)[:2] == pages[:2]
    assert later.num_computed_tokens == later.num_cached_tokens == 8
    assert (kv.num_lookup_tokens, kv.num_hit_tokens) == (20, 8)


@pytest.mark.parametrize(("num_tokens", "num_hits"), [(7, 1), (8, 1), (9, 2)])
def test_at_least_the_last_token_is_computed(num_tokens, num_hits):
    kv = KVCache(8, PAGE)
    run(kv, 0, range(12))
    again = task(1, range(num_tokens))
    admit(kv, again)
    assert again.num_computed_tokens == num_hits * PAGE < num_tokens


def test_other_salts_and_no_caching_find_nothing():
    for kv, salt in ((KVCache(8, PAGE), "other"), (KVCache(8, PAGE, prefix_caching=False), "")):
        run(kv, 0, range(10))
        later = task(1, range(10), salt)
        admit(kv, later)
        assert later.num_computed_tokens == 0


def test_what_was_not_computed_is_not_found():
    kv = KVCache(8, PAGE)
    first = task(0, range(10))
    admit(kv, first)
    first.num_computed_tokens = 5
    kv.task_record(first)
    kv.task_forget(first)
    later = task(1, range(10))
    admit(kv, later)
    assert later.num_computed_tokens == 4


def test_a_page_that_is_being_computed_is_worth_waiting_for():
    kv = KVCache(8, PAGE)
    first, second = task(0, range(10)), task(1, range(10))
    admit(kv, first)
    assert kv.task_alloc(second) is Admission.WORTH_WAITING
    assert kv.task_alloc(task(2, range(4))) is Admission.ADMITTED, "nothing of it can be shared"
    compute(kv, first)
    admit(kv, second)
    assert kv.page_table(second)[:2] == kv.page_table(first)[:2]


def test_nobody_waits_for_a_task_that_is_gone():
    kv = KVCache(8, PAGE)
    first = task(0, range(10))
    admit(kv, first)
    kv.task_forget(first)
    admit(kv, task(1, range(10)))


def test_headroom_is_left_free():
    kv = KVCache(5, PAGE)
    assert kv.task_alloc(task(0, range(8)), headroom=4) is Admission.NO_ROOM
    assert kv.task_alloc(task(0, range(8)), headroom=3) is Admission.ADMITTED


def test_cached_pages_are_not_counted_twice():
    kv = KVCache(3, PAGE)
    run(kv, 0, range(9))
    # two pages found and two more needed, of three: the two found are no longer free
    assert kv.task_alloc(task(1, [*range(8), *range(50, 56)])) is Admission.NO_ROOM


def test_the_tail_is_given_up_before_the_head():
    kv = KVCache(4, PAGE)
    pages = run(kv, 0, range(13))  # three full pages and one that is not
    assert kv.pool.cached_pages() == pages[2::-1]
    run(kv, 1, range(50, 57))  # two pages: the empty one and the tail
    later = task(2, range(13))
    admit(kv, later)
    assert later.num_computed_tokens == 8


def test_a_growing_task_takes_pages_as_it_needs_them():
    kv = KVCache(2, PAGE)
    one = task(0, range(4))
    admit(kv, one)
    assert kv.task_extend(one)
    assert len(kv.page_table(one)) == 1
    one.token_ids.append(1)
    assert kv.task_extend(one)
    assert len(kv.page_table(one)) == 2
    one.token_ids += range(4)
    assert not kv.task_extend(one)


def test_an_answer_is_found_by_the_turn_that_follows():
    kv = KVCache(8, PAGE)
    one = task(0, range(6))
    admit(kv, one)
    compute(kv, one)
    one.token_ids += [70, 71, 72]
    assert kv.task_extend(one)
    compute(kv, one)
    kv.task_forget(one)
    later = task(1, [*range(6), 70, 71, 72, 80])
    admit(kv, later)
    assert later.num_computed_tokens == 8


def test_new_weights_forget_every_prefix():
    kv = KVCache(8, PAGE)
    run(kv, 0, range(10))
    kv.clear_prefixes()
    assert kv.is_idle
    assert kv.pool.num_empty == 8
    holder = task(1, range(10))
    admit(kv, holder)
    assert holder.num_computed_tokens == 0
    with pytest.raises(AssertionError, match="1 tasks hold pages"):
        kv.clear_prefixes()
