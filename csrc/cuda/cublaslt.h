// cuBLASLt for products of many rows, opened when first needed, so that neither the build nor a decode
// step depends on it. Its few functions are declared here: its header is not needed to build.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <tuple>
#include <vector>

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
  // Throws unless the status is that of success.
  static void CheckStatus(int status, const char* what);

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

// Products on one stream. What the first algorithm for a matrix gives, chosen for many rows and without
// split sums, are the bits of its products: with the same algorithm a row's sums have the same order
// whatever is beside it. Of 16-bit types, other algorithms serve fewer rows or more if they are faster
// and, tried on so many rows of operands that show the order (cublaslt_trial.h), give the same bits: the
// time of a trial changes how fast products are and nothing else.
class Multiplier {
 public:
  Multiplier(const CublasLt& library, cudaStream_t stream);
  ~Multiplier();
  Multiplier(const Multiplier&) = delete;
  Multiplier& operator=(const Multiplier&) = delete;

  // Whether the library has such products, of any number of rows, on this device: old ones lack the GELU,
  // and old devices bfloat16.
  bool Plans(const CublasLt::Product& product);
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
  static constexpr int32_t kFirstRows = 128;
  static constexpr int32_t kClasses = 6;  // up to kFirstRows rows, up to twice as many, and so on
  struct Plan {
    void* desc = nullptr;
    void* w = nullptr;
    Heuristic first = {};
    Heuristic best[kClasses] = {};
    bool tried[kClasses] = {};
    int32_t skip[kClasses] = {};  // products before a trial that found no memory is made again
  };
  // in, out, types, epilogue; strides and pointers are those of the rows' layouts or set per call.
  using Key = std::tuple<int32_t, int32_t, int64_t, int32_t, int32_t, bool, bool, bool>;
  Plan& PlanOf(const CublasLt::Product& product);
  Plan Make(const CublasLt::Product& product);
  // Algorithms for so many rows, the best guess first: at most `most`.
  std::vector<Heuristic> Ask(const CublasLt::Product& product, const Plan& plan, int32_t rows,
                             int32_t most) const;
  // Which algorithm serves the product; tries them when it is the first one of so many rows.
  const Heuristic& AlgorithmFor(const CublasLt::Product& product, Plan* plan);
  Heuristic Try(const CublasLt::Product& product, const Plan& plan, int32_t rows);
  // Launches the product; returns cuBLASLt's status.
  int Start(const CublasLt::Product& product, const Plan& plan, const Heuristic& heuristic) const;
  void* Layout(DType dtype, int64_t rows, int64_t columns, int64_t ld) const;
  void Destroy(Plan* plan);

  const CublasLt& library_;
  const cudaStream_t stream_;
  CublasLt::Handle handle_ = nullptr;
  std::map<Key, Plan> plans_;
};

}  // namespace fastgen::cuda
