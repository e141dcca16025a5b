// Products and sums of floats in which a row's result depends on that row alone.
//
// A library's matrix product may sum in another order for another number of rows. Here each output
// is one dot product: a register's lanes run over the inputs from the first to the last, and are
// added up at the end, whatever else is computed beside it. Blocks of rows and channels share what
// they read and no sum.
//
// N rows, H heads, I inputs, O outputs, E experts, K experts of a row, R = N K visits.

#include <immintrin.h>
#include <algorithm>
#include <cmath>
#include <cstdint>

#include "quantization/team.h"
#include "tensors.h"

namespace {

using namespace astrai;

constexpr int64_t kProductsPerThread = 1 << 16;  // fewer are not worth waking a thread
constexpr int64_t kRows = 48, kChannels = 32;    // of a block: their inputs stay in the L2 cache

#ifdef __AVX512F__
using Lanes = __m512;
constexpr int kLanes = 16, R = 6, C = 4;  // R C sums, R inputs and a weight fill the registers
Lanes load(const float* x) { return _mm512_loadu_ps(x); }
void save(float* to, Lanes x) { _mm512_storeu_ps(to, x); }
Lanes nothing() { return _mm512_setzero_ps(); }
Lanes fma(Lanes a, Lanes b, Lanes c) { return _mm512_fmadd_ps(a, b, c); }
Lanes load(const BFloat16* x) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
__m256 half(Lanes x) {
  const __m256 high = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(x), 1));
  return _mm256_add_ps(_mm512_castps512_ps256(x), high);
}
#else
using Lanes = __m256;
constexpr int kLanes = 8, R = 3, C = 4;
Lanes load(const float* x) { return _mm256_loadu_ps(x); }
void save(float* to, Lanes x) { _mm256_storeu_ps(to, x); }
Lanes nothing() { return _mm256_setzero_ps(); }
Lanes fma(Lanes a, Lanes b, Lanes c) { return _mm256_fmadd_ps(a, b, c); }
Lanes load(const BFloat16* x) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
__m256 half(Lanes x) { return x; }
#endif

