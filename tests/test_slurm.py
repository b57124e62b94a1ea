"""run_train.sh and run_hpo.sh with recorders in place of SLURM's commands and of Python.
tests/slurm_check.sh runs them on a real SLURM."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

PYTHON = """#!/usr/bin/env bash
case "$*" in
  *device_count*) echo "$N_GPUS" ;;
  *node_ip*) echo 127.0.0.1 secret ;;
  -c*) echo "Python, PyTorch" ;;
  "-m ray"*) echo "ray of $SLURMD_NODENAME $*"; 
    [[ $* == *--head* ]] && role=HEAD; exec $RAY $role ;;
  "- "*) exec $REAL_PYTHON "$@" ;;
  *) echo "ran: python $*"; exec {run} ;;
esac
"""


@pytest.fixture
def submit(tmp_path):
    """Start the script as a job with these flags. Return what it prints and its exit status."""
    folder = tmp_path / "checkout"
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / "slurm_files").mkdir()
    shutil.copy(ROOT / "slurm_job.sh", folder)
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

    def submit(*flags, script="run_train.sh", run="true", gpus=0, signals=(), **variables):
        write(folder / ".venv" / "bin" / "python", PYTHON.format(run=run))
        job = dict(SLURM_JOB_ID="7", SLURM_SUBMIT_DIR=str(folder), SLURM_JOB_NODELIST="n[1-2]")
        job |= dict(SLURM_NNODES="1", N_GPUS=str(gpus), STEP="true") | variables
        # This path has no conda.
        path = f"{commands}:/usr/bin:/bin"
        with subprocess.Popen(
            [ROOT / script, *flags],
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
        (["--resume", "a.resume"], []),
        (["--resume=a.resume"], []),
        (["--evaluate", "a.pt"], []),
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


@pytest.mark.parametrize("script", ["run_train.sh", "run_hpo.sh"])
def test_what_a_job_needs_is_said(submit, tmp_path, script):
    for variables in (dict(SLURM_JOB_ID=""), dict(SLURM_SUBMIT_DIR=str(tmp_path))):
        shown, code = submit(script=script, **variables)
        wanted = f"{script}: submit it from the folder of the repository, with: sbatch {script}\n"
        assert shown == wanted and code == 1


@pytest.mark.parametrize(
    "script, gpus", [("run_train.sh", "--gpus=A100:1"), ("run_hpo.sh", "--gpus-per-node=A100:1")]
)
def test_the_job_asks_for_what_the_cluster_has(script, gpus):
    text = (ROOT / script).read_text()
    options = [line.split()[1] for line in text.splitlines() if line.startswith("#SBATCH ")]
    assert {"--partition=grete:shared", gpus, "--time=12:00:00", "--requeue"} < set(options)
    assert any(option.startswith("--mem-per-gpu=") for option in options)
    assert "module load" not in text and "--mail" not in text
    assert (ROOT / "slurm_files").is_dir()  # SLURM makes no folder for its logs


# ---------------------------------------------------------------------------- searches on all nodes

# As many tests as pytest has processes run at the same time, each with its own port.
JOB = os.getpid()
PORT = 10000 + JOB % 5000 * 2

# The task of srun on each node, its output in the file that --output names. Both are signalled like
# the tasks of a step.
SRUN = """#!/bin/bash
for word; do case $word in --output=*) exec > "${word#--output=}" 2>&1;; esac; done
echo "srun $*"
while [[ $1 == --* ]]; do shift; done
for number in 0 1; do
  SLURM_NODEID=$number SLURMD_NODENAME=n$((number + 1)) SLURM_CPUS_ON_NODE=$((number + 2)) "$@" &
  echo $! >> "$TASKS"
done
wait -n || { kill $(cat "$TASKS"); wait; exit 1; }
wait
"""
# A node of Ray's. It has joined when it has made a file of its name. N2 may never join.
RAY = """
import os, pathlib, signal, socket, sys
signal.signal(signal.SIGTERM, lambda *_: sys.exit("ray has ended"))
if "HEAD" in sys.argv:
    server = socket.create_server(("127.0.0.1", int(os.environ["PORT"])))
if os.environ["SLURMD_NODENAME"] in os.environ["JOINING"]:
    pathlib.Path(__file__).with_name(os.environ["SLURMD_NODENAME"] + ".joined").touch()
