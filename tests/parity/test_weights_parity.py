"""One checkpoint, two frameworks, the same results: single images, and whole evaluations."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("detectron2")
pytest.importorskip("mmdet")
pytest.importorskip("mmseg")

from mmdet.apis import inference_detector, init_detector
from mmengine.config import Config
from mmengine.evaluator import Evaluator
from mmengine.model.utils import revert_sync_batchnorm
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner import Runner, load_checkpoint
from pycocotools import mask as mask_api
from weights_models import CLASSES, PHOTOGRAPHS, save, sizes

import elsa_d2
import elsa_mm
from elsa_core.runtime.errors import UsageError
from elsa_core.variants import VOLO_VARIANTS, Arch, VoloArch
from elsa_core.weights import convert_file, read_checkpoint
from elsa_core.weights.volo import Volo
from elsa_tools import convert as cli
from elsa_tools.verify import configs, mm, verify
from elsa_tools.verify.compare import Outcome, compare
from examples.digits.dataset import SEGMENTATION_CLASSES

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
ARCH = Arch(embed_dim=32, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8), group_width=8, window_size=5)
VOLO = VoloArch(depths=(1, 1, 1, 1), embed_dims=(32, 64), num_heads=(2, 4), stem_dim=16)
# Deviations of random weights, times the root of the inputs, with which scores are spread.
_RPN = {"rpn_cls": 0.3, "rpn_reg": 0.02, "logits": 1.0}
SPREAD = {
    "mask_rcnn": {**_RPN, "fc_cls": 0.6, "fc_reg": 0.05},
    "cascade_mask_rcnn": {**_RPN, "fc_cls": 1.5, "fc_reg": 0.1},
    "upernet": {},
}


def detecting(kind, channels=32, dim=32, backbone=ARCH):
    """Random tensors of a model that finds many objects of all classes, with all scores."""
    cfg = Config.fromfile(elsa_mm.get_config_file(configs.OPENMMLAB[kind]))
    mm.set_sizes(cfg.model, backbone, sizes(kind, channels, dim), kind)
    cfg.model.backbone.init_std = 0.1
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope("mmseg" if kind == "upernet" else "mmdet"):
        tensors = MODELS.build(cfg.model).state_dict()
    return spread(tensors, kind)


def spread(tensors, kind):
    """Random weights of the heads, in place."""
    for name, tensor in tensors.items():
        if name.startswith("backbone.") or tensor.dim() < 2:
            continue
        factor = next((f for word, f in SPREAD[kind].items() if word in name), 2**0.5)
        tensor.normal_(std=factor / tensor[0].numel() ** 0.5)
    return tensors


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, photograph, backbone",
    [
        ("mask_rcnn", "coffee.png", ARCH),
        ("mask_rcnn", "rocket.jpg", ARCH),
        ("cascade_mask_rcnn", "chelsea.png", ARCH),
        ("upernet", "astronaut.png", ARCH),
        ("mask_rcnn", "coffee.png", Volo(VOLO, 14, pyramid=True)),
        ("cascade_mask_rcnn", "rocket.jpg", Volo(VOLO, 9, pyramid=True)),
        ("upernet", "chelsea.png", Volo(VOLO, 14, pyramid=True)),
        ("upernet", "chelsea.png", Volo(VOLO, 14, pyramid=False)),
    ],
)
def test_same_results_on_photographs(tmp_path, monkeypatch, kind, photograph, backbone):
    """Each framework reads the file, resizes, detects and pastes masks in its own way."""
    monkeypatch.setitem(VOLO_VARIANTS, "volo_small", VOLO)  # a variant's heads are known
    tensors = detecting(kind, backbone=backbone)
    path = save(tmp_path, {"meta": {"CLASSES": CLASSES}, "state_dict": tensors})
    conversion = convert_file(path, tmp_path / "d2.pth", "detectron2")
    found = verify(conversion, str(tmp_path / "d2.pth"), str(PHOTOGRAPHS / photograph))
    numbers = found.numbers
    assert found.same, str(found)
    assert all(value < 1e-3 for name, value in numbers.items() if name.startswith("feature"))
    if kind == "upernet":
        assert numbers["classes"] > 0.9999 and numbers["logits"] < 1e-2
        return
    assert numbers["proposals"] > 0.99
    assert numbers["detections"] > 50 and numbers["unmatched"] == 0
    assert numbers["scores"] < 1e-3 and numbers["boxes"] < 0.05 and numbers["mask IoU"] >= 0.99


@pytest.mark.slow
def test_verify_sees_a_wrong_checkpoint(tmp_path, capsys):
    """The tool's exit status, and that one wrong tensor is enough."""
    path = save(tmp_path, {"state_dict": detecting("upernet")})
    image = ["--image", str(PHOTOGRAPHS / "chelsea.png")]
    command = [str(path), str(tmp_path / "d2.pth"), "--to", "detectron2", "--verify", *image]
    assert cli.main(command) == 0
    out = capsys.readouterr().out
    assert "the same results" in out and "class logits: at most" in out
    conversion = convert_file(path, tmp_path / "d2.pth", "detectron2")
    stored = torch.load(tmp_path / "d2.pth")
    stored["model"]["sem_seg_head.fpn_bottleneck.weight"] *= 1.02
    torch.save(stored, tmp_path / "d2.pth")
    found = verify(conversion, str(tmp_path / "d2.pth"), image[1])
    assert not found.same and "DIFFERENT" in str(found) and "<- too much" in str(found)


