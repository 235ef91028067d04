// Every kernel, written once over `Vec`. Included by one kernels_<isa>.cc per instruction set,
// which defines FASTGEN_KERNELS_ISA and compiles with that set's flags. Everything here is in the
// set's own namespace and no inline function comes from the standard library, so that the linker can
// never hand another set's code to a machine that cannot run it.
#include <type_traits>

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

// ---- matmul --------------------------------------------------------------------------------

// Far enough ahead of the weight stream to hide memory latency between hardware-prefetched pages.
constexpr int64_t kPrefetchBytes = 2048;

inline void Prefetch(const char* w) { __builtin_prefetch(w + kPrefetchBytes); }

template <Epilogue E>
inline void Finish(T acc, const float* bias, float* y) {
  T v = bias ? Vec::Add(acc, Vec::Load(bias)) : acc;
  if (E == Epilogue::kGelu) v = Gelu(v);
  if (E == Epilogue::kResidual) v = Vec::Add(v, Vec::Load(y));
  Vec::Store(y, v);
}

template <int M, int V, Epilogue E>
inline void FinishTile(const MatmulArgs& args, int64_t row, int64_t column, const T (&acc)[M][V]) {
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
    float* y = args.y + (row + m) * args.ldy + column;
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) {
      Finish<E>(acc[m][v], args.bias ? args.bias + column + v * kWidth : nullptr, y + v * kWidth);
    }
  }
}

// How rows of a panel are read: `w` is a row's, or a pair of rows', first column of the tile.
struct Float32 {
  static constexpr int64_t kColumnBytes = 4;
  static T Load(const char* w, int v) {
    return Vec::Load(reinterpret_cast<const float*>(w) + v * kWidth);
  }
};
struct BFloat16 {
  static constexpr int64_t kColumnBytes = 2;
  static T Load(const char* w, int v) {
    return Vec::LoadBrain(reinterpret_cast<const uint16_t*>(w) + v * kWidth);
  }
};
struct Float16 {
  static constexpr int64_t kColumnBytes = 2;
  static T Load(const char* w, int v) {
    return Vec::LoadHalf(reinterpret_cast<const uint16_t*>(w) + v * kWidth);
  }
};
struct Int8 {
  static constexpr int64_t kRows = 1;  // in one row of bytes
  static T Load(const char* w, int v, int) {
    return Vec::LoadInt8(reinterpret_cast<const int8_t*>(w) + v * kWidth);
  }
};
struct Int4 {
  static constexpr int64_t kRows = 2;
  static T Load(const char* w, int v, int half) {
    const auto* const bytes = reinterpret_cast<const uint8_t*>(w) + v * kWidth;
    return half == 0 ? Vec::LoadLowInt4(bytes) : Vec::LoadHighInt4(bytes);
  }
};

// M rows by V vectors of one panel, from column `first` of it on. Each output is one chain over
// k = 0 .. in - 1, whatever M is.
template <class W, int M, int V, Epilogue E>
void Tile(const MatmulArgs& args, int64_t row, const char* panel, int64_t first, int64_t column) {
  T acc[M][V];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) acc[m][v] = Vec::Set(0.0f);
  }
  const char* w = panel + first * W::kColumnBytes;
  const float* x = args.x + row * args.ldx;
  const int64_t ldx = args.ldx;
  const int64_t in = args.in;
  for (int64_t k = 0; k < in; ++k) {
    T b[V];
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) b[v] = W::Load(w, v);
#pragma GCC unroll 16
    for (int line = 0; line * 64 < V * kWidth * W::kColumnBytes; ++line) Prefetch(w + line * 64);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      const T a = Vec::Set(x[m * ldx + k]);
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) acc[m][v] = Vec::Fma(a, b[v], acc[m][v]);
    }
    w += kPanel * W::kColumnBytes;
  }
  FinishTile<M, V, E>(args, row, column + first, acc);
}

