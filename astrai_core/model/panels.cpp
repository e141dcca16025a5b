// Products of bfloat16 rows with bfloat16 weights that were packed for AVX512-BF16.
//
// Panels: 64 channels lie together, and a panel holds, for every two inputs, both numbers of each of
// its channels. One register then has 16 channels, no lane is ever summed with another, and a panel
// is read from one end to the other. Sums are float32 and go over the inputs in one order, so a
// row's result does not depend on the rows beside it, nor on the number of threads.
//
// N rows, O output channels, K inputs (even), P = ceil(O / 64) panels, S = K / 2 steps.

#include <cstring>

#include "quantization/team.h"
#include "tensors.h"

#ifdef __AVX512BF16__

namespace {

using namespace astrai;

constexpr int64_t kPanel = 64, kStep = 2, kPanelStep = kPanel * kStep;
constexpr int64_t kTileRows = 6;  // by four registers of channels: 24 sums, 4 weights, 1 input
constexpr int64_t kProductsPerPiece = 1 << 17;

int64_t panels_of(int64_t channels) { return (channels + kPanel - 1) / kPanel; }

// By hand, because GCC 12 copies the sums of a tile around the intrinsic.
inline __attribute__((always_inline)) void add_products(__m512& sum, __m512i w, __m512i x) {
  asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(w), "v"(x));
}

struct Weights {
  const BFloat16* data;  // (P, S, 64, 2)
  int64_t channels, steps;
};

void store(float* out, __mmask16 mask, __m512 value) { _mm512_mask_storeu_ps(out, mask, value); }
void store(BFloat16* out, __mmask16 mask, __m512 value) {
  _mm256_mask_storeu_epi16(out, mask, reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(value)));
}

template <int R, class Out>
void tile(const BFloat16* x, const Weights& w, int64_t n, int64_t panel, Out* out) {
  const int64_t width = w.steps * kStep;
  const BFloat16* row = x + n * width;
  const BFloat16* data = w.data + panel * w.steps * kPanelStep;
  __m512 sum[R][4];
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) sum[r][c] = _mm512_setzero_ps();
  for (int64_t s = 0; s < w.steps; ++s, data += kPanelStep) {
    __m512i weight[4];
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) weight[c] = _mm512_loadu_si512(data + c * 32);
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
      int32_t two;
      std::memcpy(&two, row + r * width + s * kStep, sizeof two);
      const __m512i input = _mm512_set1_epi32(two);
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c) add_products(sum[r][c], weight[c], input);
    }
  }
  // unrolled to the end, or the sums would not be registers
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const int64_t o = panel * kPanel + c * 16, left = w.channels - o;
    const __mmask16 mask = _cvtu32_mask16(_bzhi_u32(0xffff, std::clamp<int64_t>(left, 0, 16)));
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) store(out + (n + r) * w.channels + o, mask, sum[r][c]);
  }
}

template <class Out>
void multiply(const BFloat16* x, const Weights& w, int64_t N, Out* out) {
  const int64_t per_panel = N * w.steps * kPanelStep;
  share(panels_of(w.channels), 1 + kProductsPerPiece / (per_panel + 1),
        [&](int64_t panel, int64_t last) {
          for (; panel < last; ++panel) {
            int64_t n = 0;
            for (; N - n >= kTileRows; n += kTileRows) tile<kTileRows>(x, w, n, panel, out);
            switch (N - n) {
              case 5: tile<5>(x, w, n, panel, out); break;
              case 4: tile<4>(x, w, n, panel, out); break;
              case 3: tile<3>(x, w, n, panel, out); break;
              case 2: tile<2>(x, w, n, panel, out); break;
              case 1: tile<1>(x, w, n, panel, out); break;
            }
          }
        });
}

Tensor pack(Tensor weight) {
  STD_TORCH_CHECK(weight.dim() == 2 && weight.is_contiguous() && weight.size(1) % kStep == 0 &&
                      weight.scalar_type() == ScalarType::BFloat16,
                  "weight must be (O, K) bfloat16, K even");
  const int64_t O = weight.size(0), K = weight.size(1), S = K / kStep;
  Tensor out = empty({panels_of(O), S, kPanel, kStep}, aoti_torch_dtype_bfloat16());
  const auto* from = static_cast<const BFloat16*>(weight.data_ptr());
  auto* to = static_cast<BFloat16*>(out.data_ptr());
  share(panels_of(O), 1, [&](int64_t panel, int64_t last) {
    for (; panel < last; ++panel) {
      BFloat16* block = to + panel * S * kPanelStep;
      for (int64_t c = 0; c < kPanel; ++c) {
        const int64_t o = panel * kPanel + c;
        for (int64_t s = 0; s < S; ++s) {
          int32_t two = 0;
          if (o < O) std::memcpy(&two, from + o * K + s * kStep, sizeof two);
          std::memcpy(block + s * kPanelStep + c * kStep, &two, sizeof two);
        }
      }
    }
  });
  return out;
}

Tensor linear(Tensor x, Tensor panels, int64_t channels, bool is_wide) {
  STD_TORCH_CHECK(x.dim() == 2 && x.is_contiguous() && x.scalar_type() == ScalarType::BFloat16,
                  "x must be (N, K) bfloat16");
  STD_TORCH_CHECK(panels.dim() == 4 && panels.is_contiguous() &&
                      panels.scalar_type() == ScalarType::BFloat16 &&
                      panels.size(0) == panels_of(channels) && panels.size(2) == kPanel &&
                      panels.size(1) * kStep == x.size(1),
                  "shapes of x and panels do not fit");
  const int64_t N = x.size(0);
  const Weights w{static_cast<const BFloat16*>(panels.data_ptr()), channels, panels.size(1)};
  const auto* from = static_cast<const BFloat16*>(x.data_ptr());
  Tensor out =
      empty({N, channels}, is_wide ? aoti_torch_dtype_float32() : aoti_torch_dtype_bfloat16());
  if (is_wide)
    multiply(from, w, N, static_cast<float*>(out.data_ptr()));
  else
    multiply(from, w, N, static_cast<BFloat16*>(out.data_ptr()));
  return out;
}

// Every library of ours has the same team: the linker makes one of an inline function's static.
void use_threads(int64_t threads) { Team::get().use(threads); }

}  // namespace

STABLE_TORCH_LIBRARY(astrai_panels, library) {
  library.def("use_threads(int threads) -> ()");
  library.def("pack(Tensor weight) -> Tensor");
  library.def("linear(Tensor x, Tensor panels, int channels, bool is_wide) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(astrai_panels, CPU, library) {
  library.impl("pack", TORCH_BOX(&pack));
  library.impl("linear", TORCH_BOX(&linear));
}
STABLE_TORCH_LIBRARY_IMPL(astrai_panels, CompositeExplicitAutograd, library) {
  library.impl("use_threads", TORCH_BOX(&use_threads));
}

#endif
