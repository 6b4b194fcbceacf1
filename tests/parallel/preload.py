"""Imported once by the server that ranks are forked from: Megatron behind the device seam."""

import torch

from or1_megatron.parallel import device

torch.set_num_threads(1)  # a fork must not inherit a thread pool
device.install()

import or1_megatron.actor.actor  # noqa: E402, F401  megatron binds CUDA names at import: after install()
