// Linear layers over weights as they lie on disk: row after row of int8, or of two int4 in a byte.
//
// Compiled on the machine that runs it, for its own processor, and used only after it was proved
// exact there. A tile of R tokens by C output channels keeps its sums in registers, so a weight is
// read once for every R tokens. The order of a sum depends on the width of the row alone, so a
// token's result does not depend on the tokens beside it.
//
// N tokens, O output channels, K inputs.

#include <immintrin.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "team.h"

using torch::headeronly::BFloat16;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

constexpr int64_t kChannels = 64;               // so many channels' weights stay in the L2 cache
constexpr int64_t kProductsPerThread = 1 << 16;  // fewer are not worth waking a thread
constexpr int64_t kAhead = 4096;                // bytes between reading and fetching a weight

// A format says how weights become a register, and how products with x are summed.
struct Bytes {
  static constexpr int64_t bytes(int64_t inputs) { return inputs; }
  static int32_t weight(const uint8_t* w, int64_t k) { return static_cast<int8_t>(w[k]); }
};

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
struct Integers : Bytes {  // x as signed bytes, weights made unsigned: 128 * sum(x) too much
  using Value = int8_t;
  using Total = int32_t;
  using Sum = __m512i;
  static constexpr char kName[] = "AVX512-VNNI";
  static constexpr int kStep = 64, kOffset = 128;
  static Sum zero() { return _mm512_setzero_si512(); }
  static auto load(const uint8_t* w, int64_t k) {
    return _mm512_xor_si512(_mm512_loadu_si512(w + k), _mm512_set1_epi8(-128));
  }
  static Sum add(Sum sum, const Value* x, __m512i w) {
    return _mm512_dpbusd_epi32(sum, w, _mm512_loadu_si512(x));
  }
  static int32_t total(Sum sum) { return _mm512_reduce_add_epi32(sum); }
};
#else
int32_t total_of(__m256i sum) {
  __m128i s = _mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
  s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
}
#if defined(__AVXVNNI__)
struct Integers : Bytes {  // as above, in half the width
  using Value = int8_t;
  using Total = int32_t;
  using Sum = __m256i;
  static constexpr char kName[] = "AVX-VNNI";
  static constexpr int kStep = 32, kOffset = 128;
  static Sum zero() { return _mm256_setzero_si256(); }
  static auto load(const uint8_t* w, int64_t k) {
    __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + k));
    return _mm256_xor_si256(bytes, _mm256_set1_epi8(-128));
  }
  static Sum add(Sum sum, const Value* x, __m256i w) {
    __m256i values = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
    return _mm256_dpbusd_avx_epi32(sum, w, values);
  }
  static int32_t total(Sum sum) { return total_of(sum); }
};
#else
struct Integers : Bytes {  // in 16 bits, because AVX2's products of bytes saturate
  using Value = int16_t;
  using Total = int32_t;
  using Sum = __m256i;
  static constexpr char kName[] = "AVX2";
  static constexpr int kStep = 16, kOffset = 0;
  static Sum zero() { return _mm256_setzero_si256(); }
  static auto load(const uint8_t* w, int64_t k) {
    return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w + k)));
  }
  static Sum add(Sum sum, const Value* x, __m256i w) {
    __m256i values = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(values, w));
  }
  static int32_t total(Sum sum) { return total_of(sum); }
};
#endif
#endif

struct Floats {  // sixteen products of floats, in two registers
  using Value = float;
  using Total = float;
  struct Sum { __m256 low, high; };
  static constexpr int kStep = 16, kOffset = 0;
  static Sum zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
  static Sum widen(__m128i bytes) {
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)),
            _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8)))};
  }
  static Sum add(Sum sum, const Value* x, Sum w) {
    return {_mm256_fmadd_ps(_mm256_loadu_ps(x), w.low, sum.low),
            _mm256_fmadd_ps(_mm256_loadu_ps(x + 8), w.high, sum.high)};
  }
  static Sum scaled(Sum so_far, Sum sum, float scale) {
    const __m256 factor = _mm256_set1_ps(scale);
    return {_mm256_fmadd_ps(sum.low, factor, so_far.low),
            _mm256_fmadd_ps(sum.high, factor, so_far.high)};
  }
  static float total(Sum sum) {
    __m256 both = _mm256_add_ps(sum.low, sum.high);
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps(both, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
  }
};

