// Max pooling run backwards, for windows of one size at equal distances (Sec. 3.4 (b) and Eq. 4).

// Windows along one dimension: window j reads the entries j * stride - padding + o * dilation.
struct Axis {
  int size, count, kernel, stride, padding, dilation;
  // The window whose offset o is at an entry; -1 if there is none.
  __device__ int window(int entry, int offset) const {
    const int at = entry + padding - offset * dilation;
    return at < 0 || at % stride || at / stride >= count ? -1 : at / stride;
  }
  __device__ int entry(int window, int offset) const {
    const int at = window * stride - padding + offset * dilation;
    return at < size ? at : -1;  // below zero in front of the image, too
  }
};

// Windows that share no entry: a thread a window. What no window reads is not written.
template <typename T, bool minimal>
__global__ void unpool_tiles(const T* target, const T* x, T* result, long long windows,
                             long long h, long long oh, long long kh, long long sh, long long ph,
                             long long dh, long long w, long long ow, long long kw, long long sw,
                             long long pw, long long dw) {
  const Axis rows = {int(h), int(oh), int(kh), int(sh), int(ph), int(dh)};
  const Axis columns = {int(w), int(ow), int(kw), int(sw), int(pw), int(dw)};
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
        result[at] = minimal && at != first && x[at] < wanted ? x[at] : wanted;
      }
  }
}

template <typename T>
struct Image {
  const T* target;
  Axis rows, columns;
  // What an entry may not exceed: the least target of the windows that read it. False if none does.
  __device__ bool bounded(int r, int c, T& least) const {
    bool read = false;
    for (int p = 0; p < rows.kernel; ++p) {
      const int a = rows.window(r, p);
      for (int q = 0; a >= 0 && q < columns.kernel; ++q) {
        const int b = columns.window(c, q);
        if (b < 0) continue;
        const T wanted = target[a * columns.count + b];
        if (!read || wanted < least) least = wanted;
        read = true;
      }
    }
    return read;
  }
  // Whether an entry is the one that brings a window to its target: of those whose bound that is,
  // the first of the largest.
  __device__ bool brings(int a, int b, int r, int c, const T* x) const {
    const T wanted = target[a * columns.count + b], mine = x[r * columns.size + c];
    bool before = true;
    for (int p = 0; p < rows.kernel; ++p)
      for (int q = 0; q < columns.kernel; ++q) {
        const int i = rows.entry(a, p), j = columns.entry(b, q);
        if (i < 0 || j < 0) continue;
        if (i == r && j == c) {
          before = false;
          continue;
        }
        const T other = x[i * columns.size + j];
        T bound;
        if ((other > mine || (before && other == mine)) && bounded(i, j, bound) && bound == wanted)
          return false;
      }
    return true;
  }
};

// Windows that may overlap: a thread an entry of the image. The targets must be such that every
// window has an entry whose bound is its target.
template <typename T, bool minimal>
__global__ void unpool(const T* target, const T* x, T* result, long long entries, long long h,
                       long long oh, long long kh, long long sh, long long ph, long long dh,
                       long long w, long long ow, long long kw, long long sw, long long pw,
                       long long dw) {
  const Axis rows = {int(h), int(oh), int(kh), int(sh), int(ph), int(dh)};
  const Axis columns = {int(w), int(ow), int(kw), int(sw), int(pw), int(dw)};
  const long long all = (long long)gridDim.x * blockDim.x;
  for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < entries; i += all) {
    const long long row = i / columns.size;
    const int c = int(i - row * columns.size), r = int(row % rows.size);
    const long long plane = row / rows.size;
    const Image<T> image = {target + plane * rows.count * columns.count, rows, columns};
    const T* forward = x + plane * rows.size * columns.size;
    T bound;
    if (!image.bounded(r, c, bound)) {
      result[i] = x[i];
      continue;
    }
    bool at_bound = !minimal || !(x[i] < bound);
    for (int p = 0; !at_bound && p < rows.kernel; ++p) {
      const int a = rows.window(r, p);
      for (int q = 0; !at_bound && a >= 0 && q < columns.kernel; ++q) {
        const int b = columns.window(c, q);
        at_bound = b >= 0 && image.target[a * columns.count + b] == bound &&
                   image.brings(a, b, r, c, forward);
      }
    }
    result[i] = at_bound ? bound : x[i];
  }
}
