// Every kernel, written once over `Vec`. Included by one kernels_<isa>.cc per instruction set,
// which defines FASTGEN_KERNELS_ISA and compiles with that set's flags. Everything here is in the
// set's own namespace and no inline function comes from the standard library, so that the linker can
// never hand another set's code to a machine that cannot run it.
#include <cstddef>
#include <type_traits>
#include <utility>

#include "cpu/cpuid.h"
#include "cpu/kernels.h"

namespace fastgen::cpu::FASTGEN_KERNELS_ISA {
namespace {

using T = Vec::T;
constexpr int kWidth = Vec::kWidth;
constexpr int kPanelVecs = static_cast<int>(kPanel) / kWidth;
constexpr float kNegativeInfinity = -__builtin_inff();

inline int64_t Min(int64_t a, int64_t b) { return a < b ? a : b; }

// e^x to about 1 ulp for x in [-87.33, 88.37]; 0 below, about 2.4e38 above, NaN for NaN.
inline T Exp(T x) {
  const float lowest = -87.33f;
  const T clamped = Vec::Min(Vec::Set(88.37f), Vec::Max(Vec::Set(lowest), x));
  // Adding and subtracting 1.5 * 2^23 rounds to the nearest whole number.
  const T magic = Vec::Set(12582912.0f);
  const T n = Vec::Sub(Vec::Fma(clamped, Vec::Set(1.44269504f), magic), magic);
  T r = Vec::Fma(n, Vec::Set(-0.693359375f), clamped);
  r = Vec::Fma(n, Vec::Set(2.12194440e-4f), r);
  // Taylor to r^7: |r| <= 0.347 leaves an error below 6e-9.
  T p = Vec::Set(1.0f / 5040.0f);
  p = Vec::Fma(p, r, Vec::Set(1.0f / 720.0f));
  p = Vec::Fma(p, r, Vec::Set(1.0f / 120.0f));
  p = Vec::Fma(p, r, Vec::Set(1.0f / 24.0f));
  p = Vec::Fma(p, r, Vec::Set(1.0f / 6.0f));
  p = Vec::Fma(p, r, Vec::Set(0.5f));
  p = Vec::Fma(p, r, Vec::Set(1.0f));
  p = Vec::Fma(p, r, Vec::Set(1.0f));
  return Vec::ZeroBelow(x, lowest, Vec::Mul(p, Vec::PowerOfTwo(n)));
}

// x * sigmoid(2 u) with u = sqrt(2/pi) (x + 0.044715 x^3), which is the tanh form of GELU.
inline T Gelu(T x) {
  const T cubic = Vec::Fma(Vec::Mul(x, x), Vec::Set(0.044715f), Vec::Set(1.0f));
  const T u = Vec::Mul(Vec::Mul(x, cubic), Vec::Set(-2.0f * 0.7978845608f));
  return Vec::Div(x, Vec::Add(Vec::Set(1.0f), Exp(u)));
}

#include "cpu/matmul_inl.h"

// ---- layer norm ----------------------------------------------------------------------------

void LayerNorm(const float* x, const float* weight, const float* bias, float eps, int64_t n,
               float* y) {
  const int64_t whole = n / kWidth * kWidth;
  const int rest = static_cast<int>(n - whole);
  T sum = Vec::Set(0.0f);
  for (int64_t i = 0; i < whole; i += kWidth) sum = Vec::Add(sum, Vec::Load(x + i));
  if (rest) sum = Vec::Add(sum, Vec::LoadPart(x + whole, rest, 0.0f));
  const float mean = Vec::ReduceAdd(sum) / static_cast<float>(n);
  const T m = Vec::Set(mean);
  T squares = Vec::Set(0.0f);
  for (int64_t i = 0; i < whole; i += kWidth) {
    const T d = Vec::Sub(Vec::Load(x + i), m);
    squares = Vec::Fma(d, d, squares);
  }
  if (rest) {
    const T d = Vec::Sub(Vec::LoadPart(x + whole, rest, mean), m);
    squares = Vec::Fma(d, d, squares);
  }
  const float variance = Vec::ReduceAdd(squares) / static_cast<float>(n);
  const T scale = Vec::Set(1.0f / __builtin_sqrtf(variance + eps));
  for (int64_t i = 0; i < whole; i += kWidth) {
    const T d = Vec::Mul(Vec::Sub(Vec::Load(x + i), m), scale);
    Vec::Store(y + i, Vec::Fma(d, Vec::Load(weight + i), Vec::Load(bias + i)));
  }
  if (rest) {
    const T d = Vec::Mul(Vec::Sub(Vec::LoadPart(x + whole, rest, 0.0f), m), scale);
    Vec::StorePart(y + whole,
                   Vec::Fma(d, Vec::LoadPart(weight + whole, rest, 0.0f),
                            Vec::LoadPart(bias + whole, rest, 0.0f)),
                   rest);
  }
}

#include "cpu/cache_inl.h"

#include "cpu/attention_inl.h"

// ---- over the vocabulary -------------------------------------------------------------------

// Sums run in float within a stretch and in double across stretches.
constexpr int64_t kStretch = 4096;

float Largest(const float* x, int64_t n) {
  const int64_t whole = n / kWidth * kWidth;
  T largest = Vec::Set(kNegativeInfinity);
  for (int64_t i = 0; i < whole; i += kWidth) largest = Vec::Max(Vec::Load(x + i), largest);
  if (whole < n) {
    largest =
        Vec::Max(Vec::LoadPart(x + whole, static_cast<int>(n - whole), kNegativeInfinity), largest);
  }
  return Vec::ReduceMax(largest);
}

// Sum of exp(x[i] / temperature - shift); stores the terms when `out` is given.
double SumExp(const float* x, int64_t n, float temperature, float shift, float* out) {
  const T divisor = Vec::Set(temperature);
  const T s = Vec::Set(shift);
  double sum = 0.0;
  for (int64_t begin = 0; begin < n; begin += kStretch) {
    const int64_t end = Min(n, begin + kStretch);
    T partial = Vec::Set(0.0f);
    int64_t i = begin;
    for (; i + kWidth <= end; i += kWidth) {
      const T e = Exp(Vec::Sub(Vec::Div(Vec::Load(x + i), divisor), s));
      if (out) Vec::Store(out + i, e);
      partial = Vec::Add(partial, e);
    }
    if (i < end) {
      const int rest = static_cast<int>(end - i);
      const T e =
          Exp(Vec::Sub(Vec::Div(Vec::LoadPart(x + i, rest, kNegativeInfinity), divisor), s));
      if (out) Vec::StorePart(out + i, e, rest);
      partial = Vec::Add(partial, e);
    }
    sum += static_cast<double>(Vec::ReduceAdd(partial));
  }
  return sum;
}

void Softmax(const float* x, int64_t n, float temperature, float* probs) {
  const float shift = Largest(x, n) / temperature;
  const T sum = Vec::Set(static_cast<float>(SumExp(x, n, temperature, shift, probs)));
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) Vec::Store(probs + i, Vec::Div(Vec::Load(probs + i), sum));
  if (i < n) {
    const int rest = static_cast<int>(n - i);
    Vec::StorePart(probs + i, Vec::Div(Vec::LoadPart(probs + i, rest, 0.0f), sum), rest);
  }
}

float LogSumExp(const float* x, int64_t n) {
  const float shift = Largest(x, n);
  const double sum = SumExp(x, n, 1.0f, shift, nullptr);
  return static_cast<float>(static_cast<double>(shift) + __builtin_log(sum));
}

int64_t Argmax(const float* x, int64_t n) {
  const float largest = Largest(x, n);
  for (int64_t i = 0; i < n; ++i) {
    if (x[i] == largest) return i;
  }
  return 0;
}

float ReadSum(const float* x, int64_t n) {
  constexpr int kSums = 8;
  constexpr int64_t kAhead = 4096;  // bytes: reads 5 % more than twice that does, or nothing ahead
  T sums[kSums];
#pragma GCC unroll 16
  for (int s = 0; s < kSums; ++s) sums[s] = Vec::Set(0.0f);
  int64_t i = 0;
  for (; i + kSums * kWidth <= n; i += kSums * kWidth) {
#pragma GCC unroll 16
    for (int s = 0; s < kSums; ++s) {
      if (s * kWidth % 16 == 0) {
        __builtin_prefetch(reinterpret_cast<const char*>(x + i + s * kWidth) + kAhead, 0, 2);
      }
      sums[s] = Vec::Add(sums[s], Vec::Load(x + i + s * kWidth));
    }
  }
  T total = sums[0];
#pragma GCC unroll 16
  for (int s = 1; s < kSums; ++s) total = Vec::Add(total, sums[s]);
  float result = Vec::ReduceAdd(total);
  for (; i < n; ++i) result += x[i];
  return result;
}

}  // namespace

#define FASTGEN_STRING_OF(x) #x
#define FASTGEN_STRING(x) FASTGEN_STRING_OF(x)
extern const Kernels kKernels;
const Kernels kKernels = {
    FASTGEN_STRING(FASTGEN_KERNELS_ISA),
    cpuid::FASTGEN_KERNELS_ISA,
    PreparedBytes,
    Prepare,
    Matmul,
    LayerNorm,
    WriteCache,
    AttentionSpan,
    AttentionFinish,
    Softmax,
    LogSumExp,
    Argmax,
    ReadSum,
};

}  // namespace fastgen::cpu::FASTGEN_KERNELS_ISA