struct FloatsByBytes : Floats, Bytes {
  static Sum load(const uint8_t* w, int64_t k) {
    return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w + k)));
  }
};

struct FloatsByNibbles : Floats {  // byte j holds weights 2j (low) and 2j + 1, each plus 8
  static constexpr int64_t bytes(int64_t inputs) { return inputs / 2; }
  static int32_t weight(const uint8_t* w, int64_t k) { return (w[k / 2] >> (k % 2 * 4) & 15) - 8; }
  static Sum load(const uint8_t* w, int64_t k) {
    __m128i packed = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(w + k / 2));
    __m128i wide = _mm_cvtepu8_epi16(packed);
    __m128i nibbles = _mm_or_si128(wide, _mm_slli_epi16(wide, 4));
    nibbles = _mm_and_si128(nibbles, _mm_set1_epi8(15));
    return widen(_mm_sub_epi8(nibbles, _mm_set1_epi8(8)));
  }
};

template <class Format>
struct Rows {  // x in the type of the sums, with what each row's result is multiplied by
  std::vector<typename Format::Value> values;
  std::vector<float> scale;
  std::vector<int32_t> excess;
};

struct Weights {
  const uint8_t* data;
  const float* scale;  // one for each `group` inputs of each channel
  int64_t channels, inputs, group;
};

// The sum of each register's lanes.
template <class Format, int R, int C>
void totals(const typename Format::Sum (&sum)[R][C], typename Format::Total (&out)[R][C]) {
  int r = 0;
  if constexpr (std::is_same_v<Format, Integers> && sizeof(typename Format::Sum) == 32 && C == 2)
    for (; r + 2 <= R; r += 2) {  // of four together, in a third of the instructions
      const __m256i pairs = _mm256_hadd_epi32(_mm256_hadd_epi32(sum[r][0], sum[r][1]),
                                              _mm256_hadd_epi32(sum[r + 1][0], sum[r + 1][1]));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(&out[r][0]),
                       _mm_add_epi32(_mm256_castsi256_si128(pairs),
                                     _mm256_extracti128_si256(pairs, 1)));
    }
  for (; r < R; ++r)
    for (int c = 0; c < C; ++c) out[r][c] = Format::total(sum[r][c]);
}

template <class Format, int R, int C>
void tile(const Rows<Format>& rows, const Weights& w, int64_t n, int64_t o, float (&out)[R][C]) {
  const int64_t K = w.inputs, stride = Format::bytes(K), groups = K / w.group;
  const auto* x = rows.values.data() + n * K;
  const uint8_t* data = w.data + o * stride;
  typename Format::Sum of_groups[R][C];  // of floats: eight lanes until the last group
  for (auto& of_row : of_groups)
    for (auto& one : of_row) one = Format::zero();
  for (int64_t g = 0; g < groups; ++g) {
    typename Format::Sum sum[R][C];
    for (auto& of_row : sum)
      for (auto& one : of_row) one = Format::zero();
    const int64_t end = (g + 1) * w.group;
    int64_t k = g * w.group;
#pragma GCC unroll 4
    for (; k + Format::kStep <= end; k += Format::kStep)
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) {
        const uint8_t* channel = data + c * stride;
        auto weights = Format::load(channel, k);
        __builtin_prefetch(channel + Format::bytes(k) + kAhead);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) sum[r][c] = Format::add(sum[r][c], x + r * K + k, weights);
      }
    typename Format::Total whole[R][C];
    if constexpr (std::is_same_v<Format, Integers>) totals<Format, R, C>(sum, whole);
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < C; ++c) {
        const float scale = w.scale[(o + c) * groups + g];
        typename Format::Total total = 0;
        for (int64_t j = k; __builtin_expect(j < end, 0); ++j) {
          int32_t weight = Format::weight(data + c * stride, j);
          // GCC 12 would make a dot product of bytes of this loop, and take the weights for unsigned
          asm("" : "+r"(weight));
          total += x[r * K + j] * weight;
        }
        if constexpr (std::is_same_v<Format, Integers>) {
          // in whole steps the weights were too large by the offset
          total += whole[r][c] - rows.excess[n + r];
        } else {
          of_groups[r][c] = Format::scaled(of_groups[r][c], sum[r][c], scale);
          if (k == end) continue;
        }
        out[r][c] += static_cast<float>(total) * scale;
      }
  }
  if constexpr (!std::is_same_v<Format, Integers>)
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < C; ++c) out[r][c] += Format::total(of_groups[r][c]);
}

