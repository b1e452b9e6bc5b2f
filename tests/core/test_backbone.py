"""The backbone's interface: names, shapes, outputs, freezing, recomputation, errors."""

import math
import re

import pytest
import torch

from elsa_core import VARIANTS, ELSASwin
from elsa_core.blocks import DropPath
from elsa_core.layers import ELSA, WindowAttention

ARCH = {
    "embed_dim": 12,
    "depths": (1, 1, 2, 2),
    "num_heads": (1, 2, 2, 4),
    "group_width": 4,
    "kernel_size": 5,
    "window_size": 3,
}


def make(seed=0, **options):
    torch.manual_seed(seed)
    return ELSASwin(ARCH, **options)


def original_shapes(embed_dim, depths, heads, group_width):
    """Names and shapes in an original checkpoint, bookkeeping aside; K and window are 7."""
    shapes = {}

    def layer(name, *weight, bias=True):
        shapes[f"{name}.weight"] = weight
        if bias:
            shapes[f"{name}.bias"] = weight[:1]

    layer("patch_embed.proj", embed_dim, 3, 4, 4)
    layer("patch_embed.norm", embed_dim)
    for i, (depth, head) in enumerate(zip(depths, heads, strict=True)):
        dim = embed_dim * 2**i
        layer(f"norm{i}", dim)
        for j in range(depth):
            block = f"layers.{i}.blocks.{j}"
            for norm in ("norm1", "norm2"):
                layer(f"{block}.{norm}", dim)
            layer(f"{block}.mlp.fc1", 4 * dim, dim)
            layer(f"{block}.mlp.fc2", dim, 4 * dim)
            layer(f"{block}.attn.post_proj", dim, dim)
            if i == 3:
                layer(f"{block}.attn.pre_proj", 3 * dim, dim)
                shapes[f"{block}.attn.rb"] = (head, 169)
            else:
                dim_qk = math.ceil(dim // 3 * 2 / group_width) * group_width
                layer(f"{block}.attn.pre_proj", 2 * dim_qk + dim, dim, 1, 1)
                layer(f"{block}.attn.attn.0", dim_qk, group_width, 7, 7)
                layer(f"{block}.attn.attn.2", 49 * head, dim_qk, 1, 1)
                shapes[f"{block}.attn.ghost_head"] = (1, dim, 7, 7)
        if i < 3:
            layer(f"layers.{i}.downsample.norm", 4 * dim)
            layer(f"layers.{i}.downsample.reduction", 2 * dim, 4 * dim, bias=False)
    return shapes


@pytest.mark.parametrize(
    ("arch", "original", "parameters"),
    [
        ("tiny", (96, (2, 2, 6, 2), (3, 6, 12, 24), 4), 28_373_322),
        ("small", (96, (2, 2, 18, 2), (3, 6, 12, 24), 8), 52_106_970),
        ("base", (128, (2, 2, 18, 2), (4, 8, 16, 32), 8), 91_659_256),
    ],
)
def test_names_and_shapes_are_the_originals(arch, original, parameters):
    with torch.device("meta"):
        model = ELSASwin(arch)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert shapes == original_shapes(*original)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert model.num_features == [original[0] * 2**i for i in range(4)]


@pytest.mark.parametrize(("options", "std"), [({}, 0.02), ({"init_std": 0.1}, 0.1)])
def test_initialisation(options, std):
    torch.manual_seed(0)
    model = ELSASwin({**ARCH, "embed_dim": 48}, **options)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            assert module.weight.std().item() == pytest.approx(std, rel=0.1), name
            assert module.bias is None or not module.bias.any(), name
        if isinstance(module, torch.nn.LayerNorm):
            assert (module.weight == 1).all() and not module.bias.any(), name
    assert model.layers[3].blocks[0].attn.rb.std().item() == pytest.approx(0.02, rel=0.3)


def test_only_the_last_stage_has_windows_and_odd_blocks_shift():
    model = make()
    kinds = [[type(block.attn) for block in stage.blocks] for stage in model.layers]
    assert kinds == [[ELSA], [ELSA], [ELSA, ELSA], [WindowAttention, WindowAttention]]
    assert [block.attn.shift for block in model.layers[3].blocks] == [0, 1]


@pytest.mark.parametrize("size", [(64, 96), (37, 61), (1, 1), (33, 4)])
def test_outputs_have_strides_4_to_32(size):
    outputs = make().eval()(torch.randn(2, 3, *size))
    assert isinstance(outputs, tuple)
    for i, output in enumerate(outputs):
        height, width = (math.ceil(length / (4 * 2**i)) for length in size)
        assert output.shape == (2, 12 * 2**i, height, width)
        assert output.permute(0, 2, 3, 1).is_contiguous()
        assert output.isfinite().all()


def test_empty_batch():
    assert [tuple(output.shape) for output in make()(torch.randn(0, 3, 32, 64))] == [
        (0, 12, 8, 16),
        (0, 24, 4, 8),
        (0, 48, 2, 4),
        (0, 96, 1, 2),
    ]


def test_outputs_are_normalised_per_position():
    for output in make().eval()(torch.randn(1, 3, 64, 64)):
        assert output.mean(1).abs().max() <= 1e-5


def test_evaluation_is_deterministic_and_training_is_not():
    model = make(drop_path_rate=0.5, drop_rate=0.1)
    image = torch.randn(2, 3, 40, 40)
    assert not torch.equal(model(image)[3], model(image)[3])
    assert model.eval() is model
    assert all(map(torch.equal, model(image), model(image)))
    assert model.train() is model


def test_images_of_a_batch_do_not_meet():
    model = make().eval()
    images = torch.randn(3, 3, 40, 52)
    whole = model(images)
    for i in range(3):
        part = tuple(together[i : i + 1] for together in whole)
        torch.testing.assert_close(model(images[i : i + 1]), part, atol=1e-4, rtol=1e-4)


def test_drop_path_rises_linearly_over_all_blocks():
    rates = [m.rate for m in make(drop_path_rate=0.5).modules() if isinstance(m, DropPath)]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5])


