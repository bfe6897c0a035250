"""Check a built site: every link inside it leads somewhere, and no page fetches anything from another host.

The site's builder checks the links of Markdown pages. This looks at what came out, so that links which docstrings,
templates and generated pages make are checked as well. Needs nothing but Python.
"""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

# elements that a browser fetches by itself, and the attribute that says from where
_FETCHED = {"script": "src", "img": "src", "iframe": "src", "source": "src", "video": "src", "link": "href"}


class Page(HTMLParser):
    """What one page links to, what it fetches, and the anchors that it has."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.anchors |= {given[name] for name in ("id", "name") if given.get(name)}
        if tag == "a" and given.get("href"):
            self.links.append(given["href"])
        if (attribute := _FETCHED.get(tag)) and given.get(attribute) and given.get("rel") != "canonical":
            self.fetched.append(given[attribute])


def problems(root: Path) -> list[str]:
    """All that is wrong with the site in ``root``, as lines for people."""
    pages = {path.resolve(): Page(path) for path in sorted(root.rglob("*.html"))}
    found = [] if pages else [f"{root}: holds no page"]
    for path, page in pages.items():
        where = path.relative_to(root.resolve())
        if where.name == "404.html":  # shown in the place of any page, so its links are those of the root
            continue
        for link in page.fetched:
            if urlsplit(link).netloc:
                found.append(f"{where}: fetches {link} from another host")
            elif not _exists(_target(path, link), root):
                found.append(f"{where}: {link} does not exist")
        for link in page.links:
            if urlsplit(link).scheme or urlsplit(link).netloc:
                continue
            target, anchor = _target(path, link), unquote(urlsplit(link).fragment)
            if target.is_dir():
                target /= "index.html"
            if not _exists(target, root):
                found.append(f"{where}: {link} does not exist")
            elif anchor and target in pages and anchor not in pages[target].anchors:
                found.append(f"{where}: {link} has no such anchor")
    return found


def _target(page: Path, link: str) -> Path:
    """The file that a relative link leads to."""
    path = unquote(urlsplit(link).path)
    return (page.parent / path).resolve() if path else page


def _exists(target: Path, root: Path) -> bool:
    """Return True if there is such a file within the site."""
    return target.is_relative_to(root.resolve()) and target.exists()
