// The op table of the CPU's products: kernel set x type of weights x shape, with weights, rows and
// what float64 makes of them. kernels_test.cc holds the kernels to it, kernel_speed.cc times them.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/kernels.h"

namespace fastgen::cpu {

constexpr WeightType kWeightTypes[] = {WeightType::kFloat32, WeightType::kBFloat16,
                                       WeightType::kFloat16, WeightType::kInt8,
                                       WeightType::kInt4,    WeightType::kInt8Groups};

// The sets that this machine runs.
inline std::vector<const Kernels*> Runnable() {
  std::vector<const Kernels*> result;
  for (const Kernels* kernels : AllKernels()) {
    if (kernels->supported()) result.push_back(kernels);
  }
  return result;
}

// A product y = x W + b with everything that `matmul` wants.
struct Product {
  // Weights [in, out] and rows [rows, in] come from the two functions.
  template <class WeightFn, class RowFn>
  Product(const Kernels& set, WeightType type, int64_t num_rows, int64_t num_in, int64_t num_out,
          const WeightFn& weight, const RowFn& element)
      : kernels(set),
        rows(num_rows),
        in(num_in),
        out(num_out),
        panels((out + kPanel - 1) / kPanel) {
    const int64_t stride = (in + kRowAlign - 1) / kRowAlign * kRowAlign + kRowAlign;
    args.type = type;
    args.panel_bytes = PanelBytes(type, in);
    packed.resize(panels * args.panel_bytes);
    std::vector<float> panel(in * kPanel);
    for (int64_t p = 0; p < panels; ++p) {
      for (int64_t k = 0; k < in; ++k) {
        for (int64_t c = 0; c < kPanel; ++c) {
          const int64_t column = p * kPanel + c;
          panel[k * kPanel + c] = column < out ? weight(k, column) : 0.0f;
        }
      }
      PackPanel(type, panel.data(), in, packed.data() + p * args.panel_bytes);
    }
    held.resize(out * in);
    for (int64_t column = 0; column < out; ++column) {
      ReadColumn(type, packed.data() + column / kPanel * args.panel_bytes, in, column % kPanel,
                 &held[column * in]);
    }
    // What is past the end of a row must not matter.
    x.assign(rows * stride, __builtin_nanf(""));
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t k = 0; k < in; ++k) x[r * stride + k] = element(r, k);
    }
    prepared_bytes = kernels.prepared_bytes(type, in);
    prepared.resize(rows * prepared_bytes);
    for (int64_t r = 0; r < rows && prepared_bytes; ++r) {
      kernels.prepare(type, &x[r * stride], in, prepared.data() + r * prepared_bytes);
    }
    args.x = prepared_bytes ? static_cast<const void*>(prepared.data()) : x.data();
    args.x_stride = prepared_bytes ? prepared_bytes : stride * static_cast<int64_t>(sizeof(float));
    args.rows = rows;
    args.in = in;
    args.panels = packed.data();
    args.out = out;
    args.ldy = panels * kPanel;
    args.epilogue = Epilogue::kStore;
    args.bias = nullptr;
    y.assign(rows * args.ldy, 0.0f);
    args.y = y.data();
    float_stride = stride;
  }
  Product(const Product&) = delete;

  void Run() { kernels.matmul(args, 0, panels); }

  // The weight that the panels hold, and the element of x that the kernel multiplies by it.
  double WeightOf(int64_t k, int64_t column) const { return held[column * in + k]; }
  double ElementOf(int64_t row, int64_t k) const {
    if (!prepared_bytes) return x[row * float_stride + k];
    const char* from = prepared.data() + row * prepared_bytes;
    if (args.type == WeightType::kBFloat16) {
      const uint32_t bits = static_cast<uint32_t>(reinterpret_cast<const uint16_t*>(from)[k]) << 16;
      float value;
      std::memcpy(&value, &bits, sizeof(value));
      return value;
    }
    return args.type == WeightType::kInt8 ? QuantizedElement<kRun>(from, k)
                                          : QuantizedElement<kGroup>(from, k);
  }

  template <int64_t kRows>
  double QuantizedElement(const char* from, int64_t k) const {
    // From the last step back to that of the element's run.
    const auto* parts = reinterpret_cast<const QuantizedPart<kRows>*>(from);
    float last;
    std::memcpy(&last, parts + (in + kRows - 1) / kRows, sizeof(last));
    double step = last;
    for (int64_t run = (in - 1) / kRun; run > k / kRun; --run) {
      step *= parts[run * kRun / kRows].ratio;
    }
    return step * parts[k / kRows].q[k % kRows];
  }

  const Kernels& kernels;
  int64_t rows, in, out, panels;
  MatmulArgs args;
  std::vector<char> packed, prepared;
  std::vector<float> x, y;
  std::vector<float> held;  // [out, in], the weights that the panels hold
  int64_t prepared_bytes, float_stride;
};

}  // namespace fastgen::cpu
