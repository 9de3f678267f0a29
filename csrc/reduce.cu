#include "common.cuh"
#include "reduce.h"

namespace efrdn_fast {
namespace {

constexpr int kColumns = 32, kSlots = 8;  // of a block
constexpr int kRows = 256;                // that a block sums

__device__ void write(const ReduceTargets& targets, int64_t column, float sum) {
  int i = 0;
  while (column >= targets.end[i]) i++;
  const int64_t index = i ? column - targets.end[i - 1] : column;
  EFRDN_FAST_DTYPE_SWITCH(targets.dtype,
                          static_cast<T*>(targets.data[i])[index] = from_float<T>(sum))
}

// Block (i, j) sums rows [256 j, 256 j + 256) of 32 columns: into row j of `next`, or, when they
// are all rows, into the targets.
__global__ void __launch_bounds__(kColumns* kSlots)
    reduce_rows_kernel(const float* partial, int64_t rows, int64_t columns, float* next,
                       const ReduceTargets targets) {
  __shared__ float sums[kSlots][kColumns];
  const int64_t blocks = ceil_div(columns, kColumns);
  const int64_t chunk = blockIdx.x / blocks;
  const int64_t column = blockIdx.x % blocks * kColumns + threadIdx.x % kColumns;
  const int slot = threadIdx.x / kColumns;
  const int64_t first = chunk * kRows, last = first + kRows < rows ? first + kRows : rows;
  float sum = 0.f;
  if (column < columns)
    for (int64_t row = first + slot; row < last; row += kSlots)
      sum += partial[row * columns + column];
  sums[slot][threadIdx.x % kColumns] = sum;
  __syncthreads();
  if (slot > 0 || column >= columns) return;
  sum = 0.f;
#pragma unroll
  for (int i = 0; i < kSlots; i++) sum += sums[i][threadIdx.x];
  if (rows > kRows)
    next[chunk * columns + column] = sum;
  else
    write(targets, column, sum);
}

}  // namespace

int64_t reduce_rows_room(int64_t rows) {
  int64_t room = rows;
  while (rows > kRows) room += rows = ceil_div(rows, kRows);
  return room;
}

cudaError_t launch_reduce_rows(float* partial, int64_t rows, int64_t columns,
                               const ReduceTargets& targets, cudaStream_t stream) {
  for (;;) {
    float* next = partial + rows * columns;
    const int64_t chunks = ceil_div(rows, kRows);
    const cudaError_t error =
        launch(reduce_rows_kernel, chunks * ceil_div(columns, kColumns), kColumns * kSlots, stream,
               static_cast<const float*>(partial), rows, columns, next, targets);
    if (error != cudaSuccess || chunks == 1) return error;
    partial = next;
    rows = chunks;
  }
}

}  // namespace efrdn_fast
