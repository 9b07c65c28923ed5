"""A module that leaves a trace when it is imported, as one from outside could do worse."""

import os

import torch

os.environ["TRANSPIXELER_PLANTED"] = "1"


class Planted(torch.optim.SGD):
    """An optimizer like any other."""
