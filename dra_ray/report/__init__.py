"""The report of a run: `collect` reads it, `write` makes summary.json and report.html, `rows` is
its trial table. Several sweeps are compared by `versus.write`.
"""

from dra_ray.report.collect import collect, rows
from dra_ray.report.findings import answered
from dra_ray.report.page import write

__all__ = ["answered", "collect", "rows", "write"]
