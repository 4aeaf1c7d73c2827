"""The browsers that MiniWoB++ pages are shown in, used again by one episode after another."""

from __future__ import annotations

import os
import shutil
import threading
from importlib import import_module
from typing import Any

from lit_agentrl.errors import UserError

BROWSERS, DRIVERS = (
    ("chromium", "chromium-browser", "google-chrome", "chrome"),
    ("chromedriver", "chromium.chromedriver"),
)
TIME_LIMIT = 24 * 3600 * 1000  # ms; the pages' own 10 s are meant for scripts, not for language models


class Browsers:
    """A bounded number of browsers, each on a page. May be used from several threads.

    Args:
        limit: Browsers at a time.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._idle: list[tuple[str, Any]] = []
        self._num = 0
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type[Browsers], tuple[int]]:
        """Another process starts its own."""
        return Browsers, (self.limit,)

    def take(self, page: str) -> Any:
        """A browser on `page`.

        Raises:
            RuntimeError: All are in use.
        """
        closing = None
        with self._lock:
            for place, (shown, browser) in enumerate(self._idle):
                if shown == page:
                    del self._idle[place]
                    return browser
            if self._num < self.limit:
                self._num += 1
            elif self._idle:
                _, closing = self._idle.pop(0)
            else:
                raise RuntimeError(
                    f"all {self.limit} browsers are in use: set max_browsers to the episodes side by side (num_prompts "
                    "x group_size), or lower those"
                )
        if closing is not None:
            closing.close()
        try:
            return _open(page)
        except BaseException:
            with self._lock:
                self._num -= 1
            raise

    def give_back(self, page: str, browser: Any) -> None:
        """Keep a browser for the next episode on its page."""
        with self._lock:
            self._idle.append((page, browser))

    def close(self) -> None:
        """Close those that are not in use."""
        with self._lock:
            idle, self._idle = self._idle, []
            self._num -= len(idle)
        for _, browser in idle:
            browser.close()


def _open(page: str) -> Any:
    os.environ["MINIWOB_CHROME_BINARY"], os.environ["MINIWOB_CHROMEDRIVER"] = find_browser()
    made = import_module("gymnasium").make(f"miniwob/{page}-v1", disable_env_checker=True)
    made.unwrapped.instance.driver.execute_script(f"core.EPISODE_MAX_TIME = {TIME_LIMIT};")
    return made


def find_browser() -> tuple[str, str]:
    """The browser and its driver.

    Raises:
        UserError: One is missing.
    """
    found = []
    for variable, names in (("MINIWOB_CHROME_BINARY", BROWSERS), ("MINIWOB_CHROMEDRIVER", DRIVERS)):
        path = os.environ.get(variable) or next(filter(None, map(shutil.which, names)), None)
        if path is None or not os.path.exists(path):
            raise UserError(
                f"MiniWoBSuite drives a browser, and neither {variable} nor the PATH ({', '.join(names)}) gives one. "
                "Install Chromium and its driver (Debian: apt install chromium chromium-driver)."
            )
        found.append(path)
    return found[0], found[1]
