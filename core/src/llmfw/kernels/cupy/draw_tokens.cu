// draw_tokens: one token a row by temperature, top_k, top_p and min_p, without sorting; exact.
//
// Shapes: logits [rows, VOCAB], rows `stride` apart, each aligned to WIDTH scalars; best int64 [rows], where each row's
//   greatest stands, or -1; parameters float64 [5, rows]: scale (log2 e / temperature, 0 for greedy rows), top_k (0 for
//   all), top_p, farthest (-log2 min_p), uniform; tokens int64 [rows]. With `store` (int32) and places int64 [rows],
//   store[places[row]] becomes max(token, 0). Workspace: table u64 [rows, BINS] and counters int [rows, 3], zeros that
//   every launch leaves zeros; cut u64 [rows, 2]; masses u64 [rows, TILES]; near uint2 [rows, ROOM].
// Launch: block THREADS, grid (parts, rows): `count_tokens` where top_k or top_p is set in some row, then `draw_tokens`.
// Numbers: a token counts by its distance y = (greatest - logit) * scale in octaves and by a whole number of mass,
//   2^(40 - y). Sums of whole numbers have no order, so any division of the work gives the reference's token. Products
//   and sums here are rounded one by one, as torch does.
//
// count_tokens sums the mass of each bin of distances (or, where top_k is set, counts its tokens) and finds the bin in
// which the row is cut. draw_tokens sums the mass of each tile of what lies nearer, lists what lies in that bin (with
// top_k and top_p, up to it), and the last block of a row sorts the list out: the cut itself, the tile in which the
// draw falls, the token in that tile.
#include "common.cuh"

#ifndef VOCAB
#define VOCAB 128256
#endif
#ifndef WIDTH
#define WIDTH 8
#endif
#ifndef THREADS
#define THREADS 256
#endif
#ifndef MIN_BLOCKS  // resident blocks the registers must leave room for
#define MIN_BLOCKS 2
#endif
#ifndef EACH  // tokens of a lane in a tile
#define EACH 32
#endif
#ifndef ROOM  // listed tokens of a row; where there are more, the row itself is read again
#define ROOM 4096
#endif

constexpr int TILE = 32 * EACH;
constexpr int TILES = (VOCAB + TILE - 1) / TILE;
constexpr int DIGIT = 11;
constexpr int BINS = 1 << DIGIT;
constexpr int SLOTS = BINS / THREADS;
constexpr float BINS_AN_OCTAVE = 48.0f;
constexpr float NO_MASS = 62.0f;  // octaves; from 40 on there is none
constexpr u32 FARTHEST = 0x7f800000u;  // bits of infinity
static_assert(BINS % THREADS == 0 && THREADS % 32 == 0 && EACH % WIDTH == 0, "whole shares");
static_assert(TILES <= BINS && TILE <= BINS && VOCAB <= 1 << 22, "tables hold them, sums fit 63 bits");

struct Row {
  const scalar* logits;
  float greatest, scale, farthest;
  u32 top_k;
  double top_p, uniform;
  __device__ bool cut_by_count() const { return top_k > 0; }
  __device__ bool cut_by_mass() const { return top_p < 1.0; }
  __device__ bool cut() const { return cut_by_count() || cut_by_mass(); }
};

struct Found {
  int slot;
  u64 left;  // of the target, after the slots before it
};

struct Shared {
  u64 table[BINS];
  u64 of_warps[THREADS / 32];
  Found found;
  u32 least, most;
  bool last;
};

__device__ __forceinline__ Row row_of(const scalar* logits, i64 token, const double* parameters, i64 stride) {
  const int row = blockIdx.y, rows = gridDim.y;
  Row it;
  it.logits = logits + row * stride;
  it.scale = float(parameters[row]);
  it.top_k = u32(parameters[rows + row]);
  it.top_p = parameters[2 * rows + row];
  it.farthest = float(parameters[3 * rows + row]);
  it.uniform = parameters[4 * rows + row];
  it.greatest = token < 0 ? 0.0f : __fadd_rn(to_float(it.logits[token]), 0.0f);  // of -0 a distance would be -0
  if (it.top_k > VOCAB) it.top_k = VOCAB;
  return it;
}

__device__ __forceinline__ float distance(const Row& row, scalar logit) {
  return __fmul_rn(__fsub_rn(row.greatest, to_float(logit)), row.scale);
}

// The bin of a distance is the whole part of this; everything beyond the last bin is in it.
__device__ __forceinline__ float place_of(float y) { return fminf(__fmul_rn(y, BINS_AN_OCTAVE), BINS - 1); }

