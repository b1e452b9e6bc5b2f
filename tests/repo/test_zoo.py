"""The model zoo: nothing without an origin, counts that can be trusted, commands that work."""

import shlex
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml
from conftest import load_tool

pytest.importorskip("detectron2")
pytest.importorskip("mmdet")

from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope

import elsa_d2
from elsa_core.flops import count_flops
from elsa_core.runtime.errors import UsageError
from elsa_mm import cli
from elsa_tools.inspect.counting import openmmlab_subject

make_zoo = load_tool("make_zoo")

from zoo import page  # noqa: E402
from zoo.metafiles import ORIGINS, read_models  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "MODEL_ZOO.md").read_text()
# Heads that the paper has no figures of, in one framework alone.
NEW = [
    "mask2former_elsa-swin-t-p4-w7_8xb2-lsj-50e_coco",
    "mask2former_elsa-swin-s-p4-w7_8xb2-lsj-50e_coco",
    "dino-4scale_elsa-swin-t-p4-w7_8xb2-12e_coco",
    "dino-5scale_elsa-swin-t-p4-w7_8xb2-12e_coco",
    "rtmdet-ins_l_elsa-swin-t-p4-w7_4xb32-100e_coco",
    "mask2former_elsa-swin-t-p4-w7_8xb2-lsj-50e_coco-panoptic",
    "mask2former_elsa-swin-s-p4-w7_8xb2-lsj-50e_coco-panoptic",
    "elsa-swin-tiny-patch4-window7-in1k-pre_mask2former_8xb2-160k_ade20k-512x512",
    "elsa-swin-small-patch4-window7-in1k-pre_mask2former_8xb2-160k_ade20k-512x512",
    "keypoint_rcnn_elsa_swin_t_fpn_1x",
]


