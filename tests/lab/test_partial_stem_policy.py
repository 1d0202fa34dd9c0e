"""Check partial-STEM's rates at every boundary, Adam with changing rates, blurred targets and losses."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the experiment trains with torch")
from alrc_lab.experiments import partial_stem_policy as policy_module  # noqa: E402 - after the skip
from alrc_lab.experiments.partial_stem_networks import Completion, NetworkShape, build_network  # noqa: E402
from alrc_lab.experiments.partial_stem_policy import Policy, Rates  # noqa: E402

TINY = NetworkShape((4, 4, 4, 4, 4), (2, 4), 4, 1, 1)

# first update of each stage of the published run, learning rate, beta1
SPECIFIED = [
    (250_000, 3e-4, 0.9),
    (281_250, 2.625e-4, 0.85),
    (312_500, 2.25e-4, 0.8),
    (343_750, 1.875e-4, 0.75),
    (375_000, 1.5e-4, 0.7),
    (406_250, 1.125e-4, 0.65),
    (437_500, 0.75e-4, 0.6),
    (468_750, 0.375e-4, 0.55),
]


# --- rates ---


def check_rates(at: Callable[[int], Rates]) -> None:
    """Compare the rates on both sides of all eight boundaries, and at both ends, with the table above."""
    before = (3e-4, 0.9)
    for first, learning_rate, beta1 in SPECIFIED:
        for iteration, expected in ((first - 1, before), (first, (learning_rate, beta1))):
            rates = at(iteration)
            assert (rates.learning_rate, rates.beta1) == pytest.approx(expected, rel=1e-12), iteration
            assert rates.is_frozen == (iteration >= 250_000)
        before = (learning_rate, beta1)
    assert (at(0).learning_rate, at(0).beta1, at(0).is_frozen) == (3e-4, 0.9, False)
    assert (at(499_999).learning_rate, at(499_999).beta1) == pytest.approx((3.75e-5, 0.55))


def test_rates_of_the_published_run() -> None:
    check_rates(Policy(500_000).at)


@pytest.mark.parametrize(
    "wrong",
    [
        Policy.code43(500_000).at,
        Policy(500_000, stages=9).at,
        lambda i: Policy(500_008).at(i),
        lambda i: Policy(500_000).at(max(0, i - 1)),
        lambda i: Rates(3e-4 * min(1, 2 - i / 250_000), Policy(500_000).at(i).beta1, i >= 250_000),
    ],
    ids=["constant beta1", "nine stages", "another length", "one late", "straight line"],
)
def test_wrong_rates_are_reported(wrong: Callable[[int], Rates]) -> None:
    with pytest.raises(AssertionError):
        check_rates(wrong)


def test_rates_of_the_authors_code() -> None:
    ours, theirs = Policy(500_000), Policy.code43(500_000)
    for i in range(0, 500_000, 31_250):
        assert theirs.at(i).learning_rate == ours.at(i).learning_rate
        assert theirs.at(i).beta1 == 0.9


@pytest.mark.parametrize("iterations", [1, 2, 7, 16, 17, 300, 5000, 500_000])
def test_boundaries(iterations: int) -> None:
    policy = Policy(iterations)
    found = policy.boundaries()
    if iterations == 500_000:
        assert [first for first, _ in found] == [0, *(row[0] for row in SPECIFIED)]
    else:
        every = [(i, policy.at(i)) for i in range(iterations)]
        changes = [row for before, row in itertools.pairwise([(-1, None), *every]) if before[1] != row[1]]
        # The first stage changes no rate, but freezes the means; a run of few updates leaves stages out.
        assert [row for row in found if row in changes] == changes
        assert {first for first, _ in found} == {first for first, _ in changes}
    assert all(rates == policy.at(first) for first, rates in found)


@pytest.mark.parametrize("iteration", [-1, 10, 11])
def test_updates_outside_the_run_are_named(iteration: int) -> None:
    with pytest.raises(ValueError, match=f"from 0 to 9, got {iteration}"):
        Policy(10).at(iteration)


@pytest.mark.parametrize(
    ("settings", "value"),
    [
        ({"iterations": 0}, "got 0"),
        ({"stages": 0}, "got 0"),
        ({"learning_rate": -1.0}, "got -1"),
        ({"trainer_factor": 0.0}, "got 0"),
        ({"beta1": 1.0}, "beta1 1.0"),
        ({"beta1_fall": 0.95}, "beta1_fall 0.95"),
    ],
)
def test_impossible_policies_are_named(settings: Any, value: str) -> None:
    with pytest.raises(ValueError, match=value):
        Policy(**{"iterations": 10, **settings})


# --- the optimiser ---


def adam(start: np.ndarray, gradients: list[np.ndarray], rates: list[tuple[float, float]]) -> np.ndarray:
    """Take Adam's steps in float64, each with its own learning rate and beta1."""
    x, m, v = start.astype(np.float64), 0.0, 0.0
    for step, (gradient, (learning_rate, beta1)) in enumerate(zip(gradients, rates, strict=True), start=1):
        m = beta1 * m + (1 - beta1) * gradient
        v = 0.999 * v + 0.001 * gradient**2
        x = x - learning_rate * (m / (1 - beta1**step)) / (np.sqrt(v / (1 - 0.999**step)) + 1e-8)
    return x


