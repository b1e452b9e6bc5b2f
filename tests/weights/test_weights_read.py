"""Files of unknown origin: nothing is executed, nothing is believed, harmless extras are read."""

import argparse
import json
import os
import pickle
import struct
import zipfile
from functools import partial
from pathlib import PosixPath

import numpy as np
import pytest
import torch
from weights_models import same, save

from elsa_core.runtime.errors import UsageError
from elsa_core.weights import read_checkpoint, safetensors
from elsa_core.weights.unpickle import StandIn

formats = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])


class Attack:
    """Leaves a file when it is unpickled."""

    def __init__(self, path, function=os.mkdir):
        self.path, self.function = path, function

    def __reduce__(self):
        return self.function, (str(self.path),)


def state():
    layer = torch.nn.BatchNorm2d(3)
    layer.running_mean.normal_()
    return layer.state_dict()


def refusal(path, **options):
    with pytest.raises(UsageError) as caught:
        read_checkpoint(path, **options)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message
    return message


@formats
def test_harmless_extras_are_data(tmp_path, zipped):
    extras = {
        "args": argparse.Namespace(lr=0.1),
        "score": np.float64(1.5),
        "half": np.float16(0.25),
        "count": np.int64(-3),
        "flag": np.bool_(True),
        "array": np.arange(6, dtype=np.int32).reshape(2, 3),
        "columns": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "folder": PosixPath("/a/b"),
        "classes": {"a", "b"},
        "slice": slice(1, 2),
    }
    path = save(tmp_path, {"state_dict": state(), **extras}, _use_new_zipfile_serialization=zipped)
    read = read_checkpoint(path)
    assert same(read["state_dict"], torch.load(path, weights_only=False)["state_dict"])
    assert (read["score"], read["half"], read["count"], read["flag"]) == (1.5, 0.25, -3, True)
    assert read["array"].tensor.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert read["columns"].tensor.tolist() == extras["columns"].tolist()
    assert isinstance(read["args"], StandIn) and not isinstance(read["args"], argparse.Namespace)
    assert isinstance(read["folder"], StandIn) and read["classes"] == {"a", "b"}


def test_checkpoint_of_an_openmmlab_training(tmp_path):
    config = pytest.importorskip("mmengine.config")
    history = pytest.importorskip("mmengine.logging").HistoryBuffer()
    history.update(0.5)
    meta = {"cfg": config.ConfigDict(model={"type": "X"}), "loss": history}
    path = save(tmp_path, {"meta": meta, "state_dict": state()})
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)
    assert set(read_checkpoint(path)["state_dict"]) == set(state())


def save_pickle(folder, content):
    """A pickle without PyTorch's container, as Detectron2's model zoo has."""
    path = folder / "model.pkl"
    path.write_bytes(pickle.dumps(content))
    return path


@pytest.mark.parametrize(
    "save", [save, partial(save, _use_new_zipfile_serialization=False), save_pickle]
)
@pytest.mark.parametrize("function", [os.mkdir, os.system, eval, print])
def test_malicious_pickle_is_refused(tmp_path, save, function):
    target = tmp_path / "executed"
    path = save(tmp_path, {"x": Attack(target, function)})
    message = refusal(path)
    assert "execute code" in message and "--trust-pickle" in message
    assert f".{function.__name__})" in message
    assert not target.exists()
    if function is os.mkdir:  # the attack is a real one
        read_checkpoint(path, trust=True)
        assert target.is_dir()


@pytest.mark.parametrize(
    "code",
    [
        b"cbuiltins\ngetattr\n(cos\nsystem\nS'__call__'\ntR.",
        b"cbuiltins\ngetattr\n(ccollections\nOrderedDict\nS'__init__'\ntR.",
        b"c_codecs\nencode\n(S'x'\nS'rot13'\ntR.",
        b"\x8c\x02os\x8c\x06system\x93.",
        b"\x8c\x0atorch._utils\x8c\x1d_rebuild_tensor_v2.__globals__\x93."[:-1] + b".",
        b"ctorch.storage\n_load_from_bytes\n(S'x'\ntR.",
        b"ccopyreg\n_reconstructor\n(ccollections\nOrderedDict\nNNtR.",
        b"cpathlib\nos.system\n.",
    ],
)
def test_tricks_with_what_is_allowed(tmp_path, code):
    path = tmp_path / "model.pkl"
    path.write_bytes(b"\x80\x04" + code)
    refusal(path)


def test_reading_changes_no_function_or_class(tmp_path):
    """BUILD sets attributes of whatever is on the stack."""
    path = tmp_path / "model.pkl"
    state = pickle.dumps((None, {"__defaults__": (1,), "marked": 1}), protocol=2)[2:-1]
    for name in (
        b"torch._utils\n_rebuild_tensor_v2\n",
        b"numpy\ndtype\n",
        b"argparse\nNamespace\n",
    ):
        path.write_bytes(b"\x80\x02c" + name + state + b"b.")
        try:
            read_checkpoint(path)
        except UsageError:
            pass
    assert not hasattr(torch._utils._rebuild_tensor_v2, "marked")
    assert not hasattr(argparse.Namespace, "marked")
    path.write_bytes(pickle.dumps({"a": np.ones(2)}))
    assert read_checkpoint(path)["a"].tensor.tolist() == [1, 1]


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_numpy_arrays_of_detectron2_pickles(tmp_path, protocol):
    path = tmp_path / "model.pkl"
    arrays = {"a": np.random.rand(2, 3).astype("f4"), "none": np.empty((0, 3)), "i": np.arange(4)}
    path.write_bytes(pickle.dumps({"model": arrays, "__author__": "x"}, protocol=protocol))
    for name, value in read_checkpoint(path)["model"].items():
        assert torch.equal(value.tensor, torch.from_numpy(arrays[name]))