def outcome(**changes):
    generator = torch.Generator().manual_seed(0)
    boxes = 100 * torch.rand(20, 4, generator=generator)
    values = dict(
        features={"p2": torch.rand(4, 5, 5, generator=generator)},
        proposals=boxes,
        boxes=boxes,
        scores=torch.linspace(0.9, 0.1, 20),
        labels=torch.arange(20) % 3,
        masks=torch.rand(20, 30, 30, generator=generator) > 0.5,
    )
    return Outcome(**{**values, **changes})


def test_comparison_ignores_the_order():
    order = torch.randperm(20, generator=torch.Generator().manual_seed(1))
    base = outcome()
    shuffled = outcome(
        **{name: getattr(base, name)[order] for name in ("boxes", "scores", "labels", "masks")}
    )
    found = compare(base, shuffled)
    assert found.same and found.numbers["detections"] == 20 and found.numbers["boxes"] == 0


def change(name, value):
    changed = getattr(outcome(), name).clone()
    changed[7] = value
    return {name: changed}


@pytest.mark.parametrize(
    "changes",
    [
        change("boxes", outcome().boxes[7] + 0.06),
        change("boxes", outcome().boxes[7] + 6),
        change("scores", outcome().scores[7] + 0.002),
        change("labels", (outcome().labels[7] + 1) % 3),
        change("masks", ~outcome().masks[7]),
        {"features": {"p2": outcome().features["p2"] + 0.01}},
        {"features": {"p2": outcome().features["p2"][:2]}},
        {name: getattr(outcome(), name)[:19] for name in ("boxes", "scores", "labels", "masks")},
        {"proposals": outcome().proposals[:0]},
    ],
)
def test_comparison_sees_each_difference(changes):
    assert compare(outcome(), outcome()).same
    assert not compare(outcome(), outcome(**changes)).same
    assert not compare(outcome(**changes), outcome()).same


def test_verify_needs_what_is_not_in_the_tensors(tmp_path):
    wanted = sizes("mask_rcnn")
    wanted.anchors = 4
    with pytest.raises(UsageError, match="--config twice for 4 anchors"):
        mm.set_sizes(Config(), ARCH, wanted, "mask_rcnn")
    path = save(tmp_path, {"state_dict": detecting("upernet")})
    conversion = convert_file(path, tmp_path / "d2.pth", "detectron2")
    destination = str(tmp_path / "d2.pth")
    with pytest.raises(UsageError, match="does not exist"):
        verify(conversion, destination, str(tmp_path / "nothing.png"))
    with pytest.raises(UsageError, match="must end in"):
        verify(conversion, destination, configs=["a.json"])
    digits = str(CONFIGS / "detectron2/digits/upernet_elsa_swin_digits.yaml")
    with pytest.raises(UsageError, match="does not match the tensors"):
        verify(conversion, destination, configs=[digits])


