"""The promises of export.py: the ONNX file, reduced precision, and errors of the user."""

import errno
import json
import os
import re
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from closed_forms import PAPER, randn
from conftest import HERE, SMALL, RunsCode, SmallDiT, python, read
from onnx import TensorProto
from onnx.numpy_helper import to_array

import ddpm_numpy
import export
from ddpm import UNet, linear_betas
from images import from_pixels, to_pixels
from support import reduced
from support.demo import demo_images
from support.trained import Trained, load

KINDS = "None", "half", "int8"
DOUBLE, FLOAT = TensorProto.DOUBLE, TensorProto.FLOAT


# ------------------------------------------------------------------------------------ the ONNX file


def graphs(graph):
    """Return a graph and the branches of its nodes."""
    yield graph
    for branch in (value.g for node in graph.node for value in node.attribute):
        yield from graphs(branch)


def doubles(graph):
    """Return the names of float64 values, which browsers cannot compute."""
    found = []
    for part in graphs(graph):
        found += [weight.name for weight in part.initializer if weight.data_type == DOUBLE]
        for node, value in ((n, value) for n in part.node for value in n.attribute):
            if value.t.data_type == DOUBLE or (value.name, value.i) == ("to", DOUBLE):
                found.append(node.name)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_onnx_file_is_what_it_promises(kind, files):
    """It has no nodes that CUDA leaves to the CPU, and no trace of this machine."""
    path = files[0] / f"{kind}.onnx"
    proto, content = onnx.load(path), path.read_bytes()
    onnx.checker.check_model(proto, full_check=kind == "None")
    assert [o.version for o in proto.opset_import if not o.domain] == [20]
    image, found = (FLOAT, ["batch", 3, 8, 8]), {}
    for value in (*proto.graph.input, *proto.graph.output):
        tensor = value.type.tensor_type
        shape = [dim.dim_param or dim.dim_value for dim in tensor.shape.dim]
        found[value.name] = tensor.elem_type, shape
    assert found == {"x_t": image, "t": (TensorProto.INT64, ["batch"]), "eps": image}
    metadata = {p.key: p.value for p in proto.metadata_props}
    answer = np.array(json.loads(metadata.pop("ddpm.eps_of_example")))
    assert metadata == {
        "ddpm.betas": json.dumps(linear_betas().tolist()), "ddpm.variance": "small",
        "ddpm.image_shape": "[3, 8, 8]", "ddpm.step": "7",
    }  # fmt: skip
    ops = {node.op_type for part in graphs(proto.graph) for node in part.node}
    assert "LayerNormalization" in ops and "Softmax" in ops
    assert not ops & {"Shape", "Gather", "Slice", "GroupNormalization", "InstanceNormalization"}
    assert not doubles(proto.graph)
    for trace in (b"site-packages", str(HERE).encode(), b"ddpm.py", b"stack_trace"):
        assert trace not in content
    eps = reduced.eps_of(path)
    x_t, t = map(torch.from_numpy, ddpm_numpy.example((3, 8, 8), 1000))
    np.testing.assert_allclose(answer, eps(x_t, t).flatten()[::3], rtol=0, atol=1e-4)
    for batch in (1, 2, 3):
        out = eps(randn(batch, 3, 8, 8), torch.full((batch,), 500))
        assert out.dtype == torch.float32 and out.shape == (batch, 3, 8, 8)


@pytest.mark.parametrize("predicts", ["v", "x0", "mean"])
def test_file_computes_eps_whatever_is_predicted(predicts, tmp_path):
    """No precision has float64. The fixture `files` has a network that predicts eps."""
    torch.manual_seed(0)
    model, inputs = SmallDiT().eval(), (randn(2, 3, 8, 8), torch.tensor([5, 500]))
    source = Trained(model, PAPER, SMALL, 1, "", predicts=predicts)
    paths = tmp_path / "exact.onnx", tmp_path / "int8.onnx"
    export.write_onnx(source, paths[0])
    reduced.quantize(*paths, [inputs], reduced.float32_modules(model))
    exact, int8 = map(onnx.load, paths)
    half, both = export.to_onnx(source, reduced.Half(model)), reduced.choose_by_t(exact, int8, 100)
    assert not any(doubles(proto.graph) for proto in (exact, half, both))
    assert any(n.name.startswith("patches/") for n in exact.graph.node)  # --int8 goes by such names
    with torch.no_grad():
        expected, raw = source.eps(*inputs), model(*inputs)
    torch.testing.assert_close(reduced.eps_of(paths[0])(*inputs), expected, rtol=1e-4, atol=1e-4)
    assert (expected - raw).abs().max() > 0.1


