"""Makes the exported form of a loaded model, or says in one sentence why it has none."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from elsa_core import ELSASwin, ELSAVolo
from elsa_core.runtime.errors import UsageError
from elsa_core.weights.convert import convert
from elsa_core.weights.names import CASCADE, MASK_RCNN
from elsa_core.weights.recognise import recognise
from elsa_tools.predict.inferencer import Inferencer

from .detector import Detector
from .heads import ConvModule
from .models import Backbone, Exportable, Segmentor, map_strides
from .parts import check


def wrap(
    inferencer: Inferencer, part: str = "model", normalised: bool = False, pasted: bool = False
) -> Exportable:
    """What to export of a model.

    Args:
        part: "backbone", or "model": UPerNet, Faster, Mask or Cascade R-CNN.
        normalised: whether the image is normalised already.
        pasted: whether a detector pastes its masks into the image.

    Raises:
        UsageError: a backbone other than ELSA-Swin and ELSA-VOLO, or another model or head.
    """
    model = inferencer.model
    backbone = getattr(model.backbone, "bottom_up", model.backbone)
    if not isinstance(backbone, (ELSASwin, ELSAVolo)):
        name = type(backbone).__name__
        raise UsageError(f"the backbone must be an ELSA-Swin or an ELSA-VOLO, got {name}")
    normalisation = None if normalised else inferencer.normalisation()
    if part == "backbone":
        module: Exportable = Backbone(backbone, normalisation)
    elif inferencer.task == "detection":
        module = build_detector(inferencer, normalised, pasted)
    else:
        head: Any = getattr(model, "sem_seg_head", getattr(model, "decode_head", None))
        if type(head).__name__ not in ("UPerNetHead", "UPerHead"):
            raise UsageError(
                f"of segmentors UPerNet alone is exported, got {type(model).__name__} with "
                f"{type(head).__name__}: --part backbone exports its backbone"
            )
        if inferencer.framework == "mmseg":
            check("the model", type(model).__name__, "EncoderDecoder")
            check("whether the model has a neck", model.with_neck, False)
            check("decode_head.align_corners", head.align_corners, False)
            check("decode_head.out_channels", head.out_channels, head.num_classes)
        module = Segmentor(inferencer, normalisation)
    return module.cpu().float().eval()


def build_detector(
    inferencer: Inferencer, normalised: bool = False, pasted: bool = False
) -> Detector:
    """The `Detector` that computes what a loaded Faster, Mask or Cascade R-CNN does.

    Args:
        normalised: whether it takes images that are normalised already.
        pasted: whether it pastes the masks into the image.

    Raises:
        UsageError: a model with other parts, named with the rule.
    """
    if inferencer.framework == "detectron2":
        from .d2 import read_settings
    else:
        from .mm import read_settings
    settings, anchor_sizes = read_settings(inferencer)
    model = inferencer.model
    backbone = getattr(model.backbone, "bottom_up", model.backbone)
    check("the backbone", type(backbone).__mro__, ELSASwin, ELSAVolo)
    check("the strides of the backbone's maps", map_strides(backbone)[1][:2], [4, 8])
    if len(backbone.out_indices) != len(settings.strides) - 1:
        raise UsageError(
            f"the pyramid must have one level more than the backbone's maps, got "
            f"{len(settings.strides)} levels over {len(backbone.out_indices)} maps"
        )
    try:
        source = recognise(model.state_dict())
        if source.kind not in (MASK_RCNN, CASCADE):
            raise UsageError(f"it is {source}, not Faster, Mask or Cascade R-CNN")
        converted = convert(source, "mmdet", anchor_sizes=anchor_sizes)
    except UsageError as error:
        raise UsageError(f"the model cannot be exported: {error}") from error
    assert converted.sizes is not None
    if len(settings.deviations) != converted.sizes.stages:
        raise UsageError(
            f"the config's {len(settings.deviations)} stages must be the model's "
            f"{converted.sizes.stages}"
        )
    if pasted and not converted.sizes.mask_dim:
        raise UsageError("--paste belongs to detectors with masks, got one without")
    detector = Detector(backbone, converted.sizes, settings, normalised, pasted)
    detector.load_state_dict(_by_stage(converted.tensors, source.kind), strict=True)
    for part in detector.modules():
        if isinstance(part, ConvModule):
            part.fuse()
    return detector


def _by_stage(tensors: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    """The tensors under the names of `Detector`, which number a single stage, too."""
    if kind == CASCADE:
        return tensors
    heads = ("roi_head.bbox_head.", "roi_head.mask_head.")
    renamed = {}
    for name, tensor in tensors.items():
        for head in heads:
            if name.startswith(head):
                name = f"{head}0.{name.removeprefix(head)}"
        renamed[name] = tensor
    return renamed
