"""Gumbel noise without a state: a function of seed, choice, position and token id alone."""

import torch

# The finalizer of MurmurHash3 (Austin Appleby, public domain) and odd increments.
MIX_A, MIX_B = 0x85EBCA6B, 0xC2B2AE35
TOKEN_STEP = 0x9E3779B1  # consecutive ids land far apart
POSITION_STEPS = (0x632BE5AB, 0x85157AF5)  # one for each half of a key
MASK = 0xFFFFFFFF


def keys(seed: int, choice: int) -> tuple[int, int]:
    """What a row of noise is keyed by besides its position: 64 bits in two int32.

    `seed` counts modulo 2**64.
    """
    first = _mix((seed & MASK) ^ _mix(choice + 0x3C6EF372))
    second = _mix((seed >> 32 & MASK) ^ _mix(first ^ 0x1B873593))
    return _signed(_mix(first ^ second)), _signed(_mix(second + 0x52DCE729))


class Gumbel:
    """Standard Gumbel noise for every token of a vocabulary.

    argmax(logits + noise) is a draw from softmax(logits) (the Gumbel-max trick). Only 32-bit
    multiplications, xors and shifts lie between a key and its bits: int32 arithmetic wraps as
    uint32 does, so the bits are the same on every device and in any batch.
    """

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        def constant(value: int | float) -> torch.Tensor:
            """Scalars as tensors: a Python number costs each operator twice its time."""
            if isinstance(value, int):
                return torch.tensor(_signed(value), dtype=torch.int32, device=device)
            return torch.tensor(value, dtype=torch.float32, device=device)

        self._a, self._b = constant(MIX_A), constant(MIX_B)
        self._by_16, self._low_16 = constant(16), constant(0xFFFF)
        self._by_13, self._low_19 = constant(13), constant((1 << 19) - 1)
        self._low_31 = constant((1 << 31) - 1)
        self._half, self._scale = constant(0.5), constant(-(2.0**-31))
        self._steps = torch.stack([constant(step) for step in POSITION_STEPS])
        ids = torch.arange(vocab_size, dtype=torch.int32, device=device)
        self._tokens = ids * constant(TOKEN_STEP)

    def __call__(self, row_keys: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Noise [S, vocab_size] fp32 for one draw per row, between -2.9 and 22.2.

        row_keys: [S, 2] int32 of `keys`; positions: [S] int64, the index of the drawn token in its
        sequence. Resolution: 31 bits, finest among large values, which decide the draws.
        """
        state = positions.to(torch.int32)[:, None] * self._steps ^ row_keys
        bits = self._tokens ^ state[:, :1]
        bits.bitwise_xor_((bits >> self._by_16).bitwise_and_(self._low_16)).mul_(self._a)
        bits.bitwise_xor_(state[:, 1:])
        bits.bitwise_xor_((bits >> self._by_13).bitwise_and_(self._low_19)).mul_(self._b)
        bits.bitwise_xor_((bits >> self._by_16).bitwise_and_(self._low_16))
        # v is uniform in (0, 1); -log(1 - v) is exponential; minus its logarithm is Gumbel. v is
        # precise near 0, where the noise is large; near 1 it must not become 1.
        minus_v = bits.bitwise_and_(self._low_31).float().add_(self._half).mul_(self._scale)
        return minus_v.clamp_(min=2.0**-24 - 1).log1p_().neg_().log_().neg_()


def _mix(value: int) -> int:
    value &= MASK
    value = (value ^ value >> 16) * MIX_A & MASK
    value = (value ^ value >> 13) * MIX_B & MASK
    return value ^ value >> 16


def _signed(value: int) -> int:
    return value - (1 << 32) if value >> 31 else value
