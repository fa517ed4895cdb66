"""Import of NVlabs's pickles: the whole way for files of their layout, and one clear line for
everything else.
"""

import io
import os
import pickle
import pickletools

import pytest
import torch

from dra_ray import storage
from dra_ray.config import UNet
from dra_ray.errors import CheckpointError, ConfigError, StorageError
from dra_ray.storage import Store
from dra_ray.teachers import checkpoint
from dra_ray.teachers.edm import EDM
from dra_ray.teachers.official import LARGEST_BYTES, import_edm
from tests.teachers import official_file

TINY = UNet(
    model_channels=16, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(4,), augment_dim=9
)


def tiny(**options) -> EDM:
    torch.manual_seed(0)
    return EDM(TINY, 8, 1, 10, **options).eval().requires_grad_(False)


@pytest.fixture
def folder(tmp_path):
    return Store(str(tmp_path))


def written(folder: Store, value: object) -> Store:
    (folder / "net.pkl").write_bytes(
        value if isinstance(value, bytes) else official_file.pickled(value)
    )
    return folder / "net.pkl"


def refused(folder: Store, value: object, match: str) -> None:
    """The import ends in one line that matches, and leaves nothing behind."""
    source = written(folder, value)
    with pytest.raises(CheckpointError, match=match) as caught:
        import_edm(source, folder / "teacher")
    assert "net.pkl" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert folder.names() == ["net.pkl"]


# -- the whole way ---------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("precondition", "style"),
    [("edm", "ddpmpp"), ("vp", "ddpmpp"), ("ve", "ncsnpp"), ("edm", "ncsnpp")],
)
def test_import(folder, precondition, style):
    net = tiny(precondition=precondition, style=style)
    canary = folder / "canary"
    source = written(folder, official_file.content(net, f"open({canary.uri!r}, 'w').close()"))
    card = import_edm(source, folder / "teacher")
    loaded = checkpoint.load(folder / "teacher", EDM)
    assert loaded.architecture == net.architecture
    weights, wanted = loaded.state_dict(), net.state_dict()
    assert weights.keys() == wanted.keys()
    assert all(torch.equal(weights[name], wanted[name]) for name in wanted)
    x, sigma = torch.randn(2, 1, 8, 8), torch.tensor([0.06, 1.0])
    assert torch.equal(loaded(x, sigma), net(x, sigma))
    assert not canary.exists()
    assert card == checkpoint.read_card(folder / "teacher")
    assert card["source"]["sha256"] == storage.sha256(source.read_bytes())
    assert card["source"]["file"] == "net.pkl"
    assert card["source"]["arguments"]["dropout"] == 0.13
    assert "CC BY-NC-SA 4.0" in card["licence"]
    assert card["trained_on"]["name"] == "cifar10"
    assert card["trained_on"]["max_size"] == 50000


def test_the_file_names_what_the_official_one_names(folder):
    """The globals of a file that NVlabs/edm itself wrote (commit 008a4e5, torch 2.14, numpy 2), but
    for EasyDict of older ones.
    """
    texts, found = [], set()
    for operation, argument, _ in pickletools.genops(
        official_file.pickled(official_file.content(tiny()))
    ):
        if operation.name == "STACK_GLOBAL":
            found.add(texts[-1])
        elif isinstance(argument, str):
            texts.append(argument)
    assert found == {
        "_reconstruct_persistent_obj",
        "OrderedDict",
        "_rebuild_parameter",
        "_rebuild_tensor_v2",
        "_load_from_bytes",
        "ModuleDict",
        "scalar",
        "dtype",
        "EasyDict",
    }


def test_importing_again(folder):
    source = written(folder, official_file.content(tiny()))
    card = import_edm(source, folder / "teacher")
    assert import_edm(source, folder / "teacher") == card
    other = tiny()
    next(other.parameters()).add_(1)
    source = written(folder, official_file.content(other))
    with pytest.raises(ConfigError, match="holds another teacher"):
        import_edm(source, folder / "teacher")
    assert checkpoint.read_card(folder / "teacher") == card


# -- hostile and damaged files ---------------------------------------------------------------------
class Call:
    """Pickles as a call of `function`."""

    def __init__(self, function, *given):
        self.given = function, given

    def __reduce__(self):
        return self.given


@pytest.mark.parametrize("place", ["top", "ema", "state", "loss_fn", "argument"])
def test_a_command_is_never_run(folder, place, tmp_path):
    call = Call(os.system, f"touch {tmp_path}/canary")
    value = official_file.content(tiny())
    if place == "state":
        value["ema"].meta["state"]["harmless"] = call
    elif place == "argument":
        value["ema"].meta["state"]["_init_kwargs"]["dropout"] = call
    else:
        value = call if place == "top" else value | {place: call}
    refused(folder, value, r"asks for (posix|nt)\.system")


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (Call(eval, "1"), "builtins.eval"),
        (Call(exec, "pass"), "builtins.exec"),
        (Call(getattr, "x", "upper"), "builtins.getattr"),
        (Call(__import__, "os"), "builtins.__import__"),
        (Call(pickle.loads, b"N."), "_pickle.loads"),
        (Call(torch.load, "x"), "torch.serialization.load"),
    ],
)
def test_names_are_refused(folder, call, name):
    refused(folder, {"ema": call}, name)


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x04c"
        # an attribute of what is known
        + b"torch_utils.persistence\n_reconstruct_persistent_obj.__globals__\n.",
        b"\x80\x04c" + b"torch_utils.persistence\n__builtins__\n.",
        b"\x80\x02cos\nsystem\n(S'true'\ntR.",
        b"(S'true'\nios\nsystem\n.",
        b"\x80\x02\x82\x01.",  # an extension code
        b"\x80\x02Q.",  # a persistent id
    ],
)
def test_other_ways_to_a_name(folder, data):
    refused(folder, data, "can be read safely")


