// rope_and_attend where every request generates one token: q/k norm, rotary embedding, paged K/V write and split-KV
// flash decoding in one kernel, 16-bit types, for head sizes up to 128. Shapes, launch and numbers are those of
// paged.cuh, with a packed qkv as in rope_cache.cu in q's place; slots int64 [requests], positions int64 [requests].
//
// Every block normalises and rotates its own rows of q, and the block whose share holds the newest key that key too,
// into shared memory. There its warps read the newest key and value; the cache's copy is for later steps. So no block
// reads what another one of this launch writes, as long as no request shares the block that another writes to.
#include "common.cuh"

#if DTYPE != F32
#include "paged_tiles.cuh"
#include "rotary.cuh"

constexpr int AT_ONCE = THREADS / LANES;                        // heads that the block turns at the same time
constexpr int MOST_HEADS = (GROUP < ROWS ? GROUP : ROWS) + 2;   // rows of q, the newest key and value
constexpr int Q_PITCH = HEAD_DIM + 8;                           // so that rows begin in different banks
static_assert(V_DIM == HEAD_DIM, "K and V come out of one packed row of heads");

// What this step brings, normalised and rotated.
struct Fresh {
  alignas(16) scalar q[ROWS][Q_PITCH];
  alignas(16) scalar k[HEAD_DIM], v[V_DIM];
};

// Where a step's heads come from and where they go.
struct Source {
  const scalar *qkv, *q_norm, *k_norm;  // qkv: the request's row
  scalar *k, *v;                        // of the newest token in the cache, or null
  int kv_head, kv_heads, first, rows;   // of the block's rows of q, in their KV head
  bool newest;                          // whether K and V are wanted
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

// The heads of items first .. first + AT_ONCE - 1, LANES lanes each. `weight` is that of their norm.
__device__ __forceinline__ void turn_heads(Fresh& fresh, const Source& source, int item, const Unit& unit,
                                           const Packs& weight, const Angles& angles, bool rotates) {
  const bool active = item < source.heads() && unit.active();
  Part part;
  if (active) part.set(load_packs(source.head(item), unit));
  if (source.q_norm || source.k_norm) {  // uniform, so that all lanes meet in the shuffles
    const float scale = part.inverse_rms(source.eps);
    if (active && source.norm(item)) part.normalise(scale, weight, source.offset);
  }
  if (!active) return;
  if (rotates && unit.turns() && !source.is_value(item)) part.turn(angles);
  const Packs packs = part.rounded_packs();
  if (item < source.rows) {
    store_packs(fresh.q[item], packs, unit);
    return;
  }
  store_packs(source.is_value(item) ? fresh.v : fresh.k, packs, unit);
  scalar* const kept = source.is_value(item) ? source.v : source.k;
  if (kept) store_packs(kept, packs, unit);
}

// Keys from the newest on are not in the cache yet, or not at all: they become the newest, whose scores count once.
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
  Pages pages = {};
  if (guessed) pages.of[0] = pages.of[1] = guess_page(table, table_width, lane.warp);
  const i64 position = positions[request], slot = slots[request];
  Share mine;
  if (!take_share(mine, cu_query_lens, kv_lens, request, kv_heads, window, least_share)) return;
  // The newest key is not read from the cache; a half of which nothing else can be read is the newest's alone.
  const Cache cache = {k_cache + mine.kv_head * HEAD_DIM, v_cache + mine.kv_head * V_DIM, table, k_block_stride,
                       k_slot_stride, v_block_stride, v_slot_stride, max(mine.past - 1, 0)};
  Walk walk(cache, lane, mine, pages, guessed);
  walk.load();
  walk.fetch_first();

  __shared__ Fresh fresh;
  const bool keeps = slot >= 0 && mine.row0 == 0;  // of the blocks with rows of a KV head, the first
  const i64 block = slot / BLOCK_SIZE, place = slot % BLOCK_SIZE;
  const i64 own_k = block * k_block_stride + place * k_slot_stride + mine.kv_head * HEAD_DIM;
  const i64 own_v = block * v_block_stride + place * v_slot_stride + mine.kv_head * V_DIM;
  const Source source = {qkv + request * qkv_stride,
                         q_norm,
                         k_norm,
                         keeps ? k_cache + own_k : nullptr,
                         keeps ? v_cache + own_v : nullptr,
                         mine.kv_head,
                         kv_heads,
                         mine.row0,
                         min(ROWS, mine.rows - mine.row0),
                         mine.past / 16 < mine.stop,
                         eps,
                         offset};
  const Unit unit = this_unit();
  int item = threadIdx.x / LANES;
  Angles angles;
  if (cos_sin && unit.turns()) angles = load_angles(cos_sin, position, unit);
  Packs weight;
  if (unit.active() && source.norm(item)) weight = load_packs(source.norm(item), unit);
  follow();
  turn_heads(fresh, source, item, unit, weight, angles, cos_sin);
#pragma unroll
  for (int first = AT_ONCE; first < MOST_HEADS; first += AT_ONCE) {
    item += AT_ONCE;
    if (unit.active() && source.norm(item)) weight = load_packs(source.norm(item), unit);
    turn_heads(fresh, source, item, unit, weight, angles, cos_sin);
  }
  __syncthreads();

  Queries a;
#pragma unroll
  for (int part = 0; part < PARTS; ++part) {
    load_query(a.of[part], fresh.q[min(part * 8 + lane.g, source.rows - 1)], lane);
    a.to[part] = mine.past;
    a.from[part] = window > 0 ? mine.past - window + 1 : 0;
  }
  Sums sums;
  clear(sums);
  walk.go(sums, a, scale, softcap, Newest{fresh, lane, mine.past});

  alignas(16) __shared__ float slabs[WARPS][ROWS * PITCH];
  const Rows rows = {out, sinks, partial, partial_stats, counters, mine.row0, source.rows,
                     mine.q_start, mine.kv_head, kv_heads, mine.active};
  meet(rows, sums, [&](int warp) { return slabs[warp]; }, lane);
}

#endif
