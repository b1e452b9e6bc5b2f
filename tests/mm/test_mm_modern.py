"""Recipes of today with ELSA-Swin: they are MMDetection's and MMSegmentation's for Swin, and run.

Each trains an iteration at its full width; narrow ones are evaluated, saved and resumed. The data
are digits under the names and in the layout of COCO, and images are small.
"""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from mm_tiny import as_arguments, as_coco, loaders, narrow, train_and_resume

pytest.importorskip("mmdet")
pytest.importorskip("mmseg")

from mmengine.config import Config, DictAction
from mmengine.dataset import pseudo_collate
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DATASETS, MODELS, DefaultScope
from mmengine.utils import import_modules_from_strings
from torch import nn

from elsa_core.runtime.errors import UsageError
from elsa_tools.predict import load_inferencer

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
COCO = ["coco/bbox_mAP", "coco/segm_mAP"]
SECTIONS = {f"{part}_{what}" for part in ("train", "val", "test") for what in ("dataloader", "cfg")}
SECTIONS |= {"model", "optim_wrapper", "param_scheduler", "val_evaluator", "test_evaluator"}
SECTIONS |= {"auto_scale_lr", "log_processor", "default_hooks", "custom_hooks"}
BY_NAME = {
    "elsa_mm.coco.CocoDataset": "CocoDataset",
    "elsa_mm.coco_metric.CocoMetric": "CocoMetric",
    "elsa_mm.panoptic.CocoPanopticDataset": "CocoPanopticDataset",
    "elsa_mm.panoptic.CocoPanopticMetric": "CocoPanopticMetric",
    "elsa_mm.panoptic.LoadPanopticAnnotations": "LoadPanopticAnnotations",
}
NORMS = (nn.LayerNorm, nn.GroupNorm, nn.BatchNorm2d)


def mask2former(root):
    values = loaders(dataset__data_root=root, dataset__indices=2) | {
        "train_cfg.val_interval": 2,
        "train_dataloader.dataset.pipeline.3.scale": "(64,64)",
        "train_dataloader.dataset.pipeline.3.ratio_range": "(1.0,1.5)",
        "train_dataloader.dataset.pipeline.4.crop_size": "(64,64)",
        "model.data_preprocessor.batch_augments.0.size": "(64,64)",
        "model.train_cfg.num_points": 128,
        "model.test_cfg.max_per_image": 5,
        **{f"{part}_dataloader.dataset.pipeline.1.scale": "(96,64)" for part in ("val", "test")},
    }
    return values | annotations(root)


def panoptic(root):
    values = mask2former(root)
    for part in ("val", "test"):
        file = f"{root}/annotations/panoptic_val2017"
        values[f"{part}_evaluator.0.ann_file"] = f"{file}.json"
        values[f"{part}_evaluator.0.seg_prefix"] = file
        values[f"{part}_evaluator.1.ann_file"] = values.pop(f"{part}_evaluator.ann_file")
    return values


def dino(root, side=224):
    values = loaders(dataset__data_root=root, dataset__indices=2) | {
        "train_cfg.val_begin": 2,
        "model.bbox_head.embed_dims": 16,
        "model.dn_cfg.group_cfg.num_dn_queries": 10,
        "model.test_cfg.max_per_img": 5,
        **{f"{part}_dataloader.dataset.pipeline.1.scale": "(96,64)" for part in ("val", "test")},
    }
    for place in ("0.0", "1.0", "1.2"):
        key = f"train_dataloader.dataset.pipeline.3.transforms.{place}.scales"
        values[key] = f"[({side},{side})]"  # with more positions than the model has queries
    return values | annotations(root)


def rtmdet(root):
    values = loaders(dataset__data_root=root, dataset__indices=2) | {
        "train_cfg.val_interval": 2,
        "train_dataloader.batch_size": 2,
        # The digits' masks are no polygons.
        "train_dataloader.dataset.pipeline.1.poly2mask": True,
        "custom_hooks.1.switch_pipeline.1.poly2mask": True,
    }
    for place, name in ((2, "img_scale"), (3, "scale"), (4, "crop_size"), (7, "size")):
        values[f"train_dataloader.dataset.pipeline.{place}.{name}"] = "(96,96)"
    values["train_dataloader.dataset.pipeline.8.img_scale"] = "(96,96)"
    values["train_dataloader.dataset.pipeline.3.ratio_range"] = "(1.0,1.0)"
    for part in ("val", "test"):
        values[f"{part}_dataloader.dataset.pipeline.1.scale"] = "(96,96)"
        values[f"{part}_dataloader.dataset.pipeline.2.size"] = "(96,96)"
    return values | annotations(root) | {"model.test_cfg.score_thr": 0.0}


