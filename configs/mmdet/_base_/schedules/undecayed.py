# Parts of parameters' names that no schedule decays: the backbones' norms, of which those of
# ELSA-VOLO's stem are not called so. Ghost filters are decayed; of ELSA-VOLO's position embedding,
# which is not, ELSAOptimWrapperConstructor knows.
undecayed = {
    name: dict(decay_mult=0.0)
    for name in ("norm", *(f"patch_embed.conv.{index}." for index in (1, 4, 7)))
}