def test_rates_reach_their_layers():
    model = make(drop_rate=0.1, attn_drop_rate=0.2)
    assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} == {0.1}
    assert {block.attn.attn_drop for stage in model.layers for block in stage.blocks} == {0.2}


@pytest.mark.parametrize("out_indices", [(0,), (1, 3), [2]])
def test_out_indices_select_stages(out_indices):
    image = torch.randn(1, 3, 48, 48)
    whole = make().eval()
    model = make(out_indices=out_indices).eval()
    model.load_state_dict(whole.state_dict())
    assert model.out_indices == tuple(out_indices)
    assert {name.split(".")[0] for name, _ in model.named_parameters() if "norm" in name[:4]} == {
        f"norm{i}" for i in out_indices
    }
    expected = whole(image)
    wanted = [expected[i] for i in out_indices]
    torch.testing.assert_close([*model(image)], wanted, rtol=0, atol=0)


@pytest.mark.parametrize("frozen_stages", [-1, 0, 1, 3, 4])
def test_frozen_stages_stay_frozen(frozen_stages):
    model = make(frozen_stages=frozen_stages, drop_path_rate=0.2)
    expected = ["patch_embed."] if frozen_stages >= 0 else []
    for i in range(frozen_stages):
        expected += [f"layers.{i}.", f"norm{i}."]
    model.eval()
    assert model.train() is model
    assert model.training
    for name, module in model.named_modules():
        if name and name != "layers" and name != "pos_drop":
            assert module.training is not f"{name}.".startswith(tuple(expected)), name
    outputs = model(torch.randn(2, 3, 48, 48))
    if frozen_stages < 4:
        sum(output.square().mean() for output in outputs).backward()
    else:
        assert not any(output.requires_grad for output in outputs)
    for name, parameter in model.named_parameters():
        frozen = name.startswith(tuple(expected))
        assert parameter.requires_grad is not frozen, name
        assert (parameter.grad is None) is frozen, name


