// Speed of the products of the op table, one thread: GOP/s (two for a multiplication and an addition)
// and GB/s of weights, by processor time of the thread, so that other work on the machine matters less.
//
//   kernel_speed [in out [rows ...]]      default: 1024 1024 1 8 96
#include <time.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <random>

#include "kernel_cases.h"

namespace {

double ThreadSeconds() {
  timespec now;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

}  // namespace

int main(int argc, char** argv) {
  using namespace fastgen::cpu;
  const int64_t in = argc > 2 ? std::atoll(argv[1]) : 1024;
  const int64_t out = argc > 2 ? std::atoll(argv[2]) : 1024;
  std::vector<int64_t> heights;
  for (int i = 3; i < argc; ++i) heights.push_back(std::atoll(argv[i]));
  if (heights.empty()) heights = {1, 8, 96};
  if (in < 1 || out < 1 || *std::min_element(heights.begin(), heights.end()) < 1) {
    std::fprintf(stderr, "usage: kernel_speed [in out [rows ...]], whole numbers from 1 on\n");
    return 2;
  }
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  std::vector<float> numbers(4096);
  for (float& number : numbers) number = normal(random);
  std::printf("x [rows, %lld] by weights [%lld, %lld]\n", static_cast<long long>(in),
              static_cast<long long>(in), static_cast<long long>(out));
  std::printf("%-12s %-9s %5s %9s %9s %9s\n", "set", "weights", "rows", "GOP/s", "GB/s",
              "prepare us");
  for (const Kernels* kernels : Runnable()) {
    for (const WeightType type : kWeightTypes) {
      for (const int64_t rows : heights) {
        Product product(
            *kernels, type, rows, in, out,
            [&](int64_t k, int64_t c) { return numbers[(k * 61 + c * 17) % 4096]; },
            [&](int64_t r, int64_t k) { return numbers[(r * 53 + k * 11) % 4096]; });
        const double operations = 2.0 * static_cast<double>(rows) * in * out;
        const int repeats = std::max(1, static_cast<int>(2e8 / operations));
        double best = 1e9, best_prepare = 1e9;
        for (int round = 0; round < 9; ++round) {
          double begin = ThreadSeconds();
          for (int i = 0; i < repeats; ++i) product.Run();
          best = std::min(best, (ThreadSeconds() - begin) / repeats);
          if (!product.prepared_bytes) continue;
          begin = ThreadSeconds();
          for (int64_t r = 0; r < rows; ++r) {
            kernels->prepare(type, &product.x[r * product.float_stride], in,
                             product.prepared.data() + r * product.prepared_bytes);
          }
          best_prepare = std::min(best_prepare, ThreadSeconds() - begin);
        }
        std::printf("%-12s %-9s %5lld %9.1f %9.1f", kernels->name, WeightTypeName(type),
                    static_cast<long long>(rows), operations * 1e-9 / best,
                    static_cast<double>(product.packed.size()) * 1e-9 / best);
        if (product.prepared_bytes) std::printf(" %9.2f", best_prepare * 1e6);
        std::printf("\n");
      }
    }
  }
  return 0;
}
