"""What happens to images and annotations before training and testing, compared with OpenMMLab."""

import json
import uuid

import numpy as np
import pytest
import torch

pytest.importorskip("detectron2")

from d2_tiny import CONFIG, datasets, overrides
from detectron2.data import DatasetCatalog
from detectron2.data import transforms as T
from detectron2.data.datasets import register_coco_instances
from detectron2.modeling import build_model
from PIL import Image

from elsa_d2 import DetectionMapper, DetectionMapperTTA, Predictor, UsageError, load_config
from elsa_d2.data.augmentation import (
    OpenCVResizeShortestEdge,
    OpenCVResizeTransform,
    configure_augmentation,
)
from elsa_d2.data.coco import register_coco_datasets
from elsa_d2.data.mapper import training_dicts

RANDOM = np.random.default_rng(0)
IMAGE = RANDOM.integers(0, 256, (61, 83, 3), np.uint8)


def config(data, **changes):
    return load_config(CONFIG, overrides(data, INPUT__RESIZE_BACKEND="cv2", **changes))


@pytest.mark.parametrize("short, longest", [(100, 400), (33, 60), (61, 1333), (200, 201)])
@pytest.mark.parametrize("image", [IMAGE, IMAGE[:, :, ::-1], IMAGE.swapaxes(0, 1)])
def test_resize_is_openmmlabs(short, longest, image):
    mmcv = pytest.importorskip("mmcv")
    ours = OpenCVResizeShortestEdge([short], longest, "choice").get_transform(image)
    expected = mmcv.imrescale(np.ascontiguousarray(image), (longest, short))
    assert np.array_equal(ours.apply_image(image), expected)
    mask = (image[:, :, 0] > 99).astype(np.uint8)
    nearest = mmcv.imrescale(mask, (longest, short), interpolation="nearest")
    assert np.array_equal(ours.apply_segmentation(mask), nearest)
    assert np.array_equal(ours.apply_segmentation(mask[:, :, None])[:, :, 0], nearest)
    back = ours.inverse()
    assert isinstance(back, OpenCVResizeTransform)
    assert back.apply_image(expected).shape == image.shape
    box = np.array([[3.0, 4.0, 20.0, 30.0]])
    assert np.allclose(back.apply_box(ours.apply_box(box)), box)


def test_sizes_are_rounded_as_in_openmmlab():
    mmcv = pytest.importorskip("mmcv")
    differ = 0
    for height, width, short in RANDOM.integers(
        [32, 32, 400], [1500, 1500, 900], (3000, 3)
    ).tolist():
        image = np.broadcast_to(np.uint8(0), (height, width))
        ours = OpenCVResizeShortestEdge([short], 1333, "choice").get_transform(image)
        new_size = mmcv.image.geometric.rescale_size((width, height), (1333, short))
        assert (ours.new_w, ours.new_h) == new_size
        usual = T.ResizeShortestEdge.get_output_shape(height, width, short, 1333)
        differ += usual != (ours.new_h, ours.new_w)
    print(f"Detectron2 rounds {differ} of 3000 sizes differently")


def test_ranges_and_no_resize():
    resize = OpenCVResizeShortestEdge([40, 43], 999, "range")
    assert {resize.get_transform(IMAGE).new_h for _ in range(60)} == {40, 41, 42, 43}
    assert isinstance(OpenCVResizeShortestEdge(0).get_transform(IMAGE), T.NoOpTransform)


def test_multi_scale_and_crop_are_the_recipes():
    leaf = "configs/detectron2/COCO-InstanceSegmentation/mask_rcnn_elsa_swin_t_fpn_1x.yaml"
    cfg = load_config(leaf)
    flip, crop, resize = DetectionMapper(cfg, True).augmentations.augs
    sides = list(range(480, 801, 32))
    assert type(resize) is OpenCVResizeShortestEdge and type(flip) is T.RandomFlip
    assert list(resize.short_edge_length) == sides and resize.max_size == 1333
    assert (flip.prob, flip.horizontal, flip.vertical) == (0.5, True, False)
    assert type(crop) is T.RandomApply and crop.prob == 0.5
    image = np.zeros((427, 640, 3), np.uint8)
    np.random.seed(0)
    first_sides, crops, final = set(), 0, set()
    for _ in range(300):
        steps = crop(T.AugInput(image))
        if isinstance(steps, T.NoOpTransform):
            continue
        crops += 1
        scaled, cut = steps.transforms
        first_sides.add(scaled.new_h)
        assert 384 <= cut.w <= 600 and 384 <= cut.h <= min(600, scaled.new_h)
        assert 0 <= cut.x0 <= scaled.new_w - cut.w and 0 <= cut.y0 <= scaled.new_h - cut.h
        final.add(resize.get_transform(np.zeros((cut.h, cut.w, 3), np.uint8)).new_h)
    assert first_sides == {400, 500, 600} and 120 < crops < 180
    assert min(final) >= 480 and len(final) > 10
    (test,) = DetectionMapper(cfg, False).augmentations.augs
    assert type(test) is OpenCVResizeShortestEdge
    assert (set(test.short_edge_length), test.max_size) == ({800}, 1333)


