#include "cuda/cublaslt.h"

#include <dlfcn.h>

#include <algorithm>
#include <initializer_list>

namespace fastgen::cuda {
namespace {

// Values of cuBLASLt's enumerations, CUDA 11 and newer.
constexpr int kCompute32F = 68;
enum DataType { kReal32F = 0, kReal16F = 2, kReal16BF = 14 };
enum DescAttribute { kTransA = 3, kTransB = 4, kEpilogue = 7, kBiasPointer = 8 };
enum Epilogue { kDefault = 1, kBias = 4, kGeluTanh = 32, kGeluTanhBias = 36 };
constexpr int32_t kTransposed = 1, kNotTransposed = 0;
enum PreferenceAttribute { kMaxWorkspaceBytes = 1, kReductionSchemeMask = 3 };

constexpr int32_t kPlannedRows = 2048;

int TypeOf(DType dtype) {
  if (dtype == DType::kFloat32) return kReal32F;
  return dtype == DType::kBFloat16 ? kReal16BF : kReal16F;
}

// Of its status codes.
constexpr int kNotInitialized = 1, kAllocFailed = 3, kInvalidValue = 7, kArchMismatch = 8,
              kNotSupported = 15;

fastgen_status StatusOf(int status) {
  if (status == kAllocFailed) return FASTGEN_OUT_OF_MEMORY;
  // The first is what a library says that does not know the device.
  const bool lacks =
      status == kNotInitialized || status == kArchMismatch || status == kNotSupported;
  return lacks ? FASTGEN_UNSUPPORTED : FASTGEN_INTERNAL;
}

}  // namespace

void CublasLt::CheckStatus(int status, const char* what) {
  if (status == 0) return;
  throw base::Error(StatusOf(status), std::string("cuBLASLt: ") + what + " failed with status " +
                                          std::to_string(status));
}

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
  CublasLt::CheckStatus(library_.create_(&handle_), "cublasLtCreate");
}

Multiplier::~Multiplier() {
  for (auto& plan : plans_) Destroy(&plan.second);
  if (handle_) library_.destroy_(handle_);
}

void Multiplier::Destroy(Plan* plan) {
  if (plan->desc) library_.desc_destroy_(plan->desc);
  if (plan->w) library_.layout_destroy_(plan->w);
}

void* Multiplier::Layout(DType dtype, int64_t rows, int64_t columns, int64_t ld) const {
  void* made = nullptr;
  CublasLt::CheckStatus(library_.layout_create_(&made, TypeOf(dtype), static_cast<uint64_t>(rows),
                                                static_cast<uint64_t>(columns), ld),
                        "cublasLtMatrixLayoutCreate");
  return made;
}

// Column-major, which is how cuBLASLt counts: y' [out, rows] = w' transposed [out, in] x' [in, rows].
Multiplier::Plan Multiplier::Make(const CublasLt::Product& product) {
  Plan plan;
  try {
    CublasLt::CheckStatus(library_.desc_create_(&plan.desc, kCompute32F, kReal32F),
                          "cublasLtMatmulDescCreate");
    const auto set = [&](int attribute, const void* value, size_t size) {
      CublasLt::CheckStatus(library_.desc_set_(plan.desc, attribute, value, size),
                            "cublasLtMatmulDescSetAttribute");
    };
    set(kTransA, &kTransposed, sizeof kTransposed);
    set(kTransB, &kNotTransposed, sizeof kNotTransposed);
    const int32_t epilogue = product.gelu ? (product.bias ? kGeluTanhBias : kGeluTanh)
                                          : (product.bias ? kBias : kDefault);
    const int epilogue_status =
        library_.desc_set_(plan.desc, kEpilogue, &epilogue, sizeof epilogue);
    // So an old library says that it has no such epilogue.
    CublasLt::CheckStatus(epilogue_status == kInvalidValue ? kNotSupported : epilogue_status,
                          "cublasLtMatmulDescSetAttribute");
    if (product.bias) set(kBiasPointer, &product.bias, sizeof product.bias);
    plan.w = Layout(product.dtype, product.in, product.out, product.ldw);
    const std::vector<Heuristic> found = Ask(product, plan, kPlannedRows, 1);
    if (found.empty()) CublasLt::CheckStatus(kNotSupported, "finding an algorithm");
    plan.first = found.front();
  } catch (...) {
    Destroy(&plan);
    throw;
  }
  return plan;
}

