// The fold as a 3x3 convolution. What the overlapping tokens add to a pixel is one of rows of the
// tokens seen as maps: the token one pixel to the left holds for it what it says of its right
// neighbour, so the taps are turned round.
#pragma once

#include "conv3x3.cuh"
#include "token.h"

namespace efrdn_fast {
namespace token_fold {

// The weights of a chunk of channels for conv3x3::convolve: value(column, k), column being one of
// the 9 C of a token and k one of `values` of its row.
template <typename T, class F>
__device__ void load_weights(int channels, int values, int64_t first_out, int64_t first,
                             unsigned (&shared)[9 * conv3x3::kTapStride], const F& value) {
  using namespace conv3x3;
  constexpr int kChannels = kWords * 4 / sizeof(T);
  for (int o = threadIdx.x / kWarp; o < kOut; o += kThreads / kWarp)
    for (int i = threadIdx.x % kWarp; i < 9 * kChannels; i += kWarp) {
      const int c = i % kChannels, tap = i / kChannels;
      const int64_t out = first_out + o, k = first + c;
      const float weight = out < channels && k < values ? value(out * 9 + 8 - tap, k) : 0.f;
      reinterpret_cast<T*>(&shared[tap * kTapStride + o * kStride])[c] = from_float<T>(weight);
    }
}

// Weights of two matrices [9 C, ..] side by side, each value of its row.
struct Sources {
  Map map[2];
  int width[2];  // of the second 0: there is none
};

inline Conv3x3Params convolution(const TokenMap& map, const Sources& rows) {
  Conv3x3Params conv{};
  conv.n = map.n;
  conv.h = map.h;
  conv.w = map.w;
  conv.cin = rows.width[0] + rows.width[1];
  conv.cout = map.c;
  conv.groups = 1;
  conv.sources = rows.width[1] ? 2 : 1;
  for (int i = 0; i < conv.sources; i++) conv.x[i] = rows.map[i];
  conv.end[0] = rows.width[0];
  conv.end[1] = conv.cin;
  return conv;
}

inline int64_t block_count(const TokenMap& map) {
  return tile_count(map.n, map.h, map.w, conv3x3::kTile, conv3x3::kTile) *
         ceil_div(map.c, conv3x3::kOut);
}

// Whether packs of 4 channels can be read and written at every pixel of both.
template <typename T>
bool aligned(const TokenMap& map, const Map& y) {
  const int64_t bytes = 4 * sizeof(T);
  return map.c % 4 == 0 && is_aligned(map.x, sizeof(T), bytes) && is_aligned(y, sizeof(T), bytes);
}

// y = finish(pixel h, w, its 4 channels of x from `out` on, sums of the convolution), in place of
// the sums, for all pixels of the tile.
template <typename T, class F>
__device__ void write_pixels(const TokenMap& map, const Map& y, const Tile& tile, int64_t first_out,
                             bool aligned, const conv3x3::Shared& shared, const F& finish) {
  using namespace conv3x3;
  constexpr int kVec = 4, kLanes = kOut / kVec;
  const int lane = threadIdx.x % kLanes;
  const int64_t out = first_out + lane * kVec, left = map.c - out;
  if (left <= 0) return;
  const int count = static_cast<int>(left < kVec ? left : kVec);
#pragma unroll 1
  for (int position = threadIdx.x / kLanes; position < kTile * kTile;
       position += kThreads / kLanes) {
    const int64_t h = tile.h0 + position / kTile, w = tile.w0 + position % kTile;
    if (h >= map.h || w >= map.w) continue;
    float value[kVec], x[kVec];
#pragma unroll
    for (int v = 0; v < kVec; v++) value[v] = shared.result[position][lane * kVec + v];
    const T* const from = pixel<const T>(map.x, tile.n, h, w) + out;
    (aligned ? Pack<T, kVec>::load(from, true) : Pack<T, kVec>::load_some(from, count))
        .to_floats(x);
    finish(h, w, x, value);
    const auto pack = Pack<T, kVec>::from_floats(value);
    T* const to = pixel<T>(y, tile.n, h, w) + out;
    if (aligned)
      pack.store(to);
    else
      pack.store_some(to, count);
  }
}

// bias(column) of the 4 channels from `out` on, by tap; 0 behind the last channel.
template <class F>
__device__ void load_biases(float (&bias)[9][4], int channels, int64_t first_out, const F& of) {
  const int64_t out = first_out + threadIdx.x % (conv3x3::kOut / 4) * 4;
#pragma unroll
  for (int tap = 0; tap < 9; tap++)
#pragma unroll
    for (int v = 0; v < 4; v++) bias[tap][v] = out + v < channels ? of((out + v) * 9 + tap) : 0.f;
}

// f(tap, token's row and column) for the tokens that cover a pixel.
template <class F>
__device__ void each_cover(const TokenMap& map, int64_t h, int64_t w, const F& f) {
#pragma unroll
  for (int tap = 0; tap < 9; tap++) {
    const int64_t token_h = h + 1 - tap / 3, token_w = w + 1 - tap % 3;
    if (token_h >= 0 && token_h < map.h && token_w >= 0 && token_w < map.w)
      f(tap, token_h, token_w);
  }
}

}  // namespace token_fold
}  // namespace efrdn_fast
