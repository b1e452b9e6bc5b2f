"""What MMPretrain builds from a config, in the words of tests/helpers/recipes_imagenet.py."""

from functools import cache
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import HOOKS, MODELS, DefaultScope
from mmengine.runner import Runner
from mmpretrain.registry import TRANSFORMS

CONFIGS = Path(__file__).resolve().parents[2] / "configs/mmpretrain"


@cache
def config(recipe):
    return Config.fromfile(CONFIGS / recipe.config)


def build(model, device="meta"):
    with DefaultScope.overwrite_default_scope("mmpretrain"), torch.device(device):
        return MODELS.build(model)


@cache
def built(recipe):
    """The model of a config, without memory."""
    return build(config(recipe).model)


def built_facts(cfg, model):
    """What MMPretrain builds, in the words of tests/helpers/recipes_imagenet.py."""
    with DefaultScope.overwrite_default_scope("mmpretrain"):
        hooks = [HOOKS.build(hook) for hook in cfg.get("custom_hooks", [])]
        saving = HOOKS.build(cfg.default_hooks.checkpoint)
        train, test = (
            {step.type.split(".")[-1]: TRANSFORMS.build(step) for step in loader.dataset.pipeline}
            for loader in (cfg.train_dataloader, cfg.val_dataloader)
        )
    processing = dict(cfg.data_preprocessor, batch_augments=cfg.model.get("train_cfg"))
    with DefaultScope.overwrite_default_scope("mmpretrain"):
        processor = MODELS.build(processing)
    (ema,) = hooks or [None]
    mixing = processor.batch_augments
    assert (mixing is None) == getattr(model.backbone, "mix_token", False)
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
        "classes": processor.num_classes,
        "label smoothing": model.head.loss_module.label_smooth_val,
        "mixing": [(type(m).__name__, m.alpha) for m in mixing.augments]
        if mixing
        else ["MixToken"],
        "mixing odds": mixing and mixing.probs,
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
