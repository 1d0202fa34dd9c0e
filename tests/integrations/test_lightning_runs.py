"""Check that a run with LimitLoss resumes, logs, leaves the module as it was, and is one over several processes.

The oracle of a resumed run is a run without a break; of several processes, the joined batch by hand. Also runs the
document's code and the example.
"""

from __future__ import annotations

import copy
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from alrc.reference import alrc_trace
from alrc.torch import ALRC
from attached_runs import spiky
from lightning_runs import QUIET, SETTINGS, Each, Scalar, by_hand, check, fit

pytest.importorskip("lightning.pytorch", reason="the Lightning integration needs lightning")

from lightning.pytorch import Callback, Trainer

from alrc.integrations.lightning import LimitLoss

REPOSITORY = Path(__file__).resolve().parents[2]
pytestmark = QUIET


# ------------------------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("make", [Scalar, lambda: Each(ALRC(observe=8))], ids=["callback", "module"])
def test_a_run_resumes_bit_for_bit(make: Callable[[], Any], tmp_path: Path) -> None:
    inputs = spiky(25)
    modules = [make() for _ in range(3)]
    callbacks = [LimitLoss(None if hasattr(module, "limit") else ALRC(observe=8)) for module in modules]
    logs = [Logged() for _ in modules]
    settings = {"batch_size": 1, "log_every_n_steps": 4, "accumulate_grad_batches": 2}
    fit(modules[0], [callbacks[0], logs[0]], inputs, max_epochs=2, **settings)
    fit(modules[1], [callbacks[1], logs[1]], inputs, **settings).save_checkpoint(tmp_path / "half.ckpt")
    fit(modules[2], [callbacks[2], logs[2]], inputs, max_epochs=2, ckpt_path=tmp_path / "half.ckpt", **settings)

    def everything(i: int) -> dict[str, Any]:
        own = callbacks[i].limit
        return modules[i].state_dict() | ({} if own is None else own.state_dict())

    torch.testing.assert_close(everything(2), everything(0), rtol=0, atol=0)
    assert int(everything(2)["count" if callbacks[0].limit else "limit.count"]) == 26
    assert len(everything(2)) == 7
    with pytest.raises(AssertionError):
        torch.testing.assert_close(everything(1), everything(0), rtol=0, atol=0)
    assert len(logs[1].seen) > 2
    assert [*logs[1].seen, *logs[2].seen] == logs[0].seen


def test_a_callback_that_saves_nothing_does_not_resume(tmp_path: Path) -> None:
    class Silent(LimitLoss):
        def state_dict(self) -> dict[str, Any]:
            return {}

    inputs = spiky(25)
    callbacks = [Silent(ALRC(observe=8)) for _ in range(2)]
    fit(Scalar(), callbacks[0], inputs).save_checkpoint(tmp_path / "half.ckpt")
    fit(Scalar(), callbacks[1], inputs, max_epochs=2, ckpt_path=tmp_path / "half.ckpt")
    assert int(callbacks[1].limit.count) == 25  # pyright: ignore[reportOptionalMemberAccess]


def test_a_default_limiter_is_restored_before_it_is_needed(tmp_path: Path) -> None:
    first, second = LimitLoss(), LimitLoss()
    fit(Scalar(), first, spiky(40)).save_checkpoint(tmp_path / "run.ckpt")
    fit(Scalar(), second, spiky(40), ckpt_path=tmp_path / "run.ckpt")  # there is nothing left to do
    assert first.limit is not None
    assert second.limit is not None
    assert repr(first.limit) == repr(second.limit) == "ALRC(sync=True)"
    torch.testing.assert_close(second.limit.state_dict(), first.limit.state_dict(), rtol=0, atol=0)


# -------------------------------------------------------------------------------------------------------------- logs


class Logged(Callback):
    """Keep each new set of values under `alrc/`; to be listed after LimitLoss."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []
        self._last: Any = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        values = {name: float(x) for name, x in trainer.callback_metrics.items() if name.startswith("alrc/")}
        if values and values != self._last:
            self._last = values
            self.seen.append(values)


class Given(Scalar):
    """Return what it is given, so that no NaN comes back to the weight; keep what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.logged: list[Any] = []

    def log_dict(self, values: Any, *args: Any, **settings: Any) -> None:
        self.logged += values.values()
        super().log_dict(values, *args, **settings)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        return (batch[0] + 0 * self.weight).mean()