# --- whole evaluations on the digits


def d2_config(name, digits, output, **more):
    keys = {
        "MODEL.DEVICE": "cpu",
        "OUTPUT_DIR": str(output),
        "INPUT.RESIZE_BACKEND": "cv2",
        "DATALOADER.NUM_WORKERS": 0,
        "SOLVER.CHECKPOINT_PERIOD": 1000,
        "TEST.EVAL_PERIOD": 0,
        **more,
    }
    file = str(CONFIGS / f"detectron2/digits/{name}.yaml")
    return elsa_d2.load_config(file, [str(part) for pair in keys.items() for part in pair])


def evaluate_d2(cfg, checkpoint):
    trainer = elsa_d2.trainer_class(cfg)
    model = trainer.build_model(cfg)
    elsa_d2.AtomicCheckpointer(model).load(str(checkpoint))
    return trainer.test(cfg, model)


def mm_config(name, digits, output):
    cfg = Config.fromfile(CONFIGS / name)
    for part in ("train", "val", "test"):
        cfg[f"{part}_dataloader"].dataset.data_root = str(digits)
    cfg.work_dir, cfg.log_level = str(output), "WARNING"
    cfg.default_hooks.checkpoint.interval = 2
    cfg.test_dataloader.dataset.pipeline[1].scale = (96, 96)
    return cfg


def evaluate_mm(cfg, checkpoint):
    """The test loop of MMEngine's runner, without its formatting of configs, which takes longer."""
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        model = revert_sync_batchnorm(MODELS.build(cfg.model)).eval()
        load_checkpoint(model, str(checkpoint), map_location="cpu", strict=True)
        loader = Runner.build_dataloader(cfg.test_dataloader)
        evaluator = Evaluator(cfg.test_evaluator)
        evaluator.dataset_meta = loader.dataset.metainfo
        for batch in loader:
            with torch.no_grad():
                evaluator.process(model.test_step(batch), batch)
        return evaluator.evaluate(len(loader.dataset))


def train_mm(cfg, checkpoint, iterations):
    """Trains from a checkpoint on; returns the checkpoint that MMEngine itself saves."""
    cfg = copy.deepcopy(cfg)
    cfg.load_from = str(checkpoint)
    cfg.train_cfg = dict(type="IterBasedTrainLoop", max_iters=iterations)
    cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    cfg.train_dataloader.batch_size = 2
    cfg.optim_wrapper.optimizer.lr = 1e-5
    cfg.param_scheduler = []
    cfg.experiment_name = f"train_{Path(checkpoint).stem}"
    Runner.from_cfg(cfg).train()
    trained = Path(cfg.work_dir) / f"iter_{iterations}.pth"
    before, after = (read_checkpoint(path)["state_dict"] for path in (checkpoint, trained))
    assert not any(torch.equal(before[name], after[name]) for name in before if "lateral" in name)
    return trained


def annotate(cfg, checkpoint, digits, path):
    """An annotation file in which every third object that a model finds is true, a little beside
    its box, so that no evaluation is perfect."""
    with DefaultScope.overwrite_default_scope("mmdet"):
        model = init_detector(cfg, str(checkpoint), device="cpu")
        coco = json.loads((digits / "annotations/instances_validation.json").read_text())
        coco["images"], coco["annotations"] = coco["images"][:4], []
        for image in coco["images"]:
            file = str(digits / "images/validation" / image["file_name"])
            found = inference_detector(model, file).pred_instances[::3]
            for box, mask, label in zip(found.bboxes, found.masks, found.labels, strict=True):
                rle = mask_api.encode(np.asfortranarray(mask.numpy().astype("u1")))
                left, top, right, bottom = box.tolist()
                annotation = {
                    "id": len(coco["annotations"]) + 1,
                    "image_id": image["id"],
                    "category_id": int(label) + 1,
                    "bbox": [left + 0.05 * (right - left), top, right - left, bottom - top],
                    "area": (right - left) * (bottom - top),
                    "segmentation": {"size": rle["size"], "counts": rle["counts"].decode()},
                    "iscrowd": 0,
                }
                coco["annotations"].append(annotation)
    path.write_text(json.dumps(coco))


