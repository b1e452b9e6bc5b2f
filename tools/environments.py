"""The environments that tools/test_environments.py makes, as data.

bash runs the commands in a copy of the source tree, with the environment's `bin` first on the PATH.
They are those of README.md and the guides, as tests/repo/test_environments.py checks, with options
that shorten them. Their variables:

    $SITE        the environment's site-packages
    $DETECTRON2  a copy of the checkout that DETECTRON2 names
    $WHEEL       the wheel of ours; $DATA: a folder with images of digits
    $INSTALL     `uv pip install` where there is uv, else `pip install`
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

NEWEST = "newest"  # Python: the highest version of the range that there is


@dataclass(frozen=True)
class Step:
    """A command.

    Attributes:
        name: name in the table.
        run: the command.
        block: instead of a command, a page and a word in the block of Python to run.
        says: regular expression that the output must match.
        refused: whether the command must fail.
        counted: whether its seconds count for the environment's ``limit``.
    """

    name: str
    run: str = ""
    block: tuple[str, str] | None = None
    says: str = ""
    refused: bool = False
    counted: bool = False


@dataclass(frozen=True)
class Environment:
    """A user's machine.

    Attributes:
        python: version, such as "3.10", or NEWEST.
        torch: requirements of torch and, if wanted, torchvision.
        packages: requirements that are installed with them.
        needs: what must be provided: "wheel", "DETECTRON2".
        prepare: steps that install what the user has before us.
        steps: our installation and what follows; they must not change what was there before.
        compiler: whether a compiler is on the PATH.
        limit: seconds that the counted steps may take together; 0: no limit.
    """

    name: str
    python: str
    torch: tuple[str, ...]
    packages: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    prepare: tuple[Step, ...] = ()
    steps: tuple[Step, ...] = ()
    compiler: bool = True
    limit: int = 0


BUILD = ("setuptools>=64,<81", "wheel", "ninja")
PYTEST = "python -m pytest -q -p no:cacheprovider "
DIGITS = Step(
    "digits", "python tools/make_digits.py --out data/digits --train 16 --val 4 --size 96"
)
DOCTOR = Step("doctor", "python -m elsa_core.doctor", says="operator and gradients right")


# Core alone.


def core(name: str, python: str, torch: str, *first: Step, **more: tuple) -> Environment:
    modules = ("core/test_backbone", "core/test_blocks", "core/test_checkpoint")
    modules += ("core/test_variants", "weights/test_weights_attack")
    tests = " ".join(f"tests/{module}.py" for module in modules)
    chosen = "-k 'agrees_with_reference and compiled-float32 or gradcheck'"
    operator = f"tests/core/test_operator.py {chosen}"
    return Environment(
        name,
        python,
        (torch,),
        (*BUILD, "pytest"),
        prepare=first,
        steps=(
            Step("install", "pip install --no-build-isolation ."),
            DOCTOR,
            Step("tests", PYTEST + tests, says=r"\d+ passed"),
            Step("operator", PYTEST + operator, says=r"\d+ passed"),
            Step("README", block=("README.md", "elsa_attention(value")),
            Step("train", "python tests/users/train_backbone.py", says="the loss fell"),
        ),
        **more,
    )


# What openmim's dependencies leave behind; `pip install` ended in "UNKNOWN-0.0.0" with it.
OLD_SETUPTOOLS = (
    Step("setuptools 60.2", "pip install setuptools==60.2.0"),
    Step(
        "is refused",
        "pip install --no-build-isolation .",
        says=r"setuptools 60\.2\.0.*pip install 'setuptools>=64",
        refused=True,
    ),
    Step("and helped", "pip install 'setuptools>=64,<81' wheel"),
)

# OpenMMLab: its own tools on our configs, then its inferencer.


def short(**more: object) -> str:
    """Options of a training of four iterations with an evaluation, in seconds."""
    values = {"train_cfg.max_iters": 4, "default_hooks.logger.interval": 1}
    for part in ("train", "val", "test"):
        values |= {f"{part}_dataloader.{key}": value for key, value in LOADER.items()}
    return " --cfg-options " + " ".join(f"{key}={value}" for key, value in values.items())


LOADER = {"batch_size": 2, "num_workers": 0, "persistent_workers": False}
DETECTOR = "configs/mmdet/digits/mask-rcnn_elsa-swin_fpn_digits.py"
SEGMENTOR = "configs/mmseg/digits/elsa-swin_upernet_digits.py"
OPENMMLAB = (
    Step("install", "pip install --no-build-isolation '.[mm]'"),
    DOCTOR,
    DIGITS,
    Step(
        "mmdet's train.py",
        f"python $SITE/mmdet/.mim/tools/train.py {DETECTOR} --work-dir work_dirs/mmdet" + short(),
        says="coco/segm_mAP:",
    ),
    Step(
        "its --resume",
        f"python $SITE/mmdet/.mim/tools/train.py {DETECTOR} --work-dir work_dirs/mmdet --resume"
        + short().replace("max_iters=4", "max_iters=6"),
        says="resumed epoch: 0, iter: 4",
    ),
    Step(
        "its test.py",
        f"python $SITE/mmdet/.mim/tools/test.py {DETECTOR} work_dirs/mmdet/iter_6.pth"
        " --out found.pkl",
        says="coco/segm_mAP:",
    ),
    Step("DetInferencer", block=("docs/inference.md", "DetInferencer(")),
    Step(
        "mmseg's train.py",
        f"python $SITE/mmseg/.mim/tools/train.py {SEGMENTOR} --work-dir work_dirs/mmseg" + short(),
        says="mIoU:",
    ),
    Step(
        "its test.py",
        f"python $SITE/mmseg/.mim/tools/test.py {SEGMENTOR} work_dirs/mmseg/iter_4.pth"
        " --tta --out label_maps",
        says="mIoU:",
    ),
    Step(
        "our test.py",
        f"python tools/test.py {DETECTOR} work_dirs/mmdet/iter_6.pth",
        says="coco/segm_mAP:",
    ),
)


def openmmlab(
    name: str, python: str, torch: Sequence[str], mmcv: str, *packages: str, **more: tuple
) -> Environment:
    build = f"python tools/build_mmcv.py {mmcv} --out wheels && pip install wheels/*.whl"
    return Environment(
        name,
        python,
        tuple(torch),
        (*BUILD, *packages),
        prepare=(Step("mmcv", build),),
        steps=OPENMMLAB,
        **more,
    )


# Detectron2 from a checkout.

SHORT_D2 = "SOLVER.MAX_ITER 4 SOLVER.IMS_PER_BATCH 2 DATALOADER.NUM_WORKERS 0 MODEL.DEVICE cpu"
D2_CONFIG = "configs/detectron2/digits/mask_rcnn_elsa_swin_digits.yaml"
NO_OPENCV = "python -c 'import importlib.util as u, sys; sys.exit(bool(u.find_spec(\"cv2\")))'"
CONFIG_OF_RUN = "runs/digits/config.yaml"


def theirs(script: str, more: str = "", says: str = "") -> Step:
    """A script of Detectron2's with our keys."""
    name, _, options = script.partition(" ")
    words = f"python -m elsa_d2 $DETECTRON2/{name} {options} --config-file {CONFIG_OF_RUN} {more}"
    return Step("its " + name.rpartition("/")[2], " ".join(words.split()), says=says)


