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
from networks import onnx_file
from PIL import Image

import sample
from ddpm import Diffusion, linear_betas
from docs.make_figures import page_noise
from extras.exact import exact_network
from sample import to_pixels

pytest.importorskip("playwright", reason="the page's tests need playwright")
from docs.record_page import CHROMIUM, browser_and_address

PAGE = HERE / "page"
SHIPPED = PAGE / "fashion-mnist.onnx"
RUNTIME = PAGE / "node_modules" / "onnxruntime-web"
VERSION = re.search(r"onnxruntime-web@[0-9.]+", (PAGE / "network.js").read_text("utf-8"))[0]
INSTALL = f"npm install --no-save --no-package-lock --prefix page {VERSION}"
pytestmark = [
    pytest.mark.xdist_group("page"),
    pytest.mark.page,
    pytest.mark.skipif(CHROMIUM is None, reason="the page's tests need Chromium"),
    pytest.mark.skipif(not RUNTIME.is_dir(), reason=f"run: {INSTALL}"),
]
EMOJI = PAGE / "emoji.onnx"
STD = 0.02  # of the points, as in page/points.js
OUTSIDE, COPY = "^(?!http://127.0.0.1)", "/node_modules/"  # addresses
FASTER = """const ask = requestAnimationFrame;
window.requestAnimationFrame = (call) => ask((now) => call(3 * now));"""  # what moves by itself


@pytest.fixture(scope="module")
def opened():
    """A function that opens the page, served as `python -m http.server -d page` does, in a new tab.

    routes: what handles some of its requests. Without any, no console may show an error, and the
    page may not ask for anything from outside. motion: what the reader prefers; by default, none.
    """
    said, tabs = [], []

    def refuse(route):
        said.append(route.request.url)
        route.abort()

    def call(routes=None, motion="reduce", keep=False):
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
        page.add_init_script(FASTER)
        page.goto(address)
        page.wait_for_function("window.sections")
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


def until_true(page, call):
    """Call again and again until the result is true. Returns it."""
    end = time.monotonic() + 300
    while not (value := call()):
        assert time.monotonic() < end
        page.wait_for_timeout(20)
    return value


def settled(page, function, *args):
    """What an async function gives. The browser may collect a promise that Playwright waits for."""
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
    """What a function of the page's modules returns; arrays become lists."""
    modules = "sampler, points, trainer, network"
    return settled(
        page,
        f"""async (args) => {{
            const load = (name) => import(`./${{name}}.js`), names = "{modules}".split(", ");
            const [{modules}] = await Promise.all(names.map(load));
            return ({function})(...JSON.parse(args));
        }}""",
        json.dumps(args, default=lambda array: array.ravel().tolist()),
    )


def until(page, name, pattern):
    """Wait until the text of an element matches. Returns the text."""
    page.locator(f"#{name}", has_text=re.compile(pattern)).wait_for(state="attached")
    return page.text_content(f"#{name}")


def value_of(page, name, code):
    """What an expression with the timeline of a section gives, and with what moves there."""
    load = f"const gesture = window.sections.{name}, [passage] = gesture.passages ?? []"
    return settled(page, f"async () => {{ {load}; return {code}; }}")


def images_at(page, place, shape=(15, 1, 32, 32), kind="x", name="images"):
    """The pictures of a section at a place: x_t, or the estimate x0."""
    code = f"passage.at({place}).{kind}"
    return np.array(value_of(page, name, code), np.float32).reshape(shape)


def until_complete(page, name):
    """Wait until the way back of a section is known."""
    until_true(page, lambda: value_of(page, name, "gesture.passages.every((p) => p.result)"))


def caption(page, name, pattern):
    """Wait until the caption of a section matches. Returns it."""
    shown = page.locator(f"#{name}-words .shown", has_text=re.compile(pattern))
    shown.wait_for(state="attached")
    return shown.text_content()


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


def see(page, name):
    page.evaluate(f"document.getElementById('{name}').scrollIntoView()")


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


def noise_of(page, seed, shape):
    """What the page draws for images of the shape (B, ...)."""
    z = js(page, "sampler.noiseOf", seed, shape[0], int(np.prod(shape[1:])))
    return np.array(z, np.float32).reshape(shape)


