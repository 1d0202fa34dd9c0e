"""Check that an attached limiter learns once for each step of its optimiser, whatever happens in between.

The oracle of accumulation is one call on the joined batch; the oracle of everything that must leave no trace is a run
without it. Twins: limiters that are not attached, or attached in a naive way, must fail.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from alrc.torch import ALRC
from attached_runs import MAKES, START, Attach, Make, Weighted, attached, close_states, makes, not_attached, run, spiky
from bitwise import same

# ------------------------------------------------------------------------------------------------------ accumulation


def check_accumulation(
    limit: ALRC, oracle: ALRC, attach: Attach, k: int, dtype: torch.dtype = torch.float32, rtol: float = 1e-6
) -> int:
    """Compare k micro-batches, of different sizes and one of them empty, with one batch; return how many limited."""
    models = [Weighted(dtype), Weighted(dtype)]
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.0) for model in models]
    attach(limit, optimizers[0])
    limited = 0
    for losses in spiky(16, 12, dtype=dtype):
        for optimizer in optimizers:
            optimizer.zero_grad()
        sizes = [0 if i == 1 and k > 2 else 1 for i in range(k)]
        sizes[0] += 12 - sum(sizes)
        parts = [limit(models[0](part)) for part in losses.split(sizes[::-1])]
        for part in parts:
            (part.sum() / 12).backward()
        wanted = oracle(models[1](losses))
        wanted.mean().backward()
        torch.testing.assert_close(torch.cat(parts), wanted, rtol=rtol, atol=0)
        torch.testing.assert_close(models[0].weight.grad, models[1].weight.grad, rtol=rtol, atol=0)
        for optimizer in optimizers:
            optimizer.step()
        close_states(limit, oracle, rtol)
        limited += int((wanted < losses).sum())
    return limited


@makes
@pytest.mark.parametrize("k", range(1, 9))
def test_micro_batches_equal_one_batch(make: Make, k: int) -> None:
    limited = check_accumulation(make(), make(), attached, k)
    assert limited > 5 or make is ALRC, "the stream limits nothing"


@makes
@pytest.mark.parametrize("k", [3])
def test_micro_batches_equal_one_batch_to_the_last_digits_of_double(make: Make, k: int) -> None:
    check_accumulation(make().double(), make().double(), attached, k, torch.float64, 1e-12)


@makes
def test_micro_batches_that_are_not_attached_do_not(make: Make) -> None:
    with pytest.raises(AssertionError):
        check_accumulation(make(), make(), not_attached, 2)
    check_accumulation(make(), make(), not_attached, 1)


@pytest.mark.parametrize("path", ["device", "mixed"])
def test_micro_batches_equal_one_batch_on_every_device(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("loss", "learner")[: 2 if path == "device" else 1]:
        monkeypatch.setattr(f"alrc.torch.{module}.is_on_host", lambda x: False)
    for make in MAKES.values():
        check_accumulation(make(), make(), attached, 3)


def test_all_forward_passes_before_all_backward_passes() -> None:
    limit, oracle = ALRC(start=START), ALRC(start=START)
    model, optimizer = run(limit)
    parts = [limit(model(torch.tensor(losses))) for losses in ([1.0, 5.0], [0.5, 2.0])]
    for part in reversed(parts):
        part.sum().backward()
    optimizer.step()
    oracle(torch.tensor([1.0, 5.0, 0.5, 2.0]))
    close_states(limit, oracle)


def test_micro_batches_whose_gradients_wait_elsewhere() -> None:
    """Sharding keeps them out of `.grad` until the last micro-batch, and so may whoever calls `autograd.grad`."""
    limit, oracle = ALRC(start=START), ALRC(start=START)
    model, optimizer = run(limit)
    for _ in range(2):
        optimizer.zero_grad()
        model.weight.grad = sum(
            (torch.autograd.grad(limit(model(torch.tensor(loss))), model.weight)[0] for loss in (1.0, 5.0, 0.5)),
            torch.zeros(()),
        )
        optimizer.step()
        oracle(torch.tensor([1.0, 5.0, 0.5]))
    close_states(limit, oracle)


def test_nothing_is_held_against_a_limit_that_moves_within_a_step() -> None:
    limit = ALRC(start=START)
    model, optimizer = run(limit)
    before = limit.limit
    for _ in range(3):
        limit(model(torch.tensor([9.0]))).sum().backward()
        assert limit.limit == before
    optimizer.step()
    assert limit.limit != before


# --------------------------------------------------------------------------------------------- activation checkpoints


Region = Callable[[Tensor, ALRC, Tensor], Tensor]


def losses_of(weight: Tensor, limit: ALRC, inputs: Tensor) -> Tensor:
    """Do in a checkpointed region what has to be computed again, losses and limiter included.

    What autograd saves after the limiter makes sure that the limiter is called again, too.
    """
    return limit((weight * inputs).exp().square()).sum() + inputs.square().sum()


def roots_of(weight: Tensor, limit: ALRC, inputs: Tensor) -> Tensor:
    """Do the same, and compute the gradient from the limited losses that were computed again."""
    return limit((weight * inputs).exp().square()).sqrt().sum()


def check_checkpointing(limit: ALRC, attach: Attach, use_reentrant: bool, region: Region = losses_of) -> int:
    """Compare with the same run without checkpoints; return how many losses were limited."""
    oracle = copy.deepcopy(limit)
    weights = [nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))]
    optimizers = [torch.optim.SGD([weight], lr=1e-4) for weight in weights]
    for module, optimizer in zip((limit, oracle), optimizers, strict=True):
        attach(module, optimizer)
    limited = 0
    for step, inputs in enumerate(torch.rand(20, 4)):
        inputs[0] = 2.0 if step in (3, 9, 15) else inputs[0]  # step 3 is the last one before a limit is made
        leaf, other = inputs.clone().requires_grad_(), inputs.clone().requires_grad_()
        for optimizer in optimizers:
            optimizer.zero_grad()
        value = checkpoint(region, weights[0], limit, leaf, use_reentrant=use_reentrant)
        assert isinstance(value, Tensor)
        wanted = region(weights[1], oracle, other)
        value.backward()
        wanted.backward()
        assert same(value, wanted)
        assert same(leaf.grad, other.grad)
        assert same(weights[0].grad, weights[1].grad)
        assert same(limit.last, oracle.last)
        for optimizer in optimizers:
            optimizer.step()
        assert same(limit.state_dict(), oracle.state_dict())
        assert limit.count == step + 1
        assert limit.last is not None
        limited += int((limit.last.scale < 1).sum())
    return limited


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("make", [MAKES["spikes"], MAKES["start"], MAKES["paper"]], ids=["spikes", "start", "paper"])
@pytest.mark.parametrize("region", [losses_of, roots_of])
def test_checkpoints_make_no_difference(region: Region, make: Make, use_reentrant: bool) -> None:
    assert check_checkpointing(make(), attached, use_reentrant, region) > 1


@pytest.mark.parametrize("make", [MAKES["spikes"], MAKES["start"], MAKES["paper"]], ids=["spikes", "start", "paper"])
def test_checkpoints_make_no_difference_without_an_optimiser(make: Make) -> None:
    """What is computed again is decided anew, by moments that have moved; the old factors must be used."""
    assert check_checkpointing(make(), not_attached, False) > 1


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_checkpoint_is_one_update_without_an_optimiser(use_reentrant: bool) -> None:
    limit, weight = ALRC(observe=4), nn.Parameter(torch.ones(4))
    for step in range(8):
        value = checkpoint(losses_of, weight, limit, torch.rand(4, requires_grad=True), use_reentrant=use_reentrant)
        assert isinstance(value, Tensor)
        value.backward()
        assert limit.count == step + 1


class Relearning(ALRC):
    """Learn from what is computed again, as ports of this rule do."""

    def forward(self, losses: Tensor, mask: Tensor | None = None, weight: Tensor | None = None) -> Tensor:
        limited = super().forward(losses, mask, weight)
        if torch._C._current_graph_task_id() != -1:
            self.count += 1
        return limited


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_module_that_learns_from_what_is_computed_again_is_caught(use_reentrant: bool) -> None:
    with pytest.raises(AssertionError):
        check_checkpointing(Relearning(observe=4), attached, use_reentrant)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_two_checkpoints_of_one_limiter(use_reentrant: bool) -> None:
    limit, oracle = ALRC(start=START), ALRC(start=START)
    model, optimizer = run(limit)
    losses = torch.tensor([[1.0, 5.0], [0.5, 2.0]])
    total = torch.zeros(())
    for part in losses:
        leaf = part.clone().requires_grad_()
        region = checkpoint(lambda x: limit(model(x)).sum(), leaf, use_reentrant=use_reentrant)
        assert isinstance(region, Tensor)
        total = total + region
    total.backward()
    optimizer.step()
    oracle(losses)
    close_states(limit, oracle)


# ------------------------------------------------------------------------------------------------------------ closures


@pytest.mark.parametrize("line_search", [None, "strong_wolfe"])
def test_only_the_first_evaluation_of_a_closure_counts(line_search: str | None) -> None:
    limit, oracle = ALRC(start=START), ALRC(start=START)
    weight = nn.Parameter(torch.tensor([1.0, 2.0, 0.7]))
    optimizer = torch.optim.LBFGS([weight], lr=0.1, max_iter=5, line_search_fn=line_search)
    limit.attach(optimizer)
    evaluations: list[Tensor] = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        losses = (weight - torch.tensor([0.1, 0.2, 0.3])).square() + 0.1
        evaluations.append(losses.detach())
        loss = limit(losses).sum()
        loss.backward()
        return loss

    for _ in range(3):
        evaluations.clear()
        optimizer.step(closure)
        assert len(evaluations) > 1
        oracle(evaluations[0])
        close_states(limit, oracle)


def test_the_last_micro_batch_may_come_in_a_closure() -> None:
    """Frameworks that call `optimizer.step(closure)` run the micro-batches before the last one outside of it."""
    limit, oracle = ALRC(start=START), ALRC(start=START)
    model = Weighted()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.0)
    limit.attach(optimizer)
    for first, last in spiky(5, 2, 3):

        def closure(part: Tensor) -> Tensor:
            loss = limit(model(part)).sum()
            loss.backward()
            return loss

        closure(first)
        optimizer.step(lambda last=last, closure=closure: closure(last))
        optimizer.zero_grad()
        oracle(torch.cat((first, last)))
        close_states(limit, oracle)


@pytest.mark.parametrize("as_keyword", [True, False])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_closure_may_accumulate(as_keyword: bool, set_to_none: bool) -> None:
    limit, oracle = ALRC(start=START), ALRC(start=START)
    model = Weighted()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.0)
    limit.attach(optimizer)
    stream = spiky(5, 3, 2)
    for batch in stream:

        def closure(batch: Tensor = batch) -> float:
            optimizer.zero_grad(set_to_none)
            for part in batch:
                limit(model(part)).sum().backward()
            return 1.0

        result = optimizer.step(closure=closure) if as_keyword else optimizer.step(closure)
        assert result == 1.0
        oracle(batch)
        close_states(limit, oracle)


def test_a_closure_that_fails_is_forgotten() -> None:
    limit, oracle = ALRC(start=START), ALRC(start=START)
    model, optimizer = run(limit)

    def failing() -> float:
        limit(model(torch.tensor([7.0]))).sum().backward()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(failing)
    optimizer.zero_grad()
    limit(model(torch.tensor([5.0]))).sum().backward()
    optimizer.step()
    oracle(torch.tensor([5.0]))
    close_states(limit, oracle)


# ------------------------------------------------------------------------- what is no step, and what is one step only


def test_what_has_no_backward_pass_does_not_count() -> None:
    limit, oracle = ALRC(start=START), ALRC(start=START)
    model, optimizer = run(limit)
    for losses in spiky(5, 3):
        with torch.no_grad():
            limit(model(losses + 1))
        limit.eval()
        limit(model(losses + 2)).sum().backward()
        limit.train()
        limit(model(losses + 3))  # thrown away
        limit((losses + 4).requires_grad_()[:0]).sum().backward()  # empty
        limit(model(losses)).sum().backward()
        optimizer.step()
        optimizer.step()  # nothing new
        oracle(losses)
        close_states(limit, oracle)


@pytest.mark.parametrize("create_graph", [False, True])
def test_a_graph_counts_once(create_graph: bool) -> None:
    limit, oracle = ALRC(start=START), ALRC(start=START)
    model, optimizer = run(limit)
    value = limit(model(torch.tensor([1.0, 3.2]))).sum()
    for _ in range(2):
        (gradient,) = torch.autograd.grad(value, model.weight, retain_graph=True, create_graph=create_graph)
        assert gradient == pytest.approx(1.0 + 0.5 * 3.2)
    value.backward()
    optimizer.step()
    oracle(torch.tensor([1.0, 3.2]))
    close_states(limit, oracle)


def test_a_gradient_penalty_counts_once() -> None:
    limit, oracle = ALRC(start=START), ALRC(start=START)
    weight = nn.Parameter(torch.tensor(1.0))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    limit.attach(optimizer)
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    limited = limit(weight * x.square())  # 1 and 4, limited to 1.6 by the factor 0.4
    (slope,) = torch.autograd.grad(limited.sum(), x, create_graph=True)
    torch.testing.assert_close(slope, torch.tensor([2.0, 0.4 * 4.0]))
    (limited.sum() + slope.square().sum()).backward()
    torch.testing.assert_close(weight.grad, torch.tensor(1.0 + 0.4 * 4.0 + 2 * (4.0 + 1.6 * 1.6)))
    optimizer.step()
    oracle(torch.tensor([1.0, 4.0]))
    close_states(limit, oracle)


@pytest.mark.parametrize("attach", [attached, not_attached])
@pytest.mark.parametrize("loss", [1.0, 3.2])
def test_the_result_may_be_changed_in_place(loss: float, attach: Attach) -> None:
    """A result that were a view of something would refuse, and only once a loss is limited."""
    limit = ALRC(start=START)
    model, _ = run(limit, attach)
    limited = limit(model(torch.tensor([loss])))
    assert not limited._is_view()
    limited *= 2
    limited.sum().backward()
    torch.testing.assert_close(model.weight.grad, torch.tensor(2 * min(loss, 1.6)))


# ------------------------------------------------------------------------------------------------------------ compiled


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled_micro_batches_equal_one_batch() -> None:
    torch._dynamo.reset()
    limit, oracle = ALRC(observe=4), ALRC(observe=4)
    model, optimizer = run(limit)
    compiled = torch.compile(lambda part: limit(model(part)).sum(), fullgraph=True, backend="aot_eager", dynamic=False)
    for step, losses in enumerate(spiky(12, 3, 4)):
        optimizer.zero_grad()
        with torch.compiler.set_stance("fail_on_recompile" if step else "default"):
            for part in losses:
                compiled(part).backward()
        optimizer.step()
        oracle(losses)
        close_states(limit, oracle)
        assert limit.count == step + 1
    torch._dynamo.reset()


# -------------------------------------------------------------------------------------------- attaching and detaching


def hooks_of(optimizer: torch.optim.Optimizer) -> int:
    return len(optimizer._optimizer_step_pre_hooks) + len(optimizer._optimizer_step_post_hooks)


def test_detach_leaves_nothing_behind() -> None:
    limit, oracle = ALRC(start=START), ALRC(start=START)
    model, optimizer = run(limit)
    assert hooks_of(optimizer) == 2
    limit(model(torch.tensor([7.0]))).sum().backward()
    limit.detach()
    limit.detach()
    assert hooks_of(optimizer) == 0
    optimizer.step()
    close_states(limit, oracle)
    limit(model(torch.tensor([5.0])))
    oracle(torch.tensor([5.0]))
    close_states(limit, oracle)


def test_attaching_again_follows_the_new_optimiser_alone() -> None:
    limit, oracle = ALRC(start=START), ALRC(start=START)
    model, old = run(limit)
    new = torch.optim.SGD(model.parameters(), lr=0.0)
    assert limit.attach(new) is limit
    limit.attach(new)
    assert hooks_of(old) == 0
    assert hooks_of(new) == 2
    limit(model(torch.tensor([5.0]))).sum().backward()
    old.step()
    close_states(limit, oracle)
    new.step()
    oracle(torch.tensor([5.0]))
    close_states(limit, oracle)


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: copy.deepcopy(nn.Sequential(m))[0]],
    ids=["deepcopy", "pickle", "deepcopy of a model"],
)
def test_a_copy_is_not_attached(duplicate: Any) -> None:
    limit, oracle = ALRC(start=START), ALRC(start=START)
    model, optimizer = run(limit)
    limit(model(torch.tensor([7.0]))).sum().backward()
    twin = duplicate(limit)
    assert hooks_of(optimizer) == 2
    twin(torch.tensor([5.0]))
    oracle(torch.tensor([5.0]))
    close_states(twin, oracle)
    optimizer.step()
    close_states(twin, oracle)
    assert limit.count == 1


def test_an_optimiser_with_followers_is_copied_and_stored() -> None:
    limit = ALRC(start=START)
    _, optimizer = run(limit)
    copied = copy.deepcopy(optimizer)
    copied.load_state_dict(pickle.loads(pickle.dumps(optimizer.state_dict())))
    copied.step()
    assert limit.count == 0


def test_several_limiters_follow_one_optimiser() -> None:
    limits, oracles = [ALRC(start=START), ALRC(observe=4)], [ALRC(start=START), ALRC(observe=4)]
    model, optimizer = run(limits[0])
    limits[1].attach(optimizer)
    for losses in spiky(6, 2, 3):
        optimizer.zero_grad()
        sum(limit(model(part)).sum() for limit, part in zip(limits, losses, strict=True)).backward()
        optimizer.step()
        for limit, oracle, part in zip(limits, oracles, losses, strict=True):
            oracle(part)
            close_states(limit, oracle)


def test_schedulers_that_wrap_the_step_are_followed() -> None:
    limit, oracle = ALRC(start=START), ALRC(start=START)
    model, optimizer = run(limit, lr=1e-3)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    limit(model(torch.tensor([5.0]))).sum().backward()
    optimizer.step()
    scheduler.step()
    oracle(torch.tensor([5.0]))
    close_states(limit, oracle)
