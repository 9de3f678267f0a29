// What kernels that run under simt.h see of CUDA: barriers, warp collectives, memory spaces and
// built-in variables. Included by simt.h only.
#pragma once

#define SIMT_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()
#define SIMT_SITE (simt::Site{file, line})

inline void __syncthreads(SIMT_HERE) {
  simt::wait(simt::State::kAtBarrier, SIMT_SITE, "__syncthreads");
}
inline void __syncwarp(unsigned mask = 0xffffffffu, SIMT_HERE) {
  simt::warp_collective(mask, [](unsigned, void* const*) {}, nullptr, "__syncwarp", SIMT_SITE);
}
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, SIMT_HERE) {
  const int segment = simt::current % simt::kWarp & ~(width - 1);
  return simt::shuffle(mask, value, segment | (source & (width - 1)), "__shfl_sync", SIMT_SITE);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32, SIMT_HERE) {
  const int source = simt::source_lane(simt::current % simt::kWarp ^ lanes, width);
  return simt::shuffle(mask, value, source, "__shfl_xor_sync", SIMT_SITE);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, int delta, int width = 32, SIMT_HERE) {
  const int source = simt::source_lane(simt::current % simt::kWarp + delta, width);
  return simt::shuffle(mask, value, source, "__shfl_down_sync", SIMT_SITE);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, int delta, int width = 32, SIMT_HERE) {
  const int source = simt::source_lane(simt::current % simt::kWarp - delta, width);
  return simt::shuffle(mask, value, source, "__shfl_up_sync", SIMT_SITE);
}
inline int __any_sync(unsigned mask, int predicate, SIMT_HERE) {
  int mine = predicate;
  simt::warp_collective(
      mask,
      [](unsigned, void* const* lanes) {
        int any = 0;
        for (int i = 0; i < simt::kWarp; i++)
          if (lanes[i]) any |= *static_cast<int*>(lanes[i]);
        for (int i = 0; i < simt::kWarp; i++)
          if (lanes[i]) *static_cast<int*>(lanes[i]) = any;
      },
      &mine, "__any_sync", SIMT_SITE);
  return mine;
}
template <class T>
T __ldg(const T* address) {
  return *address;
}
template <class T>
T __ldcg(const T* address) {
  return *address;
}
template <class T>
T atomicAdd(T* address, T value) {  // fibers do not preempt each other
  const T old = *address;
  *address += value;
  return old;
}
inline float __fdividef(float a, float b) { return a / b; }
inline void __threadfence() {}

#undef threadIdx
#undef blockIdx
#undef blockDim
#undef gridDim
#define threadIdx (simt::fibers[simt::current]->thread)
#define blockIdx (simt::block)
#define blockDim (simt::block_dim)
#define gridDim (simt::grid_dim)

// One block runs at a time on one operating system thread, so thread-local variables are per block,
// and all of them lie in one segment, which poison_shared fills.
#undef __shared__
#undef __global__
#undef __device__
#undef __host__
#undef __launch_bounds__
#define __shared__ static thread_local
#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
