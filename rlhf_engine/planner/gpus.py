"""Profiles of GPUs and of the links between them, from data sheets, for plans of runs on several GPUs.

All speeds are per direction. NVLink and network: NVIDIA's data sheets of the A100 80GB SXM, H100 SXM and H200 SXM (DGX systems:
8 GPUs per node, one network adapter of 200 or 400 Gbit/s per GPU). L4 and RTX 4090: PCIe 4.0 x16, and 100 Gbit/s per node.
"""

from __future__ import annotations

from dataclasses import dataclass

PRODUCTS, MEMORY, TRANSFERS = 0.5, 0.8, 0.8
"""Share of the data sheet's speed that a plan assumes for matrix products, for device memory, and for links."""
HOP = 5e-6
"""Seconds that a collective operation needs per rank of its group, in addition to the transfer; by estimate."""
LINKS = {"nvlink3": 300e9, "nvlink4": 450e9, "pcie4": 32e9, "pcie5": 64e9}
"""Bytes per second between the GPUs of a node, per direction and GPU."""


@dataclass(frozen=True)
class Gpu:
    """Speeds and sizes of one GPU and of the node in which it is."""

    memory: int
    """Bytes."""
    float32: float
    """Operations per second of products in float32, without TF32."""
    half: float
    """The same in bfloat16 with float32 sums, without sparsity."""
    bandwidth: float
    """Bytes per second of device memory."""
    link: str
    """Key of LINKS between the GPUs of a node."""
    host: str
    """Key of LINKS to host memory."""
    network: float
    """Bytes per second from a node to the others, per direction."""
    per_node: int = 8

    @property
    def seconds_per_weight(self) -> float:
        """Seconds of one weight times one token in a product in float32, which is two operations."""
        return 2 / (PRODUCTS * self.float32)

    def tokens(self, count: float, speed: float) -> float:
        """Return the time of moving `count` bytes at a share of `speed`, in tokens per weight of float32 products."""
        return count / speed / self.seconds_per_weight


GPUS = {
    "a100": Gpu(80 * 10**9, 19.5e12, 312e12, 2.04e12, "nvlink3", "pcie4", 8 * 25e9),
    "h100": Gpu(80 * 10**9, 67e12, 989e12, 3.35e12, "nvlink4", "pcie5", 8 * 50e9),
    "h200": Gpu(141 * 10**9, 67e12, 989e12, 4.8e12, "nvlink4", "pcie5", 8 * 50e9),
    "l4": Gpu(24 * 10**9, 30.3e12, 121e12, 0.3e12, "pcie4", "pcie4", 12.5e9),
    "4090": Gpu(24 * 10**9, 82.6e12, 165e12, 1.01e12, "pcie4", "pcie4", 12.5e9),
}
