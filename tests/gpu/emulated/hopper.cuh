// The CPU's hopper.cuh: barriers count, a cluster's blocks run together. Copies and what is sent to another
// block land some time after they were asked for, in whose place NaN lies until then, and products are done when they
// are awaited: who reads too early or gives back a stage too early gets a wrong result.
#pragma once

#define HAS_TILE_COPIES 1

// What `encode` in emulator.py packs: what is innermost comes first.
struct TensorMap {
  const scalar* values;
  i64 sizes[4], strides[4], box[4];
  i64 unused[3];
};
#define TENSOR_MAP const TensorMap

struct Barrier {
  int arrivals : 16, missing : 15, parity : 1;
  int bytes;
};
static_assert(sizeof(Barrier) == 8, "as on the device");

inline void settle(Barrier* b) {
  if (b->missing || b->bytes) return;
  b->missing = b->arrivals;
  b->parity = ~b->parity;
}

inline void barrier_init(Barrier* b, int arrivals) {
  b->arrivals = b->missing = arrivals;
  b->parity = b->bytes = 0;
}
inline void barriers_ready() {}
inline void arrive(Barrier* b) {
  if (b->missing == 0) abort();  // more arrivals than announced
  b->missing = b->missing - 1;
  settle(b);
}
inline void arrive_expecting(Barrier* b, int bytes) {
  b->bytes += bytes;
  arrive(b);
}
inline void wait_for(Barrier* b, int parity) {
  while ((b->parity & 1) == parity) emulated::yield();
}
inline void wait_here(Barrier* b, int parity) { wait_for(b, parity); }
inline void prefetch_map(const TensorMap&) {}
inline u64 read_once_policy() { return 0; }
inline u64 read_often_policy() { return 0; }

// Says that a block is still there: nobody may reach into one that is gone.
inline void expect_live(int rank) {
  if ((*emulated::cluster)[rank].live == 0) abort();
}

// The box at these coordinates, zeros beyond the edges. Packs of 16 bytes lie at their number in the row of 128 bytes,
// xor the row's number: the 128-byte swizzle.
inline void copy_now(void* to, const TensorMap& from, const std::array<i64, 4>& at, Barrier* b) {
  i64 row = 0;
  for (i64 z = 0; z < from.box[3]; ++z)
    for (i64 y = 0; y < from.box[2]; ++y)
      for (i64 x = 0; x < from.box[1]; ++x, ++row)
        for (i64 k = 0; k < 64; ++k) {
          const i64 place[4] = {at[0] + k, at[1] + x, at[2] + y, at[3] + z};
          bool inside = true;
          i64 offset = 0;
          for (int i = 0; i < 4; ++i) {
            inside &= place[i] < from.sizes[i];
            offset += place[i] * from.strides[i];
          }
          static_cast<scalar*>(to)[row * 64 + (k / 8 ^ row % 8) * 8 + k % 8] = inside ? from.values[offset] : 0;
        }
  b->bytes -= int(row) * 128;
  settle(b);
}

inline void copy(int rank, void* to, const TensorMap& from, const std::array<i64, 4>& at, Barrier* b) {
  if (u64(to) % 1024 || from.box[0] != 64) abort();
  memset(to, 0xff, size_t(from.box[1] * from.box[2] * from.box[3]) * 128);
  emulated::land_later([=] {
    expect_live(rank);
    copy_now(to, from, at, b);
  });
}

inline int rank_in_cluster() { return int(blockIdx.x) % int(emulated::cluster->size()); }

inline void copy_box(void* to, const TensorMap& from, int row, int column, Barrier* b, u64) {
  copy(rank_in_cluster(), to, from, {column, row, 0, 0}, b);
}
inline void copy_spans(void* to, const TensorMap& from, int row, Barrier* b, u64) {
  copy(rank_in_cluster(), to, from, {0, row, 0, 0}, b);
}
inline void copy_page(void* to, const TensorMap& from, int page, int row, int span, Barrier* b, u64) {
  copy(rank_in_cluster(), to, from, {0, row, span, page}, b);
}
inline void publish_writes() {}
inline void meet(int number, int threads) {
  auto& gate = emulated::block->gates[number];
  const int round = gate.round;
  if (++gate.waiting == threads) {
    gate.waiting = 0;
    ++gate.round;
  }
  while (gate.round == round) emulated::yield();
}

