"""OpenVINO models of exported ONNX files, compared with PyTorch and onnxruntime at any size."""

import copy
import os

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from digit_models import SEG, untrained
from weights_models import TINY

from elsa_core import ELSASwin
from elsa_core.runtime.errors import UsageError
from elsa_tools.export.build import wrap
from elsa_tools.export.models import Backbone, round_weights
from elsa_tools.export.onnx import write_onnx
from elsa_tools.export.record import KEY, Record, record_of
from elsa_tools.export.verify import TOLERANCE

pytest.importorskip("openvino", reason="needs the package openvino")
from elsa_tools.export.openvino import load_openvino, to_openvino  # noqa: E402

SHAPES = ((1, 3, 64, 96), (1, 3, 97, 71), (4, 3, 130, 161), (4, 3, 33, 57))


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    torch.manual_seed(0)
    module = Backbone(ELSASwin(vars(TINY)), None).eval()
    path = str(tmp_path_factory.mktemp("backbone") / "backbone.onnx")
    record = Record(task="features", normalised=True)
    write_onnx(module, path, record)
    return module, path


@pytest.mark.slow
def test_the_backbone_is_the_same(backbone, tmp_path):
    module, source = backbone
    path = str(tmp_path / "backbone.xml")
    to_openvino(source, path)
    assert sorted(os.listdir(tmp_path)) == ["backbone.bin", "backbone.xml"]
    compiled, record = load_openvino(path, threads=1)
    assert record == Record(task="features", normalised=True)
    assert [output.any_name for output in compiled.outputs] == list(module.names)
    for shape in SHAPES:
        image = torch.randn(shape)
        with torch.no_grad():
            wanted = module(image)
        got = compiled(image.numpy())
        for index, output in enumerate(wanted):
            # bfloat16 would differ by 0.03.
            assert np.abs(got[index] - output.numpy()).max() <= TOLERANCE


@pytest.mark.slow
def test_upernet_is_the_same(tmp_path):
    source, path = str(tmp_path / "upernet.onnx"), str(tmp_path / "upernet.xml")
    inferencer = untrained(SEG["mmseg"])
    module = wrap(inferencer)
    write_onnx(module, source, record_of(inferencer))
    to_openvino(source, path)
    compiled, _ = load_openvino(path)
    session = onnxruntime.InferenceSession(source, providers=["CPUExecutionProvider"])
    for shape in SHAPES:
        image = np.random.default_rng(0).integers(0, 256, shape).astype(np.float32)
        (wanted,) = session.run(None, {"image": image})
        (got,) = compiled(image).values()
        assert np.abs(got - wanted).max() <= TOLERANCE * np.abs(wanted).max()


@pytest.mark.slow
def test_half_the_weights(backbone, tmp_path):
    """Weights alone: the other constants stay as they are, such as biases and an image's mean."""
    module, source = backbone
    whole, half = str(tmp_path / "whole.xml"), str(tmp_path / "half.xml")
    to_openvino(source, whole)
    plain = copy.deepcopy(module)
    for parameter in plain.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    rounded = copy.deepcopy(plain)
    round_weights(rounded)
    source = str(tmp_path / "half.onnx")
    write_onnx(rounded, source, Record(task="features", normalised=True, precision="float16"))
    to_openvino(source, half)
    sizes = [os.path.getsize(path.replace(".xml", ".bin")) for path in (whole, half)]
    assert 0.45 < sizes[1] / sizes[0] < 0.6
    compiled, record = load_openvino(half)
    assert record.precision == "float16"
    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        found, unrounded = rounded(image), plain(image)[0].numpy()
    for index, wanted in enumerate(found):
        assert np.abs(compiled(image.numpy())[index] - wanted.numpy()).max() <= TOLERANCE
    assert np.abs(found[0].numpy() - unrounded).max() > TOLERANCE


@pytest.mark.slow
def test_both_files_or_neither(backbone, tmp_path):
    _, source = backbone
    path, weights = tmp_path / "model.xml", tmp_path / "model.bin"
    path.write_text("as before")
    weights.write_text("as before")

    def refuse(name):
        assert load_openvino(name)
        raise UsageError("they differ")

    with pytest.raises(UsageError, match="they differ"):
        to_openvino(source, str(path), check=refuse)
    assert path.read_text() == weights.read_text() == "as before"
    assert sorted(os.listdir(tmp_path)) == ["model.bin", "model.xml"]

    to_openvino(source, str(path))
    data = bytearray(weights.read_bytes())
    data[100] ^= 1
    weights.write_bytes(data)
    with pytest.raises(UsageError, match="must come from one export, they do not"):
        load_openvino(str(path))
    weights.unlink()
    with pytest.raises(UsageError, match="model.bin is missing"):
        load_openvino(str(path))


def test_bad_files_are_refused(tmp_path):
    plain = onnx.helper.make_graph(
        [onnx.helper.make_node("Relu", ["x"], ["y"])],
        "plain",
        [onnx.helper.make_tensor_value_info("x", 1, [None])],
        [onnx.helper.make_tensor_value_info("y", 1, [None])],
    )
    model = onnx.helper.make_model(plain, opset_imports=[onnx.helper.make_opsetid("", 20)])
    source = str(tmp_path / "plain.onnx")
    onnx.save(model, source)
    with pytest.raises(UsageError, match="it has no record"):
        to_openvino(source, str(tmp_path / "m.xml"))
    onnx.helper.set_model_props(model, {KEY: Record(task="features").to_json()})
    onnx.save(model, source)
    with pytest.raises(UsageError, match="must end in .xml"):
        to_openvino(source, str(tmp_path / "m.bin"))
    with pytest.raises(UsageError, match="cannot be written: No such file"):
        to_openvino(source, str(tmp_path / "no" / "m.xml"))
    (tmp_path / "text.onnx").write_text("no model")
    with pytest.raises(UsageError, match="cannot be read as ONNX"):
        to_openvino(str(tmp_path / "text.onnx"), str(tmp_path / "m.xml"))
    (tmp_path / "m.xml").write_text("<net/>")
    (tmp_path / "m.bin").write_text("")
    with pytest.raises(UsageError, match="OpenVINO cannot read"):
        load_openvino(str(tmp_path / "m.xml"))
