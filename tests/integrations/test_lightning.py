"""Check that LimitLoss shows the limiter the true loss, whatever Lightning does to it.

The oracle of moments and weights is a loop by hand around `alrc.reference.alrc_trace`. Twins: a callback that takes
the loss where Lightning offers it, and one that forgets a part of its work, must fail.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from alrc.torch import ALRC, NamedALRC
from attached_runs import START, spiky
from lightning_runs import QUIET, RATE, SETTINGS, Each, Scalar, by_hand, check, fit

pytest.importorskip("lightning.pytorch", reason="the Lightning integration needs lightning")

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.precision import MixedPrecision

from alrc.integrations.lightning import LimitLoss

pytestmark = QUIET


class Naive(Callback):
    """Learn from the loss that Lightning shows before the backward pass."""

    def __init__(self, limit: ALRC) -> None:
        self.limit = limit

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self.limit(loss.detach())


# ------------------------------------------------------------------------------------------------------ the true loss


@pytest.mark.parametrize("settings", [SETTINGS, {"observe": 8}, {}], ids=["start", "observe", "default"])
def test_scalar_losses_follow_the_reference(settings: dict[str, Any]) -> None:
    inputs = spiky(48)
    module, callback = Scalar(), LimitLoss(ALRC(**settings))
    fit(module, callback, inputs)
    check(module, callback.limit, by_hand(inputs[:, None], **settings))
    assert int(callback.limit.count) > 30


def test_a_spike_moves_the_weight_by_the_limit_over_the_loss() -> None:
    module = Scalar()
    fit(module, LimitLoss(ALRC(start=START)), torch.tensor([4.0]))
    torch.testing.assert_close(module.weight.item(), 1 - RATE * 4 * (1.6 / 4))  # the limit is 1 + 3 · 0.2


def check_accumulation(callback: Any) -> None:
    """Compare four accumulated batches of one loss with one update of four losses."""
    inputs = spiky(48)
    module = Scalar()
    fit(module, callback, inputs, accumulate_grad_batches=4)
    check(module, callback.limit, by_hand(inputs.reshape(12, 4), **SETTINGS), 1e-6)


def test_accumulated_batches_are_one_update() -> None:
    check_accumulation(LimitLoss(ALRC(**SETTINGS)))


def test_the_loss_that_lightning_shows_is_not_the_true_one() -> None:
    with pytest.raises(AssertionError):
        check_accumulation(Naive(ALRC(**SETTINGS)))


def test_accumulated_batches_equal_one_batch_of_single_losses() -> None:
    inputs = spiky(48)
    parts, whole = Scalar(), Each(ALRC(**SETTINGS))
    callback = LimitLoss(ALRC(**SETTINGS))
    fit(parts, callback, inputs, accumulate_grad_batches=4)
    fit(whole, LimitLoss(), inputs, batch_size=4)
    torch.testing.assert_close(parts.weight, whole.weight, rtol=1e-6, atol=0)
    torch.testing.assert_close(callback.limit.state_dict(), whole.limit.state_dict(), rtol=1e-6, atol=1e-6)


# ------------------------------------------------------------------------------------------------------- loss scaling


def scaled(**settings: Any) -> dict[str, Any]:
    """Settings of a Trainer that scales losses as fp16 training does, on a CPU."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, **settings)
    return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler=scaler)]}


def check_scaling(callback: Any) -> None:
    """Compare a run with loss scaling and accumulation with one by hand."""
    inputs = spiky(48)
    module = Scalar()
    fit(module, callback, inputs, accumulate_grad_batches=2, **scaled())
    check(module, callback.limit, by_hand(inputs.reshape(24, 2), **SETTINGS), 1e-6)


def test_loss_scaling_is_not_seen() -> None:
    check_scaling(LimitLoss(ALRC(**SETTINGS)))


def test_loss_scaling_is_seen_where_lightning_shows_the_loss() -> None:
    with pytest.raises(AssertionError):
        check_scaling(Naive(ALRC(**SETTINGS)))


class Overflowing(Scalar):
    """Give infinite gradients for a second input that is not 0, so that the scaler skips the step."""

    set_to_none = True

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        value, is_bad = batch[0][0]
        return self.weight * value + Overflow.apply(self.weight, is_bad)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        optimizer.zero_grad(set_to_none=self.set_to_none)


