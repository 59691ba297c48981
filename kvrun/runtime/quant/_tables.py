"""What the 16 codes of formats with a table stand for."""

# Source: Dettmers et al. 2023, the quantiles of a normal distribution.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
# bitsandbytes' own order of magnitudes, for codes 0 to 7; the highest bit is the sign.
_FP4 = (0.0, 0.0052083333333, 0.66666667, 1.0, 0.33333333, 0.5, 0.16666667, 0.25)
FP4 = (*_FP4, *(-value for value in _FP4))
# e2m1 of the OCP Microscaling formats.
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1 = (*_E2M1, *(-value for value in _E2M1))

TABLES = {"nf4": NF4, "fp4": FP4}
