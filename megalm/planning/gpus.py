"""What GPUs, and the links between them, do: data sheets, and the share of them that programs reach."""

from __future__ import annotations

from dataclasses import dataclass

GIB = float(2**30)


@dataclass(frozen=True)
class Gpu:
    """One GPU in a host. Rates are in bytes a second in one direction, as programs reach them."""

    peak_flops: float
    """bf16 products with fp32 sums, dense, by the data sheet: what MFU is counted against."""
    memory_bytes: float
    copy_rate: float
    """Of kernels that do little more than read and write: bytes read and written."""
    link_rate: float
    """To the other GPUs of its host."""
    network_rate: float
    """To other hosts: its share of the host's adapters, one of 200 (A100) or 400 Gb/s (Hopper) for each GPU."""
    product_share: float
    """Of the peak, that a product of large matrices reaches."""
    product_width: float
    """Of a matrix whose smallest side is this, a product reaches half of that."""
    attention_share: float = 0.48
    """Of the peak, that the attention kernels reach, only the pairs that are seen counted."""

    def product_rate(self, *sides: float) -> float:
        """FLOP/s of a product of matrices with these sides."""
        return self.peak_flops * self.product_share / (1.0 + self.product_width / min(sides))


NETWORK_SHARE = 0.8
"""Of what adapters carry by their data sheet, that collectives reach."""
# A100: two numbers, product_share and product_width, were fitted to the published runs in tests/unit/planning. Hopper:
# from the trainer's own steps and kernels on an H100 (docs/performance.md); the H200 has its arithmetic.
_A100 = Gpu(312e12, 80 * GIB, 1.7e12, 235e9, 20e9, product_share=0.72, product_width=200.0)
_H100 = Gpu(989e12, 80 * GIB, 2.9e12, 350e9, 40e9, product_share=0.81, product_width=250.0)
GPUS = {
    "a100-40gb": Gpu(312e12, 40 * GIB, 1.3e12, 235e9, 20e9, product_share=0.72, product_width=200.0),
    "a100-80gb": _A100,
    "h100": _H100,
    "h200": Gpu(989e12, 141e9, 4.1e12, 350e9, 40e9, product_share=0.81, product_width=250.0),
}
