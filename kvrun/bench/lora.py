"""What adapters cost: the same work on the base model and on many adapters, side by side."""

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from random import Random

from kvrun.bench.limits import Limits
from kvrun.bench.measure import SETTLE, WARM_UP, Row, Watch
from kvrun.bench.spread import median, percentile
from kvrun.bench.target import Target
from kvrun.bench.workloads import Workload, fixed, inside
from kvrun.errors import InvalidRequest, KvrunError

# Which adapter each of `count` requests has, of so many; as in Punica's benchmark.
POPULARITY: dict[str, Callable[[int, int, Random], list[int]]] = {
    "identical": lambda count, adapters, source: [0] * count,
    "skewed": lambda count, adapters, source: _zipf(count, adapters, source),
    "uniform": lambda count, adapters, source: [source.randrange(adapters) for _ in range(count)],
    "distinct": lambda count, adapters, source: [n % adapters for n in range(count)],
}
_SKEW = 1.5  # the n-th adapter is asked for 1 / n ** 1.5 as often as the first


def popularity(text: str) -> list[str]:
    """Names of POPULARITY, separated by commas. Raises InvalidRequest."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    wrong = next((name for name in names if name not in POPULARITY), None)
    if wrong or not names:
        raise InvalidRequest(f"--popularity is '{text}'.", hint=f"some of: {', '.join(POPULARITY)}")
    return names


def adapters(count: int, rank: int, targets: str) -> dict[str, str]:
    """So many random adapters, made when they are first wanted: name -> where to find it."""
    ends = f":{targets}" if targets else ""
    return {f"random-{n}": f"dummy:{rank}:{n}{ends}" for n in range(count)}


def check_targets(target: Target) -> None:
    """Raise InvalidRequest where the adapters name a product that the model has not."""
    _, _, _, *targets = target.llm.adapters()[0].path.split(":")
    for name in targets[0].split(",") if targets else ():
        # An empty name would be the end of every other.
        if not name or not _bytes_of(target, name):
            raise InvalidRequest(
                f"--targets: this model has no product called '{name}'.",
                hint="ends of its matrices' names, as q_proj,v_proj",
            )


def _bytes_of(target: Target, name: str) -> int:
    """How large an adapter of rank 1 on the products of one name is."""
    info = target.llm.load_adapter("of one product", f"dummy:1:0:{name}")
    target.llm.unload_adapter(info.name)
    return info.bytes


def steps(
    target: Target,
    batches: Sequence[int],
    kinds: Sequence[str],
    *,
    prompt: int,
    new: int,
    repetitions: int,
    limits: Limits,
    seed: int,
    watch: Watch,
) -> Iterator[Row]:
    """A decode step of each batch, with adapters by each popularity, beside the base model's."""
    for batch in batches:
        prompts = [inside(ids, target.model.vocab_size) for ids in fixed(batch, prompt, seed)]
        chosen = {kind: _chosen(target, kind, batch, seed) for kind in kinds}
        names: dict[str, Sequence[str | None]] = {"base": [None] * batch, **chosen}
        found: dict[str, list[float]] = {kind: [] for kind in names}
        for kind, which in names.items():
            # As long as the shorter run: what is made when it is first wanted is there then.
            watch(f"{kind}, batch {batch}, warming up")
            target.seconds(prompts, [SETTLE + WARM_UP] * batch, which)
        for number in range(repetitions):
            for kind, which in names.items():  # in turns, so that all see the same machine
                watch(f"{kind}, batch {batch}, {number + 1}/{repetitions}")
                short = target.seconds(prompts, [SETTLE] * batch, which)
                long = target.seconds(prompts, [SETTLE + new] * batch, which)
                if long > short:
                    found[kind].append((long - short) / new)
        yield from _rows(target, f"tg{new}", batch, names, found, limits, seed)


def throughput(
    target: Target,
    work: Workload,
    kinds: Sequence[str],
    *,
    repetitions: int,
    limits: Limits,
    seed: int,
    watch: Watch,
) -> Iterator[Row]:
    """All requests of a workload at once, with adapters and without."""
    prompts = list(work.within(target.model.vocab_size).prompts)
    count = len(prompts)
    chosen = {kind: _chosen(target, kind, count, seed) for kind in kinds}
    names: dict[str, Sequence[str | None]] = {"base": [None] * count, **chosen}
    found: dict[str, list[float]] = {kind: [] for kind in names}
    for kind, which in names.items():
        watch(f"{work.name}, {kind}, warming up")
        target.seconds(prompts[:2], [min(WARM_UP, work.output_tokens[0])] * 2, which[:2])
    if target.ready.device.startswith("cuda"):
        watch(f"{work.name}, every batch size with adapters")
        _all_sizes(target, work)
    for number in range(repetitions):
        for kind, which in names.items():
            watch(f"{work.name}, {kind}, {number + 1}/{repetitions}")
            found[kind].append(target.seconds(prompts, work.output_tokens, which))
    for row in _rows(target, work.name, count, names, found, limits, seed):
        tokens = work.total_output
        yield row | {"floor_ms": None, "output_throughput": 1e3 * tokens / row["median_ms"]}


def _all_sizes(target: Target, work: Workload) -> None:
    """Batches from the largest one down to a single sequence, all on the last adapter: a step with
    adapters is captured when its size is first wanted, and that is no part of the work."""
    most = min(len(work.prompts), target.ready.max_num_seqs, work.longest - 1)
    name = target.llm.adapters()[-1].name
    target.seconds([[1]] * most, range(1, most + 1), [name] * most)


def _rows(
    target: Target,
    test: str,
    batch: int,
    names: dict[str, Sequence[str | None]],
    found: dict[str, list[float]],
    limits: Limits,
    seed: int,
) -> Iterator[Row]:
    if not all(found.values()):
        raise KvrunError(
            f"batch {batch}: every difference measured is below zero.",
            cause="what else runs on this machine weighs more than the test",
            hint="close other programs, or make the test longer: -n 128 -r 10",
        )
    sizes = {info.name: info.bytes for info in target.llm.adapters()}
    base = median(found["base"])
    for kind, samples in found.items():
        distinct = {name for name in names[kind] if name}
        read = sum(sizes[name] for name in distinct)
        yield {
            "test": test, "popularity": kind, "batch_size": batch, "adapters": len(distinct),
            "adapter_bytes": read, "repetitions": len(samples), "seed": seed,
            "median_ms": 1e3 * median(samples), "p10_ms": 1e3 * percentile(samples, 10),
            "p90_ms": 1e3 * percentile(samples, 90), "samples_ms": [1e3 * s for s in samples],
            "over_base_ms": 1e3 * (median(samples) - base),
            "base_percent": 100 * base / median(samples),
            # Every adapter in use is read once.
            "floor_ms": 1e3 * read / limits.measured.bandwidth if limits.measured else None,
        }  # fmt: skip


def _chosen(target: Target, kind: str, count: int, seed: int) -> list[str | None]:
    known = [info.name for info in target.llm.adapters()]
    return [known[n] for n in POPULARITY[kind](count, len(known), Random(seed))]


def _zipf(count: int, adapters: int, source: Random) -> list[int]:
    weights = list(accumulate((n + 1) ** -_SKEW for n in range(adapters)))
    return source.choices(range(adapters), cum_weights=weights, k=count)
