"""Makes one site of docs/ and of the pages at the top level, which stay where code hosts look for them.

- Pages from elsewhere in the repository, and those that are made of documents, get a place on the site.
- Links are written as they work in the repository. Here each is led to where its target is on the site; a
  file that is no page gets one that shows it, so that the site is whole by itself.
- A section of the protocol (§6.3) is a link to it. Comments to those who run a page's code are left out.
"""

import posixpath
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import yaml
from markdown import Extension, Markdown
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pymdownx.slugs import slugify

ROOT: Final = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # mkdocs loads this file by its path

from docs.site import asyncapi, openapi  # noqa: E402

#: Pages from elsewhere in the repository, and where they are on the site.
PLACES: Final = {
    "README.md": "project/readme.md",
    "ARCHITECTURE.md": "explanation/architecture.md",
    "CHANGELOG.md": "project/changelog.md",
    "CONTRIBUTING.md": "project/contributing.md",
    "PROTOCOL.md": "reference/protocol.md",
    "clients/js/README.md": "reference/javascript.md",
    "examples/README.md": "cookbook/examples.md",
}
#: Pages that are made of documents.
MADE: Final = {"reference/http.md": openapi, "reference/messages.md": asyncapi}
_ORIGINS: Final = {place: origin for origin, place in PLACES.items()}
_LINK: Final = re.compile(r"(\]\()([^)\s]+)(\))")
_SECTION: Final = re.compile(r"(^#.*$|`[^`]*`|\[[^]]*\]\([^)]*\))|§(\d+(?:\.\d+)?)", re.MULTILINE)
_FENCED: Final = re.compile(r"^( *)(`{3,}|~{3,})[^\n]*\n.*?^\1\2 *$\n?", re.MULTILINE | re.DOTALL)
_COMMENT: Final = re.compile(r"^ *<!-- code: .*?-->\n?", re.MULTILINE | re.DOTALL)
_LANGUAGES: Final = {
    "conf": "nginx", "html": "html", "js": "js", "json": "json", "mjs": "js", "py": "python", "sh": "sh",
    "toml": "toml", "yaml": "yaml", "yml": "yaml",
}  # fmt: skip
_MAX_SHOWN_BYTES: Final = 100_000


class _ListsByTwo(Extension):  # type: ignore[misc] # Markdown ships no types
    """What is indented by two belongs to the item of a list, as on code hosts."""

    def extendMarkdown(self, md: Markdown) -> None:  # noqa: N802 - theirs
        md.tab_length = 2


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    known = {
        *(path.relative_to(config.docs_dir).as_posix() for path in Path(config.docs_dir).glob("**/*.md")),
        *(place for origin, place in PLACES.items() if (ROOT / origin).exists()),
        *(place for place, document in MADE.items() if document.SOURCE.exists()),
    }
    config.nav = [*_matched(config.nav or [], known)]
    config.markdown_extensions.append(_ListsByTwo())
    return config


def _matched(entries: list[Any], known: set[str]) -> Iterator[Any]:
    """The navigation with the pages that its stars stand for; a folder's README first, and none twice."""
    named = {*_named(entries)}
    for entry in entries:
        title, value = next(iter(entry.items())) if isinstance(entry, dict) else (None, entry)
        if isinstance(value, list):
            yield {title: [*_matched(value, known)]}
        elif "*" not in value:
            yield entry
        else:
            found = sorted(page for page in known - named if re.fullmatch(value.replace("*", "[^/]*"), page))
            found.sort(key=lambda page: not page.endswith("/README.md"))
            if title is None:
                yield from found
            elif found:
                yield {title: found if value.endswith("/*.md") else found[0]}


