"""The LazyConfigs: as the YAML configs in every part; they train, evaluate, save and resume."""

import functools
import math
import re
import types

import pytest
import torch

pytest.importorskip("detectron2")

from conftest import load_tool
from d2_tiny import (
    CONFIG,
    REPOSITORY,
    TINY,
    datasets,
    few_images,
    overrides,
    read_metrics,
    run_in_process,
)
from detectron2.config import instantiate
from detectron2.modeling import META_ARCH_REGISTRY, build_model
from omegaconf import DictConfig, ListConfig

from elsa_d2 import (
    DetectionMapper,
    build_lr_scheduler,
    build_optimizer,
    load_config,
)
from elsa_d2.engine.lazy_trainer import _run, lazy_run
from elsa_d2.lazy import KEYS
from elsa_d2.modeling.heads import Float32ROIPooler, ROIPooler

FOLDER = REPOSITORY / "configs/detectron2/lazy"
LEAVES = sorted(FOLDER.glob("COCO*/*.py"))
DIGITS = FOLDER / "digits/mask_rcnn_elsa_swin_digits.py"
TWINS = [
    (leaf, twin)
    for leaf in [*LEAVES, DIGITS]
    if (twin := FOLDER.parent / leaf.relative_to(FOLDER).with_suffix(".yaml")).is_file()
]
EXTRAS = ["MODEL.EMA.ENABLED", "True", "SOLVER.CLIP_GRADIENTS.ENABLED", "True"]
EXTRAS += ["SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "full_model"]
# What a class adds to each model, and the weight of a loss that is not said.
IMPLIED = ("_load_state_dict_pre_hooks", "loss_cls")
ARCHS = {"t": "tiny", "s": "small", "b": "base"}
# TINY for a LazyConfig.
SMALL = [
    *(
        f"model.backbone.bottom_up.arch.{key.rpartition('.')[2].lower()}={value}"
        for key, value in TINY.items()
        if "ELSA_SWIN" in key
    ),
    "model.backbone.out_channels=8",
    "model.backbone.norm=",
    "model.roi_heads.box_head.fc_dims=[16,16]",
    "model.roi_heads.mask_head.conv_dims=[8,8,8]",
    "model.roi_heads.box_predictor.test_score_thresh=0.0",
    "dataloader.train.mapper.augmentations.0.short_edge_length=[96]",
    "dataloader.test.mapper.augmentations.0.short_edge_length=96",
    "dataloader.train.total_batch_size=2",
    f"lr_multiplier.warmup_length={2 / 4}",
    "train.max_iter=4",
    "train.device=cpu",
]


@pytest.fixture(scope="module")
def tool():
    return load_tool("lazyconfig_train_net")


@pytest.fixture(autouse=True)
def read_anew():
    """A process reads one config once; here it is one process for all tests."""
    _run.cache_clear()


def arguments_of(data, output, *flags, config=DIGITS):
    names = str(datasets(data)).replace(" ", "")
    place = [f"dataloader.register_coco={names}", f"train.output_dir={output}"]
    return ["--config-file", str(config), *flags, *SMALL, *place]


def content(value, name="", above=()):
    """{name: value} of everything that is set in a model, a mapper, ... but its weights."""
    if id(value) in above:
        return {}
    if isinstance(value, (list, tuple, ListConfig)):
        parts = dict(enumerate(value))
    elif isinstance(value, (dict, DictConfig)):
        parts = value
    elif isinstance(value, torch.Tensor):
        return {name: tuple(value.shape)}
    elif isinstance(value, (types.FunctionType, types.MethodType)):
        return {name: value.__qualname__}
    elif isinstance(value, type) or not hasattr(value, "__dict__"):
        return {name: value}
    else:
        # The YAML configs' pooler gets the same levels in another way.
        kind = ROIPooler if type(value) is Float32ROIPooler else type(value)
        parts = {**vars(value), "type": kind}
    found = {}
    for key, part in parts.items():
        if key not in IMPLIED:
            found |= content(part, f"{name}.{key}".lstrip("."), (*above, id(value)))
    return found


@pytest.mark.parametrize("leaf", LEAVES, ids=lambda leaf: leaf.stem)
def test_a_leaf_is_short_and_named_by_its_content(leaf):
    assert 3 <= len(leaf.read_text().splitlines()) <= 15
    method, variant, schedule = re.fullmatch(
        r"(mask_rcnn|cascade_mask_rcnn)_elsa_swin_([tsb])_fpn_([13])x", leaf.stem
    ).groups()
    cfg, trainer = lazy_run(str(leaf), [])
    assert trainer.lazy.model.backbone.bottom_up.arch == ARCHS[variant]
    assert ("box_heads" in trainer.lazy.model.roi_heads) == (method == "cascade_mask_rcnn")
    assert cfg.SOLVER.MAX_ITER == 12 * int(schedule) * cfg.TEST.EVAL_PERIOD


def test_all_combinations_are_there():
    assert len(LEAVES) == 2 * 3 * 2 and len(TWINS) == 2 * 2 * 2 + 1


@pytest.mark.parametrize("leaf, twin", TWINS, ids=lambda file: file.stem)
def test_a_lazy_config_is_the_yaml_config(leaf, twin):
    """Every attribute of the model and the mappers, the groups of the optimizer, the rates."""
    cfg = load_config(str(twin))
    keys, trainer = lazy_run(str(leaf), [])
    assert keys.MODEL.MASK_ON and keys.OUTPUT_DIR.lstrip("./") == cfg.OUTPUT_DIR.lstrip("./")
    for key in KEYS.keys() - {"OUTPUT_DIR"}:
        assert pick(keys, key) == pick(cfg, key), key
    with torch.device("meta"):
        ours = instantiate(trainer.lazy.model)
        theirs = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)(cfg)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert content(ours) == content(theirs)
    groups = [named_groups(build_optimizer(cfg, theirs), theirs)]
    groups.append(named_groups(optimizer := trainer.build_optimizer(keys, ours), ours))
    assert groups[0] == groups[1] and type(optimizer) is torch.optim.AdamW
    rates = [
        one._multiplier
        for one in (
            build_lr_scheduler(cfg, optimizer),
            trainer.build_lr_scheduler(keys, optimizer),
        )
    ]
    for iteration in range(0, cfg.SOLVER.MAX_ITER, 10):
        where = iteration / cfg.SOLVER.MAX_ITER
        assert rates[0](where) == rates[1](where), iteration
    ours, theirs = (
        [content(mapper) for mapper in pair]
        for pair in (
            [instantiate(trainer.lazy.dataloader[part].mapper) for part in ("train", "test")],
            [DetectionMapper(cfg, is_train) for is_train in (True, False)],
        )
    )
    for name in ("use_instance_mask", "instance_mask_format"):  # of no use in a test
        ours[1].pop(name), theirs[1].pop(name)
    assert ours == theirs
    assert trainer.lazy.dataloader.train.num_workers == cfg.DATALOADER.NUM_WORKERS


