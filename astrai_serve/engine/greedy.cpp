// The most likely token of each row of logits (R, V): one pass, where torch's argmax takes ten times
// as long as its largest value.

#include <algorithm>
#include <cstdint>
#include <limits>
#include <tuple>

#include "quantization/team.h"
#include "tensors.h"

namespace {

using namespace astrai;

constexpr int64_t kPiece = 512;                // numbers among which the largest is sought again
constexpr int64_t kNumbersPerThread = 1 << 15;
constexpr int32_t kInfinity = 0x7f800000, kMagnitude = 0x7fffffff;

struct Found {
  int64_t index;
  bool is_sound;  // it is finite, and no logit is NaN
};

// Bit patterns as numbers in the order of the floats, which compilers turn into vectors.
int32_t ordered(int32_t bits) { return bits ^ (bits >> 31 & kMagnitude); }

Found largest(const int32_t* bits, int64_t V) {
  int32_t most = std::numeric_limits<int32_t>::min(), magnitude = 0;
  int64_t begin = 0;
  for (int64_t v = 0; v < V; v += kPiece) {
    int32_t here = std::numeric_limits<int32_t>::min();
    for (int64_t i = v; i < std::min(v + kPiece, V); ++i) {
      here = std::max(here, ordered(bits[i]));
      magnitude = std::max(magnitude, bits[i] & kMagnitude);
    }
    if (here > most) most = here, begin = v;
  }
  while (ordered(bits[begin]) != most) ++begin;
  return {begin, magnitude <= kInfinity && (bits[begin] & kMagnitude) < kInfinity};
}

std::tuple<Tensor, Tensor> greedy(Tensor logits) {
  STD_TORCH_CHECK(logits.dim() == 2 && logits.is_contiguous() && logits.size(1) > 0 &&
                      logits.scalar_type() == ScalarType::Float,
                  "logits must be (R, V) float32");
  const int64_t R = logits.size(0), V = logits.size(1);
  Tensor ids = empty({R}, aoti_torch_dtype_int64()), sound = empty({R}, aoti_torch_dtype_bool());
  const auto* bits = static_cast<const int32_t*>(logits.data_ptr());
  auto* id = static_cast<int64_t*>(ids.data_ptr());
  auto* is_sound = static_cast<bool*>(sound.data_ptr());
  share(R, 1 + kNumbersPerThread / V, [&](int64_t row, int64_t end) {
    for (; row < end; ++row) {
      const Found found = largest(bits + row * V, V);
      id[row] = found.index, is_sound[row] = found.is_sound;
    }
  });
  return {ids, sound};
}

}  // namespace

STABLE_TORCH_LIBRARY(astrai_greedy, library) {
  library.def("greedy(Tensor logits) -> (Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(astrai_greedy, CPU, library) {
  library.impl("greedy", TORCH_BOX(&greedy));
}
