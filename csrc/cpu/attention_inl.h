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
  int64_t begin;  // first position of the span
  // Positions of it that row `row` attends; every further row attends one more, up to `most`.
  int64_t count;
  int64_t most;

  int64_t CountOf(int64_t m) const { return Min(count + m, most); }
};

// Scales of the keys, then of the values, of the block that a position is in.
inline const float* ScalesAt(const AttentionArgs& args, int64_t position) {
  return reinterpret_cast<const float*>(args.blocks[position / kBlock] + args.head.scales_at);
}

// Scores of M rows at V vectors of positions, from `at` of the span on.
template <class C, int M, int V>
void ScoreTile(const SpanArgs& span, int64_t at) {
  constexpr int kVecs = V < kBlockVecs ? V : kBlockVecs;  // of a block
  constexpr int kBlocks = V / kVecs;
  const AttentionArgs& args = *span.tile;
  const int64_t position = span.begin + at;
  const typename C::Element* keys[kBlocks];
#pragma GCC unroll 16
  for (int n = 0; n < kBlocks; ++n) {
    const char* const area = args.blocks[position / kBlock + n];
    keys[n] = reinterpret_cast<const typename C::Element*>(area) + position % kBlock;
  }
  T acc[M][V];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) acc[m][v] = Vec::Set(0.0f);
  }
  const int64_t stride = args.query_stride;
  const float* query = args.query + span.row * stride;
  for (int64_t d = 0; d < args.head.head_size; ++d) {
    T k[V];
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) {
      k[v] = C::Load(keys[v / kVecs] + d * kBlock + v % kVecs * kWidth);
    }
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      const T q = Vec::Set(query[m * stride + d]);
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) acc[m][v] = Vec::Fma(q, k[v], acc[m][v]);
    }
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

// Takes scores of M rows to e^(score - the row's largest), times the scale of the value, and notes the
// largest and the sum without scales behind the row's part. All rows at once: one alone waits for its
// own chains. What a row does not attend weighs nothing.
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
      Vec::Store(at, C::kScaled ? Vec::Mul(e, factors) : e);
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) notes[m * part_stride + kPartSum] = Vec::ReduceAdd(total[m]);
}

// parts[m, column ..) = sum over positions p of scores[m, p] * values[p], for M rows and V vectors.
template <class C, int M, int V>
void ValueTile(const SpanArgs& span, float* part, int64_t part_stride, int64_t column) {
  const AttentionArgs& args = *span.tile;
  const int64_t stride = args.head.value_stride;
  const float* scores = args.scores + span.row * kSpan;
  T acc[M][V];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) acc[m][v] = Vec::Set(0.0f);
  }
  const char* const* const blocks = args.blocks + span.begin / kBlock;
  const auto values_of = [&](int64_t p) {
    return reinterpret_cast<const typename C::Element*>(blocks[p / kBlock] + args.head.values_at) +
           p % kBlock * stride + column;
  };
  for (int64_t begin = 0; begin < span.count; begin += kBlock) {
    const auto* values = values_of(begin);
    const int64_t end = Min(begin + kBlock, span.count);
    for (int64_t p = begin; p < end; ++p, values += stride) {
      T x[V];
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) x[v] = C::Load(values + v * kWidth);
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) {
        const T s = Vec::Set(scores[m * kSpan + p]);
#pragma GCC unroll 16
        for (int v = 0; v < V; ++v) acc[m][v] = Vec::Fma(s, x[v], acc[m][v]);
      }
    }
  }
  // What only the later rows attend must not touch the earlier ones: 0 * inf is no 0.
#pragma GCC unroll 16
  for (int m = 1; m < M; ++m) {
    const int64_t end = span.CountOf(m);
    for (int64_t p = span.count; p < end; ++p) {
      const auto* values = values_of(p);
      const T s = Vec::Set(scores[m * kSpan + p]);
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) acc[m][v] = Vec::Fma(s, C::Load(values + v * kWidth), acc[m][v]);
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
void AttendSpan(const SpanArgs& span, float* part) {
  const AttentionArgs& args = *span.tile;
  constexpr int kScores = kScoreVecs<M>;
  constexpr int kLeast = kScores < kBlockVecs ? kScores : kBlockVecs;
  const int64_t most = (span.CountOf(M - 1) + kBlock - 1) / kBlock * kBlock;
  int64_t at = 0;
  for (; at + kScores * kWidth <= most; at += kScores * kWidth) ScoreTile<C, M, kScores>(span, at);
  for (; at < most; at += kLeast * kWidth) ScoreTile<C, M, kLeast>(span, at);

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
