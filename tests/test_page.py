"""The page page/index.html, in a real browser: its numbers are Python's, its promises hold."""

import base64
import functools
import http.server
import io
import json
import re
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
from ddpm import Diffusion, linear_betas
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
    keep: whether the tab stays open when another one is opened.
    """
    said, tabs = [], []

    def refuse(route):
        said.append(route.request.url)
        route.abort()

    def call(routes=None, motion="reduce", wait=True, keep=False):
        while tabs:  # those of earlier tests, which would take time from this one
            tabs.pop().close()
        page = browser.new_page(viewport={"width": 1280, "height": 900}, reduced_motion=motion)
        page.set_default_timeout(100_000)
        if not keep:
            tabs.append(page)
        for pattern, handle in (routes or {OUTSIDE: refuse}).items():
            page.route(re.compile(pattern), handle)
        page.on("pageerror", lambda error: said.append(str(error)))
        if not routes:
            page.on("console", lambda m: said.append(m.text) if m.type == "error" else None)
        page.goto(f"http://127.0.0.1:{server.server_port}/")
        if wait:
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
    page = opened(keep=True)
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


def until_idle(page, status="status"):
    """Wait for the end of the reverse process. Returns what the status says then."""
    page.locator("#stop:disabled").wait_for()
    return until(page, status, "steps? in|Stopped|must|fail")


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
    page.evaluate("document.getElementById('status').textContent = ''")
    for name, value in (values | controls).items():
        set_value(page, f"image-{name}", value)
    page.click("#sample")


def sampled(page, **controls):
    """Sample in section 3. Returns what the status says in the end."""
    start_sampling(page, **controls)
    return until_idle(page)


def choose(page, path):
    """Give the page a model.onnx. Returns what it says then."""
    page.evaluate("document.getElementById('own-status').textContent = 'Loading'")
    page.set_input_files("#model", path)
    return until(page, "own-status", "^(?!Loading)")


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
    url = page.evaluate(
        """async (id) => {
            document.getElementById(id).scrollIntoView({block: "center"});
            await new Promise((resolve) => setTimeout(resolve, 400)); // until it is drawn
            return document.getElementById(id).toDataURL();
        }""",
        canvas,
    )
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
    np.testing.assert_allclose(q, gaussians.sum(-1).ravel(), rtol=1e-4, atol=1e-5)


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
    optimizer, diffusion = torch.optim.Adam(parameters, 0.012), Diffusion(linear_betas())
    by_t = beyond.loss_weights(diffusion, weights, target)

    def eps_of(y, parameters):
        def network(x_t, t):
            x, (W1, b1, W2, b2, W3, b3) = x_t.flatten(1), parameters
            waves = torch.cat([w * x for w in (3, 6, 12, 24)], 1)
            abar = diffusion.alphas_bar[t, None]
            angles = 0.15 * torch.arange(1, 9) * (abar / (1 - abar)).log().float() / 2
            inputs = [4 * x, waves.sin(), waves.cos(), angles.sin(), angles.cos()]
            if classes:
                inputs.append(F.one_hot(y, classes + 1))
            h = F.silu(torch.cat(inputs, 1) @ W1 + b1)
            return (F.silu(h @ W2 + b2) @ W3 + b3)[..., None, None]

        return beyond.as_eps(network, diffusion, target)

    for k, (batch, theirs) in enumerate(zip(batches, taken, strict=True)):
        optimizer.param_groups[0]["lr"] = 0.012 / (1 + k / 1000)
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
    """Before anybody clicks, the images are the end of the recording."""
    fresh, network = opened(), ddpm_numpy.Network(SHIPPED, "cpu")
    until(fresh, "status", "^Ready")
    assert fresh.text_content("#image-at") == "27 of 27"
    assert fresh.text_content("#image-shown").endswith("(recorded): the result")
    assert "Not trained yet" in fresh.text_content("#learn-status")
    for seed in (0, 5 * 2**32 + 7):
        theirs = noise_of(page, seed, (2, *network.shape))[0, 1].ravel()
        np.testing.assert_allclose(theirs, page_noise(seed, 1, theirs.size), atol=1e-6)
    assert tiles(fresh, "grid", network.shape).std() > 40
    assert np.array_equal(pixels(fresh, "grid"), pixels(fresh, "noise"))  # both are the result
    set_value(fresh, "image-step", 0)
    (x,) = noise_of(page, 0, (16, *network.shape))
    assert_shows(fresh, "noise", x)
    model = ddpm_numpy.guided(network, np.arange(16) % max(1, len(network.classes)), 0)
    _, _, x0 = next(ddpm_numpy.sample_progressive(model, lambda: x, network.betas))
    assert_shows(fresh, "grid", x0)


# ---- the opening scene


def scene(page, code):
    """What an expression with the module `scene` of the page gives; arrays become lists."""
    return page.evaluate(
        f"""async () => {{
            const scene = await import("./scene.js"), value = await ({code});
            return ArrayBuffer.isView(value) ? Array.from(value) : value;
        }}"""
    )


def until_complete(page):
    """Wait until the network has drawn its picture."""
    while not scene(page, "scene.isComplete()"):
        page.wait_for_timeout(300)


def points_at(page, place):
    return np.array(scene(page, f"scene.pointsAt({place})")).reshape(-1, 2)


def test_scene_moves_at_once_and_until_it_is_touched(opened):
    """It needs neither the recording nor a network to begin; a touch ends the repetition."""
    missing = dict.fromkeys([OUTSIDE, "onnx", "recorded"], lambda route: route.abort())
    page = opened(missing, motion="no-preference", wait=False)
    page.wait_for_function("document.getElementById('scene-place').value > 0", timeout=10_000)
    page.locator("#scene-plane").click(position={"x": 5, "y": 5})
    at = page.input_value("#scene-place")
    page.wait_for_timeout(1000)
    assert page.input_value("#scene-place") == at
    page.locator("#scene-many").click()  # goes on to the noise if it is at the data, and back
    until(page, "scene-title", "Back in many steps|They are back")


def test_nothing_moves_where_the_reader_prefers_so(opened):
    page = opened()
    page.wait_for_timeout(2500)
    assert page.input_value("#scene-place") == "0"
    assert page.text_content("#plane-play") == "Play" and page.input_value("#plane-t") == "999"
    assert "Press Play" in page.text_content("#plane-status")


def test_scene_is_on_the_first_screen(page):
    """With all of its controls, also on a phone."""
    for width, height in ((1280, 900), (390, 844)):
        page.set_viewport_size({"width": width, "height": height})
        page.evaluate("scrollTo(0, 0)")
        for name in ("scene-plane", "scene-picture", "scene-place", "scene-many", "scene-one"):
            box = page.locator(f"#{name}").bounding_box()
            assert box["x"] >= 0 and box["x"] + box["width"] <= width, name
            assert box["y"] >= 0 and box["y"] + box["height"] <= height, name
    page.set_viewport_size({"width": 1280, "height": 900})


def test_scene_goes_to_noise_and_back(opened):
    """By the forward process (4), then by the exact arrows; in one jump, to the mean."""
    page, moons = opened(), None
    until(page, "status", "^Ready")
    data = points_at(page, 0)
    moons = torch.tensor(data).float()[..., None, None]
    half, diffusion = points_at(page, 0.5), Diffusion(linear_betas())  # t = 249
    noise = points_at(page, 1)
    abar = diffusion.alphas_bar[249].item()
    last = diffusion.alphas_bar[999].item()
    eps = (noise - last**0.5 * data) / (1 - last) ** 0.5
    np.testing.assert_allclose(half, abar**0.5 * data + (1 - abar) ** 0.5 * eps, atol=1e-4)
    picture = lambda place: np.array(scene(page, f"scene.pictureAt({place})"))  # noqa: E731
    assert np.std(picture(1)) == pytest.approx(1, abs=0.05)
    assert np.corrcoef(picture(0), picture(0.2))[0, 1] > 0.9
    # letting go of the slider sends them back, and the slider shows the way
    scene(page, "scene.moveTo(1), scene.sendBack('many'), scene.stop()")
    exact = exact_network(diffusion, moons, std=STD)
    expected = -exact(torch.tensor(noise).float()[..., None, None], torch.full((240,), 999))
    lower = round(1000 * 0.97**2 - 1)  # but for the shrinking, they move along the arrows
    moved = points_at(page, 0.97) / diffusion.alphas_bar[lower].item() ** 0.5 - noise / last**0.5
    cosine = F.cosine_similarity(torch.tensor(moved), expected.flatten(1))
    assert cosine.median() > 0.99
    end = points_at(page, 0)
    distance = np.linalg.norm(end[:, None] - data, axis=-1)
    assert (distance.min(1) < 3 * STD).mean() > 0.9
    assert (
        len(set(distance.argmin(1))) > 100 and (distance.argmin(1) != np.arange(240)).mean() > 0.9
    )
    # meanwhile, the network draws the picture that it draws in Python; in one jump, its estimate
    until_complete(page)
    network, (x,) = ddpm_numpy.Network(SHIPPED, "cpu"), (picture(1).reshape(1, 1, 32, 32),)
    model = ddpm_numpy.guided(network, np.array([len(network.classes)]), 0)
    draw = lambda: x.astype(np.float32)  # noqa: E731
    steps = list(
        ddpm_numpy.sample_progressive(model, draw, network.betas, steps=40, sampler="ddim")
    )
    np.testing.assert_allclose(picture(0), steps[-1][2].ravel(), atol=2e-2)
    scene(page, "scene.moveTo(0), scene.moveTo(0.999), scene.moveTo(1)")  # with fresh noise
    (x,) = (picture(1).reshape(1, 1, 32, 32),)
    scene(page, "scene.sendBack('one'), scene.stop()")
    assert np.abs(points_at(page, 0) - data.mean(0)).max() < 0.05
    until_complete(page)
    steps = ddpm_numpy.sample_progressive(model, draw, network.betas, steps=40, sampler="ddim")
    np.testing.assert_allclose(picture(0), next(steps)[2].ravel(), atol=2e-2)


def test_origins_of_a_point(page):
    """The probabilities are Bayes' rule, and the arrow points at their mean."""
    x = np.array([[0.3, -0.2]], np.float32)
    for t in (30, 300, 700):
        diffusion = Diffusion(linear_betas())
        abar = diffusion.alphas_bar[t].item()
        call = "(x, abar, means, std) => points.posterior(...x, abar, means, std)"
        weights = np.array(js(page, call, x, abar, MEANS, STD))
        means, variance = MEANS.flatten(1).numpy(), abar * STD**2 + 1 - abar
        q = np.exp(-(((x - abar**0.5 * means) ** 2).sum(1)) / (2 * variance))
        np.testing.assert_allclose(weights, q / q.sum(), rtol=1e-4, atol=1e-9)
        eps = exact_network(diffusion, MEANS, std=STD)(
            torch.tensor(x)[..., None, None], torch.tensor([t])
        )
        to_mean = abar**0.5 * weights @ means - x[0]
        arrow = -eps.flatten().numpy()
        cosine = to_mean @ arrow / np.linalg.norm(to_mean) / np.linalg.norm(arrow)
        assert cosine > 1 - 1e-4


