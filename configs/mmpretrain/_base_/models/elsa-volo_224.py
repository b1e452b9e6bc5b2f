# MMPretrain's classifier with ELSA-VOLO-D1, class attention and a classifier of the patch tokens
# (weight 0.5), label smoothing 0.1, and MixToken in place of mixup and CutMix: VOLO's recipe
# (arXiv 2106.13112), which the paper of ELSA keeps. ELSA-VOLO is reconstructed and has no official
# weights. VOLO trained with token labels, which elsa_mm.volo_head takes but nothing here reads.
custom_imports = dict(imports=["elsa_mm"])

model = dict(
    type="ImageClassifier",
    backbone=dict(type="ELSAVoloTokens", arch="volo_d1", drop_path_rate=0.1),
    head=dict(
        type="elsa_mm.volo_head.VoloHead",
        num_classes=1000,
        in_channels=384,
        aux_loss_weight=0.5,
        loss=dict(type="LabelSmoothLoss", label_smooth_val=0.1, mode="original"),
    ),
)
