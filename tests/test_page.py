"""The page page/index.html, in a real browser: its numbers, its gestures and its faults."""

import base64
import glob
import io
import json
import os
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
from conftest import HERE
from PIL import Image

import sample
from ddpm import Diffusion, linear_betas
from docs.make_figures import page_noise
from extras.exact import exact_network

pytest.importorskip("playwright", reason="the page's tests need playwright")
from docs.record_page import BROWSERS, browser_and_address, served

webdriver = pytest.importorskip("selenium.webdriver", reason="the page's tests need selenium")
PAGE = HERE / "page"
FILES = {"clothes": PAGE / "fashion-mnist.onnx", "emoji": PAGE / "emoji.onnx"}
RUNTIME = PAGE / "node_modules" / "onnxruntime-web"
VERSION = re.search(r"onnxruntime-web@[0-9.]+", (PAGE / "network.js").read_text("utf-8"))[0]
runs = pytest.mark.skipif(not RUNTIME.is_dir(), reason=f"needs {VERSION}; see .ci/run")
pytestmark = [pytest.mark.page, runs]
OUTSIDE, COPY = "^(?!http://127.0.0.1)", "/node_modules/"  # addresses
FASTER = """const ask = requestAnimationFrame;
window.requestAnimationFrame = (call) => ask((now) => call(3 * now));"""  # what moves by itself
WAY = dict(steps=10, sampler="ddim")  # of the pictures


def missing(browser):
    """Skip the test, because a browser is not installed; in CI, it fails."""
    (pytest.fail if os.environ.get("CI") else pytest.skip)(f"{browser} is not installed")


ENGINES = [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in BROWSERS]


@pytest.fixture(scope="module", params=ENGINES)
def engine(request):
    return request.param if BROWSERS[request.param] else missing(request.param)


@pytest.fixture(scope="module")
def opened(engine):
    """A function that opens the page, and closes those of earlier tests, which would take time.

    routes: what handles some requests. Without any, it asks for nothing from outside. options: of
    the page. In Chromium, readers prefer no motion by default; in Firefox, always."""
    said = []
    refuse = lambda route: (said.append(route.request.url), route.abort())  # noqa: E731

    def call(routes=None, used=True, **options):
        for context in browser.contexts:
            context.close()
        motion = {"reduced_motion": "reduce"} if engine == "chromium" else {}
        page = browser.new_page(**{"viewport": {"width": 1280, "height": 900}} | motion | options)
        page.set_default_timeout(90_000)
        for pattern, handle in (routes or {OUTSIDE: refuse}).items():
            page.route(re.compile(pattern), handle)
        page.on("pageerror", lambda error: said.append(str(error)))
        page.add_init_script(FASTER)
        page.goto(address)
        page.wait_for_function("window.sections?.drawing")
        if used:
            page.evaluate("dispatchEvent(new Event('scroll'))")  # networks are loaded
        return page

    with browser_and_address(engine) as (browser, address):
        yield call
    assert all(re.search("CORS|was blocked", text) for text in said), said  # as Firefox reports


@pytest.fixture(scope="module")
def page(opened):
    """One tab that the tests share; each leaves it idle. Those with their own come after them."""
    page = opened()
    js(page, "() => window.ready")
    return page


def js(page, function, *args):
    """What a function of the page's modules gives; arrays become lists."""
    code = f"""(args) => window.asked = (async () => {{ // kept, or the browser may collect it
        const plain = (key, value) => ArrayBuffer.isView(value) ? Array.from(value) : value;
        const load = (name) => import(`./${{name}}.js`), names = ["sampler", "trainer", "network"];
        const [sampler, trainer, network] = await Promise.all(names.map(load));
        return JSON.stringify(await ({function})(...JSON.parse(args)) ?? null, plain);
    }})()"""
    args = json.dumps(args, default=lambda array: array.ravel().tolist())
    return json.loads(page.evaluate(code, args))


def value_of(page, name, code):
    """What an expression with the timeline of a section gives, and with what moves there."""
    load = f"const gesture = window.sections.{name}, [passage] = gesture.passages"
    return page.evaluate(f"() => {{ {load}; return {code}; }}")


