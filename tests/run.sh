#!/usr/bin/env bash
# Makes the environment if need be and runs the tests; arguments go to pytest.
#
#   bash tests/run.sh                       everything
#   bash tests/run.sh -m "not slow and not dist and not multinode" tests/unit
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/setup_env.sh
source launch/environment.sh
require_module pytest
exec "$python" -m pytest "$@"
