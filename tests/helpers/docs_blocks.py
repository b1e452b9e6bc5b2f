"""The blocks of code in Markdown pages, and how the docs' tests run them.

- ``sh`` blocks: each command, in order; training commands are made small, see `shorten`.
- ``python`` blocks: executed; the blocks of a page share their names.
- Any block after ``<!-- file: NAME -->`` is written to that file in the working directory.
- A block after ``<!-- needs: WHAT -->`` is left alone: it needs what cannot be shipped.
"""

import argparse
import contextlib
import io
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
_FENCE = re.compile(
    r"^(?:<!-- (?P<mark>needs|file): (?P<what>[^\n]+?) -->\n\n?)?"
    r"```(?P<language>\w*)\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
_SHELL = re.compile(r"[|<>;&`]|\$\(")
# Not made by any command of ours, or not there in a clone.
_NOT_LINKED = {"data", "datasets", "work_dirs", "output", "demo_out", "build", "dist"}


@dataclass(frozen=True)
class Block:
    """``mark``: "needs", "file" or None, and ``what`` is said there; ``line`` of the first line."""

    language: str
    code: str
    line: int
    mark: str | None = None
    what: str | None = None

    @property
    def runs(self):
        return self.mark is None and self.language in ("sh", "python")


def read_blocks(text):
    return [
        Block(**match.groupdict(), line=text.count("\n", 0, match.start("code")) + 1)
        for match in _FENCE.finditer(text)
    ]


def read_page(path):
    """The blocks of a page; of README.md those of how to use it, without what is in brackets."""
    text = path.read_text()
    if path.name == "README.md" and path.parent == REPOSITORY:
        before, use = text.split("## Use it\n")
        use = use.split("\n## ", 1)[0]
        optional = re.sub(r" \[[^\]\n]*\]", "", use)
        # Lines keep their numbers.
        text = "\n" * (before.count("\n") + 1) + optional
    return read_blocks(text)


def commands(code):
    """The commands of a shell block, each on one line; a here-document makes it one command."""
    if "<<" in code:
        return [code]
    lines = code.replace("\\\n", " ").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]


def make_folder(folder):
    """A working directory that sees the repository's files and may be written to."""
    folder.mkdir(parents=True)
    for entry in REPOSITORY.iterdir():
        if entry.name[0] == "." or entry.name in _NOT_LINKED:
            continue
        if entry.name == "configs":  # may be added to
            shutil.copytree(entry, folder / "configs")
        else:
            (folder / entry.name).symlink_to(entry)


def run_page(blocks, folder):
    """Raises AssertionError, which names line and command, where one fails."""
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    names = {"__name__": "__main__"}
    for block in blocks:
        if block.mark == "file":
            path = Path(block.what)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.code)
        elif block.runs and block.language == "python":
            print(f"--- line {block.line}: Python", flush=True)
            exec(compile(block.code, f"block at line {block.line}", "exec"), names)
        elif block.runs:
            for command in commands(block.code):
                print(f"--- line {block.line}: {command}", flush=True)
                status = run_command(command)
                assert status == 0, f"line {block.line}, exit status {status}: {command}"


def run_command(command):
    """Tools of the repository in this process, everything else in a shell; the exit status."""
    # Files' contents are filled in here, so that a shell with a process of its own is not needed.
    command = re.sub(r"\$\(cat ([^)]+)\)", lambda m: Path(m[1]).read_text().strip(), command)
    words = [] if "<<" in command else shlex.split(command, comments=True)
    words = [os.path.expandvars(word) for word in words]
    tool = next((i for i, word in enumerate(words) if re.fullmatch(r"tools/\w+\.py", word)), None)
    if words and words[0] == "export":
        os.environ.update(word.split("=", 1) for word in words[1:])
        return 0
    if words[:2] == ["elsa", "fit"] and not _SHELL.search(command):
        return _run("elsa_tools", ["fit", *shorten("fit", words[2:])[0]], runpy.run_module)
    if tool is None and words[:2] == ["python", "-m"] and words[2].startswith("elsa_"):
        return _run(words[2], words[3:], runpy.run_module)
    if tool is None or _SHELL.search(command):
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        shell = ["bash", "-euo", "pipefail", "-c", command]
        return subprocess.run(shell, env={**os.environ, "PATH": path}).returncode
    name, arguments = words[tool], words[tool + 1 :]
    arguments, finish = shorten(Path(name).stem, arguments)
    if words[:tool] == ["python"] and "--num-gpus" not in arguments:
        status = _run(name, arguments, runpy.run_path)
    elif words[0] == "torchrun":
        status = _torchrun([*words[1:tool], name, *arguments])
    else:  # more than one process
        status = subprocess.run([sys.executable, *words[1:tool], name, *arguments]).returncode
    if status == 0:
        finish()
    return status


