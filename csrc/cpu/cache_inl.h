// Elements of the KV cache: how each type is read and written. Part of kernels_inl.h, which includes it
// inside of the namespace of the set.

// Finite numbers within [-most, most], others as NaN.
inline T Saturate(T x, float most) {
  const T clipped = Vec::Min(Vec::Set(most), Vec::Max(Vec::Set(-most), x));
  return Vec::Add(clipped, Vec::Sub(x, x));
}

// A type's elements, and the line of them that attention multiplies (matmul_inl.h).
struct CacheFloat32 {
  using Element = float;
  using Line = Float32;
  static constexpr bool kScaled = false, kPaired = false;
  static void Store(Element* p, T x) { Vec::Store(p, x); }
};
struct CacheFloat16 {
  using Element = uint16_t;
  using Line = Float16;
  static constexpr bool kScaled = false, kPaired = false;
  static void Store(Element* p, T x) { Vec::StoreHalf(p, Saturate(x, 65504.0f)); }
};
struct CacheBFloat16 {
  using Element = uint16_t;
  using Line = Brain;
  static constexpr bool kScaled = false, kPaired = true;
  static Vec::I Pair(T low, T high) {
    return Vec::BrainPair(Saturate(low, 0x1.fep127f), Saturate(high, 0x1.fep127f));
  }
};
struct CacheInt8 {
  using Element = int8_t;
  struct Line : FloatLine<1, 1> {
    using Raw = T;
    static T Load(const char* p) { return Vec::LoadInt8(reinterpret_cast<const int8_t*>(p)); }
    static T Part(T raw, int) { return raw; }
  };
  static constexpr bool kScaled = true, kPaired = false;
  // NaN as -127, whatever its scale makes of it.
  static void Store(Element* p, T x) {
    const T clipped = Vec::Min(Vec::Max(x, Vec::Set(-127.0f)), Vec::Set(127.0f));
    const T magic = Vec::Set(12582912.0f);  // rounds to the nearest whole number
    Vec::StoreInt8(p, Vec::Sub(Vec::Add(clipped, magic), magic));
  }
};

// The largest magnitude of a row as 127 steps; NaN if an element is not finite.
inline float ScaleOf(const float* from, int64_t n) {
  T largest = Vec::Set(0.0f), poison = Vec::Set(0.0f);
  for (int64_t i = 0; i < n; i += kWidth) {
    const T x = LoadOfRow(from + i, n - i);
    const T negative = Vec::Sub(Vec::Set(0.0f), x);
    largest = Vec::Max(Vec::Max(x, negative), largest);
    poison = Vec::Add(poison, Vec::Sub(x, x));
  }
  const float scale = Vec::ReduceMax(largest) / 127.0f;
  const float least = 0x1p-120f;  // its inverse is finite
  return (scale < least ? least : scale) + Vec::ReduceAdd(poison);
}

// Row of n elements to consecutive ones.
template <class C>
void WriteRow(const float* from, int64_t n, typename C::Element* to, float* scale) {
  T factor = Vec::Set(1.0f);
  if constexpr (C::kScaled) {
    *scale = ScaleOf(from, n);
    factor = Vec::Set(1.0f / *scale);
  }
  const int64_t whole = n / kWidth * kWidth;
  for (int64_t i = 0; i < whole; i += kWidth) {
    const T x = Vec::Load(from + i);
    C::Store(to + i, C::kScaled ? Vec::Mul(x, factor) : x);
  }
  if (whole == n) return;
  typename C::Element rest[kWidth];
  const T x = LoadOfRow(from + whole, n - whole);
  C::Store(rest, C::kScaled ? Vec::Mul(x, factor) : x);
  for (int64_t i = whole; i < n; ++i) to[i] = rest[i - whole];
}

// kWidth rows of n elements, `stride` from one another, to columns: element i of all to to[i * kBlock ..),
// or pairs of elements i and i + 1 to to[i / 2 * kBlock * 2 ..).
template <class C>
void WriteColumns(const float* from, int64_t stride, int64_t n, typename C::Element* to,
                  float* scales) {
  T factors = Vec::Set(1.0f);
  if constexpr (C::kScaled) {
    float inverses[kWidth];
    for (int64_t r = 0; r < kWidth; ++r) {
      scales[r] = ScaleOf(from + r * stride, n);
      inverses[r] = 1.0f / scales[r];
    }
    factors = Vec::Load(inverses);
  }
  for (int64_t i = 0; i < n; i += kWidth) {
    T columns[kWidth];
#pragma GCC unroll 16
    for (int64_t r = 0; r < kWidth; ++r) columns[r] = LoadOfRow(from + r * stride + i, n - i);
    Vec::Transpose(columns);
    const int64_t count = Min(kWidth, n - i);
    if constexpr (C::kPaired) {
      // Behind the last element a row is zero.
      for (int64_t k = 0; k < count; k += 2) {
        Vec::StoreInt(to + (i + k) * kBlock, C::Pair(columns[k], columns[k + 1]));
      }
    } else {
      for (int64_t k = 0; k < count; ++k) {
        C::Store(to + (i + k) * kBlock, C::kScaled ? Vec::Mul(columns[k], factors) : columns[k]);
      }
    }
  }
}

