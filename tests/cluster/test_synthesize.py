import os
import signal
import subprocess
import sys

import pytest
import torch
from ray.util.state import list_actors

from dra_ray import data, runs
from dra_ray.config import Data, Synthesis, TeacherTraining, UNet
from dra_ray.data import checking, in_memory, rows, synthetic
from dra_ray.errors import ConfigError
from dra_ray.storage import Store
from dra_ray.teachers import checkpoint
from dra_ray.workloads import synthesize, train_teacher
from tests.cluster.small import ASK, go_on, next_row, some_running

TINY = TeacherTraining(
    net=UNet(model_channels=16),
    images_seen=6400,
    batch=32,
    warmup_images=640,
    checkpoint_images=1600,
)


def trained_without_ray(config: TeacherTraining) -> train_teacher.Training:
    before = torch.get_num_threads()
    torch.set_num_threads(config.resources.threads_per_worker)
    training = train_teacher.Training(config, data.load(config.data))
    while training.step < training.steps:
        training.advance(training.net)
    torch.set_num_threads(before)
    return training


@pytest.fixture(scope="module")
def plain():
    return trained_without_ray(TINY)


@pytest.fixture(scope="module")
def teacher(plain, tmp_path_factory):
    store = Store(str(tmp_path_factory.mktemp("teacher")))
    checkpoint.save(store, plain.average, plain.card())
    return store


def shards(store: Store) -> dict[str, bytes]:
    return {name: (store / name).read_bytes() for name in store.names() if name.endswith(".npy")}


@pytest.mark.slow
def test_a_killed_worker_changes_no_bit(ray_cluster, plain, tmp_path):
    store = Store(str(tmp_path / "teacher"))
    killed, rows_at_kill = [], []

    def kill_once(row):
        if row.images_seen >= 2400 and not killed:  # after the first checkpoint
            rows_at_kill.append(row.at)
            killed.extend(
                actor.pid
                for actor in list_actors(
                    filters=[("class_name", "=", "RayTrainWorker"), ("state", "=", "ALIVE")]
                )
            )
            for pid in killed:
                os.kill(pid, signal.SIGKILL)

    manifest = train_teacher.fit(TINY, store, kill_once)
    assert killed
    rows = (store / "metrics.jsonl").read_jsonl()
    assert manifest.is_done
    assert manifest.teacher_digest == checkpoint.save(
        Store(str(tmp_path / "plain")), plain.average, {}
    )
    assert [row["images_seen"] for row in rows] == sorted({row["images_seen"] for row in rows})
    assert rows[-1]["images_seen"] == 6400
    assert (
        rows[0]["at"] < rows_at_kill[0] < rows[-1]["at"]
    )  # it went on from a checkpoint, not from the start
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert {"samples-1600.png", "samples-6400.png"} <= set(store.names())

    assert train_teacher.fit(TINY, store) == manifest  # finished: returned at once
    with pytest.raises(ConfigError, match=r"lr is 0.001 there and 0.002 now.*another --name"):
        train_teacher.fit(TINY.model_copy(update={"lr": 2e-3}), store)


def test_two_workers_split_the_same_batch(plain):
    """The mean of the slices' gradients is the gradient of the batch, whatever the number of
    workers.
    """
    images = data.load(TINY.data)
    whole, *halves = (train_teacher.Training(TINY, images) for _ in range(3))
    losses = [half.advance(half.net, rank, world=2) for rank, half in enumerate(halves)]
    assert torch.allclose(whole.advance(whole.net), torch.stack(losses).mean(), rtol=1e-5)
    for together, *parts in zip(
        whole.net.parameters(), *(half.net.parameters() for half in halves), strict=True
    ):
        if together.grad is not None:
            assert torch.allclose(
                together.grad,
                (parts[0].grad + parts[1].grad) / 2,
                rtol=1e-3,
                atol=1e-4 * float(together.grad.abs().max()) + 1e-9,
            )


