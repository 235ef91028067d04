#!/usr/bin/env bash
# Fuzzes a reader of untrusted files with libFuzzer, AddressSanitizer and UndefinedBehaviorSanitizer.
#
#   ci/fuzz.sh <target> [<seconds>]     e.g. ci/fuzz.sh tokenizer 300
#
# A target is tests/fuzz/fuzz_<target>.cc, its first inputs are tests/fuzz/corpus/<target>. What is found
# on the way and what fails go to .venv/fuzz/<target>. Needs clang (CLANGXX names it) with its run-time
# libraries.
set -euo pipefail
cd "$(dirname "$0")/.."

usage() { sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0"; }

case "${1:-}" in
  -h | --help) usage; exit 0 ;;
  "" | -*) usage >&2; exit 2 ;;
esac
target="$1" seconds="${2:-300}"
source="tests/fuzz/fuzz_$target.cc"
[[ -f "$source" ]] || { echo "ci/fuzz.sh: there is no $source" >&2; exit 2; }

for clang in ${CLANGXX:-clang++ clang++-19 clang++-16 clang++-14}; do
  command -v "$clang" >/dev/null && break
  clang=""
done
[[ -n "$clang" ]] || { echo "ci/fuzz.sh: clang++ is needed; set CLANGXX to its command" >&2; exit 1; }

where=".venv/fuzz/$target"
mkdir -p "$where/corpus"
"$clang" -std=c++17 -O1 -g -fno-omit-frame-pointer -fsanitize=fuzzer,address,undefined \
  -fno-sanitize-recover=all -Icsrc -Icsrc/include "$source" csrc/base/*.cc csrc/io/*.cc csrc/text/*.cc -o "$where/fuzz"
exec "$where/fuzz" -max_total_time="$seconds" -max_len=4096 -timeout=10 -rss_limit_mb=1024 \
  -print_final_stats=1 -artifact_prefix="$where/" "$where/corpus" "tests/fuzz/corpus/$target"
