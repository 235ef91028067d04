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

// Takes columns of the fused product to where attention wants them: queries are scaled in place,
// keys and values go to the cache.
void CpuDevice::WriteCache(int32_t layer, const std::vector<Row>& rows, int64_t first,
                           int64_t last) {
  const int64_t h = config_.hidden_size;
  const int64_t d = config_.head_size();
  const float scale = 1.0f / std::sqrt(static_cast<float>(d));
  for (int64_t begin = first; begin < last;) {
    // A run of columns within one head of one role.
    const int64_t end = std::min(last, begin / d * d + d);
    const int64_t role = begin / h;
    const int32_t head = static_cast<int32_t>(begin % h / d);
    const int64_t element = begin % d;
    for (size_t r = 0; r < rows.size(); ++r) {
      float* from = qkv_.floats() + static_cast<int64_t>(r) * qkv_stride_ + begin;
      const int64_t count = end - begin;
      if (role == 0) {
        for (int64_t i = 0; i < count; ++i) from[i] *= scale;
        continue;
      }
      const int32_t position = rows[r].position;
      float* block = rows[r].slot->blocks[position / kBlock].floats();
      const int64_t at = position % kBlock;
      if (role == 1) {
        float* keys = block + cache_.KeysAt(layer, head) + element * kBlock + at;
        for (int64_t i = 0; i < count; ++i) keys[i * kBlock] = from[i];
      } else {
        float* values = block + cache_.ValuesAt(layer, head) + at * cache_.value_stride() + element;
        for (int64_t i = 0; i < count; ++i) values[i] = from[i];
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
      spans += tile.spans;
      parts += tile.spans * tile.count;
      most_parts = std::max(most_parts, tile.spans * tile.count);
      tiles_.push_back(tile);
    }
    begin = end;
  }
  const auto tiles = static_cast<int64_t>(tiles_.size());
  const int64_t part_floats = cache_.value_stride() + cpu::kPartNotes;
  if (spans > tiles && tiles * config_.num_heads < kTasksPerThread * pool_.threads()) {
    for (int64_t t = 0; t < tiles; ++t) {
      tile_of_span_.resize(tile_of_span_.size() + tiles_[t].spans, static_cast<int32_t>(t));
    }
    parts_.resize(config_.num_heads * parts * part_floats);
    const auto pending = static_cast<size_t>(config_.num_heads * tiles);
    if (pending > pending_.size()) pending_ = std::vector<Pending>(pending);
    return;
  }
  const auto floats = static_cast<size_t>(most_parts * part_floats);
  for (Scratch& scratch : scratch_) {
    if (scratch.parts.size() < floats) scratch.parts.resize(floats);
  }
}

void CpuDevice::Attend(int32_t layer, const std::vector<Row>& rows) {
  const auto tiles = static_cast<int64_t>(tiles_.size());
  // Heads outermost: neighbouring tasks read the same keys and values.
  if (tile_of_span_.empty()) {
    pool_.Run(tiles * config_.num_heads, 1, [&](int64_t begin, int64_t end, int thread) {
      for (int64_t task = begin; task < end; ++task) {
        const auto head = static_cast<int32_t>(task / tiles);
        const Tile& tile = tiles_[task % tiles];
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
    pending_[i].spans.store(tiles_[i % tiles].spans, std::memory_order_relaxed);
  }
  pool_.Run(spans * config_.num_heads, 1, [&](int64_t begin, int64_t end, int thread) {
    for (int64_t task = begin; task < end; ++task) {
      const auto head = static_cast<int32_t>(task / spans);
      const int32_t t = tile_of_span_[task % spans];
      const Tile& tile = tiles_[t];
      const int64_t span = task % spans - tile.first_span;
      float* const parts = parts_.data() + head * parts_of_head +
                           tile.first_part * (cache_.value_stride() + cpu::kPartNotes);
      AttendSpans(layer, rows, head, tile, span, span + 1, parts, thread);
      // Who does the last of them joins them, in their own order.
      if (pending_[head * tiles + t].spans.fetch_sub(1, std::memory_order_acq_rel) == 1) {
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
  const int64_t end = std::min(last * cpu::kSpan / kBlock, blocks);
  for (int64_t b = first * cpu::kSpan / kBlock; b < end; ++b) {
    const float* block = rows[tile.row].slot->blocks[b].floats();
    scratch.key_blocks[b] = block + cache_.KeysAt(layer, head);
    scratch.value_blocks[b] = block + cache_.ValuesAt(layer, head);
  }
  const int64_t d = config_.head_size();
  cpu::AttentionArgs args{};
  args.query = qkv_.floats() + tile.row * qkv_stride_ + head * d;
  args.query_stride = qkv_stride_;
  args.rows = tile.count;
  args.head_size = d;
  args.value_stride = cache_.value_stride();
  args.key_blocks = scratch.key_blocks.data();
  args.value_blocks = scratch.value_blocks.data();
  args.length = tile.length;
  args.scores = scratch.scores.data();
  args.parts = parts;
  for (int64_t span = first; span < last; ++span) kernels_.attention_span(args, span);
}

void CpuDevice::FinishAttention(int32_t head, const Tile& tile, float* parts) const {
  cpu::AttentionArgs args{};
  args.rows = tile.count;
  args.head_size = config_.head_size();
  args.value_stride = cache_.value_stride();
  args.length = tile.length;
  args.parts = parts;
  args.out = attended_.floats() + tile.row * hidden_stride_ + head * args.head_size;
  args.out_stride = hidden_stride_;
  kernels_.attention_finish(args);
}

}  // namespace fastgen::engine
