"""Every version, norm and level against one process of the package itself; at level reference with
the same images, to the bit.
"""

import copy
import logging
from typing import get_args

import numpy as np
import pytest
import torch
from pyautoattack import AutoAttack
from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from dra_ray.attacks import apgd, checks, levels, square
from dra_ray.attacks.autoattack import LOOPS, attack_chunk, clean_correct, single_process
from dra_ray.attacks.checks import check
from dra_ray.attacks.draws import PerBatch
from dra_ray.attacks.plan import Case, Plan, Settings, plan_chunks
from dra_ray.attacks.stock import package as packaged_attack
from dra_ray.attacks.stock import stock
from dra_ray.config import Evaluation, Threat, catalogue
from dra_ray.config.catalogue import Effort
from dra_ray.errors import DataError

EFFORT = Effort(apgd_steps=25, fab_steps=4, square_queries=300)
THREAT = Threat(eps_255=24, step_255=6)
STANDARD = catalogue.VERSIONS["standard"].attacks
IMAGES, BATCH, SEED = 48, 20, 7


def digits(count, classes=10):
    bunch = load_digits(n_class=classes)
    images = torch.round(torch.tensor(bunch.images, dtype=torch.float32)[:, None] * 255 / 16) / 255
    return images[-count:], torch.tensor(bunch.target[-count:])


def net(classes=10, channels=1):
    torch.manual_seed(0)
    return nn.Sequential(
        *(
            nn.Conv2d(channels, 12, 3, padding=1, bias=False),
            nn.BatchNorm2d(12),
            nn.SiLU(),
            nn.Conv2d(12, 24, 3, stride=2, padding=1),
            nn.SiLU(),
        ),
        *(nn.Flatten(), nn.Linear(24 * 16, classes)),
    )


def trained(classes=10):
    """A small net after a few seconds of one-step adversarial training: some images survive, some
    do not.
    """
    student = net(classes)
    bunch = load_digits(n_class=classes)
    images, labels = digits(len(bunch.target), classes)
    images, labels = images[:-IMAGES], labels[:-IMAGES]
    optim = torch.optim.Adam(student.parameters(), 3e-3)
    for step in range(150):
        index = torch.randint(len(labels), (128,), generator=torch.Generator().manual_seed(step))
        x, y = images[index].requires_grad_(True), labels[index]
        (gradient,) = torch.autograd.grad(F.cross_entropy(student(x), y), x)
        optim.zero_grad()
        F.cross_entropy(
            student((x + THREAT.eps * gradient.sign()).clamp(0, 1).detach()), y
        ).backward()
        optim.step()
    return student.eval()


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def student():
    return trained()


def whole(student, images, labels, batch, **settings):
    chosen = Settings(**{"threat": THREAT, "seed": SEED} | settings)
    return single_process(student, images, labels, chosen, batch=batch)


def package(student, images, labels, effort, targets=9, seed=SEED, batch=BATCH):
    """The package's own loop over batches and attacks, with less effort. Parameters need gradients,
    as users have them.
    """
    single = AutoAttack(student, norm="Linf", eps=THREAT.eps, seed=seed, version="standard")
    common = {
        "n_iter": effort.apgd_steps,
        "eps": THREAT.eps,
        "norm": "Linf",
        "n_restarts": 1,
        "seed": seed,
        "device": "cpu",
        "logger": single.logger,
    }
    single.apgd = APGDAttack(student, **common)
    single.apgd_targeted = APGDAttack_targeted(student, n_target_classes=targets, **common)
    single.fab.n_iter, single.fab.n_target_classes, single.square.n_queries = (
        effort.fab_steps,
        targets,
        effort.square_queries,
    )
    adversarial, predicted = single.run_standard_evaluation(images, labels, batch_size=batch)
    return adversarial, predicted == labels


def attacked(student, images, labels, attack, numbers=None, **settings):
    """One attack on one batch: broken, adversarial images."""
    chosen = Settings(**{"threat": THREAT, "seed": SEED} | settings)
    case = Case(images=images, labels=labels, attack=attack, settings=chosen, numbers=numbers)
    return attack_chunk(student, case)


