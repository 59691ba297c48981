"""What a model has lost by being quantized, on text that it was not calibrated with."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from kvrun.runtime.calibrate.layers import Layers
from kvrun.runtime.engine.start import choose_device, choose_dtype
from kvrun.runtime.hf_config import HFConfig


@dataclass(frozen=True)
class Check:
    """Two models on the same tokens; bytes are of their files, KL is in nats."""

    vocab_size: int
    tokens: int
    perplexity: float
    perplexity_before: float
    kl_mean: float
    kl_p99: float
    top1_agreement: float
    bytes: int
    bytes_before: int

    @property
    def foreign(self) -> bool:
        """Whether the original says the text worse than if it took every token for as likely."""
        return self.perplexity_before > self.vocab_size


def compare(
    before: Path, after: Path, prompts: Sequence[Sequence[int]], device: str = "auto"
) -> Check:
    """Run both models, a layer at a time, and compare what they say of each next token."""
    place = choose_device(device)
    dtype = choose_dtype("auto", HFConfig.read(before).dtype, place)
    old, new = (_scores(folder, prompts, place, dtype) for folder in (before, after))
    parts: list[torch.Tensor] = []
    for p, q, prompt in zip(old, new, prompts, strict=True):
        a, b = (torch.log_softmax(x[:-1].float(), -1) for x in (p, q))
        following = torch.tensor(list(prompt[1:])).view(-1, 1)
        kl = (a.exp() * (a - b)).sum(-1)
        same = (a.argmax(-1) == b.argmax(-1)).float()
        own = [x.gather(1, following).squeeze(1) for x in (a, b)]
        parts.append(torch.stack([*own, kl, same]))
    said_before, said, kl, same = torch.cat(parts, 1).double()
    return Check(
        vocab_size=old[0].shape[-1],
        tokens=len(kl),
        perplexity=math.exp(-float(said.mean())),
        perplexity_before=math.exp(-float(said_before.mean())),
        kl_mean=float(kl.mean()),
        kl_p99=float(kl.quantile(0.99)),
        top1_agreement=float(same.mean()),
        bytes=_bytes(after),
        bytes_before=_bytes(before),
    )


def _scores(
    folder: Path, prompts: Sequence[Sequence[int]], device: torch.device, dtype: torch.dtype
) -> list[torch.Tensor]:
    """Logits [tokens, vocab] of every prompt, on the CPU."""
    with torch.inference_mode(), Layers(folder, device, dtype) as layers:
        batches = layers.batches(prompts)
        states = layers.embed(batches)
        for n in range(len(layers.model.blocks)):
            states = layers.run(n, states, batches)
            layers.drop(n)
        model = layers.model
        return [
            model.capped(model.logits(x, batch)).cpu()
            for x, batch in zip(states, batches, strict=True)
        ]


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
