"""What the tests of all doors check: a step of training, and the features of `ELSASwin`."""

import torch
from weights_models import TINY

from elsa_core import ELSASwin

ARCH = {name: getattr(TINY, name) for name in TINY.__dataclass_fields__}
ELSA = ("pre_proj.weight", "attn.0.weight", "attn.2.weight", "ghost_head", "post_proj.weight")


def image(batch=2, height=70, width=50, channels=3):
    return torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(0))


def train_a_step(model, loss):
    """Every parameter that may change does, those of each ELSA layer among them."""
    assert torch.isfinite(loss) and loss.requires_grad
    loss.backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    names = [f"layers.{stage}.blocks.0.attn.{leaf}" for stage in range(3) for leaf in ELSA]
    found = [name for name in trained if name.endswith(tuple(names))]
    assert len(found) == len(names)
    for name in found:
        assert trained[name].grad.isfinite().all() and trained[name].grad.abs().sum() > 0, name
    before = {name: p.detach().clone() for name, p in trained.items()}
    torch.optim.SGD(model.parameters(), lr=0.01).step()
    unchanged = [name for name, p in trained.items() if torch.equal(p, before[name])]
    assert not set(unchanged) & set(found)
    return unchanged


def core_backbone(state, out_indices=(0, 1, 2, 3), **options):
    """`elsa_core.ELSASwin` with exactly these tensors."""
    backbone = ELSASwin(ARCH, out_indices=out_indices, **options).eval()
    backbone.load_state_dict(state)
    return backbone


def equal(left, right):
    return len(left) == len(right) and all(map(torch.equal, left, right))
