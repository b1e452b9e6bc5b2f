"""Shared fixtures, and the rule that tests for CUDA cannot vanish silently."""

import itertools
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

# Test files run side by side: threads that wait must not keep the others from working, and what a
# test starts has as many as the test itself.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
THREADS = max(1, min(2, os.cpu_count() or 1) // WORKERS)
os.environ["OMP_NUM_THREADS"] = str(THREADS)
import torch  # noqa: E402

REPOSITORY = Path(__file__).resolve().parents[1]
STAND_INS = str(REPOSITORY / "tests/helpers/stand_ins")
sys.path.insert(0, STAND_INS)
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [STAND_INS, os.getenv("PYTHONPATH")]))
RUNS = itertools.count()
VISUALIZERS = {
    "mmdet": "DetLocalVisualizer",
    "mmpretrain": "UniversalVisualizer",
    "mmseg": "SegLocalVisualizer",
}
FAIL_WITHOUT_CUDA = os.environ.get("FAIL_WITHOUT_CUDA", "0") not in ("", "0")


def load_tool(name: str) -> ModuleType:
    """tools/NAME.py as a module, loaded anew."""
    spec = spec_from_file_location(f"{name}_tool", REPOSITORY / f"tools/{name}.py")
    module = sys.modules[spec.name] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pytest_report_header() -> str:
    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return f"CUDA device: {cuda}" + (" (its absence is a failure)" if FAIL_WITHOUT_CUDA else "")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("needs_cuda") and not torch.cuda.is_available():
        if FAIL_WITHOUT_CUDA:
            pytest.fail("needs a CUDA device, and FAIL_WITHOUT_CUDA is set", pytrace=False)
        pytest.skip("needs a CUDA device (FAIL_WITHOUT_CUDA=1 makes this a failure)")


@pytest.fixture(scope="session", autouse=True)
def few_threads() -> None:
    torch.set_num_threads(THREADS)


@pytest.fixture(scope="module", autouse=True)
def own_data_sets() -> Iterator[None]:
    """Detectron2 knows the data sets of one test file at a time, whatever shares a process."""
    yield from _forgetting_data_sets()


@pytest.fixture
def clean_catalog() -> Iterator[None]:
    """Detectron2's catalog lasts as long as the process: a test leaves no data set there."""
    yield from _forgetting_data_sets()


def _forgetting_data_sets() -> Iterator[None]:
    before = {id(catalog): set(catalog) for catalog in _catalogs()}
    yield
    for catalog in _catalogs():
        for name in set(catalog) - before.get(id(catalog), set(catalog)):
            del catalog[name]


def _catalogs() -> list:
    module = sys.modules.get("detectron2.data.catalog")
    return [module.DatasetCatalog, module.MetadataCatalog] if module else []


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """What tests write need not outlive a power cut: gigabytes of checkpoints."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(scope="session", autouse=True)
def quick_mmengine() -> None:
    if "mmengine" in sys.modules:
        from quick_mmengine import quicken_mmengine

        quicken_mmengine()


@pytest.fixture(autouse=True)
def own_second(monkeypatch: pytest.MonkeyPatch) -> None:
    """MMEngine tells runs apart by the second in which they begin: each run here has its own."""
    if (runner := sys.modules.get("mmengine.runner.runner")) is not None:
        times = {**vars(time), "strftime": lambda *_: f"20000101_{next(RUNS):06d}"}
        monkeypatch.setattr(runner, "time", SimpleNamespace(**times))


@pytest.fixture(autouse=True)
def own_visualizer() -> Iterator[None]:
    """A visualizer lasts as long as the process, and would write to the folder of its first run."""
    yield
    for framework, name in VISUALIZERS.items():
        if module := sys.modules.get(f"{framework}.visualization"):
            getattr(module, name)._instance_dict.clear()


@pytest.fixture
def refusal(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Runs a tool of elsa_mm that must end with status 2; returns its last line."""
    from elsa_mm import cli

    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)

    def run(tool: str, *arguments: object) -> str:
        capfd.readouterr()
        assert getattr(cli, tool)([str(argument) for argument in arguments]) == 2
        last_line = capfd.readouterr().err.strip().splitlines()[-1]
        assert last_line.startswith(f"{tool}: ") and "Traceback" not in last_line
        return last_line.removeprefix(f"{tool}: ")

    return run


@pytest.fixture(scope="session")
def emulation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an elsa_core whose kernels for the CPU are those for CUDA.

    Of all processes of the tests, which do not change it.
    """
    from filelock import FileLock

    sys.path.append(str(REPOSITORY / "tools"))
    from gpu import rehearsal

    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "emulation"
    with FileLock(f"{folder}.lock"):
        rehearsal.build(folder)
    return folder


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Root of a tiny digits data set: 16 training and 8 validation images of 96x96 pixels."""
    from examples.digits.dataset import make_dataset

    root = tmp_path_factory.mktemp("data") / "digits"
    make_dataset(root, train=16, val=8, size=96, seed=0, progress=False)
    return root


@pytest.fixture(scope="session")
def cityscapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same images as Cityscapes is laid out: 8 and 4 of 192x96 pixels."""
    from examples.digits.layouts import make_layout

    root = tmp_path_factory.mktemp("data") / "cityscapes"
    make_layout("cityscapes", root, train=16, val=8, size=96, seed=0, progress=False)
    return root


@pytest.fixture
def copy(digits: Path, tmp_path: Path) -> Path:
    """The data set of the tests, to damage."""
    return shutil.copytree(digits, tmp_path / "copy")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Files with random weights of the digits models of MMDetection and MMSegmentation."""
    from mm_tiny import CONFIGS
    from mmengine.config import Config
    from mmengine.registry import MODELS, DefaultScope

    folder = tmp_path_factory.mktemp("weights")
    for framework, path in CONFIGS.items():
        with DefaultScope.overwrite_default_scope(framework):
            state = MODELS.build(Config.fromfile(path).model).state_dict()
        torch.save({"meta": {}, "state_dict": state}, folder / f"{framework}.pth")
    return lambda framework: folder / f"{framework}.pth"


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A work folder."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
