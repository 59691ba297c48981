"""kvrun bench: how fast a model, a server and the hardware are, beside what they could be."""

import os
from typing import Annotated

from kvrun.cli import _bench as bench
from kvrun.cli import _options as options
from kvrun.cli._interrupt import import_torch
from kvrun.errors import InvalidRequest

PANEL = "Tools"
HELP = "Measure the speed of a model, a server or the hardware, beside its limits."
EXAMPLES = (
    "kvrun bench micro -p 128,512 -n 128 -b 1-8*2 -d 0,1024     prompts and steps of tiny",
    "kvrun bench micro --shape llama-3-8b -p 0 -d 512 -b 1,256  a shape, nothing downloaded",
    "kvrun bench latency --input-len 512 --output-len 1 -b 1    time to the first token",
    "kvrun bench throughput -w mixed256 -w prompts.jsonl        many requests at once",
    "kvrun bench lora --shape llama-3-8b -b 1,64                random adapters beside the base",
    "kvrun bench load http://127.0.0.1:3000 -c 32 --text        a server, by 32 clients",
    "kvrun bench load http://HOST:8000 --rate 5 --slo ttft=200  by 5 requests a second",
    "kvrun bench hw -o json                                     what figures are divided by",
)


def micro(
    model: bench.ModelName = None,
    prompts: Annotated[
        str, bench.work("-p", metavar="LIST", help="Prompt lengths: 128,512 or 0-512+128.")
    ] = "512",
    news: Annotated[
        str, bench.work("-n", metavar="LIST", help="Generated tokens; 0 leaves them out.")
    ] = "128",
    batches: Annotated[
        str, bench.work("-b", metavar="LIST", help="Sequences at once: 1,8 or 1-64*2.")
    ] = "1",
    depths: Annotated[
        str, bench.work("-d", metavar="LIST", help="Tokens that are there before.")
    ] = "0",
    repetitions: bench.Repetitions = 5,
    seed: bench.Seed = 1,
    no_roofline: bench.NoRoofline = False,
    shape: bench.Shape = None,
    random: bench.Random = False,
    form: bench.Format = "table",
    chart: bench.Chart = None,
    plot: bench.Plot = None,
    no_progress: bench.NoProgress = False,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    quantize: options.Quantize = None,
    max_model_len: options.MaxModelLen = None,
    kv_memory: options.KvMemory = None,
    threads: options.Threads = None,
    no_fallback: options.NoFallback = False,
    engine: bench.Engine = None,
    yes: options.Yes = False,
) -> None:
    """Prompts (pp) and generated tokens (tg) apart, by batch and depth, as llama-bench does.

    A step is (time of 8 + N tokens - time of 8) / N: the prompt falls out of it.
    """
    import_torch()
    from kvrun.bench import measure, ranges, report, run

    bench.check(repetitions=repetitions)
    todo = measure.cases(
        ranges.parse("-p", prompts),
        ranges.parse("-n", news),
        ranges.parse("-b", batches, least=1),
        ranges.parse("-d", depths),
    )
    out = report.Report(form, chart, plot)
    subject = run.Subject.of(
        bench.model_name(model, shape, yes), shape, random, engine=engine or (), threads=threads,
        roofline=not no_roofline, device=device, dtype=dtype, max_model_len=max_model_len,
        kv_memory=options.memory(kv_memory), quantize=quantize, fallback=not no_fallback,
    )  # fmt: skip
    run.micro(subject, todo, repetitions, seed, out, shown=not no_progress)


