#!/usr/bin/env bash
# conda packages without any conda channel: makes a local channel, renders and checks all variants, builds and tests
# the CPU packages, installs them into an empty prefix, and runs them there with an empty environment.
#
#   ci/conda/run.sh               everything
#   ci/conda/run.sh --no-paddle   without Paddle: fastgen-paddle and fastgen-tests are left out
#   ci/conda/run.sh --paddle 3.3.1    the variant of this Paddle instead of 2.6.2, in a channel of its own
#   ci/conda/run.sh --channel     only the environment and the base of the channel, for ci/reproduce.sh
#
# Needs Python 3.11 (with venv), git, g++ and the package index. Everything lands in .venv: the environment
# .venv/conda, the channel .venv/conda-work/channel, logs of the builds in .venv/conda-work/logs
# (.venv/conda-work-3.3.1 for that Paddle). The channel's
# base (Python, wheels, compiler) and the packages are kept until what they are made of changes. The time of each
# step is printed.
set -euo pipefail
cd "$(dirname "$0")/../.."

paddle=2.6.2
paddle_lock=paddle26
only_channel=0
work="$PWD/.venv/conda-work"
case "${1:-}" in
  -h | --help) sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0"; exit 0 ;;
  --no-paddle) paddle="" ;;
  --channel) only_channel=1 ;;
  --paddle)
    case "${2:-}" in
      2.6.2) ;;
      3.3.1) paddle=3.3.1 paddle_lock=paddle33 work+=-3.3.1 ;;
      *) echo "ci/conda/run.sh: --paddle is '${2:-}', which must be 2.6.2 or 3.3.1" >&2; exit 2 ;;
    esac
    ;;
  "") ;;
  *) echo "ci/conda/run.sh: unknown argument '$1'; see -h" >&2; exit 2 ;;
esac

channel="$work/channel"
prefix="$work/prefix"
python="$PWD/.venv/conda/bin/python"
export PYTHONDONTWRITEBYTECODE=1
began=$SECONDS
times=()

# step <name> <command>...: runs and times it; the first failure ends the run.
step() {
  local name="$1" begin=$SECONDS status=0
  shift
  echo "== $name"
  # Not in a condition, where `set -e` would not hold inside functions.
  set +e
  (set -e; "$@")
  status=$?
  set -e
  times+=("$(printf '%-12s %4d s  %s' "$name" $((SECONDS - begin)) "$( ((status)) && echo failed || echo ok)")")
  ((status == 0)) || finish 1
}

finish() {
  echo
  echo "== time per step"
  printf '%s\n' "${times[@]}"
  printf '%-12s %4d s\n' total $((SECONDS - began))
  exit "$1"
}

environment() { ci/env.sh conda build conda; }

# collect <directory> <lock>...: the wheels of lock files, which `pip` checks against their hashes.
collect() {
  local target="$1" lock requirements=()
  shift
  for lock in "$@"; do requirements+=(-r "ci/lock/$lock.txt"); done
  rm -rf "$target"
  "$python" -m pip wheel -qq --disable-pip-version-check --no-input --no-deps --no-build-isolation \
    --require-hashes -w "$target" "${requirements[@]}"
}