class Overflow(torch.autograd.Function):
    """Return 0, with a gradient that is infinite where asked."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, is_bad: Tensor) -> Tensor:
        ctx.save_for_backward(is_bad)
        return torch.zeros_like(weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (is_bad,) = ctx.saved_tensors
        return torch.where(is_bad > 0, torch.inf, 0.0).to(gradient.dtype), None


def check_skipped(callback: LimitLoss, set_to_none: bool) -> None:
    """Compare a run of which the scaler skips steps with a run by hand without these steps."""
    inputs = spiky(24)
    is_bad = torch.zeros(24)
    is_bad[[5, 12, 13]] = 1
    module = Overflowing()
    module.set_to_none = set_to_none
    fit(module, callback, torch.stack((inputs, is_bad), 1), **scaled())
    check(module, callback.limit, by_hand(inputs[is_bad == 0][:, None], **SETTINGS), 1e-6)  # pyright: ignore[reportArgumentType]
    assert int(callback.limit.count) == 21  # pyright: ignore[reportOptionalMemberAccess]


@pytest.mark.parametrize("set_to_none", [True, False])
def test_steps_that_the_scaler_skips_are_not_learned_from(set_to_none: bool) -> None:
    check_skipped(LimitLoss(ALRC(**SETTINGS)), set_to_none)


def test_skipped_steps_are_noticed_where_they_are_not_forgotten() -> None:
    class Forgetful(LimitLoss):
        def on_train_batch_start(self, *_: Any) -> None:
            """Rely on the gradients alone."""

    with pytest.raises(AssertionError):
        check_skipped(Forgetful(ALRC(**SETTINGS)), False)


class Line(LightningModule):
    """Fit a line by a product of matrices, which autocast makes in half precision."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)

    def training_step(self, batch: list[Tensor]) -> Tensor:
        return (self.layer(batch[0]) - 1).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def test_half_precision_equals_a_plain_loop() -> None:
    inputs = torch.randn(24, 4) * torch.where(torch.rand(24, 1) < 0.2, 10, 1)
    module, callback = Line(), LimitLoss(ALRC(**SETTINGS))
    plain, limit = copy.deepcopy(module), ALRC(**SETTINGS)
    optimizer = plain.configure_optimizers()
    limit.attach(optimizer)
    limited = 0
    for batch in inputs.split(2):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = plain.training_step([batch])
            assert loss.dtype == torch.bfloat16
            held = limit(loss)
        limited += int(held < loss)
        held.backward()
        optimizer.step()
    assert limited > 1
    fit(module, callback, inputs, batch_size=2, precision="bf16-mixed")
    torch.testing.assert_close(module.state_dict(), plain.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(callback.limit.state_dict(), limit.state_dict(), rtol=0, atol=0)


# ------------------------------------------------------------------------------------------- what training_step returns


class Returning(Scalar):
    """Return a dictionary, and nothing for every fourth batch."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return None if batch_idx % 4 == 3 else {"loss": loss, "extra": loss.detach()}


class Keeping(Callback):
    """Keep what training_step returned, as Lightning shows it."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append(outputs)


def test_dictionaries_and_batches_that_are_left_out() -> None:
    inputs = spiky(40)
    module, callback, keeping = Returning(), LimitLoss(ALRC(**SETTINGS)), Keeping()
    fit(module, [callback, keeping], inputs)
    kept = inputs[torch.arange(40) % 4 != 3]
    weight, trace = by_hand(kept[:, None], **SETTINGS)
    check(module, callback.limit, (weight, trace))
    assert all(not output for output in keeping.seen[3::4])
    seen = [output for output in keeping.seen if output]
    np.testing.assert_allclose([float(x["loss"]) for x in seen], np.concatenate(trace.limited), rtol=1e-5)
    assert any(float(x["extra"]) > 1.5 * float(x["loss"]) for x in seen)


class Validated(Scalar):
    """Validate by the training step, on spikes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.seen.append(self.training_step([100 * batch[0]], batch_idx))

    test_step = validation_step

    def val_dataloader(self) -> Any:
        return DataLoader(TensorDataset(torch.ones(2)))

    test_dataloader = val_dataloader


def test_validation_and_test_are_left_alone() -> None:
    inputs = spiky(24)
    module, callback = Validated(), LimitLoss(ALRC(**SETTINGS))
    trainer = fit(module, callback, inputs, val_check_interval=8)
    trainer.test(module, verbose=False)
    check(module, callback.limit, by_hand(inputs[:, None], **SETTINGS))
    assert len(module.seen) == 10  # before training, three times in it, and after it
    assert all(loss > 50 for loss in module.seen)


# ------------------------------------------------------------------------------------------- limiters of the module


def test_each_loss_of_a_batch_follows_the_reference() -> None:
    inputs = spiky(24, 8)
    module = Each(ALRC(**SETTINGS))
    fit(module, LimitLoss(), inputs.flatten(), batch_size=2, accumulate_grad_batches=4)
    check(module, module.limit, by_hand(inputs, **SETTINGS))
    assert module.limit._attachment is None


def test_no_loss_is_limited_twice() -> None:
    module = Each(ALRC())
    with pytest.raises(ValueError, match=r"LimitLoss has an ALRC and Each has self\.limit"):
        fit(module, LimitLoss(ALRC()), torch.ones(4))
    with pytest.raises(ValueError, match="several LimitLoss"):
        fit(Scalar(), [LimitLoss(), Second()], torch.ones(4))
    assert "training_step" not in vars(module)


class Second(LimitLoss):
    """Another one, of another class so that Lightning does not complain first."""


class ByHand(Each):
    """Optimise by hand; accumulate four batches."""

    def __init__(self, limit: Any) -> None:
        super().__init__(limit)
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        if batch_idx % 4 == 0:
            optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx) / 4)
        if batch_idx % 4 == 3:
            optimizer.step()


def test_optimising_by_hand() -> None:
    inputs = spiky(48)
    module = ByHand(ALRC(**SETTINGS))
    fit(module, LimitLoss(), inputs)
    check(module, module.limit, by_hand(inputs.reshape(12, 4), **SETTINGS))
    with pytest.raises(ValueError, match=r"ByHand optimises by hand .* self\.limit = ALRC\(\)"):
        fit(ByHand(nn.Identity()), LimitLoss(), inputs)


class Two(LightningModule):
    """Have two losses, two weights and two optimisers."""

    def __init__(self, is_attached: bool) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.limits = NamedALRC({"first": ALRC(**SETTINGS), "second": ALRC(**SETTINGS)})
        self.weights = nn.ParameterList([torch.ones(()), torch.ones(())])
        self.is_attached = is_attached

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        optimizers: Any = self.optimizers()
        for name, weight, optimizer in zip(self.limits, self.weights, optimizers, strict=True):
            optimizer.zero_grad()
            self.manual_backward(self.limits[name](weight * batch[0]).mean())
            optimizer.step()

    def configure_optimizers(self) -> Any:
        optimizers = [torch.optim.SGD([weight], lr=RATE) for weight in self.weights]
        if self.is_attached:
            self.limits.attach(dict(zip(self.limits, optimizers, strict=True)))
        return optimizers


def test_an_optimiser_that_nobody_can_follow_is_refused() -> None:
    callback = LimitLoss()
    callback._limiters = {"loss": ALRC()}
    with pytest.raises(TypeError, match=r"torch\.optim\.Optimizer, but the strategy has a object"):
        callback._attach([object()])


def test_several_optimisers() -> None:
    with pytest.raises(ValueError, match=r"which of 2 optimisers .* configure_optimizers"):
        fit(Two(False), LimitLoss(), torch.ones(4))
    inputs = spiky(24)
    module = Two(True)
    trainer = fit(module, LimitLoss(log_every_n_steps=4), inputs)
    _, trace = by_hand(inputs[:, None], **SETTINGS)
    for name in module.limits:
        np.testing.assert_allclose(float(module.limits[name].mu2), trace.mu2[-1], rtol=1e-5)
        logged = trainer.callback_metrics[f"alrc/limits.limits.{name}/limit"]
        torch.testing.assert_close(logged, module.limits[name].limit)
