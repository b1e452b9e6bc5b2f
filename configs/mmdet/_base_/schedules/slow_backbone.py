# Mask2Former's rule for Swin in ELSA-Swin's names, up to 18 blocks a stage: a tenth of the rate,
# no decay of norms and position biases. Of the keys in a name, MMEngine takes the longest.
undecayed_tenth = dict(lr_mult=0.1, decay_mult=0.0)
slow_backbone = dict(
    {
        f"backbone.{part}": undecayed_tenth
        for part in (
            "patch_embed.norm",
            "norm",
            *(f"layers.{stage}.downsample.norm" for stage in range(3)),
            *(
                f"layers.{stage}.blocks.{block}.{name}"
                for stage in range(4)
                for block in range(18)
                for name in ("norm", "attn.rb")
            ),
        )
    },
    backbone=dict(lr_mult=0.1),
)
