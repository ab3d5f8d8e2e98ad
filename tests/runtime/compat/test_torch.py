"""The private names of torch that this package uses are there, and do what it needs of them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_bge.runtime.compat import torch as compat

MISSING = "torch {} has no {} any more: change `lightning_bge.runtime.compat.torch`"


def needs(owner: object, name: str) -> None:
    """Fail with the missing attribute's name."""
    assert hasattr(owner, name), MISSING.format(torch.__version__, f"{getattr(owner, '__name__', owner)}.{name}")


def test_a_compiled_module_is_recognised_and_made_eager() -> None:
    layer = nn.Linear(2, 2)
    needs(layer, "_compiled_call_impl")
    assert compat.compiled_call(layer) is None
    layer.compile(backend="eager")
    call = compat.compiled_call(layer)
    assert call is not None, MISSING.format(torch.__version__, "Module._compiled_call_impl set by Module.compile")
    compat.set_compiled_call(layer, None)
    assert compat.compiled_call(layer) is None
    compat.set_compiled_call(layer, call)
    assert compat.compiled_call(layer) is call


def test_compilations_are_counted() -> None:
    torch.compiler.reset()
    before = compat.dynamo_counts()

    @torch.compile(backend="eager")
    def add(value: torch.Tensor) -> torch.Tensor:
        return value + 1

    add(torch.ones(2))
    needs(sys.modules["torch._dynamo.utils"], "counters")
    found = [now - then for now, then in zip(compat.dynamo_counts(), before, strict=True)]
    assert found == [1, 1, 1], MISSING.format(torch.__version__, "torch._dynamo.utils.counters of frames and graphs")
    torch.compiler.reset()


def test_inductor_s_workers_can_be_stopped() -> None:
    import torch._inductor.async_compile as workers

    needs(workers, "shutdown_compile_workers")
    compat.stop_compile_workers()


def test_triton_is_asked_for() -> None:
    assert compat.has_triton() in (True, False)


def test_nested_structures_are_mapped() -> None:
    tree = {"a": [1, (2, 3)], "b": 4}
    assert compat.tree_leaves(tree) == [1, 2, 3, 4]
    assert compat.tree_map(lambda leaf: leaf * 2, tree) == {"a": [2, (4, 6)], "b": 8}


def test_an_optimizer_that_does_not_step_causes_no_warning(recwarn: pytest.WarningsRecorder) -> None:
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    compat.stop_stepping(optimizer)

    def closure() -> torch.Tensor:
        loss = weight.sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 2
    scheduler.step()
    assert torch.equal(weight, torch.ones(2))
    assert weight.grad is not None
    told = [str(warning.message) for warning in recwarn]
    assert not told, MISSING.format(torch.__version__, f"the marks of a step, `_opt_called` and others: {told}")


def test_a_scaler_forgets_an_interrupted_step() -> None:
    scaler = torch.amp.GradScaler("cpu")
    needs(scaler, "_per_optimizer_states")
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    scaler.scale(weight.sum()).backward()
    scaler.unscale_(optimizer)
    compat.forget_interrupted_step(scaler)
    scaler.unscale_(optimizer)  # which raises where the step before was not forgotten


@pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="a build of torch without CUDA")
def test_cublas_workspaces_can_be_freed() -> None:
    needs(torch._C, "_cuda_clearCublasWorkspaces")


def test_the_cpu_s_units_are_known() -> None:
    assert hasattr(torch.cpu, "get_capabilities") or hasattr(torch.cpu, "_is_avx512_bf16_supported"), MISSING.format(
        torch.__version__, "torch.cpu.get_capabilities, nor torch.cpu._is_avx512_bf16_supported"
    )
    assert set(compat.cpu_bf16_units()) <= {"amx_bf16", "avx512_bf16"}


def test_the_first_note_in_the_store_stays(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        assert compat.compare_and_set("note", "", "first") == "first"
        assert compat.compare_and_set("note", "", "second") == "first"
    finally:
        torch.distributed.destroy_process_group()


def test_a_module_wrapped_by_torch_compile_is_unwrapped() -> None:
    layer = nn.Linear(2, 2)
    wrapped = torch.compile(layer, backend="eager")
    needs(wrapped, "_orig_mod")
    assert compat.uncompiled(wrapped) is layer
    assert compat.uncompiled(layer) is layer


# ---------------------------------------------------------------------- tensors and kernels


def test_the_derivative_of_softmax_is_that_of_autograd() -> None:
    needs(torch, "_softmax_backward_data")
    scores = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    weights, gradient = scores.softmax(-1), torch.randn(3, 4, 5, dtype=torch.float64)
    [expected] = torch.autograd.grad(weights, scores, gradient)
    torch.testing.assert_close(compat.softmax_backward(gradient, weights.detach(), -1, torch.float64), expected)


def test_tensors_are_copied_into_their_targets() -> None:
    needs(torch, "_foreach_copy_")
    targets, sources = [torch.zeros(2, 3), torch.zeros(4)], [torch.randn(2, 3), torch.randn(4)]
    compat.copy_all(targets, sources)
    assert all(torch.equal(target, source) for target, source in zip(targets, sources, strict=True))


def test_the_flash_operators_have_the_arguments_that_they_are_called_with() -> None:
    for name in ("_flash_attention_forward", "_flash_attention_backward"):
        needs(torch.ops.aten, name)
        needs(getattr(torch.ops.aten, name).default, "_schema")
    found = "torch.ops.aten._flash_attention_forward and _backward with the arguments of `FORWARD_ARGUMENTS`"
    assert compat.has_flash_attention(), MISSING.format(torch.__version__, found)


def test_changes_in_place_are_counted() -> None:
    held = [torch.zeros(3), torch.zeros(3)]
    needs(torch.Tensor, "_version")
    before = compat.versions(held)
    held[1].add_(1)
    assert [new - old for new, old in zip(compat.versions(held), before, strict=True)] == [0, 1]
