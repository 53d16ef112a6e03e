// The nearest embedding of labels (Eq. 21, 24-33): one warp a sample.
//
// In place of Algorithm 1's sorting, the set of active competitors begins with all that exceed the
// label and loses those below the level that the rest of them give, until none is (Michelot, 1986).
// A label out of range, which nobody has checked in a captured graph, gives NaN.

template <typename T>
__global__ void nearest_embedding(const T* logits, const long long* labels, T* result,
                                  long long samples, long long classes, double margin) {
  const int lane = threadIdx.x % 32;
  const long long sample = (long long)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
  if (sample >= samples) return;
  const T* z = logits + sample * classes;
  const long long label = labels[sample];
  const bool known = label >= 0 && label < classes;
  const T own = known ? z[label] : sqrt(T(-1)), apart = T(margin);
  T rise = 0;  // Eq. 31
  for (int active = -1;;) {
    T sum = 0;
    int count = 0;
    for (long long i = lane; i < classes; i += 32) {
      const T excess = z[i] + apart - own;
      if (i != label && excess > rise) {
        sum += excess;
        ++count;
      }
    }
    for (int other = 16; other > 0; other /= 2) {
      sum += __shfl_xor_sync(0xffffffffu, sum, other);
      count += __shfl_xor_sync(0xffffffffu, count, other);
    }
    // Rounding may bring one back that has left: only fewer go on. Infinity is an answer.
    if (active >= 0 && count >= active) break;
    active = count;
    rise = sum / T(count + 1);
    if (!(rise - rise == 0)) break;
  }
  const T level = own + rise;  // Eq. 26
  for (long long i = lane; i < classes; i += 32) {
    const bool lowered = z[i] + apart - own > rise;
    const T value = lowered ? level - apart : z[i];  // Eq. 27
    result[sample * classes + i] = i == label || !known ? level : value;
  }
}
