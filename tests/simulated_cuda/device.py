"""A CUDA device that is simulated: its tensors are computed by the CPU, with real values.

What runs is torch's dispatcher, autograd, autocast and optimizers, Lightning, transformers, and the code under test,
on tensors that say that they are on `cuda:0`. What does not run are CUDA's kernels and its memory: fused attention
operators have plain implementations, and the memory is counted. Mixing tensors of two devices is an error, as it is
on a GPU, and what would make the host wait for the device is noted.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

from tests.helpers.plain_flash import register_flash, register_memory_efficient

aten = torch.ops.aten
CUDA = torch.device("cuda", 0)
GIB = 2**30

# the host reads a value of the device
READS = (
    *(aten._local_scalar_dense.default, aten.equal.default, aten.nonzero.default, aten.masked_select.default),
    *(aten._unique2.default, aten.unique_consecutive.default, aten.repeat_interleave.Tensor),
)
# operators that take tensors of both devices
MIXED = (
    *(aten.copy_.default, aten._to_copy.default, aten._foreach_copy_.default),
    *(aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default),
)


@dataclass
class SimulatedDevice:
    """What is known of the device.

    Attributes:
        capability: compute capability; what the code asks for.
        total: bytes of memory.
        share: the part of it that this process may take; beyond, an allocation raises `torch.OutOfMemoryError`.
        allocated: bytes of the tensors that are there.
        peak: the most of them.
        waits: what made the host wait, by operator and the line of the package.
        attention: calls of fused attention operators, in order.
        sync_mode: of `torch.cuda.set_sync_debug_mode`; "error": what makes the host wait is one.
        opened: what keeps operators registered.
    """

    capability: tuple[int, int] = (9, 0)
    total: int = 141 * GIB
    share: float = 1.0
    allocated: int = 0
    peak: int = 0
    waits: Counter[str] = field(default_factory=Counter)
    attention: list[dict[str, Any]] = field(default_factory=list)
    sync_mode: str | int = "default"
    opened: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._storages: Counter[int] = Counter()

    def reset(self) -> None:
        """As at first; tensors that are there stay counted."""
        self.capability, self.total, self.share, self.peak = (9, 0), 141 * GIB, 1.0, self.allocated
        self.sync_mode = "default"
        self.waits.clear()
        self.attention.clear()

    def hold(self, storage: torch.UntypedStorage) -> None:
        """Count a storage, once for all of its tensors."""
        key, size = storage._cdata, storage.nbytes()
        if not self._storages[key]:
            if self.allocated + size > self.share * self.total:
                raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {size} bytes.")
            self.allocated += size
            self.peak = max(self.peak, self.allocated)
        self._storages[key] += 1

    def release(self, storage: torch.UntypedStorage) -> None:
        """A tensor of the storage is gone."""
        self._storages[storage._cdata] -= 1
        if not self._storages[storage._cdata]:
            self.allocated -= storage.nbytes()

    def wait(self, what: object) -> None:
        """Note that the host waits for the device; an error where `sync_mode` says so."""
        lines = [one for one in traceback.extract_stack() if "/lightning_bge/" in one.filename]
        where = f"{lines[-1].filename.rpartition('/lightning_bge/')[2]}:{lines[-1].name}" if lines else "elsewhere"
        self.waits[f"{what} in {where}"] += 1
        if self.sync_mode in ("error", 2):
            raise RuntimeError(f"called a synchronizing CUDA operation: {what} in {where}")

    def allow(self, share: float, *_: Any) -> None:
        """As `torch.cuda.set_per_process_memory_fraction`."""
        self.share = share

    def set_sync_mode(self, mode: str | int) -> None:
        """As `torch.cuda.set_sync_debug_mode`."""
        self.sync_mode = mode


DEVICE = SimulatedDevice()


class _Held:
    """Holds a storage as long as this object is there; a weak reference to a tensor would keep it from being moved."""

    def __init__(self, storage: torch.UntypedStorage) -> None:
        DEVICE.hold(storage)
        self.storage = storage

    def __del__(self) -> None:
        if hasattr(self, "storage"):
            DEVICE.release(self.storage)


class CudaTensor(Tensor):
    """A tensor that is on the device, around the one on the CPU that is computed with."""

    inner: Tensor
    held: _Held
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls: type[CudaTensor], inner: Tensor) -> CudaTensor:
        assert not isinstance(inner, CudaTensor)
        made: CudaTensor = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            inner.size(),
            inner.stride(),
            inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=CUDA,
        )
        return made

    def __init__(self, inner: Tensor) -> None:
        self.inner, self.held = inner, _Held(inner.untyped_storage())

    def __repr__(self) -> str:  # type: ignore[override]
        return f"CudaTensor({self.inner!r})"

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], *_: Any) -> CudaTensor:
        return CudaTensor(inner["inner"])

    def __deepcopy__(self, memo: dict[int, Any]) -> CudaTensor:
        if id(self) not in memo:
            copy = CudaTensor(self.inner.detach().clone())
            memo[id(self)] = nn.Parameter(copy, self.requires_grad) if isinstance(self, nn.Parameter) else copy
        found: CudaTensor = memo[id(self)]
        return found

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.inner.detach().__reduce_ex__(protocol)

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.inner.untyped_storage()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not all(kind is Tensor or issubclass(kind, CudaTensor | nn.Parameter) for kind in types):
            return NotImplemented  # nested tensors call their own operators, which come here
        return compute(func, args, kwargs or {})


def compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """An operator with tensors of the device among its arguments."""
    if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
        return func.decompose(*args, **kwargs)  # as it comes here whole in inference mode
    given = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
    others = [one for one in given if not isinstance(one, CudaTensor) and one.ndim]
    if others and func not in MIXED:
        raise RuntimeError(
            f"{func}: Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!"
        )
    asked = kwargs.get("device")
    to_host = asked is not None and torch.device(asked).type == "cpu"
    _note_waits(func, args, kwargs, to_host)
    inner_args, inner_kwargs = tree_map_only(CudaTensor, lambda one: one.inner, (args, kwargs))
    if asked is not None:
        inner_kwargs["device"] = torch.device("cpu")
    if to_host and func is aten._to_copy.default:
        return func(*inner_args, **inner_kwargs)
    out = func(*inner_args, **{name: value for name, value in inner_kwargs.items() if name != "pin_memory"})
    if func is aten.copy_.default:
        return args[0]
    return return_and_correct_aliasing(func, args, kwargs, tree_map_only(Tensor, CudaTensor, out))


def _note_waits(func: Any, args: Any, kwargs: dict[str, Any], to_host: bool) -> None:
    if func in READS or (func is aten._to_copy.default and to_host and not kwargs.get("non_blocking")):
        DEVICE.wait(func)
    elif func is aten.copy_.default:
        target, source, queued = args[0], args[1], args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
        if isinstance(target, CudaTensor) != isinstance(source, CudaTensor) and not queued:
            DEVICE.wait(func)
    elif func is aten.index.Tensor and any(one is not None and one.dtype == torch.bool for one in args[1]):
        DEVICE.wait(func)


# ---------------------------------------------------------------------- what is not an operator


_of_tensors = torch._C.TensorBase.data  # type: ignore[attr-defined]


def _data(self: Tensor) -> Tensor:
    found: Tensor = self.detach() if isinstance(self, CudaTensor) else _of_tensors.__get__(self)
    return found


def _set_data(self: Tensor, value: Tensor) -> None:
    """`tensor.data = value`; a tensor that changes its device is exchanged for another one."""
    if not (isinstance(self, CudaTensor) or isinstance(value, CudaTensor)):
        _of_tensors.__set__(self, value)
        return
    grad, self.grad = self.grad, None
    new = CudaTensor(value.inner.detach()) if isinstance(value, CudaTensor) else value.detach()
    if isinstance(self, nn.Parameter):
        new = nn.Parameter(new, self.requires_grad)
    kept = {name: one for name, one in vars(self).items() if name not in ("inner", "held")}
    mine, others = dict(vars(self)), dict(vars(new))
    self.__class__, new.__class__ = new.__class__, self.__class__
    self.__dict__.clear()
    self.__dict__.update(kept | others)
    new.__dict__.clear()
    new.__dict__.update(mine)
    torch._C._swap_tensor_impl(self, new)
    if grad is not None:
        if grad.device != self.device:  # torch moves it next; until then no tensor may have it
            _set_data(grad, grad.to(self.device))
        self.grad = grad


class _Properties:
    name, multi_processor_count = "Simulated", 132

    @property
    def major(self) -> int:
        return DEVICE.capability[0]

    @property
    def minor(self) -> int:
        return DEVICE.capability[1]

    @property
    def total_memory(self) -> int:
        return DEVICE.total


def _empty(size: Any, *, dtype: Any = None, memory_format: Any = None, **_: Any) -> CudaTensor:
    return CudaTensor(
        torch.empty(size, dtype=dtype, device="cpu", memory_format=memory_format or torch.contiguous_format)
    )


def _empty_strided(size: Any, stride: Any, *, dtype: Any = None, **_: Any) -> CudaTensor:
    return CudaTensor(torch.empty_strided(size, stride, dtype=dtype, device="cpu"))


def _made_on_the_cpu(function: Callable[..., Tensor]) -> Callable[..., CudaTensor]:
    """For those that resize a tensor that they have made, which is not possible for one around another."""

    def make(*args: Any, dtype: Any = None, **_: Any) -> CudaTensor:
        return CudaTensor(function(*args, dtype=dtype, device="cpu"))

    return make


def _reset_peak(*_: Any) -> None:
    DEVICE.peak = DEVICE.allocated


def _pinned(self: Tensor, *_: Any) -> Tensor:
    self.simulated_pin = True  # type: ignore[attr-defined]
    return self


def _functions() -> dict[str, Callable[..., Any]]:
    """Those of `torch.cuda` that the package, Lightning or transformers call."""
    generator = torch.default_generator  # the device draws as the CPU does
    return {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda *_: None,
        "device": lambda *_: nullcontext(),
        "get_device_capability": lambda *_: DEVICE.capability,
        "get_device_name": lambda *_: _Properties.name,
        "get_device_properties": lambda *_: _Properties(),
        "is_bf16_supported": lambda *_, **__: DEVICE.capability >= (8, 0),
        "mem_get_info": lambda *_: (DEVICE.total - DEVICE.allocated, DEVICE.total),
        "memory_allocated": lambda *_: DEVICE.allocated,
        "memory_reserved": lambda *_: DEVICE.allocated,
        "max_memory_allocated": lambda *_: DEVICE.peak,
        "max_memory_reserved": lambda *_: DEVICE.peak,
        "memory_stats": lambda *_: {},
        "reset_peak_memory_stats": _reset_peak,
        "get_per_process_memory_fraction": lambda *_: DEVICE.share,
        "set_per_process_memory_fraction": DEVICE.allow,
        "set_sync_debug_mode": DEVICE.set_sync_mode,
        "empty_cache": lambda: None,
        "synchronize": lambda *_: DEVICE.wait("synchronize"),
        "manual_seed": generator.manual_seed,
        "manual_seed_all": generator.manual_seed,
        "get_rng_state": lambda *_: generator.get_state(),
        "set_rng_state": lambda state, *_: generator.set_state(state),
        "get_rng_state_all": lambda: [generator.get_state()],
        "set_rng_state_all": lambda states: generator.set_state(states[0]),
        "is_current_stream_capturing": lambda: False,
    }


def install() -> None:
    """Let this process have the device, until it ends."""
    for name, function in _functions().items():
        setattr(torch.cuda, name, function)
    torch.cuda.default_generators = (torch.default_generator,)
    torch._C._cuda_clearCublasWorkspaces = lambda: None
    Tensor.data = property(_data, _set_data)  # type: ignore[assignment]
    Tensor.pin_memory = _pinned  # type: ignore[assignment, method-assign]
    Tensor.is_pinned = lambda self, *_: getattr(self, "simulated_pin", False)  # type: ignore[assignment, method-assign]
    has_flash = lambda *_: DEVICE.capability >= (8, 0)  # noqa: E731
    torch.backends.cuda.is_flash_attention_available = has_flash
    from torch.nested._internal import sdpa

    sdpa.can_use_flash_attention = lambda params, *_: has_flash() and params.query.dtype != torch.float32
    sdpa.can_use_efficient_attention = lambda *_: True
    torch._C._set_only_lift_cpu_tensors(True)
    library = torch.library.Library("aten", "IMPL")
    library.impl("empty.memory_format", _empty, "CUDA")
    library.impl("empty_strided", _empty_strided, "CUDA")
    for name in ("arange", "arange.start", "arange.start_step", "eye", "eye.m"):
        library.impl(name, _made_on_the_cpu(getattr(torch, name.partition(".")[0])), "CUDA")
    DEVICE.opened += [library, register_flash(DEVICE.attention), register_memory_efficient(DEVICE.attention)]
