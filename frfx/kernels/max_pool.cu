// Max pooling, there and back, for windows of one size at equal distances (Sec. 3.4 (b) and Eq. 4).

// Windows along one dimension: window j reads the entries j * stride - padding + o * dilation.
struct Axis {
  int size, count, kernel, stride, padding, dilation;
  // The windows that reach over an entry are those from the last on for which it `reads`.
  __device__ int last(int entry) const {
    const int window = (entry + padding) / stride;
    return window < count ? window : count - 1;
  }
  __device__ bool reads(int window, int entry) const {
    return entry + padding - window * stride <= (kernel - 1) * dilation;
  }
  __device__ bool taps(int window, int entry) const {
    return dilation == 1 || (entry + padding - window * stride) % dilation == 0;
  }
  __device__ int entry(int window, int offset) const {
    const int at = window * stride - padding + offset * dilation;
    return at < size ? at : -1;  // below zero in front of the image, too
  }
};

#define WINDOWS_PARAMETERS                                                                     \
  long long h, long long oh, long long kh, long long sh, long long ph, long long dh,           \
      long long w, long long ow, long long kw, long long sw, long long pw, long long dw
#define ROWS {int(h), int(oh), int(kh), int(sh), int(ph), int(dh)}
#define COLUMNS {int(w), int(ow), int(kw), int(sw), int(pw), int(dw)}

// Whether a value is below its bound, or NaN, which is to be seen.
template <typename T>
__device__ bool stays(T value, T bound) { return value < bound || value != value; }

// The largest entries: a thread a window. `size` is that of square windows without gaps that lie
// within the image; 0 is any other.
template <typename T, int size>
__global__ void max_pool(const T* __restrict__ x, T* __restrict__ result, long long windows,
                         WINDOWS_PARAMETERS) {
  const Axis rows = ROWS, columns = COLUMNS;
  const long long all = (long long)gridDim.x * blockDim.x;
  for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < windows; i += all) {
    const long long row = i / columns.count;
    const int b = int(i - row * columns.count), a = int(row % rows.count);
    const T* image = x + row / rows.count * rows.size * columns.size;
    bool read = false;
    T most = 0;
#pragma unroll
    for (int p = 0; p < (size ? size : rows.kernel); ++p)
#pragma unroll
      for (int q = 0; q < (size ? size : columns.kernel); ++q) {
        const int r = size ? a * rows.stride + p : rows.entry(a, p);
        const int c = size ? b * columns.stride + q : columns.entry(b, q);
        if (!size && (r < 0 || c < 0)) continue;
        const T value = image[(long long)r * columns.size + c];
        if (!read || value > most || value != value) most = value;
        read = true;
      }
    result[i] = most;
  }
}

// Windows that share no entry: a thread a window. What no window reads is not written.
template <typename T, bool minimal>
__global__ void unpool_tiles(const T* target, const T* x, T* result, long long windows,
                             WINDOWS_PARAMETERS) {
  const Axis rows = ROWS, columns = COLUMNS;
  const long long all = (long long)gridDim.x * blockDim.x;
  for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < windows; i += all) {
    const long long row = i / columns.count;
    const int b = int(i - row * columns.count), a = int(row % rows.count);
    const long long start = row / rows.count * rows.size * columns.size;
    const T wanted = target[i];
    long long first = -1;
    if (minimal) {
      T most = 0;
      for (int p = 0; p < rows.kernel; ++p)
        for (int q = 0; q < columns.kernel; ++q) {
          const int r = rows.entry(a, p), c = columns.entry(b, q);
          if (r < 0 || c < 0) continue;
          const long long at = start + (long long)r * columns.size + c;
          if (first < 0 || x[at] > most) {
            most = x[at];
            first = at;
          }
        }
    }
    for (int p = 0; p < rows.kernel; ++p)
      for (int q = 0; q < columns.kernel; ++q) {
        const int r = rows.entry(a, p), c = columns.entry(b, q);
        if (r < 0 || c < 0) continue;
        const long long at = start + (long long)r * columns.size + c;
        result[at] = minimal && at != first && stays(x[at], wanted) ? x[at] : wanted;
      }
  }
}

