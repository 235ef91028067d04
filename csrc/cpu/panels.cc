#include "cpu/panels.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "base/half.h"

namespace fastgen::cpu {
namespace {

struct Name {
  WeightType type;
  const char* name;
};

constexpr Name kNames[] = {
    {WeightType::kFloat32, "float32"}, {WeightType::kBFloat16, "bfloat16"},
    {WeightType::kFloat16, "float16"}, {WeightType::kInt8, "int8"},
    {WeightType::kInt4, "int4"},       {WeightType::kInt8Groups, "int8 in groups"},
};

constexpr int64_t kScaleBytes = kPanel * 2;

// Where row k of column c lies in a panel of pairs, and in the bytes of a group.
int64_t PairAt(int64_t k, int64_t c) { return (k / 2 * kPanel + c) * 2 + k % 2; }
int64_t Int8At(int64_t k, int64_t c) { return (k / 4 * kPanel + c) * 4 + k % 4; }
int64_t Int4At(int64_t k, int64_t c) { return (k / 8 * kPanel + c) * 4 + k % 4; }
bool InHighHalf(int64_t k) { return k % 8 >= 4; }

bool IsInt4(WeightType type) { return type == WeightType::kInt4; }

// Of `count` rows that share their scales, in whole groups.
int64_t ScaledBytes(WeightType type, int64_t count) {
  const int64_t values = (count + kGroup - 1) / kGroup * kGroup * kPanel;
  return kScaleBytes + (IsInt4(type) ? values / 2 : values);
}

// Loops below go over the columns of a group inside, so that the compiler makes vectors of them.
using Columns = float[kPanel];

// To the nearest whole number, ties to even, for magnitudes below 2^22: others do not matter here.
float Round(float x) { return (x + 12582912.0f) - 12582912.0f; }

float Clip(float x, float least, float most) { return x < least ? least : x > most ? most : x; }

// The weight of largest magnitude in each column.
void LargestOf(const float* rows, int64_t count, Columns& largest) {
  for (float& x : largest) x = 0.0f;
  for (int64_t k = 0; k < count; ++k) {
    for (int64_t c = 0; c < kPanel; ++c) {
      const float value = rows[k * kPanel + c];
      if (std::fabs(value) > std::fabs(largest[c])) largest[c] = value;
    }
  }
}

// int8: the largest magnitude is 127 steps.
void Int8Scales(const Columns& largest, Columns& scales) {
  for (int64_t c = 0; c < kPanel; ++c) scales[c] = std::fabs(largest[c]) / 127.0f;
}

// int4 has one more negative step, which the largest magnitude takes whatever its sign. Which whole
// numbers fit best is tried for that magnitude being 8 steps and somewhat more or less; the scale is
// then the one of least squares, sum(w q) / sum(q q), which explains sum(w q)^2 / sum(q q) of sum(w w).
void Int4Scales(const float* rows, int64_t count, const Columns& largest, Columns& scales) {
  constexpr float kTries[] = {0.0f,  -0.2f, 0.2f,  -0.4f, 0.4f,  -0.6f, 0.6f, -0.8f,
                              -1.0f, -1.2f, -1.4f, -1.7f, -2.0f, -2.3f, -2.6f};
  Columns best;
  for (int64_t c = 0; c < kPanel; ++c) best[c] = scales[c] = 0.0f;
  for (const float more : kTries) {
    Columns inverse, products, squares;
    for (int64_t c = 0; c < kPanel; ++c) {
      inverse[c] = largest[c] == 0.0f ? 0.0f : (-8.0f - more) / largest[c];
      products[c] = squares[c] = 0.0f;
    }
    for (int64_t k = 0; k < count; ++k) {
      for (int64_t c = 0; c < kPanel; ++c) {
        const float value = rows[k * kPanel + c];
        const float q = Clip(Round(value * inverse[c]), -8.0f, 7.0f);
        products[c] += value * q;
        squares[c] += q * q;
      }
    }
    for (int64_t c = 0; c < kPanel; ++c) {
      if (squares[c] == 0.0f) continue;
      const float explained = products[c] / squares[c] * products[c];
      if (explained > best[c]) {
        best[c] = explained;
        scales[c] = products[c] / squares[c];
      }
    }
  }
}

void PackGroup(WeightType type, const float* rows, int64_t count, const uint16_t* given,
               uint8_t* to) {
  const bool wide = !IsInt4(type);
  uint16_t scales[kPanel];
  if (!given) FindScales(type, rows, count, scales);
  std::memcpy(to, given ? given : scales, kScaleBytes);
  int8_t whole[kRun * kPanel];
  Quantize(type, rows, count, given ? given : scales, whole);
  uint8_t* const values = to + kScaleBytes;
  std::memset(values, wide ? 0x80 : 0x88,
              static_cast<size_t>(ScaledBytes(type, count) - kScaleBytes));
  for (int64_t k = 0; k < count; ++k) {
    for (int64_t c = 0; c < kPanel; ++c) {
      const int q = whole[k * kPanel + c];
      if (wide) {
        values[Int8At(k, c)] = static_cast<uint8_t>(q + 128);
        continue;
      }
      uint8_t& both = values[Int4At(k, c)];
      const int bits = q + 8;
      both = static_cast<uint8_t>(InHighHalf(k) ? (both & 0x0f) | bits << 4 : (both & 0xf0) | bits);
    }
  }
}

}  // namespace

bool ParseWeightType(const char* name, WeightType* type) {
  for (const Name& known : kNames) {
    if (known.type == WeightType::kInt8Groups || std::strcmp(name, known.name) != 0) continue;
    *type = known.type;
    return true;
  }
  return false;
}

const char* WeightTypeName(WeightType type) {
  for (const Name& known : kNames) {
    if (type == known.type) return known.name;
  }
  return "?";
}

int64_t PanelBytes(WeightType type, int64_t in) {
  switch (type) {
    case WeightType::kFloat32: return in * kPanel * 4;
    case WeightType::kBFloat16: return (in + 1) / 2 * kPanel * 4;
    case WeightType::kFloat16: return in * kPanel * 2;
    case WeightType::kInt8:
    case WeightType::kInt4:
    case WeightType::kInt8Groups: break;
  }
  const int64_t most = ScaleRows(type), rest = in % most;
  return in / most * ScaledBytes(type, most) + (rest > 0 ? ScaledBytes(type, rest) : 0);
}

void FindScales(WeightType type, const float* rows, int64_t count, uint16_t* scales) {
  Columns largest, found;
  LargestOf(rows, count, largest);
  if (IsInt4(type)) {
    Int4Scales(rows, count, largest, found);
  } else {
    Int8Scales(largest, found);
  }
  for (int64_t c = 0; c < kPanel; ++c) scales[c] = base::FloatToHalf(found[c]);
}

// A scale has 11 bits and a whole number 8, so their product is exact in float32, and its product with
// the rounded inverse is within 127 * 2^-22 of the whole number: it is found again. Subnormal scales are
// no exception, float32 has their inverses; a scale of 0 has nothing but zeros.
void Quantize(WeightType type, const float* rows, int64_t count, const uint16_t* scales,
              int8_t* values) {
  const float least = IsInt4(type) ? -8.0f : -127.0f;
  const float most = IsInt4(type) ? 7.0f : 127.0f;
  Columns inverse;
  for (int64_t c = 0; c < kPanel; ++c) {
    const float step = base::HalfToFloat(scales[c]);
    inverse[c] = step == 0.0f ? 0.0f : 1.0f / step;
  }
  for (int64_t k = 0; k < count; ++k) {
    for (int64_t c = 0; c < kPanel; ++c) {
      const float q = Round(Clip(rows[k * kPanel + c] * inverse[c], least, most));
      values[k * kPanel + c] = static_cast<int8_t>(q == q ? static_cast<int>(q) : 0);
    }
  }
}

void PackPanel(WeightType type, const float* weights, int64_t in, void* panel,
               const uint16_t* scales) {
  auto* const halves = static_cast<uint16_t*>(panel);
  switch (type) {
    case WeightType::kFloat32:
      std::memcpy(panel, weights, static_cast<size_t>(in * kPanel) * sizeof(float));
      return;
    case WeightType::kBFloat16:
      for (int64_t k = 0; k < in; ++k) {
        for (int64_t c = 0; c < kPanel; ++c) {
          halves[PairAt(k, c)] = base::FloatToBrain(weights[k * kPanel + c]);
        }
      }
      for (int64_t c = 0; in % 2 != 0 && c < kPanel; ++c) halves[PairAt(in, c)] = 0;
      return;
    case WeightType::kFloat16:
      for (int64_t i = 0; i < in * kPanel; ++i) halves[i] = base::FloatToHalf(weights[i]);
      return;
    case WeightType::kInt8:
    case WeightType::kInt4:
    case WeightType::kInt8Groups: break;
  }
  auto* to = static_cast<uint8_t*>(panel);
  for (int64_t k = 0; k < in; k += ScaleRows(type)) {
    const int64_t count = std::min(ScaleRows(type), in - k);
    PackGroup(type, weights + k * kPanel, count, scales ? scales + k / kGroup * kPanel : nullptr,
              to);
    to += ScaledBytes(type, count);
  }
}

void ReadColumn(WeightType type, const void* panel, int64_t in, int64_t c, float* out) {
  const auto* const halves = static_cast<const uint16_t*>(panel);
  switch (type) {
    case WeightType::kFloat32:
      for (int64_t k = 0; k < in; ++k) out[k] = static_cast<const float*>(panel)[k * kPanel + c];
      return;
    case WeightType::kBFloat16:
      for (int64_t k = 0; k < in; ++k) out[k] = base::BrainToFloat(halves[PairAt(k, c)]);
      return;
    case WeightType::kFloat16:
      for (int64_t k = 0; k < in; ++k) out[k] = base::HalfToFloat(halves[k * kPanel + c]);
      return;
    case WeightType::kInt8:
    case WeightType::kInt4:
    case WeightType::kInt8Groups: break;
  }
  const auto* group = static_cast<const uint8_t*>(panel);
  for (int64_t begin = 0; begin < in; begin += ScaleRows(type)) {
    const int64_t count = std::min(ScaleRows(type), in - begin);
    uint16_t half;
    std::memcpy(&half, group + 2 * c, sizeof(half));
    const float scale = base::HalfToFloat(half);
    const uint8_t* const values = group + kScaleBytes;
    for (int64_t k = 0; k < count; ++k) {
      const int q = IsInt4(type) ? (values[Int4At(k, c)] >> (InHighHalf(k) ? 4 : 0) & 15) - 8
                                 : values[Int8At(k, c)] - 128;
      out[begin + k] = scale * static_cast<float>(q);
    }
    group += ScaledBytes(type, count);
  }
}

}  // namespace fastgen::cpu
