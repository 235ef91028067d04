#!/usr/bin/env bash
# Makes a release from a clean checkout, up to the point where somebody publishes it; nothing is published
# or tagged here.
#
#   ci/release.sh                        the version of CMakeLists.txt, with a section in CHANGELOG.md, signed
#                                        with the ssh key that FASTGEN_SIGNING_KEY names
#   ci/release.sh --dry-run              the same with the changelog's "Unreleased" and a throw-away key
#   ci/release.sh --dry-run --no-reproduce    without building everything twice
#
# What is made lies in dist/: sdist, wheel, SBOM (SPDX 2.3), SHA256SUMS and its signature. All of it is then
# verified as whoever downloads it would. Needs what ci/wheel.sh needs, and ssh-keygen.
set -euo pipefail
cd "$(dirname "$0")/.."

dry=0 reproduce=1
while (($#)); do
  case "$1" in
    -h | --help) sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0"; exit 0 ;;
    --dry-run) dry=1 ;;
    --no-reproduce) reproduce=0 ;;
    *) echo "ci/release.sh: unknown argument '$1'; see -h" >&2; exit 2 ;;
  esac
  shift
done
fail() { echo "ci/release.sh: $1" >&2; exit 1; }
((reproduce || dry)) || fail "only a dry run may go without ci/reproduce.sh"
command -v ssh-keygen >/dev/null || fail "ssh-keygen is needed for the signature"

# ---- One version ----
version="$(sed -n 's/^project(fastgen VERSION \([0-9.]*\).*/\1/p' CMakeLists.txt)"
[[ "$version" =~ ^[0-9]+\.[0-9]+\.[0-9]+$ ]] || fail "CMakeLists.txt has no project(fastgen VERSION <x.y.z>)"
# A second place would sooner or later say something else.
if grep -nE '^ *version *= *"' pyproject.toml; then fail "pyproject.toml has a version of its own"; fi
heading="[$version]"
((!dry)) || heading="[Unreleased]"

# ---- The changelog says what is in it ----
section="$(awk -v heading="## $heading" 'index($0, "## ") == 1 {on = index($0, heading) == 1; next} on' CHANGELOG.md)"
grep -q '^- ' <<<"$section" || fail "CHANGELOG.md has no entries under $heading"

# ---- What is released is a commit ----
[[ -z "$(git status --porcelain)" ]] || fail "there are changes that are not committed: $(git status --porcelain | head -n 3 | xargs)"
SOURCE_DATE_EPOCH="$(git log -1 --format=%ct)"
FASTGEN_COMMIT="$(git rev-parse HEAD)"
export SOURCE_DATE_EPOCH FASTGEN_COMMIT
echo "fastgen $version of commit $FASTGEN_COMMIT, $(grep -c '^- ' <<<"$section") entries under $heading"

# ---- Artifacts ----
rm -rf dist
((!reproduce)) || ci/reproduce.sh
ci/wheel.sh
for file in "dist/fastgen-$version.tar.gz" "dist/fastgen-$version-py3-none-manylinux_2_28_x86_64.whl"; do
  [[ -f "$file" ]] || fail "$file was not made"
done
(($(find dist -type f | wc -l) == 2)) || fail "dist/ holds more than the sdist and the wheel"

# ---- SBOM, sums and their signature ----
.venv/release/bin/python ci/sbom.py dist
key="${FASTGEN_SIGNING_KEY:-}"
keys="$(mktemp -d)"
trap 'rm -rf "$keys"' EXIT
if ((dry)); then
  key="$keys/throw-away"
  ssh-keygen -q -t ed25519 -N '' -C throw-away -f "$key"
fi
[[ -n "$key" ]] || fail "FASTGEN_SIGNING_KEY names no key to sign with"
ssh-keygen -q -Y sign -n fastgen-release -f "$key" dist/SHA256SUMS

# ---- As whoever downloads it would ----
printf 'fastgen-release namespaces="fastgen-release" %s\n' "$(cut -d' ' -f1,2 "$key.pub")" >"$keys/allowed"
(cd dist && sha256sum --check --strict SHA256SUMS)
ssh-keygen -Y verify -n fastgen-release -I fastgen-release -f "$keys/allowed" -s dist/SHA256SUMS.sig <dist/SHA256SUMS
# A signature that fits anything would be none.
if sed '1s/^./x/' dist/SHA256SUMS |
  ssh-keygen -Y verify -n fastgen-release -I fastgen-release -f "$keys/allowed" -s dist/SHA256SUMS.sig >/dev/null 2>&1; then
  fail "the signature also fits sums that were changed"
fi
.venv/release/bin/python ci/sbom.py --check dist
if ((dry)); then echo "dry run: signed with a key that is gone now; nothing was published"; fi
