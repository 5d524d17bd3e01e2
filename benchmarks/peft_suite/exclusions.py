"""What of PEFT's tests contradicts a method by its nature, with the reason. docs/deviations.md holds `table()`.

An exclusion is expected to fail: one that passes is reported as a failure.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Exclusion:
    """Tests that cannot pass.

    Attributes:
        tests: what they are about.
        pattern: a regular expression on the test's id.
        reason: why they cannot pass.
    """

    tests: str
    pattern: str
    reason: str


ATTENTION = Exclusion(
    "`nn.MultiheadAttention`",
    r"MHA |adapter_batches_mha",
    "calls no layer: PEFT's LoRA merges in every forward, a nonlinear core cannot; refused",
)
GROUPS = Exclusion(
    "grouped convolutions",
    r"Groups|divisible_by_groups",
    "no grouped kernel can hold a low-rank update of all channels (PEFT's LoRA cannot merge there); refused",
)
HOTSWAP = Exclusion(
    "hotswapping", r"TestHotSwapping", "PEFT's is open to its LoRA alone; ours is `beyondlora.hotswap_adapter`"
)
MIXED = Exclusion("`PeftMixedModel`", r"test_mixed_model_from_pretrained", "closed to methods from outside; refused")
SUMS = Exclusion(
    "weighted sums",
    r"weighted_combination",
    "ask for LoRA's approximations (svd, ties, ...); `add_weighted_adapter` here is exact, or refuses",
)
PARAMETERS = Exclusion(
    "`target_parameters` of modules that are no experts",
    r"nn\.Parameter|target_param",
    "there is no saying where such a parameter meets its input, which a nonlinear core needs; refused",
)
EVERYWHERE = [ATTENTION, GROUPS, HOTSWAP, MIXED, SUMS, PARAMETERS]

ONLY_EMBEDDING = r"Embedding . transformers Conv1D 2 "  # the one row whose adapter stands beside an embedding alone
REFUSES_TO_MERGE = Exclusion(
    "merging, but beside embeddings",
    rf"^(?!.*{ONLY_EMBEDDING}).*(merg|test_forward_b?float16)",
    "nonlinear in x: no weight equals base + adapter; refused",
)
MERGES_STATICALLY = Exclusion(
    "outputs after merging, but beside embeddings",
    rf"test_(merge_layers(_nan)?|safe_merge|disable_adapters_with_merging)\[(?!{ONLY_EMBEDDING})"
    r"|test_merge_layers_multi|test_multiple_active_adapters_merge_and_unmerge",
    "merging folds the static form, another function than the one trained, and says so",
)
NO_LORA = Exclusion(
    "conversion to LoRA",
    r"TestLoraConversion::test_(fixed_rank_lora|dynamic|rank_higher|converted_lora_(approx|with)|save_as|with_|convert_(float16|.*modules))",
    "nonlinear in x: no LoRA equals it",
)
SATURATED = Exclusion(
    "eight rows of `only_params_are_updated`",
    r"only_params_are_updated\[(Vanilla MLP [1245]|Conv[23]d [12]) ",
    "the test's inputs reach 90: tanh is flat there and every spline has ended, so A has no gradient to move by",
)
FLOAT32 = Exclusion(
    "factors in half precision",
    r"no_autocast_adapter_dtype\[(?!dtype0.*T5)|adapter_dtype_autocast\[\w+-False-dtype[01]|convert_float16_dtype",
    "U and V stay in float32, whatever is asked",
)
ONE_ROW = Exclusion(
    "`only_params_are_updated` on layers with one output",
    r"only_params_are_updated\[(Embedding . transformers Conv1D [13]|Conv1d)",
    "a factor with one row of rank 1 is ±1 and has nowhere to go",
)
NOT_A_NOOP = Exclusion(
    "a fresh adapter that changes nothing: `disable_adapters` of custom models, conversion with `modules_to_save`",
    r"test_disable_adapters(_with_merging)?\[|convert_model_with_modules_to_save",
    'the start is not a no-op (it is one with `init_lora_weights="zero"`)',
)
ONE_RANK = Exclusion(
    "a dynamic rank at conversion",
    r"dynamic_rank_1_lora_config",
    "every layer has exactly the rank r: there is no pattern of ranks to find",
)
SMALL_START = Exclusion(
    "two of conversion to LoRA",
    r"test_converted_lora_(approximates_original_adapter|with_multiple_adapters)",
    "the random start changes outputs by less than they ask (PEFT's own LoRA, too, in the first)",
)
CLOSE_DIRECTIONS = Exclusion(
    "conversion to LoRA, compiled",
    r"TestLoraConversion::test_with_torch_compile",
    "compares singular vectors one by one, and rounding turns those of close singular values; their products agree",
)
STILL_AT_ZERO = Exclusion(
    "ten rows of `only_params_are_updated`",
    r"only_params_are_updated\[(Vanilla MLP [34] |Embedding . transformers Conv1D |Conv1d |Conv2d 2 |Conv3d [12] )",
    "at S = 0 neither U nor V has a gradient, and the test's few steps move them by less than it asks",
)

EXCLUSIONS: dict[str, list[Exclusion]] = {
    "lora": [],
    "cera": [*EVERYWHERE, REFUSES_TO_MERGE, NO_LORA],
    "aurora": [*EVERYWHERE, MERGES_STATICALLY, NO_LORA, SATURATED],
    "aurora-static": [*EVERYWHERE, SMALL_START, CLOSE_DIRECTIONS],
    "stella": [*EVERYWHERE, FLOAT32, ONE_ROW, NOT_A_NOOP, ONE_RANK],
    "stella-zero": [*EVERYWHERE, FLOAT32, ONE_RANK, STILL_AT_ZERO],
}


def table(titles: dict[str, str]) -> str:
    """The list in Markdown: method, tests, reason."""
    columns: dict[Exclusion, list[str]] = {}
    for column, exclusions in EXCLUSIONS.items():
        for exclusion in exclusions:
            columns.setdefault(exclusion, []).append(titles[column])
    lines = ["| method | tests of PEFT | reason |", "|---|---|---|"]
    ours = len(EXCLUSIONS) - 1
    for exclusion, names in columns.items():
        methods = "all of ours" if len(names) == ours else ", ".join(names)
        lines.append(f"| {methods} | {exclusion.tests} | {exclusion.reason} |")
    return "\n".join(lines) + "\n"
