"""The promises of train.py: the step, the settings and flags, and what one command does."""

import contextlib
import copy
import shlex
import signal
from functools import partial
from itertools import chain, product
from multiprocessing.pool import ThreadPool
from pathlib import Path

import networks
import numpy as np
import pytest
import torch
from conftest import HERE, TINY, read
from PIL import Image

import arguments
import folder
import images
import run
import train
from arguments import as_flag
from ddpm import UNet
from images import demo_images
from test_ddpm import PAPER, at, close, small_unet


def same_weights(one, other):
    return one.keys() == other.keys() and all(torch.allclose(one[k], other[k]) for k in one)


CPU, META = torch.device("cpu"), torch.device("meta")


def settings(**given):
    """Return the settings of the paper, but for those that are given."""
    return run.Settings(**dict(warmup=0, amp=False) | given)


# ----------------------------------------------------------------------------------------- the step


def test_learning_rate_rises_and_falls():
    s = settings(warmup=4, steps=20)
    assert [train.learning_rate(k, s) for k in (0, 1, 3, 9, 19)] == [5e-5, 1e-4, 2e-4, 2e-4, 2e-4]
    assert train.learning_rate(0, settings(steps=20)) == 2e-4
    s = settings(warmup=4, steps=20, cooldown=0.2)
    assert [train.learning_rate(k, s) for k in (1, 16, 18, 19)] == [1e-4, 2e-4, 1e-4, 5e-5]


def test_ema_forgets_the_first_weights():
    """The decay grows with the step."""
    model = torch.nn.LayerNorm(2)
    torch.nn.init.zeros_(model.weight)
    for step, share in (0, 0.1), (90, 0.91), (10**6, 0.9999):
        ema = torch.nn.LayerNorm(2).requires_grad_(False)
        train.update_ema(ema, model, step, 0.9999)
        close(ema.weight, [share] * 2)


def test_seeds_differ_for_every_seed_and_step_and_part():
    seen = set()
    for numbers in product(range(3), range(999), range(3)):
        train.set_seed(CPU, *numbers)
        seen.add(torch.initial_seed())
    assert len(seen) == 3 * 999 * 3
    assert max(seen) > 2**63  # all 64 bits: with 32, some seeds of a long run would be equal


@pytest.mark.parametrize("flip, parts, classes", [(True, 1, 0), (False, 3, 0), (True, 2, 3)])
def test_step_is_algorithm_1(flip, parts, classes, monkeypatch):
    """Compute the loss, its gradient, a step of gradient descent and the EMA by hand."""
    images = torch.from_numpy(demo_images()[::9].copy())
    labels = torch.arange(len(images)) % 3 if classes else None
    model = small_unet(dropout=0.0, num_classes=classes).train()
    start, ema = copy.deepcopy(model), copy.deepcopy(model).requires_grad_(False)
    *others, last = model.parameters()
    descent = torch.optim.SGD([{"params": others[::-1]}, {"params": [last]}])
    s = settings(batch=18, flip=flip, accumulate=parts, lr=0.2, warmup=4, seed=4)
    data = train.Data(images, labels, ("a", "b", "c")[:classes], "")
    events, set_seed = [], train.set_seed
    monkeypatch.setattr(train, "set_seed", lambda *a: events.append(a[1:]) or set_seed(*a))
    model.register_forward_pre_hook(lambda m, _: events.append(m.require_backward_grad_sync))
    loss, norm = next(train.algorithm_1(model, ema, descent, PAPER, data, s, 1))  # the second step
    expected = [[(4, 1, k + 1), k == parts - 1] for k in range(parts)]
    assert events == [(4, 1, 0), *chain(*expected)]  # the last part exchanges the gradients

    set_seed(CPU, 4, 1, 0)
    index = torch.randint(len(images), (18,))
    x0 = images[index].double() / 127.5 - 1
    mirrored = torch.rand(18, 1, 1, 1) < 0.5
    assert mirrored.any() and not mirrored.all()
    if flip:
        x0 = torch.where(mirrored, x0.flip(3), x0)
    t, noise = torch.randint(1000, (18,)), torch.randn(x0.shape)
    abar = at(PAPER.alphas_bar, t)
    x_t = (abar.sqrt() * x0 + (1 - abar).sqrt() * noise).float()
    y = labels[index].where(torch.rand(18) >= 0.1, 3) if classes else None
    by_hand = copy.deepcopy(start)
    expected = (noise - by_hand(x_t, t, y)).square().mean()
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    expected.backward()
    total = torch.stack([p.grad.norm() for p in by_hand.parameters()]).norm().item()
    assert norm == pytest.approx(total, rel=1e-4) and total > 1.1
    weights = [m.parameters() for m in (model, ema, start, by_hand)]
    for ours, average, before, p in zip(*weights, strict=True):
        close(ours, before - 0.1 * p.grad / total, 1e-5)  # in the second of four steps of warm-up
        close(average, 2 / 11 * before + 9 / 11 * ours, 1e-6)  # the EMA's decay grows
    assert all(p.grad is None for p in model.parameters())