// Windows that may overlap, first half: a thread an entry of the image, which takes its bound, the
// least target of the windows that read it; if minimal, itself where it is smaller. What no window
// reads stays. The bounds are kept for the second half.
template <typename T, bool minimal>
__global__ void unpool_bounds(const T* target, const T* x, T* bounds, T* result, long long entries,
                              WINDOWS_PARAMETERS) {
  const Axis rows = ROWS, columns = COLUMNS;
  const long long all = (long long)gridDim.x * blockDim.x;
  for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < entries; i += all) {
    const long long row = i / columns.size;
    const int c = int(i - row * columns.size), r = int(row % rows.size);
    const T* wanted = target + row / rows.size * rows.count * columns.count;
    const int last_a = rows.last(r), last_b = columns.last(c);
    bool read = false;
    T least = 0;
    for (int a = last_a; a >= 0 && rows.reads(a, r); --a) {
      if (!rows.taps(a, r)) continue;
      for (int b = last_b; b >= 0 && columns.reads(b, c); --b) {
        if (!columns.taps(b, c)) continue;
        const T value = wanted[a * columns.count + b];
        if (!read || value < least || value != value) least = value;
        read = true;
      }
    }
    const T mine = x[i];
    if (minimal) bounds[i] = read ? least : mine;
    result[i] = read && !(minimal && stays(mine, least)) ? least : mine;
  }
}

// The second half: a thread a window. Of its entries whose bound is its target, the first of the
// largest takes it. An entry that several windows choose has one bound, so they write the same.
template <typename T>
__global__ void unpool_tops(const T* target, const T* x, const T* bounds, T* result,
                            long long windows, WINDOWS_PARAMETERS) {
  const Axis rows = ROWS, columns = COLUMNS;
  const long long all = (long long)gridDim.x * blockDim.x;
  for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < windows; i += all) {
    const long long row = i / columns.count;
    const int b = int(i - row * columns.count), a = int(row % rows.count);
    const long long start = row / rows.count * rows.size * columns.size;
    const T wanted = target[i];
    long long first = -1;
    T most = 0;
    for (int p = 0; p < rows.kernel; ++p)
      for (int q = 0; q < columns.kernel; ++q) {
        const int r = rows.entry(a, p), c = columns.entry(b, q);
        if (r < 0 || c < 0) continue;
        const long long at = start + (long long)r * columns.size + c;
        if (bounds[at] == wanted && (first < 0 || x[at] > most)) {
          most = x[at];
          first = at;
        }
      }
    if (first >= 0) result[first] = wanted;
  }
}

// Windows that share no entry, behind an activation that increases: the preimage of the target for
// what is pooled, copied. A target at an end of the range has all that lies beyond its preimage for
// preimages, too. What no window reads is not written.
template <typename T, typename F>
__global__ void unpool_preimages(const T* __restrict__ target, const T* __restrict__ output,
                                 const T* __restrict__ pooled, const T* __restrict__ x,
                                 T* __restrict__ result, long long windows, double low, double high,
                                 WINDOWS_PARAMETERS) {
  const Axis rows = ROWS, columns = COLUMNS;
  const Limits<T> limit = {T(low), T(high)};
  const long long all = (long long)gridDim.x * blockDim.x;
  for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < windows; i += all) {
    const long long row = i / columns.count;
    const int b = int(i - row * columns.count), a = int(row % rows.count);
    const long long start = row / rows.count * rows.size * columns.size;
    const T wanted = target[i];
    T found = nearest_preimage<T, F>(wanted, output[i], pooled[i], limit);
    const bool above = wanted >= limit.high, below = !above && wanted <= limit.low;
    if (above || below) {
      const T end = F::nearest(above ? limit.high : limit.low, found);
      if (above ? end < found : end > found) found = end;
    }
    for (int p = 0; p < rows.kernel; ++p)
      for (int q = 0; q < columns.kernel; ++q) {
        const int r = rows.entry(a, p), c = columns.entry(b, q);
        if (r < 0 || c < 0) continue;
        const long long at = start + (long long)r * columns.size + c;
        const bool beyond = (above && x[at] > found) || (below && x[at] < found);
        result[at] = beyond ? x[at] : found;
      }
  }
}
