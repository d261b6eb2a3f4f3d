"""Opens a report in Qt's Chromium, clicks it with the mouse, and prints as JSON what it saw.

    python browser.py PAGE FOLDER_FOR_SCREENSHOTS

In a process of its own: Qt wants the main thread, and Chromium may take its process along.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["QT_QPA_PLATFORM"] = "offscreen"
# No GPU, and no sandbox: that one refuses to run as root, which containers do.
os.environ["QTWEBENGINE_CHROMIUM_FLAGS"] = "--no-sandbox --disable-gpu"

from PyQt6.QtCore import QEventLoop, QPoint, Qt, QTimer, QUrl
from PyQt6.QtTest import QTest
from PyQt6.QtWebEngineCore import QWebEnginePage, QWebEngineProfile, QWebEngineUrlRequestInterceptor
from PyQt6.QtWebEngineWidgets import QWebEngineView
from PyQt6.QtWidgets import QApplication

LOSS = "document.querySelector('#plot-loss')"
AXIS = f"""({{x: {LOSS}.data[0].x, meta: {LOSS}.data[0].meta.seconds,
            title: {LOSS}.querySelector('.xtitle').textContent}})"""
BACK = "getComputedStyle(document.body).backgroundColor"


class Requests(QWebEngineUrlRequestInterceptor):
    """Notes what the page asks for."""

    seen: list[str] = []  # noqa: RUF012

    def interceptRequest(self, info: Any) -> None:
        self.seen.append(info.requestUrl().toString())


class Page(QWebEnginePage):
    """Notes what the page's scripts complain of."""

    console: list[str] = []  # noqa: RUF012

    def javaScriptConsoleMessage(self, level: Any, message: str, line: int, source: str) -> None:
        self.console.append(f"{line}: {message}")


class Browser:
    def __init__(self) -> None:
        self._app = QApplication(sys.argv)
        self._profile = QWebEngineProfile()
        self._requests = Requests()
        self._profile.setUrlRequestInterceptor(self._requests)
        self._page = Page(self._profile)
        self._view = QWebEngineView()
        self._view.setPage(self._page)
        self._view.resize(1100, 900)
        self._view.show()

    def open(self, path: Path) -> None:
        self._page.load(QUrl.fromLocalFile(str(path)))
        self.until("document.body && document.body.dataset.ready === 'yes'")

    def ask(self, script: str) -> Any:
        """What an expression of the page is, by way of JSON."""
        answer: list[Any] = []
        loop = QEventLoop()

        def take(value: Any) -> None:
            answer.append(value)
            loop.quit()

        self._page.runJavaScript(f"JSON.stringify({script})", take)
        if not answer:
            loop.exec()
        return json.loads(answer[0]) if answer[0] else None

    def until(self, condition: str) -> None:
        for _ in range(600):
            if self.ask(condition):
                return
            self.wait(200)
        raise SystemExit(f"not within 120 s: {condition}; the console: {Page.console}")

    def wait(self, milliseconds: int) -> None:
        loop = QEventLoop()
        QTimer.singleShot(milliseconds, loop.quit)
        loop.exec()

    def click(self, element: str) -> None:
        """With the mouse, in the middle of what an expression of the page is."""
        self.ask(f"{element}.scrollIntoView({{block: 'center'}})")
        self.wait(300)
        x, y = self.ask(
            f"(r => [r.left + r.width / 2, r.top + r.height / 2])({element}.getBoundingClientRect())"
        )
        QTest.mouseClick(self._view.focusProxy(), Qt.MouseButton.LeftButton, pos=QPoint(round(x), round(y)))

    def picture(self, path: Path) -> None:
        self.ask("window.scrollTo(0, 0)")
        after_two_frames = "requestAnimationFrame(() => requestAnimationFrame(() => window.painted = 1))"
        self.ask(f"(window.painted = 0, {after_two_frames})")
        self.until("window.painted === 1")
        self.wait(1000)
        self._view.grab().save(str(path))


def main(path: Path, folder: Path) -> None:
    browser = Browser()
    browser.open(path)
    seen: dict[str, Any] = {"plots": browser.ask("document.querySelectorAll('.plot').length")}
    seen["drawn"] = browser.ask("document.querySelectorAll('.plot .main-svg:first-child').length")
    button: Callable[[str], str] = "document.querySelector('[data-axis={}]')".format
    seen["steps"] = browser.ask(AXIS)
    browser.click(button("seconds"))
    browser.until(f"{button('seconds')}.getAttribute('aria-pressed') === 'true'")
    seen["seconds"] = browser.ask(AXIS)
    browser.click(button("step"))
    browser.until(f"{button('step')}.getAttribute('aria-pressed') === 'true'")
    # The first entry of the legend hides its line.
    browser.click(f"{LOSS}.querySelector('.legendtoggle')")
    browser.until(f"{LOSS}.data[0].visible === 'legendonly'")
    seen["hidden"] = browser.ask(f"{LOSS}.data.map(t => t.visible).filter(v => v === 'legendonly')")
    for theme in ("light", "dark"):
        if browser.ask("document.documentElement.dataset.theme") != theme:
            browser.click("document.getElementById('theme')")
            browser.until(f"document.documentElement.dataset.theme === '{theme}'")
        seen[theme] = browser.ask(BACK)
        browser.picture(folder / f"{theme}.png")
    print(json.dumps(seen | {"console": Page.console, "requests": Requests.seen}), flush=True)
    # Qt takes Chromium apart in an order that it complains of.
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), Path(sys.argv[2]))
