"""Folders that appear whole or not at all."""

import os
from pathlib import Path

import pytest

from examples.digits.whole_folder import publish, workspace


def test_lock_is_taken_over_when_its_file_vanishes(tmp_path):
    # A run that ends removes the lock file; one that had opened it must not work without a lock.
    home = tmp_path / ".data.partial"
    with workspace(tmp_path / "data"):
        (home / "lock").unlink()
        with workspace(tmp_path / "data") as new:
            assert new.is_dir() and (home / "lock").is_file()


def test_a_folder_is_seen_only_when_published(tmp_path, monkeypatch):
    target = tmp_path / "deep" / "data"
    with workspace(target) as new:
        (new / "file").write_text("new")
        assert not target.exists()
        publish(new, target)
    rename = Path.rename

    def refuse_new(self, to):
        if self.name == "new":
            raise OSError(28, "No space left on device")
        return rename(self, to)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(Path, "rename", refuse_new)
        with workspace(target) as new:
            publish(new, target)
    assert (target / "file").read_text() == "new"
    with workspace(target) as new:
        (new / "other").write_text("newer")
        publish(new, target)
    assert os.listdir(target) == ["other"]
    assert os.listdir(target.parent) == ["data"]


def test_what_a_killed_run_left_is_removed(tmp_path):
    home = tmp_path / ".data.partial"
    (home / "new" / "images").mkdir(parents=True)
    (home / "old").mkdir()
    (home / "lock").write_text("")
    (home / "new" / "images" / "1.jpg").write_text("half an ima")
    (home / "new" / "link").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "bystander").write_text("mine")
    with workspace(tmp_path / "data") as new:
        assert sorted(os.listdir(home)) == ["lock", "new"]
        assert os.listdir(new) == []
    assert os.listdir(tmp_path) == ["bystander"]


def test_two_at_once_are_refused_and_targets_do_not_meet(tmp_path):
    with workspace(tmp_path / "a") as first, workspace(tmp_path / "b") as second:
        assert first != second
        with pytest.raises(OSError, match="another run is writing it now"):
            workspace(tmp_path / "a").__enter__()
        assert first.is_dir()
    assert os.listdir(tmp_path) == []
