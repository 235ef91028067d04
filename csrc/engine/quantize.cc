#include "engine/quantize.h"

#include <algorithm>
#include <cstring>
#include <mutex>

#include "base/half.h"
#include "io/quantized.h"

namespace fastgen::engine {
namespace {

using cpu::kGroup;
using cpu::kPanel;
using cpu::kRun;
using cpu::WeightType;

// Inputs of a panel's outputs that share their scales, [inputs, kPanel].
struct Block {
  float weights[kRun * kPanel];
  uint16_t scales[kPanel];
  int8_t whole[kRun * kPanel];
};

void To16Bits(const io::TensorView& tensor, WeightType type, int64_t row, uint16_t* out) {
  float weights[256];
  const int64_t columns = tensor.shape[1];
  for (int64_t begin = 0; begin < columns; begin += 256) {
    const int64_t count = std::min<int64_t>(256, columns - begin);
    io::ToFloat32(tensor.dtype, tensor.At(row, begin), count, weights);
    for (int64_t i = 0; i < count; ++i) {
      const float w = weights[i];
      out[begin + i] = type == WeightType::kFloat16 ? base::FloatToHalf(w) : base::FloatToBrain(w);
    }
  }
}

// Outputs [first, last) of a table, whose inputs lie in a row.
void QuantizeOutputs(const io::TensorView& table, int64_t first, int64_t last, int8_t* values,
                     uint16_t* scales) {
  const int64_t in = table.shape[1], groups = io::ScaleGroups(in), count = last - first;
  Block block;
  float row[kRun];
  for (int64_t begin = 0; begin < in; begin += kRun) {
    const int64_t inputs = std::min(kRun, in - begin);
    std::fill(block.weights, block.weights + kRun * kPanel, 0.0f);
    for (int64_t c = 0; c < count; ++c) {
      io::ToFloat32(table.dtype, table.At(first + c, begin), inputs, row);
      for (int64_t k = 0; k < inputs; ++k) block.weights[k * kPanel + c] = row[k];
    }
    cpu::FindScales(WeightType::kInt8, block.weights, inputs, block.scales);
    cpu::Quantize(WeightType::kInt8, block.weights, inputs, block.scales, block.whole);
    for (int64_t c = 0; c < count; ++c) {
      uint16_t* const to_scales = scales + (first + c) * groups;
      std::fill(to_scales + begin / kGroup, to_scales + io::ScaleGroups(begin + inputs),
                block.scales[c]);
      int8_t* const to = values + (first + c) * in + begin;
      for (int64_t k = 0; k < inputs; ++k) to[k] = block.whole[k * kPanel + c];
    }
  }
}

// Inputs of all outputs of a matrix [in, out], from `begin` on, that share their scales.
void QuantizeInputs(const io::TensorView& matrix, WeightType type, int64_t begin, void* values,
                    uint16_t* scales) {
  const int64_t in = matrix.shape[0], out = matrix.shape[1];
  const int64_t inputs = std::min(cpu::ScaleRows(type), in - begin);
  Block block;
  for (int64_t first = 0; first < out; first += kPanel) {
    const int64_t count = std::min(kPanel, out - first);
    std::fill(block.weights, block.weights + kRun * kPanel, 0.0f);
    for (int64_t k = 0; k < inputs; ++k) {
      io::ToFloat32(matrix.dtype, matrix.At(begin + k, first), count, block.weights + k * kPanel);
    }
    cpu::FindScales(type, block.weights, inputs, block.scales);
    cpu::Quantize(type, block.weights, inputs, block.scales, block.whole);
    for (int64_t group = begin / kGroup; group < io::ScaleGroups(begin + inputs); ++group) {
      std::copy(block.scales, block.scales + count, scales + group * out + first);
    }
    for (int64_t k = 0; k < inputs; ++k) {
      const int8_t* const whole = block.whole + k * kPanel;
      if (type == WeightType::kInt8) {
        std::copy(whole, whole + count, static_cast<int8_t*>(values) + (begin + k) * out + first);
        continue;
      }
      if (k % 2 != 0) continue;
      auto* const pairs = static_cast<uint8_t*>(values) + (begin + k) / 2 * out + first;
      for (int64_t c = 0; c < count; ++c) {
        const int high = k + 1 < inputs ? whole[kPanel + c] : 0;
        pairs[c] = static_cast<uint8_t>((whole[c] + 8) | (high + 8) << 4);
      }
    }
  }
}

}  // namespace

void QuantizeMatrix(const io::TensorView& tensor, bool is_table, WeightType type,
                    cpu::ThreadPool& pool, void* values, uint16_t* scales) {
  const int64_t rows = tensor.shape[0], columns = tensor.shape[1];
  std::lock_guard<std::mutex> lock(pool.mutex());
  if (type == WeightType::kFloat16 || type == WeightType::kBFloat16) {
    pool.Run(rows, 16, [&](int64_t begin, int64_t end, int) {
      for (int64_t row = begin; row < end; ++row) {
        To16Bits(tensor, type, row, static_cast<uint16_t*>(values) + row * columns);
      }
    });
  } else if (is_table) {
    pool.Run((rows + kPanel - 1) / kPanel, 1, [&](int64_t begin, int64_t end, int) {
      for (int64_t panel = begin; panel < end; ++panel) {
        QuantizeOutputs(tensor, panel * kPanel, std::min(rows, (panel + 1) * kPanel),
                        static_cast<int8_t*>(values), scales);
      }
    });
  } else {
    const int64_t inputs = cpu::ScaleRows(type);
    pool.Run((rows + inputs - 1) / inputs, 1, [&](int64_t begin, int64_t end, int) {
      for (int64_t part = begin; part < end; ++part) {
        QuantizeInputs(tensor, type, part * inputs, values, scales);
      }
    });
  }
}

}  // namespace fastgen::engine
