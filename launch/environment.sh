# Sourced by the other scripts of this folder: chooses the interpreter and sets the variables that a run needs.
#
# MEGALM_PYTHON     interpreter (default: .venv of this checkout, then python3)
# DS_ACCELERATOR    DeepSpeed's device; cpu is set here when no GPU is visible
# OMP_NUM_THREADS   threads of each process; 1 is set here on CPUs, where every core already has a process
# CUDA_DEVICE_MAX_CONNECTIONS  1 is set here on GPUs: kernels start in the order in which they were given, so that what
#                   tensor parallelism sends is under way before the product that hides it
# PYTORCH_CUDA_ALLOC_CONF  expandable_segments:True is set here on GPUs: less memory lost between tensors
# TRITON_DEFAULT_FP_FUSION  1 is set here on GPUs: what Triton has done so far, and warns from 3.9 on that it will not

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

if [ -n "${MEGALM_PYTHON:-}" ]; then
    python=$MEGALM_PYTHON
elif [ -x "$root/.venv/bin/python" ]; then
    python=$root/.venv/bin/python
else
    python=$(command -v python3) || { echo "no python3 on PATH; run: bash launch/setup_env.sh" >&2; exit 2; }
fi

export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
export TOKENIZERS_PARALLELISM=${TOKENIZERS_PARALLELISM:-false}

gpu_is_visible() {
    [ "${CUDA_VISIBLE_DEVICES-all}" != "" ] && command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU
}

if [ -z "${DS_ACCELERATOR:-}" ] && ! gpu_is_visible; then
    export DS_ACCELERATOR=cpu
fi
if [ "${DS_ACCELERATOR:-}" = cpu ]; then
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
else
    export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
    export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
    export TRITON_DEFAULT_FP_FUSION=${TRITON_DEFAULT_FP_FUSION:-1}
fi

require_module() {
    "$python" -c "import importlib.util as u, sys; sys.exit(u.find_spec('$1') is None)" && return
    echo "$python has no module $1; run: bash launch/setup_env.sh, or name another interpreter in MEGALM_PYTHON" >&2
    exit 2
}

# Path of a file inside an installed package, without importing the package.
module_file() {
    "$python" -c "import importlib.util as u, os; print(os.path.join(os.path.dirname(u.find_spec('$1').origin), '$2'))"
}

free_port() {
    "$python" -c 'from megalm.topology.ports import free_port; print(free_port())'
}
