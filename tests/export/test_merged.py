"""A merged model: what transformers loads equals the live adapter, tied embeddings or not, or nothing is written."""

import pytest
import small_models
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import beyondlora
from beyondlora.export.merged import export_merged

pytestmark = pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
CONFIGS = {"lora": LoraConfig, "stella": beyondlora.StellaConfig}


class NoProcessor:
    def save_pretrained(self, folder):
        pass


def tied(kind, targets):
    config = small_models.llama().config
    config.tie_word_embeddings = True
    torch.manual_seed(0)
    model = get_peft_model(LlamaForCausalLM(config).eval(), CONFIGS[kind](r=4, target_modules=targets))
    small_models.train_a_little(model)
    return model


def write(model, folder, reload=AutoModelForCausalLM.from_pretrained):
    batches = [{"input_ids": small_models.tokens()}]
    return export_merged(model, folder, base_model="base", processor=NoProcessor(), reload=reload, batches=batches)


@pytest.mark.parametrize("targets", [["lm_head"], ["embed_tokens"], ["embed_tokens", "lm_head"], ["q_proj"]], ids=str)
@pytest.mark.parametrize("kind", CONFIGS)
def test_of_tied_embeddings_the_written_model_is_the_live_one(kind, targets, tmp_path):
    model = tied(kind, targets)
    assert write(model, tmp_path / "merged")["form"] == "exact"
    loaded, ids = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval(), small_models.tokens(seed=7)
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(input_ids=ids).logits, rtol=1e-5, atol=1e-5)
    assert loaded.config.tie_word_embeddings == (targets == ["q_proj"])
    assert model.get_base_model().config.tie_word_embeddings  # the live model stays as it was
    embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
    assert getattr(embedding, "base_layer", embedding).weight is getattr(output, "base_layer", output).weight


def test_a_merged_model_that_does_not_equal_the_adapter_never_gets_its_name(tmp_path):
    def another(folder):
        model = AutoModelForCausalLM.from_pretrained(folder)
        nn.init.zeros_(model.model.layers[0].mlp.down_proj.weight)
        return model

    with pytest.raises(ValueError, match="The merged model differs from the adapter it should equal: the logits"):
        write(tied("stella", ["q_proj"]), tmp_path / "merged", reload=another)
    assert list(tmp_path.iterdir()) == []


def test_what_changes_no_weight_is_not_merged(tmp_path):
    model = get_peft_model(small_models.llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(ValueError, match=r"type PROMPT_TUNING: .* nothing to merge\. Serve it with PEFT"):
        write(model, tmp_path / "merged")


def test_what_cannot_be_copied_is_not_merged(tmp_path):
    config = small_models.llama().config
    config.tie_word_embeddings = True
    model = get_peft_model(
        LlamaForCausalLM(config), LoraConfig(r=2, target_modules=["embed_tokens"], ensure_weight_tying=True)
    )
    with pytest.raises(ValueError, match=r"cannot be copied .* model\.merge_and_unload"):
        write(model, tmp_path / "merged")
