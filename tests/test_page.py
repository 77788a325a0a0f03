"""The page page/index.html, in a real browser: its numbers are Python's, its promises hold."""

import base64
import functools
import http.server
import io
import json
import re
import runpy
import shutil
import threading

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F
from conftest import HERE
from PIL import Image

import beyond
import ddpm_numpy
import train
from ddpm import Diffusion, linear_betas, timestep_embedding
from docs.make_figures import page_noise
from docs.points import MEANS, STD
from exact import exact_network
from export import write_onnx
from images import read_image, to_pixels
from support.data import count_right
from support.reduced import MAX_ERROR
from support.trained import load

sync_api = pytest.importorskip("playwright.sync_api", reason="the page's tests need playwright")
BROWSERS = "chromium", "chromium-browser", "google-chrome", "google-chrome-stable"
CHROMIUM = next(filter(None, map(shutil.which, BROWSERS)), None)
PAGE = HERE / "page"
SHIPPED = PAGE / "fashion-mnist.onnx"
RUNTIME = PAGE / "node_modules" / "onnxruntime-web"
VERSION = re.search(r"onnxruntime-web@[0-9.]+", (PAGE / "page.js").read_text("utf-8"))[0]
INSTALL = f"npm install --no-save --no-package-lock --prefix page {VERSION}"
pytestmark = [
    pytest.mark.page,
    pytest.mark.skipif(CHROMIUM is None, reason="the page's tests need Chromium"),
    pytest.mark.skipif(not RUNTIME.is_dir(), reason=f"run: {INSTALL}"),
]
OUTSIDE, COPY = "^(?!http://127.0.0.1)", "/node_modules/"  # addresses


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def opened():
    """A function that opens the page, served as `python -m http.server -d page` does, in a new tab.

    routes: what handles some of its requests. Without any, no console may show an error, and the
    page may not ask for anything from outside. motion: what the reader prefers; by default, none.
    """
    said = []

    def refuse(route):
        said.append(route.request.url)
        route.abort()

    def call(routes=None, motion="reduce"):
        page = browser.new_page(viewport={"width": 1280, "height": 900}, reduced_motion=motion)
        page.set_default_timeout(100_000)
        for pattern, handle in (routes or {OUTSIDE: refuse}).items():
            page.route(re.compile(pattern), handle)
        if not routes:
            page.on("console", lambda m: said.append(m.text) if m.type == "error" else None)
            page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(f"http://127.0.0.1:{server.server_port}/")
        page.evaluate("window.recorded")
        return page

    handler = functools.partial(Quiet, directory=PAGE)
    with (
        http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server,
        sync_api.sync_playwright() as playwright,
    ):
        threading.Thread(target=server.serve_forever, daemon=True).start()
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield call
        browser.close()
        server.shutdown()
    assert not said


@pytest.fixture(scope="module")
def page(opened):
    """One tab that the tests share; each leaves it idle."""
    page = opened()
    until(page, "status", "^Ready")
    return page


@pytest.fixture(scope="module")
def exported(image_folder, tmp_path_factory):
    """model.onnx, and int8.onnx with float32 at small t, of a network trained with --quick."""
    folder = tmp_path_factory.mktemp("exported")
    words = ["--data", image_folder, "--image-size", 8, "--channel-mults", 1, 2, "--quick"]
    words += ["--attention-resolutions", 4, "--variance", "small", "--steps", 100, "--batch", 8]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["train.py", "--out", str(folder / "run"), *map(str, words)])
        train.main()
    write_onnx(load(folder / "run"), folder / "model.onnx")
    write_onnx(load(folder / "run"), folder / "int8.onnx", "int8")
    return folder


def js(page, function, *args):
    """What a function of the page's modules returns; float32 arrays become a Float32Array there."""

    def plain(array):
        values = array.ravel().tolist()
        return {"float32": values} if "float32" in str(array.dtype) else values

    return json.loads(page.evaluate(
        f"""async (args) => {{
            const names = ["sampler", "points", "trainer", "network"], modules = [];
            for (const name of names) modules.push(await import(`./${{name}}.js`));
            const [sampler, points, trainer, network] = modules;
            const typed = (key, value) => value?.float32 ? Float32Array.from(value.float32) : value;
            const plain = (key, value) => ArrayBuffer.isView(value) ? Array.from(value) : value;
            return JSON.stringify(await ({function})(...JSON.parse(args, typed)), plain);
        }}""",
        json.dumps(args, default=plain),
    ))  # fmt: skip


def until(page, name, pattern):
    """Wait until the text of an element matches. Returns the text."""
    page.locator(f"#{name}", has_text=re.compile(pattern)).wait_for(state="attached")
    return page.text_content(f"#{name}")


def until_idle(page):
    page.locator("#stop:disabled").wait_for()
    return page.text_content("#status")


def set_value(page, name, value):
    """Move a slider, choose an option, or tick a box, as a reader would."""
    page.locator(f"#{name}").evaluate(
        """(element, value) => {
            element[typeof value === "boolean" ? "checked" : "value"] = value;
            for (const event of ["input", "change"]) element.dispatchEvent(new Event(event));
        }""",
        value,
    )


