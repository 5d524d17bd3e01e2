"""What a run writes down of where it was made."""

import shutil
import subprocess
import sys
from pathlib import Path

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
