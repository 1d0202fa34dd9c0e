"""Check that the state is stored, loaded, copied and resumed without the loss of a bit."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from alrc.torch import ALRC

KEYS = {"mean", "var", "count", "rate", "recent", "version"}


def used(module: ALRC | None = None) -> ALRC:
    """Make a module that has seen something, limits included."""
    module = ALRC(observe=4) if module is None else module
    for losses in ([1.0, 2.0], [3.0, 0.3], [0.1, 2.0], [1.0, 1.5], [0.7, 90.0]):
        module(torch.tensor(losses))
    assert module.last is not None
    assert module.last.fraction_limited > 0
    return module


def assert_same_state(one: nn.Module, other: nn.Module) -> None:
    """Compare all buffers and parameters bit for bit, dtypes included."""
    ours, theirs = one.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype, name
        assert torch.equal(value, theirs[name]), name


def test_state_dict_holds_what_the_specification_says() -> None:
    state = used().state_dict()
    assert set(state) == KEYS
    assert state.pop("recent").shape == (2, 4)
    assert all(value.ndim == 0 for value in state.values())
    assert state["count"] == 5
    assert state["version"] == 2
    assert state["mean"].dtype == state["var"].dtype == state["rate"].dtype == torch.float32
    assert not list(used().parameters())


def test_state_dict_of_a_given_start_holds_four_numbers() -> None:
    state = used(ALRC(start=(1.0, 1.04))).state_dict()
    assert set(state) == {"mean", "var", "count", "version"}
    assert state["version"] == 1


def test_state_dict_of_a_model_names_them_under_the_module() -> None:
    model = nn.ModuleDict({"network": nn.Linear(2, 1), "limit": ALRC()})
    assert {f"limit.{key}" for key in KEYS} < set(model.state_dict())


def test_loads_strictly() -> None:
    module, fresh = used(), ALRC(observe=4)
    outcome = fresh.load_state_dict(module.state_dict())
    assert not outcome.missing_keys
    assert not outcome.unexpected_keys
    assert_same_state(fresh, module)
    assert fresh.limit == module.limit
    fresh(torch.tensor([5.0, 500.0]))
    module(torch.tensor([5.0, 500.0]))
    assert_same_state(fresh, module)


def test_loads_in_the_safe_mode_of_torch() -> None:
    stored = io.BytesIO()
    module = used()
    torch.save(module.state_dict(), stored)
    stored.seek(0)
    fresh = ALRC(observe=4)
    fresh.load_state_dict(torch.load(stored, weights_only=True))
    assert_same_state(fresh, module)


def test_loads_the_numpy_dictionary_of_the_pure_rule() -> None:
    module, fresh = used(), ALRC(observe=4)
    rule = module.rule
    state = rule.load_state_dict(module.state_dict())
    fresh.load_state_dict(rule.state_dict(state))  # pyright: ignore[reportArgumentType]
    assert_same_state(fresh, module)
    inside = nn.ModuleDict({"limit": ALRC(observe=4)})
    inside.load_state_dict({f"limit.{name}": value for name, value in rule.state_dict(state).items()})
    assert_same_state(inside["limit"], module)


@pytest.mark.parametrize("key", sorted(KEYS))
def test_a_missing_entry_is_an_error(key: str) -> None:
    state = used().state_dict()
    del state[key]
    with pytest.raises(RuntimeError, match=f'Missing key.*"{key}"'):
        ALRC(observe=4).load_state_dict(state)


def test_a_strange_entry_is_an_error() -> None:
    state = {**used().state_dict(), "mu1": torch.tensor(1.0)}
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"mu1"'):
        ALRC(observe=4).load_state_dict(state)


@pytest.mark.parametrize("version", [0, 1, 99])
def test_an_unknown_version_is_an_error_that_names_both(version: int) -> None:
    model = nn.ModuleDict({"limit": used()})
    before = copy.deepcopy(model)
    state = {**model.state_dict(), "limit.version": torch.tensor(version), "limit.mean": torch.tensor(7.0)}
    with pytest.raises(RuntimeError, match=rf"'limit\.' has version {version}\b.* version 2\b"):
        model.load_state_dict(state)
    with pytest.raises(RuntimeError, match="version"):
        model.load_state_dict(state, strict=False)
    assert_same_state(model, before)


def test_loading_keeps_the_precision_of_the_module() -> None:
    state = {key: value.half() if value.is_floating_point() else value for key, value in used().state_dict().items()}
    module = ALRC(observe=4)
    module.load_state_dict(state)
    assert module.mean.dtype == module.var.dtype == torch.float32


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module)), lambda m: copy.deepcopy(nn.Sequential(m))[0]],
    ids=["deepcopy", "pickle", "deepcopy of a model"],
)
def test_copies_are_equal_and_independent(duplicate: Any) -> None:
    module = ALRC(2.0, betas=(0.9, 0.95), observe=4)
    leaf = torch.tensor([1.0, 2.0], requires_grad=True)
    (module(leaf) * leaf).sum()  # Leaves a graph behind, which a copy must not trip over.
    twin = duplicate(module)
    assert twin.rule == module.rule
    assert twin.last is None
    assert_same_state(twin, module)
    before = copy.deepcopy(module)
    twin(torch.tensor([100.0, 1.0]))
    assert_same_state(module, before)
    with pytest.raises(AssertionError):
        assert_same_state(twin, module)


def make_run() -> tuple[nn.ModuleDict, torch.optim.Optimizer, Tensor, Tensor]:
    """Make a small training run: model, optimiser and the batches of 200 steps, with spikes around the middle."""
    torch.manual_seed(7)
    network = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
    model = nn.ModuleDict({"network": network, "limit": ALRC(betas=(0.98, 0.98))})
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    images, wanted = torch.randn(200, 4, 3), torch.randn(200, 4, 1)
    wanted[[60, 100, 101, 150]] *= 100  # Step 100 is the first one after the load.
    return model, optimizer, images, wanted


def train(model: Any, optimizer: torch.optim.Optimizer, images: Tensor, wanted: Tensor) -> Tensor:
    """Train on every batch; return the limit and the share limited of each step."""
    seen = []
    for batch, target in zip(images, wanted, strict=True):
        limited = model["limit"]((model["network"](batch) - target).square())
        optimizer.zero_grad()
        limited.mean().backward()
        optimizer.step()
        seen.append(torch.stack([model["limit"].last.limit, model["limit"].last.fraction_limited]))
    return torch.stack(seen)


def resume(folder: Path) -> None:
    """Load a run at step 100, finish it, store how it ended."""
    torch.set_num_threads(1)
    model, optimizer, images, wanted = make_run()
    stored = torch.load(folder / "half.pt", weights_only=True)
    model.load_state_dict(stored["model"])
    optimizer.load_state_dict(stored["optimizer"])
    seen = train(model, optimizer, images[100:], wanted[100:])
    torch.save({"model": model.state_dict(), "seen": seen}, folder / "end.pt")


def test_a_run_goes_on_in_a_new_process_bit_for_bit(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    model, optimizer, images, wanted = make_run()
    want = train(model, optimizer, images, wanted)
    assert torch.all(want[[60, 100, 101, 150], 1] > 0), "the spikes must be limited, also right after the load"

    half, half_optimizer, _, _ = make_run()
    train(half, half_optimizer, images[:100], wanted[:100])
    torch.save({"model": half.state_dict(), "optimizer": half_optimizer.state_dict()}, tmp_path / "half.pt")
    subprocess.run([sys.executable, __file__, str(tmp_path)], check=True, timeout=120)
    end = torch.load(tmp_path / "end.pt", weights_only=True)
    assert torch.equal(end["seen"], want[100:])
    for name, value in model.state_dict().items():
        assert torch.equal(end["model"][name], value), name


def test_a_run_without_its_moments_goes_elsewhere() -> None:
    """The twin: comparing these two runs says something, for the moments decide how they end."""
    model, optimizer, images, wanted = make_run()
    want = train(model, optimizer, images, wanted)
    half, half_optimizer, _, _ = make_run()
    train(half, half_optimizer, images[:100], wanted[:100])
    half["limit"] = ALRC(betas=(0.98, 0.98))
    assert not torch.equal(train(half, half_optimizer, images[100:], wanted[100:]), want[100:])


if __name__ == "__main__":
    resume(Path(sys.argv[1]))
