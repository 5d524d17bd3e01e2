"""PEFT's own tests for our methods, beside the same tests for PEFT's LoRA.

    make peft-suite                                             # a table of passed, failed, excluded; about 30 minutes
    python benchmarks/peft_suite/run.py --columns lora,stella --files test_custom_models.py

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
from typing import Any

HERE = Path(__file__).resolve().parent
FILES = [
    "test_custom_models.py",
    "test_decoder_models.py",
    "test_encoder_decoder_models.py",
    "test_feature_extraction_models.py",
    "test_seq_classifier.py",
    "test_token_classification_qa.py",
    "test_vision_models.py",
    "test_initialization.py",
    "test_low_level_api.py",
    "test_lora_conversion.py",
    "test_torch_compile.py",
]
COLUMNS = ["lora", "cera", "aurora", "aurora-static", "stella", "stella-zero"]
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
    """Run the columns one after another and print the table; the exit status says whether anything failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--columns", default=",".join(COLUMNS), help="comma-separated; default: all")
    parser.add_argument("--files", default=",".join(FILES), help="comma-separated test files; default: all")
    parser.add_argument("--keyword", default="", help="pytest's -k")
    parser.add_argument("--logs", type=Path, help="folder for pytest's output and the results, a file a column")
    options = parser.parse_args()
    columns, files = options.columns.split(","), options.files.split(",")
    for name, known in [*((c, COLUMNS) for c in columns), *((f, FILES) for f in files)]:
        if name not in known:
            parser.error(f"{name!r} is unknown; choose from {', '.join(known)}.")
    with tempfile.TemporaryDirectory(prefix="peft-suite-") as folder:
        place = Path(folder)
        logs = options.logs or place
        logs.mkdir(parents=True, exist_ok=True)
        version = fetch(place)
        results = {name: run(name, files, options.keyword, place, logs) for name in columns}
    print(table(version, results))
    return int(any(result["failed"] for name, result in results.items() if name != "lora"))


def fetch(place: Path) -> str:
    """Put PEFT's tests, what they import and the stand-ins for the hub into a folder; return PEFT's version."""
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
    subprocess.run([sys.executable, "-c", FILL, str(place / "hub")], check=True, env=environment(place, "lora"))
    return version


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
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
    }


def run(column: str, files: list[str], keyword: str, place: Path, logs: Path) -> dict[str, Any]:
    """Run PEFT's test files for one column; return its counts, exclusions and failures."""
    result = logs / f"{column}.json"
    arguments = [f"tests/{name}" for name in files] + (["-k", keyword] if keyword else [])
    with (logs / f"{column}.txt").open("w") as log:
        subprocess.run(
            [sys.executable, "-m", "pytest", *arguments],
            cwd=place,
            env={**environment(place, column), "PEFT_SUITE_RESULT": str(result.resolve())},
            stdout=log,
            stderr=subprocess.STDOUT,
            check=False,
        )
    if not result.exists():
        raise SystemExit(f"{column}: pytest wrote no result.\n" + (logs / f"{column}.txt").read_text()[-3000:])
    read: dict[str, Any] = json.loads(result.read_text())
    print(f"{column}: {read['counts']}", file=sys.stderr)
    return read


def table(version: str, results: dict[str, dict[str, Any]]) -> str:
    """The totals, the exclusions by reason and the failures, in Markdown."""
    lines = [
        f"peft {version}, transformers {importlib.metadata.version('transformers')}, "
        f"torch {importlib.metadata.version('torch')}, Python {sys.version.split()[0]}.",
        "",
        "| method | passed | failed | excluded | skipped by PEFT |",
        "|---|---|---|---|---|",
    ]
    for name, result in results.items():
        counts = result["counts"]
        passed, failed = counts["passed"] + counts["xpassed"], counts["failed"] + counts["error"]
        lines.append(f"| {name} | {passed} | {failed} | {counts['xfailed']} | {counts['skipped']} |")
    lines += ["", "| method | excluded | reason |", "|---|---|---|"]
    for name, result in results.items():
        lines += [f"| {name} | {count} | {reason} |" for reason, count in result["excluded"].items()]
    for name, result in results.items():
        lines += [f"\n{name} failed: `{test}`" for test in result["failed"]]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
