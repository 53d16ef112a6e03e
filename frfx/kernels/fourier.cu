// One matrix a frequency: block-circulant maps of small images (Eq. 12-20).
//
// A block takes its images there and back without leaving shared memory: rows there, columns there;
// columns back, rows back. The transforms are products with tables, and a thread makes four results
// at once, so that it computes more than it loads. Where a map is small, one kernel does it all, the
// product between the transforms, too; else the product is a library's, on frequencies first.

template <typename T>
struct alignas(2 * sizeof(T)) Complex {
  T re, im;
};

// Neighbours, which loads of 16 bytes bring.
template <typename V, int n>
struct alignas(16) Neighbours {
  V of[n];
};

template <typename T>
__device__ void add_product(Complex<T>& sum, const Complex<T>& a, const Complex<T>& b) {
  sum.re += a.re * b.re - a.im * b.im;
  sum.im += a.re * b.im + a.im * b.re;
}

// A grid and the corners of it that source and result lie in.
struct Plane {
  int height, half, source_h, source_w, result_h, result_w;
  // Columns make pairs of results, u and u + height / 2, from sums over even and odd terms.
  __device__ bool splits() const { return height % 2 == 0; }
  __device__ int near(int results) const {
    return splits() && results > height / 2 ? height / 2 : results;
  }
  __device__ int neighbours() const { return splits() ? 2 : 4; }
  __device__ int wide(int results) const {  // how many threads make a column
    return (near(results) + neighbours() - 1) / neighbours();
  }
};

#define PLANE_PARAMETERS                                                                       \
  long long height_, long long width_, long long source_h_, long long source_w_,               \
      long long result_h_, long long result_w_
#define PLANE                                                                                  \
  { int(height_), int(width_) / 2 + 1, int(source_h_), int(source_w_), int(result_h_), int(result_w_) }

// The tables: columns there (source_h, .), columns back (height, .), both filled up to a multiple of
// the neighbours; rows there (source_w, half), rows back (half, result_w).
template <typename T>
struct Tables {
  const Complex<T>*columns_there, *columns_back, *rows_there, *rows_back;
  __device__ Tables(const T* tables, const Plane& plane) {
    columns_there = (const Complex<T>*)tables;
    const int n = plane.neighbours();
    columns_back = columns_there + plane.source_h * plane.wide(plane.height) * n;
    rows_there = columns_back + plane.height * plane.wide(plane.result_h) * n;
    rows_back = rows_there + plane.source_w * plane.half;
  }
};

// The residual of some lines, transposed: (source_w, lines up to a multiple of 4).
template <typename T>
__device__ void load_residual(const T* __restrict__ source, const T* __restrict__ minus,
                              T* residual, int lines, int source_w) {
  const int lines4 = (lines + 3) / 4 * 4;
#pragma unroll 4
  for (int i = threadIdx.x; i < lines4 * source_w; i += blockDim.x) {
    const int line = i / source_w, at = i - line * source_w;
    const bool inside = line < lines;
    const T taken = inside && minus ? minus[i] : T(0);
    residual[at * lines4 + line] = inside ? source[i] - taken : T(0);
  }
}

// Lines to half spectra: (lines, half).
template <typename T>
__device__ void rows_there(const T* residual, Complex<T>* to, int lines, const Plane& plane,
                           const Complex<T>* __restrict__ table) {
  const int lines4 = (lines + 3) / 4, half = plane.half;
  for (int i = threadIdx.x; i < lines4 * half; i += blockDim.x) {
    const int quad = i / half, v = i - quad * half;
    Complex<T> sums[4] = {};
#pragma unroll 4
    for (int at = 0; at < plane.source_w; ++at) {
      const Complex<T> weight = table[at * half + v];
      const Neighbours<T, 4> values = ((const Neighbours<T, 4>*)residual)[at * lines4 + quad];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        sums[k].re += values.of[k] * weight.re;
        sums[k].im += values.of[k] * weight.im;
      }
    }
#pragma unroll
    for (int k = 0; k < 4; ++k)
      if (4 * quad + k < lines) to[(4 * quad + k) * half + v] = sums[k];
  }
}