def _run(name, arguments, run):
    kept, sys.argv = sys.argv, [name, *arguments]
    try:
        run(name, run_name="__main__")
    except SystemExit as end:
        return end.code or 0
    finally:
        sys.argv = kept
    return 0


def _torchrun(arguments):
    """As the command, but what it starts are forks of this process."""
    from torch.distributed import run
    from torch.distributed.launcher.api import elastic_launch

    options = run.parse_args(arguments)
    options.rdzv_backend, options.rdzv_endpoint = "c10d", "localhost:0"  # a free port
    config, _, _ = run.config_from_args(options)
    config.start_method = "fork"
    elastic_launch(config, _be_rank)(options.training_script, options.training_script_args)
    return 0


def _be_rank(name, arguments):
    status = _run(name, arguments, runpy.run_path)
    assert status == 0, f"exit status {status}"


def shorten(tool, arguments):
    """A tool's arguments for fewer and smaller steps, and what makes its results have the names
    that a whole run's have."""
    if tool in ("train", "test"):
        return _shorten_openmmlab(arguments)
    if tool == "train_net":
        arguments = [*arguments, *_detectron2_options(arguments)]
    elif tool == "lazyconfig_train_net":
        last = 2 if "--resume" in arguments else 1
        arguments = [*arguments, f"train.max_iter={last}", "dataloader.train.total_batch_size=2"]
        arguments.append("model.roi_heads.box_predictor.test_topk_per_image=10")
    elif tool == "fit":
        length = arguments.index("--minutes")
        arguments = [*arguments[:length], "--epochs", "1", *arguments[length + 2 :]]
    elif tool == "make_digits":
        arguments = [*arguments, "--train", "8", "--val", "4", "--size", "96"]
    return arguments, lambda: None


def _detectron2_options(arguments):
    keys = {"DATALOADER.NUM_WORKERS": 0, "TEST.DETECTIONS_PER_IMAGE": 10}
    if "--eval-only" not in arguments:
        # A resumed training has something left to do.
        keys["SOLVER.MAX_ITER"] = 2 if "--resume" in arguments else 1
        if "SOLVER.IMS_PER_BATCH" not in arguments:  # where it is said, other keys depend on it
            keys["SOLVER.IMS_PER_BATCH"] = 2
    return [str(part) for pair in keys.items() for part in pair]


def _shorten_openmmlab(arguments):
    from mmengine.config import Config, DictAction

    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("config")
    parser.add_argument("--work-dir")
    parser.add_argument("--resume", nargs="?", const=True)
    parser.add_argument("--cfg-options", nargs="+", action=DictAction, default={})
    options, _ = parser.parse_known_args(arguments)
    cfg = Config.fromfile(options.config)
    cfg.merge_from_dict(options.cfg_options)
    values = {"default_hooks.logger.interval": 1}
    if "rcnn" in (cfg.get("model", {}).get("test_cfg") or {}):
        values["model.test_cfg.rcnn.max_per_img"] = 10
    unit = steps = None
    for part in ("train", "val", "test"):
        loader = f"{part}_dataloader"
        if not cfg.get(loader):
            continue
        values |= {f"{loader}.batch_size": 2, f"{loader}.num_workers": 0}
        values[f"{loader}.persistent_workers"] = False
        if "dataset" not in cfg[loader].dataset:
            values[f"{loader}.dataset.indices"] = 2
    length = cfg.get("train_cfg") or {}
    if "max_iters" in length:
        unit, steps = "iter", length["max_iters"]
    elif "max_epochs" in length:
        unit, steps = "epoch", length["max_epochs"]
    if unit:  # a resumed training has something left to do
        values[f"train_cfg.max_{unit}s"] = min(steps, 2 if options.resume else 1)
    default = f"work_dirs/{Path(options.config).stem}"
    folder = Path(options.work_dir or cfg.get("work_dir") or default)

    def name_checkpoint():
        last, wanted = folder / "last_checkpoint", folder / f"{unit}_{steps}.pth"
        if unit and last.is_file() and not wanted.exists():
            wanted.symlink_to(Path(last.read_text().strip()).name)

    more = [f"{name}={value}" for name, value in values.items()]
    return [*arguments, "--cfg-options", *more], name_checkpoint


def flags_of(tool):
    """All options that a tool's help names, those of its subcommands included."""
    _, shown = show_help(tool)
    subcommands = re.search(r"\{([\w,]+)\} \.\.\.", shown)
    for command in subcommands[1].split(",") if subcommands else ():
        shown += show_help(tool, command)[1]
    return set(re.findall(r"--[a-z][\w-]*", shown))


def show_help(tool, *words):
    """Exit status and output of a tool that is asked for its help, in this process."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        path = str(REPOSITORY / "tools" / f"{tool}.py")
        return _run(path, [*words, "--help"], runpy.run_path), text.getvalue()
