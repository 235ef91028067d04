// Products with the panels of panels.h, for every type of weights. Part of kernels_inl.h, which
// includes it inside of the namespace of the set.

// How far ahead of the weight stream is prefetched: what memory delivers within its latency.
constexpr int64_t kPrefetchBytes = 8192;

template <Epilogue E>
inline void Finish(T acc, const float* bias, float* y) {
  T v = bias ? Vec::Add(acc, Vec::Load(bias)) : acc;
  if (E == Epilogue::kGelu) v = Gelu(v);
  if (E == Epilogue::kResidual) v = Vec::Add(v, Vec::Load(y));
  Vec::Store(y, v);
}

// How the lines of a panel are read. A line is what lies side by side for all columns, one row of the
// panel or several. It is loaded as it is (Raw) and has kParts parts; a part is multiplied by one unit
// of a row of x, which has four bytes: a float, two bfloat16 or four int8.
template <int64_t kBytes, int kPartsOfLine>
struct FloatLine {
  using Acc = T;
  using X = T;
  static constexpr int64_t kColumnBytes = kBytes;
  static constexpr int kParts = kPartsOfLine;
  static constexpr int64_t kScaleRows = 0;
  static int64_t Units(int64_t in) { return in; }
  static X SetX(const char* x) { return Vec::Set(*reinterpret_cast<const float*>(x)); }
  static T Mac(T acc, T w, X x) { return Vec::Fma(x, w, acc); }
};
struct Float32 : FloatLine<4, 1> {
  using Raw = T;
  static T Load(const char* w) { return Vec::Load(reinterpret_cast<const float*>(w)); }
  static T Part(T raw, int) { return raw; }
};
struct Float16 : FloatLine<2, 1> {
  using Raw = T;
  static T Load(const char* w) { return Vec::LoadHalf(reinterpret_cast<const uint16_t*>(w)); }
  static T Part(T raw, int) { return raw; }
};
struct BFloat16 : FloatLine<4, 2> {
  using Raw = Vec::I;
  static Vec::I Load(const char* w) { return Vec::LoadInt(w); }
  static T Part(Vec::I raw, int part) {
    return part == 0 ? Vec::LowBrain(raw) : Vec::HighBrain(raw);
  }
};
// bfloat16 by bfloat16, where the set multiplies pairs.
template <class V>
struct BrainPairs {
  using Raw = Vec::I;
  using Acc = T;
  using X = Vec::I;
  static constexpr int64_t kColumnBytes = 4;
  static constexpr int kParts = 1;
  static constexpr int64_t kScaleRows = 0;
  static int64_t Units(int64_t in) { return (in + 1) / 2; }
  static Raw Load(const char* w) { return Vec::LoadInt(w); }
  static Raw Part(Raw raw, int) { return raw; }
  static X SetX(const char* x) { return Vec::SetInt(x); }
  static T Mac(T acc, Raw w, X x) { return V::DotBrain(acc, w, x); }
};
using Brain = std::conditional_t<Vec::kBrainPairs, BrainPairs<Vec>, BFloat16>;
template <int64_t kRows>
struct Bytes {
  using Raw = Vec::I;
  using Acc = Vec::I;
  using X = Vec::Quad;
  static constexpr int64_t kColumnBytes = 4;
  static constexpr int kParts = 1;
  static constexpr int64_t kScaleRows = kRows;
  static constexpr bool kSigned = Vec::kSignedBytes;  // the set takes the 128 off each byte itself
  static Raw Load(const char* w) { return Vec::LoadInt(w); }
  static Raw Part(Raw raw, int) { return raw; }
  static X SetX(const char* x) { return Vec::SetQuad(x); }
  static Acc Mac(Acc acc, Raw w, const X& x) { return Vec::DotBytes(acc, w, x); }
};
using Int8 = Bytes<kRun>;
using Int8Groups = Bytes<kGroup>;
struct Int4 : Bytes<kGroup> {
  static constexpr int kParts = 2;
  static constexpr bool kSigned = false;
  static Raw Part(Raw raw, int part) {
    return part == 0 ? Vec::LowNibbles(raw) : Vec::HighNibbles(raw);
  }
  static Acc Mac(Acc acc, Raw w, const X& x) { return Vec::DotNibbles(acc, w, x); }
};

// Where a tile lies, and what it fetches ahead.
struct Place {
  int64_t row;
  const char* panel;
  int64_t column;     // of the product, the panel's first
  int64_t first;      // column of the panel
  const char* ahead;  // bytes of the weights that are fetched first
  int64_t share;      // of how many passes over the panel that fetch together what one alone would
};

