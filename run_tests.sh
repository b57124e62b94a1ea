#!/usr/bin/env bash
# Set up with development packages, then run the tests; arguments go to pytest.
# With --slow first: all tests, the long ones of tests/slow too, and more random input.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
if [[ ${1:-} == --slow ]]; then
  shift
  set -- tests/test_*.py tests/slow --hypothesis-profile thorough "$@"
fi
exec ./setup.sh --dev -- pytest --numprocesses 2 --dist worksteal "$@"