def planned(student, images, labels, effort, backwards=False, seed=SEED):
    settings = Settings(threat=THREAT, seed=seed, effort=effort)
    attacks = settings.attacks(student(images[:1]).shape[1])
    plan = Plan(clean_correct(student, images, labels, BATCH), images, BATCH, attacks)
    while chunks := plan.chunks():
        for chunk in reversed(chunks) if backwards else chunks:
            torch.rand(5)  # whatever ran before in this process must not matter
            plan.merge(chunk, *attack_chunk(student, chunk.case(images, labels, settings)))
    return plan


@pytest.fixture(scope="module")
def both(student):
    images, labels = digits(IMAGES)
    return package(student, images, labels, EFFORT), planned(
        student, images, labels, EFFORT, backwards=True
    )


def test_chunks_give_what_a_single_process_gives(both):
    (adversarial, robust), plan = both
    assert torch.equal(plan.alive, robust)
    assert torch.equal(plan.adversarial, adversarial)
    fooled = [name for name in plan.first_failure if name]
    assert 8 < len(fooled) < IMAGES - 8, "the net must be worth attacking"
    assert plan.first_failure.count("apgd-ce") > 3, "the net must be worth attacking"


def test_the_books_add_up(both):
    _, plan = both
    robust = plan.first_failure.count("")
    assert robust == int(plan.alive.sum()) == plan.robust_after["square"]
    assert list(plan.robust_after) == list(STANDARD)
    assert sorted(plan.robust_after.values(), reverse=True) == list(plan.robust_after.values())
    images, _ = digits(IMAGES)
    assert float((plan.adversarial - images).abs().max()) <= THREAT.eps + 1e-6
    assert float(plan.adversarial.min()) >= 0
    assert float(plan.adversarial.max()) <= 1


def test_the_seed_matters(student):
    images, labels = digits(16)
    one, other = (
        attacked(student, images, labels, "apgd-ce", seed=seed, effort=Effort(5, 5, 5))
        for seed in (SEED, SEED + 1)
    )
    assert not torch.equal(one[1], other[1])


QUICK = Effort(apgd_steps=8, fab_steps=3, square_queries=100)
L2 = Threat(norm="l2", eps_255=90, step_255=22, start="normal")


@pytest.mark.parametrize(
    ("version", "threat"),
    [("standard", L2), ("plus", THREAT), ("plus", L2), ("rand", THREAT), ("rand", L2)],
)
def test_every_version_and_norm_is_the_packages_to_the_bit(student, version, threat):
    images, labels = digits(24)
    settings = Settings(threat=threat, seed=SEED, effort=QUICK, version=version)
    adversarial, robust = stock(student, images, labels, settings, batch=16)
    plan = single_process(student, images, labels, settings, batch=16)
    assert torch.equal(plan.alive, robust)
    assert torch.equal(plan.adversarial, adversarial)
    assert (
        0
        < int(robust.sum())
        < plan.first_failure.count("") + sum(name != "clean" for name in plan.first_failure)
    )


@pytest.mark.parametrize("attack", ["apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square"])
@pytest.mark.parametrize("threat", [THREAT, L2], ids=["linf", "l2"])
def test_our_loop_of_an_attack_is_the_packages_to_the_bit(student, attack, threat):
    """Also where images are fooled by an attack alone, which the order of a version hides."""
    images, labels = digits(20)
    alive = clean_correct(student, images, labels, 20)
    images, labels = images[alive], labels[alive]
    settings = Settings(threat=threat, seed=SEED, effort=Effort(24, 4, 260), version="plus")
    case = Case(images=images, labels=labels, attack=attack, settings=settings)
    with torch.no_grad(), torch.random.fork_rng():
        theirs = packaged_attack(student, case, targets=9)
    broken, ours = attack_chunk(student, case)
    assert torch.equal(ours[broken], theirs[broken])
    assert torch.equal(broken, student(theirs).argmax(1) != labels)
    assert broken.any()
    assert not broken.all()


def test_a_randomised_student_gets_the_packages_own_order_of_draws(student):
    images, labels = digits(24)
    noisy = Noisy(student).eval()
    for version in ("rand", "standard"):
        settings = Settings(threat=THREAT, seed=SEED, effort=QUICK, version=version)
        case = Case(images=images, labels=labels, attack="apgd-ce", settings=settings)
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(1)
            theirs = packaged_attack(noisy, case, targets=9)
            wrong = noisy(theirs).argmax(1) != labels
        with torch.random.fork_rng():
            torch.manual_seed(1)
            broken, ours = attack_chunk(noisy, case)
        assert torch.equal(broken, wrong)
        assert torch.equal(ours[broken], theirs[broken])


