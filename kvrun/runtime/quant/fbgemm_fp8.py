"""fbgemm_fp8: e4m3 with a scale for each row, under the names of `fp8`."""

from kvrun.runtime.quant.fp8 import decode, read

__all__ = ["decode", "read"]
