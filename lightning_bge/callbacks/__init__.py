"""Callbacks for any Lightning project: none of them needs our module or data module."""

from lightning_bge.callbacks.batch_size import BatchFactory, BudgetFinder, MemoryConfig
from lightning_bge.callbacks.compile import Compile
from lightning_bge.callbacks.compile_policy import CompileConfig
from lightning_bge.callbacks.oom import OomRecorder
from lightning_bge.callbacks.peak import matmul_peak
from lightning_bge.callbacks.precision import TorchBackends, choose_precision
from lightning_bge.callbacks.progress import ThroughputProgressBar
from lightning_bge.callbacks.throughput import Throughput
from lightning_bge.callbacks.train_mode import TrainMode

__all__ = [
    "BatchFactory",
    "BudgetFinder",
    "Compile",
    "CompileConfig",
    "MemoryConfig",
    "OomRecorder",
    "Throughput",
    "ThroughputProgressBar",
    "TorchBackends",
    "TrainMode",
    "choose_precision",
    "matmul_peak",
]
