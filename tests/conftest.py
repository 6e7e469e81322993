"""Every test: on the CPU, offline, one thread, seeded, with the shapes of public tensors checked."""

from __future__ import annotations

import os
import random

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch

# Before anything imports triton: without a GPU the kernels run in its interpreter.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import hypothesis
import pytest

import shape_checks

shape_checks.install()
torch.set_num_threads(1)
hypothesis.settings.register_profile("pte", deadline=None, derandomize=True, database=None, max_examples=25)
hypothesis.settings.load_profile("pte")


@pytest.fixture(autouse=True)
def seeds() -> None:
    random.seed(0)
    torch.manual_seed(0)
