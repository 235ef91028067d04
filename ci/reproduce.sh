#!/usr/bin/env bash
# Builds every artifact twice and compares bytes: the wheel, the sdist, libfastgen shared and static as
# CMake installs them, the Paddle op library where .venv/paddle26 is, and the conda packages for CPUs. Then
# looks into all of them for paths, dates, users and hosts of the builds. The exit status is 0 only if
# nothing differs or is found.
#
#   ci/reproduce.sh                       all of them
#   ci/reproduce.sh --only <a>[,<b>...]   of: sdist, wheel, shared, static, op, conda
#   ci/reproduce.sh --source <dir>        sources other than this checkout
#   ci/reproduce.sh --self-test           that it fails on this project with a date or a path planted in it
#
# The builds differ in directory, HOME, user and host name (where user namespaces are allowed), locale,
# time zone, umask, hash seed, number of compilers at once and in the times of the source files; and the
# second wheel is built from the sdist. Both are told the time of the commit by SOURCE_DATE_EPOCH, and its
# hash, if nothing has been changed since. What is built stays in .venv/reproduce. CXX names the compiler.
#
# Of conda packages the payload is compared, since the tool that packs them stamps times and directories:
# ci/conda/payload.py says what is left out. They are built in a channel that ci/conda/run.sh --channel makes.
set -euo pipefail
cd "$(dirname "$0")/.."

usage() { sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0"; }

source="$PWD"
only=""
while (($#)); do
  case "$1" in
    -h | --help) usage; exit 0 ;;
    --only) only="${2:?--only needs a list}"; shift ;;
    --self-test)
      ci/env.sh build build
      ci/conda/run.sh --channel
      exec .venv/conda/bin/python -m pytest -p no:cacheprovider -m slow tests/packaging
      ;;
    --source) source="$(cd "${2:?--source needs a directory}" && pwd)"; shift ;;
    *) echo "ci/reproduce.sh: unknown argument '$1'; see -h" >&2; exit 2 ;;
  esac
  shift
done

paddle=.venv/paddle26
if [[ -z "$only" ]]; then
  artifacts=(sdist wheel shared static conda)
  if [[ -x "$paddle/bin/python" ]]; then
    artifacts+=(op)
  else
    echo "ci/reproduce.sh: SKIPPED: the Paddle op library, there is no $paddle" >&2
  fi
else
  IFS=, read -r -a artifacts <<<"$only"
fi
for artifact in "${artifacts[@]}"; do
  case "$artifact" in
    sdist | wheel | shared | static | op | conda) ;;
    *) echo "ci/reproduce.sh: '$artifact' is none of sdist, wheel, shared, static, op, conda" >&2; exit 2 ;;
  esac
done

ci/env.sh build build
[[ " ${artifacts[*]} " != *" conda "* ]] || ci/conda/run.sh --channel

root="$PWD"
where="${FASTGEN_REPRODUCE_DIRECTORY:-$PWD/.venv/reproduce}"
rm -rf "$where"
mkdir -p "$where"

# The time of the commit is an input. Sources that are no checkout have none and get a fixed one.
export SOURCE_DATE_EPOCH="${SOURCE_DATE_EPOCH:-$(git -C "$source" log -1 --format=%ct 2>/dev/null || echo 1600000000)}"
commit="${FASTGEN_COMMIT:-}"
if [[ -z "$commit" && -e "$source/.git" && -z "$(git -C "$source" status --porcelain)" ]]; then
  commit="$(git -C "$source" rev-parse HEAD)"
fi

copy_sources() {
  mkdir -p "$1"
  if [[ -e "$source/.git" ]]; then
    # What is tracked or could be: not what earlier builds left behind.
    (cd "$source" && git ls-files -co --exclude-standard -z |
      while IFS= read -r -d '' file; do [[ ! -e "$file" ]] || printf '%s\0' "$file"; done |
      tar -c --null --no-recursion -T -) | tar -x -C "$1"
  else
    cp -R "$source/." "$1"
  fi
}

# This part runs in each build's own surroundings: build <artifact> <sources> <output>.
build_script='
set -euo pipefail
artifact="$1" sources="$2" out="$3"
umask "$FASTGEN_UMASK"
[[ -z "${FASTGEN_HOST:-}" ]] || hostname "$FASTGEN_HOST"
cd "$sources"
pip() {
  python -m pip "$@" --no-deps --no-index --no-build-isolation --no-cache-dir -q \
    --disable-pip-version-check --no-input
}
with_cmake() {
  local tree="$TMPDIR/tree-$artifact"
  cmake -S . -B "$tree" -G Ninja -DCMAKE_INSTALL_LIBDIR=lib "$@"
  cmake --build "$tree" --parallel "$FASTGEN_JOBS"
  cmake --install "$tree" --prefix "$out/$artifact"
}
case "$artifact" in
  sdist)
    python -c "import sys; from scikit_build_core.build import build_sdist; build_sdist(sys.argv[1])" "$out"
    ;;
  wheel) pip wheel -w "$out" . ;;
  shared) with_cmake ;;
  static) with_cmake -DBUILD_SHARED_LIBS=OFF -DFASTGEN_BUILD_APPS=OFF ;;
  op)
    with_cmake -DFASTGEN_PADDLE=ON "-DPY_CMD=$FASTGEN_PADDLE" -DFASTGEN_BUILD_APPS=OFF
    # The rest of this tree is that of "shared".
    find "$out/op" ! -type d ! -name libdecoding_op.so -delete
    find "$out/op" -type d -empty -delete
    ;;
  conda)
    "$FASTGEN_CI/../.venv/conda/bin/python" "$FASTGEN_CI/conda/build.py" "$FASTGEN_CHANNEL" \
      --recipe "$sources/recipe" --paddle 2.6.2 --no-tests
    ;;
