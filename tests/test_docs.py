"""The documents do what they say: code blocks run, commands run, links lead somewhere, named tests exist."""

import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import small_models
import yaml
from shared_data import SHARED, needs_shared

from beyondlora.compare.grid import Grid
from beyondlora.export.folder import serving_command
from beyondlora.recipe import Recipe

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]
SHORTENED = ["max_steps=2", "eval_steps=2", "max_train_samples=32", "max_eval_samples=4"]


def blocks(language: str) -> list[tuple[str, str]]:
    """(document and line, text) of every fenced block in a language."""
    found = []
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        for match in re.finditer(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
            line = text[: match.start()].count("\n") + 1
            found.append((f"{document.relative_to(ROOT)}:{line}", match[1]))
    return found


def commands() -> list[tuple[str, str]]:
    """(document, command) of every `$ …` line in a console block, each command once."""
    found = {}
    for place, block in blocks("console"):
        for line in block.splitlines():
            if line.startswith("$ "):
                found.setdefault(line[2:].split("#")[0].strip(), place)
    return [(place, command) for command, place in found.items()]


@pytest.mark.parametrize(("place", "code"), blocks("python"), ids=[place for place, _ in blocks("python")])
def test_python_blocks_run(place, code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, place, "exec"), {"base": small_models.llama(), "__name__": "__main__"})


RECIPES = [text for place, text in blocks("yaml") if place.startswith("docs/recipes.md")]


@pytest.mark.parametrize("text", RECIPES, ids=[text.split("\n")[0] for text in RECIPES])
def test_the_keys_and_values_of_documented_recipes_are_a_recipes(text):
    values = {**yaml.safe_load(RECIPES[0]), **yaml.safe_load(text)}
    (Grid if "grid" in values else Recipe).from_mapping(values)


@pytest.mark.parametrize("command", [c for _, c in commands() if c.startswith("make ")])
def test_make_targets_exist(command):
    subprocess.run(["make", "--dry-run", *shlex.split(command)[1:]], cwd=ROOT, check=True, capture_output=True)


@pytest.mark.parametrize("command", [c for _, c in commands() if c.startswith("pip install")])
def test_what_the_documents_install_is_what_the_package_offers(command):
    offered = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    extras = re.search(r"(?:beyondlora|\.)\[(.*?)\]", command)
    assert extras or "beyondlora" in command
    assert not extras or set(extras[1].split(",")) <= set(offered)


@needs_shared
def test_the_beyondlora_commands_run_in_the_order_of_the_documents(tmp_path):
    """Training commands are shortened to two steps; every other command runs as it stands."""
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    long = ("beyondlora demo", "beyondlora compare")  # tests of their own run these, made smaller
    ran = [command for _, command in commands() if command.startswith("beyondlora ") and not command.startswith(long)]
    assert any(command.startswith("beyondlora train") for command in ran)
    for command in ran:
        words = shlex.split(command)[1:]
        if command.startswith("beyondlora train"):
            words += [word for change in SHORTENED for word in ("--set", change)]
        finished = subprocess.run(
            [sys.executable, "-m", "beyondlora", *words],
            cwd=tmp_path,
            env={
                "PATH": "/usr/bin:/bin",
                "PYTHONPATH": str(ROOT / "src"),
                "BEYONDLORA_SHARED": str(SHARED),
                "HF_HUB_OFFLINE": "1",
                "HOME": str(tmp_path),
            },
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert finished.returncode == 0, f"{command}\n{finished.stdout}\n{finished.stderr}"


def test_the_serving_command_is_the_one_that_export_prints():
    """vLLM itself is no part of the tests; the command is."""
    (printed,) = [command for _, command in commands() if command.startswith("vllm serve")]
    assert printed == serving_command(Path("served/stella"), base_model="BASE", rank=8).replace("BASE", "$BASE")


def test_links_between_documents_lead_somewhere():
    for document in DOCUMENTS:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", document.read_text(encoding="utf-8")):
            assert (document.parent / target).exists(), f"{document.relative_to(ROOT)} links to {target}"


def test_code_and_tests_named_in_the_methods_table_exist():
    text = (ROOT / "docs/methods.md").read_text(encoding="utf-8")
    for test in set(re.findall(r"`(tests/[\w/]+(?:\.py|/))`", text)):
        assert (ROOT / test).exists(), test
    package = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "src/beyondlora").rglob("*.py"))
    for name in set(re.findall(r"`(?:\w+\.)?([A-Za-z_]\w{5,})`", text)) - {"pooled", "per_dim", "leaky_relu"}:
        assert re.search(rf"\b{name}\b", package), f"docs/methods.md names {name}, which is nowhere in the package"


def test_every_decision_is_a_page_with_its_reason():
    pages = sorted((ROOT / "docs/adr").glob("*.md"))
    assert [int(page.name[:4]) for page in pages] == list(range(1, len(pages) + 1))
    for page in pages:
        assert "**Decision.**" in page.read_text(encoding="utf-8"), page.name
        assert "**Why.**" in page.read_text(encoding="utf-8"), page.name
