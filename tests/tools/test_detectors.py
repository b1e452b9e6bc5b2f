"""Exported detectors of both frameworks find what the frameworks find."""

import dataclasses
from itertools import product
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from digit_models import BOXES, DET, untrained

from elsa_core.runtime.errors import UsageError
from elsa_tools.export import verify as verify_module
from elsa_tools.export.build import wrap
from elsa_tools.export.onnx import write_onnx
from elsa_tools.export.record import record_of
from elsa_tools.export.verify import verify
from elsa_tools.predict import load_inferencer
from elsa_tools.predict.executors import Executor

SIZES = [(150, 170), (64, 97)]
CASCADE = {
    "detectron2": (
        "configs/detectron2/COCO-InstanceSegmentation/cascade_mask_rcnn_elsa_swin_t_fpn_1x.yaml",
        "MODEL.ELSA_SWIN.ARCH custom MODEL.ELSA_SWIN.CUSTOM_ARCH.EMBED_DIM 8 "
        "MODEL.ELSA_SWIN.CUSTOM_ARCH.DEPTHS [1,1,1,1] "
        "MODEL.ELSA_SWIN.CUSTOM_ARCH.NUM_HEADS [1,2,2,2] "
        "MODEL.ELSA_SWIN.CUSTOM_ARCH.GROUP_WIDTH 2 MODEL.FPN.OUT_CHANNELS 8 "
        "MODEL.ROI_HEADS.NUM_CLASSES 3 MODEL.ROI_BOX_HEAD.CONV_DIM 8 MODEL.ROI_BOX_HEAD.FC_DIM 16 "
        "MODEL.ROI_MASK_HEAD.CONV_DIM 8",
    ),
    "mmdet": (
        "configs/mmdet/elsa_swin/"
        "cascade-mask-rcnn_elsa-swin-t-p4-w7_fpn_4conv1fc-giou_amp-ms-crop-1x_coco.py",
        "model.backbone.arch._delete_=True model.backbone.arch.embed_dim=8 "
        "model.backbone.arch.depths=[1,1,1,1] "
        "model.backbone.arch.num_heads=[1,2,2,2] model.backbone.arch.group_width=2 "
        "model.neck.in_channels=[8,16,32,64] model.neck.out_channels=8 "
        "model.rpn_head.in_channels=8 model.rpn_head.feat_channels=8 "
        "model.roi_head.bbox_roi_extractor.out_channels=8 "
        "model.roi_head.mask_roi_extractor.out_channels=8 "
        "model.roi_head.mask_head.in_channels=8 model.roi_head.mask_head.conv_out_channels=8 "
        "model.roi_head.mask_head.num_classes=3 "
        + " ".join(
            f"model.roi_head.bbox_head.{stage}.{option}"
            for stage in range(3)
            for option in (
                "in_channels=8",
                "conv_out_channels=8",
                "fc_out_channels=16",
                "num_classes=3",
            )
        ),
    ),
}


@pytest.fixture(scope="module")
def models():
    return {framework: untrained(config) for framework, config in DET.items()}


@pytest.fixture(scope="module")
def boxes():
    return {framework: untrained(DET[framework], options) for framework, options in BOXES.items()}


@pytest.fixture(scope="module")
def cascades():
    return small_cascades()


@pytest.fixture(scope="module")
def box_cascades():
    return small_cascades(BOXES)


def small_cascades(more=None):
    """With statistics of batch norm that are not those of new layers."""
    found = {}
    for framework, (config, options) in CASCADE.items():
        torch.manual_seed(3)
        path = str(Path(__file__).resolve().parents[2] / config)
        options = options.split()
        if more:  # MMEngine lets no option follow that is inside of None
            options = [one for one in options if "roi_head.mask" not in one] + more[framework]
        found[framework] = load_inferencer(path, None, device="cpu", options=options)
        for name, value in found[framework].model.state_dict().items():
            if name.endswith(("running_mean", "running_var")):
                value.uniform_(0.5, 2)
            if name.endswith(("fc_cls.weight", "cls_score.weight")):
                value.normal_(std=0.5)
    return found


