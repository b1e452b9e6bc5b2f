"""ELSA-VOLO's classifier: parity with timm's VOLO, MixToken, the kinds of classifiers, errors."""

import re

import pytest
import torch
from torch import nn
from volo_models import ARCH, build, randomise, resized, timm_volo, with_outlook_attention

import elsa_core.volo_classifier
from elsa_core import ELSAVolo, ELSAVoloClassifier, ELSAVoloTokens
from elsa_core.volo_classifier import ClassBlock, random_box, swap_box

PLAIN = dict(aux_head=False, mix_token=False)
MEAN = dict(class_token=False, **PLAIN)


def make(kind=ELSAVoloClassifier, **options):
    return build(kind, **({} if kind is ELSAVoloTokens else {"num_classes": 5}) | options)


def image(*size, batch=2, dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(batch, 3, *size, generator=generator, dtype=dtype)


def twin(model, size, **options):
    """timm's VOLO with the tensors of ``model``, whose local attention is timm's."""
    pytest.importorskip("timm", reason="timm is not installed")
    other = timm_volo(model.arch, size, num_classes=model.head.out_features, **options)
    state = model.state_dict()
    state["pos_embed"] = resized(state["pos_embed"], [length // 16 for length in size])
    other.to(model.pos_embed.dtype).load_state_dict(state)
    return other


def volo(**options):
    return randomise(with_outlook_attention(make(**options))).double()


@pytest.mark.parametrize("size", [(64, 64), (224, 224), (96, 80)])
@pytest.mark.parametrize(
    ("options", "timm_options"),
    [
        ({}, {}),
        ({"arch": {**ARCH, "qkv_bias": True}}, {}),
        (PLAIN, {"use_aux_head": False}),
        (MEAN, {"use_aux_head": False, "post_layers": None, "global_pool": "avg"}),
    ],
    ids=["published", "bias", "no aux head", "mean"],
)
def test_logits_are_those_of_timms_volo(size, options, timm_options):
    model = volo(**options).eval()
    other, x = twin(model, size, **timm_options).eval(), image(*size, dtype=torch.float64)
    with torch.no_grad():
        logits = model(x)
        torch.testing.assert_close(logits, other(x), rtol=0, atol=1e-9)
    assert logits.std() > 0.01


def test_logits_of_a_variant_are_those_of_timms_volo():
    model = randomise(with_outlook_attention(make(arch="volo_d1", img_size=224))).eval()
    x = image(224, 224, batch=1)
    with torch.no_grad():
        expected = twin(model, (224, 224)).eval()(x)
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("box", [None, (1, 0, 3, 2), (0, 1, 5, 4), (2, 3, 2, 4)], ids=str)
def test_training_is_that_of_timms_volo(box, monkeypatch):
    """The class token's logits, the patch tokens', the box, every gradient and statistic."""
    model = volo(mix_token=box is not None).train()
    other = twin(model, (80, 64), use_mix_token=box is not None).train()
    if box is not None:
        monkeypatch.setattr(elsa_core.volo_classifier, "random_box", lambda *_: torch.tensor(box))
        monkeypatch.setattr("timm.models.volo.rand_bbox", lambda *_, **__: box)
    x = image(80, 64, batch=3, dtype=torch.float64)
    logits, aux, found = model(x)
    token, other_aux, other_box = other.forward_train(x)
    assert tuple(found.tolist()) == other_box == (box or (0, 0, 0, 0))
    results, references = [logits, aux], [other.head(token), other_aux]
    torch.testing.assert_close(results, references, rtol=0, atol=1e-9)
    for one, two in (results, references):
        weights = torch.linspace(-1, 1, one.numel() + two.numel(), dtype=torch.float64)
        (torch.cat([one.flatten(), two.flatten()]) @ weights).backward()
    gradients = {name: p.grad for name, p in other.named_parameters()}
    position = model.pos_embed  # resized in our forward, but a parameter of timm's
    (expected,) = torch.autograd.grad(resized(position, (5, 4)), position, gradients["pos_embed"])
    gradients["pos_embed"] = expected
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            parameter.grad, gradients[name], rtol=1e-7, atol=1e-8, msg=f"{name} differs"
        )
    statistics = dict(other.named_buffers())
    for name, tensor in model.named_buffers():
        torch.testing.assert_close(tensor, statistics[name], msg=f"{name} differs")


def test_evaluation_adds_half_of_the_largest_patch_logits():
    model = randomise(make()).eval()
    with torch.no_grad():
        x = image(48, 64)
        token, patches, box = ELSAVoloTokens.forward(model, x)
        assert token.shape == (2, 24) and patches.shape == (2, 24, 3, 4) and not box.any()
        aux = torch.stack([model.aux_head(patches[:, :, i, j]) for i in range(3) for j in range(4)])
        torch.testing.assert_close(model(x), model.head(token) + 0.5 * aux.max(0).values)


@pytest.mark.parametrize("options", [{}, PLAIN, MEAN], ids=["published", "no aux head", "mean"])
def test_outputs_of_training_and_evaluation(options):
    model, x = make(**options), image(33, 50)
    results = model.train()(x)
    if not options:
        assert [tuple(t.shape) for t in results] == [(2, 5), (2, 12, 5), (4,)]
        assert results[2].dtype == torch.int64
    else:
        assert results.shape == (2, 5) and model.aux_head is None
    assert model.eval()(x).shape == (2, 5)
    names = set(model.state_dict())
    assert ("cls_token" in names) is ("post_network.0.attn.q.weight" in names) is (options != MEAN)
    assert ("aux_head.weight" in names) is (not options)
    assert "norm.weight" in names and "norm3.weight" not in names


def test_class_blocks_change_the_class_token_alone():
    model = randomise(make())
    tokens = torch.randn(2, 7, 24)
    for block in model.post_network:
        assert isinstance(block, ClassBlock)
        result = block(tokens)
        assert torch.equal(result[:, 1:], tokens[:, 1:])
        assert not torch.isclose(result[:, 0], tokens[:, 0]).all()


def test_dropout_reaches_the_class_blocks():
    model = make(drop_rate=0.1, attn_drop_rate=0.2, mix_token=False)
    for block in model.post_network:
        assert block.attn.attn_drop == 0.2
        assert [m.p for m in block.modules() if isinstance(m, nn.Dropout)] == [0.1]
        tokens = torch.randn(2, 9, 24)
        for layer in (block.attn, block.mlp):
            assert not torch.equal(layer(tokens), layer(tokens))
        block.eval()
        assert torch.equal(block(tokens), block(tokens))


def test_mix_token_swaps_and_swaps_back(monkeypatch):
    """With layers that do nothing, patches are the swapped image's and logits the image's own."""
    model = make(num_classes=24)
    box = torch.tensor([1, 1, 3, 2])
    monkeypatch.setattr(elsa_core.volo_classifier, "random_box", lambda *_: box)
    model.network = nn.ModuleList([nn.AvgPool3d((1, 2, 2), 2)])
    model.patch_embed = nn.Identity()
    monkeypatch.setattr(model, "_embed", lambda x: x.repeat(1, 1, 1, 24))
    monkeypatch.setattr(
        model, "_run_stages", lambda x: [x.unflatten(1, (-1, 2)).unflatten(3, (-1, 2)).mean((2, 4))]
    )
    model.post_network, model.norm, model.aux_head = None, nn.Identity(), nn.Identity()
    model.head = nn.Identity()
    x = torch.randn(3, 8, 6, 1)
    plain = x.unflatten(1, (-1, 2)).unflatten(3, (-1, 2)).mean((2, 4))
    _, patches, _ = ELSAVoloTokens.forward(model, x)
    mixed = plain.clone()
    mixed[:, 1:3, 1:2] = plain.flip(0)[:, 1:3, 1:2]
    torch.testing.assert_close(patches, mixed.expand(-1, -1, -1, 24).permute(0, 3, 1, 2))
    _, aux, found = model(x)
    torch.testing.assert_close(aux, plain.expand(-1, -1, -1, 24).flatten(1, 2))
    assert torch.equal(found, box)


@pytest.mark.parametrize("box", [(0, 0, 0, 0), (0, 0, 5, 4), (1, 2, 4, 3), (4, 3, 5, 4)], ids=str)
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_swapping_a_box_twice_is_the_identity(box, batch):
    x = torch.randn(batch, 5, 4, 3)
    once = swap_box(x, torch.tensor(box))
    top, left, bottom, right = box
    expected = x.clone()
    expected[:, top:bottom, left:right] = x.flip(0)[:, top:bottom, left:right]
    assert torch.equal(once, expected)
    assert torch.equal(swap_box(once, torch.tensor(box)), x)


def test_boxes_have_the_published_distribution():
    """Relative area uniform before clipping, centre uniform, inside the map."""
    torch.manual_seed(0)
    rows, columns, draws = 40, 60, 3000
    boxes = torch.stack([random_box(rows, columns) for _ in range(draws)])
    top, left, bottom, right = boxes.unbind(1)
    assert boxes.dtype == torch.int64 and boxes.min() >= 0
    assert (top <= bottom).all() and (left <= right).all()
    assert bottom.max() == rows and right.max() == columns

    # The reference: what VOLO draws with NumPy, lam ~ Beta(1, 1), once per batch.
    generator = torch.Generator().manual_seed(1)
    area, y, x = torch.rand(3, draws, generator=generator, dtype=torch.float64)
    half_h, half_w = (rows * area.sqrt()).long() // 2, (columns * area.sqrt()).long() // 2
    y, x = (y * rows).long(), (x * columns).long()
    expected = [(y - half_h).clamp(min=0), (x - half_w).clamp(min=0)]
    expected += [(y + half_h).clamp(max=rows), (x + half_w).clamp(max=columns)]
    for result, reference in zip(boxes.unbind(1), expected, strict=True):
        quantiles = torch.linspace(0.05, 0.95, 19)
        length = reference.max().item()
        result, reference = (t.float().quantile(quantiles) / length for t in (result, reference))
        torch.testing.assert_close(result, reference, rtol=0, atol=0.05)


@pytest.mark.parametrize(
    ("numbers", "size", "box"),
    [
        ((0.0, 0.5, 0.5), (14, 14), [7, 7, 7, 7]),
        ((0.999999, 0.5, 0.5), (14, 14), [1, 1, 13, 13]),
        ((0.25, 0.5, 0.0), (14, 20), [4, 0, 10, 5]),
        ((0.25, 0.999, 0.999), (8, 12), [5, 8, 8, 12]),
        ((0.5, 0.1, 0.8), (24, 24), [0, 11, 10, 24]),
        ((0.9, 0.5, 0.5), (1, 1), [0, 0, 0, 0]),
    ],
)
def test_sides_are_rounded_as_published(numbers, size, box, monkeypatch):
    """Down, and then down to even numbers."""
    monkeypatch.setattr(torch, "rand", lambda *_, **__: torch.tensor(numbers))
    assert random_box(*size).tolist() == box


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (2, 3)])
def test_boxes_of_small_maps_stay_inside(size):
    torch.manual_seed(0)
    for _ in range(50):
        top, left, bottom, right = random_box(*size).tolist()
        assert 0 <= top <= bottom <= size[0] and 0 <= left <= right <= size[1]