def steps_of_python(network, x_T, y=None, w=0):
    """(t, x_t, x0_hat) of one step after the other in Python."""
    eps = network if y is None else sample.guided(network, np.array(y), w)
    return network.reverse(eps, lambda: x_T, steps=10, sampler="ddim")


# -------------------------------------------------------------------------------------- the numbers


SAMPLE = """async (xT, betas, steps, clip) => {
    const eps = (x, t) => x.map((value) => value + Math.sin(3 * value + t)), found = [];
    for await (const step of sampler.reverse(eps, xT, betas, steps, clip)) found.push(step);
    return found;
}"""
BETAS = np.linspace(1e-3, 0.2, 40)
NOISES = np.random.default_rng(0).normal(0, 3, (2, 18)).astype(np.float32)  # x0 is clipped


@pytest.mark.parametrize("steps, clip", [(40, True), (39, False), (7, True), (1, True)])
def test_reverse_process_is_that_of_sample_py(steps, clip, page):
    x_T, options = NOISES[0], dict(steps=steps, sampler="ddim", clip=clip)
    eps = lambda x, t: (x + np.sin(3 * x + t)).astype(np.float32)  # noqa: E731
    expected = list(sample.reverse(eps, lambda: x_T, BETAS, **options))
    theirs = js(page, SAMPLE, x_T, BETAS, steps, clip)
    for (t, x, x0), step in zip(expected, theirs, strict=True):
        assert t == step["t"]
        np.testing.assert_allclose(step["x"], x, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(step["x0"], x0, rtol=1e-4, atol=1e-4)


def test_noise_is_normal_and_of_one_image_each(page):
    z = noise_of(page, 0, (8, 25_000))
    assert abs(z.mean()) < 0.01 and abs(z.var() - 1) < 0.02 and abs((z**4).mean() - 3) < 0.1
    assert np.abs(np.corrcoef(z) - np.eye(8)).max() < 0.03
    np.testing.assert_array_equal(noise_of(page, 0, (1, 25_000)), z[:1])
    assert np.abs(noise_of(page, 1, (1, 25_000)) - z[0]).mean() > 0.5
    theirs = noise_of(page, 5 * 2**32 + 7, (2, 1024))[1]  # as docs/make_figures.py draws it
    np.testing.assert_allclose(theirs, page_noise(5 * 2**32 + 7, 1, 1024), atol=1e-6)


EPS = """async (content, x, times) => {
    const bytes = Uint8Array.from(atob(content), (letter) => letter.charCodeAt(0));
    const opened = await network.open("model.onnx", bytes), eps = [];
    for (const t of times) eps.push(await opened.eps(Float32Array.from(x), t));
    opened.close();
    return {...opened, eps};
}"""


@pytest.mark.parametrize("name", ["shipped", "emoji", "plain"])
def test_eps_is_pythons(name, page, tmp_path):
    path = {"shipped": SHIPPED, "emoji": EMOJI}.get(name, tmp_path / "plain.onnx")
    (tmp_path / "plain.onnx").write_bytes(onnx_file(classes=False))
    network, times = sample.Network(path, "cpu"), [0, 300, 999]
    metadata, shape = network.session.get_modelmeta().custom_metadata_map, (3, *network.shape)
    x = np.random.default_rng(0).standard_normal(shape, np.float32)
    atol = 1e-2 if name == "emoji" else 1e-4  # its weights are of 16 bits
    theirs = js(page, EPS, base64.b64encode(path.read_bytes()).decode(), x, times)
    for t, their_eps in zip(times, theirs["eps"], strict=True):
        np.testing.assert_allclose(their_eps, network(x, t).ravel(), atol=atol)
    assert theirs["shape"] == [*network.shape] and theirs["classes"] == network.classes
    assert theirs["betas"] == json.loads(metadata["ddpm.betas"])


TRAIN = """(batches, levels) => {
    const learner = new trainer.Trainer(), start = learner.parameters.map((p) => p.slice());
    for (const batch of batches) learner.step(batch);
    const eps = levels.map((t) => trainer.epsOf(learner.average, batches[0].x0, t));
    return [start, learner.parameters, learner.average, eps];
}"""


def test_training_takes_the_steps_of_torch(page):
    """Algorithm 1: the gradient of the loss, Adam, the average, and eps of the averaged network."""
    torch.manual_seed(0)
    batches = [
        {"x0": torch.randn(9, 2, 1, 1) / 2, "noise": torch.randn(9, 2, 1, 1),
         "t": torch.cat([torch.tensor([0, 1]), torch.randint(1000, (7,))])}
        for _ in range(12)
    ]  # fmt: skip
    levels = [0, 30, 999]
    start, last, average, eps = js(page, TRAIN, batches, levels)
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

    for k, batch in enumerate(batches):
        optimizer.param_groups[0]["lr"] = 0.012 / (1 + k / 1000)
        optimizer.zero_grad()
        x0, noise, t = batch.values()
        diffusion.loss(eps_of(parameters), x0, t, noise).backward()
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


# ------------------------------------------------------------------------------------- its promises


def test_opening_without_a_connection(opened):
    """And without ONNX Runtime: it repeats until it is stopped, and comes back as recorded."""
    page = opened(dict.fromkeys([OUTSIDE, COPY], lambda r: r.abort()), motion="no-preference")
    settled(page, "() => window.ready")
    page.wait_for_function("window.sections.opening.round > 1", timeout=60_000)
    first = images_at(page, 0, (12, 3, 32, 32), name="opening")
    half = "(gesture.stop(), gesture.moveTo(0), gesture.moveTo(0.5))"
    remove, stop = (
        page.get_by_role("button", name=name, exact=True) for name in ("Remove the noise", "Stop")
    )
    value_of(page, "opening", half)
    remove.click()
    stop.click()
    at = page.input_value("#scene-place")
    page.wait_for_timeout(300)
    assert page.input_value("#scene-place") == at
    value_of(page, "opening", half)
    remove.click()
    caption(page, "scene", "this way back is a recording")
    assert value_of(page, "opening", "passage.from") == 1  # it begins with only noise
    caption(page, "scene", "^New pictures")
    with Image.open(PAGE / "recorded.webp") as image:
        rows = np.array(image.convert("RGB"), int).reshape(11, 32, 12, 32, 3)
    shown = tiles(page, "scene-pictures", (3, 32, 32)).transpose(2, 0, 3, 1)
    assert np.abs(shown - rows[-1]).max() <= 1 and np.abs(first).mean() > 0.3
    said = caption(page, "images", "^No network")
    assert "Connect to the internet" in said and "npm" not in said and page.is_hidden("#drawing")


def test_opening_goes_to_noise_and_back(page):
    """By (4); the first way back is recorded, and the network draws what follows."""
    shape, go = (12, 3, 32, 32), "gesture.sendBack(), gesture.stop(), gesture.place = 0"
    first, half, noise = (images_at(page, u, shape, name="opening") for u in (0, 0.5, 1))
    abar, last = Diffusion(linear_betas()).alphas_bar[[249, 999]].tolist()
    eps = noise_of(page, 0, shape)
    np.testing.assert_allclose(half, abar**0.5 * first + (1 - abar) ** 0.5 * eps, atol=1e-4)
    np.testing.assert_allclose(noise, last**0.5 * first + (1 - last) ** 0.5 * eps, atol=1e-4)
    network = sample.Network(EMOJI, "cpu")
    kinds = [network.classes.index(name) for name in ("smileys", "people", "flags")]
    y = [kinds[(k + k // 6 + 1) % 3] for k in range(12)]
    value_of(page, "opening", f"(gesture.moveTo(1), {go})")
    result, guess = (
        images_at(page, u, shape, kind, "opening") for u, kind in ((0, "x"), (1, "x0"))
    )
    first = next(steps_of_python(network, noise, y, 1))[2]
    assert np.abs(guess - first).mean() < 0.08  # the recording is compressed
    value_of(page, "opening", "gesture.moveTo(1)")
    x_T = images_at(page, 1, shape, name="opening")
    assert np.abs(images_at(page, 0, shape, name="opening") - result).max() < 1e-3
    value_of(page, "opening", "(gesture.sendBack(), gesture.stop())")
    until_true(page, lambda: value_of(page, "opening", "passage.steps.length"))
    first = next(steps_of_python(network, x_T, y, 1))[2]
    assert np.abs(images_at(page, 1, shape, "x0", "opening") - first).mean() < 1e-2
    # half of a way back is no data: noise is added to what was there before
    value_of(page, "opening", "(gesture.place = 0.2, gesture.moveTo(0.35))")
    assert np.abs(images_at(page, 0, shape, name="opening") - result).max() < 1e-3


def test_opening_by_hand_and_by_keyboard(page):
    """A drag of the slider brings it back; of the slider's keys, Enter lets go. It is said once."""
    page.evaluate("scrollTo(0, 0)")
    value_of(page, "opening", "(gesture.stop(), gesture.moveTo(0))")
    page.evaluate("""() => {
        window.said = [];
        new MutationObserver(() => window.said.push(document.getElementById("live").textContent))
            .observe(document.getElementById("live"), {childList: true});
    }""")
    let_go(page, "scene", 0.4)
    caption(page, "scene", "^Back in many steps")
    caption(page, "scene", "^Similar pictures")
    page.wait_for_timeout(1500)
    said = page.evaluate("window.said")
    assert len(said) == 1 and said[0].startswith("Similar pictures")
    page.press("#scene-place", "PageUp")
    caption(page, "scene", "^Noise is added")
    page.press("#scene-place", "Enter")
    caption(page, "scene", "^Back in many steps")
    value_of(page, "opening", "gesture.stop()")


def test_finger_that_scrolls_moves_nothing_else(opened):
    """A finger that moves upwards scrolls the page, also on a slider or a plane; a tap acts."""
    page = opened()
    page.set_viewport_size({"width": 390, "height": 844})
    cdp = page.context.new_cdp_session(page)
    cdp.send("Emulation.setTouchEmulationEnabled", {"enabled": True})

    def touch(name, rise):
        page.evaluate(f"document.getElementById('{name}').scrollIntoView({{block: 'center'}})")
        top, box = page.evaluate("scrollY"), page.locator(f"#{name}").bounding_box()
        x, y = box["x"] + 0.7 * box["width"], box["y"] + box["height"] / 2
        moves = [("touchMove", y - k) for k in range(0, rise, 20)]
        for kind, at in [("touchStart", y), *moves, ("touchEnd", None)]:
            points = [] if at is None else [{"x": x, "y": at}]
            cdp.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
        page.wait_for_timeout(500)
        return page.evaluate("scrollY") - top > 50, pixels(page, "arrows-tile").tolist()

    value_of(page, "arrows", "gesture.moveTo(0)")
    before = touch("scene-place", 200)
    assert before[0] and page.input_value("#scene-place") == "0"
    touch("scene-place", 0)
    caption(page, "scene", "^Back in many steps")
    assert touch("arrows-50", 200) == before and page.input_value("#arrows-place") == "0"
    assert touch("arrows-50", 0) != (False, before[1])


def test_dots_go_to_noise_and_back(page):
    """By the forward process (4), then by the exact arrows; in one step, to the mean."""
    at = lambda place, plane=0: np.reshape(  # noqa: E731
        value_of(page, "arrows", f"gesture.passages[{plane}].at({place}).x"), (-1, 2)
    )
    value_of(page, "arrows", "gesture.moveTo(0)")
    data, half, noise = (at(place) for place in (0, 0.5, 1))  # 0.5 is t = 249
    moons, diffusion = torch.tensor(data).float()[..., None, None], Diffusion(linear_betas())
    abar, last = diffusion.alphas_bar[[249, 999]].tolist()
    eps = (noise - last**0.5 * data) / (1 - last) ** 0.5
    np.testing.assert_allclose(half, abar**0.5 * data + (1 - abar) ** 0.5 * eps, atol=1e-4)
    value_of(page, "arrows", "(gesture.moveTo(1), gesture.sendBack(), gesture.stop())")
    until_complete(page, "arrows")
    exact = exact_network(diffusion, moons, std=STD)
    chain = sample.reverse(
        lambda x, t: exact(x, torch.full((240,), t)), lambda: torch.tensor(noise).view(-1, 2, 1, 1),
        diffusion.betas.numpy(), steps=50, sampler="ddim", clip=False,
    )  # fmt: skip
    ends = list(chain)[-1][2].flatten(1).numpy()
    assert np.median(np.abs(at(0) - ends)) < 1e-2
    nearest = np.linalg.norm(at(0)[:, None] - data, axis=-1)
    assert (nearest.min(1) < 3 * STD).mean() > 0.9
    assert np.abs(at(0, 2) - data.mean(0)).max() < 0.05
    value_of(page, "arrows", "(gesture.place = 0, gesture.render())")
    until(page, "arrows-1-miss", "miss")
    shares = [int(page.text_content(f"#arrows-{n}-miss").split("%")[0]) for n in (1, 5, 50)]
    assert shares[0] > 95 and shares[1] > shares[2] < 8
    caption(page, "arrows", "^Back from the noise")


def test_dot_that_is_pulled(page):
    """It has other noise in each plane, and comes back."""
    value_of(page, "arrows", "(gesture.stop(), gesture.moveTo(0.6))")
    assert pixels(page, "arrows-50").std() > 5
    x, y = value_of(page, "arrows", "passage.at(0.6).x.slice(128, 130)")
    box = page.locator("#arrows-50").bounding_box()
    place = (0.5 + x / 3 * box["height"] / box["width"], 0.5 - y / 3)
    drag(page, "arrows-50", place, (0.5, 0.5))
    after = "gesture.passages.map((p) => Array.from(p.at(0.6).x))"
    after = np.array(value_of(page, "arrows", after))
    assert np.abs(after[:, 128:130]).max() < 0.05 and np.ptp(after, axis=0).max() == 0
    assert "may have come from" in caption(page, "arrows", "^The white dot")
    caption(page, "arrows", "^Back from the noise")
    x, y = value_of(page, "arrows", "passage.result.slice(128, 130)")
    tile = pixels(page, "arrows-tile")[0, 0]
    assert np.abs(tile - to_pixels(np.array([x, y], np.float32))).max() <= 1


def test_no_other_value_is_written_to_a_slider_that_is_dragged(page):
    """Otherwise, WebKit does not fire `change` at the end of the drag, and nothing comes back."""
    page.evaluate("""() => {
        const slider = document.getElementById("arrows-place"), move = slider.oninput;
        const its = Object.getOwnPropertyDescriptor(HTMLInputElement.prototype, "value");
        slider.oninput = () => {
            window.values = [its.get.call(slider)];
            Object.defineProperty(slider, "value", {get: its.get, configurable: true, set(value) {
                its.set.call(this, value);
                window.values.push(its.get.call(this));
            }});
            move();
            delete slider.value;
        };
    }""")
    let_go(page, "arrows", 0.5)
    caption(page, "arrows", "^Back from the noise")
    assert len(page.evaluate("window.values")) > 1 and len(set(page.evaluate("window.values"))) == 1


def test_network_learns_the_moons(page):
    """It trains while it is seen, and the slider scrubs what is trained."""
    see(page, "learn-stage")
    caption(page, "learn", "^Not trained")
    page.fill("#learn-place", str(1000))
    assert int(page.input_value("#learn-place")) < 500  # it shows what has been learnt, and goes on
    trained = "document.getElementById('learn-place').style.getPropertyValue('--from') >= 0.25"
    page.wait_for_function(trained)
    shown = []
    for place, title, misses in ((250, "^Training step 188", 80), (0, "^Not trained", 100)):
        page.fill("#learn-place", str(place))
        caption(page, "learn", title)
        shown.append(pixels(page, "learn-plane"))
        assert misses - 30 < int(page.text_content("#learn-misses").rstrip("%")) < misses
    assert (shown[0] != shown[-1]).any() and shown[0].std() > 3
    page.click("#learn-play")  # the first step is shown slowly
    for phase in ("Noise moves a clean dot", "sees only the noisy dot", "is corrected a little"):
        caption(page, "learn", phase)
    page.click("#learn-play")


def test_included_network_draws_what_python_draws(page):
    """The pictures, at once where the reader prefers no motion, and the guess under the curtain."""
    network = sample.Network(SHIPPED, "cpu")
    see(page, "images-stage")
    caption(page, "images", "^Back from the noise")
    assert page.input_value("#images-place") == "0"
    x_T = noise_of(page, 0, (15, 1, 32, 32))
    np.testing.assert_allclose(images_at(page, 1), x_T, atol=1e-3)
    steps = list(steps_of_python(network, images_at(page, 1)))
    for t, x, x0 in steps:
        place = ((t + 0.999) / 1000) ** 0.5
        np.testing.assert_allclose(images_at(page, place, kind="x0"), x0, atol=2e-2)
        np.testing.assert_allclose(images_at(page, place), x, atol=2e-2)
    assert np.abs(tiles(page, "images-noisy", (1, 32, 32)) - to_pixels(steps[-1][2])).max() <= 3
    drag(page, "images-curtain", (0.5, 0.1), (0.8, 0.1))
    assert int(page.input_value("#images-curtain")) == pytest.approx(80, abs=2)
    value_of(page, "images", "gesture.moveTo(0.8)")  # the guess at pictures with noise
    x, abar = images_at(page, 0.8), np.cumprod(1 - np.array(network.betas))[639]
    expected = (x - (1 - abar) ** 0.5 * network(x, 639)) / abar**0.5
    apart = lambda: np.abs(tiles(page, "images-expected", (1, 32, 32)) - to_pixels(expected))  # noqa: E731
    until_true(page, lambda: apart().max() <= 3)


def test_word_of_the_emoji(page):
    """None, weak and strong: without a class, with it, and with guidance, as in Python."""
    page.click("#use-emoji")
    see(page, "images-stage")
    network, shape = sample.Network(EMOJI, "cpu"), (15, 3, 32, 32)
    y = np.repeat([network.classes.index(name) for name in ("smileys", "people", "flags")], 5)
    for word, given in (("weak", (y, 0)), ("none", ()), ("strong", (y, 3))):
        page.click(f"#word-{word}")
        see(page, "images-stage")
        until_true(page, lambda: value_of(page, "images", "passage.steps?.length"))
        expected = next(steps_of_python(network, images_at(page, 1, shape), *given))[2]
        assert np.abs(images_at(page, 1, shape, "x0") - expected).mean() < 1e-2
    caption(page, "images", "exaggerated.*twice the work")
    # before anything has come back, there is only noise, from which the way back begins
    page.click("#word-weak")
    value_of(page, "images", "(gesture.stop(), gesture.moveTo(0.6), gesture.letGo())")
    assert value_of(page, "images", "passage.from") == 1
    page.click("#use-clothes")
    assert page.is_hidden("#word-weak")


def test_drawing_comes_back(page):
    """After a stroke by itself, from where the slider was let go the last time."""
    see(page, "drawing-stage")
    until_complete(page, "drawing")
    page.click("#draw-clear")
    assert pixels(page, "draw").min() == 255
    assert "old" in page.get_attribute("#draw-ends", "class")
    page.get_by_role("button", name="Red").click()
    drag(page, "draw", (0.1, 0.2), (0.9, 0.2))
    painted = pixels(page, "draw")
    assert np.abs(painted[:, 6, 4:28].T - [229, 56, 59]).max() < 10
    data = np.array(value_of(page, "drawing", "passage.x0")).reshape(4, 3, 32, 32)
    np.testing.assert_allclose(data, 4 * [painted / 127.5 - 1], atol=1e-2)
    caption(page, "drawing", "^Four results")
    assert value_of(page, "drawing", "passage.from") == 0.6
    assert page.input_value("#drawing-place") == "600"  # it stays
    ends = images_at(page, 0, (4, 3, 32, 32), name="drawing")
    assert np.abs(ends[0] - ends[1]).mean() > 0.05
    let_go(page, "drawing", 0.15)
    caption(page, "drawing", "^Four results")
    assert value_of(page, "drawing", "passage.from") == pytest.approx(0.15, abs=0.02)
    assert np.abs(images_at(page, 0, (4, 3, 32, 32), name="drawing") - data).mean() < 0.12


@pytest.mark.parametrize("width", [320, 390, 768, 1280])
def test_layout(width, page):
    page.set_viewport_size({"width": width, "height": 844})
    page.evaluate("scrollTo(0, 0)")
    assert page.evaluate("document.scrollingElement.scrollWidth") <= width
    for name in ("scene-pictures", "scene-place", "scene-play"):  # on the first screen
        box = page.locator(f"#{name}").bounding_box()
        assert (box["x"] + box["width"] <= width and box["y"] + box["height"] <= 844) or width < 390
    for pen in page.locator("#draw-pens button").all():
        assert pen.bounding_box()["width"] > (24 if width < 390 else 40)
    for name in ("scene", "arrows", "learn", "images", "drawing"):  # no caption moves a slider
        assert page.locator(f"#{name}-place").bounding_box()["width"] >= 90, name
        tops = """(box) => [...box.children].map((its) => {
            for (const other of box.children) other.classList.toggle("shown", other === its);
            return document.body.scrollHeight;
        })"""
        assert len(set(page.locator(f"#{name}-words").evaluate(tops))) == 1, name
    unnamed = "(e) => !e.hidden && !e.labels?.length && !e.ariaLabel && !e.textContent.trim()"
    find = f"[...document.querySelectorAll('input, button')].filter({unnamed}).length"
    assert page.evaluate(find) == 0
    page.set_viewport_size({"width": 1280, "height": 900})


def test_other_files_and_then_another_model(opened, tmp_path):
    """What is not a model leaves the one before; another model replaces it."""
    page = opened()
    settled(page, "() => window.ready")
    model, plain = SHIPPED.read_bytes(), tmp_path / "plain.onnx"
    plain.write_bytes(onnx_file(classes=False))
    changed = onnx.load_from_string(model)
    (answer,) = (p for p in changed.metadata_props if p.key == "ddpm.eps_of_example")
    answer.value = json.dumps([-value for value in json.loads(answer.value)])
    for name, content, what in (
        ("changed.onnx", changed.SerializeToString(), "an eps that is wrong by 200 %"),
        ("text.onnx", b"hello, world", "its metadata lacks ddpm.betas"),
        ("half.onnx", model[: len(model) // 2], "its metadata lacks ddpm.betas"),
        ("only.onnx", model[-len(model) // 50 :], ""),
    ):
        (tmp_path / name).write_bytes(content)
        said = choose(page, tmp_path / name)
        assert said.startswith(f"{name} is not a model from export.py") and what in said
        assert "error" in page.get_attribute("#own-status", "class")
    page.set_input_files("#model", plain)
    until(page, "own-status", "^plain.onnx draws in sections 3 and 4")
    assert page.get_attribute("#use-own", "aria-pressed") == "true"
    see(page, "images-stage")
    until_complete(page, "images")
    network, shape = sample.Network(plain, "cpu"), (15, 3, 4, 4)
    *_, last = steps_of_python(network, images_at(page, 1, shape))
    np.testing.assert_allclose(images_at(page, 0, shape), last[2], atol=2e-2)
    see(page, "drawing-stage")
    caption(page, "drawing", "^Four results")
    choose(page, SHIPPED)  # a grey one, for which a drawing is grey
    assert pixels(page, "draw").max() == 0


def test_onnxruntime_comes_from_jsdelivr_where_there_is_no_copy(opened):
    """Where there is one, as for the other tests, nothing comes from outside."""
    asked = set()

    def outside(route):
        folder, name = route.request.url.rsplit("/", 1)
        asked.add(folder)
        route.fulfill(path=RUNTIME / "dist" / name, headers={"Access-Control-Allow-Origin": "*"})

    page = opened({OUTSIDE: outside, COPY: lambda route: route.fulfill(status=404)})
    page.click("#use-emoji")  # before any network is there
    settled(page, "() => window.ready")
    assert page.get_attribute("#use-emoji", "aria-pressed") == "true"
    assert asked == {f"https://cdn.jsdelivr.net/npm/{VERSION}/dist"}
