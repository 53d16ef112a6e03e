// Nearest preimages under activations, entry by entry (Sec. 3.4 (a)).
//
// What frfx.rules.activation computes with a kernel a step is one here: the target, limited to the
// range, its preimage, and the forward input where the limited target is the limited forward value.

template <typename T>
struct Limits {
  T low, high;
  __device__ T operator()(T y) const { return y < low ? low : y > high ? high : y; }
};

// `flat`: whether the function is constant somewhere. There, rounding of the target is no reason to
// move an entry far.

template <typename T>
__device__ bool is_rounding(T difference, T step) {
  const bool wide = sizeof(T) == 8;
  const T share = T(wide ? 1.8189894035458565e-12 : 6.415304e-06);
  return abs(difference) < share * abs(step) + T(wide ? 2.2250738585072014e-308 : 1.17549435e-38);
}

struct Identity {
  static constexpr bool flat = true;
  template <typename T>
  static __device__ T nearest(T y, T) { return y; }
};

struct Tanh {
  static constexpr bool flat = false;
  template <typename T>
  static __device__ T nearest(T y, T) { return atanh(y); }
};

struct Sigmoid {
  static constexpr bool flat = false;
  template <typename T>
  static __device__ T nearest(T y, T) { return log(y / (1 - y)); }
};

// Functions that fall to one minimum and rise from there. f(v) > v - 0.5 for v > 0, and f(0) = 0.

struct Silu {
  static constexpr double argmin = -1.2784645427610738;
  template <typename T>
  static __device__ void at(T v, T& value, T& slope) {
    const T s = 1 / (1 + exp(-v));
    value = v * s;
    slope = s * (1 + v * (1 - s));
  }
};

struct Gelu {
  static constexpr double argmin = -0.7517915246935645;
  template <typename T>
  static __device__ void at(T v, T& value, T& slope) {
    const T below = erfc(-v * T(0.70710678118654752440)) / 2;
    value = v * below;
    slope = below + v * exp(-v * v / 2) * T(0.39894228040143267794);
  }
};

struct GeluTanh {
  static constexpr double argmin = -0.7524614220710162;
  template <typename T>
  static __device__ void at(T v, T& value, T& slope) {
    const T scale = T(0.79788456080286535588), cubic = T(0.044715);
    const T t = tanh(scale * (v + cubic * v * v * v));
    value = v * (1 + t) / 2;
    slope = (1 + t) / 2 + v / 2 * (1 - t * t) * scale * (1 + 3 * cubic * v * v);
  }
};

struct Mish {
  static constexpr double argmin = -1.1924312145154237;
  template <typename T>
  static __device__ void at(T v, T& value, T& slope) {
    const T t = tanh(v > 20 ? v : log1p(exp(v)));
    value = v * t;
    slope = t + v * (1 - t * t) / (1 + exp(-v));
  }
};

template <typename F>
struct Dip {
  static constexpr bool flat = false;
  // Newton's steps between two points, bisecting where they leave.
  template <typename T>
  static __device__ T root(T y, T low, T high, bool rises) {
    T v = (low + high) / 2;
    for (int step = 0; step < (sizeof(T) == 8 ? 64 : 40); ++step) {
      T value, slope;
      F::at(v, value, slope);
      const T error = value - y;
      if (error == 0) break;
      if ((error > 0) == rises) high = v; else low = v;
      const T newton = v - error / slope, middle = low + (high - low) / 2;
      const T next = newton > low && newton < high ? newton : middle;
      if (next == v) break;
      v = next;
    }
    return v;
  }
  template <typename T>
  static __device__ T nearest(T y, T x) {
    if (!(y - y == 0)) return y;  // NaN, and infinity, which is its own preimage
    const T least = T(F::argmin), far_left = sizeof(T) == 8 ? -750 : -105;
    const T right = root(y, least, (y > 0 ? y : T(0)) + T(0.5), true);
    if (y >= 0) return right;
    const T left = root(y, far_left, least, false);
    return abs(left - x) < abs(right - x) ? left : right;
  }
};

template <typename T, typename F>
__device__ T nearest_preimage(T target, T output, T x, Limits<T> limit) {
  const T wanted = limit(target), given = limit(output), found = F::nearest(wanted, x);
  const bool same = F::flat ? is_rounding(wanted - given, found - x) : wanted == given;
  return same ? x : found;
}

template <typename T, typename F>
__global__ void preimage(const T* __restrict__ target, const T* __restrict__ output,
                         const T* __restrict__ x, T* __restrict__ result, long long count,
                         double low, double high) {
  const Limits<T> limit = {T(low), T(high)};
  const long long all = (long long)gridDim.x * blockDim.x;
  for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += all)
    result[i] = nearest_preimage<T, F>(target[i], output[i], x[i], limit);
}
