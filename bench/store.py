"""bench/results/<CPU or GPU model>/<stem>.json: what was measured, kept from run to run.

    {"schema": 1, "machine": {…}, "runs": {id: {date, commit, software, threads, limits, …}},
     "speed": [entry, …], "memory": [entry, …], "neighbour": [entry, …], "attention": [entry, …],
     "crf": [entry, …], "variants": [entry, …], "tiers": [entry, …]}

An entry has an "id" and the "run" that measured it. A new measurement replaces the entry of its id; a
case that fails its gate loses it (no number on a red test); a run that no entry points to any more goes.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterable

RESULTS = pathlib.Path(__file__).resolve().parent / "results"
SCHEMA = 1
COMPARED = ("attention", "crf", "variants")  # of entries with peers by name
KINDS = ("speed", "memory", "neighbour", *COMPARED, "tiers")
Document = dict[str, object]


def path_of(results: pathlib.Path, slug: str, stem: str) -> pathlib.Path:
    return results / slug / f"{stem.lower()}.json"


def load(path: pathlib.Path) -> Document:
    document = json.loads(path.read_text())
    if document.get("schema") != SCHEMA:
        raise ValueError(f"{path.name}: expected schema {SCHEMA}, got {document.get('schema')!r}")
    return document


def merge(
    old: Document | None,
    machine: Document,
    run: Document,
    new: dict[str, list[Document]],
    failed: Iterable[str] = (),
) -> Document:
    """`old` with the entries of `new` (kind -> entries) in place of those of the same id, without
    `failed`."""
    runs = dict(old["runs"]) if old else {}
    run_id = f"{run['date']} {run['commit'] or 'no commit'}{' dirty' if run.get('dirty') else ''}"
    runs[run_id] = run
    document: Document = {"schema": SCHEMA, "machine": machine}
    used = set()
    for kind in KINDS:
        entries = {entry["id"]: entry for entry in (old.get(kind, []) if old else [])}
        entries = {key: entry for key, entry in entries.items() if key not in set(failed)}
        entries |= {entry["id"]: entry | {"run": run_id} for entry in new.get(kind, [])}
        document[kind] = [entries[key] for key in sorted(entries)]
        used |= {entry["run"] for entry in entries.values()}
    document["runs"] = {key: runs[key] for key in sorted(used)}
    return document


def save(path: pathlib.Path, document: Document) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")