def check_steps(
    make: Callable[[list[dict[str, Any]]], Any],
    set_rates: Callable[[Any, Rates], None] = policy_module.set_rates,
    tensors_on: str | None = None,
) -> Any:
    """Follow one generator's and one trainer's weight through a run of 16 updates."""
    network = build_network(TINY, 0)
    policy = Policy(16, learning_rate=1e-2)
    optimizer = make(policy.parameter_groups(network, tensors_on))
    weights = [network.outer.rest.O3.direction, network.trainer.T2.direction]
    starts = [w.detach().numpy().copy() for w in weights]
    generator = torch.Generator().manual_seed(1)
    gradients: list[list[np.ndarray]] = [[], []]
    for i in range(16):
        for weight, known in zip(weights, gradients, strict=True):
            weight.grad = torch.randn(weight.shape, generator=generator).to(memory_format=torch.channels_last)
            known.append(weight.grad.numpy().copy())
        set_rates(optimizer, policy.at(i))
        optimizer.step()
    table = [(1e-2 * (1 - s / 8), 0.9 - 0.05 * s) for s in [0] * 8 + list(range(8))]
    for weight, start, known, factor in zip(weights, starts, gradients, (1, 2), strict=True):
        expected = adam(start, known, [(factor * rate, beta1) for rate, beta1 in table])
        np.testing.assert_allclose(weight.detach().numpy(), expected, rtol=2e-5, atol=2e-6)
    return optimizer


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("options", [{"foreach": False}, {"foreach": True}, {"fused": True}], ids=str)
def test_rates_reach_the_optimizer(kind: Any, options: dict[str, Any]) -> None:
    decay = {} if kind is torch.optim.Adam else {"weight_decay": 0.0}
    check_steps(lambda groups: kind(groups, **options, **decay))


def test_rates_that_are_tensors_stay_the_same_tensors() -> None:
    kept: list[Any] = []

    def make(groups: list[dict[str, Any]]) -> Any:
        kept.extend(value for group in groups for value in (group["lr"], *group["betas"]))
        return torch.optim.Adam(groups, foreach=False)

    optimizer = check_steps(make, tensors_on="cpu")
    now = [value for group in optimizer.param_groups for value in (group["lr"], *group["betas"])]
    assert len(kept) == 6
    assert all(a.data_ptr() == b.data_ptr() for a, b in zip(kept, now, strict=True))
    assert [float(value) for value in now] == pytest.approx([1.25e-3, 0.55, 0.999, 2.5e-3, 0.55, 0.999])


def test_capturable_and_fused_groups_can_be_written_to() -> None:
    network = build_network(TINY, 0)
    for options in ({"capturable": True}, {"fused": True}, {"capturable": True, "foreach": True}):
        for tensors_on in (None, "cpu"):
            if tensors_on and options.get("fused"):
                continue  # reads betas as numbers
            groups = Policy(16).parameter_groups(network, tensors_on)
            optimizer = torch.optim.Adam(groups, **options)
            policy_module.set_rates(optimizer, Policy(16).at(15))
            rates = [[float(x) for x in (g["lr"], *g["betas"])] for g in optimizer.param_groups]
            assert rates == [pytest.approx([lr, 0.55, 0.999]) for lr in (3.75e-5, 7.5e-5)]


def _without_beta1(optimizer: Any, rates: Rates) -> None:
    policy_module.set_rates(optimizer, Rates(rates.learning_rate, 0.9, rates.is_frozen))


def _without_factor(optimizer: Any, rates: Rates) -> None:
    policy_module.set_rates(optimizer, rates)
    optimizer.param_groups[1]["lr"] = rates.learning_rate


@pytest.mark.parametrize("wrong", [_without_beta1, _without_factor, lambda optimizer, rates: None])
def test_wrong_steps_are_reported(wrong: Any) -> None:
    with pytest.raises(AssertionError):
        check_steps(torch.optim.Adam, wrong)