// 2^(40 - y) to 22 bits, by a polynomial over the distance to the nearest whole octave.
__device__ __forceinline__ u64 mass_of(float y) {
  const float shifted = __fadd_rn(fminf(y, NO_MASS), 12582912.0f);  // 1.5 * 2^23: the sum's last bit is one octave
  const float x = __fsub_rn(__fsub_rn(shifted, 12582912.0f), fminf(y, NO_MASS));
  float p = 0.001326472731307149f;
  p = __fadd_rn(__fmul_rn(p, x), 0.009671512991189957f);
  p = __fadd_rn(__fmul_rn(p, x), 0.05550733581185341f);
  p = __fadd_rn(__fmul_rn(p, x), 0.24022242426872253f);
  p = __fadd_rn(__fmul_rn(p, x), 0.6931470036506653f);
  p = __fadd_rn(__fmul_rn(p, x), 1.0f);
  const u32 digits = __float_as_uint(__fadd_rn(p, 2.0f)) & 0x7fffffu;  // of p, in units of 2^-22
  return u64(digits) << 18 >> (__float_as_uint(shifted) & 63u);
}

// A lane's tokens of a tile: in step i of a pack, tile * TILE + (i * 32 + lane) * WIDTH + j.
__device__ __forceinline__ int token_of(int tile, int e) {
  return tile * TILE + (e / WIDTH * 32 + int(threadIdx.x) % 32) * WIDTH + e % WIDTH;
}

__device__ __forceinline__ void load_tile(float (&y)[EACH], const Row& row, int tile) {
  Pack<WIDTH> packs[EACH / WIDTH];
#pragma unroll
  for (int i = 0; i < EACH / WIDTH; ++i) {
    const int token = token_of(tile, i * WIDTH);
    if (token < VOCAB) packs[i] = load<WIDTH>(row.logits + token);
  }
#pragma unroll
  for (int e = 0; e < EACH; ++e)
    y[e] = token_of(tile, e) < VOCAB ? distance(row, packs[e / WIDTH].at[e % WIDTH]) : __uint_as_float(FARTHEST);
}

// 64-bit sums from 32-bit operations of shared memory.
__device__ __forceinline__ void add(u64* slot, u64 x) {
  u32* halves = reinterpret_cast<u32*>(slot);
  const u32 low = u32(x), old = atomicAdd(halves, low);
  const u32 high = u32(x >> 32) + (old + low < old);
  if (high) atomicAdd(halves + 1, high);
}

__device__ __forceinline__ u64 shifted_up(u64 x, int lanes) {
  return u64(u32(__shfl_up_sync(ALL, int(x >> 32), lanes))) << 32 | u32(__shfl_up_sync(ALL, int(x), lanes));
}

// Sum over the threads up to this one; `all` becomes that over the block.
__device__ __forceinline__ u64 sum_up_to(u64 x, Shared& shared, u64& all) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const u64 other = shifted_up(x, step);
    if (lane >= step) x += other;
  }
  __syncthreads();
  if (lane == 31) shared.of_warps[warp] = x;
  __syncthreads();
  u64 before = 0;
  all = 0;
#pragma unroll
  for (int i = 0; i < THREADS / 32; ++i) {
    if (i == warp) before = all;
    all += shared.of_warps[i];
  }
  return before + x;
}

__device__ __forceinline__ void clear(Shared& shared) {
  __syncthreads();
  for (int i = threadIdx.x; i < BINS; i += THREADS) shared.table[i] = 0;
  __syncthreads();
}

// The first slot of the table with which the sum reaches `target_of(sum of all)`, which is from 1 to that.
template <class F>
__device__ __forceinline__ Found find(Shared& shared, F&& target_of) {
  __syncthreads();
  u64 mine = 0, all;
#pragma unroll
  for (int i = 0; i < SLOTS; ++i) mine += shared.table[threadIdx.x * SLOTS + i];
  const u64 upto = sum_up_to(mine, shared, all), target = target_of(all);
  u64 before = upto - mine;
  if (before < target && target <= upto) {
    int slot = threadIdx.x * SLOTS;
    while (before + shared.table[slot] < target) before += shared.table[slot++];
    shared.found.slot = slot;
    shared.found.left = target - before;
  }
  __syncthreads();
  return shared.found;
}

// What top_p asks of a sum: at least 1, at most all of it.
__device__ __forceinline__ u64 part_of(u64 all, double top_p) {
  const u64 part = u64(ceil(double(all) * top_p));
  return part < 1 ? 1 : part > all ? all : part;
}

