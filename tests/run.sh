#!/usr/bin/env bash
# Makes the environment if need be and runs the tests; arguments go to pytest.
#
#   bash tests/run.sh                       everything, in as many processes as there are cores, four at most
#   bash tests/run.sh -m "not slow and not dist and not multinode" tests/unit
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/setup_env.sh
source launch/environment.sh
require_module pytest
# Many tests use one core or wait; a file's tests stay together, and the longest files come first.
if [ $# = 0 ] && "$python" -c 'import xdist' 2>/dev/null; then
    cores=$(env -u OMP_NUM_THREADS nproc) # nproc takes the variable for a limit
    set -- -n $((cores < 4 ? cores : 4)) --dist loadfile --no-loadscope-reorder
fi
exec "$python" -m pytest "$@"
