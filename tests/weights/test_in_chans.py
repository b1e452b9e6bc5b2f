"""Weights for three channels in models of others, by timm's rule, however they are loaded."""

import logging

import pytest
import torch
from doors_tiny import ARCH
from mm_tiny import VOLO_ARCH
from torch import nn
from weights_models import TINY, detector, save, sizes

timm = pytest.importorskip("timm", reason="timm is not installed")
pytest.importorskip("detectron2")
pytest.importorskip("mmdet")

from detectron2.modeling import build_model  # noqa: E402
from mmengine.config import Config  # noqa: E402
from mmengine.registry import MODELS, DefaultScope  # noqa: E402
from timm.models import adapt_input_conv  # noqa: E402

import elsa_core.timm  # noqa: E402, F401  registers the models
import elsa_d2  # noqa: E402
import elsa_mm  # noqa: E402
from elsa_core import ELSASwin, ELSAVolo  # noqa: E402
from elsa_core.runtime.errors import UsageError  # noqa: E402
from elsa_core.weights import convert_file, load_backbone, read_checkpoint, report  # noqa: E402
from elsa_core.weights.channels import spread  # noqa: E402
from elsa_d2.checkpoint import check_checkpoint  # noqa: E402
from elsa_mm.loading import adopt, check_weights  # noqa: E402
from elsa_tools.verify import configs, d2, mm  # noqa: E402

FIRST = "patch_embed.proj.weight"
KIND = "mask_rcnn"


def equal(weight, original):
    wanted = adapt_input_conv(weight.shape[1], original)
    torch.testing.assert_close(weight, wanted, rtol=1e-6, atol=1e-7)


def detectron2(channels):
    cfg = elsa_d2.load_config(elsa_d2.get_config_file(configs.DETECTRON2[KIND]))
    cfg.merge_from_list([*d2.overrides(TINY, sizes(KIND), KIND), "MODEL.DEVICE", "cpu"])
    cfg.MODEL.PIXEL_MEAN = cfg.MODEL.PIXEL_STD = [1.0] * channels
    return build_model(cfg)


def openmmlab(channels):
    cfg = Config.fromfile(elsa_mm.get_config_file(configs.OPENMMLAB[KIND]))
    mm.set_sizes(cfg.model, TINY, sizes(KIND), KIND)
    cfg.model.backbone.in_chans = channels
    cfg.model.data_preprocessor = dict(type="DetDataPreprocessor")
    with DefaultScope.overwrite_default_scope("mmdet"):
        return MODELS.build(cfg.model)


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5, 13])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_rule_is_timms(channels, dtype):
    weight = torch.randn(8, 3, 4, 4).to(dtype)
    if channels != 3:
        assert torch.equal(spread(weight, channels), adapt_input_conv(channels, weight))


@pytest.mark.parametrize("make", [ELSASwin, ELSAVolo])
def test_a_backbone_loads_three_channels(make, tmp_path, caplog):
    arch, first = (ARCH, FIRST) if make is ELSASwin else (VOLO_ARCH, "patch_embed.conv.0.weight")
    state = make(arch).state_dict()
    path = save(tmp_path, state)
    model = make(arch, in_chans=5)
    conversion = load_backbone(model, path)
    equal(model.get_parameter(first).detach(), state[first])
    note = f"{first}: the weights of 3 channels, repeated, times 3/5, for 5"
    assert f"spread: {note}" in report.text(conversion) and note in caplog.text
    assert report.record(conversion)["spread"] == note
    assert model(torch.zeros(1, 5, 64, 64))
    same = load_backbone(make(arch, in_chans=5), save(tmp_path, model.state_dict(), "five.pth"))
    assert same.spread == "" and "images of 5 channels" in report.text(same)
    with pytest.raises(UsageError, match="five.pth is for images of 5 channels, the model for ima"):
        load_backbone(make(arch, in_chans=4), str(tmp_path / "five.pth"))
    with pytest.raises(ValueError, match="in_chans must be at least 1, got in_chans=0"):
        make(arch, in_chans=0)


