"""Which lines run on a CUDA device alone."""

from __future__ import annotations

from tests.tools.cuda_lines import cuda_lines

SOURCE = '''\
import torch

def positive(device):
    """Text."""
    if device.type == "cuda":
        one = 5
    else:
        two = 7
    three = 8

def negative(device):
    if device.type != "cuda":
        return 12
    for _ in range(3):
        four = 14
    return 15

def calls(device):
    five = torch.cuda.memory_allocated(device)
    return "fast" if device.type == "cuda" else "slow"

class Any:
    def nested(self):
        with self:
            if not torch.cuda.is_available():
                six = 25
            else:
                seven = 27
'''


def test_branches_that_a_cuda_device_takes_and_calls() -> None:
    found = cuda_lines(SOURCE)
    assert found == {
        6: "positive",
        15: "negative",
        16: "negative",
        19: "calls",
        20: "calls",
        28: "Any.nested",
    }


def test_all_statements_of_kernels() -> None:
    assert sorted(cuda_lines(SOURCE, kernels=True)) == [6, 9, 15, 16, 19, 20, 28]
