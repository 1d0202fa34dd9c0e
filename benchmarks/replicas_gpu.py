"""Replicas on a GPU: packs beside single runs, graphed and eager, in every way to convolve, and the hours of Table 1.

Run with `python benchmarks/replicas_gpu.py`: minutes on one GPU, at most `--minutes`. Prints a table and writes it as
JSON. Every measurement stands alone: what fails is reported, and the others go on. `--device cpu --width 8 --seconds
0.05 --sizes 2 --batches 1 4` tries the script out where there is no GPU, and writes only with `--out`.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from alrc_lab.experiments.cifar10_supersampling import Config, Trainer, build_network
from alrc_lab.experiments.replicas_graph import Replay, seconds_of
from alrc_lab.experiments.replicas_network import WAYS, side_by_side
from alrc_lab.experiments.supersampling_replicas import Pack
from alrc_lab.experiments.table1 import PUBLISHED
from side_by_side import header

SIZE = 32
THRESHOLDS = (3.0, None, 2.0, 4.0)
ITERATIONS = 100_000
SEEDS = 10
RUNS = {
    size: sum(SEEDS * len(row) for (_, batch), row in PUBLISHED.items() if batch == size) for size in (1, 4, 16, 64)
}
"""Runs of the full table at each batch size."""
IMAGES = np.random.default_rng(0).integers(0, 256, (1000, 3, SIZE, SIZE), np.uint8)


def flops_of(width: int) -> int:
    """Count the floating-point operations of training on one image: convolutions only, forward and backward.

    Each costs its forward pass, the same for its weights' gradient, and the same for its input's, save the first.
    """
    layers = [layer for layer in build_network(width, 0).modules() if isinstance(layer, nn.Conv2d)]
    forward = [2 * layer.weight.numel() * SIZE**2 for layer in layers]
    return 3 * sum(forward) - forward[0]


def rate_of(call: Callable[[], Any], seconds: float, device: torch.device) -> float:
    """Return calls per second: of one, or of as many as take about the seconds given."""
    estimate = seconds_of(call, 1, device)
    repeats = min(200, int(seconds / max(estimate, 1e-6)))
    return 1 / (seconds_of(call, repeats, device) if repeats > 1 else estimate)


class Measurements:
    """Make measurements until the time is up, and keep what each says or why it could not be made."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments, self.device = arguments, torch.device(arguments.device)
        self.ends_at = time.monotonic() + 60 * arguments.minutes
        self.rows = list[dict[str, Any]]()
        self.matmul = 0.0
        self._trainers = dict[tuple[int, str], list[Trainer]]()

    def make(self, measure: Callable[[], float], **what: Any) -> None:
        """Make one measurement and print it."""
        row = {**what, "updates_per_s": None, "problem": None}
        try:
            if time.monotonic() > self.ends_at:
                raise TimeoutError("the time is up")
            row["updates_per_s"] = measure()
        except Exception as error:
            row["problem"] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:120]
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self._rate(row)
        self.rows.append(row)
        print(line_of(row), flush=True)

    def _rate(self, row: dict[str, Any]) -> None:
        """Compare a row with the single run of its batch size and precision, and with the device's matmul rate."""
        if row["updates_per_s"] is None:
            return
        replicas = row["replicas"]
        row["replica_updates_per_s"] = rate = replicas * row["updates_per_s"]
        row["tflop_s"] = rate * row["batch"] * flops_of(self.arguments.width) / 1e12
        row["share_of_matmul"] = row["tflop_s"] / self.matmul if self.matmul else None
        alone = self.rate(row["batch"], row["precision"], lambda other: other["way"] == "alone")
        row["times_alone"] = rate / alone if alone else None

    def rate(self, batch: int, precision: str, is_wanted: Callable[[dict[str, Any]], bool]) -> float:
        """Return the highest rate in replicas' updates per second so far; 0 if there is none."""
        rates = [
            row["replica_updates_per_s"]
            for row in self.rows
            if (row["batch"], row["precision"]) == (batch, precision) and is_wanted(row) and not row["problem"]
        ]
        return max(rates, default=0.0)

    def alone(self, batch: int, precision: str) -> float:
        """Return updates per second of a single run as the runner trains it, data and records included."""
        return self._blocks(self._runs(batch, precision, 1)[0])

    def blocks(self, batch: int, precision: str, replicas: int, way: str) -> float:
        """Return updates per second of a graphed pack as the runner trains it, data and records included."""
        return self._blocks(Pack(self._runs(batch, precision, replicas), way, True))

    def updates(self, batch: int, precision: str, replicas: int, way: str, is_replayed: bool) -> float:
        """Return updates per second of a pack on images that are at hand already."""
        pack = Pack(self._runs(batch, precision, replicas), way, is_replayed)
        images = torch.randn(batch, 3, SIZE, SIZE, device=self.device)
        inputs = side_by_side([images] * replicas)
        record = torch.zeros(replicas, len(Trainer.columns), device=self.device)
        step: Callable[..., None] = pack.update
        if is_replayed:
            step = Replay(pack.update, [inputs, inputs.clone(), record], pack.tensors())
        return rate_of(lambda: step(inputs, inputs, record), self.arguments.seconds, self.device)

    def _runs(self, batch: int, precision: str, number: int) -> list[Trainer]:
        """Return runs that never end; packs copy them, so that they serve more than once."""
        made = self._trainers.setdefault((batch, precision), [])
        for seed in range(len(made), number):
            config = Config(
                width=self.arguments.width,
                batch_size=batch,
                precision=precision,  # type: ignore[arg-type]
                device=str(self.device),
                num_stddev=THRESHOLDS[seed % 4],
                iterations=ITERATIONS,
                seed=seed,
            )
            made.append(Trainer(config, IMAGES))
            made[-1].stream.images = made[0].stream.images
            if self.device.type == "cpu":  # a block of 256 updates would take its time there
                made[-1].stream.steps_per_block = 2
        return made[:number]

    def _blocks(self, what: Trainer | Pack) -> float:
        """Return updates per second over whole blocks of images; the first warms up, captures and is not counted."""
        first = what if isinstance(what, Trainer) else what.trainers[0]
        return first.stream.steps_per_block * rate_of(what.train_block, self.arguments.seconds, self.device)


