"""`dra analyse`: what the paper looked at, for runs, checkpoints, other classifiers, teachers."""

from __future__ import annotations

import dataclasses
import os
from typing import Annotated

import typer

from dra_ray import config
from dra_ray.cli import terminal
from dra_ray.cli.options import EvaluationSet, to_write
from dra_ray.errors import ConfigError, nearest
from dra_ray.storage import Store

OF_MODELS = ("geometry", "similarity", "dimension", "frequency")  # of inspection.analyses
NAMES = (*OF_MODELS, "probe")
IN_FILES_ALONE = ("dimension", "centred_cls_95", "centred_cls_99", "centred_robust_dimension")


def analyse(
    what: Annotated[
        str,
        typer.Argument(
            metavar="NAME", help=f"{', '.join(NAMES)}; or all, in the order of the paper."
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
    images: Annotated[int, typer.Option(min=4, help="The first N test images.")] = 1000,
    steps: Annotated[int, typer.Option(min=1, help="Of PGD on the cross-entropy.")] = 20,
    sigma: Annotated[float, typer.Option(help="Noise level at which a teacher looks.")] = 0.06,
    layer: Annotated[str | None, typer.Option(help="Of a teacher; default: its usual one.")] = None,
    neighbours: Annotated[int, typer.Option(min=2, help="Of CKNNA.")] = 10,
    weights: Annotated[str | None, typer.Option(metavar="URI", help="Of timm/NAME.")] = None,
    architecture: Annotated[
        str | None, typer.Option(metavar="NAME", help="Of robustbench:URI.")
    ] = None,
    seed: int = 0,
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
    if what not in (*NAMES, "all"):
        raise ConfigError(f"NAME '{what}': {nearest(what, [*NAMES, 'all'])}")
    with terminal.Bars() as bars:
        from dra_ray.evaluation.subjects import Options
        from dra_ray.inspection import analyses
        from dra_ray.inspection import models as job

        how = job.How(images, steps, sigma, layer, seed, os.cpu_count() or 1)
        changes = config.parse_settings(set_ or [])
        options = Options(changes, eps_255, norm, weights=weights, architecture=architecture)
        teachers = [model for model in models if job.is_teacher(model)]
        if len(teachers) > 1:
            raise ConfigError(
                f"'{teachers[1]}' is a second teacher beside '{teachers[0]}'; give one at a time"
            )
        chosen = [job.subject(model, options, how) for model in models if model not in teachers]
        if not chosen:
            raise ConfigError(f"'{teachers[0]}' is a teacher; give a classifier beside it")
        job.require_alike(chosen)
        reference = None
        if teachers:
            bars.stage("looking at the teacher")
            reference = job.look_at_teacher(teachers[0], chosen[0].images, how)
        elif what == "probe":
            raise ConfigError("probe looks at a head on a teacher; give a teacher among the models")
        seen = []
        for number, subject in enumerate(chosen if what != "probe" else []):

            def show(done: int, number: int = number, name: str = subject.name) -> None:
                share = (number + done / len(chosen[number].images)) / len(chosen)
                bars.show("models", share, f"attacking '{name}'")

            seen.append(job.look(subject, how, show))
        found = []
        for name in (n for n in OF_MODELS if what in (n, "all")):
            more = {"neighbours": neighbours} if name == "similarity" else {}
            found.append(analyses.ANALYSES[name](seen, reference, **more))
        if teachers and what in ("probe", "all"):
            bars.stage("attacking a head on the teacher")
            curves = job.probe_under_attack(teachers[0], chosen[0], how)
            curves += [job.by_radius(subject, how) for subject in chosen]
            found.append(analyses.of_probe(curves))
    for each in found:
        shown = [
            {column: value for column, value in row.items() if column not in IN_FILES_ALONE}
            for row in each.rows
        ]
        terminal.table(shown, f"{each.title}: {len(chosen[0].images)} test images")
        terminal.out.print(f"The paper: {each.paper}")
        terminal.out.print(f"Here: {each.here}")
    if json:
        Store(json).write_json({each.name: dataclasses.asdict(each) for each in found})
    if out:
        from dra_ray.report import analyses as page

        threat = chosen[0].experiment.threat
        facts = {
            "images": len(chosen[0].images),
            "PGD steps": steps,
            "eps": f"{threat.eps_255:g}/255 {threat.norm}",
            "seed": seed,
        } | ({"teacher": teachers[0], "sigma": sigma, "layer": layer} if teachers else {})
        page.write(Store(out), ", ".join(subject.name for subject in chosen), facts, found)
