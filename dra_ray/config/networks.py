"""Names of students: what they may be, and which would be absurdly large. Needs no torch, so that a
name is judged with its config.
"""

from __future__ import annotations

import re

# the deepest residual network and the largest classifier of images that were ever published have
# 1001 layers and 7e9 parameters (arXiv 1603.05027; DINOv3, arXiv 2508.10104)
MOST_LAYERS, MOST_PARAMETERS = 1001, 10**10
TIMM, DIFFUSION = "timm/", "diffusion/"
# name -> module and class in students/ of those that are built from classes and normalisation alone
PLAIN = {"rawrn-70-16": ("wrn", "RaWRN"), "resnet-18": ("resnet", "ResNet18")}
# of what is evaluated beside places: a classifier of timm, a RobustBench checkpoint, a function
ROBUSTBENCH = "robustbench:"
FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
_WIDE = re.compile(r"(relu-)?wrn-(\d{1,9})-(\d{1,9})")
_VIT = re.compile(r"vit-([tsb])-([1-9]\d{0,8})")


def wide(name: str) -> tuple[int, int] | None:
    """Depth and width of wrn-DEPTH-WIDTH and relu-wrn-DEPTH-WIDTH; None for other names."""
    match = _WIDE.fullmatch(name)
    return (int(match[2]), int(match[3])) if match else None


def vit(name: str) -> tuple[str, int] | None:
    """Size and patch of vit-SIZE-PATCH; None for other names."""
    match = _VIT.fullmatch(name)
    return (match[1], int(match[2])) if match else None


def teacher_of(name: str) -> str | None:
    """The teacher's URI in diffusion/URI; None for other names."""
    return name.removeprefix(DIFFUSION) if name.startswith(DIFFUSION) else None


def is_place(what: str) -> bool:
    """Whether what is evaluated is a path or a URI: timm/NAME, robustbench:URI and module:function
    are not.
    """
    return not (what.startswith((TIMM, ROBUSTBENCH)) or FUNCTION.fullmatch(what))


def problem(name: str) -> str | None:
    """What is wrong with a student's name, and the remedy; None where nothing is, as far as it
    tells.
    """
    if name in PLAIN or vit(name) or name.startswith(TIMM) or teacher_of(name):
        return None
    if size := wide(name):
        return _problem_of_wide(*size)
    return (
        "is not known; write wrn-DEPTH-WIDTH, such as wrn-28-10, relu-wrn-DEPTH-WIDTH, vit-b-2, "
        f"{', '.join(PLAIN)}, timm/NAME or diffusion/TEACHER"
    )


def _problem_of_wide(depth: int, width: int) -> str | None:
    if depth < 10 or (depth - 4) % 6 or width < 1:
        return "depth must be 6n+4, such as 10, 16, 28 or 34, and width at least 1"
    if depth > MOST_LAYERS:
        return f"depth {depth} is above {MOST_LAYERS}; choose less, such as wrn-28-10"
    return too_large(_wide_parameters((depth - 4) // 6, width))


def too_large(parameters: int) -> str | None:
    """What is wrong with a student of so many parameters, if anything is."""
    if parameters <= MOST_PARAMETERS:
        return None
    return (
        f"has {parameters:.2g} parameters, and at most {MOST_PARAMETERS:.0e} are allowed; choose a "
        "smaller network"
    )


def _wide_parameters(blocks: int, width: int) -> int:
    """Of a Wide ResNet's convolutions: two of 3x3 a block."""
    convolutions, before = 0, 16
    for channels in (16 * width, 32 * width, 64 * width):
        convolutions += 9 * channels * (before + (2 * blocks - 1) * channels)
        before = channels
    return convolutions
