"""Check that two processes under accelerate hold the moments of one process on the joined batches, and resume.

Oracle: the same training in one process. Twin: processes that do not talk must be seen to drift apart.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from alrc.torch import ALRC
from attached_runs import Weighted, close_states, spiky
from bitwise import same

pytest.importorskip("transformers", reason="needs transformers")
pytest.importorskip("accelerate", reason="needs accelerate")

from accelerate import Accelerator

RANKS = Path(__file__).with_name("accelerate_ranks.py")
LIMIT_S = 120
"""How long the training may take on a busy machine before it is taken for hanging; it needs some five seconds."""
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

Told = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> tuple[Told, Told, Told]:
    """Return what both of two processes told, and what one alone told."""
    folder = tmp_path_factory.mktemp("ranks")
    for size in (2, 1):
        command = [sys.executable, str(RANKS), str(folder), str(size)]
        subprocess.run(command, env=ENVIRONMENT, check=True, timeout=LIMIT_S)
    first, second, alone = (torch.load(folder / f"told-{name}.pt") for name in ("2-0", "2-1", "1-0"))
    return first, second, alone


def check_agreement(case: str, told: tuple[Told, Told, Told]) -> None:
    """Require the same bits of both processes, and the numbers of one process."""
    first, second, alone = (one[case] for one in told)
    assert same(first["states"], second["states"])
    assert same(first["weights"], second["weights"])
    torch.testing.assert_close(first["states"], alone["states"], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(first["weights"], alone["weights"], rtol=1e-4, atol=1e-5)
    assert sum(share > 0 for share in alone["shares"]) > 3, "the case limits nothing"


@pytest.mark.dist
@pytest.mark.parametrize("case", ["whole", "resumed", "trainer"])
def test_processes_are_one(told: tuple[Told, Told, Told], case: str) -> None:
    check_agreement(case, told)
    assert [int(state["count"]) for state in told[2]["whole"]["states"]] == list(range(1, 13))


@pytest.mark.dist
def test_a_stored_training_goes_on_bit_for_bit(told: tuple[Told, Told, Told]) -> None:
    for one in told:
        assert same(one["resumed"]["states"], one["whole"]["states"][6:])
        assert same(one["resumed"]["weights"], one["whole"]["weights"])


@pytest.mark.dist
@pytest.mark.parametrize(("case", "oracle"), [("not synchronised", "whole"), ("trainer not synchronised", "trainer")])
def test_processes_that_do_not_talk_are_seen_to_drift(told: tuple[Told, Told, Told], case: str, oracle: str) -> None:
    with pytest.raises(AssertionError):
        check_agreement(case, told)
    assert same(told[2][case]["states"], told[2][oracle]["states"])


def check_accumulation(k: int) -> None:
    """Compare the micro-batches of `accelerator.accumulate` with joined batches of four."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=k)
    limit, oracle = ALRC(observe=4), ALRC(observe=4)
    model = Weighted()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    limit.attach(optimizer)
    model, optimizer = accelerator.prepare(model, optimizer)
    limited = 0
    for losses in spiky(16, 4):
        for part in losses.chunk(4):
            with accelerator.accumulate(model):
                accelerator.backward(limit(model(part)).mean())
                optimizer.step()
                optimizer.zero_grad()
        limited += int((oracle(losses) < losses).sum())
        close_states(limit, oracle)
    assert limited > 2, "the stream limits nothing"


def test_accumulated_batches_are_one_update() -> None:
    check_accumulation(4)
    with pytest.raises(AssertionError, match="are not"):
        check_accumulation(2)


@pytest.mark.dist
def test_the_example_holds_one_limit_in_two_processes() -> None:
    command = [sys.executable, str(RANKS.parents[2] / "examples" / "accelerate_two_processes.py")]
    said = subprocess.run(command, env=ENVIRONMENT, check=True, timeout=LIMIT_S, capture_output=True, text=True).stdout
    assert "78 updates in each of 2 processes; limits equal: True;" in said
    assert "resumed half way, same moments bit for bit: True" in said
    healthy, damaged = map(float, re.findall(r"limited ([\d.]+)% in the first process, ([\d.]+)% in damaged", said)[-1])
    assert damaged > 4 * healthy
