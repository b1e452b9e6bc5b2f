"""Short trainings of the classification configs, with our tools and with MMPretrain's, and what a
classifier's checkpoint is good for afterwards.

Only sizes are reduced. The data are single digits in ImageNet's layout.
"""

import json
import math
import pickle
import runpy
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

pytest.importorskip("detectron2")
pytest.importorskip("mmpretrain")

from detectron2.modeling import build_model
from mm_tiny import as_arguments, last_path, last_state, loaders, run, scalars
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from mmpretrain import ImageClassificationInferencer
from recipes_imagenet import RECIPES

import elsa_d2
from elsa_core.weights import convert_file
from elsa_tools.convert import main as convert_weights
from examples.digits.imagenet_layout import write_layout

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"
DIGITS = CONFIGS / "mmpretrain/digits/elsa-swin_digits.py"
LEAVES = {recipe.arch: CONFIGS / "mmpretrain" / recipe.config for recipe in RECIPES}
TOOLS = Path(find_spec("mmpretrain").origin).parent / ".mim/tools"
SMALL = {"embed_dim": 32, "depths": "[1,1,2,1]", "num_heads": "[1,2,4,8]", "group_width": 8}
SMALL |= {"window_size": 5, "_delete_": True}  # that of the digits configs of all frameworks
SMALL_VOLO = {"depths": "[1,1,1,1]", "embed_dims": "[48,96]", "num_heads": "[3,6]"}
SMALL_VOLO |= {"mlp_ratio": 3, "stem_dim": 16, "_delete_": True}


@pytest.fixture(scope="module")
def imagenet(digits, tmp_path_factory):
    """The digits as ImageNet: 1000 classes by its lists of files, of which the data shows 10."""
    root = tmp_path_factory.mktemp("imagenet")
    write_layout(digits, root, progress=False)
    (root / "meta").mkdir()
    for part in ("train", "val"):
        files = sorted(path.relative_to(root / part) for path in (root / part).rglob("*.JPEG"))
        lines = [f"{path} {path.parent}\n" for path in files]
        (root / f"meta/{part}.txt").write_text("".join(lines))
    return root


@pytest.fixture(scope="module")
def folders(digits, tmp_path_factory):
    """The same with a folder for each of ten classes, which the digits config expects."""
    root = tmp_path_factory.mktemp("folders")
    write_layout(digits, root, progress=False)
    return root


pytestmark = pytest.mark.usefixtures("workplace")


def of(root, images=2):
    """--cfg-options of the loaders."""
    values = loaders(batch_size=2, dataset__data_root=root, dataset__indices=4)
    return values | {"train_dataloader.dataset.indices": images}


def published(root, epochs, arch="tiny"):
    """--cfg-options for epochs of one iteration on images of 64 pixels, an evaluation after two,
    with the backbone of the digits configs."""
    small, channels = (SMALL_VOLO, 96) if arch.startswith("volo") else (SMALL, 256)
    values = of(root) | {
        "train_cfg.max_epochs": epochs,
        "train_cfg.val_begin": 2,
        **{f"train_dataloader.dataset.pipeline.1.transforms.{i}.0.scale": 64 for i in (0, 1)},
    }
    for part in ("val", "test"):
        values[f"{part}_dataloader.dataset.pipeline.1.scale"] = 70
        values[f"{part}_dataloader.dataset.pipeline.2.crop_size"] = 64
    values |= {f"model.backbone.arch.{name}": value for name, value in small.items()}
    return values | {"model.head.in_channels": channels}


def train_twice(arch, root):
    """One epoch, then a resumed second one with an evaluation."""
    for epochs in (1, 2):
        options = published(root, epochs, arch)
        run("train", LEAVES[arch], "--work-dir", "runs", "--resume", **options)
        assert last_state()["meta"]["iter"] == epochs


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["tiny", "volo_d1"])
def test_short_training_evaluates_saves_and_resumes(imagenet, arch):
    train_twice(arch, imagenet)
    state = last_state()
    assert "ema_state_dict" not in state and state["meta"]["seed"] == 42
    assert {int(values["step"]) for values in state["optimizer"]["state"].values()} == {2}
    lines = scalars()
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 2 and all(math.isfinite(loss) and loss > 1 for loss in losses)
    assert {"accuracy/top1", "accuracy/top5"} <= set(lines[-1])
    best = torch.load("runs/best_accuracy_top1_epoch_2.pth", weights_only=False)
    assert equal(best["state_dict"], state["state_dict"])
    assert "mixed precision is bfloat16" in next(Path("runs").glob("2*/*.log")).read_text()


@pytest.fixture(scope="module")
def averaged(imagenet, tmp_path_factory):
    """The checkpoint of a short training with averaged weights, of the digits models' size."""
    folder = tmp_path_factory.mktemp("averaged")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train_twice("base", imagenet)
        return folder / last_path()


