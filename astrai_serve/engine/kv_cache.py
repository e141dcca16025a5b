"""Page tables of the running tasks, over the pool of pages and the prefix cache.

Only integers live here; the keys and values are in `KVStorage`. A page that more than one task
holds is full and is never written again, because a task starts to compute behind its cached pages.
"""

from enum import Enum, auto

from astrai_serve.engine.page_pool import PagePool
from astrai_serve.engine.prefix_cache import PrefixCache
from astrai_serve.engine.task import Task


class Admission(Enum):
    """What became of a task that asked for its first pages."""

    ADMITTED = auto()
    NO_ROOM = auto()
    WORTH_WAITING = auto()
    """A running task is about to compute pages that this one can share."""


class KVCache:
    """Allocates pages to tasks and finds prefixes for them."""

    def __init__(self, num_pages: int, page_size: int, prefix_caching: bool = True):
        self.page_size = page_size
        self.prefix_caching = prefix_caching
        self.prefix = PrefixCache(page_size)
        self.pool = PagePool(num_pages, on_evict=self.prefix.evict)
        self._tables: dict[int, list[int]] = {}
        self._chains: dict[int, list[bytes]] = {}
        self._num_recorded: dict[int, int] = {}
        self._filling: dict[bytes, int] = {}  # digest of a page being computed -> task
        self.num_lookup_tokens = 0
        self.num_hit_tokens = 0

    def num_pages_for(self, num_tokens: int) -> int:
        """Pages that hold so many tokens."""
        return -(-num_tokens // self.page_size)

    def page_table(self, task: Task) -> list[int]:
        """The task's pages, in the order of its tokens. Not to be changed or kept."""
        return self._tables[task.task_id]

    def task_alloc(self, task: Task, headroom: int = 0) -> Admission:
        """Give a task pages for all its tokens, cached ones first; sets `num_computed_tokens`.

        Args:
            task: a task without pages.
            headroom: pages that must be left free afterwards.
        """
        # one token at least must be computed, or there would be no logits to go on from
        chain = self._chain(task)
        sharable = chain[: (task.num_tokens - 1) // self.page_size]
        if task.wants_prompt_logprobs:
            sharable = []  # cached keys and values say nothing of logits
        hits = self.prefix.lookup(sharable)
        if len(hits) < len(sharable) and sharable[len(hits)] in self._filling:
            return Admission.WORTH_WAITING
        # cached pages that nobody holds are counted as free, but not once they are held
        num_revived = sum(1 for page in hits if not self.pool.ref_count(page))
        num_new = self.num_pages_for(task.num_tokens) - len(hits)
        if num_new + headroom > self.pool.num_free - num_revived:
            return Admission.NO_ROOM
        for page in hits:
            self.pool.share(page)
        table = hits + self.pool.allocate(num_new, after=hits[-1] if hits else None)
        self._tables[task.task_id] = table
        self._num_recorded[task.task_id] = len(hits)
        for digest in chain[len(hits) :]:
            self._filling.setdefault(digest, task.task_id)
        task.num_computed_tokens = len(hits) * self.page_size
        if task.num_cached_tokens is None:
            task.num_cached_tokens = task.num_computed_tokens
            self.num_lookup_tokens += task.num_prompt_tokens
            self.num_hit_tokens += task.num_computed_tokens
        return Admission.ADMITTED

    def task_extend(self, task: Task, num_more: int = 0) -> bool:
        """Make sure that a running task has pages for all its tokens; False if none is free.

        Args:
            task: a task with pages.
            num_more: tokens behind its own that need a slot as well.
        """
        table = self._tables[task.task_id]
        num_new = self.num_pages_for(task.num_tokens + num_more) - len(table)
        if num_new <= 0:
            return True
        if num_new > self.pool.num_free:
            return False
        table += self.pool.allocate(num_new, after=table[-1])
        return True

    def task_record(self, task: Task) -> None:
        """Make the pages that a forward pass has filled findable; to be called after it."""
        first = self._num_recorded[task.task_id]
        num_full = task.num_computed_tokens // self.page_size
        if not self.prefix_caching or num_full == first:
            return
        table, chain = self._tables[task.task_id], self._chain(task)
        for page, digest in zip(table[first:num_full], chain[first:num_full], strict=True):
            self.prefix.record(page, digest)
            if self._filling.get(digest) == task.task_id:
                del self._filling[digest]
        self._num_recorded[task.task_id] = num_full

    def task_free(self, task: Task) -> None:
        """Take a task's pages away, the tail first: heads are shared by more prompts."""
        for digest in self._chains[task.task_id][self._num_recorded.pop(task.task_id) :]:
            if self._filling.get(digest) == task.task_id:
                del self._filling[digest]
        for page in reversed(self._tables.pop(task.task_id)):
            self.pool.release(page, cached=self.prefix.has_page(page))
        task.num_computed_tokens = 0

    def task_forget(self, task: Task) -> None:
        """Drop what is remembered of a task that has ended."""
        if task.task_id in self._tables:
            self.task_free(task)
        self._chains.pop(task.task_id, None)

    def clear_prefixes(self) -> None:
        """Drop every cached prefix, for the weights have changed; no task may hold pages."""
        assert not self._tables, f"{len(self._tables)} tasks hold pages of the old weights"
        self.pool.drop_cached()
        assert not len(self.prefix), f"{len(self.prefix)} prefixes outlived their pages"

    def _chain(self, task: Task) -> list[bytes]:
        chain = self._chains.setdefault(task.task_id, [])
        if self.prefix_caching:
            self.prefix.extend_chain(chain, task.token_ids, task.cache_salt)
        return chain

    @property
    def is_idle(self) -> bool:
        """No task holds a page or is remembered, and every page is free."""
        return (
            not self._tables
            and not self._chains
            and not self._filling
            and self.pool.num_free == self.pool.num_pages
        )

    def check_invariants(self) -> None:
        """Page tables, reference counts and the prefix cache agree."""
        self.pool.check_invariants()
        self.prefix.check_invariants()
        holders = [0] * self.pool.num_pages
        for table in self._tables.values():
            assert len(set(table)) == len(table), f"a page occurs twice in {table}"
            for page in table:
                holders[page] += 1
        for page, count in enumerate(holders):
            assert self.pool.ref_count(page) == count, (
                f"page {page} is in {count} tables and has {self.pool.ref_count(page)} references"
            )
        for page in self.pool.cached_pages():
            assert self.prefix.has_page(page), f"cached page {page} cannot be found"
        num_free = sum(1 for count in holders if not count)
        num_findable = sum(
            1 for page, n in enumerate(holders) if not n and self.prefix.has_page(page)
        )
        assert num_findable == self.pool.num_cached, (
            f"{num_findable} free pages are findable, {self.pool.num_cached} are cached"
        )
        assert num_free == self.pool.num_free, (
            f"{num_free} pages are in no table, {self.pool.num_free} are free"
        )
        assert set(self._filling.values()) <= self._tables.keys(), "a page is filled by nobody"
