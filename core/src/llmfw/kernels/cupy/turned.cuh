// Products of tiles whose groups of 8 rows lie apart, of their rows or of their columns, and stores of turned matrices:
// what a tile of keys needs that is read as K and as V. The tests replace this file, as they do hopper.cuh.
#pragma once

#if DTYPE != F32
#if DTYPE == BF16
#define GROUPS_PRODUCT(shape) "wgmma.mma_async.sync.aligned.m64" shape "k16.f32.bf16.bf16 "
#else
#define GROUPS_PRODUCT(shape) "wgmma.mma_async.sync.aligned.m64" shape "k16.f32.f16.f16 "
#endif
#define GROUPS_FOUR(d) "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])

// Groups of 8 rows of 128 bytes, `pitch` bytes apart, 128-byte swizzle; and the same some bytes further on.
struct Groups {
  u64 descriptor;
  __device__ __forceinline__ Groups further(int bytes) const { return {descriptor + u64(bytes >> 4)}; }
};

__device__ __forceinline__ Groups groups_at(const void* p, int pitch) {
  u64 x = u64((shared_address(p) & 0x3ffff) >> 4) | u64(1) << 16 | u64(pitch >> 4) << 32 | u64(1) << 62;
  asm volatile("" : "+l"(x));  // so that those further on are added up where they are used, and fill no registers
  return {x};
}

// d[64 x 8 N] += a[64 x 16] b[8 N x 16]^T as multiply_tile of hopper.cuh. COLUMNS: a is given by its columns: 16 rows
// (two groups) of 64 values lie there where a has 16 columns of 64.
template <int COLUMNS, int N>
__device__ __forceinline__ void multiply_groups(float (&d)[N][4], Groups a, Groups b) {
  static_assert(N == 1 || N == 2 || N == 4 || N == 8, "8, 16, 32 or 64 columns");
  const u64 x = a.descriptor, y = b.descriptor;
  if constexpr (N == 1)
    asm volatile(GROUPS_PRODUCT("n8") "{%0,%1,%2,%3}, %4, %5, 1, 1, 1, %6, 0;"
                 : GROUPS_FOUR(d[0])
                 : "l"(x), "l"(y), "n"(COLUMNS));
  if constexpr (N == 2)
    asm volatile(GROUPS_PRODUCT("n16") "{%0,%1,%2,%3,%4,%5,%6,%7}, %8, %9, 1, 1, 1, %10, 0;"
                 : GROUPS_FOUR(d[0]), GROUPS_FOUR(d[1])
                 : "l"(x), "l"(y), "n"(COLUMNS));
  if constexpr (N == 4)
    asm volatile(GROUPS_PRODUCT("n32") "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15}, %16, %17, "
                 "1, 1, 1, %18, 0;"
                 : GROUPS_FOUR(d[0]), GROUPS_FOUR(d[1]), GROUPS_FOUR(d[2]), GROUPS_FOUR(d[3])
                 : "l"(x), "l"(y), "n"(COLUMNS));
  if constexpr (N == 8)
    asm volatile(GROUPS_PRODUCT("n64") "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,"
                 "%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}, %32, %33, 1, 1, 1, %34, 0;"
                 : GROUPS_FOUR(d[0]), GROUPS_FOUR(d[1]), GROUPS_FOUR(d[2]), GROUPS_FOUR(d[3]), GROUPS_FOUR(d[4]),
                   GROUPS_FOUR(d[5]), GROUPS_FOUR(d[6]), GROUPS_FOUR(d[7])
                 : "l"(x), "l"(y), "n"(COLUMNS));
}

// Two 8 x 8 matrices of 16-bit values to shared memory, turned: lane 8i + r gives where column r of matrix i goes, lane
// 4g + c its values 2c, 2c + 1 of row g.
__device__ __forceinline__ void store_columns(scalar* column, u32 x, u32 y) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(shared_address(column)), "r"(x),
               "r"(y)
               : "memory");
}
#endif
