// A block of a model in int8 in three operators and attention, with nothing stored between them.
//
//   qkv         queries, keys and values of the normed stream, heads normed and rotated
//   add_linear  the stream plus the attention's output, projected
//   mlp         the stream plus the feed-forward network of the normed stream
//
// N tokens; H and KV heads of width D; O output channels, K inputs, P panels and S steps of packed
// weights; F width of the MLP.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

#include "quantization/packed.h"
#include "rows.h"

#ifdef ASTRAI_HAS_PACKED

using torch::headeronly::BFloat16;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

using namespace astrai;

constexpr int64_t kNumbersPerPiece = 1 << 11;
constexpr int64_t kRowsOfChunk = 96;

Tensor empty(std::initializer_list<int64_t> size, int32_t dtype) {
  int64_t stride[4], next = 1;
  for (int64_t d = static_cast<int64_t>(size.size()) - 1; d >= 0; next *= size.begin()[d--])
    stride[d] = next;
  AtenTensorHandle handle;
  aoti_torch_empty_strided(size.size(), size.begin(), stride, dtype, aoti_torch_device_type_cpu(),
                           -1, &handle);
  return Tensor(handle);
}

int32_t code_of(ScalarType type) {
  return type == ScalarType::Float ? aoti_torch_dtype_float32() : aoti_torch_dtype_bfloat16();
}

template <class F>
void for_type(const Tensor& x, F&& f) {
  STD_TORCH_CHECK(x.is_contiguous(), "tensors must be contiguous");
  if (x.scalar_type() == ScalarType::Float) return f(static_cast<float*>(nullptr));
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::BFloat16, "x must be float32 or bfloat16");
  f(static_cast<BFloat16*>(nullptr));
}

template <class F>
void for_rows(int64_t N, int64_t width, F&& f) {
  share(N, 1 + kNumbersPerPiece / width, [&](int64_t n, int64_t end) {
    for (; n < end; ++n) f(n);
  });
}

// Many rows pass through an operator a few at a time, on one thread each, so that what stands between
// its steps stays in that core's cache; few rows are shared by their channels.
template <class F>
void in_chunks(int64_t N, F&& f) {
  if (N < 2 * kRowsOfChunk) return f(0, N);
  const int64_t chunks = (N + kRowsOfChunk - 1) / kRowsOfChunk;
  share(chunks, 1, [&](int64_t chunk, int64_t last) {
    for (; chunk < last; ++chunk)
      f(chunk * kRowsOfChunk, std::min(N, (chunk + 1) * kRowsOfChunk));
  });
}

Packed weights_of(const Tensor& packed, const Tensor& scale, int64_t K) {
  STD_TORCH_CHECK(packed.dim() == 4 && packed.is_contiguous() && scale.is_contiguous() &&
                      scale.scalar_type() == ScalarType::Float,
                  "weights must be packed, scales float32");
  STD_TORCH_CHECK(packed.size(0) == panels_of(scale.size(0)) && packed.size(1) == steps_of(K),
                  "shapes of x, weight and scale do not fit");
  return {static_cast<const uint8_t*>(packed.data_ptr()), scale.const_data_ptr<float>(),
          scale.size(0), packed.size(1)};
}

// Memory that a thread keeps from call to call.
template <int kUse>
std::vector<float>& scratch(int64_t size) {
  thread_local std::vector<float> kept;
  if (static_cast<int64_t>(kept.size()) < size) kept.resize(size);
  return kept;
}

Rows& rows_of(int64_t N, int64_t K) {
  thread_local Rows kept;
  kept.resize(N, K);
  return kept;
}

template <class T>
void quantize(const T* x, int64_t N, int64_t K, Rows& rows) {
  for_rows(N, K, [&](int64_t n) {
    if constexpr (std::is_same_v<T, float>) {
      rows.quantize(n, x + n * K, K);
    } else {
      float* row = scratch<0>(K).data();
      for (int64_t k = 0; k < K; ++k) row[k] = static_cast<float>(x[n * K + k]);
      rows.quantize(n, row, K);
    }
  });
}

template <class T>
void quantize_normed(const T* x, const T* weight, double eps, int64_t N, int64_t K, Rows& rows) {
  for_rows(N, K, [&](int64_t n) {
    float* row = scratch<0>(K).data();
    normalize(x + n * K, weight, K, eps, row);
    rows.quantize(n, row, K);
  });
}

// Sixteen bfloat16, rounded to the nearest, to the even one of two; what is no number stays none.
inline __m256i rounded(__m512 x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 is_nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  const __m512i half = _mm512_srli_epi32(up, 16);
  return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(half, is_nan, _mm512_set1_epi32(0x7fc0)));
}

