#!/usr/bin/env bash
# Measure on a machine with an H100, in six minutes at most, the most important first:
#
#   benchmarks/gpu.sh [--data_dir DIRECTORY]
#
# Each step has its own time limit, and a step that fails does not stop the next ones.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
data=data
[[ ${1:-} == --data_dir ]] && data=$2

step() {
  local limit=$1 heading=$2 start=$SECONDS
  shift 2
  printf '\n## %s\n' "$heading"
  timeout "$limit" "$@" 2>&1 | tail -n 40 || echo "failed, or took more than $limit s"
  echo "($((SECONDS - start)) s)"
}

step 20 "Machine" nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv
step 90 "Tests of the kernels, compiled" python -m pytest -q tests/test_kernels.py
step 30 "Other CUDA tests" python -m pytest -q tests/test_bert.py -k "attention"
for shape in "12 64" "12 32"; do
  step 40 "Attention alone, heads and width $shape" \
    python benchmarks/attention.py --data_dir "$data" --use_gpu --heads ${shape% *} --width ${shape#* }
done
step 70 "Steps and evaluation, BERT-base" \
  python benchmarks/throughput.py --data_dir "$data" --use_gpu --base --evaluations 1
step 60 "Steps and evaluation, MiniLM" \
  python benchmarks/throughput.py --data_dir "$data" --use_gpu --evaluations 1
