"""Who computes what in a step, and who has to wait for it."""

from typing import Any

from astrai_core.generation import SamplingParams
from astrai_serve.engine.kv_cache import KVCache
from astrai_serve.engine.scheduler import InferenceScheduler
from astrai_serve.engine.task import Task, TaskStatus

PAGE = 4


def scheduler(num_pages=8, **limits):
    settings: Any = {"max_running_tasks": 4, "max_step_tokens": 64} | limits
    return InferenceScheduler(KVCache(num_pages, PAGE), **settings)


def add(scheduler, task_id, num_tokens, first=None, max_tokens=9):
    """Queue a task whose prompt no other begins with, unless it is given the same `first`."""
    first = 100 * task_id if first is None else first
    task = Task(
        task_id=task_id,
        prompt_ids=tuple(range(first, first + num_tokens)),
        params=SamplingParams(),
        max_tokens=max_tokens,
        seed=0,
    )
    scheduler.add(task)
    return task


def step(scheduler):
    """Compute a step; what it computed is {task id: (start, length)}."""
    chunks = scheduler.schedule()
    scheduler.complete(chunks)
    for chunk in chunks:
        if chunk.samples:
            chunk.task.token_ids.append(7)
    scheduler.check_invariants()
    return {chunk.task.task_id: (chunk.start, chunk.length) for chunk in chunks}


def test_a_long_prompt_is_cut_and_decoding_goes_on_beside_it():
    plan = scheduler(max_step_tokens=6, max_chunk_tokens=4)
    add(plan, 0, 2)
    assert step(plan) == {0: (0, 2)}
    add(plan, 1, 9)
    assert step(plan) == {0: (2, 1), 1: (0, 4)}
    assert step(plan) == {0: (3, 1), 1: (4, 4)}
    assert step(plan) == {0: (4, 1), 1: (8, 1)}


def test_what_the_first_leaves_of_a_step_is_for_the_next():
    plan = scheduler(max_step_tokens=7)
    add(plan, 0, 5)
    add(plan, 1, 5)
    assert step(plan) == {0: (0, 5), 1: (0, 2)}
    assert step(plan) == {0: (5, 1), 1: (2, 3)}


def test_no_more_run_than_may():
    plan = scheduler(max_running_tasks=2)
    tasks = [add(plan, n, 1) for n in range(3)]
    assert step(plan).keys() == {0, 1}
    plan.remove(tasks[0], TaskStatus.FINISHED)
    assert step(plan).keys() == {1, 2}


def test_a_task_is_not_let_in_before_its_elders():
    plan = scheduler(num_pages=3)
    add(plan, 0, 5, max_tokens=4)
    assert step(plan).keys() == {0}
    add(plan, 1, 8, max_tokens=4)  # needs two pages, one is free
    add(plan, 2, 1)  # would fit
    assert step(plan).keys() == {0}


def test_headroom_stays_free_for_each_running_task_and_the_new_one():
    plan = scheduler(num_pages=4, headroom_pages=1)
    add(plan, 0, 5)  # two pages
    assert step(plan).keys() == {0}, "whoever is alone needs no headroom"
    late = add(plan, 1, 1)  # one page, and two must stay free: only two are
    assert step(plan).keys() == {0}
    assert late.status is TaskStatus.PENDING
    plan.headroom_pages = 0
    assert step(plan).keys() == {0, 1}


def test_a_task_that_takes_the_whole_cache_runs_alone_in_spite_of_headroom():
    plan = scheduler(num_pages=2, headroom_pages=1)
    add(plan, 0, 8, max_tokens=1)
    assert step(plan) == {0: (0, 8)}


def fill(num_tasks, num_pages):
    """Tasks that fill the cache, each one token short of needing another page."""
    plan = scheduler(num_pages)
    tasks = [add(plan, n, PAGE) for n in range(num_tasks)]
    assert len(step(plan)) == num_tasks
    return plan, tasks


def test_the_latest_arrival_is_sent_back_and_the_oldest_goes_on():
    plan, tasks = fill(3, num_pages=4)
    assert step(plan).keys() == {0, 1}, "the free page and that of the latest"
    assert [task.num_preemptions for task in tasks] == [0, 0, 1]
    assert (plan.running, plan.waiting) == (tasks[:2], tasks[2:])
    assert tasks[2].num_computed_tokens == 0
    assert tasks[2].num_output_tokens == 1, "what was said is kept"


def test_a_task_may_have_to_send_back_itself():
    plan, tasks = fill(2, num_pages=3)
    assert step(plan).keys() == {0}
    assert [task.num_preemptions for task in tasks] == [0, 1]


def test_nobody_is_let_in_by_a_step_that_sent_someone_back():
    plan = scheduler(num_pages=7, max_chunk_tokens=PAGE)
    add(plan, 0, 4)  # about to need a second page
    add(plan, 1, 9, first=500)
    add(plan, 2, 6, first=500)  # waits for the first page of the one before it
    late = add(plan, 3, 9)  # passes it, and takes the last three pages
    assert step(plan).keys() == {0, 1, 3}
    assert step(plan).keys() == {0, 1}
    assert late.num_preemptions == 1
    assert plan.kv.pool.num_free == 2, "and who waited needs one more page only"
    assert step(plan).keys() == {0, 1}, "but comes after who was let in before"
    assert [task.task_id for task in plan.waiting] == [3, 2]


def test_the_oldest_is_never_sent_back_and_all_finish():
    plan = scheduler(num_pages=4)
    tasks = [add(plan, n, 3, max_tokens=12) for n in range(4)]
    finished = []
    for _ in range(200):
        oldest = min((t for t in tasks if t not in finished), key=lambda t: t.task_id)
        before = oldest.num_preemptions if oldest in plan.running else None
        computed = step(plan)
        assert oldest.task_id in computed
        assert before is None or oldest.num_preemptions == before
        for task in [t for t in plan.running if t.num_output_tokens >= t.max_tokens]:
            plan.remove(task, TaskStatus.FINISHED)
            finished.append(task)
        if not plan.has_tasks:
            break
    assert set(finished) == set(tasks)
    assert plan.num_preemptions > 0
    assert plan.kv.is_idle


def test_equal_prompts_wait_for_the_first_and_let_others_pass():
    plan = scheduler(max_step_tokens=8)
    tasks = [add(plan, 0, 9, first=0), add(plan, 1, 9, first=0), add(plan, 2, 3)]
    assert step(plan) == {0: (0, 8)}, "the budget is spent"
    assert step(plan) == {0: (8, 1), 1: (8, 1), 2: (0, 3)}
    assert [task.num_cached_tokens for task in tasks] == [0, 8, 0]


def test_another_task_passes_one_that_is_worth_waiting():
    plan = scheduler(max_step_tokens=8, max_chunk_tokens=4)
    for task_id, first in enumerate((0, 0, 500)):
        add(plan, task_id, 9, first=first)
    assert step(plan) == {0: (0, 4), 2: (0, 4)}
    assert [task.task_id for task in plan.running] == [0, 2]
    assert [task.task_id for task in plan.waiting] == [1]


def test_all_run_again_from_the_start_after_all_were_sent_back():
    plan, _ = fill(3, num_pages=6)
    plan.preempt_all()
    assert plan.kv.pool.num_free == 6
    plan.kv.clear_prefixes()
    assert step(plan) == dict.fromkeys(range(3), (0, PAGE + 1))