esac
'

# Not with spaces in their names, which conda does not take.
declare -A channels=([a]="$where/a/channel" [b]="$where/b/another-directory/of-a-longer-name/channel")

# new_channel <directory>: the base of the local channel without packages of fastgen.
new_channel() {
  mkdir -p "${1%/*}"
  cp -rl .venv/conda-work/channel "$1"
  rm -f "$1"/*/*fastgen*.conda
  # An index is written in place; the channel's own must stay as it is.
  for index in "$1"/*/repodata*; do
    cp "$index" "$index.new"
    mv "$index.new" "$index"
  done
}

# build <letter> <artifact> <sources>
build() {
  local letter="$1" artifact="$2" sources="$3" base="$where/$1" surroundings user own=()
  mkdir -p "$base/home" "$base/tmp" "$where/out-$letter"
  if [[ "$letter" == a ]]; then
    user=1201
    surroundings=(LC_ALL=C TZ=UTC0 FASTGEN_UMASK=022 PYTHONHASHSEED=1 FASTGEN_JOBS=1 CPU_COUNT=1
      USER=first-builder LOGNAME=first-builder)
  else
    user=1202
    # 11:30 ahead, so that the day may be another too.
    surroundings=(LC_ALL=C.UTF-8 LANGUAGE=de TZ=XXX-11:30 FASTGEN_UMASK=027 PYTHONHASHSEED=2 FASTGEN_JOBS=2 CPU_COUNT=2
      USER=second-builder LOGNAME=second-builder)
  fi
  if ((namespaces)); then
    own=(unshare "--map-user=$user" --map-group=77 --keep-caps --uts)
    surroundings+=("FASTGEN_HOST=builder-host-$letter")
  fi
  "${own[@]}" env -i "PATH=$root/.venv/build/bin:/usr/local/bin:/usr/bin:/bin" "HOME=$base/home" "TMPDIR=$base/tmp" \
    "SOURCE_DATE_EPOCH=$SOURCE_DATE_EPOCH" ${commit:+"FASTGEN_COMMIT=$commit"} ${CXX:+"CXX=$CXX"} \
    "FASTGEN_PADDLE=$root/$paddle/bin/python" "FASTGEN_CI=$root/ci" "FASTGEN_CHANNEL=${channels[$letter]}" \
    PYTHONDONTWRITEBYTECODE=1 "${surroundings[@]}" \
    bash -c "$build_script" build "$artifact" "$sources" "$where/out-$letter" >"$where/$letter-$artifact.log" 2>&1 || {
    tail -n 40 "$where/$letter-$artifact.log" >&2
    echo "ci/reproduce.sh: $artifact could not be built, see $where/$letter-$artifact.log" >&2
    exit 1
  }
}

namespaces=1
if ! unshare --map-user=1234 --map-group=77 --keep-caps --uts hostname probe 2>/dev/null; then
  namespaces=0
  echo "ci/reproduce.sh: no user namespaces here: both builds have this user's number and host name" >&2
fi

first="$where/a/fastgen" second="$where/b/a directory/with a longer name/fastgen"
copy_sources "$first"
copy_sources "$second"
# A year earlier.
find "$second" -exec touch -h -d "@$((SOURCE_DATE_EPOCH - 31536000))" {} +

for artifact in "${artifacts[@]}"; do
  begin=$SECONDS
  if [[ "$artifact" == conda ]]; then
    for letter in a b; do new_channel "${channels[$letter]}"; done
  fi
  build a "$artifact" "$first"
  sources="$second"
  if [[ "$artifact" == wheel ]] && compgen -G "$where/out-b/*.tar.gz" >/dev/null; then
    sources="$where/b/from sdist"
    mkdir -p "$sources"
    tar -xzf "$where"/out-b/*.tar.gz -C "$sources" --strip-components=1
  fi
  build b "$artifact" "$sources"
  echo "$artifact: built twice in $((SECONDS - begin)) s"
done

names=(first-builder second-builder)
((namespaces)) && names+=(builder-host-a builder-host-b)
# Names of three letters and "root" are words too.
for name in "$(id -un)" "$(uname -n)"; do
  if ((${#name} > 3)) && [[ "$name" != root ]]; then names+=("$name"); fi
done
python="$root/.venv/build/bin/python"
others=("${artifacts[@]/conda/}")
if [[ -n "${others[*]// /}" ]]; then
  "$python" ci/artifacts.py compare "$where/out-a" "$where/out-b" || status=1
  "$python" ci/artifacts.py search "$where/out-a" "$where" "$root" "$source" "${names[@]}" || status=1
fi
if [[ " ${artifacts[*]} " == *" conda "* ]]; then
  unpacked=1
  for letter in a b; do
    .venv/conda/bin/python ci/conda/payload.py unpack "${channels[$letter]}" "$where/conda-$letter" || unpacked=0
    # Several GB of what can be made again.
    rm -rf "${channels[$letter]}" "$where/$letter/home/.cache"
  done
  if ((unpacked)); then
    .venv/conda/bin/python ci/conda/payload.py compare "$where/conda-a" "$where/conda-b" || status=1
    "$python" ci/artifacts.py search "$where/conda-a" "$where" "$root" "$source" "${names[@]}" || status=1
  else
    status=1
  fi
fi
exit "${status:-0}"
