"""Our config of each kind of model, in Detectron2 and in OpenMMLab."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from elsa_core.runtime.errors import UsageError, one_line
from elsa_core.weights.names import CASCADE, MASK_RCNN, UPERNET
from elsa_core.weights.shapes import Backbone, HeadSizes, output_dims
from elsa_core.weights.volo import Volo

DETECTRON2 = {
    MASK_RCNN: "COCO-InstanceSegmentation/mask_rcnn_elsa_swin_t_fpn_1x.yaml",
    CASCADE: "COCO-InstanceSegmentation/cascade_mask_rcnn_elsa_swin_t_fpn_1x.yaml",
    UPERNET: "ADE20K-SemanticSegmentation/upernet_elsa_swin_t_160k.yaml",
}
OPENMMLAB = {
    MASK_RCNN: "mmdet/elsa_swin/mask-rcnn_elsa-swin-t-p4-w7_fpn_amp-ms-crop-1x_coco.py",
    CASCADE: "mmdet/elsa_swin/"
    "cascade-mask-rcnn_elsa-swin-t-p4-w7_fpn_4conv1fc-giou_amp-ms-crop-1x_coco.py",
    UPERNET: "mmseg/elsa_swin/"
    "elsa-swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py",
}


def check_sizes(sizes: HeadSizes, kind: str) -> None:
    """Raises UsageError for what our configs cannot take from the tensors."""
    if kind == UPERNET and sizes.pool_modules != 4:
        raise UsageError(
            f"--verify needs --config for {sizes.pool_modules} pooled maps, whose sides are not in "
            "the tensors"
        )
    if kind != UPERNET and sizes.anchors != 3:
        raise UsageError(
            f"--verify needs --config twice for {sizes.anchors} anchors at a position, whose sizes "
            "are not in the tensors"
        )
    if kind == CASCADE and sizes.stages != 3:
        raise UsageError(f"--verify needs --config twice for {sizes.stages} stages")


def check_heads(volo: Volo) -> None:
    """Raises UsageError for an ELSA-VOLO of which the tensors do not tell how to build it."""
    if volo.unknown_heads:
        raise UsageError(
            "--verify needs --config twice for an ELSA-VOLO of other sizes than D1 to D5: the "
            "heads of the global stages are not in the tensors"
        )


def output_names(backbone: Backbone) -> list[str]:
    """The names of the backbone's outputs in Detectron2."""
    if isinstance(backbone, Volo) and not backbone.pyramid:
        return [f"stage{index + 1}" for index in range(4)]
    return [f"res{index + 2}" for index in range(len(output_dims(backbone)))]


def load_strictly(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Raises UsageError for missing or unknown tensors and for other shapes."""
    try:
        model.load_state_dict(dict(tensors), strict=True)
    except RuntimeError as error:
        raise UsageError(
            f"the config does not match the tensors: {one_line(error)[:400]}"
        ) from error
