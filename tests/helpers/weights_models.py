"""Checkpoints as they are met in the wild, made from nothing."""

import argparse
import math
from pathlib import Path

import numpy as np
import skimage
import torch

from elsa_core import ELSASwin
from elsa_core.layers import relative_position_id
from elsa_core.variants import Arch
from elsa_core.weights import convert, recognise
from elsa_core.weights.shapes import HeadSizes, model_shapes

PHOTOGRAPHS = Path(skimage.__file__).parent / "data"
# Kinds of models, and OpenMMLab's target for each.
MM = {"mask_rcnn": "mmdet", "cascade_mask_rcnn": "mmdet", "upernet": "mmseg"}
KINDS = tuple(MM)
TINY = Arch(
    embed_dim=12,
    depths=(1, 1, 1, 2),
    num_heads=(1, 2, 3, 4),
    group_width=4,
    kernel_size=3,
    window_size=3,
)
CLASSES = ["cat", "dog", "coffee cup", "moon", "rocket"]


def sizes(kind, channels=16, dim=16, num_classes=5):
    """Heads of the published form, of any width."""
    if kind == "upernet":
        return HeadSizes(
            num_classes=num_classes,
            channels=channels,
            pool_modules=4,
            aux_channels=dim,
            aux_stage=2,
        )
    common = dict(
        num_classes=num_classes,
        channels=channels,
        anchors=3,
        fc_dim=4 * dim,
        mask_convs=4,
        mask_dim=dim,
    )
    if kind == "mask_rcnn":
        return HeadSizes(box_fcs=2, **common)
    return HeadSizes(box_fcs=1, box_convs=4, box_conv_dim=dim, stages=3, **common)


def published_sizes(kind):
    if kind == "upernet":
        return sizes(kind, channels=512, dim=256, num_classes=150)
    return sizes(kind, channels=256, dim=256, num_classes=80)


def fill(shapes, seed=0):
    """Tensors of all shapes, no two alike; those of large models repeat a number for each index of
    the first dimension, and so take no memory."""
    generator = torch.Generator().manual_seed(seed)
    large = sum(math.prod(shape) for shape in shapes.values()) > 10**7
    tensors = {}
    for index, (name, shape) in enumerate(shapes.items()):
        if name.endswith("num_batches_tracked"):
            tensors[name] = torch.tensor(index)
        elif large:
            rows = torch.arange(shape[0]) + 10**4 * index + 10**7 * seed
            rows = rows.double().reshape(-1, *[1] * (len(shape) - 1))
            tensors[name] = rows.expand(shape)
        else:
            tensors[name] = torch.rand(shape, generator=generator) + 0.1
    return tensors


def detector(kind, arch=TINY, wanted=None):
    """A state dict with OpenMMLab's names."""
    return fill(model_shapes(arch, wanted or sizes(kind), kind))


def with_bookkeeping(tensors, arch=TINY, prefix="backbone."):
    """As the original saves it: the buffers that follow from the architecture, too."""
    stage = len(arch.depths) - 1
    extra = {}
    for block in range(arch.depths[stage]):
        name = f"{prefix}layers.{stage}.blocks.{block}.attn.relative_id"
        extra[name] = relative_position_id(arch.window_size)
    return {**tensors, **extra}


def original(kind, arch=TINY, wrapped=False):
    """A file of the original's detection or segmentation training, with all extras."""
    tensors = with_bookkeeping(detector(kind, arch), arch)
    if wrapped:
        tensors = {f"module.{name}": tensor for name, tensor in tensors.items()}
    return {
        "meta": {
            "epoch": 12,
            "iter": np.int64(87948),
            "mmdet_version": "2.11.0",
            "hook_msgs": {"best_score": np.float64(0.457)},
            "CLASSES": tuple(CLASSES),
        },
        "state_dict": tensors,
        "optimizer": {"state": {0: {"step": 3, "exp_avg": torch.ones(2)}}, "param_groups": []},
        "amp": {"loss_scaler0": {"loss_scale": 65536.0, "unskipped": 11}},
    }


