"""The classification configs: names, published recipe, parameters, and the original's logits."""

import re
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

pytest.importorskip("mmpretrain")

from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import HOOKS, MODELS, PARAM_SCHEDULERS, DefaultScope
from mmengine.runner import Runner, load_checkpoint
from mmpretrain.registry import TRANSFORMS
from original_classifier import original_logits
from recipes import check_facts, groups_by_name
from recipes_imagenet import RATES, RECIPES
from torch.nn import functional as F
from weights_models import TINY, classification, classifier_tensors, same, save

import elsa_core
from elsa_core import VARIANTS
from elsa_core.runtime.errors import UsageError
from elsa_core.weights import convert, convert_file, load_backbone, recognise
from elsa_mm.preflight import check_config

CONFIGS = Path(__file__).resolve().parents[2] / "configs/mmpretrain"
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


@each
def test_data(recipe):
    for part in ("train", "val", "test"):
        dataset = config(recipe.arch)[f"{part}_dataloader"].dataset
        assert dataset.type == "ImageNet" and dataset.data_root == "data/imagenet"
        assert dataset.split == ("train" if part == "train" else "val")


@each
def test_model(recipe):
    model = built(recipe.arch)
    low, high = recipe.parameters
    count = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    assert low <= round(count) <= high
    rates = [block.drop_path.rate for stage in model.backbone.layers for block in stage.blocks]
    last = sum(VARIANTS[recipe.arch].depths) - 1
    assert rates == pytest.approx([recipe.drop_path * i / last for i in range(last + 1)])
    assert type(model.neck).__name__ == "GlobalAveragePooling"
    assert tuple(model.head.fc.weight.shape) == (1000, model.backbone.num_features[-1])


def built_facts(cfg, model):
    """What MMPretrain builds, in the words of tests/helpers/recipes_imagenet.py."""
    with DefaultScope.overwrite_default_scope("mmpretrain"):
        hooks = [HOOKS.build(hook) for hook in cfg.get("custom_hooks", [])]
        saving = HOOKS.build(cfg.default_hooks.checkpoint)
        train, test = (
            {step.type.split(".")[-1]: TRANSFORMS.build(step) for step in loader.dataset.pipeline}
            for loader in (cfg.train_dataloader, cfg.val_dataloader)
        )
    small = dict(cfg.model, backbone=dict(cfg.model.backbone, arch=TINY))
    processor = build(small | dict(data_preprocessor=dict(cfg.data_preprocessor)), "cpu")
    processor = processor.data_preprocessor
    (ema,) = hooks or [None]
    crops = [crop for steps in train["RandomChoice"].transforms for crop in steps]
    (crop,) = {(tuple(c.scale), c.crop_ratio_range, c.aspect_ratio_range) for c in crops}
    augment, optimizer = train["RandAugment"], make_optimizer(cfg, model).optimizer
    assert list(train) == [
        "LoadImageFromFile",
        "RandomChoice",
        "RandomFlip",
        "RandAugment",
        "PackInputs",
    ]
    assert list(test) == ["LoadImageFromFile", "ResizeEdge", "CenterCrop", "PackInputs"]
    assert test["ResizeEdge"].edge == "short" and cfg.test_dataloader == cfg.val_dataloader
    assert ema is None or (
        ema.ema_cfg["type"] == "ExponentialMovingAverage" and ema.evaluate_on_ema
    )
    return {
        "epochs": cfg.train_cfg.max_epochs,
        "images on a GPU": cfg.train_dataloader.batch_size,
        "images on 8 GPUs": cfg.auto_scale_lr.base_batch_size,
        "short batches": not cfg.train_dataloader.drop_last,
        "iterations of an epoch": iterations(cfg),
        "mixed precision": cfg.optim_wrapper.type == "AmpOptimWrapper",
        "clipping": make_optimizer(cfg, model).clip_grad_kwargs,
        "betas": optimizer.defaults["betas"],
        "eps": optimizer.defaults["eps"],
        "seed": (cfg.randomness.seed, cfg.randomness.diff_rank_seed),
        "best checkpoint": (saving.save_best, saving.rules[0]),
        "ema decay": ema and 1 - ema.ema_cfg["momentum"],
        "colours": (
            "RGB" if processor.to_rgb else "BGR",
            *(tuple(getattr(processor, name).flatten().tolist()) for name in ("mean", "std")),
        ),
        "small maps shifted": model.backbone.always_shift,
        "classes": processor.num_classes,
        "label smoothing": model.head.loss_module.label_smooth_val,
        "mixing": [(type(m).__name__, m.alpha) for m in processor.batch_augments.augments],
        "mixing odds": processor.batch_augments.probs,
        "erasing": (processor.erase_prob, processor.area, processor.ratio),
        "crop": crop,
        "crop interpolation": [crop.interpolation for crop in crops],
        "crop odds": train["RandomChoice"].prob,
        "flip": train["RandomFlip"].prob,
        "RandAugment": (
            augment.magnitude_level,
            augment.magnitude_std,
            augment.num_policies,
            len(augment.policies) // 2,
        ),
        "test crop": (
            test["ResizeEdge"].scale,
            *set(test["CenterCrop"].crop_size),
            test["ResizeEdge"].interpolation,
        ),
    }


