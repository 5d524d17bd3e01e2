"""What a run writes down of where it was made, and folders that are whole or not there."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import Timeout

from beyondlora import run_folder

ALONE = "import run_folder; print(run_folder._commit())"


def test_the_commit_is_the_packages_and_not_that_of_a_repository_it_is_installed_in(tmp_path):
    def git(*words):
        who = ("-c", "user.name=me", "-c", "user.email=me@here")
        return subprocess.run(["git", "-C", tmp_path, *who, *words], capture_output=True, text=True, check=True).stdout

    def commit():
        command = [sys.executable, "-c", ALONE]
        return subprocess.run(command, cwd=tmp_path / "venv", capture_output=True, text=True, check=True).stdout.strip()

    git("init", "--quiet")
    (tmp_path / "venv").mkdir()
    shutil.copy(Path(run_folder.__file__), tmp_path / "venv")
    (tmp_path / ".gitignore").write_text("venv\n__pycache__\n")
    git("add", ".gitignore")
    git("commit", "--quiet", "-m", "mine")
    assert commit() == "None"
    git("add", "--force", "venv/run_folder.py")
    git("commit", "--quiet", "-m", "the package's own")
    assert commit() == git("rev-parse", "HEAD").strip()


def test_of_two_that_write_one_folder_the_second_is_refused_and_the_first_is_whole(tmp_path):
    folder = tmp_path / "export"
    with run_folder.replacing(folder) as partial:
        (partial / "weights").write_text("of the first")
        with pytest.raises(BlockingIOError, match="export: another process is writing"), run_folder.replacing(folder):
            raise AssertionError("the second began")
        (partial / "record").write_text("of the first")
    assert sorted(path.name for path in folder.iterdir()) == ["record", "weights"]
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize("held", [run_folder.replacing, lambda folder: run_folder.alone_in(folder, "run")])
def test_a_lock_that_the_work_itself_does_not_get_is_not_the_folders(held, tmp_path):
    """As that of a cache, of torch's compiler or of the hub."""
    with pytest.raises(Timeout), held(tmp_path / "folder"):
        raise Timeout("cache.lock")
    with held(tmp_path / "folder"):
        pass


def test_what_a_kill_left_of_a_folder_goes_away_with_the_next(tmp_path):
    left = tmp_path / ".export.beyondlora.partial" / "export"
    left.mkdir(parents=True)
    (left / "half").touch()
    with run_folder.replacing(tmp_path / "export") as partial:
        assert list(partial.iterdir()) == []
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_a_folder_that_a_kill_took_between_two_names_is_put_back_before_another_is_made(tmp_path):
    old = tmp_path / ".export.beyondlora.partial" / "export.old"
    old.mkdir(parents=True)
    (old / "weights").touch()
    with pytest.raises(KeyError), run_folder.replacing(tmp_path / "export"):
        raise KeyError
    assert [path.name for path in tmp_path.iterdir()] == ["export"]
    assert (tmp_path / "export" / "weights").exists()


def test_a_link_to_nowhere_is_said_before_the_work(tmp_path):
    (tmp_path / "run").symlink_to("nowhere")
    with pytest.raises(FileExistsError, match="run' is a link to nowhere, which does not exist"):
        run_folder.RunFolder(tmp_path / "run").claim(resume=False, overwrite=False)
    (tmp_path / "nowhere").mkdir()
    run_folder.RunFolder(tmp_path / "run").claim(resume=False, overwrite=False)
