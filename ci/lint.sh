#!/usr/bin/env bash
# Style and types: ruff, clang-format and mypy, at the versions of ci/lock/lint.txt.
#
#   ci/lint.sh          says what is wrong
#   ci/lint.sh --fix    also puts right what the tools can
set -euo pipefail
cd "$(dirname "$0")/.."

fix=0
case "${1:-}" in
  -h | --help) sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0"; exit 0 ;;
  --fix) fix=1 ;;
  "") ;;
  *) echo "ci/lint.sh: unknown argument '$1'; see -h" >&2; exit 2 ;;
esac

ci/env.sh lint lint
export PATH="$PWD/.venv/lint/bin:$PATH"

mapfile -d '' -t cxx < <(find csrc tests -type f \( -name '*.cc' -o -name '*.h' -o -name '*.hpp' -o -name '*.c' -o -name '*.cu' \) -print0)
if ((fix)); then
  ruff check --fix --quiet . || true
  ruff format --quiet .
  clang-format -i "${cxx[@]}"
fi

status=0
check() {
  echo "+ ${*:1:3}" >&2
  "$@" || status=1
}
check ruff check --quiet .
check ruff format --check --quiet .
check clang-format --dry-run -Werror "${cxx[@]}"
check mypy
exit "$status"