def entries(data):
    cfg = load_config(CONFIG, overrides(data))
    register_coco_datasets(cfg)
    return DatasetCatalog.get("digits_training")


@pytest.mark.parametrize("crop", [True, False])
@pytest.mark.parametrize("flip", [True, False])
def test_training_data_are_mmdetections(digits, monkeypatch, tmp_path, crop, flip):
    """The same image, boxes and masks, where chance decides alike."""
    datasets_ = pytest.importorskip("mmdet.datasets")
    from mmdet.utils import register_all_modules

    register_all_modules()
    sides, cuts = [[70]], [40, 60]
    steps = [
        dict(type="RandomChoiceResize", scales=[(70, 1333)], keep_ratio=True),
        dict(type="RandomCrop", crop_type="absolute_range", crop_size=tuple(cuts),
             allow_negative_crop=True),
    ]  # fmt: skip
    pipeline = [
        dict(type="LoadImageFromFile"),
        dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
        dict(type="RandomFlip", prob=float(flip)),
        *(steps if crop else []),
        dict(type="RandomChoiceResize", scales=[(112, 1333)], keep_ratio=True),
        dict(type="PackDetInputs"),
    ]
    file = tmp_path / "small.json"
    part = json.loads((digits / "annotations/instances_training.json").read_text())
    first = part["annotations"][0]
    first["bbox"][2] = 0.9  # under a pixel
    for item in part["annotations"][1:9]:  # masks that leave most of their boxes, and the crop
        left, top = item["bbox"][:2]
        item["segmentation"] = [[left, top, left + 4, top, left, top + 4]]
    file.write_text(json.dumps(part))
    theirs = datasets_.CocoDataset(
        ann_file=str(file),
        data_prefix=dict(img=str(digits / "images/training")),
        metainfo=dict(classes=tuple("0123456789")),
        pipeline=pipeline,
    )
    cfg = config(
        digits,
        INPUT__RANDOM_FLIP="horizontal",
        INPUT__MULTI_SCALE_CROP__ENABLED=True,
        INPUT__MULTI_SCALE_CROP__PROB=float(crop),
        INPUT__MULTI_SCALE_CROP__MIN_SIZES=sides[0],
        INPUT__MULTI_SCALE_CROP__CROP_SIZE=cuts,
        INPUT__MIN_SIZE_TRAIN=[112],
    )
    mapper = DetectionMapper(cfg, True)
    mapper.augmentations.augs[0].prob = float(flip)
    middle = lambda low, high=None: (low + high) // 2 if high else low // 2  # noqa: E731
    monkeypatch.setattr(np.random, "randint", middle)
    monkeypatch.setattr(np.random, "uniform", lambda low, high, size: np.zeros(size))
    monkeypatch.setattr(np.random, "random", lambda *size: np.full(size, 0.5) if size else 0.5)
    name = f"small_{uuid.uuid4().hex}"
    register_coco_instances(name, {}, str(file), str(digits / "images/training"))
    seen = emptied = 0
    for number, entry in enumerate(DatasetCatalog.get(name)):
        ours, other = mapper(entry), theirs[number]
        assert torch.equal(ours["image"], other["inputs"].flip(0))  # RGB and BGR
        known, instances = other["data_samples"].gt_instances, ours["instances"]
        torch.testing.assert_close(
            instances.gt_boxes.tensor, known.bboxes.tensor, rtol=0, atol=1e-4
        )
        assert torch.equal(instances.gt_classes, known.labels)
        masks = torch.from_numpy(known.masks.masks).bool()
        assert torch.equal(instances.gt_masks.tensor, masks)
        seen += len(instances)
        emptied += (~masks.flatten(1).any(1)).sum().item()
    assert seen > 20
    assert (emptied > 0) == crop


