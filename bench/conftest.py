"""Options (`pytest bench/ --help`, under "seqkern"), the session's records, the measuring fixture."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from bench import cases, harness, limits, parity, store
from bench import machine as machine_facts
from bench.cases import BY_NAME

CHECK_FLOPS = {torch.float32: 5e8, torch.bfloat16: 2e8, torch.float16: 3e7}  # a plain check's forward pass
QUICK_GATE_FLOPS = {torch.float32: 4e9, torch.bfloat16: 1e9, torch.float16: 1e8}
FULL = harness.Budget(seconds=1.0, least=5)
QUICK = harness.Budget(seconds=0.4, least=3, limit=5.0)
GPU = harness.Budget(seconds=0.3, least=5, limit=4.0)  # many cases in a few minutes


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("seqkern")
    group.addoption(
        "--benchmark",
        dest="bench_measure",
        action="store_true",
        help="measure (without it: run each case once)",
    )
    group.addoption(
        "--benchmark-quick",
        dest="bench_quick",
        action="store_true",
        help="measure the short cases only, in fewer rounds; saves nothing without --benchmark-results",
    )
    group.addoption(
        "--benchmark-case",
        dest="bench_case",
        action="append",
        default=[],
        metavar="SUBSTR",
        help="only cases with SUBSTR in their id, such as GRU-float32-c5-training; may be repeated",
    )
    group.addoption(
        "--benchmark-minutes",
        dest="bench_minutes",
        type=float,
        default=float("inf"),
        metavar="N",
        help="skip what has not begun by then; on a GPU the most important cases come first",
    )
    group.addoption(
        "--benchmark-threads",
        dest="bench_threads",
        type=int,
        default=2,
        metavar="N",
        help="on a CPU (default 2)",
    )
    group.addoption(
        "--benchmark-null",
        dest="bench_null",
        action="store_true",
        help="measure torch.nn against itself: the harness's own noise; saves nothing",
    )
    group.addoption(
        "--benchmark-results",
        dest="bench_results",
        type=pathlib.Path,
        metavar="DIR",
        help="where the JSON goes (default bench/results)",
    )


@pytest.hookimpl(tryfirst=True)  # before pytest-benchmark reads its options
def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("python_files", "bench_*.py")
    config.addinivalue_line("markers", "long: left out of --benchmark-quick")
    config.addinivalue_line("filterwarnings", "ignore:Benchmark fixture was not used")  # when a gate fails
    option = config.option
    option.bench_measure = getattr(option, "bench_measure", False) or getattr(option, "bench_quick", False)
    if not option.bench_measure:
        option.benchmark_disable = True
    option.benchmark_quiet = True  # its table knows one side only; ours is below


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    here = pathlib.Path(__file__).parent
    wanted, kept, dropped = config.getoption("bench_case", []), [], []
    for item in items:
        ours = here in item.path.parents
        keep = not ours or not wanted or any(text in item.name for text in wanted)
        if ours and config.getoption("bench_quick", False):
            keep = keep and item.get_closest_marker("long") is None
        (kept if keep else dropped).append(item)
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = kept
    if torch.cuda.is_available():
        items.sort(key=importance)  # stable: the modes of a case stay together


def importance(item: pytest.Item) -> int:
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    family = getattr(getattr(item, "module", None), "FAMILY", "")
    return cases.rank((family, str(parameters.get("dtype")), str(parameters.get("case"))))


@dataclasses.dataclass
class Session:
    """What this run measures with, and what it has measured."""

    config: pytest.Config
    device: str
    threads: int
    library: object
    new: dict[str, dict[str, list[dict[str, object]]]] = dataclasses.field(
        default_factory=dict
    )  # stem -> kind -> entries
    failed: dict[str, set[str]] = dataclasses.field(default_factory=dict)  # stem -> ids
    facts: dict[str, object] | None = None
    began: float = dataclasses.field(default_factory=time.monotonic)

    @property
    def measuring(self) -> bool:
        return self.config.option.bench_measure

    @property
    def quick(self) -> bool:
        return self.config.option.bench_quick

    def skip_if_late(self) -> None:
        minutes = self.config.option.bench_minutes
        if self.measuring and time.monotonic() - self.began > 60 * minutes:
            pytest.skip(f"the {minutes:g} minutes of --benchmark-minutes are over")

    def record(self, kind: str, entry: dict[str, object]) -> None:
        self.new.setdefault(str(entry["family"]), {}).setdefault(kind, []).append(entry)

    def drop(self, family: str, ids: list[str]) -> None:
        self.failed.setdefault(family, set()).update(ids)

    @functools.cached_property
    def _problems(self) -> dict[tuple, tuple[Any, dict[str, parity.Parity]]]:
        return {}

    def problem(
        self, make: Callable[..., Any], family: str, dtype: torch.dtype, case: Any
    ) -> tuple[Any, dict[str, parity.Parity]]:
        """The gated problem make(library, family, dtype, case, device) and its parities; the last one is
        kept, for the next mode of the same case."""
        key = (family, dtype, case)
        if key not in self._problems:
            self._problems.clear()
            budget = None
            if not self.measuring:
                budget = CHECK_FLOPS[dtype]
            elif self.quick:
                budget = QUICK_GATE_FLOPS[dtype]
            gated = case if budget is None else case.scaled(family, budget)
            gates = make(self.library, family, dtype, gated, self.device).gate()
            measured = case if self.measuring else gated
            self._problems[key] = make(self.library, family, dtype, measured, self.device), gates
        return self._problems[key]

    def time(self, benchmark: Any, steps: dict[str, Callable], target: str) -> harness.Interleaved:
        """Interleaved rounds of `steps`; without measuring, each runs once.

        pytest-benchmark drives the rounds: its target is seqkern's block, its (untimed) set-up every peer's.
        """
        interleaved = harness.Interleaved(steps)
        others = [name for name in interleaved.steps if name != target]
        budget = QUICK if self.quick else GPU if self.device == "cuda" else FULL
        rounds, done = 1, 0
        if self.measuring:
            rounds = budget.rounds(interleaved.warm_up())
        start = time.perf_counter()

        def peers() -> None:
            nonlocal done
            if self.measuring and budget.spent(time.perf_counter() - start, done):
                raise harness.OutOfTimeError
            done += 1
            for name in others:
                interleaved.block(name)

        with harness.no_collection():
            try:
                benchmark.pedantic(lambda: interleaved.block(target), setup=peers, rounds=rounds)
            except harness.OutOfTimeError:
                benchmark.has_error = False  # the rounds that were done count
        return interleaved


@pytest.fixture(scope="session")
def bench_session(request: pytest.FixtureRequest) -> Iterator[Session]:
    """Device, threads and library; limits are measured first, results saved at the end."""
    config = request.config
    device = "cuda" if torch.cuda.is_available() else "cpu"
    before = torch.get_num_threads()
    if device == "cpu":
        torch.set_num_threads(config.option.bench_threads)
    if config.option.bench_null:
        library: object = harness.NullLibrary()
    else:
        import seqkern as library
    session = Session(config, device, torch.get_num_threads(), library)
    config.stash[SESSION] = session
    if session.measuring and not config.option.bench_null:
        found = limits.measure(device, session.quick)
        session.facts = machine_facts.run_facts(device, session.threads, found)
    elsewhere = machine_facts.Elsewhere()
    yield session
    torch.set_num_threads(before)
    if session.facts is not None:
        session.facts["busy_elsewhere"] = elsewhere.busy()
    results = config.option.bench_results or (None if session.quick else store.RESULTS)
    if session.facts is not None and results is not None:
        machine = machine_facts.machine(device)
        for family in session.new.keys() | session.failed.keys():
            path = store.path_of(results, str(machine["slug"]), family)
            old = store.load(path) if path.exists() else None
            new, failed = session.new.get(family, {}), session.failed.get(family, set())
            store.save(path, store.merge(old, machine, session.facts, new, failed))


SESSION: pytest.StashKey[Session] = pytest.StashKey()


@pytest.fixture
def measure(bench_session: Session, benchmark: object) -> Callable[[str, str, str, str], None]:
    """measure(family, dtype, case, mode): the gate, then interleaved rounds; a plain check runs each once."""

    def run(family: str, dtype_name: str, case_name: str, mode: str) -> None:
        session, case, dtype = bench_session, BY_NAME[case_name], getattr(torch, dtype_name)
        session.skip_if_late()
        names = [case.name] if case.kind != "ragged" else [f"{case.name}-lengths", f"{case.name}-packed"]
        parts = ["forward"] if mode == "forward" else ["training", "backward"]
        ids = [f"{family}-{dtype_name}-{name}-{part}" for name in names for part in parts]
        try:
            problem, gates = session.problem(harness.Problem, family, dtype, case)
        except Exception:
            session.drop(family, ids)
            raise
        steps = problem.steps(mode)
        interleaved = session.time(benchmark, steps, "seqkern" if "seqkern" in steps else "lengths")
        if session.measuring:
            for entry in harness.speed_entries(interleaved, problem, mode, gates):
                session.record("speed", entry)
                benchmark.extra_info[str(entry["case"])] = {
                    "ratio": entry["ratio"],
                    "verdict": entry["verdict"],
                }

    return run


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes `dtype, case, mode` gets the grid of its module's FAMILY; long cases are marked."""
    if not {"dtype", "case", "mode"} <= set(metafunc.fixturenames):
        return
    family = metafunc.module.FAMILY
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = [
        pytest.param(
            dtype,
            case.name,
            mode,
            id=f"{family}-{dtype}-{case.name}-{mode}",
            marks=[] if case.short else [pytest.mark.long],
        )
        for dtype, case in cases.grid(family, device)
        for mode in case.modes
    ]
    metafunc.parametrize(("dtype", "case", "mode"), rows)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    session = config.stash.get(SESSION, None)
    if session is None or not session.new:
        return
    terminalreporter.section("torch.nn / seqkern, median (p20–p80)")
    for family in cases.FAMILIES:
        for entry in session.new.get(family, {}).get("speed", []):
            theirs, ours = entry["torch"], entry["seqkern"]
            mark = {"slower": "  SLOWER", "even": "  even", "faster": ""}[entry["verdict"]]
            terminalreporter.write_line(
                f"{entry['id']:34s} {entry['ratio']:7.2f}x  "
                f"{theirs['median'] * 1e3:9.3f} ms ({theirs['p20'] * 1e3:.3f}–{theirs['p80'] * 1e3:.3f})  /  "
                f"{ours['median'] * 1e3:9.3f} ms ({ours['p20'] * 1e3:.3f}–{ours['p80'] * 1e3:.3f})  "
                f"{ours['rounds']:3d} rounds  {entry['gflops']:7.1f} GF/s{mark}"
            )
        for entry in session.new.get(family, {}).get("memory", []):
            terminalreporter.write_line(
                f"{entry['id']:34s} peak of a step: torch.nn {entry['torch'] / 2**20:.1f} MiB, "
                f"seqkern {entry['seqkern'] / 2**20:.1f} MiB"
            )
        for entry in session.new.get(family, {}).get("neighbour", []):
            terminalreporter.write_line(
                f"{entry['id']:34s} busy / alone: torch.nn {entry['torch']['ratio']:.2f}, "
                f"seqkern {entry['seqkern']['ratio']:.2f}"
            )
    for entries in session.new.values():
        for entry in entries.get("attention", []):
            times = [f"{name} {spread['median'] * 1e3:.3f}" for name, spread in entry["peers"].items()]
            mark = {"slower": "  SLOWER", "even": "  even", "faster": ""}[entry["verdict"]]
            terminalreporter.write_line(
                f"{entry['id']:50s} {entry['ratio']:7.2f}x  {', '.join(times)}  /  "
                f"{entry['seqkern']['median'] * 1e3:.3f} ms  {entry['seqkern']['rounds']:3d} rounds  "
                f"{entry['gflops']:7.1f} GF/s{mark}"
            )
    for entries in session.new.values():
        for entry in entries.get("tiers", []):
            terminalreporter.write_line(f"{entry['id']:44s} {entry['step_us']:8.2f} µs per step")
    busy = (session.facts or {}).get("busy_elsewhere") or 0
    if busy > machine_facts.QUIET:
        terminalreporter.write_line(
            f"WARNING: other processes took {busy:.0%} of the cores: not to be relied on"
        )
