"""timm's models: classifier and features, as its users build, train, save and load them."""

import pytest
import torch
from doors_tiny import ARCH, core_backbone, equal, image, train_a_step
from original_classifier import original_logits
from torch.nn import functional as F
from weights_models import TINY, classification, classifier_tensors, save

timm = pytest.importorskip("timm", reason="timm is not installed")

from timm.optim import create_optimizer_v2  # noqa: E402

import elsa_core.timm  # noqa: E402  registers the models
from elsa_core.param_groups import lr_factors  # noqa: E402
from elsa_core.weights import convert_file  # noqa: E402


def create(name="elsa_swin_tiny", **options):
    torch.manual_seed(0)
    return timm.create_model(name, **{"arch": ARCH, **options})


@pytest.mark.parametrize("variant", elsa_core.VARIANTS)
def test_variants_are_registered_without_weights(variant):
    name, channels = f"elsa_swin_{variant}", elsa_core.VARIANTS[variant].num_features
    assert timm.is_model(name) and name not in timm.list_pretrained()
    with torch.device("meta"):
        maps = timm.create_model(name, features_only=True)
    assert maps.arch == elsa_core.VARIANTS[variant]
    assert maps.feature_info.channels() == channels
    assert maps.feature_info.reduction() == [4, 8, 16, 32]
    with pytest.raises(RuntimeError, match=f"No pretrained weights exist for {name}"):
        create(name, pretrained=True)


def test_images_are_prepared_as_the_published_classifiers_want_them():
    model = create()
    data = timm.data.resolve_model_data_config(model)
    assert model.num_classes == 1000 and data["input_size"] == (3, 224, 224)
    assert data["mean"] == pytest.approx([value / 255 for value in (123.675, 116.28, 103.53)])
    assert data["std"] == pytest.approx([value / 255 for value in (58.395, 57.12, 57.375)])
    assert (data["crop_pct"], data["interpolation"]) == (0.9, "bicubic")


def test_classifier_trains_and_predicts():
    model = create(num_classes=5, drop_path_rate=0.1, drop_rate=0.1)
    loss = F.cross_entropy(model(image()), torch.tensor([1, 4]))
    assert train_a_step(model, loss) == []
    model.eval()
    with torch.no_grad():
        assert model(image()).softmax(-1).shape == (2, 5)


@pytest.mark.parametrize("size", [(96, 96), (72, 52)])
def test_a_published_checkpoint_gives_the_originals_logits(size, tmp_path):
    state = {name: (t - 0.6) * 0.5 if t.is_floating_point() else t
             for name, t in classifier_tensors(TINY).items()}  # fmt: skip
    model = create(num_classes=10, checkpoint_path=save(tmp_path, {"state_dict": state})).eval()
    x = image(2, *size)
    with torch.no_grad():
        logits = model(x)
        assert torch.allclose(logits, original_logits(state, TINY, x), rtol=0, atol=1e-6)
    assert logits.std() > 0.01


def test_features_are_the_backbones():
    model = create(features_only=True, out_indices=(1, -1), in_chans=1, img_size=64)
    assert (model.feature_info.channels(), model.feature_info.reduction()) == ([24, 96], [8, 32])
    maps = model(image(channels=1))
    assert isinstance(maps, list) and train_a_step(model, sum(m.square().sum() for m in maps)) == []
    backbone = core_backbone(model.state_dict(), (1, 3), in_chans=1)
    assert equal(model.eval()(image(channels=1)), backbone(image(channels=1)))


def test_intermediates():
    model, x = create(num_classes=3).eval(), image()
    state = {n.replace("norm.", "norm3.") if n[:5] == "norm." else n: t
             for n, t in model.state_dict().items() if n[:5] != "head."}  # fmt: skip
    final, maps = model.forward_intermediates(x, norm=True)
    assert torch.equal(final, model.forward_features(x))
    assert torch.equal(model.forward_head(final), model(x))
    (last,) = core_backbone(state, (3,), always_shift=False)(x)
    assert [m.shape[1:] for m in maps] == [(12, 18, 13), (24, 9, 7), (48, 5, 4), (96, 3, 2)]
    assert torch.equal(maps[-1], last) and torch.equal(final.permute(0, 3, 1, 2), last)
    raw = model.forward_intermediates(
        x, indices=(1, 2), stop_early=True, output_fmt="NHWC", intermediates_only=True
    )
    assert equal([m.permute(0, 3, 1, 2) for m in raw], maps[1:3])
    getter = create(features_only=True, feature_cls="getter", out_indices=(1, 2)).eval()
    assert equal(getter(x), create().eval().forward_intermediates(x, intermediates_only=True)[1:3])
    assert len(getter.model.layers) == 3 and isinstance(getter.model.norm, torch.nn.Identity)