def test_groups_hold_every_weight_once_and_survive_a_checkpoint() -> None:
    network = build_network(TINY, 0)
    policy = Policy(16)
    groups = policy.parameter_groups(network)
    held = [p for group in groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in network.parameters()}
    assert len(held) == len({id(p) for p in held})
    assert {id(p) for p in groups[1]["params"]} == {id(p) for p in network.trainer.parameters()}
    optimizer = torch.optim.Adam(groups)
    policy_module.set_rates(optimizer, policy.at(12))
    other = torch.optim.Adam(Policy(16, trainer_factor=7.0).parameter_groups(network))
    other.load_state_dict(optimizer.state_dict())
    assert [g["rate_factor"] for g in other.param_groups] == [1.0, 2.0]
    assert other.param_groups[1]["lr"] == pytest.approx(3e-4)
    plain = torch.optim.Adam(network.parameters())
    policy_module.set_rates(plain, policy.at(12))
    assert plain.param_groups[0]["lr"] == pytest.approx(1.5e-4)


def train(optimizer: Any, policy: Policy) -> list[torch.Tensor]:
    """Take five updates and return the trainer's weights."""
    network = build_network(TINY.as_code43(), 0)
    stepper = optimizer(policy.parameter_groups(network))
    truth = torch.rand(1, 1, 64, 64, generator=torch.Generator().manual_seed(2))
    inputs = torch.cat([truth, truth], 1)
    for i in range(5):
        policy_module.set_rates(stepper, policy.at(i)) if optimizer is torch.optim.Adam else None
        losses = policy_module.losses_of(network(inputs), policy_module.targets_of(truth))
        stepper.zero_grad()
        (losses.inner + losses.outer).sum().backward()
        policy.weigh_gradients_(network)
        stepper.step()
    return [p.detach().clone() for p in network.parameters()]


