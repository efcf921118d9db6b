"""Hundreds of random kills and faults under the real recipe loop; `make soak` ends with it.

    python -m tests.soak.random_faults                  # half an hour on two cores
    python -m tests.soak.random_faults --real 3 --scripted 20 --seed 7

First the recipe with two real vLLM servers of its own, whose processes are killed or stopped, and
now and then the recipe. Then the recipe on three scripted servers behind fault proxies, where
servers die and come back in seconds, and replies break in every way that `arealite.testing` knows.
After each fault the run has to go on; in the end it has to have used every row once. Prints a
table; the last line is JSON.
"""

import argparse
import json
import random
import signal
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median

import psutil

from arealite.testing import faults
from arealite.testing.fault_proxy import FaultProxy
from arealite.testing.http_server import ScriptedServer
from tests.oracle import NO_WEIGHTS, RecipeRun, read_ledger

PROGRESS_WITHIN_S = 240.0
SETTINGS = [
    "rollout.prompts_per_step=4",
    "group_size=4",
    "eval_every_steps=100000",
    "save_every_steps=5",
]
GENERATE = "/inference/v1/generate"


@dataclass
class Figures:
    """What the last line says."""

    kills: int = 0
    real_server_kills: int = 0
    lost: int = 0
    duplicated: int = 0
    orphans: int = 0
    staleness_violations: int = 0
    hangs: int = 0
    unexpected_ends: int = 0
    recoveries_s: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    def is_clean(self) -> bool:
        problems = (self.lost, self.duplicated, self.orphans, self.staleness_violations)
        return not any((*problems, self.hangs, self.unexpected_ends))


class Campaign:
    """One run of the recipe, continued as often as it is killed."""

    def __init__(self, out_dir: Path, settings: Sequence[str], figures: Figures) -> None:
        self.out_dir = out_dir
        self.settings = [*SETTINGS, *settings]
        self.figures = figures
        self.run: RecipeRun | None = None

    def strike(
        self,
        name: str,
        blow: Callable[[RecipeRun], None],
        has_struck: Callable[[], bool] = lambda: True,
    ) -> bool:
        """One fault, and the time until the run makes steps again; False if it was not possible.

        Args:
            has_struck: whether the fault has met a request by now, where it waits for one.
        """
        run = self._running()
        try:
            blow(run)
        except LookupError:
            return False  # its victim is just being started again
        began_s = time.monotonic()
        self._wait_for_steps()
        for _ in range(50):
            if not has_struck():
                self._wait_for_steps(1)
        if not has_struck():
            return False
        self.figures.kills += 1
        self.figures.recoveries_s[name].append(time.monotonic() - began_s)
        print(f"{name}: {time.monotonic() - began_s:.1f} s", flush=True)
        return True

    def kill_recipe(self, name: str, blow: Callable[[RecipeRun], None]) -> None:
        """The same for a fault that ends the run, which then is started again."""

        def end_it(run: RecipeRun) -> None:
            blow(run)
            self._end()

        while not self.strike(name, end_it):
            time.sleep(1)

    def finish(self) -> None:
        """Stop, let the run come to its regular end, and judge what it has written."""
        self._running().agent.send_signal(signal.SIGINT)
        self._end()
        steps = _checkpointed(self.out_dir) + 3
        last = self.run = RecipeRun(self.out_dir, [*self.settings, f"steps={steps}"])
        if last.wait(600) != 0:
            self._report_end(last)
        self._end()
        ledger = read_ledger(self.out_dir)
        self.figures.lost += len(ledger.missing)
        self.figures.duplicated += len(ledger.doubled)
        self.figures.staleness_violations += ledger.num_too_old
        print(
            f"{sum(ledger.trained.values())} rows trained on in {len(ledger.steps)} steps, "
            f"{sum(ledger.lost.values())} recorded as lost, {len(ledger.in_flight)} in flight",
            flush=True,
        )

    def kill(self) -> None:
        if self.run is not None:
            self.run.kill()

    def _running(self) -> RecipeRun:
        if self.run is None:
            self.run = RecipeRun(self.out_dir, [*self.settings, "steps=100000"])
            self._wait_for_steps()
        return self.run

    def _wait_for_steps(self, count: int = 2) -> None:
        """Until the run has made some more steps; a run that has ended is started again."""
        deadline = time.monotonic() + PROGRESS_WITHIN_S
        run, base = self._running(), None
        while time.monotonic() < deadline:
            if run.agent.poll() is not None:
                self._report_end(run)
                self._end()
                run, base = self._running(), None
            run.refresh()
            done = run.steps_done()
            base = done if base is None else min(base, done)
            if done >= base + count:
                return
            time.sleep(0.3)
        self.figures.hangs += 1
        print(f"no progress:\n{run.printed()[-4000:]}", flush=True)
        self.kill()
        self._end()

    def _end(self) -> None:
        """Wait for the end of a run that was struck; what it leaves is counted."""
        assert self.run is not None
        try:
            self.run.wait(60)
        except AssertionError:
            try:
                self.run.find("-u recipes/gsm8k_grpo.py")
            except LookupError:
                # A signal in the midst of its own poll() may leave the agent without an answer.
                print("the recipe has ended, but torchrun did not notice", flush=True)
                self.run.agent.kill()
            else:
                self.figures.hangs += 1
                print(f"did not end:\n{self.run.printed()[-4000:]}", flush=True)
        try:
            self.run.assert_gone(15)
        except AssertionError as error:
            self.figures.orphans += 1
            print(error, flush=True)
        self.kill()
        self.run = None

    def _report_end(self, run: RecipeRun) -> None:
        self.figures.unexpected_ends += 1
        print(f"ended by itself:\n{run.printed()[-4000:]}", flush=True)


