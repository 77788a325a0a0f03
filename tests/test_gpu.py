"""The report of a GPU, the libraries that ONNX Runtime needs on it, steps that never wait."""

import os
import platform
import re
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import HERE, python

from benchmarks import gpu


@pytest.mark.slow
def test_every_part_of_the_report_runs_on_a_cpu(tmp_path):
    words = HERE / "benchmarks" / "gpu.py", "--tiny"
    said = python(*words, cwd=tmp_path, timeout=1000)
    report = tmp_path / "gpu-report"
    assert (report / "report.md").read_text() == said
    assert re.findall(r"^## (.*)", said, re.M) == [part.__name__ for part in gpu.PARTS]
    assert "failed" not in said and "skipped" not in said
    assert {path.suffix for path in report.iterdir()} == {".md", ".txt", ".log"}
    assert "| float32 | 0.0e+00 |" in said  # the gradient
    assert "| weights, resumed and whole | | 0.0e+00, relative to the weights |" in said
    ((first, last),) = re.findall(r"its mean loss \| \| ([\d.]+) in .*, ([\d.]+) in the l", said)
    assert float(last) < float(first)
    for kind, bound in {"torch": 0.03, "float32.onnx": 1e-5, "float16.onnx": 0.01}.items():
        (errors,) = re.findall(rf"^\| {kind} \|((?: [\d.e+-]+ \|){{5}})$", said, re.M)
        assert all(float(error) < bound for error in errors.replace("|", "").split())


def test_failures_and_hanging_programs_leave_the_other_rows(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(gpu, "OUT", tmp_path)
    report = gpu.Report(float("inf"), True)
    report.row("division", lambda: 1 / 0)
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    report.row("deaf", report.program, "deaf", "-c", deaf, limit=1)
    report.end = 0
    report.row("late", lambda: "never")
    division, sleeping, late = capfd.readouterr().out.splitlines()
    assert division == "| division | failed: ZeroDivisionError: division by zero |"
    assert sleeping.startswith("| deaf | failed: RuntimeError: deaf was stopped after 2 s")
    assert late == "| late | skipped: no time left |"


@pytest.mark.slow
@pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64" or not shutil.which("gcc"),
    reason="needs gcc, on the platform of onnxruntime-gpu",
)
def test_requirements_bring_every_library_that_onnx_runtime_needs_for_cuda(tmp_path):
    """With a stub in place of the driver, the provider loads, and CUDA finds the driver too old."""
    target = "-m", "pip", "install", "-q", "--target", tmp_path / "packages"
    python(*target, "-r", HERE / "requirements-cuda.txt", cwd=tmp_path, timeout=500)
    (tmp_path / "nvidia-smi").touch(0o755)
    stub = "int cuTensorMapEncodeTiled(void) { return 100; }"  # all that the provider links to
    words = "gcc -shared -x c - -o libcuda.so.1 -Wl,-soname,libcuda.so.1"
    subprocess.run(words.split(), input=stub, text=True, cwd=tmp_path, check=True)
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "packages"), "PATH": str(tmp_path)}
    words = [sys.executable, HERE / "sample.py", "--onnx", HERE / "docs" / "paper.onnx"]
    words += ["--device", "cuda", "--out", tmp_path / "samples.png"]
    environment |= {"LD_LIBRARY_PATH": str(tmp_path)}
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    assert re.search(r"CUDA failure 35: CUDA driver version is insufficient", done.stdout), done
    assert "sample.py: ONNX Runtime can't use CUDA. " in done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("accumulate", [1, 2])
def test_no_step_waits_for_the_device(accumulate):
    """Python prepares the next step while the GPU computes."""
    step = gpu.train_step(**gpu.TINY, accumulate=accumulate)
    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
