"""A converted model in Detectron2."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from torch import Tensor

import elsa_d2
from elsa_core.weights.convert import Conversion
from elsa_core.weights.names import CASCADE, UPERNET
from elsa_core.weights.shapes import Backbone, HeadSizes, arch_name, arch_of
from elsa_core.weights.volo import Volo

from . import configs
from .compare import Outcome


def run(
    conversion: Conversion,
    tensors: Mapping[str, Tensor],
    image: Tensor,
    config: str | None = None,
) -> Outcome:
    """The whole test pipeline of Detectron2 on a CPU, from the image file on.

    Raises UsageError for a config that does not match the tensors.
    """
    source = conversion.source
    cfg = elsa_d2.load_config(config or elsa_d2.get_config_file(configs.DETECTRON2[source.kind]))
    if config is None:
        assert conversion.sizes is not None
        cfg.merge_from_list(overrides(source.backbone, conversion.sizes, source.kind))
    cfg.MODEL.WEIGHTS, cfg.MODEL.DEVICE = "", "cpu"
    predictor = elsa_d2.Predictor(cfg)
    configs.load_strictly(predictor.model, tensors)
    seen: dict[str, Any] = {}
    model = predictor.model
    model.backbone.register_forward_hook(lambda _, __, out: seen.update(features=out))
    if source.kind != UPERNET:
        model.proposal_generator.register_forward_hook(
            lambda _, __, out: seen.update(proposals=out[0][0].proposal_boxes.tensor)
        )
    result = predictor(image.numpy())
    outcome = Outcome({name: value[0] for name, value in seen["features"].items()})
    if source.kind == UPERNET:
        outcome.logits = result["sem_seg"]
        return outcome
    found = result["instances"]
    outcome.proposals = seen["proposals"]
    outcome.boxes, outcome.scores = found.pred_boxes.tensor, found.scores
    outcome.labels = found.pred_classes
    outcome.masks = found.pred_masks if found.has("pred_masks") else None
    return outcome


def overrides(backbone: Backbone, sizes: HeadSizes, kind: str) -> list[Any]:
    """Config keys that give our configs the backbone and the sizes of a checkpoint."""
    configs.check_sizes(sizes, kind)
    volo = backbone if isinstance(backbone, Volo) else None
    features = configs.output_names(backbone)
    arch = arch_of(backbone)
    node = "MODEL.ELSA_VOLO" if volo else "MODEL.ELSA_SWIN"
    keys: dict[str, Any] = {f"{node}.ARCH": arch_name(arch)}
    if arch_name(arch) == "custom":
        for name, value in asdict(arch).items():
            keys[f"{node}.CUSTOM_ARCH.{name.upper()}"] = value
    if volo:
        configs.check_heads(volo)
        builder = "build_elsa_volo_backbone" if kind == UPERNET else "build_elsa_volo_fpn_backbone"
        keys["MODEL.BACKBONE.NAME"] = builder
        keys[f"{node}.PYRAMID"], keys[f"{node}.IMG_SIZE"] = bool(volo.pyramid), volo.img_size
    if kind == UPERNET:
        keys["MODEL.SEM_SEG_HEAD.NUM_CLASSES"] = sizes.num_classes
        keys["MODEL.SEM_SEG_HEAD.CONVS_DIM"] = sizes.channels
        stage = sizes.aux_stage
        keys["MODEL.SEM_SEG_HEAD.IN_FEATURES"] = features
        keys["MODEL.SEM_SEG_HEAD.AUX_FEATURE"] = "" if stage is None else features[stage]
        if sizes.aux_channels is not None:
            keys["MODEL.SEM_SEG_HEAD.AUX_CONVS_DIM"] = sizes.aux_channels
    else:
        keys["MODEL.ROI_HEADS.NUM_CLASSES"] = sizes.num_classes
        keys["MODEL.FPN.OUT_CHANNELS"] = sizes.channels
        keys["MODEL.FPN.NORM"] = {"": "", "gn": "GN", "bn": "BN"}[sizes.neck_norm]
        keys["MODEL.ROI_BOX_HEAD.NUM_FC"] = sizes.box_fcs
        keys["MODEL.ROI_BOX_HEAD.FC_DIM"] = sizes.fc_dim
        keys["MODEL.ROI_BOX_HEAD.NUM_CONV"] = sizes.box_convs
        if kind == CASCADE and sizes.box_conv_dim is not None:
            keys["MODEL.ROI_BOX_HEAD.CONV_DIM"] = sizes.box_conv_dim
        keys["MODEL.MASK_ON"] = sizes.mask_dim is not None
        if sizes.mask_dim is not None:
            keys["MODEL.ROI_MASK_HEAD.NUM_CONV"] = sizes.mask_convs
            keys["MODEL.ROI_MASK_HEAD.CONV_DIM"] = sizes.mask_dim
    return [part for pair in keys.items() for part in pair]
