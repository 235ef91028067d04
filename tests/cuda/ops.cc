// The kernel launchers of csrc/cuda as C functions, for the op table in Python: structures go by
// pointer, device pointers and streams are those of any framework.
#include "cuda/kernels.h"
#include "cuda/pack.h"
#include "cuda/persistent.h"

#define FASTGEN_OP(name, Args)                                             \
  extern "C" __attribute__((visibility("default"))) int fastgen_op_##name( \
      const fastgen::cuda::Args* args, void* stream)

FASTGEN_OP(linear, LinearArgs) {
  return fastgen::cuda::Linear(*args, static_cast<cudaStream_t>(stream));
}
FASTGEN_OP(linear_rows, LinearRowsArgs) {
  return fastgen::cuda::LinearRows(*args, static_cast<cudaStream_t>(stream));
}
FASTGEN_OP(qkv_attention, QkvAttentionArgs) {
  return fastgen::cuda::QkvAttention(*args, static_cast<cudaStream_t>(stream));
}
FASTGEN_OP(pack_rows, PackRowsArgs) {
  return fastgen::cuda::PackRows(*args, static_cast<cudaStream_t>(stream));
}
FASTGEN_OP(embed, EmbedArgs) {
  return fastgen::cuda::Embed(*args, static_cast<cudaStream_t>(stream));
}
FASTGEN_OP(layer_norm, LayerNormArgs) {
  return fastgen::cuda::LayerNorm(*args, static_cast<cudaStream_t>(stream));
}
FASTGEN_OP(saturate, SaturateArgs) {
  return fastgen::cuda::Saturate(*args, static_cast<cudaStream_t>(stream));
}
FASTGEN_OP(store_qkv, QkvArgs) {
  return fastgen::cuda::StoreQkv(*args, static_cast<cudaStream_t>(stream));
}
FASTGEN_OP(decode_attention, DecodeAttentionArgs) {
  return fastgen::cuda::DecodeAttention(*args, static_cast<cudaStream_t>(stream));
}
FASTGEN_OP(plan_decode_attention, DecodeAttentionArgs) {
  return fastgen::cuda::PlanDecodeAttention(*args, static_cast<cudaStream_t>(stream));
}
FASTGEN_OP(prefill_attention, PrefillAttentionArgs) {
  return fastgen::cuda::PrefillAttention(*args, static_cast<cudaStream_t>(stream));
}
FASTGEN_OP(sample, SampleArgs) {
  return fastgen::cuda::Sample(*args, static_cast<cudaStream_t>(stream));
}

extern "C" __attribute__((visibility("default"))) int fastgen_op_dequantize(
    const fastgen::cuda::Matrix* w, int dtype, void* out, int64_t ldo, void* stream) {
  return fastgen::cuda::Dequantize(*w, static_cast<fastgen::cuda::DType>(dtype), out, ldo,
                                   static_cast<cudaStream_t>(stream));
}

extern "C" __attribute__((visibility("default"))) size_t fastgen_op_sample_workspace(int rows,
                                                                                     int vocab) {
  return fastgen::cuda::SampleWorkspaceBytes(rows, vocab);
}

extern "C" __attribute__((visibility("default"))) int fastgen_op_rows_supported(int dtype,
                                                                                int columns,
                                                                                bool* supported) {
  return fastgen::cuda::LinearRowsSupported(static_cast<fastgen::cuda::DType>(dtype), columns,
                                            supported);
}

extern "C" __attribute__((visibility("default"))) int fastgen_op_decode_plan_bytes(
    int rows, const fastgen::cuda::CacheLayout* cache, size_t* bytes) {
  return fastgen::cuda::DecodePlanBytes(rows, *cache, bytes);
}

FASTGEN_OP(persistent_step, PersistentArgs) {
  return fastgen::cuda::PersistentStep(*args, static_cast<cudaStream_t>(stream));
}

extern "C" __attribute__((visibility("default"))) int fastgen_op_persistent_blocks(
    const fastgen::cuda::PersistentArgs* args) {
  return fastgen::cuda::PersistentBlocks(*args);
}

extern "C" __attribute__((visibility("default"))) size_t
fastgen_op_persistent_exchange(const fastgen::cuda::PersistentArgs* args) {
  return fastgen::cuda::PersistentExchangeBytes(*args);
}

extern "C" __attribute__((visibility("default"))) int fastgen_op_fold_norm(
    const fastgen::cuda::Matrix* w, const fastgen::cuda::Norm* norm, float* sums, float* bias,
    float* most, void* stream) {
  return fastgen::cuda::FoldNorm(*w, *norm, sums, bias, most, static_cast<cudaStream_t>(stream));
}
