"""The plan, cut in chunks, against one process of the package itself: same verdicts, same adversarial images, to the bit."""

import logging

import pytest
import torch
from pyautoattack import AutoAttack
from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from dra_ray.config import Threat
from dra_ray.errors import DataError
from dra_ray.robust import autoattack
from dra_ray.robust.autoattack import Effort, Memo, Plan, attack_chunk, check, clean_correct, plan_chunks

EFFORT = Effort(apgd_steps=25, fab_steps=6, square_queries=1000)
THREAT = Threat(eps_255=24, step_255=6)
IMAGES, BATCH, SEED = 96, 32, 7


def digits(count, classes=10):
    bunch = load_digits(n_class=classes)
    images = torch.round(torch.tensor(bunch.images, dtype=torch.float32)[:, None] * 255 / 16) / 255
    return images[-count:], torch.tensor(bunch.target[-count:])


def net(classes=10, channels=1):
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(channels, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.SiLU(), nn.Conv2d(12, 24, 3, stride=2, padding=1), nn.SiLU()),
        *(nn.Flatten(), nn.Linear(24 * 16, classes)),
    )


def trained(classes=10):
    """A small net after a few seconds of one-step adversarial training: some images survive, some do not."""
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
        F.cross_entropy(student((x + THREAT.eps * gradient.sign()).clamp(0, 1).detach()), y).backward()
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


def single_process(student, images, labels, effort, targets=9, seed=SEED, batch=BATCH):
    """The package's own loop over batches and attacks, with less effort. Parameters need gradients, as users have them."""
    single = AutoAttack(student, norm="Linf", eps=THREAT.eps, seed=seed, version="standard")
    common = {"n_iter": effort.apgd_steps, "eps": THREAT.eps, "norm": "Linf", "n_restarts": 1, "seed": seed, "device": "cpu", "logger": single.logger}
    single.apgd = APGDAttack(student, **common)
    single.apgd_targeted = APGDAttack_targeted(student, n_target_classes=targets, **common)
    single.fab.n_iter, single.fab.n_target_classes, single.square.n_queries = effort.fab_steps, targets, effort.square_queries
    adversarial, predicted = single.run_standard_evaluation(images, labels, batch_size=batch)
    return adversarial, predicted == labels


def planned(student, images, labels, effort, backwards=False, seed=SEED):
    plan = Plan(clean_correct(student, images, labels, BATCH), images, BATCH, num_classes=student(images[:1]).shape[1])
    while chunks := plan.chunks():
        for chunk in reversed(chunks) if backwards else chunks:
            torch.rand(5)  # whatever ran before in this process must not matter
            plan.merge(chunk, *attack_chunk(student, images[chunk.indices], labels[chunk.indices], chunk.attack, THREAT, seed, effort))
    return plan


@pytest.fixture(scope="module")
def both(student):
    images, labels = digits(IMAGES)
    return single_process(student, images, labels, EFFORT), planned(student, images, labels, EFFORT, backwards=True)


def test_chunks_give_what_a_single_process_gives(both):
    (adversarial, robust), plan = both
    assert torch.equal(plan.alive, robust)
    assert torch.equal(plan.adversarial, adversarial)
    fooled = [name for name in plan.first_failure if name]
    assert 8 < len(fooled) < IMAGES - 8 and plan.first_failure.count("apgd-ce") > 8, "the net must be worth attacking"


def test_the_books_add_up(both):
    _, plan = both
    robust = plan.first_failure.count("")
    assert robust == int(plan.alive.sum()) == plan.robust_after["square"]
    assert list(plan.robust_after) == list(autoattack.ATTACKS)
    assert sorted(plan.robust_after.values(), reverse=True) == list(plan.robust_after.values())
    images, _ = digits(IMAGES)
    assert float((plan.adversarial - images).abs().max()) <= THREAT.eps + 1e-6
    assert float(plan.adversarial.min()) >= 0 and float(plan.adversarial.max()) <= 1


def test_the_seed_matters(student):
    images, labels = digits(16)
    one, other = (attack_chunk(student, images, labels, "apgd-ce", THREAT, seed, Effort(5, 5, 5)) for seed in (SEED, SEED + 1))
    assert not torch.equal(one[1], other[1])


