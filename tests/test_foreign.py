"""Importing the authors' files, built here by hand as docs and papers describe them; strict in both directions."""

import json

import numpy as np
import pytest
import reference
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from beyondlora.cli import app
from beyondlora.foreign import import_adapter
from beyondlora.manifold.stiefel import distance_to_stiefel

PROJECTIONS = ("q_proj", "v_proj")
IDS = torch.tensor([[1, 7, 11, 30, 5, 9]])


@pytest.fixture
def base(house):
    return AutoModelForCausalLM.from_pretrained(house / "base").eval()


def layer_names(base, ends=PROJECTIONS):
    return [name for name, _ in base.named_modules() if name.endswith(ends)]


def weights(base, rank=3, ends=PROJECTIONS, ranks=None):
    """Random A (r, n) and B (m, r) for each layer."""
    draw, made = torch.Generator().manual_seed(0), {}
    for name in layer_names(base, ends):
        layer, own = base.get_submodule(name), (ranks or {}).get(name, rank)
        made[name] = tuple(
            torch.randn(shape, generator=draw) / 4 for shape in ((own, layer.in_features), (layer.out_features, own))
        )
    return made


def checkpoint(path, made, names=("A", "B"), front="", more=None):
    """The author's file: a training loop's dictionary around the adapter's tensors."""
    state = {
        f"{front}{layer}.cera.{name}.weight": weight
        for layer, pair in made.items()
        for name, weight in zip(names, pair, strict=True)
    }
    torch.save({"epoch": 2, "loss": 1.5, "model_state_dict": state | (more or {})}, path)
    return path


def expected_logits(base, made):
    """The base model with s·B·SiLU(Ax), the paper's equation in NumPy, added to each layer's output."""

    def add(layer, A, B):
        def hook(_module, arguments, output):
            x = arguments[0].detach().double().numpy().reshape(-1, layer.in_features)
            y = reference.cera(x, A.double().numpy(), B.double().numpy())
            return output + torch.from_numpy(y.reshape(output.shape)).float()

        return layer.register_forward_hook(hook)

    handles = [add(base.get_submodule(name), A, B) for name, (A, B) in made.items()]
    with torch.no_grad():
        logits = base(IDS).logits
    for handle in handles:
        handle.remove()
    return logits


def loaded_logits(house, folder):
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(house / "base"), str(folder)).eval()
    with torch.no_grad():
        return model(IDS).logits


# The CeRA author's checkpoints ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("front", ["", "module.", "base_model.model.", "module._orig_mod."])
@pytest.mark.parametrize("names", [("A", "B"), ("up_proj", "down_proj")], ids=["new", "before July 2026"])
def test_both_generations_compute_what_the_paper_says(names, front, base, house, tmp_path):
    made = weights(base)
    source = checkpoint(tmp_path / "cera.pt", made, names, front)
    found = import_adapter(source, tmp_path / "adapter", base_model=str(house / "base"))
    assert found == {
        "peft_type": "CERA",
        "base_model": str(house / "base"),
        "r": 3,
        "target_modules": ["q_proj", "v_proj"],
        "layers": 4,
        "repaired": [],
    }
    logits = loaded_logits(house, tmp_path / "adapter")
    torch.testing.assert_close(logits, expected_logits(base, made), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits, base(IDS).logits, atol=1e-2)


def test_a_layer_that_is_itself_called_up_proj(base, house, tmp_path):
    """Llama's own up_proj and down_proj carry the old names of A and B in their paths."""
    made = weights(base, ends=("up_proj", "down_proj"))
    source = checkpoint(tmp_path / "cera.pt", made, ("up_proj", "down_proj"))
    found = import_adapter(source, tmp_path / "adapter", base_model=str(house / "base"))
    assert found["target_modules"] == ["down_proj", "up_proj"]
    torch.testing.assert_close(
        loaded_logits(house, tmp_path / "adapter"), expected_logits(base, made), rtol=1e-4, atol=1e-5
    )


