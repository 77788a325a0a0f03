"""The page page/index.html, in a real browser: its numbers are Python's, its promises hold."""

import base64
import io
import json
import re
import time

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from conftest import HERE
from PIL import Image

import export
import sample
import train
from ddpm import Diffusion, linear_betas
from docs.make_figures import page_noise
from extras.exact import exact_network
from sample import to_pixels

pytest.importorskip("playwright", reason="the page's tests need playwright")
from docs.record_page import CHROMIUM, browser_and_address

PAGE = HERE / "page"
SHIPPED = PAGE / "fashion-mnist.onnx"
RUNTIME = PAGE / "node_modules" / "onnxruntime-web"
VERSION = re.search(r"onnxruntime-web@[0-9.]+", (PAGE / "networks.js").read_text("utf-8"))[0]
INSTALL = f"npm install --no-save --no-package-lock --prefix page {VERSION}"
pytestmark = [
    pytest.mark.page,
    pytest.mark.skipif(CHROMIUM is None, reason="the page's tests need Chromium"),
    pytest.mark.skipif(not RUNTIME.is_dir(), reason=f"run: {INSTALL}"),
]
EMOJI = PAGE / "emoji.onnx"
STD = 0.02  # of the points, as in page/points.js
NAMES = {
    "opening": "gesture, pictures",
    "arrows": "gesture, pair",
    "learn": "saved",
    "images": "pictures, gesture, expected",
    "drawing": "drawing, gesture, drawn",
}  # the exports
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
        page.set_default_timeout(300_000)
        if not keep:
            tabs.append(page)
        for pattern, handle in (routes or {OUTSIDE: refuse}).items():
            page.route(re.compile(pattern), handle)
        page.on("pageerror", lambda error: said.append(str(error)))
        if not routes:
            page.on("console", lambda m: said.append(m.text) if m.type == "error" else None)
        page.goto(address)
        if wait:
            settled(page, "() => window.recorded")
        return page

    with browser_and_address() as (browser, address):
        yield call
    assert not said


@pytest.fixture(scope="module")
def page(opened):
    """One tab that the tests share; each leaves it idle."""
    page = opened(keep=True)
    settled(page, "() => window.ready")
    return page