signal.pause()
"""
# In place of the module `ray`, for which five minutes are shorter.
RAY_MODULE = """
import os, pathlib, time
time.sleep = lambda _, real=time.sleep: real(float(os.environ["SECOND"]))
init = lambda address, **_: None
joined = lambda: pathlib.Path(__file__).parent.glob("*.joined")
nodes = lambda: [dict(NodeName=path.stem, Alive=True) for path in joined()]
"""


@pytest.fixture
def search(submit, tmp_path):
    """Start a search on two nodes. Return what the job prints, its exit status, Ray's output."""
    tasks, daemon = tmp_path / "tasks", tmp_path / "daemon.py"
    daemon.write_text(RAY)
    (tmp_path / "bin" / "srun").write_text(SRUN)
    scancel = '#!/bin/sh\necho "scancel $@"\nkill $(cat "$TASKS")\n'
    (tmp_path / "bin" / "scancel").write_text(scancel)
    (tmp_path / "ray.py").write_text(RAY_MODULE)

    def search(*flags, **more):
        variables = dict(SLURM_NNODES="2", TASKS=str(tasks), RAY=f"{sys.executable} {daemon}")
        variables |= dict(REAL_PYTHON=sys.executable, PYTHONPATH=str(tmp_path))
        variables |= dict(JOINING="n1 n2", SECOND="0.1", PORT=str(PORT))
        variables |= dict(SLURM_JOB_ID=str(JOB)) | more
        shown, code = submit(*flags, script="run_hpo.sh", **variables)
        left = [pid for pid in tasks.read_text().split() if Path(f"/proc/{pid}").exists()]
        found = subprocess.run(["pgrep", "-f", daemon], capture_output=True, text=True)
        left += found.stdout.split()
        subprocess.run(["kill", "-KILL", *left], stderr=subprocess.DEVNULL)
        assert not left
        return shown, code, (tmp_path / "checkout" / "slurm_files" / f"ray-{JOB}.out").read_text()

    return search


def test_ray_runs_on_all_nodes_during_a_search(search):
    shown, code, log = search("--hpo_trials", "3", gpus=1)
    assert code == 0 and ran(shown)[2:] == (
        f"hpo.py --ray_address 127.0.0.1:{PORT} --hpo_trials 3 --use_gpu".split()
    )
    assert "srun --nodes=2 --ntasks-per-node=1" in log and log.count("ray has ended") == 2
    (head,) = [line for line in log.splitlines() if line.startswith("ray of n1 ")]
    (worker,) = [line for line in log.splitlines() if line.startswith("ray of n2 ")]
    assert f"--head --port {PORT} " in head and "--num-cpus 2 " in head
    assert f"--address 127.0.0.1:{PORT} " in worker and "--num-cpus 3 " in worker
    assert all(f"--temp-dir /tmp/ray-{JOB}" in line for line in (head, worker))


@pytest.mark.parametrize("number, again", [(signal.SIGUSR1, True), (signal.SIGTERM, False)])
def test_a_search_whose_time_is_over_is_queued_again(search, number, again):
    shown, code, log = search(run=SAVES, signals=[number])
    assert code == 143 and (f"requeue {JOB}" in shown) == again
    assert log.count("ray has ended") == 2


def test_a_search_that_starts_again_continues(search):
    assert ran(search(SLURM_RESTART_COUNT="1")[0])[-2:] == ["--hpo_resume", "auto"]


def test_a_search_continues_where_it_is_told_to(search):
    shown, _, _ = search("--hpo_resume", "x", SLURM_RESTART_COUNT="1")
    assert ran(shown)[-2:] == ["--hpo_resume", "x"]


def test_ray_ends_with_a_search_that_fails(search):
    _, code, log = search(run="bash -c 'exit 3'")
    assert code == 3 and log.count("ray has ended") == 2


def test_a_head_that_does_not_start_ends_the_job(search):
    shown, code, log = search(RAY="false")
    assert code == 1 and f"Ray does not start; slurm_files/ray-{JOB}.out says why" in shown
    assert "ray of n1" in log and "ran:" not in shown


def test_nodes_that_do_not_join_are_named(search):
    shown, code, _ = search(JOINING="n1", SECOND="0.001")
    assert code == 1 and "after 5 minutes, Ray is missing on n2\n" in shown
    assert "ran:" not in shown


def test_one_script_trains_and_the_other_searches(submit):
    shown, code = submit("--hpo")
    assert code == 1 and "a search is started with: sbatch run_hpo.sh" in shown
    shown, code = submit("--ray_address", "a:1", script="run_hpo.sh")
    assert code == 1 and "leave --ray_address out" in shown
