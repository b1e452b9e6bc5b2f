"""UPerNet in Detectron2: its size, its parts, its configs and its schedule."""

import numpy as np
import pytest
import torch

pytest.importorskip("detectron2")

from conftest import REPOSITORY
from detectron2.layers import ShapeSpec
from detectron2.modeling import META_ARCH_REGISTRY, build_model

from elsa_d2 import UPerNetHead, UsageError, build_lr_scheduler, load_config
from elsa_d2.engine.preflight import check_run
from elsa_d2.modeling.norm import SyncBatchNorm
from elsa_d2.solver.lr_scheduler import WarmupPoly

CONFIGS = REPOSITORY / "configs/detectron2"
VARIANTS = {"swin_t": "tiny", "swin_s": "small", **{f"volo_d{i}": f"volo_d{i}" for i in (1, 2, 3)}}
LEAVES = {v: f"ADE20K-SemanticSegmentation/upernet_elsa_{v}_160k.yaml" for v in VARIANTS}
DIGITS = "digits/upernet_elsa_swin_digits.yaml"
SHAPES = {f"res{i + 2}": ShapeSpec(channels=4 + i, stride=2 ** (i + 2)) for i in range(4)}
leaf = pytest.mark.parametrize("variant", LEAVES)


def load(name, *overrides):
    return load_config(str(CONFIGS / name), ["MODEL.DEVICE", "cpu", *map(str, overrides)])


def on_meta(cfg):
    with torch.device("meta"):
        return META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)(cfg)


def head(**changes):
    options = {"in_features": list(SHAPES), "num_classes": 3, "channels": 6, "aux_channels": 5}
    return UPerNetHead(SHAPES, **{**options, **changes})


