"""The page page/index.html, in a real browser: its numbers are Python's, its promises hold."""

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
import torch
import torch.nn.functional as F
from conftest import HERE, python
from PIL import Image

import beyond
import ddpm_numpy
from beyond import as_eps, loss_weights
from ddpm import Diffusion, linear_betas, timestep_embedding
from docs.make_figures import page_noise
from docs.points import MEANS, STD
from exact import exact_network
from images import read_image, save_image, to_image, to_pixels
from support.data import count_right
from support.reduced import TOLERANCE

sync_api = pytest.importorskip("playwright.sync_api", reason="the page's tests need playwright")
BROWSERS = "chromium", "chromium-browser", "google-chrome", "google-chrome-stable"
CHROMIUM = next(filter(None, map(shutil.which, BROWSERS)), None)
PAGE = HERE / "page"
RUNTIME = PAGE / "node_modules" / "onnxruntime-web"
VERSION = re.search(r"onnxruntime-web@[0-9.]+", (PAGE / "page.js").read_text("utf-8"))[0]
INSTALL = f"npm install --no-save --no-package-lock --prefix page {VERSION}"
pytestmark = [
    pytest.mark.page,
    pytest.mark.skipif(CHROMIUM is None, reason="the page's tests need Chromium"),
    pytest.mark.skipif(not RUNTIME.is_dir(), reason=f"run: {INSTALL}"),
]
OUTSIDE = "^(?!http://127.0.0.1)"


def abort(route):
    route.abort()


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def address():
    """Where docs/ is served, as `python -m http.server -d page` does."""
    handler = functools.partial(Quiet, directory=PAGE)
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


@pytest.fixture(scope="module")
def opened(browser, address):
    """A function that opens the page in a new tab, without a connection. routes: what handles
    some of its requests. Without any, no console may show an error."""
    said, contexts = [], []

    def call(routes=None, wait=True):
        context = browser.new_context(viewport={"width": 1280, "height": 900})
        context.set_default_timeout(120_000)
        contexts.append(context)
        for pattern, handle in ({OUTSIDE: abort} | (routes or {})).items():
            context.route(re.compile(pattern), handle)
        page = context.new_page()
        if not routes:
            page.on("console", lambda m: said.append(m.text) if m.type == "error" else None)
            page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(address)
        page.evaluate("window.recorded")
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
    version = json.loads((RUNTIME / "package.json").read_text("utf-8"))["version"]
    assert f"onnxruntime-web@{version}" == VERSION


@pytest.mark.parametrize("steps", [1, 2, 7, 999, 1000])
def test_respaced(steps, page):
    betas = np.linspace(1e-4, 0.02, 1000)
    theirs = page.evaluate(
        "async ([betas, steps]) => (await import('./sampler.js')).respaced(betas, steps)",
        [betas.tolist(), steps],
    )
    expected, tau = ddpm_numpy.respaced(betas, steps)
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


SAMPLE = """async ([noises, betas, {name, ...options}]) => {
    const {alphasBar, ...sampler} = await import('./sampler.js');
    // the exact eps of images ~ N(0, 0.3^2), made uneven by a sine
    const abar = alphasBar(betas), steps = [];
    const eps = (x, t) => x.map((value) =>
        Math.sqrt(1 - abar[t]) * (value + 0.1 * Math.sin(3 * value)) / (1 - 0.91 * abar[t]));
    const drawNoise = () => Float32Array.from(noises.shift());
    if (options.xT) options.xT = Float32Array.from(options.xT);
    const {known} = options;
    if (known) known.x0 = Float32Array.from(known.x0);
    for await (const {t, x, x0} of sampler[name](eps, drawNoise, betas, options)) {
        steps.push([t, Array.from(x), Array.from(x0)]);
    }
    return [steps, noises.length];
}"""


SHAPE, BETAS = (2, 1, 3, 3), np.linspace(1e-3, 0.2, 40)
NOISES = np.random.default_rng(0).standard_normal((82, *SHAPE)).astype(np.float32)


def smooth_eps(x, t):
    """The eps of SAMPLE."""
    a = (1 - BETAS).cumprod()[t[0]]
    return (np.sqrt(1 - a) * (x + 0.1 * np.sin(3 * x)) / (1 - 0.91 * a)).astype(np.float32)


def assert_steps_equal(page, options, expected, left, atol=1e-5):
    """Compare (t, x_t, x0_hat) of each step; `left` is what Python did not use of the noise."""
    flat = NOISES.reshape(len(NOISES), -1).tolist()
    theirs, unused = page.evaluate(SAMPLE, [flat, BETAS.tolist(), options])
    assert unused == len(list(left)) and len(theirs) == len(expected)
    for (t, x, x0), (their_t, their_x, their_x0) in zip(expected, theirs, strict=True):
        assert t == their_t
        np.testing.assert_allclose(their_x, x.ravel(), atol=atol)
        np.testing.assert_allclose(their_x0, x0.ravel(), atol=atol)


