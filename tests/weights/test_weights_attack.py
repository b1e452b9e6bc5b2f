"""Crafted checkpoint files, in every command and loading path: nothing executes, hangs or grows."""

import os
import pickle
import resource
import threading
import time
from collections import OrderedDict
from importlib.util import find_spec
from pathlib import Path

import attack_files
import pytest
import torch

from elsa_core import ELSASwin
from elsa_core.runtime.errors import UsageError
from elsa_core.weights import load_backbone, read_ahead, read_checkpoint, safetensors
from elsa_tools import convert as cli

# Of one read, beside the interpreter and the file.
MEMORY = 10**9
SECONDS = 5
with_safetensors = pytest.mark.skipif(
    find_spec("safetensors") is None, reason="safetensors is no dependency of the core"
)
TINY = dict(embed_dim=12, depths=(1, 1, 1, 2), num_heads=(1, 2, 3, 4), group_width=4)
TINY |= dict(kernel_size=3, window_size=3)


def save(folder, content):
    torch.save(content, folder / "a.pth")
    return folder / "a.pth"


def sentence(path):
    with pytest.raises(UsageError) as caught:
        read_checkpoint(path)
    (line,) = str(caught.value).splitlines()
    assert str(path) in line and len(line) < 600
    return line


def test_what_pytorch_refuses_is_said_in_its_words(tmp_path):
    content = b"\x80\x02c__builtin__\ngetattr\ncargparse\nNamespace\nX\1\0\0\0a\x86R}b."
    attack_files.with_pickle(tmp_path / "a.pth", content)
    line = sentence(tmp_path / "a.pth")
    assert "refused by torch.load(weights_only=True) (Can only build Tensor" in line


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("name", attack_files.EXECUTING)
def test_nothing_is_executed(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    attack_files.EXECUTING[name](tmp_path / "a.pth")
    sentence(tmp_path / "a.pth")
    assert os.listdir(tmp_path) == ["a.pth"]


def test_the_attack_is_a_real_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    attack_files.plain(tmp_path / "a.pth")
    pickle.loads((tmp_path / "a.pth").read_bytes())
    assert (tmp_path / attack_files.MARK).is_dir()


@pytest.mark.slow
@pytest.mark.parametrize("zipped", [False, True], ids=["pickle", "zip"])
@pytest.mark.parametrize("name", attack_files.EXHAUSTING)
def test_nothing_is_exhausted(tmp_path, name, zipped):
    """In this process: a read that took gigabytes or minutes would end the tests."""
    content, words = attack_files.exhausting(name), attack_files.EXHAUSTING[name][1]
    path = tmp_path / "a.pth"
    if zipped:
        attack_files.with_pickle(path, content)
    else:
        path.write_bytes(content)
    assert words in sentence_within_limits(path)


@pytest.mark.parametrize("name", attack_files.CONTRADICTING)
def test_what_contradicts_itself_is_refused(tmp_path, name):
    write, words = attack_files.CONTRADICTING[name]
    write(tmp_path / "a.pth")
    assert words in sentence_within_limits(tmp_path / "a.pth")


def sentence_within_limits(path):
    begin, limits = time.process_time(), resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (_data_size() + MEMORY, limits[1]))
    try:
        return sentence(path)
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, limits)
        assert time.process_time() - begin < SECONDS


def _data_size():
    pages = int(Path("/proc/self/statm").read_text().split()[5])
    return pages * resource.getpagesize()


@pytest.mark.parametrize(
    "value",
    [
        {"lists": [list(range(1000))] * 1000, "keys": {(n, str(n)): n for n in range(2000)}},
        OrderedDict((f"layer{n}.weight", n * 0.5) for n in range(5000)),
        {"seeds": [2**64 - n for n in range(2000)], "sets": [frozenset({1, "a"})] * 50},
        [[[[[[[[[[]]]]]]]]]],
    ],
)
@pytest.mark.parametrize("protocol", range(2, 6))
def test_what_checkpoints_have_is_let_through(tmp_path, value, protocol):
    path = tmp_path / "a.pkl"
    path.write_bytes(pickle.dumps(value, protocol))
    assert read_checkpoint(path) == value


def test_dicts_that_are_made_of_their_items_are_let_through(tmp_path):
    """addict's: what makes them gets the items, and leaves them to what follows."""
    item = b"X\1\0\0\0aK\1"
    content = b"\x80\2caddict.addict\nDict\n" + item + b"\x86\x85\x81" + item + b"s."
    attack_files.with_pickle(tmp_path / "a.pth", content)
    assert read_checkpoint(tmp_path / "a.pth") == {"a": 1}


@pytest.mark.slow
def test_the_order_of_a_large_data_set_is_let_through(tmp_path):
    order = list(range(1_300_000))
    assert read_checkpoint(save(tmp_path, order)) == order


