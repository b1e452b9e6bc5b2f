"""The digits configs of MMDetection and MMSegmentation, shrunk to seconds by --cfg-options."""

from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
CONFIGS = {
    "mmdet": REPOSITORY / "configs/mmdet/digits/mask-rcnn_elsa-swin_fpn_digits.py",
    "mmseg": REPOSITORY / "configs/mmseg/digits/elsa-swin_upernet_digits.py",
}


def options(framework, digits, **more):
    """--cfg-options and their values: the tests' data, 2 images a step, 4 to evaluate."""
    values = {"default_hooks.logger.interval": 1}
    for part in ("train", "val", "test"):
        loader = f"{part}_dataloader"
        values[f"{loader}.dataset.data_root"] = digits
        values[f"{loader}.batch_size"] = 2
        values[f"{loader}.num_workers"] = 0
        values[f"{loader}.persistent_workers"] = False
        if part != "train":
            values[f"{loader}.dataset.indices"] = 4
            if framework == "mmdet":
                annotations = f"{digits}/annotations/instances_validation.json"
                values[f"{part}_evaluator.ann_file"] = annotations
    values.update({name.replace("__", "."): value for name, value in more.items()})
    return ["--cfg-options", *(f"{name}={value}" for name, value in values.items())]
