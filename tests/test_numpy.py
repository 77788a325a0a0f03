"""The promises of ddpm_numpy.py, the library: the same samples as the programs, from any thread."""

import shutil
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from io import BytesIO
from urllib.error import HTTPError
from urllib.request import urlopen

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from conftest import COLOURS, HERE, colour_name, listing
from PIL import Image

import ddpm_numpy
from ddpm import linear_betas
from images import read_image, to_pixels


def test_sample_draws_the_images_of_the_program(coloured, tmp_path, run):
    """It uses the classes in turn, guidance, and the variance in the file."""
    path = tmp_path / "small.onnx"
    proto = onnx.load(coloured / "model.onnx")
    next(p for p in proto.metadata_props if p.key == "ddpm.variance").value = "small"
    onnx.save(proto, path)
    flags = "--class red blue --guidance 1 --sampler ddpm --steps 10 -n 5 --dir out".split()
    run("sample.py", "--onnx", path, *flags, cwd=tmp_path)
    network = ddpm_numpy.Network(path, "cpu")
    draw = partial(ddpm_numpy.sample, network, guidance=1)
    assert np.array_equal(draw(2, "red"), draw(2, ["red"]))
    draw = partial(draw, classes=["red", "blue"], sampler="ddpm")
    x0 = np.concatenate([draw(3), draw(2, first=3)])
    assert x0.dtype == np.float32 and x0.shape == (5, 3, 8, 8)
    for k, pixels in enumerate(to_pixels(x0).astype(int)):
        path = tmp_path / "out" / ("red", "blue")[k % 2] / f"{k:06d}.png"
        assert np.abs(pixels - read_image(path, 8, 3)).max() <= 1
    network.variance = "large"
    assert np.abs(draw(5) - x0).max() > 0.1


def test_one_network_serves_several_threads(coloured):
    network = ddpm_numpy.Network(coloured / "model.onnx", "cpu")

    def draw(seed):
        return ddpm_numpy.sample(network, 3, ["green"], 1, 5, seed).tobytes()

    expected = [draw(seed) for seed in range(12)]
    assert len(set(expected)) == 12
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(draw, range(12))) == expected


def test_network_says_what_it_is_and_takes_options_of_the_session(coloured):
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    network = ddpm_numpy.Network(coloured / "model.onnx", "cpu", options)
    assert network.session.get_session_options().intra_op_num_threads == 1
    assert network.provider == "CPUExecutionProvider" and network.shape == (3, 8, 8)
    assert network.classes == list(COLOURS)
    names = (name for name in ["red", "blue"])  # may come from a generator
    assert ddpm_numpy.class_labels(network.classes, names, 3).tolist() == [2, 0, 2]
    np.testing.assert_array_equal(network.betas, linear_betas())  # to the bit


def test_mistakes_are_value_errors(coloured, trained, tmp_path):
    with pytest.raises(ValueError, match=r"x.onnx does not exist; python export.py writes it"):
        ddpm_numpy.Network(tmp_path / "x.onnx")
    network, plain = (
        ddpm_numpy.Network(folder / "model.onnx", "cpu") for folder in (coloured, trained[0])
    )
    x, t = np.zeros((2, 3, 8, 8), np.float32), np.zeros(2, np.int64)
    for y in (np.array([0]), np.array([0, 4]), np.array([-1, 0]), np.zeros((2, 1), np.int64)):
        with pytest.raises(ValueError, match=r"y must have the shape \(2,\) and values 0..3"):
            network(x, t, y)
    for wrong, options, said in (
        (network, {"classes": ["pink"]}, "no class pink; the classes are blue, green"),
        (plain, {"classes": ["red"]}, "has no classes"),
        (plain, {"guidance": 1}, "guidance needs a network with classes"),
        (plain, {"steps": 0}, "steps must be"),
    ):
        with pytest.raises(ValueError, match=said):
            ddpm_numpy.sample(wrong, 2, **options)


def test_service_of_the_manual_answers_with_images(coloured, tmp_path, start):
    """It runs beside the files that the manual names, and no others."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    (tmp_path / "serve.py").write_text(listing("import io").replace("8001", str(port)))
    for name in ("ddpm_numpy.py", "samplers.py", "images.py"):
        shutil.copy(HERE / name, tmp_path)
    shutil.copy(coloured / "model.onnx", tmp_path)
    process, url = start(tmp_path / "serve.py", cwd=tmp_path), f"http://localhost:{port}/?class="

    def ask(name):
        image = Image.open(BytesIO(urlopen(url + name, timeout=20).read()))
        assert image.width > 500
        return image.resize((5, 5))

    for _ in range(300):
        time.sleep(0.1)
        assert process.poll() is None
        with socket.socket() as client:
            if not client.connect_ex(("localhost", port)):
                break
    names = [*COLOURS] * 2
    with ThreadPoolExecutor(4) as pool:
        queries = [f"{name}&w=1" for name in names]
        for name, image in zip(names, pool.map(ask, queries), strict=True):
            assert colour_name(np.asarray(image)[2, 2]) == name
    for query in ("pink", "%E7%8C%AB", "x%0d%0aSet-Cookie:%20a=evil", "red&class=<b>"):
        with pytest.raises(HTTPError, match="400") as error:  # no header of a stranger, no script
            ask(query)
        said = error.value.read().decode()
        assert "no class " in said and "<b>" not in said
        assert error.value.headers["Set-Cookie"] is None
    for part, code in (("?w=strong", "400"), ("favicon.ico", "404")):
        with pytest.raises(HTTPError, match=code):
            urlopen(url.replace("?class=", part), timeout=20)
    process.kill()
    assert "Traceback" not in process.stdout.read()
