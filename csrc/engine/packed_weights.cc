#include "engine/packed_weights.h"

#include <algorithm>
#include <mutex>
#include <string>

#include "io/quantized.h"

namespace fastgen::engine {

using cpu::kPanel;

static_assert(cpu::kGroup == io::kScaleGroup, "scales of files are those of panels");
static_assert(cpu::kRun == io::kScaleRun, "and so are runs of int8");

namespace {

int64_t RoundUp(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// Whether a file has the scales of a type of panels. They are kept: found again they might be others.
bool HasScales(const char* scales, cpu::WeightType type) {
  const bool groups = type == cpu::WeightType::kInt8Groups;
  return scales == std::string(cpu::WeightTypeName(groups ? cpu::WeightType::kInt8 : type));
}

// A stored matrix and the first column that it takes in the packed one.
struct ColumnsOf {
  Matrix which;
  int64_t begin;
};

}  // namespace

int64_t PackedMatrix::num_panels() const { return (out + kPanel - 1) / kPanel; }

// Lays everything out twice: once to learn the size, once to hand out addresses.
struct PackedWeights::Carver {
  cpu::WeightType type = cpu::WeightType::kFloat32;
  char* base = nullptr;
  int64_t used = 0;  // bytes

  char* TakeBytes(int64_t bytes) {
    char* at = base ? base + used : nullptr;
    used += RoundUp(bytes, 64);  // cache lines
    return at;
  }
  float* Take(int64_t floats) {
    return reinterpret_cast<float*>(TakeBytes(floats * static_cast<int64_t>(sizeof(float))));
  }
  PackedMatrix TakeMatrix(int64_t in, int64_t out, bool bias) {
    PackedMatrix m;
    m.in = in;
    m.out = out;
    m.type = type;
    m.panel_bytes = cpu::PanelBytes(type, in);
    m.panels = TakeBytes(m.num_panels() * m.panel_bytes);
    if (bias) m.bias = Take(m.num_panels() * kPanel);
    return m;
  }
};

PackedWeights::PackedWeights(const ModelConfig& config, WeightSource& source, cpu::WeightType type,
                             cpu::ThreadPool& pool, const Progress& progress)
    : hidden_(config.hidden_size) {
  const int64_t h = config.hidden_size;
  const int64_t wide = config.intermediate_size;
  layers_.resize(config.num_layers);
  // With 4 bits the ends keep 8: they are what perplexity suffers from, and a small part of a network.
  cpu::WeightType layer_type = type;
  cpu::WeightType end_type = type == cpu::WeightType::kInt4 ? cpu::WeightType::kInt8 : type;
  // Reads all scales of a file that has some.
  if (end_type == cpu::WeightType::kInt8 && HasScales(source.table_scales(), end_type) &&
      !source.table_scales_in_runs()) {
    end_type = cpu::WeightType::kInt8Groups;
  }
  if (layer_type == cpu::WeightType::kInt8 && HasScales(source.matrix_scales(), layer_type) &&
      !source.matrix_scales_in_runs()) {
    layer_type = cpu::WeightType::kInt8Groups;
  }
  Carver carver;
  auto carve = [&] {
    carver.used = 0;
    carver.type = end_type;
    positions_ = carver.Take(config.max_positions * h);
    embedding_ =
        source.head_is_tied() ? PackedMatrix() : carver.TakeMatrix(h, config.vocab_size, false);
    const int64_t step_begin = carver.used;
    carver.type = layer_type;
    for (PackedLayer& layer : layers_) {
      layer.norm1_weight = carver.Take(h);
      layer.norm1_bias = carver.Take(h);
      layer.qkv = carver.TakeMatrix(h, 3 * h, true);
      layer.attention_out = carver.TakeMatrix(h, h, true);
      layer.norm2_weight = carver.Take(h);
      layer.norm2_bias = carver.Take(h);
      layer.feed_forward_in = carver.TakeMatrix(h, wide, true);
      layer.feed_forward_out = carver.TakeMatrix(wide, h, true);
    }
    final_norm_weight_ = carver.Take(h);
    final_norm_bias_ = carver.Take(h);
    carver.type = end_type;
    head_ = carver.TakeMatrix(h, config.vocab_size, false);
    step_bytes_ = static_cast<uint64_t>(carver.used - step_begin);
  };
  carve();
  const auto total = static_cast<uint64_t>(carver.used);
  pages_ = cpu::Pages(total, "the model's weights");
  carver.base = pages_.data();
  carve();
  if (source.head_is_tied()) embedding_ = head_;

  std::lock_guard<std::mutex> lock(pool.mutex());
  uint64_t done = 0;
  auto report = [&](uint64_t bytes) {
    done += bytes;
    if (progress) progress(done, total);
  };
  auto writable = [](const float* p) { return const_cast<float*>(p); };

  // The ends first: their source is the largest single tensor, and it is gone before the packed
  // layers have grown.
  source.ReadPositionRows(0, config.max_positions, writable(positions_));
  source.ReadFinalNorm(final_norm_weight_, final_norm_bias_);
  PackRows(head_, source, pool, false);
  if (!source.head_is_tied()) PackRows(embedding_, source, pool, true);
  source.ReleaseEnds();
  report(total - step_bytes_ + static_cast<uint64_t>(head_.num_panels() * head_.panel_bytes));

  for (int32_t i = 0; i < config.num_layers; ++i) {
    const PackedLayer& layer = layers_[i];
    const auto* layer_begin = reinterpret_cast<const char*>(layer.norm1_weight);
    source.ReadVector(i, Vector::kNorm1Weight, writable(layer.norm1_weight));
    source.ReadVector(i, Vector::kNorm1Bias, writable(layer.norm1_bias));
    source.ReadVector(i, Vector::kNorm2Weight, writable(layer.norm2_weight));
    source.ReadVector(i, Vector::kNorm2Bias, writable(layer.norm2_bias));
    source.ReadVector(i, Vector::kQueryBias, writable(layer.qkv.bias));
    source.ReadVector(i, Vector::kKeyBias, writable(layer.qkv.bias) + h);
    source.ReadVector(i, Vector::kValueBias, writable(layer.qkv.bias) + 2 * h);
    source.ReadVector(i, Vector::kAttentionOutBias, writable(layer.attention_out.bias));
    source.ReadVector(i, Vector::kFeedForwardInBias, writable(layer.feed_forward_in.bias));
    source.ReadVector(i, Vector::kFeedForwardOutBias, writable(layer.feed_forward_out.bias));
    auto pack = [&](const PackedMatrix& matrix, const std::vector<ColumnsOf>& parts) {
      // float32 is read to where it stays, other types by way of a panel of float32.
      const bool direct = matrix.type == cpu::WeightType::kFloat32;
      const bool carried = HasScales(source.matrix_scales(), matrix.type);
      std::vector<std::vector<float>> scratch(pool.threads());
      std::vector<std::vector<uint16_t>> scratch_scales(pool.threads());
      for (auto& floats : scratch) floats.resize(direct ? 0 : matrix.in * kPanel);
      for (auto& scales : scratch_scales) {
        scales.resize(carried ? io::ScaleGroups(matrix.in) * kPanel : 0);
      }
      pool.Run(matrix.num_panels(), 1, [&](int64_t begin, int64_t end, int thread) {
        for (int64_t panel = begin; panel < end; ++panel) {
          char* const packed = const_cast<char*>(matrix.panels) + panel * matrix.panel_bytes;
          std::vector<float>& floats = scratch[thread];
          float* const out = direct ? reinterpret_cast<float*>(packed) : floats.data();
          const int64_t first = panel * kPanel;
          const int64_t last = std::min(first + kPanel, matrix.out);
          std::vector<uint16_t>& scales = scratch_scales[thread];
          if (!direct && last - first < kPanel) {
            std::fill(floats.begin(), floats.end(), 0.0f);
            std::fill(scales.begin(), scales.end(), uint16_t{0});
          }
          for (size_t p = 0; p < parts.size(); ++p) {
            const int64_t part_end = p + 1 < parts.size() ? parts[p + 1].begin : matrix.out;
            const int64_t from = std::max(first, parts[p].begin);
            const int64_t to = std::min(last, part_end);
            if (from >= to) continue;
            source.ReadColumns(i, parts[p].which, from - parts[p].begin, to - parts[p].begin,
                               out + (from - first), kPanel);
            if (carried) {
              source.ReadColumnScales(i, parts[p].which, from - parts[p].begin, to - parts[p].begin,
                                      scales.data() + (from - first), kPanel);
            }
          }
          if (!direct) {
            cpu::PackPanel(matrix.type, out, matrix.in, packed, carried ? scales.data() : nullptr);
          }
        }
      });
    };
    pack(layer.qkv, {{Matrix::kQuery, 0}, {Matrix::kKey, h}, {Matrix::kValue, 2 * h}});
    pack(layer.attention_out, {{Matrix::kAttentionOut, 0}});
    pack(layer.feed_forward_in, {{Matrix::kFeedForwardIn, 0}});
    pack(layer.feed_forward_out, {{Matrix::kFeedForwardOut, 0}});
    source.ReleaseLayer(i);
    const auto* layer_end = reinterpret_cast<const char*>(
        i + 1 < config.num_layers ? layers_[i + 1].norm1_weight : final_norm_weight_);
    report(static_cast<uint64_t>(layer_end - layer_begin));
  }
  if (progress && done < total) progress(total, total);
}

void PackedWeights::PackRows(const PackedMatrix& matrix, WeightSource& source,
                             cpu::ThreadPool& pool, bool embedding) {
  // Row r of the table is column r of the packed matrix.
  // A cache line more than a row: rows 4096 bytes apart would share a few sets of the first cache.
  const int64_t stride = matrix.in + 16;
  const bool direct = matrix.type == cpu::WeightType::kFloat32;
  const bool carried = HasScales(source.table_scales(), matrix.type);
  const int64_t groups = io::ScaleGroups(matrix.in);
  std::vector<std::vector<float>> scratch(pool.threads());
  for (auto& rows : scratch) rows.resize(stride * kPanel + (direct ? 0 : matrix.in * kPanel));
  // As the file has them, [kPanel, groups], and as the panel wants them, [groups, kPanel].
  std::vector<std::vector<uint16_t>> scratch_scales(pool.threads());
  for (auto& scales : scratch_scales) scales.resize(carried ? 2 * groups * kPanel : 0);
  pool.Run(matrix.num_panels(), 1, [&](int64_t begin, int64_t end, int thread) {
    float* rows = scratch[thread].data();
    for (int64_t panel = begin; panel < end; ++panel) {
      const int64_t first = panel * kPanel;
      const int64_t last = std::min(first + kPanel, matrix.out);
      for (int64_t row = first; row < last; ++row) {
        float* out = rows + (row - first) * stride;
        if (embedding) {
          source.ReadEmbeddingRows(row, row + 1, out);
        } else {
          source.ReadHeadRows(row, row + 1, out);
        }
      }
      char* const to = const_cast<char*>(matrix.panels) + panel * matrix.panel_bytes;
      float* const out = direct ? reinterpret_cast<float*>(to) : rows + stride * kPanel;
      for (int64_t k = 0; k < matrix.in; ++k) {
        for (int64_t c = 0; c < last - first; ++c) out[k * kPanel + c] = rows[c * stride + k];
        for (int64_t c = last - first; c < kPanel; ++c) out[k * kPanel + c] = 0.0f;
      }
      uint16_t* scales = nullptr;
      if (carried) {
        uint16_t* const stored = scratch_scales[thread].data();
        scales = stored + groups * kPanel;
        if (embedding) {
          source.ReadEmbeddingScales(first, last, stored);
        } else {
          source.ReadHeadScales(first, last, stored);
        }
        for (int64_t c = 0; c < kPanel; ++c) {
          for (int64_t g = 0; g < groups; ++g) {
            scales[g * kPanel + c] = c < last - first ? stored[c * groups + g] : uint16_t{0};
          }
        }
      }
      if (!direct) cpu::PackPanel(matrix.type, out, matrix.in, to, scales);
    }
  });
}

void PackedWeights::Embed(int32_t token, int32_t position, float* out) const {
  const char* const panel = embedding_.panels + (token / kPanel) * embedding_.panel_bytes;
  const float* const row = positions_ + static_cast<int64_t>(position) * hidden_;
  cpu::ReadColumn(embedding_.type, panel, hidden_, token % kPanel, out);
  for (int64_t i = 0; i < hidden_; ++i) out[i] += row[i];
}

}  // namespace fastgen::engine
