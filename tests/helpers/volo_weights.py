"""Checkpoints of VOLO and ELSA-VOLO, made from nothing."""

from weights_models import fill, sizes

from elsa_core.variants import VoloArch
from elsa_core.weights.shapes import model_shapes
from elsa_core.weights.tables import ShapeTable
from elsa_core.weights.volo import Volo, add_class_parts, add_volo

# Everything differs: heads, channels, blocks, and the side of the position embedding.
SMALL = VoloArch(
    depths=(1, 2, 1, 1),
    embed_dims=(24, 40),
    num_heads=(3, 1),
    mlp_ratio=2,
    stem_dim=6,
    kernel_size=3,
    group_width=4,
)
NATIVE, PYRAMID = (Volo(SMALL, 7, pyramid, (1,)) for pyramid in (False, True))


def bare(volo):
    table = ShapeTable()
    add_volo(table, volo, "")
    return fill(table.shapes)


def classifier(arch=SMALL, num_classes=10, grid=7, class_token=True, aux_head=True, seed=0):
    """A state dict of `ELSAVoloClassifier`."""
    table = ShapeTable()
    add_volo(table, Volo(arch, grid), "")
    given = dict.fromkeys(["cls_token"] * class_token + ["aux_head.weight"] * aux_head)
    add_class_parts(table, Volo(arch, grid), given)
    shapes = {
        name: shape for name, shape in table.shapes.items() if name[:4] != "norm" or name[4] == "."
    }
    shapes |= {
        name: (num_classes, *shape[1:])
        for name, shape in shapes.items()
        if "head." in name and "ghost" not in name
    }
    return fill(shapes, seed)


def detector(kind, volo, wanted=None):
    """A state dict with OpenMMLab's names."""
    return fill(model_shapes(volo, wanted or sizes(kind), kind))


def stock(**options):
    """A random VOLO of timm, small unless ``options`` say otherwise."""
    from timm.models.volo import VOLO

    settings = dict(
        layers=[1, 2, 1, 1],
        embed_dims=[24, 40, 40, 40],
        num_heads=[3, 4, 4, 4],
        mlp_ratio=2,
        stem_hidden_dim=6,
        post_layers=("ca", "ca"),
        img_size=112,
        num_classes=10,
    )
    return VOLO(**{**settings, **options})
