"""Images of five channels and of 16 bits: the same values and detections in both frameworks."""

import json
from io import BytesIO

import numpy as np
import pytest

pytest.importorskip("detectron2")
pytest.importorskip("mmdet")
pytest.importorskip("mmseg")
pytest.importorskip("tifffile", reason="tifffile is not installed")

import cv2
import d2_sem_seg_tiny
import tifffile
import torch
from docs_blocks import REPOSITORY, read_page
from mmcv.transforms import Resize
from mmengine.config import Config
from PIL import Image

from elsa_core.runtime.errors import DamagedFileError, UsageError
from elsa_core.weights import convert_file
from elsa_d2 import load_config
from elsa_d2.data.safe_loading import read_image
from elsa_d2.data.sem_seg_mapper import SemSegMapper
from elsa_d2.engine.command import Command
from elsa_d2.engine.preflight import check_run
from elsa_mm import cli, preflight
from elsa_mm.safe_loading import LoadChannels, replace_readers
from elsa_mm.segmentation import AnyChannelsSegPreprocessor
from elsa_tools.predict import load_inferencer
from elsa_tools.predict.inputs import as_picture
from elsa_tools.predict.inputs import read_image as read_in_demo

DEEP = np.random.default_rng(0).integers(0, 65536, (6, 7, 5)).astype(np.uint16)
SHALLOW = (DEEP >> 8).astype(np.uint8)
FLOAT = (DEEP / 7.0 - 3000).astype(np.float32)


def tiff(pixels, **options):
    file = BytesIO()
    tifffile.imwrite(file, pixels, **{"photometric": "minisblack", **options})
    return file.getvalue()


def png(pixels):
    order = [2, 1, 0, 3][: pixels.shape[2]] if pixels.shape[2] > 1 else [0]
    return cv2.imencode(".png", pixels[..., order])[1].tobytes()


def pillow(image, kind="PNG"):
    file = BytesIO()
    image.save(file, kind)
    return file.getvalue()


PLANES = np.moveaxis(DEEP, -1, 0)
FILES = {
    "contiguous.tif": (tiff(DEEP, planarconfig="contig"), DEEP),
    "planar.tif": (tiff(PLANES, planarconfig="separate"), DEEP),
    "pages.tif": (tiff(PLANES), DEEP),
    "big.tif": (tiff(DEEP, planarconfig="contig", bigtiff=True, byteorder=">"), DEEP),
    "deflate.tif": (tiff(SHALLOW, planarconfig="contig", compression="zlib"), SHALLOW),
    "float.tif": (tiff(FLOAT, planarconfig="contig"), FLOAT),
    "signed.tif": (tiff(DEEP.view(np.int16), planarconfig="contig"), DEEP.view(np.int16)),
    "rgb.tif": (tiff(DEEP[..., :3], photometric="rgb"), DEEP[..., :3]),
    "grey.tif": (tiff(DEEP[..., 0]), DEEP[..., :1]),
    "turned.tif": (
        tiff(DEEP, planarconfig="contig", extratags=[(274, 3, 1, 6, True)]),
        DEEP[::-1].swapaxes(0, 1),
    ),
    "grey, 16 bits.png": (png(DEEP[..., :1]), DEEP[..., :1]),
    "rgb, 16 bits.png": (png(DEEP[..., :3]), DEEP[..., :3]),
    "rgba, 16 bits.png": (png(DEEP[..., :4]), DEEP[..., :4]),
    "rgba.png": (png(SHALLOW[..., :4]), SHALLOW[..., :4]),
    "grey and alpha.png": (pillow(Image.fromarray(SHALLOW[..., :2], "LA")), SHALLOW[..., :2]),
    "rgb.bmp": (pillow(Image.fromarray(SHALLOW[..., :3]), "BMP"), SHALLOW[..., :3]),
}
NAN = FLOAT.copy()
NAN[1, 2, 3] = np.nan
REFUSED = {
    "double.tif": (tiff(FLOAT.astype(np.float64), planarconfig="contig"), "of type float64"),
    "long.tif": (tiff(DEEP.astype(np.int32), planarconfig="contig"), "values of type int32"),
    "nan.tif": (tiff(NAN, planarconfig="contig"), "has values that are NaN or infinite"),
    "four.tif": (tiff(DEEP[..., :4], planarconfig="contig"), "has 4 channels, the model takes 5"),
    "grey.png": (png(DEEP[..., :1]), "has 1 channels, the model takes 5"),
    "half.tif": (tiff(np.tile(DEEP, (9, 9, 1)), planarconfig="contig")[:9000], ""),
    "half.png": (png(np.tile(DEEP[..., :3], (9, 9, 1)))[:900], "truncated"),
    "palette.png": (pillow(Image.fromarray(SHALLOW[..., :3]).quantize(9)), "Pillow's mode P"),
    "text.tif": (b"<html>404</html>", "is no image of a known kind"),
}