def test_scene_by_hand_and_by_keyboard(page):
    """A drag of the slider, a tap on a point, arrow keys; the slider's keys send nothing back."""
    page.evaluate("scrollTo(0, 0)")
    scene(page, "scene.moveTo(0)")
    page.focus("#scene-place")
    for _ in range(3):
        page.keyboard.press("PageUp")
    assert int(page.input_value("#scene-place")) > 200
    assert page.text_content("#scene-title") == "Noise is added"
    before = pixels(page, "scene-plane")
    page.focus("#scene-plane")
    page.keyboard.press("ArrowRight")
    assert "data points" in page.text_content("#scene-text")
    assert page.text_content("#scene-title") == "One point"
    assert (pixels(page, "scene-plane") != before).any()
    page.keyboard.press("Escape")
    assert page.text_content("#scene-title") == "Noise is added"
    box = page.locator("#scene-place").bounding_box()
    y = box["y"] + box["height"] / 2
    place = int(page.input_value("#scene-place")) / 1000
    page.mouse.move(box["x"] + 8 + place * (box["width"] - 16), y)
    page.mouse.down()
    page.mouse.move(box["x"] + 0.8 * box["width"], y, steps=3)
    assert page.text_content("#scene-title") == "Noise is added"
    page.mouse.up()
    assert page.text_content("#scene-title") == "Back in many steps"
    until(page, "scene-title", "They are back")
    scene(page, "scene.stop()")


