"""The promises of export.py: the ONNX file, reduced precision, and errors of the user."""

import contextlib
import errno
import json
import os
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from conftest import HERE, PAPER, RunsCode, SmallDiT, posix, python, randn, read
from PIL import Image

import export
from beyond import eps_of_output
from ddpm import UNet, linear_betas
from images import from_pixels
from support import reduced
from support.data import demo_images
from support.pretrained import largest_difference
from support.trained import load

DOUBLE = onnx.TensorProto.DOUBLE
FLOAT, FLOAT16 = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16
INT8, INT64 = onnx.TensorProto.INT8, onnx.TensorProto.INT64


# ------------------------------------------------------------------------------------ the ONNX file


def test_onnx_file_is_what_it_promises(trained):
    folder, _ = trained
    proto = onnx.load(folder / "model.onnx")
    onnx.checker.check_model(proto, full_check=True)
    assert [(o.domain, o.version) for o in proto.opset_import if not o.domain] == [("", 20)]
    inputs = {i.name: i.type.tensor_type for i in proto.graph.input}
    outputs = {o.name: o.type.tensor_type for o in proto.graph.output}
    assert set(inputs) == {"x_t", "t"} and set(outputs) == {"eps"}
    assert inputs["x_t"].elem_type == outputs["eps"].elem_type == FLOAT
    assert inputs["t"].elem_type == INT64
    for tensor in (*inputs.values(), *outputs.values()):
        assert tensor.shape.dim[0].dim_param == "batch"
    assert [d.dim_value for d in inputs["x_t"].shape.dim[1:]] == [3, 8, 8]
    metadata = {p.key: p.value for p in proto.metadata_props}
    assert json.loads(metadata["ddpm.betas"]) == linear_betas().tolist()
    assert metadata["ddpm.variance"] == "large" and metadata["ddpm.step"] == "12"
    assert json.loads(metadata["ddpm.image_shape"]) == [3, 8, 8] and metadata["ddpm.source"]
    assert not list(folder.glob("model.onnx?*"))  # no .data beside it


def doubles(graph):
    """What is float64 in a graph and in the branches of its nodes."""
    found = [tensor.name for tensor in graph.initializer if tensor.data_type == DOUBLE]
    for node in graph.node:
        for value in node.attribute:
            if (value.name, value.i) == ("to", DOUBLE) or value.t.data_type == DOUBLE:
                found.append(node.name)
            found += doubles(value.g)
    return found


@pytest.mark.parametrize("predicts", ["eps", "v", "x0", "mean"])
def test_no_file_holds_float64(predicts, trained, tmp_path):
    """Browsers cannot run it. The output is eps for every target, as in ddpm.py."""
    source = load(trained[0] / "run")
    source.predicts = predicts
    exact = export.to_onnx(source, source.model)
    assert not doubles(exact.graph)
    assert not doubles(export.to_onnx(source, reduced.Half(source.model)).graph)
    onnx.save(exact, tmp_path / "exact.onnx")
    chain = [(randn(2, 3, 8, 8), torch.tensor([5, 500]))]
    reduced.quantize(tmp_path / "exact.onnx", tmp_path / "int8.onnx", chain, ["conv_in"])
    both = reduced.choose_by_t(exact, onnx.load(tmp_path / "int8.onnx"), 100)
    assert not doubles(both.graph)
    with torch.no_grad():
        expected = source.eps(*chain[0])
    difference = (reduced.eps_of(tmp_path / "exact.onnx")(*chain[0]) - expected).abs().max()
    assert difference < 1e-4 * eps_of_output(source.diffusion, predicts)[1].abs().max()


def test_float32_modules_are_those_that_read_x_t_and_t_and_y_and_return_eps():
    """Of the U-Net, and of a transformer, which is exported with --half, too."""
    unet = UNet(8, 3, 8, (1, 2), 1, (4,), num_classes=3)
    names = ["time_mlp", "class_embedding", "conv_in", "down.0.0", "conv_out"]
    assert reduced.float32_modules(unet) == names
    model = SmallDiT().eval()
    assert reduced.float32_modules(model) == ["patches", "time", "blocks.0", "last"]
    half, inputs = reduced.Half(model), (randn(2, 3, 8, 8), torch.tensor([5, 500]))
    assert half.model.blocks[1]["mix"].weight.dtype == torch.float16
    assert half.model.blocks[0]["mix"].weight.dtype == torch.float32
    with torch.no_grad():
        torch.testing.assert_close(half(*inputs), model(*inputs), rtol=0, atol=1e-2)


def test_onnx_file_has_no_node_that_cuda_leaves_to_the_cpu(trained):
    ops = {node.op_type for node in onnx.load(trained[0] / "model.onnx").graph.node}
    assert "LayerNormalization" in ops and "Softmax" in ops
    assert not ops & {"Shape", "Gather", "Slice", "GroupNormalization", "InstanceNormalization"}


