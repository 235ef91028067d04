#include "cpu/cache_layout.h"

#include <cstring>

#include "cpu/kernels.h"

namespace fastgen::cpu {
namespace {

struct Name {
  CacheType type;
  const char* name;
  int64_t element_bytes;
};

constexpr Name kNames[] = {
    {CacheType::kFloat32, "float32", 4},
    {CacheType::kFloat16, "float16", 2},
    {CacheType::kBFloat16, "bfloat16", 2},
    {CacheType::kInt8, "int8", 1},
};

const Name& Of(CacheType type) {
  for (const Name& known : kNames) {
    if (type == known.type) return known;
  }
  return kNames[0];
}

}  // namespace

bool ParseCacheType(const char* name, CacheType* type) {
  for (const Name& known : kNames) {
    if (std::strcmp(name, known.name) != 0) continue;
    *type = known.type;
    return true;
  }
  return false;
}

const char* CacheTypeName(CacheType type) { return Of(type).name; }

HeadLayout MakeHeadLayout(CacheType type, int64_t head_size) {
  const int64_t element = Of(type).element_bytes;
  HeadLayout head;
  head.type = type;
  head.head_size = head_size;
  head.value_stride = (head_size + kRowAlign - 1) / kRowAlign * kRowAlign;
  const int64_t key_size = type == CacheType::kBFloat16 ? (head_size + 1) / 2 * 2 : head_size;
  head.values_at = key_size * kBlock * element;
  head.scales_at = head.values_at + kBlock * head.value_stride * element;
  head.bytes = head.scales_at;
  if (type == CacheType::kInt8) head.bytes += 2 * kBlock * static_cast<int64_t>(sizeof(float));
  return head;
}

}  // namespace fastgen::cpu
