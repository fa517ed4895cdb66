"""A page that keeps up with a run, and stops when the run ends."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from dra_ray import report, runs
from dra_ray.cli import status
from dra_ray.storage import Store

REFRESH = '<meta http-equiv="refresh" content="7">'


def test_only_a_page_of_a_run_that_goes_on_refreshes(make_train: Callable[..., Store]) -> None:
    run = make_train()
    page = report.write(run, refresh_s=7)
    assert page.read_text().count(REFRESH) == 1
    following = page.read_text()
    assert report.write(run).read_text() == following.replace(f"{REFRESH}\n", "")


def test_it_is_written_until_the_run_ends(make_train: Callable[..., Store]) -> None:
    run = make_train(status="running")
    thread = threading.Thread(target=status.follow_page, args=(run, 1), daemon=True)
    thread.start()
    deadline = time.monotonic() + 300
    while not (run / runs.REPORT).exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert thread.is_alive()
    runs.update_manifest(run, runs.Facts(status="done"))
    thread.join(300)
    assert not thread.is_alive()
