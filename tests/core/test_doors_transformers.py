"""Hugging Face transformers: Auto classes, saving and loading, models that take a backbone."""

import numpy as np
import pytest
import torch
from doors_tiny import ARCH, core_backbone, equal, image, train_a_step
from PIL import Image

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from weights_models import TINY, classifier_tensors, save  # noqa: E402

import elsa_core.weights  # noqa: E402
from elsa_core.transformers import (  # noqa: E402
    ElsaSwinBackbone,
    ElsaSwinConfig,
    make_image_processor,
)

STAGES = ["stage1", "stage2", "stage3", "stage4"]


@pytest.fixture(autouse=True)
def offline_and_seeded(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    torch.manual_seed(0)


def state_of(model, prefix="elsa_swin."):
    tensors = model.state_dict().items()
    return {n.removeprefix(prefix): tensor for n, tensor in tensors if n.startswith(prefix)}


def test_classifier_trains_saves_and_loads(tmp_path):
    labels = {index: name for index, name in enumerate(("cat", "dog", "moon"))}
    config = ElsaSwinConfig(ARCH, id2label=labels, drop_path_rate=0.1)
    model = transformers.AutoModelForImageClassification.from_config(config).train()
    assert train_a_step(model, model(image(), labels=torch.tensor([1, 2])).loss) == []
    expected = model.eval()(image(), output_hidden_states=True)
    assert [tuple(m.shape[1:]) for m in expected.hidden_states[1:]] == [
        (12, 18, 13), (24, 9, 7), (48, 5, 4), (96, 3, 2),
    ]  # fmt: skip
    (last,) = core_backbone(state_of(model), (3,), always_shift=False)(image())
    logits = last.mean((2, 3)) @ model.classifier.weight.T + model.classifier.bias
    assert torch.allclose(expected.logits, logits, atol=1e-6)
    assert torch.equal(model(image(), return_dict=False)[0], expected.logits)
    model.save_pretrained(tmp_path)
    make_image_processor().save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    again = transformers.AutoModelForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(again(image()).logits, expected.logits)
    features = transformers.AutoModel.from_pretrained(tmp_path)(image())
    assert torch.equal(features.last_hidden_state, last.flatten(2).mT)
    assert torch.allclose(features.pooler_output, last.mean((2, 3)), atol=1e-6)
    pipeline = transformers.pipeline("image-classification", model=str(tmp_path), device="cpu")
    pixels = np.random.default_rng(0).integers(0, 256, (60, 40, 3), dtype=np.uint8)
    found = pipeline(Image.fromarray(pixels))
    assert {one["label"] for one in found} == set(labels.values())


def test_images_are_prepared_as_the_published_classifiers_want_them():
    grey = np.full((300, 400, 3), 200, np.uint8)
    grey[:, :, 0] = np.linspace(0, 255, 400)
    pixels = make_image_processor()(grey, return_tensors="pt")["pixel_values"]
    resized = Image.fromarray(grey).resize((330, 248), Image.Resampling.BICUBIC)
    wanted = np.asarray(resized.crop((53, 12, 277, 236)), np.float32)
    wanted = (wanted - [123.675, 116.28, 103.53]) / [58.395, 57.12, 57.375]
    assert pixels.shape == (1, 3, 224, 224)
    assert torch.allclose(pixels[0].permute(1, 2, 0).double(), torch.from_numpy(wanted), atol=0.03)


def test_backbone_is_the_cores_with_the_same_weights(tmp_path):
    config = ElsaSwinConfig(ARCH, out_features=["stage2", "stage4"], num_channels=1)
    model = transformers.AutoBackbone.from_config(config)
    assert type(model) is ElsaSwinBackbone and model.channels == [24, 96]
    maps = model(image(channels=1)).feature_maps
    assert train_a_step(model, sum(m.square().sum() for m in maps)) == []
    core = core_backbone(state_of(model), (1, 3), in_chans=1)
    output = model.eval()(image(channels=1), output_hidden_states=True)
    assert equal(output.feature_maps, core(image(channels=1)))
    assert equal(output.feature_maps, model(image(channels=1)).feature_maps)
    model.save_pretrained(tmp_path)
    # What is loaded without memory: the buffer that no file has, and what the file lacks.
    again, report = ElsaSwinBackbone.from_pretrained(
        tmp_path, out_features=STAGES, output_loading_info=True
    )
    assert set(report["missing_keys"]) == {f"elsa_swin.norm{i}.{n}" for i in (0, 2)
                                           for n in ("weight", "bias")}  # fmt: skip
    maps = again(image(channels=1)).feature_maps
    assert len(maps) == 4 and equal((maps[1], maps[3]), output.feature_maps)
    assert torch.equal(again.elsa_swin.norm2.weight, torch.ones(48))


def test_first_weights_are_the_backbones():
    arch = {**ARCH, "lam": 1, "embed_dim": 48, "num_heads": (1, 2, 3, 4)}
    ours = ElsaSwinBackbone(ElsaSwinConfig(arch, initializer_range=0.1)).elsa_swin
    theirs = type(ours)(arch, out_indices=(3,), init_std=0.1)
    for (name, left), (_, right) in zip(
        ours.named_parameters(), theirs.named_parameters(), strict=True
    ):
        assert left.std().item() == pytest.approx(right.std().item(), rel=0.35, abs=1e-3), name


def test_gradient_checkpointing_changes_no_gradient():
    model = transformers.AutoModelForImageClassification.from_config(ElsaSwinConfig(ARCH)).train()
    grads = []
    for switch in (model.gradient_checkpointing_disable, model.gradient_checkpointing_enable):
        switch()
        loss = model(image(), labels=torch.tensor([0, 1])).loss
        grads.append(torch.autograd.grad(loss, list(model.parameters())))
    assert model.is_gradient_checkpointing and model.elsa_swin.layers[0].with_cp
    assert equal(*grads)


def test_a_checkpoint_of_the_original_release_loads(tmp_path):
    state = classifier_tensors(TINY)
    model = transformers.AutoModelForImageClassification.from_config(ElsaSwinConfig(ARCH))
    elsa_core.weights.load_backbone(model.elsa_swin, save(tmp_path, {"state_dict": state}))
    for name in ("layers.0.blocks.0.attn.ghost_head", "norm3.weight"):
        wanted = state[name.replace("norm3", "norm")]
        assert torch.equal(model.elsa_swin.get_parameter(name), wanted)


def upernet(backbone):
    config = transformers.UperNetConfig(
        backbone_config=backbone,
        hidden_size=16,
        pool_scales=[1, 2],
        auxiliary_in_channels=48,
        auxiliary_channels=8,
        num_labels=3,
    )
    model = transformers.UperNetForSemanticSegmentation(config)
    return model, lambda out: out.logits, dict(labels=torch.arange(3).repeat(2, 64, 22)[..., :64])


def mask2former(backbone):
    config = transformers.Mask2FormerConfig(
        backbone_config=backbone,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=16,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        dim_feedforward=16,
        num_queries=5,
        train_num_points=64,
        num_labels=3,
    )
    model = transformers.Mask2FormerForUniversalSegmentation(config)
    mask = torch.zeros(1, 64, 64)
    mask[:, 16:48, 16:48] = 1
    wanted = dict(mask_labels=[mask] * 2, class_labels=[torch.tensor([1]), torch.tensor([2])])
    return model, lambda out: out.masks_queries_logits, wanted


@pytest.mark.parametrize("make", [upernet, mask2former])
def test_models_of_transformers_on_the_backbone(make, tmp_path):
    model, prediction, labels = make(ElsaSwinConfig(ARCH, out_features=STAGES))
    train_a_step(model, model.train()(image(2, 64, 64), **labels).loss)
    model.eval().save_pretrained(tmp_path)
    with torch.no_grad():
        found = prediction(model(image(2, 64, 64)))
        assert found.isfinite().all() and found.std() > 0
        again = type(model).from_pretrained(tmp_path)
        assert torch.equal(prediction(again(image(2, 64, 64))), found)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (dict(arch="huge"), "arch must be one of tiny, small, base, got arch='huge'"),
        (dict(out_indices=[0, 1]), r"must be among stage1, .* \(indices 1..4\).* got \[0, 1\]"),
        (dict(out_features=["stage2", "stage1"]), "each once and in this order, got"),
        (dict(out_features=["stage1"], out_indices=[2]), "must name the same stages, got"),
    ],
)
def test_bad_use_is_one_sentence(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        ElsaSwinConfig(**options)


def test_features_that_were_not_built_are_refused():
    config = ElsaSwinConfig(ARCH, out_features=["stage1", "stage2"])
    model = ElsaSwinBackbone(config).eval()
    both = model(image()).feature_maps
    model.out_features = ["stage2"]
    assert equal(model(image()).feature_maps, both[1:])
    model.out_features = STAGES
    with pytest.raises(ValueError, match=r"made with, \['stage1', 'stage2'\], got"):
        model(image())
    config.out_features = ["stem"]
    with pytest.raises(ValueError, match="must be among stage1"):
        ElsaSwinBackbone(config)
