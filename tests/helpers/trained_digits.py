"""A trained Mask R-CNN of the digits.

It was trained by `tools/train_net.py` on the digits data set (`make_digits.py`) with `ARCH`,
SOLVER.MAX_ITER 1600, SOLVER.BASE_LR 0.002 and INPUT.RESIZE_BACKEND cv2, to box AP 59.0 and mask AP
62.3; its numbers are float16.
"""

from pathlib import Path

CHECKPOINT = Path(__file__).parents[1] / "data/digits_mask_rcnn.safetensors"
WIDTH = 32
ARCH = {
    "MODEL.ELSA_SWIN.CUSTOM_ARCH.EMBED_DIM": 16,
    "MODEL.ELSA_SWIN.CUSTOM_ARCH.DEPTHS": [1, 1, 1, 1],
    "MODEL.FPN.OUT_CHANNELS": WIDTH,
    "MODEL.ROI_BOX_HEAD.FC_DIM": WIDTH,
    "MODEL.ROI_MASK_HEAD.CONV_DIM": WIDTH,
}
