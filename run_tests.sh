#!/usr/bin/env bash
# Set up with development packages, then run the tests; arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
exec ./setup.sh --dev -- pytest "$@"
