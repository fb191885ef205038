"""A real daemon as a service, and its web page in a real headless Chromium.

What it tells its service manager; that charts fill, Pause pauses, Resume resumes, and nothing sticks out of any screen.
"""

from __future__ import annotations

import json
import socket
import struct
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.procs import chromium, helpers
from tests.procs.chromium import Page
from tests.procs.helpers import Node, Nodes, nodes_below, until

pytestmark = pytest.mark.timeout(300)
WITH_A_LONG_WORD = """(() => {
    const line = document.createElement("li");
    line.textContent = "/ip4/192.0.2.7/tcp/4001".repeat(30);
    document.querySelector("#reasons").append(line);
    const width = document.documentElement.scrollWidth;
    line.remove();
    return width;
})()"""
SCREENS = [(1280, 800, "light"), (1280, 800, "dark"), (390, 844, "light"), (390, 844, "dark")]


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    yield from nodes_below(tmp_path_factory.mktemp("web"))


@pytest.fixture(scope="module")
def manager(tmp_path_factory: pytest.TempPathFactory) -> Iterator[socket.socket]:
    """A service manager's socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.bind(str(tmp_path_factory.mktemp("manager") / "notify"))
        channel.setblocking(False)
        yield channel


def heard(manager: socket.socket) -> Iterator[list[str]]:
    """Every datagram that has come, as its lines."""
    while True:
        try:
            yield manager.recv(4096).decode().split("\n")
        except BlockingIOError:
            return


@pytest.fixture(scope="module")
def live(nodes: Nodes, manager: socket.socket) -> Iterator[Node]:
    """A daemon with a page that trains as a service."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(helpers.ENVIRONMENT, "NOTIFY_SOCKET", manager.getsockname())
        patch.setitem(helpers.ENVIRONMENT, "WATCHDOG_USEC", "600000000")
        node = nodes.make("a").start("--web")
    until(lambda: any("READY=1" in lines for lines in heard(manager)), "its being ready")
    node.training(certificates=2)
    yield node
    assert node.stop() == 0
    assert node.words() == []
    assert any("STOPPING=1" in lines for lines in heard(manager))


def url(node: Node) -> str:
    """What its log says."""
    return str(node.logged("serving the web page")[-1]["url"])


def test_a_service_manager_hears_how_it_goes(live: Node, manager: socket.socket) -> None:
    until(
        lambda: any(
            lines[0] == "WATCHDOG=1" and lines[1].startswith("STATUS=training, slot ") for lines in heard(manager)
        ),
        "a ping",
    )


def test_what_a_program_gets(live: Node) -> None:
    with urllib.request.urlopen(url(live) + "api/status", timeout=60) as response:
        status = json.load(response)
    assert status["state"] == "training"
    assert len(status["slots"]) >= 2
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(url(live) + "api/pause", data=b"{}", timeout=60)
    caught.value.close()
    assert caught.value.code == 403
    with urllib.request.urlopen(url(live) + "api/watch", timeout=60) as response:
        line = response.readline()
    assert json.loads(line.removeprefix(b"data: "))["run_id"] == status["run_id"]


def settle(page: Page, script: str, what: str) -> Any:
    """Wait until an expression is true in the page."""
    try:
        return until(lambda: page.run(script), what)
    except AssertionError as error:
        raise AssertionError(f"{error}; the page says {page.run('document.body?.innerText')}") from None


@pytest.mark.skipif(chromium.find() is None, reason="no Chromium: install one, or name it in the variable CHROMIUM")
def test_a_person_with_a_browser(live: Node, tmp_path: Path) -> None:
    path = chromium.find()
    assert path is not None
    with chromium.browser(path, tmp_path) as page:
        page.show(1280, 800)
        page.call("Page.navigate", url=url(live))
        settle(page, "document.querySelector('#state')?.innerText === 'Training'", "the state")
        for chart in ("loss", "traffic"):
            settle(page, f"Number(document.querySelector('#{chart}-chart').dataset.points) >= 3", f"points of {chart}")
        assert page.run("document.querySelectorAll('#strip rect').length") >= 2
        assert "nats per byte" in page.run("document.querySelector('#loss-chart').getAttribute('aria-label')")

        page.click("#pause")
        live.until(lambda s: s.state == "paused", "the pause")
        settle(page, "document.querySelector('#state').innerText === 'Paused'", "the pause on the page")
        assert "paused by hand" in page.run("document.querySelector('#reasons').innerText")
        assert page.run("document.querySelector('#pause').disabled && !document.querySelector('#resume').disabled")
        page.click("#resume")
        live.until(lambda s: s.state == "training", "going on")
        settle(page, "document.querySelector('#state').innerText === 'Training'", "going on, on the page")

        page.click("#finish")
        page.click("#pause-hour")
        status = live.until(lambda s: s.state == "paused" and s.reasons, "the pause for an hour")
        assert 3000 < status.reasons[0].until_s <= 3600
        settle(page, "document.querySelector('#state').innerText === 'Paused'", "the pause on the page")
        page.click("#resume")
        live.training()
        settle(page, "document.querySelector('#state').innerText === 'Training'", "going on, on the page")

        for width, height, scheme in SCREENS:
            look(page, width, height, scheme, tmp_path)
        assert page.errors == []


def look(page: Page, width: int, height: int, scheme: str, folder: Path) -> None:
    """Take a picture on one kind of screen, on which nothing may stick out."""
    page.show(width, height, scheme)
    assert page.run("matchMedia('(prefers-color-scheme: dark)').matches") is (scheme == "dark")
    assert page.run("document.documentElement.scrollWidth") <= width
    assert page.run(WITH_A_LONG_WORD) <= width
    picture = page.screenshot(folder / f"{width}-{scheme}.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert struct.unpack(">II", picture[16:24]) == (width, height)
    assert len(picture) > 10_000  # an empty page takes less
