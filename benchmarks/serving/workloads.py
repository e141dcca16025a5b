"""What is asked of every server: the same token ids, drawn from a fixed seed."""

import random
from dataclasses import dataclass

# ids below are bytes and control tokens, so that tokens of every size and peer have text
FIRST_ID = 300


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Requests that are sent together, so many at a time."""

    num_requests: int
    concurrency: int
    prompt: tuple[int, int]
    """Least and most tokens of a prompt."""
    num_new: int
    num_shared: int = 0
    """So many tokens are the same at the beginning of each prompt."""

    def prompts(self, vocab_size: int, seed: str) -> list[list[int]]:
        """Token ids, the same for the same seed."""
        draw = random.Random(seed)
        shared = [draw.randrange(FIRST_ID, vocab_size) for _ in range(self.num_shared)]
        lengths = [draw.randint(*self.prompt) for _ in range(self.num_requests)]
        return [
            shared + [draw.randrange(FIRST_ID, vocab_size) for _ in range(length - len(shared))]
            for length in lengths
        ]


WORKLOADS = {
    "single": Workload(num_requests=2, concurrency=1, prompt=(128, 128), num_new=128),
    "prefill": Workload(num_requests=3, concurrency=1, prompt=(1024, 1024), num_new=2),
    "conc8": Workload(num_requests=16, concurrency=8, prompt=(64, 256), num_new=64),
    "conc32": Workload(num_requests=32, concurrency=32, prompt=(64, 256), num_new=64),
    "shared32": Workload(
        num_requests=32, concurrency=32, prompt=(1040, 1040), num_new=32, num_shared=1024
    ),
}
WARM_UP = Workload(num_requests=2, concurrency=2, prompt=(64, 64), num_new=8)


@dataclass(kw_only=True)
class Answer:
    """When an answer came, in seconds of one clock."""

    sent: float
    num_prompt: int
    first: float = 0.0
    last: float = 0.0
    num_tokens: int = 0


def figures(answers: list[Answer], seconds: float) -> dict[str, float]:
    """Sum up the answers to a workload that took so long in all."""
    first = sorted(a.first - a.sent for a in answers)
    rates = sorted(
        (a.num_tokens - 1) / (a.last - a.first)
        for a in answers
        if a.num_tokens > 2 and a.last > a.first
    )
    prefill = sorted(a.num_prompt / (a.first - a.sent) for a in answers)
    found = {
        "seconds": seconds,
        "generated_per_second": sum(a.num_tokens for a in answers) / seconds,
        "prefill_per_second": prefill[len(prefill) // 2],
        "first_token_ms": first[len(first) // 2] * 1000,
    }
    return found | ({"decode_per_second": rates[len(rates) // 2]} if rates else {})
