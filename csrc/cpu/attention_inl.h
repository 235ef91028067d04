// Attention of a head over a cache of blocks. Part of kernels_inl.h, which includes it inside of the
// namespace of the set.
//
// A tile is some rows of one sequence at consecutive positions: what is read of the cache serves all of
// them. Whatever tile a row is in, its own sums are the same chains: a score over the elements of the
// head, weighted values over the positions of a span, then over the spans.

constexpr int kBlockVecs = static_cast<int>(kBlock) / kWidth;
constexpr int64_t kPartMax = 0, kPartSum = 1;  // of the notes of a part

// How a set's registers are shared out for M rows: vectors of positions (scores), of elements (values).
template <int M>
constexpr int kScoreVecs = M == 1                   ? 8
                           : kWidth == 16 || M == 2 ? 4
                                                    : 2;
template <int M>
constexpr int kValueVecs = kWidth == 16 || M <= 2 ? 4 : 2;

// Rows [row, row + M) of a tile within a span, which all of them reach into.
struct SpanArgs {
  const AttentionArgs* tile;
  int64_t row;
  const char* query;     // row `row`'s as the lines of the cache multiply it
  int64_t query_stride;  // bytes
  int64_t begin;         // first position of the span
  // Positions of it that row `row` attends; every further row attends one more, up to `most`.
  int64_t count;
  int64_t most;

  int64_t CountOf(int64_t m) const { return Min(count + m, most); }
};

// Scales of the keys, then of the values, of the block that a position is in.
inline const float* ScalesAt(const AttentionArgs& args, int64_t position) {
  return reinterpret_cast<const float*>(args.blocks[position / kBlock] + args.head.scales_at);
}

// What attention multiplies by lines of the cache, its queries and weights of values, is rounded to their
// type by every set, whether it multiplies pairs or widens them.
inline T RoundBrain(T v) { return Vec::HighBrain(Vec::BrainPair(v, v)); }

// M queries as pairs, or as floats that pairs have, zero behind the last element.
template <int M>
void PrepareQueries(const AttentionArgs& args, int64_t row, char* out, int64_t stride) {
  const int64_t n = args.head.head_size;
  for (int m = 0; m < M; ++m) {
    const float* const query = args.query + (row + m) * args.query_stride;
    if constexpr (Vec::kBrainPairs) {
      PrepareBrain<Vec>(query, n, reinterpret_cast<uint16_t*>(out + m * stride));
    } else {
      auto* const to = reinterpret_cast<float*>(out + m * stride);
      for (int64_t i = 0; i < n; i += kWidth) {
        Vec::Store(to + i, RoundBrain(LoadOfRow(query + i, n - i)));
      }
    }
  }
}

// acc[v] += what vector v of a line of the cache gives with a row's unit of x.
template <class Line, int V>
__attribute__((always_inline)) inline void AddLine(const typename Line::Raw (&raw)[V],
                                                   const char* x, T (&acc)[V]) {
#pragma GCC unroll 2
  for (int part = 0; part < Line::kParts; ++part) {
    const typename Line::X a = Line::SetX(x + part * 4);
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) acc[v] = Line::Mac(acc[v], Line::Part(raw[v], part), a);
  }
}

// Scores of M rows at V vectors of positions, from `at` of the span on.
template <class C, int M, int V>
void ScoreTile(const SpanArgs& span, int64_t at) {
  using Line = typename C::Line;
  constexpr int kVecs = V < kBlockVecs ? V : kBlockVecs;  // of a block
  constexpr int kBlocks = V / kVecs;
  const AttentionArgs& args = *span.tile;
  const int64_t position = span.begin + at;
  const char* keys[kBlocks];
#pragma GCC unroll 16
  for (int n = 0; n < kBlocks; ++n) {
    keys[n] = args.blocks[position / kBlock + n] + position % kBlock * Line::kColumnBytes;
  }
  T acc[M][V];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) acc[m][v] = Vec::Set(0.0f);
  }
  // A row alone is done with a block before memory has brought the next: meanwhile it fetches that one's
  // keys and this one's values. Several rows take longer.
  constexpr bool kAhead = M == 1;
  constexpr int64_t kBytes = kVecs * kWidth * Line::kColumnBytes;  // of a line that are read
  const int64_t last = (args.length + args.rows - 2) / kBlock;
  const char *next[kBlocks], *values[kBlocks];