def test_going_back_shows_what_the_controls_say(opened):
    """A browser restores controls, but not what they have changed."""
    page = opened()
    for name, value in (("data", "a ring"), ("sampler", "ddpm"), ("field", False)):
        set_value(page, f"plane-{name}", value)
    set_value(page, "image-steps", 50)
    address = page.url
    page.goto(address + "page.css")
    page.go_back()
    page.wait_for_function("document.querySelectorAll('#plane-data option').length > 3")
    set_value(page, "plane-t", -1)
    said = until(page, "plane-status", "the points miss")
    names = {"ddpm": "Algorithm 2", "ddim": "DDIM"}
    assert said.startswith(names[page.input_value("#plane-sampler")])
    n = {"a ring": 200, "two moons": 240}[page.input_value("#plane-data")]
    assert f"of {n} data" in page.text_content("#plane-count")


def result(page, sampler="ddim", steps=50):
    """What section 1 says about the end of its chain: steps, points off the data, data reached."""
    set_value(page, "plane-sampler", sampler)
    set_value(page, "plane-steps", str(steps))
    set_value(page, "plane-t", -1)
    said = until(page, "plane-status", "the points miss")
    off, reached = re.match(
        r"(\d+) of .* reach (\d+) of", page.text_content("#plane-count")
    ).groups()
    return int(re.search(r"(\d+) step", said)[1]), int(off), int(reached)


