"""The published COCO configs: names, numbers, sizes, equality with MMDetection's; they run."""

import importlib.util
import json
import math
import re
from pathlib import Path

import pytest
import torch
import yaml

pytest.importorskip("detectron2")

from d2_tiny import NARROW, REPOSITORY, TOOL, datasets, note_checkpoints, read_metrics
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.solver import build_lr_scheduler

from elsa_d2 import ClassSpecificCascadeROIHeads, MMDetROIHeads, build_optimizer, load_config

FOLDER = REPOSITORY / "configs/detectron2/COCO-InstanceSegmentation"
LEAVES = sorted(FOLDER.glob("*.yaml"))
# reference: paper, tables 4 and 5, and the original's configs.
DROP_PATH = {
    ("mask_rcnn", "t"): (0.1, 0.2),
    ("mask_rcnn", "s"): (0.2, 0.75),
    ("cascade_mask_rcnn", "t"): (0.0, 0.2),
    ("cascade_mask_rcnn", "s"): (0.2, 0.75),
}
MILLIONS = {
    ("mask_rcnn", "t"): 49,
    ("mask_rcnn", "s"): 72,
    ("cascade_mask_rcnn", "t"): 86,
    ("cascade_mask_rcnn", "s"): 110,
}
each_leaf = pytest.mark.parametrize("file", LEAVES, ids=lambda file: file.stem)
each_model = pytest.mark.parametrize("method, variant", MILLIONS)


def words(file):
    """Method, variant and schedule from a file's name."""
    return re.fullmatch(r"(.+)_elsa_swin_([ts])_fpn_([13]x)", file.stem).groups()


def leaf(method, variant, schedule="1x"):
    return FOLDER / f"{method}_elsa_swin_{variant}_fpn_{schedule}.yaml"


def on_meta(cfg):
    with torch.device("meta"):
        return META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)(cfg)


def keys(node, prefix=""):
    for name, value in node.items():
        if isinstance(value, dict):
            yield from keys(value, f"{prefix}{name}.")
        elif name != "_BASE_":
            yield prefix + name


def test_all_combinations_are_there():
    assert {words(file) for file in LEAVES} == {
        (*model, schedule) for model in MILLIONS for schedule in ("1x", "3x")
    }


@each_leaf
def test_a_leaf_is_short_and_its_bases_do_not_overlap(file):
    assert 3 <= len(file.read_text().splitlines()) <= 15
    content = yaml.safe_load(file.read_text())
    bases = [yaml.safe_load((FOLDER / base).read_text()) for base in content["_BASE_"]]
    assert not any("_BASE_" in base for base in bases)
    found = [key for node in (content, *bases) for key in keys(node)]
    assert len(found) == len(set(found))


@each_leaf
def test_name_and_content_agree(file):
    method, variant, schedule = words(file)
    cfg = load_config(str(file))
    node, solver = cfg.MODEL.ELSA_SWIN, cfg.SOLVER
    assert node.ARCH == {"t": "tiny", "s": "small"}[variant]
    assert node.DROP_PATH_RATE == DROP_PATH[method, variant][schedule == "3x"]
    epochs, steps = {"1x": (12, (8, 11)), "3x": (36, (27, 33))}[schedule]
    epoch = math.ceil(117_266 / 16)
    assert solver.MAX_ITER == epochs * epoch and solver.IMS_PER_BATCH == 16
    assert solver.STEPS == tuple(step * epoch for step in steps)
    assert solver.CHECKPOINT_PERIOD == cfg.TEST.EVAL_PERIOD == epoch
    assert cfg.DATASETS.TRAIN == ("coco_2017_train",) and cfg.DATASETS.TEST == ("coco_2017_val",)
    kind = {"mask_rcnn": MMDetROIHeads, "cascade_mask_rcnn": ClassSpecificCascadeROIHeads}
    model = on_meta(cfg)
    assert type(model.roi_heads) is kind[method]
    last_block = model.backbone.bottom_up.layers[-1].blocks[-1]
    assert last_block.drop_path.rate == pytest.approx(node.DROP_PATH_RATE)


@each_leaf
def test_the_learning_rate_at_given_iterations(file):
    cfg = load_config(str(file))
    optimizer = build_optimizer(cfg, torch.nn.Linear(1, 1))
    scheduler = build_lr_scheduler(cfg, optimizer)
    first, second = cfg.SOLVER.STEPS
    expected = {0: 1e-7, 250: 0.5005e-4, 500: 1e-4, first - 1: 1e-4, first: 1e-5}
    expected |= {second - 1: 1e-5, second: 1e-6, cfg.SOLVER.MAX_ITER - 1: 1e-6}
    for iteration, rate in expected.items():
        scheduler.last_epoch = iteration
        assert scheduler.get_lr() == [pytest.approx(rate)] * len(optimizer.param_groups)


