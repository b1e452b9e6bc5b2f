"""The ELSA-VOLO backbone: parity with timm's VOLO, names, sizes, freezing, gradients, errors."""

import logging
import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from volo_models import ARCH, build, randomise, resized, timm_volo, with_outlook_attention

from elsa_core import ELSAVolo, ELSAVoloClassifier
from elsa_core.blocks import DropPath
from elsa_core.variants import VOLO_VARIANTS

SUBSETS = [(0, 1, 2, 3), (0,), (1,), (2,), (3,), (0, 2), (1, 3), (2, 3)]
PARTS = ("weight", "bias")
STRIDES = {False: [8, 16, 16, 16], True: [4, 8, 16, 32]}


def make(**options):
    return build(ELSAVolo, **options)


def image(*size, batch=2, dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(batch, 3, *size, generator=generator, dtype=dtype)


def plain_norms(model):
    """Output norms that do nothing to what is normalised already."""
    for index in model.out_indices:
        nn.init.ones_(model.get_submodule(f"norm{index}").weight)
        nn.init.zeros_(model.get_submodule(f"norm{index}").bias)
    return model


@pytest.mark.parametrize(
    ("arch", "size", "dtype", "atol"),
    [
        ("volo_d1", (224, 224), torch.float32, 1e-5),
        (ARCH, (64, 64), torch.float64, 1e-9),
        (ARCH, (224, 224), torch.float64, 1e-9),
        (ARCH, (320, 256), torch.float64, 1e-9),
        ({**ARCH, "qkv_bias": True, "mlp_ratio": 4}, (48, 96), torch.float64, 1e-9),
    ],
)
def test_maps_are_those_of_timms_volo(arch, size, dtype, atol):
    pytest.importorskip("timm", reason="timm is not installed")
    side = 224 if arch == "volo_d1" else 64
    model = with_outlook_attention(make(arch=arch, img_size=side))
    model = plain_norms(randomise(model).to(dtype)).eval()
    other = timm_volo(arch, size, num_classes=0, post_layers=None, global_pool="avg")
    other = other.to(dtype).eval()
    state = {name: t for name, t in model.state_dict().items() if not re.match("norm[0-3]", name)}
    state["pos_embed"] = resized(state["pos_embed"], [length // 16 for length in size])
    state |= {"norm.weight": model.norm3.weight, "norm.bias": model.norm3.bias}
    other.load_state_dict(state)
    x = image(*size, batch=1, dtype=dtype)
    with torch.no_grad():
        maps, expected = model(x), other.forward_intermediates(x, intermediates_only=True)
    for result, reference, dim in zip(maps, expected, model.num_features, strict=True):
        reference = F.layer_norm(reference.permute(0, 2, 3, 1), (dim,)).permute(0, 3, 1, 2)
        torch.testing.assert_close(result, reference, rtol=0, atol=atol)


def test_pyramid_is_made_of_the_maps():
    model = make(pyramid=True).eval()
    x = image(50, 70)
    first, *_, last = model.stage_maps(x)[1:]
    first, last = (t.permute(0, 3, 1, 2) for t in (first, last))
    wanted = [model.upsample(first), first, last, F.max_pool2d(last, 2, ceil_mode=True)]
    for index, (result, raw) in enumerate(zip(model(x), wanted, strict=True)):
        norm = model.get_submodule(f"norm{index}")
        assert torch.equal(result, norm(raw.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


def volo_shapes(depths, dims, heads, groups, ratio=3, stem=64, side=14):
    """Names and shapes of the classifier of 1000 classes; ``groups`` of 8 channels, K = 5."""
    shapes = {}
    dim, wide = dims

    def layer(name, *weight, bias=True):
        shapes[f"{name}.weight"] = weight
        if bias:
            shapes[f"{name}.bias"] = weight[:1]

    def block(name, width):
        for norm in ("norm1", "norm2"):
            layer(f"{name}.{norm}", width)
        layer(f"{name}.mlp.fc1", ratio * width, width)
        layer(f"{name}.mlp.fc2", width, ratio * width)

    for index, channels in enumerate((3, stem, stem)):
        size = 3 if index else 7
        layer(f"patch_embed.conv.{3 * index}", stem, channels, size, size, bias=False)
        layer(f"patch_embed.conv.{3 * index + 1}", stem)
        for statistic in ("running_mean", "running_var"):
            shapes[f"patch_embed.conv.{3 * index + 1}.{statistic}"] = (stem,)
        shapes[f"patch_embed.conv.{3 * index + 1}.num_batches_tracked"] = ()
    layer("patch_embed.proj", dim, stem, 4, 4)
    layer("network.1.proj", wide, dim, 2, 2)
    shapes |= {"pos_embed": (1, side, side, wide), "cls_token": (1, 1, wide)}
    for index in range(depths[0]):
        name = f"network.0.{index}"
        block(name, dim)
        layer(f"{name}.attn.pre_proj", 16 * groups + dim, dim, 1, 1, bias=False)
        layer(f"{name}.attn.attn.0", 8 * groups, 8, 5, 5)
        layer(f"{name}.attn.attn.2", 25 * heads, 8 * groups, 1, 1)
        shapes[f"{name}.attn.ghost_head"] = (2, 1, dim, 5, 5)
        layer(f"{name}.attn.post_proj", dim, dim)
    for stage, depth in enumerate(depths[1:], 2):
        for index in range(depth):
            name = f"network.{stage}.{index}"
            block(name, wide)
            layer(f"{name}.attn.qkv", 3 * wide, wide, bias=False)
            layer(f"{name}.attn.proj", wide, wide)
    for index in range(2):
        name = f"post_network.{index}"
        block(name, wide)
        layer(f"{name}.attn.q", wide, wide, bias=False)
        layer(f"{name}.attn.kv", 2 * wide, wide, bias=False)
        layer(f"{name}.attn.proj", wide, wide)
    layer("norm", wide)
    layer("head", 1000, wide)
    layer("aux_head", 1000, wide)
    return shapes


@pytest.mark.parametrize(
    ("arch", "volo", "entries"),
    [
        ("volo_d1", ((4, 4, 8, 2), (192, 384), 6, 16), 272),
        ("volo_d2", ((6, 4, 10, 4), (256, 512), 8, 22), 348),
        ("volo_d3", ((8, 8, 16, 4), (256, 512), 8, 22), 490),
        ("volo_d4", ((8, 8, 16, 4), (384, 768), 12, 32), 490),
        ("volo_d5", ((12, 12, 20, 4), (384, 768), 12, 32, 4, 128), 642),
    ],
)
def test_names_and_shapes_are_volos(arch, volo, entries):
    with torch.device("meta"):
        whole, model, pyramid = (
            ELSAVoloClassifier(arch),
            ELSAVolo(arch),
            ELSAVolo(arch, pyramid=True),
        )
    shapes = {name: tuple(tensor.shape) for name, tensor in whole.state_dict().items()}
    assert shapes == volo_shapes(*volo) and len(shapes) == entries
    dim, wide = volo[1]
    classifier = r"(cls_token|post_network|norm|head|aux_head)(\.|$)"
    stages = {name: shape for name, shape in shapes.items() if not re.match(classifier, name)}
    norms = [dim, wide, wide, wide]
    for maps in (model, pyramid):
        if maps is pyramid:
            norms = [dim // 2, dim, wide, wide]
            stages |= {"upsample.weight": (dim, dim // 2, 2, 2), "upsample.bias": (dim // 2,)}
        expected = {f"norm{i}.{part}": (n,) for i, n in enumerate(norms) for part in PARTS} | stages
        assert {name: tuple(t.shape) for name, t in maps.state_dict().items()} == expected
        assert maps.num_features == norms


@pytest.mark.parametrize(("options", "std"), [({}, 0.02), ({"init_std": 0.1}, 0.1)])
def test_initialisation(options, std):
    model = make(arch={**ARCH, "embed_dims": (48, 48)}, **options)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            assert module.weight.std().item() == pytest.approx(std, rel=0.1), name
            assert module.bias is None or not module.bias.any(), name
    assert model.pos_embed.std().item() == pytest.approx(0.02, rel=0.1)


def test_meta_initialisation():
    """As FSDP does: every module with parameters of its own fills them."""
    with torch.device("meta"):
        model = build(ELSAVoloClassifier)
    model.to_empty(device="cpu")
    for tensor in model.state_dict().values():
        tensor.fill_(torch.nan if tensor.is_floating_point() else -1)
    for module in model.modules():
        if [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
            module.reset_parameters()
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
    for parameter in (model.pos_embed, model.cls_token):
        assert parameter.std().item() == pytest.approx(0.02, rel=0.4)


@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize("name", ["volo_d1", "volo_d3"])
def test_drop_path_rises_linearly_after_the_first_stage(name, local):
    with torch.device("meta"):
        model = ELSAVolo(name, drop_path_rate=0.5, local_drop_path=local)
    rates = [m.rate for m in model.modules() if isinstance(m, DropPath)]
    depths = VOLO_VARIANTS[name].depths
    expected = [0.5 * index / (sum(depths) - 1) for index in range(sum(depths))]
    if not local:
        expected[: depths[0]] = [0] * depths[0]
    assert rates == pytest.approx(expected) and rates[-1] == 0.5


def test_drop_path_of_a_single_block_per_stage():
    model = make(arch={**ARCH, "depths": (1, 1, 1, 1)}, drop_path_rate=0.3, out_indices=(0, 1))
    assert [m.rate for m in model.modules() if isinstance(m, DropPath)] == pytest.approx([0, 0.1])


def test_rates_reach_their_layers():
    model = make(drop_rate=0.1, attn_drop_rate=0.2)
    assert {m.p for m in model.modules() if isinstance(m, nn.Dropout)} == {0.1}
    assert {m.attn_drop for m in model.modules() if hasattr(m, "attn_drop")} == {0.2}
    assert not torch.equal(model(image(32, 32))[3], model(image(32, 32))[3])


@pytest.mark.parametrize("pyramid", [False, True])
@pytest.mark.parametrize("size", [(64, 96), (33, 47), (1, 1), (15, 16), (17, 160)])
def test_images_of_any_size_are_padded_with_zeros(size, pyramid):
    model = make(pyramid=pyramid).eval()
    x = image(*size)
    rows, columns = (-(-length // 16) * 16 for length in size)
    padded = F.pad(x, (0, columns - size[1], 0, rows - size[0]))
    with torch.no_grad():
        maps, expected = model(x), model(padded)
    assert model.strides == STRIDES[pyramid]
    for index, (result, reference) in enumerate(zip(maps, expected, strict=True)):
        height, width = (math.ceil(n / model.strides[index]) for n in (rows, columns))
        assert result.shape == (2, model.num_features[index], height, width)
        assert result.permute(0, 2, 3, 1).is_contiguous()
        assert torch.equal(result, reference) and result.isfinite().all()


def test_empty_batch():
    shapes = [tuple(t.shape) for t in make(pyramid=True).eval()(torch.randn(0, 3, 32, 64))]
    assert shapes == [(0, 8, 8, 16), (0, 16, 4, 8), (0, 24, 2, 4), (0, 24, 1, 2)]


def test_images_of_a_batch_do_not_meet():
    model, images = randomise(make()).eval(), image(40, 52, batch=3)
    whole = model(images)
    for i in range(3):
        part = tuple(together[i : i + 1] for together in whole)
        torch.testing.assert_close(model(images[i : i + 1]), part, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("pyramid", [False, True])
@pytest.mark.parametrize("out_indices", SUBSETS[1:], ids=str)
def test_out_indices_select_maps(out_indices, pyramid, caplog):
    whole = randomise(make(pyramid=pyramid)).eval()
    model = make(pyramid=pyramid, out_indices=out_indices).eval()
    model.load_state_dict(whole.state_dict())
    needed = max(out_indices) >= 2 if pyramid else max(out_indices) > 0
    assert (len(model.network) > 1) is hasattr(model, "pos_embed") is needed
    assert bool(caplog.records) is (len(model.network) < 5)
    x = image(40, 64)
    expected = whole(x)
    assert all(map(torch.equal, model(x), [expected[index] for index in out_indices]))


@pytest.mark.parametrize("pyramid", [False, True])
@pytest.mark.parametrize("out_indices", SUBSETS, ids=str)
def test_a_state_of_the_other_kind_of_maps_is_reported(out_indices, pyramid):
    """Some output norms have the same shapes, but belong to other maps."""
    with pytest.raises(RuntimeError, match="size mismatch|Unexpected key"):
        make(pyramid=pyramid, out_indices=out_indices).load_state_dict(
            make(pyramid=not pyramid).state_dict()
        )


def test_a_classifiers_tensors_are_reported():
    with pytest.raises(RuntimeError, match='Unexpected key.*"cls_token"'):
        make().load_state_dict(build(ELSAVoloClassifier).state_dict())
    with pytest.raises(RuntimeError, match='Missing key.*"network.4.0.norm1.weight"'):
        make().load_state_dict(make(out_indices=(0, 2)).state_dict())


@pytest.mark.parametrize("size", [(64, 64), (96, 64), (224, 224), (16, 48), (320, 160)])
def test_position_is_resized_bicubically(size):
    model = make().double()
    grid = tuple(length // 16 for length in size)
    expected = resized(model.pos_embed, grid)
    x = torch.zeros(1, *grid, 1, dtype=torch.float64)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(model.position(x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("given", "wanted"), [((4, 4), 96), ((3, 7), 64), ((14, 14), 32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_load_resizes_the_position(given, wanted, dtype, caplog):
    state = make().state_dict()
    state["pos_embed"] = position = torch.randn(1, *given, 24).to(dtype)
    model = nn.ModuleDict({"backbone": make(img_size=wanted)})
    model.load_state_dict({f"backbone.{name}": t for name, t in state.items()})
    size = (wanted // 16, wanted // 16)
    expected = resized(position.float(), size).to(dtype).float()
    torch.testing.assert_close(model["backbone"].pos_embed, expected, rtol=1e-3, atol=1e-5)
    (record,) = caplog.records
    message = f"backbone.pos_embed is resized from {given} to {size} positions"
    assert record.getMessage() == message and record.levelno == logging.WARNING
    assert state["pos_embed"] is position


@pytest.mark.parametrize("shape", [(1, 4, 4, 12), (1, 16, 24), (2, 4, 4, 24), (1, 0, 4, 24)])
def test_a_position_that_cannot_be_resized_is_reported(shape):
    state = {**make().state_dict(), "pos_embed": torch.zeros(shape)}
    with pytest.raises(RuntimeError, match="size mismatch for pos_embed"):
        make().load_state_dict(state)


@pytest.mark.parametrize("pyramid", [False, True])
@pytest.mark.parametrize("frozen_stages", range(-1, 5))
def test_frozen_stages_stay_frozen(frozen_stages, pyramid):
    model = randomise(make(frozen_stages=frozen_stages, pyramid=pyramid, drop_rate=0.1))
    frozen = ["patch_embed."] if frozen_stages >= 0 else []
    if frozen_stages >= 1:
        frozen += ["network.0.", "network.1.", "pos_embed", "pos_drop."]
    frozen += [f"network.{stage}." for stage in range(2, frozen_stages + 1)]
    model.eval()
    assert model.train() is model and model.training
    for name, module in model.named_modules():
        if name not in ("", "network"):
            assert module.training is not f"{name}.".startswith(tuple(frozen)), name
    before = {name: tensor.clone() for name, tensor in model.named_buffers()}
    sum(output.square().mean() for output in model(image(48, 48))).backward()
    for name, tensor in model.named_buffers():
        assert torch.equal(tensor, before[name]) is (frozen_stages >= 0), name
    for name, parameter in model.named_parameters():
        expected = name.startswith(tuple(frozen))
        assert parameter.requires_grad is not expected, name
        assert (parameter.grad is None) is expected, name


def test_norm_eval_keeps_the_statistics():
    model = randomise(make(norm_eval=True))
    before = {name: tensor.clone() for name, tensor in model.named_buffers()}
    x = image(48, 48)
    trained = model.eval().train()(x)
    trained[0].square().mean().backward()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.named_buffers())
    assert model.patch_embed.conv[1].weight.grad.any() and model.network.training
    assert all(map(torch.equal, trained, model.eval()(x)))


@pytest.mark.parametrize("frozen_stages", [-1, 2])
@pytest.mark.parametrize("kind", [ELSAVolo, ELSAVoloClassifier])
def test_recomputation_gives_the_same_gradients(kind, frozen_stages):
    calls = {}

    def gradients(with_cp):
        model = build(kind, with_cp=with_cp, drop_path_rate=0.5, frozen_stages=frozen_stages)
        hook = lambda *_: calls.update({with_cp: calls.get(with_cp, 0) + 1})  # noqa: E731
        for name, module in model.named_modules():
            if name.endswith(".norm1"):
                module.register_forward_hook(hook)
        torch.manual_seed(1)
        sum(output.float().square().mean() for output in model(image(40, 44))).backward()
        return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    plain, recomputed = gradients(False), gradients(True)
    assert all(gradient is not None for gradient in plain.values())
    torch.testing.assert_close(recomputed, plain, rtol=0, atol=0)
    assert calls[True] == (2 * calls[False] if frozen_stages < 0 else 2 * calls[False] - 3)


@pytest.mark.parametrize("pyramid", [False, True])
@pytest.mark.parametrize("out_indices", SUBSETS, ids=str)
def test_every_parameter_gets_a_gradient(out_indices, pyramid):
    """Which DistributedDataParallel demands."""
    model = make(out_indices=out_indices, pyramid=pyramid, attn_drop_rate=0.1, drop_rate=0.1)
    sum((output**2).mean() for output in model(image(64, 48))).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arch": "tiny"}, "arch must be one of volo_d1, volo_d2, volo_d3, volo_d4, volo_d5, got"),
        ({"img_size": 0}, "img_size must be an integer of at least 1, got img_size=0"),
        ({"img_size": (64, 64)}, "got img_size=(64, 64)"),
        ({"img_size": True}, "got img_size=True"),
        ({"out_indices": ()}, "got out_indices=()"),
        ({"out_indices": (0, 4)}, "stages 0..3, each once and in ascending order"),
        ({"out_indices": (2, 1)}, "got out_indices=(2, 1)"),
        ({"frozen_stages": 5}, "at most 4, got frozen_stages=5"),
        ({"frozen_stages": -2}, "got frozen_stages=-2"),
        ({"init_std": 0.0}, "init_std must be positive, got init_std=0.0"),
        ({"drop_path_rate": 1.0}, "drop_path_rate must be in [0, 1), got drop_path_rate=1.0"),
        ({"drop_rate": 2}, "got drop_rate=2"),
        ({"attn_drop_rate": float("nan")}, "got attn_drop_rate=nan"),
    ],
)
def test_errors_state_rule_and_value(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make(**options)


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 4, 32, 32), (1, 1, 3, 32, 32)])
def test_input_of_another_shape_is_an_error(shape):
    message = re.escape(f"input must have the shape (B, 3, H, W), got {shape}")
    with pytest.raises(ValueError, match=message):
        make()(torch.randn(shape))
