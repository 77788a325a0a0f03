"""The page docs/index.html, in a real browser: its numbers are Python's, its promises hold."""

import base64
import functools
import http.server
import json
import math
import re
import shutil
import threading

import numpy as np
import onnxruntime as ort
import pytest
from conftest import COLOURS, HERE

import sample
from benchmarks.table2 import count_right
from export import REDUCED_TOLERANCE
from images import read_image, save_image, to_image, to_pixels

sync_api = pytest.importorskip("playwright.sync_api", reason="the page's tests need playwright")
BROWSERS = "chromium", "chromium-browser", "google-chrome", "google-chrome-stable"
CHROMIUM = next(filter(None, map(shutil.which, BROWSERS)), None)
RUNTIME = HERE / "node_modules" / "onnxruntime-web"
pytestmark = [
    pytest.mark.page,
    pytest.mark.skipif(CHROMIUM is None, reason="the page's tests need Chromium"),
    pytest.mark.skipif(not RUNTIME.is_dir(), reason="run: npm install --no-save onnxruntime-web"),
]
DOCS = HERE / "docs"
IMPORTED = re.search(r'"(https://.*)"', (DOCS / "index.html").read_text()).group(1)
TYPES = {".mjs": "text/javascript", ".wasm": "application/wasm"}


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def address():
    """Where docs/ is served, as `python -m http.server -d docs` does."""
    handler = functools.partial(Quiet, directory=DOCS)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def serve_runtime(route):
    """onnxruntime-web from node_modules in place of the network."""
    assert route.request.url.rsplit("/", 1)[0] == IMPORTED.rsplit("/", 1)[0]
    path = RUNTIME / "dist" / route.request.url.rsplit("/", 1)[1]
    headers = {"Access-Control-Allow-Origin": "*"}
    route.fulfill(path=path, content_type=TYPES[path.suffix], headers=headers)


@pytest.fixture(scope="module")
def opened(browser, address):
    """A function that opens the page in a new tab. No console may show an error."""
    said, contexts = [], []

    def call(runtime=serve_runtime, wait=True):
        context = browser.new_context(viewport={"width": 1280, "height": 900})
        context.set_default_timeout(120_000)
        contexts.append(context)
        context.route(re.compile("^https:"), runtime)
        page = context.new_page()
        if runtime is serve_runtime:
            page.on("console", lambda m: said.append(m.text) if m.type == "error" else None)
            page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(address)
        if wait:
            assert page.evaluate("window.ready"), page.text_content("#status")
        return page

    yield call
    for context in contexts:
        context.close()
    assert not said


@pytest.fixture(scope="module")
def page(opened):
    """One tab that the tests share; each leaves it idle."""
    return opened()


def until_idle(page):
    page.wait_for_function("document.getElementById('stop').disabled")
    return page.text_content("#status")


def pixels(page, canvas):
    """The bytes of a canvas, (3, height, width)."""
    width, height, data = page.evaluate(
        """(id) => {
            const {width, height} = document.getElementById(id);
            const context = document.getElementById(id).getContext("2d");
            return [width, height, Array.from(context.getImageData(0, 0, width, height).data)];
        }""",
        canvas,
    )
    return np.array(data).reshape(height, width, 4)[..., :3].transpose(2, 0, 1)


def tiles(page, canvas, shape):
    """The images in a canvas, (B, 3, H, W), without the gaps between them."""
    grid, (_, height, width) = pixels(page, canvas), shape
    rows = range(0, grid.shape[1], height + 2)
    return np.stack([
        grid[:, top : top + height, left : left + width]
        for top in rows for left in range(0, grid.shape[2], width + 2)
    ])  # fmt: skip


def choose(page, path):
    """Give the page a model.onnx. Returns what it says then."""
    page.evaluate("document.getElementById('status').textContent = 'Loading'")
    page.set_input_files("#model", path)
    page.wait_for_function("!document.getElementById('status').textContent.startsWith('Loading')")
    return page.text_content("#status")


# -------------------------------------------------------------------------------------- the numbers


def test_runtime_is_the_one_of_the_page():
    version = json.loads((RUNTIME / "package.json").read_text())["version"]
    assert f"onnxruntime-web@{version}/" in IMPORTED