def test_a_tenth_of_the_labels_is_dropped(monkeypatch):
    """The labels belong to their images and do not depend on the number of processes."""
    images, labels = torch.arange(5).byte().view(5, 1, 1, 1), torch.tensor([2, 0, 1, 2, 0])
    data = train.Data(images, labels, ("a", "b", "c"), "")

    def drawn(processes, parts):
        """Return the true and the given labels of ten batches, (2, 21000)."""
        s, found = settings(batch=2100, flip=False, accumulate=parts), []
        monkeypatch.setattr("processes.WORLD", processes)
        for k, rank in product(range(10), range(processes)):
            monkeypatch.setattr("processes.RANK", rank)
            for x0, _, _, y in train.draw_batch(data, PAPER, k, s, CPU):
                assert len(x0) == 2100 / processes / parts
                number = ((x0.flatten() + 1) * 127.5).round().long()
                found.append(torch.stack([labels[number], y]))
        return torch.cat(found, 1)

    true, given = whole = drawn(1, 1)
    assert ((given == true) | (given == 3)).all()
    assert (given == 3).float().mean().item() == pytest.approx(0.1, abs=0.004)
    assert torch.equal(drawn(1, 3), whole) and torch.equal(drawn(2, 3), whole)


def test_half_of_the_images_are_mirrored():
    data = train.Data(torch.tensor([[[[0, 255]]]]).byte(), None, (), "")
    ((x0, *_),) = train.draw_batch(data, PAPER, 0, settings(batch=40_000), CPU)
    assert x0[..., 0].mean().item() == pytest.approx(0, abs=0.02)


@pytest.mark.parametrize("home", ["cpu", "meta"])
def test_batch_is_on_the_device_of_the_network(home, monkeypatch):
    """A training set that is too large for the device stays on the CPU."""
    monkeypatch.setattr(train, "set_seed", lambda *_: None)
    data = train.Data(torch.zeros(5, 1, 2, 2).byte(), torch.arange(5) % 3, ("a", "b", "c"), "")
    data = data._replace(images=data.images.to(home), labels=data.labels.to(home))
    (batch,) = train.draw_batch(data, PAPER, 0, settings(batch=4), META)
    assert {part.device.type for part in batch} == {"meta"}


@pytest.mark.parametrize("amp", [True, False])
def test_amp_computes_the_network_in_bfloat16(amp, tiny, tmp_path, monkeypatch):
    """This works on processors without bfloat16, too. x_t, the loss and the weights are float32."""
    seen, unet = set(), UNet.forward

    def watched(self, x_t, t, y=None):
        seen.add((x_t.dtype, unet(self, x_t, t).dtype))
        return unet(self, x_t, t)

    monkeypatch.setattr(UNet, "forward", watched)
    torch.set_autocast_dtype("cpu", torch.float16)  # the default of CUDA
    try:
        said = tiny("--steps", 1, "--amp" if amp else "--no-amp")
    finally:
        torch.set_autocast_dtype("cpu", torch.bfloat16)
    kind = "bfloat16" if amp else "float32"
    assert seen == {(torch.float32, getattr(torch, kind))} and f"cpu, {kind}" in said
    assert {w.dtype for w in read(tmp_path / "run")["model"].values()} == {torch.float32}


