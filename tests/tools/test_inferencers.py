"""The frameworks' own predictors with our configs: what their users call directly."""

import cv2
import numpy as np
import pytest
import torch
from detectron2.engine import DefaultPredictor
from digit_models import DET, DIGITS, SEG, save_untrained
from mmdet.apis import DetInferencer, inference_detector, init_detector
from mmengine.registry import DefaultScope
from mmseg.apis import MMSegInferencer

import elsa_core.weights
import elsa_d2
from elsa_tools.predict import Detections, load_inferencer
from elsa_tools.predict.inputs import read_image

D2, MMDET = DET["detectron2"], DET["mmdet"]
MMSEG = SEG["mmseg"]


@pytest.fixture(scope="module")
def image(digits):
    return str(sorted((digits / "images/validation").glob("*.jpg"))[0])


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    return save_untrained(MMDET, tmp_path_factory.mktemp("weights") / "detector.pth")


@pytest.fixture(scope="module")
def segmentor(tmp_path_factory):
    return save_untrained(MMSEG, tmp_path_factory.mktemp("weights") / "segmentor.pth")


def test_det_inferencer_finds_what_the_test_pipeline_finds(detector, image):
    ours = load_inferencer(MMDET, detector, device="cpu").predict(cv2.imread(image)).above(0.05)
    with DefaultScope.overwrite_default_scope("mmdet"):
        inferencer = DetInferencer(MMDET, detector, device="cpu", show_progress=False)
        found = inferencer(image, no_save_vis=True, return_vis=False)["predictions"][0]
    order = np.argsort(-np.array(found["scores"]), kind="stable")
    assert len(order) == len(ours.scores) > 0
    assert np.allclose(np.array(found["scores"])[order], ours.scores, atol=1e-5)
    assert np.allclose(np.array(found["bboxes"])[order], ours.boxes, atol=1e-3)


def test_inference_detector_finds_what_the_test_pipeline_finds(detector, image):
    ours = load_inferencer(MMDET, detector, device="cpu").predict(cv2.imread(image)).above(0)
    with DefaultScope.overwrite_default_scope("mmdet"):
        model = init_detector(MMDET, detector, device="cpu")
        found = inference_detector(model, image).pred_instances
    assert model.dataset_meta["classes"] == DIGITS
    assert np.allclose(found.scores, ours.scores, atol=1e-5)
    assert np.allclose(found.bboxes, ours.boxes, atol=1e-3)


def test_mmseg_inferencer_finds_what_the_test_pipeline_finds(segmentor, image):
    ours = load_inferencer(MMSEG, segmentor, device="cpu").predict(cv2.imread(image))
    with DefaultScope.overwrite_default_scope("mmseg"):
        inferencer = MMSegInferencer(
            MMSEG, segmentor, device="cpu", classes=["background", *DIGITS],
            palette=[[index * 20] * 3 for index in range(11)],
        )  # fmt: skip
        found = inferencer(image, show=False)["predictions"]
    assert np.array_equal(found, ours.labels)


def test_default_predictor_reads_blue_first_as_its_users_expect(detector, image, tmp_path):
    file = tmp_path / "d2.pth"
    elsa_core.weights.convert_file(detector, file, "detectron2", anchor_sizes=2)
    overrides = ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", str(file), "INPUT.MIN_SIZE_TEST", "96"]
    cfg = elsa_d2.load_config(D2, overrides)
    found = DefaultPredictor(cfg)(cv2.imread(image))["instances"]
    predictor = elsa_d2.Predictor(cfg)
    again = predictor(read_image(image))["instances"]
    # The same to a rounding of the JPEG decoders: an image of the test's size is not resized.
    assert len(found) == len(again) > 0
    assert torch.allclose(found.scores, again.scores, atol=0.02)
    # As the test loader makes it: RGB, in single precision, normalised in the model.
    mapper = elsa_d2.DetectionMapper(cfg, is_train=False)
    loaded = mapper({"file_name": image, "height": 96, "width": 96})
    with torch.no_grad():
        tested = predictor.model([loaded])[0]["instances"]
    assert torch.allclose(tested.scores, again.scores, atol=1e-5)
    assert torch.allclose(tested.pred_boxes.tensor, again.pred_boxes.tensor, atol=1e-3)


def test_predictor_takes_weights_of_openmmlab(segmentor, image):
    overrides = ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", segmentor]
    cfg = elsa_d2.load_config(SEG["detectron2"], overrides)
    predictor = elsa_d2.Predictor(cfg)
    assert predictor.cfg.MODEL.WEIGHTS == segmentor
    found = predictor(read_image(image))["sem_seg"].argmax(0).numpy()
    ours = load_inferencer(MMSEG, segmentor, device="cpu").predict(read_image(image))
    assert (found == ours.labels).mean() > 0.99


@pytest.mark.parametrize("config", [D2, MMDET])
def test_names_that_matplotlib_would_take_for_formulas_are_painted(config):
    inferencer = load_inferencer(config, None, device="cpu")
    image = np.zeros((200, 300, 3), np.uint8)
    found = Detections(np.array([0]), np.array([0.9]), np.float32([[20, 90, 280, 190]]))
    pictures = []
    for name in ("$1_$", "1_"):
        inferencer.classes[0], inferencer.painter = name, None
        pictures.append(inferencer.draw(image, found))
    assert (pictures[0] != pictures[1]).any()  # by the two dollars
