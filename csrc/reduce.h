// Deterministic sum of the partial results that the blocks of a kernel leave behind.
#pragma once

#include <cuda_runtime_api.h>

#include "types.h"

namespace efrdn_fast {

// Where the columns of a reduction go: the first `end[0]` to data[0], those up to end[1] to
// data[1]..
struct ReduceTargets {
  static constexpr int kMax = 10;
  void* data[kMax];
  int64_t end[kMax];
  int count = 0;
  Dtype dtype;  // of all of them

  void add(void* target, int64_t columns) {
    data[count] = target;
    end[count] = (count ? end[count - 1] : 0) + columns;
    count++;
  }
};

// Rows of float that `partial` must have room for when `rows` of them are summed.
int64_t reduce_rows_room(int64_t rows);

// Sums each column of partial [rows, columns] in a fixed order. Overwrites the room behind the
// rows.
cudaError_t launch_reduce_rows(float* partial, int64_t rows, int64_t columns,
                               const ReduceTargets& targets, cudaStream_t stream);

}  // namespace efrdn_fast
