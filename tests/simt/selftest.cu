// Sound and deliberately broken kernels that show what the harness reports. Usage: selftest <name>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "buffer.h"
#include "simt.h"

namespace {

constexpr int kThreads = 64, kBlocks = 3, kCount = kThreads * kBlocks;

// out[block] = sum of its 64 inputs; every primitive on the way.
__global__ void block_sum(const __half* in, float* out) {
  __shared__ float part[kThreads / 32];
  {
    float value = __half2float(in[blockIdx.x * blockDim.x + threadIdx.x]);
    value += __shfl_xor_sync(0xffffffffu, value, 16);
    value += __shfl_down_sync(0xffffffffu, value, 8);
    if (threadIdx.x % 32 < 8) {  // partial mask
      value += __shfl_xor_sync(0x000000ffu, value, 4, 8);
      value += __shfl_xor_sync(0x000000ffu, value, 2, 8);
      const float above = __shfl_up_sync(0x000000ffu, value, 1, 8);
      if (threadIdx.x % 32 == 1) part[threadIdx.x / 32] = value + above;
    }
    __syncwarp();
  }
  __syncthreads();
  if (threadIdx.x == 0) out[blockIdx.x] = part[0] + part[1];
}

// The first warp reads what the second wrote; without the barrier it reads poison.
__global__ void exchange(const float* in, float* out, bool barrier) {
  __shared__ float tile[kThreads];
  const int i = blockIdx.x * kThreads + threadIdx.x;
  tile[threadIdx.x] = in[i];
  if (barrier) __syncthreads();
  out[i] = tile[kThreads - 1 - threadIdx.x];
}

// Threads above the diagonal skip the barrier.
__global__ void skipped_barrier(const float* in, float* out) {
  const int i = blockIdx.x * kThreads + threadIdx.x;
  if (threadIdx.x < 40) __syncthreads();
  out[i] = in[i];
}

__global__ void early_exit(const float* in, float* out) {
  const int i = blockIdx.x * kThreads + threadIdx.x;
  if (threadIdx.x == 5) return;
  __syncthreads();
  out[i] = in[i];
}

__global__ void skipped_shuffle(const float* in, float* out) {
  const int i = blockIdx.x * kThreads + threadIdx.x;
  float value = in[i];
  if (threadIdx.x % 32 != 7) value = __shfl_xor_sync(0xffffffffu, value, 1);
  out[i] = value;
}

__global__ void foreign_lane(const float* in, float* out) {
  const int i = blockIdx.x * kThreads + threadIdx.x;
  float value = in[i];
  if (threadIdx.x % 32 < 8) value = __shfl_sync(0x000000ffu, value, 9);
  out[i] = value;
}

__global__ void shifted(const float* in, float* out, int read, int write) {
  const int i = blockIdx.x * kThreads + threadIdx.x;
  out[i + write] = in[i + read];
}

__global__ void misaligned(const float* in, float* out) {
  const float4 v = *reinterpret_cast<const float4*>(in + 1);
  if (threadIdx.x == 0) out[0] = v.x;
}

__global__ void shared_overrun(const float* in, float* out, int reach) {
  __shared__ float tile[kThreads];
  tile[threadIdx.x + reach] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = tile[threadIdx.x];
}

__global__ void dynamic_overrun(float* out, int reach) {
  auto* tile = reinterpret_cast<float*>(simt::dynamic_bytes.get());
  tile[threadIdx.x + reach] = 1.f;
  __syncthreads();
  out[threadIdx.x] = tile[threadIdx.x];
}

}  // namespace

int main(int argc, char** argv) {
  const std::string name = argc > 1 ? argv[1] : "";
  simt::Buffer in_buffer(kCount * sizeof(float)), out_buffer(kCount * sizeof(float)),
      half_buffer(kCount * sizeof(__half));
  auto* in = reinterpret_cast<float*>(in_buffer.data());
  auto* out = reinterpret_cast<float*>(out_buffer.data());
  auto* half = reinterpret_cast<__half*>(half_buffer.data());
  for (int i = 0; i < kCount; i++) {
    in[i] = static_cast<float>(i);
    half[i] = __float2half(static_cast<float>(i % 7));
  }
  const auto run = [](auto kernel) { simt::launch(kBlocks, kThreads, 0, kernel); };

  if (name == "block_sum") run([&] { block_sum(half, out); });
  if (name == "exchange") run([&] { exchange(in, out, true); });
  if (name == "no_barrier") run([&] { exchange(in, out, false); });
  if (name == "skipped_barrier") run([&] { skipped_barrier(in, out); });
  if (name == "early_exit") run([&] { early_exit(in, out); });
  if (name == "skipped_shuffle") run([&] { skipped_shuffle(in, out); });
  if (name == "foreign_lane") run([&] { foreign_lane(in, out); });
  if (name == "read_after_end") run([&] { shifted(in, out, 1, 0); });
  if (name == "read_before_start") run([&] { shifted(in, out, -1, 0); });
  if (name == "write_after_end") run([&] { shifted(in, out, 0, 1); });
  if (name == "write_before_start") run([&] { shifted(in, out, 0, -1); });
  if (name == "misaligned") run([&] { misaligned(in, out); });
  if (name == "shared_overrun") run([&] { shared_overrun(in, out, 1); });
  if (name == "dynamic_overrun")
    simt::launch(1, kThreads, kThreads * sizeof(float), [&] { dynamic_overrun(out, 1); });

  for (int i = 0; i < kCount; i++) std::printf("%g\n", out[i]);
}
