// paged_attention over a latent cache: all heads share one vector a token, whose first V_DIM values are V. 16-bit types.
//
// Shapes: q [tokens, HEADS, HEAD_DIM], contiguous; cache [blocks, BLOCK_SIZE, HEAD_DIM], blocks block_stride and slots
//   slot_stride apart; block_tables int32 [requests, table_stride]; cu_query_lens int32 [requests + 1]; kv_lens int32
//   [requests]; out [tokens, HEADS * V_DIM]; partial float32 [requests, row tiles, splits, ROWS, V_DIM], and
//   partial_stats of it [..., 2]. Dims multiples of 16, BLOCK_SIZE a multiple of 8.
// Launch: block WARPS * 32, grid (row tiles, splits, requests), dynamic shared memory. Rows are a request's
//   tokens times heads; a block has ROWS of them and walks its split of the keys that they see, KEYS at a time, which
//   it copies to shared memory once, for scores and values. Lengths are read here, so the grid fits any batch of that
//   many requests; blocks without work leave at once. Where a request has more than one split, merge_latent follows.
// Numbers: float32 softmax and accumulation; probabilities are rounded to the 16-bit type for the product with V.
//
// Scores: warps divide rows (16 each), keys and the summed dimension; q stays in registers. Softmax: warps divide rows.
// Values: warps divide V_DIM, and V is the same tile, read by columns.
#include "common.cuh"
#include "latent.cuh"

#ifndef STAGES
#define STAGES 2
#endif
#ifndef BLOCK_SIZE
#define BLOCK_SIZE 16
#endif
#ifndef MIN_BLOCKS
#define MIN_BLOCKS 1
#endif
#define WARPS 8

#if DTYPE != F32

constexpr int least(int x, int y) { return x < y ? x : y; }
constexpr int most(int x, int y) { return x > y ? x : y; }

constexpr int THREADS = WARPS * 32;
constexpr int ROW_TILES = ROWS / 16;
constexpr int KEY_PARTS = least(KEYS / 16, most(WARPS / ROW_TILES / 2, 1));  // warps' shares of the scores' keys
constexpr int DIM_PARTS = WARPS / (ROW_TILES * KEY_PARTS);                   // and of their summed dimension
constexpr int STEPS = HEAD_DIM / 16;                                         // mma steps over a key
constexpr int STEPS_EACH = (STEPS + DIM_PARTS - 1) / DIM_PARTS;
constexpr int KEYS_EACH = KEYS / KEY_PARTS;
constexpr int PITCH = HEAD_DIM + 8;  // of a key in shared memory: an odd number of 16 bytes, so that matrices
constexpr int P_PITCH = KEYS + 8;    // are read without conflicts; the same for probabilities
constexpr int S_PITCH = KEYS + 8;
constexpr int TILE = KEYS * PITCH;
constexpr int ROWS_EACH = ROWS / WARPS;            // of a warp's softmax
constexpr int LANE_KEYS = (KEYS + 31) / 32;        // and keys of a lane
constexpr int UNITS = V_DIM / 16;                  // of 16 output dims
constexpr int UNITS_EACH = (UNITS + WARPS - 1) / WARPS;
constexpr int CHUNKS = HEAD_DIM / 8;               // of 16 bytes in a key, eight threads copy one key
constexpr int CHUNKS_EACH = (CHUNKS + 7) / 8;
constexpr int PASSES = (KEYS * 8 + THREADS - 1) / THREADS;
static_assert(HEAD_DIM % 16 == 0 && V_DIM % 16 == 0 && V_DIM <= HEAD_DIM && BLOCK_SIZE % 8 == 0, "whole tiles");
static_assert(ROWS % 16 == 0 && WARPS % ROW_TILES == 0 && KEYS % 16 == 0, "whole tiles");
static_assert(KEYS % KEY_PARTS == 0 && KEYS_EACH % 16 == 0 && STAGES >= 2, "equal shares");

