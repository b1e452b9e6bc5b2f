"""The config keys for semantic segmentation, with the published recipe's values."""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY, SemanticSegmentor


def add_semantic_config(cfg: CfgNode) -> None:
    """Adds to MODEL.SEM_SEG_HEAD, INPUT, SOLVER, TEST and DATASETS."""
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
    # Long and short side, in pixels, of the box that an image is enlarged or reduced to fit into,
    # and in training the range of the factor that is drawn for the box.
    node.SCALE = [2048, 512]
    node.RATIO_RANGE = [0.5, 2.0]
    # Height and width of the training crops. Images that are smaller are padded to it.
    node.CROP_SIZE = [512, 512]
    # Other crops are tried, 10 at most, while one class has this part of the labelled pixels.
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


def is_semantic(cfg: CfgNode) -> bool:
    """Whether MODEL.META_ARCHITECTURE is a `SemanticSegmentor`."""
    name = cfg.MODEL.META_ARCHITECTURE
    return name in META_ARCH_REGISTRY and issubclass(
        META_ARCH_REGISTRY.get(name), SemanticSegmentor
    )