def images_at(page, place, shape=(15, 1, 32, 32), kind="x"):
    """The pictures of section 3 at a place: x_t, or the estimate x0."""
    values = value_of(page, "images", f"Array.from(passage.at({place}).{kind})")
    return np.array(values, np.float32).reshape(shape)


def until(page, selector, pattern):
    """Wait until the text of an element matches."""
    page.locator(selector, has_text=re.compile(pattern)).wait_for(state="attached")


def drag(page, name, start, end):
    """Drag the mouse between two places of an element, which are relative to its size."""
    element = page.locator(f"#{name}")
    box = element.bounding_box()
    start, end = ({"x": u * box["width"], "y": v * box["height"]} for u, v in (start, end))
    element.drag_to(element, source_position=start, target_position=end)


def pixels(page, canvas):
    """The bytes of a canvas, (3, height, width)."""
    page.locator(f"#{canvas}").scroll_into_view_if_needed()
    page.wait_for_timeout(500)  # it is drawn
    url = page.eval_on_selector(f"#{canvas}", "(its) => its.toDataURL()")
    image = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
    return np.array(image.convert("RGB"), int).transpose(2, 0, 1)


@pytest.mark.parametrize("steps, clip", [(40, True), (39, False), (7, True), (1, True)])
def test_reverse_process_is_that_of_sample_py(steps, clip, page):
    code = """(xT, steps, clip, eps = (x, t) => x.map((its) => its + Math.sin(3 * its + t))) =>
        Array.fromAsync(sampler.reverse(eps, xT, 39, steps, clip))"""
    noise = np.random.default_rng(0).normal(0, 3, 18).astype(np.float32)  # x0 is clipped
    eps = lambda x, t: (x + np.sin(3 * x + t)).astype(np.float32)  # noqa: E731
    betas = linear_betas()[:40].numpy()  # it begins at the 40th level
    expected = sample.reverse(eps, lambda: noise, betas, steps=steps, sampler="ddim", clip=clip)
    theirs = js(page, code, noise, steps, clip)
    for (t, x, x0), step in zip(expected, theirs, strict=True):
        assert t == step["t"]
        np.testing.assert_allclose(step["x"], x, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(step["x0"], x0, rtol=1e-4, atol=1e-4)
    assert theirs[-1]["s"] == -1
    np.testing.assert_allclose(theirs[-1]["end"], theirs[-1]["x0"], rtol=1e-6)


def test_noise_is_normal_and_that_of_python(page):
    z, seed = np.array(js(page, "sampler.noiseOf", 0, 8, 25_000)), 5 * 2**32 + 7
    assert abs(z.mean()) < 0.01 and abs(z.var() - 1) < 0.02 and abs((z**4).mean() - 3) < 0.1
    theirs = js(page, "sampler.noiseOf", seed, 2, 1024)[1024:]  # as docs/make_figures.py draws it
    np.testing.assert_allclose(theirs, page_noise(seed, 1, 1024), atol=1e-6)


@pytest.mark.parametrize("name, atol", [("clothes", 1e-4), ("emoji", 1e-2)])  # of 32 and 16 bits
def test_eps_is_pythons(name, atol, page):
    """Without a class, for several questions at once."""
    network, times = sample.Network(FILES[name], "cpu"), [0, 300, 999]
    x = np.random.default_rng(0).standard_normal((3, *network.shape), np.float32)
    code = """async (name, x, times, its) => (its = await network.included(name), {...its,
        eps: await Promise.all(times.map((t) => its.eps(Float32Array.from(x), t)))})"""
    theirs = js(page, code, name, x, times)
    for t, their_eps in zip(times, theirs["eps"], strict=True):
        np.testing.assert_allclose(their_eps, network(x, t).ravel(), atol=atol)
    assert theirs["shape"] == [*network.shape]
    np.testing.assert_allclose(network.betas, linear_betas(), rtol=1e-6)  # as in page/sampler.js


def test_training_takes_the_steps_of_torch(page):
    """Algorithm 1: the gradient of the loss, Adam, and the average of the weights."""
    torch.manual_seed(0)
    draw, ends = lambda: torch.randn(9, 2, 1, 1) / 2, torch.tensor([0, 1])
    times = [torch.cat([ends, torch.randint(1000, (7,))]) for _ in range(12)]
    batches = [{"x0": draw(), "noise": 2 * draw(), "t": t} for t in times]
    code = """(batches) => {
        const learner = new trainer.Trainer(), start = learner.parameters.map((p) => p.slice());
        for (const batch of batches) learner.step(batch);
        return [start, learner.parameters, learner.average];
    }"""
    start, last, average = js(page, code, batches)
    shapes = [(-1, 64), (64,), (64, 64), (64,), (64, 2), (2,)]
    mean = [torch.tensor(p).float().view(s) for p, s in zip(start, shapes, strict=True)]
    assert mean[0].std() > 0 and not mean[4].any()
    parameters = [torch.nn.Parameter(p.clone()) for p in mean]
    optimizer, diffusion = torch.optim.Adam(parameters, 0.012), Diffusion(linear_betas())

    def network(x_t, t):
        x, (W1, b1, W2, b2, W3, b3) = x_t.flatten(1), parameters
        waves = torch.cat([w * x for w in (3, 6, 12, 24)], 1)
        abar = diffusion.alphas_bar[t, None]
        angles = 0.15 * torch.arange(1, 9) * (abar / (1 - abar)).log().float() / 2
        inputs = [4 * x, waves.sin(), waves.cos(), angles.sin(), angles.cos()]
        h = torch.nn.functional.silu(torch.cat(inputs, 1) @ W1 + b1)
        v = torch.nn.functional.silu(h @ W2 + b2) @ W3 + b3
        return (abar.sqrt() * v + (1 - abar).sqrt() * x).float()[..., None, None]

    for k, batch in enumerate(batches):
        optimizer.param_groups[0]["lr"] = 0.012 / (1 + k / 1000)
        optimizer.zero_grad()
        x0, noise, t = batch.values()
        diffusion.loss(network, x0, t, noise).backward()
        optimizer.step()
        decay = (1 + k) / (10 + k)  # that of the first steps
        mean = [m + (1 - decay) * (p.detach() - m) for m, p in zip(mean, parameters, strict=True)]
    for theirs, p, m, q in zip(last, parameters, mean, average, strict=True):
        np.testing.assert_allclose(theirs, p.detach().ravel(), atol=1e-5)
        np.testing.assert_allclose(q, m.ravel(), atol=1e-5)


def test_dots_go_to_noise_and_back(page):
    """By the forward process (4), and by the exact arrows; in one step, to the mean."""
    at = lambda place, plane=0: np.reshape(  # noqa: E731
        value_of(page, "arrows", f"Array.from(gesture.passages[{plane}].at({place}).x)"), (-1, 2)
    )
    value_of(page, "arrows", "gesture.moveTo(0)")
    data, half, noise = (at(place) for place in (0, 0.5, 1))  # 0.5 is t = 249
    moons, diffusion = torch.tensor(data).float()[..., None, None], Diffusion(linear_betas())
    abar, last = diffusion.alphas_bar[[249, 999]].tolist()
    eps = (noise - last**0.5 * data) / (1 - last) ** 0.5
    np.testing.assert_allclose(half, abar**0.5 * data + (1 - abar) ** 0.5 * eps, atol=1e-4)
    value_of(page, "arrows", "(gesture.moveTo(1), gesture.sendBack(), gesture.stop())")
    page.wait_for_function("window.sections.arrows.passages.every((p) => p.result)")
    exact = exact_network(diffusion, moons, std=0.02)  # as in page/points.js
    eps, x_T = lambda x, t: exact(x, torch.full((240,), t)), torch.tensor(noise).view(-1, 2, 1, 1)
    way = dict(steps=50, sampler="ddim", clip=False)
    *_, (_, _, ends) = sample.reverse(eps, lambda: x_T, diffusion.betas.numpy(), **way)
    assert np.median(np.abs(at(0) - ends.flatten(1).numpy())) < 1e-2
    assert np.abs(at(0, 2) - data.mean(0)).max() < 0.05
    value_of(page, "arrows", "gesture.moveTo(0)")
    texts = page.locator("[id^=arrows][id$=miss]").all_text_contents()
    many, few, one = (int(text.split("%")[0]) for text in texts)
    assert many < 10 < few < 30 < 90 < one  # missed, in 50, 5 and 1 steps


def test_pointer_and_keyboard(page):
    """A pointer chooses a dot. A screen reader may move a slider without letting it go."""
    value_of(page, "arrows", "(gesture.moveTo(0.01), gesture.moveTo(0))")  # the data
    page.click("#arrows-50", position={"x": 200, "y": 150})
    assert pixels(page, "arrows-tile")[0, 0, 1] > 130  # the second of two pixels
    drag(page, "arrows-place", (0.5, 0.5), (0.15, 0.5))
    until(page, "#arrows-words .shown", "^Back from a little noise")  # it was let go
    value_of(page, "arrows", "(gesture.moveTo(0), gesture.moveTo(1), gesture.stop())")
    drag(page, "arrows-place", (0.99, 0.5), (0.99, 0.5))  # a press that does not move it
    page.wait_for_function("window.sections.arrows.isBack")
    value_of(page, "arrows", "(gesture.stop(), gesture.moveTo(0))")
    page.fill("#arrows-place", "900")  # as a screen reader may do
    page.dispatch_event("#arrows-place", "change")
    assert not value_of(page, "arrows", "gesture.isBack")
    page.press("#arrows-place", "ArrowRight")
    hint = "(box) => getComputedStyle(box, '::after').content"
    assert "Enter lets go" in page.eval_on_selector("#arrows .slider", hint)


def test_network_learns_the_arcs(page):
    """It trains while it is seen, in steps that can be watched."""
    page.locator("#learn-stage").scroll_into_view_if_needed()
    until(page, "#learn-words .shown", "^Not trained")
    page.click("#learn-play")
    page.click("#learn-step")  # after which the training goes on
    for phase in "dot", "level", "noise", "guess", "correction":
        until(page, "#learn-words .shown", f"^One training step, [1-5] of 5: (a )?{phase}")
    page.click("#learn-play")  # the step waits, and goes on
    assert page.is_visible("#learn-steps li:nth-child(5)[aria-current]")
    page.click("#learn-play")
    until(page, "#learn-words .shown", "^Many steps: an average")
    until(page, "#learn-words .shown", "^Training step 600")
    slow = js(page, "() => window.sections.learning.slow")
    x_t, ring, arcs = (torch.tensor(slow[k]).view(-1, 2) for k in ("xt", "guess", "shrunk"))
    variance = 1 - Diffusion(linear_betas()).alphas_bar[slow["t"]]
    weights = (-(x_t - arcs).square().sum(1) / (2 * variance)).softmax(0)  # of the origins
    assert (ring - weights @ arcs).abs().max() < 0.06  # it rests near their average
    assert int(page.text_content("#learn-misses").split("%")[0]) < 75


@pytest.mark.parametrize("engine", ENGINES[:1], indirect=True)
def test_network_learns_what_is_drawn(page):
    """From what it has learnt before, or longer. A slider shows its arrows, and lets dots go."""
    page.click("#learn-shapes [value=many]")
    until(page, "#learn-words .shown", "^Why the results are new")
    assert int(page.text_content("#learn-misses").split("%")[0]) > 40  # the network's dots
    assert page.is_visible("#learn-exact")  # those of the exact arrows
    page.click("#learn-play")
    until(page, "#learn-words .shown", "^Training step 3150")
    drag(page, "learn-plane", (0.3, 0.5), (0.7, 0.5))  # draws nothing before Draw
    page.click("#learn-shapes [value=none]")
    until(page, "#learn-words .shown", "^No dots yet")
    empty = pixels(page, "learn-plane")
    page.fill("#learn-place", "700")  # strokes lie where they are drawn
    drag(page, "learn-plane", (0.3, 0.5), (0.7, 0.5))
    until(page, "#learn-words .shown", "^Training step 0")  # but not "Not trained"
    assert "miss the blue glow" in page.text_content("#learn-misses")  # however few dots there are
    assert page.text_content("#learn-shapes [value=none]") == "Clear"
    page.click("#learn-play")
    drawn = pixels(page, "learn-plane")
    row = (drawn - empty)[2, empty.shape[1] // 2 - 2]  # blue: the glow of the dots
    assert row[int(0.35 * len(row)) : int(0.65 * len(row))].mean() > 30
    page.fill("#learn-place", "700")
    until(page, "#learn-words .shown", "^At this noise level")
    assert np.abs(pixels(page, "learn-plane") - drawn).mean() > 1
    drag(page, "learn-place", (0.7, 0.5), (0.6, 0.5))
    page.wait_for_function("!window.sections.learning.place")  # the dots go on to the data


def test_pictures_are_those_that_python_draws(page):
    """All steps of the grey network, and the first with classes and guidance."""
    page.locator("#images-stage").scroll_into_view_if_needed()
    page.wait_for_function("window.sections.images.passages.every((p) => p.result)")
    network, x_T = sample.Network(FILES["clothes"], "cpu"), images_at(page, 1)
    for t, x, x0 in network.reverse(network, lambda: x_T, **WAY):
        place = ((t + 0.999) / 1000) ** 0.5
        np.testing.assert_allclose(images_at(page, place, kind="x0"), x0, atol=2e-2)
        np.testing.assert_allclose(images_at(page, place), x, atol=2e-2)
    places = ((np.array([19, 73.5, 128]) + 1) / 1000) ** 0.5  # between the last two levels
    end, middle, begin = (images_at(page, place) for place in places)
    np.testing.assert_allclose(middle, (begin + end) / 2, atol=2e-2)
    shown = pixels(page, "images-noisy")
    assert np.abs(shown[:, -32:, -32:] - sample.to_pixels(x0[-1])).max() <= 3
    page.click("#images-networks [value=emoji]")
    network, shape = sample.Network(FILES["emoji"], "cpu"), (15, 3, 32, 32)
    names = "face-smiling", "heart", "person"
    y = np.repeat([network.classes.index(name) for name in names], 5)
    page.click("#images-pills [value=strong]")
    page.wait_for_function("window.sections.images.passages[0].steps?.length")
    x_T, eps = images_at(page, 1, shape), sample.guided(network, y, 3)
    _, _, expected = next(network.reverse(eps, lambda: x_T, **WAY))
    assert np.abs(images_at(page, 1, shape, "x0") - expected).mean() < 1e-2


def test_drawing_comes_back(page):
    """By itself after a stroke, from much noise, and meanwhile from where the reader wants."""
    page.locator("#drawing-stage").scroll_into_view_if_needed()
    page.click("#draw-clear")
    page.get_by_role("button", name="Red").click()
    drag(page, "draw", (0.1, 0.2), (0.9, 0.2))
    painted = pixels(page, "draw")
    assert np.abs(painted[:, 6, 4:28].T - [229, 56, 59]).max() < 10
    data = np.array(value_of(page, "drawing", "Array.from(passage.x0)")).reshape(4, 3, 32, 32)
    np.testing.assert_allclose(data, 4 * [painted / 127.5 - 1], atol=1e-2)
    until(page, "#drawing-words .shown", "^Four results")
    assert value_of(page, "drawing", "passage.from") == 0.604
    page.click("#draw-words [value='3']")  # a flag
    page.wait_for_function("window.sections.drawing.hasCome")
    step = js(page, "() => window.sections.drawing.passages[0].steps[0]")
    x, x0 = (np.array(step[key], np.float32).reshape(4, 3, 32, 32) for key in ("x", "x0"))
    network = sample.Network(FILES["emoji"], "cpu")
    eps = sample.guided(network, np.repeat(network.classes.index("country-flag"), 4), 1)
    betas = network.betas[: step["t"] + 1]
    (_, _, expected), *_ = sample.reverse(eps, lambda: x, betas, steps=2, sampler="ddim")
    assert np.abs(x0 - expected).mean() < 1e-2 and value_of(page, "drawing", "passage.from") == 0.75
    drag(page, "drawing-place", (0.5, 0.5), (0.6, 0.5))
    page.click("#draw-words [value='0']")  # another word; but the reader's level stays
    page.wait_for_function("window.sections.drawing.hasCome")
    assert value_of(page, "drawing", "passage.from") == 0.6


def test_exact_arrows_lead_to_copies(page):
    """As they were recorded, from the noise from which the network draws, again and again."""
    page.locator("#images-stage").scroll_into_view_if_needed()
    page.click("#images-networks [value=clothes]")
    value_of(page, "images", "gesture.comeBack()")
    page.wait_for_function("window.sections.images.hasCome")
    x_T, drawn = (images_at(page, place) for place in (1, 0))
    page.click("#images-networks [value=exact]")
    page.wait_for_function("window.sections.images.hasCome")
    until(page, "#images-words .shown", "^Left: the exact arrows")
    compared = value_of(page, "images", "Array.from(gesture.passages[1].at(0).x)")
    np.testing.assert_allclose(compared, drawn.ravel(), atol=1e-5)
    value_of(page, "images", "(gesture.moveTo(0.6), gesture.comeBack())")
    recorded = np.array(Image.open(PAGE / "exact.webp").convert("L"), int)
    found = np.concatenate(list(sample.to_pixels(images_at(page, 0)[:, 0])), 1)
    assert np.abs(found - recorded[-32:]).max() <= 1
    assert np.array_equal(images_at(page, 1), x_T)


def test_only_the_opening_is_loaded_at_first(opened):
    """Then both networks, and ONNX Runtime, which comes from jsDelivr if there is no copy."""
    asked = []

    def outside(route):
        name = route.request.url.rpartition("/")[2]
        route.fulfill(path=RUNTIME / "dist" / name, headers={"Access-Control-Allow-Origin": "*"})

    page = opened({OUTSIDE: outside, COPY: lambda route: route.fulfill(status=404)}, used=False)
    page.on("request", lambda request: asked.append(request.url))
    page.wait_for_timeout(1000)
    assert not asked
    page.mouse.wheel(0, 10)
    js(page, "() => Promise.all([window.ready, network.included('clothes')])")
    folder = f"https://cdn.jsdelivr.net/npm/{VERSION}/dist/"
    files = {folder + "ort.wasm.bundle.min.mjs", folder + "ort-wasm-simd-threaded.wasm"}
    assert {url for url in asked if "jsdelivr" in url} == files
    assert sum(url.endswith(".onnx") for url in asked) == 2


def test_page_without_a_connection(opened):
    """The first way back is a recording. A network is tried again when it is chosen."""
    lost, failed = [True], "^No new pictures yet.*Connect to the internet"
    page = opened({r"[.]onnx$": lambda r: r.abort() if lost else r.continue_()})
    value_of(page, "opening", "(gesture.moveTo(0), gesture.letGo())")
    until(page, "#scene-words .shown", "^New pictures")
    value_of(page, "opening", "gesture.letGo()")
    until(page, "#scene-words .shown", failed)
    for name, section in (("Your drawing", "drawing"), ("Images", "images")):
        page.get_by_role("link", name=name, exact=True).click()
        until(page, f"#{section}-words .shown", failed)
    lost.clear()
    page.click("#images-networks [value=emoji]")
    until(page, "#images-words .shown", "^Told the kind of each row")


@pytest.mark.parametrize("engine", ENGINES[:1], indirect=True)
def test_what_is_set_while_a_network_loads_is_kept(opened):
    """The way back waits for the network, in the opening and in sections 3 and 4."""
    held, names = [], {"scene": "opening", "drawing": "drawing", "images": "images"}
    hold = lambda route: route.continue_() if held is None else held.append(route)  # noqa: E731
    page = opened({r"[.]onnx$": hold})
    for name in names:
        page.fill(f"#{name}-place", "400")
        page.press(f"#{name}-place", "Enter")
        until(page, f"#{name}-words .shown", "^No new pictures yet.*loading")
    held, routes = None, held  # later requests are not held
    for route in routes:
        route.continue_()
    for name, section in names.items():
        page.locator(f"#{name}-stage").scroll_into_view_if_needed()
        until(page, f"#{name}-words .shown", "^(New|Four|Back from)")
        assert value_of(page, section, "passage.from") == (1 if name == "images" else 0.4)


@pytest.mark.parametrize("engine", ENGINES[:1], indirect=True)
def test_finger_that_scrolls_changes_nothing(opened):
    """On the plane of section 2 or on a slider; a finger along the slider moves it."""
    phone = {"has_touch": True, "is_mobile": True, "reduced_motion": "no-preference"}
    page = opened(viewport={"width": 390, "height": 844}, **phone)

    def swipe(name, start, end):  # a finger, between two places of an element
        box, send = page.locator(f"#{name}").bounding_box(), page.context.new_cdp_session(page).send
        for k in range(9):
            u, v = (a + (b - a) * k / 8 for a, b in zip(start, end, strict=True))
            point = {"x": box["x"] + u * box["width"], "y": box["y"] + v * box["height"]}
            kind = "touchMove" if k else "touchStart"
            send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": [point]})
            page.wait_for_timeout(20)
        send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})

    js(page, "() => window.ready")
    page.locator("#learn-plane").scroll_into_view_if_needed()
    before = page.evaluate("scrollY")
    swipe("learn-plane", (0.5, 0.9), (0.5, 0.2))
    page.wait_for_function(f"scrollY > {before + 50}")
    page.locator("#drawing-stage").scroll_into_view_if_needed()
    value_of(page, "drawing", "(gesture.moveTo(0.5), gesture.comeBack())")
    until(page, "#drawing-words .shown", "^Four results")
    for end, place in ((0.5, -3.0), 0), ((0.8, 0.5), 0.8):
        swipe("drawing-place", (0.5, 0.5), end)
        page.wait_for_timeout(300)
        assert abs(value_of(page, "drawing", "passage.from") - (place or 0.5)) < 0.1
        until(page, "#drawing-words .shown", "^Four results")
    value_of(page, "drawing", "gesture.comeBack()")
    swipe("drawing-place", (0.1, 0.5), (0.1, 0.5))  # a tap, while something moves the slider
    page.wait_for_function("window.sections.drawing.passages[0].from < 0.2")