def test_points_in_the_plane(page):
    steps, off, reached = result(page)
    assert steps == 50 and off < 20 and reached > 100
    steps, off, _ = result(page, steps=10)
    assert steps == 10 and off > 100 and "poor" in page.text_content("#plane-status")
    # without z, Algorithm 2 ends at very few of the data; T = 100 shifts the shares
    assert result(page, "ddpm", 200)[2] > 100
    set_value(page, "plane-withoutZ", True)
    assert result(page, "ddpm", 200)[2] < 30
    assert "Without fresh noise" in page.text_content("#plane-change")
    set_value(page, "plane-withoutZ", False)
    set_value(page, "plane-short", True)
    assert result(page, "ddpm", 200)[0] == 100
    set_value(page, "plane-short", False)
    # the buttons go through the states, and back
    set_value(page, "plane-t", 999)
    page.wait_for_function("document.getElementById('plane-status').textContent != 'Computing …'")
    page.evaluate("document.querySelector('#arrows details').open = true")
    page.click("#plane-next")
    assert page.text_content("#plane-at") == "t = 994"
    page.click("#plane-back")
    assert page.text_content("#plane-at") == "t = 999"
    set_value(page, "plane-t", 400)
    before = pixels(page, "plane")
    page.click("#plane-play")
    assert page.text_content("#plane-status") == "The points follow the arrows …"
    page.wait_for_function("document.getElementById('plane-t').value < 300")
    page.click("#plane-play")
    assert re.fullmatch(r"Stopped at t = \d+\.", page.text_content("#plane-status"))
    assert page.text_content("#plane-play") == "Continue"
    assert (pixels(page, "plane") != before).mean() > 0.05


BETWEEN = """(x, x0, t, levels) => {
    const at = (level) => sampler.between({t, x, x0}, level);
    return levels.map((level) => [at(level), sampler.partsAt(level)]);
}"""


