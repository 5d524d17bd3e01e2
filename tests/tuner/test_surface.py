"""The rest of what PEFT offers LoRA, for one configuration of each method; and what is refused."""

import copy
import shutil

import pytest
import small_models
import torch
from huggingface_hub import ModelCard
from methods import METHODS, every_method, one_of_each_paper
from peft import (
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    AutoPeftModelForSequenceClassification,
    LoraConfig,
    PeftConfig,
    PeftMixedModel,
    PeftModel,
    get_layer_status,
    get_model_status,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.utils.hotswap import hotswap_adapter as peft_hotswap
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.utils.checkpoint import checkpoint

from beyondlora import StellaConfig
from beyondlora.tuner.base_layers import layer_problem
from beyondlora.tuner.layer import AdapterLayer

IDS = small_models.tokens()


def adapted(method, **options):
    torch.manual_seed(0)
    options = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", "init_lora_weights": False, **options}
    return get_peft_model(small_models.llama(), method.config(**options))


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


@one_of_each_paper
def test_token_rows_are_trained_and_saved_beside_the_adapter(method, tmp_path):
    model = adapted(method, trainable_token_indices={"embed_tokens": [5, 7]})
    before = model.get_input_embeddings().token_adapter.trainable_tokens_delta["default"].clone()
    small_models.train_a_little(model, steps=4)
    delta = model.get_input_embeddings().token_adapter.trainable_tokens_delta["default"]
    assert delta.shape == (2, 32)
    assert not torch.equal(delta, before)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(small_models.llama(), tmp_path)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=0)


def tied_llama():
    base = small_models.llama()
    base.config.tie_word_embeddings = True
    base.tie_weights()
    return base


@one_of_each_paper
def test_token_rows_of_tied_embeddings_are_trained_in_both_places(method, tmp_path):
    config = method.config(target_modules=["q_proj"], trainable_token_indices=[5, 7], task_type="CAUSAL_LM")
    model = get_peft_model(tied_llama(), config)
    small_models.train_a_little(model, steps=4)
    inner = model.get_base_model()
    table, head = (m.token_adapter.get_merged_weights(["default"]) for m in (inner.model.embed_tokens, inner.lm_head))
    assert torch.equal(table, head)
    moved = (table != tied_llama().lm_head.weight).any(dim=1)
    assert moved.nonzero().flatten().tolist() == [5, 7]
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tied_llama(), tmp_path)), logits(model))


@one_of_each_paper
def test_merging_a_tied_embedding_warns_that_the_head_changes_too(method):
    config = method.config(target_modules=["embed_tokens"], task_type="CAUSAL_LM")
    with pytest.warns(UserWarning, match="a tied layer is part of the adapter"):
        model = get_peft_model(tied_llama(), config)
    with pytest.warns(UserWarning, match="untie the embeddings"):
        model.merge_adapter()


@pytest.mark.filterwarnings("ignore:.*(tied layer|untie the embeddings|no longer tied|additionally merging)")
@pytest.mark.parametrize("method", [m for m in METHODS if m.merge == "exact"], ids=lambda m: m.name)
def test_tied_embeddings_with_adapters_on_both_sides_are_unmerged_to_the_bit(method):
    options = {"target_modules": ["embed_tokens", "lm_head"], "task_type": "CAUSAL_LM", "init_lora_weights": False}
    model = get_peft_model(tied_llama(), method.config(**{**options, **method.options})).eval()
    attached, table = logits(model), tied_llama().lm_head.weight
    model.add_adapter("head", method.config(**{**options, "target_modules": ["lm_head"]}))
    for adapters in (["head"], ["default"]):  # first the head's, then both
        model.merge_adapter(adapters)
    twin = copy.deepcopy(model)
    model.unmerge_adapter()
    with twin.disable_adapter():  # each layer is unmerged when it is called
        assert torch.equal(logits(twin), logits(tied_llama()))
    for each in (model, twin):
        assert torch.equal(each.get_base_model().lm_head.get_base_layer().weight, table)
        assert torch.equal(logits(each), attached)


