"""The cascade's heads: structure, sampling, refinement, images without objects, refusals."""

import copy

import pytest
import torch

pytest.importorskip("detectron2")

from detectron2.modeling import build_model
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from killing_d2 import in_two_processes
from torch import nn

from elsa_d2 import ClassSpecificCascadeROIHeads, UsageError, load_config
from elsa_d2.modeling.boxes import MMDetBoxTransform
from elsa_d2.modeling.cascade import StageMaskHeads
from elsa_d2.modeling.norm import SyncBatchNorm, resolve_norm
from elsa_d2.modeling.tta import with_test_time_augmentation

LEAF = "configs/detectron2/COCO-InstanceSegmentation/cascade_mask_rcnn_elsa_swin_t_fpn_1x.yaml"
CLASSES = 3
SIZE = (64, 96)
SMALL = {
    "MODEL.DEVICE": "cpu",
    "MODEL.ELSA_SWIN.ARCH": "custom",
    "MODEL.ELSA_SWIN.CUSTOM_ARCH.EMBED_DIM": 8,
    "MODEL.ELSA_SWIN.CUSTOM_ARCH.DEPTHS": [1, 1, 1, 1],
    "MODEL.ELSA_SWIN.CUSTOM_ARCH.NUM_HEADS": [1, 2, 2, 2],
    "MODEL.ELSA_SWIN.CUSTOM_ARCH.GROUP_WIDTH": 2,
    "MODEL.FPN.OUT_CHANNELS": 8,
    "MODEL.ROI_HEADS.NUM_CLASSES": CLASSES,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 16,
    "MODEL.ROI_BOX_HEAD.CONV_DIM": 8,
    "MODEL.ROI_BOX_HEAD.FC_DIM": 16,
    "MODEL.ROI_MASK_HEAD.CONV_DIM": 8,
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.0,
}


def config(repository, **changes):
    keys = SMALL | {key.replace("__", "."): value for key, value in changes.items()}
    pairs = [str(part) for pair in keys.items() for part in pair]
    return load_config(str(repository / LEAF), pairs)


@pytest.fixture(scope="module")
def repository(request):
    return request.config.rootpath


@pytest.fixture(scope="module")
def model(repository):
    torch.manual_seed(0)
    return build_model(config(repository))


@pytest.fixture(scope="module")
def features(model):
    return model.backbone(torch.randn(2, 3, *SIZE))


def proposals(*boxes):
    return [
        Instances(SIZE, proposal_boxes=Boxes(item), objectness_logits=torch.zeros(len(item)))
        for item in (torch.as_tensor(item, dtype=torch.float32).reshape(-1, 4) for item in boxes)
    ]


def targets(*boxes):
    made = []
    for item in boxes:
        item = torch.as_tensor(item, dtype=torch.float32).reshape(-1, 4)
        masks = BitMasks(torch.ones(len(item), *SIZE, dtype=torch.bool))
        classes = torch.arange(len(item)) % CLASSES
        made.append(Instances(SIZE, gt_boxes=Boxes(item), gt_classes=classes, gt_masks=masks))
    return made


OBJECTS = [[8, 8, 40, 40], [50, 20, 90, 60]]
AROUND = [[x, y, x + w, y + 30] for x in (2, 6, 10, 48, 55) for y in (4, 9, 22) for w in (28, 40)]