def test_straight_paths_are_those_of_ddim(page):
    """Each step of DDIM is straight in x_t / (sqrt(abar) + sqrt(1 - abar)), and else it is not."""
    diffusion, x, x0 = Diffusion(linear_betas()), NOISES[0].ravel(), 0.3 * NOISES[1].ravel()
    chain, _, _ = beyond.respaced(diffusion, lambda *_: 0, 5)
    step = js(page, BETWEEN, x, x0, 799, [799, 700, 599.5, 599])
    (_, last), abar = step[-1], chain.alphas_bar
    np.testing.assert_allclose(last, [abar[2] ** 0.5, (1 - abar[2]) ** 0.5], rtol=1e-6)
    eps = (x - abar[3].item() ** 0.5 * x0) / (1 - abar[3].item()) ** 0.5
    np.testing.assert_allclose(step[-1][0], last[0] * x0 + last[1] * eps, atol=1e-5)
    for scaled in (True, False):
        places = [np.array(place) / (sum(parts) if scaled else 1) for place, parts in step]
        way, middle = places[-1] - places[0], places[1] - places[0]
        beside = middle - (middle @ way) / (way @ way) * way
        assert (np.abs(beside).max() < 1e-5) == scaled
    set_value(page, "plane-straight", True)
    assert result(page)[0] == 50
    set_value(page, "plane-straight", False)


def test_points_that_are_drawn(page):
    """A choice of other data ends the drawing of points, and a pass begins anew with other data."""
    set_value(page, "plane-t", 300)
    set_value(page, "plane-data", "own")
    assert page.input_value("#plane-mode") == "data" and page.input_value("#plane-t") == "999"
    assert page.text_content("#plane-status") == "Draw some points in the plane."
    stroke(page, "plane", (0.5, 0.5), (0.6, 0.5))
    assert "Draw some" not in page.text_content("#plane-status")
    page.focus("#plane")
    page.keyboard.press("ArrowUp")
    page.keyboard.press(" ")
    result(page)
    assert " 5 data" in page.text_content("#plane-count")
    set_value(page, "plane-data", "two moons")
    assert page.input_value("#plane-mode") == "path"
    # a path of its own begins where the reader clicks
    page.click("#plane", position={"x": 80, "y": 400})
    assert page.text_content("#plane-play") == "Pause"
    result(page)
    assert " 240 data" in page.text_content("#plane-count")
    colours = pixels(page, "plane").reshape(3, -1).T.tolist()
    assert [0x2C, 0x62, 0xCF] in colours  # the third colour of the paths


def test_network_learns_the_moons(page):
    """Within a minute, the loss is below 1.2 times the floor, and most samples are on the data."""
    of_formula = result(page)
    page.click("#learn-again")
    assert "Not trained yet" in page.text_content("#learn-status")
    for _ in range(6):  # those that would be slow
        page.click("#learn-step")
    until(page, "learn-status", r"^Step 6\.")
    page.click("#learn-start")
    # the timeout is longer than a minute, because other processes may run
    until(page, "learn-numbers", r", (0\.\d\d|1\.[01]\d) times the floor")
    until(page, "learn-status", r"\. [12]?\d % of its samples")
    # an old result never stands beside the arrows of the network
    set_value(page, "plane-network", True)
    assert page.text_content("#plane-status") == "Computing …"
    steps, off, _ = result(page)
    assert steps == 50 and off < 150
    assert "with the network of section 2" in page.text_content("#plane-status")
    page.click("#learn-start")  # pause
    steps = []
    for t in (500, 30):
        set_value(page, "learn-t", t)  # which paints everything again
        assert page.text_content("#learn-at") == f"t = {t}"
        steps.append(page.text_content("#learn-status").split(".")[0])
    assert steps[0] == steps[1] and page.text_content("#learn-start") == "Continue"
    page.evaluate("document.querySelector('#learning details').open = true")
    for canvas in ("learn-batch", "learn-field", "learn-samples", "learn-loss"):
        assert pixels(page, canvas).std() > 5, canvas
    set_value(page, "plane-network", False)
    assert result(page) == of_formula and of_formula[1] < off


def test_changes_of_the_training(page):
    for name, value in (("data", "10"), ("weights", "vlb"), ("target", "v")):
        set_value(page, f"learn-{name}", value)
    page.click("#learn-step")
    until(page, "learn-status", r"^Step 1\.")
    set_value(page, "plane-data", "a ring")  # other data: the training starts over
    assert "Not trained yet" in page.text_content("#learn-status")
    set_value(page, "plane-data", "two moons")


