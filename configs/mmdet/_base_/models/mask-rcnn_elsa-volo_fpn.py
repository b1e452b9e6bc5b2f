# The Mask R-CNN of ELSA-Swin with ELSA-VOLO-D1, on a pyramid at strides 4, 8, 16, 32 that is a
# design of this project. The stem's batch norms stay in evaluation mode, as 2 images on a GPU are
# too few for them. Nothing was published of ELSA-VOLO as a detector's backbone: it is
# reconstructed, and its drop path is that of VOLO's classifiers.
_base_ = ["mask-rcnn_elsa-swin_fpn.py"]

model = dict(
    backbone=dict(
        _delete_=True,
        type="ELSAVolo",
        arch="volo_d1",
        drop_path_rate=0.1,
        pyramid=True,
        norm_eval=True,
    ),
    neck=dict(in_channels=[96, 192, 384, 384]),
)
