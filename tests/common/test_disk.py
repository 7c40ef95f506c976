"""Files and folders that are whole or absent, whatever is killed when, and what a disk that cannot be written says."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import SafetensorError
from toys.places import ROOT

from fewstep.common import disk
from fewstep.common.disk import create_file, exchange, put_right, replace_file, replace_folder, sweep
from fewstep.common.write_errors import WriteError, cannot_write, write_error


def killed(code: str, *words: object) -> None:
    """Run Python that prints a line and waits, and kill it there."""
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, words)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": paths},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "there\n"
    process.send_signal(signal.SIGKILL)
    process.wait()


def old_and_new(tmp_path: Path) -> Path:
    (tmp_path / "fast").mkdir()
    (tmp_path / "fast" / "weights").write_text("old")
    return tmp_path / "fast"


START = """
import os, sys, time
from pathlib import Path
from fewstep.common import disk
def wait(*_):
    print("there", flush=True)
    time.sleep(60)
folder = Path(sys.argv[1])
"""


@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_folder_takes_the_place_of_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can_exchange: bool):
    folder = old_and_new(tmp_path)
    if not can_exchange:
        monkeypatch.setattr(disk, "exchange", lambda one, other: False)
    with pytest.raises(KeyError), replace_folder(folder) as new:
        raise KeyError
    assert (folder / "weights").read_text() == "old"
    with replace_folder(folder) as new:
        (new / "weights").write_text("new")
    assert (folder / "weights").read_text() == "new"
    with replace_folder(folder, keep=True) as new:
        (new / "weights").write_text("third")
    assert (folder / "weights").read_text() == "new"
    assert os.listdir(tmp_path) == ["fast"]
    with replace_folder(tmp_path / "other"):
        pass
    assert (tmp_path / "other").stat().st_mode == folder.stat().st_mode


@pytest.mark.skipif(sys.platform != "linux", reason="renameat2 is Linux's")
def test_two_folders_are_exchanged_in_one_instant(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text("")
    assert exchange(tmp_path / "a", tmp_path / "b")
    assert [os.listdir(tmp_path / name) for name in ("a", "b")] == [["b"], ["a"]]
    with pytest.raises(FileNotFoundError):
        exchange(tmp_path / "a", tmp_path / "c")


def test_killed_while_it_writes_it_leaves_the_old_and_is_swept(tmp_path: Path) -> None:
    folder = old_and_new(tmp_path)
    killed(
        START + "with disk.replace_folder(folder) as new:\n    (new / 'weights').write_text('half')\n    wait()", folder
    )
    assert len(os.listdir(tmp_path)) == 2
    assert (folder / "weights").read_text() == "old"
    with replace_folder(folder) as new, replace_folder(folder):  # what is alive is not swept
        (new / "weights").write_text("new")
    assert os.listdir(tmp_path) == ["fast"]
    assert (folder / "weights").read_text() == "new"


def test_killed_between_two_renames_the_new_folder_is_there_at_the_next_look(tmp_path: Path) -> None:
    folder = old_and_new(tmp_path)
    kill = "disk.exchange = lambda one, other: False\nrename = Path.rename\n"
    kill += "Path.rename = lambda self, target: wait() if self.name == 'new' else rename(self, target)\n"
    kill += "with disk.replace_folder(folder) as new:\n    (new / 'weights').write_text('new')"
    killed(START + kill, folder)
    assert not folder.exists()
    (tmp_path / ".fast.mine0000").mkdir()  # whatever else has such a name
    (tmp_path / ".fast.mine0000" / "thesis.txt").write_text("years")
    put_right(folder)
    assert (folder / "weights").read_text() == "new"
    assert sorted(os.listdir(tmp_path)) == [".fast.mine0000", "fast"]


def test_parts_of_files_are_swept_once_their_process_is_gone(tmp_path: Path) -> None:
    file = tmp_path / "quality.json"
    replace_file(file, b"old")
    killed(START + "disk.os.replace = wait\ndisk.replace_file(folder, b'new')", file)
    assert len(os.listdir(tmp_path)) == 2
    (tmp_path / ".notes.part").write_text("mine")
    with disk._part(tmp_path / "alive", b"x") as part:
        sweep(tmp_path)
        assert part.exists()
    assert sorted(os.listdir(tmp_path)) == [".notes.part", "quality.json"]
    assert file.read_bytes() == b"old"


def test_of_several_one_is_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert create_file(tmp_path / "facts.json", b"one")
    assert not create_file(tmp_path / "facts.json", b"two")

    def refused(*_: object) -> None:
        raise OSError(errno.EPERM, "no links on this disk")

    monkeypatch.setattr(disk.os, "link", refused)
    assert not create_file(tmp_path / "facts.json", b"three")
    assert create_file(tmp_path / "others.json", b"one")
    assert [(tmp_path / name).read_bytes() for name in ("facts.json", "others.json")] == [b"one", b"one"]
    assert len(os.listdir(tmp_path)) == 2


# What cannot be written


@pytest.mark.parametrize(
    ("code", "cause", "way_out"),
    [
        (errno.ENOSPC, r"the disk is full, [\d,]+ bytes are free", "Free some space"),
        (errno.EDQUOT, "your share of the disk is used up", "Free some space"),
        (errno.EFBIG, "no file may be that large there", "ulimit -f"),
        (errno.EROFS, "the disk is read-only", "another place"),
        (errno.EACCES, "you may not write there", "chmod"),
        (errno.EIO, "the disk has an error", "another place"),
    ],
)
def test_a_line_has_the_file_the_cause_and_the_way_out(tmp_path: Path, code: int, cause: str, way_out: str) -> None:
    file = tmp_path / "model" / "weights"
    for error in (OSError(code, "x"), OSError(code, "x", str(file)), SafetensorError(f"I/O error: (os error {code})")):
        with (
            pytest.raises(WriteError, match=f"could not write {file}: {cause}.*{way_out}.*; it"),
            cannot_write(file, "; it"),
        ):
            raise error


def test_errors_of_reading_stay_as_they_are(tmp_path: Path) -> None:
    for error in (FileNotFoundError(errno.ENOENT, "x"), PermissionError(errno.EACCES, "x", "/etc/shadow"), KeyError()):
        with pytest.raises(type(error)) as caught, cannot_write(tmp_path / "model"):
            raise error
        assert caught.value is error


def test_names_that_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    for name, cause in {
        "file/report.html": f"{tmp_path / 'file'} is a file, and a folder is needed there",
        "file/deep/report.html": f"{tmp_path / 'file'} is a file, and a folder is needed there",
        "folder": "there is a folder of that name",
        "x" * 300: "the name is too long",
    }.items():
        with pytest.raises(WriteError, match=cause):
            replace_file(tmp_path / name, b"")
        assert sorted(os.listdir(tmp_path)) == ["file", "folder"]
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "file"))
    said = str(write_error(OSError(errno.ENOSPC, ""), tmp_path / "file" / "null"))
    assert "FEWSTEP_CACHE" in said
