"""What is read from a trace, compared with torch's own counter and with planted operations."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_bge.advisor.audit.observation import PARTS, StepTrace
from lightning_bge.advisor.audit.observe import Recorder
from lightning_bge.advisor.audit.trace import EAGER, read_trace
from tests.helpers.foreign_modules import Classifier, Texts, collate

CPU = torch.device("cpu")


def record(step: Callable[[], None], with_stack: bool = False) -> StepTrace:
    step()  # the first one makes the optimizer's state
    recorder = Recorder(CPU, with_stack)
    recorder.start()
    step()
    return recorder.stop()


def stepper(module: Classifier, closure: bool = False, set_to_none: bool = True) -> Callable[[], None]:
    texts = Texts()
    batch = collate([texts[row] for row in range(8)])
    optimizer = module.configure_optimizers()

    def backward() -> Tensor:
        optimizer.zero_grad(set_to_none=set_to_none)
        loss = module.loss(batch)
        loss.backward()
        return loss

    def step() -> None:
        if closure:
            optimizer.step(backward)
        else:
            backward()
            optimizer.step()

    return step


@pytest.mark.parametrize("closure", [False, True])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_floating_point_operations_equal_those_of_torchs_own_counter(attention: str, closure: bool) -> None:
    step = stepper(Classifier(attention=attention), closure)
    found = record(step)
    with FlopCounterMode(display=False) as counter:
        step()
    assert found.flops.total() == counter.get_total_flops()
    assert set(found.flops) == {"fp32"}
    assert 3 * found.forward_flops == pytest.approx(found.flops.total(), rel=0.01)


def test_products_under_autocast_are_in_bf16() -> None:
    module = Classifier()
    inner = module.loss

    def loss(batch: dict[str, Tensor]) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return inner(batch)

    module.loss = loss  # type: ignore[method-assign]
    found = record(stepper(module))
    assert found.flops["bf16"] > 0.9 * found.flops.total()


@pytest.mark.parametrize("closure", [False, True])
@pytest.mark.parametrize(("fused", "name"), [(True, "aten::_fused_adamw_"), (False, "aten::_foreach_addcdiv_")])
def test_the_optimizers_kernel_is_seen_with_a_closure_and_without(closure: bool, fused: bool, name: str) -> None:
    found = record(stepper(Classifier(fused=fused), closure))
    assert found.optimizer[name] >= 1
    assert ("aten::_fused_adamw_" in found.optimizer) == fused
    assert "aten::bernoulli_" not in found.optimizer


def test_masks_are_counted_and_none_in_eval_mode() -> None:
    module = Classifier()
    # embeddings, after attention and after the feed-forward layer of two layers, head, and attention's own
    assert record(stepper(module)).masks == 1 + 2 * 2 + 1 + 2
    assert record(stepper(module.eval())).masks == 0


def test_eager_attention_is_distinguished_from_a_kernel() -> None:
    assert record(stepper(Classifier(attention="eager"))).attention == {EAGER: 2}
    [name] = record(stepper(Classifier())).attention
    assert name.startswith("sdpa")


def test_values_that_the_host_reads_have_their_line_of_code() -> None:
    def step() -> None:
        torch.ones(3).sum().item()
        bool(torch.ones(1) > 0)

    found = record(step, with_stack=True).host_reads
    assert sum(found.values()) == 2
    assert all("test_trace.py" in where and "step" in where for where in found)


def test_the_parts_of_a_step_add_up_to_it_and_a_pause_is_the_hosts() -> None:
    inner = stepper(Classifier())

    def step() -> None:
        inner()
        time.sleep(0.1)

    found = record(step)
    assert set(found.parts) == set(PARTS)
    assert sum(found.parts.values()) == pytest.approx(found.seconds, rel=0.05)
    assert 0.1 <= found.parts["host"] < found.seconds


def test_compiled_regions_are_distinguished_from_eager_calls() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x).relu()

    layer = Layer()
    layer.compile(backend="eager")
    x = torch.randn(4, 8)
    with torch.no_grad():
        found = record(lambda: layer(x))
    assert (found.compiled["regions"], found.compiled["lookups"]) == (1, 1)
    assert found.compiled["flops"] == found.forward_flops == 2 * 4 * 8 * 8
    torch._dynamo.reset()


def test_token_ids_that_are_looked_up_are_counted() -> None:
    texts = Texts()
    batch = collate([texts[row] for row in range(8)])
    found = record(stepper(Classifier()))
    assert [count for table, count in found.lookups if table == 200] == [batch["input_ids"].numel()]


def test_the_profiler_writes_no_messages_to_stderr() -> None:
    code = (
        "import os, torch; from lightning_bge.advisor.audit.observe import Recorder; "
        "recorder = Recorder(torch.device('cpu')); recorder.start(); os.write(2, b'another message'); recorder.stop()"
    )
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert found.stderr == "another message"


def test_traces_of_several_batches_are_added() -> None:
    step = stepper(Classifier())
    one, two = record(step), record(step)
    both = StepTrace() + one + two
    assert both.flops == one.flops + two.flops
    assert both.masks == one.masks + two.masks
    assert both.seconds == one.seconds + two.seconds
    assert both.parts["host"] == one.parts["host"] + two.parts["host"]
    assert both.optimizer["aten::_fused_adamw_"] == 2
    assert both.lookups == one.lookups + two.lookups


def test_preempted_seconds_are_taken_off_the_idle_ones_alone() -> None:
    trace = StepTrace(seconds=3.0)
    trace.parts.update({"matrix products": 2.0, "host": 1.0})
    found = trace.without_preempted(0.4)
    assert (found.seconds, found.parts["host"], found.parts["matrix products"]) == pytest.approx((2.6, 0.6, 2.0))
    found = trace.without_preempted(5.0)
    assert (found.seconds, found.parts["host"]) == (2.0, 0.0)
    assert trace.seconds == 3.0


# ---------------------------------------------------------------------- a GPU's trace, made by hand


def operation(name: str, since: int, until: int, *children: object, number: int = 0) -> SimpleNamespace:
    fields = SimpleNamespace(inputs=[])
    return SimpleNamespace(
        name=name,
        typed=("_EventType.TorchOp", fields),
        start_time_ns=since,
        end_time_ns=until,
        duration_time_ns=until - since,
        children=list(children),
        correlation_id=number,
    )


class Kernel:
    def __init__(
        self, name: str, since: int, length: int, number: int = 0, device: str = "CUDA", mark: bool = False
    ) -> None:
        self._name, self._since, self._length, self._number, self._device = name, since, length, number, device
        self._mark = mark

    def name(self) -> str:
        return self._name

    def start_ns(self) -> int:
        return self._since

    def duration_ns(self) -> int:
        return self._length

    def linked_correlation_id(self) -> int:
        return self._number

    def device_type(self) -> str:
        return f"DeviceType.{self._device}"

    def is_user_annotation(self) -> bool:
        return self._mark


def test_on_a_gpu_time_is_that_of_kernels_by_what_launched_them() -> None:
    tree = [
        operation(
            "lightning_bge.audit.step",
            0,
            10_000,
            operation("aten::mm", 100, 200, number=1),
            operation("aten::_scaled_dot_product_flash_attention", 300, 400, operation("aten::x", 310, 320, number=3)),
        )
    ]
    kernels = [
        Kernel("lightning_bge.audit.step", 1_000, 9_000, mark=True),  # the profiler lists marks on the device too
        Kernel("sm90_gemm_tf32", 1_000, 4_000, number=1),
        Kernel("flash_fwd", 5_000, 1_000, number=3),
        Kernel("cudaDeviceSynchronize", 6_000, 500, device="CPU"),
    ]
    found = read_trace(tree, kernels)
    assert found.parts["matrix products"] == pytest.approx(4e-6)
    assert found.parts["attention"] == pytest.approx(1e-6)
    assert found.parts["host"] == pytest.approx(5e-6)
