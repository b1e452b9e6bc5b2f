"""tools/build_mmcv.py: its cache, the parts of a compilation and its refusals; no downloads."""

import os
import re
import subprocess
import sys
import tarfile
import zipfile

import pytest
from conftest import load_tool

mmcv = load_tool("build_mmcv")


def fake_wheel(path, content="not a library"):
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("mmcv/_ext.abi3.so", content)
    return path


def test_wheel_is_kept_apart_by_what_it_was_compiled_for(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folders = [mmcv.cache_folder("onedl-mmcv==1"), mmcv.cache_folder("onedl-mmcv==2")]
    monkeypatch.setattr("torch.__version__", "9.9")
    folders.append(mmcv.cache_folder("onedl-mmcv==1"))
    assert len(set(folders)) == 3
    assert all(folder.parent == tmp_path / "elsa-swin" for folder in folders)


def test_broken_wheel_is_not_used(tmp_path):
    broken = tmp_path / "mmcv.whl"
    broken.write_bytes(b"PK half a file")
    assert not mmcv.loads(broken)
    assert not mmcv.loads(fake_wheel(broken))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda wheel: None, None),
        (lambda wheel: fake_wheel(wheel, "other content"), "it has changed since it was compiled"),
        (lambda wheel: wheel.with_suffix(".sha256").unlink(), r"there is no mmcv\.sha256"),
        (lambda wheel: wheel.chmod(0o620), "others may write to .*whl"),
        (lambda wheel: wheel.with_suffix(".sha256").chmod(0o602), "others may write to .*sha256"),
        (lambda wheel: wheel.parent.chmod(0o777), "others may write to .*/mmcv-1"),
        (lambda wheel: wheel.parent.parent.chmod(0o775), "others may write to .*/elsa-swin"),
        (lambda wheel: wheel.symlink_to(wheel.rename(wheel.parent / "x")), "is a symbolic link"),
    ],
)
def test_cached_wheel_is_used_only_if_nobody_else_can_have_changed_it(
    tmp_path, monkeypatch, capsys, change, reason
):
    monkeypatch.setattr(mmcv, "loads", lambda wheel: True)
    folder = tmp_path / "elsa-swin" / "mmcv-1"
    old_mask = os.umask(0o002)  # many systems' own: group-writable files
    try:
        mmcv.keep(fake_wheel(tmp_path / "mmcv.whl"), folder)
    finally:
        os.umask(old_mask)
    change(folder / "mmcv.whl")
    used = mmcv.cached_wheel(folder)
    said = capsys.readouterr().out
    if reason is None:
        assert used == folder / "mmcv.whl" and said == ""
    else:
        assert used is None
        assert re.search(rf"is not used, as .*{reason}.*: mmcv is compiled again", said)


def test_cached_wheel_of_another_user_is_not_used(tmp_path, monkeypatch):
    folder = tmp_path / "elsa-swin" / "mmcv-1"
    mmcv.keep(fake_wheel(tmp_path / "mmcv.whl"), folder)
    monkeypatch.setattr(mmcv.os, "geteuid", lambda: os.getuid() + 1)
    assert mmcv.cached_wheel(folder) is None


def test_grouped_sources_hold_every_file_once(tmp_path):
    names = {f"op{index}.cpp" for index in range(9)}
    for name in {*names, "pybind.cpp"}:
        (tmp_path / name).write_text(name)
    mmcv.group_sources(tmp_path)
    groups = sorted(path for path in tmp_path.glob("*.cpp") if path.name != "pybind.cpp")
    included = re.findall(r'#include "parts/(.+)"', "".join(p.read_text() for p in groups))
    assert len(groups) == mmcv.GROUPS and sorted(included) == sorted(names)
    assert all((tmp_path / "parts" / name).read_text() == name for name in names)
    assert (tmp_path / "pybind.cpp").read_text() == "pybind.cpp"


