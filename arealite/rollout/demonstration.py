"""Answers that somebody else wrote, as token ledgers: what supervised training learns from."""

from collections.abc import Sequence

from arealite.errors import TrajectoryError
from arealite.rollout.chat_template import ChatTemplate, Message, check_readable
from arealite.types import Trajectory

_THINK = "<think>"


def demonstration(
    template: ChatTemplate,
    messages: Sequence[Message],
    answer: str,
    *,
    row_index: int = -1,
) -> Trajectory:
    """The prompt as a policy would see it, and the answer as it should sample it, end included.

    The answer is encoded as it stands, in the place where a policy's response begins. A template
    does not get to see it, since some drop the thoughts of an answer; and no control token in it
    is one.

    Args:
        messages: what the answer replies to.
        answer: where the template opens the thoughts itself, a `<think>` at the start is left out.
        row_index: place of its row in the run's order.

    Raises:
        TrajectoryError: there is no answer, or the template refuses the messages.
    """
    if not answer.strip():
        raise TrajectoryError("A demonstration has no answer, so there is nothing to learn.")
    prompt = template.render(messages)
    if prompt.rstrip().endswith(_THINK):
        answer = answer.strip().removeprefix(_THINK).lstrip()
    context = template.encode(prompt)
    check_readable(template, prompt, context)
    response = [*template.encode_text(answer), template.end_token_id]
    masked = len(context)
    return Trajectory(
        token_ids=context + response,
        loss_mask=[False] * masked + [True] * len(response),
        behavior_logprobs=[0.0] * (masked + len(response)),
        versions=[-1] * masked + [0] * len(response),
        reward=1.0,
        temperature=1.0,
        finish_reason="stop",
        row_index=row_index,
    )
