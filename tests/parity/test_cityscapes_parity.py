"""One checkpoint, Detectron2 and OpenMMLab, the same scores of cityscapesscripts."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("detectron2")
pytest.importorskip("mmdet")
pytest.importorskip("mmseg")

from mmdet.apis import inference_detector, init_detector
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from test_cityscapes_configs import python, yaml
from test_weights_parity import ARCH, evaluate_d2, evaluate_mm, spread
from weights_models import save, sizes

import elsa_d2
from elsa_core.weights import convert_file
from elsa_tools.verify import d2, mm
from examples.digits import cityscapes_layout as layout

pytestmark = pytest.mark.slow

CLASSES = {"mask_rcnn": 8, "upernet": 19}


def small(method, root, task):
    """Both configs of a variant, with a small model and the data of a folder."""
    wanted = sizes(method, 32, 32, num_classes=CLASSES[method])
    theirs = Config.fromfile(python(method, "t"))
    mm.set_sizes(theirs.model, ARCH, wanted, method)
    theirs.model.backbone.init_std = 0.1
    theirs.test_dataloader.dataset.data_root = str(root)
    theirs.test_dataloader.update(num_workers=0, persistent_workers=False)
    theirs.test_dataloader.dataset.pipeline[1].scale = (192, 96)
    keys = {
        "MODEL.DEVICE": "cpu",
        "DATALOADER.NUM_WORKERS": 0,
        "INPUT.MIN_SIZE_TEST": 96,
        "INPUT.MAX_SIZE_TEST": 192,
        "INPUT.SEM_SEG.SCALE": [192, 96],
        "DATASETS.REGISTER_CITYSCAPES": [[f"parity_{task}", str(root), "val", task]],
        "DATASETS.TEST": [f"parity_{task}"],
    }
    pairs = [str(part) for pair in keys.items() for part in pair]
    ours = elsa_d2.load_config(str(yaml(method, "t")), pairs)
    ours.merge_from_list(d2.overrides(ARCH, wanted, method))
    elsa_d2.register_cityscapes_datasets(ours)
    return ours, theirs


def checkpoint(theirs, method, folder):
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope(theirs.default_scope):
        tensors = MODELS.build(theirs.model).state_dict()
    return save(folder, {"state_dict": spread(tensors, method)})


def both_ways(path, folder, framework):
    """The checkpoint in Detectron2's form, and back again in OpenMMLab's."""
    to_d2 = convert_file(path, folder / "d2.pth", "detectron2")
    back = convert_file(folder / "d2.pth", folder / "back.pth", framework)
    assert to_d2.sizes.num_classes == back.sizes.num_classes == CLASSES[to_d2.source.kind]
    return folder / "d2.pth", folder / "back.pth"


def test_same_iou(cityscapes, tmp_path):
    ours, theirs = small("upernet", cityscapes, "sem_seg")
    path = checkpoint(theirs, "upernet", tmp_path)
    first, second = both_ways(path, tmp_path, "mmseg")
    found, other = evaluate_d2(ours, first)["sem_seg"], evaluate_mm(theirs, second)
    for name in ("IoU", "iIoU", "IoU_sup", "iIoU_sup"):
        assert other[f"cityscapes/{name}"] == pytest.approx(found[name], abs=1e-3), name
    assert other["mIoU"] == pytest.approx(found["IoU"], abs=6e-3)  # which it rounds
    assert found["IoU"] > 0.2 and found["IoU_sup"] > 0.5


def judged_by(theirs, path, cityscapes, root):
    """A data set in which every third object that a model finds is true, shifted a little."""
    images = root / "leftImg8bit/val"
    images.parent.mkdir(parents=True)
    images.symlink_to(cityscapes / "leftImg8bit/val")
    ids = [layout.name2label[name].id for name in layout.STANDS_FOR[:8]]
    coco = layout._empty_coco()
    with DefaultScope.overwrite_default_scope("mmdet"):
        model = init_detector(theirs, str(path), device="cpu")
        for file in sorted(images.glob("*/*.png")):
            found = inference_detector(model, str(file)).pred_instances[::3]
            height, width = found.masks.shape[1:]
            map_ = np.full((height, width), layout.name2label["building"].id, np.int32)
            seen = [0] * 8
            for mask, label in zip(found.masks.numpy(), found.labels.tolist(), strict=True):
                mask = np.roll(mask, 1, axis=1)
                # Those that would hide another one are none.
                if mask.sum() > 150 and (map_[mask] < 1000).mean() > 0.9:
                    map_[mask] = 1000 * ids[label] + seen[label]
                    seen[label] += 1
            stem = file.name.removesuffix("_leftImg8bit.png")
            folder = root / "gtFine/val" / file.parent.name
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(map_.astype(np.uint16)).save(folder / f"{stem}_gtFine_instanceIds.png")
            labels = np.where(map_ < 1000, map_, map_ // 1000).astype(np.uint8)
            Image.fromarray(labels).save(folder / f"{stem}_gtFine_labelIds.png")
            # Detectron2 reads sizes here, and judges by the maps.
            content = {"imgHeight": height, "imgWidth": width, "objects": []}
            (folder / f"{stem}_gtFine_polygons.json").write_text(json.dumps(content))
            layout._add_to_coco(coco, f"{file.parent.name}/{stem}", map_)
    (root / "annotations").mkdir()
    annotations = root / "annotations/instancesonly_filtered_gtFine_val.json"
    annotations.write_text(json.dumps(coco))
    return annotations


def test_same_average_precision(cityscapes, tmp_path):
    root = tmp_path / "judged"
    ours, theirs = small("mask_rcnn", root, "instance_seg")
    path = checkpoint(theirs, "mask_rcnn", tmp_path)
    annotations = judged_by(theirs, path, cityscapes, root)
    theirs.test_evaluator[0].ann_file = str(annotations)
    theirs.test_evaluator[1].seg_prefix = str(root / "gtFine/val")
    first, second = both_ways(path, tmp_path, "mmdet")
    found, other = evaluate_d2(ours, first)["segm"], evaluate_mm(theirs, second)
    assert other["cityscapes/mAP"] == pytest.approx(found["AP"] / 100, abs=6e-4)
    assert other["cityscapes/AP@50"] == pytest.approx(found["AP50"] / 100, abs=6e-4)
    assert 0.02 < found["AP"] / 100 < found["AP50"] / 100 < 1
    assert 0 < other["coco/segm_mAP"] < 1
