"""The published training recipes (arXiv 2112.12786 and the original's configs), as one table.

Those of ELSA-VOLO, of which none is published, are ELSA-Swin's with VOLO's rates of drop path.

The built objects of both frameworks are compared with what `Recipe.facts` makes of it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

from elsa_core.blocks import Block

DEPTHS = {
    "tiny": (2, 2, 6, 2),
    "small": (2, 2, 18, 2),
    "volo_d1": (4, 4, 8, 2),
    "volo_d2": (6, 4, 10, 4),
    "volo_d3": (8, 8, 16, 4),
}
LETTERS = {"tiny": "t", "small": "s", "volo_d1": "d1", "volo_d2": "d2", "volo_d3": "d3"}
COCO_IMAGES = 117_266  # training images with objects
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


@dataclass(frozen=True)
class Recipe:
    """A published model; lengths in iterations of 16 images unless named otherwise."""

    method: str
    arch: str
    drop_path: float
    epochs: int | None = None
    lr: float = 1e-4
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.999)
    batch: int = 16
    gpus: int = 8
    warmup: int = 500
    warmup_factor: float = 0.001
    mixed_precision: bool = True
    least_overlap: float = 0.3  # IoU of a box with the best anchors for it, to be positive

    @property
    def name(self) -> str:
        schedule = f"{self.epochs // 12}x" if self.epochs else "160k"
        return f"{self.method}-{LETTERS[self.arch]}-{schedule}"

    @property
    def volo(self) -> bool:
        return self.arch.startswith("volo")

    @property
    def iterations(self) -> int:
        """In whole epochs, whose last batch may be smaller."""
        return self.epochs * ceil(COCO_IMAGES / self.batch) if self.epochs else 160_000

    @property
    def drop_paths(self) -> list[float]:
        """Of each block, in order."""
        first, *others = DEPTHS[self.arch]
        last = first + sum(others) - 1
        spared = first if self.volo else 0  # the blocks of VOLO's first stage
        return [self.drop_path * block / last * (block >= spared) for block in range(last + 1)]

    def rate(self, iteration: int) -> float:
        """The learning rate of an iteration."""
        if self.epochs:
            steps = [self.iterations * part // 36 for part in self.steps]
            rate = self.lr * 0.1 ** sum(iteration >= step for step in steps)
        else:
            rate = self.lr * (self.iterations - iteration) / self.iterations
        done = min(1.0, iteration / self.warmup)
        return rate * (self.warmup_factor + (1 - self.warmup_factor) * done)

    @property
    def steps(self) -> tuple[int, int]:
        """After how many 36ths of the training the rate falls to a tenth."""
        return {12: (24, 33), 36: (27, 33)}[self.epochs]

    def facts(self) -> dict[str, Any]:
        """What the recipe says about model and data, under the names that the tests use."""
        return common_facts(self) | (
            upernet_facts(self) if self.method == "upernet" else rcnn(self)
        )


def common_facts(recipe: Recipe) -> dict[str, Any]:
    return {
        "colours": ("RGB", MEAN, STD),
        "drop paths": recipe.drop_paths,
        "images on a GPU": recipe.batch // recipe.gpus,
        "mixed precision": recipe.mixed_precision,
        "clipping": None,
        "flip": 0.5,
        "betas": recipe.betas,
    }


def rcnn(recipe: Recipe) -> dict[str, Any]:
    """Both detectors' facts; deviations are those of the box targets."""
    short_sides = tuple(range(480, 801, 32))
    facts = {
        "padding": 32,
        "training sizes": (short_sides, 1333),
        "sizes before the crop": ((400, 500, 600), 1333),
        "crop": ("absolute_range", (384, 600), 0.5),
        "test size": (800, 1333),
        "resize": "cv2",
        "least edge": 32,
        "empty images": False,
        "pyramid": (256, 5),
        "anchor sizes": (32, 64, 128, 256, 512),
        "anchor ratios": (0.5, 1.0, 2.0),
        "rpn thresholds": (0.3, 0.7),
        "rpn samples": (256, 0.5),
        "rpn nms": (0.7, 0.7),  # training, test
        "rpn test proposals": (1000, 1000),
        "roi samples": (512, 0.25),
        "roi resolutions": (7, 14),
        "sampling ratios": (0, 0),
        "classes": 80,
        "class-specific boxes": True,
        "mask convolutions": 4,
        "score threshold": 0.05,
        "nms threshold": 0.5,
        "detections": 100,
        "mask threshold": 0.5,
    }
    if recipe.method == "mask-rcnn":
        return facts | {
            "rpn box loss": ("L1", None, 1.0),
            "rpn training proposals": (2000, 1000),
            "rpn border": -1,
            "box loss": ("L1", 1.0),
            "stage weights": (1,),
            "roi thresholds": (0.5,),
            "target deviations": ((0.1, 0.1, 0.2, 0.2),),
            "box head": (0, 2, 1024, None),
            "mask heads": 1,
        }
    return facts | {
        "rpn box loss": ("SmoothL1", 1 / 9, 1.0),
        "rpn training proposals": (2000, 2000),
        "rpn border": 0,
        "box loss": ("GIoU", 10.0),
        "stage weights": (1, 0.5, 0.25),
        "roi thresholds": (0.5, 0.6, 0.7),
        "target deviations": tuple(
            (a, a, b, b) for a, b in ((0.1, 0.2), (0.05, 0.1), (0.033, 0.067))
        ),
        "box head": (4, 1, 1024, "SyncBN"),
        "mask heads": 3,
    }