def test_ranks_that_differ(base, house, tmp_path):
    made = weights(base, ranks={"model.layers.1.self_attn.v_proj": 5})
    found = import_adapter(checkpoint(tmp_path / "c.pt", made), tmp_path / "a", base_model=str(house / "base"))
    assert found["r"] == 3
    torch.testing.assert_close(loaded_logits(house, tmp_path / "a"), expected_logits(base, made), rtol=1e-4, atol=1e-5)


def test_half_precision_tensors(base, house, tmp_path):
    made = {name: (A.bfloat16(), B.bfloat16()) for name, (A, B) in weights(base).items()}
    import_adapter(checkpoint(tmp_path / "c.pt", made), tmp_path / "a", base_model=str(house / "base"))
    torch.testing.assert_close(loaded_logits(house, tmp_path / "a"), expected_logits(base, made), rtol=1e-4, atol=1e-5)


def test_what_the_source_cannot_say_can_be_set(base, house, tmp_path):
    source = checkpoint(tmp_path / "c.pt", weights(base))
    settings = {"cera_activation": "identity", "lora_dropout": 0.3}
    import_adapter(source, tmp_path / "a", base_model=str(house / "base"), settings=settings)
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (config["cera_activation"], config["lora_dropout"]) == ("identity", 0.3)


class Malice:
    def __reduce__(self):
        return (eval, ("1 + 1",))


def without(made, *names):
    return {name: pair for name, pair in made.items() if name not in names}


def broken_checkpoints(base, path):
    """What can be wrong → (how the file is made, what the refusal says)."""
    made, first, last = weights(base), layer_names(base)[0], layer_names(base)[-1]
    A, B = made[first]
    return {
        "a code to run": (lambda: torch.save({"model_state_dict": {}, "x": Malice()}, path), "would have to be run"),
        "no checkpoint": (lambda: path.write_text("hello"), "damaged"),
        "cut short": (lambda: path.write_bytes(checkpoint(path, made).read_bytes()[:-2000]), "damaged"),
        "a list": (lambda: torch.save([A], path), "no model_state_dict; it holds list"),
        "another dictionary": (lambda: torch.save({"weights": {}}, path), "no model_state_dict; it holds weights"),
        "an empty one": (lambda: torch.save({"model_state_dict": {}}, path), "holds nothing"),
        "no adapter": (
            lambda: torch.save({"model_state_dict": {"model.q_proj.lora_A.weight": A}}, path),
            "holds no adapter.*lora_A",
        ),
        "a tensor left over": (lambda: checkpoint(path, made, more={"lm_head.weight": B}), "1 tensors that are no"),
        "no B": (
            lambda: torch.save({"model_state_dict": {f"{first}.cera.A.weight": A}}, path),
            rf"the B of {first} is missing",
        ),
        "both generations": (
            lambda: checkpoint(path, made, more={f"{first}.cera.up_proj.weight": A}),
            "twice, under its old and new name",
        ),
        "a layer less": (lambda: checkpoint(path, without(made, last)), f"not in 1 others .*{last}"),
        "a foreign layer": (
            lambda: checkpoint(path, made | {"model.layers.7.self_attn.q_proj": (A, B)}),
            r"no linear layer model\.layers\.7.*nearest name is model\.layers\.\d\.self_attn\.q_proj",
        ),
        "a layer that is not linear": (
            lambda: checkpoint(path, made | {"model.embed_tokens": (A, B)}),
            r"no linear layer model\.embed_tokens",
        ),
        "another width": (lambda: checkpoint(path, made | {first: (A[:, :-1], B)}), r"has shape \(3, 31\)"),
        "ranks of A and B": (lambda: checkpoint(path, made | {first: (A[:2], B)}), "do not fit together"),
        "a vector": (lambda: checkpoint(path, made | {first: (A[0], B)}), "is no matrix"),
        "nan": (lambda: checkpoint(path, made | {first: (A * float("nan"), B)}), "of finite numbers"),
        "not tensors": (
            lambda: torch.save({"model_state_dict": {f"{first}.cera.A.weight": 3}}, path),
            "where tensors belong",
        ),
    }


