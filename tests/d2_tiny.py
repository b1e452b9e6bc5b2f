"""A Detectron2 training that takes seconds on a CPU: the digits config with a tiny model."""

import json
import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
CONFIG = str(REPOSITORY / "configs/detectron2/digits/mask_rcnn_elsa_swin_digits.yaml")
TOOL = str(REPOSITORY / "tools/train_net.py")
TINY = {
    "MODEL.ELSA_SWIN.FREE_ARCH.EMBED_DIM": 12,
    "MODEL.ELSA_SWIN.FREE_ARCH.DEPTHS": [1, 1, 1, 2],
    "MODEL.ELSA_SWIN.FREE_ARCH.NUM_HEADS": [1, 2, 3, 4],
    "MODEL.ELSA_SWIN.FREE_ARCH.GROUP_WIDTH": 4,
    "MODEL.ELSA_SWIN.FREE_ARCH.KERNEL_SIZE": 3,
    "MODEL.ELSA_SWIN.FREE_ARCH.WINDOW_SIZE": 3,
    "MODEL.FPN.OUT_CHANNELS": 8,
    "MODEL.FPN.NORM": "",
    "MODEL.ROI_BOX_HEAD.FC_DIM": 16,
    "MODEL.ROI_MASK_HEAD.CONV_DIM": 8,
    # So that a model that has hardly learnt detects something.
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.0,
    "INPUT.MIN_SIZE_TRAIN": [96],
    "INPUT.MIN_SIZE_TEST": 96,
    "DATALOADER.NUM_WORKERS": 0,
    "SOLVER.IMS_PER_BATCH": 2,
    "SOLVER.WARMUP_ITERS": 2,
    "SOLVER.MAX_ITER": 4,
}


def overrides(data: Path, **changes) -> list[str]:
    """KEY VALUE pairs; ``changes`` have two underscores for each point of a key."""
    keys = {**TINY, "DATASETS.REGISTER_COCO": datasets(data)}
    keys |= {key.replace("__", "."): value for key, value in changes.items()}
    return [str(part) for pair in keys.items() for part in pair]


def datasets(data: Path) -> list[list[str]]:
    return [
        [name, f"{data}/annotations/instances_{part}.json", f"{data}/images/{part}"]
        for part, name in (("training", "digits_training"), ("validation", "digits_validation"))
    ]


def command(data: Path, *flags: str, **changes) -> list[str]:
    """A whole command line of tools/train_net.py."""
    return [sys.executable, TOOL, "--config-file", CONFIG, *flags, *overrides(data, **changes)]


def without_cuda() -> dict[str, str]:
    return {**os.environ, "CUDA_VISIBLE_DEVICES": ""}


def train(data: Path, *flags: str, cwd: Path, **changes) -> subprocess.CompletedProcess:
    """Runs tools/train_net.py without CUDA; its output is in the result's stdout."""
    return subprocess.run(
        command(data, *flags, **changes),
        cwd=cwd,
        env=without_cuda(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )


def read_metrics(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]
