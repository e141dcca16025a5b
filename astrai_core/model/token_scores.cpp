// Log-probabilities of labels from logits, and their slope, as passes over rows that stay in cache.
//
// N rows of V logits.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "exponential.h"
#include "tensors.h"

namespace {

using namespace astrai;

constexpr int kLanes = 32;

// The logarithm of the sum of exponentials of factor * x.
template <class T>
float log_total(const T* x, int64_t V, float factor) {
  float lane[kLanes], most = -std::numeric_limits<float>::infinity(), sum = 0;
  std::fill_n(lane, kLanes, most);
  int64_t i = 0;
  for (; i + kLanes <= V; i += kLanes)
    for (int l = 0; l < kLanes; ++l) {
      const float value = static_cast<float>(x[i + l]) * factor;
      lane[l] = lane[l] > value ? lane[l] : value;
    }
  for (float one : lane) most = std::max(most, one);
  for (; i < V; ++i) most = std::max(most, static_cast<float>(x[i]) * factor);
  std::fill_n(lane, kLanes, 0.0f);
  for (i = 0; i + kLanes <= V; i += kLanes)
    for (int l = 0; l < kLanes; ++l)
      lane[l] += exponential(static_cast<float>(x[i + l]) * factor - most);
  for (float one : lane) sum += one;
  for (; i < V; ++i) sum += exponential(static_cast<float>(x[i]) * factor - most);
  return most + std::log(sum);
}

const int64_t* checked(const Tensor& labels, const Tensor& logits) {
  STD_TORCH_CHECK(logits.dim() == 2, "logits must be (N, V)");
  STD_TORCH_CHECK(labels.is_contiguous() && labels.scalar_type() == ScalarType::Long &&
                      labels.numel() == logits.size(0),
                  "labels must be (N,) int64");
  const int64_t* numbers = labels.const_data_ptr<int64_t>();
  for (int64_t n = 0; n < labels.numel(); ++n)
    STD_TORCH_CHECK(numbers[n] >= 0 && numbers[n] < logits.size(1), "a label is out of range");
  return numbers;
}

float* floats(const Tensor& x, int64_t N) {
  STD_TORCH_CHECK(x.is_contiguous() && x.scalar_type() == ScalarType::Float && x.numel() == N,
                  "a number for each row must be (N,) float32");
  return x.mutable_data_ptr<float>();
}

void score(Tensor logits, Tensor labels, double temperature, Tensor logprobs, Tensor totals) {
  const int64_t* label = checked(labels, logits);
  const int64_t N = logits.size(0), V = logits.size(1);
  const float factor = static_cast<float>(1 / temperature);
  float *to = floats(logprobs, N), *of_all = floats(totals, N);
  for_type(logits, [&]<class T>(T*) {
    const T* x = logits.const_data_ptr<T>();
    torch::stable::parallel_for(0, N, 1, [&](int64_t n, int64_t end) {
      for (; n < end; ++n) {
        of_all[n] = log_total(x + n * V, V, factor);
        to[n] = static_cast<float>(x[n * V + label[n]]) * factor - of_all[n];
      }
    });
  });
}

// d (gradient * logprob) / d logit = gradient / temperature * ((one at the label) - probability)
void slope(Tensor logits, Tensor labels, double temperature, Tensor totals, Tensor gradient) {
  const int64_t* label = checked(labels, logits);
  const int64_t N = logits.size(0), V = logits.size(1);
  const float factor = static_cast<float>(1 / temperature);
  const float *of_all = floats(totals, N), *weight = floats(gradient, N);
  for_type(logits, [&]<class T>(T*) {
    T* x = logits.mutable_data_ptr<T>();
    torch::stable::parallel_for(0, N, 1, [&](int64_t n, int64_t end) {
      for (; n < end; ++n) {
        T* row = x + n * V;
        const float total = of_all[n], scale = weight[n] * factor;
        const float chosen = exponential(static_cast<float>(row[label[n]]) * factor - total);
        for (int64_t i = 0; i < V; ++i)
          row[i] = static_cast<T>(-scale * exponential(static_cast<float>(row[i]) * factor - total));
        row[label[n]] = static_cast<T>(scale * (1 - chosen));
      }
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY(astrai_scores, library) {
  library.def(
      "score(Tensor logits, Tensor labels, float temperature, Tensor(a!) logprobs, "
      "Tensor(b!) totals) -> ()");
  library.def(
      "slope(Tensor(a!) logits, Tensor labels, float temperature, Tensor totals, "
      "Tensor gradient) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(astrai_scores, CPU, library) {
  library.impl("score", TORCH_BOX(&score));
  library.impl("slope", TORCH_BOX(&slope));
}
