// Latent attention of a model in int8 in two operators, and attention between them.
//
//   queries     queries and keys of the normed stream, as the cache of latents meets them
//   add_output  the stream plus the attention's output, unfolded into heads and projected
//
// A head's queries are folded into the width of the latent by its part of W_kv_b, and its mixed
// latents unfolded by the other part: `attention.py` says why. Those two are products of floats.
//
// N tokens; K numbers of the stream; H heads; P unrotated and R rotated numbers of a query, V of a
// value; r of a latent, Q of a query's latent.

#include <optional>
#include <tuple>

#include "float_products.h"
#include "packed_operators.h"

#ifdef ASTRAI_HAS_PACKED

namespace {

using namespace astrai;

// Each head of x by its own matrix (H, I, O), stored in the model's type.
void multiply_heads(const float* x, int64_t x_row, int64_t x_head, const Tensor& weight,
                    float* out, int64_t out_row, int64_t out_head, int64_t N) {
  for_type(weight, [&]<class W>(W*) {
    multiply_floats<W>({x, x_row, x_head, weight.const_data_ptr<W>(), out, out_row, out_head,
                        weight.size(0), weight.size(1), weight.size(2)},
                       N);
  });
}

std::tuple<Tensor, Tensor> queries(Tensor x, Tensor norm, double norm_eps, Tensor q_packed,
                                   Tensor q_scale, std::optional<Tensor> q_norm, double q_eps,
                                   std::optional<Tensor> q_b_packed,
                                   std::optional<Tensor> q_b_scale, Tensor kv_packed,
                                   Tensor kv_scale, Tensor kv_norm, double kv_eps, Tensor to_latent,
                                   Tensor cos, Tensor sin, bool interleaved) {
  const int64_t N = x.size(0), K = x.size(1), H = to_latent.size(0), P = to_latent.size(1);
  const int64_t r = to_latent.size(2), R = 2 * cos.size(1), Q = q_scale.size(0);
  const int64_t width = H * (P + R), kv_width = r + R;
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(x.dim() == 2 && norm.size(0) == K && norm.scalar_type() == type &&
                      kv_norm.size(0) == r && kv_norm.scalar_type() == type &&
                      kv_scale.size(0) == kv_width && R <= 1024,
                  "shapes of x, norms and weights do not fit");
  STD_TORCH_CHECK(q_b_packed ? q_norm && q_norm->size(0) == Q && q_norm->scalar_type() == type &&
                                   q_b_scale->size(0) == width
                             : Q == width,
                  "shapes of the queries' weights do not fit");
  STD_TORCH_CHECK(cos.is_contiguous() && sin.is_contiguous() && cos.size(0) == N &&
                      sin.numel() == cos.numel() && cos.scalar_type() == ScalarType::Float &&
                      sin.scalar_type() == ScalarType::Float,
                  "cos and sin must be (N, R / 2) float32");
  const int32_t dtype = aoti_torch_dtype_float32();
  Tensor q = empty({N, H, kv_width}, dtype), k = empty({N, 1, kv_width}, dtype);
  const Packed of_q = packed_of(q_packed, q_scale, K), of_kv = packed_of(kv_packed, kv_scale, K);
  for_type(x, [&]<class T>(T*) {
    const T *from = x.const_data_ptr<T>(), *norms = norm.const_data_ptr<T>();
    const T *kv_norms = kv_norm.const_data_ptr<T>(), *none = nullptr;
    const float *c = cos.const_data_ptr<float>(), *s = sin.const_data_ptr<float>();
    in_chunks(N, [&](int64_t begin, int64_t end) {
      const int64_t count = end - begin;
      Rows& rows = rows_of(count, K);
      quantize_normed(from + begin * K, norms, norm_eps, count, K, rows);
      float* first = scratch<1>(count * (Q + kv_width)).data();  // what the stream is projected to
      float *all = first, *kv = first + count * Q;
      multiply_all({{&rows, of_q, count, first}, {&rows, of_kv, count, kv}});
      if (q_b_packed) {
        all = scratch<2>(count * width).data();
        rows.resize(count, Q);
        quantize_normed(first, q_norm->const_data_ptr<T>(), q_eps, count, Q, rows);
        multiply(rows, packed_of(*q_b_packed, *q_b_scale, Q), count,
                 into<float>(all, width, nullptr));
      }
      float* to_q = q.mutable_data_ptr<float>() + begin * H * kv_width;
      float* to_k = k.mutable_data_ptr<float>() + begin * kv_width;
      for_rows(count, width, [&](int64_t n) {
        const float *cosines = c + (begin + n) * R / 2, *sines = s + (begin + n) * R / 2;
        for (int64_t h = 0; h < H; ++h)
          turn(all + n * width + h * (P + R) + P, none, cosines, sines, R, 0, interleaved,
               to_q + (n * H + h) * kv_width + r);
        normalize(kv + n * kv_width, kv_norms, r, kv_eps, to_k + n * kv_width);
        turn(kv + n * kv_width + r, none, cosines, sines, R, 0, interleaved,
             to_k + n * kv_width + r);
      });
      multiply_heads(all, width, P + R, to_latent, to_q, H * kv_width, kv_width, count);
    });
  });
  return {q, k};
}

Tensor add_output(Tensor x, Tensor mixed, Tensor to_value, Tensor packed, Tensor scale) {
  const int64_t N = x.size(0), K = x.size(1), H = to_value.size(0), r = to_value.size(1);
  const int64_t V = to_value.size(2);
  STD_TORCH_CHECK(mixed.is_contiguous() && mixed.scalar_type() == ScalarType::Float &&
                      mixed.numel() == N * H * r && scale.size(0) == K,
                  "shapes of x, the mixed latents and weights do not fit");
  const Packed w = packed_of(packed, scale, H * V);
  Tensor out = empty({N, K}, code_of(x.scalar_type()));
  for_type(x, [&]<class T>(T*) {
    const float* from = mixed.const_data_ptr<float>();
    const T* base = x.const_data_ptr<T>();
    T* to = out.mutable_data_ptr<T>();
    in_chunks(N, [&](int64_t n, int64_t end) {
      float* heads = scratch<1>((end - n) * H * V).data();
      multiply_heads(from + n * H * r, H * r, r, to_value, heads, H * V, V, end - n);
      Rows& rows = rows_of(end - n, H * V);
      quantize(heads, end - n, H * V, rows);
      multiply(rows, w, end - n, into<T>(to + n * K, K, base + n * K));
    });
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY(astrai_packed_latent, library) {
  library.def(
      "queries(Tensor x, Tensor norm, float norm_eps, Tensor q, Tensor q_scale, Tensor? q_norm, "
      "float q_eps, Tensor? q_b, Tensor? q_b_scale, Tensor kv, Tensor kv_scale, Tensor kv_norm, "
      "float kv_eps, Tensor to_latent, Tensor cos, Tensor sin, bool interleaved) "
      "-> (Tensor, Tensor)");
  library.def(
      "add_output(Tensor x, Tensor mixed, Tensor to_value, Tensor packed, Tensor scale) "
      "-> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(astrai_packed_latent, CPU, library) {
  library.impl("queries", TORCH_BOX(&queries));
  library.impl("add_output", TORCH_BOX(&add_output));
}

#endif