@pytest.mark.parametrize("steps", [1, 2, 7, 999, 1000])
def test_respaced(steps, page):
    betas = np.linspace(1e-4, 0.02, 1000)
    theirs = page.evaluate(
        "async ([betas, steps]) => (await import('./sampler.js')).respaced(betas, steps)",
        [betas.tolist(), steps],
    )
    expected, tau = sample.respaced(betas, steps)
    np.testing.assert_array_equal(theirs["tau"], tau)
    np.testing.assert_allclose(theirs["betas"], expected, rtol=1e-9)


def test_q_sample_is_equation_4(page):
    random, betas = np.random.default_rng(0), np.linspace(1e-4, 0.02, 1000)
    x0, noise = random.standard_normal((2, 12))
    for t in (0, 500, 999):
        theirs = page.evaluate(
            """async ([x0, t, noise, betas]) => Array.from(
                (await import('./sampler.js')).qSample(Float32Array.from(x0), t, noise, betas))""",
            [x0.tolist(), t, noise.tolist(), betas.tolist()],
        )
        abar = np.prod(1 - betas[: t + 1])
        np.testing.assert_allclose(theirs, abar**0.5 * x0 + (1 - abar) ** 0.5 * noise, atol=1e-6)


SAMPLE = """async ([noises, betas, options]) => {
    const {alphasBar, sampleProgressive} = await import('./sampler.js');
    // the exact eps of images ~ N(0, 0.3^2), made uneven by a sine
    const abar = alphasBar(betas), steps = [];
    const eps = (x, t) => x.map((value) =>
        Math.sqrt(1 - abar[t]) * (value + 0.1 * Math.sin(3 * value)) / (1 - 0.91 * abar[t]));
    const drawNoise = () => Float32Array.from(noises.shift());
    if (options.xT) options.xT = Float32Array.from(options.xT);
    for await (const {t, x, x0} of sampleProgressive(eps, drawNoise, betas, options)) {
        steps.push([t, Array.from(x), Array.from(x0)]);
    }
    return [steps, noises.length];
}"""


@pytest.mark.parametrize("variance", ["large", "small"])
@pytest.mark.parametrize("steps", [None, 1, 2, 7])
@pytest.mark.parametrize(
    "sampler, eta",
    [(None, None), ("ddpm", None), ("dpm", None), ("ddim", None), (None, 0.5), ("ddim", 1)],
)
@pytest.mark.parametrize("continues", [False, True])
def test_reverse_process_is_that_of_sample_py(variance, steps, sampler, eta, continues, page):
    shape, betas = (2, 1, 3, 3), np.linspace(1e-3, 0.2, 40)
    noises = np.random.default_rng(0).standard_normal((42, *shape)).astype(np.float32)
    abar, left = (1 - betas).cumprod(), iter(noises)

    def eps(x, t):
        a = abar[t[0]]
        return (np.sqrt(1 - a) * (x + 0.1 * np.sin(3 * x)) / (1 - 0.91 * a)).astype(np.float32)

    x_T = noises[-1] if continues else None
    expected = list(sample.sample_progressive(
        eps, lambda: next(left), betas, variance, steps, sampler, eta, x_T
    ))  # fmt: skip
    options = {"variance": variance, "sampler": sampler, "eta": eta}
    options |= {} if steps is None else {"steps": steps}
    options |= {"xT": x_T.ravel().tolist()} if continues else {}
    flat = noises.reshape(len(noises), -1).tolist()
    theirs, unused = page.evaluate(SAMPLE, [flat, betas.tolist(), options])
    assert unused == len(list(left)) and len(theirs) == len(expected)
    for (t, x, x0), (their_t, their_x, their_x0) in zip(expected, theirs, strict=True):
        assert t == their_t
        np.testing.assert_allclose(their_x, x.ravel(), atol=1e-5)
        np.testing.assert_allclose(their_x0, x0.ravel(), atol=1e-5)


