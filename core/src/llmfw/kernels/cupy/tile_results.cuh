// The ends of products of tiles: bias, SiLU, and stores of whole 16-byte packs from wgmma's fragments. For sources that
// define GATED, BIAS, PACKED, COLUMNS, RESULTS and READY as tiled.cu does.
#pragma once

// Two neighbouring results of a row.
__device__ __forceinline__ u32 results(float first, float second, float up_first, float up_second) {
  if (!GATED) return pack2(first, second);
  const u32 gates = pack2(first, second), ups = pack2(up_first, up_second);
  const u32 acted = pack2(silu(to_float(scalar(gates))), silu(to_float(scalar(gates >> 16))));
  return pack2(to_float(scalar(acted)) * to_float(scalar(ups)),
               to_float(scalar(acted >> 16)) * to_float(scalar(ups >> 16)));
}

// Of four lanes with four words each, lane c gets everybody's word c.
__device__ __forceinline__ void transpose(u32 (&word)[4], int c) {
#pragma unroll
  for (int step = 1; step < 4; step *= 2)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & step) continue;
      const u32 given = c & step ? word[i] : word[i + step];
      const u32 got = u32(__shfl_xor_sync(ALL, int(given), step));
      (c & step ? word[i] : word[i + step]) = got;
    }
}

// What a lane adds to the sums of columns `output` and `output` + 1.
__device__ __forceinline__ float2 bias_of(const scalar* bias, int output, int outputs, int first) {
  float2 found = {};
  if (bias && output < outputs) found.x = to_float(bias[first + output]);
  if (bias && output + 1 < outputs) found.y = to_float(bias[first + output + 1]);
  return found;
}

// Of two lanes with two words each, the even one gets both first words, the odd one both second ones.
__device__ __forceinline__ void swap_words(u32 (&word)[4], int c) {
  const u32 got = u32(__shfl_xor_sync(ALL, int(c % 2 ? word[0] : word[1]), 1));
  (c % 2 ? word[0] : word[1]) = got;
}

// Stores up to four groups of 8 results of a row before column `end`, a lane's words being columns 2c and 2c + 1 of each.
template <int COUNT>
__device__ __forceinline__ void store_groups(scalar* y, u32 (&word)[4], int output, int outputs, int end, bool inside,
                                             int c) {
  if (PACKED && COUNT == 4) {
    transpose(word, c);
    if (inside && output + c * 8 < end)
      *reinterpret_cast<uint4*>(y + output + c * 8) = make_uint4(word[0], word[1], word[2], word[3]);
  } else if (PACKED && COUNT == 2) {
    swap_words(word, c);
    if (inside && output + c % 2 * 8 < end)
      *reinterpret_cast<uint2*>(y + output + c % 2 * 8 + c / 2 * 4) = make_uint2(word[0], word[1]);
  } else {
#pragma unroll
    for (int j = 0; j < COUNT; ++j) {
      const int column = output + j * 8 + 2 * c;
      if (!inside || column >= end) continue;
      if (PACKED) {
        *reinterpret_cast<u32*>(y + column) = word[j];
      } else {
        y[column] = scalar(word[j]);
        if (column + 1 < outputs) y[column + 1] = scalar(word[j] >> 16);
      }
    }
  }
}

// Results of COUNT groups from group J on, of a lane's rows of a 64.
template <int J, int COUNT>
__device__ __forceinline__ void finish_groups(const float (&sum)[COLUMNS][4], scalar* y, const scalar* bias, int outputs,
                                              int rows, int row, int first, int end, int c) {
  float2 add[4] = {}, add_up[4] = {};
#pragma unroll
  for (int j = 0; j < COUNT; ++j) {
    if (BIAS) add[j] = bias_of(bias, first + (J + j) * 8 + 2 * c, outputs, 0);
    if (BIAS && GATED) add_up[j] = bias_of(bias, first + (J + j) * 8 + 2 * c, outputs, outputs);
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    u32 word[4] = {};
#pragma unroll
    for (int j = 0; j < COUNT; ++j) {
      const float* d = &sum[J + j][2 * half];
      const float* up = &sum[J + j + (GATED ? RESULTS : 0)][2 * half];
      if (BIAS)
        word[j] = results(d[0] + add[j].x, d[1] + add[j].y, up[0] + add_up[j].x, up[1] + add_up[j].y);
      else
        word[j] = results(d[0], d[1], up[0], up[1]);
    }
    const int at = row + half * 8;
    store_groups<COUNT>(y + i64(at) * outputs, word, first + J * 8, outputs, end, at < rows, c);
  }
}

// The results of a lane's rows that the block stores: READY groups at most, before column `end`.
template <int J = 0>
__device__ __forceinline__ void finish(const float (&sum)[COLUMNS][4], scalar* y, const scalar* bias, int outputs,
                                       int rows, int row, int first, int end, int c) {
  if constexpr (J < READY) {
    constexpr int COUNT = READY - J < 4 ? READY - J : 4;
    finish_groups<J, COUNT>(sum, y, bias, outputs, rows, row, first, end, c);
    finish<J + COUNT>(sum, y, bias, outputs, rows, row, first, end, c);
  }
}