template <int N>
void give_registers() {}
template <int N>
void take_registers() {}

inline void cluster_arrive() {
  const size_t threads = emulated::cluster->size() * emulated::block->threads.size();
  ++emulated::current->cluster_rounds;
  if (size_t(++emulated::cluster_waiting) < threads) return;
  emulated::cluster_waiting = 0;
  ++emulated::cluster_round;
}
inline void cluster_wait() {
  while (emulated::cluster_round < emulated::current->cluster_rounds) emulated::yield();
}

template <class P>
P* place_at(P* own, int rank) {
  u8* const here = emulated::block->dynamic_shared();
  expect_live(rank);
  u8* const there = (*emulated::cluster)[rank].dynamic_shared();
  return (P*)(there + ((u8*)own - here));
}
template <class T>
T load_at(const T* own, int rank) {
  return *place_at(own, rank);
}

template <class T>
void send(T* own, int rank, const T& value, Barrier* counter) {
  T* const to = place_at(own, rank);
  Barrier* const b = place_at(counter, rank);
  memset(to, 0xff, sizeof(T));
  emulated::land_later([=] {
    expect_live(rank);
    *to = value;
    b->bytes -= int(sizeof(T));
    settle(b);
  });
}
inline void send_to(float* own, int rank, float value, Barrier* counter) { send(own, rank, value, counter); }
inline void pass_at(Barrier* own, int rank) { arrive(place_at(own, rank)); }

inline void send_to(float4* own, int rank, const float (&x)[4], Barrier* counter) {
  send(own, rank, make_float4(x[0], x[1], x[2], x[3]), counter);
}

inline void copy_box_to(u32 blocks, void* to, const TensorMap& from, int row, int column, Barrier* b, u64 policy) {
  for (int rank = 0; rank < int(emulated::cluster->size()); ++rank)
    if (blocks >> rank & 1)
      copy(rank, place_at(static_cast<u8*>(to), rank), from, {column, row, 0, 0}, place_at(b, rank));
}

#if DTYPE != F32
inline void open_products() {}
inline void close_products() { emulated::current->products.close(); }
template <int PENDING>
void await_products() {
  emulated::current->products.await(PENDING);
}
inline void finish_products() {
  close_products();
  await_products<0>();
}
template <int N>
void settle(float (&)[N][4]) {}

typedef const u8* Tile;
inline Tile tile_at(const void* p) { return static_cast<Tile>(p); }
inline Tile further(Tile tile, int bytes) { return tile + bytes; }

// Value k of a row of a box that begins at `first`; the address says where in the swizzle it lies.
inline float value_at(const u8* first, int row, int k) {
  const u64 at = u64(first) + row * 128 + k * 2;
  return to_float(*reinterpret_cast<const scalar*>(at ^ (at >> 7 & 7) << 4));
}

template <int N>
void multiply_now(float (&d)[N][4], Tile a, Tile b) {
  const int g = emulated::lane() / 4, c = emulated::lane() % 4, warp = emulated::current->number / 32 % 4;
  for (int n = 0; n < N; ++n)
    for (int i = 0; i < 4; ++i)
      for (int k = 0; k < 16; ++k)
        d[n][i] += value_at(a, warp * 16 + g + i / 2 * 8, k) * value_at(b, n * 8 + 2 * c + i % 2, k);
}

template <int N>
void multiply_tile(float (&d)[N][4], Tile a, Tile b) {
  emulated::current->products.add([&d, a, b] { multiply_now(d, a, b); });
}
#endif