def make_optimizer(cfg, model):
    wrapper = dict(cfg.optim_wrapper, type="OptimWrapper")  # mixed precision needs a GPU
    with DefaultScope.overwrite_default_scope("mmpretrain"):
        return build_optim_wrapper(model, wrapper)


def iterations(cfg):
    """Of an epoch in one of 8 processes, each with its part of ImageNet-1K."""
    loader = {name: cfg.train_dataloader[name] for name in ("batch_size", "sampler", "drop_last")}
    images = range(-(-1_281_167 // 8))
    return len(Runner.build_dataloader(dict(loader, dataset=images, num_workers=0)))


@each
def test_recipe(recipe):
    check_facts(built_facts(config(recipe.arch), built(recipe.arch)), recipe.facts())


@each
def test_decay(recipe):
    model = built(recipe.arch)
    optimizer = make_optimizer(config(recipe.arch), model).optimizer
    assert type(optimizer) is torch.optim.AdamW
    groups = groups_by_name(model, optimizer)
    assert {group["lr"] for group in groups.values()} == {recipe.lr}
    decays = {name: group["weight_decay"] for name, group in groups.items()}
    assert decays == {
        name: 0.0 if parameter.dim() == 1 else recipe.weight_decay
        for name, parameter in model.named_parameters()
    }
    decayed = {name.split(".")[-1] for name, decay in decays.items() if decay}
    assert decayed == {"weight", "rb", "ghost_head"}


def test_smoothing_of_mixed_labels():
    loss, label = built("tiny").head.loss_module, torch.tensor([[0.7, 0.0, 0.3, 0.0]])
    loss.num_classes = None
    scores = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    smooth = 0.9 * label + 0.1 / 4
    assert loss(scores, label) == pytest.approx(-(smooth * scores.log_softmax(1)).sum().item())
    loss.num_classes = None


@each
def test_schedule(recipe):
    cfg = config(recipe.arch)
    epochs, (scheduler,) = cfg.train_cfg.max_epochs, cfg.param_scheduler
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=recipe.lr)
    scheduler = PARAM_SCHEDULERS.build(dict(scheduler, optimizer=optimizer, end=epochs))
    assert scheduler.by_epoch  # constant within an epoch
    rates = []
    for _ in range(epochs):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert {epoch: rates[epoch] for epoch in RATES} == pytest.approx(RATES, rel=1e-12)
    assert rates[-10:] == [1e-5] * 10


@pytest.mark.parametrize("warmup", [-1, 301])
def test_warmup_within_the_cosine(warmup):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = dict(config("tiny").param_scheduler[0], warmup=warmup)
    with pytest.raises(ValueError, match=f"got warmup={warmup} and T_max=300"):
        PARAM_SCHEDULERS.build(scheduler, default_args=dict(optimizer=optimizer))


def classifier(arch, classes, **backbone):
    model = config("tiny").model.copy()
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
    cfg = config("tiny").copy()
    check_config(cfg)
    cfg.model = cfg.model.copy()
    cfg.model.backbone = dict(type="ELSASwin", arch="tiny", out_indices=(3,))
    with pytest.raises(UsageError, match=r"^model\.backbone\.always_shift must be set in a class"):
        check_config(cfg)


@each
def test_names_and_shapes_are_those_of_the_built_model(recipe):
    tensors = classifier_tensors(VARIANTS[recipe.arch], num_classes=1000)
    converted = convert(recognise({"state_dict": tensors}), "mmpretrain").tensors
    wanted = {name: tensor.shape for name, tensor in built(recipe.arch).state_dict().items()}
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
