"""Every recipe with recurrent or attention layers on three seeds, on seqkern and on torch.nn.

    python -m bench.recipes --data PATH [--seeds 3] [--only NAME …]

Runs are cut short, to minutes. Each is `python -m seqkern train … --compare torch`: the twin starts from the
same parameters and learns from the same batches, one after the other. Results go to
bench/results/<CPU or GPU model>/recipes/seeds.json, by name; a run that is not repeated keeps its entry.

PATH has the folders that DATA names. A case whose folder is not there is left out, and said so.
"""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import json
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile
import unicodedata

from bench import machine, store
from seqkern.train import log


@dataclasses.dataclass(frozen=True)
class Case:
    """One cut-down run of a recipe. data: a folder below PATH, None for the corpus at hand."""

    name: str
    recipe: str
    options: tuple[str, ...] = ()
    data: str | None = None
    recurrent: bool = True

    @property
    def command(self) -> str:
        return " ".join(["train", self.recipe, *self.options])


SMALL = ("embed_dim=200", "hidden_size=128", "num_layers=1", "min_freq=2", "batch=16", "epochs=3")
PAIRS = ("source=eng", "target=fra", "units=3000", "epochs=5", "warmup=200")
CASES = (
    Case("names", "names", ("epochs=8",), "names"),
    Case("names-generate", "names", ("task=generate", "epochs=5"), "names"),
    Case("questions", "questions", data="trec"),
    Case("tagger-ner", "tagger", ("epochs=3",), "wnut17"),
    Case("tagger-pos", "tagger", ("task=pos", "epochs=1"), "ud_english_ewt"),
    Case("sentiment-lstm", "sentiment", ("model=lstm", *SMALL), "sst2"),
    Case("sentiment-gru", "sentiment", ("model=gru", *SMALL), "sst2"),
    Case("sentiment-lstm-attention", "sentiment", ("model=lstm-attention", *SMALL), "sst2"),
    Case("sentiment-gru-attention", "sentiment", ("model=gru-attention", *SMALL), "sst2"),
    Case("sentiment-transformer", "sentiment", ("model=transformer", *SMALL), "sst2", recurrent=False),
    Case("translate-gru", "translate", ("model=gru", *PAIRS), "eng-fra"),
    Case("translate-lstm", "translate", ("model=lstm", *PAIRS), "eng-fra"),
    Case("translate-transformer", "translate", ("model=transformer", *PAIRS), "eng-fra", recurrent=False),
    Case(
        *("char-lm", "char-lm", ("hidden_size=256", "epochs=1", "max_characters=400000"), "tinyshakespeare")
    ),
    Case("word-lm", "word-lm", ("embed_dim=200", "hidden_size=200", "epochs=2")),
    Case("elmo", "elmo", ("hidden_size=256", "epochs=1")),
)

SPEED_TARGET = 1.5  # of the recurrent ones, from the first update to the last

# Pairs as the sequence-to-sequence tutorial keeps them: both sides short, the English one beginning so.
LONGEST = 9
BEGINNINGS = tuple(
    f"{who} {verb} "
    for who, verbs in {
        "i": "am m",
        "he": "is s",
        "she": "is s",
        "you": "are re",
        "we": "are re",
        "they": "are re",
    }.items()
    for verb in verbs.split()
)


def plain(text: str) -> str:
    """Lower case without accents, words and . ! ? parted by spaces."""
    letters = unicodedata.normalize("NFD", text.lower().strip())
    letters = "".join(c for c in letters if unicodedata.category(c) != "Mn")
    return re.sub(r"[^a-z.!?]+", " ", re.sub(r"([.!?])", r" \1", letters)).strip()


def short_pairs(lines: list[str]) -> list[str]:
    """Of lines "English TAB French", the short ones."""
    kept = []
    for line in lines:
        pair = [plain(side) for side in line.split("\t")[:2]]
        if all(len(side.split()) <= LONGEST for side in pair) and pair[0].startswith(BEGINNINGS):
            kept.append("\t".join(pair))
    return kept