@pytest.mark.parametrize("engine", ENGINES[:1], indirect=True)
@pytest.mark.parametrize("width, height", [(683, 650), (950, 560), (1024, 500)])
def test_sections_begin_by_themselves_in_any_window(width, height, opened):
    page = opened(viewport={"width": width, "height": height}, reduced_motion="no-preference")
    for name, section in ("arrows", "arrows"), ("learn", "learning"), ("images", "images"):
        page.locator(f"#{name}-stage").evaluate("(its) => its.scrollIntoView({block: 'center'})")
        page.wait_for_function(f"window.sections.{section}.seen >= 0.7")
    page.evaluate("document.querySelector('#images-networks').scrollIntoView(false)")
    page.click("#images-networks [value=exact]")  # which is far above the pictures
    page.wait_for_function("window.sections.images.seen >= 0.7")


GO = "(its => (its.moveTo(1), its.letGo()))(sections.%s)"
CLICK = "document.querySelector('%s').click()"
SHOWN = "/^%s/.test(document.querySelector('#%s-words .shown').textContent)"
MAIN_PATH = {  # what is done in each section, and what is then true
    "": "sections.drawing",
    "scrollTo(0, 10); " + GO % "opening": SHOWN % ("New pictures", "scene"),
    "arrows.scrollIntoView(); " + GO % "arrows": SHOWN % ("Back from", "arrows"),
    "learning.scrollIntoView(); " + CLICK % "[value=few]": SHOWN % ("Training step", "learn"),
    "images.scrollIntoView(); sections.images.moveTo(1)": "sections.images.hasCome",
    CLICK % "[value=emoji]": "sections.images.hasCome",
    "drawing.scrollIntoView(); " + GO % "drawing": SHOWN % ("Four results", "drawing"),
}