// The pages of the keys that this thread copies of a tile.
__device__ __forceinline__ void find_pages(int (&pages)[PASSES], const int* table, int tile, int last) {
#pragma unroll
  for (int pass = 0; pass < PASSES; ++pass)
    pages[pass] = table[min(tile * KEYS + pass * (THREADS / 8) + int(threadIdx.x) / 8, last) / BLOCK_SIZE];
}

// Requests the tile's keys; those beyond the last are zeros.
__device__ __forceinline__ void request_tile(scalar* to, const scalar* cache, const int (&pages)[PASSES], int tile,
                                             int last, i64 block_stride, i64 slot_stride) {
#pragma unroll
  for (int pass = 0; pass < PASSES; ++pass) {
    const int key = pass * (THREADS / 8) + threadIdx.x / 8, first = threadIdx.x % 8 * 8;
    if (KEYS % (THREADS / 8) && key >= KEYS) continue;
    const int position = tile * KEYS + key;
    const int bytes = position <= last ? 16 : 0;
    const scalar* source = cache + pages[pass] * block_stride + position % BLOCK_SIZE * slot_stride + first;
    scalar* target = to + key * PITCH + first;
#pragma unroll
    for (int i = 0; i < CHUNKS_EACH; ++i)
      if (CHUNKS % 8 == 0 || first + 64 * i < HEAD_DIM) copy16_async(target + 64 * i, source + 64 * i, bytes);
  }
}

// The part of q that this warp multiplies, as mma operands: rows g and g + 8 of its 16.
__device__ __forceinline__ void load_queries(u32 (&a)[STEPS_EACH][4], const scalar* q, int row0, int rows, int step0,
                                             int g, int c) {
  const scalar* low = q + i64(min(row0 + g, rows - 1)) * HEAD_DIM + step0 * 16 + 2 * c;
  const scalar* high = q + i64(min(row0 + g + 8, rows - 1)) * HEAD_DIM + step0 * 16 + 2 * c;
#pragma unroll
  for (int step = 0; step < STEPS_EACH; ++step) {
    if (STEPS % DIM_PARTS && step0 + step >= STEPS) break;
    a[step][0] = *reinterpret_cast<const u32*>(low + step * 16);
    a[step][1] = *reinterpret_cast<const u32*>(high + step * 16);
    a[step][2] = *reinterpret_cast<const u32*>(low + step * 16 + 8);
    a[step][3] = *reinterpret_cast<const u32*>(high + step * 16 + 8);
  }
}

