// ssd_chunks: the op ssd_scan for prompts, by products within chunks of 64 tokens on tensor cores (arXiv:2405.21060,
// section 6): y_i = sum over j <= i of (c_i b_j) decay(j, i) dt_j x_j, and what the state before the chunk gives.
//
// Shapes: as in ssd_scan.cu, x, b and c aligned to 16 bytes; bfloat16.
// Launch: block 128, grid (2 * HEADS, requests from `first` on), two stages and the state in dynamic shared memory. A
//   block takes half the rows of a head and the chunks of its request one after another; a warp has 16 tokens of y,
//   and 16 rows and half the columns of the state, which stays in registers, in float32. The next chunk is copied
//   meanwhile.
// Numbers: products of bfloat16 in float32: weights of tokens, weighted x and the state are rounded before theirs.
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

constexpr int CHUNK = 64, THREADS = 128, PART = HEAD_DIM / 2;
constexpr int WIDE = STATE + 8, NARROW = PART + 8;  // rows of shared memory, padded: no two of 8 share banks
constexpr int STAGE = CHUNK * (2 * WIDE + NARROW);      // of b, c and x
constexpr int N_STEPS = STATE / 16;                 // products of 16 numbers each
constexpr int H_STEPS = N_STEPS / 2;                // of a warp's half of the state
static_assert(HEAD_DIM == 64 && STATE % 32 == 0 && STATE <= 128 && DTYPE == BF16, "two by two parts of the state");

struct Chunk {
  scalar *b, *c, *x;
  __device__ __forceinline__ explicit Chunk(scalar* at) : b(at), c(at + CHUNK * WIDE), x(at + 2 * CHUNK * WIDE) {}
};

// Starts the copies of up to 64 tokens from `from` on; zeros behind the last.
__device__ __forceinline__ void copy_chunk(const Chunk& to, const scalar* x, const scalar* b, const scalar* c, int from,
                                           int end, i64 x_stride, i64 b_stride, i64 c_stride) {
  constexpr int WIDE_PACKS = STATE / 8, PACKS = PART / 8;
  for (int i = threadIdx.x; i < CHUNK * WIDE_PACKS; i += THREADS) {
    const int t = i / WIDE_PACKS, column = i % WIDE_PACKS * 8, bytes = from + t < end ? 16 : 0;
    const i64 token = min(from + t, end - 1);
    copy16_async(to.b + t * WIDE + column, b + token * b_stride + column, bytes);
    copy16_async(to.c + t * WIDE + column, c + token * c_stride + column, bytes);
  }
  for (int i = threadIdx.x; i < CHUNK * PACKS; i += THREADS) {
    const int t = i / PACKS, column = i % PACKS * 8;
    const i64 token = min(from + t, end - 1);
    copy16_async(to.x + t * NARROW + column, x + token * x_stride + column, from + t < end ? 16 : 0);
  }
  close_copies();
}

// A lane's two tokens of a chunk: dt, far below zero behind the last.
struct Steps {
  float dt[2];
  __device__ __forceinline__ void read(const scalar* from, i64 stride, int first, int end) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int t = first + 2 * int(threadIdx.x) + i;
      dt[i] = t < end ? to_float(from[t * stride]) : NEG_INF;
    }
  }
};

// Steps of a chunk's tokens and sums of the logarithms (to base 2) of decay up to each, by one warp.
__device__ __forceinline__ void sum_decays(float* steps, float* sums, const Steps& ahead, float rate, float bias,
                                           float least, float most) {
  const int lane = threadIdx.x;
  float step[2], sum = 0;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    step[i] = ahead.dt[i] == NEG_INF ? 0.0f : fminf(fmaxf(softplus(ahead.dt[i] + bias), least), most);
    sum += step[i] * rate;
  }
  const float last = step[1] * rate;
#pragma unroll
  for (int shift = 1; shift < 32; shift *= 2) {
    const float before = __uint_as_float(u32(__shfl_up_sync(ALL, int(__float_as_uint(sum)), shift)));
    if (lane >= shift) sum += before;
  }
  steps[2 * lane] = step[0];
  steps[2 * lane + 1] = step[1];
  sums[2 * lane] = sum - last;
  sums[2 * lane + 1] = sum;
}

