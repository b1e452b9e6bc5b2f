"""The variants and the checks of free ones."""

import re
from collections import UserDict, UserList

import pytest

from elsa_core import VARIANTS
from elsa_core.variants import VOLO_VARIANTS, Arch, VoloArch

FREE = {"embed_dim": 24, "depths": [1, 2], "num_heads": [2, 4], "group_width": 4}


def test_variants_are_those_of_the_paper():
    assert list(VARIANTS) == ["tiny", "small", "base"]
    assert [arch.embed_dim for arch in VARIANTS.values()] == [96, 96, 128]
    assert [arch.group_width for arch in VARIANTS.values()] == [4, 8, 8]
    for arch in VARIANTS.values():
        assert (arch.kernel_size, arch.lam, arch.gamma, arch.window_size) == (7, 0, 1, 7)


def test_from_spec():
    assert Arch.from_spec("tiny") is VARIANTS["tiny"]
    arch = Arch.from_spec(FREE)
    assert (arch.depths, arch.num_heads, arch.num_features) == ((1, 2), (2, 4), [24, 48])
    assert Arch.from_spec(arch) is arch
    assert Arch.from_spec({**FREE, "kernel_size": 3, "lam": 1.0}).kernel_size == 3


def test_from_any_mapping_and_sequence():
    """As of OmegaConf, whose containers are neither dicts nor lists."""
    arch = Arch.from_spec(UserDict(FREE, depths=UserList([1, 2]), num_heads=UserList([2, 4])))
    assert arch == Arch.from_spec(FREE) and type(arch.depths) is tuple


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("huge", "arch must be one of tiny, small, base, got arch='huge'"),
        (3, "arch must be a variant's name or a dict, got arch=3"),
        ({"embed_dim": 24, "depths": [1, 2]}, "missing num_heads, group_width"),
        ({**FREE, "heads": 3, "width": 1}, "got heads, width"),
        ({**FREE, "num_heads": [2]}, "one entry per stage, got depths=(1, 2) and num_heads=(2,)"),
        ({**FREE, "depths": [2], "num_heads": [2]}, "at least 2 stages"),
        ({**FREE, "depths": [0, 2]}, "got depths=[0, 2]"),
        ({**FREE, "depths": 2}, "got depths=2"),
        ({**FREE, "depths": "12"}, "got depths='12'"),
        ({**FREE, "num_heads": [2, 5]}, "got 48 channels and 5 heads in stage 1"),
        ({**FREE, "num_heads": [2, 2.0]}, "got num_heads=[2, 2.0]"),
        ({**FREE, "embed_dim": 2}, "embed_dim must be at least 3, got embed_dim=2"),
        ({**FREE, "embed_dim": "24"}, "got embed_dim='24'"),
        ({**FREE, "group_width": 0}, "got group_width=0"),
        ({**FREE, "kernel_size": 6}, "kernel_size must be odd, got kernel_size=6"),
        ({**FREE, "window_size": 0}, "got window_size=0"),
        ({**FREE, "lam": 0.5}, "lam must be a whole number of at least 0, got lam=0.5"),
        ({**FREE, "lam": -1}, "got lam=-1"),
        ({**FREE, "lam": float("nan")}, "lam must be a finite number, got lam=nan"),
        ({**FREE, "gamma": float("inf")}, "gamma must be a finite number, got gamma=inf"),
        ({**FREE, "gamma": "1"}, "gamma must be a finite number, got gamma='1'"),
    ],
)
def test_errors_state_rule_and_value(spec, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Arch.from_spec(spec)


VOLO = {"depths": [1, 2, 2, 1], "embed_dims": [16, 24], "num_heads": [2, 3]}


@pytest.mark.parametrize(
    ("name", "depths", "embed_dims", "num_heads", "mlp_ratio", "stem_dim"),
    [
        ("volo_d1", (4, 4, 8, 2), (192, 384), (6, 12), 3, 64),
        ("volo_d2", (6, 4, 10, 4), (256, 512), (8, 16), 3, 64),
        ("volo_d3", (8, 8, 16, 4), (256, 512), (8, 16), 3, 64),
        ("volo_d4", (8, 8, 16, 4), (384, 768), (12, 16), 3, 64),
        ("volo_d5", (12, 12, 20, 4), (384, 768), (12, 16), 4, 128),
    ],
)
def test_volo_variants(name, depths, embed_dims, num_heads, mlp_ratio, stem_dim):
    expected = VoloArch(depths, embed_dims, num_heads, mlp_ratio, stem_dim, 5, 8, 1, 1, False, 1.0)
    assert VoloArch.from_spec(name) is VOLO_VARIANTS[name] and VOLO_VARIANTS[name] == expected
    assert expected.num_features == [embed_dims[0], *[embed_dims[1]] * 3]


def test_volo_from_spec():
    assert len(VOLO_VARIANTS) == 5
    arch = VoloArch.from_spec(UserDict(VOLO, depths=UserList([1, 2, 2, 1]), qk_scale=0.5))
    assert arch == VoloArch((1, 2, 2, 1), (16, 24), (2, 3), qk_scale=0.5)
    assert VoloArch.from_spec(arch) is arch and type(arch.depths) is tuple and hash(arch)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            "tiny",
            "arch must be one of volo_d1, volo_d2, volo_d3, volo_d4, volo_d5, got arch='tiny'",
        ),
        (Arch.from_spec("tiny"), "arch must be a variant's name or a dict, got arch=Arch("),
        (None, "arch must be a variant's name or a dict, got arch=None"),
        ({"depths": [1, 1, 1, 1]}, "needs depths, embed_dims, num_heads, missing embed_dims, num"),
        ({**VOLO, "window_size": 7}, "got window_size"),
        ({**VOLO, "depths": [1, 2, 2]}, "depths must be a list of 4 integers of at least 1, got"),
        ({**VOLO, "depths": [1, 0, 2, 1]}, "got depths=[1, 0, 2, 1]"),
        ({**VOLO, "depths": 4}, "got depths=4"),
        ({**VOLO, "embed_dims": [16]}, "embed_dims must be a list of 2 integers of at least 1"),
        ({**VOLO, "embed_dims": [2, 24]}, "embed_dims must be at least 3, got embed_dims=(2, 24)"),
        ({**VOLO, "embed_dims": [16, 24.0]}, "got embed_dims=[16, 24.0]"),
        ({**VOLO, "embed_dims": "16"}, "got embed_dims='16'"),
        ({**VOLO, "num_heads": [2, 3, 3]}, "got num_heads=[2, 3, 3]"),
        ({**VOLO, "num_heads": [3, 3]}, "embed_dims=(16, 24) and num_heads=(3, 3)"),
        ({**VOLO, "num_heads": [2, 5]}, "embed_dims must be divisible by num_heads, got"),
        (
            {**VOLO, "mlp_ratio": 3.5},
            "mlp_ratio must be an integer of at least 1, got mlp_ratio=3.5",
        ),
        ({**VOLO, "stem_dim": 0}, "got stem_dim=0"),
        ({**VOLO, "group_width": True}, "got group_width=True"),
        ({**VOLO, "kernel_size": 4}, "kernel_size must be odd, got kernel_size=4"),
        ({**VOLO, "kernel_size": -1}, "got kernel_size=-1"),
        ({**VOLO, "lam": 0.5}, "lam must be a whole number of at least 0, got lam=0.5"),
        ({**VOLO, "lam": None}, "lam must be a finite number, got lam=None"),
        ({**VOLO, "gamma": float("nan")}, "gamma must be a finite number, got gamma=nan"),
        ({**VOLO, "qk_scale": None}, "qk_scale must be a finite number, got qk_scale=None"),
        ({**VOLO, "qk_scale": float("inf")}, "got qk_scale=inf"),
        ({**VOLO, "qkv_bias": 1}, "qkv_bias must be True or False, got qkv_bias=1"),
    ],
)
def test_volo_errors_state_rule_and_value(spec, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        VoloArch.from_spec(spec)
    assert "\n" not in str(error.value)