def trained_weights(checkpoint):
    """Those of the training itself, which MMEngine swaps with the averaged ones in the file."""
    state = checkpoint["ema_state_dict"]
    return {n.removeprefix("module."): t for n, t in state.items() if n.startswith("module.")}


@pytest.mark.slow
def test_averaged_weights_are_the_checkpoint(averaged, imagenet):
    checkpoint = torch.load(averaged, weights_only=False)
    mean, trained = checkpoint["state_dict"], trained_weights(checkpoint)
    assert mean.keys() == trained.keys() and int(checkpoint["ema_state_dict"]["steps"]) == 2
    name = "backbone.layers.0.blocks.0.mlp.fc1.weight"
    assert not torch.equal(mean[name], trained[name])
    (lines,) = [line for line in scalars(averaged.parent) if "accuracy/top1" in line]
    options = published(imagenet, 1)
    run("test", LEAVES["base"], averaged, "--work-dir", "evaluated", **options)
    (saved,) = Path("evaluated").glob("*/2*.json")
    assert json.loads(saved.read_text())["accuracy/top5"] == lines["accuracy/top5"]


def backbone_of(state, prefix="backbone."):
    """Without output norms: detectors train their own."""
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in state.items()
        if name.startswith(prefix) and not name.startswith(f"{prefix}norm")
    }


def equal(left, right):
    assert left.keys() == right.keys()
    return all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize(
    "config",
    ["mmdet/digits/mask-rcnn_elsa-swin_fpn_digits", "mmseg/digits/elsa-swin_upernet_digits"],
)
def test_checkpoint_initialises_models_of_openmmlab(averaged, config):
    cfg = Config.fromfile(CONFIGS / f"{config}.py")
    cfg.model.backbone.init_cfg = dict(type="Pretrained", checkpoint=str(averaged))
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        model = MODELS.build(cfg.model)
        model.init_weights()
    wanted = torch.load(averaged, weights_only=False)["state_dict"]
    assert equal(backbone_of(model.state_dict()), backbone_of(wanted))
    assert all(torch.equal(t, torch.ones_like(t)) for t in [model.backbone.norm3.weight])


def test_checkpoint_initialises_a_model_of_detectron2(averaged):
    config = CONFIGS / "detectron2/digits/mask_rcnn_elsa_swin_digits.yaml"
    cfg = elsa_d2.load_config(str(config), ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", str(averaged)])
    model = build_model(cfg)
    elsa_d2.AtomicCheckpointer(model).resume_or_load(cfg.MODEL.WEIGHTS, resume=False)
    wanted = torch.load(averaged, weights_only=False)["state_dict"]
    prefix = "backbone.bottom_up."
    assert equal(backbone_of(model.state_dict(), prefix), backbone_of(wanted))


@pytest.mark.parametrize("option", [None, "--ema", "--no-ema"])
def test_checkpoint_is_converted(averaged, capsys, option):
    options = [option] if option else []
    arguments = [str(averaged), "original.pth", "--to", "original", *options]
    assert convert_weights(arguments) == 0
    averages = option != "--no-ema"
    assert ("MMPretrain, classifier" in (said := capsys.readouterr().out)) and (
        ("EMA weights" in said) == averages
    )
    checkpoint = torch.load(averaged, weights_only=False)
    wanted = checkpoint["state_dict"] if averages else trained_weights(checkpoint)
    convert_file("original.pth", "back.pth", "mmpretrain")
    assert equal(torch.load("back.pth")["state_dict"], dict(wanted))


@pytest.mark.slow
def test_test_tool_agrees_paints_and_keeps_predictions(folders):
    options = of(folders, images=1000) | {"train_cfg.max_iters": 2}
    options |= {"test_dataloader.batch_size": 3}
    run("train", DIGITS, "--work-dir", "runs", **options)
    arguments = [DIGITS, last_path(), "--work-dir", "evaluated"]
    more = ["--out", "predictions.pkl", "--show-dir", "painted"]
    run("test", *arguments, *more, **options)
    (saved,) = Path("evaluated").glob("*/2*.json")
    metrics = json.loads(saved.read_text())
    (trained,) = [line for line in scalars() if "accuracy/top1" in line]
    assert {name: trained[name] for name in ("accuracy/top1", "accuracy/top5")} == pytest.approx(
        {name: metrics[name] for name in ("accuracy/top1", "accuracy/top5")}
    )
    predictions = pickle.loads(Path("predictions.pkl").read_bytes())
    scores = torch.stack([sample["pred_score"] for sample in predictions])
    assert scores.shape == (4, 10) and torch.allclose(scores.sum(1), torch.ones(4))
    right = [int(sample["pred_label"] == sample["gt_label"]) for sample in predictions]
    assert 100 * sum(right) / 4 == pytest.approx(metrics["accuracy/top1"])
    assert len(list(Path("painted").glob("*.png"))) == 4


@pytest.mark.slow
def test_mirrored_images_are_averaged(imagenet):
    options = published(imagenet, 1)
    options |= {"tta_pipeline.1.scale": 70, "tta_pipeline.2.crop_size": 64}
    run("train", LEAVES["small"], "--work-dir", "runs", "--auto-scale-lr", **options)
    (line,) = [line for line in scalars() if "loss" in line]
    assert line["lr"] == pytest.approx(1e-6)  # of the first epoch
    (highest,) = {group["initial_lr"] for group in last_state()["optimizer"]["param_groups"]}
    assert highest == pytest.approx(1e-3 * 2 / 1024)
    arguments = [LEAVES["small"], last_path(), "--work-dir", "evaluated"]
    scores = {}
    for name, flags in (("plain", []), ("augmented", ["--tta"])):
        run("test", *arguments, "--out", f"{name}.pkl", *flags, **options)
        found = pickle.loads(Path(f"{name}.pkl").read_bytes())
        scores[name] = torch.stack([sample["pred_score"] for sample in found])
    assert scores["plain"].shape == scores["augmented"].shape == (4, 1000)
    assert not torch.equal(scores["plain"], scores["augmented"])
    assert torch.allclose(scores["augmented"].sum(1), torch.ones(4))


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["small", "volo_d2"])
def test_mmpretrains_own_tools_run_the_configs(imagenet, monkeypatch, arch):
    options = published(imagenet, 2, arch) | {"optim_wrapper.type": "OptimWrapper"}  # no AMP
    options = [f"{key}={value}" for key, value in options.items()]

    def run_tool(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments), "--cfg-options", *options])
        runpy.run_path(str(TOOLS / name), run_name="__main__")

    run_tool("train.py", LEAVES[arch], "--work-dir", "runs")
    assert last_state()["meta"]["iter"] == 2
    run_tool("test.py", LEAVES[arch], last_path(), "--work-dir", "evaluated", "--out", "a.pkl")
    assert len(pickle.loads(Path("a.pkl").read_bytes())) == 4


