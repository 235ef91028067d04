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
constexpr int kScoreVecs = kWidth == 16 ? (M == 1 ? 8 : 4) : (M <= 2 ? 4 : 2);
template <int M>
constexpr int kValueVecs = kWidth == 16 || M <= 2 ? 4 : 2;

// Elements of the cache as floats.
struct CacheFloat32 {
  static T Load(const float* p) { return Vec::Load(p); }
};

// Rows [row, row + M) of a tile within a span, which all of them reach into.
struct SpanArgs {
  const AttentionArgs* tile;
  int64_t row;
  int64_t begin;  // first position of the span
  int64_t
      count;  // positions of it that row `row` attends; every further row has one more, to `most`
  int64_t most;

  int64_t CountOf(int64_t m) const { return Min(count + m, most); }
};

// Scores of M rows at V vectors of positions, from `at` of the span on.
template <class C, int M, int V>
void ScoreTile(const SpanArgs& span, int64_t at) {
  constexpr int kVecs = V < kBlockVecs ? V : kBlockVecs;  // of a block
  constexpr int kBlocks = V / kVecs;
  const AttentionArgs& args = *span.tile;
  const int64_t position = span.begin + at;
  const float* keys[kBlocks];
#pragma GCC unroll 16
  for (int n = 0; n < kBlocks; ++n) {
    keys[n] = args.key_blocks[position / kBlock + n] + position % kBlock;
  }
  T acc[M][V];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) acc[m][v] = Vec::Set(0.0f);
  }
  const int64_t stride = args.query_stride;
  const float* query = args.query + span.row * stride;
  for (int64_t d = 0; d < args.head_size; ++d) {
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
    for (int v = 0; v < V; ++v) Vec::Store(scores + v * kWidth, acc[m][v]);
  }
}

// Takes `count` scores to e^(score - the largest); returns the largest, and their sum.
inline float ExpScores(float* scores, int64_t count, float* sum) {
  const int64_t padded = (count + kBlock - 1) / kBlock * kBlock;
  for (int64_t p = count; p < padded; ++p) scores[p] = kNegativeInfinity;
  T vectors = Vec::Set(kNegativeInfinity);
  for (int64_t p = 0; p < padded; p += kWidth) vectors = Vec::Max(Vec::Load(scores + p), vectors);
  const float largest = Vec::ReduceMax(vectors);
  // A span of nothing but -inf weighs nothing beside others.
  const T shift = Vec::Set(largest == kNegativeInfinity ? 0.0f : largest);
  T total = Vec::Set(0.0f);
  for (int64_t p = 0; p < padded; p += kWidth) {
    const T e = Exp(Vec::Sub(Vec::Load(scores + p), shift));
    Vec::Store(scores + p, e);
    total = Vec::Add(total, e);
  }
  *sum = Vec::ReduceAdd(total);
  return largest;
}

// parts[m, column ..) = sum over positions p of scores[m, p] * values[p], for M rows and V vectors.
template <class C, int M, int V>
void ValueTile(const SpanArgs& span, float* part, int64_t part_stride, int64_t column) {
  const AttentionArgs& args = *span.tile;
  const int64_t stride = args.value_stride;
  const float* scores = args.scores + span.row * kSpan;
  T acc[M][V];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) acc[m][v] = Vec::Set(0.0f);
  }
  const auto* const blocks = args.value_blocks + span.begin / kBlock;
  for (int64_t begin = 0; begin < span.count; begin += kBlock) {
    const float* values = blocks[begin / kBlock] + column;
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
      const float* values = blocks[p / kBlock] + p % kBlock * stride + column;
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

  const int64_t part_stride = args.value_stride + kPartNotes;
  for (int64_t m = 0; m < M; ++m) {
    float* const notes = part + m * part_stride + args.value_stride;
    notes[kPartMax] =
        ExpScores(args.scores + (span.row + m) * kSpan, span.CountOf(m), notes + kPartSum);
  }

  constexpr int kValues = kValueVecs<M>;
  int64_t column = 0;
  for (; column + kValues * kWidth <= args.value_stride; column += kValues * kWidth) {
    ValueTile<C, M, kValues>(span, part, part_stride, column);
  }
  for (; column < args.value_stride; column += kWidth) {
    ValueTile<C, M, 1>(span, part, part_stride, column);
  }
}

void AttentionSpan(const AttentionArgs& args, int64_t index) {
  using Span = void (*)(const SpanArgs&, float*);
  constexpr Span kSpans[] = {AttendSpan<CacheFloat32, 1>, AttendSpan<CacheFloat32, 2>,
                             AttendSpan<CacheFloat32, 3>, AttendSpan<CacheFloat32, 4>,
                             AttendSpan<CacheFloat32, 5>, AttendSpan<CacheFloat32, 6>};
  static_assert(sizeof(kSpans) / sizeof(kSpans[0]) == kAttentionRows);
  SpanArgs span;
  span.tile = &args;
  span.begin = index * kSpan;
  // Rows that end before the span have no part in it.
  span.row = span.begin < args.length ? 0 : span.begin - args.length + 1;
  span.count = Min(args.length + span.row - span.begin, kSpan);
  span.most = kSpan;
  float* const part =
      args.parts + (index * args.rows + span.row) * (args.value_stride + kPartNotes);
  kSpans[args.rows - span.row - 1](span, part);
}

void AttentionFinish(const AttentionArgs& args) {
  const int64_t part_floats = args.value_stride + kPartNotes;
  for (int64_t m = 0; m < args.rows; ++m) {
    const int64_t spans = (args.length + m + kSpan - 1) / kSpan;
    float* const first = args.parts + m * part_floats;
    const int64_t next =
        args.rows * part_floats;  // from a span's part of the row to the next one's
    float largest = kNegativeInfinity;
    for (int64_t s = 0; s < spans; ++s) {
      const float other = first[s * next + args.value_stride + kPartMax];
      if (other > largest) largest = other;
    }
    T sum = Vec::Set(0.0f);
    for (int64_t s = 0; s < spans; ++s) {
      const float* const part = first + s * next;
      const float* const notes = part + args.value_stride;
      const T weight = Exp(Vec::Set(notes[kPartMax] - largest));
      sum = Vec::Fma(weight, Vec::Set(notes[kPartSum]), sum);
      for (int64_t i = 0; i < args.value_stride; i += kWidth) {
        const T before = s == 0 ? Vec::Set(0.0f) : Vec::Load(first + i);
        Vec::Store(first + i, Vec::Fma(weight, Vec::Load(part + i), before));
      }
    }
    float* const out = args.out + m * args.out_stride;
    for (int64_t i = 0; i < args.head_size; i += kWidth) {
      const T r = Vec::Div(Vec::Load(first + i), sum);
      const int64_t left = args.head_size - i;
      if (left >= kWidth) {
        Vec::Store(out + i, r);
      } else {
        Vec::StorePart(out + i, r, static_cast<int>(left));
      }
    }
  }
}
