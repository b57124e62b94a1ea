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
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
echo "data: $data"

step() {
  local limit=$1 heading=$2 start=$SECONDS
  shift 2
  printf '\n## %s\n' "$heading"
  timeout "$limit" "$@" 2>&1 | tail -n 40 || echo "failed, or took more than $limit s"
  echo "($((SECONDS - start)) s)"
}

random_base() { # BERT-base cannot always be downloaded
  python - "$out/base" <<'PYTHON'
import sys
from base_bert import BertConfig
from bert import BertModel
from tokenizer import BertTokenizer
BertModel(BertConfig()).save_pretrained(sys.argv[1])
BertTokenizer.from_pretrained("minilm").save_pretrained(sys.argv[1])
PYTHON
}

train() { # the name of a run, and more flags
  python -u multitask_classifier.py --use_gpu --data_dir "$data" --models_dir "$out/$1" \
    --logdir "$out/$1/logdir" --predictions_dir "$out/$1/predictions" "${@:2}"
}

# Two runs, one of them interrupted, give the same predictions.
deterministic() {
  local flags=(--bert_model minilm --epochs 2 --samples_per_epoch 4000 --deterministic)
  train whole "${flags[@]}" | grep -E "^epoch|^saving|^mean"
  timeout -s INT 9 bash -c "$(declare -f train); data=$data out=$out train parts ${flags[*]}" | tail -n 1
  train parts "${flags[@]}" --resume auto | grep -E "^resumed|^epoch"
  diff -r "$out/whole/predictions" "$out/parts/predictions" && echo "the same predictions"
}
export -f random_base train deterministic
export data out

mkdir -p "$out/base"
step 10 "Machine" nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv
step 50 "Captured steps have the numbers of the plain way" python -m pytest -q tests/test_graphs.py \
  -k "replayed or failed or unfrozen or padding or bfloat16 or dropout or room"
step 45 "Tests of the kernels, compiled" python -m pytest -q tests/test_kernels.py
step 50 "Steps and evaluation, BERT-base" \
  python benchmarks/throughput.py --data_dir "$data" --use_gpu --base --evaluations 1
step 50 "A run of BERT-base with random weights: epochs, saving, memory" bash -c \
  'random_base && train base --bert_model "$out/base" --epochs 3 --samples_per_epoch 10000'
step 40 "A run of MiniLM that repeats itself, and goes on after Ctrl-C" bash -c deterministic
step 20 "Float16" bash -c \
  'train float16 --bert_model minilm --epochs 1 --samples_per_epoch 4000 --precision float16'
step 35 "Steps and evaluation, MiniLM" \
  python benchmarks/throughput.py --data_dir "$data" --use_gpu --evaluations 1
step 15 "Attention alone" \
  python benchmarks/attention.py --data_dir "$data" --use_gpu --heads 12 --width 64
step 15 "Other CUDA tests" \
  python -m pytest -q tests/test_bert.py tests/test_optimizer.py -k "cuda or flash_attention"
step 30 "BERT-base, the second peer compiled" \
  python benchmarks/throughput.py --data_dir "$data" --use_gpu --base --evaluations 1 --compile