def pick(cfg, key):
    return functools.reduce(lambda node, name: node[name], key.split("."), cfg)


def named_groups(optimizer, model):
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [
        {**group, "params": sorted(names[id(one)] for one in group["params"])}
        for group in optimizer.param_groups
    ]


@pytest.fixture(scope="module")
def runs(digits, tmp_path_factory, tool):
    """Folders of one training by a YAML config and by a LazyConfig, resumed half-way."""
    folder = tmp_path_factory.mktemp("runs")
    start = folder / "start.pth"
    options = {"MODEL__DEVICE": "cpu", "MODEL__WEIGHTS": start}
    theirs = ["--config-file", CONFIG, *overrides(digits, OUTPUT_DIR=folder / "yaml", **options)]
    model = build_model(load_config(*theirs[1:2], theirs[2:]))
    torch.save({"model": model.state_dict()}, start)
    ours = [*arguments_of(digits, folder / "lazy"), f"train.init_checkpoint={start}"]
    for flags, last in ([], 2), (["--resume"], 4):
        yaml_config = [*theirs[:2], *flags, *theirs[2:], "SOLVER.MAX_ITER", str(last)]
        assert load_tool("train_net").main([*yaml_config, *EXTRAS]) == 0
        lazy_config = ["train.ema.enabled=true", "train.clip_grad.enabled=true"]
        lazy_config += [f"train.max_iter={last}"]
        lazy_config += [f"lr_multiplier.warmup_length={2 / last}"]
        assert tool.main([*ours[:2], *flags, *ours[2:], *lazy_config]) == 0
    return folder / "yaml", folder / "lazy"


