"""export.py and extras/sample_checkpoint.py: the network of a run as a file, and in torch."""

import contextlib
import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from conftest import COLOURS, HERE, TINY, in_process, python, read, save_run
from onnx import TensorProto
from PIL import Image

import export
from ddpm import linear_betas
from extras import sample_checkpoint
from extras.sample_checkpoint import TorchNetwork
from run import load
from sample import Network, example, sample, to_pixels
from test_ddpm import PAPER, randn

SHAPE = 3, 8, 8
TYPES = {"x_t": (TensorProto.FLOAT, ["batch", *SHAPE]), "t": (TensorProto.INT64, ["batch"])}
TYPES["y"], TYPES["eps"] = TYPES["t"], TYPES["x_t"]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Export random weights; return the folder and what was printed."""
    folder = tmp_path_factory.mktemp("plain")
    save_run(folder / "run", SHAPE)
    with contextlib.chdir(folder):
        return folder, in_process("export.py")


@pytest.fixture(scope="module")
def coloured(class_folder, tmp_path_factory):
    """Train a network on the three classes, and export it; return the folder."""
    folder = tmp_path_factory.mktemp("coloured")
    flags = "--classes --base-channels 16 --attention-resolutions --dropout 0 --batch 24 --no-flip"
    flags += " --variance small --parts v muon --lr 6e-3 --steps 120"
    with contextlib.chdir(folder):
        in_process("train.py", "--data", class_folder, *TINY, *flags.split())
        in_process("export.py")
    return folder


# -------------------------------------------------------------------------------------- export.py


def properties(path):
    """Return a file's inputs and output, {name: (type, shape)}, its metadata, and its nodes."""
    proto, found = onnx.load(path), {}
    onnx.checker.check_model(proto, full_check=True)
    assert [o.version for o in proto.opset_import if not o.domain] == [20]
    for value in (*proto.graph.input, *proto.graph.output):
        tensor = value.type.tensor_type
        shape = [dim.dim_param or dim.dim_value for dim in tensor.shape.dim]
        found[value.name] = tensor.elem_type, shape
    double = TensorProto.DOUBLE  # browsers can't compute with it
    assert not [weight.name for weight in proto.graph.initializer if weight.data_type == double]
    for value in (value for node in proto.graph.node for value in node.attribute):
        assert value.t.data_type != double and (value.name, value.i) != ("to", double)
    return found, {prop.key: prop.value for prop in proto.metadata_props}, proto.graph.node


def test_onnx_file_is_what_it_promises(plain):
    """It has the averaged weights, no nodes that CUDA leaves to the CPU, and no local paths."""
    folder, said = plain
    assert said.startswith("run: step 0\nmodel.onnx: 0.3 MB, eps within ")
    found, metadata, nodes = properties(folder / "model.onnx")
    assert found == {name: TYPES[name] for name in ("x_t", "t", "eps")}
    assert metadata.pop("ddpm.eps_of_example") and metadata == {
        "ddpm.betas": json.dumps(linear_betas().tolist()), "ddpm.variance": "large",
        "ddpm.image_shape": "[3, 8, 8]",
    }  # fmt: skip
    ops = {node.op_type for node in nodes}
    assert "LayerNormalization" in ops and "Softmax" in ops
    assert not ops & {"Shape", "Gather", "Slice", "GroupNormalization", "InstanceNormalization"}
    network, _, state = load(folder / "run")
    modules = {n for n, module in network.named_modules() if isinstance(module, torch.nn.Conv2d)}
    assert modules == {node.name.split("/")[0] for node in nodes if node.op_type == "Conv"}
    assert len({node.name for node in nodes}) == len(nodes)
    for trace in (b"site-packages", str(HERE).encode(), b"ddpm.py", b"stack_trace"):
        assert trace not in (folder / "model.onnx").read_bytes()
    x_t, t = randn(2, *SHAPE), torch.tensor([5, 500])
    eps = torch.from_numpy(Network(folder / "model.onnx", "cpu")(x_t.numpy(), t.numpy()))
    with torch.no_grad():
        torch.testing.assert_close(eps, network(x_t, t), rtol=0, atol=1e-5)
        network.load_state_dict(state["model"])
        assert (eps - network(x_t, t)).abs().max() > 1e-4


