// One matrix a frequency: block-circulant maps of small images (Eq. 12-20).
//
// A block takes its images there and back without leaving shared memory: rows there, columns there;
// columns back, rows back. The transforms are products with tables. A thread makes a tile of the
// result, for what is loaded costs more than what is computed: the more, the wider the tile, and the
// fewer threads have anything to do. Of an even size, results come in pairs, from the sum over the
// even terms and that over the odd ones. Where a map is small, one kernel does it all, the product
// between the transforms, too; else the product is a library's, on frequencies first.

template <typename T>
struct alignas(2 * sizeof(T)) Complex {
  T re, im;
};

// Neighbours, which loads of up to 16 bytes bring.
template <typename V, int n>
struct alignas(n * sizeof(V) < 16 ? n * sizeof(V) : 16) Neighbours {
  V of[n];
};

// The real products one after the other: each is one instruction with its sum.
template <typename T>
__device__ void add_product(Complex<T>& sum, const Complex<T>& a, const Complex<T>& b) {
  sum.re += a.re * b.re;
  sum.re -= a.im * b.im;
  sum.im += a.re * b.im;
  sum.im += a.im * b.re;
}

__device__ constexpr int parts(int n, int each) { return (n + each - 1) / each; }
__device__ constexpr int quads(int n) { return parts(n, 4); }

// Division of numbers below 2^20, without the many steps that integers take.
struct Divider {
  float over;
  __device__ Divider(int by) : over(1.0f / float(by)) {}
  __device__ int operator()(int i) const { return int((float(i) + 0.5f) * over); }
};

// A grid and the corners of it that source and result lie in. In shared memory a line of a half
// spectrum takes `pitch` numbers, an even count; what is in the last, if it is one too many, does
// not matter.
struct Plane {
  int height, width, source_h, source_w, result_h, result_w;
  __device__ int half() const { return width / 2 + 1; }
  __device__ int pitch() const { return half() + half() % 2; }
  __device__ int frequencies() const { return height * half(); }
  // Of real images, the lower half of the columns v = 0 and v = width / 2 is the conjugate of the
  // upper one. What a library multiplies are the others, line by line: `upper` whole lines, then
  // lines of the `inner` columns.
  __device__ int upper() const { return height / 2 + 1; }
  __device__ int inner() const { return half() - (width % 2 == 0 ? 2 : 1); }
  __device__ int independent() const { return upper() * half() + (height - upper()) * inner(); }
  // How many results of a column, and of a line there and back, are made; the others are their pairs:
  // u and u + height / 2, v and width / 2 - v, q and q + width / 2.
  __device__ int columns(int results) const {
    return height % 2 == 0 && results > height / 2 ? height / 2 : results;
  }
  __device__ int there() const { return width % 2 == 0 ? width / 4 + 1 : half(); }
  __device__ int back() const {
    return width % 2 == 0 && result_w > width / 2 ? width / 2 : result_w;
  }
};

#define PLANE_PARAMETERS                                                                       \
  long long height_, long long width_, long long source_h_, long long source_w_,               \
      long long result_h_, long long result_w_
#define PLANE \
  { int(height_), int(width_), int(source_h_), int(source_w_), int(result_h_), int(result_w_) }

// The tables: columns there (source_h, .), columns back (height, .), rows there (source_w, .), all
// of them filled up to a multiple of four; rows back (half, .).
template <typename T>
struct Tables {
  const Complex<T>*columns_there, *columns_back, *rows_there, *rows_back;
  __device__ Tables(const T* tables, const Plane& plane) {
    columns_there = (const Complex<T>*)tables;
    columns_back = columns_there + plane.source_h * quads(plane.columns(plane.height)) * 4;
    rows_there = columns_back + plane.height * quads(plane.columns(plane.result_h)) * 4;
    rows_back = rows_there + plane.source_w * quads(plane.there()) * 4;
  }
};

