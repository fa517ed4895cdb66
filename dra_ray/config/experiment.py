"""Configuration: frozen pydantic trees that name everything a result depends on.

`Experiment` is one training run, `Sweep` many of them, `TeacherTraining` and `Synthesis` make the
diffusion teacher and its images, `Quickstart` is all of it. Every message names the field, the
value and the remedy. Units are in names: `*_255` are pixel steps of 1/255, `*_s` seconds,
`images_seen` counts training images.
"""

from __future__ import annotations

import importlib.util
from importlib import metadata, resources
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field, PlainSerializer, model_validator

from dra_ray.config import networks
from dra_ray.config.base import (
    Batch,
    Count,
    CountOrNone,
    Frozen,
    Images,
    NonNegativeFloat,
    NonNegativeInt,
    Pixels,
    PositiveFloat,
    PositiveInt,
    Probability,
    Seconds,
    SecondsOrNone,
    override,
)
from dra_ray.config.catalogue import VersionName
from dra_ray.config.data_sets import DATA_SETS, DataSet, DataSetName
from dra_ray.config.text import shown
from dra_ray.errors import ConfigError, nearest
from dra_ray.storage import Store


class Data(Frozen):
    """Real images and how they are split and augmented. Fields that are left out take the data
    set's usual values.
    """

    ADDED: ClassVar[frozenset[str]] = frozenset({"background"})

    name: DataSetName = Field(
        "digits", description="the data set; folder: your own images, a folder per class"
    )
    uri: str | None = Field(
        None, description="archive, file or folder of the data set; digits needs none"
    )
    resolution: Pixels | None = Field(
        None,
        description="pixels a side that imagenet's and a folder's images are resized to, or others "
        "reduced to; default of the others: as they are",
    )
    background: Literal["none", "class", "random"] = Field(
        "none",
        description="of sets whose own is plain (0): a texture for each class, or one drawn for "
        "each image, to test what a classifier heeds",
    )
    train_images: PositiveInt | None = Field(
        None,
        description="use only the first so many training images, after validation; default: all",
    )
    validation_images: Images = Field(
        1024,
        description="first training images (digits, imagenet, folder: random ones), held out for "
        "selection",
    )
    test_images: PositiveInt | None = Field(
        None,
        description="use only the first so many test images; default: all. Never used for training "
        "or selection",
    )
    split_seed: Annotated[int, Field(ge=-(2**62), le=2**62)] = Field(
        0, description="of sets without an official order: digits, imagenet, folder"
    )
    crop_pad: Annotated[int, Field(ge=0, le=4096)] = Field(
        0, description="padding, in pixels a side, before a random crop"
    )
    crop_area: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="smallest part of the area that a random resized crop keeps; 1 for none"
    )
    rotate_degrees: Annotated[float, Field(ge=0, le=180)] = Field(
        0.0, description="largest random rotation either way, nearest pixel"
    )
    fill_255: Annotated[int, Field(ge=0, le=255)] = Field(
        0, description="value of pixels that padding and rotation bring in"
    )
    flip: bool = Field(False, description="random horizontal flip")

    @property
    def known(self) -> DataSet:
        """What is known of the data set without reading it."""
        return DATA_SETS[self.name]

    @model_validator(mode="before")
    @classmethod
    def _usual_values(cls, tree: Any) -> Any:
        name = tree.get("name", "digits") if isinstance(tree, dict) else None
        known = DATA_SETS.get(name) if isinstance(name, str) else None
        return {**known.usual, **tree} if known else tree

    @model_validator(mode="after")
    def _is_somewhere(self) -> Data:
        if not self.known.official_test and self.test_images is None:
            raise ValueError(
                f"test_images is not set; {self.name} has no official test split, so say how many "
                "images to hold out, such as 300"
            )
        if self.name == "folder" and self.resolution is None:
            raise ValueError(
                "resolution is not set; a folder's images are resized, so say to how many pixels a "
                "side, such as 64"
            )
        return self


class Synthetic(Frozen):
    """Images sampled from a diffusion model (DM-AT, arXiv 2302.04638)."""

    ADDED: ClassVar[frozenset[str]] = frozenset({"window_images", "replace"})

    uri: str | None = Field(
        None,
        description="folder written by `dra synthesize` or `dra data convert`, or .npz files in "
        "DM-AT's layout",
    )
    images: Images = Field(0, description="how many of its images to use; 0 for none")
    fraction: Probability = Field(0.7, description="part of every batch that is synthetic")
    window_images: PositiveInt | None = Field(
        None,
        description="draw from so many images at a time, shards in a random order, so that few "
        "are needed at once; default: from all up to 4 GiB of pixels, else as docs/data.md says",
    )
    replace: bool = Field(
        True,
        description="draw with replacement, as DM-AT does; false: every image once before any "
        "is drawn again",
    )

    @model_validator(mode="after")
    def _needs_a_source(self) -> Synthetic:
        if self.images and self.fraction >= 1:
            raise ValueError("fraction=1.0 leaves no real images in a batch; set it below 1")
        return self