@pytest.mark.parametrize("name", FILES)
def test_both_frameworks_read_the_files_values(name, tmp_path):
    data, expected = FILES[name]
    path = tmp_path / name
    path.write_bytes(data)
    channels = expected.shape[2]
    steps = [dict(type="LoadImageFromFile", imdecode_backend="tifffile", to_float32=True)]
    replace_readers({"pipeline": steps})
    assert steps[0].pop("type") is LoadChannels
    images = {
        "detectron2": read_image(str(path), f"C{channels}"),
        "openmmlab": LoadChannels(**steps[0]).transform({"img_path": str(path)})["img"],
        "demo": read_in_demo(str(path), channels),
    }
    for reader, image in images.items():
        assert image.dtype == np.float32 and image.flags.c_contiguous, reader
        np.testing.assert_array_equal(image, expected, err_msg=reader)
    assert as_picture(images["demo"]).shape == (*expected.shape[:2], 3)


@pytest.mark.parametrize("name", REFUSED)
def test_others_are_refused_in_one_sentence(name, tmp_path):
    data, words = REFUSED[name]
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(DamagedFileError) as caught:
        read_image(str(path), "C5")
    assert str(path) in str(caught.value) and words in str(caught.value)
    assert "\n" not in str(caught.value)
    if "channels" not in words:  # which the data preprocessor compares
        with pytest.raises(DamagedFileError) as again:
            LoadChannels(imdecode_backend="tifffile").transform({"img_path": str(path)})
        assert str(again.value) == str(caught.value)


@pytest.fixture(scope="module")
def guide(tmp_path_factory, digits):
    """A folder with the configs of docs/channels.md and a few of its images."""
    folder = tmp_path_factory.mktemp("bands")
    (folder / "configs").symlink_to(REPOSITORY / "configs")
    (folder / "my_data").symlink_to(digits)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for block in read_page(REPOSITORY / "docs/channels.md"):
            if block.mark == "file":
                (folder / block.what).write_text(block.code)
            elif block.language == "python":
                exec(block.code, {})
    for part in ("training", "validation"):
        content = json.loads((folder / f"my_bands/{part}.json").read_text())
        content["images"] = content["images"][:2]
        known = {image["id"] for image in content["images"]}
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] in known]
        (folder / f"my_bands/{part}.json").write_text(json.dumps(content))
    return folder


