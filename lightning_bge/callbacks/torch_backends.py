"""Which precision pays on this machine, and the options of torch's back ends for the length of a run."""

import logging
import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from lightning_bge.errors import ConfigError
from lightning_bge.runtime.compat.torch import compute_capability, cpu_bf16_units

log = logging.getLogger(__name__)

VOLTA = (7, 0)  # the first compute capability with matrix units, for fp16 alone
AMPERE = (8, 0)  # the first compute capability with bf16, TF32 and flash attention
CONVOLUTIONS = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)
SdpaKernel = Literal["flash", "mem_efficient", "cudnn", "math"]


def choose_precision(accelerator: str = "auto") -> tuple[str, str]:
    """The trainer's precision for this machine, and why.

    bf16 autocast over fp32 weights where the hardware multiplies bf16 matrices: without such units bf16 is emulated and
    slower. fp16 autocast with loss scaling on CUDA devices whose matrix units take fp16 alone (V100, T4). Else fp32.

    Args:
        accelerator: the trainer's `accelerator`; `auto` takes CUDA where it is.

    Returns:
        `bf16-mixed`, `16-mixed` or `32-true`, and the reason.
    """
    return _precision_for(chosen_device(accelerator))


def chosen_device(accelerator: str = "auto") -> torch.device:
    """The device that the trainer's `accelerator` takes on this machine; `auto` takes CUDA where it is."""
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return torch.device("cuda")
    if accelerator in ("auto", "gpu", "mps") and torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def _precision_for(device: torch.device) -> tuple[str, str]:
    if device.type == "cuda" and torch.version.hip is not None:
        return "32-true", "on AMD's GPUs 16-bit autocast is not measured yet"
    if device.type == "cuda":
        name, capability = _name(device), compute_capability(device)
        if capability >= AMPERE:
            return "bf16-mixed", f"{name} multiplies bf16 matrices"
        lacks = f"{name} has no bf16 matrix units (they come with compute capability 8.0)"
        if capability >= VOLTA:
            return "16-mixed", f"{lacks}, and multiplies fp16 matrices"
        return "32-true", f"{lacks}, and none for fp16 (7.0)"
    if device.type == "mps":
        return "32-true", "on Apple's GPUs 16-bit autocast is not measured yet"
    if device.type != "cpu":
        return "32-true", f"on {device.type} devices 16-bit autocast is not measured yet"
    units = cpu_bf16_units()
    if units:
        return "bf16-mixed", f"this CPU multiplies bf16 matrices ({', '.join(units)})"
    return "32-true", "this CPU has neither AVX512-BF16 nor AMX"


class Setting(NamedTuple):
    """One line of what is in effect: the name of an option, its value, and the reason."""

    name: str
    value: str
    reason: str


class TorchBackends(Callback):
    """Sets torch's back ends for the length of a run, restores them at its end, and logs what is in effect.

    What was set before is restored however the run ends: normally, by an exception, by Ctrl-C. Runs may be nested.
    TF32 is set by `torch.set_float32_matmul_precision`: after a change through `fp32_precision` alone the older
    functions raise, and Lightning 2.6.6 calls them on CUDA. Lightning advises to set it before any callback is called;
    with this callback that advice can be ignored.

    Args:
        tf32: multiply fp32 matrices in TF32, with 10 bits of mantissa instead of 23. `auto`: on CUDA devices that can.
            False: full fp32.
        cudnn_benchmark: let cuDNN measure its convolutions at each new shape. Unset: unchanged (torch's default is
            off), as the shapes of texts vary.
        sdpa: kernels that `scaled_dot_product_attention` may choose from: flash, mem_efficient, cudnn, math. Unset:
            unchanged.

    Attributes:
        report: what is in effect in the current run, or was in the last one.

    Raises:
        ConfigError: an unknown kernel; and when a run starts, what the device cannot do.
    """

    def __init__(
        self,
        tf32: bool | Literal["auto"] = "auto",
        cudnn_benchmark: bool | None = None,
        sdpa: Sequence[SdpaKernel] | None = None,
    ) -> None:
        if tf32 not in (True, False, "auto"):
            raise ConfigError(f"TorchBackends.tf32 must be auto, true or false, got {tf32!r}")
        known = get_args(SdpaKernel)
        if sdpa is not None and (isinstance(sdpa, str) or not sdpa or not set(sdpa) <= set(known)):
            raise ConfigError(f"TorchBackends.sdpa must be a list of {', '.join(known)}, got {sdpa!r}")
        self.tf32, self.cudnn_benchmark, self.sdpa = tf32, cudnn_benchmark, sdpa
        self.report: tuple[Setting, ...] = ()
        self._tf32_reason = ""
        self._undo: dict[int, list[Callable[[], None]]] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the arguments against the device, then set the back ends."""
        if id(trainer) in self._undo:
            return
        device = trainer.strategy.root_device
        precision, self._tf32_reason = _choose_fp32(self.tf32, device)
        if self.cudnn_benchmark and device.type != "cuda":
            raise ConfigError(f"TorchBackends.cudnn_benchmark: cuDNN is for CUDA, the run is on {device}: leave it out")
        if self.sdpa is not None and not (usable := _usable_kernels(device)) & set(self.sdpa):
            raise ConfigError(
                f"TorchBackends.sdpa: {_name(device)} has {', '.join(sorted(usable))}, got {', '.join(self.sdpa)}: "
                "add one that it has"
            )
        self.report = ()
        undo = self._undo[id(trainer)] = []
        if precision is not None:
            undo.append(_change(_get_fp32, _put_fp32, precision))
        if self.cudnn_benchmark is not None:
            put = partial(setattr, torch.backends.cudnn, "benchmark")
            undo.append(_change(lambda: torch.backends.cudnn.benchmark, put, self.cudnn_benchmark))
        if self.sdpa is not None:
            undo.append(_change(_get_kernels, _put_kernels, list(self.sdpa)))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report what is in effect, once a run: only now is the model complete. It is logged once a process."""
        if not self.report:
            self.report = self._settings(trainer, pl_module)
            text = self.describe()
            are_defaults = (self.tf32, self.cudnn_benchmark, self.sdpa) == ("auto", None, None)
            if trainer.strategy.root_device.type != "cuda" and are_defaults:
                text = text.splitlines()[0]  # the others are CUDA's, or as they were
            if text not in _logged:
                _logged.add(text)
                log.info("%s", text)

    on_validation_start = on_test_start = on_predict_start = on_fit_start

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Restore what was set before."""
        for undo in reversed(self._undo.pop(id(trainer), [])):
            undo()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Restore what was set before: Lightning calls no `teardown` after an exception or Ctrl-C."""
        self.teardown(trainer, pl_module, "exception")

    def describe(self) -> str:
        """The report as text, a setting a line."""
        return "\n".join(f"{name}: {value} ({reason})" for name, value, reason in self.report)

    def _settings(self, trainer: Trainer, module: LightningModule) -> tuple[Setting, ...]:
        device = trainer.strategy.root_device
        fastest, why = _precision_for(device)
        left = "unchanged"
        if device.type != "cuda":
            benchmark_reason = "no effect: cuDNN is for CUDA"
        elif not any(isinstance(part, CONVOLUTIONS) for part in module.modules()):
            benchmark_reason = "no effect: the model has no convolution"
        else:
            benchmark_reason = left if self.cudnn_benchmark is None else "requested"
        return (
            Setting("precision", trainer.precision, f"{fastest} pays: {why}"),
            Setting("fp32 matrix products", _describe_fp32(device), self._tf32_reason),
            Setting("cuDNN benchmark", "on" if torch.backends.cudnn.benchmark else "off", benchmark_reason),
            Setting("SDPA kernels allowed", ", ".join(_get_kernels()), left if self.sdpa is None else "requested"),
        )