@pytest.mark.parametrize("case", range(18))
def test_a_checkpoint_is_taken_whole_or_not_at_all(case, base, house, tmp_path):
    cases = broken_checkpoints(base, tmp_path / "c.pt")
    assert len(cases) == 18
    make, message = list(cases.values())[case]
    make()
    with pytest.raises(ValueError, match=f"(?s){message}"):
        import_adapter(tmp_path / "c.pt", tmp_path / "a", base_model=str(house / "base"))
    assert not (tmp_path / "a").exists()


# The StelLA authors' folders -----------------------------------------------------------------------------------------


def orthonormal(rows, rank, draw):
    return np.linalg.qr(draw.normal(size=(rows, rank)))[0]


def stella_folder(folder, base, *, rank=4, dtype=torch.float32, diagonal=False, **config):
    """A folder as the authors' package (on PEFT 0.14) writes it, and its factors."""
    draw, tensors, factors = np.random.default_rng(0), {}, {}
    for name in layer_names(base):
        layer = base.get_submodule(name)
        U, V = orthonormal(layer.out_features, rank, draw), orthonormal(layer.in_features, rank, draw)
        S = draw.normal(size=rank if diagonal else (rank, rank))
        factors[name] = (U, S, V.T)
        for letter, matrix in zip(("U", "S", "Vt"), factors[name], strict=True):
            key = f"base_model.model.{name}.stella_{letter}.weight"
            tensors[key] = torch.tensor(matrix, dtype=dtype).contiguous()
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    written = {
        "auto_mapping": None,
        "base_model_name_or_path": "meta-llama/gone",
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": 8,
        "lora_dropout": 0.05,
        "megatron_config": None,
        "megatron_core": "megatron.core",
        "modules_to_save": None,
        "peft_type": "STELLA",
        "r": rank,
        "rank_pattern": {},
        "alpha_pattern": {},
        "revision": None,
        "stella_diag_s": diagonal,
        "stella_grad_scaling": True,
        "stella_retraction": "polar",
        "target_modules": ["v_proj", "q_proj"],
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }
    (folder / "adapter_config.json").write_text(json.dumps(written | config))
    return folder, factors


def stella_logits(base, factors, scaling):
    def add(layer, U, S, Vt):
        def hook(_module, arguments, output):
            x = arguments[0].detach().double().numpy().reshape(-1, layer.in_features)
            return output + torch.from_numpy(reference.stella(x, U, S, Vt, scaling).reshape(output.shape)).float()

        return layer.register_forward_hook(hook)

    handles = [add(base.get_submodule(name), *parts) for name, parts in factors.items()]
    with torch.no_grad():
        logits = base(IDS).logits
    for handle in handles:
        handle.remove()
    return logits


@pytest.mark.parametrize("diagonal", [False, True])
def test_a_folder_of_the_authors_computes_what_the_paper_says(diagonal, base, house, tmp_path):
    source, factors = stella_folder(tmp_path / "theirs", base, diagonal=diagonal)
    found = import_adapter(source, tmp_path / "ours", base_model=str(house / "base"))
    assert found["base_model"] == str(house / "base")
    assert (found["r"], found["layers"], found["repaired"]) == (4, 4, [])
    torch.testing.assert_close(
        loaded_logits(house, tmp_path / "ours"), stella_logits(base, factors, 2.0), rtol=1e-4, atol=1e-5
    )


def test_factors_stored_in_bfloat16_go_back_to_the_manifold(base, house, tmp_path):
    source, factors = stella_folder(tmp_path / "theirs", base, dtype=torch.bfloat16)
    found = import_adapter(source, tmp_path / "ours", base_model=str(house / "base"))
    assert len(found["repaired"]) == 8
    for key, tensor in load_file(tmp_path / "ours" / "adapter_model.safetensors").items():
        if "stella_S" not in key:
            tall = tensor.mT if "Vt" in key else tensor
            assert distance_to_stiefel(tall) < 1e-6
            letter = 2 if "Vt" in key else 0
            there = factors[key.split(".", 2)[2].rsplit(".", 2)[0]][letter]
            np.testing.assert_allclose(tensor.numpy(), there, rtol=0, atol=1e-2)  # bfloat16 holds 8 bits


