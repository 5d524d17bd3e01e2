"""Model cards: who gets an adapter folder is told of the import without which PEFT cannot load it."""

import pytest
import small_models
from huggingface_hub import ModelCard
from methods import METHODS
from peft import LoraConfig, get_peft_model

LOADING = "    import beyondlora\n    from peft import PeftModel\n\n    model = PeftModel.from_pretrained(base, "
every_method = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)


def adapted(config, name="default"):
    return get_peft_model(small_models.llama(), config, adapter_name=name)


@every_method
def test_a_saved_adapter_says_how_it_is_loaded(method, tmp_path):
    model = adapted(method.config(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    for _ in range(2):  # a second save says it no second time
        model.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.text.count("import beyondlora") == 1
    start = card.text.index("## How to Get Started with the Model")
    assert start < card.text.index(f"A {method.config_cls.method} adapter") < card.text.index("## Training Details")
    assert LOADING in card.text
    assert "beyondlora" in card.data.tags
    assert "base_model:adapter:" in "".join(card.data.tags)  # PEFT's own tags stay
    assert card.data.library_name == "peft"


def test_so_does_the_card_above_adapters_that_have_names(tmp_path):
    model = adapted(METHODS[0].config(target_modules=["q_proj"]), name="french")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "french" / "adapter_config.json").exists()
    assert LOADING in (tmp_path / "README.md").read_text(encoding="utf-8")


def test_a_card_that_others_have_written_gets_the_lines_at_its_end(tmp_path):
    (tmp_path / "README.md").write_text("---\nlibrary_name: peft\nlicense: mit\n---\n# Mine\n\nWords.\n")
    adapted(METHODS[0].config(target_modules=["q_proj"])).save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.license == "mit"
    assert card.text.index("Words.") < card.text.index("## How to load it") < card.text.index("import beyondlora")


def test_the_card_above_stays_as_it_is_where_it_is_of_another_adapter(tmp_path):
    adapted(LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    adapted(METHODS[0].config(target_modules=["q_proj"])).save_pretrained(tmp_path / "experiment")
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == card
    assert LOADING in (tmp_path / "experiment" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "text",
    ["# My project\n\nlibrary_name: peft\n", "---\nlibrary_name: peft\nlicense: [mit\n---\n"],
    ids=["no card", "broken"],
)
def test_a_readme_that_is_no_card_of_an_adapter_stays_as_it_is(text, tmp_path):
    (tmp_path / "README.md").write_text(text)
    METHODS[0].config(target_modules=["q_proj"]).save_pretrained(str(tmp_path))
    assert (tmp_path / "README.md").read_text() == text
    assert (tmp_path / "adapter_config.json").exists()


def test_a_lora_beside_is_left_to_peft(tmp_path):
    adapted(LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    assert "beyondlora" not in (tmp_path / "README.md").read_text(encoding="utf-8")
