"""Files that appear whole or not at all."""

import pytest

from safnet.files import write_text, written_whole


def test_a_file_appears_when_it_is_whole(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with written_whole(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
        assert partial.name.startswith(".")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_nothing_is_left_of_an_error(tmp_path):
    def interrupted(write):
        with written_whole(tmp_path / "a") as partial:
            write(partial)
            raise KeyboardInterrupt

    for write in (lambda p: p.write_text("half"), lambda p: (p.mkdir(), (p / "x").write_text("half")), lambda p: None):
        with pytest.raises(KeyboardInterrupt):
            interrupted(write)
    assert list(tmp_path.iterdir()) == []


def test_two_writers_of_one_file_do_not_meet(tmp_path):
    path = tmp_path / "a.txt"
    with written_whole(path) as one, written_whole(path) as other:
        assert one != other
        one.write_text("one")
        other.write_text("other")
    assert path.read_text() == "one"  # whose block ended last


def test_folders(tmp_path):
    folder = tmp_path / "a"

    def write(text):
        with written_whole(folder) as partial:
            partial.mkdir()
            write_text(partial / "x", text)

    write("first")
    with pytest.raises(OSError, match="a"):
        write("second")
    assert (folder / "x").read_text() == "first"
    assert list(tmp_path.iterdir()) == [folder]
