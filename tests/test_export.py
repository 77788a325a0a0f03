"""The promises of export.py: the ONNX file, reduced precision, and weights for diffusers."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from conftest import FULL_DISK, HERE, RunsCode, checkpoint, damaged, python
from PIL import Image
from safetensors.torch import load as load_safetensors
from safetensors.torch import save_file

import export
import pretrained
import sample
import train
from ddpm import Diffusion, UNet, cosine_betas, linear_betas
from test_ddpm import PAPER, VARIANCES, randn, small_unet

posix = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals and limits")

# ------------------------------------------------------------------------------------ the ONNX file


def test_onnx_file_is_what_it_promises(trained):
    path = trained[0] / "model.onnx"
    proto = onnx.load(path)
    onnx.checker.check_model(proto, full_check=True)
    assert [(o.domain, o.version) for o in proto.opset_import if not o.domain] == [("", 20)]
    inputs = {i.name: i.type.tensor_type for i in proto.graph.input}
    assert set(inputs) == {"x_t", "t"} and [o.name for o in proto.graph.output] == ["eps"]
    assert inputs["x_t"].elem_type == onnx.TensorProto.FLOAT
    assert inputs["t"].elem_type == onnx.TensorProto.INT64
    for tensor in (inputs["x_t"], inputs["t"], proto.graph.output[0].type.tensor_type):
        assert tensor.shape.dim[0].dim_param == "batch"
    assert [d.dim_value for d in inputs["x_t"].shape.dim[1:]] == [3, 8, 8]
    metadata = {p.key: p.value for p in proto.metadata_props}
    assert json.loads(metadata["ddpm.betas"]) == linear_betas().tolist()
    assert metadata["ddpm.variance"] == "large" and metadata["ddpm.step"] == "12"
    assert json.loads(metadata["ddpm.image_shape"]) == [3, 8, 8] and metadata["ddpm.source"]
    assert not list(trained[0].glob("model.onnx?*"))  # no .data beside it


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
    state = checkpoint(folder / "run")
    network = UNet(**state["config"]["model"]).eval()
    x, t = randn(5, 3, 8, 8), torch.tensor([0, 1, 2, 500, 999])
    eps = export.eps_of(folder / "model.onnx")(x, t)
    with torch.no_grad():
        network.load_state_dict(state["ema"])
        np.testing.assert_allclose(eps, network(x, t), rtol=0, atol=1e-5)
        network.load_state_dict(state["model"])
        assert (eps - network(x, t)).abs().max() > 1e-4


def test_comparison_with_torch_finds_other_weights_and_leaves_no_file(trained, tmp_path, run):
    folder, _ = trained
    source = train.load(folder / "run")
    eps = export.eps_of(folder / "model.onnx")
    assert pretrained.largest_difference(source.model, eps, (3, 8, 8), 1000) < 1e-5
    source.model.load_state_dict(checkpoint(folder / "run")["model"])
    assert pretrained.largest_difference(source.model, eps, (3, 8, 8), 1000) > 1e-4
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "largest_difference", lambda *_: 1e-3)
        said = run("export.py", "--checkpoint", folder / "run", cwd=tmp_path, code=1)
    assert "differs" in said and not list(tmp_path.iterdir())


def test_export_without_a_whole_checkpoint_is_one_line(trained, tmp_path, run):
    assert "python train.py writes a checkpoint" in run("export.py", cwd=tmp_path, code=1)
    said = run("export.py", "--onnx", "checkpoint.pt", cwd=tmp_path, code=2)
    assert "such as model.onnx" in said
    whole = (trained[0] / "run" / "checkpoint.pt").read_bytes()
    (tmp_path / "half.pt").write_bytes(whole[: len(whole) // 2])
    torch.save({"weights": torch.zeros(3)}, tmp_path / "other.pt")
    torch.save({"config": RunsCode(tmp_path / "executed")}, tmp_path / "code.pt")
    for name in ("half.pt", "other.pt", "code.pt"):
        said = run("export.py", "--checkpoint", name, cwd=tmp_path, code=1)
        assert f"{name} is not a checkpoint of train.py" in said
    assert not (tmp_path / "model.onnx").exists() and not (tmp_path / "executed").exists()
    (tmp_path / "model.onnx").mkdir()
    assert "model.onnx is a folder" in run("export.py", cwd=tmp_path, code=2)


def test_what_cannot_be_exported_is_said_before_the_work(trained, tmp_path, run, monkeypatch):
    monkeypatch.setattr(export, "load", None)  # no checkpoint may be read, nor the hub asked
    checkpoint = ["--checkpoint", trained[0] / "run"]
    for flags, code, said in (
        (["--checkpoint", "rnu/checkpoint.p"], 1, "does not exist; python train.py writes"),
        ([*checkpoint, "--onnx", "x.onnx", "--to-diffusers", "x.onnx"], 2, "must be apart"),
        ([*checkpoint, "--onnx", "d/x.onnx", "--to-diffusers", "d"], 2, "must be apart"),
        ([*checkpoint, "--onnx", "m\udcf6.onnx"], 1, "ONNX Runtime can't open m\\udcf6.onnx"),
    ):
        assert said in run("export.py", *flags, cwd=tmp_path, code=code)
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    said = run("export.py", *checkpoint, "--to-diffusers", ".", cwd=tmp_path, code=1)
    assert "exists: use another name" in said and not os.listdir(tmp_path)


@posix
def test_terminated_export_leaves_no_temporary_files(trained, tmp_path):
    for _ in range(5):  # Python loses an exception that falls into a callback of its own
        run = subprocess.Popen(
            [sys.executable, HERE / "export.py", "--checkpoint", trained[0] / "run"],
            cwd=tmp_path, stdout=-3, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        while not list(tmp_path.iterdir()) and run.poll() is None:
            time.sleep(0.01)
        run.send_signal(signal.SIGTERM)
        said = run.communicate(timeout=60)[1]
        if "Exception ignored" not in said:
            break
        (tmp_path / "model.onnx").unlink(missing_ok=True)
    assert said == "export.py: stopped\n"
    assert run.returncode == 1 and not list(tmp_path.iterdir())


@posix
def test_full_disk_leaves_the_old_model_whole(trained, tmp_path):
    (tmp_path / "model.onnx").write_text("of before")
    said = python("-c", FULL_DISK, 1000, HERE / "export.py", "--checkpoint", trained[0] / "run",
                  cwd=tmp_path, code=1)  # fmt: skip
    assert "export.py: " in said and "too large" in said
    assert [p.read_text() for p in tmp_path.iterdir()] == ["of before"]


# -------------------------------------------------------------------------------- reduced precision


def errors_said(said):
    """The table that export.py prints: {t: error in %}."""
    rows = [line.split() for line in said.splitlines() if line.startswith(("  t ", "  error, %"))]
    return dict(zip(map(int, rows[0][1:]), map(float, rows[1][2:]), strict=True))


@pytest.mark.parametrize("kind", ["half", "int8"])
def test_reduced_precision_keeps_the_contract(kind, files):
    exact, reduced = onnx.load(files[0] / "None.onnx"), onnx.load(files[0] / f"{kind}.onnx")
    onnx.checker.check_model(reduced)
    for one, other in (
        (exact.graph.input, reduced.graph.input),
        (exact.graph.output, reduced.graph.output),
    ):
        assert [(v.name, v.type) for v in one] == [(v.name, v.type) for v in other]
    assert exact.metadata_props == reduced.metadata_props and len(reduced.metadata_props) == 5
    assert not {"Shape", "Gather", "Slice"} & {node.op_type for node in reduced.graph.node}
    eps = export.eps_of(files[0] / f"{kind}.onnx")
    for batch in (1, 2, 3):
        out = eps(randn(batch, 3, 8, 8), torch.full((batch,), 500))
        assert out.dtype == torch.float32 and out.shape == (batch, 3, 8, 8)


@pytest.mark.parametrize("kind, most", [("half", 0.003), ("int8", 0.02)])
def test_reduced_precision_is_as_exact_as_promised(kind, most, files):
    """Against torch, on the images that export.py drew, with other noise; and on real ones."""
    folder, source, said = files
    eps, errors = export.eps_of(folder / f"{kind}.onnx"), errors_said(said[kind])
    assert {100, 150, 200, 500, 999} <= set(errors) and (kind == "int8" or 0 in errors)
    drawn, real = export.drawn_by(source)[0], train.demo_pictures()[::3].float() / 127.5 - 1
    for t in (*export.TIMES, 999):
        for x0 in (drawn, real):
            times = torch.full((len(x0),), t)
            x_t = PAPER.q_sample(x0, times, randn(*x0.shape))
            with torch.no_grad():
                expected = source.model(x_t, times)
            error = ((eps(x_t, times) - expected).square().mean() / expected.square().mean()).sqrt()
            assert error < 1.2 * most, t
            if x0 is drawn:
                assert 100 * error == pytest.approx(errors.get(t, 0), rel=0.4, abs=0.02)


def test_name_of_the_file_does_not_matter(files, tmp_path, monkeypatch, capsys):
    """exact.onnx once was the name of the temporary float32 file too, and had no error then."""
    protos = [onnx.load(files[0] / f"{name}.onnx") for name in ("half", "None")]
    monkeypatch.setattr(export, "to_onnx", lambda *_: protos.pop())
    export.write_onnx(files[1], tmp_path / "exact.onnx", "half")
    assert [p.name for p in tmp_path.iterdir()] == ["exact.onnx"]
    assert errors_said(capsys.readouterr().out)[0] > 0
    assert (tmp_path / "exact.onnx").read_bytes() == (files[0] / "half.onnx").read_bytes()


def test_half_is_float16_except_where_that_costs_too_much(files):
    graph = onnx.load(files[0] / "half.onnx").graph
    types = {w.name.removeprefix("model."): w.data_type for w in graph.initializer}
    single = {name for name in types if name.endswith("weight") and types[name] == 1}
    assert all(name.startswith(("conv_in.", "time_mlp.", "down.0.0.")) for name in single), single
    assert {"time_mlp.0.weight", "time_mlp.2.weight", "conv_in.weight"} <= single
    assert types["up.0.0.conv1.weight"] == onnx.TensorProto.FLOAT16
    for node in graph.node:
        if node.op_type == "LayerNormalization":  # statistics in float32
            assert all(a.i == 1 for a in node.attribute if a.name == "stash_type")


def test_integers_are_used_from_a_t_on_and_not_below(files):
    folder, source, said = files
    first = int(said["int8"].split("float32 below t = ")[1].split(",")[0])
    choice = next(n for n in onnx.load(folder / "int8.onnx").graph.node if n.op_type == "If")
    branches = {a.name: a.g for a in choice.attribute}
    float32, int8 = branches["then_branch"], branches["else_branch"]
    assert not any(n.op_type == "QuantizeLinear" for n in float32.node)
    made = {w.name: w for w in int8.initializer}
    quantized = {n.input[0] for n in int8.node if n.op_type == "DequantizeLinear"} & set(made)
    weights = {name for name in quantized if made[name].data_type == onnx.TensorProto.INT8}
    kept = [n.input[1] for n in int8.node if n.op_type == "Conv" and n.input[1] in made]
    assert len(weights) >= 8
    for name in kept:  # the first and the last layer, the first block, the shortcuts
        assert name.startswith(("conv_in", "conv_out", "down.0.0.")) or "shortcut" in name
    assert {"conv_in.weight", "conv_out.weight", "down.0.0.conv1.weight"} <= set(kept)
    name = next(name for name in weights if name.startswith("up.0.0.conv1."))
    scale = next(n.input[1] for n in int8.node if n.input and n.input[0] == name)
    assert list(made[scale].dims) == [32]  # a scale for each output channel

    eps, x = export.eps_of(folder / "int8.onnx"), randn(2, 3, 8, 8)
    for times, precise in (((first, first), False), ((first - 1, 999), True), ((0, 0), True)):
        t = torch.tensor(times)
        if min(times) < 0 or (min(times) >= first) == precise:
            continue
        with torch.no_grad():
            assert ((eps(x, t) - source.model(x, t)).abs().max() < 1e-5) == precise


def test_too_large_errors_are_refused(files, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "REDUCED_TOLERANCE", 1e-6)
    for kind in ("half", "int8"):
        exports = iter(["None", kind])
        monkeypatch.setattr(
            export, "to_onnx", lambda *_, e=exports: onnx.load(files[0] / f"{next(e)}.onnx")
        )
        with pytest.raises(ValueError, match=rf"--{kind} changes eps by .*% at t = 999"):
            export.write_onnx(files[1], tmp_path / "model.onnx", kind)
    assert not list(tmp_path.iterdir())


def test_exports_at_once_each_write_a_whole_file(files, tmp_path, monkeypatch):
    """Another export to the same path starts and ends in the middle of each."""
    folder, source, _ = files
    protos = [onnx.load(folder / f"{name}.onnx") for name in ("None", "half", "None", "None")]
    path, kinds, written = tmp_path / "model.onnx", [None, "half"], []

    def interrupted(*_):
        if kinds:
            export.write_onnx(source, path, kinds.pop())
            written.append(path.read_bytes())
        return protos.pop()

    monkeypatch.setattr(export, "to_onnx", interrupted)
    export.write_onnx(source, path)
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]
    for content in (*written, path.read_bytes()):
        path.write_bytes(content)
        sample.Network(path, 1, "cpu")


@pytest.mark.parametrize("kind, most", [("half", 1), ("int8", 8)])
def test_reduced_precision_draws_the_same_images(kind, most, files, run):
    images = []
    for name in ("None", kind):
        flags = ["--onnx", f"{name}.onnx", "-n", 4, "--steps", 50, "--dir", f"{name}-for-{kind}"]
        run("sample.py", *flags, cwd=files[0])
        paths = sorted((files[0] / f"{name}-for-{kind}").iterdir())
        images.append(np.stack([np.asarray(Image.open(path), float) for path in paths]))
    difference = np.abs(images[0] - images[1])
    assert difference.mean() < most and (difference.max() <= 1 or kind == "int8")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
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


# -------------------------------------------------------------------------------- published weights

SHAPES = {  # size, base, mults, attention, groups
    "CIFAR-10": (32, 128, (1, 2, 2, 2), 16, 32),
    "256x256, shrunken": (64, 32, (1, 1, 2, 2, 4, 4), 4, 8),
    "tiny": (8, 8, (1, 2), 4, 2),
}


def diffusers_unet(size, base, mults, attention, groups, **kwargs):
    """Another implementation of the network, with weights of its own."""
    from diffusers import UNet2DModel

    here = [size >> level == attention for level in range(len(mults))]
    torch.manual_seed(1)
    settings = dict(
        sample_size=size,
        down_block_types=["AttnDownBlock2D" if a else "DownBlock2D" for a in here],
        up_block_types=["AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(here)],
        block_out_channels=[base * m for m in mults],
        layers_per_block=2,
        norm_num_groups=groups,
        norm_eps=1e-6,
        downsample_padding=0,
        freq_shift=1,
        flip_sin_to_cos=False,
        attention_head_dim=None,
    )
    return UNet2DModel(**(settings | kwargs)).eval()


def save_published(folder, layout="pipeline", safe=True, shape="tiny"):
    """A DDPM of diffusers' own with random weights, saved by diffusers; returns its network."""
    from diffusers import DDPMPipeline, DDPMScheduler

    unet = diffusers_unet(*SHAPES[shape])
    scheduler = DDPMScheduler(variance_type="fixed_large")
    DDPMPipeline(unet, scheduler).save_pretrained(folder, safe_serialization=safe)
    if layout == "flat":  # as google/ddpm-* are on the hub
        for path in [*(folder / "unet").iterdir(), *(folder / "scheduler").iterdir()]:
            path.rename(folder / path.name)
        (folder / "unet").rmdir()
        (folder / "scheduler").rmdir()
    return unet


