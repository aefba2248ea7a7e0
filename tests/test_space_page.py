"""The demo's page, served: through Gradio's client, and in a browser where there is one (Debian's `chromium`)."""

import ctypes
import gc
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright

from masks_in import masks_in
from sa2va_i import load
from sa2va_i.overlay import VideoWriter
from sa2va_i.space.page import build_page, start
from sa2va_i.space.service import Service
from sa2va_i.space.uploads import Limits
from sa2va_i.training.synthetic import HELD_OUT, Scene

QUESTION = "the circle"
CHROMIUM = shutil.which("chromium")
# without them Chromium asks Google's servers at every start
QUIET = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)


@pytest.fixture(scope="module")
def model():
    """The small model that comes with the package."""
    return load("small").eval()


@pytest.fixture(scope="module")
def service(model):
    service = Service(model, Limits(num_bytes=1_000_000, num_frames=300))
    yield service
    service.close()


@pytest.fixture(scope="module")
def address(service):
    page = build_page(service, "The small model.")
    yield start(page, service, server_name="127.0.0.1")
    page.close()


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> list[Path]:
    """Ten scenes of six frames."""
    folder = tmp_path_factory.mktemp("videos")
    for number in range(10):
        write_scene(folder / f"{number}.mp4", Scene(HELD_OUT + number, num_frames=6))
    return sorted(folder.iterdir())


def write_scene(path: Path, scene: Scene) -> None:
    with VideoWriter(path, fps=10) as writer:
        for frame in scene.render_all()[0]:
            writer.write(Image.fromarray(frame))


def ask(client: Client, path: Path, question: str = QUESTION) -> Path:
    """The masks.zip of the answer."""
    outputs = client.predict(handle_file(path), question, 5, 0, "consistent", api_name="/segment")
    return Path(outputs[-2]["value"])


