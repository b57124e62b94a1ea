"""run_train.sh with recorders in place of SLURM's commands and of Python. tests/slurm_check.sh runs it on
a real SLURM."""

import os
import signal
import subprocess

import pytest
from conftest import ROOT

PYTHON = """#!/usr/bin/env bash
case "$*" in
  *device_count*) echo "$N_GPUS" ;;
  -c*) echo "Python, PyTorch" ;;
  *) echo "ran: python $*"; exec {run} ;;
esac
"""


@pytest.fixture
def submit(tmp_path):
    """Start the script as a job with these flags. Return what it prints and its exit status."""
    folder = tmp_path / "checkout"
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / "multitask_classifier.py").touch()
    commands = tmp_path / "bin"
    commands.mkdir()

    def write(path, text):
        path.write_text(text)
        path.chmod(0o755)

    for name, line in {
        "scontrol": 'case $1 in show) echo n1; echo n2;; *) echo "$@";; esac',
        "srun": 'echo "ran: srun $*"; exec $STEP',
        "scancel": 'echo "scancel $@"; pkill -TERM -f "$STEP"',
    }.items():
        write(commands / name, f"#!/bin/sh\n{line}")

    def submit(*flags, run="true", gpus=0, signals=(), **variables):
        write(folder / ".venv" / "bin" / "python", PYTHON.format(run=run))
        job = dict(SLURM_JOB_ID="7", SLURM_SUBMIT_DIR=str(folder), SLURM_JOB_NODELIST="n[1-2]")
        job |= dict(SLURM_NNODES="1", N_GPUS=str(gpus), STEP="true") | variables
        # This path has no conda.
        path = f"{commands}:/usr/bin:/bin"
        with subprocess.Popen(
            [ROOT / "run_train.sh", *flags],
            env={"PATH": path, "HOME": os.environ.get("HOME", "/")} | job,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process:
            shown = ""
            while signals and "started" not in shown:
                shown += process.stdout.readline()
            for number in signals:
                process.send_signal(number)
            shown += process.communicate(timeout=30)[0]
        return shown, process.returncode

    return submit


def ran(shown):
    (line,) = [line for line in shown.splitlines() if line.startswith("ran: ")]
    return line.removeprefix("ran: ").split()


def test_one_gpu(submit):
    shown, code = submit("--epochs", "3", gpus=1)
    assert code == 0 and "PyTorch sees 1 GPUs here: --use_gpu" in shown
    assert ran(shown) == "python -u multitask_classifier.py --epochs 3 --use_gpu".split()
    for text in ("job 7 on n[1-2], start number 1", "Python, PyTorch", "commit "):
        assert text in shown


def test_no_gpu(submit):
    shown, _ = submit()
    assert "PyTorch sees no GPU: training on the CPU" in shown
    assert ran(shown) == "python -u multitask_classifier.py".split()


@pytest.mark.parametrize("gpus, nodes", [(4, "1"), (4, "2"), (1, "2")])
def test_several_gpus_or_nodes_start_torchrun_on_each_node(submit, gpus, nodes):
    shown, _ = submit("--epochs", "3", gpus=gpus, SLURM_NNODES=nodes)
    srun, *options = ran(shown)
    place = options.index("multitask_classifier.py")
    assert srun == "srun"
    assert options[place:] == "multitask_classifier.py --epochs 3 --use_gpu".split()
    assert {f"--nodes={nodes}", "--ntasks-per-node=1", "--cpu-bind=none"} < set(options)
    module = options[options.index("-m") : place]
    assert module[:2] == ["-m", "torch.distributed.run"]
    from torch.distributed.run import config_from_args, parse_args

    # What torchrun's own parser makes of it.
    arguments = parse_args([*module[2:], "multitask_classifier.py"])
    assert arguments.nnodes == nodes and arguments.nproc_per_node == "gpu"
    # There is no GPU to count.
    arguments.nproc_per_node = "1"
    config, _, _ = config_from_args(arguments)
    assert config.rdzv_backend == "c10d" and config.rdzv_endpoint == "n1:20007"
    assert config.run_id == "7" and config.min_nodes == int(nodes)


@pytest.mark.parametrize(
    "flags, added",
    [
        ([], ["--resume", "auto"]),
        (["--hpo"], ["--hpo_resume", "auto"]),
        (["--resume", "a.resume"], []),
        (["--resume=a.resume"], []),
        (["--evaluate", "a.pt"], []),
        (["--hpo", "--hpo_resume=x"], []),
    ],
)
def test_a_job_that_starts_again_continues(submit, flags, added):
    shown, _ = submit(*flags, SLURM_RESTART_COUNT="1")
    assert ran(shown)[3:] == flags + added
    assert "start number 2" in shown


SAVES = "bash -c 'trap \"exit 143\" TERM; echo started; while :; do sleep 0.05; done'"
FAILS = "bash -c 'trap \"exit 1\" TERM; echo started; while :; do sleep 0.05; done'"
FINISHES = "bash -c 'trap \"exit 0\" TERM; echo started; while :; do sleep 0.05; done'"


@pytest.mark.parametrize(
    "run, number, code, again",
    [
        (SAVES, signal.SIGUSR1, 143, True),  # time is over
        (SAVES, signal.SIGTERM, 143, False),  # scancel, or SLURM itself queues it again
        (FAILS, signal.SIGUSR1, 1, False),
        (FINISHES, signal.SIGUSR1, 0, False),
    ],
)
def test_a_run_whose_time_is_over_is_queued_again(submit, run, number, code, again):
    shown, found = submit(run=run, signals=[number])
    assert found == code
    assert ("requeue 7" in shown) == again


def test_steps_of_srun_are_signalled_by_slurm(submit, tmp_path):
    """A signal to srun itself would kill them."""
    step = tmp_path / "step"
    step.write_text("#!/bin/bash\ntrap 'exit 1' TERM\necho started\nwhile :; do sleep 0.05; done\n")
    step.chmod(0o755)
    shown, code = submit(gpus=2, STEP=str(step), signals=[signal.SIGUSR1])
    assert code == 1 and "scancel --signal=TERM 7" in shown and "requeue 7" in shown


def test_nodes_without_gpus_have_one_process_each(submit):
    assert "--nproc_per_node=1" in ran(submit(SLURM_NNODES="2")[0])


def test_the_run_does_not_see_usr1(submit):
    shown, _ = submit(run="bash -c 'kill -USR1 $$; echo survived'")
    assert "survived" in shown


@pytest.mark.parametrize("code", ["0", "3"])
def test_the_exit_status_is_the_runs(submit, code):
    assert submit(run=f"bash -c 'exit {code}'")[1] == int(code)


def test_what_a_job_needs_is_said(submit, tmp_path):
    assert "submit it with: sbatch run_train.sh" in submit(SLURM_JOB_ID="")[0]
    elsewhere = submit(SLURM_SUBMIT_DIR=str(tmp_path))
    assert "submit it from the folder of the repository" in elsewhere[0] and elsewhere[1] == 1


def test_the_job_asks_for_what_the_cluster_has():
    script = (ROOT / "run_train.sh").read_text()
    options = [line.split()[1] for line in script.splitlines() if line.startswith("#SBATCH ")]
    assert {"--partition=grete:shared", "--gpus=A100:1", "--time=12:00:00", "--requeue"} < set(
        options
    )
    assert any(option.startswith("--mem-per-gpu=") for option in options)
    assert "module load" not in script and "--mail" not in script
    assert (ROOT / "slurm_files").is_dir()  # SLURM makes no folder for its logs