def test_head_layers_and_checkpointing():
    model, x = create(num_classes=3).eval(), image()
    assert model.get_classifier().out_features == 3
    model.reset_classifier(7, "catavgmax")
    assert model(x).shape == (2, 7) and model.head_hidden_size == 192
    model.reset_classifier(0, "avg")
    assert torch.equal(model(x), model.forward_head(model.forward_features(x), pre_logits=True))
    model.reset_classifier(0, "")
    assert model(x).shape == (2, 3, 2, 96)
    model.reset_classifier(4, "max")
    # Published: ghost filters and position biases are decayed.
    assert model.no_weight_decay() == set()
    groups = timm.models.group_parameters(model, model.group_matcher(), reverse=True)
    assert groups["layers.1.downsample.norm.weight"] == groups["layers.1.blocks.0.attn.ghost_head"]
    order = ["patch_embed.proj.weight", "layers.0.blocks.0.attn.ghost_head"]
    order += ["layers.3.blocks.1.attn.rb", "head.weight"]
    assert [groups[name] for name in order] == [0, 1, 5, 6] and groups["norm.weight"] == 6
    features = create(features_only=True)
    scales = {
        parameter: group["lr_scale"]
        for group in create_optimizer_v2(features, "adamw", layer_decay=0.5).param_groups
        for parameter in group["params"]
    }
    assert scales == lr_factors(features, 0.5)
    grads = []
    for enable in (False, True):
        model.train().set_grad_checkpointing(enable)
        assert all(stage.with_cp is enable for stage in model.layers)
        grads.append(torch.autograd.grad(model(x).square().sum(), list(model.parameters())))
    assert equal(*grads)


def test_what_timm_saves_it_loads(tmp_path):
    model = create(num_classes=5).eval()
    timm.models.save_for_hf(model, tmp_path, model_args={"arch": ARCH}, safe_serialization=True)
    assert (tmp_path / "model.safetensors").exists()
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(again(image()), model(image()))


@pytest.mark.parametrize("out_indices", [(0, 1, 2, 3), (3,)])
def test_a_published_checkpoint_as_features(out_indices, tmp_path):
    path, ghost = save(tmp_path, classification()), "layers.0.blocks.0.attn.ghost_head"
    state = classifier_tensors(TINY)
    convert_file(path, tmp_path / "plain.safetensors", "original")  # without what timm refuses
    options = dict(
        pretrained=True, pretrained_cfg_overlay={"file": f"{tmp_path}/plain.safetensors"}
    )
    model = create(features_only=True, out_indices=out_indices, **options)
    assert torch.equal(model.get_parameter(ghost), state[ghost])
    assert torch.equal(model.norm3.weight, state["norm.weight"]) is (out_indices == (3,))
    grey = create(in_chans=1, num_classes=3, **options)
    summed = state["patch_embed.proj.weight"].sum(1, keepdim=True)
    assert torch.equal(grey.patch_embed.proj.weight, summed)
    assert grey.head.out_features == 3 and torch.equal(grey.norm.weight, state["norm.weight"])
    convert_file(path, tmp_path / "backbone.pth", "backbone")
    model = create(features_only=True, checkpoint_path=tmp_path / "backbone.pth")
    assert torch.equal(model.get_parameter(ghost), state[ghost])
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "other.pth")
    options["pretrained_cfg_overlay"]["file"] = f"{tmp_path}/other.pth"
    with pytest.raises(ValueError, match=r"^the checkpoint lacks (\d+) of the \1 tensors of the b"):
        create(features_only=True, **options)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (dict(arch="huge"), "arch must be one of tiny, small, base, got arch='huge'"),
        (dict(features_only=True, out_indices=(1, 4)), r"got out_indices=\(1, 4\)"),
        (dict(features_only=True, out_indices=5), "out_indices must be one or more of the stages"),
        (dict(features_only=True, feature_cls="hook"), "must be 'getter', got 'hook'"),
    ],
)
def test_bad_use_is_one_sentence(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        create(**options)
    with pytest.raises(ValueError, match="among the stages 0..3, got 5"):
        create().forward_intermediates(image(), 5)