// The residual of some lines, transposed: (source_w, quads of lines, 4), an odd number of quads, so
// that neighbours in a line do not meet in a bank. Of copies, the source has one number for a tile of
// `down` by `across` entries.
template <typename T, bool copies>
__device__ void load_residual(const T* __restrict__ source, const T* __restrict__ minus,
                              T* residual, int lines, int source_w, int down, int across) {
  Neighbours<T, 4>* to = (Neighbours<T, 4>*)residual;
  const int step = quads(lines) | 1, tiles_w = copies ? source_w / across : source_w;
  const Divider by_width(source_w), by_down(down), by_across(across);
#pragma unroll 2
  for (int i = threadIdx.x; i < quads(lines) * source_w; i += blockDim.x) {
    const int quad = by_width(i), at = i - quad * source_w;
    // The line of tiles that a line is in, and which one of that it is.
    int row = copies ? by_down(4 * quad) : 4 * quad, within = copies ? 4 * quad - row * down : 0;
    const T* column = source + (copies ? by_across(at) : at);
    Neighbours<T, 4> values;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int line = 4 * quad + k, from = line * source_w + at;
      values.of[k] =
          line < lines ? column[row * tiles_w] - (minus ? minus[from] : T(0)) : T(0);
      const bool next = !copies || ++within == down;
      row += next;
      within = next ? 0 : within;
    }
    to[at * step + quad] = values;
  }
}

template <typename T, int n>
__device__ void add_outer(Complex<T> (&sums)[4][n], const Neighbours<T, 4>& values,
                          const Neighbours<Complex<T>, n>& weights) {
#pragma unroll
  for (int k = 0; k < 4; ++k)
#pragma unroll
    for (int j = 0; j < n; ++j) {
      sums[k][j].re += values.of[k] * weights.of[j].re;
      sums[k][j].im += values.of[k] * weights.of[j].im;
    }
}

// Lines to half spectra: (lines, pitch). A tile has four lines.
template <typename T, int tile>
__device__ void rows_there(const T* residual, Complex<T>* to, int lines, const Plane& plane,
                           const Complex<T>* __restrict__ table) {
  constexpr int n = (tile + 1) / 2;
  const int wide = parts(plane.there(), n), step = quads(lines) | 1, pitch = plane.pitch();
  const int stride = quads(plane.there()) * 4 / n;
  const bool splits = plane.width % 2 == 0;
  for (int i = threadIdx.x; i < quads(lines) * wide; i += blockDim.x) {
    const int quad = i / wide, at = i - quad * wide;
    const Neighbours<T, 4>* values = (const Neighbours<T, 4>*)residual + quad;
    const Neighbours<Complex<T>, n>* weights = (const Neighbours<Complex<T>, n>*)table + at;
    Complex<T> even[4][n] = {}, odd[4][n] = {};
    int w = 0;
    if (splits) {
#pragma unroll 2
      for (; w + 1 < plane.source_w; w += 2) {
        add_outer<T, n>(even, values[w * step], weights[w * stride]);
        add_outer<T, n>(odd, values[(w + 1) * step], weights[(w + 1) * stride]);
      }
    }
#pragma unroll 2
    for (; w < plane.source_w; ++w) add_outer<T, n>(even, values[w * step], weights[w * stride]);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if (4 * quad + k >= lines) break;
      Complex<T>* line = to + (4 * quad + k) * pitch;
#pragma unroll
      for (int j = 0; j < n; ++j) {
        const int v = n * at + j;
        if (v >= plane.there()) break;
        const Complex<T> a = even[k][j], b = odd[k][j];
        line[v] = {a.re + b.re, a.im + b.im};
        if (splits) line[plane.width / 2 - v] = {a.re - b.re, b.im - a.im};
      }
    }
  }
}

template <typename T, int n>
__device__ void add_outer(Complex<T> (&sums)[n][2], const Neighbours<Complex<T>, n>& weights,
                          const Neighbours<Complex<T>, 2>& values) {
#pragma unroll
  for (int k = 0; k < n; ++k)
#pragma unroll
    for (int j = 0; j < 2; ++j) add_product(sums[k][j], values.of[j], weights.of[k]);
}