// The same for groups of rows that share scales: a chain over each group, and one over the groups. P
// neighbouring panels at once: with one row there would be too few chains to keep the multipliers busy.
template <class W, int P, int M, int V, Epilogue E>
void GroupTile(const MatmulArgs& args, int64_t row, const char* panel, int64_t first,
               int64_t column) {
  constexpr int kVecs = P * V;  // of all panels
  T acc[M][kVecs];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 16
    for (int v = 0; v < kVecs; ++v) acc[m][v] = Vec::Set(0.0f);
  }
  const float* x = args.x + row * args.ldx;
  const int64_t ldx = args.ldx;
  const int64_t panel_bytes = args.panel_bytes;
  for (int64_t begin = 0; begin < args.in; begin += kGroup) {
    const char* w = panel + 2 * kPanel + first;
    const int64_t count = Min(kGroup, args.in - begin);
    T part[M][kVecs];
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
#pragma GCC unroll 16
      for (int v = 0; v < kVecs; ++v) part[m][v] = Vec::Set(0.0f);
    }
    for (int64_t k = 0; k < count; k += W::kRows) {
#pragma GCC unroll 16
      for (int p = 0; p < P; ++p) Prefetch(w + p * panel_bytes);
#pragma GCC unroll 2
      for (int half = 0; half < W::kRows; ++half) {
        if (half > 0 && k + half >= count) break;
        T b[kVecs];
#pragma GCC unroll 16
        for (int v = 0; v < kVecs; ++v) b[v] = W::Load(w + v / V * panel_bytes, v % V, half);
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) {
          const T a = Vec::Set(x[m * ldx + begin + k + half]);
#pragma GCC unroll 16
          for (int v = 0; v < kVecs; ++v) part[m][v] = Vec::Fma(a, b[v], part[m][v]);
        }
      }
      w += kPanel;
    }
#pragma GCC unroll 16
    for (int v = 0; v < kVecs; ++v) {
      const char* const scales = panel + v / V * panel_bytes;
      const T scale =
          Vec::LoadHalf(reinterpret_cast<const uint16_t*>(scales) + first + v % V * kWidth);
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) acc[m][v] = Vec::Fma(part[m][v], scale, acc[m][v]);
    }
    panel += 2 * kPanel + kGroup / W::kRows * kPanel;
  }
#pragma GCC unroll 16
  for (int p = 0; p < P; ++p) {
    T mine[M][V];
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) mine[m][v] = acc[m][p * V + v];
    }
    FinishTile<M, V, E>(args, row, column + first + p * kPanel, mine);
  }
}

using TileFn = void (*)(const MatmulArgs&, int64_t, const char*, int64_t, int64_t);

// Entry m - 1 of a table is the tile of m rows.
template <class W, int V, Epilogue E>
struct TilesOf {
  template <int M>
  static constexpr TileFn kTile = Tile<W, M, V, E>;
};
template <int V, Epilogue E>
struct TilesOf<Int8, V, E> {
  template <int M>
  static constexpr TileFn kTile = GroupTile<Int8, 1, M, V, E>;
};
template <int V, Epilogue E>
struct TilesOf<Int4, V, E> {
  template <int M>
  static constexpr TileFn kTile = GroupTile<Int4, 1, M, V, E>;
};

template <class W, int V, Epilogue E, int... M>
struct Table {
  static constexpr int kMost = sizeof...(M);
  static constexpr TileFn kTiles[] = {TilesOf<W, V, E>::template kTile<M>...};
};

// Tables of as many rows as the registers of the set hold.
template <class W, int V, Epilogue E, int kMost>
using TableOf =
    std::conditional_t<(kMost >= 12), Table<W, V, E, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12>,
                       std::conditional_t<(kMost >= 6), Table<W, V, E, 1, 2, 3, 4, 5, 6>,
                                          std::conditional_t<(kMost >= 3), Table<W, V, E, 1, 2, 3>,
                                                             Table<W, V, E, 1>>>>;

