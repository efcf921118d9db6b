"""Whole algorithms: what each is made of, and the lines that make `gsm8k_grpo.py` one of it.

The lines of a loss stand in `grpo_loss`, in place of its first two statements; they end with a
surrogate [T], which the recipe weighs and sums. Additions are lines for any of them.
"""

from dataclasses import dataclass

CLIP = """surrogate, clipped = clipped_surrogate(
    logprobs, mb.proximal_logprobs, mb.advantages, mb.loss_mask, {low}, {high}
)"""
FROM = "mb.proximal_logprobs, mb.behavior_logprobs, mb.loss_mask"
BY_STD = "group_advantages(groups, divide_by_std=True)"


@dataclass(frozen=True, kw_only=True)
class Whole:
    """An algorithm."""

    name: str
    advantage: str
    ratio: str
    aggregation: str  # of `pack`
    kl: str = "none"
    recipe: str = ""  # file in recipes/, where there is one
    advantages: str = ""  # in place of `group_advantages(groups)` in `main`
    step: str = ""  # in `main`, before `train_engine.step(mbs, loss_fn)`, for each minibatch
    loss: str = ""  # in place of the surrogate and the weight in `grpo_loss`
    trace: str  # of tests/algo/test_traces.py


def clip(low: float, high: float) -> str:
    return CLIP.format(low=low, high=high)


def weighted(call: str) -> str:
    return f"{clip(0.2, 0.28)}\nweight, dropped = {call}\nsurrogate = surrogate * weight"


def without(call: str) -> str:
    return f"{clip(0.2, 0.28)}\ndropped = {call}\nsurrogate = surrogate.masked_fill(dropped, 0.0)"


