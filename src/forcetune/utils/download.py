"""Fetching large files: resumable, atomic, checked.

A file under way is ``.NAME.part`` beside its target, with ``.NAME.part.json`` that remembers which content it
is a part of (the server's ETag or date). The target appears in one step, after length and checksum have been
checked, so whoever finds it has all of it. Only the standard library is used; proxies are taken from the
environment.
"""

from __future__ import annotations

import errno
import http.client
import json
import os
import re
import socket
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.message import Message
from pathlib import Path
from typing import IO, Any

from forcetune.errors import ForcetuneError, InputError
from forcetune.utils.file_lock import locked
from forcetune.utils.files import compute_checksum, compute_sha256, write_text

ProgressCallback = Callable[[int, int | None], None]

_ATTEMPTS = 4
_BACKOFF = 1.0  # s, doubled after each attempt that brought nothing new
_BLOCK = 1 << 18
_TRANSIENT = {408, 425, 429, 500, 502, 503, 504}
_UNREACHABLE = {errno.ECONNREFUSED, errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN}


class _InterruptedTransfer(Exception):
    """The transfer ended early and may be tried again."""


class _UnreachableHost(_InterruptedTransfer):
    """No connection could be made."""


class _SafeRedirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects within http and https, but never from https to http."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        scheme = urllib.parse.urlsplit(newurl).scheme.lower()
        if scheme not in ("http", "https") or (req.type == "https" and scheme != "https"):
            raise InputError(
                f"{req.full_url} redirects to {newurl}, which is not a secure web address; nothing was "
                "downloaded. A proxy or login page may stand in between: download the file by hand and pass "
                "its path."
            )
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def download(
    url: str,
    target: str | os.PathLike[str],
    *,
    sha256: str | None = None,
    md5: str | None = None,
    progress: ProgressCallback | None = None,
    timeout: float = 30.0,
) -> str:
    """Fetch ``url`` into ``target`` and return the SHA-256 of what arrived, as 64 hexadecimal digits.

    An earlier part is resumed when the server can tell that the content is still the same; broken connections
    are tried again a few times. Of several processes that ask for the same target, one downloads and the
    others wait and take its result. A target that exists already is replaced.

    Args:
        url: http or https address.
        target: the file to write; its folder is created.
        sha256, md5: expected checksums; without any every complete file is accepted.
        progress: called with (bytes so far, bytes in all or None).
        timeout: longest silence of the server, s.

    Raises:
        InputError: the address is wrong or refused, the host is out of reach, the disk is full, the content
            is not what was expected. The target is left as it was.
        ForcetuneError: the connection kept breaking; what arrived is kept and the next call resumes.
    """
    _check_address(url)
    target = Path(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        before = _signature(target)
        part = _Part(url, target)
        with locked(target, part.path):
            if _signature(target) != before and target.exists():
                digest = compute_sha256(target)  # another process finished while this one waited
                if _differing(target, digest, sha256, md5) is None:
                    return digest
            part.fetch(progress, timeout)
            return part.finish(sha256, md5)
    except OSError as error:
        raise _disk_problem(error, target) from error


def _check_address(url: str) -> None:
    try:
        parts = urllib.parse.urlsplit(url)
        web = parts.scheme.lower() in ("http", "https") and bool(parts.hostname)
        well_formed = parts.port != 0 and url.isascii() and url.isprintable() and " " not in url
    except ValueError:  # a port that is no number, a bracket that is not closed
        web, well_formed = True, False
    if not web:
        raise InputError(f"{url}: only http and https addresses can be downloaded.")
    if not well_formed:
        raise InputError(f"{url}: not a well-formed address; write spaces and letters with accents as %20, %C3%A9.")


class _Part:
    """The piece of a file that has arrived so far, and what it is a piece of."""

    def __init__(self, url: str, target: Path) -> None:
        self.url = url
        self.target = target
        self.path = target.with_name(f".{target.name}.part")
        self.record = target.with_name(f".{target.name}.part.json")

    @property
    def size(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    def discard(self) -> None:
        self.path.unlink(missing_ok=True)
        self.record.unlink(missing_ok=True)

    def validator(self) -> str | None:
        """What proves to the server which content the part belongs to; None when it cannot be resumed."""
        try:
            record = json.loads(self.record.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        if not isinstance(record, dict) or record.get("url") != self.url:
            return None
        return record.get("validator")

    def fetch(self, progress: ProgressCallback | None, timeout: float) -> None:
        """Transfer until the part is complete, with pauses between attempts that bring nothing new."""
        failures, furthest = 0, self.size
        while True:
            try:
                self._transfer(progress, timeout)
                return
            except _InterruptedTransfer as error:
                if isinstance(error, _UnreachableHost) and failures == 0 and self.size <= furthest:
                    raise InputError(self._by_hand(str(error))) from error
                failures = failures + 1 if self.size <= furthest else 1
                furthest = max(furthest, self.size)
                if failures >= _ATTEMPTS:
                    raise ForcetuneError(
                        f"{self.url}: the download broke off {_ATTEMPTS} times without getting further "
                        f"({error}); {self.size / 1e6:.1f} MB are kept, run again to resume."
                    ) from error
                time.sleep(_BACKOFF * 2 ** (failures - 1))

    def _by_hand(self, reason: str) -> str:
        host = urllib.parse.urlsplit(self.url).hostname
        return (
            f"Could not reach {host} ({reason}). Download {self.target.name} by hand from {self.url} on a "
            f"machine that is online and pass its path, or put it into {self.target}."
        )

    def _transfer(self, progress: ProgressCallback | None, timeout: float) -> None:
        """One request: append to the part, or start it again where the server cannot continue it."""
        validator = self.validator()
        if validator is None:
            self.discard()
        have = self.size
        headers = {"User-Agent": "forcetune", "Accept-Encoding": "identity"}
        if have and validator:
            headers |= {"Range": f"bytes={have}-", "If-Range": validator}
        response = self._open(urllib.request.Request(self.url, headers=headers), timeout)
        with response:
            if response.status == 416:
                if _content_range(response.headers)[1] == have:
                    return
                self.discard()
                raise _InterruptedTransfer("the server could not continue it")
            total = self._begin(response, have)
            self._receive(response, total, progress)

    def _open(self, request: urllib.request.Request, timeout: float) -> Any:
        opener = urllib.request.build_opener(_SafeRedirects)
        try:
            return opener.open(request, timeout=timeout)
        except urllib.error.HTTPError as error:
            if error.code == 416:
                return error
            error.close()
            raise _http_problem(error, self.url) from error
        except urllib.error.URLError as error:
            raise _connection_problem(error.reason, self.url) from error
        except (OSError, http.client.HTTPException) as error:
            raise _InterruptedTransfer(_say(error)) from error

    def _begin(self, response: Any, have: int) -> int | None:
        """Prepare the part for this response; returns the bytes of the whole file, None if unknown."""
        headers = response.headers
        if headers.get_content_type() == "text/html" and headers["Content-Type"]:
            raise InputError(
                f"{self.url} answered with a web page instead of a file; a proxy or login page may stand in "
                "between. Download the file by hand and pass its path."
            )
        if response.status == 206:
            start, total = _content_range(headers)
            if start != have or _validator(headers) not in (None, self.validator()):
                self.discard()
                raise _InterruptedTransfer("the server continued it at another place")
            return total
        self.path.write_bytes(b"")
        write_text(self.record, json.dumps({"url": self.url, "validator": _validator(headers)}, indent=1))
        length = headers["Content-Length"]
        return int(length) if length and length.isdigit() else None

    def _receive(self, response: Any, total: int | None, progress: ProgressCallback | None) -> None:
        done = self.size
        with self.path.open("ab") as stream:
            while True:
                if progress is not None:
                    progress(done, total)
                try:
                    block = response.read(_BLOCK)
                except (OSError, http.client.HTTPException) as error:
                    raise _InterruptedTransfer(_say(error)) from error
                if not block:
                    break
                stream.write(block)
                done += len(block)
            stream.flush()
            os.fsync(stream.fileno())
        if total is not None and done < total:
            raise _InterruptedTransfer(f"the connection closed at {done} of {total} bytes")
        if total is not None and done > total:
            self.discard()
            raise _InterruptedTransfer(f"{done} bytes arrived where {total} were announced")

    def finish(self, sha256: str | None, md5: str | None) -> str:
        """Check the complete part and move it onto the target."""
        digest = compute_sha256(self.path)
        differing = _differing(self.path, digest, sha256, md5)
        if differing is not None:
            self.discard()
            raise InputError(
                f"{self.url}: the downloaded file is not the expected one ({differing}); it was removed. Run again; if "
                "it happens again, the file was changed by its publisher or on the way: ask the publisher, or "
                "download it by hand, check it, and pass its path."
            )
        self.path.replace(self.target)
        self.record.unlink(missing_ok=True)
        return digest


def _differing(path: Path, digest: str, sha256: str | None, md5: str | None) -> str | None:
    """The first checksum of a file that is not the expected one, for a message; ``digest`` is its SHA-256."""
    for name, expected, actual in (("SHA-256", sha256, digest), ("MD5", md5, md5 and compute_checksum(path, "md5"))):
        if expected is not None and actual != expected.lower():
            return f"{name} expected {expected.lower()}, got {actual}"
    return None


def _validator(headers: Message) -> str | None:
    """The strong validator of a response; weak ETags do not promise equal bytes (RFC 9110, 8.8.1)."""
    tag = headers["ETag"]
    if tag and not tag.startswith("W/"):
        return tag
    return headers["Last-Modified"]


def _content_range(headers: Message) -> tuple[int | None, int | None]:
    """(first byte, bytes of the whole file) of a Content-Range header, None for what it does not say."""
    match = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)", headers["Content-Range"] or "")
    if match is None:
        return None, None
    start, total = match.groups()
    return (int(start) if start else None), (int(total) if total != "*" else None)


def _say(error: object) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _http_problem(error: urllib.error.HTTPError, url: str) -> Exception:
    if error.code in _TRANSIENT:
        return _InterruptedTransfer(f"the server answered {error.code} {error.reason}")
    by_hand = "download the file by hand and pass its path."
    if error.code in (404, 410):
        return InputError(
            f"{url}: no such file on the server ({error.code}); it may have moved: update forcetune, or {by_hand}"
        )
    if error.code in (401, 403, 407):
        return InputError(f"{url}: the server or a proxy refused access ({error.code} {error.reason}); {by_hand}")
    return InputError(f"{url}: the server answered {error.code} {error.reason}; try later, or {by_hand}")


def _connection_problem(reason: object, url: str) -> Exception:
    if isinstance(reason, ssl.SSLCertVerificationError):
        return InputError(
            f"{url}: the server's certificate is not trusted ({reason.verify_message}). Behind a proxy that "
            "inspects traffic, set SSL_CERT_FILE to your institution's certificates, or download the file by "
            "hand."
        )
    offline = isinstance(reason, (socket.gaierror, TimeoutError)) or getattr(reason, "errno", None) in _UNREACHABLE
    return (_UnreachableHost if offline else _InterruptedTransfer)(_say(reason))


def _disk_problem(error: OSError, target: Path) -> InputError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return InputError(
            f"{target}: no space left in {target.parent}. Free some, or choose another folder; what has "
            "arrived is kept and the next run resumes."
        )
    return InputError(f"{target}: cannot be written ({_say(error)}); choose another folder.")


def _signature(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size


@contextmanager
def progress_bar(label: str) -> Iterator[ProgressCallback]:
    """Show bytes, speed and time left on standard error; yields the callback for :func:`download`."""
    from rich import progress
    from rich.console import Console

    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.DownloadColumn(),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=Console(stderr=True)) as bars:
        task = bars.add_task(label, total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)