def first_weights(method: str, name: str, shape: Sequence[int]) -> tuple[str, float]:
    """Distribution and standard deviation of a parameter of neck or heads, by OpenMMLab's name.

    Kaiming's are for ReLU and by fan-out, as in MMCV; biases are 0 and scales of norms 1.
    """
    if name.endswith(".bias"):
        return "constant", 0.0
    if ".bn." in name:
        return "constant", 1.0
    if name.startswith("neck.") or ".shared_fcs." in name:
        return "uniform", math.sqrt(2 / (math.prod(shape[1:]) + math.prod(shape) // shape[1]))
    if name.startswith("rpn_head.") or re.search(r"\.(fc_cls|conv_seg)\.", name):
        return "normal", 0.01
    if ".fc_reg." in name:
        return "normal", 0.001
    return "normal", math.sqrt(2 / (math.prod(shape) // shape[1]))


def upernet_facts(recipe: Recipe) -> dict[str, Any]:
    scales = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
    return {
        "crop": ((512, 512), 0.75),
        "training scale": ((2048, 512), (0.5, 2.0)),
        "test scale": (2048, 512),
        "validation scales": [tuple(int(side * r) for side in (2048, 512)) for r in scales],
        "validation flip": False,
        "best checkpoint": "mIoU",
        "augmented test scales": [tuple(int(side * r) for side in (2048, 512)) for r in scales],
        "augmented test flip": True,
        "colours distorted": True,
        "head": (512, (1, 2, 3, 6), 0.1),
        "norm": "SyncBN",
        "auxiliary head": (512 if recipe.arch in ("volo_d2", "volo_d3") else 384, 256, 0.4),
        # ELSA-VOLO's maps cover images padded to multiples of 32 pixels.
        "test padding": 32 if recipe.volo else 0,
        "loss weight": 1.0,
        "ignored label": 255,
        "classes": 150,
        "saved every": 16_000,
        "evaluated every": 16_000,
    }


def _detector(method: str, arch: str, epochs: int, drop_path: float) -> Recipe:
    return Recipe(method, arch, drop_path, epochs)


def upernet(arch: str, drop_path: float = 0.3, **changes: int) -> Recipe:
    return Recipe(
        "upernet",
        arch,
        drop_path,
        lr=6e-5,
        weight_decay=0.01,
        warmup=1500,
        warmup_factor=1e-6,
        mixed_precision=False,
        **changes,
    )


RECIPES = [
    _detector("mask-rcnn", "tiny", 12, 0.1),
    _detector("mask-rcnn", "tiny", 36, 0.2),
    _detector("mask-rcnn", "small", 12, 0.2),
    _detector("mask-rcnn", "small", 36, 0.75),
    _detector("cascade-mask-rcnn", "tiny", 12, 0.0),
    _detector("cascade-mask-rcnn", "tiny", 36, 0.2),
    _detector("cascade-mask-rcnn", "small", 12, 0.2),
    _detector("cascade-mask-rcnn", "small", 36, 0.75),
    upernet("tiny"),
    upernet("small"),
    _detector("mask-rcnn", "volo_d1", 36, 0.1),
    upernet("volo_d1", 0.1),
    upernet("volo_d2", 0.2),
    upernet("volo_d3", 0.5),
]


def check_facts(got: dict[str, Any], expected: dict[str, Any]) -> None:
    """Compares what a framework has built with what a recipe says, fact by fact."""
    assert got.keys() == expected.keys()
    for name, fact in expected.items():
        assert equal(got[name], fact), f"{name}: {got[name]} instead of {fact}"


def equal(left: Any, right: Any) -> bool:
    """Equality of nested tuples and lists, of numbers up to rounding to float32."""
    if isinstance(right, (tuple, list)):
        return len(left) == len(right) and all(map(equal, left, right))
    if isinstance(right, float) and not isinstance(left, (str, type(None))):
        return math.isclose(left, right, rel_tol=1e-6, abs_tol=1e-12)
    return left == right


def drop_paths(backbone: Any) -> list[float]:
    """Of each block, in order."""
    return [block.drop_path.rate for block in backbone.modules() if isinstance(block, Block)]


def groups_by_name(model: Any, optimizer: Any) -> dict[str, dict[str, Any]]:
    """The optimizer's group of each parameter, by the parameter's name."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        names[id(parameter)]: group
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