def test_stand_ins_are_not_changed(folder):
    """A state given to a stand-in is lost with the file: the next import is as good as before."""
    for name in (
        b"collections\nOrderedDict\n",
        b"torch._utils\n_rebuild_tensor_v2\n",
        b"torch.nn.modules.container\nModuleDict\n",
    ):
        changes = b"N}(X\x05\x00\x00\x00_makeNX\x04\x00\x00\x00dataNu\x86b"
        refused(folder, b"\x80\x02c" + name + changes + b".", "can be read safely")
    assert (
        import_edm(written(folder, official_file.content(tiny())), folder / "teacher")[
            "architecture"
        ]["num_classes"]
        == 10
    )


class Storage:
    """Pickles as a tensor's numbers in any bytes."""

    def __init__(self, data):
        self.data = data

    def __reduce__(self):
        return torch.storage._load_from_bytes, (self.data,)


class View:
    def __init__(self, numbers, offset, size, stride):
        self.given = numbers, offset, size, stride, False, {}

    def __reduce__(self):
        return torch._utils._rebuild_tensor_v2, self.given


def saved(value: object, **options) -> bytes:
    torch.save(value, buffer := io.BytesIO(), **options)
    return buffer.getvalue()


def with_weight(value: object) -> dict:
    """A good file but for one weight."""
    made = official_file.content(tiny())
    unet = made["ema"].meta["state"]["_modules"]["model"].meta["state"]
    unet["_modules"]["map_layer0"].meta["state"]["_parameters"]["bias"] = value
    return made


def numbers(count: int) -> Storage:
    return Storage(saved(torch.zeros(count).storage(), _use_new_zipfile_serialization=False))


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated", "ignore:Detected pickle protocol")
def test_nested_files(folder, tmp_path):
    call = Call(os.system, f"touch {tmp_path}/canary")
    name = r"model\.map_layer0\.bias"
    for hostile in (pickle.dumps(call), saved(call, _use_new_zipfile_serialization=False)):
        refused(folder, with_weight(View(Storage(hostile), 0, (64,), (1,))), name)
    refused(
        folder,
        with_weight(
            View(Storage(saved(call, _use_new_zipfile_serialization=False)), 0, (64,), (1,))
        ),
        r"asks for \w+\.system",
    )
    refused(
        folder,
        with_weight(View(Storage(saved(torch.zeros(64))), 0, (64,), (1,))),
        f"{name} is not stored as a plain tensor",
    )
    refused(folder, with_weight(View(Storage(b"half a fi"), 0, (64,), (1,))), name)
    whole = numbers(64).data
    refused(folder, with_weight(View(Storage(whole[:-9]), 0, (64,), (1,))), name)
    refused(folder, with_weight(View(Storage({"a": 1}), 0, (64,), (1,))), name)


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.parametrize(
    ("view", "match"),
    [
        ((0, (65,), (1,)), "only 64 numbers"),
        ((1, (64,), (1,)), "only 64 numbers"),
        ((0, (10**9,), (0,)), "only 64 numbers"),
        ((0, (64,), (10**15,)), "only 64 numbers"),
        ((-1, (64,), (1,)), "no sensible shape"),
        ((0, (64,), (1, 1)), "no sensible shape"),
        ((0, [64], [1]), "no sensible shape"),
        ((0, (64.0,), (1,)), "no sensible shape"),
        ((0, (32,), (2,)), r"model\.map_layer0\.bias is \[32\] instead of \[64\]"),
    ],
)
def test_tensors_stay_inside_their_numbers(folder, view, match):
    refused(folder, with_weight(View(numbers(64), *view)), match)


def test_weights_must_fit_strictly(folder):
    refused(folder, with_weight(None), r"missing model\.map_layer0\.bias")
    refused(folder, with_weight(torch.zeros(9)), r"\[9\] instead of \[64\]")
    refused(folder, with_weight(torch.full((64,), float("nan"))), "not finite")
    refused(folder, with_weight(torch.zeros(64, dtype=torch.int64)), "floating-point")
    refused(folder, with_weight("text"), "is not a tensor")
    more = official_file.content(tiny())
    more["ema"].meta["state"]["_parameters"]["extra"] = torch.zeros(1)
    refused(folder, more, "unknown extra")
    net = tiny()
    net.model.enc["4x4_down"].conv0.resample_filter.mul_(2)
    refused(
        folder,
        official_file.content(net),
        r"enc\.4x4_down\.conv0\.resample_filter is not the filter",
    )


