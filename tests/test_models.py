import json
import logging as stdlib_logging
import shutil

import huggingface_hub.constants
import pytest
import small_models
import small_runs
import torch
import transformers
from shared_data import MINILM, STORIES, VIT, needs_minilm, needs_shared

from beyondlora import models


@pytest.fixture
def stories(tmp_path):
    """A copy of stories260K that a test may damage."""
    return shutil.copytree(STORIES, tmp_path / "stories", copy_function=_writable_copy)


def _writable_copy(source, target):
    shutil.copyfile(source, target)
    return target


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# Names ----------------------------------------------------------------------------------------------------------------


def test_a_name_with_one_slash_is_left_to_the_hub():
    assert models.resolve_name("meta-llama/Llama-3.1-8B") == "meta-llama/Llama-3.1-8B"
    assert models.resolve_name("gpt2") == "gpt2"


@pytest.mark.parametrize("name", ["./nothing", "../nothing", "/nothing", "~/nothing-here", "a/b/c"])
def test_what_can_only_be_a_folder_must_be_there(name):
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        models.resolve_name(name)


def test_a_model_inside_an_installed_package(tmp_path, monkeypatch):
    (tmp_path / "some_model_package" / "inner").mkdir(parents=True)
    (tmp_path / "some_model_package" / "__init__.py").touch()
    (tmp_path / "some_model_package" / "inner" / "config.json").write_text("{}")
    monkeypatch.syspath_prepend(tmp_path)
    assert models.resolve_name("package:some_model_package/inner") == str(tmp_path / "some_model_package" / "inner")
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        models.resolve_name("package:some_model_package/other")
    with pytest.raises(FileNotFoundError, match="'no_such_package' is not installed"):
        models.resolve_name("package:no_such_package/inner")
    with pytest.raises(FileNotFoundError, match="not installed"):
        models.resolve_name("package:os.path/inner")


def test_a_folder_without_a_model_says_what_it_holds(tmp_path):
    with pytest.raises(ValueError, match=r"no config\.json.*holds nothing"):
        models.resolve_name(str(tmp_path))
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ValueError, match=r"holds notes\.txt"):
        models.resolve_name(str(tmp_path))
    with pytest.raises(ValueError, match="is a file"):
        models.resolve_name(str(tmp_path / "notes.txt"))
    (tmp_path / "adapter_config.json").touch()
    with pytest.raises(ValueError, match="an adapter, not a base model"):
        models.resolve_name(str(tmp_path))


def test_an_unreachable_hub_is_said_so(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"'nobody/nothing'.*no local folder.*hub cannot be reached"):
        models.load_base("nobody/nothing", task="causal-lm")


@pytest.mark.parametrize(
    ("message", "advice"),
    [
        ("You are trying to access a gated repo.", "hf auth login"),
        ("x is not a local folder and is not a valid model identifier listed on", "check the spelling"),
        ("We couldn't connect to 'https://huggingface.co'", "check the name and the network"),
    ],
)
def test_what_the_hub_answers_becomes_advice(monkeypatch, message, advice):
    def fail(*_, **__):
        raise OSError(message)

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", fail)
    with pytest.raises(ValueError, match=f"model_name_or_path='nobody/nothing'.*{advice}"):
        models.load_processor("nobody/nothing", task="causal-lm")


@needs_shared
def test_a_number_in_a_path_is_no_answer_of_the_hub(stories):
    place = stories.rename(stories.with_name("run-401"))
    (place / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"run-401'.*no file named model\.safetensors"):
        models.load_base(str(place), task="causal-lm")


# Base models ----------------------------------------------------------------------------------------------------------


@needs_shared
def test_a_language_model_has_the_folders_weights(capfd):
    from safetensors.torch import load_file

    model = models.load_base(str(STORIES), task="causal-lm")
    stored = load_file(STORIES / "model.safetensors")
    for name, weight in model.state_dict().items():
        if name != "lm_head.weight":  # tied
            torch.testing.assert_close(weight, stored[name], rtol=0, atol=0)
    assert capfd.readouterr() == ("", "")


