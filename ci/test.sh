#!/usr/bin/env bash
# Every test, from a fresh clone: makes the environments, builds and installs fastgen, checks style
# and types, builds the site of docs/, runs the C++ tests plain and with sanitizers, and the others
# against the installed package under two versions of Paddle.
#
#   ci/test.sh                all of it; the exit status is not 0 if anything failed
#   ci/test.sh -k <expr> ...  arguments go to pytest
#
# Two stages run at a time. One of them is the conda packages: a local channel, built, installed into
# an empty prefix and tried there.
#
# The CUDA device is compiled where there is nvcc, and tried on a GPU by ci/cuda.sh only.
#
# Needs Python 3.11 (with venv), git and g++. Logs are left in .venv/logs. HYPOTHESIS_PROFILE picks
# how many examples are tried (default: ci).
set -euo pipefail
cd "$(dirname "$0")/.."

case "${1:-}" in
  -h | --help) sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0"; exit 0 ;;
esac

logs=.venv/logs
mkdir -p "$logs"
rm -f "$logs"/*.log "$logs"/*.time
declare -A pids=()
stages=()

# stage <name>: runs the function run-<name> with its output on the screen and in a log, and times it.
stage() {
  local name="$1" begin=$SECONDS status=0
  echo "== $name"
  "run-$name" 2>&1 </dev/null | tee "$logs/$name.log" | sed -u "s/^/[$name] /" || status=$?
  printf '%-15s %4d s  %s\n' "$name" $((SECONDS - begin)) "$( ((status)) && echo failed || echo ok)" \
    >"$logs/$name.time"
}
passed() { grep -q ' ok$' "$logs/$1.time" 2>/dev/null; }

# start <name>: the stage, as soon as fewer than two others run: one for each half of the cores.
start() {
  while (($(jobs -rp | wc -l) >= 2)); do wait -n || true; done
  stages+=("$1")
  stage "$1" &
  pids[$1]=$!
}

# finish: waits for all, tells the time of each stage, then how pytest ended; the exit status.
finish() {
  local name status=0
  wait
  echo
  echo "== time per stage, two at once (logs: $logs)"
  for name in "${stages[@]}"; do
    cat "$logs/$name.time" 2>/dev/null || printf '%-15s         did not come to an end\n' "$name"
  done
  printf '%-15s %4d s\n' total "$SECONDS"
  for name in "${stages[@]}"; do
    passed "$name" || { status=1; echo "FAILED: $name"; }
  done
  # pytest's own words, last: what failed by name, then how many.
  for name in "${stages[@]}"; do
    [[ "$name" == paddle* ]] || continue
    echo
    echo "== pytest: $name"
    grep -E '^(FAILED|ERROR|E  ) ' "$logs/$name.log" | cut -c -300 | head -n 40 || true
    grep -E '^=+ .* in [0-9.]+s.* =+$' "$logs/$name.log" | tail -n 1 ||
      echo "pytest did not come to an end, see $logs/$name.log"
  done
  exit "$status"
}

# Jobs in the background would live on.
trap 'trap "" TERM; kill 0; exit 130' INT

# run_pytest <stage> <environment> <argument>...: against the installed package. The script `pytest`
# does not put the checkout on sys.path, and PYTHONSAFEPATH keeps `python -m` in tests from doing so.
run_pytest() {
  local name="$1" environment="$2" status=0
  shift 2
  PATH="$PWD/.venv/$environment/bin:$PATH" FASTGEN_PARITY_REPORT="$PWD/$logs/parity-$environment.json" \
    ".venv/$environment/bin/pytest" -p no:cacheprovider "$@" "${pytest_arguments[@]}" || status=$?
  # 5: the arguments choose nothing of this stage.
  ((status != 5 || ${#pytest_arguments[@]} == 0)) || status=0
  return "$status"
}

export PYTHONSAFEPATH=1 FASTGEN_TEST_INSTALLED=1 PYTHONDONTWRITEBYTECODE=1
export HYPOTHESIS_PROFILE="${HYPOTHESIS_PROFILE:-ci}"
export FASTGEN_CACHE="$PWD/.venv/cache"
# Where nvcc is, ci/cuda_floor.sh leaves the CUDA device here.
export FASTGEN_TEST_CUDA_LIBRARY="$PWD/.venv/cuda/build/libfastgen_cuda.so"
# Two test processes share the cores; the reference would otherwise start a thread per core in each.
export OMP_NUM_THREADS=1
# The compilers of one stage, when two run.
export FASTGEN_JOBS=$((($(nproc) + 1) / 2))
pytest_arguments=("$@")

run-environment26() { ci/env.sh paddle26 build paddle26; }
run-environment33() { ci/env.sh paddle33 build paddle33; }
run-install() { ci/env.sh --project paddle26 && ci/env.sh --project paddle33; }
run-lint() { ci/lint.sh; }
run-docs() { ci/docs.sh; }
run-cuda() { ci/cuda_floor.sh; }
run-cpp-plain() { ci/ctest.sh plain; }
run-cpp-address() { ci/ctest.sh address; }
run-cpp-thread() { ci/ctest.sh thread; }
run-paddle26() { run_pytest paddle26 paddle26 tests --ignore=tests/parity; }
run-paddle26-parity() { run_pytest paddle26-parity paddle26 tests/parity; }
run-paddle33() { run_pytest paddle33 paddle33 tests/parity tests/paddle; }
# With an environment of its own, so without what is meant for pytest above.
run-conda() {
  env -u PYTHONSAFEPATH -u FASTGEN_TEST_INSTALLED -u FASTGEN_TEST_CUDA_LIBRARY -u FASTGEN_CACHE \
    -u HYPOTHESIS_PROFILE ci/conda/run.sh
}

# Nothing else can be tried without these.
start environment26
start environment33
wait
{ passed environment26 && passed environment33; } || finish
start install
wait
passed install || finish

# What takes long early, so that both halves of the cores end at about the same time.
start lint
start docs
start cuda
start cpp-address
start conda
# It tries the library that cuda leaves.
wait "${pids[cuda]}" 2>/dev/null || true
start paddle26
start paddle33
start cpp-thread
start cpp-plain
start paddle26-parity
finish
