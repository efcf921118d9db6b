"""One reward function for rows of several data sets, each of which names its own."""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from arealite.errors import ConfigError, RewardError

if TYPE_CHECKING:  # arealite.types imports torch, which a reward worker must not
    from arealite.types import Row

RewardFn = Callable[[str, dict[str, Any]], float | Awaitable[float]]
"""Takes the model's response and its row; a `def` or an `async def`."""


@dataclass(frozen=True)
class RewardByRow:
    """Rewards each row by the function that its `reward` names.

    Example:
        reward = RewardByRow({"math": math_reward, "zebra": zebra_reward, "code": code_reward})
        reward(r"\\boxed{2}", {"question": "1 + 1?", "answer": "2", "reward": "math"})  # 1.0

    A `RewardPool` runs the function that is named as if it had been given that one alone: a `def`
    in a worker, an `async def` on the loop, and its errors carry its name.

    Raises:
        ConfigError: there is no reward, or one that is not a function.
    """

    rewards: Mapping[str, RewardFn]

    def __post_init__(self) -> None:
        items = self.rewards.items()
        wrong = [f"{name!r}: {reward!r:.60}" for name, reward in items if not callable(reward)]
        if wrong or not self.rewards:
            raise ConfigError(
                f"RewardByRow takes functions by name, such as {{'math': math_reward}}, and not "
                f"{', '.join(wrong) or 'nothing'}."
            )

    def __call__(self, text: str, row: "Row") -> float | Awaitable[float]:
        return self.of(row)(text, row)

    def of(self, row: "Row") -> RewardFn:
        """The function that the row names; RewardError if it names none of these."""
        name = row.get("reward")
        if not isinstance(name, str) or name not in self.rewards:
            raise RewardError(
                f"The row's 'reward' is {name!r}; there are {', '.join(self.rewards)}. Put data "
                "sets together with arealite.data.mixed, which looks at the names at once."
            )
        return self.rewards[name]
