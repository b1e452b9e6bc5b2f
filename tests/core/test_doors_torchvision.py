"""torchvision's detectors on `elsa_swin_fpn_backbone`."""

import pytest
import torch
from doors_tiny import ARCH, core_backbone, equal, image, train_a_step
from weights_models import TINY, classifier_tensors, save

pytest.importorskip("torchvision", reason="torchvision is not installed")

from torchvision.models.detection import FasterRCNN, MaskRCNN  # noqa: E402
from torchvision.ops.feature_pyramid_network import LastLevelP6P7  # noqa: E402

import elsa_core.weights  # noqa: E402
from elsa_core.torchvision import elsa_swin_fpn_backbone  # noqa: E402


@pytest.mark.parametrize("kind", [MaskRCNN, FasterRCNN])
def test_detectors_train_and_predict(kind):
    torch.manual_seed(0)
    backbone = elsa_swin_fpn_backbone(ARCH, out_channels=8, drop_path_rate=0.1)
    sizes = dict(min_size=96, max_size=128, box_detections_per_img=5)
    model = kind(backbone, num_classes=3, box_score_thresh=0, **sizes)
    images = list(image(2, 96, 80).sigmoid())
    mask = torch.zeros(1, 96, 80, dtype=torch.uint8)
    mask[:, 20:60, 10:50] = 1
    target = dict(boxes=torch.tensor([[10.0, 20, 50, 60]]), labels=torch.tensor([1]), masks=mask)
    losses = model.train()(images, [target, target])
    train_a_step(model, sum(losses.values()))
    with torch.no_grad():
        found = model.eval()(images)
    assert all(len(one["boxes"]) == len(one["scores"]) > 0 for one in found)
    assert ("masks" in found[0]) == (kind is MaskRCNN)


def test_pyramid_of_the_cores_maps(tmp_path):
    backbone = elsa_swin_fpn_backbone(ARCH, out_channels=8, returned_layers=(2, 4)).eval()
    maps = core_backbone(backbone.body.state_dict(), (1, 3))(image())
    with torch.no_grad():
        found = backbone(image())
        wanted = backbone.fpn({"0": maps[0], "1": maps[1]})
    assert list(found) == ["0", "1", "pool"] and equal(list(found.values()), list(wanted.values()))
    assert [m.shape[1:] for m in found.values()] == [(8, 9, 7), (8, 3, 2), (8, 2, 1)]
    levels = LastLevelP6P7(8, 8)
    assert len(elsa_swin_fpn_backbone(ARCH, out_channels=8, extra_blocks=levels)(image())) == 6
    state = classifier_tensors(TINY)
    elsa_core.weights.load_backbone(backbone.body, save(tmp_path, {"state_dict": state}))
    name = "layers.0.blocks.0.attn.ghost_head"
    assert torch.equal(backbone.body.get_parameter(name), state[name])


@pytest.mark.parametrize("layers", range(6))
def test_trainable_layers_count_from_the_last(layers):
    body = elsa_swin_fpn_backbone(ARCH, trainable_layers=layers).body.train()
    parts = [body.patch_embed, *body.layers]
    trained = [all(p.requires_grad for p in part.parameters()) for part in parts]
    assert trained == [False] * (5 - layers) + [True] * layers
    assert [part.training for part in parts] == trained


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (dict(arch="huge"), "arch must be one of tiny, small, base, got arch='huge'"),
        (dict(trainable_layers=6), "must be 0..5, got trainable_layers=6"),
        (dict(returned_layers=(0, 1)), r"one or more of 1..4, .*got returned_layers=\(0, 1\)"),
        (dict(returned_layers=()), "one or more of 1..4"),
    ],
)
def test_bad_use_is_one_sentence(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        elsa_swin_fpn_backbone(**options)