@pytest.mark.parametrize("frozen_stages", [-1, 1])
def test_recomputation_gives_the_same_gradients_and_keeps_less(frozen_stages):
    image = torch.randn(2, 3, 40, 44)
    calls, kept = {False: 0, True: 0}, {False: {}, True: {}}

    def gradients(with_cp):
        model = make(with_cp=with_cp, drop_path_rate=0.3, frozen_stages=frozen_stages)

        def count(*_):
            calls[with_cp] += 1

        for stage in model.layers:
            for block in stage.blocks:
                block.norm1.register_forward_hook(count)

        def note(tensor):
            storage = tensor.untyped_storage()
            kept[with_cp][storage.data_ptr()] = storage.nbytes()
            return tensor

        torch.manual_seed(1)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            maps = model(image)
        sum(output.square().mean() for output in maps).backward()
        for parameter in model.parameters():
            kept[with_cp].pop(parameter.untyped_storage().data_ptr(), None)
        return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    plain, recomputed = gradients(False), gradients(True)
    assert sum(kept[True].values()) < sum(kept[False].values()) / 2
    assert all(gradient is not None for gradient in plain.values())
    torch.testing.assert_close(recomputed, plain, rtol=0, atol=0)
    trained_blocks = 6 if frozen_stages < 1 else 5
    assert calls == {False: 6, True: 6 + trained_blocks}


@pytest.mark.parametrize("out_indices", [(0, 1, 2, 3), (0, 1, 2), (1,)])
def test_every_parameter_gets_a_gradient(out_indices):
    """Which DistributedDataParallel demands."""
    model = ELSASwin({**ARCH, "lam": 1}, 3, 0.1, 0.1, 0.1, out_indices)
    sum((output**2).mean() for output in model(torch.randn(1, 3, 64, 64))).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def test_autocast_agrees_with_single_precision():
    model = make().eval()
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(image)
        with torch.autocast("cpu", torch.bfloat16):
            outputs = model(image)
    for output, reference in zip(outputs, expected, strict=True):
        assert (output.float() - reference).abs().mean() < 0.02


def test_training_under_autocast():
    model = make(with_cp=True)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(torch.randn(1, 3, 64, 64))
    sum(output.float().square().mean() for output in outputs).backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


def test_free_arch_with_two_stages():
    arch = {"embed_dim": 6, "depths": [1, 1], "num_heads": [2, 3], "group_width": 2}
    outputs = ELSASwin(arch, out_indices=(0, 1), in_chans=1)(torch.randn(1, 1, 30, 30))
    assert [tuple(output.shape) for output in outputs] == [(1, 6, 8, 8), (1, 12, 4, 4)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arch": "large"}, "arch must be one of tiny, small, base, got arch='large'"),
        ({"arch": {"embed_dim": 96}}, "missing depths, num_heads, group_width"),
        ({"out_indices": ()}, "got out_indices=()"),
        ({"out_indices": (0, 4)}, "stages 0..3, each once and in ascending order"),
        ({"out_indices": (-1,)}, "got out_indices=(-1,)"),
        ({"out_indices": (1, 1)}, "got out_indices=(1, 1)"),
        ({"out_indices": (2, 1)}, "got out_indices=(2, 1)"),
        ({"frozen_stages": 5}, "at most 4, got frozen_stages=5"),
        ({"frozen_stages": -2}, "got frozen_stages=-2"),
        ({"init_std": 0.0}, "init_std must be positive, got init_std=0.0"),
        ({"drop_path_rate": 1.0}, "drop_path_rate must be in [0, 1), got drop_path_rate=1.0"),
        ({"drop_path_rate": -0.1}, "got drop_path_rate=-0.1"),
        ({"drop_rate": 2}, "got drop_rate=2"),
        ({"attn_drop_rate": float("nan")}, "got attn_drop_rate=nan"),
    ],
)
def test_errors_state_rule_and_value(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        ELSASwin(**{"arch": ARCH, **options})


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 4, 32, 32), (1, 1, 3, 32, 32)])
def test_input_of_another_shape_is_an_error(shape):
    message = re.escape(f"input must have the shape (B, 3, H, W), got {shape}")
    with pytest.raises(ValueError, match=message):
        make()(torch.randn(shape))


def test_variant_runs_at_full_size():
    with torch.no_grad():
        outputs = ELSASwin("tiny").eval()(torch.randn(1, 3, 64, 64))
    assert [output.shape[1] for output in outputs] == [
        VARIANTS["tiny"].embed_dim * 2**i for i in range(4)
    ]