@pytest.mark.slow
def test_a_run_is_that_of_the_yaml_config(runs):
    """The same losses, rates, APs, weights and optimizer to the last bit, resumed too."""
    metrics = [
        [{name: x for name, x in line.items() if "time" not in name} for line in read_metrics(run)]
        for run in runs
    ]
    assert [line["iteration"] for line in metrics[0]] == [1, 2, 3, 4]
    assert "grad_norm" in metrics[0][0] and {"segm/AP", "ema/segm/AP"} <= metrics[0][-1].keys()
    assert str(metrics[0]) == str(metrics[1])  # NaN is the same, too
    states = [torch.load(run / "model_final.pth") for run in runs]
    for name, value in states[0]["model"].items():
        assert torch.equal(value, states[1]["model"][name]), name
    groups = [state["trainer"]["_trainer"]["optimizer"]["param_groups"] for state in states]
    assert groups[0] == groups[1]
    assert (runs[1] / "inference/coco_instances_results.json").exists()


@pytest.mark.slow
def test_evaluation_alone(runs, digits, tmp_path, tool):
    """Of what a checkpoint has: the averaged weights."""
    config = arguments_of(digits, tmp_path, "--eval-only", config=runs[1] / "config.yaml")
    weights = f"train.init_checkpoint={runs[1] / 'model_final.pth'}"
    results = run_in_process(tool, [*config, weights])
    metrics = read_metrics(runs[1])[-1]
    for task in ("bbox", "segm"):
        assert results[task]["AP50"] == pytest.approx(metrics[f"ema/{task}/AP50"])


REFUSALS = {
    "no file": (["--config-file", "nowhere.py"], "config file nowhere.py does not exist"),
    "no program": (["--config-file", "FILE", "1 +"], "is not valid: "),
    "a part is missing": (["--config-file", "FILE", "train = {}"], "has no model, dataloader, opt"),
    "no pair": (["train.max_iter"], "overrides must be KEY=VALUE with a key of "),
    "unknown part": (["trian.max_iter=2"], "with a key of dataloader, model"),
    "unknown key": (["train.max_itr=2"], "nothing reads train.max_itr"),
    "wrong type": (["train.max_iter=many"], "train.max_iter is not valid: "),
    "unknown argument": (["model.backbone.bottom_up.archs=tiny"], "unexpected keyword argument 'a"),
    "unknown arch": (["model.backbone.bottom_up.arch=huge"], "model cannot be built: arch must be"),
    "unknown group key": (["optimizer.params.decay=1"], "unexpected keyword argument 'decay'"),
    "wrong decay": (["optimizer.params.layer_decay=0"], "layer_decay must be "),
    "wrong average": (["train.ema.decay=2.0"], "train.ema is not valid: "),
    "wrong norm": (
        ["train.clip_grad.enabled=true", "train.clip_grad.max_norm=0"],
        "train.clip_grad.max_norm must be",
    ),
    "another model": (
        ["model=${dataloader.train.mapper}"],
        "must be a GeneralizedRCNN, got Detect",
    ),
    "two test sets": (["dataloader.test.dataset.names=[a,b]"], "must be one data set, got a, b"),
    "wrong classes": (["model.roi_heads.num_classes=9"], "but model.roi_heads.num_classes is 9"),
    "unregistered data": (
        ["dataloader.train.dataset.names=cats"],
        "list it in dataloader.register",
    ),
    "unknown evaluator argument": (
        ["dataloader.evaluator.task=bbox"],
        "unexpected keyword argument",
    ),
    "no evaluator": (["dataloader.evaluator=null"], "must be one evaluator, got none or several"),
    "unknown mapper argument": (
        ["dataloader.test.mapper.image=RGB"],
        "dataloader.test.mapper cannot",
    ),
    "no weights": (["--eval-only"], "needs weights: train.init_checkpoint FILE, or --resume with"),
    "unknown device": (["train.device=gpu"], "train.device 'gpu' is no device"),
    "unknown metric": (
        ["train.best_metric=AP"],
        "train.best_metric must be a metric of bbox, segm",
    ),
    "parts of a batch": (["train.accumulate_steps=3"], "train.accumulate_steps must divide the 2"),
}