_logged: set[str] = set()


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"a {device.type} device"


def _choose_fp32(tf32: bool | str, device: torch.device) -> tuple[str | None, str]:
    """The argument of `set_float32_matmul_precision`, None to leave it unchanged; and the reason."""
    if device.type != "cuda":
        able, reason = False, f"TF32 is for CUDA, the run is on {device.type}"
    elif os.environ.get("NVIDIA_TF32_OVERRIDE") == "0":
        able, reason = False, "NVIDIA_TF32_OVERRIDE=0 turns TF32 off"
    elif compute_capability(device) < AMPERE:
        able, reason = False, f"{_name(device)} has no TF32 units (they come with compute capability 8.0)"
    else:
        able, reason = True, f"{_name(device)} has TF32 units"
    if tf32 is True and not able:
        raise ConfigError(f"TorchBackends.tf32 is true, but {reason}: set it to auto")
    if tf32 is False:
        return "highest", "full fp32 was requested"
    if not able:
        return None, reason
    if tf32 == "auto" and torch.backends.cuda.matmul.fp32_precision == "tf32":
        return None, "was set before the run"
    return "high", reason


def _change(get: Callable[[], Any], put: Callable[[Any], None], value: Any) -> Callable[[], None]:
    """Set `value`; what is returned restores the old one."""
    before = get()
    put(value)
    return lambda: put(before)


def _describe_fp32(device: torch.device) -> str:
    backend = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    value: str = backend.matmul.fp32_precision
    return "ieee" if value == "none" else value  # never set is the default


def _get_fp32() -> tuple[str | None, str, str]:
    """What `set_float32_matmul_precision` changes: the overall setting, CUDA's and oneDNN's."""
    try:
        overall: str | None = torch.get_float32_matmul_precision()
    except RuntimeError:  # set through `fp32_precision` alone: then only the other two are to be restored
        overall = None
    mkldnn = torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]
    return overall, torch.backends.cuda.matmul.fp32_precision, mkldnn


def _put_fp32(value: str | tuple[str | None, str, str]) -> None:
    if isinstance(value, str):
        torch.set_float32_matmul_precision(value)
        return
    overall, cuda, mkldnn = value
    if overall is not None:
        torch.set_float32_matmul_precision(overall)
    torch.backends.cuda.matmul.fp32_precision = cuda
    torch.backends.mkldnn.matmul.fp32_precision = mkldnn  # type: ignore[attr-defined]


def _usable_kernels(device: torch.device) -> set[str]:
    if device.type != "cuda":
        return {"flash", "math"} if device.type == "cpu" else {"math"}
    usable = {"mem_efficient", "math"}
    if compute_capability(device) >= AMPERE:
        usable |= {"flash"} if torch.backends.cuda.is_flash_attention_available() else set()
        usable |= {"cudnn"} if torch.backends.cudnn.is_available() else set()
    return usable


def _get_kernels() -> list[str]:
    cuda = torch.backends.cuda
    flags = {
        "flash": cuda.flash_sdp_enabled(),
        "mem_efficient": cuda.mem_efficient_sdp_enabled(),
        "cudnn": cuda.cudnn_sdp_enabled(),
        "math": cuda.math_sdp_enabled(),
    }
    return [name for name, on in flags.items() if on]


def _put_kernels(names: Sequence[str]) -> None:
    cuda = torch.backends.cuda
    cuda.enable_flash_sdp("flash" in names)
    cuda.enable_mem_efficient_sdp("mem_efficient" in names)
    cuda.enable_cudnn_sdp("cudnn" in names)
    cuda.enable_math_sdp("math" in names)
