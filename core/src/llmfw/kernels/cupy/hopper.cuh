// The instructions of compute capability 9.0 that move tiles: tensor copies, barriers in shared memory, clusters.
// The tests replace this file, as they do ptx.cuh. Included by kernels that serve 9.0 and newer alone.
#pragma once

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
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

// A cluster's blocks: the number of this one; meeting in two steps, by all threads; writing and arriving in another's
// shared memory, at the place of one's own pointer.
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

__device__ __forceinline__ void store_at(float2* own, int rank, float2 value) {
  asm volatile("st.shared::cluster.v2.f32 [%0], {%1, %2};" ::"r"(address_at(own, rank)), "f"(value.x), "f"(value.y)
               : "memory");
}

__device__ __forceinline__ void arrive_at(Barrier* own, int rank) {
  asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(address_at(own, rank)) : "memory");
}