// Sums of groups take as many registers again.
template <class W>
constexpr int kShare = std::is_same_v<W, Int8> || std::is_same_v<W, Int4> ? 2 : 1;

// Panels of one row that are worked on at once, within the registers of the set.
constexpr int kTogether = kWidth == 16 ? 4 : 1;

template <class W, Epilogue E>
void MatmulPanels(const MatmulArgs& args, int64_t begin, int64_t end) {
  using Full = TableOf<W, kPanelVecs, E, Vec::kFullRows / kShare<W>>;
  using Part = TableOf<W, Vec::kPartVecs, E, Vec::kPartRows / kShare<W>>;
  // Tiles of nearly equal height: 16 rows are 8 + 8, not 12 + 4.
  const int64_t tallest = Full::kMost >= args.rows ? Full::kMost : Part::kMost;
  const int64_t tiles = (args.rows + tallest - 1) / tallest;
  const int64_t panel_bytes = args.panel_bytes;
  int64_t panel = begin;
  if constexpr (kShare<W> > 1 && kTogether > 1) {
    for (; args.rows == 1 && panel + kTogether <= end; panel += kTogether) {
      const char* w = static_cast<const char*>(args.panels) + panel * panel_bytes;
      GroupTile<W, kTogether, 1, kPanelVecs, E>(args, 0, w, 0, panel * kPanel);
    }
  }
  for (; panel < end; ++panel) {
    const char* w = static_cast<const char*>(args.panels) + panel * panel_bytes;
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t row = args.rows * t / tiles;
      const int64_t m = args.rows * (t + 1) / tiles - row;
      if (m <= Full::kMost) {
        Full::kTiles[m - 1](args, row, w, 0, panel * kPanel);
      } else if constexpr (Part::kMost > Full::kMost) {
        for (int v = 0; v < kPanelVecs; v += Vec::kPartVecs) {
          Part::kTiles[m - 1](args, row, w, v * kWidth, panel * kPanel);
        }
      }
    }
  }
}

template <class W>
void MatmulOf(const MatmulArgs& args, int64_t begin, int64_t end) {
  switch (args.epilogue) {
    case Epilogue::kStore: return MatmulPanels<W, Epilogue::kStore>(args, begin, end);
    case Epilogue::kGelu: return MatmulPanels<W, Epilogue::kGelu>(args, begin, end);
    case Epilogue::kResidual: return MatmulPanels<W, Epilogue::kResidual>(args, begin, end);
  }
}

void Matmul(const MatmulArgs& args, int64_t begin, int64_t end) {
  switch (args.type) {
    case WeightType::kFloat32: return MatmulOf<Float32>(args, begin, end);
    case WeightType::kBFloat16: return MatmulOf<BFloat16>(args, begin, end);
    case WeightType::kFloat16: return MatmulOf<Float16>(args, begin, end);
    case WeightType::kInt8: return MatmulOf<Int8>(args, begin, end);
    case WeightType::kInt4: return MatmulOf<Int4>(args, begin, end);
  }
}

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

// ---- attention -----------------------------------------------------------------------------

constexpr int kBlockVecs = static_cast<int>(kBlock) / kWidth;

// Scores of N neighbouring blocks; several at once keep the multipliers busy.
template <int N>
void ScoreBlocks(const AttentionArgs& args, int64_t block) {
  T acc[N][kBlockVecs];
#pragma GCC unroll 16
  for (int n = 0; n < N; ++n) {
#pragma GCC unroll 16
    for (int v = 0; v < kBlockVecs; ++v) acc[n][v] = Vec::Set(0.0f);
  }
  for (int64_t d = 0; d < args.head_size; ++d) {
    const T q = Vec::Set(args.query[d]);
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) {
      const float* keys = args.key_blocks[block + n] + d * kBlock;
#pragma GCC unroll 16
      for (int v = 0; v < kBlockVecs; ++v) {
        acc[n][v] = Vec::Fma(q, Vec::Load(keys + v * kWidth), acc[n][v]);
      }
    }
  }
