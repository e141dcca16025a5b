"""Digests of pages: equal exactly where tokens, all tokens before them, and the salt are."""

import pytest

from astrai_serve.engine.prefix_cache import PrefixCache


def chain(token_ids, salt="", page_size=2):
    digests = []
    PrefixCache(page_size).extend_chain(digests, token_ids, salt)
    return digests


def test_only_full_pages_have_a_digest():
    assert [len(chain(range(n))) for n in (0, 1, 2, 3, 4)] == [0, 0, 1, 1, 2]


def test_a_digest_tells_of_all_before_it():
    one, other = chain([1, 2, 3, 4]), chain([1, 9, 3, 4])
    assert one[0] != other[0]
    assert one[1] != other[1], "its own tokens are equal, and those before it are not"
    assert chain([1, 2, 3, 4, 5, 6])[:2] == one


def test_tokens_do_not_run_into_each_other():
    assert len({*chain([1, 23]), *chain([12, 3]), *chain([0x0100, 0]), *chain([0, 1])}) == 4


def test_salts_do_not_meet():
    assert not {*chain(range(4), "a")} & {*chain(range(4), "b")}


def test_a_chain_grows_by_what_is_new():
    digests, cache = chain([1, 2]), PrefixCache(2)
    cache.extend_chain(digests, [1, 2, 3, 4, 5], "")
    assert digests == chain([1, 2, 3, 4])


def test_the_longest_recorded_beginning_is_found():
    cache, digests = PrefixCache(2), chain(range(8))
    for page, digest in ((5, digests[0]), (3, digests[1]), (4, digests[3])):
        cache.record(page, digest)
    assert cache.lookup(digests) == [5, 3], "behind a gap there is nothing"
    cache.evict(5)
    assert cache.lookup(digests) == []
    cache.check_invariants()


def test_of_two_pages_with_one_content_the_first_stays():
    cache, (digest,) = PrefixCache(2), chain([1, 2])
    cache.record(6, digest)
    cache.record(7, digest)
    assert cache.lookup([digest]) == [6]
    assert cache.has_page(6)
    assert not cache.has_page(7)


def test_a_page_holds_one_content():
    cache, digests = PrefixCache(2), chain(range(4))
    cache.record(0, digests[0])
    with pytest.raises(AssertionError, match="recorded twice"):
        cache.record(0, digests[1])