float total_of(Lanes x) {
  const __m256 eight = half(x);
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

// The last inputs of a row, 0 where there are no more.
template <class T>
Lanes rest(const T* x, int64_t count) {
  float numbers[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) numbers[i] = static_cast<float>(x[i]);
  return load(numbers);
}

template <class W>
struct Product {
  const float* x;   // (N, H, I), heads and inputs side by side
  const W* weight;  // (H, O, I)
  float* out;       // (N, H, O)
  int64_t heads, inputs, outputs, stride;  // of x, from row to row
};

// r rows by c channels.
template <int r, int c, class W>
void tile(const Product<W>& p, int64_t n, int64_t h, int64_t o) {
  const float* x = p.x + n * p.stride + h * p.inputs;
  const W* w = p.weight + (h * p.outputs + o) * p.inputs;
  Lanes sum[r][c];
#pragma GCC unroll 8
  for (int i = 0; i < r; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < c; ++j) sum[i][j] = nothing();
  const auto add = [&](auto&& read_x, auto&& read_w) __attribute__((always_inline)) {
    Lanes of_x[r];
#pragma GCC unroll 8
    for (int i = 0; i < r; ++i) of_x[i] = read_x(x + i * p.stride);
#pragma GCC unroll 8
    for (int j = 0; j < c; ++j) {
      const Lanes of_w = read_w(w + j * p.inputs);
#pragma GCC unroll 8
      for (int i = 0; i < r; ++i) sum[i][j] = fma(of_x[i], of_w, sum[i][j]);
    }
  };
  int64_t k = 0;
  for (; k + kLanes <= p.inputs; k += kLanes) {
    const auto read = [k](auto* row) __attribute__((always_inline)) { return load(row + k); };
    add(read, read);
  }
  if (k < p.inputs) {
    const auto read = [&](auto* row) { return rest(row + k, p.inputs - k); };
    add(read, read);
  }
  float* to = p.out + (n * p.heads + h) * p.outputs + o;
#pragma GCC unroll 8
  for (int i = 0; i < r; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < c; ++j) to[i * p.heads * p.outputs + j] = total_of(sum[i][j]);
}

template <int r, class W>
void rows(const Product<W>& p, int64_t n, int64_t h, int64_t o, int64_t end) {
  for (; o + C <= end; o += C) tile<r, C>(p, n, h, o);
  for (; o < end; ++o) tile<r, 1>(p, n, h, o);
}

// As many rows at once as fit, then fewer.
template <int r, class W>
void block(const Product<W>& p, int64_t n, int64_t last, int64_t h, int64_t o, int64_t end) {
  for (; n + r <= last; n += r) rows<r>(p, n, h, o, end);
  if constexpr (r > 1) block<(r > 4 ? 4 : r > 2 ? 2 : 1)>(p, n, last, h, o, end);
}

template <class W>
void multiply(const Product<W>& p, int64_t N) {
  const int64_t row_blocks = (N + kRows - 1) / kRows;
  const int64_t channel_blocks = (p.outputs + kChannels - 1) / kChannels;
  const int64_t of_block = std::min(N, kRows) * std::min(p.outputs, kChannels) * p.inputs;
  const int64_t count = row_blocks * p.heads * channel_blocks;
  share(count, 1 + kProductsPerThread / (of_block + 1), [&](int64_t item, int64_t last) {
    for (; item < last; ++item) {
      // rows innermost: a block of weights is read once
      const int64_t begin = item % row_blocks * kRows, end = std::min(begin + kRows, N);
      const int64_t h = item / row_blocks / channel_blocks;
      const int64_t o = item / row_blocks % channel_blocks * kChannels;
      const int64_t stop = std::min(o + kChannels, p.outputs);
      block<R>(p, begin, end, h, o, stop);
    }
  });
}

void check_floats(const Tensor& x, int64_t dims) {
  STD_TORCH_CHECK(x.is_cpu() && x.is_contiguous() && x.dim() == dims &&
                      x.scalar_type() == ScalarType::Float,
                  "a contiguous float32 tensor of another shape is wanted");
}

// x (N, H, I) float32 by weight (H, O, I) to (N, H, O) float32
Tensor product(Tensor x, Tensor weight) {
  check_floats(x, 3);
  STD_TORCH_CHECK(weight.is_cpu() && weight.is_contiguous() && weight.dim() == 3,
                  "the weight must be (H, O, I), contiguous, on the CPU");
  const int64_t N = x.size(0), H = x.size(1), I = x.size(2), O = weight.size(1);
  STD_TORCH_CHECK(weight.size(0) == H && weight.size(2) == I, "shapes of x and weight do not fit");
  Tensor out = empty({N, H, O}, aoti_torch_dtype_float32());
  const auto with = [&]<class W>(const W* data) {
    multiply<W>({x.const_data_ptr<float>(), data, out.mutable_data_ptr<float>(), H, I, O, H * I},
                N);
  };
  if (weight.scalar_type() == ScalarType::Float) {
    with(weight.const_data_ptr<float>());
  } else {
    STD_TORCH_CHECK(weight.scalar_type() == ScalarType::BFloat16,
                    "the weight must be float32 or bfloat16");
    with(weight.const_data_ptr<BFloat16>());
  }
  return out;
}

// Logits (N, E) to a router's scores: the softmax of each row, or the sigmoid of each number.
Tensor scores(Tensor logits, bool is_softmax) {
  check_floats(logits, 2);
  const int64_t N = logits.size(0), E = logits.size(1);
  Tensor out = empty({N, E}, aoti_torch_dtype_float32());
  const float* from = logits.const_data_ptr<float>();
  float* to = out.mutable_data_ptr<float>();
  share(N, 1 + (1 << 10) / (E + 1), [&](int64_t n, int64_t end) {
    for (; n < end; ++n) {
      const float* x = from + n * E;
      float* y = to + n * E;
      if (!is_softmax) {
        for (int64_t e = 0; e < E; ++e) y[e] = 1.0f / (1.0f + std::exp(-x[e]));
        continue;
      }
      const float largest = *std::max_element(x, x + E);
      float total = 0;
      for (int64_t e = 0; e < E; ++e) total += y[e] = std::exp(x[e] - largest);
      for (int64_t e = 0; e < E; ++e) y[e] /= total;
    }
  });
  return out;
}

// Each row's experts' outputs, weighted and added up in the order of its choices: visits (R, I)
// float32 or bfloat16, places (N, K) of them and weights (N, K) to (N, I) float32.
Tensor mix(Tensor visits, Tensor places, Tensor weights) {
  check_floats(weights, 2);
  const int64_t N = weights.size(0), K = weights.size(1), I = visits.size(1);
  STD_TORCH_CHECK(visits.is_contiguous() && visits.dim() == 2 && visits.size(0) == N * K &&
                      places.is_contiguous() && places.dim() == 2 && places.size(0) == N &&
                      places.size(1) == K && places.scalar_type() == ScalarType::Long,
                  "visits, places and weights do not fit");
  Tensor out = empty({N, I}, aoti_torch_dtype_float32());
  const int64_t* place = places.const_data_ptr<int64_t>();
  const float* weight = weights.const_data_ptr<float>();
  float* sums = out.mutable_data_ptr<float>();
  const auto with = [&]<class T>(const T* data) {
    share(N, 1 + (1 << 13) / (K * I + 1), [&](int64_t n, int64_t end) {
      for (; n < end; ++n) {
        float* sum = sums + n * I;
        std::fill_n(sum, I, 0.0f);
        for (int64_t k = n * K; k < (n + 1) * K; ++k) {
          const T* from = data + place[k] * I;
          const float share = weight[k];
          for (int64_t i = 0; i < I; ++i) sum[i] += static_cast<float>(from[i]) * share;
        }
      }
    });
  };
  if (visits.scalar_type() == ScalarType::Float) {
    with(visits.const_data_ptr<float>());
  } else {
    STD_TORCH_CHECK(visits.scalar_type() == ScalarType::BFloat16,
                    "visits must be float32 or bfloat16");
    with(visits.const_data_ptr<BFloat16>());
  }
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY(astrai_rowwise, library) {
  library.def("product(Tensor x, Tensor weight) -> Tensor");
  library.def("scores(Tensor logits, bool is_softmax) -> Tensor");
  library.def("mix(Tensor visits, Tensor places, Tensor weights) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(astrai_rowwise, CPU, library) {
  library.impl("product", TORCH_BOX(&product));
  library.impl("scores", TORCH_BOX(&scores));
  library.impl("mix", TORCH_BOX(&mix));
}
