// rope_and_attend where every request generates one token: q/k norm, rotary embedding, paged K/V write and split-KV
// flash decoding in one kernel, 16-bit types, for head sizes up to 128.
//
// Shapes: those of paged.cuh, with qkv [requests, (heads + 2 kv_heads) * HEAD_DIM], rows qkv_stride apart, in place of
//   q; positions, slots int64 [requests]; cos_sin, q_norm, k_norm as rope_cache.cu has them. A negative slot keeps
//   nothing.
// Launch: as paged.cuh tells. Numbers: rotary.cuh, paged.cuh.
//
// Every block normalises and rotates its own rows of q, and the block whose share holds the newest key that key too,
// into shared memory. There its warps read the newest key and value; the cache's copy is for later steps. So no block
// reads what another one of this launch writes, as long as no request shares the block that another writes to.
#include "common.cuh"

#if DTYPE != F32
#define USED_ROWS (GROUP < ROWS ? GROUP : ROWS)  // little shared memory, so that blocks fit beside a product's
#include "paged_tiles.cuh"
#include "rotary.cuh"

constexpr int AT_ONCE = THREADS / LANES;   // heads that the block turns at the same time
constexpr int MOST_HEADS = USED_ROWS + 2;  // rows of q, the newest key and value
constexpr int Q_PITCH = HEAD_DIM + 8;      // so that rows begin in different banks
static_assert(V_DIM == HEAD_DIM, "K and V come out of one packed row of heads");

// What this step brings, normalised and rotated.
struct Fresh {
  alignas(16) scalar q[USED_ROWS][Q_PITCH];
  alignas(16) scalar k[HEAD_DIM], v[V_DIM];
};

// Where a block's heads come from, and where the newest token's go.
struct Source {
  const scalar *qkv, *q_norm, *k_norm;  // qkv: the request's row
  const float* cos_sin;
  scalar *k, *v;                        // in the cache, or null
  int kv_head, kv_heads, first, rows;   // of the block's rows of q, in their KV head
  bool newest;                          // whether the block wants K and V
  float eps, offset;

  __device__ __forceinline__ int heads() const { return rows + (newest ? 2 : 0); }
  __device__ __forceinline__ bool is_key(int item) const { return item == rows; }
  __device__ __forceinline__ bool is_value(int item) const { return item > rows; }
  __device__ __forceinline__ const scalar* head(int item) const {
    const int queries = kv_heads * GROUP;
    const int place = item < rows      ? kv_head * GROUP + first + item
                      : is_key(item) ? queries + kv_head
                                       : queries + kv_heads + kv_head;
    return qkv + place * HEAD_DIM;
  }
  __device__ __forceinline__ const scalar* norm(int item) const {
    return is_value(item) ? nullptr : is_key(item) ? k_norm : q_norm;
  }
};

// What older kernels left that a lane needs: asked for before the tiles, behind which it would queue.
struct Ready {
  Angles angles;
  Packs weight;  // of the first head's norm
};

__device__ __forceinline__ Ready make_ready(const Source& source, i64 position, const Unit& unit) {
  Ready ready;
  if (source.cos_sin && unit.turns()) ready.angles = load_angles(source.cos_sin, position, unit);
  const scalar* const norm = source.norm(threadIdx.x / LANES);
  if (unit.active() && norm) ready.weight = load_packs(norm, unit);
  return ready;
}

// One head: rows of q come first, then the newest key and value.
__device__ __forceinline__ void turn_head(Fresh& fresh, const Source& source, int item, const Unit& unit,
                                          const Ready& ready) {
  const bool active = item < source.heads() && unit.active();
  Part part;
  if (active) part.set(load_packs(source.head(item), unit));
  if (source.q_norm || source.k_norm) {  // uniform, so that all lanes meet in the shuffles
    const float scale = part.inverse_rms(source.eps);
    if (active && source.norm(item)) part.normalise(scale, ready.weight, source.offset);
  }
  if (!active) return;
  if (source.cos_sin && unit.turns() && !source.is_value(item)) part.turn(ready.angles);
  const Packs packs = part.rounded_packs();
  if (item < source.rows) {
    store_packs(fresh.q[item], packs, unit);
    return;
  }
  store_packs(source.is_value(item) ? fresh.v : fresh.k, packs, unit);
  scalar* const kept = source.is_value(item) ? source.v : source.k;
  if (kept) store_packs(kept, packs, unit);
}

// Where the newest token's head lies in the cache, or null where this block does not keep it.
__device__ __forceinline__ scalar* kept_at(scalar* cache, i64 slot, const Share& mine, i64 block_stride,
                                           i64 slot_stride) {
  if (slot < 0 || mine.row0 > 0) return nullptr;  // of the blocks with rows of a KV head, the first keeps it
  return cache + slot / BLOCK_SIZE * block_stride + slot % BLOCK_SIZE * slot_stride + mine.kv_head * HEAD_DIM;
}

