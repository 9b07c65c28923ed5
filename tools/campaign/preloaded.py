"""Import, in the server that commands are forked from, all that training and caching would import by themselves."""

# ruff: noqa: E402, F401 - imported to be there

import gc
import os

os.environ["OMP_NUM_THREADS"] = "1"

import av
import diffusers
import torch
import torch.distributed.checkpoint
import torch.distributed.fsdp
import torch.distributed.pipelining
import torch.distributed.tensor

from transpixeler.parallel.runtime import quiet_libraries

quiet_libraries()

import torchao.optim
import transformers
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from transformers import AutoTokenizer, UMT5EncoderModel

import transpixeler.data.upkeep
import transpixeler.families.wan.family
import transpixeler.sampling.command
import transpixeler.training.trainer

torch.set_num_threads(1)
gc.collect()
gc.freeze()  # a collection in a command would else copy the memory that it shares with the server
