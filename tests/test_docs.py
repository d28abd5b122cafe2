"""The pages against the code: names, recipes, defaults and commands exist as told, and the Python runs."""

import importlib
import inspect
import io
import json
import re
import shlex
import subprocess
import sys
from contextlib import redirect_stdout
from functools import cache, reduce
from pathlib import Path

import pytest
import torch
from torch import nn

import seqkern
import seqkern.text
from seqkern import models, ops
from seqkern.__main__ import COMMANDS
from seqkern.__main__ import main as seqkern_main
from seqkern.ops import _backend
from seqkern.text import Vocabulary
from seqkern.train import checkpoint
from seqkern.train.config import with_options
from seqkern.train.recipes import RECIPES, Recipe, restore

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
API, GUIDE, KERNELS, MIGRATION, MODELS, SUPPORT = (
    (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
    for name in ("api", "guide", "kernels", "migration", "models", "support")
)


def blocks(text: str, language: str) -> list[str]:
    """The code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def table(first: str, page: str = MODELS) -> list[list[str]]:
    """The cells of the rows below the head that begins with `first`."""
    (found,) = re.findall(rf"^\| {first}.*\n\|[-:| ]+\n((?:\|.*\n)+)", page, re.MULTILINE)
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in found.splitlines()]


def quoted(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


TUTORIALS = table(r"\| name there")
OTHERS = table("here")
DEFAULTS = table("recipe")


def resolve(name: str) -> object:
    """`seqkern.nn.GRU`, or a name of seqkern.models."""
    parts = name.removeprefix("seqkern.").split(".") if name.startswith("seqkern.") else ["models", name]
    return reduce(getattr, parts, seqkern)


def made(command: str) -> Recipe:
    """The recipe of "tagger task=pos"."""
    name, *options = command.split()
    return RECIPES[name].make(with_options(RECIPES[name].config(), options))


@cache
def parts_of(command: str) -> set[str]:
    """The classes' names of all modules of a recipe's model, with vocabularies that need no data."""
    recipe = made(command)
    tokens = Vocabulary(["a", "b"], specials=("<unk>", "<pad>"))
    tags = Vocabulary(["B-X", "I-X", "O"], specials=(), default=None)
    recipe.vocabularies = {"tokens": tokens, "labels": tags, "tags": tags, "characters": tokens}
    recipe.make()
    return {type(module).__name__ for module in recipe.model.modules()}


def test_every_name_exists() -> None:
    names = [name for _, _, here, *_ in TUTORIALS for name in quoted(here)]
    assert len(names) == len(TUTORIALS)
    names += [name for here, *_ in OTHERS for name in quoted(here)]
    names += re.findall(r"`(seqkern\.nn\.\w+)`", MODELS)
    for name in names:
        assert callable(resolve(name)), name
        assert name.startswith("seqkern.nn.") or name in models.__all__, name
    for name in [*re.findall(r"seqkern\.text\.(\w+)", MODELS), "clean_text", "pad_sequences"]:
        assert hasattr(seqkern.text, name), name
    assert f"{restore.__module__}.restore({checkpoint.load.__module__}.load(path))" in MODELS


def test_every_model_is_in_one_table() -> None:
    tutorials = {name for _, _, here, *_ in TUTORIALS for name in quoted(here)}
    others = [name for here, *_ in OTHERS for name in quoted(here)]
    assert not tutorials & set(others)
    assert len(others) == len(set(others))
    assert {name for name in tutorials if "." not in name} | set(others) == set(models.__all__)


def test_every_letter_is_introduced() -> None:
    letters = {letter for row in TUTORIALS for letter in row[0].split(", ")}
    assert letters == set(re.findall(r"^- \*\*(\w)\*\*", MODELS, re.MULTILINE))


# (names here, command) of each row and recipe
TRAINED = [
    (quoted(row[-3]), command)
    for row in [*(row[2:] for row in TUTORIALS), *OTHERS]
    for command in quoted(row[-1])
]


@pytest.mark.parametrize(("names", "command"), TRAINED, ids=lambda value: str(value).strip("[]"))
def test_recipes_train_what_the_tables_say(names: list[str], command: str) -> None:
    assert parts_of(command) & set(names), sorted(parts_of(command))


def test_models_without_a_recipe_have_none() -> None:
    built = set.union(*(parts_of(command) for _, command in TRAINED)) & set(models.__all__)
    said = {name for names, _ in TRAINED for name in names}
    assert built == said - {"CharacterOptions"}  # no module


def test_every_recipe_is_described() -> None:
    headings = re.findall(r"^### (.+)$", MODELS, re.MULTILINE)
    assert headings == list(RECIPES)
    assert {quoted(row[0])[0].split()[0] for row in DEFAULTS} == set(RECIPES)
    assert {command.split()[0] for _, command in TRAINED} == set(RECIPES)


@pytest.mark.parametrize("row", DEFAULTS, ids=lambda row: row[0].strip("`"))
def test_defaults_are_as_told(row: list[str]) -> None:
    command, model, training, metric = row
    recipe = made(*quoted(command))
    told = [option for option in quoted(model) + quoted(training) if "=" in option]
    assert told
    assert with_options(recipe.config, [*told, "optimizer=adam"]) == recipe.config
    assert quoted(metric) == [recipe.metric]


def test_defaults_in_the_text_are_as_told() -> None:
    sections = re.split(r"^### (.+)$", MODELS.split("\n## Runs")[0], flags=re.MULTILINE)[1:]
    choices = {"model", "task"}
    for name, text in zip(sections[::2], sections[1::2], strict=True):
        config = RECIPES[name].config()
        for option in re.findall(r"`(\w+=[^` ]+)`", text):
            changed = with_options(config, [option])
            if option.split("=")[0] not in choices:
                assert changed == config, f"{name}: {option}"
    orthogonal = {name for name, entry in RECIPES.items() if entry.config().orthogonal}
    assert orthogonal == {"sentiment", "names", "questions", "tagger"}


@pytest.mark.parametrize(
    "line",
    [
        line
        for path in PAGES
        for block in blocks(path.read_text(encoding="utf-8"), "sh")
        for line in block.splitlines()
        if "-m seqkern" in line
    ],
)
def test_commands_take_their_arguments(line: str) -> None:
    words = shlex.split(line.split("|")[-1], comments=True)
    command, *arguments = words[words.index("seqkern") + 1 :]
    assert command in COMMANDS
    out = io.StringIO()
    with redirect_stdout(out), pytest.raises(SystemExit) as ended:
        seqkern_main([command, *arguments[: command == "train"], "--help"])
    assert ended.value.code == 0
    for flag in (argument for argument in arguments if argument.startswith("--")):
        assert re.search(rf"{flag}\b", out.getvalue()), flag
    if command == "train":
        recipe, *options = arguments
        with_options(RECIPES[recipe].config(), [option for option in options if "=" in option])


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_python_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page's blocks, one after the other, as a reader would run them."""
    monkeypatch.chdir(tmp_path)
    page = path.read_text(encoding="utf-8")
    namespace = {"__name__": path.stem}
    for block in blocks(page, "python"):
        line = page[: page.index(block)].count("\n")
        exec(compile("\n" * line + block, str(path), "exec"), namespace)


def test_all_but_these_take_layers() -> None:
    """Models put together from parts, and those without recurrent or attention layers."""
    without = {
        name
        for name in models.__all__
        if isinstance(kind := getattr(models, name), type)
        and issubclass(kind, nn.Module)
        and "layers" not in inspect.signature(kind).parameters
    }
    composed = {"AttnSeq2Seq", "LSTMSeq2Seq", "ContextualEmbedding", "DecodingModule", "TranslationModel"}
    plain = {"CNN", "DropoutPositionalEncoding", "Embeddings", "PositionalEncoding", "ScalarMix"}
    assert without == composed | plain


def test_results_are_their_logs() -> None:
    rows = re.findall(r"\| `(\w+)` \| ([\d.]+) \| \[log\]\((\S+)\) \|", MODELS)
    assert rows
    for metric, value, log in rows:
        lines = [json.loads(line) for line in (ROOT / "docs" / log).read_text().splitlines()]
        (end,) = (line for line in lines if line["event"] == "final")
        assert f"{end[metric]:.3f}" == value, log
    told = re.findall(r"reached (\d\.\d+) at 1 ÷ (\d\.\d+)|names (\d\.\d+) at 1 ÷ (\d\.\d+)", MODELS)
    logs = [log for _, _, log in rows if "questions" in log or "names" in log]
    for found, log in zip(told, logs, strict=True):
        line = (ROOT / "docs" / log).read_text().splitlines()[-1]
        comparison = json.loads(line)
        value, ratio = (number for number in found if number)
        assert f"{comparison['torch']['accuracy']:.3f}" == value, log
        assert f"{comparison['ratio']:.2f}" == ratio, log


# ---- the site ----------------------------------------------------------------------------------------------


def test_the_navigation_has_every_page() -> None:
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    (nav,) = re.findall(r"^nav:\n((?:  - .+\n)+)", text, re.MULTILINE)
    named = [line.removeprefix("  - ") for line in nav.splitlines()]
    assert sorted(named) == [path.name for path in PAGES if path.parent.name == "docs"]


def anchors(page: str) -> set[str]:
    """What headings are linked by."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", page, flags=re.M | re.S), re.MULTILINE)
    return {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target, anchor in re.findall(r"\]\(([^)#\s]*)#?([^)\s]*)\)", text):
        if "://" in target:
            continue
        file = path.parent / target if target else path
        assert file.is_file(), target
        if anchor:
            assert anchor in anchors(file.read_text(encoding="utf-8")), f"{target}#{anchor}"


def test_every_public_name_is_in_the_reference() -> None:
    """By its name, or under a heading of its name where a module of that name would be taken for it."""
    documented = set()
    for name, heading in re.findall(
        r"^::: (\S+)\n(?:    options:\n      heading: (\S+)\n)?", API, re.MULTILINE
    ):
        module, _, leaf = name.rpartition(".")
        found = getattr(importlib.import_module(module), leaf)
        assert name not in sys.modules or inspect.ismodule(found), f"{name} is a module, too"
        if heading.startswith("seqkern."):
            assert resolve(heading) is found, heading
        documented.add(heading or name)
    aliases = {"CIFG", "MultiheadAttention", "CELLS"}  # named in the text
    for module in (seqkern, seqkern.nn, ops, seqkern.reference, seqkern.text, models):
        for name in set(module.__all__) - aliases - {"__version__", "nn", "ops", "reference"}:
            assert {f"{module.__name__}.{name}", f"seqkern.{name}"} & documented, f"{module.__name__}.{name}"
    assert all(f"`{name}`" in API for name in aliases)


DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def test_the_support_matrix_is_what_is_chosen() -> None:
    rows = {quoted(row[0])[0]: row[2:] for row in table("operation", SUPPORT)}
    assert list(rows) == list(_backend.BACKENDS_OF)
    for op, cells in rows.items():
        for told, (device, dtype) in zip(
            cells, ((d, t) for d in ("cpu", "cuda") for t in DTYPES), strict=True
        ):
            in_float32 = op in _backend.CRF and dtype.itemsize == 2
            chosen = _backend.choose(op, device, torch.float32 if in_float32 else dtype)
            assert told == chosen + " (float32)" * in_float32, (op, device, dtype)


def test_the_support_matrix_is_what_info_says() -> None:
    serves = seqkern.info().serves
    if "cpu" not in {serves["cpu", op, "float32"] for op in ("lstm", "crf")}:
        pytest.skip("no compiled kernels")
    for row in table("operation", SUPPORT):
        for dtype, told in zip(DTYPES, row[2:6], strict=True):
            assert serves["cpu", quoted(row[0])[0], str(dtype).removeprefix("torch.")] == told.split()[0]


def test_layers_of_the_support_matrix_exist() -> None:
    names = [name for row in table("operation", SUPPORT) for name in re.findall(r"`([A-Z]\w+)", row[1])]
    assert names and all(hasattr(seqkern, name) for name in names)


def test_what_is_kept_for_backward_is_as_told() -> None:
    told = {cell: int(row[1]) for row in table("cell", KERNELS) for cell in quoted(row[0])}
    assert told == {name: cell.saved for name, cell in ops.CELLS.items()}


def variant(text: str) -> nn.Module:
    """`MGU` or `GRU(reset_after=False)`, of 2 inputs and 4 units."""
    name, _, options = text.partition("(")
    return eval(f"seqkern.{name}(2, 4, {options or ')'}")


def test_the_guides_variants_are_the_layers() -> None:
    rows = table(r"layer \| what", GUIDE)
    layers = {row[0]: variant(quoted(row[0])[0]) for row in rows}
    for row in rows:
        states = ops.CELLS[layers[row[0]]._cell].states
        assert row[2] == (states[0] if len(states) == 1 else f"({', '.join(states)})"), row[0]
    base = seqkern.nn._recurrent.RecurrentLayer
    public = {getattr(seqkern, name) for name in seqkern.__all__}
    variants = {kind for kind in public if isinstance(kind, type) and issubclass(kind, base)}
    assert variants == {type(layer) for layer in layers.values()} - {seqkern.GRU}


def test_the_tests_of_the_tools_exist() -> None:
    defined = {
        name
        for path in (ROOT / "tests").glob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    rows = table("tool", MIGRATION)
    named = [name for row in rows for name in quoted(row[3])]
    assert len(named) == len(rows) and set(named) <= defined, set(named) - defined


@pytest.mark.slow
def test_the_site_builds(tmp_path: Path) -> None:
    pytest.importorskip("mkdocstrings", reason="needs the extra docs")
    pytest.importorskip("material", reason="needs the extra docs")
    pytest.importorskip("matplotlib", reason="needs the extra docs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = {path.name for path in (tmp_path / "site").glob("*.html")}
    assert pages >= {path.with_suffix(".html").name for path in PAGES if path.parent.name == "docs"}
    reference = (tmp_path / "site" / "api.html").read_text(encoding="utf-8")
    assert "(h_0 [L*D, B, P], c_0 [L*D, B, H])" in reference, "the docstrings' shapes as they are written"
    for path in sorted((tmp_path / "site").glob("*.html")):
        if path.name == "404.html":  # its links are a server's
            continue
        page = path.read_text(encoding="utf-8")
        for link in re.findall(r'(?:src|href)="([^"#?]+)', page):
            assert "://" in link or (path.parent / link).exists(), f"{path.name}: {link}"
        assert not re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="https?://', page), path.name
