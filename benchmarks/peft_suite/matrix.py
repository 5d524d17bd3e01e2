"""pytest plugin: PEFT's test matrices, with the rows of LoRA rewritten for the method in $PEFT_SUITE_COLUMN.

PEFT's modules are imported as they are. A parametrised test keeps the rows that LoRA has and that use nothing only LoRA
has, with our config class in LoRA's place. Tests that name LoRA's (or, for the conversion, LoKr's) config in their body
get ours under that name.
"""

import inspect
import json
import os
import re
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig

from . import hub
from .columns import COLUMNS, Column, OnlyLoraError
from .exclusions import EXCLUSIONS

NAME = os.environ["PEFT_SUITE_COLUMN"]
COLUMN: Column = COLUMNS[NAME]

# Classes whose tests make a config in their body: the class of PEFT's that ours stands in for.
STAND_INS = {
    "TestLoraConversion": "LoKrConfig",
    "TestLowLevelFunctional": "LoraConfig",
    "TestInjectAdapterFromStateDict": "LoraConfig",
    "TestPeftStateDict": "LoraConfig",
    "TestGetBaseModelStateDict": "LoraConfig",
    "TestCustomModelConfigWarning": "LoraConfig",
    "TestLowCpuMemUsage": "LoraConfig",
    "TestNamingConflictWarning": "LoraConfig",
    "TestTorchCompileCausalLM": "LoraConfig",
}
# In those classes: tests that spell the parameter names of the other method, or are about an option of LoRA's alone.
ABOUT_OTHERS = re.compile(
    r"\"lora\" in|(?<!init_)lora_(A|B|\"|\.|weight|embedding|head)|\.lokr|\"lokr|target_parameters"
    r"|loraplus|layer_replication|lora_only"
)
NOT_HERE = {  # a pipeline of many parts has no stand-in; the stand-ins' layers are too small for 4-bit kernels on a CPU
    "needs a download": re.compile(r"StableDiffusionPipeline"),
    "needs a CUDA device": re.compile(r"\"cuda\"\)|load_in_4bit"),
}


OURS = pytest.StashKey[list[pytest.Item]]()
STOPPED = "the run was stopped before it"  # Ctrl-C keeps what is done
# pytest's words for the end of a test, and the table's.
OUTCOMES = {
    "passed": "passed",
    "xpassed": "passed",
    "failed": "failed",
    "error": "failed",
    "xfailed": "excluded",
    "skipped": "not run",
}


def pytest_configure(config: pytest.Config) -> None:
    """Put local stand-ins in the place of what PEFT's tests take from the hub."""
    import tests.testing_utils as shared
    import transformers.integrations.peft as integration

    # transformers 5.24 asks for a peft that is not out in add_adapter alone: without its gate the tests run.
    integration.check_peft_version = lambda min_version: None

    shared.hub_online_once = lambda model_id: nullcontext()
    shared.load_dataset_english_quotes = hub.english_quotes
    shared.load_cat_image = hub.cat_image
    with_random_start = shared.set_init_weights_false

    def set_init_weights_false(config_cls: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if config_cls is COLUMN.config_cls:
            return {**kwargs, "init_lora_weights": False}
        return with_random_start(config_cls, kwargs)

    shared.set_init_weights_false = set_init_weights_false
    # Only now, since it takes over what stands in `shared`. Its tests of mixed batches, Conv1D layers and weighted sums
    # skip whatever is not LoRA by name.
    import tests.testing_common as common

    common.LoraConfig = COLUMN.config_cls


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Rewrite a test's matrix before pytest reads it."""
    marks = metafunc.definition.own_markers
    column = COLUMN if metafunc.module.__name__.endswith("custom_models") else replace(COLUMN, largest_rank=None)
    if metafunc.function.__name__ == "test_only_params_are_updated" and NAME != "lora":
        # As it does for two of PEFT's methods: from B = 0 its three steps of SGD hardly move an embedding's A.
        column = replace(column, options={"init_lora_weights": False, **column.options})
    for index, mark in enumerate(marks):
        if mark.name == "parametrize":
            rows = list(mark.args[1])
            if any(_configs(row) for row in rows):
                kept = [new for row in rows if (new := _rewritten_row(row, column)) is not None]
                marks[index] = pytest.mark.parametrize(mark.args[0], kept).mark


def pytest_collection_modifyitems(items: list[pytest.Item], config: pytest.Config) -> None:
    """Keep the tests that are about our method, and mark what it contradicts by its nature."""
    ours = [item for item in items if _is_ours(item)]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(ours)])
    items[:] = config.stash[OURS] = ours
    for item in items:
        for reason, sign in NOT_HERE.items():
            if sign.search(_source(item.function)):
                item.add_marker(pytest.mark.skip(reason=reason))
        for exclusion in EXCLUSIONS[NAME]:
            if re.search(exclusion.pattern, item.nodeid):
                item.add_marker(pytest.mark.xfail(reason=exclusion.reason, strict=True))
                break


