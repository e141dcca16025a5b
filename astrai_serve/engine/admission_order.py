"""Which of the waiting tasks is let in next: a policy of integers, without clocks or pages.

Three rules, in this order. A task that was let in before and sent back comes first, in the order of
first admissions: on this rests the scheduler's proof of progress. Chat turns come before bulk work,
but no more than `max_chats_in_a_row` of them while bulk work waits. Among clients, the one for
whom the fewest tokens were computed comes first (a virtual token counter, Sheng et al. 2024), and
its tasks in the order of arrival; a client that was away brings no credit along.
"""

from collections.abc import Collection, Sequence

from astrai_serve.engine.task import Task

MAX_CHATS_IN_A_ROW = 8


class AdmissionOrder:
    """Chooses among waiting tasks, and keeps account of what each client got.

    Args:
        max_chats_in_a_row: so many chat turns may pass bulk work that waits.
    """

    def __init__(self, max_chats_in_a_row: int = MAX_CHATS_IN_A_ROW):
        self.max_chats_in_a_row = max_chats_in_a_row
        self._num_chats_in_a_row = 0
        self._num_admitted = 0
        self._num_tasks: dict[str, int] = {}  # of clients that have any
        self._served: dict[str, int] = {}

    def served(self, client: str) -> int:
        """Tokens that count as computed for a client; only differences mean anything."""
        return self._served.get(client, 0)

    def arrived(self, task: Task) -> None:
        """Count a new task of its client."""
        client = task.client
        if client not in self._num_tasks:
            # whoever was away does not get what others would have had meanwhile
            least = min((self._served[other] for other in self._num_tasks), default=0)
            self._served[client] = max(self.served(client), least)
        self._num_tasks[client] = self._num_tasks.get(client, 0) + 1

    def choose(self, waiting: Sequence[Task], skipped: Collection[Task] = ()) -> Task | None:
        """Return who is next, of tasks in the order of `place` and without those skipped."""
        candidates = [task for task in waiting if task not in skipped]
        if not candidates:
            return None
        if candidates[0].admission is not None:
            return candidates[0]
        chats = [task for task in candidates if not task.is_bulk]
        bulk = [task for task in candidates if task.is_bulk]
        is_bulk_due = bulk and self._num_chats_in_a_row >= self.max_chats_in_a_row
        return min(bulk if is_bulk_due or not chats else chats, key=self._turn)

    def admitted(self, task: Task, is_bulk_waiting: bool) -> None:
        """Take note that a task was let in, and charge its prompt at its first admission.

        Args:
            task: has its cached pages, which cost nothing.
            is_bulk_waiting: whether bulk work stays behind.
        """
        if task.admission is not None:
            return
        task.admission = self._num_admitted
        self._num_admitted += 1
        passed = not task.is_bulk and is_bulk_waiting
        self._num_chats_in_a_row = self._num_chats_in_a_row + 1 if passed else 0
        self.charge(task, task.num_missing_tokens)

    def charge(self, task: Task, num_tokens: int) -> None:
        """Count tokens computed for a task's client."""
        self._served[task.client] = self.served(task.client) + num_tokens

    def left(self, task: Task) -> None:
        """Count a task out; when the last one leaves, all accounts are closed."""
        self._num_tasks[task.client] -= 1
        if not self._num_tasks[task.client]:
            del self._num_tasks[task.client]
        if not self._num_tasks:
            self._served.clear()

    def _turn(self, task: Task) -> tuple[int, int]:
        return self.served(task.client), task.task_id


def place(task: Task) -> tuple[bool, int]:
    """Where a task stands in line: by first admission, then, not yet let in, by arrival."""
    if task.admission is None:
        return True, task.task_id
    return False, task.admission
