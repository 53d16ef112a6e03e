// Conjugate gradients on a batch of systems: what is between the operator and its preconditioner.
//
// The entries of a sample are dealt out to some blocks. A sum over a sample is left as one number a
// block, for whoever needs it to add up: no block waits for another, and the order is always the
// same. What all blocks of a sample read, none writes: it has an old and a new place.

struct Share {
  long long sample, begin, end;
  int parts;
  __device__ Share(long long shares, long long entries) : parts(int(shares)) {
    sample = blockIdx.x / parts;
    const long long part = blockIdx.x - sample * parts, each = (entries + parts - 1) / parts;
    begin = sample * entries + part * each;
    end = sample * entries + ((part + 1) * each < entries ? (part + 1) * each : entries);
  }
  __device__ bool speaks() const { return blockIdx.x == sample * parts && threadIdx.x == 0; }
  // A sum over the sample, of what its blocks have left.
  template <typename T>
  __device__ T total(const T* __restrict__ sums) const {
    T sum = 0;
#pragma unroll 4
    for (int i = 0; i < parts; ++i) sum += sums[sample * parts + i];
    return sum;
  }
};

// The sum over a block's threads, left for the sample.
template <typename T>
__device__ void leave_sum(T value, T* sums) {
  extern __shared__ __align__(16) unsigned char memory[];
  T* warps = (T*)memory;
  for (int other = 16; other > 0; other /= 2)
    value += __shfl_xor_sync(0xffffffffu, value, other);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
  __syncthreads();
  if (threadIdx.x > 0) return;
  T sum = 0;
  for (int i = 0; i < blockDim.x / 32; ++i) sum += warps[i];
  sums[blockIdx.x] = sum;
}

template <typename T>
__global__ void dots(const T* __restrict__ a, const T* __restrict__ b, T* sums, long long parts,
                     long long entries) {
  const Share share(parts, entries);
  T sum = 0;
#pragma unroll 4
  for (long long i = share.begin + threadIdx.x; i < share.end; i += blockDim.x) sum += a[i] * b[i];
  leave_sum(sum, sums);
}

// The next direction: p = z + (z, r) / (what that was in the last step) p.
template <typename T>
__global__ void turn(const T* __restrict__ z, T* p, const T* __restrict__ heights,
                     const T* __restrict__ heights_before, const unsigned char* running,
                     long long parts, long long entries, double tiny) {
  const Share share(parts, entries);
  if (!running[share.sample]) return;
  const T before = share.total(heights_before);
  const T ratio = share.total(heights) / (before > T(tiny) ? before : T(tiny));
#pragma unroll 4
  for (long long i = share.begin + threadIdx.x; i < share.end; i += blockDim.x)
    p[i] = z[i] + ratio * p[i];
}

// Whether a sample goes on, and how far: it ends where there is no curvature, or none in this
// precision.
template <typename T>
struct Length {
  T length;
  bool sound;
  __device__ Length(const Share& share, const T* heights, const T* curvatures,
                    const unsigned char* running, T tiny) {
    const T height = share.total(heights), curvature = share.total(curvatures);
    sound = running[share.sample] && curvature > tiny && height > tiny &&
            curvature - curvature == 0;
    length = sound ? height / curvature : T(0);
  }
};

// A step along p, whose image is q, and the squares of what is left.
template <typename T>
__global__ void advance(T* x, T* r, const T* __restrict__ p, const T* __restrict__ q,
                        const T* __restrict__ heights, const T* __restrict__ curvatures,
                        const unsigned char* running, T* squares, long long parts,
                        long long entries, double tiny) {
  const Share share(parts, entries);
  const Length<T> step(share, heights, curvatures, running, T(tiny));
  T sum = 0;
  if (step.sound) {
#pragma unroll 4
    for (long long i = share.begin + threadIdx.x; i < share.end; i += blockDim.x) {
      x[i] += step.length * p[i];
      const T left = r[i] - step.length * q[i];
      r[i] = left;
      sum += left * left;
    }
  }
  leave_sum(sum, squares);
}

// What is the best yet is kept, and told how it went.
template <typename T>
__global__ void keep(const T* __restrict__ x, T* found, const T* __restrict__ heights,
                     const T* __restrict__ curvatures, const T* __restrict__ squares,
                     const T* __restrict__ norms, const T* __restrict__ best, T* best_now,
                     const unsigned char* running, unsigned char* running_now, long long* steps,
                     long long step, long long parts, long long entries, double tolerance,
                     double tiny) {
  const Share share(parts, entries);
  const bool sound = Length<T>(share, heights, curvatures, running, T(tiny)).sound;
  const T norm = norms[share.sample];
  const T left = sqrt(share.total(squares)) / (norm > T(tiny) ? norm : T(tiny));
  const bool better = sound && left < best[share.sample];
  if (better) {
#pragma unroll 4
    for (long long i = share.begin + threadIdx.x; i < share.end; i += blockDim.x) found[i] = x[i];
  }
  if (!share.speaks()) return;
  best_now[share.sample] = better ? left : best[share.sample];
  running_now[share.sample] = sound && !(left <= T(tolerance));
  if (sound) steps[share.sample] = step;
}