#pragma GCC unroll 16
  for (int n = 0; n < kBlocks && kAhead; ++n) {
    next[n] = args.blocks[Min(position / kBlock + kBlocks + n, last)];
    values[n] = args.blocks[position / kBlock + n] + args.head.values_at;
  }
  const int64_t lines = C::kPaired ? (args.head.head_size + 1) / 2 : args.head.head_size;
  const char* query = span.query;
  for (int64_t line = 0; line < lines; ++line) {
#pragma GCC unroll 16
    for (int n = 0; n < kBlocks && kAhead; ++n) {
#pragma GCC unroll 16
      for (int64_t b = 0; b < kBytes; b += 64) {
        __builtin_prefetch(next[n] + line * kBlock * Line::kColumnBytes + b, 0, 2);
        __builtin_prefetch(values[n] + line * kBytes + b, 0, 2);
      }
    }
    typename Line::Raw raw[V];
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) {
      raw[v] =
          Line::Load(keys[v / kVecs] + (line * kBlock + v % kVecs * kWidth) * Line::kColumnBytes);
    }
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) AddLine<Line>(raw, query + m * span.query_stride, acc[m]);
    query += Line::kParts * 4;
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
    float* scores = args.scores + (span.row + m) * kSpan + at;
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) {
      T score = acc[m][v];
      if constexpr (C::kScaled) {
        const float* const scales = ScalesAt(args, position + v / kVecs * kBlock);
        score = Vec::Mul(score, Vec::Load(scales + position % kBlock + v % kVecs * kWidth));
      }
      Vec::Store(scores + v * kWidth, score);
    }
  }
}

// Weights of pairs of values at p and behind: pairs take half of the room.
template <class V>
inline void StoreWeights(float* row, int64_t p, T weights) {
  if constexpr (V::kBrainPairs) {
    V::StoreBrainPairs(reinterpret_cast<uint16_t*>(row) + p, weights);
  } else {
    V::Store(row + p, RoundBrain(weights));
  }
}

// Takes scores of M rows to e^(score - the row's largest), times the scale of the value, as lines of
// values multiply it, and notes the largest and the sum without scales behind the row's part. All rows at
// once: one alone waits for its own chains. What a row does not attend weighs nothing.
template <class C, int M>
void ExpScores(const SpanArgs& span, float* part, int64_t part_stride) {
  const AttentionArgs& args = *span.tile;
  float* const scores = args.scores + span.row * kSpan;
  const int64_t padded = (span.CountOf(M - 1) + kBlock - 1) / kBlock * kBlock;
  T largest[M], shift[M], total[M];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
    for (int64_t p = span.CountOf(m); p < padded; ++p) scores[m * kSpan + p] = kNegativeInfinity;
    largest[m] = Vec::Set(kNegativeInfinity);
  }
  for (int64_t p = 0; p < padded; p += kWidth) {
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      largest[m] = Vec::Max(Vec::Load(scores + m * kSpan + p), largest[m]);
    }
  }
  float* const notes = part + args.head.value_stride;
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
    const float most = Vec::ReduceMax(largest[m]);
    notes[m * part_stride + kPartMax] = most;
    // A span of nothing but -inf weighs nothing beside others.
    shift[m] = Vec::Set(most == kNegativeInfinity ? 0.0f : most);
    total[m] = Vec::Set(0.0f);
  }
  for (int64_t p = 0; p < padded; p += kWidth) {
    T factors = Vec::Set(1.0f);
    if constexpr (C::kScaled) {
      factors = Vec::Load(ScalesAt(args, span.begin + p) + kBlock + p % kBlock);
    }
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      float* const at = scores + m * kSpan + p;
      const T e = Exp(Vec::Sub(Vec::Load(at), shift[m]));
      total[m] = Vec::Add(total[m], e);
      if constexpr (C::kPaired) {
        StoreWeights<Vec>(scores + m * kSpan, p, e);
      } else {
        Vec::Store(at, C::kScaled ? Vec::Mul(e, factors) : e);
      }
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) notes[m * part_stride + kPartSum] = Vec::ReduceAdd(total[m]);
}

