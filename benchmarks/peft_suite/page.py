"""The page of results: totals, the same by family of tests, and why what did not pass or fail did not."""

import importlib.metadata
import os
import platform
from collections import Counter
from datetime import date

TITLES = {
    "lora": "LoRA (PEFT's own)",
    "cera": "CeRA",
    "aurora": "AuroRA",
    "aurora-static": "AuroRA, static",
    "stella": "StelLA",
    "stella-zero": "StelLA, start S = 0",
}
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
WORDS = ["passed", "failed", "excluded", "not run"]
HEAD = """# PEFT's own tests, run for our methods

`make peft-suite`: the tests of the installed PEFT's source distribution, with LoRA's rows of its matrices rewritten for
our methods (`benchmarks/peft_suite`); LoRA's column has the same rows. Models of the hub have randomly initialised
stand-ins of the same architecture. {date}, {machine}; {versions}.

*Excluded* contradicts the method by its nature and fails each time ([deviations.md](../deviations.md)). *Not run* is
skipped by PEFT itself, or needs a download.
"""
Results = dict[str, dict[str, tuple[str, str]]]  # column → test → (word, reason)


def file_of(test: str) -> str:
    """The test file in a pytest id."""
    return test.partition("::")[0].rpartition("/")[2]


def results_page(results: Results) -> str:
    """Everything, in Markdown."""
    parts = [HEAD.format(date=date.today(), machine=_machine(), versions=_versions()), _totals(results)]
    parts += ["## By family of tests\n\nPassed / failed / excluded / not run.\n", _families(results)]
    for word in ("excluded", "not run"):
        parts += [f"## {word.capitalize()}\n", _reasons(results, word)]
    failed = [(c, test) for c, tests in results.items() for test, (word, _) in tests.items() if word == "failed"]
    parts += ["## Failed\n", "\n".join(f"- {TITLES[c]}: `{test}`" for c, test in failed) or "Nothing."]
    return "\n".join(parts) + "\n"


def _totals(results: Results) -> str:
    rows = []
    for column, tests in results.items():
        counts = Counter(word for word, _ in tests.values())
        rows.append([TITLES[column], *(str(counts[word]) for word in WORDS)])
    return _table(["method", *WORDS], rows)


def _families(results: Results) -> str:
    rows = []
    for file in FILES:
        cells = []
        for tests in results.values():
            counts = Counter(word for test, (word, _) in tests.items() if file_of(test) == file)
            cells.append(" / ".join(str(counts[word]) for word in WORDS) if counts else "–")
        rows.append([f"`{file}`", *cells])
    return _table(["tests", *(TITLES[column] for column in results)], rows)


def _reasons(results: Results, word: str) -> str:
    counts = {c: Counter(reason for w, reason in tests.values() if w == word) for c, tests in results.items()}
    reasons = sorted({reason for counted in counts.values() for reason in counted})
    rows = [[reason, *(str(counts[column][reason] or "") for column in results)] for reason in reasons]
    return _table(["reason", *(TITLES[column] for column in results)], rows)


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _machine() -> str:
    return f"{os.cpu_count()} CPU cores ({platform.machine()}), Python {platform.python_version()}"


def _versions() -> str:
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("peft", "transformers", "torch"))
