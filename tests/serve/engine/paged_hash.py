"""A fake model that notices every wrong page.

It keeps one value a slot, as a real one keeps keys and values: a value is a hash of its token and
of everything before it as the pages had it, and a sampled token is a hash of all values read back,
of the seed and of the sample's number. A page lost, overwritten, stale, half written or taken from
another prompt changes the answer.
"""

from dataclasses import dataclass
from hashlib import blake2b

from astrai_serve.engine.task import SampledToken, TokenLogprob

VOCAB = 6
EOS = 5
LETTERS = "abcde\0"


def spell(token_id):
    return b"" if token_id == EOS else LETTERS[token_id].encode()


def hashed(*parts):
    return blake2b(repr(parts).encode(), digest_size=8).digest()


def values_of(weights, token_ids):
    """What the slots of these tokens must hold, worked out without any page."""
    values = []
    for token_id in token_ids:
        values.append(hashed(weights, b"".join(values), token_id))
    return values


def choose(values, draw, allow_eos):
    """The token after slots with these values; `draw` is the task's seed and sample number."""
    number = int.from_bytes(hashed(b"".join(values), draw))
    return number % (VOCAB if allow_eos else EOS)


def opinion(values, token_id):
    """A log-probability of a token after slots with these values."""
    return -int.from_bytes(hashed(b"".join(values), "opinion", token_id)[:2]) / 1000


def may_end(task, num_guesses=0):
    return task.num_output_tokens + num_guesses >= task.params.min_tokens


@dataclass(frozen=True)
class Slot:
    """What one slot holds."""

    value: bytes = b"never written"
    salt: str = ""
    weights: int = -1


class PagedHash:
    """The fake model over its slots."""

    def __init__(self, kv):
        self.kv = kv
        self.slots = [Slot()] * (kv.pool.num_pages * kv.page_size)
        self.weights = 0
        self.chunks = []
        self.breaks = False
        """The next step ends in an error."""
        self.spoils = False
        """The next step has an error in place of a token."""
        self.salts = {}
        """By task id, as they were asked for, whatever the engine made of them."""
        self.complaints = []
        """What was wrong, for the engine takes errors of the model for the model's own."""

    def execute(self, chunks):
        try:
            return self._execute(chunks)
        except AssertionError as error:
            self.complaints.append(str(error))
            raise

    def _execute(self, chunks):
        self.chunks = chunks
        histories = [self.read(chunk, chunk.start) for chunk in chunks]
        for chunk, history in zip(chunks, histories, strict=True):
            assert chunk.length > 0, "a chunk of no tokens has no logits"
            for position in range(chunk.start, chunk.start + chunk.length):
                self.write(chunk, position, history)
        if self.breaks:  # with the pages half written, as a real failure may leave them
            self.breaks = False
            for chunk in chunks:
                self.slots[self.slot(chunk, chunk.start)] = Slot(b"half written")
            raise ArithmeticError("broken on purpose")
        for chunk, history in zip(chunks, histories, strict=True):
            assert self.read(chunk, chunk.start + chunk.length) == history, "overwritten"
            self.judge_prompt(chunk, history)
        return [
            self.sample(chunk, history) if chunk.samples else []
            for chunk, history in zip(chunks, histories, strict=True)
        ]

    def write(self, chunk, position, history):
        slot, task = self.slot(chunk, position), chunk.task
        assert self.kv.pool.ref_count(slot // self.kv.page_size) == 1, "a shared page"
        token_ids = (*task.token_ids[: chunk.start + chunk.num_known], *chunk.draft)
        history.append(hashed(self.weights, b"".join(history), token_ids[position]))
        self.slots[slot] = Slot(history[-1], self.salts[task.task_id], self.weights)

    def sample(self, chunk, history):
        task = chunk.task
        if self.spoils:
            self.spoils = False
            self.slots[self.slot(chunk, chunk.start)] = Slot(b"not a number")
            error = FloatingPointError("spoilt on purpose")
            return [error] * (len(chunk.draft) + 1)
        return [
            self.sample_behind(task, history[: len(history) - len(chunk.draft) + n], n)
            for n in range(len(chunk.draft) + 1)
        ]

    def sample_behind(self, task, history, num_guesses):
        token_id = choose(history, (task.seed, task.sample_index), may_end(task, num_guesses))
        if task.params.logprobs is None:
            return SampledToken(token_id)
        logprob = opinion(history, token_id)
        return SampledToken(token_id, TokenLogprob(token_id=token_id, logprob=logprob))

    def judge_prompt(self, chunk, history):
        task = chunk.task
        if not task.wants_prompt_logprobs:
            return
        end = min(chunk.start + chunk.length, task.num_prompt_tokens - 1)
        for place in range(max(chunk.start, len(task.prompt_logprobs)), end):
            token_id = task.prompt_ids[place + 1]
            logprob = opinion(history[: place + 1], token_id)
            task.prompt_logprobs.append(TokenLogprob(token_id=token_id, logprob=logprob))

    def slot(self, chunk, position):
        size = self.kv.page_size
        return chunk.page_table[position // size] * size + position % size

    def read(self, chunk, num_tokens):
        content = [self.slots[self.slot(chunk, position)] for position in range(num_tokens)]
        salt = self.salts[chunk.task.task_id]
        assert all(slot.salt == salt for slot in content), "of another salt"
        return [slot.value for slot in content]

    def check_findable(self, page):
        """A page that can be found by its content was computed, whole, under these weights."""
        size = self.kv.page_size
        for slot in self.slots[page * size : (page + 1) * size]:
            assert slot.weights == self.weights, f"page {page} is findable and holds {slot}"