def test_what_is_logged_covers_all_steps_since_the_last_time() -> None:
    inputs = spiky(24)
    inputs[6], inputs[9] = torch.nan, torch.inf
    module, callback = Given(), LimitLoss(ALRC(**SETTINGS), log_every_n_steps=4)
    logs = Logged()
    fit(module, [callback, logs], torch.cat((inputs, torch.ones(2))), accumulate_grad_batches=2)
    trace = alrc_trace(inputs.reshape(12, 2).numpy(), **SETTINGS)
    scale = np.array(trace.scale).reshape(3, 8)
    wanted = [
        {
            "alrc/limit": mu1 + 3 * (mu2 - mu1**2) ** 0.5,
            "alrc/fraction_limited": ((row > 0) & (row < 1)).sum() / (row > 0).sum(),
            "alrc/nonfinite": float((row == 0).sum()),
        }
        for row, mu1, mu2 in zip(scale, trace.mu1[3::4], trace.mu2[3::4], strict=True)
    ]
    assert [sorted(values) for values in logs.seen] == [sorted(values) for values in wanted]
    for seen, values in zip(logs.seen, wanted, strict=True):
        assert seen == pytest.approx(values, rel=1e-5)
    assert sum(values["alrc/nonfinite"] for values in wanted) == 2
    assert sum(values["alrc/fraction_limited"] for values in wanted) > 0
    assert len(module.logged) == 9
    # Of a plain number Lightning makes a tensor on the device, which waits for it.
    assert all(isinstance(value, Tensor) and value.device.type == "cpu" for value in module.logged)


@pytest.mark.parametrize(("every", "settings"), [(0, {}), (None, {"log_every_n_steps": 0})])
def test_nothing_is_logged_where_nothing_is_asked_for(every: Any, settings: dict[str, Any]) -> None:
    trainer = fit(Scalar(), LimitLoss(log_every_n_steps=every), torch.ones(4), **settings)
    assert not trainer.callback_metrics
    with pytest.raises(ValueError, match="must be ≥ 0, got -1"):
        LimitLoss(log_every_n_steps=-1)


# ------------------------------------------------------------------------------------------------ leaving no trace