@pytest.mark.slow
def test_same_average_precision_in_both_directions(digits, tmp_path):
    """Converted to Detectron2, and trained a little in MMDetection and converted again; the
    detectors are judged by objects that the first of them finds."""
    theirs = mm_config("mmdet/digits/mask-rcnn_elsa-swin_fpn_digits.py", digits, tmp_path / "mm")
    with DefaultScope.overwrite_default_scope("mmdet"):
        tensors = MODELS.build(theirs.model).state_dict()
    torch.manual_seed(0)
    first = save(tmp_path, {"state_dict": spread(tensors, "mask_rcnn")})
    annotations = tmp_path / "annotations.json"
    annotate(theirs, first, digits, annotations)
    theirs.test_dataloader.dataset.ann_file = str(annotations)
    theirs.test_evaluator.ann_file = str(annotations)
    cfg = d2_config(
        "mask_rcnn_elsa_swin_digits",
        digits,
        tmp_path,
        **{
            "DATASETS.REGISTER_COCO": [
                ["parity", str(annotations), f"{digits}/images/validation"],
            ],
            "DATASETS.TEST": ["parity"],
            "INPUT.MIN_SIZE_TEST": 96,
        },
    )
    elsa_d2.register_coco_datasets(cfg)
    second = train_mm(theirs, first, 2)
    results = []
    for path in (first, second):
        convert_file(path, tmp_path / "d2.pth", "detectron2", anchor_sizes=2)
        convert_file(tmp_path / "d2.pth", tmp_path / "back.pth", "mmdet", anchor_sizes=2)
        ours = evaluate_d2(cfg, tmp_path / "d2.pth")
        other = evaluate_mm(theirs, tmp_path / "back.pth")
        for task in ("bbox", "segm"):
            results.append(ours[task]["AP"] / 100)
            assert other[f"coco/{task}_mAP"] == pytest.approx(results[-1], abs=6e-4)
            assert other[f"coco/{task}_mAP_50"] == pytest.approx(ours[task]["AP50"] / 100, abs=6e-4)
    assert min(results) > 0.05, results


@pytest.mark.slow
def test_same_mean_iou_in_both_directions(digits, tmp_path):
    """On the training part: all classes are in it, and the frameworks average differently over
    classes that are not."""
    theirs = mm_config("mmseg/digits/elsa-swin_upernet_digits.py", digits, tmp_path / "mm")
    prefix = dict(img_path="images/training", seg_map_path="annotations/training")
    theirs.test_dataloader.dataset.data_prefix = prefix
    with DefaultScope.overwrite_default_scope("mmseg"):
        tensors = MODELS.build(theirs.model).state_dict()
    torch.manual_seed(0)
    first = save(tmp_path, {"state_dict": spread(tensors, "upernet")})
    data = ["parity_seg", f"{digits}/images/training", f"{digits}/annotations/training"]
    cfg = d2_config(
        "upernet_elsa_swin_digits",
        digits,
        tmp_path,
        **{
            "DATASETS.REGISTER_SEM_SEG": [[*data, list(SEGMENTATION_CLASSES), True]],
            "DATASETS.TRAIN": ["parity_seg"],
            "DATASETS.TEST": ["parity_seg"],
        },
    )
    elsa_d2.register_sem_seg_datasets(cfg)
    second = train_mm(theirs, first, 2)
    results = []
    for path in (first, second):
        convert_file(path, tmp_path / "d2.pth", "detectron2")
        convert_file(tmp_path / "d2.pth", tmp_path / "back.pth", "mmseg")
        results.append(evaluate_mm(theirs, tmp_path / "back.pth")["mIoU"])  # percent
        ours = evaluate_d2(cfg, tmp_path / "d2.pth")["sem_seg"]["mIoU"]
        assert ours == pytest.approx(results[-1], abs=6e-3)
    assert min(results) > 0.5
