// Rounding weights for files; see fastgen.h.
#include <cstdint>
#include <string>
#include <vector>

#include "api/convert.h"
#include "api/status.h"
#include "cpu/panels.h"
#include "cpu/thread_pool.h"
#include "engine/quantize.h"
#include "fastgen/fastgen.h"

using namespace fastgen;  // NOLINT: this file is the outside of that namespace
using api::CheckNotNull;
using api::Guard;
using api::Invalid;

fastgen_status fastgen_quantize(const fastgen_tensor* matrix, int32_t is_table,
                                const char* weight_dtype, void* values, void* scales) {
  return Guard([&] {
    CheckNotNull(matrix, "matrix");
    CheckNotNull(weight_dtype, "weight_dtype");
    CheckNotNull(values, "values");
    const std::vector<io::TensorView> views = api::ToTensors(matrix, 1);
    const io::TensorView& view = views.front();
    if (view.shape.size() != 2) {
      Invalid("matrix '" + view.name + "' has the shape " + view.ShapeText() +
              ", it must have two dimensions");
    }
    int64_t elements = 0;
    if (__builtin_mul_overflow(view.shape[0], view.shape[1], &elements) ||
        elements > INT64_MAX / 4) {
      Invalid("matrix '" + view.name + "' of shape " + view.ShapeText() + " has too many elements");
    }
    if (is_table != 0 && is_table != 1) {
      Invalid("is_table is " + std::to_string(is_table) + ", it must be 0 or 1");
    }
    cpu::WeightType type = cpu::WeightType::kFloat32;
    if (!cpu::ParseWeightType(weight_dtype, &type) || type == cpu::WeightType::kFloat32) {
      Invalid(std::string("weight_dtype is '") + weight_dtype +
              "', it must be float16, bfloat16, int8 or int4");
    }
    if (type == cpu::WeightType::kInt4 && is_table == 1) {
      Invalid("weight_dtype is int4 for the table '" + view.name +
              "', it must be int8: embedding and head of a model of int4 are int8");
    }
    if (type == cpu::WeightType::kInt8 || type == cpu::WeightType::kInt4) {
      CheckNotNull(scales, "scales");
    }
    cpu::ThreadPool pool(cpu::ResolveThreads(0));
    engine::QuantizeMatrix(view, is_table == 1, type, pool, values, static_cast<uint16_t*>(scales));
  });
}