@pytest.mark.xdist_group("webkit")
def test_main_path_in_webkit():
    """Each section in WebKitGTK, which a second driver starts, with a screen of its own."""
    drivers = [shutil.which(name) for name in ("WebKitWebDriver", "Xvfb")]
    found = glob.glob("/usr/lib/*/webkit2gtk-4.*/MiniBrowser")
    if not all(drivers) or not found:
        missing("WebKitGTK")
    options = webdriver.WebKitGTKOptions()
    options.binary_location = found[0]
    options.add_argument("--automation")
    command = [drivers[1], "-displayfd", "1", "-screen", "0", "1300x1000x24"]
    with served() as address, subprocess.Popen(command, stdout=subprocess.PIPE) as screen:
        display = {"DISPLAY": f":{int(screen.stdout.readline())}"}
        service = webdriver.WebKitGTKService(drivers[0], env=os.environ | display)
        try:
            with webdriver.WebKitGTK(options=options, service=service) as driver:
                driver.set_script_timeout(90)
                driver.get(address)
                for action, condition in MAIN_PATH.items():
                    driver.execute_script(action)
                    driver.execute_async_script(f"""const done = arguments[0], check = () => {{
                        try {{ if ({condition}) return done(); }} catch {{}}
                        setTimeout(check, 100);
                    }}; check();""")
        finally:
            screen.terminate()
