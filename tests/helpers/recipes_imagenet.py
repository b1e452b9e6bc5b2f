"""The published ImageNet-1K trainings (arXiv 2112.12786, the original's cls/train.py and the
commands of its README), as one table; tests/helpers/recipes.py has detection and segmentation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
# Of epochs; computed with the CosineLRScheduler of timm 0.4.9.
RATES = {
    0: 1e-6,
    1: 5.095e-05,
    19: 9.5005e-04,
    20: 9.891830623632338e-04,
    160: 4.5325841068251166e-04,
    240: 1.0453658778440107e-04,
    299: 1.002714116407149e-05,
    300: 1e-5,
    309: 1e-5,
}


@dataclass(frozen=True)
class Recipe:
    arch: str
    drop_path: float
    parameters: tuple[float, float]  # in millions, as published: from, to
    ema_decay: float | None = None
    lr: float = 1e-3
    weight_decay: float = 0.05  # of parameters with two dimensions and more

    def facts(self) -> dict[str, Any]:
        """What the recipe says, under the names that the tests use."""
        return {
            "epochs": 310,
            "images on a GPU": 128,
            "images on 8 GPUs": 1024,
            "short batches": False,
            "iterations of an epoch": 1251,
            "mixed precision": True,
            "clipping": {"max_norm": 5.0},
            "betas": (0.9, 0.999),
            "eps": 1e-8,
            "seed": (42, True),  # True: and the process's rank
            "best checkpoint": (["accuracy/top1"], "greater"),
            "ema decay": self.ema_decay,
            "colours": ("RGB", MEAN, STD),
            "small maps shifted": False,
            "classes": 1000,
            "label smoothing": 0.1,
            "mixing": [("Mixup", 0.8), ("CutMix", 1.0)],
            "mixing odds": None,  # equal
            "erasing": (0.25, (0.02, 1 / 3), (0.3, 1 / 0.3)),
            "crop": ((224, 224), (0.08, 1.0), (3 / 4, 4 / 3)),
            "crop interpolation": ["bilinear", "bicubic"],
            "crop odds": None,  # equal
            "flip": 0.5,
            "RandAugment": (9, 0.5, 2, 15),  # magnitude, its deviation, operations drawn, of
            "test crop": (248, 224, "bicubic"),
        }


RECIPES = [
    Recipe("tiny", 0.1, (28, 29)),
    Recipe("small", 0.3, (53, 53)),
    Recipe("base", 0.5, (93, 93), ema_decay=0.99992),
]
