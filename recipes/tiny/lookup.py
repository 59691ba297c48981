"""Teach the base to look up: the steps from a thing back to its owner are each supervised.

Plain training never found the way. Drills carry marks for every step: (1) behind four layers the
residual of a fact's thing has to tell the owner, (2) one head of the fifth layer has to look from
the thing in the answer at the thing in the facts, (3) behind six layers the residual of the thing
in the answer has to tell the owner. The answer itself is trained as ever, beside other text.
"""

from __future__ import annotations

import argparse
import multiprocessing
import re
import shutil
import time
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from random import Random

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor

from recipes.tiny import corpus, drills
from recipes.tiny.model import Shape, Tiny
from recipes.tiny.train import Z_LOSS, rate, save_base, weights

LENGTH = 192
DRILLS = 0.7
GATHERED, LOOKS, HEAD, FOUND = 4, 4, 2, 6
MARK_WEIGHT = 0.5


@dataclass
class Marked:
    """Token ids; (position, owner's token) of things told; (position, told at, owner's token)."""

    ids: list[int]
    told: list[tuple[int, int]] = field(default_factory=list)
    asked: list[tuple[int, int, int]] = field(default_factory=list)


def marked(text: str, facts: list[drills.Fact], tokenizer: Tokenizer) -> Marked:
    """The text's tokens, with marks at the things of its facts and of its answers."""
    encoded = tokenizer.encode(text, add_special_tokens=False)
    first = {a: at for at, (a, _) in enumerate(encoded.offsets)}
    last = {b: at for at, (_, b) in enumerate(encoded.offsets)}
    found, low = Marked(encoded.ids), text.lower()

    def token(char: int) -> int | None:
        """The token that begins here, or with the blank before."""
        at = first.get(char, first.get(char - 1) if low[char - 1] == " " else None)
        return None if at is None else encoded.ids[at]

    for fact in facts:
        owner, value = re.escape(fact.owner.lower()), re.escape(fact.value.lower())
        told = re.search(rf"\b{owner}\b[^.,;<]*?[ :,-]+{value}\b", low)
        if told is None or told.end() not in last or token(told.start()) is None:
            continue
        at = last[told.end()]
        found.told.append((at, token(told.start()) or 0))
        for match in re.finditer(rf"\b{value}\b(?=[^.,;<?]*?\b({owner})\b)", low[told.end() :]):
            here = last.get(told.end() + match.end())
            name = token(told.end() + match.start(1))
            if here is not None and name is not None:
                found.asked.append((here, at, name))
    return found


@cache
def tokenizer_of(path: Path) -> Tokenizer:
    return Tokenizer.from_file(str(path))


