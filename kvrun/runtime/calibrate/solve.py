"""Codes for a matrix that has seen text: GPTQ's and AWQ's ways to round.

Sources: Frantar et al. 2022 (GPTQ), Lin et al. 2023 (AWQ). Errors are those of the products of the
calibration text, tr(D H Dᵀ) for a change D of the matrix and H = xᵀx.
"""

from collections.abc import Sequence

import torch

from kvrun.runtime.quant._round import Codes, whole

DAMPING = 0.01  # of the mean of H's diagonal
_COLUMNS = 128  # that are solved before the rest of the matrix hears of it
_STEPS = 20  # of AWQ's exponent


def damped(hessian: torch.Tensor, rows: int) -> torch.Tensor:
    """H for one row, made safe to invert; columns that nothing has been seen of count a little."""
    mean = hessian / max(rows, 1)
    mean.diagonal().add_(mean.diagonal().mean().clamp(min=1e-8) * DAMPING)
    return mean


def gptq(
    weight: torch.Tensor, hessian: torch.Tensor, bits: int, group: int, dtype: torch.dtype
) -> Codes:
    """Columns are rounded one by one, those that matter most first; what is lost by one is made
    up for by the columns that are still to come.

    `weight` fp32 [N, K], `hessian` [K, K] as `damped` gives it. Scales, of `dtype`, are those of
    plain rounding with errors weighed by H's diagonal, and stay as they are.
    """
    weigh = hessian.diagonal()
    found = whole(weight, bits, group, symmetric=True, importance=weigh, dtype=dtype)
    order = torch.argsort(hessian.diagonal(), descending=True)
    # A column at a time is read and written, so columns lie as rows.
    scale = found.scale.float().t()[order // group]
    rest, codes = weight.t()[order].contiguous(), torch.empty_like(weight.t())
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    inverse = _inverse(hessian[order][:, order])
    for start in range(0, len(rest), _COLUMNS):
        some = slice(start, start + _COLUMNS)
        errors = _block(rest[some], scale[some], inverse[some, some], codes[some], low, high)
        rest[start + _COLUMNS :] -= inverse[some, start + _COLUMNS :].t() @ errors
    codes = (codes - low).to(torch.uint8)[torch.argsort(order)]
    return found._replace(codes=codes.t().contiguous())


def _block(
    rest: torch.Tensor,
    scale: torch.Tensor,
    inverse: torch.Tensor,
    codes: torch.Tensor,
    low: int,
    high: int,
) -> torch.Tensor:
    """Round columns, rows of `rest` here, into `codes`; what each has lost by its weight there."""
    errors = torch.empty_like(rest)
    loss = inverse.diagonal().reciprocal()
    for i, (column, s, code, error) in enumerate(zip(rest, scale, codes, errors, strict=True)):
        torch.div(column, s, out=code).round_().clamp_(low, high)
        torch.addcmul(column, code, s, value=-1, out=error).mul_(loss[i])
        if i + 1 < len(rest):
            rest[i + 1 :].addr_(inverse[i, i + 1 :], error, alpha=-1)
    return errors


def _inverse(hessian: torch.Tensor) -> torch.Tensor:
    """The upper Cholesky factor of H's inverse."""
    for power in range(6):
        if power:
            hessian = hessian.clone()
            more = DAMPING * (10**power - 10 ** (power - 1))
            hessian.diagonal().add_(hessian.diagonal().mean() * more)
        lower, failed = torch.linalg.cholesky_ex(hessian)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                return torch.as_tensor(upper)
    return torch.eye(len(hessian), device=hessian.device)  # then every column stands for itself


def scales(
    weights: Sequence[torch.Tensor], hessian: torch.Tensor, bits: int, group: int
) -> torch.Tensor:
    """AWQ's factors [K] for the columns of matrices that share their input.

    Columns that see large values are made larger before they are rounded, and what they see
    smaller, by the power of its size that costs the products least.
    """
    size = hessian.diagonal().sqrt()
    best, least = torch.ones_like(size), float("inf")
    for step in range(_STEPS):
        factor = size.pow(step / _STEPS).clamp(min=1e-4)
        factor = factor / (factor.max() * factor.min()).sqrt()
        lost = sum(
            _lost(weight, _rounded(weight * factor, bits, group) / factor, hessian)
            for weight in weights
        )
        if lost < least:
            best, least = factor, lost
    return best


def _rounded(weight: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    return whole(weight, bits, group, symmetric=True, clip=False).values()


def _lost(weight: torch.Tensor, other: torch.Tensor, hessian: torch.Tensor) -> float:
    change = other - weight
    return float(((change @ hessian) * change).sum())
