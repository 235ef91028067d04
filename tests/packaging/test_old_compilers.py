"""The rules of ci/old_compilers.sh: what gcc 8.2 lacks is seen, and the sources keep to them."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def rules(*arguments: str | Path) -> tuple[int, str]:
    done = subprocess.run(
        [str(ROOT / "ci" / "old_compilers.sh"), "rules", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return done.returncode, done.stdout


def test_the_sources_keep_the_rules() -> None:
    assert rules() == (0, "rules: kept\n")


@pytest.mark.parametrize(
    "line",
    [
        "#include <filesystem>",
        "#include <memory_resource>",
        "#include <span>",
        "auto r = std::to_chars(begin, end, double{x});",
        "auto r = std::from_chars(begin, end, x, std::chars_format::general);",
        "float sum = std::reduce(begin, end);",
        "alignas(std::hardware_destructive_interference_size) int x;",
        "auto x = __builtin_bit_cast(int, y);",
        "if (x) [[unlikely]] return;",
        "__m512i x = _mm512_loadu_epi32(p);",
        "__m512 x = _mm512_zextps256_ps512(y);",
        "__m128i x = _mm_loadu_si32(p);",
    ],
)
def test_a_planted_line_is_seen(tmp_path: Path, line: str) -> None:
    (tmp_path / "x.cc").write_text(f"{line}\n")
    code, output = rules(tmp_path)
    assert code == 1, output
    assert f"x.cc:1:{line}" in output


def test_comments_and_other_words_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "x.cc").write_text(
        "// #include <filesystem> is not for us, nor is std::reduce.\n"
        "auto r = std::from_chars(begin, end, integer);\n"
        "__m512 x = _mm512_loadu_ps(p);\n"
        "auto m = _mm512_reduce_add_ps(x);\n"
    )
    assert rules(tmp_path) == (0, "rules: kept\n")