MEAN_STD = "group mean and std"
ALGORITHMS = [
    Whole(
        name="PPO",
        advantage="GAE of a critic, normalized over all tokens",
        ratio="token, .2; value .5",
        aggregation="token",
        kl="k1 in the reward, `kl_penalized`",
        recipe="gsm8k_ppo.py",
        trace="ppo",
    ),
    Whole(
        name="AReaL v0.1, v0.2",
        advantage="reward 5 or -5, normalized over all tokens",
        ratio="decoupled: token, .2; weight up to 5",
        aggregation="token",
        recipe="math_ppo.py",
        trace="areal",
    ),
    Whole(
        name="decoupled PPO",
        advantage="group mean",
        ratio="token, .2 / .28; weight up to 5",
        aggregation="token",
        recipe="gsm8k_grpo.py",
        trace="decoupled",
    ),
    Whole(
        name="GRPO",
        advantage=MEAN_STD,
        ratio="token, .2",
        aggregation="sequence",
        kl="k3 in the loss",
        advantages=BY_STD,
        loss=clip(0.2, 0.2)
        + """
kl = kl_estimate(logprobs, mb.ref_logprobs, mb.loss_mask, "k3")
surrogate = surrogate - 0.04 * kl""",
        trace="grpo",
    ),
    Whole(
        name="Dr. GRPO",
        advantage="group mean",
        ratio="token, .2",
        aggregation="constant",
        advantages="group_advantages(groups)",
        loss=clip(0.2, 0.2),
        trace="dr_grpo",
    ),
    Whole(
        name="DAPO",
        advantage=MEAN_STD + "; equal groups are resampled; soft overlong penalty",
        ratio="token, .2 / .28; the recipe also weighs by age, up to 5",
        aggregation="token",
        recipe="gsm8k_dapo.py",
        trace="dapo",
    ),
    Whole(
        name="LitePPO",
        advantage="group mean, batch std",
        ratio="token, .2",
        aggregation="token",
        advantages="""batch_normalized(
    group_advantages(groups), groups, over="trajectories", sum_over_ranks=dist.sum
)""",
        loss=clip(0.2, 0.2),
        trace="lite_ppo",
    ),
    Whole(
        name="RLOO",
        advantage="less the mean of the others",
        ratio="token, .2; answers weigh by the sum over their tokens",
        aggregation="constant",
        kl="k1 in the reward where there is a reference: its sum over an answer, times a weight",
        advantages="leave_one_out_advantages(groups)",
        loss=clip(0.2, 0.2),
        trace="rloo",
    ),
    Whole(
        name="REINFORCE++",
        advantage="return, normalized over all tokens",
        ratio="token, .2",
        aggregation="token",
        kl="k1 in the reward where there is a reference: `kl_penalized`, then `gae`, values of 0",
        advantages="""batch_normalized(
    reward_advantages(groups), groups, over="tokens", sum_over_ranks=dist.sum
)""",
        loss=clip(0.2, 0.2),
        trace="reinforce_plus",
    ),
    Whole(
        name="REINFORCE++-baseline",
        advantage="group mean, then normalized over all tokens",
        ratio="token, .2",
        aggregation="token",
        kl="k2 in the loss",
        advantages="""batch_normalized(
    group_advantages(groups), groups, over="tokens", sum_over_ranks=dist.sum
)""",
        loss=clip(0.2, 0.2)
        + """
kl = kl_estimate(logprobs, mb.ref_logprobs, mb.loss_mask, "k2")
surrogate = surrogate - 0.01 * kl""",
        trace="reinforce_plus_baseline",
    ),
    Whole(
        name="GSPO",
        advantage=MEAN_STD,
        ratio="sequence, 3e-4 / 4e-4",
        aggregation="sequence",
        recipe="gsm8k_gspo.py",
        trace="gspo",
    ),
    Whole(
        name="CISPO",
        advantage=MEAN_STD,
        ratio="weight, clipped above at .28",
        aggregation="token",
        advantages=BY_STD,
        loss="""surrogate, clipped = cispo_surrogate(
    logprobs, mb.proximal_logprobs, mb.advantages, mb.loss_mask, 1.0, 0.28
)""",
        trace="cispo",
    ),
    Whole(
        name="SAPO",
        advantage=MEAN_STD,
        ratio="a gate, tau 1 and 1.05",
        aggregation="token",
        advantages=BY_STD,
        loss="surrogate = sapo_surrogate(\n"
        "    logprobs, mb.proximal_logprobs, mb.advantages, mb.loss_mask\n)",
        trace="sapo",
    ),
    Whole(
        name="DPPO-TV",
        advantage=MEAN_STD,
        ratio="dropped beyond a total variation of .2",
        aggregation="token",
        kl="a small k2 in the loss",
        advantages=BY_STD,
        loss="""surrogate, dropped = tv_surrogate(
    logprobs, mb.proximal_logprobs, mb.advantages, mb.loss_mask
)
kl = kl_estimate(logprobs, mb.ref_logprobs, mb.loss_mask, "k2")
surrogate = surrogate - 0.001 * kl""",
        trace="dppo",
    ),
    Whole(
        name="dual clip",
        advantage=MEAN_STD,
        ratio="token, .2, and 3 where A < 0",
        aggregation="token",
        advantages=BY_STD,
        loss=clip(0.2, 0.2) + "\nsurrogate, cut = dual_clipped(surrogate, mb.advantages, cap=3.0)",
        trace="dual_clip",
    ),
    Whole(
        name="TIS",
        advantage=MEAN_STD,
        ratio="token, .2 / .28; weight at most 2",
        aggregation="token",
        advantages=BY_STD,
        loss=weighted(f"truncated_weight({FROM}, cap=2.0)"),
        trace="tis",
    ),
    Whole(
        name="IcePop",
        advantage=MEAN_STD,
        ratio="token, .2 / .28; weight from .5 to 5, else 0",
        aggregation="token",
        advantages=BY_STD,
        loss=weighted(f"banded_weight(\n    {FROM}, low=0.5, high=5.0\n)"),
        trace="icepop",
    ),
    Whole(
        name="MIS",
        advantage=MEAN_STD,
        ratio="token, .2 / .28; without sequences of a ratio above 2",
        aggregation="token",
        advantages=BY_STD,
        loss=without(
            f"sequence_dropped(\n    {FROM},\n"
            "    mb.cu_seqlens, low=0.0, high=2.0, is_geometric=False\n)"
        ),
        trace="mis",
    ),
    Whole(
        name="geometric mask",
        advantage=MEAN_STD,
        ratio="token, .2 / .28; without sequences of a mean ratio outside of .99 to 1.01",
        aggregation="token",
        advantages=BY_STD,
        loss=without(
            f"sequence_dropped(\n    {FROM},\n"
            "    mb.cu_seqlens, low=0.99, high=1.01, is_geometric=True\n)"
        ),
        trace="geometric",
    ),
    Whole(
        name="K3 rejection",
        advantage=MEAN_STD,
        ratio="token, .2 / .28; without sequences of a mean k3 above .01",
        aggregation="token",
        advantages=BY_STD,
        loss=without(f"k3_dropped(\n    {FROM}, mb.cu_seqlens\n)"),
        trace="k3",
    ),
    Whole(
        name="A-3PO",
        advantage=MEAN_STD,
        ratio="decoupled, .2 / .28, proximal by age; no `train_engine.logprobs`",
        aggregation="token",
        advantages=BY_STD,
        loss="""proximal = interpolated_proximal(
    logprobs, mb.behavior_logprobs, mb.versions, mb.loss_mask, version
)
surrogate, clipped = clipped_surrogate(
    logprobs, proximal, mb.advantages, mb.loss_mask, 0.2, 0.28
)
weight, dropped = importance_weight(proximal, mb.behavior_logprobs, mb.loss_mask, cap=5.0)
surrogate = surrogate * weight""",
        trace="a3po",
    ),
    Whole(
        name="M2PO",
        advantage=MEAN_STD,
        ratio="current / behavior, without the largest gaps of a whole minibatch",
        aggregation="token",
        advantages=BY_STD,
        step="""fields = [(mb.proximal_logprobs, mb.behavior_logprobs, mb.loss_mask) for mb in mbs]
dropped = second_moment_dropped(
    *map(list, zip(*fields, strict=True)), gather_over_ranks=dist.gather
)
pairs = zip(mbs, dropped, strict=True)
mbs = attach(mbs, advantages=[mb.advantages.masked_fill(drop, 0.0) for mb, drop in pairs])""",
        loss="""surrogate, _ = clipped_surrogate(
    logprobs, mb.proximal_logprobs, mb.advantages, mb.loss_mask, 1.0, math.inf
)
weight, _ = importance_weight(
    mb.proximal_logprobs, mb.behavior_logprobs, mb.loss_mask, cap=math.inf
)
surrogate = surrogate * weight""",
        trace="m2po",
    ),
    Whole(
        name="DPO",
        advantage="none: pairs of a chosen and a rejected answer",
        ratio="margin of the policy less that of the reference, beta .1",
        aggregation="sequence",
        kl="within",
        recipe="dpo.py",
        trace="dpo",
    ),
]


