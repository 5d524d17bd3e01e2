"""Methods × layers × features: every cell is a few milliseconds of real work on a model of one layer.

A probe compares what it did with what must come out: an adapter that loads other figures than it saved is "wrong", not
"yes". PEFT's own LoRA goes through the same probes, as the yardstick.
"""

import copy
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, convert_to_lora, get_peft_model, set_peft_model_state_dict
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.checkpoint import checkpoint

from ..attach import quiet
from ..evaluate import device
from ..tuner.methods import METHODS
from .answer import Answer, ApproximateResultError, WrongResultError, ask
from .layers import LAYER_KINDS, LayerKind

RANK = 4
Make = Callable[[], PeftModel]  # a fresh model with one adapter that is not a no-op, in eval mode


def methods() -> dict[str, type[PeftConfig]]:
    """The methods that are probed, by the name of their PEFT type."""
    return {"LORA": LoraConfig} | {config_cls.method.upper(): config_cls for config_cls in METHODS}


def probe_methods(on_row: Callable[[int, int], None] | None = None) -> dict[str, dict[str, dict[str, Answer]]]:
    """Ask everything: {method: {layer kind: {feature: answer}}}.

    Args:
        on_row: called after each row with (rows done, rows in all).
    """
    rows = [(name, kind) for name in methods() for kind in LAYER_KINDS]
    found: dict[str, dict[str, dict[str, Answer]]] = {name: {} for name in methods()}
    for done, (name, kind) in enumerate(rows, start=1):
        found[name][kind.name] = {feature: answer(name, kind, feature) for feature in FEATURES}
        if on_row:
            on_row(done, len(rows))
    return found


def answer(method: str, kind: LayerKind, feature: str) -> Answer:
    """Ask one thing, with the random numbers fixed."""
    if not kind.installed:
        return Answer("absent", f"{kind.package} is not installed")

    def probe() -> None:
        torch.manual_seed(0)
        base = kind.build().to(device()).eval()
        x = kind.inputs().to(device())
        config_cls: Any = methods()[method]
        config = config_cls(r=RANK, **kind.targets, init_lora_weights=False)

        def make() -> PeftModel:
            return get_peft_model(copy.deepcopy(base), copy.deepcopy(config)).eval()

        FEATURES[feature](make, x)

    with _alone():
        return ask(probe)


@contextmanager
def _alone() -> Iterator[None]:
    with warnings.catch_warnings(), quiet():
        warnings.simplefilter("ignore")
        yield


# --- the features ----------------------------------------------------------------------------------------------------


def train(make: Make, x: Tensor) -> None:
    """Every trainable weight gets a gradient and moves, and the base does not."""
    model = make().train()
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    optimizer = torch.optim.Adam(trained.values(), lr=1e-2)
    for _ in range(3):  # a dropout may hide a unit once
        model(x).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, weight in model.named_parameters():
        if name in trained and torch.equal(before[name], weight):
            raise WrongResultError(f"{name} did not move")
        if name not in trained:  # PEFT's attention merges and unmerges in every forward pass, which rounds
            _same(weight, before[name], f"{name} of the base")


def train_with_checkpointing(make: Make, x: Tensor) -> None:
    """Recomputing the forward pass, by either of torch's ways, gives the same gradients; dropout too."""
    model = make().train()
    anchor = torch.zeros((), device=x.device, requires_grad=True)  # a reentrant one wants an input with a gradient

    def forward(x: Tensor, _: Tensor) -> Tensor:
        output: Tensor = model(x)
        return output

    gradients = []
    for reentrant in (None, False, True):
        torch.manual_seed(0)
        plain = reentrant is None
        output = forward(x, anchor) if plain else checkpoint(forward, x, anchor, use_reentrant=bool(reentrant))
        output.float().square().mean().backward()
        gradients.append([weight.grad.clone() for weight in model.parameters() if weight.grad is not None])
        model.zero_grad()
    wanted, *recomputed = gradients
    if not wanted:
        raise WrongResultError("there are no gradients under checkpointing")
    for way in recomputed:
        for expected, gradient in zip(wanted, way, strict=True):  # on a GPU some sums come out by who is first
            _same(gradient, expected, "a gradient under checkpointing")


def compile_without_breaks(make: Make, x: Tensor) -> None:
    """The whole forward pass is one graph for torch.compile (traced only: no compiler is needed here)."""
    model = make()
    torch.compiler.reset()
    with torch.no_grad():
        _same(torch.compile(model, backend="eager", fullgraph=True)(x), model(x), "the compiled output")


