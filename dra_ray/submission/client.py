"""Ray's Jobs API, as a user of it sees it: submit work once, follow, list and stop jobs."""

from __future__ import annotations

import asyncio
import logging
import os
import shlex
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import aiohttp
import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobSubmissionClient, JobType

from dra_ray.errors import ClusterError, RunError
from dra_ray.storage import Store
from dra_ray.submission import door
from dra_ray.submission.records import Job, Submitted, meant, next_step
from dra_ray.submission.work import Code, Work

# of a request; the first also bounds each part of an upload that is sent
SEND_S, ANSWER_S = 60.0, 120.0
START_S = 60.0  # for which a head that has just started may have no job agent
GONE_S = 120.0  # for which a cluster may be away while a job is followed
_ADDRESS = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")  # Ray would take them before ours
_QUIET = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
)
_EXCLUDES = ["**/__pycache__", "*.pyc"]


class Client(JobSubmissionClient):
    """Ray's client, whose requests end."""

    def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
        return super()._do_request(method, endpoint, **({"timeout": (SEND_S, ANSWER_S)} | options))


class Jobs:
    """The jobs of a cluster.

    Raises `ConfigError` for an address that is none, `ClusterError` where nobody answers there or
    it does not let us in.
    """

    def __init__(self, address: str) -> None:
        self.address, headers = door.opened(address)
        for name in _QUIET:
            logging.getLogger(name).setLevel(logging.ERROR)
        with _without(_ADDRESS), self._answering():
            self._client = Client(self.address, headers=headers)

    # -- submitting --------------------------------------------------------------------------------
    def submit(self, work: Work, code: Code, again: bool = False) -> Submitted:
        """Start the work, unless a job of it runs, or has succeeded and no field has changed since.
        After one that failed or was stopped a new job goes on, under the next free id.

        Args:
            again: also start it where it has succeeded.
        """
        while True:
            step = next_step(work, self.jobs(), again)
            if step.job:
                return Submitted(step.job, step.outcome)
            if self._start(work, code, step.id):
                return Submitted(self.job(step.id), step.outcome)

    def _start(self, work: Work, code: Code, new: str) -> bool:
        """Whether the job is ours: somebody else may have taken its id at this moment."""
        deadline = time.monotonic() + START_S
        with tempfile.TemporaryDirectory(prefix="dra-submit-") as folder:
            for name, content in work.files().items():
                (Store(folder) / name).write_bytes(content)
            environment: dict[str, Any] = {"working_dir": folder, "env_vars": work.environment()}
            if code == "tree":
                package = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
                environment |= {"py_modules": [package], "excludes": _EXCLUDES}
            while True:
                try:
                    with self._answering():
                        self._client.submit_job(
                            entrypoint=shlex.join(work.command()),
                            submission_id=new,
                            runtime_env=environment,
                            metadata=work.labels(),
                        )
                    return True
                except _Refused as error:
                    if "already exists" in error.text:
                        return False
                    if "No available agent" not in error.text or time.monotonic() > deadline:
                        raise
                    time.sleep(1.0)

    # -- looking -----------------------------------------------------------------------------------
    def jobs(self) -> list[Job]:
        """All that were submitted, the oldest first."""
        with self._answering():
            found = self._client.list_jobs()
        jobs = [_job(each) for each in found if each.type == JobType.SUBMISSION]
        return sorted(jobs, key=lambda job: job.started or 0.0)

    def job(self, id_: str) -> Job:
        with self._answering():
            return _job(self._client.get_job_info(id_))

    def named(self, text: str) -> Job:
        """The job that a user means: an id, its beginning, or a run's name; of several attempts the
        last. `ConfigError` where none or several are meant.
        """
        return meant(text, self.jobs())

    def log(self, id_: str) -> str:
        with self._answering():
            return str(self._client.get_job_logs(id_))

    def follow(self, id_: str, show: Callable[[str], None]) -> Job:
        """Hand the job's log to `show` as it grows, from its beginning; the job, once it has ended.
        A connection that breaks is made anew; `ClusterError` where it stays away.
        """
        seen, away_since = 0, None
        while True:
            try:
                seen = asyncio.run(self._tail(id_, seen, show))
            except _Cut as cut:
                seen = cut.seen
            try:
                job = self.job(id_)
                away_since = None
                if job.has_ended:
                    show(self.log(id_)[seen:])
                    return job
            except ClusterError:
                now = time.monotonic()
                away_since = away_since or now
                if now - away_since > GONE_S:
                    raise
            time.sleep(1.0)

    async def _tail(self, id_: str, seen: int, show: Callable[[str], None]) -> int:
        """Characters of the log that were shown until the connection ended; it comes from the
        beginning, of which `seen` have been shown.
        """
        position = 0
        try:
            async for part in self._client.tail_job_logs(id_):
                if new := part[max(0, seen - position) :]:
                    show(new)
                position += len(part)
                seen = max(seen, position)
        except (RuntimeError, aiohttp.ClientError, OSError):
            raise _Cut(seen) from None
        return seen

    def stop(self, id_: str, timeout_s: float) -> Job:
        """Ask the job to end after the step under way, and wait until it has; `RunError` where it
        has not in time.
        """
        with self._answering():
            self._client.stop_job(id_)
        deadline = time.monotonic() + timeout_s
        while not (job := self.job(id_)).has_ended:
            if time.monotonic() > deadline:
                raise RunError(f"job '{id_}' has not ended {timeout_s:g} s after it was told to")
            time.sleep(0.5)
        return job

    @contextmanager
    def _answering(self) -> Iterator[None]:
        """What requests raise, as our errors on one line."""
        try:
            yield
        except AuthenticationError as error:
            status = 401 if "required" in str(error).splitlines()[0] else 403
            raise door.not_let_in(self.address, status) from None
        except (requests.RequestException, ConnectionError) as error:
            raise door.unanswered(self.address, error) from None
        except RuntimeError as error:  # Ray's, for any answer but 200
            raise _Refused(self.address, str(error)) from None


class _Refused(ClusterError):
    """A request that the dashboard answers with an error, in its own `text`."""

    def __init__(self, address: str, text: str) -> None:
        super().__init__(f"'{address}' refuses: {_last_line(text)}")
        self.text = text


class _Cut(Exception):
    """A connection that broke, after so many characters of a log were shown."""

    def __init__(self, seen: int) -> None:
        self.seen = seen


def _job(details: JobDetails) -> Job:
    labels = details.metadata or {}
    return Job(
        id=details.submission_id or "",
        status=str(getattr(details.status, "value", details.status)),
        kind=labels.get("dra_kind", ""),
        name=labels.get("dra_name", ""),
        run=labels.get("dra_run", ""),
        started=details.start_time / 1000 if details.start_time else None,
        ended=details.end_time / 1000 if details.end_time else None,
        exit_code=details.driver_exit_code,
        message=details.message or "",
        exact=labels.get("dra_exact", ""),
    )


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no reason given"


@contextmanager
def _without(names: tuple[str, ...]) -> Iterator[None]:
    before = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(before)
