"""A converted model in MMDetection or MMSegmentation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from mmengine.config import Config, ConfigDict
from mmengine.model.utils import revert_sync_batchnorm
from mmengine.registry import MODELS, DefaultScope
from torch import Tensor, nn

import elsa_mm
from elsa_core.weights.convert import Conversion
from elsa_core.weights.names import UPERNET
from elsa_core.weights.shapes import Backbone, HeadSizes, arch_name, arch_of, output_dims
from elsa_core.weights.volo import Volo
from elsa_tools.predict.mm import read_config

from . import configs
from .compare import Outcome


def run(
    conversion: Conversion,
    tensors: Mapping[str, Tensor],
    image: Tensor,
    config: str | None = None,
) -> Outcome:
    """The whole test pipeline of MMDetection or MMSegmentation on a CPU, from the image file on.

    Raises UsageError for a config that does not match the tensors.
    """
    kind = conversion.source.kind
    cfg = read_config(config or elsa_mm.get_config_file(configs.OPENMMLAB[kind]))
    if config is None:
        assert conversion.sizes is not None
        set_sizes(cfg.model, conversion.source.backbone, conversion.sizes, kind)
    scope = "mmseg" if kind == UPERNET else "mmdet"
    with DefaultScope.overwrite_default_scope(scope):
        return _run(cfg, kind, tensors, image)


def _run(cfg: Config, kind: str, tensors: Mapping[str, Tensor], image: Tensor) -> Outcome:
    model = revert_sync_batchnorm(MODELS.build(cfg.model)).eval()
    configs.load_strictly(model, tensors)
    model.cfg = cfg
    seen: dict[str, Any] = {}
    last = model.neck if kind != UPERNET else model.backbone
    last.register_forward_hook(lambda _, __, out: seen.update(features=out))
    if kind == UPERNET:
        from mmseg.apis import inference_model

        result = inference_model(model, image.numpy())
        names = [f"res{stage + 2}" for stage in range(len(seen["features"]))]
        features = {n: m[0] for n, m in zip(names, seen["features"], strict=True)}
        return Outcome(features, logits=result.seg_logits.data)
    from mmdet.apis import inference_detector

    extractor = model.roi_head.bbox_roi_extractor
    first = extractor[0] if isinstance(extractor, nn.ModuleList) else extractor

    def remember(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        seen.setdefault("rois", inputs[1])  # [N, 5]: image, x1, y1, x2, y2

    first.register_forward_pre_hook(remember)
    found = inference_detector(model, image.numpy()).pred_instances
    names = [f"p{level + 2}" for level in range(len(seen["features"]))]
    return Outcome(
        {n: m[0] for n, m in zip(names, seen["features"], strict=True)},
        proposals=seen.get("rois", torch.zeros(0, 5))[:, 1:],
        boxes=found.bboxes,
        scores=found.scores,
        labels=found.labels,
        masks=found.get("masks"),
    )


def set_sizes(model: ConfigDict, backbone: Backbone, sizes: HeadSizes, kind: str) -> None:
    """Gives our configs the backbone and the sizes of a checkpoint, in place."""
    configs.check_sizes(sizes, kind)
    arch, dims = arch_of(backbone), output_dims(backbone)
    name = arch_name(arch)
    if isinstance(backbone, Volo):
        configs.check_heads(backbone)
        model.backbone = ConfigDict(type="ELSAVolo", **backbone.options)
        if kind == UPERNET:  # detectors pad images anyway
            model.data_preprocessor.test_cfg = dict(size_divisor=32 if backbone.pyramid else 16)
    model.backbone.arch = asdict(arch) if name == "custom" else name
    if kind == UPERNET:
        classes = dict(num_classes=sizes.num_classes)
        model.decode_head.update(classes, in_channels=dims, channels=sizes.channels)
        if sizes.aux_stage is None:
            model.auxiliary_head = None
        else:
            model.auxiliary_head.update(
                classes,
                in_channels=dims[sizes.aux_stage],
                in_index=sizes.aux_stage,
                channels=sizes.aux_channels,
            )
        return
    channels = sizes.channels
    norms = {"": None, "gn": dict(type="GN", num_groups=32), "bn": dict(type="BN")}
    model.neck.update(in_channels=dims, out_channels=channels, norm_cfg=norms[sizes.neck_norm])
    model.rpn_head.update(in_channels=channels, feat_channels=channels)
    head = model.roi_head
    head.bbox_roi_extractor.out_channels = channels
    for box_head in [head.bbox_head] if isinstance(head.bbox_head, dict) else head.bbox_head:
        box_head.update(
            in_channels=channels, fc_out_channels=sizes.fc_dim, num_classes=sizes.num_classes
        )
        if sizes.box_convs:
            box_head.update(
                conv_out_channels=sizes.box_conv_dim,
                num_shared_convs=sizes.box_convs,
                num_shared_fcs=sizes.box_fcs,
            )
    if sizes.mask_dim is None:
        head.mask_roi_extractor = head.mask_head = None
        return
    head.mask_roi_extractor.out_channels = channels
    head.mask_head.update(
        in_channels=channels,
        conv_out_channels=sizes.mask_dim,
        num_convs=sizes.mask_convs,
        num_classes=sizes.num_classes,
    )
