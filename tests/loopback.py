"""Web servers on the loopback interface: what every one of them needs, and one that misbehaves on request."""

from __future__ import annotations

import re
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self


class LoopbackServer:
    """Listens on a free port of 127.0.0.1 while it is used as a context; a subclass names its handler."""

    handler: type[LoopbackHandler]

    def __enter__(self) -> Self:
        server = self
        handler = type("Handler", (self.handler,), {"owner": server})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Stop listening; connections are refused from now on."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"


class LoopbackHandler(BaseHTTPRequestHandler):
    """Answers without a log; ``owner`` is the server that the context has."""

    owner: Any
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass


@dataclass
class Content:
    """What stands under one address.

    Attributes:
        body: the bytes.
        etag, modified: validators; None leaves the header out.
        media_type: the Content-Type.
        status, location: an error or a redirect instead of the body.
        ranges: whether Range requests are understood.
        announced: whether a Content-Length is sent.
    """

    body: bytes = b""
    etag: str | None = '"one"'
    modified: str | None = None
    media_type: str = "application/octet-stream"
    status: int = 200
    location: str | None = None
    ranges: bool = True
    announced: bool = True


@dataclass
class Loopback(LoopbackServer):
    """The server; use it as a context.

    Attributes:
        contents: path → content.
        requests: (path, request headers in lower case), in order of arrival.
        breaks: for the next answers in turn, after how many bytes the connection is cut.
        hold: answers wait until it is set.
    """

    contents: dict[str, Content] = field(default_factory=dict)
    requests: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    breaks: list[int] = field(default_factory=list)
    hold: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Self:
        self.hold.set()
        return super().__enter__()

    def stop(self) -> None:
        self.hold.set()
        super().stop()

    @property
    def requested_ranges(self) -> list[str | None]:
        """The Range header of each request."""
        return [headers.get("range") for _, headers in self.requests]


class _Handler(LoopbackHandler):
    owner: Loopback

    def do_GET(self) -> None:
        self.close_connection = True
        self.owner.requests.append((self.path, {name.lower(): text for name, text in self.headers.items()}))
        self.owner.hold.wait(20)
        content = self.owner.contents.get(self.path)
        if content is None:
            self._head(404, Content(media_type="text/html"), 0)
        elif content.status != 200:
            self._head(content.status, content, 0)
        else:
            self._send(content)

    def _send(self, content: Content) -> None:
        start = self._start(content)
        size = len(content.body)
        if start is None:
            self._head(200, content, size)
            start = 0
        elif start >= size:
            self._head(416, content, 0, f"bytes */{size}")
            return
        else:
            self._head(206, content, size - start, f"bytes {start}-{size - 1}/{size}")
        cut = self.owner.breaks.pop(0) if self.owner.breaks else size
        with suppress(ConnectionError):  # a client that refuses what the head says hangs up
            self.wfile.write(content.body[start : start + cut])
            self.wfile.flush()

    def _start(self, content: Content) -> int | None:
        """First byte of the range to send; None sends all of it (no range, or If-Range does not hold)."""
        match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if match is None or not content.ranges:
            return None
        condition = self.headers.get("If-Range")
        if condition is not None and condition not in (content.etag, content.modified):
            return None
        return int(match[1])

    def _head(self, status: int, content: Content, length: int, content_range: str | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content.media_type)
        self.send_header("Connection", "close")
        if content.announced:
            self.send_header("Content-Length", str(length))
        for name, text in (
            ("Location", content.location),
            ("ETag", content.etag),
            ("Last-Modified", content.modified),
            ("Content-Range", content_range),
        ):
            if text is not None:
                self.send_header(name, text)
        self.end_headers()


Loopback.handler = _Handler
