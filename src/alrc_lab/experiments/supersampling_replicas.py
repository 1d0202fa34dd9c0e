"""Train several supersampling runs as one program: their networks side by side on the channels of one.

A replica is a run that lies in a pack with others. It has its own weights, images, limiter, records and end, and its
numbers are those of the run alone up to rounding, whoever lies beside it. A `Trainer` holds each run before and after,
so that checkpoints are those of single runs: a run that was stopped in a pack goes on alone, or in another pack.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from alrc_lab.experiments import cifar10_supersampling as single
from alrc_lab.experiments.cifar10_supersampling import Config, Trainer
from alrc_lab.experiments.recorder import Recorder
from alrc_lab.experiments.replicas_graph import Replay, choose_way
from alrc_lab.experiments.replicas_limits import Limits
from alrc_lab.experiments.replicas_network import rows_of, side_by_side, stack_networks

OWN_FIELDS = (
    *("seed", "num_stddev", "variant", "huber", "learning_rate", "drop_at", "dropped_rate"),
    *("iterations", "final_window", "diverged_above"),
)
"""Fields in which the runs of one pack may differ."""

CACHE_BYTES = 2**20
"""Size of a core's second-level cache on the machines that were measured."""
PIXELS = 32 * 32
"""Pixels of an image."""
SMALLEST = 4
"""Runs in a pack at least: two together are only a twentieth faster."""
LARGEST = 32
"""Runs in a pack at most; a run holds two blocks of 256 augmented images, 6 MB, beside its network."""
LARGEST_ON_GPU = 40
"""Runs in a pack at most on a GPU, the number in which its speed is to be measured; nobody has yet."""


def pack_key(config: dict[str, Any]) -> str | None:
    """Return what runs must have in common to train together.

    Args:
        config: A resolved `Config` as a dictionary.

    Returns:
        Runs of equal keys fit into one pack.
    """
    return json.dumps({name: value for name, value in config.items() if name not in OWN_FIELDS}, sort_keys=True)