def memory() -> int:
    """Bytes in use, without those that glibc keeps for the next allocation."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return psutil.Process().memory_info().rss


def files_under(folder: Path) -> list[str]:
    """Names of the files there. Folders may be removed meanwhile, which `rglob` takes for an error."""
    return [name for _, _, names in os.walk(folder) for name in names]


def wait_until(condition) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.skipif(sys.platform != "linux", reason="malloc_trim is glibc's")
def test_ten_at_once(address, service, model, videos, tmp_path):
    def visit(path: Path) -> np.ndarray:
        client = Client(address, verbose=False, download_files=tmp_path)
        try:
            return masks_in(ask(client, path))
        finally:
            client.close()

    def all_at_once() -> list[np.ndarray]:
        with ThreadPoolExecutor(10) as pool:
            return list(pool.map(visit, videos))

    expected = [
        np.stack(model.predict_forward(video=path, text=f"Please segment {QUESTION}.")["prediction_masks"])
        for path in videos
    ]
    assert not any(np.array_equal(expected[0], other) for other in expected[1:])
    for ours, theirs in zip(all_at_once(), expected):
        assert np.array_equal(ours, theirs)
    before = memory()
    all_at_once()
    assert memory() - before < 60e6
    wait_until(lambda: not files_under(service._root))  # all have left


def test_a_failing_question_takes_nothing_down(address, service, videos, monkeypatch, tmp_path):
    client = Client(address, verbose=False, download_files=tmp_path)
    monkeypatch.setattr(service._model, "segment", lambda *args, **kwargs: 1 / 0)
    outputs = client.predict(handle_file(videos[0]), QUESTION, 5, 0, "consistent", api_name="/segment")
    assert "Something went wrong" in outputs[0]
    assert "division" not in str(outputs)
    monkeypatch.undo()
    assert masks_in(ask(client, videos[0])).any()


def test_files_of_others_are_out_of_reach(address, service, videos, tmp_path):
    """A path in the place of an upload is refused, wherever it points."""
    mine = Client(address, verbose=False, download_files=tmp_path)
    ask(mine, videos[0])
    secret = next(service._root.rglob("masks.zip"))
    for path in (secret, Path(__file__).resolve(), Path("/etc/hostname")):
        with pytest.raises((AppError, ValueError)):
            mine.predict({"path": str(path), "meta": {"_type": "gradio.FileData"}}, api_name="/look_at")


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGTERM")
def test_a_stopped_demo_leaves_nothing(tmp_path):
    """As a service manager or a container stops it."""
    environment = {**os.environ, "TMPDIR": str(tmp_path), "GRADIO_TEMP_DIR": str(tmp_path / "gradio")}
    command = [sys.executable, "-m", "sa2va_i.cli", "demo", "--no-open-browser"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert "http://127.0.0.1:" in process.stdout.readline()
        assert list(tmp_path.glob("sa2va-i-demo-*"))
        process.terminate()
        assert process.wait(timeout=60) == 0
    assert not list(tmp_path.glob("sa2va-i-demo-*"))


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield browser
        browser.close()


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine (Debian: apt-get install chromium)")
class TestBrowser:
    @pytest.fixture
    def page(self, browser, address) -> Page:
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(60_000)
        expect.set_options(timeout=60_000)
        page.goto(address)
        yield page
        page.close()

    def upload(self, page: Page, path: Path) -> None:
        page.set_input_files("#upload input[type=file]", path)

    def status(self, page: Page):
        return expect(page.locator("#status"))

    def test_from_a_clip_to_its_masks(self, page, model, videos, tmp_path):
        self.upload(page, videos[0])
        self.status(page).to_contain_text("Video, 6 frames")
        page.fill("#question textarea", "the <b>circle</b>")
        page.click("#segment")
        page.wait_for_selector("#overlay video")
        self.status(page).to_contain_text("Done")
        assert page.locator("#conversation mark").count() == 1
        assert page.locator("#conversation b").count() == 0  # shown as typed
        assert page.locator("#drafts img").count() == 5
        with page.expect_download() as download:
            page.click("#download-masks")
        download.value.save_as(tmp_path / "masks.zip")
        result = model.predict_forward(video=videos[0], text="Please segment the <b>circle</b>.")
        assert np.array_equal(masks_in(tmp_path / "masks.zip"), result["prediction_masks"])

        page.fill("#question textarea", "Where is the square?")
        page.press("#question textarea", "Enter")
        expect(page.locator("#conversation .question")).to_have_count(2)
        self.status(page).to_contain_text("Done")

    def test_stop(self, page, tmp_path):
        write_scene(tmp_path / "long.mp4", Scene(HELD_OUT, num_frames=240, size=(72, 96)))
        self.upload(page, tmp_path / "long.mp4")
        self.status(page).to_contain_text("240 frames")
        page.fill("#question textarea", QUESTION)
        page.click("#segment")
        self.status(page).to_contain_text("Tracking")
        page.click("#stop")
        self.status(page).to_contain_text("Stopped")
        page.wait_for_timeout(500)
        self.status(page).to_contain_text("Stopped")
        assert page.locator("#overlay video").count() == 0
        page.click("#draft")  # and the queue is free again
        self.status(page).to_contain_text("Done")

    def test_bad_uploads(self, page, videos, tmp_path):
        (tmp_path / "broken.mp4").write_bytes(videos[0].read_bytes()[:400])
        (tmp_path / "notes.txt").write_text("no media")
        Image.effect_noise((1500, 1500), 90).save(tmp_path / "large.png")
        shutil.copy(tmp_path / "notes.txt", tmp_path / "notes.mp4")
        for name, message in (
            ("broken.mp4", "cannot be read as a video"),
            ("notes.mp4", "cannot be read as a video"),
            ("notes.txt", "Invalid file type"),
            ("large.png", re.compile("exceeds? the maximum allowed size")),
        ):
            self.upload(page, tmp_path / name)
            expect(page.get_by_text(message).first).to_be_visible()
            page.reload()
        page.click("#segment")
        self.status(page).to_contain_text("drop in a video or a photo")
        self.upload(page, videos[0])
        self.status(page).to_contain_text("Video, 6 frames")

    def test_on_a_phone(self, page):
        page.set_viewport_size({"width": 390, "height": 844})
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        for name in ("#segment", "#draft", "#stop"):
            assert page.locator(name).bounding_box()["height"] >= 40
