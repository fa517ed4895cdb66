"""Synthetic shards: `.npz` files with `image` uint8 [N,H,W,C] and `label` int64 [N], the layout of DM-AT's sets."""

from __future__ import annotations

import torch

from dra_ray.data import Images, Split
from dra_ray.errors import DataError
from dra_ray.storage import Store


def read(store: Store, images: int, like: Images) -> Split:
    """The first `images` of the shards in `store`, in the order of their names, as uint8 [N,C,H,W].

    Raises `DataError` when there are fewer, or when shapes or labels do not fit the real images.
    """
    shards = [name for name in store.names() if name.endswith(".npz")]
    if not shards:
        raise DataError(f"synthetic.uri='{store}' holds no .npz shards; make them with `dra synthesize`")
    pictures, labels, count = [], [], 0
    for name in shards:
        arrays = (store / name).read_npz()
        if not {"image", "label"} <= arrays.keys():
            raise DataError(f"'{store / name}' has keys {sorted(arrays)}; expected 'image' and 'label'")
        image, label = arrays["image"], arrays["label"]
        wanted = (like.resolution, like.resolution, like.channels)
        if image.dtype != "uint8" or image.shape[1:] != wanted or len(image) != len(label):
            raise DataError(
                f"'{store / name}': images {image.dtype} {image.shape} with {len(label)} labels do not fit '{like.name}' (uint8 {wanted})"
            )
        if len(label) and not (label.min() >= 0 and label.max() < like.num_classes):
            raise DataError(f"'{store / name}': labels reach {label.max()}, but '{like.name}' has {like.num_classes} classes")
        pictures.append(torch.from_numpy(image).permute(0, 3, 1, 2))
        labels.append(torch.from_numpy(label.astype("int64")))
        count += len(label)
        if count >= images:
            break
    if count < images:
        raise DataError(f"synthetic.images={images}, but '{store}' holds {count}; lower it or make more with `dra synthesize`")
    return Split(torch.cat(pictures)[:images].contiguous(), torch.cat(labels)[:images])
