"""Runs as the report's tests write them."""

from tests.report.conftest import attacked, quickstart, written

__all__ = ["attacked", "quickstart", "written"]
