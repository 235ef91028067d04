// Which of cuBLASLt's algorithms serves a matrix and a number of rows: the fastest, by trial, of those
// that give the bits of the matrix's first.
#include <algorithm>

#include "cuda/checksum.h"
#include "cuda/cublaslt.h"
#include "cuda/cublaslt_trial.h"

namespace fastgen::cuda {
namespace {

constexpr int32_t kCandidates = 8;
constexpr int kRounds = 3;    // the best one counts
constexpr int kProducts = 3;  // of a candidate in a round
// What another algorithm must gain: a trial is not exact, nor is it the product among others.
constexpr float kGain = 0.02f;

// Products before memory is asked for again: a trial that finds none has made the device wait.
constexpr int32_t kSkipped = 4096;

// What the outputs hold before a trial, and the bias: as any type a finite number other than zero, so
// that the order in which they and a product are added shows.
constexpr int kFilling = 0x3c;

struct Events {
  cudaEvent_t begin = nullptr, end = nullptr;
  Events() {
    Check(cudaEventCreate(&begin), "creating an event");
    const cudaError_t status = cudaEventCreate(&end);
    if (status != cudaSuccess) cudaEventDestroy(begin);
    Check(status, "creating an event");
  }
  ~Events() {
    cudaEventDestroy(begin);
    cudaEventDestroy(end);
  }
  Events(const Events&) = delete;
  Events& operator=(const Events&) = delete;
};

}  // namespace

const Multiplier::Heuristic& Multiplier::AlgorithmFor(const CublasLt::Product& product,
                                                      Plan* plan) {
  if (product.dtype == DType::kFloat32) return plan->first;
  int32_t at = 0;
  while (at + 1 < kClasses && product.rows > kFirstRows << at) ++at;
  if (!plan->tried[at]) {
    if (plan->skip[at] > 0) {
      --plan->skip[at];
      return plan->first;
    }
    try {
      plan->best[at] = Try(product, *plan, kFirstRows << at);
    } catch (const base::Error& error) {
      // Of so few rows or so many the first one may be all there is. Memory may be there another time.
      const bool lacks = error.status() == FASTGEN_UNSUPPORTED;
      if (!lacks && error.status() != FASTGEN_OUT_OF_MEMORY) throw;
      plan->tried[at] = lacks;
      plan->best[at] = plan->first;
      plan->skip[at] = kSkipped;
      return plan->first;
    }
    plan->tried[at] = true;
  }
  return plan->best[at];
}

Multiplier::Heuristic Multiplier::Try(const CublasLt::Product& product, const Plan& plan,
                                      int32_t rows) {
  std::vector<Heuristic> candidates = Ask(product, plan, rows, kCandidates);
  candidates.insert(candidates.begin(), plan.first);

  CublasLt::Product trial = product;
  trial.rows = rows;
  const size_t element = SizeOf(product.dtype), out_element = SizeOf(product.out_dtype);
  const size_t out_bytes =
      static_cast<size_t>(rows) * static_cast<size_t>(product.ldy) * out_element;
  const size_t bias_bytes = static_cast<size_t>(product.out) * out_element;
  const char* const what = "the trial of a product";
  const DeviceMemory w(static_cast<size_t>(product.out * product.ldw) * element, what);
  const DeviceMemory x(static_cast<size_t>(rows * product.ldx) * element, what);
  const DeviceMemory bias(bias_bytes, what);
  const DeviceMemory expected(out_bytes, what), y(out_bytes, what);
  const DeviceMemory differ(candidates.size() * sizeof(int32_t), what);
  TrialOperandsArgs operands;
  operands.dtype = product.dtype;
  operands.in = product.in;
  operands.w = w.as<>();
  operands.ldw = product.ldw;
  operands.out = product.out;
  operands.x = x.as<>();
  operands.ldx = product.ldx;
  operands.rows = rows;
  Check(FillTrialOperands(operands, stream_), what);
  trial.w = w.as<>();
  trial.x = x.as<>();
  if (product.bias) {
    Check(cudaMemsetAsync(bias.as<>(), kFilling, bias_bytes, stream_), what);
    trial.bias = bias.as<>();
  }
  Check(cudaMemsetAsync(differ.as<>(), 0, differ.size(), stream_), what);
  const auto fill = [&](const DeviceMemory& outputs) {
    Check(cudaMemsetAsync(outputs.as<>(), kFilling, out_bytes, stream_), what);
    trial.y = outputs.as<>();
  };

  fill(expected);
  // It may serve the product's rows all the same.
  if (Start(trial, plan, plan.first) != 0) return plan.first;
  std::vector<int32_t> differs(candidates.size(), 0);
  std::vector<bool> runs(candidates.size(), true);
  for (size_t i = 1; i < candidates.size(); ++i) {
    fill(y);
    runs[i] = Start(trial, plan, candidates[i]) == 0;
    if (!runs[i]) continue;
    Check(Compare(expected.as<>(), y.as<>(), out_bytes, differ.as<int32_t>() + i, stream_), what);
  }
  Check(cudaMemcpyAsync(differs.data(), differ.as<>(), differ.size(), cudaMemcpyDeviceToHost,
                        stream_),
        what);
  Check(cudaStreamSynchronize(stream_), what);

  const Events events;
  std::vector<float> times(candidates.size(), 0.0f);
  for (int round = 0; round < kRounds; ++round) {
    for (size_t i = 0; i < candidates.size(); ++i) {
      if (!runs[i] || differs[i] != 0) continue;
      fill(y);  // keeps the device busy until the first product is there
      Check(cudaEventRecord(events.begin, stream_), what);
      for (int n = 0; n < kProducts; ++n) {
        CublasLt::CheckStatus(Start(trial, plan, candidates[i]), "cublasLtMatmul");
      }
      Check(cudaEventRecord(events.end, stream_), what);
      Check(cudaEventSynchronize(events.end), what);
      float ms = 0.0f;
      Check(cudaEventElapsedTime(&ms, events.begin, events.end), what);
      times[i] = round == 0 ? ms : std::min(times[i], ms);
    }
  }
  size_t best = 0;
  for (size_t i = 1; i < candidates.size(); ++i) {
    if (runs[i] && differs[i] == 0 && times[i] < (1.0f - kGain) * times[best]) best = i;
  }
  return candidates[best];
}

}  // namespace fastgen::cuda
