"""Text for the demo: the source code of standard-library modules, which every Python carries.

The base model has read the library's docstrings. They are cut out here: nothing it is measured on was read before.
"""

import ast
import sysconfig
from collections.abc import Iterable, Mapping
from pathlib import Path

from ..run_folder import write_text


def write_corpus(folder: Path, modules: Mapping[str, Iterable[str]], *, max_bytes: int) -> dict[str, Path]:
    """Write one text file a split.

    Args:
        folder: where FOLDER/<split>.txt goes.
        modules: split -> module names; those that this Python has not are left out.
        max_bytes: of each module's source, so that none outweighs the others.
    Raises: FileNotFoundError where a split has no module at all.
    """
    files = {}
    for split, names in modules.items():
        sources = [source for name in names if (source := module_source(name)) is not None]
        if not sources:
            raise FileNotFoundError(
                f"None of the modules {', '.join(names)} has its source in {sysconfig.get_paths()['stdlib']}: "
                "this Python comes without the source of its standard library, which the demo is about."
            )
        files[split] = folder / f"{split}.txt"
        write_text(files[split], "\n".join(source[:max_bytes] for source in sources))
    return files


def module_source(name: str) -> str | None:
    """Return the code of a standard-library module without its docstrings, or None if it has no source here."""
    place = Path(sysconfig.get_paths()["stdlib"], *name.split("."))
    for path in (place.with_suffix(".py"), place / "__init__.py"):
        if path.is_file():
            return without_docstrings(path.read_text(encoding="utf-8"))
    return None


def without_docstrings(source: str) -> str:
    """Cut the lines of every docstring out of a module's source."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    dropped: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None:
            docstring = node.body[0]
            dropped.update(range(docstring.lineno, (docstring.end_lineno or docstring.lineno) + 1))
    # Python ends lines at \n only; str.splitlines would also cut at form feeds and shift the count.
    return "\n".join(line for number, line in enumerate(source.split("\n"), start=1) if number not in dropped)
