"""One thread for each test process: the tensors are tiny, and the processes run side by side."""

import torch

torch.set_num_threads(1)
