#!/usr/bin/env bash
# From nothing to a pruned and distilled model:  bash launch/quickstart.sh [--dry-run] [overrides …]
# Makes .venv at the repository root, installs the smallest set that works, and compresses a 135M-parameter model. It can be run again:
# what is installed and what is done is skipped. --dry-run shows the plan and the predicted time. Settings: launch/environment.sh.
set -euo pipefail

# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

install_minimal
run_script minitron "$MINITRON_VENV/bin/python" compress experiment=quickstart "$@"
