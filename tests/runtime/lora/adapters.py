"""PEFT folders for tests, made by PEFT itself, and a driver whose rows have adapters."""

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from kvrun.runtime.kernels.native import lora
from kvrun.runtime.lora.bank import LoraBank
from kvrun.runtime.lora.bank import Place as Answer
from kvrun.runtime.lora.beyond import beyond
from kvrun.runtime.lora.grouped import Grouped
from kvrun.runtime.lora.resident import Adapter
from kvrun.runtime.lora.rows import Compiled, Rows, Tiled, tiled
from kvrun.runtime.lora.sites import Sites
from tests.runtime.driver import Driver

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def peft_model(base: Any, seed: int, **config: Any) -> Any:
    """`base` with a random adapter that moves its logits; `base` itself is changed."""
    from peft import LoraConfig, get_peft_model  # folders are written without it, too

    torch.manual_seed(seed)
    values = {"r": 4, "lora_alpha": 8, "target_modules": ALL, **config}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of merging, of names, of how PEFT asks transformers
        model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **values)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.mul_(torch.rand_like(parameter) + 0.5)
            elif "lora_" in name or "modules_to_save" in name:
                parameter.normal_(0.0, 0.2)
            elif "trainable_tokens_delta" in name:
                parameter.normal_(0.0, 0.5)
            elif parameter.requires_grad:  # biases
                parameter += torch.randn_like(parameter) * 0.3
    return model


def save(model: Any, folder: Path, **options: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of base weights in the file, of biases
        model.save_pretrained(folder, **options)


def edit(folder: Path, change: Any = None, **config: Any) -> Path:
    """Change an adapter's tensors and configuration in place."""
    file = folder / "adapter_model.safetensors"
    if change is not None:
        tensors = change(load_file(file))
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return folder


def write(
    folder: Path,
    shapes: dict[str, tuple[int, int]],
    rank: int = 4,
    alpha: float = 8,
    seed: int = 0,
    spread: float = 0.2,
    **config: Any,
) -> dict[str, torch.Tensor]:
    """A folder without PEFT: module -> (out, in); returns what it adds to each weight."""
    generator = torch.Generator().manual_seed(seed)
    tensors, deltas = {}, {}
    for module, (out, inner) in shapes.items():
        a = torch.randn(rank, inner, generator=generator) * spread
        b = torch.randn(out, rank, generator=generator) * spread
        tensors[f"base_model.model.{module}.lora_A.weight"] = a
        tensors[f"base_model.model.{module}.lora_B.weight"] = b
        deltas[module] = alpha / rank * b @ a
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    values = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "bias": "none", **config}
    (folder / "adapter_config.json").write_text(json.dumps(values))
    return deltas


def write_kinds(root: Path, shapes: dict[str, tuple[int, int]], vocab: int) -> dict[str, str]:
    """Folders without PEFT, one for each kind of what an adapter can change: name -> path.

    `shapes` of the products of a model of llama's make, whose embedding and head are [vocab, in].
    """
    head, embed = "base_model.model.lm_head", "base_model.model.model.embed_tokens"
    q = {name: shape for name, shape in shapes.items() if "q_proj" in name}
    hidden = next(iter(q.values()))[1]
    norms = [name.replace("self_attn.q_proj", "input_layernorm") for name in q]

    def random(seed: int, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.5

    magnitudes = {
        f"base_model.model.{name}.lora_magnitude_vector": random(7, out).abs() + 0.2
        for name, (out, _) in shapes.items()
    }
    tables = {
        f"{embed}.lora_embedding_A": random(1, 4, vocab),
        f"{embed}.lora_embedding_B": random(2, hidden, 4),
        f"{head}.lora_A.weight": random(3, 4, hidden), f"{head}.lora_B.weight": random(4, vocab, 4),
    }  # fmt: skip
    saved = {
        f"{embed}.weight": random(5, vocab, hidden),
        f"{head}.weight": random(6, vocab, hidden),
    }
    kinds: dict[str, tuple[dict[str, torch.Tensor], dict[str, Any]]] = {
        "dora": (magnitudes, {"use_dora": True}),
        "tables": (tables, {}),
        "saved": (saved, {"modules_to_save": ["lm_head"]}),
        "biased": (
            {f"base_model.model.{name}.base_layer.bias": random(9, out)
             for name, (out, _) in q.items()},
            {"bias": "lora_only"},
        ),
        "four": ({}, {}),
        "shifted": (
            {f"base_model.model.{name}.lora_B.bias": random(10, out)
             for name, (out, _) in q.items()},
            {"lora_bias": True},
        ),
        "norms": (
            {f"base_model.model.{name}.weight": 1 + random(11, hidden) for name in norms},
            {"modules_to_save": ["input_layernorm"]},
        ),
        "tokens": (
            {f"{embed}.token_adapter.trainable_tokens_delta": random(12, vocab // 2, hidden)},
            {"trainable_token_indices": [*range(0, vocab, 2)]},
        ),
    }  # fmt: skip
    for seed, (name, (more, config)) in enumerate(kinds.items()):
        write(root / name, shapes if name == "dora" else q, seed=seed, spread=0.5)
        edit(root / name, lambda tensors, more=more: {**tensors, **more}, **config)
    return {name: str(root / name) for name in kinds}


def make_bank(products: Sequence[Any], room: int = 64 << 20, **options: Any) -> LoraBank:
    values: dict[str, Any] = {"device": torch.device("cpu"), "dtype": torch.float32, **options}
    return LoraBank(Sites(products), room=room, host_room=1 << 30, **values)


def ready(bank: LoraBank, adapter: Adapter, pinned: bool = False) -> Adapter:
    """The adapter once it lies on the device, pinned."""
    while bank.place(adapter, pinned) is not Answer.READY:
        bank.wait(10)
        bank.poll()
    return adapter


def rows_of(bank: LoraBank, slots: Sequence[int], form: str) -> Rows:
    """The rows of a step in a form for CPU, or in the kernels' (small tiles make many)."""
    of_row = np.array(slots)
    extra = beyond(bank.resident, of_row, lambda *columns: [torch.tensor(c) for c in columns])
    if form in ("joined", "apart"):
        grouped = Grouped(bank.resident, of_row, extra)
        grouped._joined = form == "joined"  # else a matter of size
        return grouped
    if form == "compiled":
        return Compiled(bank.resident, of_row, lora, extra)
    rows, tiles = tiled(of_row, 3)
    known = None if form == "captured" else sorted(set(slots) - {0})
    return Tiled(bank.resident, torch.from_numpy(rows), torch.from_numpy(tiles), 3, known, extra)


class Adapted(Driver):
    """A Driver with a bank; a step's work also names an adapter, or None."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.bank = make_bank(self.model.products)

    @torch.inference_mode()
    def adapted(
        self, work: Sequence[tuple[int, Sequence[int], Any]], form: str
    ) -> list[torch.Tensor]:
        """The logits of each sequence's new tokens."""
        slots: list[int] = []
        for _, ids, choice in work:
            adapter = self.bank.find(choice)
            slots += [ready(self.bank, adapter).slot if adapter else 0] * len(ids)
        batch = self.prepared([(sequence, ids) for sequence, ids, _ in work])
        batch.lora = rows_of(self.bank, slots, form) if any(slots) else None
        logits = self.model.capped(self.model(batch))
        self.states.commit(self.slots)
        return list(logits.split([len(ids) for _, ids, _ in work]))