def test_included_network_draws_what_python_draws(page):
    """Each step; then with other classes and with guidance."""
    network = ddpm_numpy.Network(SHIPPED, "cpu")
    trouser, none = network.classes.index("trouser"), len(network.classes)
    assert "The seed must be a whole number" in sampled(page, seed=-1)
    assert "4 images: 10 steps in" in sampled(page, seed=3)
    steps = steps_of_python(network, page, 3, y=range(4))  # the classes in turn
    assert page.text_content("#image-shown").endswith(": the result")
    assert_shows(page, "grid", steps[-1][2])
    assert_shows(page, "noise", steps[-1][2])
    assert pixels(page, "grid").std() > 40
    set_value(page, "image-step", 4)  # the slider goes back
    t, x, x0 = steps[4]
    assert page.text_content("#image-shown").endswith(f"t = {t}")
    assert page.text_content("#image-at") == "5 of 11"
    assert_shows(page, "grid", x0)
    assert_shows(page, "noise", x)
    abar = np.prod(1 - network.betas[: t + 1])
    assert f"{abar**0.5:.4f} x₀" in page.text_content("#image-numbers")
    for name, value, y, w in (
        ("class", trouser, [trouser] * 4, 0), ("w", 2, [trouser] * 4, 2),
        ("class", "all", range(4), 2), ("class", none, [none] * 4, 2),
    ):  # fmt: skip
        page.evaluate("document.getElementById('status').textContent = ''")
        set_value(page, f"image-{name}", value)  # samples again, from the same noise
        assert "4 images: 10 steps in" in until_idle(page)
        assert_shows(page, "grid", steps_of_python(network, page, 3, y, w)[-1][2])
    assert page.text_content("#image-w-value") == "2"
    set_value(page, "draw-t", 990)
    set_value(page, "draw-class", str(trouser))
    page.click("#denoise")
    assert "Four results" in until_idle(page, "draw-status")
    ends = tiles(page, "ends", (1, 32, 32))
    assert ends[..., :4].mean() < 20 and ends[..., 10:22].mean() > 60  # narrow, and in the middle


RECORDED, TENTH = (
    "Algorithm 2, 1000 steps, all in turn (recorded)",
    "SA-Solver, 10 steps, all in turn",
)


def test_runs_side_by_side(page):
    """A run is compared with the recording, then with the one before, at the same t."""
    assert "16 images: 10 steps in" in sampled(page, count=16)
    set_value(page, "image-other", RECORDED)
    assert "recorded): the result" in page.text_content("#image-other-at")  # both results
    set_value(page, "image-step", 3)
    assert "recorded): t = 719" in page.text_content("#image-other-at")  # closest to 699
    set_value(page, "image-step", 10)
    shape = (1, 32, 32)
    own, other = (tiles(page, name, shape) for name in ("grid", "other-grid"))
    assert np.abs(tiles(page, "difference", shape) - (128 + (own - other) / 2)).max() <= 1
    assert np.abs(own - other).mean() > 2
    page.evaluate("document.getElementById('status').textContent = ''")
    set_value(page, "image-lastNoise", True)  # samples again
    until_idle(page)
    set_value(page, "image-other", TENTH)
    noise = tiles(page, "grid", shape) - tiles(page, "other-grid", shape)
    inner = (own > 90) & (own < 165)  # where the noise of 0.32 is not cut
    assert 25 < noise[inner].std() < 50 and "grain" in page.text_content("#image-change")
    set_value(page, "image-lastNoise", False)
    until_idle(page)


def test_changes_during_a_pass_start_one_more(page):
    """As with an arrow key that is held on w: the last change counts, whatever the control is."""
    start_sampling(page, steps=50, seed=7)
    for w in ("0.5", "1", "1.5", "2"):
        set_value(page, "image-w", w)
    assert until(page, "status", "50 steps in").startswith("4 images: 50 steps in")
    set_value(page, "image-other", "")
    assert "w = 2: the result" in page.text_content("#image-shown")
    names = page.eval_on_selector_all("#image-other option", "all => all.map((one) => one.text)")
    assert names == ["nothing"]
    for name, value in (("steps", 5), ("sampler", "ddim"), ("count", 16), ("seed", 8)):
        page.evaluate("document.getElementById('status').textContent = ''")
        set_value(page, f"image-{name}", value)
        until(page, "status", "steps in")
    assert page.text_content("#image-shown").startswith("DDIM, 5 steps")
    set_value(page, "image-steps", 1000)  # which would take long
    assert "Press Draw" in until(page, "status", "Press") and page.is_disabled("#stop")
    set_value(page, "image-w", "0")
    assert "Press Draw" in until(page, "status", "Press") and page.is_disabled("#stop")


