#!/usr/bin/env bash
# The main job on what comes with the repository: sample data, MiniLM weights, a CPU.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
exec ./setup.sh -- python -u multitask_classifier.py \
  --bert_model minilm --data_dir data/sample --epochs 2 --samples_per_epoch 1500 --lr 2e-4 "$@"
