"""Kill a training process at random moments, resume it, and compare it with one that was left alone."""

from __future__ import annotations

import argparse
import random
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from faults.compare import compare_after_kill, compare_ends
from faults.program import RECIPES


PROGRAM = Path(__file__).with_name("program.py")
WAYS = ("any time", "in a save", "at a file")


@dataclass
class Chain:
    """One run from its first start to its end, with the kills in between."""

    recipe: str
    seed: int
    lines: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    kills: int = 0


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def launch(recipe: str, place: Path) -> subprocess.Popen[str]:
    place.mkdir(parents=True, exist_ok=True)
    with (place / "output").open("a") as output:
        process = subprocess.Popen(
            [sys.executable, str(PROGRAM), recipe],
            cwd=place,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=output,
            text=True,
        )
    assert process.stdout is not None
    if process.stdout.readline() != "ready\n":
        raise RuntimeError(f"The training program does not start: see {place / 'output'}.")
    return process


def go(process: subprocess.Popen[str], word: str = "go", k: int = 0) -> None:
    assert process.stdin is not None
    process.stdin.write(f"{word} {k}\n")
    process.stdin.flush()


def run_reference(recipe: str, place: Path) -> float:
    """Seconds of the uninterrupted run."""
    process = launch(recipe, place)
    began = time.monotonic()
    go(process, "keep")
    if process.wait() != 0:
        raise RuntimeError(f"The uninterrupted run fails: see {place / 'output'}.")
    return time.monotonic() - began


def kill_once(
    process: subprocess.Popen[str], way: str, place: Path, reference: Path, seconds: float, rng: random.Random
) -> str:
    """Start the waiting `process` and kill it in one of the three ways; says when, if it had not come to its end."""
    began, since = time.monotonic(), time.time()
    if way == "at a file":
        k = rng.randint(1, int((reference / "accesses").read_text()))
        go(process, k=k)
        process.wait()
        moment = f"access {k}"
    else:
        go(process)
        if way == "any time":
            delay = rng.uniform(0.0, 0.8 * seconds)  # the reference also copies its checkpoints
            wait_until(process, lambda: time.monotonic() - began > delay)
        else:
            wait_until(process, lambda: is_saving(place / "run" / "_saving", since))
            time.sleep(rng.uniform(0.0, 0.05))
        process.send_signal(signal.SIGKILL)
        process.wait()
        moment = f"{time.monotonic() - began:.2f} s"
    if process.returncode not in (0, -signal.SIGKILL):
        raise RuntimeError(f"The training program failed by itself: see {place / 'output'}.")
    return moment if process.returncode else ""


def wait_until(process: subprocess.Popen[str], condition: object) -> None:
    while process.poll() is None and not condition():  # type: ignore[operator]
        time.sleep(0.0005)


def is_saving(staging: Path, since: float) -> bool:
    """Whether a save is under way that began after `since`, and is not what an earlier kill left."""
    try:
        return staging.stat().st_mtime > since
    except FileNotFoundError:
        return False


def state_of(place: Path) -> str:
    """Checkpoints of a killed run, and whether it died while saving."""
    run = place / "run"
    names = sorted((path.name.split("-")[1] for path in run.glob("checkpoint-*")), key=int)
    staged = sorted(path.name for path in (run / "_saving").iterdir()) if (run / "_saving").exists() else []
    model = "model" if (run / "adapter_config.json").exists() else ""
    return f"{','.join(names) or '-':<12} {'+'.join(staged) or '-':<40} {model}"


def run_chain(chain: Chain, folder: Path, seconds: float, max_kills: int) -> Chain:
    rng = random.Random(chain.seed)
    place, reference = folder / f"{chain.recipe}-{chain.seed}", folder / chain.recipe
    while True:
        process = launch(chain.recipe, place)
        if chain.kills == max_kills:
            go(process)
            if process.wait() != 0:
                raise RuntimeError(f"The resumed run fails: see {place / 'output'}.")
            break
        way = rng.choice(WAYS)
        moment = kill_once(process, way, place, reference, seconds, rng)
        if not moment:
            break
        chain.kills += 1
        found = compare_after_kill(place, reference)
        chain.lines.append(f"{chain.recipe:<18} {chain.seed:>4} {way:<10} {moment:<12} {state_of(place)}")
        chain.faults += [f"{chain.recipe} {chain.seed}, kill {chain.kills}: {fault}" for fault in found]
    chain.faults += [f"{chain.recipe} {chain.seed}, at the end: {fault}" for fault in compare_ends(place, reference)]
    return chain


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python tests/faults", description=__doc__)
    parser.add_argument("--kills", type=int, default=24, help="how often to kill, at least (default: 24)")
    parser.add_argument(
        "--kills-per-run", type=int, default=4, help="how often one run is killed at most (default: 4)"
    )
    parser.add_argument("--workers", type=int, default=2, help="runs at a time (default: 2)")
    parser.add_argument("--seed", type=int, default=None, help="of the random moments (default: another every time)")
    parser.add_argument("--recipes", nargs="*", choices=list(RECIPES), default=list(RECIPES), help="default: all")
    options = parser.parse_args(arguments)
    seed = random.randrange(10**6) if options.seed is None else options.seed
    with tempfile.TemporaryDirectory(prefix="peft-svf-faults-") as name, ThreadPoolExecutor(options.workers) as pool:
        folder = Path(name)
        seconds = dict(
            zip(
                options.recipes,
                pool.map(lambda recipe: run_reference(recipe, folder / recipe), options.recipes),
                strict=True,
            )
        )
        say(f"seed {seed}; uninterrupted: " + ", ".join(f"{key} {value:.1f} s" for key, value in seconds.items()))
        say(f"{'recipe':<18} {'run':>4} {'killed':<10} {'after':<12} {'checkpoints':<12} {'unfinished':<40} saved")
        faults: list[str] = []
        kills = runs = 0
        while kills < options.kills:
            chains = [
                Chain(options.recipes[(runs + i) % len(options.recipes)], seed + runs + i)
                for i in range(options.workers)
            ]
            runs += len(chains)
            for chain in pool.map(
                lambda chain: run_chain(chain, folder, seconds[chain.recipe], options.kills_per_run), chains
            ):
                for line in chain.lines:
                    say(line)
                kills += chain.kills
                faults += chain.faults
        say(f"{kills} kills in {runs} runs, {len(faults)} differences to the uninterrupted runs")
        for fault in faults:
            say(fault)
    return bool(faults)