@one_of_each_paper
def test_tied_embeddings_stay_tied(method):
    model = get_peft_model(tied_llama(), method.config(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    small_models.train_a_little(model)
    inner = model.get_base_model()
    assert inner.lm_head.weight.data_ptr() == inner.model.embed_tokens.weight.data_ptr()
    assert not inner.lm_head.weight.requires_grad


@every_method
@pytest.mark.parametrize("watched", [False, True], ids=["at once", "one by one"])
@pytest.mark.parametrize("rows", [4, 150, 3000])
def test_reentrant_checkpointing_draws_the_same_dropout_again(method, rows, watched):
    """It calls a layer without gradients and then with them, whatever way each of them goes."""
    torch.manual_seed(0)
    config = method.config(target_modules=["0"], r=4, lora_dropout=0.3, init_lora_weights=False)
    model = inject_adapter_in_model(config, nn.Sequential(nn.Linear(64, 64))).train()
    if watched:
        model[0].base_layer.register_forward_hook(lambda *_: None)
    x = torch.randn(rows, 64, requires_grad=True)

    def gradients(way):
        torch.manual_seed(1)
        model.zero_grad()
        y = way(x)
        y.square().sum().backward()
        found, x.grad = x.grad, None
        return [y.detach(), found, *(weight.grad for weight in model.parameters() if weight.requires_grad)]

    pairs = zip(gradients(lambda x: checkpoint(model, x, use_reentrant=True)), gradients(model), strict=True)
    assert all(torch.equal(mine, expected) for mine, expected in pairs)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
@one_of_each_paper
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_no_gradient(method, use_reentrant):
    def gradients(checkpointing: bool) -> dict[str, torch.Tensor]:
        model = adapted(method, lora_dropout=0.0)
        model.train()
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    plain, checkpointed = gradients(False), gradients(True)
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in plain.values())
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient)


@one_of_each_paper
def test_compiling_breaks_the_graph_no_more_than_lora_does(method):
    def graphs(config) -> int:
        torch._dynamo.reset()
        model = get_peft_model(small_models.Perceptron(), config).train()
        return torch._dynamo.explain(model)(torch.randn(3, 16)).graph_count

    options = {"r": 2, "target_modules": ["first", "second"], "lora_dropout": 0.1}
    assert graphs(method.config(**options)) == graphs(LoraConfig(**options)) == 1


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on a CPU needs a C++ compiler")
@one_of_each_paper
def test_training_compiled_is_training(method):
    start = {} if method.name == "stella" else {"init_lora_weights": False}
    losses = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = get_peft_model(small_models.llama(), method.config(target_modules="all-linear", **start)).eval()
        step = torch.compile(model) if compiled else model
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        losses.append([])
        for _ in range(4):
            loss = step(input_ids=IDS, labels=IDS).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[0][3] < losses[0][0] - 0.01


@one_of_each_paper
def test_layers_are_found_from_a_state_dict_alone(method):
    model = adapted(method, target_modules=r".*layers\.1.*(q_proj|up_proj)")
    state = {
        name.removeprefix("base_model.model."): tensor for name, tensor in get_peft_model_state_dict(model).items()
    }
    config = method.config(target_modules=["o_proj"], init_lora_weights=False)
    with pytest.warns(RuntimeWarning, match="inconsistency"):  # the config says other layers, on purpose
        injected = inject_adapter_in_model(config, small_models.llama(), state_dict=state)
    found = {name for name, module in injected.named_modules() if isinstance(module, AdapterLayer)}
    assert found == {"model.layers.1.self_attn.q_proj", "model.layers.1.mlp.up_proj"}
    assert not set_peft_model_state_dict(injected, state).unexpected_keys
    torch.testing.assert_close(logits(injected), logits(model))


@one_of_each_paper
def test_status_calls_and_counts(method, capsys):
    model = adapted(method)
    status = get_model_status(model)
    assert (status.enabled, status.active_adapters, status.merged_adapters) == (True, ["default"], [])
    assert status.num_adapter_layers == 4
    assert status.peft_types == {"default": method.config_cls.method.upper()}
    assert all(layer.requires_grad == {"default": True} for layer in get_layer_status(model))
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    model.print_trainable_parameters()
    assert f"trainable params: {trainable:,}" in capsys.readouterr().out


@one_of_each_paper
def test_a_config_can_be_given_at_loading(method, tmp_path):
    model = adapted(method)
    model.save_pretrained(tmp_path)
    config = PeftConfig.from_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(small_models.llama(), tmp_path, config=config)
    assert loaded.peft_config["default"] is config
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=0)


