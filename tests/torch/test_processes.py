"""Check that several processes with `sync` are one: same state, same decisions, no hang.

The cases are in `alrc_ranks.py`. All of them are run in two (or four) real processes; and here, without a process
group, on the joined batches, which is the oracle. Twins: processes that do not talk must be seen to drift apart, and
one that waits for ever must be seen.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch._dynamo.exc import Unsupported

from alrc.torch import ALRC
from bitwise import same

RANKS = Path(__file__).with_name("alrc_ranks.py")
LIMIT_S = 150
"""How long all cases may take on a busy machine before they are taken for hanging; they need some fifteen seconds."""

Told = dict[str, dict[str, Any]]


def load_ranks() -> ModuleType:
    specification = importlib.util.spec_from_file_location("alrc_ranks", RANKS)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


ranks = load_ranks()
CASES = list(ranks.cases(Path()))
TWINS = ("unsynchronised", "ddp without sync inside", "ddp without sync outside")
SPLIT = ("grouped",)
"""Cases with tests of their own."""


@contextlib.contextmanager
def running(commands: list[list[str]], limit_s: float) -> Iterator[None]:
    """Run processes beside what is done here, and wait for them; kill all if one fails or the time is over."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    end = time.monotonic() + limit_s
    workers = [subprocess.Popen([sys.executable, *command], env=environment) for command in commands]
    try:
        yield
        for worker in workers:
            code = worker.wait(timeout=max(end - time.monotonic(), 0.1))
            assert code == 0, f"a process ended with {code}"
    except subprocess.TimeoutExpired:
        pytest.fail(f"{commands} still run after {limit_s} s: some process waits for another")
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()


class Outcome:
    """What all processes told, and what one process alone told."""

    def __init__(self, folder: Path, size: int) -> None:
        self.folder, self.size = folder, size
        ranks.store(folder, 1, 0)
        with running([[str(RANKS), str(folder), str(size), str(rank)] for rank in range(size)], LIMIT_S):
            self.alone: Told = {name: ranks.tell(case, 1, 0) for name, case in ranks.cases(folder).items()}
        self.ranks: list[Told] = [torch.load(folder / f"told-{rank}.pt") for rank in range(size)]

    def of(self, case: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Return what a case told on each process, and alone."""
        told = [rank[case] for rank in self.ranks]
        for one in (*told, self.alone[case]):
            assert "error" not in one, one["error"]
        return told, self.alone[case]


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.dist)])
def outcome(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return Outcome(tmp_path_factory.mktemp("ranks"), request.param)


def close(got: Any, wanted: Any, rtol: float = 1e-6) -> None:
    torch.testing.assert_close(got, wanted, rtol=rtol, atol=1e-7, equal_nan=True)


def check_agreement(told: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    """Require states that are the same bit for bit on all processes, and those of one process on the joined batches."""
    for one in told[1:]:
        assert same(one["states"], told[0]["states"])
        assert same(one.get("weights"), told[0].get("weights"))
    close(told[0]["states"], alone["states"])
    if "weights" in alone:
        close(told[0]["weights"], alone["weights"], rtol=1e-5)


@pytest.mark.parametrize("case", [case for case in CASES if case not in TWINS + SPLIT and "without sync" not in case])
def test_processes_are_one(outcome: Outcome, case: str) -> None:
    told, alone = outcome.of(case)
    check_agreement(told, alone)
    for step, joined in enumerate(alone.get("did", ())):
        got = torch.cat([one["did"][step] for one in told], -1)
        close(got, joined)
    if "did" in alone:
        assert sum(int((joined[1] < 1).sum()) for joined in alone["did"]) > 8, "the case limits nothing"
    if "limited" in alone:
        assert alone["limited"] > 0.1, "the case limits nothing"


@pytest.mark.parametrize("case", TWINS)
def test_processes_that_do_not_talk_are_seen_to_drift(outcome: Outcome, case: str) -> None:
    told, alone = outcome.of(case)
    with pytest.raises(AssertionError):
        check_agreement(told, alone)
    final = [one["states"][-1]["mean"] for one in told]
    assert len({float(mean) for mean in final}) > 1


def test_groups_learn_apart(outcome: Outcome) -> None:
    told, alone = outcome.of("grouped")
    half = outcome.size // 2
    for one in told[1:half]:
        check_agreement([one, told[0]], alone)
    check_agreement(told[:half], alone)
    check_agreement(told[half:], told[half])
    assert not same(told[0]["states"], told[half]["states"])


@pytest.mark.parametrize(
    "transform",
    [lambda limit: torch.compile(limit, fullgraph=True, backend="eager"), torch.func.vmap],
    ids=["compile", "vmap"],
)
def test_what_cannot_be_transformed_or_compiled_says_so(transform: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("alrc.torch.learner.group_of", lambda sync: "a group")
    with pytest.raises(
        (RuntimeError, Unsupported), match=r"sync=True does not work inside torch.compile or torch.func"
    ):
        transform(ALRC(sync=True))(torch.ones(3))
    torch._dynamo.reset()


def test_what_several_processes_stored_goes_on_in_one(outcome: Outcome) -> None:
    """The reverse, and what one process stored goes on in several, is the case "stored"."""
    states = ranks.resume(outcome.folder, outcome.size, 1, 0)
    told, _ = outcome.of("stored")
    assert same(states[0], states[2])
    # They learned the same, so they go on alike.
    close(states, told[0]["states"])


WAITING = ["-c", "import threading; threading.Event().wait()"]


def test_a_process_that_waits_for_ever_is_seen() -> None:
    with pytest.raises(pytest.fail.Exception, match="waits for another"), running([WAITING, ["-c", ""]], 0.5):
        pass


def test_a_process_that_fails_is_seen() -> None:
    with pytest.raises(AssertionError, match="ended with 3"), running([["-c", "raise SystemExit(3)"], WAITING], 60):
        pass
