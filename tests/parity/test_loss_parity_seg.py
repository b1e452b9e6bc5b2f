"""The published UPerNet in Detectron2 and in MMSegmentation: same weights, same results."""

import dataclasses
import inspect
import re

import cv2
import numpy as np
import pytest
import torch

pytest.importorskip("detectron2")
pytest.importorskip("mmseg")

from conftest import REPOSITORY
from detectron2.modeling import build_model
from mmcv.transforms import Compose
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.registry import MODELS, init_default_scope
from mmseg.models.losses import cross_entropy_loss
from upernet_names import our_name
from weights_models import TINY

from elsa_d2 import SegmentorWithTTA, SemSegMapper, load_config

CONFIG = REPOSITORY / "configs/detectron2/ADE20K-SemanticSegmentation/upernet_elsa_swin_t_160k.yaml"
DIGITS = REPOSITORY / "configs/mmseg/digits/elsa-swin_upernet_digits.py"
THEIRS = REPOSITORY / "configs/mmseg/_base_/models/upernet_elsa-swin.py"
RATIOS = (0.75, 1.5)
SCALE, CROP = (90, 54), (64, 64)
ARCH, WIDTH = dataclasses.asdict(TINY), 32


@pytest.fixture(scope="module")
def models():
    return build(config(), {})


@pytest.fixture(scope="module")
def narrow_models():
    """Half precision takes long on CPUs."""
    keys = {
        "MODEL.ELSA_SWIN.ARCH": "custom",
        **{f"MODEL.ELSA_SWIN.CUSTOM_ARCH.{name.upper()}": ARCH[name] for name in ARCH},
        "MODEL.SEM_SEG_HEAD.CONVS_DIM": WIDTH,
        "MODEL.SEM_SEG_HEAD.AUX_CONVS_DIM": WIDTH,
    }
    widths = [ARCH["embed_dim"] * 2**stage for stage in range(4)]
    change = {
        "backbone": {"arch": {"_delete_": True, **ARCH}},
        "decode_head": {"channels": WIDTH, "in_channels": widths},
        "auxiliary_head": {"channels": WIDTH, "in_channels": widths[2]},
    }
    return build(config([str(part) for item in keys.items() for part in item]), change)


def build(cfg, change):
    """Ours and theirs, without dropout and drop path; batch normalisation has seen some data."""
    torch.manual_seed(0)
    ours = build_model(cfg)
    cfg = Config.fromfile(THEIRS)
    head = {"num_classes": 150, "dropout_ratio": 0.0}
    cfg.merge_from_dict(
        {
            "model": {
                "decode_head": head,
                "auxiliary_head": head,
                "backbone": {"drop_path_rate": 0.0},
                "data_preprocessor": {"size": CROP},
            }
        }
    )
    cfg.merge_from_dict({"model": change})
    init_default_scope("mmseg")
    theirs = MODELS.build(cfg.model)
    for name, buffer in ours.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(std=0.3)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 2.0)
    state = theirs.state_dict()
    assert {our_name(name) for name in state} == set(ours.state_dict())
    theirs.load_state_dict({name: ours.state_dict()[our_name(name)] for name in state})
    return ours, theirs


def config(overrides=()):
    return load_config(
        str(CONFIG),
        [
            *("MODEL.DEVICE", "cpu", "MODEL.ELSA_SWIN.DROP_PATH_RATE", "0.0"),
            *("MODEL.SEM_SEG_HEAD.DROPOUT", "0.0"),
            *("INPUT.SEM_SEG.SCALE", str(SCALE), "INPUT.SEM_SEG.CROP_SIZE", str(CROP)),
            *("TEST.AUG.RATIOS", str(RATIOS), *overrides),
        ],
    )


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """Images of three shapes with label maps of 150 classes and of none."""
    folder = tmp_path_factory.mktemp("parity")
    random = np.random.default_rng(0)
    records = []
    for i, size in enumerate([(40, 75), (90, 50), (61, 83)]):
        image = cv2.resize(random.integers(0, 256, (7, 9, 3), dtype=np.uint8), size[::-1])
        labels = cv2.resize(
            random.integers(0, 151, (5, 5), dtype=np.uint8), size[::-1], interpolation=0
        )
        cv2.imwrite(str(folder / f"{i}.jpg"), image)
        cv2.imwrite(str(folder / f"{i}.png"), labels)
        records.append(
            {
                "file_name": str(folder / f"{i}.jpg"),
                "sem_seg_file_name": str(folder / f"{i}.png"),
                "reduce_zero_label": True,
            }
        )
    return records