DETECTRON2 = (
    Step("no OpenCV", NO_OPENCV),
    Step("install", "pip install --no-build-isolation '.[d2]'"),
    Step("import elsa_d2", "python -c 'import elsa_d2'"),
    Step("doctor without it", "python -m elsa_core.doctor", says="opencv-python-headless"),
    Step("OpenCV", "pip install opencv-python-headless scikit-image scikit-learn"),
    # HEAD names a package of Meta's there.
    Step(
        "a patch",
        "sed -i 's/from vision.fair.detectron2.demo.predictor/from predictor/' "
        "$DETECTRON2/demo/demo.py",
    ),
    DOCTOR,
    DIGITS,
    Step(
        "train_net",
        f"python tools/train_net.py --config-file {D2_CONFIG} OUTPUT_DIR runs/digits {SHORT_D2}",
        says="segm",
    ),
    Step(
        "--resume",
        "python tools/train_net.py --config-file runs/digits/config.yaml --resume "
        "SOLVER.MAX_ITER 6",
        says="Starting training from iteration 4",
    ),
    theirs(
        "tools/analyze_model.py --tasks flop parameter --num-inputs 1",
        says="elsa::attention|GFLOPs|Flops",
    ),
    theirs("tools/visualize_data.py --source annotation", "--output-dir drawn"),
    theirs(
        "demo/demo.py",
        "--input data/digits/images/validation/000001.jpg --output found.jpg",
    ),
    theirs(
        "tools/train_net.py", "OUTPUT_DIR runs/plain", says="Starting training from iteration 0"
    ),
    Step("DefaultTrainer", "python tests/users/default_trainer.py", says="segm"),
    Step(
        "LazyConfig",
        "python $DETECTRON2/tools/lazyconfig_train_net.py --config-file tests/users/lazy_config.py",
        says="segm",
    ),
)


def detectron2(name: str, python: str, torch: Sequence[str], *install: Step) -> Environment:
    return Environment(
        name,
        python,
        tuple(torch),
        BUILD,
        needs=("DETECTRON2",),
        prepare=install,
        steps=DETECTRON2,
    )


# Without a compiler, and without pip looking at anything but the sources.
D2_SOURCES = Step(
    "Detectron2's sources",
    "(cd $DETECTRON2 && python setup.py -q egg_info && echo $DETECTRON2 > $SITE/detectron2.pth) && "
    "sed '/^$/,$d' $DETECTRON2/detectron2.egg-info/requires.txt > needed.txt && "
    "pip install -r needed.txt",
)
D2_COMPILED = Step("Detectron2", "FORCE_CUDA=0 pip install --no-build-isolation $DETECTRON2")
SEES_COMPILED = Step("its compiled part", "python -c 'import detectron2._C'")

