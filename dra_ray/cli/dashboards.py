"""`dra dashboards up`: a Prometheus for the clusters of this machine."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Annotated

import typer

from dra_ray.cli import terminal
from dra_ray.cli.options import Commands

dashboards_app = typer.Typer(
    cls=Commands, no_args_is_help=True, help="Metrics of the Ray clusters of this machine."
)


@dashboards_app.command("up")
def dashboards_up(
    port: Annotated[
        int, typer.Option(min=1, max=65535, help="Where it answers, on the loopback interface.")
    ] = 9090,
    prometheus: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="Prometheus; default: the one on the PATH."),
    ] = None,
) -> None:
    """Run a Prometheus that scrapes every Ray cluster of this machine, with our alert rules, until
    Ctrl-C; it leaves nothing behind.
    """
    from dra_ray import dashboards as job

    signal.signal(signal.SIGTERM, _interrupt)
    try:
        with job.prometheus(port, prometheus) as server:
            terminal.out.print(f"Prometheus at {server.url} (alerts: {server.url}/alerts)")
            terminal.out.print("Ctrl-C ends it")
            server.wait()
    except KeyboardInterrupt:
        raise typer.Exit from None


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
