#!/usr/bin/env bash
# Output fastgen-tests: the parity suite with what it shares with other tests.
set -euo pipefail

target="$PREFIX/share/fastgen/tests"
mkdir -p "$target/lib"
cp -r tests/conftest.py tests/parity "$target/"
cp -r tests/lib/fastgen_tests "$target/lib/"
find "$target" -name __pycache__ -prune -exec rm -r {} +
# The settings that pyproject.toml has for the checkout.
cat >"$target/pytest.ini" <<'INI'
[pytest]
addopts = --import-mode=importlib --strict-markers -ra
pythonpath = lib
timeout = 1200
markers =
    parity: compares with PaddleNLP's own generate
    slow: takes more than half a minute
INI