def largest_pack(config: dict[str, Any]) -> int:
    """Return how many runs pay in one pack.

    On a CPU as many as leave a layer's images in a core's second-level cache: measured for widths 8 and 16 in both
    precisions, beyond that every further run makes all of them slower (docs/design/0011-replicas.md). A rule instead
    of a measurement on the spot, so that a command that is repeated packs as it did before.

    On a GPU as many as fit into half of the memory that is free, up to `LARGEST_ON_GPU`. What packs gain there has
    never been measured.

    Args:
        config: A resolved `Config` as a dictionary.

    Returns:
        Number of runs, at least 1; 1 where packing has not been shown to pay, or where there is no such GPU.
    """
    settings = Config(**config)
    device = torch.device(settings.device)
    if device.type == "cuda" and torch.cuda.is_available():
        free, _ = torch.cuda.mem_get_info(device)
        number = min(LARGEST_ON_GPU, free // 2 // bytes_of_replica(settings))
    elif device.type == "cpu":
        number = min(LARGEST, CACHE_BYTES // (2 * settings.width * settings.batch_size * PIXELS * _itemsize(settings)))
    else:
        return 1
    return number if number >= SMALLEST else 1


def bytes_of_replica(config: Config) -> int:
    """Return about how much memory of a GPU a run takes in a pack; counted, not measured.

    - Weights: 252 width² + 166 width + 3 of 4 bytes, in eleven copies: the stacked ones, their gradients, two moments
      and the copy of weights and moments that the warm-up puts back; the trainer's own three; weights and gradients
      of two bytes, if that is the precision.
    - Images between layers that the backward pass needs, 22 width channels, the gradients of six width, and for
      im2col 9 · 2 width channels of a layer and 2 width padded: 48 width channels together, of the precision.
    - Two blocks of augmented images, and both once more side by side with those of the others.
    """
    weights = 252 * config.width**2 + 166 * config.width + 3
    between = 48 * config.width * config.batch_size * PIXELS * _itemsize(config)
    images = max(single.Stream.images_per_block, config.batch_size) * 3 * PIXELS * 4
    return 11 * 4 * weights + between + 4 * images


def _itemsize(config: Config) -> int:
    """Return the bytes of a number between layers."""
    return 2 if config.precision == "bfloat16" else 4


def facts_of(configs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Say how runs that train together are computed on this machine, for the record of an attempt.

    Args:
        configs: Resolved `Config`s as dictionaries, of one `pack_key`.

    Returns:
        What `choose_way` says, and `graph`, whether an update is replayed as a CUDA graph. On CUDA this measures.
    """
    settings = Config(**configs[0])
    return {**choose_way(settings, len(configs)), "graph": torch.device(settings.device).type == "cuda"}


class Pack:
    """Train several runs at once, from where each stands.

    Args:
        trainers: The runs, alike in all but `OWN_FIELDS`. They are not changed before `release`.
        way: How to convolve, one of `replicas_network.WAYS`; None lets `choose_way` choose.
        is_replayed: Whether to take updates on memory that never moves, on CUDA as one graph; None does so on CUDA.
    """

    def __init__(self, trainers: Sequence[Trainer], way: str | None = None, is_replayed: bool | None = None) -> None:
        kinds = {pack_key(vars(trainer.config)) for trainer in trainers}
        if len(kinds) != 1:
            raise ValueError(f"the runs of a pack may differ in {', '.join(OWN_FIELDS)}; got {len(kinds)} other kinds.")
        self.trainers = list(trainers)
        first = self.trainers[0]
        self.config, self.power = first.config, first.power
        self.way = way or choose_way(self.config, len(self.trainers))["convolution"]
        self.network = stack_networks([trainer.network for trainer in self.trainers], self.way)
        parameter = next(self.network.parameters())
        self._is_replayed = parameter.is_cuda if is_replayed is None else is_replayed
        self._replay: Replay | None = None
        self.limits = Limits(
            [trainer.limiter for trainer in self.trainers],
            [trainer.huber for trainer in self.trainers],
            parameter.device,
            parameter.dtype,
        )
        self.steps = [trainer.step for trainer in self.trainers]
        self._optimizers = _Optimizers(self.trainers, self.network)
        self._blocks = [(-1, torch.empty(0), torch.empty(0)) for _ in self.trainers]

    def tensors(self) -> list[Tensor]:
        """Return everything that an update needs of the one before; it is changed in place and never moves."""
        return [*self.network.parameters(), *self._optimizers.tensors(), *self.limits.tensors()]

    def losses_of(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return raw errors and training losses before ALRC, each of shape (replicas, batch).

        Args:
            inputs: Images of all replicas, shape (batch, replicas · 3, height, width).
            targets: What they should become, same shape.

        Returns:
            Errors and losses, as `Trainer.losses_of` gives them for each replica.
        """
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16"):
            outputs = self.network(inputs)
        gaps = outputs.to(targets.dtype) - targets
        errors = gaps.pow(self.power).unflatten(1, (len(self.trainers), -1)).mean((2, 3, 4)).T
        losses = single.LOSS_SCALE * errors
        if self.config.root_above is not None:
            is_high = losses >= self.config.root_above
            losses = torch.where(is_high, torch.where(is_high, losses, 1.0).sqrt(), losses)
        return errors, losses

    def update(self, inputs: Tensor, targets: Tensor, record: Tensor) -> None:
        """Take one step of all replicas and write `Trainer.columns` into `record`, shape (replicas, columns)."""
        errors, losses = self.losses_of(inputs, targets)
        seen = losses.detach()
        limited = self.limits.judge(seen)
        for parameter in self.network.parameters():
            parameter.grad = None
        losses.backward(limited.factor / self.config.batch_size)
        self._optimizers.step()
        record[:, 0], record[:, 1], record[:, 2] = errors.detach().mean(1), seen.mean(1), seen.amax(1)
        record[:, 3], record[:, 4] = limited.limit, limited.fraction_limited

    def train_block(self) -> list[dict[str, np.ndarray]]:
        """Train until the first replica comes to the end of its block of images, or of its run.

        Returns:
            For each replica, what `Trainer.train_block` returns.
        """
        images, places = self._load_blocks()
        per_block = self.trainers[0].stream.steps_per_block
        number = min(
            min(per_block - place, trainer.config.iterations - step)
            for place, trainer, step in zip(places, self.trainers, self.steps, strict=True)
        )
        records = images[0][0].new_zeros((number, len(self.trainers), len(Trainer.columns)))
        where = list(zip(images, places, strict=True))
        # On a GPU a block is laid side by side at once, since a host cannot do that for each update in time.
        segments = [
            torch.cat([block[side][place : place + number] for block, place in where], 2)
            for side in (0, 1)
            if self._is_replayed
        ]
        for i in range(number):
            if self._optimizers.drop_rates([step + i for step in self.steps]):
                self._replay = None  # the rate is part of the graph
            if self._is_replayed:
                self._replay_update(segments[0][i], segments[1][i], records[i])
            else:
                inputs, targets = (side_by_side([block[side][place + i] for block, place in where]) for side in (0, 1))
                self.update(inputs, targets, records[i])
        return [self._keep(replica, rows) for replica, rows in enumerate(records.cpu().numpy().swapaxes(0, 1))]

    def _replay_update(self, inputs: Tensor, targets: Tensor, record: Tensor) -> None:
        """Do as `update` does, on memory that never moves."""
        if self._replay is None:
            images = [torch.empty_like(x, memory_format=torch.channels_last).copy_(x) for x in (inputs, targets)]
            self._replay = Replay(self.update, [*images, torch.zeros_like(record)], self.tensors())
        self._replay(inputs, targets)
        record.copy_(self._replay.buffers[-1])

    def release(self) -> None:
        """Write everything that training changed back into the trainers."""
        members = len(self.trainers)
        for name, stacked in self.network.named_parameters():
            for replica, trainer in enumerate(self.trainers):
                trainer.network.get_parameter(name).data.copy_(rows_of(stacked.detach(), replica, members))
        self._optimizers.write_back()
        self.limits.write_back([trainer.limiter for trainer in self.trainers])
        for trainer, step in zip(self.trainers, self.steps, strict=True):
            trainer.step = step

    def _load_blocks(self) -> tuple[list[tuple[Tensor, Tensor]], list[int]]:
        """Return each replica's block of images and its place in it."""
        places = list[int]()
        for replica, (trainer, step) in enumerate(zip(self.trainers, self.steps, strict=True)):
            index, place = divmod(step, trainer.stream.steps_per_block)
            if self._blocks[replica][0] != index:
                self._blocks[replica] = (index, *trainer.stream.block(index))
            places.append(place)
        return [(inputs, targets) for _, inputs, targets in self._blocks], places

    def _keep(self, replica: int, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Keep one replica's records, cut after the first row that is not finite."""
        trainer, step = self.trainers[replica], self.steps[replica]
        bad = np.flatnonzero(~np.isfinite(rows[:, 0]))
        rows = rows[: bad[0] + 1] if len(bad) else rows
        trainer.errors[step : step + len(rows)] = rows[:, 0]
        trainer.num_limited += float(rows[:, 4].sum())
        self.steps[replica] += len(rows)
        steps = np.arange(step + 1, step + len(rows) + 1)
        return {"step": steps, **dict(zip(Trainer.columns, rows.T.copy(), strict=True))}


class _Optimizers:
    """Step the rows of a stacked network: neighbours that agree in step and learning rate with one optimiser.

    The rows are views of the stacked parameters, so the optimiser is the very one of a single run.
    """

    def __init__(self, trainers: Sequence[Trainer], network: nn.Sequential) -> None:
        self._trainers, self._network = trainers, network
        self._spans = list[tuple[range, torch.optim.Optimizer]]()
        kinds = [(t.step, t.optimizer.param_groups[0]["lr"], t.config.drop_at, t.config.dropped_rate) for t in trainers]
        begin = 0
        for end in range(1, len(kinds) + 1):
            if end == len(kinds) or kinds[end] != kinds[begin]:
                self._spans.append((range(begin, end), self._make(range(begin, end))))
                begin = end

    def step(self) -> None:
        """Take one step with the gradients of the stacked parameters."""
        stacked = list(self._network.parameters())
        is_captured = _is_captured(stacked[0])
        for span, optimizer in self._spans:
            for row, parameter in zip(optimizer.param_groups[0]["params"], stacked, strict=True):
                row.grad = None if parameter.grad is None else self._cut(parameter.grad, span)
            if "capturable" in optimizer.param_groups[0]:
                # A fused step is the same either way; torch asks to be told, and complains when told in vain.
                optimizer.param_groups[0]["capturable"] = is_captured
            optimizer.step()

    def tensors(self) -> list[Tensor]:
        """Return everything that the optimisers remember."""
        return [value for _, one in self._spans for state in one.state.values() for value in state.values()]

    def drop_rates(self, steps: Sequence[int]) -> bool:
        """Lower the learning rate of those whose time has come; returns whether there were any."""
        has_dropped = False
        for span, optimizer in self._spans:
            config = self._trainers[span.start].config
            if config.drop_at is not None and steps[span.start] == config.drop_at:
                optimizer.param_groups[0]["lr"] = config.dropped_rate
                has_dropped = True
        return has_dropped

    def write_back(self) -> None:
        """Copy states and learning rates into the optimisers of the trainers."""
        for span, optimizer in self._spans:
            group = optimizer.param_groups[0]
            for place, replica in enumerate(span):
                trainer = self._trainers[replica]
                trainer.optimizer.param_groups[0]["lr"] = group["lr"]
                own = list(trainer.network.parameters())
                for parameter, row in zip(own, group["params"], strict=True):
                    trainer.optimizer.state[parameter] = {
                        name: value.clone() if value.ndim == 0 else _like(parameter, rows_of(value, place, len(span)))
                        for name, value in optimizer.state[row].items()
                    }

    def _make(self, span: range) -> torch.optim.Optimizer:
        """Make the optimiser of some neighbours and take over what theirs hold."""
        rows = [nn.Parameter(self._cut(parameter.detach(), span)) for parameter in self._network.parameters()]
        first: Any = self._trainers[span.start].optimizer
        optimizer = type(first)(rows, first.param_groups[0]["lr"], fused=True)
        for place, row in enumerate(rows):
            states = [_state_of(self._trainers[replica], place) for replica in span]
            if not states[0] and isinstance(optimizer, torch.optim.Adam):
                # Adam would make these in its first step, and a graph of that step would make them again each time.
                step = torch.zeros((), dtype=torch.float32, device=row.device)
                moments = {name: torch.zeros_like(row.detach()) for name in ("exp_avg", "exp_avg_sq")}
                optimizer.state[row] = {"step": step, **moments}
            for name, value in states[0].items():
                parts = [state[name] for state in states]
                optimizer.state[row][name] = value.clone() if value.ndim == 0 else _like(row, torch.cat(parts))
        return optimizer

    def _cut(self, stacked: Tensor, span: range) -> Tensor:
        """Return the rows of some neighbours, as a view."""
        size = len(stacked) // len(self._trainers)
        return stacked[span.start * size : span.stop * size]


def _is_captured(tensor: Tensor) -> bool:
    """Whether what is done to a tensor now becomes part of a CUDA graph."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def _state_of(trainer: Trainer, place: int) -> dict[str, Tensor]:
    """Return what a run's optimiser remembers of its n-th parameter."""
    return trainer.optimizer.state.get(list(trainer.network.parameters())[place], {})


def _like(parameter: Tensor, value: Tensor) -> Tensor:
    """Return a copy in the layout of a parameter, which fused optimisers rely on."""
    return torch.empty_like(parameter, requires_grad=False).copy_(value)


def run_together(
    configs: Sequence[dict[str, Any]], recorders: Sequence[Recorder]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Train runs of one key as one program; each records as if it were alone.

    Args:
        configs: Resolved `Config`s as dictionaries, of one `pack_key`.
        recorders: One for each run.

    Yields:
        Place of a run and what `cifar10_supersampling.run` returns of it, as soon as it has ended.
    """
    if len({recorder.inputs["sha256"] for recorder in recorders}) != 1:
        raise ValueError("runs that train together must read the same images.")
    images = single.load_images(recorders[0].inputs).images
    trainers = list[Trainer]()
    for config, recorder in zip(configs, recorders, strict=True):
        trainer = Trainer(Config(**config), images)
        trainers.append(trainer)
        trainer.stream.images = trainers[0].stream.images  # one copy on the device is enough
        resumed = recorder.resume()
        if resumed is not None:
            trainer.load(resumed[1])
    # Neighbours that agree in step and learning rate share an optimiser.
    waiting = sorted(range(len(trainers)), key=lambda i: (trainers[i].step, trainers[i].config.learning_rate))
    while waiting:
        pack = Pack([trainers[i] for i in waiting])
        ended = dict[int, int | None]()
        while not ended:
            for place, rows in enumerate(pack.train_block()):
                i, step = waiting[place], pack.steps[place]
                settings = trainers[i].config
                recorders[i].log(rows)
                recorders[i].progress(step, settings.iterations)
                is_lost = single.is_diverged(rows["error"], settings.diverged_above)
                if is_lost or step == settings.iterations:
                    ended[i] = step if is_lost else None
            due = [i for i in waiting if i not in ended and recorders[i].is_checkpoint_due()]
            if due or ended:
                pack.release()
            for i in due:
                recorders[i].checkpoint(trainers[i].step, trainers[i].save)
        waiting = [i for i in waiting if i not in ended]
        for i, lost_at in ended.items():
            yield i, single.outcome_of(trainers[i], lost_at)
