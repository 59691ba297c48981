"""Train the base model, or one adapter on a frozen base, on shards that are made meanwhile."""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

from recipes.tiny import adapters, corpus
from recipes.tiny.model import Adapted, Shape, Tiny
from recipes.tiny.muon import Muon

block_mask = torch.compile(create_block_mask)
BOS, EOS, SYSTEM, ASSISTANT, END = 1, 2, 3, 5, 7
USER_WEIGHT = 0.1
Z_LOSS = 1e-4


class Feeder:
    """Processes that write shards ahead of the trainer; shards come in a fixed order."""

    def __init__(
        self,
        task: str,
        tokenizer: Path,
        workers: int,
        shards: int,
        rows: int,
        seed: int,
        length: int = corpus.ROW,
    ) -> None:
        self.task, self.shards = task, shards
        memory = Path("/dev/shm")
        self.folder = Path(tempfile.mkdtemp(dir=memory if memory.is_dir() else None))
        shutil.copy(tokenizer, self.folder / "tokenizer.json")
        spawn = multiprocessing.get_context("spawn")
        self.workers = [
            spawn.Process(
                target=corpus.write_shards,
                args=(task, self.folder, w, workers, shards, rows, seed, length),
                daemon=True,
            )
            for w in range(workers)
        ]
        for worker in self.workers:
            worker.start()

    def batches(self, rows: int) -> Iterator[np.ndarray]:
        """Arrays [rows, length] until the shards end."""
        for index in range(self.shards):
            path = self.folder / f"{self.task}-{index}.npy"
            while not path.exists():
                if not any(w.is_alive() for w in self.workers) and not path.exists():
                    raise RuntimeError(f"shard {index} was never written")
                time.sleep(0.02)
            shard = np.load(path)
            path.unlink()
            for at in range(0, len(shard) - rows + 1, rows):
                yield shard[at : at + rows]

    def close(self) -> None:
        for worker in self.workers:
            worker.terminate()
        shutil.rmtree(self.folder, ignore_errors=True)


