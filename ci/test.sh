#!/usr/bin/env bash
# Every test, from a fresh clone: makes the environments, builds and installs fastgen, checks style
# and types, builds the site of docs/, runs the C++ tests plain and with sanitizers, and the others
# against the installed package under two versions of Paddle.
#
#   ci/test.sh                all of it; the exit status is not 0 if anything failed
#   ci/test.sh -k <expr> ...  arguments go to pytest
#
# Then the conda packages: a local channel, built, installed into an empty prefix and tried there.
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
stages=()
failed=()

# stage <name> <command>...: runs it with its output on the screen and in a log, and times it.
stage() {
  local name="$1" begin=$SECONDS status=0
  shift
  echo "== $name"
  "$@" 2>&1 </dev/null | tee "$logs/$name.log" | sed -u "s/^/[$name] /" || status=$?
  stages+=("$(printf '%-14s %4d s  %s' "$name" $((SECONDS - begin)) "$( ((status)) && echo failed || echo ok)")")
  ((status == 0)) || failed+=("$name")
  return "$status"
}

# both <a> <b>: two jobs, one for each core; fails if one does.
both() {
  local status=0 first
  "$1" &
  first=$!
  "$2" || status=$?
  wait "$first" || status=$?
  return "$status"
}

older_environment() { ci/env.sh paddle26 build paddle26; }
newer_environment() { ci/env.sh paddle33 build paddle33; }

# run_ctest <kind>...: one after the other, with half of the cores; see ci/ctest.sh.
run_ctest() {
  local kind status=0
  for kind in "$@"; do
    FASTGEN_JOBS=$((($(nproc) + 1) / 2)) ci/ctest.sh "$kind" 2>&1 |
      tee "$logs/ctest-$kind.log" | sed -u "s/^/[$kind] /" || status=$?
  done
  return "$status"
}
cpp_address() { run_ctest address; }
cpp_others() { run_ctest plain thread; }

install() { ci/env.sh --project paddle26 && ci/env.sh --project paddle33; }

# run_pytest <environment> <argument>...: against the installed package. The script `pytest` does
# not put the checkout on sys.path, and PYTHONSAFEPATH keeps `python -m` in tests from doing so.
run_pytest() {
  local name="$1" begin=$SECONDS status=0
  shift
  PATH="$PWD/.venv/$name/bin:$PATH" FASTGEN_PARITY_REPORT="$PWD/$logs/parity-$name.json" \
    ".venv/$name/bin/pytest" -p no:cacheprovider "$@" 2>&1 |
    tee "$logs/pytest-$name.log" | sed -u "s/^/[$name] /" || status=$?
  printf '%-14s %4d s  %s\n' "$name" $((SECONDS - begin)) "$( ((status)) && echo failed || echo ok)" \
    >"$logs/pytest-$name.time"
  return "$status"
}

export PYTHONSAFEPATH=1 FASTGEN_TEST_INSTALLED=1 PYTHONDONTWRITEBYTECODE=1
export HYPOTHESIS_PROFILE="${HYPOTHESIS_PROFILE:-ci}"
export FASTGEN_CACHE="$PWD/.venv/cache"
# Where nvcc is, ci/cuda_floor.sh leaves the CUDA device here.
export FASTGEN_TEST_CUDA_LIBRARY="$PWD/.venv/cuda/build/libfastgen_cuda.so"
# Two test processes share the cores; the reference would otherwise start a thread per core in each.
export OMP_NUM_THREADS=1
pytest_arguments=("$@")

# With an environment of its own, so without what is meant for pytest above.
conda_packages() {
  env -u PYTHONSAFEPATH -u FASTGEN_TEST_INSTALLED -u FASTGEN_TEST_CUDA_LIBRARY -u FASTGEN_CACHE \
    -u HYPOTHESIS_PROFILE ci/conda/run.sh
}

older_tests() { run_pytest paddle26 tests "${pytest_arguments[@]}"; }
newer_tests() { run_pytest paddle33 tests/parity tests/paddle "${pytest_arguments[@]}"; }

stage environments both older_environment newer_environment || exit 1
stage install install || exit 1
stage lint-docs both ci/lint.sh ci/docs.sh || true
stage cpp both cpp_address cpp_others || true
stage cuda ci/cuda_floor.sh || true
rm -f "$logs"/pytest-*
stage tests both older_tests newer_tests || true
stage conda conda_packages || true

echo
echo "== time per stage (logs: $logs)"
printf '%s\n' "${stages[@]}"
sed 's/^/  /' "$logs"/pytest-*.time
for name in "${failed[@]}"; do echo "FAILED: $name" ; done

# pytest's own words, last: what failed by name, then how many.
for name in paddle33 paddle26; do
  echo
  echo "== pytest in .venv/$name"
  grep -E '^(FAILED|ERROR|E  ) ' "$logs/pytest-$name.log" | cut -c -300 | head -n 40 || true
  grep -E '^=+ .* in [0-9.]+s.* =+$' "$logs/pytest-$name.log" | tail -n 1 ||
    echo "pytest did not come to an end, see $logs/pytest-$name.log"
done
((${#failed[@]} == 0))