std::vector<Multiplier::Heuristic> Multiplier::Ask(const CublasLt::Product& product,
                                                   const Plan& plan, int32_t rows,
                                                   int32_t most) const {
  void* preference = nullptr;
  void* x = nullptr;
  void* y = nullptr;
  const auto clean_up = [&] {
    if (preference) library_.preference_destroy_(preference);
    if (x) library_.layout_destroy_(x);
    if (y) library_.layout_destroy_(y);
  };
  std::vector<Heuristic> results(static_cast<size_t>(most));
  int found = 0;
  try {
    x = Layout(product.dtype, product.in, rows, product.ldx);
    y = Layout(product.out_dtype, product.out, rows, product.ldy);
    CublasLt::CheckStatus(library_.preference_create_(&preference),
                          "cublasLtMatmulPreferenceCreate");
    const auto prefer = [&](int attribute, const void* value, size_t size) {
      CublasLt::CheckStatus(library_.preference_set_(preference, attribute, value, size),
                            "cublasLtMatmulPreferenceSetAttribute");
    };
    // Whole sums need no memory, and algorithms that use some to share out tiles clear it every time.
    const uint64_t workspace = 0;
    const uint32_t whole_sums = 0;
    prefer(kMaxWorkspaceBytes, &workspace, sizeof workspace);
    prefer(kReductionSchemeMask, &whole_sums, sizeof whole_sums);
    CublasLt::CheckStatus(library_.heuristic_(handle_, plan.desc, plan.w, x, y, y, preference, most,
                                              results.data(), &found),
                          "cublasLtMatmulAlgoGetHeuristic");
  } catch (...) {
    clean_up();
    throw;
  }
  clean_up();
  results.resize(static_cast<size_t>(found));
  results.erase(std::remove_if(results.begin(), results.end(),
                               [](const Heuristic& result) { return result.state != 0; }),
                results.end());
  return results;
}

int Multiplier::Start(const CublasLt::Product& p, const Plan& plan,
                      const Heuristic& heuristic) const {
  if (p.bias) {
    CublasLt::CheckStatus(library_.desc_set_(plan.desc, kBiasPointer, &p.bias, sizeof p.bias),
                          "cublasLtMatmulDescSetAttribute");
  }
  const float one = 1.0f;
  const float beta = p.accumulate ? 1.0f : 0.0f;
  void* const x = Layout(p.dtype, p.in, p.rows, p.ldx);
  void* y = nullptr;
  int status = kNotSupported;
  try {
    y = Layout(p.out_dtype, p.out, p.rows, p.ldy);
    status = library_.matmul_(handle_, plan.desc, &one, p.w, plan.w, p.x, x, &beta, p.y, y, p.y, y,
                              heuristic.algorithm, nullptr, 0, stream_);
  } catch (...) {
    library_.layout_destroy_(x);
    throw;
  }
  library_.layout_destroy_(x);
  library_.layout_destroy_(y);
  return status;
}

Multiplier::Plan& Multiplier::PlanOf(const CublasLt::Product& p) {
  const Key key{p.in,
                p.out,
                p.ldw,
                static_cast<int32_t>(p.dtype),
                static_cast<int32_t>(p.out_dtype),
                p.bias != nullptr,
                p.gelu,
                p.accumulate};
  auto found = plans_.find(key);
  if (found == plans_.end()) found = plans_.emplace(key, Make(p)).first;
  return found->second;
}

bool Multiplier::Plans(const CublasLt::Product& product) {
  try {
    PlanOf(product);
  } catch (const base::Error& error) {
    if (error.status() != FASTGEN_UNSUPPORTED) throw;
    return false;
  }
  return true;
}

void Multiplier::Run(const CublasLt::Product& p) {
  Plan& plan = PlanOf(p);
  const Heuristic& best = AlgorithmFor(p, &plan);
  int status = Start(p, plan, best);
  // It was tried on another number of rows; the first one has the same bits.
  if (status != 0 && &best != &plan.first) status = Start(p, plan, plan.first);
  CublasLt::CheckStatus(status, "cublasLtMatmul");
}

}  // namespace fastgen::cuda
