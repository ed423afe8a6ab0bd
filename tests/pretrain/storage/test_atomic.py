"""Files and folders that are replaced in one step."""

import os
from pathlib import Path

import pytest

from trifold.pretrain.storage import atomic
from trifold.pretrain.storage.atomic import move_folder, open_replacement, replace_file, replace_folder


def test_a_file_is_replaced_and_nothing_else_is_left(tmp_path: Path) -> None:
    replace_file(tmp_path / "file", "old")
    replace_file(tmp_path / "file", "größer")
    assert (tmp_path / "file").read_bytes() == "größer".encode()
    assert os.listdir(tmp_path) == ["file"]


def test_an_error_while_writing_leaves_the_old_file_alone(tmp_path: Path) -> None:
    replace_file(tmp_path / "file", b"old")
    with pytest.raises(ZeroDivisionError), open_replacement(tmp_path / "file") as file:
        file.write(b"new")
        raise ZeroDivisionError
    assert (tmp_path / "file").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_readers_see_the_old_file_until_the_new_one_is_complete(tmp_path: Path) -> None:
    replace_file(tmp_path / "file", b"old")
    with open_replacement(tmp_path / "file") as file:
        file.write(b"new")
        file.flush()
        assert (tmp_path / "file").read_bytes() == b"old"
    assert (tmp_path / "file").read_bytes() == b"new"


def test_a_folder_is_replaced_with_all_below_it(tmp_path: Path) -> None:
    for text in ("old", "new"):
        with replace_folder(tmp_path / "folder") as folder:
            (folder / "sub").mkdir()
            (folder / "sub" / text).write_text(text)
    assert os.listdir(tmp_path) == ["folder"]
    assert os.listdir(tmp_path / "folder" / "sub") == ["new"]


def test_an_error_while_filling_leaves_the_old_folder_alone(tmp_path: Path) -> None:
    with replace_folder(tmp_path / "folder") as folder:
        (folder / "old").touch()
    with pytest.raises(ZeroDivisionError), replace_folder(tmp_path / "folder") as folder:
        (folder / "new").touch()
        raise ZeroDivisionError
    assert os.listdir(tmp_path) == ["folder"]
    assert os.listdir(tmp_path / "folder") == ["old"]


def test_a_folder_that_appeared_meanwhile_is_not_overwritten_unless_asked(tmp_path: Path) -> None:
    with pytest.raises(OSError), replace_folder(tmp_path / "folder", overwrite=False) as folder:
        (folder / "ours").touch()
        (tmp_path / "folder").mkdir()
        (tmp_path / "folder" / "theirs").touch()
    assert os.listdir(tmp_path / "folder") == ["theirs"]
    assert os.listdir(tmp_path) == ["folder"]


def test_files_of_a_folder_follow_the_umask_whatever_library_made_them(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with replace_folder(tmp_path / "folder") as folder:
            os.close(os.open(folder / "private", os.O_CREAT, 0o600))
            os.close(os.open(folder / "script", os.O_CREAT, 0o700))
        replace_file(tmp_path / "file", b"")
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "folder").iterdir()}
    assert modes == {"private": 0o640, "script": 0o740}
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


def test_a_failed_rename_leaves_a_replaced_folder_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "fresh").mkdir()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "old").touch()

    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(atomic, "rename_durably", fail)
    with pytest.raises(OSError):
        move_folder(tmp_path / "fresh", tmp_path / "folder")
    assert os.listdir(tmp_path / "folder") == ["old"]