// Whether this is the last of a row's blocks; it then sees what the others wrote.
__device__ __forceinline__ bool is_last(Shared& shared, int* counter) {
  __syncthreads();
  if (threadIdx.x == 0) {
    shared.last = gridDim.x == 1 || add_release_acquire(counter, 1) == int(gridDim.x) - 1;
    if (shared.last) *counter = 0;
  }
  __syncthreads();
  return shared.last;
}

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS)
    count_tokens(const scalar* logits, const i64* best, const double* parameters, u64* table, int* counters, u64* cut,
                 i64 stride) {
  follow();
  __shared__ Shared shared;
  const int index = blockIdx.y, warp = threadIdx.x / 32;
  const i64 greedy = best[index];
  const Row row = row_of(logits, greedy, parameters, stride);
  if (greedy < 0 || row.scale == 0 || !row.cut()) return;
  const bool by_count = row.cut_by_count();
  clear(shared);
  u64 far = 0;  // tokens of the last bin, which may be nearly all
  for (int tile = blockIdx.x * (THREADS / 32) + warp; tile < TILES; tile += gridDim.x * (THREADS / 32)) {
    float y[EACH];
    load_tile(y, row, tile);
#pragma unroll
    for (int e = 0; e < EACH; ++e) {
      const float place = place_of(y[e]);
      if (place >= BINS - 1)
        ++far;
      else if (by_count)
        atomicAdd(reinterpret_cast<u32*>(shared.table + int(place)), 1u);
      else
        add(shared.table + int(place), mass_of(y[e]));
    }
  }
  if (by_count && far) add(shared.table + BINS - 1, far);
  __syncthreads();
  u64* whole = table + i64(index) * BINS;
  if (gridDim.x > 1) {
    for (int i = threadIdx.x; i < BINS; i += THREADS)
      if (shared.table[i]) atomicAdd(whole + i, shared.table[i]);
  }
  if (!is_last(shared, counters + 3 * index)) return;
  if (gridDim.x > 1) {
    for (int i = threadIdx.x; i < BINS; i += THREADS) {
      shared.table[i] = __ldcg(whole + i);
      whole[i] = 0;
    }
  }
  const Found found = find(shared, [&](u64 all) { return by_count ? row.top_k : part_of(all, row.top_p); });
  if (threadIdx.x == 0) {
    cut[2 * index] = found.slot;
    // With both, everything up to the bin is listed, and top_p counts from the first.
    cut[2 * index + 1] = by_count && row.cut_by_mass() ? row.top_k : found.left;
  }
}

// The tokens that draw_tokens listed: the list, or where it had no room the row.
struct Listed {
  const Row* row;
  const uint2* near;
  int count;          // how many there are
  float first, last;  // they are from this place on, and before that

  template <class F>
  __device__ __forceinline__ void each(F&& f) const {
    if (count <= ROOM) {
      for (int i = threadIdx.x; i < count; i += THREADS) {
        const uint2 it = __ldcg(near + i);
        f(int(it.x), __uint_as_float(it.y));
      }
      return;
    }
    for (int i = threadIdx.x; i < VOCAB; i += THREADS) {
      const float y = distance(*row, row->logits[i]), place = place_of(y);
      if (place >= first && place < last) f(i, y);
    }
  }
};

// The distance of the listed token with which their sum, by distance, reaches `target`.
template <class Measure>
__device__ __forceinline__ float select(Shared& shared, const Listed& listed, u64 target, Measure&& measure) {
  // What all have in common needs no search; of the other bits, DIGIT at a time are settled.
  u32 least = ~0u, most = 0;
  listed.each([&](int, float y) {
    least = min(least, __float_as_uint(y));
    most = max(most, __float_as_uint(y));
  });
  __syncthreads();
  if (threadIdx.x == 0) {
    shared.least = ~0u;
    shared.most = 0;
  }
  __syncthreads();
  if (least <= most) {
    atomicMin(&shared.least, least);
    atomicMax(&shared.most, most);
  }
  __syncthreads();
  least = shared.least;
  u32 from = 0, unknown = shared.most - least;  // the answer is least + from + (0 to unknown)
  while (unknown > 0) {
    const int shift = max(0, 32 - __clz(unknown) - DIGIT);
    clear(shared);
    listed.each([&](int, float y) {
      const u32 place = __float_as_uint(y) - least - from;
      if (place <= unknown) add(shared.table + (place >> shift), measure(y));
    });
    const Found found = find(shared, [&](u64) { return target; });
    target = found.left;
    from += u32(found.slot) << shift;
    unknown = min(unknown - (u32(found.slot) << shift), (1u << shift) - 1);
  }
  return __uint_as_float(least + from);
}

