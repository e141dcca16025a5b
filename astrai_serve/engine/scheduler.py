"""What the next forward pass computes.

There is no prefill phase and no decode phase: each task's `num_computed_tokens` catches up with its
`num_tokens`, a step spends a budget of tokens, and running tasks come before waiting ones. Who of
the waiting is let in is for `AdmissionOrder` to say. Age counts from the first admission. Running
out of pages sends the youngest back to wait, before all that were never let in; it is computed
again when it returns. The oldest is never sent back, and a task that could not fit alone never gets
here: so the oldest always finishes, and therefore all do.
"""

from bisect import insort
from dataclasses import dataclass, replace

from astrai_serve.engine.admission_order import AdmissionOrder, place
from astrai_serve.engine.kv_cache import Admission, KVCache
from astrai_serve.engine.speculation import Speculation
from astrai_serve.engine.task import Task, TaskStatus


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens `start` to `start + length - 1` of a task, to be computed in one step.

    The last of them may be guesses at tokens that the task has yet to say.
    """

    task: Task
    start: int
    length: int
    page_table: list[int]
    """Pages of positions 0 to start + length - 1 at least; valid during the step."""
    samples: bool
    """The chunk reaches the task's end, so that its next token can be sampled."""
    draft: tuple[int, ...] = ()
    """Guesses behind the task's end, counted in `length`: a token is sampled behind each as well.
    Their keys and values are worth something only once that very token was sampled."""

    @property
    def num_known(self) -> int:
        """Tokens of the chunk that are the task's own."""
        return self.length - len(self.draft)