def _is_close(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(torch.allclose(a, b, rtol=0, atol=1e-6) for a, b in zip(first, second, strict=True))


def test_adam_ignores_the_authors_factor_on_the_loss() -> None:
    once = Policy(100, trainer_factor=1.0)
    on_loss = Policy(100, trainer_factor=2.0, trainer_factor_on="loss")
    on_rate = Policy(100, trainer_factor=2.0)
    plain = train(torch.optim.Adam, once)
    assert _is_close(train(torch.optim.Adam, on_loss), plain)
    assert not _is_close(train(torch.optim.Adam, on_rate), plain)

    def sgd(groups: list[dict[str, Any]]) -> Any:
        return torch.optim.SGD([{"params": group["params"]} for group in groups], 1e-3)

    assert not _is_close(train(sgd, on_loss), train(sgd, once)), "another optimiser does not ignore it"


def test_the_factor_on_the_loss_reaches_the_trainer_alone() -> None:
    network = build_network(TINY, 0)
    for p in network.parameters():
        p.grad = torch.ones_like(p)
    network.trainer.T2.gain.grad = None
    Policy(10).weigh_gradients_(network)
    assert all((p.grad == 1).all() for p in network.parameters() if p.grad is not None)
    Policy(10, trainer_factor=3.0, trainer_factor_on="loss").weigh_gradients_(network)
    for name, p in network.named_parameters():
        assert p.grad is None or (p.grad == (3 if name.startswith("trainer") else 1)).all(), name


# --- targets and losses ---


def naive_blur(image: np.ndarray) -> np.ndarray:
    """Blur one picture pixel by pixel; beyond the border lies what lies as far inside of it."""
    weights = [[math.exp(-(i * i + j * j) / (2 * 2.5**2)) for j in range(-2, 3)] for i in range(-2, 3)]
    total = sum(map(sum, weights))
    height, width = image.shape
    result = np.zeros_like(image)

    def reflected(i: int, size: int) -> int:
        return -i if i < 0 else 2 * (size - 1) - i if i >= size else i

    for y, x in itertools.product(range(height), range(width)):
        for i, j in itertools.product(range(-2, 3), range(-2, 3)):
            value = image[reflected(y + i, height), reflected(x + j, width)]
            result[y, x] += weights[i + 2][j + 2] / total * value
    return result


def check_blur(blur: Callable[[Any], Any]) -> None:
    """Compare with the loop, borders included."""
    images = torch.randn(2, 1, 7, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = np.stack([naive_blur(image[0])[None] for image in images.numpy()])
    np.testing.assert_allclose(blur(images).numpy(), expected, atol=1e-12)


def test_blur_is_the_naive_one(monkeypatch: pytest.MonkeyPatch) -> None:
    check_blur(policy_module.blur_target)
    with pytest.raises(AssertionError):
        check_blur(lambda x: x)
    pad = torch.nn.functional.pad
    monkeypatch.setattr(torch.nn.functional, "pad", lambda x, size, mode: pad(x, size, mode="replicate"))
    with pytest.raises(AssertionError):
        check_blur(policy_module.blur_target)
    monkeypatch.setattr(torch.nn.functional, "pad", pad)
    monkeypatch.setattr(policy_module, "BLUR_STDDEV", 2.0)
    with pytest.raises(AssertionError):
        check_blur(policy_module.blur_target)


def test_blur_keeps_shape_dtype_and_constants_also_under_autocast() -> None:
    for shape in ((3, 3), (1, 5, 4), (2, 1, 8, 8)):
        constant = torch.full(shape, 0.75)
        with torch.autocast("cpu", torch.bfloat16):
            blurred = policy_module.blur_target(constant)
        assert blurred.dtype == torch.float32
        torch.testing.assert_close(blurred, constant, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="2×8"):
        policy_module.blur_target(torch.zeros(1, 1, 2, 8))


def check_losses(targets_of: Callable[[Any], Any], losses_of: Callable[[Any, Any], Any]) -> None:
    """Compare both losses of two examples with numpy."""
    generator = torch.Generator().manual_seed(1)
    truth = torch.rand(2, 1, 12, 12, dtype=torch.float64, generator=generator) * 2 - 1
    half = torch.randn(2, 1, 6, 6, dtype=torch.float64, generator=generator)
    full = torch.randn(2, 1, 12, 12, dtype=torch.float64, generator=generator)
    losses = losses_of(Completion(half, full), targets_of(truth))
    assert losses.inner.shape == losses.outer.shape == (2,)
    for i in range(2):
        image = truth[i, 0].numpy()
        small = np.array([[image[2 * y, 2 * x] for x in range(6)] for y in range(6)])
        inner = 200 * ((half[i, 0].numpy() - naive_blur(small)) ** 2).mean()
        outer = 200 * ((full[i, 0].numpy() - naive_blur(image)) ** 2).mean()
        np.testing.assert_allclose([losses.inner[i], losses.outer[i]], [inner, outer], rtol=1e-12)


def _blurred_first(truth: Any) -> Any:
    full = policy_module.blur_target(truth)
    return policy_module.Targets(full[..., ::2, ::2], full)


def _averaged(truth: Any) -> Any:
    full = policy_module.blur_target(truth)
    return policy_module.Targets(policy_module.blur_target(torch.nn.functional.avg_pool2d(truth, 2)), full)


def _unblurred(truth: Any) -> Any:
    return policy_module.Targets(truth[..., ::2, ::2], truth)


def test_losses_are_the_naive_ones() -> None:
    check_losses(policy_module.targets_of, policy_module.losses_of)
    for wrong in (_blurred_first, _averaged, _unblurred):
        with pytest.raises(AssertionError):
            check_losses(wrong, policy_module.losses_of)
    with pytest.raises(AssertionError):
        check_losses(
            policy_module.targets_of, lambda c, t: policy_module.losses_of(c, t)._replace(outer=torch.zeros(2))
        )


def test_gradients_of_the_losses() -> None:
    full = torch.randn(1, 1, 8, 8, dtype=torch.float64, requires_grad=True)
    half = torch.randn(1, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    targets = policy_module.targets_of(torch.rand(1, 1, 8, 8, dtype=torch.float64))
    losses = policy_module.losses_of(Completion(half, full), targets)
    (losses.inner + losses.outer).sum().backward()
    torch.testing.assert_close(full.grad, 400 * (full.detach() - targets.full) / 64)
    torch.testing.assert_close(half.grad, 400 * (half.detach() - targets.half) / 16)


def test_losses_are_taken_in_the_targets_precision() -> None:
    completion = Completion(*(torch.zeros(1, 1, n, n, dtype=torch.bfloat16) for n in (4, 8)))
    losses = policy_module.losses_of(completion, policy_module.targets_of(torch.full((1, 1, 8, 8), 0.1)))
    assert losses.inner.dtype == losses.outer.dtype == torch.float32
    assert losses.outer.tolist() == pytest.approx([2.0], rel=1e-5)
    with pytest.raises(ValueError, match=r"\(1, 1, 8, 8\)"):
        policy_module.losses_of(
            Completion(completion.full, completion.full), policy_module.targets_of(torch.zeros(1, 1, 8, 8))
        )


def test_error_in_percent() -> None:
    error = np.random.default_rng(0).normal(0, 0.1, (64, 64))
    loss = torch.tensor(200 * (error**2).mean())
    expected = 100 * math.sqrt((error**2).mean()) / 2
    assert float(policy_module.rms_error_percent(loss)) == pytest.approx(expected)
    assert float(policy_module.rms_error_percent(torch.tensor(0.5))) == pytest.approx(2.5)
