"""Opens pages in a headless browser, and checks that they can be read on a desktop and a phone.

    python scripts/check_report.py runs/smaller/report.html --out screenshots

Each page is opened at 1280 and 390 pixels, light and dark, all its details opened. It must not
scroll sideways, ask for anything outside of its file, write to the console, or have anything that
sticks out of its card. It needs playwright, and Chromium or Chrome.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

WIDTHS = (1280, 390)
SCHEMES = ("light", "dark")
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")

# Elements that are wider than what they stand in; what scrolls in a box of its own is left out.
_STICKING_OUT = """() => {
  const found = [];
  const scrolls = e => ["auto", "scroll"].includes(getComputedStyle(e).overflowX);
  for (const card of document.querySelectorAll(".card, .note, header")) {
    const edge = card.getBoundingClientRect();
    for (const element of card.querySelectorAll("*")) {
      let box = element.parentElement;
      while (box !== card && !scrolls(box)) box = box.parentElement;
      if (box !== card) continue;
      const own = element.getBoundingClientRect();
      if (own.width && (own.right > edge.right + 0.5 || own.left < edge.left - 0.5))
        found.push(element.tagName.toLowerCase() + " '" + element.textContent.trim().slice(0, 40)
          + "' in " + (card.id || card.className));
    }
  }
  return found;
}"""
# Texts of a plot that lie on one another.
_OVERLAPS = """() => {
  const found = [];
  for (const plot of document.querySelectorAll("svg")) {
    const texts = [...plot.querySelectorAll("text")].filter(t => t.textContent.trim());
    const boxes = texts.map(t => t.getBoundingClientRect());
    for (let i = 0; i < boxes.length; i++) for (let j = i + 1; j < boxes.length; j++) {
      const [a, b] = [boxes[i], boxes[j]];
      const across = Math.min(a.right, b.right) - Math.max(a.left, b.left);
      const down = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
      if (across > 1 && down > 3)
        found.push("'" + texts[i].textContent + "' on '" + texts[j].textContent + "' in "
          + plot.getAttribute("aria-label"));
    }
  }
  return found;
}"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Check the pages that the command line names.

    Returns:
        0 if all is well, 1 if something is not, 2 if it can't be checked.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("pages", nargs="+", type=Path, metavar="FILE.html")
    parser.add_argument("--out", type=Path, help="folder for screenshots")
    options = parser.parse_args(arguments)
    if missing := [page for page in options.pages if not page.is_file()]:
        return _say(f"expected a page, got {missing[0]}, which is no file")
    try:
        from playwright.sync_api import Error
    except ImportError:
        return _say("expected playwright to open pages with; pip install playwright")
    faults = 0
    try:
        with _browser() as browser:
            for page in options.pages:
                for width in WIDTHS:
                    for scheme in SCHEMES:
                        found = check(browser, page, width, scheme, options.out)
                        faults += len(found)
                        _print(f"{page}, {width} px, {scheme}", found)
    except Error as error:
        first = str(error).strip().splitlines()[0]
        return _say(
            f"expected a browser that starts, got: {first}; apt-get install chromium, or "
            "playwright install chromium"
        )
    return 1 if faults else 0


@contextmanager
def _browser() -> Iterator[Any]:
    """The system's Chromium, or the one that playwright has installed."""
    from playwright.sync_api import sync_playwright

    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    with sync_playwright() as playwright:
        # no sandbox: it can't be made in many containers, and the pages are our own
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


def check(browser: Any, page: Path, width: int, scheme: str, out: Path | None) -> list[str]:
    """Open a page once.

    Args:
        browser: Playwright's.
        page: The file.
        width: Of the window, in CSS pixels.
        scheme: `light` or `dark`.
        out: Where a screenshot goes, if anywhere.

    Returns:
        What is wrong with it.
    """
    faults: list[str] = []
    phone = width < 600
    context = browser.new_context(
        viewport={"width": width, "height": 844 if phone else 900},
        device_scale_factor=2 if phone else 1,
        is_mobile=phone,
        color_scheme=scheme,
        offline=True,
    )
    try:
        tab = context.new_page()
        tab.on("request", lambda request: faults.extend(_outside(request.url, page)))
        tab.on("console", lambda message: faults.append(f"console: {message.text}"))
        tab.on("pageerror", lambda error: faults.append(f"script: {error}"))
        tab.goto(page.resolve().as_uri(), wait_until="load")
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            name = f"{page.resolve().parent.name}-{page.stem}-{width}-{scheme}.png"
            tab.screenshot(path=out / name, full_page=True)
        for state in ("closed", "open"):
            if state == "open":
                tab.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
            wide = tab.evaluate("document.documentElement.scrollWidth")
            if wide > tab.evaluate("innerWidth") or wide > width:
                faults.append(f"{wide} px wide with details {state}, so that it scrolls sideways")
            faults += [f"sticks out: {text}" for text in tab.evaluate(_STICKING_OUT)]
        faults += [f"lies on another text: {text}" for text in tab.evaluate(_OVERLAPS)]
    finally:
        context.close()
    return list(dict.fromkeys(faults))


def _outside(url: str, page: Path) -> list[str]:
    own = url == page.resolve().as_uri() or url.startswith("data:")
    return [] if own else [f"asks for {url}"]


def _print(title: str, faults: Sequence[str]) -> None:
    print(f"{title}: {'fine' if not faults else f'{len(faults)} faults'}")
    for fault in faults:
        print(f"  {fault}")


def _say(text: str) -> int:
    print(f"error: {text}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
