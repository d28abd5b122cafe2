"""Everything made from bench/results/: tables, charts and the README's speed section. Measures nothing.

    python -m bench.report            prints the tables; renews README.md, and README.md and speed.png in
                                      results/<model>/
    python -m bench.report --check    prints nothing; exits 1 if a page is not what the JSON gives

A ratio is torch.nn's median time over seqkern's: above 1 seqkern is faster. ▼ means slower (the p20–p80
bands part), ≈ that the bands overlap.
"""

from __future__ import annotations

import argparse
import math
import pathlib
import re
import sys
from collections.abc import Iterable, Sequence

from bench import (
    attention,
    cases,
    crf,
    encoder_decoder,
    huggingface,
    limits,
    recipes,
    store,
    variants,
)
from bench.machine import QUIET, ROOT

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
README = ROOT / "README.md"
Entry = dict


class Results:
    """All documents of one machine (one per family), looked up by id.

    speed: id -> entry, for ids such as GRU-float32-c5-forward; memory and neighbour likewise.
    """

    def __init__(self, slug: str, documents: Iterable[store.Document]) -> None:
        self.slug = slug
        self.machine: Entry = {}
        self.runs: dict[str, Entry] = {}
        self.kinds: dict[str, dict[str, Entry]] = {kind: {} for kind in store.KINDS}
        for document in documents:
            self.machine = document["machine"]
            self.runs |= document["runs"]
            for kind in store.KINDS:
                self.kinds[kind] |= {entry["id"]: entry for entry in document.get(kind, [])}

    @property
    def speed(self) -> dict[str, Entry]:
        return self.kinds["speed"]

    def find(self, family: str, dtype: str, case: str, mode: str) -> Entry | None:
        return self.speed.get(f"{family}-{dtype}-{case}-{mode}")

    def limits_of(self, entry: Entry) -> Entry:
        return self.runs[entry["run"]]["limits"]


def load_all(results: pathlib.Path = store.RESULTS) -> list[Results]:
    folders = sorted(path for path in results.iterdir() if path.is_dir()) if results.is_dir() else []
    found = [
        Results(folder.name, [store.load(path) for path in sorted(folder.glob("*.json"))])
        for folder in folders
    ]
    return [one for one in found if any(one.kinds.values())]


# --- numbers -----------------------------------------------------------------------------------------------


def geometric_mean(ratios: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, ratios)) / len(ratios))


def target_mean(results: Results, target: cases.Target, mode: str) -> tuple[float | None, int]:
    """(geometric mean of the ratios that are there, how many are there)."""
    entries = [results.find(*cell, mode) for cell in target.cells]
    ratios = [entry["ratio"] for entry in entries if entry is not None]
    return (geometric_mean(ratios) if ratios else None), len(ratios)


def peak_share(results: Results, entry: Entry, key: str = "gflops") -> tuple[float, str] | None:
    """(achieved / limit, the limit's name) for an entry."""
    found = limits.peak(results.limits_of(entry), entry["dtype"])
    return (entry[key] / found[0], found[1]) if found else None


def floor_ratio(results: Results, entry: Entry, side: str = "seqkern") -> float | None:
    """Time over reading W_hh from cache once a step, for the batch-1 cases."""
    rate = results.limits_of(entry).get(f"read_{entry.get('recurrent_bytes')}")
    if not rate:
        return None
    return entry[side]["median"] / (entry["steps"] * entry["recurrent_bytes"] / (rate * 1e9))


def compared(results: Results) -> list[Entry]:
    """What has peers by name."""
    return [entry for kind in store.COMPARED for entry in results.kinds[kind].values()]


def whole_passes(results: Results) -> list[Entry]:
    """All that was measured but backward passes on their own, which are on the machine's page only."""
    found = [*results.speed.values(), *compared(results)]
    return [entry for entry in found if entry["mode"] != "backward"]


def slower(results: Results) -> list[Entry]:
    """Whole passes that lose to torch.nn (attention: to its fastest peer; CRF: to pytorch-crf; variants: to a
    loop)."""
    return [entry for entry in whole_passes(results) if entry["verdict"] == "slower"]