# The wheel, without a compiler on the PATH: from nothing but torch to detections.

D2_OF_REGISTRY = Step(
    "Detectron2",
    "$INSTALL cloudpickle 'fvcore<0.1.6' hydra-core iopath matplotlib 'omegaconf<2.4' "
    "opencv-python-headless packaging pycocotools safetensors tabulate tensorboard termcolor tqdm "
    "yacs && "
    "pip install --no-deps --only-binary=:all: --python-version 3.10 --target $SITE "
    "sal-detectron2==0.7.2",
    counted=True,
)
SMALL = (
    "MODEL.ELSA_SWIN.CUSTOM_ARCH.EMBED_DIM 16 MODEL.ELSA_SWIN.CUSTOM_ARCH.DEPTHS [1,1,1,1] "
    "MODEL.FPN.OUT_CHANNELS 32 MODEL.ROI_BOX_HEAD.FC_DIM 32 MODEL.ROI_MASK_HEAD.CONV_DIM 32"
)
FOUND = """python -c "
import json, os
known = json.load(open(os.environ['DATA'] + '/annotations/instances_validation.json'))
names = {one['id']: one['name'] for one in known['categories']}
digits, right = len(known['annotations']), 0
for number, image in enumerate(json.load(open('found/results.json'))['images'], 1):
    there = [names[a['category_id']] for a in known['annotations'] if a['image_id'] == number]
    right += len(set(there) & {one['class'] for one in image['instances']})
print(f'{right} of {digits} digits found')
assert right > digits / 2"
"""


def wheel(name: str, python: str, torch: Sequence[str], kernels: str) -> Environment:
    return Environment(
        name,
        python,
        tuple(torch),
        ("setuptools<81",),
        needs=("wheel",),
        compiler=False,
        limit=60,
        prepare=(
            Step("no compiler", "! command -v cc c++ gcc g++ clang++ nvcc"),
            Step("import torch", "python -c 'import torch, torchvision'"),  # makes its bytecode
        ),
        steps=(
            Step(
                "install by hash",
                'echo "$WHEEL --hash=sha256:$(sha256sum <$WHEEL | cut -c-64)" >wheel.txt && '
                "pip install --require-hashes -r wheel.txt",
                counted=True,
            ),
            D2_OF_REGISTRY,
            Step(
                "demo",
                "elsa demo $DATA/images/validation --weights $DATA/digits_mask_rcnn.safetensors "
                "--config $SITE/elsa_d2/configs/digits/mask_rcnn_elsa_swin_digits.yaml "
                f"--out found --score-threshold 0.5 --opts MODEL.DEVICE cpu {SMALL}",
                counted=True,
            ),
            Step("detections", FOUND),
            Step("doctor", "elsa doctor", says=kernels),
        ),
    )


OLD, NEW = ("torch==2.6.0",), ("torch==2.15.0", "torchvision")
OFFICIAL = ("mmengine==0.10.7", "mmdet==3.3.0", "mmsegmentation==1.2.2", "numpy<2")
PINS = (Path(__file__).parents[1] / "requirements.txt").read_text()
(MMCV,) = re.findall(r"^onedl-mmcv==[\w.]+", PINS, re.M)
CONTINUED = re.findall(r"^onedl-mm(?:engine|detection|segmentation)==[\w.]+", PINS, re.M)
EXAMPLES = ("ftfy", "regex", "scikit-image", "scikit-learn")  # what the guides name besides

ENVIRONMENTS = (
    core("core-oldest", "3.10", OLD[0], *OLD_SETUPTOOLS),
    core("core-newest", NEWEST, NEW[0]),
    Environment(
        "torch-2.5",
        "3.10",
        ("torch==2.5.1",),
        BUILD,
        steps=(
            Step("is refused", "pip install --no-build-isolation .", says=r"2\.6", refused=True),
            Step("import is refused", "python -c 'import elsa_core'", says=r"2\.6", refused=True),
        ),
    ),
    openmmlab("openmmlab", "3.11", NEW, "mmcv==2.1.0", *OFFICIAL, *EXAMPLES),
    openmmlab("onedl", "3.13", NEW, MMCV, *CONTINUED, *EXAMPLES),
    detectron2("detectron2-sources", NEWEST, NEW, D2_SOURCES),
    detectron2("detectron2-compiled", "3.12", NEW, D2_COMPILED, SEES_COMPILED),
    wheel("wheel-2.6", "3.10", (*OLD, "torchvision"), "PyTorch"),
    wheel("wheel-2.10", "3.10", ("torch==2.10.0", "torchvision"), "avx"),
    wheel("wheel-2.13", "3.12", ("torch==2.13.0", "torchvision"), "avx"),
    wheel("wheel-newest", NEWEST, NEW, "avx"),
)
