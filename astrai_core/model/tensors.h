// Tensors of an operator: new ones for its results, and its inputs by their type.

#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>

namespace astrai {

using torch::headeronly::BFloat16;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Up to four dimensions, contiguous, on the CPU, with whatever its memory holds.
inline Tensor empty(std::initializer_list<int64_t> size, int32_t dtype) {
  int64_t stride[4], next = 1;
  for (int64_t d = static_cast<int64_t>(size.size()) - 1; d >= 0; next *= size.begin()[d--])
    stride[d] = next;
  AtenTensorHandle handle;
  aoti_torch_empty_strided(size.size(), size.begin(), stride, dtype, aoti_torch_device_type_cpu(),
                           -1, &handle);
  return Tensor(handle);
}

inline int32_t code_of(ScalarType type) {
  return type == ScalarType::Float ? aoti_torch_dtype_float32() : aoti_torch_dtype_bfloat16();
}

// Call f with a null pointer to the type of x, which is float32 or bfloat16.
template <class F>
void for_type(const Tensor& x, F&& f) {
  STD_TORCH_CHECK(x.is_contiguous(), "tensors must be contiguous");
  if (x.scalar_type() == ScalarType::Float) return f(static_cast<float*>(nullptr));
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::BFloat16, "x must be float32 or bfloat16");
  f(static_cast<BFloat16*>(nullptr));
}

}  // namespace astrai