def test_structure(model):
    heads = model.roi_heads
    assert type(heads) is ClassSpecificCascadeROIHeads and heads.num_cascade_stages == 3
    shapes = {name: tuple(p.shape) for name, p in heads.named_parameters()}
    for stage in range(3):
        assert shapes[f"mask_head.{stage}.predictor.weight"] == (CLASSES, 8, 1, 1)
        assert shapes[f"box_predictor.{stage}.bbox_pred.weight"] == (4 * CLASSES, 16)
        assert shapes[f"box_predictor.{stage}.cls_score.weight"] == (CLASSES + 1, 16)
        assert shapes[f"box_head.{stage}.conv4.norm.weight"] == (8,)
        assert f"box_head.{stage}.conv1.bias" not in shapes
        assert type(heads.box_head[stage].conv1.norm) is SyncBatchNorm
    weights = [list(p.box2box_transform.weights) for p in heads.box_predictor]
    centre, size = 1 / 0.033, 1 / 0.067
    expected = [[10, 10, 5, 5], [20, 20, 10, 10], [centre, centre, size, size]]
    assert weights == [pytest.approx(item, rel=1e-15) for item in expected]
    assert heads.stage_loss_weights == [1.0, 0.5, 0.25]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_boxes_shrink_and_grow_by_the_same_factor_at_most(dtype):
    transform = MMDetBoxTransform(weights=(10.0, 10.0, 5.0, 5.0))
    boxes = torch.tensor([[0.0, 0.0, 100.0, 50.0], [10.0, 10.0, 30.0, 40.0]])
    deltas = torch.tensor([[0, 0, -1e3, 1e3, 1, -2, 0.5, -0.5], [0, 0, 1e3, -1e3, 0, 0, 0, 0]])
    moved = transform.apply_deltas(deltas.to(dtype), boxes).reshape(2, 2, 4)
    extent = moved[..., 2:] - moved[..., :2]
    ratio = 1000 / 16
    torch.testing.assert_close(extent[0, 0], torch.tensor([100 / ratio, 50 * ratio]))
    torch.testing.assert_close(
        extent[1, 0], torch.tensor([20 * ratio, 30 / ratio]), rtol=1e-4, atol=1e-4
    )
    stock = Box2BoxTransform(weights=(10.0, 10.0, 5.0, 5.0))
    usual = deltas[:, 4:].contiguous()
    torch.testing.assert_close(
        transform.apply_deltas(usual, boxes), stock.apply_deltas(usual, boxes), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize(
    "deviations", [(1, 1, 1, 1), (0.1, 0.1, 0.2, 0.2), (0.033, 0.033, 0.067, 0.067)]
)
def test_boxes_are_mmdetections_to_the_bit(deviations):
    coders = pytest.importorskip("mmdet.models.task_modules.coders")
    coder = coders.DeltaXYWHBBoxCoder(target_stds=deviations)
    corner = torch.rand(200, 2) * 300
    boxes = torch.cat([corner, corner + 5 + torch.rand(200, 2) * 200], 1)
    deltas = torch.randn(200, 12) * torch.tensor([1, 10, 100]).repeat(4)
    transform = MMDetBoxTransform(weights=tuple(1 / value for value in deviations))
    assert torch.equal(transform.apply_deltas(deltas, boxes), coder.decode(boxes, deltas))


def test_each_stage_samples_anew_with_its_threshold(model, features):
    heads = model.roi_heads.train()
    with EventStorage():
        chosen = heads._sample(0, proposals(AROUND, AROUND), targets(OBJECTS, OBJECTS[:1]))
        assert [len(item) for item in chosen] == [16, 16]
        assert [int(item.is_target.sum()) for item in chosen][0] <= 2
        # Thresholds .5, .6, .7: an overlap of 0.65 is an object for the second, not for the third.
        almost = [8, 8, 40, 8 + 32 * 0.65]
        for stage, label in enumerate([0, 0, CLASSES]):
            (item,) = heads._sample(stage, proposals([almost]), targets(OBJECTS[:1]))
            assert item.gt_classes[~item.is_target].tolist() == [label]
            assert item.is_target.sum() == 1
    assert heads.proposal_matcher is heads.proposal_matchers[0]


@pytest.mark.parametrize("training", [True, False])
def test_boxes_are_refined_for_their_class(model, training):
    heads = model.roi_heads.train(training)
    boxes = [[10.0, 10.0, 30.0, 30.0], [40.0, 20.0, 60.0, 50.0], [0.0, 0.0, 96.0, 64.0]]
    (item,) = proposals(boxes)
    # The background is always the most likely; then come classes 2, 1 and 0.
    logits = torch.tensor([[0.0, 1, 2, 9], [0, 2, 1, 9], [2, 1, 0, 9]])
    deltas = torch.zeros(3, CLASSES, 4)
    deltas[:, :, 0] = torch.tensor([1.0, 2.0, 3.0])  # class k moves a box by (k+1)/10 of its width
    if training:
        item.gt_classes = torch.tensor([CLASSES, 0, 1])
        item.is_target = torch.tensor([False, False, True])
    (refined,) = heads._refine(0, (logits, deltas.flatten(1)), [item])
    found = refined.proposal_boxes.tensor
    first = [10 + 6.0, 10, 30 + 6, 30]  # class 2: 3/10 of 20
    if training:
        # The second matches an object of class 0; the third is an object's own box and is left out.
        expected = [first, [40 + 2.0, 20, 60 + 2, 50]]
    else:
        # Class 1, class 0; the last one is cut at the image's edge.
        expected = [first, [40 + 4.0, 20, 60 + 4, 50], [9.6, 0, 96, 64]]
    torch.testing.assert_close(found, torch.tensor(expected))


def test_masks_are_the_mean_of_the_stages(model, features):
    heads = model.roi_heads.eval()
    given = Instances(SIZE, pred_boxes=Boxes(torch.tensor(OBJECTS) * 1.0))
    given.pred_classes = torch.tensor([2, 0])
    pooled = torch.randn(2, 8, 14, 14)
    each = [head(pooled, [given])[0].pred_masks for head in heads.mask_head]
    mean = heads.mask_head(pooled, [given])[0].pred_masks
    assert isinstance(heads.mask_head, StageMaskHeads)
    torch.testing.assert_close(mean, sum(each) / 3)
    assert not torch.equal(each[0], each[1])


@pytest.mark.parametrize(
    "boxes, objects",
    [
        ((AROUND, AROUND), (OBJECTS, [])),
        ((AROUND, AROUND), ([], [])),
        ((AROUND, []), (OBJECTS, [])),
        (([], []), ([], [])),
    ],
    ids=["an image without objects", "no objects", "an image without boxes", "no boxes at all"],
)
def test_training_without_objects_or_boxes(model, features, boxes, objects):
    heads = model.roi_heads.train()
    statistics = {name: value.clone() for name, value in heads.named_buffers()}
    with EventStorage():
        _, losses = heads(None, features, proposals(*boxes), targets(*objects))
    assert set(losses) == {
        f"loss_{kind}_stage{k}" for kind in ("cls", "box_reg", "mask") for k in range(3)
    }
    some = len(boxes[0])
    assert all(loss.isfinite() or not some for loss in losses.values())
    assert all(value.isfinite().all() for value in heads.buffers())
    if not some:
        assert all(torch.equal(value, statistics[name]) for name, value in heads.named_buffers())
    # Every parameter has a gradient, as processes that share gradients need.
    gradients = torch.autograd.grad(
        sum(losses.values()), list(heads.parameters()), retain_graph=True, allow_unused=True
    )
    assert all(gradient is not None for gradient in gradients)


@pytest.mark.parametrize("boxes", [(AROUND, []), ([], [])], ids=["one image", "none"])
def test_detection_without_boxes(model, features, boxes):
    heads = model.roi_heads.eval()
    with torch.no_grad():
        found, _ = heads(None, features, proposals(*boxes))
    assert [len(item) > 0 for item in found] == [len(item) > 0 for item in boxes]
    assert all(item.pred_masks.shape == (len(item), 1, 28, 28) for item in found)


REFUSALS = {
    "agnostic": ({"MODEL__ROI_BOX_HEAD__CLS_AGNOSTIC_BBOX_REG": True}, "AGNOSTIC_BBOX_REG False"),
    "keypoints": ({"MODEL__KEYPOINT_ON": True}, "no keypoint head"),
    "weights": ({"MODEL__ROI_BOX_CASCADE_HEAD__LOSS_WEIGHTS": "(1.0, 0.5)"}, "got 3, 3, 2"),
    "first threshold": ({"MODEL__ROI_HEADS__IOU_THRESHOLDS": [0.4]}, r"got \[0.4\]"),
}


@pytest.mark.parametrize("changes, message", REFUSALS.values(), ids=REFUSALS)
def test_refusals(repository, changes, message):
    with pytest.raises(UsageError, match=message):
        build_model(config(repository, **changes))


def test_without_masks(repository):
    model = build_model(config(repository, MODEL__MASK_ON=False)).train()
    features = model.backbone(torch.randn(1, 3, *SIZE))
    with EventStorage():
        _, losses = model.roi_heads(None, features, proposals(AROUND), targets(OBJECTS))
    assert len(losses) == 6 and not any("mask" in name for name in losses)


def test_one_process_normalises_as_batch_norm():
    x = torch.randn(3, 4, 5, 5, requires_grad=True)
    ours, theirs = SyncBatchNorm(4), nn.BatchNorm2d(4)
    assert {name for name, _ in ours.named_buffers()} == {n for n, _ in theirs.named_buffers()}
    for layer in (ours, theirs):
        layer(x)
    torch.testing.assert_close(ours(x), theirs(x))
    before = {name: value.clone() for name, value in ours.named_buffers()}
    torch.testing.assert_close(before, dict(theirs.named_buffers()))
    for layer in (ours.train(), ours.eval()):
        empty = layer(x[:0])
        assert empty.shape == (0, 4, 5, 5)
        gradient = torch.autograd.grad(empty.sum(), [layer.weight, layer.bias])
        assert all(torch.equal(value, torch.zeros(4)) for value in gradient)
    torch.testing.assert_close(before, dict(ours.named_buffers()), rtol=0, atol=0)
    assert resolve_norm("SyncBN") is SyncBatchNorm and resolve_norm("GN") == "GN"


PARTS = [(2, 1), (3, 0), (0, 0)]  # images of each of two processes


def normalise_in_two_processes(folder):
    layer, results = SyncBatchNorm(4), []
    for part in PARTS:
        x = torch.randn(sum(part), 4, 2, 3, generator=torch.Generator().manual_seed(sum(part)))
        mine = x.split(part)[comm.get_rank()].clone().requires_grad_()
        y = layer(mine)
        layer.zero_grad()
        (y * y.detach().cos()).sum().backward()
        own = [y.detach(), mine.grad, layer.weight.grad, layer.bias.grad]
        results.append((comm.all_gather(own), copy.deepcopy(layer.state_dict())))
    if comm.is_main_process():
        torch.save(results, folder / "results.pt")


@pytest.mark.slow
def test_two_processes_normalise_as_one(tmp_path):
    in_two_processes(tmp_path, normalise_in_two_processes, tmp_path)
    whole = nn.BatchNorm2d(4)
    for part, (found, state) in zip(PARTS, torch.load(tmp_path / "results.pt"), strict=True):
        outputs, inputs, weights, biases = zip(*found, strict=True)
        if sum(part):
            x = torch.randn(sum(part), 4, 2, 3, generator=torch.Generator().manual_seed(sum(part)))
            x.requires_grad_()
            y = whole(x)
            whole.zero_grad()
            (y * y.detach().cos()).sum().backward()
            torch.testing.assert_close(torch.cat(outputs), y.detach())
            torch.testing.assert_close(torch.cat(inputs), x.grad)
            torch.testing.assert_close(sum(weights), whole.weight.grad)
            torch.testing.assert_close(sum(biases), whole.bias.grad)
        torch.testing.assert_close(state, dict(whole.state_dict()))


def test_test_time_augmentation(repository, model):
    cfg = config(repository, TEST__AUG__MIN_SIZES=[64, 80], TEST__AUG__MAX_SIZE=120)
    cfg.TEST.DETECTIONS_PER_IMAGE = 5
    loader_cfg, augmented = with_test_time_augmentation(cfg, model)
    assert loader_cfg.INPUT.MIN_SIZE_TEST == 0 and cfg.INPUT.MIN_SIZE_TEST == 800
    image = torch.randint(0, 256, (3, *SIZE), dtype=torch.uint8)
    augmented.eval()
    with torch.no_grad():
        (result,) = augmented([dict(image=image, height=SIZE[0], width=SIZE[1])])
    found = result["instances"]
    assert 0 < len(found) <= 5 and found.pred_masks.shape == (len(found), *SIZE)
    assert model.roi_heads.mask_on


def test_test_time_augmentation_is_for_detectors(repository):
    cfg = config(repository, MODEL__META_ARCHITECTURE="PanopticFPN")
    with pytest.raises(UsageError, match="META_ARCHITECTURE GeneralizedRCNN, got PanopticFPN"):
        with_test_time_augmentation(cfg, nn.Identity())