def test_float32_modules_are_those_that_read_x_t_and_t_and_y_and_return_eps():
    """Check the U-Net, and a transformer, which is exported with --half, too."""
    names = ["time_mlp", "class_embedding", "conv_in", "down.0.0", "conv_out"]
    assert reduced.float32_modules(UNet(**SMALL, num_classes=3)) == names
    model = SmallDiT().eval()
    assert reduced.float32_modules(model) == ["patches", "time", "blocks.0", "last"]
    half, inputs = reduced.Half(model), (randn(2, 3, 8, 8), torch.tensor([5, 500]))
    types = [block[1].weight.dtype for block in half.model.blocks]
    assert types == [torch.float32, torch.float16]
    with torch.no_grad():
        torch.testing.assert_close(half(*inputs), model(*inputs), rtol=0, atol=1e-2)
    with pytest.raises(SystemExit, match="ModuleList"):
        reduced.float32_modules(torch.nn.Sequential(torch.nn.Conv2d(3, 3, 1)))


def test_onnx_file_is_the_averaged_network_and_no_other_is_written(trained, tmp_path, monkeypatch):
    folder, _ = trained
    source, state = load(folder / "run"), read(folder / "run")
    x, t = randn(5, 3, 8, 8), torch.tensor([0, 1, 2, 500, 999])
    eps = reduced.eps_of(folder / "model.onnx")(x, t)
    (tmp_path / "model.onnx").write_text("of before")
    monkeypatch.setattr(export, "to_onnx", lambda *_: onnx.load(folder / "model.onnx"))
    with torch.no_grad():
        source.model.load_state_dict(state["ema"])
        torch.testing.assert_close(eps, source.model(x, t), rtol=0, atol=1e-5)
        source.model.load_state_dict(state["model"])
        assert (eps - source.model(x, t)).abs().max() > 1e-4
    for wrong in ("the weights that are not averaged", "not a number"):
        with pytest.raises(SystemExit, match=r"eps differs from torch's .* is not written"):
            export.write_onnx(source, tmp_path / "model.onnx")
        assert [p.read_text() for p in tmp_path.iterdir()] == ["of before"], wrong
        source.model.conv_out.bias.data.fill_(torch.nan)


class Sequence(torch.nn.Module):
    """A network whose norms and attention have other shapes than the U-Net's, or a mask."""

    def __init__(self, **options):
        super().__init__()
        self.options, self.scale = options, torch.nn.Parameter(torch.ones(()))
        self.norm = torch.nn.GroupNorm(2, 4, affine=False)

    def forward(self, x_t, t):
        h = self.norm((self.scale * x_t).flatten(2))  # (B, C, N)
        attend = torch.nn.functional.scaled_dot_product_attention
        return (attend(h, h, h, **self.options) + t[:, None, None] / 1000).view_as(x_t)