def test_noise_is_normal_and_of_one_image_each(page):
    draw = """async ([seed, batch, size, draws]) => {
        const drawNoise = (await import('./sampler.js')).noiseOf(seed, batch, size);
        return Array.from({length: draws}, () => Array.from(drawNoise()));
    }"""
    z = np.array(page.evaluate(draw, [0, 4, 25_000, 2]))
    assert abs(z.mean()) < 0.01 and abs(z.var() - 1) < 0.02 and abs((z**4).mean() - 3) < 0.1
    images = z.reshape(8, -1)
    assert np.abs(np.corrcoef(images) - np.eye(8)).max() < 0.03
    assert (
        np.abs([np.corrcoef(im[:-lag], im[lag:])[0, 1] for im in images for lag in (1, 2)]).max()
        < 0.03
    )
    alone = np.array(page.evaluate(draw, [0, 1, 25_000, 2]))
    np.testing.assert_array_equal(alone, z[:, :25_000])
    assert np.abs(np.array(page.evaluate(draw, [1, 1, 25_000, 1])) - z[0, :25_000]).mean() > 0.5
    assert np.isfinite(page.evaluate(draw, [2**32 - 1, 1, 7, 1])).all()


EPS = """async ([runtime, content, x, times]) => {
    const {Network} = await import('./sampler.js');
    const bytes = Uint8Array.from(atob(content), (letter) => letter.charCodeAt(0));
    const network = await Network.open(bytes, runtime), eps = [];
    const {betas, variance, shape, metadata} = network;
    for (const t of times) eps.push(Array.from(await network.eps(Float32Array.from(x), t)));
    const first = Float32Array.from(x.slice(0, network.size)); // another batch
    const alone = Array.from(await network.eps(first, times[0]));
    network.close();
    const late = await network.eps(first, 0).catch((error) => error.message);
    return {betas, variance, shape, metadata, eps, alone, late};
}"""


@pytest.mark.parametrize("kind", ["shipped", "None", "int8"])
def test_eps_is_pythons(kind, page, files):
    path = DOCS / "fashion-mnist.onnx" if kind == "shipped" else files[0] / f"{kind}.onnx"
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    metadata = session.get_modelmeta().custom_metadata_map
    shape, times = (3, *json.loads(metadata["ddpm.image_shape"])), [0, 300, 999]
    x = np.random.default_rng(0).standard_normal(shape, np.float32)
    content = base64.b64encode(path.read_bytes()).decode()
    theirs = page.evaluate(EPS, [IMPORTED, content, x.ravel().tolist(), times])
    for t, their_eps in zip(times, theirs["eps"], strict=True):
        (eps,) = session.run(["eps"], {"x_t": x, "t": np.full(3, t)})
        if kind == "int8" and t:  # integer kernels round in another order, and some saturate
            error = np.square(their_eps - eps.ravel()).mean() / np.square(eps).mean()
            assert error**0.5 < REDUCED_TOLERANCE
        else:
            np.testing.assert_allclose(their_eps, eps.ravel(), atol=1e-4)
    np.testing.assert_allclose(theirs["alone"], theirs["eps"][0][: len(theirs["alone"])], atol=1e-4)
    assert theirs["metadata"] == metadata and theirs["shape"] == list(shape[1:])
    assert theirs["variance"] == metadata["ddpm.variance"]
    np.testing.assert_array_equal(theirs["betas"], json.loads(metadata["ddpm.betas"]))
    assert theirs["late"] == "the network was closed"


# ------------------------------------------------------------------------------------- its promises


def first_noise(page, seed, count, size):
    """The noise that the page starts from, (count * size,)."""
    draw = "async (a) => Array.from((await import('./sampler.js')).noiseOf(...a)())"
    return np.array(page.evaluate(draw, [seed, count, size]), np.float32)


def test_shipped_model_draws_what_python_draws(page):
    page.select_option("#count", "4")
    page.fill("#seed", "3")
    page.click("#sample")
    assert "4 images: 10 steps in" in until_idle(page)
    network = sample.Network(DOCS / "fashion-mnist.onnx", "cpu")
    start = first_noise(page, 3, 4, math.prod(network.shape)).reshape(4, *network.shape)
    steps = list(sample.sample_progressive(network, lambda: start, network.betas, steps=10))
    assert page.text_content("#number-t") == "99"
    theirs = tiles(page, "grid", network.shape)
    assert np.abs(theirs - to_pixels(steps[-1][2])).max() <= 1
    assert theirs.std() > 40
    # the slider goes back
    page.evaluate("const s = document.getElementById('step'); s.value = 4; s.oninput()")
    t, x, x0 = steps[4]
    assert page.text_content("#number-t") == str(t) and page.text_content("#at") == "5 of 10"
    assert np.abs(tiles(page, "grid", network.shape) - to_pixels(x0)).max() <= 1
    assert np.abs(tiles(page, "noise", network.shape) - to_pixels(x)).max() <= 1
    abar = np.prod(1 - network.betas[: t + 1])
    assert page.text_content("#number-signal") == f"{abar**0.5:.4f}"


