"""Trials compared like with like, on cases whose answer is plain."""

from __future__ import annotations

from dra_ray.sweeps import equal


def grown(last: dict[str, int], top: dict[str, float]) -> dict[str, dict[int, float]]:
    """Trials that gain with every epoch, each up to its last."""
    return {
        trial: {epoch: top[trial] * epoch for epoch in range(1, end + 1)}
        for trial, end in last.items()
    }


def test_a_value_is_not_better_for_having_trained_longer() -> None:
    """With equal quality, the value whose trials all stopped at the first rung must not look
    worse.
    """
    trials = {
        "a": {"synthetic.images": 0},
        "b": {"synthetic.images": 0},
        "c": {"synthetic.images": 3000},
        "d": {"synthetic.images": 3000},
    }
    reported = grown({"a": 12, "b": 2, "c": 2, "d": 2}, dict.fromkeys(trials, 0.06))
    (effect,) = equal.effects("synthetic.images", trials, reported)
    assert effect.epoch == 2
    assert set(effect.robust_accuracy.values()) == {0.12}
    assert effect.left_out == ()


def test_trials_that_stopped_before_the_common_epoch_are_left_out() -> None:
    trials = {"a": {"x": 1}, "b": {"x": 1}, "c": {"x": 2}}
    (effect,) = equal.effects(
        "x", trials, grown({"a": 8, "b": 2, "c": 12}, {"a": 1, "b": 1, "c": 2})
    )
    assert (effect.epoch, effect.robust_accuracy, effect.left_out) == (8, {"a": 8, "c": 16}, ("b",))


def test_other_radii_and_other_images_are_never_joined() -> None:
    trials = {f"{x}{eps}": {"x": x, "threat.eps_255": eps} for x in (1, 2) for eps in (4, 8)}
    reported = grown(dict.fromkeys(trials, 3), dict.fromkeys(trials, 1.0))
    assert equal.effects("threat.eps_255", trials, reported) == []
    assert [
        (effect.task, sorted(effect.robust_accuracy))
        for effect in equal.effects("x", trials, reported)
    ] == [
        ({"threat.eps_255": 4}, ["14", "24"]),
        ({"threat.eps_255": 8}, ["18", "28"]),
    ]
    for field in equal.TASK:
        assert (
            equal.effects(
                field, {"a": {field: 1}, "b": {field: 2}}, grown({"a": 2, "b": 2}, {"a": 1, "b": 2})
            )
            == []
        )


def test_nothing_compares_without_reports_or_with_one_value() -> None:
    trials = {"a": {"x": 1}, "b": {"x": 2}}
    assert equal.effects("x", trials, {}) == []
    assert equal.effects("x", trials, grown({"a": 3}, {"a": 1})) == []
    assert equal.effects("y", trials, grown({"a": 3, "b": 3}, {"a": 1, "b": 1})) == []
    assert (
        equal.effects("x", trials, {"a": {2: 0.1, 4: 0.2}, "b": {3: 0.1}}) == []
    )  # never validated after the same epoch
    assert equal.matches(trials, grown({"a": 3}, {"a": 1})) == []


def test_alignment_is_matched_with_the_baseline_of_equal_data_and_radius() -> None:
    trials = {
        "a": {"align.weight": 0, "synthetic.images": 0},
        "b": {"align.weight": 1, "synthetic.images": 0},
        "c": {"align.weight": 2, "synthetic.images": 0},
        "d": {"align.weight": 0, "synthetic.images": 9},
        "e": {"align.weight": 1, "synthetic.images": 9},
        "f": {"align.weight": 1, "synthetic.images": 99},  # without a baseline
    }
    reported = grown(
        {"a": 4, "b": 9, "c": 4, "d": 2, "e": 9, "f": 9},
        {"a": 1, "b": 2, "c": 3, "d": 5, "e": 4, "f": 9},
    )
    first, second = equal.matches(trials, reported)
    assert first == equal.Match(4, {"synthetic.images": 0}, "c", 12, "a", 4)
    assert second == equal.Match(2, {"synthetic.images": 9}, "e", 8, "d", 10)
    assert equal.differing(trials["c"], trials["d"]) == {"synthetic.images": (0, 9)}
    assert equal.differing(trials["a"], trials["b"]) == {}
    assert equal.differing({"threat.eps_255": 4}, {}) == {"threat.eps_255": (4, None)}
