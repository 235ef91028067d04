#include "cuda/cublaslt.h"

#include <dlfcn.h>

#include <initializer_list>

namespace fastgen::cuda {
namespace {

// Values of cuBLASLt's enumerations, CUDA 11 and newer.
constexpr int kCompute32F = 68;
enum DataType { kReal32F = 0, kReal16F = 2, kReal16BF = 14 };
enum DescAttribute { kTransA = 3, kTransB = 4, kEpilogue = 7, kBiasPointer = 8 };
enum Epilogue { kDefault = 1, kBias = 4, kGeluTanh = 32, kGeluTanhBias = 36 };
constexpr int32_t kTransposed = 1, kNotTransposed = 0;
constexpr int kMaxWorkspaceBytes = 1;  // of the preference attributes

constexpr size_t kWorkspaceBytes = size_t{32} << 20;
// Shapes of ragged prompts hardly ever come again: their plans are not kept for ever.
constexpr size_t kMostPlans = 512;

int TypeOf(DType dtype) {
  if (dtype == DType::kFloat32) return kReal32F;
  return dtype == DType::kBFloat16 ? kReal16BF : kReal16F;
}

void CheckStatus(int status, const char* what) {
  if (status != 0) {
    throw base::Error(
        status == 3 ? FASTGEN_OUT_OF_MEMORY : FASTGEN_INTERNAL,
        std::string("cuBLASLt: ") + what + " failed with status " + std::to_string(status));
  }
}

}  // namespace

void* CublasLt::Find(const char* name) { return dlsym(library_, name); }

const CublasLt* CublasLt::Open(std::string* why) {
  struct Opened {
    CublasLt library;
    bool usable = false;
    std::string why;
  };
  static const Opened* const opened = [] {
    auto* o = new Opened;  // never closed, so never freed
    CublasLt& lt = o->library;
    int driver = 0;
    cudaDriverGetVersion(&driver);
    for (const int major : {13, 12, 11}) {
      if (major > driver / 1000) continue;
      const std::string name = "libcublasLt.so." + std::to_string(major);
      lt.library_ = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL);
      if (lt.library_) break;
      o->why = name + " cannot be opened";
    }
    if (!lt.library_) return o;
    const auto get_version = reinterpret_cast<size_t (*)()>(lt.Find("cublasLtGetVersion"));
    bool all = get_version != nullptr;
    const auto find = [&](auto* function, const char* name) {
      using Function = std::remove_reference_t<decltype(*function)>;
      *function = reinterpret_cast<Function>(lt.Find(name));
      all = all && *function;
    };
    find(&lt.create_, "cublasLtCreate");
    find(&lt.destroy_, "cublasLtDestroy");
    find(&lt.desc_create_, "cublasLtMatmulDescCreate");
    find(&lt.desc_destroy_, "cublasLtMatmulDescDestroy");
    find(&lt.desc_set_, "cublasLtMatmulDescSetAttribute");
    find(&lt.layout_create_, "cublasLtMatrixLayoutCreate");
    find(&lt.layout_destroy_, "cublasLtMatrixLayoutDestroy");
    find(&lt.preference_create_, "cublasLtMatmulPreferenceCreate");
    find(&lt.preference_destroy_, "cublasLtMatmulPreferenceDestroy");
    find(&lt.preference_set_, "cublasLtMatmulPreferenceSetAttribute");
    find(&lt.heuristic_, "cublasLtMatmulAlgoGetHeuristic");
    find(&lt.matmul_, "cublasLtMatmul");
    if (!all) {
      o->why = "libcublasLt lacks a function that is needed";
      return o;
    }
    lt.version_ = static_cast<int64_t>(get_version());
    o->usable = true;
    return o;
  }();
  if (why) *why = opened->why;
  return opened->usable ? &opened->library : nullptr;
}

Multiplier::Multiplier(const CublasLt& library, cudaStream_t stream)
    : library_(library), stream_(stream) {
  CheckStatus(library_.create_(&handle_), "cublasLtCreate");
  workspace_ = DeviceMemory(kWorkspaceBytes, "the workspace of cuBLASLt");
}