// Row of n elements to one of the two places of each pair: element i to to[i * step], and zeros up to the
// next whole vector.
template <class C>
void WriteHalves(const float* from, int64_t n, typename C::Element* to, int64_t step) {
  for (int64_t i = 0; i < n; i += kWidth) {
    typename C::Element pairs[2 * kWidth];
    const T x = LoadOfRow(from + i, n - i);
    Vec::StoreInt(pairs, C::Pair(x, x));
    for (int64_t k = 0; k < kWidth; ++k) to[(i + k) * step] = pairs[2 * k];
  }
}

// Pairs of positions and elements; see cache_layout.h.
template <class C>
void WritePaired(const HeadLayout& head, const float* keys, const float* values, int64_t stride,
                 int64_t rows, char* area, int64_t at) {
  using Element = typename C::Element;
  const int64_t n = head.head_size;
  auto* const key_pairs = reinterpret_cast<Element*>(area);
  auto* const value_pairs = reinterpret_cast<Element*>(area + head.values_at);
  int64_t r = 0;
  for (; r + kWidth <= rows; r += kWidth) {
    WriteColumns<C>(keys + r * stride, stride, n, key_pairs + 2 * (at + r), nullptr);
  }
  for (; r < rows; ++r) {
    Element row[kMostHeadSize];
    WriteHalves<C>(keys + r * stride, n, row, 1);
    for (int64_t i = 0; i < (n + 1) / 2 * 2; ++i) {
      key_pairs[(i / 2 * kBlock + at + r) * 2 + i % 2] = row[i];
    }
  }
  for (r = 0; r < rows;) {
    const float* const row = values + r * stride;
    const int64_t position = at + r;
    Element* const to = value_pairs + position / 2 * 2 * head.value_stride;
    if (position % 2 != 0 || r + 1 == rows) {
      WriteHalves<C>(row, n, to + position % 2, 2);
      ++r;
      continue;
    }
    for (int64_t i = 0; i < n; i += kWidth) {
      Vec::StoreInt(to + 2 * i,
                    C::Pair(LoadOfRow(row + i, n - i), LoadOfRow(row + stride + i, n - i)));
    }
    r += 2;
  }
}

template <class C>
void WriteCacheOf(const HeadLayout& head, const float* keys, const float* values, int64_t stride,
                  int64_t rows, char* area, int64_t at) {
  using Element = typename C::Element;
  auto* const key_columns = reinterpret_cast<Element*>(area);
  auto* const value_rows = reinterpret_cast<Element*>(area + head.values_at);
  auto* const scales = reinterpret_cast<float*>(area + head.scales_at);
  int64_t r = 0;
  for (; r + kWidth <= rows; r += kWidth) {
    WriteColumns<C>(keys + r * stride, stride, head.head_size, key_columns + at + r,
                    scales + at + r);
  }
  for (; r < rows; ++r) {
    Element row[kMostHeadSize];
    WriteRow<C>(keys + r * stride, head.head_size, row, scales + at + r);
    for (int64_t i = 0; i < head.head_size; ++i) key_columns[i * kBlock + at + r] = row[i];
  }
  for (r = 0; r < rows; ++r) {
    WriteRow<C>(values + r * stride, head.head_size, value_rows + (at + r) * head.value_stride,
                scales + kBlock + at + r);
  }
}

void WriteCache(const HeadLayout& head, const float* keys, const float* values, int64_t stride,
                int64_t rows, char* area, int64_t at) {
  const auto write = [&](auto type) {
    WriteCacheOf<decltype(type)>(head, keys, values, stride, rows, area, at);
  };
  switch (head.type) {
    case CacheType::kFloat32: return write(CacheFloat32{});
    case CacheType::kFloat16: return write(CacheFloat16{});
    case CacheType::kBFloat16:
      return WritePaired<CacheBFloat16>(head, keys, values, stride, rows, area, at);
    case CacheType::kInt8: return write(CacheInt8{});
  }
}