// Along columns, there or back: (images, terms, half) to (images, results, half).
template <typename T>
__device__ void along_columns(const Complex<T>* from, Complex<T>* to, int images, int terms,
                              int results, const Plane& plane,
                              const Complex<T>* __restrict__ table) {
  const int half = plane.half, near = plane.near(results), wide = plane.wide(results);
  for (int i = threadIdx.x; i < images * wide * half; i += blockDim.x) {
    const int line = i / half, v = i - line * half;
    const int image = line / wide, at = line - image * wide;
    const Complex<T>* values = from + image * terms * half + v;
    Complex<T>* found = to + image * results * half + v;
    if (plane.splits()) {
      const Neighbours<Complex<T>, 2>* weights = (const Neighbours<Complex<T>, 2>*)table + at;
      Complex<T> even[2] = {}, odd[2] = {};
#pragma unroll 4
      for (int k = 0; k < terms; k += 2) {
        const Complex<T> value = values[k * half];
        const Neighbours<Complex<T>, 2> weight = weights[k * wide];
        add_product(even[0], value, weight.of[0]);
        add_product(even[1], value, weight.of[1]);
        if (k + 1 < terms) {
          const Complex<T> next = values[(k + 1) * half];
          const Neighbours<Complex<T>, 2> after = weights[(k + 1) * wide];
          add_product(odd[0], next, after.of[0]);
          add_product(odd[1], next, after.of[1]);
        }
      }
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const int u = 2 * at + k, other = u + plane.height / 2;
        if (u >= near) continue;
        found[u * half] = {even[k].re + odd[k].re, even[k].im + odd[k].im};
        if (other < results)
          found[other * half] = {even[k].re - odd[k].re, even[k].im - odd[k].im};
      }
    } else {
      const Neighbours<Complex<T>, 4>* weights = (const Neighbours<Complex<T>, 4>*)table + at;
      Complex<T> sums[4] = {};
#pragma unroll 4
      for (int k = 0; k < terms; ++k) {
        const Complex<T> value = values[k * half];
        const Neighbours<Complex<T>, 4> weight = weights[k * wide];
#pragma unroll
        for (int j = 0; j < 4; ++j) add_product(sums[j], value, weight.of[j]);
      }
#pragma unroll
      for (int k = 0; k < 4; ++k)
        if (4 * at + k < results) found[(4 * at + k) * half] = sums[k];
    }
  }
}

// Half spectra to lines, and the sum.
template <typename T>
__device__ void rows_back(const Complex<T>* from, const T* __restrict__ plus,
                          T* __restrict__ result, int lines, const Plane& plane,
                          const Complex<T>* __restrict__ table) {
  const int half = plane.half, width = plane.result_w;
  for (int i = threadIdx.x; i < (lines + 3) / 4 * width; i += blockDim.x) {
    const int quad = i / width, q = i - quad * width;
    const int there = lines - 4 * quad < 4 ? lines - 4 * quad : 4;
    T sums[4] = {};
    if (plus) {
#pragma unroll
      for (int k = 0; k < 4; ++k)
        if (k < there) sums[k] = plus[(4 * quad + k) * width + q];
    }
#pragma unroll 4
    for (int v = 0; v < half; ++v) {
      const Complex<T> weight = table[v * width + q];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const Complex<T> value = from[(4 * quad + (k < there ? k : there - 1)) * half + v];
        sums[k] += value.re * weight.re - value.im * weight.im;
      }
    }
#pragma unroll
    for (int k = 0; k < 4; ++k)
      if (k < there) result[(4 * quad + k) * width + q] = sums[k];
  }
}

// A whole map: a block has one sample and group. The matrices are (groups, rows, columns, height,
// half): c' are the rows, c the columns.
template <typename T>
__global__ void __launch_bounds__(512)
    circular_map(const T* __restrict__ source, const T* __restrict__ minus,
                 const T* __restrict__ plus, const T* __restrict__ matrices_,
                 const T* __restrict__ tables_, T* __restrict__ result, long long groups,
                 long long rows_, long long columns_, PLANE_PARAMETERS, long long first) {
  extern __shared__ __align__(16) unsigned char memory[];
  const Plane plane = PLANE;
  const Tables<T> tables(tables_, plane);
  const int rows = int(rows_), columns = int(columns_), frequencies = plane.height * plane.half;
  const int lines = columns * plane.source_h, lines_back = rows * plane.result_h;
  Complex<T>* even = (Complex<T>*)memory;
  Complex<T>* odd = even + first;

  const long long sample = blockIdx.x;  // of a group
  const long long there = sample * lines * plane.source_w;
  load_residual(source + there, minus ? minus + there : nullptr, (T*)odd, lines, plane.source_w);
  __syncthreads();
  rows_there((const T*)odd, even, lines, plane, tables.rows_there);
  __syncthreads();
  along_columns(even, odd, columns, plane.source_h, plane.height, plane, tables.columns_there);
  __syncthreads();

  const Complex<T>* matrices = (const Complex<T>*)matrices_ +
                               (sample % groups) * rows * columns * (long long)frequencies;
  for (int i = threadIdx.x; i < (rows + 3) / 4 * frequencies; i += blockDim.x) {
    const int quad = i / frequencies, f = i - quad * frequencies;
    Complex<T> sums[4] = {};
#pragma unroll 4
    for (int c = 0; c < columns; ++c) {
      const Complex<T> value = odd[c * frequencies + f];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int row = 4 * quad + k < rows ? 4 * quad + k : rows - 1;
        add_product(sums[k], value, matrices[(row * columns + c) * (long long)frequencies + f]);
      }
    }
#pragma unroll
    for (int k = 0; k < 4; ++k)
      if (4 * quad + k < rows) even[(4 * quad + k) * frequencies + f] = sums[k];
  }
  __syncthreads();

  along_columns(even, odd, rows, plane.height, plane.result_h, plane, tables.columns_back);
  __syncthreads();
  const long long back = sample * lines_back * plane.result_w;
  rows_back(odd, plus ? plus + back : nullptr, result + back, lines_back, plane, tables.rows_back);
}