@pytest.mark.parametrize("parts, names", [((), ()), ((), "ab"), (run.QUICK["parts"], "ab")])
def test_network_is_one_graph_over_three_steps(parts, names):
    """Neither the paper's network nor that of --quick makes the compiler break or begin again."""
    small = {"image_size": 8, "base_channels": 8, "channel_mults": (1, 2), "num_res_blocks": 1}
    small |= {"attention_resolutions": (4,), "parts": parts}
    network, diffusion = run.build(run.Settings(**small), (3, 8, 8), names)
    graphs, keep = [], lambda graph, _: graphs.append(graph) or graph
    torch.compiler.reset()
    compiled = torch.compile(network, backend=keep, fullgraph=True, dynamic=False)
    for k in range(3):
        y = torch.tensor([k % 2, len(names)]) if names else None
        loss = diffusion.loss(partial(compiled, y=y), torch.zeros(2, 3, 8, 8))
        loss.backward()
    assert len(graphs) == 1


def test_compile_is_a_flag(tiny, monkeypatch):
    calls = []
    monkeypatch.setattr(torch, "compile", lambda model, **options: calls.append(options) or model)
    tiny("--steps", 1)
    tiny("--steps", 2, "--compile")
    (options,) = calls
    assert {*options["options"]} <= {*torch._inductor.list_options()}


# -------------------------------------------------------------------------------------- one command


def test_commands_from_folder_to_images(program, exported, image_folder, tmp_path):
    """Each printed command works, and the checkpoint describes itself."""
    for out, *words in ("demo", "--steps", 2), ("run", "--data", image_folder, *TINY, "--steps", 9):
        said = program("train.py", *words, cwd=tmp_path)
        assert f"images   {12 if words[2:] else 216} of 3x8x8\n" in said
        for line in said.splitlines()[-2:]:
            name, path, *flags = shlex.split(line)
            assert name == "python" and Path(path) == HERE / Path(path).name
            assert "--steps" not in flags
            program(Path(path).name, *flags, cwd=tmp_path)
        assert same_weights(read(out)["ema"], exported[-1][0].state_dict())
        assert Path("samples.png").exists()
        Path("samples.png").unlink()
        assert run.default_run() == out
    names = {path.name for path in Path("run").iterdir() if not path.match(images.DECODED)}
    assert names == {"checkpoint.pt", "log.csv", "preview-0000009.png", ".lock"}
    rows = Path("run/log.csv").read_text().splitlines()
    assert rows[0] == "step,loss,grad_norm,lr" and len(rows) == 10
    network, diffusion, state = run.load("run")
    keys = {"settings", "shape", "names", "images", "step", "model", "ema", "optimizer"}
    assert {*state} == keys | {"source"} and state["settings"].keys() == {*run.NAMES}
    assert (state["step"], state["shape"], state["names"]) == (9, (3, 8, 8), ())
    assert torch.equal(diffusion.betas, PAPER.betas) and not network.training
    assert same_weights(network.state_dict(), state["ema"]) and state["optimizer"]["state"]
    assert not same_weights(state["model"], state["ema"])