@pytest.mark.parametrize("threat", [THREAT, L2], ids=["linf", "l2"])
def test_fast_gives_the_same_verdicts(student, threat):
    images, labels = digits(48)
    reference, fast = (
        whole(student, images, labels, 32, threat=threat, effort=QUICK, level=level)
        for level in ("reference", "fast")
    )
    assert torch.equal(fast.alive, reference.alive)
    assert fast.robust_after == reference.robust_after
    distance = (fast.adversarial - images).flatten(1)
    assert (
        float((distance.abs().amax(1) if threat is THREAT else distance.norm(dim=1)).max())
        <= threat.eps + 1e-6
    )
    with torch.no_grad():
        assert not (student(fast.adversarial).argmax(1) == labels)[~fast.alive].any(), (
            "each success holds for the student as it is"
        )


def test_screening_is_an_upper_bound(student):
    images, labels = digits(48)
    reference, screen = (
        whole(student, images, labels, 32, effort=QUICK, level=level)
        for level in ("reference", "screen")
    )
    assert list(screen.robust_after) == ["apgd-ce", "apgd-malt"]
    assert bool((screen.alive | ~reference.alive).all())
    assert int(screen.alive.sum() - reference.alive.sum()) <= 2


@pytest.mark.parametrize(("norm", "dual"), [("linf", 1), ("l2", 2)])
def test_the_nearest_classes_of_a_linear_student(norm, dual):
    """There the distance is exact, so an image falls just when its nearest class is in the ball."""
    generator = torch.Generator().manual_seed(3)
    flat = nn.Linear(16, 7)
    scales = torch.tensor([1, 8, 0.2, 3, 1, 0.5, 2.0])  # so that the nearest has not the top logit
    with torch.no_grad():
        flat.weight.copy_(torch.randn(7, 16, generator=generator) * scales[:, None])
        flat.bias.zero_()
    linear = nn.Sequential(nn.Flatten(), flat)
    x = 0.5 + 0.05 * torch.randn(200, 1, 4, 4, generator=generator)
    with torch.no_grad():
        logits = linear(x)
    labels = logits.argmax(1)
    z, w = logits.double().numpy(), flat.weight.detach().double().numpy()
    distance = np.full(z.shape, np.inf)
    for i, y in enumerate(labels.tolist()):
        for j in range(7):
            if j != y:
                distance[i, j] = (z[i, y] - z[i, j]) / np.linalg.norm(w[y] - w[j], dual)
    nearest = apgd.nearest_classes(linear, x, labels, norm)
    assert nearest.tolist() == distance.argsort(1)[:, :6].tolist()
    assert (nearest[:, 0] != logits.topk(2).indices[:, 1]).any(), (
        "it is more than the logits' order"
    )
    assert apgd.nearest_classes(linear, x, labels, norm, candidates=2).shape == (200, 2)

    eps = float(np.median(distance.min(1)))
    how = apgd.Ascent(norm, eps, steps=20, drop=True)
    found = apgd.towards_nearest(linear, x, labels, how, 1, PerBatch(SEED))
    with torch.no_grad():
        fooled = (linear(found).argmax(1) != labels).numpy()
    sure = abs(distance.min(1) / eps - 1) > 0.02
    assert (fooled == (distance.min(1) < eps))[sure].all()
    assert sure.sum() > 150


def test_square_asks_only_what_it_does_not_know(student):
    images, labels = digits(16)
    alive = clean_correct(student, images, labels, 16)
    images, labels = images[alive], labels[alive]
    rows = levels.Rows(student, exact=True)
    with torch.no_grad():
        square.linf(rows, images, labels, THREAT.eps, 1500, PerBatch(SEED))
    assert rows.computed < 0.4 * 1500 * len(images)


