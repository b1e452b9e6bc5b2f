# VOLO's schedule is ELSA-Swin's without clipping; 1e-3 is the rate of D2 and D3. The position
# embedding and the class token are not decayed either.
_base_ = ["adamw_300e.py"]

optim_wrapper = dict(
    clip_grad=None,
    paramwise_cfg=dict(
        custom_keys={"pos_embed": dict(decay_mult=0.0), "cls_token": dict(decay_mult=0.0)}
    ),
)
