#include "cuda/weights.h"

#include <algorithm>

#include "cuda/loader.h"
#include "cuda/pack.h"

namespace fastgen::cuda {
namespace {

using engine::PluginWeights;

// Lays everything out twice: once to learn the size, once to hand out addresses.
class Carver {
 public:
  explicit Carver(char* base) : base_(base) {}

  char* Take(int64_t bytes) {
    char* at = base_ ? base_ + used_ : nullptr;
    used_ += (bytes + kUnit - 1) / kUnit * kUnit;
    return at;
  }
  const float* TakeFloats(int64_t count) {
    return reinterpret_cast<const float*>(Take(count * static_cast<int64_t>(sizeof(float))));
  }
  Matrix TakeMatrix(DType dtype, int32_t in, int32_t out, bool bias) {
    Matrix m;
    m.dtype = dtype;
    m.in = in;
    m.out = out;
    m.row_bytes = RowBytes(dtype, in);
    m.data = Take(m.row_bytes * out);
    m.scale_stride = ScaleStride(dtype, in);
    if (m.scale_stride > 0) m.scales = Take(int64_t{2} * m.scale_stride * out);
    if (bias) m.bias = TakeFloats(out);
    return m;
  }
  Norm TakeNorm(int32_t size, float eps) {
    Norm norm;
    norm.weight = TakeFloats(size);
    norm.bias = TakeFloats(size);
    norm.eps = eps;
    return norm;
  }
  FoldedNorm TakeFolded(int32_t out) {
    FoldedNorm folded;
    folded.sums = TakeFloats(out);
    folded.bias = TakeFloats(out);
    return folded;
  }
  int64_t used() const { return used_; }