def ade20k(root):
    return loaders(dataset__data_root=root, dataset__indices=2) | {
        "train_cfg.val_interval": 2,
        "train_dataloader.dataset.pipeline.2.scales": "[64,96]",
        "train_dataloader.dataset.pipeline.3.crop_size": "(64,64)",
        "model.data_preprocessor.size": "(64,64)",
        "model.decode_head.train_cfg.num_points": 128,
        **{f"{part}_dataloader.dataset.pipeline.1.scale": "(96,64)" for part in ("val", "test")},
    }


def annotations(root):
    file = f"{root}/annotations/instances_val2017.json"
    return {f"{part}_evaluator.ann_file": file for part in ("val", "test")}


RECIPES = {
    # config: the toolbox's config of this recipe, the one with Swin, options, metrics
    "mmdet/elsa_swin/mask2former_elsa-swin-t-p4-w7_8xb2-lsj-50e_coco": (
        *2 * ["mask2former/mask2former_swin-t-p4-w7-224_8xb2-lsj-50e_coco"],
        mask2former,
        COCO,
    ),
    "mmdet/elsa_swin/mask2former_elsa-swin-t-p4-w7_8xb2-lsj-50e_coco-panoptic": (
        *2 * ["mask2former/mask2former_swin-t-p4-w7-224_8xb2-lsj-50e_coco-panoptic"],
        panoptic,
        [*COCO, "coco_panoptic/PQ", "coco_panoptic/PQ_th", "coco_panoptic/PQ_st"],
    ),
    "mmdet/elsa_swin/dino-4scale_elsa-swin-t-p4-w7_8xb2-12e_coco": (
        "dino/dino-4scale_r50_8xb2-12e_coco",
        "dino/dino-5scale_swin-l_8xb2-12e_coco",
        dino,
        COCO[:1],
    ),
    "mmdet/elsa_swin/dino-5scale_elsa-swin-t-p4-w7_8xb2-12e_coco": (
        *2 * ["dino/dino-5scale_swin-l_8xb2-12e_coco"],
        lambda root: dino(root, 160),
        COCO[:1],
    ),
    "mmdet/elsa_swin/rtmdet-ins_l_elsa-swin-t-p4-w7_4xb32-100e_coco": (
        "rtmdet/rtmdet-ins_l_8xb32-300e_coco",
        "rtmdet/rtmdet_l_swin_b_4xb32-100e_coco",
        rtmdet,
        COCO,
    ),
    "mmseg/elsa_swin/elsa-swin-tiny-patch4-window7-in1k-pre_mask2former_8xb2-160k_ade20k-512x512": (
        *2 * ["mask2former/mask2former_swin-t_8xb2-160k_ade20k-512x512"],
        ade20k,
        ["mIoU", "aAcc"],
    ),
}
each = pytest.mark.parametrize("name", RECIPES, ids=lambda name: name.split("/")[-1])


def data_of(name, request):
    return request.getfixturevalue("digits" if "ade20k" in name else "coco")


@pytest.fixture(scope="module")
def coco(digits, tmp_path_factory):
    return as_coco(digits, tmp_path_factory.mktemp("coco"))


def ours(name):
    return Config.fromfile(CONFIGS / f"{name}.py")


def stock(name, index):
    framework = name.split("/")[0]
    folder = Path(import_modules_from_strings(framework).__file__).parent / ".mim/configs"
    return Config.fromfile(folder / f"{RECIPES[name][index]}.py")


def plain(node):
    """A config without what differs by design: the backbone, data sets and metrics that go by
    names, where files are written, and names of parameters."""
    if isinstance(node, dict):
        ignored = ("_scope_", "backbone", "custom_keys", "checkpoint", "sizes", "weights")
        ignored += ("constructor",)
        return {key: plain(value) for key, value in node.items() if key not in ignored}
    if isinstance(node, (list, tuple)):
        return [plain(child) for child in node]
    return BY_NAME.get(node, node)


