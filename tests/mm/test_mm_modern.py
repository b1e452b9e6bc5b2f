"""Recipes of today with ELSA-Swin: they are MMDetection's and MMSegmentation's for Swin, and run.

Each trains an iteration at its full width; narrow ones are evaluated, saved and resumed. The data
are digits under the names and in the layout of COCO, and images are small.
"""

import math
from pathlib import Path

import pytest
import torch
from mm_tiny import as_coco, loaders, narrow, train_and_resume

pytest.importorskip("mmdet")
pytest.importorskip("mmseg")

from mmengine.config import Config, DictAction
from mmengine.dataset import pseudo_collate
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DATASETS, MODELS, DefaultScope
from mmengine.utils import import_modules_from_strings
from torch import nn

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
COCO = ["coco/bbox_mAP", "coco/segm_mAP"]
SECTIONS = {f"{part}_{what}" for part in ("train", "val", "test") for what in ("dataloader", "cfg")}
SECTIONS |= {"model", "optim_wrapper", "param_scheduler", "val_evaluator", "test_evaluator"}
SECTIONS |= {"auto_scale_lr", "log_processor", "default_hooks", "custom_hooks"}
BY_NAME = {
    "elsa_mm.coco.CocoDataset": "CocoDataset",
    "elsa_mm.coco_metric.CocoMetric": "CocoMetric",
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
}
each = pytest.mark.parametrize("name", RECIPES, ids=lambda name: name.split("/")[-1])


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
        return {key: plain(value) for key, value in node.items() if key not in ignored}
    if isinstance(node, (list, tuple)):
        return [plain(child) for child in node]
    return BY_NAME.get(node, node)


@each
def test_recipe_is_stock_swins(name):
    cfg, other = ours(name), stock(name, 0).to_dict()
    own = cfg.to_dict()
    assert own.keys() & SECTIONS == other.keys() & SECTIONS
    if "neck" in own["model"]:  # ResNet-50 and Swin-L have other channels
        maps = range(4)[-len(cfg.model.neck.in_channels) :]
        other["model"]["neck"]["in_channels"] = [96 * 2**stage for stage in maps]
    for section in other.keys() & SECTIONS:
        assert plain(own[section]) == plain(other[section]), section
    for part in ("train", "val", "test"):
        assert cfg[f"{part}_dataloader"].dataset.type == "elsa_mm.coco.CocoDataset"
    assert cfg.val_evaluator.type == cfg.test_evaluator.type == "elsa_mm.coco_metric.CocoMetric"


def kinds(cfg):
    """{kind of parameter: its (rate, decay)}; a kind is norms, positions or the rest, of the
    backbone or of other parts."""
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
        kind = "norm" if id(parameter) in norms else "rest"
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
    assert len(found) == 6
    if "mask2former" in name:
        assert found["backbone", "rest"] == {(1e-5, 0.05)}
        assert found["backbone", "norm"] == found["backbone", "position"] == {(1e-5, 0.0)}


@pytest.mark.slow
@each
def test_full_width_trains_all_parameters(name, coco):
    """On a small image: of its size nothing depends but time and memory."""
    cfg = ours(name)
    for key, value in RECIPES[name][2](coco).items():
        if not key.startswith("model.") or "batch_augments" in key:
            cfg.merge_from_dict({key: DictAction._parse_iterable(str(value))})
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        model = MODELS.build(cfg.model)
        dataset = DATASETS.build(cfg.train_dataloader.dataset)
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
def test_short_training_evaluates_saves_and_resumes(name, coco):
    options, metrics = RECIPES[name][2:]
    path = CONFIGS / f"{name}.py"
    values = options(coco) | narrow(Config.fromfile(path).model)
    length = "max_epochs" if "12e" in name else "max_iters"
    assert set(metrics) <= set(train_and_resume(path, length, **values))