@pytest.mark.skipif(not hasattr(tarfile, "data_filter"), reason="this Python has no such filter")
@pytest.mark.parametrize("name", ["../evil.py", "mmcv/../../evil.py"])
def test_source_is_unpacked_into_its_folder_alone(tmp_path, name):
    (tmp_path / "setup.py").write_text("")
    for inside in ("mmcv/setup.py", name):
        with tarfile.open(tmp_path / "mmcv.tar.gz", "w:gz") as archive:
            archive.add(tmp_path / "setup.py", inside)
        if inside != name:
            mmcv.unpack(tmp_path / "mmcv.tar.gz", tmp_path / "source")
            assert (tmp_path / "source" / inside).is_file()
    with pytest.raises(mmcv.BuildError, match="mmcv.tar.gz is not unpacked: .*evil.py"):
        mmcv.unpack(tmp_path / "mmcv.tar.gz", tmp_path / "source")
    assert not list(tmp_path.rglob("evil.py"))


def test_wheel_is_placed_beside_what_is_there(tmp_path):
    (tmp_path / "other.txt").write_text("the user's")
    for content in ("old", "new"):
        placed = mmcv.place(fake_wheel(tmp_path / "a" / "mmcv.whl", content), tmp_path)
        assert placed == tmp_path / "mmcv.whl"
        assert zipfile.ZipFile(placed).read("mmcv/_ext.abi3.so") == content.encode()
    assert {path.name for path in tmp_path.iterdir()} == {"a", "mmcv.whl", "other.txt"}


@pytest.mark.parametrize("flags", [[], ["-std=c++20", "-DNAME=1"]])
def test_header_is_compiled_with_the_flags_of_the_file_and_used(tmp_path, flags):
    """-Winvalid-pch and -Werror: a header made with other flags would end the compilation."""
    header = tmp_path / "header.h"
    header.write_text("inline int answer() { return 42; }\n")
    compiler = mmcv.write_compiler(tmp_path)
    for name in ("one", "two"):
        source = tmp_path / f"{name}.cpp"
        source.write_text("int main() { return answer() - 42; }\n")
        files = ["-MMD", "-MF", "x.d", "-c", "-c", str(source), "-o", str(tmp_path / f"{name}.o")]
        subprocess.run([compiler, "-Werror", *files, *flags], cwd=tmp_path, check=True)
        header.write_text("#error the pre-compiled header is not used\n")
    subprocess.run([compiler, tmp_path / "two.o", "-o", tmp_path / "two"], check=True)
    subprocess.run([tmp_path / "two"], check=True)


@pytest.mark.parametrize(
    ("requirement", "missing", "sentence"),
    [
        ("mmcv", None, "mmcv==VERSION or onedl-mmcv==VERSION is needed, got 'mmcv'"),
        ("numpy==2.2.6", None, "or onedl-mmcv==VERSION is needed, got 'numpy==2.2.6'"),
        ("mmcv==0.0.7", None, "mmcv was not built: fetching mmcv==0.0.7 failed: pip finds no such"),
        ("mmcv==2.1.0", "c++", r"mmcv was not built: no C\+\+ compiler found \(/none/c\+\+\)"),
        ("mmcv==2.1.0", "torch", "mmcv was not built: .* has none that can be imported"),
        ("mmcv==2.1.0", "Python.h", r"mmcv was not built: .*Python\.h is missing: install python3"),
    ],
)
def test_build_that_cannot_be_says_why(
    tmp_path, monkeypatch, capsys, requirement, missing, sentence
):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if missing == "c++":
        monkeypatch.setenv("CXX", "/none/c++")
    elif missing == "torch":
        monkeypatch.setitem(sys.modules, "torch", None)
    elif missing == "Python.h":
        monkeypatch.setattr(mmcv.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    try:
        status = mmcv.main([requirement, "--out", str(tmp_path / "out")])
    except SystemExit as error:
        status = error.code
    assert status == 2
    assert re.search(sentence, capsys.readouterr().err.splitlines()[-1])
    assert not list(tmp_path.glob("out/*"))
