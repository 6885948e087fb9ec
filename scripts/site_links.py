"""A hook of mkdocs: links that are right in the repository are right on the site, whose root is docs/.

Pages link as the repository shows them; README.md, CHANGELOG.md and CONTRIBUTING.md, which are pages too, from its
root. A link into docs/ is made relative to the page; one to a file outside (a test, a script) becomes the name of the
file. The roles of docstrings, as in :class:`Stage`, become plain code.
"""

from __future__ import annotations

import re
from pathlib import Path
from posixpath import normpath, relpath
from typing import Any

_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)#:\s]+)(#[^)\s]*)?\)")
_ROLE = re.compile(r":(?:class|func|meth|mod|data|attr|exc):<code>(?:~[\w.]*\.)?")
_ROOT = Path(__file__).resolve().parents[1]
_PAGES = {"CHANGELOG.md": "docs/changelog.md", "CONTRIBUTING.md": "docs/contributing.md", "README.md": "docs/index.md"}


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """The text of a page with its snippets, links rewritten."""
    source = page.file.src_uri

    def rewritten(match: re.Match[str]) -> str:
        mark, text, target, anchor = match[1], match[2], match[3], match[4] or ""
        path = next((where for where in _places(source, target) if (_ROOT / where).exists()), None)
        if path is None:  # left for mkdocs to complain of
            return match[0]
        path = _PAGES.get(path, path)
        if path.startswith("docs/") and path.endswith((".md", ".svg", ".png")):
            return f"{mark}[{text}]({relpath(path, f'docs/{source}/..')}{anchor})"
        return text if text.startswith("`") else f"{text} (`{path}`)"

    return _LINK.sub(rewritten, _with_snippets(markdown))


def on_page_content(content: str, **_: Any) -> str:
    """The page as HTML, without the roles of docstrings."""
    return _ROLE.sub("<code>", content)


def _places(source: str, target: str) -> tuple[str, str]:
    """What a link may mean, from the root of the repository: as seen from its page, and as seen from the root."""
    return normpath(f"docs/{source}/../{target}"), normpath(target)


def _with_snippets(markdown: str) -> str:
    """The page with the files it includes, so that their links are rewritten too."""
    return re.sub(r'^--8<-- "([\w./]+)"$', lambda match: (_ROOT / match[1]).read_text(), markdown, flags=re.M)
