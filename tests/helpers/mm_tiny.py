"""Configs of MMDetection and MMSegmentation, shrunk to seconds by --cfg-options."""

import json
import math
from pathlib import Path

import torch

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIGS = {
    "mmdet": REPOSITORY / "configs/mmdet/digits/mask-rcnn_elsa-swin_fpn_digits.py",
    "mmseg": REPOSITORY / "configs/mmseg/digits/elsa-swin_upernet_digits.py",
}
ARCH = dict(embed_dim=16, depths=[1, 1, 1, 2], num_heads=[1, 2, 4, 8], group_width=8)
ARCH |= dict(kernel_size=3, window_size=3)
VOLO_ARCH = dict(depths=[1, 1, 1, 2], embed_dims=[16, 24], num_heads=[2, 4], stem_dim=8)
VOLO_ARCH |= dict(kernel_size=3)
# The architecture of each backbone, and the channels of its four maps.
BACKBONES = {"ELSASwin": (ARCH, [16, 32, 64, 128]), "ELSAVolo": (VOLO_ARCH, [8, 16, 24, 24])}
WIDTHS = ("in_channels", "out_channels", "feat_channels", "channels", "fc_out_channels")
WIDTHS += ("conv_out_channels", "embed_dims", "feedforward_channels")
# Other settings of transformers: the number of layers and queries, and what must divide a width.
FEW = {"num_layers": 2, "num_queries": 10, "num_feats": 8, "num_groups": 4}


def narrow(model, prefix="model"):
    """--cfg-options that make every part of a published detector or segmentor narrow."""
    arch, features = BACKBONES[model["backbone"]["type"]]
    values = {f"{prefix}.backbone.arch.{name}": str(value) for name, value in arch.items()}
    values[f"{prefix}.backbone.arch._delete_"] = True
    return values | _widths({k: v for k, v in model.items() if k != "backbone"}, prefix, features)


def _widths(node, prefix, features):
    values = {}
    for key, value in node.items() if isinstance(node, dict) else enumerate(node):
        name = f"{prefix}.{key}"
        if key in WIDTHS and isinstance(value, (list, tuple)):  # of the backbone's maps
            # The last ones, where a neck leaves out the first.
            first = 1 if len(value) == 3 else 0
            values[name] = str(features[first : first + len(value)])
        elif key in WIDTHS and isinstance(value, int):  # 384: stage 3, for the auxiliary head
            values[name] = features[2] if value == 384 else 16
        elif key in FEW:
            values[name] = FEW[key]
        elif isinstance(value, (dict, list)):
            values |= _widths(value, name, features)
    return values


def loaders(**settings):
    """--cfg-options of the loaders of all parts, without worker processes."""
    values = {"default_hooks.logger.interval": 1}
    settings = {"num_workers": 0, "persistent_workers": False, **settings}
    for part in ("train", "val", "test"):
        for name, value in settings.items():
            values[f"{part}_dataloader.{name.replace('__', '.')}"] = value
    return values


def options(framework, digits, **more):
    """--cfg-options and their values: the tests' data, 2 images a step, 4 to evaluate."""
    values = loaders(dataset__data_root=digits, batch_size=2)
    for part in ("val", "test"):
        values[f"{part}_dataloader.dataset.indices"] = 4
        if framework == "mmdet":
            annotations = f"{digits}/annotations/instances_validation.json"
            values[f"{part}_evaluator.ann_file"] = annotations
    return as_arguments(values | {name.replace("__", "."): value for name, value in more.items()})


def as_arguments(values):
    return ["--cfg-options", *(f"{name}={value}" for name, value in values.items())]


def run(tool, *arguments, **values):
    """Runs a tool of ours, in this process, that must succeed; `values` are --cfg-options."""
    from elsa_mm import cli  # some processes must import it late

    assert getattr(cli, tool)([*map(str, arguments), *as_arguments(values)]) == 0


def last_path(folder="runs"):
    return Path(folder, "last_checkpoint").read_text()


def last_state(folder="runs"):
    return torch.load(last_path(folder), weights_only=False, mmap=True, map_location="cpu")


def scalars(folder="runs"):
    """What all runs in a folder have logged."""
    logs = sorted(Path(folder).glob("*/vis_data/2*.json"))
    return [json.loads(line) for log in logs for line in log.read_text().splitlines()]


def train_and_resume(path, length="max_iters", **values):
    """Trains one iteration without an evaluation, then resumes for another one with it; returns
    the metrics."""
    run("train", path, "--work-dir", "runs", **values | {f"train_cfg.{length}": 1})
    assert last_state()["meta"]["iter"] == 1
    assert not list(Path("runs").glob("*/2*.json"))  # no evaluation yet
    run("train", path, "--work-dir", "runs", "--resume", **values | {f"train_cfg.{length}": 2})
    state = last_state()
    assert state["meta"]["iter"] == 2
    assert {int(one["step"]) for one in state["optimizer"]["state"].values()} == {2}
    lines = scalars()
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 2 and all(map(math.isfinite, losses))
    return lines[-1]


def as_coco(digits, root):
    """Lays the digits out as COCO 2017: its folders, files, and 80 things and 53 kinds of stuff, of
    which the data shows 10 and 1."""
    from mmdet.datasets import CocoDataset, CocoPanopticDataset

    from examples.digits.panoptic_layout import BACKGROUND, write_maps

    (root / "annotations").mkdir()
    names = CocoDataset.METAINFO["classes"]
    for part, name in (("training", "train2017"), ("validation", "val2017")):
        (root / name).symlink_to(digits / "images" / part)
        content = json.loads((digits / f"annotations/instances_{part}.json").read_text())
        content["categories"] = [{"id": id, "name": name} for id, name in enumerate(names, 1)]
        (root / f"annotations/instances_{name}.json").write_text(json.dumps(content))
        panoptic = write_maps(content, root / f"annotations/panoptic_{name}")
        for segment in (s for one in panoptic["annotations"] for s in one["segments_info"]):
            if segment["category_id"] == BACKGROUND["id"]:
                segment["category_id"] = 100
        panoptic["categories"] = [
            {"id": id, "name": name, "isthing": int(id <= 80)}
            for id, name in enumerate(CocoPanopticDataset.METAINFO["classes"], 1)
        ]
        (root / f"annotations/panoptic_{name}.json").write_text(json.dumps(panoptic))
    return root
