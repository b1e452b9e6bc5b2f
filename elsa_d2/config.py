"""The config keys that this package adds to Detectron2's."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import META_ARCH_REGISTRY, SemanticSegmentor

from elsa_core.ema import DECAY, WARMUP
from elsa_core.runtime.configs import find_config
from elsa_core.runtime.errors import UsageError, one_line
from elsa_core.runtime.finite import MAX_NONFINITE
from elsa_core.runtime.trackers import PROJECT
from elsa_core.variants import Arch, VoloArch
from elsa_d2.solver.optimizer import UNDECAYED

CUSTOM = "custom"
# The nodes of MODEL that describe a backbone, and the class of its architectures.
BACKBONES: dict[str, type[Arch | VoloArch]] = {"ELSA_SWIN": Arch, "ELSA_VOLO": VoloArch}
_PACKAGE = Path(__file__).resolve().parent


def add_elsa_swin_config(cfg: CfgNode) -> None:
    """Adds MODEL.ELSA_SWIN, MODEL.ELSA_VOLO, and the keys of `Trainer` and our heads."""
    for name in BACKBONES:
        _add_backbone_config(cfg, name)
    # Stage i is called res{i+2} and has stride 2**(i+2).
    cfg.MODEL.ELSA_SWIN.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    _add_volo_config(cfg.MODEL.ELSA_VOLO)

    # "AdamW", or "SGD": Detectron2's own optimizer, which ignores the two following keys.
    cfg.SOLVER.OPTIMIZER = "AdamW"
    cfg.SOLVER.BETAS = (0.9, 0.999)
    # Parameters of the ELSA backbone whose name contains one of these are not decayed, besides
    # ELSA-VOLO's position embedding.
    cfg.SOLVER.WEIGHT_DECAY_EXEMPT = list(UNDECAYED)
    # The learning rate of each layer of the ELSA backbone is that of the next one times this.
    cfg.SOLVER.LAYER_DECAY = 1.0
    # The learning rate of the whole ELSA backbone is multiplied by this.
    cfg.SOLVER.BACKBONE_LR_FACTOR = 1.0

    # "float16", "bfloat16", or "": float16 on CUDA and bfloat16 elsewhere.
    cfg.SOLVER.AMP.DTYPE = ""

    # A training ends after this many iterations in a row with NaN or infinite losses, or steps in a
    # row that are skipped because of such gradients (see elsa_core.runtime.finite).
    cfg.SOLVER.MAX_NONFINITE = MAX_NONFINITE

    # Gradient accumulation: the model takes each batch in this many parts, one after the other, and
    # the optimizer steps once for all IMS_PER_BATCH images.
    cfg.SOLVER.ACCUMULATE_STEPS = 1
    # The batch size of BASE_LR and BASE_LR_END, which are scaled in proportion to IMS_PER_BATCH.
    # 0: they are not scaled.
    cfg.SOLVER.BASE_BATCH_SIZE = 0

    # Moving averages of the weights (elsa_core.ema.AveragedWeights), evaluated beside the weights:
    # their metrics begin with "ema/". Checkpoints have them as the model.
    cfg.MODEL.EMA = CfgNode({"ENABLED": False, "DECAY": DECAY, "WARMUP": WARMUP})

    # Of MMDetRPN: the IoU from which the best anchors of a box are positive.
    cfg.MODEL.RPN.MIN_POS_IOU = 0.3
    # Of MMDetRPN: anchors beyond the image, padded to a multiple of this many pixels, are not
    # trained. 0: all in the padding of the batch are.
    cfg.MODEL.RPN.PAD_DIVISOR = 32
    # Of each stage of ClassSpecificCascadeROIHeads.
    cfg.MODEL.ROI_BOX_CASCADE_HEAD.LOSS_WEIGHTS = (1.0, 0.5, 0.25)

    # INPUT.FORMAT may be "C5" (C1, C2, ...): the 5 channels of a TIFF or PNG, of 8 or 16 bits or
    # float, in the file's order (elsa_core.data.channels). MODEL.PIXEL_MEAN and PIXEL_STD then have
    # 5 values, and the backbone takes 5 channels.
    # What resizes images: "pil" as in Detectron2, "cv2" as in OpenMMLab.
    cfg.INPUT.RESIZE_BACKEND = "pil"
    # Applied in training with the probability PROB, before the usual resize: resize to a short edge
    # from MIN_SIZES, then crop each side to between CROP_SIZE[0] and CROP_SIZE[1] pixels.
    cfg.INPUT.MULTI_SCALE_CROP = CfgNode(
        {"ENABLED": False, "PROB": 0.5, "MIN_SIZES": (400, 500, 600), "CROP_SIZE": (384, 600)}
    )

    # A metric, such as "sem_seg/mIoU" or "bbox/AP": model_best.pth is the checkpoint of the
    # evaluation with its highest value. "": none is kept.
    cfg.TEST.BEST_METRIC = ""
    # The training ends after this many evaluations in a row in which BEST_METRIC has not risen
    # above its highest value by more than MIN_DELTA (elsa_core.runtime.patience). 0: never.
    cfg.TEST.PATIENCE = 0
    cfg.TEST.MIN_DELTA = 0.0

    # Where the scalars of metrics.json go besides: "tensorboard", "wandb", "mlflow"
    # (elsa_core.runtime.trackers), and the project there.
    cfg.LOG = CfgNode({"WRITERS": ["tensorboard"], "PROJECT": PROJECT})

    # Data sets in COCO's format to register: [name, annotation file, image folder] each.
    cfg.DATASETS.REGISTER_COCO = []
    # Training images with a shorter edge, in pixels, are left out.
    cfg.DATALOADER.MIN_IMAGE_SIZE = 0

    _add_sem_seg_config(cfg)


def _add_backbone_config(cfg: CfgNode, name: str) -> None:
    """Adds MODEL.``name`` with the keys that both families have."""
    arch = BACKBONES[name]
    node = cfg.MODEL[name] = CfgNode()
    # A variant, such as "tiny" or "volo_d1", or "custom": the architecture of CUSTOM_ARCH.
    node.ARCH = next(iter(arch.variants))
    # The fields of elsa_core.variants.Arch or VoloArch in capitals, for ARCH "custom" only; None:
    # not given.
    node.CUSTOM_ARCH = CfgNode({field.name.upper(): None for field in dataclasses.fields(arch)})
    # -1: none, 0: the patch embedding, i: also the first i stages. MODEL.BACKBONE.FREEZE_AT, which
    # freezes 2 stages of a ResNet unless told otherwise, has no effect.
    node.FROZEN_STAGES = -1
    node.DROP_PATH_RATE = 0.0
    node.DROP_RATE = 0.0
    node.ATTN_DROP_RATE = 0.0
    # Recompute the activations of the blocks in the backward pass, to save memory.
    node.WITH_CP = False
    # Deviation of the linear layers' first weights: 0.02 as published, about 0.1 for narrow models.
    node.INIT_STD = 0.02


def _add_volo_config(node: CfgNode) -> None:
    """Adds what ELSA-VOLO has besides. It is a reconstruction, without official weights."""
    # Maps res2, ..., res5 at strides 4, 8, 16, 32 for heads on a feature pyramid, a design of this
    # project; otherwise VOLO's own maps stage1, ..., stage4 at strides 8, 16, 16, 16.
    node.PYRAMID = False
    # None: all four.
    node.OUT_FEATURES = None
    # Side of the square images that the position embedding is made for; it is resized to others.
    node.IMG_SIZE = 224
    # Keep the stem's batch norms in evaluation mode, for small batches. The keys NORM of Detectron2
    # have no effect on them.
    node.NORM_EVAL = False
    # Stochastic depth in the first stage, too, which VOLO leaves out.
    node.LOCAL_DROP_PATH = False


def _add_sem_seg_config(cfg: CfgNode) -> None:
    """Adds the keys for semantic segmentation, with the values of the published recipe."""
    head = cfg.MODEL.SEM_SEG_HEAD
    # Sides of the maps that "UPerNetHead" pools the coarsest feature to.
    head.POOL_SCALES = [1, 2, 3, 6]
    # Of whole channels, before each classifier.
    head.DROPOUT = 0.1
    # The auxiliary classifier: the feature it works on ("": none), its width and loss weight.
    head.AUX_FEATURE = "res4"
    head.AUX_CONVS_DIM = 256
    head.AUX_LOSS_WEIGHT = 0.4
    # A weight for each class in the losses; empty: all are 1.
    head.CLASS_WEIGHT = []

    # Images for a SemanticSegmentor; MIN_SIZE_*, MAX_SIZE_* and CROP have no effect on them.
    node = cfg.INPUT.SEM_SEG = CfgNode()
    # Long and short side, in pixels, of the box that images are resized to fit into; in training,
    # the box is multiplied by a random factor from RATIO_RANGE.
    node.SCALE = [2048, 512]
    node.RATIO_RANGE = [0.5, 2.0]
    # Height and width of the training crops. Images that are smaller are padded to it.
    node.CROP_SIZE = [512, 512]
    # Up to 10 other crops are tried while a class covers this part of the labelled pixels or more.
    node.MAX_CATEGORY_RATIO = 0.75
    # Random brightness, contrast, saturation and hue.
    node.COLOR_AUG = True

    # Of LR_SCHEDULER_NAME "WarmupPolyLR", which falls from the first iteration on
    # and would reach BASE_LR_END in iteration MAX_ITER, the one after the last.
    cfg.SOLVER.POLY_LR_POWER = 1.0

    # The multiples of INPUT.SEM_SEG.SCALE at which a segmentor is evaluated, in training and by
    # --eval-only; the class probabilities are averaged.
    cfg.TEST.SEM_SEG_RATIOS = [1.0]

    # TEST.AUG.ENABLED also means: the mean of the class probabilities at these multiples of
    # INPUT.SEM_SEG.SCALE, with TEST.AUG.FLIP of the mirrored images too.
    cfg.TEST.AUG.RATIOS = [0.5, 0.75, 1.0, 1.25, 1.5, 1.75]

    # Data sets in ADE20K's layout to register: [name, image folder, label map folder, classes,
    # reduce_zero_label] each. The classes are a list of names or a file with one a line. With
    # reduce_zero_label, 0 stands for no class and classes begin at 1; 255 always stands for none.
    cfg.DATASETS.REGISTER_SEM_SEG = []
    # Folders in Cityscapes' layout to register: [name, folder, part, task] each; the part is that
    # of leftImg8bit/PART, the task "instance_seg" or "sem_seg".
    cfg.DATASETS.REGISTER_CITYSCAPES = []


def is_sem_seg(cfg: CfgNode) -> bool:
    """Whether MODEL.META_ARCHITECTURE is a `SemanticSegmentor`."""
    name = cfg.MODEL.META_ARCHITECTURE
    return name in META_ARCH_REGISTRY and issubclass(
        META_ARCH_REGISTRY.get(name), SemanticSegmentor
    )


def get_config_file(name: str) -> str:
    """Returns the path of a config of this package, for `load_config`.

    Args:
        name: such as "COCO-InstanceSegmentation/mask_rcnn_elsa_swin_t_fpn_1x.yaml".

    Raises UsageError if there is none of this name.
    """
    return find_config(name, _PACKAGE / "configs", _PACKAGE.parent / "configs/detectron2")


def load_config(config_file: str = "", overrides: Sequence[str] = ()) -> CfgNode:
    """Merges Detectron2's and our defaults, the keys of a file, and KEY VALUE pairs, in this order.

    Raises UsageError for a file or a pair that is not valid.
    """
    cfg = get_cfg()
    add_elsa_swin_config(cfg)
    try:
        if config_file:
            cfg.merge_from_file(config_file, allow_unsafe=False)
    except Exception as error:  # yacs and PyYAML raise a dozen kinds, all about this one file
        raise UsageError(f"config file {config_file} is not valid: {one_line(error)}") from error
    if len(overrides) % 2:
        raise UsageError(f"overrides must be pairs of KEY VALUE, got {' '.join(overrides)}")
    for key, value in zip(overrides[::2], overrides[1::2], strict=True):
        try:
            cfg.merge_from_list([key, value])
        except Exception as error:
            raise UsageError(f"{key} {value} is not valid: {one_line(error)}") from error
    return cfg


def backbone_arch(cfg: CfgNode, name: str) -> str | dict[str, Any]:
    """Returns the ``arch`` of a backbone of `elsa_core` for the ARCH and CUSTOM_ARCH of MODEL.name.

    Raises ValueError for an unknown ARCH, and for a CUSTOM_ARCH without ARCH "custom".
    """
    node, variants = cfg.MODEL[name], BACKBONES[name].variants
    custom = {name.lower(): value for name, value in node.CUSTOM_ARCH.items() if value is not None}
    if node.ARCH == CUSTOM:
        return custom
    if node.ARCH not in variants:
        raise ValueError(
            f"MODEL.{name}.ARCH must be one of {', '.join([*variants, CUSTOM])}, got {node.ARCH!r}"
        )
    if custom:
        raise ValueError(
            f"MODEL.{name}.CUSTOM_ARCH needs MODEL.{name}.ARCH {CUSTOM!r}, got {node.ARCH!r}"
        )
    return node.ARCH


def backbone_options(cfg: CfgNode, name: str) -> dict[str, Any]:
    """Returns the arguments of a backbone's constructor for the keys of MODEL.``name``."""
    values = {key.lower(): value for key, value in cfg.MODEL[name].items() if key != "CUSTOM_ARCH"}
    return {**values, "arch": backbone_arch(cfg, name)}
