"""MkDocs hook of `make docs`: the site also shows Markdown files that stand outside docs/, and links between all of them hold.

Links in the sources are paths in the repository, so that they work wherever the files are read. On the site a link to a file
that is no page, such as a source, is its text alone; a link to what does not exist stays, so that the strict build fails.
"""

import os
import re
from pathlib import Path, PurePosixPath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
# Files of the repository, and the pages that they become.
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "ptxsim/README.md": "internals/ptxsim.md",
    "safnet/pretrained/safnet-s.md": "guide/models/safnet-s.md",
    "safnet/pretrained/safnet.md": "guide/models/safnet.md",
}
SOURCES = {page: source for source, page in PAGES.items()}
LINK = re.compile(r"(?<!`)\[(?P<text>[^\]\[]*)\]\((?P<target>[^)#\s]+)(?P<anchor>#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for source, page in PAGES.items():
        if (ROOT / source).is_file():
            files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    source = PurePosixPath(SOURCES.get(page.file.src_uri, f"docs/{page.file.src_uri}"))
    return LINK.sub(lambda link: relink(link, source, page.file.src_uri), markdown)


def relink(link: re.Match[str], source: PurePosixPath, page: str) -> str:
    """A link in the file `source`, as it must stand on its page."""
    if "://" in link["target"]:
        return link[0]
    path = os.path.normpath(source.parent / link["target"])
    target = PAGES.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else None)
    if target is None:
        return link["text"] if (ROOT / path).exists() else link[0]
    return f"[{link['text']}]({os.path.relpath(target, PurePosixPath(page).parent)}{link['anchor'] or ''})"