def test_an_optimizer_and_objects_of_data_are_let_through(tmp_path):
    model = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(20)))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.rand(2, 4)).sum().backward()
    optimizer.step()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    path = save(tmp_path, state)
    read = read_checkpoint(path)
    assert read["optimizer"]["param_groups"] == state["optimizer"]["param_groups"]
    torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(20))).load_state_dict(read["model"])


def test_tensors_of_8_bits(tmp_path):
    tensor = torch.arange(16.0).to(torch.float8_e4m3fn)
    read = read_checkpoint(save(tmp_path, {"a": tensor}))
    assert read["a"].dtype == tensor.dtype and torch.equal(read["a"].float(), tensor.float())


@pytest.mark.parametrize("place", [0.3, 0.6])
def test_flipped_bits_are_noticed(tmp_path, monkeypatch, place):
    path = save(tmp_path, {"a": torch.rand(4096), "b": torch.rand(4096)})
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 1
    path.write_bytes(content)
    assert "Bad CRC-32" in sentence(path)
    monkeypatch.setenv("ELSA_CHECK_CRC", "0")
    assert read_checkpoint(path).keys() == {"a", "b"}


def test_archives_without_checksums_say_how_they_are_read(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        path = save(tmp_path, {"a": torch.rand(4096)})
    finally:
        torch.serialization.set_crc32_options(True)
    if "Bad CRC-32" in (line := sentence(path)):
        assert "ELSA_CHECK_CRC=0" in line


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.pth")
    thread = threading.Thread(target=sentence, args=(tmp_path / "a.pth",), daemon=True)
    thread.start()
    thread.join(SECONDS)
    assert not thread.is_alive()


@pytest.mark.parametrize(
    "stock, name, tensor, words",
    [
        (False, "\x1b]0;title\x07\x1b[2J", torch.zeros(1), "control characters"),
        (False, "layers.0.blocks.0.norm1.weight", torch.full((12,), torch.nan), "NaN or infinity"),
        (False, "patch_embed.proj.weight", torch.tensor(1.0), "must have 4 dimensions"),
        (False, "layers.0.blocks.0.attn.attn.0.weight", torch.zeros(4, 4, 0, 0), "must have 4"),
        (True, "layers.0.blocks.1000000000.norm1.weight", torch.zeros(12), "is no part of one"),
        (True, f"layers.0.blocks.{'9' * 5000}.norm1.weight", torch.zeros(12), "at most 400"),
        (True, "layers.0.blocks.999.norm1.weight", torch.zeros(12), "tensor"),
        (True, "layers.3.blocks.0.attn.qkv.weight", torch.tensor(1.0), "three parts of one size"),
    ],
)
def test_names_shapes_and_values_are_bounded(
    tmp_path, monkeypatch, capfd, stock, name, tensor, words
):
    monkeypatch.chdir(tmp_path)
    state = ELSASwin(arch=TINY).state_dict()
    if stock:
        state = pytest.importorskip("weights_models").swin()
    save(tmp_path, {"model": {**state.get("model", state), name: tensor}})
    assert cli.main(["a.pth", "b.pth", "--to", "backbone"]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert words in line and line.isprintable() and len(line) < 600
    assert not Path("b.pth").exists()


@with_safetensors
def test_deep_metadata_is_no_metadata(tmp_path):
    """JSON in a safetensors file's metadata, as deep as it likes."""
    model = ELSASwin(arch=TINY)
    with open(tmp_path / "a.safetensors", "wb") as file:
        safetensors.save(file, model.state_dict(), {"dataset_meta": "[" * 100_000})
    assert load_backbone(model, tmp_path / "a.safetensors").moved


@with_safetensors
def test_signs_that_are_still_to_be_taken_are_written(tmp_path):
    state = ELSASwin(arch=TINY).state_dict()
    save(tmp_path, {name: torch._neg_view(tensor) for name, tensor in state.items()})
    arguments = [str(tmp_path / "a.pth"), str(tmp_path / "b.safetensors"), "--to", "backbone"]
    assert cli.main(arguments) == 0
    written = read_checkpoint(tmp_path / "b.safetensors")["state_dict"]
    assert all(torch.equal(written[name], -state[name]) for name in written) and written


def test_an_attribute_that_hides_a_method_of_tensors(tmp_path):
    tensor = torch.zeros(2)
    tensor.item = 5
    assert "the attribute 'item'" in sentence(save(tmp_path, {"a": tensor}))


def test_what_was_read_ahead_is_taken_once_and_for_its_file_alone(tmp_path):
    path = save(tmp_path, torch.zeros(2))
    assert read_ahead(path) is read_ahead(path) is read_checkpoint(path)
    read_ahead(path)
    path.unlink()
    sentence(path)
    save(tmp_path, torch.ones(2))
    assert read_checkpoint(path).sum() == 2
