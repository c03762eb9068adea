"""One thread: on models this small more of them only wait for each other, most of all on a busy machine."""

import torch

torch.set_num_threads(1)