def assert_same_network(ours, theirs):
    size, channels = ours.image_size, ours.conv_in.in_channels
    x, t = randn(2, channels, size, size), torch.tensor([3, 900])
    with torch.no_grad():
        eps = ours(x, t)
        assert eps.std() > 0.1
        torch.testing.assert_close(eps, theirs(x, t).sample, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_network_is_diffusers_network_in_both_directions(shape, tmp_path):
    """An independent implementation with the same weights computes the same eps, exactly."""
    theirs = save_published(tmp_path / "in", shape=shape)
    trained = train.load(tmp_path / "in")
    assert_same_network(trained.model, theirs)
    assert trained.diffusion.variance == "large" and not trained.model.training
    assert torch.equal(trained.diffusion.betas, linear_betas())
    pretrained.to_diffusers(trained.model, trained.settings, trained.diffusion, tmp_path / "out")
    again = type(theirs).from_pretrained(tmp_path / "out" / "unet").eval()
    assert_same_network(trained.model, again)
    configs = [
        {key: value for key, value in model.config.items() if not key.startswith("_")}
        for model in (theirs, again)
    ]
    assert configs[0] == configs[1]


@pytest.mark.parametrize("layout, safe, old", [("flat", True, False), ("flat", False, True)])
def test_published_weights_are_read_in_every_layout(layout, safe, old, tmp_path):
    theirs = save_published(tmp_path, layout, safe)
    if old:  # the names of attention's weights when google/ddpm-* were published
        path = tmp_path / "diffusion_pytorch_model.bin"
        state = torch.load(path)
        names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
        for new, word in names.items():
            state = {k.replace(f".{new}.", f".{word}."): v for k, v in state.items()}
        assert any("proj_attn" in k for k in state)
        torch.save(state, path)
    assert_same_network(train.load(tmp_path).model, theirs)


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("betas", [linear_betas(40, 1e-3, 0.3), cosine_betas(40)])
def test_diffusers_pipeline_draws_what_ddpm_py_draws(variance, betas, tmp_path):
    """All of Algorithm 2 against another implementation, opened from what export.py wrote."""
    from diffusers import DDPMPipeline

    model = small_unet(dropout=0.0).to(memory_format=torch.channels_last)  # as CUDA saves them
    settings = dict(image_size=8, in_channels=3, base_channels=8, channel_mults=(1, 2),
                    num_res_blocks=1, attention_resolutions=(4,), dropout=0.0)  # fmt: skip
    ours = model, settings, Diffusion(betas, variance)
    (tmp_path / "keep.tmp").mkdir()
    (tmp_path / "keep.tmp" / "mine").touch()
    pretrained.to_diffusers(*ours, tmp_path / "keep")
    assert {p.name for p in tmp_path.iterdir()} == {"keep", "keep.tmp"}
    assert (tmp_path / "keep.tmp" / "mine").is_file()
    with pytest.raises(ValueError, match="exists: use another name"):  # it may be another's
        pretrained.to_diffusers(*ours, tmp_path / "keep")
    pipeline = DDPMPipeline.from_pretrained(tmp_path / "keep")
    pipeline.set_progress_bar_config(disable=True)
    drawn = pipeline(2, torch.Generator().manual_seed(0), 40, output_type="np").images
    x0 = ours[2].sample(model, (2, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    assert x0.std() > 0.1
    np.testing.assert_allclose(drawn, (x0.permute(0, 2, 3, 1) + 1) / 2, rtol=0, atol=1e-4)
    back = train.load(tmp_path / "keep")
    torch.testing.assert_close(back.diffusion.betas, betas, rtol=1e-15, atol=0)
    assert back.diffusion.variance == variance


@pytest.mark.parametrize("predicts", ["mean", "v"])
def test_file_computes_eps_whatever_is_predicted(predicts, tmp_path, monkeypatch):
    from diffusers import DDPMScheduler

    model = small_unet(dropout=0.0)
    settings = dict(image_size=8, in_channels=3, base_channels=8, channel_mults=(1, 2),
                    num_res_blocks=1, attention_resolutions=(4,), dropout=0.0)  # fmt: skip
    diffusion = Diffusion(linear_betas(), predicts=predicts)
    export.write_onnx(train.Trained(model, diffusion, settings, 1, ""), tmp_path / "x.onnx")
    x, t = randn(3, 3, 8, 8), torch.tensor([5, 500, 999])
    with torch.no_grad():
        expected, raw = diffusion.predict_eps(model, x, t), model(x, t)
    torch.testing.assert_close(
        export.eps_of(tmp_path / "x.onnx")(x, t), expected, rtol=1e-4, atol=1e-4
    )
    assert (expected - raw).abs().max() > 0.1
    names = [node.name for node in onnx.load(tmp_path / "x.onnx").graph.node]
    assert any(name.startswith("conv_in/") for name in names)  # --int8 goes by such names
    if predicts == "mean":
        with pytest.raises(ValueError, match="can't express a network that predicts 'mean'"):
            pretrained.to_diffusers(model, settings, diffusion, tmp_path / "theirs")
        return
    pretrained.to_diffusers(model, settings, diffusion, tmp_path / "theirs")
    back = train.load(tmp_path / "theirs")
    assert back.diffusion.predicts == "v"
    scheduler = DDPMScheduler.from_pretrained(tmp_path / "theirs" / "scheduler")
    x0 = scheduler.step(raw[1:2], 500, x[1:2]).pred_original_sample
    ours = diffusion.predict_x0(x, t, expected)[1:2].clamp(-1, 1)
    torch.testing.assert_close(x0, ours, rtol=0, atol=1e-4)


def test_published_weights_to_images_and_back(pictures, tmp_path, run):
    """As a user: to model.onnx, to images, fine-tuned, evaluated, and to a folder again."""
    theirs = save_published(tmp_path / "published", layout="flat")
    said = run("export.py", "--diffusers", "published", cwd=tmp_path)
    assert "diffusers, published" in said
    x, t = randn(2, 3, 8, 8), torch.tensor([3, 900])
    eps = export.eps_of(tmp_path / "model.onnx")(x, t)
    with torch.no_grad():
        np.testing.assert_allclose(eps, theirs(x, t).sample, rtol=0, atol=1e-5)
    run("sample.py", "--onnx", "model.onnx", "-n", 1, "--steps", 5, cwd=tmp_path)
    flags = ["--data", pictures, "--init", "published", "--batch", 4]
    run("train.py", *flags, "--steps", 2, cwd=tmp_path)
    state = checkpoint(tmp_path / "run")
    assert state["config"]["model"]["norm_groups"] == 2
    assert state["config"]["model"]["dropout"] == 0.1  # of the training, not of the weights
    said = run("train.py", "--data", pictures, "--eval", "published", "--eval-images", 1,
               cwd=tmp_path)  # fmt: skip
    assert "on 1 images" in said and (tmp_path / "published" / "rate-distortion.csv").is_file()
    shutil.rmtree(tmp_path / "published")  # a run that has begun does without
    run("train.py", *flags, "--steps", 3, cwd=tmp_path)
    assert checkpoint(tmp_path / "run")["step"] == 3
    run("export.py", "--to-diffusers", "mine", cwd=tmp_path)
    mine, state = train.load(tmp_path / "mine").model.state_dict(), checkpoint(tmp_path / "run")
    assert all(torch.equal(mine[k], state["ema"][k]) for k in mine)
    said = run("export.py", "--to-diffusers", "run", cwd=tmp_path, code=1)
    assert "run exists: use another name" in said


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    folder = tmp_path_factory.mktemp("published")
    save_published(folder, layout="flat")
    return folder


@pytest.fixture
def copy(published, tmp_path):
    shutil.copytree(published, tmp_path / "copy")
    return tmp_path / "copy"


NETWORKS = [
    ("_class_name", "UNet2DConditionModel", "UNet2DConditionModel"),
    ("num_class_embeds", 10, "tensors are missing"),
    ("out_channels", 6, "mismatch"),
    ("in_channels", 4, ""),
    ("sample_size", None, ""),
    ("sample_size", [8, 16], ""),
    ("down_block_types", ["ResnetDownsampleBlock2D", "AttnDownBlock2D"], "tensors are missing"),
    ("up_block_types", ["UpBlock2D", "UpBlock2D"], "tensors are missing"),
    ("block_out_channels", [8, 12], ""),
    ("attention_head_dim", 8, "eps differs by"),
    ("freq_shift", 0, "eps differs by"),
    ("flip_sin_to_cos", True, "eps differs by"),
    ("downsample_padding", 1, "eps differs by"),
    ("norm_eps", 1e-5, "eps differs by"),
    ("act_fn", "gelu", "eps differs by"),
    ("resnet_time_scale_shift", "scale_shift", "mismatch"),
    ("add_attention", False, "tensors are missing"),
]
SCHEDULERS = [
    ("_class_name", "FlowMatchEulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler"),
    ("prediction_type", "sample", "prediction_type is sample"),
    ("variance_type", "learned_range", "variance_type is learned_range"),
    ("clip_sample", False, "clip_sample is False"),
    ("clip_sample_range", 2.0, "clip_sample_range is 2.0"),
    ("thresholding", True, "thresholding is True"),
    ("rescale_betas_zero_snr", True, "rescale_betas_zero_snr is True"),
    ("beta_schedule", "no such", "no such"),
    ("trained_betas", [2.0], "betas must be"),
]


@pytest.mark.parametrize(
    "file, key, value, said",
    [("config.json", *row) for row in NETWORKS]
    + [("scheduler_config.json", *row) for row in SCHEDULERS],
)
def test_what_ddpm_py_cannot_express_is_refused(file, key, value, said, copy):
    config = json.loads((copy / file).read_text())
    (copy / file).write_text(json.dumps(config | {key: value}))
    with pytest.raises(
        ValueError, match="is not a DDPM that ddpm.py can express.*" + said
    ) as refused:
        train.load(copy)
    assert "\n" not in str(refused.value)


def test_other_words_for_the_same_network_are_understood(copy):
    from diffusers import UNet2DModel

    config = json.loads((copy / "config.json").read_text())
    config |= {"sample_size": [8, 8], "act_fn": "swish", "attention_head_dim": 16}
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "scheduler_config.json").write_text('{"_class_name": "DDPMScheduler"}')
    trained = train.load(copy)
    assert_same_network(trained.model, UNet2DModel.from_pretrained(copy).eval())
    assert trained.diffusion.variance == "small"  # what diffusers takes an omitted key for


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"])
def test_schedules_of_diffusers(schedule, copy):
    from diffusers import DDPMScheduler

    theirs = DDPMScheduler(300, 2e-4, 0.03, schedule)
    theirs.save_pretrained(copy)
    torch.testing.assert_close(
        train.load(copy).diffusion.betas.float(), theirs.betas, rtol=1e-6, atol=1e-9
    )


def test_weights_that_are_not_weights_are_one_line(copy, run):
    path = copy / "diffusion_pytorch_model.safetensors"
    whole, state = path.read_bytes(), load_safetensors(path.read_bytes())

    def refusal():
        with pytest.raises(ValueError, match="is not a DDPM") as refused:
            train.load(copy)
        assert "\n" not in str(refused.value)
        return str(refused.value)

    for cut in (0, 4, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        refusal()
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    refusal()
    name = "mid_block.attentions.0.to_q.weight"
    save_file({k: v for k, v in state.items() if k != name}, path)
    assert f"1 tensors are missing and 0 left over, such as {name}" in refusal()
    save_file(state | {"ema.decay": torch.zeros(1)}, path)
    assert "0 tensors are missing and 1 left over, such as ema.decay" in refusal()
    save_file(state | {name: torch.zeros(3, 3)}, path)
    assert name in refusal()
    path.unlink()
    refusal()
    path = path.with_suffix(".bin")
    torch.save({name: RunsCode(copy / "executed")}, path)
    assert refusal() and not (copy / "executed").exists()
    torch.save(state, path)
    assert train.load(copy)
    (copy / "scheduler_config.json").unlink()
    assert "no readable scheduler_config.json" in refusal()
    for text in ("{", "[1]", "[" * 100_000):
        (copy / "config.json").write_text(text)
        assert "is not a DDPM" in run("export.py", "--diffusers", copy, cwd=copy, code=1)
    said = run("export.py", "--diffusers", "no/such-repository", cwd=copy, code=1)
    assert "no/such-repository is not a DDPM" in said


def test_damaged_files_are_refused_in_one_line(trained, copy):
    """Or read, if all the damage is in the value of a weight."""
    shutil.copy(trained[0] / "run" / "checkpoint.pt", copy.parent / "here.pt")
    shutil.copy(trained[0] / "model.onnx", copy.parent / "model.onnx")
    refused = dict.fromkeys(("here.pt", "copy", "model.onnx"), 0)
    cases = [(copy.parent / name, copy.parent / name, 60) for name in ("here.pt", "model.onnx")]
    cases += [(path, copy, 30) for path in copy.iterdir() if path.name != "model_index.json"]
    for path, source, n in cases:
        for _ in damaged(path, n):
            try:
                if path.suffix == ".onnx":
                    sample.Network(path, 1, "cpu")
                else:
                    train.load(source)
            except ValueError as error:
                assert "\n" not in str(error) and str(error)
                refused[source.name] += 1
    assert min(refused.values()) > 25


def test_diffusers_is_needed_only_for_published_weights(tmp_path):
    code = "import sys, runpy; sys.modules['diffusers'] = None; sys.argv = sys.argv[1:]; "
    code += "sys.path.insert(0, sys.argv[0].rpartition('/')[0]); "
    code += "runpy.run_path(sys.argv[0], run_name='__main__')"
    said = python("-c", code, HERE / "export.py", "--diffusers", ".", cwd=tmp_path, code=1)
    assert "pip install diffusers" in said
