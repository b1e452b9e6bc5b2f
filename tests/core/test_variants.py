"""The variants and the checks of free ones."""

import re
from collections import UserDict, UserList

import pytest

from elsa_core import VARIANTS
from elsa_core.variants import Arch

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
