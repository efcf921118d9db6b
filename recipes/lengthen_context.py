"""Longer and longer answers: one run in stages, each with a larger budget than the one before.

    torchrun recipes/lengthen_context.py                         # two CPU cores, in minutes
    torchrun recipes/lengthen_context.py stages=[[300,8192],[600,16384]]

Long answers cost the most, and a policy that has not learned to use them wastes them. So
math_ppo.py runs for some steps with a small budget, and goes on from its last checkpoint with a
larger one: 8k, 16k and 24k tokens in AReaL v0.1. A run that is stopped continues in its stage.
Expected curve: recipes/README.md#lengthen-context.

Source: https://github.com/inclusionAI/AReaL, blog of v0.1.
"""

from dataclasses import dataclass, replace
from itertools import pairwise

from arealite import dist
from arealite.checkpoint import latest_version
from arealite.config import parse
from arealite.errors import ConfigError
from recipes import math_ppo


@dataclass(frozen=True, kw_only=True)
class Config(math_ppo.Config):
    """Every knob of this experiment: those of math_ppo.py, and the stages."""

    stages: tuple[tuple[int, int], ...] = ((10, 36), (20, 48))
    """Pairs of a training step and the budget of a response in tokens until then; afterwards, until
    `steps`, it is sampling.max_new_tokens."""
    out_dir: str = "runs/lengthen_context"
    """Metrics, rollouts and checkpoints; a run that finds a checkpoint here continues from it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        last = (self.steps, self.sampling.max_new_tokens)
        pairs = pairwise([(0, 0), *self.stages, last])
        if any(step >= later or tokens >= more for (step, tokens), (later, more) in pairs):
            raise ConfigError(
                f"stages={list(map(list, self.stages))} must rise from stage to stage, in steps "
                f"up to steps={last[0]} and in tokens up to sampling.max_new_tokens={last[1]}."
            )


def stage(cfg: Config, steps: int, max_new_tokens: int) -> Config:
    """The settings with which the run goes on until this step."""
    sampling = replace(cfg.sampling, max_new_tokens=max_new_tokens)
    return replace(cfg, stages=(), steps=steps, sampling=sampling)


def main(cfg: Config) -> None:
    dist.init(seed=cfg.seed)
    num_done = latest_version(cfg.out_dir)
    for steps, max_new_tokens in (*cfg.stages, (cfg.steps, cfg.sampling.max_new_tokens)):
        if steps > num_done:
            math_ppo.main(stage(cfg, steps, max_new_tokens))  # from the last checkpoint


if __name__ == "__main__":
    main(parse(Config))
