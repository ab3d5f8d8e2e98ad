"""The options of the workers on a Ray cluster."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from lightning_bge.errors import ConfigError

LauncherName = Literal["local", "ray"]


@dataclass(frozen=True)
class RayConfig:
    """What a worker asks a Ray cluster for, with `--launcher ray`. hpo.workers is the number of workers.

    Attributes:
        address: of the cluster, as `ray.init` takes it: host:port, or ray://host:10001 of Ray Client. auto: the
            environment variable RAY_ADDRESS, else the cluster that runs on this machine.
        num_cpus: of each worker; it also sets the number of threads that torch has, to at least one.
        num_gpus: of each worker. 0.5: two workers share a GPU and its memory. null: 1 where a node of the cluster has a
            GPU, else 0.
        resources: custom resources of each worker, by name.
        label_selector: labels of the nodes that may run a worker, such as {ray.io/accelerator-type: H100}.
        max_restarts: how often Ray starts a worker anew, on another node where its own is gone, before this program
            starts another one; -1: as often as it takes.

    Raises:
        ConfigError: a value is out of range.
    """

    address: str = "auto"
    num_cpus: float = 1.0
    num_gpus: float | None = None
    resources: dict[str, float] = field(default_factory=dict)
    label_selector: dict[str, str] = field(default_factory=dict)
    max_restarts: int = 3

    def __post_init__(self) -> None:
        if not self.address:
            raise ConfigError("ray.address: expected auto, host:port or ray://host:port, got an empty text")
        for name in ("num_cpus", "num_gpus"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):
                raise ConfigError(f"ray.{name}: expected 0 or more, got {value}")
        if self.num_gpus is not None and self.num_gpus > 1:
            raise ConfigError(f"ray.num_gpus: expected at most 1, as a trial trains on one device, got {self.num_gpus}")
        for name, amount in self.resources.items():
            if not 0 < amount < float("inf"):
                raise ConfigError(f"ray.resources.{name}: expected more than 0, got {amount}")
        if self.max_restarts < -1:
            raise ConfigError(f"ray.max_restarts: expected -1 or more, got {self.max_restarts}")

    def demand(self, cluster: Mapping[str, float]) -> dict[str, float]:
        """What a worker asks for, by Ray's names of resources.

        Args:
            cluster: the resources of all nodes together.
        """
        num_gpus = float("GPU" in cluster) if self.num_gpus is None else self.num_gpus
        wanted = {"CPU": self.num_cpus, "GPU": num_gpus, **self.resources}
        return {name: amount for name, amount in wanted.items() if amount}