def test_network_of_v_and_classes_returns_eps(coloured):
    """Its file has a third input, and takes any number of images."""
    found, metadata, _ = properties(coloured / "model.onnx")
    assert found == TYPES and json.loads(metadata["ddpm.classes"]) == [*COLOURS]
    assert metadata["ddpm.variance"] == "small"
    network = load(coloured / "run")[0].requires_grad_(False)
    for batch in (1, 2, 3, 7):
        x_t, t, y = randn(batch, *SHAPE), 150 * torch.arange(batch), torch.arange(batch) % 4
        eps = Network(coloured / "model.onnx", "cpu")(x_t.numpy(), t.numpy(), y.numpy())
        np.testing.assert_allclose(eps, network(x_t, t, y), rtol=0, atol=1e-4)
    assert (network(x_t, t, y) - network(x_t, t)).abs().max() > 0.01
    assert (network(x_t, 0 * t + 999) - x_t).abs().max() < 0.1  # the noise in an x_t without signal
    x_t, t = map(torch.as_tensor, example(SHAPE, 1000))
    answer, expected = json.loads(metadata["ddpm.eps_of_example"]), network(x_t, t.view(1))
    np.testing.assert_allclose(answer, expected.flatten()[::3], rtol=0, atol=1e-4)


def test_training_learns_the_classes(coloured):
    x0 = sample(Network(coloured / "model.onnx", "cpu"), 9, guidance=1.0, steps=10)
    colours = 127.5 * x0.mean((2, 3)) + 127.5
    assert np.abs(colours - [*COLOURS.values()] * 3).max() < 60


class Other(torch.nn.Module):
    """A network whose norm and attention have different arguments and shapes from the U-Net's."""

    def __init__(self):
        super().__init__()
        self.norm, self.weight = torch.nn.GroupNorm(1, 3, affine=False), torch.ones(())

    def forward(self, x_t, t):
        h = self.norm((self.weight * x_t).flatten(2))
        attend = torch.nn.functional.scaled_dot_product_attention
        return attend(h, h, h, scale=0.3).view_as(x_t) + t[:, None, None, None] / 1000


def test_no_file_appears_that_differs_from_torch(plain, tmp_path, monkeypatch):
    """A wrong translation differs, and so does a result that is not a number."""
    path, attention = tmp_path / "model.onnx", export.attention
    export.write_onnx(Other(), PAPER, SHAPE, (), path)
    before = path.read_bytes()

    def refused(network):
        with pytest.raises(SystemExit, match=r"eps differs from torch's .* was not written"):
            export.write_onnx(network, PAPER, SHAPE, (), path)
        assert [path.read_bytes() for path in tmp_path.iterdir()] == [before]

    with monkeypatch.context() as patch:
        patch.setattr(export, "attention", lambda q, k, v, **_: attention(q, k, v, scale=0.31))
        refused(Other())
    monkeypatch.setattr(export, "to_onnx", lambda *_: onnx.load(plain[0] / "model.onnx"))
    network = load(plain[0] / "run")[0]
    network.conv_out.bias.data.fill_(torch.nan)
    refused(network)