// Where the listed tokens are cut, by top_k, by top_p, or by top_p among the top_k.
__device__ __forceinline__ float cut_of(Shared& shared, const Listed& listed, u64 target) {
  const Row& row = *listed.row;
  if (!row.cut_by_count()) return select(shared, listed, target, [](float y) { return mass_of(y); });
  const float kth = select(shared, listed, target, [](float) { return u64(1); });
  if (!row.cut_by_mass()) return kth;
  u64 nearer = 0, mass = 0, all_nearer, all;
  listed.each([&](int, float y) {
    if (y < kth) {
      ++nearer;
      mass += mass_of(y);
    }
  });
  sum_up_to(nearer, shared, all_nearer);
  sum_up_to(mass, shared, all);
  all += (target - all_nearer) * mass_of(kth);  // of equal ones only so many count
  return select(shared, listed, part_of(all, row.top_p), [](float y) { return mass_of(y); });
}

__device__ __forceinline__ void finish(i64* tokens, int* store, const i64* places, i64 token) {
  tokens[blockIdx.y] = token;
  if (store) store[places[blockIdx.y]] = token < 0 ? 0 : int(token);
}

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS)
    draw_tokens(i64* tokens, const scalar* logits, const i64* best, const double* parameters, int* counters,
                const u64* cut, u64* masses, uint2* near, int* store, const i64* places, i64 stride) {
  follow();
  __shared__ Shared shared;
  const int index = blockIdx.y, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const i64 greedy = best[index];
  const Row row = row_of(logits, greedy, parameters, stride);
  if (greedy < 0 || row.scale == 0) {
    if (blockIdx.x == 0 && threadIdx.x == 0) finish(tokens, store, places, greedy);
    return;
  }
  Listed listed;
  listed.row = &row;
  listed.near = near + i64(index) * ROOM;
  const int bin = row.cut() ? int(cut[2 * index]) : BINS;
  listed.first = row.cut_by_count() && row.cut_by_mass() ? 0.0f : float(bin);
  listed.last = float(bin + 1);
  masses += i64(index) * TILES;
  near += i64(index) * ROOM;
  int* meeting = counters + 3 * index + 1;
  int* listing = counters + 3 * index + 2;

  for (int tile = blockIdx.x * (THREADS / 32) + warp; tile < TILES; tile += gridDim.x * (THREADS / 32)) {
    float y[EACH];
    load_tile(y, row, tile);
    u64 mass = 0;
    u32 wanted = 0;
#pragma unroll
    for (int e = 0; e < EACH; ++e) {
      const float place = place_of(y[e]);
      if (place < listed.first) {
        if (y[e] <= row.farthest) mass += mass_of(y[e]);
      } else if (place < listed.last) {
        wanted |= 1u << e;
      }
    }
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const u64 other = shifted_up(mass, step);
      if (lane >= step) mass += other;
    }
    if (lane == 31) masses[tile] = mass;
    int upto = __popc(wanted);
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int other = __shfl_up_sync(ALL, upto, step);
      if (lane >= step) upto += other;
    }
    const int all = __shfl_sync(ALL, upto, 31);
    if (all == 0) continue;
    int at = lane == 31 ? atomicAdd(listing, all) : 0;
    at = __shfl_sync(ALL, at, 31) + upto - __popc(wanted);
#pragma unroll
    for (int e = 0; e < EACH; ++e) {
      if (!(wanted >> e & 1)) continue;
      if (at < ROOM) near[at] = make_uint2(token_of(tile, e), __float_as_uint(y[e]));
      ++at;
    }
  }
  if (!is_last(shared, meeting)) return;

  float limit = row.farthest;
  listed.count = __ldcg(listing);
  if (row.cut()) limit = fminf(limit, cut_of(shared, listed, cut[2 * index + 1]));

  // The tile in which the draw falls.
  __syncthreads();
  for (int i = threadIdx.x; i < BINS; i += THREADS) shared.table[i] = i < TILES ? __ldcg(masses + i) : 0;
  __syncthreads();
  if (row.cut()) {
    listed.each([&](int token, float y) {
      if (y <= limit) add(shared.table + token / TILE, mass_of(y));
    });
  }
  const Found tile = find(shared, [&](u64 all) {
    const u64 drawn = u64(double(all) * row.uniform);
    return (drawn < all ? drawn : all - 1) + 1;
  });

  // The token in the tile.
  clear(shared);
  for (int i = threadIdx.x; i < TILE; i += THREADS) {
    const int token = tile.slot * TILE + i;
    const float y = token < VOCAB ? distance(row, row.logits[token]) : __uint_as_float(FARTHEST);
    if (y <= limit) shared.table[i] = mass_of(y);
  }
  const Found token = find(shared, [&](u64) { return tile.left; });
  if (threadIdx.x > 0) return;
  *listing = 0;
  finish(tokens, store, places, i64(tile.slot) * TILE + token.slot);
}
