"""Recipes on a base model in 8 or 4 bits: trained, measured again, exported; what they cannot do is refused."""

import importlib.util
import re

import pytest
import small_runs
import torch

from beyondlora.evaluate import evaluate, load_base, load_processor
from beyondlora.export import export
from beyondlora.run_folder import RunFolder
from beyondlora.train import train

pytest.importorskip("bitsandbytes")
pytestmark = [
    pytest.mark.usefixtures("fresh_accelerate"),
    pytest.mark.filterwarnings("ignore:MatMul8bitLt:UserWarning"),
]
both = pytest.mark.parametrize("bits", [8, 4])


@pytest.fixture
def recipe(house, tmp_path):
    """A recipe on the embedded model, whose layers are wide enough for blocks of 64 values."""

    def make(bits, **changes):
        defaults = {"model_name_or_path": "demo", "adapter": small_runs.ADAPTERS["stella"], "max_steps": 6}
        options = {f"load_in_{bits}bit": True, "output_dir": str(tmp_path / "run")}
        return small_runs.recipe(house, **defaults | options | changes)

    return make


@both
def test_a_run_is_measured_again_alike_and_exported(bits, recipe, house, tmp_path):
    wanted = recipe(bits, forgetting_dataset_name=str(house / "text.txt"))
    summary = train(wanted)
    losses = [row["loss"] for row in RunFolder(wanted.output_dir).rows() if "loss" in row]
    assert losses[-1] < losses[0] - 1
    assert evaluate(tmp_path / "run")["metrics"] == summary["metrics"]
    record = export(tmp_path / "run", tmp_path / "lora")
    assert record["form"] == "exact"
    assert record["top1_agreement"] > 0.99
    with pytest.raises(ValueError, match=f"held in {bits} bits.*Export --to lora, or merge into the whole model"):
        export(tmp_path / "run", tmp_path / "merged", to="merged")
    assert not (tmp_path / "merged").exists()


@both
def test_the_base_model_is_held_in_so_many_bits(bits, recipe):
    wanted = recipe(bits)
    base = load_base(wanted, load_processor(wanted), None)
    whole = load_base(wanted.replace(load_in_8bit=False, load_in_4bit=False), load_processor(wanted), None)
    held = base.model.layers[0].mlp.up_proj.weight
    assert held.numel() * held.element_size() * 32 == whole.model.layers[0].mlp.up_proj.weight.numel() * 4 * bits


def test_weights_measured_before_the_adapter_is_attached_pass_gradients_on(recipe):
    """bitsandbytes packs them in the first evaluation, on some processors, and a packed one passes none on."""
    wanted = recipe(4)
    base = load_base(wanted, load_processor(wanted), None).eval()
    ids = torch.arange(5, 25).view(2, 10)
    with torch.no_grad():
        base(input_ids=ids)
    layer = base.model.layers[0].mlp.up_proj
    assert not getattr(layer.weight.quant_state, "packing_format_for_cpu", False)
    x = torch.randn(3, layer.in_features, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"load_in_8bit": True}, "two forms of the same weights; choose one"),
        ({"adapter": {"peft_type": "FULL"}}, "holds weights that cannot be trained, and peft_type FULL trains them"),
        ({"task": "sequence-classification"}, "is for task: causal-lm"),
    ],
)
def test_what_cannot_be_in_bits_is_refused(changes, complaint, recipe):
    with pytest.raises(ValueError, match=complaint):
        recipe(4, **changes)


def test_without_bitsandbytes_it_is_refused_before_anything_is_done(recipe, tmp_path, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "bitsandbytes" else find_spec(name, *more)
    )
    told = "key load_in_4bit needs bitsandbytes, which is not installed: pip install 'beyondlora[quantization]'"
    with pytest.raises(ValueError, match=re.escape(told)):
        train(recipe(4))
    assert not (tmp_path / "run").exists()


def test_weights_that_a_launcher_would_cut_are_refused(recipe, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.setattr("beyondlora.train.PartialState", lambda: type("State", (), {"distributed_type": "MULTI_GPU"}))
    with pytest.raises(ValueError, match="load_in_8bit, and the launcher was asked to cut weights"):
        train(recipe(8))