def latency(
    model: bench.ModelName = None,
    input_len: Annotated[
        int, bench.work("--input-len", metavar="N", help="Tokens of each prompt.")
    ] = 32,
    output_len: Annotated[
        int, bench.work("--output-len", metavar="N", help="Tokens of each answer.")
    ] = 128,
    batch_size: Annotated[
        int, bench.work("--batch-size", "-b", metavar="N", help="Requests at once.")
    ] = 8,
    warm_ups: Annotated[
        int, bench.work("--warm-ups", metavar="N", help="Runs that do not count.")
    ] = 3,
    repetitions: bench.Repetitions = 10,
    seed: bench.Seed = 1,
    no_roofline: bench.NoRoofline = False,
    shape: bench.Shape = None,
    random: bench.Random = False,
    form: bench.Format = "table",
    chart: bench.Chart = None,
    plot: bench.Plot = None,
    no_progress: bench.NoProgress = False,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    quantize: options.Quantize = None,
    max_model_len: options.MaxModelLen = None,
    kv_memory: options.KvMemory = None,
    threads: options.Threads = None,
    no_fallback: options.NoFallback = False,
    engine: bench.Engine = None,
    yes: options.Yes = False,
) -> None:
    """Seconds for one batch of equal requests; with --output-len 1 the time to the first token.

    Each repetition has prompts of its own: those of seed, seed + 1, ...
    """
    import_torch()
    from kvrun.bench import report, run, workloads

    bench.check(
        input_len=input_len, output_len=output_len, batch_size=batch_size, repetitions=repetitions
    )
    bench.check(0, warm_ups=warm_ups)
    work = workloads.uniform(batch_size, input_len, output_len)
    out = report.Report(form, chart, plot)
    subject = run.Subject.of(
        bench.model_name(model, shape, yes), shape, random, engine=engine or (), threads=threads,
        roofline=not no_roofline, device=device, dtype=dtype, max_model_len=max_model_len,
        kv_memory=options.memory(kv_memory), quantize=quantize, fallback=not no_fallback,
    )  # fmt: skip
    run.latency(
        subject, work, warm_ups=warm_ups, repetitions=repetitions, seed=seed, out=out,
        shown=not no_progress,
    )  # fmt: skip


def throughput(
    model: bench.ModelName = None,
    workload: bench.Workloads = None,
    requests: bench.Requests = None,
    output_len: bench.OutputLen = 128,
    repetitions: bench.Repetitions = 3,
    seed: bench.Seed = 1,
    no_roofline: bench.NoRoofline = False,
    shape: bench.Shape = None,
    random: bench.Random = False,
    form: bench.Format = "table",
    chart: bench.Chart = None,
    plot: bench.Plot = None,
    no_progress: bench.NoProgress = False,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    quantize: options.Quantize = None,
    max_model_len: options.MaxModelLen = None,
    kv_memory: options.KvMemory = None,
    threads: options.Threads = None,
    no_fallback: options.NoFallback = False,
    engine: bench.Engine = None,
    yes: options.Yes = False,
) -> None:
    """Many requests that are all there at once: requests and tokens a second.

    A file has one JSON object a line: {"prompt": text or [ids], "output_tokens": N}.
    """
    import_torch()
    from kvrun.bench import report, run, workloads

    bench.check(requests=requests, output_len=output_len, repetitions=repetitions)
    todo = [
        workloads.find(name, count=requests, output_len=output_len, seed=seed)
        for name in workload or ["128/128"]
    ]
    out = report.Report(form, chart, plot)
    subject = run.Subject.of(
        bench.model_name(model, shape, yes), shape, random, engine=engine or (), threads=threads,
        roofline=not no_roofline, device=device, dtype=dtype, max_model_len=max_model_len,
        kv_memory=options.memory(kv_memory), quantize=quantize, fallback=not no_fallback,
    )  # fmt: skip
    run.throughput(subject, todo, repetitions, seed, out, shown=not no_progress)


