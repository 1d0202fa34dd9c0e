"""The roofline of a training step: what the processor can do, what the step needs, and how near it comes.

Run with `python benchmarks/roofline.py [--rounds N] [--out FILE]`. Three tables: the limits of this machine (matrix
products, copies), the convolutions of a step against them, pass by pass, and whole steps by batch size with one
process for each core. Prints them and writes JSON, by default to benchmarks/results/roofline.json. One core is timed
in CPU time, which other programs disturb less; whole machines need a quiet one.
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
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from alrc_lab.experiments.cifar10_supersampling import Config, Trainer
from alrc_lab.experiments.replicas_network import FEW
from alrc_lab.experiments.supersampling_replicas import CACHE_BYTES, Pack
from alrc_lab.runner import available_cores
from side_by_side import header

SIZE = 32
PIXELS = SIZE * SIZE
BACKWARD = torch.ops.aten.convolution_backward


class Layer(NamedTuple):
    """Name one shape of convolution, and how many of it a network has."""

    inputs: int
    outputs: int
    kernel: int
    copies: int


class Setting(NamedTuple):
    """Name one kind of step."""

    width: int
    batch: int
    precision: str
    replicas: int


SETTINGS = (
    Setting(16, 1, "float32", 1),
    Setting(16, 1, "float32", 8),
    Setting(16, 1, "bfloat16", 1),
    Setting(16, 1, "bfloat16", 16),
    Setting(64, 1, "float32", 1),
    Setting(64, 1, "bfloat16", 1),
    Setting(64, 16, "bfloat16", 1),
)


def layers_of(width: int) -> list[Layer]:
    """List the convolutions of the supersampling network."""
    return [
        Layer(3, width, 5, 1),
        Layer(width, 2 * width, 3, 1),
        Layer(2 * width, 2 * width, 3, 6),
        Layer(2 * width, width, 3, 1),
        Layer(width, 3, 5, 1),
    ]


def seconds_of(call: Callable[[], object], rounds: int, budget_s: float = 0.03) -> float:
    """Return the median CPU seconds of a call."""
    call()
    started = time.process_time()
    call()
    repeats = max(1, int(budget_s / max(time.process_time() - started, 1e-6)))
    spent = []
    for _ in range(rounds):
        started = time.process_time()
        for _ in range(repeats):
            call()
        spent.append((time.process_time() - started) / repeats)
    return statistics.median(spent)


# --- what the machine can do ---


def measure_limits(rounds: int) -> dict[str, float]:
    """Measure matrix products in both precisions, and copies in the second-level cache and in memory, on one core."""
    found = {}
    for precision in ("float32", "bfloat16"):
        rates = []
        for n in (256, 512, 1024):
            a, b = torch.randn(2, n, n).to(getattr(torch, precision))
            out = torch.empty_like(a)
            rates.append(2 * n**3 / seconds_of(lambda a=a, b=b, out=out: torch.mm(a, b, out=out), rounds) / 1e9)
        found[f"{precision} matrix product, GFLOP/s"] = max(rates)
    for where, size in (("second-level cache", CACHE_BYTES // 4), ("memory", 2**28)):
        a, b = torch.zeros(2, size // 4)
        found[f"copy in {where}, GB/s"] = 2 * size / seconds_of(lambda a=a, b=b: a.copy_(b), rounds) / 1e9
    print("\nOne core of this machine")
    for name, value in found.items():
        print(f"  {name:<38} {value:>8.1f}")
    return found


# --- what a step needs, and how long it takes ---


def passes_of(layer: Layer, setting: Setting) -> dict[str, tuple[Callable[[], object], float]]:
    """Make the passes of one layer: each with the bytes it must move, its operands and its result once."""
    groups, dtype = setting.replicas, getattr(torch, setting.precision)

    def make(*shape: int) -> Tensor:
        return torch.randn(*shape).to(dtype).contiguous(memory_format=torch.channels_last)

    x = make(setting.batch, groups * layer.inputs, SIZE, SIZE)
    y = make(setting.batch, groups * layer.outputs, SIZE, SIZE)
    is_turned = groups > 1 and layer.outputs < FEW  # as replicas_network computes it
    outer, inner = (layer.inputs, layer.outputs) if is_turned else (layer.outputs, layer.inputs)
    w = make(groups * outer, inner, layer.kernel, layer.kernel)
    bias = torch.zeros(groups * layer.outputs, dtype=dtype)
    pad = [layer.kernel // 2] * 2
    moved = float(x.nbytes + y.nbytes + w.nbytes)

    def backward(mask: list[bool]) -> Callable[[], object]:
        return lambda: BACKWARD(y, x, w, [len(bias)], [1, 1], pad, [1, 1], is_turned, [0, 0], groups, mask)

    forward = torch.conv_transpose2d if is_turned else torch.conv2d

    found = {
        "forward": (lambda: forward(x, w, bias, padding=pad, groups=groups), moved),
        "images": (backward([True, False, False]), moved),
        "weights": (backward([False, True, True]), moved),
    }
    if layer.inputs == 3:  # nobody needs the gradient of the images
        del found["images"]
    return found


def measure_step(setting: Setting, limits: dict[str, float], rounds: int) -> dict[str, Any]:
    """Measure a step and its convolutions; times are for one image of one replica."""
    peak = limits[f"{setting.precision} matrix product, GFLOP/s"]
    images = setting.batch * setting.replicas
    rows, conv_s, limit_s, flops, moved = [], 0.0, 0.0, 0.0, 0.0
    for layer in layers_of(setting.width):
        work = 2.0 * layer.inputs * layer.outputs * layer.kernel**2 * PIXELS * images
        for name, (call, size) in passes_of(layer, setting).items():
            spent = seconds_of(call, rounds)
            bandwidth = limits["copy in second-level cache, GB/s" if size <= CACHE_BYTES else "copy in memory, GB/s"]
            bound = max(work / peak, size / bandwidth) / 1e9
            rows.append(
                {"layer": f"{layer.inputs} to {layer.outputs}, {layer.kernel} x {layer.kernel}", "pass": name}
                | {"copies": layer.copies, "flop_per_byte": work / size, "gflop_s": work / spent / 1e9}
                | {"limit_gflop_s": work / bound / 1e9}
            )
            conv_s += layer.copies * spent / images
            limit_s += layer.copies * bound / images
            flops += layer.copies * work / images
            moved += layer.copies * size / images
    step_s = measure_update(setting, rounds) / images
    return setting._asdict() | {
        "mflop": flops / 1e6,
        "mbyte": moved / 1e6,
        "limit_ms": 1e3 * limit_s,
        "convolutions_ms": 1e3 * conv_s,
        "step_ms": 1e3 * step_s,
        "gflop_s": flops / step_s / 1e9,
        "share_of_limit": limit_s / step_s,
        "passes": rows,
    }


def measure_update(setting: Setting, rounds: int) -> float:
    """Return CPU seconds of a whole update, data and records included."""
    source = np.random.default_rng(0).integers(0, 256, (256, 3, SIZE, SIZE), np.uint8)
    runs = []
    for seed in range(setting.replicas):
        config: Any = {"width": setting.width, "batch_size": setting.batch, "precision": setting.precision}
        runs.append(Trainer(Config(**config, iterations=10**6, num_stddev=3.0, seed=seed), source))
        runs[-1].stream.steps_per_block = 8
    what: Any = Pack(runs) if setting.replicas > 1 else runs[0]
    return seconds_of(what.train_block, rounds, 0.0) / 8


def measure_steps(limits: dict[str, float], rounds: int) -> list[dict[str, Any]]:
    """Measure every setting and print a line for each."""
    print("\nA step on one core, for one image of one replica; the limit is that of its convolutions")
    print(
        f"{'width':>5} {'batch':>5} {'precision':<9} {'replicas':>8} {'MFLOP':>7} {'MB':>6} {'FLOP/byte':>9} "
        f"{'limit ms':>8} {'conv. ms':>8} {'step ms':>8} {'GFLOP/s':>8} {'of limit':>8}"
    )
    found = []
    for setting in SETTINGS:
        line = measure_step(setting, limits, rounds)
        found.append(line)
        print(
            f"{line['width']:>5} {line['batch']:>5} {line['precision']:<9} {line['replicas']:>8} {line['mflop']:>7.0f} "
            f"{line['mbyte']:>6.2f} {line['mflop'] / line['mbyte']:>9.0f} {line['limit_ms']:>8.2f} "
            f"{line['convolutions_ms']:>8.2f} {line['step_ms']:>8.2f} {line['gflop_s']:>8.0f} "
            f"{line['share_of_limit']:>8.0%}"
        )
    print("\nThe passes of width 16: GFLOP/s, and what the limits of this machine allow")
    print(f"{'precision':<9} {'replicas':>8} {'layer':<16} {'pass':<8} {'FLOP/byte':>9} {'GFLOP/s':>8} {'limit':>8}")
    for line in found:
        for row in line["passes"] if line["width"] == 16 else ():
            print(
                f"{line['precision']:<9} {line['replicas']:>8} {row['layer']:<16} {row['pass']:<8} "
                f"{row['flop_per_byte']:>9.0f} {row['gflop_s']:>8.0f} {row['limit_gflop_s']:>8.0f}"
            )
    return found


# --- the whole machine: width 64, batch 1 against batch 16 ---


def serve(threads: int) -> None:
    """Be a worker process: train one block of updates at the batch size on each line of stdin."""
    torch.set_num_threads(threads)
    source = np.random.default_rng(0).integers(0, 256, (256, 3, SIZE, SIZE), np.uint8)
    made = {}
    for batch in (1, 16):
        config = Config(batch_size=batch, precision="bfloat16", iterations=10**6, num_stddev=3.0)
        made[batch] = Trainer(config, source)
        made[batch].stream.steps_per_block = 16 // batch
        made[batch].train_block()
    print("ready", flush=True)
    for line in sys.stdin:
        made[int(line)].train_block()
        print("done", flush=True)


def measure_batches(rounds: int) -> list[dict[str, Any]]:
    """Measure images per second at batch 1 and 16 in alternating rounds, every core with one run or one run on all."""
    cores = available_cores()
    flops = 3 * sum(2.0 * a * b * k * k * PIXELS * n for a, b, k, n in layers_of(64)) - 2.0 * 3 * 64 * 25 * PIXELS
    print("\nThe whole machine, width 64, bfloat16, data, optimiser and records included")
    print(f"{'processes':>9} {'threads each':>12} {'batch':>5} {'ms an image':>12} {'GFLOP/s':>8}")
    found = []
    for processes, threads in dict.fromkeys(((cores, 1), (1, cores))):
        environment = os.environ | dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
        command = [sys.executable, __file__, "--serve", str(threads)]
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
        workers: Any = [subprocess.Popen(command, env=environment, **pipes) for _ in range(processes)]
        spent: dict[int, list[float]] = {1: [], 16: []}
        try:
            for worker in workers:
                worker.stdout.readline()
            for _ in range(rounds):
                for batch, times in spent.items():
                    started = time.perf_counter()
                    for worker in workers:
                        worker.stdin.write(f"{batch}\n")
                    for worker in workers:
                        worker.stdout.readline()
                    times.append((time.perf_counter() - started) / (16 * processes))
        finally:
            for worker in workers:
                worker.communicate()
        for batch, times in spent.items():
            seconds = statistics.median(times)
            line = {"processes": processes, "threads": threads, "batch": batch, "ms": 1e3 * seconds}
            found.append(line | {"gflop_s": flops / seconds / 1e9})
            print(f"{processes:>9} {threads:>12} {batch:>5} {1e3 * seconds:>12.1f} {found[-1]['gflop_s']:>8.0f}")
    best = {batch: max(line["gflop_s"] for line in found if line["batch"] == batch) for batch in (1, 16)}
    print(f"batch 1 reaches {best[1] / best[16]:.0%} of the best rate at batch 16")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--serve", type=int, metavar="THREADS", help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=9, help="rounds of each measurement")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "roofline.json")
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve)
        return
    torch.set_num_threads(1)
    title = header("The roofline of a training step")
    print(title)
    limits = measure_limits(arguments.rounds)
    document = {"machine": title.splitlines()[1], "limits": limits}
    document |= {"steps": measure_steps(limits, arguments.rounds), "batches": measure_batches(arguments.rounds)}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(f"\nwritten to {arguments.out}")


if __name__ == "__main__":
    main()
