"""A hook of MkDocs: links of a page to files outside of docs/ work in the site as they do on a repository page.

Every file of the repository that a page links to becomes a page of the site under `repository/`: Markdown as it is, and
any other text as a block of code. A folder is its README, or a list of its files. The files that those pages link to
follow. A link to a file that does not exist is a warning, and so an error of `mkdocs build --strict`.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import mkdocs.plugins
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1].resolve()
DOCS = ROOT / "docs"
FOLDER = "repository"
"""The folder of the site that has pages of files outside of docs/."""

LANGUAGES = {".py": "python", ".proto": "protobuf", ".yaml": "yaml", ".json": "json", ".mjs": "js", ".c": "c"}
"""Ending of a file -> how its code is coloured."""

_LINK = re.compile(r"(?<=\]\()(?!\w+:)([^)#\s]+)(#[^)\s]*)?(?=\))")
_CODE = re.compile(r"(^```.*?^```|`[^`\n]+`)", re.DOTALL | re.MULTILINE)
_log = mkdocs.plugins.get_plugin_logger("repository")


def on_files(files: Files, config: Any) -> Files:
    """Adds a page for each file outside of docs/ that a page links to, directly or through such pages."""
    open_pages = [DOCS / file.src_uri for file in files.documentation_pages()]
    done: set[Path] = set()
    while open_pages:
        page = open_pages.pop()
        for target in _targets(page):
            if target in done or not target.exists() or target.is_relative_to(DOCS):
                continue
            done.add(target)
            source = _source(target)
            files.append(File.generated(config, _page_of(target), content=source))
            if _readme(target) is not None:
                open_pages.append(target)
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Rewrites the links of a page that leave docs/, and of a page from outside those that enter it."""
    here = _path_of(page.file.src_uri)
    folder = Path(page.file.src_uri).parent

    def rewritten(match: re.Match[str]) -> str:
        target = _resolved(here, match[1])
        if target.is_relative_to(DOCS) and here.is_relative_to(DOCS):
            return match[0]  # MkDocs checks it
        if not target.exists():
            _log.warning(f"{page.file.src_uri} links to {match[1]}, which does not exist")
            return match[0]
        aimed = target.relative_to(DOCS) if target.is_relative_to(DOCS) else Path(_page_of(target))
        return os.path.relpath(aimed, folder) + (match[2] or "")

    parts = _CODE.split(markdown)
    return "".join(part if index % 2 else _LINK.sub(rewritten, part) for index, part in enumerate(parts))


def _targets(page: Path) -> Iterator[Path]:
    readme = _readme(page)
    if readme is None:
        return
    for index, part in enumerate(_CODE.split(readme.read_text(encoding="utf-8"))):
        if index % 2 == 0:
            for match in _LINK.finditer(part):
                yield _resolved(readme, match[1])


def _readme(path: Path) -> Path | None:
    """The Markdown of a file or folder; None if it has none."""
    if path.is_dir():
        path /= "README.md"
    return path if path.suffix == ".md" and path.is_file() else None


def _resolved(here: Path, link: str) -> Path:
    return (here.parent / unquote(link)).resolve()


def _page_of(target: Path) -> str:
    """The page of a file or folder outside of docs/."""
    name = target.relative_to(ROOT)
    if target.is_dir():
        return f"{FOLDER}/{name}/README.md"
    return f"{FOLDER}/{name}" if name.suffix == ".md" else f"{FOLDER}/{name}.md"


def _path_of(page: str) -> Path:
    """The file from which a page of the site was made."""
    if not page.startswith(f"{FOLDER}/"):
        return DOCS / page
    path = ROOT / page.removeprefix(f"{FOLDER}/")
    return path if path.exists() else path.with_suffix("") if path.with_suffix("").exists() else path


def _source(target: Path) -> str:
    readme = _readme(target)
    if readme is not None:
        return readme.read_text(encoding="utf-8")
    name = target.relative_to(ROOT)
    hidden = "---\nsearch:\n  exclude: true\n---\n"
    if target.is_dir():
        entries = sorted(path for path in target.iterdir() if not path.name.startswith(("_", ".")))
        return f"{hidden}# {name}\n\n" + "".join(f"- `{path.name}`\n" for path in entries)
    text = target.read_text(encoding="utf-8")
    return f"{hidden}# {name}\n\n````{LANGUAGES.get(target.suffix, 'text')}\n{text}\n````\n"