@needs_shared
@pytest.mark.parametrize(("name", "dtype"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_weights_are_in_the_dtype_asked_for(name, dtype):
    model = models.load_base(str(STORIES), task="causal-lm", dtype=name)
    assert {weight.dtype for weight in model.parameters()} == {dtype}


@pytest.fixture
def said():
    """What transformers' logger lets through; its own handler may hold a stream from before the test."""
    from transformers.utils import logging

    records = []
    handler = stdlib_logging.Handler()
    handler.emit = records.append
    logging.add_handler(handler)
    yield records
    logging.remove_handler(handler)


@needs_shared
def test_an_image_model_gets_a_new_head_and_only_that_and_says_nothing(capfd, said):
    names = ["banded", "blotchy", "braided"]
    torch.manual_seed(0)
    model = models.load_base(str(VIT), task="image-classification", label_names=names)
    original = transformers.ViTForImageClassification.from_pretrained(VIT)
    capfd.readouterr()
    said.clear()
    torch.manual_seed(0)
    again = models.load_base(str(VIT), task="image-classification", num_labels=3)
    assert (said, capfd.readouterr()) == ([], ("", ""))
    assert model.config.id2label == dict(enumerate(names))
    assert model.config.label2id == {"banded": 0, "blotchy": 1, "braided": 2}
    assert model.classifier.weight.shape == (3, 192)
    torch.testing.assert_close(model.classifier.weight, again.classifier.weight, rtol=0, atol=0)  # the seed decides
    for weight, its in zip(model.vit.parameters(), original.vit.parameters(), strict=True):
        torch.testing.assert_close(weight, its, rtol=0, atol=0)


@needs_minilm
def test_sequence_models_have_one_output_a_class_or_one_number(capfd):
    classifier = models.load_base(MINILM, task="sequence-classification", label_names=["entailment", "not_entailment"])
    regressor = models.load_base(MINILM, task="sequence-regression")
    assert classifier.classifier.out_features == 2
    assert (regressor.classifier.out_features, regressor.config.problem_type) == (1, "regression")
    assert capfd.readouterr() == ("", "")


@needs_shared
def test_a_decoder_that_classifies_knows_the_pad_token(stories):
    edit(stories / "config.json", pad_token_id=None)
    tokenizer = models.load_processor(str(stories), task="sequence-classification")
    model = models.load_base(
        str(stories), task="sequence-classification", num_labels=2, pad_token_id=tokenizer.pad_token_id
    )
    batch = tokenizer(["Once upon a time", "Once"], padding=True, return_tensors="pt")
    # transformers refuses a batch where it does not know the pad token; padding must not change a row.
    both = model(**batch).logits
    torch.testing.assert_close(both[1:], model(**tokenizer("Once", return_tensors="pt")).logits)


@needs_shared
def test_transformers_is_left_as_talkative_as_it_was(request):
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    request.addfinalizer(lambda: (logging.set_verbosity(before[0]), logging.enable_progress_bar()))
    logging.set_verbosity_info()
    logging.enable_progress_bar()
    models.load_base(str(STORIES), task="causal-lm")
    with pytest.raises(ValueError, match="cannot load"):
        models.load_base(str(STORIES), task="image-classification", num_labels=2)
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == (logging.INFO, True)


@needs_shared
def test_a_model_of_another_kind_is_refused():
    with pytest.raises(ValueError, match=r"a model for image-classification.*no such form.*LlamaConfig"):
        models.load_base(str(STORIES), task="image-classification", num_labels=2)
    with pytest.raises(ValueError, match="num_labels or label_names"):
        models.load_base(str(STORIES), task="sequence-classification")


@needs_minilm
def test_weights_that_are_missing_are_not_filled_with_noise():
    # MiniLM has no language head; transformers would draw one at random.
    with pytest.raises(ValueError, match=r"6 weights are missing.*cls\.predictions"):
        models.load_base(MINILM, task="causal-lm")


@needs_shared
def test_weights_of_another_shape_are_not_replaced_by_noise(stories):
    edit(stories / "config.json", intermediate_size=100)
    for task in ("causal-lm", "sequence-regression"):
        with pytest.raises(ValueError, match=r"stories.*(another shape|mismatch)"):
            models.load_base(str(stories), task=task)


@needs_shared
def test_damaged_weights_are_said_so(stories):
    weights = stories / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="damaged or cut short"):
        models.load_base(str(stories), task="causal-lm")
    weights.unlink()
    with pytest.raises(ValueError, match=r"stories.*model\.safetensors"):
        models.load_base(str(stories), task="causal-lm")
    (stories / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json"):
        models.load_base(str(stories), task="causal-lm")


def test_a_body_that_misfits_is_refused_whatever_its_class_calls_it(tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    vision = {**sizes, "image_size": 16, "patch_size": 8}
    model = transformers.CLIPForImageClassification(transformers.CLIPConfig(vision_config=vision, num_labels=2))
    model.save_pretrained(tmp_path)
    assert models.begun_anew(models.load_base(str(tmp_path), task="image-classification", num_labels=2)) == []
    assert models.begun_anew(models.load_base(str(tmp_path), task="image-classification", num_labels=3)) == [
        "classifier"
    ]
    edit(tmp_path / "config.json", vision_config={**vision, "intermediate_size": 24})
    with pytest.raises(ValueError, match=r"weights are missing or have another shape .*vision_model"):
        models.load_base(str(tmp_path), task="image-classification", num_labels=3)


# Tokenizers and image processors --------------------------------------------------------------------------------------


@needs_shared
def test_a_tokenizer_pads_on_the_right_and_with_the_end_token_where_it_has_no_pad_token(stories):
    edit(stories / "tokenizer_config.json", pad_token=None, padding_side="left")
    tokenizer = models.load_processor(str(stories), task="causal-lm")
    assert (tokenizer.padding_side, tokenizer.pad_token) == ("right", "</s>")
    edit(stories / "tokenizer_config.json", pad_token=None, eos_token=None, unk_token=None)
    with pytest.raises(ValueError, match="no pad, end or unknown token"):
        models.load_processor(str(stories), task="causal-lm")


TINY = {
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 48,
    "pad_token_id": 1,
}


@pytest.mark.parametrize(
    ("task", "model"),
    [
        ("causal-lm", small_models.gpt2()),
        ("causal-lm", transformers.OPTForCausalLM(transformers.OPTConfig(**TINY, word_embed_proj_dim=16, ffn_dim=16))),
        ("sequence-classification", small_models.bert()),
        ("sequence-classification", transformers.RobertaForSequenceClassification(transformers.RobertaConfig(**TINY))),
    ],
    ids=["gpt2", "opt", "bert", "roberta"],
)
def test_rows_are_no_longer_than_the_positions_a_model_has_learned(task, model, tmp_path):
    tokenizer = models.load_processor(str(small_runs.base(tmp_path, model)), task=task)
    longest = tokenizer.model_max_length
    model(torch.full((1, longest), 5))
    with pytest.raises((IndexError, RuntimeError)):
        model(torch.full((1, longest + 1), 5))


def test_models_that_compute_positions_go_beyond_what_their_config_names(tmp_path):
    tokenizer = models.load_processor(str(small_runs.base(tmp_path)), task="causal-lm")
    assert tokenizer.model_max_length > 1e6
    small_models.llama()(torch.full((1, 80), 5))  # which names 64


def test_looking_for_positions_draws_nothing(tmp_path):
    folder, before = small_runs.base(tmp_path, small_models.gpt2()), torch.get_rng_state()
    models.load_processor(str(folder), task="causal-lm")
    assert torch.equal(torch.get_rng_state(), before)


@needs_shared
def test_a_folder_without_a_tokenizer_is_refused():
    with pytest.raises(ValueError, match="cannot load a tokenizer"):
        models.load_processor(str(VIT), task="causal-lm")


@needs_shared
@pytest.mark.usefixtures("reads_images")
def test_a_folder_without_an_image_processor_is_refused():
    with pytest.raises(ValueError, match="cannot load an image processor"):
        models.load_processor(str(STORIES), task="image-classification")


@needs_shared
@pytest.mark.usefixtures("reads_images")
def test_an_image_processor_normalises_as_its_folder_says_at_the_size_asked_for():
    import numpy as np
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8)
    processor = models.load_processor(str(VIT), task="image-classification", image_size=96)
    actual = processor(Image.fromarray(pixels), return_tensors="pt")["pixel_values"][0]
    # preprocessor_config.json: bicubic resize, division by 255, mean and deviation 0.5
    resized = np.asarray(Image.fromarray(pixels).resize((96, 96), Image.Resampling.BICUBIC), dtype=np.float64)
    expected = (resized / 255 - 0.5) / 0.5
    torch.testing.assert_close(actual.double(), torch.from_numpy(expected).permute(2, 0, 1), rtol=1e-6, atol=1e-6)
    assert models.load_processor(str(VIT), task="image-classification").size["height"] == 224


@needs_shared
def test_a_missing_pillow_says_how_to_install_it(monkeypatch):
    find_spec = models.importlib.util.find_spec
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None if name == "PIL" else find_spec(name))
    with pytest.raises(ValueError, match=r"pip install 'beyondlora\[images\]'"):
        models.load_processor(str(VIT), task="image-classification")


@needs_shared
def test_a_vision_transformer_is_told_to_interpolate_only_at_another_size(tmp_path):
    def extra(name, size, task="image-classification"):
        return models.extra_inputs(str(name), task=task, image_size=size)

    assert extra(VIT, 96) == {"interpolate_pos_encoding": True}
    assert extra(VIT, 224) == extra(VIT, None) == extra(STORIES, 96, "causal-lm") == {}
    model = models.load_base(str(VIT), task="image-classification", num_labels=2)
    assert model(torch.zeros(1, 3, 96, 96), **extra(VIT, 96)).logits.shape == (1, 2)
    transformers.ResNetConfig().save_pretrained(tmp_path)  # a convolutional network takes any size as it is
    assert extra(tmp_path, 96) == {}


def test_a_model_without_weights_is_none_of_zeros(house):
    """transformers cuts up every model that it makes while ZeRO 3 is on: real weights, by random numbers."""
    from transformers.integrations import deepspeed as zero

    class Three:
        def is_zero3(self):
            raise AssertionError("the model would be cut up")

    three = Three()
    zero.set_hf_deepspeed_config(three)
    try:
        model = models.empty_base(str(house / "base"), task="causal-lm")
        assert zero._hf_deepspeed_config_weak_ref() is three
    finally:
        zero.unset_hf_deepspeed_config()
    assert all(weight.is_meta for weight in model.parameters())
