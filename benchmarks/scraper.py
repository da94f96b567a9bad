"""Prometheus' part: a scrape each second, from a thread of the load program."""

import threading
import time
from typing import Final
from urllib.error import URLError
from urllib.request import ProxyHandler, Request, build_opener

EVERY_S: Final = 1.0


def scrape(port: int, key: str) -> None:
    """Asks /metrics each second while somebody listens there. Raises HTTPError if the first is refused."""
    opener = build_opener(ProxyHandler({}))
    request = Request(f"http://127.0.0.1:{port}/metrics", headers={"Authorization": f"Bearer {key}"})

    def keep() -> None:
        while True:
            time.sleep(EVERY_S)
            try:
                opener.open(request, timeout=10).read()
            except (URLError, OSError):
                return

    opener.open(request, timeout=10).read()
    threading.Thread(target=keep, name="scraper", daemon=True).start()