class Model(Frozen):
    """The student."""

    ADDED: ClassVar[frozenset[str]] = frozenset({"sigma", "layer"})

    name: str = Field(
        "wrn-10-2",
        description="wrn-DEPTH-WIDTH (SiLU; DM-AT), relu-wrn-DEPTH-WIDTH (TRADES), rawrn-70-16, "
        "vit-{t,s,b}-PATCH, resnet-18, timm/NAME, or diffusion/TEACHER, the encoder of the "
        "teacher with this URI",
    )
    normalise: bool = Field(True, description="subtract mean and divide by std inside the model")
    mean: Annotated[tuple[float, ...], Field(max_length=64)] | None = Field(
        None, description="per channel, in [0,1] units; default: the data set's"
    )
    std: Annotated[tuple[PositiveFloat, ...], Field(max_length=64)] | None = Field(
        None, description="per channel, in [0,1] units; default: the data set's"
    )
    pooling: Literal["patches", "all-tokens"] = Field(
        "patches",
        description="of vit-*: mean of patch tokens, then LayerNorm; or LayerNorm, then mean with "
        "the class token",
    )
    weights: str | None = Field(
        None,
        description="URI of pretrained weights to start from; default: random, of diffusion/* the "
        "teacher's",
    )
    sigma: PositiveFloat = Field(
        0.06, description="of diffusion/*: noise level at which it sees images (UNVERIFIED)"
    )
    layer: str | None = Field(
        None, description="of diffusion/*: the layer that is classified; default: the teacher's"
    )

    @model_validator(mode="after")
    def _is_known(self) -> Model:
        if problem := networks.problem(self.name):
            raise ValueError(f"name={shown(self.name)}: {problem}")
        return self


def _named_compilation(given: object) -> object:
    return ("off", "forward")[given] if isinstance(given, bool) else given


ATTACK_GRAPH = (2, 14)  # of torch, which can have torch.autograd.grad in a graph from here on


class Compute(Frozen):
    """How the student's arithmetic is carried out. Same maths with other rounding; bf16's rounding
    changes results.
    """

    ADDED: ClassVar[frozenset[str]] = frozenset({"cuda_graphs"})

    precision: Literal["fp32", "tf32", "bf16"] = Field(
        "fp32",
        description="tf32: float32 with GPUs' TensorFloat-32 (torch's default for convolutions); "
        "bf16: autocast",
    )
    channels_last: bool = Field(
        True, description="keep images and weights with the channels last in memory"
    )
    compile: Annotated[
        Literal["off", "forward", "attack"],
        BeforeValidator(_named_compilation),
        PlainSerializer(lambda name: {"off": False, "forward": True}.get(name, name)),
    ] = Field(  # on disk as it was when there were two
        "off",
        description="by torch.compile, which takes minutes and pays where steps are many: forward "
        "passes (true means this), or also each step of training's attack as one graph",
    )
    cuda_graphs: bool = Field(
        False,
        description="replay what is compiled as CUDA graphs, which saves a small student's kernel "
        "launches and keeps memory of its own; needs a GPU; `dra bench step` measures it",
    )
    sync_batchnorm: bool = Field(
        False, description="BatchNorm over all workers' images; otherwise over each worker's own"
    )

    @model_validator(mode="after")
    def _can_be_one_graph(self) -> Compute:
        if self.cuda_graphs and self.compile == "off":
            raise ValueError(
                "cuda_graphs=true replays what is compiled, but compile='off'; write "
                "compile='forward' or 'attack'"
            )
        if self.compile != "attack":
            return self
        if self.sync_batchnorm:
            raise ValueError(
                "compile='attack' makes one graph of a step, but sync_batchnorm=true has messages "
                "between workers in it; write compile='forward' or sync_batchnorm=false"
            )
        version = metadata.version("torch")
        if tuple(int(part) for part in version.split(".")[:2]) < ATTACK_GRAPH:
            raise ValueError(
                f"compile='attack' needs torch {'.'.join(map(str, ATTACK_GRAPH))} or newer, but "
                f"this is {version}; write compile='forward' or update torch"
            )
        return self


class Threat(Frozen):
    """What the adversary may do: the ball is the same in training and evaluation, the rest is
    training's attack.
    """

    norm: Literal["linf", "l2"] = Field("linf", description="of the ball")
    eps_255: PositiveFloat = Field(8.0, description="epsilon, the radius, in pixel steps of 1/255")
    step_255: PositiveFloat = Field(2.0, description="length of one step")
    steps: Count = Field(10, description="steps of training's PGD")
    start: Literal["uniform", "normal"] = Field(
        "uniform", description="uniform in the ball (linf), or 0.001 times a normal draw (TRADES)"
    )
    mode: Literal["train", "eval"] = Field(
        "train",
        description="BatchNorm during training's attack: batch statistics (DM-AT) or running ones "
        "(TRADES)",
    )
    ramp_epochs: CountOrNone = Field(
        0, description="epochs over which eps and step rise linearly from 0 (IKL); 0 for none"
    )

    @property
    def eps(self) -> float:
        return self.eps_255 / 255

    @property
    def step(self) -> float:
        return self.step_255 / 255

    @model_validator(mode="after")
    def _fits(self) -> Threat:
        if self.norm == "linf" and self.eps_255 > 255:
            raise ValueError(
                f"eps_255={self.eps_255:g} is more than a pixel can change; set it to at most 255"
            )
        if self.norm == "l2" and self.start == "uniform":
            raise ValueError("start='uniform' is defined for linf only; set start='normal'")
        if self.step_255 > 2 * self.eps_255:
            raise ValueError(
                f"step_255={self.step_255:g} jumps across the ball of eps_255={self.eps_255:g}; "
                f"set step_255 to at most {2 * self.eps_255:g}"
            )
        return self