class InferenceScheduler:
    """Waiting and running tasks, both in the order of `place`.

    Args:
        kv: the pages.
        max_running_tasks: most tasks in a step.
        max_step_tokens: most tokens in a step, at least `max_running_tasks`.
        max_chunk_tokens: most tokens of one task in a step.
        headroom_pages: pages left free for each running task when another is admitted.
        order: whose turn it is.
        speculation: guesses what tasks will say; without it nothing is guessed.
    """

    def __init__(
        self,
        kv: KVCache,
        *,
        max_running_tasks: int,
        max_step_tokens: int,
        max_chunk_tokens: int | None = None,
        headroom_pages: int = 0,
        order: AdmissionOrder | None = None,
        speculation: Speculation | None = None,
    ):
        assert max_running_tasks <= max_step_tokens, "a decoding task could starve"
        self.kv = kv
        self.max_running_tasks = max_running_tasks
        self.max_step_tokens = max_step_tokens
        self.max_chunk_tokens = max_chunk_tokens or max_step_tokens
        self.headroom_pages = headroom_pages
        self.order = order or AdmissionOrder()
        self.speculation = speculation or Speculation(0)
        self.waiting: list[Task] = []
        self.running: list[Task] = []
        self.num_preemptions = 0

    @property
    def has_tasks(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.running or self.waiting)

    def fits(self, num_prompt_tokens: int, max_tokens: int) -> bool:
        """Whether such a task, alone, has room until its end; its last token needs no slot."""
        num_pages = self.kv.num_pages_for(num_prompt_tokens + max_tokens - 1)
        return num_pages <= self.kv.pool.num_pages

    def add(self, task: Task) -> None:
        """Queue a task; the caller has made sure that it fits."""
        assert self.fits(task.num_prompt_tokens, task.max_tokens), "a task that can never finish"
        insort(self.waiting, task, key=place)
        self.order.arrived(task)

    def schedule(self) -> list[Chunk]:
        """Choose the chunks of the next step and give their tasks pages.

        Decoding tasks come first and cost a token each, so that no prompt, however long, makes
        them wait longer than a step. Guesses come last, and take nothing that was wanted.
        """
        num_preemptions = self.num_preemptions
        decoding = [task for task in self.running if task.num_missing_tokens == 1]
        # who is sent back is the youngest, and so never one that has its chunk already
        chunks = [
            self._chunk(task, 1)
            for task in decoding
            if task.status is TaskStatus.RUNNING and self._extend(task)
        ]
        num_decoding = len(chunks)
        budget = self.max_step_tokens - num_decoding
        for task in self.running:
            if task.num_missing_tokens > 1 and budget > 0:
                chunks.append(self._chunk(task, budget))
                budget -= chunks[-1].length
        if self.num_preemptions == num_preemptions:
            budget = self._admit(chunks, budget)
            if 0 < num_decoding <= (most := min(self.speculation.num_tokens, budget)):
                most //= num_decoding
                chunks[:num_decoding] = [self._with_draft(c, most) for c in chunks[:num_decoding]]
        return chunks

    def complete(self, chunks: list[Chunk]) -> None:
        """Take note that a step was computed. Sampled tokens are added by the caller, after it.

        Of guesses nothing is known yet: `accept` tells which were right.
        """
        for chunk in chunks:
            if chunk.task.num_output_tokens and chunk.num_known == 1:
                self.order.charge(chunk.task, 1)  # the prompt was charged when it was let in
            chunk.task.num_computed_tokens = chunk.start + chunk.num_known
            self.kv.task_record(chunk.task)

    def accept(self, task: Task) -> None:
        """Take note that the token a task has just got was guessed, and is computed by now."""
        self.order.charge(task, 1)
        task.num_computed_tokens += 1
        self.kv.task_record(task)

    def remove(self, task: Task, status: TaskStatus) -> None:
        """Forget a task that has ended, wherever it stands, and free its pages."""
        (self.running if task.status is TaskStatus.RUNNING else self.waiting).remove(task)
        self.kv.task_forget(task)
        self.order.left(task)
        self.speculation.forget(task)
        task.status = status

    def preempt_all(self) -> None:
        """Send every running task back to wait, for what was computed is worth nothing now."""
        while self.running:
            self._preempt_latest()

    def _chunk(self, task: Task, budget: int) -> Chunk:
        length = min(task.num_missing_tokens, budget, self.max_chunk_tokens)
        return Chunk(
            task=task,
            start=task.num_computed_tokens,
            length=length,
            page_table=self.kv.page_table(task),
            samples=length == task.num_missing_tokens,
        )

    def _with_draft(self, chunk: Chunk, most: int) -> Chunk:
        """The chunk of a decoding task, with at most so many guesses, or as it is."""
        task = chunk.task
        # a token is said behind the last guess, too
        room = task.max_tokens - task.num_output_tokens - 1
        limit = min(most, room, self.max_chunk_tokens - 1)
        draft = self.speculation.propose(task, limit)
        if draft and not self.kv.task_extend(task, len(draft)):
            num_slots = len(chunk.page_table) * self.kv.page_size
            draft = draft[: num_slots - task.num_tokens]
        if not draft:
            return chunk
        return replace(chunk, length=chunk.length + len(draft), draft=tuple(draft))

    def _extend(self, task: Task) -> bool:
        """Find room for the task's next token; False if it was itself the one to be sent back."""
        while not self.kv.task_extend(task):
            assert len(self.running) > 1, "a task was admitted that does not fit alone"
            if self._preempt_latest() is task:
                return False
        return True

    def _preempt_latest(self) -> Task:
        task = self.running.pop()
        self.kv.task_free(task)
        task.status = TaskStatus.PENDING
        task.num_preemptions += 1
        self.num_preemptions += 1
        insort(self.waiting, task, key=place)
        return task

    def _admit(self, chunks: list[Chunk], budget: int) -> int:
        """Let waiting tasks in; returns what is left of the budget."""
        # those who wait for a page that is being computed let others pass, within reason
        skipped: list[Task] = []
        while budget > 0 and len(skipped) < self.max_running_tasks:
            if len(self.running) == self.max_running_tasks:
                break
            task = self.order.choose(self.waiting, skipped)
            if task is None:
                break
            num_sharing = len(self.running) + 1 if self.running else 0
            admission = self.kv.task_alloc(task, headroom=self.headroom_pages * num_sharing)
            if admission is Admission.NO_ROOM:
                break
            if admission is Admission.WORTH_WAITING:
                skipped.append(task)
                continue
            self.waiting.remove(task)
            self.order.admitted(task, any(other.is_bulk for other in self.waiting))
            insort(self.running, task, key=place)
            task.status = TaskStatus.RUNNING
            chunks.append(self._chunk(task, budget))
            budget -= chunks[-1].length
        return budget

    def check_invariants(self) -> None:
        """Tasks, their states and their pages agree."""
        self.kv.check_invariants()
        for queue, status in (
            (self.running, TaskStatus.RUNNING),
            (self.waiting, TaskStatus.PENDING),
        ):
            places = [place(task) for task in queue]
            assert places == sorted(set(places)), f"{status} tasks are out of order: {places}"
            assert all(task.status is status for task in queue), f"a {status} task is not"
        assert len(self.running) <= self.max_running_tasks
        for task in self.running:
            num_slots = len(self.kv.page_table(task)) * self.kv.page_size
            assert 0 <= task.num_computed_tokens <= min(task.num_tokens, num_slots), (
                f"task {task.task_id} computed {task.num_computed_tokens} of {task.num_tokens} "
                f"tokens in {num_slots} slots"
            )
        for task in self.waiting:
            assert task.num_computed_tokens == 0, f"waiting task {task.task_id} holds pages"