def start_sampling(page, **controls):
    """Start section 3, with these values of its controls."""
    values = {"steps": 10, "sampler": "sa-solver", "count": 4, "seed": 0, "class": "all", "w": 0}
    for name, value in (values | controls).items():
        page.locator(f"#{name}").evaluate("(element, value) => { element.value = value; }", value)
    page.click("#sample")


def sampled(page, **controls):
    """Sample in section 3. Returns what the status says in the end."""
    start_sampling(page, **controls)
    return until_idle(page)


def choose(page, path):
    """Give the page a model.onnx. Returns what it says then."""
    page.evaluate("document.getElementById('status').textContent = 'Loading'")
    page.set_input_files("#model", path)
    return until(page, "status", "^(?!Loading)")


def stroke(page, canvas, *places):
    """Draw a line with the mouse between two places, which are relative to the canvas's size."""
    page.locator(f"#{canvas}").scroll_into_view_if_needed()
    box = page.locator(f"#{canvas}").bounding_box()
    start, end = ((box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in places)
    page.mouse.move(*start)
    page.mouse.down()
    page.mouse.move(*end, steps=3)
    page.mouse.up()


def pixels(page, canvas):
    """The bytes of a canvas, (3, height, width)."""
    url = page.evaluate("(id) => document.getElementById(id).toDataURL()", canvas)
    image = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
    return np.array(image.convert("RGB"), int).transpose(2, 0, 1)


def tiles(page, canvas, shape):
    """The images in a canvas, (B, 3, H, W), without the gaps between them."""
    _, height, width = shape
    windows = np.lib.stride_tricks.sliding_window_view(pixels(page, canvas), (3, height, width))
    return windows[0, :: height + 2, :: width + 2].reshape(-1, 3, height, width)


def assert_shows(page, canvas, x):
    """The canvas shows these images in [-1, 1], but for rounding."""
    assert np.abs(tiles(page, canvas, x.shape[1:]) - to_pixels(x)).max() <= 1


def noise_of(page, seed, shape, draws=1):
    """What the page draws for images of the shape (B, ...): (draws, B, ...)."""
    draw = """(seed, batch, size, draws) => {
        const drawNoise = sampler.noiseOf(seed, batch, size);
        return Array.from({length: draws}, drawNoise);
    }"""
    z = js(page, draw, seed, shape[0], int(np.prod(shape[1:])), draws)
    return np.array(z, np.float32).reshape(draws, *shape)


def steps_of_python(network, page, seed, y=None, w=0):
    """(t, x_t, x0_hat) of 10 steps in Python from the noise of the page, for four images."""
    model = network if y is None else ddpm_numpy.guided(network, np.array(y), w)
    (x_T,) = noise_of(page, seed, (4, *network.shape))
    return list(ddpm_numpy.sample_progressive(model, lambda: x_T, network.betas, steps=10))


# -------------------------------------------------------------------------------------- the numbers


@pytest.mark.parametrize("steps", [1, 2, 7, 999, 1000])
def test_respaced(steps, page):
    betas = np.linspace(1e-4, 0.02, 1000)
    theirs = js(page, "sampler.respaced", betas, steps)
    expected, tau = ddpm_numpy.respaced(betas, steps)
    np.testing.assert_array_equal(theirs["tau"], tau)
    np.testing.assert_allclose(theirs["betas"], expected, rtol=1e-9)


SAMPLE = """async (name, noises, betas, options) => {
    // the exact eps of images ~ N(0, 0.3^2), made uneven by a sine
    const abar = sampler.alphasBar(betas), steps = [];
    const eps = (x, t) => x.map((value) =>
        Math.sqrt(1 - abar[t]) * (value + 0.1 * Math.sin(3 * value)) / (1 - 0.91 * abar[t]));
    for await (const {t, x, x0} of sampler[name](eps, () => noises.shift(), betas, options)) {
        steps.push([t, x, x0]);
    }
    return [steps, noises.length];
}"""
SHAPE, BETAS = (2, 1, 3, 3), np.linspace(1e-3, 0.2, 40)
NOISES = np.random.default_rng(0).standard_normal((82, *SHAPE)).astype(np.float32)


def smooth_eps(x, t):
    """The eps of SAMPLE."""
    a = (1 - BETAS).cumprod()[t[0]]
    return (np.sqrt(1 - a) * (x + 0.1 * np.sin(3 * x)) / (1 - 0.91 * a)).astype(np.float32)


def assert_steps_equal(page, name, options, expected, left, atol=1e-5):
    """Compare (t, x_t, x0_hat) of each step; `left` is what Python did not use of the noise."""
    expected = list(expected)
    theirs, unused = js(page, SAMPLE, name, list(NOISES), BETAS, options)
    assert unused == len(list(left))
    for (t, x, x0), (their_t, their_x, their_x0) in zip(expected, theirs, strict=True):
        assert t == their_t
        np.testing.assert_allclose(their_x, x.ravel(), atol=atol)
        np.testing.assert_allclose(their_x0, x0.ravel(), atol=atol)


@pytest.mark.parametrize("variance, steps, sampler, eta, given", [
    ("large", None, None, None, ""), ("small", None, "ddpm", None, "x_T"),
    ("large", 7, "ddpm", None, "x_T"), ("small", 7, "ddpm", None, ""),
    ("large", 7, None, None, ""), ("large", None, "sa-solver", None, "x_T"),
    ("small", 2, "sa-solver", None, "x_T"), ("large", 7, "ddim", None, ""),
    ("small", 7, None, 0.5, "x_T"), ("large", None, "ddim", 1, ""),
    ("small", 1, None, None, "x_T"), ("large", 1, "ddim", 1, ""),
    ("large", 7, "ddpm", None, "known"), ("large", 40, "ddpm", None, "known"),
    ("large", 7, "sa-solver", None, "known"), ("large", 40, "sa-solver", None, "known"),
])  # fmt: skip
def test_reverse_process_is_that_of_sample_py(variance, steps, sampler, eta, given, page):
    """Also from a given x_T, and with a known part of the images (inpainting)."""
    left, mask = iter(NOISES), np.arange(18).reshape(SHAPE) % 3 == 0
    ours = {"variance": variance, "steps": steps, "sampler": sampler, "eta": eta}
    theirs = {name: value for name, value in ours.items() if value is not None}
    if given == "x_T":
        ours["x_T"] = theirs["xT"] = NOISES[-1]
    elif given == "known":
        known = 0.3 * NOISES[-1]
        ours["known"], theirs["known"] = (known, mask), {"x0": known, "mask": mask}
    expected = ddpm_numpy.sample_progressive(smooth_eps, lambda: next(left), BETAS, **ours)
    assert_steps_equal(page, "sampleProgressive", theirs, expected, left)


@pytest.mark.parametrize("sampler", ["ddpm", "sa-solver"])
@pytest.mark.parametrize("change", ["none", "withoutZ", "clip", "short", "lastNoise"])
def test_changes_of_the_method(change, sampler, page):
    """Each change of the page, made in Python."""
    left, abar, draw = iter(NOISES), (1 - BETAS).cumprod(), torch.from_numpy
    betas = np.linspace(1e-3, 0.2, 4) if change == "short" else BETAS
    level = np.abs(abar - (1 - betas).cumprod()[:, None]).argmin(1)  # of all 40
    assert (level[-1] < 39) == (change == "short")
    x_T = 20 * draw(NOISES[-1]) if change == "clip" else None  # so that x0_hat leaves [-1, 1]
    noise = lambda: draw(next(left))  # noqa: E731
    if change == "withoutZ":
        noise = iter([noise()] + 40 * [torch.zeros(SHAPE)]).__next__
    chain = beyond.sample_progressive(
        Diffusion(draw(betas)), lambda x, t: draw(smooth_eps(x.numpy(), level[t])), SHAPE,
        min(8, len(betas)), sampler, draw_noise=noise, clip=change != "clip", x_T=x_T,
    )  # fmt: skip
    expected = [(level[t], x.numpy(), x0.numpy()) for t, x, x0 in chain]
    options, atol = {"steps": 8, "sampler": sampler, change: True}, 1e-5
    if change == "lastNoise":
        t, x, x0 = expected[-1]
        expected[-1] = t, x, x0 + (1 - abar[t]) ** 0.5 * next(left)
    if change == "clip":
        options, atol = options | {"clip": False, "xT": x_T}, 5e-4
        assert max(np.abs(x0).max() for _, _, x0 in expected) > 1.1
    assert_steps_equal(page, "sampleChanged", options, expected, left, atol)


def test_noise_is_normal_and_of_one_image_each(page):
    z = noise_of(page, 0, (4, 25_000), 2)
    assert abs(z.mean()) < 0.01 and abs(z.var() - 1) < 0.02 and abs((z**4).mean() - 3) < 0.1
    images = z.reshape(8, -1)
    assert np.abs(np.corrcoef(images) - np.eye(8)).max() < 0.03
    lagged = [np.corrcoef(im[:-lag], im[lag:])[0, 1] for im in images for lag in (1, 2)]
    assert np.abs(lagged).max() < 0.03
    np.testing.assert_array_equal(noise_of(page, 0, (1, 25_000), 2), z[:, :1])
    assert np.abs(noise_of(page, 1, (1, 25_000)) - z[0, 0]).mean() > 0.5
    assert np.isfinite(noise_of(page, 2**32 - 1, (1, 7))).all()


EPS = """async (content, x, times) => {
    const bytes = Uint8Array.from(atob(content), (letter) => letter.charCodeAt(0));
    const runtime = './node_modules/onnxruntime-web/dist/ort.webgpu.bundle.min.mjs';
    const opened = await network.Network.open(bytes, runtime), eps = [];
    for (const t of times) eps.push(await opened.eps(x, t));
    const first = x.slice(0, opened.size); // another batch
    const alone = await opened.eps(first, times[0]);
    opened.close();
    const late = await opened.eps(first, 0).catch((error) => error.message);
    return {...opened, eps, alone, late};
}"""


@pytest.mark.parametrize("name", ["shipped", "model", "int8"])
def test_eps_is_pythons(name, page, exported):
    path = SHIPPED if name == "shipped" else exported / f"{name}.onnx"
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    metadata = session.get_modelmeta().custom_metadata_map
    shape, times = (3, *json.loads(metadata["ddpm.image_shape"])), [0, 300, 999]
    x = np.random.default_rng(0).standard_normal(shape, np.float32)
    no_class = {"y": np.full(3, 10)} if name == "shipped" else {}
    theirs = js(page, EPS, base64.b64encode(path.read_bytes()).decode(), x, times)
    for t, their_eps in zip(times, theirs["eps"], strict=True):
        (eps,) = session.run(["eps"], {"x_t": x, "t": np.full(3, t)} | no_class)
        if name == "int8" and t:  # integer kernels round in another order, and some saturate
            error = np.square(their_eps - eps.ravel()).mean() / np.square(eps).mean()
            assert error**0.5 < MAX_ERROR
        else:
            np.testing.assert_allclose(their_eps, eps.ravel(), atol=1e-4)
    np.testing.assert_allclose(theirs["alone"], theirs["eps"][0][: len(theirs["alone"])], atol=1e-4)
    assert theirs["metadata"] == metadata and theirs["shape"] == list(shape[1:])
    assert theirs["variance"] == metadata["ddpm.variance"]
    assert theirs["betas"] == json.loads(metadata["ddpm.betas"])
    assert theirs["late"] == "the network was closed"


@pytest.mark.parametrize("t", [0, 50, 500, 999])
def test_closed_forms_of_points(t, page):
    """The field against exact.py, and the density against a sum of Gaussians."""
    diffusion, x = Diffusion(linear_betas()), 4 * torch.rand(50, 2, 1, 1) - 2
    abar = diffusion.alphas_bar[t].item()
    forms = "(x, ...rest) => [points.exactEps(x, ...rest), points.density(24, ...rest)]"
    eps, q = js(page, forms, x, abar, MEANS, STD)
    expected = exact_network(diffusion, MEANS, std=STD)(x, torch.full((50,), t))
    np.testing.assert_allclose(eps, expected.ravel(), rtol=1e-4, atol=1e-5)
    ticks = 2.3 * (2 * (np.arange(24) + 0.5) / 24 - 1)
    places = np.stack(np.meshgrid(ticks, -ticks), -1)  # from the top left
    offsets = places[:, :, None] - abar**0.5 * MEANS.flatten(1).numpy()
    gaussians = np.exp(-(offsets**2).sum(-1) / (2 * (abar * STD**2 + 1 - abar)))
    np.testing.assert_allclose(q, gaussians.sum(-1).ravel(), rtol=1e-4, atol=1e-12)


TRAIN = """(options, batches) => {
    const learner = new trainer.Trainer(options), start = learner.parameters.map((p) => p.slice());
    const steps = batches.map((batch) => learner.step(batch)), [{x0, t, y}] = batches;
    return [start, steps, learner.parameters, learner.average, learner.eps(x0, t, y)];
}"""


@pytest.mark.parametrize("target, weights, classes", [
    ("eps", "simple", 0), ("x0", "min-snr", 0), ("v", "vlb", 2), ("eps", "vlb", 2),
])  # fmt: skip
def test_training_takes_the_steps_of_torch(target, weights, classes, page):
    """Algorithm 1: the loss, its gradient, Adam, the average, and eps of the averaged network."""
    torch.manual_seed(0)
    batches = [
        {"x0": torch.randn(9, 2, 1, 1) / 2, "noise": torch.randn(9, 2, 1, 1),
         "t": torch.cat([torch.tensor([0, 1]), torch.randint(1000, (7,))]),
         "y": torch.randint(3, (9,)) if classes else None}
        for _ in range(12)
    ]  # fmt: skip
    options = {"width": 8, "classes": classes, "target": target, "weights": weights, "decay": 0.9}
    start, taken, last, average, eps = js(page, TRAIN, options, batches)
    n = len(start[0]) // 8
    shapes = [(n, 8), (8,), (8, 8), (8,), (8, 2), (2,)]
    mean = [torch.tensor(p).float().view(s) for p, s in zip(start, shapes, strict=True)]
    assert mean[0].std() > 0 and not mean[4].any()
    parameters = [torch.nn.Parameter(p.clone()) for p in mean]
    optimizer, diffusion = torch.optim.Adam(parameters, 8e-3), Diffusion(linear_betas())
    by_t = beyond.loss_weights(diffusion, weights, target)

    def eps_of(y, parameters):
        def network(x_t, t):
            x, (W1, b1, W2, b2, W3, b3) = x_t.flatten(1), parameters
            waves = torch.cat([w * x for w in (3, 6, 12, 24)], 1)
            inputs = [4 * x, waves.sin(), waves.cos(), timestep_embedding(t, 32)]
            if classes:
                inputs.append(F.one_hot(y, classes + 1))
            h = F.silu(torch.cat(inputs, 1) @ W1 + b1)
            return (F.silu(h @ W2 + b2) @ W3 + b3)[..., None, None]

        return beyond.as_eps(network, diffusion, target)

    for k, (batch, theirs) in enumerate(zip(batches, taken, strict=True)):
        optimizer.param_groups[0]["lr"] = 8e-3 / (1 + k / 2000)
        optimizer.zero_grad()
        x0, noise, t, y = batch.values()
        ours = diffusion.loss(eps_of(y, parameters), x0, t, noise, by_t)
        ours.backward()
        assert theirs["loss"] == pytest.approx(ours.item(), rel=1e-5)
        for p, g in zip(parameters, theirs["gradient"], strict=True):
            scale = p.grad.abs().max().item() + 1e-12
            np.testing.assert_allclose(np.array(g) / scale, p.grad.ravel() / scale, atol=1e-5)
        optimizer.step()
        decay = min(0.9, (1 + k) / (10 + k))
        mean = [m + (1 - decay) * (p.detach() - m) for m, p in zip(mean, parameters, strict=True)]
    for theirs, p, m, q in zip(last, parameters, mean, average, strict=True):
        np.testing.assert_allclose(theirs, p.detach().ravel(), atol=1e-5)
        np.testing.assert_allclose(q, m.ravel(), atol=1e-5)
    x0, _, t, y = batches[0].values()
    expected = eps_of(y, mean)(x0, t)
    assert np.abs(np.array(eps) - expected.ravel().numpy()).max() < 1e-3 * expected.abs().max()


def test_batches_are_random_as_algorithm_1_has_them(page):
    draw = "() => trainer.draw([-1, 0.5, 1, -0.5], 0.1, [0, 1], 20000, sampler.uniform(0, 0))"
    x0, t, noise, y = map(np.array, js(page, draw).values())
    x0, noise = x0.reshape(-1, 2), noise.reshape(-1, 2)
    second = x0[:, 0] > 0
    assert np.mean(second) == pytest.approx(0.5, abs=0.015)
    offsets = x0 - np.where(second[:, None], [1, -0.5], [-1, 0.5])
    for z in (noise, offsets / 0.1):
        assert np.abs(z.mean(0)).max() < 0.03 and np.abs(np.cov(z.T) - np.eye(2)).max() < 0.04
        assert (z**4).mean() == pytest.approx(3, abs=0.2)
    assert np.abs(np.corrcoef(noise.T, offsets.T)[:2, 2:]).max() < 0.03
    assert set(range(1000)) == {*t} and np.abs(np.histogram(t, 10)[0] - 2000).max() < 200
    assert np.mean(y == 2) == pytest.approx(0.1, abs=0.01)  # "no class"
    assert (y[y < 2] == second[y < 2]).all()


# ------------------------------------------------------------------------------------- its promises


def test_recording_is_algorithm_2_from_the_noise_of_the_page(opened, page):
    """Before anybody clicks, the page shows the end of the recording, and plays section 1."""
    fresh, network = opened(motion="no-preference"), ddpm_numpy.Network(SHIPPED, "cpu")
    until(fresh, "status", "^Ready")
    assert fresh.text_content("#at") == "26 of 26" and fresh.text_content("#number-t") == "0"
    assert "Not trained yet" in fresh.text_content("#learn-status")
    for seed in (0, 5 * 2**32 + 7):
        theirs = noise_of(page, seed, (2, *network.shape))[0, 1].ravel()
        np.testing.assert_allclose(theirs, page_noise(seed, 1, theirs.size), atol=1e-6)
    assert tiles(fresh, "grid", network.shape).std() > 40
    set_value(fresh, "step", 0)
    (x,) = noise_of(page, 0, (16, *network.shape))
    assert_shows(fresh, "noise", x)
    model = ddpm_numpy.guided(network, np.arange(16) % max(1, len(network.classes)), 0)
    _, _, x0 = next(ddpm_numpy.sample_progressive(model, lambda: x, network.betas))
    assert_shows(fresh, "grid", x0)
    assert "others reach" in until(fresh, "plane-status", "^DDIM, 50 steps")


def test_nothing_moves_where_the_reader_prefers_so(opened):
    page = opened()
    assert page.input_value("#plane-t") == "999"
    assert page.text_content("#plane-play") == "Play"
    assert "Press Play" in page.text_content("#plane-status")
    assert np.array_equal(pixels(page, "hero"), pixels(page, "grid"))  # the end of the recording


def result(page, sampler="ddim", steps=50):
    """What section 1 says about the end of its chain: steps, points off the data, data reached."""
    page.select_option("#plane-sampler", sampler)
    page.select_option("#plane-steps", str(steps))
    set_value(page, "plane-t", -1)
    said = until(page, "plane-status", "others reach")
    return [int(number) for number in re.findall(r"(\d+) (?:of|step)", said)]


def test_points_in_the_plane(page):
    steps, off, reached = result(page)
    assert steps == 50 and off < 20 and reached > 100
    steps, off, _ = result(page, steps=10)
    assert steps == 10 and off > 100
    # without z, Algorithm 2 ends at very few of the data; T = 100 shifts the shares
    assert result(page, "ddpm", 200)[2] > 100
    set_value(page, "withoutZ", True)
    assert result(page, "ddpm", 200)[2] < 30
    assert "Without z" in page.text_content("#plane-change")
    set_value(page, "withoutZ", False)
    set_value(page, "short", True)
    assert result(page, "ddpm", 200)[0] == 100
    set_value(page, "short", False)
    # the buttons go through the states, and back
    set_value(page, "plane-t", 999)
    page.click("#plane-next")
    assert page.text_content("#plane-at") == "t = 994"
    page.click("#plane-back")
    assert page.text_content("#plane-at") == "t = 999"
    set_value(page, "plane-t", 400)
    before = pixels(page, "plane")
    page.click("#plane-play")
    assert page.text_content("#plane-status") == "Sampling …"
    page.wait_for_function("document.getElementById('plane-t').value < 300")
    page.click("#plane-play")
    assert re.fullmatch(r"Stopped at t = \d+\.", page.text_content("#plane-status"))
    assert (pixels(page, "plane") != before).mean() > 0.1


def test_points_that_are_drawn(page):
    page.select_option("#plane-data", "own")
    assert page.input_value("#plane-mode") == "data"
    stroke(page, "plane", (0.5, 0.5), (0.6, 0.5))
    page.focus("#plane")
    page.keyboard.press("ArrowUp")
    page.keyboard.press(" ")
    set_value(page, "plane-t", -1)
    until(page, "plane-status", " 5 data")
    # a path of its own begins where the reader clicks
    page.select_option("#plane-mode", "start")
    page.click("#plane", position={"x": 80, "y": 400})
    assert page.text_content("#plane-play") == "Pause"
    result(page)
    colours = pixels(page, "plane").reshape(3, -1).T.tolist()
    assert [11, 114, 133] in colours  # the second colour of the paths
    page.select_option("#plane-data", "two moons")


def test_network_learns_the_moons(page):
    """Within a minute, the loss is below 1.2 times the floor, and most samples are on the data."""
    of_formula = result(page)
    page.click("#learn-again")
    until(page, "learn-status", "Not trained yet")
    for _ in range(6):  # those that would be slow
        page.click("#learn-step")
    until(page, "learn-status", "^Step 6:")
    page.click("#learn-start")
    # the timeout is longer than a minute, because other processes may run
    below = r", (0\.\d\d|1\.[01]\d) times the floor"
    until(page, "learn-status", rf"{below}\. [1-5]?\d of 200 samples \(DDIM, 50")
    page.click("#learn-start")  # pause
    steps = []
    for t in (500, 30):
        set_value(page, "learn-t", t)  # which paints everything again
        until(page, "learn-at", f"t = {t}")
        steps.append(page.text_content("#learn-status").split(":")[0])
    assert steps[0] == steps[1]
    for canvas in ("learn-batch", "learn-field", "learn-samples", "learn-loss", "learn-errors"):
        assert pixels(page, canvas).std() > 5, canvas
    # the plane of section 1 with the network in place of the formula
    set_value(page, "learn-use", True)
    steps, off, _ = result(page)
    assert steps == 50 and off < 150
    set_value(page, "learn-use", False)
    assert result(page) == of_formula and of_formula[1] < off


def test_changes_of_the_training(page, tmp_path, monkeypatch):
    for name, value in (("data", "10"), ("weights", "vlb"), ("target", "v")):
        set_value(page, f"learn-{name}", value)
    assert "Ten points" in page.text_content("#learn-hint")
    page.click("#learn-step")
    until(page, "learn-status", "^Step 1:")
    assert not page.is_visible("#learn-guidance")
    page.select_option("#plane-data", "two moons, two classes")
    assert page.is_visible("#learn-guidance")
    page.click("#learn-step")
    page.click("#learn-python summary")
    code = until(page, "learn-code", ".")
    assert '"vlb", "v"' in code and len(re.findall(r"\[-?0\.", code)) == 10
    script = code.replace("steps=1000", "steps=3").replace("1000, 2", "10, 2")
    (tmp_path / "run.py").write_text(script, "utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(HERE / "docs")
    runpy.run_path("run.py")
    assert Image.open("samples.png").width > 100


def test_included_network_draws_what_python_draws(page):
    """Each step; then with other classes and with guidance."""
    network = ddpm_numpy.Network(SHIPPED, "cpu")
    trouser, none = network.classes.index("trouser"), len(network.classes)
    assert "The seed must be a whole number" in sampled(page, seed=-1)
    assert "4 images: 10 steps in" in sampled(page, seed=3)
    steps = steps_of_python(network, page, 3, y=range(4))  # the classes in turn
    assert page.text_content("#number-t") == "99"
    assert_shows(page, "grid", steps[-1][2])
    assert pixels(page, "grid").std() > 40
    set_value(page, "step", 4)  # the slider goes back
    t, x, x0 = steps[4]
    assert page.text_content("#number-t") == str(t) and page.text_content("#at") == "5 of 10"
    assert_shows(page, "grid", x0)
    assert_shows(page, "noise", x)
    abar = np.prod(1 - network.betas[: t + 1])
    assert page.text_content("#number-signal") == f"{abar**0.5:.4f}"
    for name, value, y, w in (
        ("class", trouser, [trouser] * 4, 0), ("w", 2, [trouser] * 4, 2),
        ("class", "all", range(4), 2), ("class", none, [none] * 4, 2),
    ):  # fmt: skip
        set_value(page, name, value)  # samples again, from the same noise
        assert "4 images: 10 steps in" in until_idle(page)
        assert_shows(page, "grid", steps_of_python(network, page, 3, y, w)[-1][2])
    assert page.text_content("#w-value") == "2"
    set_value(page, "t", 990)
    page.select_option("#end-class", label="trouser")
    page.click("#denoise")
    assert "Four results" in until_idle(page)
    ends = tiles(page, "ends", (1, 32, 32))
    assert ends[..., :4].mean() < 20 and ends[..., 10:22].mean() > 60  # narrow, and in the middle


def test_runs_side_by_side(page):
    """A run is compared with the recording, then with the one before, at the same t."""
    assert "16 images: 10 steps in" in sampled(page, count=16)
    assert "recorded), at t = 0" in page.text_content("#other-at")  # both results
    set_value(page, "step", 3)
    assert "recorded), at t = 719" in page.text_content("#other-at")  # closest to 699
    set_value(page, "step", 9)
    shape = (1, 32, 32)
    own, other = (tiles(page, name, shape) for name in ("grid", "other-grid"))
    assert np.abs(tiles(page, "difference", shape) - (128 + (own - other) / 2)).max() <= 1
    assert np.abs(own - other).mean() > 2
    set_value(page, "image-lastNoise", True)  # samples again
    until_idle(page)
    page.select_option("#other", label="SA-Solver, 10 steps, all in turn")
    noise = tiles(page, "grid", shape) - tiles(page, "other-grid", shape)
    inner = (own > 90) & (own < 165)  # where the noise of 0.32 is not cut
    assert 25 < noise[inner].std() < 50 and "grain" in page.text_content("#image-change")
    set_value(page, "image-lastNoise", False)


def test_changes_during_a_pass_start_one_more(page):
    """As with an arrow key that is held on w: the last change counts."""
    start_sampling(page, steps=50, seed=7)
    for w in ("0.5", "1", "1.5", "2"):
        set_value(page, "w", w)
    assert until(page, "status", "50 steps in").startswith("4 images: 50 steps in")
    until_idle(page)
    set_value(page, "w", "2.5")
    page.click("#stop")
    until_idle(page)
    names = page.eval_on_selector_all("#other option", "all => all.map((one) => one.text)")
    assert names == ["SA-Solver, 50 steps, all in turn, w = 2", "nothing"]


def test_stop_in_the_middle_and_again(page):
    start_sampling(page, steps=1000, sampler="ddpm")
    until(page, "status", "step [3-9]")
    page.click("#stop")
    assert re.fullmatch(r"Stopped after step \d+ of 1000\.", until_idle(page))
    assert page.is_enabled("#sample") and page.is_enabled("#step")
    page.click("#sample")
    page.keyboard.press("Escape")
    assert "Stopped after step" in until_idle(page)


def test_denoising_a_drawing(page):
    """All of it, from t = 30; then only the part that is marked, from the last t."""
    before = pixels(page, "draw")
    page.fill("#colour", "#ff0000")
    stroke(page, "draw", (0.1, 0.8), (0.9, 0.8))
    painted = pixels(page, "draw")
    changed = (painted != before).any(0)
    assert changed.any() and changed.nonzero()[0].min() > 16
    page.focus("#draw")
    page.keyboard.press("ArrowUp")
    page.keyboard.press(" ")
    assert (pixels(page, "draw") != painted).any()
    grey = np.tensordot([0.299, 0.587, 0.114], pixels(page, "draw"), 1)  # as the network sees it
    set_value(page, "t", 0)
    assert np.abs(pixels(page, "noised")[0] - grey).max() < 10  # sigma is 1.3 of 255
    set_value(page, "t", 600)
    assert np.abs(pixels(page, "noised")[0] - grey).mean() > 50
    set_value(page, "t", 30)
    page.click("#denoise")
    assert "Four results from t = 30: 31 steps" in until_idle(page)
    ends = tiles(page, "ends", (1, 32, 32))[:, 0]
    assert np.abs(ends - grey).mean() < 15 and np.abs(ends[0] - ends[1]).mean() > 0.5
    page.select_option("#brush", "mask")
    assert page.text_content("#t-value") == page.get_attribute("#t", "max")
    stroke(page, "draw", (0.1, 0.2), (0.9, 0.2))
    page.click("#denoise")
    assert "Four completions from t = 999: 50 steps" in until_idle(page)
    changed = (np.abs(tiles(page, "ends", (1, 32, 32))[:, 0] - grey) > 1).any(0)
    assert 40 < changed.sum() < 200 and changed.nonzero()[0].max() < 12
    page.click("#unmark")
    page.select_option("#brush", "draw")


def test_an_image_as_the_drawing(page, tmp_path):
    wide, text = tmp_path / "wide.png", tmp_path / "text.png"
    gradient = np.arange(64 * 96 * 3).reshape(64, 96, 3) // 73
    Image.fromarray(gradient.astype(np.uint8)).save(wide)
    page.set_input_files("#image-file", wide)
    until(page, "status", "wide.png is now")
    assert np.abs(pixels(page, "draw") - read_image(wide, 32, 3).astype(int)).mean() < 8
    text.write_text("not an image")
    page.set_input_files("#image-file", text)
    until(page, "status", "not an image")


@pytest.mark.parametrize("scheme", ["dark", "light"])
@pytest.mark.parametrize("width", [390, 1280])
def test_layout(width, scheme, page):
    page.set_viewport_size({"width": width, "height": 660})
    page.emulate_media(color_scheme=scheme)
    sampled(page, steps=5, count=16)
    assert page.is_visible("#comparison")  # with the recording, which has a long name
    assert page.evaluate("document.scrollingElement.scrollWidth") <= width
    brightness = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (int(re.findall(r"\d+", brightness)[0]) > 128) == (scheme == "light")
    boxes = [page.locator(f"#{name}").bounding_box() for name in ("noise", "grid")]
    assert boxes[0]["y"] == boxes[1]["y"] and boxes[0]["width"] >= 130  # side by side
    unnamed = """[...document.querySelectorAll('input, select, button')]
        .filter((element) => !element.labels?.length && !element.textContent.trim())"""
    assert page.evaluate(f"{unnamed}.length") == 0
    # whoever uses a control, or looks at its plot, sees what the status says
    for status, controls in (
        ("plane-status", "plane plane-play plane-steps withoutZ"),
        ("learn-status", "learn-start learn-target learn-samples learn-average learn-loss"),
        ("status", "sample grid step denoise ends model"),
    ):
        for control in controls.split():
            page.locator(f"#{control}").evaluate("e => e.scrollIntoView({block: 'center'})")
            box = page.locator(f"#{status}").bounding_box()
            assert 0 <= box["y"] < box["y"] + box["height"] <= 660, control
    page.click("[href='#images']")  # whose title the status does not cover
    box = page.locator("#status").bounding_box()
    assert box["y"] + box["height"] <= page.locator("#title-sample").bounding_box()["y"]


def test_other_files_and_then_another_model(page, exported, tmp_path):
    """What is not a model leaves the one before; one that was trained with --quick replaces it."""
    model = (exported / "model.onnx").read_bytes()
    changed = onnx.load_from_string(model)
    (answer,) = (p for p in changed.metadata_props if p.key == "ddpm.eps_of_example")
    answer.value = json.dumps([-value for value in json.loads(answer.value)])
    for name, content, what in (
        ("changed.onnx", changed.SerializeToString(), "an eps that is wrong by 200 %"),
        ("text.onnx", b"hello, world", "it is"),
        ("empty.onnx", b"", "its metadata lacks ddpm.betas"),
        ("half.onnx", model[: len(model) // 2], "it is cut off"),
        ("wrong.onnx", model.replace(b"small", b"smell"), "its metadata makes no sense"),
        ("only.onnx", model[-len(model) // 50 :], "it"),
    ):
        (tmp_path / name).write_bytes(content)
        said = choose(page, tmp_path / name)
        assert said.startswith(f"{name} is not a model from export.py") and what in said
        assert page.get_attribute("#status", "class") == "error"
        assert said.endswith(" fashion-mnist.onnx still draws.")
        assert page.text_content("#refused") == said
    assert "10 steps in" in sampled(page, sampler="ddim")  # the model before is still there
    start_sampling(page, steps=1000)  # stops when another model is opened, without a word
    assert "Ready. model.onnx" in choose(page, exported / "model.onnx")
    assert page.get_attribute("#status", "class") == "" and page.is_enabled("#sample")
    assert page.text_content("#refused") == ""
    about = page.text_content("#about")
    assert "8\u00d78, colour" in about and "small" in about and "image_folder" in about
    assert "4 images: 10 steps in" in sampled(page)
    network = ddpm_numpy.Network(exported / "model.onnx", "cpu")
    assert_shows(page, "grid", steps_of_python(network, page, 0)[-1][2])
    assert np.ptp(tiles(page, "grid", network.shape), axis=1).max() > 50  # in colour
    page.click("#denoise")
    assert "steps in" in until_idle(page)
    assert page.locator("#class").is_hidden() and page.locator("#w").is_hidden()
    # back to the included network
    assert "Ready. fashion-mnist.onnx" in choose(page, SHIPPED)
    network = ddpm_numpy.Network(SHIPPED, "cpu")
    labels = page.locator("#class option").all_text_contents()
    assert labels == ["all in turn", "no class", *network.classes]
    sampled(page)
    assert_shows(page, "grid", steps_of_python(network, page, 0, y=range(4))[-1][2])


def test_without_a_connection(opened):
    """And without a copy of the runtime, section 2 works; its training has one loop."""
    page = opened(dict.fromkeys([OUTSIDE, COPY], lambda route: route.abort()))
    assert page.evaluate("window.ready") is False
    said = page.text_content("#status")
    assert "Sections 1 and 2 work in full" in said and said.endswith(INSTALL)
    page.clock.install(time=0)
    page.clock.pause_at(1000)
    for _ in range(3):  # Start, Pause, Start, while the loop waits after its first step for 0.9 s
        page.click("#learn-start")
    page.clock.run_for(1500)
    assert page.text_content("#learn-status").startswith("Step 2:")


def test_onnxruntime_comes_from_jsdelivr_where_there_is_no_copy(opened):
    """Where there is one, as for the other tests, nothing comes from outside."""
    version, asked = json.loads((RUNTIME / "package.json").read_text("utf-8"))["version"], set()
    assert f"onnxruntime-web@{version}" == VERSION

    def outside(route):
        folder, name = route.request.url.rsplit("/", 1)
        asked.add(folder)
        route.fulfill(path=RUNTIME / "dist" / name, headers={"Access-Control-Allow-Origin": "*"})

    page = opened({OUTSIDE: outside, COPY: lambda route: route.fulfill(status=404)})
    until(page, "status", "^Ready")
    assert asked == {f"https://cdn.jsdelivr.net/npm/{VERSION}/dist"}


@pytest.mark.slow
def test_demo_is_drawn_in_the_page(demo, page):
    """The network of the demo, judged as in Python."""
    assert "Ready. model.onnx" in choose(page, demo / "model.onnx")
    assert "50 steps in" in sampled(page, steps=50, count=16)
    assert count_right(tiles(page, "grid", (3, 8, 8))) >= 13