def run_pipeline(steps, record):
    return Compose(steps)(
        {
            "img_path": record["file_name"],
            "seg_map_path": record["sem_seg_file_name"],
            "reduce_zero_label": True,
            "seg_fields": [],
        }
    )


def training_batches(records, theirs):
    """For ours and for theirs, with the same random numbers for the augmentation."""
    mapper = SemSegMapper(config(), True)
    pipeline = [
        dict(type="LoadImageFromFile"),
        dict(type="LoadAnnotations"),
        dict(type="RandomResize", scale=SCALE, ratio_range=(0.5, 2.0), keep_ratio=True),
        dict(type="RandomCrop", crop_size=CROP, cat_max_ratio=0.75),
        dict(type="RandomFlip", prob=0.5),
        dict(type="PhotoMetricDistortion"),
        dict(type="PackSegInputs"),
    ]
    np.random.seed(1)
    batch = [mapper(record) for record in records]
    np.random.seed(1)
    data = pseudo_collate([run_pipeline(pipeline, record) for record in records])
    return batch, theirs.data_preprocessor(data, training=True)


LOSSES = {"loss_sem_seg": "decode.loss_ce", "loss_sem_seg_aux": "aux.loss_ce"}


@pytest.mark.slow
def test_training_losses_and_gradients_agree(models, records):
    """From the files on."""
    ours, theirs = models
    batch, data = training_batches(records, theirs)
    assert any((x["sem_seg"] == 255).all(dim=1).any() for x in batch)  # some are padded
    for x, sample, image in zip(batch, data["data_samples"], data["inputs"], strict=True):
        assert torch.equal(x["sem_seg"], sample.gt_sem_seg.data[0].long())
        normal = (x["image"] - ours.pixel_mean) / ours.pixel_std
        torch.testing.assert_close(normal, image, rtol=1e-5, atol=1e-5)

    for model in models:
        model.train()
        model.zero_grad()
    mine, reference = ours(batch), theirs(**data, mode="loss")
    for key, their_key in LOSSES.items():
        assert mine[key].item() == pytest.approx(reference[their_key].item(), rel=1e-4)
        assert mine[key] > 0.5
    sum(mine.values()).backward()
    (reference["decode.loss_ce"] + reference["aux.loss_ce"]).backward()
    gradients = {name: p.grad for name, p in ours.named_parameters()}
    for name, parameter in theirs.named_parameters():
        difference = (gradients[our_name(name)] - parameter.grad).norm()
        assert difference <= 1e-3 * parameter.grad.norm() + 1e-6, name


@pytest.fixture(params=["as installed", "1.2.2"])
def version(request, monkeypatch):
    """Of MMSegmentation: 1.2.2 looks up the weight of the label that stands for no class, too."""
    if request.param == "1.2.2":
        source = inspect.getsource(cross_entropy_loss.cross_entropy)
        line = re.compile(r"label_weights = .*?\.to\(", re.DOTALL)
        source, found = line.subn("label_weights = class_weight[label].to(", source)
        assert found == 1
        exec(source, namespace := dict(vars(cross_entropy_loss)))
        monkeypatch.setattr(cross_entropy_loss, "cross_entropy", namespace["cross_entropy"])


