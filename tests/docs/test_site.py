"""The documentation site builds without a warning, is whole, and needs nothing from elsewhere.

Not for: what the pages' code blocks do (test_pages.py).
"""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).resolve().parents[2]
BUILD_LIMIT_S = 20.0
# What a browser loads by itself; an <a> is only followed by the reader.
LOADED = {"script": "src", "img": "src", "link": "href", "iframe": "src", "source": "srcset"}


class Page(HTMLParser):
    """The ids and links of a page, and what a browser loads for it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: set[str] = set()
        self.loaded: set[str] = set()
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value for name, value in attrs if value is not None}
        self.ids.update(value for name, value in given.items() if name in ("id", "name"))
        if tag == "a" and "href" in given:
            self.links.add(given["href"])
        if tag in LOADED and LOADED[tag] in given:
            self.loaded.add(given[LOADED[tag]])


def mkdocs(*words: str | Path, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "mkdocs", *map(str, words)], cwd=cwd, capture_output=True, text=True,
                          timeout=60, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"})


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("site")
    before = time.monotonic()
    done = mkdocs("build", "--quiet", "--strict", "--site-dir", target)
    took_s = time.monotonic() - before
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout + done.stderr == ""
    assert took_s < BUILD_LIMIT_S
    return target


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    found = {path: Page(path) for path in site.rglob("*.html")}
    assert len(found) > 25
    return found


@pytest.mark.parametrize("module", ["fasttun", "fasttun.wireguard"])
def test_every_public_name_is_on_a_reference_page(site: Path, pages: dict[Path, Page], module: str) -> None:
    ids = set().union(*(page.ids for path, page in pages.items() if path.parent == site / "reference"))
    assert [name for name in importlib.import_module(module).__all__ if f"{module}.{name}" not in ids] == []


@pytest.mark.parametrize(("module", "names"), [
    ("noise", ["InitiatorHandshake.begin", "open_initiation"]), ("messages", ["Initiation.parse"]),
    ("cookies", ["CookieChecker.check_mac2"]), ("timers", ["PeerTimers.expire"]), ("outputs", ["Send"]),
])
def test_the_parts_of_the_protocol_are_there(
    pages: dict[Path, Page], site: Path, module: str, names: list[str]
) -> None:
    ids = pages[site / "reference" / "protocol-parts.html"].ids
    assert {f"fasttun.wireguard.{module}.{name}" for name in names} <= ids


def test_what_is_inherited_is_documented_with_the_class(pages: dict[Path, Page], site: Path) -> None:
    forwarder, wireguard = (pages[site / "reference" / f"{name}.html"].ids for name in ("forwarder", "wireguard"))
    for method in ("start", "stop", "run", "wait", "wait_closed", "stats"):
        assert f"fasttun.Forwarder.{method}" in forwarder
        assert f"fasttun.WireGuard.{method}" in wireguard


def test_every_command_is_on_its_page(site: Path) -> None:
    from fasttun.cli.command import fasttun

    text = (site / "reference" / "command.html").read_text()
    for name in [*fasttun.lazy, "service install"]:
        assert f"Usage: fasttun {name}" in text
    assert "--busy-poll" in text


def test_all_links_inside_resolve(pages: dict[Path, Page], site: Path) -> None:
    broken = []
    for path, page in pages.items():
        if path.name == "404.html":  # its links are absolute, for a server
            continue
        for link in page.links | page.loaded:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc or link == "javascript:void(0)":
                continue
            there = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not there.is_file() or (parts.fragment and there.suffix == ".html"
                                       and unquote(parts.fragment) not in pages[there].ids):
                broken.append(f"{path.relative_to(site)}: {link}")
    assert broken == []


def test_nothing_is_loaded_from_elsewhere(pages: dict[Path, Page], site: Path) -> None:
    elsewhere = re.compile(r"^(https?:)?//")
    assert [link for page in pages.values() for link in page.loaded if elsewhere.match(link)] == []
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import)\s*['\"]?(https?:)?//", sheet.read_text()), sheet


def test_a_broken_link_breaks_the_build(tmp_path: Path) -> None:
    """Strictness itself: the site's validation settings, on a page with a link to nowhere."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text("# One\n\n[nowhere](nowhere.md), [here](#nothing)\n")
    settings = (ROOT / "mkdocs.yml").read_text()
    validation = re.search(r"^validation:\n(?:[ \n].*\n)*", settings, re.M)
    assert validation is not None
    (tmp_path / "mkdocs.yml").write_text(f"site_name: test\n{validation[0]}")
    done = mkdocs("build", "--strict", "--site-dir", tmp_path / "site", cwd=tmp_path)
    assert done.returncode != 0
    assert "nowhere.md" in done.stderr
    assert "#nothing" in done.stderr
