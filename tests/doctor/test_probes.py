"""The probes: each can fail, each answer that the documents print is what comes out here."""

import copy
import random
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from beyondlora.doctor import probes
from beyondlora.doctor.answer import Answer, ApproximateResultError, WrongResultError, ask
from beyondlora.doctor.layers import LAYER_KINDS, Host, LayerKind
from beyondlora.doctor.report import SIGNS, as_markdown
from beyondlora.tuner.layer import AdapterLayer

KINDS = {kind.name: kind for kind in LAYER_KINDS}
CAPABILITIES = Path(__file__).resolve().parents[2] / "docs/capabilities.md"


def documented() -> dict[tuple[str, str, str], str]:
    """(method, layer, feature) → sign, as docs/capabilities.md prints it."""
    cells, method, features = {}, "", []
    for line in CAPABILITIES.read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            method, features = line[3:], []
        elif line.startswith("| layer |"):
            features = [cell.strip() for cell in line.strip("|").split("|")][1:]
        elif features and line.startswith("| ") and "---" not in line:
            layer, *signs = [cell.strip() for cell in line.strip("|").split("|")]
            cells |= {(method, layer, feature): sign for feature, sign in zip(features, signs, strict=True)}
    return cells


def packs_4bit_weights() -> bool:
    from bitsandbytes.functional import has_avx512bf16

    return has_avx512bf16()


@pytest.mark.parametrize("kind", LAYER_KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("method", probes.methods())
def test_the_documented_matrix_is_what_comes_out(method, kind):
    if not kind.installed:
        pytest.skip(f"{kind.package} is not installed")
    if (method, kind.name) == ("LORA", "bnb 4-bit") and not packs_4bit_weights():
        pytest.skip("PEFT's LoRA merges into a packed weight, which this processor does not have")
    found = {feature: SIGNS[probes.answer(method, kind, feature).state] for feature in probes.FEATURES}
    printed = {feature: documented()[method, kind.name, feature] for feature in probes.FEATURES}
    if set(printed.values()) == {"?"}:
        pytest.skip(f"docs/capabilities.md was made without {kind.package}")
    assert found == printed


def test_the_document_has_a_cell_for_every_question():
    asked = {(method, kind, feature) for method in probes.methods() for kind in KINDS for feature in probes.FEATURES}
    assert set(documented()) == asked


def test_no_answer_about_our_methods_is_a_defect():
    assert not [cell for cell, sign in documented().items() if sign == SIGNS["wrong"] and cell[0] != "LORA"]


# Each probe sees what it is there to see --------------------------------------------------------------------------


def _without_effect(layer, x, *args, **kwargs):
    return layer.base_layer(x, *args, **kwargs)


def _random(layer, x, *args, **kwargs):
    result = layer.base_layer(x, *args, **kwargs)
    return result + sum(adapter(x) for adapter in layer._active()) * torch.rand(())


def _other_every_time(layer, x, *args, **kwargs):
    result = layer.base_layer(x, *args, **kwargs)
    return result + sum(adapter(x) for adapter in layer._active()) * random.random()


def _other_without_gradients(layer, x, *args, **kwargs):
    result = layer.base_layer(x, *args, **kwargs)
    return result + sum(adapter(x) for adapter in layer._active()) * torch.rand(2)[int(torch.is_grad_enabled())]


def _the_active_one_for_all(layer, x, *args, adapter_names=None, **kwargs):
    return _one_adapter_only(layer, x)


def _one_adapter_only(layer, x, *args, **kwargs):
    result = layer.base_layer(x, *args, **kwargs)
    return result if layer.disable_adapters else result + layer.adapters[layer.active_adapters[-1]](x)


def _with_a_break(layer, x, *args, **kwargs):
    torch._dynamo.graph_break()
    return layer.base_layer(x, *args, **kwargs)


@pytest.mark.parametrize(
    ("feature", "forward", "state"),
    [
        ("train", _without_effect, "refused"),  # there is no gradient
        ("ckpt", _other_every_time, "wrong"),
        ("ckpt", _other_without_gradients, "wrong"),
        ("compile", _with_a_break, "refused"),
        ("save", _random, "wrong"),
        ("several", _without_effect, "wrong"),
        ("several", _one_adapter_only, "wrong"),
        ("mixed", _without_effect, "refused"),  # it does not take adapter_names
        ("mixed", _the_active_one_for_all, "wrong"),
        ("merge", _random, "wrong"),
        ("unmerge", _random, "wrong"),
        ("LoRA", _random, "wrong"),
    ],
)
def test_a_probe_notices_a_layer_that_does_not_do_its_work(monkeypatch, feature, forward, state):
    assert probes.answer("STELLA", KINDS["Linear"], feature).state == "yes"
    monkeypatch.setattr(AdapterLayer, "forward", forward)
    assert probes.answer("STELLA", KINDS["Linear"], feature).state == state


def test_a_weight_that_does_not_move_is_named(monkeypatch):
    class Frozen(Host):
        def forward(self, x):
            return self.target(x.detach()) if self.training else self.target(x)

    def no_steps(self, closure=None):
        return None

    monkeypatch.setattr(torch.optim.Adam, "step", no_steps)
    kind = LayerKind("frozen", lambda: Frozen(nn.Linear(16, 12)), lambda: torch.randn(3, 16))
    found = probes.answer("CERA", kind, "train")
    assert (found.state, "cera_A" in found.why) == ("wrong", True)


def test_a_merge_that_says_it_differs_is_approximate_and_one_that_does_not_is_wrong(monkeypatch):
    assert probes.answer("AURORA", KINDS["Linear"], "merge").state == "approximate"
    from beyondlora.adapters.aurora import AuroraAdapter

    monkeypatch.setattr(AuroraAdapter, "merge_warning", None)
    assert probes.answer("AURORA", KINDS["Linear"], "merge").state == "wrong"


def test_a_probe_leaves_the_random_numbers_of_the_process_alone():
    torch.manual_seed(3)
    before = copy.deepcopy(torch.random.get_rng_state())
    probes.answer("CERA", KINDS["Linear"], "train")
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_layer_whose_package_is_missing_is_absent():
    kind = LayerKind("x", lambda: Host(nn.Linear(4, 4)), lambda: torch.ones(3, 4), package="no_such_package")
    found = probes.answer("CERA", kind, "train")
    assert (found.state, "no_such_package" in found.why) == ("absent", True)


@pytest.mark.parametrize(
    ("error", "state", "why"),
    [
        (WrongResultError("off"), "wrong", "off"),
        (ApproximateResultError("near"), "approximate", "near"),
        (ValueError("Cannot do it.\nBecause of that."), "refused", "Cannot do it."),
        (KeyError(), "refused", "KeyError"),
    ],
)
def test_an_answer_is_the_first_sentence_of_what_was_raised(error, state, why):
    def probe():
        raise error

    found = ask(probe)
    assert (found.state, found.why) == (state, why)


def test_every_feature_is_explained():
    assert all(re.match(r"[A-Z].*\.$", probe.__doc__, re.DOTALL) for probe in probes.FEATURES.values())


def test_a_reason_with_the_sign_between_columns_stays_in_its_column():
    environment = {"versions": {}, "accelerator": None, "cpus": 1, "python": "3.12", "torch_threads": 1}
    environment["distributed"] = {"processes": 1, "backends": []}
    optimizers = {"torch Odd": Answer("refused", "lr must be float | Tensor.")}
    assert as_markdown(environment, {}, optimizers).endswith("| torch Odd | – | lr must be float \\| Tensor. |\n")
