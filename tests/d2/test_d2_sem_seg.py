"""Semantic segmentation in Detectron2: data, augmentation, evaluation."""

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("detectron2")

from d2_sem_seg_tiny import DIGITS, NAMES, entry, few_images, overrides, overwrite
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data import transforms as T
from detectron2.modeling import build_model

from elsa_d2 import (
    SegmentorWithTTA,
    SemSegMapper,
    UsageError,
    build_sem_seg_evaluator,
    load_config,
    register_sem_seg_datasets,
)
from elsa_d2.data.safe_loading import read_image, read_labels
from elsa_d2.data.sem_seg import check_sem_seg_dataset
from elsa_d2.data.sem_seg_augmentation import (
    PhotometricDistortion,
    RandomCropCategoryArea,
    ResizeToFit,
)
from examples.digits.dataset import SEGMENTATION_CLASSES

pytestmark = pytest.mark.usefixtures("clean_catalog")


def config(root, **changes):
    return load_config(DIGITS, overrides(root, **changes))


@pytest.fixture
def copy(digits, tmp_path):
    return few_images(digits, tmp_path)


def image_and_labels(size=(60, 90), classes=4, seed=0):
    random = np.random.default_rng(seed)
    image = cv2.resize(random.integers(0, 256, (9, 9, 3), dtype=np.uint8), size[::-1])
    labels = random.integers(0, classes, (6, 6), dtype=np.uint8)
    return image, cv2.resize(labels, size[::-1], interpolation=cv2.INTER_NEAREST)


# Augmentation: the same random numbers give MMSegmentation's results.
MMSEG = {
    "resize": (
        dict(type="RandomResize", scale=(80, 50), ratio_range=(0.5, 2.0), keep_ratio=True),
        lambda: [ResizeToFit((80, 50), (0.5, 2.0))],
    ),
    "crop": (
        dict(type="RandomCrop", crop_size=(40, 64)),
        lambda: [RandomCropCategoryArea((40, 64))],
    ),
    "crop of mixed classes": (
        dict(type="RandomCrop", crop_size=(20, 16), cat_max_ratio=0.4),
        lambda: [RandomCropCategoryArea((20, 16), 0.4)],
    ),
    "crop larger than the image": (
        dict(type="RandomCrop", crop_size=(70, 64), cat_max_ratio=0.75),
        lambda: [RandomCropCategoryArea((70, 64), 0.75)],
    ),
    "flip": (dict(type="RandomFlip", prob=0.5), lambda: [T.RandomFlip()]),
    "colours": (dict(type="PhotoMetricDistortion"), lambda: [PhotometricDistortion("RGB")]),
}


@pytest.mark.parametrize("theirs, ours", MMSEG.values(), ids=MMSEG)
def test_augmentation_is_mmsegmentations(theirs, ours):
    pytest.importorskip("mmseg")
    from mmengine.registry import TRANSFORMS, init_default_scope

    init_default_scope("mmseg")
    transform, changed = TRANSFORMS.build(theirs), set()
    for seed in range(30):
        image, labels = image_and_labels(size=(60, 90) if seed % 2 else (90, 60), seed=seed)
        labels[:10] = 255
        np.random.seed(seed)
        mine = T.AugInput(image[..., ::-1].copy(), sem_seg=labels.copy())
        T.AugmentationList(ours())(mine)
        np.random.seed(seed)
        expected = transform(
            {"img": image.copy(), "gt_seg_map": labels.copy(), "seg_fields": ["gt_seg_map"]}
        )
        np.testing.assert_array_equal(mine.image[..., ::-1], expected["img"])
        np.testing.assert_array_equal(mine.sem_seg, expected["gt_seg_map"])
        changed.add(mine.image.shape != image.shape or (mine.image[..., ::-1] != image).any())
    assert True in changed


def test_resize_for_testing_is_mmsegmentations():
    mmcv = pytest.importorskip("mmcv")
    for size in [(50, 80), (33, 200), (512, 683), (97, 31)]:
        image, _ = image_and_labels(size)
        mine = ResizeToFit((96, 40)).get_transform(image).apply_image(image)
        np.testing.assert_array_equal(mine, mmcv.imrescale(image, (96, 40)))


