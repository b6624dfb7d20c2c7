"""A small web server for web_scrape to read: a few pages of some KB with links, metadata and tables.

`serving_pages()` runs it in threads of this process; `python -m load.pages` runs it by itself, on the address that
load users ask for when PAGES_URL does not say otherwise. Loopback only.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

HOST = "127.0.0.1"
PORT_DEFAULT = 8900
IDLE_S_MAX = 60.0
"""An idle connection holds a thread, so it must not stay for ever."""


@dataclass(frozen=True, slots=True)
class Page:
    """What is served, and what a scrape of it must come back with."""

    title: str
    lead: str
    html: bytes


class PageServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128
    """The default of 5 refuses connections as soon as many calls begin at once."""

    def handle_error(self, request: object, client_address: object) -> None:
        """A reader that went away is no news; anything else is shown."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


@contextmanager
def serving_pages(port: int = 0) -> Iterator[str]:
    """Serve PAGES while the block runs; yields the URL. Port 0 is any free one."""
    server = PageServer((HOST, port), _PageRequest)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, name="pages", daemon=True)
    thread.start()
    try:
        yield f"http://{HOST}:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _PageRequest(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = IDLE_S_MAX
    disable_nagle_algorithm = True
    # Head and body are two writes; with Nagle on, the second would wait 40 ms for a delayed ACK.

    def do_GET(self) -> None:
        page = PAGES.get(self.path)
        if page is None:
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(page.html)))
        self.end_headers()
        self.wfile.write(page.html)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: the load run's own table is the report."""


def _page(path: str, title: str, lead: str, body: str) -> Page:
    description = escape(lead, quote=True)
    html = f"""<!doctype html>
<html lang="en">
<head>
  <meta charset="utf-8">
  <title>{escape(title)}</title>
  <meta name="description" content="{description}">
  <meta property="og:title" content="{escape(title, quote=True)}">
  <meta property="og:type" content="article">
  <link rel="canonical" href="{path}">
  <style>body {{ font: 16px/1.5 serif; margin: auto; max-width: 40em }} td {{ padding: 0 1em }}</style>
  <script>document.documentElement.dataset.ready = "yes"</script>
</head>
<body>
  <nav><a href="/">Home</a> <a href="/ferries">Ferries</a> <a href="/bread">Bread</a> <a href="/archive">Letters</a>
  </nav>
  <main>
    <h1>{escape(title)}</h1>
    <p>{escape(lead)}</p>
    {body}
  </main>
  <footer><p>The Harbour Gazette. <a href="/archive#about">About these pages</a></p></footer>
</body>
</html>
"""
    return Page(title, lead, html.encode())


def _paragraphs(*texts: str) -> str:
    return "\n    ".join(f"<p>{escape(text)}</p>" for text in texts)


def _timetable() -> str:
    """Sailings every 20 minutes from 6 to 22 h, three quays in turn."""
    rows = []
    for sailing in range(48):
        hour, minute = divmod(6 * 60 + 20 * sailing, 60)
        quay = ("North Quay", "Fish Market", "Lighthouse")[sailing % 3]
        rows.append(f"<tr><td>{hour:02}:{minute:02}</td><td>{quay}</td><td>{12 + sailing % 3 * 9} min</td></tr>")
    return "<table><tr><th>Departs</th><th>From</th><th>Takes</th></tr>\n" + "\n".join(rows) + "\n</table>"


def _archive() -> str:
    items = (f'<li><a href="/archive/{number:03}">Letter {number} to the editor</a></li>' for number in range(1, 81))
    return '<h2 id="about">Letters</h2>\n<ul>\n' + "\n".join(items) + "\n</ul>"


_BREAD = _paragraphs(
    "Mix the flour and the water the evening before and leave them alone; time does most of the kneading. By the "
    "morning the dough is smooth and stretches without tearing, and only then does it get its salt and its leaven.",
    "Fold it four times in two hours: take an edge, pull it up & over, turn the bowl, go on until you are round. "
    "A dough that is warm rises fast and tastes of little, so a cool kitchen is no disadvantage.",
    "Heat the oven with its stone for an hour. The loaf needs steam for the first fifteen minutes, afterwards none: "
    "what is soft and shining then becomes a crust. It is done when it sounds hollow < knock on its underside.",
)

PAGES = {
    "/": _page(
        "/",
        "The Harbour Gazette",
        "News, sailings and recipes from a small town by the sea.",
        _paragraphs(
            "The new mole is open. Anglers have it to themselves until eight, children until the lamps are lit.",
            "The library lends seeds from March on: take a bag, sow it, and bring a bag of your own in autumn.",
        ),
    ),
    "/ferries": _page("/ferries", "Ferries: summer timetable", "All sailings from the three quays.", _timetable()),
    "/bread": _page("/bread", "Bread in two days", "A loaf that needs patience more than work.", _BREAD),
    "/archive": _page("/archive", "Archive: letters & answers", "Eighty letters, newest last.", _archive()),
}


def main() -> None:
    """Serve until interrupted."""
    parser = argparse.ArgumentParser(prog="python -m load.pages", description="Serves pages for web_scrape to read.")
    parser.add_argument("--port", type=int, default=PORT_DEFAULT)
    with PageServer((HOST, parser.parse_args().port), _PageRequest) as server:
        address = f"{HOST}:{server.server_port}"
        print(f"Serving {', '.join(PAGES)} on http://{address}; the service needs EGRESS_ALLOW={address}", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            pass


if __name__ == "__main__":
    main()