// What is fetched while a line is worked on: the lines at `at`, which is `step` bytes on at the next.
struct Ahead {
  const char* at;
  int64_t step;
};

// acc[m][v] += what `units` units of row m of x (x_stride bytes apart) give with vector v of the lines
// from w on. One chain for each, from the first unit to the last.
template <class W, int M, int V>
__attribute__((always_inline)) inline void Accumulate(const char* w, const char* x,
                                                      int64_t x_stride, int64_t units, Ahead* ahead,
                                                      typename W::Acc (&acc)[M][V]) {
  constexpr int64_t kBytes = V * kWidth * W::kColumnBytes;  // of a line that are read
  const char* at = ahead->at;
  const int64_t step = ahead->step;
  for (int64_t unit = 0; unit < units; unit += W::kParts) {
    typename W::Raw raw[V];
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) raw[v] = W::Load(w + v * kWidth * W::kColumnBytes);
    // Into the second-level cache, as the first holds up too few lines that are on their way. One row
    // passes through memory as fast as processors read ahead of it themselves, if nobody interferes.
    if constexpr (M > 1) {
#pragma GCC unroll 16
      for (int line = 0; line * 64 < kBytes; ++line) __builtin_prefetch(at + line * 64, 0, 2);
    }
#pragma GCC unroll 2
    for (int part = 0; part < W::kParts; ++part) {
      if (part > 0 && unit + part >= units) break;
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) {
        const typename W::X a = W::SetX(x + m * x_stride + (unit + part) * 4);
#pragma GCC unroll 16
        for (int v = 0; v < V; ++v) acc[m][v] = W::Mac(acc[m][v], W::Part(raw[v], part), a);
      }
    }
    w += kPanel * W::kColumnBytes;
    at += step;
  }
  ahead->at = at;
}

// M rows by V vectors of a panel, from its column `first` on.
template <class W, int M, int V, Epilogue E>
void Tile(const MatmulArgs& args, const Place& place) {
  const char* panel = place.panel;
  const int64_t first = place.first;
  const char* x = static_cast<const char*>(args.x) + place.row * args.x_stride;
  const int64_t x_stride = args.x_stride;
  Ahead ahead{place.ahead, kPanel * W::kColumnBytes / place.share};
  // Of many rows it is in no cache that is near.
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
    const float* const y = args.y + (place.row + m) * args.ldy + place.column + first;
#pragma GCC unroll 16
    for (int v = 0; v < V; v += 16 / kWidth) __builtin_prefetch(y + v * kWidth, 1);
  }
  T acc[M][V];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) acc[m][v] = Vec::Set(0.0f);
  }
  if constexpr (W::kScaleRows == 0) {
    Accumulate<W, M, V>(panel + first * W::kColumnBytes, x, x_stride, W::Units(args.in), &ahead,
                        acc);
  } else {
    // Whole numbers within a scale, and one chain of floats over the scales, in the row's steps: a
    // multiplication for each sum where the step changes.
    using Quantized = QuantizedPart<W::kScaleRows>;
    constexpr int64_t kGroupBytes = kGroup / 4 / W::kParts * kPanel * W::kColumnBytes;
    for (int64_t begin = 0; begin < args.in; begin += W::kScaleRows) {
      if (begin != 0 && begin % kRun == 0) {
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) {
          const auto* quantized = reinterpret_cast<const Quantized*>(x + m * x_stride);
          const T ratio = Vec::Set(quantized->ratio);
#pragma GCC unroll 16
          for (int v = 0; v < V; ++v) acc[m][v] = Vec::Mul(acc[m][v], ratio);
        }
      }
      Vec::I part[M][V];
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) {
        const auto* quantized = reinterpret_cast<const Quantized*>(x + m * x_stride);
        const Vec::I offset = W::kSigned
                                  ? Vec::ZeroInt()
                                  : Vec::SetInt(reinterpret_cast<const char*>(&quantized->offset));
#pragma GCC unroll 16
        for (int v = 0; v < V; ++v) part[m][v] = offset;
      }
      if constexpr (M > 1) __builtin_prefetch(ahead.at, 0, 2);
      ahead.at += 2 * kPanel / place.share;
      const char* group = panel + 2 * kPanel;
      const char* q = x + offsetof(Quantized, q);
      const int64_t end = Min(W::kScaleRows, args.in - begin);
      // Rolled up: what processors fetch ahead of one load, they find by the distance to its last time.