def _checkpointed(out_dir: Path) -> int:
    latest = out_dir / "checkpoints" / "latest"
    return int(latest.read_text().split()[0].removeprefix("version-")) if latest.exists() else 0


# --- Real servers ---------------------------------------------------------------------------------

SERVER_PARTS = ("api_server", "EngineCore", "Worker")


def strike_real_servers(folder: Path, dice: random.Random, count: int, figures: Figures) -> None:
    """Kills of real vLLM processes, every eighth time of something else of the run."""
    settings = ["server.num_cpu_servers=2", "server.max_restarts=100000"]
    campaign = Campaign(folder / "real", settings, figures)
    try:
        while figures.real_server_kills < count:
            part = dice.choice(SERVER_PARTS)
            stops = part == "EngineCore" and dice.random() < 0.4
            kind = signal.SIGSTOP if stops else signal.SIGKILL
            is_done = campaign.strike(
                f"real {kind.name} {part}",
                lambda run, part=part, kind=kind: pick(run, part, dice).send_signal(kind),
            )
            figures.real_server_kills += is_done and kind is signal.SIGKILL
            if is_done and kind is signal.SIGKILL and figures.real_server_kills % 8 == 0:
                victim = dice.choice(list(RECIPE_PARTS))
                campaign.kill_recipe(f"real {victim}", RECIPE_PARTS[victim])
            time.sleep(dice.uniform(0, 5))
        campaign.finish()
    finally:
        campaign.kill()


def pick(run: RecipeRun, part: str, dice: random.Random) -> psutil.Process:
    """One of the living processes of this name."""
    run.refresh()
    found: list[psutil.Process] = []
    for process in run.family.values():
        try:
            if part in " ".join([process.name(), *process.cmdline()]) and process.status() not in (
                psutil.STATUS_ZOMBIE,
                psutil.STATUS_STOPPED,
            ):
                found.append(process)
        except psutil.Error:
            continue
    if not found:
        raise LookupError(part)
    return dice.choice(found)


RECIPE_PARTS: dict[str, Callable[[RecipeRun], None]] = {
    "SIGKILL recipe": lambda run: run.find("-u recipes/gsm8k_grpo.py").kill(),
    "SIGKILL torchrun": lambda run: run.agent.kill(),
    "SIGINT": lambda run: run.agent.send_signal(signal.SIGINT),
    "SIGTERM": lambda run: run.agent.terminate(),
}


# --- Scripted servers -----------------------------------------------------------------------------


def strike_scripted_servers(
    folder: Path, dice: random.Random, count: int, figures: Figures
) -> None:
    """Faults of servers, network, rewards and the recipe, seconds apart."""
    wanted = figures.kills + count
    with ExitStack() as stack:
        servers = [
            stack.enter_context(
                ScriptedServer(seed=7, vocab_size=55, max_model_len=256, tokens_per_s=400)
            )
            for _ in range(3)
        ]
        proxies = [stack.enter_context(FaultProxy(server.address)) for server in servers]
        addresses = ",".join(proxy.address for proxy in proxies)
        settings = [f"server.addresses=[{addresses}]", "server.patience_s=5", *NO_WEIGHTS]
        campaign = Campaign(folder / "scripted", settings, figures)
        stack.callback(campaign.kill)
        while figures.kills < wanted:
            server, proxy = dice.choice(list(zip(servers, proxies, strict=True)))
            name, blow = dice.choice(scripted_blows(server, proxy, dice))
            if name in RECIPE_PARTS:
                campaign.kill_recipe(f"scripted {name}", blow)
                continue
            proxy.exchanges.clear()
            campaign.strike(f"scripted {name}", blow, partial(has_met_a_request, proxy, name))
            proxy.clear()
        campaign.finish()


