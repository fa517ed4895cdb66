"""`dra analyse`: what the paper looked at, for runs, checkpoints, other classifiers, teachers."""

from __future__ import annotations

import dataclasses
import os
from typing import Annotated

import typer

from dra_ray import config
from dra_ray.cli import terminal
from dra_ray.cli.options import EvaluationSet, to_write
from dra_ray.config.catalogue import ANALYSES
from dra_ray.errors import ConfigError, nearest
from dra_ray.storage import Store

USUAL = {name: field.default for name, field in config.Analysis.model_fields.items()}
IN_FILES_ALONE = ("dimension", "centred_cls_95", "centred_cls_99", "centred_robust_dimension")


def analyse(
    what: Annotated[
        str,
        typer.Argument(
            metavar="NAME", help=f"{', '.join(ANALYSES)}; or all, in the order of the paper."
        ),
    ],
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...",
            help="What `dra evaluate` takes: runs, checkpoints, timm/NAME, module:function; also "
            "one teacher, which the others are compared with.",
        ),
    ],
    set_: EvaluationSet = None,
    eps_255: Annotated[
        float | None, typer.Option(min=0, help="Radius, in pixel steps of 1/255.")
    ] = None,
    norm: Annotated[str | None, typer.Option(help="linf or l2.")] = None,
    images: Annotated[int, typer.Option(min=4, help="The first N test images.")] = USUAL["images"],
    steps: Annotated[int, typer.Option(min=1, help="Of PGD on the cross-entropy.")] = USUAL[
        "steps"
    ],
    sigma: Annotated[float, typer.Option(help="Noise level at which a teacher looks.")] = USUAL[
        "sigma"
    ],
    layer: Annotated[str | None, typer.Option(help="Of a teacher; default: its usual one.")] = None,
    neighbours: Annotated[int, typer.Option(min=2, help="Of CKNNA.")] = USUAL["neighbours"],
    weights: Annotated[str | None, typer.Option(metavar="URI", help="Of timm/NAME.")] = None,
    architecture: Annotated[
        str | None, typer.Option(metavar="NAME", help="Of robustbench:URI.")
    ] = None,
    sae_steps: Annotated[
        int, typer.Option(min=1, help="Of a sparse autoencoder's training.")
    ] = USUAL["sae_steps"],
    autoattack: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=0,
            help="Of probe: also AutoAttack, and its version for randomised networks, on a head on "
            "the teacher, on the first N images.",
        ),
    ] = USUAL["autoattack"],
    seed: int = USUAL["seed"],
    to: Annotated[
        str,
        typer.Option(
            "--to",
            metavar="URI",
            help="Folder that keeps what was seen of each model, for other analyses and to go on "
            "after a kill.",
        ),
    ] = "runs/analyses",
    workers: Annotated[
        int | None,
        typer.Option(
            min=1, help="Look at models by so many Ray tasks at a time; default: in this process."
        ),
    ] = None,
    out: Annotated[
        str | None,
        typer.Option("--out", metavar="FILE", callback=to_write, help="Also write an .html page."),
    ] = None,
    json: Annotated[
        str | None,
        typer.Option(
            "--json", metavar="FILE", callback=to_write, help="Also write rows and curves, as JSON."
        ),
    ] = None,
) -> None:
    """What the paper looked at: where features lie, how alike models are, how many directions they
    need, which frequencies they heed.
    """
    if what not in (*ANALYSES, "all"):
        raise ConfigError(f"NAME '{what}': {nearest(what, [*ANALYSES, 'all'])}")
    tree = {
        "what": what,
        "models": models,
        "settings": config.parse_settings(set_ or []),
        "eps_255": eps_255,
        "norm": norm,
        "weights": weights,
        "architecture": architecture,
        "images": images,
        "steps": steps,
        "sigma": sigma,
        "layer": layer,
        "neighbours": neighbours,
        "sae_steps": sae_steps,
        "autoattack": autoattack,
        "seed": seed,
    }
    settings = config.validate(config.Analysis, tree, "dra analyse")
    with terminal.Bars() as bars:
        from dra_ray.inspection import analyses
        from dra_ray.inspection import models as job
        from dra_ray.inspection.kept import Kept

        options, how = job.asked(settings, os.cpu_count() or 1)
        kept = Store(to).resolved()
        kept.probe()
        if workers is not None:
            from dra_ray import cluster
            from dra_ray.workloads import look

            plan = look.plan(what, models, options, how)
            with cluster.connect():
                look.run(plan, kept, workers, terminal.analysis_rows(bars))
        found, looked_at = analyses.analyse(
            what,
            models,
            options,
            how,
            neighbours=neighbours,
            progress=lambda share, text: bars.show("models", share, text),
            kept=Kept(kept),
        )
    for each in found:
        shown = [
            {column: value for column, value in row.items() if column not in IN_FILES_ALONE}
            for row in each.rows
        ]
        terminal.table(shown, f"{each.title}: {looked_at['images']} test images")
        terminal.out.print(f"The paper: {each.paper}")
        terminal.out.print(f"Here: {each.here}")
    if json:
        Store(json).write_json({each.name: dataclasses.asdict(each) for each in found})
    if out:
        from dra_ray.report import analyses as page

        page.write(Store(out), ", ".join(models), looked_at, found)
