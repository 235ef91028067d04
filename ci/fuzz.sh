#!/usr/bin/env bash
# Fuzzes a reader of untrusted files with libFuzzer, AddressSanitizer and UndefinedBehaviorSanitizer.
#
#   ci/fuzz.sh <target> [<seconds>]     e.g. ci/fuzz.sh tokenizer 300
#   ci/fuzz.sh --replay                 runs the first inputs of all targets; any compiler will do (CXX)
#
# Targets: tokenizer, safetensors, export. A target is tests/fuzz/fuzz_<target>.cc, its first inputs are
# tests/fuzz/corpus/<target>. What is found on the way and what fails go to .venv/fuzz/<target>. Fuzzing
# needs clang (CLANGXX names it) with its run-time libraries.
set -euo pipefail
cd "$(dirname "$0")/.."

usage() { sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0"; }

# tests/fuzz/fuzzing.cc has the files in memory, in place of the operating system's.
sources=("$PWD"/tests/fuzz/fuzzing.cc "$PWD"/csrc/{base,io,text}/*.cc "$PWD"/csrc/engine/{config,weights}.cc)
for i in "${!sources[@]}"; do
  [[ "${sources[i]}" != */mapped_file.cc ]] || unset "sources[i]"
done
flags=(-std=c++17 -fno-omit-frame-pointer -fno-sanitize-recover=all
  -I"$PWD/csrc" -I"$PWD/csrc/include" -I"$PWD/tests/fuzz")

replay() {
  local cxx="${CXX:-g++}" where="$PWD/.venv/fuzz/replay" source target objects
  local sanitize=-fsanitize=address,undefined
  rm -rf "$where"
  mkdir -p "$where"
  export TMPDIR="$where"
  (cd "$where" && "$cxx" "${flags[@]}" "$sanitize" -O0 -c "${sources[@]}" "$OLDPWD"/tests/fuzz/replay.cc)
  objects=("$where"/*.o)
  for source in tests/fuzz/fuzz_*.cc; do
    target="${source##*/fuzz_}"
    target="${target%.cc}"
    "$cxx" "${flags[@]}" "$sanitize" -O0 "$source" "${objects[@]}" -o "$where/$target"
    "$where/$target" "tests/fuzz/corpus/$target"/*
  done
}

case "${1:-}" in
  -h | --help) usage; exit 0 ;;
  --replay) replay; exit ;;
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
# libFuzzer ends without cleaning up.
export TMPDIR="$PWD/$where"
"$clang" "${flags[@]}" -g -O1 -fsanitize=fuzzer,address,undefined "$source" "${sources[@]}" -o "$where/fuzz"
exec "$where/fuzz" -max_total_time="$seconds" -max_len=4096 -timeout=10 -rss_limit_mb=1024 \
  -print_final_stats=1 -artifact_prefix="$where/" "$where/corpus" "tests/fuzz/corpus/$target"