def test_run_is_trained_from_python(image_folder, tmp_path, monkeypatch, capsys):
    """The network may be another one; flags are checked, and handlers of signals restored."""
    monkeypatch.chdir(tmp_path)
    before = signal.getsignal(signal.SIGTERM)

    def build(settings, shape, names=()):
        if settings.base_channels > 8:
            raise ValueError("base_channels must be 8")
        network, diffusion = run.build(settings, shape, names)
        return torch.nn.ModuleDict({"unet": network, "eps": network}), diffusion

    monkeypatch.setattr(torch.nn.ModuleDict, "forward", lambda self, *a, y: self["eps"](*a, y))
    monkeypatch.setattr(folder, "preview", lambda *_: Image.new("L", (1, 1)))
    small = {"image_size": 8, "base_channels": 8, "channel_mults": (1,), "batch": 2, "steps": 2}
    given = small | {"data": str(image_folder), "device": "cpu", "attention_resolutions": ()}
    train.main(given, build)
    ThreadPool(1).apply(train.main, [given | {"steps": 3}, build])  # where no signal can arrive
    state = run.load("run", build)[2]
    assert state["step"] == 3 and "eps.conv_in.weight" in state["ema"]
    assert signal.getsignal(signal.SIGTERM) == before
    with pytest.raises(SystemExit, match="base_channels must be 8"):
        train.main(given | {"base_channels": 12, "out": "new"}, build)
    for name, value in ("learning_rate", 1), ("parts", ("nope",)), ("batch", 0):
        with pytest.raises(SystemExit):
            train.main(given | {name: value}, build)
        assert as_flag(name)[0] in capsys.readouterr().err


def test_quick_is_a_set_of_settings(image_folder, tmp_path, program, monkeypatch):
    """Given one by one, or again when the run is resumed, they make the same run."""
    words = ["--data", str(image_folder), "--image-size", "8", "--batch", "4", "--steps", "1"]
    assert program("train.py", *words, "--quick", cwd=tmp_path).endswith("model.onnx --steps 10\n")
    spelt = [as_flag(*item) for item in run.QUICK.items() if item[0] not in ("batch", "steps")]
    monkeypatch.setattr("sys.argv", ["train.py", *words, *chain(*spelt)])
    state = run.read_checkpoint("run")
    s = arguments.choose_settings(arguments.command_line(""), None, CPU)
    assert vars(s) | {"in_channels": 3} == state["settings"]
    monkeypatch.setattr("sys.argv", ["train.py", *words[:-1], "2", "--quick"])
    again = arguments.choose_settings(arguments.command_line(""), state, CPU)
    assert vars(again) == state["settings"] | {"steps": 2}


def test_defaults_depend_on_the_run():
    """Warm-up and previews take a share of the steps; processes share the batch evenly."""
    for steps, batch, warmup, every in (
        (800_000, 128, 5000, 8000), (2000, 64, 100, 93), (9, 10_000, 0, 1), (100, 240, 5, 25),
    ):  # fmt: skip
        given = {"data": ".", "steps": steps, "batch": batch}
        s = arguments.choose_settings(given, None, CPU)
        assert (s.warmup, s.preview_every) == (warmup, every)
    for processes, refused in (1, False), (2, False), (4, True):
        given = {"data": ".", "batch": 12, "accumulate": 2}
        with pytest.raises(SystemExit) if refused else contextlib.nullcontext():
            arguments.choose_settings(given, None, CPU, processes)


def test_previews_have_the_same_noise_and_a_row_for_each_class():
    grids, model = [], torch.nn.Linear(1, 1)
    model.forward = networks.eps  # in closed form
    for seed in 0, 0, 1:
        torch.manual_seed(len(grids))
        image = folder.preview(model, (3, 4, 4), [*networks.COLOURS], settings(seed=seed))
        grids.append(np.asarray(image))
    assert np.array_equal(grids[0], grids[1]) and not np.array_equal(grids[0], grids[2])
    rows = np.array_split(grids[0], 3)
    for row, colour in zip(rows, networks.COLOURS.values(), strict=True):
        shown = np.median(row[row.min(2) < 255], 0) / 127.5 - 1
        np.testing.assert_allclose(shown, colour, atol=0.1)


def test_what_to_expect_is_said_before_the_training(tiny, program, tmp_path, monkeypatch):
    """It is about a large network on a CPU, and few images, but not about the demo."""
    slow = "on a CPU, training a network of this size takes very long; --quick takes minutes"
    copies = "with fewer than 1,000 images, long training can copy them (docs/beyond.md)"
    monkeypatch.setattr(train, "train", lambda *_: print("begins"))
    assert f"{copies}\n{slow}\nbegins" in tiny("--base-channels", 96, code=1)
    assert slow not in (said := tiny("--out", "small", code=1)) and copies in said
    assert copies not in program("train.py", cwd=tmp_path, code=1)


