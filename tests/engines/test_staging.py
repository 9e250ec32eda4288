"""Folders that appear whole or not at all."""

import os
import socket
import stat
import subprocess
from pathlib import Path

import psutil
import pytest

from kani_nb.engines.staging import staged_folder
from kani_nb.errors import ConfigError


def write(folder):
    with staged_folder(folder) as work:
        (work / "config.json").write_text("{}")
        (work / "sub").mkdir()
        secret = work / "sub" / "weights"
        secret.write_text("1")
        secret.chmod(0o600)


def test_files_and_folders_get_the_modes_of_this_user(tmp_path):
    before = os.umask(0o027)
    try:
        write(tmp_path / "new")
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "new", *tmp_path.rglob("*"))}
    assert modes == {"new": 0o750, "sub": 0o750, "weights": 0o640, "config.json": 0o640}


def test_an_empty_current_folder_stays_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    inode = tmp_path.stat().st_ino
    write(tmp_path)
    assert tmp_path.stat().st_ino == inode
    assert sorted(path.name for path in Path().iterdir()) == ["config.json", "sub"]


def test_while_it_is_written_nothing_is_seen_and_no_one_else_writes_there(tmp_path):
    with staged_folder(tmp_path / "new") as work:
        (work / "config.json").write_text("{}")
        assert not (tmp_path / "new").exists()
        with pytest.raises(ConfigError, match="is being saved at this moment"), staged_folder(tmp_path / "new"):
            pass
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


@pytest.mark.parametrize("name", ["config.json", "other"])
@pytest.mark.parametrize("was_there", [False, True])
def test_what_someone_else_wrote_meanwhile_is_not_overwritten(was_there, name, tmp_path):
    folder = tmp_path / "new"
    if was_there:
        folder.mkdir()
    with pytest.raises(ConfigError, match="written by someone else meanwhile"), staged_folder(folder) as work:
        (work / "config.json").write_text("{}")
        (work / "other").write_text("ours")
        folder.mkdir(exist_ok=True)
        (folder / name).write_text("theirs")
    assert [(path.name, path.read_text()) for path in folder.iterdir()] == [(name, "theirs")]
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


@pytest.mark.parametrize("was_there", [False, True])
def test_what_a_killed_process_left_is_removed_and_that_of_a_living_one_is_not(was_there, tmp_path):
    folder = tmp_path / "ne[w]"
    if was_there:
        folder.mkdir()
    killed = subprocess.Popen(["true"])
    killed.wait()
    host = socket.gethostname().replace(".", "_")
    place, mark = (folder, ".saving") if was_there else (tmp_path, ".ne[w].saving")
    # One of a process that is no more, and one of an earlier process that had this one's number.
    for process in (f"{killed.pid}-1760000000", f"{os.getpid()}-1760000000"):
        leftover = place / f"{mark}-{host}-{process}"
        leftover.mkdir()
        (leftover / "model.safetensors").write_text("half")
    parent = psutil.Process(os.getppid())
    living = tmp_path / f".ne[w].saving-{host}-{parent.pid}-{parent.create_time():.0f}"
    living.mkdir()
    write(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "sub"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([living.name, "ne[w]"])


def test_folders_made_on_the_way_go_when_it_fails(tmp_path):
    with pytest.raises(KeyboardInterrupt), staged_folder(tmp_path / "a" / "b" / "new"):
        raise KeyboardInterrupt
    assert not any(tmp_path.iterdir())
