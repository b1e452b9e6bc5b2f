"""The published ImageNet-1K trainings, as one table: those of ELSA-Swin (arXiv 2112.12786, the
original's cls/train.py and the commands of its README), and for ELSA-VOLO, of which the paper only
says that it keeps them, those of VOLO (arXiv 2106.13112, main.py and README of its repository).
tests/helpers/recipes.py has detection and segmentation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
# Of epochs, for the highest rate 1e-3; computed with the CosineLRScheduler of timm 0.4.9.
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
    weight_decay: float = 0.05  # of what `undecayed` does not spare

    @property
    def volo(self) -> bool:
        return self.arch.startswith("volo")

    @property
    def config(self) -> str:
        """Its place in configs/mmpretrain."""
        if self.volo:
            return f"elsa_volo/elsa-{self.arch.replace('_', '-')}_8xb128_in1k.py"
        return f"elsa_swin/elsa-swin-{self.arch}_8xb128_in1k.py"

    @property
    def rates(self) -> dict[int, float]:
        """Of epochs."""
        rates = {}
        for epoch, rate in RATES.items():
            low = 1e-6 if epoch < 20 else 1e-5  # both laws are linear in the highest rate
            rates[epoch] = low + (rate - low) * (self.lr - low) / (1e-3 - low)
        return rates

    def undecayed(self, name: str, dimensions: int) -> bool:
        """Whether a parameter has no weight decay."""
        return dimensions == 1 or name.endswith((".pos_embed", ".cls_token"))

    def facts(self) -> dict[str, Any]:
        """What the recipe says, under the names that the tests use."""
        return {
            "epochs": 310,
            "images on a GPU": 128,
            "images on 8 GPUs": 1024,
            "short batches": False,
            "iterations of an epoch": 1251,
            "mixed precision": True,
            "clipping": None if self.volo else {"max_norm": 5.0},
            "betas": (0.9, 0.999),
            "eps": 1e-8,
            "seed": (42, True),  # True: and the process's rank
            "best checkpoint": (["accuracy/top1"], "greater"),
            "ema decay": self.ema_decay,
            "colours": ("RGB", MEAN, STD),
            "classes": 1000,
            "label smoothing": 0.1,
            "mixing": ["MixToken"] if self.volo else [("Mixup", 0.8), ("CutMix", 1.0)],
            "mixing odds": None,  # equal
            "erasing": (0.25, (0.02, 1 / 3), (0.3, 1 / 0.3)),
            "crop": ((224, 224), (0.08, 1.0), (3 / 4, 4 / 3)),
            "crop interpolation": ["bilinear", "bicubic"],
            "crop odds": None,  # equal
            "flip": 0.5,
            "RandAugment": (9, 0.5, 2, 15),  # magnitude, its deviation, operations drawn, of
            # 0.9 and, of ELSA-VOLO, 0.96 of the short side.
            "test crop": (233 if self.volo else 248, 224, "bicubic"),
        }


SWIN_RECIPES = [
    Recipe("tiny", 0.1, (28, 29)),
    Recipe("small", 0.3, (53, 53)),
    Recipe("base", 0.5, (93, 93), ema_decay=0.99992),
]
# The parameters follow from VOLO's and from ELSA's layer. The rate and the drop path of D4 and D5
# are not published: those of D3 are a decision.
VOLO_RECIPES = [
    Recipe("volo_d1", 0.1, (26.672168, 26.672168), lr=1.6e-3),
    Recipe("volo_d2", 0.2, (58.721248, 58.721248)),
    Recipe("volo_d3", 0.5, (86.382288, 86.382288)),
    Recipe("volo_d4", 0.5, (192.722672, 192.722672)),
    Recipe("volo_d5", 0.5, (295.097312, 295.097312)),
]
RECIPES = SWIN_RECIPES + VOLO_RECIPES
