// draw_tokens: one token a row by temperature, top_k, top_p and min_p, without sorting; exact (reference draw_tokens).
//
// Shapes: logits [rows, VOCAB], rows `stride` apart, each aligned to WIDTH scalars; best int64 [rows], where each row's
//   greatest stands, or -1; parameters float64 [5, rows]: scale (log2 e / temperature, 0 for greedy rows), top_k (0 for
//   all), top_p, farthest (-log2 min_p), uniform; tokens int64 [rows]. With `store` (int32) and places int64 [rows],
//   store[places[row]] becomes max(token, 0). cuts [rows]: draw_cut.cu's, read for rows that are cut. Workspace: totals
//   u64 [rows] and counters int [rows, 3], zeros that every launch leaves zeros; masses u64 [rows, TILES]; near uint2
//   [rows, ROOM].
// Launch: block THREADS, grid (parts, rows).
//
// Every warp sums the mass of its tiles: of what lies nearer than the bins of the cut, and of all. What lies in these
// bins is listed, and the last block of a row sorts it out: the cut itself, the tile in which the draw falls, the token
// in that tile.
#include "draw.cuh"

#ifndef ROOM  // listed tokens of a row; where there are more, the row itself is read again
#define ROOM 4096
#endif

constexpr int DIGIT = 11;
constexpr int SLOTS = 1 << DIGIT;
static_assert(TILES <= SLOTS && TILE <= SLOTS && ROOM <= 2 * SLOTS, "the table holds them");

struct Found {
  int slot;
  u64 left;  // of the target, after the slots before it
};

struct Shared {
  u64 table[SLOTS];  // and before the end the tokens that this block lists
  u64 of_warps[WARPS];
  u32 powers[32];
  Found found;
  u32 least, most;
  int listed, place;
  bool last;
};

// 64-bit sums from 32-bit operations of shared memory.
__device__ __forceinline__ void add(u64* slot, u64 x) {
  u32* halves = reinterpret_cast<u32*>(slot);
  const u32 low = u32(x), old = atomicAdd(halves, low);
  const u32 high = u32(x >> 32) + (old + low < old);
  if (high) atomicAdd(halves + 1, high);
}

__device__ __forceinline__ void clear(Shared& shared, int slots) {
  __syncthreads();
  for (int i = threadIdx.x; i < slots; i += THREADS) shared.table[i] = 0;
  __syncthreads();
}

