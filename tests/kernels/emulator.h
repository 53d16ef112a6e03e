// Runs CUDA kernels on a CPU, a thread a thread, for the tests. Blocks go one after the other.

#pragma once
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __shared__
#define __align__(n)
#define __launch_bounds__(...)
using std::abs;
using std::log;
using std::log1p;
using std::exp;
using std::tanh;
using std::atanh;
using std::erfc;
using std::sqrt;

struct Dim {
  int x;
};
static thread_local Dim threadIdx, blockIdx;
static Dim blockDim, gridDim;
extern "C" {
alignas(64) unsigned char memory[1 << 18];
}

static std::unique_ptr<std::barrier<>> block_barrier;
static std::vector<std::unique_ptr<std::barrier<>>> warp_barriers;
static unsigned char slots[1024][8];

static void __syncthreads() { block_barrier->arrive_and_wait(); }

template <typename T>
T __shfl_xor_sync(unsigned, T value, int other) {
  auto& warp = *warp_barriers[threadIdx.x / 32];
  std::memcpy(slots[threadIdx.x], &value, sizeof value);
  warp.arrive_and_wait();
  T found;
  std::memcpy(&found, slots[threadIdx.x ^ other], sizeof found);
  warp.arrive_and_wait();
  return found;
}

template <typename P>
P slot_as(const std::uint64_t* slots, std::size_t i) {
  static_assert(sizeof(P) == 8);
  P value;
  std::memcpy(&value, slots + i, 8);
  return value;
}

template <typename... P, std::size_t... I>
void call(void (*kernel)(P...), const std::uint64_t* slots, std::index_sequence<I...>) {
  kernel(slot_as<P>(slots, I)...);
}

template <typename... P>
void launch(void (*kernel)(P...), int blocks, int threads, const std::uint64_t* arguments) {
  static bool backwards = false;  // blocks must not wait for each other: the order is no one's
  backwards = !backwards;
  gridDim = {blocks};
  blockDim = {threads};
  block_barrier = std::make_unique<std::barrier<>>(threads);
  warp_barriers.clear();
  for (int i = 0; i < threads; i += 32) warp_barriers.push_back(std::make_unique<std::barrier<>>(32));
  std::vector<std::thread> pool;
  for (int t = 0; t < threads; ++t)
    pool.emplace_back([=] {
      threadIdx = {t};
      for (int b = 0; b < blocks; ++b) {
        blockIdx = {backwards ? blocks - 1 - b : b};
        call(kernel, arguments, std::index_sequence_for<P...>());
        // A block begins when all of the last one have left, as shared memory is one.
        block_barrier->arrive_and_wait();
      }
    });
  for (auto& thread : pool) thread.join();
}
