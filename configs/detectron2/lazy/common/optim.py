"""AdamW of the recipe: norms and position embeddings of the backbone are not decayed."""

import torch
from detectron2.config import LazyCall as L

from elsa_d2 import parameter_groups

optimizer = L(torch.optim.AdamW)(
    params=L(parameter_groups)(
        # `model` is set before the optimizer is built.
        base_lr="${..lr}",
        weight_decay="${..weight_decay}",
        weight_decay_norm=None,  # decayed outside the backbone, as in the original
    ),
    lr=1e-4,
    betas=(0.9, 0.999),
    weight_decay=0.05,
)
