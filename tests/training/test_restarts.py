"""A training on several processes that goes on after one of them was killed."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples" / "slurm.sbatch"
STEPS, KILLS = 14, 3
SMALL = shlex.split(
    "--model.stem.channels 8 --model.stem.num-res-blocks 1 --model.reducer.num-layers 3 "
    "--model.decoder.channels 8 --model.decoder.num-layers 1 --model.expander.dim 16 "
    "--model.expander.num-layers 1 --model.expander.num-heads 2 --data.max-images 40 "
    f"--train.num-steps {STEPS} --train.batch-size 8 --train.log-every 1 --train.save-every 2 "
    f"--train.eval-every {STEPS} --train.image-every {STEPS} --train.num-eval-images 8"
)


def start(out, *more):
    """`mergevq train` on four processes, as `torchrun` runs it."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "4", "--max-restarts", "0", "-m", "mergevq", "train"]
    command += ["digits32", "--out", str(out), "--train.device", "cpu", *SMALL, *more]
    with out.with_suffix(".log").open("a") as log:
        return subprocess.Popen(command, stdout=log, stderr=log)


def ended(process, out):
    """Wait for the end of a training, and fail with what it printed."""
    assert process.wait() == 0, out.with_suffix(".log").read_text()


def last_step(out):
    """Last step that was logged; -1 before the first."""
    log = out / "metrics.jsonl"
    lines = log.read_text().splitlines() if log.is_file() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=-1)


def workers(process):
    """The processes that `torchrun` started."""
    return [
        int(n) for n in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds the processes in /proc")
def test_a_run_whose_processes_are_killed_three_times_has_the_weights_of_one_that_was_left_alone(
    tmp_path,
):
    ended(start(tmp_path / "whole"), tmp_path / "whole")
    out, draw = tmp_path / "killed", torch.Generator().manual_seed(time.time_ns() % 2**31)
    kills = (torch.randperm(STEPS - 3, generator=draw)[:KILLS] + 1).sort().values.tolist()
    for kill in kills:
        running = start(out, *(["--resume"] if (out / "run.json").is_file() else []))
        while last_step(out) < kill and running.poll() is None:
            time.sleep(0.02)
        assert running.poll() is None, out.with_suffix(".log").read_text()
        os.kill(workers(running)[int(torch.randint(4, (), generator=draw))], signal.SIGKILL)
        assert running.wait() != 0
    ended(start(out, "--resume"), out)
    first, second = (
        (tmp_path / name / "model" / "model.safetensors").read_bytes()
        for name in ("whole", "killed")
    )
    assert first == second, f"killed after steps {kills}"
    assert len(json.loads((out / "run.json").read_text())["resumed"]) == KILLS


# ------------------------------------------------------------------------------------- scheduler


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Commands of a scheduler that note what they are asked for; the first run of each fails."""
    if shutil.which("bash") is None:
        pytest.skip("the script is one of bash")
    scripts = {
        "scontrol": "printf 'node1\\nnode2\\n'",
        "srun": 'echo "$@" >> asked; mkdir -p "runs/it"; '
        "if [ -f runs/it/run.json ]; then exit 0; fi; touch runs/it/run.json; exit 1",
    }
    for name, text in scripts.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.chdir(tmp_path)
    for name, value in {"JOB_ID": "7", "JOB_NODELIST": "node[1-2]", "NNODES": "2"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    return tmp_path / "asked"


def test_the_script_of_the_scheduler_starts_and_then_resumes(slurm):
    command = ["bash", str(SCRIPT), "imagenet256_gr", "runs/it", "--data.path", "a folder"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, second = slurm.read_text().splitlines()
    assert "torchrun --nnodes 2 --nproc-per-node 8" in first
    assert "--rdzv-endpoint node1:29500 --rdzv-id 7-1 -m mergevq train imagenet256_gr" in first
    assert first.endswith("--out runs/it --data.path a folder")
    assert second.endswith(
        "--rdzv-id 7-2 -m mergevq train imagenet256_gr --out runs/it --resume --data.path a folder"
    )


def test_the_script_gives_up_after_its_attempts(slurm, monkeypatch):
    monkeypatch.setenv("ATTEMPTS", "1")
    command = ["bash", str(SCRIPT), "imagenet256_gr", "runs/it"]
    assert subprocess.run(command, check=False, capture_output=True).returncode == 1
    assert len(slurm.read_text().splitlines()) == 1


def test_the_script_is_one_that_bash_reads():
    if shutil.which("bash") is None:
        pytest.skip("the script is one of bash")
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)
