import pytest

from sa2va_i.files import read_json, staged_folder, write_json


def test_appears_whole(tmp_path):
    with staged_folder(tmp_path / "deep" / "out") as folder:
        (folder / "a.txt").write_text("a")
        assert not (tmp_path / "deep" / "out").exists()
    assert [file.name for file in (tmp_path / "deep" / "out").iterdir()] == ["a.txt"]
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["out"]


def test_or_not_at_all(tmp_path):
    with pytest.raises(KeyboardInterrupt), staged_folder(tmp_path / "out") as folder:
        (folder / "a.txt").write_text("a")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_may_be_there(tmp_path):
    (tmp_path / "out").mkdir()
    with staged_folder(tmp_path / "out") as folder:
        (folder / "a.txt").write_text("a")
    assert (tmp_path / "out" / "a.txt").is_file()


@pytest.mark.parametrize("is_folder", [True, False])
def test_nothing_is_replaced(tmp_path, is_folder):
    if is_folder:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine.txt").write_text("mine")
    else:
        (tmp_path / "out").write_text("mine")
    with pytest.raises(FileExistsError, match="out exists already"), staged_folder(tmp_path / "out"):
        pytest.fail("the block was entered")


def test_json(tmp_path):
    write_json(tmp_path / "a.json", {"text": "犬"})
    assert read_json(tmp_path / "a.json") == {"text": "犬"}
