"""Replicas in one program: ways to convolve many small networks, and a pack beside one process for each core.

Run with `python benchmarks/replicas.py [--rounds N] [--widths N ...] [--out FILE]`. Prints tables and writes them as
JSON, by default to benchmarks/results/replicas.json. Wall-clock ratios need a quiet machine; the ratio of CPU times
beside them does not.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from alrc_lab.experiments.cifar10_supersampling import Config, Trainer
from alrc_lab.experiments.supersampling_replicas import Pack, largest_pack
from alrc_lab.runner import available_cores
from side_by_side import header

SIZE = 32
UPDATES = 64
"""Updates in a block of images: what a round trains of a pack."""
THRESHOLDS = (None, 3.0, 2.0, 4.0)
COLUMNS = ("alone", "grouped", "grouped, channels last", "im2col + bmm", "vmap")


# --- one 3 × 3 layer, forward and backward, in five ways ---


def im2col(images: Tensor, weights: Tensor) -> Tensor:
    """Convolve (replicas, batch, height, width, channels) by (replicas, 9 · channels, outputs), same padding."""
    replicas, batch, height, width, channels = images.shape
    padded = F.pad(images, (0, 0, 1, 1, 1, 1)).flatten(0, 1)
    a, b, c, d = padded.stride()
    patches = padded.as_strided((replicas * batch, height, width, 3, 3, channels), (a, b, c, b, c, d))
    return torch.bmm(patches.reshape(replicas, batch * height * width, 9 * channels), weights)


def layer_calls(channels: int, replicas: int, dtype: torch.dtype, device: str) -> dict[str, Callable[[], None]]:
    """Make one forward and backward pass of a layer of all replicas, batch 1, in every way."""
    options: Any = {"dtype": dtype, "device": device}
    last = torch.channels_last

    def both(forward: Callable[[Tensor, Tensor], Tensor], x: Tensor, w: Tensor, repeats: int = 1) -> Callable[[], None]:
        x, w = x.requires_grad_(), w.requires_grad_()
        gradient = torch.randn_like(forward(x, w))

        def call() -> None:
            for _ in range(repeats):
                torch.autograd.grad(forward(x, w), (x, w), gradient)
            if device != "cpu":
                torch.cuda.synchronize()

        return call

    def x(number: int) -> Tensor:
        return torch.randn(1, number * channels, SIZE, SIZE, **options)

    def w(number: int) -> Tensor:
        return 0.1 * torch.randn(number * channels, channels, 3, 3, **options)

    def one(x: Tensor, w: Tensor) -> Tensor:
        return F.conv2d(x, w, padding=1)

    def grouped(x: Tensor, w: Tensor) -> Tensor:
        return F.conv2d(x, w, padding=1, groups=replicas)

    def in_place(x: Tensor) -> Tensor:
        return x.contiguous(memory_format=last)

    return {
        "alone": both(one, in_place(x(1)), in_place(w(1)), replicas),
        "grouped": both(grouped, x(replicas), w(replicas)),
        "grouped, channels last": both(grouped, in_place(x(replicas)), in_place(w(replicas))),
        "im2col + bmm": both(
            im2col,
            torch.randn(replicas, 1, SIZE, SIZE, channels, **options),
            0.1 * torch.randn(replicas, 9 * channels, channels, **options),
        ),
        "vmap": both(
            torch.vmap(one),
            x(1).expand(replicas, -1, -1, -1, -1).clone(),
            w(1).expand(replicas, -1, -1, -1, -1).clone(),
        ),
    }


def measure_layers(widths: list[int], rounds: int, device: str) -> list[dict[str, Any]]:
    """Time every way in alternating rounds; GFLOP/s, from CPU time on a CPU."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    found = []
    print(f"\nOne 3 × 3 layer on {SIZE} × {SIZE} images, batch 1, forward and backward: GFLOP/s, one thread")
    print(f"{'channels':>8} {'replicas':>8} {'precision':<9}" + "".join(f"{name:>24}" for name in COLUMNS))
    for channels in widths:
        for precision in ("float32", "bfloat16"):
            for replicas in (4, 8, 16):
                calls = layer_calls(channels, replicas, getattr(torch, precision), device)
                spent: dict[str, list[float]] = {name: [] for name in calls}
                for call in calls.values():
                    call()
                for _ in range(rounds):
                    for name, call in calls.items():
                        started = clock()
                        call()
                        spent[name].append(clock() - started)
                flops = 3 * 2 * 9 * channels**2 * SIZE**2 * replicas
                rates = {name: flops / statistics.median(times) / 1e9 for name, times in spent.items()}
                print(f"{channels:>8} {replicas:>8} {precision:<9}" + "".join(f"{rates[n]:>24.0f}" for n in COLUMNS))
                found.append({"channels": channels, "replicas": replicas, "precision": precision, "gflop_s": rates})
    return found


# --- whole steps: one process for each core, each with one run or with a pack ---


