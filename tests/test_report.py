"""bench/: the tables are what the committed JSON gives; means, verdicts and marks on made-up results."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import sys

import pytest
import torch

from seqkern import nn

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench import (  # noqa: E402
    cases,
    harness,
    limits,
    machine,
    memory,
    numerics,
    parity,
    recipes,
    report,
    store,
    training,
)

RUN = {
    "date": "2026-01-02T03:04Z",
    "commit": "0123456789ab",
    "dirty": False,
    "threads": 2,
    "software": {"torch": "2.13.0", "onednn": "3.1"},
    "limits": {"fma_peak": 500.0, "gemm_float32": 400.0, "gemm_bfloat16": 900.0, "read_3145728": 200.0},
}
MACHINE = {"device": "cpu", "slug": "made-up", "model": "Made Up 1", "cores": 2}


def spread(median: float, wide: float = 0.02) -> dict[str, float]:
    return {"median": median, "p20": median * (1 - wide), "p80": median * (1 + wide), "rounds": 9}


def speed(family: str, dtype: str, case: str, mode: str, ratio: float, wide: float = 0.02) -> dict:
    """An entry in which seqkern takes 10 ms and torch.nn `ratio` times as long."""
    theirs, ours = spread(0.01 * ratio, wide), spread(0.01, wide)
    entry = {
        "id": f"{family}-{dtype}-{case}-{mode}",
        "family": family,
        "dtype": dtype,
        "case": case,
        "mode": mode,
        "torch": theirs,
        "seqkern": ours,
        "ratio": ratio,
        "verdict": harness.verdict(theirs, ours),
        "gflops": 400.0,
        "torch_gflops": 100.0,
        "parity": {"worst": "y", "error": 1e-7, "torch_error": 1e-7, "bound": 3e-7, "steps": 4},
    }
    if case == "c7":
        entry |= {"recurrent_bytes": 3145728, "steps": 256}
    if case.startswith("c9"):
        entry["torch_packing"] = spread(0.001)
    return entry


def made_up(ratio: float = 4.0, **changed: tuple[float, float]) -> store.Document:
    """GRU float32 over all cases at one ratio; changed: case -> (ratio, wide)."""
    names = [*cases.MAIN, "c9-lengths", "c9-packed", "c10-b1", "c10-b16"]
    entries = [
        speed("GRU", "float32", name, mode, *changed.get(name.replace("-", "_"), (ratio,)))
        for name in names
        for mode in (("forward",) if name.startswith("c10") else ("forward", "training"))
    ]
    memories = [
        {"id": "GRU-float32-c3-memory", "family": "GRU", "case": "c3", "torch": 2**20, "seqkern": 2**21}
    ]
    shares = {"torch": {"ratio": 9.0}, "seqkern": {"ratio": 2.75}}
    neighbours = [
        {"id": "GRU-float32-c1-forward", "family": "GRU", "case": "c1", "mode": "forward", **shares}
    ]
    return store.merge(None, MACHINE, RUN, {"speed": entries, "memory": memories, "neighbour": neighbours})


def results(document: store.Document) -> report.Results:
    return report.Results("made-up", [document])


# --- the committed pages -----------------------------------------------------------------------------------


def test_the_readme_is_what_the_results_give() -> None:
    everything = report.load_all()
    for path, text in report.pages(everything, store.RESULTS, report.README).items():
        assert path.read_text() == text, f"{path.relative_to(ROOT)}: run python -m bench.report"


def test_committed_results_name_no_host_and_no_path() -> None:
    for path in sorted(store.RESULTS.glob("*/*.json")):
        text = path.read_text()
        assert "/home" not in text and "/work" not in text and "\\\\" not in text and str(ROOT) not in text
        assert path.with_name("speed.png").exists(), f"{path.parent.name}: the README shows speed.png"
        for entry in store.load(path)["speed"]:
            assert entry["verdict"] == harness.verdict(entry["torch"], entry["seqkern"]), entry["id"]
            ratio = entry["torch"]["median"] / entry["seqkern"]["median"]
            assert entry["ratio"] == pytest.approx(ratio, rel=1e-3), entry["id"]


# --- means, verdicts, marks --------------------------------------------------------------------------------


def test_geometric_mean() -> None:
    assert report.geometric_mean([2.0, 8.0]) == pytest.approx(4.0)
    assert report.geometric_mean([1.7]) == pytest.approx(1.7)


@pytest.mark.parametrize(
    ("ratio", "wide", "expected"),
    [
        (1.5, 0.02, "faster"),
        (0.7, 0.02, "slower"),
        (0.97, 0.02, "even"),
        (0.7, 0.3, "even"),
        (1.5, 0.3, "even"),
    ],
)
def test_a_case_is_slower_only_if_the_bands_part(ratio: float, wide: float, expected: str) -> None:
    entry = speed("GRU", "float32", "c1", "forward", ratio, wide)
    assert entry["verdict"] == expected
    cell = report.ratio_cell(entry)
    assert ("▼" in cell) == (expected == "slower") and ("≈" in cell) == (expected == "even")


def test_targets_met_and_missed() -> None:
    found = results(made_up(3.5, c1=(7.0, 0.02)))
    target = next(t for t in cases.TARGETS if t.title.startswith("GRU float32, c1–c8"))
    mean, count = report.target_mean(found, target, "forward")
    assert count == 8 and mean == pytest.approx(3.5 * 2 ** (1 / 8))
    table = report.target_table(found)
    assert "| GRU float32, c1–c8 | 3.82× (≥ 3.20× ✓) | 3.82× (≥ 4.00× ✗) |" in table
    assert "| GRU one step, c10 | 3.50× (≥ 2.00× ✓) |  |" in table
    assert "RNN" not in table


def test_an_incomplete_mean_gets_no_mark() -> None:
    document = made_up()
    document["speed"] = [e for e in document["speed"] if e["case"] != "c6"]
    table = report.target_table(results(document))
    assert "| GRU float32, c1–c8 | 4.00× (7 of 8 cases) | 4.00× (7 of 8 cases) |" in table


def test_losses_are_listed() -> None:
    section = report.machine_section(results(made_up(4.0, c2=(0.5, 0.02), c5=(0.98, 0.05))))
    assert "Slower than torch.nn in 2 of 22 measurements: GRU-float32-c2-forward (0.50×)" in section
    assert "**0.50× ▼**" in section and "0.98× ≈" in section
    assert "none of" in report.losses_line(results(made_up()))


def test_limits_memory_and_neighbour() -> None:
    found = results(made_up())
    entry = found.find("GRU", "float32", "c7", "forward")
    assert report.peak_share(found, entry) == (0.8, "FMA peak")
    floor = 256 * 3145728 / 200e9
    assert report.floor_ratio(found, entry) == pytest.approx(0.01 / floor)
    table = report.limit_table(found)
    assert "80% (≥ 80% ✓), torch.nn 20%" in table and "✗" in table  # 10 ms is 2.5 times the floor
    assert "| GRU | 2 / 1 MiB ✗ |" in report.memory_table(found)
    assert "2.75× ✗ / 9.00×" in report.neighbour_table(found)


def test_a_peak_below_a_gemm_does_not_count() -> None:
    limits_ = {"fma_peak": 50.0, "gemm_float32": 200.0, "gemm_bfloat16": 400.0}
    assert limits.peak(limits_, "float32") == (200.0, "best GEMM")
    assert limits.peak(limits_ | {"fma_peak": 250.0}, "float32") == (250.0, "FMA peak")
    assert limits.peak(limits_, "bfloat16") == (400.0, "best GEMM")
    assert limits.peak({"fma_peak": 250.0}, "float16") is None


def test_a_disturbed_run_says_so() -> None:
    document = made_up()
    assert "relied" not in report.machine_section(results(document))
    next(iter(document["runs"].values()))["busy_elsewhere"] = 0.4
    assert "40% of the cores (not to be relied on)" in report.machine_section(results(document))


def test_own_work_is_not_elsewhere() -> None:
    elsewhere = machine.Elsewhere()
    assert elsewhere.busy() is None or 0 <= elsewhere.busy() <= 1


def test_seconds() -> None:
    shown = [report.seconds(v) for v in (2.5, 0.9999, 0.0123, 0.0009999, 3.21e-05)]
    assert shown == ["2.5 s", "1000 ms", "12.3 ms", "1000 µs", "32.1 µs"]


def test_c2_comes_before_c10() -> None:
    assert sorted(["c10-b1", "c2", "c9-packed", "c1"], key=report.natural) == [
        "c1",
        "c2",
        "c9-packed",
        "c10-b1",
    ]


# --- pages and files ---------------------------------------------------------------------------------------


def test_renew_replaces_only_what_is_between_the_markers() -> None:
    old = f"head\n{report.BEGIN}\nold\n{report.END}\ntail\n"
    new = report.renew(old, "new")
    assert new == f"head\n{report.BEGIN}\nnew\n{report.END}\ntail\n"
    assert report.renew(new, "new") == new
    assert report.renew(old, "") == f"head\n{report.BEGIN}\n{report.END}\ntail\n"
    with pytest.raises(ValueError, match="bench:begin"):
        report.renew("no markers", "new")


def test_the_command_writes_checks_and_repeats_itself(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture
) -> None:
    folder, readme = tmp_path / "results", tmp_path / "README.md"
    store.save(store.path_of(folder, "made-up", "GRU"), made_up())
    readme.write_text(f"{report.BEGIN}\n{report.END}\n")
    arguments = ["--results", str(folder), "--readme", str(readme)]
    assert report.main([*arguments, "--check"]) == 1
    pytest.importorskip("matplotlib")
    assert report.main(arguments) == 0
    first = readme.read_text(), (folder / "made-up" / "README.md").read_text()
    assert (folder / "made-up" / "speed.png").read_bytes().startswith(b"\x89PNG")
    assert report.main([*arguments, "--check"]) == 0
    assert report.main(arguments) == 0
    assert first == (readme.read_text(), (folder / "made-up" / "README.md").read_text())
    assert "4.00×" in capsys.readouterr().out


def test_without_matplotlib_the_tables_are_written_and_it_says_so(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    folder, readme = tmp_path / "results", tmp_path / "README.md"
    store.save(store.path_of(folder, "made-up", "GRU"), made_up())
    readme.write_text(f"{report.BEGIN}\n{report.END}\n")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert report.main(["--results", str(folder), "--readme", str(readme)]) == 1
    assert "matplotlib is missing" in capsys.readouterr().err
    assert "4.00×" in readme.read_text()


def test_merge_replaces_drops_and_forgets(tmp_path: pathlib.Path) -> None:
    path = store.path_of(tmp_path, "made-up", "GRU")
    store.save(path, made_up())
    later = RUN | {"date": "2026-02-02T00:00Z", "dirty": True}
    fresh = {"speed": [speed("GRU", "float32", "c1", "forward", 9.0)]}
    document = store.merge(store.load(path), MACHINE, later, fresh, failed=["GRU-float32-c2-forward"])
    store.save(path, document)
    found = results(store.load(path))
    assert found.find("GRU", "float32", "c1", "forward")["ratio"] == 9.0
    assert found.find("GRU", "float32", "c2", "forward") is None
    assert found.find("GRU", "float32", "c2", "training")["ratio"] == 4.0
    assert sorted(document["runs"]) == [
        "2026-01-02T03:04Z 0123456789ab",
        "2026-02-02T00:00Z 0123456789ab dirty",
    ]
    everything = {entry["id"] for kind in store.KINDS for entry in document[kind]}
    assert store.merge(document, MACHINE, later, {}, failed=everything)["runs"] == {}


def test_an_unknown_schema_is_refused(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "gru.json"
    path.write_text(json.dumps({"schema": 99}))
    with pytest.raises(ValueError, match=r"gru\.json: expected schema 1, got 99"):
        store.load(path)


# --- what stands behind the numbers ------------------------------------------------------------------------


def test_model_flops() -> None:
    c3 = cases.BY_NAME["c3"]
    layers = 2 * 32 * 50 * 4 * 256 * 2 * ((300 + 256) + (512 + 256))
    assert c3.flops("LSTM") == layers and c3.flops("GRU", "training") == 3 * layers * 3 // 4
    ragged = cases.BY_NAME["c9"]
    lengths = ragged.lengths()
    assert lengths.max() == 256 and lengths.min() >= 16 and torch.equal(lengths, ragged.lengths())
    assert ragged.flops("RNN") == cases.BY_NAME["c4"].flops("RNN") * int(lengths.sum()) // (64 * 256)
    assert ragged.scaled("GRU", 1e8).T < 256 and c3.scaled("GRU", 1e18) is c3


def test_every_target_is_measured() -> None:
    for device, targets in (("cpu", cases.TARGETS), ("cuda", cases.GPU_TARGETS)):
        for target in targets:
            for family, dtype, name in target.cells:
                grid = {(dtype, case.name) for dtype, case in cases.grid(family, device)}
                name = name.removesuffix("-lengths").removesuffix("-packed")
                assert (dtype, name) in grid, target.title


def test_the_gpu_grid_begins_with_what_the_targets_ask_for() -> None:
    assert len(set(cases.GPU_GRID)) == len(cases.GPU_GRID)
    assert cases.rank(("LSTM", "float16", "g768-b16")) == 0
    assert cases.rank(("GRU", "float32", "c1")) == len(cases.GPU_GRID)
    named = {(f, d, name.removesuffix("-lengths")) for t in cases.GPU_TARGETS for f, d, name in t.cells}
    assert max(map(cases.rank, named)) < 25
    ragged = cases.BY_NAME["t256-ragged"].lengths()
    assert ragged.max() == 256 and 25 <= ragged.min() < 60


def gpu_results(ratio: float = 2.0) -> report.Results:
    """An H200 on which everything takes `ratio` times as long with torch.nn; a tier of each name."""
    machine_ = {"device": "cuda", "slug": "made-up-gpu", "model": "Made Up H"}
    entries = []
    for family, dtype, name in cases.GPU_GRID:
        forms = ("-lengths", "-packed") if cases.BY_NAME[name].kind == "ragged" else ("",)
        entries += [
            speed(family, dtype, name + form, mode, ratio)
            for form in forms
            for mode in ("forward", "training")
        ]
    fields = {"family": "LSTM", "dtype": "bfloat16", "case": "tier64-b16", "mode": "forward"}
    tiers = [
        {"id": f"LSTM-bfloat16-tier64-b16-forward-{tier}", **fields, "tier": tier, "step_us": us}
        for tier, us in (("block", 0.51), ("step", 5.25))
    ]
    return results(store.merge(None, machine_, RUN, {"speed": entries, "tiers": tiers}))


def test_gpu_targets_and_tables() -> None:
    found = gpu_results(2.0)
    table = report.target_table(found)
    assert (
        "| cuDNN's best case: LSTM fp16, 768, B 16, T 1024 | 2.00× (≥ 1.50× ✓) | 2.00× (≥ 1.30× ✓) |" in table
    )
    assert "| the same in bf16 | 2.00× (≥ 2.50× ✗) |" in table
    assert "| the worst of all cases | 2.00× (≥ 1.00× ✓) | 2.00× (≥ 1.00× ✓) |" in table
    assert "| a step of cuDNN's best case | 9.77 µs (≤ 1.30 µs ✗) |  |" in table  # 10 ms over 1024 steps
    tables = report.gpu_tables(found)
    assert "| g768-b16 (16, 1024, 768, 768, 1) | 2.00× 9.77 / 2.00× 9.77 |" in tables
    assert "t256-ragged-packed" in tables and "d2816-t1500-b32" in tables
    assert "| LSTM-bfloat16-tier64-b16-forward | 5.25 | 0.51 |" in report.tier_table(found)
    page = report.detail_page(found)
    assert "µs per step, tier forced" in page and report.gpu_tables(found) in report.machine_section(found)


def test_the_clock_of_a_cpu_is_the_processors() -> None:
    start = harness.start_clock("cpu")
    assert 0 <= harness.between(start, harness.mark("cpu")) < 1


def test_spread() -> None:
    found = harness.Spread.of([float(n) for n in range(11)])
    assert (found.median, found.p20, found.p80, found.rounds) == (5.0, 2.0, 8.0, 11)
    assert harness.Spread.of([3.0]) == harness.Spread(3.0, 3.0, 3.0, 1)


def test_budget() -> None:
    budget = harness.Budget(seconds=2.0, least=5, most=100, limit=20.0)
    assert [budget.rounds(s) for s in (1e-6, 0.1, 3.0)] == [100, 20, 5]
    assert not budget.spent(19.0, 3) and budget.spent(21.0, 3) and not budget.spent(21.0, 2)
    assert budget.spent(7.0, 50) and not budget.spent(5.0, 50)


def test_the_gate_passes_equals_and_stops_errors() -> None:
    case = dataclasses.replace(cases.BY_NAME["c2"], T=3)
    problem = harness.Problem(harness.NullLibrary(), "GRU", torch.float32, case, "cpu")
    found = problem.gate()["seqkern"]
    assert 0 < found.error <= found.torch_error <= found.bound
    with torch.no_grad():
        problem.seqkern_module.weight_hh_l0[3, 4] += 1e-3
    with pytest.raises(
        parity.ParityError, match=r"GRU .* c2: .* tensors differ\n  y\[.*got .*expected .*error"
    ):
        problem.gate()


def test_nan_does_not_pass_the_gate() -> None:
    good, bad = torch.ones(3), torch.tensor([1.0, float("nan"), 1.0])
    with pytest.raises(parity.ParityError, match=r"y\[1\]: got nan"):
        parity.compare({"y": bad}, {"y": good}, {"y": good.double()}, torch.float32, 1, "case")


@pytest.mark.parametrize("mode", ["forward", "training"])
@pytest.mark.parametrize("name", ["c2", "c9", "c10-cell-b16"])
def test_subjects_run_and_are_timed(name: str, mode: str) -> None:
    case = cases.BY_NAME[name].scaled("LSTM", 1e7)
    problem = harness.Problem(harness.NullLibrary(), "LSTM", torch.float32, case, "cpu")
    interleaved = harness.Interleaved(problem.steps(mode))
    assert interleaved.warm_up() > 0
    for subject in interleaved.steps:
        interleaved.block(subject)
    entries = list(harness.speed_entries(interleaved, problem, mode, problem.gate()))
    forms = ["c9-lengths", "c9-packed"] if name == "c9" else [name]
    parts = ["forward"] if mode == "forward" else ["training", "backward"]
    assert [(e["case"], e["mode"]) for e in entries] == [(form, part) for form in forms for part in parts]
    assert ("torch_packing" in entries[0]) == (name == "c9")


def test_describe_cpu() -> None:
    text = "model name\t: Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz\ncpu family\t: 6\nmodel\t\t: 143\n"
    cpu = machine.describe_cpu(text + "flags\t\t: fpu avx2 avx512f avx512_bf16 amx_bf16\n")
    assert cpu["instruction_set"] == "amx" and (cpu["family"], cpu["model_number"]) == ("6", "143")
    assert machine.slugify(cpu["model"]) == "intel-xeon-platinum-8481c"
    assert machine.describe_cpu("model name: AMD EPYC\nflags: avx2")["instruction_set"] == "avx2"


def test_memory_peak_counts_what_a_step_needs() -> None:
    if not memory.supported("cpu"):
        pytest.skip("no /proc/self/clear_refs")
    case = dataclasses.replace(cases.BY_NAME["c5"], T=64)
    peak = memory.training_step_peak(torch.nn, "LSTM", case, "cpu")
    outputs = case.T * case.B * case.H * 4
    assert outputs < peak < 60 * outputs


# ---- recipes on several seeds ------------------------------------------------------------------------------


def test_a_recipe_on_both_libraries(tmp_path: pathlib.Path, monkeypatch, capsys) -> None:
    """A real run, cut down, from the command to the table."""
    tiny = recipes.Case("names", "names", ("epochs=1", "hidden_size=8", "embed_dim=4"))
    monkeypatch.setattr(recipes, "CASES", (tiny, recipes.Case("far", "questions", data="nowhere")))
    monkeypatch.setattr(store, "RESULTS", tmp_path)
    assert recipes.main(["--seeds", "2"]) == 0
    assert "left out: far: no folder nowhere in --data" in capsys.readouterr().out
    slug = str(machine.machine("cpu")["slug"])
    found = recipes.load(slug)
    assert (
        list(found) == ["names"]
        and found["names"]["command"] == f"train {tiny.recipe} epochs=1 {' '.join(tiny.options[1:])}"
    )
    first, second = found["names"]["seeds"]
    assert first["seqkern"] == pytest.approx(first["torch"], rel=0.05)
    assert first["seqkern"]["loss"] != second["seqkern"]["loss"]
    assert first["ratio"] > 0
    text = report.recipes_table(found)
    assert text.splitlines()[0].startswith("| recipe, cut short, 2 seeds | metric |")
    assert text.splitlines()[2].startswith("| names | accuracy | ")


def test_summary_of_seeds() -> None:
    seeds = [
        dict(seed=k, ratio=ratio, seqkern={"bleu": ours}, torch={"bleu": theirs})
        for k, (ratio, ours, theirs) in enumerate([(1.4, 0.30, 0.31), (1.7, 0.33, 0.29), (1.6, 0.30, 0.30)])
    ]
    got = recipes.summary({"seeds": seeds}, "bleu")
    assert got["ratio"] == 1.6 and got["spread"] == pytest.approx(0.02) and got["within"]
    seeds[0]["seqkern"]["bleu"] = 0.4
    assert not recipes.summary({"seeds": seeds}, "bleu")["within"]


def test_short_pairs() -> None:
    lines = [
        "I am cold.\tJ'ai froid.\tsource",
        "Go!\tVa !",
        f"He's {'very ' * 9}old.\tIl est vieux.",
        "I amble.\tJe vais.",
    ]
    assert recipes.short_pairs(lines) == ["i am cold .\tj ai froid ."]


@pytest.mark.parametrize("case", recipes.CASES, ids=lambda case: case.name)
def test_every_case_is_a_recipes(case: recipes.Case) -> None:
    assert recipes.metric_of(case) in {"accuracy", "nats", "f1", "bleu"}


# ---- errors in ulp, long runs ------------------------------------------------------------------------------


def test_errors_are_counted_in_units_of_the_last_place() -> None:
    eps = torch.finfo(torch.float32).eps
    exact = torch.tensor([1.0, 1.5, 4.0, -1.0, 1e-9, 1e300, 0.0], dtype=torch.float64)
    found = torch.tensor([1 + eps, 1.5, 4 + 8 * eps, -1 - 3 * eps, 0.0, float("inf"), 0.0])
    smallest = 4 * eps * eps  # of the largest that is held, in the last place
    assert numerics.ulp(found, exact, torch.float32).tolist() == pytest.approx(
        [1, 0, 2, 3, 1e-9 / smallest, 0]
    )
    got = numerics.errors(
        {"output0": torch.tensor([1 + eps, float("nan")]), "d_x": torch.tensor([1.0])},
        {"output0": torch.ones(2).double(), "d_x": torch.tensor([1e300]).double()},
        torch.float32,
    )
    assert got["output"] == {"max": 1.0, "mean": 1.0, "elements": 2, "not_finite": 1}
    assert got["gradient"] == {"max": None, "mean": None, "elements": 0, "not_finite": 0}


def test_errors_of_a_layer(tmp_path: pathlib.Path, monkeypatch) -> None:
    """From the command to the table; an ordinary case is about as good as its peer."""
    monkeypatch.setattr(store, "RESULTS", tmp_path)
    monkeypatch.setattr(numerics, "LONG", 20)
    assert numerics.main(["--only", "GRU"]) == 0
    found = numerics.load(str(machine.machine("cpu")["slug"]))
    assert len(found) == len(numerics.RANGES) * len(numerics.DTYPES)
    entry = found["GRU, ordinary, float32"]
    assert entry["seqkern"]["output"]["mean"] < 2 * entry["peer"]["output"]["mean"] < 100
    assert entry["seqkern"]["output"]["elements"] == 13 * 3 * 16
    assert "| GRU | ordinary | float32 | torch.nn | " in report.numerics_table(found)


@pytest.mark.parametrize("name", training.MODELS)
def test_long_runs_begin_alike(name: str) -> None:
    ours, theirs = (training.curve(name, layers, 0, training.WINDOW) for layers in (nn, torch.nn))
    assert ours == pytest.approx(theirs, rel=1e-3)
    assert ours != training.curve(name, torch.nn, 1, training.WINDOW)


def test_summary_of_long_runs() -> None:
    theirs = [[2.0, 1.0], [2.2, 1.2], [2.1, 1.4]]
    ours = [[2.0, 1.1], [2.2, 1.2], [2.1, 1.3]]
    got = training.summary(ours, theirs)
    assert got["worst"] == pytest.approx(0) and got["windows_beyond"] == 0 and got["windows"] == 2
    assert got["last_spread"] == pytest.approx(0.4)
    ours[0][1] = 4.0
    got = training.summary(ours, theirs)
    assert got["windows_beyond"] == 1 and got["worst"] == pytest.approx((6.5 - 3.6) / 3 / 0.4)
    assert "| 2.42; 1 of 2 beyond 1 |" in report.training_table({"a": {"steps": 100, "summary": got}})
