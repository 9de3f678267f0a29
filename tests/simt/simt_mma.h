// The tensor core instructions of csrc/mma.cuh for kernels that run under simt.h.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "simt.h"

namespace simt {

struct MmaOperands {
  float* d;
  const unsigned *a, *b;
};

// Value k of the words `words[0]` (t) and `words[stride]` (t + 4) that the lanes of a row hold.
template <class T>
float mma_value(unsigned word, int half) {
  if constexpr (std::is_same_v<T, float>) {
    word &= ~0x1fffu;  // TF32
    float value;
    std::memcpy(&value, &word, sizeof value);
    return value;
  } else {
    T values[2];
    std::memcpy(static_cast<void*>(values), &word, sizeof values);
    return static_cast<float>(values[half]);
  }
}

template <class T>
void mma(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2], SIMT_HERE) {
  MmaOperands mine{d, a, b};
  warp_collective(
      ~0u,
      [](unsigned, void* const* lanes) {
        constexpr int kPerWord = sizeof(unsigned) / sizeof(T), kDepth = 8 * kPerWord;
        const auto lane = [&](int i) { return *static_cast<MmaOperands*>(lanes[i]); };
        float left[16][kDepth], right[kDepth][8];
        for (int i = 0; i < kWarp; i++)
          for (int word = 0; word < 2; word++)
            for (int half = 0; half < kPerWord; half++) {
              const int g = i / 4, k = (i % 4 + 4 * word) * kPerWord + half;
              left[g][k] = mma_value<T>(lane(i).a[2 * word], half);
              left[g + 8][k] = mma_value<T>(lane(i).a[2 * word + 1], half);
              right[k][g] = mma_value<T>(lane(i).b[word], half);
            }
        for (int i = 0; i < kWarp; i++)
          for (int j = 0; j < 4; j++) {
            const int row = i / 4 + j / 2 * 8, column = i % 4 * 2 + j % 2;
            float sum = lane(i).d[j];
            for (int k = 0; k < kDepth; k++) sum += left[row][k] * right[k][column];
            lane(i).d[j] = sum;
          }
      },
      &mine, "mma", SIMT_SITE);
}

struct LdmatrixOperands {
  const unsigned* row;
  unsigned* words;
  bool turned;
};

// `Count` 8 x 8 matrices of 16-bit values; lane 8 i + j gives row j of matrix i.
template <int Count>
void ldmatrix(unsigned (&words)[Count], const unsigned* row, bool turned, SIMT_HERE) {
  LdmatrixOperands mine{row, words, turned};
  warp_collective(
      ~0u,
      [](unsigned, void* const* lanes) {
        const auto lane = [&](int i) { return *static_cast<LdmatrixOperands*>(lanes[i]); };
        for (int matrix = 0; matrix < Count; matrix++) {
          uint16_t values[8][8];
          for (int i = 0; i < 8; i++) {
            const unsigned* from = lane(8 * matrix + i).row;
            if (reinterpret_cast<uintptr_t>(from) % 16)
              fail("lane %d gives ldmatrix a row off a 16-byte boundary", 8 * matrix + i);
            std::memcpy(values[i], from, sizeof values[i]);
          }
          for (int i = 0; i < kWarp; i++) {
            const int g = i / 4, t = i % 4;
            const bool turn = lane(i).turned;
            const unsigned low = turn ? values[2 * t][g] : values[g][2 * t];
            const unsigned high = turn ? values[2 * t + 1][g] : values[g][2 * t + 1];
            lane(i).words[matrix] = low | high << 16;
          }
        }
      },
      &mine, "ldmatrix", SIMT_SITE);
}

}  // namespace simt