def test_onnx_file_contains_nothing_from_this_machine(trained):
    content = (trained[0] / "model.onnx").read_bytes()
    for trace in (b"site-packages", str(HERE).encode(), b"ddpm.py", b"stack_trace"):
        assert trace not in content


def test_onnx_file_is_the_averaged_network(trained):
    folder, _ = trained
    state = read(folder / "run")
    network = UNet(**state["config"]["model"]).eval()
    x, t = randn(5, 3, 8, 8), torch.tensor([0, 1, 2, 500, 999])
    eps = reduced.eps_of(folder / "model.onnx")(x, t)
    with torch.no_grad():
        network.load_state_dict(state["ema"])
        np.testing.assert_allclose(eps, network(x, t), rtol=0, atol=1e-5)
        network.load_state_dict(state["model"])
        assert (eps - network(x, t)).abs().max() > 1e-4


def test_file_that_differs_from_torch_is_not_written(trained, tmp_path, monkeypatch):
    folder, _ = trained
    source, eps = load(folder / "run"), reduced.eps_of(folder / "model.onnx")
    assert largest_difference(source.model, eps, (3, 8, 8), 1000) < 1e-5
    (tmp_path / "model.onnx").write_text("of before")
    monkeypatch.setattr(export, "to_onnx", lambda *_: onnx.load(folder / "model.onnx"))
    source.model.load_state_dict(read(folder / "run")["model"])
    for wrong in ("the weights that are not averaged", "not a number"):
        with pytest.raises(SystemExit, match=r"eps differs from torch's .* is not written"):
            export.write_onnx(source, tmp_path / "model.onnx")
        assert [p.read_text() for p in tmp_path.iterdir()] == ["of before"], wrong
        source.model.conv_out.bias.data.fill_(torch.nan)


# ------------------------------------------------------------------------------ errors of the user


def test_without_a_whole_checkpoint_the_error_is_one_line(trained, tmp_path, run):
    assert "python train.py writes checkpoint.pt into the folder of its --out\n" in run(
        "export.py", cwd=tmp_path, code=1
    )
    whole = (trained[0] / "run" / "checkpoint.pt").read_bytes()
    (tmp_path / "half.pt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.pt").write_text("not even a zip file")
    torch.save({"weights": torch.zeros(3)}, tmp_path / "other.pt")
    torch.save({"config": RunsCode(tmp_path / "executed")}, tmp_path / "code.pt")
    for name in ("half.pt", "text.pt", "other.pt", "code.pt"):
        said = run("export.py", "--checkpoint", name, cwd=tmp_path, code=1)
        assert f"{name} is damaged, or not a checkpoint of train.py" in said
    assert not (tmp_path / "model.onnx").exists() and not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--onnx", "checkpoint.pt"], "such as model.onnx"),
        (["--half", "--to-diffusers", "folder"], "need --onnx"),
        (["--half", "--int8"], "not allowed with"),
        (["--checkpoint", "run", "--diffusers", "google/ddpm-cifar10-32"], "not allowed with"),
    ],
)
def test_flags_that_make_no_sense_are_refused(flags, said, tmp_path, run):
    assert said in run("export.py", *flags, cwd=tmp_path, code=2)
    assert not list(tmp_path.iterdir())


def test_flags_choose_the_file_and_the_precision(trained, tmp_path, run, monkeypatch):
    calls = []
    monkeypatch.setattr(export, "write_onnx", lambda _, path, kind: calls.append((path, kind)))
    for flags in ([], ["--half"], ["--int8", "--onnx", "new/x.onnx"]):
        run("export.py", "--checkpoint", trained[0] / "run", *flags, cwd=tmp_path)
    default = Path("model.onnx")
    assert calls == [(default, None), (default, "half"), (Path("new/x.onnx"), "int8")]


# -------------------------------------------------------------------------------- reduced precision


def errors_said(said):
    """Return the table that export.py prints: {t: error in %}."""
    rows = [line.split() for line in said.splitlines() if line.startswith(("  t ", "  error, %"))]
    return dict(zip(map(int, rows[0][1:]), map(float, rows[1][2:]), strict=True))


@pytest.mark.parametrize("kind", ["half", "int8"])
def test_reduced_precision_keeps_the_contract(kind, files):
    exact, less = onnx.load(files[0] / "None.onnx"), onnx.load(files[0] / f"{kind}.onnx")
    onnx.checker.check_model(less)
    for one, other in (
        (exact.graph.input, less.graph.input),
        (exact.graph.output, less.graph.output),
    ):
        assert [(v.name, v.type) for v in one] == [(v.name, v.type) for v in other]
    assert exact.metadata_props == less.metadata_props and len(less.metadata_props) == 5
    assert not {"Shape", "Gather", "Slice"} & {node.op_type for node in less.graph.node}
    eps = reduced.eps_of(files[0] / f"{kind}.onnx")
    for batch in (1, 2, 3):
        out = eps(randn(batch, 3, 8, 8), torch.full((batch,), 500))
        assert out.dtype == torch.float32 and out.shape == (batch, 3, 8, 8)