class Loss(Frozen):
    """The adversarial objective.

    trades: cross-entropy on clean images plus beta times KL(clean || adversarial) (Zhang et al.
        2019, in DM-AT's form).
    pgd-at: cross-entropy on adversarial images (Madry et al. 2018). fgsm-rs: the same with one step
    (Wong et al. 2020). plain: cross-entropy on clean images, without an attack. ikl: Improved KL
    (Cui et al., arXiv 2305.13948) with its alpha, beta and temperature. adr: pgd-at with labels
    that the averaged weights soften (Wu et al., arXiv 2305.12118).
    """

    ADDED: ClassVar[frozenset[str]] = frozenset({"first", "adr_temperature", "adr_share"})

    name: Literal["trades", "pgd-at", "fgsm-rs", "plain", "ikl", "adr"] = Field(
        "trades", description="the objective, see above"
    )
    beta: NonNegativeFloat = Field(
        5.0,
        description="of trades: weight of its second term; of ikl: of its pairs' differences",
    )
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.1, description="of the clean cross-entropy's target"
    )
    alpha: NonNegativeFloat = Field(
        4.0, description="of ikl: weight of its cross-entropy of distributions"
    )
    temperature: PositiveFloat = Field(
        4.0, description="of ikl: of the class means that weight its pairs"
    )
    first: Literal["clean", "adversarial"] = Field(
        "clean",
        description="of trades and ikl: the batch that the network sees first, which BatchNorm's "
        "running statistics remember less of: DM-AT's order, or IKL's",
    )
    adr_temperature: tuple[PositiveFloat, PositiveFloat] = Field(
        (2.0, 1.0),
        description="of adr: of the softened labels, at the start and at the end (UNVERIFIED)",
    )
    adr_share: tuple[Probability, Probability] = Field(
        (0.7, 0.95),
        description="of adr: weight of the softened labels, at the start and at the end "
        "(UNVERIFIED)",
    )
    awp: NonNegativeFloat = Field(
        0.0,
        description="adversarial weight perturbation (Wu et al. 2020): its size relative to each "
        "weight; 0 for none",
    )
    awp_from_epoch: CountOrNone = Field(10, description="epoch from which weights are perturbed")


class Term(Frozen):
    """A noise level and a layer to align with, and their share of the alignment loss."""

    sigma: PositiveFloat | None = Field(
        None, description="noise level; default: drawn for every image as EDM trains"
    )
    layer: str | None = Field(None, description="feature layer; default: teacher.layer")
    share: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="of the alignment loss; the shares of all terms sum to one"
    )


