# Parts of parameters' names that no schedule decays: the backbones' norms, of which those of
# ELSA-VOLO's stem are not called so, and its position embedding. Ghost filters are decayed.
undecayed = {
    name: dict(decay_mult=0.0)
    for name in ("norm", "pos_embed", *(f"patch_embed.conv.{index}." for index in (1, 4, 7)))
}
