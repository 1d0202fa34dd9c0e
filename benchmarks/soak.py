"""Kill workers and the driver of a sweep at random, 50 times, and look whether a run was lost, corrupt or different.

Run with `python benchmarks/soak.py [KILLS] [processes|ray] [SEED]`; prints one line for each kill and a verdict, and
ends with 1 if there is anything to complain about.
"""

from __future__ import annotations

import os
import platform
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))
# A Ray cluster that is started here keeps no token in anybody's home.
os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_AUTH_TOKEN", os.urandom(32).hex())

import soaking
from alrc_lab import runner


def main(kills: int = 50, executor: str = "processes", dice: int = 0) -> int:
    started = time.monotonic()
    print(f"Soak: {kills} kills during a sweep with the executor {executor}, seed {dice}", flush=True)
    print(f"{platform.platform()}, Python {platform.python_version()}, {runner.available_cores()} cores", flush=True)
    print(f"code {runner.code_version()}, {time.strftime('%Y-%m-%d %H:%M:%S', time.gmtime())} UTC\n", flush=True)
    address = ""
    if executor == "ray":
        import ray

        from alrc_lab.runner import ray_executor

        os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
        ray_executor.connect(None, workers=2)
        address = ray.get_runtime_context().gcs_address
    with tempfile.TemporaryDirectory(prefix="alrc-soak-") as scratch:
        root = Path(scratch) / "soaked"
        sent = soaking.soak(
            root, kills, executor=executor, address=address, dice=dice, say=lambda line: print(line, flush=True)
        )
        found = soaking.problems(root, Path(scratch) / "undisturbed")
        states = [runner.inspect_run(folder) for folder in sorted((root / "runs").iterdir())]
        attempts = sum(len(soaking.counting.read(state.folder / "env.json")["attempts"]) for state in states)
        print("\n" + soaking.table(root))
    print(f"sent: {', '.join(f'{count} × {name}' for name, count in sorted(sent.items()))}")
    print(f"runs: {dict(Counter(state.state for state in states))}, {attempts} attempts in all")
    print(f"lost, corrupt or different: {len(found)}", *found, sep="\n")
    print(f"table identical to the undisturbed sweep: {'no' if any('tables' in line for line in found) else 'yes'}")
    print(f"{time.monotonic() - started:.0f} s")
    return int(bool(found))


if __name__ == "__main__":
    given = sys.argv[1:]
    sys.exit(main(int(given[0]) if given else 50, *given[1:2], *(int(word) for word in given[2:3])))