@pytest.fixture
def root(tmp_path):
    """A copy of what the zoo is made from."""
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    for name in ("model-index.yml", "MODEL_ZOO.md"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


@pytest.fixture
def fast_counts(monkeypatch):
    """Counting is tested by itself and takes most of the time."""
    monkeypatch.setattr(page, "_Measure", lambda root: lambda model: (48_647_226, 269_000_000_000))


@pytest.fixture
def edit(root):
    """Changes the first model of a metafile."""

    def change(function, framework="mmdet"):
        path = root / f"configs/{framework}/elsa_swin/metafile.yml"
        content = yaml.safe_load(path.read_text())
        function(content["Models"][0])
        path.write_text(yaml.safe_dump(content, sort_keys=False))

    return change


@pytest.mark.slow
@pytest.mark.parametrize(
    "framework, config, dataset, giga",
    [
        # As DINO's paper states it (arXiv 2203.03605).
        ("mmdet", "dino/dino-4scale_r50_8xb2-12e_coco.py", "COCO", 279),
        # As the Swin Transformer's paper (arXiv 2103.14030) and its detection code state them.
        ("mmdet", "swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py", "COCO", 267),
        (
            "mmseg",
            "swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py",
            "ADE20K",
            945,
        ),
    ],
)
def test_counting_agrees_with_published_figures_of_stock_models(framework, config, dataset, giga):
    folder = Path(find_spec(framework).origin).parent / ".mim/configs"
    cfg = Config.fromfile(folder / config)
    with DefaultScope.overwrite_default_scope(framework):
        subject = openmmlab_subject(config, MODELS.build(cfg.model).eval(), framework)
    counted = count_flops(subject.run, page.SIZES[dataset]) / 1e9
    assert counted == pytest.approx(giga, rel=4e-3)


def test_operator_without_a_formula_is_refused():
    def run(images):
        x = images.new_empty(1, 2, 2, 3)
        return torch.ops.elsa.attention_backward(x, x, x, None, None, 1, 1)

    with pytest.raises(NotImplementedError, match="no formula for elsa.attention_backward"):
        count_flops(run, (4, 4))


def test_every_figure_in_the_zoo_has_an_origin_and_a_source():
    models = read_models(ROOT)
    figures = [f for row in models for f in row.figures]
    volos = [row for row in models if row.is_volo]
    assert (
        len(models) - len(volos) == 8 + 2 + 4 + 3 + len(NEW)
        and len(figures) == 8 * 2 + 2 * 4 + 2 + 3
    )
    # Of ELSA-VOLO nothing was published that one of the configs would reach.
    assert len(volos) == 1 + 3 + 5 and not any(row.figures for row in volos)
    assert all(figure.origin in ORIGINS and figure.source for figure in figures)
    # All are the authors' so far, and none of their checkpoints has been converted.
    assert {figure.origin for figure in figures} == {"published by the authors"}
    for figure in figures:
        assert f"| {figure.value} |" in PAGE


def test_gpus_make_the_batch_that_the_configs_are_for():
    batches = {"COCO": 16, "COCO panoptic": 16, "ADE20K": 16, "Cityscapes": 8, "ImageNet-1K": 1024}
    # One of each: the bases are common.
    models = {(m.framework, m.dataset, m.method): m for m in read_models(ROOT)}
    alone = models.pop(("detectron2", "COCO", "Keypoint R-CNN"))
    config = elsa_d2.load_config(str(ROOT / alone.config))
    assert config.SOLVER.IMS_PER_BATCH == 2 * alone.gpus == batches["COCO"]
    for model in models.values():
        cfg = Config.fromfile(ROOT / model.config)
        images = cfg.train_dataloader.batch_size * model.gpus
        wanted = 128 if "RTMDet" in model.method else batches[model.dataset]
        assert images == wanted == cfg.auto_scale_lr.base_batch_size
        if model.detectron2_config:
            other = elsa_d2.load_config(str(ROOT / model.detectron2_config))
            assert other.SOLVER.IMS_PER_BATCH == images


def test_models_without_figures_are_said_to_have_none():
    models = read_models(ROOT)
    without = [m for m in models if not m.figures and not m.is_volo]
    assert [m.name for m in without if m.dataset != "Cityscapes"] == NEW
    methods = {m.method for m in without if m.name in NEW}
    note, other = (part for part in PAGE.split("\n\n") if part.startswith("Of Mask2Former"))
    assert all(method in note for method in methods) and "Mask2Former" in other
    sections = dict(part.split("\n", 1) for part in PAGE.split("\n## ")[1:])
    for dataset in page.SIZES:
        without = f"The authors publish no figures for {dataset}" in sections[dataset]
        assert without == (dataset in ("Cityscapes", "COCO panoptic"))
        rows = [line for line in sections[dataset].splitlines() if line.startswith("| ELSA-")]
        assert len(rows) == sum(model.dataset == dataset for model in models)


def test_metafiles_are_read_by_openmim():
    """Through the package that it reads them with."""
    modelindex = pytest.importorskip("modelindex.load_model_index")
    index = modelindex.load(str(ROOT / "model-index.yml"))
    index.build_models_with_collections()
    models = [model for model in read_models(ROOT) if model.framework != "detectron2"]
    assert {m.name: m.config for m in index.models} == {m.name: m.config for m in models}
    for read, model in zip(index.models, models, strict=True):
        metrics = {k: v for result in read.results or [] for k, v in result.metrics.items()}
        assert metrics == {figure.metric: figure.value for figure in model.figures}


def test_page_is_made_from_what_the_metafiles_say(root, edit, fast_counts):
    def measure(model):
        model["Weights"] = "https://example.org/model.pth"
        measured = {"Training Memory (GB)": 7.5, "Measured On": "a GPU, 2026-01-01"}
        model["Metadata"] |= {"SHA256": "0" * 64, **measured}
        figures = {"Metrics": {"box AP": 45.6}, "Origin": "trained here", "Source": "log.json"}
        model["Results"].append({"Task": "Object Detection", "Dataset": "COCO", **figures})

    assert "Training Memory" not in page.make_page(root)
    edit(measure)
    (row,) = (line for line in page.make_page(root).splitlines() if "| 45.7, 45.6 |" in line)
    assert "*published by the authors* (1); *trained here* (2)" in row
    assert "[weights](https://example.org/model.pth), SHA-256 `0000" in row
    assert "7.5 (a GPU, 2026-01-01)" in row


@pytest.mark.parametrize(
    "change, sentence",
    [
        (lambda m: m["Results"][0].pop("Origin"), "Origin must be one of published by the authors"),
        (lambda m: m["Results"][0].update(Origin="guessed"), "got guessed"),
        (lambda m: m["Results"][0].pop("Source"), "a figure needs its Source"),
        (lambda m: m.update(Weights="https://example.org/a.pth"), "Weights need their SHA256"),
        (lambda m: m["Metadata"].update({"Training Memory (GB)": 1}), "needs Measured On"),
        (lambda m: m.update(Name="other"), "the config must have the model's name"),
        (lambda m: m["Metadata"].update({"Detectron2 Config": "a.yaml"}), "a.yaml does not exist"),
        (lambda m: m.pop("Results"), "Results is missing"),
        (lambda m: m.update({"In Collection": "other"}), "the collection other is not there"),
        (
            lambda m: m["Metadata"].update({"Training Resources": "a GPU"}),
            "Training Resources must be like '8 GPUs with 2 images each', got a GPU",
        ),
    ],
)
def test_wrong_metafile(root, edit, capsys, change, sentence):
    edit(change)
    assert make_zoo.main(["--root", str(root)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("make_zoo: configs/mmdet/elsa_swin/metafile.yml, ")
    assert sentence in error and error.count("\n") == 1
    assert (root / "MODEL_ZOO.md").read_text() == PAGE


def test_frameworks_with_other_numbers_of_parameters(root):
    name = "upernet_elsa_swin_t_160k.yaml"
    leaf = root / "configs/detectron2/ADE20K-SemanticSegmentation" / name
    leaf.write_text(leaf.read_text() + "  SEM_SEG_HEAD:\n    CONVS_DIM: 256\n")
    model = next(
        model for model in read_models(root) if leaf.name in (model.detectron2_config or "")
    )
    with pytest.raises(UsageError, match=f"has 60,794,486 parameters, .*{name} has 3"):
        page._Measure(root)(model)


def test_check_finds_a_stale_page(root, fast_counts, capsys):
    arguments = ["--root", str(root)]
    assert make_zoo.main(arguments) == 0 and make_zoo.main([*arguments, "--check"]) == 0
    with (root / "MODEL_ZOO.md").open("a") as file:
        file.write("by hand\n")
    assert make_zoo.main([*arguments, "--check"]) == 1
    assert capsys.readouterr().err == (
        "make_zoo: MODEL_ZOO.md is not what the metafiles and the models say: run make zoo\n"
    )


def test_commands_of_the_page_are_understood(tmp_path, monkeypatch):
    """By the parsers of the tools, with files that exist."""
    commands = [line for line in PAGE.splitlines() if " tools/" in line and line[0] in "tp"]
    models = {model.config: model for model in read_models(ROOT)}
    by_detectron2 = {model.detectron2_config: model for model in models.values()}
    assert len(commands) == 4 * (14 + 4) + 2 * (3 + 5 + len(NEW))
    options = load_tool("train_net").command()
    for line in commands:
        words = shlex.split(line)
        place = next(i for i, word in enumerate(words) if word.startswith("tools/"))
        tool, arguments = words[place], words[place + 1 :]
        assert (ROOT / tool).is_file()
        if tool == "tools/train_net.py":
            parsed = options.parse_arguments(arguments)
            config = parsed.config_file
            assert parsed.num_gpus == by_detectron2[config].gpus
            assert "MODEL.WEIGHTS" in parsed.opts
        else:
            config = arguments[0]
            assert words[:3] == ["torchrun", "--nproc-per-node", str(models[config].gpus)]
            assert "--launcher" in arguments
            assert ("CHECKPOINT" in arguments) == (tool == "tools/test.py")
        assert (ROOT / config).is_file()
    # One of each for OpenMMLab, up to the files that are not there.
    monkeypatch.chdir(tmp_path)
    openmmlab = [line for line in commands if line.startswith("torchrun")]
    for line in [*openmmlab[:2], *openmmlab[-2:]]:
        words = shlex.split(line)
        arguments = [word for word in words[4:] if word not in ("--launcher", "pytorch")]
        assert getattr(cli, Path(words[3]).stem)([str(ROOT / arguments[0]), *arguments[1:]]) == 2