# Of everything that the base of the channel is made of.
base_hash() {
  {
    "$python" -VV
    "$python" -c 'import os, sys; print(sys.base_prefix, os.confstr("CS_GNU_LIBC_VERSION"))'
    g++ --version
    cat ci/lock/build.txt ci/lock/conda.txt ${paddle:+ci/lock/$paddle_lock.txt} \
      ci/conda/bootstrap.py ci/conda/wheels.py ci/conda/python/*
  } | sha256sum | cut -c1-16
}

bootstrap() {
  local stamp
  mkdir -p "$work"
  stamp="$(base_hash)"
  if [[ -f "$work/base" && "$(cat "$work/base")" == "$stamp" ]]; then
    echo "up to date"
    return
  fi
  rm -f "$work/base" "$work/packages"
  collect "$work/wheels" build conda
  [[ -z "$paddle" ]] || collect "$work/wheels-paddle" "$paddle_lock"
  "$python" ci/conda/bootstrap.py "$channel" "$work/wheels" ${paddle:+"$work/wheels-paddle"} \
    >"$work/bootstrap.log" 2>&1 || { tail -n 40 "$work/bootstrap.log" >&2; return 1; }
  tail -n 1 "$work/bootstrap.log"
  rm -rf "$work/wheels" "$work/wheels-paddle"
  echo "$stamp" >"$work/base"
}

# Of everything that ends up in the packages, or says how they are made.
package_hash() {
  {
    cat "$work/base"
    echo "paddle $paddle, sources of ${SOURCE_DATE_EPOCH:-} ${FASTGEN_COMMIT:-}"
    find recipe CMakeLists.txt LICENSE README.md pyproject.toml cmake csrc fastgen tests/conftest.py tests/cpp/consumer \
      tests/lib tests/parity ci/conda/build.py ci/conda/host.yaml ci/conda/variants.py -type f ! -name '*.pyc' -print0 |
      LC_ALL=C sort -z | xargs -0 sha256sum
  } | sha256sum | cut -c1-16
}

build() {
  local stamp
  stamp="$(package_hash)"
  if [[ -f "$work/packages" && "$(cat "$work/packages")" == "$stamp" ]]; then
    echo "up to date"
    return
  fi
  rm -f "$work/packages"
  "$python" ci/conda/build.py "$channel" ${paddle:+--paddle "$paddle"}
  echo "$stamp" >"$work/packages"
}

install() {
  local specs=(fastgen libfastgen-static)
  [[ -z "$paddle" ]] || specs+=(fastgen-paddle fastgen-tests paddlenlp)
  "$python" ci/conda/solve.py "$channel" "${specs[@]}" --prefix "$prefix" | grep -E "fastgen|paddle|installed"
}

# clean <command>...: with nothing in the environment but the prefix.
clean() { env -i "PATH=$prefix/bin:/usr/bin:/bin" "HOME=$work/home" "$@"; }

use() {
  local prompt="Return a list of" text model
  rm -rf "$work/home" "$work/consumer"
  mkdir -p "$work/home" "$work/consumer"
  cd "$work/home"
  clean fastgen info
  text="$(clean fastgen infer --prompt "$prompt" --max_length 16 --topk 1 --seed 7)"
  echo "$text"
  [[ "$text" == "$prompt"?* ]] || { echo "fastgen infer did not continue the prompt" >&2; return 1; }
  model="$(clean python -c 'import fastgen, pathlib; print(pathlib.Path(fastgen.__file__).parent / "models" / "gpt2-docstrings")')"
  text="$(clean fastgen-gpt --model_dir "$model" --prompt "$prompt" --max_length 16 --topk 1 --seed 7)"
  echo "$text"
  consumer "$prefix" OFF "$model"
  consumer "$prefix/lib/fastgen-static" ON "$model"
}

# consumer <prefix> <static> <model>: the C++ application of tests/cpp, which checks the tokens it gets.
consumer() {
  local tree="$work/consumer/static-$2" version
  version="$(sed -n 's/^project(fastgen VERSION \([0-9.]*\).*/\1/p' "$OLDPWD/CMakeLists.txt")"
  local tools=(env -i "PATH=${python%/*}:$(dirname "$(command -v g++)"):/usr/bin:/bin" "HOME=$work/home")
  "${tools[@]}" cmake -S "$OLDPWD/tests/cpp/consumer/cpp" -B "$tree" -G Ninja "-DCMAKE_PREFIX_PATH=$1" \
    "-DVERSION=$version" -DCMAKE_FIND_USE_PACKAGE_REGISTRY=OFF >"$tree.log"
  "${tools[@]}" cmake --build "$tree" >>"$tree.log"
  echo "C++ application (static: $2): $(env -i "$tree/application" "$3")"
}

# The parity suite as its package has it. The op that was installed must do: nothing may be compiled.
parity() {
  cd "$prefix/share/fastgen/tests"
  clean env HYPOTHESIS_PROFILE=dev python -m pytest -q -p no:cacheprovider parity
  [[ ! -e "$work/home/.cache/fastgen/op" ]] ||
    { echo "the op was compiled, although fastgen-paddle is installed" >&2; return 1; }
}

step environment environment
step bootstrap bootstrap
((!only_channel)) || finish 0
step render "$python" ci/conda/render.py
step cases "$python" ci/conda/cases.py
step build build
step manifests "$python" ci/conda/manifests.py "$channel"
step install install
step use use
[[ -z "$paddle" ]] || step parity parity
# They plant their faults in the packages of the other channel.
[[ "$work" == *-3.3.1 ]] || step faults "$python" -m pytest -q -p no:cacheprovider -m "not slow" tests/packaging
finish 0