 private:
  static constexpr int64_t kUnit = 256;
  char* const base_;
  int64_t used_ = 0;
};

// A bias that is on the device already, as another type.
void PackBias16(const Matrix& of, DType dtype, const void* to, cudaStream_t stream) {
  if (!to) return;
  Matrix row;
  row.data = to;
  row.dtype = dtype;
  row.in = of.out;
  row.out = 1;
  row.row_bytes = RowBytes(dtype, of.out);
  PackSource from;
  from.data = of.bias;
  from.column_stride = 1;
  Check(PackOutputs(row, 0, 1, from, stream), "packing weights");
}

void Fold(const Matrix& w, const Norm& norm, const FoldedNorm& to, float* most,
          cudaStream_t stream) {
  if (!to.sums) return;
  Check(FoldNorm(w, norm, const_cast<float*>(to.sums), const_cast<float*>(to.bias), most, stream),
        "folding a norm");
}

}  // namespace

Weights::Weights(const engine::PluginConfig& config, const engine::PluginOptions& options,
                 DType dtype, DType activation_dtype, const PluginWeights& source,
                 cudaStream_t stream) {
  const int32_t h = config.hidden_size;
  const int32_t wide = config.intermediate_size;
  layers_.resize(static_cast<size_t>(config.num_layers));
  int64_t step_begin = 0;
  const bool folds = dtype != DType::kFloat32;
  const auto carve = [&](Carver& carver) {
    positions_ = carver.TakeFloats(static_cast<int64_t>(config.max_positions) * h);
    if (!config.head_is_tied) embedding_ = carver.TakeMatrix(dtype, h, config.vocab_size, false);
    step_begin = carver.used();
    for (LayerWeights& layer : layers_) {
      const int64_t layer_begin = carver.used();
      layer.norm1 = carver.TakeNorm(h, config.layer_norm_eps);
      layer.qkv = carver.TakeMatrix(dtype, h, 3 * h, true);
      layer.attention_out = carver.TakeMatrix(dtype, h, h, true);
      layer.norm2 = carver.TakeNorm(h, config.layer_norm_eps);
      layer.feed_forward_in = carver.TakeMatrix(dtype, h, wide, true);
      layer.feed_forward_out = carver.TakeMatrix(dtype, wide, h, true);
      if (activation_dtype != DType::kFloat32) {
        layer.qkv_bias16 = carver.Take(RowBytes(activation_dtype, 3 * h));
        layer.feed_forward_in_bias16 = carver.Take(RowBytes(activation_dtype, wide));
      }
      if (folds) {
        layer.folded1 = carver.TakeFolded(3 * h);
        layer.folded2 = carver.TakeFolded(wide);
      }
      layer_bytes_ = carver.used() - layer_begin;
    }
    final_norm_ = carver.TakeNorm(h, config.layer_norm_eps);
    head_ = carver.TakeMatrix(dtype, h, config.vocab_size, false);
    if (folds) folded_final_ = carver.TakeFolded(config.vocab_size);
  };
  Carver size(nullptr);
  carve(size);
  const auto total = static_cast<uint64_t>(size.used());
  memory_ = DeviceMemory(static_cast<size_t>(total), "the model's weights");
  Check(cudaMemsetAsync(memory_.as<>(), 0, memory_.size(), stream), "clearing device memory");
  Carver carver(memory_.as<>());
  carve(carver);
  step_bytes_ = total - static_cast<uint64_t>(step_begin);
  if (config.head_is_tied) embedding_ = head_;

  const std::unique_ptr<Loader> made = MakeLoader(config, options, source, stream);
  Loader& loader = *made;
  uint64_t done = 0;
  const auto report = [&](uint64_t bytes) {
    done = std::min(done + bytes, total);
    CheckReader(source.report_progress(source.self, done, total));
  };
  loader.Positions(config.max_positions, h, positions_);
  loader.FinalNorm(final_norm_, h);
  loader.Rows(engine::End::kHead, head_);
  Fold(head_, final_norm_, folded_final_, nullptr, stream);
  if (!config.head_is_tied) loader.Rows(engine::End::kEmbedding, embedding_);
  CheckReader(source.release_ends(source.self));
  report(static_cast<uint64_t>(step_begin + head_.row_bytes * head_.out));

  const DeviceMemory most(sizeof(float), "loading the weights");
  Check(cudaMemsetAsync(most.as<>(), 0, most.size(), stream), "clearing device memory");
  using engine::Vector;
  for (int32_t i = 0; i < config.num_layers; ++i) {
    const LayerWeights& layer = layers_[static_cast<size_t>(i)];
    loader.Vector(i, Vector::kNorm1Weight, h, layer.norm1.weight);
    loader.Vector(i, Vector::kNorm1Bias, h, layer.norm1.bias);
    loader.Vector(i, Vector::kNorm2Weight, h, layer.norm2.weight);
    loader.Vector(i, Vector::kNorm2Bias, h, layer.norm2.bias);
    loader.Vector(i, Vector::kQueryBias, h, layer.qkv.bias);
    loader.Vector(i, Vector::kKeyBias, h, layer.qkv.bias + h);
    loader.Vector(i, Vector::kValueBias, h, layer.qkv.bias + 2 * static_cast<int64_t>(h));
    loader.Vector(i, Vector::kAttentionOutBias, h, layer.attention_out.bias);
    loader.Vector(i, Vector::kFeedForwardInBias, wide, layer.feed_forward_in.bias);
    loader.Vector(i, Vector::kFeedForwardOutBias, h, layer.feed_forward_out.bias);
    PackBias16(layer.qkv, activation_dtype, layer.qkv_bias16, stream);
    PackBias16(layer.feed_forward_in, activation_dtype, layer.feed_forward_in_bias16, stream);
    loader.Columns(i, engine::Matrix::kQuery, h, layer.qkv, 0);
    loader.Columns(i, engine::Matrix::kKey, h, layer.qkv, h);
    loader.Columns(i, engine::Matrix::kValue, h, layer.qkv, 2 * h);
    loader.Columns(i, engine::Matrix::kAttentionOut, h, layer.attention_out, 0);
    loader.Columns(i, engine::Matrix::kFeedForwardIn, wide, layer.feed_forward_in, 0);
    loader.Columns(i, engine::Matrix::kFeedForwardOut, h, layer.feed_forward_out, 0);
    Fold(layer.qkv, layer.norm1, layer.folded1, most.as<float>(), stream);
    Fold(layer.feed_forward_in, layer.norm2, layer.folded2, most.as<float>(), stream);
    CheckReader(source.release_layer(source.self, i));
    report(static_cast<uint64_t>(layer.qkv.row_bytes * layer.qkv.out +
                                 layer.attention_out.row_bytes * layer.attention_out.out +
                                 layer.feed_forward_in.row_bytes * layer.feed_forward_in.out +
                                 layer.feed_forward_out.row_bytes * layer.feed_forward_out.out));
  }
  Check(cudaMemcpyAsync(&most_normed_, most.as<>(), most.size(), cudaMemcpyDeviceToHost, stream),
        "loading the weights");
  Check(cudaStreamSynchronize(stream), "loading the weights");
  if (done < total) report(total - done);
}

DType ParseWeightType(const std::string& name) {
  for (const DType dtype :
       {DType::kFloat32, DType::kFloat16, DType::kBFloat16, DType::kInt8, DType::kInt4}) {
    if (name == TypeName(dtype)) return dtype;
  }
  throw base::Error(FASTGEN_UNSUPPORTED,
                    "weight_dtype=" + name +
                        " is not one that device=cuda has: float32, float16, bfloat16, int8, int4");
}

const char* TypeName(DType dtype) {
  switch (dtype) {
    case DType::kFloat32: return "float32";
    case DType::kFloat16: return "float16";
    case DType::kBFloat16: return "bfloat16";
    case DType::kInt8: return "int8";
    case DType::kInt4: return "int4";
  }
  return "?";
}

}  // namespace fastgen::cuda
