"""A teacher's card: `card.json` in its folder says what it is.

Needs no torch, so that a command can look before anything slow is imported.
"""

from __future__ import annotations

from typing import Any

from dra_ray.errors import CheckpointError, StorageError
from dra_ray.storage import Store

CARD = "card.json"


def read_card(store: Store) -> dict[str, Any]:
    """The card; `CheckpointError` if there is no teacher here."""
    try:
        card = (store / CARD).read_json()
    except StorageError:
        if (store / CARD).exists():
            raise
        raise CheckpointError(
            f"no teacher at '{store}' ({CARD} is missing); make one with `dra teacher train` or "
            "correct teacher.uri"
        ) from None
    if not isinstance(card, dict) or not {"architecture", "digest"} <= card.keys():
        raise CheckpointError(
            f"'{store / CARD}' lacks 'architecture' or 'digest'; train the teacher again"
        )
    return card