// The first slot of the table with which the sum reaches `target_of(sum of all)`, which is from 1 to that.
template <class F>
__device__ __forceinline__ Found find(Shared& shared, int slots, F&& target_of) {
  __syncthreads();
  const int each = (slots + THREADS - 1) / THREADS, begin = threadIdx.x * each, end = min(begin + each, slots);
  u64 mine = 0, all;
  for (int i = begin; i < end; ++i) mine += shared.table[i];
  const u64 upto = sum_up_to(mine, shared.of_warps, all), target = target_of(all);
  u64 before = upto - mine;
  if (before < target && target <= upto) {
    int slot = begin;
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

// The tokens that lie between two distances: the list, or where it had no room the row.
struct Listed {
  const Row* row;
  const uint2* near;
  const u32* powers;
  int count;
  float first, last;

  __device__ __forceinline__ u64 mass(float z) const {
    return mass_of(z, [&](u32 n) { return powers[n % 32]; });
  }
  template <class F>
  __device__ __forceinline__ void each(F&& f) const {
    if (count <= ROOM) {
#pragma unroll 1
      for (int i = threadIdx.x; i < count; i += THREADS) {
        const uint2 it = __ldcg(near + i);
        f(int(it.x), __uint_as_float(it.y));
      }
      return;
    }
#pragma unroll 1
    for (int i = threadIdx.x; i < VOCAB; i += THREADS) {
      const float z = row->distance(row->logits[i]);
      if (z >= first && z < last) f(i, z);
    }
  }
};

// The distance of the listed token with which their number or their mass, by distance, reaches `target`.
__device__ __forceinline__ float select(Shared& shared, const Listed& listed, bool by_count, u64 target) {
  // What all have in common needs no search; of the other bits, DIGIT at a time are settled.
  u32 least = ~0u, most = 0;
  listed.each([&](int, float z) {
    least = min(least, __float_as_uint(z));
    most = max(most, __float_as_uint(z));
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
    const int shift = max(0, 32 - __clz(unknown) - DIGIT), slots = int(unknown >> shift) + 1;
    clear(shared, slots);
    listed.each([&](int, float z) {
      const u32 place = __float_as_uint(z) - least - from;
      if (place <= unknown) add(shared.table + (place >> shift), by_count ? 1 : listed.mass(z));
    });
    const Found found = find(shared, slots, [&](u64) { return target; });
    target = found.left;
    from += u32(found.slot) << shift;
    unknown = min(unknown - (u32(found.slot) << shift), (1u << shift) - 1);
  }
  return __uint_as_float(least + from);
}

// Where the listed tokens are cut: by top_k, which keeps `left` of them, by top_p among these, or, where `left` is 0, by
// top_p, which keeps so much mass of them.
__device__ __forceinline__ float cut_of(Shared& shared, const Listed& listed, u32 left, u64 mass_left) {
  float limit = 1.0f;
  if (left > 0) {
    limit = select(shared, listed, true, left);
    const double top_p = listed.row->top_p();
    if (top_p >= 1.0) return limit;
    u64 nearer = 0, mass = 0, all_nearer, all;
    listed.each([&](int, float z) {
      if (z < limit) {
        ++nearer;
        mass += listed.mass(z);
      }
    });
    sum_up_to(nearer, shared.of_warps, all_nearer);
    sum_up_to(mass, shared.of_warps, all);
    mass_left = part_of(all + (left - all_nearer) * listed.mass(limit), top_p);  // of equal ones only so many count
  }
  return fminf(limit, select(shared, listed, false, mass_left));
}

__device__ __forceinline__ void finish(i64* tokens, int* store, const i64* places, i64 token) {
  tokens[blockIdx.y] = token;
  if (store) store[places[blockIdx.y]] = token < 0 ? 0 : int(token);
}

// Where the kept tokens end: all nearer than `first` are kept, and of those up to `last` some.
struct Bounds {
  float first, last;
  u32 left;  // of top_k, from `first` on

  __device__ __forceinline__ Bounds(const Row& row, const Cut* cut) {
    const float farthest = fminf(row.farthest(), 1.0f);
    const float beyond = __uint_as_float(__float_as_uint(farthest) + 1);  // the next number
    first = last = beyond;
    left = 0;
    if (!row.cut() || beyond <= cut->first) return;  // min_p cuts before top_k and top_p may
    first = cut->first;
    last = cut->last;
    left = cut->left;
  }
  __device__ __forceinline__ bool none() const { return first > 1.0f; }
  __device__ __forceinline__ bool some() const { return first < last; }
};

// Writes the mass of each tile, as far as it is nearer than the bounds, keeps the tokens that lie in them, and gives this
// lane's share of the mass of all.
__device__ __forceinline__ u64 sum_tiles(Shared& shared, const Row& row, const Bounds& bounds, u64* masses) {
  const WarpPowers powers;
  const bool whole = bounds.none();
  u64 total = 0;
  each_tile(row, [&](const Tile& tile) {
    u32 high = 0, low = 0, near_high = 0, near_low = 0, wanted = 0;
    if (whole) {
#pragma unroll
      for (int e = 0; e < EACH; ++e) {
        const Mass mass(tile.distance(row, e), powers);
        near_high += mass.high;
        near_low += mass.low;
      }
    } else {
#pragma unroll
      for (int e = 0; e < EACH; ++e) {
        const float z = tile.distance(row, e);
        const Mass mass(z, powers);
        high += mass.high;
        low += mass.low;
        const bool is_near = z < bounds.first;
        near_high += is_near ? mass.high : HIGH_BITS;
        near_low += is_near ? mass.low : LOW_BITS;
        wanted |= !is_near && z < bounds.last ? 1u << e : 0u;
      }
      total += whole_mass(high - EACH * HIGH_BITS, low - EACH * LOW_BITS);
    }
    near_high = __reduce_add_sync(ALL, near_high - EACH * HIGH_BITS);
    near_low = __reduce_add_sync(ALL, near_low - EACH * LOW_BITS);
    if (threadIdx.x % 32 == 0) masses[tile.number] = whole_mass(near_high, near_low);
    if (wanted == 0) return;
    u32* tokens = reinterpret_cast<u32*>(shared.table);
    int at = atomicAdd(&shared.listed, __popc(wanted));
    for (; wanted && at < ROOM; wanted &= wanted - 1) tokens[at++] = u32(token_of(tile.number, __ffs(wanted) - 1));
  });
  return total;
}

// Adds what this block kept to the row's list; of more than ROOM only the number counts.
__device__ __forceinline__ void list(Shared& shared, const Row& row, uint2* near, int* listing) {
  __syncthreads();
  if (threadIdx.x == 0 && shared.listed > 0) shared.place = atomicAdd(listing, shared.listed);
  __syncthreads();
  const u32* tokens = reinterpret_cast<const u32*>(shared.table);
  for (int i = threadIdx.x; i < shared.listed && shared.place + i < ROOM; i += THREADS)
    near[shared.place + i] = make_uint2(tokens[i], __float_as_uint(row.distance(row.logits[tokens[i]])));
}

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS)
    draw_tokens(i64* tokens, const scalar* logits, const i64* best, const double* parameters, int* counters,
                const Cut* cuts, u64* totals, u64* masses, uint2* near, int* store, const i64* places, i64 stride) {
  follow();
  __shared__ Shared shared;
  const int index = blockIdx.y;
  const i64 greedy = best[index];
  const Row row(logits, greedy, parameters, stride);
  if (greedy < 0 || row.scale == 0) {
    if (blockIdx.x == 0 && threadIdx.x == 0) finish(tokens, store, places, greedy);
    return;
  }
  const Bounds bounds(row, cuts + index);
  masses += i64(index) * TILES;
  near += i64(index) * ROOM;
  int* listing = counters + 3 * index + 2;
  if (threadIdx.x < 32) shared.powers[threadIdx.x] = POWERS[threadIdx.x];
  if (threadIdx.x == 0) shared.listed = 0;
  __syncthreads();
  u64 total = sum_tiles(shared, row, bounds, masses);
  if (bounds.some()) {
    list(shared, row, near, listing);
#pragma unroll
    for (int step = 1; step < 32; step *= 2) total += shifted_up(total, step) * (threadIdx.x % 32 >= step);
    if (threadIdx.x % 32 == 31) atomicAdd(totals + index, total);
  }
  if (!is_last(shared.last, counters + 3 * index + 1)) return;

  // The cut.
  float limit = row.farthest();
  const Listed listed{&row, near, shared.powers, __ldcg(listing), bounds.first, bounds.last};
  if (bounds.some()) {
    u64 mine = 0, nearer;
    for (int i = threadIdx.x; i < TILES; i += THREADS) mine += __ldcg(masses + i);
    sum_up_to(mine, shared.of_warps, nearer);
    const u64 wanted = part_of(__ldcg(totals + index), row.top_p()) - nearer;
    limit = fminf(limit, cut_of(shared, listed, bounds.left, wanted));
  }
  // The tile in which the draw falls.
  __syncthreads();
  for (int i = threadIdx.x; i < TILES; i += THREADS) shared.table[i] = __ldcg(masses + i);
  __syncthreads();
  if (bounds.some()) {
    listed.each([&](int token, float z) {
      if (z <= limit) add(shared.table + token / TILE, listed.mass(z));
    });
  }
  const Found tile = find(shared, TILES, [&](u64 all) {
    const u64 drawn = u64(double(all) * row.uniform());
    return (drawn < all ? drawn : all - 1) + 1;
  });
  // The token in the tile.
  for (int i = threadIdx.x; i < TILE; i += THREADS) {
    const int token = tile.slot * TILE + i;
    const float z = token < VOCAB ? row.distance(row.logits[token]) : 1.0f;
    shared.table[i] = z <= limit ? listed.mass(z) : 0;
  }
  const Found token = find(shared, TILE, [&](u64) { return tile.left; });
  if (threadIdx.x > 0) return;
  *listing = 0;
  totals[index] = 0;
  finish(tokens, store, places, i64(tile.slot) * TILE + token.slot);
}