Multiplier::~Multiplier() {
  for (auto& plan : plans_) Destroy(&plan.second);
  if (handle_) library_.destroy_(handle_);
}

void Multiplier::Destroy(Plan* plan) {
  if (plan->desc) library_.desc_destroy_(plan->desc);
  for (void* layout : {plan->w, plan->x, plan->y}) {
    if (layout) library_.layout_destroy_(layout);
  }
}

// Column-major, which is how cuBLASLt counts: y' [out, rows] = w' transposed [out, in] x' [in, rows].
Multiplier::Plan Multiplier::Make(const CublasLt::Product& product) {
  Plan plan;
  void* preference = nullptr;
  try {
    CheckStatus(library_.desc_create_(&plan.desc, kCompute32F, kReal32F),
                "cublasLtMatmulDescCreate");
    const auto set = [&](int attribute, const void* value, size_t size) {
      CheckStatus(library_.desc_set_(plan.desc, attribute, value, size),
                  "cublasLtMatmulDescSetAttribute");
    };
    set(kTransA, &kTransposed, sizeof kTransposed);
    set(kTransB, &kNotTransposed, sizeof kNotTransposed);
    const int32_t epilogue = product.gelu ? (product.bias ? kGeluTanhBias : kGeluTanh)
                                          : (product.bias ? kBias : kDefault);
    set(kEpilogue, &epilogue, sizeof epilogue);
    if (product.bias) set(kBiasPointer, &product.bias, sizeof product.bias);
    const auto layout = [&](void** made, DType dtype, int64_t rows, int64_t columns, int64_t ld) {
      CheckStatus(library_.layout_create_(made, TypeOf(dtype), static_cast<uint64_t>(rows),
                                          static_cast<uint64_t>(columns), ld),
                  "cublasLtMatrixLayoutCreate");
    };
    layout(&plan.w, product.dtype, product.in, product.out, product.ldw);
    layout(&plan.x, product.dtype, product.in, product.rows, product.ldx);
    layout(&plan.y, product.out_dtype, product.out, product.rows, product.ldy);
    CheckStatus(library_.preference_create_(&preference), "cublasLtMatmulPreferenceCreate");
    const uint64_t workspace = kWorkspaceBytes;
    CheckStatus(
        library_.preference_set_(preference, kMaxWorkspaceBytes, &workspace, sizeof workspace),
        "cublasLtMatmulPreferenceSetAttribute");
    int found = 0;
    CheckStatus(library_.heuristic_(handle_, plan.desc, plan.w, plan.x, plan.y, plan.y, preference,
                                    1, &plan.best, &found),
                "cublasLtMatmulAlgoGetHeuristic");
    if (found < 1) CheckStatus(15, "finding an algorithm");
  } catch (...) {
    if (preference) library_.preference_destroy_(preference);
    Destroy(&plan);
    throw;
  }
  library_.preference_destroy_(preference);
  return plan;
}

void Multiplier::Run(const CublasLt::Product& p) {
  const Key key{p.rows,
                p.in,
                p.out,
                p.ldw,
                p.ldx,
                p.ldy,
                static_cast<int32_t>(p.dtype),
                static_cast<int32_t>(p.out_dtype),
                p.bias != nullptr,
                p.gelu,
                p.accumulate};
  auto found = plans_.find(key);
  if (found == plans_.end()) {
    if (plans_.size() >= kMostPlans) {
      for (auto& plan : plans_) Destroy(&plan.second);
      plans_.clear();
    }
    found = plans_.emplace(key, Make(p)).first;
  }
  Plan& plan = found->second;
  if (p.bias) {
    CheckStatus(library_.desc_set_(plan.desc, kBiasPointer, &p.bias, sizeof p.bias),
                "cublasLtMatmulDescSetAttribute");
  }
  const float one = 1.0f;
  const float beta = p.accumulate ? 1.0f : 0.0f;
  CheckStatus(
      library_.matmul_(handle_, plan.desc, &one, p.w, plan.w, p.x, plan.x, &beta, p.y, plan.y, p.y,
                       plan.y, plan.best.algorithm, workspace_.as<>(), workspace_.size(), stream_),
      "cublasLtMatmul");
}

}  // namespace fastgen::cuda