# --- markdown ----------------------------------------------------------------------------------------------


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def ratio_cell(entry: Entry | None) -> str:
    if entry is None:
        return ""
    text = f"{entry['ratio']:.2f}×"
    return {"slower": f"**{text} ▼**", "even": f"{text} ≈", "faster": text}[entry["verdict"]]


def verdict_cell(
    value: float | None, goal: float | None, at_most: bool = False, form: str = "{:.2f}×"
) -> str:
    """ "3.41× (goal 3.20× ✓)"."""
    if value is None:
        return ""
    text = form.format(value)
    if goal is None:
        return text
    met = value <= goal if at_most else value >= goal
    return f"{text} ({'≤' if at_most else '≥'} {form.format(goal)} {'✓' if met else '✗'})"


def seconds(value: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if value >= scale or unit == "µs":
            return f"{value / scale:.3g} {unit}" if value < 999.5 * scale else f"{value / scale:.0f} {unit}"
    raise AssertionError


def machine_line(results: Results) -> str:
    machine, newest = results.machine, results.runs[max(results.runs)]
    name = str(machine["model"])
    if machine["device"] == "cpu":
        if "family" in machine:
            numbers = f"family {machine['family']}, model {machine['model_number']}"
            name += f" ({numbers}, {machine['instruction_set']})"
        name += f", cores: {machine['cores']}, threads: {newest['threads']}"
    software = newest["software"]
    parts = [name, f"torch {software['torch']}"]
    if software.get("onednn"):
        parts.append(f"oneDNN {software['onednn']}")
    commits = sorted(
        {
            f"{run['date'][:10]} at {run['commit']}{' (dirty)' if run['dirty'] else ''}"
            for run in results.runs.values()
        }
    )
    busy = max(run.get("busy_elsewhere") or 0 for run in results.runs.values())
    if busy > QUIET:
        commits.append(f"other processes taking {busy:.0%} of the cores (not to be relied on)")
    return ", ".join([*parts, " and ".join(commits)])


def limits_line(results: Results) -> str:
    newest = results.runs[max(results.runs)]["limits"]
    parts = [f"FMA peak {newest['fma_peak']:.0f} GF/s"] if "fma_peak" in newest else []
    parts += [
        f"best {key.removeprefix('gemm_')} GEMM {value:.0f} GF/s"
        for key, value in newest.items()
        if key.startswith("gemm_")
    ]
    return "Limits measured in the same run: " + ", ".join(parts) + "." if parts else ""


def target_table(results: Results) -> str:
    rows = []
    on_gpu = results.machine["device"] == "cuda"
    for target in cases.GPU_TARGETS if on_gpu else cases.TARGETS:
        row = [target.title]
        for mode, goal in (("forward", target.forward), ("training", target.training)):
            mean, count = target_mean(results, target, mode)
            if count == len(target.cells):
                row.append(verdict_cell(mean, goal))
            else:
                row.append(f"{mean:.2f}× ({count} of {len(target.cells)} cases)" if mean is not None else "")
        if any(row[1:]):
            rows.append(row)
    if on_gpu and results.speed:
        row = ["the worst of all cases"]
        for mode in ("forward", "training"):
            worst = min((e["ratio"] for e in results.speed.values() if e["mode"] == mode), default=None)
            row.append(verdict_cell(worst, cases.GPU_WORST_TARGET))
        rows.append(row)
        best = results.find(*cases.BEST[0], "forward")
        if best is not None:
            steps = cases.BY_NAME[best["case"]].T
            step = 1e6 * best["seqkern"]["median"] / steps
            goal = verdict_cell(step, cases.GPU_STEP_TARGET, at_most=True, form="{:.2f} µs")
            rows.append(["a step of cuDNN's best case", goal, ""])
    return table(["geometric mean", "forward", "forward + backward"], rows) if rows else ""


def gpu_tables(results: Results) -> str:
    """A table per group of GPU cases: ratio, and seqkern's µs per step and layer."""
    groups: dict[str, list[str]] = {}
    for case in cases.GPU_CASES:
        for form in ("", "-lengths", "-packed") if case.kind == "ragged" else ("",):
            groups.setdefault(case.name[0], []).append(case.name + form)
    return "\n\n".join(text for names in groups.values() if (text := gpu_table(results, names)))


def gpu_table(results: Results, names: Sequence[str]) -> str:
    columns = [
        (family, dtype)
        for family in ("LSTM", "GRU", "RNN")
        for dtype in ("float16", "bfloat16", "float32")
        if any(results.find(family, dtype, name, "forward") for name in names)
    ]
    rows = []
    for name in names:
        case = cases.BY_NAME[name.removesuffix("-lengths").removesuffix("-packed")]
        cells = []
        for family, dtype in columns:
            pair = [results.find(family, dtype, name, mode) for mode in ("forward", "training")]
            cells.append(" / ".join(gpu_cell(entry, case) for entry in pair if entry))
        if any(cells):
            rows.append([f"{name} ({case.describe()})", *cells])
    head = [f"{family} {DTYPES[dtype]}" for family, dtype in columns]
    title = "case (B, T, I, H, layers): fwd / fwd+bwd, µs per step and layer"
    return table([title, *head], rows) if rows else ""


def gpu_cell(entry: Entry, case: cases.Case) -> str:
    return f"{ratio_cell(entry)} {1e6 * entry['seqkern']['median'] / case.T / case.layers:.2f}"


def tier_table(results: Results) -> str:
    """Every tier's time, forced by name, for the cost model of csrc/cuda/plan.cpp."""
    found = results.kinds["tiers"]
    tiers = [tier for tier in cases.TIERS if any(entry["tier"] == tier for entry in found.values())]
    times: dict[str, dict[str, str]] = {}
    for entry in found.values():
        name = f"{entry['family']}-{entry['dtype']}-{entry['case']}-{entry['mode']}"
        times.setdefault(name, {})[entry["tier"]] = f"{entry['step_us']:.2f}"
    rows = [[name, *(row.get(tier, "") for tier in tiers)] for name, row in sorted(times.items())]
    return table(["µs per step, tier forced", *tiers], rows) if rows else ""


def case_table(results: Results, columns: Sequence[tuple[str, str]], names: Sequence[str]) -> str:
    """Ratios, a row per case; columns: (family, dtype), each forward and training."""
    columns = [c for c in columns if any(results.find(*c, name, "forward") for name in names)]
    rows = []
    for name in names:
        cells = [
            ratio_cell(results.find(*column, name, mode))
            for column in columns
            for mode in ("forward", "training")
        ]
        if any(cells):
            rows.append([f"{name} ({cases.BY_NAME[name].describe()})", *cells])
    head = [
        f"{family}{' ' + DTYPES[dtype] if dtype != 'float32' else ''} {mode}"
        for family, dtype in columns
        for mode in ("fwd", "fwd+bwd")
    ]
    return table(["case (B, T, I, H, layers)", *head], rows) if rows else ""


DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def ragged_table(results: Results) -> str:
    rows = []
    for family in cases.FAMILIES:
        cells, packing = [], ""
        for form in ("lengths", "packed"):
            for mode in ("forward", "training"):
                entry = results.find(family, "float32", f"c9-{form}", mode)
                cells.append(ratio_cell(entry))
                if entry is not None and mode == "forward":
                    packing = (
                        f"{seconds(entry['torch_packing']['median'])} of {seconds(entry['torch']['median'])}"
                    )
        if any(cells):
            rows.append([family, *cells, packing])
    head = [
        "c9, ragged",
        "`lengths` fwd",
        "fwd+bwd",
        "PackedSequence fwd",
        "fwd+bwd",
        "torch's packing, beside its layer (fwd)",
    ]
    return table(head, rows) if rows else ""


def step_table(results: Results) -> str:
    names = {
        "c10-b1": "layer, B 1",
        "c10-b16": "layer, B 16",
        "c10-cell-b1": "cell, B 1",
        "c10-cell-b16": "cell, B 16",
    }
    rows = []
    for family in cases.FAMILIES:
        entries = [results.find(family, "float32", name, "forward") for name in names]
        if any(entries):
            rows.append(
                [
                    family,
                    *(f"{ratio_cell(e)} ({seconds(e['seqkern']['median'])})" if e else "" for e in entries),
                ]
            )
    return table(["c10, one step", *names.values()], rows) if rows else ""


def limit_table(results: Results) -> str:
    rows = []
    for family in cases.FAMILIES:
        row = [family]
        for case in ("c5", "c6"):
            entry = results.find(family, "float32", case, "forward")
            share = peak_share(results, entry) if entry else None
            theirs = peak_share(results, entry, "torch_gflops") if entry else None
            goal = cases.PEAK_TARGETS[case] if share and share[1] == "FMA peak" else None
            row.append(
                f"{verdict_cell(share[0], goal, form='{:.0%}')}, torch.nn {theirs[0]:.0%}"
                if share and theirs
                else ""
            )
        entry = results.find(family, "float32", "c7", "forward")
        ours, theirs_ = (
            (floor_ratio(results, entry), floor_ratio(results, entry, "torch")) if entry else (None, None)
        )
        floor = verdict_cell(ours, cases.FLOOR_TARGET, at_most=True)
        row.append(f"{floor}, torch.nn {theirs_:.2f}×" if ours and theirs_ else "")
        if any(row[1:]):
            rows.append(row)
    shares = [peak_share(results, e) for e in results.speed.values() if e["dtype"] == "float32"]
    name = next((share[1] for share in shares if share), "peak")
    head = [
        "against the limit, fp32 forward",
        f"c5, of the {name}",
        f"c6, of the {name}",
        "c7, over reading W_hh once a step",
    ]
    return table(head, rows) if rows else ""


def memory_table(results: Results) -> str:
    rows = []
    for family in cases.FAMILIES:
        cells = []
        for case in cases.MEMORY:
            entry = results.kinds["memory"].get(f"{family}-float32-{case}-memory")
            mib = 2**20
            cells.append(
                f"{entry['seqkern'] / mib:.0f} / {entry['torch'] / mib:.0f} MiB"
                f"{'' if entry['seqkern'] <= entry['torch'] else ' ✗'}"
                if entry
                else ""
            )
        if any(cells):
            rows.append([family, *cells])
    return table(["peak of a training step, seqkern / torch.nn", *cases.MEMORY], rows) if rows else ""


def neighbour_table(results: Results) -> str:
    rows = []
    for family in cases.FAMILIES:
        for mode, title in (("forward", "fwd"), ("training", "fwd+bwd")):
            cells = []
            for case in cases.NEIGHBOUR:
                entry = results.kinds["neighbour"].get(f"{family}-float32-{case}-{mode}")
                if entry is None:
                    cells.append("")
                    continue
                ours = entry["seqkern"]["ratio"]
                bad = " ✗" if ours > cases.NEIGHBOUR_TARGET else ""
                cells.append(f"{ours:.2f}×{bad} / {entry['torch']['ratio']:.2f}×")
            if any(cells):
                rows.append([f"{family} {title}", *cells])
    return table(["one core busy ÷ alone, seqkern / torch.nn", *cases.NEIGHBOUR], rows) if rows else ""


def find_attention(results: Results, dtype: str, case: str, mode: str) -> Entry | None:
    return results.kinds["attention"].get(f"{attention.FAMILY}-{dtype}-{case}-{mode}")


def attention_targets(results: Results) -> str:
    """What MultiHeadAttention is held to on a CPU; "lengths" leaves padded queries out too."""
    if results.machine["device"] != "cpu":
        return ""
    rows = []
    for target in attention.TARGETS:
        entries = [
            find_attention(results, "float32", f"{target.case}{form}", "training")
            for form in ("", "-lengths")
        ]
        if entries[0] is not None:
            rows.append(
                [target.title, verdict_cell(entries[0]["ratio"], target.ratio), ratio_cell(entries[1])]
            )
    head = ["MultiHeadAttention (B, L, N, E), fwd+bwd", "`key_padding_mask`", "`lengths`, `query_lengths`"]
    return table(head, rows) if rows else ""


def attention_table(results: Results) -> str:
    """MultiHeadAttention, forward / forward + backward, by kind of mask."""
    variants = {
        "full": "",
        "causal": "-causal",
        "padded": "-padded",
        "padded, causal": "-padded-causal",
    }
    columns = {title: (suffix, "") for title, suffix in variants.items()}
    columns |= {f"{title}, `lengths`": (suffix, "-lengths") for title, suffix in list(variants.items())[2:]}
    rows = []
    for dtype, short in DTYPES.items():
        for name, shape in attention.SHAPES.items():
            for weights in ("", "-weights"):
                cells = []
                for suffix, form in columns.values():
                    pair = [
                        ratio_cell(find_attention(results, dtype, f"{name}{suffix}{weights}{form}", mode))
                        for mode in ("forward", "training")
                    ]
                    cells.append(" / ".join(pair) if any(pair) else "")
                if any(cells):
                    rows.append([f"{shape} {short}{', weights' * bool(weights)}", *cells])
    head = ["MultiHeadAttention (B, L, N, E), fwd / fwd+bwd", *columns]
    return table(head, rows) if rows else ""


def attention_functions(results: Results) -> str:
    """scaled_dot_product_attention against its fastest peer."""
    unit, scale = ("TFLOP/s", 1e3) if results.machine["device"] == "cuda" else ("GF/s", 1)
    rows = []
    for entry in results.kinds["attention"].values():
        if entry["level"] == "function" and entry["mode"] != "backward":
            rates = f"{entry['gflops'] / scale:.0f} / {entry['best_gflops'] / scale:.0f}"
            name = f"{entry['case']} ({entry['shape']}) {DTYPES[entry['dtype']]} {entry['mode']}"
            rows.append([name, ratio_cell(entry), entry["best"], rates])
    head = ["scaled_dot_product_attention", "ratio", "its fastest peer", f"{unit}, seqkern / peer"]
    return table(head, rows) if rows else ""


def encoder_decoder_table(results: Results) -> str:
    """Additive attention and the decoder with it, against the formula in eager PyTorch."""
    rows = []
    for case in encoder_decoder.CASES:
        name, goal = encoder_decoder.TARGET
        cells = []
        for mode in ("forward", "training"):
            entry = results.kinds["attention"].get(f"{encoder_decoder.FAMILY}-float32-{case.name}-{mode}")
            if entry is not None and case.name == name and mode == "training":
                cells.append(verdict_cell(entry["ratio"], goal))
            else:
                cells.append(ratio_cell(entry))
        if any(cells):
            rows.append([case.describe(), *cells])
    head = ["additive attention, decoders (B, L, S, H), to the eager formula", "fwd", "fwd+bwd"]
    return table(head, rows) if rows else ""


def huggingface_table(results: Results) -> str:
    """Hugging Face models, by their attention."""
    rows = []
    for case in huggingface.CASES:
        row: list[str] = []
        for mode in ("forward", "training"):
            entry = results.kinds["attention"].get(f"{huggingface.FAMILY}-float32-{case.name}-{mode}")
            for peer in huggingface.PEERS:
                if entry is None:
                    row.append("")
                    continue
                ratio = entry["peers"][peer]["median"] / entry["seqkern"]["median"]
                goal = huggingface.TARGET if case.padded and peer == "sdpa" else None
                row.append(verdict_cell(ratio, goal))
        if any(row):
            rows.append([case.describe(), *row])
    parts = [f"{part}, to {peer}" for part in ("fwd", "fwd+bwd") for peer in huggingface.PEERS]
    head = ["Hugging Face models of two layers (B, L, E, N)", *parts]
    return table(head, rows) if rows else ""


def crf_table(results: Results) -> str:
    """The conditional random field against pytorch-crf."""
    found, rows = results.kinds["crf"], []
    for dtype, case in crf.CELLS:
        cells = []
        for mode in crf.MODES:
            entry = found.get(f"{crf.FAMILY}-{dtype}-{case.name}-{mode}")
            goal = crf.TARGETS.get((case.name, mode)) if dtype == "float32" else None
            if entry is not None and goal is not None and results.machine["device"] == "cpu":
                cells.append(verdict_cell(entry["ratio"], goal))
            else:
                cells.append(ratio_cell(entry))
        if any(cells):
            rows.append([f"{case.describe()} {'fp64' if dtype == 'float64' else 'fp32'}", *cells])
    peers = sorted({entry["best"] for entry in found.values()})
    head = [f"CRF (B, T, K), against {' and '.join(peers)}", "forward", "fwd+bwd", "decode"]
    return table(head, rows) if rows else ""


def variants_table(results: Results) -> str:
    """The recurrent variants against eager loops, and what they cost beside LSTM, GRU or RNN."""
    found, rows = results.kinds["variants"], []
    on_cpu = results.machine["device"] == "cpu"
    peer, key, goal = (
        (variants.CELLS, "to_cells", variants.CELLS_TARGET)
        if on_cpu
        else (variants.STEPS, "to_steps", variants.STEPS_TARGET)
    )
    for dtype, case in variants.cells("cpu" if on_cpu else "cuda"):
        row: list[str] = []
        for mode in variants.MODES:
            entry = found.get(f"{variants.FAMILY}-{dtype}-{case.name}-{mode}")
            if entry is None:
                row += [""] * 3
                continue
            held = None if on_cpu and mode == "forward" else goal
            work = "by FLOPs" if on_cpu else "by exchanges"
            row += [
                verdict_cell(entry.get(key), held),
                ratio_cell(entry),
                f"{entry['to_base']:.2f} of {entry['base']}, {entry['scaled']:.2f} {work}",
            ]
        if any(row):
            name = case.variant if on_cpu else f"{case.variant} {DTYPES[dtype]}"
            rows.append([f"{name} ({case.describe()})", *row])
    head = ["variant (B, T, I, H)"]
    for part in ("forward", "fwd+bwd"):
        head += [f"{part} to {peer}", f"to {variants.LOOP}", "its time"]
    return table(head, rows) if rows else ""


def recipes_table(found: dict[str, dict]) -> str:
    """Recipes trained on both libraries' layers: figures of all seeds, and the speed."""
    rows = []
    for case in recipes.CASES:
        entry = found.get(case.name)
        if entry is None:
            continue
        got = entry["summary"]
        both = f"{got['seqkern']:.4f} / {got['torch']:.4f}"
        verdict = f"{got['spread']:.4f} {'✓' if got['within'] else '✗'}"
        goal = recipes.SPEED_TARGET if case.recurrent else None
        rows.append([case.name, got["metric"], both, verdict, verdict_cell(got["ratio"], goal)])
    seeds = {len(entry["seeds"]) for entry in found.values()}
    head = [
        f"recipe, cut short, {'–'.join(map(str, sorted(seeds)))} seeds",
        *("metric", "seqkern / torch.nn, means", "torch.nn's spread", "speed of training"),
    ]
    return table(head, rows) if rows else ""


def numerics_table(found: dict[str, dict]) -> str:
    """Errors in units in the last place: of outputs and of gradients, seqkern's and the peer's."""
    rows = []
    for entry in found.values():
        row = [entry["layer"], entry["range"], entry["dtype"], entry["peer_is"]]
        for part in ("output", "gradient"):
            for figure in ("mean", "max"):
                row.append(" / ".join(_ulps(entry[side][part], figure) for side in ("seqkern", "peer")))
        rows.append(row)
    head = ["layer", "inputs", "dtype", "peer"]
    head += [f"{part}, {figure}" for part in ("outputs", "gradients") for figure in ("mean", "largest")]
    return table(head, rows) if rows else ""


def training_table(found: dict[str, dict]) -> str:
    """Long runs: the losses of both at the end, and how far apart the curves are at most."""
    rows = []
    for name, entry in found.items():
        got = entry["summary"]
        beyond = f"{got['worst']:.2f}; {got['windows_beyond']} of {got['windows']} beyond 1"
        last = f"{got['last_seqkern']:.4f} / {got['last_torch']:.4f}"
        rows.append([name, str(entry["steps"]), last, f"{got['last_spread']:.4f}", beyond])
    head = ["model", "steps", "last loss, seqkern / torch.nn", "spread", "largest distance in spreads"]
    return table(head, rows) if rows else ""


def _ulps(errors: Entry, figure: str) -> str:
    if errors["elements"] == 0:
        return "–"
    if errors[figure] is None:
        return "none finite"
    lost = f" ({errors['not_finite']} of {errors['elements']} not finite)" if errors["not_finite"] else ""
    return f"{errors[figure]:.3g}{lost if figure == 'max' else ''}"


def losses_line(results: Results) -> str:
    measured, lost = whole_passes(results), slower(results)
    if not lost:
        return f"Slower than torch.nn in none of {len(measured)} measurements."
    names = ", ".join(
        f"{entry['id']} ({entry['ratio']:.2f}×)" for entry in sorted(lost, key=lambda e: e["ratio"])
    )
    return f"Slower than torch.nn in {len(lost)} of {len(measured)} measurements: {names}."


def readme_section(everything: Sequence[Results]) -> str:
    """What stands between the README's two markers."""
    return "\n\n".join(machine_section(results) for results in everything)


def machine_section(results: Results) -> str:
    page = f"bench/results/{results.slug}"
    half = [(family, dtype) for dtype in ("bfloat16", "float16") for family in ("GRU", "LSTM")]
    parts = [
        f"**{machine_line(results)}.** ▼ slower, ≈ within the spread (p20–p80). {limits_line(results)} "
        f"[Times and spreads]({page}/README.md).".replace("  ", " "),
        target_table(results),
        losses_line(results),
        case_table(results, [(family, "float32") for family in cases.FAMILIES], cases.MAIN),
        case_table(results, half, cases.MAIN),
        gpu_tables(results),
        ragged_table(results),
        step_table(results),
        limit_table(results),
        memory_table(results),
        neighbour_table(results),
        attention_targets(results),
        attention_table(results),
        attention_functions(results),
        encoder_decoder_table(results),
        huggingface_table(results),
        crf_table(results),
        variants_table(results),
        recipes_table(recipes.load(results.slug)),
        f"![Speed relative to torch.nn, by case]({page}/speed.png)",
    ]
    return "\n\n".join(part for part in parts if part)


def detail_page(results: Results) -> str:
    """results/<model>/README.md: every measurement with times and spread."""
    rows = []
    for entry in sorted(
        results.speed.values(), key=lambda e: (e["family"], e["dtype"], natural(e["case"]), e["mode"])
    ):
        share = peak_share(results, entry)
        times = [
            f"{seconds(entry[side]['median'])} ({seconds(entry[side]['p20'])}–{seconds(entry[side]['p80'])})"
            for side in ("torch", "seqkern")
        ]
        parity = entry["parity"]
        rows.append(
            [
                entry["id"],
                ratio_cell(entry),
                *times,
                str(entry["seqkern"]["rounds"]),
                f"{entry['gflops']:.0f}",
                f"{share[0]:.0%}" if share else "",
                f"{parity['worst']}: {parity['error']:.2g} (torch.nn {parity['torch_error']:.2g})",
            ]
        )
    head = [
        "case",
        "ratio",
        "torch.nn (p20–p80)",
        "seqkern (p20–p80)",
        "rounds",
        "GF/s",
        "of the limit",
        "closest to its bound",
    ]
    for entry in compared(results):
        spreads = [entry["peers"][entry["best"]], entry["seqkern"]]
        times = [f"{seconds(s['median'])} ({seconds(s['p20'])}–{seconds(s['p80'])})" for s in spreads]
        parity = entry["parity"]
        rows.append(
            [
                entry["id"],
                ratio_cell(entry),
                f"{entry['best']} {times[0]}",
                times[1],
                str(entry["seqkern"]["rounds"]),
                f"{entry['gflops']:.0f}",
                "",
                f"{parity['worst']}: {parity['error']:.2g} (torch {parity['torch_error']:.2g})",
            ]
        )
    text = (
        f"# {results.machine['model']}\n\n"
        "Generated by `python -m bench.report` from the JSON beside it: do not edit.\n\n"
        f"{machine_line(results)}.\n{limits_line(results)}\n\n"
        "Limit: the FMA peak for float32 where it was measured, else the best GEMM of the data type. Last\n"
        "column: the output or gradient that came closest to its error bound in the gate, with its error.\n\n"
    )
    tiers = tier_table(results)
    return text + table(head, rows) + "\n" + (f"\n{tiers}\n" if tiers else "")


def natural(case: str) -> list[tuple[int, str]]:
    """c2 before c10."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", case)]


def renew(readme: str, section: str) -> str:
    """`readme` with `section` between its markers. Raises: ValueError unless both are there, in order."""
    begin, end = readme.find(BEGIN), readme.find(END)
    if readme.count(BEGIN) != 1 or readme.count(END) != 1 or begin > end:
        raise ValueError(f"README.md: expected one {BEGIN} and after it one {END}")
    return readme[: begin + len(BEGIN)] + ("\n" + section if section else "") + "\n" + readme[end:]


# --- charts ------------------------------------------------------------------------------------------------


def draw(results: Results, path: pathlib.Path) -> None:
    """speed.png: ratios by case, a panel per family and mode, a bar per data type, a line at 1."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    colours = {"float32": "#2f6f9f", "bfloat16": "#d98c3f", "float16": "#6a9f4f"}
    modes = (("forward", "forward"), ("training", "forward + backward"))
    figure, axes = pyplot.subplots(
        len(cases.FAMILIES), 2, figsize=(11, 8.5), squeeze=False, layout="constrained"
    )
    for row, family in zip(axes, cases.FAMILIES, strict=True):
        for axis, (mode, title) in zip(row, modes, strict=True):
            entries = [e for e in results.speed.values() if e["family"] == family and e["mode"] == mode]
            names = sorted({e["case"] for e in entries}, key=natural)
            dtypes = [dtype for dtype in colours if any(e["dtype"] == dtype for e in entries)]
            width = 0.8 / max(1, len(dtypes))
            for index, dtype in enumerate(dtypes):
                mine = [e for e in entries if e["dtype"] == dtype]
                at = [names.index(e["case"]) + (index - (len(dtypes) - 1) / 2) * width for e in mine]
                ratios = [e["ratio"] for e in mine]
                low = [e["ratio"] - e["torch"]["p20"] / e["seqkern"]["p80"] for e in mine]
                high = [e["torch"]["p80"] / e["seqkern"]["p20"] - e["ratio"] for e in mine]
                spread = [[max(0.0, v) for v in low], [max(0.0, v) for v in high]]
                axis.bar(
                    at,
                    ratios,
                    width,
                    yerr=spread,
                    color=colours[dtype],
                    label=DTYPES[dtype],
                    error_kw={"elinewidth": 0.8, "capsize": 1.5},
                )
            axis.set_xlim(-0.6, max(len(names), 8) - 0.4)
            axis.axhline(1, color="black", linewidth=0.8)
            axis.set_title(f"{family}, {title}", fontsize=10)
            axis.set_xticks(range(len(names)), names, rotation=45, fontsize=7)
            axis.set_ylabel("torch.nn ÷ seqkern", fontsize=8)
            axis.spines[["top", "right"]].set_visible(False)
            if dtypes:
                axis.legend(fontsize=7, frameon=False)
    figure.suptitle(
        f"{results.machine['model']}: times faster than torch.nn (bars over 1), p20–p80", fontsize=11
    )
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


# --- the command -------------------------------------------------------------------------------------------


def pages(
    everything: Sequence[Results], results: pathlib.Path, readme: pathlib.Path
) -> dict[pathlib.Path, str]:
    """path -> text of every generated page."""
    written = {results / one.slug / "README.md": detail_page(one) for one in everything}
    written[readme] = renew(readme.read_text(), readme_section(everything))
    return written


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=pathlib.Path, default=store.RESULTS)
    parser.add_argument("--readme", type=pathlib.Path, default=README)
    parser.add_argument(
        "--check", action="store_true", help="exit 1 if a page is not what the JSON gives; write nothing"
    )
    options = parser.parse_args(argv)
    everything = load_all(options.results)
    written = pages(everything, options.results, options.readme)
    stale = [path for path, text in written.items() if not path.exists() or path.read_text() != text]
    if options.check:
        for path in stale:
            print(f"{path.name}: not what bench/results/ gives; run python -m bench.report", file=sys.stderr)
        return 1 if stale else 0
    for path in stale:
        path.write_text(written[path])
    print(readme_section(everything) or "no results yet: run pytest bench/ --benchmark")
    try:
        for one in everything:
            draw(one, options.results / one.slug / "speed.png")
    except ImportError:
        print("\ncharts not drawn: matplotlib is missing (pip install matplotlib)", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
