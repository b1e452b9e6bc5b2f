"""Damaged data with tools/train.py and tools/test.py: a sentence that names the file, status 2."""

import signal

import pytest
from damage import CONTRADICTIONS, colour, cut_all, edit, end_workers, no_images, paint, shrink
from killing import fork, statuses_of
from killing_mm import run_tool_to_its_end
from mm_tiny import CONFIGS, REPOSITORY, options
from mmengine.dataset import Compose

from elsa_core.runtime.errors import DamagedFileError
from elsa_mm import cli
from elsa_mm.safe_loading import LoadImage, Reading, replace_readers

SMALL = {"train_cfg__max_iters": 2, "train_cfg__val_interval": 2}


@pytest.fixture(autouse=True)
def no_workers_left():
    before = signal.getsignal(signal.SIGTERM)
    yield
    end_workers()
    assert signal.getsignal(signal.SIGTERM) == before  # a failed training listens no longer


IMAGES, MAPS = "images/training", "annotations/training"
READ = {
    # name: framework, folder, damage, workers, words
    "half an image": ("mmdet", IMAGES, cut_all, 0, "image {} cannot be read: image file is trunc"),
    "no image, in a worker": ("mmseg", IMAGES, no_images, 1, "image {} cannot be read: is no imag"),
    "an image of another size": (
        "mmdet",
        IMAGES,
        shrink,
        0,
        "image {} must have the (96, 96) pixels that its annotations say, got (50, 40)",
    ),
    "half a label map": ("mmseg", MAPS, cut_all, 0, "label map {} cannot be read: "),
    "a class out of range": (
        "mmseg",
        MAPS,
        paint(12),
        0,
        "labels must be 1..11 for 11 classes, or 0 or 255 for none, got 12 in {}",
    ),
    "a class out of range, in a worker": ("mmseg", MAPS, paint(254), 1, "got 254 in {}"),
    "a label map of another size": (
        "mmseg",
        MAPS,
        paint(1, (20, 30)),
        0,
        "as large as its image, got {} of (20, 30) pixels for (96, 96)",
    ),
    "a label map in colours": (
        "mmseg",
        MAPS,
        colour,
        0,
        "must have one channel of whole numbers, got {}",
    ),
}


@pytest.mark.parametrize("framework, folder, spoil, workers, words", READ.values(), ids=READ)
def test_a_file_that_training_meets(refusal, copy, framework, folder, spoil, workers, words):
    spoil(copy / folder)
    values = options(framework, copy, train_dataloader__num_workers=workers, **SMALL)
    sentence = refusal("train", CONFIGS[framework], *values)
    names = [str(file) for file in (copy / folder).iterdir()]
    assert any(words.format(name) in sentence for name in names), sentence


def test_a_file_that_an_evaluation_meets(refusal, copy, checkpoint):
    cut_all(copy / "images/validation")
    values = options("mmseg", copy, test_dataloader__num_workers=1)
    sentence = refusal("test", CONFIGS["mmseg"], checkpoint("mmseg"), *values)
    assert sentence.startswith(f"image {copy}/images/validation/")


def test_a_label_map_that_an_evaluation_at_several_scales_meets(refusal, copy, checkpoint):
    paint(100)(copy / "annotations/validation")
    sentence = refusal(
        "test", CONFIGS["mmseg"], checkpoint("mmseg"), "--tta", *options("mmseg", copy)
    )
    assert f"got 100 in {copy}/annotations/validation/" in sentence


@pytest.mark.parametrize("change, problem", CONTRADICTIONS)
def test_annotations_that_contradict_themselves(refusal, copy, change, problem):
    file = edit(copy, "validation", change)
    sentence = refusal("train", CONFIGS["mmdet"], *options("mmdet", copy))
    assert sentence.startswith(f"the val data's annotation file {file}: ")
    assert sentence.endswith(problem.format("a detector without mask_head"))


def test_the_evaluators_own_annotations(refusal, copy, digits):
    file = edit(copy, "validation", lambda content: content["annotations"][0].pop("bbox"))
    more = {"val_evaluator__ann_file": file}
    sentence = refusal("train", CONFIGS["mmdet"], *options("mmdet", digits, **more))
    assert sentence.startswith(f"the val evaluator's annotation file {file}: annotation ")
    assert sentence.endswith("must have a bbox of 4 numbers, got None")


def test_images_without_a_file(refusal, copy):
    (copy / "images/training/000003.jpg").unlink()
    assert refusal("train", CONFIGS["mmdet"], *options("mmdet", copy)) == (
        f"the train data's folder {copy}/images/training (img) lacks 1 of the 16 images in "
        "annotations/instances_training.json, the first is 000003.jpg"
    )


def test_images_without_a_label_map(refusal, copy):
    (copy / "annotations/validation/000003.png").unlink()
    assert refusal("train", CONFIGS["mmseg"], *options("mmseg", copy)) == (
        f"label map folder {copy}/annotations/validation lacks 1 of 8 label maps, "
        "the first is 000003.png"
    )


def test_every_process_says_what_it_has_read(monkeypatch, capfd):
    """What is found before a run, all processes find; a damaged file is read by one of them."""

    def fail(kind):
        def main(options):
            raise kind("image x cannot be read")

        return main

    monkeypatch.setenv("RANK", "3")
    arguments = type("Options", (), {"local_rank": 3})
    assert cli._run("train", fail(DamagedFileError), arguments) == 2
    assert capfd.readouterr().err == "train: image x cannot be read\n"
    assert cli._run("train", fail(cli.UsageError), arguments) == 2
    assert capfd.readouterr().err == ""


def test_every_step_that_reads_is_replaced_in_a_config():
    class LoadSomething:
        def __call__(self, results):
            raise ValueError("broken\ninside")

    image, other = {"type": "LoadImageFromFile", "to_float32": True}, {"type": LoadSomething}
    grey = {"type": "mmcv.LoadImageFromFile", "color_type": "grayscale"}
    holder = {"type": "RandomChoice", "transforms": [[dict(image)], (dict(other), grey)]}
    loader = {"dataset": {"datasets": [{"pipeline": [dict(image), holder]}]}, "type": "LoadThis"}
    replace_readers(loader)
    first, held = loader["dataset"]["datasets"][0]["pipeline"]
    (again,), (wrapped, as_asked) = held["transforms"]
    assert first == again == {"type": LoadImage, "to_float32": True}
    pillow = [{"type": "LoadImageFromFile", "imdecode_backend": "pillow"}]
    replace_readers({"pipeline": pillow})
    assert pillow[0]["type"] is LoadImage  # and not Pillow's own choice of formats
    assert wrapped == {"type": Reading, "transform": other} and as_asked["transform"] == grey
    assert loader["type"] == "LoadThis"
    with pytest.raises(DamagedFileError, match="annotations of image a.jpg .* broken inside"):
        Compose([wrapped])({"img_path": "a.jpg"})


@pytest.mark.slow
def test_the_process_ends_when_a_worker_has_met_damage(copy, tmp_path):
    cut_all(copy / "images/training")
    values = options("mmseg", copy, train_dataloader__num_workers=2, **SMALL)
    arguments = [CONFIGS["mmseg"], *values]
    process = fork(run_tool_to_its_end, REPOSITORY / "tools/train.py", arguments, tmp_path)
    assert statuses_of([process]) == [2]
    lines = (tmp_path / "log.txt").read_text().splitlines()
    # Not the last line: at the interpreter's end, Triton may report what it has not freed.
    (said,) = (line for line in lines if line.startswith("train: "))
    assert said.startswith(f"train: image {copy}/images/training/") and "truncated" in said