def test_stop_in_the_middle_and_again(page):
    start_sampling(page, steps=1000, sampler="ddpm")
    until(page, "status", "step [3-9]")
    page.click("#stop")
    assert re.fullmatch(r"Stopped after step \d+ of 1000\.", until_idle(page))
    assert page.is_enabled("#sample") and page.is_enabled("#image-step")
    page.click("#sample")
    until(page, "status", "step [3-9]")
    page.keyboard.press("Escape")
    assert "Stopped after step" in until_idle(page)


def test_denoising_a_drawing(page):
    """All of it, from t = 30; then only the part that is marked, from the last t."""
    shape = (1, 32, 32)
    before = pixels(page, "draw")
    set_value(page, "draw-colour", "#ff0000")
    stroke(page, "draw", (0.1, 0.8), (0.9, 0.8))
    painted = pixels(page, "draw")
    changed = (painted != before).any(0)
    assert changed.any() and changed.nonzero()[0].min() > 16
    page.focus("#draw")
    page.keyboard.press("ArrowUp")
    page.keyboard.press(" ")
    assert (pixels(page, "draw") != painted).any()
    grey = np.tensordot([0.299, 0.587, 0.114], pixels(page, "draw"), 1)  # as the network sees it
    set_value(page, "draw-t", 0)
    assert np.abs(pixels(page, "noised")[0] - grey).max() < 10  # sigma is 1.3 of 255
    set_value(page, "draw-t", 600)
    assert np.abs(pixels(page, "noised")[0] - grey).mean() > 50
    set_value(page, "draw-t", 30)
    page.click("#denoise")
    assert "Four results from t = 30: 31 steps" in until_idle(page, "draw-status")
    ends = tiles(page, "ends", shape)[:, 0]
    assert np.abs(ends - grey).mean() < 15 and np.abs(ends[0] - ends[1]).mean() > 0.5
    # marks: the level is not the slider's while there are some; old results do not stay
    set_value(page, "draw-brush", "mask")
    assert page.text_content("#draw-t-value") == "30"
    stroke(page, "draw", (0.1, 0.2), (0.9, 0.2))
    assert page.is_disabled("#draw-t") and "pure noise" in page.text_content("#draw-hint")
    assert (tiles(page, "ends", shape) == 128).all()
    page.click("#denoise")
    assert "Four completions from t = 999: 50 steps" in until_idle(page, "draw-status")
    changed = (np.abs(tiles(page, "ends", shape)[:, 0] - grey) > 1).any(0)
    assert 40 < changed.sum() < 200 and changed.nonzero()[0].max() < 12
    page.evaluate("document.querySelector('#drawing details').open = true")
    page.click("#draw-unmark")
    assert page.is_enabled("#draw-t") and page.text_content("#draw-t-value") == "30"
    # after "Clear", what is drawn is seen
    set_value(page, "draw-brush", "draw")
    set_value(page, "draw-colour", "#000000")
    page.click("#draw-clear")
    assert pixels(page, "draw").max() == 0
    stroke(page, "draw", (0.1, 0.8), (0.9, 0.8))
    assert pixels(page, "draw").max() > 200


def test_an_image_as_the_drawing(page, tmp_path):
    wide, text = tmp_path / "wide.png", tmp_path / "text.png"
    gradient = np.arange(64 * 96 * 3).reshape(64, 96, 3) // 73
    Image.fromarray(gradient.astype(np.uint8)).save(wide)
    page.set_input_files("#draw-file", wide)
    until(page, "draw-status", "wide.png is now")
    assert np.abs(pixels(page, "draw") - read_image(wide, 32, 3).astype(int)).mean() < 8
    text.write_text("not an image")
    page.set_input_files("#draw-file", text)
    until(page, "draw-status", "not an image")


