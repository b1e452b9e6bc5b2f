"""Evaluation batches of images of several sizes: their scores, and what is said of them."""

import shutil
from types import SimpleNamespace

import pytest
import torch
from mm_tiny import CONFIGS, options
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from PIL import Image

from elsa_core.runtime.errors import UsageError
from elsa_mm import EqualSizesHook

SIZES = [(64, 96), (96, 64)]
EQUAL, MIXED = [torch.zeros(3, 8, 8)] * 2, [torch.zeros(3, 8, 8), torch.zeros(3, 6, 8)]
SENTENCE = "set val_dataloader.batch_size and test_dataloader.batch_size to 1"


def scores(model, images, size):
    """Of the best detections, by image, in batches of a size."""
    from mmdet.structures import DetDataSample

    found = []
    for first in range(0, len(images), size):
        part = images[first : first + size]
        samples = [
            DetDataSample(
                metainfo={
                    "img_shape": tuple(image.shape[1:]),
                    "ori_shape": tuple(image.shape[1:]),
                    "scale_factor": (1.0, 1.0),
                }
            )
            for image in part
        ]
        with torch.no_grad():
            results = model.test_step({"inputs": part, "data_samples": samples})
        found += [result.pred_instances.scores[:5] for result in results]
    return torch.stack(found)


def test_scores_depend_on_the_batch_where_it_mixes_sizes():
    cfg = Config.fromfile(CONFIGS["mmdet"])
    init_default_scope("mmdet")
    cfg.model.test_cfg.rcnn.update(score_thr=0.0, max_per_img=10)
    torch.manual_seed(0)
    model = MODELS.build(cfg.model).eval()
    torch.nn.init.normal_(model.roi_head.bbox_head.fc_cls.weight, std=0.3)
    mixed = [torch.randint(256, (3, *size), dtype=torch.uint8) for size in SIZES]
    equal = [torch.randint(256, (3, 64, 96), dtype=torch.uint8) for _ in SIZES]
    batch = cfg.test_dataloader.batch_size
    alone = scores(model, mixed, 1)
    assert (scores(model, mixed, 2) - alone).abs().max() > 1e-2
    assert torch.equal(scores(model, mixed, batch), alone)
    assert (scores(model, equal, 2) - scores(model, equal, 1)).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("images", "said"),
    [
        (EQUAL, False),
        (torch.zeros(2, 3, 8, 8), False),
        (MIXED, True),
        ([EQUAL, MIXED], True),  # two views of two images
        (None, False),
    ],
)
@pytest.mark.parametrize("when", ["before_val_iter", "before_test_iter"])
def test_a_mixed_batch_is_said_once(images, said, when):
    warnings = []
    logger = SimpleNamespace(warning=warnings.append)
    runner = SimpleNamespace(cfg={"default_scope": "mmdet"}, logger=logger)
    hook = EqualSizesHook()
    for index in range(2):
        getattr(hook, when)(runner, index, {"inputs": images})
    assert len(warnings) == said
    assert not said or ("8x8 and 6x8 pixels" in warnings[0] and SENTENCE in warnings[0])
    runner.cfg["default_scope"] = "mmseg"
    if said:
        with pytest.raises(UsageError, match="one size at a time, got a batch with 8x8 and 6x8"):
            getattr(EqualSizesHook(), when)(runner, 0, {"inputs": images})


def test_a_segmentation_that_will_mix_sizes_does_not_begin(digits, refusal, tmp_path):
    data = tmp_path / "mixed"
    shutil.copytree(digits, data)
    for folder in ("images", "annotations"):
        path = min((data / folder / "validation").iterdir())
        Image.open(path).resize((96, 64), Image.Resampling.NEAREST).save(path)
    more = {"val_dataloader__dataset__pipeline__1__keep_ratio": True}
    sentence = refusal("train", CONFIGS["mmseg"], *options("mmseg", data, **more))
    assert "MMSegmentation evaluates images of one size at a time" in sentence
    assert SENTENCE in sentence and not list(tmp_path.rglob("*.pth"))
