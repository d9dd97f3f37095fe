// The ends of products of tiles: bias, SiLU, and stores of whole 16-byte packs from wgmma's fragments. For sources that
// define GATED, EACH and READY as tiled.cu does, and Sums as [EACH][READY * (1 + GATED) or more][4].
#pragma once

// silu by the processor's own exponential and reciprocal: as exact as a result of 16 bits can show.

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

// Stores up to four groups of 8 results of rows `row` and `row` + 8, a lane's words being columns 2c and 2c + 1 of each.
template <int COUNT>
__device__ __forceinline__ void store_groups(scalar* y, u32 (&word)[4], int output, int outputs, bool inside, int c) {
  if (outputs % 8 == 0 && COUNT == 4) {
    transpose(word, c);
    if (inside && output + c * 8 < outputs)
      *reinterpret_cast<uint4*>(y + output + c * 8) = make_uint4(word[0], word[1], word[2], word[3]);
    return;
  }
#pragma unroll
  for (int j = 0; j < COUNT; ++j) {
    const int column = output + j * 8 + 2 * c;
    if (!inside || column >= outputs) continue;
    if (outputs % 2 == 0) {
      *reinterpret_cast<u32*>(y + column) = word[j];
    } else {
      y[column] = scalar(word[j]);
      if (column + 1 < outputs) y[column + 1] = scalar(word[j] >> 16);
    }
  }
}

// Results of COUNT groups from group J on.
template <int J, int COUNT>
__device__ __forceinline__ void finish_groups(const Sums& sum, scalar* y, const scalar* bias, int outputs, int rows,
                                              int row, int first, int c) {
  float2 add[4], add_up[4];
#pragma unroll
  for (int j = 0; j < COUNT; ++j) {
    add[j] = bias_of(bias, first + (J + j) * 8 + 2 * c, outputs, 0);
    if (GATED) add_up[j] = bias_of(bias, first + (J + j) * 8 + 2 * c, outputs, outputs);
  }
#pragma unroll
  for (int m = 0; m < EACH; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      u32 word[4] = {};
#pragma unroll
      for (int j = 0; j < COUNT; ++j) {
        const float* d = &sum[m][J + j][2 * half];
        const float* up = &sum[m][J + j + (GATED ? READY : 0)][2 * half];
        word[j] = results(d[0] + add[j].x, d[1] + add[j].y, GATED ? up[0] + add_up[j].x : 0,
                          GATED ? up[1] + add_up[j].y : 0);
      }
      const int at = row + m * 64 + half * 8;
      store_groups<COUNT>(y + i64(at) * outputs, word, first + J * 8, outputs, at < rows, c);
    }
}

// Results of the first READY groups of sums: gates, and ups after them.
template <int J = 0>
__device__ __forceinline__ void finish(const Sums& sum, scalar* y, const scalar* bias, int outputs, int rows, int row,
                                       int first, int c) {
  if constexpr (J < READY) {
    constexpr int COUNT = READY - J < 4 ? READY - J : 4;
    finish_groups<J, COUNT>(sum, y, bias, outputs, rows, row, first, c);
    finish<J + COUNT>(sum, y, bias, outputs, rows, row, first, c);
  }
}