// This warp's part of the scores, over its share of the dims: [16 rows, KEYS_EACH].
__device__ __forceinline__ void multiply_keys(float (&s)[KEYS_EACH / 8][4], const u32 (&a)[STEPS_EACH][4],
                                              const scalar* tile, int key0, int step0, int lane) {
  const scalar* row = tile + (key0 + lane / 16 * 8 + lane % 8) * PITCH + step0 * 16 + lane / 8 % 2 * 8;
#pragma unroll
  for (int step = 0; step < STEPS_EACH; ++step) {
    if (STEPS % DIM_PARTS && step0 + step >= STEPS) break;
#pragma unroll
    for (int pair = 0; pair < KEYS_EACH / 16; ++pair) {
      u32 b[4];
      load_matrices(b, row + pair * 16 * PITCH + step * 16);
      float(&x)[4] = s[2 * pair], (&y)[4] = s[2 * pair + 1];
      mma(x[0], x[1], x[2], x[3], a[step][0], a[step][1], a[step][2], a[step][3], b[0], b[1]);
      mma(y[0], y[1], y[2], y[3], a[step][0], a[step][1], a[step][2], a[step][3], b[2], b[3]);
    }
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS)
    latent_attention(scalar* out, const scalar* q, const scalar* cache, const int* block_tables,
                     const int* cu_query_lens, const int* kv_lens, float* partial, float2* partial_stats,
                     i64 table_stride, i64 block_stride, i64 slot_stride, int first_request, int least_share,
                     int fresh, float scale) {
  DYNAMIC_SHARED(shared);
  scalar* tiles = reinterpret_cast<scalar*>(shared);                    // [STAGES][KEYS][PITCH]
  float* scores = reinterpret_cast<float*>(tiles + STAGES * TILE);      // [DIM_PARTS][ROWS][S_PITCH]
  scalar* probabilities = reinterpret_cast<scalar*>(scores + DIM_PARTS * ROWS * S_PITCH);  // [ROWS][P_PITCH]
  float* fades = reinterpret_cast<float*>(probabilities + ROWS * P_PITCH);                 // [ROWS]

  const int request = first_request + blockIdx.z;
  const int row0 = blockIdx.x * ROWS;
  const int* table = block_tables + request * table_stride;
  follow_older();
  const Share mine =
      share_of(cu_query_lens, kv_lens, request, row0, blockIdx.y, gridDim.y, least_share);
  if (row0 >= mine.rows || int(blockIdx.y) >= mine.active) return;

  // Keys of earlier steps need not wait for the kernel that writes this step's; `fresh` keys before the request's new
  // ones may be this step's too, of a request that it shares blocks with.
  const bool old = PDL && min(mine.from + STAGES - 1, mine.stop) * KEYS <= mine.past - fresh;
  if (PDL && !old) follow();
  int pages[PASSES];
  find_pages(pages, table, mine.from, mine.last);
#pragma unroll
  for (int stage = 0; stage < STAGES - 1; ++stage) {
    if (mine.from + stage < mine.stop)
      request_tile(tiles + stage * TILE, cache, pages, mine.from + stage, mine.last, block_stride, slot_stride);
    close_copies();
    find_pages(pages, table, mine.from + stage + 1, mine.last);
  }
  if (!PDL || old) follow();

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, c = lane % 4;
  const int row_tile = warp % ROW_TILES, key_part = warp / ROW_TILES % KEY_PARTS;
  const int dim_part = warp / (ROW_TILES * KEY_PARTS), step0 = dim_part * STEPS_EACH;
  u32 a[STEPS_EACH][4];
  load_queries(a, q + i64(mine.q_start) * HEADS * HEAD_DIM, row0 + row_tile * 16, mine.rows, step0, g, c);

  float o[ROW_TILES][2 * UNITS_EACH][4] = {};
  float top[ROWS_EACH], sum[ROWS_EACH];  // running maximum in base 2, and this lane's part of the sum
#pragma unroll
  for (int i = 0; i < ROWS_EACH; ++i) {
    top[i] = NEG_INF;
    sum[i] = 0;
  }

  for (int tile = mine.from; tile < mine.stop; ++tile) {
    wait_for_copies<STAGES - 2>();
    __syncthreads();
    const int ahead = tile + STAGES - 1;
    if (ahead < mine.stop) {
      request_tile(tiles + (ahead - mine.from) % STAGES * TILE, cache, pages, ahead, mine.last, block_stride,
                   slot_stride);
      find_pages(pages, table, ahead + 1, mine.last);
    }
    close_copies();
    const scalar* here = tiles + (tile - mine.from) % STAGES * TILE;

    float s[KEYS_EACH / 8][4] = {};
    multiply_keys(s, a, here, key_part * KEYS_EACH, step0, lane);
    float* slab = scores + (dim_part * ROWS + row_tile * 16) * S_PITCH + key_part * KEYS_EACH + 2 * c;
#pragma unroll
    for (int n = 0; n < KEYS_EACH / 8; ++n) {
      *reinterpret_cast<float2*>(slab + g * S_PITCH + 8 * n) = make_float2(s[n][0], s[n][1]);
      *reinterpret_cast<float2*>(slab + (g + 8) * S_PITCH + 8 * n) = make_float2(s[n][2], s[n][3]);
    }
    __syncthreads();

#pragma unroll
    for (int i = 0; i < ROWS_EACH; ++i) {
      const int row = warp * ROWS_EACH + i;
      const int sees = mine.past + (row0 + row) / HEADS;
      float x[LANE_KEYS], high = top[i];
#pragma unroll
      for (int j = 0; j < LANE_KEYS; ++j) {
        const int key = lane + 32 * j;
        x[j] = NEG_INF;
        if (key < KEYS && tile * KEYS + key <= sees) {
          x[j] = 0;
#pragma unroll
          for (int part = 0; part < DIM_PARTS; ++part) x[j] += scores[(part * ROWS + row) * S_PITCH + key];
          x[j] *= scale * LOG2E;
        }
        high = fmaxf(high, x[j]);
      }
#pragma unroll
      for (int step = 16; step > 0; step /= 2) high = fmaxf(high, __shfl_xor_sync(ALL, high, step));
      const float base = high == NEG_INF ? 0.0f : high;
      const float fade = exp2_fast(top[i] - base);
      top[i] = high;
      sum[i] *= fade;
#pragma unroll
      for (int j = 0; j < LANE_KEYS; ++j) {
        const float p = exp2_fast(x[j] - base);
        sum[i] += p;
        if (KEYS % 32 == 0 || lane + 32 * j < KEYS) probabilities[row * P_PITCH + lane + 32 * j] = from_float(p);
      }
      if (lane == 0) fades[row] = fade;
    }
    __syncthreads();

#pragma unroll
    for (int m = 0; m < ROW_TILES; ++m) {
      const float low = fades[m * 16 + g], high = fades[m * 16 + g + 8];
      if (!__any_sync(ALL, low != 1.0f || high != 1.0f)) continue;
#pragma unroll
      for (int n = 0; n < 2 * UNITS_EACH; ++n) {
        o[m][n][0] *= low;
        o[m][n][1] *= low;
        o[m][n][2] *= high;
        o[m][n][3] *= high;
      }
    }
#pragma unroll
    for (int step = 0; step < KEYS / 16; ++step) {
      u32 p[ROW_TILES][4];
#pragma unroll
      for (int m = 0; m < ROW_TILES; ++m)
        load_matrices(p[m], probabilities + (m * 16 + lane % 16) * P_PITCH + step * 16 + lane / 16 * 8);
#pragma unroll
      for (int u = 0; u < UNITS_EACH; ++u) {
        const int unit = warp * UNITS_EACH + u;
        if (UNITS % WARPS && unit >= UNITS) break;
        u32 b[4];
        load_columns(b, here + (step * 16 + lane % 16) * PITCH + unit * 16 + lane / 16 * 8);
#pragma unroll
        for (int m = 0; m < ROW_TILES; ++m) {
          float(&x)[4] = o[m][2 * u], (&y)[4] = o[m][2 * u + 1];
          mma(x[0], x[1], x[2], x[3], p[m][0], p[m][1], p[m][2], p[m][3], b[0], b[1]);
          mma(y[0], y[1], y[2], y[3], p[m][0], p[m][1], p[m][2], p[m][3], b[2], b[3]);
        }
      }
    }
  }

  // Sums of the rows to all warps, then the output, or its part with what the merge must know.
  const i64 place = (i64(blockIdx.z) * gridDim.x + blockIdx.x) * gridDim.y + blockIdx.y;
  const bool whole = mine.active == 1;
  __syncthreads();  // all have read the last fades
#pragma unroll
  for (int i = 0; i < ROWS_EACH; ++i) {
    const int row = warp * ROWS_EACH + i;
    const float all = warp_sum(sum[i]);
    if (lane == 0) fades[row] = whole ? 1.0f / all : 1.0f;
    if (lane == 0 && !whole) partial_stats[place * ROWS + row] = make_float2(top[i], all);
  }
  __syncthreads();
#pragma unroll
  for (int m = 0; m < ROW_TILES; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = m * 16 + half * 8 + g;
      if (row0 + row >= mine.rows) continue;
      const float factor = fades[row];
#pragma unroll
      for (int n = 0; n < 2 * UNITS_EACH; ++n) {
        const int dim = warp * UNITS_EACH * 16 + n * 8 + 2 * c;
        if (UNITS % WARPS && dim >= V_DIM) break;
        const float x = o[m][n][2 * half] * factor, y = o[m][n][2 * half + 1] * factor;
        if (whole)
          *reinterpret_cast<u32*>(out + (i64(mine.q_start) * HEADS + row0 + row) * V_DIM + dim) = pack2(x, y);
        else
          *reinterpret_cast<float2*>(partial + (place * ROWS + row) * V_DIM + dim) = make_float2(x, y);
      }
    }
}

#endif
