// One matrix a frequency: block-circulant maps of small images (Eq. 12-20).
//
// A block takes its images there and back without leaving shared memory: rows there, columns there;
// columns back, rows back. The transforms are products with tables, and a thread makes a tile of
// the result, four by four or four by two, so that it computes more than it loads. Where a map is
// small, one kernel does it all, the product between the transforms, too; else the product is a
// library's, on frequencies first.

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

__device__ constexpr int quads(int n) { return (n + 3) / 4; }

// A grid and the corners of it that source and result lie in. In shared memory a line of a half
// spectrum takes `pitch` numbers, an even count; what is in the last, if it is one too many, does
// not matter.
struct Plane {
  int height, half, source_h, source_w, result_h, result_w;
  __device__ int pitch() const { return half + half % 2; }
  // Columns make pairs of results, u and u + height / 2, from sums over even and odd terms.
  __device__ bool splits() const { return height % 2 == 0; }
  __device__ int near(int results) const {
    return splits() && results > height / 2 ? height / 2 : results;
  }
};

#define PLANE_PARAMETERS                                                                       \
  long long height_, long long width_, long long source_h_, long long source_w_,               \
      long long result_h_, long long result_w_
#define PLANE                                                                                  \
  { int(height_), int(width_) / 2 + 1, int(source_h_), int(source_w_), int(result_h_), int(result_w_) }

// The tables: columns there (source_h, .), columns back (height, .), rows there (source_w, .), all
// of them filled up to a multiple of four; rows back (half, result_w).
template <typename T>
struct Tables {
  const Complex<T>*columns_there, *columns_back, *rows_there, *rows_back;
  __device__ Tables(const T* tables, const Plane& plane) {
    columns_there = (const Complex<T>*)tables;
    columns_back = columns_there + plane.source_h * quads(plane.near(plane.height)) * 4;
    rows_there = columns_back + plane.height * quads(plane.near(plane.result_h)) * 4;
    rows_back = rows_there + plane.source_w * quads(plane.half) * 4;
  }
};

// The residual of some lines, transposed: (source_w, quads of lines, 4), an odd number of quads, so
// that neighbours in a line do not meet in a bank.
template <typename T>
__device__ void load_residual(const T* __restrict__ source, const T* __restrict__ minus,
                              T* residual, int lines, int source_w) {
  Neighbours<T, 4>* to = (Neighbours<T, 4>*)residual;
  const int step = quads(lines) | 1;
#pragma unroll 2
  for (int i = threadIdx.x; i < quads(lines) * source_w; i += blockDim.x) {
    const int quad = i / source_w, at = i - quad * source_w;
    Neighbours<T, 4> values;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const bool inside = 4 * quad + k < lines;
      const int from = (4 * quad + k) * source_w + at;
      values.of[k] = inside ? source[from] - (minus ? minus[from] : T(0)) : T(0);
    }
    to[at * step + quad] = values;
  }
}

// Lines to half spectra: (lines, pitch).
template <typename T>
__device__ void rows_there(const T* residual, Complex<T>* to, int lines, const Plane& plane,
                           const Complex<T>* __restrict__ table) {
  const int wide = quads(plane.half), step = quads(lines) | 1, pitch = plane.pitch();
  for (int i = threadIdx.x; i < quads(lines) * wide; i += blockDim.x) {
    const int quad = i / wide, at = i - quad * wide;
    const Neighbours<T, 4>* values = (const Neighbours<T, 4>*)residual + quad;
    const Neighbours<Complex<T>, 4>* weights = (const Neighbours<Complex<T>, 4>*)table + at;
    Complex<T> sums[4][4] = {};
#pragma unroll 2
    for (int w = 0; w < plane.source_w; ++w) {
      const Neighbours<T, 4> value = values[w * step];
      const Neighbours<Complex<T>, 4> weight = weights[w * wide];
#pragma unroll
      for (int k = 0; k < 4; ++k)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          sums[k][j].re += value.of[k] * weight.of[j].re;
          sums[k][j].im += value.of[k] * weight.of[j].im;
        }
    }
#pragma unroll
    for (int k = 0; k < 4; ++k)
#pragma unroll
      for (int j = 0; j < 4; ++j)
        if (4 * quad + k < lines && 4 * at + j < pitch)
          to[(4 * quad + k) * pitch + 4 * at + j] = sums[k][j];
  }
}

template <typename T>
__device__ void add_outer(Complex<T> (&sums)[4][2], const Neighbours<Complex<T>, 4>& weight,
                          const Neighbours<Complex<T>, 2>& value) {
#pragma unroll
  for (int k = 0; k < 4; ++k)
#pragma unroll
    for (int j = 0; j < 2; ++j) add_product(sums[k][j], value.of[j], weight.of[k]);
}

