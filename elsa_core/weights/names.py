"""Tensor names in Detectron2 and in OpenMMLab.

The original release (mmdet 2.x, mmseg 0.x) uses OpenMMLab's names, and so does this package
internally. Each rule names one layer on both sides. ``{}`` stands for an index, which may start at
another number in Detectron2.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

_Value = TypeVar("_Value")

MASK_RCNN, CASCADE, UPERNET = "mask_rcnn", "cascade_mask_rcnn", "upernet"
D2_BACKBONES = {
    MASK_RCNN: "backbone.bottom_up.",
    CASCADE: "backbone.bottom_up.",
    UPERNET: "backbone.",
}


@dataclass(frozen=True)
class Rule:
    """One layer, named ``d2`` in Detectron2 and ``mm`` in OpenMMLab.

    ``offsets``: added to OpenMMLab's indices to get Detectron2's.

    ``block``: a convolution that may have a norm. OpenMMLab keeps both in a ConvModule
    (``.conv.weight``, ``.bn.weight``), Detectron2 keeps the norm in the convolution
    (``.weight``, ``.norm.weight``).
    """

    d2: str
    mm: str
    offsets: tuple[int, ...] = ()
    block: bool = False

    @cached_property
    def patterns(self) -> dict[str, re.Pattern]:
        index = r"(\d{1,3})"
        return {
            side: re.compile(re.escape(getattr(self, side)).replace(r"\{\}", index) + r"\.(.+)")
            for side in ("d2", "mm")
        }

    def translate(self, name: str, to: str, has_statistics: Callable[[str], bool]) -> str | None:
        """Return the name on the side ``to``, or None if the rule is for another layer."""
        match = self.patterns["mm" if to == "d2" else "d2"].fullmatch(name)
        if not match:
            return None
        *indices, leaf = match.groups()
        sign = 1 if to == "d2" else -1
        numbers = [
            int(index) + sign * offset for index, offset in zip(indices, self.offsets, strict=True)
        ]
        if min(numbers, default=0) < 0:
            return None
        if self.block:
            stem = name.removesuffix(leaf)
            leaf = _to_d2(leaf) if to == "d2" else _to_mm(leaf, has_statistics(stem))
        return leaf and f"{getattr(self, to).format(*numbers)}.{leaf}"


def _to_d2(leaf: str) -> str:
    kind, _, rest = leaf.partition(".")
    return {"conv": "", "bn": "norm.", "gn": "norm."}.get(kind, f"{kind}.") + rest if rest else ""


def _to_mm(leaf: str, has_statistics: bool) -> str:
    if leaf.startswith("norm."):
        return ("bn." if has_statistics else "gn.") + leaf.removeprefix("norm.")
    return f"conv.{leaf}" if leaf in ("weight", "bias") else ""


_FPN = (
    Rule("backbone.bottom_up", "backbone"),
    Rule("backbone.fpn_lateral{}", "neck.lateral_convs.{}", (2,), block=True),
    Rule("backbone.fpn_output{}", "neck.fpn_convs.{}", (2,), block=True),
    Rule("proposal_generator.rpn_head.conv", "rpn_head.rpn_conv"),
    Rule("proposal_generator.rpn_head.objectness_logits", "rpn_head.rpn_cls"),
    Rule("proposal_generator.rpn_head.anchor_deltas", "rpn_head.rpn_reg"),
)
RULES: dict[str, tuple[Rule, ...]] = {
    MASK_RCNN: (
        *_FPN,
        Rule("roi_heads.box_head.fc{}", "roi_head.bbox_head.shared_fcs.{}", (1,)),
        Rule("roi_heads.box_predictor.cls_score", "roi_head.bbox_head.fc_cls"),
        Rule("roi_heads.box_predictor.bbox_pred", "roi_head.bbox_head.fc_reg"),
        Rule("roi_heads.mask_head.mask_fcn{}", "roi_head.mask_head.convs.{}", (1,), block=True),
        Rule("roi_heads.mask_head.deconv", "roi_head.mask_head.upsample"),
        Rule("roi_heads.mask_head.predictor", "roi_head.mask_head.conv_logits"),
    ),
    CASCADE: (
        *_FPN,
        Rule(
            "roi_heads.box_head.{}.conv{}",
            "roi_head.bbox_head.{}.shared_convs.{}",
            (0, 1),
            block=True,
        ),
        Rule("roi_heads.box_head.{}.fc{}", "roi_head.bbox_head.{}.shared_fcs.{}", (0, 1)),
        Rule("roi_heads.box_predictor.{}.cls_score", "roi_head.bbox_head.{}.fc_cls", (0,)),
        Rule("roi_heads.box_predictor.{}.bbox_pred", "roi_head.bbox_head.{}.fc_reg", (0,)),
        Rule(
            "roi_heads.mask_head.{}.mask_fcn{}",
            "roi_head.mask_head.{}.convs.{}",
            (0, 1),
            block=True,
        ),
        Rule("roi_heads.mask_head.{}.deconv", "roi_head.mask_head.{}.upsample", (0,)),
        Rule("roi_heads.mask_head.{}.predictor", "roi_head.mask_head.{}.conv_logits", (0,)),
    ),
    UPERNET: (
        Rule("backbone", "backbone"),
        Rule("sem_seg_head.psp{}", "decode_head.psp_modules.{}.1", (0,), block=True),
        Rule("sem_seg_head.psp_bottleneck", "decode_head.bottleneck", block=True),
        Rule("sem_seg_head.lateral{}", "decode_head.lateral_convs.{}", (2,), block=True),
        Rule("sem_seg_head.fpn_output{}", "decode_head.fpn_convs.{}", (2,), block=True),
        Rule("sem_seg_head.fpn_bottleneck", "decode_head.fpn_bottleneck", block=True),
        Rule("sem_seg_head.predictor", "decode_head.conv_seg"),
        Rule("sem_seg_head.aux_conv", "auxiliary_head.convs.0", block=True),
        Rule("sem_seg_head.aux_predictor", "auxiliary_head.conv_seg"),
    ),
}


def rename(
    tensors: Mapping[str, _Value], kind: str, to: str
) -> tuple[dict[str, tuple[str, _Value]], list[str]]:
    """Rename the tensors of a whole model of ``kind`` for the side ``to``, "d2" or "mm".

    Returns {new name: (old name, value)} in the order of ``tensors``, and the names that no rule
    matches. A norm with running statistics is batch norm, any other is group norm.
    """

    def has_statistics(stem: str) -> bool:
        return f"{stem}norm.running_mean" in tensors

    renamed, unknown = {}, []
    for name, value in tensors.items():
        for rule in RULES[kind]:
            if new := rule.translate(name, to, has_statistics):
                renamed[new] = (name, value)
                break
        else:
            unknown.append(name)
    return renamed, unknown
