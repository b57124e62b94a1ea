#!/usr/bin/env bash
# Search for hyper-parameters on a SLURM cluster, here Grete of the GWDG, from the folder of this
# repository:
#
#   sbatch run_hpo.sh --hpo_trials 40 [more flags of hpo.py]
#   sbatch -N 4 run_hpo.sh --hpo_trials 200 ...       four nodes, one GPU of each
#   sbatch -N 2 --gpus-per-node=A100:4 run_hpo.sh ...
#
# Ray runs on all nodes of the job and ends with it. The search is saved, queued again and continued
# like a run of run_train.sh.
#SBATCH --job-name=multitask-bert-hpo
#SBATCH --partition=grete:shared
#SBATCH --gpus-per-node=A100:1
#SBATCH --cpus-per-gpu=2
#SBATCH --mem-per-gpu=32G
#SBATCH --time=12:00:00
#SBATCH --output=slurm_files/%x-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
set -euo pipefail

if [[ -z ${SLURM_JOB_ID:-} || ! -f $SLURM_SUBMIT_DIR/slurm_job.sh ]]; then
  echo "run_hpo.sh: submit it from the folder of the repository, with: sbatch run_hpo.sh" >&2
  exit 1
fi
cd "$SLURM_SUBMIT_DIR"
source ./slurm_job.sh
! has --ray_address || fail "the job starts Ray itself; leave --ray_address out"
if ((${SLURM_RESTART_COUNT:-0} > 0)) && ! has --hpo_resume; then
  flags+=(--hpo_resume auto)
fi

ray_on_this_node() { # until SLURM ends it; one task of srun on each node
  local role=(--address "$address") ray
  if ((SLURM_NODEID == 0)); then
    role=(--head --port "$port" --ray-client-server-port "$((port + 1))" --include-dashboard false)
  else
    until (: >"/dev/tcp/${address/:/\/}") 2>/dev/null; do sleep 1; done
  fi
  # Without the ports 0, workers take fixed ones. Ray finds the GPUs in CUDA_VISIBLE_DEVICES.
  "$python" -m ray.scripts.scripts start --block "${role[@]}" --node-name "$SLURMD_NODENAME" \
    --num-cpus "$SLURM_CPUS_ON_NODE" --min-worker-port 0 --max-worker-port 0 --temp-dir "$folder" &
  ray=$!
  trap 'kill "$ray"' TERM
  while kill -0 "$ray" 2>/dev/null; do wait "$ray"; done
  rm -rf "$folder"
  ((SLURM_NODEID > 0)) # if the head ends, all end: --kill-on-bad-exit
}

wait_for_nodes() {
  until (: >"/dev/tcp/${address/:/\/}") 2>/dev/null; do
    kill -0 "$step" 2>/dev/null || fail "Ray does not start; $log says why"
    sleep 1
  done
  # shellcheck disable=SC2046 # one word for each node
  "$python" - "$address" $(scontrol show hostnames "$SLURM_JOB_NODELIST") <<'PYTHON'
import sys, time, ray
ray.init(sys.argv[1], log_to_driver=False, logging_level="ERROR")
for _ in range(300):
    joined = {node["NodeName"] for node in ray.nodes() if node["Alive"]}
    if not (missing := sorted(set(sys.argv[2:]) - joined)):
        sys.exit()
    time.sleep(1)
sys.exit("after 5 minutes, Ray is missing on " + " ".join(missing))
PYTHON
}

# Jobs that share a node have other ports. Their Rays know each other by no other means than the
# token, which also keeps other users out: who reaches Ray can run programs.
port=$((10000 + SLURM_JOB_ID % 5000 * 2))
read -r address RAY_AUTH_TOKEN < <("$python" -c '
import ray, secrets
print(ray.util.get_node_ip_address(), secrets.token_hex())')
address=$address:$port
# The paths of Ray's sockets may have 107 characters, so $TMPDIR may be too long.
folder=/tmp/ray-$SLURM_JOB_ID
log=slurm_files/ray-$SLURM_JOB_ID.out
export python address port folder RAY_AUTH_TOKEN RAY_AUTH_MODE=token
# As in hpo.py, which does not start this Ray.
export RAY_USAGE_STATS_ENABLED=0 RAY_worker_niceness=0 GOMP_SPINCOUNT=1000
# On SIGTERM, Ray would go on for half a minute; SLURM kills earlier.
export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0
export -f ray_on_this_node
srun "--nodes=$SLURM_NNODES" --ntasks-per-node=1 --cpu-bind=none --kill-on-bad-exit=1 --label \
  "--output=$log" --open-mode=append bash -c ray_on_this_node &
step=$!
clean_up() { # whatever ended the search
  scancel --signal=TERM "$SLURM_JOB_ID" 2>/dev/null || true # the step, not this shell
  timeout 20 tail --pid="$step" -f /dev/null || kill "$step" # on which srun kills the step
}
wait_for_nodes || fail "the search was not started; $log is Ray's output"
run_until_time_is_over "$python" -u hpo.py --ray_address "$address" "${flags[@]}"
