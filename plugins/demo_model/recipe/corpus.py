"""Build the training corpus: the Python 3.11 documentation, the standard library's sources, and
questions about both.

Usage: corpus.py DOCS_HTML OUT.json

DOCS_HTML is the html folder of Debian's package python3.11-doc (PSF licence). Needs beautifulsoup4
and lxml.
"""

import json
import pathlib
import re
import sys
import sysconfig

from bs4 import BeautifulSoup

TYPOGRAPHY = str.maketrans(
    {"\u00b6": "", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2014": "-", "\xa0": " "}
)
SKIPPED_PAGES = ("genindex", "search", "whatsnew/changelog")
SKIPPED_SOURCES = (
    "site-packages",
    "test/",
    "idlelib",
    "lib2to3",
    "turtledemo",
    "encodings",
    "pydoc_data",
)


def clean(text):
    return re.sub(r"[ \t]+\n", "\n", text.translate(TYPOGRAPHY))


def one_line(text):
    return re.sub(r"\s+", " ", clean(text)).strip()


def entries(body):
    """Yield one record for each documented object: name, signature, first paragraph, first
    example."""
    for listing in body.select("dl.py"):
        for term in listing.find_all("dt", recursive=False):
            details = term.find_next_sibling("dd")
            if not term.get("id") or not details:
                continue
            paragraphs = [
                p
                for p in (one_line(p.get_text()) for p in details.find_all("p", recursive=False))
                if p
            ]
            if not paragraphs:
                continue
            doc = (
                paragraphs[0]
                if len(paragraphs[0]) > 60 or len(paragraphs) < 2
                else " ".join(paragraphs[:2])
            )
            example = details.select_one("div.highlight pre")
            yield {
                "name": term["id"],
                "sig": one_line(term.get_text()),
                "doc": doc[:700],
                "ex": clean(example.get_text()).strip()[:500] if example else None,
            }


def main(html, out):
    texts, qa = [], []
    for page in sorted(pathlib.Path(html).rglob("*.html")):
        name = page.relative_to(html).as_posix()
        if name.startswith("_") or any(part in name for part in SKIPPED_PAGES):
            continue
        body = BeautifulSoup(page.read_bytes(), "lxml").find("div", {"class": "body"})
        if not body:
            continue
        for noise in body.select("a.headerlink, script, style"):
            noise.decompose()
        qa.extend(entries(body))
        texts.append(clean(body.get_text()).strip())
    library = pathlib.Path(sysconfig.get_paths()["stdlib"])
    src = []
    for path in sorted(library.rglob("*.py")):
        name = path.relative_to(library).as_posix()
        if name.startswith(SKIPPED_SOURCES) or "/test" in name or "config-" in name:
            continue
        try:
            src.append(f"# {name}\n{path.read_text()}")
        except UnicodeDecodeError:
            continue
    pathlib.Path(out).write_text(json.dumps({"texts": texts, "src": src, "qa": qa}))
    print(f"{len(texts)} pages, {len(src)} sources, {len(qa)} entries")


if __name__ == "__main__":
    main(*sys.argv[1:])
