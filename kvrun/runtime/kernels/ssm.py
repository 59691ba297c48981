"""State space models in plain torch: a causal convolution, the scans of Mamba and Mamba-2, and one
step of each. Sources: Gu & Dao 2023 (arXiv 2312.00752), Dao & Gu 2024 (arXiv 2405.21060).

All are given n sequences padded to L tokens, in fp32. A padding token has dt = 0: it neither decays
a state nor adds to it.
"""

import torch

# Values of states that Mamba's scan keeps at once; tokens that Mamba-2's takes at once.
STATES, CHUNK = 1 << 23, 64


def causal_conv(
    x: torch.Tensor, window: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """One filter per channel over x [n, L, C] behind window [n, K - 1, C] -> [n, L, C]

    weight [C, K], its last column for the newest input; bias [C].
    """
    length, taps = x.shape[1], weight.shape[1]
    both = torch.cat((window, x), 1)
    y = both[:, :length] * weight[:, 0]
    for tap in range(1, taps):
        y.addcmul_(both[:, tap : tap + length], weight[:, tap])
    return y if bias is None else y.add_(bias)


def last_inputs(
    x: torch.Tensor, window: torch.Tensor, lengths: torch.Tensor | None
) -> torch.Tensor:
    """The window [n, K - 1, C] behind the first lengths [n] tokens (None: all) of x [n, L, C]."""
    both = torch.cat((window, x), 1)
    if lengths is None:
        return both[:, x.shape[1] :]
    at = lengths[:, None] + torch.arange(window.shape[1], device=x.device)
    return both.gather(1, at[:, :, None].expand(-1, -1, both.shape[2]))


def selective_scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    state: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mamba: h = exp(dt·a)·h + dt·x·b, y = h·c, token by token -> y [n, L, C], the last h

    x, dt [n, L, C]; a [C, N]; b, c [n, L, N]; state [n, C, N].
    """
    parts = []
    step = min(CHUNK, max(1, STATES // state.numel()))
    for first in range(0, x.shape[1], step):
        at = slice(first, first + step)
        decay = torch.exp(dt[:, at, :, None] * a)
        states = (dt[:, at] * x[:, at])[..., None] * b[:, at, None, :]
        for token in range(states.shape[1]):
            state = states[:, token].addcmul_(decay[:, token], state)
        parts.append((states @ c[:, at, :, None]).squeeze(-1))
    return torch.cat(parts, 1), state.clone()


def selective_step(
    x: torch.Tensor,
    dt: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    state: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token of `selective_scan`: x, dt [n, C]; b, c [n, N] -> y [n, C], state [n, C, N], which
    is overwritten."""
    state.mul_(torch.exp(dt[..., None] * a)).addcmul_((dt * x)[..., None], b[:, None, :])
    return (state @ c[..., None]).squeeze(-1), state


def ssd_scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    state: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mamba-2: one decay per head, so that tokens of a chunk attend to each other by products.

    x [n, L, H, P]; dt [n, L, H]; a [H]; b, c [n, L, G, N]: H / G heads share one; state
    [n, H, P, N] -> y [n, L, H, P], the last state
    """
    parts = []
    for first in range(0, x.shape[1], CHUNK):
        at = slice(first, first + CHUNK)
        y, state = _chunk(x[:, at], dt[:, at], a, b[:, at], c[:, at], state)
        parts.append(y)
    return torch.cat(parts, 1), state


def _chunk(
    x: torch.Tensor,
    dt: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    state: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    n, length, heads, _ = x.shape
    groups, size = b.shape[2:]
    share = heads // groups
    total = (
        (dt * a).cumsum(1).transpose(1, 2).contiguous()
    )  # [n, H, L]: log of the decay since the start
    b, c = b.transpose(1, 2), c.transpose(1, 2)  # [n, G, L, N]
    xs = (x * dt[..., None]).transpose(1, 2)  # [n, H, L, P]
    later = torch.ones(length, length, dtype=torch.bool, device=x.device).triu_(1)
    # Masked before exp: above the diagonal it would be infinite.
    between = (total[..., :, None] - total[..., None, :]).masked_fill_(later, -torch.inf).exp_()
    scores = (c @ b.transpose(2, 3))[:, :, None] * between.view(n, groups, share, length, length)
    y = scores.flatten(1, 2) @ xs
    grouped = state.view(n, groups, share, -1, size)
    past = (c[:, :, None] @ grouped.transpose(3, 4)).flatten(1, 2)
    y.addcmul_(past, total.exp()[..., None])
    left = xs * (total[..., -1:] - total).exp()[..., None]
    added = left.view(n, groups, share, length, -1).transpose(3, 4) @ b[:, :, None]
    decayed = state * total[..., -1].exp()[..., None, None]
    return y.transpose(1, 2), decayed.add_(added.flatten(1, 2))


def ssd_step(
    x: torch.Tensor,
    dt: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    state: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token of `ssd_scan`: x [n, H, P]; dt [n, H]; b, c [n, G, N] -> y [n, H, P], state
    [n, H, P, N], which is overwritten."""
    n, heads, width = x.shape
    groups, size = b.shape[1:]
    state.mul_(torch.exp(dt * a)[..., None, None])
    grouped = state.view(n, groups, -1, size)  # the rows of all heads that share b and c
    grouped.addcmul_((x * dt[..., None]).view(n, groups, -1, 1), b[:, :, None, :])
    return (grouped @ c[..., None]).view(n, heads, width), state
