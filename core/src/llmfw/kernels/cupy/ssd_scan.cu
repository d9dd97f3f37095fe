// ssd_update, ssd_scan: a state space with one decay a head (reference ssd_scan): h = exp(dt a) h + dt x b^T,
// y = h c + d x, with dt = softplus(dt + dt_bias) within limits.
//
// Shapes: x [tokens, HEADS, HEAD_DIM], dt [tokens, HEADS], b, c [tokens, GROUPS, STATE], each with rows a stride apart,
//   b and c aligned to 4 scalars; a, d, dt_bias float32 [HEADS]; state float32 [slots, HEADS, HEAD_DIM, STATE], slots
//   slot_stride apart, 16-byte aligned; slots int64 [requests]; ends int32 [requests + 1], cumulative; out as x,
//   contiguous.
// Launch: block 32 * WARPS, grid (HEADS * PARTS, requests from `first` on). LANES lanes share a row of h, a warp has
//   ROWS rows a lane. ssd_update takes one token a request, the first of them at first_token; ssd_scan any number,
//   token after token with h in registers.
#include "common.cuh"

#ifndef HEADS
#define HEADS 80
#endif
#ifndef HEAD_DIM
#define HEAD_DIM 64
#endif
#ifndef GROUPS
#define GROUPS 1
#endif
#ifndef STATE
#define STATE 128
#endif
#ifndef WARPS
#define WARPS 4
#endif
#ifndef ROWS
#define ROWS 4
#endif

constexpr int QUADS = STATE / 4;
constexpr int LANES = lanes_for(QUADS);
constexpr int PER = QUADS / LANES;                   // float4s of a row that a lane holds
constexpr int WARP_ROWS = ROWS * (32 / LANES);       // rows of h of a warp
constexpr int BLOCK_ROWS = WARPS * WARP_ROWS;
constexpr int PARTS = (HEAD_DIM + BLOCK_ROWS - 1) / BLOCK_ROWS;
constexpr int WIDEST = STATE > BLOCK_ROWS ? STATE : BLOCK_ROWS;
constexpr int STEPS = WIDEST <= 128 ? 32 : WIDEST <= 256 ? 16 : 8;  // tokens that shared memory holds
static_assert(STATE % 4 == 0 && STATE <= 512 && HEADS % GROUPS == 0, "rows of whole float4s");

// Where this lane's rows and columns are.
struct Place {
  int head, group, row, column;  // the first of each; rows are 1 apart, columns 4 * LANES

  __device__ __forceinline__ Place() {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    head = blockIdx.x / PARTS;
    group = head / (HEADS / GROUPS);
    row = blockIdx.x % PARTS * BLOCK_ROWS + warp * WARP_ROWS + lane / LANES * ROWS;
    column = lane % LANES * 4;
  }
  __device__ __forceinline__ bool has(int i) const { return HEAD_DIM % BLOCK_ROWS == 0 || row + i < HEAD_DIM; }
  __device__ __forceinline__ float4* in(float* slot, int i, int j) const {
    return reinterpret_cast<float4*>(slot + (i64(head) * HEAD_DIM + row + i) * STATE + column + j * 4 * LANES);
  }
};

// h = decay h + value b; the sum of h c grows by this lane's part.
__device__ __forceinline__ float advance(float4& h, float decay, float value, const float4& b, const float4& c) {
  h.x = decay * h.x + value * b.x;
  h.y = decay * h.y + value * b.y;
  h.z = decay * h.z + value * b.z;
  h.w = decay * h.w + value * b.w;
  return h.x * c.x + h.y * c.y + h.z * c.z + h.w * c.w;
}

__device__ __forceinline__ float4 load4(const scalar* p) {
  const Pack<4> x = load<4>(p);
  return {to_float(x.at[0]), to_float(x.at[1]), to_float(x.at[2]), to_float(x.at[3])};
}

__device__ __forceinline__ float step_of(float dt, float bias, float least, float most) {
  return fminf(fmaxf(softplus(dt + bias), least), most);
}