@pytest.mark.parametrize("reduction", ["mean", "none", "sum"])
def test_class_weights_of_pixels_that_have_a_class(version, reduction):
    """The loss of the digits is the weighted mean, which Detectron2's head has, too."""
    config = Config.fromfile(DIGITS).model.auxiliary_head.loss_decode
    loss = MODELS.build({**config, "reduction": reduction})
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 11, 9, 7, generator=generator)
    labels = torch.randint(0, 11, (2, 9, 7), generator=generator)
    labels[:, 4:, 2:] = 255
    expected = torch.nn.functional.cross_entropy(
        logits, labels, torch.tensor(config.class_weight), ignore_index=255, reduction=reduction
    )
    torch.testing.assert_close(loss(logits, labels, ignore_index=255), 0.4 * expected)
    assert not loss(logits, labels * 0 + 255, ignore_index=255).any()


TEST_PIPELINE = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=SCALE, keep_ratio=True),
    dict(type="LoadAnnotations"),
    dict(type="PackSegInputs"),
]


# Measured: losses agree to 3e-7, and all but 0.3 and 1.5 % of the pixels have the same class. The
# logits that MMSegmentation enlarges are half precision, with ties between them; ours are float32.
@pytest.mark.parametrize(
    ("dtype", "agree"),
    [(torch.float16, 0.995), (torch.bfloat16, 0.97)],
    ids=["float16", "bfloat16"],
)
def test_losses_and_classes_agree_in_mixed_precision(narrow_models, records, dtype, agree):
    ours, theirs = narrow_models
    batch, data = training_batches(records, theirs)
    ours.train(), theirs.train()
    with torch.autocast("cpu", dtype), torch.no_grad():
        mine, reference = ours(batch), theirs(**data, mode="loss")
    for key, their_key in LOSSES.items():
        assert mine[key].item() == pytest.approx(reference[their_key].item(), rel=1e-5)
        assert mine[key] > 0.5
    ours.eval(), theirs.eval()
    mapper = SemSegMapper(config(), False)
    for record in records:
        with torch.autocast("cpu", dtype), torch.no_grad():
            (found,) = ours([mapper(record)])
            (sample,) = theirs.test_step(pseudo_collate([run_pipeline(TEST_PIPELINE, record)]))
        same = found["sem_seg"].argmax(dim=0) == sample.pred_sem_seg.data
        assert same.float().mean() > agree


def test_logits_agree(models, records):
    ours, theirs = (model.eval() for model in models)
    mapper = SemSegMapper(config(), False)
    for record in records[:2]:
        x = mapper(record)
        assert any(side % 4 for side in x["image"].shape[1:])  # the stride does not divide it
        with torch.no_grad():
            (mine,) = ours([x])
            (sample,) = theirs.test_step(pseudo_collate([run_pipeline(TEST_PIPELINE, record)]))
        expected = sample.seg_logits.data
        assert expected.shape == mine["sem_seg"].shape == (150, x["height"], x["width"])
        torch.testing.assert_close(mine["sem_seg"], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_multi_scale_and_flip_testing_agrees(models, records):
    ours, theirs = (model.eval() for model in models)
    resizes = [
        dict(type="Resize", scale=tuple(int(side * r) for side in SCALE), keep_ratio=True)
        for r in RATIOS
    ]
    flips = [dict(type="RandomFlip", prob=p, direction="horizontal") for p in (0.0, 1.0)]
    pipeline = [
        dict(type="LoadImageFromFile"),
        dict(
            type="TestTimeAug",
            transforms=[
                resizes,
                flips,
                [dict(type="LoadAnnotations")],
                [dict(type="PackSegInputs")],
            ],
        ),
    ]
    record = records[1]
    data = pseudo_collate([run_pipeline(pipeline, record)])
    with torch.no_grad():
        (mine,) = SegmentorWithTTA(config(), ours)([record])
        samples = [
            theirs.test_step({key: data[key][i] for key in data})[0] for i in range(len(RATIOS) * 2)
        ]
    (sample,) = MODELS.build(dict(type="SegTTAModel", module=theirs)).merge_preds([samples])
    alone = [sample.seg_logits.data.softmax(dim=0) for sample in samples]
    torch.testing.assert_close(mine["sem_seg"], torch.stack(alone).mean(0), rtol=1e-4, atol=1e-5)
    agreement = mine["sem_seg"].argmax(dim=0) == sample.pred_sem_seg.data
    assert agreement.float().mean() > 0.999
