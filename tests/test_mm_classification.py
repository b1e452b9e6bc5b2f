"""The classification configs: names, published recipe, parameters, and the original's logits."""

import math
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch

pytest.importorskip("mmpretrain")

from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import HOOKS, MODELS, PARAM_SCHEDULERS, DefaultScope
from mmengine.runner import load_checkpoint
from mmpretrain.registry import TRANSFORMS
from torch.nn import functional as F
from weights_models import TINY, classification, classifier_tensors, same, save

import elsa_core
from elsa_core import VARIANTS
from elsa_weights import convert, convert_file, load_backbone, recognise

CONFIGS = Path(__file__).resolve().parents[1] / "configs/mmpretrain"
LEAVES = sorted(CONFIGS.glob("elsa_swin/*.py"))
NAME = re.compile(r"elsa-swin-(?P<arch>\w+)_(?P<gpus>\d+)xb(?P<batch>\d+)_in1k")
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


@dataclass(frozen=True)
class Recipe:
    """What the authors publish of a training on ImageNet-1K at 224x224, for 8 GPUs."""

    arch: str
    drop_path: float
    parameters: tuple[float, float]  # in millions, as published: from, to
    averaged: bool = False
    epochs: int = 300
    warmup: int = 20
    batch: int = 1024
    rates: tuple[float, float, float] = (1e-6, 1e-3, 1e-5)  # first, highest, last
    weight_decay: float = 0.05

    def rate(self, epoch):
        first, highest, last = self.rates
        if epoch <= self.warmup:
            return first + (highest - first) * epoch / self.warmup
        done = (epoch - self.warmup) / (self.epochs - self.warmup)
        return last + (highest - last) * (1 + math.cos(math.pi * done)) / 2


RECIPES = [
    Recipe("tiny", 0.1, (28, 29)),
    Recipe("small", 0.3, (53, 53)),
    Recipe("base", 0.5, (93, 93), averaged=True),
]
each = pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.arch)


@cache
def config(arch):
    return Config.fromfile(CONFIGS / f"elsa_swin/elsa-swin-{arch}_8xb128_in1k.py")


def build(model, device="meta"):
    with DefaultScope.overwrite_default_scope("mmpretrain"), torch.device(device):
        return MODELS.build(model)


@cache
def built(arch):
    """The model of a config, without memory."""
    return build(config(arch).model)


def test_all_published_models_are_there():
    assert sorted(NAME.fullmatch(path.stem)["arch"] for path in LEAVES) == ["base", "small", "tiny"]


@pytest.mark.parametrize("path", LEAVES, ids=lambda path: path.stem)
def test_name_and_content_agree(path):
    name, cfg = NAME.fullmatch(path.stem), config(NAME.fullmatch(path.stem)["arch"])
    lines = [line for line in path.read_text().splitlines() if line and line[0] != "#"]
    assert len(lines) <= 15
    assert cfg.custom_imports.imports == ["elsa_mm"] and cfg.default_scope == "mmpretrain"
    backbone = cfg.model.backbone
    assert (backbone.type, backbone.arch) == ("ELSASwin", name["arch"])
    assert cfg.train_dataloader.batch_size == int(name["batch"])
    assert cfg.auto_scale_lr.base_batch_size == int(name["gpus"]) * int(name["batch"])
    for part in ("train", "val", "test"):
        dataset = cfg[f"{part}_dataloader"].dataset
        assert dataset.type == "ImageNet" and dataset.data_root == "data/imagenet"
        assert dataset.split == ("train" if part == "train" else "val")
    assert cfg.optim_wrapper.get("type", "OptimWrapper") == "OptimWrapper"  # no "amp" in the name


def test_config_survives_the_copy_that_a_run_keeps():
    cfg = config("base")
    assert Config.fromstring(cfg.pretty_text, ".py").to_dict() == cfg.to_dict()


