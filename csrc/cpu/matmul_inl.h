// Products with the panels of panels.h, for every type of weights. Part of kernels_inl.h, which
// includes it inside of the namespace of the set.

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
