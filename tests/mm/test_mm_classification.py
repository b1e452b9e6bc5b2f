"""ELSA-Swin's classifiers in MMPretrain: the original's logits, conversion, and parts of them."""

import re
from dataclasses import replace

import pytest
import torch

pytest.importorskip("mmpretrain")

from built_mm_imagenet import build, built, config
from mmengine.registry import PARAM_SCHEDULERS
from mmengine.runner import load_checkpoint
from original_classifier import original_logits
from recipes_imagenet import SWIN_RECIPES
from torch.nn import functional as F
from weights_models import TINY, classification, classifier_tensors, same, save

import elsa_core
from elsa_core import VARIANTS
from elsa_core.runtime.errors import UsageError
from elsa_core.weights import convert, convert_file, load_backbone, recognise
from elsa_mm.preflight import check_config

TINY_RECIPE = SWIN_RECIPES[0]
each = pytest.mark.parametrize("recipe", SWIN_RECIPES, ids=lambda recipe: recipe.arch)


def test_smoothing_of_mixed_labels():
    loss, label = built(TINY_RECIPE).head.loss_module, torch.tensor([[0.7, 0.0, 0.3, 0.0]])
    loss.num_classes = None
    scores = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    smooth = 0.9 * label + 0.1 / 4
    assert loss(scores, label) == pytest.approx(-(smooth * scores.log_softmax(1)).sum().item())
    loss.num_classes = None


@pytest.mark.parametrize("warmup", [-1, 301])
def test_warmup_within_the_cosine(warmup):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = dict(config(TINY_RECIPE).param_scheduler[0], warmup=warmup)
    with pytest.raises(ValueError, match=f"got warmup={warmup} and T_max=300"):
        PARAM_SCHEDULERS.build(scheduler, default_args=dict(optimizer=optimizer))


def classifier(arch, classes, **backbone):
    model = config(TINY_RECIPE).model.copy()
    model.backbone = dict(model.backbone, arch=arch, **backbone)
    model.head = dict(model.head, in_channels=arch.num_features[-1], num_classes=classes)
    return build(model, "cpu").eval()


def scaled(arch=TINY):
    """An original checkpoint whose logits are of the size of one and depend on everything."""
    checkpoint = classification(arch)
    generator = torch.Generator().manual_seed(3)
    for name, tensor in checkpoint["state_dict"].items():
        if tensor.is_floating_point():
            scale = 0.7 if re.match(r"layers\.3.*(attn|norm)", name) else 0.3
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * scale)
    return checkpoint


WIDE = replace(TINY, window_size=7)


@pytest.mark.parametrize("always_shift", [False, True])
@pytest.mark.parametrize(
    "arch, size",
    [
        (WIDE, (224, 224)),  # one window
        (WIDE, (448, 448)),  # four
        (WIDE, (224, 448)),  # two, side by side
        (WIDE, (160, 200)),  # less than one
        (TINY, (288, 384)),  # the last windows padded
    ],
)
def test_converted_classifier_gives_the_originals_logits(tmp_path, arch, size, always_shift):
    checkpoint = scaled(arch)
    convert_file(save(tmp_path, checkpoint), tmp_path / "cls.pth", "mmpretrain")
    options = dict(always_shift=True) if always_shift else {}
    model = classifier(arch, 10, **options)
    load_checkpoint(model, str(tmp_path / "cls.pth"), map_location="cpu", strict=True)
    image = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    image = F.interpolate(image, size)  # patches, so that it matters what lies in a window
    state = checkpoint["state_dict"]
    with torch.no_grad():
        got = model(image)
        wanted = original_logits(state, arch, image, always_shift)
        other = original_logits(state, arch, image, not always_shift)
    assert wanted.std() > 0.1 and not torch.allclose(wanted[0], wanted[1], atol=1e-3)
    assert torch.allclose(got, wanted, rtol=0, atol=1e-5)
    if min(size) > 32 * arch.window_size:
        assert torch.equal(wanted, other)
    else:
        assert (got - other).abs().max() > 1e-3


def test_timms_model_gives_the_same_logits(tmp_path):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    import elsa_core.timm  # noqa: F401  registers the models

    convert_file(save(tmp_path, scaled()), tmp_path / "cls.pth", "mmpretrain")
    model = classifier(TINY, 10)
    load_checkpoint(model, str(tmp_path / "cls.pth"), map_location="cpu", strict=True)
    path = tmp_path / "original.safetensors"
    convert_file(tmp_path / "cls.pth", path, "original")
    options = dict(arch=TINY, num_classes=10, checkpoint_path=str(path))
    other = timm.create_model("elsa_swin_tiny", **options).eval()
    image = torch.randn(2, 3, 96, 120)
    with torch.no_grad():
        assert torch.allclose(model(image), other(image), rtol=0, atol=1e-5)


def test_conversion_back_changes_no_tensor(tmp_path):
    checkpoint = scaled()
    convert_file(save(tmp_path, checkpoint), tmp_path / "cls.pth", "mmpretrain")
    convert_file(tmp_path / "cls.pth", tmp_path / "back.pth", "original")
    assert same(torch.load(tmp_path / "back.pth")["state_dict"], checkpoint["state_dict"])


def test_a_classifier_must_say_how_it_shifts():
    cfg = config(TINY_RECIPE).copy()
    check_config(cfg)
    cfg.model = cfg.model.copy()
    cfg.model.backbone = dict(type="ELSASwin", arch="tiny", out_indices=(3,))
    with pytest.raises(UsageError, match=r"^model\.backbone\.always_shift must be set in a class"):
        check_config(cfg)


@each
def test_names_and_shapes_are_those_of_the_built_model(recipe):
    tensors = classifier_tensors(VARIANTS[recipe.arch], num_classes=1000)
    converted = convert(recognise({"state_dict": tensors}), "mmpretrain").tensors
    wanted = {name: tensor.shape for name, tensor in built(recipe).state_dict().items()}
    assert {name: tensor.shape for name, tensor in converted.items()} == wanted


def test_classifiers_backbone_keeps_the_classifiers_norm(tmp_path):
    checkpoint = scaled()
    path, state = save(tmp_path, checkpoint), checkpoint["state_dict"]
    for out_indices, kept in (((3,), True), ((2, 3), False)):
        backbone = elsa_core.ELSASwin(TINY, out_indices=out_indices)
        load_backbone(backbone, path)
        assert torch.equal(backbone.norm3.weight, state["norm.weight"]) == kept
        assert kept or torch.equal(backbone.norm3.weight, torch.ones_like(backbone.norm3.weight))
    model = classifier(TINY, 10, init_cfg=dict(type="Pretrained", checkpoint=str(path)))
    model.init_weights()
    image = torch.randn(1, 3, 48, 48)
    with torch.no_grad():
        state |= {"head.weight": torch.eye(96), "head.bias": torch.zeros(96)}
        features = model.eval().extract_feat(image)[0]
        assert torch.allclose(features, original_logits(state, TINY, image), atol=1e-5)
