"""The page page/index.html, in a real browser: its numbers are Python's, its promises hold."""

import base64
import io
import json
import re

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
from images import to_pixels
from samplers import Chain
from support.demo import are_right
from support.reduced import MAX_ERROR
from support.trained import load

pytest.importorskip("playwright", reason="the page's tests need playwright")
from docs.record_page import CHROMIUM, browser_and_address

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
        page.goto(address)
        if wait:
            page.evaluate("window.recorded")
        return page

    with browser_and_address() as (browser, address):
        yield call
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
    return until(page, status, "steps? in|Stopped|fail")


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
    chain = Chain(betas, "large", steps)
    np.testing.assert_array_equal(theirs["tau"], chain.tau)
    np.testing.assert_allclose(theirs["betas"], chain.betas, rtol=1e-9)


SAMPLE = """async (noises, betas, options) => {
    // the exact eps of images ~ N(0, 0.3^2), made uneven by a sine
    const abar = sampler.alphasBar(betas), steps = [];
    const eps = (x, t) => x.map((value) =>
        Math.sqrt(1 - abar[t]) * (value + 0.1 * Math.sin(3 * value)) / (1 - 0.91 * abar[t]));
    const draw = () => noises.shift();
    for await (const {t, x, x0} of sampler.sampleProgressive(eps, draw, betas, options)) {
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


def assert_steps_equal(page, options, expected, left):
    """Compare (t, x_t, x0_hat) of each step; `left` is what Python did not use of the noise."""
    expected = list(expected)
    theirs, unused = js(page, SAMPLE, list(NOISES), BETAS, options)
    assert unused == len(list(left))
    for (t, x, x0), (their_t, their_x, their_x0) in zip(expected, theirs, strict=True):
        assert t == their_t
        np.testing.assert_allclose(their_x, x.ravel(), atol=1e-5)
        np.testing.assert_allclose(their_x0, x0.ravel(), atol=1e-5)


@pytest.mark.parametrize("variance, steps, sampler, given", [
    ("large", 40, "ddpm", ""), ("small", 40, "ddpm", "x_T"), ("large", 7, "ddpm", "x_T"),
    ("small", 7, "ddpm", ""), ("large", 1, "ddpm", ""), ("large", 7, "sa-solver", ""),
    ("large", 40, "sa-solver", "x_T"), ("small", 2, "sa-solver", "x_T"), ("large", 7, "ddim", ""),
    ("small", 40, "ddim", "x_T"), ("small", 1, "ddim", "x_T"),
])  # fmt: skip
def test_reverse_process_is_that_of_sample_py(variance, steps, sampler, given, page):
    left, options = iter(NOISES), {"variance": variance, "steps": steps, "sampler": sampler}
    x_T = NOISES[-1] if given else None
    draw = lambda: next(left)  # noqa: E731
    expected = ddpm_numpy.sample_progressive(smooth_eps, draw, BETAS, **options, x_T=x_T)
    assert_steps_equal(page, options | {"xT": x_T}, expected, left)


@pytest.mark.parametrize("variance", ["large", "small"])
def test_algorithm_2_without_its_noise(variance, page):
    """After x_T, which is noise, every z is 0."""
    left, answers = iter(NOISES), 0

    def draw():
        nonlocal answers
        answers += 1
        return next(left) * (answers == 1)

    options = {"variance": variance, "steps": 8, "sampler": "ddpm"}
    expected = ddpm_numpy.sample_progressive(smooth_eps, draw, BETAS, **options)
    assert_steps_equal(page, options | {"sampler": "no-noise"}, expected, left)


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


TRAIN = """(batches, levels) => {
    const learner = new trainer.Trainer(), start = learner.parameters.map((p) => p.slice());
    const steps = batches.map((batch) => learner.step(batch)), [{x0}] = batches;
    const eps = levels.map((t) => learner.eps(x0, t));
    return [start, steps, learner.parameters, learner.average, eps];
}"""


def test_training_takes_the_steps_of_torch(page):
    """Algorithm 1: the loss, its gradient, Adam, the average, and eps of the averaged network."""
    torch.manual_seed(0)
    batches = [
        {"x0": torch.randn(9, 2, 1, 1) / 2, "noise": torch.randn(9, 2, 1, 1),
         "t": torch.cat([torch.tensor([0, 1]), torch.randint(1000, (7,))])}
        for _ in range(12)
    ]  # fmt: skip
    levels = [0, 30, 999]
    start, taken, last, average, eps = js(page, TRAIN, batches, levels)
    width = len(start[1])
    shapes = [(-1, width), (width,), (width, width), (width,), (width, 2), (2,)]
    mean = [torch.tensor(p).float().view(s) for p, s in zip(start, shapes, strict=True)]
    assert mean[0].std() > 0 and not mean[4].any()
    parameters = [torch.nn.Parameter(p.clone()) for p in mean]
    optimizer, diffusion = torch.optim.Adam(parameters, 0.012), Diffusion(linear_betas())

    def eps_of(parameters):
        def network(x_t, t):
            x, (W1, b1, W2, b2, W3, b3) = x_t.flatten(1), parameters
            waves = torch.cat([w * x for w in (3, 6, 12, 24)], 1)
            abar = diffusion.alphas_bar[t, None]
            angles = 0.15 * torch.arange(1, 9) * (abar / (1 - abar)).log().float() / 2
            inputs = [4 * x, waves.sin(), waves.cos(), angles.sin(), angles.cos()]
            h = F.silu(torch.cat(inputs, 1) @ W1 + b1)
            return (F.silu(h @ W2 + b2) @ W3 + b3)[..., None, None]

        return beyond.as_eps(network, diffusion, "v")

    for k, (batch, theirs) in enumerate(zip(batches, taken, strict=True)):
        optimizer.param_groups[0]["lr"] = 0.012 / (1 + k / 1000)
        optimizer.zero_grad()
        x0, noise, t = batch.values()
        ours = diffusion.loss(eps_of(parameters), x0, t, noise)
        ours.backward()
        assert theirs["loss"] == pytest.approx(ours.item(), rel=1e-5)
        for p, g in zip(parameters, theirs["gradient"], strict=True):
            scale = p.grad.abs().max().item() + 1e-12
            np.testing.assert_allclose(np.array(g) / scale, p.grad.ravel() / scale, atol=1e-5)
        optimizer.step()
        decay = (1 + k) / (10 + k)  # that of the first steps
        mean = [m + (1 - decay) * (p.detach() - m) for m, p in zip(mean, parameters, strict=True)]
    for theirs, p, m, q in zip(last, parameters, mean, average, strict=True):
        np.testing.assert_allclose(theirs, p.detach().ravel(), atol=1e-5)
        np.testing.assert_allclose(q, m.ravel(), atol=1e-5)
    x0 = batches[0]["x0"]
    for t, theirs in zip(levels, eps, strict=True):
        expected = eps_of(mean)(x0, torch.full((9,), t)).ravel()
        assert np.abs(np.array(theirs) - expected.numpy()).max() < 1e-3 * expected.abs().max()


def test_batches_are_random_as_algorithm_1_has_them(page):
    draw = "() => trainer.draw([-1, 0.5, 1, -0.5], 0.1, 20000, sampler.uniform(0, 0))"
    x0, t, noise = map(np.array, js(page, draw).values())
    x0, noise = x0.reshape(-1, 2), noise.reshape(-1, 2)
    second = x0[:, 0] > 0
    assert np.mean(second) == pytest.approx(0.5, abs=0.015)
    offsets = x0 - np.where(second[:, None], [1, -0.5], [-1, 0.5])
    for z in (noise, offsets / 0.1):
        assert np.abs(z.mean(0)).max() < 0.03 and np.abs(np.cov(z.T) - np.eye(2)).max() < 0.04
        assert (z**4).mean() == pytest.approx(3, abs=0.2)
    assert np.abs(np.corrcoef(noise.T, offsets.T)[:2, 2:]).max() < 0.03
    assert set(range(1000)) == {*t} and np.abs(np.histogram(t, 10)[0] - 2000).max() < 200


# ------------------------------------------------------------------------------------- its promises


def test_noise_of_make_figures_is_that_of_the_page(page):
    for seed in (0, 5 * 2**32 + 7):
        theirs = noise_of(page, seed, (2, 1024))[0, 1]
        np.testing.assert_allclose(theirs, page_noise(seed, 1, 1024), atol=1e-6)


def see_images(page):
    """Scroll to section 3 from the top. Returns its status a little later, if nothing runs."""
    for name in ("scene", "grid"):
        page.evaluate(f"document.getElementById('{name}').scrollIntoView()")
        page.wait_for_timeout(700)
    return page.text_content("#status") if page.is_disabled("#stop") else "busy"


def test_first_images_are_drawn_once_when_they_are_seen(opened):
    """But not where the reader prefers no motion, or was faster."""
    page = opened(motion="no-preference")
    until(page, "status", "^Ready")
    page.wait_for_timeout(700)
    assert page.text_content("#status") == "Ready."
    see_images(page)
    assert "16 images: 10 steps in" in until_idle(page)
    page.evaluate("document.getElementById('status').textContent = 'idle'")
    assert see_images(page) == "idle"
    page = opened(motion="no-preference")
    until(page, "status", "^Ready")
    set_value(page, "image-steps", 5)
    assert see_images(page) == "Ready."
    page = opened()
    until(page, "status", "^Ready")
    assert "Not trained yet" in page.text_content("#learn-status")
    assert see_images(page) == "Ready."


def test_owner_is_free_again_after_a_task_that_throws(page):
    """And of three starts at the same time, the first and the last one run, one after the other.

    One that waits while another throws runs, too.
    """
    code = """async () => {
        const { Owner } = await import("./common.js"), owner = new Owner(), said = [];
        const task = (name) => async (run) => {
            said.push(name);
            while (!run.stopped && name !== "c") await new Promise((r) => setTimeout(r, 5));
            said.push(name);
        };
        owner.start(task("a"));
        await new Promise((r) => setTimeout(r, 20));
        await Promise.all([owner.start(task("b")), owner.start(task("c"))]);
        const wrong = owner.start(async () => { throw new Error("wrong"); });
        await wrong.catch((error) => said.push(error.message));
        const wait = (ms) => new Promise((resolve) => setTimeout(resolve, ms));
        const late = owner.start(async () => { await wait(20); throw new Error("late"); });
        late.catch(() => {});
        await wait(5);
        await owner.start(async () => said.push("d"));
        return [...said, owner.busy];
    }"""
    assert page.evaluate(code) == ["a", "a", "c", "c", "wrong", "d", False]


def test_network_that_fails_is_said_and_leaves_the_picture(page):
    """Where it has come to; the points go on."""
    code = """async () => {
        const { Passage } = await import("./passage.js"), said = [], x = new Float32Array(4);
        const eps = async (_, t) => { if (t < 500) throw new Error("full"); return x; };
        const changed = (error) => said.push(error?.message);
        const picture = new Passage(eps, { sampler: "ddim", steps: 4 }, changed);
        picture.begin(x, x);
        picture.sendBack(1);
        for (let k = 0; k < 100 && !said.includes("full"); k++) {
            await new Promise((resolve) => setTimeout(resolve, 9));
        }
        return [said.at(-1), picture.isComplete, picture.steps.length, picture.at(0).level];
    }"""
    assert page.evaluate(code) == ["full", True, 2, 499]


# ---- the opening scene


def scene(page, code):
    """What an expression with the opening scene of the page gives; arrays become lists."""
    return page.evaluate(
        f"""async () => {{
            const {{ scene }} = await import("./opening.js"), value = await ({code});
            return ArrayBuffer.isView(value) ? Array.from(value) : value;
        }}"""
    )


def until_complete(page):
    """Wait until the network has drawn its picture."""
    while not scene(page, "scene.isComplete"):
        page.wait_for_timeout(300)


def points_at(page, place):
    return np.array(scene(page, f"scene.points.at({place}).x")).reshape(-1, 2)


def test_scene_moves_at_once_and_until_it_is_touched(opened):
    """It needs neither the recording nor a network to begin; a touch ends the repetition."""
    missing = dict.fromkeys([OUTSIDE, "onnx", "recorded"], lambda route: route.abort())
    page = opened(missing, motion="no-preference", wait=False)
    page.wait_for_function("document.getElementById('scene-place').value > 0", timeout=10_000)
    page.focus("#scene-place")
    at = page.input_value("#scene-place")
    page.wait_for_timeout(1000)
    assert page.input_value("#scene-place") == at
    scene(page, "scene.moveTo(1)")
    page.click("#scene-many")
    assert page.text_content("#scene-title") == "Back in many steps"
    for name, moves in (("Pause", False), ("Play", True)):
        page.get_by_role("button", name=name, exact=True).first.click()
        at = page.input_value("#scene-place")
        page.wait_for_timeout(500)
        assert (page.input_value("#scene-place") != at) == moves


def test_nothing_moves_where_the_reader_prefers_so(opened):
    page = opened()
    page.wait_for_timeout(2500)
    assert page.input_value("#scene-place") == "0"
    assert page.input_value("#arrows-place") == "600"
    assert page.text_content("#arrows-status").startswith("It may have come from almost any")


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
    picture = lambda place: np.array(scene(page, f"scene.passages[1].at({place}).x"))  # noqa: E731
    assert np.std(picture(1)) == pytest.approx(1, abs=0.05)
    assert np.corrcoef(picture(0), picture(0.2))[0, 1] > 0.9
    # letting go of the slider sends them back, and the slider shows the way
    scene(page, "scene.moveTo(1), scene.sendBack('many'), scene.stop()")
    until_complete(page)
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
    # the network draws the picture that it draws in Python; in one jump, its estimate
    network, (x,) = ddpm_numpy.Network(SHIPPED, "cpu"), (picture(1).reshape(1, 1, 32, 32),)
    model = ddpm_numpy.guided(network, np.array([len(network.classes)]), 0)
    draw = lambda: x.astype(np.float32)  # noqa: E731
    steps = list(
        ddpm_numpy.sample_progressive(model, draw, network.betas, steps=40, sampler="ddim")
    )
    np.testing.assert_allclose(picture(0), steps[-1][2].ravel(), atol=2e-2)
    scene(page, "scene.moveTo(0), scene.moveTo(0.999), scene.moveTo(1)")  # with fresh noise
    assert abs(np.corrcoef(points_at(page, 1).ravel(), noise.ravel())[0, 1]) < 0.3
    (x,) = (picture(1).reshape(1, 1, 32, 32),)
    scene(page, "scene.sendBack('one'), scene.stop()")
    until_complete(page)
    assert np.abs(points_at(page, 0) - data.mean(0)).max() < 0.05
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


def test_picture_waits_for_the_network(page):
    """On the way back, nothing is shown that no step has reached."""
    code = """async () => {
        const { Passage } = await import("./passage.js"), answers = [];
        const eps = (x) => new Promise((resolve) => answers.push(() => resolve(x)));
        const passage = new Passage(eps, { sampler: "ddim", steps: 4 }, () => {});
        const wait = () => new Promise((resolve) => setTimeout(resolve, 20));
        passage.begin(Float32Array.of(0.5), Float32Array.of(1));
        passage.sendBack(1);
        const shown = [];
        for (let k = 0; k < 5; k++) {
            await wait();
            shown.push([Math.round(passage.at(0).level), passage.isComplete]);
            answers.shift()?.();
        }
        return shown;
    }"""
    waits = [[999, False], [749, False], [499, False], [249, False], [-1, True]]
    assert page.evaluate(code) == waits


def test_way_back_after_an_interrupted_jump(page):
    """In the middle of a jump, a point has another amount of noise than its place says."""
    data = points_at(page, 0)
    scene(page, "scene.moveTo(0.01), scene.moveTo(1), scene.sendBack('one'), scene.moveTo(0.4)")
    scene(page, "scene.press('many'), scene.stop()")
    assert page.input_value("#scene-place") == "1000"
    until_complete(page)
    distance = np.linalg.norm(points_at(page, 0)[:, None] - data, axis=-1)
    assert (distance.min(1) < 3 * STD).mean() > 0.9
    # from little noise, nothing new comes back, and the caption does not say so
    for place, words in ((1, "new data, and a new picture"), (0.1, "near to where they were")):
        scene(page, f"scene.moveTo(0), scene.moveTo({place}), scene.sendBack('many')")
        scene(page, "scene.moveTo(0), scene.stop()")
        assert words in page.text_content("#scene-text")


def test_going_back_shows_what_the_controls_say(opened):
    """A browser restores controls, but not what they have changed."""
    page = opened()
    for name, value in (("data", "a ring"), ("sampler", "ddpm"), ("straight", True)):
        set_value(page, f"arrows-{name}", value)
    set_value(page, "image-steps", 50)
    address = page.url
    page.goto(address + "page.css")
    page.go_back()
    page.wait_for_function("document.querySelectorAll('#arrows-data option').length > 2")
    state = [page.input_value(f"#arrows-{name}") for name in ("data", "sampler", "place")]
    assert state == ["two moons", "ddim", "600"] and not page.is_checked("#arrows-straight")
    assert "of the 240 data points" in page.text_content("#arrows-status")


def result(page, sampler="ddim", steps=50):
    """What section 1 says of a way back from the noise: steps, and how many percent miss."""
    set_value(page, "arrows-sampler", sampler)
    set_value(page, "arrows-steps", str(steps))
    set_value(page, "arrows-place", 1000)
    page.click("#arrows-many")
    set_value(page, "arrows-place", 0)
    said = until(page, "arrows-status", "the points miss")
    return [int(n) for n in re.match(r"(\d+) steps?[^:]*: (\d+) %", said).groups()]


def arrows_at(page, place):
    """The points of section 1 at a place."""
    code = "import('./arrows.js').then(({ scene }) => Array.from(scene.points.at(place).x))"
    return np.array(page.evaluate(f"(place) => {code}", place)).reshape(-1, 2)


def test_points_in_the_plane(page):
    assert result(page)[0] == 50 and result(page)[1] < 7
    assert "good" in page.text_content("#arrows-status")
    steps, share = result(page, steps=1)
    assert steps == 1 and share > 80 and "1 step: " in page.text_content("#arrows-status")
    # without its noise, Algorithm 2 ends at very few of the data
    ends = []
    for sampler in ("ddpm", "no-noise"):
        assert result(page, sampler, 200)[1] < 7
        ends.append(arrows_at(page, 0))
    spread = [len(set(map(tuple, x.round(1)))) for x in ends]
    assert spread[0] > 40 and spread[1] < 20
    # a change of the steps takes the same way back again, and shows it at the same place
    result(page)
    set_value(page, "arrows-place", 300)
    before = arrows_at(page, 0.3)
    set_value(page, "arrows-steps", "20")
    page.wait_for_timeout(300)
    assert page.input_value("#arrows-place") == "300"
    assert 0.001 < np.abs(arrows_at(page, 0.3) - before).max() < 0.5
    page.focus("#arrows-plane")
    page.keyboard.press("Escape")  # no point is chosen any more
    page.click("#arrows-many")  # from anywhere, first to the noise
    assert page.text_content("#arrows-status") == "Noise is added …"
    until(page, "arrows-status", "The points follow the arrows …")
    until(page, "arrows-status", "20 steps: ")
    # what is chosen while noise is added counts for the way back
    result(page, steps=1)
    set_value(page, "arrows-place", 900)
    page.click("#arrows-many")
    set_value(page, "arrows-steps", "20")
    until(page, "arrows-status", "The points follow the arrows …")
    set_value(page, "arrows-place", 0)
    said = until(page, "arrows-status", "20 steps: ")
    assert "100 %" not in said  # where a jump ends
    # one step is a jump: straight to the mean
    assert result(page, steps=1)[1] > 80
    ends = [arrows_at(page, place) for place in (0, 0.5, 1)]
    np.testing.assert_allclose(ends[1], (ends[0] + ends[2]) / 2, atol=1e-4)


BETWEEN = """(x, x0, t, levels) => {
    const at = (level) => sampler.between({t, x, x0}, level);
    return levels.map((level) => [at(level), sampler.partsAt(level)]);
}"""


def test_straight_paths_are_those_of_ddim(page):
    """Each step of DDIM is straight in x_t / (sqrt(abar) + sqrt(1 - abar)), and else it is not."""
    diffusion, x, x0 = Diffusion(linear_betas()), NOISES[0].ravel(), 0.3 * NOISES[1].ravel()
    abar = np.array(Chain(diffusion.betas, "large", 5).alphas_bar)
    step = js(page, BETWEEN, x, x0, 799, [799, 700, 599.5, 599])
    _, last = step[-1]
    np.testing.assert_allclose(last, [abar[2] ** 0.5, (1 - abar[2]) ** 0.5], rtol=1e-6)
    eps = (x - abar[3] ** 0.5 * x0) / (1 - abar[3]) ** 0.5
    np.testing.assert_allclose(step[-1][0], last[0] * x0 + last[1] * eps, atol=1e-5)
    for scaled in (True, False):
        places = [np.array(place) / (sum(parts) if scaled else 1) for place, parts in step]
        way, middle = places[-1] - places[0], places[1] - places[0]
        beside = middle - (middle @ way) / (way @ way) * way
        assert (np.abs(beside).max() < 1e-5) == scaled
    set_value(page, "arrows-place", 900)
    before = pixels(page, "arrows-plane")
    set_value(page, "arrows-straight", True)
    assert (pixels(page, "arrows-plane") != before).mean() > 0.02
    set_value(page, "arrows-straight", False)


def test_points_that_are_drawn(page):
    """Other data end the drawing; a touch then chooses a point."""
    set_value(page, "arrows-data", "own")
    assert page.text_content("#arrows-status") == "Draw some points in the plane."
    assert page.input_value("#arrows-place") == "0"
    stroke(page, "arrows-plane", (0.5, 0.5), (0.6, 0.5))
    assert page.text_content("#arrows-status").startswith("Touch a point")
    assert result(page)[0] == 50
    set_value(page, "arrows-place", 500)
    page.focus("#arrows-plane")
    page.keyboard.press("ArrowRight")
    assert "of the 4 data points" in page.text_content("#arrows-status")
    set_value(page, "arrows-data", "two moons")
    page.keyboard.press("ArrowRight")
    assert "of the 240 data points" in page.text_content("#arrows-status")
    page.keyboard.press("Escape")
    box = page.locator("#arrows-plane").bounding_box()
    x, y = arrows_at(page, 0.5)[17]
    where = [(0.5 + x / 4.6) * box["width"], (0.5 - y / 4.6) * box["height"]]
    page.click("#arrows-plane", position=dict(zip("xy", where, strict=True)))
    assert "of the 240 data points" in page.text_content("#arrows-status")


def test_network_learns_the_moons(page):
    """Within a minute, the loss is below 1.2 times the floor, and most samples are on the data."""
    page.click("#learn-again")
    assert "Not trained yet" in page.text_content("#learn-status")
    page.click("#learn-start")  # the first six steps are slow
    # the timeout is longer than a minute, because other processes may run
    until(page, "learn-numbers", r", (0\.\d\d|1\.[01]\d) times the floor")
    until(page, "learn-status", r", [12]?\d % of its samples missed the data: (fair|good)")
    page.click("#learn-start")  # pause
    steps = []
    for t in (500, 30):
        before = pixels(page, "learn-field")
        set_value(page, "learn-t", t)  # which paints everything again
        assert page.text_content("#learn-at") == f"level {t}"
        page.wait_for_timeout(500)
        assert (pixels(page, "learn-field") != before).mean() > 0.01
        steps.append(page.text_content("#learn-status").split(".")[0])
    assert steps[0] == steps[1] and page.text_content("#learn-start") == "Continue"
    for canvas in ("learn-batch", "learn-field", "learn-samples"):
        assert pixels(page, canvas).std() > 5, canvas


def test_a_swipe_over_the_plane_draws_no_data(page):
    """A touch captures its pointer by itself; only among the data that are drawn it adds points."""
    set_value(page, "arrows-place", 0)
    touch = page.context.new_cdp_session(page)
    for name, more in (("two moons", 0), ("own", 2)):
        set_value(page, "arrows-data", name)
        page.locator("#arrows-plane").scroll_into_view_if_needed()
        box = page.locator("#arrows-plane").bounding_box()
        x, y = box["x"] + 200, box["y"] + 200
        code = "import('./arrows.js').then(({ scene }) => scene.data.length / 2)"
        before = page.evaluate(code)
        for kind, points in (("Start", [(x, y)]), ("Move", [(x + 30, y)]), ("End", [])):
            points = [{"x": x, "y": y} for x, y in points]
            touch.send("Input.dispatchTouchEvent", {"type": f"touch{kind}", "touchPoints": points})
            page.wait_for_timeout(100)
        assert page.evaluate(code) == before + more
    set_value(page, "arrows-data", "two moons")


def test_other_data_begin_another_training(page):
    page.click("#learn-again")
    page.click("#learn-start")
    until(page, "learn-status", r"^Training step [1-3]\.")
    page.click("#learn-start")
    set_value(page, "arrows-data", "a ring")
    assert "Not trained yet" in page.text_content("#learn-status")
    set_value(page, "arrows-data", "two moons")


def test_included_network_draws_what_python_draws(page):
    """Each step; then with other classes and with guidance."""
    network = ddpm_numpy.Network(SHIPPED, "cpu")
    trouser, none = network.classes.index("trouser"), len(network.classes)
    assert "4 images: 10 steps in" in sampled(page, seed=3)
    steps = steps_of_python(network, page, 3, y=range(4))  # the classes in turn
    assert page.text_content("#image-shown") == "10 steps, all in turn"
    assert page.text_content("#image-at") == "the result"
    assert_shows(page, "grid", steps[-1][2])
    assert_shows(page, "noise", steps[-1][2])
    assert pixels(page, "grid").std() > 40
    set_value(page, "image-step", 4)  # the slider goes back
    t, x, x0 = steps[4]
    assert page.text_content("#image-at") == f"level {t}"
    assert_shows(page, "grid", x0)
    assert_shows(page, "noise", x)
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


def test_algorithm_2_without_its_noise_draws_smooth_images(page):
    sampled(page, steps=50, sampler="ddpm")
    usual = tiles(page, "grid", (1, 32, 32))[:, 0]
    sampled(page, steps=50, sampler="no-noise")
    assert page.text_content("#image-shown").startswith("50 steps, Algorithm 2 without its noise")
    smooth = tiles(page, "grid", (1, 32, 32))[:, 0]
    roughness = [np.abs(np.diff(images, axis=1)).mean() for images in (usual, smooth)]
    assert roughness[1] < 0.8 * roughness[0]


def test_changes_during_a_pass_start_one_more(page):
    """As with an arrow key that is held on w: the last change counts, whatever the control is."""
    start_sampling(page, steps=50, seed=7)
    for w in ("0.5", "1", "1.5", "2"):
        set_value(page, "image-w", w)
    assert until(page, "status", "50 steps in").startswith("4 images: 50 steps in")
    assert page.text_content("#image-shown").endswith("guidance 2")
    for name, value in (("steps", 5), ("sampler", "ddim"), ("count", 16), ("seed", 8)):
        page.evaluate("document.getElementById('status').textContent = ''")
        set_value(page, f"image-{name}", value)
        until(page, "status", "steps in")
    assert page.text_content("#image-shown").startswith("5 steps, DDIM")
    set_value(page, "image-steps", 1000)  # which would take long
    assert "Press Draw" in until(page, "status", "Press") and page.is_disabled("#stop")
    set_value(page, "image-w", "0")
    assert "Press Draw" in until(page, "status", "Press") and page.is_disabled("#stop")


def test_draw_again_draws_other_images(page):
    """As long as no control changes, which shows its effect on the same noise."""
    sampled(page, steps=5, seed=6)
    first = tiles(page, "grid", (1, 32, 32))
    page.evaluate("document.getElementById('status').textContent = ''")
    page.click("#sample")
    until_idle(page)
    assert page.input_value("#image-seed") == "7"
    assert page.is_hidden("#comparison")
    # with another setting, both are seen
    second = tiles(page, "grid", (1, 32, 32))
    set_value(page, "image-steps", 10)
    until(page, "status", "10 steps in")
    assert np.array_equal(tiles(page, "before", (1, 32, 32)), second)
    assert page.text_content("#image-before") == "5 steps, all in turn"
    assert np.abs(tiles(page, "grid", (1, 32, 32)) - first).mean() > 5


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
    before = pixels(page, "draw")
    set_value(page, "draw-colour", "#ff0000")
    stroke(page, "draw", (0.1, 0.8), (0.9, 0.8))
    painted = pixels(page, "draw")
    changed = (painted != before).any(0)
    assert changed.any() and changed.nonzero()[0].min() > 16
    grey = np.tensordot([0.299, 0.587, 0.114], painted, 1)  # as the network sees it
    set_value(page, "draw-t", 0)
    assert np.abs(pixels(page, "noised")[0] - grey).max() < 10  # sigma is 1.3 of 255
    set_value(page, "draw-t", 600)
    assert page.text_content("#draw-t-value") == "level 600"
    assert np.abs(pixels(page, "noised")[0] - grey).mean() > 50
    set_value(page, "draw-t", 30)
    page.click("#denoise")
    assert "Four results from level 30: 31 steps" in until_idle(page, "draw-status")
    ends = tiles(page, "ends", (1, 32, 32))[:, 0]
    assert np.abs(ends - grey).mean() < 15 and np.abs(ends[0] - ends[1]).mean() > 0.5
    set_value(page, "draw-t", 31)  # old results do not stay
    assert page.locator("#ends").evaluate("e => e.style.opacity") == "0.3"
    assert page.text_content("#draw-status") == "Press Denoise."
    # after "Clear", what is drawn is seen
    set_value(page, "draw-colour", "#000000")
    page.click("#draw-clear")
    assert pixels(page, "draw").max() == 0
    stroke(page, "draw", (0.1, 0.8), (0.9, 0.8))
    assert pixels(page, "draw").max() > 200


@pytest.mark.parametrize("scheme", ["dark", "light"])
@pytest.mark.parametrize("width", [320, 390, 1280])
def test_layout(width, scheme, page):
    page.set_viewport_size({"width": width, "height": 660})
    page.emulate_media(color_scheme=scheme)
    open_all = "document.querySelectorAll('details').forEach((one) => { one.open = true; })"
    page.evaluate(open_all)
    sampled(page, steps=5, count=16, sampler="no-noise")  # which has a long name
    assert page.evaluate("document.scrollingElement.scrollWidth") <= width
    brightness = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (int(re.findall(r"\d+", brightness)[0]) > 128) == (scheme == "light")
    boxes = [page.locator(f"#{name}").bounding_box() for name in ("noise", "grid")]
    assert boxes[0]["y"] == boxes[1]["y"] and boxes[0]["width"] >= 120  # side by side
    for name in ("scene-place", "arrows-place", "image-step", "draw-t"):
        assert page.locator(f"#{name}").bounding_box()["width"] >= 90, name
    unnamed = """[...document.querySelectorAll('input, select, button')]
        .filter((e) => !e.labels?.length && !e.ariaLabel && !e.textContent.trim())"""
    assert page.evaluate(f"{unnamed}.length") == 0
    # a finger scrolls the page on the planes; only on a drawing it draws
    for name in ("scene-plane", "arrows-plane", "learn-field"):
        assert "pan-y" in page.locator(f"#{name}").evaluate("e => getComputedStyle(e).touchAction")
    page.set_viewport_size({"width": 1280, "height": 900})
    page.emulate_media(color_scheme="light")


def test_one_live_region_that_does_not_chatter(page):
    """What can be used is no image, and a run is announced once."""
    assert page.locator("[role=status], [aria-live], output").count() == 1
    assert page.locator("canvas:not([role]):not([aria-hidden])").count() == 0
    assert page.locator("canvas[tabindex][role=img]").count() == 0
    page.evaluate("""() => {
        window.said = [];
        new MutationObserver(() => window.said.push(document.getElementById("live").textContent))
            .observe(document.getElementById("live"), {childList: true});
    }""")
    sampled(page, steps=20)
    set_value(page, "arrows-place", 200)
    page.click("#arrows-many")
    until(page, "arrows-status", "the points miss")
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
        ("only.onnx", model[-len(model) // 50 :], "it"),
    ):
        (tmp_path / name).write_bytes(content)
        said = choose(page, tmp_path / name)
        assert said.startswith(f"{name} is not a model from export.py") and what in said
        assert "error" in page.get_attribute("#own-status", "class")
        assert said.endswith(" fashion-mnist.onnx still draws.")
        assert "error" not in page.get_attribute("#status", "class")
    assert "10 steps in" in sampled(page, sampler="ddim")  # the model before is still there
    start_sampling(page, steps=1000)  # stops when another model is opened, without a word
    page.set_input_files("#model", exported / "model.onnx")
    until(page, "own-status", "^Loading")
    page.click("#sample")  # and so does what is begun meanwhile
    assert "model.onnx" in until(page, "own-status", "^Ready")
    assert "error" not in page.get_attribute("#status", "class") and page.is_enabled("#sample")
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
    assert labels == ["all in turn", "any kind", *network.classes]
    sampled(page)
    assert_shows(page, "grid", steps_of_python(network, page, 0, y=range(4))[-1][2])


def test_without_a_connection(opened):
    """And without a copy of the runtime, section 2 works; its training has one loop."""
    page = opened(dict.fromkeys([OUTSIDE, COPY], lambda route: route.abort()))
    assert page.evaluate("window.ready") is False
    said = page.text_content("#status")
    assert "Sections 1 and 2 work in full" in said and said.endswith(INSTALL)
    # what is out of sight is not drawn
    assert page.evaluate("document.getElementById('learn-field').width") == 300
    page.clock.install(time=0)
    page.clock.pause_at(1000)
    for _ in range(3):  # Start, Pause, Start, while the loop waits after its first step for 0.9 s
        page.click("#learn-start")
    page.clock.run_for(1500)
    assert page.text_content("#learn-status").startswith("Training step 2.")


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
    right = 0
    for seed in (0, 1):
        assert "50 steps in" in sampled(page, steps=50, count=16, seed=seed)
        right += are_right(tiles(page, "grid", (3, 8, 8))).sum()
    assert right >= 24  # of 32
