// Dot-product peaks of this processor: what threads reach that do nothing else, from registers.
//
//   cpu_peaks <threads>      prints a JSON object: operations per second by type, and by which
//                            instruction; null where the processor has none
//
// `python -m benchmarks.cpu` compiles and runs it. A multiplication and an addition are two
// operations.

#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

namespace {

constexpr int kChains = 16;  // independent sums: more than latency times throughput asks for
constexpr int64_t kRounds = 1 << 22;
constexpr int kPasses = 8;

// Keeps a value in a register, and the compiler from knowing it.
#define OPAQUE(x) asm volatile("" : "+v"(x))

// A function that runs kChains chains of STEP(sum, a, b) for kRounds rounds.
#define CHAINS(NAME, TARGET, VECTOR, ZERO, STEP)        \
  __attribute__((target(TARGET))) void NAME() {         \
    VECTOR sums[kChains];                               \
    _Pragma("GCC unroll 16") for (auto& sum : sums) {   \
      sum = ZERO();                                     \
      OPAQUE(sum);                                      \
    }                                                   \
    VECTOR a = ZERO(), b = ZERO();                      \
    OPAQUE(a);                                          \
    OPAQUE(b);                                          \
    for (int64_t round = 0; round < kRounds; ++round) { \
      _Pragma("GCC unroll 16") for (auto& sum : sums) { \
        sum = STEP(sum, a, b);                          \
        OPAQUE(sum);                                    \
      }                                                 \
    }                                                   \
  }

#define FMA512(sum, a, b) _mm512_fmadd_ps(a, b, sum)
#define FMA256(sum, a, b) _mm256_fmadd_ps(a, b, sum)
#define BF16_512(sum, a, b) _mm512_dpbf16_ps(sum, (__m512bh)(a), (__m512bh)(b))
#define VNNI512(sum, a, b) _mm512_dpbusd_epi32(sum, a, b)
#define VNNI256(sum, a, b) _mm256_dpbusd_avx_epi32(sum, a, b)

CHAINS(Fma512, "avx512f", __m512, _mm512_setzero_ps, FMA512)
CHAINS(Fma256, "avx2,fma", __m256, _mm256_setzero_ps, FMA256)
CHAINS(Bf16, "avx512f,avx512bf16", __m512, _mm512_setzero_ps, BF16_512)
CHAINS(Vnni512, "avx512f,avx512vnni", __m512i, _mm512_setzero_si512, VNNI512)
CHAINS(Vnni256, "avx2,avxvnni", __m256i, _mm256_setzero_si256, VNNI256)

struct Peak {
  const char* instruction;
  void (*run)();
  int operations;  // of one step of one chain
};

// Operations per second of all threads together, the best of some passes.
double Measure(const Peak& peak, int threads) {
  double best = 0.0;
  for (int pass = 0; pass < kPasses; ++pass) {
    std::atomic<int> waiting{threads};
    std::vector<std::thread> pool;
    std::vector<std::chrono::steady_clock::time_point> begins(threads), ends(threads);
    for (int i = 0; i < threads; ++i) {
      pool.emplace_back([&, i] {
        --waiting;
        while (waiting > 0) std::this_thread::yield();
        begins[i] = std::chrono::steady_clock::now();
        peak.run();
        ends[i] = std::chrono::steady_clock::now();
      });
    }
    for (auto& thread : pool) thread.join();
    const std::chrono::duration<double> seconds = *std::max_element(ends.begin(), ends.end()) -
                                                  *std::min_element(begins.begin(), begins.end());
    const double operations = double(kRounds) * kChains * peak.operations * threads;
    best = std::max(best, operations / seconds.count());
  }
  return best;
}

void Print(const char* type, const Peak* peak, int threads, const char* end) {
  if (peak == nullptr) {
    std::printf("\"%s\": null%s", type, end);
    return;
  }
  std::printf("\"%s\": {\"instruction\": \"%s\", \"per_second\": %.6g}%s", type, peak->instruction,
              Measure(*peak, threads), end);
}

}  // namespace

int main(int argc, char** argv) {
  const int threads = argc == 2 ? std::atoi(argv[1]) : 0;
  if (threads < 1) {
    std::fprintf(stderr, "usage: cpu_peaks <threads>\n");
    return 2;
  }
  static const Peak fma512{"vfmadd231ps zmm", Fma512, 2 * 16};
  static const Peak fma256{"vfmadd231ps ymm", Fma256, 2 * 8};
  static const Peak bf16{"vdpbf16ps zmm", Bf16, 2 * 32};
  static const Peak vnni512{"vpdpbusd zmm", Vnni512, 2 * 64};
  static const Peak vnni256{"vpdpbusd ymm", Vnni256, 2 * 32};
  __builtin_cpu_init();
  const bool avx512 = __builtin_cpu_supports("avx512f");
  const Peak* float32 = avx512                                                            ? &fma512
                        : __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? &fma256
                                                                                          : nullptr;
  const Peak* int8 = __builtin_cpu_supports("avx512vnni") ? &vnni512
                     : __builtin_cpu_supports("avxvnni")  ? &vnni256
                                                          : nullptr;
  std::printf("{");
  Print("float32", float32, threads, ", ");
  Print("bfloat16", __builtin_cpu_supports("avx512bf16") ? &bf16 : nullptr, threads, ", ");
  Print("int8", int8, threads, "}\n");
  return 0;
}
