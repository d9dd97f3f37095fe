// cut_rows: where top_k and top_p cut a row, to a few bins of distances; draw_tokens.cu settles the rest.
//
// Shapes: logits [rows, VOCAB], best and parameters as in draw_tokens.cu. Workspace: table u32 [rows, BINS] and counters
//   int [rows, 3], zeros that every launch leaves zeros. Result: cuts [rows], for rows that are cut.
// Launch: block THREADS, grid (parts, rows), before draw_tokens.
//
// The tokens of each bin are counted, no masses summed: a bin's edges say between what its mass lies, and so in which
// bins top_p's cut may fall. These are few, for what decides is what is left beyond them, which grows by 1 % a bin.
#include "draw.cuh"

constexpr int ALL_BINS = 4096;  // 64 an octave
constexpr int BINS = 3072;      // that count: from 41 octaves on there is no mass
constexpr int SLOTS = BINS / THREADS;
constexpr float BIN = 3072.0f;  // to this a distance is added so that the sum's last bit is one bin
constexpr u32 BIN_BITS = 0x45400000u;
static_assert(BINS % THREADS == 0, "whole shares");

struct Shared {
  alignas(8) u32 counts[ALL_BINS + 1];
  u64 of_warps[WARPS];
  int found[2];
  bool last;
};

// The first bin with which `target` tokens are reached, or -1, and how many are missing before it.
__device__ __forceinline__ int bin_of_count(Shared& shared, u32 target, u32& left) {
  const u32* mine = shared.counts + threadIdx.x * SLOTS;
  u64 sum = 0, all;
#pragma unroll
  for (int i = 0; i < SLOTS; ++i) sum += mine[i];
  const u64 upto = sum_up_to(sum, shared.of_warps, all);
  if (all < target) return -1;
  if (upto - sum < target && target <= upto) {
    u32 missing = target - u32(upto - sum);
    int slot = 0;
    while (mine[slot] < missing) missing -= mine[slot++];
    shared.found[0] = threadIdx.x * SLOTS + slot;
    shared.found[1] = int(missing);
  }
  __syncthreads();
  left = u32(shared.found[1]);
  return shared.found[0];
}

// The first bin in which top_p's cut may fall and the last one. A polynomial's masses differ from a power's by less than
// 2^-20 of them and a rounding; what doubles round, and one mass for the target's, are far less than `slack`.
__device__ __forceinline__ void bins_of_mass(Shared& shared, double top_p, int& first, int& last) {
  const int begin = threadIdx.x * SLOTS;
  const WarpPowers powers;
  u64 least_of[SLOTS], most_of[SLOTS], least = 0, most = 0, least_all, most_all;
  u64 near = mass_of(float(begin) / ALL_BINS, powers);
#pragma unroll
  for (int i = 0; i < SLOTS; ++i) {
    const u64 count = shared.counts[begin + i], far = mass_of(float(begin + i + 1) / ALL_BINS, powers);
    const u64 less = (far >> 20) + 1;
    least += least_of[i] = count * (far > less ? far - less : 0);
    most += most_of[i] = count * (near + (near >> 20) + 1);
    near = far;
  }
  least = sum_up_to(least, shared.of_warps, least_all) - least;  // before the first bin of this thread
  most = sum_up_to(most, shared.of_warps, most_all) - most;
  const double slack = double(most_all) * 0x1p-40 + 2, rest = 1.0 - top_p;
  // With so much up to a bin and so much beyond it, is the cut surely, or perhaps, not beyond it?
  const auto reaches = [&](u64 upto, u64 beyond, double more) {
    return rest * double(upto) + more >= top_p * double(beyond);
  };
  bool maybe = begin > 0 && reaches(most, least_all - least, slack);
  bool surely = begin > 0 && reaches(least, most_all - most, -slack);
  if (threadIdx.x == 0) shared.found[1] = BINS - 1;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < SLOTS; ++i) {
    least += least_of[i];
    most += most_of[i];
    const bool now_maybe = reaches(most, least_all - least, slack), now_surely = reaches(least, most_all - most, -slack);
    if (now_maybe && !maybe) shared.found[0] = begin + i;
    if (now_surely && !surely) shared.found[1] = begin + i;
    maybe = now_maybe;
    surely = now_surely;
  }
  __syncthreads();
  first = shared.found[0];
  last = shared.found[1];
}

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS)
    cut_rows(const scalar* logits, const i64* best, const double* parameters, u32* table, int* counters, Cut* cuts,
             i64 stride) {
  follow();
  __shared__ Shared shared;
  const int index = blockIdx.y;
  const i64 greedy = best[index];
  const Row row(logits, greedy, parameters, stride);
  if (greedy < 0 || row.scale == 0 || !row.cut()) return;
  for (int i = threadIdx.x; i < BINS; i += THREADS) shared.counts[i] = 0;
  __syncthreads();
  each_tile(row, [&](const Tile& tile) {
#pragma unroll
    for (int e = 0; e < EACH; ++e)
      atomicAdd(shared.counts + (__float_as_uint(__fadd_rd(tile.distance(row, e), BIN)) - BIN_BITS), 1u);
  });
  __syncthreads();
  u64* pairs = reinterpret_cast<u64*>(shared.counts);  // two counts in one sum
  u64* whole = reinterpret_cast<u64*>(table + i64(index) * BINS);
  if (gridDim.x > 1) {
    for (int i = threadIdx.x; i < BINS / 2; i += THREADS)
      if (pairs[i]) atomicAdd(whole + i, pairs[i]);
  }
  if (!is_last(shared.last, counters + 3 * index)) return;
  if (gridDim.x > 1) {
#pragma unroll
    for (int i = threadIdx.x; i < BINS / 2; i += THREADS) {
      pairs[i] = __ldcg(whole + i);
      whole[i] = 0;
    }
    __syncthreads();
  }
  int first = -1, last;
  u32 left = 0;
  const double top_p = row.top_p();
  if (row.top_k() > 0) first = last = bin_of_count(shared, row.top_k(), left);
  if (first >= 0 && top_p < 1.0) {  // everything up to the bin is listed, and top_p counts from the first
    first = 0;
    left = row.top_k();
  }
  if (first < 0 && top_p < 1.0) bins_of_mass(shared, top_p, first, last);
  if (threadIdx.x > 0) return;
  // Where the kth has no mass nothing is cut.
  cuts[index] = first < 0 ? Cut{2.0f, 2.0f, 0, 0}
                          : Cut{float(first) / ALL_BINS, float(last + 1) / ALL_BINS, left, 0};
}
