"""Modules called with little Python give what calling them gives, and are called where somebody watches."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from beyondlora.adapters import AuroraAdapter, CeraAdapter, StaticAuroraAdapter, StellaAdapter
from beyondlora.adapters.adapter import Adapter
from beyondlora.adapters.brief import call, is_brief
from beyondlora.adapters.stella import Dense, Diagonal
from beyondlora.manifold import StiefelLinear


class Doubling(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


MODULES: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(6, 4, bias=False),
    "with a bias": lambda: nn.Linear(6, 4),
    "another linear": lambda: Doubling(6, 4),
    "on the manifold": lambda: StiefelLinear(6, 4),
    "dense": lambda: Dense(6),
    "diagonal": lambda: Diagonal(6),
    "activation": nn.SiLU,
    "dropout at rest": lambda: nn.Dropout(0.5).eval(),
    "nothing": nn.Identity,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", MODULES)
@torch.no_grad()
def test_call_gives_what_calling_gives(name: str, dtype: torch.dtype) -> None:
    module = MODULES[name]().to(dtype)
    for weight in module.parameters():
        nn.init.normal_(weight)
    x = torch.randn(2, 3, 6, dtype=dtype)
    assert torch.equal(call(module, x), module(x))


@pytest.mark.parametrize("name", MODULES)
@torch.no_grad()
def test_nobody_who_watches_is_passed_by(name: str) -> None:
    module, x = MODULES[name](), torch.randn(3, 6)
    seen: list[str] = []

    def note(what: str) -> Callable[..., None]:
        return lambda *_: seen.append(what)

    expected = ["before", "after", "of all"]
    handles: list[Any] = [module.register_forward_hook(note("after")), module.register_forward_pre_hook(note("before"))]
    handles.append(register_module_forward_hook(note("of all")))
    try:
        call(module, x)
        assert sorted(seen) == sorted(expected)
        for handle, what in zip(handles, ["after", "before", "of all"], strict=True):
            handle.remove()
            expected.remove(what)
            seen.clear()
            call(module, x)
            assert sorted(seen) == sorted(expected)
    finally:
        handles[-1].remove()


@torch.no_grad()
def test_what_stands_in_place_of_a_forward_or_a_call_runs() -> None:
    x, replaced, compiled = torch.randn(3, 6), nn.Linear(6, 4), nn.Linear(6, 4)
    replaced.forward = lambda x: x + 1  # type: ignore[method-assign]
    assert torch.equal(call(replaced, x), x + 1)
    compiled._compiled_call_impl = lambda x: x - 1  # as `module.compile()` does
    assert torch.equal(call(compiled, x), x - 1)


@torch.no_grad()
def test_a_weight_may_be_held_elsewhere() -> None:
    module, x = nn.Linear(6, 4, bias=False), torch.randn(3, 6)
    expected = module(x)
    weight = module._parameters.pop("weight")
    object.__setattr__(module, "weight", weight)  # FSDP1's view, while it computes
    assert torch.equal(call(module, x), expected)
    adapter = Adapter(down=module, up=nn.Linear(4, 5, bias=False))
    assert adapter.dtype == torch.float32
    assert torch.allclose(adapter.add_briefly(torch.zeros(3, 5), x), adapter(x))


ADAPTERS: dict[str, Callable[[], Adapter]] = {
    "lora": lambda: Adapter(down=nn.Linear(6, 2, bias=False), up=nn.Linear(2, 5, bias=False), scaling=0.7, dropout=0.3),
    "cera": lambda: CeraAdapter(6, 5, 2, scaling=0.7, noop_start=False),
    "aurora": lambda: AuroraAdapter(6, 5, 2, dropout=0.3, noop_start=False),
    "static": lambda: StaticAuroraAdapter(6, 5, 2, dropout=0.3, noop_start=False),
    "stella": lambda: StellaAdapter(6, 5, 2, scaling=0.7, dropout=0.3),
    "diagonal": lambda: StellaAdapter(6, 5, 2, diag_s=True, dropout=0.3),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ADAPTERS)
@torch.no_grad()
def test_an_adapter_adds_the_same_and_drops_the_same(name: str, training: bool) -> None:
    adapter, x, y = ADAPTERS[name]().train(training), torch.randn(3, 6), torch.randn(3, 5)
    torch.manual_seed(1)
    expected = y + adapter(x)
    torch.manual_seed(1)
    assert torch.allclose(adapter.add_briefly(y, x), expected, atol=1e-6)


@pytest.mark.parametrize("name", ADAPTERS)
@torch.no_grad()
def test_every_part_of_an_adapter_can_be_watched(name: str) -> None:
    adapter = ADAPTERS[name]().eval()
    parts = {"static": ["up", "dropout"], "cera": ["down", "core", "activation", "up"]}
    for part in parts.get(name, ["dropout", "down", "core", "up"]):
        seen: list[int] = []
        handle = adapter.get_submodule(part).register_forward_hook(lambda *_, seen=seen: seen.append(1))
        adapter.add_briefly(torch.zeros(3, 5), torch.randn(3, 6))
        handle.remove()
        assert seen, part


def test_only_few_entries_without_gradients_are_brief() -> None:
    few, many = torch.zeros(4, 8), torch.zeros(2**15)
    assert not is_brief(few)
    with torch.no_grad():
        assert is_brief(few)
        assert not is_brief(many)