def test_evaluation_draws_nothing():
    model, x = make().eval(), image(32, 32)
    before = torch.get_rng_state()
    model(x)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("options", [{}, PLAIN, MEAN], ids=["published", "no aux head", "mean"])
def test_every_parameter_gets_a_gradient(options):
    """Which DistributedDataParallel demands, of all that is returned in training."""
    torch.manual_seed(0)
    model = make(**options).train()
    results = model(image(48, 64))
    results = results[:2] if isinstance(results, tuple) else (results,)
    sum(result.square().mean() for result in results).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("frozen_stages", [0, 2, 4])
def test_frozen_stages_leave_the_classifier(frozen_stages):
    model = make(frozen_stages=frozen_stages)
    trained = {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    classifier = {"cls_token", "post_network", "norm", "head", "aux_head"}
    assert trained - {"network", "pos_embed"} == classifier
    assert ("network" in trained) is (frozen_stages < 4)


def test_without_class_token_patches_are_the_backbones_last_map():
    backbone = randomise(build(ELSAVolo, out_indices=(3,))).eval()
    model = make(ELSAVoloTokens, class_token=False, mix_token=False).eval()
    state = backbone.state_dict()
    model.load_state_dict({name.replace("norm3", "norm"): t for name, t in state.items()})
    (expected,) = backbone(image(40, 64))
    token, patches, _ = model(image(40, 64))
    torch.testing.assert_close(patches, expected)
    torch.testing.assert_close(token, expected.mean((2, 3)))


@pytest.mark.parametrize("std", [0.02, 0.1])
def test_initialisation(std):
    arch = {**ARCH, "embed_dims": (48, 96)}
    model = make(arch=arch, init_std=std, num_classes=40)
    layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
    assert {model.head, model.aux_head, model.post_network[1].attn.q} < set(layers)
    for layer in layers:
        assert layer.weight.std().item() == pytest.approx(std, rel=0.1)
        assert layer.bias is None or not layer.bias.any()
    assert model.cls_token.std().item() == pytest.approx(0.02, rel=0.3)


def test_no_token_is_mixed_without_an_aux_head():
    model = make(aux_head=False)
    assert not model.mix_token and make().mix_token and not make(mix_token=False).mix_token


def test_a_position_of_another_grid_is_resized_at_load(caplog):
    state = make(img_size=96).state_dict()
    model = make(img_size=64)
    model.load_state_dict(state)
    torch.testing.assert_close(model.pos_embed, resized(state["pos_embed"], (4, 4)))
    assert len(caplog.records) == 1


def test_a_backbones_tensors_are_reported():
    with pytest.raises(RuntimeError, match="Missing key.*cls_token"):
        make().load_state_dict(build(ELSAVolo).state_dict())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"class_token": False}, "aux_head needs class_token, got class_token=False"),
        ({"aux_head": False, "mix_token": True}, "mix_token needs aux_head, got aux_head=False"),
        ({"arch": "volo_d6"}, "got arch='volo_d6'"),
        ({"drop_rate": 1.0}, "drop_rate must be in [0, 1), got drop_rate=1.0"),
    ],
)
def test_errors_state_rule_and_value(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make(**options)


@pytest.mark.parametrize("name", ["pyramid", "out_indices"])
def test_maps_belong_to_the_backbone(name):
    with pytest.raises(TypeError, match=name):
        make(ELSAVoloTokens, **{name: (0,)})