def line_of(row: dict[str, Any]) -> str:
    """Print a row."""
    what = f"{row['batch']:>5} {row['precision']:<9} {row['replicas']:>8} {row['way']:<8} {row['step']:<8}"
    if row["problem"]:
        return f"{what} {row['problem']}"
    times = "" if row["times_alone"] is None else f"{row['times_alone']:.2f}"
    share = "" if row["share_of_matmul"] is None else f"{row['share_of_matmul']:.1%}"
    numbers = f"{1e3 / row['updates_per_s']:>10.3f} {row['replica_updates_per_s']:>14.1f}"
    return f"{what} {numbers} {times:>8} {row['tflop_s']:>9.3f} {share:>8}"


def matmul_rate(device: torch.device, seconds: float) -> float:
    """Return the TFLOP/s of a large product of square bfloat16 matrices: the best of five measurements."""
    size = 8192 if device.type == "cuda" else 512
    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    return max(2 * size**3 * rate_of(lambda: a @ b, seconds / 5, device) for _ in range(5)) / 1e12


def wanted(arguments: argparse.Namespace, largest: int) -> Iterator[tuple[str, int, str, int, str]]:
    """Yield what to measure, what matters most first: kind of step, batch size, precision, replicas, way."""
    first = arguments.batches[0]
    small = [batch for batch in arguments.batches if batch != 64]
    others = [size for size in arguments.sizes if size != largest]
    for batch, precision in [*((batch, "bfloat16") for batch in arguments.batches), (first, "float32")]:
        yield "eager", batch, precision, 1, "alone"
    for batch, precision in [*((batch, "bfloat16") for batch in arguments.batches), (first, "float32")]:
        for way in WAYS:
            yield "graph", batch, precision, largest, way
    for batch in small:
        for size in others:
            for way in WAYS:
                yield "graph", batch, "bfloat16", size, way
    for batch in small:
        for way in WAYS:
            yield "graph*", batch, "bfloat16", largest, way
        for size in (largest, *others):
            for way in ("grouped", "bmm"):  # one after the other takes the host longer than anyone will wait
                yield "eager*", batch, "bfloat16", size, way