def serve(width: int, precision: str, replicas: int) -> None:
    """Be a worker process: train so many updates of one run or of a pack for each line on stdin; answer CPU seconds."""
    torch.set_num_threads(1)
    images = np.random.default_rng(0).integers(0, 256, (1000, 3, SIZE, SIZE), np.uint8)

    def trainer(i: int) -> Trainer:
        config = Config(width=width, precision=precision, iterations=10**8, num_stddev=THRESHOLDS[i % 4], seed=i)  # type: ignore[arg-type]
        made = Trainer(config, images)
        made.errors = np.zeros(10**4, np.float32)
        return made

    single, pack = trainer(1), Pack([trainer(i) for i in range(replicas)])
    print("ready", flush=True)
    for line in sys.stdin:
        what, number = line.split()
        started = time.process_time()
        if what == "alone":
            for _ in range(int(number)):
                train_some(single)
        else:
            for _ in range(int(number)):
                train_some(pack)
        print(time.process_time() - started, flush=True)


def train_some(what: Trainer | Pack) -> None:
    """Train `UPDATES` updates, data and records included; a block of 256, as runs have it, would take too long."""
    stream = (what if isinstance(what, Trainer) else what.trainers[0]).stream
    for member in [what] if isinstance(what, Trainer) else what.trainers:
        member.stream.steps_per_block = UPDATES
        member.stream.images_per_block = UPDATES * stream.batch_size
    what.train_block()


def measure_steps(widths: list[int], rounds: int, processes: int) -> list[dict[str, Any]]:
    """Time single runs and packs in alternating rounds, `processes` at once."""
    print(
        f"\nWhole updates, batch 1, {processes} processes of one thread: milliseconds of a replica's update on a core"
    )
    print(f"{'width':>5} {'precision':<9} {'pack':>4} {'alone':>8} {'packed':>8} {'wall ratio':>24} {'CPU ratio':>10}")
    found = []
    for width in widths:
        for precision in ("float32", "bfloat16"):
            best = largest_pack(vars(Config(width=width, precision=precision)))
            for replicas in sorted({max(2, best // 2), best, 2 * best}):
                found.append(_compare(width, precision, replicas, rounds, processes))
                line = found[-1]
                low, middle, high = line["wall_ratio_quartiles"]
                print(
                    f"{width:>5} {precision:<9} {replicas:>4} {line['alone_ms']:>8.2f} {line['packed_ms']:>8.2f} "
                    f"{f'{middle:.2f} ({low:.2f}-{high:.2f})':>24} {line['cpu_ratio']:>10.2f}"
                    + "  <- chosen"
                    * (replicas == best)
                )
    return found


def _compare(width: int, precision: str, replicas: int, rounds: int, processes: int) -> dict[str, Any]:
    """Compare one size of pack with single runs."""
    command = [sys.executable, __file__, "--serve", str(width), precision, str(replicas)]
    environment = os.environ | dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    workers = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, env=environment)
        for _ in range(processes)
    ]

    def ask(what: str, number: int) -> tuple[float, float]:
        """Let all workers train; returns wall seconds, and CPU seconds of a worker."""
        started = time.perf_counter()
        for worker in workers:
            assert worker.stdin is not None
            worker.stdin.write(f"{what} {number}\n")
        cpu = [float(worker.stdout.readline()) for worker in workers if worker.stdout is not None]
        return time.perf_counter() - started, statistics.mean(cpu)

    try:
        for worker in workers:
            assert worker.stdout is not None
            worker.stdout.readline()
        repeats = max(1, replicas // 2)
        ask("alone", 1)
        ask("packed", 1)
        alone, packed = [], []
        for _ in range(rounds):
            alone.append([1e3 * seconds / (UPDATES * repeats) for seconds in ask("alone", repeats)])
            packed.append([1e3 * seconds / (UPDATES * replicas) for seconds in ask("packed", 1)])
    finally:
        for worker in workers:
            worker.communicate()
    (alone_wall, alone_cpu), (packed_wall, packed_cpu) = np.array(alone).T, np.array(packed).T
    return {
        "width": width,
        "precision": precision,
        "replicas": replicas,
        "alone_ms": float(np.median(alone_wall)),
        "packed_ms": float(np.median(packed_wall)),
        "wall_ratio_quartiles": np.percentile(alone_wall / packed_wall, [25, 50, 75]).tolist(),
        "cpu_ratio": float(np.median(alone_cpu) / np.median(packed_cpu)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--serve", nargs=3, metavar=("WIDTH", "PRECISION", "REPLICAS"), help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=15, help="rounds of each comparison")
    parser.add_argument("--widths", type=int, nargs="+", default=[8, 16, 64], help="widths of the network")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="device of the layers")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "replicas.json")
    arguments = parser.parse_args()
    if arguments.serve:
        serve(int(arguments.serve[0]), arguments.serve[1], int(arguments.serve[2]))
        return
    torch.set_num_threads(1)
    title = header("Replicas of the supersampling experiment in one program")
    print(title)
    layers = measure_layers([2 * width for width in arguments.widths], arguments.rounds, arguments.device)
    steps = measure_steps(arguments.widths, arguments.rounds, available_cores())
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    document = {"machine": title.splitlines()[1], "device": arguments.device, "layers": layers, "steps": steps}
    arguments.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(f"\nwritten to {arguments.out}")


if __name__ == "__main__":
    main()
