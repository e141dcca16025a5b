"""Which page holds the keys and values of which tokens, after which tokens, for whom.

A full page has the digest of its tokens chained to the digest of the page before it; the chain
starts from a salt, so that equal prompts of strangers do not meet. The digest is cryptographic:
equal digests are equal prefixes, and no tokens are compared. Pages must be recorded only after the
forward pass that filled them.
"""

from array import array
from collections.abc import Sequence
from hashlib import blake2b

DIGEST_SIZE = 16


class PrefixCache:
    """Full pages by digest."""

    def __init__(self, page_size: int):
        self.page_size = page_size
        self._page_of: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}

    def __len__(self) -> int:
        return len(self._page_of)

    def extend_chain(self, chain: list[bytes], token_ids: Sequence[int], salt: str) -> None:
        """Add the digests of the full pages of `token_ids` that `chain` does not have yet."""
        size = self.page_size
        for start in range(len(chain) * size, len(token_ids) // size * size, size):
            parent = (
                chain[-1] if chain else blake2b(salt.encode(), digest_size=DIGEST_SIZE).digest()
            )
            tokens = array("q", token_ids[start : start + size]).tobytes()
            chain.append(blake2b(parent + tokens, digest_size=DIGEST_SIZE).digest())

    def lookup(self, chain: Sequence[bytes]) -> list[int]:
        """Pages of the longest recorded beginning of a chain of digests."""
        pages: list[int] = []
        for digest in chain:
            page = self._page_of.get(digest)
            if page is None:
                break
            pages.append(page)
        return pages

    def record(self, page: int, digest: bytes) -> None:
        """Note what a page holds. Of two pages with the same content the first stays."""
        if digest not in self._page_of:
            assert page not in self._digest_of, f"page {page} is recorded twice"
            self._page_of[digest] = page
            self._digest_of[page] = digest

    def has_page(self, page: int) -> bool:
        """Whether the page can be found by its content."""
        return page in self._digest_of

    def evict(self, page: int) -> None:
        """Forget a recorded page."""
        del self._page_of[self._digest_of.pop(page)]

    def clear(self) -> None:
        """Forget everything."""
        self._page_of.clear()
        self._digest_of.clear()

    def check_invariants(self) -> None:
        """Both directions say the same."""
        assert len(self._page_of) == len(self._digest_of), (
            f"{len(self._page_of)} digests for {len(self._digest_of)} pages"
        )
        for digest, page in self._page_of.items():
            assert self._digest_of.get(page) == digest, f"page {page} has another digest"