def rather_as_rtmdet_with_swin(other, swin):
    """MMDetection has RTMDet with Swin, without masks: its colours, norms, rate and length."""
    for section in ("optim_wrapper", "param_scheduler", "train_cfg"):
        other[section] = swin[section]
    other["model"]["data_preprocessor"] = swin["model"]["data_preprocessor"]
    for part in ("neck", "bbox_head"):
        other["model"][part]["norm_cfg"] = swin["model"][part]["norm_cfg"]
    other["custom_hooks"][1]["switch_epoch"] = swin["custom_hooks"][1]["switch_epoch"]
    # Its tests take 5 images at a time, and its --auto-scale-lr another batch than it is for.
    other["val_dataloader"]["batch_size"] = other["test_dataloader"]["batch_size"] = 1
    other["auto_scale_lr"]["base_batch_size"] = 4 * 32


@each
def test_recipe_is_stock_swins(name):
    cfg, other = ours(name), stock(name, 0).to_dict()
    own = cfg.to_dict()
    assert own.keys() & SECTIONS == other.keys() & SECTIONS
    if "neck" in own["model"]:  # ResNet-50 and Swin-L have other channels
        maps = range(4)[-len(cfg.model.neck.in_channels) :]
        other["model"]["neck"]["in_channels"] = [96 * 2**stage for stage in maps]
    if "rtmdet" in name:
        rather_as_rtmdet_with_swin(other, stock(name, 1).to_dict())
    for section in other.keys() & SECTIONS:
        assert plain(own[section]) == plain(other[section]), section
    if cfg.default_scope == "mmdet":
        for section in ("train_dataloader", "val_dataloader", "test_dataloader", "test_evaluator"):
            found = json.dumps(own[section])
            assert not [name for name in BY_NAME.values() if f'"{name}"' in found]


def kinds(cfg):
    """{kind of parameter: its (rate, decay)}; a kind is norms, positions, biases or the rest, of
    the backbone or of other parts."""
    device = "meta"
    if cfg.model.backbone.type != "ELSASwin":  # stock Swin, which cannot be built without memory
        cfg.model.backbone |= dict(embed_dims=24, num_heads=[1, 2, 4, 8])
        device = "cpu"
    with DefaultScope.overwrite_default_scope(cfg.default_scope), torch.device(device):
        model = MODELS.build(cfg.model)
    settings = build_optim_wrapper(model, cfg.optim_wrapper).optimizer.param_groups
    by_id = {id(p): (g["lr"], g["weight_decay"]) for g in settings for p in g["params"]}
    norms = {id(p) for m in model.modules() if isinstance(m, NORMS) for p in m.parameters()}
    positions = ("relative_position_bias_table", ".attn.rb", "query_", "level_embed")
    found = {}
    for name, parameter in model.named_parameters():
        kind = "bias" if name.endswith(".bias") else "rest"
        kind = "norm" if id(parameter) in norms else kind
        if any(word in name for word in positions):
            kind = "position"
        part = "backbone" if name.startswith("backbone.") else "other"
        found.setdefault((part, kind), set()).add(by_id[id(parameter)])
    return found


@each
def test_rates_and_decay_are_stock_swins_for_each_kind_of_parameter(name):
    found = kinds(ours(name))
    assert all(len(values) == 1 for values in found.values())
    assert found == kinds(stock(name, 1))
    assert len(found) >= 7
    if "mask2former" in name:
        assert found["backbone", "rest"] == {(1e-5, 0.05)}
        assert found["backbone", "norm"] == found["backbone", "position"] == {(1e-5, 0.0)}


@pytest.mark.slow
@each
def test_full_width_trains_all_parameters(name, request):
    """On a small image: of its size nothing depends but time and memory."""
    cfg = ours(name)
    for key, value in RECIPES[name][2](data_of(name, request)).items():
        if not key.startswith("model.") or "preprocessor" in key:
            cfg.merge_from_dict({key: DictAction._parse_iterable(str(value))})
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        model = MODELS.build(cfg.model)
        dataset = DATASETS.build(cfg.train_dataloader.dataset)
    np.random.seed(0)
    model.init_weights()
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    losses = model.train_step(pseudo_collate([dataset[0]]), wrapper)
    assert math.isfinite(losses["loss"])
    parameters = dict(model.named_parameters())
    assert [n for n, p in parameters.items() if p.requires_grad and not optimized(p, wrapper)] == []


