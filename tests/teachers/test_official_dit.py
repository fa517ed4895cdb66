import pytest
import torch

from dra_ray.errors import CheckpointError, ConfigError, DataError
from dra_ray.storage import Store
from dra_ray.teachers import checkpoint
from dra_ray.teachers.dit import LatentDiT
from dra_ray.teachers.official_dit import import_dit
from tests.teachers.test_dit import TINY, VAE_TINY, latent_dit, trained


@pytest.fixture
def files(tmp_path):
    """The three files as their authors write them."""
    net, root = latent_dit(), Store(str(tmp_path))
    (root / "dit.pt").write_torch(
        {
            "ema": {f"module.{name}": tensor for name, tensor in net.dit.state_dict().items()},
            "opt": {},
        }
    )
    (root / "vae.pt").write_torch(
        {"state_dict": dict(net.vae.state_dict()) | {"loss.logvar": torch.ones(())}}
    )
    (root / "stats.pt").write_torch({"mean": net.latent_mean, "std": net.latent_std})
    return net, root, (root / "dit.pt", root / "vae.pt", root / "stats.pt")


def test_it_encodes_as_its_parts_do(files):
    net, root, parts = files
    card = import_dit(*parts, root / "teacher", massive=(3,), sizes=VAE_TINY)
    assert card["digest"] == checkpoint.digest(root / "teacher")
    assert card["source"]["dit"]["file"] == "dit.pt"
    assert len(card["source"]["stats"]["sha256"]) == 64
    made = checkpoint.load(root / "teacher", LatentDiT)
    assert made.dit.sizes.massive == (3,)
    assert made.vae.decoder is None
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    assert torch.equal(made.clean(images), net.clean(images))
    assert import_dit(*parts, root / "teacher", massive=(3,), sizes=VAE_TINY) == card
    whole = import_dit(
        *parts, root / "whole", massive=(), resolution=6, decoder=True, sizes=VAE_TINY
    )
    assert checkpoint.load(root / "whole", LatentDiT).vae.decoder is not None
    assert whole["data"]["resolution"] == 6


def test_what_does_not_fit_is_refused(files):
    _, root, (dit, vae, stats) = files
    import_dit(dit, vae, stats, root / "teacher", massive=(), sizes=VAE_TINY)
    (root / "other.pt").write_torch(trained(seed=1).state_dict())
    with pytest.raises(ConfigError, match="holds another teacher"):
        import_dit(root / "other.pt", vae, stats, root / "teacher", massive=(), sizes=VAE_TINY)
    with pytest.raises(CheckpointError, match="holds no weights"):
        import_dit(vae, vae, stats, root / "new", massive=(), sizes=VAE_TINY)
    with pytest.raises(CheckpointError, match="not of this VA-VAE"):
        import_dit(dit, vae, stats, root / "new", massive=())
    with pytest.raises(ConfigError, match=f"channel 99, but net.hidden={TINY.hidden}"):
        import_dit(dit, vae, stats, root / "new", massive=(99,), sizes=VAE_TINY)
    (root / "broken.pt").write_bytes(b"no torch file")
    with pytest.raises(DataError, match="broken.pt"):
        import_dit(root / "broken.pt", vae, stats, root / "new", sizes=VAE_TINY)
    assert not (root / "new").exists()
