"""A contact sheet of a set in rows."""

from __future__ import annotations

import torch

from dra_ray.data import rows
from dra_ray.storage import Store
from dra_ray.teachers.sheet import sheet

CLASSES, ROWS = 10, 8
LOOKED_AT = 4096


def of_set(store: Store) -> bytes:
    """PNG of the first images of each of the first classes, a column each; a class that is rare
    among the first images of the set has fewer.
    """
    index = rows.read_index(store)
    pictures = rows.RowSet(store, index, index.images)
    images, labels = pictures.take(torch.arange(min(LOOKED_AT, len(pictures))))
    pictures.close()
    classes = min(CLASSES, index.num_classes)
    blank = torch.full_like(images[:1], 255)
    columns = []
    for label in range(classes):
        own = images[labels == label][:ROWS]
        columns.append(torch.cat([own, blank.expand(ROWS - len(own), *blank.shape[1:])]))
    return sheet(torch.stack(columns, 1).flatten(0, 1), columns=classes)
