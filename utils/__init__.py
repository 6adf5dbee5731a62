"""Configuration, run folders, checkpoints, metrics and figures: one subject a file.

Importing it also says how PyTorch's threads wait. That is read when PyTorch is loaded, so commands import
this package before it.
"""

import os

# By default a thread that waits for another one keeps its core busy. Where another program takes a core, the
# awaited thread then gets none, thousands of times in a training step. A sleeping thread leaves its core to
# it (benchmarks/waiting.py). What the user has set stays.
if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"} & os.environ.keys():
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
