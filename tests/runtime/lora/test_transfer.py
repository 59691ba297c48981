"""The way to a GPU through pinned buffers, on a device that is none: order, contents, waiting."""

import contextlib
import threading
from typing import Any

import pytest
import torch

from kvrun.errors import KvrunError
from kvrun.runtime.lora import transfer
from kvrun.runtime.lora.bank import LoraBank, Place
from kvrun.runtime.lora.sites import Sites
from tests.runtime.lora.adapters import ready
from tests.runtime.lora.test_pieces import SITES


class Device:
    """What a stream has been given. A copy happens when its event is waited for, not before."""

    def __init__(self) -> None:
        self.pending: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.arrived = threading.Event()
        self.arrived.set()

    @torch.inference_mode()
    def run(self) -> None:
        for target, source in self.pending:
            target.copy_(source)
        self.pending.clear()


DEVICE = Device()


class Event:
    def __init__(self) -> None:
        self._recorded = False

    def record(self, stream: Any) -> None:
        self._recorded = True

    def synchronize(self) -> None:
        if self._recorded:
            DEVICE.run()

    def query(self) -> bool:
        if DEVICE.arrived.is_set():
            DEVICE.run()
        return not DEVICE.pending


class Late(torch.Tensor):
    """A tensor of the device: what is copied to it arrives later."""

    def copy_(self, source: torch.Tensor, non_blocking: bool = False) -> "Late":
        assert non_blocking
        DEVICE.pending.append((self.as_subclass(torch.Tensor), source))
        return self


@pytest.fixture
def sender(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(transfer, "_pinned", lambda count: torch.zeros(count, dtype=torch.uint8))
    monkeypatch.setattr(transfer, "_ROOM", 64)
    monkeypatch.setattr(transfer, "_SHARE", 8)
    DEVICE.pending.clear()
    DEVICE.arrived.set()
    return lambda: transfer.Transfer(torch.device("cuda"))


def late(tensor: torch.Tensor) -> Any:
    return tensor.as_subclass(Late)


def test_all_bytes_arrive_although_the_buffers_are_few(sender: Any) -> None:
    """500 values need 16 turns of buffers; none is filled again before it has been read."""
    sources = [torch.randn(500).bfloat16(), torch.arange(33).view(3, 11), torch.randn(1)]
    targets = [torch.zeros_like(source) for source in sources]
    way = sender()
    landing = way.send([(s, late(t)) for s, t in zip(sources, targets, strict=True)])
    landing.sent.result()
    assert landing.query()
    for source, target in zip(sources, targets, strict=True):
        assert torch.equal(source, target)


def test_what_is_sent_later_arrives_later(sender: Any) -> None:
    way, target = sender(), torch.zeros(100)
    landings = [way.send([(torch.full((100,), float(n)), late(target))]) for n in range(1, 4)]
    landings[-1].sent.result()
    assert landings[-1].query()
    assert target.eq(3).all()


def test_it_has_landed_when_the_device_says_so(sender: Any) -> None:
    DEVICE.arrived.clear()
    target = torch.zeros(4)
    landing = sender().send([(torch.ones(4), late(target))])
    landing.sent.result()
    assert not landing.query()
    DEVICE.arrived.set()
    assert landing.query()
    assert target.eq(1).all()


def test_a_failure_is_said(sender: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(count: int) -> torch.Tensor:
        raise RuntimeError("out of memory\nand more")

    monkeypatch.setattr(transfer, "_pinned", full)
    landing = sender().send([(torch.ones(4), late(torch.zeros(4)))])
    landing.sent.exception()
    with pytest.raises(KvrunError, match="to the device") as caught:
        landing.query()
    assert caught.value.cause == "out of memory"


def test_a_bank_whose_device_is_apart(sender: Any) -> None:
    """An adapter is ready once it has landed; it stays in host memory, and comes back from it."""
    bank = bank_apart(SITES, sender(), room=SITES.lay_out(dict.fromkeys([(0, 0)], 4)).size)
    for name in ("one", "two"):
        bank.register(name, f"dummy:4:{name}:0.q_proj")
    found = {}
    for name in ("one", "two", "one"):
        adapter = bank.find(name)
        assert adapter
        DEVICE.arrived.clear()
        while bank.place(adapter, False) is Place.LOADING and not adapter.slot:
            bank.wait(10)
            bank.poll()
        assert bank.place(adapter, True) is Place.LOADING
        while bank.loading:
            bank.wait(10)
        DEVICE.arrived.set()
        assert ready(bank, adapter, pinned=True).state == "device"
        assert adapter.host is not None
        arena = bank.resident.arena.as_subclass(torch.Tensor)
        assert torch.equal(arena[: adapter.size], adapter.host)
        assert bank.resident.table[adapter.slot, 0, 1] == 4
        found.setdefault(name, adapter.host)
        assert adapter.host is found[name]
        bank.claim(adapter)
        bank.release(adapter, True)
    assert bank.resident.copies == 3


def test_the_engine_waits_for_what_is_being_sent(
    sender: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()
    monkeypatch.setattr(transfer.Transfer, "_fill", lambda *args: gate.wait())
    bank = bank_apart(SITES, sender(), room=1 << 12)
    bank.register("one", "dummy:4:1:0.q_proj")
    adapter = bank.find("one")
    assert adapter
    bank.place(adapter, False)
    while not adapter.slot:  # it is read first
        bank.wait(10)
        bank.poll()
        bank.place(adapter, False)
    assert bank.loading
    assert bank.place(adapter, True) is Place.LOADING
    gate.set()
    while bank.loading:
        bank.wait(10)
    ready(bank, adapter, pinned=True)


def bank_apart(sites: Sites, way: Any, room: int) -> LoraBank:
    """A bank whose arena and table are `Late`, room for so many elements."""
    bank = LoraBank(
        sites, device=torch.device("cpu"), dtype=torch.float32, room=4 * room, host_room=1 << 20
    )
    bank._apart, bank.resident._transfer = True, way
    bank.resident.arena = late(bank.resident.arena)
    bank.resident.table = late(bank.resident.table)
    return bank
