"""Files of detectors without masks: what they give, and how they are run and described."""

import pytest
from digit_models import BOXES, DET, untrained

from elsa_core.weights import convert, recognise
from elsa_tools.export.build import wrap
from elsa_tools.export.record import record_of
from elsa_tools.export.write import write_model
from elsa_tools.predict import load_exported
from elsa_tools.verify.image import drawn_image

OUTPUTS = ["boxes", "scores", "labels", "images"]


@pytest.fixture(scope="module")
def models():
    return {framework: untrained(DET[framework], options) for framework, options in BOXES.items()}


@pytest.mark.slow
def test_a_file_finds_the_boxes(models, tmp_path):
    inferencer, path = models["mmdet"], str(tmp_path / "boxes.onnx")
    checks, _ = write_model(wrap(inferencer), record_of(inferencer), path, inferencer=inferencer)
    assert all(check.same and check.numbers["detections"] for check in checks)
    assert not any("mask IoU" in check.numbers for check in checks)
    model = load_exported(path)
    assert model.model.outputs == OUTPUTS and model.record.masks is None
    image = drawn_image().numpy()
    found, wanted = model.predict(image), inferencer.predict(image)
    assert len(found.boxes) == len(wanted.boxes) > 0
    assert found.masks is None and found.to_supervision(model.classes).mask is None
    assert model.draw(image, found).shape == image.shape
    assert "segmentation" not in found.to_coco(1, list(range(10)))[0]


@pytest.mark.parametrize("framework", DET)
def test_weights_without_masks_go_to_the_other_framework(models, framework):
    other = "mmdet" if framework == "detectron2" else "detectron2"
    source = recognise(models[framework].model.state_dict())
    assert "Faster R-CNN" in str(source)
    converted = convert(source, other, anchor_sizes=1)
    assert converted.tensors.keys() == models[other].model.state_dict().keys()
    back = convert(recognise(converted.tensors), framework, anchor_sizes=1).tensors
    assert back.keys() == {old for _, (old, _) in source.tensors.items()}