def test_colours_follow_the_channel_order():
    image, _ = image_and_labels()
    results = []
    for order in ("RGB", "BGR"):
        np.random.seed(3)
        distort = PhotometricDistortion(order).get_transform(image)
        turned = image if order == "BGR" else image[..., ::-1].copy()
        results.append(distort.apply_image(turned)[..., :: 1 if order == "BGR" else -1])
    np.testing.assert_array_equal(*results)
    assert (results[0] != image).any()


# From files to the model's input.


def test_training_input_is_padded_with_the_mean_and_ignored_labels(digits):
    cfg = config(digits, INPUT__SEM_SEG__CROP_SIZE=[80, 112])
    register_sem_seg_datasets(cfg)
    record = DatasetCatalog.get(NAMES[0])[0]
    np.random.seed(0)
    x = SemSegMapper(cfg, True)(record)
    assert x["image"].shape == (3, 80, 112) and x["sem_seg"].shape == (80, 112)
    inside = (x["sem_seg"] != 255).nonzero().amax(dim=0) + 1
    height, width = inside.tolist()
    assert height < 80 or width < 112
    outside = x["image"].clone()
    outside[:, :height, :width] = torch.tensor(cfg.MODEL.PIXEL_MEAN).view(-1, 1, 1)
    model = build_model(cfg)
    assert not ((outside - model.pixel_mean) / model.pixel_std).any()
    assert (x["height"], x["width"]) == (96, 96)


def test_test_input_is_resized_and_keeps_the_file_s_size(digits):
    cfg = config(digits)
    register_sem_seg_datasets(cfg)
    x = SemSegMapper(cfg, False)(DatasetCatalog.get(NAMES[1])[0])
    assert set(x) == {"image", "height", "width", "file_name"}
    assert x["image"].shape == (3, 48, 48) and x["image"].dtype == torch.uint8
    assert (x["height"], x["width"]) == (96, 96)


def test_zero_label_is_reduced_and_palettes_are_read_as_indices(tmp_path):
    values = np.array([[0, 1, 2, 255]], dtype=np.uint8)
    picture = Image.fromarray(values, mode="P")
    picture.putpalette([7, 8, 9] * 256)
    picture.save(tmp_path / "labels.png")
    labels = read_labels(str(tmp_path / "labels.png"), 2, reduce_zero_label=True)
    np.testing.assert_array_equal(labels, [[255, 0, 1, 255]])
    labels = read_labels(str(tmp_path / "labels.png"), 3)
    np.testing.assert_array_equal(labels, values)
    with pytest.raises(UsageError, match="must be 0..1 for 2 classes, or 255 for none, got 2 in"):
        read_labels(str(tmp_path / "labels.png"), 2)
    with pytest.raises(UsageError, match="must be 1..1 for 1 classes, or 0 or 255 .* got 2 in"):
        read_labels(str(tmp_path / "labels.png"), 1, reduce_zero_label=True)


def test_class_names_from_a_file_and_png_images(copy):
    for file in sorted((copy / "images/training").iterdir()):
        Image.open(file).save(file.with_suffix(".png"))
        file.unlink()
    names = copy / "classes.txt"
    names.write_text("\n".join(SEGMENTATION_CLASSES) + "\n")
    data = entry(NAMES[0], copy, "training")
    data[3] = str(names)
    cfg = config(copy, DATASETS__REGISTER_SEM_SEG=[data])
    register_sem_seg_datasets(cfg)
    register_sem_seg_datasets(cfg)  # again, as each process of a run does
    assert MetadataCatalog.get(NAMES[0]).stuff_classes == list(SEGMENTATION_CLASSES)
    check_sem_seg_dataset(NAMES[0], 11)
    assert len(DatasetCatalog.get(NAMES[0])) == 3


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda e: e[:4], r"DATASETS.REGISTER_SEM_SEG must be a list of \[name, image folder"),
        (lambda e: [*e[:4], 1], "must be a list of"),
        (lambda e: [*e[:3], "nowhere.txt", True], "class names nowhere.txt .* cannot be read"),
        (lambda e: [*e[:4], False], "names 'digits_.*', which is registered as another data set"),
    ],
)
def test_refused_registrations(digits, spoil, message):
    good = config(digits)
    register_sem_seg_datasets(good)
    bad = [spoil(list(entry)) for entry in good.DATASETS.REGISTER_SEM_SEG]
    with pytest.raises(UsageError, match=message):
        register_sem_seg_datasets(config(digits, DATASETS__REGISTER_SEM_SEG=bad))