class Align(Frozen):
    """Diffusion Representation Alignment (arXiv 2602.19931, section 4.2). The paper's values of
    weight and sigma are not in the text we have: both defaults are guesses, meant to be swept.
    """

    ADDED: ClassVar[frozenset[str]] = frozenset(
        {
            *("transform", "whiten_dim", "statistics_images", "spatial_norm", "terms"),
            *("loss", "temperature", "warmup_epochs", "decay", "projector_lr"),
            *("projector_weight_decay", "target"),
        }
    )

    weight: NonNegativeFloat = Field(
        1.0, description="lambda; 0 is training without alignment (UNVERIFIED)"
    )
    target: Literal["teacher", "canonical"] = Field(
        "teacher",
        description="what an image is aligned to: the teacher's feature of it; or the canonical "
        "feature of an image of its class, from `canonical` (new, no published result)",
    )
    sigma: PositiveFloat = Field(
        0.06,
        description="noise level at which the teacher encodes, in units of its input's scale "
        "(UNVERIFIED); a flow's time t is sigma = (1-t)/t",
    )
    hidden: Annotated[int, Field(ge=1, le=2**17)] = Field(
        2048, description="width of the 3-layer projector (REPA's value; UNVERIFIED for DRA)"
    )
    activation: Literal["silu", "relu", "gelu"] = Field(
        "silu", description="of the projector (REPA's)"
    )
    extra_weight: NonNegativeFloat = Field(
        0.0,
        description="weight, relative to `weight`, of a second alignment at a sigma drawn as EDM "
        "trains; the paper has it above 1M images (App. D). The two sum to `weight`",
    )
    terms: Annotated[tuple[Term, ...], Field(max_length=16)] = Field(
        (),
        description="several noise levels or layers per image, instead of sigma and extra_weight, "
        "such as [{sigma: 0.03, share: 0.5}, {sigma: 0.3, share: 0.5}]",
    )
    transform: Literal["none", "centre", "standardise", "whiten"] = Field(
        "none",
        description="of the teacher's features, by their statistics on training images: subtract "
        "the mean; also divide by the deviation; or decorrelate by PCA",
    )
    whiten_dim: Annotated[int, Field(ge=1, le=2**17)] = Field(
        16, description="of whiten: directions that are kept, those of largest variance first"
    )
    statistics_images: Annotated[int, Field(ge=2, le=2**24)] = Field(
        2048,
        description="of transform: at most so many training images, on which its statistics are "
        "measured once before the first step",
    )

    loss: Literal["cosine", "infonce", "cka"] = Field(
        "cosine",
        description="1 - cosine; cross-entropy of finding an image's own target among the batch's; "
        "or 1 - linear CKA over the batch",
    )
    temperature: PositiveFloat = Field(0.1, description="of infonce")
    warmup_epochs: CountOrNone = Field(
        0, description="epochs over which lambda rises linearly to `weight`"
    )
    decay: Literal["none", "linear", "cosine"] = Field(
        "none", description="how lambda falls towards 0 over the whole run, epoch by epoch"
    )
    projector_lr: PositiveFloat | None = Field(
        None,
        description="the projector's learning rate, at its highest; default: the student's. It "
        "follows the student's schedule",
    )
    projector_weight_decay: NonNegativeFloat | None = Field(
        None, description="of the projector; default: the student's"
    )
    spatial_norm: bool = Field(
        False,
        description="of teacher.tokens: subtract each image's mean over positions and divide by "
        "its deviation, before `transform` (arXiv 2512.10794)",
    )

    @property
    def targets(self) -> tuple[Term, ...]:
        """What an image's feature is aligned to; shares sum to one, so that lambda means the same
        for any number of them.
        """
        if self.terms:
            return self.terms
        if not self.extra_weight:
            return (Term(sigma=self.sigma),)
        whole = 1 + self.extra_weight
        return Term(sigma=self.sigma, share=1 / whole), Term(share=self.extra_weight / whole)

    def _without_added(self) -> dict[str, Any]:
        """With extra_weight the two terms once summed to 1 + extra_weight: other results."""
        tree = super()._without_added()
        return tree | {"shares": "sum to one"} if self.extra_weight else tree

    @model_validator(mode="after")
    def _terms_fit(self) -> Align:
        if self.terms and self.extra_weight:
            raise ValueError(
                f"extra_weight={self.extra_weight:g} is a term of its own; set it to 0 and write "
                "it into terms"
            )
        total = sum(term.share for term in self.terms)
        if self.terms and abs(total - 1) > 1e-6:
            raise ValueError(f"terms have shares that sum to {total:g}; let them sum to 1")
        return self

    def target_width(self, width: int) -> int:
        """Of a target that is made of features of `width`."""
        return self.whiten_dim if self.transform == "whiten" else width


def teacher_names() -> list[str]:
    """Teachers that come with the package."""
    return sorted(
        folder.name
        for folder in (resources.files("dra_ray.recipes") / "teachers").iterdir()
        if folder.is_dir() and folder.name[0] != "_"
    )


def teacher_path(uri: str | None) -> str | None:
    """`package:NAME` as the path of that teacher's folder; any other URI as it is."""
    if uri is None or not uri.startswith("package:"):
        return uri
    name = uri.removeprefix("package:")
    if name not in teacher_names():
        raise ValueError(
            f"{shown(uri)} does not come with the package; {nearest(name[:100], teacher_names())}"
        )
    return str(resources.files("dra_ray.recipes") / "teachers" / name)


TeacherUri = Annotated[str | None, AfterValidator(teacher_path)]


class Teacher(Frozen):
    """The frozen diffusion encoder."""

    ADDED: ClassVar[frozenset[str]] = frozenset(
        {"tokens", "wire", "precision", "channels_last", "compile"}
    )

    uri: TeacherUri = Field(
        None,
        description="folder written by `dra teacher train` or `import`, or package:NAME (see `dra "
        "teacher list`)",
    )
    layer: str | None = Field(
        None,
        description="feature layer; default: the decoder block after the bottleneck "
        "(dec.<lowest>_in1)",
    )
    label: Literal["true", "null"] = Field(
        "true", description="class label given to the teacher (UNVERIFIED)"
    )
    tokens: bool = Field(
        False,
        description="give the feature of every position instead of their mean; alignment then "
        "compares it with the student's feature map, position by position",
    )
    wire: Literal["float32", "float16"] = Field(
        "float32",
        description="features are rounded to this where they are computed, and sent and kept so: "
        "float16 halves their bytes, which are many with `tokens`",
    )
    micro_batch: Batch = Field(
        64,
        description="the only batch size the teacher ever runs at; longer requests are split, "
        "shorter padded",
    )
    # these three change the bits, so each choice has a pool of its own
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="bf16: convolutions and matrix products in bfloat16, by autocast"
    )
    channels_last: bool = Field(
        False, description="keep images and weights with the channels last in memory"
    )
    compile: bool = Field(
        False, description="torch.compile, which takes each replica a minute when it starts"
    )