// All heads of the block, once the kernel before is done.
__device__ __forceinline__ void turn_all(Fresh& fresh, const Source& source, Ready& ready, const Unit& unit) {
  int item = threadIdx.x / LANES;
  turn_head(fresh, source, item, unit, ready);
#pragma unroll
  for (int first = AT_ONCE; first < MOST_HEADS; first += AT_ONCE) {
    item += AT_ONCE;
    if (unit.active() && source.norm(item)) ready.weight = load_packs(source.norm(item), unit);
    turn_head(fresh, source, item, unit, ready);
  }
  __syncthreads();
}

__device__ __forceinline__ void take_queries(Queries& a, const Fresh& fresh, const Share& mine, int window,
                                             const Lane& lane) {
#pragma unroll
  for (int part = 0; part < PARTS; ++part) {
    const int row = min(part * 8 + lane.g, min(ROWS, mine.rows - mine.row0) - 1);
    load_query(a.of[part], fresh.q[row], lane);
    a.to[part] = mine.past;
    a.from[part] = window > 0 ? mine.past - window + 1 : 0;
  }
}

// Greatest key that is read from the cache; a half tile with nothing else to read has the newest key alone.
__device__ __forceinline__ int last_kept(const Share& mine) { return max(mine.past - 1, 0); }

// Keys from the newest on are not in the cache: they become the newest, whose scores count once.
struct Newest {
  const Fresh& fresh;
  const Lane& lane;
  int key;

  __device__ __forceinline__ void keys(Keys& k, int tile) const {
    if (tile * 16 + 15 < key) return;
#pragma unroll
    for (int half = 0; half < 2; ++half)
      if (tile * 16 + half * 8 + lane.g >= key) take_key(k[half], fresh.k, lane, Plain());
  }
  __device__ __forceinline__ void values(Values& v, int tile) const {
    if (tile * 16 + 15 < key) return;
#pragma unroll
    for (int four = 0; four < 4; ++four)
      if (tile * 16 + four / 2 * 8 + 2 * lane.c + four % 2 >= key)
        take_value(v[four / 2][four % 2], fresh.v, lane, Plain());
  }
};

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS)
    rope_decode(scalar* out, const scalar* qkv, const i64* positions, const float* cos_sin, const scalar* q_norm,
                const scalar* k_norm, scalar* k_cache, scalar* v_cache, const i64* slots, const int* block_tables,
                const int* cu_query_lens, const int* kv_lens, const float* sinks, float4* partial,
                float2* partial_stats, int* counters, i64 qkv_stride, i64 table_stride, i64 k_block_stride,
                i64 k_slot_stride, i64 v_block_stride, i64 v_slot_stride, int kv_heads, int table_width, int window,
                int least_share, float eps, float offset, float scale, float softcap) {
  const int request = blockIdx.z;
  const Lane lane = this_lane();
  const int* table = block_tables + request * table_stride;
  follow_older();
  const bool guessed = can_guess(window);
  Pages pages[2] = {};
  if (guessed) guess_pages(pages, table, table_width, lane.warp);
  const i64 position = positions[request], slot = slots[request];
  Share mine;
  if (!take_share(mine, cu_query_lens, kv_lens, request, kv_heads, window, least_share)) return;
  const Source source = {qkv + request * qkv_stride,
                         q_norm,
                         k_norm,
                         cos_sin,
                         kept_at(k_cache, slot, mine, k_block_stride, k_slot_stride),
                         kept_at(v_cache, slot, mine, v_block_stride, v_slot_stride),
                         mine.kv_head,
                         kv_heads,
                         mine.row0,
                         min(ROWS, mine.rows - mine.row0),
                         mine.past / 16 < mine.stop,
                         eps,
                         offset};
  const Unit unit = this_unit();
  Ready ready = make_ready(source, position, unit);
  const Cache cache = {k_cache + mine.kv_head * HEAD_DIM, v_cache + mine.kv_head * V_DIM, table, k_block_stride,
                       k_slot_stride, v_block_stride, v_slot_stride, last_kept(mine)};
  Walk walk(cache, lane, mine, pages, guessed);
  walk.load();
  walk.fetch_first();

  __shared__ Fresh fresh;
  follow();
  turn_all(fresh, source, ready, unit);
  Queries a;
  take_queries(a, fresh, mine, window, lane);
  Sums sums;
  clear(sums);
  walk.go(sums, a, scale, softcap, Newest{fresh, lane, mine.past});

  alignas(16) __shared__ float slabs[WARPS][USED_ROWS * PITCH];
  const Rows rows = {out, sinks, partial, partial_stats, counters, mine.row0, source.rows,
                     mine.q_start, mine.kv_head, kv_heads, mine.active};
  meet(rows, sums, [&](int warp) { return slabs[warp]; }, lane);
}

#endif
