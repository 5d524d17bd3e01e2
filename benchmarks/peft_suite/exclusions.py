"""What of PEFT's tests contradicts a method by its nature, with the reason; docs/deviations.md has the same reasons.

An exclusion is expected to fail, and is reported as a failure if it passes, unless `may_pass` says why it can.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Exclusion:
    """Tests that cannot pass.

    Attributes:
        pattern: a regular expression on the test's id.
        reason: why.
        may_pass: some tests of the pattern can pass.
    """

    pattern: str
    reason: str
    may_pass: bool = False


EVERYWHERE = [
    Exclusion(
        r"MHA |adapter_batches_mha",
        "nn.MultiheadAttention calls no layer; PEFT's LoRA merges in every forward, we refuse",
    ),
    Exclusion(r"Groups|divisible_by_groups", "no grouped kernel can hold a low-rank update of all channels; we refuse"),
    Exclusion(r"TestHotSwapping", "PEFT's hotswap is LoRA's alone; ours is beyondlora.hotswap_adapter"),
]
NONLINEAR = "nonlinear in x: merging refuses, and no LoRA equals it"
NO_LORA = Exclusion(r"test_lora_conversion.py.*(?<!_raises)(?<!_raises\[all\])(?<!_raises\[c3a_only\])$", NONLINEAR)
NO_MERGE = [
    Exclusion(r"merg|test_forward_b?float16|supports_", NONLINEAR, may_pass=True),
    NO_LORA,
]
STATIC_MERGE = [
    Exclusion(
        r"merg|test_forward_b?float16|supports_",
        "merging folds the static form, another function than the one trained, and says so",
        may_pass=True,
    ),
    NO_LORA,
]
ONE_ROW = Exclusion(
    r"only_params_are_updated\[(Embedding|Conv1d)", "a factor with one row of rank 1 is ±1 and has nowhere to go"
)
FLOAT32 = Exclusion(
    r"no_autocast_adapter_dtype|adapter_dtype_autocast\[\w+-False-dtype[01]|convert_float16_dtype",
    "Stiefel factors stay in float32, whatever is asked",
)
NOT_A_NOOP = Exclusion(
    r"test_disable_adapters(_with_merging)?\[Embedding.*trainable_tokens|convert_model_with_modules_to_save",
    "the start is not a no-op",
)
ONE_RANK = Exclusion(
    r"dynamic_rank_1_lora_config", "every layer has exactly the rank r: there is no rank pattern to find"
)
SATURATED = Exclusion(
    r"only_params_are_updated\[(Vanilla MLP [12456]|Conv[23]d [12]) ",
    "the test's inputs reach 90: tanh is flat there and every spline ends, so A has no gradient to move by",
)

EXCLUSIONS: dict[str, list[Exclusion]] = {
    "lora": [],
    "cera": [*EVERYWHERE, *NO_MERGE],
    "aurora": [*EVERYWHERE, *STATIC_MERGE, SATURATED],
    "aurora-static": EVERYWHERE,
    "stella": [*EVERYWHERE, FLOAT32, ONE_ROW, NOT_A_NOOP, ONE_RANK],
    "stella-zero": [*EVERYWHERE, FLOAT32, ONE_RANK],
}