def test_openmmlabs_init_cfg(tmp_path):
    state = ELSASwin(ARCH).state_dict()
    init_cfg = dict(type="Pretrained", checkpoint=str(save(tmp_path, state)))
    model = MODELS.build(dict(type="ELSASwin", arch=ARCH, in_chans=4, init_cfg=init_cfg))
    model.init_weights()
    equal(model.patch_embed.proj.weight.detach(), state[FIRST])


def test_timms_pretrained(tmp_path):
    torch.manual_seed(0)
    source = timm.create_model("elsa_swin_tiny", arch=ARCH, num_classes=5)
    torch.save(source.state_dict(), tmp_path / "timm.pth")
    options = dict(pretrained_cfg_overlay=dict(file=str(tmp_path / "timm.pth"), num_classes=5))
    model = timm.create_model(
        "elsa_swin_tiny", pretrained=True, arch=ARCH, num_classes=5, in_chans=4, **options
    )
    equal(model.patch_embed.proj.weight.detach(), source.patch_embed.proj.weight.detach())


@pytest.mark.parametrize("names", ["detectron2", "mmdet"])
def test_detectors_begin_with_three_channels_in_both_frameworks(names, tmp_path, caplog):
    """The file has the names of either framework: one of the two converts it."""
    tensors = detector(KIND)
    original = tensors[f"backbone.{FIRST}"]
    path = str(save(tmp_path, {"meta": {}, "state_dict": tensors}, "mmdet.pth"))
    if names == "detectron2":
        convert_file(path, path := str(tmp_path / "d2.pth"), "detectron2")
    caplog.set_level(logging.WARNING)
    first, second = detectron2(5), openmmlab(5)
    elsa_d2.AtomicCheckpointer(first).load(path)
    content = read_checkpoint(path)
    adopt(second, content, path, begins=True)
    second.load_state_dict(content["state_dict"], strict=False)
    bottom = first.backbone.bottom_up.patch_embed.proj.weight.detach()
    equal(bottom, original)
    assert torch.equal(second.backbone.patch_embed.proj.weight, bottom)
    assert caplog.text.count("the weights of 3 channels, repeated, times 3/5, for 5") == 2


@pytest.mark.parametrize("names", ["detectron2", "mmdet"])
def test_what_is_evaluated_or_resumed_has_the_models_channels(names, tmp_path):
    path = str(save(tmp_path, {"meta": {}, "state_dict": detector(KIND)}, "mmdet.pth"))
    if names == "detectron2":
        convert_file(path, path := str(tmp_path / "d2.pth"), "detectron2")
    wrong = "for images of 3 channels, the model for images of 5: weights for 3 channels can only "
    with pytest.raises(UsageError, match=wrong):
        check_checkpoint(path, detectron2(5))
    with pytest.raises(UsageError, match=wrong):
        check_weights(openmmlab(5), path, read_checkpoint(path))
    path = str(save(tmp_path, {"model": detectron2(5).state_dict()}, "five.pth"))
    assert check_checkpoint(path, detectron2(5)) is None
    with pytest.raises(UsageError, match="weights for 5 channels cannot be spread over others"):
        elsa_d2.AtomicCheckpointer(detectron2(4)).load(path)
    with pytest.raises(UsageError, match="weights for 5 channels cannot be spread over others"):
        adopt(openmmlab(4), read_checkpoint(path), path, begins=True)


def test_five_channels_are_converted_to_the_other_framework_and_back(tmp_path):
    state = detectron2(5).state_dict()
    path = save(tmp_path, {"model": state})
    there, back = str(tmp_path / "there.pth"), str(tmp_path / "back.pth")
    convert_file(path, there, "mmdet")
    convert_file(there, back, "detectron2")
    model: nn.Module = openmmlab(5)
    check_weights(model, there, read_checkpoint(there))
    again = read_checkpoint(back)["model"]
    assert again.keys() <= state.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in again.items())