@pytest.mark.parametrize(
    "variance, steps, sampler, eta, continues",
    [
        ("large", None, None, None, False),
        ("small", None, "ddpm", None, True),
        ("large", 7, "ddpm", None, True),
        ("small", 7, "ddpm", None, False),
        ("large", 7, None, None, False),
        ("large", None, "dpm", None, True),
        ("small", 2, "dpm", None, True),
        ("large", 7, "ddim", None, False),
        ("small", 7, None, 0.5, True),
        ("large", None, "ddim", 1, False),
        ("small", 1, None, None, True),
        ("large", 1, "ddim", 1, False),
    ],
)
def test_reverse_process_is_that_of_sample_py(variance, steps, sampler, eta, continues, page):
    left, x_T = iter(NOISES), NOISES[-1] if continues else None
    expected = list(ddpm_numpy.sample_progressive(
        smooth_eps, lambda: next(left), BETAS, variance, steps, sampler, eta, x_T
    ))  # fmt: skip
    options = {"name": "sampleProgressive", "variance": variance, "sampler": sampler, "eta": eta}
    options |= {} if steps is None else {"steps": steps}
    options |= {"xT": x_T.ravel().tolist()} if continues else {}
    assert_steps_equal(page, options, expected, left)


@pytest.mark.parametrize("sampler", ["ddpm", "dpm"])
@pytest.mark.parametrize("steps", [7, 40])
def test_inpainting_is_that_of_sample_py(sampler, steps, page):
    left, mask = iter(NOISES), np.arange(18).reshape(SHAPE) % 3 == 0
    known = 0.3 * NOISES[-1], mask
    expected = list(ddpm_numpy.sample_progressive(
        smooth_eps, lambda: next(left), BETAS, "large", steps, sampler, known=known
    ))  # fmt: skip
    options = {"name": "sampleProgressive", "steps": steps, "sampler": sampler}
    options["known"] = {"x0": known[0].ravel().tolist(), "mask": mask.ravel().astype(int).tolist()}
    assert_steps_equal(page, options, expected, left)


@pytest.mark.parametrize("sampler", ["ddpm", "dpm"])
@pytest.mark.parametrize("change", ["none", "withoutZ", "clip", "short", "lastNoise"])
def test_changes_of_the_method(change, sampler, page):
    """Each change of the page, made in Python."""
    left, steps, abar = iter(NOISES), 8, (1 - BETAS).cumprod()
    betas, level, x_T = BETAS, np.arange(40), None
    if change == "clip":  # from far away, so that x0_hat leaves [-1, 1]
        x_T = 20 * NOISES[-1]
    draw = torch.from_numpy
    noise = lambda: draw(next(left))  # noqa: E731
    if change == "short":
        betas, steps = np.linspace(1e-3, 0.2, 4), 4
        level = np.abs(abar - (1 - betas).cumprod()[:, None]).argmin(1)
        assert level[-1] < 39
    if change == "withoutZ":
        noise = iter([noise()] + 40 * [torch.zeros(SHAPE)]).__next__
    chain = beyond.sample_progressive(Diffusion(torch.from_numpy(betas)),
        lambda x, t: draw(smooth_eps(x.numpy(), level[t])),
        SHAPE, steps, sampler, draw_noise=noise, clip=change != "clip",
        x_T=None if x_T is None else draw(x_T),
    )  # fmt: skip
    expected = [(level[t], x.numpy(), x0.numpy()) for t, x, x0 in chain]
    if change == "lastNoise":
        t, x, x0 = expected[-1]
        expected[-1] = t, x, x0 + (1 - abar[t]) ** 0.5 * next(left)
    options = {"name": "sampleChanged", "steps": 8, "sampler": sampler}
    if change == "clip":
        assert max(np.abs(x0).max() for _, _, x0 in expected) > 1.1
        options |= {"clip": False, "xT": x_T.ravel().tolist()}
    else:
        options[change] = True
    assert_steps_equal(page, options, expected, left, 5e-4 if change == "clip" else 1e-5)


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


