// AMX: eight registers of 16 rows of 64 bytes each, and products of whole registers.
//
// A product takes rows of 64 bytes from one register and, from the other, columns that were laid out
// four bytes (or two bfloat16) of each of 16 columns after the other, as `packed.h` and the attention
// have them. A row's sums do not depend on the rows beside it.
//
// Written as assembly: the compilers' own functions do not say that a register is loaded from memory,
// which lets a compiler move the writes before it.

#pragma once

#if defined(__AMX_TILE__) && defined(__AMX_INT8__) && defined(__AMX_BF16__) && \
    defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__linux__)
#define ASTRAI_HAS_TILES 1

#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>

namespace astrai {

constexpr int64_t kTileBytes = 64;  // of a row

// Whether the system lets this process use the registers; it has to be asked once.
inline bool may_use_tiles() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  static const bool granted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return granted;
}

// While it lives, this thread's eight registers are whole ones. Others configure them as they like,
// so it is not kept from call to call.
class TileScope {
 public:
  TileScope() {
    static constexpr Shape shape;
    asm volatile("ldtilecfg %0" ::"m"(shape) : "memory");
  }
  ~TileScope() { asm volatile("tilerelease" ::: "memory"); }
  TileScope(const TileScope&) = delete;
  TileScope& operator=(const TileScope&) = delete;

 private:
  struct alignas(64) Shape {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  };
  static_assert(sizeof(Shape) == 64);
};

template <int T>
inline void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(T));
}
template <int T>
inline void tile_load(const void* from, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(T) : "memory");
}
template <int T>
inline void tile_store(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(T) : "memory");
}
// sums += signed bytes of rows times unsigned bytes of columns
template <int Sums, int Rows, int Columns>
inline void tile_add_bytes() {
  asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(Sums), "i"(Rows), "i"(Columns));
}
// sums += bfloat16 of rows times bfloat16 of columns, in float32
template <int Sums, int Rows, int Columns>
inline void tile_add_bfloat16() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(Sums), "i"(Rows), "i"(Columns));
}

}  // namespace astrai
#endif
