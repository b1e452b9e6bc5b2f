# MMDetection's Cityscapes instances, evaluated as COCO's and by cityscapesscripts. Its files go to
# a temporary folder, since runs would take each other's in a common one.
_base_ = ["mmdet::_base_/datasets/cityscapes_instance.py"]

by_name = "elsa_mm.coco.CityscapesDataset"
train_dataloader = dict(dataset=dict(dataset=dict(type=by_name)))
val_dataloader = dict(dataset=dict(type=by_name))
test_dataloader = val_dataloader
val_evaluator = [
    dict(
        type="elsa_mm.coco_metric.CocoMetric",
        ann_file="data/cityscapes/annotations/instancesonly_filtered_gtFine_val.json",
        metric=["bbox", "segm"],
    ),
    dict(
        type="elsa_mm.cityscapes_instance.CityscapesInstanceScores",
        seg_prefix="data/cityscapes/gtFine/val",
        outfile_prefix=None,
    ),
]
test_evaluator = val_evaluator