class Pool(Frozen):
    """The elastic pool of teacher replicas; the knobs with Ray Serve's names have its meaning."""

    kind: Literal["pool", "local"] = Field(
        "pool", description="'local' encodes inside each training worker, with the same numbers"
    )
    min_replicas: CountOrNone = Field(
        1,
        description="0 lets an idle pool go; timeout_s must then exceed the start of a node and of "
        "a teacher",
    )
    max_replicas: Count = Field(2, description="most replicas at a time")
    target_utilisation: Annotated[float, Field(gt=0, le=1)] = Field(
        0.7, description="busy share of a replica above which another is added"
    )
    look_back_period_s: Seconds = Field(6.0, description="window over which demand is measured")
    upscale_delay_s: SecondsOrNone = Field(
        1.0, description="how long demand must last before a replica is added"
    )
    downscale_delay_s: SecondsOrNone = Field(
        8.0, description="how long demand must be lower before a replica is taken down"
    )
    backlog_s: Seconds = Field(
        4.0, description="time in which requests that wait are to be cleared; about a training step"
    )
    ahead: CountOrNone = Field(
        1, description="steps whose features are asked for before the step that needs them"
    )
    max_inflight: Count = Field(
        4, description="requests one training worker may have in flight; more wait with the worker"
    )
    request_images: Batch = Field(
        256,
        description="longer requests are cut into parts of about so many images (multiples of "
        "teacher.micro_batch), which replicas share",
    )
    merge_wait_s: SecondsOrNone = Field(
        0.005,
        description="how long a micro-batch that is not full waits for other clients' images; 0 "
        "merges what waits anyway",
    )
    window_bytes: Annotated[int, Field(ge=0, le=2**50)] = Field(
        64 * 2**20,
        description="features kept for trials that ask for the same; 0 computes every request",
    )
    timeout_s: Seconds = Field(
        120.0, description="how long a step waits for its feature, retries included"
    )
    hang_s: Seconds = Field(
        60.0, description="a replica that works longer than this on one micro-batch is replaced"
    )
    keep: bool = Field(
        False,
        description="leave the pool up when the last run that uses it ends; `dra pool down` "
        "ends it",
    )
    cpus_per_replica: NonNegativeFloat = Field(
        1.0, description="CPUs that Ray reserves for a replica"
    )
    gpus_per_replica: NonNegativeFloat = Field(
        0.0, description="GPUs that Ray reserves for a replica; parts of one are shared"
    )
    threads_per_replica: Annotated[int, Field(ge=1, le=4096)] = Field(
        1, description="CPU threads of torch"
    )
    resources: dict[str, float] = Field(
        default_factory=dict, description="custom Ray resources of a replica, such as {teacher: 1}"
    )
    labels: dict[str, str] = Field(
        default_factory=dict,
        description="labels of the nodes that replicas may run on, such as {pool: teacher}",
    )

    @model_validator(mode="after")
    def _bounds(self) -> Pool:
        if self.max_replicas < self.min_replicas:
            raise ValueError(
                f"max_replicas={self.max_replicas} is below min_replicas={self.min_replicas}; "
                "raise max_replicas"
            )
        return self


class Optim(Frozen):
    """Optimiser, schedule and averaged weights; the defaults are DM-AT's."""

    ADDED: ClassVar[frozenset[str]] = frozenset({"norm_momentum", "norm_first_batch"})

    name: Literal["sgd", "lion", "adamw"] = Field("sgd", description="the optimiser")
    epochs: Count = Field(
        20, description="length; an epoch is as many images as the real training set has"
    )
    batch: Annotated[int, Field(ge=2, le=2**20)] = Field(
        128, description="global batch, whatever the number of workers"
    )
    lr: PositiveFloat = Field(0.2, description="learning rate, at its highest")
    weight_decay: NonNegativeFloat = Field(
        5e-4, description="L2 penalty of sgd; decoupled in lion and adamw"
    )
    decayed: Literal["all-but-batchnorm", "weights", "all"] = Field(
        "all-but-batchnorm",
        description="parameters whose name lacks 'batchnorm' (DM-AT); only weights of linear and "
        "convolution layers (ViT); all",
    )
    momentum: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.9, description="of sgd, where the schedule does not set it"
    )
    nesterov: bool = Field(True, description="of sgd")
    betas: tuple[Probability, Probability] = Field((0.9, 0.99), description="of lion and adamw")
    clip_norm: PositiveFloat | None = Field(
        None, description="largest norm of the whole gradient; default: not clipped"
    )
    schedule: Literal["one-cycle", "cosine", "ikl-cosine", "warmup-cosine", "drops"] = Field(
        "one-cycle",
        description="per epoch: OneCycle with its momentum cycle (DM-AT), cosine, IKL's cosine, "
        "which is one epoch ahead, or tenfold drops; per step: linear warm-up, then cosine",
    )
    norm_momentum: Annotated[float, Field(gt=0, le=1)] = Field(
        0.01,
        description="weight of a batch in BatchNorm's running statistics: 0.01 is DM-AT's, 0.1 "
        "PyTorch's, with which TRADES and IKL train",
    )
    norm_first_batch: bool = Field(
        True, description="the first batch sets the running statistics alone (DM-AT)"
    )
    pct_start: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.025, description="of one-cycle: part of the epochs in which the learning rate rises"
    )
    warmup_epochs: NonNegativeFloat = Field(5.0, description="of warmup-cosine")
    lr_start: NonNegativeFloat = Field(
        1e-6, description="of warmup-cosine: where the warm-up starts"
    )
    lr_end: NonNegativeFloat = Field(1e-5, description="of warmup-cosine: where the cosine ends")
    lr_drops: Annotated[tuple[Count, ...], Field(max_length=1000)] = Field(
        (), description="of drops: epochs at whose start the learning rate falls to a tenth"
    )
    averaging: Literal["step", "epoch", "none"] = Field(
        "step",
        description="average the weights after every step, after every epoch (IKL), or never",
    )
    averaging_decay: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.995, description="decay of the averaged weights (EMA); 0 follows the weights"
    )
    averaging_warmup: Probability = Field(
        0.025, description="part of the steps during which the average just follows the weights"
    )
    averaging_ramp: bool = Field(
        True,
        description="let the decay grow as (1+d)/(10+d) with the d steps since the warm-up (DM-AT)",
    )