def has_met_a_request(proxy: FaultProxy, name: str) -> bool:
    """Whether a fault of the network has been applied; the others strike by themselves."""
    if name in PROCESS_FAULTS:
        return True
    return any(exchange.fault is not None for exchange in list(proxy.exchanges))


PROCESS_FAULTS = ("server dies", "server hangs", "reward worker")
Blow = tuple[str, Callable[[RecipeRun], None]]


def scripted_blows(server: ScriptedServer, proxy: FaultProxy, dice: random.Random) -> list[Blow]:
    """Everything that may happen next, the cheap things more often."""
    edit = dice.choice(list(faults.BAD_GENERATE_REPLIES))
    requests = range(dice.randrange(1, 6))

    def broken(fault: object, path: str | None = GENERATE) -> Callable[[RecipeRun], None]:
        return lambda _: proxy.inject(fault, on=requests, path=path)  # type: ignore[arg-type]

    def die(_: RecipeRun) -> None:
        server.die()
        time.sleep(dice.uniform(0.1, 2))
        server.restart()

    def hang(_: RecipeRun) -> None:
        server.hang()
        time.sleep(dice.choice([1, 3, 3, 16]))
        server.unhang()

    def lose_reward_worker(run: RecipeRun) -> None:
        pick(run, "rewards/worker.py", dice).kill()

    network: list[Blow] = [
        ("500", broken(faults.Status(500))),
        ("500 everywhere", broken(faults.Status(500), path=None)),
        ("429", broken(faults.Status(429, retry_after_s=1))),
        ("503", broken(faults.Status(503))),
        ("reset", broken(faults.Reset(), path=None)),
        ("cut body", broken(faults.CutBody(dice.randrange(200)))),
        ("slow", broken(faults.Delay(2))),
        ("black hole", broken(faults.Blackhole())),
        ("duplicate", broken(faults.Duplicate())),
        ("refused update", broken(faults.Status(500), path="/update_weights")),
        ("refused finish", broken(faults.Status(500), path="/finish_weight_update")),
        ("refused pause", broken(faults.Status(500), path="/pause")),
        (
            f"reply: {edit}",
            lambda _: proxy.inject(faults.BAD_GENERATE_REPLIES[edit], on=[0], path=GENERATE),
        ),
    ]
    processes = list(zip(PROCESS_FAULTS, (die, hang, lose_reward_worker), strict=True))
    return [*network * 2, *processes * 4, dice.choice(list(RECIPE_PARTS.items()))]


# --- The report -----------------------------------------------------------------------------------


def print_table(figures: Figures) -> None:
    print(f"\n{'fault':44}{'times':>6}{'median s':>10}{'worst s':>9}   until two more steps")
    for name, seconds in sorted(figures.recoveries_s.items()):
        print(f"{name:44}{len(seconds):6}{median(seconds):10.1f}{max(seconds):9.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--real", type=int, default=22, help="kills of real vLLM processes")
    parser.add_argument("--scripted", type=int, default=185, help="faults of scripted servers")
    parser.add_argument("--seed", type=int, default=None, help="of what happens when")
    arguments = parser.parse_args()
    seed = arguments.seed if arguments.seed is not None else random.randrange(10**6)
    print(f"seed {seed}", flush=True)
    dice, figures, began_s = random.Random(seed), Figures(), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        strike_real_servers(Path(folder), dice, arguments.real, figures)
        strike_scripted_servers(Path(folder), dice, arguments.scripted, figures)
    print_table(figures)
    names = ("kills", "real_server_kills", "lost", "duplicated", "orphans")
    names += ("staleness_violations", "hangs", "unexpected_ends")
    print(
        json.dumps(
            {name: getattr(figures, name) for name in names}
            | {"seed": seed, "minutes": round((time.monotonic() - began_s) / 60, 1)}
        )
    )
    sys.exit(0 if figures.is_clean() else 1)


if __name__ == "__main__":
    main()
