"""Record dots and pictures of page/index.html, which go to noise and come back.

    python docs/record_page.py    # needs playwright and an installed Chromium; a minute

Chromium opens the page, and the program moves its opening and its first section from the data to
the noise and back. It saves both in docs/figures/moons.webp, which repeats.
"""

import argparse
import base64
import functools
import http.server
import io
import shutil
import threading
from contextlib import contextmanager
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

HERE = Path(__file__).parent
PAGE = HERE.parent / "page"
CHROMIUM = "chromium", "chromium-browser", "google-chrome", "google-chrome-stable"
BROWSERS = {  # which are installed, or None
    engine: next(filter(None, map(shutil.which, names)), None)
    for engine, names in {"chromium": CHROMIUM, "firefox": ("firefox-esr", "firefox")}.items()
}
LAUNCH = {  # Firefox is driven as it is; no page of it can prefer less motion on its own
    "chromium": {"args": ["--no-sandbox", "--disable-gpu"]},
    "firefox": {"channel": "moz-firefox", "firefox_user_prefs": {"ui.prefersReducedMotion": 1}},
}
SIZE, GAP = 264, 8  # height of the plane, and its distance from the pictures, in pixels
FORWARD, BACK, RATE = 30, 75, 20  # frames to the noise and back, and how many are shown a second
DATA, NOISE, RESULT = 900, 500, 2200  # how long these frames stay, in milliseconds
STYLE = f"#arrows-50 {{ width: 420px !important; height: {SIZE}px !important; }}"

GESTURES = """async () => {
    const { arrows, opening } = window.sections;
    const results = [arrows, opening].map((gesture) => %s);
    for (let k = 0; k < 2; k++) await new Promise(requestAnimationFrame); // they are drawn
    return results;
}"""
CANVASES = "['arrows-50', 'scene-pictures'].map((id) => document.getElementById(id).toDataURL())"


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@contextmanager
def served():
    """Serve the page as `python -m http.server -d page` does; yield the address."""
    handler = functools.partial(Quiet, directory=PAGE)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@contextmanager
def browser_and_address(engine="chromium"):
    """Start a browser, serve the page, and yield both. engine: of BROWSERS."""
    with served() as address, sync_playwright() as playwright:
        options = LAUNCH[engine] | {"executable_path": BROWSERS[engine]}
        browser = getattr(playwright, engine).launch(**options)
        yield browser, address
        browser.close()


def shown_at(page, place):
    """Return plane and pictures at a place, from 0 (the data) to 1 (the noise), side by side."""
    page.evaluate(GESTURES % f"gesture.moveTo({place})")
    images = []
    for url in page.evaluate(CANVASES):
        content = io.BytesIO(base64.b64decode(url.partition(",")[2]))
        images.append(Image.open(content).convert("RGB"))
    plane, pictures = images
    pictures = pictures.resize(
        (SIZE * pictures.width // pictures.height, SIZE), Image.Resampling.NEAREST
    )
    frame = Image.new("RGB", (plane.width + GAP + pictures.width, SIZE), "#0b0d14")
    frame.paste(plane, (0, 0))
    frame.paste(pictures, (plane.width + GAP, 0))
    return frame


def record(page):
    """Return the frames to the noise, and those of the way back."""
    there = [shown_at(page, k / FORWARD) for k in range(FORWARD + 1)]
    page.evaluate(GESTURES % "(gesture.sendBack(), gesture.stop())")
    while not all(page.evaluate(GESTURES % "gesture.passages.every((it) => it.result !== null)")):
        page.wait_for_timeout(200)
    return there, [shown_at(page, 1 - k / BACK) for k in range(1, BACK + 1)]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=HERE / "figures", help="folder [docs/figures]")
    args = parser.parse_args()
    with browser_and_address() as (browser, address):
        page = browser.new_page(reduced_motion="reduce", viewport={"width": 720, "height": 2400})
        page.goto(address)
        page.evaluate("dispatchEvent(new Event('scroll')), window.ready")  # networks are loaded
        page.add_style_tag(content=STYLE)
        there, back = record(page)
    each = 1000 // RATE
    durations = [DATA, *[each] * (FORWARD - 1), NOISE, *[each] * (BACK - 1), RESULT]
    # Because of the haze, a GIF would be three times as large, even with 64 colours.
    there[0].save(args.out / "moons.webp", save_all=True, append_images=there[1:] + back,
                  duration=durations, loop=0, quality=30, method=4)  # fmt: skip


if __name__ == "__main__":
    main()