// Along columns, there or back: (images, terms, pitch) to (images, results, pitch).
template <typename T>
__device__ void along_columns(const Complex<T>* from, Complex<T>* to, int images, int terms,
                              int results, const Plane& plane,
                              const Complex<T>* __restrict__ table) {
  typedef Neighbours<Complex<T>, 2> Pair;
  const int pairs = plane.pitch() / 2, near = plane.near(results), wide = quads(near);
  for (int i = threadIdx.x; i < images * wide * pairs; i += blockDim.x) {
    const int line = i / pairs, pair = i - line * pairs;
    const int image = line / wide, at = line - image * wide;
    const Pair* values = (const Pair*)from + image * terms * pairs + pair;
    const Neighbours<Complex<T>, 4>* weights = (const Neighbours<Complex<T>, 4>*)table + at;
    Pair* found = (Pair*)to + image * results * pairs + pair;
    Complex<T> even[4][2] = {}, odd[4][2] = {};
    if (plane.splits()) {
#pragma unroll 2
      for (int k = 0; k + 1 < terms; k += 2) {
        add_outer(even, weights[k * wide], values[k * pairs]);
        add_outer(odd, weights[(k + 1) * wide], values[(k + 1) * pairs]);
      }
      if (terms % 2) add_outer(even, weights[(terms - 1) * wide], values[(terms - 1) * pairs]);
    } else {
#pragma unroll 2
      for (int k = 0; k < terms; ++k) add_outer(even, weights[k * wide], values[k * pairs]);
    }
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int u = 4 * at + k, other = u + plane.height / 2;
      if (u >= near) continue;
      Pair sum, difference;
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        sum.of[j] = {even[k][j].re + odd[k][j].re, even[k][j].im + odd[k][j].im};
        difference.of[j] = {even[k][j].re - odd[k][j].re, even[k][j].im - odd[k][j].im};
      }
      found[u * pairs] = sum;
      if (plane.splits() && other < results) found[other * pairs] = difference;
    }
  }
}

// Half spectra to lines, and the sum. A thread's columns are a quarter of the width apart.
template <typename T>
__device__ void rows_back(const Complex<T>* from, const T* __restrict__ plus,
                          T* __restrict__ result, int lines, const Plane& plane,
                          const Complex<T>* __restrict__ table) {
  typedef Neighbours<Complex<T>, 2> Pair;
  const int width = plane.result_w, quarter = quads(width), pairs = plane.pitch() / 2;
  for (int i = threadIdx.x; i < quads(lines) * quarter; i += blockDim.x) {
    const int quad = i / quarter, at = i - quad * quarter;
    T sums[4][4] = {};
    const Pair* values[4];
    const Complex<T>* weights[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int line = 4 * quad + k < lines ? 4 * quad + k : lines - 1;
      const int column = at + k * quarter < width ? at + k * quarter : width - 1;
      values[k] = (const Pair*)from + line * pairs;
      weights[k] = table + column;
    }
    for (int v = 0; v < plane.half; v += 2) {
      Pair value[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) value[k] = values[k][v / 2];
#pragma unroll
      for (int next = 0; next < 2; ++next) {
        if (v + next == plane.half) break;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const Complex<T> weight = weights[j][(v + next) * width];
#pragma unroll
          for (int k = 0; k < 4; ++k)
            sums[k][j] += value[k].of[next].re * weight.re - value[k].of[next].im * weight.im;
        }
      }
    }
    T given[4][4] = {};
#pragma unroll
    for (int k = 0; k < 4; ++k)
#pragma unroll
      for (int j = 0; j < 4; ++j)
        if (plus && 4 * quad + k < lines && at + j * quarter < width)
          given[k][j] = plus[(4 * quad + k) * width + at + j * quarter];
#pragma unroll
    for (int k = 0; k < 4; ++k)
#pragma unroll
      for (int j = 0; j < 4; ++j)
        if (4 * quad + k < lines && at + j * quarter < width)
          result[(4 * quad + k) * width + at + j * quarter] = sums[k][j] + given[k][j];
  }
}

// A whole map: a block has one sample and group. The matrices are (groups, rows, columns, height,
// pitch): c' are the rows, c the columns.
template <typename T>
__global__ void __launch_bounds__(512)
    circular_map(const T* __restrict__ source, const T* __restrict__ minus,
                 const T* __restrict__ plus, const T* __restrict__ matrices_,
                 const T* __restrict__ tables_, T* __restrict__ result, long long groups,
                 long long rows_, long long columns_, PLANE_PARAMETERS, long long first) {
  extern __shared__ __align__(16) unsigned char memory[];
  const Plane plane = PLANE;
  const Tables<T> tables(tables_, plane);
  const int rows = int(rows_), columns = int(columns_), frequencies = plane.height * plane.pitch();
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
    const int f = i / int(a_block), image = i - f * int(a_block), u = f / plane.half;
    const int at = (image * plane.height + u) * plane.pitch() + f - u * plane.half;
    if (image < count) result[f * images + image] = odd[at];
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
    const int f = i / int(a_block), image = i - f * int(a_block), u = f / plane.half;
    const int at = (image * plane.height + u) * plane.pitch() + f - u * plane.half;
    if (image < count) even[at] = spectra[f * images + image];
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
