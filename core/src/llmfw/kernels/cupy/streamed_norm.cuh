// What streamed.cu does for an RMS norm that is divided between two products. Part of that source.
#pragma once

constexpr int MULTIPLIERS = WARPS * 32;  // threads that multiply and finish
constexpr int PACKS = READY / 8;         // of a row's results that a block stores; a thread has the same one in every turn
constexpr int TURNS = (PACKS * ROWS + MULTIPLIERS - 1) / MULTIPLIERS;
static_assert(32 % PACKS == 0, "the packs of a row are neighbours in a warp");

// Where a thread's results of a turn lie.
struct Place {
  int row, output;
  bool inside;
  __device__ __forceinline__ Place(int turn, int first, int outputs, int rows)
      : row((turn * MULTIPLIERS + int(threadIdx.x)) / PACKS),
        output(first + int(threadIdx.x) % PACKS * 8),
        inside(row < rows && output < outputs) {}
};

// What a thread's results are added to and multiplied by, asked for before the products, whose time hides the wait.
struct Addition {
  Pack<8> residual[TURNS], factors;

  __device__ __forceinline__ void read(const scalar* from, const scalar* norm_weight, int outputs, int rows, int first) {
#pragma unroll
    for (int turn = 0; turn < TURNS; ++turn) {
      const Place at(turn, first, outputs, rows);
      if (at.inside) residual[turn] = load<8>(from + i64(at.row) * outputs + at.output);
      if (at.inside && turn == 0) factors = load<8>(norm_weight + at.output);
    }
  }
};

// The residual with the product added, its product with the norm's weight, and part `part` of its squares; the parts
// beyond those that blocks have are zeros.
__device__ __forceinline__ void finish_adding(const Shared& s, const Addition& addition, scalar* y, scalar* residual,
                                              float* squares, int outputs, int rows, int first, int part, int written,
                                              int parts, float offset) {
#pragma unroll
  for (int turn = 0; turn < TURNS; ++turn) {
    const Place at(turn, first, outputs, rows);
    float sum = 0;
    if (at.inside) {
      float product[8] = {};
      add(product, s, at.row * PITCH + at.output - first);
      Pack<8> total, scaled;
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const float value = rounded(to_float(addition.residual[turn].at[j]) + rounded(product[j]));
        total.at[j] = from_float(value);
        scaled.at[j] = from_float(value * (offset + to_float(addition.factors.at[j])));
        sum += value * value;
      }
      const i64 place = i64(at.row) * outputs + at.output;
      store<8>(residual + place, total);
      store<8>(y + place, scaled);
    }
    sum = group_sum<PACKS>(sum);
    if (at.row < rows && at.output == first)
      for (int to = part; to < parts; to += written) squares[i64(at.row) * parts + to] = to == part ? sum : 0.0f;
  }
}

// Some warps leave each row's 1 / sqrt(mean of squares + eps) in shared memory while others multiply: 8 lanes a row, with
// loads of all rows under way.
__device__ __forceinline__ void find_scales(Shared& s, const float* squares, int parts, int rows, int in, float eps) {
  constexpr int LANES = 8, OWN = ROWS / SCALERS, PASSES = OWN / (32 / LANES);
  const int lane = threadIdx.x % 32, first = (int(threadIdx.x) / 32 - WARPS - 1) * OWN;  // row of this warp
  float* const scales = s.scales + first;
  float sums[PASSES] = {};
#pragma unroll 2
  for (int column = lane % LANES * 4; column < parts; column += LANES * 4) {
    float4 four[PASSES];
#pragma unroll
    for (int i = 0; i < PASSES; ++i) {
      const int row = min(first + i * (32 / LANES) + lane / LANES, rows - 1);
      four[i] = *reinterpret_cast<const float4*>(squares + i64(row) * parts + column);
    }
#pragma unroll
    for (int i = 0; i < PASSES; ++i) sums[i] += (four[i].x + four[i].y) + (four[i].z + four[i].w);
  }
#pragma unroll
  for (int i = 0; i < PASSES; ++i) {
    const float sum = group_sum<LANES>(sums[i]);
    if (lane % LANES == 0) scales[i * (32 / LANES) + lane / LANES] = sum;
  }
  __syncwarp();
  const float each = 1.0f / in;
  if (lane < OWN) scales[lane] = rsqrtf(scales[lane] * each + eps);
  __syncwarp();
  if (lane == 0) arrive(&s.scales_full);
}
