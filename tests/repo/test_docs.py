"""The pages of the docs: their commands run, and what they name exists."""

import contextlib
import io
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
from functools import cache
from importlib.util import find_spec

import pytest

pytest.importorskip("detectron2")
pytest.importorskip("mmdet")
pytest.importorskip("mmseg")
pytest.importorskip("mmpretrain")

from docs_blocks import REPOSITORY, commands, flags_of, make_folder, read_blocks, read_page, shorten

from elsa_core import doctor
from elsa_tools.fit import cli as fit

DOCS = sorted((REPOSITORY / "docs").glob("*.md"))
README = REPOSITORY / "README.md"
PAGES = [README, *DOCS]
OTHERS = [REPOSITORY / name for name in ("CONTRIBUTING.md", "csrc/README.md", "MODEL_ZOO.md")]
SECONDS = 240
# What a page needs besides the frameworks.
LIBRARIES = {
    "channels.md": ("tifffile",),
    "doors.md": ("timm", "transformers", "sahi", "supervision"),
}
# Options of commands that are not ours.
FOREIGN = set(
    """
    --no-build-isolation --no-deps --target --only-binary --python-version --no-cache-dir
    --force-reinstall --dry-run --index-url --user --upgrade
    --nproc-per-node --nproc_per_node --nnodes --node-rank --node_rank --rdzv-backend
    --rdzv-endpoint --rdzv-id --rdzv_backend --rdzv_endpoint --rdzv_id --master-addr --master-port
    --master_addr --master_port --standalone --max-restarts
    --ntasks --ntasks-per-node --nodes --gres --gpus-per-node --signal --requeue --time --mem
    --cpus-per-task --job-name --partition --export --kill-on-bad-exit --wrap --open-mode --output
    --logdir --version --check --help --ipc --shm-size
    --inplace
    --tasks --num-inputs --source --output-dir --input
    --rm --build-arg --gpus --entrypoint
    """.split()
)
FLAG = re.compile(r"(?<![\w-])--[a-z][\w-]*")
KEY = re.compile(r"\b(?:MODEL|INPUT|SOLVER|DATASETS|DATALOADER|TEST)(?:\.[A-Z0-9_]+)+\b")
FOLDERS = "benchmarks|configs|csrc|docs|elsa_[a-z0-9]+|examples|tests|tools"
PATH = re.compile(rf"(?<![\w/.$-])((?:{FOLDERS})/[\w./*{{}},-]*)")
# The command lines behind `elsa COMMAND`, of which the flags are compared.
COMMANDS = {"convert": "convert_weights", "data": "prepare_data", "export": "export_onnx"}


def for_each(pages):
    names = [path.relative_to(REPOSITORY).as_posix() for path in pages]
    return pytest.mark.parametrize("path", pages, ids=names)


page = for_each(PAGES)