# -- streams of random numbers per image -----------------------------------------------------------
@pytest.mark.parametrize("threat", [THREAT, L2], ids=["linf", "l2"])
def test_with_its_own_stream_an_image_depends_on_no_batch(student, threat):
    """In float64, where rounding that depends on the batch's size decides nothing."""
    exact = copy.deepcopy(student).double()
    images, labels = digits(14)
    images, numbers = images.double(), torch.arange(100, 114)
    effort = Effort(6, 2, 25)
    order = torch.randperm(14, generator=torch.Generator().manual_seed(0))
    for attack in ("apgd-ce", "fab", "square"):
        outcomes = []
        for batch, rows in ((3, torch.arange(14)), (7, torch.arange(14)), (7, order)):
            broken, adversarial = torch.zeros(14, dtype=torch.bool), images.clone()
            for part in rows.split(batch):
                settings = {"threat": threat, "effort": effort, "version": "plus"}
                settings |= {"streams": "sample", "numbers": numbers[part]}
                broken[part], adversarial[part] = attacked(
                    exact, images[part], labels[part], attack, **settings
                )
            outcomes.append((broken, adversarial))
        assert all(torch.equal(broken, outcomes[0][0]) for broken, _ in outcomes), attack
        first_broken, first = outcomes[0]
        assert all(torch.allclose(other, first, atol=1e-9) for _, other in outcomes), attack
        assert first_broken.any(), attack
        assert not first_broken.all(), attack


@pytest.mark.parametrize("threat", [THREAT, L2], ids=["linf", "l2"])
def test_streams_per_image_break_about_as_many(student, threat):
    images, labels = digits(48)
    effort = Effort(10, 3, 200)
    plain, own = (
        whole(student, images, labels, 48, threat=threat, effort=effort, streams=streams)
        for streams in ("batch", "sample")
    )
    assert abs(int(plain.alive.sum()) - int(own.alive.sum())) <= 2
    settings = {"threat": threat, "effort": effort, "numbers": torch.arange(48)}
    alone = [
        attacked(student, images, labels, "square", streams=streams, **settings)[0]
        for streams in ("batch", "sample")
    ]
    assert abs(int(alone[0].sum()) - int(alone[1].sum())) <= 6, (
        "Square with own windows is as strong as with shared ones"
    )


def test_streams_per_image_need_numbers(student):
    with pytest.raises(ValueError, match="numbers"):
        attacked(student, *digits(4), "square", effort=QUICK, streams="sample")


def test_an_unknown_attack_is_refused(student):
    with pytest.raises(ValueError, match="attack 'cw' is not one of"):
        attacked(student, *digits(4), "cw", effort=QUICK)


def test_plan_chunks_cuts_survivors_in_order():
    alive = torch.tensor([1, 0, 1, 1, 0, 1, 1], dtype=torch.bool)
    assert [part.tolist() for part in plan_chunks(alive, 2)] == [[0, 2], [3, 5], [6]]
    assert plan_chunks(torch.zeros(4, dtype=torch.bool), 2) == []


def test_nobody_left_skips_the_remaining_attacks():
    images = torch.rand(3, 1, 4, 4)
    plan = Plan(torch.tensor([True, False, True]), images, 8, STANDARD)
    (chunk,) = plan.chunks()
    assert plan.merge(chunk, torch.tensor([True, True]), images[chunk.indices] / 2)
    assert plan.chunks() == []
    assert plan.robust_after == dict.fromkeys(STANDARD, 0)
    assert plan.first_failure == ["apgd-ce", "clean", "apgd-ce"]
    assert torch.equal(plan.adversarial, torch.stack([images[0] / 2, images[1], images[2] / 2]))


def test_a_single_survivor_is_attacked(student):
    images, labels = digits(IMAGES)
    index = int(clean_correct(student, images, labels, BATCH).nonzero()[0])
    images, labels = images[index : index + 1], labels[index : index + 1]
    adversarial, robust = package(student, images, labels, Effort(10, 3, 60))
    plan = planned(student, images, labels, Effort(10, 3, 60))
    assert torch.equal(plan.alive, robust)
    assert torch.equal(plan.adversarial, adversarial)


def test_an_attack_leaves_no_trace(caplog):
    student = net().eval()
    images, labels = digits(8)
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    before = images.clone()
    with caplog.at_level(logging.DEBUG):
        for attack in STANDARD:
            attacked(student, images, labels, attack, effort=Effort(3, 3, 3))
    assert torch.equal(torch.rand(4), expected)
    assert torch.equal(images, before)
    assert all(
        parameter.requires_grad and parameter.grad is None for parameter in student.parameters()
    )
    assert not logging.getLogger("auto-attack").disabled