extern "C" __global__ void __launch_bounds__(WARPS * 32)
    ssd_update(scalar* out, const scalar* x, const scalar* dt, const float* a, const scalar* b, const scalar* c,
               const float* d, const float* dt_bias, float* state, const i64* slots, i64 x_stride, i64 dt_stride,
               i64 b_stride, i64 c_stride, i64 slot_stride, float least, float most, int first, int first_token) {
  const Place at;
  const int request = first + blockIdx.y;
  const float rate = a[at.head], skip = d[at.head], bias = dt_bias[at.head];
  follow_older();
  float* slot = state + slots[request] * slot_stride;
#pragma unroll
  for (int i = 0; i < ROWS; ++i)
#pragma unroll
    for (int j = 0; j < PER; ++j)
      if (at.has(i) && at.column % 32 == 0) fetch_l2(at.in(slot, i, j));
  follow();
  float4 h[ROWS][PER], bs[PER], cs[PER];
#pragma unroll
  for (int i = 0; i < ROWS; ++i)
#pragma unroll
    for (int j = 0; j < PER; ++j)
      if (at.has(i)) h[i][j] = *at.in(slot, i, j);
  const i64 token = first_token + int(blockIdx.y);
#pragma unroll
  for (int j = 0; j < PER; ++j) {
    bs[j] = load4(b + token * b_stride + at.group * STATE + at.column + j * 4 * LANES);
    cs[j] = load4(c + token * c_stride + at.group * STATE + at.column + j * 4 * LANES);
  }
  float inputs[ROWS], sums[ROWS];
#pragma unroll
  for (int i = 0; i < ROWS; ++i) {
    inputs[i] = at.has(i) ? to_float(x[token * x_stride + at.head * HEAD_DIM + at.row + i]) : 0.0f;
    sums[i] = at.column == 0 ? skip * inputs[i] : 0.0f;  // in one lane's part
  }
  const float step = step_of(to_float(dt[token * dt_stride + at.head]), bias, least, most);
  const float decay = expf(step * rate);
#pragma unroll
  for (int i = 0; i < ROWS; ++i)
#pragma unroll
    for (int j = 0; j < PER; ++j) {
      if (!at.has(i)) continue;
      sums[i] += advance(h[i][j], decay, step * inputs[i], bs[j], cs[j]);
      store_once(at.in(slot, i, j), h[i][j]);
    }
  Summed<ROWS, LANES>(sums).each([&](int i, float sum) {
    if (at.has(i)) out[(token * HEADS + at.head) * HEAD_DIM + at.row + i] = from_float(sum);
  });
}

extern "C" __global__ void __launch_bounds__(WARPS * 32)
    ssd_scan(scalar* out, const scalar* x, const scalar* dt, const float* a, const scalar* b, const scalar* c,
             const float* d, const float* dt_bias, float* state, const i64* slots, const int* ends, i64 x_stride,
             i64 dt_stride, i64 b_stride, i64 c_stride, i64 slot_stride, float least, float most, int first) {
  __shared__ float4 ins[STEPS][QUADS], outs[STEPS][QUADS];
  __shared__ float inputs[STEPS][BLOCK_ROWS], steps[STEPS], decays[STEPS];
  const Place at;
  const int request = first + blockIdx.y, row0 = blockIdx.x % PARTS * BLOCK_ROWS;
  const float rate = a[at.head], skip = d[at.head], bias = dt_bias[at.head];
  follow();
  float* slot = state + slots[request] * slot_stride;
  const int begin = ends[request], end = ends[request + 1];
  float4 h[ROWS][PER];
#pragma unroll
  for (int i = 0; i < ROWS; ++i)
#pragma unroll
    for (int j = 0; j < PER; ++j) h[i][j] = at.has(i) ? *at.in(slot, i, j) : float4{0, 0, 0, 0};

  for (int from = begin; from < end; from += STEPS) {
    const int count = min(STEPS, end - from);
    __syncthreads();  // the piece before is done
    for (int i = threadIdx.x; i < count * QUADS; i += WARPS * 32) {
      const int t = i / QUADS, quad = i % QUADS;
      ins[t][quad] = load4(b + (from + t) * b_stride + at.group * STATE + quad * 4);
      outs[t][quad] = load4(c + (from + t) * c_stride + at.group * STATE + quad * 4);
    }
    for (int i = threadIdx.x; i < count * BLOCK_ROWS; i += WARPS * 32) {
      const int t = i / BLOCK_ROWS, row = i % BLOCK_ROWS;
      const scalar* source = x + (from + t) * x_stride + at.head * HEAD_DIM + row0 + row;
      inputs[t][row] = row0 + row < HEAD_DIM ? to_float(*source) : 0.0f;
    }
    if (int(threadIdx.x) < count) {
      const float step = step_of(to_float(dt[(from + threadIdx.x) * dt_stride + at.head]), bias, least, most);
      steps[threadIdx.x] = step;
      decays[threadIdx.x] = expf(step * rate);
    }
    __syncthreads();
    for (int t = 0; t < count; ++t) {
      float sums[ROWS] = {};
      const float step = steps[t], decay = decays[t];
      const float* mine = inputs[t] + (at.row - row0);
#pragma unroll
      for (int j = 0; j < PER; ++j) {
        const float4 in = ins[t][at.column / 4 + j * LANES], weight = outs[t][at.column / 4 + j * LANES];
#pragma unroll
        for (int i = 0; i < ROWS; ++i) sums[i] += advance(h[i][j], decay, step * mine[i], in, weight);
      }
      Summed<ROWS, LANES>(sums).each([&](int i, float sum) {
        if (at.has(i))
          out[(i64(from + t) * HEADS + at.head) * HEAD_DIM + at.row + i] = from_float(sum + skip * mine[i]);
      });
    }
  }
#pragma unroll
  for (int i = 0; i < ROWS; ++i)
#pragma unroll
    for (int j = 0; j < PER; ++j)
      if (at.has(i)) *at.in(slot, i, j) = h[i][j];
}