template <class Format, int R, int C, class T>
void store(const Rows<Format>& rows, const Weights& w, int64_t n, int64_t o, T* out) {
  float result[R][C] = {};
  tile<Format, R, C>(rows, w, n, o, result);
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c)
      out[(n + r) * w.channels + o + c] = static_cast<T>(result[r][c] * rows.scale[n + r]);
}

template <class Format, int R, class T>
void panel(const Rows<Format>& rows, const Weights& w, int64_t n, int64_t o, int64_t end, T* out) {
  // one row alone is bound by memory, read fastest in one stream; floats take two registers
  if (R > 1 && std::is_same_v<Format, Integers>)
    for (; o + 2 <= end; o += 2) store<Format, R, 2>(rows, w, n, o, out);
  for (; o < end; ++o) store<Format, R, 1>(rows, w, n, o, out);
}

template <class Format, class T>
void multiply(const Rows<Format>& rows, const Weights& w, int64_t N, T* out) {
  const int64_t grain = std::max<int64_t>(1, kProductsPerThread / (N * w.inputs));
  astrai::share(w.channels, grain, [&](int64_t begin, int64_t last) {
    for (int64_t o = begin; o < last; o += kChannels) {
      const int64_t end = std::min(o + kChannels, last);
      int64_t n = 0;
      for (; n + 4 <= N; n += 4) panel<Format, 4>(rows, w, n, o, end, out);
      if (N - n == 3) panel<Format, 3>(rows, w, n, o, end, out);
      if (N - n == 2) panel<Format, 2>(rows, w, n, o, end, out);
      if (N - n == 1) panel<Format, 1>(rows, w, n, o, end, out);
    }
  });
}

// Each row to int8 by its own largest value. The largest is sought among bit patterns, where that
// of a number that is none is the largest of all and thus not lost.
template <class T>
float quantize(const T* x, int64_t K, Integers::Value* values, int32_t* excess) {
  thread_local std::vector<float> row;
  row.resize(K);
  int32_t largest = 0, sum = 0;
  for (int64_t k = 0; k < K; ++k) {
    row[k] = static_cast<float>(x[k]);
    int32_t bits;
    std::memcpy(&bits, &row[k], sizeof bits);
    largest = std::max(largest, bits & 0x7fffffff);
  }
  float scale;
  std::memcpy(&scale, &largest, sizeof scale);
  scale = scale == 0 ? 1 : scale / 127;
  for (int64_t k = 0; k < K; ++k)
    values[k] = static_cast<Integers::Value>(static_cast<int32_t>(std::rint(row[k] / scale)));
  if (Integers::kOffset)
    for (int64_t k = 0; k < K / Integers::kStep * Integers::kStep; ++k) sum += values[k];
  *excess = sum * Integers::kOffset;
  return scale;
}

