"""How training images of classifiers are augmented, mixed and erased."""

from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("mmpretrain")

from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from mmpretrain.registry import TRANSFORMS
from mmpretrain.structures import DataSample

from elsa_mm.classification import CutMix, ErasingDataPreprocessor, Mixup

CONFIG = Path(__file__).resolve().parents[2] / (
    "configs/mmpretrain/elsa_swin/elsa-swin-tiny_8xb128_in1k.py"
)


def batch(images=6, side=32):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(images, 3, side, side, generator=generator)
    return inputs, torch.eye(10)[torch.arange(images)]


def test_images_are_mixed_with_the_reversed_batch():
    inputs, scores = batch()
    np.random.seed(0)
    share = np.random.beta(0.8, 0.8)
    np.random.seed(0)
    mixed = Mixup(alpha=0.8)(inputs, scores)
    for got, whole in zip(mixed, (inputs, scores), strict=True):
        assert torch.allclose(got, share * whole + (1 - share) * whole.flip(0), atol=1e-6)


def test_rectangles_are_cut_out_of_the_reversed_batch():
    inputs, scores = batch()
    np.random.seed(1)
    got, mixed = CutMix(alpha=1.0)(inputs.clone(), scores)
    pasted = (got != inputs).any(1)
    assert torch.equal(pasted, pasted[:1].expand_as(pasted))  # one rectangle for all
    rows, columns = pasted[0].any(1), pasted[0].any(0)
    assert torch.equal(pasted[0], rows[:, None] & columns) and 0 < pasted[0].sum() < 32**2
    assert torch.equal(got, torch.where(pasted[:, None], inputs.flip(0), inputs))
    share = 1 - pasted[0].float().mean()
    assert torch.allclose(mixed, share * scores + (1 - share) * scores.flip(0), atol=1e-6)


def preprocess(erase_prob, images, training=True, **options):
    """Raw images of one colour through the preprocessor: (inputs, labels)."""
    settings = dict(mean=[127.5] * 3, std=[50.0] * 3, num_classes=10, **options)
    raw = torch.arange(images)[:, None, None, None].expand(images, 3, 40, 60).byte()
    data = dict(inputs=raw, data_samples=[DataSample().set_gt_label(i % 10) for i in range(images)])
    np.random.seed(0)
    torch.manual_seed(0)
    found = ErasingDataPreprocessor(erase_prob=erase_prob, **settings)(data, training)
    return found["inputs"], [sample.get("gt_score") for sample in found["data_samples"]]


def test_a_quarter_of_the_images_is_erased_by_normal_noise():
    plain, got = preprocess(0.0, 200)[0], preprocess(0.25, 200)[0]
    erased = (got != plain).all(1)
    hit = erased.flatten(1).any(1)
    assert 30 <= hit.sum() <= 70
    for region in erased[hit]:
        rows, columns = region.any(1), region.any(0)
        assert torch.equal(region, rows[:, None] & columns)
        height, width = int(rows.sum()), int(columns.sum())
        assert 0.017 < height * width / region.numel() < 0.36  # rounded to whole pixels
        assert 0.2 < height / width < 5
    noise = got.permute(0, 2, 3, 1)[erased]
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
    assert noise.max() > 3.5 and noise.min() < -3.5  # 0..255 would end at 2.55
    assert torch.equal(preprocess(1.0, 200, training=False)[0], plain)


def test_mixed_images_are_erased_and_erased_images_not_mixed():
    mixing = dict(augments=[dict(type="elsa_mm.classification.Mixup", alpha=0.8)])
    plain, labels = preprocess(0.0, 20, batch_augments=mixing)
    got, labels_too = preprocess(1.0, 20, batch_augments=mixing)
    assert all(map(torch.equal, labels, labels_too)) and max(labels[0]) < 1
    kept = got == plain
    assert kept.flatten(1).any(1).all() and not kept.flatten(1).all(1).any()
    noise = got[~kept]
    assert abs(noise.std() - 1) < 0.05  # a mixture would have less


def test_operations_draw_their_interpolation():
    cfg = Config.fromfile(CONFIG)
    (step,) = [s for s in cfg.train_pipeline if s.type.endswith("RandAugment")]
    with DefaultScope.overwrite_default_scope("mmpretrain"):
        MODELS.get("ImageClassifier")
        augment = TRANSFORMS.build(step)
    kinds = [type(transform).__name__ for transform in augment]
    assert kinds[:15] == kinds[15:] and len(kinds) == 30  # all are equally likely
    resampling = ["Rotate", "Shear", "Shear", "Translate", "Translate"]
    for half, interpolation in (
        (augment.transforms[:15], "bilinear"),
        (augment.transforms[15:], "bicubic"),
    ):
        found = [t for t in half if hasattr(t, "interpolation")]
        assert [type(t).__name__ for t in found] == resampling
        assert {t.interpolation for t in found} == {interpolation}
        assert all(tuple(t.pad_val) == (104, 116, 124) for t in found)
    np.random.seed(0)
    drawn = np.unique([augment.random_policy_indices() for _ in range(400)])
    assert len(drawn) == 30