// Along columns, there or back: (images, terms, pitch) to (images, results, pitch). A tile has two
// columns.
template <typename T, int tile>
__device__ void along_columns(const Complex<T>* from, Complex<T>* to, int images, int terms,
                              int results, const Plane& plane,
                              const Complex<T>* __restrict__ table) {
  typedef Neighbours<Complex<T>, 2> Pair;
  const int pairs = plane.pitch() / 2, made = plane.columns(results), wide = parts(made, tile);
  const int stride = quads(made) * 4 / tile;
  const bool splits = plane.height % 2 == 0;
  for (int i = threadIdx.x; i < images * wide * pairs; i += blockDim.x) {
    const int line = i / pairs, pair = i - line * pairs;
    const int image = line / wide, at = line - image * wide;
    const Pair* values = (const Pair*)from + image * terms * pairs + pair;
    const Neighbours<Complex<T>, tile>* weights = (const Neighbours<Complex<T>, tile>*)table + at;
    Pair* found = (Pair*)to + image * results * pairs + pair;
    Complex<T> even[tile][2] = {}, odd[tile][2] = {};
    int k = 0;
    if (splits) {
#pragma unroll 2
      for (; k + 1 < terms; k += 2) {
        add_outer<T, tile>(even, weights[k * stride], values[k * pairs]);
        add_outer<T, tile>(odd, weights[(k + 1) * stride], values[(k + 1) * pairs]);
      }
    }
#pragma unroll 2
    for (; k < terms; ++k) add_outer<T, tile>(even, weights[k * stride], values[k * pairs]);
#pragma unroll
    for (int k = 0; k < tile; ++k) {
      const int u = tile * at + k, other = u + plane.height / 2;
      if (u >= made) break;
      Pair sum, difference;
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        sum.of[j] = {even[k][j].re + odd[k][j].re, even[k][j].im + odd[k][j].im};
        difference.of[j] = {even[k][j].re - odd[k][j].re, even[k][j].im - odd[k][j].im};
      }
      found[u * pairs] = sum;
      if (splits && other < results) found[other * pairs] = difference;
    }
  }
}

// Half spectra to lines, and the sum. A tile has four lines; its columns are as far apart as there
// are tiles in a line, so that neighbouring threads write neighbours.
template <typename T, int tile>
__device__ void rows_back(const Complex<T>* from, const T* __restrict__ plus,
                          T* __restrict__ result, int lines, const Plane& plane,
                          const Complex<T>* __restrict__ table) {
  typedef Neighbours<Complex<T>, 2> Pair;
  const int width = plane.result_w, made = plane.back(), wide = parts(made, tile);
  const int pairs = plane.pitch() / 2, half = plane.half();
  const bool splits = plane.width % 2 == 0;
  for (int i = threadIdx.x; i < quads(lines) * wide; i += blockDim.x) {
    const int quad = i / wide, at = i - quad * wide;
    T even[4][tile] = {}, odd[4][tile] = {};
    const Pair* values[4];
    const Complex<T>* weights[tile];
#pragma unroll
    for (int k = 0; k < 4; ++k)
      values[k] = (const Pair*)from + (4 * quad + k < lines ? 4 * quad + k : lines - 1) * pairs;
#pragma unroll
    for (int j = 0; j < tile; ++j)
      weights[j] = table + (at + j * wide < made ? at + j * wide : made - 1);
    for (int v = 0; v < half; v += 2) {
      Pair value[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) value[k] = values[k][v / 2];
#pragma unroll
      for (int j = 0; j < tile; ++j) {
        const Complex<T> weight = weights[j][v * made];
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          even[k][j] += value[k].of[0].re * weight.re;
          even[k][j] -= value[k].of[0].im * weight.im;
        }
      }
      if (v + 1 == half) break;
#pragma unroll
      for (int j = 0; j < tile; ++j) {
        const Complex<T> weight = weights[j][(v + 1) * made];
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          odd[k][j] += value[k].of[1].re * weight.re;
          odd[k][j] -= value[k].of[1].im * weight.im;
        }
      }
    }
    const long long start = 4 * quad * width;
    T given[4][tile][2] = {};  // all of them on their way before the first is waited for