class Selection(Frozen):
    """Robust accuracy on held-out training images, from the averaged weights; DM-AT's is PGD-40
    with the margin loss.
    """

    ADDED: ClassVar[frozenset[str]] = frozenset({"weights"})

    steps: Count = Field(40, description="PGD steps")
    loss: Literal["margin", "cross-entropy"] = Field("margin", description="of the attack")
    step_255: PositiveFloat | None = Field(None, description="default: a quarter of eps")
    every_epochs: Count = Field(
        1, description="epochs between validations, which are also checkpoints and ASHA's reports"
    )
    weights: Literal["average", "better"] = Field(
        "average",
        description="average: the averaged weights are judged; better: the raw ones too, since an "
        "average lags early on, and a validation is that of the more robust, which are also those "
        "that are kept; twice the cost",
    )


class Evaluation(Frozen):
    """AutoAttack (Croce & Hein 2020), and what is measured beside it."""

    version: VersionName = Field(
        "standard", description="of AutoAttack; rand is for randomised students"
    )
    level: Literal["reference", "fast", "screen"] = Field(
        "reference",
        description="reference: to the bit what AutoAttack gives; fast: same maths, other "
        "rounding; screen: an upper bound, for sweeps",
    )
    streams: Literal["batch", "sample"] = Field(
        "batch",
        description="random numbers per batch, as AutoAttack draws them, or per image: verdicts "
        "then depend on model, image and seed alone",
    )
    batch: Batch = Field(
        128, description="part of the reference configuration: verdicts depend on it"
    )
    seed: Annotated[int, Field(ge=-(2**62), le=2**62)] = Field(
        0, description="of AutoAttack's and PGD's random numbers"
    )
    pgd_steps: Count = Field(20, description="steps of PGD")
    pgd_restarts: Count = Field(1, description="random starts of PGD; an image must withstand all")
    eot: Count = Field(
        1,
        description="forward passes that each gradient of PGD is averaged over; above 1 for "
        "randomised students",
    )
    curve_255: Annotated[tuple[NonNegativeFloat, ...], Field(max_length=1000)] = Field(
        (), description="further radii, in pixel steps of 1/255, at which PGD accuracy is measured"
    )
    corruptions: str | None = Field(
        None,
        description="folder in CIFAR-10-C's layout, or 'generated' for a subset made from the test "
        "images; default: not measured",
    )
    workers: Count = Field(2, description="chunks attacked at the same time")


class Resources(Frozen):
    """What one training run occupies; never changes the numbers."""

    workers: Count = Field(1, description="Ray Train workers that share the batch")
    min_workers: Count | None = Field(
        None,
        description="go on with as few as these when nodes are lost, and grow back; default: "
        "always `workers`",
    )
    cpus_per_worker: PositiveFloat = Field(
        1.0, description="share of the machine that Ray reserves"
    )
    gpus_per_worker: NonNegativeFloat = Field(
        0.0, description="GPUs that Ray reserves for a worker"
    )
    threads_per_worker: Annotated[int, Field(ge=1, le=4096)] = Field(
        1, description="CPU threads of torch"
    )
    validation: Literal["workers", "beside"] = Field(
        "workers",
        description="workers: they validate between two epochs; beside: where the cluster has a "
        "worker's room free, a task does it while training goes on, and its row comes with the "
        "next one's; not in sweeps, which decide by the rows",
    )
    resident_gib: NonNegativeFloat = Field(
        4.0,
        description="real and synthetic images together up to this size live on the worker's "
        "device; more are read while training goes on",
    )
    custom: dict[str, float] = Field(
        default_factory=dict, description="custom Ray resources of a worker, such as {student: 1}"
    )
    labels: dict[str, str] = Field(
        default_factory=dict,
        description="labels of the nodes that workers may run on, such as {pool: student}",
    )
    metrics_steps: PositiveInt = Field(
        50, description="steps between rows of steps.jsonl; each is one wait for the device"
    )
    checkpoint_steps: PositiveInt | None = Field(
        None,
        description="also write a checkpoint every so many steps; default: at validations only",
    )
    start_timeout_s: Seconds = Field(
        60.0,
        description="how long a start may wait for room; on a machine of its own the run then "
        "fails",
    )
    start_deadline_s: Seconds = Field(
        1800.0, description="the same on a cluster that may still add nodes"
    )
    max_failures: CountOrNone = Field(3, description="restarts of a run whose worker died")

    @property
    def is_single(self) -> bool:
        """Whether a sweep's trial trains in its slot's own process: Ray Train is there for several
        workers, for an elastic number of them, and for workers that need nodes of a kind.
        """
        return self.workers == 1 and not self.min_workers and not self.labels


