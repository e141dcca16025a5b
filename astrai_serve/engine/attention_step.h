// What one step asks of attention, and where a task's positions lie.

#pragma once

#include <algorithm>
#include <cstdint>

namespace astrai {

template <class T>
struct Step {
  const float* q;  // (N, H, Dk)
  T* keys;         // (KV, slots, Dk)
  T* values;       // (KV, slots, Dv), or the keys
  float* out;      // (N, H, Dv)
  const int64_t* pages;
  int64_t page_size, slots, heads, kv_heads, key_dim, value_dim, value_stride, window;
  float scale;
};

struct Tile {  // `count` tokens of a task from place `row` on, at positions from `position` on
  int64_t row, position, count, table;
};

// The positions of a block that somebody sees: `count` from the `first` on, and where they lie. What
// nobody sees is not read: it may be another task's, and no number.
template <int64_t kBlock>
struct Seen {
  int64_t first, count, slot[kBlock];

  template <class T>
  Seen(const Step<T>& step, const Tile& tile, int64_t base, int64_t begin, int64_t end) {
    const int64_t from = std::max(base, begin);
    first = from - base, count = std::min(base + kBlock, end) - from;
    for (int64_t j = 0; j < count;) {  // page by page: a division costs as much as a score
      const int64_t number = (from + j) / step.page_size;
      const int64_t offset = (from + j) - number * step.page_size;
      const int64_t run = std::min(step.page_size - offset, count - j);
      const int64_t at = step.pages[tile.table + number] * step.page_size + offset;
      for (int64_t i = 0; i < run; ++i) slot[j + i] = at + i;
      j += run;
    }
  }
};

}  // namespace astrai
