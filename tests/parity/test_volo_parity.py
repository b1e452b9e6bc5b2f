"""ELSA-VOLO in Detectron2 and in OpenMMLab: same names, same maps, same results."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("detectron2")
pytest.importorskip("mmdet")
pytest.importorskip("mmseg")

from detectron2.modeling import META_ARCH_REGISTRY, build_model
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from mmengine.structures import PixelData
from mmseg.structures import SegDataSample

import elsa_d2
import elsa_mm.volo
from elsa_core.weights.names import rename

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
ARCH = dict(depths=[1, 2, 1, 1], embed_dims=[16, 24], num_heads=[2, 3], stem_dim=8)
DETECTOR = (
    "COCO-InstanceSegmentation/mask_rcnn_elsa_volo_d1_fpn_3x.yaml",
    "mmdet/elsa_volo/mask-rcnn_elsa-volo-d1_fpn_amp-ms-crop-3x_coco.py",
)
SEGMENTOR = (
    "ADE20K-SemanticSegmentation/upernet_elsa_volo_d{}_160k.yaml",
    "mmseg/elsa_volo/elsa-volo-d{}-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py",
)
DIGITS = (
    "digits/mask_rcnn_elsa_volo_digits.yaml",
    "mmdet/digits/mask-rcnn_elsa-volo_fpn_digits.py",
)
NARROW_HEAD = {"MODEL.SEM_SEG_HEAD.CONVS_DIM": 32, "MODEL.SEM_SEG_HEAD.AUX_CONVS_DIM": 32}


def configs(files, variant="", overrides=()):
    """Detectron2's and OpenMMLab's."""
    ours, theirs = (file.format(variant) for file in files)
    keys = ["MODEL.DEVICE", "cpu", *map(str, overrides)]
    cfg = elsa_d2.load_config(str(CONFIGS / "detectron2" / ours), keys)
    return cfg, Config.fromfile(CONFIGS / theirs)


def build_theirs(cfg):
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        return MODELS.build(cfg.model)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("size", [(96, 64), (67, 45)])
@pytest.mark.parametrize("pyramid", [False, True])
def test_equal_maps(pyramid, size, training):
    """In training, batch norms see the batch and learn the same statistics."""
    torch.manual_seed(0)
    ours = elsa_d2.ELSAVolo(ARCH, pyramid=pyramid)
    theirs = elsa_mm.volo.ELSAVolo(ARCH, pyramid=pyramid)
    assert [(n, v.shape) for n, v in ours.state_dict().items()] == [
        (n, v.shape) for n, v in theirs.state_dict().items()
    ]
    theirs.load_state_dict(ours.state_dict())
    image = torch.randn(2, 3, *size)
    with torch.no_grad():
        pairs = zip(
            ours.train(training)(image).values(), theirs.train(training)(image), strict=True
        )
    for one, other in pairs:
        assert torch.equal(one, other) and one.stride() == other.stride()
    states = zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True)
    assert all(torch.equal(one, other) for one, other in states)


def converted(model, kind):
    """The tensors of Detectron2's model under OpenMMLab's names."""
    tensors, unknown = rename(model.state_dict(), kind, "mm")
    assert set(unknown) <= {"pixel_mean", "pixel_std"}
    return {name: tensor for name, (_, tensor) in tensors.items()}


@pytest.mark.parametrize(
    "kind, files, variant",
    [
        ("mask_rcnn", DETECTOR, ""),
        ("mask_rcnn", DIGITS, ""),
        *(("upernet", SEGMENTOR, variant) for variant in (1, 2, 3)),
    ],
)
def test_models_have_the_same_parameters_and_buffers(kind, files, variant):
    cfg, other = configs(files, variant)
    with torch.device("meta"):
        ours = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)(cfg)
        theirs = build_theirs(other)
    shapes = {name: value.shape for name, value in converted(ours, kind).items()}
    assert shapes == {name: value.shape for name, value in theirs.state_dict().items()}


def test_same_detections():
    """Of untrained heads with large weights, which find objects of several classes."""
    # The frameworks enumerate the anchors of several sizes in different orders.
    sizes = [[32], [64], [128], [256], [512]]
    cfg, other = configs(DIGITS, "", ["MODEL.ANCHOR_GENERATOR.SIZES", sizes])
    other.model.rpn_head.anchor_generator.scales = [8]
    torch.manual_seed(0)
    ours = build_model(cfg).eval()
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if name.endswith(("objectness_logits.weight", "anchor_deltas.weight")):
                parameter.normal_(std=0.1)
            if name.endswith(("cls_score.weight", "bbox_pred.weight", "predictor.weight")):
                parameter.normal_(std=0.1)
    theirs = build_theirs(other).eval()
    theirs.load_state_dict(converted(ours, "mask_rcnn"), strict=True)

    image = torch.randint(0, 256, (3, 150, 131))  # RGB
    size = tuple(image.shape[1:])
    sample = DetDataSample(metainfo=dict(img_shape=size, ori_shape=size, scale_factor=(1.0, 1.0)))
    with torch.no_grad():
        found = ours([{"image": image.float()}])[0]["instances"]
        batch = dict(inputs=[image.flip(0)], data_samples=[sample])
        expected = theirs.test_step(batch)[0].pred_instances
    assert len(found) == len(expected) > 20 and len(set(found.pred_classes.tolist())) > 2
    torch.testing.assert_close(found.scores, expected.scores, rtol=1e-4, atol=1e-5)
    assert torch.equal(found.pred_classes, expected.labels)
    torch.testing.assert_close(found.pred_boxes.tensor, expected.bboxes, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("pyramid", [True, False])
def test_same_segmentation_of_an_odd_image(pyramid):
    """Both pad it to what the backbone's maps cover."""
    names = {True: ["res2", "res3", "res4", "res5"], False: [f"stage{i}" for i in range(1, 5)]}
    keys = {f"MODEL.ELSA_VOLO.CUSTOM_ARCH.{name.upper()}": ARCH[name] for name in ARCH}
    keys |= {"MODEL.ELSA_VOLO.ARCH": "custom", "MODEL.ELSA_VOLO.PYRAMID": pyramid, **NARROW_HEAD}
    keys |= {"MODEL.SEM_SEG_HEAD.IN_FEATURES": names[pyramid]}
    keys |= {"MODEL.SEM_SEG_HEAD.AUX_FEATURE": names[pyramid][2]}
    cfg, other = configs(SEGMENTOR, 1, [part for pair in keys.items() for part in pair])
    torch.manual_seed(0)
    ours = build_model(cfg).eval()
    widths = ours.backbone.num_features
    other.model.backbone.update(arch=ARCH, pyramid=pyramid)
    other.model.decode_head.update(channels=32, in_channels=widths)
    other.model.auxiliary_head.update(channels=32, in_channels=widths[2])
    if not pyramid:
        other.model.data_preprocessor.test_cfg.size_divisor = 16
    theirs = build_theirs(other).eval()
    theirs.load_state_dict(converted(ours, "upernet"), strict=True)

    image = torch.randint(0, 256, (3, 70, 52))  # RGB
    size = tuple(image.shape[1:])
    sample = SegDataSample(metainfo=dict(img_shape=size, ori_shape=size))
    sample.gt_sem_seg = PixelData(data=torch.zeros(1, *size, dtype=torch.long))
    with torch.no_grad():
        found = ours([{"image": image.float()}])[0]["sem_seg"]
        batch = dict(inputs=[image.flip(0)], data_samples=[sample])
        expected = theirs.test_step(batch)[0].seg_logits.data
    assert found.shape == expected.shape == (150, *size)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
