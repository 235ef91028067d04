// Attention of the CPU device: what goes into its cache, and how rows, heads and spans are shared out.
#include <algorithm>
#include <cmath>

#include "engine/cpu_device.h"

namespace fastgen::engine {

using cpu::kBlock;

namespace {

// Fewer tasks of attention than this for each thread leave some idle: then the cache is split too.
constexpr int64_t kTasksPerThread = 3;

}  // namespace

void CpuDevice::ExpectCache(int64_t rows) {
  for (Pending& head : pending_columns_) {
    head.count.store(2 * config_.head_size() * rows, std::memory_order_relaxed);
  }
}

void CpuDevice::WriteCache(int32_t layer, const std::vector<Row>& rows, int64_t first, int64_t last,
                           int64_t row, int64_t next_row) {
  const int64_t h = config_.hidden_size;
  const int64_t d = config_.head_size();
  const float scale = 1.0f / std::sqrt(static_cast<float>(d));
  for (int64_t begin = first; begin < last;) {
    // A run of columns within one head of one role.
    const int64_t end = std::min(last, begin / d * d + d);
    const auto head = static_cast<int32_t>(begin % h / d);
    if (begin < h) {
      for (int64_t r = row; r < next_row; ++r) {
        float* const query = qkv_.floats() + r * qkv_stride_;
        for (int64_t i = begin; i < end; ++i) query[i] *= scale;
      }
    } else if (const int64_t there = (end - begin) * (next_row - row);
               pending_columns_[head].count.fetch_sub(there, std::memory_order_acq_rel) == there) {
      for (size_t r = 0; r < rows.size();) {
        // A run of positions within a block of a sequence.
        const int32_t position = rows[r].position;
        const size_t most = r + static_cast<size_t>(kBlock - position % kBlock);
        size_t next = r + 1;
        while (next < rows.size() && next < most && rows[next].slot == rows[r].slot &&
               rows[next].position == rows[next - 1].position + 1) {
          ++next;
        }
        const float* const keys =
            qkv_.floats() + static_cast<int64_t>(r) * qkv_stride_ + h + head * d;
        char* const block = rows[r].slot->blocks[position / kBlock]->data();
        kernels_.write_cache(cache_.head(), keys, keys + h, qkv_stride_,
                             static_cast<int64_t>(next - r), block + cache_.HeadAt(layer, head),
                             position % kBlock);
        r = next;
      }
    }
    begin = end;
  }
}

void CpuDevice::PlanAttention(const std::vector<Row>& rows) {
  tiles_.clear();
  tile_of_span_.clear();
  const auto count = static_cast<int64_t>(rows.size());
  int64_t spans = 0, parts = 0, most_parts = 0;
  for (int64_t begin = 0; begin < count;) {
    int64_t end = begin + 1;
    while (end < count && rows[end].slot == rows[begin].slot &&
           rows[end].position == rows[end - 1].position + 1) {
      ++end;
    }
    // Tiles of nearly equal height: 8 rows are 4 + 4, not 6 + 2.
    const int64_t tiles = (end - begin + cpu::kAttentionRows - 1) / cpu::kAttentionRows;
    for (int64_t t = 0; t < tiles; ++t) {
      Tile tile;
      tile.row = begin + (end - begin) * t / tiles;
      tile.count = begin + (end - begin) * (t + 1) / tiles - tile.row;
      tile.length = rows[tile.row].position + 1;
      tile.spans = (tile.length + tile.count - 1 + cpu::kSpan - 1) / cpu::kSpan;
      tile.first_span = spans;
      tile.first_part = parts;
      tile.first_tile = static_cast<int64_t>(tiles_.size()) - t;
      tile.tiles = tiles;
      spans += tile.spans;
      parts += tile.spans * tile.count;
      most_parts = std::max(most_parts, tile.spans * tile.count);
      tiles_.push_back(tile);
    }
    begin = end;
  }
  const auto tiles = static_cast<int64_t>(tiles_.size());
  const int64_t part_floats = cache_.head().value_stride + cpu::kPartNotes;
  if (spans > tiles && tiles * config_.num_heads < kTasksPerThread * pool_.threads()) {
    for (int64_t t = 0; t < tiles; ++t) {
      tile_of_span_.resize(tile_of_span_.size() + tiles_[t].spans, static_cast<int32_t>(t));
    }
    parts_.resize(config_.num_heads * parts * part_floats);
    const auto pending = static_cast<size_t>(config_.num_heads * tiles);
    if (pending > pending_spans_.size()) pending_spans_ = std::vector<Pending>(pending);
    return;
  }
  const auto floats = static_cast<size_t>(most_parts * part_floats);
  for (Scratch& scratch : scratch_) {
    if (scratch.parts.size() < floats) scratch.parts.resize(floats);
  }
}

void CpuDevice::Attend(int32_t layer, const std::vector<Row>& rows) {
  const auto tiles = static_cast<int64_t>(tiles_.size());
  if (tile_of_span_.empty()) {
    // Sequence by sequence, as its heads lie side by side in a block; of a sequence head by head, as all of
    // its tiles read the same keys and values.
    pool_.Run(tiles * config_.num_heads, 1, [&](int64_t begin, int64_t end, int thread) {
      for (int64_t task = begin; task < end; ++task) {
        const Tile& some = tiles_[task / config_.num_heads];
        const int64_t of_sequence = task - some.first_tile * config_.num_heads;
        const auto head = static_cast<int32_t>(of_sequence / some.tiles);
        const Tile& tile = tiles_[some.first_tile + of_sequence % some.tiles];
        float* const parts = scratch_[thread].parts.data();
        AttendSpans(layer, rows, head, tile, 0, tile.spans, parts, thread);
        FinishAttention(head, tile, parts);
      }
    });
    return;
  }
  const auto spans = static_cast<int64_t>(tile_of_span_.size());
  const int64_t parts_of_head = static_cast<int64_t>(parts_.size()) / config_.num_heads;
  for (int64_t i = 0; i < config_.num_heads * tiles; ++i) {
    pending_spans_[i].count.store(tiles_[i % tiles].spans, std::memory_order_relaxed);
  }
  pool_.Run(spans * config_.num_heads, 1, [&](int64_t begin, int64_t end, int thread) {
    for (int64_t task = begin; task < end; ++task) {
      const auto head = static_cast<int32_t>(task / spans);
      const int32_t t = tile_of_span_[task % spans];
      const Tile& tile = tiles_[t];
      const int64_t span = task % spans - tile.first_span;
      float* const parts = parts_.data() + head * parts_of_head +
                           tile.first_part * (cache_.head().value_stride + cpu::kPartNotes);
      AttendSpans(layer, rows, head, tile, span, span + 1, parts, thread);
      // Who does the last of them joins them, in their own order.
      if (pending_spans_[head * tiles + t].count.fetch_sub(1, std::memory_order_acq_rel) == 1) {
        FinishAttention(head, tile, parts);
      }
    }
  });
}

void CpuDevice::AttendSpans(int32_t layer, const std::vector<Row>& rows, int32_t head,
                            const Tile& tile, int64_t first, int64_t last, float* parts,
                            int32_t thread) {
  Scratch& scratch = scratch_[thread];
  const int64_t blocks = (tile.length + tile.count - 1 + kBlock - 1) / kBlock;
  // Of the span behind them too, where there is one: its keys are fetched ahead.
  const int64_t end = std::min((last + 1) * cpu::kSpan / kBlock, blocks);
  for (int64_t b = first * cpu::kSpan / kBlock; b < end; ++b) {
    scratch.blocks[b] = rows[tile.row].slot->blocks[b]->data() + cache_.HeadAt(layer, head);
  }
  const int64_t d = config_.head_size();
  cpu::AttentionArgs args{};
  args.query = qkv_.floats() + tile.row * qkv_stride_ + head * d;
  args.query_stride = qkv_stride_;
  args.rows = tile.count;
  args.head = cache_.head();
  args.blocks = scratch.blocks.data();
  args.length = tile.length;
  args.scores = scratch.scores.data();
  args.parts = parts;
  for (int64_t span = first; span < last; ++span) kernels_.attention_span(args, span);
}

void CpuDevice::FinishAttention(int32_t head, const Tile& tile, float* parts) const {
  cpu::AttentionArgs args{};
  args.rows = tile.count;
  args.head = cache_.head();
  args.length = tile.length;
  args.parts = parts;
  args.out = attended_.floats() + tile.row * hidden_stride_ + head * args.head.head_size;
  args.out_stride = hidden_stride_;
  kernels_.attention_finish(args);
}

}  // namespace fastgen::engine
