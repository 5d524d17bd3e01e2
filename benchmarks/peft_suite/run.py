"""PEFT's own tests for our methods, beside the same tests for PEFT's LoRA.

    make peft-suite                                             # all of it; about an hour
    python benchmarks/peft_suite/run.py --keep suite --columns lora,stella --files test_custom_models.py   # in pieces
    python benchmarks/peft_suite/run.py --keep suite --columns "" --out docs/results/peft-suite.md         # their page

The installed PEFT's source distribution is fetched from the package index into a temporary folder, with the packages
its tests import; models and data of the hub have local stand-ins (hub.py). Nothing of PEFT's stands in the repository.
"""

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from page import FILES, TITLES, file_of, results_page

HERE = Path(__file__).resolve().parent
NEEDED = ["diffusers", "attrs"]  # imported by the tests, at their head
INI = """[pytest]
addopts = -q --tb=short -p no:cacheprovider -p peft_suite.matrix
markers =
    single_gpu_tests: of PEFT's
    multi_gpu_tests: of PEFT's
    regression: of PEFT's
    bitsandbytes: of PEFT's
"""


def main() -> int:
    """Run the columns one after another and print the page; the exit status says whether anything failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--columns", default=",".join(TITLES), help="comma-separated; default: all")
    parser.add_argument("--files", default=",".join(FILES), help="comma-separated test files; default: all")
    parser.add_argument(
        "--keep", type=Path, help="folder whose fetched tests and earlier results are used and added to"
    )
    parser.add_argument("--out", type=Path, help="write the page here, too")
    options = parser.parse_args()
    columns, files = (list(filter(None, words.split(","))) for words in (options.columns, options.files))
    for name, known in [*((c, list(TITLES)) for c in columns), *((f, FILES) for f in files)]:
        if name not in known:
            parser.error(f"{name!r} is unknown; choose from {', '.join(known)}.")
    with tempfile.TemporaryDirectory(prefix="peft-suite-") as folder:
        place = (options.keep or Path(folder)).resolve()
        if not (place / "hub").exists():
            fetch(place)
        for column in columns:
            run(column, files, place)
        results = {c: json.loads(path.read_text()) for c in TITLES if (path := place / f"{c}.json").exists()}
    page = results_page(results)
    print(page)
    if options.out:
        options.out.write_text(page, encoding="utf-8")
    return int(any(word == "failed" for tests in results.values() for word, _ in tests.values()))


def fetch(place: Path) -> None:
    """Put PEFT's tests, what they import and the stand-ins for the hub into a folder."""
    version = importlib.metadata.version("peft")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    source = ["download", "--no-deps", "--no-binary", "peft", "--dest", str(place), f"peft=={version}"]
    subprocess.run([*pip, *source], check=True)
    with tarfile.open(next(place.glob("peft-*.tar.gz"))) as archive:
        archive.extractall(place, filter="data")
    tests = place / f"peft-{version}" / "tests"
    if not tests.is_dir():
        raise SystemExit(f"The source distribution of peft {version} holds no tests.")
    tests.rename(place / "tests")
    (place / "tests" / "__init__.py").touch()
    (place / "pytest.ini").write_text(INI)
    subprocess.run([*pip, "install", "--no-deps", "--target", str(place / "packages"), *NEEDED], check=True)
    half = place / "hub-unfinished"
    subprocess.run([sys.executable, "-c", FILL, str(half)], check=True, env=environment(place, "lora"))
    half.rename(place / "hub")


FILL = "import sys, pathlib; from peft_suite import hub; hub.fill(pathlib.Path(sys.argv[1]))"


def environment(place: Path, column: str) -> dict[str, str]:
    """One thread, no network, our plugin and the fetched packages on the path."""
    paths = [place, place / "packages", HERE.parent, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "PEFT_SUITE_COLUMN": column,
        "HF_HUB_CACHE": str(place / "hub"),
        "HF_HUB_OFFLINE": "1",
        "PEFT_DEBUG_WITH_TORCH_COMPILE": "1",
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
    }


def run(column: str, files: list[str], place: Path) -> None:
    """Run PEFT's test files for one column and keep what came of each test; earlier results of other files stay."""
    found, log = place / "found.json", place / f"{column}.txt"
    found.unlink(missing_ok=True)
    with log.open("w") as output:
        subprocess.run(
            [sys.executable, "-m", "pytest", *(f"tests/{name}" for name in files)],
            cwd=place,
            env={**environment(place, column), "PEFT_SUITE_RESULT": str(found)},
            stdout=output,
            stderr=subprocess.STDOUT,
            check=False,
        )
    if not found.exists():
        raise SystemExit(f"{column}: pytest wrote no result.\n" + log.read_text()[-3000:])
    kept = place / f"{column}.json"
    before = json.loads(kept.read_text()) if kept.exists() else {}
    others = {test: end for test, end in before.items() if file_of(test) not in files}
    kept.write_text(json.dumps(others | json.loads(found.read_text()), indent=1))


if __name__ == "__main__":
    sys.exit(main())
