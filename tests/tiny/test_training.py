"""The training of looking up: marks at the right tokens, a loss that falls, adapters that go on."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # torch's own, once, at the import
    from recipes.tiny import drills, lookup, train
    from recipes.tiny.model import Shape, Tiny

TINY = Path(__file__).parents[2] / "kvrun" / "tiny"


def test_marks_lead_from_a_thing_to_its_owner() -> None:
    tokenizer = lookup.tokenizer_of(TINY / "tokenizer.json")
    facts = [
        drills.Fact("Ben", "red hat", "Ben has the red hat", ("", ""), ("", "")),
        drills.Fact("Mia", "key", "Mia has a key", ("", ""), ("", "")),
    ]
    text = "<|bos|><|user|>Ben has the red hat. Mia has a key. Who has the key?<|end|><|assistant|>The key is with Mia.<|end|>"  # noqa: E501
    found = lookup.marked(text, facts, tokenizer)

    def word(token: int) -> str:
        return tokenizer.decode([token]).strip()

    assert [(word(found.ids[at]), word(name)) for at, name in found.told] == [
        ("hat", "B"),
        ("key", "Mia"),
    ]
    ((at, there, name),) = found.asked
    assert (word(found.ids[at]), word(found.ids[there]), word(name)) == ("key", "key", "Mia")
    assert there == found.told[1][0] < at


def test_the_lookup_is_learnt_from_marks() -> None:
    torch.manual_seed(0)
    shape = Shape(
        hidden_size=64, num_hidden_layers=6, head_dim=16, intermediate_size=64, vocab_size=4096
    )
    net = lookup.Lookup(Tiny(shape))
    inputs = [torch.from_numpy(a) for a in lookup.batch((TINY / "tokenizer.json", 1, 4))]
    opt = torch.optim.AdamW(net.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        loss, parts = net(*inputs)
        assert parts.shape == (4,)
        loss.backward()
        opt.step()
        opt.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] * 0.9


def test_an_adapter_goes_on_from_its_own_files_only() -> None:
    net = Tiny(Shape())
    train.adapt(net, "pirate")
    train.load_adapter(net, TINY / "adapters" / "pirate")
    pairs = [v for k, v in net.state_dict().items() if k.endswith("lora_B")]
    assert all(v.abs().sum() > 0 for v in pairs)
    with pytest.raises(ValueError, match="not an adapter of this task"):
        train.load_adapter(net, TINY / "adapters" / "sql")
