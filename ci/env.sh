#!/usr/bin/env bash
# Makes a virtual environment from lock files, or leaves it alone when it is up to date.
#
#   ci/env.sh <name> <lock>...     e.g. ci/env.sh demo run
#   ci/env.sh --project <name>     installs this project into it, if the sources have changed
#
# The environment is .venv/<name>; a lock is ci/lock/<lock>.txt. Nothing is installed that is not
# pinned and hashed there. The project's wheel is built once for all environments, in .venv/build.
# PYTHON names the interpreter (default: python3.11, else python3 if that is a 3.11).
set -euo pipefail
cd "$(dirname "$0")/.."

usage() { sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0"; }

pip_install() {
  local env="$1"
  shift
  "$env/bin/python" -m pip install -qq --disable-pip-version-check --no-input \
    --no-build-isolation "$@"
}

python_command() {
  local candidate
  for candidate in ${PYTHON:-python3.11 python3}; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; then
      command -v "$candidate"
      return
    fi
  done
  echo "ci/env.sh: Python 3.11 is needed (the lock files are for it); set PYTHON to its command" >&2
  return 1
}

# Two scripts started at once wait for each other instead of writing into one environment.
lock_environment() {
  mkdir -p .venv
  exec {lock_fd}>".venv/$1.lock"
  flock "$lock_fd"
}

make_environment() {
  local name="$1" env=".venv/$1" python lock locks=() stamp
  shift
  python="$(python_command)"
  for lock in "$@"; do
    [[ -f "ci/lock/$lock.txt" ]] || { echo "ci/env.sh: there is no ci/lock/$lock.txt" >&2; exit 2; }
    locks+=("ci/lock/$lock.txt")
  done
  lock_environment "$name"
  stamp="$PWD $("$python" -VV | tr '\n' ' ')$(cat "${locks[@]}" | sha256sum)"
  [[ -f "$env/.locks" && "$(cat "$env/.locks")" == "$stamp" ]] && return
  echo "environment .venv/$name: installing $* (pinned in ci/lock)" >&2
  rm -rf "$env"
  "$python" -m venv "$env"
  # In order: the first lock brings what source distributions in the next ones are built with.
  # A lock is complete, or leaves out what it means to (ci/lock/override-bench.in): pip adds nothing.
  for lock in "${locks[@]}"; do pip_install "$env" --require-hashes --no-deps -r "$lock"; done
  echo "$stamp" >"$env/.locks"
}

# Of everything that ends up in the wheel, and of the compiler.
project_hash() {
  {
    find CMakeLists.txt cmake csrc fastgen pyproject.toml README.md LICENSE -type f \
      ! -name '*.pyc' -print0 | LC_ALL=C sort -z | xargs -0 sha256sum
    cat ci/lock/build.txt
    "${CXX:-g++}" --version
  } | sha256sum | cut -c1-16
}

install_project() {
  local env=".venv/$1" stamp wheels
  [[ -x "$env/bin/python" ]] || { echo "ci/env.sh: make .venv/$1 first" >&2; exit 2; }
  command -v "${CXX:-g++}" >/dev/null || { echo "ci/env.sh: no C++ compiler: ${CXX:-g++}" >&2; exit 1; }
  "$0" build build
  lock_environment project
  stamp="$(project_hash)"
  [[ -f "$env/.project" && "$(cat "$env/.project")" == "$stamp" ]] && return
  wheels=".venv/wheels/$stamp"
  if ! compgen -G "$wheels/*.whl" >/dev/null; then
    echo "wheel: compiling fastgen" >&2
    rm -rf .venv/wheels
    mkdir -p "$wheels.tmp"
    PATH="$PWD/.venv/build/bin:$PATH" .venv/build/bin/python -m pip wheel -qq --no-input \
      --disable-pip-version-check --no-deps --no-index --no-build-isolation -w "$wheels.tmp" .
    mv "$wheels.tmp" "$wheels"
  fi
  pip_install "$env" --no-deps --no-index --force-reinstall "$wheels"/*.whl
  echo "$stamp" >"$env/.project"
}

case "${1:-}" in
  -h | --help) usage ;;
  --project) [[ $# -eq 2 ]] || { usage >&2; exit 2; }; install_project "$2" ;;
  -* | "") usage >&2; exit 2 ;;
  *) [[ $# -ge 2 ]] || { usage >&2; exit 2; }; make_environment "$@" ;;
esac
