# MMDetection's Mask R-CNN with ELSA-Swin-T; channels of the neck are the backbone's. Parts of
# elsa_mm compute boxes and RoIs in float32, in mixed precision too.
_base_ = ["mmdet::_base_/models/mask-rcnn_r50_fpn.py"]

custom_imports = dict(imports=["elsa_mm"])

model = dict(
    backbone=dict(_delete_=True, type="ELSASwin", arch="tiny", drop_path_rate=0.1),
    neck=dict(in_channels=[96, 192, 384, 768]),
    rpn_head=dict(type="elsa_mm.detection.Float32RPNHead"),
    roi_head=dict(
        bbox_roi_extractor=dict(type="elsa_mm.detection.Float32RoIExtractor"),
        bbox_head=dict(type="elsa_mm.detection.Float32BBoxHead", num_shared_fcs=2),
        mask_roi_extractor=dict(type="elsa_mm.detection.Float32RoIExtractor"),
        mask_head=dict(type="elsa_mm.detection.FastMaskHead"),
    ),
)