def optimized(parameter, wrapper):
    return bool(wrapper.optimizer.state[parameter])  # which AdamW has where there is a gradient


@pytest.mark.slow
@pytest.mark.usefixtures("workplace")
@each
def test_short_training_evaluates_saves_and_resumes(name, request):
    options, metrics = RECIPES[name][2:]
    path = CONFIGS / f"{name}.py"
    values = options(data_of(name, request)) | narrow(Config.fromfile(path).model)
    length = "max_iters" if "k_" in name or "lsj" in name else "max_epochs"
    assert set(metrics) <= set(train_and_resume(path, length, **values))


@pytest.mark.parametrize(
    "name, values, sentence",
    [
        (
            "mask2former",
            {"model.panoptic_head.in_channels": "[96,192,384,1024]"},
            "model.panoptic_head.in_channels must be the backbone's [96, 192, 384, 768], "
            "got [96, 192, 384, 1024]",
        ),
        (
            "mask2former",
            {"model.panoptic_head.num_things_classes": 79},
            "model.panoptic_head.num_classes must be the 80 classes of the train data, got 79",
        ),
        (
            "coco-panoptic",
            {
                "model.panoptic_head.num_things_classes": 79,
                "model.panoptic_head.num_stuff_classes": 54,
            },
            "model.panoptic_head.num_things_classes must be the 80 things of the train data, "
            "got 79",
        ),
        (
            "rtmdet",
            {"train_dataloader.dataset.pipeline.1.poly2mask": False},
            "LoadAnnotations needs poly2mask=True in all training pipelines, also those of hooks: "
            "with False, it ignores the {objects} objects of the train data whose masks are run "
            "lengths",
        ),
    ],
)
def test_refusals(refusal, coco, name, values, sentence):
    name = next(one for one in RECIPES if name in one and one.startswith("mmdet"))
    path = CONFIGS / f"{name}.py"
    options = RECIPES[name][2](coco) | {"train_dataloader.dataset.indices": 16}
    options |= {k: v for k, v in narrow(Config.fromfile(path).model).items() if k not in values}
    if "in_channels" in sentence:
        options = {}
    objects = len(
        json.loads((coco / "annotations/instances_train2017.json").read_text())["annotations"]
    )
    assert refusal("train", path, *as_arguments(options | values)) == sentence.format(
        objects=objects
    )


def test_panoptic_classes_go_by_names_with_things_first(coco):
    from elsa_mm.panoptic import CocoPanopticDataset

    def dataset(classes):
        return CocoPanopticDataset(
            ann_file=str(coco / "annotations/panoptic_val2017.json"),
            data_prefix=dict(img=str(coco / "val2017"), seg=str(coco / "annotations")),
            metainfo=dict(classes=classes),
        )

    names = CocoPanopticDataset.METAINFO["classes"]
    moved = dataset((names[1], names[0], *names[2:]))
    assert moved.things == 80 and moved.cat2label[1] == 1 and moved.cat2label[2] == 0
    assert moved[0]["seg_map_path"] == str(coco / "annotations/000001.png")
    with pytest.raises(
        UsageError, match=f"things before stuff, got '{names[80]}' before '{names[79]}'"
    ):
        dataset((*names[80:], *names[:80]))


@pytest.mark.parametrize("head", ["mask2former", "mask2former-panoptic", "dino", "rtmdet-ins"])
def test_small_models_predict(head):
    """A panoptic model's objects are its things."""
    name, panoptic, _ = head.partition("-panoptic")
    path = CONFIGS / f"mmdet/digits/{name}_elsa-swin_digits{panoptic}.py"
    found = load_inferencer(str(path), None).predict(np.zeros((64, 48, 3), np.uint8))
    assert (found.masks is None) == (head == "dino")
    assert not len(found.labels) or found.labels.max() < 10
    assert found.boxes.shape == (len(found.scores), 4)
