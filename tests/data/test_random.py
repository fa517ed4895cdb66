"""Random streams: pure functions of (seed, purpose, number), with values that must never change."""

from __future__ import annotations

from dra_ray.data.random import Stream, derive


def test_streams_keep_the_values_that_old_runs_were_drawn_with() -> None:
    assert {stream.name: int(stream) for stream in Stream} == {
        "BATCH_ORDER": 1,
        "BATCH_DRAWS": 2,
        "AUGMENT": 3,
        "ATTACK": 4,
        "TEACHER_NOISE": 5,
        "VALIDATION": 6,
        "EXTRA_NOISE": 7,
        "EXTRA_SIGMA": 8,
        "STUDENT": 9,
        "TEACHER_INIT": 10,
        "TEACHER_TRAINING": 11,
        "TEACHER_DROPOUT": 12,
        "TEACHER_AUGMENT": 13,
        "TEACHER_VALIDATION": 14,
        "PROBE_STUDENT": 30,
        "LABEL_LEAK": 31,
        "TARGET_STATISTICS": 32,
        "ANALYSIS": 33,
        "CANONICAL": 34,
        "CANONICAL_BATCH": 35,
        "CANONICAL_AUGMENT": 36,
        "BACKGROUND": 37,
        "WINDOW_ORDER": 38,
        "WINDOW_ROWS": 39,
        "WINDOW_DRAWS": 40,
        "CONVERT_BLOCKS": 41,
        "CONVERT_ROWS": 42,
    }


def test_a_stream_is_the_number_that_it_stands_for() -> None:
    assert derive(7, Stream.AUGMENT, 2) == derive(7, 3, 2)
    assert len({derive(0, stream, 0) for stream in Stream}) == len(Stream)