@each_model
def test_numbers_of_the_built_heads(method, variant):
    model = on_meta(load_config(str(leaf(method, variant))))
    cascade = method == "cascade_mask_rcnn"
    rpn, heads = model.proposal_generator, model.roi_heads
    assert rpn.pre_nms_topk == {True: 2000, False: 1000}
    assert rpn.post_nms_topk == {True: 2000 if cascade else 1000, False: 1000}
    assert (rpn.nms_thresh, rpn.batch_size_per_image, rpn.positive_fraction) == (0.7, 256, 0.5)
    assert rpn.anchor_matcher.thresholds[1:-1] == [0.3, 0.7]
    assert rpn.smooth_l1_beta == (pytest.approx(1 / 9) if cascade else 0)
    assert rpn.anchor_boundary_thresh == (0 if cascade else -1)
    assert (heads.batch_size_per_image, heads.positive_fraction) == (512, 0.25)
    assert heads.proposal_append_gt and heads.num_classes == 80
    matchers = heads.proposal_matchers if cascade else [heads.proposal_matcher]
    assert [m.thresholds[1] for m in matchers] == [0.5, 0.6, 0.7][: len(matchers)]
    predictors = heads.box_predictor if cascade else [heads.box_predictor]
    for predictor in predictors:
        assert predictor.test_score_thresh == 0.05 and predictor.test_nms_thresh == 0.5
        assert predictor.test_topk_per_image == 100
        assert predictor.bbox_pred.out_features == 320
        assert predictor.loss_weight["loss_box_reg"] == (10 if cascade else 1)
        assert predictor.box_reg_loss_type == ("giou" if cascade else "smooth_l1")
        assert predictor.smooth_l1_beta == 0
    for pooler, size in ((heads.box_pooler, 7), (heads.mask_pooler, 14)):
        assert pooler.output_size == (size, size)
        for level in pooler.level_poolers:
            assert level.sampling_ratio == 0 and level.aligned


@each_model
def test_size_and_recipe_equal_mmdetections(method, variant):
    """The parameters to the last one, and each one's learning rate and decay."""
    parity = pytest.importorskip("parity", exc_type=ImportError)
    from mmengine.optim import build_optim_wrapper

    cfg = load_config(str(leaf(method, variant)))
    ours = on_meta(cfg)
    other = parity.mmdet_config(method, variant)
    with torch.device("meta"):
        theirs = parity.build_mmdet(other)
    shapes = {parity.mmdet_name(n): p.shape for n, p in ours.named_parameters()}
    assert shapes == {name: p.shape for name, p in theirs.named_parameters()}
    assert round(sum(shape.numel() for shape in shapes.values()) / 1e6) == MILLIONS[method, variant]

    other.optim_wrapper.update(type="OptimWrapper")  # AMP asks for a GPU
    other.optim_wrapper.pop("loss_scale", None)
    optimizer = build_optim_wrapper(theirs, other.optim_wrapper).optimizer
    expected = rates(theirs, optimizer)
    found = rates(ours, build_optimizer(cfg, ours))
    assert {parity.mmdet_name(name): value for name, value in found.items()} == expected
    assert set(expected.values()) == {(1e-4, 0.05, (0.9, 0.999)), (1e-4, 0.0, (0.9, 0.999))}


def rates(model, optimizer):
    """Name of each parameter -> learning rate, decay, betas."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {
        names[parameter]: (group["lr"], group["weight_decay"], tuple(group["betas"]))
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("train_net", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def few(digits, tmp_path_factory):
    """The digits' data sets, of the validation's the first two images."""
    training, (name, file, images) = datasets(digits)
    content = json.loads(Path(file).read_text())
    content["images"] = content["images"][:2]
    kept = {image["id"] for image in content["images"]}
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] in kept]
    file = tmp_path_factory.mktemp("few") / "instances_validation.json"
    file.write_text(json.dumps(content))
    return [training, [name, str(file), images]]


def shrunk(data, output, **changes):
    """Overrides that make images, batches and numbers of boxes small, and nothing else."""
    values = {
        "MODEL.DEVICE": "cpu",
        "MODEL.ROI_HEADS.NUM_CLASSES": 10,
        "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 8,
        "MODEL.RPN.POST_NMS_TOPK_TRAIN": 50,
        "MODEL.RPN.POST_NMS_TOPK_TEST": 10,
        "TEST.DETECTIONS_PER_IMAGE": 4,
        "DATASETS.REGISTER_COCO": data,
        "DATASETS.TRAIN": ["digits_training"],
        "DATASETS.TEST": ["digits_validation"],
        "DATALOADER.NUM_WORKERS": 0,
        "INPUT.MIN_SIZE_TRAIN": [64, 96],
        "INPUT.MIN_SIZE_TEST": 64,
        "INPUT.MULTI_SCALE_CROP.MIN_SIZES": [64],
        "INPUT.MULTI_SCALE_CROP.CROP_SIZE": [40, 60],
        "SOLVER.IMS_PER_BATCH": 1,
        "SOLVER.STEPS": [],
        "OUTPUT_DIR": output,
    }
    values |= {key.replace("__", "."): value for key, value in changes.items()}
    return [str(part) for pair in values.items() for part in pair]


@each_model
@pytest.mark.parametrize("schedule", ["1x", "3x"])
def test_a_shrunk_leaf_trains_evaluates_saves_and_resumes(
    few, tmp_path, tool, monkeypatch, method, variant, schedule
):
    """Narrow; a model of the published size trains in docs/cityscapes.md, whose commands are a
    test."""
    output = tmp_path / "out"
    arguments = ["--config-file", str(leaf(method, variant, schedule))]
    keys = shrunk(few, output, **NARROW)
    assert tool.main([*arguments, *keys, "SOLVER.MAX_ITER", "1"]) == 0
    training, evaluation = read_metrics(output)
    assert math.isfinite(training["total_loss"]) and evaluation["iteration"] == 1
    assert 0 <= evaluation["bbox/AP"] <= 100 and 0 <= evaluation["segm/AP"] <= 100
    losses = [name for name in training if name.startswith("loss_")]
    assert len(losses) == (11 if method == "cascade_mask_rcnn" else 5)
    saved = note_checkpoints(monkeypatch)
    assert tool.main([*arguments, "--resume", *keys, "SOLVER.MAX_ITER", "2"]) == 0
    resumed, evaluation = read_metrics(output)[2:]
    assert (resumed["iteration"], evaluation["iteration"]) == (1, 2)
    assert math.isfinite(resumed["total_loss"])
    assert saved == [("model_final", 1, {2})]
