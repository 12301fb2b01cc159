"""No program of `tests/hostile` is rewarded, gets out, stays, or disturbs the programs beside and after it."""

from __future__ import annotations

import ast
import ctypes
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from peft_svf.trainers.sandbox import IsolationError, TestResult, run, run_tests


sys.path.insert(0, str(Path(__file__).parent))
from hostile_outside import CORPUS, Outside


pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks for what programs have done in /proc")

TIMEOUT = 1.0  # enough for an honest program on a busy machine


@dataclass(frozen=True)
class Style:
    """How a benchmark writes its tests, a program that is right by them, and one that is wrong."""

    tests: tuple[str, ...]
    right: str = "def solution(n):\n    return n * n + 1"
    wrong: str = "def solution(n):\n    return n * n"
    preamble: str = ""


STYLES = {
    "literal": Style(("assert solution(3) == 10", "assert solution(7) == 50")),
    "check": Style(
        ("def check(candidate):\n    assert candidate(3) == 10\n    assert candidate(7) == 50", "check(solution)")
    ),
    "tolerance": Style(("assert abs(solution(3) - 10) < 1e-6", "assert abs(solution(7) - 50) < 1e-6")),
    "isclose": Style(
        ("assert math.isclose(solution(3), 10)", "assert math.isclose(solution(7), 50)"), preamble="import math"
    ),
    "between": Style(("assert 9 < solution(3) < 11", "assert not solution(7) != 50")),
    "collection": Style(
        ("assert sorted(set(solution(3))) == [1, 2, 3]", "assert len(solution(5)) == 5 and max(solution(4)) == 4"),
        right="def solution(n):\n    return list(range(1, n + 1))",
        wrong="def solution(n):\n    return list(range(n))",
    ),
    "loop": Style(
        ("assert all(map(lambda n: solution(n) == n * n + 1, range(3, 8)))", "assert [solution(0)] == [1]"),
    ),
    "reference": Style(
        (
            "numbers = [3, 1, 2]\nassert solution(numbers) == sorted(numbers)",
            "for numbers in [[2, 1], [5, 9, 7]]:\n    assertion(solution(numbers), sorted(numbers))",
        ),
        right="def solution(numbers):\n    return sorted(numbers)",
        wrong="def solution(numbers):\n    return numbers",
        preamble="def assertion(given, expected):\n    assert given == expected, 'not as expected'",
    ),
}


def programs_for(style: str) -> list[str]:
    """Programs that want no reward do the same whatever the tests: they are run in one style, the others in all."""
    return [name for name, text in CORPUS.items() if style == "check" or "reward" in wants(text)]


def quick_programs_for(style: str) -> list[str]:
    """All in the style that has all; of the others, each program in two, which change from program to program."""
    if style == "check":
        return programs_for(style)
    others = [name for name in STYLES if name != "check"]
    turn = others.index(style)
    return [name for i, name in enumerate(programs_for(style)) if turn in (i % len(others), (i + 3) % len(others))]


def wants(text: str) -> str:
    return text.split("\n")[1].partition(": ")[2]


@pytest.fixture(scope="module")
def ordinary_verdicts() -> list[TestResult]:
    """Verdicts on ordinary programs before any hostile one ran; what is opened once and kept is open afterwards."""
    try:
        return ordinary_evaluations()
    except IsolationError as error:
        pytest.skip(f"no hostile program is run: {error}")


@pytest.fixture(scope="module")
def outside(ordinary_verdicts: list[TestResult], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Outside]:
    """The canaries; meanwhile this process adopts whatever the sandbox orphans, and has a temporary folder apart."""
    libc, become_reaper = ctypes.CDLL(None), 36
    tmp_path_factory.getbasetemp()  # of pytest, so not in the folder that must stay empty
    with pytest.MonkeyPatch.context() as patch:
        libc.prctl(become_reaper, 1, 0, 0, 0)
        world = Outside()
        patch.setattr(tempfile, "tempdir", str(world.temporary))
        for name in ("PEFT_SVF_CANARY", "HF_TOKEN"):
            patch.setenv(name, world.secret)
        world.state = world._state()
        try:
            yield world
        finally:
            world.close()
            libc.prctl(become_reaper, 0, 0, 0, 0)


@dataclass(frozen=True)
class Attack:
    """All programs of the corpus tried in one style, in one call, with honest ones among them."""

    hostile: dict[str, TestResult]
    honest: list[TestResult]
    wrong: list[TestResult]
    damage: list[str]
    seconds: float


