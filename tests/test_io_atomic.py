"""Files appear whole or not at all."""

import errno

import pytest

from verglas.errors import OutputError
from verglas.io.atomic import atomic_path


def test_file_takes_its_name_on_success(tmp_path):
    target = tmp_path / "a.txt"
    with atomic_path(target) as temporary:
        temporary.write_text("new")
        assert not target.exists()
        assert temporary.suffix == ".txt"
    assert target.read_text() == "new"
    assert list(tmp_path.iterdir()) == [target]


def test_error_leaves_nothing_behind(tmp_path):
    with pytest.raises(KeyboardInterrupt), atomic_path(tmp_path / "a.txt") as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_error_keeps_the_old_file(tmp_path):
    target = tmp_path / "a.txt"
    target.write_text("old")
    with pytest.raises(ValueError), atomic_path(target, overwrite=True) as temporary:
        temporary.write_text("half")
        raise ValueError
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_existing_file_needs_overwrite(tmp_path):
    target = tmp_path / "a.txt"
    target.write_text("old")
    with pytest.raises(OutputError, match="exists already"), atomic_path(target):
        raise AssertionError("the body must not run")
    with atomic_path(target, overwrite=True) as temporary:
        temporary.write_text("new")
    assert target.read_text() == "new"


@pytest.mark.parametrize(("number", "text"), [(errno.ENOSPC, "disk is full"), (errno.EACCES, "no permission")])
def test_system_errors_become_one_clear_paragraph(tmp_path, number, text):
    with pytest.raises(OutputError, match=text), atomic_path(tmp_path / "a.txt") as temporary:
        temporary.write_text("half")
        raise OSError(number, "as the system says it")
    assert list(tmp_path.iterdir()) == []


def test_missing_folder_is_said(tmp_path):
    with pytest.raises(OutputError, match="is not a folder"), atomic_path(tmp_path / "no" / "a.txt"):
        raise AssertionError("the body must not run")
