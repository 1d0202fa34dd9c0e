"""What partial-STEM adds to its networks, what its weight normalisation costs, and one step of the published size.

Run with `python benchmarks/partial_stem_step.py [THREADS]`; some minutes, 5 GB of memory.
"""

from __future__ import annotations

import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn.utils import parametrizations

from alrc_lab.data.stem import MicrographSet, load_micrographs
from alrc_lab.experiments.partial_stem import PRESETS, WIDTHS, Config, Trainer
from alrc_lab.experiments.partial_stem_layers import NormalisedConvolution
from alrc_lab.experiments.partial_stem_networks import CompletionNetwork, build_network
from alrc_lab.experiments.partial_stem_policy import Targets, losses_of
from side_by_side import describe_ratio, header, time_rounds

BLOCK = 4
"""Updates between two records; so few that records look dearer than they are, if anything."""


def noise(side: int) -> MicrographSet:
    """Make micrographs of one crop each: what is in them takes no time."""
    folder = Path(tempfile.mkdtemp())
    for number in range(4):
        np.save(folder / f"{number}.npy", np.random.default_rng(number).random((side, side), np.float32))
    return load_micrographs(folder, crop_size=side)


class Bare:
    """Take forward, backward and fused Adam steps on one example, and do nothing else."""

    def __init__(self, network: CompletionNetwork, side: int, precision: str) -> None:
        self.network, self.precision = network, precision
        self.optimizer = torch.optim.Adam(network.parameters(), 3e-4, fused=True)
        self.inputs = torch.rand(1, 2, side, side)
        self.targets = Targets(torch.rand(1, 1, side // 2, side // 2), torch.rand(1, 1, side, side))

    def step(self) -> None:
        """Take one step."""
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.precision == "bfloat16"):
            completion = self.network(self.inputs)
        inner, outer = losses_of(completion, self.targets)
        (inner + outer).sum().backward()
        self.optimizer.step()


def with_torchs_parametrisation(network: CompletionNetwork) -> CompletionNetwork:
    """Let torch normalise the weights of the same networks."""
    for layer in network.modules():
        if isinstance(layer, NormalisedConvolution) and layer.gain is not None:
            layer.gain = None  # the layer now takes its weights as they are
            parametrizations.weight_norm(layer, "direction", dim=1 if layer.transposed else 0)
    return network


def compare_steps() -> None:
    """Put whole recorded steps beside bare ones, and bfloat16 beside float32."""
    print(f"\n{'size':<24} {'precision':<10} {'bare':>9} {'whole':>9} {'whole / bare':>20} {'bfloat16 / float32':>20}")
    for name in ("smoke", "stem-96", "stem-128"):
        side, widths = PRESETS[name].crop_size, PRESETS[name].widths
        calls = {}
        for precision in ("float32", "bfloat16"):
            config = Config(side, widths, 10**6, "huber", "alrc", precision=precision)
            trainer = Trainer(config, noise(side))
            trainer.stream.updates_per_block = BLOCK
            bare = Bare(build_network(WIDTHS[widths], 0), side, precision)
            calls[f"bare {precision}"] = lambda bare=bare: [bare.step() for _ in range(BLOCK)]
            calls[f"whole {precision}"] = trainer.train_block
        spent = time_rounds(calls, rounds=9, round_s=0.5)
        for precision in ("float32", "bfloat16"):
            bare_us, whole_us = spent[f"bare {precision}"], spent[f"whole {precision}"]
            half = "" if precision == "float32" else describe_ratio(whole_us / spent["whole float32"])
            ms = [np.median(us) / BLOCK / 1e3 for us in (bare_us, whole_us)]
            print(
                f"{f'{side}×{side}, {widths}':<24} {precision:<10} {ms[0]:>6.1f} ms {ms[1]:>6.1f} ms "
                f"{describe_ratio(whole_us / bare_us):>20} {half:>20}"
            )


def compare_weight_norms() -> None:
    """Put a step of all 106 million parameters beside the same step with torch's weight normalisation."""
    networks = {
        "ours": build_network(WIDTHS["full"], 0),
        "torch": with_torchs_parametrisation(build_network(WIDTHS["full"], 0)),
    }
    spent = time_rounds({name: Bare(network, 96, "float32").step for name, network in networks.items()}, rounds=7)
    ratio = describe_ratio(spent["ours"] / spent["torch"])
    ms = {name: np.median(us) / 1e3 for name, us in spent.items()}
    print(f"\n106 M parameters at 96×96, bare step: {ms['ours']:.0f} ms, with torch's weight_norm {ms['torch']:.0f} ms")
    print(f"ours / torch's: {ratio}")


def measure_published_size(steps: int = 3) -> None:
    """Take whole steps of the published size, ALRC and Huber included."""
    trainer = Trainer(Config(512, "full", 10**6, "huber", "alrc"), noise(512))
    trainer.stream.updates_per_block = 1
    seconds, loss = [], 0.0
    for _ in range(steps + 1):
        started = time.perf_counter()
        loss = float(trainer.train_block()["loss_outer"][0])
        seconds.append(time.perf_counter() - started)
    peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"\n512×512, full width, whole step: {np.median(seconds[1:]):.2f} s (median of {steps}, first {seconds[0]:.2f})"
    )
    print(f"largest memory of this process so far {peak_gb:.1f} GiB; last loss {loss:.3g}")


def main(threads: int = 1) -> None:
    torch.set_num_threads(threads)
    print(header("One training step of partial-STEM, one crop"))
    compare_steps()
    compare_weight_norms()
    measure_published_size()


if __name__ == "__main__":
    main(*(int(word) for word in sys.argv[1:]))