@pytest.mark.slow
def test_mmpretrain_counts_and_classifies_with_volo(monkeypatch, capsys):
    tool, config = TOOLS / "analysis_tools/get_flops.py", LEAVES["volo_d1"]
    monkeypatch.setattr(sys, "argv", [tool.name, str(config)])
    runpy.run_path(str(tool), run_name="__main__")
    said = capsys.readouterr().out
    assert "Flops: 7.1" in said and "Params: 26.672M" in said  # without the heads, as it says
    inferencer = ImageClassificationInferencer(str(config), pretrained=None, device="cpu")
    image = torch.randint(0, 255, (260, 300, 3), dtype=torch.uint8).numpy()
    (result,) = inferencer(image)
    assert result["pred_scores"].shape == (1000,)
    assert result["pred_scores"].sum() == pytest.approx(1, abs=1e-4)


def test_refusals_before_anything_is_built(refusal, tmp_path):
    assert refusal("train", DIGITS) == (
        f"the train data's folder {tmp_path}/data/digits_imagenet/train (split) does not exist"
    )
    options = {"model.head.in_channels": 64}
    assert refusal("train", DIGITS, *as_arguments(options)) == (
        "model.head.in_channels must be the backbone's 256, got 64"
    )


@pytest.mark.parametrize(
    "setting, place", [("model.head", "model.head"), ("data_preprocessor", "data_preprocessor")]
)
def test_another_number_of_classes_than_the_data(refusal, folders, setting, place):
    options = of(folders) | {f"{setting}.num_classes": 7}
    assert refusal("train", DIGITS, *as_arguments(options)) == (
        f"{place}.num_classes must be the 10 classes of the train data, got 7"
    )


def test_less_data_than_a_batch(refusal, imagenet):
    options = published(imagenet, 1) | {"train_dataloader.dataset.indices": 1}
    assert refusal("train", LEAVES["small"], *as_arguments(options)) == (
        "the train data must fill a batch in each process where train_dataloader.drop_last is set, "
        "got 1 images"
    )


def test_data_of_other_class_folders(refusal, folders, tmp_path):
    assert refusal("train", LEAVES["small"], *as_arguments(published(folders, 1))) == (
        "the train data must have a folder for each of the data set's 1000 classes, it has 10 "
        "folders"
    )
    for part in ("train", "val"):
        for name in range(10):
            (tmp_path / f"empty/{part}/{name}").mkdir(parents=True)
    assert refusal("train", DIGITS, *as_arguments(of(tmp_path / "empty"))) == (
        "the train data set is empty: no image, or none with objects of the classes"
    )


@pytest.mark.slow
def test_progress_in_checkpoints_of_the_flexible_runner(folders):
    """MMEngine's adds an iteration to those that are saved after a validation."""
    options = of(folders) | {"train_cfg.max_iters": 2, "runner_type": "FlexibleRunner"}
    options["strategy.type"] = "SingleDeviceStrategy"
    run("train", DIGITS, "--work-dir", "runs", **options)
    best = torch.load("runs/best_accuracy_top1_iter_2.pth", weights_only=False)
    assert last_state()["meta"]["iter"] == best["meta"]["iter"] == 2
