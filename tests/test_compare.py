"""`efrdn compare`: the page in a real browser, by mouse, keyboard and fingers."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from efrdn_fast import cli, images, metrics
from efrdn_fast.compare_page import page
from efrdn_fast.images import Picture
from efrdn_fast.metadata import Metadata
from tests.image_files import SRGB

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
RED, GREEN, BLUE = (250, 20, 20), (20, 220, 20), (20, 20, 250)
WIDTH, HEIGHT = 900, 700


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A red LR of 15x12 px, a green SR and a blue HR of 60x48."""
    folder = tmp_path_factory.mktemp("pictures")
    paths = []
    for name, colour, factor in (("lr", RED, 1), ("sr", GREEN, 4), ("hr", BLUE, 4)):
        pixels = np.full((12 * factor, 15 * factor, 3), colour, np.uint8)
        paths.append(images.write(folder / f"{name}.png", Picture(pixels)))
    return paths


class Browser:
    """Headless Chromium with one page, spoken to through pipes by its DevTools protocol."""

    def __init__(self, program: str, folder: Path):
        theirs, self.out = os.pipe()
        self.inp, answers = os.pipe()
        words = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe"]
        words += [f"--user-data-dir={folder}", "--no-first-run", "--hide-scrollbars"]

        def connect() -> None:
            """The browser reads commands from descriptor 3 and writes answers to 4."""
            copies = os.dup(theirs), os.dup(answers)
            os.dup2(copies[0], 3)
            os.dup2(copies[1], 4)

        self.process = subprocess.Popen(
            [program, *words, "about:blank"],
            preexec_fn=connect,
            close_fds=False,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs)
        os.close(answers)
        self.answers = os.fdopen(self.inp, "rb")
        self.count, self.session, self.requests = 0, None, []
        targets = self.call("Target.getTargets")["targetInfos"]
        target = next(t["targetId"] for t in targets if t["type"] == "page")
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self.session = attached["sessionId"]
        self.call("Page.enable")
        self.call("Network.enable")
        size = {"width": WIDTH, "height": HEIGHT, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **size)

    def call(self, method: str, **options) -> dict:
        """Answer to one command; requests of the page that come between are noted."""
        self.count += 1
        message = {"id": self.count, "method": method, "params": options}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self.read()
            if answer.get("id") == self.count:
                assert "error" not in answer, answer
                return answer["result"]

    def read(self) -> dict:
        data = bytearray()
        while (byte := self.answers.read(1)) != b"\0":
            assert byte, "the browser is gone"
            data += byte
        message = json.loads(data)
        if message.get("method") == "Network.requestWillBeSent":
            self.requests.append(message["params"]["request"]["url"])
        return message

    def open(self, path: Path) -> None:
        """Load a page and wait until it and its pictures are there."""
        self.requests.clear()
        self.call("Page.navigate", url=path.resolve().as_uri())
        ready = (
            "new Promise(done => { const look = () => document.readyState === 'complete' && "
            "[...document.images].every(i => i.complete && i.naturalWidth) ? done(true) "
            ": setTimeout(look, 20); look(); })"
        )
        while self.js("location.href") == "about:blank":
            pass
        assert self.js(ready)

    def js(self, code: str):
        """Value of an expression in the page."""
        options = {"expression": code, "returnByValue": True, "awaitPromise": True}
        answer = self.call("Runtime.evaluate", **options)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def state(self) -> dict:
        return self.js("({...state})")

    def mouse(self, kind: str, x: float, y: float, **options) -> None:
        self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, **options)

    def drag(self, start, end) -> None:
        self.mouse("mousePressed", *start, button="left", clickCount=1)
        self.mouse("mouseMoved", *end, button="left", buttons=1)
        self.mouse("mouseReleased", *end, button="left", clickCount=1)

    def touch(self, kind: str, *points) -> None:
        fingers = [{"x": x, "y": y, "id": i} for i, (x, y) in enumerate(points)]
        self.call("Input.dispatchTouchEvent", type=kind, touchPoints=fingers)

    def key(self, key: str, code: str = "", modifiers: int = 0) -> None:
        options = {"key": key, "code": code, "modifiers": modifiers}
        self.call("Input.dispatchKeyEvent", type="keyDown", **options)
        self.call("Input.dispatchKeyEvent", type="keyUp", **options)

    def screenshot(self) -> np.ndarray:
        """`[H, W, 3]`."""
        data = base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])
        return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.answers.close()
        os.close(self.out)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    program = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        reason = f"no browser ({', '.join(BROWSERS)}): install Chromium or set CHROMIUM"
        pytest.skip(reason)
    found = Browser(program, tmp_path_factory.mktemp("profile"))
    yield found
    found.close()


