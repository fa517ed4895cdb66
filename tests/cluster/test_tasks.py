"""A bounded number of tasks at a time; none is left behind, however the block ends."""

import time

import pytest
import ray

from dra_ray.storage import Store
from dra_ray.workloads.tasks import Tasks


@ray.remote(num_cpus=0)
def nap(seconds, file=None):
    time.sleep(seconds)
    if file is not None:
        file.write_bytes(b"done")
    return seconds


def test_every_task_ends_once_and_never_more_than_so_many_run(ray_cluster):
    waiting, running, most, ended = list(range(7)), set(), 0, []

    def submit():
        nonlocal most
        if not waiting:
            return None
        key = waiting.pop(0)
        running.add(key)
        most = max(most, len(running))
        return nap.remote(0.01 * key), key

    with Tasks(3) as tasks:
        for ref, key in tasks.finished(submit):
            assert ray.get(ref) == pytest.approx(0.01 * key)
            running.remove(key)
            ended.append(key)
            if key == 6 and len(ended) < 9:  # what a task's end makes possible is started then
                waiting.append(7)
    assert sorted(ended) == list(range(8))
    assert most == 3


def test_an_error_in_the_loop_cancels_what_runs(ray_cluster, tmp_path):
    file = Store(str(tmp_path)) / "late"
    todo = [(nap.remote(0), "quick"), (nap.remote(4, file), "slow")]
    with pytest.raises(KeyboardInterrupt), Tasks(2) as tasks:  # noqa: PT012
        for _, key in tasks.finished(lambda: todo.pop(0) if todo else None):
            assert key == "quick"
            raise KeyboardInterrupt
    time.sleep(5)
    assert not file.exists()


def test_chosen_tasks_are_cancelled_and_never_seen(ray_cluster):
    todo = [(nap.remote(seconds), key) for key, seconds in (("a", 0), ("b", 60), ("c", 1))]
    seen = []
    with Tasks(3) as tasks:
        for _, key in tasks.finished(lambda: todo.pop(0) if todo else None):
            seen.append(key)
            tasks.cancel(lambda key: key == "b")
    assert seen == ["a", "c"]
