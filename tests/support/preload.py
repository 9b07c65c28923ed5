"""Load once, in the server that ranks are forked from, all that a rank would else load by itself."""

# ruff: noqa: E402, F401 - imported to be there, after what they depend on is set

import gc
import importlib
import os
from pathlib import Path

gc.disable()  # what is loaded here stays
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCHINDUCTOR_AUTOGRAD_CACHE", "0")

import torch
import torch.distributed.checkpoint
import torch.distributed.fsdp
import torch.distributed.pipelining
import torch.distributed.tensor

from transpixeler.parallel.runtime import quiet_libraries

quiet_libraries()

import av
import ftfy
import hypothesis
import pytest
import torchao.optim
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler
from transformers import AutoTokenizer, UMT5EncoderModel

import tests.support.families
import tests.support.tiny
import transpixeler.evaluation.command
import transpixeler.sampling.command
import transpixeler.training.trainer

TESTS = Path(__file__).parents[1]
for file in sorted(TESTS.rglob("*.py")):  # of what ranks run; `pickle` imports its module in each of them
    ours = file.parent != Path(__file__).parent and file.name != "conftest.py"
    if ours and "run_ranks" in file.read_text(encoding="utf-8"):
        importlib.import_module(".".join(file.relative_to(TESTS.parent).with_suffix("").parts))

torch.set_num_threads(1)
gc.enable()
gc.collect()
gc.freeze()  # a collection in a rank would else write to every object, and so copy the memory shared with the server
thaw, gc.unfreeze = gc.unfreeze, lambda: None  # a rank ends before it would matter
