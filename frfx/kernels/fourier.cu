// One matrix a frequency: block-circulant maps of small images in one kernel (Eq. 12-20).
//
// A block takes one sample and group from the residual to the deviation without leaving shared
// memory: rows there, columns there, the product, columns back, rows back. The transforms are
// products with tables. A thread makes four results at once, so that it computes more than it loads.

template <typename T>
struct alignas(2 * sizeof(T)) Complex {
  T re, im;
};

// Four neighbours, which two loads of 16 bytes bring if they are complex in single.
template <typename V>
struct alignas(16) Four {
  V of[4];
};

// sum_k values[k * stride] * weights[k][0..3], where the weights are rows of a padded table.
template <typename T>
__device__ void four_sums(const Complex<T>* values, int stride,
                          const Four<Complex<T>>* __restrict__ weights, int width, int terms,
                          Complex<T> sums[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) sums[i] = {0, 0};
#pragma unroll 4
  for (int k = 0; k < terms; ++k) {
    const Complex<T> value = values[k * stride];
    const Four<Complex<T>> weight = weights[k * width];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      sums[i].re += value.re * weight.of[i].re - value.im * weight.of[i].im;
      sums[i].im += value.re * weight.of[i].im + value.im * weight.of[i].re;
    }
  }
}

// The tables: columns there (source_h, height up to a multiple of 4), columns back (height, result_h
// up to a multiple of 4), rows there (source_w, half), rows back (half, result_w). The matrices are
// (groups, rows, columns, height, half): c' are the rows, c the columns.
template <typename T>
__global__ void __launch_bounds__(512)
    circular_map(const T* __restrict__ source, const T* __restrict__ minus,
                 const T* __restrict__ plus, const T* __restrict__ matrices_,
                 const T* __restrict__ tables_, T* __restrict__ result, long long groups_,
                 long long rows_, long long columns_, long long height_, long long width_,
                 long long source_h_, long long source_w_, long long result_h_,
                 long long result_w_, long long first_) {
  extern __shared__ __align__(16) unsigned char memory[];
  const int groups = int(groups_), rows = int(rows_), columns = int(columns_);
  const int height = int(height_), half = int(width_) / 2 + 1;
  const int source_h = int(source_h_), source_w = int(source_w_);
  const int result_h = int(result_h_), result_w = int(result_w_);
  const int height4 = (height + 3) / 4, result4 = (result_h + 3) / 4;
  const int lines = columns * source_h, lines4 = (lines + 3) / 4;
  const int frequencies = height * half, lines_back = rows * result_h;
  const int thread = threadIdx.x, threads = blockDim.x;

  const Four<Complex<T>>* columns_there = (const Four<Complex<T>>*)tables_;
  const Four<Complex<T>>* columns_back = columns_there + source_h * height4;
  const Complex<T>* rows_there = (const Complex<T>*)(columns_back + height * result4);
  const Complex<T>* rows_back = rows_there + source_w * half;
  Complex<T>* even = (Complex<T>*)memory;  // what steps 1 and 3 write
  Complex<T>* odd = even + first_;         // what steps 0, 2 and 4 write
  T* residual = (T*)odd;                   // transposed: (source_w, lines up to a multiple of 4)

  // Step 0: the residual.
  const long long sample = blockIdx.x;  // of a group
  source += sample * lines * source_w;
  if (minus) minus += sample * lines * source_w;
#pragma unroll 4
  for (int i = thread; i < 4 * lines4 * source_w; i += threads) {
    const int line = i / source_w, at = i - line * source_w;
    const bool inside = line < lines;
    const T taken = inside && minus ? minus[i] : T(0);
    residual[at * 4 * lines4 + line] = inside ? source[i] - taken : T(0);
  }
  __syncthreads();

  // Step 1: rows there.
  for (int i = thread; i < lines4 * half; i += threads) {
    const int quad = i / half, v = i - quad * half;
    Complex<T> sums[4] = {};
#pragma unroll 4
    for (int at = 0; at < source_w; ++at) {
      const Complex<T> weight = rows_there[at * half + v];
      const Four<T> values = ((const Four<T>*)residual)[at * lines4 + quad];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        sums[k].re += values.of[k] * weight.re;
        sums[k].im += values.of[k] * weight.im;
      }
    }
#pragma unroll
    for (int k = 0; k < 4; ++k)
      if (4 * quad + k < lines) even[(4 * quad + k) * half + v] = sums[k];
  }
  __syncthreads();

  // Step 2: columns there.
  for (int i = thread; i < columns * height4 * half; i += threads) {
    const int line = i / half, v = i - line * half;
    const int c = line / height4, quad = line - c * height4;
    Complex<T> sums[4];
    four_sums(even + c * source_h * half + v, half, columns_there + quad, height4, source_h, sums);
#pragma unroll
    for (int k = 0; k < 4; ++k)
      if (4 * quad + k < height) odd[(c * height + 4 * quad + k) * half + v] = sums[k];
  }
  __syncthreads();

  // Step 3: the product.
  const Complex<T>* matrices = (const Complex<T>*)matrices_ +
                               (sample % groups) * rows * columns * (long long)frequencies;
  const int rows4 = (rows + 3) / 4;
  for (int i = thread; i < rows4 * frequencies; i += threads) {
    const int quad = i / frequencies, f = i - quad * frequencies;
    Complex<T> sums[4] = {};
#pragma unroll 4
    for (int c = 0; c < columns; ++c) {
      const Complex<T> value = odd[c * frequencies + f];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int row = 4 * quad + k < rows ? 4 * quad + k : rows - 1;
        const Complex<T> m = matrices[(row * columns + c) * (long long)frequencies + f];
        sums[k].re += value.re * m.re - value.im * m.im;
        sums[k].im += value.re * m.im + value.im * m.re;
      }
    }
#pragma unroll
    for (int k = 0; k < 4; ++k)
      if (4 * quad + k < rows) even[(4 * quad + k) * frequencies + f] = sums[k];
  }
  __syncthreads();

  // Step 4: columns back.
  for (int i = thread; i < rows * result4 * half; i += threads) {
    const int line = i / half, v = i - line * half;
    const int c = line / result4, quad = line - c * result4;
    Complex<T> sums[4];
    four_sums(even + c * frequencies + v, half, columns_back + quad, result4, height, sums);
#pragma unroll
    for (int k = 0; k < 4; ++k)
      if (4 * quad + k < result_h) odd[(c * result_h + 4 * quad + k) * half + v] = sums[k];
  }
  __syncthreads();

  // Step 5: rows back, and the sum.
  result += sample * lines_back * result_w;
  if (plus) plus += sample * lines_back * result_w;
  for (int i = thread; i < (lines_back + 3) / 4 * result_w; i += threads) {
    const int quad = i / result_w, q = i - quad * result_w;
    const int there = lines_back - 4 * quad < 4 ? lines_back - 4 * quad : 4;
    T sums[4] = {};
    if (plus) {
#pragma unroll
      for (int k = 0; k < 4; ++k)
        if (k < there) sums[k] = plus[(4 * quad + k) * result_w + q];
    }
#pragma unroll 4
    for (int v = 0; v < half; ++v) {
      const Complex<T> weight = rows_back[v * result_w + q];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const Complex<T> value = odd[(4 * quad + (k < there ? k : there - 1)) * half + v];
        sums[k] += value.re * weight.re - value.im * weight.im;
      }
    }
#pragma unroll
    for (int k = 0; k < 4; ++k)
      if (k < there) result[(4 * quad + k) * result_w + q] = sums[k];
  }
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
