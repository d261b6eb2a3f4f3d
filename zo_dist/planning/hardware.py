"""What GPUs and their nodes can do, from the vendors' data sheets; every figure can be set to another.

Figures are for one GPU and one direction: a data sheet's NVLink or PCIe bandwidth is the sum of both, so
half of it stands here. TFLOP/s are bfloat16 on tensor cores with float32 sums and without sparsity (half of
what sheets give with it). Memory counts 10**9 bytes to the GB, as sheets do.
"""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass, field

from zo_dist.settings import nearest


@dataclass(frozen=True, kw_only=True, slots=True)
class GPU:
    """One kind. `memory_gb`; `hbm_gbps` (GB/s); `tflops`; `link_gbps`: to GPUs of its node; `host_gbps`: PCIe
    to its host; `network_gbps`: its share of the node's network, None where no vendor builds the node.
    """

    memory_gb: float
    hbm_gbps: float
    tflops: float
    link_gbps: float
    host_gbps: float
    network_gbps: float | None = None
    source: str


_PCIE4, _PCIE5 = 32.0, 64.0

GPUS: dict[str, GPU] = {
    "A100-40G": GPU(
        memory_gb=40,
        hbm_gbps=1555,
        tflops=312,
        link_gbps=300,
        host_gbps=_PCIE4,
        network_gbps=25,
        source="NVIDIA A100 data sheet (SXM4 40GB); DGX A100 data sheet: 8 x 200 Gb/s",
    ),
    "A100-80G": GPU(
        memory_gb=80,
        hbm_gbps=2039,
        tflops=312,
        link_gbps=300,
        host_gbps=_PCIE4,
        network_gbps=25,
        source="NVIDIA A100 data sheet (SXM4 80GB); DGX A100 data sheet: 8 x 200 Gb/s",
    ),
    "A100-80G-PCIE": GPU(
        memory_gb=80,
        hbm_gbps=1935,
        tflops=312,
        link_gbps=_PCIE4,
        host_gbps=_PCIE4,
        source="NVIDIA A100 data sheet (PCIe 80GB, no NVLink bridge)",
    ),
    "H100-80G": GPU(
        memory_gb=80,
        hbm_gbps=3350,
        tflops=989,
        link_gbps=450,
        host_gbps=_PCIE5,
        network_gbps=50,
        source="NVIDIA H100 data sheet (SXM5); DGX H100 data sheet: 8 x 400 Gb/s",
    ),
    "H200": GPU(
        memory_gb=141,
        hbm_gbps=4800,
        tflops=989,
        link_gbps=450,
        host_gbps=_PCIE5,
        network_gbps=50,
        source="NVIDIA H200 data sheet (SXM); DGX H200 data sheet: 8 x 400 Gb/s",
    ),
    "L40S": GPU(
        memory_gb=48,
        hbm_gbps=864,
        tflops=362,
        link_gbps=_PCIE4,
        host_gbps=_PCIE4,
        source="NVIDIA L40S data sheet",
    ),
    "L4": GPU(
        memory_gb=24,
        hbm_gbps=300,
        tflops=121,
        link_gbps=_PCIE4,
        host_gbps=_PCIE4,
        source="NVIDIA L4 data sheet",
    ),
    "A10": GPU(
        memory_gb=24,
        hbm_gbps=600,
        tflops=125,
        link_gbps=_PCIE4,
        host_gbps=_PCIE4,
        source="NVIDIA A10 data sheet",
    ),
    "RTX3090": GPU(
        memory_gb=24,
        hbm_gbps=936,
        tflops=71,
        link_gbps=_PCIE4,
        host_gbps=_PCIE4,
        source="NVIDIA Ampere GA102 GPU architecture whitepaper (no NVLink bridge)",
    ),
    "RTX4090": GPU(
        memory_gb=24,
        hbm_gbps=1008,
        tflops=165,
        link_gbps=_PCIE4,
        host_gbps=_PCIE4,
        source="NVIDIA Ada GPU architecture whitepaper",
    ),
    "MI300X": GPU(
        memory_gb=192,
        hbm_gbps=5300,
        tflops=1307,
        link_gbps=448,
        host_gbps=_PCIE5,
        source="AMD Instinct MI300X data sheet",
    ),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Assumptions:
    """What is taken, not known: the share of a data sheet's figure that is reached, and what stays free.

    `compute`: of TFLOP/s, by matrix products. `hbm`: of memory bandwidth, by all other kernels and by noise.
    `links`: of NVLink, PCIe and network, by gathers and copies. `latency_us`: of each collective.
    `reserve_gb`: of a GPU's memory, for contexts, NCCL and libraries. `fragmentation`: what an allocator
    holds above what is in use. `host_gbps`: memory bandwidth of a node's processors, where offloaded weights
    are written (204.8 GB/s: one socket with eight channels of DDR4-3200, AMD EPYC 7002 data sheet).
    """

    compute: float = 0.5
    hbm: float = 0.7
    links: float = 0.8
    latency_us: float = 30.0
    reserve_gb: float = 2.0
    fragmentation: float = 0.05
    host_gbps: float = 204.8

    def __post_init__(self) -> None:
        for name in ("compute", "hbm", "links"):
            if not 0.0 < getattr(self, name) <= 1.0:
                raise ValueError(f"{name} is {getattr(self, name)}; it is a share, in (0, 1]")
        for name in ("latency_us", "reserve_gb", "fragmentation"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be finite and at least 0")
        if not 0.0 < self.host_gbps < math.inf:
            raise ValueError(f"host_gbps is {self.host_gbps}; it must be finite and above 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class Cluster:
    """So many GPUs of one kind, one rank each, on nodes of `per_node`."""

    count: int
    kind: str
    gpu: GPU
    per_node: int
    assumptions: Assumptions = field(default_factory=Assumptions)

    @property
    def nodes(self) -> int:
        return -(-self.count // self.per_node)

    @property
    def usable_bytes(self) -> float:
        """Of one GPU, for what the plan counts."""
        free = (self.gpu.memory_gb - self.assumptions.reserve_gb) * 1e9
        return free / (1.0 + self.assumptions.fragmentation)

    def gather_bandwidth(self, ranks: int) -> float:
        """Bytes/s that each of so many ranks receives in an all-gather among them.

        A ring's slowest edge: the link, or between nodes the network of all GPUs of a node together (NCCL
        lays a ring through each network card; nccl-tests, doc/PERFORMANCE.md).
        """
        slowest = self.gpu.link_gbps
        if ranks > self.per_node:
            assert self.gpu.network_gbps is not None
            slowest = min(slowest, self.gpu.network_gbps * self.per_node)
        return slowest * 1e9 * self.assumptions.links


def parse_cluster(
    text: str,
    per_node: int = 8,
    assumptions: Assumptions | None = None,
    **figures: float | None,
) -> Cluster:
    """The cluster of `8xA100-40G`; `figures`: those of `GPU` that are other than the data sheet's.

    ValueError for another form, an unknown kind that is not described by figures, or GPUs that do not fill
    their nodes or have no network between them.
    """
    found = re.fullmatch(r"(\d+)x(.+)", text)
    if not found or int(found[1]) < 1:
        raise ValueError(f"--gpus is {text!r}; write the number and kind, as in 8xA100-40G")
    count, kind = int(found[1]), found[2]
    given = {name: value for name, value in figures.items() if value is not None}
    for name, value in given.items():
        if not 0.0 < value < math.inf:
            raise ValueError(f"{name} is {value}; it must be finite and above 0")
    known = {name.lower(): name for name in GPUS}
    needed = [f.name for f in dataclasses.fields(GPU) if f.name not in ("network_gbps", "source")]
    if kind.lower() in known:
        kind = known[kind.lower()]
        gpu = dataclasses.replace(GPUS[kind], **given)  # type: ignore[arg-type]
        if given:
            told = ", ".join(f"{name} {value:g}" for name, value in given.items())
            gpu = dataclasses.replace(gpu, source=f"{gpu.source}; given: {told}")
    elif all(name in given for name in needed):
        gpu = GPU(**given, source="given")
    else:
        options = " ".join("--" + name.replace("_", "-") for name in needed)
        raise ValueError(f"--gpus names the kind {kind!r}; {nearest(kind, GPUS)} Or describe it: {options}")
    if per_node < 1:
        raise ValueError(f"--per-node is {per_node}; it must be at least 1")
    if count > per_node and count % per_node:
        raise ValueError(f"{count} GPUs do not fill nodes of {per_node}; set --per-node to a divisor")
    if count > per_node and gpu.network_gbps is None:
        raise ValueError(
            f"{count} GPUs of {kind} are on {-(-count // per_node)} nodes of {per_node}, and no data sheet "
            "tells the network between them: give --network-gbps (GB/s for each GPU), or set --per-node"
        )
    return Cluster(
        count=count,
        kind=kind,
        gpu=gpu,
        per_node=min(per_node, count),
        assumptions=assumptions or Assumptions(),
    )