def test_memo_changes_no_bit_and_saves_most_queries(student):
    images, labels = digits(16)
    effort = Effort(square_queries=2500)
    alive = clean_correct(student, images, labels, 16)
    images, labels = images[alive], labels[alive]
    memo = Memo(student)
    run = autoattack._single(student, images.device, THREAT, SEED, effort, num_classes=10)
    with torch.no_grad():
        plain = run.square.perturb(images.clone(), labels.clone())
        run.square.predict = memo
        assert torch.equal(run.square.perturb(images.clone(), labels.clone()), plain)
    assert memo.exact and memo.computed < 0.5 * 2500 * len(images)


def test_memo_gives_up_where_a_row_depends_on_its_batch():
    def mixing(x):
        return torch.stack([x.flatten(1).sum(1), x.sum().expand(len(x))], 1)

    memo = Memo(mixing)
    x = torch.rand(6, 1, 4, 4)
    for batch in (x, x[:5], x[:4], torch.cat([x[:3], x[:3] + 1]), x[:2]):
        assert torch.equal(memo(batch), mixing(batch))
    assert not memo.exact


def test_memo_stays_within_its_limit(student):
    memo = Memo(student, limit=10)
    x = torch.rand(8, 1, 8, 8)
    with torch.no_grad():
        for step in range(6):
            batch = torch.cat([x[:4], torch.rand(4, 1, 8, 8)]) if step else x
            assert torch.equal(memo(batch), student(batch))
    assert len(memo._known) == 10


def test_plan_chunks_cuts_survivors_in_order():
    alive = torch.tensor([1, 0, 1, 1, 0, 1, 1], dtype=torch.bool)
    assert [part.tolist() for part in plan_chunks(alive, 2)] == [[0, 2], [3, 5], [6]]
    assert plan_chunks(torch.zeros(4, dtype=torch.bool), 2) == []


def test_nobody_left_skips_the_remaining_attacks():
    images = torch.rand(3, 1, 4, 4)
    plan = Plan(torch.tensor([True, False, True]), images, 8, 10)
    (chunk,) = plan.chunks()
    assert plan.merge(chunk, torch.tensor([True, True]), images[chunk.indices] / 2)
    assert plan.chunks() == [] and plan.robust_after == dict.fromkeys(autoattack.ATTACKS, 0)
    assert plan.first_failure == ["apgd-ce", "clean", "apgd-ce"]
    assert torch.equal(plan.adversarial, torch.stack([images[0] / 2, images[1], images[2] / 2]))


def test_a_single_survivor_is_attacked(student):
    images, labels = digits(IMAGES)
    index = int(clean_correct(student, images, labels, BATCH).nonzero()[0])
    images, labels = images[index : index + 1], labels[index : index + 1]
    adversarial, robust = single_process(student, images, labels, Effort(10, 3, 60))
    plan = planned(student, images, labels, Effort(10, 3, 60))
    assert torch.equal(plan.alive, robust) and torch.equal(plan.adversarial, adversarial)


def test_an_attack_leaves_no_trace(caplog):
    student = net().eval()
    images, labels = digits(8)
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    before = images.clone()
    with caplog.at_level(logging.DEBUG):
        for attack in autoattack.ATTACKS:
            attack_chunk(student, images, labels, attack, THREAT, SEED, Effort(3, 3, 3))
    assert torch.equal(torch.rand(4), expected) and torch.equal(images, before)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in student.parameters())
    assert not logging.getLogger("auto-attack").disabled


def test_five_classes_use_all_four_targets():
    student = trained(classes=5)
    images, labels = digits(40, classes=5)
    effort = Effort(10, 4, 100)
    adversarial, robust = single_process(student, images, labels, effort, targets=4)
    plan = planned(student, images, labels, effort)
    assert torch.equal(plan.alive, robust) and torch.equal(plan.adversarial, adversarial)
    assert any("all 4 target classes" in flag for flag in check(student, images, labels))


def test_three_classes_leave_out_the_targeted_loss():
    images, labels = digits(12, classes=3)
    student = net(3).eval()
    assert autoattack.attacks(3) == ("apgd-ce", "fab-t", "square")
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
    assert autoattack.effort_flags(Effort()) == []
    assert "not standard AutoAttack" in autoattack.effort_flags(EFFORT)[0]


def test_square_beating_the_gradient_attacks_is_flagged():
    after = {"apgd-ce": 700, "apgd-t": 650, "fab-t": 650}
    assert autoattack.square_flags({**after, "square": 648}, 1000) == []
    assert "0.30%" in autoattack.square_flags({**after, "square": 647}, 1000)[0]