def save_and_load(make: Make, x: Tensor) -> None:
    """A saved adapter comes back with the same outputs, on a fresh base."""
    model = make()
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        model.save_pretrained(folder)
        fresh = make().unload()
        _same(PeftModel.from_pretrained(fresh, folder).eval()(x), model(x), "the loaded adapter's output")


def switch(make: Make, x: Tensor) -> None:
    """Two adapters can be chosen, added up and switched off."""
    model: Any = _with_second(make())
    with torch.no_grad():
        with model.disable_adapter():
            base = model(x)
        alone = []
        for name in ("default", "second"):
            model.set_adapter(name)
            alone.append(model(x) - base)
        model.base_model.set_adapter(["default", "second"])
        if model.get_base_model().additive:
            _same(model(x) - base, alone[0] + alone[1], "the sum of two active adapters")
    if min(branch.abs().max() for branch in alone) == 0:
        raise WrongResultError("the adapter is without effect")


def mix_in_a_batch(make: Make, x: Tensor) -> None:
    """Each row of one batch takes its own adapter, or none."""
    model = _with_second(make())
    with torch.no_grad():
        with model.disable_adapter():
            rows = {"__base__": model(x)}
        for name in ("default", "second"):
            model.set_adapter(name)
            rows[name] = model(x)
        names = ["second", "__base__", "default"]
        expected = torch.stack([rows[name][row] for row, name in enumerate(names)])
        _same(model(x, adapter_names=names), expected, "the mixed batch")


def merge(make: Make, x: Tensor) -> None:
    """The merged layer gives the adapter's outputs."""
    model = make()
    with torch.no_grad(), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", UserWarning)
        before = model(x)
        model.merge_adapter(safe_merge=True)
        try:
            _same(model(x), before, "the merged output", tolerance=_merge_tolerance(model))
        except WrongResultError as error:
            if any("differs" in str(warning.message) for warning in said):
                raise ApproximateResultError(
                    "the merged model is another function than the trained one, and says so"
                ) from error
            raise


def unmerge(make: Make, x: Tensor) -> None:
    """Unmerging puts the outputs back."""
    model: Any = make()
    with torch.no_grad():
        before = model(x)
        model.merge_adapter()
        model.unmerge_adapter()
        _same(model(x), before, "the unmerged output", tolerance=model.get_base_model().grain)


def convert(make: Make, x: Tensor) -> None:
    """PEFT's convert_to_lora gives a LoRA with the same outputs."""
    model = make()
    config, weights = convert_to_lora(model, rank=RANK)
    lora = get_peft_model(make().unload(), config).eval()
    set_peft_model_state_dict(lora, weights)
    with torch.no_grad():
        _same(lora(x), model(x), "the LoRA's output", tolerance=1e-3)


FEATURES: dict[str, Callable[[Make, Tensor], None]] = {
    "train": train,
    "ckpt": train_with_checkpointing,
    "compile": compile_without_breaks,
    "save": save_and_load,
    "several": switch,
    "mixed": mix_in_a_batch,
    "merge": merge,
    "unmerge": unmerge,
    "LoRA": convert,
}


# --- small things ----------------------------------------------------------------------------------------------------


def _with_second(model: PeftModel) -> PeftModel:
    model.add_adapter("second", copy.deepcopy(model.peft_config["default"]))
    return model.eval()


def _same(given: Tensor, expected: Tensor, what: str, tolerance: float | None = None) -> None:
    """Raise WrongResultError where two outputs differ by more than rounding (relative to the largest entry)."""
    if tolerance is None:
        tolerance = 1e-5 if expected.dtype == torch.float32 else 3e-2
    given, expected = _plain(given), _plain(expected)
    largest = expected.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    gap = ((given - expected).abs().max() / largest).item()
    if not gap <= tolerance:
        raise WrongResultError(f"{what} is off by {gap:.1e} of the largest entry")


def _plain(tensor: Tensor) -> Tensor:
    """A tensor that can be subtracted: torchao's quantised ones cannot."""
    return Tensor.dequantize(tensor) if is_traceable_wrapper_subclass(tensor) else tensor


def _merge_tolerance(model: Any) -> float | None:
    """Weights that are quantised again, or rounded to half precision, hold a merged adapter less exactly."""
    host = model.get_base_model()
    if host.grain is not None or next(host.target.parameters()).dtype == torch.float32:
        return host.grain
    return 0.1
