"""Every metric that we emit: its name, kind, unit and labels, and what it says.

Prometheus shows a name with the prefix `ray_`, and a counter with `_total` behind it. No label has
more values than things that run at the same time: `run` is a run, or the sweep of a trial; `trial`
stands on gauges only, which end with their trial. docs/metrics.md is the table of these.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

Kind = Literal["counter", "gauge", "histogram"]
Room = Literal["training", "pool", "sweep", "evaluation", "data"]


@dataclasses.dataclass(frozen=True)
class Metric:
    """Attributes:
    unit: of its values.
    labels: beside those that Ray adds, such as SessionName, NodeAddress and WorkerId.
    """

    name: str
    kind: Kind
    room: Room
    unit: str
    labels: tuple[str, ...]
    help: str

    @property
    def shown(self) -> str:
        """The name in Prometheus."""
        return f"ray_{self.name}{'_total' if self.kind == 'counter' else ''}"


RUN, TRIAL, POOL = ("run",), ("run", "trial"), ("teacher",)
PARTS = ("attack", "teacher_wait", "data_wait", "rest")  # of a step's time
DECISIONS = ("continue", "done", "failed", "paused", "stop", "waiting")
SECONDS = [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0]  # bounds of histograms

ALL = (
    # training
    Metric(
        "dra_train_images",
        "counter",
        "training",
        "images",
        RUN,
        "images trained on, by all workers",
    ),
    Metric(
        "dra_train_step_seconds",
        "counter",
        "training",
        "seconds",
        (*RUN, "part"),
        "time of worker 0's steps: attack, teacher_wait, data_wait and rest",
    ),
    Metric(
        "dra_train_gpu_seconds",
        "counter",
        "training",
        "seconds",
        RUN,
        "seconds of training times the GPUs that it holds; 0 on CPUs",
    ),
    Metric("dra_train_step", "gauge", "training", "steps", TRIAL, "steps done"),
    Metric(
        "dra_train_loss",
        "gauge",
        "training",
        "nats",
        (*TRIAL, "part"),
        "the newest loss in steps.jsonl: total, clean, robust, align, distill",
    ),
    Metric(
        "dra_train_accuracy",
        "gauge",
        "training",
        "share",
        (*TRIAL, "kind"),
        "accuracy at the last validation: clean, robust",
    ),
    # pool
    Metric(
        "dra_teacher_requests",
        "counter",
        "pool",
        "requests",
        (*POOL, *RUN),
        "requests that replicas answered; a long one travels in parts, each of which counts",
    ),
    Metric(
        "dra_teacher_images",
        "counter",
        "pool",
        "images",
        (*POOL, *RUN),
        "images that replicas answered",
    ),
    Metric(
        "dra_teacher_hits",
        "counter",
        "pool",
        "requests",
        (*POOL, *RUN),
        "requests answered with what another one had computed",
    ),
    Metric(
        "dra_teacher_retries",
        "counter",
        "pool",
        "requests",
        (*POOL, *RUN),
        "requests sent again after a replica died or refused",
    ),
    Metric(
        "dra_teacher_wait_seconds",
        "histogram",
        "pool",
        "seconds",
        (*POOL, *RUN),
        "time from when a training step asked for a feature until it had it",
    ),
    Metric(
        "dra_teacher_service_seconds",
        "histogram",
        "pool",
        "seconds",
        POOL,
        "time a replica spent on a request",
    ),
    Metric(
        "dra_teacher_queue_seconds",
        "histogram",
        "pool",
        "seconds",
        POOL,
        "time a request waited in a replica",
    ),
    Metric(
        "dra_teacher_queue_length",
        "gauge",
        "pool",
        "requests",
        POOL,
        "requests that wait in a replica",
    ),
    Metric(
        "dra_teacher_encoded",
        "counter",
        "pool",
        "images",
        POOL,
        "images that the teacher has encoded, padding not counted",
    ),
    Metric(
        "dra_teacher_batches",
        "counter",
        "pool",
        "micro-batches",
        POOL,
        "micro-batches that the teacher has run",
    ),
    Metric(
        "dra_teacher_replicas_running", "gauge", "pool", "replicas", POOL, "replicas that answer"
    ),
    Metric(
        "dra_teacher_replicas_target",
        "gauge",
        "pool",
        "replicas",
        POOL,
        "replicas that there are to be",
    ),
    Metric("dra_teacher_replicas_limit", "gauge", "pool", "replicas", POOL, "pool.max_replicas"),
    Metric(
        "dra_teacher_demand",
        "gauge",
        "pool",
        "replicas",
        POOL,
        "work of the last seconds, in replicas that it keeps busy",
    ),
    Metric(
        "dra_teacher_clients",
        "gauge",
        "pool",
        "workers",
        POOL,
        "training workers that sent requests lately",
    ),
    # sweep
    Metric(
        "dra_sweep_trials",
        "gauge",
        "sweep",
        "trials",
        (*RUN, "state"),
        "trials by state: running, queued (for a slot), waiting (for the rest of their rung), "
        "paused, done, stopped, failed",
    ),
    Metric(
        "dra_sweep_decisions",
        "counter",
        "sweep",
        "decisions",
        (*RUN, "decision"),
        "what followed from reports of trials: continue (at a rung, a promotion), stop, waiting, "
        "paused, done, failed",
    ),
    Metric(
        "dra_sweep_spent",
        "gauge",
        "sweep",
        "by `what`",
        (*RUN, "what"),
        "spent so far: trials, images, gpu_hours, and money where prices are known",
    ),
    Metric(
        "dra_sweep_budget",
        "gauge",
        "sweep",
        "by `what`",
        (*RUN, "what"),
        "limits of the budget that are set: trials, images, gpu_hours, money",
    ),
    Metric(
        "dra_sweep_planned",
        "gauge",
        "sweep",
        "by `what`",
        (*RUN, "what"),
        "the most that the plan expects: trials, images, and money where prices are known",
    ),
    # evaluation
    Metric(
        "dra_evaluation_batches_done",
        "gauge",
        "evaluation",
        "batches",
        (*TRIAL, "stage"),
        "batches of a stage that are done",
    ),
    Metric(
        "dra_evaluation_batches",
        "gauge",
        "evaluation",
        "batches",
        (*TRIAL, "stage"),
        "batches of a stage in all, as far as they are known",
    ),
    # data
    Metric(
        "dra_data_cache_bytes",
        "gauge",
        "data",
        "bytes",
        (),
        "copies of shards in the bounded part of a node's cache",
    ),
    Metric(
        "dra_data_cache_hits", "counter", "data", "files", (), "files that were in the node's cache"
    ),
    Metric(
        "dra_data_cache_misses", "counter", "data", "files", (), "files copied to the node's cache"
    ),
    Metric(
        "dra_data_fetched_bytes", "counter", "data", "bytes", (), "bytes copied to the node's cache"
    ),
    Metric(
        "dra_storage_retries",
        "counter",
        "data",
        "replies",
        (),
        "replies of a store that were wrong or broke off, and were asked for again",
    ),
    Metric(
        "dra_storage_errors",
        "counter",
        "data",
        "errors",
        (),
        "reads and writes of a store that failed; a file that is not there is no error",
    ),
)
BY_NAME = {metric.name: metric for metric in ALL}


def table() -> str:
    """The table of docs/metrics.md."""
    rows = ["| name in Prometheus | kind | unit | labels | says |", "|---|---|---|---|---|"]
    for metric in ALL:
        labels = ", ".join(f"`{label}`" for label in metric.labels) or "-"
        rows.append(
            f"| `{metric.shown}` | {metric.kind} | {metric.unit} | {labels} | {metric.help} |"
        )
    return "\n".join(rows)


if __name__ == "__main__":
    print(table())
