// Every kernel set's products, of every type of weights, against float64.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "base/half.h"
#include "kernel_cases.h"

namespace fastgen::cpu {
namespace {

struct Shape {
  int64_t rows, in, out;
};
// Nothing is a multiple of anything, and every height of a tile comes up.
constexpr Shape kShapes[] = {
    {1, 1, 1},     {1, 31, 33},   {2, 32, 32},   {3, 33, 127}, {4, 65, 129},   {5, 127, 160},
    {6, 64, 31},   {7, 96, 40},   {8, 250, 64},  {9, 2, 95},   {10, 3, 96},    {11, 130, 1},
    {12, 257, 65}, {13, 100, 34}, {17, 511, 96}, {25, 36, 97}, {1, 1100, 163},
};

std::string NameOf(const Kernels& kernels, WeightType type, const Shape& shape) {
  return std::string(kernels.name) + " " + WeightTypeName(type) + " [" +
         std::to_string(shape.rows) + ", " + std::to_string(shape.in) + "] x [.., " +
         std::to_string(shape.out) + "]";
}

// Each sum of `in` products is off by no more than a rounding of every step, of the magnitudes' sum:
// however much of it cancels. Denormal results of bfloat16 pairs are flushed to zero.
void Check(const Product& product, const std::string& name) {
  const double epsilon = std::numeric_limits<float>::epsilon() / 2;
  for (int64_t r = 0; r < product.rows; ++r) {
    for (int64_t c = 0; c < product.out; ++c) {
      double sum = 0.0, magnitude = 0.0;
      for (int64_t k = 0; k < product.in; ++k) {
        const double term = product.ElementOf(r, k) * product.WeightOf(k, c);
        sum += term;
        magnitude += std::fabs(term);
      }
      const double steps = static_cast<double>(product.in) + 3.0;
      const double actual = product.y[r * product.args.ldy + c];
      ASSERT_LE(std::fabs(actual - sum), steps * (epsilon * magnitude + 1.2e-38))
          << name << " row " << r << " column " << c;
    }
  }
}

template <class Fn>
void ForEach(const Fn& fn) {
  for (const Kernels* kernels : Runnable()) {
    for (const WeightType type : kWeightTypes) {
      for (const Shape& shape : kShapes) fn(*kernels, type, shape, NameOf(*kernels, type, shape));
    }
  }
}

TEST(Kernels, ProductsOfNormalNumbers) {
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  ForEach(
      [&](const Kernels& kernels, WeightType type, const Shape& shape, const std::string& name) {
        Product product(
            kernels, type, shape.rows, shape.in, shape.out,
            [&](int64_t, int64_t) { return normal(random) * 0.1f; },
            [&](int64_t, int64_t) { return normal(random); });
        product.Run();
        Check(product, name);
      });
}

TEST(Kernels, ProductsThatCancel) {
  // Neighbouring terms are huge and opposite, what remains of them is small.
  std::mt19937 random(2);
  std::normal_distribution<float> normal;
  ForEach(
      [&](const Kernels& kernels, WeightType type, const Shape& shape, const std::string& name) {
        Product product(
            kernels, type, shape.rows, shape.in, shape.out,
            [&](int64_t k, int64_t) { return (k % 2 ? -1000.0f : 1000.0f) + normal(random); },
            [&](int64_t, int64_t) { return 1000.0f + normal(random); });
        product.Run();
        Check(product, name);
      });
}

TEST(Kernels, ProductsOfDenormalAndLargeNumbers) {
  std::mt19937 random(3);
  std::uniform_int_distribution<int> exponent(-140, 10);
  std::normal_distribution<float> normal;
  ForEach(
      [&](const Kernels& kernels, WeightType type, const Shape& shape, const std::string& name) {
        Product product(
            kernels, type, shape.rows, shape.in, shape.out,
            [&](int64_t, int64_t) { return std::ldexp(normal(random), exponent(random) / 8); },
            [&](int64_t, int64_t) { return std::ldexp(normal(random), exponent(random)); });
        product.Run();
        Check(product, name);
      });
}

// Runs of a row that are nothing beside others, or zero, in any order: steps that differ by 2^80 and more.
TEST(Kernels, ProductsOfRunsOfAnySize) {
  std::mt19937 random(8);
  std::normal_distribution<float> normal;
  const float sizes[] = {1.0f, 0.0f, 1e-25f, 1e20f, 1e-36f, 1e-3f, 1e30f, 0.0f, 1e-10f};
  for (const Kernels* kernels : Runnable()) {
    for (const WeightType type : {WeightType::kInt8, WeightType::kInt4, WeightType::kInt8Groups}) {
      Product product(
          *kernels, type, 9, 1111, 40, [&](int64_t, int64_t) { return normal(random); },
          [&](int64_t r, int64_t k) { return sizes[(r + k / 128) % 9] * normal(random); });
      product.Run();
      Check(product, NameOf(*kernels, type, {9, 1111, 40}));
      // And what the kernel is given is the row: a step is 2^-40 of the row's largest number at most.
      for (int64_t k = 0; k < product.in; ++k) {
        const double given = product.ElementOf(2, k),
                     element = product.x[2 * product.float_stride + k];
        ASSERT_LE(std::fabs(given - element), 0.004 * sizes[(2 + k / 128) % 9] * 5 + 1e30 * 0x1p-40)
            << kernels->name << " element " << k;
      }
    }
  }
}

TEST(Kernels, AnInfinityOrNaNStaysInItsRow) {
  for (const float odd :
       {std::numeric_limits<float>::infinity(), std::numeric_limits<float>::quiet_NaN()}) {
    ForEach(
        [&](const Kernels& kernels, WeightType type, const Shape& shape, const std::string& name) {
          const int64_t row = shape.rows / 2, column = shape.in - 1;
          Product product(
              kernels, type, shape.rows, shape.in, shape.out,
              [&](int64_t k, int64_t c) { return static_cast<float>((k + c) % 5 + 1); },
              [&](int64_t r, int64_t k) { return r == row && k == column ? odd : 1.0f; });
          product.Run();
          for (int64_t r = 0; r < shape.rows; ++r) {
            for (int64_t c = 0; c < shape.out; ++c) {
              ASSERT_EQ(std::isfinite(product.y[r * product.args.ldy + c]), r != row)
                  << name << " row " << r << " column " << c;
            }
          }
        });
  }
}

TEST(Kernels, ARowIsTheSameBitsInAnyCompany) {
  std::mt19937 random(4);
  std::normal_distribution<float> normal;
  std::vector<float> rows(25 * 1200), weights(1200 * 200);
  for (float& value : rows) value = normal(random);
  for (float& value : weights) value = normal(random);
  ForEach(
      [&](const Kernels& kernels, WeightType type, const Shape& shape, const std::string& name) {
        const auto weight = [&](int64_t k, int64_t c) { return weights[k * 200 + c]; };
        Product together(kernels, type, shape.rows, shape.in, shape.out, weight,
                         [&](int64_t r, int64_t k) { return rows[r * 1200 + k]; });
        together.Run();
        const int64_t row = shape.rows - 1;
        Product alone(kernels, type, 1, shape.in, shape.out, weight,
                      [&](int64_t, int64_t k) { return rows[row * 1200 + k]; });
        // Panel by panel, as several threads take them.
        for (int64_t p = 0; p < alone.panels; ++p) kernels.matmul(alone.args, p, p + 1);
        ASSERT_EQ(std::memcmp(&together.y[row * together.args.ldy], alone.y.data(),
                              sizeof(float) * alone.args.ldy),
                  0)
            << name;
        Product pieces(kernels, type, 1, shape.in, shape.out, weight,
                       [&](int64_t, int64_t k) { return rows[row * 1200 + k]; });
        pieces.Run();
        ASSERT_EQ(pieces.y, alone.y) << name;
      });
}

// All finite numbers of 16 bits, subnormal ones too: 1 * w.
TEST(Kernels, EveryNumberOfSixteenBits) {
  for (const Kernels* kernels : Runnable()) {
    for (const WeightType type : {WeightType::kFloat16, WeightType::kBFloat16}) {
      const auto weight = [&](int64_t, int64_t bits) {
        const auto half = static_cast<uint16_t>(bits);
        const float value =
            type == WeightType::kFloat16 ? base::HalfToFloat(half) : base::BrainToFloat(half);
        return std::isfinite(value) ? value : 0.0f;
      };
      Product product(*kernels, type, 1, 1, 65536, weight, [](int64_t, int64_t) { return 1.0f; });
      product.Run();
      // The instruction for pairs of bfloat16 takes subnormal numbers for zero.
      const bool flushed = type == WeightType::kBFloat16 && product.prepared_bytes;
      for (int64_t bits = 0; bits < 65536; ++bits) {
        const float expected = weight(0, bits);
        const bool subnormal = std::fabs(expected) < std::numeric_limits<float>::min();
        ASSERT_EQ(product.y[bits], flushed && subnormal ? 0.0f : expected)
            << kernels->name << " " << WeightTypeName(type) << " bits " << bits;
      }
    }
  }
}

// What a product is given for a row is the row, within half of a step of its run.
TEST(Kernels, PreparedRows) {
  std::mt19937 random(5);
  std::normal_distribution<float> normal;
  for (const Kernels* kernels : Runnable()) {
    for (const WeightType type : kWeightTypes) {
      for (const float size : {1.0f, 1e4f, 1e-20f}) {
        const int64_t in = 1 + static_cast<int64_t>(random() % 200);
        Product product(
            *kernels, type, 3, in, 1, [](int64_t, int64_t) { return 1.0f; },
            [&](int64_t, int64_t) { return size * normal(random); });
        for (int64_t r = 0; r < 3; ++r) {
          const float* row = &product.x[r * product.float_stride];
          for (int64_t k = 0; k < in; ++k) {
            double allowed = 0.0;
            if (product.prepared_bytes && type == WeightType::kBFloat16) {
              allowed = std::fabs(row[k]) / 256;
            } else if (product.prepared_bytes) {
              const int64_t begin = k / kRun * kRun;
              for (int64_t i = begin; i < std::min(begin + kRun, in); ++i) {
                allowed = std::max(allowed, std::fabs(static_cast<double>(row[i])));
              }
              allowed *= 0.5001 / 127;
            }
            ASSERT_LE(std::fabs(product.ElementOf(r, k) - row[k]), allowed)
                << kernels->name << " " << WeightTypeName(type) << " element " << k << " of " << in;
          }
        }
      }
    }
  }
}

// A panel is made again of its weights and scales, whatever the scales are: subnormal, zero, negative,
// saturated, infinite; and of weights that were never whole numbers.
TEST(Panels, ScalesAreKept) {
  std::mt19937 random(7);
  std::uniform_int_distribution<int> exponent(-40, 24);
  std::normal_distribution<float> normal;
  for (const WeightType type : {WeightType::kInt8, WeightType::kInt4, WeightType::kInt8Groups}) {
    for (const int64_t in : {1, 31, 32, 33, 100, 128, 129, 300}) {
      for (int round = 0; round < 100; ++round) {
        std::vector<float> weights(static_cast<size_t>(in * kPanel));
        for (float& value : weights) value = normal(random);
        for (int64_t c = 0; c < kPanel; ++c) {
          const float size = c == 3 ? 0.0f : std::ldexp(1.0f, exponent(random));
          for (int64_t k = 0; k < in; ++k) weights[k * kPanel + c] *= size;
        }
        if (round % 20 == 0) weights[5] = std::numeric_limits<float>::infinity();
        if (round % 20 == 1) weights[5] = std::numeric_limits<float>::quiet_NaN();
        const size_t bytes = static_cast<size_t>(PanelBytes(type, in));
        std::vector<char> panel(bytes), again(bytes);
        PackPanel(type, weights.data(), in, panel.data());
        std::vector<uint16_t> scales(static_cast<size_t>((in + kGroup - 1) / kGroup * kPanel));
        for (int64_t k = 0; k < in; k += kGroup) {  // a panel up to k ends where k's scales are
          const int64_t at = PanelBytes(type, k / ScaleRows(type) * ScaleRows(type));
          std::memcpy(&scales[k / kGroup * kPanel], &panel[at], kPanel * sizeof(uint16_t));
        }
        std::vector<float> column(static_cast<size_t>(in));
        for (int64_t c = 0; c < kPanel; ++c) {
          ReadColumn(type, panel.data(), in, c, column.data());
          for (int64_t k = 0; k < in; ++k) weights[k * kPanel + c] = column[k];
        }
        PackPanel(type, weights.data(), in, again.data(), scales.data());
        ASSERT_EQ(panel, again) << WeightTypeName(type) << " of " << in << " rows, " << round;
      }
    }
  }
}

// Every number of a scale, with every whole number.
TEST(Panels, EveryScaleAndNumber) {
  std::vector<float> weights(kGroup * kPanel);
  std::vector<uint16_t> scales(kPanel);
  std::vector<int8_t> whole(kGroup * kPanel);
  for (uint32_t bits = 1; bits < 0x7c00u; ++bits) {
    const float scale = base::HalfToFloat(static_cast<uint16_t>(bits));
    for (uint32_t sign : {0u, 0x8000u}) {
      std::fill(scales.begin(), scales.end(), static_cast<uint16_t>(bits | sign));
      for (int q = -127; q <= 127; ++q) {
        weights[q + 127] = (sign ? -scale : scale) * static_cast<float>(q);
      }
      Quantize(WeightType::kInt8, weights.data(), kGroup, scales.data(), whole.data());
      for (int q = -127; q <= 127; ++q) ASSERT_EQ(whole[q + 127], q) << bits;
    }
  }
}

// Epilogues add the bias first; the residual is what y was.
TEST(Kernels, Epilogues) {
  std::mt19937 random(6);
  std::normal_distribution<float> normal;
  for (const Kernels* kernels : Runnable()) {
    for (const WeightType type : kWeightTypes) {
      for (const int64_t rows : {1, 5}) {
        Product product(
            *kernels, type, rows, 40, 70, [&](int64_t, int64_t) { return normal(random); },
            [&](int64_t, int64_t) { return normal(random); });
        std::vector<float> bias(product.args.ldy), before(product.y.size());
        for (float& value : bias) value = normal(random);
        for (float& value : before) value = normal(random);
        product.Run();
        const std::vector<float> plain = product.y;
        product.args.bias = bias.data();
        for (const Epilogue epilogue : {Epilogue::kStore, Epilogue::kGelu, Epilogue::kResidual}) {
          product.args.epilogue = epilogue;
          product.y = before;
          product.args.y = product.y.data();
          product.Run();
          for (size_t i = 0; i < plain.size(); ++i) {
            const double sum = plain[i] + bias[i % bias.size()];
            const double gelu =
                0.5 * sum *
                (1.0 + std::tanh(0.7978845608028654 * (sum + 0.044715 * sum * sum * sum)));
            const double expected = epilogue == Epilogue::kStore  ? sum
                                    : epilogue == Epilogue::kGelu ? gelu
                                                                  : sum + before[i];
            ASSERT_NEAR(product.y[i], expected, 1e-5 * (1.0 + std::fabs(expected)))
                << kernels->name << " " << WeightTypeName(type) << " epilogue "
                << static_cast<int>(epilogue);
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace fastgen::cpu