def prepared(case: Case, data: pathlib.Path | None, scratch: pathlib.Path) -> pathlib.Path | None:
    """Where the case's data are; FileNotFoundError where they are not."""
    if case.data is None:
        return None
    folder = (data or pathlib.Path()) / case.data
    if data is None or not folder.is_dir():
        raise FileNotFoundError(f"{case.name}: no folder {case.data} in --data")
    if case.data == "eng-fra":
        (source,) = folder.glob("fra.txt*")
        with gzip.open(source, "rt", encoding="utf-8") if source.suffix == ".gz" else source.open() as file:
            pairs = scratch / "pairs.tsv"
            pairs.write_text("\n".join(short_pairs(file.read().splitlines())) + "\n")
        return pairs
    files = list(folder.glob("*.txt*"))
    return files[0] if case.data == "tinyshakespeare" else folder


def run(case: Case, where: pathlib.Path | None, seed: int, scratch: pathlib.Path) -> dict[str, object]:
    """Both figures and the ratio of the rates, of one seed."""
    out = scratch / f"{case.name}-{seed}"
    command = [sys.executable, "-m", "seqkern", *case.command.split(), "--seed", str(seed)]
    command += ["--compare", "torch", "--out", str(out), *([] if where is None else ["--data", str(where)])]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    events = log.read(out / "log.jsonl")
    comparison = next(event for event in events if event["event"] == "comparison")
    shared = comparison["seqkern"].keys() - {"seconds", "targets_per_second"}
    return {
        "seed": seed,
        "ratio": comparison["ratio"],
        **{side: {key: comparison[side][key] for key in sorted(shared)} for side in ("seqkern", "torch")},
        "seconds": {side: comparison[side]["seconds"] for side in ("seqkern", "torch")},
    }


def summary(entry: dict[str, object], metric: str) -> dict[str, object]:
    """Means of the metric, the spread of torch.nn's over its seeds, and the median ratio of the rates."""
    seeds: list = entry["seeds"]
    ours, theirs = ([one[side][metric] for one in seeds] for side in ("seqkern", "torch"))
    difference = statistics.mean(ours) - statistics.mean(theirs)
    return {
        "metric": metric,
        "seqkern": statistics.mean(ours),
        "torch": statistics.mean(theirs),
        "spread": max(theirs) - min(theirs),
        "within": abs(difference) <= max(theirs) - min(theirs),
        "ratio": statistics.median(one["ratio"] for one in seeds),
    }


def metric_of(case: Case) -> str:
    from seqkern.train.config import with_options
    from seqkern.train.recipes import RECIPES

    entry = RECIPES[case.recipe]
    return entry.make(with_options(entry.config(), case.options)).metric


def path_of(slug: str) -> pathlib.Path:
    return store.RESULTS / slug / "recipes" / "seeds.json"


def load(slug: str) -> dict[str, dict]:
    path = path_of(slug)
    return json.loads(path.read_text()) if path.is_file() else {}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.recipes", description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", type=pathlib.Path, metavar="PATH")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=[case.name for case in CASES])
    options = parser.parse_args(argv)
    slug = str(machine.machine("cpu")["slug"])
    path, results = path_of(slug), load(slug)
    for case in CASES:
        if options.only and case.name not in options.only:
            continue
        with tempfile.TemporaryDirectory() as folder:
            scratch = pathlib.Path(folder)
            try:
                where = prepared(case, options.data, scratch)
            except FileNotFoundError as error:
                print(f"left out: {error}")
                continue
            seeds = [run(case, where, seed, scratch) for seed in range(options.seeds)]
        entry: dict[str, object] = {"command": case.command, "data": case.data, "seeds": seeds}
        entry |= {"recurrent": case.recurrent, "commit": machine.commit()["commit"]}
        entry["summary"] = summary(entry, metric_of(case))
        results[case.name] = entry
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results, indent=1) + "\n")
        print(case.name, json.dumps(entry["summary"]), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
