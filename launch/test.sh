#!/usr/bin/env bash
# The tests:  bash launch/test.sh [pytest arguments …]     (default: tests)
# Makes .venv at the repository root and installs the package with all its dependencies and the test tools. Settings: launch/environment.sh.
set -euo pipefail

# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

install_test
cd "$MINITRON_ROOT"
# With more threads than free cores a step of 5 ms takes up to a second; the tests' models are too small to gain from a second thread.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# The console script, not `python -m pytest`, which would put the root, and so the folder `kernels`, on the import path.
if (($# == 0)); then set -- tests; fi
# One worker a core, a file as a whole to one of them; MINITRON_TEST_WORKERS=0 runs all in one process, for a debugger.
workers="${MINITRON_TEST_WORKERS:-$("$MINITRON_VENV/bin/python" -c 'import os; print(min(8, os.cpu_count() or 1))')}"
run_script pytest "$MINITRON_VENV/bin/python" -n "$workers" --dist loadfile "$@"
