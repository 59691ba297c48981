"""From the command to the last token, and the memory of all processes together.

    python benchmarks/chat_start.py [RUNS]

Starts `kvrun chat --stats "What is 12 + 30?"` in new processes, after one run that fills the page
cache. Memory is the largest sum of resident sizes seen while a command runs, pages that processes
share counted in each.
"""

import argparse
import re
import statistics
import subprocess
import sys
import time

import psutil

COMMAND = [sys.executable, "-m", "kvrun", "chat", "--stats", "What is 12 + 30?"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", metavar="RUNS", type=int, nargs="?", default=5)
    runs = parser.parse_args().runs
    measured = [run() for _ in range(runs + 1)][1:]
    print(f"median (least, most) of {runs} runs")
    names = ("start to last token, s", "weights and pool, s", "memory of all processes, MB")
    for name, column in zip(names, zip(*measured, strict=True), strict=True):
        middle, least, most = statistics.median(column), min(column), max(column)
        print(f"{name:28} {middle:7.2f} ({least:.2f}, {most:.2f})")


def run() -> tuple[float, float, float]:
    """Seconds in all, seconds the engine took for weights and pool, and MB."""
    begun = time.perf_counter()
    with subprocess.Popen(COMMAND, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        parent = psutil.Process(process.pid)
        peak = 0
        while process.poll() is None:
            peak = max(peak, resident(parent))
            time.sleep(0.02)
        seconds = time.perf_counter() - begun
        out, said = (stream.read().decode() for stream in (process.stdout, process.stderr))
    if "42" not in out:
        raise SystemExit(f"the answer is {out!r}: {said}")
    load = re.search(r"weights and pool ([\d.]+) s", said)
    assert load
    return seconds, float(load[1]), peak / 1e6


def resident(parent: psutil.Process) -> int:
    total = 0
    try:
        for process in (parent, *parent.children(recursive=True)):
            total += process.memory_info().rss
    except psutil.NoSuchProcess:
        pass
    return total


if __name__ == "__main__":
    main()
