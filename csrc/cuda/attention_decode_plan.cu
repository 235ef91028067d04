// The plan of a decode step's attention: which warp of which block takes which part of which row, for
// all layers. All parts of all rows are numbered: by row, head, part. A block takes neighbouring ones,
// and so do its warps, in runs, so that a warp has few queries. Blocks begin at a head where that
// balances them; where it does not, heads are cut.
#include <algorithm>

#include "cuda/attention_decode.h"
#include "cuda/launch.h"

namespace fastgen {
namespace cuda {
namespace {

constexpr int32_t kThreads = 256;
constexpr int32_t kMostRows = 4096;  // that shared memory holds
// Pages that a multiprocessor could read while a cut head is put together.
constexpr int32_t kCutPages = 8;
// The round of whose items a piece each is brought into the L2 cache: a ring has those of the first round, and
// not all of the second.
constexpr int32_t kAheadRound = 2;

struct PlanTask {
  DecodeAttentionArgs args;
  DecodePlan plan;
  StreamGrid grid;
  int64_t head_bytes;  // from head to head in a page
};

// A row in shared memory; one more than rows, with the sums of all.
struct RowWork {
  const char* const* pages;
  int32_t length;
  RowParts cut;
  // Of the rows before: those with a token, their pages and parts for a head.
  int32_t first_row, first_page, first_part;
};

// The last row that begins, by `first`, at or before `value`.
__device__ inline int FindRow(const RowWork* rows, int count, int32_t RowWork::* first, int value) {
  int low = 0, high = count - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (rows[middle].*first <= value) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

// Fills in the rows' sums; by one warp. Returns the most pages of a row.
__device__ inline int SumRows(RowWork* rows, int count, int lane) {
  int row_sum = 0, page_sum = 0, part_sum = 0, most_pages = 0;
  for (int first = 0; first < count; first += 32) {
    const int row = first + lane;
    const int pages = row < count ? rows[row].cut.pages : 0;
    const int parts = row < count ? rows[row].cut.parts : 0;
    const unsigned active = __ballot_sync(kAllLanes, pages > 0);
    int pages_to = pages, parts_to = parts;  // with the lane's own
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
      const int more_pages = __shfl_up_sync(kAllLanes, pages_to, offset);
      const int more_parts = __shfl_up_sync(kAllLanes, parts_to, offset);
      if (lane >= offset) {
        pages_to += more_pages;
        parts_to += more_parts;
      }
    }
    if (row < count) {
      rows[row].first_row = row_sum + __popc(active & ((1u << lane) - 1));
      rows[row].first_page = page_sum + pages_to - pages;
      rows[row].first_part = part_sum + parts_to - parts;
    }
    row_sum += __popc(active);
    page_sum += __shfl_sync(kAllLanes, pages_to, 31);
    part_sum += __shfl_sync(kAllLanes, parts_to, 31);
    most_pages = max(most_pages, pages);
  }
  if (lane == 0) {
    RowWork all = {};
    all.first_row = row_sum;
    all.first_page = page_sum;
    all.first_part = part_sum;
    rows[count] = all;
  }
  return static_cast<int>(MaxOfLanes(static_cast<float>(most_pages)));
}

// The number of the part at which a block begins.
__device__ inline int BeginOf(const PlanTask& task, const RowWork* rows, int most_pages,
                              int block) {
  const int heads = task.args.cache.num_heads;
  const int count = task.args.rows;
  const int blocks = gridDim.x;
  const RowWork& all = rows[count];
  if (block == 0) return 0;
  if (block == blocks) return all.first_part * heads;
  const int64_t units = static_cast<int64_t>(all.first_row) * heads;
  const int64_t pages = static_cast<int64_t>(all.first_page) * heads;
  const int64_t most_units = (units + blocks - 1) / blocks;
  const int64_t fair = (pages + blocks - 1) / blocks;
  if (task.args.partial == nullptr || most_units * most_pages <= fair + kCutPages ||
      fair >= static_cast<int64_t>(task.plan.rounds) * task.grid.warps) {
    const int unit = static_cast<int>(units * block / blocks);
    const RowWork& row = rows[FindRow(rows, count, &RowWork::first_row, unit / heads)];
    return row.first_part * heads + unit % heads * row.cut.parts;
  }
  const int64_t page = pages * block / blocks;
  const RowWork& row =
      rows[FindRow(rows, count, &RowWork::first_page, static_cast<int>(page / heads))];
  const int in_row = static_cast<int>(page - static_cast<int64_t>(row.first_page) * heads);
  const int head = in_row / row.cut.pages;
  const int in_head = in_row - head * row.cut.pages;
  const int part = (in_head + row.cut.pages_per_part - 1) / row.cut.pages_per_part;
  return row.first_part * heads + head * row.cut.parts + part;
}

__global__ void __launch_bounds__(kThreads) PlanKernel(const PlanTask task) {
  __shared__ int range[2];
  const DecodeAttentionArgs& args = task.args;
  RowWork* const rows = reinterpret_cast<RowWork*>(SharedMemory());
  const int lane = threadIdx.x % 32;
  const int heads = args.cache.num_heads;
  LetNextGridStart();
  WaitForGrid();
  for (int r = threadIdx.x; r < args.rows; r += kThreads) {
    RowWork row = {};
    row.length = VisibleLength(args.row_list[r], args.slots, &row.pages);
    row.cut = PartsOf(row.length);
    rows[r] = row;
  }
  __syncthreads();
  if (threadIdx.x < 32) {
    const int most_pages = SumRows(rows, args.rows, lane);
    __syncwarp();
    if (lane < 2) range[lane] = BeginOf(task, rows, most_pages, blockIdx.x + lane);
    if (blockIdx.x == 0) {
      for (int r = lane; r < args.rows; r += 32) {
        if (rows[r].cut.pages == 0) task.plan.empty_rows[1 + r - rows[r].first_row] = r;
      }
      if (lane == 0) task.plan.empty_rows[0] = args.rows - rows[args.rows].first_row;
    }
  }
  __syncthreads();

  const int begin = range[0], end = range[1];
  const int warps = task.grid.warps, run = task.grid.run;
  const int rounds = max(1, (end - begin + warps - 1) / warps);
  // The last runs are shorter, and the last warps may have none: fewer warps take up fewer queries.
  const auto number_of = [=](int round, int warp) {
    const int first = begin + round / run * run * warps;
    const int each = min(run, (end - first + warps - 1) / warps);
    return round % run < each ? first + warp * each + round % run : end;
  };
  for (int i = threadIdx.x; i < max(rounds, kAheadRound + 1) * warps; i += kThreads) {
    const int round = i / warps, warp = i % warps;
    DecodeItem item = {};
    item.flags = round + 1 < rounds ? kItemMore : 0;
    const int number = number_of(round, warp);
    if (number < end) {
      const int r = FindRow(rows, args.rows, &RowWork::first_part, number / heads);
      const RowWork& row = rows[r];
      const int in_row = number - row.first_part * heads;
      const int head = in_row / row.cut.parts;
      const int part = in_row - head * row.cut.parts;
      const int page = part * row.cut.pages_per_part;
      item.page = row.pages[page];
      item.later = row.pages + page + 1;
      item.positions = min(row.length - page * kPage, row.cut.pages_per_part * kPage);
      item.row = r;
      item.head = static_cast<int16_t>(head);
      item.part = static_cast<uint8_t>(part);
      item.parts = static_cast<uint8_t>(row.cut.parts);
      const int first = number - part, last = first + row.cut.parts - 1;
      item.count = static_cast<uint8_t>(number + 1 - max(begin, first));
      item.result = static_cast<uint16_t>((number - begin) % task.grid.results());
      const int next = number_of(round + 1, warp);
      if (next < end && (next < first || next > last)) item.flags |= kItemTurns;
      if (number == last) item.flags |= kItemNewest;
      if (number == last || number + 1 == end) item.flags |= kItemEnds;
      if (first < begin || last >= end) item.flags |= kItemCut;
    }
    const int64_t at = (static_cast<int64_t>(round) * gridDim.x + blockIdx.x) * warps + warp;
    if (round < rounds) task.plan.items[at] = item;
    if (round == kAheadRound) {
      const char* const keys = item.page + item.head * task.head_bytes;
      task.plan.ahead[blockIdx.x * warps + warp] =
          item.page == nullptr ? 0 : reinterpret_cast<uint64_t>(keys);
    }
  }
}

}  // namespace

size_t PlaceDecodePlan(const StreamGrid& grid, const CacheLayout& cache, int32_t rows, void* memory,
                       DecodePlan* plan) {
  const int64_t units = static_cast<int64_t>(rows) * cache.num_heads;
  const int64_t most = (units + grid.blocks - 1) / grid.blocks * kDecodeParts;
  plan->rounds = static_cast<int32_t>((most + grid.warps - 1) / grid.warps);
  // One round more: the kernel reads ahead.
  const size_t item_bytes = sizeof(DecodeItem) * static_cast<size_t>(grid.blocks) *
                            static_cast<size_t>(grid.warps) *
                            (static_cast<size_t>(plan->rounds) + 1);
  const size_t ahead_bytes =
      sizeof(uint64_t) * static_cast<size_t>(grid.blocks) * static_cast<size_t>(grid.warps);
  char* const bytes = static_cast<char*>(memory);
  plan->items = static_cast<DecodeItem*>(memory);
  plan->ahead = reinterpret_cast<uint64_t*>(bytes + item_bytes);
  plan->empty_rows = reinterpret_cast<int32_t*>(bytes + item_bytes + ahead_bytes);
  return item_bytes + ahead_bytes + sizeof(int32_t) * (static_cast<size_t>(rows) + 1);
}

// Of a head's keys, or values, in a page.
int64_t HeadBytes(const CacheLayout& cache) {
  return int64_t{kPage} * cache.head_stride * (cache.dtype == DType::kFloat32 ? 4 : 2);
}

cudaError_t DecodePlanBytes(int32_t rows, const CacheLayout& cache, size_t* bytes) {
  *bytes = 0;
  if (rows <= 0 || rows > kMostRows) return cudaSuccess;
  StreamGrid grid;
  const cudaError_t status = GetStreamGrid(cache, &grid);
  if (status != cudaSuccess || grid.blocks == 0) return status;
  DecodePlan plan;
  *bytes = PlaceDecodePlan(grid, cache, rows, nullptr, &plan);
  return cudaSuccess;
}

cudaError_t PlanDecodeAttention(const DecodeAttentionArgs& args, cudaStream_t stream) {
  if (args.rows <= 0 || args.plan == nullptr) return cudaSuccess;
  StreamGrid grid;
  const cudaError_t status = GetStreamGrid(args.cache, &grid);
  if (status != cudaSuccess) return status;
  if (grid.blocks == 0 || args.rows > kMostRows) return cudaErrorInvalidValue;
  PlanTask task;
  task.args = args;
  task.grid = grid;
  task.head_bytes = HeadBytes(args.cache);
  PlaceDecodePlan(grid, args.cache, args.rows, args.plan, &task.plan);
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>(grid.blocks));
  shape.threads = kThreads;
  shape.shared_bytes = sizeof(RowWork) * (static_cast<size_t>(args.rows) + 1);
  shape.overlap = args.overlap;
  return Launch(PlanKernel, shape, stream, task);
}

cudaError_t DecodePiecesAhead(const DecodeAttentionArgs& args, PiecesAhead* ahead) {
  *ahead = PiecesAhead();
  if (args.plan == nullptr || args.layer >= args.cache.num_layers) return cudaSuccess;
  StreamGrid grid;
  const cudaError_t status = GetStreamGrid(args.cache, &grid);
  if (status != cudaSuccess || grid.blocks == 0) return status;
  DecodePlan plan;
  PlaceDecodePlan(grid, args.cache, args.rows, args.plan, &plan);
  ahead->count = grid.blocks * grid.warps;
  ahead->pieces = plan.ahead;
  ahead->bytes = static_cast<uint32_t>(HeadBytes(args.cache));
  ahead->behind = 2 * int64_t{args.layer} * args.cache.num_heads * ahead->bytes;
  return cudaSuccess;
}

}  // namespace cuda
}  // namespace fastgen