@pytest.mark.parametrize("kind, most", [("half", 0.003), ("int8", 0.02)])
def test_reduced_precision_is_as_exact_as_promised(kind, most, files):
    """Against torch, on the images that export.py drew, with other noise; and on real ones."""
    folder, source, said = files
    eps, errors = reduced.eps_of(folder / f"{kind}.onnx"), errors_said(said[kind])
    every = [*reduced.TIMES, 999]
    assert {200, 500, 999} <= set(errors) and list(errors) == every[-len(errors) :]
    assert kind == "int8" or list(errors) == every
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
    graph = onnx.load(files[0] / "half.onnx").graph
    types = {w.name.replace("model.", ""): w.data_type for w in graph.initializer}
    single = {name for name in types if name.endswith("weight") and types[name] == FLOAT}
    assert all(
        name.startswith(("conv_in.", "conv_out.", "time_mlp.", "down.0.0.")) for name in single
    )
    assert {"time_mlp.0.weight", "time_mlp.2.weight", "conv_in.weight"} <= single
    assert types["up.0.0.conv1.weight"] == FLOAT16
    values = {  # not rounded to float16
        kind: {
            w.name.replace("model.", ""): onnx.numpy_helper.to_array(w)
            for w in onnx.load(files[0] / f"{kind}.onnx").graph.initializer
        }
        for kind in ("None", "half")
    }
    for name in single:
        np.testing.assert_array_equal(values["half"][name], values["None"][name])
    for node in graph.node:
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
    weights = {name for name in quantized if made[name].data_type == INT8}
    assert len(weights) >= 8
    kept = [n.input[1] for n in int8.node if n.op_type == "Conv" and n.input[1] in made]
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


@pytest.mark.parametrize("kind", ["half", "int8"])
def test_too_large_errors_are_refused(kind, files, tmp_path, monkeypatch):
    monkeypatch.setattr(reduced, "TOLERANCE", 1e-6)
    protos = [onnx.load(files[0] / f"{name}.onnx") for name in (kind, "None")]
    monkeypatch.setattr(export, "to_onnx", lambda *_: protos.pop())
    (tmp_path / "model.onnx").write_text("of before")
    with pytest.raises(SystemExit, match=rf"--{kind} changes eps by .*% at t = 999"):
        export.write_onnx(files[1], tmp_path / "model.onnx", kind)
    assert [p.read_text() for p in tmp_path.iterdir()] == ["of before"]


@pytest.mark.parametrize("kind, most", [("half", 1), ("int8", 8)])
def test_reduced_precision_draws_the_same_images(kind, most, files, tmp_path, run):
    images = []
    for name in ("None", kind):
        model = files[0] / f"{name}.onnx"
        run("sample.py", "--onnx", model, "-n", 4, "--steps", 50, "--dir", name, cwd=tmp_path)
        paths = sorted((tmp_path / name).glob("*.png"))
        images.append(np.stack([np.asarray(Image.open(path), float) for path in paths]))
    difference = np.abs(images[0] - images[1])
    assert difference.mean() < most and (difference.max() <= 1 or kind == "int8")


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["None", "half"])
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


def test_missing_packages_are_one_line(tmp_path):
    for package in ("onnxscript", "onnxruntime", "onnx"):
        code = f"import sys; sys.modules[{package!r}] = None; import export"
        said = python("-c", code, cwd=HERE, code=1)
        assert said.startswith(f"export.py needs {package}") and "Traceback" not in said


def test_file_that_can_not_be_written_is_refused_first(trained, tmp_path, run, monkeypatch):
    monkeypatch.setattr(export, "to_onnx", None)
    (tmp_path / "file").write_text("mine")
    words = ["--checkpoint", trained[0] / "run" / "checkpoint.pt", "--onnx"]
    said = run("export.py", *words, "file/model.onnx", cwd=tmp_path, code=1)
    assert "file/model.onnx can't be written" in said and "file is not a folder" in said
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    said = run("export.py", *words, "model.onnx", cwd=tmp_path, code=1)
    assert "model.onnx can't be written" in said


@posix
def test_full_disk_is_one_line_and_leaves_the_model_whole(trained, tmp_path, run, monkeypatch):
    """Only the file itself is too large: the temporary files are in another folder."""
    (tmp_path / "model.onnx").write_text("of before")
    monkeypatch.setattr(export, "to_onnx", lambda *_: onnx.load(trained[0] / "model.onnx"))
    write = export.replacing

    @contextlib.contextmanager
    def full(path):
        with write(path) as file:
            yield file
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(export, "replacing", full)
    words = ["--checkpoint", trained[0] / "run" / "checkpoint.pt"]
    said = run("export.py", *words, cwd=tmp_path, code=1)
    assert "model.onnx can't be written and stays as it was: No space left on device" in said
    assert [path.read_text() for path in tmp_path.iterdir()] == ["of before"]
