// Products of whole warpgroups (wgmma) and tiles by tensor maps, as thin wrappers over PTX. They are of
// sm_90a: instructions that no later architecture has.
#pragma once

#include "cuda/hopper.h"
#include "cuda/tensor_map.h"

#if FASTGEN_ARCH_HAS_PERSISTENT && defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define FASTGEN_ARCH_HAS_WARPGROUP 1
#else
#define FASTGEN_ARCH_HAS_WARPGROUP 0
#endif

#if FASTGEN_ARCH_HAS_WARPGROUP

namespace fastgen {
namespace cuda {

// ---- tiles by tensor maps -------------------------------------------------------------------------

__device__ __forceinline__ void PrefetchMap(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// Copies the tile whose first element is that of `row` and `chunk`; completes on the barrier by its bytes.
// `whole`: rows are whole chunks.
__device__ __forceinline__ void CopyTile(uint32_t shared, const TensorMap& map, bool whole,
                                         int32_t chunk, int32_t row, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3, %4}], [%5];" ::"r"(shared),
      "l"(&map), "r"(whole ? 0 : chunk * 64), "r"(row), "r"(whole ? chunk : 0),
      "r"(SharedAddress(barrier))
      : "memory");
}

// The same of what is read once.
__device__ __forceinline__ void StreamTile(uint32_t shared, const TensorMap& map, bool whole,
                                           int32_t chunk, int32_t row, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      ".L2::cache_hint [%0], [%1, {%2, %3, %4}], [%5], %6;" ::"r"(shared),
      "l"(&map), "r"(whole ? 0 : chunk * 64), "r"(row), "r"(whole ? chunk : 0),
      "r"(SharedAddress(barrier)), "l"(ReadOncePolicy())
      : "memory");
}

// Copies bytes of this block's shared memory to another block's, with a barrier of that block; both
// addresses are of the cluster (AddressInBlock), bytes and addresses multiples of 16.
__device__ __forceinline__ void CopyToBlock(uint32_t to, uint32_t from, uint32_t bytes,
                                            uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, "
      "[%3];" ::"r"(to),
      "r"(from), "r"(bytes), "r"(barrier)
      : "memory");
}

// ---- products -------------------------------------------------------------------------------------

// Says where rows of 64 columns of 16 bits lie as a tensor map has put them, at a multiple of 1024 bytes;
// columns 16 k to 16 k + 15 are 2 k further. `TilePlace` is the part of it that differs from tile to tile.
__device__ __forceinline__ uint32_t TilePlace(uint32_t shared) {
  return (shared & 0x3ffffu) >> 4 | 1u << 16;
}
__device__ __forceinline__ uint64_t DescriptorOf(uint32_t place) {
  constexpr uint64_t kRowsOf8 = uint64_t{1024 / 16} << 32;
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  return place | kRowsOf8 | kSwizzle128;
}

// Before the first product, and wherever something else has changed the sums.
__device__ __forceinline__ void WarpgroupFence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void WarpgroupCommit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits until no more than kPending groups of products are under way.
template <int kPending>
__device__ __forceinline__ void WarpgroupWait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// d += a b', where a has 64 rows of 16 columns and b has kRows. Of 8 rows r of b, warp w's lane l has in
// d[4 (r / 8)]: a's row 16 w + l / 4 by b's rows 8 (r / 8) + 2 (l % 4) and 1 more, then the same of a's
// row 8 further.
template <typename Element, int kRows>
struct WarpgroupProduct;

// Of all numbers of rows, as PTX calls the type.
#define FASTGEN_WARPGROUP_PRODUCTS(Element, type)                                                  \
  template <>                                                                                      \
  struct WarpgroupProduct<Element, 8> {                                                            \
    __device__ __forceinline__ static void Add(float (&d)[4], uint64_t a, uint64_t b) {            \
      asm volatile("wgmma.mma_async.sync.aligned.m64n8k16.f32." type "." type                      \
                   " "                                                                             \
                   "{%0, %1, %2, %3}, "                                                            \
                   "%4, %5, 1, 1, 1, 0, 0;"                                                        \
                   : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                \
                   : "l"(a), "l"(b));                                                              \
    }                                                                                              \
  };                                                                                               \
                                                                                                   \
  template <>                                                                                      \
  struct WarpgroupProduct<Element, 16> {                                                           \
    __device__ __forceinline__ static void Add(float (&d)[8], uint64_t a, uint64_t b) {            \
      asm volatile("wgmma.mma_async.sync.aligned.m64n16k16.f32." type "." type                     \
                   " "                                                                             \
                   "{%0, %1, %2, %3, %4, %5, %6, %7}, "                                            \
                   "%8, %9, 1, 1, 1, 0, 0;"                                                        \
                   : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]),       \
                     "+f"(d[6]), "+f"(d[7])                                                        \
                   : "l"(a), "l"(b));                                                              \
    }                                                                                              \
  };                                                                                               \
                                                                                                   \
  template <>                                                                                      \
  struct WarpgroupProduct<Element, 32> {                                                           \
    __device__ __forceinline__ static void Add(float (&d)[16], uint64_t a, uint64_t b) {           \
      asm volatile("wgmma.mma_async.sync.aligned.m64n32k16.f32." type "." type                     \
                   " "                                                                             \
                   "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, "      \
                   "%16, %17, 1, 1, 1, 0, 0;"                                                      \
                   : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]),       \
                     "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]),     \
                     "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15])                            \
                   : "l"(a), "l"(b));                                                              \
    }                                                                                              \
  };                                                                                               \
                                                                                                   \
  template <>                                                                                      \
  struct WarpgroupProduct<Element, 64> {                                                           \
    __device__ __forceinline__ static void Add(float (&d)[32], uint64_t a, uint64_t b) {           \
      asm volatile(                                                                                \
          "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type                              \
          " "                                                                                      \
          "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, " \
          "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "                     \
          "%32, %33, 1, 1, 1, 0, 0;"                                                               \
          : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]),    \
            "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]),             \
            "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]),          \
            "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]),          \
            "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]),          \
            "+f"(d[31])                                                                            \
          : "l"(a), "l"(b));                                                                       \
    }                                                                                              \
  };

FASTGEN_WARPGROUP_PRODUCTS(__half, "f16")
FASTGEN_WARPGROUP_PRODUCTS(BFloat16, "bf16")

#undef FASTGEN_WARPGROUP_PRODUCTS

}  // namespace cuda
}  // namespace fastgen

#endif  // FASTGEN_ARCH_HAS_WARPGROUP
