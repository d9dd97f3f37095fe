// The CPU's stand-in for turned.cuh.
#pragma once

#if DTYPE != F32
template <int COLUMNS, int N>
void multiply_groups(float (&d)[N][4], const u8* a, int pitch, const u8* b) {
  const int g = emulated::lane() / 4, c = emulated::lane() % 4, warp = emulated::current->number / 32 % 4;
  for (int n = 0; n < N; ++n)
    for (int i = 0; i < 4; ++i)
      for (int k = 0; k < 16; ++k) {
        const int m = warp * 16 + g + i / 2 * 8, row = COLUMNS ? k : m, column = COLUMNS ? m : k;
        d[n][i] += value_at(a + row / 8 * pitch, row % 8, column) * value_at(b, n * 8 + 2 * c + i % 2, k);
      }
}

inline void store_columns(scalar* column, u32 x, u32 y) {
  const u64 mine = u64(column);
  const emulated::Operands& all = emulated::exchange({{x, y, u32(mine), u32(mine >> 32)}});
  const int lane = emulated::lane(), row = lane % 8;
  if (lane >= 16) return;
  for (int k = 0; k < 8; ++k) {
    const u32 pair = all.of[4 * k + row / 2][lane / 8];
    column[k] = scalar(pair >> (row % 2 * 16));
  }
}
#endif