def test_arrays_that_claim_more_than_they_have(tmp_path):
    path = tmp_path / "model.pkl"
    honest = pickle.dumps({"model": np.zeros((2, 3), "f4")}, protocol=2)
    path.write_bytes(honest.replace(b"K\x02K\x03\x86", b"J\xff\xff\xff\x7fK\x03\x86"))
    assert "claims" in refusal(path)


def test_byte_arrays_are_not_allocated_by_size(tmp_path):
    path = tmp_path / "model.pkl"
    path.write_bytes(b"\x80\x02cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R.")
    assert "byte array" in refusal(path)


def rewrite(path, change):
    """The archive's pickle, changed; all other entries as they are."""
    with zipfile.ZipFile(path) as archive:
        entries = [(info, archive.read(info)) for info in archive.infolist()]
    with zipfile.ZipFile(path, "w") as archive:
        for info, data in entries:
            if info.filename.endswith("data.pkl"):
                changed = change(data)
                assert changed != data
                data = changed
            archive.writestr(info.filename, data)


def claim(length):
    """Instead of 4096 elements."""
    return lambda data: data.replace(
        struct.pack("<cH", b"M", 4096), struct.pack("<ci", b"J", length)
    )


def test_tensors_that_claim_more_than_their_file(tmp_path):
    path = save(tmp_path, {"state_dict": {"a": torch.zeros(4096)}})
    rewrite(path, claim(2**31 - 1))
    assert "claims 8589934588 bytes" in refusal(path)


def test_expanded_tensors_are_no_way_round(tmp_path):
    path = save(tmp_path, {"state_dict": {"a": torch.zeros(1).expand(4096)}})
    assert "a tensor claims 4096 elements of a storage of 1" in refusal(path)


def test_legacy_tensors_that_claim_more_than_their_file(tmp_path):
    path = save(tmp_path, {"a": torch.zeros(4096)}, _use_new_zipfile_serialization=False)
    path.write_bytes(claim(2**31 - 1)(path.read_bytes()))
    assert "claim" in refusal(path)


def test_compressed_archives_are_refused(tmp_path):
    path = save(tmp_path, {"a": torch.zeros(4096)})
    with zipfile.ZipFile(path) as archive:
        entries = [(info.filename, archive.read(info)) for info in archive.infolist()]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries:
            archive.writestr(name, data if "/data/" not in name else bytes(10**7))
    assert path.stat().st_size < 10**5
    assert "claims" in refusal(path)


@formats
@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_truncated_files(tmp_path, zipped, share):
    path = save(tmp_path, {"a": torch.rand(4096)}, _use_new_zipfile_serialization=zipped)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    refusal(path)


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"", "is empty"),
        (b"<html>", "neither"),
        (b"\x80", "damaged"),
        (b"PK\x03\x04" + bytes(99), "cut off"),
    ],
)
def test_other_files(tmp_path, content, reason):
    path = tmp_path / "source.pth"
    path.write_bytes(content)
    assert reason in refusal(path)


def test_archives_of_other_things(tmp_path):
    path = tmp_path / "source.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    assert "not one that torch.save makes" in refusal(path)
    torch.jit.script(torch.nn.Linear(1, 1)).save(path)
    assert "TorchScript" in refusal(path)


def test_missing_files_and_folders(tmp_path):
    assert "is a directory" in refusal(tmp_path)
    assert "No such file" in refusal(tmp_path / "nothing.pth")


def write_safetensors(path, tensors, **metadata):
    with open(path, "wb") as file:
        safetensors.save(file, tensors, metadata)


def test_safetensors_and_back(tmp_path):
    path, tied = tmp_path / "a.safetensors", torch.rand(2)
    tensors = {
        "a": torch.rand(2, 3),
        "empty": torch.empty(0, 4),
        "scalar": torch.tensor(7),
        "half": torch.rand(3).bfloat16(),
        "tied": tied,
        "tied too": tied,
    }
    write_safetensors(path, tensors, format="pt")
    read = read_checkpoint(path)
    assert same(read["state_dict"], tensors) and read["meta"] == {"format": "pt"}


@pytest.mark.parametrize(
    "change",
    [
        {"shape": [2**40]},
        {"shape": [-2, -3]},
        {"dtype": "F99"},
        {"data_offsets": [0, 2**50]},
        {"data_offsets": [8, 32]},
        {"data_offsets": None},
    ],
)
def test_safetensors_that_contradict_themselves(tmp_path, change):
    path = tmp_path / "a.safetensors"
    header = {"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24], **change}}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(24))
    assert "damaged safetensors" in refusal(path)


@pytest.mark.parametrize("text", [b"{", b"[1]", b"{}x", b'{"a": 1}', b'{"a":' + b"[" * 100000])
def test_safetensors_with_damaged_headers(tmp_path, text):
    path = tmp_path / "a.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    refusal(path)
