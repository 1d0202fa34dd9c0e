"""What a pack of runs does on a GPU: replay its update as one graph, and find the fastest way to convolve.

An update of small networks is some hundreds of short kernels, and a host that launches them one by one is slower than
the device. A CUDA graph launches all of them at once, but on the same memory each time. On a CPU the same classes call
the function itself, so that everything but the graph can be tested there. **This has never run on a GPU.**
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from alrc_lab.experiments.cifar10_supersampling import Config, build_network
from alrc_lab.experiments.replicas_network import WAYS, stack_networks

WARM_UPS = 3
"""Calls before the capture, in which libraries choose their kernels and get their workspaces."""
REPEATS = 5
"""Replays that are timed for each way to convolve."""
SIZE = 32
"""Height and width of the images that are timed."""

_choices: dict[tuple[Any, ...], dict[str, Any]] = {}


class Replay:
    """Repeat a function that works on memory which never moves; on CUDA as one graph.

    Args:
        function: Called with the buffers. It must not wait for the device, and must leave what its next call needs in
            the buffers and in `state`, changed in place.
        buffers: Where the function finds its inputs and leaves its results; on one device.
        state: Every tensor that outlives a call and is changed by it. The calls that warm up leave no trace in it.
    """

    def __init__(self, function: Callable[..., None], buffers: Sequence[Tensor], state: Sequence[Tensor]) -> None:
        self.buffers = tuple(buffers)
        """The memory it works on."""
        device = self.buffers[0].device
        if device.type == "cuda":
            # Only the graph is kept; whatever the function belongs to may hold this object.
            self._call = _capture(function, self.buffers, state, device).replay
        else:
            _warm_up(function, self.buffers, state)
            self._call = lambda: function(*self.buffers)

    def __call__(self, *inputs: Tensor) -> None:
        """Copy values into the first buffers, and let the function work on all of them."""
        for buffer, value in zip(self.buffers, inputs, strict=False):
            buffer.copy_(value)
        self._call()


def choose_way(config: Config, replicas: int) -> dict[str, Any]:
    """Choose how so many runs convolve; on CUDA by timing every way, once for each shape in the life of a process.

    A way that fails, for want of memory or of a kernel, is not chosen. The pack that asks first decides: when runs
    have ended, those that remain go on in the same way.

    Args:
        config: Settings that the runs share: width, batch size, precision and device.
        replicas: Number of runs.

    Returns:
        `convolution`, a name of `WAYS`, and on CUDA `step_ms`, milliseconds of a forward and backward pass in every
        way that worked.
    """
    if torch.device(config.device).type != "cuda":
        return {"convolution": "grouped"}
    shape = config.device, config.width, config.batch_size, config.precision
    if shape not in _choices:
        times = time_ways(config, replicas)
        _choices[shape] = {
            "convolution": min(times, key=times.__getitem__, default="grouped"),
            "step_ms": {way: round(1e3 * seconds, 3) for way, seconds in times.items()},
        }
    return _choices[shape]


def time_ways(config: Config, replicas: int) -> dict[str, float]:
    """Time a forward and backward pass of so many networks in every way to convolve.

    Args:
        config: Width, batch size, precision and device.
        replicas: Number of networks.

    Returns:
        Seconds, by name; ways that fail are left out.
    """
    networks = [build_network(config.width, seed).to(config.device) for seed in range(replicas)]
    images = torch.randn(config.batch_size, 3 * replicas, SIZE, SIZE, device=config.device)
    images = images.contiguous(memory_format=torch.channels_last)
    found = dict[str, float]()
    for way in WAYS:
        try:
            network = stack_networks(networks, way)
            replay = Replay(_pass_of(network, config.precision), [images], [])
            found[way] = seconds_of(replay, REPEATS, images.device)
        except RuntimeError as error:  # of which torch's own for want of memory is one
            warnings.warn(f"{replicas} replicas cannot convolve by {way!r}: {error}", stacklevel=2)
    return found


def seconds_of(call: Callable[[], Any], repeats: int, device: torch.device) -> float:
    """Return the seconds of a call, work of the device included, as the mean of several after one that is not timed."""
    call()
    wait(device)
    started = time.perf_counter()
    for _ in range(repeats):
        call()
    wait(device)
    return (time.perf_counter() - started) / repeats


def wait(device: torch.device) -> None:
    """Wait until a device has done all it was told; a CPU has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _pass_of(network: torch.nn.Module, precision: str) -> Callable[[Tensor], None]:
    """Return a function that takes images forward and backward."""

    def run(images: Tensor) -> None:
        for parameter in network.parameters():
            parameter.grad = None
        with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            outputs = network(images)
        outputs.backward(torch.ones_like(outputs))

    return run


def _warm_up(function: Callable[..., None], buffers: Sequence[Tensor], state: Sequence[Tensor]) -> None:
    """Call a function some times and undo what that did to the state."""
    with torch.no_grad():
        before = [tensor.clone() for tensor in state]
    for _ in range(WARM_UPS):
        function(*buffers)
    with torch.no_grad():
        for tensor, value in zip(state, before, strict=True):
            tensor.copy_(value)


def _capture(
    function: Callable[..., None], buffers: Sequence[Tensor], state: Sequence[Tensor], device: torch.device
) -> torch.cuda.CUDAGraph:
    """Record a call as a graph; recording executes nothing."""
    with torch.cuda.device(device):
        # Both on one stream of their own: the default one cannot be captured, and gradients remember their stream.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            _warm_up(function, buffers, state)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            function(*buffers)
    return graph