@pytest.mark.seconds
@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"label_dim": 100}, r"map_label\.weight is \[16, 10\] instead of \[16, 100\]"),
        ({"label_dim": 0}, r"unknown model\.map_label"),
        ({"model_type": "DhariwalUNet"}, "model_type='DhariwalUNet'; only 'SongUNet'"),
        ({"decoder_type": "skip"}, "decoder_type='skip'; only 'standard'"),
        ({"encoder_type": "residual"}, "neither DDPM"),
        ({"a\nb": 1}, "is not a mapping of names"),
        ({"attn_resolution": [4]}, r"attn_resolution=\[4\]; did you mean 'attn_resolutions'"),
        ({"num_blocks": 10**9}, "num_blocks"),
        ({"num_blocks": 2}, "missing model"),
        ({"num_blocks": 10**5000}, "argument num_blocks is not a number"),
        ({"model_channels": 0}, "model_channels: Input should be greater than or equal to 1"),
        ({"model_channels": 2**52}, "give no network"),
        ({"channel_mult": [[1, 2]]}, "argument channel_mult is not"),
        ({"channel_mult": [1] * 65}, "argument channel_mult is not"),
        ({"img_resolution": "8"}, r"resolution, channels and classes are \['8', 1, 10\]"),
        ({"sigma_min": 3, "sigma_max": 2}, "sigma_min=3 is not below"),
        ({"sigma_data": None}, "give no network"),
    ],
)
def test_arguments_that_are_not_ours(folder, changes, match):
    refused(folder, official_file.content(tiny(), **changes), match)


def test_vp_constants_are_fixed(folder):
    refused(
        folder, official_file.content(tiny(precondition="vp"), beta_d=20), "beta_d=20; only 19.9"
    )


def test_range_of_the_noise_is_kept(folder):
    net = tiny(precondition="ve", style="ncsnpp", sigma_range=(0.01, 50.0))
    import_edm(
        written(folder, official_file.content(net, sigma_min=0.01, sigma_max=50)),
        folder / "teacher",
    )
    assert checkpoint.load(folder / "teacher").sigma_range == (0.01, 50.0)


def test_other_contents(folder):
    refused(folder, {"G_ema": 1}, "no network under 'ema'")
    refused(folder, [1, 2], "no network under 'ema'")
    refused(folder, {"ema": {"weights": 1}}, "not made of objects of NVlabs/edm")
    wrong = official_file.content(tiny())
    wrong["ema"].meta["class_name"] = "iDDPMPrecond"
    refused(
        folder,
        wrong,
        "its network is of class iDDPMPrecond; known: EDMPrecond, VEPrecond, VPPrecond",
    )
    wrong["ema"].meta["class_name"] = "EDM\nPrecond"
    refused(folder, wrong, "not made of objects of NVlabs/edm")
    wrong = official_file.content(tiny())
    wrong["ema"].meta["version"] = 7
    refused(folder, wrong, "not of version 6")
    wrong = official_file.content(tiny())
    wrong["ema"].meta["state"]["_init_args"] = (8, 1)
    refused(folder, wrong, "by name")
    wrong = official_file.content(tiny())
    del wrong["ema"].meta["state"]["_modules"]["model"].meta["state"]["_buffers"]
    refused(folder, wrong, "is not a mapping of names")
    unnamed = official_file.content(tiny()) | {"dataset_kwargs": {"path": [[1]]}}
    refused(folder, unnamed, "argument path is not")


def test_parts_that_appear_twice_or_in_themselves(folder):
    """A few bytes may name one part any number of times; the work must not grow with that."""
    value = official_file.content(tiny())
    modules = value["ema"].meta["state"]["_modules"]["model"].meta["state"]["_modules"]
    modules["enc"]._modules["again"] = modules["dec"]
    refused(folder, value, "shares what another part holds")
    value = official_file.content(tiny())
    value["ema"].meta["state"]["_modules"]["model"].meta["state"]["_parameters"]["self"] = value
    refused(folder, value, "is not a tensor")


def test_damaged_files(folder):
    good = official_file.pickled(official_file.content(tiny()))
    for length in (0, 1, 2, 100, len(good) // 2, len(good) - 1):
        refused(folder, good[:length], "can be read safely")
    refused(folder, b"\x89PNG\r\n" + good[:500], "can be read safely")
    refused(
        folder, b"\x80\x04Nr\xff\xff\xff\xff.", "no network under 'ema'"
    )  # a memo of 64 GB, were it an array
    with pytest.raises(StorageError, match="does not exist"):
        import_edm(folder / "nowhere.pkl", folder / "teacher")


def test_a_huge_file_is_not_read(folder, tmp_path):
    (tmp_path / "net.pkl").touch()
    os.truncate(tmp_path / "net.pkl", LARGEST_BYTES + 1)  # a hole: takes no room on the disk
    with pytest.raises(CheckpointError, match="more than any published EDM"):
        import_edm(folder / "net.pkl", folder / "teacher")
    assert folder.names() == ["net.pkl"]