// Products into rows of `width` numbers, added to those of `base` where there is one.
template <class T>
auto into(T* out, int64_t width, const T* base) {
  return [=](int64_t n, int64_t o, __m512 value, __mmask16 mask) {
    const int64_t at = n * width + o;
    if constexpr (std::is_same_v<T, float>) {
      if (base) value = _mm512_add_ps(_mm512_maskz_loadu_ps(mask, base + at), value);
      _mm512_mask_storeu_ps(out + at, mask, value);
    } else {
      if (base) {
        const __m256i bits = _mm256_maskz_loadu_epi16(mask, base + at);
        const __m512i wide = _mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16);
        value = _mm512_add_ps(_mm512_castsi512_ps(wide), value);
      }
      _mm256_mask_storeu_epi16(out + at, mask, rounded(value));
    }
  };
}

Tensor pack_weight(Tensor weight) {
  STD_TORCH_CHECK(weight.dim() == 2 && weight.is_contiguous() &&
                      weight.scalar_type() == ScalarType::Char,
                  "weight must be (O, K) int8");
  const int64_t O = weight.size(0), K = weight.size(1);
  Tensor out = empty({panels_of(O), steps_of(K), kPanel, kStep}, aoti_torch_dtype_uint8());
  pack(static_cast<const int8_t*>(weight.data_ptr()), O, K, static_cast<uint8_t*>(out.data_ptr()));
  return out;
}

// Rows of a packed matrix, as an embedding has them: (N, K) float32.
Tensor lookup(Tensor ids, Tensor packed, Tensor scale, int64_t K) {
  const Packed w = weights_of(packed, scale, K);
  STD_TORCH_CHECK(ids.is_contiguous() && ids.scalar_type() == ScalarType::Long,
                  "ids must be int64");
  const int64_t N = ids.numel();
  const int64_t* id = ids.const_data_ptr<int64_t>();
  for (int64_t n = 0; n < N; ++n)
    STD_TORCH_CHECK(id[n] >= 0 && id[n] < w.channels, "an id is beyond the vocabulary");
  Tensor out = empty({N, K}, aoti_torch_dtype_float32());
  float* to = out.mutable_data_ptr<float>();
  for_rows(N, K, [&](int64_t n) {
    for (int64_t k = 0; k < K; ++k)
      to[n * K + k] =
          static_cast<float>(w.data[weight_at(w.steps, id[n], k)] - 128) * w.scale[id[n]];
  });
  return out;
}

Tensor linear(Tensor x, Tensor packed, Tensor scale) {
  const int64_t N = x.size(0), K = x.size(1), O = scale.size(0);
  const Packed w = weights_of(packed, scale, K);
  Tensor out = empty({N, O}, code_of(x.scalar_type()));
  for_type(x, [&]<class T>(T*) {
    const T* from = x.const_data_ptr<T>();
    T* to = out.mutable_data_ptr<T>();
    in_chunks(N, [&](int64_t n, int64_t end) {
      Rows& rows = rows_of(end - n, K);
      quantize(from + n * K, end - n, K, rows);
      multiply(rows, w, end - n, into<T>(to + n * O, O, nullptr));
    });
  });
  return out;
}

