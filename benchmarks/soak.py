"""Kill workers and the driver of a sweep at random, 50 times, and look whether a run was lost, corrupt or different.

Run with `python benchmarks/soak.py [--kills N] [--what NAME ...] [--seed N] [--out FILE]`. Soaked are `processes`,
`ray` and `packs` (processes with packs of five runs), all by default. Prints one line for each kill and a verdict,
which also go to FILE's neighbour soak.log, and writes the verdicts as JSON, by default to benchmarks/results/soak.json.
Ends with 1 if there is anything to complain about. Seconds are of no interest: the runs sleep.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))
# A Ray cluster that is started here keeps no token in anybody's home.
os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_AUTH_TOKEN", os.urandom(32).hex())

import soaking
from alrc_lab import runner
from side_by_side import header

SOAKS = {"processes": ("processes", 1), "ray": ("ray", 1), "packs": ("processes", 5)}
"""Executor and runs in a pack at most, by name."""


def start_cluster() -> str:
    """Start a Ray cluster of two cores for as long as this process lives, and return its address."""
    import ray

    from alrc_lab.runner import ray_executor

    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    ray_executor.connect(None, workers=2)
    return ray.get_runtime_context().gcs_address


def soak(name: str, kills: int, dice: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Soak one kind of sweep, say what happens, and return the verdict."""
    executor, pack = SOAKS[name]
    started = time.monotonic()
    packs = f" in packs of up to {pack} runs" * (pack > 1)
    say(f"\n{name}: {kills} kills during a sweep with the executor {executor}{packs}, seed {dice}")
    address = start_cluster() if executor == "ray" else ""
    with tempfile.TemporaryDirectory(prefix="alrc-soak-") as scratch:
        root = Path(scratch) / "soaked"
        sent = soaking.soak(root, kills, executor=executor, pack=pack, address=address, dice=dice, say=say)
        found = [line.replace(scratch, "SCRATCH") for line in soaking.problems(root, Path(scratch) / "undisturbed")]
        states = Counter(runner.inspect_run(folder).state for folder in (root / "runs").iterdir())
        attempts = [a for path in root.glob("runs/*/env.json") for a in soaking.counting.read(path)["attempts"]]
        table = soaking.table(root)
    is_same = not any(line.startswith("the tables differ") for line in found)
    in_packs = sum("pack" in attempt for attempt in attempts)
    say("\n" + table)
    say(f"sent: {', '.join(f'{count} × {name}' for name, count in sorted(sent.items()))}")
    say(f"runs: {dict(states)}, {len(attempts)} attempts in all, {in_packs} of them in packs")
    say("\n".join([f"lost, corrupt or different: {len(found)}", *found]))
    say(f"table identical to the undisturbed sweep: {'yes' if is_same else 'no'}")
    say(f"{time.monotonic() - started:.0f} s")
    return {
        "executor": executor,
        "largest_pack": pack,
        "seed": dice,
        "kills": sum(sent.values()),
        "sent": dict(sorted(sent.items())),
        "runs": dict(states),
        "attempts": len(attempts),
        "attempts_in_packs": in_packs,
        "lost_corrupt_or_different": found,
        "table_is_that_of_the_undisturbed_sweep": is_same,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50, help="signals to send in each")
    parser.add_argument("--what", nargs="+", choices=SOAKS, default=list(SOAKS), help="what to soak")
    parser.add_argument("--seed", type=int, default=0, help="of who is killed when")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "soak.json")
    arguments = parser.parse_args()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    title = header("Sweeps under fire")
    with arguments.out.with_suffix(".log").open("w", encoding="utf-8") as log:

        def say(line: str) -> None:
            print(line, flush=True)
            print(line, file=log, flush=True)

        say("\n".join(title.splitlines()[:2]))
        say(f"code {runner.code_version()}, {time.strftime('%Y-%m-%d %H:%M', time.gmtime())} UTC")
        soaks = {name: soak(name, arguments.kills, arguments.seed, say) for name in arguments.what}
    document = {"machine": title.splitlines()[1], "code": runner.code_version(), "soaks": soaks}
    arguments.out.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"\nwritten to {arguments.out}")
    return int(any(found["lost_corrupt_or_different"] for found in soaks.values()))


if __name__ == "__main__":
    sys.exit(main())
