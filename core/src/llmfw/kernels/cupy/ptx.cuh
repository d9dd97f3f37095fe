// The instructions that CUDA C++ without headers does not name: conversions, cache hints, mma.
// The tests replace this one file to run the kernels on a CPU.
#pragma once

__device__ __forceinline__ float to_float(scalar x) {
#if DTYPE == F32
  return x;
#elif DTYPE == BF16
  return __uint_as_float(u32(x) << 16);
#else
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
  return y;
#endif
}

__device__ __forceinline__ scalar from_float(float x) {
#if DTYPE == F32
  return x;
#elif DTYPE == BF16
  u16 y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x));
  return y;
#else
  u16 y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
  return y;
#endif
}

// Programmatic dependent launch: what earlier kernels wrote is there after the wait; the next kernel may be started
// once every block of this one said so.
__device__ __forceinline__ void wait_for_previous() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
__device__ __forceinline__ void let_next_start() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

// 16, 8 or 4 bytes that are read once: past L1. Not by the read-only way (.nc): the assembler moves such loads behind the
// wait for the kernel before, and nothing is fetched ahead.
__device__ __forceinline__ uint4 stream16(const void* p) {
  uint4 x;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "l"(p));
  return x;
}

__device__ __forceinline__ uint2 stream8(const void* p) {
  uint2 x;
  asm volatile("ld.global.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(x.x), "=r"(x.y) : "l"(p));
  return x;
}

__device__ __forceinline__ u32 stream4(const void* p) {
  u32 x;
  asm volatile("ld.global.L1::no_allocate.u32 %0, [%1];" : "=r"(x) : "l"(p));
  return x;
}

// Reads through L2, for data that other blocks of the same launch wrote.
__device__ __forceinline__ float4 load_l2(const float4* p) {
  float4 x;
  asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
               : "l"(p)
               : "memory");
  return x;
}

__device__ __forceinline__ float2 load_l2(const float2* p) {
  float2 x;
  asm volatile("ld.global.cg.v2.f32 {%0, %1}, [%2];" : "=f"(x.x), "=f"(x.y) : "l"(p) : "memory");
  return x;
}

// Brings 128 bytes into L2; harmless before `follow`, for L2 is where writes meet.
__device__ __forceinline__ void fetch_l2(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

// Writes what is not read again soon.
__device__ __forceinline__ void store_once(float4* p, const float4& x) {
  asm volatile("st.global.cs.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(p), "f"(x.x), "f"(x.y), "f"(x.z), "f"(x.w)
               : "memory");
}

// Adds to a counter; what the block wrote before a barrier is seen by who reads after the count that he gets.
__device__ __forceinline__ int add_release_acquire(int* p, int x) {
  int old;
  asm volatile("atom.add.acq_rel.gpu.global.s32 %0, [%1], %2;" : "=r"(old) : "l"(p), "r"(x) : "memory");
  return old;
}

// All of a block's shared memory whose size the launch gives, as bytes.
#define DYNAMIC_SHARED(name) extern __shared__ __align__(1024) u8 name[]

__device__ __forceinline__ u32 shared_address(const void* p) { return u32(__cvta_generic_to_shared(p)); }

// Copies 16 bytes from global to shared memory, or zeros for 0 bytes, past L1 and without waiting.
__device__ __forceinline__ void copy16_async(void* to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes)
               : "memory");
}

// Copies 16, 8 or 4 bytes likewise.
template <int BYTES>
__device__ __forceinline__ void copy_async(void* to, const void* from) {
  if constexpr (BYTES == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(shared_address(to)), "l"(from), "n"(BYTES)
                 : "memory");
}

// Closes a group of this thread's copies; waits until all but the latest PENDING groups are there (for this thread).
__device__ __forceinline__ void close_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int PENDING>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float reciprocal_fast(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

#if DTYPE != F32
// d[16 x 8] += a[16 x 16] b[16 x 8] in float32. Lane 4g + c holds a0 (row g, k 2c 2c+1), a1 (row g + 8), a2 (row g,
// k 2c+8 2c+9), a3 (row g + 8), b0 (k 2c 2c+1, column g), b1 (k 2c+8 2c+9), d0 d1 (row g, columns 2c 2c+1), d2 d3
// (row g + 8).
__device__ __forceinline__ void mma(float& d0, float& d1, float& d2, float& d3, u32 a0, u32 a1, u32 a2, u32 a3,
                                    u32 b0, u32 b1) {
#if DTYPE == BF16
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
#else
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
#endif
      : "+f"(d0), "+f"(d1), "+f"(d2), "+f"(d3)
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Four 8 x 8 matrices of 16-bit values in shared memory; lane 8i + r gives the address of row r of matrix i. Lane 4g + c
// gets values 2c, 2c + 1 of row g of each, or with the second of column g (rows 2c, 2c + 1).
__device__ __forceinline__ void load_matrices(u32 (&x)[4], const scalar* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(shared_address(row))
               : "memory");
}

__device__ __forceinline__ void load_columns(u32 (&x)[4], const scalar* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(shared_address(row))
               : "memory");
}

// An 8 x 8 matrix of 16-bit values, turned: lane 4g + c has values 2c, 2c + 1 of row g, and gets those of column g.
__device__ __forceinline__ u32 turned(u32 x) {
  u32 y;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

// Two values as one register: low in the low half.
__device__ __forceinline__ u32 pack2(float low, float high) {
  u32 x;
#if DTYPE == BF16
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(high), "f"(low));
#else
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(high), "f"(low));
#endif
  return x;
}
#endif