@pytest.mark.parametrize("arguments, message", REFUSALS.values(), ids=REFUSALS)
def test_refusals(digits, tmp_path, tool, capfd, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    if "FILE" in arguments:
        (tmp_path / "config.py").write_text(arguments[2])
        arguments = ["--config-file", "config.py"]
    if "--config-file" not in arguments:
        flags = [one for one in arguments if one.startswith("-")]
        rest = [one for one in arguments if one not in flags]
        arguments = [*arguments_of(digits, tmp_path / "out", *flags), *rest]
    assert tool.main(arguments) == 2
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith("lazyconfig_train_net: ") and message in last
    assert not (tmp_path / "out").exists()


NARROW = {
    "mask_rcnn_elsa_swin_t_fpn_1x": [],
    "cascade_mask_rcnn_elsa_swin_b_fpn_3x": [
        "model.backbone.out_channels=16",
        "model.backbone.bottom_up.arch={embed_dim:16,depths:[1,1,1,1],num_heads:[1,2,4,8],group_width:8}",
        *(f"model.roi_heads.box_heads.{i}.fc_dims=[16]" for i in range(3)),
        *(f"model.roi_heads.box_heads.{i}.conv_dims=[16,16,16,16]" for i in range(3)),
        "dataloader.train.mapper.augmentations.1.tfm_or_aug.augs.0.short_edge_length=[64]",
        "dataloader.train.mapper.augmentations.1.tfm_or_aug.augs.1.crop_size=[40,60]",
        "dataloader.train.mapper.augmentations.2.short_edge_length=[64,96]",
        "dataloader.test.mapper.augmentations.0.short_edge_length=64",
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("leaf", NARROW)
def test_a_leaf_trains_saves_and_evaluates(digits, tmp_path, tool, clean_catalog, leaf):
    """The first one at its full size, of model and images."""
    data = few_images(digits, tmp_path, 1)
    data = str([[f"few_{name}", *place] for name, *place in data]).replace(" ", "")
    arguments = [
        "--config-file",
        str(FOLDER / f"COCO-InstanceSegmentation/{leaf}.py"),
        *NARROW[leaf],
    ]
    arguments += [f"dataloader.register_coco={data}", "dataloader.train.num_workers=0"]
    arguments += [
        "dataloader.train.dataset.names=few_digits_training",
        "dataloader.test.num_workers=0",
    ]
    arguments += [
        "dataloader.test.dataset.names=few_digits_validation",
        "model.roi_heads.num_classes=10",
    ]
    arguments += ["dataloader.train.total_batch_size=1", "train.max_iter=1", "train.log_period=1"]
    assert tool.main([*arguments, f"train.output_dir={tmp_path}", "train.seed=0"]) == 0
    training, evaluation = read_metrics(tmp_path)
    assert math.isfinite(training["total_loss"]) and 0 <= evaluation["segm/AP"] <= 100
    assert len([name for name in training if name.startswith("loss_")]) == (
        11 if leaf.startswith("cascade") else 5
    )
    assert (tmp_path / "model_final.pth").exists()