def test_attention_of_other_networks_is_exported_or_named(tmp_path):
    shape = {"in_channels": 4, "image_size": 4}
    source = Trained(Sequence(scale=0.3).eval(), PAPER, shape, 1, "")
    export.write_onnx(source, tmp_path / "model.onnx")  # compares it with torch
    source = Trained(Sequence(attn_mask=torch.zeros(4, 4)).eval(), PAPER, shape, 1, "")
    with pytest.raises(SystemExit, match=r"^export.py can't express attention with a mask"):
        export.write_onnx(source, tmp_path / "masked.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


def test_input_that_the_file_would_lack_is_refused(tmp_path):
    """Such an input is a condition other than classes."""

    class Conditioned(SmallDiT):
        def forward(self, x_t, t, y=None, text=None):
            return super().forward(x_t, t)

    vector = UNet(**SMALL, num_classes=1)  # whose y is no class: the classes have no names
    for model, settings, lost in ((Conditioned(), SMALL, "text"),
                                  (vector, SMALL | {"num_classes": 1}, "y")):  # fmt: skip
        with pytest.raises(SystemExit, match=f"the network also takes {lost}, for which the file"):
            export.write_onnx(Trained(model, PAPER, settings, 1, ""), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------ errors of the user


def test_without_a_whole_checkpoint_the_error_is_one_line(trained, tmp_path, run):
    said = run("export.py", cwd=tmp_path, code=1)
    assert "python train.py writes checkpoint.pt into the folder of its --out\n" in said
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.csv").touch()
    said = run("export.py", "--checkpoint", "run", cwd=tmp_path, code=1)
    assert "run has no checkpoint yet; train.py saves one before its first preview" in said
    whole = (trained[0] / "run" / "checkpoint.pt").read_bytes()
    (tmp_path / "half.pt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.pt").write_text("not even a zip file")
    torch.save({"weights": torch.zeros(3)}, tmp_path / "other.pt")
    torch.save({"config": RunsCode(tmp_path / "executed")}, tmp_path / "code.pt")
    for name in ("half.pt", "text.pt", "other.pt", "code.pt"):
        said = run("export.py", "--checkpoint", name, cwd=tmp_path, code=1)
        assert f"{name} is damaged, or not a checkpoint of train.py" in said
    assert not (tmp_path / "model.onnx").exists() and not (tmp_path / "executed").exists()


def test_flags_choose_the_file_and_the_precision(trained, tmp_path, run, monkeypatch):
    calls = []
    monkeypatch.setattr(export, "write_onnx", lambda _, path, kind: calls.append((path, kind)))
    for flags, said in (
        ("--onnx checkpoint.pt", "such as model.onnx"),
        ("--half --to-diffusers folder", "need --onnx"),
        ("--half --int8", "not allowed with"),
    ):
        assert said in run("export.py", *flags.split(), cwd=tmp_path, code=2)
    for flags in ("", "--half", "--int8 --onnx new/x.onnx"):
        run("export.py", "--checkpoint", trained[0] / "run", *flags.split(), cwd=tmp_path)
    default = Path("model.onnx")
    assert calls == [(default, None), (default, "half"), (Path("new/x.onnx"), "int8")]
    assert not list(tmp_path.iterdir())


def test_without_diffusers_published_weights_are_one_line(tmp_path):
    (tmp_path / "config.json").touch()
    code = f"""
import sys
sys.path.insert(0, {str(HERE)!r})
sys.modules["diffusers"] = None
sys.argv = ["export.py", "--checkpoint", "."]
import export
export.main()
"""
    said = python("-c", code, cwd=tmp_path, code=1)
    assert ". is not a checkpoint; other weights need diffusers: pip install diffusers\n" in said
    assert "Traceback" not in said


def test_file_that_can_not_be_written_is_refused_first(trained, tmp_path, run, monkeypatch):
    """A full disk, which is noticed last, leaves the old file whole."""
    (tmp_path / "model.onnx").write_text("of before")
    words = ["export.py", "--checkpoint", trained[0] / "run" / "checkpoint.pt", "--onnx"]

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(export, "to_onnx", lambda *_: onnx.load(trained[0] / "model.onnx"))
    monkeypatch.setattr(os, "replace", full)
    said = run(*words, "model.onnx", cwd=tmp_path, code=1)
    assert "model.onnx can't be written and stays as it was: No space left on device" in said
    monkeypatch.setattr(export, "to_onnx", None)
    said = run(*words, "model.onnx/x.onnx", cwd=tmp_path, code=1)
    assert "x.onnx can't be written" in said and "model.onnx is not a folder" in said
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    assert "model.onnx can't be written" in run(*words, "model.onnx", cwd=tmp_path, code=1)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["of before"]


# -------------------------------------------------------------------------------- reduced precision


@pytest.mark.parametrize("kind, most", [("half", 0.003), ("int8", 0.02)])
def test_reduced_precision_is_as_exact_as_promised(kind, most, files):
    """Compare with torch on the images that export.py drew, with other noise, and on real ones."""
    folder, source, said = files
    ts, percents = (
        re.search(rf"^{head}(.*)", said[kind], re.M)[1].split() for head in ("  t ", "  error, %")
    )
    errors = dict(zip(map(int, ts), map(float, percents), strict=True))
    every = [*reduced.TIMES, 999]
    assert {200, 500, 999} <= set(errors) and list(errors) == every[-len(errors) :]
    assert kind == "int8" or list(errors) == every
    eps = reduced.eps_of(folder / f"{kind}.onnx")
    drawn, real = reduced.draw_images(source)[0], from_pixels(torch.from_numpy(demo_images()[::3]))
    for t in every:
        for x0 in (drawn, real):
            times = torch.full((len(x0),), t)
            x_t = PAPER.q_sample(x0, times, randn(*x0.shape))
            with torch.no_grad():
                expected = source.model(x_t, times)
            error = ((eps(x_t, times) - expected).square().mean() / expected.square().mean()).sqrt()
            assert error < 1.2 * most, t
            if x0 is drawn:
                assert 100 * error == pytest.approx(errors.get(t, 0), rel=0.4, abs=0.02)


def test_half_is_float16_except_where_that_costs_too_much(files):
    graphs = [onnx.load(files[0] / f"{kind}.onnx").graph for kind in ("None", "half")]
    exact, half = ({w.name.replace("model.", ""): w for w in g.initializer} for g in graphs)
    single = {name for name in half if name.endswith("weight") and half[name].data_type == FLOAT}
    exempt = "conv_in.", "conv_out.", "time_mlp.", "down.0.0."
    assert all(name.startswith(exempt) for name in single)
    assert {"time_mlp.0.weight", "time_mlp.2.weight", "conv_in.weight"} <= single
    assert half["up.0.0.conv1.weight"].data_type == TensorProto.FLOAT16
    for name in single:  # not rounded to float16
        np.testing.assert_array_equal(*(to_array(w[name]) for w in (half, exact)))
    for node in graphs[1].node:
        if node.op_type == "LayerNormalization":  # statistics in float32
            assert all(a.i == FLOAT for a in node.attribute if a.name == "stash_type")


def test_integers_are_used_from_a_t_on_and_not_below(files):
    folder, source, said = files
    first = int(said["int8"].split("float32 below t = ")[1].split(",")[0])
    choice = next(n for n in onnx.load(folder / "int8.onnx").graph.node if n.op_type == "If")
    branches = {a.name: a.g for a in choice.attribute}
    float32, int8 = branches["then_branch"], branches["else_branch"]
    assert not any(n.op_type == "QuantizeLinear" for n in float32.node)
    made = {w.name: w for w in int8.initializer}
    quantized = {n.input[0] for n in int8.node if n.op_type == "DequantizeLinear"} & set(made)
    weights = {name for name in quantized if made[name].data_type == TensorProto.INT8}
    assert len(weights) >= 8
    kept = {n.input[1] for n in int8.node if n.op_type == "Conv"} & set(made)
    kept = {name.removeprefix("model.") for name in kept}
    for name in kept:  # the first and the last layer, the first block, the shortcuts
        assert name.startswith(("conv_in", "conv_out", "down.0.0.")) or "shortcut" in name
    assert {"conv_in.weight", "conv_out.weight", "down.0.0.conv1.weight"} <= kept
    name = next(name for name in weights if name.startswith("model.up.0.0.conv1."))
    scale = next(n.input[1] for n in int8.node if n.input and n.input[0] == name)
    assert list(made[scale].dims) == [32]  # a scale for each output channel

    assert first > 0  # integers cannot resolve the weak noise at t = 0
    eps, x = reduced.eps_of(folder / "int8.onnx"), randn(2, 3, 8, 8)
    for times in ((first, first), (first - 1, 999), (0, 0)):
        t = torch.tensor(times)
        with torch.no_grad():
            is_float32 = (eps(x, t) - source.model(x, t)).abs().max() < 1e-5
        assert is_float32 == (min(times) < first)


@pytest.mark.parametrize("kind", KINDS[1:])
def test_too_large_errors_are_refused(kind, files, tmp_path, monkeypatch):
    monkeypatch.setattr(reduced, "MAX_ERROR", 1e-6)
    protos = [onnx.load(files[0] / f"{name}.onnx") for name in (kind, "None")]
    monkeypatch.setattr(export, "to_onnx", lambda *_: protos.pop())
    (tmp_path / "model.onnx").write_text("of before")
    with pytest.raises(SystemExit, match=rf"--{kind} changes eps by .*% at t = 999"):
        export.write_onnx(files[1], tmp_path / "model.onnx", kind)
    assert [p.read_text() for p in tmp_path.iterdir()] == ["of before"]


def test_reduced_precision_draws_the_same_images(files):
    networks = (ddpm_numpy.Network(files[0] / f"{kind}.onnx", "cpu") for kind in KINDS)
    images = [to_pixels(ddpm_numpy.sample(n, 4, steps=50)).astype(float) for n in networks]
    half, int8 = (np.abs(less - images[0]) for less in images[1:])
    assert half.mean() < 1 and half.max() <= 1 and int8.mean() < 8


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS[:2])
def test_all_of_the_network_runs_on_cuda(kind, files):
    ort.preload_dlls()
    options = ort.SessionOptions()
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    session = ort.InferenceSession(
        files[0] / f"{kind}.onnx", options, [("CUDAExecutionProvider", {"use_tf32": "0"})]
    )
    assert session.get_providers()[0] == "CUDAExecutionProvider"
    x, t = randn(3, 3, 8, 8), torch.tensor([0, 500, 999])
    (eps,) = session.run(["eps"], {"x_t": x.numpy(), "t": t.numpy()})
    with torch.no_grad():
        difference = np.abs(eps - files[1].model(x, t).numpy()).max()
    assert difference < (1e-4 if kind == "None" else 0.01)