// parts[m, column ..) = sum over positions p of scores[m, p] * values[p], for M rows and V vectors.
template <class C, int M, int V>
void ValueTile(const SpanArgs& span, float* part, int64_t part_stride, int64_t column) {
  using Line = typename C::Line;
  constexpr int64_t kOfLine = C::kPaired ? 2 : 1;  // positions
  constexpr int64_t kLines = kBlock / kOfLine;     // of a block
  constexpr int64_t kUnits = Line::kParts * 4;     // bytes of weights for a line
  constexpr int64_t kRow = kSpan * static_cast<int64_t>(sizeof(float));
  const AttentionArgs& args = *span.tile;
  const int64_t stride = args.head.value_stride * Line::kColumnBytes;
  const auto* const weights = reinterpret_cast<const char*>(args.scores + span.row * kSpan);
  T acc[M][V];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) acc[m][v] = Vec::Set(0.0f);
  }
  const char* const* const blocks = args.blocks + span.begin / kBlock;
  const auto line_at = [&](int64_t line) {
    return blocks[line / kLines] + args.head.values_at + line % kLines * stride +
           column * Line::kColumnBytes;
  };
  typename Line::Raw raw[V];
  // A row alone fetches the keys of the head that follows in the block, which the thread attends with next.
  constexpr bool kAhead = M == 1 && V > 1;
  constexpr int64_t kBytes = V * kWidth * Line::kColumnBytes;
  const int64_t to_next = args.head.bytes - args.head.values_at;
  const int64_t whole = span.count / kOfLine;
  for (int64_t begin = 0; begin < whole; begin += kLines) {
    const char* values = line_at(begin);
    const int64_t end = Min(begin + kLines, whole);
    for (int64_t line = begin; line < end; ++line, values += stride) {
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) raw[v] = Line::Load(values + v * kWidth * Line::kColumnBytes);
      if constexpr (kAhead) {
        const char* const next = values + to_next;
#pragma GCC unroll 16
        for (int64_t b = 0; b < kBytes; b += 64) __builtin_prefetch(next + b, 0, 2);
      }
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) AddLine<Line>(raw, weights + m * kRow + line * kUnits, acc[m]);
    }
  }
  // What only the later rows attend must not touch the earlier ones: 0 * inf is no 0.
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
    const int64_t end = span.CountOf(m);
    for (int64_t line = whole; line * kOfLine < end; ++line) {
      const char* const values = line_at(line);
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) {
        raw[v] = Line::Load(values + v * kWidth * Line::kColumnBytes);
        if constexpr (C::kPaired) {
          if (line * kOfLine + 1 == end) raw[v] = Vec::FirstBrain(raw[v]);
        }
      }
      AddLine<Line>(raw, weights + m * kRow + line * kUnits, acc[m]);
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) {
      Vec::Store(part + m * part_stride + column + v * kWidth, acc[m][v]);
    }
  }
}

template <class C, int M>
void AttendSpan(const SpanArgs& given, float* part) {
  SpanArgs span = given;
  const AttentionArgs& args = *span.tile;
  alignas(64) char queries[C::kPaired ? M * kMostHeadSize * C::Line::kParts * 2 : 1];
  if constexpr (C::kPaired) {
    span.query = queries;
    span.query_stride = (args.head.head_size * C::Line::kParts * 2 + 63) / 64 * 64;
    PrepareQueries<M>(args, span.row, queries, span.query_stride);
  } else {
    span.query = reinterpret_cast<const char*>(args.query + span.row * args.query_stride);
    span.query_stride = args.query_stride * static_cast<int64_t>(sizeof(float));
  }
  constexpr int kScores = kScoreVecs<M>;
  // Of the last block, which may have just begun, half is enough where it has no more.
  constexpr int kHalf = kBlockVecs / 2;
  constexpr int kLeast = kScores < kBlockVecs ? kScores : kBlockVecs;
  constexpr int64_t kHalfBlock = kBlock / 2;
  const int64_t most = (span.CountOf(M - 1) + kHalfBlock - 1) / kHalfBlock * kHalfBlock;
  int64_t at = 0;
  for (; at + kScores * kWidth <= most; at += kScores * kWidth) ScoreTile<C, M, kScores>(span, at);
  for (; at + kLeast * kWidth <= most; at += kLeast * kWidth) ScoreTile<C, M, kLeast>(span, at);
  if (at < most) ScoreTile<C, M, kHalf>(span, at);

  const int64_t part_stride = args.head.value_stride + kPartNotes;
  ExpScores<C, M>(span, part, part_stride);

  constexpr int kValues = kValueVecs<M>;
  int64_t column = 0;
  for (; column + kValues * kWidth <= args.head.value_stride; column += kValues * kWidth) {
    ValueTile<C, M, kValues>(span, part, part_stride, column);
  }
  for (; column < args.head.value_stride; column += kWidth) {
    ValueTile<C, M, 1>(span, part, part_stride, column);
  }
}

