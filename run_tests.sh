#!/usr/bin/env bash
# Set up with development packages, then run the tests; arguments go to pytest. First may stand:
#   --slow        also the tests of tests/slow, which CI runs too
#   --endurance   all of these and tests/endurance, which take half an hour, and more random input
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
case ${1:-} in
  --slow) shift && set -- tests/test_*.py tests/slow "$@" ;;
  --endurance) shift && set -- tests/test_*.py tests/slow tests/endurance --hypothesis-profile thorough "$@" ;;
esac
exec ./setup.sh --dev -- pytest --numprocesses 2 --dist worksteal "$@"