def test_stop_in_the_middle_and_again(page):
    page.select_option("#steps", "1000")
    page.select_option("#sampler", "ddpm")
    page.click("#sample")
    page.wait_for_function("/step [3-9]/.test(document.getElementById('status').textContent)")
    page.click("#stop")
    assert re.fullmatch(r"Stopped after step \d+ of 1000\.", until_idle(page))
    assert page.is_enabled("#sample") and page.is_enabled("#step")
    page.click("#sample")
    page.keyboard.press("Escape")
    assert "Stopped after step" in until_idle(page)


def test_denoising_a_drawing(page):
    def set_t(t):
        page.evaluate(
            "(t) => { const s = document.getElementById('t'); s.value = t; s.oninput() }", t
        )

    before = pixels(page, "draw")
    page.fill("#colour", "#ff0000")
    page.locator("#draw").scroll_into_view_if_needed()
    box = page.locator("#draw").bounding_box()
    page.mouse.move(box["x"] + 0.1 * box["width"], box["y"] + 0.8 * box["height"])
    page.mouse.down()
    page.mouse.move(box["x"] + 0.9 * box["width"], box["y"] + 0.8 * box["height"])
    page.mouse.up()
    painted = pixels(page, "draw")
    changed = (painted != before).any(0)
    assert changed.any() and changed.nonzero()[0].min() > 16
    page.focus("#draw")
    page.keyboard.press("ArrowUp")
    page.keyboard.press(" ")
    assert (pixels(page, "draw") != painted).any()
    grey = np.tensordot([0.299, 0.587, 0.114], pixels(page, "draw"), 1)
    set_t(0)
    assert np.abs(pixels(page, "noised")[0] - grey).max() < 10  # sigma is 1.3 of 255
    set_t(600)
    assert np.abs(pixels(page, "noised")[0] - grey).mean() > 50
    set_t(30)
    page.click("#denoise")
    assert "Four ends from t = 30: 31 steps" in until_idle(page)
    ends = tiles(page, "ends", (1, 32, 32))[:, 0]
    assert np.abs(ends - grey).mean() < 15 and np.abs(ends[0] - ends[1]).mean() > 0.5


def test_an_image_as_the_drawing(page, tmp_path):
    gradient = np.arange(64 * 96 * 3).reshape(64, 96, 3).transpose(2, 0, 1) // 73
    save_image(tmp_path / "wide.png", to_image(gradient.astype(np.uint8)))
    page.set_input_files("#image-file", tmp_path / "wide.png")
    page.wait_for_function(
        "document.getElementById('status').textContent.includes('wide.png is now')"
    )
    expected = read_image(tmp_path / "wide.png", 32, 3)
    assert np.abs(pixels(page, "draw") - expected.astype(int)).mean() < 8
    (tmp_path / "text.png").write_text("not an image")
    page.set_input_files("#image-file", tmp_path / "text.png")
    page.wait_for_function("document.getElementById('status').textContent.includes('not an image')")


