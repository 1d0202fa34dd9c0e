"""Hold the clipper in several processes, whose gradients are shards, against one process with the whole ones."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("gradient_shards.py")


def follow_shards(tmp_path: Path, number: int) -> None:
    """Run the worker in as many processes, which compare sharded gradients with whole ones."""
    arguments = [sys.executable, str(WORKER), str(tmp_path / "meeting"), str(number)]
    processes = [
        subprocess.Popen([*arguments, str(rank)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for rank in range(number)
    ]
    answers = []
    try:
        answers = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all(process.returncode == 0 for process in processes), "\n".join(answers)
    assert all("all equal" in answer for answer in answers)


@pytest.mark.dist
@pytest.mark.parametrize("number", [1, 2])
def test_shards_are_limited_like_the_whole(number: int, tmp_path: Path) -> None:
    follow_shards(tmp_path, number)
