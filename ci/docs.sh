#!/usr/bin/env bash
# Builds the site of docs/ into build/docs, with the references made from the headers and from the
# package, and tests that they are complete. A warning (a link that leads nowhere, a parameter that
# is not documented) is an error.
#
#   ci/docs.sh
#
# Needs Python 3.11 (with venv), and g++, with whose headers the public headers are read.
set -euo pipefail
cd "$(dirname "$0")/.."

case "${1:-}" in
  -h | --help) sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0"; exit 0 ;;
  "") ;;
  *) echo "ci/docs.sh: unknown argument '$1'; see -h" >&2; exit 2 ;;
esac

ci/env.sh docs docs
rm -rf build/docs
.venv/docs/bin/python -m sphinx -q -n -W --keep-going -b html -d build/docs/.doctrees docs build/docs
.venv/docs/bin/python -m pytest -q -p no:cacheprovider tests/docs
echo "build/docs/index.html"
