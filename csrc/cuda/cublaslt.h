// cuBLASLt for products of many rows, opened when first needed, so that neither the build nor a decode
// step depends on it. Its few functions are declared here: its header is not needed to build.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <tuple>

#include "cuda/check.h"
#include "cuda/types.h"

namespace fastgen::cuda {

class CublasLt {
 public:
  // The library of the CUDA version that the driver serves, or null with the reason in `why`.
  static const CublasLt* Open(std::string* why);

  struct Product {
    const void* w = nullptr;  // [out, in] of `dtype`, rows `ldw` elements apart
    int64_t ldw = 0;
    const void* x = nullptr;  // [rows, in] of `dtype`
    int64_t ldx = 0;
    void* y = nullptr;  // [rows, out] of `out_dtype`
    int64_t ldy = 0;
    int32_t rows = 0, in = 0, out = 0;
    DType dtype = DType::kFloat16;
    DType out_dtype = DType::kFloat16;
    const void* bias = nullptr;  // [out] of `out_dtype`, or null
    bool gelu = false;           // the tanh form
    bool accumulate = false;     // y += instead of y =
  };

  int64_t version() const { return version_; }

 private:
  friend class Multiplier;
  CublasLt() = default;

  void* Find(const char* name);
  void* library_ = nullptr;
  int64_t version_ = 0;
  using Handle = void*;
  int (*create_)(Handle*) = nullptr;
  int (*destroy_)(Handle) = nullptr;
  int (*desc_create_)(void**, int compute, int scale) = nullptr;
  int (*desc_destroy_)(void*) = nullptr;
  int (*desc_set_)(void*, int attribute, const void*, size_t) = nullptr;
  int (*layout_create_)(void**, int type, uint64_t rows, uint64_t columns, int64_t ld) = nullptr;
  int (*layout_destroy_)(void*) = nullptr;
  int (*preference_create_)(void**) = nullptr;
  int (*preference_destroy_)(void*) = nullptr;
  int (*preference_set_)(void*, int attribute, const void*, size_t) = nullptr;
  int (*heuristic_)(Handle, void* desc, void* a, void* b, void* c, void* d, void* preference,
                    int requested, void* results, int* returned) = nullptr;
  int (*matmul_)(Handle, void* desc, const void* alpha, const void* a, void* a_layout,
                 const void* b, void* b_layout, const void* beta, const void* c, void* c_layout,
                 void* d, void* d_layout, const void* algorithm, void* workspace,
                 size_t workspace_size, cudaStream_t stream) = nullptr;
};

// Products on one stream. The algorithm of a matrix is chosen once, for many rows, without split sums,
// and then serves any number of rows: a row's sums have the same order whatever is beside it.
class Multiplier {
 public:
  Multiplier(const CublasLt& library, cudaStream_t stream);
  ~Multiplier();
  Multiplier(const Multiplier&) = delete;
  Multiplier& operator=(const Multiplier&) = delete;

  void Run(const CublasLt::Product& product);

 private:
  // cuBLASLt's description of an algorithm and what it found out about it, by its binary interface.
  struct Heuristic {
    uint64_t algorithm[8];
    size_t workspace;
    int32_t state;
    float waves;
    int32_t reserved[4];
  };
  struct Plan {
    void* desc = nullptr;
    void* w = nullptr;
    Heuristic best = {};
  };
  // in, out, types, epilogue; strides and pointers are those of the rows' layouts or set per call.
  using Key = std::tuple<int32_t, int32_t, int64_t, int32_t, int32_t, bool, bool, bool>;
  Plan Make(const CublasLt::Product& product);
  void* Layout(DType dtype, int64_t rows, int64_t columns, int64_t ld) const;
  void Destroy(Plan* plan);

  const CublasLt& library_;
  const cudaStream_t stream_;
  CublasLt::Handle handle_ = nullptr;
  DeviceMemory workspace_;
  std::map<Key, Plan> plans_;
};

}  // namespace fastgen::cuda