SMALL = ["MODEL.DEVICE", "cpu", "SOLVER.MAX_ITER", "1", "SOLVER.IMS_PER_BATCH", "2"]
SMALL += ["DATALOADER.NUM_WORKERS", "0", "INPUT.MIN_SIZE_TRAIN", "(96,)", "INPUT.MIN_SIZE_TEST"]
SMALL += ["96", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0", "TEST.DETECTIONS_PER_IMAGE", "20"]
RESIZE = "test_dataloader.dataset.pipeline.1.scale=(480,96)"
FOUND = ["model.test_cfg.rcnn.score_thr=0.0", "model.test_cfg.rcnn.max_per_img=20"]
OTHERS = [
    "train_dataloader.batch_size=2",
    *(f"{part}_dataloader.num_workers=0" for part in ("train", "val", "test")),
    *(f"{part}_dataloader.persistent_workers=False" for part in ("train", "val", "test")),
    "train_dataloader.dataset.pipeline.2.scales=[(480,96)]",
    "val_dataloader.dataset.pipeline.1.scale=(480,96)",
    "train_cfg.max_iters=1",
    "train_cfg.val_interval=1",
]


def detectron2(*arguments):
    Command("train_net", "", "").main(["--config-file", "five_channels.yaml", *arguments])


def found(inferencer, path):
    return inferencer.predict(read_in_demo(path, inferencer.channels))


def test_the_same_detections_in_both_frameworks(guide, monkeypatch):
    """Trained and evaluated in Detectron2, converted, found again in MMDetection, which trains."""
    monkeypatch.chdir(guide)
    detectron2(*SMALL)
    assert json.loads(open("runs/bands/metrics.json").read().splitlines()[0])["total_loss"] > 0
    convert_file("runs/bands/model_final.pth", "mm.pth", "mmdet")
    first = load_inferencer("five_channels.yaml", "runs/bands/model_final.pth", options=SMALL)
    second = load_inferencer("five_channels.py", "mm.pth", options=[RESIZE, *FOUND])
    assert first.channels == second.channels == 5
    path = str(next((guide / "my_bands/validation").glob("*.tif")))
    one, two = found(first, path), found(second, path)
    assert len(one.scores) == 20
    for name in ("labels", "scores", "boxes"):
        np.testing.assert_allclose(getattr(one, name), getattr(two, name), rtol=1e-4, atol=1e-3)
    assert (one.masks == two.masks).mean() > 0.9999
    image = as_picture(read_in_demo(path, 5))
    assert first.draw(image, one.above(1.1)).shape == image.shape
    for inferencer, words in ((first, "must be RGB, got C5"), (second, "bgr_to_rgb must be True")):
        with pytest.raises(UsageError, match=words):  # it is not exported
            inferencer.normalisation()
    options = ["--cfg-options", RESIZE, *FOUND, *OTHERS, "load_from=mm.pth"]
    assert cli.train(["five_channels.py", *options]) == 0
    assert cli.test(["five_channels.py", "work_dirs/bands/iter_1.pth", *options[:-1]]) == 0
    with pytest.raises(ValueError, match=r"shape \(H, W, 5\), got \(9, 9, 1\)"):
        first.predictor(np.zeros((9, 9, 1), np.float32))
    with pytest.raises(DamagedFileError, match="must have the 5 channels of data_preproc.* got 1"):
        second.predict(np.zeros((9, 9, 1), np.float32))


def test_segmentors_take_the_same_values_in_both_frameworks(guide, tmp_path):
    path = str(next((guide / "my_bands/validation").glob("*.tif")))
    mean, std = load_config(str(guide / "five_channels.yaml")).MODEL.PIXEL_MEAN, [100.0] * 5
    keys = {"INPUT.FORMAT": "C5", "MODEL.PIXEL_MEAN": mean, "MODEL.PIXEL_STD": std}
    keys |= {
        "MODEL.DEVICE": "cpu",
        "INPUT.SEM_SEG.SCALE": [80, 80],
        "INPUT.SEM_SEG.COLOR_AUG": True,
    }
    cfg = load_config(d2_sem_seg_tiny.DIGITS, [str(part) for pair in keys.items() for part in pair])
    with pytest.raises(UsageError, match="INPUT.SEM_SEG.COLOR_AUG changes colours of RGB images"):
        check_run(cfg)
    cfg.INPUT.SEM_SEG.COLOR_AUG = False
    first = SemSegMapper(cfg, False)({"file_name": path})["image"]
    first = (first - torch.tensor(mean).view(-1, 1, 1)) / 100
    image = LoadChannels(imdecode_backend="tifffile").transform({"img_path": path})
    image = Resize(scale=(80, 80), keep_ratio=True).transform(image)["img"]
    preprocessor = AnyChannelsSegPreprocessor(mean, std)
    inputs = {"inputs": [torch.from_numpy(image.transpose(2, 0, 1))]}
    assert torch.equal(preprocessor(inputs)["inputs"][0], first) and first.shape == (5, 80, 80)
    Image.fromarray(np.zeros((96, 96), np.uint8)).save(tmp_path / "labels.png")
    record = {"file_name": path, "sem_seg_file_name": str(tmp_path / "labels.png")}
    cfg.INPUT.SEM_SEG.MAX_CATEGORY_RATIO, cfg.INPUT.SEM_SEG.CROP_SIZE = 1.0, [200, 200]
    padded = SemSegMapper(cfg, True)(record)["image"]
    assert padded.shape == (5, 200, 200) and padded[:, -1, -1].tolist() == mean
    for values in ([1.0], []):
        with pytest.raises(ValueError, match="mean and std must have a value for each channel"):
            AnyChannelsSegPreprocessor(values, std[: len(values)] * 2)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (["MODEL.PIXEL_STD", "[1.0]"], "got 5 and 1 values and C5"),
        (["INPUT.FORMAT", "RGB"], "INPUT.FORMAT, C5 for 5 channels, got 5 and 5 values and RGB"),
        (["INPUT.FORMAT", "C4"], "got 5 and 5 values and C4"),
        (["INPUT.RESIZE_BACKEND", "pil"], "C5 needs INPUT.RESIZE_BACKEND cv2"),
        (["VIS_PERIOD", "5"], "needs VIS_PERIOD 0, got 5"),
    ],
)
def test_configs_of_detectron2_that_contradict_themselves(keys, words, guide, monkeypatch):
    monkeypatch.chdir(guide)
    with pytest.raises(UsageError, match=words):
        check_run(load_config("five_channels.yaml", ["MODEL.DEVICE", "cpu", *keys]))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model.backbone.in_chans": 4}, "each of the 4 channels of model.backbone.in_chans, got"),
        ({"model.data_preprocessor.type": "DetDataPreprocessor"}, "must be elsa_mm.detection.Any"),
        ({"model.data_preprocessor.bgr_to_rgb": True}, "bgr_to_rgb and rgb_to_bgr must be False"),
        (
            {"train_dataloader.dataset.pipeline.3.type": "PhotoMetricDistortion"},
            "PhotoMetricDistortion in the train pipeline changes colours of RGB images",
        ),
    ],
)
def test_configs_of_openmmlab_that_contradict_themselves(changes, words, guide, monkeypatch):
    monkeypatch.chdir(guide)
    cfg = Config.fromfile("five_channels.py")
    preflight.check_config(cfg)
    cfg.merge_from_dict(changes)
    with pytest.raises(UsageError, match=words):
        preflight.check_config(cfg)