#pragma GCC unroll 1
      for (int64_t k = 0; k < end; k += kGroup, group += kGroupBytes, q += kGroup) {
        Accumulate<W, M, V>(group + first * W::kColumnBytes, q, x_stride, kGroup / 4, &ahead, part);
      }
      T scale[V];
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) {
        scale[v] = Vec::LoadHalf(reinterpret_cast<const uint16_t*>(panel) + first + v * kWidth);
      }
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) {
#pragma GCC unroll 16
        for (int v = 0; v < V; ++v) {
          acc[m][v] = Vec::Fma(Vec::FromInt(part[m][v]), scale[v], acc[m][v]);
        }
      }
      panel = group;
      x += sizeof(Quantized);
    }
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      const T step = Vec::Set(*reinterpret_cast<const float*>(x + m * x_stride));
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) acc[m][v] = Vec::Mul(acc[m][v], step);
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) {
      const int64_t at = place.column + first + v * kWidth;
      Finish<E>(acc[m][v], args.bias ? args.bias + at : nullptr,
                args.y + (place.row + m) * args.ldy + at);
    }
  }
}

using TileFn = void (*)(const MatmulArgs&, const Place&);

// Entry m of a table is the tile of m + 1 rows.
template <class W, int V, Epilogue E, class Rows>
struct Table;
template <class W, int V, Epilogue E, int... M>
struct Table<W, V, E, std::integer_sequence<int, M...>> {
  static constexpr int kMost = sizeof...(M);
  static constexpr TileFn kTiles[] = {Tile<W, M + 1, V, E>...};
};
template <class W, int V, Epilogue E, int kMost>
using TableOf = Table<W, V, E, std::make_integer_sequence<int, kMost>>;

