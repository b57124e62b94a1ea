# shellcheck shell=bash
# What run_train.sh and run_hpo.sh have in common. They source it in a job, in the folder of the
# repository. It sets python, n_gpus and flags (those given, and --use_gpu if there is a GPU).

fail() {
  echo "job $SLURM_JOB_ID: $*" >&2
  exit 1
}

has() { # whether a flag is among those given
  local flag=$1 given
  for given in "${flags[@]}"; do
    [[ $given == "$flag" || $given == "$flag="* ]] && return
  done
  return 1
}

clean_up() { :; } # a script may have its own

queue_again() {
  trap '' TERM # from SLURM, which ends the job for it
  clean_up
  trap - EXIT
  echo "queued again"
  scontrol requeue "$SLURM_JOB_ID"
}

stopped=143 # what a program ends with that has saved on SIGTERM
stop_run() { kill -TERM "$run"; }

run_until_time_is_over() { # a program: ends with its status; queued again if it had to save
  # USR1 comes to this shell alone (--signal=B:). On SIGTERM the program saves within a step.
  time_is_over=
  trap 'time_is_over=yes; echo "time is nearly over: saving"; stop_run' USR1
  trap 'echo "to be stopped: saving"; [[ $stopped == any ]] || stop_run' TERM # steps get it from SLURM
  (
    trap '' USR1
    exec "$@"
  ) &
  run=$!
  while wait "$run" || kill -0 "$run" 2>/dev/null; do # a signal ends the wait, not the run
    kill -0 "$run" 2>/dev/null || break
  done
  local code=0
  wait "$run" || code=$?
  if [[ -n $time_is_over && $code != 0 && ($stopped == any || $stopped == "$code") ]]; then
    queue_again
  fi
  exit "$code"
}

trap clean_up EXIT
# Until the program runs, there is nothing to save.
trap 'queue_again; exit' USR1
if command -v conda >/dev/null && conda env list | awk '{print $1}' | grep -qx dnlp2; then
  python=$(conda run -n dnlp2 python -c 'import sys; print(sys.executable)')
elif [[ -x .venv/bin/python ]]; then
  python=$PWD/.venv/bin/python
else
  fail "there is neither a conda environment dnlp2 nor a .venv; run ./setup.sh first"
fi

flags=("$@")
n_gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())')
echo "job $SLURM_JOB_ID on $SLURM_JOB_NODELIST, start number $((${SLURM_RESTART_COUNT:-0} + 1)), $(date)"
command -v nvidia-smi >/dev/null && nvidia-smi -L || true
"$python" -c 'import sys, torch; print(f"Python {sys.version.split()[0]}, PyTorch {torch.__version__}")'
echo "commit $(git rev-parse HEAD 2>/dev/null || echo unknown)"
if ((n_gpus > 0)); then
  echo "PyTorch sees $n_gpus GPUs here: --use_gpu"
  flags+=(--use_gpu)
else
  echo "PyTorch sees no GPU: training on the CPU"
fi