@pytest.mark.parametrize("wrong", range(6))
def test_largest_difference_is_found_in_each_batch(wrong):
    calls = []

    def eps(x_t, t, y):
        calls.append((x_t.std(), t.tolist(), y.tolist()))
        return np.where(len(calls) == wrong + 1, x_t + 2 * (x_t == x_t.max()), x_t)

    def network(x_t, t, y):
        assert not torch.is_grad_enabled()
        return x_t

    for T, times in (1, 3 * [0] + 3 * [0]), (1000, [0, 1, 2, 999, 500, 250]):
        calls.clear()
        worst = export.largest_difference(network, eps, SHAPE, T, 3)
        assert worst == pytest.approx(2, abs=1e-6)
        deviations, seen, classes = zip(*calls, strict=True)
        assert deviations == pytest.approx([1, 1, 0.01, 0.01, 2, 2], rel=0.05)
        assert [*seen] == [times[k : k + n] for n in (1, 2, 3) for k in (0, 3)]
        assert [*classes] == [[3, 2, 1][:n] for n in (1, 1, 2, 2, 3, 3)]


class RunsCode:
    """An object that creates a file when it is unpickled."""

    def __reduce__(self):
        return Path.touch, (Path("executed"),)


def test_mistakes_are_one_line(plain, tmp_path, program):
    """A folder without a checkpoint is no run, and no code in a file is executed."""
    said = python("export.py", cwd=tmp_path, code=1)  # in a process of its own
    assert said == "demo is not there; run train.py first\n"
    for name in "demo", "run":
        (tmp_path / name).mkdir()
        said = program("export.py", cwd=tmp_path, code=1)
        assert f"{Path('demo', 'checkpoint.pt')} is not there; run train.py first" in said
    whole = (plain[0] / "run" / "checkpoint.pt").read_bytes()
    (tmp_path / "half.pt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.pt").touch()
    torch.save({"settings": RunsCode()}, tmp_path / "code.pt")
    state = read(plain[0] / "run")
    torch.save(state | {"settings": {"lr_decay": True}}, tmp_path / "old.pt")
    torch.save(state | {"settings": 5}, tmp_path / "list.pt")
    torch.save({name: state[name] for name in state if name != "ema"}, tmp_path / "ema.pt")
    (tmp_path / "text.pt").write_text("epoch 1")
    for name in "half", "empty", "code", "old", "list", "ema", "text":
        said = program("export.py", "--checkpoint", f"{name}.pt", cwd=tmp_path, code=1)
        assert said == f"{name}.pt is damaged, or is not a checkpoint of this version of train.py"
    assert "x is not there" in program("export.py", "--checkpoint", "x", cwd=tmp_path, code=1)
    whole = "--checkpoint", plain[0] / "run"
    assert "such as model.onnx" in program("export.py", "--onnx", "run.pt", cwd=tmp_path, code=2)
    for path in "half.pt/x.onnx", "run/new.onnx":
        (tmp_path / "run" / "new.onnx").mkdir(exist_ok=True)
        said = program("export.py", *whole, "--onnx", path, cwd=tmp_path, code=1)
        assert f"{Path(path)} can't be written: " in said
    assert not list(tmp_path.glob("*.onnx")) and not (tmp_path / "executed").exists()


@pytest.mark.gpu
def test_all_of_the_network_runs_on_cuda(plain, coloured):
    ort.preload_dlls()
    options = ort.SessionOptions()
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    providers = [("CUDAExecutionProvider", {"use_tf32": "0"})]
    x, t, y = randn(3, *SHAPE), torch.tensor([0, 500, 999]), torch.tensor([0, 2, 3])
    for folder in plain[0], coloured:
        session = ort.InferenceSession(folder / "model.onnx", options, providers)
        network = load(folder / "run")[0]
        assert session.get_providers()[0] == "CUDAExecutionProvider"
        inputs = {"x_t": x, "t": t} | ({"y": y} if network.num_classes else {})
        (eps,) = session.run(["eps"], {name: value.numpy() for name, value in inputs.items()})
        with torch.no_grad():
            assert np.abs(eps - network(*inputs.values()).numpy()).max() < 1e-4


# -------------------------------------------------------------------- extras/sample_checkpoint.py

X = randn(2, *SHAPE)