@one_of_each_paper
def test_the_model_card_is_ready_for_the_hub(method, tmp_path):
    base = small_models.llama()
    base.name_or_path = base.config._name_or_path = "somebody/base"  # as from_pretrained leaves them
    model = get_peft_model(base, method.config(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path, save_embedding_layers=False)  # "auto" would ask the hub
    card = ModelCard.load(tmp_path / "README.md").data
    assert (card.library_name, card.base_model) == ("peft", "somebody/base")
    assert "base_model:adapter:somebody/base" in card.tags
    assert "lora" not in card.tags  # servers would take it for one


AUTO_CLASSES = [
    (AutoPeftModel, small_models.llama, None, {}),
    (AutoPeftModelForCausalLM, small_models.llama, "CAUSAL_LM", {}),
    (AutoPeftModelForSequenceClassification, small_models.bert, "SEQ_CLS", {"num_labels": 3}),
]


@one_of_each_paper
@pytest.mark.parametrize(("auto", "family", "task", "options"), AUTO_CLASSES, ids=["any", "decoder", "classifier"])
def test_auto_classes_find_the_base_model_by_themselves(method, auto, family, task, options, tmp_path):
    base = family()
    base.save_pretrained(tmp_path / "base")
    base.name_or_path = str(tmp_path / "base")
    targets = ["q_proj"] if family is small_models.llama else ["query"]
    model = get_peft_model(base, method.config(target_modules=targets, task_type=task, init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    loaded = auto.from_pretrained(tmp_path / "adapter", **options)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=0)
    assert not torch.equal(logits(loaded), logits(family()))


@one_of_each_paper
def test_a_model_without_memory_waits_for_its_weights(method):
    saved = adapted(method)
    state = get_peft_model_state_dict(saved)
    config = method.config(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(small_models.llama(), config, low_cpu_mem_usage=True)
    ours = {name: p.device.type for name, p in model.named_parameters() if method.prefix in name}
    assert set(ours.values()) == {"meta"}
    assert len(ours) == len(state)
    set_peft_model_state_dict(model, state, low_cpu_mem_usage=True)
    torch.testing.assert_close(logits(model), logits(saved), rtol=0, atol=0)


@one_of_each_paper
def test_mixed_models_are_closed_to_outside_methods(method):
    with pytest.raises(ValueError, match=r"not compatible with .*PeftMixedModel"):
        get_peft_model(small_models.Perceptron(), method.config(r=2, target_modules=["first"]), mixed=True)
    lora = get_peft_model(small_models.Perceptron(), LoraConfig(target_modules=["second"]), mixed=True)
    assert isinstance(lora, PeftMixedModel)
    with pytest.raises(ValueError, match="not compatible"):
        lora.add_adapter("ours", method.config(r=2, target_modules=["first"]))


@one_of_each_paper
def test_saved_adapters_do_not_get_into_mixed_models_nor_through_pefts_hotswap(method, tmp_path):
    model = get_peft_model(small_models.Perceptron(), method.config(r=2, target_modules=["first"]))
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="not supported for mixed models"):
        PeftMixedModel.from_pretrained(small_models.Perceptron(), tmp_path)
    with pytest.raises(ValueError, match="Hotswapping only supports LORA"):
        peft_hotswap(model, str(tmp_path), "default")


def test_a_weight_that_is_split_over_a_mesh_is_refused_unless_the_split_is_fsdps(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        for dimension, refused in (("tp", True), ("fsdp", False)):
            layer = torch.nn.Linear(4, 4)
            mesh = init_device_mesh("cpu", (1,), mesh_dim_names=(dimension,))
            layer.weight = torch.nn.Parameter(distribute_tensor(layer.weight.detach(), mesh, [Shard(0)]))
            problem = layer_problem(layer)
            assert ("tensor parallelism" in (problem or "")) is refused, dimension
    finally:
        torch.distributed.destroy_process_group()


def test_layers_split_by_tensor_parallelism_are_refused():
    base = small_models.Perceptron()
    base.first._hf_tp_plan = "colwise"
    with pytest.raises(ValueError, match=r"first is a Linear: it is split over devices by tensor parallelism.*FSDP2"):
        get_peft_model(base, StellaConfig(r=2, target_modules=["first"]))