def classifier_tensors(arch=TINY, seed=0, num_classes=10):
    with torch.device("meta"):
        backbone = ELSASwin(arch, out_indices=range(len(arch.depths))).state_dict()
    shapes = {name: value.shape for name, value in backbone.items() if name[:4] != "norm"}
    dim = arch.num_features[-1]
    shapes |= {"norm.weight": (dim,), "norm.bias": (dim,)}
    shapes |= {"head.weight": (num_classes, dim), "head.bias": (num_classes,)}
    return with_bookkeeping(fill(shapes, seed), arch, prefix="")


def classification(arch=TINY, wrapped=False):
    """A file of the original's ImageNet training: timm's container, a pickled Namespace, EMA."""

    def wrap(tensors):
        return {f"module.{name}": t for name, t in tensors.items()} if wrapped else tensors

    return {
        "epoch": 297,
        "arch": "elsa_swin",
        "state_dict": wrap(classifier_tensors(arch)),
        "state_dict_ema": wrap(classifier_tensors(arch, seed=1)),
        "args": argparse.Namespace(lr=1e-3, data="/imagenet", mean=(0.485, 0.456, 0.406)),
        "optimizer": {"state": {}, "param_groups": [{"lr": np.float32(1e-5)}]},
        "metric": np.float64(82.7),
        "version": 2,
    }


def swin(mm=False, arch=None):
    """An ImageNet state dict of stock Swin with public names, or with OpenMMLab's."""
    arch = arch or Arch(24, (1, 1, 2, 1), (1, 2, 3, 4), group_width=8)
    shapes = {"patch_embed.proj.weight": (arch.embed_dim, 3, 4, 4)}
    for leaf in ("proj.bias", "norm.weight", "norm.bias"):
        shapes[f"patch_embed.{leaf}"] = (arch.embed_dim,)
    for stage, dim in enumerate(arch.num_features):
        for block in range(arch.depths[stage]):
            name = f"layers.{stage}.blocks.{block}."
            for norm in ("norm1", "norm2"):
                shapes[f"{name}{norm}.weight"] = shapes[f"{name}{norm}.bias"] = (dim,)
            linear = {"attn.qkv": (3 * dim, dim), "attn.proj": (dim, dim)}
            linear |= {"mlp.fc1": (4 * dim, dim), "mlp.fc2": (dim, 4 * dim)}
            for layer, shape in linear.items():
                shapes[f"{name}{layer}.weight"], shapes[f"{name}{layer}.bias"] = shape, shape[:1]
            table = ((2 * arch.window_size - 1) ** 2, arch.num_heads[stage])
            shapes[f"{name}attn.relative_position_bias_table"] = table
        if stage < len(arch.depths) - 1:
            name = f"layers.{stage}.downsample."
            shapes[f"{name}norm.weight"] = shapes[f"{name}norm.bias"] = (4 * dim,)
            shapes[f"{name}reduction.weight"] = (2 * dim, 4 * dim)
    shapes |= {"norm.weight": (dim,), "norm.bias": (dim,), "head.weight": (10, dim)}
    tensors = fill(shapes | {"head.bias": (10,)})
    index = torch.zeros(arch.window_size**2, arch.window_size**2).long()
    tensors["layers.0.blocks.0.attn.relative_position_index"] = index
    if not mm:
        return tensors
    names = {
        "layers.": "stages.",
        ".attn.": ".attn.w_msa.",
        "patch_embed.proj": "patch_embed.projection",
    }
    names |= {"mlp.fc1": "ffn.layers.0.0", "mlp.fc2": "ffn.layers.1"}
    renamed = {}
    for name, tensor in tensors.items():
        for old, new in names.items():
            name = name.replace(old, new) if "ffn" not in name else name
        renamed[name] = tensor
    return renamed


def save(folder, checkpoint, name="source.pth", **options):
    path = folder / name
    torch.save(checkpoint, path, **options)
    return path


def same(left, right):
    """Equal bit for bit: names, types, shapes, values."""
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name])
        for name in left
    )


def converted(checkpoint, to, **options):
    """Returns the tensors of a checkpoint for the target ``to``."""
    return convert(recognise(checkpoint), to, **options).tensors
