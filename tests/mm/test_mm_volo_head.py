"""ELSA-VOLO's classifier in MMPretrain: the core's logits, and the loss of token labelling."""

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("mmpretrain")

from mmengine.registry import MODELS, DefaultScope
from mmpretrain.structures import DataSample

import elsa_core
from elsa_mm.volo_head import VoloHead

ARCH = dict(depths=[1, 1, 1, 1], embed_dims=[12, 24], num_heads=[3, 4], stem_dim=4)
CLASSES, SMOOTHING = 7, 0.1


def classifier(aux=True, **backbone):
    model = dict(
        type="ImageClassifier",
        backbone=dict(type="ELSAVoloTokens", arch=ARCH, img_size=64, **backbone),
        head=dict(type="elsa_mm.volo_head.VoloHead", num_classes=CLASSES, in_channels=24, aux=aux),
    )
    with DefaultScope.overwrite_default_scope("mmpretrain"):
        model = MODELS.build(model)
    model.init_weights()
    return model


def renamed(state):
    """MMPretrain's names of the core's classifier."""
    heads = {"head.": "head.fc.", "aux_head.": "head.aux_fc."}
    return {
        next(
            (new + k.removeprefix(old) for old, new in heads.items() if k.startswith(old)),
            f"backbone.{k}",
        ): v
        for k, v in state.items()
    }


@pytest.mark.parametrize(
    "options, backbone",
    [
        ({}, {}),
        ({"aux_head": False}, {}),
        ({"aux_head": False, "class_token": False}, {"class_token": False}),
    ],
)
def test_logits_and_predictions_are_the_cores(options, backbone):
    core = elsa_core.ELSAVoloClassifier(ARCH, CLASSES, img_size=64, init_std=0.3, **options).eval()
    model = classifier(aux=options.get("aux_head", True), **backbone).eval()
    model.load_state_dict(renamed(core.state_dict()))
    image = torch.randn(2, 3, 80, 64)
    with torch.no_grad():
        expected = core(image)
        assert torch.allclose(model(image, mode="tensor"), expected, atol=1e-6)
        samples = model(image, mode="predict")
        token = model.extract_feat(image, stage="pre_logits")
    scores = torch.stack([sample.pred_score for sample in samples])
    assert torch.allclose(scores, expected.softmax(1), atol=1e-6)
    assert torch.equal(token, model.extract_feat(image)[0]) and token.shape == (2, 24)


def test_first_weights_are_the_cores():
    head = classifier().head
    for layer in (head.fc, head.aux_fc):
        assert not layer.bias.any()
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.25)
    assert classifier(aux=False).head.aux_fc is None


def token_label_loss(logits, aux, box, target, dense):
    """VOLO's own law: arguments as its model and its data give them; the image's targets [B, C]
    and the tokens' [B, N, C], both smoothed."""
    top, left, bottom, right = box
    share = 1 - (bottom - top) * (right - left) / aux.shape[1]
    mixed = share * target + (1 - share) * target.flip(0)
    cls = torch.sum(-mixed * F.log_softmax(logits, -1), -1).mean()
    tokens = torch.sum(-dense * F.log_softmax(aux, -1), -1).mean()
    return cls, 0.5 * tokens


def smooth(target):
    return target * (1 - SMOOTHING) + SMOOTHING / CLASSES


def feats(box, size=(3, 4)):
    token, patches = torch.randn(4, 24), torch.randn(4, 24, *size)
    return token, patches, torch.tensor(box)


BOXES = [[0, 0, 0, 0], [1, 0, 3, 2], [0, 0, 3, 4]]


@pytest.mark.parametrize("box", BOXES)
@pytest.mark.parametrize("given", ["gt_label", "gt_score", "token_label"])
def test_loss_is_that_of_token_labelling(box, given):
    torch.manual_seed(2)
    head = VoloHead(CLASSES, 24)
    token, patches, box = feats(box)
    labels = torch.tensor([3, 0, 6, 3])
    target = F.one_hot(labels, CLASSES).float()
    if given == "gt_score":
        target = torch.rand(4, CLASSES).softmax(1)
    dense = target[:, None].expand(-1, 12, -1)
    samples = []
    for label, score in zip(labels, target, strict=True):
        sample = DataSample()
        samples.append(
            sample.set_gt_score(score) if given == "gt_score" else sample.set_gt_label(label)
        )
    if given == "token_label":
        maps = torch.rand(4, CLASSES, 3, 4).softmax(1)
        dense = maps.flatten(2).transpose(1, 2)
        for sample, one in zip(samples, maps, strict=True):
            sample.set_field(one.numpy(), "token_label")
    # The tokens of an image that MixToken has swapped lie in the other one: undo it by hand.
    swapped = patches.clone()
    rows, columns = slice(box[0], box[2]), slice(box[1], box[3])
    swapped[:, :, rows, columns] = patches.flip(0)[:, :, rows, columns]
    aux = head.aux_fc(swapped.flatten(2).transpose(1, 2))
    expected = token_label_loss(head.fc(token), aux, box.tolist(), smooth(target), smooth(dense))
    got = head.loss((token, patches, box), samples)
    assert list(got) == ["loss_cls", "loss_aux"]
    torch.testing.assert_close(tuple(got.values()), expected)
    only = VoloHead(CLASSES, 24, aux=False)
    only.fc = head.fc
    torch.testing.assert_close(only.loss((token, patches, box), samples)["loss"], expected[0])


def test_token_labels_that_do_not_match():
    head, given = VoloHead(CLASSES, 24), feats(BOXES[1])
    samples = [DataSample().set_gt_label(1) for _ in range(4)]
    samples[0].set_field(torch.zeros(CLASSES, 3, 4), "token_label")
    with pytest.raises(ValueError, match="must have token_label or none, got 1 of 4"):
        head.loss(given, samples)
    for sample in samples:
        sample.set_field(torch.zeros(CLASSES, 4, 3), "token_label")
    with pytest.raises(ValueError, match=r"shape \(7, 3, 4\) of classes .*, got \(7, 4, 3\)"):
        head.loss(given, samples)


def test_training_step_reaches_every_parameter():
    model = classifier(with_cp=True, drop_path_rate=0.1).train()
    samples = [DataSample().set_gt_label(i) for i in range(4)]
    losses = model(torch.randn(4, 3, 64, 64), samples, mode="loss")
    sum(losses.values()).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
