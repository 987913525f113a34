"""The page in a real browser: hostile text does nothing, nothing is asked for, nothing overflows.

Skipped where there is no Chromium. The first test shows that the browser would do what the others
find undone.
"""

import shutil
import subprocess
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from report_pages import HOSTILE, Page, whole

from align.report.html.writing import write_report

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
BROWSER = next((found for name in NAMES if (found := shutil.which(name))), None)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason=f"no Chromium here (looked for {', '.join(NAMES)})"),
]

WIDTHS = (320, 390, 768, 1280)


class Site:
    """A folder served on this machine, and what was asked for; every host name leads here."""

    def __init__(self, folder: Path, profile: Path) -> None:
        self.asked: list[str] = []
        self.profile = profile
        asked = self.asked

        class Handler(SimpleHTTPRequestHandler):
            def do_GET(self) -> None:
                asked.append(f"{self.headers['Host']}{self.path}")
                super().do_GET()

            def log_message(self, *_: object) -> None:
                pass

        handler = partial(Handler, directory=str(folder))
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def dom(self, address: str, *flags: str) -> str:
        """The document after it was loaded and had time to do what it wants."""
        words = [
            *(str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"),
            *("--virtual-time-budget=3000", f"--user-data-dir={self.profile}", "--no-first-run"),
            *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
            f"--host-resolver-rules=MAP * 127.0.0.1:{self.server.server_port}",
            *(*flags, address),
        ]
        done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=True)
        return done.stdout

    def hits(self) -> list[str]:
        """What a payload asked for."""
        return [line for line in self.asked if "/hit" in line or "evil" in line]


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    folder = tmp_path / "site"
    folder.mkdir()
    made = Site(folder, tmp_path / "profile")
    yield made
    made.server.shutdown()
    made.server.server_close()


@pytest.fixture
def report(tmp_path: Path) -> Path:
    return write_report(whole(tmp_path / "run", HOSTILE), tmp_path / "site" / "report.html")


def test_this_browser_would_do_what_the_text_asks_for(site: Site, tmp_path: Path) -> None:
    file = tmp_path / "site" / "open.html"
    file.write_text(f"<!doctype html><meta charset=utf-8><title>mine</title><body>{HOSTILE}")
    dom = site.dom(f"file://{file}")
    assert "<title>owned</title>" in dom
    assert any("/hit" in line for line in site.hits())


@pytest.mark.parametrize("door", ["file", "http"])
def test_hostile_text_does_nothing(site: Site, report: Path, door: str) -> None:
    address = f"file://{report}" if door == "file" else f"{site.url}/report.html"
    before = Page(report.read_text())
    after = Page(site.dom(address))
    assert site.hits() == []
    ours = [line for line in site.asked if not line.startswith("clients2.google.com/time/")]
    assert [line for line in ours if not line.endswith("/report.html")] == [], "no favicon either"
    kinds = {tag for tag, _ in before.tags}
    assert {tag for tag, _ in after.tags} <= kinds
    assert after.within("title") == before.within("title")
    assert len(after.tags) == len(before.tags), "the browser reads the very elements we wrote"
    assert after.text.count("<img src=http://evil.test/hit") > 20


def test_the_policy_holds_where_escaping_would_not(site: Site, report: Path) -> None:
    """As if the template had let it through: the text as markup, in the middle of the page."""
    page = report.read_text()
    assert "<main>" in page
    report.write_text(page.replace("<main>", f"<main>{HOSTILE}", 1))
    dom = site.dom(f"file://{report}")
    assert "<title>owned</title>" not in dom
    assert "<img" in dom
    assert site.hits() == []


FRAME = """<!doctype html><body><iframe src="report.html" style="width:{width}px;height:900px;border:0"></iframe>
<script>
document.querySelector('iframe').onload = (event) => {{
  const page = event.target.contentDocument, root = page.documentElement;
  for (const one of page.querySelectorAll('details')) one.open = true;
  const over = [...page.querySelectorAll('body *')].filter((item) => {{
    if (item.closest('.scroll, nav, .said, .turn, svg, .race th')) return false;
    return item.getBoundingClientRect().right > root.clientWidth + 1;
  }});
  const names = over.slice(0, 5).map((item) => item.tagName + '.' + item.getAttribute('class'));
  const style = event.target.contentWindow.getComputedStyle(page.body);
  document.body.textContent = JSON.stringify({{
    beyond: root.scrollWidth - root.clientWidth, over: names, paper: style.backgroundColor, ink: style.color}});
}};
</script>"""


def measured(site: Site, report: Path, width: int, *flags: str) -> str:
    (report.parent / "frame.html").write_text(FRAME.format(width=width))
    return Page(site.dom(f"{site.url}/frame.html", "--window-size=1400,1000", *flags)).text


@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_is_wider_than_the_screen(site: Site, report: Path, width: int) -> None:
    assert '{"beyond":0,"over":[],' in measured(site, report, width)


def test_light_and_dark_follow_the_system(site: Site, report: Path) -> None:
    light = measured(site, report, 390, "--blink-settings=preferredColorScheme=1")
    dark = measured(site, report, 390, "--blink-settings=preferredColorScheme=0")
    assert '"paper":"rgb(251, 251, 250)"' in light
    assert '"paper":"rgb(20, 22, 26)"' in dark
