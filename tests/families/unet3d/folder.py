"""Write a tiny 3D U-Net of random weights to disk, with a text encoder of BERT's kind."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

from transpixeler.adapters.fresh import init_command

TINY: dict[str, Any] = {
    "dim": 8,
    "dim_mults": [1, 2],
    "cond_dim": 16,
    "heads": 2,
    "head_dim": 8,
    "groups": 4,
    "first_kernel": 3,
}


def write_encoders(folder: Path) -> None:
    """Write a random text encoder, and its tokenizer of single letters."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder.mkdir(parents=True)
    letters = [*string.ascii_lowercase, *(f"##{letter}" for letter in string.ascii_lowercase), ",", "."]
    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters]))
    tokenizer = BertTokenizerFast(str(vocabulary), model_max_length=64)
    sizes = {"hidden_size": TINY["cond_dim"], "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = BertModel(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **sizes))
    network.save_pretrained(folder / "text_encoder")
    tokenizer.save_pretrained(folder / "tokenizer")
    vocabulary.unlink()


def write_folder(folder: Path, **sizes: Any) -> None:
    """Write FOLDER as `transpixeler init` does."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    encoders, shape = folder.parent / f"{folder.name}-encoders", folder.parent / f"{folder.name}.json"
    write_encoders(encoders)
    shape.write_text(json.dumps(TINY | sizes))
    init_command("unet3d", shape=str(shape), encoders=str(encoders), out=str(folder))
