"""What makers' datasheets promise of memory and bf16 matrix products, without sparsity.

Sources: NVIDIA's product pages and datasheets of H200, H100, A100, L40S, L4, A10 and T4, and its
white papers on the GA102 and AD102 architectures (bf16 with float32 accumulation).
"""

from kvrun.bench.roofline import Ceilings

TB, TFLOP = 1e12, 1e12
DATASHEETS = {  # torch's name of the device: memory, bf16 (T4: fp16)
    "NVIDIA H200": (4.8, 989.0),
    "NVIDIA H200 NVL": (4.8, 836.0),
    "NVIDIA H100 80GB HBM3": (3.35, 989.0),
    "NVIDIA H100 PCIe": (2.0, 756.0),
    "NVIDIA H100 NVL": (3.9, 835.0),
    "NVIDIA A100-SXM4-80GB": (2.039, 312.0),
    "NVIDIA A100 80GB PCIe": (1.935, 312.0),
    "NVIDIA A100-SXM4-40GB": (1.555, 312.0),
    "NVIDIA A100-PCIE-40GB": (1.555, 312.0),
    "NVIDIA L40S": (0.864, 362.0),
    "NVIDIA L4": (0.300, 121.0),
    "NVIDIA A10": (0.600, 125.0),
    "Tesla T4": (0.320, 65.0),
    "NVIDIA GeForce RTX 4090": (1.008, 165.2),
    "NVIDIA GeForce RTX 3090": (0.936, 71.0),
}


def promised(device_name: str, dtype: str) -> Ceilings | None:
    """The datasheet of a device; None for one that is not in the table, and for float32."""
    if device_name not in DATASHEETS or dtype == "float32":
        return None
    bandwidth, flops = DATASHEETS[device_name]
    return Ceilings(bandwidth * TB, flops * TFLOP)