def lora(
    model: bench.ModelName = None,
    batches: bench.Batches = "1,8",
    popularity: bench.Popularity = "identical,skewed,uniform,distinct",
    adapters: bench.AdapterCount = None,
    rank: bench.Rank = 16,
    targets: bench.Targets = "",
    prompt: Annotated[int, bench.work("-p", metavar="N", help="Tokens of each prompt.")] = 512,
    new: Annotated[int, bench.work("-n", metavar="N", help="Generated tokens.")] = 128,
    workload: bench.InsteadOfSteps = None,
    repetitions: bench.Repetitions = 3,
    seed: bench.Seed = 1,
    no_roofline: bench.NoRoofline = False,
    shape: bench.Shape = None,
    random: bench.Random = False,
    form: bench.Format = "table",
    chart: bench.Chart = None,
    plot: bench.Plot = None,
    no_progress: bench.NoProgress = False,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    max_model_len: options.MaxModelLen = None,
    kv_memory: options.KvMemory = None,
    threads: options.Threads = None,
    yes: options.Yes = False,
    engine: bench.Engine = None,
) -> None:
    """Requests on random LoRA adapters beside the same on the base model.

    "bytes" is the time to read each adapter in use once. -e lora_memory=BYTES says how many are
    on the device at once.
    """
    import_torch()
    from kvrun.bench import lora, ranges, report, run, workloads

    bench.check(p=prompt, n=new, repetitions=repetitions, adapters=adapters, rank=rank)
    kinds, sizes = lora.popularity(popularity), ranges.parse("-b", batches, least=1)
    works = [workloads.find(name, count=None, output_len=new, seed=seed) for name in workload or ()]
    out = report.Report(form, chart, plot)
    subject = run.Subject.of(
        bench.model_name(model, shape, yes), shape, random, engine=engine or (), threads=threads,
        roofline=not no_roofline, device=device, dtype=dtype, max_model_len=max_model_len,
        kv_memory=options.memory(kv_memory),
    )  # fmt: skip
    run.lora(
        subject, sizes, works, kinds, prompt=prompt, new=new, repetitions=repetitions, seed=seed,
        adapters=lora.adapters(adapters or max(sizes), rank, targets), out=out,
        shown=not no_progress,
    )  # fmt: skip


def load(
    url: bench.Url,
    concurrency: bench.Concurrency = None,
    rate: bench.Rate = None,
    workload: bench.Workload = "128/128",
    requests: bench.Requests = None,
    output_len: bench.OutputLen = 128,
    text: bench.Text = False,
    vocab: bench.Vocab = None,
    no_ignore_eos: bench.NoIgnoreEos = False,
    slo: bench.Slo = "",
    timeout: bench.Timeout = 600.0,
    seed: bench.Seed = 1,
    model: bench.ServedModel = None,
    api: bench.Api = None,
    api_key: bench.ApiKey = None,
    form: bench.Format = "table",
    chart: bench.Chart = None,
    plot: bench.Plot = None,
    no_progress: bench.NoProgress = False,
) -> None:
    """Any OpenAI-compatible server under load: latencies, rates, goodput.

    One request is made before, and not counted. Answers are streamed and greedy.
    """
    from kvrun.bench import completions, report, server, workloads
    from kvrun.bench.load import as_text, parse_slo

    bench.check(concurrency=concurrency, requests=requests, output_len=output_len, vocab=vocab)
    if concurrency is not None and rate is not None:
        raise InvalidRequest("there are --concurrency and --rate.", hint="choose one of them")
    out = report.Report(form, chart, plot)
    route = completions.Route.of(url, api)
    work = workloads.find(workload, count=requests, output_len=output_len, seed=seed)
    if vocab:
        work = work.within(vocab)
    if text or route.chat:
        work = as_text(work, seed)
    plan = server.Load(
        route, model, api_key or os.environ.get("OPENAI_API_KEY"), concurrency or 8, rate,
        not no_ignore_eos, timeout, seed, parse_slo(slo),
    )  # fmt: skip
    server.measure(plan, work, out, shown=not no_progress)


def hw(
    form: bench.Format = "table",
    chart: bench.Chart = None,
    plot: bench.Plot = None,
    no_progress: bench.NoProgress = False,
    device: options.Device = "auto",
    threads: options.Threads = None,
) -> None:
    """Measure what memory, matrix products and links reach here; the other commands divide by it.

    They measure the same, in short, on their own when it has never been done.
    """
    import_torch()
    from kvrun.bench import report, run

    out = report.Report(form, chart, plot)
    run.machine(device, threads, out, shown=not no_progress)


COMMANDS = {
    "micro": micro,
    "latency": latency,
    "throughput": throughput,
    "lora": lora,
    "load": load,
    "hw": hw,
}
