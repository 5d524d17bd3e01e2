"""export_lora: a folder that the strictest readers take, equal to the adapter wherever that is exactly a LoRA."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import small_models
import torch
from methods import METHODS, every_method, since_peft_0_21
from peft import LoraConfig, PeftModel, convert_to_lora, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, T5Config, T5ForConditionalGeneration

import beyondlora
from beyondlora.export import lora_gap
from beyondlora.tables import show_gap

EXACT = [method for method in METHODS if method.merge == "exact"]
exact_methods = pytest.mark.parametrize("method", EXACT, ids=lambda method: method.name)
TARGETS = ["q_proj", "down_proj"]
BASE = "./somewhere/base"  # not a hub name: nobody is asked for its tokenizer
pytestmark = pytest.mark.filterwarnings("ignore:The PEFT config's `base_model_name_or_path` was renamed")
static_warning = pytest.mark.filterwarnings("ignore:Merging AuroRA")


def trained(config, base=None):
    """A model whose adapter has left its start."""
    model = get_peft_model(base or small_models.llama(), config)
    small_models.train_a_little(model)
    return model


def adapter(method, **overrides):
    return trained(method.config(**{"target_modules": TARGETS, "task_type": "CAUSAL_LM", **overrides}))


def stella(**overrides):
    return trained(beyondlora.StellaConfig(**{"r": 4, "target_modules": TARGETS, **overrides}))


def files(folder):
    return json.loads((folder / "adapter_config.json").read_text()), load_file(folder / "adapter_model.safetensors")


def logits(model):
    with torch.no_grad():
        return model(input_ids=small_models.tokens()).logits


# The export equals the adapter ---------------------------------------------------------------------------------------


@exact_methods
def test_a_user_of_peft_gets_the_live_adapters_logits(method, tmp_path):
    model = adapter(method)
    record = beyondlora.export_lora(model, tmp_path / "lora", base_model=BASE)
    loaded = PeftModel.from_pretrained(small_models.llama(), str(tmp_path / "lora"))
    assert type(loaded.peft_config["default"]) is LoraConfig
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-5)  # float32, two layers
    assert not torch.allclose(logits(model), logits(small_models.llama()), atol=1e-3)  # the adapter does something
    assert record["form"] == "exact"
    assert record["logits_max"] < 1e-5
    assert record["layer_gap"]["largest"] < 1e-6
    assert record["top1_agreement"] == 1.0


@static_warning
@pytest.mark.parametrize("method", [m for m in METHODS if m.merge == "static"], ids=lambda method: method.name)
def test_a_static_form_is_what_merging_gives_and_its_gap_is_measured(method, tmp_path):
    model = adapter(method, init_lora_weights=False)
    live = logits(model)
    record = beyondlora.export_lora(model, tmp_path / "lora", base_model=BASE)
    loaded = logits(PeftModel.from_pretrained(small_models.llama(), str(tmp_path / "lora")))
    torch.testing.assert_close(loaded, logits(model.merge_and_unload()), rtol=1e-5, atol=1e-5)
    assert record["form"] == "static"
    assert record["layer_gap"]["median"] > 0.01  # σ(A)x is not σ(Ax)
    assert (loaded - live).abs().max() > 1e-4


def test_a_static_form_warns(tmp_path):
    with pytest.warns(UserWarning, match="differs from the trained one"):
        beyondlora.export_lora(adapter(METHODS[2]), tmp_path / "lora", base_model=BASE)


def test_the_gap_is_the_one_between_the_outputs(tmp_path):
    """Recomputed here from the layers' own inputs and PEFT's own merged layers."""
    model = adapter(METHODS[2], init_lora_weights=False)
    rows = [{"input_ids": row[None]} for row in small_models.tokens()]
    gap, *others = (lora_gap(model, batches) for batches in ([{"input_ids": small_models.tokens()}], rows, rows[::-1]))
    for other in others:  # wherever the batches are cut, and whichever comes last
        figures = [(g.logits_max, g.logits_relative, g.adapter_relative, g.top1_agreement) for g in (other, gap)]
        assert figures[0] == pytest.approx(figures[1], rel=1e-4)
        assert other.layers == pytest.approx(gap.layers, rel=1e-4)
        assert other.tokens == gap.tokens
    path = "model.layers.0.self_attn.q_proj"
    layer, inputs = model.base_model.model.get_submodule(path), []
    handle = layer.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
    live = logits(model)
    with model.disable_adapter():
        base = logits(model)
    handle.remove()
    x = inputs[0]
    branch = layer(x) - layer.base_layer(x)
    static = x @ layer.get_delta_weight("default").mT
    assert gap.layers[path] == pytest.approx(((static - branch).norm() / branch.norm()).item(), rel=1e-4)
    with pytest.warns(UserWarning, match="Merging"):
        merged = logits(model.merge_and_unload())
    assert gap.logits_relative == pytest.approx(((merged - live).norm() / live.norm()).item(), rel=1e-3)
    assert gap.adapter_relative == pytest.approx(((merged - live).norm() / (live - base).norm()).item(), rel=1e-3)
    assert gap.logits_max == pytest.approx((merged - live).abs().max().item(), rel=1e-3)
    assert gap.top1_agreement == (merged.argmax(-1) == live.argmax(-1)).float().mean().item()
    assert gap.tokens == 24


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_base_in_half_precision_is_said_to_round(dtype, tmp_path, capsys):
    model = trained(beyondlora.StellaConfig(r=4, target_modules=TARGETS), small_models.llama().to(dtype))
    record = beyondlora.export_lora(model, tmp_path / "lora", base_model=BASE)
    assert record["layer_gap"]["largest"] < 1e-5  # the factors are float32, whatever the base is
    assert {tensor.dtype for tensor in files(tmp_path / "lora")[1].values()} == {torch.float32}
    show_gap(record, every_layer=False)
    rounds = f"computes in {str(dtype).removeprefix('torch.')}, whose rounding" in capsys.readouterr().out
    assert rounds == (dtype != torch.float32)


def test_conv1d_of_gpt2(tmp_path):
    model = trained(
        beyondlora.StellaConfig(r=4, target_modules=["c_attn", "mlp.c_proj"], task_type="CAUSAL_LM"),
        small_models.gpt2(),
    )
    beyondlora.export_lora(model, tmp_path / "lora", base_model=BASE)
    loaded = PeftModel.from_pretrained(small_models.gpt2(), str(tmp_path / "lora"))
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-5)


def test_an_encoder_and_a_decoder_are_compared_on_a_prompt_for_each(tmp_path):
    torch.manual_seed(0)
    base = T5ForConditionalGeneration(T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2))
    model = get_peft_model(base, beyondlora.StellaConfig(r=2, target_modules=["q", "v"], task_type="SEQ_2_SEQ_LM"))
    record = beyondlora.export_lora(model, tmp_path / "lora", base_model=BASE)
    assert record["compared_on"].startswith("random tokens")
    assert record["logits_relative"] < 1e-5
    assert any(".decoder." in f".{path}" for path in record["layers"])


def test_a_single_number_has_no_first_class_to_agree_on(tmp_path, capsys):
    base = small_models.bert()
    base.classifier = nn.Linear(32, 1)
    model = get_peft_model(base, beyondlora.StellaConfig(r=4, target_modules=["query"]))
    batches = [{"input_ids": small_models.tokens()}]
    record = beyondlora.export_lora(model, tmp_path / "lora", base_model=BASE, batches=batches)
    assert record["top1_agreement"] is None
    show_gap(record, every_layer=False)
    assert "top-1" not in capsys.readouterr().out


def test_pefts_own_conversion_agrees_with_ours(tmp_path):
    model = stella(task_type="CAUSAL_LM")
    config, tensors = convert_to_lora(model, rank=4)
    theirs = get_peft_model(small_models.llama(), config)
    set_peft_model_state_dict(theirs, tensors)
    beyondlora.export_lora(model, tmp_path / "lora", base_model=BASE)
    ours = files(tmp_path / "lora")[1]
    assert tensors.keys() == ours.keys()
    for name in (name for name in ours if "lora_A" in name):
        partner = name.replace("lora_A", "lora_B")
        torch.testing.assert_close(tensors[partner] @ tensors[name], ours[partner] @ ours[name], rtol=0, atol=2e-6)
    torch.testing.assert_close(logits(theirs.eval()), logits(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", [m for m in METHODS if m.merge != "exact"], ids=lambda method: method.name)
def test_pefts_own_conversion_refuses_what_is_no_lora(method):
    with pytest.raises(TypeError, match="do not support LoRA conversion"):
        convert_to_lora(adapter(method), rank=4)


# The factors, without an SVD -----------------------------------------------------------------------------------------


def test_stella_is_exported_as_its_own_factors(tmp_path):
    model = stella(lora_alpha=8)
    beyondlora.export_lora(model, tmp_path / "lora", base_model=BASE)
    _, tensors = files(tmp_path / "lora")
    state = model.state_dict()
    for key in (key for key in tensors if "lora_A" in key):
        stem = key.removesuffix("lora_A.weight")
        U, S, Vt = (state[f"{stem}stella_{letter}.default.weight"].double() for letter in ("U", "S", "Vt"))
        assert torch.equal(tensors[key].double(), Vt)
        torch.testing.assert_close(tensors[f"{stem}lora_B.weight"].double(), 2.0 * U @ S, rtol=1e-6, atol=1e-6)


# The strict folder, key by key ---------------------------------------------------------------------------------------


@pytest.fixture
def strict(tmp_path):
    """An export of layers with different ranks and alphas, and rsLoRA scaling."""
    config = beyondlora.StellaConfig(
        r=4,
        lora_alpha=5,
        use_rslora=True,
        lora_dropout=0.2,
        target_modules=r".*\.(q_proj|down_proj)",
        rank_pattern={"q_proj": 3},
        alpha_pattern={"down_proj": 7.5},
        layers_to_transform=None,
        exclude_modules=["model.layers.1.self_attn.q_proj"],
        task_type="CAUSAL_LM",
    )
    model = trained(config)
    beyondlora.export_lora(model, tmp_path / "lora", base_model=BASE)
    return model, tmp_path / "lora"


STRICT_CONFIG = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": BASE,
    "inference_mode": True,
    "r": 4,
    "lora_alpha": 4,
    "lora_dropout": 0.0,
    "target_modules": ["down_proj", "q_proj"],
    "rank_pattern": {},
    "alpha_pattern": {},
    "use_rslora": False,
    "use_dora": False,
    "bias": "none",
    "lora_bias": False,
    "modules_to_save": None,
    "trainable_token_indices": None,
    "exclude_modules": None,
    "layers_to_transform": None,
    "layers_pattern": None,
    "fan_in_fan_out": False,
}


@pytest.mark.parametrize("key", STRICT_CONFIG)
def test_the_config_is_one_that_every_reader_takes(key, strict):
    written = files(strict[1])[0][key]
    assert written == STRICT_CONFIG[key]
    assert type(written) is type(STRICT_CONFIG[key])  # a whole number and not 4.0; a list and not a pattern


def test_the_keys_are_those_that_readers_take_apart(strict):
    _, tensors = files(strict[1])
    modules = dict(small_models.llama().named_modules())
    for key in tensors:
        match = re.fullmatch(r"base_model\.model\.(.+)\.lora_[AB]\.weight", key)
        assert match, key
        assert isinstance(modules[match[1]], nn.Linear)
    assert len(tensors) == 2 * 4  # two kinds of layers in two blocks, the excluded one included: as zeros
    assert tensors["base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"].abs().max() == 0


def test_the_rank_is_uniform_and_the_scaling_is_in_b(strict):
    model, folder = strict
    config, tensors = files(folder)
    for key in (key for key in tensors if "lora_A" in key):
        A, B = tensors[key], tensors[key.replace("lora_A", "lora_B")]
        assert A.shape[0] == B.shape[1] == config["r"]
        assert A.dtype == B.dtype == torch.float32
        layer = model.base_model.model.get_submodule(key.split(".", 2)[2].removesuffix(".lora_A.weight"))
        delta = layer.get_delta_weight("default") if hasattr(layer, "base_layer") else torch.zeros(32, 32)
        torch.testing.assert_close(B @ A * config["lora_alpha"] / config["r"], delta, rtol=1e-5, atol=1e-6)


def test_the_folder_holds_nothing_that_a_reader_stumbles_on(strict):
    assert sorted(path.name for path in strict[1].iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "export.json",
    ]
    card = (strict[1] / "README.md").read_text()
    assert card.startswith(f"---\nbase_model: {BASE}\nlibrary_name: peft\n")


def test_a_target_is_named_by_more_than_its_last_word_where_that_would_fit_another_kind_of_layer(tmp_path):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = nn.Linear(16, 16)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.attention = Block()
            self.proj = nn.Conv1d(16, 16, 1)

        def forward(self, x):
            return self.proj(self.attention.proj(x).unsqueeze(-1)).squeeze(-1)

    model = get_peft_model(Net(), beyondlora.StellaConfig(r=2, target_modules=["attention.proj"]))
    beyondlora.export_lora(model, tmp_path / "lora", base_model=BASE, batches=[{"x": torch.randn(8, 16)}])
    assert files(tmp_path / "lora")[0]["target_modules"] == ["attention.proj"]


@pytest.mark.parametrize(("rank", "rounded"), [(1, 1), (3, 8), (8, 8), (12, 16)])
def test_the_rank_can_be_rounded_to_one_of_vllms(rank, rounded, tmp_path):
    model = stella(r=rank, lora_alpha=2)
    record = beyondlora.export_lora(model, tmp_path / "lora", base_model=BASE, round_rank=True)
    config, tensors = files(tmp_path / "lora")
    assert config["r"] == config["lora_alpha"] == record["rank"] == rounded
    assert f"--max-lora-rank {rounded} " in record["serve"]
    assert {min(tensor.shape) for tensor in tensors.values()} == {rounded}
    loaded = PeftModel.from_pretrained(small_models.llama(), str(tmp_path / "lora"))
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-5)


# llama.cpp -----------------------------------------------------------------------------------------------------------


def test_llama_cpp_finds_a_tensor_for_every_key(strict, tmp_path):
    """What llama.cpp's converter does with the folder, with its own name tables, writer and reader."""
    gguf = pytest.importorskip("gguf", reason="needs llama.cpp's gguf package: pip install gguf")
    config, tensors = files(strict[1])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    writer = gguf.GGUFWriter(tmp_path / "lora.gguf", "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(config["lora_alpha"]))
    for key, tensor in tensors.items():
        path, letter = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", key).groups()
        name = names.get_name(path + ".weight", try_suffixes=(".weight",))
        assert name, f"{path} is no tensor of llama.cpp's"
        writer.add_tensor(f"{name}.lora_{letter.lower()}", tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    read = {tensor.name: torch.tensor(tensor.data) for tensor in gguf.GGUFReader(tmp_path / "lora.gguf").tensors}
    A, B = (read[f"blk.0.ffn_down.weight.lora_{letter}"] for letter in "ab")
    layer = strict[0].base_model.model.model.layers[0].mlp.down_proj
    scale = config["lora_alpha"] / A.shape[0]  # llama.cpp: alpha over the tensor's own rank
    torch.testing.assert_close(B @ A * scale, layer.get_delta_weight("default"), rtol=1e-5, atol=1e-6)


# What the export leaves alone ----------------------------------------------------------------------------------------


@every_method
@static_warning
def test_the_live_model_stays_as_it_was(method, tmp_path):
    model = adapter(method)
    model.base_model.model.model.norm.weight.requires_grad_(True)  # a user may train more than the adapter
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if method.merge == "refused":
        with pytest.raises(ValueError, match="distil"):
            beyondlora.export_lora(model, tmp_path / "lora", base_model=BASE)
    else:
        beyondlora.export_lora(model, tmp_path / "lora", base_model=BASE)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert trainable == [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert all(module.training for module in model.modules() if not isinstance(module, nn.Identity))
    assert not any(layer._forward_pre_hooks for layer in model.modules())


def test_an_older_export_is_replaced_and_nothing_else_is(tmp_path):
    beyondlora.export_lora(stella(), tmp_path / "lora", base_model=BASE)
    beyondlora.export_lora(stella(r=2), tmp_path / "lora", base_model=BASE)
    assert files(tmp_path / "lora")[0]["r"] == 2
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.txt").write_text("ten years")
    with pytest.raises(FileExistsError, match="no export wrote"):
        beyondlora.export_lora(stella(), tmp_path / "work", base_model=BASE)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lora", "work"]


def test_the_folders_beside_an_export_are_left_alone_and_what_a_kill_left_is_cleaned_up(tmp_path):
    for name in ("lora.old", "lora.partial", ".lora.beyondlora.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.txt").write_text("ten years")
    for _ in range(2):
        beyondlora.export_lora(stella(), tmp_path / "lora", base_model=BASE)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lora", "lora.old", "lora.partial"]
    assert all((tmp_path / name / "thesis.txt").exists() for name in ("lora.old", "lora.partial"))


def test_through_a_link_the_folder_behind_it_is_replaced(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "lora").symlink_to(tmp_path / "disk" / "adapters", target_is_directory=True)  # which is not there yet
    beyondlora.export_lora(stella(), tmp_path / "lora", base_model=BASE)
    beyondlora.export_lora(stella(r=2), tmp_path / "lora", base_model=BASE)
    assert (tmp_path / "lora").is_symlink()
    assert files(tmp_path / "disk" / "adapters")[0]["r"] == 2
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["adapters"]


# What is refused -----------------------------------------------------------------------------------------------------


def test_a_folder_that_does_not_equal_the_adapter_never_gets_its_name(tmp_path, monkeypatch):
    model = stella()
    kind = type(next(m for m in model.modules() if hasattr(m, "adapters")).adapters["default"])
    right = kind.lora_factors
    monkeypatch.setattr(kind, "lora_factors", lambda self: (right(self)[0] * 1.001, right(self)[1]))
    with pytest.raises(ValueError, match=r"differs from the adapter it should equal: .*1\.0e-03"):
        beyondlora.export_lora(model, tmp_path / "lora", base_model=BASE)
    assert list(tmp_path.iterdir()) == []


def several():
    model = stella()
    model.add_adapter("second", beyondlora.StellaConfig(r=2, target_modules=TARGETS))
    model.base_model.set_adapter(["default", "second"])
    return model


def merged():
    model = stella()
    model.merge_adapter()
    return model


def broken():
    model = stella()
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "stella_S" in n)[0, 0] = float("nan")
    return model


def lora():
    return trained(LoraConfig(r=2, target_modules=TARGETS))


def disabled():
    model = stella()
    model.base_model.disable_adapter_layers()
    return model


def convolution():
    config = beyondlora.StellaConfig(r=2, target_modules=["0"])
    return get_peft_model(nn.Sequential(nn.Conv2d(3, 4, 2)), config)


REFUSALS = {
    "no base model": (stella, {"base_model": None}, "pass base_model"),
    "several active": (several, {}, r"choose the one to export: model\.set_adapter"),
    "merged": (merged, {}, r"model\.unmerge_adapter"),
    "disabled": (disabled, {}, "adapters are disabled"),
    "not finite": (broken, {}, "not finite"),
    "a trained head": (lambda: stella(modules_to_save=["lm_head"]), {}, r"modules_to_save.*--to merged"),
    "biases": (lambda: stella(bias="all"), {}, r"bias='all'.*--to merged"),
    "tokens": (lambda: stella(trainable_token_indices=[1]), {}, "trainable_token_indices"),
    "a table": (lambda: stella(target_modules=["embed_tokens", "q_proj"]), {}, "embed_tokens is a Embedding: servers"),
    "a table to distil": (
        lambda: trained(beyondlora.CeraConfig(r=2, target_modules=["embed_tokens"])),
        {"distil_on": []},
        "embed_tokens is a Embedding: servers",
    ),
    "a kernel": (convolution, {}, r"0 is a Conv2d: servers take LoRA beside linear layers only.*--to merged"),
    "PEFT's own": (lora, {}, r"PEFT's own type LORA"),
    "nothing to distil": (stella, {"distil_on": []}, "equals a LoRA exactly"),
    "a rank for an exact one": (stella, {"rank": 2}, r"rank=2 is that of a distilled LoRA"),
}


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=since_peft_0_21) if case == "biases" else case for case in REFUSALS]
)
def test_what_no_plain_lora_can_be(case, tmp_path):
    make, options, message = REFUSALS[case]
    with pytest.raises(ValueError, match=message):
        beyondlora.export_lora(make(), tmp_path / "lora", **{"base_model": BASE, **options})
    assert list(tmp_path.iterdir()) == []