@pytest.mark.parametrize("scheme", ["dark", "light"])
@pytest.mark.parametrize("width", [320, 390, 1280])
def test_layout(width, scheme, page):
    page.set_viewport_size({"width": width, "height": 660})
    page.emulate_media(color_scheme=scheme)
    open_all = "document.querySelectorAll('details').forEach((one) => { one.open = true; })"
    page.evaluate(open_all)
    sampled(page, steps=5, count=16)
    set_value(page, "image-other", RECORDED)
    assert page.is_visible("#comparison")  # with the recording, which has a long name
    assert page.evaluate("document.scrollingElement.scrollWidth") <= width
    brightness = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (int(re.findall(r"\d+", brightness)[0]) > 128) == (scheme == "light")
    boxes = [page.locator(f"#{name}").bounding_box() for name in ("noise", "grid")]
    assert boxes[0]["y"] == boxes[1]["y"] and boxes[0]["width"] >= 120  # side by side
    for name in ("scene-place", "plane-t", "image-step", "draw-t"):
        assert page.locator(f"#{name}").bounding_box()["width"] >= 90, name
    unnamed = """[...document.querySelectorAll('input, select, button')]
        .filter((element) => !element.labels?.length && !element.textContent.trim())"""
    assert page.evaluate(f"{unnamed}.length") == 0
    # a finger scrolls the page on the planes; only on a drawing it draws
    for name in ("scene-plane", "plane", "learn-field"):
        assert "pan-y" in page.locator(f"#{name}").evaluate("e => getComputedStyle(e).touchAction")
    page.set_viewport_size({"width": 1280, "height": 900})
    page.emulate_media(color_scheme="light")


def test_one_live_region_that_does_not_chatter(page):
    """What can be used is no image, and a run is announced once."""
    assert page.locator("[role=status], [aria-live]").count() == 1
    assert page.locator("canvas:not([role]):not([aria-hidden])").count() == 0
    assert page.locator("canvas[tabindex][role=img]").count() == 0
    page.evaluate("""() => {
        window.said = [];
        new MutationObserver(() => window.said.push(document.getElementById("live").textContent))
            .observe(document.getElementById("live"), {childList: true});
    }""")
    sampled(page, steps=20)
    set_value(page, "plane-t", 60)
    page.click("#plane-play")
    until(page, "plane-status", "the points miss")
    page.wait_for_timeout(1500)
    said = page.evaluate("window.said")
    assert 1 <= len(said) <= 3 and "the points miss" in said[-1]


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
        assert "error" in page.get_attribute("#status", "class")
        assert said.endswith(" fashion-mnist.onnx still draws.")
        assert page.text_content("#status") == said
    assert "10 steps in" in sampled(page, sampler="ddim")  # the model before is still there
    start_sampling(page, steps=1000)  # stops when another model is opened, without a word
    assert "Ready. model.onnx" in choose(page, exported / "model.onnx")
    assert "error" not in page.get_attribute("#status", "class") and page.is_enabled("#sample")
    about = page.text_content("#about")
    assert "8\u00d78 pixels, colour" in about and "small" in about and "image_folder" in about
    assert "4 images: 10 steps in" in sampled(page)
    network = ddpm_numpy.Network(exported / "model.onnx", "cpu")
    assert_shows(page, "grid", steps_of_python(network, page, 0)[-1][2])
    assert np.ptp(tiles(page, "grid", network.shape), axis=1).max() > 50  # in colour
    page.click("#denoise")
    assert "steps in" in until_idle(page, "draw-status")
    assert page.locator("#image-class").is_hidden() and page.locator("#image-w").is_hidden()
    # back to the included network
    assert "Ready. fashion-mnist.onnx" in choose(page, SHIPPED)
    network = ddpm_numpy.Network(SHIPPED, "cpu")
    labels = page.locator("#image-class option").all_text_contents()
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
    assert page.text_content("#learn-status").startswith("Step 2.")


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