class Tracking(Frozen):
    """Services that get the rows of a run, or of a sweep's rungs, beside its own logs; never change
    the numbers. TensorBoard files are always written.
    """

    mlflow: str | None = Field(
        None,
        description="tracking URI of MLflow, such as http://host:5000; install dra-ray[mlflow]",
    )
    wandb: str | None = Field(
        None, description="PROJECT or ENTITY/PROJECT of W&B; install dra-ray[wandb]"
    )
    trackio: str | None = Field(
        None,
        description="'local', the URL of a server or OWNER/NAME of a Space of Trackio; install "
        "dra-ray[trackio]",
    )

    def require_installed(self) -> None:
        """Raise `ConfigError` for a service whose package is not there."""
        for package in type(self).model_fields:
            value = getattr(self, package)
            if value is not None and importlib.util.find_spec(package) is None:
                raise ConfigError(
                    f"tracking.{package}={value!r} needs the package {package}, which is not "
                    f"installed; pip install 'dra-ray[{package}]', or set tracking.{package}=null"
                )


class CanonicalSet(Frozen):
    """Canonical samples and features (CLAReps, arXiv 2506.09955), for `distill` and for
    align.target=canonical.
    """

    uri: str | None = Field(None, description="folder written by `dra canonical make`")
    images: PositiveInt | None = Field(
        None,
        description="use only the first so many, in which classes alternate; default: all",
    )


class Distill(Frozen):
    """CaDistill (arXiv 2506.09955): canonical samples of a part of the training images teach beside
    the labels. The paper names three losses; their forms and weights were not to be had
    (UNVERIFIED).
    """

    weight: NonNegativeFloat = Field(
        0.0, description="of all of it in the loss; 0 is training without"
    )
    align: NonNegativeFloat = Field(
        0.5,
        description="of pulling images towards canonical samples of their class, by supervised "
        "contrast (arXiv 2004.11362)",
    )
    cluster: NonNegativeFloat = Field(
        0.5, description="of the same among the canonical samples themselves"
    )
    cka: NonNegativeFloat = Field(
        1.0,
        description="of 1 - linear CKA of the student's and the teacher's features of them",
    )
    samples: NonNegativeFloat = Field(
        0.0,
        description="of cross-entropy on them, the control in which they are just more data",
    )
    warmup_epochs: CountOrNone = Field(5, description="epochs over which `weight` rises linearly")
    per_step: Annotated[int, Field(ge=4, le=2**20)] = Field(
        128, description="canonical samples of a step, at least four of each class in it"
    )
    temperature: PositiveFloat = Field(0.1, description="of supervised contrast")
    projection: Annotated[int, Field(ge=1, le=2**17)] = Field(
        128, description="of what supervised contrast compares, after a projection of 2 layers"
    )


class PaperNumbers(Frozen):
    """What the paper reports for this run, in percent; None where it prints no number."""

    table: str = Field(description="where, such as 'Tables 1, 2' or 'section 5.6'")
    method: str = Field("", description="the row's name, such as 'DM-AT + DRA'")
    clean: float | None = Field(None, description="accuracy on clean images")
    autoattack: float | None = Field(None, description="accuracy under AutoAttack")


