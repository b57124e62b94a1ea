#!/usr/bin/env bash
# Train on a SLURM cluster, here Grete of the GWDG, from the folder of this repository:
#
#   sbatch run_train.sh [flags of multitask_classifier.py]
#   sbatch -G A100:4 run_train.sh ...            four GPUs of one node
#   sbatch -N 2 -G A100:8 run_train.sh ...       and of two
#
# Before its time limit, the run saves, is queued again and continues. The same happens if another job
# preempts it, or if a node fails.
#SBATCH --job-name=multitask-bert
#SBATCH --partition=grete:shared
#SBATCH --gpus=A100:1
#SBATCH --cpus-per-gpu=2
#SBATCH --mem-per-gpu=32G
#SBATCH --time=12:00:00
#SBATCH --output=slurm_files/%x-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
set -euo pipefail

fail() {
  echo "run_train.sh: $*" >&2
  exit 1
}

[[ -n ${SLURM_JOB_ID:-} ]] || fail "is for SLURM; submit it with: sbatch run_train.sh"
cd "$SLURM_SUBMIT_DIR"
[[ -f multitask_classifier.py ]] || fail "submit it from the folder of the repository"

if command -v conda >/dev/null && conda env list | awk '{print $1}' | grep -qx dnlp2; then
  python=$(conda run -n dnlp2 python -c 'import sys; print(sys.executable)')
elif [[ -x .venv/bin/python ]]; then
  python=$PWD/.venv/bin/python
else
  fail "there is neither a conda environment dnlp2 nor a .venv; run ./setup.sh first"
fi

has() { # whether a flag is among those given
  local flag=$1 given
  for given in "${flags[@]}"; do
    [[ $given == "$flag" || $given == "$flag="* ]] && return
  done
  return 1
}

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
if ((${SLURM_RESTART_COUNT:-0} > 0)) && ! has --resume && ! has --evaluate; then
  if ! has --hpo; then
    flags+=(--resume auto)
  elif ! has --hpo_resume; then
    flags+=(--hpo_resume auto)
  fi
fi

command=("$python" -u)
stopped=143 # what a run ends with that has saved on SIGTERM
stop_run() { kill -TERM "$run"; }
if ((n_gpus > 1 || SLURM_NNODES > 1)) && ! has --hpo; then
  nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
  first=${nodes%%$'\n'*}
  command=(srun "--nodes=$SLURM_NNODES" --ntasks-per-node=1 --cpu-bind=none
    "$python" -u -m torch.distributed.run "--nnodes=$SLURM_NNODES"
    "--nproc_per_node=$( ((n_gpus > 0)) && echo gpu || echo 1)" --shutdown-timeout=280
    "--rdzv_id=$SLURM_JOB_ID" --rdzv_backend=c10d
    "--rdzv_endpoint=$first:$((20000 + SLURM_JOB_ID % 20000))")
  stopped=any
  stop_run() { scancel --signal=TERM "$SLURM_JOB_ID"; } # the steps; srun itself would kill them
fi

# USR1 comes to this shell alone (B: above). On SIGTERM the run saves within a step.
time_is_over=
trap 'time_is_over=yes; echo "time is nearly over: saving"; stop_run' USR1
trap 'echo "to be stopped: saving"; [[ $stopped == any ]] || stop_run' TERM # steps get it from SLURM
(
  trap '' USR1
  exec "${command[@]}" multitask_classifier.py "${flags[@]}"
) &
run=$!
while wait "$run" || kill -0 "$run" 2>/dev/null; do # a signal ends the wait, not the run
  kill -0 "$run" 2>/dev/null || break
done
code=0
wait "$run" || code=$?
if [[ -n $time_is_over && $code != 0 && ($stopped == any || $stopped == "$code") ]]; then
  echo "queued again"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