def weights(ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Loss weights of the tokens, document numbers and positions; all [rows, tokens]."""
    at = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    marker = (ids >= BOS) & (ids <= END)
    last = torch.where(marker, at, -1).cummax(1).values
    before = torch.cat((torch.full_like(last[:, :1], -1), last[:, :-1]), 1)
    owner = ids.gather(1, before.clamp(min=0))
    answer = (owner == ASSISTANT) | ((owner == BOS) & ((ids < BOS) | (ids == EOS) | (ids > END)))
    weight = torch.where(answer, 1.0, USER_WEIGHT) * (ids != 0) * (ids != BOS)
    document = (ids == BOS).cumsum(1)
    start = torch.where(ids == BOS, at, 0).cummax(1).values
    return weight, document, at - start


def attention_mask(document: Tensor, dense: bool = False) -> object:
    """Causal inside each document: a block mask on a GPU, a dense one on a CPU."""
    rows, tokens = document.shape
    if dense or document.device.type == "cpu":
        at = torch.arange(tokens, device=document.device)
        same = document[:, :, None] == document[:, None, :]
        return (same & (at[:, None] >= at[None, :]))[:, None]

    def allowed(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q >= k) & (document[b, q] == document[b, k])

    return block_mask(allowed, rows, None, tokens, tokens, device=document.device)


def loss_of(
    net: Tiny, ids: Tensor, weight: Tensor, positions: Tensor, mask: object
) -> tuple[Tensor, Tensor]:
    """The weighted loss with z-loss, and the plain loss over answers."""
    logits = net(ids, positions, mask)[:, :-1].float()
    norm = torch.logsumexp(logits, -1)
    gold = logits.gather(-1, ids[:, 1:, None]).squeeze(-1)
    w = weight[:, 1:]
    each = norm - gold
    full = (w * (each + Z_LOSS * norm.square())).sum() / w.sum()
    answers = (w == 1.0).float()
    return full, (answers * each).sum().detach() / answers.sum()


def save_base(net: Tiny, shape: Shape, out: Path) -> None:
    """Write config.json, generation_config.json and model.safetensors in bf16."""
    out.mkdir(parents=True, exist_ok=True)
    state = {k: v.detach().bfloat16().cpu().contiguous() for k, v in net.state_dict().items()}
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(shape.config(), indent=2) + "\n", encoding="utf-8")
    generation = {"bos_token_id": 1, "eos_token_id": [7, 2], "pad_token_id": 0, "do_sample": False}
    (out / "generation_config.json").write_text(
        json.dumps(generation, indent=2) + "\n", encoding="utf-8"
    )


def adapt(net: Tiny, task: str) -> list[torch.nn.Parameter]:
    """Freeze the network, put LoRA pairs into it, and return them."""
    shape = adapters.SHAPES[task]
    rank, alpha = int(str(shape["r"])), float(str(shape["lora_alpha"]))
    scale = alpha / math.sqrt(rank) if shape["use_rslora"] else alpha / rank
    net.requires_grad_(False)
    for module in list(net.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, torch.nn.Linear) and name in list(shape["target_modules"]):  # type: ignore[call-overload]
                setattr(module, name, Adapted(child, rank, scale))
    return [p for p in net.parameters() if p.requires_grad]


def save_adapter(net: Tiny, task: str, out: Path) -> None:
    """Write a PEFT folder: adapter_config.json and adapter_model.safetensors in bf16."""
    out.mkdir(parents=True, exist_ok=True)
    state = {
        "base_model.model." + k + ".weight": v.detach().bfloat16().cpu().contiguous()
        for k, v in net.state_dict().items()
        if k.endswith(("lora_A", "lora_B"))
    }
    save_file(state, out / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "tiny",
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_dropout": 0.0,
        **adapters.SHAPES[task],
    }
    (out / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def load_adapter(net: Tiny, folder: Path) -> None:
    """Put the pairs of a PEFT folder into an adapted network."""
    state = load_file(folder / "adapter_model.safetensors")
    pairs = {
        k.removeprefix("base_model.model.").removesuffix(".weight"): v.float()
        for k, v in state.items()
    }
    wanted = {k for k in net.state_dict() if k.endswith(("lora_A", "lora_B"))}
    if set(pairs) != wanted:
        raise ValueError(f"{folder} is not an adapter of this task")
    net.load_state_dict(pairs, strict=False)


def optimizers(
    net: Tiny, adapter: list[torch.nn.Parameter] | None, lr: float
) -> list[torch.optim.Optimizer]:
    if adapter is not None:
        return [torch.optim.AdamW(adapter, lr=lr, betas=(0.9, 0.99), weight_decay=0.01)]
    named = list(net.named_parameters())
    matrices = [p for n, p in named if p.dim() == 2 and "embed" not in n]
    embedding = [p for n, p in named if "embed" in n]
    norms = [p for n, p in named if p.dim() == 1]
    adam = torch.optim.AdamW(
        [
            {"params": embedding, "lr": lr * 0.2, "weight_decay": 0.01},
            {"params": norms, "lr": lr * 0.2, "weight_decay": 0.0},
        ],
        betas=(0.9, 0.95),
    )
    return [Muon(matrices, lr=lr), adam]


def rate(progress: float, warm: float = 0.02, cool: float = 0.5) -> float:
    """Share of the learning rate: warm up, stay, then fall to zero in a straight line."""
    if progress < warm:
        return progress / warm
    return min(1.0, (1.0 - progress) / cool)


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shape = replace(Shape(), num_hidden_layers=args.layers) if args.layers else Shape()
    net = Tiny(shape).to(device)
    known = args.base if args.task in adapters.TASKS else args.init
    if known:
        state = load_file(known / "model.safetensors")
        net.load_state_dict({k: v.float() for k, v in state.items()})
    lora = adapt(net, args.task) if args.task in adapters.TASKS else None
    if args.adapter:
        load_adapter(net, args.adapter)
    opts = optimizers(net, lora, args.lr or (0.02 if lora is None else 1.5e-3))
    base_rates = [[g["lr"] for g in o.param_groups] for o in opts]
    step_fn = torch.compile(loss_of) if device.type == "cuda" else loss_of
    per_shard = args.shard_rows // args.rows
    shards = math.ceil(args.steps / per_shard)
    feeder = Feeder(
        args.task, args.tokenizer, args.workers, shards, args.shard_rows, args.seed, args.length
    )  # fmt: skip
    start = log_time = time.perf_counter()
    first = start
    step, seen = 0, 0
    for batch in feeder.batches(args.rows):
        ids = torch.from_numpy(batch.astype(np.int64)).to(device)
        weight, document, positions = weights(ids)
        # The clock starts behind the first step, which compiles.
        spent = time.perf_counter() - first if step else 0.0
        progress = max(step / args.steps, spent / (args.minutes * 60))
        for o, rates in zip(opts, base_rates, strict=True):
            for group, lr in zip(o.param_groups, rates, strict=True):
                group["lr"] = lr * rate(min(progress, 1.0))
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss, answers = step_fn(
                net, ids, weight, positions, attention_mask(document, args.dense)
            )
        loss.backward()
        if lora is not None:
            torch.nn.utils.clip_grad_norm_(lora, 1.0)
        for o in opts:
            o.step()
        net.zero_grad(set_to_none=True)
        step, seen = step + 1, seen + ids.numel()
        if step == 1:
            torch.cuda.synchronize() if device.type == "cuda" else None
            first = time.perf_counter()
        now = time.perf_counter()
        if now - log_time > 8 or step in (1, 10) or step == args.steps:
            log_time = now
            losses = f"loss {loss.item():.4f} answers {answers.item():.4f}"
            speed = f"{seen / 1e6:.0f}M tokens {now - start:.0f}s"
            print(f"{args.task} step {step}/{args.steps} {losses} {speed}", flush=True)
        if lora is None and args.every and step % args.every == 0:
            save_base(net, shape, args.out)
        if step >= args.steps or progress >= 1.0:
            break
    feeder.close()
    save_base(net, shape, args.out) if lora is None else save_adapter(net, args.task, args.out)
    print(f"saved {args.out} after {step} steps, {time.perf_counter() - start:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", default="base", choices=list(corpus.TASKS))
    parser.add_argument("--out", type=Path, default=Path("kvrun/tiny"))
    parser.add_argument(
        "--base", type=Path, default=Path("kvrun/tiny"), help="the base of an adapter"
    )
    parser.add_argument("--tokenizer", type=Path, default=Path("kvrun/tiny/tokenizer.json"))
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--minutes", type=float, default=60.0, help="ends earlier when reached")
    parser.add_argument("--rows", type=int, default=128, help="rows of 2048 tokens a step")
    parser.add_argument("--shard-rows", type=int, default=512)
    parser.add_argument("--dense", action="store_true", help="no flex attention")
    parser.add_argument("--lr", type=float, default=0.0)
    parser.add_argument("--layers", type=int, default=0)
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 1))
    parser.add_argument("--every", type=int, default=0, help="save the base every so many steps")
    parser.add_argument("--init", type=Path, help="go on from the base in this folder")
    parser.add_argument("--adapter", type=Path, help="go on from the adapter in this folder")
    parser.add_argument("--length", type=int, default=corpus.ROW, help="tokens a row")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first shard")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
