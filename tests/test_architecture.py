"""The structure, held: which way imports go, where methods are named, and that the README shows the tree on disk."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "beyondlora"

# A module imports from lower levels and from its own room only. Leaves import nothing of ours.
LEVELS = {
    "manifold": 1,
    "workers": 1,
    "measure": 1,
    "figures": 2,
    "adapters": 2,
    "tuner": 3,
    "attach": 4,
    "axolotl": 5,
    "evaluate": 5,
    "train": 6,
    "analyse": 6,
    "export": 6,
    "foreign": 6,
    "demo": 7,
    "doctor": 7,
    "compare": 8,
    "cli": 9,
    "__main__": 10,
}
LEAVES = {
    "precise",
    "padding",
    "targets",
    "recipe",
    "models",
    "data",
    "interrupts",
    "progress",
    "curves",
    "run_folder",
    "processes",
    "chatter",
}
HELPERS = {"recorder": "train", "tables": "cli"}  # parts of a room that stand beside it
METHOD_HOMES = {"adapters/cera.py", "adapters/aurora.py", "adapters/stella.py", "adapters/__init__.py"}
METHOD_HOMES |= {"tuner/methods.py", "__init__.py"}


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def room(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def our_imports(path: Path) -> set[str]:
    """The rooms a file imports from, at any depth of its code."""
    rooms = set()
    package = ["beyondlora", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            stem = package[: len(package) - node.level + 1] + (node.module.split(".") if node.module else [])
        elif isinstance(node, ast.ImportFrom) and node.module:
            stem = node.module.split(".")
        elif isinstance(node, ast.Import):
            rooms |= {
                (*alias.name.split("."), "__init__")[1] for alias in node.names if alias.name.startswith("beyondlora")
            }
            continue
        else:
            continue
        if stem[0] == "beyondlora":
            rooms |= {stem[1]} if len(stem) > 1 else {alias.name for alias in node.names}
    return {name for name in rooms if (PACKAGE / name).exists() or (PACKAGE / f"{name}.py").exists()}


def level(name: str) -> int:
    return 0 if name in LEAVES else LEVELS[HELPERS.get(name, name)]


def test_every_room_has_a_level():
    assert {room(path) for path in sources()} - {"__init__"} == LEAVES | set(LEVELS) | set(HELPERS)


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_one_way(path):
    if room(path) == "__init__":
        return  # it names what others define, and imports it when asked
    for imported in our_imports(path) - {room(path)}:
        same_room = HELPERS.get(imported, imported) == HELPERS.get(room(path), room(path))
        assert same_room or level(imported) < level(room(path)), f"{path.name} must not import {imported}"


def imported_packages(path: Path) -> set[str]:
    packages = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            packages |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            packages.add(node.module.split(".")[0])
    return packages


def test_the_maths_needs_torch_and_nothing_else():
    import sys

    for path in [*PACKAGE.glob("manifold/*.py"), *PACKAGE.glob("adapters/*.py")]:
        assert imported_packages(path) - set(sys.stdlib_module_names) <= {"torch"}, path


def test_only_the_glue_subclasses_peft_and_only_register_touches_its_private_state():
    for path in sources():
        text = path.read_text(encoding="utf-8")
        if room(path) != "tuner":
            assert not re.search(r"class \w+\(.*\b(BaseTuner|BaseTunerLayer|PeftConfig|PeftModel)\b", text), path
        if path.name != "register.py":
            assert not re.search(r"_member_map_|_member_names_|register_peft_method", text), path


def test_methods_are_named_only_at_home():
    for path in sources():
        if str(path.relative_to(PACKAGE)) not in METHOD_HOMES:
            named = re.findall(r"\w*(?:cera|aurora|stella)\w*", path.read_text(encoding="utf-8"), re.IGNORECASE)
            assert not named, f"{path.relative_to(ROOT)} names a method: {named}"


@pytest.mark.parametrize("name", ["utils.py", "core.py", "common.py", "base.py", "helpers.py", "misc.py"])
def test_no_file_is_called_nothing(name):
    assert not list(PACKAGE.rglob(name))


def readme_tree() -> dict[str, str]:
    """Path → description of every line of the README's tree."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = re.search(r"```text\n(beyondlora/\n.*?)```", text, re.DOTALL)
    assert block, "the README holds the tree in a ```text block that starts with beyondlora/"
    paths, parents = {}, []
    for line in block.group(1).splitlines()[1:]:
        match = re.match(r"( *)(\S+)\s*(.*)", line)
        assert match, line
        depth = len(match[1]) // 2
        parents = [*parents[: depth - 1], match[2]]
        paths["".join(parents)] = match[3]
    return paths


def test_the_readmes_tree_is_the_tree_on_disk():
    tree = readme_tree()
    for path, description in tree.items():
        assert (ROOT / path).exists(), f"{path} stands in the README and not on disk"
        assert path.endswith("/") == (ROOT / path).is_dir(), path
        assert description, f"{path} needs a word on what it is"
    for path in sources():
        if path.name not in ("__init__.py", "__main__.py"):
            assert str(path.relative_to(ROOT)) in tree, f"{path.relative_to(ROOT)} is missing in the README's tree"