using SpanFn = void (*)(const SpanArgs&, float*);

template <class C>
struct Spans {
  static constexpr SpanFn kOfRows[] = {AttendSpan<C, 1>, AttendSpan<C, 2>, AttendSpan<C, 3>,
                                       AttendSpan<C, 4>, AttendSpan<C, 5>, AttendSpan<C, 6>};
  static_assert(sizeof(kOfRows) / sizeof(kOfRows[0]) == kAttentionRows);
};

SpanFn SpanOf(CacheType type, int64_t rows) {
  switch (type) {
    case CacheType::kFloat32: break;
    case CacheType::kFloat16: return Spans<CacheFloat16>::kOfRows[rows - 1];
    case CacheType::kBFloat16: return Spans<CacheBFloat16>::kOfRows[rows - 1];
    case CacheType::kInt8: return Spans<CacheInt8>::kOfRows[rows - 1];
  }
  return Spans<CacheFloat32>::kOfRows[rows - 1];
}

void AttentionSpan(const AttentionArgs& args, int64_t index) {
  SpanArgs span;
  span.tile = &args;
  span.begin = index * kSpan;
  // Rows that end before the span have no part in it.
  span.row = span.begin < args.length ? 0 : span.begin - args.length + 1;
  span.count = Min(args.length + span.row - span.begin, kSpan);
  span.most = kSpan;
  float* const part =
      args.parts + (index * args.rows + span.row) * (args.head.value_stride + kPartNotes);
  SpanOf(args.head.type, args.rows - span.row)(span, part);
}

void AttentionFinish(const AttentionArgs& args) {
  const int64_t part_floats = args.head.value_stride + kPartNotes;
  for (int64_t m = 0; m < args.rows; ++m) {
    const int64_t spans = (args.length + m + kSpan - 1) / kSpan;
    float* const first = args.parts + m * part_floats;
    const int64_t next =
        args.rows * part_floats;  // from a span's part of the row to the next one's
    float largest = kNegativeInfinity;
    for (int64_t s = 0; s < spans; ++s) {
      const float other = first[s * next + args.head.value_stride + kPartMax];
      if (other > largest) largest = other;
    }
    T sum = Vec::Set(0.0f);
    for (int64_t s = 0; s < spans; ++s) {
      const float* const part = first + s * next;
      const float* const notes = part + args.head.value_stride;
      const T weight = Exp(Vec::Set(notes[kPartMax] - largest));
      sum = Vec::Fma(weight, Vec::Set(notes[kPartSum]), sum);
      for (int64_t i = 0; i < args.head.value_stride; i += kWidth) {
        const T before = s == 0 ? Vec::Set(0.0f) : Vec::Load(first + i);
        Vec::Store(first + i, Vec::Fma(weight, Vec::Load(part + i), before));
      }
    }
    float* const out = args.out + m * args.out_stride;
    for (int64_t i = 0; i < args.head.head_size; i += kWidth) {
      const T r = Vec::Div(Vec::Load(first + i), sum);
      const int64_t left = args.head.head_size - i;
      if (left >= kWidth) {
        Vec::Store(out + i, r);
      } else {
        Vec::StorePart(out + i, r, static_cast<int>(left));
      }
    }
  }
}