def test_five_classes_use_all_four_targets():
    student = trained(classes=5)
    images, labels = digits(40, classes=5)
    effort = Effort(10, 4, 100)
    adversarial, robust = package(student, images, labels, effort, targets=4)
    plan = planned(student, images, labels, effort)
    assert torch.equal(plan.alive, robust)
    assert torch.equal(plan.adversarial, adversarial)
    assert any("all 4 target classes" in flag for flag in check(student, images, labels))


def test_three_classes_leave_out_the_targeted_loss():
    images, labels = digits(12, classes=3)
    student = net(3).eval()
    assert catalogue.attacks(3) == ("apgd-ce", "fab-t", "square")
    plan = planned(student, images, labels, Effort(3, 2, 20))
    assert list(plan.robust_after) == ["apgd-ce", "fab-t", "square"]
    assert any("apgd-t was left out" in flag for flag in check(student, images, labels))


class Noisy(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x) + 0.1 * torch.randn(len(x), 10)


class Stepped(nn.Module):
    """Quantises its input: the gradient is zero everywhere."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(torch.round(x * 4) / 4)


def test_a_plain_student_has_no_flags(student):
    assert check(student, *digits(16)) == []


@pytest.mark.parametrize(
    ("wrap", "words"),
    [
        (Noisy, "different logits for the same image"),
        (lambda inner: nn.Sequential(inner, nn.Softmax(1)), "probabilities, not logits"),
        (Stepped, "16 of 16 images have a zero gradient"),
    ],
)
def test_what_autoattack_cannot_judge_is_flagged(student, wrap, words):
    (flag,) = check(wrap(student).eval(), *digits(16))
    assert words in flag


def test_what_makes_no_sense_is_refused(student):
    images, labels = digits(8)
    broken = net().eval()
    with torch.no_grad():
        broken[-1].bias[3] = float("nan")
    for model, x, y, words in (
        (net().train(), images, labels, "train mode"),
        (student, images * 255, labels, r"must lie in \[0, 1\]"),
        (student, images - 0.5, labels, r"must lie in \[0, 1\]"),
        (student, images * float("nan"), labels, r"must lie in \[0, 1\]"),
        (student, (images * 255).byte(), labels, "expected float"),
        (student, images, labels[:5], "expected float"),
        (student, images[:0], labels[:0], "n > 0"),
        (student, images, labels + 5, "labels span"),
        (student, images, labels - 5, "labels span"),
        (nn.Sequential(student, nn.Unflatten(1, (2, 5))).eval(), images, labels, "logits of shape"),
        (nn.Sequential(student, nn.Linear(10, 1)).eval(), images, labels, "logits of shape"),
        (broken, images, labels, "8 of 8 images have logits that are NaN"),
    ):
        with pytest.raises(DataError, match=words):
            check(model, x, y)


def test_less_effort_is_flagged():
    assert checks.effort_flags(Effort()) == []
    assert "not standard AutoAttack" in checks.effort_flags(EFFORT)[0]


def test_square_beating_the_gradient_attacks_is_flagged():
    after = {"apgd-ce": 700, "apgd-t": 650, "fab-t": 650}
    assert checks.square_flags({**after, "square": 648}, 1000) == []
    assert "0.30%" in checks.square_flags({**after, "square": 647}, 1000)[0]


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_every_version_with_few_classes(classes):
    student = net(classes).eval()
    images, labels = digits(12, classes=classes)
    for version in ("standard", "plus", "rand"):
        plan = whole(student, images, labels, 8, effort=Effort(4, 2, 20), version=version)
        assert list(plan.robust_after) == list(catalogue.attacks(classes, version))
        assert ("apgd-dlr" in plan.robust_after) == (classes > 2 and version != "standard")
        flags = check(student, images, labels, version=version)
        assert any("left out" in flag for flag in flags) == (
            catalogue.attacks(classes, version) != catalogue.VERSIONS[version].attacks
        )


@pytest.mark.parametrize("shape", [(1, 4, 4), (3, 5, 5)])
@pytest.mark.parametrize("streams", ["batch", "sample"])
def test_tiny_images(shape, streams):
    torch.manual_seed(1)
    student = nn.Sequential(
        nn.Conv2d(shape[0], 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.SiLU(),
        nn.Flatten(),
        nn.Linear(6 * shape[1] ** 2, 5),
    ).eval()
    images = torch.rand(6, *shape)
    labels = student(images).argmax(1)
    for level in ("reference", "fast", "screen"):
        settings = {"effort": Effort(6, 3, 60), "streams": streams}
        plan = whole(student, images, labels, 4, level=level, **settings)
        assert len(plan.robust_after) == (2 if level == "screen" else 4)
    if shape[1] >= 5 or streams == "sample":  # the package divides by h//5
        whole(student, images, labels, 4, threat=L2, effort=Effort(6, 3, 60), streams=streams)


def test_rand_takes_randomness_for_granted(student):
    noisy = Noisy(student).eval()
    assert check(noisy, *digits(16), version="rand") == []
    assert checks.is_randomised(noisy, *digits(16))
    assert not checks.is_randomised(student, *digits(16))


class Saturating(nn.Module):
    """Confident beyond float32: softmax is 0 or 1, so gradients of the cross-entropy vanish."""

    def forward(self, logits):
        return torch.softmax(1e6 * logits.float(), 1)


class Rounded(nn.Module):
    """Logits in whole steps: no gradient anywhere, though larger changes still show."""

    def forward(self, logits):
        return torch.round(2 * logits)


def test_masked_gradients_are_caught(student):
    masked = nn.Sequential(student, Saturating()).eval()
    words = " ".join(check(masked, *digits(16)))
    assert "probabilities, not logits" in words
    assert "16 of 16 images have a zero gradient" in words
    images, labels = digits(48)
    rounded = nn.Sequential(student, Rounded()).eval()
    plan = whole(rounded, images, labels, 48, effort=Effort(5, 2, 300))
    assert any("Square lowered" in flag for flag in checks.square_flags(plan.robust_after, 48)), (
        "gradient attacks fail, Square does not"
    )


def test_what_must_stand_beside_a_result():
    assert checks.notes("standard", "reference", "batch", 10) == []
    for arguments, words in (
        (("standard", "screen", "batch", 10), "upper bound"),
        (("standard", "fast", "batch", 10), "not identical to the bit"),
        (("standard", "reference", "sample", 10), "depend on no batch"),
        (("rand", "reference", "batch", 10), "one pass misclassifies"),
        (("plus", "reference", "batch", 10), "more attacks"),
    ):
        (note,) = checks.notes(*arguments)
        assert words in note
    assert (
        checks.square_flags({"apgd-ce": 5, "apgd-dlr": 5}, 10)
        == []
        == checks.square_flags({"square": 5}, 10)
    )


# -- the catalogue ---------------------------------------------------------------------------------
def test_streams_and_names_never_change():
    """Verdicts with streams='sample', and names of files, depend on them."""
    assert {name: attack.stream for name, attack in catalogue.ATTACKS.items()} == {
        "apgd-ce": 1,
        "apgd-dlr": 2,
        "apgd-t": 3,
        "fab": 4,
        "fab-t": 5,
        "square": 6,
        "apgd-malt": 7,
    }
    assert list(catalogue.STAGES) == ["clean", *catalogue.ATTACKS, "curve", "corruptions"]


def test_every_attack_of_a_version_is_in_the_catalogue_and_has_a_loop():
    versions = catalogue.VERSIONS.values()
    named = {name for version in versions for name in (*version.attacks, *version.screen)}
    assert named == set(catalogue.ATTACKS) == set(LOOPS)
    assert set(catalogue.VERSIONS) == set(get_args(Evaluation.model_fields["version"].annotation))


def test_attacks_are_shown_in_the_order_in_which_they_ran():
    ran = {"square": 0.1, "apgd-ce": 0.3, "of another program": 0.2}
    assert catalogue.in_order(set(ran), "standard") == ["apgd-ce", "square", "of another program"]
    assert catalogue.in_order({"fab", "square", "apgd-dlr"}, "plus") == [
        "apgd-dlr",
        "fab",
        "square",
    ]
    assert catalogue.in_order({"square", "fab-t"}, "of later") == ["fab-t", "square"]
    assert [catalogue.label(name) for name in ("square", "fab-t", "new")] == [
        "Square",
        "FAB-T",
        "NEW",
    ]