def test_other_files_and_then_another_model(page, files, tmp_path):
    exact = (files[0] / "None.onnx").read_bytes()
    half = exact[: len(exact) // 2]
    wrong = exact.replace(b"small", b"smell")
    for name, content, what in (
        ("text.onnx", b"hello, world", "it is"),
        ("empty.onnx", b"", "its metadata lacks ddpm.betas"),
        ("half.onnx", half, "it is cut off"),
        ("wrong.onnx", wrong, "its metadata makes no sense"),
        ("only.onnx", exact[-len(exact) // 50 :], "it"),
    ):
        (tmp_path / name).write_bytes(content)
        said = choose(page, tmp_path / name)
        assert said.startswith(f"{name} is not a model of export.py") and what in said
        assert page.get_attribute("#status", "class") == "error"
    page.select_option("#steps", "10")
    page.select_option("#sampler", "ddim")
    page.click("#sample")  # the model before is still there
    assert "10 steps in" in until_idle(page)
    page.select_option("#steps", "1000")
    page.click("#sample")  # stops when another model is opened, without a word
    assert "Ready. None.onnx" in choose(page, files[0] / "None.onnx")
    assert page.get_attribute("#status", "class") == "" and page.is_enabled("#sample")
    page.select_option("#steps", "10")
    about = page.text_content("#about")
    assert "8\u00d78, colour" in about and "small" in about and "a test" in about
    page.click("#sample")
    assert "10 steps in" in until_idle(page)
    drawn = tiles(page, "grid", (3, 8, 8))
    assert drawn.shape == (4, 3, 8, 8) and np.ptp(drawn, axis=1).max() > 50  # in colour
    page.click("#denoise")
    assert "steps in" in until_idle(page)


def test_classes_and_guidance(coloured, page):
    assert page.locator("#class").is_hidden() and page.locator("#w").is_hidden()
    assert "Ready. model.onnx" in choose(page, coloured / "model.onnx")
    page.select_option("#steps", "10")
    page.select_option("#sampler", "dpm")
    page.select_option("#count", "4")
    page.fill("#seed", "3")
    page.select_option("#class", label="red")
    page.click("#sample")
    assert "4 images: 10 steps in" in until_idle(page)
    network = sample.Network(coloured / "model.onnx", "cpu")
    start = first_noise(page, 3, 4, math.prod(network.shape)).reshape(4, *network.shape)

    def drawn(y, w):
        eps = sample.guided(network, np.array(y), w)
        (*_, (_, _, x0)) = sample.sample_progressive(eps, lambda: start, network.betas, steps=10)
        return to_pixels(x0)

    assert np.abs(tiles(page, "grid", network.shape) - drawn([2] * 4, 0)).max() <= 1
    # both controls sample again, from the same noise
    page.evaluate("const w = document.getElementById('w'); w.value = 2; w.oninput(); w.onchange()")
    page.wait_for_function("document.getElementById('status').textContent.includes('10 steps')")
    until_idle(page)
    assert page.text_content("#w-value") == "2"
    assert np.abs(tiles(page, "grid", network.shape) - drawn([2] * 4, 2)).max() <= 1
    for label, y in (("all in turn", [0, 1, 2, 0]), ("no class", [3] * 4)):
        page.select_option("#class", label=label)
        until_idle(page)
        assert np.abs(tiles(page, "grid", network.shape) - drawn(y, 2)).max() <= 1
    page.evaluate("const t = document.getElementById('t'); t.value = 990; t.oninput()")
    page.select_option("#end-class", label="blue")
    page.click("#denoise")
    assert "Four ends" in until_idle(page)
    ends = tiles(page, "ends", network.shape).mean((2, 3))
    assert np.abs(ends - COLOURS["blue"]).max() < 40


def test_a_seed_that_is_none(page):
    page.fill("#seed", "-1")
    page.click("#sample")
    assert "whole number" in page.text_content("#status")
    page.fill("#seed", "0")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_layout(width, scheme, page):
    page.set_viewport_size({"width": width, "height": 900})
    page.emulate_media(color_scheme=scheme)
    assert page.evaluate("document.scrollingElement.scrollWidth") <= width
    brightness = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (int(re.findall(r"\d+", brightness)[0]) > 128) == (scheme == "light")
    boxes = [page.locator(f"#{name}").bounding_box() for name in ("noise", "grid")]
    assert boxes[0]["y"] == boxes[1]["y"] and boxes[0]["width"] >= 130  # side by side
    unnamed = """[...document.querySelectorAll('input, select, button')]
        .filter((element) => !element.labels?.length && !element.textContent.trim())"""
    assert page.evaluate(f"{unnamed}.length") == 0


def test_without_a_connection(opened):
    page = opened(runtime=lambda route: route.abort(), wait=False)
    assert page.evaluate("window.ready") is False
    assert "onnxruntime-web can't be loaded" in page.text_content("#status")


@pytest.mark.slow
def test_demo_is_drawn_in_the_page(demo, opened):
    """The network of the demo, judged as in Python."""
    page = opened()
    assert "Ready. model.onnx" in choose(page, demo / "model.onnx")
    page.select_option("#steps", "50")
    page.select_option("#count", "16")
    page.click("#sample")
    assert "50 steps in" in until_idle(page)
    assert count_right(tiles(page, "grid", (3, 8, 8))) >= 13