EPS = """async ([content, x, times]) => {
    const {Network} = await import('./network.js');
    const bytes = Uint8Array.from(atob(content), (letter) => letter.charCodeAt(0));
    const runtime = './node_modules/onnxruntime-web/dist/ort.webgpu.bundle.min.mjs';
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
    path = PAGE / "fashion-mnist.onnx" if kind == "shipped" else files[0] / f"{kind}.onnx"
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    metadata = session.get_modelmeta().custom_metadata_map
    shape, times = (3, *json.loads(metadata["ddpm.image_shape"])), [0, 300, 999]
    x = np.random.default_rng(0).standard_normal(shape, np.float32)
    no_class = {"y": np.full(3, 10)} if kind == "shipped" else {}
    content = base64.b64encode(path.read_bytes()).decode()
    theirs = page.evaluate(EPS, [content, x.ravel().tolist(), times])
    for t, their_eps in zip(times, theirs["eps"], strict=True):
        (eps,) = session.run(["eps"], {"x_t": x, "t": np.full(3, t)} | no_class)
        if kind == "int8" and t:  # integer kernels round in another order, and some saturate
            error = np.square(their_eps - eps.ravel()).mean() / np.square(eps).mean()
            assert error**0.5 < TOLERANCE
        else:
            np.testing.assert_allclose(their_eps, eps.ravel(), atol=1e-4)
    np.testing.assert_allclose(theirs["alone"], theirs["eps"][0][: len(theirs["alone"])], atol=1e-4)
    assert theirs["metadata"] == metadata and theirs["shape"] == list(shape[1:])
    assert theirs["variance"] == metadata["ddpm.variance"]
    np.testing.assert_array_equal(theirs["betas"], json.loads(metadata["ddpm.betas"]))
    assert theirs["late"] == "the network was closed"


@pytest.mark.parametrize("t", [0, 50, 500, 999])
def test_closed_forms_of_points(t, page):
    """The field against docs/points.py, and the density against a sum of Gaussians."""
    diffusion, x = Diffusion(linear_betas()), np.random.default_rng(0).uniform(-2, 2, (50, 2))
    abar = diffusion.alphas_bar[t].item()
    eps, q = page.evaluate(
        """async ([x, abar, centres, std]) => {
            const {density, exactEps} = await import('./points.js');
            return [Array.from(exactEps(Float32Array.from(x), abar, centres, std)),
                    Array.from(density(24, abar, centres, std))];
        }""",
        [x.ravel().tolist(), abar, MEANS.ravel().tolist(), STD],
    )
    network = exact_network(diffusion, MEANS, std=STD)
    expected = network(torch.from_numpy(x).float()[..., None, None], torch.full((50,), t))
    np.testing.assert_allclose(eps, expected.ravel(), rtol=1e-4, atol=1e-5)
    ticks = 2.3 * (2 * (np.arange(24) + 0.5) / 24 - 1)
    places = np.stack(np.meshgrid(ticks, -ticks), -1)  # from the top left
    offsets = places[:, :, None] - abar**0.5 * MEANS.flatten(1).numpy()
    gaussians = np.exp(-(offsets**2).sum(-1) / (2 * (abar * STD**2 + 1 - abar)))
    np.testing.assert_allclose(q, gaussians.sum(-1).ravel(), rtol=1e-4, atol=1e-12)


# Algorithm 1 in JavaScript: a network of torch with the same parameters takes the same batches.

TRAIN = """async ([options, batches]) => {
    const {Trainer} = await import('./trainer.js'), trainer = new Trainer(options);
    const start = trainer.parameters.map((p) => Array.from(p)), taken = [];
    for (const {x0, noise, ...rest} of batches) {
        const batch = {x0: Float32Array.from(x0), noise: Float32Array.from(noise), ...rest};
        const {loss, gradient} = trainer.step(batch);
        taken.push([loss, gradient.map((g) => Array.from(g))]);
    }
    const {x0, t, y} = batches[0], x = Float32Array.from(x0);
    return [start, taken, trainer.parameters.map((p) => Array.from(p)),
            trainer.average.map((p) => Array.from(p)), Array.from(trainer.eps(x, t, y))];
}"""


def inputs_of(x_t, t, y, classes):
    """What the network of page/trainer.js reads."""
    x = x_t.flatten(1)
    waves = torch.cat([w * x for w in (3, 6, 12, 24)], 1)
    parts = [4 * x, waves.sin(), waves.cos(), timestep_embedding(t, 32)]
    if classes:
        parts.append(F.one_hot(torch.full_like(t, classes) if y is None else y, classes + 1))
    return torch.cat(parts, 1)


@pytest.mark.parametrize(
    "target, weights, classes",
    [("eps", "simple", 0), ("x0", "min-snr", 0), ("v", "vlb", 2), ("eps", "vlb", 2)],
)
def test_training_takes_the_steps_of_torch(target, weights, classes, page):
    """The loss, its gradient, Adam, the average, and eps of the averaged network."""
    random, steps = torch.Generator().manual_seed(0), 12
    batches = [
        {"x0": torch.randn(9, 2, 1, 1, generator=random) / 2,
         "t": torch.cat([torch.tensor([0, 1]), torch.randint(1000, (7,), generator=random)]),
         "noise": torch.randn(9, 2, 1, 1, generator=random),
         "y": torch.randint(3, (9,), generator=random) if classes else None}
        for _ in range(steps)
    ]  # fmt: skip
    plain = [
        {name: value if value is None else value.flatten().tolist() for name, value in b.items()}
        for b in batches
    ]
    options = {"width": 8, "classes": classes, "target": target, "weights": weights, "decay": 0.9}
    start, taken, last, average, eps = page.evaluate(TRAIN, [options, plain])
    n = len(start[0]) // 8
    shapes = [(n, 8), (8,), (8, 8), (8,), (8, 2), (2,)]
    tensors = [torch.tensor(p).float().view(s) for p, s in zip(start, shapes, strict=True)]
    assert tensors[0].std() > 0 and not tensors[4].any()
    parameters = [torch.nn.Parameter(p.clone()) for p in tensors]
    optimizer, mean = torch.optim.Adam(parameters, 8e-3), tensors
    diffusion = Diffusion(linear_betas())
    by_t = loss_weights(diffusion, weights, target)

    def network(x_t, t, y, parameters=parameters):
        W1, b1, W2, b2, W3, b3 = parameters
        h = F.silu(inputs_of(x_t, t, y, classes) @ W1 + b1)
        return (F.silu(h @ W2 + b2) @ W3 + b3)[..., None, None]

    for k, (batch, (loss, gradient)) in enumerate(zip(batches, taken, strict=True)):
        optimizer.param_groups[0]["lr"] = 8e-3 / (1 + k / 2000)
        optimizer.zero_grad()
        x0, t, noise, y = batch.values()
        net = as_eps(functools.partial(network, y=y), diffusion, target)
        ours = diffusion.loss(net, x0, t, noise, by_t)
        ours.backward()
        assert loss == pytest.approx(ours.item(), rel=1e-5)
        for p, g in zip(parameters, gradient, strict=True):
            scale = p.grad.abs().max().item() + 1e-12
            np.testing.assert_allclose(np.array(g) / scale, p.grad.ravel() / scale, atol=1e-5)
        optimizer.step()
        decay = min(0.9, (1 + k) / (10 + k))
        mean = [m + (1 - decay) * (p.detach() - m) for m, p in zip(mean, parameters, strict=True)]
    for theirs, p, m, q in zip(last, parameters, mean, average, strict=True):
        np.testing.assert_allclose(theirs, p.detach().ravel(), atol=1e-5)
        np.testing.assert_allclose(q, m.ravel(), atol=1e-5)
    x0, t, _, y = batches[0].values()
    with torch.no_grad():
        net = functools.partial(network, y=y, parameters=mean)
        expected = as_eps(net, diffusion, target)(x0, t)
    assert np.abs(np.array(eps) - expected.ravel().numpy()).max() < 1e-3 * expected.abs().max()


def test_batches_are_random_as_algorithm_1_has_them(page):
    x0, t, noise, y = page.evaluate(
        """async () => {
            const {draw} = await import('./trainer.js'), {uniform} = await import('./sampler.js');
            const points = Float32Array.of(-1, 0.5, 1, -0.5);
            const {x0, t, noise, y} = draw(points, 0.1, [0, 1], 20000, uniform(0, 0));
            return [Array.from(x0), t, Array.from(noise), y];
        }"""
    )
    x0, noise, t, y = np.reshape(x0, (-1, 2)), np.reshape(noise, (-1, 2)), np.array(t), np.array(y)
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


def first_noise(page, seed, count, size):
    """The noise that the page starts from, (count * size,)."""
    draw = "async (a) => Array.from((await import('./sampler.js')).noiseOf(...a)())"
    return np.array(page.evaluate(draw, [seed, count, size]), np.float32)


def test_shipped_model_draws_what_python_draws(page):
    page.select_option("#count", "4")
    page.fill("#seed", "3")
    page.click("#sample")
    assert "4 images: 10 steps in" in until_idle(page)
    network = ddpm_numpy.Network(PAGE / "fashion-mnist.onnx", "cpu")
    start = first_noise(page, 3, 4, math.prod(network.shape)).reshape(4, *network.shape)
    model = ddpm_numpy.guided(network, np.arange(4), 0)  # the classes in turn
    steps = list(ddpm_numpy.sample_progressive(model, lambda: start, network.betas, steps=10))
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


def set_value(page, name, value):
    """Move a slider, or tick a box, as a reader would."""
    key = "checked" if isinstance(value, bool) else "value"
    page.evaluate(
        """([name, key, value]) => {
            const element = document.getElementById(name);
            element[key] = value;
            for (const event of ["input", "change"]) element.dispatchEvent(new Event(event));
        }""",
        [name, key, value],
    )


def result(page):
    """What the section of the points says about the result of the chain."""
    set_value(page, "plane-t", -1)
    status = "document.getElementById('plane-status').textContent"
    page.wait_for_function(f"/others reach/.test({status})")
    said = page.text_content("#plane-status")
    return [int(number) for number in re.findall(r"(\d+) (?:of|step)", said)]


def test_network_learns_the_moons(opened):
    """Within a minute, the loss is below 1.2 times the floor, and most samples are on the data."""
    page = opened()
    assert "Not trained yet" in page.text_content("#learn-status")
    page.click("#learn-step")
    page.wait_for_function("/^Step 1:/.test(document.getElementById('learn-status').textContent)")
    page.evaluate("window.began = performance.now()")
    page.click("#learn-start")
    page.wait_for_function(
        """() => {
            const [, ratio, off] = document.getElementById('learn-status').textContent
                .match(/, ([0-9.]+) times the floor. (\\d+) of 200 samples .DDIM, 50/) ?? [];
            return Number(ratio) < 1.2 && Number(off) < 60;
        }"""
    )
    assert page.evaluate("performance.now() - window.began") < 100_000  # a minute, if undisturbed
    page.click("#learn-start")  # pause
    page.wait_for_timeout(500)
    said = page.text_content("#learn-status").split(":")[0]  # the samples may still change once
    page.wait_for_timeout(500)
    assert said == page.text_content("#learn-status").split(":")[0]
    for canvas in ("learn-batch", "learn-field", "learn-samples", "learn-loss", "learn-errors"):
        assert pixels(page, canvas).std() > 5, canvas
    # the plane of section 1 with the network in place of the formula
    set_value(page, "learn-use", True)
    steps, off, *_ = result(page)
    assert steps == 50 and off < 150
    set_value(page, "learn-use", False)
    assert result(page)[1] < off


def test_changes_of_the_training(page, tmp_path):
    set_value(page, "learn-data", "10")
    assert "Ten points" in page.text_content("#learn-hint")
    set_value(page, "learn-weights", "vlb")
    set_value(page, "learn-target", "v")
    page.click("#learn-step")
    page.wait_for_function("/^Step 1:/.test(document.getElementById('learn-status').textContent)")
    assert not page.is_visible("#learn-guidance")
    page.select_option("#plane-data", "two moons, two classes")
    assert page.is_visible("#learn-guidance")
    page.click("#learn-step")
    page.click("#learn-python summary")
    page.wait_for_function("document.getElementById('learn-code').textContent")
    code = page.text_content("#learn-code")
    assert '"vlb", "v"' in code and len(re.findall(r"\[-?0\.", code)) == 10
    script = code.replace("steps=1000", "steps=3").replace("1000, 2", "10, 2")
    points, there = (HERE / "docs" / "points.py").read_text("utf-8"), str(HERE / "docs")
    points = points.replace("HERE = Path(__file__).parent", f"HERE = Path({there!r})")
    (tmp_path / "points.py").write_text(points, "utf-8")
    (tmp_path / "run.py").write_text(script, "utf-8")
    python("run.py", cwd=tmp_path)
    assert Image.open(tmp_path / "samples.png").width > 100
    page.click("#learn-python summary")
    for name, value in (("data", "all"), ("weights", "simple"), ("target", "eps")):
        set_value(page, f"learn-{name}", value)
    page.select_option("#plane-data", "two moons")


def test_points_in_the_plane(page):
    page.wait_for_function("document.getElementById('plane-play').textContent == 'Play'")
    steps, off, reached = result(page)
    assert steps == 50 and off < 20 and reached > 100
    page.select_option("#plane-steps", "10")
    assert result(page)[0] == 10 and result(page)[1] > 100
    # without z, Algorithm 2 ends at very few of the data; T = 100 shifts the shares
    page.select_option("#plane-sampler", "ddpm")
    page.select_option("#plane-steps", "200")
    assert result(page)[2] > 100
    set_value(page, "withoutZ", True)
    assert result(page)[2] < 30 and "Without z" in page.text_content("#plane-change")
    set_value(page, "withoutZ", False)
    set_value(page, "short", True)
    assert result(page)[0] == 100
    set_value(page, "short", False)
    # the buttons go through the states, and back
    set_value(page, "plane-t", 999)
    page.click("#plane-next")
    assert page.text_content("#plane-at") == "t = 994"
    page.click("#plane-back")
    assert page.text_content("#plane-at") == "t = 999"
    before = pixels(page, "plane")
    page.click("#plane-play")
    assert page.text_content("#plane-status") == "Sampling …"
    page.wait_for_function("document.getElementById('plane-t').value < 500")
    page.click("#plane-play")
    assert re.fullmatch(r"Stopped at t = \d+\.", page.text_content("#plane-status"))
    assert (pixels(page, "plane") != before).mean() > 0.1


def test_points_that_are_drawn(page):
    page.locator("#plane").scroll_into_view_if_needed()
    page.select_option("#plane-data", "own")
    assert page.input_value("#plane-mode") == "data"
    box = page.locator("#plane").bounding_box()
    centre = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(*centre)
    page.mouse.down()
    page.mouse.move(centre[0] + 40, centre[1], steps=3)
    page.mouse.up()
    page.focus("#plane")
    page.keyboard.press("ArrowUp")
    page.keyboard.press(" ")
    set_value(page, "plane-t", -1)
    page.wait_for_function("/ 5 data/.test(document.getElementById('plane-status').textContent)")
    # a path of its own begins where the reader clicks
    page.select_option("#plane-mode", "start")
    page.select_option("#plane-sampler", "ddim")
    page.mouse.click(centre[0] - 150, centre[1] + 100)
    page.wait_for_function("document.getElementById('plane-play').textContent == 'Play'")
    colours = pixels(page, "plane").reshape(3, -1).T.tolist()
    assert [11, 114, 133] in colours  # the second colour of the paths
    page.select_option("#plane-data", "two moons")


def test_recording_is_algorithm_2_from_the_noise_of_the_page(opened, page):
    """Before anybody clicks, the page shows the end of the recording."""
    fresh, network = opened(), ddpm_numpy.Network(PAGE / "fashion-mnist.onnx", "cpu")
    assert fresh.text_content("#at") == "26 of 26" and fresh.text_content("#number-t") == "0"
    size = math.prod(network.shape)
    for seed in (0, 5 * 2**32 + 7):
        theirs = first_noise(page, seed, 2, size).reshape(2, size)
        np.testing.assert_allclose(theirs[1], page_noise(seed, 1, size), atol=1e-6)
    assert tiles(fresh, "grid", network.shape).std() > 40
    set_value(fresh, "step", 0)
    x = first_noise(page, 0, 16, size).reshape(16, *network.shape)
    assert np.abs(tiles(fresh, "noise", network.shape) - to_pixels(x)).max() <= 1
    model = ddpm_numpy.guided(network, np.arange(16) % max(1, len(network.classes)), 0)
    _, _, x0 = next(ddpm_numpy.sample_progressive(model, lambda: x, network.betas))
    assert np.abs(tiles(fresh, "grid", network.shape) - to_pixels(x0)).max() <= 1


def test_runs_side_by_side(opened):
    """A run is compared with the recording, then with the one before, at the same t."""
    page = opened()
    page.click("#sample")
    assert "16 images: 10 steps in" in until_idle(page)
    assert "recorded), at t = 0" in page.text_content("#other-at")  # both results
    set_value(page, "step", 3)
    assert "recorded), at t = 719" in page.text_content("#other-at")  # closest to 699
    set_value(page, "step", 9)
    shape = (1, 32, 32)
    own, other = (tiles(page, name, shape).astype(int) for name in ("grid", "other-grid"))
    assert np.abs(tiles(page, "difference", shape) - (128 + (own - other) / 2)).max() <= 1
    assert np.abs(own - other).mean() > 2
    set_value(page, "image-lastNoise", True)  # samples again
    page.wait_for_function("document.getElementById('status').textContent.includes('10 steps in')")
    until_idle(page)
    page.select_option("#other", label="DPM-Solver++, 10 steps, all in turn")
    noise = tiles(page, "grid", shape).astype(int) - tiles(page, "other-grid", shape)
    inner = (own > 90) & (own < 165)  # where the noise of 0.32 is not cut
    assert 25 < noise[inner].std() < 50 and "grain" in page.text_content("#image-change")


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
    assert "Four results from t = 30: 31 steps" in until_idle(page)
    ends = tiles(page, "ends", (1, 32, 32))[:, 0]
    assert np.abs(ends - grey).mean() < 15 and np.abs(ends[0] - ends[1]).mean() > 0.5


def test_marked_part_of_a_drawing_is_redrawn(page):
    page.select_option("#brush", "mask")
    page.locator("#draw").scroll_into_view_if_needed()
    assert page.text_content("#t-value") == page.get_attribute("#t", "max")
    box = page.locator("#draw").bounding_box()
    page.mouse.move(box["x"] + 0.1 * box["width"], box["y"] + 0.2 * box["height"])
    page.mouse.down()
    page.mouse.move(box["x"] + 0.9 * box["width"], box["y"] + 0.2 * box["height"])
    page.mouse.up()
    page.click("#denoise")
    assert "Four completions from t = 999: 50 steps" in until_idle(page)
    drawn, ends = pixels(page, "draw")[0], tiles(page, "ends", (1, 32, 32))[:, 0]
    grey = np.tensordot([0.299, 0.587, 0.114], pixels(page, "draw"), 1)
    changed = (np.abs(ends - grey) > 1).any(0)
    assert 40 < changed.sum() < 200 and changed.nonzero()[0].max() < 12, drawn
    page.click("#unmark")
    page.select_option("#brush", "draw")


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


def test_network_trained_with_quick_draws(opened, image_folder, tmp_path, run):
    """From the folder of images to the page: it predicts v, and the file is the one of today."""
    words = ["--data", image_folder, "--image-size", 8, "--channel-mults", 1, 2, "--quick"]
    run("train.py", *words, "--steps", 5, "--batch", 8, cwd=tmp_path)
    run("export.py", cwd=tmp_path)
    page = opened()
    assert "Ready. model.onnx" in choose(page, tmp_path / "model.onnx")
    page.select_option("#steps", "10")
    page.select_option("#count", "4")
    page.click("#sample")
    assert "4 images: 10 steps in" in until_idle(page)
    network = ddpm_numpy.Network(tmp_path / "model.onnx", "cpu")
    start = first_noise(page, 0, 4, math.prod(network.shape)).reshape(4, *network.shape)
    chain = ddpm_numpy.sample_progressive(network, lambda: start, network.betas, steps=10)
    *_, (_, _, x0) = chain
    assert np.abs(tiles(page, "grid", network.shape) - to_pixels(x0)).max() <= 1


def test_changes_during_a_pass_start_one_more(opened):
    """As with an arrow key that is held on w: the last change counts."""
    page = opened()
    page.select_option("#count", "4")
    page.select_option("#steps", "50")
    page.click("#sample")
    page.wait_for_function("!document.getElementById('stop').disabled")
    for w in ("0.5", "1", "1.5", "2"):
        set_value(page, "w", w)
    page.wait_for_function("document.getElementById('status').textContent.includes('50 steps in')")
    assert until_idle(page).startswith("4 images: 50 steps in")
    set_value(page, "w", "2.5")
    until_idle(page)
    names = page.eval_on_selector_all("#other option", "all => all.map((one) => one.text)")
    assert [name for name in names if "w = " in name] == [
        "DPM-Solver++, 50 steps, all in turn, w = 2"
    ]


def test_training_has_one_loop(opened):
    """Start, pause, start, while the loop waits between its first steps."""
    page = opened(wait=False)
    for _ in range(3):
        page.click("#learn-start")
    page.wait_for_timeout(4000)
    page.click("#learn-start")
    steps = int(re.search(r"Step (\d+)", page.text_content("#learn-status"))[1])
    assert 3 <= steps <= 6  # the first ones take 0.9 s each


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
        assert said.startswith(f"{name} is not a model from export.py") and what in said
        assert page.get_attribute("#status", "class") == "error"
        assert said.endswith(" fashion-mnist.onnx still draws.")
        assert page.text_content("#refused") == said
    page.select_option("#steps", "10")
    page.select_option("#count", "4")
    page.select_option("#sampler", "ddim")
    page.click("#sample")  # the model before is still there
    assert "10 steps in" in until_idle(page)
    page.select_option("#steps", "1000")
    page.click("#sample")  # stops when another model is opened, without a word
    assert "Ready. None.onnx" in choose(page, files[0] / "None.onnx")
    assert page.get_attribute("#status", "class") == "" and page.is_enabled("#sample")
    assert page.text_content("#refused") == ""
    page.select_option("#steps", "10")
    about = page.text_content("#about")
    assert "8\u00d78, colour" in about and "small" in about and "a test" in about
    page.click("#sample")
    assert "10 steps in" in until_idle(page)
    drawn = tiles(page, "grid", (3, 8, 8))
    assert drawn.shape == (4, 3, 8, 8) and np.ptp(drawn, axis=1).max() > 50  # in colour
    page.click("#denoise")
    assert "steps in" in until_idle(page)


def test_classes_and_guidance(files, page):
    """Of the included network, after one without classes."""
    assert "Ready. None.onnx" in choose(page, files[0] / "None.onnx")
    assert page.locator("#class").is_hidden() and page.locator("#w").is_hidden()
    assert "Ready. fashion-mnist.onnx" in choose(page, PAGE / "fashion-mnist.onnx")
    page.select_option("#steps", "10")
    page.select_option("#sampler", "dpm")
    page.select_option("#count", "4")
    page.fill("#seed", "3")
    page.select_option("#class", label="trouser")
    page.click("#sample")
    assert "4 images: 10 steps in" in until_idle(page)
    network = ddpm_numpy.Network(PAGE / "fashion-mnist.onnx", "cpu")
    trouser, n = network.classes.index("trouser"), len(network.classes)
    start = first_noise(page, 3, 4, math.prod(network.shape)).reshape(4, *network.shape)

    def drawn(y, w):
        eps = ddpm_numpy.guided(network, np.array(y), w)
        (*_, (_, _, x0)) = ddpm_numpy.sample_progressive(
            eps, lambda: start, network.betas, steps=10
        )
        return to_pixels(x0)

    assert np.abs(tiles(page, "grid", network.shape) - drawn([trouser] * 4, 0)).max() <= 1
    # both controls sample again, from the same noise
    set_value(page, "w", 2)
    page.wait_for_function("document.getElementById('status').textContent.includes('10 steps')")
    until_idle(page)
    assert page.text_content("#w-value") == "2"
    assert np.abs(tiles(page, "grid", network.shape) - drawn([trouser] * 4, 2)).max() <= 1
    for label, y in (("all in turn", [0, 1, 2, 3]), ("no class", [n] * 4)):
        page.select_option("#class", label=label)
        until_idle(page)
        assert np.abs(tiles(page, "grid", network.shape) - drawn(y, 2)).max() <= 1
    set_value(page, "t", 990)
    page.select_option("#end-class", label="trouser")
    page.click("#denoise")
    assert "Four results" in until_idle(page)
    ends = tiles(page, "ends", network.shape)
    assert ends[..., :4].mean() < 20 and ends[..., 10:22].mean() > 60  # narrow, and in the middle


def test_a_seed_that_is_none(page):
    page.fill("#seed", "-1")
    page.click("#sample")
    assert "whole number" in page.text_content("#status")
    page.fill("#seed", "0")


STATUSES = {
    "plane-status": "plane plane-play plane-steps withoutZ",
    "learn-status": "learn-start learn-target learn-samples learn-average learn-loss",
    "status": "sample grid step denoise ends model",
}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_layout(width, scheme, page):
    page.set_viewport_size({"width": width, "height": 660})
    page.emulate_media(color_scheme=scheme)
    page.click("#sample")  # there is a run to compare with, which has a long name
    until_idle(page)
    assert page.evaluate("document.scrollingElement.scrollWidth") <= width
    brightness = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (int(re.findall(r"\d+", brightness)[0]) > 128) == (scheme == "light")
    boxes = [page.locator(f"#{name}").bounding_box() for name in ("noise", "grid")]
    assert boxes[0]["y"] == boxes[1]["y"] and boxes[0]["width"] >= 130  # side by side
    unnamed = """[...document.querySelectorAll('input, select, button')]
        .filter((element) => !element.labels?.length && !element.textContent.trim())"""
    assert page.evaluate(f"{unnamed}.length") == 0
    # whoever uses a control, or looks at its plot, sees what the status says
    for status, controls in STATUSES.items():
        for control in controls.split():
            page.locator(f"#{control}").evaluate("e => e.scrollIntoView({block: 'center'})")
            box = page.locator(f"#{status}").bounding_box()
            assert 0 <= box["y"] < box["y"] + box["height"] <= 660, control
    page.click("[href='#images']")  # whose title the status does not cover
    box = page.locator("#status").bounding_box()
    assert box["y"] + box["height"] <= page.locator("#title-sample").bounding_box()["y"]


def test_nothing_moves_where_the_reader_prefers_so(opened):
    page = opened(wait=False)
    page.emulate_media(reduced_motion="reduce")
    page.reload()
    page.evaluate("window.recorded")
    assert page.input_value("#plane-t") == "999"
    assert page.text_content("#plane-play") == "Play"
    assert "Press Play" in page.text_content("#plane-status")
    assert np.array_equal(pixels(page, "hero"), pixels(page, "grid"))  # the end of the recording


def test_without_a_connection(opened):
    page = opened({"/node_modules/": abort}, wait=False)
    assert page.evaluate("window.ready") is False
    said = page.text_content("#status")
    assert "Sections 1 and 2 work in full" in said and said.endswith(INSTALL)
    page.click("#learn-step")
    page.wait_for_function("/^Step 1:/.test(document.getElementById('learn-status').textContent)")


@pytest.mark.parametrize("copy", [True, False])
def test_onnxruntime_comes_from_beside_the_page_or_from_jsdelivr(copy, opened):
    asked = []

    def outside(route):
        folder, name = route.request.url.rsplit("/", 1)
        asked.append(folder)
        route.fulfill(path=RUNTIME / "dist" / name, headers={"Access-Control-Allow-Origin": "*"})

    missing = {} if copy else {"/node_modules/": lambda route: route.fulfill(status=404)}
    assert "Ready." in opened({OUTSIDE: outside} | missing).text_content("#status")
    assert {*asked} == (set() if copy else {f"https://cdn.jsdelivr.net/npm/{VERSION}/dist"})


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
