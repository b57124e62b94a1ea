#!/usr/bin/env bash
# Measure on a machine with an H100, in six minutes at most, the most important first:
#
#   benchmarks/gpu.sh [--data_dir DIRECTORY]
#
# Each step has its own time limit, and a step that fails does not stop the next ones.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
data=data
[[ -f $data/ids-sst-train.csv ]] || data=data/sample
[[ ${1:-} == --data_dir ]] && data=$2
echo "data: $data"

step() {
  local limit=$1 heading=$2 start=$SECONDS
  shift 2
  printf '\n## %s\n' "$heading"
  timeout "$limit" "$@" 2>&1 | tail -n 40 || echo "failed, or took more than $limit s"
  echo "($((SECONDS - start)) s)"
}

step 10 "Machine" nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv
step 60 "Captured steps have the numbers of the plain way" \
  python -m pytest -q tests/test_graphs.py -k "replayed or failed or unfrozen or padding or bfloat16"
step 60 "Tests of the kernels, compiled" python -m pytest -q tests/test_kernels.py
step 55 "Steps and evaluation, BERT-base" \
  python benchmarks/throughput.py --data_dir "$data" --use_gpu --base --evaluations 1
step 35 "A run of MiniLM, two epochs" python -u multitask_classifier.py --use_gpu --epochs 2 \
  --samples_per_epoch 10000 --bert_model minilm --data_dir "$data" --models_dir /tmp/gpu-models \
  --logdir /tmp/gpu-logs --predictions_dir /tmp/gpu-predictions
step 45 "Steps and evaluation, MiniLM" \
  python benchmarks/throughput.py --data_dir "$data" --use_gpu --evaluations 1
step 15 "Attention alone" \
  python benchmarks/attention.py --data_dir "$data" --use_gpu --heads 12 --width 64
step 20 "Other CUDA tests" python -m pytest -q tests/test_bert.py -k flash_attention
step 60 "BERT-base, the second peer compiled" \
  python benchmarks/throughput.py --data_dir "$data" --use_gpu --base --evaluations 1 --compile