class Failing(Scalar):
    """Look at itself, copy itself, and fail in the fourth batch."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        if batch_idx == 2:
            twin = copy.deepcopy(self)
            twin.weight.data.fill_(7.0)
            assert twin.training_step([torch.ones(1)], -1).item() == 7.0
        if batch_idx == 3:
            assert "training_step" in vars(self)
            raise ArithmeticError("the fourth batch")
        return super().training_step(batch, batch_idx)


def test_nothing_is_left_behind() -> None:
    module, callback = Scalar(), LimitLoss()
    before = set(vars(module)) | {"_hparams"}  # Lightning's
    fit(module, callback, torch.ones(4))
    limit = callback.limit
    assert limit is not None
    assert set(vars(module)) | {"_hparams"} == before
    assert limit._attachment is None
    assert limit._followers == ()
    assert not callback._limiters
    fit(module, callback, torch.ones(4))
    assert int(limit.count) == 8  # a second run goes on


def test_nothing_is_left_behind_by_a_run_that_fails() -> None:
    module, callback = Failing(), LimitLoss()
    with pytest.raises(ArithmeticError, match="the fourth batch"):
        fit(module, callback, torch.ones(4))
    assert "training_step" not in vars(module)
    assert callback.limit is not None
    assert callback.limit._attachment is None
    assert callback.limit._followers == ()


class Arguments(Scalar):
    """Take the batch alone: Lightning looks at the signature."""

    def training_step(self, batch: list[Tensor]) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return (self.weight * batch[0]).mean()


class Iterating(Scalar):
    """Take an iterator: Lightning looks at the name."""

    def training_step(self, dataloader_iter: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        (inputs,), _, _ = next(dataloader_iter)
        return (self.weight * inputs).mean()


@pytest.mark.parametrize(("kind", "is_compiled"), [(Arguments, False), (Arguments, True), (Iterating, False)])
def test_every_kind_of_training_step(kind: type[Scalar], is_compiled: bool) -> None:
    inputs = spiky(24)
    module, callback = kind(), LimitLoss(ALRC(**SETTINGS), log_every_n_steps=4)
    torch._dynamo.reset()
    trained: Any = torch.compile(module, backend="aot_eager", dynamic=False) if is_compiled else module
    fit(trained, callback, inputs)
    check(module, callback.limit, by_hand(inputs[:, None], **SETTINGS))
    own = vars(module).get("training_step")
    assert (own is not None) == is_compiled
    assert getattr(own, "__name__", "") == ("training_step" if is_compiled else "")


# ------------------------------------------------------------------------------------------------ several processes


class Shared(Scalar):
    """Give every process inputs of its own."""

    def train_dataloader(self) -> Any:
        return DataLoader(TensorDataset(self.inputs[self.global_rank :: 2]))


def train_rank(folder: Path) -> None:
    """Train with DDP in two processes that see different losses; write down what this process has in the end."""
    torch.manual_seed(20)
    inputs, told = spiky(96), {}
    for name, callback in (("joined", LimitLoss()), ("apart", LimitLoss(ALRC()))):
        module = Shared()
        module.inputs = inputs
        trainer = Trainer(
            strategy="ddp", accelerator="cpu", devices=2, max_epochs=1, logger=False, enable_progress_bar=False,
            enable_model_summary=False, enable_checkpointing=False, callbacks=[callback], use_distributed_sampler=False,
        )  # fmt: skip
        trainer.fit(module)
        assert callback.limit is not None
        told[name] = (module.weight.detach(), callback.limit.state_dict())
    torch.save((inputs, told), folder / f"told-{trainer.global_rank}.pt")  # pyright: ignore[reportPossiblyUnbound]


@pytest.mark.dist
def test_two_processes_are_one(tmp_path: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, __file__, str(tmp_path)], env=environment, check=True, timeout=150)
    (inputs, told), (_, other) = (torch.load(tmp_path / f"told-{rank}.pt") for rank in (0, 1))
    wanted = by_hand(inputs.reshape(48, 2))

    def same(name: str) -> None:
        torch.testing.assert_close(told[name], other[name], rtol=0, atol=0)
        module, limit = Scalar(), ALRC()
        module.weight.data.copy_(told[name][0])
        limit.load_state_dict(told[name][1])
        check(module, limit, wanted)

    same("joined")
    with pytest.raises(AssertionError):
        same("apart")


# ----------------------------------------------------------------------------------------------- documents and examples


def blocks_of(path: Path) -> list[str]:
    """Return the Python blocks of a document that say they need lightning."""
    return re.findall(r"^```python no-run lightning\n(.*?)^```", path.read_text(encoding="utf-8"), re.M | re.S)


@pytest.mark.filterwarnings("ignore:Starting from v1.9.0, `tensorboardX` has been removed:UserWarning")
@pytest.mark.filterwarnings("ignore:The number of training batches .* is smaller than the logging interval")
def test_the_code_in_the_document_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = blocks_of(REPOSITORY / "docs" / "integrations.md")
    assert len(blocks) > 1
    namespace: dict[str, Any] = {"__name__": "document"}
    for block in blocks:
        exec(block, namespace)


def test_the_example_shows_both_uses(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(REPOSITORY / "examples" / "lightning_text.py"))["main"]()
    said = capsys.readouterr().out
    plain = float(re.findall(r"without limiting: ([\d.]+)", said)[0])
    pattern = r"limiting (.+): ([\d.]+); limited (\d+)% in damaged batches, ([\d.]+)% in others"
    scalar, each = re.findall(pattern, said)
    assert (scalar[0], each[0]) == ("the loss of a batch", "each loss of a batch")
    assert float(scalar[2]) == 100
    assert float(each[2]) > 50
    assert float(scalar[3]) < 5
    assert float(each[3]) < 5
    assert float(scalar[1]) < plain < 2.4


if __name__ == "__main__":
    train_rank(Path(sys.argv[1]))