__device__ __forceinline__ u32 scaled(u32 pair, float low, float high) {
  return pack2(to_float(scalar(pair)) * low, to_float(scalar(pair >> 16)) * high);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    ssd_chunks(scalar* out, const scalar* x, const scalar* dt, const float* a, const scalar* b, const scalar* c,
               const float* d, const float* dt_bias, float* state, const i64* slots, const int* ends, i64 x_stride,
               i64 dt_stride, i64 b_stride, i64 c_stride, i64 slot_stride, float least, float most, int first) {
  DYNAMIC_SHARED(memory);
  __shared__ float steps[2][CHUNK], sums[2][CHUNK];
  scalar* stages = reinterpret_cast<scalar*>(memory);
  scalar* before = stages + 2 * STAGE;  // the state before the chunk, [PART, WIDE]
  const int head = blockIdx.x / 2, group = head / (HEADS / GROUPS), request = first + blockIdx.y;
  const int p0 = blockIdx.x % 2 * PART;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = lane / 4, column = lane % 4 * 2;
  const float rate = a[head] * LOG2E, skip = d[head], bias = dt_bias[head];
  follow();
  const int begin = ends[request], end = ends[request + 1];
  if (begin >= end) return;
  x += head * HEAD_DIM + p0;
  out += head * HEAD_DIM + p0;
  b += group * STATE;
  c += group * STATE;
  dt += head;
  copy_chunk(Chunk(stages), x, b, c, begin, end, x_stride, b_stride, c_stride);
  Steps ahead;
  if (warp == 0) {
    ahead.read(dt, dt_stride, begin, end);
    sum_decays(steps[0], sums[0], ahead, rate, bias, least, most);
  }
  const int h_row = warp % 2 * 16, h_column = warp / 2 * (STATE / 2);  // the warp's part of the state
  float* slot = state + slots[request] * slot_stride + (i64(head) * HEAD_DIM + p0 + h_row + row) * STATE;
  slot += h_column + column;
  float h[2 * H_STEPS][4];  // rows row, row + 8 of the warp's 16; columns column, column + 1 of each 8
#pragma unroll
  for (int i = 0; i < 2 * H_STEPS; ++i)
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const float2 pair = *reinterpret_cast<const float2*>(slot + j * 8 * STATE + i * 8);
      h[i][2 * j] = pair.x;
      h[i][2 * j + 1] = pair.y;
    }
  // Places of this lane's rows for load_matrices and load_columns: of a product's left side, and of its right.
  const int left_row = lane % 16, left_column = lane / 16 * 8;
  const int right_row = lane / 16 * 8 + lane % 8, right_column = lane / 8 % 2 * 8;

  for (int from = begin, stage = 0; from < end; from += CHUNK, stage ^= 1) {
    const Chunk here(stages + stage * STAGE);
    scalar* kept = before + (h_row + row) * WIDE + h_column + column;
#pragma unroll
    for (int i = 0; i < 2 * H_STEPS; ++i) {
      *reinterpret_cast<u32*>(kept + i * 8) = pack2(h[i][0], h[i][1]);
      *reinterpret_cast<u32*>(kept + 8 * WIDE + i * 8) = pack2(h[i][2], h[i][3]);
    }
    wait_for_copies<0>();
    __syncthreads();
    if (from + CHUNK < end) {
      copy_chunk(Chunk(stages + (stage ^ 1) * STAGE), x, b, c, from + CHUNK, end, x_stride, b_stride, c_stride);
      if (warp == 0) ahead.read(dt, dt_stride, from + CHUNK, end);
    }

    // What the state before the chunk gives, decayed.
    u32 cs[N_STEPS][4];
    float y[4][4] = {};
#pragma unroll
    for (int k = 0; k < N_STEPS; ++k) {
      load_matrices(cs[k], here.c + (warp * 16 + left_row) * WIDE + k * 16 + left_column);
#pragma unroll
      for (int p = 0; p < 2; ++p) {
        u32 hs[4];
        load_matrices(hs, before + (p * 16 + right_row) * WIDE + k * 16 + right_column);
        mma(y[2 * p][0], y[2 * p][1], y[2 * p][2], y[2 * p][3], cs[k][0], cs[k][1], cs[k][2], cs[k][3], hs[0], hs[1]);
        mma(y[2 * p + 1][0], y[2 * p + 1][1], y[2 * p + 1][2], y[2 * p + 1][3], cs[k][0], cs[k][1], cs[k][2], cs[k][3],
            hs[2], hs[3]);
      }
    }
    const int mine = warp * 16 + row;  // and mine + 8: this lane's tokens in the chunk
    const float upto[2] = {sums[stage][mine], sums[stage][mine + 8]};
    const float kept_of[2] = {exp2_fast(upto[0]), exp2_fast(upto[1])};
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) y[i][j] *= kept_of[j / 2];

    // What the chunk's tokens give each other, 32 past tokens at a time.
    for (int k = 0; k <= warp / 2; ++k) {
      float s[4][4] = {};
#pragma unroll
      for (int n = 0; n < N_STEPS; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          u32 bs[4];
          load_matrices(bs, here.b + (k * 32 + i * 16 + right_row) * WIDE + n * 16 + right_column);
          mma(s[2 * i][0], s[2 * i][1], s[2 * i][2], s[2 * i][3], cs[n][0], cs[n][1], cs[n][2], cs[n][3], bs[0], bs[1]);
          mma(s[2 * i + 1][0], s[2 * i + 1][1], s[2 * i + 1][2], s[2 * i + 1][3], cs[n][0], cs[n][1], cs[n][2],
              cs[n][3], bs[2], bs[3]);
        }
      u32 w[4][2];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int past = k * 32 + i * 8 + column + j % 2;
          const bool seen = past <= mine + j / 2 * 8;
          s[i][j] = seen ? s[i][j] * steps[stage][past] * exp2_fast(upto[j / 2] - sums[stage][past]) : 0.0f;
        }
        w[i][0] = pack2(s[i][0], s[i][1]);
        w[i][1] = pack2(s[i][2], s[i][3]);
      }
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int p = 0; p < 2; ++p) {
          u32 xs[4];
          load_columns(xs, here.x + (k * 32 + i * 16 + left_row) * NARROW + p * 16 + left_column);
          const u32 *u = w[2 * i], *v = w[2 * i + 1];
          mma(y[2 * p][0], y[2 * p][1], y[2 * p][2], y[2 * p][3], u[0], u[1], v[0], v[1], xs[0], xs[1]);
          mma(y[2 * p + 1][0], y[2 * p + 1][1], y[2 * p + 1][2], y[2 * p + 1][3], u[0], u[1], v[0], v[1], xs[2], xs[3]);
        }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int t = mine + j * 8, at = i * 8 + column;
        if (from + t >= end) continue;
        const u32 pair = *reinterpret_cast<const u32*>(here.x + t * NARROW + at);
        *reinterpret_cast<u32*>(out + i64(from + t) * (HEADS * HEAD_DIM) + at) =
            pack2(y[i][2 * j] + skip * to_float(scalar(pair)), y[i][2 * j + 1] + skip * to_float(scalar(pair >> 16)));
      }
    if (warp == 0 && from + CHUNK < end)  // the warp with the fewest past tokens
      sum_decays(steps[stage ^ 1], sums[stage ^ 1], ahead, rate, bias, least, most);

    // What the chunk leaves: h = decay h + (weighted x)^T b.
    const float whole = sums[stage][CHUNK - 1], left = exp2_fast(whole);