def features(side=32, batch=2):
    return {
        name: torch.randn(batch, s.channels, side // s.stride, side // s.stride)
        for name, s in SHAPES.items()
    }


@pytest.mark.parametrize("variant", ["swin_t", "swin_s"])
def test_size_is_the_published_one_and_mmsegmentations(variant):
    pytest.importorskip("mmseg")
    from mmengine.config import Config
    from mmengine.registry import MODELS, init_default_scope

    cfg = Config.fromfile(REPOSITORY / "configs/mmseg/_base_/models/upernet_elsa-swin.py")
    cfg.merge_from_dict(
        {
            "model.backbone.arch": VARIANTS[variant],
            "model.decode_head.num_classes": 150,
            "model.auxiliary_head.num_classes": 150,
        }
    )
    init_default_scope("mmseg")
    with torch.device("meta"):
        theirs = MODELS.build(cfg.model)
    ours = on_meta(load(LEAVES[variant]))
    sizes = [sum(p.numel() for p in model.parameters()) for model in (ours, theirs)]
    assert sizes[0] == sizes[1]
    assert round(sizes[0] / 1e6) == {"swin_t": 61, "swin_s": 85}[variant]


@leaf
def test_leaf_is_short_and_builds_what_its_name_says(variant):
    """tests/parity/test_recipes.py has the numbers."""
    assert 3 <= len((CONFIGS / LEAVES[variant]).read_text().splitlines()) <= 15
    cfg = load(LEAVES[variant])
    top = on_meta(cfg).sem_seg_head
    assert cfg.MODEL[f"ELSA_{variant[:4].upper()}"].ARCH == VARIANTS[variant]
    assert top.aux_feature == "res4" and isinstance(top.psp0.norm, SyncBatchNorm)
    assert list(cfg.DATASETS.TRAIN) == ["ade20k_sem_seg_train"]
    assert list(cfg.DATASETS.TEST) == ["ade20k_sem_seg_val"]


def test_digits_config_builds():
    cfg = load(DIGITS)
    assert on_meta(cfg).sem_seg_head.num_classes == len(cfg.DATASETS.REGISTER_SEM_SEG[0][3]) == 11


def test_features_of_one_stride_have_layers_of_their_own():
    """As ELSA-VOLO's maps without a pyramid; the order of their names has no meaning."""
    torch.manual_seed(0)
    shapes = {
        f"stage{i + 1}": ShapeSpec(channels=4 + i, stride=s) for i, s in enumerate([8, 16, 16, 16])
    }
    options = dict(num_classes=3, channels=6, aux_feature="stage3", aux_channels=5)
    top = UPerNetHead(shapes, in_features=["stage4", "stage3", "stage1", "stage2"], **options)
    assert top.in_features == list(shapes) and top.common_stride == 8
    inputs = {name: part.in_channels for name, part in top.named_children() if "lateral" in name}
    assert inputs == {"lateral2": 4, "lateral3": 5, "lateral4": 6}
    assert top.psp0.in_channels == 7 and top.aux_conv.in_channels == 6
    maps = {
        name: torch.randn(2, s.channels, 64 // s.stride, 64 // s.stride)
        for name, s in shapes.items()
    }
    sum(top(maps, torch.zeros(2, 64, 64, dtype=torch.long))[1].values()).backward()
    assert all(parameter.grad.any() for parameter in top.parameters() if parameter.dim() > 1)
    assert top.eval()(maps)[0].shape == (2, 3, 64, 64)


def test_output_has_the_input_s_size_and_batches_are_independent_in_testing():
    torch.manual_seed(0)
    top = head().eval()
    maps = features()
    logits, losses = top(maps)
    assert logits.shape == (2, 3, 32, 32) and losses == {}
    alone, _ = top({name: x[1:] for name, x in maps.items()})
    torch.testing.assert_close(alone, logits[1:])


def test_ignored_pixels_count_in_the_mean_but_not_in_the_sum():
    torch.manual_seed(0)
    top = head(dropout=0.0)
    maps, targets = features(), torch.randint(0, 3, (2, 32, 32))
    targets[:, :16] = 255
    half = top(maps, targets)[1]
    logits = top.logits(maps)
    logits = torch.nn.functional.interpolate(logits, (32, 32), mode="bilinear")
    rest = torch.nn.functional.cross_entropy(logits, targets, ignore_index=255)
    torch.testing.assert_close(half["loss_sem_seg"], rest / 2)
    assert set(half) == {"loss_sem_seg", "loss_sem_seg_aux"}


def test_all_pixels_ignored_is_no_loss():
    targets = torch.full((2, 32, 32), 255)
    for weights in ((), (1.0, 2.0, 3.0)):
        losses = head(class_weight=weights)(features(), targets)[1]
        assert all(loss == 0 for loss in losses.values())


def test_class_weights_give_a_weighted_mean():
    torch.manual_seed(0)
    top = head(dropout=0.0, class_weight=[0.1, 1.0, 2.0], aux_feature="")
    maps, targets = features(), torch.randint(0, 3, (2, 32, 32))
    targets[0, 0] = 255
    logits = torch.nn.functional.interpolate(top.logits(maps), (32, 32), mode="bilinear")
    expected = torch.nn.functional.cross_entropy(
        logits, targets, top.class_weight, ignore_index=255
    )
    losses = top.losses(maps, targets)
    assert list(losses) == ["loss_sem_seg"]
    torch.testing.assert_close(losses["loss_sem_seg"], expected)
    assert "class_weight" not in top.state_dict()


def test_logits_and_losses_are_single_precision_under_autocast():
    top = head()
    with torch.autocast("cpu", torch.bfloat16):
        losses = top(features(), torch.zeros(2, 32, 32, dtype=torch.long))[1]
        logits, _ = top.eval()(features())
    assert {x.dtype for x in [logits, *losses.values()]} == {torch.float32}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"in_features": ["res5"]}, "two or more features.*res2, res3, res4, res5, got res5, res4"),
        ({"in_features": ["p2", "p3"]}, "got p2, p3, res4"),
        ({"aux_feature": "res6"}, "res5, res6"),
        ({"class_weight": [1.0]}, "each of the 3 classes, got 1"),
    ],
)
def test_refusals_of_the_head(changes, message):
    with pytest.raises(ValueError, match=message):
        head(**changes)


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["MODEL.SEM_SEG_HEAD.IN_FEATURES", "['res5']"], "UPerNet needs two or more features"),
        (["MODEL.SEM_SEG_HEAD.IN_FEATURES", "['p2','p3']"], "among the res2, res3.*, got p2, p3"),
        (["MODEL.SEM_SEG_HEAD.NAME", "X"], "No object named 'X' found in 'SEM_SEG_HEADS'"),
        (["SOLVER.IMS_PER_BATCH", "1"], "two or more images at a time, got .*IMS_PER_BATCH 1"),
    ],
)
def test_refusals_of_a_run(overrides, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        check_run(load(DIGITS, "OUTPUT_DIR", tmp_path, *overrides))


def test_whole_image_segmentor_stretches_logits_over_the_image():
    """An image of 33x35 pixels is 9x9 cells: they cover all of it, not 36x36 cut off."""
    cfg = load(DIGITS)
    torch.manual_seed(0)
    model = build_model(cfg).eval()
    image = torch.randint(0, 256, (3, 33, 35), dtype=torch.uint8)
    with torch.no_grad():
        (result,) = model([{"image": image, "height": 20, "width": 50}])
        features = model.backbone(((image - model.pixel_mean) / model.pixel_std)[None])
        logits = model.sem_seg_head.logits(features)
    assert logits.shape[-2:] == (9, 9)
    for size in ((33, 35), (20, 50)):
        logits = torch.nn.functional.interpolate(logits, size, mode="bilinear")
    torch.testing.assert_close(result["sem_seg"], logits[0])


def test_stock_segmentor_takes_the_head():
    cfg = load(DIGITS, "MODEL.META_ARCHITECTURE", "SemanticSegmentor")
    model = build_model(cfg).eval()
    with torch.no_grad():
        (result,) = model([{"image": torch.zeros(3, 33, 35)}])
    assert result["sem_seg"].shape == (11, 33, 35)


def mmcv_rate(iteration, base, end, power, warmup, last):
    """Of MMCV 1's poly policy with a linear warm-up, as its documentation states it."""
    rate = (base - end) * (1 - iteration / last) ** power + end
    missing = max(0.0, 1 - iteration / warmup) * (1 - 1e-6)
    return rate * (1 - missing)


@pytest.mark.parametrize("power, end", [(1.0, 0.0), (0.9, 1e-4)])
def test_schedule_is_the_originals_at_every_iteration(power, end):
    base, warmup, last = 6e-5 if end == 0 else 1e-2, 150, 2000

    cfg = load(LEAVES["swin_t"], "SOLVER.MAX_ITER", last, "SOLVER.WARMUP_ITERS", warmup)
    cfg.merge_from_list(
        ["SOLVER.POLY_LR_POWER", power, "SOLVER.BASE_LR", base, "SOLVER.BASE_LR_END", end]
    )
    ours = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=base)
    scheduler = build_lr_scheduler(cfg, ours)
    rates = []
    for _ in range(last):
        rates.append(ours.param_groups[0]["lr"])
        ours.step()
        scheduler.step()
    expected = [mmcv_rate(i, base, end, power, warmup, last) for i in range(last)]
    np.testing.assert_allclose(rates, expected, rtol=1e-10)
    assert rates[0] == pytest.approx(1e-6 * base) and rates[warmup] < base


def test_training_shorter_than_the_warm_up_stays_in_it():
    factor = WarmupPoly(2, warmup_iters=1500, warmup_factor=1e-6)
    assert factor(0.0) == 1e-6 and 0 < factor(0.5) < 1e-3


def test_other_schedules_are_detectron2s():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = build_lr_scheduler(load(DIGITS), optimizer)
    assert type(scheduler._multiplier).__name__ == "WarmupParamScheduler"
