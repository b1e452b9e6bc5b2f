# MMDetection's Cascade Mask R-CNN with ELSA-Swin-T and the original's box heads: 4 convolutions and
# 1 fully connected layer, class-specific regression, GIoU of the decoded boxes. Stage
# weights, thresholds and the RPN's Smooth L1 are those of MMDetection's base. Parts of elsa_mm
# compute boxes and RoIs in float32, in mixed precision too, and initialise the mask heads.
_base_ = ["mmdet::_base_/models/cascade-mask-rcnn_r50_fpn.py"]

custom_imports = dict(imports=["elsa_mm"])

bbox_head = dict(
    type="elsa_mm.detection.Float32BBoxHead",
    num_shared_convs=4,
    num_shared_fcs=1,
    in_channels=256,
    conv_out_channels=256,
    fc_out_channels=1024,
    roi_feat_size=7,
    num_classes=80,
    norm_cfg=dict(type="SyncBN", requires_grad=True),
    reg_class_agnostic=False,
    reg_decoded_bbox=True,
    loss_cls=dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=1.0),
    loss_bbox=dict(type="GIoULoss", loss_weight=10.0),
)

model = dict(
    backbone=dict(_delete_=True, type="ELSASwin", arch="tiny", drop_path_rate=0.0),
    neck=dict(in_channels=[96, 192, 384, 768]),
    rpn_head=dict(type="elsa_mm.detection.Float32RPNHead"),
    roi_head=dict(
        type="elsa_mm.detection.InitializedCascadeRoIHead",
        bbox_roi_extractor=dict(type="elsa_mm.detection.Float32RoIExtractor"),
        mask_roi_extractor=dict(type="elsa_mm.detection.Float32RoIExtractor"),
        mask_head=dict(type="elsa_mm.detection.FastMaskHead"),
        bbox_head=[
            dict(
                bbox_head,
                bbox_coder=dict(
                    type="DeltaXYWHBBoxCoder",
                    target_means=[0.0, 0.0, 0.0, 0.0],
                    target_stds=[centre, centre, size, size],
                ),
            )
            for centre, size in [(0.1, 0.2), (0.05, 0.1), (0.033, 0.067)]
        ],
    ),
)
