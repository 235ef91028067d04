#!/usr/bin/env bash
# Runs a tool of the lint environment (ruff, mypy, clang-format, ...), making it when needed.
#
#   ci/tool.sh <tool> <argument>...     e.g. ci/tool.sh pre-commit run --all-files
set -euo pipefail

case "${1:-}" in
  -h | --help | "") sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0"; exit 0 ;;
esac

root="$(cd "$(dirname "$0")/.." && pwd)"
"$root/ci/env.sh" lint lint
PATH="$root/.venv/lint/bin:$PATH" exec "$@"
