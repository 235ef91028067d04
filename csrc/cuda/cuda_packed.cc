// Decode steps whose rows travel between products as 16 bits (LinearRows).
#include <algorithm>

#include "cuda/cuda_device.h"

namespace fastgen::cuda {

PackedRows CudaDevice::Packed(const DeviceMemory& data, int64_t stride, bool parts) const {
  PackedRows rows;
  rows.data = data.as<>();
  rows.stride = stride;
  if (parts) {
    rows.parts = layer_space_.parts.as<float2>();
    rows.part_stride =
        static_cast<int32_t>(RoundUp(config_.hidden_size, kPartColumns) / kPartColumns);
  }
  return rows;
}

LinearRowsArgs CudaDevice::PackedProduct(const Matrix& w, const PackedRows& x, int32_t rows,
                                         Epilogue epilogue) const {
  LinearRowsArgs args = ProductArgs<LinearRowsArgs>(w, rows, epilogue);
  args.x = x;
  return args;
}

CudaDevice::Tokens CudaDevice::StepTokens() const {
  Tokens tokens;
  for (const int32_t index : step_slots_) {
    if (index < 0) continue;
    const HostSlot& slot = slots_[static_cast<size_t>(index)];
    tokens.longest = std::max(tokens.longest, slot.prompt_length + slot.launched);
    tokens.all += slot.prompt_length + slot.launched;
  }
  return tokens;
}

bool CudaDevice::JoinsAttention(int32_t rows) const {
  return joins_attention_ && rows <= kJoinedRows && StepTokens().longest <= kJoinedLength;
}

void CudaDevice::LaunchPackedForward(int32_t rows) {
  const LayerSpace& s = layer_space_;
  const PackedRows x = Packed(s.packed_x, hidden_stride_, true);
  const PackedRows attended = Packed(s.packed_attended, hidden_stride_, false);
  const PackedRows wide = Packed(s.packed_wide, wide_stride_, false);
  const auto fold_in = [this](const FoldedNorm& folded, LinearRowsArgs* args) {
    args->norm_sums = folded.sums;
    args->norm_bias = folded.bias;
    args->eps = config_.layer_norm_eps;
  };
  // Adds to x, which the norm of that weight comes after.
  const auto add = [&](const Matrix& w, const PackedRows& from, const float* next_weight) {
    LinearRowsArgs args = PackedProduct(w, from, rows, Epilogue::kResidual);
    args.y = s.x.as<float>();
    args.ldy = hidden_stride_;
    args.out = x;
    args.out_weight = next_weight;
    return args;
  };

  EmbedArgs embedding = Embedding(s.row_list, rows, s.x);
  embedding.packed = x;
  embedding.weight = weights_->layers().front().norm1.weight;
  embedding.dtype = weight_dtype_;
  embedding.places = s.places.as<RowPlace>();
  const bool joined = JoinsAttention(rows);
  DecodeAttentionArgs attention = Attention(rows);
  PiecesAhead second_layer;
  if (!joined) {
    if (attention.plan) attention.packed = attended.data;
    // The step's first kernel, which starts when all before has ended.
    attention.overlap = false;
    Check(PlanDecodeAttention(attention, stream_), "planning attention");
    attention.layer = 1;
    Check(DecodePiecesAhead(attention, &second_layer), "planning attention");
  }
  embedding.overlap = embedding.beside = !joined && attention.plan;
  Check(Embed(embedding, stream_), "launching the embedding");
  for (int32_t i = 0; i < config_.num_layers; ++i) {
    const LayerWeights& layer = weights_->layers()[static_cast<size_t>(i)];
    LinearRowsArgs qkv = PackedProduct(layer.qkv, x, rows, Epilogue::kQkv);
    fold_in(layer.folded1, &qkv);
    qkv.y = s.q.as<float>();
    qkv.ldy = hidden_stride_;
    qkv.layer = i;
    qkv.places = s.places.as<RowPlace>();
    // The embedding ends after the plan, and the first product lets nobody start before the embedding has
    // ended: what kernels after it read early is there, attention of the first layer included.
    qkv.first = i == 0;
    if (joined) {
      QkvAttentionArgs both;
      both.qkv = qkv;
      // The embedding, which writes them, may still run. It has not overlapped, so that row_list, slots and
      // the cache are as earlier steps have left them.
      if (i == 0) both.qkv.places = nullptr;
      both.packed = attended.data;
      both.ld = attended.stride;
      Check(QkvAttention(both, stream_), "launching attention");
    } else {
      Check(LinearRows(qkv, stream_), "launching the attention's input");
      attention.layer = i;
      attention.overlap = true;
      Check(DecodeAttention(attention, stream_), "launching attention");
      if (!attention.packed) {
        PackRowsArgs pack;
        pack.x = s.attended.as<float>();
        pack.ldx = hidden_stride_;
        pack.rows = rows;
        pack.size = config_.hidden_size;
        pack.dtype = weight_dtype_;
        pack.out = attended;
        Check(PackRows(pack, stream_), "launching the packing of rows");
      }
    }
    LinearRowsArgs out = add(layer.attention_out, attended, layer.norm2.weight);
    out.after_attention = true;
    Check(LinearRows(out, stream_), "launching the attention's output");
    LinearRowsArgs in = PackedProduct(layer.feed_forward_in, x, rows, Epilogue::kGelu);
    fold_in(layer.folded2, &in);
    in.out = wide;
    // Memory has little to do between the attention of two layers.
    if (i + 1 < config_.num_layers) {
      in.ahead = second_layer;
      in.ahead.behind *= i + 1;  // layers lie as far from each other as the second from the first
    }
    Check(LinearRows(in, stream_), "launching the feed-forward block");
    const float* const next = i + 1 < config_.num_layers
                                  ? weights_->layers()[static_cast<size_t>(i) + 1].norm1.weight
                                  : weights_->final_norm().weight;
    Check(LinearRows(add(layer.feed_forward_out, wide, next), stream_),
          "launching the feed-forward block");
  }
  LinearRowsArgs head = PackedProduct(weights_->head(), x, rows, Epilogue::kStore);
  fold_in(weights_->folded_final(), &head);
  head.y = decode_space_.logits.as<float>();
  head.ldy = logits_stride_;
  Check(LinearRows(head, stream_), "launching the head");
}

}  // namespace fastgen::cuda
