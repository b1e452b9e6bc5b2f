"""The progress bar of `elsa fit`."""

import json

import pytest
from fit_folders import write

from elsa_tools.fit.frameworks import FRAMEWORKS
from elsa_tools.fit.progress import Progress

DETECTRON2 = [
    {"iteration": 9, "total_loss": 1.5, "lr": 0.1},
    {"iteration": 13, "ema/bbox/AP": 31.0, "bbox/AP": 29.0},
]
MMDETECTION = [
    {"step": 10, "loss": 1.5, "lr": 0.1},
    {"step": 13, "ema/coco/bbox_mAP": 0.31, "coco/bbox_mAP": 0.29},
]


@pytest.mark.parametrize(
    ("framework", "file", "rows"),
    [
        ("detectron2", "metrics.json", DETECTRON2),
        ("mmdet", "20260101/vis_data/scalars.json", MMDETECTION),
    ],
)
def test_it_ends_at_the_end_with_the_averaged_weights_scores(tmp_path, framework, file, rows):
    write(tmp_path / file, "".join(f"{json.dumps(row)}\n" for row in rows))
    with Progress(FRAMEWORKS[framework], tmp_path, 13, "training") as watch:
        watch()
    assert watch.bar.n == 13
    assert watch.bar.postfix == "loss=1.5, box AP=31"