def project(made: Measurements, batches: Sequence[int]) -> dict[str, Any]:
    """Say how long the full table takes at the best rate of each batch size, packed or alone, and alone."""
    found: dict[str, Any] = {}
    print(f"\nThe full table, {sum(RUNS.values())} runs of {ITERATIONS:,} updates of this network in bfloat16: hours")
    for name, is_wanted in (
        ("packed", lambda row: row["step"] == "graph" or row["way"] == "alone"),
        ("alone", lambda row: row["way"] == "alone"),
    ):
        hours = {}
        for batch in RUNS:
            rate = made.rate(batch, "bfloat16", is_wanted) if batch in batches else 0.0
            hours[batch] = RUNS[batch] * ITERATIONS / rate / 3600 if rate else None
        total = None if None in hours.values() else sum(filter(None, hours.values()))
        found[name] = {"hours": {f"batch {batch}": value for batch, value in hours.items()}, "total": total}
        parts = ", ".join(f"batch {batch} {'unknown' if h is None else f'{h:.1f}'}" for batch, h in hours.items())
        print(f"  {name}: {parts}; together {'unknown' if total is None else f'{total:.1f}'}")
    return found


def describe(device: torch.device) -> dict[str, Any]:
    """Say what the device is, and how torch computes float32 on it."""
    if device.type != "cuda":
        return {"name": str(device)}
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "processors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "float32_convolutions_in_tf32": torch.backends.cudnn.allow_tf32,
    }


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", help="device to measure")
    parser.add_argument("--width", type=int, default=64, help="width of the network; 64 is the paper's")
    parser.add_argument("--sizes", type=int, nargs="+", default=[8, 16, 40, 80], help="runs in a pack")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16, 64], help="images per update")
    parser.add_argument("--seconds", type=float, default=1.0, help="seconds of a measurement")
    parser.add_argument("--minutes", type=float, default=7.5, help="minutes after which no measurement begins")
    parser.add_argument("--out", type=Path, help="file to write; results/replicas_gpu.json if the device is a GPU")
    arguments = parser.parse_args(given)
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no GPU here; --device cpu --width 8 tries the script out")
    title = header("Replicas of the supersampling experiment on a GPU")
    about = describe(device)
    print(f"{title.splitlines()[0]}\n{json.dumps(about)}\n{title.splitlines()[1]}")
    print(f"width {arguments.width}, {flops_of(arguments.width) / 1e9:.3f} GFLOP for an image, forward and backward")
    if device.type != "cuda":
        print("No GPU: a step that is called graph here is the same function on the same memory, without a graph.")
    made = Measurements(arguments)
    try:
        made.matmul = matmul_rate(device, arguments.seconds)
        print(f"product of bfloat16 matrices: {made.matmul:.2f} TFLOP/s")
    except RuntimeError as error:
        print(f"product of bfloat16 matrices: {error}")
    print("graph and alone include data and records; graph* and eager* work on images that are at hand\n")
    print(
        f"{'batch':>5} {'precision':<9} {'replicas':>8} {'way':<8} {'step':<8} {'ms':>10} {'replica upd./s':>14} "
        f"{'× alone':>8} {'TFLOP/s':>9} {'matmul':>8}"
    )
    largest = 40 if 40 in arguments.sizes else max(arguments.sizes)
    for step, batch, precision, replicas, way in wanted(arguments, largest):
        if way == "alone":
            measure = partial(made.alone, batch, precision)
        elif step == "graph":
            measure = partial(made.blocks, batch, precision, replicas, way)
        else:
            measure = partial(made.updates, batch, precision, replicas, way, step == "graph*")
        made.make(measure, batch=batch, precision=precision, replicas=replicas, way=way, step=step)
    hours = project(made, arguments.batches)
    out = arguments.out
    if out is None and device.type == "cuda":
        out = Path(__file__).parent / "results" / "replicas_gpu.json"
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        document = {"machine": title.splitlines()[1], "device": about, "width": arguments.width}
        document |= {"matmul_tflop_s": made.matmul, "gflop_per_image": flops_of(arguments.width) / 1e9}
        document |= {"measurements": made.rows, "table1_hours": hours}
        out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        print(f"\nwritten to {out}")


if __name__ == "__main__":
    main()
