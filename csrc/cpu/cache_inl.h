// Elements of the KV cache: how each type is read and written. Part of kernels_inl.h, which includes it
// inside of the namespace of the set.

// Finite numbers within [-most, most], others as NaN.
inline T Saturate(T x, float most) {
  const T clipped = Vec::Min(Vec::Set(most), Vec::Max(Vec::Set(-most), x));
  return Vec::Add(clipped, Vec::Sub(x, x));
}

struct CacheFloat32 {
  using Element = float;
  static constexpr bool kScaled = false;
  static T Load(const Element* p) { return Vec::Load(p); }
  static void Store(Element* p, T x) { Vec::Store(p, x); }
};
struct CacheFloat16 {
  using Element = uint16_t;
  static constexpr bool kScaled = false;
  static T Load(const Element* p) { return Vec::LoadHalf(p); }
  static void Store(Element* p, T x) { Vec::StoreHalf(p, Saturate(x, 65504.0f)); }
};
struct CacheBFloat16 {
  using Element = uint16_t;
  static constexpr bool kScaled = false;
  static T Load(const Element* p) { return Vec::LoadBrain(p); }
  static void Store(Element* p, T x) { Vec::StoreBrain(p, Saturate(x, 0x1.fep127f)); }
};
struct CacheInt8 {
  using Element = int8_t;
  static constexpr bool kScaled = true;
  static T Load(const Element* p) { return Vec::LoadInt8(p); }
  // NaN as -127, whatever its scale makes of it.
  static void Store(Element* p, T x) {
    const T clipped = Vec::Min(Vec::Max(x, Vec::Set(-127.0f)), Vec::Set(127.0f));
    const T magic = Vec::Set(12582912.0f);  // rounds to the nearest whole number
    Vec::StoreInt8(p, Vec::Sub(Vec::Add(clipped, magic), magic));
  }
};

inline T LoadRow(const float* from, int64_t i, int64_t n) {
  return i + kWidth <= n ? Vec::Load(from + i)
                         : Vec::LoadPart(from + i, static_cast<int>(n - i), 0.0f);
}

// The largest magnitude of a row as 127 steps; NaN if an element is not finite.
inline float ScaleOf(const float* from, int64_t n) {
  T largest = Vec::Set(0.0f), poison = Vec::Set(0.0f);
  for (int64_t i = 0; i < n; i += kWidth) {
    const T x = LoadRow(from, i, n);
    const T negative = Vec::Sub(Vec::Set(0.0f), x);
    largest = Vec::Max(Vec::Max(x, negative), largest);
    poison = Vec::Add(poison, Vec::Sub(x, x));
  }
  const float scale = Vec::ReduceMax(largest) / 127.0f;
  const float least = 0x1p-120f;  // its inverse is finite
  return (scale < least ? least : scale) + Vec::ReduceAdd(poison);
}

// One row of n elements, `stride` elements from one another.
template <class C>
void WriteRow(const float* from, int64_t n, typename C::Element* to, int64_t stride, float* scale) {
  T factor = Vec::Set(1.0f);
  if constexpr (C::kScaled) {
    *scale = ScaleOf(from, n);
    factor = Vec::Set(1.0f / *scale);
  }
  typename C::Element row[kMostHeadSize + kWidth];
  for (int64_t i = 0; i < n; i += kWidth) {
    const T x = LoadRow(from, i, n);
    C::Store(row + i, C::kScaled ? Vec::Mul(x, factor) : x);
  }
  for (int64_t i = 0; i < n; ++i) to[i * stride] = row[i];
}

template <class C>
void WriteCacheOf(const HeadLayout& head, const float* key, const float* value, char* area,
                  int64_t at) {
  using Element = typename C::Element;
  auto* const keys = reinterpret_cast<Element*>(area);
  auto* const values = reinterpret_cast<Element*>(area + head.values_at);
  auto* const scales = reinterpret_cast<float*>(area + head.scales_at);
  WriteRow<C>(key, head.head_size, keys + at, kBlock, scales + at);
  WriteRow<C>(value, head.head_size, values + at * head.value_stride, 1, scales + kBlock + at);
}

void WriteCache(const HeadLayout& head, const float* key, const float* value, char* area,
                int64_t at) {
  switch (head.type) {
    case CacheType::kFloat32: return WriteCacheOf<CacheFloat32>(head, key, value, area, at);
    case CacheType::kFloat16: return WriteCacheOf<CacheFloat16>(head, key, value, area, at);
    case CacheType::kBFloat16: return WriteCacheOf<CacheBFloat16>(head, key, value, area, at);
    case CacheType::kInt8: return WriteCacheOf<CacheInt8>(head, key, value, area, at);
  }
}