def batch(job: tuple[Path, int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids [rows, 192], told marks [n, 3] (row, position, token) and asked marks [n, 4]."""
    path, seed, rows = job
    rng, tokenizer = Random(f"lookup {seed}"), tokenizer_of(path)
    ids = np.zeros((rows, LENGTH), dtype=np.int64)
    told: list[tuple[int, ...]] = []
    asked: list[tuple[int, ...]] = []
    row = 0
    while row < rows:
        document, facts = corpus.conversation(rng), []
        if rng.random() < DRILLS:
            document, facts = drills.drill(rng)
        found = marked(corpus.rendered(document), facts, tokenizer)
        if len(found.ids) > LENGTH:
            continue
        ids[row, : len(found.ids)] = found.ids
        told += [(row, *m) for m in found.told]
        asked += [(row, *m) for m in found.asked]
        row += 1
    return ids, np.array(told), np.array(asked)


class Lookup(torch.nn.Module):
    """The network and two matrices that read an owner out of a residual."""

    def __init__(self, net: Tiny) -> None:
        super().__init__()
        self.net = net
        size = net.s.hidden_size
        self.read = torch.nn.ParameterList(torch.nn.Parameter(torch.eye(size)) for _ in range(2))

    def owner(self, which: int, x: Tensor, owners: Tensor) -> Tensor:
        """Loss of the owners' tokens, told from residuals [n, size]."""
        told = F.rms_norm(x.float(), x.shape[-1:]) @ self.read[which]
        return F.cross_entropy(told @ self.net.model.embed_tokens.weight.T, owners)

    def look(self, layer: int, x: Tensor, cos: Tensor, sin: Tensor, asked: Tensor) -> Tensor:
        """Loss of the head that has to look from a thing asked for at the thing told."""
        block = self.net.model.layers[layer]
        q, k, _ = block.self_attn.heads(block.input_layernorm(x), cos, sin)
        row, here, there = asked[:, 0], asked[:, 1], asked[:, 2]
        shared = self.net.s.num_attention_heads // self.net.s.num_key_value_heads
        key = k[row, HEAD // shared].float()
        score = torch.einsum("nd,ntd->nt", q[row, HEAD, here].float(), key) / q.shape[-1] ** 0.5
        later = torch.arange(x.shape[1], device=x.device) > here[:, None]
        return F.cross_entropy(score.masked_fill(later, -1e9), there)

    def forward(self, ids: Tensor, told: Tensor, asked: Tensor) -> tuple[Tensor, Tensor]:
        """The weighted loss with the marks' losses, and these: told, look, asked, answer."""
        weight, _, positions = weights(ids)
        x, cos, sin = self.net.start(ids, positions)
        mask = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool, device=ids.device).tril()
        losses = []
        for at, layer in enumerate(self.net.model.layers):
            if at == LOOKS:
                losses.append(self.look(at, x, cos, sin, asked))
            x = layer(x, cos, sin, mask[None, None])
            if at + 1 == GATHERED:
                losses.append(self.owner(0, x[told[:, 0], told[:, 1]], told[:, 2]))
            if at + 1 == FOUND:
                losses.append(self.owner(1, x[asked[:, 0], asked[:, 1]], asked[:, 3]))
        logits = F.linear(self.net.model.norm(x), self.net.model.embed_tokens.weight)
        logits = logits[:, :-1].float()
        norm = torch.logsumexp(logits, -1)
        each = norm - logits.gather(-1, ids[:, 1:, None]).squeeze(-1)
        w = weight[:, 1:]
        text = (w * (each + Z_LOSS * norm.square())).sum() / w.sum()
        marks = torch.stack(losses)
        answer = (each * (w == 1)).sum() / (w == 1).sum()
        return text + MARK_WEIGHT * marks.sum(), torch.cat((marks, answer[None])).detach()


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    net = Tiny(Shape())
    state = load_file(args.init / "model.safetensors")
    net.load_state_dict({k: v.float() for k, v in state.items()})
    lookup = Lookup(net).to(device)
    opt = torch.optim.AdamW(lookup.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=0.01)
    jobs = ((args.tokenizer, args.seed + i, args.rows) for i in range(args.steps))
    start = first = time.perf_counter()
    with multiprocessing.get_context("spawn").Pool(args.workers) as pool:
        for step, arrays in enumerate(pool.imap(batch, jobs), 1):
            first = time.perf_counter() if step == 1 else first
            progress = max(step / args.steps, (time.perf_counter() - first) / (args.minutes * 60))
            opt.param_groups[0]["lr"] = args.lr * rate(min(progress, 1.0))
            inputs = [torch.from_numpy(a).to(device) for a in arrays]
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                loss, parts = lookup(*inputs)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(lookup.parameters(), 1.0)
            opt.step()
            opt.zero_grad(set_to_none=True)
            if step % args.log == 0 or step in (1, args.steps):
                named = zip(("told", "look", "asked", "answer"), parts.tolist(), strict=True)
                text = " ".join(f"{name} {value:.3f}" for name, value in named)
                print(f"step {step} {text} {time.perf_counter() - start:.0f} s", flush=True)
            if progress >= 1.0:
                break
        pool.terminate()
    save_base(net, Shape(), args.out)
    print(f"saved {args.out} after {step} steps, {time.perf_counter() - start:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--init", type=Path, default=Path("kvrun/tiny"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, default=Path("kvrun/tiny/tokenizer.json"))
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--minutes", type=float, default=60.0, help="ends earlier when reached")
    parser.add_argument("--rows", type=int, default=64, help="documents a step")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--seed", type=int, default=200000)
    parser.add_argument("--log", type=int, default=100)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if args.out.resolve() != args.tokenizer.parent.resolve():
            shutil.copy(args.tokenizer.parent / name, args.out)
    train(args)


if __name__ == "__main__":
    main()