def test_bytes_do_not_depend_on_who_makes_them(ray_cluster, teacher, tmp_path):
    config = Synthesis(
        teacher=teacher.uri, images=130, steps=4, batch=20, shard_images=40, workers=1
    )
    one, two = Store(str(tmp_path / "one")), Store(str(tmp_path / "two"))
    shown = []
    manifest = synthesize.run(config, one, shown.append)
    synthesize.run(config.model_copy(update={"workers": 2}), two)
    made = shards(one)
    assert list(made) == [f"shard-{index:05d}.npy" for index in range(4)]
    assert made == shards(two)
    assert [row.images for row in shown] == [40, 80, 120, 130]
    assert manifest.counts == {str(label): 13 for label in range(10)}
    assert manifest.teacher_digest == checkpoint.digest(teacher)
    assert synthesize.run(config, one) == manifest

    # a job that stopped early, with a missing and a damaged shard, goes on to the same bytes
    two_manifest = (two / "manifest.json").read_json()
    (two / "manifest.json").write_json(two_manifest | {"status": "running"})
    os.unlink((two / "shard-00001.npy").uri)
    (two / "shard-00003.npy").write_bytes(made["shard-00003.npy"][:100])
    synthesize.run(config, two)
    assert shards(two) == made

    split = in_memory(synthetic.read(one, 130, data.load(Data())))
    assert split.images.shape == (130, 1, 8, 8)
    assert torch.equal(split.labels, torch.arange(130) % 10)

    longer, more = Store(str(tmp_path / "longer")), config.model_copy(update={"images": 160})
    synthesize.run(more, longer)
    whole = in_memory(synthetic.read(longer, 160, data.load(Data())))
    assert torch.equal(whole.images[:130], split.images)

    # a set that is there grows: what it has stays, and what comes is what a larger one has
    facts = data.picture_facts(synthetic.read(one, 130, data.load(Data())))
    grown = synthesize.run(more, one)
    assert grown.is_done
    assert [grown.shards[name] for name in made] == list(manifest.shards.values())
    assert [shard.images for shard in rows.read_index(one).shards] == [40, 40, 40, 10, 30]
    assert torch.equal(in_memory(synthetic.read(one, 160, data.load(Data()))).images, whole.images)
    assert data.picture_facts(synthetic.read(one, 130, data.load(Data()))) == facts
    assert checking.check(one).images == 160
    with pytest.raises(ConfigError, match="images is 160 there and 130 now"):
        synthesize.run(config, one)

    with pytest.raises(ConfigError, match="seed is 0 there and 1 now"):
        synthesize.run(more.model_copy(update={"seed": 1}), one)


def test_a_teacher_is_needed(tmp_path):
    with pytest.raises(ConfigError, match="teacher is not set"):
        synthesize.run(Synthesis(), Store(str(tmp_path)))


SYNTHESIZE = f"""
import sys
{ASK}
from dra_ray import cluster, config
from dra_ray.storage import Store
from dra_ray.workloads import synthesize

with cluster.connect():
    settings = config.Synthesis.model_validate_json(sys.argv[1])
    synthesize.run(settings, Store(sys.argv[2]), lambda row: ask(row.images))
"""


@pytest.mark.slow
def test_killed_workers_and_a_killed_driver_change_no_byte(ray_cluster, teacher, tmp_path):
    config = Synthesis(
        teacher=teacher.uri, images=2000, steps=8, batch=100, shard_images=200, workers=2
    )
    quiet, disturbed = Store(str(tmp_path / "quiet")), Store(str(tmp_path / "disturbed"))
    synthesize.run(config, quiet)

    (tmp_path / "driver.py").write_text(SYNTHESIZE)
    environment = os.environ | {"RAY_ADDRESS": ray_cluster.address_info["gcs_address"]}
    command = [sys.executable, str(tmp_path / "driver.py"), config.model_dump_json(), disturbed.uri]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True)
    os.kill(some_running("_make", 120)[0], signal.SIGKILL)
    assert next_row(process), "the driver goes on without that worker"
    go_on(process)
    assert next_row(process), "the driver goes on after its first shard"
    process.kill()
    process.communicate()
    before = set(shards(disturbed))
    assert 2 <= len(before) < 10, "half-way"

    rows = []
    manifest = synthesize.run(config, disturbed, rows.append)
    assert shards(disturbed) == shards(quiet)
    assert manifest.shards == runs.read_manifest(quiet).shards
    assert manifest.counts == {str(label): 200 for label in range(10)}