def found_by(framework, inferencer, images):
    """Boxes, scores, labels and, of models with them, masks for each image [3, H, W], RGB, by the
    framework."""
    with torch.no_grad():
        if framework == "detectron2":
            for result in inferencer.model([{"image": image} for image in images]):
                found = result["instances"]
                masks = [found.pred_masks] if found.has("pred_masks") else []
                yield found.pred_boxes.tensor, found.scores, found.pred_classes, *masks
            return
        from mmdet.structures import DetDataSample

        data = dict(inputs=[image.flip(0).byte() for image in images], data_samples=[])
        for image in images:
            size = tuple(image.shape[1:])
            meta = dict(img_shape=size, ori_shape=size, scale_factor=(1.0, 1.0))
            data["data_samples"].append(DetDataSample(metainfo=meta))
        for result in inferencer.model.test_step(data):
            found = result.pred_instances
            masks = [torch.as_tensor(found.masks)] if "masks" in found else []
            yield found.bboxes, found.scores, found.labels, *masks


@pytest.mark.parametrize("framework", DET)
@pytest.mark.parametrize(
    "kind, size",
    [*product(["models", "cascades"], SIZES), ("boxes", SIZES[0]), ("box_cascades", SIZES[1])],
    ids=str,
)
def test_pytorch_finds_the_same(kind, framework, size, request):
    """A batch of two images of different sizes, with noise in the padding."""
    models = request.getfixturevalue(kind)
    module = wrap(models[framework], pasted=kind in ("models", "cascades"))
    image = torch.randint(0, 256, (2, 3, *size)).float()
    sizes = torch.tensor([size, (size[0] - 20, size[1] - 30)])
    with torch.no_grad():
        boxes, scores, labels, images, *masks = module(image, sizes)
    alone = [one[:, :h, :w] for one, (h, w) in zip(image, sizes.tolist(), strict=True)]
    for row, wanted in enumerate(found_by(framework, models[framework], alone)):
        own = images == row
        assert len(wanted[0]) == own.sum() > 20
        # Detections whose scores are as near as rounding may change places.
        apart = (boxes[own][:, None] - wanted[0]).abs().amax(-1)
        distance, place = (apart + 1e3 * (labels[own][:, None] != wanted[2])).min(0)
        # Of two boxes with one score to within rounding, suppression keeps either.
        same = distance < 1e-3
        assert same.sum() >= own.sum() - int(kind == "box_cascades")
        assert len(place[same].unique()) == same.sum()
        rounding = 1e-4 if kind == "box_cascades" else 1e-5
        assert (scores[own][place] - wanted[1])[same].abs().max() < rounding
        height, width = sizes[row].tolist()
        assert len(masks) == len(wanted) - 3 == module.pasted
        for got, those in zip(masks, wanted[3:], strict=True):
            assert (got[own][place][:, :height, :width] != those).float().mean() < 1e-4


@pytest.mark.parametrize("framework", DET)
def test_an_image_without_objects(models, framework):
    module = wrap(models[framework])
    with torch.no_grad():
        module.roi_head.bbox_head[0].fc_cls.bias[-1] = 99  # background everywhere
        found = module(torch.zeros(1, 3, 40, 40), torch.tensor([[40, 40]]))
        assert [tuple(value.shape) for value in found] == [(0, 4), (0,), (0,), (0,), (0, 28, 28)]
        module.rpn_head.rpn_reg.bias.fill_(-1e9)  # boxes without sides are no proposals
        found = module(torch.zeros(2, 3, 40, 40), torch.tensor([[40, 40], [30, 40]]))
    assert [len(value) for value in found] == [0] * 5


@pytest.fixture(scope="module")
def files(models, tmp_path_factory):
    """The ONNX file of each framework's model, both with the tensors of MMDetection's."""
    modules = {framework: wrap(inferencer) for framework, inferencer in models.items()}
    modules["detectron2"].load_state_dict(modules["mmdet"].state_dict())
    paths = {}
    for framework, module in modules.items():
        paths[framework] = str(tmp_path_factory.mktemp(framework) / "detector.onnx")
        write_onnx(module, paths[framework], record_of(models[framework]))
    return paths