class Experiment(Frozen):
    """One training run. Everything but `description`, `paper`, `pool`, `resources` and `tracking`
    enters its digest.
    """

    ADDED: ClassVar[frozenset[str]] = frozenset({"data_seed", "canonical", "distill"})

    kind: Literal["experiment"] = Field("experiment", description="says what the file is")
    description: str = Field("", description="for people; not in the digest")
    paper: PaperNumbers | None = Field(
        None, description="what the paper reports for this run, if it does"
    )
    seed: NonNegativeInt = Field(
        0, description="of initial weights, batches, augmentation and attacks"
    )
    data_seed: NonNegativeInt | None = Field(
        None,
        description="of batches, augmentation, the teacher's noise and the validation's attack, "
        "which runs of several seeds then share; default: seed",
    )
    data: Data = Data()
    synthetic: Synthetic = Synthetic()
    model: Model = Model()
    compute: Compute = Compute()
    threat: Threat = Threat()
    loss: Loss = Loss()
    align: Align = Align()
    canonical: CanonicalSet = CanonicalSet()
    distill: Distill = Distill()
    teacher: Teacher = Teacher()
    pool: Pool = Pool()
    optim: Optim = Optim()
    selection: Selection = Selection()
    evaluation: Evaluation = Evaluation()
    resources: Resources = Resources()
    tracking: Tracking = Tracking()

    @property
    def teachers(self) -> tuple[Teacher, ...]:
        """Of each term of the alignment, the teacher with the term's layer; none where none is
        asked.
        """
        if not self.align.weight or self.aligns_to_canonical:
            return ()
        return tuple(
            self.teacher.model_copy(update={"layer": term.layer}) if term.layer else self.teacher
            for term in self.align.targets
        )

    @property
    def needs_canonical(self) -> bool:
        """Whether canonical samples or their features are read."""
        return self.aligns_to_canonical or bool(self.distill.weight)

    @property
    def aligns_to_canonical(self) -> bool:
        """Whether images are aligned to canonical features of their class."""
        return bool(self.align.weight) and self.align.target == "canonical"

    @property
    def shared_seed(self) -> int:
        """The seed of what runs with other training seeds may share."""
        return self.seed if self.data_seed is None else self.data_seed

    @model_validator(mode="after")
    def _fits_together(self) -> Experiment:
        if self.optim.batch % self.resources.workers:
            raise ValueError(
                f"optim.batch={self.optim.batch} is not divisible by "
                f"resources.workers={self.resources.workers}; change one of them"
            )
        if self.compute.cuda_graphs and not self.resources.gpus_per_worker:
            raise ValueError(
                "compute.cuda_graphs=true, but resources.gpus_per_worker=0; leave it out, or give "
                "workers a GPU"
            )
        if self.synthetic.images and not int(self.optim.batch * self.synthetic.fraction):
            raise ValueError(
                f"synthetic.images={self.synthetic.images} but no batch holds any; raise "
                "synthetic.fraction"
            )
        if self.resources.min_workers and self.resources.min_workers > self.resources.workers:
            raise ValueError(
                f"resources.min_workers={self.resources.min_workers} is above "
                f"resources.workers={self.resources.workers}; lower it"
            )
        if self.loss.name == "fgsm-rs" and self.threat.steps != 1:
            raise ValueError(
                f"threat.steps={self.threat.steps}, but loss.name='fgsm-rs' takes one step; set "
                "threat.steps=1 or loss.name='pgd-at'"
            )
        grows = self.threat.norm == "l2" and self.threat.ramp_epochs > 1
        if self.compute.compile == "attack" and grows:
            raise ValueError(
                f"compute.compile='attack' would compile a graph for each of "
                f"threat.ramp_epochs={self.threat.ramp_epochs}, whose radii differ in l2; write "
                "compute.compile='forward'"
            )
        if self.teacher.tokens and self.align.loss != "cosine":
            raise ValueError(
                f"align.loss='{self.align.loss}' compares images of a batch, not positions; set "
                "align.loss=cosine or teacher.tokens=false"
            )
        for field, needs_pooled in (
            ("align.target=canonical", self.align.target == "canonical"),
            (f"distill.weight={self.distill.weight:g}", bool(self.distill.weight)),
        ):
            if needs_pooled and self.teacher.tokens:
                raise ValueError(f"{field} is of pooled features; set teacher.tokens=false as well")
        if self.align.target == "canonical" and len(self.align.targets) > 1:
            raise ValueError(
                "align.target=canonical has one feature an image; set align.terms=[] and "
                "align.extra_weight=0"
            )
        if self.distill.weight and self.distill.per_step % self.resources.workers:
            raise ValueError(
                f"distill.per_step={self.distill.per_step} is not divisible by "
                f"resources.workers={self.resources.workers}; change one of them"
            )
        if self.align.spatial_norm and not self.teacher.tokens:
            raise ValueError(
                "align.spatial_norm=true is over the positions of a feature map; set "
                "teacher.tokens=true as well"
            )
        if self.optim.schedule == "warmup-cosine" and self.optim.warmup_epochs >= self.optim.epochs:
            raise ValueError(
                f"optim.warmup_epochs={self.optim.warmup_epochs:g} leaves nothing of "
                f"optim.epochs={self.optim.epochs}; lower it"
            )
        if self.optim.schedule == "one-cycle" and self.optim.pct_start * self.optim.epochs == 1:
            raise ValueError(
                "optim.pct_start * optim.epochs = 1 gives the schedule a rise of no length; change "
                "either"
            )
        return self

    def with_sources(self) -> Experiment:
        """The same with absolute URIs, since workers run elsewhere; `ConfigError` when one that is
        needed is not set.
        """
        if self.teachers and not self.teacher.uri:
            raise ConfigError(
                f"teacher.uri is not set, but align.weight={self.align.weight:g} needs a teacher; "
                "make one with `dra teacher train digits-edm` "
                "and pass --set teacher.uri=runs/digits-edm, or set align.weight=0"
            )
        if self.synthetic.images and not self.synthetic.uri:
            raise ConfigError(
                f"synthetic.uri is not set, but synthetic.images={self.synthetic.images}; make "
                "images with `dra synthesize` and pass "
                "--set synthetic.uri=URI, or set synthetic.images=0"
            )
        if self.needs_canonical and not self.canonical.uri:
            reader = (
                f"distill.weight={self.distill.weight:g}"
                if self.distill.weight
                else "align.target=canonical"
            )
            raise ConfigError(
                f"canonical.uri is not set, but {reader} needs canonical samples; make them with "
                "`dra canonical make` and pass --set canonical.uri=URI"
            )
        encoder = networks.teacher_of(self.model.name)
        if encoder is not None:
            encoder = networks.DIFFUSION + Store(teacher_path(encoder) or encoder).resolved().uri
        uris = {
            "teacher.uri": self.teacher.uri,
            "canonical.uri": self.canonical.uri,
            "synthetic.uri": self.synthetic.uri,
            "data.uri": self.data.uri,
            "model.weights": self.model.weights,
        }
        changes = {field: Store(uri).resolved().uri for field, uri in uris.items() if uri}
        return override(self, changes | ({"model.name": encoder} if encoder else {}))
