"""A recipe: everything one run needs, in one YAML file.

>>> recipe = Recipe.load("configs/shakespeare-lora.yaml", overrides=["learning_rate=1e-3", "adapter.r=4"])
>>> recipe.replace(seed=1).save("again.yaml")

Field names are TRL's and transformers' wherever those have one; the `adapter:` block is an unmodified
adapter_config.json. Whatever can be checked without the data or the model is checked when a Recipe is made.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

TASKS = ("causal-lm", "sequence-classification", "sequence-regression", "image-classification")
TOLD = ("output_dir", "report_to")  # where a run can be read, and no part of what it is
FEW = 20  # names that an error lists beside the nearest one
EXPLAINED = 'python -c "import beyondlora.recipe as r; help(r.Recipe)"'
METRICS = ("multiple_choice", "multiple_choice_generated", "exact_match")  # and pass@K, see `passes`


@dataclass(kw_only=True)
class Recipe:
    """One run. Relative paths mean relative to the current directory.

    What:
        task: "causal-lm", "sequence-classification", "sequence-regression" or "image-classification".
        model_name_or_path: a local folder, a hub name, "demo" (the small model inside this package), or
            "package:NAME/FOLDER" (a folder inside an installed Python package).
        adapter: the keys of an adapter_config.json; `peft_type` is required, every type PEFT knows is allowed, and
            FULL: every weight is trained, nothing attached (keep dtype: float32, or small steps round to nothing).
        output_dir: the run folder.

    Data:
        dataset_name: a local file (json, jsonl, csv, tsv, txt, each also .gz; parquet), a local folder that holds one
            file a split (train.jsonl, test.jsonl), or a `datasets` hub name. A tsv is read without quoting, as GLUE
            writes it.
        dataset_config: the configuration of a hub data set.
        dataset_train_split: the split to train on, where dataset_name has splits (hub, folder).
        dataset_test_split: the split to evaluate on, there too; None holds out eval_fraction of the training rows.
        eval_dataset_name: a second file, folder or hub name to evaluate on; goes before dataset_test_split.
        eval_fraction: fraction in [0, 1) of the training rows held out where no evaluation data is named; 0 = no
            evaluation. Rows are drawn by split_seed; of a single text, the last part (whole lines) is taken, so that
            nothing leaks.
        split_seed: draws the held-out rows and the samples below. Not `seed`, so that repeated seeds see the same rows.
        max_train_samples, max_eval_samples: use at most so many rows, drawn by split_seed; of packed text, the first
            so many blocks.
        columns: the names of the columns of a csv or tsv without a header line.
        dataset_text_field: causal-lm on plain text: the field with the text (a .txt file has only its text).
        prompt_field, completion_field: causal-lm on pairs: both together; the loss counts the completion and its end
            token only.
        completion_separator: text put between prompt and completion; belongs to the prompt.
        messages_field: causal-lm on conversations: the field with a list of messages, each with role and content (or
            ShareGPT's from and value); the loss counts what the assistant says.
        chat_template_path: a file with the Jinja template that writes them; None = the tokenizer's own.
        sentence1_field, sentence2_field: the one or two texts of a sequence task.
        label_field: the class (a whole number or a name) or, for sequence-regression, a number.
        image_field: the image: encoded bytes as the Image feature of `datasets` stores them, or a path.
        max_length: tokens a row or a block of packed text; None = 512, or what model and tokenizer allow if less.
        image_size: side in pixels that images are resized to; None = the model's own. A vision transformer interpolates
            its position embeddings.

    Figures, beside the loss (of the evaluation rows, measured once, on the weights that are kept):
        metrics: causal-lm on pairs: any of "multiple_choice" (the options of LLM-Adapters' commonsense prompts, by
            likelihood), "multiple_choice_generated" (by the first option that the model writes), "exact_match" (GSM8K,
            MATH and their like, by math-verify, with "exact_match_strict" beside it) and "pass@K" (one of K answers is
            right, estimated without bias from num_return_sequences of them).
        answer_field: the right option or the solution; None = completion_field.
        max_new_tokens: the longest answer that is generated; a prompt that leaves less of max_length loses its start.
        num_return_sequences: answers generated a row; more than one needs a temperature.
        temperature: 0 = greedy; above it answers are drawn from the model's whole distribution.
        forgetting_dataset_name: causal-lm: a second corpus, read as plain text; its loss under the base model and after
            training.
        lm_eval_tasks: causal-lm: tasks, groups or tags of lm-evaluation-harness, by its names; max_eval_samples is its
            limit, the first so many rows of each task.
        lm_eval_include_path: a folder with tasks of your own, in the harness's YAML.

    Training (transformers' names and meanings; the defaults, too, except learning_rate and the three intervals):
        learning_rate: the peak; > 0.
        per_device_train_batch_size, per_device_eval_batch_size: rows a device a step.
        num_train_epochs: passes over the training rows; may be a fraction. Not used where max_steps is positive.
        max_steps: optimizer steps; -1 = by num_train_epochs.
        gradient_accumulation_steps: batches an optimizer step.
        gradient_checkpointing: recompute activations in the backward pass, to save memory.
        lr_scheduler_type: "linear", "cosine", "constant", "constant_with_warmup", ...
        warmup_steps, warmup_ratio: length of the warm-up, in optimizer steps or as a fraction of them; give one.
        weight_decay: decoupled weight decay of AdamW, >= 0.
        max_grad_norm: gradients are clipped to this norm; 0 = no clipping.
        optim: transformers' name of the optimizer.
        dtype: "float32" or "bfloat16", of the base model's weights.
        load_in_8bit, load_in_4bit: causal-lm: hold the base model's linear layers in so many bits, by bitsandbytes (4:
            NF4, its scales quantised too, as in QLoRA), and compute in dtype. Not with FULL, nor with weights that are
            cut over processes.
        bf16: compute in bfloat16 (autocast) whatever the weights are stored in.
        seed: initialisation, data order, dropout.
        logging_steps, eval_steps, save_steps: optimizer steps between lines of metrics, evaluations, checkpoints.
        dataloader_num_workers: worker processes that prepare batches; 0 = the training process itself.
        report_to: experiment trackers that are told losses and evaluations as they come, a name or a list of them:
            "tensorboard", "wandb", "mlflow", "trackio", ... as transformers calls them, or "all" that are installed;
            None = none. Like output_dir no part of what a run is: it may change with --resume.
    """

    task: str
    model_name_or_path: str
    adapter: dict[str, Any]
    output_dir: str

    dataset_name: str
    dataset_config: str | None = None
    dataset_train_split: str = "train"
    dataset_test_split: str | None = None
    eval_dataset_name: str | None = None
    eval_fraction: float = 0.1
    split_seed: int = 0
    max_train_samples: int | None = None
    max_eval_samples: int | None = None
    columns: list[str] | None = None
    dataset_text_field: str = "text"
    prompt_field: str | None = None
    completion_field: str | None = None
    completion_separator: str = ""
    messages_field: str | None = None
    chat_template_path: str | None = None
    sentence1_field: str = "sentence1"
    sentence2_field: str | None = None
    label_field: str = "label"
    image_field: str = "image"
    max_length: int | None = None
    image_size: int | None = None

    metrics: list[str] | None = None
    answer_field: str | None = None
    max_new_tokens: int = 256
    num_return_sequences: int = 1
    temperature: float = 0.0
    forgetting_dataset_name: str | None = None
    lm_eval_tasks: list[str] | None = None
    lm_eval_include_path: str | None = None

    learning_rate: float = 3e-4
    per_device_train_batch_size: int = 8
    per_device_eval_batch_size: int = 8
    num_train_epochs: float = 3.0
    max_steps: int = -1
    gradient_accumulation_steps: int = 1
    gradient_checkpointing: bool = False
    lr_scheduler_type: str = "linear"
    warmup_steps: int = 0
    warmup_ratio: float = 0.0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    optim: str = "adamw_torch_fused"
    dtype: Literal["float32", "bfloat16"] = "float32"
    load_in_8bit: bool = False
    load_in_4bit: bool = False
    bf16: bool = False
    seed: int = 42
    logging_steps: int = 10
    eval_steps: int = 100
    save_steps: int = 100
    dataloader_num_workers: int = 0
    report_to: list[str] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.report_to, str):  # transformers takes one name, too
            self.report_to = [self.report_to]
        if self.report_to == ["none"]:
            self.report_to = None
        for name, annotation in _annotations().items():
            setattr(self, name, _coerce(name, getattr(self, name), annotation))
        _check_values(self)

    @property
    def bits(self) -> int | None:
        """Of the base model's linear layers, where bitsandbytes holds them."""
        return 8 if self.load_in_8bit else 4 if self.load_in_4bit else None

    @classmethod
    def load(cls, path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
        """Read a YAML file, change what `overrides` says, expand `${NAME}` and `${NAME:-default}`, check.

        Args:
            path: the file.
            overrides: `key=value`, the value in YAML; `adapter.key=value` changes one key of the adapter block and
                `adapter={peft_type: LORA, r: 8}` replaces the block.
        Raises: FileNotFoundError, ValueError.
        """
        return load(Path(path), overrides, cls.from_mapping)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Recipe:
        """A recipe from a mapping of its fields. Raises: ValueError for unknown, missing and wrong ones."""
        _check_keys(values)
        return cls(**values)

    def to_yaml(self) -> str:
        """Every field, in the order of the class, with environment variables already expanded."""
        return yaml.dump(dataclasses.asdict(self), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)

    def save(self, path: str | Path) -> None:
        """Write `to_yaml()` to `path`; a reader sees the old file or the whole new one."""
        path = Path(path)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            temporary.write_text(self.to_yaml(), encoding="utf-8")
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    @property
    def evaluates(self) -> bool:
        """Whether there are rows to evaluate on."""
        return bool(self.eval_fraction or self.eval_dataset_name or self.dataset_test_split)

    @property
    def asks(self) -> bool:
        """Whether the model answers anything, beside the loss that its rows have."""
        return bool(self.metrics or self.lm_eval_tasks)

    def replace(self, **changes: Any) -> Recipe:
        """A copy with some fields changed, checked again."""
        return Recipe.from_mapping({**_as_mapping(self), **changes})

    def differences(self, other: Recipe) -> dict[str, tuple[Any, Any]]:
        """The fields in which the runs of two recipes differ: name -> (mine, the other's).

        Not where they write and whom they tell (TOLD).
        """
        mine, theirs = _as_mapping(self), _as_mapping(other)
        return {name: (mine[name], theirs[name]) for name in mine if name not in TOLD and mine[name] != theirs[name]}


def _as_mapping(recipe: Recipe) -> dict[str, Any]:
    return {field.name: getattr(recipe, field.name) for field in dataclasses.fields(recipe)}


# -------------------------------------------------------------------------------------------------------------- checks


def _annotations() -> dict[str, Any]:
    return typing.get_type_hints(Recipe)


def _check_keys(values: Mapping[str, Any]) -> None:
    known = [field.name for field in dataclasses.fields(Recipe)]
    for key in values:
        if key not in known:
            near = _near(str(key), known)
            advice = f"did you mean {near!r}?" if near else f"those it has: {EXPLAINED}. A method's stand under adapter"
            raise ValueError(f"{key!r} is not a key of a recipe; {advice}")
    required = [field.name for field in dataclasses.fields(Recipe) if field.default is dataclasses.MISSING]
    missing = [name for name in required if name not in values]
    if missing:
        raise ValueError(f"these required keys are missing: {', '.join(missing)}")


def nearest(word: str, known: Sequence[str]) -> str:
    """Advice for a misspelt word: the nearest known one, and all of them where they are few or none is near."""
    near, listed = _near(word, known), ", ".join(known)
    if near is None:
        return f"choose from {listed}"
    return f"did you mean {near!r}?" + (f" (known: {listed})" if len(known) <= FEW else "")


def _near(word: str, known: Sequence[str]) -> str | None:
    """The first name that a word is a part of (adamw of adamw_torch), else what is spelled most like it."""
    whole = [name for name in known if len(word) > 2 and word in name]
    return next(iter(whole or difflib.get_close_matches(word, known, n=1, cutoff=0.5)), None)


def warmup_problem(recipe: Recipe, steps: int) -> str | None:
    """What to say of a warm-up that a run of so many optimizer steps does not get through; None where it does."""
    if recipe.warmup_steps < steps or recipe.lr_scheduler_type == "constant":
        return None
    return (
        f"warmup_steps={recipe.warmup_steps} in a run of {steps}: the learning rate stays below "
        f"{recipe.learning_rate:g} to the end. Make it smaller, or the run longer."
    )


def _check_values(recipe: Recipe) -> None:
    _check_ranges(recipe)
    if recipe.task not in TASKS:
        raise ValueError(f"task={recipe.task!r} is unknown; {nearest(recipe.task, TASKS)}")
    peft_type = recipe.adapter.get("peft_type")
    if not isinstance(peft_type, str) or not peft_type:
        raise ValueError(
            f"adapter={recipe.adapter!r} names no method; give it a peft_type, "
            "for example adapter: {peft_type: LORA, r: 8, target_modules: all-linear}"
        )
    if (recipe.prompt_field is None) != (recipe.completion_field is None):
        raise ValueError("prompt_field and completion_field belong together: give both, or neither for plain text")
    if recipe.messages_field is not None and (recipe.prompt_field is not None or recipe.task != "causal-lm"):
        raise ValueError("messages_field is for task: causal-lm, without prompt_field and completion_field")
    if recipe.chat_template_path is not None and recipe.messages_field is None:
        raise ValueError("chat_template_path writes conversations; name their field with messages_field")
    _check_bits(recipe)
    if recipe.warmup_steps and recipe.warmup_ratio:
        raise ValueError("warmup_steps and warmup_ratio say the same thing in two units; give one of them")
    if recipe.columns is not None and len(set(recipe.columns)) != len(recipe.columns):
        raise ValueError(f"columns={recipe.columns!r} holds a name twice; the fields of a row need distinct names")
    for name in ("model_name_or_path", "dataset_name", "output_dir"):
        if not getattr(recipe, name).strip():
            raise ValueError(f"{name} is empty")
    _check_metrics(recipe)


def _check_bits(recipe: Recipe) -> None:
    if recipe.load_in_8bit and recipe.load_in_4bit:
        raise ValueError("load_in_8bit and load_in_4bit are two forms of the same weights; choose one")
    if recipe.bits is not None and recipe.task != "causal-lm":
        raise ValueError(f"load_in_{recipe.bits}bit is for task: causal-lm; a head for {recipe.task} trains in full")
    if recipe.bits is not None and recipe.adapter.get("peft_type") == "FULL":
        raise ValueError(
            f"load_in_{recipe.bits}bit holds weights that cannot be trained, and peft_type FULL trains them"
        )


def _check_metrics(recipe: Recipe) -> None:
    for name in recipe.metrics or ():
        if name not in METRICS and not passes(name):
            raise ValueError(f"metrics: {name!r} is unknown; {nearest(name, [*METRICS, 'pass@K'])}")
        if passes(name) > recipe.num_return_sequences:
            raise ValueError(
                f"metrics: {name} asks whether one of {passes(name)} answers is right, but num_return_sequences is "
                f"{recipe.num_return_sequences}; raise it, and give a temperature"
            )
    if recipe.metrics and recipe.messages_field is not None:
        raise ValueError(
            f"metrics={recipe.metrics!r} with messages_field: a conversation does not say which of its turns is the "
            "question, so of conversations there is the loss alone. Leave metrics out, or put question and answer into "
            "two fields and give prompt_field and completion_field without messages_field; then the model is asked "
            "without its chat template"
        )
    if recipe.metrics and recipe.prompt_field is None:
        raise ValueError(
            f"metrics={recipe.metrics!r} need task: causal-lm with a prompt_field and a completion_field: what is "
            "asked, and what would be right"
        )
    if recipe.forgetting_dataset_name is not None and recipe.task != "causal-lm":
        raise ValueError(f"forgetting_dataset_name is for task: causal-lm, a loss on text; the task is {recipe.task}")
    if recipe.lm_eval_tasks and recipe.task != "causal-lm":
        raise ValueError(f"lm_eval_tasks are for task: causal-lm, questions about text; the task is {recipe.task}")
    asked = [name for name in ("metrics", "forgetting_dataset_name", "lm_eval_tasks") if getattr(recipe, name)]
    if asked and not recipe.evaluates:
        raise ValueError(
            f"{' and '.join(asked)}: measured beside the evaluation rows, and eval_fraction is 0; hold some out, or "
            "name eval_dataset_name"
        )
    if recipe.num_return_sequences > 1 and recipe.temperature == 0:
        raise ValueError(
            f"num_return_sequences={recipe.num_return_sequences} greedy answers would all be the same; give a "
            "temperature, such as 0.8"
        )


def passes(metric: str) -> int:
    """K of a metric "pass@K"; 0 for any other."""
    found = re.fullmatch(r"pass@([1-9][0-9]*)", metric)
    return int(found[1]) if found else 0


_RANGES: dict[str, tuple[str, typing.Callable[[Any], bool]]] = {
    "greater than 0": (
        "learning_rate num_train_epochs per_device_train_batch_size per_device_eval_batch_size "
        "gradient_accumulation_steps logging_steps eval_steps save_steps max_train_samples max_eval_samples image_size "
        "max_new_tokens num_return_sequences",
        lambda value: value > 0,
    ),
    "at least 0": (
        "warmup_steps weight_decay max_grad_norm dataloader_num_workers seed split_seed temperature",
        lambda value: value >= 0,
    ),
    "at least 2 tokens": ("max_length", lambda value: value >= 2),
    "at least 0 and less than 1": ("eval_fraction warmup_ratio", lambda value: 0 <= value < 1),
    "greater than 0, or -1 to train for num_train_epochs": ("max_steps", lambda value: value > 0 or value == -1),
    "below 2**32": ("seed split_seed", lambda value: value < 2**32),
}


def _check_ranges(recipe: Recipe) -> None:
    for wanted, (names, holds) in _RANGES.items():
        for name in names.split():
            value = getattr(recipe, name)
            if value is not None and not holds(value):
                raise ValueError(f"{name}={value!r} cannot work; it must be {wanted}")


# --------------------------------------------------------------------------------------------------------------- types


def _coerce(key: str, value: Any, annotation: Any) -> Any:
    """`value` as the type of a field, or an error that says what was expected."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return None if value is None else _coerce(key, value, arguments[0])
    if origin is Literal:
        if value not in arguments:
            raise ValueError(f"{key}={value!r} is unknown; {nearest(str(value), arguments)}")
        return value
    if origin is list:
        if not isinstance(value, list):
            raise _wrong_type(key, value, "a list")
        return [_coerce(f"{key}[{i}]", entry, arguments[0]) for i, entry in enumerate(value)]
    if origin is dict:
        if not isinstance(value, dict):
            raise _wrong_type(key, value, "a mapping such as {peft_type: LORA, r: 8}")
        return dict(value)
    return _SCALARS[annotation](key, value)


def _to_str(key: str, value: Any) -> str:
    if not isinstance(value, str):
        raise _wrong_type(key, value, "text (put it in quotes)")
    return value


def _to_bool(key: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise _wrong_type(key, value, "true or false")
    return value


def _to_int(key: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise _wrong_type(key, value, "a whole number, written without a point or exponent")
    return value


def _to_float(key: str, value: Any) -> float:
    if isinstance(value, str) and _FLOAT.fullmatch(value):
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise _wrong_type(key, value, "a finite number")
    return float(value)


_SCALARS: dict[Any, typing.Callable[[str, Any], Any]] = {str: _to_str, bool: _to_bool, int: _to_int, float: _to_float}


def _wrong_type(key: str, value: Any, expected: str) -> ValueError:
    hint = " (YAML's word for None is null)" if value == "None" else ""
    given = "nothing" if value is None else type(value).__name__
    return ValueError(f"{key}={value!r} is {given}; expected {expected}{hint}")


# ---------------------------------------------------------------------------------------------------------------- YAML
# PyYAML reads YAML 1.1, where `1e-3` is text, `yes` is true, `010` is 8 and `1:30` is 90. These two classes know the
# scalars of YAML 1.2's core schema instead, so that a recipe means what it looks like.

_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?")
_SCHEMA = (
    ("tag:yaml.org,2002:null", re.compile(r"(?:~|null|Null|NULL|)$"), "~nN\0"),
    ("tag:yaml.org,2002:bool", re.compile(r"(?:true|True|TRUE|false|False|FALSE)$"), "tTfF"),
    ("tag:yaml.org,2002:int", re.compile(r"[-+]?[0-9]+$"), "-+0123456789"),
    (
        "tag:yaml.org,2002:float",
        re.compile(_FLOAT.pattern + r"$|[-+]?\.(?:inf|Inf|INF)$|\.(?:nan|NaN|NAN)$"),
        "-+.0123456789",
    ),
)
_RESOLVERS: dict[str, list[tuple[str, re.Pattern[str]]]] = {}
for _tag, _pattern, _first_characters in _SCHEMA:
    for _character in _first_characters:
        _RESOLVERS.setdefault(_character.replace("\0", ""), []).append((_tag, _pattern))


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = _RESOLVERS

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for i, key in enumerate(keys):
            if any(key.value == earlier.value for earlier in keys[:i]):
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} stands twice", key.start_mark
                )
        return super().construct_mapping(node, deep=deep)

    def construct_int(self, node: yaml.ScalarNode) -> int:
        return int(self.construct_scalar(node))


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_int)


class _Dumper(yaml.SafeDumper):
    # Quotes what either version would misread.
    yaml_implicit_resolvers = {  # noqa: RUF012
        character: _RESOLVERS.get(character, []) + yaml.SafeDumper.yaml_implicit_resolvers.get(character, [])
        for character in {*_RESOLVERS, *yaml.SafeDumper.yaml_implicit_resolvers}
    }

    def ignore_aliases(self, data: Any) -> bool:
        return True


T = TypeVar("T")


def load(path: Path, overrides: Iterable[str], make: Callable[[dict[str, Any]], T]) -> T:
    """Read a YAML file, apply `key=value` changes, expand variables, make something of it; errors name the file."""
    values, overrides = read_yaml(path), list(overrides)
    for override in overrides:
        apply_override(values, override)
    try:
        return make(expand(values, key=""))
    except ValueError as error:
        changed = f", with --set {', '.join(overrides)}" if overrides else ""
        raise ValueError(f"{path}{changed}: {error}") from None


def read_yaml(path: Path) -> dict[str, Any]:
    """A mapping from a file, with YAML 1.2's scalars. Raises: FileNotFoundError, ValueError."""
    if not path.is_file():
        what = "is a folder, not a file" if path.is_dir() else "does not exist"
        raise FileNotFoundError(f"{path} {what}; relative paths start from {Path.cwd()}")
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}, line {line}: byte {raw[error.start]:#04x} is not UTF-8; save the file as UTF-8"
        ) from None
    values = _parse(text, str(path))
    if not isinstance(values, dict):
        what = "is empty" if values is None else f"holds a {type(values).__name__}"
        raise ValueError(f"{path} {what}; expected a YAML mapping, one `key: value` a line")
    return values


def _parse(text: str, source: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ValueError(f"{source}, line {line}: not valid YAML: {error.problem or error.context}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{source}: not valid YAML: {error}") from None


def apply_override(values: dict[str, Any], override: str) -> None:
    """Change what one `--set key=value` says. Raises: ValueError."""
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not key:
        raise ValueError(f"--set {override!r} is not of the form key=value, such as learning_rate=1e-3 or adapter.r=4")
    value = _parse(text, f"--set {override}")
    block, dot, inner = key.partition(".")
    if not dot:
        adapter = values.get("adapter")
        if isinstance(adapter, dict) and key in adapter and key not in _annotations():
            raise ValueError(f"--set {override!r}: {key} is a key of the adapter block; write adapter.{override}")
        values[key] = value
        return
    if block != "adapter" or not inner:
        raise ValueError(
            f"--set {override!r}: a key inside a block can be set in the adapter block, as adapter.KEY=VALUE; change "
            "others in the file"
        )
    if not isinstance(values.get(block), dict):
        raise ValueError(f"--set {override!r}: the recipe has no adapter block to change")
    values[block] = {**values[block], inner: value}


_VARIABLE = re.compile(r"\$\{(?P<name>[A-Za-z_][A-Za-z0-9_]*)(?::-(?P<default>[^}]*))?\}")


def expand(value: Any, key: str) -> Any:
    """`value` with the environment variables in its strings expanded, at any depth."""
    if isinstance(value, dict):
        return {name: expand(entry, f"{key}.{name}" if key else str(name)) for name, entry in value.items()}
    if isinstance(value, list):
        return [expand(entry, f"{key}[{i}]") for i, entry in enumerate(value)]
    return _expand_text(value, key) if isinstance(value, str) else value


def _expand_text(text: str, key: str) -> str:
    def look_up(match: re.Match[str]) -> str:
        name, default = match["name"], match["default"]
        # As in a shell, ":-" also stands in for a variable that is set but empty.
        found = os.environ.get(name, "") or default if default is not None else os.environ.get(name)
        if found is None:
            raise ValueError(
                f"{key}={text!r} needs the environment variable {name}, which is not set; "
                f"set it, or give a default: ${{{name}:-default}}"
            )
        return found

    expanded = _VARIABLE.sub(look_up, text)
    if "${" in _VARIABLE.sub("", text):
        raise ValueError(f"{key}={text!r} holds a '${{' that is neither ${{NAME}} nor ${{NAME:-default}}")
    return expanded