class Runner:
    """A process that runs pages, see docs_runner; begun anew after a page that took too long."""

    def __init__(self):
        self.process = None

    def start(self):
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        environment |= {"OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "MPLBACKEND": "agg"}
        environment["PYTHONPATH"] += f":{REPOSITORY}:{REPOSITORY / 'tests/helpers'}"
        environment.pop("DETECTRON2_DATASETS", None)
        self.process = subprocess.Popen(
            [sys.executable, REPOSITORY / "tests/helpers/docs_runner.py"],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, **job):
        """The exit status of a page; None where it took more than SECONDS."""
        if self.process is None:
            self.start()
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        ready, _, _ = select.select([self.process.stdout], [], [], SECONDS)
        if not ready:
            self.stop()
            return None
        return int(self.process.stdout.readline())

    def stop(self):
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


@pytest.fixture(scope="module")
def runner():
    runner = Runner()
    yield runner
    runner.stop()


@page
def test_building_again_takes_nothing_from_a_cache(path):
    """Pip would install the wheel that it built for another PyTorch, or without CUDA."""
    again = [line for line in path.read_text().splitlines() if "--force-reinstall" in line]
    assert all("--no-cache-dir" in line for line in again)


@pytest.mark.slow
@page
def test_commands_of_a_page_run_in_order(path, runner, digits, tmp_path):
    if not any(block.runs for block in read_page(path)):
        return
    if missing := [name for name in LIBRARIES.get(path.name, ()) if find_spec(name) is None]:
        pytest.skip(f"{missing[0]} is not installed")
    folder, output = tmp_path / "work", tmp_path / "output.txt"
    make_folder(folder)
    if path == README:  # `make demo`, further up in it, makes the data
        shutil.copytree(digits, folder / "data/digits")
    status = runner.run(page=str(path), folder=str(folder), output=str(output))
    shown = output.read_text()[-4000:] if output.exists() else ""
    assert status is not None, f"{path.name} takes more than {SECONDS} s:\n{shown}"
    assert status == 0, f"{path.name}:\n{shown}"


@page
def test_every_block_is_run_or_says_why_not(path):
    for block in read_page(path):
        if block.language not in ("sh", "python"):
            hidden = re.search(r"^(\$ )?(python|make|pip|torchrun|import|from) ", block.code, re.M)
            assert not hidden or block.mark, f"line {block.line}: not run: {hidden[0]}"


@cache
def known_flags():
    tools = [tool.stem for tool in (REPOSITORY / "tools").glob("*.py")]
    known = {tool: flags_of(tool) for tool in tools}
    for name, command in (("doctor", doctor), ("fit", fit)):
        with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.suppress(SystemExit):
            command.main(["--help"])
        known[name] = set(FLAG.findall(text.getvalue()))
    return known


@page
def test_options_exist(path):
    text = re.sub(r"<!--.*?-->", "", path.read_text())
    anything = FOREIGN.union(*known_flags().values())
    assert set(FLAG.findall(text)) <= anything
    for block in read_blocks(text):
        for command in commands(block.code) if block.language == "sh" else []:
            for found in re.finditer(r"(?:tools/|-m |elsa )(\w+)(?:\.py)?((?: [^|;&]*)?)", command):
                tool = COMMANDS.get(found[1], found[1])
                if tool in known_flags():
                    assert set(FLAG.findall(found[2])) <= known_flags()[tool], (
                        f"{path.name}: {command}"
                    )


@page
def test_config_keys_exist(path):
    from elsa_d2 import load_config

    cfg = load_config()
    for name in set(KEY.findall(path.read_text())):
        node = cfg
        for part in name.split("."):
            assert part in node, f"{path.name}: {name}"
            node = node[part]


@page
def test_paths_exist(path):
    text = path.read_text()
    for name in {match.rstrip(".,") for match in PATH.findall(text)}:
        if any(mark in name for mark in ("...", "{", "*")) or name.endswith("_"):
            pattern = re.sub(r"\{[^}]*\}|\.\.\.", "*", name).rstrip("{,*")
            assert list(REPOSITORY.glob(f"{pattern}*")), f"{path.name}: {name}"
        elif "/.mim/" not in name:
            assert (REPOSITORY / name).exists(), f"{path.name}: {name}"


@for_each([*PAGES, *OTHERS])
def test_named_tests_exist(path):
    for file, name in re.findall(r"`(?:(tests/[\w/]+\.py)::)?(test_\w+)`", path.read_text()):
        if name in ("test_cfg", "test_dataloader", "test_evaluator", "test_pipeline"):
            continue  # keys of OpenMMLab's configs
        files = [REPOSITORY / file] if file else (REPOSITORY / "tests").rglob("test_*.py")
        definition = re.compile(rf"^def {name}\(", re.MULTILINE)
        assert any(definition.search(one.read_text()) for one in files), f"{path.name}: {name}"


def anchors(path):
    heads = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", head.lower()) for head in heads)
    return {head.replace(" ", "-") for head in plain}


@for_each([*PAGES, *OTHERS])
def test_links_resolve(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        file = path.parent / name if name else path
        assert file.exists(), f"{path.name}: {target}"
        if anchor:
            assert anchor in anchors(file), f"{path.name}: {target}"


def test_index_names_every_page():
    index = (REPOSITORY / "docs/README.md").read_text()
    missing = [path.name for path in DOCS if path.name != "README.md" and path.name not in index]
    assert not missing


def test_blocks_and_their_marks():
    text = (
        "```sh\na \\\n  b\n# c\nd\n```\n\n<!-- needs: COCO -->\n```sh\ne\n```\n"
        "<!-- file: f.py -->\n\n```python\ng\n```\n"
    )
    first, second, third = read_blocks(text)
    assert commands(first.code) == ["a    b", "d"] and first.runs and first.line == 2
    assert (second.mark, second.what, second.runs) == ("needs", "COCO", False)
    assert (third.mark, third.what, third.code) == ("file", "f.py", "g\n")


def test_shortened_commands_keep_what_they_say(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    config = "configs/mmdet/digits/mask-rcnn_elsa-swin_fpn_digits.py"
    arguments, _ = shorten("train", [config, "--cfg-options", "train_cfg.max_iters=3"])
    assert arguments[:3] == [config, "--cfg-options", "train_cfg.max_iters=3"]
    assert "train_cfg.max_iters=1" in arguments
    detectron2, _ = shorten("train_net", ["--config-file", "a.yaml", "--eval-only", "A.B", "c"])
    assert detectron2[:5] == ["--config-file", "a.yaml", "--eval-only", "A.B", "c"]
    assert "SOLVER.MAX_ITER" not in detectron2
    assert shorten("analyze", ["parts"])[0] == ["parts"]