#pragma unroll
    for (int k = 0; k < 4; ++k)
#pragma unroll
      for (int j = 0; j < tile; ++j) {
        const int q = at + j * wide, other = q + plane.width / 2;
        const bool inside = plus && 4 * quad + k < lines && q < made;
        if (inside) given[k][j][0] = plus[start + k * width + q];
        if (inside && splits && other < width) given[k][j][1] = plus[start + k * width + other];
      }
#pragma unroll
    for (int k = 0; k < 4; ++k)
#pragma unroll
      for (int j = 0; j < tile; ++j) {
        const int q = at + j * wide, other = q + plane.width / 2;
        const bool inside = 4 * quad + k < lines && q < made;
        if (inside) result[start + k * width + q] = given[k][j][0] + (even[k][j] + odd[k][j]);
        if (inside && splits && other < width)
          result[start + k * width + other] = given[k][j][1] + (even[k][j] - odd[k][j]);
      }
  }
}

// A whole map: a block has one sample and group. The matrices are (groups, rows, columns, height,
// pitch): c' are the rows, c the columns.
template <typename T, bool copies, int tile>
__global__ void __launch_bounds__(384, 2)
    circular_map(const T* __restrict__ source, const T* __restrict__ minus,
                 const T* __restrict__ plus, const T* __restrict__ matrices_,
                 const T* __restrict__ tables_, T* __restrict__ result, long long groups,
                 long long rows_, long long columns_, PLANE_PARAMETERS, long long first,
                 long long down, long long across) {
  extern __shared__ __align__(16) unsigned char memory[];
  const Plane plane = PLANE;
  const Tables<T> tables(tables_, plane);
  const int rows = int(rows_), columns = int(columns_), numbers = plane.height * plane.pitch();
  const int lines = columns * plane.source_h, lines_back = rows * plane.result_h;
  Complex<T>* even = (Complex<T>*)memory;
  Complex<T>* odd = even + first;

  const long long sample = blockIdx.x;  // of a group
  const long long there = sample * lines * plane.source_w;
  load_residual<T, copies>(source + there / (down * across), minus ? minus + there : nullptr,
                           (T*)odd, lines, plane.source_w, int(down), int(across));
  __syncthreads();
  rows_there<T, tile>((const T*)odd, even, lines, plane, tables.rows_there);
  __syncthreads();
  along_columns<T, tile>(even, odd, columns, plane.source_h, plane.height, plane,
                         tables.columns_there);
  __syncthreads();

  const Complex<T>* matrices = (const Complex<T>*)matrices_ +
                               (sample % groups) * rows * columns * (long long)numbers;
  const Divider by_numbers(numbers);
  for (int i = threadIdx.x; i < quads(rows) * numbers; i += blockDim.x) {
    const int quad = by_numbers(i), f = i - quad * numbers;
    Complex<T> sums[4] = {};
#pragma unroll 4
    for (int c = 0; c < columns; ++c) {
      const Complex<T> value = odd[c * numbers + f];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int row = 4 * quad + k < rows ? 4 * quad + k : rows - 1;
        add_product(sums[k], value, matrices[(row * columns + c) * (long long)numbers + f]);
      }
    }
#pragma unroll
    for (int k = 0; k < 4; ++k)
      if (4 * quad + k < rows) even[(4 * quad + k) * numbers + f] = sums[k];
  }
  __syncthreads();

  along_columns<T, tile>(even, odd, rows, plane.height, plane.result_h, plane,
                         tables.columns_back);
  __syncthreads();
  const long long back = sample * lines_back * plane.result_w;
  rows_back<T, tile>(odd, plus ? plus + back : nullptr, result + back, lines_back, plane,
                     tables.rows_back);
}

// The images of a block, and which of their numbers a thread carries between its memory, (images,
// height, pitch), and a library's, (frequencies, all images).
struct Images {
  int each, count, image, first, step;
  long long start;
  __device__ Images(long long a_block, long long images) : each(int(a_block)) {
    start = blockIdx.x * a_block;
    count = int(images - start < a_block ? images - start : a_block);
    image = threadIdx.x % each;
    first = threadIdx.x / each;
    step = blockDim.x / each;
  }
};

