"""The GPUs that plans are made for. Nothing heavy is imported here."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """A GPU: the peak of its matrix products in FLOP/s, dense, in half precision (sums in float32) and in float32."""

    half: float
    full: float

    def speed(self, precision: str) -> float:
        return self.full if precision == "float32" else self.half


# From NVIDIA's data sheets, without sparsity: "Ada GPU Architecture" (RTX 4090: table 2), "A100 Tensor Core GPU" (both
# sizes), "H100 Tensor Core GPU" (SXM), "H200 Tensor Core GPU" (SXM). float32 is that of the plain cores, as torch takes
# TF32 for matrix products only where it is asked to.
GPUS = {
    "RTX 4090": Gpu(165.2e12, 82.6e12),
    "A100": Gpu(312e12, 19.5e12),
    "H100": Gpu(989e12, 67e12),
    "H200": Gpu(989e12, 67e12),
}
