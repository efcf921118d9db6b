"""Optional places for metrics besides metrics.jsonl: Weights & Biases, TensorBoard.

A sink is a convenience: one that fails is reported once and left out, training continues.
"""

import os
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from arealite.config import to_dict
from arealite.errors import ConfigError
from arealite.observe.terminal import warn


class Sink(Protocol):
    """Takes the metrics of one version at a time."""

    def log(self, version: int, values: dict[str, float]) -> None: ...

    def close(self) -> None: ...


class WandbSink:
    """A run in the project of WANDB_PROJECT, or `arealite`, named like the run's folder."""

    def __init__(self, out_dir: Path, cfg: object) -> None:
        wandb: Any = import_module("wandb")
        self._run = wandb.init(
            project=os.getenv("WANDB_PROJECT", "arealite"),
            name=out_dir.resolve().name,
            dir=str(out_dir),
            config=to_dict(cfg),
        )

    def log(self, version: int, values: dict[str, float]) -> None:
        self._run.log(values, step=version)

    def close(self) -> None:
        self._run.finish()


class TensorboardSink:
    """Event files in `out_dir/tensorboard`; steps from `first_version` on replace older ones."""

    def __init__(self, out_dir: Path, first_version: int) -> None:
        tensorboard: Any = import_module("torch.utils.tensorboard")
        self._writer = tensorboard.SummaryWriter(
            str(out_dir / "tensorboard"), purge_step=first_version
        )

    def log(self, version: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, version)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class Sinks:
    """All sinks of a run, none of which can stop it once it runs."""

    def __init__(self, names: Sequence[str], out_dir: Path, cfg: object) -> None:
        self._names = tuple(names)
        self._out_dir = out_dir
        self._cfg = cfg
        self._open: dict[str, Sink] = {}

    def check(self) -> None:
        """Raise ConfigError for a sink that does not exist or whose package is not installed."""
        for name in self._names:
            _check(name)

    def open(self, *, first_version: int) -> None:
        """Open them all; they have nothing from `first_version` on."""
        self.close()
        makers: dict[str, Callable[[], Sink]] = {
            "wandb": lambda: WandbSink(self._out_dir, self._cfg),
            "tensorboard": lambda: TensorboardSink(self._out_dir, first_version),
        }
        for name in self._names:
            # Any error: whatever is wrong with a service is no reason to lose a training run.
            try:
                self._open[name] = makers[name]()
            except Exception as error:
                self._leave_out(name, error)

    def log(self, version: int, values: dict[str, float]) -> None:
        """Send the values of one version to every sink that still works."""
        for name, sink in list(self._open.items()):
            try:
                sink.log(version, values)
            except Exception as error:
                self._leave_out(name, error)

    def close(self) -> None:
        """Finish what is open."""
        for name, sink in list(self._open.items()):
            try:
                sink.close()
            except Exception as error:
                self._leave_out(name, error)
        self._open.clear()

    def _leave_out(self, name: str, error: Exception) -> None:
        self._open.pop(name, None)
        warn(
            f"{name} failed ({type(error).__name__}: {error}) and gets no more metrics. Training "
            "continues; metrics.jsonl has everything."
        )


def _check(name: str) -> None:
    if name not in ("wandb", "tensorboard"):
        raise ConfigError(f"sinks has {name!r}; there only are 'wandb' and 'tensorboard'.")
    if find_spec(name) is None:
        raise ConfigError(
            f"sinks has {name!r}, but the package {name} is not installed. Install it with "
            f'`pip install "arealite[{name}]"`, or leave it out: metrics.jsonl has everything.'
        )
