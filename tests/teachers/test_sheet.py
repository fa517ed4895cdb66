import io

import numpy as np
import torch
from PIL import Image

from dra_ray.teachers.sheet import sheet


def test_every_image_is_enlarged_in_its_cell():
    images = torch.arange(6, dtype=torch.uint8).reshape(6, 1, 1, 1).expand(6, 1, 8, 8) * 40
    pixels = np.asarray(Image.open(io.BytesIO(sheet(images, columns=4))))
    assert pixels.shape == (2 * 50, 4 * 50)
    assert [int(pixels[10, 10 + 50 * k]) for k in range(4)] == [0, 40, 80, 120]
    assert [int(pixels[60, 10 + 50 * k]) for k in range(2)] == [160, 200]


def test_colour():
    images = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    images[:, 1] = 255
    pixels = np.asarray(Image.open(io.BytesIO(sheet(images, columns=1))))
    assert pixels[5, 5].tolist() == [0, 255, 0]
