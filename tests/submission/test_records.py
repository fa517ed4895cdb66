"""What a submission comes to, by the jobs that a cluster has."""

from __future__ import annotations

import dataclasses

import pytest

from dra_ray.errors import ConfigError
from dra_ray.submission.records import Job, meant, next_step
from dra_ray.submission.work import Work

WORK = Work("train", "s3://bucket/runs", "mine", {"optim": {"epochs": 2}, "budget": {"trials": 3}})
WIDER = dataclasses.replace(WORK, tree={"optim": {"epochs": 2}, "budget": {"trials": 9}})
BASE = WORK.base_id


def job(id_: str, status: str, work: Work = WORK) -> Job:
    return Job(id_, status, work.kind, work.name, work.run.uri, exact=work.exact)


@pytest.mark.parametrize("status", ["PENDING", "RUNNING"])
def test_a_job_that_has_not_ended_is_attached_to(status: str) -> None:
    step = next_step(WORK, [job(BASE, "FAILED"), job(f"{BASE}-2", status)])
    assert (step.id, step.outcome) == (f"{BASE}-2", "attached")
    assert step.job is not None


def test_work_that_has_succeeded_is_done_until_it_is_wanted_again_or_changed() -> None:
    found = [job(BASE, "SUCCEEDED")]
    assert next_step(WORK, found).outcome == "done"
    again = next_step(WORK, found, again=True)
    assert (again.id, again.job, again.outcome) == (f"{BASE}-2", None, "started")
    assert WIDER.base_id == BASE, "a budget changes no result"
    assert next_step(WIDER, found).id == f"{BASE}-2"
    assert next_step(WIDER, [*found, job(f"{BASE}-2", "SUCCEEDED", WIDER)]).outcome == "done"


@pytest.mark.parametrize("status", ["FAILED", "STOPPED"])
def test_what_failed_or_was_stopped_gets_another_attempt(status: str) -> None:
    assert next_step(WORK, [job(BASE, status)]).id == f"{BASE}-2"
    many = [job(f"{BASE}-{number}", status) for number in (10, 9, 2)] + [job(BASE, status)]
    assert next_step(WORK, many).id == f"{BASE}-11"


def test_jobs_of_other_work_do_not_count() -> None:
    others = [job(f"{BASE}-x", "RUNNING"), job(f"{BASE}x", "RUNNING"), job("other", "RUNNING")]
    step = next_step(WORK, others)
    assert (step.id, step.job, step.outcome) == (BASE, None, "started")


def test_which_job_a_user_means() -> None:
    other = dataclasses.replace(WORK, name="mine-too", tree={"optim": {"epochs": 3}})
    first, second = job(BASE, "FAILED"), job(f"{BASE}-2", "RUNNING")
    third, strange = job(other.base_id, "RUNNING", other), Job("raysubmit_x", "RUNNING")
    jobs = [first, second, third, strange]
    assert meant(BASE, jobs) == first
    assert meant("mine", jobs) == second
    assert meant(BASE[:-3], jobs) == second
    assert meant("mine-too", jobs) == third
    assert meant("ray", jobs) == strange
    with pytest.raises(ConfigError, match=f"several jobs: .*{third.id}"):
        meant("train-", jobs)
    for text in ("nobody", ""):
        with pytest.raises(ConfigError, match="there is no job"):
            meant(text, jobs)