#pragma unroll
    for (int i = 0; i < 2 * H_STEPS; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) h[i][j] *= left;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      float w[4];  // of tokens column, column + 1, and 8 behind
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int t = k * 16 + column + j % 2 + j / 2 * 8;
        w[j] = steps[stage][t] * exp2_fast(whole - sums[stage][t]);
      }
      u32 xs[4];
      load_columns(xs, here.x + (k * 16 + right_row) * NARROW + h_row + right_column);
      xs[0] = scaled(xs[0], w[0], w[1]);
      xs[1] = scaled(xs[1], w[0], w[1]);
      xs[2] = scaled(xs[2], w[2], w[3]);
      xs[3] = scaled(xs[3], w[2], w[3]);
#pragma unroll
      for (int n = 0; n < H_STEPS; ++n) {
        u32 bs[4];
        load_columns(bs, here.b + (k * 16 + left_row) * WIDE + h_column + n * 16 + left_column);
        mma(h[2 * n][0], h[2 * n][1], h[2 * n][2], h[2 * n][3], xs[0], xs[1], xs[2], xs[3], bs[0], bs[1]);
        mma(h[2 * n + 1][0], h[2 * n + 1][1], h[2 * n + 1][2], h[2 * n + 1][3], xs[0], xs[1], xs[2], xs[3], bs[2],
            bs[3]);
      }
    }
    __syncthreads();  // everybody has read the state before the chunk
  }
#pragma unroll
  for (int i = 0; i < 2 * H_STEPS; ++i)
#pragma unroll
    for (int j = 0; j < 2; ++j)
      *reinterpret_cast<float2*>(slot + j * 8 * STATE + i * 8) = {h[i][2 * j], h[i][2 * j + 1]};
}
