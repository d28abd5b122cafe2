"""What mkdocs is told about the pages beyond mkdocs.yml: measured results, and links into the repository.

A link from a page to a file of the repository, such as ../csrc/cell.h, leads on the site to a copy of it
below repository/: Markdown and sources as pages, anything else as it is. So the pages read the same on the
site and in a checkout, and the site needs nothing but itself. In results.md comments, such as `speed`, stand
for what bench/results/ gives.
"""

from __future__ import annotations

import io
import os
import posixpath
import re
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
COPIES = "repository"
LANGUAGES = {".h": "cpp", ".cpp": "cpp", ".cuh": "cuda", ".cu": "cuda", ".py": "python", ".sh": "bash"}
LINK = re.compile(r"(?<=\]\()([^)#\s]+)(?=[)#])")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds a copy of every file that a page, or a copy that is a page, links to."""
    sys.path.insert(0, os.fspath(ROOT))  # for bench; what a hook inserts when it is loaded is taken out again
    waiting = [f"docs/{file.src_uri}" for file in files.documentation_pages()]
    seen = set(waiting)
    while waiting:
        path = waiting.pop()
        for target in targets(path, text_of(path)):
            if target not in seen:
                seen.add(target)
                waiting += [target] if target.endswith(".md") else []
                files.append(copy_of(target, config))
    for log in logs():
        files.append(File.generated(config, curves_uri(log), content=curves(log)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """The page, with its links to files of the repository leading to their copies."""
    uri = page.file.src_uri
    path = uri.removeprefix(f"{COPIES}/") if uri.startswith(f"{COPIES}/") else f"docs/{uri}"
    if uri == "results.md":
        markdown = text_of(path)
    if not path.endswith(".md") or not (ROOT / path).is_file():
        return markdown  # a source's page
    return LINK.sub(lambda link: rewritten(link[0], path, uri), markdown)


def rewritten(link: str, path: str, uri: str) -> str:
    """The link of the page `uri`, whose text is the repository's file `path`, on the site."""
    target = resolved(path, link)
    if target is None:
        return link
    return posixpath.relpath(uri_of(target), posixpath.dirname(uri) or ".")


def resolved(path: str, link: str) -> str | None:
    """The repository's file that a link in the file `path` leads to, if there is one."""
    if "://" in link:
        return None
    target = posixpath.normpath(posixpath.join(posixpath.dirname(path), link))
    return target if not target.startswith("..") and (ROOT / target).is_file() else None


def targets(path: str, text: str) -> Iterator[str]:
    """The files outside of docs/ that a file links to."""
    for link in LINK.findall(text):
        target = resolved(path, link)
        if target is not None and not target.startswith("docs/"):
            yield target


def uri_of(target: str) -> str:
    if target.startswith("docs/"):
        return target.removeprefix("docs/")
    return f"{COPIES}/{target}" + (".md" if PurePosixPath(target).suffix in LANGUAGES else "")


def copy_of(target: str, config: MkDocsConfig) -> File:
    language = LANGUAGES.get(PurePosixPath(target).suffix)
    if language is None:
        return File.generated(config, uri_of(target), abs_src_path=os.fspath(ROOT / target))
    code = (ROOT / target).read_text(encoding="utf-8").rstrip()
    head = f"---\nsearch:\n  exclude: true\n---\n\n# {target}\n\n"
    return File.generated(config, uri_of(target), content=f"{head}~~~~~~{language}\n{code}\n~~~~~~\n")


# ---- results.md --------------------------------------------------------------------------------------------


def text_of(path: str) -> str:
    """The text of a page, results included."""
    text = (ROOT / path).read_text(encoding="utf-8")
    if path == "docs/results.md":
        text = text.replace("<!-- speed -->", speed()).replace("<!-- recipes -->", recipes())
        text = text.replace("<!-- numerics -->", numerics()).replace("<!-- training -->", long_runs())
    return text


def speed() -> str:
    """What the README says of each machine, with links as from docs/."""
    from bench import report

    parts = [f"## {one.machine['model']}\n\n{report.machine_section(one)}" for one in report.load_all()]
    return "\n\n".join(parts).replace("](bench/", "](../bench/")


def numerics() -> str:
    from bench import numerics, report, store

    slugs = sorted(path.parents[1].name for path in store.RESULTS.glob("*/numerics/ulp.json"))
    return "\n\n".join(f"### {slug}\n\n{report.numerics_table(numerics.load(slug))}" for slug in slugs)


def long_runs() -> str:
    from bench import report, store, training

    slugs = sorted(path.parents[1].name for path in store.RESULTS.glob("*/numerics/training.json"))
    return "\n\n".join(f"### {slug}\n\n{report.training_table(training.load(slug))}" for slug in slugs)


def logs() -> list[Path]:
    return sorted(ROOT.glob("bench/results/*/recipes/*.jsonl"))


def recipes() -> str:
    """For each run of a recipe its figures, its speed and its curves."""
    from seqkern.train.log import read

    rows, pictures = [], []
    for log in logs():
        events = {event["event"]: event for event in read(log)}
        final = [f"{name} {value:.3f}" for name, value in events["final"].items() if name != "event"]
        end, comparison = events["end"], events.get("comparison")
        ratio = "" if comparison is None else f"{comparison['ratio']:.2f}×"
        rows.append(
            f"| [{log.stem}](../{log.relative_to(ROOT).as_posix()}) | {', '.join(final)} | {end['steps']} "
            f"| {end['seconds']:.0f} s | {end['targets_per_second']:.0f} | {ratio} |"
        )
        pictures.append(f"### {log.stem}\n\n![Training loss and figures, {log.stem}]({curves_uri(log)})")
    head = "| run | figures | updates | time | targets a second | torch.nn's time ÷ seqkern's |"
    table = "\n".join([head, "| --- | --- | ---: | ---: | ---: | ---: |", *rows])
    return "\n\n".join([table, *pictures])


def curves_uri(log: Path) -> str:
    return f"curves/{log.parts[-3]}/{log.stem}.png"


def curves(log: Path) -> bytes:
    from seqkern.train.log import draw

    picture = io.BytesIO()
    draw(log, picture)
    return picture.getvalue()