def edit(folder, change):
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


def stretch(tensors):
    key = next(key for key in tensors if "stella_U" in key)
    tensors[key] = tensors[key] * 1.5


FOLDERS = {
    "a switched-on feature of another version": ({"use_dora": True}, None, "use_dora=True"),
    "a value out of range": ({"lora_dropout": 7}, None, "lora_dropout=7"),
    "another task": ({"task_type": "SEQ_CLS"}, None, "causal language models only"),
    "a method of PEFT": ({"peft_type": "LORA"}, None, "needs no import"),
    "an unknown method": ({"peft_type": "NOVA"}, None, "NOVA"),
    "another rank": ({"r": 3}, None, "has shape"),
    "targets of another model": ({"target_modules": ["query"]}, None, "query"),
    "fewer targets": ({"target_modules": ["q_proj"]}, None, "unknown"),
    "a missing tensor": ({}, lambda t: t.pop(next(iter(t))), "1 missing"),
    "a strange tensor": ({}, lambda t: t.update(x=torch.ones(1)), "1 unknown"),
    "a factor that is none": ({}, stretch, "off the Stiefel manifold"),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_a_folder_is_taken_whole_or_not_at_all(case, base, house, tmp_path):
    config, change, message = FOLDERS[case]
    source, _ = stella_folder(tmp_path / "theirs", base, **config)
    if change:
        edit(source, change)
    with pytest.raises(ValueError, match=message):
        import_adapter(source, tmp_path / "ours", base_model=str(house / "base"))
    assert not (tmp_path / "ours").exists()


# The command ---------------------------------------------------------------------------------------------------------


def call(*arguments):
    return CliRunner(env={"COLUMNS": "80"}).invoke(app, [*map(str, arguments)])


def test_the_command_says_what_it_found(base, house, tmp_path):
    source = checkpoint(tmp_path / "c.pt", weights(base))
    done = call("import", source, "--base-model", house / "base", "--out", tmp_path / "a", "--set", "lora_dropout=3e-1")
    assert done.exit_code == 0, done.stderr
    assert done.stdout == f"CERA, r=3, 4 layers (q_proj, v_proj) of {house / 'base'}\n"
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["lora_dropout"] == 0.3


def test_bad_input_is_a_sentence_and_exit_code_2(base, house, tmp_path):
    source, out, model = checkpoint(tmp_path / "c.pt", weights(base)), tmp_path / "a", house / "base"
    for words, message in [
        ([tmp_path / "nowhere.pt", "--out", out], "does not exist"),
        ([source, "--out", out], "name it with --base-model"),
        ([source, "--out", tmp_path, "--base-model", model], "there already"),
        ([source, "--out", out, "--base-model", tmp_path / "gone"], "there is no folder"),
        ([source, "--out", out, "--base-model", model, "--set", "cera_activatio=relu"], "did you mean cera_activation"),
        ([source, "--out", out, "--base-model", model, "--set", "rank"], "of the form key=value"),
        ([source, "--out", out, "--base-model", model, "--set", "r=[8"], "line 1: not valid YAML"),
        ([source], "--out"),
    ]:
        done = call("import", *words)
        assert done.exit_code == 2, words
        assert message in " ".join(done.stderr.split()), done.stderr
        assert not out.exists()


def test_linear_layers_are_told_from_others():
    from beyondlora.targets import shortest_targets

    modules = {"a.proj": nn.Linear(2, 2), "b.proj": nn.Conv1d(2, 2, 1), "b.x": nn.Linear(2, 2)}
    assert shortest_targets(["a.proj", "b.x"], modules) == ["a.proj", "x"]