@each
def test_model(recipe):
    model, cfg = built(recipe.arch), config(recipe.arch)
    low, high = recipe.parameters
    count = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    assert low <= round(count) <= high
    rates = [block.drop_path.rate for stage in model.backbone.layers for block in stage.blocks]
    last = sum(VARIANTS[recipe.arch].depths) - 1
    assert rates == pytest.approx([recipe.drop_path * i / last for i in range(last + 1)])
    assert type(model.neck).__name__ == "GlobalAveragePooling"
    assert tuple(model.head.fc.weight.shape) == (1000, model.backbone.num_features[-1])
    hooks = [hook for hook in cfg.get("custom_hooks", []) if hook.type == "EMAHook"]
    assert len(hooks) == recipe.averaged
    for hook in hooks:
        with DefaultScope.overwrite_default_scope("mmpretrain"):
            hook = HOOKS.build(hook)
        assert hook.ema_cfg["type"] == "ExponentialMovingAverage" and hook.evaluate_on_ema
        assert 1 - hook.ema_cfg["momentum"] == pytest.approx(0.9999)


@each
def test_mixing_and_smoothing(recipe):
    cfg = config(recipe.arch)
    model = dict(cfg.model, backbone=dict(cfg.model.backbone, arch=TINY))
    model["data_preprocessor"] = dict(cfg.data_preprocessor)
    preprocessor = build(model, "cpu").data_preprocessor
    mixes = preprocessor.batch_augments
    assert [(type(m).__name__, m.alpha) for m in mixes.augments] == [("Mixup", 0.8), ("CutMix", 1)]
    assert mixes.probs is None or len(set(mixes.probs)) == 1
    assert preprocessor.to_rgb and preprocessor.num_classes == 1000
    for name, values in (("mean", MEAN), ("std", STD)):
        assert getattr(preprocessor, name).flatten().tolist() == pytest.approx(values)
    loss, label = built(recipe.arch).head.loss_module, torch.eye(4)[:1]
    loss.num_classes = None
    scores = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    smooth = 0.9 * label + 0.1 / 4
    assert loss(scores, label) == pytest.approx(-(smooth * scores.log_softmax(1)).sum().item())
    loss.num_classes = None


@each
def test_augmentation_and_test_pipeline(recipe):
    cfg = config(recipe.arch)

    def steps(part):
        with DefaultScope.overwrite_default_scope("mmpretrain"):
            return {
                step.type: TRANSFORMS.build(step)
                for step in cfg[f"{part}_dataloader"].dataset.pipeline
            }

    train, test = steps("train"), steps("val")
    assert list(train) == [
        "LoadImageFromFile",
        "RandomResizedCrop",
        "RandomFlip",
        "RandAugment",
        "RandomErasing",
        "PackInputs",
    ]
    assert tuple(train["RandomResizedCrop"].scale) == (224, 224)
    assert train["RandomFlip"].prob == 0.5
    augment = train["RandAugment"]
    assert (augment.magnitude_level, augment.magnitude_std, augment.num_policies) == (9, 0.5, 2)
    assert cfg.train_dataloader.dataset.pipeline[3].policies == "timm_increasing"
    erasing = train["RandomErasing"]
    assert (erasing.erase_prob, erasing.mode) == (0.25, "rand")  # each pixel a random colour
    assert tuple(erasing.fill_color) == MEAN[::-1] and tuple(erasing.fill_std) == STD[::-1]
    assert list(test) == ["LoadImageFromFile", "ResizeEdge", "CenterCrop", "PackInputs"]
    (side,) = set(test["CenterCrop"].crop_size)
    assert side == 224 and test["ResizeEdge"].scale == int(224 / 0.9)
    assert (test["ResizeEdge"].edge, test["ResizeEdge"].interpolation) == ("short", "bicubic")
    assert cfg.test_dataloader == cfg.val_dataloader


@each
def test_optimizer(recipe):
    cfg, model = config(recipe.arch), built(recipe.arch)
    with DefaultScope.overwrite_default_scope("mmpretrain"):
        wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    optimizer = wrapper.optimizer
    assert type(optimizer) is torch.optim.AdamW and optimizer.defaults["betas"] == (0.9, 0.999)
    assert wrapper.clip_grad_kwargs == {"max_norm": 5.0}
    assert wrapper.clip_func is torch.nn.utils.clip_grad_norm_
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decays = {}
    for group in optimizer.param_groups:
        assert group["lr"] == recipe.rates[1]
        decays |= {names[id(parameter)]: group["weight_decay"] for parameter in group["params"]}
    assert decays == {
        name: 0.0 if parameter.dim() == 1 else recipe.weight_decay
        for name, parameter in model.named_parameters()
    }
    decayed = {name.split(".")[-1] for name, decay in decays.items() if decay}
    assert decayed == {"weight", "rb", "ghost_head"}


