"""Downloads: complete or not at all, resumed where that is safe, and reported in words a chemist can act on."""

from __future__ import annotations

import hashlib
import random
import socket
import threading
import urllib.request
from pathlib import Path

import pytest

import forcetune.utils.download as module
from forcetune.errors import ForcetuneError, InputError
from forcetune.utils import file_lock
from forcetune.utils.download import download, progress_bar
from loopback import Content, Loopback

BODY = random.Random(1).randbytes(700_001)  # several blocks, not a multiple of one
OTHER = random.Random(2).randbytes(650_003)


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BACKOFF", 0.0)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "models" / "a.model"


def digest(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


def leftovers(target: Path) -> list[str]:
    return sorted(path.name for path in target.parent.iterdir() if path != target)


def test_complete_download_reports_progress_and_leaves_only_the_file(server: Loopback, target: Path) -> None:
    server.contents["/a.model"] = Content(BODY)
    seen: list[tuple[int, int | None]] = []
    actual = download(f"{server.url}/a.model", target, progress=lambda done, total: seen.append((done, total)))
    assert actual == digest(BODY)
    assert target.read_bytes() == BODY
    assert leftovers(target) == []
    assert seen[0] == (0, len(BODY))
    assert seen[-1] == (len(BODY), len(BODY))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert len(server.requests) == 1


def test_expected_checksum_in_any_case_is_accepted(server: Loopback, target: Path) -> None:
    server.contents["/a.model"] = Content(BODY)
    assert download(f"{server.url}/a.model", target, sha256=digest(BODY).upper()) == digest(BODY)


def test_length_need_not_be_announced(server: Loopback, target: Path) -> None:
    server.contents["/a.model"] = Content(BODY, announced=False)
    totals: list[int | None] = []
    download(f"{server.url}/a.model", target, progress=lambda done, total: totals.append(total))
    assert target.read_bytes() == BODY
    assert set(totals) == {None}


def test_an_existing_target_is_replaced(server: Loopback, target: Path) -> None:
    target.parent.mkdir()
    target.write_bytes(b"old")
    server.contents["/a.model"] = Content(BODY)
    download(f"{server.url}/a.model", target)
    assert target.read_bytes() == BODY


def test_a_broken_connection_is_resumed_within_one_call(server: Loopback, target: Path) -> None:
    server.contents["/a.model"] = Content(BODY)
    server.breaks = [300_000, 100_000]
    assert download(f"{server.url}/a.model", target) == digest(BODY)
    assert target.read_bytes() == BODY
    assert server.requested_ranges == [None, "bytes=300000-", "bytes=400000-"]
    assert server.requests[1][1]["if-range"] == '"one"'


@pytest.mark.parametrize("content", [Content(BODY), Content(BODY, etag=None, modified="Sat, 01 Mar 2025 10:00:00 GMT")])
def test_a_later_call_resumes_what_was_kept(content: Content, server: Loopback, target: Path) -> None:
    server.contents["/a.model"] = content
    server.breaks = [300_000, 0, 0, 0]
    with pytest.raises(ForcetuneError, match=r"broke off 4 times .*0\.3 MB are kept, run again to resume") as caught:
        download(f"{server.url}/a.model", target)
    assert caught.value.exit_code == 1
    assert not target.exists()
    server.requests.clear()
    seen: list[int] = []
    download(f"{server.url}/a.model", target, sha256=digest(BODY), progress=lambda done, _: seen.append(done))
    assert target.read_bytes() == BODY
    assert server.requested_ranges == ["bytes=300000-"]
    assert seen[0] == 300_000
    assert leftovers(target) == []


def test_content_that_changed_meanwhile_is_fetched_anew(server: Loopback, target: Path) -> None:
    server.contents["/a.model"] = Content(BODY)
    server.breaks = [300_000, 0, 0, 0]
    with pytest.raises(ForcetuneError):
        download(f"{server.url}/a.model", target)
    server.contents["/a.model"] = Content(OTHER, etag='"two"')
    assert download(f"{server.url}/a.model", target) == digest(OTHER)
    assert target.read_bytes() == OTHER


@pytest.mark.parametrize("etag", [None, 'W/"weak"'])
def test_without_a_strong_validator_nothing_is_resumed(etag: str | None, server: Loopback, target: Path) -> None:
    server.contents["/a.model"] = Content(BODY, etag=etag)
    server.breaks = [300_000]
    download(f"{server.url}/a.model", target)
    assert target.read_bytes() == BODY
    assert server.requested_ranges == [None, None]


def test_a_server_without_ranges_starts_over(server: Loopback, target: Path) -> None:
    server.contents["/a.model"] = Content(BODY, ranges=False)
    server.breaks = [300_000]
    download(f"{server.url}/a.model", target)
    assert target.read_bytes() == BODY


def test_a_part_that_is_already_complete_is_taken(server: Loopback, target: Path) -> None:
    server.contents["/a.model"] = Content(BODY)
    server.breaks = [300_000, 0, 0, 0]
    with pytest.raises(ForcetuneError):
        download(f"{server.url}/a.model", target)
    (target.parent / ".a.model.part").write_bytes(BODY)
    server.requests.clear()
    assert download(f"{server.url}/a.model", target) == digest(BODY)
    assert server.requested_ranges == [f"bytes={len(BODY)}-"]


def test_a_part_longer_than_the_file_is_thrown_away(server: Loopback, target: Path) -> None:
    server.contents["/a.model"] = Content(BODY)
    server.breaks = [300_000, 0, 0, 0]
    with pytest.raises(ForcetuneError):
        download(f"{server.url}/a.model", target)
    (target.parent / ".a.model.part").write_bytes(BODY + b"more")
    download(f"{server.url}/a.model", target)
    assert target.read_bytes() == BODY


def test_a_part_of_another_address_is_not_continued(server: Loopback, target: Path) -> None:
    server.contents |= {"/a.model": Content(BODY), "/b.model": Content(OTHER)}
    server.breaks = [300_000, 0, 0, 0]
    with pytest.raises(ForcetuneError):
        download(f"{server.url}/a.model", target)
    server.requests.clear()
    download(f"{server.url}/b.model", target)
    assert target.read_bytes() == OTHER
    assert server.requested_ranges == [None]


@pytest.mark.parametrize("record", ["", "[]", '{"url": 1}', "{"])
def test_a_damaged_record_of_a_part_is_no_obstacle(record: str, server: Loopback, target: Path) -> None:
    target.parent.mkdir()
    (target.parent / ".a.model.part").write_bytes(b"something")
    (target.parent / ".a.model.part.json").write_text(record)
    server.contents["/a.model"] = Content(BODY)
    download(f"{server.url}/a.model", target)
    assert target.read_bytes() == BODY


def test_wrong_checksum_is_refused_and_removed(server: Loopback, target: Path) -> None:
    server.contents["/a.model"] = Content(BODY)
    target.parent.mkdir()
    target.write_bytes(b"old")
    with pytest.raises(InputError, match="not the expected one") as caught:
        download(f"{server.url}/a.model", target, sha256=digest(OTHER))
    assert digest(OTHER) in str(caught.value)
    assert digest(BODY) in str(caught.value)
    assert target.read_bytes() == b"old"
    assert leftovers(target) == []


def test_more_bytes_than_announced_never_become_the_file(
    server: Loopback, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A part that already exceeds the total of its range, as after a bug or a hand edit."""
    server.contents["/a.model"] = Content(BODY)
    monkeypatch.setattr(module, "_content_range", lambda headers: (300_000, 400_000))
    server.breaks = [300_000]
    download(f"{server.url}/a.model", target)
    assert target.read_bytes() == BODY


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (404, "no such file on the server"),
        (410, "no such file"),
        (403, "refused access"),
        (418, "answered 418"),
    ],
)
def test_refusals_are_told_at_once(status: int, said: str, server: Loopback, target: Path) -> None:
    server.contents["/a.model"] = Content(status=status)
    with pytest.raises(InputError, match=said) as caught:
        download(f"{server.url}/a.model", target)
    assert f"{server.url}/a.model" in str(caught.value)
    assert "by hand" in str(caught.value)
    assert len(server.requests) == 1
    assert not target.exists()


def test_an_overloaded_server_is_asked_again(server: Loopback, target: Path) -> None:
    server.contents["/a.model"] = Content(status=503)
    with pytest.raises(ForcetuneError, match="503") as caught:
        download(f"{server.url}/a.model", target)
    assert not isinstance(caught.value, InputError)
    assert len(server.requests) == 4


def test_a_web_page_is_not_a_model(server: Loopback, target: Path) -> None:
    server.contents["/a.model"] = Content(b"<html>Please log in</html>", media_type="text/html; charset=utf-8")
    with pytest.raises(InputError, match="web page instead of a file"):
        download(f"{server.url}/a.model", target)
    assert not target.exists()
    assert leftovers(target) == []


def test_redirects_are_followed(server: Loopback, target: Path) -> None:
    server.contents["/release/a.model"] = Content(status=302, location="/storage/123", etag=None)
    server.contents["/storage/123"] = Content(BODY)
    server.breaks = [300_000]
    assert download(f"{server.url}/release/a.model", target) == digest(BODY)
    assert [path for path, _ in server.requests] == ["/release/a.model", "/storage/123"] * 2
    assert server.requested_ranges[-1] == "bytes=300000-"


@pytest.mark.parametrize(
    ("location", "said"),
    [("file:///etc/passwd", "not allowed"), ("ftp://127.0.0.1/a.model", "not a secure web address")],
)
def test_redirects_out_of_the_web_are_refused(location: str, said: str, server: Loopback, target: Path) -> None:
    server.contents["/a.model"] = Content(status=302, location=location)
    with pytest.raises(InputError, match=said):
        download(f"{server.url}/a.model", target)
    assert not target.exists()


def test_redirects_from_https_to_http_are_refused() -> None:
    handler = module._SafeRedirects()
    request = urllib.request.Request("https://models.example/a.model")
    with pytest.raises(InputError, match="not a secure web address"):
        handler.redirect_request(request, None, 302, "Found", {}, "http://models.example/a.model")


def test_endless_redirects_end(server: Loopback, target: Path) -> None:
    server.contents["/a.model"] = Content(status=302, location="/a.model")
    with pytest.raises(InputError, match="302"):
        download(f"{server.url}/a.model", target)


def test_unreachable_server_says_what_to_do_and_does_not_wait(
    server: Loopback, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"{server.url}/a.model"
    server.stop()
    monkeypatch.setattr(server, "stop", lambda: None)
    monkeypatch.setattr(module.time, "sleep", lambda seconds: pytest.fail("waited"))
    with pytest.raises(InputError, match=r"Could not reach 127\.0\.0\.1") as caught:
        download(url, target)
    assert url in str(caught.value)
    assert str(target) in str(caught.value)


def test_offline_is_told_by_the_name_of_the_host(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_names(*args: object, **kwargs: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(socket, "getaddrinfo", no_names)
    with pytest.raises(InputError, match=r"Could not reach models\.example \(Name or service not known\)"):
        download("https://models.example/a.model", target)


def test_proxies_of_the_environment_are_used(server: Loopback, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request through a proxy carries the whole address, which this server is asked for by path."""
    monkeypatch.delenv("no_proxy")
    monkeypatch.delenv("NO_PROXY")
    monkeypatch.setenv("http_proxy", server.url)
    server.contents["http://models.example/a.model"] = Content(BODY)
    assert download("http://models.example/a.model", target) == digest(BODY)


def test_a_silent_server_does_not_hold_us_for_ever(server: Loopback, target: Path) -> None:
    server.contents["/a.model"] = Content(BODY)
    server.hold.clear()
    with pytest.raises(ForcetuneError, match="timed out"):
        download(f"{server.url}/a.model", target, timeout=0.05)


@pytest.mark.parametrize("url", ["file:///etc/passwd", "a.model", "ftp://host/a.model", "http:///a.model", ""])
def test_only_web_addresses(url: str, target: Path) -> None:
    with pytest.raises(InputError, match="only http and https addresses"):
        download(url, target)
    assert not target.parent.exists()


@pytest.mark.parametrize("url", ["http://127.0.0.1:port/a.model", "http://127.0.0.1/a b.model"])
def test_malformed_addresses(url: str, target: Path) -> None:
    with pytest.raises(InputError, match="not a well-formed address"):
        download(url, target)


def test_two_at_once_download_once(server: Loopback, target: Path) -> None:
    server.contents["/a.model"] = Content(BODY)
    server.hold.clear()
    digests: list[str] = []
    threads = [
        threading.Thread(target=lambda: digests.append(download(f"{server.url}/a.model", target))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    while not server.requests:
        pass
    server.hold.set()
    for thread in threads:
        thread.join(20)
    assert digests == [digest(BODY)] * 4
    assert len(server.requests) == 1
    assert leftovers(target) == []


def test_who_waited_gets_only_what_has_the_checksum(
    server: Loopback, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What another process put there meanwhile may be something else."""
    server.contents["/a.model"] = Content(BODY)
    signatures = iter((None, (1, 2, 3)))
    monkeypatch.setattr(module, "_signature", lambda _: next(signatures))
    target.parent.mkdir(parents=True)
    target.write_bytes(b"of another address")
    md5 = hashlib.md5(BODY, usedforsecurity=False).hexdigest()
    assert download(f"{server.url}/a.model", target, md5=md5) == digest(BODY)
    assert target.read_bytes() == BODY


def test_the_lock_without_flock(server: Loopback, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows and some network file systems: a lock file, and one left over by a crash is overcome."""
    monkeypatch.setattr(file_lock, "fcntl", None)
    server.contents["/a.model"] = Content(BODY)
    target.parent.mkdir()
    lock = target.parent / ".a.model.lock-file"
    lock.touch()
    monkeypatch.setattr(file_lock, "_STALE_LOCK", 0.0)
    assert download(f"{server.url}/a.model", target) == digest(BODY)
    assert leftovers(target) == []


def test_a_folder_in_the_way_is_reported(server: Loopback, target: Path) -> None:
    target.mkdir(parents=True)
    server.contents["/a.model"] = Content(BODY)
    with pytest.raises(InputError, match="cannot be written"):
        download(f"{server.url}/a.model", target)


def test_a_file_in_place_of_the_folder_is_told(server: Loopback, tmp_path: Path) -> None:
    (tmp_path / "models").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        download(f"{server.url}/a.model", tmp_path / "models" / "a.model")


def test_a_full_disk_is_told(server: Loopback, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    server.contents["/a.model"] = Content(BODY)
    monkeypatch.setattr(module.os, "fsync", full)
    with pytest.raises(InputError, match="no space left"):
        download(f"{server.url}/a.model", target)
    assert not target.exists()


def test_progress_bar_writes_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("a model") as report:
        report(0, None)
        report(500, 1000)
        report(1000, 1000)
    out, error = capsys.readouterr()
    assert out == ""
    assert "a model" in error