def _named(entries: list[Any]) -> Iterator[str]:
    for entry in entries:
        value = next(iter(entry.values())) if isinstance(entry, dict) else entry
        if isinstance(value, list):
            yield from _named(value)
        elif "*" not in value:
            yield value


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for origin, place in PLACES.items():
        if (ROOT / origin).exists():
            files.append(File.generated(config, place, content=(ROOT / origin).read_text()))
    for place, document in MADE.items():
        if document.SOURCE.exists():
            files.append(
                File.generated(
                    config, place, content=document.markdown(yaml.safe_load(document.SOURCE.read_text()))
                )
            )
    waiting = [
        path for file in files.documentation_pages() for path in _linked(file.src_uri, file.content_string)
    ]
    for path in waiting:
        place = _place(path)
        if place.startswith("source/") and files.get_file_from_path(place) is None:
            text, more = _shown(ROOT / path)
            files.append(
                File.generated(config, place, content=f"---\nsearch: {{exclude: true}}\n---\n\n{text}")
            )
            waiting += more  # which this loop comes to
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    del config, files
    here = page.file.src_uri
    sections = _sections()
    protocol = posixpath.relpath(PLACES["PROTOCOL.md"], posixpath.dirname(here) or ".")

    def section(match: re.Match[str]) -> str:
        if match[1]:  # a heading, code, or a link
            return match[1]
        # §4.2 is the second promise of §4.
        anchor = sections.get(match[2]) or sections.get(match[2].partition(".")[0])
        return f"[{match[0]}]({protocol}#{anchor})" if anchor else match[0]

    def led(text: str) -> str:
        text = _LINK.sub(lambda match: _led(here, match), text)
        return _SECTION.sub(section, text)

    return _outside_of_fences(_COMMENT.sub("", markdown), led)


def _sections() -> dict[str, str]:
    """The anchors of the protocol's sections, by their numbers."""
    headings = re.findall(r"^#+ (([\d.]*\d)\.? .*)$", (ROOT / "PROTOCOL.md").read_text(), re.MULTILINE)
    slug = slugify(case="lower")
    return {number: slug(heading, "-") for heading, number in headings}


def _outside_of_fences(text: str, change: Callable[[str], str]) -> str:
    parts, end = [], 0
    for fenced in _FENCED.finditer(text):
        parts += [change(text[end : fenced.start()]), fenced[0]]
        end = fenced.end()
    return "".join([*parts, change(text[end:])])


def _led(here: str, match: re.Match[str]) -> str:
    target, hash_, anchor = match[2].partition("#")
    path = _target(here, target)
    if path is None:
        return match[0]
    led = posixpath.relpath(_place(path), posixpath.dirname(here) or ".")
    return f"{match[1]}{led}{hash_}{anchor}{match[3]}"


def _target(here: str, link: str) -> str | None:
    """The path in the repository that a page's link leads to. None: nowhere in it, or the site knows."""
    if not link or re.match(r"[a-z]+:|/", link) or here.startswith("source/") or here in MADE:
        return None
    origin = _ORIGINS.get(here, f"docs/{here}")
    path = posixpath.normpath(posixpath.join(posixpath.dirname(origin), link))
    return path if (ROOT / path).exists() and not path.startswith("..") else None


def _place(path: str) -> str:
    """Where it is on the site."""
    if path in PLACES:
        return PLACES[path]
    for place, document in MADE.items():
        if ROOT / path == document.SOURCE:
            return place
    if path.startswith("docs/") and path.endswith((".md", ".svg", ".png", ".webp")):
        return path.removeprefix("docs/")
    if path.startswith("docs/") and (ROOT / path / "README.md").is_file():
        return f"{path.removeprefix('docs/')}/README.md"
    shown = path.removeprefix(".")  # what begins with a dot is no page to mkdocs
    return f"source/{shown}/index.md" if (ROOT / path).is_dir() else f"source/{shown}.md"


def _linked(here: str, text: str) -> Iterator[str]:
    if not here.startswith("source/"):
        for match in _LINK.finditer(_FENCED.sub("", text)):
            path = _target(here, match[2].partition("#")[0])
            if path is not None:
                yield path


def _shown(path: Path) -> tuple[str, list[str]]:
    """A page that shows a file, or what is in a directory; and which further files that one names."""
    name = path.relative_to(ROOT).as_posix()
    if path.is_dir():
        inside = sorted(
            each.relative_to(ROOT).as_posix()
            for each in path.glob("**/*")
            if each.is_file() and "node_modules" not in each.parts and "__pycache__" not in each.parts
        )
        lines = [
            f"- [{each.removeprefix(f'{name}/')}]({posixpath.relpath(_place(each), f'source/{name}')})"
            for each in inside
        ]
        return f"# {name}\n\n" + "\n".join(lines) + "\n", inside
    data = path.read_bytes()
    if len(data) > _MAX_SHOWN_BYTES or b"\0" in data:
        return f"# {name}\n\n{len(data):,} bytes, in the repository.\n", []
    text = data.decode()
    fence = "`" * max(4, *(len(run) + 1 for run in [*re.findall("`+", text), ""]))
    return f"# {name}\n\n{fence}{_LANGUAGES.get(path.suffix.lstrip('.'), 'text')}\n{text}\n{fence}\n", []
