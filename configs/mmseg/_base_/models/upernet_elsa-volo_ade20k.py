# The UPerNet of ELSA-Swin with ELSA-VOLO-D1, on a pyramid at strides 4, 8, 16, 32 that is a design
# of this project: the head pools the coarsest map. The stem's batch norms stay in evaluation mode,
# as 2 images on a GPU are too few for them. Nothing was published of ELSA-VOLO in segmentation: it
# is reconstructed, its recipe is ELSA-Swin's with evaluation on whole images, and its drop path is
# that of VOLO's classifiers. Test images are padded to multiples of the coarsest stride, which all
# maps then cover.
_base_ = ["upernet_elsa-swin_ade20k.py"]

model = dict(
    data_preprocessor=dict(test_cfg=dict(size_divisor=32)),
    backbone=dict(
        _delete_=True,
        type="ELSAVolo",
        arch="volo_d1",
        drop_path_rate=0.1,
        pyramid=True,
        norm_eval=True,
    ),
    decode_head=dict(in_channels=[96, 192, 384, 384]),
    auxiliary_head=dict(in_channels=384),
)
