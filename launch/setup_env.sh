#!/usr/bin/env bash
# Makes the virtual environment of this checkout, .venv, from requirements.lock, and installs megalm into it (editable).
# Nothing is done when it is up to date. No compiler, CUDA toolkit or hub download is needed.
#
#   bash launch/setup_env.sh
#
# PYTHON          interpreter to build with, 3.10 or newer (default: the first that fits of python3, python3.13 ... 3.10)
# MEGALM_PYTHON   use this interpreter as it is; nothing is installed
# PIP_*           pip's own variables, for instance a mirror, or an extra index with CPU builds of torch
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv="$root/.venv"

if [ -n "${MEGALM_PYTHON:-}" ]; then
    echo "[setup] using MEGALM_PYTHON=$MEGALM_PYTHON as it is" >&2
    exit 0
fi

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11 python3.10}; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    echo "[setup] no Python of version 3.10 or newer among: ${PYTHON:-python3 python3.13 python3.12 python3.11 python3.10}" >&2
    echo "[setup] install one (Debian, Ubuntu: apt-get install python3 python3-venv), or name it in PYTHON" >&2
    return 2
}

# Debian keeps the part of Python that makes environments in a package of its own.
make_venv() {
    "$python" -m venv --clear "$venv" && return
    local version
    version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        echo "[setup] installing python$version-venv" >&2
        apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "python$version-venv" >&2
        "$python" -m venv --clear "$venv" && return
    fi
    echo "[setup] $python cannot make virtual environments; as root: apt-get install python$version-venv" >&2
    return 2
}

python=$(find_python)

# Two runs at once in one checkout: the second waits, then finds everything done.
exec 9>"$root/.venv.lock"
if command -v flock >/dev/null; then flock 9; fi

wanted=$({ "$python" --version; cat "$root/requirements.lock" "$root/pyproject.toml"; } | sha256sum | cut -d' ' -f1)
stamp="$venv/.megalm-stamp"
if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted $root" ] && "$venv/bin/python" -c '' 2>/dev/null; then
    exit 0
fi

started=$SECONDS
echo "[setup] making $venv with $("$python" --version) and the pins of requirements.lock" >&2
rm -f "$stamp"
"$venv/bin/python" -c 'import pip' 2>/dev/null || make_venv
PIP_DISABLE_PIP_VERSION_CHECK=1 "$venv/bin/python" -m pip install -qq -r "$root/requirements.lock" >&2
PIP_DISABLE_PIP_VERSION_CHECK=1 "$venv/bin/python" -m pip install -qq --no-deps --no-build-isolation -e "$root" >&2
echo "$wanted $root" >"$stamp"
echo "[setup] done in $((SECONDS - started)) s" >&2
