"""What the fork server loads once, so that no rank of a test pays for it."""

# ruff: noqa: E402 - quiet comes before what would speak

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCHINDUCTOR_AUTOGRAD_CACHE", "0")

import torch
import torch.distributed.checkpoint
import torch.distributed.fsdp
import torch.distributed.pipelining
import torch.distributed.tensor

from transpixeler.parallel.runtime import quiet_libraries

quiet_libraries()

import av  # noqa: F401
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler  # noqa: F401
from transformers import AutoTokenizer, UMT5EncoderModel  # noqa: F401

import transpixeler.evaluation.command
import transpixeler.sampling.command
import transpixeler.training.trainer  # noqa: F401

torch.set_num_threads(1)