@pytest.mark.parametrize("module, name, error", [
    (UNet, "forward", ValueError), (train, "update_ema", RuntimeError),
])  # fmt: skip
def test_bug_keeps_its_traceback(module, name, error, tiny, monkeypatch):
    """In the exercises, the reader edits ddpm.py."""
    monkeypatch.setattr(module, name, lambda *_, **__: (_ for _ in ()).throw(error("a shape")))
    with pytest.raises(error, match="a shape"):
        tiny("--steps", 1)


REFUSED = {
    "--image-size 28 --data .": "image_size must be a multiple of 8",
    "--base-channels 30 --data .": "base_channels must be a multiple of 4",
    **dict.fromkeys(["--image-size 16", "--in-channels 1", "--quick", "--classes"], "needs --data"),
    "--steps 9": "o has no checkpoint; give --data",
    "--batch 6 --accumulate 4 --data .": "--batch must be a multiple of the number of GPUs times",
    "--init none --data .": "none is not there; run train.py first",
    "--out old --steps 9": "old/checkpoint.pt is damaged, or is not a checkpoint of this version",
    "--data none": "none is not a folder",
    "--data old": "old: there is no image that can be read",
    "--out .": ". has no checkpoint; give --data, or",
    "--out 0.png": "0.png/checkpoint.pt can't be written: ",
    "--out away": "away/checkpoint.pt can't be written: ",
    "--data . --classes": "has images outside of its sub-folders",
    "--device quantum": "--device quantum: Expected one of cpu, cuda",
    "--device cuda": "--device cuda: ",
    "--device xpu:1": "--device xpu:1: ",
}
MISREAD = {  # by argparse, which prints its usage, too
    "out of range": "dropout 2,batch 0,steps 0,seed -1,lr nan,lr inf,ema 1,channel-mults 0,"
    f"seed {2**63}",
    "invalid": "steps many,variance mean,parts x,in-channels 2",
    "unrecognized": "predicts v",
}


@pytest.mark.parametrize("out", ["new/deep/run", "old"])
def test_refused_images_leave_no_trace(out, program, class_folder, tmp_path):
    """Whether images are classes is known only when they are decoded."""
    (tmp_path / "old").mkdir()
    for name in "red", "blue":
        (tmp_path / "data" / name).mkdir(parents=True)
        (tmp_path / "data" / name / "0.png").write_bytes(b"broken")
    Image.new("RGB", (8, 8)).save(tmp_path / "data" / "red" / "1.png")
    before = sorted(tmp_path.rglob("*"))
    words = "--data", "data", "--classes", "--out", out, *TINY
    said = program("train.py", *words, cwd=tmp_path, code=1)
    assert "needs images in two sub-folders or more" in said and "left out 2 files" in said
    assert sorted(tmp_path.rglob("*")) == before


def test_ctrl_c_while_images_are_decoded_leaves_no_trace(image_folder, tmp_path, monkeypatch):
    def interrupted(paths, size, channels, file):
        file.write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(images, "decode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train.main({"data": str(image_folder), "out": str(tmp_path / "new" / "run")})
    assert not [*tmp_path.iterdir()]


def test_impossible_flags_are_one_line(tmp_path, program, monkeypatch):
    monkeypatch.setattr(train, "algorithm_1", None)  # no step may be taken
    monkeypatch.setattr(images, "read_image", None)  # and no image decoded
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    (tmp_path / "away").symlink_to("nowhere")
    (tmp_path / "old").mkdir()
    torch.save({"settings": {"lr_decay": True}}, tmp_path / "old" / "checkpoint.pt")
    for words, said in REFUSED.items():
        words = f"--device cpu --out o {words}".split()
        assert said in program("train.py", *words, cwd=tmp_path, code=1)
    for said, flags in MISREAD.items():
        for words in flags.split(","):
            assert said in program("train.py", *f"--{words}".split(), cwd=tmp_path, code=2)
    assert {path.name for path in tmp_path.rglob("*")} == {"0.png", "away", "old", "checkpoint.pt"}
