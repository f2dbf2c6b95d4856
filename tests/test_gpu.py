"""benchmarks/gpu.sh, here on the CPU with tiny sizes."""

import re
import subprocess

from conure import checkpoint

import pytest
import torch
from conftest import ROOT
from test_scripts import refused

import pruning
from benchmarks import gpu_checks
from benchmarks.gpu_checks import Check

SIZES = {"items": 500, "length": 12, "batch_size": 4, "channels": 8, "dilations": "1,4", "steps": 5, "rows": 20}
SIZES |= {"matmul_size": 64, "copy_mb": 1, "check_items": 300, "users": 100}
TINY = ["--device", "cpu", *(word for name, value in SIZES.items() for word in (f"--{name}", str(value)))]
AGREEING = [f"{precision}_{what}" for precision in ("float32", "bfloat16") for what in ("states", "gradients")]
CHECKS = {
    *(f"agreement_task_{task}_{kind}" for task in (1, 2) for kind in AGREEING),
    "owned_weights_bit_identical",
    "all_that_task_1_reads_bit_identical",
    "task_1_scores_as_recorded",
    "resume",
    "export_task_1",
    "export_task_2",
}
SECTIONS = ["ceilings", "step", "agreement", "scripts", "export", "wall", "ranking", "compiled_step"]
CPU = torch.device("cpu")


def lines(output: str, kind: str, key: str) -> dict[str, dict[str, str]]:
    """The lines that begin with `kind`, by their value of `key`."""
    found = [dict(re.findall(r"(\S+?)=(\S*)", line)) for line in output.splitlines() if line.startswith(f"{kind} ")]
    return {values[key]: values for values in found if key in values}


def without(*sections: str) -> list[str]:
    return [word for section in SECTIONS if section not in sections for word in ("--skip", section)]


def test_gpu_sh_runs_all_checks_and_measurements(tmp_path):
    script = ["bash", str(ROOT / "benchmarks" / "gpu.sh"), "--log", "gpu.log", *TINY, "--skip", "compiled_step"]
    done = subprocess.run(script, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "gpu.log").read_text() == done.stdout
    checks, measured = lines(done.stdout, "CHECK", "name"), lines(done.stdout, "BENCH", "what")
    assert set(checks) == CHECKS and all(check["ok"] == "true" for check in checks.values())
    assert int(checks["resume"]["at_step"]) > 1 and int(checks["owned_weights_bit_identical"]["owned"]) > 0
    assert {"ceilings", "step", "step_with_dropout", "adam", "wall", "kernel", "ranking"} <= set(measured)
    assert "unavailable" not in done.stdout and measured["skipped"]["section"] == "compiled_step"
    projections = lines(done.stdout, "BENCH", "of")
    assert set(projections) == {"step", "step_with_dropout"}
    for of, projection in projections.items():
        step = measured[of]
        assert float(projection["hours"]) == pytest.approx(float(step["mean"]) * 147_000 / 3600, rel=2e-3)
        assert projection["reached"] == ("true" if float(projection["minutes"]) <= 60 else "false")
        achieved = float(step["gflops"]) / float(measured["ceilings"]["matmul_gflops"])
        assert float(step["share_of_matmul_rate"]) == pytest.approx(achieved, rel=2e-3)
        raw = lines(done.stdout, "RAW", "what")[of]["ms"].split(",")
        assert sum(map(float, raw)) / 5e3 == pytest.approx(float(step["mean"]), rel=2e-3)


def test_a_section_that_would_exceed_the_time_limit_is_skipped(run_here, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    code, output, _ = run_here("benchmarks.gpu", *TINY, "--minutes", "0.1")
    skipped = re.findall(r"BENCH what=skipped section=(\w+) reason=no_time_left", output)
    assert code == 0 and skipped == SECTIONS and "CHECKS run=0" in output


@pytest.mark.parametrize("broken", [False, True])
def test_a_failed_or_broken_check_sets_the_exit_code_and_the_next_sections_run(run_here, monkeypatch, broken):
    def agreement(device, shape):
        yield Check("agreement_float32_states", False, {"difference": 0.5})
        if broken:
            raise RuntimeError("out of everything")

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(gpu_checks, "agreement", agreement)
    code, output, _ = run_here("benchmarks.gpu", *TINY, *without("agreement", "ranking"))
    assert code == 1 and "CHECK name=agreement_float32_states ok=false difference=0.5" in output
    assert ("CHECK name=agreement ok=false error=RuntimeError:_out_of_everything" in output) == broken
    assert "BENCH what=ranking rows=20" in output


def test_a_step_that_cannot_be_compiled_is_reported_as_unavailable(run_here, monkeypatch):
    def fails(*_):
        raise RuntimeError("no compiler")

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(torch, "compile", fails)
    code, output, _ = run_here("benchmarks.gpu", *TINY, *without("compiled_step"))
    assert code == 0 and "no compiler" in output and "BENCH what=compiled_step unavailable=RuntimeError:" in output


def test_an_unknown_section_is_refused(run_here):
    error = refused(run_here("benchmarks.gpu", "--skip", "stepp"))
    assert "--skip stepp is no section: give one of ceilings, step," in error


def test_the_chain_check_detects_one_changed_bit(chain_copy):
    folder = chain_copy / "checkpoints"
    assert all(check.ok for check in gpu_checks.chain(folder, CPU))
    content, _ = checkpoint.load(str(folder / "ret_t2.pt"))
    layer = next(pruning.owned_weights(checkpoint.build_model(content)))
    name = next(name for name in content["model"] if name.endswith(".owner")).replace(".owner", ".weight")
    place = tuple((layer.owner == 1).nonzero()[0])
    content["model"][name][place] = torch.nextafter(content["model"][name][place], torch.tensor(9.0))
    checkpoint.save(str(folder / "ret_t2.pt"), content)
    weights, everything, _ = gpu_checks.chain(folder, CPU)
    assert not weights.ok and weights.detail["changed"] == 1 and not everything.ok


def test_a_value_that_is_not_finite_never_agrees():
    expected = torch.ones(3)
    assert gpu_checks.relative(expected, expected) == 0
    assert gpu_checks.relative(torch.tensor([1.0, torch.nan, 1.0]), expected) == torch.inf