@pytest.fixture(autouse=True, scope="class")  # before the classes' own fixtures, which make configs, too
def _stand_in(request: pytest.FixtureRequest) -> Iterator[None]:
    name = STAND_INS.get(getattr(request.cls, "__name__", ""))
    with pytest.MonkeyPatch.context() as patch:
        if name is not None:
            patch.setattr(request.module, name, COLUMN.config)
        elif request.module.__name__.endswith("test_decoder_models"):  # mixed batches skip what is not LoRA by name
            patch.setattr(request.module, "LoraConfig", COLUMN.config_cls)
        yield


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)  # many tests draw weights without a seed of their own


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Write what the runner reads: of every test what came of it and, where it did not pass or fail, why."""
    outcomes = {item.nodeid: ("not run", STOPPED) for item in terminalreporter.config.stash.get(OURS, [])}
    for kind, word in OUTCOMES.items():
        for report in terminalreporter.stats.get(kind, []):
            reason = getattr(report, "wasxfail", "") or (report.longrepr[2] if kind == "skipped" else "")
            reason = re.sub(r"^(reason: |Skipped: )|<class '(\w+\.)*|'>", "", reason)
            outcomes[report.nodeid] = (word, reason.replace(COLUMN.config_cls.__name__, "this method"))
    Path(os.environ["PEFT_SUITE_RESULT"]).write_text(json.dumps(outcomes, indent=1))


def _is_ours(item: pytest.Item) -> bool:
    if "[NOTSET]" in item.nodeid:  # a matrix without a row for us
        return False
    if getattr(item.cls, "__name__", "") in STAND_INS:
        return not (_unusable(item) or ABOUT_OTHERS.search(_source(item.function)))
    values = getattr(item, "callspec", None)
    return values is not None and any(_is_our_config(value) for value in values.params.values())


@cache
def _source(function: Any) -> str:
    return inspect.getsource(function)


def _unusable(item: pytest.Item) -> bool:
    """Tests of a stand-in class that are about another method's config, or skip at once."""
    values = getattr(item, "callspec", None)
    return (
        values is not None
        and any(_configs(value) for value in values.params.values())
        and not any(_is_our_config(value) for value in values.params.values())
    )


def _is_our_config(value: Any) -> bool:
    if isinstance(value, tuple) and len(value) == 2:  # the settings of the tests of torch.compile
        return _is_our_config(value[0])
    return value is COLUMN.config_cls or isinstance(value, COLUMN.config_cls)


def _configs(row: Any) -> list[Any]:
    """The PEFT config classes and instances in a row."""
    values = row.values if hasattr(row, "values") and not isinstance(row, dict) else row
    values = values if isinstance(values, (tuple, list)) else (values,)
    nested = [part for value in values for part in (value if isinstance(value, tuple) else (value,))]
    return [v for v in nested if isinstance(v, PeftConfig) or (isinstance(v, type) and issubclass(v, PeftConfig))]


def _rewritten_row(row: Any, column: Column) -> Any:
    """A row of LoRA for our method; None for rows of other methods, and for what only LoRA has."""
    configs = _configs(row)
    if not configs or not all(config is LoraConfig or type(config) is LoraConfig for config in configs):
        return None
    try:
        if hasattr(row, "values") and not isinstance(row, (dict, LoraConfig)):
            return pytest.param(*[_rewritten(value, column) for value in row.values], marks=row.marks)
        return _rewritten(row, column)
    except OnlyLoraError:
        return None


def _rewritten(value: Any, column: Column) -> Any:
    if value is LoraConfig:
        return column.config_cls
    if isinstance(value, LoraConfig):
        return column.translated(value)
    if isinstance(value, (tuple, list)) and not all(isinstance(part, str) for part in value):
        return type(value)(_rewritten(part, column) for part in value)
    if isinstance(value, dict) and value:
        return column.row_options(value)
    if value == "lora":  # the name of the method in PEFT's words
        return NAME
    return value
