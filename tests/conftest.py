"""One thread, no CUDA, megatron imported once: ranks are forked from this process (see ranks.py)."""

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a forked rank hangs in its parent's tokenizer threads
sys.path.insert(0, str(Path(__file__).parent))

import torch

torch.set_num_threads(1)  # a forked rank hangs in its parent's OpenMP pool otherwise