@pytest.mark.slow
def test_both_frameworks_give_one_graph(files):
    """Nodes, attributes and constants are equal, whatever their names."""
    first, second = (onnx.load(path).graph for path in files.values())
    assert _structure(first) == _structure(second)
    for a, b in zip(first.initializer, second.initializer, strict=True):
        assert np.array_equal(onnx.numpy_helper.to_array(a), onnx.numpy_helper.to_array(b))


def _structure(graph):
    numbers = {}
    return [
        (
            node.op_type,
            [numbers.setdefault(name, len(numbers)) for name in (*node.input, *node.output)],
            [attribute.SerializeToString() for attribute in node.attribute],
        )
        for node in graph.node
    ]


@pytest.mark.slow
def test_an_onnx_file_finds_the_same(models, files):
    module = wrap(models["mmdet"])
    checks = list(verify(files["mmdet"], module, models["mmdet"]))
    assert len(checks) >= 4
    assert all(check.same and check.numbers["detections"] for check in checks)
    module.roi_head.bbox_head[0].fc_cls.bias.data[3] += 0.1
    assert not all(check.same for check in verify(files["mmdet"], module, None))


@pytest.mark.parametrize("framework", DET)
def test_pasted_masks_are_compared_at_the_models_size(models, framework, monkeypatch):
    """The drawn image is three times as large, and its masks would differ at their borders."""
    module = wrap(models[framework], pasted=True)

    class InPyTorch(Executor):
        def _run(self, arrays):
            with torch.no_grad():
                return [value.numpy() for value in module(*map(torch.from_numpy, arrays.values()))]

    record = dataclasses.replace(record_of(models[framework]), masks="pasted")
    executor = InPyTorch("x.onnx", record, module.inputs, module.names)
    monkeypatch.setattr(verify_module, "EXECUTORS", {"x": lambda *_: executor})
    monkeypatch.setattr(verify_module, "executors", lambda path: ["x"])
    *_, drawn = verify("x.onnx", module, models[framework])
    assert drawn.what == "a drawn image" and drawn.same and drawn.numbers["detections"]


@pytest.mark.slow
def test_an_onnx_file_of_a_cascade_finds_the_same(cascades, tmp_path):
    path = str(tmp_path / "cascade.onnx")
    module = wrap(cascades["mmdet"])
    write_onnx(module, path, record_of(cascades["mmdet"]))
    checks = list(verify(path, module, None))
    assert all(check.same and check.numbers["detections"] for check in checks)


@pytest.mark.slow
def test_unlikely_proposals_keep_their_order(models, files, tmp_path):
    """Below a probability of 1e-4, where onnxruntime's Sigmoid is not monotone."""
    module, file = wrap(models["mmdet"]), onnx.load(files["mmdet"])
    module.rpn_head.rpn_cls.bias.data -= 14
    (bias,) = (x for x in file.graph.initializer if x.name == "rpn_head.rpn_cls.bias")
    bias.CopyFrom(
        onnx.numpy_helper.from_array(module.rpn_head.rpn_cls.bias.detach().numpy(), bias.name)
    )
    path = str(tmp_path / "unlikely.onnx")
    onnx.save(file, path)
    assert all(check.same for check in verify(path, module, None))


@pytest.mark.parametrize(
    ("framework", "options", "sentence"),
    [
        ("detectron2", ["MODEL.FPN.FUSE_TYPE", "avg"], "FUSE_TYPE"),
        ("detectron2", ["MODEL.ROI_MASK_HEAD.POOLER_TYPE", "ROIAlign"], "aligned|alignment"),
        ("mmdet", ["model.test_cfg.rcnn.nms.type=soft_nms"], "nms.type must be 'nms'"),
        ("mmdet", ["model.neck.add_extra_convs=True"], "neck.add_extra_convs must be False"),
        ("mmdet", ["model.roi_head.mask_head.upsample_cfg.type=bilinear"], "upsample_cfg.type"),
    ],
)
def test_other_parts_are_refused(framework, options, sentence):
    inferencer = load_inferencer(DET[framework], None, device="cpu", options=options)
    with pytest.raises(UsageError, match=sentence):
        wrap(inferencer)


def test_masks_that_a_model_has_not_are_not_pasted(boxes):
    with pytest.raises(UsageError, match="--paste belongs to detectors with masks, got one"):
        wrap(boxes["mmdet"], pasted=True)