def attack(outside: Outside, name: str, names: list[str]) -> Attack:
    """Try these programs in a style, with a right and a wrong one after every eighth."""
    style = STYLES[name]
    programs: list[str] = []
    for position, program in enumerate(names):
        programs.append(outside.aim(program))
        if position % 8 == 4:
            programs += [style.right, style.wrong]
    start = time.monotonic()
    preambles = [style.preamble] * len(programs)
    results = run_tests(programs, [style.tests] * len(programs), preambles=preambles, timeout=TIMEOUT)
    seconds = time.monotonic() - start
    pairs = list(zip(programs, results, strict=True))
    hostile = [result for program, result in pairs if program not in (style.right, style.wrong)]
    return Attack(
        dict(zip(names, hostile, strict=True)),
        [result for program, result in pairs if program == style.right],
        [result for program, result in pairs if program == style.wrong],
        outside.damage(),
        seconds,
    )


def blame(outside: Outside, results: dict[str, TestResult]) -> dict[str, str]:
    """The programs that were rewarded, or got at something outside, by name."""
    return {
        name: result.reason
        for name, result in results.items()
        if result.passed or "ESCAPED" in result.reason or outside.secret in result.reason
    }


PROBE = """
import os
found = []
for reach in (os.fork, lambda: os.kill(int("{pid}"), 0), lambda: open("{file}", "a").close()):
    try:
        if reach() == 0:
            os._exit(0)
        found.append("reached")
    except BaseException:
        pass
def solution(n):
    return found
"""


@pytest.fixture(scope="module")
def attacks(outside: Outside, request: pytest.FixtureRequest) -> dict[str, Attack]:
    """Not made where a harmless program gets out already: the machine may be somebody's."""
    probe = PROBE.format(pid=outside.victims[0].pid, file=outside.folder / "kept")
    (result,) = run_tests([probe], [["assert solution(0) == []"]], timeout=10.0)
    assert result.passed, f"no hostile program is run, because a harmless one gets out: {result.reason}"
    names = quick_programs_for if request.config.option.markexpr == "not slow" else programs_for
    return {style: attack(outside, style, names(style)) for style in STYLES}


def test_corpus_is_large_and_says_what_it_tries() -> None:
    assert len(CORPUS) >= 60
    for name, text in CORPUS.items():
        assert text.startswith("# attack: "), name
        assert set(wants(text).split(", ")) <= {"escape", "reward", "resources", "persistence"}, name
        ast.parse(text)  # a program with a slip of the pen would prove nothing
    assert len({text.split("\n")[0] for text in CORPUS.values()}) == len(CORPUS)


CASES = [  # those that `quick_programs_for` leaves out are slow, because they are many
    pytest.param(style, name, marks=() if name in quick else pytest.mark.slow)
    for style, quick in {style: set(quick_programs_for(style)) for style in STYLES}.items()
    for name in programs_for(style)
]


@pytest.mark.parametrize(("style", "name"), CASES)
def test_hostile_program_is_not_rewarded_and_does_not_escape(
    style: str, name: str, outside: Outside, attacks: dict[str, Attack]
) -> None:
    result = attacks[style].hostile[name]
    assert blame(outside, {name: result}) == {}
    assert result.reason.isprintable()


@pytest.mark.parametrize("style", STYLES)
def test_nothing_outside_changes(style: str, attacks: dict[str, Attack]) -> None:
    assert attacks[style].damage == []


@pytest.mark.parametrize("style", STYLES)
def test_honest_programs_among_hostile_ones_score_as_alone(style: str, attacks: dict[str, Attack]) -> None:
    assert {result.reason for result in attacks[style].honest} == {"passed"}
    assert all(result.passed for result in attacks[style].honest)
    assert not any(result.passed for result in attacks[style].wrong)


@pytest.mark.parametrize("style", STYLES)
def test_hostile_programs_end_in_time(style: str, attacks: dict[str, Attack]) -> None:
    assert attacks[style].seconds < (TIMEOUT + 1) * len(attacks[style].hostile) + 30


PRELOADED = (
    "_xxsubinterpreters asyncio atexit cProfile codecs ctypes dbm faulthandler fcntl gc glob importlib logging marshal"
    " mmap multiprocessing platform pwd py_compile readline resource select shutil signal site socket sqlite3"
    " subprocess sysconfig tarfile tempfile termios urllib"
)