def test_a_folder_where_nothing_can_be_written_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="file is a file; name another place"):
        beyondlora.export_lora(stella(), tmp_path / "file" / "lora", base_model=BASE)


def test_a_bare_model_is_no_adapter(tmp_path):
    with pytest.raises(TypeError, match="get_peft_model"):
        beyondlora.export_lora(small_models.llama(), tmp_path / "lora")


def test_a_rank_that_vllm_has_not(tmp_path):
    from beyondlora.export.folder import serving_command, vllm_rank

    with pytest.raises(ValueError, match="at most 512"):
        vllm_rank(513)
    assert "vllm serve" not in serving_command(Path("lora"), base_model=BASE, rank=513)


def test_the_serving_command_is_one_that_a_shell_takes():
    import shlex

    from beyondlora.export.folder import serving_command

    words = shlex.split(serving_command(Path("my served/a lora"), base_model="a base", rank=8))
    assert words[2] == "a base"
    assert words[-1] == "a lora=my served/a lora"
    assert shlex.split(serving_command(Path("a model"), base_model="", rank=None)) == ["vllm", "serve", "a model"]


def test_a_model_that_reads_no_text_needs_batches(tmp_path):
    model = get_peft_model(small_models.Perceptron(), beyondlora.StellaConfig(r=2, target_modules=["first"]))
    with pytest.raises(ValueError, match="pass batches"):
        beyondlora.export_lora(model, tmp_path / "lora", base_model=BASE)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif("LLAMA_CPP" not in os.environ, reason="needs a checkout of llama.cpp: LLAMA_CPP=path")
def test_llama_cpps_own_converter_takes_the_folder(house, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(house / "base")
    model = trained(beyondlora.StellaConfig(r=3, target_modules="all-linear", task_type="CAUSAL_LM"), base)
    beyondlora.export_lora(model, tmp_path / "lora")
    command = [sys.executable, "convert_lora_to_gguf.py", "--base", house / "base", tmp_path / "lora"]
    done = subprocess.run(
        [*map(str, command), "--outfile", str(tmp_path / "lora.gguf")],
        cwd=os.environ["LLAMA_CPP"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    import gguf

    names = {tensor.name for tensor in gguf.GGUFReader(tmp_path / "lora.gguf").tensors}
    assert len(names) == len(files(tmp_path / "lora")[1]) == 28
