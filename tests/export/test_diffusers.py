"""diffusers reads an exported folder as a LoRA of its own.

diffusers is not part of the development environment: `pip install diffusers` to run this.
"""

import pytest
import torch
from peft import get_peft_model

import beyondlora

diffusers = pytest.importorskip("diffusers")


def unet() -> torch.nn.Module:
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=4,
    ).eval()


def test_diffusers_takes_the_folder(tmp_path):
    model = get_peft_model(unet(), beyondlora.StellaConfig(r=4, target_modules=["to_q", "to_v"]))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "stella_S" in name:
                weight.add_(torch.randn_like(weight))
    noise, text = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 16)
    batch = {"sample": noise, "timestep": torch.tensor(3), "encoder_hidden_states": text}
    beyondlora.export_lora(model, tmp_path / "lora", base_model="some/unet", batches=[batch])
    fresh = unet()
    with torch.no_grad():
        before = fresh(**batch).sample
        # The prefix is PEFT's own, which the names in the folder start with.
        fresh.load_lora_adapter(tmp_path / "lora", weight_name="adapter_model.safetensors", prefix="base_model.model")
        after, live = fresh(**batch).sample, model.eval()(**batch).sample
    torch.testing.assert_close(after, live, rtol=0, atol=1e-5)
    assert (after - before).abs().max() > 0.1
