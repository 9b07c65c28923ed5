"""Wan's own VAE and text encoder files give what diffusers' copies of them give."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from transpixeler.config.sections import UserError
from transpixeler.families.wan.original import (
    T5_FILE,
    VAE_FILE,
    original_t5_config,
    original_t5_state,
    original_vae_config,
    original_vae_state,
)


def original_vae_name(name: str) -> str:
    """The way back, by replacements, so that it shares nothing with the map under test."""
    for new, old in (
        (r"^quant_conv", "conv1"),
        (r"^post_quant_conv", "conv2"),
        (r"conv_in", "conv1"),
        (r"norm_out", "head.0"),
        (r"conv_out", "head.2"),
        (r"down_blocks", "downsamples"),
        (r"mid_block\.resnets\.0", "middle.0"),
        (r"mid_block\.attentions\.0", "middle.1"),
        (r"mid_block\.resnets\.1", "middle.2"),
        (r"norm1\.", "residual.0."),
        (r"(middle\.\d|samples\.\d+|resnets\.\d)\.conv1\.", r"\1.residual.2."),
        (r"norm2\.", "residual.3."),
        (r"(middle\.\d|samples\.\d+|resnets\.\d)\.conv2\.", r"\1.residual.6."),
        (r"conv_shortcut", "shortcut"),
    ):
        name = re.sub(new, old, name)
    name = re.sub(r"up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"upsamples.{4 * int(m[1]) + int(m[2])}", name)
    return re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"upsamples.{4 * int(m[1]) + 3}", name)


def test_wans_own_vae_file_gives_the_same_vae(tmp_path: Path) -> None:
    from diffusers import AutoencoderKLWan

    torch.manual_seed(0)
    vae = AutoencoderKLWan(base_dim=4, z_dim=16, dim_mult=[1, 2, 2, 4])
    state = {original_vae_name(name): tensor for name, tensor in vae.state_dict().items()}
    assert {"encoder.downsamples.5.time_conv.weight", "decoder.upsamples.14.residual.6.bias"} <= set(state)
    torch.save(state, tmp_path / VAE_FILE)
    again = AutoencoderKLWan(**original_vae_config(tmp_path))
    again.load_state_dict(original_vae_state(tmp_path))
    public = {key: value for key, value in vae.config.items() if not key.startswith("_")}
    assert public == {key: again.config[key] for key in public}
    video = torch.randn(1, 3, 5, 16, 16)
    with torch.no_grad():
        assert torch.equal(again(video).sample, vae(video).sample)


def test_wans_own_text_encoder_file_gives_the_same_embeddings(tmp_path: Path) -> None:
    from transformers import UMT5Config, UMT5EncoderModel

    torch.manual_seed(0)
    config = UMT5Config(vocab_size=50, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=3, is_encoder_decoder=False)
    encoder = UMT5EncoderModel(config).eval()
    state = {"token_embedding.weight": encoder.shared.weight, "norm.weight": encoder.encoder.final_layer_norm.weight}
    for index, block in enumerate(encoder.encoder.block):
        attention, ffn = block.layer
        state |= {
            f"blocks.{index}.attn.{part}.weight": getattr(attention.SelfAttention, part).weight for part in "qkvo"
        }
        state |= {
            f"blocks.{index}.pos_embedding.embedding.weight": attention.SelfAttention.relative_attention_bias.weight,
            f"blocks.{index}.norm1.weight": attention.layer_norm.weight,
            f"blocks.{index}.norm2.weight": ffn.layer_norm.weight,
            f"blocks.{index}.ffn.gate.0.weight": ffn.DenseReluDense.wi_0.weight,
            f"blocks.{index}.ffn.fc1.weight": ffn.DenseReluDense.wi_1.weight,
            f"blocks.{index}.ffn.fc2.weight": ffn.DenseReluDense.wo.weight,
        }
    torch.save({name: parameter.detach() for name, parameter in state.items()}, tmp_path / T5_FILE)
    again = UMT5EncoderModel(UMT5Config(**original_t5_config(tmp_path))).eval()
    again.load_state_dict(original_t5_state(tmp_path))
    ids = torch.randint(0, 50, (2, 9))
    with torch.no_grad():
        assert torch.equal(again(ids).last_hidden_state, encoder(ids).last_hidden_state)


def test_another_models_pickle_is_refused_by_name(tmp_path: Path) -> None:
    torch.save({"first_stage.weight": torch.zeros(1)}, tmp_path / VAE_FILE)
    with pytest.raises(UserError, match=r"first_stage\.weight"):
        original_vae_state(tmp_path)
    with pytest.raises(UserError, match=T5_FILE):
        original_t5_state(tmp_path)