#pragma GCC unroll 16
  for (int n = 0; n < N; ++n) {
#pragma GCC unroll 16
    for (int v = 0; v < kBlockVecs; ++v) {
      Vec::Store(args.scores + (block + n) * kBlock + v * kWidth, acc[n][v]);
    }
  }
}

// out[0 .. V * kWidth) = sum over positions of scores[p] * values[p], then divided by `sum`.
template <int V>
void WeighValues(const AttentionArgs& args, int64_t column, float sum) {
  T acc[V];
#pragma GCC unroll 16
  for (int v = 0; v < V; ++v) acc[v] = Vec::Set(0.0f);
  const int64_t stride = args.value_stride;
  for (int64_t begin = 0; begin < args.length; begin += kBlock) {
    const float* values = args.value_blocks[begin / kBlock] + column;
    const int64_t count = Min(kBlock, args.length - begin);
    for (int64_t p = 0; p < count; ++p) {
      const T s = Vec::Set(args.scores[begin + p]);
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) {
        acc[v] = Vec::Fma(s, Vec::Load(values + p * stride + v * kWidth), acc[v]);
      }
    }
  }
  const T divisor = Vec::Set(sum);
#pragma GCC unroll 16
  for (int v = 0; v < V; ++v) {
    const T r = Vec::Div(acc[v], divisor);
    const int64_t at = column + v * kWidth;
    const int64_t left = args.head_size - at;
    if (left >= kWidth) {
      Vec::Store(args.out + at, r);
    } else if (left > 0) {
      Vec::StorePart(args.out + at, r, static_cast<int>(left));
    }
  }
}

void Attention(const AttentionArgs& args) {
  const int64_t blocks = (args.length + kBlock - 1) / kBlock;
  constexpr int kBlocksTogether = kWidth == 16 ? 4 : 1;  // within the registers of the set
  int64_t block = 0;
  for (; block + kBlocksTogether <= blocks; block += kBlocksTogether) {
    ScoreBlocks<kBlocksTogether>(args, block);
  }
  for (; block < blocks; ++block) ScoreBlocks<1>(args, block);

  float* scores = args.scores;
  const int64_t padded = blocks * kBlock;
  for (int64_t p = args.length; p < padded; ++p) scores[p] = kNegativeInfinity;
  T largest = Vec::Set(kNegativeInfinity);
  for (int64_t p = 0; p < padded; p += kWidth) largest = Vec::Max(Vec::Load(scores + p), largest);
  const T shift = Vec::Set(Vec::ReduceMax(largest));
  T total = Vec::Set(0.0f);
  for (int64_t p = 0; p < padded; p += kWidth) {
    const T e = Exp(Vec::Sub(Vec::Load(scores + p), shift));
    Vec::Store(scores + p, e);
    total = Vec::Add(total, e);
  }
  const float sum = Vec::ReduceAdd(total);

  constexpr int kTogetherValues = 4;
  int64_t column = 0;
  for (; column + kTogetherValues * kWidth <= args.value_stride;
       column += kTogetherValues * kWidth) {
    WeighValues<kTogetherValues>(args, column, sum);
  }
  for (; column < args.value_stride; column += kWidth) WeighValues<1>(args, column, sum);
}

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
  T sums[kSums];
#pragma GCC unroll 16
  for (int s = 0; s < kSums; ++s) sums[s] = Vec::Set(0.0f);
  int64_t i = 0;
  for (; i + kSums * kWidth <= n; i += kSums * kWidth) {
#pragma GCC unroll 16
    for (int s = 0; s < kSums; ++s) {
      if (s * kWidth % 16 == 0) {
        __builtin_prefetch(reinterpret_cast<const char*>(x + i + s * kWidth) + kPrefetchBytes);
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
    Matmul,
    LayerNorm,
    Attention,
    Softmax,
    LogSumExp,
    Argmax,
    ReadSum,
};

}  // namespace fastgen::cpu::FASTGEN_KERNELS_ISA
