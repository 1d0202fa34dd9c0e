"""What the experiment adds to its network: a whole recorded step beside a bare forward, backward and Adam.

Run with `python benchmarks/experiment_step.py [THREADS]`.
"""

from __future__ import annotations

import sys

import numpy as np
import torch

from alrc_lab.experiments.cifar10_supersampling import Config, Trainer, build_network
from side_by_side import describe_ratio, header, time_rounds


def main(threads: int = 1) -> None:
    torch.set_num_threads(threads)
    print(header("One training step of the supersampling experiment, data and records included"))
    images = np.random.default_rng(0).integers(0, 256, (1000, 3, 32, 32), np.uint8)
    print(f"\n{'width':>6} {'batch':>6} {'precision':<10} {'bare':>9} {'whole':>9} {'whole / bare':>20}")
    for width, batch_size, precision in (
        (64, 1, "float32"),
        (64, 1, "bfloat16"),
        (16, 1, "float32"),
        (64, 4, "float32"),
    ):
        config = Config(width=width, batch_size=batch_size, precision=precision, num_stddev=3, iterations=10**6)
        trainer = Trainer(config, images)
        steps_per_block = trainer.stream.steps_per_block = 16  # short blocks: if anything, the data looks dearer
        network = build_network(width, 0)
        optimizer = torch.optim.Adam(network.parameters(), 1 / 1280, fused=True)
        x, t = torch.randn(2, batch_size, 3, 32, 32)

        def bare(network=network, optimizer=optimizer, x=x, t=t, precision=precision) -> None:
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
                y = network(x)
            (y.float() - t).pow(4).mean().backward()
            optimizer.step()

        def whole_block(trainer=trainer) -> None:
            trainer.train_block()

        def bare_block(bare=bare, number=steps_per_block) -> None:
            for _ in range(number):
                bare()

        spent = time_rounds({"bare": bare_block, "whole": whole_block}, rounds=9)
        bare_ms, whole_ms = (np.median(spent[name]) / steps_per_block / 1e3 for name in ("bare", "whole"))
        ratio = describe_ratio(spent["whole"] / spent["bare"])
        print(f"{width:>6} {batch_size:>6} {precision:<10} {bare_ms:>6.2f} ms {whole_ms:>6.2f} ms {ratio:>20}")


if __name__ == "__main__":
    main(*(int(word) for word in sys.argv[1:]))