@dataclass(frozen=True, kw_only=True)
class Addition:
    """Lines that go with any of the algorithms."""

    name: str
    where: str
    lines: str


ADDITIONS = [
    Addition(
        name="soft overlong penalty",
        where="in `main`, after `rollouts.next_batch()`",
        lines="groups = overlong_penalty(\n"
        "    groups, max_tokens=cfg.sampling.max_new_tokens, tolerance=16\n)",
    ),
    Addition(
        name="adaptive length reward",
        where="in `main`, after `rollouts.next_batch()`",
        lines="groups = length_reward(groups, weight=0.1)",
    ),
    Addition(
        name="rewards of 5 and -5",
        where="in `main`, after `rollouts.next_batch()`",
        lines="groups = scaled_rewards(groups, right=5.0, wrong=-5.0)",
    ),
    Addition(
        name="KL in the loss",
        where="in `grpo_loss`, after the surrogate",
        lines="""kl = kl_estimate(logprobs, mb.ref_logprobs, mb.loss_mask, "k3")
surrogate = surrogate - 0.001 * kl""",
    ),
    Addition(
        name="entropy bonus",
        where='in `grpo_loss`, which `train_engine.step(mbs, loss_fn, head="logits")` gives '
        "`logits` instead of `logprobs`: before the surrogate, and after it",
        lines="""logprobs = logits.log_softmax(-1).gather(-1, mb.token_ids[:, None])[:, 0]
...
surrogate = surrogate + 0.001 * entropy(logits, mb.loss_mask)""",
    ),
    Addition(
        name="reward model",
        where="in `pair_loss` of [`dpo.py`](../recipes/dpo.py), which "
        '`engine.step(minibatch, loss_fn, head="values")` of an engine with `is_critic=True` gives '
        "`values` instead of `logprobs`; its evaluation, of log-probs, is off with "
        "`max_eval_rows=0`. A value is from before its token: the last one knows the answer up to "
        "its end",
        lines="""scores = values[mb.cu_seqlens[1:].long() - 1]
losses = preference_loss(scores[0::2], scores[1::2])""",
    ),
]