// The spectra of some images a block, frequencies first: (height, half, images).
template <typename T>
__global__ void __launch_bounds__(512)
    spectra(const T* __restrict__ source, const T* __restrict__ minus,
            const T* __restrict__ tables_, T* __restrict__ result_, long long images,
            long long a_block, PLANE_PARAMETERS, long long first) {
  extern __shared__ __align__(16) unsigned char memory[];
  const Plane plane = PLANE;
  const Tables<T> tables(tables_, plane);
  const long long start = blockIdx.x * a_block;
  const int count = int(images - start < a_block ? images - start : a_block);
  const int lines = count * plane.source_h, frequencies = plane.height * plane.half;
  Complex<T>* even = (Complex<T>*)memory;
  Complex<T>* odd = even + first;
  Complex<T>* result = (Complex<T>*)result_ + start;

  const long long there = start * plane.source_h * plane.source_w;
  load_residual(source + there, minus ? minus + there : nullptr, (T*)odd, lines, plane.source_w);
  __syncthreads();
  rows_there((const T*)odd, even, lines, plane, tables.rows_there);
  __syncthreads();
  along_columns(even, odd, count, plane.source_h, plane.height, plane, tables.columns_there);
  __syncthreads();
  for (int i = threadIdx.x; i < frequencies * int(a_block); i += blockDim.x) {
    const int f = i / int(a_block), image = i - f * int(a_block);
    if (image < count) result[f * images + image] = odd[image * frequencies + f];
  }
}

// The images of spectra, frequencies first, and the sum.
template <typename T>
__global__ void __launch_bounds__(512)
    images_of(const T* __restrict__ spectra_, const T* __restrict__ plus,
              const T* __restrict__ tables_, T* __restrict__ result, long long images,
              long long a_block, PLANE_PARAMETERS, long long first) {
  extern __shared__ __align__(16) unsigned char memory[];
  const Plane plane = PLANE;
  const Tables<T> tables(tables_, plane);
  const long long start = blockIdx.x * a_block;
  const int count = int(images - start < a_block ? images - start : a_block);
  const int frequencies = plane.height * plane.half, lines = count * plane.result_h;
  Complex<T>* even = (Complex<T>*)memory;
  Complex<T>* odd = even + first;
  const Complex<T>* spectra = (const Complex<T>*)spectra_ + start;

#pragma unroll 4
  for (int i = threadIdx.x; i < frequencies * int(a_block); i += blockDim.x) {
    const int f = i / int(a_block), image = i - f * int(a_block);
    if (image < count) even[image * frequencies + f] = spectra[f * images + image];
  }
  __syncthreads();
  along_columns(even, odd, count, plane.height, plane.result_h, plane, tables.columns_back);
  __syncthreads();
  const long long back = start * plane.result_h * plane.result_w;
  rows_back(odd, plus ? plus + back : nullptr, result + back, lines, plane, tables.rows_back);
}

// A matrix of complex numbers, transposed in tiles of 32 by 32.
template <typename T>
__global__ void transpose(const T* source_, T* result_, long long rows, long long columns) {
  extern __shared__ __align__(16) unsigned char memory[];
  const Complex<T>* source = (const Complex<T>*)source_;
  Complex<T>* result = (Complex<T>*)result_;
  Complex<T>* tile = (Complex<T>*)memory;  // (32, 33)
  const long long across = (columns + 31) / 32;
  const long long r = blockIdx.x / across * 32, c = blockIdx.x % across * 32;
  const int x = threadIdx.x % 32, y = threadIdx.x / 32, step = blockDim.x / 32;
#pragma unroll 4
  for (int i = y; i < 32; i += step)
    if (r + i < rows && c + x < columns) tile[i * 33 + x] = source[(r + i) * columns + c + x];
  __syncthreads();
#pragma unroll 4
  for (int i = y; i < 32; i += step)
    if (c + i < columns && r + x < rows) result[(c + i) * rows + r + x] = tile[x * 33 + i];
}

// The residual at the origin of the grid and zeros around it, for the transforms of large images.
template <typename T>
__global__ void residual_on_grid(const T* target, const T* output, T* result, long long count,
                                 long long height, long long width, long long source_h,
                                 long long source_w) {
  const long long all = (long long)gridDim.x * blockDim.x;
  for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += all) {
    const long long line = i / width;
    const int column = int(i - line * width), row = int(line % height);
    const long long at = (line / height * source_h + row) * source_w + column;
    result[i] = row < source_h && column < source_w ? target[at] - output[at] : T(0);
  }
}
