"""Whose turn it is: chat before bulk, fair between clients, and all of them at last."""

from hypothesis import given, settings
from hypothesis import strategies as st

from astrai_core.generation import SamplingParams
from astrai_serve.engine.admission_order import AdmissionOrder
from astrai_serve.engine.kv_cache import KVCache
from astrai_serve.engine.scheduler import InferenceScheduler
from astrai_serve.engine.task import Task, TaskStatus

PAGE = 4


def task(task_id, client="", is_bulk=False, num_prompt_tokens=3, max_tokens=5):
    first = 100 * task_id
    return Task(
        task_id=task_id,
        prompt_ids=tuple(range(first, first + num_prompt_tokens)),
        params=SamplingParams(),
        max_tokens=max_tokens,
        seed=0,
        client=client,
        is_bulk=is_bulk,
    )


def scheduler(num_pages=8, max_running_tasks=2, order=None):
    return InferenceScheduler(
        KVCache(num_pages, PAGE), max_running_tasks=max_running_tasks, max_step_tokens=16,
        order=order,
    )  # fmt: skip


def step(plan):
    """Compute a step and end the tasks that have said all; return the ids that were computed."""
    chunks = plan.schedule()
    plan.complete(chunks)
    for chunk in chunks:
        if chunk.samples:
            chunk.task.token_ids.append(7)
    for one in [t for t in plan.running if t.num_output_tokens >= t.max_tokens]:
        plan.remove(one, TaskStatus.FINISHED)
    plan.check_invariants()
    return [chunk.task.task_id for chunk in chunks]


def admissions(plan, tasks, most=4000):
    """Run until all is done; return the tasks in the order of their first admissions."""
    for one in tasks:
        plan.add(one)
    while plan.has_tasks:
        assert (most := most - 1), "a task starves"
        step(plan)
    return sorted(tasks, key=lambda one: one.admission)


def test_a_chat_turn_passes_bulk_work_that_came_before():
    tasks = [task(0, is_bulk=True), task(1, is_bulk=True), task(2)]
    order = admissions(scheduler(max_running_tasks=1), tasks)
    assert [one.task_id for one in order] == [2, 0, 1]


def test_bulk_work_is_passed_by_no_more_than_so_many_chats():
    tasks = [task(n, is_bulk=n < 2) for n in range(10)]
    plan = scheduler(max_running_tasks=1, order=AdmissionOrder(max_chats_in_a_row=3))
    order = admissions(plan, tasks)
    assert [one.is_bulk for one in order] == [False] * 3 + [True] + [False] * 3 + [True] + [
        False
    ] * 2


def test_who_sends_one_is_not_behind_who_sends_many():
    tasks = [task(n, client="many") for n in range(6)] + [task(6, client="one")]
    order = admissions(scheduler(max_running_tasks=1), tasks)
    assert order[1].client == "one", "after the first of the other client"


def test_who_comes_back_has_no_credit():
    plan = scheduler(max_running_tasks=1)
    for number in range(4):
        plan.add(task(number, client="busy"))
    for _ in range(12):
        step(plan)
    assert plan.order.served("busy") > 0
    plan.add(task(9, client="new"))
    assert plan.order.served("new") == plan.order.served("busy")


def test_accounts_are_closed_when_everybody_has_left():
    plan = scheduler()
    admissions(plan, [task(n, client=str(n)) for n in range(5)])
    assert [plan.order.served(str(n)) for n in range(5)] == [0] * 5


TASKS = st.lists(
    st.tuples(st.sampled_from("abc"), st.booleans(), st.integers(1, 12), st.integers(1, 12)),
    min_size=1,
    max_size=24,
)


@settings(max_examples=60, deadline=None)
@given(TASKS, st.integers(6, 10), st.integers(1, 4), st.integers(1, 3), st.integers(0, 5))
def test_all_end_and_the_oldest_is_never_sent_back(wishes, pages, running, in_a_row, gap):
    order = AdmissionOrder(max_chats_in_a_row=in_a_row)
    plan = scheduler(pages, running, order)
    tasks = [task(n, *wish) for n, wish in enumerate(wishes)]
    coming = list(tasks)
    for number in range(5000):
        if coming and number % (gap + 1) == 0:
            plan.add(coming.pop(0))
        if not plan.has_tasks:
            if not coming:
                break
            continue
        oldest = plan.running[0] if plan.running else None
        before = None if oldest is None else oldest.num_preemptions
        assert step(plan), "a step that computes nothing"
        assert oldest is None or oldest.num_preemptions == before
    assert all(one.status is TaskStatus.FINISHED for one in tasks)
    assert plan.kv.is_idle


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=12, max_size=12),
    st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=30, max_size=30),
    st.integers(1, 3),
)
def test_two_clients_that_always_want_more_get_the_same(large, small, running):
    plan = scheduler(num_pages=64, max_running_tasks=running)
    wishes = [("large", *wish) for wish in large] + [("small", *wish) for wish in small]
    for number, (client, prompt, answer) in enumerate(wishes):
        plan.add(task(number, client, False, prompt, answer))
    most = 12 + 12  # tokens of a task
    while {one.client for one in plan.waiting} == {"large", "small"}:
        step(plan)
        gap = abs(plan.order.served("large") - plan.order.served("small"))
        # what a client is ahead was let in while it was behind: the tasks that run, and no more
        assert gap <= most * running


@settings(max_examples=40, deadline=None)
@given(TASKS, st.integers(1, 4))
def test_bulk_work_that_waits_is_let_in_after_so_many_chats(wishes, in_a_row):
    tasks = [task(n, *wish) for n, wish in enumerate(wishes)]
    plan = scheduler(64, 1, AdmissionOrder(max_chats_in_a_row=in_a_row))
    kinds = [one.is_bulk for one in admissions(plan, tasks)]
    last_bulk = max((n for n, is_bulk in enumerate(kinds) if is_bulk), default=0)
    row = 0
    for is_bulk in kinds[:last_bulk]:
        row = 0 if is_bulk else row + 1
        assert row <= in_a_row
