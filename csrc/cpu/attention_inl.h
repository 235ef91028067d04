// Attention of a head over a cache of blocks. Part of kernels_inl.h, which includes it inside of the
// namespace of the set.

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