template <class Format, class T>
Tensor linear(const Tensor& x, const Weights& w) {
  const int64_t N = x.size(0), K = x.size(1), size[] = {N, w.channels}, stride[] = {w.channels, 1};
  AtenTensorHandle handle;
  const bool is_float = std::is_same_v<T, float>;
  int32_t dtype = is_float ? aoti_torch_dtype_float32() : aoti_torch_dtype_bfloat16();
  aoti_torch_empty_strided(2, size, stride, dtype, aoti_torch_device_type_cpu(), -1, &handle);
  Tensor out(handle);
  thread_local Rows<Format> kept;  // its memory, from call to call
  Rows<Format>& rows = kept;       // by this name it is the caller's in every thread
  rows.values.resize(N * K), rows.scale.resize(N), rows.excess.resize(N);
  const T* data = x.const_data_ptr<T>();
  astrai::share(N, 1 + kProductsPerThread / (K + 1), [&](int64_t n, int64_t end) {
    for (; n < end; ++n)
      if constexpr (std::is_same_v<Format, Integers>) {
        rows.scale[n] = quantize(data + n * K, K, rows.values.data() + n * K, &rows.excess[n]);
      } else {
        std::copy_n(data + n * K, K, rows.values.data() + n * K);
        rows.scale[n] = 1;
      }
  });
  if (N > 0) multiply<Format>(rows, w, N, out.mutable_data_ptr<T>());
  return out;
}

template <class Format>
Tensor linear(const Tensor& x, const Tensor& weight, const Tensor& scale) {
  const int64_t O = weight.size(0), K = x.size(1);
  STD_TORCH_CHECK(x.is_cpu() && weight.is_cpu() && scale.is_cpu(), "tensors must be on the CPU");
  STD_TORCH_CHECK(x.is_contiguous() && weight.is_contiguous() && scale.is_contiguous(),
                  "tensors must be contiguous");
  STD_TORCH_CHECK(Format::bytes(K) == weight.size(1) && K > 0 && scale.size(0) == O,
                  "shapes of x, weight and scale do not fit");
  const int64_t group = scale.dim() == 2 ? K / scale.size(1) : K;
  STD_TORCH_CHECK(K % group == 0, "groups must divide the inputs");
  STD_TORCH_CHECK(scale.scalar_type() == ScalarType::Float, "scales must be float32");
  const Weights w{static_cast<const uint8_t*>(weight.data_ptr()), scale.const_data_ptr<float>(),
                  O, K, group};
  if (x.scalar_type() == ScalarType::Float) return linear<Format, float>(x, w);
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::BFloat16, "x must be float32 or bfloat16");
  return linear<Format, BFloat16>(x, w);
}

Tensor w8a8(Tensor x, Tensor weight, Tensor scale, int64_t) {
  return linear<Integers>(x, weight, scale);
}
Tensor int8(Tensor x, Tensor weight, Tensor scale) {
  return linear<FloatsByBytes>(x, weight, scale);
}
Tensor int4(Tensor x, Tensor weight, Tensor scale) {
  return linear<FloatsByNibbles>(x, weight, scale);
}

using Library = torch::stable::detail::StableLibrary;

void implement(Library& library) {
  library.impl("w8a8_linear", TORCH_BOX(&w8a8));
  library.impl("int8_linear", TORCH_BOX(&int8));
  library.impl("int4_linear", TORCH_BOX(&int4));
}

}  // namespace

STABLE_TORCH_LIBRARY(astrai_native, library) {
  library.def("w8a8_linear(Tensor x, Tensor weight, Tensor scale, int handle) -> Tensor");
  library.def("int8_linear(Tensor x, Tensor weight, Tensor scale) -> Tensor");
  library.def("int4_linear(Tensor x, Tensor weight, Tensor scale) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(astrai_native, CPU, library) { implement(library); }

// From now on the project's own operators run here, without Python between them.
extern "C" void astrai_adopt() {
  static Library library(Library::Kind::IMPL, "astrai", "CPU", __FILE__, __LINE__);
  static bool is_done = (implement(library), true);
  (void)is_done;
}

extern "C" const char* astrai_instructions() { return Integers::kName; }