@each
def test_schedule(recipe):
    cfg, epoch_length = config(recipe.arch), 5
    assert cfg.train_cfg.max_epochs == recipe.epochs
    assert cfg.auto_scale_lr.base_batch_size == recipe.batch
    optimizer = torch.optim.SGD(
        [torch.nn.Parameter(torch.zeros(1))], lr=cfg.optim_wrapper.optimizer.lr
    )
    defaults = dict(optimizer=optimizer, epoch_length=epoch_length)
    schedulers = [
        PARAM_SCHEDULERS.build({"end": recipe.epochs, **scheduler}, default_args=defaults)
        for scheduler in cfg.param_scheduler
    ]
    rates = []
    for iteration in range(recipe.epochs * epoch_length + 1):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        for scheduler in schedulers:
            if not scheduler.by_epoch or (iteration + 1) % epoch_length == 0:
                scheduler.step()
    epochs = [0, recipe.warmup / 2, recipe.warmup, 90, 160, 250, recipe.epochs]
    got = [rates[int(epoch * epoch_length)] for epoch in epochs]
    # MMEngine's warm-up ends an iteration earlier.
    assert got == pytest.approx([recipe.rate(epoch) for epoch in epochs], rel=0.02)
    assert max(rates) == pytest.approx(recipe.rates[1])


def original_logits(state, arch, image):
    """As the original classifier computes them: norm and mean of the tokens, linear layer."""
    backbone = elsa_core.ELSASwin(arch, out_indices=(0,)).eval()
    backbone.load_state_dict({n: t for n, t in state.items() if n[:4] in ("patc", "laye")}, False)
    x = backbone.patch_embed(image)
    for stage in backbone.layers:
        last, x = stage(x)
    tokens = last.flatten(1, 2)
    tokens = F.layer_norm(tokens, tokens.shape[-1:], state["norm.weight"], state["norm.bias"])
    return F.linear(tokens.mean(1), state["head.weight"], state["head.bias"])


def classifier(arch, classes, **backbone):
    model = config("tiny").model.copy()
    model.backbone = dict(model.backbone, arch=arch, **backbone)
    model.head = dict(model.head, in_channels=arch.num_features[-1], num_classes=classes)
    return build(model, "cpu").eval()


@pytest.fixture
def scaled():
    """An original checkpoint whose logits are of the size of one and depend on everything."""
    checkpoint = classification(TINY)
    generator = torch.Generator().manual_seed(3)
    for tensor in checkpoint["state_dict"].values():
        if tensor.is_floating_point():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.2)
    return checkpoint


def test_converted_classifier_gives_the_originals_logits(tmp_path, scaled):
    source = save(tmp_path, scaled)
    convert_file(source, tmp_path / "cls.pth", "mmpretrain")
    model = classifier(TINY, 10)
    load_checkpoint(model, str(tmp_path / "cls.pth"), map_location="cpu", strict=True)
    image = torch.randn(2, 3, 56, 72, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        got = model(image)
        wanted = original_logits(scaled["state_dict"], TINY, image)
    assert wanted.std() > 0.1 and not torch.allclose(wanted[0], wanted[1], atol=1e-3)
    assert torch.allclose(got, wanted, rtol=0, atol=1e-5)
    convert_file(tmp_path / "cls.pth", tmp_path / "back.pth", "original")
    back = torch.load(tmp_path / "back.pth")
    assert same(back["state_dict"], scaled["state_dict"])


@each
def test_names_and_shapes_are_those_of_the_built_model(recipe):
    tensors = classifier_tensors(VARIANTS[recipe.arch], num_classes=1000)
    converted = convert(recognise({"state_dict": tensors}), "mmpretrain").tensors
    wanted = {name: tensor.shape for name, tensor in built(recipe.arch).state_dict().items()}
    assert {name: tensor.shape for name, tensor in converted.items()} == wanted


def test_classifiers_backbone_keeps_the_classifiers_norm(tmp_path, scaled):
    path, state = save(tmp_path, scaled), scaled["state_dict"]
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
