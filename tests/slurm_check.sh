#!/usr/bin/env bash
# run_train.sh and run_hpo.sh on a real SLURM: a run that is stopped and queued again gives what an
# uninterrupted one gives; a search on all nodes loses no trial and leaves no process of Ray's. Needs
# a running SLURM on this machine (several slurmd make several nodes) with the partition grete:shared
# and an A100 (a pretended one does) and the rights of its operator (root); so it is no part of
# run_tests.sh. The training takes some six minutes, the search some four.
#
#   tests/slurm_check.sh [training|search]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
command -v sbatch >/dev/null && sinfo >/dev/null || { echo "no SLURM answers here" >&2 && exit 1; }
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

submit() { # script, name of the run, options of sbatch
  local script=$1 name=$2
  shift 2
  sbatch --parsable --output="$folder/$name.out" "$@" "$script" --bert_model minilm \
    --data_dir data/sample --epochs 3 --lr 2e-4 --max_length 48 "${flags[@]}" \
    --models_dir "$folder/$name/models" --logdir "$folder/$name/logdir" \
    --predictions_dir "$folder/$name/predictions"
}

state() {
  scontrol show job "$1" | grep -o 'JobState=[A-Z]*' | cut -d= -f2
}

wait_for() { # job, name of its run, what its log must say, how often
  until [[ $(grep -c "$3" "$folder/$2.out" 2>/dev/null) -ge ${4:-1} ]]; do
    if [[ $(state "$1") =~ FAILED|CANCELLED|TIMEOUT|COMPLETED ]]; then
      cat "$folder/$2.out" && echo "job $1 ended without: $3" >&2 && exit 1
    fi
    sleep 0.2
  done
}

start_again() { # a job that waits in the queue: in seconds (at once SLURM refuses), not in minutes
  until [[ $(state "$1") == PENDING ]]; do sleep 0.2; done
  sleep 3
  scontrol update "JobId=$1" StartTime=now
}

finish() {
  until [[ $(state "$1") =~ FAILED|CANCELLED|TIMEOUT|COMPLETED ]]; do sleep 1; done
  if [[ $(state "$1") != COMPLETED ]]; then
    cat "$folder/$2.out" && echo "job $1 has the state $(state "$1")" >&2 && exit 1
  fi
}

check_training() {
  local job name flags=(--samples_per_epoch 640)
  echo "an uninterrupted run"
  job=$(submit run_train.sh whole)
  finish "$job" whole
  sed -n '1,4p' "$folder/whole.out"

  echo "a run whose time is over (scancel --signal), that gives way to another job (scontrol requeue)"
  echo "and that is killed"
  job=$(submit run_train.sh stopped)
  wait_for "$job" stopped "epoch 2: *[3-6]0%"
  scancel --batch --signal=USR1 "$job"
  wait_for "$job" stopped "queued again"
  start_again "$job"
  wait_for "$job" stopped "resumed after 1 epochs and [1-9]"
  wait_for "$job" stopped "epoch 3: *[3-6]0%"
  scontrol requeue "$job"
  start_again "$job"
  wait_for "$job" stopped "resumed after 2 epochs and [1-9]"
  scancel --full --signal=KILL "$job"
  until [[ $(state "$job") =~ FAILED|COMPLETED|CANCELLED|TIMEOUT ]]; do sleep 0.2; done
  scontrol requeue "$job"
  start_again "$job"
  finish "$job" stopped

  echo "a run that SLURM itself signals half a minute before its minute is over"
  job=$(submit run_train.sh late --time=1 --signal=B:USR1@30)
  wait_for "$job" late "queued again"
  until [[ $(state "$job") == PENDING ]]; do sleep 0.2; done
  scontrol update "JobId=$job" TimeLimit=10
  start_again "$job"
  finish "$job" late

  for name in stopped late; do
    diff -r "$folder/whole/predictions" "$folder/$name/predictions"
    "${PYTHON:-.venv/bin/python}" - "$folder/whole/models" "$folder/$name/models" <<'PYTHON'
import pathlib, sys, torch
one, other = (torch.load(next(pathlib.Path(d).glob("*.pt")), weights_only=True) for d in sys.argv[1:])
assert one["dev_scores"] == other["dev_scores"]
assert all(torch.equal(one["model"][name], other["model"][name]) for name in one["model"])
PYTHON
    echo "$name: $(grep -c 'start number' "$folder/$name.out") starts, predictions and weights as without"
  done
}

wait_for_end_of_ray() { # of a job, on all nodes: they are on this machine
  for _ in $(seq 60); do
    pgrep -f "/tmp/ray-$1/" >/dev/null || [[ -e /tmp/ray-$1 ]] || return 0
    sleep 1
  done
  pgrep -af "/tmp/ray-$1/" | cut -c1-100 && echo "job $1 has left processes or /tmp/ray-$1" >&2 && exit 1
}

check_search() {
  local job nodes flags=(--samples_per_epoch 64 --batch_size 8 --hpo_trials 4 --hpo_cpus "$(nproc)")
  flags+=(--hpo_confirm 2 --hpo_seeds 1)
  nodes=$(sinfo --noheader --Node --format=%N | sort -u | wc -l)
  echo "a search on $nodes nodes, whose time is over and that gives way to another job"
  job=$(submit run_hpo.sh search "--nodes=$nodes")
  wait_for "$job" search "epoch 1:"
  scancel --batch --signal=USR1 "$job"
  wait_for "$job" search "queued again"
  wait_for_end_of_ray "$job"
  start_again "$job"
  wait_for "$job" search "is over, 2 of 4"
  scontrol requeue "$job"
  wait_for_end_of_ray "$job"
  start_again "$job"
  finish "$job" search
  wait_for_end_of_ray "$job"
  [[ $(grep -c "^nodes: $nodes; " "$folder/search.out") == 3 ]]
  [[ $(grep -c "^| [0-9]* |" "$folder/search.out") == 6 ]] # four trials, two of them twice
  [[ $(grep -o "^trial [0-9]*, epoch" "$folder/search.out" | sort -u | wc -l) == 4 ]]
  sed -n '/^| trial/,$p' "$folder/search.out"

  echo "a search that is cancelled"
  job=$(submit run_hpo.sh cancelled "--nodes=$nodes")
  wait_for "$job" cancelled "nodes: $nodes; "
  scancel "$job"
  wait_for_end_of_ray "$job"
}

[[ $# == 0 ]] && set -- training search
for part; do "check_$part"; done