@pytest.fixture(scope="module")
def both(plain, coloured, tmp_path_factory):
    """Return each network in torch and as a file, with T = 40, which takes less time."""
    pairs = {}
    for name, folder in ("plain", plain[0]), ("classes", coloured):
        state, short = read(folder / "run"), tmp_path_factory.mktemp(name) / "short.pt"
        state["settings"] |= {"betas": tuple(linear_betas()[:40].tolist()), "amp": False}
        torch.save(state, short)
        file = Network(folder / "model.onnx", "cpu")
        file.betas = file.betas[:40]
        pairs[name] = TorchNetwork(short, "cpu"), file
    return pairs


def test_network_in_torch_has_the_interface_of_the_file(both):
    for network, file in both.values():
        assert (network.shape, network.classes) == (file.shape, file.classes)
        assert (network.variance, network.provider) == (file.variance, "cpu, float32")
        np.testing.assert_array_equal(1 - network.betas, 1 - file.betas)
        for t in 7, np.array([7, 39]):
            for y in (None, np.array([0, 2])) if file.classes else (None,):
                eps = network(X, torch.from_numpy(t) if np.ndim(t) else t, y)
                np.testing.assert_allclose(eps, file(X.numpy(), t, y), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name, options", [
    ("plain", {"clip": False}), ("classes", {"guidance": 1.0}),  # all steps
    ("classes", {"steps": 5, "classes": ["red", "blue"], "guidance": 2.0, "first": 4, "seed": 3}),
    ("plain", {"steps": 7, "sampler": "ddim"}), ("plain", {"steps": 7, "sampler": "ddpm"}),
])  # fmt: skip
def test_images_are_those_of_the_exported_file(name, options, both):
    in_torch, expected = (sample(network, 3, **options) for network in both[name])
    assert in_torch.dtype == torch.float32 and expected.std() > 0.1
    np.testing.assert_allclose(in_torch, expected, rtol=0, atol=1 / 127.5)


def test_bfloat16_is_used_where_the_run_used_it(both, tmp_path, monkeypatch):
    """The weights are converted once, those of the norms not at all."""
    exact, torch.backends.cudnn.allow_tf32 = both["plain"][0](X, 7), True
    for has, amp, kind in (True, True, "bfloat16"), (True, None, "float32"), (0, True, "float32"):
        monkeypatch.setattr(sample_checkpoint, "has_bfloat16", lambda device, has=has: has)
        network = TorchNetwork(save_run(tmp_path, SHAPE, amp=amp), "cpu")
        eps, unet = network(X, 7), network.network
        assert network.provider == f"cpu, {kind}" and torch.equal(eps, exact) == (kind == "float32")
        assert torch.backends.cudnn.allow_tf32 == (kind == "bfloat16")
        assert unet.conv_in.weight.dtype == getattr(torch, kind)
        assert unet.norm_out.weight.dtype == eps.dtype == torch.float32
        torch.testing.assert_close(eps, exact, rtol=0, atol=0.1)


def test_program_draws_what_the_network_does(tmp_path, program):
    betas = tuple(linear_betas(20, 0.01, 0.3).tolist())
    out = save_run(tmp_path / "run", SHAPE, [*COLOURS], betas=betas)
    words = "-n", 3, "--batch", 2, "--guidance", 1, "--dir", "out", "--device", "cpu"
    said = program("extras/sample_checkpoint.py", "run", *words, cwd=tmp_path)
    assert "3 images in 20 steps on cpu, float32\n" in said
    expected = to_pixels(sample(TorchNetwork(out, "cpu"), 3, None, 1.0).numpy())
    for k, name in enumerate(COLOURS):
        image = np.asarray(Image.open(tmp_path / "out" / name / f"{k:06d}.png")).astype(int)
        assert np.abs(image.transpose(2, 0, 1) - expected[k]).max() <= 1 and image.std() > 9
    said = program("extras/sample_checkpoint.py", "none", cwd=tmp_path, code=1)
    assert said == "none is not there; run train.py first"