template <class W, Epilogue E>
void MatmulPanels(const MatmulArgs& args, int64_t begin, int64_t end) {
  constexpr bool kWhole = W::kScaleRows > 0;
  using Full = TableOf<W, kPanelVecs, E, kWhole ? Vec::kFullWholeRows : Vec::kFullRows>;
  using Part = TableOf<W, Vec::kPartVecs, E, kWhole ? Vec::kPartWholeRows : Vec::kPartRows>;
  // Tiles of nearly equal height: 9 rows are 4 + 5, not 8 + 1.
  const int64_t tallest = Full::kMost >= args.rows ? Full::kMost : Part::kMost;
  const int64_t tiles = (args.rows + tallest - 1) / tallest;
  const int64_t panel_bytes = args.panel_bytes;
  constexpr int64_t kParts = kPanelVecs / Vec::kPartVecs;
  for (int64_t panel = begin; panel < end; ++panel) {
    const char* const w = static_cast<const char*>(args.panels) + panel * panel_bytes;
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t row = args.rows * t / tiles;
      const int64_t m = args.rows * (t + 1) / tiles - row;
      const bool full = m <= Full::kMost;
      // One pass over the panel fetches a little ahead; of several, each fetches its share of the next panel.
      const int64_t passes = full ? tiles : tiles * kParts;
      const auto ahead = [&](int64_t pass) {
        return passes == 1 ? w + kPrefetchBytes : w + panel_bytes + panel_bytes * pass / passes;
      };
      if (full) {
        Full::kTiles[m - 1](args, {row, w, panel * kPanel, 0, ahead(t), passes});
      } else if constexpr (Part::kMost > Full::kMost) {
        for (int64_t p = 0; p < kParts; ++p) {
          const int64_t first = p * Vec::kPartVecs * kWidth;
          Part::kTiles[m - 1](args, {row, w, panel * kPanel, first, ahead(t * kParts + p), passes});
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
    case WeightType::kBFloat16: return MatmulOf<Brain>(args, begin, end);
    case WeightType::kFloat16: return MatmulOf<Float16>(args, begin, end);
    case WeightType::kInt8: return MatmulOf<Int8>(args, begin, end);
    case WeightType::kInt4: return MatmulOf<Int4>(args, begin, end);
    case WeightType::kInt8Groups: return MatmulOf<Int8Groups>(args, begin, end);
  }
}

// ---- rows of x as a product takes them -----------------------------------------------------

// The next vector of a row of which `left` elements are there, zero behind them.
inline T LoadOfRow(const float* x, int64_t left) {
  return left >= kWidth ? Vec::Load(x)
         : left > 0     ? Vec::LoadPart(x, static_cast<int>(left), 0.0f)
                        : Vec::Set(0.0f);
}

// The largest magnitude of kRun elements is 127 steps, unless it is next to nothing or 2^40 times
// smaller than one before: then the step is larger, so that sums in steps do not overflow. A row with an
// infinity or NaN in it gives NaN.
template <int64_t kRows>
void QuantizeRow(const float* x, int64_t in, float zero_point, void* prepared) {
  const T zero = Vec::Set(0.0f);
  const T magic = Vec::Set(12582912.0f);  // rounds to whole numbers, see Exp
  auto* quantized = static_cast<QuantizedPart<kRows>*>(prepared);
  T poison = zero;  // 0, or NaN
  float step = 1.0f, least = 1e-32f;
  for (int64_t begin = 0; begin < in; begin += kRun) {
    const int64_t end = Min(begin + kRun, in);
    T magnitudes = zero;
    for (int64_t i = begin; i < end; i += kWidth) {
      const T part = LoadOfRow(x + i, end - i);
      magnitudes = Vec::Max(Vec::Max(part, Vec::Sub(zero, part)), magnitudes);
      poison = Vec::Fma(part, zero, poison);
    }
    const float wanted = Vec::ReduceMax(magnitudes) / 127.0f;
    const float before = step;
    step = wanted > least ? wanted : least;
    if (least < step * 0x1p-40f) least = step * 0x1p-40f;
    const T inverse = Vec::Set(1.0f / step);
    for (int64_t g = begin; g < end; g += kRows, ++quantized) {
      T sum = zero;
#pragma GCC unroll 16
      for (int64_t i = 0; i < kRows; i += kWidth) {
        const T part = LoadOfRow(x + g + i, end - g - i);
        // The larger of NaN and a number is the number.
        const T q = Vec::Max(Vec::Sub(Vec::Fma(part, inverse, magic), magic), Vec::Set(-127.0f));
        Vec::StoreInt8(quantized->q + i, q);
        sum = Vec::Add(sum, q);
      }
      quantized->offset = static_cast<int32_t>(-zero_point * Vec::ReduceAdd(sum));
      quantized->ratio = g == begin ? before / step : 1.0f;
    }
  }
  *reinterpret_cast<float*>(quantized) = step + Vec::ReduceAdd(poison);
}

template <class V>
void PrepareBrain(const float* x, int64_t in, uint16_t* out) {
  int64_t i = 0;
  for (; i + kWidth <= in; i += kWidth) V::StoreBrainPairs(out + i, V::Load(x + i));
  if (i < in) V::StoreBrainPairs(out + i, V::LoadPart(x + i, static_cast<int>(in - i), 0.0f));
}

template <int64_t kRows>
int64_t QuantizedBytes(int64_t in) {
  return (in + kRows - 1) / kRows * static_cast<int64_t>(sizeof(QuantizedPart<kRows>)) +
         static_cast<int64_t>(sizeof(float));
}

int64_t PreparedBytes(WeightType type, int64_t in) {
  int64_t bytes = 0;
  switch (type) {
    case WeightType::kFloat32:
    case WeightType::kFloat16: break;
    case WeightType::kBFloat16: bytes = Vec::kBrainPairs ? (in + 31) / 32 * 64 : 0; break;
    case WeightType::kInt8: bytes = QuantizedBytes<kRun>(in); break;
    case WeightType::kInt4:
    case WeightType::kInt8Groups: bytes = QuantizedBytes<kGroup>(in); break;
  }
  // An odd number of cache lines: rows 4096 bytes apart would share the same few sets of the cache.
  return bytes == 0 ? 0 : ((bytes + 63) / 64 | 1) * 64;
}

void Prepare(WeightType type, const float* x, int64_t in, void* prepared) {
  switch (type) {
    case WeightType::kFloat32:
    case WeightType::kFloat16: return;
    case WeightType::kBFloat16:
      if constexpr (Vec::kBrainPairs) PrepareBrain<Vec>(x, in, static_cast<uint16_t*>(prepared));
      return;
    case WeightType::kInt8: return QuantizeRow<kRun>(x, in, 128.0f, prepared);
    case WeightType::kInt4: return QuantizeRow<kGroup>(x, in, 8.0f, prepared);
    case WeightType::kInt8Groups: return QuantizeRow<kGroup>(x, in, 128.0f, prepared);
  }
}