Tensor add_linear(Tensor x, Tensor rows_in, Tensor packed, Tensor scale) {
  const int64_t N = rows_in.size(0), K = rows_in.numel() / std::max<int64_t>(N, 1);
  const int64_t O = scale.size(0);
  const Packed w = weights_of(packed, scale, K);
  STD_TORCH_CHECK(x.dim() == 2 && x.size(0) == N && x.size(1) == O && rows_in.is_contiguous(),
                  "x must be (N, O)");
  Tensor out = empty({N, O}, code_of(x.scalar_type()));
  for_type(rows_in, [&]<class U>(U*) {
    for_type(x, [&]<class T>(T*) {
      const U* from = rows_in.const_data_ptr<U>();
      const T* base = x.const_data_ptr<T>();
      T* to = out.mutable_data_ptr<T>();
      in_chunks(N, [&](int64_t n, int64_t end) {
        Rows& rows = rows_of(end - n, K);
        quantize(from + n * K, end - n, K, rows);
        multiply(rows, w, end - n, into<T>(to + n * O, O, base + n * O));
      });
    });
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> qkv(Tensor x, Tensor norm, double norm_eps, Tensor packed,
                                       Tensor scale, std::optional<Tensor> q_weight,
                                       std::optional<Tensor> k_weight, Tensor cos, Tensor sin,
                                       int64_t H, int64_t KV, double eps, bool interleaved) {
  const int64_t N = x.size(0), K = x.size(1), width = scale.size(0), D = width / (H + 2 * KV);
  const Packed w = weights_of(packed, scale, K);
  STD_TORCH_CHECK(width == D * (H + 2 * KV) && D % 2 == 0 && D <= 1024 && norm.size(0) == K &&
                      norm.scalar_type() == x.scalar_type(),
                  "shapes of x, norm and weight do not fit");
  STD_TORCH_CHECK(cos.is_contiguous() && sin.is_contiguous() && cos.size(0) == N &&
                      cos.size(1) == D / 2 && cos.scalar_type() == ScalarType::Float,
                  "cos and sin must be (N, D / 2) float32");
  const int32_t dtype = aoti_torch_dtype_float32();
  Tensor q = empty({N, H, D}, dtype), k = empty({N, KV, D}, dtype), v = empty({N, KV, D}, dtype);
  for_type(x, [&]<class T>(T*) {
    const T *from = x.const_data_ptr<T>(), *of_x = norm.const_data_ptr<T>();
    const T* of_q = q_weight ? q_weight->const_data_ptr<T>() : nullptr;
    const T* of_k = k_weight ? k_weight->const_data_ptr<T>() : nullptr;
    const float *c = cos.const_data_ptr<float>(), *s = sin.const_data_ptr<float>();
    float *to_q = q.mutable_data_ptr<float>(), *to_k = k.mutable_data_ptr<float>(),
          *to_v = v.mutable_data_ptr<float>();
    in_chunks(N, [&](int64_t first, int64_t end) {
      const int64_t count = end - first;
      Rows& rows = rows_of(count, K);
      quantize_normed(from + first * K, of_x, norm_eps, count, K, rows);
      float* all = scratch<1>(count * width).data();
      multiply(rows, w, count, into<float>(all, width, nullptr));
      for_rows(count, width, [&](int64_t i) {
        const int64_t n = first + i;
        const float *row = all + i * width, *cosines = c + n * D / 2, *sines = s + n * D / 2;
        for (int64_t h = 0; h < H; ++h, row += D)
          turn(row, of_q, cosines, sines, D, eps, interleaved, to_q + (n * H + h) * D);
        for (int64_t h = 0; h < KV; ++h, row += D)
          turn(row, of_k, cosines, sines, D, eps, interleaved, to_k + (n * KV + h) * D);
        std::copy_n(row, KV * D, to_v + n * KV * D);
      });
    });
  });
  return {q, k, v};
}

Tensor mlp(Tensor x, Tensor norm, double eps, Tensor packed_gate_up, Tensor gate_up_scale,
           Tensor packed_down, Tensor down_scale) {
  const int64_t N = x.size(0), K = x.size(1), F = gate_up_scale.size(0) / 2;
  const Packed gate_up = weights_of(packed_gate_up, gate_up_scale, K);
  const Packed down = weights_of(packed_down, down_scale, F);
  STD_TORCH_CHECK(down.channels == K && norm.size(0) == K && norm.scalar_type() == x.scalar_type(),
                  "shapes of x, norm and weights do not fit");
  Tensor out = empty({N, K}, code_of(x.scalar_type()));
  for_type(x, [&]<class T>(T*) {
    const T *from = x.const_data_ptr<T>(), *of_x = norm.const_data_ptr<T>();
    T* to = out.mutable_data_ptr<T>();
    in_chunks(N, [&](int64_t first, int64_t end) {
      const int64_t count = end - first;
      Rows& rows = rows_of(count, K);
      quantize_normed(from + first * K, of_x, eps, count, K, rows);
      float* both = scratch<1>(count * 2 * F).data();
      multiply(rows, gate_up, count, into<float>(both, 2 * F, nullptr));
      rows.resize(count, F);
      for_rows(count, F, [&](int64_t n) {
        float* row = scratch<0>(F).data();
        gate(both + n * 2 * F, both + n * 2 * F + F, F, row);
        rows.quantize(n, row, F);
      });
      multiply(rows, down, count, into<T>(to + first * K, K, from + first * K));
    });
  });
  return out;
}

// Every library of ours has the same team: the linker makes one of an inline function's static.
void use_threads(int64_t threads) { Team::get().use(threads); }

}  // namespace

STABLE_TORCH_LIBRARY(astrai_packed, library) {
  library.def("use_threads(int threads) -> ()");
  library.def("pack(Tensor weight) -> Tensor");
  library.def("lookup(Tensor ids, Tensor packed, Tensor scale, int inputs) -> Tensor");
  library.def("linear(Tensor x, Tensor packed, Tensor scale) -> Tensor");
  library.def("add_linear(Tensor x, Tensor rows, Tensor packed, Tensor scale) -> Tensor");
  library.def(
      "qkv(Tensor x, Tensor norm, float norm_eps, Tensor packed, Tensor scale, Tensor? q_weight, "
      "Tensor? k_weight, Tensor cos, Tensor sin, int num_heads, int num_kv_heads, float eps, "
      "bool interleaved) -> (Tensor, Tensor, Tensor)");
  library.def(
      "mlp(Tensor x, Tensor norm, float eps, Tensor gate_up, Tensor gate_up_scale, Tensor down, "
      "Tensor down_scale) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(astrai_packed, CPU, library) {
  library.impl("pack", TORCH_BOX(&pack_weight));
  library.impl("lookup", TORCH_BOX(&lookup));
  library.impl("linear", TORCH_BOX(&linear));
  library.impl("add_linear", TORCH_BOX(&add_linear));
  library.impl("qkv", TORCH_BOX(&qkv));
  library.impl("mlp", TORCH_BOX(&mlp));
}

STABLE_TORCH_LIBRARY_IMPL(astrai_packed, CompositeExplicitAutograd, library) {
  library.impl("use_threads", TORCH_BOX(&use_threads));
}

#endif