@pytest.fixture(scope="module")
def exported(image_folder, tmp_path_factory):
    """The folder of model.onnx, a network trained with --quick."""
    folder = tmp_path_factory.mktemp("exported")
    words = ["--data", image_folder, "--image-size", 8, "--channel-mults", 1, 2, "--quick"]
    words += ["--attention-resolutions", 4, "--variance", "small", "--steps", 100, "--batch", 8]
    run, file = folder / "run", folder / "model.onnx"
    for program, args in (
        (train, ["--out", run, *words]),
        (export, ["--checkpoint", run, "--onnx", file]),
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.argv", [program.__file__, *map(str, args)])
            program.main()
    return folder


def until_true(page, call):
    """Call again and again until the result is true. Returns it."""
    end = time.monotonic() + 300
    while not (value := call()):
        assert time.monotonic() < end
        page.wait_for_timeout(20)
    return value


def settled(page, function, *args):
    """What an async function gives; typed arrays become lists.

    The browser may collect a promise that Playwright waits for, so this one asks until it is there.
    """
    page.evaluate(
        f"""(args) => {{
            const plain = (key, value) => ArrayBuffer.isView(value) ? Array.from(value) : value;
            const tell = (it) => {{ window.answer = JSON.stringify(it, plain); }};
            window.answer = null;
            ({function})(...args).then((value) => tell({{ value: value ?? null }}))
                .catch((error) => tell({{ error: String(error) }}));
        }}""",
        args,
    )
    answer = json.loads(until_true(page, lambda: page.evaluate("window.answer")))
    assert "error" not in answer, answer
    return answer["value"]


def js(page, function, *args):
    """What a function of the page's modules returns; float32 arrays become a Float32Array there."""

    def plain(array):
        values = array.ravel().tolist()
        return {"float32": values} if "float32" in str(array.dtype) else values

    modules = "sampler, points, trainer, network"
    return settled(
        page,
        f"""async (args) => {{
            const load = (name) => import(`./${{name}}.js`), names = "{modules}".split(", ");
            const [{modules}] = await Promise.all(names.map(load));
            const typed = (key, value) => value?.float32 ? Float32Array.from(value.float32) : value;
            return ({function})(...JSON.parse(args, typed));
        }}""",
        json.dumps(args, default=plain),
    )


def until(page, name, pattern):
    """Wait until the text of an element matches. Returns the text."""
    page.locator(f"#{name}", has_text=re.compile(pattern)).wait_for(state="attached")
    return page.text_content(f"#{name}")


def value_of(page, module, code):
    """What an expression with the exports of a module of the page gives."""
    load = f"const {{ {NAMES[module]} }} = await import('./{module}.js')"
    return settled(page, f"async () => {{ {load}; return {code}; }}")


def images_at(page, place, shape=(15, 1, 32, 32), kind="x", module="images"):
    """The pictures of a section at a place: x_t, or the estimate x0."""
    name = "drawing" if module == "drawing" else "pictures"
    code = f"{name}.at({place}).{kind}"
    return np.array(value_of(page, module, code), np.float32).reshape(shape)


def until_complete(page, module="opening"):
    """Wait until the way back of a section is complete."""
    until_true(page, lambda: value_of(page, module, "gesture.isBack && gesture.isComplete"))


def set_value(page, name, value):
    """Move a slider as a reader would by the keyboard, or choose an option."""
    page.locator(f"#{name}").evaluate(
        """(element, value) => {
            element.value = value;
            for (const event of ["input", "change"]) element.dispatchEvent(new Event(event));
        }""",
        value,
    )


def drag(page, name, start, end):
    """Drag the mouse between two places of an element, which are relative to its size."""
    page.locator(f"#{name}").scroll_into_view_if_needed()
    box = page.locator(f"#{name}").bounding_box()
    (x, y), to = (
        (box["x"] + u * box["width"], box["y"] + v * box["height"]) for u, v in (start, end)
    )
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(*to, steps=4)
    page.mouse.up()


def let_go(page, name, place):
    """Drag the slider of a section to a place, and let go."""
    slider = page.locator(f"#{name}-place")
    half = 14.4 / slider.bounding_box()["width"]  # of the thumb
    at = (half + u * (1 - 2 * half) for u in (float(slider.input_value()) / 1000, place))
    drag(page, f"{name}-place", *((u, 0.5) for u in at))


def see(page, name, block="start"):
    code = f"document.getElementById('{name}').scrollIntoView({{block: '{block}'}})"
    page.evaluate(code)


def choose(page, path):
    """Give the page a model.onnx. Returns what it says then."""
    page.evaluate("document.getElementById('own-status').textContent = 'Loading'")
    page.set_input_files("#model", path)
    return until(page, "own-status", "^(?!Loading)")


def pixels(page, canvas):
    """The bytes of a canvas, (3, height, width)."""
    url = settled(
        page,
        """async (id) => {
            document.getElementById(id).scrollIntoView({block: "center"});
            await new Promise((resolve) => setTimeout(resolve, 400));
            for (let k = 0; k < 3; k++) await new Promise(requestAnimationFrame); // it is drawn
            return document.getElementById(id).toDataURL();
        }""",
        canvas,
    )
    image = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
    return np.array(image.convert("RGB"), int).transpose(2, 0, 1)


def tiles(page, canvas, shape, gap=1):
    """The images in a canvas, (B, 3, H, W), without the gaps between them."""
    _, height, width = shape
    windows = np.lib.stride_tricks.sliding_window_view(pixels(page, canvas), (3, height, width))
    return windows[0, :: height + gap, :: width + gap].reshape(-1, 3, height, width)


def noise_of(page, seed, shape, draws=1):
    """What the page draws for images of the shape (B, ...): (draws, B, ...)."""
    draw = """(seed, batch, size, draws) => {
        const drawNoise = sampler.noiseOf(seed, batch, size);
        return Array.from({length: draws}, drawNoise);
    }"""
    z = js(page, draw, seed, shape[0], int(np.prod(shape[1:])), draws)
    return np.array(z, np.float32).reshape(draws, *shape)


def steps_of_python(network, x_T, y=None, w=0, steps=10, sampler=None):
    """(t, x_t, x0_hat) of each step in Python."""
    eps = network if y is None else sample.guided(network, np.array(y), w)
    return list(network.reverse(eps, lambda: x_T, steps=steps, sampler=sampler))


# -------------------------------------------------------------------------------------- the numbers


SAMPLE = """async (noises, betas, options) => {
    // the exact eps of images ~ N(0, 0.3^2), made uneven by a sine
    const abar = sampler.alphasBar(betas), steps = [];
    const eps = (x, t) => x.map((value) =>
        Math.sqrt(1 - abar[t]) * (value + 0.1 * Math.sin(3 * value)) / (1 - 0.91 * abar[t]));
    const draw = () => noises.shift();
    for await (const {t, x, x0} of sampler.reverse(eps, draw, betas, options)) {
        steps.push([t, x, x0]);
    }
    return [steps, noises.length];
}"""
SHAPE, BETAS = (2, 1, 3, 3), np.linspace(1e-3, 0.2, 40)
NOISES = np.random.default_rng(0).normal(0, 3, (41, *SHAPE)).astype(np.float32)  # x0 is clipped


def smooth_eps(x, t):
    """The eps of SAMPLE."""
    a = (1 - BETAS).cumprod()[t]
    return (np.sqrt(1 - a) * (x + 0.1 * np.sin(3 * x)) / (1 - 0.91 * a)).astype(np.float32)


@pytest.mark.parametrize("sampler", [None, *sample.SAMPLERS])
@pytest.mark.parametrize("variance, steps, clip", [
    ("large", 40, True), ("small", 39, True), ("small", 7, True), ("large", 7, False),
    ("large", 2, True), ("large", 1, True),
])  # fmt: skip
def test_reverse_process_is_that_of_sample_py(variance, steps, clip, sampler, page):
    """On the same noise, of which it draws as much."""
    left, options = iter(NOISES), dict(variance=variance, steps=steps, sampler=sampler, clip=clip)
    expected = list(sample.reverse(smooth_eps, lambda: next(left), BETAS, **options))
    theirs, unused = js(page, SAMPLE, list(NOISES), BETAS, options)
    assert unused == len(list(left))
    for (t, x, x0), (their_t, their_x, their_x0) in zip(expected, theirs, strict=True):
        assert t == their_t
        np.testing.assert_allclose(their_x, x.ravel(), atol=1e-5)
        np.testing.assert_allclose(their_x0, x0.ravel(), atol=1e-5)


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


@pytest.mark.parametrize("name", ["shipped", "emoji", "model"])
def test_eps_is_pythons(name, page, exported):
    path = {"shipped": SHIPPED, "emoji": EMOJI, "model": exported / "model.onnx"}[name]
    network, times = sample.Network(path, "cpu"), [0, 300, 999]
    metadata, shape = network.session.get_modelmeta().custom_metadata_map, (3, *network.shape)
    x = np.random.default_rng(0).standard_normal(shape, np.float32)
    atol = 1e-2 if name == "emoji" else 1e-4  # its weights are of 16 bits
    theirs = js(page, EPS, base64.b64encode(path.read_bytes()).decode(), x, times)
    for t, their_eps in zip(times, theirs["eps"], strict=True):
        np.testing.assert_allclose(their_eps, network(x, t).ravel(), atol=atol)
    np.testing.assert_allclose(theirs["alone"], theirs["eps"][0][: len(theirs["alone"])], atol=atol)
    assert theirs["metadata"] == metadata and theirs["shape"] == [*network.shape]
    assert theirs["variance"] == metadata["ddpm.variance"]
    assert theirs["betas"] == json.loads(metadata["ddpm.betas"])
    assert theirs["late"] == "the network was closed"


@pytest.mark.parametrize("t", [0, 50, 500, 999])
def test_closed_forms_of_points(t, page):
    """The field against extras/exact.py, and the density against a sum of Gaussians."""
    diffusion, x = Diffusion(linear_betas()), 4 * torch.rand(50, 2, 1, 1) - 2
    centres, std = torch.tensor([[-0.6, -0.5], [0.0, 0.6], [0.6, -0.2]]), 0.1
    abar = diffusion.alphas_bar[t].item()
    forms = "(x, ...rest) => [points.exactEps(x, ...rest), points.density(24, ...rest, 1, 2.3)]"
    eps, q = js(page, forms, x, abar, centres, std)
    expected = exact_network(diffusion, centres[..., None, None], std=std)(x, torch.full((50,), t))
    np.testing.assert_allclose(eps, expected.ravel(), rtol=1e-4, atol=1e-5)
    ticks = 2.3 * (2 * (np.arange(24) + 0.5) / 24 - 1)
    places = np.stack(np.meshgrid(ticks, -ticks), -1)  # from the top left
    offsets = places[:, :, None] - abar**0.5 * centres.numpy()
    gaussians = np.exp(-(offsets**2).sum(-1) / (2 * (abar * std**2 + 1 - abar)))
    np.testing.assert_allclose(q, gaussians.sum(-1).ravel(), rtol=1e-4, atol=1e-5)


TRAIN = """(batches, levels) => {
    const learner = new trainer.Trainer(), start = learner.parameters.map((p) => p.slice());
    const steps = batches.map((batch) => learner.step(batch)), [{x0}] = batches;
    const eps = levels.map((t) => trainer.epsOf(learner.average, x0, t));
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
            v = F.silu(h @ W2 + b2) @ W3 + b3
            return (abar.sqrt() * v + (1 - abar).sqrt() * x).float()[..., None, None]

        return network

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


PASSAGE = """async ({answer, until}) => {
    const { Passage } = await import("./passage.js"), said = [], shown = [], answers = [];
    const eps = (x, t) => new Promise((resolve, reject) => answers.push(
        () => t < until ? reject(new Error("full")) : resolve(x)));
    const changed = (error) => error && said.push(error.message);
    const picture = new Passage(eps, { sampler: "ddim", steps: 4 }, changed);
    picture.begin(Float32Array.of(0.5), Float32Array.of(1));
    picture.sendBack(1);
    for (let k = 0; k < 5; k++) {
        await new Promise((resolve) => setTimeout(resolve, 20));
        shown.push([Math.round(1000 * picture.reached ** 2 - 1), picture.isComplete]);
        answers.shift()?.();
    }
    return [shown, said];
}"""


def test_picture_waits_for_the_network(page):
    """The way back goes on as fast as its steps.

    A network that fails is said, and the rest of the way is one jump.
    """
    shown, said = settled(page, PASSAGE, {"until": -1})
    assert said == []
    assert shown == [[999, False], [749, False], [499, False], [249, False], [-1, True]]
    shown, said = settled(page, PASSAGE, {"until": 400})
    assert said == ["full"] and shown[-2:] == [[249, False], [-1, True]]


# ---- the opening


def test_opening_moves_at_once_and_until_it_is_touched(opened):
    """It needs no network to begin; a touch ends the repetition."""
    missing = dict.fromkeys([OUTSIDE, "onnx"], lambda route: route.abort())
    page = opened(missing, motion="no-preference", wait=False)
    page.wait_for_function("document.getElementById('scene-place').value > 0", timeout=10_000)
    page.focus("#scene-place")
    at = page.input_value("#scene-place")
    page.wait_for_timeout(1000)
    assert page.input_value("#scene-place") == at
    value_of(page, "opening", "gesture.moveTo(1)")
    for name, moves in (("Back in many steps", True), ("Pause", False), ("Continue", True)):
        page.get_by_role("button", name=name, exact=True).click()
        assert page.text_content("#scene-title") == "Back in many steps"
        at = page.input_value("#scene-place")
        page.wait_for_timeout(500)
        assert (page.input_value("#scene-place") != at) == moves
    for k in range(6):  # by itself, each third way back is one jump
        value_of(
            page, "opening", "void Object.assign(gesture, {repeats: true, hold: 0, moving: true})"
        )
        value_of(page, "opening", f"(gesture.round = {k}, gesture.finish(), gesture.moving = true)")
        page.wait_for_function("document.getElementById('scene-place').value > 0")
        assert value_of(page, "opening", "gesture.jumps") == (k % 3 == 2)
        value_of(page, "opening", "(gesture.stop(), gesture.moveTo(1), gesture.sendBack())")


def test_nothing_moves_where_the_reader_prefers_so(opened):
    """But the pictures are there as soon as they are seen."""
    page = opened()
    page.wait_for_timeout(1500)
    assert page.input_value("#scene-place") == "0" and page.input_value("#arrows-place") == "450"
    see(page, "arrows")
    assert page.text_content("#arrows-text").startswith("This dot may have come from")
    see(page, "learning")
    page.wait_for_timeout(1500)
    assert page.get_attribute("#learn-play", "aria-label") == "Play"
    see(page, "images")
    until(page, "images-title", "Back from the noise")
    assert page.input_value("#images-place") == "0"


def test_opening_is_on_the_first_screen(page):
    """With all of its controls, also on a phone."""
    for width, height in ((1280, 900), (390, 844)):
        page.set_viewport_size({"width": width, "height": height})
        page.evaluate("scrollTo(0, 0)")
        for name in ("scene-pictures", "scene-place", "scene-many", "scene-one"):
            box = page.locator(f"#{name}").bounding_box()
            assert box["x"] >= 0 and box["x"] + box["width"] <= width, name
            assert box["y"] >= 0 and box["y"] + box["height"] <= height, name
    page.set_viewport_size({"width": 1280, "height": 900})


def test_opening_goes_to_noise_and_back(opened):
    """By (4); the first way back is recorded, and the network draws what follows."""
    page, shape = opened(), (12, 3, 32, 32)
    settled(page, "() => window.ready")
    first, half, noise = (images_at(page, place, shape, module="opening") for place in (0, 0.5, 1))
    abar, last = Diffusion(linear_betas()).alphas_bar[[249, 999]].tolist()
    eps = noise_of(page, 0, shape)[0]
    np.testing.assert_allclose(half, abar**0.5 * first + (1 - abar) ** 0.5 * eps, atol=1e-4)
    np.testing.assert_allclose(noise, last**0.5 * first + (1 - last) ** 0.5 * eps, atol=1e-4)
    network = sample.Network(EMOJI, "cpu")
    kinds = [network.classes.index(name) for name in ("smileys", "people", "flags")]
    y = lambda turn: [kinds[(k + k // 6 + turn) % 3] for k in range(12)]  # noqa: E731
    way = lambda x_T, turn: steps_of_python(network, x_T, y(turn), 1, 10, "ddim")  # noqa: E731
    value_of(page, "opening", "(gesture.moveTo(1), gesture.sendBack(), gesture.stop())")
    until_complete(page)
    result, guess = (
        images_at(page, u, shape, kind, "opening") for u, kind in ((0, "x"), (1, "x0"))
    )
    assert np.abs(guess - way(noise, 1)[0][2]).mean() < 0.08
    assert np.abs(result - way(noise, 1)[-1][2]).mean() < 0.08  # the recording is compressed
    value_of(page, "opening", "(gesture.finish(), gesture.moveTo(0.5), gesture.moveTo(1))")
    x_T = images_at(page, 1, shape, module="opening")
    assert abs(np.corrcoef(x_T.ravel(), noise.ravel())[0, 1]) < 0.1  # fresh noise
    again = images_at(page, 0, shape, module="opening")
    assert np.abs(again - result).max() < 1e-3  # the noise is added to these
    value_of(page, "opening", "(gesture.sendBack(true), gesture.stop())")
    until_complete(page)
    jump = images_at(page, 0, shape, module="opening")
    assert np.abs(jump - way(x_T, 2)[0][2]).mean() < 2e-2
    # after a jump, the noise is added to the pictures before, which are of the kind before
    half = "(gesture.finish(), gesture.moveTo(0.5), gesture.sendBack(true), gesture.stop())"
    value_of(page, "opening", half)
    until_complete(page)
    x, jump = (images_at(page, place, shape, module="opening") for place in (0.5, 0))
    eps = sample.guided(network, np.array(y(1)), 1)(x, 249)
    assert np.abs(jump - np.clip((x - (1 - abar) ** 0.5 * eps) / abar**0.5, -1, 1)).mean() < 2e-2


def test_opening_by_hand_and_by_keyboard(page):
    """A drag of the slider brings it back; of the slider's keys, Enter lets go."""
    page.evaluate("scrollTo(0, 0)")
    value_of(page, "opening", "gesture.moveTo(0)")
    page.focus("#scene-place")
    for _ in range(3):
        page.keyboard.press("PageUp")
    assert int(page.input_value("#scene-place")) > 200
    assert page.text_content("#scene-title") == "Noise is added"
    let_go(page, "scene", 0.8)
    assert page.text_content("#scene-title") == "Back in many steps"
    until(page, "scene-title", "Similar pictures")
    page.focus("#scene-place")
    page.keyboard.press("End")
    page.keyboard.press("Enter")
    assert page.text_content("#scene-title") == "Back in many steps"
    value_of(page, "opening", "gesture.stop()")


def test_one_dot_by_hand_and_by_keyboard(page):
    """The arrow keys or a tap choose it; a tap on what has come back moves nothing."""
    value_of(page, "arrows", "(gesture.moveTo(0), gesture.moveTo(0.5))")
    before = pixels(page, "arrows-50")
    page.focus("#arrows-50")
    page.keyboard.press("ArrowRight")
    assert "may have come from" in page.text_content("#arrows-text")
    assert (pixels(page, "arrows-50") != before).any()
    page.keyboard.press("Escape")
    assert "Drag the slider" in page.text_content("#arrows-text")
    let_go(page, "arrows", 1)
    until(page, "arrows-title", "Back from the noise")
    x, y = value_of(page, "arrows", "gesture.passages[0].at(0).x.slice(34, 36)")
    box = page.locator("#arrows-50").bounding_box()
    unit = box["height"] / 3
    place = {"x": box["width"] / 2 + x * unit, "y": box["height"] / 2 - y * unit}
    page.click("#arrows-50", position=place)
    assert page.input_value("#arrows-place") == "0"
    tile = pixels(page, "arrows-tile")[0, 0]
    assert np.abs(tile - to_pixels(np.array([x, y], np.float32))).max() <= 1


def test_finger_that_scrolls_moves_nothing_else(opened):
    """A finger that moves upwards scrolls the page, also on a slider or a plane; a tap acts."""
    page = opened()
    page.set_viewport_size({"width": 390, "height": 844})
    cdp = page.context.new_cdp_session(page)
    cdp.send("Emulation.setTouchEmulationEnabled", {"enabled": True})

    def touch(name, rise):
        box = page.locator(f"#{name}").bounding_box()
        x, y = box["x"] + 0.8 * box["width"], box["y"] + box["height"] / 2
        moves = [("touchMove", y - k) for k in range(0, rise, 20)]
        for kind, at in [("touchStart", y), *moves, ("touchEnd", None)]:
            points = [] if at is None else [{"x": x, "y": at}]
            cdp.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
        page.wait_for_timeout(500)

    touch("scene-place", 200)
    assert page.evaluate("scrollY") > 50 and page.input_value("#scene-place") == "0"
    page.evaluate("scrollTo(0, 0)")
    touch("scene-place", 0)
    until(page, "scene-title", "Back in many steps")
    before = pixels(page, "arrows-tile")
    top = page.evaluate("scrollY")
    touch("arrows-50", 200)
    assert page.evaluate("scrollY") > top + 50
    assert (pixels(page, "arrows-tile") == before).all()
    touch("arrows-50", 0)
    assert (pixels(page, "arrows-tile") != before).any()


def test_way_back_after_an_interrupted_jump(opened):
    """In the middle of a jump, a picture has another amount of noise than its place says."""
    page, shape = opened(), (12, 3, 32, 32)
    value_of(page, "opening", "(gesture.moveTo(1), gesture.sendBack(true), gesture.stop())")
    blur = images_at(page, 0, shape, module="opening")
    value_of(page, "opening", "(gesture.moveTo(0.4), gesture.sendBack(), gesture.stop())")
    assert page.input_value("#scene-place") == "1000"
    until_complete(page)
    assert images_at(page, 0, shape, module="opening").std() > 1.1 * blur.std()
    value_of(page, "opening", "gesture.finish()")
    assert page.text_content("#scene-title") == "New pictures"
    # from little noise, nothing new comes back, and the caption does not say so
    value_of(page, "opening", "(gesture.moveTo(0), gesture.moveTo(0.1), gesture.sendBack())")
    until_complete(page)
    value_of(page, "opening", "gesture.finish()")
    assert page.text_content("#scene-title") == "The same pictures"
    # the button for a jump begins with only noise
    value_of(page, "opening", "(gesture.moveTo(0), gesture.moveTo(0.3))")
    page.click("#scene-one")
    until(page, "scene-title", "Noise is added")
    until(page, "scene-title", "Back in one jump")
    assert value_of(page, "opening", "pictures.from") == 1


# ---- section 1 and 2


def test_way_between_two_steps_is_that_of_ddim(page):
    """The estimate and the noise stay, also between two levels."""
    diffusion, x, x0 = Diffusion(linear_betas()), NOISES[0].ravel(), 0.3 * NOISES[1].ravel()
    abar = diffusion.alphas_bar.numpy()
    eps = (x - abar[799] ** 0.5 * x0) / (1 - abar[799]) ** 0.5
    between = "(x, x0, t) => [700, 599.5].map((level) => sampler.between({t, x, x0}, level))"
    for its_abar, theirs in zip(
        (abar[700], abar[599:601].mean()), js(page, between, x, x0, 799), strict=True
    ):
        np.testing.assert_allclose(
            theirs, its_abar**0.5 * x0 + (1 - its_abar) ** 0.5 * eps, atol=1e-5
        )


def test_dots_go_to_noise_and_back(page):
    """By the forward process (4), then by the exact arrows; in one step, to the mean."""
    at = lambda place, plane=0: np.reshape(  # noqa: E731
        value_of(page, "arrows", f"gesture.passages[{plane}].at({place}).x"), (-1, 2)
    )
    value_of(page, "arrows", "(gesture.moveTo(0), gesture.moveTo(0.1), gesture.moveTo(0))")
    data, half, noise = (at(place) for place in (0, 0.5, 1))  # 0.5 is t = 249
    moons, diffusion = torch.tensor(data).float()[..., None, None], Diffusion(linear_betas())
    abar, last = diffusion.alphas_bar[[249, 999]].tolist()
    eps = (noise - last**0.5 * data) / (1 - last) ** 0.5
    np.testing.assert_allclose(half, abar**0.5 * data + (1 - abar) ** 0.5 * eps, atol=1e-4)
    value_of(page, "arrows", "(gesture.moveTo(1), gesture.sendBack(), gesture.stop())")
    until_complete(page, "arrows")
    exact = exact_network(diffusion, moons, std=STD)
    expected = -exact(torch.tensor(noise).float()[..., None, None], torch.full((240,), 999))
    lower = round(1000 * 0.97**2 - 1)  # but for the shrinking, they move along the arrows
    moved = at(0.97) / diffusion.alphas_bar[lower].item() ** 0.5 - noise / last**0.5
    cosine = F.cosine_similarity(torch.tensor(moved), expected.flatten(1))
    assert cosine.median() > 0.99
    nearest = np.linalg.norm(at(0)[:, None] - data, axis=-1)
    assert (nearest.min(1) < 3 * STD).mean() > 0.9
    origins = nearest.argmin(1)
    assert len(set(origins)) > 100 and (origins != np.arange(240)).mean() > 0.9
    assert np.abs(at(0, 2) - data.mean(0)).max() < 0.05


def test_one_slider_sends_three_planes_back(page):
    """In 1, 5 and 50 steps; one step is straight. A point that is pulled has other noise."""
    let_go(page, "arrows", 1)
    until_complete(page, "arrows")
    value_of(page, "arrows", "(gesture.finish(), gesture.say())")
    shares = [int(re.match(r"(\d+)%", page.text_content(f"#arrows-{n}-miss"))[1])
              for n in (1, 5, 50)]  # fmt: skip
    assert shares[0] > 95 and shares[1] > shares[2] < 8
    points = "gesture.passages.map((p) => [0, 0.5, 1].map((place) => Array.from(p.at(place).x)))"
    x = np.array(value_of(page, "arrows", points))
    np.testing.assert_allclose(x[2, 1], (x[2, 0] + x[2, 2]) / 2, atol=1e-4)
    assert np.abs(x[:, 2] - x[0, 2]).max() == 0  # all from the same noise
    value_of(page, "arrows", "gesture.moveTo(0.5)")  # the slider shows the way that they came
    assert pixels(page, "arrows-5").std() > 5
    value_of(page, "arrows", "(gesture.moveTo(0), gesture.moveTo(0.6))")
    assert not value_of(page, "arrows", "gesture.passages.some((p) => p.jumps)")
    box, view = page.locator("#arrows-50").bounding_box(), 3
    x, y = np.array(value_of(page, "arrows", "gesture.passages[0].at(0.6).x.slice(128, 130)"))
    place = (0.5 + x / view * box["height"] / box["width"], 0.5 - y / view)
    drag(page, "arrows-50", place, (0.5, 0.5))
    after = np.array(
        value_of(page, "arrows", "gesture.passages.map((p) => Array.from(p.at(0.6).x))")
    )
    page.mouse.move(5, 5)  # away from the plane, where it would choose a dot
    value_of(page, "arrows", "gesture.stop()")  # or the dot comes back
    for far, k, scale in (("[0, 1.4]", 129, 1), ("[2.4, 0]", 128, box["height"] / box["width"])):
        pull = (
            f"gesture.passages[0].pull(64, {far}, 0.6)"  # with more noise, it would leave the view
        )
        value_of(
            page, "arrows", f"(gesture.moveTo(0), gesture.moveTo(0.6), {pull}, gesture.moveTo(1))"
        )
        assert pixels(page, "arrows-50").std() > 5  # it is drawn
        code = f"[gesture.passages[0].seen, gesture.passages[0].at(1).x[{k}]]"
        seen, at = value_of(page, "arrows", code)
        assert 1.5 < 1.05 * scale * at < seen
    assert np.abs(after[:, 128:130]).max() < 0.05 and np.ptp(after, axis=0).max() == 0
    value_of(page, "arrows", "(gesture.moveTo(0), gesture.moveTo(0.1), gesture.moveTo(0))")
    data = value_of(page, "arrows", "gesture.passages.map((p) => Array.from(p.at(0).x))")
    assert np.ptp(data, axis=0).max() == 0  # each begins with the same data again
    drag(page, "arrows-50", (0.5, 0.5), (0.6, 0.6))  # a dot is moved by noise, so there is some
    assert value_of(page, "arrows", "gesture.passages[0].from") == 0.45  # let go, it comes back
    until(page, "arrows-title", "Back from the noise")


def test_two_rules_for_a_step(page):
    """DDIM and Algorithm 2 reach the data from the same noise, on different paths."""
    value_of(page, "arrows", "(pair.moveTo(1), pair.sendBack(), pair.stop())")
    until_true(page, lambda: value_of(page, "arrows", "pair.isComplete"))
    x = value_of(
        page, "arrows", "pair.passages.map((p) => [0, 0.5, 1].map((u) => Array.from(p.at(u).x)))"
    )
    smooth, jagged = np.array(x)
    assert np.abs(smooth[2] - jagged[2]).max() == 0 and np.abs(smooth[1] - jagged[1]).max() > 0.3
    data = np.reshape(value_of(page, "arrows", "pair.passages[0].x0"), (-1, 2))
    for ends, most in ((smooth[0], 0.08), (jagged[0], 0.12)):
        distance = np.linalg.norm(ends.reshape(-1, 1, 2) - data, axis=-1).min(1)
        assert (distance > 3 * STD).mean() < most


def test_network_learns_the_moons(page):
    """The slider trains as far as the reader wants to see, and scrubs the saved weights."""
    see(page, "learn-stage")
    until(page, "learn-title", "Not trained")
    x0 = np.array(value_of(page, "learn", "saved[0].x0"))
    assert np.abs(x0).max() > 1.5 and x0.std() == pytest.approx(1, abs=0.1)  # nothing is clipped
    set_value(page, "learn-place", 22)
    assert int(page.input_value("#learn-place")) < 22  # it shows what has been learnt
    until(page, "learn-title", "^Training step 908$")
    assert int(page.text_content("#learn-misses").rstrip("%")) < 50
    shown, names = [], ("learn-plane", "learn-curve")
    for place, title in ((22, "Training step 908"), (10, "Training step 188"), (0, "Not trained")):
        set_value(page, "learn-place", place)
        assert page.text_content("#learn-title") == title
        shown.append([pixels(page, name) for name in names])
    assert int(page.text_content("#learn-misses").rstrip("%")) > 80
    for last, first in zip(shown[0], shown[-1], strict=True):
        assert (last != first).any() and last.std() > 3
    page.click("#learn-play")
    page.wait_for_timeout(1000)
    assert page.get_attribute("#learn-play", "aria-label") == "Pause"
    assert page.text_content("#learn-title") == "Training step 1"
    page.click("#learn-play")


# ---- sections 3 to 6


def test_included_network_draws_what_python_draws(page):
    """The grid, and the expectation under the curtain."""
    network = sample.Network(SHIPPED, "cpu")
    see(page, "images")
    until_complete(page, "images")
    y = [k % 10 for k in range(15)]
    x_T = noise_of(page, 0, (15, 1, 32, 32))[0]
    np.testing.assert_allclose(images_at(page, 1), x_T, atol=1e-3)
    steps = steps_of_python(network, images_at(page, 1), y)
    for place, kind, expected in (
        (0, "x", steps[-1][2]),
        (0.8, "x0", steps[3][2]),
        (0.8, "x", steps[3][1]),
    ):
        np.testing.assert_allclose(images_at(page, place, kind=kind), expected, atol=2e-2)
    assert np.abs(tiles(page, "images-noisy", (1, 32, 32)) - to_pixels(steps[-1][2])).max() <= 3
    set_value(page, "images-curtain", 25)
    page.wait_for_timeout(1000)
    clip = page.locator("#images-expected").evaluate("e => getComputedStyle(e).clipPath")
    assert clip == "inset(0px 0px 0px 25%)"
    grid = page.locator("#images-grid")
    grid.click(position={"x": 8, "y": 8})  # a click chooses, and a drag moves the curtain
    assert page.input_value("#images-curtain") == "25"
    drag(page, "images-grid", (0.5, 0.1), (0.8, 0.1))
    assert page.input_value("#images-curtain") == "80"
    grid.click(position={"x": 8, "y": 8})
    film = tiles(page, "images-film", (1, 32, 32)).reshape(2, 11, 3, 32, 32)
    for row, kind in enumerate((1, 2)):
        for shown, step in zip(film[row], [*steps, (-1, *2 * steps[-1][2:])], strict=True):
            assert np.abs(shown - to_pixels(step[kind][0])).max() <= 3
    # the other way: the network's guess of pictures with noise
    value_of(page, "images", "gesture.moveTo(0.5)")
    until_true(page, lambda: value_of(page, "images", "expected.place === 0.5"))
    x = images_at(page, 0.5)
    abar = np.cumprod(1 - np.array(network.betas))[249]
    expected = (x - (1 - abar) ** 0.5 * network(x, 249, np.array(y))) / abar**0.5
    shown = tiles(page, "images-expected", (1, 32, 32))
    assert np.abs(shown - to_pixels(expected.astype(np.float32))).max() <= 3


def test_gesture_brings_new_pictures(page):
    """Dragged to noise and let go; from little noise, the pictures stay."""
    value_of(page, "images", "gesture.moveTo(0)")
    before = images_at(page, 0)
    for place, steps, isnew in ((0.2, 2, False), (1, 10, True)):  # fewer steps from less noise
        let_go(page, "images", place)
        assert page.text_content("#images-title") == f"Back in {steps} steps"  # at once
        until(page, "images-title", "Back from the noise")
        apart = np.sqrt(np.square(images_at(page, 0) - before).mean())
        assert (apart > 0.4) == isnew
    page.click("#use-clothes")  # noise is added to what has been drawn so far
    until_true(page, lambda: value_of(page, "images", "pictures.steps?.length > 2"))
    value_of(page, "images", "(gesture.stop(), gesture.moveTo(0.3), gesture.moveTo(0.9))")
    assert images_at(page, 0).std() > 0.2
    value_of(page, "images", "(gesture.moveTo(1), gesture.sendBack())")
    until(page, "images-title", "Back from the noise")


def test_settings_of_the_last_part(page):
    """Another sampler, other steps, and another seed: from the noise of this seed."""
    network = sample.Network(SHIPPED, "cpu")
    page.click("#paper summary")
    for name, value in (("sampler", "ddim"), ("steps", "5"), ("seed", "3")):
        page.locator(f"#settings [name={name}]").evaluate(
            "(e, value) => { e.value = value; }", value
        )
    page.click("#settings button")
    until_complete(page, "images")
    steps = steps_of_python(
        network, images_at(page, 1), [k % 10 for k in range(15)], steps=5, sampler="ddim"
    )
    np.testing.assert_allclose(images_at(page, 0), steps[-1][2], atol=2e-2)
    np.testing.assert_allclose(images_at(page, 1), noise_of(page, 3, (15, 1, 32, 32))[0], atol=1e-3)
    page.evaluate("document.getElementById('settings').reset()")  # the next network draws by these
    page.click("#paper summary")


BACK = "^Four results"


def from_level(page):
    return round(value_of(page, "drawing", "drawing.levelAt(drawing.from)"))


def test_drawing_comes_back(page):
    """After a stroke by itself, from where the slider was let go the last time."""
    see(page, "drawing")
    until_complete(page, "drawing")
    page.click("#draw-clear")
    assert pixels(page, "draw").min() == 255
    assert "old" in page.get_attribute("#draw-ends", "class")
    page.locator("#draw-pen").fill("1")  # red
    drag(page, "draw", (0.1, 0.2), (0.9, 0.2))
    painted = pixels(page, "draw")
    assert np.abs(painted[:, 6, 4:28].T - [229, 56, 59]).max() < 10
    picture = np.array(value_of(page, "drawing", "drawn()")).reshape(3, 32, 32)
    np.testing.assert_allclose(picture, painted / 127.5 - 1, atol=1e-2)
    page.wait_for_timeout(800)
    until(page, "drawing-text", BACK)
    assert from_level(page) == 359 and page.input_value("#drawing-place") == "600"  # it stays
    ends = images_at(page, 0, (4, 3, 32, 32), module="drawing")
    assert np.abs(ends[0] - ends[1]).mean() > 0.05
    drag(page, "draw", (0.1, 0.5), (0.9, 0.5))
    page.wait_for_timeout(800)
    value_of(page, "drawing", "(gesture.moveTo(0.6), gesture.sendBack(), gesture.stop())")
    let_go(page, "drawing", 0.15)  # also on the way back
    until(page, "drawing-text", BACK)
    assert from_level(page) == pytest.approx(22, abs=3)
    picture = np.array(value_of(page, "drawing", "drawn()")).reshape(3, 32, 32)
    ends = images_at(page, 0, (4, 3, 32, 32), module="drawing")
    assert np.abs(ends - picture).mean() < 0.12
    page.locator("#track-800:not(.old)").wait_for(state="attached")  # pen-up fills the track
    fills = [np.abs(pixels(page, f"track-{t}") - pixels(page, "draw")).mean() for t in (50, 800)]
    assert fills[0] < 30 and fills[1] > max(15, fills[0] + 10)
    page.click("#track-300")  # one of them is a level to come back from
    until(page, "drawing-text", BACK)
    assert from_level(page) == pytest.approx(300, abs=1)


def test_sections_do_not_wait_for_each_other(opened):
    """Section 3 comes into sight while section 5 works, and both end."""
    page = opened(motion="no-preference")
    settled(page, "() => window.ready")
    see(page, "drawing")
    until(page, "drawing-text", "The network removes")
    see(page, "images")
    drag(page, "images-grid", (0.5, 0.1), (0.8, 0.1))
    page.click("#use-clothes")  # again
    until(page, "images-title", "Back in 10 steps")
    drag(page, "draw", (0.2, 0.2), (0.8, 0.2))
    see(page, "images")
    until(page, "images-title", "Back from the noise")
    assert page.input_value("#images-curtain") == "80"  # it stays where the reader puts it
    see(page, "drawing")
    until(page, "drawing-text", BACK)
    assert pixels(page, "draw-ends").std() > 20 and pixels(page, "images-noisy").std() > 40


@pytest.mark.parametrize("width", [320, 390, 1280])
def test_layout(width, page):
    page.set_viewport_size({"width": width, "height": 660})
    page.evaluate("document.getElementById('paper').open = true")
    assert page.evaluate("document.scrollingElement.scrollWidth") <= width
    for name in ("scene", "arrows", "learn", "images", "drawing"):
        assert page.locator(f"#{name}-place").bounding_box()["width"] >= 90, name
    boxes = [page.locator(f"#arrows-{n}").bounding_box() for n in (1, 5)]
    assert len({box["y" if width < 800 else "x"] for box in boxes}) == 1 and boxes[0]["width"] >= 80
    controls = "[...document.querySelectorAll('input, select, button')]"
    unnamed = (
        "filter((e) => !e.hidden && !e.labels?.length && !e.ariaLabel && !e.textContent.trim())"
    )
    assert page.evaluate(f"{controls}.{unnamed}.length") == 0
    outside = "filter((e) => !e.closest('details') && !e.hidden)"
    assert page.evaluate(f"{controls}.{outside}.length") <= 14
    # a finger scrolls the page on the planes; only on the drawing it draws
    for name in ("arrows-50", "learn-plane", "images-grid"):
        assert "pan-y" in page.locator(f"#{name}").evaluate("e => getComputedStyle(e).touchAction")
    page.set_viewport_size({"width": 1280, "height": 900})
    page.evaluate("document.getElementById('paper').open = false")


def test_one_live_region_that_does_not_chatter(page):
    """What can be used is no image, and a way back is announced once."""
    assert page.locator("[role=status], [aria-live], output").count() == 1
    assert page.locator("canvas:not([role]):not([aria-hidden], [aria-hidden] *)").count() == 0
    assert page.locator("canvas[tabindex][role=img]").count() == 0
    page.evaluate("""() => {
        window.said = [];
        new MutationObserver(() => window.said.push(document.getElementById("live").textContent))
            .observe(document.getElementById("live"), {childList: true});
    }""")
    let_go(page, "arrows", 1)
    until(page, "arrows-50-miss", "miss the arcs")
    page.wait_for_timeout(1500)
    said = page.evaluate("window.said")
    assert 1 <= len(said) <= 2 and said[-1].startswith("Back from the noise")


def test_wrong_file_while_the_network_loads(opened, tmp_path):
    """It changes nothing: the included network draws as soon as it is there."""
    held = []
    page = opened({"emoji.onnx": lambda route: held.append(route)})
    (tmp_path / "text.onnx").write_bytes(b"hello, world")
    assert "is not a model" in choose(page, tmp_path / "text.onnx")
    until_true(page, lambda: held)
    # from some noise, the opening waits for its network, because the recording is from the noise
    value_of(page, "opening", "(gesture.moveTo(0.3), gesture.sendBack(true), gesture.stop())")
    page.wait_for_timeout(500)
    assert not value_of(page, "opening", "pictures.isComplete")
    drag(page, "draw", (0.1, 0.9), (0.9, 0.9))  # on the face, which needs no network
    assert pixels(page, "draw")[2, 16, 16] < 80
    for route in held:
        route.continue_()
    settled(page, "() => window.ready")
    until_complete(page)
    first, jump = (value_of(page, "opening", f"pictures.{it}") for it in ("x0", "at(0).x"))
    assert np.corrcoef(first, jump)[0, 1] > 0.9
    see(page, "images")
    until(page, "images-title", "Back from the noise")
    see(page, "drawing")
    until(page, "drawing-text", BACK)


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
        assert page.text_content("#images-title") != "No network"
    value_of(page, "images", "gesture.moveTo(1)")  # the model before is still there
    value_of(page, "images", "gesture.sendBack()")
    until_complete(page, "images")
    value_of(page, "images", "gesture.sendBack()")  # ends when another model is opened
    page.set_input_files("#model", exported / "model.onnx")
    until(page, "own-status", "^model.onnx draws in sections 3 and 5")
    assert page.text_content("#use-own") == "model.onnx"
    assert page.get_attribute("#use-own", "aria-pressed") == "true"
    assert page.evaluate("document.getElementById('images').getBoundingClientRect().top") < 300
    until_complete(page, "images")
    network = sample.Network(exported / "model.onnx", "cpu")
    shape = (15, *network.shape)
    steps = steps_of_python(network, images_at(page, 1, shape))
    np.testing.assert_allclose(images_at(page, 0, shape), steps[-1][2], atol=2e-2)
    assert np.ptp(tiles(page, "images-noisy", network.shape), axis=1).max() > 50  # in colour
    see(page, "drawing")
    until(page, "drawing-text", BACK)
    choose(page, SHIPPED)  # a grey one, for which a drawing is grey
    assert pixels(page, "draw").max() == 0
    assert value_of(page, "drawing", "drawn()") == [-1] * 1024
    page.click("#use-clothes")  # back to the included network
    until(page, "images-title", "Back from the noise")


def test_emoji(page):
    """The second network, in section 3."""
    page.click("#use-emoji")
    see(page, "images")
    until(page, "images-about", "3,743 emoji")
    until(page, "images-title", "Back in 10 steps")
    assert np.ptp(tiles(page, "images-noisy", (3, 32, 32)), axis=1).max() > 50
    until(page, "images-title", "Back from the noise")
    network, shape = sample.Network(EMOJI, "cpu"), (15, 3, 32, 32)
    kinds = [network.classes.index(name) for name in ("smileys", "people", "flags")]
    steps = steps_of_python(network, images_at(page, 1, shape), kinds * 5)
    assert np.abs(images_at(page, 0, shape) - steps[-1][2]).mean() < 2e-2
    page.click("#use-clothes")


def test_guidance_and_its_cost(page):
    """Nine smileys from the same noise, as in Python; more guidance, less variety."""
    see(page, "guidance")
    with Image.open(PAGE / "smileys.webp") as image:
        rows = np.array(image.convert("RGB"), int).reshape(6, 32, 9, 32, 3).transpose(0, 2, 4, 1, 3)
    *sets, without, answer = rows
    x = [(1 - nine / 127.5).std(0) for nine in sets]
    shares = [round(100 * np.sqrt((it**2).mean() / (x[0] ** 2).mean())) for it in x]
    assert shares[3] < 80
    network = sample.Network(EMOJI, "cpu")
    smileys, noise = [network.classes.index("smileys")] * 9, noise_of(page, 5, (9, 3, 32, 32))[0]
    ways = [steps_of_python(network, noise, smileys, w) for w in (0, 4)]
    t, x, guess = ways[0][4]  # about this noisy picture, the network is asked twice
    abar = np.cumprod(1 - np.array(network.betas))[t]
    other = np.clip((x - (1 - abar) ** 0.5 * network(x, t)) / abar**0.5, -1, 1)
    drawn = (ways[0][-1][2], ways[1][-1][2], other, guess)
    for recorded, expected in zip((sets[0], sets[3], without, answer), drawn, strict=True):
        assert np.abs(recorded - to_pixels(expected)).mean() < 0.5
    for k, w, chosen in ((0, 0, 2), (3, 4, 7)):
        page.locator("#strip-place").fill(str(k))
        assert np.abs(tiles(page, f"strip-{k}", (3, 32, 32)) - sets[k]).max() <= 1
        box = page.locator(f"#strip-{k}").bounding_box()
        x, y = ((at + 0.5) * box["width"] / 3 for at in (chosen % 3, chosen // 3))
        page.click(f"#strip-{k}", position={"x": x, "y": y})
        shown = {"without": without, "with": answer, "difference": answer - without + 127.5}
        shown["guided"] = answer + w * (answer - without)
        for name, expected in shown.items():
            expected = np.clip(expected, 0, 255)
            assert np.abs(pixels(page, f"strip-{name}") - expected[chosen]).max() <= 1
        said = page.get_attribute("#strip-place", "aria-valuetext")
        assert f"{20 if k else 10} runs of the network" in said and f"variety {shares[k]}%" in said
    page.press("#strip-place", "ArrowDown")  # chooses the next smiley
    assert np.abs(pixels(page, "strip-with") - answer[8]).max() <= 1


def test_without_a_connection(opened):
    """And without a copy of the runtime, sections 1 and 2 work."""
    page = opened(dict.fromkeys([OUTSIDE, COPY], lambda route: route.abort()))
    settled(page, "() => window.ready")
    said = page.text_content("#images-text")
    assert page.text_content("#images-title") == "No network"
    assert "Sections 1 and 2 work in full" in said and said.endswith(INSTALL)
    see(page, "learn-stage")
    until(page, "learn-title", "Not trained")


def test_onnxruntime_comes_from_jsdelivr_where_there_is_no_copy(opened):
    """Where there is one, as for the other tests, nothing comes from outside."""
    version, asked = json.loads((RUNTIME / "package.json").read_text("utf-8"))["version"], set()
    assert f"onnxruntime-web@{version}" == VERSION

    def outside(route):
        folder, name = route.request.url.rsplit("/", 1)
        asked.add(folder)
        route.fulfill(path=RUNTIME / "dist" / name, headers={"Access-Control-Allow-Origin": "*"})

    page = opened({OUTSIDE: outside, COPY: lambda route: route.fulfill(status=404)})
    settled(page, "() => window.ready")
    assert page.text_content("#images-title") != "No network"
    assert asked == {f"https://cdn.jsdelivr.net/npm/{VERSION}/dist"}
