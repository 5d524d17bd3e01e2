"""The documents about PEFT's own suite say what its runner does; the suite itself is `make peft-suite`."""

import re
import runpy
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RUNNER = ROOT / "benchmarks/peft_suite"
PAGE = (ROOT / "docs/results/peft-suite.md").read_text(encoding="utf-8")
exclusions, page = (runpy.run_path(str(RUNNER / name)) for name in ("exclusions.py", "page.py"))


def section(title: str) -> str:
    return re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE)[1]


def test_the_deviations_list_the_exclusions_of_the_runner():
    assert exclusions["table"](page["TITLES"]) in (ROOT / "docs/deviations.md").read_text(encoding="utf-8")


def test_the_results_were_made_with_these_exclusions():
    """Every reason on the page is one of the runner's, and every one of the runner's columns excluded something."""
    head, _, *rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in section("Excluded").split("\n")
        if line.startswith("|")
    ]
    columns = {title: name for name, title in page["TITLES"].items()}
    printed = {
        (columns[title], row[0]) for row in rows for title, count in zip(head[1:], row[1:], strict=True) if count
    }
    expected = {
        (name, exclusion.reason)
        for name in printed_columns(head, columns)
        for exclusion in exclusions["EXCLUSIONS"][name]
    }
    assert printed == expected


def printed_columns(head: list[str], columns: dict[str, str]) -> list[str]:
    return [columns[title] for title in head[1:]]


def test_nothing_of_ours_failed():
    lora = page["TITLES"]["lora"]
    assert [line for line in section("Failed").split("\n") if line.startswith("- ") and lora not in line] == []
