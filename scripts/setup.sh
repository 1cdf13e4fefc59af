# Sourced by quickstart.sh and test.sh: makes .venv on first use, checks that it is current, and activates it.
# Versions come from pyproject.toml alone. The GPU or the CPU variant is chosen by what the machine has.
# With onstream_tests=test, what the tests need is installed too.

cd "$(dirname "${BASH_SOURCE[0]}")/.."
fail() { echo "error: $1" >&2; exit 1; }

if [ -n "${ONSTREAM_VARIANT:-}" ]; then variant=$ONSTREAM_VARIANT
elif command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU; then variant=gpu
else variant=cpu; fi
case $variant in cpu|gpu) ;; *) fail "ONSTREAM_VARIANT=$variant must be cpu or gpu" ;; esac

tests=$([ "${onstream_tests:-}" = test ] && echo test || true)
stamp=.venv/onstream.stamp
wanted="$variant $(cat pyproject.toml scripts/install.py | cksum)"
there=$(cat "$stamp" 2>/dev/null || true)
if [ "$there" != "$wanted test" ] && { [ -n "$tests" ] || [ "$there" != "$wanted" ]; }; then
    python=""
    for candidate in ${PYTHON:-python3 python3.12 python3.11 python3.13}; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then
            python=$candidate; break
        fi
    done
    [ -n "$python" ] || fail "Python 3.11 to 3.13 is needed, found $(python3 --version 2>&1 || echo none); set PYTHON=/path/to/one"
    "$python" -c 'import venv, ensurepip' 2>/dev/null || fail "$python has no venv module; install your system's python3-venv package"
    if [ "$variant" = gpu ] && ! command -v gcc >/dev/null 2>&1 && ! command -v clang >/dev/null 2>&1; then
        fail "a C compiler is needed on a GPU (Triton builds its launcher with it); install gcc or clang"
    fi
    need=$([ "$variant" = gpu ] && echo 20 || echo 10)
    free=$(df -Pk . | awk 'NR == 2 { print int($4 / 1048576) }')
    [ "$free" -ge "$need" ] || fail "$need GiB of disk are needed for the packages, $free GiB are free in $(pwd)"

    log=.venv.log
    echo "setting up .venv ($variant, $("$python" --version)); one to three minutes, log in $log"
    { [ -x .venv/bin/python ] && .venv/bin/python -c 'import pip' ; } >/dev/null 2>&1 || { rm -rf .venv; "$python" -m venv .venv || fail "cannot make .venv"; }
    .venv/bin/python scripts/install.py "$variant" $tests 3>&1 >"$log" 2>&1 \
        || fail "installing packages failed: $(grep -iE 'error|no space' "$log" | tail -1 | cut -c1-200) (whole log in $log; the next start goes on from here)"
    echo "$wanted${tests:+ $tests}" >"$stamp"
fi
. .venv/bin/activate

# Threads: all cores for one process; torchrun's ranks divide them themselves (see `ranks` users).
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(nproc)}