@pytest.fixture
def opened(browser, files, tmp_path):
    """The browser with the page of the three pictures."""
    path = tmp_path / "page.html"
    path.write_text(page(*files), encoding="utf-8")
    browser.open(path)
    return browser


def where(shot, colour):
    """Columns in which most of the middle rows have that colour."""
    rows = shot[HEIGHT // 2 - 20 : HEIGHT // 2 + 20]
    near = (np.abs(rows.astype(int) - colour).max(axis=2) < 40).mean(axis=0) > 0.9
    return np.flatnonzero(near)


def test_one_file_and_no_network(opened):
    assert len([url for url in opened.requests if not url.startswith(("file:", "data:"))]) == 0
    assert any(url.startswith("data:image/png") for url in opened.requests)
    shot = opened.screenshot()
    left, right = where(shot, RED), where(shot, GREEN)
    assert len(left) > 300 and len(right) > 300
    assert left.max() < WIDTH / 2 < right.min()


def test_the_slider_by_mouse_and_keyboard(opened):
    opened.drag((WIDTH / 2, 400), (WIDTH / 4, 410))
    assert opened.state()["border"] == pytest.approx(0.25, abs=0.01)
    assert where(opened.screenshot(), GREEN).min() < WIDTH / 4 + 30
    before = opened.state()
    opened.key("]")
    opened.key("]")
    after = opened.state()
    assert after["border"] == pytest.approx(before["border"] + 0.04)
    assert (after["x"], after["zoom"]) == (before["x"], before["zoom"])
    opened.drag((WIDTH * after["border"], 400), (-50, 400))
    assert opened.state()["border"] == 0 and len(where(opened.screenshot(), RED)) == 0


def test_both_sides_zoom_and_move_together(opened):
    x, y = 300, 300
    spot = f"(() => {{ const b = view.getBoundingClientRect(); return [({x} - b.left - state.x) / "
    spot += f"state.zoom, ({y} - b.top - state.y) / state.zoom]; }})()"
    before, zoom = opened.js(spot), opened.state()["zoom"]
    opened.mouse("mouseWheel", x, y, deltaX=0, deltaY=-200)
    assert opened.state()["zoom"] == pytest.approx(zoom * np.exp(0.5))
    assert opened.js(spot) == pytest.approx(before)  # the point under the pointer stays
    start = opened.state()
    opened.drag((200, 500), (260, 470))
    moved = opened.state()
    assert (moved["x"] - start["x"], moved["y"] - start["y"]) == pytest.approx((60, -30))
    places = opened.js("[...document.images].map(i => i.style.transform)")
    assert len(places) == 2 and places[0] == places[1]
    opened.key("0")
    assert opened.state()["zoom"] == pytest.approx(zoom)


def test_two_fingers_zoom_and_one_moves(opened):
    zoom = opened.state()["zoom"]
    opened.touch("touchStart", (200, 300), (300, 300))
    opened.touch("touchMove", (150, 300), (350, 300))
    opened.touch("touchEnd")
    pinched = opened.state()
    assert pinched["zoom"] == pytest.approx(2 * zoom, rel=0.02)
    opened.touch("touchStart", (200, 300))
    opened.touch("touchMove", (230, 320))
    opened.touch("touchEnd")
    moved = opened.state()
    assert (moved["x"] - pinched["x"], moved["y"] - pinched["y"]) == pytest.approx((30, 20))
    opened.touch("touchStart", (WIDTH / 2, 500))
    opened.touch("touchMove", (WIDTH * 0.75, 500))
    opened.touch("touchEnd")
    assert opened.state()["border"] == pytest.approx(0.75, abs=0.01)


def test_pictures_and_sizes_by_keyboard(opened):
    opened.key("3", "Digit3")
    opened.key("!", "Digit1", modifiers=8)
    shot = opened.screenshot()
    assert where(shot, BLUE).max() < WIDTH / 2 < where(shot, RED).min()
    assert opened.js("at('left').value") == "2" and opened.js("at('right').value") == "0"
    opened.key("f")
    assert opened.state()["zoom"] == 1
    opened.key("+")
    assert opened.state()["zoom"] == 1.25
    before = opened.state()["x"]
    opened.key("ArrowRight", "ArrowRight")
    assert opened.state()["x"] == before - 40
    assert opened.js("view.classList.contains('pixels')")
    opened.key("p")
    assert not opened.js("view.classList.contains('pixels')")


def test_a_title_cannot_break_the_page(browser, files, tmp_path):
    path = tmp_path / "page.html"
    title = "</script><script>window.broken = 1</script> $pictures & <b>"
    path.write_text(page(*files[:2], title=title), encoding="utf-8")
    browser.open(path)
    assert browser.js("document.title") == title and browser.js("window.broken") is None
    assert browser.js("pictures.length") == 2


def test_the_command(files, tmp_path, capsys):
    lr, sr, hr = map(str, files)
    assert cli.main(["compare", lr, sr, hr, "-o", str(tmp_path / "c.html")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "c.html")
    text = (tmp_path / "c.html").read_text()
    assert not re.search(r"(src|href)\s*=\s*[\"']?(https?:)?//", text)
    assert cli.main(["compare", hr, lr, "-o", str(tmp_path / "d.html")]) == 1
    assert "is no whole multiple of" in capsys.readouterr().err
    assert cli.main(["compare", lr, sr, lr, "-o", str(tmp_path / "d.html")]) == 1
    assert "is not of the size of" in capsys.readouterr().err
    assert not (tmp_path / "d.html").exists()
    with pytest.raises(SystemExit, match="2"):
        cli.main(["compare", lr, sr, "-o", str(tmp_path / "d.png")])
    assert "written as .html" in capsys.readouterr().err and not (tmp_path / "d.png").exists()


def test_notes_are_the_measures_of_evaluation(tmp_path):
    rng = np.random.default_rng(0)
    lr, sr, hr = (rng.integers(0, 256, (e, e, 3), np.uint8) for e in (12, 48, 48))
    paths = [images.write(tmp_path / f"{i}.png", Picture(p)) for i, p in enumerate((lr, sr, hr))]
    text = page(*paths)
    assert f"{metrics.psnr(sr, hr, 4):.2f} dB / {metrics.ssim(sr, hr, 4):.4f}" in text


def embedded(text, name):
    """Picture `name` of a page."""
    data = re.search(rf'"name": "{name}".*?base64,([^"]+)"', text)[1]
    return Image.open(io.BytesIO(base64.b64decode(data)))


def test_colours_are_those_of_the_files(tmp_path):
    """A browser shows a picture without its profile in the colours of sRGB."""
    paths = []
    for name, edge in (("lr", 8), ("sr", 16), ("hr", 16)):
        metadata = Metadata(icc=SRGB if name != "sr" else b"")
        picture = Picture(np.zeros((edge, edge, 3), np.uint8), metadata)
        paths.append(images.write(tmp_path / f"{name}.png", picture))
    text = page(*paths)
    profiles = [embedded(text, n).info.get("icc_profile") for n in ("LR, bicubic", "SR", "HR")]
    assert profiles == [SRGB, None, SRGB]


@pytest.mark.parametrize("dtype, channels", [(np.uint16, 3), (np.float32, 1), (np.uint8, 4)])
def test_pictures_of_every_kind(tmp_path, dtype, channels):
    most = 1 if dtype is np.float32 else np.iinfo(dtype).max
    paths = []
    for name, edge in (("lr", 8), ("sr", 16), ("hr", 17)):
        pixels = np.full((edge, edge, channels), most // 2 if most > 1 else 0.5, dtype)
        paths.append(images.write(tmp_path / f"{name}.tiff", Picture(pixels)))
    shown = np.asarray(embedded(page(*paths), "SR"))
    assert shown.dtype == np.uint8 and np.abs(shown.astype(int) - 127).max() <= 1