// The spectra of some images a block, frequencies first: (independent, images).
template <typename T, bool copies, int tile>
__global__ void __launch_bounds__(384, 2)
    spectra(const T* __restrict__ source, const T* __restrict__ minus,
            const T* __restrict__ tables_, T* __restrict__ result_, long long images,
            long long a_block, PLANE_PARAMETERS, long long first, long long down,
            long long across) {
  extern __shared__ __align__(16) unsigned char memory[];
  const Plane plane = PLANE;
  const Tables<T> tables(tables_, plane);
  const Images block(a_block, images);
  const int lines = block.count * plane.source_h;
  Complex<T>* even = (Complex<T>*)memory;
  Complex<T>* odd = even + first;

  const long long there = block.start * plane.source_h * plane.source_w;
  load_residual<T, copies>(source + there / (down * across), minus ? minus + there : nullptr,
                           (T*)odd, lines, plane.source_w, int(down), int(across));
  __syncthreads();
  rows_there<T, tile>((const T*)odd, even, lines, plane, tables.rows_there);
  __syncthreads();
  along_columns<T, tile>(even, odd, block.count, plane.source_h, plane.height, plane,
                         tables.columns_there);
  __syncthreads();
  if (block.image >= block.count) return;
  const Complex<T>* from = odd + block.image * plane.height * plane.pitch();
  Complex<T>* result = (Complex<T>*)result_ + block.start + block.image;
  const int half = plane.half(), inner = plane.inner(), whole = plane.upper() * half;
  const Divider by_half(half), by_inner(inner > 0 ? inner : 1);
#pragma unroll 4
  for (int f = block.first; f < plane.independent(); f += block.step) {
    const int lower = f - whole, row = lower < 0 ? by_half(f) : by_inner(lower);
    const int at = lower < 0 ? row * plane.pitch() + f - row * half
                             : (plane.upper() + row) * plane.pitch() + 1 + lower - row * inner;
    result[f * images] = from[at];
  }
}

// The images of spectra, frequencies first, and the sum.
template <typename T, int tile>
__global__ void __launch_bounds__(384, 2)
    images_of(const T* __restrict__ spectra_, const T* __restrict__ plus,
              const T* __restrict__ tables_, T* __restrict__ result, long long images,
              long long a_block, PLANE_PARAMETERS, long long first) {
  extern __shared__ __align__(16) unsigned char memory[];
  const Plane plane = PLANE;
  const Tables<T> tables(tables_, plane);
  const Images block(a_block, images);
  Complex<T>* even = (Complex<T>*)memory;
  Complex<T>* odd = even + first;

  if (block.image < block.count) {
    const Complex<T>* spectra = (const Complex<T>*)spectra_ + block.start + block.image;
    Complex<T>* to = even + block.image * plane.height * plane.pitch();
    const int half = plane.half(), upper = plane.upper(), inner = plane.inner();
    const Divider by_half(half);
#pragma unroll 8
    for (int f = block.first; f < plane.frequencies(); f += block.step) {
      const int row = by_half(f), v = f - row * half;
      const bool conjugate = row >= upper && (v == 0 || 2 * v == plane.width);
      const int at = conjugate     ? (plane.height - row) * half + v
                     : row < upper ? f
                                   : upper * half + (row - upper) * inner + v - 1;
      const Complex<T> value = spectra[at * images];
      to[row * plane.pitch() + v] = {value.re, conjugate ? -value.im : value.im};
    }
  }
  __syncthreads();
  along_columns<T, tile>(even, odd, block.count, plane.height, plane.result_h, plane,
                         tables.columns_back);
  __syncthreads();
  const long long back = block.start * plane.result_h * plane.result_w;
  rows_back<T, tile>(odd, plus ? plus + back : nullptr, result + back,
                     block.count * plane.result_h, plane, tables.rows_back);
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
