"""export.py: the ONNX file, which appears only after it agreed with torch, and mistakes."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from conftest import HERE
from onnx import TensorProto

import export
from ddpm import linear_betas
from run import Settings, build, load
from sample import Network, example
from test_ddpm import PAPER, randn

SHAPE = 3, 8, 8
TYPES = {"x_t": (TensorProto.FLOAT, ["batch", *SHAPE]), "t": (TensorProto.INT64, ["batch"])}
TYPES["y"], TYPES["eps"] = TYPES["t"], TYPES["x_t"]


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


def test_onnx_file_is_what_it_promises(trained):
    """It has the averaged weights, no nodes that CUDA leaves to the CPU, and no local paths."""
    folder, (_, said, _) = trained
    assert said.startswith("run: step 12\nmodel.onnx: 0.3 MB, eps within ")
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


def test_network_of_v_and_classes_returns_eps(tmp_path):
    """Its file has a third input, and takes any number of images."""
    small = Settings(base_channels=8, channel_mults=(1, 2), num_res_blocks=1, parts=("v",))
    small = replace(small, attention_resolutions=(4,), variance="small")
    network, diffusion = build(small, SHAPE, ("a", "b"))
    for weights in network.eval().requires_grad_(False).parameters():
        weights += 0.1 * torch.randn_like(weights)
    path = tmp_path / "model.onnx"
    export.write_onnx(network, diffusion, SHAPE, ("a", "b"), path)
    found, metadata, _ = properties(path)
    assert found == TYPES and metadata["ddpm.classes"] == '["a", "b"]'
    assert metadata["ddpm.variance"] == "small"
    for batch in (1, 2, 3, 7):
        x_t, t, y = randn(batch, *SHAPE), 150 * torch.arange(batch), torch.arange(batch) % 3
        eps = Network(path, "cpu")(x_t.numpy(), t.numpy(), y.numpy())
        np.testing.assert_allclose(eps, network(x_t, t, y), rtol=0, atol=1e-4)
    assert (network(x_t, t, y) - network(x_t, t)).abs().max() > 0.01
    assert (network(x_t, 0 * t + 999) - x_t).abs().max() < 0.1  # the noise in an x_t without signal
    x_t, t = map(torch.as_tensor, example(SHAPE, 1000))
    answer, expected = json.loads(metadata["ddpm.eps_of_example"]), network(x_t, t.view(1))
    np.testing.assert_allclose(answer, expected.flatten()[::3], rtol=0, atol=1e-4)


class Other(torch.nn.Module):
    """A network whose norm and attention have different arguments and shapes from the U-Net's."""

    def __init__(self):
        super().__init__()
        self.norm, self.weight = torch.nn.GroupNorm(1, 3, affine=False), torch.ones(())

    def forward(self, x_t, t):
        h = self.norm((self.weight * x_t).flatten(2))
        attend = torch.nn.functional.scaled_dot_product_attention
        return attend(h, h, h, scale=0.3).view_as(x_t) + t[:, None, None, None] / 1000


def test_no_file_appears_that_differs_from_torch(trained, tmp_path, monkeypatch):
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
    monkeypatch.setattr(export, "to_onnx", lambda *_: onnx.load(trained[0] / "model.onnx"))
    network = load(trained[0] / "run")[0]
    network.conv_out.bias.data.fill_(torch.nan)
    refused(network)


class RunsCode:
    """An object that creates a file when it is unpickled."""

    def __reduce__(self):
        return Path.touch, (Path("executed"),)


def test_mistakes_are_one_line(trained, tmp_path, run):
    """A folder without a checkpoint is no run, and no code in a file is executed."""
    assert "demo is not there; run train.py first" in run("export.py", cwd=tmp_path, code=1)
    for name in "demo", "run":
        (tmp_path / name).mkdir()
        said = run("export.py", cwd=tmp_path, code=1)
        assert f"{Path('demo', 'checkpoint.pt')} is not there; run train.py first" in said
    whole = (trained[0] / "run" / "checkpoint.pt").read_bytes()
    (tmp_path / "half.pt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.pt").write_text("not even a zip file")
    (tmp_path / "empty.pt").touch()
    torch.save({"settings": RunsCode()}, tmp_path / "code.pt")
    torch.save({"config": {}, "model": {}, "ema": {}, "step": 7}, tmp_path / "old.pt")
    for name in "half", "text", "empty", "code", "old":
        said = run("export.py", "--checkpoint", f"{name}.pt", cwd=tmp_path, code=1)
        why = "is not a checkpoint of this version" if name == "old" else "can't be read: "
        assert said.startswith(f"{name}.pt {why}")
    whole = "--checkpoint", trained[0] / "run"
    assert "such as model.onnx" in run("export.py", "--onnx", "run.pt", cwd=tmp_path, code=2)
    for path in "half.pt/x.onnx", "run/new.onnx":
        (tmp_path / "run" / "new.onnx").mkdir(exist_ok=True)
        said = run("export.py", *whole, "--onnx", path, cwd=tmp_path, code=1)
        assert f"{Path(path)} can't be written: " in said
    assert not list(tmp_path.glob("*.onnx")) and not (tmp_path / "executed").exists()


@pytest.mark.gpu
def test_all_of_the_network_runs_on_cuda(trained, coloured):
    ort.preload_dlls()
    options = ort.SessionOptions()
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    providers = [("CUDAExecutionProvider", {"use_tf32": "0"})]
    x, t, y = randn(3, *SHAPE), torch.tensor([0, 500, 999]), torch.tensor([0, 2, 3])
    for run, file in (
        (trained[0] / "run", trained[0] / "model.onnx"), (coloured, coloured / "model.onnx"),
    ):  # fmt: skip
        session, (network, *_) = ort.InferenceSession(file, options, providers), load(run)
        assert session.get_providers()[0] == "CUDAExecutionProvider"
        inputs = {"x_t": x, "t": t} | ({"y": y} if network.num_classes else {})
        (eps,) = session.run(["eps"], {name: value.numpy() for name, value in inputs.items()})
        with torch.no_grad():
            assert np.abs(eps - network(*inputs.values()).numpy()).max() < 1e-4
