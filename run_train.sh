#!/usr/bin/env bash
# Train on a SLURM cluster, here Grete of the GWDG, from the folder of this repository:
#
#   sbatch run_train.sh [flags of multitask_classifier.py]
#   sbatch -G A100:4 run_train.sh ...            four GPUs of one node
#   sbatch -N 2 -G A100:8 run_train.sh ...       and of two
#
# A search for hyper-parameters has run_hpo.sh.
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

if [[ -z ${SLURM_JOB_ID:-} || ! -f $SLURM_SUBMIT_DIR/slurm_job.sh ]]; then
  echo "run_train.sh: submit it from the folder of the repository, with: sbatch run_train.sh" >&2
  exit 1
fi
cd "$SLURM_SUBMIT_DIR"
source ./slurm_job.sh
! has --hpo || fail "a search is started with: sbatch run_hpo.sh"
if ((${SLURM_RESTART_COUNT:-0} > 0)) && ! has --resume && ! has --evaluate; then
  flags+=(--resume auto)
fi

command=("$python" -u)
if ((n_gpus > 1 || SLURM_NNODES > 1)); then
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

run_until_time_is_over "${command[@]}" multitask_classifier.py "${flags[@]}"
