"""The pages of the KV cache as integers: who is free, who is shared, and who goes next.

A page is in one of three states:

    used      some tasks hold it (its count of references says how many)
    cached    nobody holds it, but its content may be asked for again
    empty     nobody holds it and its content is lost

Cached pages are kept in a doubly linked list, least recently used first, and become empty in that
order and no other. Empty pages are bytes of a map, in which runs are found at the speed of C:
attention over a run of neighbouring pages needs no gathering, so pages are handed out in runs.
"""

from collections.abc import Callable


class PagePool:
    """Reference counts and free pages.

    Args:
        num_pages: pages 0 to num_pages - 1.
        on_evict: told about each cached page whose content is given up.
    """

    def __init__(self, num_pages: int, on_evict: Callable[[int], None]):
        self.num_pages = num_pages
        self._on_evict = on_evict
        self._refs = [0] * num_pages
        self._empty = bytearray(b"\x01" * num_pages)
        self.num_empty = num_pages
        self.num_cached = 0
        # neighbours in the list of cached pages; index num_pages is the list's two ends
        self._older = [num_pages] * (num_pages + 1)
        self._newer = [num_pages] * (num_pages + 1)

    @property
    def num_free(self) -> int:
        """Pages that can be allocated: empty and cached ones."""
        return self.num_empty + self.num_cached

    def ref_count(self, page: int) -> int:
        """How many tasks hold the page."""
        return self._refs[page]

    def allocate(self, count: int, after: int | None = None) -> list[int]:
        """Take pages, for one holder each.

        Args:
            count: how many; at most `num_free`.
            after: the holder's last page; its neighbour is preferred.
        """
        assert count <= self.num_free, f"{count} pages wanted of {self.num_free} free ones"
        for _ in range(count - self.num_empty):
            self._evict_oldest()
        pages: list[int] = []
        if after is not None:
            end = self._run_end(after + 1)
            self._take(pages, after + 1, min(end, after + 1 + count))
        if count - len(pages) > 1:
            self._make_room(count - len(pages))
        while len(pages) < count:
            missing = count - len(pages)
            start, end = self._longest_run()
            slack = end - start - missing
            if slack > 0 and start > 0 and self._refs[start - 1]:
                start += slack // 2  # leave the task before it room to grow
            self._take(pages, start, min(end, start + missing))
        return pages

    def share(self, page: int) -> None:
        """Hold a page that is used or cached for one more holder."""
        if not self._refs[page]:
            assert not self._empty[page], f"page {page} has no content to share"
            self._unlink(page)
        self._refs[page] += 1

    def release(self, page: int, cached: bool) -> None:
        """Give up one hold; the last holder says whether the content is worth keeping."""
        assert self._refs[page] > 0, f"page {page} is released and nobody holds it"
        self._refs[page] -= 1
        if self._refs[page]:
            return
        if cached:
            self._append_newest(page)
        else:
            self._empty[page] = 1
            self.num_empty += 1

    def drop_cached(self) -> None:
        """Make every cached page empty."""
        while self.num_cached:
            self._evict_oldest()

    def _take(self, pages: list[int], start: int, end: int) -> None:
        for page in range(start, end):
            self._refs[page] = 1
            self._empty[page] = 0
            pages.append(page)
        self.num_empty -= max(0, end - start)

    def _run_end(self, start: int) -> int:
        """The first page from `start` on that is not empty."""
        end = self._empty.find(0, start)
        return self.num_pages if end < 0 else end

    def _longest_run(self) -> tuple[int, int]:
        """The first of the longest runs of empty pages, to within a factor of two."""
        size = 1 << (self.num_empty.bit_length() - 1)
        while (start := self._empty.find(b"\x01" * size)) < 0:
            size //= 2
        return start, self._run_end(start)

    def _make_room(self, count: int) -> None:
        # Tasks leave whole runs behind, so a few more of the oldest pages often join into the run
        # that is wanted. At most as many are given up as are wanted.
        run = b"\x01" * count
        for _ in range(min(count, self.num_cached)):
            if self._empty.find(run) >= 0:
                return
            self._evict_oldest()

    def _evict_oldest(self) -> None:
        page = self._newer[self.num_pages]
        self._unlink(page)
        self._empty[page] = 1
        self.num_empty += 1
        self._on_evict(page)

    def _append_newest(self, page: int) -> None:
        ends = self.num_pages
        newest = self._older[ends]
        self._older[page], self._newer[page] = newest, ends
        self._newer[newest] = self._older[ends] = page
        self.num_cached += 1

    def _unlink(self, page: int) -> None:
        older, newer = self._older[page], self._newer[page]
        self._newer[older], self._older[newer] = newer, older
        self.num_cached -= 1

    def cached_pages(self) -> list[int]:
        """The cached pages, least recently used first."""
        pages: list[int] = []
        page = self._newer[self.num_pages]
        while page != self.num_pages and len(pages) <= self.num_pages:
            pages.append(page)
            page = self._newer[page]
        return pages

    def check_invariants(self) -> None:
        """Every page is in exactly one state, and the counts are true."""
        cached = self.cached_pages()
        assert len(cached) == self.num_cached == len(set(cached)), (
            f"{len(cached)} pages in the list, {self.num_cached} counted"
        )
        num_empty = self._empty.count(1)
        assert num_empty == self.num_empty, f"{num_empty} empty pages, {self.num_empty} counted"
        states = set(cached)
        for page, refs in enumerate(self._refs):
            held = (refs > 0) + (page in states) + self._empty[page]
            assert refs >= 0, f"page {page} has {refs} references"
            assert held == 1, (
                f"page {page}: {refs} references, "
                f"cached {page in states}, empty {bool(self._empty[page])}"
            )
