// The instructions of compute capability 9.0: tensor copies, barriers in shared memory, clusters, products of tiles.
// The tests replace this file, as they do ptx.cuh. Included by kernels that serve 9.0 (sm_90a) alone.
#pragma once

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define HAS_TILE_COPIES 1
#else
#define HAS_TILE_COPIES 0
#endif

// Where a matrix lies and how it is cut to boxes, made by the driver on the host (CUtensorMap).
struct alignas(64) TensorMap {
  u64 opaque[16];
};
#define TENSOR_MAP const __grid_constant__ TensorMap

typedef u64 Barrier;  // in shared memory; phases 0, 1, 0, ... end when all arrived and all announced bytes are there

__device__ __forceinline__ void barrier_init(Barrier* b, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(b)), "r"(arrivals) : "memory");
}

// Makes initialized barriers visible to copies and to the cluster.
__device__ __forceinline__ void barriers_ready() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ __forceinline__ void arrive(Barrier* b) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(b)) : "memory");
}

// Arrives, and announces bytes that copies will bring.
__device__ __forceinline__ void arrive_expecting(Barrier* b, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(b)), "r"(bytes) : "memory");
}

// Until the phase of this parity has ended; sees what was written before the arrivals.
__device__ __forceinline__ void wait_for(Barrier* b, int parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
      "@done bra over;\n"
      "bra again;\n"
      "over:\n"
      "}" ::"r"(shared_address(b)),
      "r"(parity)
      : "memory");
}

// The same for what copies and this block's own threads wrote, without a fence.
__device__ __forceinline__ void wait_here(Barrier* b, int parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra over;\n"
      "bra again;\n"
      "over:\n"
      "}" ::"r"(shared_address(b)),
      "r"(parity)
      : "memory");
}

// Fetches the map itself, which the first copy would wait for.
__device__ __forceinline__ void prefetch_map(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

__device__ __forceinline__ u64 read_once_policy() {
  u64 policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

__device__ __forceinline__ u64 read_often_policy() {
  u64 policy;
  asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// Copies the box at (row, column) of a matrix; its whole size counts as bytes of the barrier, zeros beyond the edges.
__device__ __forceinline__ void copy_box(void* to, const TensorMap& from, int row, int column, Barrier* b, u64 policy) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(shared_address(to)),
      "l"(&from), "r"(column), "r"(row), "r"(shared_address(b)), "l"(policy)
      : "memory");
}

// The same with three coordinates: columns within a span, rows, spans (tensor_map.py tells how a matrix gets them).
__device__ __forceinline__ void copy_spans(void* to, const TensorMap& from, int row, Barrier* b, u64 policy) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%2, %3, %2}], [%4], %5;" ::"r"(shared_address(to)),
      "l"(&from), "r"(0), "r"(row), "r"(shared_address(b)), "l"(policy)
      : "memory");
}

// The same with four coordinates: columns within a span, rows, spans, pages of rows.
__device__ __forceinline__ void copy_page(void* to, const TensorMap& from, int page, int row, int span, Barrier* b,
                                          u64 policy) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%2, %3, %4, %5}], [%6], %7;" ::"r"(shared_address(to)),
      "l"(&from), "r"(0), "r"(row), "r"(span), "r"(page), "r"(shared_address(b)), "l"(policy)
      : "memory");
}

// What this thread wrote to shared memory is seen by products and copies that follow a barrier.
__device__ __forceinline__ void publish_writes() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// A barrier of its own for some of a block's warps; 0 is that of all.
__device__ __forceinline__ void meet(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// Registers of a warpgroup's threads, between warpgroups of a block: all must have given before one can take.
template <int N>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}

template <int N>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}

// The same to the same place in all blocks of the cluster whose bit is set; each one's own barrier counts the bytes.
__device__ __forceinline__ void copy_box_to(u32 blocks, void* to, const TensorMap& from, int row, int column, Barrier* b,
                                            u64 policy) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster"
      ".L2::cache_hint [%0], [%1, {%2, %3}], [%4], %5, %6;" ::"r"(shared_address(to)),
      "l"(&from), "r"(column), "r"(row), "r"(shared_address(b)), "h"(u16(blocks)), "l"(policy)
      : "memory");
}

// A cluster's blocks: the number of this one; meeting in two steps, by all threads; writing and arriving in another's
// shared memory, and reading it, at the place of one's own pointer.
__device__ __forceinline__ int rank_in_cluster() {
  u32 rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return int(rank);
}

__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }

__device__ __forceinline__ u32 address_at(const void* own, int rank) {
  u32 address;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(own)), "r"(rank));
  return address;
}

template <class T>
__device__ __forceinline__ T load_at(const T* own, int rank) {
  static_assert(sizeof(T) == 8 || sizeof(T) == 16, "two or four floats");
  T x;
  if constexpr (sizeof(T) == 16)
    asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
                 : "r"(address_at(own, rank))
                 : "memory");
  else
    asm volatile("ld.shared::cluster.v2.f32 {%0, %1}, [%2];" : "=f"(x.x), "=f"(x.y) : "r"(address_at(own, rank)) : "memory");
  return x;
}

// Writes there without a fence: its 4 bytes count at a barrier of the block that it writes to.
__device__ __forceinline__ void send_to(float* own, int rank, float value, Barrier* counter) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(address_at(own, rank)),
               "r"(__float_as_uint(value)), "r"(address_at(counter, rank))
               : "memory");
}

// The same with 16 bytes.
__device__ __forceinline__ void send_to(float4* own, int rank, const float (&x)[4], Barrier* counter) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(
                   address_at(own, rank)),
               "f"(x[0]), "f"(x[1]), "f"(x[2]), "f"(x[3]), "r"(address_at(counter, rank))
               : "memory");
}

// Says that reads are over, nothing of what was written: that would take a fence.
__device__ __forceinline__ void pass_at(Barrier* own, int rank) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(address_at(own, rank)) : "memory");
}

#if DTYPE != F32
// multiply_tile: d[64 x 8 N] += a[64 x 16] b[8 N x 16]^T by four warps, both in shared memory as boxes of rows of 128
// bytes. Lane 4g + c of warp w gets rows 16 w + g (d[.][0], d[.][1]) and g + 8, columns 2c and 2c + 1 of each 8.
// Products are opened, asked for, closed, and done some time later: of what was closed, all but the latest PENDING when
// await_products<PENDING> returns. Until then nobody may touch the sums or write to the boxes.
__device__ __forceinline__ void open_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void close_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int PENDING>
__device__ __forceinline__ void await_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

__device__ __forceinline__ void finish_products() {
  close_products();
  await_products<0>();
}

// Sums are read after this, wherever the compiler would rather read them.
template <int N>
__device__ __forceinline__ void settle(float (&d)[N][4]) {
#pragma unroll
  for (int n = 0; n < N; ++n)
    asm volatile("" : "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])::"memory");
}

// A tile as the products take it: groups of 8 rows 1024 bytes apart, 128-byte swizzle; and one some bytes further on.
typedef u64 Tile;
__device__ __forceinline__ Tile tile_at(const void* p) {
  return u64((shared_address(p) & 0x3ffff) >> 4) | u64(1) << 16 | u64(1024 >> 4) << 32 | u64(1) << 62;
}
__device__ __forceinline__ Tile further(Tile tile, int bytes) { return tile + u64(bytes >> 4); }

#include "wgmma.cuh"
#endif
