"""ONNX files compared with PyTorch: the backbone and UPerNet of both frameworks, at any size."""

import hashlib
import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import volo_weights
from digit_models import CONFIGS, DET, SEG, untrained
from weights_models import TINY, save

from elsa_core import ELSASwin, ELSAVolo
from elsa_core.runtime.errors import UsageError
from elsa_core.variants import VARIANTS, Arch
from elsa_tools.export import graph as onnx_graph
from elsa_tools.export import onnx as onnx_export
from elsa_tools.export.build import wrap
from elsa_tools.export.cli import main
from elsa_tools.export.models import Backbone
from elsa_tools.export.record import KEY, Record, record_of
from elsa_tools.export.verify import SIZES, TOLERANCE, verify
from elsa_tools.export.write import write_model
from elsa_tools.predict import load_inferencer

SMALL = vars(TINY)
FEATURES = Record(task="features", normalised=True)


def randomised(backbone, seed=0):
    """Every parameter away from its start, so that none is left out unnoticed."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in backbone.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return backbone.eval()


def outputs(path, image):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, {"image": image.numpy()})


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes, always_shift",
    [
        ({}, True),
        ({"kernel_size": 19}, True),
        ({"kernel_size": 5, "lam": 1}, False),
        ({"lam": 2, "gamma": 0, "window_size": 4}, True),
    ],
    ids=str,
)
def test_the_backbone_is_the_same(changes, always_shift, tmp_path):
    backbone = randomised(ELSASwin({**SMALL, **changes}, always_shift=always_shift))
    path = str(tmp_path / "backbone.onnx")
    found, _ = write_model(Backbone(backbone, None), FEATURES, path)
    assert len(found) >= len(SIZES) and all(check.same for check in found)
    # Sizes that the export has not seen: smaller than a window, far from square.
    for shape in ((1, 3, 4, 4), (3, 3, 33, 190)):
        image = torch.randn(shape)
        with torch.no_grad():
            wanted = backbone(image)
        for a, b in zip(outputs(path, image), wanted, strict=True):
            assert np.abs(a - b.numpy()).max() <= TOLERANCE


VOLO = dict(depths=(1, 2, 1, 1), embed_dims=(12, 24), num_heads=(2, 3), stem_dim=8)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "options"),
    [
        ({}, {}),
        ({"qkv_bias": True, "qk_scale": 0.5}, dict(pyramid=True)),
        ({"kernel_size": 7, "lam": 0}, dict(pyramid=True, out_indices=(1, 2))),
        ({"kernel_size": 3, "lam": 2, "gamma": 0}, dict(out_indices=(0, 2))),
    ],
    ids=str,
)
def test_elsa_volo_is_the_same(changes, options, tmp_path):
    backbone = randomised(ELSAVolo({**VOLO, **changes}, img_size=64, **options))
    for name, statistic in backbone.named_buffers():
        if name.endswith(("mean", "var")):
            statistic.copy_(torch.rand(statistic.shape) + 0.5)
    path = str(tmp_path / "backbone.onnx")
    found, _ = write_model(Backbone(backbone, None), FEATURES, path)
    assert len(found) >= len(SIZES) and all(check.same for check in found)
    model = onnx.load(path)
    assert {node.domain for node in model.graph.node} == {""}
    # The grid of the position embedding, one position, and more of them than it has.
    for shape in ((1, 3, 64, 64), (1, 3, 4, 5), (3, 3, 33, 190)):
        image = torch.randn(shape)
        with torch.no_grad():
            wanted = backbone(image)
        got = outputs(path, image)
        assert [a.shape for a in got] == [tuple(b.shape) for b in wanted]
        for a, b in zip(got, wanted, strict=True):
            assert np.abs(a - b.numpy()).max() <= TOLERANCE


@pytest.mark.parametrize(
    ("options", "names", "last"),
    [
        ({}, "stage1 stage2 stage3 stage4", ("ceil(height/16)", "ceil(width/16)")),
        (dict(pyramid=True), "res2 res3 res4 res5", ("ceil(height/32)", "ceil(width/32)")),
        (dict(pyramid=True, out_indices=(0,)), "res2", ("ceil(height/16)*4", "ceil(width/16)*4")),
    ],
)
def test_maps_of_elsa_volo_have_names_and_sizes(options, names, last):
    module = Backbone(ELSAVolo(VOLO, **options), None)
    assert module.names == tuple(names.split())
    assert tuple(onnx_export._sides(module, module.names[-1])) == last


@pytest.mark.slow
def test_some_outputs_only_and_a_difference_is_seen(tmp_path):
    backbone = randomised(ELSASwin(SMALL, out_indices=(1, 2)))
    path = str(tmp_path / "two.onnx")
    write_model(Backbone(backbone, None), FEATURES, path)
    model = onnx.load(path)
    assert [output.name for output in model.graph.output] == ["res3", "res4"]
    sides = [d.dim_param or d.dim_value for d in model.graph.output[0].type.tensor_type.shape.dim]
    assert sides == ["batch", 24, "ceil(height/8)", "ceil(width/8)"]
    other = Backbone(randomised(ELSASwin(SMALL, out_indices=(1, 2)), seed=1), None)
    first = next(verify(path, other, None))
    assert not first.same and first.numbers["difference"] > 0.01


@pytest.mark.slow
def test_a_variant_is_the_same(tmp_path, capsys, monkeypatch):
    """Small, but with the windows and kernels of the published variants."""
    changes = dict(kernel_size=7, window_size=7)
    monkeypatch.setitem(VARIANTS, "tiny", Arch.from_spec({**SMALL, **changes}))
    path = tmp_path / "tiny.onnx"
    assert main(["--arch", "tiny", "--out", str(path)]) == 0
    printed = capsys.readouterr()
    assert printed.out.count("onnxruntime, random") == 3
    assert "random" in printed.err
    model = onnx.load(path)
    assert {(o.domain, o.version) for o in model.opset_import} == {("", 20)}
    assert {node.domain for node in model.graph.node} == {""} and not model.functions
    record = Record.from_json(model.metadata_props[0].value)
    assert record == replace(FEATURES, outputs=("res2", "res3", "res4", "res5"))
    report = json.loads(Path(f"{path}.report.json").read_text())
    assert report["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert report["verified"] and all(check["same"] for check in report["checks"])


@pytest.mark.slow
@pytest.mark.parametrize("framework", SEG)
def test_upernet_is_the_same(framework, tmp_path):
    torch.manual_seed(0)
    inferencer = load_inferencer(SEG[framework], None, device="cpu")
    randomised(inferencer.model)
    path = str(tmp_path / "upernet.onnx")
    record = record_of(inferencer)
    found, _ = write_model(wrap(inferencer), record, path, inferencer=inferencer)
    assert {"equal pixels"} in [check.numbers.keys() for check in found]
    # Against the framework's own way to logits, normalisation included.
    image = torch.randint(0, 256, (1, 3, 75, 110)).float()
    (logits,) = outputs(path, image)
    with torch.no_grad():
        if framework == "detectron2":
            wanted = inferencer.model([{"image": image[0]}])[0]["sem_seg"][None]
        else:
            data = inferencer.model.data_preprocessor({"inputs": [image[0].flip(0).byte()]})
            wanted = inferencer.model.whole_inference(
                data["inputs"], [dict(ori_shape=(75, 110), img_shape=(75, 110))]
            )
    assert logits.shape == (1, 11, 75, 110)
    assert np.abs(logits - wanted.numpy()).max() <= TOLERANCE * wanted.abs().max()
    props = {prop.key: prop.value for prop in onnx.load(path).metadata_props}
    assert Record.from_json(props[KEY]) == record


def test_a_segmentor_pads_as_its_framework_does():
    """As the UPerNets with ELSA-VOLO do, whose backbone has maps of the padded image."""
    from mmseg.structures import SegDataSample

    padding = "model.data_preprocessor.test_cfg.size_divisor=32"
    inferencer = load_inferencer(SEG["mmseg"], None, device="cpu", options=[padding])
    randomised(inferencer.model)
    image = torch.randint(0, 256, (1, 3, 75, 110)).float()
    sample = SegDataSample(metainfo=dict(ori_shape=(75, 110), img_shape=(75, 110)))
    data = {"inputs": [image[0].flip(0).byte()], "data_samples": [sample]}
    with torch.no_grad():
        (logits,) = wrap(inferencer)(image)
        (found,) = inferencer.model.test_step(data)
    wanted = found.seg_logits.data[None]
    assert logits.shape == wanted.shape == (1, 11, 75, 110)
    assert (logits - wanted).abs().max() <= TOLERANCE * wanted.abs().max()


@pytest.mark.slow
def test_a_detector_with_elsa_volo_is_the_same(tmp_path):
    inferencer = untrained(str(CONFIGS / "mmdet/digits/mask-rcnn_elsa-volo_fpn_digits.py"))
    record, path = record_of(inferencer), str(tmp_path / "detector.onnx")
    found, _ = write_model(wrap(inferencer), record, path, inferencer=inferencer)
    assert all(check.same and check.numbers["detections"] > 0 for check in found)
    assert {check.what for check in found} > {"a drawn image"}


def test_a_detector_gives_its_backbone():
    inferencer = load_inferencer(DET["mmdet"], None, device="cpu")
    module = wrap(inferencer, "backbone")
    assert type(module) is Backbone and module.names == ("res2", "res3", "res4", "res5")


@pytest.mark.slow
def test_a_wrong_graph_is_not_written(tmp_path, monkeypatch):
    backbone = randomised(ELSASwin(SMALL))
    path = tmp_path / "wrong.onnx"
    path.write_text("as before")
    monkeypatch.setattr(onnx_graph, "_roll", lambda x, shift, back=False: x)
    with pytest.raises(UsageError, match="must compute what PyTorch does: onnxruntime"):
        write_model(Backbone(backbone, None), FEATURES, str(path))
    assert path.read_text() == "as before"
    assert [file.name for file in tmp_path.iterdir()] == ["wrong.onnx"]


class Pools(torch.nn.Module):
    cells = (1, 2, 3, 6)

    def forward(self, x):
        return tuple(torch.nn.functional.adaptive_avg_pool2d(x, cells) for cells in self.cells)


@pytest.mark.slow
def test_adaptive_pooling(tmp_path):
    path = str(tmp_path / "pools.onnx")
    dynamic = torch.export.Dim.DYNAMIC
    torch.onnx.export(
        Pools(),
        (torch.zeros(2, 3, 7, 9),),
        path,
        dynamo=True,
        opset_version=onnx_export.OPSET,
        input_names=["image"],
        dynamic_shapes=({0: dynamic, 2: dynamic, 3: dynamic},),
        custom_translation_table=onnx_export.TRANSLATIONS,
        verbose=False,
    )
    for size in ((1, 1), (5, 7), (6, 6), (13, 4), (3, 40)):
        x = torch.rand(2, 3, *size)
        for got, wanted in zip(outputs(path, x), Pools()(x), strict=True):
            assert np.allclose(got, wanted.numpy(), atol=1e-6), size


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--arch", "tiny", "--out", "m.pt"], "--out must end in .onnx"),
        (["--arch", "tiny", "--out", "no/m.onnx"], "the folder no of --out does not exist"),
        (["--arch", "tiny", "--out", "m.onnx", "--part", "backbone"], "belong to --config"),
        (["--arch", "huge", "--out", "m.onnx"], "--arch must be one of tiny, small, base, volo_d1"),
        (["--arch", "tiny", "--out", "m.onnx", "--pyramid"], "--arch of an ELSA-VOLO"),
        (
            ["--arch", "volo_d1", "--out", "m.onnx", "--img-size", "0"],
            "--img-size must be positive",
        ),
        (["--config", "no.py", "--out", "m.onnx", "--img-size", "64"], "belong to --arch"),
        (["--config", "no.py", "--out", "m.onnx"], "the config no.py does not exist"),
        (["--config", SEG["mmseg"], "--weights", "no.pth", "--out", "m.onnx"], "does not exist"),
    ],
)
def test_bad_use_is_one_sentence(arguments, sentence, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


VOLO_ARCH = str(asdict(volo_weights.SMALL))


def test_weights_without_elsa_are_not_exported(tmp_path, capsys):
    weights = save(tmp_path, {"state_dict": volo_weights.stock().state_dict()}, "volo.pth.tar")
    arguments = ["--arch", VOLO_ARCH, "--weights", str(weights), "--out", str(tmp_path / "m.onnx")]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert "volo.pth.tar holds stock VOLO" in error and "no ELSA attention to export" in error
    assert not list(tmp_path.glob("m*"))


@pytest.mark.slow
def test_what_weights_lack_is_said(tmp_path, capsys):
    """Of a classifier, which has no pyramid. The position embedding keeps its size."""
    weights = save(tmp_path, volo_weights.classifier())
    arguments = ["--arch", VOLO_ARCH, "--weights", str(weights), "--out", str(tmp_path / "m.onnx")]
    assert main([*arguments, "--pyramid", "--img-size", "112", "--no-verify"]) == 0
    error = capsys.readouterr().err
    assert "left as initialised: upsample, norm0, norm1, norm2, norm3" in error
    assert "resized" not in error


def test_a_missing_package_is_named(tmp_path, capsys, monkeypatch):
    def missing(*_, **__):
        raise ModuleNotFoundError("No module named 'onnxscript'", name="onnxscript")

    monkeypatch.setattr(onnx_export, "write_onnx", missing)
    assert main(["--arch", "tiny", "--out", str(tmp_path / "m.onnx")]) == 2
    assert "the Python package onnxscript is missing" in capsys.readouterr().err