def test_each_isolation_alone_holds_hostile_programs(
    isolation_at_hand: str,
    outside: Outside,
    attacks: dict[str, Attack],
    change_helper: Callable[[str, str, str], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without the audit hook, so with ctypes, sockets and frames; bubblewrap without Landlock, then the reverse.

    Left out are programs that the hook does not stop either, because they only use up time.
    """
    if isolation_at_hand == "bubblewrap":
        change_helper("kernel.py", 'if sys.platform != "linux" or not _LANDLOCK_CREATE_RULESET:', "if True:")
    change_helper("program.py", "sys.addaudithook(audit_hook(folder))", "pass")
    change_helper("confinement.py", "    for name in {", "    for name in () and {")  # ctypes can be imported again
    monkeypatch.setattr(run, "_COMMON_MODULES", run._COMMON_MODULES | set(PRELOADED.split()))
    (works,) = run_tests(
        ["import ctypes\ndef solution(n):\n    return n + ctypes.sizeof(ctypes.c_int8)"], [["assert solution(3) == 4"]]
    )
    assert works.passed, works
    hooked = attacks["check"].hostile
    found = attack(outside, "check", [name for name in hooked if hooked[name].reason != "timeout"])
    assert blame(outside, found.hostile) == {}
    assert found.damage == []
    assert {result.reason for result in found.honest} == {"passed"}


def test_caller_with_many_open_files_gives_nothing_away(outside: Outside, attacks: dict[str, Attack]) -> None:
    """As a training process with data loaders and sockets has: the sandbox's own files get high numbers."""
    held = [os.open(os.devnull, os.O_RDONLY) for _ in range(400)]
    try:
        names = ["files_left_open", "questions_stolen", "forges_every_descriptor", "read_test_source"]
        programs = [outside.aim(name) for name in names] + [STYLES["check"].right]
        results = run_tests(programs, [STYLES["check"].tests] * len(programs), timeout=10.0)
    finally:
        for descriptor in held:
            os.close(descriptor)
    assert blame(outside, dict(zip(names, results, strict=False))) == {}
    assert results[-1].passed, results[-1]


def start_orphan() -> None:
    script = "import subprocess; subprocess.Popen(['sleep', '20'], start_new_session=True)"
    subprocess.run([sys.executable, "-c", script], check=True)


DAMAGE: dict[str, tuple[str, Callable[[Outside], object]]] = {
    "overwriting": ("file changed", lambda world: (world.folder / "kept").write_text("x")),
    "deleting": ("file changed", lambda world: (world.folder / "token").unlink()),
    "changing rights": ("file changed", lambda world: (world.folder / "kept").chmod(0o600)),
    "a second name": ("file changed", lambda world: os.link(world.folder / "kept", world.temporary / "x")),
    "a new file": ("left behind", lambda world: Path("/dev/shm", f"{world.mark}-new").touch()),
    "a leftover folder": ("temporary folder", lambda world: (world.temporary / "x").mkdir()),
    "a connection": ("connected to: tcp", lambda world: socket.create_connection(world.servers["tcp"].getsockname())),
    "a datagram": (
        "connected to: udp",
        lambda world: socket.socket(type=socket.SOCK_DGRAM).sendto(b"x", world.servers["udp"].getsockname()),
    ),
    "an abstract socket": (
        "connected to: abstract",
        lambda world: socket.socket(socket.AF_UNIX).connect(f"\0{world.mark}"),
    ),
    "killing": ("process killed", lambda world: (world.victims[0].kill(), world.victims[0].wait())),
    "stopping": ("process killed", lambda world: (world.victims[1].send_signal(signal.SIGSTOP), time.sleep(0.1))),
    "an orphan": ("process left", lambda world: start_orphan()),
    "the environment": ("environment changed", lambda world: os.environ.update(PEFT_SVF_CANARY="x")),
    "a signal handler": ("signal handlers", lambda world: signal.signal(signal.SIGUSR2, signal.SIG_IGN)),
    "the working directory": ("working directory", lambda world: os.chdir("/")),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_noticed(
    name: str, outside: Outside, attacks: dict[str, Attack], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the other tests rely on: each effect that a program may have is seen from out here."""
    monkeypatch.chdir(Path.cwd())
    monkeypatch.setenv("PEFT_SVF_CANARY", outside.secret)
    handler = signal.getsignal(signal.SIGUSR2)
    world = Outside()
    try:
        assert world.damage() == []
        wanted, do = DAMAGE[name]
        do(world)
        assert any(text.startswith(wanted) for text in world.damage())
    finally:
        signal.signal(signal.SIGUSR2, handler)
        for pid in world._processes_left():
            os.kill(pid, signal.SIGKILL)
        world.close()


def ordinary_evaluations() -> list[TestResult]:
    """One hundred right programs and one hundred wrong ones, in all styles."""
    styles = list(STYLES.values())
    cases = [
        (style, program) for i in range(100) for style in [styles[i % 8]] for program in (style.right, style.wrong)
    ]
    return run_tests(
        [program for _, program in cases],
        [style.tests for style, _ in cases],
        preambles=[style.preamble for style, _ in cases],
        timeout=10.0,
    )


def test_200_evaluations_score_as_before(ordinary_verdicts: list[TestResult], attacks: dict[str, Attack]) -> None:
    after = ordinary_evaluations()
    assert [result.passed for result in after] == [True, False] * 100
    assert after == ordinary_verdicts
