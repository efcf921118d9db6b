"""Every error that arealite raises on purpose.

Each child also is the built-in error that fits, so that ordinary handlers work. The message says
what happened, with the values, and then what to do.
"""


class ArealiteError(Exception):
    """Parent of all errors below; recipes print it as one message, without a traceback."""


class ConfigError(ArealiteError, ValueError):
    """A setting, or two settings together, cannot work."""


class DataError(ArealiteError, ValueError):
    """A data set, a row, a model folder or a tokenizer is not what it has to be."""


class RewardError(ArealiteError, RuntimeError):
    """A reward function raised, took too long, died, or returned something else than a number."""


class TrajectoryError(ArealiteError, ValueError):
    """A workflow or a server returned tokens, masks and log-probs that do not fit together."""


class PromptTooLongError(TrajectoryError):
    """A prompt leaves no room for a single new token within the model's context."""


class RolloutError(ArealiteError, RuntimeError):
    """Too many episodes failed, or the rollout thread itself did."""


class ServerError(ArealiteError, RuntimeError):
    """A server could not be started, died, or answered something that is not usable."""


class NoServerError(ServerError):
    """No server is left to ask, and none is expected back: the run cannot go on."""


class DeadlineError(ArealiteError, TimeoutError):
    """A wait took longer than its limit; the message says who waited for what."""


class RankError(ArealiteError, RuntimeError):
    """The processes of a run cannot find each other."""


class OutOfMemoryError(ArealiteError, MemoryError):
    """The trainer's GPU has no room; the message says who has it, and which settings free some."""


class GateError(ArealiteError, RuntimeError):
    """Server and trainer disagree about log-probs; the message names the cause if it is known."""


class LossError(ArealiteError, ValueError):
    """A loss function returns what it may not, or another gradient for another cut of a batch."""


class CheckpointError(ArealiteError, RuntimeError):
    """A checkpoint could not be written, or is not complete and intact."""


def first_cause(error: BaseException) -> BaseException:
    """The first error inside nested groups of errors."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