# Evaluation.


def test_mean_iou_is_mmsegmentations(copy, tmp_path):
    pytest.importorskip("mmseg")
    from mmseg.evaluation import IoUMetric

    # Every class occurs: of one that does not, the two make different things.
    values = np.random.default_rng(0).integers(0, 12, (3, 96, 96), dtype=np.uint8)
    for file, labels in zip((copy / "annotations/validation").iterdir(), values, strict=True):
        Image.fromarray(labels).save(file)
    cfg = config(copy, OUTPUT_DIR=str(tmp_path))
    register_sem_seg_datasets(cfg)
    evaluator = build_sem_seg_evaluator(cfg, NAMES[1])
    metric = IoUMetric(iou_metrics=["mIoU"])
    metric.dataset_meta = {"classes": SEGMENTATION_CLASSES}
    evaluator.reset()
    random = torch.Generator().manual_seed(0)
    records = DatasetCatalog.get(NAMES[1])
    for record in records:
        truth = read_labels(record["sem_seg_file_name"], 11, True)
        scores = torch.rand(11, *truth.shape, generator=random)
        right = torch.nn.functional.one_hot(torch.from_numpy(truth).long() % 255, 11)
        scores += 0.5 * right.permute(2, 0, 1)
        evaluator.process([record], [{"sem_seg": scores}])
        sample = {
            "pred_sem_seg": {"data": scores.argmax(0, keepdim=True)},
            "gt_sem_seg": {"data": torch.from_numpy(truth)[None].long()},
        }
        metric.process({}, [sample])
    mine = evaluator.evaluate()["sem_seg"]
    expected = metric.evaluate(len(records))
    for ours, theirs in (("mIoU", "mIoU"), ("mACC", "mAcc"), ("pACC", "aAcc")):
        assert mine[ours] == pytest.approx(expected[theirs], abs=0.01)
    assert 1 < mine["mIoU"] < 99
    assert (tmp_path / "inference/sem_seg_predictions.json").exists()


def test_multi_scale_testing_is_the_mean_made_by_hand(digits):
    cfg = config(digits, TEST__AUG__RATIOS=[0.5, 1.25], TEST__AUG__FLIP=True)
    register_sem_seg_datasets(cfg)
    record = DatasetCatalog.get(NAMES[1])[0]
    torch.manual_seed(0)
    model = build_model(cfg).eval()
    image = read_image(record["file_name"], "RGB")
    probabilities = []
    with torch.no_grad():
        (mean,) = SegmentorWithTTA(cfg, model)([record])
        for side in (24, 60):
            resized = cv2.resize(image, (side, side))
            for mirror in (1, -1):
                pixels = np.ascontiguousarray(resized[:, ::mirror].transpose(2, 0, 1))
                inputs = {"image": torch.from_numpy(pixels), "height": 96, "width": 96}
                logits = model([inputs])[0]["sem_seg"]
                probabilities.append((logits if mirror == 1 else logits.flip(-1)).softmax(0))
    torch.testing.assert_close(mean["sem_seg"], torch.stack(probabilities).mean(0))
    torch.testing.assert_close(mean["sem_seg"].sum(0), torch.ones(96, 96))
    assert (probabilities[0] - probabilities[1]).abs().max() > 1e-4


def test_an_image_that_breaks_later_is_named(copy):
    cfg = config(copy)
    register_sem_seg_datasets(cfg)
    records = DatasetCatalog.get(NAMES[0])
    overwrite("images/training", b"")(copy)
    with pytest.raises(UsageError, match=f"image {records[1]['file_name']} cannot be read"):
        SemSegMapper(cfg, True)(records[1])
