"""Local stand-ins for the small models and data that PEFT's tests take from the hub.

PEFT's tests need no trained model, only its architecture under its hub name. `fill` writes randomly initialised ones
into a hub cache, where every library finds them without a network. Data: a few made-up sentences, a drawn picture.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as t

COMMIT = "0" * 40
SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 1024,
}
DECODER = {
    **SMALL,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 3,
}
HEAD = {"num_labels": 2}

Model = Callable[[], Any]


def _opt(hidden: int = 16, layers: int = 2) -> Any:
    config = t.OPTConfig(
        vocab_size=1024,
        hidden_size=hidden,
        word_embed_proj_dim=hidden,
        num_hidden_layers=layers,
        ffn_dim=2 * hidden,
        num_attention_heads=4,
        max_position_embeddings=128,
    )
    return t.OPTForCausalLM(config)


def _bart() -> Any:
    sizes = {
        f"{side}_{name}": size for side in ("encoder", "decoder") for name, size in (("layers", 2), ("ffn_dim", 32))
    }
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    return t.BartForConditionalGeneration(
        t.BartConfig(vocab_size=1024, d_model=16, max_position_embeddings=128, **sizes, **heads)
    )


def _t5() -> Any:
    return t.T5ForConditionalGeneration(
        t.T5Config(vocab_size=1024, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0)
    )


def _gemma3() -> Any:
    return t.Gemma3ForCausalLM(t.Gemma3TextConfig(**DECODER, head_dim=8))


def _resnet() -> Any:
    config = t.ResNetConfig(embedding_size=10, hidden_sizes=[10, 20], depths=[1, 1], num_labels=3, layer_type="basic")
    config.problem_type = "multi_label_classification"
    return t.ResNetForImageClassification(config)


def _clip() -> Any:
    return t.CLIPTextModelWithProjection(t.CLIPTextConfig(**SMALL, projection_dim=16, max_position_embeddings=64))


MODELS: dict[str, Model] = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": _opt,
    "peft-internal-testing/opt-125m": lambda: _opt(64, 12),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": lambda: t.GPT2LMHeadModel(
        t.GPT2Config(vocab_size=1024, n_positions=128, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=2)
    ),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": lambda: t.GPTJForCausalLM(
        t.GPTJConfig(
            vocab_size=1024,
            n_positions=128,
            n_embd=32,
            n_layer=2,
            n_head=4,
            rotary_dim=4,
            bos_token_id=0,
            eos_token_id=2,
        )
    ),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": lambda: t.LlamaForCausalLM(t.LlamaConfig(**DECODER)),
    "peft-internal-testing/tiny-dummy-qwen2": lambda: t.Qwen2ForCausalLM(t.Qwen2Config(**DECODER)),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": _gemma3,
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": _bart,
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": _t5,
    "peft-internal-testing/tiny-random-BertModel": lambda: t.BertModel(t.BertConfig(**SMALL)),
    "peft-internal-testing/tiny-random-RobertaModel": lambda: t.RobertaModel(t.RobertaConfig(**SMALL)),
    "peft-internal-testing/tiny-random-DebertaModel": lambda: t.DebertaModel(
        t.DebertaConfig(**SMALL, relative_attention=True, pos_att_type=["c2p", "p2c"])
    ),
    "peft-internal-testing/tiny-random-DebertaV2Model": lambda: t.DebertaV2Model(
        t.DebertaV2Config(**SMALL, relative_attention=True, pos_att_type=["c2p", "p2c"])
    ),
    "peft-internal-testing/tiny-random-BertForSequenceClassification": lambda: t.BertForSequenceClassification(
        t.BertConfig(**SMALL, **HEAD)
    ),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": lambda: t.RobertaForSequenceClassification(
        t.RobertaConfig(**SMALL, **HEAD)
    ),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": lambda: t.LlamaForSequenceClassification(
        t.LlamaConfig(**DECODER, num_labels=1)
    ),
    "peft-internal-testing/tiny-clip-text-2": _clip,
    "peft-internal-testing/tiny-random-ResNetForImageClassification": _resnet,
}


def fill(cache: Path) -> None:
    """Write every model, with a tokenizer or an image processor, into a hub cache folder (`$HF_HUB_CACHE`)."""
    for name, model in MODELS.items():
        torch.manual_seed(0)
        repository = cache / ("models--" + name.replace("/", "--"))
        snapshot = repository / "snapshots" / COMMIT
        model().save_pretrained(snapshot)
        processor = _image_processor() if "ResNet" in name else _tokenizer()
        processor.save_pretrained(snapshot)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(COMMIT)


def _tokenizer() -> Any:
    """Words and letters of what the tests tokenise."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(english_quotes()["train"]["quote"], trainer)
    names = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return t.PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, **names)


def _image_processor() -> Any:
    return t.ConvNextImageProcessor(size={"shortest_edge": 32})


def english_quotes() -> Any:
    """A few sentences, in the columns of the data set that PEFT's tests train on."""
    from datasets import Dataset, DatasetDict

    rows = [f"Sentence number {number} says that {number} is followed by {number + 1}." for number in range(64)]
    columns = {"quote": rows, "author": ["nobody"] * 64, "tags": [["count"]] * 64}
    return DatasetDict(train=Dataset.from_dict(columns))


def cat_image() -> Any:
    """A picture, 64×64."""
    from PIL import Image

    return Image.radial_gradient("L").resize((64, 64)).convert("RGB")