def test_polygons_become_masks_before_they_are_cropped(digits, monkeypatch):
    """An L of three squares: its mask is drawn at the image's own size."""
    mapper = DetectionMapper(config(digits, INPUT__MIN_SIZE_TRAIN=[48]), True)
    (file,) = {entry["file_name"] for entry in entries(digits)[:1]}
    polygon = [16, 16, 48, 16, 48, 32, 32, 32, 32, 48, 16, 48]
    annotation = dict(bbox=[16, 16, 32, 32], bbox_mode=1, category_id=3, segmentation=[polygon])
    entry = dict(file_name=file, height=96, width=96, annotations=[annotation])
    mask = mapper(entry)["instances"].gt_masks.tensor[0]
    expected = torch.zeros(48, 48, dtype=torch.bool)
    expected[8:24, 8:24] = True
    expected[16:24, 16:24] = False
    assert torch.equal(mask, expected)


def test_the_predictor_resizes_as_the_test_loader_does(digits, tmp_path):
    cfg = config(digits, MODEL__DEVICE="cpu", INPUT__MIN_SIZE_TEST=120)
    torch.save({"model": build_model(cfg).state_dict()}, tmp_path / "model.pth")
    cfg.MODEL.WEIGHTS = str(tmp_path / "model.pth")
    register_coco_datasets(cfg)
    predictor, seen = Predictor(cfg), []
    predictor.model.register_forward_pre_hook(lambda module, args: seen.append(args[0][0]))
    entry = entries(digits)[0]
    bgr = np.asarray(Image.open(entry["file_name"]).convert("RGB"))[:, :, ::-1]
    assert len(predictor(bgr)["instances"]) > 0
    expected = DetectionMapper(cfg, False)(entry)
    assert torch.equal(seen[0]["image"].byte(), expected["image"])
    assert (seen[0]["height"], seen[0]["width"]) == (96, 96)


def test_images_for_test_time_augmentation(digits):
    cfg = config(digits)
    cfg.TEST.AUG.MIN_SIZES, cfg.TEST.AUG.MAX_SIZE = [48, 80], 90
    image = torch.from_numpy(IMAGE.transpose(2, 0, 1).copy())
    found = DetectionMapperTTA(cfg)(dict(image=image, height=61, width=83, image_id=7))
    shapes = [tuple(item["image"].shape[1:]) for item in found]
    assert shapes == [(48, 65), (48, 65), (66, 90), (66, 90)]
    for plain, mirrored in (found[:2], found[2:]):
        assert torch.equal(plain["image"].flip(2), mirrored["image"])
        resize = plain["transforms"].transforms[0]
        assert type(resize) is OpenCVResizeTransform
        assert np.array_equal(plain["image"].permute(1, 2, 0), resize.apply_image(IMAGE))
    assert all(item["image_id"] == 7 for item in found)
    cfg.TEST.AUG.FLIP, cfg.INPUT.RESIZE_BACKEND = False, "pil"
    first, _ = DetectionMapperTTA(cfg)(dict(image=image, height=61, width=83))
    assert type(first["transforms"].transforms[0]) is T.ResizeTransform


def test_images_without_objects_or_size_are_left_out(digits, tmp_path):
    part = json.loads((digits / "annotations/instances_training.json").read_text())
    part["images"] = part["images"][:6]
    part["annotations"] = [item for item in part["annotations"] if item["image_id"] in (1, 2, 3, 4)]
    for image, edge in zip(part["images"], (31, 32, 96, 31, 96, 31), strict=True):
        image["height"] = edge
    for item in part["annotations"]:  # inside the lowest of them
        item |= {
            "bbox": [2, 2, 20, 20],
            "area": 400,
            "segmentation": [[2, 2, 22, 2, 22, 22, 2, 22]],
        }
    file = tmp_path / "some.json"
    file.write_text(json.dumps(part))
    names = [*datasets(digits), ["some_digits", str(file), str(digits / "images/training")]]
    cfg = load_config(
        CONFIG, overrides(digits, DATASETS__REGISTER_COCO=names, DATASETS__TRAIN=["some_digits"])
    )
    register_coco_datasets(cfg)
    assert [entry["image_id"] for entry in training_dicts(cfg)] == [1, 2, 3, 4]
    cfg.DATALOADER.MIN_IMAGE_SIZE = 32
    assert [entry["image_id"] for entry in training_dicts(cfg)] == [2, 3]
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = False
    assert [entry["image_id"] for entry in training_dicts(cfg)] == [2, 3, 5]
    cfg.DATALOADER.MIN_IMAGE_SIZE = 97
    with pytest.raises(UsageError, match="at least DATALOADER.MIN_IMAGE_SIZE 97 pixels"):
        training_dicts(cfg)


def test_an_unknown_resize_is_refused(digits):
    cfg = config(digits)
    cfg.INPUT.RESIZE_BACKEND = "opencv"
    with pytest.raises(
        UsageError, match="INPUT.RESIZE_BACKEND must be one of pil, cv2, got 'opencv'"
    ):
        configure_augmentation(cfg, [], True)
