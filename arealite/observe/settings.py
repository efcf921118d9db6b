"""The resolved configuration of a run, beside its metrics, and what changed since the last time."""

import os
from pathlib import Path
from typing import Any

import yaml

from arealite.config import save_config
from arealite.errors import ConfigError
from arealite.observe.terminal import show, warn

FIXED_SETTINGS = (
    *("model", "dataset", "seed"),
    *("train.lora_rank", "train.lora_alpha", "train.lora_layers"),
)
"""A checkpoint's weights and its place in the rows mean nothing under another one of these."""


def save_settings(cfg: object, out_dir: Path) -> None:
    """Write config.yaml; print each setting that differs from the one of a previous run.

    Raises:
        ConfigError: one of `FIXED_SETTINGS` differs and the folder holds a checkpoint. The
            config.yaml of that checkpoint stays.
    """
    path = out_dir / "config.yaml"
    partial = out_dir / ".config.yaml.partial"
    save_config(cfg, partial)
    changes = _changes(path, partial) if path.is_file() else {}
    fixed = [change for name, change in changes.items() if _is_fixed(name)]
    if fixed and (out_dir / "checkpoints" / "latest").exists():
        partial.unlink()
        raise ConfigError(
            f"{out_dir} holds a checkpoint that was made with other settings: {'; '.join(fixed)}. "
            "Set them back to continue from it, or set out_dir to a new folder."
        )
    if changes:
        show(f"Settings that differ from the previous run in {out_dir}:")
        for change in changes.values():
            show(f"  {change}")
    os.replace(partial, path)


def _is_fixed(name: str) -> bool:
    return any(name == fixed or name.startswith(f"{fixed}.") for fixed in FIXED_SETTINGS)


def _changes(before: Path, after: Path) -> dict[str, str]:
    """Per setting that differs, a line such as `train.lr: 0.0001 -> 0.0003`."""
    try:
        was, now = _flat(before), _flat(after)
    except (OSError, ValueError, yaml.YAMLError) as error:
        warn(f"{before} cannot be compared with the settings of this run ({error}).")
        return {}
    return {
        name: f"{name}: {was.get(name, 'absent')} -> {now.get(name, 'absent')}"
        for name in sorted(was.keys() | now.keys())
        if was.get(name, "absent") != now.get(name, "absent")
    }


def _flat(path: Path) -> dict[str, Any]:
    """The settings of a file by their dotted names."""

    def walk(prefix: str, value: object) -> dict[str, Any]:
        if not isinstance(value, dict):
            return {prefix.removesuffix("."): value}
        return {
            name: leaf
            for key, child in value.items()
            for name, leaf in walk(f"{prefix}{key}.", child).items()
        }

    return walk("", yaml.safe_load(path.read_text(encoding="utf-8")))
